"""Tests of data.py.

Readers and matrices against the official devkit, closed forms and counts made by another script;
the loader; splits and versions; the cached index; broken folders; the doctor.
"""
import importlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import cv2
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
    version = data.find_version(Path(nuscenes_root), None)
    return nuscenes.NuScenes(version=version, dataroot=str(nuscenes_root), verbose=False)


def project(xyz, lidar2img):
    """(N, 3), (4, 4) -> (N, 3): u, v, depth."""
    uvd = np.c_[xyz, np.ones(len(xyz))] @ lidar2img.astype(np.float64).T
    return np.c_[uvd[:, :2] / uvd[:, 2:3], uvd[:, 2]]


def inside(xyz, box):
    """Mask of the points in a box: into the box's own axes, compare with half its size."""
    c = math.cos(box[6])
    s = math.sin(box[6])
    local = (xyz - box[:3]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return (abs(local) <= np.asarray(box[3:6]) / 2).all(1)


def to_world(points, pose):
    """(N, 3 or more) in a frame whose pose is (4, 4) -> (N, 3) float64 in the world."""
    return points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]


def names_of(dataset, indices):
    return [dataset.name(i) for i in indices]


# ---- the real frames -----------------------------------------------------------------

def test_points_in_each_camera_match_an_independent_count(nuscenes_root):
    path = Path(nuscenes_root).parent / "golden_counts.json"
    if not path.exists():
        pytest.skip(f"no {path}: NUSCENES is not the small set of frames that was counted")
    golden = json.loads(path.read_text())["nuscenes"]
    dataset = data.NuScenes(nuscenes_root, "small")
    assert len(dataset) == len(golden) == 10
    for i, name in enumerate(dataset.names):
        counted = golden[name.split("/")[2]]
        frame = dataset.load(i, (900, 1600))
        points = dataset.sweep(i)
        assert len(points) == counted["points"]
        for camera, lidar2img in zip(dataset.grid.cameras, frame.lidar2img):
            # the bonnet's points that a camera sees are not in the frame
            for xyz, allowed in ((points, 2), (frame.points, 100)):
                u, v, d = project(xyz[:, :3], lidar2img).T
                n = ((d > 1) & (u > 1) & (u < 1599) & (v > 1) & (v < 899)).sum()
                assert abs(n - counted["in_image"][camera]) <= allowed, (name, camera, n)


def test_boxes_hold_the_points_that_the_annotators_counted(nuscenes_root):
    dataset = data.NuScenes(nuscenes_root, "small")
    boxes = 0
    for i in range(min(10, len(dataset))):
        frame = dataset.load(i, (90, 160))
        rows = dataset.annotations(i)
        # what is taken off as the ego vehicle is in no box
        for points in (dataset.sweep(i), frame.points):
            world = to_world(points, frame.lidar2world)
            counts = [inside(world, row["box"]).sum() for row in rows]
            assert counts == rows["lidar_points"].tolist()
        boxes += len(rows)
        assert len(frame.boxes) == (rows["label"] >= 0).sum() > 0
    assert boxes == 724 or not (Path(nuscenes_root).parent / "golden_counts.json").exists()


def test_projection_matches_the_devkit(nuscenes_root, devkit):
    from nuscenes.nuscenes import NuScenesExplorer
    dataset = data.NuScenes(nuscenes_root, "small")
    for i in (0, 5):
        frame = dataset.load(i, (900, 1600))
        points = dataset.sweep(i)
        sample = devkit.get("sample", frame.name.split("/")[2])["data"]
        for camera, lidar2img, image in zip(dataset.grid.cameras, frame.lidar2img, frame.images):
            uv, depth, picture = NuScenesExplorer(devkit).map_pointcloud_to_image(
                sample["LIDAR_TOP"], sample[camera])
            ours = project(points[:, :3], lidar2img)
            in_image = (ours[:, :2] > 1).all(1) & (ours[:, :2] < (1599, 899)).all(1)
            ours = ours[(ours[:, 2] > 1) & in_image]
            assert abs(ours[:, :2] - uv[:2].T).max() < 0.1  # px
            assert abs(ours[:, 2] - depth).max() < 1e-3  # m
            # full size is not resampled
            assert (image.transpose(1, 2, 0) == np.asarray(picture)).all()


def test_boxes_and_velocities_match_the_devkit(nuscenes_root, devkit):
    from nuscenes.eval.detection.utils import category_to_detection_name
    dataset = data.NuScenes(nuscenes_root, "small")
    for i in (0, 4, 9):
        frame = dataset.load(i, (90, 160))
        rows = dataset.annotations(i)
        for row in rows:
            velocity = devkit.box_velocity(row["token"].decode())[:2]
            np.testing.assert_allclose(row["box"][7:9], velocity, atol=1e-5)
            name = category_to_detection_name(row["category"].decode())
            assert row["label"] == (-1 if name is None else dataset.grid.classes.index(name))
        sweep = devkit.get("sample", frame.name.split("/")[2])["data"]["LIDAR_TOP"]
        official = {box.token: box for box in devkit.get_sample_data(sweep)[1]}
        rows = rows[rows["label"] >= 0]
        assert (frame.labels == rows["label"]).all()
        for ours, row in zip(frame.boxes, rows):
            box = official[row["token"].decode()]
            x, y, z = box.center  # the devkit's LiDAR axes: x right, y forward
            width, length, height = box.wlh
            np.testing.assert_allclose(ours[:6], [y, -x, z, length, width, height], atol=1e-4)
            heading = box.orientation.rotation_matrix[[1, 0], 0] * (1, -1)
            heading /= np.hypot(*heading)
            np.testing.assert_allclose([math.cos(ours[6]), math.sin(ours[6])], heading, atol=1e-4)
            # over ground, in our axes
            speed = (devkit.box_velocity(box.token) * [1, 1, 0]) @ frame.lidar2world[:3, :2]
            np.testing.assert_allclose(ours[7:9], speed, atol=1e-4)


def test_box_centres_return_to_their_places_in_the_world(nuscenes_root):
    """Sent through the frame's pose, they are the translations on disk: one world for all."""
    table = json.loads(next(Path(nuscenes_root).glob("v1.0-*/sample_annotation.json")).read_text())
    place = {row["token"]: row["translation"] for row in table}
    dataset = data.NuScenes(nuscenes_root, "small")
    for i in range(min(10, len(dataset))):
        frame = dataset.load(i, (90, 160))
        rows = dataset.annotations(i)
        tokens = [row["token"].decode() for row in rows if row["label"] >= 0]
        world = frame.boxes[:, :3] @ frame.lidar2world[:3, :3].T + frame.lidar2world[:3, 3]
        np.testing.assert_allclose(world, [place[token] for token in tokens], atol=1e-3)


def test_older_sweeps_lie_where_the_devkit_puts_them(nuscenes_root, devkit):
    from nuscenes.utils.data_classes import LidarPointCloud
    from scipy.spatial import cKDTree
    i = 4
    frame = data.NuScenes(nuscenes_root, "paper").load(i, (90, 160))
    key_only = data.NuScenes(nuscenes_root, "small").load(i, (90, 160))
    sample = devkit.get("sample", frame.name.split("/")[2])
    cloud, lag = LidarPointCloud.from_file_multisweep(
        devkit, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=10)
    x, y, z, intensity = cloud.points
    official = np.c_[y, -x, z, intensity / 255, lag[0]]
    lags = np.unique(frame.points[:, 4])
    assert lags[0] == 0 and len(lags) == len(np.unique(lag)) > 1
    assert (np.diff(frame.points[:, 4]) >= 0).all()
    assert (frame.points[frame.points[:, 4] == 0] == key_only.points).all()
    for age in lags:
        ours = frame.points[frame.points[:, 4] == age]
        reference = official[abs(official[:, 4] - age) < 1e-4]
        distance, row = cKDTree(reference[:, :4]).query(ours[:, :4])
        # the same points in the same order, but for a little more of the car
        assert distance.max() < 2e-4 and (np.diff(row) > 0).all()
        assert 0 <= len(reference) - len(ours) < 400


def test_older_sweeps_stand_where_they_were_in_the_world(world):
    """The embedded world's sweeps are its keyframes.

    Each, read by itself, is a part of the merged cloud, of its age, in the same places of the
    world.
    """
    merged = data.NuScenes(world, "paper")
    single = data.NuScenes(world, "small")
    frame = merged.load(2, (12, 32))
    begin = 0
    for i in (2, 1, 0):
        other = single.load(i, (12, 32))
        points = frame.points[begin:begin + len(other.points)]
        begin += len(other.points)
        np.testing.assert_allclose(to_world(points, frame.lidar2world),
                                   to_world(other.points, other.lidar2world), atol=1e-3)
        np.testing.assert_allclose(points[:, 4], frame.time - other.time, atol=1e-5)
        np.testing.assert_array_equal(points[:, 3], other.points[:, 3])
    assert begin == len(frame.points) and frame.time - other.time == pytest.approx(1, abs=0.01)
    assert np.linalg.norm(frame.lidar2world[:3, 3] - other.lidar2world[:3, 3]) > 0.5


# ---- copies that may be broken -------------------------------------------------------

def clone(root, to):
    """A copy whose files may be replaced.

    They are hard links where the disk allows it, so never write into them.
    """
    for folder, _, names in os.walk(root):
        target = to / os.path.relpath(folder, root)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            source = os.path.join(folder, name)
            try:
                os.link(source, target / name)
            except OSError:
                shutil.copyfile(source, target / name)
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


def first_file(root, pattern):
    return sorted(root.glob(pattern))[0]


def key_file(root, channel):
    return first_file(root, f"samples/{channel}/*")


# ---- images and matrices -------------------------------------------------------------

@pytest.fixture(scope="module")
def ramps(world, tmp_path_factory):
    """The world with 900 x 1600 images whose red is the column and green the row."""
    root = clone(Path(world), tmp_path_factory.mktemp("ramps"))
    u, v = np.meshgrid((np.arange(1600) + .5) / 1600, (np.arange(900) + .5) / 900)
    ramp = (np.stack([u, v, 0 * u], 2) * 255).round().astype(np.uint8)
    Image.fromarray(ramp).save(root / "ramp.jpg", quality=98, subsampling=0)
    for jpg in root.glob("samples/CAM_*/*.jpg"):
        put(jpg, (root / "ramp.jpg").read_bytes())

    def enlarge(rows):
        for row in rows:
            if row["fileformat"] == "jpg":
                row.update(height=900, width=1600)
    edit(root, "sample_data", enlarge)
    return root


@pytest.mark.parametrize("size", [(256, 704), (96, 256), (224, 416), (100, 800), (900, 1600)])
def test_resize_and_crop_move_pixels_as_the_matrix_says(ramps, size):
    dataset = data.NuScenes(ramps, "small")
    frame = dataset.load(0, size)
    full = dataset.load(0, (900, 1600))
    v, u = np.mgrid[:size[0], :size[1]] + .5
    for image, lidar2img, full2img in zip(frame.images, frame.lidar2img, full.lidar2img):
        assert image.shape == (3, *size)
        # pixels here -> on disk
        matrix = np.linalg.inv(lidar2img.astype(np.float64) @ np.linalg.inv(full2img.astype(float)))
        expected = [matrix[0, 0] * u + matrix[0, 2], matrix[1, 1] * v + matrix[1, 2]]
        place = image[:2] / 255. * np.array([1600, 900])[:, None, None]
        # in pixels of this image; a grey level is 6 px on disk
        error = (place - np.stack(expected))[:, 4:-4, 4:-4] / matrix[0, 0]
        assert abs(error.mean((1, 2))).max() < 0.3
        assert abs(error).mean() < 0.5 + 3 / matrix[0, 0]


SIZES = [(256, 704), (96, 256), (224, 416), (100, 800), (900, 1600), (384, 1248), (80, 256)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ending, width, height",
                         [("jpg", 1600, 900), ("png", 1242, 375), ("jpg", 641, 389)])
def test_images_match_their_matrix_to_a_hundredth_of_a_pixel(tmp_path, ending, width, height,
                                                             size):
    """Waves across and down the image, a fit of their phase in the result."""
    u, v = np.meshgrid(np.arange(width) + .5, np.arange(height) + .5)
    wave = np.stack([np.cos(2 * np.pi * u / 100), np.cos(2 * np.pi * v / 100), 0 * u], 2)
    file = tmp_path / f"wave.{ending}"
    options = dict(quality=98, subsampling=0) if ending == "jpg" else {}
    Image.fromarray((127 + 100 * wave).round().astype(np.uint8)).save(file, **options)
    pixels, crop = data.read_image(file, size, "wave")
    assert pixels.shape == (3, *size) and pixels.dtype == np.uint8
    assert pixels[2].min() > 120 and pixels[2].max() < 134  # blue is blue
    assert abs(crop[0, 0] / crop[1, 1] - 1) < 0.01
    for axis, mean in ((0, pixels[0].mean(0)), (1, pixels[1].mean(1))):
        scale = crop[axis, axis]
        place = (np.arange(len(mean)) + .5 - crop[axis, 2]) / scale  # on disk
        phase = 2 * np.pi / 100 * place
        basis = np.stack([np.cos(phase), np.sin(phase), np.ones_like(phase)], 1)
        cos, sin, _ = np.linalg.lstsq(basis, mean, rcond=None)[0]
        assert abs(np.arctan2(sin, cos) * 100 / (2 * np.pi) * scale) < 0.01


# ---- the record and its augmentation -------------------------------------------------

TOY_BOXES = np.array([
    [10, 4, 0, 4, 2, 1.5, .4, 3, -1],
    [-8, 2, .5, 9, 3, 3, -2.8, np.nan, np.nan],
    [3, -15, -1, 1, .6, 1.8, 1.6, 0, 1],
], np.float32)


def toy_frame(rng, n=400):
    points = rng.random((n, 5)) * (1, 1, 1, 1, 0)
    box = TOY_BOXES[rng.integers(3, size=n)]
    local = (points[:, :3] - .5) * box[:, 3:6] * 1.4  # in and around the boxes
    cos = np.cos(box[:, 6])
    sin = np.sin(box[:, 6])
    points[:, 0] = box[:, 0] + local[:, 0] * cos - local[:, 1] * sin
    points[:, 1] = box[:, 1] + local[:, 0] * sin + local[:, 1] * cos
    points[:, 2] = box[:, 2] + local[:, 2]
    lidar2img = np.eye(4) + 0.1 * rng.normal(size=(2, 4, 4))
    lidar2img[:, 3] = 0, 0, 0, 1
    return data.Frame(
        points=points.astype(np.float32),
        origin=np.array([1, 0, 1.8], np.float32),
        images=[np.zeros((3, 8, 9), np.uint8)] * 2,
        lidar2img=lidar2img.astype(np.float32),
        lidar2world=np.eye(4),
        time=1.,
        boxes=TOY_BOXES.copy(),
        labels=np.array([0, 3, 8]),
        extra={"points_row": np.arange(n), "free": np.zeros((7, 2))},
        name="toy",
    )


def homogeneous(frame):
    """The points of a frame -> (N, 4)."""
    return np.c_[frame.points[:, :3], np.ones(len(frame.points))]


TURN = np.eye(4)
TURN[:2, :2] = [[math.cos(.7), -math.sin(.7)], [math.sin(.7), math.cos(.7)]]
MIRROR = np.diag([1., -1, 1, 1])
SCALE = np.diag([1.2, 1.2, 1.2, 1])
SHIFT = np.eye(4)
SHIFT[:3, 3] = 3, -2, .5
WARPS = {
    "turn": TURN,
    "mirror y": MIRROR,
    "mirror x": -MIRROR @ np.diag([1, 1, -1, -1]),
    "scale": SCALE,
    "shift": SHIFT,
    "all": SHIFT @ SCALE @ MIRROR @ TURN,
}


@pytest.mark.parametrize("name", WARPS)
def test_after_a_warp_points_keep_pixel_world_and_box(name):
    frame = toy_frame(np.random.default_rng(0))
    a2b = WARPS[name]
    warped = data.warp_frame(frame, a2b)
    moved = frame.points[:, :3] @ a2b[:3, :3].T + a2b[:3, 3]
    np.testing.assert_allclose(warped.points[:, :3], moved, rtol=1e-5, atol=1e-5)
    assert (warped.points[:, 3:] == frame.points[:, 3:]).all()
    assert (warped.extra["points_row"] == frame.extra["points_row"]).all()
    old = homogeneous(frame)
    new = homogeneous(warped)
    for before, after in zip(frame.lidar2img, warped.lidar2img):
        # u d, v d, d: depth stays true though the cloud is scaled
        np.testing.assert_allclose(new @ after.T, old @ before.T, atol=1e-4)
    np.testing.assert_allclose(new @ warped.lidar2world.T, old, atol=1e-4)
    np.testing.assert_allclose(warped.origin, a2b[:3, :3] @ frame.origin + a2b[:3, 3], rtol=1e-6)
    for before, after in zip(frame.boxes.astype(float), warped.boxes.astype(float)):
        was_inside = inside(frame.points[:, :3], before)
        assert was_inside.sum() > 10
        smaller = before * [1, 1, 1, .999, .999, .999, 1, 1, 1]
        clear = inside(frame.points[:, :3], smaller) == was_inside  # not on a face
        assert (inside(warped.points[:, :3], after) == was_inside)[clear].all()
        # the box a second later
        later = a2b[:2, :3] @ (before[:3] + [*before[7:9], 0]) + a2b[:2, 3]
        np.testing.assert_allclose(after[:2] + after[7:9], later, atol=1e-4)


def test_a_warp_that_boxes_cannot_follow_is_refused():
    uneven = np.diag([1., 2, 1, 1])
    flat = np.diag([0., 0, 0, 1])
    shear = np.eye(4) + np.eye(4, k=1)
    for a2b in (uneven, flat, np.eye(4) * np.nan, shear):
        with pytest.raises(ValueError, match="no rotation or reflection"):
            data.warp_frame(toy_frame(np.random.default_rng(0)), a2b)


def test_augment_cloud_keeps_pixels_and_covers_the_stated_ranges():
    frame = toy_frame(np.random.default_rng(0))
    drawn = []
    for seed in range(200):
        warped = data.augment_cloud(frame, np.random.default_rng(seed), 0.5, 0.1, flip=True)
        np.testing.assert_allclose(homogeneous(warped) @ warped.lidar2img[0].T,
                                   homogeneous(frame) @ frame.lidar2img[0].T, atol=1e-4)
        linear = np.linalg.inv(warped.lidar2world)[:3, :3]
        size = np.cbrt(abs(np.linalg.det(linear)))
        flip_x = np.sign(linear[0, 0])  # |turn| < 90 degrees
        flip_y = np.sign(linear[1, 1])
        turn = math.atan2(linear[1, 0] * flip_y, linear[0, 0] * flip_x)
        drawn.append((size, turn, flip_x, flip_y))
        again = data.augment_cloud(frame, np.random.default_rng(seed), 0.5, 0.1, flip=True)
        assert (again.points == warped.points).all()
    still = data.augment_cloud(frame, np.random.default_rng(0), 0, 0, flip=False)
    np.testing.assert_allclose(still.points, frame.points, atol=1e-6)
    size, turn, flip_x, flip_y = np.array(drawn).T
    assert 0.9 <= size.min() < 0.92 and 1.08 < size.max() <= 1.1
    assert -0.5 <= turn.min() < -0.45 and 0.45 < turn.max() <= 0.5
    counts = [((flip_x == a) & (flip_y == b)).sum() for a in (-1, 1) for b in (-1, 1)]
    assert min(counts) > 25, counts  # 50 expected of each


def test_only_y_is_mirrored_on_kitti_which_looks_forward():
    frame = toy_frame(np.random.default_rng(0))
    for seed in range(40):
        both = data.augment_cloud(frame, np.random.default_rng(seed), 0.5, 0.1, (True, True))
        one = data.augment_cloud(frame, np.random.default_rng(seed), 0.5, 0.1,
                                 data.GRIDS["kitti", "paper"].mirrors)
        linear = np.linalg.inv(one.lidar2world)[:3, :3]
        assert linear[0, 0] > 0
        np.testing.assert_allclose(abs(both.points[:, 0]), abs(one.points[:, 0]), atol=1e-6)
        np.testing.assert_array_equal(both.points[:, 1], one.points[:, 1])
    assert data.GRIDS["kitti", "small"].mirrors == (False, True)
    assert data.GRIDS["nuscenes", "paper"].mirrors == (True, True)


def test_select_takes_the_points_extras_along():
    frame = toy_frame(np.random.default_rng(0))
    keep = frame.points[:, 0] > 0
    some = data.select(frame, keep)
    assert (some.points == frame.points[keep]).all()
    assert (some.extra["points_row"] == np.flatnonzero(keep)).all()
    assert len(some.extra["free"]) == 7
    assert (data.select(frame, [5, 2]).extra["points_row"] == [5, 2]).all()


def test_frame_refuses_wrong_shapes_and_types():
    frame = toy_frame(np.random.default_rng(0))
    points_message = r"points is float32 \(400, 4\), expected float32 \(400, 5\)"
    for change, message in [
        (dict(points=frame.points[:, :4]), points_message),
        (dict(lidar2img=frame.lidar2img[:1]), "lidar2img"),
        (dict(lidar2world=np.eye(4, dtype=np.float32)), "lidar2world"),
        (dict(boxes=frame.boxes.astype(float)), "boxes"),
        (dict(labels=None), "labels"),
        (dict(images=[np.zeros((8, 9, 3), np.uint8)] * 2), "image 0"),
        (dict(extra={"points_x": np.zeros(3)}), "points_x"),
    ]:
        with pytest.raises(ValueError, match=f"^toy: .*{message}"):
            replace(frame, **change)


def test_collate_states_sizes_pads_images_and_joins_extras():
    rng = np.random.default_rng(0)
    first = toy_frame(rng)
    empty = data.select(toy_frame(rng), np.zeros(400, bool))
    last = replace(toy_frame(rng, 10), images=[np.full((3, 4, 12), 7, np.uint8)] * 2)
    batch = data.collate([first, empty, last], [1, 2, 3])
    assert batch.size == 3 and batch.cameras == 2
    assert batch.names == ["toy"] * 3 and batch.seeds.tolist() == [1, 2, 3]
    assert torch.bincount(batch.b_points, minlength=3).tolist() == [400, 0, 10]
    assert torch.bincount(batch.b_boxes).tolist() == [3, 3, 3]
    assert batch.images.shape == (6, 3, 8, 12)
    assert batch.hw.tolist() == [[8, 9]] * 4 + [[4, 12]] * 2
    assert (batch.images[4:, :, :4] == 7).all()
    assert batch.images[:4].sum() == 0 == batch.images[4:, :, 4:].sum()
    assert len(batch.extra["points_row"]) == 410 and "b_points_row" not in batch.extra
    assert batch.extra["b_free"].tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert batch.lidar2world.dtype == batch.time.dtype == torch.float64
    moved = batch.to("meta")
    on_host = {field.name for field in fields(data.Batch)
               if isinstance(getattr(moved, field.name), torch.Tensor)
               and getattr(moved, field.name).device.type == "cpu"}
    assert on_host == {"lidar2world", "time", "seeds"}
    assert all(tensor.device.type == "meta" for tensor in moved.extra.values())
    assert moved.size == 3 and torch.equal(moved.seeds, batch.seeds)


def test_crops_are_those_of_the_whole_picture():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 60, 3), np.uint8)
    image = np.ascontiguousarray(picture.transpose(2, 0, 1))
    frame = replace(toy_frame(rng), images=[image] * 2)
    boxes = [(3, 7, 30, 41), (0, 0, 40, 60)]
    for H, W in ((12, 20), (50, 70)):  # averaged, interpolated
        crops = data.crop_images(frame, boxes, [(H, W)] * 2, [False, True])
        method = cv2.INTER_AREA if H == 12 else cv2.INTER_LINEAR
        for (top, left, h, w), mirror, crop in zip(boxes, (False, True), crops.images):
            part = np.ascontiguousarray(picture[top:top + h, left:left + w])
            expected = cv2.resize(part, (W, H), interpolation=method)
            expected = expected[:, ::-1] if mirror else expected
            assert np.array_equal(crop, expected.transpose(2, 0, 1))


# ---- loader --------------------------------------------------------------------------

def assert_same(a, b):
    for field in fields(data.Batch):
        name = field.name
        x = getattr(a, name)
        y = getattr(b, name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True,
                                       msg=f"{name} differs")
        elif isinstance(x, dict):
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
        else:
            assert x == y, name


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def jiggle(frame, rng):
    return data.augment_cloud(frame, rng, 1., .1, flip=True)


class Heights:
    """A prepare: height and range of each point in the unaugmented frame, and a free table.

    It counts its calls in this process.
    """
    key = "heights-v1"
    calls = 0

    def __call__(self, frame):
        type(self).calls += 1
        distance = torch.tensor(np.hypot(*frame.points[:, :2].T))
        return {"points_z": frame.points[:, 2].copy(), "points_xy": distance,
                "cells": np.arange(6).reshape(3, 2)}


def test_batches_do_not_depend_on_workers(world, new_cache):
    def make(workers):
        return data.loader(world, "train", 2, seed=3, preset="small", workers=workers,
                           augment=jiggle, prepare=Heights())
    for a, b in zip(take(make(0).begin_at(1), 3), take(make(2).begin_at(1), 3)):
        assert_same(a, b)
    for a, b in zip(make(0).once(), make(2).once(), strict=True):
        assert_same(a, b)


def test_kept_batches_are_the_same_and_not_in_shared_memory(world):
    def shared(batch):
        flags = []
        batch.map(lambda tensor: flags.append(tensor.is_shared()) or tensor)
        return flags

    def make(workers):
        return data.loader(world, "val", 2, preset="small", image=(12, 32), workers=workers,
                           augment=jiggle)
    assert all(shared(next(make(1).once())))
    batches = {workers: (make(workers).first(3), data.keep(make(workers).once()))
               for workers in (0, 2)}
    for alone, by_workers in zip(*batches.values()):
        assert not any(any(shared(batch)) for batch in by_workers)
        for a, b in zip(alone, by_workers, strict=True):
            assert_same(a, b)
    assert len(batches[0][0]) == 3
    for a, b in zip(batches[0][0], take(make(0).begin_at(0), 3), strict=True):
        assert_same(a, b)


def test_batches_for_a_gpu_are_pinned_without_workers_too(world, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    loader = data.loader(world, "train", 1, preset="small", image=(12, 32))
    plain = next(loader.once())
    assert not pinned
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert_same(next(loader.once()), plain)
    assert len(pinned) == 9  # of 12: not lidar2world, time, seeds


@pytest.mark.parametrize("script", ["clap", "cmcr", "simipu", "finetune"])
def test_val_frames_are_loaded_by_workers_too(script):
    source = Path(data.__file__).with_name(f"{script}.py").read_text()
    calls = re.findall(r"data\.loader\(.*?\)\n", source, re.S)
    assert len(calls) == 3 if script == "finetune" else 2
    assert all(re.search(r"workers=(cfg|trained)\.workers", call) for call in calls)


def test_batches_do_not_depend_on_the_number_of_ranks(world):
    whole = data.loader(world, "train", 2, preset="small", augment=jiggle)
    halves = [data.loader(world, "train", 1, rank, 2, preset="small", augment=jiggle)
              for rank in (0, 1)]
    assert whole.steps_per_epoch == halves[0].steps_per_epoch
    batches = [take(half.begin_at(0), 3) for half in halves]
    for step, joined in enumerate(take(whole.begin_at(0), 3)):
        parts = [batches[0][step], batches[1][step]]
        assert joined.names == parts[0].names + parts[1].names
        for name in ("points", "images", "lidar2img", "boxes", "seeds", "lidar2world"):
            both = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(getattr(joined, name), both, rtol=0, atol=0,
                                       equal_nan=True)


def test_the_batches_of_a_step_are_the_frames_of_one_larger_batch(world):
    for rank in (0, 1):
        whole = data.loader(world, "train", 2, rank, 2, preset="small")
        parts = data.loader(world, "train", 1, rank, 2, preset="small", accumulate=2)
        assert parts.steps_per_epoch == whole.steps_per_epoch
        for first in (0, 1):  # from the start, and resumed
            batches = take(parts.begin_at(first), 4)
            for n, joined in enumerate(take(whole.begin_at(first), 2)):
                assert batches[2 * n].names + batches[2 * n + 1].names == joined.names
                both = torch.cat([batches[2 * n].seeds, batches[2 * n + 1].seeds])
                assert torch.equal(both, joined.seeds)


def test_begin_at_equals_skipping_batches(world):
    loader = data.loader(world, "train", 1, preset="small", augment=jiggle)
    start = loader.steps_per_epoch - 1  # across the end of an epoch
    skipped = take(loader.begin_at(0), start + 3)[start:]
    for a, b in zip(skipped, take(loader.begin_at(start), 3)):
        assert_same(a, b)


def test_epochs_permute_and_seeds_change(world):
    loader = data.loader(world, "train", 1, preset="small")
    n = loader.steps_per_epoch
    batches = take(loader.begin_at(0), 2 * n)
    names = [batch.names[0] for batch in batches]
    split = sorted(names_of(loader.dataset, loader.indices))
    assert sorted(names[:n]) == sorted(names[n:]) == split and names[:n] != names[n:]
    assert len({batch.seeds.item() for batch in batches}) == 2 * n
    other = data.loader(world, "train", 1, seed=1, preset="small")
    assert [batch.names[0] for batch in take(other.begin_at(0), n)] != names[:n]
    a = data.loader(world, "train", 1, preset="small", augment=jiggle)
    b = data.loader(world, "train", 1, preset="small", augment=jiggle)
    assert_same(next(a.begin_at(0)), next(b.begin_at(0)))


def test_a_split_smaller_than_the_batch_goes_through_several_epochs_a_step(world):
    loader = data.loader(world, "val", 64, preset="small", augment=jiggle)
    n = len(loader.indices)
    assert n < 64 and loader.steps_per_epoch == 1
    batch = next(loader.begin_at(0))
    assert len(batch.names) == 64
    split = set(names_of(loader.dataset, loader.indices))
    assert all(set(batch.names[k:k + n]) == split for k in range(0, 64 - n, n))
    same = [k for k, name in enumerate(batch.names) if name == batch.names[0]]
    first_x = {float(batch.points[batch.b_points == k][0, 0]) for k in same}
    seeds = {int(batch.seeds[k]) for k in same}
    assert len(first_x) == len(same) == len(seeds) > 2  # turned differently
    names = []
    for rank in (0, 1):
        half = data.loader(world, "val", 32, rank, 2, preset="small")
        names += next(half.begin_at(0)).names
    assert names == batch.names


def test_a_cache_that_cannot_be_written_costs_only_time(world, new_cache):
    first = next(data.loader(world, "train", 1, preset="small", prepare=Heights()).once())
    shutil.rmtree(new_cache / "prepared")
    (new_cache / "prepared").write_text("in the way")
    loader = data.loader(world, "train", 1, preset="small", prepare=Heights())
    with pytest.warns(UserWarning, match="prepared.*cannot be written.*LIDAR_CAMERA_CACHE"):
        assert_same(next(loader.once()), first)


def test_once_covers_each_frame_once(world):
    for count in (1, 2, 3):
        loaders = [data.loader(world, "train", 2, rank, count, preset="small", augment=jiggle)
                   for rank in range(count)]
        names = [name for loader in loaders for batch in loader.once() for name in batch.names]
        assert sorted(names) == sorted(names_of(loaders[0].dataset, loaders[0].indices))
    batch = next(loaders[0].once())
    plain = [loaders[0].dataset.load(i).points for i in loaders[0].indices[[0, 3]]]
    assert (batch.points.numpy() == np.concatenate(plain)).all()  # not augmented


def prepared_batches(root):
    loader = data.loader(root, "train", 1, preset="small", augment=jiggle, prepare=Heights())
    return take(loader.begin_at(0), 2)


def test_prepare_is_computed_once_and_follows_augmentation(world, new_cache):
    Heights.calls = 0
    first = prepared_batches(world)
    assert Heights.calls == 2
    for a, b in zip(first, prepared_batches(world)):
        assert_same(a, b)
    assert Heights.calls == 2
    batch = first[0]
    scale = (batch.points[:, 2] / batch.extra["points_z"]).median()
    distance = batch.points[:, :2].norm(dim=1)
    torch.testing.assert_close(distance, batch.extra["points_xy"] * scale)  # row for row
    assert batch.extra["cells"].shape == (3, 2) and batch.extra["b_cells"].tolist() == [0, 0, 0]


def test_damaged_prepared_files_are_computed_again(world, new_cache):
    Heights.calls = 0
    first = prepared_batches(world)
    assert Heights.calls == 2
    files = sorted(new_cache.glob("prepared/*/heights-v1/*.npz"))
    assert len(files) == 2 and not list(new_cache.glob("prepared/**/*.part"))
    whole = files[0].read_bytes()
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\1\2") + 8] ^= 1  # a flag of the first entry
    for k, damaged in enumerate([
        whole[:len(whole) // 2],
        b"",
        b"garbage" * 99,
        whole[:-1],
        whole[:300] + b"\0" * 50 + whole[350:],
        bytes(encrypted),
    ]):
        files[0].write_bytes(damaged)
        for a, b in zip(first, prepared_batches(world)):
            assert_same(a, b)
        assert Heights.calls == 3 + k
    assert files[0].read_bytes() == whole


def rewrite_prepared(file, change, comment=None):
    """Write a prepared file as change(arrays) leaves it, with its comment or another one."""
    with np.load(file) as stored:
        arrays = dict(stored)
        digest = stored.zip.comment
    change(arrays)
    np.savez_compressed(file, **arrays)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = digest if comment is None else comment


def set_array(name, change):
    def rewrite(arrays):
        arrays[name] = change(arrays[name])
    return rewrite


@pytest.mark.parametrize("change, reason", [
    (set_array("points_z", np.negative), "its digest is of other arrays"),
    (set_array("points_z", lambda z: z[:-5]), "its digest is of other arrays"),
    (set_array("points_z", np.float64), "its digest is of other arrays"),
    (lambda arrays: arrays.pop("cells"), "its digest is of other arrays"),
    (lambda arrays: arrays.pop("stamp"), "stamp"),
    (set_array("cells", lambda _: np.zeros(2 ** 28, np.int64)[:2 ** 21]), "unpacks to"),
])
def test_another_programs_prepared_file_is_computed_again(world, new_cache, monkeypatch, change,
                                                          reason):
    """It has the stamp of these points, and no bad checksum."""
    first = prepared_batches(world)
    file = sorted(new_cache.glob("prepared/*/heights-v1/*.npz"))[0]
    whole = file.read_bytes()
    rewrite_prepared(file, change)
    monkeypatch.setattr(data, "LARGEST_EXTRA", 2 ** 23)
    with pytest.warns(UserWarning, match=f"{file.name} cannot be used .*{reason}.* again"):
        batches = prepared_batches(world)
    for a, b in zip(first, batches):
        assert_same(a, b)
    assert file.read_bytes() == whole


def test_prepared_files_from_before_there_were_digests_are_read(world, new_cache):
    first = prepared_batches(world)
    for file in new_cache.glob("prepared/*/heights-v1/*.npz"):
        rewrite_prepared(file, lambda arrays: None, comment=b"")
    Heights.calls = 0
    for a, b in zip(first, prepared_batches(world)):
        assert_same(a, b)
    assert Heights.calls == 0
    rewrite_prepared(file, set_array("points_z", lambda z: z[:-5]), comment=b"")
    with pytest.warns(UserWarning, match="points_z has .* rows for .* points"):
        prepared_batches(world)
    assert Heights.calls == 1


def test_another_version_of_prepare_is_computed_again(world, new_cache, monkeypatch):
    Heights.calls = 0
    prepared_batches(world)
    assert Heights.calls == 2
    monkeypatch.setattr(Heights, "key", "heights-v2")
    prepared_batches(world)
    assert Heights.calls == 2 + 2
    monkeypatch.setattr(Heights, "key", "../escape")
    with pytest.raises(ValueError, match="names a folder"):
        prepared_batches(world)


def test_what_was_prepared_from_other_points_is_computed_again(kitti, new_cache, tmp_path):
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
    raise data.DataError(f"{frame.name}: failed on purpose")


def test_an_error_in_a_worker_arrives_with_its_message(world):
    loader = data.loader(world, "train", 1, preset="small", workers=1, augment=fail)
    with pytest.raises(data.DataError, match="nuscenes/.*failed on purpose"):
        next(loader.begin_at(0))


@pytest.mark.parametrize("wrong", [
    dict(batch=0), dict(batch=1, rank=2, world=2), dict(batch=1, workers=-1),
])
def test_loader_refuses_impossible_numbers(world, wrong):
    with pytest.raises(ValueError, match="expected 0 <= rank < world"):
        data.loader(world, "train", preset="small", **wrong)


def test_loader_refuses_crop_on_nuscenes(world):
    with pytest.raises(ValueError, match="nuScenes v1.0-embedded: crop is for KITTI"):
        data.loader(world, "train", 1, preset="small", crop=True)


def draw_once(frame, rng):
    return replace(frame, time=rng.random())


def test_random_streams_differ_by_seed_epoch_and_frame(world):
    drawn = set()
    seeds = set()
    count = 0
    for seed in (0, 1):
        loader = data.loader(world, "train", 1, seed=seed, preset="small", image=(12, 32),
                             augment=draw_once)
        for batch in take(loader.begin_at(0), 2 * loader.steps_per_epoch):
            drawn.add(float(batch.time))
            seeds.add(int(batch.seeds))
            count += 1
    assert len(drawn) == len(seeds) == count == 4 * len(loader.indices)


def test_no_step_has_a_frame_twice(world):
    # of six frames, two are left out of each epoch
    loader = data.loader(world, "train", 4, preset="small", image=(12, 32))
    assert loader.steps_per_epoch == 1
    assert all(len(set(batch.names)) == 4 for batch in take(loader.begin_at(0), 6))


# ---- splits and versions -------------------------------------------------------------

def test_the_worlds_own_splits(world):
    dataset = data.NuScenes(world, "small")
    lists = json.loads(next(Path(world).glob("v1.0-*/splits.json")).read_text())
    for split in ("train", "val"):
        scenes = {name.split("/")[1] for name in names_of(dataset, dataset.split(split))}
        assert scenes == set(lists[f"embedded_{split}"])
    with pytest.raises(data.DataError, match="no split 'minival'"):
        dataset.split("minival")
    with pytest.raises(data.DataError, match="none for test"):
        dataset.split("test")


def test_an_empty_split_makes_both_from_all_frames(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)

    def only_val(lists):
        return {"own_val": [scene for scenes in lists.values() for scene in scenes]}
    edit(root, "splits", only_val)
    dataset = data.NuScenes(root, "small")
    train = dataset.split("train")
    val = dataset.split("val")
    assert "cut in their order" in capsys.readouterr().out
    assert train.tolist() + val.tolist() == list(range(len(dataset)))
    assert len(train) == len(dataset) * 4 // 5
    times = [dataset.load(i, (9, 16)).time for i in range(len(dataset))]
    assert max(times[i] for i in train) < min(times[i] for i in val)


def test_own_lists_replace_the_official_ones_of_their_end(tmp_path):
    """In splits.json, where the devkit looks for them too."""
    from nuscenes.utils.splits import create_splits_scenes
    official = create_splits_scenes()
    folder = tmp_path / "v1.0-trainval"
    folder.mkdir()

    def scenes(split, **own):
        (folder / "splits.json").write_text(json.dumps(own))
        return sorted(scene for scene, end in data.official_splits(folder).items() if end == split)
    for split in ("train", "val", "test"):
        assert scenes(split) == sorted(official[split])
    few = official["train"][3:38]
    assert scenes("train", few_train=few) == sorted(few)
    assert scenes("val", few_train=few) == sorted(official["val"])
    assert scenes("train", few_train=few, my_val=official["train"][:3]) == sorted(few)
    assert scenes("val", few_train=few, my_val=["own"]) == ["own"]
    data.print_once.cache_clear()
    assert scenes("train", **{"nuscenes-5pct-a": few}) == sorted(official["train"])
    message = f"{official['val'][0]} is in train and in val.*official"
    with pytest.raises(data.DataError, match=message):
        scenes("train", few_train=official["val"][:1])


def test_a_list_that_no_split_takes_is_named(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    edit(root, "splits", lambda lists: lists | {"nuscenes-5pct-a": ["scene-0001"]})
    train = data.NuScenes(root, "small").split("train")
    assert len(train) == len(data.NuScenes(world, "small").split("train"))
    message = "nuscenes-5pct-a not used; only lists whose names end in train, val or test are"
    assert message in capsys.readouterr().out


def test_official_split_of_the_mini_version(nuscenes_root):
    dataset = data.NuScenes(nuscenes_root, "small")
    if dataset.version != "v1.0-mini":
        pytest.skip(f"NUSCENES holds {dataset.version}")
    split = dataset.frames["split"][dataset.frames["scene"] == b"scene-0916"]
    assert set(split) == {b"val"}  # it is in mini_val


def test_frames_without_any_file_are_left_out_and_counted(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    before = data.NuScenes(root, "small")
    absent = before.names[1]
    for row in before.frames["sensors"][1]:
        (root / before.sensors["file"][row].decode()).unlink()
    after = data.NuScenes(root, "small")
    assert after.names == [name for name in before.names if name != absent]
    assert len(after.load(1, (9, 16)).images) == 6
    assert f"1 of the {len(before)} frames" in capsys.readouterr().out
    data.print_once.cache_clear()
    data.NuScenes(root, "small")
    assert "left out" in capsys.readouterr().out  # known from the cached index too


@pytest.mark.parametrize("channel, message", [
    ("CAM_BACK", r"1 of the {n} frames of v1.0-embedded lack images \(CAM_BACK 1\); the first file "
                 "is samples/CAM_BACK/.*; these frames are left out.*--modality lidar reads none"),
    ("LIDAR_TOP", "1 of the {n} frames of v1.0-embedded have no keyframe sweep on disk")])
def test_a_frame_that_lacks_one_file_is_left_out_and_counted(world, tmp_path, capsys, channel,
                                                              message):
    root = clone(Path(world), tmp_path)
    before = data.NuScenes(root, "small")
    place = data.CHANNELS.index(channel)
    file = before.sensors["file"][before.frames["sensors"][1, place]].decode()
    (root / file).unlink()
    capsys.readouterr()
    after = data.NuScenes(root, "small")
    assert re.search(message.format(n=len(before)), capsys.readouterr().out)
    assert after.names == before.names[:1] + before.names[2:]
    assert pickle.loads(pickle.dumps(after)).names == after.names    # as a worker has it
    assert (after.load(1, (9, 16)).points == before.load(2, (9, 16)).points).all()
    assert data.doctor(str(root)) == []


def add_sweeps(root):
    """One sweep between each two keyframes, in the tables and on disk -> its files."""
    folder = next(root.glob("v1.0-*"))
    rows = json.loads((folder / "sample_data.json").read_text())
    ego = json.loads((folder / "ego_pose.json").read_text())
    pose = {row["token"]: row for row in ego}
    (root / "sweeps/LIDAR_TOP").mkdir(parents=True)
    files = []
    for key in [row for row in rows if "LIDAR_TOP" in row["filename"] and row["prev"]]:
        before = dict(key, token=f"s{key['token']}", ego_pose_token=f"s{key['token']}",
                      timestamp=key["timestamp"] - 50_000, is_key_frame=False,
                      filename=f"sweeps/LIDAR_TOP/{key['token']}.pcd.bin", next=key["token"])
        ego.append(dict(pose[key["ego_pose_token"]], token=before["token"]))
        shutil.copy(root / key["filename"], root / before["filename"])
        files.append(root / before["filename"])
        key["prev"] = before["token"]
        rows.append(before)
    edit(root, "sample_data", lambda _: rows)
    edit(root, "ego_pose", lambda _: ego)
    return files


def test_keyframes_without_sweeps_are_frames_of_one_sweep(world, tmp_path, capsys):
    """The official keyframe blobs: the paper preset runs, and says once what it lacks."""
    root = clone(Path(world), tmp_path)
    keyframes = [data.NuScenes(root, sweeps=1).load(i, (9, 16)).points for i in range(2)]
    add_sweeps(root)
    assert len(data.NuScenes(root).load(1, (9, 16)).points) > len(keyframes[1])
    shutil.rmtree(root / "sweeps")
    capsys.readouterr()
    assert data.doctor(str(root)) == []
    output = capsys.readouterr().out
    message = "no sweep but the keyframes' is on disk: each frame has that one alone, not up to 10"
    assert output.count(message) == output.count("sweeps/") == 1
    # of a scene's second frame the keyframe before it is one of ten: it is there
    dataset = data.NuScenes(root)
    assert (dataset.load(0, (9, 16)).points == keyframes[0]).all()
    data.print_once.cache_clear()
    data.NuScenes(root, "small")
    data.NuScenes(root, sweeps=1)
    assert "sweep" not in capsys.readouterr().out


def test_frames_that_lack_one_of_many_sweeps_are_left_out(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    files = add_sweeps(root)
    whole = data.NuScenes(root)
    files[0].unlink()
    data.print_once.cache_clear()
    dataset = data.NuScenes(root)
    lacking = files[0].name.split(".")[0]
    output = capsys.readouterr().out
    assert "lack older sweeps; the first file is sweeps/LIDAR_TOP/" + files[0].name in output
    assert "left out" in output and "--preset small" in output
    assert 0 < len(dataset) < len(whole)
    # the worker's copy has the same frames, whatever became of the grid
    dataset.grid = replace(dataset.grid, sweeps=1)
    assert pickle.loads(pickle.dumps(dataset)).names == dataset.names
    for split in ("train", "val"):
        for i in dataset.split(split):
            dataset.load(int(i), (9, 16))
    assert lacking not in {dataset.sensors["file"][row].decode()
                           for row in dataset.frames["sensors"][:, 0]}
    # what reads one sweep misses nothing
    assert len(data.open_dataset(root, sweeps=1)) == len(data.NuScenes(root, "small")) == len(whole)


@pytest.mark.parametrize("layout", ["nuscenes", "kitti", "drives", "waymo"])
def test_without_images_none_is_read_or_wanted(world, kitti, waymo, tmp_path, layout):
    source = {"nuscenes": world, "waymo": waymo}.get(layout, kitti)
    root = clone(Path(source), tmp_path / "root")
    root = raw_root(root) if layout == "drives" else root
    whole = data.open_dataset(root, "small").load(0)
    for pattern in ("samples/CAM_*", "*/image_2", "*/image_02", "*/camera_*"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder)
    with pytest.raises(data.DataError):
        data.open_dataset(root, "small")
    dataset = data.open_dataset(root, "small", images=False)
    frame = dataset.load(0)
    assert (frame.points == whole.points).all()
    assert frame.images == [] and frame.lidar2img.shape == (0, 4, 4)
    assert whole.boxes is None or (frame.boxes == whole.boxes)[:, :7].all()
    loader = data.loader(dataset, "train", 2, crop=layout == "kitti", augment=jiggle)
    batch = loader.first(1)[0]
    assert batch.size == 2 and batch.cameras == 0 and batch.images.shape == (0, 3, 0, 0)
    assert batch.hw.shape == (0, 2) and len(batch.points)


@pytest.mark.parametrize("method", ["clap", "cmcr", "simipu"])
def test_pre_training_demands_no_labels(method, monkeypatch):
    module = importlib.import_module(method)
    asked = []

    def opened(*_, **wanted):
        asked.append(wanted)
        raise data.DataError("enough")
    monkeypatch.setattr(data, "open_dataset", opened)
    cfg = module.Config(preset="small", gpus=0, **module.SMALL)
    with pytest.raises(data.DataError, match="enough"):
        module.train(0, 1, cfg)
    sweeps = {} if method == "clap" else dict(sweeps=1)
    assert asked == [dict(labels=False) | sweeps]


def test_own_data_may_have_fewer_cameras_and_more_beams(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    tokens = {sensor_token(root, channel) for channel in ("LIDAR_TOP", "CAM_BACK", "CAM_FRONT")}
    edit(root, "calibrated_sensor",
         lambda rows: [row for row in rows if row["sensor_token"] in tokens])
    calibrated = json.loads(next(root.glob("v1.0-*/calibrated_sensor.json")).read_text())
    tokens = {row["token"] for row in calibrated}
    edit(root, "sample_data",
         lambda rows: [row for row in rows if row["calibrated_sensor_token"] in tokens])
    with_value(4, 127)(root)
    edit(root, "sensor", lambda rows: rows + [dict(rows[0], token="own", channel="CAM_OWN")])
    dataset = data.open_dataset(root, "small")
    assert "sensor.json: CAM_OWN not read; " in capsys.readouterr().out
    assert dataset.grid.cameras == ("CAM_FRONT", "CAM_BACK")
    full = data.open_dataset(world, "small")
    frame = dataset.load(1)
    expected = full.load(1)
    assert len(frame.images) == 2
    for ours, theirs in ((0, 0), (1, 3)):    # places in CAMERAS
        assert (frame.images[ours] == expected.images[theirs]).all()
        assert (frame.lidar2img[ours] == expected.lidar2img[theirs]).all()
    assert data.doctor(str(root)) == []


@pytest.mark.parametrize("name", ["samples", "samples/CAM_FRONT", "v1.0-embedded", "maps"])
def test_links_of_the_user_are_followed(world, tmp_path, name):
    root = clone(Path(world), tmp_path / "root")
    link_folder(name)(root)
    assert same_frames(data.open_dataset(root, "small"), data.open_dataset(world, "small"))
    assert data.doctor(str(root)) == []


def test_links_to_single_files_are_followed(world, kitti, tmp_path):
    """As a download that keeps its files in a store of blobs leaves them."""
    for source in (world, kitti):
        root = clone(Path(source), tmp_path / f"links-{Path(source).name}")
        store = tmp_path / f"store-{Path(source).name}"
        store.mkdir()
        files = [file for file in root.rglob("*") if file.is_file() and file.suffix != ".npy"]
        for n, file in enumerate(files):
            file.rename(store / str(n))
            file.symlink_to(store / str(n))
        assert same_frames(data.open_dataset(root, "small"), data.open_dataset(source, "small"))
    # one that leads nowhere is a file that is missing
    key = sorted((tmp_path / "links-world/samples/CAM_BACK").iterdir())[0]
    key.unlink()
    key.symlink_to(tmp_path / "nowhere")
    dataset = data.open_dataset(tmp_path / "links-world", "small")
    assert len(dataset) == len(data.open_dataset(world, "small")) - 1


def same_frames(a, b):
    """Whether two data sets have the same frames, of which two are read."""
    if a.names != b.names:
        return False
    pairs = [(a.load(i), b.load(i)) for i in (0, len(a.names) - 1)]
    return all((one.points == two.points).all() and (one.lidar2img == two.lidar2img).all()
               and all(map(np.array_equal, one.images, two.images)) for one, two in pairs)


def test_a_map_is_inside_the_root(world, tmp_path):
    root = clone(Path(world), tmp_path)
    dataset = data.open_dataset(root, "small")
    assert dataset.lacking_for_scoring() == []
    shutil.rmtree(root / "maps")
    (message, *_) = dataset.lacking_for_scoring()
    assert "maps" in message and "before it scores; extract the maps/" in message
    assert message in data.doctor(str(root))
    edit(root, "map", lambda rows: rows[0].update(filename="/etc/passwd"))
    (message,) = dataset.lacking_for_scoring()
    assert "map.json: /etc/passwd is absolute or goes upwards" in message


def test_the_version_taken_is_printed_and_can_be_chosen(world, tmp_path, capsys):
    root = clone(Path(world), tmp_path)
    tables = next(root.glob("v1.0-*"))
    for name in ("v1.0-mini", "v1.0-trainval"):
        shutil.copytree(tables, root / name)
    shutil.rmtree(tables)
    assert data.NuScenes(root, "small").version == "v1.0-trainval"
    assert "reading v1.0-trainval" in capsys.readouterr().out
    assert data.NuScenes(root, "small", version="v1.0-mini").version == "v1.0-mini"
    assert data.open_dataset(root / "v1.0-mini", "small").version == "v1.0-mini"
    assert data.open_dataset(root / "v1.0-mini").root == str(root)
    message = ("found v1.0-mini, v1.0-trainval, not v1.0-test; "
               f"give the folder .* such as {root}/v1.0-mini")
    with pytest.raises(data.DataError, match=message):
        data.NuScenes(root, version="v1.0-test")


# ---- the index -----------------------------------------------------------------------

def test_second_open_parses_nothing_and_maps_plain_arrays(world, new_cache, monkeypatch):
    def parse_again(*_):
        pytest.fail("the tables were parsed again")
    first = data.NuScenes(world, "small")
    monkeypatch.setattr(data, "build_index", parse_again)
    second = data.NuScenes(world, "small")
    third = pickle.loads(pickle.dumps(first))
    for dataset in (second, third):
        for array in (dataset.frames, dataset.sensors, dataset.boxes):
            assert isinstance(array, np.memmap) and not array.dtype.hasobject
        assert (dataset.load(1).points == first.load(1).points).all()
    assert len(pickle.dumps(first)) < 4096  # what a worker receives
    for path in new_cache.rglob("*.npy"):
        assert path.read_bytes()[:6] == b"\x93NUMPY"
        np.load(path, allow_pickle=False)


def test_index_is_built_again_when_a_table_or_a_file_of_it_changes(world, tmp_path, new_cache,
                                                                   capsys):
    root = clone(Path(world), tmp_path / "root")
    before = data.NuScenes(root, "small").load(0)

    def rename(rows):
        for row in rows:
            row["name"] = "renamed-" + row["name"]
    edit(root, "scene", rename)
    put(next(root.glob("v1.0-*/splits.json")), b"{}")
    name = data.NuScenes(root, "small").load(0).name
    assert name == before.name.replace("nuscenes/", "nuscenes/renamed-")
    for path in sorted(new_cache.glob("index-*/*.npy")):
        whole = path.read_bytes()
        for damaged in (whole[:len(whole) - 8], whole[:20], b""):
            path.write_bytes(damaged)
            data.NuScenes(root, "small").load(0)
        path.unlink()
        data.NuScenes(root, "small").load(0)
    assert "damaged" in capsys.readouterr().out and not list(new_cache.glob("*.part"))


def flip(path, share):
    """Flip a bit at this share of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(content)


def test_an_index_whose_bytes_have_changed_is_built_again(world, tmp_path, new_cache, capsys):
    """A bit, a pose or the whole index of another data set; and what numpy cannot parse."""
    other = clone(Path(world), tmp_path / "other")
    put(next(other.glob("v1.0-*/splits.json")), b"{}")
    data.NuScenes(other, "small")
    foreign = next(new_cache.glob("index-*[!k]"))
    before = data.NuScenes(world, "small")
    before = replace(before.load(0)), before.index_key()
    folder = new_cache / f"index-{before[1]}"

    def moved(folder):
        sensors = np.load(folder / "sensors.npy")
        sensors["to_world"][:, 0, 3] += 1
        np.save(folder / "sensors.npy", sensors)

    def exchanged(folder):
        shutil.rmtree(folder)
        shutil.copytree(foreign, folder)

    for k, breaks in enumerate([
        lambda folder: flip(folder / "sensors.npy", 0.6),
        lambda folder: flip(folder / "frames.npy", 0.002),
        moved,
        exchanged,
    ]):
        breaks(folder)
        data.print_once.cache_clear()
        frame = data.NuScenes(world, "small").load(0)
        assert np.array_equal(frame.points, before[0].points), k
        assert np.array_equal(frame.lidar2img, before[0].lidar2img), k
        message = f"{folder}: damaged (its digest is of other bytes), built again"
        assert message in capsys.readouterr().out, k


def test_an_index_from_before_there_were_digests_is_read(world, new_cache, monkeypatch, capsys):
    build = data.build_index
    monkeypatch.setattr(data, "build_index", lambda *_: pytest.fail("built again"))
    with pytest.raises(pytest.fail.Exception):
        data.NuScenes(world, "small")
    monkeypatch.setattr(data, "build_index", build)
    data.NuScenes(world, "small")
    next(new_cache.glob("index-*/digest")).unlink()
    monkeypatch.setattr(data, "build_index", lambda *_: pytest.fail("built again"))
    data.NuScenes(world, "small").load(0)
    # a header of which numpy's parser complains in its own way
    monkeypatch.setattr(data, "build_index", build)
    file = next(new_cache.glob("index-*/counts.npy"))
    file.write_bytes(file.read_bytes().replace(b"{'descr'", b'{"""scr"'))
    assert len(data.NuScenes(world, "small")) == 9
    assert "damaged" in capsys.readouterr().out


def test_leftovers_of_killed_builders_are_removed(world, new_cache):
    data.NuScenes(world, "small")
    folder = next(new_cache.glob("index-*[!k]"))
    shutil.rmtree(folder)
    dead = new_cache / f"{folder.name}.0123.part"
    staging = new_cache / f".{folder.name}-0123"
    for place in (dead, staging):
        place.mkdir()
        (place / "frames.npy").write_bytes(b"half")
    unrelated = new_cache / "index-other.0123.part"
    unrelated.mkdir()
    data.NuScenes(world, "small")
    assert not dead.exists() and not staging.exists() and unrelated.exists()

    next(data.loader(world, "train", 1, preset="small", prepare=Heights()).once())
    folder = next(new_cache.glob("prepared/*/*"))
    old, young = folder / "a.npz.01.part", folder / "b.npz.02.part"
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    data.loader(world, "train", 1, preset="small", prepare=Heights())
    assert not old.exists() and young.exists()


HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(4)
"""


def test_whoever_waits_for_another_process_is_told(tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "index.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with data.locked(tmp_path / "index"):
            pass
    message = f"{tmp_path}/index: another process is writing it; waiting until it is done or ends"
    assert capsys.readouterr().out.count(message) == 1


def test_more_blobs_make_a_new_index_and_leave_what_was_prepared(world, tmp_path, new_cache):
    root = clone(Path(world), tmp_path)
    Heights.calls = 0
    for count in range(2):
        next(data.loader(root, "train", 1, preset="small", prepare=Heights()).once())
        assert len(list(new_cache.glob("index-*/frames.npy"))) == count + 1
        assert Heights.calls == 1
        # as after extracting one more archive
        os.utime(root / "samples" / "CAM_FRONT", (count, count))


def open_and_read(root, cache):
    os.environ["LIDAR_CAMERA_CACHE"] = cache
    return data.NuScenes(root, "small").load(0).points.sum().item()


def test_two_processes_may_build_the_index_at_once(world, new_cache):
    arguments = [(str(world), str(new_cache))] * 2
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        a, b = pool.starmap(open_and_read, arguments, chunksize=1)
    assert a == b and len(list(new_cache.glob("index-*/frames.npy"))) == 1
    assert not list(new_cache.glob("*.part"))


def test_losing_the_race_without_locks_is_harmless(world, new_cache, monkeypatch):
    build = data.build_index
    built = []

    def slow(root, version):  # another process publishes its index while this one builds
        index = build(root, version)
        if not built:
            built.append(index)
            data.NuScenes(world, "small")
        return index

    def flock(*_):
        raise OSError("no locks on this file system")
    monkeypatch.setattr(data, "build_index", slow)
    monkeypatch.setattr(data.fcntl, "flock", flock)
    assert len(data.NuScenes(world, "small").load(0).points) > 0
    assert len(built) == 1 and not list(new_cache.glob("*.part"))


def test_a_cache_that_cannot_be_written_says_what_to_set(world, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(tmp_path / "file" / "cache"))
    message = "file/cache: .* cannot be written .*LIDAR_CAMERA_CACHE"
    with pytest.raises(data.DataError, match=message):
        data.NuScenes(world)


def test_an_index_in_a_read_only_cache_is_read(world, new_cache, monkeypatch):
    data.NuScenes(world, "small")
    for lock in new_cache.glob("*.lock"):
        lock.unlink()
        lock.mkdir()  # as good as a folder of another user: no process may open it
    data.NuScenes(world, "small").load(0)
    shutil.rmtree(next(new_cache.glob("index-*[!k]")))
    with pytest.raises(data.DataError, match="index-.* cannot be written .*LIDAR_CAMERA_CACHE"):
        data.NuScenes(world, "small")
    for lock in new_cache.glob("*.lock"):
        lock.rmdir()

    # numpy's own complaint of a full disk has no number
    for reason in (28, "No space left on device"), ("50 requested and 10 written",):
        def full(*_, reason=reason, **__):
            raise OSError(*reason)
        monkeypatch.setattr(data.np, "save", full)
        with pytest.raises(data.DataError, match=rf"written \({reason[-1]}\); make room"):
            data.NuScenes(world, "small")
    assert [path.suffix for path in new_cache.iterdir()] == [".lock"]


def test_cache_files_have_the_permissions_of_the_umask(world, new_cache):
    """A cache that several users share: tempfile's files would be their owner's alone."""
    umask = os.umask(0o002)
    try:
        next(data.loader(world, "train", 1, preset="small", prepare=Heights()).once())
    finally:
        os.umask(umask)
    folders = {path.stat().st_mode & 0o777 for path in new_cache.rglob("*") if path.is_dir()}
    files = {path.stat().st_mode & 0o777 for path in new_cache.rglob("*") if path.is_file()}
    assert folders == {0o775} and files == {0o664}


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIDAR_CAMERA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / "lidar-camera-pretraining"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", "~/cache")
    assert data.cache_dir() == tmp_path / "cache"


def test_cache_dir_knows_the_home_folder_and_can_do_without(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", "~/x")
    assert data.cache_dir() == tmp_path / "home" / "x"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)     # a user without an entry
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(tmp_path / "y"))
    assert data.cache_dir() == tmp_path / "y"
    for name in ("LIDAR_CAMERA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(data.DataError, match="no home folder.* as LIDAR_CAMERA_CACHE"):
        data.cache_dir()
    assert not (tmp_path / "~").exists()


def spoil_a_picture(root):
    Image.new("RGB", (8, 8)).save(next(root.rglob("*.jpg")))


def move_the_labels(root):
    path = next(root.glob("v1.0-*/sample_annotation.json"))
    rows = json.loads(path.read_text())
    for row in rows:
        row["translation"][0] += 3
    path.write_text(json.dumps(rows))


def exchange_category_names(root):
    path = next(root.glob("v1.0-*/category.json"))
    text = path.read_text().replace("vehicle.car", "x").replace("human.pedestrian.adult", "y")
    path.write_text(text.replace('"x"', '"human.pedestrian.adult"').replace('"y"', '"vehicle.car"'))


@pytest.mark.parametrize("change, part", [
    (spoil_a_picture, "samples/CAM_"),
    (move_the_labels, "tables of v1.0-"),
    (exchange_category_names, "tables of v1.0-"),
])
def test_a_fingerprint_changes_with_the_data_and_not_with_the_place(
        three_frames, tmp_path, change, part):
    before = data.open_dataset(three_frames, "small").fingerprint()
    assert len(before) == 1 + 3 * 7
    root = Path(shutil.copytree(three_frames, tmp_path / "root", copy_function=shutil.copyfile))
    assert data.open_dataset(root, "paper").fingerprint() == before
    change(root)
    after = data.open_dataset(root, "small").fingerprint()
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1 and changed[0].startswith(part), changed


def test_the_fingerprints_of_kitti_and_waymo_change_with_the_data_only(kitti, waymo, tmp_path):
    for source, pattern in ((kitti, "training/label_2/*"), (kitti / "2011_09_26", "calib_velo*"),
                            (waymo, "training/lidar_box/*")):
        root = tmp_path / pattern.replace("/", "_")
        shutil.copytree(source, root, copy_function=shutil.copyfile)
        before = data.open_dataset(source).fingerprint()
        assert data.open_dataset(root).fingerprint() == before
        path = sorted(root.glob(pattern))[0]
        raw = path.read_bytes()
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])    # the same size
        dataset = data.open_dataset(source)    # Waymo's reads files when it opens
        dataset.root = str(root)
        after = dataset.fingerprint()
        assert [name for name in before if before[name] != after[name]] == [
            str(path.relative_to(root))]


def test_a_table_of_the_same_size_and_time_is_noticed(three_frames, tmp_path):
    """As cp -p and rsync -t leave it."""
    root = Path(shutil.copytree(three_frames, tmp_path / "root"))
    before = data.NuScenes(root, "small").key
    path = next(root.glob("v1.0-*/category.json"))
    times = path.stat()
    path.write_text(path.read_text().replace("vehicle.car", "vehicle.cat"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert data.NuScenes(root, "small").key != before


# ---- broken nuScenes folders: a message says where, what was found, what to do -------

# Ways to break a copy: each returns a function of its root.

def cut(pattern, length):
    """Cut the first file of that pattern to so many bytes."""
    def change(root):
        file = first_file(root, pattern)
        put(file, file.read_bytes()[:length])
    return change


def remove(pattern):
    return lambda root: first_file(root, pattern).unlink()


def overwrite(pattern, content):
    return lambda root: put(first_file(root, pattern), content)


def link_folder(name):
    """Move a folder out of the root and leave a link to it."""
    def change(root):
        outside = root.parent / "elsewhere"
        (root / name).rename(outside)
        (root / name).symlink_to(outside)
    return change


def link_file(pattern, outside_name):
    """Copy a file out of the root and leave a link to the copy."""
    def change(root):
        file = first_file(root, pattern)
        outside = root.parent / outside_name
        outside.write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(outside)
    return change


def change_points(change):
    """Change the points (N, 5) of the first keyframe sweep in place."""
    def rewrite(root):
        file = key_file(root, "LIDAR_TOP")
        points = np.fromfile(file, np.float32).reshape(-1, 5)
        change(points)
        put(file, points.tobytes())
    return rewrite


def with_value(column, value):
    """One point of the first keyframe sweep with this value."""
    def change(points):
        points[3, column] = value
    return change_points(change)


def resized(root):
    file = key_file(root, "CAM_BACK")
    Image.open(file).resize((50, 40)).save(root / "other.jpg")
    put(file, (root / "other.jpg").read_bytes())


def middle(change):
    """Rewrite the first front image as change(its bytes, half of their number)."""
    def breaks(root):
        file = key_file(root, "CAM_FRONT")
        whole = file.read_bytes()
        put(file, change(whole, len(whole) // 2))
    return breaks


def four_floats(root):
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (500, 4)) * (50, 50, 2, 255)
    put(key_file(root, "LIDAR_TOP"), points.astype(np.float32).tobytes())


def table(name, change):
    """Change a table, see edit."""
    return lambda root: edit(root, name, change)


def no_row(name):
    """Leave out the last row of a table."""
    return table(name, lambda rows: rows[:-1])


def set_all(name, **values):
    """Set fields of all rows of a table."""
    def change(rows):
        for row in rows:
            row.update(values)
    return table(name, change)


def first_row(rows, channel):
    """The first row of sample_data that has this channel."""
    return next(row for row in rows if channel in row["filename"])


def set_first(channel, **values):
    """Set fields of the first sample_data row of a channel."""
    return table("sample_data", lambda rows: first_row(rows, channel).update(values))


def without_image_row(rows):
    rows.remove(first_row(rows, "CAM_BACK/"))


def with_twin(rows):
    return rows + [dict(rows[0], token="twin")]


def with_copy(rows):
    return rows + rows[:1]


def without_rotation(rows):
    for row in rows:
        row.pop("rotation")


def loop_sweeps(rows):
    row = next(row for row in rows if "LIDAR_TOP" in row["filename"] and row["next"])
    row["prev"] = row["next"]


def loop_next(n):
    def change(rows):
        rows[n]["next"] = rows[n]["token"]
    return change


# case: what is done to a copy, and what the message must contain
BROKEN_BLOBS = {
    "truncated bin": (cut("samples/LIDAR_TOP/*", -7),
                      ["nuscenes/", ".bin", "N x 20", "truncated", "extract"]),
    "empty bin": (overwrite("samples/LIDAR_TOP/*", b""),
                  ["nuscenes/", ".bin", "0 bytes", "N > 0", "extract"]),
    "truncated jpg": (cut("samples/CAM_FRONT/*", 900),
                      ["nuscenes/", ".jpg", "not a whole JPEG", "900 bytes", "extract"]),
    "no jpg": (overwrite("samples/CAM_FRONT/*", b"<html>"),
               ["nuscenes/", ".jpg", "not a whole JPEG", "6 bytes", "extract"]),
    "20 kB of a jpg missing in its middle": (
        middle(lambda whole, half: whole[:half] + whole[half + len(whole) // 5:]),
        ["nuscenes/", ".jpg", "damaged JPEG", "Corrupt JPEG data", "extract"]),
    "zeros in a jpg": (
        middle(lambda whole, half: whole[:half] + bytes(1000) + whole[half + 1000:]),
        ["nuscenes/", ".jpg", "damaged JPEG", "Corrupt JPEG data"]),
    "half a jpg and all of it": (
        middle(lambda whole, half: whole[:half] + whole),
        ["nuscenes/", ".jpg", "damaged JPEG", "Corrupt JPEG data"]),
    "wrong size jpg": (resized, ["nuscenes/", "CAM_BACK", "50 x 40", "expected", "calibration",
                                 "extract"]),
    "enormous height": (set_first("CAM_BACK/", height=10 ** 10),
                        ["nuscenes/", "CAM_BACK", "x 10000000000", "calibration"]),
    "four floats a point": (four_floats, ["nuscenes/", ".bin", "expected", "float", "5"]),
    "NaN point": (with_value(1, np.nan), ["nuscenes/", ".bin", "nan", "finite"]),
    "infinite point": (with_value(2, np.inf), ["nuscenes/", ".bin", "inf", "finite"]),
    "far point": (with_value(0, 5e4), ["nuscenes/", ".bin", "300 m"]),
    "NaN intensity": (with_value(3, np.nan), ["nuscenes/", ".bin", "0..255"]),
    "ring 300": (with_value(4, 300), ["nuscenes/", ".bin", "300", "0..255"]),
    "ring 1.5": (with_value(4, 1.5), ["nuscenes/", ".bin", "whole numbers in 0..255"]),
}
BROKEN_PATHS = {
    "path upwards": (set_first("CAM_FRONT/", filename="../../etc/passwd"),
                     ["sample_data.json", "../../etc/passwd", "inside", "correct"]),
    "absolute path": (set_first("LIDAR_TOP/", filename="/etc/passwd"),
                      ["sample_data.json", "/etc/passwd", "inside", "correct"]),
    # a user's link does not let a table go through what lies above it
    "path up from a link": (set_first("CAM_FRONT/", filename="samples/../../passwd"),
                            ["sample_data.json", "samples/../../passwd", "upwards", "correct"]),
}
BROKEN_LINKS = {
    "no calibration": (
        no_row("calibrated_sensor"),
        ["sample_data.json", "calibrated_sensor_token", "calibrated_sensor.json", "extract"]),
    "no ego pose": (no_row("ego_pose"),
                    ["sample_data.json", "ego_pose_token", "ego_pose.json", "extract"]),
    "no image row": (table("sample_data", without_image_row),
                     ["sample_data.json", "CAM_BACK", "sample", "extract"]),
    "no instance": (no_row("instance"),
                    ["sample_annotation.json", "instance_token", "instance.json"]),
    "no scene": (no_row("scene"), ["sample.json", "scene_token", "scene.json"]),
    "cyclic samples": (table("sample", loop_next(1)),
                       ["sample.json", "next", "cyclic", "extract"]),
    "cyclic sweeps": (table("sample_data", loop_sweeps),
                      ["sample_data.json", "prev", "cyclic", "extract"]),
    "cyclic boxes": (table("sample_annotation", loop_next(0)),
                     ["sample_annotation.json", "next", "cyclic"]),
    "duplicate token": (table("ego_pose", with_copy),
                        ["ego_pose.json", "occurs 2 times", "once", "extract"]),
    "two key frames": (table("sample_data", with_twin),
                       ["sample_data.json", "key-frame rows", "expected 7 each"]),
    "a scene in two splits": (
        overwrite("v1.0-*/splits.json", b'{"train": ["a"], "val": ["a"]}'),
        ["splits.json", "a is in train and in val"]),
}
BROKEN_NUMBERS = {
    "NaN calibration": (set_all("calibrated_sensor", translation=[0, float("nan"), 1]),
                        ["calibrated_sensor.json", "translation", "nan", "finite"]),
    "infinite pose": (set_all("ego_pose", translation=[0, float("inf"), 1]),
                      ["ego_pose.json", "translation", "inf", "finite"]),
    "zero rotation": (set_all("ego_pose", rotation=[0, 0, 0, 0]),
                      ["ego_pose.json", "rotation", "unit quaternion"]),
    "three numbers for a rotation": (set_all("ego_pose", rotation=[1, 0, 0]),
                                     ["ego_pose.json", "rotation", "expected 4 finite"]),
    "no intrinsics": (set_all("calibrated_sensor", camera_intrinsic=[]),
                      ["calibrated_sensor.json", "camera_intrinsic", "3 x 3"]),
    "a text for a number": (set_all("sample_annotation", size=["2", "4", "1.5"]),
                            ["sample_annotation.json", "size", "'2'", "3 finite"]),
    "a text for true": (set_all("sample_data", is_key_frame="false"),
                        ["sample_data.json", "is_key_frame 'false'", "true or false"]),
    "fewer points than none": (set_all("sample_annotation", num_lidar_pts=-5),
                               ["sample_annotation.json", "num_lidar_pts -5", "0 or more"]),
    "nested splits": (overwrite("v1.0-*/splits.json", b"[" * 100_000),
                      ["splits.json", "not a JSON list"]),
    "no field": (table("ego_pose", without_rotation), ["ego_pose.json", "no field rotation"]),
    "half a table": (cut("v1.0-*/sample_data.json", 5000),
                     ["sample_data.json", "JSON", "extract"]),
    "not a list": (overwrite("v1.0-*/sensor.json", b"3"), ["sensor.json", "not a JSON list"]),
}
for K in ([[0] * 3] * 3, [[100, 0, 128], [0, 0, 48], [0, 0, 1]]):
    BROKEN_NUMBERS[f"intrinsics {K}"] = (
        set_all("calibrated_sensor", camera_intrinsic=K),
        ["nuscenes/", "CAM_FRONT: its projection matrix is singular", "calibrated_sensor.json"])
TABLES = ("sensor", "calibrated_sensor", "ego_pose", "sample", "sample_data", "sample_annotation",
          "scene", "instance", "category")
BROKEN = {
    **BROKEN_BLOBS,
    **BROKEN_PATHS,
    **BROKEN_LINKS,
    **BROKEN_NUMBERS,
    **{f"no {name}.json": (remove(f"v1.0-*/{name}.json"), [f"{name}.json", "missing", "extract"])
       for name in TABLES},
}


def check_refused(reader, root, fragments):
    """Opening the root, or reading one of its frames, fails with these in the message."""
    with pytest.raises(data.DataError) as error:
        dataset = reader(root, "small")
        for i in range(len(dataset)):
            dataset.load(i)
    message = str(error.value)
    for fragment in fragments:
        assert fragment in message, (fragment, message)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(world, tmp_path, case):
    root = clone(Path(world), tmp_path / "root")
    breaks, fragments = BROKEN[case]
    breaks(root)
    check_refused(data.NuScenes, root, fragments)


@contextmanager
def at_most(seconds):
    """Fail instead of waiting for ever."""
    def give_up(*_):
        pytest.fail(f"still waiting after {seconds} s")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("pattern", [
    "samples/CAM_FRONT/*", "samples/LIDAR_TOP/*", "training/image_2/*", "training/velodyne/*.bin",
    "training/label_2/*", "training/calib/*",
])
def test_a_pipe_is_refused_not_waited_for(world, kitti, tmp_path, pattern):
    """What becomes one after the folder was opened; what is one before is no file."""
    reader = data.Kitti if pattern.startswith("training") else data.NuScenes
    root = clone(kitti if reader is data.Kitti else Path(world), tmp_path / "root")
    dataset = reader(root, "small")
    file = first_file(root, pattern)
    file.unlink()
    os.mkfifo(file)
    with at_most(10):
        with pytest.raises(data.DataError, match=f"{file} is a pipe or a device, expected a file"):
            for i in range(len(dataset)):
                dataset.load(i)
        assert len(reader(root, "small")) == len(dataset) - 1


def test_what_others_print_while_an_image_is_decoded_arrives(world, monkeypatch, capfd):
    raw = key_file(Path(world), "CAM_FRONT").read_bytes()
    imdecode = data.cv2.imdecode

    def noisy(*arguments):
        os.write(2, b"from another thread\n")
        return imdecode(*arguments)
    monkeypatch.setattr(data.cv2, "imdecode", noisy)
    pixels, _ = data.decode(raw, "a.jpg", (96, 256), "frame")
    assert capfd.readouterr().err == "from another thread\n"

    # with stderr closed damage is not seen, but what is whole is read
    def closed(*_):
        raise OSError(9, "Bad file descriptor")
    with monkeypatch.context() as patch:
        patch.setattr(data.os, "dup", closed)
        again, _ = data.decode(raw, "a.jpg", (96, 256), "frame")
    assert np.array_equal(again, pixels)


def test_a_sweep_with_only_the_car_in_it_is_an_empty_frame(world, tmp_path):
    root = clone(Path(world), tmp_path)
    points = [[.5, .5, -.3, 9, 3], [0, 2.2, -.9, 9, 0], [-.9, -1.2, -1, 9, 0]]
    dataset = data.NuScenes(root, "small")
    file = dataset.sensors["file"][dataset.frames["sensors"][0, 0]].decode()
    put(root / file, np.array(points, np.float32).tobytes())
    frame = dataset.load(0)
    assert frame.points.shape == (0, 5) and len(dataset.sweep(0)) == 3
    batch = data.collate([jiggle(frame, np.random.default_rng(0)), dataset.load(1)], [0, 1])
    assert batch.size == 2 and (batch.b_points == 1).all()


def test_a_wrong_root_is_answered_with_the_right_one(world, tmp_path):
    root = clone(Path(world), tmp_path / "outer" / "nuscenes")
    for wrong in (root.parent, root / "samples", root / "samples" / "CAM_FRONT"):
        with pytest.raises(data.DataError) as error:
            data.open_dataset(str(wrong), "small")
        message = str(error.value)
        assert message.startswith(f"{wrong}: ") and message.endswith(f"give {root}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="looked for nuScenes.*found nothing"):
        data.open_dataset(str(tmp_path / "empty"))


# what a folder holds, and what the message about it must contain
ALMOST = {
    "samples/CAM_FRONT/a.jpg": "samples is here, but no table .*extract the metadata archive",
    "training/a.tfrecord": "a.tfrecord is here, but version 2 .* parquet",
    "training/camera_image/a.parquet": "no training/vehicle_pose; download the component",
    "training/image_2/0.png": "no training/velodyne; extract the scans",
    "training/velodyne/0000/000000.bin": "0000/000000.bin is of the tracking set.*object frames",
}


@pytest.mark.parametrize("file", ALMOST)
def test_what_the_right_folder_lacks_is_named(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("")
    with pytest.raises(data.DataError, match=ALMOST[file]):
        data.open_dataset(tmp_path)


def test_a_root_that_is_no_folder_says_so(tmp_path):
    (tmp_path / "v1.0-mini.tgz").write_bytes(b"")
    with pytest.raises(data.DataError, match="v1.0-mini.tgz: this is a file; .*extract it"):
        data.open_dataset(tmp_path / "v1.0-mini.tgz")
    with pytest.raises(data.DataError, match="absent: no such folder; give"):
        data.open_dataset(tmp_path / "absent")
    with pytest.raises(data.DataError, match=r"the shell has left ~ as it is: write \$HOME"):
        data.open_dataset("~/nuscenes")


def test_what_may_not_be_read_is_not_called_missing(world, kitti, new_cache, monkeypatch):
    """A folder or file without permission: no advice to extract anything again."""
    message = "Permission denied.*; ask its owner"
    scandir = os.scandir
    read_bytes = Path.read_bytes

    def forbid(part):
        def refused(path):
            if str(path).endswith(part):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)
        monkeypatch.setattr(data.os, "scandir", refused)

    for root, part in ((world, "samples/CAM_BACK"), (kitti, "training/image_2")):
        forbid(part)
        with pytest.raises(data.DataError, match=f"{part} cannot be read .{message}"):
            data.open_dataset(root, "small")
    monkeypatch.setattr(data.os, "scandir", scandir)
    dataset = data.open_dataset(world, "small")

    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(data.np, "fromfile", lambda path, *_: unreadable(path))
    with pytest.raises(data.DataError, match=f"^nuscenes/.*bin cannot be read .{message}"):
        dataset.load(0)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(data.DataError, match=f"sensor.json cannot be read .{message}"):
        data.Table(next(Path(world).glob("v1.0-*")), "sensor", "channel")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(data.os, "access", lambda path, _: Path(path).name != "closed")
    (new_cache / "closed").mkdir(parents=True)
    with pytest.raises(data.DataError, match=f"closed: this folder cannot be read .{message}"):
        data.open_dataset(new_cache)


def test_no_root_is_the_embedded_world_written_once(world, new_cache, monkeypatch, capsys):
    import synthetic
    roots = []

    def write(root):
        roots.append(root)
        clone(Path(world), Path(root))
    monkeypatch.setattr(synthetic, "write", write)
    for _ in range(2):
        assert data.open_dataset("", "small").version == "v1.0-embedded"
    assert roots == [new_cache / f"world-{synthetic.VERSION}"]
    assert "writing the embedded world" in capsys.readouterr().out

    # a cleaner of old files has been there
    root = roots[0]
    message = f"This is the embedded world: delete {root}, and the next start writes it again"
    key_file(root, "CAM_FRONT").unlink()
    with pytest.raises(data.DataError, match=message):
        data.open_dataset("", "small")
    shutil.rmtree(root)
    root.mkdir()
    with pytest.raises(data.DataError, match=message):
        data.open_dataset("", "small")


# ---- KITTI: the fabricated folder ----------------------------------------------------

def raw_root(kitti):
    return next(kitti.glob("2011_*"))


def disk_size(dataset, i):
    """Width and height of a KITTI frame's image on disk."""
    return Image.open(os.path.join(dataset.root, dataset.frames[i].image)).size


def names_of_splits(dataset):
    """The names of the train, val and test frames."""
    names = dataset.names
    return [[names[i] for i in dataset.split(split)] for split in ("train", "val", "test")]


KITTI_SPLITS = [["kitti/training/000000", "kitti/training/000003"], ["kitti/training/000007"],
                ["kitti/testing/000000"]]


@pytest.mark.parametrize("size", [(384, 1248), (80, 256), (200, 1000), (375, 1242)])
@pytest.mark.parametrize("layout", ["object frames", "raw drives"])
def test_kitti_points_land_on_the_pixels_that_they_were_made_from(kitti, layout, size):
    dataset = data.open_dataset(kitti if layout == "object frames" else raw_root(kitti))
    assert dataset.layout == layout
    for i in range(len(dataset)):
        frame = dataset.load(i, size)
        file = dataset.frames[i].cloud.replace(".bin", ".uvd.npy")
        uvd = np.load(os.path.join(dataset.root, file))
        projected = project(frame.points[:400, :3], frame.lidar2img[0])
        np.testing.assert_allclose(projected[:, 2], uvd[:, 2], rtol=1e-4)
        width, height = disk_size(dataset, i)
        u, v = np.floor(projected[:, :2]).astype(int).T
        visible = (u >= 1) & (v >= 1) & (u < size[1] - 1) & (v < size[0] - 1)
        assert visible.mean() > 0.5
        red, green = frame.images[0][:2, v[visible], u[visible]] / 255.
        scale = max(size[0] / height, size[1] / width)
        assert abs(red * width - uvd[visible, 0]).max() < 0.6 / scale + 3
        assert abs(green * height - uvd[visible, 1]).max() < 0.6 / scale + 1.5
        lidar2rect, rect2img = dataset.calibration(i)
        exact = project(frame.points[:400, :3], rect2img @ lidar2rect)
        np.testing.assert_allclose(exact[:, :2], uvd[:, :2], atol=0.02)  # scans are float32
        assert frame.points.shape == (800, 5) and (frame.points[:, 4] == 0).all()
        assert not frame.origin.any()


def test_kitti_labels_are_the_boxes_of_the_official_readme(kitti):
    from conftest import CAR, R0, TR, car_corners
    dataset = data.open_dataset(kitti, "small")
    frame = dataset.load(0)
    rows = dataset.annotations(0)
    assert rows["type"].tolist() == ["Car", "Van", "DontCare"]
    assert rows["label"].tolist() == [0, -1, -1] and np.isnan(rows["box"][2]).all()
    assert frame.labels.tolist() == [0] and frame.boxes.shape == (1, 9)
    assert np.isnan(frame.boxes[0, 7:]).all()
    # the turns' transposes undo them
    expected = (car_corners(**CAR) @ R0 - TR[:, 3]) @ TR[:, :3]
    corners = data.box_corners(rows["box"][0])
    gap = np.linalg.norm(expected[:, None] - corners[None], axis=2)
    assert gap.min(1).max() < 1e-6 and sorted(gap.argmin(1)) == list(range(8))
    # the heading points along the car's x axis, which is +x of the camera turned by rotation_y
    # about y (down)
    ahead = expected[[0, 1, 4, 5]].mean(0) - expected.mean(0)
    assert abs(math.atan2(ahead[1], ahead[0]) - rows["box"][0, 6]) < 1e-6
    assert dataset.load(3).boxes is None and not dataset.frames[3].labels  # testing/ has no labels


def test_kitti_object_frames_take_the_splits_of_their_image_sets(kitti, capsys):
    data.print_once.cache_clear()
    dataset = data.open_dataset(kitti)
    output = capsys.readouterr().out
    assert "object frames and raw drives" in output and f"give {raw_root(kitti)}" in output
    assert "2 of the 6 frames in ImageSets" in output
    assert names_of_splits(dataset) == KITTI_SPLITS


def test_kitti_raw_drives_leave_out_half_frames(kitti, capsys):
    data.print_once.cache_clear()
    raw = data.open_dataset(raw_root(kitti))
    assert "1 raw frames have only a scan or only an image" in capsys.readouterr().out
    drive = "kitti/2011_09_26_drive_0009_sync"
    assert raw.names == [f"{drive}/{n:010d}" for n in (0, 1, 3)]
    assert raw.split("train").tolist() == [0, 1] and raw.split("val").tolist() == [2]
    assert "cut in their order" in capsys.readouterr().out
    assert [raw.load(i).time for i in range(3)] == pytest.approx([0, 0.1, 0.3])


def test_kitti_without_image_sets_is_cut_in_order(kitti, tmp_path):
    """The official download has no lists."""
    root = clone(kitti, tmp_path)
    shutil.rmtree(root / "ImageSets")
    dataset = data.open_dataset(root)
    splits = [dataset.split(name).tolist() for name in ("train", "val", "test")]
    assert splits == [[0, 1], [2], [3]]
    (root / "training" / "velodyne" / "._000000.bin").write_bytes(b"a Mac's")
    (root / "testing" / "image_2" / "._000000.png").write_bytes(b"a Mac's")
    assert data.open_dataset(root).names == dataset.names
    shutil.rmtree(root / "training")
    with pytest.raises(data.DataError):
        data.open_dataset(root).split("val")


def test_frames_without_labels_stay_out_of_kittis_own_cut(kitti, tmp_path):
    """Lists of other frames than those on disk.

    None of val is on disk, so both splits are cut, from labelled frames.
    """
    root = clone(kitti, tmp_path)
    (root / "ImageSets" / "test.txt").unlink()
    (root / "ImageSets" / "val.txt").write_text("000111\n")
    assert names_of_splits(data.open_dataset(root)) == KITTI_SPLITS


def test_cropping_to_the_view_keeps_what_an_image_shows(kitti):
    frame = data.open_dataset(kitti).load(0, (375, 1242))
    frame = replace(frame, extra={"points_row": np.arange(800)})
    cropped = data.crop_to_view(frame)
    u, v, d = project(frame.points[:, :3], frame.lidar2img[0]).T
    expected = np.flatnonzero((d > 0) & (u >= 0) & (u < 1242) & (v >= 0) & (v < 375))
    assert cropped.extra["points_row"].tolist() == expected.tolist()
    assert (expected[:400] == np.arange(400)).all() and 400 < len(expected) < 600
    # with a camera that looks back: what any image shows stays
    front = frame.lidar2img[0]
    back = front @ np.diag([-1, -1, 1, 1]).astype(np.float32)
    twice = replace(frame, images=frame.images * 2, lidar2img=np.stack([front, back]))
    assert len(data.crop_to_view(twice).points) > len(cropped.points)


# ---- KITTI: the real frames ----------------------------------------------------------

def points_in_camera_box(scan, row):
    """How many points (N, 3) in rectified camera 0 the upright box of a label row holds."""
    x, y, z = (scan - row["location"]).T
    cos = math.cos(row["rotation_y"])
    sin = math.sin(row["rotation_y"])
    h, w, l = row["hwl"]
    along = abs(cos * x - sin * z) < l / 2
    across = abs(sin * x + cos * z) < w / 2
    return (along & (y < 0) & (y > -h) & across).sum()


def test_real_kitti_counts_match_an_independent_script(kitti_root):
    path = kitti_root.parent / "golden_counts.json"
    if not path.exists():
        pytest.skip(f"no {path}: KITTI is not the small set of frames that was counted")
    golden = json.loads(path.read_text())
    cars = 0
    for root, counted in [(kitti_root, golden["kitti_object"]),
                          (raw_root(kitti_root), golden["kitti_raw_2011_09_26_drive_0052"])]:
        dataset = data.open_dataset(root)
        assert [name.rsplit("/", 1)[1] for name in dataset.names] == sorted(counted)
        for i, number in enumerate(sorted(counted)):
            expected = counted[number]
            width, height = expected["image"]
            frame = dataset.load(i, (height, width))
            assert len(frame.points) == expected["points"]
            assert frame.images[0].shape == (3, height, width)
            assert len(data.crop_to_view(frame).points) == expected["in_image"]
            # the counts are of upright boxes in camera 0
            scan = to_world(frame.points, dataset.calibration(i)[0])
            rows = dataset.annotations(i)
            rows = rows[rows["type"] != "DontCare"]
            for row, (kind, count) in zip(rows, expected.get("points_in_box", [])):
                assert (row["type"], points_in_camera_box(scan, row)) == (kind, count)
                # ours are upright in the LiDAR's frame instead
                ours = data.inside_box(frame.points[:, :3], row["box"]).sum()
                assert ours == pytest.approx(count, rel=0.1, abs=3)
                cars += 1
    assert cars == 11


def test_real_kitti_reduced_cloud_is_reproduced(kitti_root):
    files = sorted(kitti_root.glob("training/velodyne_reduced/*.bin"))
    if not files:
        pytest.skip(f"no velodyne_reduced under {kitti_root}/training")
    dataset = data.open_dataset(kitti_root)
    for file in files:
        i = dataset.names.index(f"kitti/training/{file.stem}")
        width, height = disk_size(dataset, i)
        cropped = data.crop_to_view(dataset.load(i, (height, width)))
        reduced = np.fromfile(file, np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(cropped.points[:, :4], reduced)


def test_real_kitti_boxes_project_onto_their_labels(kitti_root):
    dataset = data.open_dataset(kitti_root)
    cars = 0
    for i in range(len(dataset)):
        rows = dataset.annotations(i)
        width, height = disk_size(dataset, i)
        frame = dataset.load(i, (height, width))
        for row in rows[(rows["type"] == "Car") & (rows["truncated"] == 0)]:
            same = (abs(frame.boxes[:, :3] - row["box"][:3]) < 1e-3).all(1)
            uvd = project(data.box_corners(frame.boxes[same][0]), frame.lidar2img[0])
            low = np.clip(uvd[:, :2].min(0), 0, (width - 1, height - 1))
            high = np.clip(uvd[:, :2].max(0), 0, (width - 1, height - 1))
            left_top = row["bbox"][:2]
            right_bottom = row["bbox"][2:]
            both = np.prod(np.minimum(high, right_bottom) - np.maximum(low, left_top))
            union = np.prod(high - low) + np.prod(right_bottom - left_top) - both
            assert both / union > 0.9, (frame.name, row)
            cars += 1
    assert cars == 8 or kitti_root.name != "kitti"


# ---- broken KITTI folders ------------------------------------------------------------

def edit_text(pattern, change):
    """Rewrite the first file of that pattern as change(text)."""
    def rewrite(root):
        file = first_file(root, pattern)
        put(file, change(file.read_text()).encode())
    return rewrite


def substitute(pattern, old, new):
    return edit_text(pattern, lambda text: text.replace(old, new))


def set_tr_velo(numbers):
    """Put other numbers into the last line of the first calibration file."""
    def change(text):
        return text[:text.index("Tr_velo")] + f"Tr_velo_to_cam: {numbers}\n"
    return edit_text("training/calib/*", change)


def set_calibration(key, count):
    """Zeros for the numbers of one line of the first calibration file."""
    def change(text):
        lines = [f"{key}: {'0 ' * count}" if line.startswith(f"{key}:") else line
                 for line in text.splitlines()]
        return "\n".join(lines)
    return edit_text("training/calib/*", change)


def rescaled(root):
    file = first_file(root, "training/velodyne/*.bin")
    points = np.fromfile(file, np.float32).reshape(-1, 4)
    put(file, (points * [1, 1, 1, 255]).astype(np.float32).tobytes())


BROKEN_KITTI_FILES = {
    "truncated scan": (
        cut("training/velodyne/*", -7),
        ["kitti/training/000000", "velodyne/000000.bin", "12793 bytes", "N x 16", "extract"]),
    "empty scan": (cut("training/velodyne/*", 0), ["velodyne/000000.bin", "0 bytes", "N > 0"]),
    "reflectance to 255": (rescaled, ["velodyne/000000.bin", "0..1", "four float32"]),
    "truncated picture": (
        cut("training/image_2/*", 999),
        ["kitti/training/000000", "image_2/000000.png", "not a whole", "999 bytes"]),
}
BROKEN_KITTI_TEXTS = {
    "no P2": (substitute("training/calib/*", "P2:", "P9:"),
              ["calib/000000.txt", "no line P2", "P0, P9, R0_rect"]),
    "a word in R0_rect": (substitute("training/calib/*", "R0_rect: ", "R0_rect: one "),
                          ["calib/000000.txt", "R0_rect: one", "9 finite numbers"]),
    "P2 of zeros": (set_calibration("P2", 12),
                    ["kitti/training/000000: image_2: its projection matrix is singular",
                     "calib/000000.txt"]),
    "R0_rect of zeros": (set_calibration("R0_rect", 9),
                         ["kitti/training/000000: ", "calib/000000.txt", "expected a rotation"]),
    "eleven numbers": (set_tr_velo("0 1 2 3 4 5 6 7 8 9 10"),
                       ["Tr_velo_to_cam", "expected 12"]),
    "not a number": (set_tr_velo("nan " * 12), ["Tr_velo_to_cam", "finite"]),
    "fourteen columns": (
        substitute("training/label_2/*", " 0.6\n", "\n"),
        ["kitti/training/000000", "label_2/000000.txt", "line 1", "14 finite numbers"]),
    "a box of no size": (substitute("training/label_2/*", "1.5 1.6 4.2", "1.5 -1 4.2"),
                         ["label_2/000000.txt", "line 1", "between 0 and 100 m"]),
    "a word for a number": (substitute("training/label_2/*", "Van 0.00", "Van x"),
                            ["label_2/000000.txt", "line 2"]),
    "labels that are no text": (overwrite("training/label_2/000000.txt", b"\xff\xfe\x00"),
                                ["label_2/000000.txt", "cannot be read"]),
    "a strange ImageSet": (edit_text("ImageSets/train.txt", lambda text: "0.png\n" + text),
                           ["ImageSets/train.txt", "entry 1", "'0.png'", "digits only"]),
    "a name that is no text": (
        lambda root: os.rename(first_file(root, "training/velodyne/*.bin"),
                               os.fsencode(root) + b"/training/velodyne/\xff.bin"),
        ["training/velodyne", "\\udcff.bin", "rename"]),
    "train.txt alone": (remove("ImageSets/val.txt"),
                        ["ImageSets has train.txt alone", "or neither"]),
    "a frame in two splits": (edit_text("ImageSets/val.txt", lambda text: text + "000000\n"),
                              ["ImageSets/val.txt", "000000", "train.txt too"]),
}
BROKEN_KITTI = {**BROKEN_KITTI_FILES, **BROKEN_KITTI_TEXTS}


@pytest.mark.parametrize("kind", ["image_2", "velodyne", "calib", "label_2"])
def test_a_kitti_frame_that_lacks_one_file_is_left_out_and_counted(kitti, tmp_path, capsys, kind):
    root = clone(kitti, tmp_path)
    first_file(root, f"training/{kind}/*[!y]").unlink()
    dataset = data.open_dataset(root)
    message = rf"1 of the 4 object frames lack files \({kind} 1\), the first is training/{kind} of"
    assert re.search(message, capsys.readouterr().out)
    assert names_of_splits(dataset)[0] == KITTI_SPLITS[0][1:]
    assert data.doctor(str(root)) == []
    unlabelled = data.open_dataset(root, labels=False)
    if kind == "label_2":    # pre-training has all of them
        assert names_of_splits(unlabelled) == KITTI_SPLITS
        boxes = [len(unlabelled.load(i).boxes) for i in range(3)]
        assert boxes == [0, 1, 1]


@pytest.mark.parametrize("change", [
    lambda text: text + "\n",
    lambda text: text + "   \n",
    lambda text: text.replace("\n", " 0.87\n"),
    lambda text: "\ufeff" + text,
    lambda text: text.replace("Van", "Boat")], ids=["blank", "spaces", "score", "BOM", "class"])
def test_labels_as_people_have_them_are_read(kitti, tmp_path, capsys, change):
    root = clone(kitti, tmp_path)
    expected = data.open_dataset(kitti).annotations(0)
    edit_text("training/label_2/*", change)(root)
    data.print_once.cache_clear()
    dataset = data.open_dataset(root)
    rows = dataset.annotations(0)
    kinds = ["Car", "Misc", "DontCare"] if "Boat" in change("Van") else ["Car", "Van", "DontCare"]
    assert rows["type"].tolist() == kinds and rows["label"].tolist() == [0, -1, -1]
    assert (rows["box"] == expected["box"])[:2, :7].all()
    dataset.annotations(0)
    said = capsys.readouterr().out.count("objects of class 'Boat' count as none of Car, ")
    assert said == ("Misc" in kinds)


def test_damaged_labels_do_not_stop_what_demands_none(kitti, tmp_path):
    root = clone(kitti, tmp_path)
    put(root / "training/label_2/000000.txt", b"\xff\xfe\x00")
    with pytest.raises(data.DataError, match="000000.txt cannot be read"):
        data.open_dataset(root).load(0)
    dataset = data.open_dataset(root, labels=False)
    assert [len(dataset.load(i).boxes) for i in range(3)] == [0, 1, 1]


def test_kitti_as_people_have_it(kitti, tmp_path, capsys):
    """Reduced clouds alone, jpg, ids of three digits, a copy of a raw scan."""
    root = clone(kitti, tmp_path / "reduced")
    points = data.open_dataset(kitti).load(0).points
    for folder in ("training", "testing"):
        (root / folder / "velodyne").rename(root / folder / "velodyne_reduced")
    capsys.readouterr()
    assert (data.open_dataset(root).load(0).points == points).all()
    assert "velodyne_reduced/ is read" in capsys.readouterr().out

    root = clone(kitti, tmp_path / "jpg")
    for file in root.glob("training/image_2/*.png"):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    assert names_of_splits(data.open_dataset(root)) == KITTI_SPLITS
    assert data.open_dataset(root).load(0).images[0].shape == (3, 384, 1248)

    root = clone(kitti, tmp_path / "short")
    for file in list(root.glob("training/*/*")):
        file.rename(file.with_name(file.name[3:]))
    for split in ("train", "val"):
        text = (root / f"ImageSets/{split}.txt").read_text().replace("000", "", 1)
        put(root / f"ImageSets/{split}.txt", ("\ufeff" + text.replace("\n000", "\n")).encode())
    assert names_of_splits(data.open_dataset(root))[1] == ["kitti/training/007"]

    root = raw_root(clone(kitti, tmp_path / "raw"))
    scan = first_file(root, "*/velodyne_points/data/*.bin")
    image = first_file(root, "*/image_02/data/*.png")
    for file in (scan, image):
        shutil.copy(file, file.with_name(f"{file.stem} (copy){file.suffix}"))
    data.print_once.cache_clear()
    assert data.open_dataset(root).names == data.open_dataset(raw_root(kitti)).names
    assert "2 raw frames have only a scan or only an image, no number" in capsys.readouterr().out
    (root / "calib_velo_to_cam.txt").unlink()
    with pytest.raises(data.DataError, match="no calibration .*left out"):
        data.open_dataset(root)


@pytest.mark.parametrize("name", ["training", "training/velodyne", "training/label_2",
                                  "ImageSets"])
def test_kitti_folders_may_be_links(kitti, tmp_path, name):
    root = clone(kitti, tmp_path / "root")
    link_folder(name)(root)
    assert same_frames(data.open_dataset(root), data.open_dataset(kitti))


@pytest.mark.parametrize("case", BROKEN_KITTI)
def test_broken_kitti_folder(kitti, tmp_path, case):
    root = clone(kitti, tmp_path / "root")
    breaks, fragments = BROKEN_KITTI[case]
    breaks(root)
    check_refused(data.Kitti, root, fragments)


def test_broken_raw_calibration(kitti, tmp_path):
    root = raw_root(clone(kitti, tmp_path / "root"))
    substitute("calib_velo_to_cam.txt", "R:", "S:")(root)
    message = ("kitti/2011_09_26_drive_0009_sync/0000000000: "
               ".*calib_velo_to_cam.txt has no line R")
    with pytest.raises(data.DataError, match=message):
        data.Kitti(root).load(0)


def test_kitti_batches_do_not_depend_on_workers_and_prepared_files_do_not_clash(kitti, new_cache):
    batches = []
    for workers in (0, 2):
        loader = data.loader(kitti, "train", 2, preset="small", workers=workers, augment=jiggle,
                             prepare=Heights())
        batches.append(take(loader.begin_at(1), 2))
    for a, b in zip(*batches, strict=True):
        assert_same(a, b)
    files = {path.name for path in new_cache.rglob("*.npz")}
    assert files == {"kitti_training_000000.npz", "kitti_training_000003.npz"}


# ---- the doctor ----------------------------------------------------------------------

def test_the_doctor_finds_nothing_wrong(world, kitti, capsys):
    assert data.doctor(str(world)) == []
    assert data.doctor(str(kitti)) == []
    assert data.doctor(str(raw_root(kitti)), True) == []
    output = capsys.readouterr().out
    assert "CAM_BACK_LEFT" in output and "image_2" in output
    assert "boxes hold the number of LiDAR points" in output
    assert "3 of 3 unoccluded cars" in output


def test_the_doctor_finds_nothing_wrong_with_real_nuscenes(nuscenes_root, capsys):
    assert data.doctor(str(nuscenes_root)) == []
    small = (nuscenes_root.parent / "golden_counts.json").exists()
    assert "724 of 724 boxes" in capsys.readouterr().out or not small


def test_the_doctor_finds_nothing_wrong_with_real_kitti(kitti_root):
    assert data.doctor(str(kitti_root)) == []
    assert data.doctor(str(raw_root(kitti_root))) == []


def sensor_token(root, channel):
    """Token of the sensor of that channel."""
    rows = json.loads(next(root.glob("v1.0-*/sensor.json")).read_text())
    return next(row["token"] for row in rows if row["channel"] == channel)


def recalibrate(channel, **values):
    """Set fields of every calibrated_sensor row of a channel.

    A value may be a function of the old one.
    """
    def breaks(root):
        token = sensor_token(root, channel)

        def change(rows):
            for row in rows:
                if row["sensor_token"] == token:
                    for field, value in values.items():
                        row[field] = value(row[field]) if callable(value) else value
        edit(root, "calibrated_sensor", change)
    return breaks


def exchange_front_and_back(root):
    front = sensor_token(root, "CAM_FRONT")
    back = sensor_token(root, "CAM_BACK")
    other = {front: back, back: front}

    def change(rows):
        for row in rows:
            row["sensor_token"] = other.get(row["sensor_token"], row["sensor_token"])
    edit(root, "calibrated_sensor", change)


def blacken(root):
    for file in (root / "samples/CAM_BACK_LEFT").iterdir():
        Image.fromarray(np.zeros((96, 256, 3), np.uint8)).save(root / "black.jpg")
        assert Image.open(file).size == (256, 96)
        put(file, (root / "black.jpg").read_bytes())


def flatten_intensity(points):
    points[:, 3] = 7


def swap_sides(rows):
    for row in rows:
        width, length, height = row["size"]
        row["size"] = [length, width, height]


def reverse_places(rows):
    for row in rows:
        row["translation"].reverse()


def swap_kitti_sides(root):
    for file in (root / "training/label_2").iterdir():
        substitute(f"training/label_2/{file.name}", "1.5 1.6 4.2", "4.2 1.6 1.5")(root)


def longer(K):
    """An intrinsic matrix with 20 times the focal length."""
    return [[K[0][0] * 20, K[0][1], K[0][2]], [K[1][0], K[1][1] * 20, K[1][2]], K[2]]


def mirrored(K):
    return [[-K[0][0], *K[0][1:]], K[1], K[2]]


def singular(K):
    return [[0, 0, 0]] * 3


# case: what is done to a copy, and what one of the doctor's lines must contain
SICK_FILES = {
    "truncated sweep": (cut("samples/LIDAR_TOP/*", -7),
                        ["nuscenes/", "LIDAR_TOP", "N x 20", "extract"]),
    "truncated picture": (cut("samples/CAM_FRONT/*", 900),
                          ["nuscenes/", "CAM_FRONT", "not a whole", "extract"]),
    "damaged picture": (middle(lambda whole, half: whole[:half] + whole[half + 999:]),
                        ["nuscenes/", "CAM_FRONT", "damaged JPEG", "Corrupt", "extract"]),
    "wrong size": (resized, ["nuscenes/", "CAM_BACK", "50 x 40", "extract"]),
    "missing table": (remove("v1.0-*/ego_pose.json"), ["ego_pose.json", "missing", "extract"]),
    "dangling token": (no_row("instance"),
                       ["sample_annotation.json", "instance_token", "instance.json"]),
    "black pictures": (blacken, ["CAM_BACK_LEFT: the image has one colour", "extract"]),
    "one intensity": (change_points(flatten_intensity), ["nuscenes/", "intensity", "extract"]),
    "few points": (cut("samples/LIDAR_TOP/*", 4000),
                   ["nuscenes/", "points in the keyframe sweep", "thousands"]),
    "width and length": (table("sample_annotation", swap_sides),
                         ["boxes hold the number", "sample_annotation.json", "at least 90 %"]),
    "boxes elsewhere": (table("sample_annotation", reverse_places), ["boxes hold the number"]),
}
SICK_CAMERAS = {
    "two cameras exchanged": (
        exchange_front_and_back,
        ["CAM_FRONT: it looks", "expected 0 +- 30", "calibrated_sensor.json"]),
    "a camera turned up": (
        recalibrate("CAM_BACK", rotation=[1, 0, 0, 0]),
        ["CAM_BACK: ", "degrees from down", "calibrated_sensor.json"]),
    "a camera far away": (
        recalibrate("CAM_FRONT_LEFT", translation=[1, 40, 1]),
        ["CAM_FRONT_LEFT: it stands", "less than 5 m", "calibrated_sensor.json"]),
    "a long lens": (recalibrate("CAM_FRONT", camera_intrinsic=longer),
                    ["CAM_FRONT: its focal length", "0.25 to 4"]),
    "a mirrored camera": (recalibrate("CAM_FRONT", camera_intrinsic=mirrored),
                          ["CAM_FRONT: it is mirrored"]),
    "a LiDAR not turned": (recalibrate("LIDAR_TOP", rotation=[1, 0, 0, 0]),
                           ["it looks", "calibrated_sensor.json"]),
    "no picture of anything": (recalibrate("CAM_BACK", camera_intrinsic=singular),
                               ["CAM_BACK: its projection matrix is singular"]),
}
SICK_KITTI = {
    "l, w, h": (swap_kitti_sides, ["unoccluded cars", "at least 90 %"]),
    "axes of the LiDAR": (set_tr_velo("1 0 0 0 0 1 0 0 0 0 1 0"),
                          ["image_2: ", "calib/000000.txt"]),
}
for case in ("truncated scan", "truncated picture", "no P2", "fourteen columns",
             "a frame in two splits", "P2 of zeros", "R0_rect of zeros"):
    SICK_KITTI[case] = BROKEN_KITTI[case]
SICK = {
    **SICK_FILES,
    **SICK_CAMERAS,
    **{f"kitti: {case}": entry for case, entry in SICK_KITTI.items()},
}


@pytest.mark.parametrize("case", SICK)
def test_the_doctor_names_the_culprit(world, kitti, tmp_path, case, monkeypatch, capsys):
    breaks, fragments = SICK[case]
    healthy = kitti if case.startswith("kitti: ") else Path(world)
    root = clone(healthy, tmp_path / "root")
    breaks(root)
    monkeypatch.setattr("sys.argv", ["data.py", str(root)])
    with pytest.raises(SystemExit) as end:
        data.main()
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("WRONG")]
    named = [line for line in lines if all(fragment in line for fragment in fragments)]
    assert end.value.code == 1 and named, lines


def test_the_doctor_says_a_common_fault_once(world, tmp_path, capsys):
    """A sweep that several frames read; two frames with faults of their own."""
    root = clone(Path(world), tmp_path)
    with_value(1, np.nan)(root)
    faults = data.doctor(str(root))
    readers = [fault for fault in faults if "have columns" in fault or "has columns" in fault]
    assert len(readers) == 1 and "(and of " in readers[0] and readers[0].startswith("nuscenes/")
    assert len(data.merge_faults([("a", "a: x"), ("b", "b: y"), ("c", "c: x")])) == 2


@pytest.mark.filterwarnings("error")
def test_the_doctor_of_an_empty_sweep_prints_no_nan(three_frames, tmp_path, capsys):
    root = clone(Path(three_frames), tmp_path)
    point = np.array([[.5, .5, -.3, 9, 3]], np.float32)    # on the car
    for file in root.glob("samples/LIDAR_TOP/*"):
        put(file, point.tobytes())
    faults = data.doctor(str(root))
    assert "CAM_FRONT 0.0%" in capsys.readouterr().out
    assert any("0 points in the keyframe sweep" in fault for fault in faults)


def test_the_doctor_may_be_cut_short_by_head(tmp_path):
    script = Path(data.__file__)
    done = subprocess.run(f"{sys.executable} -u {script} {tmp_path} | true", shell=True,
                          capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
