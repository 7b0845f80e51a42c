"""KITTI's detection metric in finetune.py: against cases done by hand, a slow transcription of the
official rules, and the labels themselves."""
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import finetune
from test_data import clone
from finetune import kitti_ap, kitti_iou, kitti_rows, shared_area

CAR = dict(type="Car", x=0., z=20., ry=0., hwl=(1.5, 1.6, 4.), top=100., height=60.,
           truncated=0., occluded=0)


def rows_of(*rows):
    """Label rows from dicts with type, x, z (m), and what else differs from CAR.

    CAR stands 20 m ahead and is 60 px high.
    """
    out = np.zeros(len(rows), data.KITTI_LABEL)
    for n, given in enumerate(rows):
        one = CAR | given
        left = 100 + 20 * one["x"]
        bbox = (left, one["top"], left + 80, one["top"] + one["height"])
        location = (one["x"], 1.6, one["z"])
        out[n] = (one["type"], one["truncated"], one["occluded"], 0, bbox, one["hwl"], location,
                  one["ry"], np.zeros(9), 0)
    return out


def many(n=50, **more):
    """n cars side by side, 6 m apart."""
    return [dict(x=6. * i, **more) for i in range(n)]


def to_the_left(n, **more):
    """n more cars, on the other side of the first of `many`."""
    return [dict(x=-6. * i - 6, **more) for i in range(n)]


# ---- overlap ------------------------------------------------------------------------

LATTICE = np.stack(np.meshgrid(*[np.arange(-8, 8, 0.04)] * 2), -1).reshape(-1, 2)


def covers(box):
    """Which points of LATTICE lie in a turned rectangle."""
    offset = LATTICE - box[:2]
    cos = np.cos(box[4])
    sin = np.sin(box[4])
    along = abs(offset @ [cos, sin]) < box[2] / 2
    across = abs(offset @ [-sin, cos]) < box[3] / 2
    return along & across


def random_rectangles(rng):
    centre = rng.uniform(-4, 4, (30, 2))
    size = rng.uniform(0.5, 5, (30, 2))
    return np.column_stack([centre, size, rng.uniform(-4, 4, 30)])


def test_shared_area_of_turned_rectangles_matches_counting():
    square = np.array([[0., 0, 2, 2, 0]])
    turned = np.array([[0, 0, 2, 2, math.pi / 4]])
    octagon = 8 * (math.sqrt(2) - 1)
    assert shared_area(square, turned)[0, 0] == pytest.approx(octagon)
    assert shared_area(square, np.array([[1, 1, 2, 2, math.pi]]))[0, 0] == pytest.approx(1)
    rng = np.random.default_rng(0)
    a = random_rectangles(rng)
    b = random_rectangles(rng)
    a[:3, 2:4] = b[:3, 2:4] = 0.01                   # next to nothing
    area = shared_area(a, b)
    inside_a = np.array([covers(box) for box in a], np.float32)
    inside_b = np.array([covers(box) for box in b], np.float32)
    np.testing.assert_allclose(area, inside_a @ inside_b.T * 0.04 ** 2, atol=0.12)
    assert (area > 0.5).sum() > 100
    assert shared_area(a[:0], b).shape == (0, 30)


def test_iou_of_labels_matches_by_hand():
    a = rows_of(dict(), dict(x=1.), dict(ry=math.pi / 2))
    # length along x at ry = 0
    expected = [[1, 3 / 5, 1.6 ** 2 / (2 * 6.4 - 1.6 ** 2)]]
    np.testing.assert_allclose(kitti_iou(a[:1], a, "bev"), expected)
    higher = a[:1].copy()
    higher["location"][:, 1] -= 0.5                  # half a metre up
    assert kitti_iou(a[:1], higher, "3d")[0, 0] == pytest.approx(1 / 2)
    assert kitti_iou(a[:1], higher, "bev")[0, 0] == pytest.approx(1)
    shifted = rows_of(dict(x=2.))
    assert kitti_iou(a[:1], shifted, "2d")[0, 0] == pytest.approx(40 / 120)


# ---- by hand ------------------------------------------------------------------------

def ap(truth, detections, scores, name="Car", level=1, kind="3d"):
    frame = (rows_of(*truth), rows_of(*detections), np.array(scores, float))
    return kitti_ap([frame], name, level, kind)


def test_ap_of_perfect_missed_and_false_detections():
    scores = np.linspace(1, 0.5, 50)
    for kind in ("2d", "bev", "3d"):
        assert ap(many(50), many(50), scores, kind=kind) == pytest.approx((100, 100))
    # recall stops at a half: 20 of 40, 6 of 11
    missed = ap(many(50), many(50)[:25], np.linspace(1, 0.5, 25))
    assert missed == pytest.approx((50, 600 / 11))

    scores = np.linspace(0.9, 0.5, 50)
    false_alarm = [*many(50), dict(x=-50.)]
    best = ap(many(50), false_alarm, [*scores, 1.0])
    assert best == pytest.approx((100 * 50 / 51, 100 * 50 / 51))
    late = ap(many(50), false_alarm, [*scores, 0.1])
    assert late == pytest.approx((100, 100))
    # a second box on a car is false, except where only it is above the threshold
    twice = ap(many(50), [*many(50), dict(x=0.)], [*scores, 0.95])
    assert twice == pytest.approx((100 * 50 / 51, 100 * (1 + 10 * 50 / 51) / 11))
    assert all(math.isnan(v) for v in ap([], many(3), [1, 1, 1]))
    assert ap(many(50), [], []) == (0, 0)


def test_levels_go_by_height_occlusion_and_truncation():
    hard = [dict(x=6. * i, height=30., occluded=1, truncated=0.2) for i in range(50, 100)]
    truth = many(50) + hard
    scores = np.linspace(1, 0.5, 50)
    # at level 0 the hard ones need not be detected
    assert ap(truth, many(50), scores, level=0) == pytest.approx((100, 100))
    assert ap(truth, many(50), scores, level=1)[0] == pytest.approx(50)
    # nor do they harm if they are
    all_detected = many(50) + [dict(x=6. * i) for i in range(50, 100)]
    scores_of_all = np.linspace(1, 0.5, 100)
    assert ap(truth, all_detected, scores_of_all, level=0) == pytest.approx((100, 100))

    # false alarms too low for easy
    low = [*many(50), *to_the_left(20, height=39.)]
    low_scores = [*np.linspace(0.6, 0.5, 50), *[0.9] * 20]
    assert ap(many(50), low, low_scores, level=0) == pytest.approx((100, 100))
    assert ap(many(50), low, low_scores, level=1)[0] == pytest.approx(100 * 50 / 70)
    at_limit = ap(many(50, height=25.), many(50), scores, level=1)
    above_limit = ap(many(50, height=25.1), many(50), scores, level=1)
    assert at_limit != above_limit


def test_vans_and_dont_care_regions_are_no_false_alarms():
    truth = many(50)
    detections = many(50) + to_the_left(10)
    scores = [*np.linspace(0.6, 0.5, 50), *[0.9] * 10]
    vans = to_the_left(10, type="Van")
    assert ap(truth + vans, detections, scores) == pytest.approx((100, 100))
    trucks = [dict(van, type="Truck") for van in vans]
    assert ap(truth + trucks, detections, scores)[0] == pytest.approx(100 * 50 / 60)
    regions = [dict(van, type="DontCare") for van in vans]
    assert ap(truth + regions, detections, scores, kind="2d") == pytest.approx((100, 100))
    rows = rows_of(*truth, *regions)
    rows["location"][50:] = -1000                    # as on disk: no place in 3-D
    frame = (rows, rows_of(*detections), np.array(scores))
    assert kitti_ap([frame], "Car", 1, "3d")[0] == pytest.approx(100 * 50 / 60)


def test_sitting_persons_are_neither_pedestrians_nor_false():
    people = many(50, type="Pedestrian")
    sitting = to_the_left(10, type="Person_sitting")
    detections = rows_of(*people, *[dict(row, type="Pedestrian") for row in sitting])
    scores = np.array([*np.linspace(0.6, 0.5, 50), *[0.9] * 10])
    frame = (rows_of(*people, *sitting), detections, scores)
    assert kitti_ap([frame], "Pedestrian", 1, "3d") == pytest.approx((100, 100))
    frame = (rows_of(*people), detections, scores)
    assert kitti_ap([frame], "Pedestrian", 1, "3d")[0] == pytest.approx(100 * 50 / 60)
    # only a van resembles a car
    detections = rows_of(*many(50), *[dict(row, type="Car") for row in sitting])
    frame = (rows_of(*many(50), *sitting), detections, scores)
    assert kitti_ap([frame], "Car", 1, "3d")[0] == pytest.approx(100 * 50 / 60)


# ---- a slow transcription -----------------------------------------------------------

# evaluate_object as the official code has it: loops, flags, the order of its decisions.

LIMITS = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))        # height, occlusion, truncation
LEAST = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}     # overlap
ALIKE = {"Car": "Van", "Pedestrian": "Person_sitting"}


def slow_flags(truth, detections, name, level):
    """For each truth and each detection: 0 counts, 1 is ignored, -1 is another class."""
    min_height, max_occlusion, max_truncation = LIMITS[level]
    ignored_gt = []
    for g in truth:
        valid = -1
        if g["type"] == name:
            valid = 1
        elif g["type"] == ALIKE.get(name):
            valid = 0
        low = g["bbox"][3] - g["bbox"][1] <= min_height
        ignore = g["occluded"] > max_occlusion or g["truncated"] > max_truncation or low
        if valid == 1 and not ignore:
            ignored_gt.append(0)
        else:
            ignored_gt.append(1 if valid == 0 or valid == 1 else -1)
    ignored_det = []
    for d in detections:
        if d["bbox"][3] - d["bbox"][1] < min_height:
            ignored_det.append(1)
        else:
            ignored_det.append(0 if d["type"] == name else -1)
    return ignored_gt, ignored_det


def slow_statistics(frame, least, kind, compute_fp, threshold):
    """True positives, false positives and the scores of the true positives of a frame."""
    truth, detections, score, ignored_gt, ignored_det, iou = frame
    assigned = [False] * len(detections)
    ignored_threshold = [compute_fp and s < threshold for s in score]
    tp = fp = 0
    scores = []
    for i in range(len(truth)):
        if ignored_gt[i] == -1:
            continue
        det = None
        best_score = -1.0
        best_overlap = 0.0
        assigned_ignored = False
        for j in range(len(detections)):
            if ignored_det[j] == -1 or assigned[j] or ignored_threshold[j]:
                continue
            meets = iou[i, j] > least
            better = iou[i, j] > best_overlap or assigned_ignored
            if not compute_fp and meets and score[j] > best_score:
                det = j
                best_score = score[j]
            elif compute_fp and meets and better and ignored_det[j] == 0:
                det = j
                best_overlap = iou[i, j]
                assigned_ignored = False
            elif compute_fp and meets and det is None and ignored_det[j] == 1:
                det = j
                assigned_ignored = True
        if det is not None:
            assigned[det] = True
            if ignored_gt[i] != 1 and ignored_det[det] != 1:
                tp += 1
                scores.append(score[det])
    if compute_fp:
        free = []
        for j in range(len(detections)):
            if not (assigned[j] or ignored_det[j] != 0 or ignored_threshold[j]):
                free.append(j)
        fp = len(free)
        if kind == "2d":
            fp -= slow_dont_care(truth, detections, free, least)
    return tp, fp, scores


def slow_dont_care(truth, detections, free, least):
    """How many of the free detections (indices) lie in a DontCare region."""
    assigned = set()
    for g in truth[truth["type"] == "DontCare"]:
        for j in free:
            if j in assigned:
                continue
            d = detections[j]
            w = min(d["bbox"][2], g["bbox"][2]) - max(d["bbox"][0], g["bbox"][0])
            h = min(d["bbox"][3], g["bbox"][3]) - max(d["bbox"][1], g["bbox"][1])
            area = (d["bbox"][2] - d["bbox"][0]) * (d["bbox"][3] - d["bbox"][1])
            if w > 0 and h > 0 and w * h / area > least:
                assigned.add(j)
    return len(assigned)


def slow_thresholds(scores, n_gt):
    """Those of falling scores at which recall passes a multiple of 1 / 40."""
    thresholds = []
    current = 0.0
    for i in range(len(scores)):
        last = i == len(scores) - 1
        left = (i + 1) / n_gt
        right = left if last else (i + 2) / n_gt
        if right - current < current - left and not last:
            continue
        thresholds.append(scores[i])
        current += 1 / 40
    return thresholds


def slow_ap(frames, name, level, kind):
    least = LEAST[name]
    n_gt = 0
    prepared = []
    for truth, detections, score in frames:
        ignored_gt, ignored_det = slow_flags(truth, detections, name, level)
        n_gt += ignored_gt.count(0)
        iou = kitti_iou(truth, detections, kind)
        prepared.append((truth, detections, score, ignored_gt, ignored_det, iou))
    scores = []
    for frame in prepared:
        scores += slow_statistics(frame, least, kind, False, 0)[2]
    thresholds = slow_thresholds(sorted(scores, reverse=True), n_gt)
    precision = [0.0] * 41
    for n, t in enumerate(thresholds):
        tp = fp = 0
        for frame in prepared:
            tp_frame, fp_frame, _ = slow_statistics(frame, least, kind, True, t)
            tp += tp_frame
            fp += fp_frame
        precision[n] = tp / (tp + fp)
    for n in range(len(thresholds)):
        precision[n] = max(precision[n:])
    R40 = 100 * sum(precision[1:]) / 40
    R11 = 100 * sum(precision[i] for i in range(0, 41, 4)) / 11
    return R40, R11


KINDS = ["Car", "Van", "Pedestrian", "Cyclist", "DontCare", "Truck"]


def random_truth(rng):
    return dict(
        type=str(rng.choice(KINDS, p=[.4, .1, .2, .1, .1, .1])),
        x=rng.uniform(-30, 30),
        z=rng.uniform(5, 40),
        ry=rng.uniform(-3, 3),
        height=rng.uniform(15, 90),
        occluded=rng.integers(0, 4),
        truncated=rng.choice([0, 0.2, 0.4, 0.6]))


def random_detection(rng, truth):
    """A truth a little moved, now and then taken for a car."""
    moved = dict(
        x=truth["x"] + rng.normal(0, 0.15),
        ry=truth["ry"] + rng.normal(0, 0.05),
        height=truth["height"] + rng.normal(0, 4),
        type="Car")
    if truth["type"] in KINDS[:4]:
        moved["type"] = str(rng.choice([truth["type"], "Car"]))
    return truth | moved


def random_frame(rng):
    truth = [random_truth(rng) for _ in range(14)]
    detections = []
    for row in truth:
        for _ in range(rng.integers(0, 3)):
            detections.append(random_detection(rng, row))
    for _ in range(3):
        x = float(rng.uniform(-30, 30))
        detections.append(dict(type="Car", x=x, height=float(rng.uniform(20, 60))))
    return rows_of(*truth), rows_of(*detections), rng.random(len(detections)).round(2)


def test_random_frames_score_as_in_the_transcription():
    rng = np.random.default_rng(0)
    compared = 0
    for trial in range(3):
        frames = [random_frame(rng) for _ in range(12)]
        for name in ("Car", "Pedestrian", "Cyclist"):
            for level in range(3):
                for kind in ("2d", "bev", "3d"):
                    ours = kitti_ap(frames, name, level, kind)
                    if math.isnan(ours[0]):
                        continue
                    slow = slow_ap(frames, name, level, kind)
                    assert ours == pytest.approx(slow, abs=1e-9), (trial, name, level, kind)
                    compared += 0 < slow[0] < 100
    assert compared > 30


# ---- boxes to label rows ------------------------------------------------------------

def test_boxes_behind_the_camera_are_left_out_and_boxes_at_the_edge_are_clipped(kitti):
    dataset = data.open_dataset(kitti)
    boxes = np.array([
        [1., 0, -1, 4, 2, 1.5, 0, 0, 0],             # reaches behind the camera
        [6, -5, -1, 4, 2, 1.5, 0, 0, 0]])
    rows, indices = kitti_rows(dataset, 0, boxes, np.array([0, 2]))
    assert indices.tolist() == [1]
    assert rows["type"].tolist() == ["Cyclist"]
    assert rows["bbox"][0, 2] == 1241 and 0 < rows["bbox"][0, 0] < 1200


def test_a_box_that_the_picture_does_not_show_is_left_out(kitti):
    dataset = data.open_dataset(kitti)
    boxes = np.array([
        [15., 0, -1, 4, 2, 1.5, 0, 0, 0],
        [-15, 0, -1, 4, 2, 1.5, 0, 0, 0],            # behind
        [10, 60, -1, 4, 2, 1.5, 0, 0, 0]])           # far to the left
    rows, indices = kitti_rows(dataset, 0, boxes, np.array([0, 0, 0]))
    assert indices.tolist() == [0]
    assert (rows["bbox"] >= 0).all()
    assert rows["bbox"][0, 2] <= 1242 and rows["bbox"][0, 3] <= 375


def check_labels(root):
    """Label boxes through our LiDAR frame and back are the label rows."""
    dataset = data.open_dataset(root)
    checked = 0
    for i in range(len(dataset)):
        rows = dataset.annotations(i)
        rows = rows[rows["label"] >= 0]
        if not len(rows):
            continue
        back, indices = kitti_rows(dataset, i, rows["box"], rows["label"])
        assert len(indices) == len(rows)
        assert (back["type"] == rows["type"]).all()
        limits = (("hwl", 1e-6), ("location", 1e-6), ("rotation_y", 1e-3), ("alpha", 0.05))
        for field, limit in limits:
            gap = back[field] - rows[field]
            if field in ("rotation_y", "alpha"):
                gap = np.arctan2(np.sin(gap), np.cos(gap))
            np.testing.assert_allclose(gap, 0, atol=limit)
        whole = rows["truncated"] == 0
        iou = kitti_iou(rows[whole], back[whole], "2d").diagonal()
        np.testing.assert_allclose(iou, 1, atol=0.25)
        iou = kitti_iou(rows, back, "3d").diagonal()
        np.testing.assert_allclose(iou, 1, atol=0.01)
        checked += len(rows)
    assert checked


def test_fabricated_labels_survive_the_round_trip(kitti):
    check_labels(kitti)


def test_real_labels_survive_the_round_trip(kitti_root):
    check_labels(kitti_root)


# ---- runs ---------------------------------------------------------------------------

def labels_as_detections(dataset, numbers, annotations):
    """The labelled car of each of three frames as a detection; the last is raised by a metre.

    A better scored box behind the camera comes before it. -> frames, as finish_kitti takes them
    """
    frames = {}
    behind = [-15., 0, -1, 4, 2, 1.5, 0, 0, 0]
    for n, i in enumerate(numbers):
        car = np.nan_to_num(annotations(i)["box"][0])
        raised = car + [0, 0, n == 2, 0, 0, 0, 0, 0, 0]
        boxes = np.stack([behind, raised])
        scores = np.array([0.9, 0.7 - 0.1 * n])
        frames[dataset.names[i]] = (boxes, np.zeros(2, int), scores, np.eye(4))
    return frames


@pytest.mark.parametrize("n", [1, 2, 5, 10, 39, 40, 41, 60])
def test_the_bound_is_what_a_perfect_detector_gets(n):
    truth = many(n)
    perfect = ap(truth, truth, np.linspace(0.9, 0.5, n))
    assert finetune.kitti_bound(n) == pytest.approx(perfect)
    assert (perfect[0] == 100) == (n > 40)


def test_metrics_and_result_files_of_a_kitti_run(kitti, tmp_path, monkeypatch, capsys):
    """Three frames whose labels are, in this order, easy, moderate and hard."""
    dataset = data.open_dataset(kitti)
    numbers = np.flatnonzero([bool(frame.labels) for frame in dataset.frames])[:3]
    annotations = dataset.annotations

    def harder(i):
        rows = annotations(i)
        rows["occluded"][0] = list(numbers).index(i)
        return rows

    monkeypatch.setattr(dataset, "annotations", harder)
    frames = labels_as_detections(dataset, numbers, annotations)
    model = SimpleNamespace(dataset=dataset)
    message = finetune.finish_kitti(model, frames, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["frames"] == 3
    assert set(metrics) == {"2d", "bev", "3d", "frames", "truths", "perfect_detector"}
    assert metrics["truths"] == {"Car": [1, 2, 3], "Pedestrian": [0] * 3, "Cyclist": [0] * 3}
    bound = metrics["perfect_detector"]
    assert bound["Car"]["R40"] == pytest.approx([0, 2.5, 5])
    assert bound["Car"]["R11"] == pytest.approx([100 / 11] * 3)
    assert bound["Cyclist"]["R40"] == [None] * 3
    table = capsys.readouterr().out.splitlines()
    number = table.index("n   Car                1       2       3   truths, fewer than 41: "
                         "a perfect detector gets")
    assert table[number + 1].split() == "max Car 0.00 2.50 5.00 9.09 9.09 9.09".split()
    assert metrics["bev"]["Cyclist"]["R40"] == [None] * 3
    assert metrics["bev"]["Car"]["R40"] == pytest.approx([0, 2.5, 5])
    assert metrics["bev"]["Car"]["R11"] == pytest.approx([100 / 11] * 3)
    for kind in ("2d", "3d"):                        # the raised one is scored last and missed
        assert metrics[kind]["Car"]["R40"] == pytest.approx([0, 2.5, 2.5]), kind
    assert message == "3D AP|R40 moderate Car 2.50, Pedestrian nan, Cyclist nan"
    for kind in ("2d", "bev", "3d"):                 # two classes have no truth here
        assert metrics[kind]["Overall"] == {"R40": [None] * 3, "R11": [None] * 3}

    table = {}
    for n, kind in enumerate(("2d", "bev", "3d"), 1):
        R40 = [n + k for k in (.1, .2, .3)]
        R11 = [n + 4 + k for k in (.1, .2, .3)]
        cyclists = {"R40": [2 * v for v in R40], "R11": [20, 40, 60]}
        table[kind] = {"Car": {"R40": R40, "R11": R11}, "Cyclist": cyclists}
    monkeypatch.setattr(finetune, "kitti_score", lambda *_: table)
    message = finetune.finish_kitti(model, frames, tmp_path)
    assert message == "3D AP|R40 moderate Car 3.20, Cyclist 6.40"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["3d"]["Overall"]["R40"] == pytest.approx([4.65, 4.8, 4.95])
    assert metrics["bev"]["Overall"]["R11"] == pytest.approx([13.05, 23.1, 33.15])
    printed = capsys.readouterr().out
    assert "3d  Overall         4.65    4.80    4.95      13.55   23.60   33.65" in printed

    for n, i in enumerate(numbers[:2]):
        name = dataset.names[i].rsplit("/", 1)[1]
        line, = (tmp_path / "kitti" / f"{name}.txt").read_text().splitlines()
        label_file = Path(dataset.root, dataset.frames[i].labels)
        label = label_file.read_text().splitlines()[0].split()
        words = line.split()
        assert words[:3] == ["Car", "-1", "-1"]
        assert float(words[15]) == pytest.approx(0.7 - 0.1 * n)
        written = np.array(words[3:15], float)
        np.testing.assert_allclose(written, np.array(label[3:], float), atol=0.02)


TINY = {**finetune.SMALL, "width": 4, "bins": 12, "steps": 1, "batch": 1}


def test_kitti_runs_use_points_that_the_picture_shows_and_mirror_only_y(kitti, tmp_path,
                                                                        monkeypatch):
    """What train and --eval-only hand to their loaders; val frames are the scored ones."""
    loaders = []
    loader = data.loader

    def recorded(*words, **more):
        loaders.append(loader(*words, **more))
        return loaders[-1]

    monkeypatch.setattr(data, "loader", recorded)
    for name in ("finish", "loss_curves"):
        monkeypatch.setattr(finetune, name, lambda *_: None)
    out = str(tmp_path / "run")
    cfg = finetune.Config(preset="small", data=str(kitti), out=out, gpus=0, modality="lidar",
                          fraction=1., rotation=0., scale=0., **TINY)
    finetune.train(0, 1, cfg)
    finetune.train(0, 1, replace(finetune.Config(), eval_only=out, gpus=0, workers=0))
    train, *scored = loaders
    batches = [batch for _, batch in zip(range(8), train.begin_at(0))]
    plain = data.open_dataset(kitti, "small").load(0).points
    for batch in batches:
        assert (batch.points[:, 0] > 0).all()
        assert 400 < len(batch.points) < 700
    first = [batch.points[0] for batch in batches if batch.names[0].endswith("000000")]
    # y is mirrored now and then
    assert {float(point[1]) for point in first} == {float(plain[0, 1]), -float(plain[0, 1])}
    for val in scored:
        batch, = val.once()
        assert batch.names[0].endswith("000007")
        assert (batch.points[:, 0] > 0).all()
        assert 400 < len(batch.points) < 700
    assert len(scored) == 2


def test_a_lidar_detector_needs_no_pictures(kitti, tmp_path):
    """Trained and scored on reduced clouds, calibrations and labels alone."""
    root = clone(kitti, tmp_path / "kitti")
    for folder in ("training", "testing"):
        (root / folder / "velodyne").rename(root / folder / "velodyne_reduced")
        shutil.rmtree(root / folder / "image_2")
    out = tmp_path / "run"
    cfg = finetune.Config(preset="small", data=str(root), out=str(out), gpus=0, fraction=1.,
                          modality="lidar", **TINY)
    finetune.train(0, 1, cfg)
    assert json.loads((out / "metrics.json").read_text())["frames"] == 1
    assert (out / "figures" / "bev.png").is_file()
    finetune.train(0, 1, replace(finetune.Config(), eval_only=str(out), gpus=0, workers=0))


def test_a_detector_is_trained_and_scored_on_kitti(kitti, tmp_path, capsys):
    torch.manual_seed(0)
    out = tmp_path / "run"
    cfg = finetune.Config(preset="small", data=str(kitti), out=str(out), gpus=0, fraction=1.,
                          **TINY)
    finetune.train(0, 1, cfg)
    last = capsys.readouterr().out.splitlines()[-1]
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    APs = [ap for one in metrics["3d"].values() for ap in one["R40"]]
    assert None in APs                               # a class without truth
    assert set(metrics) == {"2d", "bev", "3d", "frames", "truths", "perfect_detector"}
    assert metrics["frames"] == 1
    assert "3D AP|R40 moderate Car" in last
    lines = (out / "kitti" / "000007.txt").read_text().splitlines()
    assert lines
    for line in lines:
        assert len(line.split()) == 16
        assert line.split()[0] in ("Car", "Pedestrian", "Cyclist")
    for name in ("bev", "images", "losses"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="belong to no scene"):
        finetune.train(0, 1, replace(cfg, draw="scenes", out=str(tmp_path / "other")))


def with_labels(root, folder, labels):
    """A copy of a KITTI root in which these frames have this label file."""
    copy = Path(shutil.copytree(root, folder))
    for number, text in labels.items():
        (copy / "training" / "label_2" / f"{number}.txt").write_text(text)
    return copy


FLAT = "Car 0 0 0 500 150 700 300 -1 -1 -1 -1000 -1000 -1000 -10\n"


@pytest.mark.parametrize("labels, message", [
    ({"000000": FLAT, "000003": FLAT}, "no 3-D box of a detection class in the 2 frames drawn"),
    ({"000007": FLAT}, "none of its 1 val frames has a 3-D box of a detection class"),
    ({"000007": ""}, "none of its 1 val frames has a 3-D box of a detection class"),
])
def test_labels_that_teach_or_score_nothing_are_refused(kitti, tmp_path, labels, message):
    """Label tools write 2-D boxes with sides of -1 m."""
    root = with_labels(kitti, tmp_path / "root", labels)
    out = tmp_path / "run"
    cfg = finetune.Config(preset="small", data=str(root), out=str(out), gpus=0, fraction=1., **TINY)
    refusal = f"{message}|sides of the box between"  # a reader may refuse 2-D boxes itself
    with pytest.raises((SystemExit, data.DataError), match=refusal):
        finetune.train(0, 1, cfg)
    assert not out.exists()
    if "000007" in labels:
        faults = data.scoring_faults(data.open_dataset(root), [0, 1, 2])
        assert any(re.search(refusal, fault) for fault in faults), faults


def test_result_files_are_written_before_a_label_is_read(kitti, tmp_path, monkeypatch):
    dataset = data.open_dataset(kitti)
    frames = labels_as_detections(dataset, [0, 1, 2], dataset.annotations)

    def damaged(i):
        raise data.DataError("label_2/000000.txt, line 1 is 'x'")
    monkeypatch.setattr(dataset, "annotations", damaged)
    monkeypatch.setattr(finetune, "predict_all", lambda *_: frames)
    loader = SimpleNamespace(dataset=dataset, grid=dataset.grid)
    out = tmp_path / "run"
    out.mkdir()
    message = (f"{out}: not scored .label_2/000000.txt, line 1 is 'x'.. Nothing else is lost: the "
               f"predictions are in {out}/kitti, .*--eval-only {out}$")
    with pytest.raises(SystemExit, match=message):
        finetune.finish(None, finetune.Config(), str(out), loader, None, 0)
    assert len(list((out / "kitti").iterdir())) == 3


def test_a_frame_whose_name_is_no_text_is_refused(kitti, tmp_path):
    root = with_labels(kitti, tmp_path / "root", {})
    shutil.rmtree(root / "ImageSets")
    for file in list(root.glob("training/*/000007.*")):
        if file.suffix != ".npy":
            file.rename(file.with_name(os.fsdecode(b"caf\xe9") + file.suffix))
    out = tmp_path / "run"
    cfg = finetune.Config(preset="small", data=str(root), out=str(out), gpus=0, **TINY)
    with pytest.raises(data.DataError, match=r"'caf\\udce9.bin', whose name is not text; rename"):
        finetune.train(0, 1, cfg)
    assert not out.exists()
