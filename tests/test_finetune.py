"""finetune.py: codes, targets and losses against slow transcriptions, the official metric on boxes that are known to be right, few labels, weights in and out."""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import clap
import common
import data
import finetune
from finetune import SMALL, Config, Detector, decode, draw_labels, encode, focal, gaussian_radius, heat_targets

ROOT = Path(__file__).resolve().parent.parent
GRID = data.GRIDS["nuscenes", "small"]
TINY = Config(preset="small", **{**SMALL, "width": 4, "bins": 12})


@pytest.fixture(scope="module")
def batch(world):
    return next(data.loader(str(world), "train", 2, preset="small", image=(48, 128)).begin_at(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Detector(TINY, GRID)


# ---- what is learned from ----

def test_boxes_with_a_point_of_any_key_sweep_stay_and_those_without_leave(world):
    frame = data.open_dataset(world, "small").load(0, (12, 32))
    boxes = np.array([[x, 0, 0, 2, 2, 2, 0, 0, 0] for x in (10, 20, 30, 40)], np.float32)
    points = np.array([[10, 0, 0, 0, 0], [20, 0, 0, 0, 0.001], [30, 0, 0, 0, 0.05], [40, 5, 0, 0, 0]], np.float32)      # key sweep, Waymo's other lasers, older, outside
    frame = replace(frame, points=points, boxes=boxes, labels=np.arange(4))
    assert finetune.augment(frame, np.random.default_rng(0), 0.0, 0.0, (False, False)).labels.tolist() == [0, 1]


def test_kitti_is_learned_and_scored_without_what_the_picture_does_not_show(kitti):
    """The picture on disk: of the fabricated scans' 800 points 400 were made from its pixels. The network's own picture is cut narrower."""
    dataset = data.open_dataset(kitti)
    for loader in (data.loader(dataset, split, 1, crop=True) for split in ("train", "val")):
        batch, full = next(iter(loader.once())), dataset.load(int(loader.indices[0]))
        kept = (torch.tensor(full.points)[:, None] == batch.points).all(2).any(1)
        assert kept[:400].all() and 400 < kept.sum() < 700 and len(data.crop_to_view(full).points) < kept.sum() == len(batch.points)
    source = (ROOT / "finetune.py").read_text()
    assert source.count("data.loader(") == source.count("crop=") == 3


def test_augment_turns_scales_and_mirrors_as_asked(world):
    frame = data.open_dataset(world, "small").load(0, (12, 32))
    for seed in range(4):
        found, asked = (act(frame, np.random.default_rng(seed), 0.4, 0.05, (True, False)) for act in (finetune.augment, data.augment_cloud))
        assert np.array_equal(found.points, asked.points) and np.array_equal(found.lidar2img, asked.lidar2img) and 3 < len(found.boxes) < len(asked.boxes)


# ---- codes, targets, losses ----

def test_decode_undoes_encode_also_after_a_turn_a_flip_a_scale(world):
    dataset, cells = data.open_dataset(world, "small"), Detector(TINY, GRID).cells
    for i in range(3):
        frame = dataset.load(i, (12, 32))
        for seed in range(4):
            moved = data.augment_cloud(frame, np.random.default_rng(seed), 0.39, 0.05, (True, True)) if seed else frame
            boxes = torch.tensor(moved.boxes)
            cell, code, within = encode(boxes, cells)
            on_map = ((boxes[:, :2] >= -25.95) & (boxes[:, :2] < 25.25)).all(1)         # the strided sites begin at the first voxel's centre, 0.8 m apart
            assert torch.equal(within, on_map) and within.any() and not within.all()
            assert code[within, :2].abs().max() <= 0.5
            torch.testing.assert_close(decode(cell, code, cells), boxes, rtol=0, atol=2e-5, equal_nan=True)


def test_what_the_targets_say_is_what_prediction_reads(batch, model, monkeypatch):
    """Targets as network output come back as the labelled boxes, before and after a warp of the frame."""
    def perfect(batch):
        cell, code, within = encode(batch.boxes, model.cells)
        out = []
        for group in model.groups:
            heat, codes = torch.full((batch.size, len(group), *model.cells.shape[1:]), -20.), torch.zeros(batch.size, 10, *model.cells.shape[1:])
            for c, label in enumerate(group):
                mine = (within & (batch.labels == label)).nonzero()[:, 0]
                for m in mine:                                                              # beside each centre a cell that is no peak
                    heat[batch.b_boxes[m], c, cell[m, 0], abs(cell[m, 1] - 1)] = 9.
                for m in mine:
                    heat[batch.b_boxes[m], c, cell[m, 0], cell[m, 1]] = 10.
                    codes[batch.b_boxes[m], :, cell[m, 0], cell[m, 1]] = code[m]
            out.append((heat, codes))
        return out
    monkeypatch.setattr(model, "maps", perfect)
    warp = np.array([[0., 1.05, 0, 0], [1.05, 0, 0, 0], [0, 0, 1.05, 0], [0, 0, 0, 1]])                # a turn, a flip and a scale
    warped = replace(batch, boxes=torch.tensor(data.warp_boxes(batch.boxes.numpy(), warp), dtype=torch.float32))
    for given in (batch, warped):
        for b, (boxes, labels, scores) in enumerate(model.predict(given)):
            boxes, labels = boxes[scores > 0.5], labels[scores > 0.5]
            mine = given.b_boxes == b
            gap = (boxes[:, None, :3] - given.boxes[mine][None, :, :3]).norm(dim=2)
            near = (given.boxes[mine][:, :2].abs() < 25.2).all(1)
            assert len(boxes) >= 0.9 * near.sum() > 3                                   # two of a class may share a cell or be neighbours
            nearest = gap.argmin(1)
            assert gap.amin(1).max() < 1e-3 and torch.equal(labels, given.labels[mine][nearest])
            found, truth = boxes, given.boxes[mine][nearest]
            torch.testing.assert_close(found[:, 3:6], truth[:, 3:6], rtol=1e-4, atol=1e-4)
            assert (torch.remainder(found[:, 6] - truth[:, 6] + math.pi, 2 * math.pi) - math.pi).abs().max() < 1e-4
            torch.testing.assert_close(found[:, 7:], truth[:, 7:], rtol=1e-4, atol=1e-4, equal_nan=True)


def slow_radius(h, w, overlap):
    """CornerNet's function line by line."""
    b1, c1 = h + w, w * h * (1 - overlap) / (1 + overlap)
    r1 = (b1 + math.sqrt(b1 ** 2 - 4 * c1)) / 2
    b2, c2 = 2 * (h + w), (1 - overlap) * w * h
    r2 = (b2 + math.sqrt(b2 ** 2 - 16 * c2)) / 2
    a3, b3, c3 = 4 * overlap, -2 * overlap * (h + w), (overlap - 1) * w * h
    r3 = (b3 + math.sqrt(b3 ** 2 - 4 * a3 * c3)) / 2
    return min(r1, r2, r3)


@pytest.mark.parametrize("modality", ["lidar", "camera"])
def test_the_maps_answer_where_something_changes(batch, modality):
    """Points put at a place, or a patch put over its pixels, change the heat maps there (camera: in that direction; it does not know how far)."""
    torch.manual_seed(0)
    detector = Detector(replace(TINY, modality=modality), GRID)                             # in training mode: fresh running statistics would shrink it all to nothing
    for place in ((12., -6., 0.), (-4., 15., -1.)):
        xyz, changed = torch.tensor([place]), batch
        if modality == "lidar":
            cluster = torch.cat([xyz + torch.rand(200, 3), torch.rand(200, 1), torch.zeros(200, 1)], 1)
            changed = replace(batch, points=torch.cat([cluster, batch.points]), b_points=torch.cat([torch.zeros(200, dtype=torch.int64), batch.b_points]))
        else:
            images = batch.images.clone()
            for image, (u, v) in zip(*common.project(xyz, torch.zeros(1, dtype=torch.int64), batch.lidar2img, batch.hw, batch.size)[1:3]):
                patch = np.s_[image, :, max(int(v) - 4, 0):int(v) + 5, max(int(u) - 4, 0):int(u) + 5]
                images[patch] = 255 - images[patch]
            changed = replace(batch, images=images)
        with torch.no_grad():
            gap = sum((a[0] - b[0]).abs().sum(1) for a, b in zip(detector.predict_maps(changed), detector.predict_maps(batch)))            # (B, Y, X)
        y, x = divmod(int(gap[0].argmax()), gap.shape[2])
        if modality == "lidar":
            cell = encode(torch.tensor([[*place[:2], 0, 1, 1, 1, 0, 0, 0.]]) + torch.tensor([.5, .5, 0, 0, 0, 0, 0, 0, 0]), detector.cells)[0][0]
            assert abs(y - cell[0]) <= 4 and abs(x - cell[1]) <= 4, (y, x, cell)           # of 64
        else:
            found = detector.cells.centre(torch.tensor([[0., y, x]]))[0]
            assert abs(np.angle(complex(*found[:2].tolist()) / complex(*place[:2]))) < 0.35, (found, place)


def test_gaussians_are_cornernets():
    rng = np.random.default_rng(0)
    h, w = rng.uniform(0.3, 20, (2, 50))
    np.testing.assert_allclose(gaussian_radius(torch.tensor(h), torch.tensor(w), 0.1), [slow_radius(a, b, 0.1) for a, b in zip(h, w)])
    cells = Detector(TINY, GRID).cells
    boxes = torch.tensor([[0., 0, 0, 4.6, 1.9, 1.6, 0, 0, 0], [2., 1, 0, 12, 3, 3, 0, 0, 0], [0., .8, 0, .6, .6, 1.8, 0, 0, 0]])
    cell, _, _ = encode(boxes, cells)
    label, b = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0])
    found = heat_targets(cell, label, b, boxes, (2, 2, *cells.shape[1:]), cells, TINY)
    expected = torch.zeros_like(found)
    for m in range(3):
        r = max(2, int(slow_radius(float(boxes[m, 3]) / 0.8, float(boxes[m, 4]) / 0.8, 0.1)))
        for y in range(64):
            for x in range(64):
                dy, dx = y - int(cell[m, 0]), x - int(cell[m, 1])
                if max(abs(dy), abs(dx)) <= r:
                    value = math.exp(-(dx * dx + dy * dy) / (2 * ((2 * r + 1) / 6) ** 2))
                    expected[b[m], label[m], y, x] = max(expected[b[m], label[m], y, x], value)
    torch.testing.assert_close(found, expected)
    assert (found == 1).sum() == 3


def test_losses_written_out_in_loops(batch, model, monkeypatch):
    torch.manual_seed(1)
    maps = [(torch.randn(2, len(g), 64, 64), torch.randn(2, 10, 64, 64)) for g in model.groups]
    monkeypatch.setattr(model, "predict_maps", lambda batch: maps)
    boxes = batch.boxes.clone()
    boxes[0, 7:] = torch.nan                                                            # an unknown velocity is not asked for
    given = replace(batch, boxes=boxes)
    loss, terms = model(given)
    cell, code, within = encode(boxes, model.cells)
    L_heat = L_box = 0.0
    for group, (heat, codes) in zip(model.groups, maps):
        rows = [m for m in range(len(boxes)) if within[m] and int(batch.labels[m]) in group]
        local = torch.tensor([group.index(int(batch.labels[m])) for m in rows], dtype=torch.int64)
        target = heat_targets(cell[rows], local, batch.b_boxes[rows], boxes[rows], heat.shape, model.cells, TINY)
        p = heat.double().sigmoid()
        total = 0.0
        for prob, t in zip(p.flatten().tolist(), target.double().flatten().tolist()):
            total += -(1 - prob) ** 2 * math.log(prob) if t == 1 else -prob ** 2 * (1 - t) ** 4 * math.log(1 - prob)
        L_heat += total / max(len(rows), 1)
        for m in rows:
            for k in range(10):
                if math.isfinite(code[m, k]):
                    gap = abs(float(codes[batch.b_boxes[m], k, cell[m, 0], cell[m, 1]]) - float(code[m, k]))
                    L_box += gap * (0.2 if k >= 8 else 1) / len(rows)
    assert float(terms["L_heat"]) == pytest.approx(L_heat, rel=1e-4) and float(terms["L_box"]) == pytest.approx(L_box, rel=1e-4)
    assert float(loss) == pytest.approx(L_heat + 0.25 * L_box, rel=1e-4)
    assert focal(torch.tensor([60., -60.]), torch.tensor([1., 0.])).sum() == 0


@pytest.mark.parametrize("modality", ["fusion", "lidar", "camera"])
def test_every_parameter_learns_and_a_frame_without_boxes_or_points_is_fine(batch, modality):
    torch.manual_seed(0)
    model = Detector(replace(TINY, modality=modality), GRID)
    for module in model.modules():                                                          # residual branches begin at zero
        if hasattr(module, "bn2"):
            torch.nn.init.ones_(module.bn2.weight)
    kept = batch.b_boxes == 0
    given = replace(batch, boxes=batch.boxes[kept], b_boxes=batch.b_boxes[kept], labels=batch.labels[kept],
                    points=batch.points[batch.b_points == 0], b_points=batch.b_points[batch.b_points == 0])
    none = replace(batch, boxes=batch.boxes[:0], b_boxes=batch.b_boxes[:0], labels=batch.labels[:0])
    for x in (given, none):
        model.zero_grad()
        loss, terms = model(x)
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        idle = {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-7}
        last = {f"heads.{g}.branches.{n}.1.bias" for g in range(len(model.heads)) for n in range(1, 6)}      # an L1 loss's signs may add up to 0 there
        assert x is none or not idle - last, idle
    assert terms["boxes"] == 0 and {n.split(".")[0] for n, _ in model.named_children()} == {"fuse", "neck", "shared", "heads"} | (
        {"lidar", "camera"} if modality == "fusion" else {modality})


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["lidar", "fusion"])
def test_four_frames_are_learned_by_heart(world, tmp_path, modality):
    """AP above 0.9 for every class present, on the frames themselves, within the range. Minutes on two cores."""
    torch.manual_seed(0)
    steps, cfg = 260, replace(Config(preset="small", **SMALL), modality=modality)
    loader = data.loader(world, "train", 2, preset="small", augment=partial(finetune.augment, rotation=0., scale=0., flip=(False, False)))
    loader.indices = loader.indices[[0, 2, 3, 5]]
    model = Detector(cfg, loader.grid)
    opt = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    for step, batch in zip(range(steps), loader.begin_at(0)):
        opt.param_groups[0]["lr"] = 3e-3 * common.cosine(step, 10, steps)
        loss, _ = model(batch)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        opt.step()
    path = tmp_path / "results.json"
    results = finetune.nuscenes_results(finetune.predict_all(model, loader, torch.device("cpu")), loader.grid.classes)
    path.write_text(json.dumps(results))
    metrics, _, present = finetune.nuscenes_score(loader.dataset, path, list(results["results"]), reach=25.)
    assert len(present) > 5 and all(metrics["mean_dist_aps"][name] > 0.9 for name in present), metrics["mean_dist_aps"]


def test_peaks_are_of_three_by_three_cells_and_one_class(world, monkeypatch):
    batch = next(data.loader(str(world), "train", 2, preset="small", image=(48, 128)).begin_at(0))
    model = finetune.Detector(TINY, GRID)
    maps = [(torch.full((2, len(group), 64, 64), -20.), torch.zeros(2, 10, 64, 64)) for group in model.groups]
    for y, x, logit in ((20, 20, 9.), (21, 21, 8.), (19, 20, 8.), (20, 18, 7.), (23, 20, 6.)):            # of cars the second and third stand beside the first
        maps[0][0][1, 0, y, x] = logit
    maps[1][0][1, 0, 20, 20], maps[1][0][1, 1, 21, 20] = 5., 4.                             # neighbours of two classes
    monkeypatch.setattr(model, "predict_maps", lambda batch: maps)
    (_, _, none), (boxes, labels, scores) = model.predict(batch)
    assert not (none > 0.5).any() and labels[scores > 0.5].tolist() == [0, 0, 0, 1, 2]
    cell = finetune.encode(boxes[:5], model.cells)[0]
    assert cell.tolist() == [[20, 20], [20, 18], [23, 20], [20, 20], [21, 20]]


def test_every_class_has_a_head_that_begins_at_a_tenth():
    for (name, _), grid in data.GRIDS.items():
        assert sorted(name for group in finetune.GROUPS[name] for name in group) == sorted(grid.classes)
    assert finetune.Head(8, 2).branches[0][-1].bias.sigmoid().tolist() == pytest.approx([0.1, 0.1], abs=1e-3)


def test_a_frame_is_predicted_alike_alone_and_among_others(world):
    """Three held-out frames in one batch and in three: running statistics, each frame's own points, pictures and pose."""
    dataset = data.open_dataset(world, "small")
    torch.manual_seed(0)
    model = finetune.Detector(TINY, GRID)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.momentum = 1.                                                            # the statistics of one step
    loaders = [data.loader(dataset, "val", batch, image=(48, 128)) for batch in (1, 3)]
    with torch.no_grad():
        model.predict_maps(next(iter(loaders[1].once())))
    alone, among = (finetune.predict_all(model, loader, torch.device("cpu")) for loader in loaders)
    assert list(alone) == list(among) == [dataset.names[i] for i in dataset.split("val")]
    for i, name in zip(dataset.split("val"), alone):
        np.testing.assert_allclose(among[name][2], alone[name][2], atol=1e-5)
        np.testing.assert_allclose(among[name][0][:20], alone[name][0][:20], atol=1e-3)
        pose = dataset.load(int(i), (12, 32)).lidar2world
        assert np.array_equal(alone[name][3], pose) and np.array_equal(among[name][3], pose)
    (one, *_), (two, *_), _ = alone.values()
    assert abs(one[:20] - two[:20]).max() > 1


# ---- few labels ----

def test_labels_are_drawn_as_asked(world):
    dataset = data.open_dataset(world, "small")
    train = dataset.split("train")
    half, most = draw_labels(dataset, train, 0.5, "frames", 3), draw_labels(dataset, train, 0.8, "frames", 3)
    assert len(half) == 3 and len(most) == 5 and set(half) < set(most) <= set(train) and (np.diff(half) > 0).all()
    assert len(draw_labels(dataset, train, 1e-6, "frames", 0)) == 1 and len(draw_labels(dataset, train, 1, "frames", 0)) == len(train)
    scene = draw_labels(dataset, train, 0.5, "scenes", 0)
    assert len(scene) == 3 and len({dataset.names[i].split("/")[1] for i in scene}) == 1
    assert any(set(draw_labels(dataset, train, 0.5, "frames", s)) != set(half) for s in range(4))
    with pytest.raises(SystemExit, match="more than 0 and at most 1"):
        draw_labels(dataset, train, 0, "frames", 0)


# ---- the official metric ----

def truth_as_predictions(dataset, indices, shift=0.0):
    """Labelled boxes that the metric's filters keep (a LiDAR or radar point lies in them), as predictions."""
    table = json.loads(Path(dataset.root, dataset.version, "sample_annotation.json").read_text())
    points, frames = {row["token"]: row["num_lidar_pts"] + row["num_radar_pts"] for row in table}, {}
    for i in indices:
        frame, rows = dataset.load(int(i), (12, 32)), dataset.annotations(int(i))
        held = np.array([points[row["token"].decode()] > 0 for row in rows[rows["label"] >= 0]], bool)
        boxes = np.nan_to_num(frame.boxes[held])
        boxes[:, 0] += shift
        frames[frame.name] = boxes, frame.labels[held], np.linspace(0.9, 0.8, held.sum()), frame.lidar2world
    return frames


@pytest.mark.parametrize("which", ["embedded", "real"])
def test_the_truth_scores_one_and_shifted_truth_what_the_thresholds_say(which, world, tmp_path, request):
    dataset = data.open_dataset(world if which == "embedded" else request.getfixturevalue("nuscenes_root"), "small")
    indices, apart = np.arange(len(dataset)), set(GRID.classes)
    for i in indices:
        rows = dataset.annotations(i)
        for n, name in enumerate(GRID.classes):
            xy = rows["box"][rows["label"] == n, :2]
            gap = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 9 * np.eye(len(xy))
            apart -= {name} if len(xy) and gap.min() < 1.2 else set()
    for shift in (0.0, 0.6):
        path = tmp_path / f"{shift}.json"
        results = finetune.nuscenes_results(truth_as_predictions(dataset, indices, shift), GRID.classes)
        path.write_text(json.dumps(results))
        found, _, present = finetune.nuscenes_score(dataset, path, list(results["results"]))
        assert len(present) > 3
        for name in present:
            for distance in (0.5, 1.0, 2.0, 4.0):
                ap = found["label_aps"][name][distance]
                if shift == 0:
                    assert ap == pytest.approx(1.0, abs=1e-6), (name, distance, ap)
                elif name in apart:                                                     # no other box of the class that the shifted one could be taken for
                    assert ap == 0 if distance == 0.5 else ap > 0.95, (name, distance, ap)      # a shift may cross the metric's range
        assert shift == 0 or len(apart & set(present)) >= 2
        absent = set(GRID.classes) - set(present)
        assert all(found["mean_dist_aps"][name] == 0 for name in absent)
        if shift == 0:
            errors = [found["label_tp_errors"][name][k] for name in present for k in ("trans_err", "scale_err", "orient_err")]
            assert np.nanmax(errors) < 3e-3 and np.isfinite(errors).sum() > 2 * len(present)     # of cones no heading is asked
            inner, _, near = finetune.nuscenes_score(dataset, path, list(results["results"]), 10.0)
            assert set(near) <= set(present)


def test_results_are_in_the_official_format(world):
    dataset = data.open_dataset(world, "small")
    results = finetune.nuscenes_results(truth_as_predictions(dataset, [0, 1]), GRID.classes, "lidar")
    assert set(results["results"]) == {name.rsplit("/", 1)[1] for name in dataset.names[:2]} and results["meta"] == dict(
        use_camera=False, use_lidar=True, use_radar=False, use_map=False, use_external=False)
    rows = dataset.annotations(0)
    truth = rows[(rows["label"] >= 0) & (rows["lidar_points"] > 0)]
    for box, row in zip(results["results"][dataset.names[0].rsplit("/", 1)[1]], truth, strict=True):
        np.testing.assert_allclose(box["translation"], row["box"][:3], atol=1e-3)
        np.testing.assert_allclose(box["size"], row["box"][[4, 3, 5]], atol=1e-5)       # w, l, h
        w, x, y, z = box["rotation"]
        assert abs(math.remainder(2 * math.atan2(z, w) - row["box"][6], 2 * math.pi)) < 1e-3 and x == y == 0
        np.testing.assert_allclose(box["velocity"], np.nan_to_num(row["box"][7:9]), atol=1e-3)
        assert box["detection_name"] == GRID.classes[row["label"]]
    assert [finetune.attribute(*case) for case in (("car", 3.), ("bus", 0.), ("truck", 0.1), ("pedestrian", 1.), ("bicycle", 0.), ("barrier", 0.))] == [
        "vehicle.moving", "vehicle.stopped", "vehicle.parked", "pedestrian.moving", "cycle.without_rider", ""]


def test_attributes_follow_class_and_speed():
    fast = {"car": "vehicle.moving", "bus": "vehicle.moving", "pedestrian": "pedestrian.moving", "bicycle": "cycle.with_rider", "motorcycle": "cycle.with_rider",
            "barrier": "", "traffic_cone": ""}
    slow = {"car": "vehicle.parked", "trailer": "vehicle.parked", "bus": "vehicle.stopped", "pedestrian": "pedestrian.standing", "motorcycle": "cycle.without_rider",
            "barrier": "", "traffic_cone": ""}
    for speed, expected in ((0.3, fast), (0.1, slow)):
        boxes = np.array([[5., 0, 0, 4, 2, 1.5, 0, 0, -speed]] * len(expected))
        labels = np.array([GRID.classes.index(name) for name in expected])
        rows, = finetune.nuscenes_results({"nuscenes/s/t": (boxes, labels, np.ones(len(boxes)), np.eye(4))}, GRID.classes)["results"].values()
        assert {row["detection_name"]: row["attribute_name"] for row in rows} == expected


def test_what_is_written_of_a_nuscenes_run(world, tmp_path, monkeypatch, capsys):
    """True boxes within 27 m of the LiDAR and none beyond: within 25.6 m everything is found, over the metric's not. One class is said to be absent."""
    dataset, score, frames = data.open_dataset(world, "small"), finetune.nuscenes_score, {}
    for name, (boxes, labels, scores, pose) in truth_as_predictions(dataset, dataset.split("val")).items():
        near = np.hypot(*boxes[:, :2].T) < 27
        frames[name] = boxes[near], labels[near], scores[near], pose
    monkeypatch.setattr(finetune, "predict_all", lambda *_: frames)
    monkeypatch.setattr(finetune, "nuscenes_score", lambda *words: [part if n < 2 else part[1:] for n, part in enumerate(score(*words))])
    for name in ("save_figures", "draw_curves"):
        monkeypatch.setattr(finetune, name, lambda *_: None)
    finetune.finish(None, replace(TINY, modality="lidar", init="before"), tmp_path, SimpleNamespace(grid=GRID, dataset=dataset), None, 0)
    found, told = json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out.splitlines()
    meta = json.loads((tmp_path / "results_nusc.json").read_text())["meta"]
    assert not meta["use_camera"] and meta["use_lidar"] and found["reach"] == 25.6 and found["frames"] == 3
    assert all(ap == pytest.approx(1, abs=1e-6) for ap in found["AP_reach"].values()) and found["mAP_reach"] == pytest.approx(1, abs=1e-6) and len(found["AP_reach"]) > 3
    present = [name for name in GRID.classes if name not in found["absent"]]
    assert found["absent"] == ["barrier"] and set(found["AP_reach"]) <= set(present)
    assert found["mAP_present"] == pytest.approx(np.mean([found["AP"][name] for name in present])) and found["mAP_present"] < 0.97
    assert found["mAP"] == pytest.approx(np.mean([found["AP"][name] for name in GRID.classes])) and abs(found["mAP"] - found["mAP_present"]) > 1e-3
    assert told[-1] == (f"{tmp_path}: | before | lidar | 0.05 of the frames | seed 0 | mAP {found['mAP']:.4f} | NDS {found['NDS']:.4f} | mAP within 25.6 m 1.0000 |")


# ---- whole runs ----

def run(out, *flags):
    command = [sys.executable, str(ROOT / "finetune.py"), "--out", str(out), "--preset", "small", "--width", "4", "--bins", "12", "--batch", "1", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=out.parent)


def test_pre_train_fine_tune_and_score_again(three_frames, tmp_path, capsys):
    torch.manual_seed(0)
    before = clap.CLAP(clap.Config(preset="small", **{**clap.SMALL, "width": 4, "bins": 12}), GRID)
    (tmp_path / "before").mkdir()
    for name, content in (("provenance.json", '[{"commit": "none"}]'), ("config.json", '{"preset": "small"}')):
        (tmp_path / "before" / name).write_text(content)
    cfg = clap.Config(preset="small", out=str(tmp_path / "before"), **{**clap.SMALL, "width": 4, "bins": 12})
    clap.save(cfg, 7, before, [torch.optim.AdamW(before.parameters())], clap.UNITS, GRID)
    (tmp_path / "before" / "frames.txt").write_text("\n".join(data.open_dataset(three_frames).names[:1]))
    tuned = run(tmp_path / "tuned", "--data", str(three_frames), "--init", str(tmp_path / "before"), "--fraction", "1", "--steps", "2", "--lr-pretrained", "4e-4")
    assert tuned.returncode == 0, tuned.stderr[-2000:]
    assert "labels of 2 frames" in tuned.stdout and "1 of them were in the pre-training" in tuned.stdout and "of step 7" in tuned.stdout
    last = tuned.stdout.splitlines()[-1]
    metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())
    rates = [json.loads(line)["lr"] for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3, 5e-4])                                             # of 2 steps none warms up, whatever --warmup says
    new, old = torch.load(tmp_path / "tuned" / "last.pt", weights_only=True)["optimizers"][0]["param_groups"]
    parts = {unit: len(list(before.get_submodule(unit).parameters())) for unit in clap.UNITS}
    assert old["base"] == 4e-4 and len(old["params"]) == sum(parts.values()) and new["base"] == 1e-3 and len(new["params"]) > 50
    assert f"mAP {metrics['mAP']:.4f} | NDS {metrics['NDS']:.4f}" in last and len(metrics["AP"]) == 10
    for name in ("results_nusc.json", "labels.txt", "figures/bev.png", "figures/images.png", "figures/precision_recall.png", "figures/losses.png",
                 "backbones.safetensors"):
        assert (tmp_path / "tuned" / name).stat().st_size > 0, name
    capsys.readouterr()
    finetune.train(0, 1, replace(Config(), eval_only=str(tmp_path / "tuned"), gpus=0, workers=0))
    assert capsys.readouterr().out.splitlines()[-1] == last
    moved = shutil.copytree(three_frames, tmp_path / "moved")
    kept = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(kept | dict(data=str(tmp_path / "where it was"))))
    with pytest.raises(data.DataError, match="where it was: no data set here"):
        finetune.train(0, 1, replace(Config(), eval_only=str(tmp_path / "tuned"), gpus=0, workers=0))
    finetune.train(0, 1, replace(Config(), eval_only=str(tmp_path / "tuned"), data=str(moved), gpus=0, workers=0))
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.fixture
def stored(tmp_path):
    """A pre-training run's weights, its model and a detector to load them into."""
    cfg = clap.Config(preset="small", out=str(tmp_path), **{**clap.SMALL, "width": 4, "bins": 12})
    before = clap.CLAP(cfg, GRID)
    (tmp_path / "provenance.json").write_text('[{"commit": "none"}]')
    clap.save(cfg, 7, before, [torch.optim.AdamW(before.parameters())], clap.UNITS, GRID)
    return before


# ==== tests/test_finetune.py ====

def test_a_run_is_these_steps(world, stored, tmp_path, monkeypatch):
    """Which frames in which order, turned how; which weights are loaded; rates of both groups, weight decay, the clipped gradient: written out."""
    for name in ("finish", "loss_curves"):
        monkeypatch.setattr(finetune, name, lambda *_: None)
    cfg = replace(TINY, data=str(world), out=str(tmp_path / "run"), gpus=0, seed=3, init=str(tmp_path), use=("lidar",), modality="lidar", fraction=0.5, draw="scenes",
                  epochs=1, steps=0, batch=1, lr=2e-3, lr_pretrained=5e-4, weight_decay=0.3, clip=0.5, rotation=0.3, scale=0.2)
    finetune.train(0, 1, cfg)
    dataset = data.open_dataset(world, "small")
    loader = data.loader(dataset, "train", 1, seed=3, augment=partial(finetune.augment, rotation=0.3, scale=0.2, flip=(True, True)))
    loader.indices = finetune.draw_labels(dataset, dataset.split("train"), 0.5, "scenes", 3)
    torch.manual_seed(3)
    model = finetune.Detector(cfg, GRID)
    model.lidar.load_state_dict(stored.lidar.state_dict())
    new = [p for name, p in model.named_parameters() if not name.startswith("lidar.")]
    opt = torch.optim.AdamW([dict(params=new), dict(params=model.lidar.parameters())], weight_decay=0.3, fused=True)
    for factor, batch in zip((1, 0.75, 0.25), loader.begin_at(0)):                          # half a cosine over three steps
        opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 2e-3 * factor, 5e-4 * factor
        opt.zero_grad()
        model(batch)[0].backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        opt.step()
    assert (tmp_path / "run" / "labels.txt").read_text().splitlines() == [dataset.names[i] for i in loader.indices]
    found = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert found["step"] == len(loader.indices) == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found["model"][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_units_are_loaded_strictly(stored, tmp_path, capsys):
    model, before = Detector(TINY, GRID), stored.state_dict()
    new = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = finetune.load_units(tmp_path, model, (), finetune.UNITS, GRID, 0)
    told = capsys.readouterr().out
    for unit in finetune.UNITS:
        count = sum(k.startswith(unit + ".") for k in before)
        assert f"{unit} {count}/{count}" in told
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in loaded else new[name]), name
    assert loaded == {k for k in before if k.startswith(tuple(u + "." for u in finetune.UNITS))}
    some = Detector(TINY, GRID)
    assert {k.split(".")[0] for k in finetune.load_units(tmp_path, some, ("lidar",), finetune.UNITS, GRID, 0)} == {"lidar"}
    finetune.load_units(tmp_path, some, (), finetune.UNITS, data.GRIDS["nuscenes", "paper"], 0)
    assert "another grid" in capsys.readouterr().out


@pytest.mark.parametrize("case, told", [("width", "tensors of lidar do not fit.*--resnet 18 --width 4 --bins 12"), ("bins", "tensors of camera.neck do not fit"),
                                        ("unit", "holds lidar, camera.resnet, camera.neck, fuse; asked for camera"), ("cut", "not a whole safetensors file"),
                                        ("absent", "no such file")])
def test_weights_that_do_not_fit_are_refused(stored, tmp_path, case, told):
    cfg, wanted = {"width": replace(TINY, width=8), "bins": replace(TINY, bins=20)}.get(case, TINY), ("camera",) if case == "unit" else ()
    model, path = Detector(cfg, GRID), tmp_path / "backbones.safetensors"
    if case == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=told):
        finetune.load_units(tmp_path / "nowhere" if case == "absent" else tmp_path, model, wanted, finetune.UNITS, GRID, 0)


@pytest.mark.parametrize("flags, told", [(dict(epochs=2), "one of them must be 0"), (dict(batch=0), "start at 1"), (dict(steps=-1, epochs=20), "one of them must be 0"),
                                         (dict(use=("lidar", "head"), init="x"), "expected some of lidar"), (dict(use=("lidar",)), "--use lidar with --init none"),
                                         (dict(modality="lidar", use=("camera.neck",), init="x"), "expected some of lidar fuse"), (dict(fraction=2.), "at most 1"),
                                         (dict(eval_only="nowhere"), "no readable configuration")])
def test_flags_that_cannot_work_are_refused_before_anything_is_written(three_frames, tmp_path, flags, told):
    with pytest.raises(SystemExit, match=told):
        finetune.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_units_may_be_named_with_commas_or_blanks():
    wanted = [finetune.asked_units(replace(TINY, init="x", use=use))[0] for use in (("lidar", "fuse"), ("lidar,fuse",))]
    assert wanted == [("lidar", "fuse")] * 2


@pytest.mark.parametrize("gone, told", [("maps/*.png", "maps/.*png is missing, which nuscenes-devkit opens"),
                                        ("v1.0-*/attribute.json", "attribute.json: this table is missing"), ("v1.0-*/map.json", "map.json: this table is missing")])
def test_what_the_devkit_wants_is_asked_for_before_training(three_frames, tmp_path, gone, told):
    root = Path(shutil.copytree(three_frames, tmp_path / "root"))
    next(root.glob(gone)).unlink()
    with pytest.raises((SystemExit, data.DataError), match=told):
        finetune.train(0, 1, replace(TINY, data=str(root), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_logits_do_not_tie_where_the_rest_is_bfloat16():
    """Of two neighbours of one value both would be peaks, and nothing here suppresses the second."""
    torch.manual_seed(0)
    head, x = finetune.Head(16, 3).eval(), torch.randn(1, 16, 64, 64)
    exact = head(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        heat, code = head(x)
    assert heat.dtype == code.dtype == torch.float32 and len(heat.unique()) > 0.9 * heat.numel() > 10 * len(exact.bfloat16().unique())
    torch.testing.assert_close(heat, exact, rtol=0, atol=0.05)


def test_data_without_labels_is_refused(three_frames, kitti, tmp_path):
    with pytest.raises(SystemExit, match="raw drives: no box is annotated"):
        finetune.train(0, 1, replace(TINY, data=str(kitti / "2011_09_26"), out=str(tmp_path / "run")))
    bare = tmp_path / "bare"
    shutil.copytree(three_frames, bare)
    next(bare.glob("v1.0-*/sample_annotation.json")).write_text("[]")
    with pytest.raises(SystemExit, match="no box is annotated"):
        finetune.train(0, 1, replace(TINY, data=str(bare), out=str(tmp_path / "run")))
