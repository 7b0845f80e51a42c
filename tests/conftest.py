"""Fixtures: a tiny embedded world, a fabricated KITTI folder, the real frames where there are any."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch loads OpenMP: threads that spin starve the other processes of a shared machine
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's caches."""
    os.environ["LIDAR_CAMERA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Root of an embedded world of 2 + 1 scenes x 3 keyframes."""
    import synthetic
    root = tmp_path_factory.mktemp("world") / "world"
    synthetic.write(root, train=2, val=1, frames=3)
    return root


@pytest.fixture(scope="session")
def three_frames(tmp_path_factory):
    """Root of an embedded world of 2 + 1 frames: for whole runs."""
    import synthetic
    root = tmp_path_factory.mktemp("three") / "world"
    synthetic.write(root, train=2, val=1, frames=1)
    return root


@pytest.fixture(scope="session")
def nuscenes_root():
    """Real nuScenes frames: $NUSCENES, or shared/real/nuscenes beside the checkout."""
    named = os.environ.get("NUSCENES")
    root = Path(named) if named else ROOT.parent / "shared" / "real" / "nuscenes"
    if not root.is_dir():
        pytest.skip(f"no real nuScenes frames: NUSCENES names no folder and {root} does not exist")
    return root


@pytest.fixture(scope="session")
def kitti_root():
    """Real KITTI frames: $KITTI, or shared/real/kitti beside the checkout."""
    named = os.environ.get("KITTI")
    root = Path(named) if named else ROOT.parent / "shared" / "real" / "kitti"
    if not root.is_dir():
        pytest.skip(f"no real KITTI frames: KITTI names no folder and {root} does not exist")
    return root


# What the fabricated KITTI folder is made of: a left colour camera 6 cm right of camera 0, rectification by a turn about the vertical, a LiDAR above.
P2 = np.array([[700., 0, 600, 42], [0, 700, 180, 0.3], [0, 0, 1, 0.003]])
R0 = Rotation.from_euler("y", 1.5, degrees=True).as_matrix()
TR = np.c_[np.array([[0., -1, 0], [0, 0, -1], [1, 0, 0]]) @ Rotation.from_euler("z", -2, degrees=True).as_matrix(), [0.02, -0.08, -0.27]]
CAR = dict(location=[2.5, 1.7, 14.], hwl=[1.5, 1.6, 4.2], rotation_y=0.6)           # rectified camera 0: x right, y down; the middle of its bottom


def car_corners(location, hwl, rotation_y):
    """Corners of a label in rectified camera 0, as the official devkit's readme has them. -> (8, 3)."""
    h, w, l = hwl
    x, y, z = np.array([[l, l, -l, -l] * 2, [0] * 4 + [-2 * h] * 4, [w, -w, -w, w] * 2]) / 2
    cos, sin = np.cos(rotation_y), np.sin(rotation_y)
    return np.stack([cos * x + sin * z, y, -sin * x + cos * z], 1) + location


@pytest.fixture(scope="session")
def kitti(tmp_path_factory):
    """Root of a fabricated KITTI folder: four object frames (train, train, val; testing), a raw drive of four scans and three pictures.

    Pictures are ramps, red the column and green the row; each scan holds 400 points made from a pixel and a depth (kept beside it as .uvd.npy) and 400 anywhere.
    """
    root, rng = tmp_path_factory.mktemp("kitti"), np.random.default_rng(5)
    rect, mount = np.eye(4), np.eye(4)
    rect[:3, :3], mount[:3] = R0, TR
    corners = car_corners(**CAR) @ P2[:, :3].T + P2[:, 3]
    corners = corners[:, :2] / corners[:, 2:]
    bbox = *corners.min(0), *corners.max(0)
    car = f"Car 0.00 0 -0.2 {' '.join(map('{:.2f}'.format, bbox))} {' '.join(map(str, CAR['hwl'] + CAR['location']))} {CAR['rotation_y']}"
    label = f"{car}\nVan 0.00 1 0 1 2 30 40 2 2 5 -9 1.6 30 1.5\nDontCare -1 -1 -10 800 160 825 180 -1 -1 -1 -1000 -1000 -1000 -10\n"

    def line(key, matrix):
        return f"{key}: {' '.join(f'{v:.12e}' for v in np.ravel(matrix))}\n"

    def write(cloud, picture, size):
        for file in (cloud, picture):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        u, v = np.meshgrid((np.arange(width) + .5) / width, (np.arange(height) + .5) / height)
        Image.fromarray((np.stack([u, v, 0 * u], 2) * 255).round().astype(np.uint8)).save(root / picture)
        uvd = rng.uniform((0, 0, 2), (width, height, 40), (400, 3))
        rectified = np.linalg.solve(P2[:, :3], (np.c_[uvd[:, :2], np.ones(400)] * uvd[:, 2:]).T - P2[:, 3:]).T
        seen = (np.linalg.inv(rect @ mount) @ np.c_[rectified, np.ones(400)].T).T[:, :3]
        points = np.concatenate([seen, rng.uniform((-40, -40, -2), (40, 40, 2), (400, 3))])
        np.c_[points, np.arange(800) % 100 / 100].astype(np.float32).tofile(root / cloud)
        np.save(root / cloud.replace(".bin", ".uvd.npy"), uvd)

    for folder, names in (("training", ("000000", "000003", "000007")), ("testing", ("000000",))):
        for name, size in zip(names, ((1242, 375), (1224, 370), (1238, 374))):
            write(f"{folder}/velodyne/{name}.bin", f"{folder}/image_2/{name}.png", size)
            for kind in ("calib", "label_2")[:2 if folder == "training" else 1]:
                (root / folder / kind).mkdir(exist_ok=True)
            (root / folder / "calib" / f"{name}.txt").write_text(line("P0", P2) + line("P2", P2) + line("R0_rect", R0) + line("Tr_velo_to_cam", TR) + "\n")
            if folder == "training":
                (root / folder / "label_2" / f"{name}.txt").write_text(label)
    (root / "ImageSets").mkdir()
    for split, names in (("train", "000000\n000003\n000004"), ("val", "000007\n"), ("test", "000000\n000001")):
        (root / "ImageSets" / f"{split}.txt").write_text(names)
    for number in range(4):
        drive = "2011_09_26/2011_09_26_drive_0009_sync"
        write(f"{drive}/velodyne_points/data/{number:010d}.bin", f"{drive}/image_02/data/{number:010d}.png", (1242, 375))
    (root / drive / "image_02/data/0000000002.png").unlink()
    (root / "2011_09_26/calib_cam_to_cam.txt").write_text("calib_time: 09-Jan-2012 13:57:47\n" + line("R_rect_00", R0) + line("P_rect_02", P2))
    (root / "2011_09_26/calib_velo_to_cam.txt").write_text("calib_time: 15-Mar-2012 11:37:16\n" + line("R", TR[:, :3]) + line("T", TR[:, 3]))
    return root
