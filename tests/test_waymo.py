"""The Waymo reader on a fabricated segment: points on the road and on the car that they were shot
at, pixels through the lens, boxes, and what is wrong with damaged files. Then Waymo's metric."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    FRONT2VEHICLE, INCLINATIONS, LENS, TOP2VEHICLE, WORLD,
    WAYMO_CAR, WAYMO_SHUTTER, WAYMO_SIZES, distort, waymo_camera, waymo_pose,
)
from scipy.spatial.transform import Rotation

import data
import finetune

ROOT = Path(__file__).resolve().parent.parent
SEGMENT = "1000_000_020_000.parquet"
RANGES = ["range_image_return1.values", "range_image_return1.shape"]


@pytest.fixture(scope="module")
def dataset(waymo):
    return data.open_dataset(waymo)


def off_surface(world):
    """Distance of points (n, 3) in the world from the road or the car, the nearer. -> (n,) m."""
    turn = Rotation.from_euler("z", WAYMO_CAR["yaw"]).as_matrix()
    half = WAYMO_CAR["size"] / 2
    local = (world - WORLD - WAYMO_CAR["centre"]) @ turn
    from_outside = np.linalg.norm(np.maximum(abs(local) - half, 0), axis=1)
    from_inside = (half - abs(local)).min(1)
    shell = np.where((abs(local) < half).all(1), from_inside, from_outside)
    return np.minimum(abs(world[:, 2] - WORLD[2]), shell)


def in_world(points, pose):
    return points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]


# ---- points -------------------------------------------------------------------------

def test_points_lie_on_the_surfaces_that_were_shot(dataset):
    assert len(dataset) == 5
    assert dataset.split("train").tolist() == [0, 1, 2]
    assert dataset.split("val").tolist() == [3, 4]
    for i in range(5):
        frame = dataset.load(i)
        pose = waymo_pose(0.5 * (i % 3) + 0.05)
        np.testing.assert_allclose(frame.lidar2world, pose, atol=1e-9)
        top = frame.points[:, 4] == 0
        assert top.sum() > 3000 and (~top).sum() > 300
        assert top.argmin() == top.sum()             # TOP's come first
        image = dataset.arrays(dataset.frames[i], "lidar", RANGES, 4)[1]
        hit = image[..., 0] > 0
        zone = np.s_[15:18, 7:19]                    # nothing of the no-label zone
        assert hit[zone].sum() > 10
        assert top.sum() == hit.sum() - hit[zone].sum()
        # pixel poses are float32 at 12 km: up to 0.7 mm
        assert off_surface(in_world(frame.points, frame.lidar2world)).max() < 1e-3
        np.testing.assert_allclose(frame.origin, TOP2VEHICLE[:3, 3], atol=1e-6)
        intensity = frame.points[:, 3]
        assert intensity.min() >= 0 and intensity.max() <= np.tanh(3)
        assert len(np.unique(intensity)) > 50
        assert frame.time == pytest.approx(1_550_000_000 + 0.5 * (i % 3))
        assert frame.name == dataset.names[i]


def test_each_correction_of_a_range_image_matters(dataset):
    frame = dataset.frames[1]
    pose = dataset.pose(frame)
    images = dataset.arrays(frame, "lidar", RANGES, 4)
    poses = dataset.arrays(frame, "lidar_pose", RANGES, 6)[1]
    top = images[1][..., 0].astype(np.float64)
    front = images[2][..., 0].astype(np.float64)

    def error(*arguments):
        points, *_ = data.range_image_points(*arguments)
        return np.median(off_surface(in_world(points, pose)))

    assert error(top, TOP2VEHICLE, INCLINATIONS, poses, pose) < 1e-3
    upside_down = INCLINATIONS[::-1]
    assert error(top, TOP2VEHICLE, upside_down, poses, pose) > 0.3
    uniform = np.linspace(INCLINATIONS[0], INCLINATIONS[-1], 24)
    assert error(top, TOP2VEHICLE, uniform, poses, pose) > 0.02
    # the vehicle stands still
    assert error(top, TOP2VEHICLE, INCLINATIONS) > 5e-3
    # the scan's start, not the frame's own pose
    assert error(top, TOP2VEHICLE, INCLINATIONS, poses, waymo_pose(0.5)) > 5e-3

    # the azimuth correction undoes the mounting
    unturned = TOP2VEHICLE.copy()
    turn = Rotation.from_euler("z", -148, degrees=True).as_matrix()
    unturned[:3, :3] = turn @ TOP2VEHICLE[:3, :3]
    points = data.range_image_points(top, TOP2VEHICLE, INCLINATIONS, poses, pose)[0]
    other = data.range_image_points(top, unturned, INCLINATIONS, poses, pose)[0]
    assert np.median(np.linalg.norm(points - other, axis=1)) < 1

    # no values: spread evenly, and at the middles
    middles = (np.arange(20) + 0.5) / 20 * 1.2 - 0.9
    assert error(front, FRONT2VEHICLE, middles) < 1e-3
    assert error(front, FRONT2VEHICLE, np.linspace(-0.9, 0.3, 20)) > 5e-3


# ---- pictures -----------------------------------------------------------------------

@pytest.mark.parametrize("size", [None, (64, 96)])
def test_points_land_on_their_pixels_through_the_lens(dataset, size):
    """A point's pixel, bent by the lens, is the one that the car's own cameras saw.

    The picture without the bend has the colour of that direction.
    """
    frame = dataset.load(2, size)
    homogeneous = [frame.points[:, :3], np.ones((len(frame.points), 1))]
    vehicle = np.concatenate(homogeneous, 1).astype(np.float64)
    cameras = zip(frame.images, frame.lidar2img, WAYMO_SIZES)
    for number, (image, matrix, (width, height)) in enumerate(cameras, 1):
        (f_u, f_v, c_u, c_v), extrinsic = waymo_camera(number)
        # where the camera was when it looked
        camera2world = waymo_pose(1 + WAYMO_SHUTTER[number - 1]) @ extrinsic
        camera = vehicle @ (np.linalg.inv(camera2world) @ frame.lidar2world).T
        ahead = camera[:, 0] > 1
        ideal = -camera[ahead, 1:3].T / camera[ahead, 0]     # camera axes: x out, y left, z up
        central = (abs(ideal[0]) < 0.45) & (abs(ideal[1]) < 0.2)
        ideal = ideal[:, central]
        H, W = image.shape[1:]
        assert W == (size or (320, 480))[1]
        assert H == round(W * height / width)
        uvd = vehicle[ahead][central] @ matrix.T.astype(np.float64)
        uv = uvd[:, :2] / uvd[:, 2:3]
        np.testing.assert_allclose(uvd[:, 2], camera[ahead, 0][central], rtol=1e-5)

        # back to the picture on disk, without the bend
        u, v = uv.T * np.array([[width / W], [height / H]])
        bent = distort((u - c_u) / f_u, (v - c_v) / f_v)
        expected = distort(*ideal)                   # what lidar_camera_projection holds
        np.testing.assert_allclose(f_u * bent[0], f_u * expected[0], atol=1)
        np.testing.assert_allclose(f_v * bent[1], f_v * expected[1], atol=1)

        column, row = uv.astype(int).T
        inner = (column > 1) & (column < W - 2) & (row > 1) & (row < H - 2)
        shown = image[:2, row[inner], column[inner]].astype(float)
        colours = np.stack([128 + 150 * ideal[0, inner], 128 + 250 * ideal[1, inner]])
        np.testing.assert_allclose(shown, colours, atol=5)
        assert abs(shown - colours).mean() < 1.5
        blue = abs(image[2].astype(int) - 40 * number)[4:-4, 4:-4]
        assert (blue < 6).mean() > 0.97
        if number == 1:
            bend = 150 * (distort(*ideal)[0] - ideal[0])
            assert inner.sum() > 100 and abs(bend).max() > 0.1 and LENS[0] > 0


# The front camera and the motion of the official camera_model_test.cc: 3.7 m/s, 50 ms
FRONT = np.array([
    [0.999892684989, -0.00599320840002, 0.0133678704017, 1.53891424471],
    [0.00604223652133, 0.999975156055, -0.0036302411765, -0.0236339408393],
    [-0.0133457814992, 0.00371062343188, 0.999904056092, 2.11527057298],
    [0, 0, 0, 1]])
FRONT_LENS = 2055.55614936, 939.657469886, 641.072182194     # f, c_u, c_v
MOVING = np.array([
    [-0.913574384152, -0.406212760482, -0.0193141875914, -4069.03497872],
    [0.406637479491, -0.913082565675, -0.0304333457449, 11526.3118079],
    [-0.00527303457417, -0.0356569976572, 0.999350175676, 86.504],
    [0, 0, 0, 1]])
STATED, OPENED, DONE, EXPOSURE = 0.26, 0.23, 0.28, 0.000424383993959
VELOCITY = -3.3991382122, 1.50920391083, -0.0169006548822
SPIN = 0.00158374733292, 0.00212493073195, -0.0270753838122


def pose_at(times):
    """The vehicle's poses at times (n,), as the official model extrapolates -> (n, 4, 4)."""
    delay = times - STATED
    poses = np.tile(MOVING, (len(times), 1, 1))
    poses[:, :3, :3] = MOVING[:3, :3] @ Rotation.from_rotvec(delay[:, None] * SPIN).as_matrix()
    poses[:, :3, 3] += delay[:, None] * VELOCITY
    return poses


def seen_from(points, poses, extrinsic):
    """Pixels u, v (n, 2) of points (n, 4) in the world, each from a pose of its own."""
    f, c_u, c_v = FRONT_LENS
    x, y, z, _ = np.einsum("nij,nj->in", np.linalg.inv(poses @ extrinsic), points)
    return np.stack([c_u - f * y / x, c_v - f * z / x], 1)


def rolling_pixels(points, extrinsic):
    """The official projection, without the lens: a column sees from where the vehicle then is."""
    times = np.full(len(points), (OPENED + DONE) / 2)
    for _ in range(8):
        pixels = seen_from(points, pose_at(times), extrinsic)
        times = OPENED + EXPOSURE / 2 + (DONE - OPENED - EXPOSURE) / 1920 * pixels[:, 0]
    return pixels


@pytest.mark.parametrize("yaw, near, far", [(0, 5, 1), (90, 17, 4)])
def test_the_docstring_says_how_far_off_a_rolling_shutter_is(yaw, near, far):
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", yaw, degrees=True).as_matrix()
    extrinsic = turn @ FRONT
    motion = [STATED, OPENED, DONE, *VELOCITY, *SPIN]
    middle = data.middle_pose(MOVING, motion, "")
    f, c_u, c_v = FRONT_LENS
    rng = np.random.default_rng(0)
    depth = np.exp(rng.uniform(np.log(3), np.log(75), 2000))
    u, v = rng.uniform((0, 0), (1920, 1280), (2000, 2)).T
    camera = depth * [np.ones(2000), (c_u - u) / f, (c_v - v) / f, 1 / depth]
    points = camera.T @ (middle @ extrinsic).T
    official = rolling_pixels(points, extrinsic)

    def median(pose, low, high):
        apart = seen_from(points, np.tile(pose, (2000, 1, 1)), extrinsic) - official
        return np.median(np.linalg.norm(apart, axis=1)[(depth >= low) & (depth < high)])
    assert round(median(middle, 0, 10)) == near and round(median(middle, 20, 40)) == far
    assert median(middle, 0, 40) < median(MOVING, 0, 40)    # than the pose as it is stored
    # exact in the middle column
    central = abs(official[:, 0] - 960) < 20
    apart = seen_from(points, np.tile(middle, (2000, 1, 1)), extrinsic) - official
    assert abs(apart[central]).max() < 2


def test_the_pose_is_moved_to_the_middle_column(broken):
    """A pose that is stated for 20 ms before the middle column gives the same matrices."""
    import pyarrow
    before = data.open_dataset(broken).load(1)
    path = broken / "training" / "camera_image" / SEGMENT

    def restate(table, with_motion=True, spoil=False):
        rows = []
        for row in table.to_pylist():
            middle = (row["key.frame_timestamp_micros"] - 1_550_000_000_000_000) * 1e-6
            middle += WAYMO_SHUTTER[row["key.camera_name"] - 1]
            pose, after = waymo_pose(middle - 0.02), waymo_pose(middle - 0.019)
            turn = Rotation.from_matrix(pose[:3, :3].T @ after[:3, :3]).as_rotvec()
            rows.append([middle - 0.02, middle - 0.025, middle + 0.025,
                         *(after - pose)[:3, 3] / 0.001, *turn / 0.001, pose.ravel().tolist()])
        columns = [list(column) for column in zip(*rows)]
        if spoil:
            columns[3] = [float("nan")] * len(rows)
        for name, values in zip(data.SHUTTER, columns):
            if with_motion:
                table = table.append_column(f"[CameraImageComponent].{name}",
                                            pyarrow.array(values, pyarrow.float64()))
        name = "[CameraImageComponent].pose.transform"
        place = table.column_names.index(name)
        return table.set_column(place, name, pyarrow.array(columns[-1], table[name].type))

    points = np.c_[before.points[:, :3], np.ones(len(before.points))].astype(np.float64)
    whole = path.read_bytes()

    def apart(**options):
        path.write_bytes(whole)
        rewrite(path, lambda table: restate(table, **options))
        pixels = []
        for frame in before, data.open_dataset(broken).load(1):
            uvd = points @ frame.lidar2img.astype(np.float64).swapaxes(1, 2)    # (5, n, 4)
            pixels.append(uvd[..., :2] / uvd[..., 2:3])
        ahead = (uvd[..., 2] > 3) & (abs(pixels[0][..., 0]) < 1000)
        assert (ahead.sum(1) > 100).all()
        difference = abs(pixels[0] - pixels[1])[ahead]
        return np.median(difference), difference.max()

    median, most = apart()
    assert median < 0.2 and most < 0.5                      # it pitches meanwhile
    assert apart(with_motion=False)[0] > 3 * median         # the pose as it is stored
    message = r"1550000000500000: camera_image pose of FRONT is of .*\[nan"
    with pytest.raises(data.DataError, match=message):
        apart(spoil=True)


# ---- boxes --------------------------------------------------------------------------

def test_boxes_are_where_the_car_is(dataset):
    for i in range(3):
        frame = dataset.load(i, (64, 96))
        rows = dataset.annotations(i)
        assert len(rows) == 2
        assert rows["label"].tolist() == [0, -1]     # signs are no class
        assert len(frame.boxes) == 1
        assert frame.labels.tolist() == [0]
        box = frame.boxes[0]
        place = in_world(frame.boxes[:, :3], frame.lidar2world)[0]
        np.testing.assert_allclose(place, WORLD + WAYMO_CAR["centre"], atol=2e-3)
        np.testing.assert_allclose(box[3:6], WAYMO_CAR["size"] + [0.15, 0.15, 0], rtol=1e-6)
        # on disk the velocity is the world's
        heading = np.arctan2(*frame.lidar2world[1::-1, 0])
        expected = complex(*WAYMO_CAR["speed"]) * np.exp(-1j * heading)
        np.testing.assert_allclose(complex(*box[7:]), expected, atol=1e-3)
        # the vehicle pitches, boxes are upright
        inside = data.inside_box(frame.points[:, :3], rows["box"][0]).sum()
        assert inside >= 0.8 * rows["lidar_points"][0] > 30


def test_the_doctor_reports_nothing(waymo, capsys):
    assert data.doctor(waymo) == []
    assert "Waymo v2, 5 frames, of them 3 train, 2 val" in capsys.readouterr().out


def test_images_of_two_sizes_are_collated(waymo):
    small = data.open_dataset(waymo, "small")
    frame = small.load(0)
    assert [image.shape[1:] for image in frame.images] == [(96, 144)] * 3 + [(66, 144)] * 2
    assert small.grid.mirrors == (True, True)
    batch = data.collate([frame, small.load(3)], [0, 1])
    assert batch.images.shape == (10, 3, 96, 144)
    one = [[96, 144]] * 3 + [[66, 144]] * 2
    assert batch.hw.tolist() == one + one


def test_a_regrouped_copy_gives_the_same_frames_and_resumes(waymo, tmp_path, capsys, monkeypatch):
    import pyarrow.parquet as parquet
    copy = tmp_path / "copy"
    monkeypatch.setattr(sys, "argv", ["data.py", str(waymo), "--regroup", str(copy)])
    data.main()
    training = copy / "training"
    last = training / "lidar" / SEGMENT
    assert parquet.ParquetFile(last).num_row_groups == 2
    assert parquet.ParquetFile(training / "lidar_pose" / SEGMENT).num_row_groups == 3
    a = data.open_dataset(waymo)
    b = data.open_dataset(copy)
    for i in range(5):
        one = a.load(i)
        two = b.load(i)
        assert np.array_equal(one.points, two.points)
        assert np.array_equal(one.boxes, two.boxes)
        assert all(map(np.array_equal, one.images, two.images))

    last.unlink()
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.parquet")}
    (training / "lidar" / f"{SEGMENT}.part").write_bytes(b"cut")           # as a kill leaves it
    data.main()
    assert last.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert not list(tmp_path.rglob("*.part"))
    message = "no parquet file of the Waymo Open Dataset v2 here"
    with pytest.raises(data.DataError, match=message):
        data.regroup(tmp_path / "nothing", copy)


# ---- damaged files ------------------------------------------------------------------

@pytest.fixture
def broken(waymo, tmp_path):
    shutil.copytree(waymo, tmp_path / "waymo")
    return tmp_path / "waymo"


def rewrite(path, change):
    import pyarrow.parquet as parquet
    parquet.write_table(change(parquet.read_table(path)), path)


@pytest.mark.parametrize("tag", ["lidar", "lidar_pose", "lidar_calibration", "lidar_box",
                                 "camera_image", "camera_calibration"])
def test_a_missing_component_is_named(broken, tag, capsys):
    """A segment that lacks one is left out with a message, as nuScenes' frames are.

    All segments lacking one is an error.
    """
    dataset = data.open_dataset(broken)
    (broken / "training" / tag / SEGMENT).unlink()
    message = (f"waymo/1000_000_020_000/1550000000000000: .*{SEGMENT} is missing; "
               f"download the component {tag} of this segment")
    with pytest.raises(data.DataError, match=message):
        dataset.load(0)
    data.print_once.cache_clear()
    names = data.open_dataset(broken).names
    assert {name.split("/")[1] for name in names} == {"2000_000_020_000"}
    message = ("1 of its 2 segments lack files and are left out; "
               f"the first is {broken}/training/{tag}/{SEGMENT}")
    assert message in capsys.readouterr().out
    shutil.rmtree(broken / "validation" / tag)
    message = (f"none of its 2 segments is whole, .*{tag}/{SEGMENT} is missing; "
               "download every component: lidar, ")
    with pytest.raises(data.DataError, match=message):
        data.open_dataset(broken)


@pytest.mark.parametrize("tag", ["lidar", "camera_image", "lidar_box", "vehicle_pose"])
def test_a_truncated_file_is_named(broken, tag):
    path = broken / "training" / tag / SEGMENT
    path.write_bytes(path.read_bytes()[:-300])
    message = f"{tag}.{SEGMENT} is not a whole parquet file .*download it again"
    with pytest.raises(data.DataError, match=message):
        data.open_dataset(broken).load(0)


def without(column, number):
    """Drop the rows of one laser or camera."""
    return lambda table: table.filter([n != number for n in table[column].to_pylist()])


def replaced(column, change, kind):
    """Change each value of a column."""
    import pyarrow

    def rewritten(table):
        values = [change(value) for value in table[column].to_pylist()]
        place = table.column_names.index(column)
        return table.set_column(place, column, pyarrow.array(values, kind))

    return rewritten


def renamed(table):
    names = [name.replace("return1.values", "return1.numbers") for name in table.column_names]
    return table.rename_columns(names)


def test_what_a_file_lacks_is_named(broken):
    import pyarrow

    def check(tag, change, message):
        path = broken / "training" / tag / SEGMENT
        whole = path.read_bytes()
        rewrite(path, change)
        with pytest.raises(data.DataError, match=message):
            data.open_dataset(broken).load(0)
        path.write_bytes(whole)

    check("camera_calibration", without("key.camera_name", 2),
          r"no calibration of camera 2 \(FRONT_LEFT\)")
    check("lidar_calibration", without("key.laser_name", 2),
          r"lidar_calibration has no laser 2, only \[1\]")
    check("lidar", renamed,
          "has no column range_image_return1.values, only key.segment_context_name")
    shorter = replaced("[LiDARComponent].range_image_return1.values", lambda v: v[:-4],
                       pyarrow.list_(pyarrow.float32()))
    check("lidar", shorter,
          "lidar of laser 1 has 28796 values for the shape .24, 300, 4., expected H x W x 4")
    empty = replaced("[LiDARBoxComponent].box.center.x", lambda v: None, pyarrow.float64())
    check("lidar_box", empty, "lidar_box.*has rows without box.center.x")
    data.open_dataset(broken).load(0)


@pytest.mark.parametrize("tag, key, number", [
    ("camera_image", "key.camera_name", 4), ("lidar", "key.laser_name", 1),
    ("lidar_pose", "key.laser_name", 1)])
def test_frames_that_lack_a_camera_or_laser_are_left_out_and_counted(broken, tag, key, number,
                                                                      capsys):
    """Some official frames have no picture of a camera: downloading again cannot help."""
    path = broken / "training" / tag / SEGMENT
    first = data.open_dataset(broken).frames[0].time

    def of_one_frame(table):
        gone = zip(table[key].to_pylist(), table[data.TIME_KEY].to_pylist())
        return table.filter([pair != (number, first) for pair in gone])
    rewrite(path, of_one_frame)
    names = data.open_dataset(broken).names
    sensor = "camera" if tag == "camera_image" else "laser"
    message = f"1 of its 5 frames lack rows ({tag} of {sensor} {number}: 1) and are left out"
    assert message in capsys.readouterr().out
    assert len(names) == 4 and names[0].endswith(f"/{first + 500_000}")
    for folder in ("training", "validation"):
        for file in (broken / folder / tag).iterdir():
            rewrite(file, without(key, number))
    with pytest.raises(data.DataError, match="5 of its 5 frames lack rows .*none is left"):
        data.open_dataset(broken)


def test_without_boxes_pre_training_has_its_frames(broken):
    for folder in ("training", "validation"):
        shutil.rmtree(broken / folder / "lidar_box")
    with pytest.raises(data.DataError, match="lidar_box.*pre-training reads no lidar_box"):
        data.open_dataset(broken)
    dataset = data.open_dataset(broken, labels=False)
    assert len(dataset) == 5 and dataset.load(0).boxes is None


def test_links_of_the_user_are_followed(broken, dataset):
    path = broken / "training" / "camera_image" / SEGMENT
    path.rename(broken.parent / "elsewhere.parquet")
    path.symlink_to(broken.parent / "elsewhere.parquet")
    folder = broken / "training" / "lidar"
    folder.rename(broken.parent / "lidar")
    folder.symlink_to(broken.parent / "lidar")
    frame = data.open_dataset(broken).load(0)
    assert (frame.points == dataset.load(0).points).all()
    assert (frame.images[0] == dataset.load(0).images[0]).all()


def test_types_that_other_programs_write_are_read(broken, dataset):
    import pyarrow
    boxes = broken / "training" / "lidar_box" / SEGMENT
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        rewrite(boxes, replaced("key.laser_object_id", lambda name: name, kind))
        assert data.open_dataset(broken).annotations(0)["token"].tolist() == ["car", "sign"]
    images = broken / "training" / "camera_image" / SEGMENT
    rewrite(images, replaced("[CameraImageComponent].image", lambda v: v, pyarrow.large_binary()))
    frame = data.open_dataset(broken).load(0)
    assert (frame.images[0] == dataset.load(0).images[0]).all()


def test_kinds_of_boxes_are_those_of_the_official_label_proto(broken):
    import pyarrow
    path = broken / "training" / "lidar_box" / SEGMENT
    dataset = data.open_dataset(broken)
    kinds = {1: "Vehicle", 2: "Pedestrian", 3: None, 4: "Cyclist"}         # 3 is a sign
    for number, name in kinds.items():
        change = replaced("[LiDARBoxComponent].type", lambda v, number=number: number,
                          pyarrow.int8())
        rewrite(path, change)
        label = dataset.grid.classes.index(name) if name else -1
        assert dataset.annotations(0)["label"].tolist() == [label] * 2


# ---- metric -------------------------------------------------------------------------

def truth(*rows):
    """Annotation rows from dicts: what differs from a vehicle 4 x 2 x 1.5 m with 50 points."""
    out = np.zeros(len(rows), data.WAYMO_BOX)
    for n, given in enumerate(rows):
        one = dict(x=0., y=0., yaw=0., label=0, points=50, difficulty=0) | given
        box = np.array([one["x"], one["y"], 1, 4, 2, 1.5, one["yaw"], 0, 0])
        out[n] = (box, one["label"], one["points"], one["difficulty"], str(n))
    return out


def score(rows, boxes, scores, level=2, label=0):
    """AP and APH."""
    boxes = truth(*boxes)["box"]
    frame = (truth(*rows), boxes, np.zeros(len(boxes), int), np.array(scores, float))
    return finetune.waymo_ap([frame], label, 0.7)[level - 1]


def row_ahead(n, **more):
    return [dict(x=8. * i, **more) for i in range(n)]


def row_behind(n, **more):
    return [dict(x=-8. * i - 8, **more) for i in range(n)]


def turned(rows, yaw):
    return [dict(row, yaw=yaw) for row in rows]


def test_waymo_ap_by_hand():
    line = row_ahead(10)
    assert score(line, line, np.linspace(1, 0.1, 10)) == pytest.approx((100, 100))
    # four missed
    assert score(line, line[:6], [1] * 6) == pytest.approx((60, 60))
    # the best score is a false alarm
    false_alarm = score(line, [*line, dict(x=-9.)], [*[0.5] * 10, 0.9])
    assert false_alarm == pytest.approx((100 * 10 / 11,) * 2)
    assert score(line, turned(line, np.pi), [1] * 10) == pytest.approx((100, 0))
    assert score(line, turned(line, 2 * np.pi), [1] * 10) == pytest.approx((100, 100))
    # detected at IoU 0.5; recall has no heading in it
    boxes = truth(*turned(line, np.radians(20)))["box"]
    frame = (truth(*line), boxes, np.zeros(10, int), np.ones(10))
    assert finetune.waymo_ap([frame], 0, 0.5)[1] == pytest.approx((100, 100 * 8 / 9))
    one_turned = [*line[:9], dict(line[9], yaw=np.pi)]
    assert score(line, one_turned, [1] * 10) == pytest.approx((100, 90))
    # recall jumps from a half to 1: the lower precision is held, then a ramp
    false_alarms = [dict(x=-9. * i - 9) for i in range(5)]
    AP, _ = score(line, [*line, *false_alarms], [*[0.9] * 5, *[0.5] * 10])
    assert AP == pytest.approx(100 * (0.5 * 1 + 0.05 * (1 + 2 / 3) / 2 + 0.45 * 2 / 3))
    # a second box on the same vehicle, scored last
    twice = score(line, [*line, line[0]], [*[0.5] * 10, 0.4])
    assert twice == pytest.approx((100, 100))
    # IoU 3.1 / 4.9
    moved = [dict(row, x=row["x"] + 0.9) for row in line]
    assert score(line, moved, [1] * 10) == (0, 0)
    assert all(np.isnan(score([], line, [1] * 10)))
    assert score(line, [], []) == (0, 0)
    assert all(np.isnan(score(line, line, [1] * 10, label=1)))


def test_levels_go_by_points_and_marks():
    line = row_ahead(10)
    sparse = row_behind(5, points=3)
    marked = row_behind(5, difficulty=2)
    for hard in (sparse, marked):
        both = line + hard
        assert score(both, line, [1] * 10, 1) == pytest.approx((100, 100))
        assert score(both, line, [1] * 10, 2)[0] == pytest.approx(100 * 10 / 15)
        assert score(both, both, [1] * 15, 1) == pytest.approx((100, 100))
        # a hard one that is detected counts as detected, one that is missed not as missed
        detected = score(both, line[:6] + hard, [1] * 11, 1)
        assert detected[0] == pytest.approx(100 * 11 / 15)
        one_detected = score(both, line[:6] + hard[:1], [1] * 7, 1)
        assert one_detected[0] == pytest.approx(100 * 7 / 11)
        # nothing easy at all
        assert score(hard, hard, [1] * 5, 1) == pytest.approx((100, 100))
    # marked easy in spite of few points
    easy = [dict(row, difficulty=1) for row in sparse]
    assert score(line + easy, line, [1] * 10, 1)[0] == pytest.approx(100 * 10 / 15)
    empty = [dict(row, points=0) for row in sparse]
    assert score(line + empty, line, [1] * 10, 2) == pytest.approx((100, 100))


def most_overlap(iou, g, used, least):
    """The assignment of greatest total overlap by trying all.

    Truths g, g + 1, ... each take a detection that is not used, or none.
    -> total, [(detection, truth)]
    """
    if g == iou.shape[1]:
        return 0, []
    options = [most_overlap(iou, g + 1, used, least)]
    for i in np.flatnonzero(iou[:, g] >= least):
        if i not in used:
            total, pairs = most_overlap(iou, g + 1, used | {i}, least)
            options.append((total + iou[i, g], [(i, g), *pairs]))
    return max(options, key=lambda option: option[0])


def area(points):
    """The area under (recall, precision) points.

    Precision is the greatest from a recall on. It is held from the right for as many steps
    of 0.05 as leave a rest of at most one, then a ramp follows.
    """
    envelope = set()
    for r, _ in points:
        if r > 0:
            envelope.add((r, max(p for q, p in points if q >= r)))
    envelope = sorted(envelope)
    if not envelope:
        return 0.0
    total = 0.0
    low = 0
    p_low = envelope[0][1]
    for high, p_high in envelope:
        held = 0.05 * max(math.ceil((high - low - 1e-6) / 0.05) - 1, 0)
        total += held * p_high + (high - low - held) * (p_low + p_high) / 2
        low = high
        p_low = p_high
    return total


def random_frame(rng):
    rows = truth(*[dict(
        x=rng.uniform(-9, 9),
        y=rng.uniform(-9, 9),
        yaw=rng.uniform(-0.5, 0.5),
        label=int(rng.integers(-1, 3)),
        points=int(rng.integers(0, 12)),
        difficulty=int(rng.integers(0, 3))) for _ in range(12)])
    source = rng.integers(0, 12, 20)
    boxes = rows["box"][source]
    boxes[:, :2] += rng.normal(0, 0.2, (20, 2))
    boxes[:, 6] += rng.normal(0, 0.3, 20)
    return rows, boxes, np.maximum(rows["label"][source], 0), rng.random(20)


def slow_counts(frame, label, level, cutoff):
    """Hits, hits weighted by heading, false alarms and missed boxes of a frame.

    Only detections scored at least `cutoff` per cent count.
    """
    rows, boxes, labels, scores = frame
    targets = [row for row in rows if row["label"] == label and row["lidar_points"] > 0]
    detections = boxes[(labels == label) & (scores * 100 >= cutoff)]
    target_boxes = np.array([row["box"] for row in targets]).reshape(-1, 9)
    iou = finetune.upright_iou(detections, target_boxes)
    _, pairs = most_overlap(iou, 0, frozenset(), 0.4)
    weighted = 0.0
    for i, g in pairs:
        turn = detections[i, 6] - targets[g]["box"][6]
        weighted += 1 - abs(np.angle(np.exp(1j * turn))) / np.pi
    missed = 0
    for g in {*range(len(targets))} - {g for _, g in pairs}:
        row = targets[g]
        unmarked_easy = row["difficulty"] == 0 and row["lidar_points"] > 5
        missed += level == 2 or row["difficulty"] == 1 or unmarked_easy
    return len(pairs), weighted, len(detections) - len(pairs), missed


def slow_waymo_ap(frames, label, level):
    """AP and APH, in per cent."""
    curve = []
    curve_heading = []
    for cutoff in range(101):
        counts = np.array([slow_counts(frame, label, level, cutoff) for frame in frames])
        hits, weighted, alarms, missed = counts.sum(0)
        recall = hits / max(hits + missed, 1)
        curve.append((recall, hits / max(hits + alarms, 1)))
        curve_heading.append((recall, weighted / max(hits + alarms, 1)))
    return [100 * area(curve), 100 * area(curve_heading)]


def test_random_frames_score_as_in_a_transcription():
    rng = np.random.default_rng(0)
    for level in (1, 2):
        frames = [random_frame(rng) for _ in range(8)]
        for label in range(3):
            ours = finetune.waymo_ap(frames, label, 0.4)[level - 1]
            assert ours == pytest.approx(slow_waymo_ap(frames, label, level), abs=1e-9)
            assert 1 < ours[1] < ours[0] < 99


def test_upright_iou_by_hand():
    a = truth(dict())["box"]
    b = truth(dict(x=2.), dict(yaw=np.pi / 2), dict())["box"]
    b[2, 2] += 0.75
    np.testing.assert_allclose(finetune.upright_iou(a, b), [[2 / 6, 4 / 12, 0.75 / 2.25]])


def test_metrics_of_a_waymo_run(tmp_path):
    """Three vehicles of four overlap by 0.6, which is too little for them.

    Pedestrians overlap by as much, which is enough. A cyclist of level 2 is missed.
    """
    grid = data.GRIDS["waymo", "small"]
    crowd = truth(*row_ahead(4), *row_ahead(4, y=9., label=1))
    cyclists = truth(dict(label=2), dict(x=8., label=2, points=3))
    rows = [crowd, cyclists]
    boxes = [crowd["box"].copy(), cyclists["box"][:1]]
    boxes[0][[0, 4, 5, 6, 7], 0] += 1.               # IoU 3 / 5
    frames = {}
    for n in (1, 0):
        count = len(boxes[n])
        labels = rows[n]["label"][:count]
        frames[f"waymo/s/{n}"] = (boxes[n], labels, np.ones(count, np.float32), np.eye(4))
    dataset = SimpleNamespace(grid=grid, names=["waymo/s/0", "waymo/s/1"],
                              annotations=lambda i: rows[i])
    message = finetune.finish_waymo(SimpleNamespace(dataset=dataset), frames, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    vehicle = 100 * 0.75 * 0.75
    assert metrics["Vehicle"]["L1"] == pytest.approx([vehicle] * 2)
    assert metrics["Vehicle"]["L2"] == pytest.approx([vehicle] * 2)
    assert metrics["Pedestrian"]["L2"] == pytest.approx([100] * 2)
    assert metrics["Cyclist"]["L1"] == pytest.approx([100] * 2)
    assert metrics["Cyclist"]["L2"] == pytest.approx([50] * 2)
    mean = (vehicle + 100 + 50) / 3
    assert message == f"L2 mAP {mean:.2f} | L2 mAPH {mean:.2f}"
    assert metrics["frames"] == 2


def test_predictions_are_on_disk_before_they_are_scored(tmp_path, monkeypatch):
    boxes = np.arange(27.).reshape(3, 9)
    frames = {"waymo/s/0": (boxes[:2], np.array([0, 1]), np.array([0.9, 0.8]), np.eye(4)),
              "waymo/s/1": (boxes[2:], np.array([2]), np.array([0.7]), np.eye(4))}
    monkeypatch.setattr(finetune, "waymo_score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune.finish_waymo(SimpleNamespace(dataset=None), frames, tmp_path)
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as stored:
        assert stored["frame"].tolist() == list(frames) and stored["count"].tolist() == [2, 1]
        assert np.array_equal(stored["boxes"], boxes)
        assert stored["labels"].tolist() == [0, 1, 2]
        assert stored["scores"].tolist() == [0.9, 0.8, 0.7]


# ---- whole runs ---------------------------------------------------------------------

TINY = {
    "clap.py": "--rays 64 --pixels 8 --samples 8 --importance-samples 4 --bins 12",
    "simipu.py": "--points 256 --zoom-low 0.5 --zoom-high 0.6",
    "cmcr.py": "--teacher none --crop-h 64 --crop-w 96 --crop-points 60 --pairs 200 --queries 90",
    "finetune.py": "--bins 12 --modality lidar --fraction 0.01",
}
SCRIPTS = [pytest.param(name, marks=pytest.mark.slow) for name in TINY if name != "finetune.py"]


@pytest.mark.parametrize("layout", ["waymo", pytest.param("kitti", marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", [*SCRIPTS, "finetune.py"])
def test_every_script_runs_on_every_layout(layout, tmp_path, script, request):
    """All other tests use the nuScenes layout."""
    root = request.getfixturevalue(layout)
    out = tmp_path / "run"
    flags = f"{TINY[script]} --data {root} --out {out} --preset small --width 4 --batch 1 --steps 1"
    command = [sys.executable, str(ROOT / script), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "metrics.json").is_file()
    assert "step 1/1" in done.stdout
    if script == "finetune.py":
        assert "labels of 1 frames" in done.stdout
        metric = {"waymo": "L2 mAP", "kitti": "3D AP|R40"}[layout]
        assert metric in done.stdout.splitlines()[-1]
