"""synthetic.py: the bytes repeat, the annotations are true, rays hit what closed forms say, and
the official devkit reads the folder."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

import data
import synthetic
from synthetic import BALL, CUBE, FRUSTUM, PLAIN, SIDEWAYS, Solid

CLASSES = {
    "vehicle.car",
    "vehicle.truck",
    "vehicle.construction",
    "vehicle.bus.rigid",
    "vehicle.trailer",
    "movable_object.barrier",
    "vehicle.motorcycle",
    "vehicle.bicycle",
    "human.pedestrian.adult",
    "movable_object.trafficcone",
}
SMALL = dict(train=1, val=1, frames=2, beams=16, azimuths=90, image=(24, 64))


def tables(root):
    paths = (root / synthetic.TABLES).glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths}


def rotation(w, x, y, z):
    """Quaternion to matrix, from the definition; shares nothing with the code under test."""
    half_turn = np.array([
        [-y * y - z * z, x * y - w * z, x * z + w * y],
        [x * y + w * z, -x * x - z * z, y * z - w * x],
        [x * z - w * y, y * z + w * x, -x * x - y * y]])
    return np.eye(3) + 2 * half_turn


def digests(root):
    hashes = {}
    for path in root.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(root))
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def scenery(solids, curve=1e-5):
    """A scene of scenery alone: no motion, no light needed."""
    scene = synthetic.Scene("bare", curve, 1e3, 5.0, 0.0, np.eye(4), {})
    scene.solids = synthetic.stack(solids, [-1] * len(solids), ["noise"] * len(solids))
    return scene


# ---- the folder ---------------------------------------------------------------------

def test_the_same_seed_gives_the_same_bytes_with_and_without_children(tmp_path, monkeypatch):
    synthetic.write(tmp_path / "a", **SMALL)
    synthetic.write(tmp_path / "b", seed=1, **SMALL)
    (tmp_path / "c").mkdir()                         # an empty folder may be filled
    monkeypatch.setattr(synthetic, "ALONE", 0)
    synthetic.write(tmp_path / "c", **SMALL)         # by two children
    first = digests(tmp_path / "a")
    other = digests(tmp_path / "b")
    assert first == digests(tmp_path / "c")
    assert len([name for name in first if name.startswith("samples")]) == 2 * 2 * 7
    assert len(first) > 40
    drawn = {digest for name, digest in other.items() if name.startswith("samples")}
    assert not drawn & set(first.values()), "another seed repeats a picture or a sweep"
    assert not list(tmp_path.glob(".*")), "a temporary folder was left behind"


def test_write_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("not to be lost")
    with pytest.raises(FileExistsError, match="not empty"):
        synthetic.write(tmp_path, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "not to be lost"


def descendants(root):
    """Process ids of the children that write below root."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue                                 # it has just ended
        if b"--job" in command and str(root).encode() in command:
            pids.append(int(folder.name))
    return pids


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_writer_takes_its_children_and_its_folder_with_it(tmp_path, number):
    command = [sys.executable, synthetic.__file__, str(tmp_path / "world")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as writer:
        until(lambda: list(tmp_path.glob(".world-*/samples/CAM_FRONT/*")))
        assert len(descendants(tmp_path)) == 2
        writer.send_signal(number)
        assert writer.wait() == -number              # it does not pretend to have ended well
    until(lambda: not descendants(tmp_path) and not list(tmp_path.iterdir()))


def test_the_folder_has_the_permissions_of_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        synthetic.write(tmp_path / "a", **{**SMALL, "frames": 1})
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("arguments, message", [
    ("--train 0 --val 0", "--train 0 --val 0 --frames 8 leave nothing to write"),
    ("--frames 0", "--frames 0 leave nothing to write"),
    ("--frames -1", "argument --frames: is -1, expected 0 or more"),
    ("--seed -1", "argument --seed: is -1, expected 0 or more"),
    ("", "file exists and is not empty"),
])
def test_wrong_arguments_are_answered_in_one_line(tmp_path, arguments, message, monkeypatch,
                                                  capsys):
    (tmp_path / "file").write_text("")
    words = ["synthetic.py", str(tmp_path / "file"), *arguments.split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        synthetic.main()
    last = f"{end.value.code}\n{capsys.readouterr().err}".strip().splitlines()
    assert message in "".join(last) and end.value.code not in (0, None)
    assert os.listdir(tmp_path) == ["file"]


def test_a_world_that_cannot_be_written_says_what_to_set(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(tmp_path))
    monkeypatch.setattr(synthetic, "write", full)
    message = "world-2: .*No space left on device.*; make room there, or point LIDAR_CAMERA_CACHE"
    with pytest.raises(data.DataError, match=message):
        data.open_dataset("")


def test_both_splits_have_all_classes_and_solids_lie_inside_their_boxes():
    for scenes in (range(24), range(24, 32)):
        categories = set()
        for index in scenes:
            for thing in synthetic.compose(0, index).things:
                categories.add(thing.category)
                if not thing.category.startswith("static"):
                    w, l, h = thing.size
                    world = synthetic.stack(thing.solids, [0] * len(thing.solids),
                                            ["noise"] * len(thing.solids))
                    points = synthetic.corners(world).reshape(-1, 3)
                    assert (abs(points[:, :2]) < [l / 2, w / 2]).all(), thing
                    assert points[:, 2].min() > -1e-9, thing
                    assert points[:, 2].max() < h, thing
        assert CLASSES <= categories, CLASSES - categories
        assert {"static.manmade", "static_object.bicycle_rack"} <= categories, "no clutter"


# ---- the tables ---------------------------------------------------------------------

def test_num_lidar_pts_counts_the_points_inside_each_box(world):
    t = tables(world)
    mounts = {row["token"]: row for row in t["calibrated_sensor"]}
    poses = {row["token"]: row for row in t["ego_pose"]}
    sweeps = {row["sample_token"]: row for row in t["sample_data"] if row["fileformat"] == "pcd"}
    total = 0
    for annotation in t["sample_annotation"]:
        row = sweeps[annotation["sample_token"]]
        points = np.fromfile(world / row["filename"], np.float32).reshape(-1, 5)
        xyz = points[:, :3].astype(float)
        for pose in (mounts[row["calibrated_sensor_token"]], poses[row["ego_pose_token"]]):
            xyz = xyz @ rotation(*pose["rotation"]).T + pose["translation"]
        local = (xyz - annotation["translation"]) @ rotation(*annotation["rotation"])
        w, l, h = annotation["size"]
        x, y, z = abs(local).T
        inside = (x < l / 2) & (y < w / 2) & (z < h / 2)
        assert inside.sum() == annotation["num_lidar_pts"], annotation["token"]
        total += inside.sum()
    assert total > 500

    assert set(points[:, 4]) <= set(range(32))
    assert 0 <= points[:, 3].min() and points[:, 3].max() <= 255
    assert abs(points[:, :3]).max() < 75
    on_roof = np.linalg.norm(points[:, :2], axis=1) < 1
    assert .02 < on_roof.mean() < .15, "returns from the vehicle's own roof"
    assert np.linalg.norm([row["translation"] for row in t["ego_pose"]], axis=1).min() > 300


def test_pictures_are_taken_at_their_cameras_delays(world):
    rows = tables(world)["sample_data"]
    sweeps = {row["sample_token"]: row for row in rows if row["fileformat"] == "pcd"}
    delays = {}
    for row in rows:
        channel = row["filename"].split("/")[1]
        delays[channel] = row["timestamp"] - sweeps[row["sample_token"]]["timestamp"]
    expected = {channel: camera.delay for channel, camera in synthetic.CAMERAS.items()}
    assert delays == {"LIDAR_TOP": 0, **expected}


def test_prev_and_next_link_all_rows(world):
    t = tables(world)
    for name in ("sample", "sample_data", "sample_annotation"):
        rows = {row["token"]: row for row in t[name]}
        assert len(rows) == len(t[name]), f"{name}: a token twice"
        for row in rows.values():
            assert not row["next"] or rows[row["next"]]["prev"] == row["token"]
            assert not row["prev"] or rows[row["prev"]]["next"] == row["token"]
    rows = {row["token"]: row for row in t["sample_annotation"]}
    for instance in t["instance"]:
        last = instance["first_annotation_token"]
        length = 1
        while rows[last]["next"]:
            last = rows[last]["next"]
            length += 1
        assert last == instance["last_annotation_token"]
        assert length == instance["nbr_annotations"]


def test_velocity_is_the_true_speed(world):
    t = tables(world)
    start = {row["token"]: row["timestamp"] for row in t["sample"]}
    rows = {row["token"]: row for row in t["sample_annotation"]}
    moving = 0
    for index, name in enumerate(sorted(scene["name"] for scene in t["scene"])):
        scene = synthetic.compose(0, index, 3)
        assert scene.name == name
        for i, thing in enumerate(scene.things):
            first, middle, last = (synthetic.token(0, name, "annotation", i, k) for k in range(3))
            if first not in rows or last not in rows:
                continue
            a = rows[first]
            b = rows[last]
            seconds = (start[b["sample_token"]] - start[a["sample_token"]]) / 1e6
            step = np.subtract(b["translation"], a["translation"])
            speed = np.hypot(thing.vs * (1 - scene.curve * thing.l), thing.vl)
            # a chord of the arc
            measured = np.linalg.norm(step) / seconds
            assert measured == pytest.approx(speed, rel=5e-3, abs=1e-9)
            if speed and thing.vs:
                ahead = rotation(*rows[middle]["rotation"])[:, 0]
                forward = step @ ahead / seconds
                assert forward == pytest.approx(speed, rel=1e-2), "it does not face where it goes"
            moving += speed > 0
    assert moving >= 5


# ---- rays ---------------------------------------------------------------------------

def test_lidar_ranges_of_a_box_match_slab_intersection():
    """A cube 4 x 2 x 2 m, turned by 0.4 rad at (9, 3, 1); ground z = 0, LiDAR at 1.84 m.

    The slab intersection is transcribed here.
    """
    axes = synthetic.pose((0, 0, 0), .4)[:3, :3]
    cube = Solid(CUBE, (9, 3, 1), (2, 1, 1), (.5,) * 3, shine=1.0, axes=axes)
    scene = scenery([cube])
    lidar2plane = np.eye(4)
    lidar2plane[:3, :3] = [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]
    lidar2plane[2, 3] = 1.84
    no_roof = synthetic.stack([Solid(BALL, (0, 0, -99), (.1,) * 3, (0, 0, 0))], [-1], ["noise"])
    points, _ = synthetic.sweep(synthetic.world_at(scene, 0), scene, lidar2plane, no_roof, 32, 360,
                                np.random.default_rng(0))
    distance = np.linalg.norm(points[:, :3], axis=1)
    right, forward, up = (points[:, :3] / distance[:, None]).astype(float).T

    half = np.array([2, 1, 1])
    cos = np.cos(.4)
    sin = np.sin(.4)
    x, y, z = np.array([0, 0, 1.84]) - [9, 3, 1]
    o = np.array([cos * x + sin * y, -sin * x + cos * y, z])
    d = np.stack([cos * forward - sin * right, -sin * forward - cos * right, up], 1)
    with np.errstate(divide="ignore"):
        low = (-half - o) / d
        high = (half - o) / d
        ground = np.where(d[:, 2] < 0, -1.84 / d[:, 2], np.inf)
    enter = np.minimum(low, high).max(1)
    leave = np.maximum(low, high).min(1)
    box = (enter < leave) & (enter > 0)
    clear = abs(enter - leave) > .05                 # not at an edge, where float32 may slip off
    error = distance - np.where(box, enter, ground)
    assert (box & clear).sum() > 120
    assert (~box).sum() > 2000
    assert abs(error[clear | ~box]).max() < 6 * .015
    assert abs(error[box & clear].mean()) < .004
    assert .012 < error[~box].std() < .018
    missing = 32 * 360 - len(points)
    assert missing < 32 * 360 * .5


def solid(kind, half=(1, 1, 1), taper=0.0, x=5, axes=None):
    axes = np.eye(3) if axes is None else axes
    return Solid(kind, (x, 0, 1), half, (.5,) * 3, PLAIN, taper, axes=axes)


EYE = (0, 0, 1)
AHEAD = (1, 0, 0)
DOWN = (0, 0, -1)


@pytest.mark.parametrize("thing, origin, ray, expected", [
    (solid(BALL), EYE, AHEAD, 4.0),
    (solid(BALL, half=(2, 1, 1)), EYE, (2, 0, 0), 1.5),      # in lengths of the ray
    (solid(FRUSTUM), (0, .6, 1), AHEAD, 5 - .8),
    (solid(FRUSTUM, taper=1.0), EYE, AHEAD, 4.5),            # a cone, half way up
    (solid(FRUSTUM), (5.5, 0, 9), DOWN, 7.0),                # its lid
    (solid(FRUSTUM, half=(1, 1, 3), axes=SIDEWAYS), (4.5, 0, 9), DOWN, 8 - np.sqrt(.75)),
    (solid(CUBE, taper=.5), EYE, AHEAD, 4.25),               # a sloping side
    (solid(CUBE), (0, 1.01, 1), AHEAD, np.inf),
    (solid(CUBE, x=-5), EYE, AHEAD, np.inf),                 # behind
])
def test_hit_gives_the_distance_by_hand(thing, origin, ray, expected):
    world = synthetic.stack([thing], [-1], ["noise"])
    distance = synthetic.hit(world, 0, np.array(origin, float), np.array([ray], float))[0]
    assert distance == pytest.approx(expected)


def test_camera_and_lidar_meet_the_same_surfaces_and_culling_loses_nothing():
    scene = synthetic.compose(3, 5)
    world = synthetic.world_at(scene, 1.0)
    K = np.array([[60, 0, 40], [0, 60, 14], [0, 0, 1.0]])
    hw = (30, 80)
    camera2plane = synthetic.ego2plane(scene, 1.0)
    lidar2plane = synthetic.ego2plane(scene, 1.0)
    camera2plane[:3, :3] = camera2plane[:3, :3] @ [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    camera2plane[2, 3] = lidar2plane[2, 3] = 1.6     # both at one place
    origin = camera2plane[:3, 3]

    rays = synthetic.pixel_rays(camera2plane, K, hw)
    rects = synthetic.pixel_rects(world, camera2plane, K, hw)
    depth, ids, _ = synthetic.cast(world, origin, rays, rects)
    full_depth, full_ids, _ = synthetic.cast(world, origin, rays)
    assert np.array_equal(ids, full_ids)
    assert np.allclose(depth, full_depth)
    assert len(set(ids.ravel().tolist())) > 20

    # every pixel again as a beam: unit rays, distance in metres
    length = np.linalg.norm(rays, axis=-1)
    distance, beam_ids, _ = synthetic.cast(world, lidar2plane[:3, 3], rays / length[..., None])
    hits = ids != synthetic.NOTHING
    assert np.array_equal(beam_ids, ids)
    assert np.allclose(distance[hits], (depth * length)[hits])

    lidar2plane[:3, :3] = lidar2plane[:3, :3] @ [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]
    elevations = np.radians(np.linspace(-30, 10, 32))
    azimuths = 180
    angles = 2 * np.pi * np.arange(azimuths) / azimuths
    up, turn = np.meshgrid(elevations, angles, indexing="ij")
    x = np.cos(up) * np.sin(turn)
    y = np.cos(up) * np.cos(turn)
    beams = np.stack([x, y, np.sin(up)], -1) @ lidar2plane[:3, :3].T
    rects = synthetic.beam_rects(world, lidar2plane, elevations, azimuths)
    distance, ids, _ = synthetic.cast(world, lidar2plane[:3, 3], beams, rects)
    full_distance, full_ids, _ = synthetic.cast(world, lidar2plane[:3, 3], beams)
    near = full_distance < synthetic.REACH
    assert np.array_equal(ids[near], full_ids[near])
    assert np.allclose(distance[near], full_distance[near])


# ---- the official devkit ------------------------------------------------------------

def test_traffic_cones_are_orange_where_their_boxes_project(world):
    """The projection chain of the written tables."""
    from nuscenes.nuscenes import NuScenes
    devkit = NuScenes(synthetic.TABLES, str(world), verbose=False)
    red = 0.0
    counted = 0
    for sample in devkit.sample:
        for channel in synthetic.CAMERAS:
            path, boxes, K = devkit.get_sample_data(sample["data"][channel])
            picture = np.asarray(synthetic.Image.open(path)).astype(float)
            for box in boxes:
                annotation = devkit.get("sample_annotation", box.token)
                if box.name != "movable_object.trafficcone":
                    continue
                if annotation["visibility_token"] != "4" or not 1 < box.center[2] < 14:
                    continue
                u, v, _ = K @ (box.center + [0, .12, 0]) / box.center[2]   # below the white band
                if 1 <= u < 255 and 1 <= v < 95:
                    patch = picture[int(v), int(u)]
                    red += patch[0] > 1.35 * patch[2]
                    counted += 1
    assert counted >= 3 and red / counted > .8, (red, counted)


def test_the_official_devkit_reads_the_world(world):
    from nuscenes.eval.common.loaders import get_samples_of_custom_split, load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.nuscenes import NuScenes
    devkit = NuScenes(synthetic.TABLES, str(world), verbose=False)
    train = get_samples_of_custom_split("embedded_train", devkit)
    val = get_samples_of_custom_split("embedded_val", devkit)
    assert not set(train) & set(val)
    assert len(train) + len(val) == len(devkit.sample)
    truth = load_gt_of_sample_tokens(devkit, val, DetectionBox)
    assert len(truth.all) > 20
    names = {box.detection_name for box in truth.all}
    assert {"car", "pedestrian", "barrier", "traffic_cone"} <= names
    for box in truth.all:
        assert box.attribute_name or box.detection_name in ("barrier", "traffic_cone")
    sample = devkit.sample[1]
    sweep = sample["data"]["LIDAR_TOP"]
    for channel in synthetic.CAMERAS:
        camera = sample["data"][channel]
        points, depth, picture = devkit.explorer.map_pointcloud_to_image(sweep, camera)
        row = devkit.get("sample_data", camera)
        assert points.shape[1] > 100 and depth.min() > 1
        assert picture.size == (row["width"], row["height"])
    velocities = [devkit.box_velocity(token)[:2] for token in sample["anns"]]
    assert np.isfinite(velocities).any()


# ---- the same world in three layouts ------------------------------------------------

VEHICLES = ("car", "truck", "bus", "trailer", "construction_vehicle", "motorcycle")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same two scenes of two keyframes as nuScenes, KITTI and Waymo folders, opened."""
    root = tmp_path_factory.mktemp("layouts")
    datasets = {}
    for layout in ("nuscenes", "kitti", "waymo"):
        synthetic.write(root / layout, train=1, val=1, frames=2, seed=3, format=layout)
        datasets[layout] = data.open_dataset(root / layout, "small")       # one sweep a frame
    return datasets


def in_world(frame):
    return frame.points[:, :3] @ frame.lidar2world[:3, :3].T + frame.lidar2world[:3, 3]


def projected(frame, camera):
    """Points (N, 3) as u d, v d, d in one of a frame's cameras."""
    matrix = frame.lidar2img[camera]
    return frame.points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]


def check_waymo_points(nuscenes, waymo):
    """The same points in the world, and in the pictures of cameras 1 to 5 of Waymo."""
    gap, match = cKDTree(in_world(waymo)).query(in_world(nuscenes))
    assert gap.max() < 1e-3                          # float32 ranges and poses
    assert len(set(match)) == len(match)
    np.testing.assert_allclose(waymo.points[match, 3], nuscenes.points[:, 3], atol=2e-3)
    for k, other in enumerate((0, 5, 1, 4, 2)):
        expected = projected(nuscenes, other)
        uvd = projected(waymo, k)[match]
        ahead = expected[:, 2] > 2
        np.testing.assert_allclose(uvd[ahead, :2] / uvd[ahead, 2:],
                                   expected[ahead, :2] / expected[ahead, 2:], atol=0.5)
        difference = nuscenes.images[other].astype(int) - waymo.images[k]
        assert np.abs(difference).max() <= 1


def check_waymo_boxes(nuscenes, waymo, vehicles):
    """vehicles: labels of nuScenes that are Waymo's vehicles."""
    waymo2nuscenes = np.linalg.inv(nuscenes.lidar2world) @ waymo.lidar2world
    boxes = data.warp_boxes(waymo.boxes.astype(np.float64), waymo2nuscenes)
    boxes = boxes[waymo.labels == 0]
    expected = nuscenes.boxes[np.isin(nuscenes.labels, vehicles)]
    gap, match = cKDTree(expected[:, :3]).query(boxes[:, :3])
    assert len(expected) == (waymo.labels == 0).sum() > 3
    assert gap.max() < 2e-3
    np.testing.assert_allclose(boxes[:, 3:6], expected[match, 3:6], rtol=1e-5)
    turn = boxes[:, 6] - expected[match, 6]
    assert abs(np.sin(turn)).max() < 0.01 and np.cos(turn).min() > 0.9
    np.testing.assert_allclose(boxes[:, 7:], expected[match, 7:], atol=0.1)


def check_kitti_cars(nuscenes, kitti, car):
    """What the front picture shows; labels are to the centimetre. car: nuScenes' label."""
    cars = nuscenes.boxes[nuscenes.labels == car]
    for box in kitti.boxes[kitti.labels == 0]:
        nearest = cars[np.linalg.norm(cars[:, :3] - box[:3], axis=1).argmin()]
        np.testing.assert_allclose(box[:3], nearest[:3], atol=0.05)
        np.testing.assert_allclose(box[3:6], nearest[3:6], atol=0.006)
        turn = box[6] - nearest[6]
        assert abs(np.sin(turn)) < 0.02 and np.cos(turn) > 0.9


def test_three_layouts_give_the_same_points_boxes_and_pixels(layouts):
    nuscenes, kitti, waymo = layouts.values()
    assert len(nuscenes) == len(kitti) == len(waymo) == 4
    assert [dataset.split("val").tolist() for dataset in layouts.values()] == [[2, 3]] * 3
    vehicles = [nuscenes.grid.classes.index(name) for name in VEHICLES]
    for i in range(4):
        a, b, c = (dataset.load(i, (96, 256)) for dataset in layouts.values())
        assert len(a.points) == len(b.points) == len(c.points) > 2000
        # the same bytes, turned to x forward
        np.testing.assert_allclose(b.points, a.points, atol=1e-6)
        np.testing.assert_allclose(b.lidar2img[0], a.lidar2img[0], rtol=1e-5, atol=1e-3)
        assert np.array_equal(a.images[0], b.images[0])
        check_waymo_points(a, c)
        check_waymo_boxes(a, c, vehicles)
        check_kitti_cars(a, b, nuscenes.grid.classes.index("car"))
    assert sum((kitti.load(i, (12, 32)).labels == 0).sum() for i in range(4)) > 3


def test_the_doctor_reports_nothing_in_any_layout(layouts):
    for dataset in layouts.values():
        assert data.doctor(dataset.root) == []
