"""Classes of points: the three formats, their class maps, result files, errors, the doctor."""
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import PIL
import pytest
from scipy.spatial import cKDTree

import data
import finetune
import segment
import synthetic
from conftest import P2, R0, TR, calib_line
from test_data import clone, edit, put

LAYOUTS = ("nuscenes", "kitti", "waymo")
CACHE = os.environ.get("LIDAR_CAMERA_CACHE", "")  # before a fixture of conftest changes it


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """{layout: root} of one small world: 2 train and 1 val scenes of 2 frames."""
    folder = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        synthetic.write(folder / layout, train=2, val=1, frames=2, format=layout)
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture(autouse=True)
def printed_anew():
    data.print_once.cache_clear()


def opened(root, images=False):
    return data.open_dataset(root, "small", images=images, labels=False, point_labels=True)


# ---- class maps ----------------------------------------------------------------------

# ids of SemanticKITTI's configuration and the name of the class that each is learned as
KITTI_IDS = [
    (0, None), (1, None), (10, "car"), (11, "bicycle"), (13, "other-vehicle"), (15, "motorcycle"),
    (16, "other-vehicle"), (18, "truck"), (20, "other-vehicle"), (30, "person"), (31, "bicyclist"),
    (32, "motorcyclist"), (40, "road"), (44, "parking"), (48, "sidewalk"), (49, "other-ground"),
    (50, "building"), (51, "fence"), (52, None), (60, "road"), (70, "vegetation"), (71, "trunk"),
    (72, "terrain"), (80, "pole"), (81, "traffic-sign"), (99, None), (252, "car"),
    (253, "bicyclist"), (254, "person"), (255, "motorcyclist"), (256, "other-vehicle"),
    (257, "other-vehicle"), (258, "truck"), (259, "other-vehicle"),
]
# class 0, 1, 2, ... -> the id that a result file has
KITTI_WRITTEN = [10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81]


def first_label(root):
    return sorted(root.glob("dataset/sequences/00/labels/*.label"))[0]


def test_each_id_of_semantic_kitti_is_its_class_whatever_the_instance(roots, tmp_path):
    root = clone(roots["kitti"], tmp_path)
    dataset = opened(root)
    n = len(dataset.sweep(0))
    order = np.arange(n) % len(KITTI_IDS)
    ids = np.array([id for id, _ in KITTI_IDS], np.uint32)[order]
    instance = np.random.default_rng(0).integers(0, 2**16, n, dtype=np.uint32)
    put(first_label(root), (ids | instance << 16).tobytes())
    names = data.POINT_CLASSES["kitti"]
    expected = [names.index(name) if name else -1 for _, name in KITTI_IDS]
    label = dataset.load(0).extra["points_label"]
    assert label.dtype == np.int64
    np.testing.assert_array_equal(label, np.array(expected)[order])
    assert len(names) == 19 and set(expected) == set(range(-1, 19))


def test_result_files_of_kitti_have_the_original_ids(roots, tmp_path):
    dataset = opened(roots["kitti"])
    classes = np.arange(len(dataset.sweep(0))) % 19
    dataset.write_points(tmp_path, 0, classes)
    written = np.fromfile(tmp_path / "sequences/00/predictions/000000.label", np.uint32)
    np.testing.assert_array_equal(written, np.array(KITTI_WRITTEN)[classes])


@pytest.fixture(scope="module")
def devkit(roots):
    nuscenes = pytest.importorskip("nuscenes")
    return nuscenes.NuScenes("v1.0-embedded", str(roots["nuscenes"]), verbose=False)


def test_the_classes_of_nuscenes_are_those_of_the_devkits_mapper(devkit, roots, tmp_path):
    utils = pytest.importorskip("nuscenes.eval.lidarseg.utils")
    mapper = utils.LidarsegClassMapper(devkit)
    root = clone(roots["nuscenes"], tmp_path)
    dataset = opened(root)
    n = len(dataset.sweep(0))
    ids = (np.arange(n) % 32).astype(np.uint8)
    put(root / dataset.frames["lidarseg"][0].decode(), ids.tobytes())
    official = mapper.convert_label(ids).astype(int)
    np.testing.assert_array_equal(dataset.point_truth(0, n), official - 1)
    names = {index: name for name, index in mapper.coarse_name_2_coarse_idx_mapping.items()}
    assert tuple(names[i] for i in range(1, 17)) == data.POINT_CLASSES["nuscenes"]


def test_the_devkit_scores_our_result_files(devkit, roots, tmp_path):
    """Its own reading of truth, map and matrix: 1 for the truth, else ours to the last digit."""
    utils = pytest.importorskip("nuscenes.eval.lidarseg.utils")
    mapper = utils.LidarsegClassMapper(devkit)
    dataset = opened(roots["nuscenes"])
    rng = np.random.default_rng(0)
    for wrong in (0.0, 0.3):
        folder = tmp_path / str(wrong)
        official = utils.ConfusionMatrix(17, 0)
        ours = np.zeros((16, 16), np.int64)
        for i in dataset.split("val"):
            label = dataset.load(i).extra["points_label"]
            predicted = np.where(rng.random(len(label)) < wrong, rng.integers(0, 16, len(label)),
                                 label.clip(0))
            full, truth = dataset.points_on_disk(i, predicted)
            dataset.write_points(folder, i, full)
            np.add.at(ours, (truth[truth >= 0], full[truth >= 0]), 1)

            token = dataset.frames["sweep"][i].decode()
            ids = np.fromfile(Path(devkit.dataroot, devkit.get("lidarseg", token)["filename"]),
                              np.uint8)
            result = folder / "lidarseg" / "val" / f"{token}_lidarseg.bin"
            official.update(mapper.convert_label(ids), np.fromfile(result, np.uint8))
        assert segment.score("nuscenes", ours)["mIoU"] == official.get_mean_iou()
        assert (official.get_mean_iou() == 1) == (wrong == 0)


def test_categories_may_have_any_order_and_any_indices(roots, tmp_path):
    dataset = opened(roots["nuscenes"])
    expected = dataset.load(0).extra["points_label"]
    root = clone(roots["nuscenes"], tmp_path)
    rng = np.random.default_rng(1)
    index = rng.permutation(200)[:32]

    def shuffle(rows):
        for row in rows:
            row["index"] = int(index[row["index"]])
        rng.shuffle(rows)
    edit(root, "category", shuffle)
    for file in root.glob("lidarseg/*/*.bin"):
        put(file, index[np.fromfile(file, np.uint8)].astype(np.uint8).tobytes())
    np.testing.assert_array_equal(opened(root).load(0).extra["points_label"], expected)
    assert len(set(expected.tolist())) > 6


# ---- one world in three layouts ------------------------------------------------------

# class of nuScenes -> of SemanticKITTI, of Waymo; None: has none there
SAME = {
    "barrier": ("fence", None),
    "bicycle": ("bicycle", "BICYCLE"),
    "bus": ("other-vehicle", "BUS"),
    "car": ("car", "CAR"),
    "construction_vehicle": ("other-vehicle", "OTHER_VEHICLE"),
    "motorcycle": ("motorcycle", "MOTORCYCLE"),
    "pedestrian": ("person", "PEDESTRIAN"),
    "traffic_cone": (None, "CONSTRUCTION_CONE"),
    "trailer": ("other-vehicle", "OTHER_VEHICLE"),
    "truck": ("truck", "TRUCK"),
    "driveable_surface": ("road", "ROAD"),
    "sidewalk": ("sidewalk", "SIDEWALK"),
    "terrain": ("terrain", "WALKABLE"),
    "manmade": ("building", "BUILDING"),
    "vegetation": ("vegetation", "VEGETATION"),
}


def in_world(frame):
    return frame.points[:, :3] @ frame.lidar2world[:3, :3].T + frame.lidar2world[:3, 3]


def test_three_layouts_give_the_same_classes_to_the_same_points(roots):
    nuscenes, kitti, waymo = [opened(roots[layout]) for layout in LAYOUTS]
    of_kitti = {time: i for i, time in enumerate(nuscenes.frames["time"].tolist())}
    of_waymo = {frame.time: i for i, frame in enumerate(waymo.frames)}
    names = data.POINT_CLASSES
    seen = set()
    for i, time in enumerate(nuscenes.frames["time"].tolist()):
        frame = nuscenes.load(i)
        label = frame.extra["points_label"]
        other = kitti.load(of_kitti[time])
        np.testing.assert_array_equal(frame.points[:, :3], other.points[:, :3])
        third = waymo.load(of_waymo[time])
        distance, nearest = cKDTree(in_world(third)).query(in_world(frame))
        assert len(third.points) == len(frame.points) == len(set(nearest.tolist()))
        assert distance.max() < 0.02
        third_label = third.extra["points_label"][nearest]
        for c, name in enumerate(names["nuscenes"]):
            if not (label == c).any():
                continue
            in_kitti, in_waymo = SAME[name]
            expected = names["kitti"].index(in_kitti) if in_kitti else -1
            assert (other.extra["points_label"][label == c] == expected).all(), name
            expected = names["waymo"].index(in_waymo) if in_waymo else -1
            assert (third_label[label == c] == expected).all(), name
            seen.add(name)
    assert len(seen) >= 11


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_has_one_interface(roots, layout, tmp_path):
    dataset = opened(roots[layout])
    plain = data.open_dataset(
        roots[layout] / ("dataset" if layout == "kitti" else ""), "small", images=False)
    assert dataset.names == plain.names and len(dataset) == 6
    C = len(data.POINT_CLASSES[layout])
    for i in (0, 5):
        frame = dataset.load(i)
        label = frame.extra["points_label"]
        assert label.shape == (len(frame.points),) and label.dtype == np.int64
        assert label.min() >= -1 and label.max() < C and (label >= 0).mean() > 0.9
        assert plain.load(i).extra == {}
        np.testing.assert_array_equal(frame.points, plain.load(i).points)

        full, truth = dataset.points_on_disk(i, label.clip(0))
        assert full.shape == truth.shape and full.min() >= 0 and full.max() < C
        assert len(full) >= len(label) and truth.max() >= 0
        np.testing.assert_array_equal(full[truth >= 0], truth[truth >= 0])
        dataset.write_points(tmp_path, i, full)
        assert any(f.endswith((".bin", ".label", ".parquet")) and Path(dataset.root, f).is_file()
                   and ("lidarseg" in f or "label" in f or "segmentation" in f)
                   for f in dataset.files(i))
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".label", ".npy")]
    assert len(files) == 2 and len({file.name for file in files}) == 2
    train = dataset.split("train")
    np.testing.assert_array_equal(dataset.every_kth(train, 1), train)
    assert set(dataset.every_kth(train, 2)) < set(train)


def test_every_kth_frame_is_the_fields_one_per_cent():
    train = np.arange(19130)
    for reader in (data.Kitti, data.Waymo):
        kth = reader.every_kth(None, train, 100)
        assert len(kth) == 192 and kth[0] == 0 and kth[-1] == 19100


def test_labels_follow_select_crop_augmentation_and_batches(roots, tmp_path):
    dataset = opened(roots["nuscenes"])
    frame = dataset.load(1)
    label = frame.extra["points_label"]
    order = np.random.default_rng(0).permutation(len(label))[:500]
    np.testing.assert_array_equal(data.select(frame, order).extra["points_label"], label[order])
    warped = data.augment_cloud(frame, np.random.default_rng(0), 3.0, 0.05, (True, True))
    assert not np.allclose(warped.points, frame.points)
    np.testing.assert_array_equal(warped.extra["points_label"], label)
    batch = data.loader(dataset, "train", 2, augment=data_turn).first(1)[0]
    frames = [dataset.load(dataset.names.index(name)) for name in batch.names]
    np.testing.assert_array_equal(
        batch.extra["points_label"], np.concatenate([f.extra["points_label"] for f in frames]))
    assert "b_points_label" not in batch.extra and batch.cameras == 0

    dataset = opened(with_pictures(roots["kitti"], tmp_path / "pictures"), images=True)
    frame = dataset.load(0)
    shown = dataset.image_shows(0, frame.points)
    loader = data.loader(dataset, "train", 1, crop=True)
    batch = next(batch for batch in loader.once() if batch.names[0] == frame.name)
    assert 0 < shown.sum() < len(shown)
    np.testing.assert_array_equal(batch.extra["points_label"], frame.extra["points_label"][shown])


def data_turn(frame, rng):
    return data.augment_cloud(frame, rng, 3.0, 0.05, (True, True))


# ---- the embedded world --------------------------------------------------------------

def test_sweeps_pictures_and_boxes_are_as_before_there_were_labels(tmp_path):
    """SHA-256 of a world that commit 0b5a373 wrote. Other versions may round otherwise."""
    if not (np.__version__.startswith("1.26.") and PIL.__version__.startswith("13.")):
        pytest.skip("the bytes are those of NumPy 1.26 and Pillow 13")
    root = tmp_path / "world"
    synthetic.write(root, train=1, val=1, frames=2)
    digest = hashlib.sha256()
    for file in sorted(root.glob("samples/**/*")):
        if file.is_file():
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    assert digest.hexdigest().startswith("d3445d98a9eef4c30a810e3e92675997")
    boxes = (root / "v1.0-embedded/sample_annotation.json").read_bytes()
    assert hashlib.sha256(boxes).hexdigest().startswith("2ab628e2da383c56")
    instances = (root / "v1.0-embedded/instance.json").read_bytes()
    assert hashlib.sha256(instances).hexdigest().startswith("802cdc439c8c489b")


@pytest.mark.slow
def test_the_embedded_world_has_2464779_labelled_points(tmp_path):
    root = Path(CACHE, f"world-{synthetic.VERSION}") if CACHE else tmp_path / "world"
    if not root.is_dir():
        root = tmp_path / "world"
        synthetic.write(root)
    dataset = opened(root)
    counts = np.zeros(32, int)
    present = np.zeros(17, int)
    for i in range(len(dataset)):
        ids = np.fromfile(root / dataset.frames["lidarseg"][i].decode(), np.uint8)
        assert len(ids) == len(dataset.sweep(i))
        counts += np.bincount(ids, minlength=32)
        present += np.bincount(dataset.point_truth(i, len(ids)) + 1, minlength=17)
    ego = counts[31]
    assert len(dataset) == 256 and ego == 172_167 and counts.sum() - ego == 2_464_779
    assert (present[1:] > 0).sum() == 15 and counts[0] == 0  # no other_flat, no noise


# ---- SemanticKITTI's sequences -------------------------------------------------------

def with_pictures(root, to):
    """The sequences of a world, with pictures and calibration of its object frames."""
    clone(root / "dataset", to)
    for scan in sorted(to.glob("sequences/*/velodyne/*.bin")):
        folder = scan.parents[1]
        (folder / "image_2").mkdir(exist_ok=True)
        shutil.copy(root / "training/image_2" / f"{scan.stem}.png", folder / "image_2")
        text = (root / "training/calib" / f"{scan.stem}.txt").read_text()
        (folder / "calib.txt").write_text(text.replace("Tr_velo_to_cam", "Tr"))
    return to


def random_pose(rng):
    pose = np.eye(4)
    pose[:3, :3] = data.Rotation.from_rotvec(rng.normal(size=3)).as_matrix()
    pose[:3, 3] = rng.normal(size=3) * 50
    return pose


def test_sequences_have_calibration_times_and_poses(kitti, tmp_path):
    """The same scans and pictures as object frames, whose calibration is tested elsewhere."""
    folder = tmp_path / "sequences/05"
    for kind in ("velodyne", "image_2"):
        shutil.copytree(kitti / "training" / kind, folder / kind)
    mount = R0 @ TR  # the rectification is in Tr
    (folder / "calib.txt").write_text(calib_line("P0", P2) + calib_line("P2", P2)
                                      + calib_line("Tr", mount))
    objects = data.open_dataset(kitti, "small")
    sequences = data.open_dataset(tmp_path, "small")
    assert sequences.layout == "sequences"
    assert sequences.names == ["kitti/05/000000", "kitti/05/000003", "kitti/05/000007"]
    for i in range(3):
        a = objects.load(i)
        b = sequences.load(i)
        np.testing.assert_array_equal(a.points, b.points)
        np.testing.assert_array_equal(a.images[0], b.images[0])
        np.testing.assert_allclose(a.lidar2img, b.lidar2img, rtol=1e-5, atol=1e-3)
        assert b.boxes is None and b.labels is None and np.array_equal(b.lidar2world, np.eye(4))
    assert [sequences.load(i).time for i in range(3)] == pytest.approx([0, 0.3, 0.7])

    rng = np.random.default_rng(0)
    poses = [random_pose(rng) for _ in range(8)]
    (folder / "poses.txt").write_text("".join(
        " ".join(f"{x:.12e}" for x in pose[:3].ravel()) + "\n" for pose in poses))
    (folder / "times.txt").write_text("".join(f"{0.104 * n:e}\n" for n in range(8)))
    sequences = data.open_dataset(tmp_path, "small")
    point = rng.normal(size=3) * 20
    for i, number in enumerate((0, 3, 7)):
        frame = sequences.load(i)
        assert frame.time == pytest.approx(0.104 * number)
        camera = mount[:, :3] @ point + mount[:, 3]
        first = poses[number][:3, :3] @ camera + poses[number][:3, 3]
        expected = mount[:, :3].T @ (first - mount[:, 3])
        ours = frame.lidar2world[:3, :3] @ point + frame.lidar2world[:3, 3]
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def empty_sequences(root, numbers, scans=1):
    for number in numbers:
        for kind, ending in (("velodyne", "bin"), ("labels", "label")):
            folder = root / "sequences" / number / kind
            folder.mkdir(parents=True)
            for n in range(scans):
                (folder / f"{n:06d}.{ending}").touch()
    return root


def test_the_splits_of_sequences_are_the_official_ones(tmp_path, capsys):
    root = empty_sequences(tmp_path, [f"{n:02d}" for n in range(22)])
    for n in range(11, 22):
        shutil.rmtree(root / f"sequences/{n}/labels")
    plain = data.open_dataset(root, images=False)
    of = {split: [plain.names[i][6:8] for i in plain.split(split)]
          for split in ("train", "val", "test")}
    assert of["train"] == "00 01 02 03 04 05 06 07 09 10".split() and of["val"] == ["08"]
    assert of["test"] == [str(n) for n in range(11, 22)]
    labelled = opened(root)
    assert len(labelled) == 11 and "11 of its 22 scans are of the official test" in (
        capsys.readouterr().out)


@pytest.mark.slow
def test_all_scans_of_semantic_kitti_are_indexed_in_seconds(tmp_path, monkeypatch):
    root = empty_sequences(tmp_path, [f"{n:02d}" for n in range(11)], scans=2110)
    stats = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *words, **more: stats.append(1) or
                        stat(*words, **more))
    began = data.monotonic()
    dataset = opened(root)
    assert data.monotonic() - began < 10 and len(dataset) == 23210
    assert len(stats) < 1000


def test_what_is_read_of_a_root_with_object_frames_and_sequences(roots, capsys):
    root = roots["kitti"]
    plain = data.open_dataset(root, "small")
    assert plain.layout == "object frames"
    message = "object frames and sequences are here; reading the object frames. For the sequences"
    assert f"{message} give {root / 'dataset'}" in capsys.readouterr().out
    assert opened(root).layout == "sequences"
    assert "reading the sequences. Only their points have classes" in capsys.readouterr().out
    for place in ("dataset/sequences", "dataset/sequences/00"):
        with pytest.raises(data.DataError, match=f"sequences/<nn>/velodyne; give {root}/dataset$"):
            data.open_dataset(root / place)


def test_finetune_reads_the_object_frames_and_refuses_sequences(roots, tmp_path):
    cfg = finetune.Config(preset="small", data=str(roots["kitti"]), gpus=0)
    finetune.check(cfg, data.open_dataset(roots["kitti"], "small"))
    lidar = data.open_dataset(roots["kitti"] / "dataset", "small", images=False)
    with pytest.raises(SystemExit, match="no box is annotated here"):
        finetune.check(cfg, lidar)
    with pytest.raises(data.DataError, match=r"6 of the 6 scans lack files \(image_2 6"):
        data.open_dataset(roots["kitti"] / "dataset", "small")


# ---- Waymo's range images ------------------------------------------------------------

SEGMENT = "1000_000_020_000"


def segmentation(times, shape, class_of, laser=1):
    """The table lidar_segmentation: instance first, then class_of(row, column)."""
    import pyarrow as pa
    rows, columns = np.indices(shape)
    image = np.stack([1000 + rows, class_of(rows, columns)], -1).astype(np.int32)
    n = len(times)
    component = "[LiDARSegmentationLabelComponent].range_image_return"
    table = {
        "key.segment_context_name": pa.array([SEGMENT] * n),
        "key.frame_timestamp_micros": pa.array(times, pa.int64()),
        "key.laser_name": pa.array([laser] * n, pa.int8()),
    }
    for number in (1, 2):
        values = [(image if number == 1 else 0 * image).ravel().tolist()] * n
        table[f"{component}{number}.values"] = pa.array(values, pa.list_(pa.int32()))
        table[f"{component}{number}.shape"] = pa.array([list(image.shape)] * n,
                                                       pa.list_(pa.int32(), 3))
    return pa.table(table)


def write_segmentation(root, *words, **more):
    import pyarrow.parquet as parquet
    path = root / "training/lidar_segmentation" / f"{SEGMENT}.parquet"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    parquet.write_table(segmentation(*words, **more), path)


def any_class(row, column):
    return (7 * row + column) % 23


def range_image(root, time):
    """TOP's first returns of one frame, read with pyarrow alone. -> (H, W, 4)"""
    import pyarrow.parquet as parquet
    rows = parquet.read_table(root / "training/lidar" / f"{SEGMENT}.parquet").to_pylist()
    row = next(row for row in rows if row["key.frame_timestamp_micros"] == time
               and row["key.laser_name"] == 1)
    first = "[LiDARComponent].range_image_return1"
    return np.reshape(row[f"{first}.values"], row[f"{first}.shape"])


def test_waymo_classes_are_those_of_the_pixels_of_first_returns(waymo, tmp_path, capsys):
    """Two lasers, a no-label zone, and frames that are not labelled."""
    root = clone(waymo, tmp_path / "waymo")
    plain = data.open_dataset(waymo, "small", images=False)
    times = [plain.frames[i].time for i in (0, 2)]
    image = range_image(waymo, times[0])
    write_segmentation(root, times, image.shape[:2], any_class)
    dataset = opened(root)
    assert [frame.time for frame in dataset.frames] == times
    assert "3 of its 5 frames have no row in lidar_segmentation" in capsys.readouterr().out

    expected = []
    returns = []
    zone = []
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            if image[row, column, 0] > 0:
                returns.append((row, column))
                zone.append(image[row, column, 3] > 0)
                if not zone[-1]:
                    expected.append((7 * row + column) % 23 - 1)
    frame = dataset.load(0)
    label = frame.extra["points_label"]
    np.testing.assert_array_equal(frame.points, plain.load(0).points)
    np.testing.assert_array_equal(label[:len(expected)], expected)
    assert len(label) > len(expected) > 1000 and (label[len(expected):] == -1).all()
    assert set(expected) == set(range(-1, 22))

    predicted = np.random.default_rng(0).integers(0, 22, len(label))
    full, truth = dataset.points_on_disk(0, predicted)
    np.testing.assert_array_equal(truth, [(7 * r + c) % 23 - 1 for r, c in returns])
    zone = np.array(zone)
    np.testing.assert_array_equal(full[~zone], predicted[:len(expected)])
    assert 5 < zone.sum() < 100
    pixels = np.array(returns)
    for place in np.flatnonzero(zone):
        distance = np.linalg.norm(pixels[~zone] - pixels[place], axis=1)
        nearest = full[~zone][distance == distance.min()]
        assert full[place] in nearest

    dataset.write_points(tmp_path / "results", 0, full)
    written = np.load(tmp_path / f"results/lidar_segmentation/{SEGMENT}_{times[0]}.npy")
    assert written.dtype == np.uint8 and written.shape == image.shape[:2]
    np.testing.assert_array_equal(written[tuple(pixels.T)], full + 1)
    assert (written > 0).sum() == len(returns)


def test_a_regrouped_copy_has_the_classes_too(waymo, tmp_path):
    import pyarrow.parquet as parquet
    root = clone(waymo, tmp_path / "waymo")
    times = [frame.time for frame in data.open_dataset(waymo, images=False).frames[:3]]
    write_segmentation(root, times, range_image(waymo, times[0]).shape[:2], any_class)
    data.regroup(root, tmp_path / "copy")
    copy = tmp_path / "copy/training/lidar_segmentation" / f"{SEGMENT}.parquet"
    assert parquet.ParquetFile(copy).num_row_groups == 3
    for i in range(3):
        a, b = [opened(place).load(i).extra["points_label"] for place in (root, tmp_path / "copy")]
        np.testing.assert_array_equal(a, b)


# ---- what is wrong -------------------------------------------------------------------

def drop_index(root):
    edit(root, "category", lambda rows: [row.pop("index") for row in rows] and None)


def remove_tables(root):
    (root / "v1.0-embedded/lidarseg.json").unlink()


def lidarseg_file(root):
    return root / opened(root).frames["lidarseg"][0].decode()


def drop_one_row(root):
    edit(root, "lidarseg", lambda rows: rows.pop() and None)


def with_first(file, change):
    """Change the bytes of a file."""
    return lambda root: put(file(root), change(file(root).read_bytes()))


def waymo_file(change):
    """Rewrite the table lidar_segmentation of one segment as change(row) leaves its rows."""
    def breaks(root):
        import pyarrow as pa
        import pyarrow.parquet as parquet
        path = sorted(root.glob("training/lidar_segmentation/*.parquet"))[0]
        table = parquet.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            change(row)
        path.unlink()
        parquet.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return breaks


FIRST_RETURN = "[LiDARSegmentationLabelComponent].range_image_return1"


def set_class(row):
    row[f"{FIRST_RETURN}.values"][1] = 23


def halve(row):
    shape = row[f"{FIRST_RETURN}.shape"]
    values = row[f"{FIRST_RETURN}.values"]
    row[f"{FIRST_RETURN}.shape"] = [shape[0] // 2, shape[1], 2]
    row[f"{FIRST_RETURN}.values"] = values[:len(values) // 2]


def other_laser(row):
    row["key.laser_name"] = 2


def write(file, text):
    return lambda root: (root / "dataset/sequences/00" / file).write_text(text)


BROKEN = {
    "nuscenes: category.json without lidarseg":
        (drop_index, "category.json: not every row has an index.*put the category.json of"),
    "nuscenes: none": (remove_tables, "no lidarseg.json, .*; extract the archive"),
    "nuscenes: one file is missing":
        (lambda root: lidarseg_file(root).unlink(),
         "of 6 frames 1 have no file of point labels, first .*_lidarseg.bin; extract"),
    "nuscenes: one row is missing":
        (drop_one_row, "of 6 frames 1 have no file of point labels, first those of frame nusc"),
    "nuscenes: another length": (with_first(lidarseg_file, lambda raw: raw[:-1]),
                                 r"lidarseg.bin has \d+ labels, expected one for each of the"),
    "nuscenes: an unknown id": (with_first(lidarseg_file, lambda raw: b"\xc8" + raw[1:]),
                                "has the label 200, of which v1.0-embedded/category.json has no"),
    "kitti: none": (lambda root: [shutil.rmtree(path) for path in
                                  root.glob("dataset/sequences/*/labels")],
                    "no labels/.*extract the labels of SemanticKITTI"),
    "kitti: no sequences": (lambda root: shutil.rmtree(root / "dataset"),
                            "KITTI's object frames have no classes of points; give a folder"),
    "kitti: one file is missing":
        (lambda root: first_label(root).unlink(),
         "of 6 scans 1 have no file of point labels, first that of .*/00/velodyne/000000.bin"),
    "kitti: a folder is missing":
        (lambda root: shutil.rmtree(root / "dataset/sequences/08/labels"),
         "of 6 scans 2 have no file of point labels"),
    "kitti: another length": (with_first(first_label, lambda raw: raw[:-3]),
                              r"000000.label has \d+ bytes, expected \d+, a uint32 for each"),
    "kitti: an unknown id": (with_first(first_label, lambda raw: b"\5\0\0\0" + raw[4:]),
                             "000000.label has the label 5, expected one of SemanticKITTI's"),
    "kitti: poses of fewer scans": (write("poses.txt", "1 0 0 0 0 1 0 0 0 0 1 0\n"),
                                    "poses.txt has 1 lines, expected one for each scan from 0 to"),
    "kitti: a pose of 11 numbers": (write("poses.txt", "1 0 0 0 0 1 0 0 0 0 1\n" * 9),
                                    "poses.txt: expected 12 finite numbers in each of its 9"),
    "kitti: a word for a time": (write("times.txt", "0\nx\n"), "times.txt: expected 1 finite"),
    "waymo: none": (lambda root: [shutil.rmtree(path) for path in
                                  root.glob("*/lidar_segmentation")],
                    "no classes of points; download the component lidar_segmentation"),
    "waymo: an unknown class": (waymo_file(set_class), "has the class 23, expected 0 to 22"),
    "waymo: another size": (waymo_file(halve), r"images of the sizes \{1: \(16, 360\)\} by laser, "
                                               r"expected one of TOP \(laser 1\) of \(32, 360\)"),
    "waymo: an empty file": (lambda root: put(sorted(root.glob(
        "training/lidar_segmentation/*"))[0], b""), "is not a whole parquet file"),
}
NONE = ("nuscenes: none", "kitti: none", "kitti: no sequences", "waymo: none")


@pytest.mark.parametrize("case", BROKEN)
def test_broken_labels_are_named_and_told_by_the_doctor(roots, tmp_path, case):
    breaks, message = BROKEN[case]
    root = clone(roots[case.split(":")[0]], tmp_path / "root")
    breaks(root)
    with pytest.raises(data.DataError, match=message) as error:
        dataset = opened(root)
        for i in range(len(dataset)):
            dataset.load(i)
    assert (error.type is data.NoPointLabels) == (case in NONE)
    faults = data.doctor(str(root))
    named = [fault for fault in faults if re.search(message, fault)]
    assert len(faults) == len(named) == (0 if case in NONE else 1), faults


def test_a_segment_labelled_by_another_laser_has_no_frame(roots, tmp_path):
    root = clone(roots["waymo"], tmp_path / "root")
    waymo_file(other_laser)(root)
    assert len(opened(root)) == 4
    for path in list(root.glob("*/lidar_segmentation/*"))[1:]:
        path.unlink()
    with pytest.raises(data.DataError, match="6 of its 6 frames have no row.*none is left"):
        opened(root)


@pytest.mark.parametrize("layout, line", [
    ("nuscenes", r"of the points of 6 frames have a class, in boxes (\d+) of (\d+) that of their"),
    ("waymo", r"of the points of 6 frames have a class, in boxes (\d+) of (\d+) that of their box"),
    ("kitti", r"9\d.\d% of the points of 6 frames have a class\n"),
])
def test_the_doctor_compares_points_with_boxes(roots, tmp_path, capsys, layout, line):
    assert data.doctor(str(roots[layout])) == []
    match = re.search(line, capsys.readouterr().out)
    assert match and all(int(number) > 1000 for number in match.groups())
    if layout == "kitti":
        return
    root = clone(roots[layout], tmp_path / "root")
    for file in root.glob("lidarseg/*/*.bin"):
        put(file, np.random.default_rng(0).permutation(np.fromfile(file, np.uint8)).tobytes())
    if layout == "waymo":
        import pyarrow as pa
        import pyarrow.parquet as parquet
        for path in root.glob("*/lidar_segmentation/*.parquet"):
            table = parquet.read_table(path)
            rows = table.to_pylist()
            for row in rows:
                image = np.reshape(row[f"{FIRST_RETURN}.values"], row[f"{FIRST_RETURN}.shape"])
                row[f"{FIRST_RETURN}.values"] = np.roll(image, 90, 1).ravel().tolist()
            path.unlink()
            parquet.write_table(pa.Table.from_pylist(rows, table.schema), path)
    faults = data.doctor(str(root))
    assert len(faults) == 1 and "in boxes at least 75 %; labels, scans or boxes do not" in faults[0]


def test_the_doctor_says_nothing_of_classes_where_there_are_none(waymo, kitti, capsys):
    for root in (waymo, kitti):
        assert data.doctor(str(root)) == []
    assert "have a class" not in capsys.readouterr().out


def test_the_doctor_looks_at_labels_of_sequences_without_pictures(roots, capsys):
    faults = data.doctor(str(roots["kitti"] / "dataset"))
    assert len(faults) == 1 and "image_2 6" in faults[0]
    assert "of the points of 6 frames have a class" in capsys.readouterr().out
