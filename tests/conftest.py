"""Fixtures: a tiny embedded world, fabricated KITTI and Waymo folders, and real frames."""
import ctypes
import io
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

# Before torch loads OpenMP: threads that spin starve the other processes of a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402


def run(script, out, *flags):
    """A script as a user runs it, with a narrow trunk and one frame a step.

    -> subprocess.CompletedProcess
    """
    command = [sys.executable, str(ROOT / script), "--out", str(out), "--preset", "small",
               "--batch", "1", "--width", "4", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


# ---- waits for a GPU -----------------------------------------------------------------

WAITS = {"nonzero", "_local_scalar_dense", "_unique2", "unique_dim", "unique_consecutive",
         "bincount", "multinomial", "masked_select", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Lists the operators for which a CPU would wait for its GPU, on a CPU too.

    names: theirs, in order. Copies such as tolist() are no operators here, so not among them.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        indices = args[1] if name in INDEXING else ()
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        if masks or name in WAITS or operator == torch.ops.aten.repeat_interleave.Tensor:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


# ---- processes forked from a server that has imported everything --------------------
# One takes a fraction of a second to start.

@pytest.fixture(scope="session")
def server():
    before = os.environ.get("PYTHONPATH")
    path = [str(ROOT), str(ROOT / "tests"), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "test_faults", "test_common", "torch.utils.tensorboard", "matplotlib.pyplot",
        "nuscenes.eval.detection.evaluate",
    ])
    multiprocessing.forkserver.ensure_running()
    if before is None:
        os.environ.pop("PYTHONPATH")
    else:
        os.environ["PYTHONPATH"] = before
    return context


def die_with_the_server():
    """Ask Linux to kill this process when its parent, the server, ends.

    So nothing outlives pytest, however pytest ends.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)    # PR_SET_PDEATHSIG


def one_of_two(function, rank, folder):
    die_with_the_server()
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=100))
    # The arguments come by file: a process takes no more than 256 tensors as arguments.
    words = torch.load(f"{folder}/words.pt", weights_only=False)
    torch.save(function(rank, *words), f"{folder}/{rank}.pt")
    common.destroy_group()
    os._exit(0)    # gloo's threads may abort a finished interpreter


def on_two(server, function, folder, *words):
    """Call function(rank, *words) in two processes of one group. -> what each returned"""
    torch.save(words, folder / "words.pt")
    both = [server.Process(target=one_of_two, args=(function, rank, str(folder)))
            for rank in (0, 1)]
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


# ---- caches, embedded worlds and real frames ----------------------------------------

@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's caches."""
    os.environ["LIDAR_CAMERA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Root of an embedded world of 2 train and 1 val scenes, 3 keyframes each."""
    import synthetic
    root = tmp_path_factory.mktemp("world") / "world"
    synthetic.write(root, train=2, val=1, frames=3)
    return root


@pytest.fixture(scope="session")
def three_frames(tmp_path_factory):
    """Root of an embedded world of 2 train and 1 val frames, for whole runs."""
    import synthetic
    root = tmp_path_factory.mktemp("three") / "world"
    synthetic.write(root, train=2, val=1, frames=1)
    return root


def real_root(variable, folder, title):
    """Root of real frames: what the environment variable names, or shared/real next to the clone.

    The test is skipped where there is no such folder.
    """
    named = os.environ.get(variable)
    root = Path(named) if named else ROOT.parent / "shared" / "real" / folder
    if not root.is_dir():
        pytest.skip(f"no real {title} frames: {variable} names no folder and {root} does not exist")
    return root


@pytest.fixture(scope="session")
def nuscenes_root():
    """Root of real nuScenes frames: $NUSCENES, or shared/real/nuscenes next to the clone."""
    return real_root("NUSCENES", "nuscenes", "nuScenes")


@pytest.fixture(scope="session")
def kitti_root():
    """Root of real KITTI frames: $KITTI, or shared/real/kitti next to the clone."""
    return real_root("KITTI", "kitti", "KITTI")


# ---- a fabricated KITTI folder -------------------------------------------------------
# A left colour camera 6 cm right of camera 0, rectification by a turn about the vertical, and
# a LiDAR above. The car is in rectified camera 0 (x right, y down), located by the middle of
# its bottom.

P2 = np.array([[700., 0, 600, 42], [0, 700, 180, 0.3], [0, 0, 1, 0.003]])
R0 = Rotation.from_euler("y", 1.5, degrees=True).as_matrix()
LIDAR_AXES = np.array([[0., -1, 0], [0, 0, -1], [1, 0, 0]])    # forward, left, up -> camera
TR = np.c_[LIDAR_AXES @ Rotation.from_euler("z", -2, degrees=True).as_matrix(),
           [0.02, -0.08, -0.27]]
CAR = dict(location=[2.5, 1.7, 14.], hwl=[1.5, 1.6, 4.2], rotation_y=0.6)


def car_corners(location, hwl, rotation_y):
    """Corners of a label in rectified camera 0, as in the official devkit's readme. -> (8, 3)"""
    h, w, l = hwl
    x, y, z = np.array([[l, l, -l, -l] * 2, [0] * 4 + [-2 * h] * 4, [w, -w, -w, w] * 2]) / 2
    cos, sin = np.cos(rotation_y), np.sin(rotation_y)
    return np.stack([cos * x + sin * z, y, -sin * x + cos * z], 1) + location


def kitti_label():
    """The label file of every frame: the car, a van and a region that is not labelled."""
    corners = car_corners(**CAR) @ P2[:, :3].T + P2[:, 3]
    corners = corners[:, :2] / corners[:, 2:]
    bbox = *corners.min(0), *corners.max(0)
    alpha = CAR["rotation_y"] - np.arctan2(CAR["location"][0], CAR["location"][2])
    numbers = [f"{alpha:.2f}", *map("{:.2f}".format, bbox)]
    numbers += [str(v) for v in (*CAR["hwl"], *CAR["location"], CAR["rotation_y"])]
    return (f"Car 0.00 0 {' '.join(numbers)}\n"
            "Van 0.00 1 0 1 2 30 40 2 2 5 -9 1.6 30 1.5\n"
            "DontCare -1 -1 -10 800 160 825 180 -1 -1 -1 -1000 -1000 -1000 -10\n")


def calib_line(key, matrix):
    """One line of a KITTI calibration file."""
    return f"{key}: {' '.join(f'{v:.12e}' for v in np.ravel(matrix))}\n"


def write_kitti_frame(root, rng, cloud, picture, size):
    """Write a scan, its picture of size (width, height) px, and the pixels it was made from."""
    for file in (cloud, picture):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    u, v = np.meshgrid((np.arange(width) + .5) / width, (np.arange(height) + .5) / height)
    ramps = (np.stack([u, v, 0 * u], 2) * 255).round().astype(np.uint8)
    Image.fromarray(ramps).save(root / picture)

    uvd = rng.uniform((0, 0, 2), (width, height, 40), (400, 3))
    homogeneous = np.c_[uvd[:, :2], np.ones(400)] * uvd[:, 2:]
    rectified = np.linalg.solve(P2[:, :3], homogeneous.T - P2[:, 3:]).T
    rectify = np.eye(4)
    rectify[:3, :3] = R0
    mount = np.eye(4)
    mount[:3] = TR
    camera2lidar = np.linalg.inv(rectify @ mount)
    seen = (camera2lidar @ np.c_[rectified, np.ones(400)].T).T[:, :3]
    anywhere = rng.uniform((-40, -40, -2), (40, 40, 2), (400, 3))
    points = np.concatenate([seen, anywhere])
    np.c_[points, np.arange(800) % 100 / 100].astype(np.float32).tofile(root / cloud)
    np.save(root / cloud.replace(".bin", ".uvd.npy"), uvd)


@pytest.fixture(scope="session")
def kitti(tmp_path_factory):
    """Root of a fabricated KITTI folder.

    It holds four object frames (train, train, val; testing) and a raw drive of four scans and
    three pictures. Pictures are ramps: red is the column, green the row. Each scan holds 400 points
    made from a pixel and a depth (stored next to it as .uvd.npy) and 400 anywhere.
    """
    root = tmp_path_factory.mktemp("kitti")
    rng = np.random.default_rng(5)
    calib = (calib_line("P0", P2) + calib_line("P2", P2) + calib_line("R0_rect", R0)
             + calib_line("Tr_velo_to_cam", TR) + "\n")

    for folder, names in (("training", ("000000", "000003", "000007")), ("testing", ("000000",))):
        for name, size in zip(names, ((1242, 375), (1224, 370), (1238, 374))):
            write_kitti_frame(root, rng, f"{folder}/velodyne/{name}.bin",
                              f"{folder}/image_2/{name}.png", size)
            (root / folder / "calib").mkdir(exist_ok=True)
            (root / folder / "calib" / f"{name}.txt").write_text(calib)
            if folder == "training":
                (root / folder / "label_2").mkdir(exist_ok=True)
                (root / folder / "label_2" / f"{name}.txt").write_text(kitti_label())
    (root / "ImageSets").mkdir()
    splits = dict(train="000000\n000003\n000004", val="000007\n", test="000000\n000001")
    for split, names in splits.items():
        (root / "ImageSets" / f"{split}.txt").write_text(names)

    drive = "2011_09_26/2011_09_26_drive_0009_sync"
    for number in range(4):
        write_kitti_frame(root, rng, f"{drive}/velodyne_points/data/{number:010d}.bin",
                          f"{drive}/image_02/data/{number:010d}.png", (1242, 375))
    (root / drive / "image_02/data/0000000002.png").unlink()
    (root / "2011_09_26/calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\n"
        + calib_line("R_rect_00", R0) + calib_line("P_rect_02", P2))
    (root / "2011_09_26/calib_velo_to_cam.txt").write_text(
        "calib_time: 15-Mar-2012 11:37:16\n"
        + calib_line("R", TR[:, :3]) + calib_line("T", TR[:, 3]))
    return root


# ---- a fabricated Waymo segment ------------------------------------------------------
# A flat road and one parked car, seen from a vehicle that drives and turns while it scans, far
# from the world's origin.

WORLD = np.array([12_345.678, -9_876.543, 67.89])           # a place on the road
WAYMO_CAR = dict(centre=np.array([14., 3., 0.9]),           # relative to WORLD
                 size=np.array([4.6, 1.9, 1.8]), yaw=0.4,
                 speed=(-1.2, 0.9))                         # m/s along the world's axes
TOP2VEHICLE = np.eye(4)
TOP2VEHICLE[:3, :3] = Rotation.from_euler("zyx", [148, 0.6, -0.4], degrees=True).as_matrix()
TOP2VEHICLE[:3, 3] = 1.43, 0.02, 2.18
FRONT2VEHICLE = np.eye(4)
FRONT2VEHICLE[:3, :3] = Rotation.from_euler("zy", [2, 1], degrees=True).as_matrix()
FRONT2VEHICLE[:3, 3] = 4.07, 0, 0.69
INCLINATIONS = np.radians(-17.6 + 20 * np.linspace(0, 1, 24) ** 0.7)    # rising, not uniform
FRONT_INCLINATIONS = (-0.9, 0.3)                            # lowest, highest; uniform between
LENS = (0.045, -0.02, 0.001, -0.0015, 0.003)                # k1, k2, p1, p2, k3
WAYMO_SIZES = ((384, 256),) * 3 + ((384, 176),) * 2         # width, height, px
WAYMO_YAWS = (0, 45, -45, 90, -90)
WAYMO_SHUTTER = (0.05, 0.04, 0.06, 0.03, 0.07)              # s after the scan's start
TOP_COLUMNS = 300
FRONT_COLUMNS = 60


def waymo_pose(seconds):
    """Vehicle to world: 8 m/s ahead, turning at 0.2 rad/s, pitching."""
    angles = [0.01, 0.02 * np.sin(seconds * 9), 0.3 + 0.2 * seconds]
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix()
    matrix[:3, 3] = WORLD + [8 * seconds, 1.5 * seconds, 0.05 * np.sin(seconds * 7)]
    return matrix


def waymo_camera(number):
    """One camera, x out of the lens, y left, z up.

    -> its intrinsics f_u, f_v, c_u, c_v, and camera to vehicle (4, 4)
    """
    width, height = WAYMO_SIZES[number - 1]
    angles = [WAYMO_YAWS[number - 1], 1.0, -0.5]
    extrinsic = np.eye(4)
    extrinsic[:3, :3] = Rotation.from_euler("zyx", angles, degrees=True).as_matrix()
    extrinsic[:3, 3] = 1.5 + 0.1 * number, 0.05 * number, 2.1
    return (0.95 * width, 0.96 * width, 0.51 * width, 0.49 * height), extrinsic


def distort(u, v):
    """Ideal to real normalised image coordinates, OpenCV's five numbers."""
    k1, k2, p1, p2, k3 = LENS
    r = u * u + v * v
    radial = 1 + k1 * r + k2 * r ** 2 + k3 * r ** 3
    return (u * radial + 2 * p1 * u * v + p2 * (r + 2 * u * u),
            v * radial + p1 * (r + 2 * v * v) + 2 * p2 * u * v)


def undistort(real):
    """Inverse of distort, by iteration. real (2, ...) -> (2, ...)"""
    ideal = real.copy()
    for _ in range(30):
        ideal = ideal + real - np.stack(distort(*ideal))
    return ideal


def first_hit(origin, ray):
    """What rays meet first. origin (n, 3) m and ray (n, 3), in the world

    -> distance (n,) to the road or the car, and which (n,): 0 nothing, 1 road, 2 car
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        road = np.where(ray[:, 2] < -1e-6, (WORLD[2] - origin[:, 2]) / ray[:, 2], np.inf)
        turn = Rotation.from_euler("z", WAYMO_CAR["yaw"]).as_matrix()
        o = (origin - WORLD - WAYMO_CAR["centre"]) @ turn
        r = ray @ turn
        half = WAYMO_CAR["size"] / 2
        enter, leave = np.sort(np.stack([(-half - o) / r, (half - o) / r]), 0)
    enter, leave = enter.max(1), leave.min(1)
    car = np.where((enter < leave) & (enter > 0), enter, np.inf)
    distance = np.minimum(road, car)
    what = np.where(distance >= 70, 0, np.where(car < road, 2, 1))
    return np.where(distance < 70, distance, 0.), what


def scan(extrinsic, inclinations, columns, poses):
    """Shoot a range image, each column from the vehicle's pose at its time.

    poses (W, 4, 4) -> metres (H, W), and which object was hit (H, W), as first_hit has it
    """
    inclination, column = np.meshgrid(inclinations[::-1], np.arange(columns), indexing="ij")
    heading = np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    azimuth = np.pi - (column + 0.5) / columns * 2 * np.pi - heading
    ray = np.stack([np.cos(azimuth) * np.cos(inclination),
                    np.sin(azimuth) * np.cos(inclination),
                    np.sin(inclination)], -1)
    laser2world = poses @ extrinsic                         # (W, 4, 4)
    ray = np.einsum("wij,hwj->hwi", laser2world[:, :3, :3], ray)
    origin = np.broadcast_to(laser2world[:, :3, 3], ray.shape)
    distance, what = first_hit(origin.reshape(-1, 3), ray.reshape(-1, 3))
    return distance.reshape(column.shape), what.reshape(column.shape)


class WaymoSegment:
    """The rows of one segment's tables, as tuples in the order of waymo_tables' columns."""

    def __init__(self, name):
        self.name = name
        self.lidar = []
        self.pose = []
        self.vehicle = []
        self.box = []
        self.image = []

    def add(self, frame):
        """Shoot frame number `frame`, half a second after the one before."""
        micros = 1_550_000_000_000_000 + 500_000 * frame
        start = 0.5 * frame
        pose = waymo_pose(start + 0.05)                     # the frame's own: mid-scan
        count = self.add_lidar(micros, start, pose)
        self.vehicle.append((self.name, micros, pose.ravel()))
        self.add_boxes(micros, pose, count)
        for number in range(1, 6):
            self.add_image(micros, start, number)

    def add_lidar(self, micros, start, pose):
        """Both lasers and the pose of each of the top one's pixels. -> how many hit the car"""
        times = start + 0.1 * (np.arange(TOP_COLUMNS) + 0.5) / TOP_COLUMNS
        poses = np.stack([waymo_pose(time) for time in times])
        top, top_hit = scan(TOP2VEHICLE, INCLINATIONS, TOP_COLUMNS, poses)
        low, high = FRONT_INCLINATIONS
        uniform = (np.arange(20) + 0.5) / 20 * (high - low) + low
        still = np.broadcast_to(pose, (FRONT_COLUMNS, 4, 4))
        front, front_hit = scan(FRONT2VEHICLE, uniform, FRONT_COLUMNS, still)
        for laser, ranges in ((1, top), (2, front)):
            hit = ranges > 0
            extra = np.where(hit, np.hypot(*np.indices(ranges.shape)) % 3, 0)
            channels = [np.where(hit, ranges, -1), extra, 0 * ranges, 0 * ranges - 1]
            values = np.stack(channels, -1).astype(np.float32)
            values[15:18, 7:19, 3] = 1                      # a no-label zone
            second = np.full(values.size, -1, np.float32)   # no second return
            self.lidar.append((self.name, micros, laser, values.ravel(), values.shape,
                               second, values.shape))
        angles = Rotation.from_matrix(poses[:, :3, :3]).as_euler("xyz")
        per_column = np.concatenate([angles, poses[:, :3, 3]], 1)
        shape = (len(INCLINATIONS), TOP_COLUMNS, 6)
        per_pixel = np.broadcast_to(per_column, shape).astype(np.float32)
        self.pose.append((self.name, micros, 1, per_pixel.ravel(), per_pixel.shape))
        return int((top_hit == 2).sum() + (front_hit == 2).sum())

    def add_boxes(self, micros, pose, count):
        """The car with some room around it, once as a car and once as a sign."""
        world2vehicle = np.linalg.inv(pose)
        centre = world2vehicle[:3, :3] @ (WORLD + WAYMO_CAR["centre"]) + world2vehicle[:3, 3]
        heading = WAYMO_CAR["yaw"] - Rotation.from_matrix(pose[:3, :3]).as_euler("xyz")[2]
        size = WAYMO_CAR["size"] + [0.15, 0.15, 0]
        for kind, name in ((1, "car"), (3, "sign")):
            self.box.append((self.name, micros, name, *centre, *size, heading,
                             *WAYMO_CAR["speed"], kind, count, 1))

    def add_image(self, micros, start, number):
        """A camera's picture: ramps over ideal coordinates, seen through the lens."""
        width, height = WAYMO_SIZES[number - 1]
        (f_u, f_v, c_u, c_v), _ = waymo_camera(number)
        u = (np.arange(width) + 0.5 - c_u) / f_u
        v = (np.arange(height) + 0.5 - c_v) / f_v
        ideal = undistort(np.stack(np.meshgrid(u, v)))
        number_plane = np.full(ideal[0].shape, 40 * number)
        ramps = np.stack([128 + 150 * ideal[0], 128 + 250 * ideal[1], number_plane], -1)
        picture = Image.fromarray(ramps.clip(0, 255).round().astype(np.uint8))
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=97, subsampling=0)
        pose = waymo_pose(start + WAYMO_SHUTTER[number - 1])
        self.image.append((self.name, micros, number, data.getvalue(), pose.ravel()))


def waymo_tables(segment):
    """The parquet tables of a segment -> [(folder, [(column name, Arrow type)], rows)].

    Official column names and types.
    """
    import pyarrow as pa
    floats = pa.list_(pa.float32())
    shape = pa.list_(pa.int32(), 3)
    matrix = pa.list_(pa.float64(), 16)
    name = ("key.segment_context_name", pa.string())
    time = ("key.frame_timestamp_micros", pa.int64())
    laser = ("key.laser_name", pa.int8())
    camera = ("key.camera_name", pa.int8())
    box = ("key.laser_object_id", pa.string())

    def columns(component, *fields, kind=None):
        """Columns of a component: (field, type) pairs, or names that all have one type."""
        pairs = fields if kind is None else [(field, kind) for field in fields]
        return [(f"[{component}].{field}", of) for field, of in pairs]

    low, high = FRONT_INCLINATIONS
    lasers = [
        (segment.name, 1, TOP2VEHICLE.ravel(), INCLINATIONS[0], INCLINATIONS[-1], INCLINATIONS),
        (segment.name, 2, FRONT2VEHICLE.ravel(), low, high, None),
    ]
    cameras = []
    for number in range(1, 6):
        intrinsic, extrinsic = waymo_camera(number)
        cameras.append((segment.name, number, *intrinsic, *LENS, extrinsic.ravel(),
                        *WAYMO_SIZES[number - 1]))
    return [
        ("lidar", [name, time, laser, *columns(
            "LiDARComponent",
            ("range_image_return1.values", floats), ("range_image_return1.shape", shape),
            ("range_image_return2.values", floats), ("range_image_return2.shape", shape))],
         segment.lidar),
        ("lidar_pose", [name, time, laser, *columns(
            "LiDARPoseComponent",
            ("range_image_return1.values", floats), ("range_image_return1.shape", shape))],
         segment.pose),
        ("vehicle_pose", [name, time, *columns(
            "VehiclePoseComponent", ("world_from_vehicle.transform", matrix))],
         segment.vehicle),
        ("lidar_calibration", [name, laser, *columns(
            "LiDARCalibrationComponent", ("extrinsic.transform", matrix),
            ("beam_inclination.min", pa.float64()), ("beam_inclination.max", pa.float64()),
            ("beam_inclination.values", pa.list_(pa.float64())))],
         lasers),
        ("camera_image", [name, time, camera, *columns(
            "CameraImageComponent", ("image", pa.binary()), ("pose.transform", matrix))],
         segment.image),
        ("camera_calibration", [
            name, camera,
            *columns("CameraCalibrationComponent", "intrinsic.f_u", "intrinsic.f_v",
                     "intrinsic.c_u", "intrinsic.c_v", "intrinsic.k1", "intrinsic.k2",
                     "intrinsic.p1", "intrinsic.p2", "intrinsic.k3", kind=pa.float64()),
            *columns("CameraCalibrationComponent", ("extrinsic.transform", matrix),
                     ("width", pa.int32()), ("height", pa.int32()))],
         cameras),
        ("lidar_box", [
            name, time, box,
            *columns("LiDARBoxComponent", "box.center.x", "box.center.y", "box.center.z",
                     "box.size.x", "box.size.y", "box.size.z", "box.heading",
                     "speed.x", "speed.y", kind=pa.float64()),
            *columns("LiDARBoxComponent", ("type", pa.int8()),
                     ("num_lidar_points_in_box", pa.int64()),
                     ("difficulty_level.detection", pa.int8()))],
         segment.box),
    ]


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet as parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


@pytest.fixture(scope="session")
def waymo(tmp_path_factory):
    """Root of a fabricated Waymo v2 folder.

    One segment of three frames in training and one of two in validation.
    """
    import pyarrow as pa
    root = tmp_path_factory.mktemp("waymo")
    for folder, name, count in (("training", "1000_000_020_000", 3),
                                ("validation", "2000_000_020_000", 2)):
        segment = WaymoSegment(name)
        for frame in range(count):
            segment.add(frame)
        for tag, columns, rows in waymo_tables(segment):
            arrays = {}
            for i, (column, kind) in enumerate(columns):
                values = [row[i].tolist() if isinstance(row[i], np.ndarray) else row[i]
                          for row in rows]
                arrays[column] = pa.array(values, kind)
            write_parquet(root / folder / tag / f"{name}.parquet", arrays)
    return root


# ---- models --------------------------------------------------------------------------

def trained(model):
    """Give batch norms statistics as after training. -> the model in eval mode

    A forgotten or mixed up statistic then changes the output.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.running_mean, -.2, .2)
            torch.nn.init.uniform_(module.running_var, .3, 2.)
            torch.nn.init.uniform_(module.weight, .5, 1.5)
            torch.nn.init.uniform_(module.bias, -.3, .3)
            module.num_batches_tracked.fill_(5)
    return model.eval()
