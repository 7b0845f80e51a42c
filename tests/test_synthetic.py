"""synthetic.py: the bytes repeat, the annotations are true, rays hit what closed forms say, and the official devkit reads the folder."""
import hashlib
import json

import numpy as np
import pytest
from scipy.spatial import cKDTree

import data
import synthetic

CLASSES = {"vehicle.car", "vehicle.truck", "vehicle.construction", "vehicle.bus.rigid", "vehicle.trailer", "movable_object.barrier",
           "vehicle.motorcycle", "vehicle.bicycle", "human.pedestrian.adult", "movable_object.trafficcone"}
SMALL = dict(train=1, val=1, frames=2, beams=16, azimuths=90, image=(24, 64))


def tables(root):
    return {path.stem: json.loads(path.read_text()) for path in (root / synthetic.TABLES).glob("*.json")}


def rotation(w, x, y, z):
    """Quaternion to matrix, written out from the definition; shares nothing with the code under test."""
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def digest(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def bare(solids, curve=1e-5):
    """A scene of scenery alone: no motion, no light needed."""
    scene = synthetic.Scene("bare", curve, 1e3, 5.0, 0.0, np.eye(4), {})
    scene.solids = synthetic.stack(solids, [-1] * len(solids))
    return scene


def test_same_seed_same_bytes_whoever_writes(tmp_path, monkeypatch):
    synthetic.write(tmp_path / "a", **SMALL)
    synthetic.write(tmp_path / "b", seed=1, **SMALL)
    (tmp_path / "c").mkdir()                                               # an empty folder may be filled
    monkeypatch.setattr(synthetic, "ALONE", 0)
    synthetic.write(tmp_path / "c", **SMALL)                               # by two children
    first, other = digest(tmp_path / "a"), digest(tmp_path / "b")
    assert first == digest(tmp_path / "c") and len([name for name in first if name.startswith("samples")]) == 2 * 2 * 7 and len(first) > 40
    drawn = {hash for name, hash in other.items() if name.startswith("samples")}
    assert not drawn & set(first.values()), "another seed repeats a picture or a sweep"
    assert not list(tmp_path.glob(".*")), "a temporary folder was left behind"


def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "mine").write_text("not to be lost")
    with pytest.raises(FileExistsError, match="not empty"):
        synthetic.write(tmp_path, **SMALL)
    assert (tmp_path / "mine").read_text() == "not to be lost"


def test_all_classes_in_both_splits_and_solids_inside_their_boxes():
    for scenes in (range(24), range(24, 32)):
        seen = set()
        for index in scenes:
            for thing in synthetic.compose(0, index).things:
                seen.add(thing.category)
                if thing.category:
                    w, l, h = thing.size
                    points = synthetic.corners(synthetic.stack(thing.solids, [0] * len(thing.solids))).reshape(-1, 3)
                    assert (abs(points[:, :2]) < [l / 2, w / 2]).all() and points[:, 2].min() > -1e-9 and points[:, 2].max() < h, thing
        assert CLASSES <= seen, CLASSES - seen
        assert "" in seen, "no clutter"


def test_num_lidar_pts_and_poses(world):
    t = tables(world)
    by = {name: {row["token"]: row for row in t[name]} for name in ("ego_pose", "calibrated_sensor", "sensor", "sample_data")}
    sweeps = {row["sample_token"]: row for row in t["sample_data"] if row["fileformat"] == "pcd"}
    total = 0
    for annotation in t["sample_annotation"]:
        row = sweeps[annotation["sample_token"]]
        points = np.fromfile(world / row["filename"], np.float32).reshape(-1, 5)
        xyz = points[:, :3].astype(float)
        for pose in (by["calibrated_sensor"][row["calibrated_sensor_token"]], by["ego_pose"][row["ego_pose_token"]]):
            xyz = xyz @ rotation(*pose["rotation"]).T + pose["translation"]
        local = (xyz - annotation["translation"]) @ rotation(*annotation["rotation"])
        w, l, h = annotation["size"]
        inside = (abs(local[:, 0]) < l / 2) & (abs(local[:, 1]) < w / 2) & (abs(local[:, 2]) < h / 2)
        assert inside.sum() == annotation["num_lidar_pts"], annotation["token"]
        total += inside.sum()
    assert total > 500
    assert set(points[:, 4]) <= set(range(32)) and 0 <= points[:, 3].min() and points[:, 3].max() <= 255 and abs(points[:, :3]).max() < 75
    assert .02 < (np.linalg.norm(points[:, :2], axis=1) < 1).mean() < .15, "returns from the vehicle's own roof"
    assert np.linalg.norm([row["translation"] for row in t["ego_pose"]], axis=1).min() > 300
    delays = {row["filename"].split("/")[1]: row["timestamp"] - sweeps[row["sample_token"]]["timestamp"] for row in t["sample_data"]}
    assert delays == {"LIDAR_TOP": 0, **{channel: camera[3] for channel, camera in synthetic.CAMERAS.items()}}


def test_links(world):
    t = tables(world)
    for name in ("sample", "sample_data", "sample_annotation"):
        rows = {row["token"]: row for row in t[name]}
        assert len(rows) == len(t[name]), f"{name}: a token twice"
        for row in rows.values():
            assert not row["next"] or rows[row["next"]]["prev"] == row["token"]
            assert not row["prev"] or rows[row["prev"]]["next"] == row["token"]
    for instance in t["instance"]:
        rows, at, length = {row["token"]: row for row in t["sample_annotation"]}, instance["first_annotation_token"], 1
        while rows[at]["next"]:
            at, length = rows[at]["next"], length + 1
        assert at == instance["last_annotation_token"] and length == instance["nbr_annotations"]


def test_velocity_is_the_true_speed(world):
    t = tables(world)
    start = {row["token"]: row["timestamp"] for row in t["sample"]}
    rows = {row["token"]: row for row in t["sample_annotation"]}
    moving = 0
    for index, name in enumerate(sorted(scene["name"] for scene in t["scene"])):
        scene = synthetic.compose(0, index, 3)
        assert scene.name == name
        for i, thing in enumerate(scene.things):
            tokens = [synthetic.token(0, name, "annotation", i, k) for k in range(3)]
            if tokens[0] in rows and tokens[2] in rows:
                a, b = rows[tokens[0]], rows[tokens[2]]
                seconds = (start[b["sample_token"]] - start[a["sample_token"]]) / 1e6
                step = np.subtract(b["translation"], a["translation"])
                speed = np.hypot(thing.vs * (1 - scene.curve * thing.l), thing.vl)
                assert np.linalg.norm(step) / seconds == pytest.approx(speed, rel=5e-3, abs=1e-9)      # a chord of the arc
                if speed and thing.vs:
                    ahead = rotation(*rows[tokens[1]]["rotation"])[:, 0]
                    assert step @ ahead / seconds == pytest.approx(speed, rel=1e-2), "it does not face where it goes"
                moving += speed > 0
    assert moving >= 5


def test_lidar_ranges_of_a_box_are_the_closed_form():
    """A cube 4 x 2 x 2 m, turned by 0.4 rad at (9, 3, 1); slab intersection transcribed here, ground z = 0, LiDAR at 1.84 m."""
    axes = synthetic.pose((0, 0, 0), .4)[:3, :3]
    scene = bare([synthetic.Solid(synthetic.CUBE, (9, 3, 1), (2, 1, 1), (.5,) * 3, shine=1.0, axes=axes)])
    lidar2plane = np.eye(4)
    lidar2plane[:3, :3], lidar2plane[2, 3] = [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], 1.84
    nowhere = synthetic.stack([synthetic.Solid(synthetic.BALL, (0, 0, -99), (.1,) * 3, (0, 0, 0))], [-1])
    points = synthetic.sweep(synthetic.world_at(scene, 0), scene, lidar2plane, nowhere, 32, 360, np.random.default_rng(0))
    distance = np.linalg.norm(points[:, :3], axis=1)
    ray = points[:, :3] / distance[:, None]
    d = np.stack([ray[:, 1], -ray[:, 0], ray[:, 2]], 1).astype(float)      # x right, y forward -> x forward, y left
    o, c, s = np.array([0, 0, 1.84]) - [9, 3, 1], np.cos(.4), np.sin(.4)
    o = np.array([c * o[0] + s * o[1], -s * o[0] + c * o[1], o[2]])
    d = np.stack([c * d[:, 0] + s * d[:, 1], -s * d[:, 0] + c * d[:, 1], d[:, 2]], 1)
    with np.errstate(divide="ignore"):
        low, high = (-np.array([2, 1, 1]) - o) / d, (np.array([2, 1, 1]) - o) / d
        ground = np.where(d[:, 2] < 0, -1.84 / d[:, 2], np.inf)
    enter, leave = np.minimum(low, high).max(1), np.maximum(low, high).min(1)
    box = (enter < leave) & (enter > 0)
    clear = abs(enter - leave) > .05                                       # not at an edge, where float32 directions may slip off
    error = distance - np.where(box, enter, ground)
    assert (box & clear).sum() > 120 and (~box).sum() > 2000
    assert abs(error[clear | ~box]).max() < 6 * .015 and abs(error[box & clear].mean()) < .004 and .012 < error[~box].std() < .018
    missing = 32 * 360 - len(points)
    assert missing < 32 * 360 * .5


@pytest.mark.parametrize("solid, origin, ray, expected", [
    (synthetic.Solid(synthetic.BALL, (5, 0, 1), (1, 1, 1), ()), (0, 0, 1), (1, 0, 0), 4.0),
    (synthetic.Solid(synthetic.BALL, (5, 0, 1), (2, 1, 1), ()), (0, 0, 1), (2, 0, 0), 1.5),                        # in lengths of the ray
    (synthetic.Solid(synthetic.FRUSTUM, (5, 0, 1), (1, 1, 1), ()), (0, .6, 1), (1, 0, 0), 5 - .8),
    (synthetic.Solid(synthetic.FRUSTUM, (5, 0, 1), (1, 1, 1), (), 0, 1.0), (0, 0, 1), (1, 0, 0), 4.5),             # a cone, half way up
    (synthetic.Solid(synthetic.FRUSTUM, (5, 0, 1), (1, 1, 1), ()), (5.5, 0, 9), (0, 0, -1), 7.0),                  # its lid
    (synthetic.Solid(synthetic.FRUSTUM, (5, 0, 1), (1, 1, 3), (), 0, 0, .4, synthetic.SIDEWAYS), (4.5, 0, 9), (0, 0, -1), 8 - np.sqrt(.75)),
    (synthetic.Solid(synthetic.CUBE, (5, 0, 1), (1, 1, 1), (), 0, .5), (0, 0, 1), (1, 0, 0), 4.25),                # a sloping side
    (synthetic.Solid(synthetic.CUBE, (5, 0, 1), (1, 1, 1), ()), (0, 1.01, 1), (1, 0, 0), np.inf),
    (synthetic.Solid(synthetic.CUBE, (-5, 0, 1), (1, 1, 1), ()), (0, 0, 1), (1, 0, 0), np.inf),                    # behind
])
def test_hit(solid, origin, ray, expected):
    world = synthetic.stack([solid._replace(colour=(.5,) * 3)], [-1])
    assert synthetic.hit(world, 0, np.array(origin, float), np.array([ray], float))[0] == pytest.approx(expected)


def test_camera_and_lidar_meet_the_same_surfaces_and_culling_loses_nothing():
    scene = synthetic.compose(3, 5)
    world, K, hw = synthetic.world_at(scene, 1.0), np.array([[60, 0, 40], [0, 60, 14], [0, 0, 1.0]]), (30, 80)
    camera2plane, lidar2plane = synthetic.ego2plane(scene, 1.0), synthetic.ego2plane(scene, 1.0)
    camera2plane[:3, :3] = camera2plane[:3, :3] @ [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    camera2plane[2, 3] = lidar2plane[2, 3] = 1.6                           # both at one place
    rays = synthetic.pixel_rays(camera2plane, K, hw)
    depth, ids, _ = synthetic.cast(world, camera2plane[:3, 3], rays, synthetic.pixel_rects(world, camera2plane, K, hw))
    full, all_ids, _ = synthetic.cast(world, camera2plane[:3, 3], rays)
    assert np.array_equal(ids, all_ids) and np.allclose(depth, full)
    assert len(set(ids.ravel().tolist())) > 20
    elevations, azimuths = np.radians(np.linspace(-30, 10, 32)), 180       # every pixel again as a beam: unit rays, distance in metres
    length = np.linalg.norm(rays, axis=-1)
    distance, again, _ = synthetic.cast(world, lidar2plane[:3, 3], rays / length[..., None])
    seen = ids != synthetic.NOTHING
    assert np.array_equal(again, ids) and np.allclose(distance[seen], (depth * length)[seen])
    lidar2plane[:3, :3] = lidar2plane[:3, :3] @ [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]
    up, turn = np.meshgrid(elevations, 2 * np.pi * np.arange(azimuths) / azimuths, indexing="ij")
    beams = np.stack([np.cos(up) * np.sin(turn), np.cos(up) * np.cos(turn), np.sin(up)], -1) @ lidar2plane[:3, :3].T
    culled = synthetic.cast(world, lidar2plane[:3, 3], beams, synthetic.beam_rects(world, lidar2plane, elevations, azimuths))
    full = synthetic.cast(world, lidar2plane[:3, 3], beams)
    near = full[0] < synthetic.REACH
    assert np.array_equal(culled[1][near], full[1][near]) and np.allclose(culled[0][near], full[0][near])


def test_a_labelled_colour_lands_where_the_box_says(world):
    """The projection chain of the written tables: traffic cones are orange in the pictures where their boxes are."""
    from nuscenes.nuscenes import NuScenes
    devkit = NuScenes(synthetic.TABLES, str(world), verbose=False)
    red, counted = 0.0, 0
    for sample in devkit.sample:
        for channel in synthetic.CAMERAS:
            path, boxes, K = devkit.get_sample_data(sample["data"][channel])
            picture = np.asarray(synthetic.Image.open(path)).astype(float)
            for box in boxes:
                visible = devkit.get("sample_annotation", box.token)["visibility_token"] == "4"
                if box.name == "movable_object.trafficcone" and visible and 1 < box.center[2] < 14:
                    u, v, _ = K @ (box.center + [0, .12, 0]) / box.center[2]               # below the white band
                    if 1 <= u < 255 and 1 <= v < 95:
                        patch = picture[int(v), int(u)]
                        red, counted = red + (patch[0] > 1.35 * patch[2]), counted + 1
    assert counted >= 3 and red / counted > .8, (red, counted)


def test_devkit_reads_and_evaluates(world):
    from nuscenes.eval.common.loaders import get_samples_of_custom_split, load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.nuscenes import NuScenes
    devkit = NuScenes(synthetic.TABLES, str(world), verbose=False)
    tokens = {split: get_samples_of_custom_split(split, devkit) for split in ("embedded_train", "embedded_val")}
    assert not set(tokens["embedded_train"]) & set(tokens["embedded_val"]) and sum(map(len, tokens.values())) == len(devkit.sample)
    truth = load_gt_of_sample_tokens(devkit, tokens["embedded_val"], DetectionBox)
    assert len(truth.all) > 20 and {"car", "pedestrian", "barrier", "traffic_cone"} <= {box.detection_name for box in truth.all}
    assert all(box.attribute_name or box.detection_name in ("barrier", "traffic_cone") for box in truth.all)
    sample = devkit.sample[1]
    for channel in synthetic.CAMERAS:
        points, depth, picture = devkit.explorer.map_pointcloud_to_image(sample["data"]["LIDAR_TOP"], sample["data"][channel])
        row = devkit.get("sample_data", sample["data"][channel])
        assert points.shape[1] > 100 and depth.min() > 1 and picture.size == (row["width"], row["height"])
    assert np.isfinite([devkit.box_velocity(token)[:2] for token in sample["anns"]]).any()


# ---- the same world in three layouts ----

@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same two scenes of two keyframes as nuScenes, KITTI and Waymo folders, opened."""
    root, found = tmp_path_factory.mktemp("layouts"), {}
    for layout in ("nuscenes", "kitti", "waymo"):
        synthetic.write(root / layout, train=1, val=1, frames=2, seed=3, format=layout)
        found[layout] = data.open_dataset(root / layout, "small")                            # one sweep a frame
    return found


def test_three_layouts_give_the_same_points_boxes_and_pixels(layouts):
    nuscenes, kitti, waymo = layouts.values()
    assert len(nuscenes) == len(kitti) == len(waymo) == 4
    assert [d.split("val").tolist() for d in layouts.values()] == [[2, 3]] * 3
    vehicles = [nuscenes.grid.classes.index(name) for name in ("car", "truck", "bus", "trailer", "construction_vehicle", "motorcycle")]
    for i in range(4):
        a, b, c = (dataset.load(i, (96, 256)) for dataset in layouts.values())
        assert len(a.points) == len(b.points) == len(c.points) > 2000
        np.testing.assert_allclose(b.points, a.points, atol=1e-6)                           # the same bytes, turned to x forward
        there = a.points[:, :3] @ a.lidar2world[:3, :3].T + a.lidar2world[:3, 3]
        here = c.points[:, :3] @ c.lidar2world[:3, :3].T + c.lidar2world[:3, 3]
        gap, match = cKDTree(here).query(there)
        assert gap.max() < 1e-3 and len(set(match)) == len(match)                          # float32 ranges and poses
        np.testing.assert_allclose(c.points[match, 3], a.points[:, 3], atol=2e-3)
        for k, other in enumerate((0, 5, 1, 4, 2)):                                         # cameras 1 to 5 of Waymo
            one, two = (f.points[:, :3] @ m[:3, :3].T + m[:3, 3] for f, m in ((a, a.lidar2img[other]), (c, c.lidar2img[k])))
            ahead = one[:, 2] > 2
            np.testing.assert_allclose(two[match][ahead, :2] / two[match][ahead, 2:], one[ahead, :2] / one[ahead, 2:], atol=0.5)
            assert np.abs(a.images[other].astype(int) - c.images[k]).max() <= 1
        np.testing.assert_allclose(b.lidar2img[0], a.lidar2img[0], rtol=1e-5, atol=1e-3)
        assert np.array_equal(a.images[0], b.images[0])

        moved = data.warp_boxes(c.boxes.astype(np.float64), np.linalg.inv(a.lidar2world) @ c.lidar2world)
        wanted = a.boxes[np.isin(a.labels, vehicles)]
        met = cKDTree(wanted[:, :3]).query(moved[c.labels == 0][:, :3])
        assert len(wanted) == (c.labels == 0).sum() > 3 and met[0].max() < 2e-3
        np.testing.assert_allclose(moved[c.labels == 0][:, 3:6], wanted[met[1], 3:6], rtol=1e-5)
        turn = moved[c.labels == 0][:, 6] - wanted[met[1], 6]
        assert abs(np.sin(turn)).max() < 0.01 and np.cos(turn).min() > 0.9
        np.testing.assert_allclose(moved[c.labels == 0][:, 7:], wanted[met[1], 7:], atol=0.1)
        cars = a.boxes[a.labels == nuscenes.grid.classes.index("car")]
        for box in b.boxes[b.labels == 0]:                                                  # what the front picture shows, labels to the centimetre
            n = np.linalg.norm(cars[:, :3] - box[:3], axis=1).argmin()
            np.testing.assert_allclose(box[:3], cars[n, :3], atol=0.05)
            np.testing.assert_allclose(box[3:6], cars[n, 3:6], atol=0.006)
            assert abs(np.sin(box[6] - cars[n, 6])) < 0.02 and np.cos(box[6] - cars[n, 6]) > 0.9
    assert sum((kitti.load(i, (12, 32)).labels == 0).sum() for i in range(4)) > 3


def test_the_doctor_finds_nothing_wrong_in_any_layout(layouts):
    for dataset in layouts.values():
        assert data.doctor(dataset.root) == []
