"""data.py against the official devkit, closed forms and counts made by another script; broken folders; caches; the loader."""
import json
import math
import multiprocessing
import os
import pickle
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_cache(caches, monkeypatch):
    """No test sees the user's cache; roots that several tests open are indexed once."""
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(caches))


@pytest.fixture
def new_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(tmp_path / "new-cache"))
    return tmp_path / "new-cache"


@pytest.fixture(scope="module")
def devkit(nuscenes_root):
    nuscenes = pytest.importorskip("nuscenes")
    return nuscenes.NuScenes(version=data.find_version(Path(nuscenes_root), None), dataroot=str(nuscenes_root), verbose=False)


def project(xyz, lidar2img):
    """(N, 3), (4, 4) -> (N, 3): u, v, depth."""
    uvd = np.c_[xyz, np.ones(len(xyz))] @ lidar2img.astype(np.float64).T
    return np.c_[uvd[:, :2] / uvd[:, 2:3], uvd[:, 2]]


def inside(xyz, box):
    """Mask of the points in a box: into the box's own axes, compare with half its size."""
    c, s = math.cos(box[6]), math.sin(box[6])
    local = (xyz - box[:3]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return (abs(local) <= np.asarray(box[3:6]) / 2).all(1)


# ---- the real frames ----

def test_points_in_each_camera_are_those_of_an_independent_count(nuscenes_root):
    path = Path(nuscenes_root).parent / "golden_counts.json"
    if not path.exists():
        pytest.skip(f"no {path}: NUSCENES is not the small set of frames that was counted")
    golden, dataset = json.loads(path.read_text())["nuscenes"], data.NuScenes(nuscenes_root, "small")
    assert len(dataset) == len(golden) == 10
    for i, name in enumerate(dataset.names):
        counted, frame, points = golden[name.split("/")[2]], dataset.load(i, (900, 1600)), dataset.sweep(i)
        assert len(points) == counted["points"]
        for camera, lidar2img in zip(dataset.grid.cameras, frame.lidar2img):
            for xyz, allowed in ((points, 2), (frame.points, 100)):     # the bonnet's points that a camera sees are not in the frame
                u, v, d = project(xyz[:, :3], lidar2img).T
                n = ((d > 1) & (u > 1) & (u < 1599) & (v > 1) & (v < 899)).sum()
                assert abs(n - counted["in_image"][camera]) <= allowed, (name, camera, n)


def test_boxes_hold_the_points_that_the_annotators_counted(nuscenes_root):
    dataset, boxes = data.NuScenes(nuscenes_root, "small"), 0
    for i in range(min(10, len(dataset))):
        frame, rows = dataset.load(i, (90, 160)), dataset.annotations(i)
        for points in (dataset.sweep(i), frame.points):                 # what is taken off as the ego vehicle is in no box
            world = points[:, :3].astype(np.float64) @ frame.lidar2world[:3, :3].T + frame.lidar2world[:3, 3]
            assert [inside(world, row["box"]).sum() for row in rows] == rows["lidar_points"].tolist()
        boxes += len(rows)
        assert len(frame.boxes) == (rows["label"] >= 0).sum() > 0
    assert boxes == 724 or not (Path(nuscenes_root).parent / "golden_counts.json").exists()


def test_projection_is_the_devkits(nuscenes_root, devkit):
    from nuscenes.nuscenes import NuScenesExplorer
    dataset = data.NuScenes(nuscenes_root, "small")
    for i in (0, 5):
        frame, points = dataset.load(i, (900, 1600)), dataset.sweep(i)
        sample = devkit.get("sample", frame.name.split("/")[2])
        for camera, lidar2img, image in zip(dataset.grid.cameras, frame.lidar2img, frame.images):
            uv, depth, picture = NuScenesExplorer(devkit).map_pointcloud_to_image(sample["data"]["LIDAR_TOP"], sample["data"][camera])
            mine = project(points[:, :3], lidar2img)
            mine = mine[(mine[:, 2] > 1) & (mine[:, :2] > 1).all(1) & (mine[:, :2] < (1599, 899)).all(1)]
            assert abs(mine[:, :2] - uv[:2].T).max() < 0.1 and abs(mine[:, 2] - depth).max() < 1e-3     # px; m
            assert (image.transpose(1, 2, 0) == np.asarray(picture)).all()                              # full size is not resampled


def test_boxes_and_velocities_are_the_devkits(nuscenes_root, devkit):
    from nuscenes.eval.detection.utils import category_to_detection_name
    dataset = data.NuScenes(nuscenes_root, "small")
    for i in (0, 4, 9):
        frame, rows = dataset.load(i, (90, 160)), dataset.annotations(i)
        for row in rows:
            np.testing.assert_allclose(row["box"][7:9], devkit.box_velocity(row["token"].decode())[:2], atol=1e-5)
            name = category_to_detection_name(row["category"].decode())
            assert row["label"] == (-1 if name is None else dataset.grid.classes.index(name))
        sweep = devkit.get("sample", frame.name.split("/")[2])["data"]["LIDAR_TOP"]
        official = {box.token: box for box in devkit.get_sample_data(sweep)[1]}
        rows = rows[rows["label"] >= 0]
        assert (frame.labels == rows["label"]).all()
        for mine, row in zip(frame.boxes, rows):
            box = official[row["token"].decode()]
            x, y, z = box.center                                        # the devkit's LiDAR axes: x right, y forward
            heading = box.orientation.rotation_matrix[[1, 0], 0] * (1, -1)
            heading /= np.hypot(*heading)
            np.testing.assert_allclose(mine[:6], [y, -x, z, box.wlh[1], box.wlh[0], box.wlh[2]], atol=1e-4)
            np.testing.assert_allclose([math.cos(mine[6]), math.sin(mine[6])], heading, atol=1e-4)
            speed = (devkit.box_velocity(box.token) * [1, 1, 0]) @ frame.lidar2world[:3, :2]        # over ground, in our axes
            np.testing.assert_allclose(mine[7:9], speed, atol=1e-4)


def test_what_stands_still_keeps_its_place_in_the_world(nuscenes_root):
    """Box centres sent through the frame's pose are the translations on disk, in every frame: one world for all."""
    table = json.loads(next(Path(nuscenes_root).glob("v1.0-*/sample_annotation.json")).read_text())
    place, dataset = {row["token"]: row["translation"] for row in table}, data.NuScenes(nuscenes_root, "small")
    for i in range(min(10, len(dataset))):
        frame, rows = dataset.load(i, (90, 160)), dataset.annotations(i)
        tokens = [row["token"].decode() for row in rows if row["label"] >= 0]
        world = frame.boxes[:, :3] @ frame.lidar2world[:3, :3].T + frame.lidar2world[:3, 3]
        np.testing.assert_allclose(world, [place[token] for token in tokens], atol=1e-3)


def test_older_sweeps_lie_where_the_devkit_puts_them(nuscenes_root, devkit):
    from nuscenes.utils.data_classes import LidarPointCloud
    from scipy.spatial import cKDTree
    dataset, key_only = data.NuScenes(nuscenes_root, "paper"), data.NuScenes(nuscenes_root, "small")
    frame, i = dataset.load(4, (90, 160)), 4
    sample = devkit.get("sample", frame.name.split("/")[2])
    cloud, lag = LidarPointCloud.from_file_multisweep(devkit, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=10)
    theirs = np.c_[cloud.points[1], -cloud.points[0], cloud.points[2], cloud.points[3] / 255, lag[0]]
    lags = np.unique(frame.points[:, 4])
    assert lags[0] == 0 and len(lags) == len(np.unique(lag)) > 1 and (np.diff(frame.points[:, 4]) >= 0).all()
    assert (frame.points[frame.points[:, 4] == 0] == key_only.load(i, (90, 160)).points).all()
    for age in lags:
        mine, all_theirs = frame.points[frame.points[:, 4] == age], theirs[abs(theirs[:, 4] - age) < 1e-4]
        distance, at = cKDTree(all_theirs[:, :4]).query(mine[:, :4])
        assert distance.max() < 2e-4 and (np.diff(at) > 0).all()        # the same points in the same order,
        assert 0 <= len(all_theirs) - len(mine) < 400                   # but for a little more of the car


def test_older_sweeps_stand_where_they_were_in_the_world(world):
    """The embedded world's sweeps are its keyframes: each, read by itself, is a part of the merged cloud, of its age, in the same places of the world."""
    merged, single = data.NuScenes(world, "paper"), data.NuScenes(world, "small")
    frame, begin = merged.load(2, (12, 32)), 0
    for other in (single.load(i, (12, 32)) for i in (2, 1, 0)):
        points, begin = frame.points[begin:begin + len(other.points)], begin + len(other.points)
        there, here = (p[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3] for p, pose in ((points, frame.lidar2world), (other.points, other.lidar2world)))
        np.testing.assert_allclose(there, here, atol=1e-3)
        np.testing.assert_allclose(points[:, 4], frame.time - other.time, atol=1e-5)
        np.testing.assert_array_equal(points[:, 3], other.points[:, 3])
    assert begin == len(frame.points) and frame.time - other.time == pytest.approx(1, abs=0.01)
    assert np.linalg.norm(frame.lidar2world[:3, 3] - other.lidar2world[:3, 3]) > 0.5


# ---- pictures and matrices ----

def clone(root, to):
    """A copy whose files may be replaced (never written into: they are hard links where the disk allows)."""
    def link(source, target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    for folder, _, names in os.walk(root):
        target = to / os.path.relpath(folder, root)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            link(os.path.join(folder, name), target / name)
    return to


def edit(root, table, change):
    """Rewrite root/v1.0-*/<table>.json as change(rows) leaves it (or returns it)."""
    path = next(root.glob(f"v1.0-*/{table}.json"))
    rows = json.loads(path.read_text())
    rows = change(rows) or rows
    path.unlink()
    path.write_text(json.dumps(rows))


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def key_file(root, channel):
    return sorted((root / "samples" / channel).iterdir())[0]


@pytest.fixture(scope="module")
def ramps(world, tmp_path_factory):
    """The world with 900 x 1600 pictures whose red is the column and green the row."""
    root = clone(Path(world), tmp_path_factory.mktemp("ramps"))
    u, v = np.meshgrid((np.arange(1600) + .5) / 1600, (np.arange(900) + .5) / 900)
    Image.fromarray((np.stack([u, v, 0 * u], 2) * 255).round().astype(np.uint8)).save(root / "ramp.jpg", quality=98, subsampling=0)
    for jpg in root.glob("samples/CAM_*/*.jpg"):
        put(jpg, (root / "ramp.jpg").read_bytes())
    edit(root, "sample_data", lambda rows: [row.update(height=900, width=1600) for row in rows if row["fileformat"] == "jpg"] and None)
    return root


@pytest.mark.parametrize("size", [(256, 704), (96, 256), (224, 416), (100, 800), (900, 1600)])
def test_resize_and_crop_move_pixels_as_the_matrix_says(ramps, size):
    dataset = data.NuScenes(ramps, "small")
    frame, full = dataset.load(0, size), dataset.load(0, (900, 1600))
    for image, lidar2img, full2img in zip(frame.images, frame.lidar2img, full.lidar2img):
        assert image.shape == (3, *size)
        crop = np.linalg.inv(lidar2img.astype(np.float64) @ np.linalg.inv(full2img.astype(np.float64)))   # pixels here -> on disk
        v, u = np.mgrid[:size[0], :size[1]] + .5
        expected = np.stack([crop[0, 0] * u + crop[0, 2], crop[1, 1] * v + crop[1, 2]])
        found = image[:2] / 255. * np.array([1600, 900])[:, None, None]
        error = (found - expected)[:, 4:-4, 4:-4] / crop[0, 0]                                            # in pixels of this picture
        assert abs(error.mean((1, 2))).max() < 0.3 and abs(error).mean() < 0.5 + 3 / crop[0, 0]       # a grey level is 6 px on disk


@pytest.mark.parametrize("size", [(256, 704), (96, 256), (224, 416), (100, 800), (900, 1600), (384, 1248), (80, 256)])
@pytest.mark.parametrize("ending, width, height", [("jpg", 1600, 900), ("png", 1242, 375), ("jpg", 641, 389)])
def test_pictures_lie_where_their_matrix_says_to_a_hundredth_of_a_pixel(tmp_path, ending, width, height, size):
    """Waves across and down the picture, a fit of their phase in the result."""
    u, v = np.meshgrid(np.arange(width) + .5, np.arange(height) + .5)
    wave = np.stack([np.cos(2 * np.pi * u / 100), np.cos(2 * np.pi * v / 100), 0 * u], 2)
    Image.fromarray((127 + 100 * wave).round().astype(np.uint8)).save(tmp_path / f"wave.{ending}", **({"quality": 98, "subsampling": 0} if ending == "jpg" else {}))
    pixels, crop = data.read_image(tmp_path / f"wave.{ending}", size, "wave")
    assert pixels.shape == (3, *size) and pixels.dtype == np.uint8 and pixels[2].min() > 120 and pixels[2].max() < 134       # blue is blue
    assert abs(crop[0, 0] / crop[1, 1] - 1) < 0.01
    for axis, mean in ((0, pixels[0].mean(0)), (1, pixels[1].mean(1))):
        at = 2 * np.pi / 100 * (np.arange(len(mean)) + .5 - crop[axis, 2]) / crop[axis, axis]
        cos, sin, _ = np.linalg.lstsq(np.stack([np.cos(at), np.sin(at), np.ones_like(at)], 1), mean, rcond=None)[0]
        assert abs(np.arctan2(sin, cos) * 100 / (2 * np.pi) * crop[axis, axis]) < 0.01


def toy_frame(rng, n=400):
    boxes = np.array([[10, 4, 0, 4, 2, 1.5, .4, 3, -1], [-8, 2, .5, 9, 3, 3, -2.8, np.nan, np.nan],
                      [3, -15, -1, 1, .6, 1.8, 1.6, 0, 1]], np.float32)
    points, of = rng.random((n, 5)) * (1, 1, 1, 1, 0), boxes[rng.integers(3, size=n)]
    local = (points[:, :3] - .5) * of[:, 3:6] * 1.4                     # in and around the boxes
    points[:, 0] = of[:, 0] + local[:, 0] * np.cos(of[:, 6]) - local[:, 1] * np.sin(of[:, 6])
    points[:, 1] = of[:, 1] + local[:, 0] * np.sin(of[:, 6]) + local[:, 1] * np.cos(of[:, 6])
    points[:, 2] = of[:, 2] + local[:, 2]
    lidar2img = np.eye(4) + 0.1 * rng.normal(size=(2, 4, 4))
    lidar2img[:, 3] = 0, 0, 0, 1
    return data.Frame(points.astype(np.float32), np.array([1, 0, 1.8], np.float32), [np.zeros((3, 8, 9), np.uint8)] * 2,
                      lidar2img.astype(np.float32), np.eye(4), 1., boxes, np.array([0, 3, 8]),
                      {"points_row": np.arange(n), "free": np.zeros((7, 2))}, "toy")


def transforms():
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(.7), -math.sin(.7)], [math.sin(.7), math.cos(.7)]]
    mirror, scale, shift = np.diag([1., -1, 1, 1]), np.diag([1.2, 1.2, 1.2, 1]), np.eye(4)
    shift[:3, 3] = 3, -2, .5
    return {"turn": turn, "mirror y": mirror, "mirror x": -mirror @ np.diag([1, 1, -1, -1]), "scale": scale, "shift": shift,
            "all": shift @ scale @ mirror @ turn}


@pytest.mark.parametrize("name", transforms())
def test_after_a_warp_points_keep_pixel_world_and_box(name):
    frame, a2b = toy_frame(np.random.default_rng(0)), transforms()[name]
    warped = data.warp_frame(frame, a2b)
    np.testing.assert_allclose(warped.points[:, :3], frame.points[:, :3] @ a2b[:3, :3].T + a2b[:3, 3], rtol=1e-5, atol=1e-5)
    assert (warped.points[:, 3:] == frame.points[:, 3:]).all() and (warped.extra["points_row"] == frame.extra["points_row"]).all()
    old, new = (np.c_[f.points[:, :3], np.ones(400)] for f in (frame, warped))
    for before, after in zip(frame.lidar2img, warped.lidar2img):
        np.testing.assert_allclose(new @ after.T, old @ before.T, atol=1e-4)   # u d, v d, d: depth stays true though the cloud is scaled
    np.testing.assert_allclose(new @ warped.lidar2world.T, old, atol=1e-4)
    np.testing.assert_allclose(warped.origin, a2b[:3, :3] @ frame.origin + a2b[:3, 3], rtol=1e-6)
    for before, after in zip(frame.boxes.astype(float), warped.boxes.astype(float)):
        clear = inside(frame.points[:, :3], before * [1, 1, 1, .999, .999, .999, 1, 1, 1]) == inside(frame.points[:, :3], before)
        assert inside(frame.points[:, :3], before).sum() > 10
        assert (inside(warped.points[:, :3], after) == inside(frame.points[:, :3], before))[clear].all()
        later = a2b[:2, :3] @ (before[:3] + [*before[7:9], 0]) + a2b[:2, 3]                  # the box a second on
        np.testing.assert_allclose(after[:2] + after[7:9], later, atol=1e-4)


def test_a_warp_that_boxes_cannot_follow_is_refused():
    for bad in (np.diag([1., 2, 1, 1]), np.diag([0., 0, 0, 1]), np.eye(4) * np.nan, np.eye(4) + np.eye(4, k=1)):
        with pytest.raises(ValueError, match="no rotation or reflection"):
            data.warp_frame(toy_frame(np.random.default_rng(0)), bad)


def test_augment_cloud_keeps_colours_and_draws_what_it_says():
    frame, seen = toy_frame(np.random.default_rng(0)), []
    for seed in range(200):
        warped = data.augment_cloud(frame, np.random.default_rng(seed), 0.5, 0.1, flip=True)
        np.testing.assert_allclose(np.c_[warped.points[:, :3], np.ones(400)] @ warped.lidar2img[0].T,
                                   np.c_[frame.points[:, :3], np.ones(400)] @ frame.lidar2img[0].T, atol=1e-4)
        linear = np.linalg.inv(warped.lidar2world)[:3, :3]
        size = np.cbrt(abs(np.linalg.det(linear)))
        flips = np.sign(linear[0, 0]), np.sign(linear[1, 1])                                  # |turn| < 90 degrees
        seen.append((size, math.atan2(linear[1, 0] * flips[1], linear[0, 0] * flips[0]), *flips))
        again = data.augment_cloud(frame, np.random.default_rng(seed), 0.5, 0.1, flip=True)
        assert (again.points == warped.points).all()
        if seed == 0:
            still = data.augment_cloud(frame, np.random.default_rng(seed), 0, 0, flip=False)
            np.testing.assert_allclose(still.points, frame.points, atol=1e-6)
    for seed in range(40):                                                                    # KITTI looks forward only: x stays
        both, one = (data.augment_cloud(frame, np.random.default_rng(seed), 0.5, 0.1, flip) for flip in ((True, True), data.GRIDS["kitti", "paper"].mirrors))
        linear = np.linalg.inv(one.lidar2world)[:3, :3]
        assert linear[0, 0] > 0
        np.testing.assert_allclose(abs(both.points[:, 0]), abs(one.points[:, 0]), atol=1e-6)
        np.testing.assert_array_equal(both.points[:, 1], one.points[:, 1])
    assert data.GRIDS["kitti", "small"].mirrors == (False, True) and data.GRIDS["nuscenes", "paper"].mirrors == (True, True)
    size, turn, flip_x, flip_y = np.array(seen).T
    assert 0.9 <= size.min() < 0.92 and 1.08 < size.max() <= 1.1 and -0.5 <= turn.min() < -0.45 and 0.45 < turn.max() <= 0.5
    counts = [((flip_x == a) & (flip_y == b)).sum() for a in (-1, 1) for b in (-1, 1)]
    assert min(counts) > 25, counts                                                           # 50 expected of each


def test_select_takes_the_points_extras_along():
    frame = toy_frame(np.random.default_rng(0))
    keep = frame.points[:, 0] > 0
    some = data.select(frame, keep)
    assert (some.points == frame.points[keep]).all() and (some.extra["points_row"] == np.flatnonzero(keep)).all()
    assert len(some.extra["free"]) == 7
    assert (data.select(frame, [5, 2]).extra["points_row"] == [5, 2]).all()


def test_frame_refuses_wrong_shapes_and_types():
    frame = toy_frame(np.random.default_rng(0))
    for wrong, message in ((dict(points=frame.points[:, :4]), r"points is float32 \(400, 4\), expected float32 \(400, 5\)"),
                           (dict(lidar2img=frame.lidar2img[:1]), "lidar2img"),
                           (dict(lidar2world=np.eye(4, dtype=np.float32)), "lidar2world"),
                           (dict(boxes=frame.boxes.astype(float)), "boxes"), (dict(labels=None), "labels"),
                           (dict(images=[np.zeros((8, 9, 3), np.uint8)] * 2), "image 0"),
                           (dict(extra={"points_x": np.zeros(3)}), "points_x")):
        with pytest.raises(ValueError, match=f"^toy: .*{message}"):
            replace(frame, **wrong)


def test_collate_states_sizes_pads_images_and_joins_extras():
    rng = np.random.default_rng(0)
    first, empty, last = toy_frame(rng), data.select(toy_frame(rng), np.zeros(400, bool)), toy_frame(rng, 10)
    last = replace(last, images=[np.full((3, 4, 12), 7, np.uint8)] * 2)
    batch = data.collate([first, empty, last], [1, 2, 3])
    assert batch.size == 3 and batch.cameras == 2 and batch.names == ["toy"] * 3 and batch.seeds.tolist() == [1, 2, 3]
    assert torch.bincount(batch.b_points, minlength=3).tolist() == [400, 0, 10] and torch.bincount(batch.b_boxes).tolist() == [3, 3, 3]
    assert batch.images.shape == (6, 3, 8, 12) and batch.hw.tolist() == [[8, 9]] * 4 + [[4, 12]] * 2
    assert (batch.images[4:, :, :4] == 7).all() and batch.images[:4].sum() == 0 == batch.images[4:, :, 4:].sum()
    assert len(batch.extra["points_row"]) == 410
    assert batch.extra["b_free"].tolist() == [0] * 7 + [1] * 7 + [2] * 7 and "b_points_row" not in batch.extra
    assert batch.lidar2world.dtype == batch.time.dtype == torch.float64 and batch.to("cpu").size == 3


# ---- loader ----

def assert_same(a, b):
    for f in fields(data.Batch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=f"{f.name} differs")
        elif isinstance(x, dict):
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), f.name
        else:
            assert x == y, f.name


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def jiggle(frame, rng):
    return data.augment_cloud(frame, rng, 1., .1, flip=True)


class Heights:
    """A prepare: the height and range of each point in the unaugmented frame, and a free table; counts its calls in this process."""
    key, calls = "heights-v1", 0

    def __call__(self, frame):
        type(self).calls += 1
        flat = torch.tensor(np.hypot(*frame.points[:, :2].T))
        return {"points_z": frame.points[:, 2].copy(), "points_xy": flat, "cells": np.arange(6).reshape(3, 2)}


def test_batches_do_not_depend_on_workers(world, new_cache):
    def make(workers):
        return data.loader(world, "train", 2, seed=3, preset="small", workers=workers, augment=jiggle, prepare=Heights())
    for a, b in zip(take(make(0).begin_at(1), 3), take(make(2).begin_at(1), 3)):
        assert_same(a, b)
    for a, b in zip(make(0).once(), make(2).once(), strict=True):
        assert_same(a, b)


def test_batches_do_not_depend_on_the_number_of_ranks(world):
    whole = data.loader(world, "train", 2, preset="small", augment=jiggle)
    halves = [data.loader(world, "train", 1, rank, 2, preset="small", augment=jiggle) for rank in (0, 1)]
    assert whole.steps_per_epoch == halves[0].steps_per_epoch
    for joined, *parts in zip(take(whole.begin_at(0), 3), *(take(half.begin_at(0), 3) for half in halves)):
        assert joined.names == parts[0].names + parts[1].names
        for name in ("points", "images", "lidar2img", "boxes", "seeds", "lidar2world"):
            both = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(getattr(joined, name), both, rtol=0, atol=0, equal_nan=True)


def test_begin_at_is_skipping(world):
    loader = data.loader(world, "train", 1, preset="small", augment=jiggle)
    start = loader.steps_per_epoch - 1                                                  # across the end of an epoch
    for a, b in zip(take(loader.begin_at(0), start + 3)[start:], take(loader.begin_at(start), 3)):
        assert_same(a, b)


def test_epochs_permute_and_seeds_change(world):
    loader = data.loader(world, "train", 1, preset="small")
    n = loader.steps_per_epoch
    batches = take(loader.begin_at(0), 2 * n)
    names = [batch.names[0] for batch in batches]
    assert sorted(names[:n]) == sorted(names[n:]) == sorted(loader.dataset.name(i) for i in loader.indices) and names[:n] != names[n:]
    assert len({batch.seeds.item() for batch in batches}) == 2 * n
    other = [batch.names[0] for batch in take(data.loader(world, "train", 1, seed=1, preset="small").begin_at(0), n)]
    assert other != names[:n]
    a, b = (data.loader(world, "train", 1, preset="small", augment=jiggle).begin_at(s * n) for s in (0, 0))
    assert_same(next(a), next(b))


def test_a_split_smaller_than_the_batch_goes_through_several_epochs_a_step(world):
    loader = data.loader(world, "val", 64, preset="small", augment=jiggle)
    n = len(loader.indices)
    assert n < 64 and loader.steps_per_epoch == 1
    batch = next(loader.begin_at(0))
    assert len(batch.names) == 64
    assert all(set(batch.names[k:k + n]) == {loader.dataset.name(i) for i in loader.indices} for k in range(0, 64 - n, n))
    same = [k for k, name in enumerate(batch.names) if name == batch.names[0]]
    assert len({float(batch.points[batch.b_points == k][0, 0]) for k in same}) == len(same) == len({int(batch.seeds[k]) for k in same}) > 2  # turned apart
    halves = [next(data.loader(world, "val", 32, rank, 2, preset="small").begin_at(0)).names for rank in (0, 1)]
    assert halves[0] + halves[1] == batch.names


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(world, new_cache):
    first = next(data.loader(world, "train", 1, preset="small", prepare=Heights()).once())
    shutil.rmtree(new_cache / "prepared")
    (new_cache / "prepared").write_text("in the way")
    with pytest.warns(UserWarning, match="prepared.*cannot be written.*LIDAR_CAMERA_CACHE"):
        assert_same(next(data.loader(world, "train", 1, preset="small", prepare=Heights()).once()), first)


def test_once_covers_each_frame_once(world):
    for count in (1, 2, 3):
        loaders = [data.loader(world, "train", 2, rank, count, preset="small", augment=jiggle) for rank in range(count)]
        names = [name for loader in loaders for batch in loader.once() for name in batch.names]
        assert sorted(names) == sorted(loaders[0].dataset.name(i) for i in loaders[0].indices)
    batch = next(loaders[0].once())
    plain = [loaders[0].dataset.load(i).points for i in loaders[0].indices[[0, 3]]]
    assert (batch.points.numpy() == np.concatenate(plain)).all()                                       # not augmented


def test_prepare_is_computed_once_and_follows_augmentation(world, new_cache, monkeypatch):
    def batches():
        return list(take(data.loader(world, "train", 1, preset="small", augment=jiggle, prepare=Heights()).begin_at(0), 2))
    Heights.calls = 0
    first = batches()
    assert Heights.calls == 2
    for a, b in zip(first, batches()):
        assert_same(a, b)
    assert Heights.calls == 2
    batch = first[0]
    scale = (batch.points[:, 2] / batch.extra["points_z"]).median()
    torch.testing.assert_close(batch.points[:, :2].norm(dim=1), batch.extra["points_xy"] * scale)      # row for row
    assert batch.extra["cells"].shape == (3, 2) and batch.extra["b_cells"].tolist() == [0, 0, 0]

    files = sorted(new_cache.glob("prepared/*/heights-v1/*.npz"))
    assert len(files) == 2 and not list(new_cache.glob("prepared/**/*.part"))
    whole = files[0].read_bytes()
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\1\2") + 8] ^= 1                                                         # a flag of the first entry
    for k, damaged in enumerate((whole[:len(whole) // 2], b"", b"garbage" * 99, whole[:-1], whole[:300] + b"\0" * 50 + whole[350:], bytes(encrypted))):
        files[0].write_bytes(damaged)
        for a, b in zip(first, batches()):
            assert_same(a, b)
        assert Heights.calls == 3 + k
    assert files[0].read_bytes() == whole

    monkeypatch.setattr(Heights, "key", "heights-v2")                                                   # another version: computed anew
    batches()
    assert Heights.calls == 2 + 6 + 2
    monkeypatch.setattr(Heights, "key", "../escape")
    with pytest.raises(ValueError, match="names a folder"):
        batches()


def test_what_was_prepared_from_other_points_is_computed_anew(kitti, new_cache, tmp_path):
    """A scan that is overwritten in place changes no folder's time."""
    root = Path(shutil.copytree(kitti, tmp_path / "kitti"))
    before = next(data.loader(root, "train", 1, prepare=Heights()).once())
    file = root / "training/velodyne/000000.bin"
    scan = np.fromfile(file, np.float32).reshape(-1, 4) + np.array([0, 0, 1, 0], np.float32)
    with open(file, "r+b") as same:
        same.write(scan.tobytes())
    after = next(data.loader(root, "train", 1, prepare=Heights()).once())
    torch.testing.assert_close(after.extra["points_z"], before.extra["points_z"] + 1)


def fail(frame, rng):
    raise data.DataError(f"{frame.name}: told to fail")


def test_an_error_in_a_worker_arrives_with_its_message(world):
    with pytest.raises(data.DataError, match="nuscenes/.*told to fail"):
        next(data.loader(world, "train", 1, preset="small", workers=1, augment=fail).begin_at(0))


@pytest.mark.parametrize("wrong", [dict(batch=0), dict(batch=1, rank=2, world=2), dict(batch=1, workers=-1)])
def test_loader_refuses_impossible_numbers(world, wrong):
    with pytest.raises(ValueError, match="expected 0 <= rank < world"):
        data.loader(world, "train", preset="small", **wrong)
    with pytest.raises(ValueError, match="nuScenes v1.0-embedded: crop is for KITTI"):
        data.loader(world, "train", 1, preset="small", crop=True)


def draw_once(frame, rng):
    return replace(frame, time=rng.random())


def test_random_streams_are_of_seed_epoch_and_frame_and_no_step_has_a_frame_twice(world):
    drawn, seeds, count = set(), set(), 0
    for seed in (0, 1):
        loader = data.loader(world, "train", 1, seed=seed, preset="small", image=(12, 32), augment=draw_once)
        for batch in take(loader.begin_at(0), 2 * loader.steps_per_epoch):
            drawn, seeds, count = drawn | {float(batch.time)}, seeds | {int(batch.seeds)}, count + 1
    assert len(drawn) == len(seeds) == count == 4 * len(loader.indices)
    loader = data.loader(world, "train", 4, preset="small", image=(12, 32))                             # of six frames: two of each epoch are left out
    assert loader.steps_per_epoch == 1 and all(len(set(batch.names)) == 4 for batch in take(loader.begin_at(0), 6))


# ---- splits and versions ----

def test_the_worlds_own_splits(world):
    dataset = data.NuScenes(world, "small")
    lists = json.loads(next(Path(world).glob("v1.0-*/splits.json")).read_text())
    for split in ("train", "val"):
        assert {dataset.name(i).split("/")[1] for i in dataset.split(split)} == set(lists[f"embedded_{split}"])
    with pytest.raises(data.DataError, match="no split 'minival'"):
        dataset.split("minival")
    with pytest.raises(data.DataError, match="none for test"):
        dataset.split("test")


def test_an_empty_split_makes_both_from_all_frames(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    edit(root, "splits", lambda lists: {"own_val": [scene for scenes in lists.values() for scene in scenes]})
    dataset = data.NuScenes(root, "small")
    train, val = dataset.split("train"), dataset.split("val")
    assert "cut in their order" in capsys.readouterr().out
    assert train.tolist() + val.tolist() == list(range(len(dataset))) and len(train) == len(dataset) * 4 // 5
    times = [dataset.load(i, (9, 16)).time for i in range(len(dataset))]
    assert max(times[i] for i in train) < min(times[i] for i in val)


def test_own_lists_stand_beside_the_official_ones(tmp_path):
    """In splits.json, where the devkit looks for them too."""
    from nuscenes.utils.splits import create_splits_scenes
    official, folder = create_splits_scenes(), tmp_path / "v1.0-trainval"
    folder.mkdir()

    def of(split, **own):
        (folder / "splits.json").write_text(json.dumps(own))
        return sorted(scene for scene, end in data.official_splits(folder).items() if end == split)
    assert of("train") == sorted(official["train"]) and of("val") == sorted(official["val"]) and of("test") == sorted(official["test"])
    few = official["train"][3:38]
    assert of("train", few_train=few) == sorted(few) and of("val", few_train=few) == sorted(official["val"])
    assert of("train", few_train=few, my_val=few[:0] + official["train"][:3]) == sorted(few) and of("val", few_train=few, my_val=["mine"]) == ["mine"]
    data.print_once.cache_clear()
    assert of("train", **{"nuscenes-5pct-a": few}) == sorted(official["train"])
    with pytest.raises(data.DataError, match=f"{official['val'][0]} is in train and in val.*official"):
        of("train", few_train=official["val"][:1])


def test_a_list_that_no_split_takes_is_named(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    edit(root, "splits", lambda lists: lists | {"nuscenes-5pct-a": ["scene-0001"]})
    assert len(data.NuScenes(root, "small").split("train")) == len(data.NuScenes(world, "small").split("train"))
    assert "nuscenes-5pct-a not used: names that end in train, val or test are" in capsys.readouterr().out


def test_official_split_of_the_mini_version(nuscenes_root):
    dataset = data.NuScenes(nuscenes_root, "small")
    if dataset.version != "v1.0-mini":
        pytest.skip(f"NUSCENES holds {dataset.version}")
    assert set(dataset.frames["split"][dataset.frames["scene"] == b"scene-0916"]) == {b"val"}           # it is in mini_val


def test_frames_without_any_file_are_left_out_aloud(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    before = data.NuScenes(root, "small")
    gone, rows = before.names[1], before.frames["sensors"][1]
    for row in rows:
        (root / before.sensors["file"][row].decode()).unlink()
    after = data.NuScenes(root, "small")
    assert after.names == [name for name in before.names if name != gone] and len(after.load(1, (9, 16)).images) == 6
    assert f"1 of the {len(before)} frames" in capsys.readouterr().out
    data.print_once.cache_clear()
    data.NuScenes(root, "small")
    assert "left out" in capsys.readouterr().out                                                        # known from the cached index too


def test_the_version_taken_is_said_and_can_be_chosen(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    tables = next(root.glob("v1.0-*"))
    for name in ("v1.0-mini", "v1.0-trainval"):
        shutil.copytree(tables, root / name)
    shutil.rmtree(tables)
    assert data.NuScenes(root, "small").version == "v1.0-trainval" and "reading v1.0-trainval" in capsys.readouterr().out
    assert data.NuScenes(root, "small", version="v1.0-mini").version == "v1.0-mini"
    assert data.open_dataset(root / "v1.0-mini", "small").version == "v1.0-mini" and data.open_dataset(root / "v1.0-mini").root == str(root)
    with pytest.raises(data.DataError, match=f"found v1.0-mini, v1.0-trainval, not v1.0-test; give the folder .* such as {root}/v1.0-mini"):
        data.NuScenes(root, version="v1.0-test")


# ---- the index ----

def test_second_open_parses_nothing_and_maps_plain_arrays(world, new_cache, monkeypatch):
    first = data.NuScenes(world, "small")
    monkeypatch.setattr(data, "build_index", lambda *_: pytest.fail("the tables were parsed again"))
    second, third = data.NuScenes(world, "small"), pickle.loads(pickle.dumps(first))
    for dataset in (second, third):
        assert all(isinstance(a, np.memmap) and not a.dtype.hasobject for a in (dataset.frames, dataset.sensors, dataset.boxes))
        assert (dataset.load(1).points == first.load(1).points).all()
    assert len(pickle.dumps(first)) < 4096                                                              # what a worker receives
    for path in new_cache.rglob("*.npy"):
        assert path.read_bytes()[:6] == b"\x93NUMPY"
        np.load(path, allow_pickle=False)


def test_index_is_built_again_when_a_table_or_a_file_of_it_changes(world, tmp_path, new_cache, capsys):
    root = clone(Path(world), tmp_path / "root")
    before = data.NuScenes(root, "small").load(0)
    edit(root, "scene", lambda rows: [row.update(name="renamed-" + row["name"]) for row in rows] and None)
    put(next(root.glob("v1.0-*/splits.json")), b"{}")
    assert data.NuScenes(root, "small").load(0).name == before.name.replace("nuscenes/", "nuscenes/renamed-")
    for path in sorted(new_cache.glob("index-*/*.npy")):
        whole = path.read_bytes()
        for damaged in (whole[:len(whole) - 8], whole[:20], b""):
            path.write_bytes(damaged)
            data.NuScenes(root, "small").load(0)
        path.unlink()
        data.NuScenes(root, "small").load(0)
    assert "damaged" in capsys.readouterr().out and not list(new_cache.glob("*.part"))


def test_more_blobs_make_a_new_index_and_leave_what_was_prepared(world, tmp_path, new_cache):
    root = clone(Path(world), tmp_path)
    Heights.calls = 0
    for count in range(2):
        next(data.loader(root, "train", 1, preset="small", prepare=Heights()).once())
        assert len(list(new_cache.glob("index-*/frames.npy"))) == count + 1 and Heights.calls == 1
        os.utime(root / "samples" / "CAM_FRONT", (count, count))       # as after extracting one more archive


def open_and_read(root, cache):
    os.environ["LIDAR_CAMERA_CACHE"] = cache
    return data.NuScenes(root, "small").load(0).points.sum().item()


def test_two_processes_may_build_the_index_at_once(world, new_cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        a, b = pool.starmap(open_and_read, [(str(world), str(new_cache))] * 2, chunksize=1)
    assert a == b and len(list(new_cache.glob("index-*/frames.npy"))) == 1 and not list(new_cache.glob("*.part"))


def test_losing_the_race_without_locks_is_harmless(world, new_cache, monkeypatch):
    build, index_of = data.build_index, []

    def slow(root, version):                            # another process publishes its index while this one builds
        index = build(root, version)
        if not index_of:
            index_of.append(index)
            data.NuScenes(world, "small")
        return index
    monkeypatch.setattr(data, "build_index", slow)

    def flock(*_):
        raise OSError("no locks on this file system")
    monkeypatch.setattr(data.fcntl, "flock", flock)
    assert len(data.NuScenes(world, "small").load(0).points) > 0
    assert len(index_of) == 1 and not list(new_cache.glob("*.part"))


def test_a_cache_that_cannot_be_written_says_what_to_set(world, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(data.DataError, match="file/cache: .* cannot be written .*LIDAR_CAMERA_CACHE"):
        data.NuScenes(world)


def test_an_index_that_is_there_is_read_where_nothing_may_be_written(world, new_cache, monkeypatch):
    data.NuScenes(world, "small")
    for lock in new_cache.glob("*.lock"):
        lock.unlink()
        lock.mkdir()                                    # as good as a folder of another user: no process may open it
    data.NuScenes(world, "small").load(0)
    shutil.rmtree(next(new_cache.glob("index-*[!k]")))
    with pytest.raises(data.DataError, match="index-.* cannot be written .*LIDAR_CAMERA_CACHE"):
        data.NuScenes(world, "small")
    for lock in new_cache.glob("*.lock"):
        lock.rmdir()

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(data.DataError, match="No space left on device.*make room"):
        data.NuScenes(world, "small")
    assert [path.suffix for path in new_cache.iterdir()] == [".lock"]


def test_others_may_read_what_the_umask_says(world, new_cache):
    """A cache that several users share: tempfile's files would be their owner's alone."""
    old = os.umask(0o002)
    try:
        next(data.loader(world, "train", 1, preset="small", prepare=Heights()).once())
    finally:
        os.umask(old)
    made = {path.is_dir(): path.stat().st_mode & 0o777 for path in new_cache.rglob("*")}
    assert made == {True: 0o775, False: 0o664} == {path.is_dir(): path.stat().st_mode & 0o777 for path in sorted(new_cache.rglob("*"), reverse=True)}


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIDAR_CAMERA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / "lidar-camera-pretraining"


# ---- bad input: each complaint says where, what was found, what was expected, what to do ----

def resized(root):
    file = key_file(root, "CAM_BACK")
    Image.open(file).resize((50, 40)).save(root / "other.jpg")
    put(file, (root / "other.jpg").read_bytes())


def four_floats(root):
    rng = np.random.default_rng(0)
    put(key_file(root, "LIDAR_TOP"), (rng.uniform(0, 1, (500, 4)) * (50, 50, 2, 255)).astype(np.float32).tobytes())


def with_value(column, value):
    def change(root):
        file = key_file(root, "LIDAR_TOP")
        points = np.fromfile(file, np.float32).reshape(-1, 5)
        points[3, column] = value
        put(file, points.tobytes())
    return change


def outside_link(root):
    file = key_file(root, "CAM_FRONT")
    target = root.parent / "elsewhere.jpg"
    target.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(target)


def table(name, change):
    return lambda root: edit(root, name, change)


def no_row(name):
    return table(name, lambda rows: rows[:-1])


def first(channel, **change):
    """Change the first sample_data row of a channel."""
    return table("sample_data", lambda rows: next(row for row in rows if channel in row["filename"]).update(change))


def loop_sweeps(rows):
    lidar = [row for row in rows if "LIDAR_TOP" in row["filename"]]
    row = next(row for row in lidar if row["next"])
    row["prev"] = row["next"]


def set_all(name, **change):
    return table(name, lambda rows: [row.update(change) for row in rows] and None)


def cut(pattern, at):
    """Cut the first file of that pattern at this byte."""
    def change(root):
        file = sorted(root.glob(pattern))[0]
        put(file, file.read_bytes()[:at])
    return change


BROKEN = {
    "truncated bin": (cut("samples/LIDAR_TOP/*", -7), ["nuscenes/", ".bin", "N x 20", "truncated", "extract"]),
    "empty bin": (lambda r: put(key_file(r, "LIDAR_TOP"), b""), ["nuscenes/", ".bin", "0 bytes", "N > 0", "extract"]),
    "missing bin": (lambda r: key_file(r, "LIDAR_TOP").unlink(), ["nuscenes/", ".bin", "missing", "extract"]),
    "missing jpg": (lambda r: key_file(r, "CAM_FRONT").unlink(), ["nuscenes/", "CAM_FRONT", ".jpg", "missing", "extract"]),
    "truncated jpg": (cut("samples/CAM_FRONT/*", 900), ["nuscenes/", ".jpg", "not a whole JPEG", "900 bytes", "extract"]),
    "no jpg": (lambda r: put(key_file(r, "CAM_FRONT"), b"<html>"), ["nuscenes/", ".jpg", "not a whole JPEG", "6 bytes", "extract"]),
    "wrong size jpg": (resized, ["nuscenes/", "CAM_BACK", "50 x 40", "expected", "calibration", "extract"]),
    "enormous height": (first("CAM_BACK/", height=10 ** 10), ["nuscenes/", "CAM_BACK", "x 10000000000", "calibration"]),
    "four floats a point": (four_floats, ["nuscenes/", ".bin", "expected", "float", "5"]),
    "NaN point": (with_value(1, np.nan), ["nuscenes/", ".bin", "nan", "finite"]),
    "infinite point": (with_value(2, np.inf), ["nuscenes/", ".bin", "inf", "finite"]),
    "far point": (with_value(0, 5e4), ["nuscenes/", ".bin", "300 m"]),
    "NaN intensity": (with_value(3, np.nan), ["nuscenes/", ".bin", "0..255"]),
    "ring 40": (with_value(4, 40), ["nuscenes/", ".bin", "40", "0..31"]),
    "ring 1.5": (with_value(4, 1.5), ["nuscenes/", ".bin", "whole numbers in 0..31"]),
    "no calibration": (no_row("calibrated_sensor"), ["sample_data.json", "calibrated_sensor_token", "calibrated_sensor.json", "extract"]),
    "no ego pose": (no_row("ego_pose"), ["sample_data.json", "ego_pose_token", "ego_pose.json", "extract"]),
    "no image row": (table("sample_data", lambda rows: rows.remove(next(r for r in rows if "CAM_BACK/" in r["filename"]))),
                     ["sample_data.json", "CAM_BACK", "sample", "extract"]),
    "no instance": (no_row("instance"), ["sample_annotation.json", "instance_token", "instance.json"]),
    "no scene": (no_row("scene"), ["sample.json", "scene_token", "scene.json"]),
    "path upwards": (first("CAM_FRONT/", filename="../../etc/passwd"), ["sample_data.json", "../../etc/passwd", "inside", "correct"]),
    "absolute path": (first("LIDAR_TOP/", filename="/etc/passwd"), ["sample_data.json", "/etc/passwd", "inside", "correct"]),
    "link to elsewhere": (outside_link, ["nuscenes/", "leads to", "elsewhere.jpg", "inside"]),
    "cyclic samples": (table("sample", lambda rows: rows[1].update(next=rows[1]["token"])), ["sample.json", "next", "cyclic", "extract"]),
    "cyclic sweeps": (table("sample_data", loop_sweeps), ["sample_data.json", "prev", "cyclic", "extract"]),
    "cyclic boxes": (table("sample_annotation", lambda rows: rows[0].update(next=rows[0]["token"])),
                     ["sample_annotation.json", "next", "cyclic"]),
    "duplicate token": (table("ego_pose", lambda rows: rows + rows[:1]), ["ego_pose.json", "occurs 2 times", "once", "extract"]),
    "two key frames": (table("sample_data", lambda rows: rows + [dict(rows[0], token="twin")]),
                       ["sample_data.json", "key-frame rows", "expected 7 each"]),
    "NaN calibration": (set_all("calibrated_sensor", translation=[0, float("nan"), 1]),
                        ["calibrated_sensor.json", "translation", "nan", "finite"]),
    "infinite pose": (set_all("ego_pose", translation=[0, float("inf"), 1]), ["ego_pose.json", "translation", "inf", "finite"]),
    "zero rotation": (set_all("ego_pose", rotation=[0, 0, 0, 0]), ["ego_pose.json", "rotation", "unit quaternion"]),
    "three numbers for a rotation": (set_all("ego_pose", rotation=[1, 0, 0]), ["ego_pose.json", "rotation", "expected 4 finite"]),
    "no intrinsics": (set_all("calibrated_sensor", camera_intrinsic=[]), ["calibrated_sensor.json", "camera_intrinsic", "3 x 3"]),
    "no field": (table("ego_pose", lambda rows: [row.pop("rotation") for row in rows] and None), ["ego_pose.json", "no field rotation"]),
    "half a table": (cut("v1.0-*/sample_data.json", 5000), ["sample_data.json", "JSON", "extract"]),
    "not a list": (lambda r: put(next(r.glob("v1.0-*/sensor.json")), b"3"), ["sensor.json", "not a JSON list"]),
    "a scene in two splits": (lambda r: put(next(r.glob("v1.0-*/splits.json")), b'{"train": ["a"], "val": ["a"]}'),
                              ["splits.json", "a is in train and in val"]),
    **{f"no {name}.json": (lambda r, name=name: next(r.glob(f"v1.0-*/{name}.json")).unlink(), [f"{name}.json", "missing", "extract"])
       for name in ("sensor", "calibrated_sensor", "ego_pose", "sample", "sample_data", "sample_annotation", "scene", "instance", "category")},
    "samples that are a link": (lambda r: ((r / "samples").rename(r.parent / "elsewhere"), (r / "samples").symlink_to(r.parent / "elsewhere")),
                                [": samples leads to", "elsewhere", "no links"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(world, tmp_path, case):
    root = clone(Path(world), tmp_path / "root")
    breaks, message = BROKEN[case]
    breaks(root)
    with pytest.raises(data.DataError) as error:
        dataset = data.NuScenes(root, "small")
        for i in range(len(dataset)):
            dataset.load(i)
    for fragment in message:
        assert fragment in str(error.value), (fragment, str(error.value))


def test_a_sweep_with_only_the_car_in_it_is_an_empty_frame(world, tmp_path):
    root = clone(Path(world), tmp_path)
    points = np.array([[.5, .5, -.3, 9, 3], [0, 2.2, -.9, 9, 0], [-.9, -1.2, -1, 9, 0]], np.float32)
    dataset = data.NuScenes(root, "small")
    put(root / dataset.sensors["file"][dataset.frames["sensors"][0, 0]].decode(), points.tobytes())
    frame = dataset.load(0)
    assert frame.points.shape == (0, 5) and len(dataset.sweep(0)) == 3
    batch = data.collate([jiggle(frame, np.random.default_rng(0)), dataset.load(1)], [0, 1])
    assert batch.size == 2 and (batch.b_points == 1).all()


def test_wrong_root_names_the_right_one(world, tmp_path):
    root = clone(Path(world), tmp_path / "outer" / "nuscenes")
    for wrong in (root.parent, root / "samples", root / "samples" / "CAM_FRONT"):
        with pytest.raises(data.DataError) as error:
            data.open_dataset(str(wrong), "small")
        assert str(error.value).startswith(f"{wrong}: ") and str(error.value).endswith(f"give {root}")
    for wrong, found in ((tmp_path / "absent", "no such folder"), (tmp_path / "empty", "found nothing")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(data.DataError, match=f"looked for nuScenes.*{found}"):
            data.open_dataset(str(wrong))


def test_no_root_is_the_embedded_world_written_once(world, new_cache, monkeypatch, capsys):
    import synthetic
    atomic_write = []
    monkeypatch.setattr(synthetic, "write", lambda root: (atomic_write.append(root), clone(Path(world), Path(root))))
    for _ in range(2):
        assert data.open_dataset("", "small").version == "v1.0-embedded"
    assert atomic_write == [new_cache / f"world-{synthetic.VERSION}"] and "writing the embedded world" in capsys.readouterr().out


# ---- KITTI: the fabricated folder, then the real frames ----

def raw_root(kitti):
    return next(kitti.glob("2011_*"))


@pytest.mark.parametrize("size", [(384, 1248), (80, 256), (200, 1000), (375, 1242)])
@pytest.mark.parametrize("layout", ["object frames", "raw drives"])
def test_kitti_points_land_on_the_pixels_that_they_were_made_from(kitti, layout, size):
    dataset = data.open_dataset(kitti if layout == "object frames" else raw_root(kitti))
    assert dataset.layout == layout
    for i in range(len(dataset)):
        frame, uvd = dataset.load(i, size), np.load(os.path.join(dataset.root, dataset.frames[i].cloud.replace(".bin", ".uvd.npy")))
        found = project(frame.points[:400, :3], frame.lidar2img[0])
        np.testing.assert_allclose(found[:, 2], uvd[:, 2], rtol=1e-4)
        width, height = Image.open(os.path.join(dataset.root, dataset.frames[i].image)).size
        u, v = np.floor(found[:, :2]).astype(int).T
        shown = (u >= 1) & (v >= 1) & (u < size[1] - 1) & (v < size[0] - 1)
        assert shown.mean() > 0.5
        red, green = frame.images[0][:2, v[shown], u[shown]] / 255.
        scale = max(size[0] / height, size[1] / width)
        assert abs(red * width - uvd[shown, 0]).max() < 0.6 / scale + 3 and abs(green * height - uvd[shown, 1]).max() < 0.6 / scale + 1.5
        lidar2rect, rect2img = dataset.calibration(i)
        exact = project(frame.points[:400, :3], rect2img @ lidar2rect)
        np.testing.assert_allclose(exact[:, :2], uvd[:, :2], atol=0.02)                                # scans are float32
        assert frame.points.shape == (800, 5) and (frame.points[:, 4] == 0).all() and not frame.origin.any()


def test_kitti_labels_are_the_devkits_boxes(kitti):
    from conftest import CAR, R0, TR, car_corners
    dataset = data.open_dataset(kitti, "small")
    frame, rows = dataset.load(0), dataset.annotations(0)
    assert rows["type"].tolist() == ["Car", "Van", "DontCare"] and rows["label"].tolist() == [0, -1, -1] and np.isnan(rows["box"][2]).all()
    assert frame.labels.tolist() == [0] and frame.boxes.shape == (1, 9) and np.isnan(frame.boxes[0, 7:]).all()
    expected = (car_corners(**CAR) @ R0 - TR[:, 3]) @ TR[:, :3]                                         # the turns' transposes undo them
    found = data.box_corners(rows["box"][0])
    gap = np.linalg.norm(expected[:, None] - found[None], axis=2)
    assert gap.min(1).max() < 1e-6 and sorted(gap.argmin(1)) == list(range(8))
    # the heading points along the car's x axis, which is +x of the camera turned by rotation_y about y (down)
    ahead = expected[[0, 1, 4, 5]].mean(0) - expected.mean(0)
    assert abs(math.atan2(ahead[1], ahead[0]) - rows["box"][0, 6]) < 1e-6
    assert dataset.load(3).boxes is None and not dataset.frames[3].labels                               # testing/ has no labels


def test_kitti_splits_and_what_is_left_out(kitti, tmp_path, capsys):
    data.print_once.cache_clear()
    dataset = data.open_dataset(kitti)
    said = capsys.readouterr().out
    assert "object frames and raw drives" in said and f"give {raw_root(kitti)}" in said and "2 of the 6 frames in ImageSets" in said
    assert [[dataset.names[i] for i in dataset.split(name)] for name in ("train", "val", "test")] == [
        ["kitti/training/000000", "kitti/training/000003"], ["kitti/training/000007"], ["kitti/testing/000000"]]
    raw = data.open_dataset(raw_root(kitti))
    assert "1 raw frames have only a scan or only a picture" in capsys.readouterr().out
    assert raw.names == [f"kitti/2011_09_26_drive_0009_sync/{n:010d}" for n in (0, 1, 3)] and raw.split("train").tolist() == [0, 1] and raw.split("val").tolist() == [2]
    assert "cut in their order" in capsys.readouterr().out and [raw.load(i).time for i in range(3)] == pytest.approx([0, 0.1, 0.3])
    bare = clone(kitti, tmp_path)
    shutil.rmtree(bare / "ImageSets")
    dataset = data.open_dataset(bare)
    assert [dataset.split(name).tolist() for name in ("train", "val", "test")] == [[0, 1], [2], [3]]         # the official download has no lists
    (bare / "training" / "velodyne" / "._000000.bin").write_bytes(b"a Mac's")
    (bare / "testing" / "image_2" / "._000000.png").write_bytes(b"a Mac's")
    assert data.open_dataset(bare).names == dataset.names
    shutil.rmtree(bare / "training")
    with pytest.raises(data.DataError):
        data.open_dataset(bare).split("val")


def test_frames_without_labels_stay_out_of_kittis_own_cut(kitti, tmp_path):
    """Lists of other frames than those on disk: none of val is there, so both splits are cut, from labelled frames."""
    root = clone(kitti, tmp_path)
    (root / "ImageSets" / "test.txt").unlink()
    (root / "ImageSets" / "val.txt").write_text("000111\n")
    dataset = data.open_dataset(root)
    assert [[dataset.names[i] for i in dataset.split(name)] for name in ("train", "val", "test")] == [
        ["kitti/training/000000", "kitti/training/000003"], ["kitti/training/000007"], ["kitti/testing/000000"]]


def test_cropping_to_the_view_keeps_what_a_picture_shows(kitti):
    frame = data.open_dataset(kitti).load(0, (375, 1242))
    frame = replace(frame, extra={"points_row": np.arange(800)})
    cropped = data.crop_to_view(frame)
    u, v, d = project(frame.points[:, :3], frame.lidar2img[0]).T
    expected = np.flatnonzero((d > 0) & (u >= 0) & (u < 1242) & (v >= 0) & (v < 375))
    assert cropped.extra["points_row"].tolist() == expected.tolist() and (expected[:400] == np.arange(400)).all() and 400 < len(expected) < 600
    twice = replace(frame, images=frame.images * 2, lidar2img=np.stack([frame.lidar2img[0], frame.lidar2img[0] @ np.diag([-1, -1, 1, 1]).astype(np.float32)]))
    assert len(data.crop_to_view(twice).points) > len(cropped.points)                                   # what any picture shows stays


def test_real_kitti_counts_are_those_of_an_independent_script(kitti_root):
    path = kitti_root.parent / "golden_counts.json"
    if not path.exists():
        pytest.skip(f"no {path}: KITTI is not the small set of frames that was counted")
    golden, cars = json.loads(path.read_text()), 0
    for root, counted in ((kitti_root, golden["kitti_object"]), (raw_root(kitti_root), golden["kitti_raw_2011_09_26_drive_0052"])):
        dataset = data.open_dataset(root)
        assert [name.rsplit("/", 1)[1] for name in dataset.names] == sorted(counted)
        for i, (_, expected) in enumerate(sorted(counted.items())):
            width, height = expected["image"]
            frame, lidar2rect = dataset.load(i, (height, width)), dataset.calibration(i)[0]
            assert len(frame.points) == expected["points"] and frame.images[0].shape == (3, height, width)
            assert len(data.crop_to_view(frame).points) == expected["in_image"]
            scan = frame.points[:, :3].astype(np.float64) @ lidar2rect[:3, :3].T + lidar2rect[:3, 3]    # the counts are of upright boxes in camera 0
            rows = dataset.annotations(i)
            rows = rows[rows["type"] != "DontCare"]
            for row, (kind, count) in zip(rows, expected.get("points_in_box", [])):
                x, y, z = (scan - row["location"]).T
                cos, sin = math.cos(row["rotation_y"]), math.sin(row["rotation_y"])
                h, w, l = row["hwl"]
                held = (abs(cos * x - sin * z) < l / 2) & (y < 0) & (y > -h) & (abs(sin * x + cos * z) < w / 2)
                assert (row["type"], held.sum()) == (kind, count)
                assert data.inside_box(frame.points[:, :3], row["box"]).sum() == pytest.approx(count, rel=0.1, abs=3)    # upright in the LiDAR's frame instead
                cars += 1
    assert cars == 11


def test_real_kitti_reduced_cloud_is_reproduced(kitti_root):
    files = sorted(kitti_root.glob("training/velodyne_reduced/*.bin"))
    if not files:
        pytest.skip(f"no velodyne_reduced under {kitti_root}/training")
    dataset = data.open_dataset(kitti_root)
    for file in files:
        i = dataset.names.index(f"kitti/training/{file.stem}")
        width, height = Image.open(os.path.join(dataset.root, dataset.frames[i].image)).size
        np.testing.assert_array_equal(data.crop_to_view(dataset.load(i, (height, width))).points[:, :4], np.fromfile(file, np.float32).reshape(-1, 4))


def test_real_kitti_boxes_project_onto_their_labels(kitti_root):
    dataset, cars = data.open_dataset(kitti_root), 0
    labelled = [(dataset, i, dataset.annotations(i)) for i in range(len(dataset))]
    for dataset, i, rows in labelled:
        width, height = Image.open(os.path.join(dataset.root, dataset.frames[i].image)).size
        frame = dataset.load(i, (height, width))
        for row in rows[(rows["type"] == "Car") & (rows["truncated"] == 0)]:
            uvd = project(data.box_corners(frame.boxes[(abs(frame.boxes[:, :3] - row["box"][:3]) < 1e-3).all(1)][0]), frame.lidar2img[0])
            low, high = np.clip(uvd[:, :2].min(0), 0, (width - 1, height - 1)), np.clip(uvd[:, :2].max(0), 0, (width - 1, height - 1))
            both = np.prod(np.minimum(high, row["bbox"][2:]) - np.maximum(low, row["bbox"][:2]))
            assert both / (np.prod(high - low) + np.prod(row["bbox"][2:] - row["bbox"][:2]) - both) > 0.9, (frame.name, row)
            cars += 1
    assert cars == 8 or kitti_root.name != "kitti"


def text(pattern, change):
    def edit_text(root):
        file = sorted(root.glob(pattern))[0]
        put(file, change(file.read_text()).encode())
    return edit_text


def rescaled(root):
    file = sorted(root.glob("training/velodyne/*.bin"))[0]
    points = np.fromfile(file, np.float32).reshape(-1, 4)
    put(file, (points * [1, 1, 1, 255]).astype(np.float32).tobytes())


def remove(pattern):
    return lambda root: sorted(root.glob(pattern))[0].unlink()


def linked(name):
    def change(root):
        target = root.parent / Path(name).name
        target.write_bytes((root / name).read_bytes())
        (root / name).unlink()
        (root / name).symlink_to(target)
    return change


BROKEN_KITTI = {
    "truncated scan": (cut("training/velodyne/*", -7), ["kitti/training/000000", "velodyne/000000.bin", "12793 bytes", "N x 16", "extract"]),
    "empty scan": (cut("training/velodyne/*", 0), ["velodyne/000000.bin", "0 bytes", "N > 0"]),
    "reflectance to 255": (rescaled, ["velodyne/000000.bin", "0..1", "four float32"]),
    "missing picture": (remove("training/image_2/*"), ["kitti/training/000000", "image_2/000000.png", "missing", "extract"]),
    "missing scan": (remove("training/velodyne/*.bin"), ["kitti/training/000000", "velodyne/000000.bin", "missing", "extract"]),
    "missing calibration": (remove("training/calib/*"), ["kitti/training/000000", "calib/000000.txt", "missing", "extract"]),
    "missing label": (remove("training/label_2/*"), ["kitti/training/000000", "label_2/000000.txt", "missing", "extract"]),
    "truncated picture": (cut("training/image_2/*", 999), ["kitti/training/000000", "image_2/000000.png", "not a whole", "999 bytes"]),
    "no P2": (text("training/calib/*", lambda t: t.replace("P2:", "P9:")), ["calib/000000.txt", "no line P2", "P0, P9, R0_rect"]),
    "a word in R0_rect": (text("training/calib/*", lambda t: t.replace("R0_rect: ", "R0_rect: one ")), ["calib/000000.txt", "R0_rect: one", "9 finite numbers"]),
    "eleven numbers": (text("training/calib/*", lambda t: t[:t.index("Tr_velo")] + "Tr_velo_to_cam: 0 1 2 3 4 5 6 7 8 9 10\n"), ["Tr_velo_to_cam", "expected 12"]),
    "not a number": (text("training/calib/*", lambda t: t[:t.index("Tr_velo")] + "Tr_velo_to_cam: " + "nan " * 12), ["Tr_velo_to_cam", "finite"]),
    "fourteen columns": (text("training/label_2/*", lambda t: t.replace(" 0.6\n", "\n")), ["kitti/training/000000", "label_2/000000.txt", "line 1", "14 finite numbers"]),
    "an unknown type": (text("training/label_2/*", lambda t: t.replace("Van", "Boat")), ["label_2/000000.txt", "line 2", "'Boat"]),
    "a word for a number": (text("training/label_2/*", lambda t: t.replace("Van 0.00", "Van x")), ["label_2/000000.txt", "line 2"]),
    "labels that are no text": (lambda r: put(r / "training/label_2/000000.txt", b"\xff\xfe\x00"), ["label_2/000000.txt", "cannot be read"]),
    "a strange ImageSet": (text("ImageSets/train.txt", lambda t: "0\n" + t), ["ImageSets/train.txt", "entry 1", "'0'", "six digits"]),
    "a picture linked from elsewhere": (linked("training/image_2/000003.png"), ["kitti/training/000003", "expected a place inside"]),
    "labels linked from elsewhere": (linked("training/label_2/000003.txt"), ["kitti/training/000003", "expected a place inside"]),
    "train.txt alone": (remove("ImageSets/val.txt"), ["ImageSets has train.txt alone", "or neither"]),
    "scans that are a link": (lambda r: ((r / "training/velodyne").rename(r.parent / "elsewhere"), (r / "training/velodyne").symlink_to(r.parent / "elsewhere")),
                              [": training/velodyne leads to", "elsewhere", "no links"]),
    "a frame in two splits": (text("ImageSets/val.txt", lambda t: t + "000000\n"), ["ImageSets/val.txt", "000000", "train.txt too"]),
}


@pytest.mark.parametrize("case", BROKEN_KITTI)
def test_broken_kitti_folder(kitti, tmp_path, case):
    root = clone(kitti, tmp_path / "root")
    breaks, message = BROKEN_KITTI[case]
    breaks(root)
    with pytest.raises(data.DataError) as error:
        dataset = data.Kitti(root, "small")
        for i in range(len(dataset)):
            dataset.load(i)
    for fragment in message:
        assert fragment in str(error.value), (fragment, str(error.value))


def test_broken_raw_calibration(kitti, tmp_path):
    root = raw_root(clone(kitti, tmp_path / "root"))
    text("calib_velo_to_cam.txt", lambda t: t.replace("R:", "S:"))(root)
    with pytest.raises(data.DataError, match="kitti/2011_09_26_drive_0009_sync/0000000000: .*calib_velo_to_cam.txt has no line R"):
        data.Kitti(root).load(0)


def test_kitti_batches_do_not_depend_on_workers_and_prepared_files_do_not_clash(kitti, new_cache):
    one, two = (take(data.loader(kitti, "train", 2, preset="small", workers=workers, augment=jiggle, prepare=Heights()).begin_at(1), 2) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert_same(a, b)
    assert {path.name for path in new_cache.rglob("*.npz")} == {"kitti_training_000000.npz", "kitti_training_000003.npz"}


# ---- the doctor ----

def test_the_doctor_finds_nothing_wrong(world, kitti, capsys):
    assert data.doctor(str(world)) == [] and data.doctor(str(kitti)) == [] and data.doctor(str(raw_root(kitti)), True) == []
    said = capsys.readouterr().out
    assert "CAM_BACK_LEFT" in said and "image_2" in said and "boxes hold the number of LiDAR points" in said and "3 of 3 unoccluded cars" in said


def test_the_doctor_finds_nothing_wrong_with_real_nuscenes(nuscenes_root, capsys):
    assert data.doctor(str(nuscenes_root)) == []
    assert "724 of 724 boxes" in capsys.readouterr().out or not (nuscenes_root.parent / "golden_counts.json").exists()


def test_the_doctor_finds_nothing_wrong_with_real_kitti(kitti_root):
    assert data.doctor(str(kitti_root)) == [] and data.doctor(str(raw_root(kitti_root))) == []


def calibrated(root, channel):
    """Token of the sensor of that channel."""
    return next(row["token"] for row in json.loads(next(root.glob("v1.0-*/sensor.json")).read_text()) if row["channel"] == channel)


def recalibrate(channel, **change):
    """Change every calibrated_sensor row of a channel; a value may be a function of the old one."""
    def breaks(root):
        token = calibrated(root, channel)
        edit(root, "calibrated_sensor", lambda rows: [row.update({k: v(row[k]) if callable(v) else v for k, v in change.items()})
                                                      for row in rows if row["sensor_token"] == token] and None)
    return breaks


def exchange(root):
    front, back, names = calibrated(root, "CAM_FRONT"), calibrated(root, "CAM_BACK"), {}
    names.update({front: back, back: front})
    edit(root, "calibrated_sensor", lambda rows: [row.update(sensor_token=names.get(row["sensor_token"], row["sensor_token"])) for row in rows] and None)


def black(root):
    for file in (root / "samples/CAM_BACK_LEFT").iterdir():
        Image.fromarray(np.zeros((96, 256, 3), np.uint8)).save(root / "black.jpg")
        assert Image.open(file).size == (256, 96)
        put(file, (root / "black.jpg").read_bytes())


def flat_intensity(root):
    file = key_file(root, "LIDAR_TOP")
    points = np.fromfile(file, np.float32).reshape(-1, 5)
    points[:, 3] = 7
    put(file, points.tobytes())


def few_points(root):
    file = key_file(root, "LIDAR_TOP")
    put(file, np.fromfile(file, np.float32)[:1000].tobytes())


def swap_sides(rows):
    for row in rows:
        row["size"] = [row["size"][1], row["size"][0], row["size"][2]]


def times(factor):
    return lambda K: [[K[0][0] * factor, K[0][1], K[0][2]], [K[1][0], K[1][1] * factor, K[1][2]], K[2]]


SICK = {        # what is done to a copy, and what one of the doctor's lines must say
    "truncated sweep": (cut("samples/LIDAR_TOP/*", -7), ["nuscenes/", "LIDAR_TOP", "N x 20", "extract"]),
    "truncated picture": (cut("samples/CAM_FRONT/*", 900), ["nuscenes/", "CAM_FRONT", "not a whole", "extract"]),
    "missing picture": (lambda r: key_file(r, "CAM_FRONT").unlink(), ["nuscenes/", "CAM_FRONT", "missing", "extract"]),
    "wrong size": (resized, ["nuscenes/", "CAM_BACK", "50 x 40", "extract"]),
    "missing table": (lambda r: next(r.glob("v1.0-*/ego_pose.json")).unlink(), ["ego_pose.json", "missing", "extract"]),
    "dangling token": (no_row("instance"), ["sample_annotation.json", "instance_token", "instance.json"]),
    "two cameras exchanged": (exchange, ["CAM_FRONT: it looks", "expected 0 +- 30", "calibrated_sensor.json"]),
    "a camera turned up": (recalibrate("CAM_BACK", rotation=[1, 0, 0, 0]), ["CAM_BACK: ", "degrees from down", "calibrated_sensor.json"]),
    "a camera far away": (recalibrate("CAM_FRONT_LEFT", translation=[1, 40, 1]), ["CAM_FRONT_LEFT: it stands", "less than 5 m", "calibrated_sensor.json"]),
    "a long lens": (recalibrate("CAM_FRONT", camera_intrinsic=times(20)), ["CAM_FRONT: its focal length", "0.25 to 4"]),
    "a mirrored camera": (recalibrate("CAM_FRONT", camera_intrinsic=lambda K: [[-K[0][0], *K[0][1:]], K[1], K[2]]), ["CAM_FRONT: it is mirrored"]),
    "a LiDAR not turned": (recalibrate("LIDAR_TOP", rotation=[1, 0, 0, 0]), ["it looks", "calibrated_sensor.json"]),
    "no picture of anything": (recalibrate("CAM_BACK", camera_intrinsic=lambda K: [[0, 0, 0]] * 3), ["CAM_BACK: its projection matrix is singular"]),
    "black pictures": (black, ["CAM_BACK_LEFT: the picture has one colour", "extract"]),
    "one intensity": (flat_intensity, ["nuscenes/", "intensity", "extract"]),
    "few points": (few_points, ["nuscenes/", "points in the key sweep", "thousands"]),
    "width and length": (table("sample_annotation", swap_sides), ["boxes hold the number", "sample_annotation.json", "at least 90 %"]),
    "boxes elsewhere": (table("sample_annotation", lambda rows: [row["translation"].reverse() for row in rows] and None), ["boxes hold the number"]),
}
SICK_KITTI = {
    **{case: BROKEN_KITTI[case] for case in ("truncated scan", "missing picture", "truncated picture", "no P2", "fourteen columns", "a frame in two splits")},
    "l, w, h": (lambda r: [text(f"training/label_2/{f.name}", lambda t: t.replace("1.5 1.6 4.2", "4.2 1.6 1.5"))(r) for f in (r / "training/label_2").iterdir()],
                ["unoccluded cars", "at least 90 %"]),
    "axes of the LiDAR": (text("training/calib/*", lambda t: t[:t.index("Tr_velo")] + "Tr_velo_to_cam: 1 0 0 0 0 1 0 0 0 0 1 0\n"), ["image_2: ", "calib/000000.txt"]),
}


@pytest.mark.parametrize("case", [*SICK, *(f"kitti: {case}" for case in SICK_KITTI)])
def test_the_doctor_names_the_culprit(world, kitti, tmp_path, case, monkeypatch, capsys):
    on_kitti = case.startswith("kitti: ")
    breaks, message = SICK_KITTI[case[7:]] if on_kitti else SICK[case]
    root = clone(kitti if on_kitti else Path(world), tmp_path / "root")
    breaks(root)
    monkeypatch.setattr("sys.argv", ["data.py", str(root)])
    with pytest.raises(SystemExit) as left:
        data.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert left.value.code == 1 and any(all(fragment in line for fragment in message) for line in lines), lines
