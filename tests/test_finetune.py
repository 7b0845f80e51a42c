"""finetune.py: codes, targets and losses against slow transcriptions, the official metric on boxes
that are known to be right, few labels, weights in and out."""
import json
import math
import os
import re
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
from common import draw_labels
from conftest import Waits, on_two
from finetune import (
    SMALL, Config, Detector, decode, encode, focal, gaussian_radius, heat_targets)

ROOT = Path(__file__).resolve().parent.parent
GRID = data.GRIDS["nuscenes", "small"]
TINY = Config(preset="small", **{**SMALL, "width": 4, "bins": 12})
CPU = torch.device("cpu")


def first_batch(world):
    return data.loader(str(world), "train", 2, preset="small", image=(48, 128)).first(1)[0]


def random_detector(cfg=TINY):
    torch.manual_seed(0)
    return Detector(cfg, GRID)


@pytest.fixture(scope="module")
def batch(world):
    return first_batch(world)


@pytest.fixture(scope="module")
def model():
    return random_detector()


# ---- augmentation and crop -----------------------------------------------------------

def test_augment_keeps_boxes_that_hold_a_keyframe_point(world):
    frame = data.open_dataset(world, "small").load(0, (12, 32))
    boxes = np.array([[x, 0, 0, 2, 2, 2, 0, 0, 0] for x in (10, 20, 30, 40)], np.float32)
    points = np.array([
        [10, 0, 0, 0, 0],      # of the keyframe sweep
        [20, 0, 0, 0, 0.001],  # of Waymo's other lasers
        [30, 0, 0, 0, 0.05],   # of an older sweep
        [40, 5, 0, 0, 0],      # outside its box
    ], np.float32)
    frame = replace(frame, points=points, boxes=boxes, labels=np.arange(4))
    rng = np.random.default_rng(0)
    augmented = finetune.augment(frame, rng, 0.0, 0.0, (False, False))
    assert augmented.labels.tolist() == [0, 1]


def test_kitti_loaders_crop_to_the_image_on_disk(kitti):
    """Of the fabricated scans' 800 points 400 were made from its pixels.

    The network's own image is cut narrower.
    """
    dataset = data.open_dataset(kitti)
    for split in ("train", "val"):
        loader = data.loader(dataset, split, 1, crop=True)
        batch = next(iter(loader.once()))
        full = dataset.load(int(loader.indices[0]))
        in_batch = (torch.tensor(full.points)[:, None] == batch.points).all(2).any(1)
        assert in_batch[:400].all() and 400 < in_batch.sum() < 700
        assert len(data.crop_to_view(full).points) < in_batch.sum() == len(batch.points)
    source = (ROOT / "finetune.py").read_text()
    assert source.count("data.loader(") == source.count("crop=") == 3


def test_augment_warps_like_augment_cloud(world):
    frame = data.open_dataset(world, "small").load(0, (12, 32))
    for seed in range(4):
        options = 0.4, 0.05, (True, False)
        warped = finetune.augment(frame, np.random.default_rng(seed), *options)
        expected = data.augment_cloud(frame, np.random.default_rng(seed), *options)
        assert np.array_equal(warped.points, expected.points)
        assert np.array_equal(warped.lidar2img, expected.lidar2img)
        assert 3 < len(warped.boxes) < len(expected.boxes)


# ---- codes, targets, losses ----------------------------------------------------------

def test_decode_inverts_encode_on_warped_frames(world):
    dataset = data.open_dataset(world, "small")
    cells = Detector(TINY, GRID).cells
    for i in range(3):
        frame = dataset.load(i, (12, 32))
        for seed in range(4):
            moved = frame
            if seed:
                rng = np.random.default_rng(seed)
                moved = data.augment_cloud(frame, rng, 0.39, 0.05, (True, True))
            boxes = torch.tensor(moved.boxes)
            cell, code, within = encode(boxes, cells)
            # the strided sites begin at the first voxel's centre, 0.8 m apart
            on_map = ((boxes[:, :2] >= -25.95) & (boxes[:, :2] < 25.25)).all(1)
            assert torch.equal(within, on_map) and within.any() and not within.all()
            assert code[within, :2].abs().max() <= 0.5
            decoded = decode(cell, code, cells)
            torch.testing.assert_close(decoded, boxes, rtol=0, atol=2e-5, equal_nan=True)


def maps_of_targets(model, batch):
    """What a perfect network would predict, with a cell that is no peak next to each centre."""
    cell, code, within = encode(batch.boxes, model.cells)
    Y, X = model.cells.shape[1:]
    maps = []
    for group in model.groups:
        heat = torch.full((batch.size, len(group), Y, X), -20.0)
        codes = torch.zeros(batch.size, 10, Y, X)
        for c, label in enumerate(group):
            rows = (within & (batch.labels == label)).nonzero()[:, 0]
            for m in rows:
                heat[batch.b_boxes[m], c, cell[m, 0], abs(cell[m, 1] - 1)] = 9.0
            for m in rows:
                heat[batch.b_boxes[m], c, cell[m, 0], cell[m, 1]] = 10.0
                codes[batch.b_boxes[m], :, cell[m, 0], cell[m, 1]] = code[m]
        maps.append((heat, codes))
    return maps


def test_predict_reads_what_the_targets_say(batch, model, monkeypatch):
    """Targets as network output come back as the labelled boxes, before and after a warp."""
    monkeypatch.setattr(model, "predict_maps", partial(maps_of_targets, model))
    # a turn, a flip and a scale
    warp = np.array([[0, 1.05, 0, 0], [1.05, 0, 0, 0], [0, 0, 1.05, 0], [0, 0, 0, 1]])
    boxes = data.warp_boxes(batch.boxes.numpy(), warp)
    warped = replace(batch, boxes=torch.tensor(boxes, dtype=torch.float32))
    for given in (batch, warped):
        for b, (boxes, labels, scores) in enumerate(model.predict(given)):
            boxes = boxes[scores > 0.5]
            labels = labels[scores > 0.5]
            truth = given.boxes[given.b_boxes == b]
            truth_labels = given.labels[given.b_boxes == b]
            gap = (boxes[:, None, :3] - truth[None, :, :3]).norm(dim=2)
            near = (truth[:, :2].abs() < 25.2).all(1)
            # two of a class may share a cell or be neighbours
            assert len(boxes) >= 0.9 * near.sum() > 3
            nearest = gap.argmin(1)
            assert gap.amin(1).max() < 1e-3
            assert torch.equal(labels, truth_labels[nearest])
            truth = truth[nearest]
            close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
            close(boxes[:, 3:6], truth[:, 3:6])
            turn = torch.remainder(boxes[:, 6] - truth[:, 6] + math.pi, 2 * math.pi) - math.pi
            assert turn.abs().max() < 1e-4
            close(boxes[:, 7:], truth[:, 7:], equal_nan=True)


@pytest.mark.parametrize("modality", ["lidar", "camera"])
def test_maps_change_where_the_input_changes(batch, modality):
    """Points added at a place, or a patch over its pixels, change the heat maps there.

    Camera: in that direction; it does not know how far.
    """
    # in training mode: fresh running statistics would shrink it all to nothing
    detector = random_detector(replace(TINY, modality=modality))
    for place in ((12.0, -6.0, 0.0), (-4.0, 15.0, -1.0)):
        xyz = torch.tensor([place])
        if modality == "lidar":
            parts = xyz + torch.rand(200, 3), torch.rand(200, 1), torch.zeros(200, 1)
            cluster = torch.cat(parts, 1)
            first = torch.zeros(200, dtype=torch.int64)
            changed = replace(batch, points=torch.cat([cluster, batch.points]),
                              b_points=torch.cat([first, batch.b_points]),
                              counts=[200 + batch.counts[0], *batch.counts[1:]])
        else:
            images = batch.images.clone()
            counts = [1, *[0] * (batch.size - 1)]
            _, image, uv = common.project(xyz, counts, batch.lidar2img, batch.hw)[:3]
            for n, (u, v) in zip(image, uv):
                rows = slice(max(int(v) - 4, 0), int(v) + 5)
                columns = slice(max(int(u) - 4, 0), int(u) + 5)
                images[n, :, rows, columns] = 255 - images[n, :, rows, columns]
            changed = replace(batch, images=images)
        with torch.no_grad():
            before = detector.predict_maps(changed)
            after = detector.predict_maps(batch)
            gap = sum((a[0] - b[0]).abs().sum(1) for a, b in zip(before, after))  # (B, Y, X)
        y, x = divmod(int(gap[0].argmax()), gap.shape[2])
        if modality == "lidar":
            middle = torch.tensor([[place[0] + 0.5, place[1] + 0.5, 0, 1, 1, 1, 0, 0, 0.0]])
            cell = encode(middle, detector.cells)[0][0]
            assert abs(y - cell[0]) <= 4 and abs(x - cell[1]) <= 4, (y, x, cell)  # of 64
        else:
            changed_at = detector.cells.centre(torch.tensor([[0.0, y, x]]))[0]
            turn = np.angle(complex(*changed_at[:2].tolist()) / complex(*place[:2]))
            assert abs(turn) < 0.35, (changed_at, place)


def slow_radius(h, w, overlap):
    """CornerNet's function line by line."""
    b1 = h + w
    c1 = w * h * (1 - overlap) / (1 + overlap)
    r1 = (b1 + math.sqrt(b1 ** 2 - 4 * c1)) / 2
    b2 = 2 * (h + w)
    c2 = (1 - overlap) * w * h
    r2 = (b2 + math.sqrt(b2 ** 2 - 16 * c2)) / 2
    a3 = 4 * overlap
    b3 = -2 * overlap * (h + w)
    c3 = (overlap - 1) * w * h
    r3 = (b3 + math.sqrt(b3 ** 2 - 4 * a3 * c3)) / 2
    return min(r1, r2, r3)


def test_gaussians_match_cornernet():
    rng = np.random.default_rng(0)
    h, w = rng.uniform(0.3, 20, (2, 50))
    radii = gaussian_radius(torch.tensor(h), torch.tensor(w), 0.1)
    np.testing.assert_allclose(radii, [slow_radius(a, b, 0.1) for a, b in zip(h, w)])
    cells = Detector(TINY, GRID).cells
    boxes = torch.tensor([
        [0.0, 0, 0, 4.6, 1.9, 1.6, 0, 0, 0],
        [2.0, 1, 0, 12, 3, 3, 0, 0, 0],
        [0.0, 0.8, 0, 0.6, 0.6, 1.8, 0, 0, 0],
    ])
    cell, _, _ = encode(boxes, cells)
    label = torch.tensor([0, 1, 0])
    b = torch.tensor([0, 1, 0])
    shape = 2, 2, *cells.shape[1:]
    within = torch.ones(3, dtype=torch.bool)
    heat = heat_targets(cell, within, label, b, boxes, shape, cells, TINY)
    expected = torch.zeros_like(heat)
    for m in range(3):
        length = float(boxes[m, 3]) / 0.8
        width = float(boxes[m, 4]) / 0.8
        r = max(2, int(slow_radius(length, width, 0.1)))
        for y in range(64):
            for x in range(64):
                dy = y - int(cell[m, 0])
                dx = x - int(cell[m, 1])
                if max(abs(dy), abs(dx)) <= r:
                    value = math.exp(-(dx * dx + dy * dy) / (2 * ((2 * r + 1) / 6) ** 2))
                    expected[b[m], label[m], y, x] = max(
                        expected[b[m], label[m], y, x], value)
    torch.testing.assert_close(heat, expected)
    assert (heat == 1).sum() == 3


def test_losses_match_plain_loops(batch, model, monkeypatch):
    torch.manual_seed(1)
    maps = [(torch.randn(2, len(g), 64, 64), torch.randn(2, 10, 64, 64)) for g in model.groups]
    monkeypatch.setattr(model, "predict_maps", lambda batch: maps)
    boxes = batch.boxes.clone()
    boxes[0, 7:] = torch.nan  # an unknown velocity is not asked for
    boxes[1, :2] = torch.tensor([26.0, 26.0])  # off the map, where its Gaussian reaches in
    boxes[2, :2] = torch.tensor([-90.0, 0.0])
    given = replace(batch, boxes=boxes)
    loss, terms = model(given)
    cell, code, within = encode(boxes, model.cells)
    assert within[0] and not within[1] and not within[2]
    L_heat = L_box = 0.0
    for group, (heat, codes) in zip(model.groups, maps):
        rows = [m for m in range(len(boxes)) if within[m] and int(batch.labels[m]) in group]
        label = [group.index(int(batch.labels[m])) for m in rows]
        label = torch.tensor(label, dtype=torch.int64)
        target = heat_targets(cell[rows], within[rows], label, batch.b_boxes[rows], boxes[rows],
                              heat.shape, model.cells, TINY)
        p = heat.double().sigmoid()
        total = 0.0
        for prob, t in zip(p.flatten().tolist(), target.double().flatten().tolist()):
            if t == 1:
                total += -(1 - prob) ** 2 * math.log(prob)
            else:
                total += -prob ** 2 * (1 - t) ** 4 * math.log(1 - prob)
        L_heat += total / max(len(rows), 1)
        for m in rows:
            for k in range(10):
                if math.isfinite(code[m, k]):
                    predicted = codes[batch.b_boxes[m], k, cell[m, 0], cell[m, 1]]
                    gap = abs(float(predicted) - float(code[m, k]))
                    L_box += gap * (0.2 if k >= 8 else 1) / len(rows)
    assert float(terms["L_heat"]) == pytest.approx(L_heat, rel=1e-4)
    assert float(terms["L_box"]) == pytest.approx(L_box, rel=1e-4)
    assert float(loss) == pytest.approx(L_heat + 0.25 * L_box, rel=1e-4)
    assert focal(torch.tensor([60.0, -60.0]), torch.tensor([1.0, 0.0])).sum() == 0


@pytest.mark.parametrize("frames", [1, 2])
def test_losses_wait_for_nothing(world, model, monkeypatch, frames):
    """For targets, groups and boxes, in forward and backward, the GPU is not waited for."""
    batch = data.loader(world, "train", frames, preset="small", image=(48, 128)).first(1)[0]
    maps = []
    for group in model.groups:
        heat = torch.randn(frames, len(group), 64, 64, requires_grad=True)
        maps.append((heat, torch.randn(frames, 10, 64, 64, requires_grad=True)))
    monkeypatch.setattr(model, "predict_maps", lambda batch: maps)
    with Waits() as waits:
        loss, _ = model(batch)
        loss.backward()
    assert waits.names == []
    assert all(codes.grad.abs().sum() > 0 for _, codes in maps[:1])


@pytest.mark.parametrize("modality", ["fusion", "lidar", "camera"])
def test_every_parameter_learns_and_a_frame_without_boxes_or_points_is_fine(batch, modality):
    model = random_detector(replace(TINY, modality=modality))
    for module in model.modules():  # residual branches begin at zero
        if hasattr(module, "bn2"):
            torch.nn.init.ones_(module.bn2.weight)
    rows = batch.b_boxes == 0
    points = batch.b_points == 0
    one_empty = replace(
        batch, boxes=batch.boxes[rows], b_boxes=batch.b_boxes[rows], labels=batch.labels[rows],
        points=batch.points[points], b_points=batch.b_points[points])
    no_boxes = replace(
        batch, boxes=batch.boxes[:0], b_boxes=batch.b_boxes[:0], labels=batch.labels[:0])
    # an L1 loss's signs may add up to 0 in the last biases
    groups = range(len(model.heads))
    last = {f"heads.{g}.branches.{n}.1.bias" for g in groups for n in range(1, 6)}
    for x in (one_empty, no_boxes):
        model.zero_grad()
        loss, terms = model(x)
        loss.backward()
        assert loss.isfinite()
        for p in model.parameters():
            assert p.grad is not None and p.grad.isfinite().all()
        idle = {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-7}
        assert x is no_boxes or not idle - last, idle
    assert terms["boxes"] == terms["L_box"] == 0
    branches = {"lidar", "camera"} if modality == "fusion" else {modality}
    children = {name.split(".")[0] for name, _ in model.named_children()}
    assert children == {"fuse", "neck", "shared", "heads"} | branches


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["lidar", "fusion"])
def test_four_frames_can_be_overfitted(world, tmp_path, modality):
    """AP above 0.9 for every class present, on the frames themselves, within the range.

    Minutes on two cores.
    """
    torch.manual_seed(0)
    steps = 260
    cfg = replace(Config(preset="small", **SMALL), modality=modality)
    augment = partial(finetune.augment, rotation=0.0, scale=0.0, flip=(False, False))
    loader = data.loader(world, "train", 2, preset="small", augment=augment)
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
    frames = finetune.predict_all(model, loader, CPU)
    results = finetune.nuscenes_results(frames, loader.grid.classes)
    path.write_text(json.dumps(results))
    tokens = list(results["results"])
    metrics, _, present = finetune.nuscenes_score(loader.dataset, path, tokens, reach=25.0)
    ap = metrics["mean_dist_aps"]
    assert len(present) > 5 and all(ap[name] > 0.9 for name in present), ap


# ---- prediction ----------------------------------------------------------------------

def test_peaks_are_maxima_of_3_by_3_cells_in_each_class(world, monkeypatch):
    batch = first_batch(world)
    model = Detector(TINY, GRID)
    maps = []
    for group in model.groups:
        maps.append((torch.full((2, len(group), 64, 64), -20.0), torch.zeros(2, 10, 64, 64)))
    cars = (  # the second and third are neighbours of the first
        (20, 20, 9.0), (21, 21, 8.0), (19, 20, 8.0), (20, 18, 7.0), (23, 20, 6.0))
    for y, x, logit in cars:
        maps[0][0][1, 0, y, x] = logit
    maps[1][0][1, 0, 20, 20] = 5.0  # neighbours of two classes
    maps[1][0][1, 1, 21, 20] = 4.0
    monkeypatch.setattr(model, "predict_maps", lambda batch: maps)
    (_, _, empty), (boxes, labels, scores) = model.predict(batch)
    assert not (empty > 0.5).any()
    assert labels[scores > 0.5].tolist() == [0, 0, 0, 1, 2]
    cell = encode(boxes[:5], model.cells)[0]
    assert cell.tolist() == [[20, 20], [20, 18], [23, 20], [20, 20], [21, 20]]


def test_every_class_has_a_head_that_starts_at_probability_0_1():
    for (name, _), grid in data.GRIDS.items():
        classes = sorted(name for group in finetune.GROUPS[name] for name in group)
        assert classes == sorted(grid.classes)
    bias = finetune.Head(8, 2).branches[0][-1].bias
    assert bias.sigmoid().tolist() == pytest.approx([0.1, 0.1], abs=1e-3)


def test_logits_stay_float32_under_bfloat16_autocast():
    """Of two neighbours of one value both would be peaks, and the second is not suppressed."""
    torch.manual_seed(0)
    head = finetune.Head(16, 3).eval()
    x = torch.randn(1, 16, 64, 64)
    exact = head(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        heat, code = head(x)
    assert heat.dtype == code.dtype == torch.float32
    coarse = len(exact.bfloat16().unique())
    assert len(heat.unique()) > 0.9 * heat.numel() > 10 * coarse
    torch.testing.assert_close(heat, exact, rtol=0, atol=0.05)


def test_predictions_do_not_depend_on_the_batch(world):
    """Three val frames in one batch and in three.

    Running statistics, each frame's own points, images and pose.
    """
    dataset = data.open_dataset(world, "small")
    model = random_detector()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.momentum = 1.0  # the statistics of one step
    single = data.loader(dataset, "val", 1, image=(48, 128))
    triple = data.loader(dataset, "val", 3, image=(48, 128))
    with torch.no_grad():
        model.predict_maps(next(iter(triple.once())))
    alone = finetune.predict_all(model, single, CPU)
    among = finetune.predict_all(model, triple, CPU)
    val = dataset.split("val")
    assert list(alone) == list(among) == [dataset.names[i] for i in val]
    for i, name in zip(val, alone):
        np.testing.assert_allclose(among[name][2], alone[name][2], atol=1e-5)
        np.testing.assert_allclose(among[name][0][:20], alone[name][0][:20], atol=1e-3)
        pose = dataset.load(int(i), (12, 32)).lidar2world
        assert np.array_equal(alone[name][3], pose) and np.array_equal(among[name][3], pose)
    (one, *_), (two, *_), _ = alone.values()
    assert abs(one[:20] - two[:20]).max() > 1


# ---- few labels ----------------------------------------------------------------------

def test_draw_labels_draws_the_asked_share(world):
    dataset = data.open_dataset(world, "small")
    train = dataset.split("train")
    half = draw_labels(dataset, train, 0.5, "frames", 3)
    most = draw_labels(dataset, train, 0.8, "frames", 3)
    assert len(half) == 3 and len(most) == 5
    assert set(half) < set(most) <= set(train)
    assert (np.diff(half) > 0).all()
    assert len(draw_labels(dataset, train, 1e-6, "frames", 0)) == 1
    assert len(draw_labels(dataset, train, 1, "frames", 0)) == len(train)
    scene = draw_labels(dataset, train, 0.5, "scenes", 0)
    assert len(scene) == 3
    assert len({dataset.names[i].split("/")[1] for i in scene}) == 1
    others = [draw_labels(dataset, train, 0.5, "frames", seed) for seed in range(4)]
    assert any(set(other) != set(half) for other in others)
    with pytest.raises(SystemExit, match="more than 0 and at most 1"):
        draw_labels(dataset, train, 0, "frames", 0)


# ---- the official metric -------------------------------------------------------------

def truth_as_predictions(dataset, indices, shift=0.0):
    """Labelled boxes that the metric's filters keep, as predictions.

    A LiDAR or radar point lies in them.
    """
    table = Path(dataset.root, dataset.version, "sample_annotation.json")
    points = {}
    for row in json.loads(table.read_text()):
        points[row["token"]] = row["num_lidar_pts"] + row["num_radar_pts"]
    frames = {}
    for i in indices:
        frame = dataset.load(int(i), (12, 32))
        rows = dataset.annotations(int(i))
        rows = rows[rows["label"] >= 0]
        holds = np.array([points[row["token"].decode()] > 0 for row in rows], bool)
        boxes = np.nan_to_num(frame.boxes[holds])
        boxes[:, 0] += shift
        scores = np.linspace(0.9, 0.8, holds.sum())
        frames[frame.name] = boxes, frame.labels[holds], scores, frame.lidar2world
    return frames


def classes_apart(dataset, distance):
    """The classes of which no two boxes of a frame are nearer than this to each other."""
    apart = set(GRID.classes)
    for i in range(len(dataset)):
        rows = dataset.annotations(i)
        for n, name in enumerate(GRID.classes):
            xy = rows["box"][rows["label"] == n, :2]
            gap = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 9 * np.eye(len(xy))
            if len(xy) and gap.min() < distance:
                apart.discard(name)
    return apart


@pytest.mark.parametrize("which", ["embedded", "real"])
def test_truth_scores_one_and_shifted_truth_by_threshold(which, world, tmp_path, request):
    root = world if which == "embedded" else request.getfixturevalue("nuscenes_root")
    dataset = data.open_dataset(root, "small")
    indices = np.arange(len(dataset))
    # no other box of the class that a shifted one could be taken for
    apart = classes_apart(dataset, 1.2)
    for shift in (0.0, 0.6):
        path = tmp_path / f"{shift}.json"
        frames = truth_as_predictions(dataset, indices, shift)
        results = finetune.nuscenes_results(frames, GRID.classes)
        path.write_text(json.dumps(results))
        tokens = list(results["results"])
        metrics, _, present = finetune.nuscenes_score(dataset, path, tokens)
        assert len(present) > 3
        for name in present:
            for distance in (0.5, 1.0, 2.0, 4.0):
                ap = metrics["label_aps"][name][distance]
                if shift == 0:
                    assert ap == pytest.approx(1.0, abs=1e-6), (name, distance, ap)
                elif name in apart and distance == 0.5:
                    assert ap == 0, (name, distance, ap)
                elif name in apart:  # a shift may cross the metric's range
                    assert ap > 0.95, (name, distance, ap)
        assert shift == 0 or len(apart & set(present)) >= 2
        absent = set(GRID.classes) - set(present)
        assert all(metrics["mean_dist_aps"][name] == 0 for name in absent)
        if shift == 0:
            errors = []
            for name in present:
                for kind in ("trans_err", "scale_err", "orient_err"):
                    errors.append(metrics["label_tp_errors"][name][kind])
            assert np.nanmax(errors) < 3e-3
            assert np.isfinite(errors).sum() > 2 * len(present)  # cones have no heading
            _, _, near = finetune.nuscenes_score(dataset, path, tokens, 10.0)
            assert set(near) <= set(present)


def test_results_are_in_the_official_format(world):
    dataset = data.open_dataset(world, "small")
    frames = truth_as_predictions(dataset, [0, 1])
    results = finetune.nuscenes_results(frames, GRID.classes, "lidar")
    tokens = [name.rsplit("/", 1)[1] for name in dataset.names[:2]]
    assert set(results["results"]) == set(tokens)
    assert results["meta"] == dict(
        use_camera=False, use_lidar=True, use_radar=False, use_map=False, use_external=False)
    rows = dataset.annotations(0)
    truth = rows[(rows["label"] >= 0) & (rows["lidar_points"] > 0)]
    for box, row in zip(results["results"][tokens[0]], truth, strict=True):
        np.testing.assert_allclose(box["translation"], row["box"][:3], atol=1e-3)
        np.testing.assert_allclose(box["size"], row["box"][[4, 3, 5]], atol=1e-5)  # w, l, h
        w, x, y, z = box["rotation"]
        turn = 2 * math.atan2(z, w) - row["box"][6]
        assert abs(math.remainder(turn, 2 * math.pi)) < 1e-3 and x == y == 0
        velocity = np.nan_to_num(row["box"][7:9])
        np.testing.assert_allclose(box["velocity"], velocity, atol=1e-3)
        assert box["detection_name"] == GRID.classes[row["label"]]
    assert finetune.attribute("car", 3.0) == "vehicle.moving"
    assert finetune.attribute("bus", 0.0) == "vehicle.stopped"
    assert finetune.attribute("truck", 0.1) == "vehicle.parked"
    assert finetune.attribute("pedestrian", 1.0) == "pedestrian.moving"
    assert finetune.attribute("bicycle", 0.0) == "cycle.without_rider"
    assert finetune.attribute("barrier", 0.0) == ""


def test_attributes_follow_class_and_speed():
    fast = {
        "car": "vehicle.moving",
        "bus": "vehicle.moving",
        "pedestrian": "pedestrian.moving",
        "bicycle": "cycle.with_rider",
        "motorcycle": "cycle.with_rider",
        "barrier": "",
        "traffic_cone": "",
    }
    slow = {
        "car": "vehicle.parked",
        "trailer": "vehicle.parked",
        "bus": "vehicle.stopped",
        "pedestrian": "pedestrian.standing",
        "motorcycle": "cycle.without_rider",
        "barrier": "",
        "traffic_cone": "",
    }
    for speed, expected in ((0.3, fast), (0.1, slow)):
        boxes = np.array([[5.0, 0, 0, 4, 2, 1.5, 0, 0, -speed]] * len(expected))
        labels = np.array([GRID.classes.index(name) for name in expected])
        frames = {"nuscenes/s/t": (boxes, labels, np.ones(len(boxes)), np.eye(4))}
        rows, = finetune.nuscenes_results(frames, GRID.classes)["results"].values()
        attributes = {row["detection_name"]: row["attribute_name"] for row in rows}
        assert attributes == expected


def test_finish_writes_results_metrics_and_the_row(world, tmp_path, monkeypatch, capsys):
    """True boxes within 27 m of the LiDAR and none beyond.

    Within 25.6 m everything is found, over the metric's range not. One class is made absent.
    """
    dataset = data.open_dataset(world, "small")
    score = finetune.nuscenes_score
    frames = {}
    truth = truth_as_predictions(dataset, dataset.split("val"))
    for name, (boxes, labels, scores, pose) in truth.items():
        near = np.hypot(*boxes[:, :2].T) < 27
        frames[name] = boxes[near], labels[near], scores[near], pose

    def without_one_class(*words):
        metrics, curves, present = score(*words)
        return metrics, curves, present[1:]
    monkeypatch.setattr(finetune, "predict_all", lambda *_: frames)
    monkeypatch.setattr(finetune, "nuscenes_score", without_one_class)
    for name in ("save_figures", "load_tool"):
        monkeypatch.setattr(finetune, name, lambda *_: None)
    cfg = replace(TINY, modality="lidar", init="before")
    val_loader = SimpleNamespace(grid=GRID, dataset=dataset)
    finetune.finish(None, cfg, tmp_path, val_loader, None, 0)

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    meta = json.loads((tmp_path / "results_nusc.json").read_text())["meta"]
    assert not meta["use_camera"] and meta["use_lidar"]
    assert metrics["reach"] == 25.6 and metrics["frames"] == 3
    assert all(ap == pytest.approx(1, abs=1e-6) for ap in metrics["AP_reach"].values())
    assert metrics["mAP_reach"] == pytest.approx(1, abs=1e-6)
    assert len(metrics["AP_reach"]) > 3
    present = [name for name in GRID.classes if name not in metrics["absent"]]
    assert metrics["absent"] == ["barrier"] and set(metrics["AP_reach"]) <= set(present)
    present_mean = np.mean([metrics["AP"][name] for name in present])
    assert metrics["mAP_present"] == pytest.approx(present_mean)
    assert metrics["mAP_present"] < 0.97
    assert metrics["mAP"] == pytest.approx(np.mean([metrics["AP"][n] for n in GRID.classes]))
    assert abs(metrics["mAP"] - metrics["mAP_present"]) > 1e-3
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == (
        f"{tmp_path}: | before | lidar | 0.05 of the frames | seed 0 | mAP {metrics['mAP']:.4f} "
        f"| NDS {metrics['NDS']:.4f} | mAP within 25.6 m 1.0000 |")


# ---- whole runs ----------------------------------------------------------------------

def run(out, *flags):
    command = [sys.executable, str(ROOT / "finetune.py"), "--out", str(out), "--preset", "small",
               "--width", "4", "--bins", "12", "--batch", "1", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=out.parent)


def pretrained(folder):
    """A run folder of CLAP after step 7 -> its model."""
    cfg = clap.Config(preset="small", out=str(folder), **{**clap.SMALL, "width": 4, "bins": 12})
    model = clap.CLAP(cfg, GRID)
    folder.mkdir(exist_ok=True)
    (folder / "provenance.json").write_text('[{"commit": "none"}]')
    opt = torch.optim.AdamW(model.parameters())
    common.save(cfg, 7, model, [opt], clap.UNITS, GRID)
    return model


def rescored(folder, **fields):
    fields = dict(eval_only=str(folder), gpus=0, workers=0) | fields
    finetune.train(0, 1, replace(Config(), **fields))


def test_train_from_a_run_then_score_again(three_frames, tmp_path, capsys):
    torch.manual_seed(0)
    before = pretrained(tmp_path / "before")
    (tmp_path / "before" / "config.json").write_text('{"preset": "small"}')
    seen = data.open_dataset(three_frames).names[:1]
    (tmp_path / "before" / "frames.txt").write_text("\n".join(seen))
    tuned = tmp_path / "tuned"
    done = run(tuned, "--data", str(three_frames), "--init", str(tmp_path / "before"),
               "--fraction", "1", "--steps", "2", "--lr-pretrained", "4e-4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "labels of 2 frames" in done.stdout
    assert "1 of them were in the pre-training" in done.stdout
    assert "of step 7" in done.stdout
    last = done.stdout.splitlines()[-1]
    metrics = json.loads((tuned / "metrics.json").read_text())
    log = (tuned / "log.jsonl").read_text().splitlines()
    # of 2 steps none warms up, whatever --warmup says
    assert [json.loads(line)["lr"] for line in log] == pytest.approx([1e-3, 5e-4])
    state = torch.load(tuned / "last.pt", weights_only=True)
    new, old = state["optimizers"][0]["param_groups"]
    loaded = [p for unit in clap.UNITS for p in before.get_submodule(unit).parameters()]
    assert old["base"] == 4e-4 and len(old["params"]) == len(loaded)
    assert new["base"] == 1e-3 and len(new["params"]) > 50
    assert f"mAP {metrics['mAP']:.4f} | NDS {metrics['NDS']:.4f}" in last
    assert len(metrics["AP"]) == 10
    for name in ("results_nusc.json", "labels.txt", "backbones.safetensors", "figures/bev.png",
                 "figures/images.png", "figures/precision_recall.png", "figures/losses.png"):
        assert (tuned / name).stat().st_size > 0, name

    capsys.readouterr()
    rescored(tuned)
    assert capsys.readouterr().out.splitlines()[-1] == last
    moved = shutil.copytree(three_frames, tmp_path / "moved")
    config = json.loads((tuned / "config.json").read_text())
    config["data"] = str(tmp_path / "where it was")
    (tuned / "config.json").write_text(json.dumps(config))
    with pytest.raises(data.DataError, match="where it was: no such folder"):
        rescored(tuned)
    rescored(tuned, data=str(moved))
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.fixture
def stored(tmp_path):
    """The model of a pre-training run in tmp_path."""
    return pretrained(tmp_path)


@pytest.mark.parametrize("accumulate, factors", [
    (1, (1, 0.75, 0.25)),  # half a cosine over three steps
    (3, (1,)),
])
def test_train_is_these_steps(world, stored, tmp_path, monkeypatch, accumulate, factors):
    """A run written out.

    Which frames in which order, warped how; which weights are loaded; rates of both groups, weight
    decay, the clipped gradient, the mean over the batches of a step.
    """
    for name in ("finish", "loss_curves"):
        monkeypatch.setattr(finetune, name, lambda *_: None)
    cfg = replace(
        TINY, data=str(world), out=str(tmp_path / "run"), gpus=0, seed=3,
        init=str(tmp_path), use=("lidar",), modality="lidar", fraction=0.5, draw="scenes",
        epochs=1, steps=0, batch=1, accumulate=accumulate, lr=2e-3, lr_pretrained=5e-4,
        weight_decay=0.3, clip=0.5,
        rotation=0.3, scale=0.2)
    finetune.train(0, 1, cfg)

    dataset = data.open_dataset(world, "small")
    augment = partial(finetune.augment, rotation=0.3, scale=0.2, flip=(True, True))
    loader = data.loader(dataset, "train", 1, seed=3, augment=augment)
    loader.indices = draw_labels(dataset, dataset.split("train"), 0.5, "scenes", 3)
    torch.manual_seed(3)
    model = Detector(cfg, GRID)
    model.lidar.load_state_dict(stored.lidar.state_dict())
    new = [p for name, p in model.named_parameters() if not name.startswith("lidar.")]
    groups = [dict(params=new), dict(params=model.lidar.parameters())]
    opt = torch.optim.AdamW(groups, weight_decay=0.3, fused=True)
    source = loader.begin_at(0)
    for factor in factors:
        opt.param_groups[0]["lr"] = 2e-3 * factor
        opt.param_groups[1]["lr"] = 5e-4 * factor
        opt.zero_grad()
        for _ in range(accumulate):
            loss, _ = model(next(source))
            (loss / accumulate).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        opt.step()
    labels = (tmp_path / "run" / "labels.txt").read_text().splitlines()
    assert labels == [dataset.names[i] for i in loader.indices]
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == len(factors) and len(loader.indices) == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            saved["model"][name], value, msg=lambda text, name=name: f"{name}: {text}")


# ---- weights that are loaded ---------------------------------------------------------

def test_units_are_loaded_strictly(stored, tmp_path, capsys):
    before = stored.state_dict()
    model = Detector(TINY, GRID)
    new = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = finetune.load_units(tmp_path, model, (), finetune.UNITS, GRID, 0)
    printed = capsys.readouterr().out
    for unit in finetune.UNITS:
        count = sum(name.startswith(unit + ".") for name in before)
        assert f"{unit} {count}/{count}" in printed
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in loaded else new[name]), name
    prefixes = tuple(unit + "." for unit in finetune.UNITS)
    assert loaded == {name for name in before if name.startswith(prefixes)}
    model = Detector(TINY, GRID)
    loaded = finetune.load_units(tmp_path, model, ("lidar",), finetune.UNITS, GRID, 0)
    assert {name.split(".")[0] for name in loaded} == {"lidar"}


@pytest.mark.parametrize("case, message", [
    ("width", "tensors of lidar do not fit.*--resnet 18 --width 4 --bins 12"),
    ("bins", "tensors of camera.neck do not fit"),
    ("unit", "holds lidar, camera.resnet, camera.neck, fuse; asked for camera"),
    ("cut", "not a whole safetensors file"),
    ("absent", "no such file"),
])
def test_weights_that_do_not_fit_are_refused(stored, tmp_path, case, message):
    cfg = TINY
    asked = ()
    folder = tmp_path
    if case == "width":
        cfg = replace(TINY, width=8)
    if case == "bins":
        cfg = replace(TINY, bins=20)
    if case == "unit":
        asked = ("camera",)
    if case == "cut":
        path = tmp_path / "backbones.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
    if case == "absent":
        folder = tmp_path / "nowhere"
    model = Detector(cfg, GRID)
    with pytest.raises(SystemExit, match=message):
        finetune.load_units(folder, model, asked, finetune.UNITS, GRID, 0)


# ---- weights of another data set -----------------------------------------------------

KITTI_GRID = data.GRIDS["kitti", "small"]


def test_weights_of_another_data_set_say_what_differs(stored, tmp_path, capsys):
    file = tmp_path / "backbones.safetensors"
    grids = dict(
        here=GRID,
        kitti=KITTI_GRID,
        sweeps=replace(GRID, sweeps=10, image=(1, 1), cameras=(), classes=("car",)),
        voxel=replace(GRID, voxel=(0.2, 0.1, 0.125)),
        wide=data.GRIDS["nuscenes", "paper"],
    )
    depth = "; depth bins to 28.44 m, which stay (by the range here {} m)"
    low_high = "range -25.6 -25.6 -3 to 25.6 25.6 1 m (here {} m)"
    lines = dict(
        here="",
        kitti=f"data set nuscenes (here kitti); {low_high.format('0 -25.6 -3 to 51.2 25.6 1')}"
              + depth.format(56.89),
        sweeps="sweeps 1 (here 10)",
        voxel="voxels 0.1 0.1 0.125 m (here 0.2 0.1 0.125 m)",
        wide="voxels 0.1 0.1 0.125 m (here 0.075 0.075 0.2 m); sweeps 1 (here 10); "
             + low_high.format("-54 -54 -5 to 54 54 3") + depth.format(60),
    )
    for name, grid in grids.items():
        finetune.load_units(tmp_path, Detector(TINY, GRID), (), finetune.UNITS, grid, 0)
        printed = capsys.readouterr().out.splitlines()[1:]
        assert printed == [f"{file}: trained with {lines[name]}"] * bool(lines[name]), name
    # without the neck there are no bins to speak of
    finetune.load_units(tmp_path, Detector(TINY, GRID), ("fuse",), finetune.UNITS, KITTI_GRID, 0)
    assert "depth" not in capsys.readouterr().out
    finetune.load_units(tmp_path, Detector(TINY, GRID), (), finetune.UNITS, KITTI_GRID, 1)
    assert capsys.readouterr().out == ""


def test_depth_bins_of_another_data_set_keep_their_metres(stored, tmp_path):
    """The same picture is as likely this far away as where the neck was trained."""
    model = Detector(TINY, KITTI_GRID)
    rng = np.random.default_rng(0)
    probability = torch.tensor(rng.random((1, 12, 4, 8)), dtype=torch.float32)
    uv = torch.tensor(rng.uniform(0, 32, (50, 2)), dtype=torch.float32)
    depth = torch.tensor(rng.uniform(1, 28, 50), dtype=torch.float32)
    question = probability, torch.zeros(50, dtype=torch.int64), uv, depth, (32, 64)
    there = stored.camera.depth_probability(*question)
    assert (model.camera.depth_probability(*question) - there).abs().mean() > 0.05
    finetune.load_units(tmp_path, model, ("lidar", "camera.resnet"), finetune.UNITS, KITTI_GRID, 0)
    assert model.camera.max_depth == pytest.approx(51.2 * 60 / 54)
    finetune.load_units(tmp_path, model, (), finetune.UNITS, KITTI_GRID, 0)
    assert model.camera.max_depth == stored.camera.max_depth == pytest.approx(25.6 * 60 / 54)
    assert torch.equal(model.camera.depth_probability(*question), there)


def keep_detector(monkeypatch):
    """-> the detectors that reach the end of a run, a list that grows; none is scored."""
    detectors = []
    monkeypatch.setattr(finetune, "finish", lambda model, *_: detectors.append(model))
    monkeypatch.setattr(finetune, "loss_curves", lambda *_: None)
    return detectors


def test_depth_bins_outlive_the_run_that_they_come_from(
        kitti, three_frames, tmp_path, monkeypatch):
    """In a resumed run, one that is scored again, and one that starts from this one."""
    end = pretrained(tmp_path / "before").camera.max_depth
    detectors = keep_detector(monkeypatch)
    cfg = replace(TINY, data=str(kitti), out=str(tmp_path / "run"), gpus=0, modality="camera",
                  fraction=1.0, batch=1, steps=2, save_every=1, init=str(tmp_path / "before"))
    finetune.train(0, 1, cfg)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["max_depth"] == end
    whole = detectors[0].state_dict()

    os.replace(tmp_path / "run" / "previous.pt", tmp_path / "run" / "last.pt")
    finetune.train(0, 1, cfg)
    for name, value in detectors[1].state_dict().items():
        assert torch.equal(value, whole[name]), name

    later = replace(cfg, init=str(tmp_path / "run"), out=str(tmp_path / "later"))
    finetune.train(0, 1, later)
    shutil.rmtree(tmp_path / "before")
    rescored(tmp_path / "run")
    assert [model.camera.max_depth for model in detectors] == [end] * 4
    # back on the range where they come from there is nothing to record
    back = replace(later, data=str(three_frames), out=str(tmp_path / "back"))
    finetune.train(0, 1, back)
    assert detectors[4].camera.max_depth == end
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_depth"] == 0

    with pytest.raises(SystemExit, match="--max-depth 60: the depth bins of --init .* end at 28"):
        finetune.train(0, 1, replace(later, max_depth=60.0))
    config["max_depth"] = 0.0
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="max_depth is 0.0, in the checkpoint it is 28.44"):
        rescored(tmp_path / "run")


def test_max_depth_ends_the_bins_of_new_weights(kitti, tmp_path, monkeypatch):
    detectors = keep_detector(monkeypatch)
    cfg = replace(TINY, data=str(kitti), out=str(tmp_path / "run"), gpus=0, modality="camera",
                  fraction=1.0, batch=1, steps=1, max_depth=40.0)
    finetune.train(0, 1, cfg)
    rescored(tmp_path / "run")
    assert [model.camera.max_depth for model in detectors] == [40, 40]


def test_a_run_of_before_these_flags_is_resumed(three_frames, tmp_path, monkeypatch):
    """Its config.json and checkpoint know nothing of them: then their defaults are meant."""
    keep_detector(monkeypatch)
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), gpus=0,
                  modality="lidar", fraction=1.0, batch=1, steps=1)
    finetune.train(0, 1, cfg)
    path = tmp_path / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    config = json.loads(state["config"])
    for field in ("max_depth", "image_init", "freeze", "labels"):
        del config[field]
    torch.save(state | dict(config=json.dumps(config)), path)
    finetune.train(0, 1, cfg)
    with pytest.raises(SystemExit, match="max_depth was 0.0, is 50.0"):
        finetune.train(0, 1, replace(cfg, max_depth=50.0))


# ---- an image network from a file, and frozen units ----------------------------------

@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """A file of torchvision's resnet18, fc included, not as a new one is."""
    from torchvision.models import resnet18
    torch.manual_seed(5)
    net = resnet18()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(net.state_dict(), path)
    return path


def in_resnet(path):
    """What a detector holds of resnet_file. -> {name: tensor}"""
    weights = torch.load(path, weights_only=True)
    return {f"camera.resnet.{name}": value for name, value in weights.items()
            if not name.startswith("fc.")}


def test_an_image_network_comes_from_a_file(three_frames, resnet_file, tmp_path, monkeypatch):
    """With the rate of loaded weights, beside units of a run; a run's folder serves too."""
    pretrained(tmp_path / "before")
    keep_detector(monkeypatch)
    start = {}

    def first_state(out, model, opt):
        start["model"] = {name: value.clone() for name, value in model.state_dict().items()}
        start["groups"] = opt.param_groups
        return 0
    monkeypatch.setattr(finetune, "resume", first_state)
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), gpus=0,
                  fraction=1.0, batch=1, steps=1, image_init=str(resnet_file))
    finetune.train(0, 1, cfg)
    for name, value in in_resnet(resnet_file).items():
        assert torch.equal(start["model"][name], value), name
    new, old = start["groups"]
    assert len(old["params"]) == 60 and old["base"] == cfg.lr_pretrained

    cfg = replace(cfg, init=str(tmp_path / "before"), use=("lidar",), out=str(tmp_path / "both"))
    finetune.train(0, 1, cfg)
    for name, value in in_resnet(resnet_file).items():
        assert torch.equal(start["model"][name], value), name
    _, header, weights = common.read_units(tmp_path / "before")
    assert torch.equal(start["model"]["lidar.conv_input.conv.weight"],
                       weights["lidar.conv_input.conv.weight"])
    cfg = replace(cfg, image_init=str(tmp_path / "before"), out=str(tmp_path / "run_as_file"))
    finetune.train(0, 1, cfg)
    assert torch.equal(start["model"]["camera.resnet.conv1.weight"],
                       weights["camera.resnet.conv1.weight"])


def frozen_run(rank, cfg):
    """Two steps with what is loaded frozen. -> weights before and after"""
    states = []

    def first_state(out, model, opt):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0
    with pytest.MonkeyPatch.context() as patch:
        detectors = keep_detector(patch)
        patch.setattr(common, "copy_source", lambda *_, **__: None)  # of a script, in a fork
        patch.setattr(finetune, "resume", first_state)
        finetune.train(rank, common.processes(), cfg)
    return states[0], detectors[0].state_dict()


@pytest.mark.parametrize("processes", [1, 2])
def test_frozen_units_stay_bit_for_bit(
        three_frames, resnet_file, tmp_path, server, capsys, processes):
    """Weights and running statistics; the rest learns. On two processes too."""
    pretrained(tmp_path / "before")
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), gpus=0, freeze=True,
                  fraction=1.0, batch=1, steps=2, epochs=0, init=str(tmp_path / "before"),
                  use=("lidar", "camera.neck"), image_init=str(resnet_file))
    if processes == 1:
        results = [frozen_run(0, cfg)]
        assert "frozen lidar, camera.resnet, camera.neck" in capsys.readouterr().out
    else:
        results = on_two(server, frozen_run, tmp_path, cfg)
    frozen = "lidar.", "camera."
    for before, after in results:
        for name, value in after.items():
            if not name.startswith("heads."):  # of a class without a box some stay too
                assert torch.equal(value, before[name]) == name.startswith(frozen), name
            assert torch.equal(value, results[0][1][name]), name
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    new, old = state["optimizers"][0]["param_groups"]
    assert len(new["params"]) > 50 and not old["params"]


def test_a_frozen_unit_predicts_as_it_is_trained(world, stored, tmp_path, batch):
    """Train mode is eval mode to it, after a prediction too."""
    model = Detector(TINY, GRID)
    finetune.load_units(tmp_path, model, (), finetune.UNITS, GRID, 1)
    model.freeze(["lidar", "camera.resnet"])
    model.eval()
    model.train()
    modes = {name: module.training for name, module in model.named_modules()
             if isinstance(module, common.BatchNorm)}
    for name, training in modes.items():
        assert training != name.startswith(("lidar.", "camera.resnet.")), name
    loss, _ = model(batch)
    loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("lidar.", "camera.resnet."))
        assert (parameter.grad is None) == frozen, name


# ---- refusals ------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (dict(epochs=2), "one of them must be 0"),
    (dict(batch=0), "--batch 0: expected a whole number from 1"),
    (dict(steps=-1, epochs=20), "--steps -1: expected a whole number from 0"),
    (dict(use=("lidar", "head"), init="x"), "expected some of lidar"),
    (dict(use=("lidar",)), "--use lidar with --init none"),
    (dict(modality="lidar", use=("camera.neck",), init="x"), "expected some of lidar fuse"),
    (dict(fraction=2.0), "--fraction 2.0: expected a number above 0 to 1"),
    (dict(eval_only="nowhere"), "no readable configuration"),
    (dict(max_depth=0.5), "--max-depth 0.5: expected more than 1 m"),
    (dict(freeze=True), "--freeze with --init none: random weights would stay random"),
    (dict(image_init="nowhere.pth"), "--image-init nowhere.pth: no such file or folder"),
    (dict(image_init="a.pth", modality="lidar"), "--modality lidar: there is no image network"),
])
def test_flags_that_cannot_work_are_refused_before_anything_is_written(
        three_frames, tmp_path, flags, message):
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), **flags)
    with pytest.raises(SystemExit, match=message):
        finetune.train(0, 1, cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("use", [(), ("lidar", "camera.resnet")])
def test_two_image_networks_are_refused(three_frames, stored, resnet_file, tmp_path, use):
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), init=str(tmp_path),
                  use=use, image_init=str(resnet_file))
    with pytest.raises(SystemExit, match="brings an image network too; leave one of them out"):
        finetune.train(0, 1, cfg)
    assert not (tmp_path / "run").exists()


def test_units_may_be_named_with_commas_or_blanks():
    for use in (("lidar", "fuse"), ("lidar,fuse",)):
        asked, _ = finetune.asked_units(replace(TINY, init="x", use=use))
        assert asked == ("lidar", "fuse")


@pytest.mark.parametrize("pattern, message", [
    ("maps/*.png", "maps/.*png is missing, which nuscenes-devkit opens"),
    ("v1.0-*/attribute.json", "attribute.json: this table is missing"),
    ("v1.0-*/map.json", "map.json: this table is missing"),
])
def test_files_that_the_devkit_lacks_are_named_before_training(
        three_frames, tmp_path, pattern, message):
    root = Path(shutil.copytree(three_frames, tmp_path / "root"))
    next(root.glob(pattern)).unlink()
    cfg = replace(TINY, data=str(root), out=str(tmp_path / "run"))
    with pytest.raises((SystemExit, data.DataError), match=message):
        finetune.train(0, 1, cfg)
    assert not (tmp_path / "run").exists()


# ---- a run that cannot end in a score ------------------------------------------------

def change_rows(name, change):
    """-> a function of the tables' folder that changes every row of a table."""
    def edit(tables):
        path = tables / f"{name}.json"
        rows = json.loads(path.read_text())
        for row in rows:
            change(row)
        path.write_text(json.dumps(rows))
    return edit


def two_attributes(row):
    row["attribute_tokens"] = row["attribute_tokens"] * 2


def flatten_some(row):
    row["size"][0] *= row["num_lidar_pts"] % 2


def no_box_in_val(tables):
    splits = json.loads((tables / "splits.json").read_text())
    val = [scenes for name, scenes in splits.items() if name.endswith("val")][0]
    scenes = {row["token"] for row in json.loads((tables / "scene.json").read_text())
              if row["name"] in val}
    samples = {row["token"] for row in json.loads((tables / "sample.json").read_text())
               if row["scene_token"] in scenes}
    path = tables / "sample_annotation.json"
    rows = [row for row in json.loads(path.read_text()) if row["sample_token"] not in samples]
    path.write_text(json.dumps(rows))


def slash_in_tokens(tables):
    tokens = [row["token"] for row in json.loads((tables / "sample.json").read_text())]
    for path in tables.glob("sample*.json"):
        text = path.read_text()
        for token in tokens:
            text = text.replace(token, f"a/{token}")
        path.write_text(text)


UNSCORABLE = {
    "no attributes": (
        change_rows("sample_annotation", lambda row: row.pop("attribute_tokens")),
        "sample_annotation.json: row .* has no field attribute_tokens.*nuscenes-devkit"),
    "no radar points": (
        change_rows("sample_annotation", lambda row: row.pop("num_radar_pts")),
        "sample_annotation.json: row .* has no field num_radar_pts.*nuscenes-devkit"),
    "two attributes": (
        change_rows("sample_annotation", two_attributes),
        r"row \w+ has attribute_tokens \['\w+', '\w+'\], expected \[\] or one token of attribute"),
    "unknown attribute": (
        change_rows("attribute", lambda row: row.update(token=row["token"] + "x")),
        "has attribute_tokens .*expected .* one token of attribute.json"),
    "radar points as text": (
        change_rows("sample_annotation", lambda row: row.update(num_radar_pts="1")),
        "has num_radar_pts 1, expected a whole number"),
    "no size": (
        change_rows("sample_annotation", flatten_some),
        "has size .*0.0.*, expected three numbers above 0"),
    "no map": (
        lambda tables: (tables / "map.json").write_text("[]"),
        "map.json: of . logs . are in the log_tokens of none of its 0 rows"),
    "no log on a map": (
        change_rows("map", lambda row: row.update(log_tokens=["x"])),
        "map.json: of 3 logs 3 are in the log_tokens of none of its . rows"),
    "no modality": (
        change_rows("sensor", lambda row: row.pop("modality")),
        "sensor.json: row .* has no field modality.*nuscenes-devkit"),
    "slash": (slash_in_tokens, "sample.json: token 'a/.*expected one without a slash"),
    "no box in val": (no_box_in_val, "none of its 1 val frames has a 3-D box"),
}


@pytest.mark.parametrize("case", UNSCORABLE)
def test_what_the_devkit_trips_over_is_named_before_training(three_frames, tmp_path, case):
    spoil, message = UNSCORABLE[case]
    root = Path(shutil.copytree(three_frames, tmp_path / "root"))
    tables, = root.glob("v1.0-*")
    spoil(tables)
    cfg = replace(TINY, data=str(root), out=str(tmp_path / "run"), gpus=0)
    with pytest.raises((SystemExit, data.DataError), match=message):
        finetune.train(0, 1, cfg)
    assert not (tmp_path / "run").exists()
    dataset = data.open_dataset(root)
    faults = data.scoring_faults(dataset, [0, 1, 2])  # the doctor's
    assert len(faults) == 1 and re.search(message, faults[0]), faults


def test_the_doctor_looks_at_what_scoring_needs(three_frames, tmp_path):
    root = Path(shutil.copytree(three_frames, tmp_path / "root"))
    next(root.glob("maps/*.png")).unlink()
    fault, = data.doctor(str(root))
    assert "png is missing, which nuscenes-devkit opens" in fault
    next(root.glob("v1.0-*/sample_annotation.json")).write_text("[]")
    assert data.doctor(str(root)) == []  # not for detection


def test_any_other_error_of_the_metric_is_one_line_before_training(
        three_frames, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("something")
    monkeypatch.setattr(finetune, "nuscenes_score", fail)
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), gpus=0)
    message = "the labelled boxes of nuscenes/.* cannot be scored .KeyError: 'something'.*mend"
    with pytest.raises(SystemExit, match=message):
        finetune.train(0, 1, cfg)
    assert not (tmp_path / "run").exists()


def test_a_metric_that_fails_at_the_end_loses_nothing(world, tmp_path, monkeypatch, capsys):
    dataset = data.open_dataset(world, "small")
    frames = truth_as_predictions(dataset, dataset.split("val"))
    monkeypatch.setattr(finetune, "predict_all", lambda *_: frames)
    loader = SimpleNamespace(grid=GRID, dataset=dataset)

    def fail(*_):
        raise RuntimeError("no room")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "nuscenes_score", fail)
        message = (f"{tmp_path}: not scored .RuntimeError: no room.. Nothing else is lost: the "
                   f"predictions are in {tmp_path}/results_nusc.json, the weights in "
                   f"{tmp_path}/last.pt. .*python finetune.py --eval-only {tmp_path}$")
        with pytest.raises(SystemExit, match=message):
            finetune.finish(None, TINY, tmp_path, loader, None, 0)
    results = json.loads((tmp_path / "results_nusc.json").read_text())["results"]
    assert len(results) == len(frames)

    monkeypatch.setattr(finetune, "save_figures", fail)
    with pytest.raises(RuntimeError, match="no room"):
        finetune.finish(None, TINY, tmp_path, loader, None, 0)
    assert "| seed 0 | mAP " in capsys.readouterr().out.splitlines()[-1]


def test_the_devkit_scores_the_same_from_the_rows_that_are_kept(world, tmp_path, monkeypatch):
    """Frames of one scene, predicted half a metre away: velocities and filters matter too."""
    from nuscenes import NuScenes
    dataset = data.open_dataset(world, "small")
    frames = truth_as_predictions(dataset, dataset.split("val"), 0.4)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(finetune.nuscenes_results(frames, GRID.classes)))
    tokens = [name.rsplit("/", 1)[1] for name in frames]
    monkeypatch.setattr(finetune, "LOADED", {})

    class Terminal:
        def write(self, text):
            raise OSError(5, "Input/output error")
        flush = write
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())  # it was closed
        metrics, _, present = finetune.nuscenes_score(dataset, path, tokens)
    kept, _ = finetune.LOADED[dataset.root, dataset.version]
    whole = NuScenes(dataset.version, dataset.root, verbose=False)
    assert len(kept.sample_data) == len(dataset) < len(whole.sample_data)
    assert 0 < len(kept.sample_annotation) < len(whole.sample_annotation)
    assert finetune.devkit(dataset, tokens[:1]) is kept
    monkeypatch.setattr(finetune, "devkit", lambda *_: whole)
    expected, _, also_present = finetune.nuscenes_score(dataset, path, tokens)
    for result in (metrics, expected):
        del result["eval_time"]
    assert to_text(metrics) == to_text(expected) and present == also_present


def to_text(metrics):
    return json.dumps(metrics, sort_keys=True)  # NaN equals NaN


@pytest.fixture(scope="module")
def two_steps(three_frames, tmp_path_factory):
    """The folder of a run with last.pt of step 2 and previous.pt of step 1."""
    out = tmp_path_factory.mktemp("two") / "run"
    cfg = replace(TINY, data=str(three_frames), out=str(out), gpus=0, modality="lidar",
                  fraction=1.0, batch=1, steps=2, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "save_figures", lambda *_: None)
        finetune.train(0, 1, cfg)
    return out


@pytest.mark.parametrize("case, message", [
    ("data", "a run on nuscenes, and .* is kitti; give the root of nuscenes as --data"),
    ("width", "config.json: width is 8, in the checkpoint it is 4; put the file back"),
    ("modality", "config.json: modality is 'camera', in the checkpoint it is 'lidar'"),
    ("tensor", r"step 2: 1 of the \d+ tensors of this model do not fit, first neck.reduce"),
    ("empty", "no checkpoint there; finish a run first"),
])
def test_a_run_is_not_scored_with_what_does_not_fit_it(
        two_steps, kitti, tmp_path, case, message):
    run = Path(shutil.copytree(two_steps, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    fields = {}
    if case == "data":
        fields = dict(data=str(kitti))
    if case == "width":
        config["width"] = 8
    if case == "modality":
        config["modality"] = "camera"
    if case == "tensor":
        state = torch.load(run / "last.pt", weights_only=True)
        state["model"]["neck.reduce.0.weight"] = torch.zeros(3)
        torch.save(state, run / "last.pt")
    if case == "empty":
        (run / "last.pt").unlink()
        (run / "previous.pt").unlink()
    (run / "config.json").write_text(json.dumps(config))
    scores = (run / "metrics.json").read_bytes()
    with pytest.raises(SystemExit, match=message) as refusal:
        rescored(run, **fields)
    assert len(str(refusal.value).splitlines()) == 1
    assert (run / "metrics.json").read_bytes() == scores


def test_scoring_says_that_it_takes_the_checkpoint_before(two_steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "finish", lambda *_: None)
    run = Path(shutil.copytree(two_steps, tmp_path / "run"))
    os.truncate(run / "last.pt", 1000)
    rescored(run)
    printed = capsys.readouterr().out
    assert "last.pt: not a readable checkpoint" in printed and "previous.pt, step 1" in printed
    assert "the weights after step 1" in printed


def test_weights_are_looked_for_before_the_data_set_is_opened(stored, tmp_path, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("the data set was opened")
    monkeypatch.setattr(data, "open_dataset", opened)
    cfg = replace(TINY, init=str(tmp_path / "typo"), out=str(tmp_path / "run"), gpus=0)
    for init in (cfg.init, str(tmp_path / "backbones.safetensors")):
        with pytest.raises(SystemExit, match="no such file; --init names the folder"):
            finetune.train(0, 1, replace(cfg, init=init))
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_leave_no_run_folder(stored, three_frames, tmp_path):
    cfg = replace(TINY, data=str(three_frames), init=str(tmp_path), out=str(tmp_path / "run"),
                  width=8, gpus=0)
    with pytest.raises(SystemExit, match="tensors of lidar do not fit"):
        finetune.train(0, 1, cfg)
    assert not (tmp_path / "run").exists()


def test_data_without_labels_is_refused(three_frames, kitti, tmp_path):
    raw = replace(TINY, data=str(kitti / "2011_09_26"), out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match="raw drives: no box is annotated"):
        finetune.train(0, 1, raw)
    bare = tmp_path / "bare"
    shutil.copytree(three_frames, bare)
    next(bare.glob("v1.0-*/sample_annotation.json")).write_text("[]")
    with pytest.raises(SystemExit, match="no box is annotated"):
        finetune.train(0, 1, replace(TINY, data=str(bare), out=str(tmp_path / "run")))
