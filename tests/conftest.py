"""Fixtures: a tiny embedded world, a fabricated KITTI folder, the real frames where there are any."""
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch loads OpenMP: threads that spin starve the other processes of a shared machine
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402


def run(script, out, *flags):
    """A script as it is run, a narrow trunk and one frame a step. -> subprocess.CompletedProcess"""
    command = [sys.executable, str(ROOT / script), "--out", str(out), "--preset", "small", "--batch", "1", "--width", "4", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


# ---- processes forked from a server that has imported everything: one takes a fraction of a second ----

@pytest.fixture(scope="session")
def server():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([before] if before else [])])
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["test_faults", "test_common", "torch.utils.tensorboard", "matplotlib.pyplot", "nuscenes.eval.detection.evaluate"])
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return fork


def die_with_the_server():
    """Ask Linux to kill this process when the one that forked it ends: nothing outlives pytest, whatever ends that."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)                          # PR_SET_PDEATHSIG


def one_of_two(function, rank, folder):
    die_with_the_server()
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=100))
    words = torch.load(f"{folder}/words.pt", weights_only=False)        # a file: a process takes no more than 256 tensors as arguments
    torch.save(function(rank, *words), f"{folder}/{rank}.pt")
    common.destroy_group()
    os._exit(0)                                                         # gloo's threads may abort a finished interpreter


def on_two(server, function, folder, *words):
    """function(rank, *words) on two processes of one group -> what each returned."""
    torch.save(words, folder / "words.pt")
    both = [server.Process(target=one_of_two, args=(function, rank, str(folder))) for rank in (0, 1)]
    for process in both:
        process.start()
    try:
        for process in both:
            process.join(120)
        assert [process.exitcode for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    return [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]


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
    alpha = CAR["rotation_y"] - np.arctan2(CAR["location"][0], CAR["location"][2])
    car = f"Car 0.00 0 {alpha:.2f} {' '.join(map('{:.2f}'.format, bbox))} {' '.join(map(str, CAR['hwl'] + CAR['location']))} {CAR['rotation_y']}"
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


# What the fabricated Waymo segment is made of: a flat road and one parked car, seen from a vehicle that drives and turns while it scans, far from the world's origin.
WORLD = np.array([12_345.678, -9_876.543, 67.89])                                   # a place on the road
WAYMO_CAR = dict(centre=np.array([14., 3., 0.9]), size=np.array([4.6, 1.9, 1.8]), yaw=0.4, speed=(-1.2, 0.9))          # relative to WORLD, speed along its axes
TOP2VEHICLE, FRONT2VEHICLE = np.eye(4), np.eye(4)
TOP2VEHICLE[:3, :3], TOP2VEHICLE[:3, 3] = Rotation.from_euler("zyx", [148, 0.6, -0.4], degrees=True).as_matrix(), (1.43, 0.02, 2.18)
FRONT2VEHICLE[:3, :3], FRONT2VEHICLE[:3, 3] = Rotation.from_euler("zy", [2, 1], degrees=True).as_matrix(), (4.07, 0, 0.69)
INCLINATIONS = np.radians(-17.6 + 20 * np.linspace(0, 1, 24) ** 0.7)                # lowest first, not uniform
LENS = (0.045, -0.02, 0.001, -0.0015, 0.003)                                        # k1, k2, p1, p2, k3
WAYMO_SIZES = ((384, 256),) * 3 + ((384, 176),) * 2                                # width, height
WAYMO_YAWS = (0, 45, -45, 90, -90)
WAYMO_SHUTTER = (0.05, 0.04, 0.06, 0.03, 0.07)                                      # s after the scan's start


def waymo_pose(seconds):
    """Vehicle to world: 8 m/s ahead, turning 0.2 rad/s, pitching."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", [0.01, 0.02 * np.sin(seconds * 9), 0.3 + 0.2 * seconds]).as_matrix()
    matrix[:3, 3] = WORLD + [8 * seconds, 1.5 * seconds, 0.05 * np.sin(seconds * 7)]
    return matrix


def waymo_camera(number):
    """-> intrinsic f_u, f_v, c_u, c_v; camera to vehicle (4, 4), x out of the lens, y left, z up."""
    width, height = WAYMO_SIZES[number - 1]
    extrinsic = np.eye(4)
    extrinsic[:3, :3] = Rotation.from_euler("zyx", [WAYMO_YAWS[number - 1], 1.0, -0.5], degrees=True).as_matrix()
    extrinsic[:3, 3] = 1.5 + 0.1 * number, 0.05 * number, 2.1
    return (0.95 * width, 0.96 * width, 0.51 * width, 0.49 * height), extrinsic


def distort(u, v):
    """Ideal to real normalised picture coordinates, OpenCV's five numbers."""
    k1, k2, p1, p2, k3 = LENS
    r = u * u + v * v
    radial = 1 + k1 * r + k2 * r ** 2 + k3 * r ** 3
    return u * radial + 2 * p1 * u * v + p2 * (r + 2 * u * u), v * radial + p1 * (r + 2 * v * v) + 2 * p2 * u * v


def first_hit(origin, ray):
    """Distance (n,) from origins (n, 3) along rays (n, 3) in the world to the road or the car, and which (n,): 0 nothing, 1 road, 2 car."""
    with np.errstate(divide="ignore", invalid="ignore"):
        road = np.where(ray[:, 2] < -1e-6, (WORLD[2] - origin[:, 2]) / ray[:, 2], np.inf)
        turn = Rotation.from_euler("z", WAYMO_CAR["yaw"]).as_matrix()
        o, r, half = (origin - WORLD - WAYMO_CAR["centre"]) @ turn, ray @ turn, WAYMO_CAR["size"] / 2
        enter, leave = np.sort(np.stack([(-half - o) / r, (half - o) / r]), 0)
    enter, leave = enter.max(1), leave.min(1)
    car = np.where((enter < leave) & (enter > 0), enter, np.inf)
    distance = np.minimum(road, car)
    return np.where(distance < 70, distance, 0.), np.where(distance >= 70, 0, np.where(car < road, 2, 1))


def scan(extrinsic, inclinations, columns, poses):
    """A range image (H, W) of metres and which was hit; the vehicle's pose when each column was shot (W, 4, 4)."""
    inclination, column = np.meshgrid(inclinations[::-1], np.arange(columns), indexing="ij")
    azimuth = np.pi - (column + 0.5) / columns * 2 * np.pi - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    ray = np.stack([np.cos(azimuth) * np.cos(inclination), np.sin(azimuth) * np.cos(inclination), np.sin(inclination)], -1)
    laser2world = poses @ extrinsic                                                 # (W, 4, 4)
    ray = np.einsum("wij,hwj->hwi", laser2world[:, :3, :3], ray)
    origin = np.broadcast_to(laser2world[:, :3, 3], ray.shape)
    distance, what = first_hit(origin.reshape(-1, 3), ray.reshape(-1, 3))
    return distance.reshape(column.shape), what.reshape(column.shape)


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet as parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


@pytest.fixture(scope="session")
def waymo(tmp_path_factory):
    """Root of a fabricated Waymo v2 folder: one segment of three frames in training, one of two in validation, in the official column names and types."""
    import io

    import pyarrow as pa
    root, floats = tmp_path_factory.mktemp("waymo"), pa.list_(pa.float32())
    for folder, segment, count in (("training", "1000_000_020_000", 3), ("validation", "2000_000_020_000", 2)):
        rows = {name: [] for name in ("lidar", "pose", "projection", "image", "vehicle", "box")}
        for frame in range(count):
            micros, start = 1_550_000_000_000_000 + 500_000 * frame, 0.5 * frame
            pose = waymo_pose(start + 0.05)                                         # the frame's own: the middle of the scan
            columns = np.stack([waymo_pose(start + 0.1 * (w + 0.5) / 300) for w in range(300)])
            top, hit = scan(TOP2VEHICLE, INCLINATIONS, 300, columns)
            low, high = -0.9, 0.3
            front, front_hit = scan(FRONT2VEHICLE, (np.arange(20) + 0.5) / 20 * (high - low) + low, 60, np.broadcast_to(pose, (60, 4, 4)))
            for laser, image in ((1, top), (2, front)):
                extra = np.where(image > 0, np.hypot(*np.indices(image.shape)) % 3, 0)
                values = np.stack([np.where(image > 0, image, -1), extra, 0 * image, 0 * image - 1], -1).astype(np.float32)
                values[15:18, 7:19, 3] = 1                                              # a no-label zone
                rows["lidar"].append((segment, micros, laser, values.ravel(), values.shape, np.full(values.size, -1, np.float32), values.shape))
            angles = Rotation.from_matrix(columns[:, :3, :3]).as_euler("xyz")
            per_pixel = np.broadcast_to(np.concatenate([angles, columns[:, :3, 3]], 1), (len(INCLINATIONS), 300, 6)).astype(np.float32)
            rows["pose"].append((segment, micros, 1, per_pixel.ravel(), per_pixel.shape))
            rows["vehicle"].append((segment, micros, pose.ravel()))
            world2vehicle = np.linalg.inv(pose)
            centre = world2vehicle[:3, :3] @ (WORLD + WAYMO_CAR["centre"]) + world2vehicle[:3, 3]
            heading = WAYMO_CAR["yaw"] - Rotation.from_matrix(pose[:3, :3]).as_euler("xyz")[2]
            for kind, name in ((1, "car"), (3, "sign")):                           # with some room
                count_ = int((hit == 2).sum() + (front_hit == 2).sum())
                rows["box"].append((segment, micros, name, *centre, *(WAYMO_CAR["size"] + [0.15, 0.15, 0]), heading, *WAYMO_CAR["speed"], kind, count_, 1))
            for number, (width, height) in enumerate(WAYMO_SIZES, 1):
                (f_u, f_v, c_u, c_v), extrinsic = waymo_camera(number)
                real = np.stack(np.meshgrid((np.arange(width) + 0.5 - c_u) / f_u, (np.arange(height) + 0.5 - c_v) / f_v))
                ideal = real.copy()
                for _ in range(30):
                    ideal = ideal + real - np.stack(distort(*ideal))
                picture = np.stack([128 + 150 * ideal[0], 128 + 250 * ideal[1], np.full(ideal[0].shape, 40 * number)], -1).clip(0, 255)
                data = io.BytesIO()
                Image.fromarray(picture.round().astype(np.uint8)).save(data, "JPEG", quality=97, subsampling=0)
                rows["image"].append((segment, micros, number, data.getvalue(), waymo_pose(start + WAYMO_SHUTTER[number - 1]).ravel()))
        keys = dict(segment=("key.segment_context_name", pa.string()), time=("key.frame_timestamp_micros", pa.int64()), laser=("key.laser_name", pa.int8()),
                    camera=("key.camera_name", pa.int8()), object=("key.laser_object_id", pa.string()))

        def table(tag, rows, *columns, folder=folder, segment=segment, keys=keys):
            named = [keys.get(column, column) for column in columns]
            write_parquet(root / folder / tag / f"{segment}.parquet",
                          {name: pa.array([row if not isinstance(row, np.ndarray) else row.tolist() for row in values], kind)
                           for (name, kind), values in zip(named, zip(*rows))})
        shape = pa.list_(pa.int32(), 3)
        part = "[LiDARComponent].range_image_return"
        table("lidar", rows["lidar"], "segment", "time", "laser", *[(f"{part}{n}.{name}", kind) for n in (1, 2) for name, kind in (("values", floats), ("shape", shape))])
        part = "[LiDARPoseComponent].range_image_return1."
        table("lidar_pose", rows["pose"], "segment", "time", "laser", (part + "values", floats), (part + "shape", shape))
        table("vehicle_pose", rows["vehicle"], "segment", "time", ("[VehiclePoseComponent].world_from_vehicle.transform", pa.list_(pa.float64(), 16)))
        part = "[LiDARCalibrationComponent]."
        lasers = [(segment, 1, TOP2VEHICLE.ravel(), INCLINATIONS[0], INCLINATIONS[-1], INCLINATIONS), (segment, 2, FRONT2VEHICLE.ravel(), low, high, None)]
        table("lidar_calibration", lasers, "segment", "laser", (part + "extrinsic.transform", pa.list_(pa.float64(), 16)), (part + "beam_inclination.min", pa.float64()),
              (part + "beam_inclination.max", pa.float64()), (part + "beam_inclination.values", pa.list_(pa.float64())))
        table("camera_image", rows["image"], "segment", "time", "camera", ("[CameraImageComponent].image", pa.binary()),
              ("[CameraImageComponent].pose.transform", pa.list_(pa.float64(), 16)))
        part, lens = "[CameraCalibrationComponent].", [(segment, n, *waymo_camera(n)[0], *LENS, waymo_camera(n)[1].ravel(), *WAYMO_SIZES[n - 1]) for n in range(1, 6)]
        table("camera_calibration", lens, "segment", "camera", *[(f"{part}intrinsic.{name}", pa.float64()) for name in "f_u f_v c_u c_v k1 k2 p1 p2 k3".split()],
              (part + "extrinsic.transform", pa.list_(pa.float64(), 16)), (part + "width", pa.int32()), (part + "height", pa.int32()))
        part = "[LiDARBoxComponent]."
        table("lidar_box", rows["box"], "segment", "time", "object", *[(f"{part}box.{p}.{a}", pa.float64()) for p in ("center", "size") for a in "xyz"],
              (part + "box.heading", pa.float64()), (part + "speed.x", pa.float64()), (part + "speed.y", pa.float64()), (part + "type", pa.int8()),
              (part + "num_lidar_points_in_box", pa.int64()), (part + "difficulty_level.detection", pa.int8()))
    return root


def trained(model):
    """Batch norms as after training: a forgotten or mixed up statistic changes the output. -> the model in eval mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((module.running_mean, -.2, .2), (module.running_var, .3, 2.), (module.weight, .5, 1.5), (module.bias, -.3, .3)):
                torch.nn.init.uniform_(tensor, low, high)
            module.num_batches_tracked.fill_(5)
    return model.eval()
