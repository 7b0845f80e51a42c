"""KITTI's detection metric in finetune.py: against cases done by hand, a slow transcription of the official rules, and the labels themselves."""
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import finetune
from finetune import kitti_ap, kitti_iou, kitti_rows, shared_area


def rows_of(*rows):
    """Label rows from dicts with type, x, z (m), and what differs from a car 20 m ahead, 60 px high."""
    out = np.zeros(len(rows), data.KITTI_LABEL)
    for n, given in enumerate(rows):
        one = dict(type="Car", x=0., z=20., ry=0., hwl=(1.5, 1.6, 4.), top=100., height=60., truncated=0., occluded=0) | given
        left = 100 + 20 * one["x"]
        out[n] = (one["type"], one["truncated"], one["occluded"], 0, (left, one["top"], left + 80, one["top"] + one["height"]), one["hwl"], (one["x"], 1.6, one["z"]),
                  one["ry"], np.zeros(9), 0)
    return out


def many(n=50, **more):
    return [dict(x=6. * i, **more) for i in range(n)]


# ---- overlap ----

def test_shared_area_of_turned_rectangles():
    square, rng = np.array([[0., 0, 2, 2, 0]]), np.random.default_rng(0)
    assert shared_area(square, np.array([[0, 0, 2, 2, math.pi / 4]]))[0, 0] == pytest.approx(8 * (math.sqrt(2) - 1))         # an octagon
    assert shared_area(square, np.array([[1, 1, 2, 2, math.pi]]))[0, 0] == pytest.approx(1)
    a, b = (np.column_stack([rng.uniform(-4, 4, (30, 2)), rng.uniform(0.5, 5, (30, 2)), rng.uniform(-4, 4, 30)]) for _ in range(2))
    a[:3, 2:4] = b[:3, 2:4] = 0.01                                                          # next to nothing
    found = shared_area(a, b)
    grid = np.stack(np.meshgrid(*[np.arange(-8, 8, 0.04)] * 2), -1).reshape(-1, 2)         # counted on a lattice

    def covers(box):
        offset, (cos, sin) = grid - box[:2], (np.cos(box[4]), np.sin(box[4]))
        return (abs(offset @ [cos, sin]) < box[2] / 2) & (abs(offset @ [-sin, cos]) < box[3] / 2)
    inside = [np.array([covers(box) for box in boxes], np.float32) for boxes in (a, b)]
    np.testing.assert_allclose(found, inside[0] @ inside[1].T * 0.04 ** 2, atol=0.12)
    assert (found > 0.5).sum() > 100 and shared_area(a[:0], b).shape == (0, 30)


def test_iou_of_labels():
    a = rows_of(dict(), dict(x=1.), dict(ry=math.pi / 2))
    np.testing.assert_allclose(kitti_iou(a[:1], a, "bev"), [[1, 3 / 5, 1.6 ** 2 / (2 * 6.4 - 1.6 ** 2)]])                 # length along x at ry = 0
    higher = a[:1].copy()
    higher["location"][:, 1] -= 0.5                                                         # half a metre up
    assert kitti_iou(a[:1], higher, "3d")[0, 0] == pytest.approx(1 / 2) and kitti_iou(a[:1], higher, "bev")[0, 0] == pytest.approx(1)
    assert kitti_iou(a[:1], rows_of(dict(x=2.)), "2d")[0, 0] == pytest.approx(40 / 120)


# ---- by hand ----

def ap(gt, found, scores, name="Car", level=1, kind="3d"):
    return kitti_ap([(rows_of(*gt), rows_of(*found), np.array(scores, float))], name, level, kind)


def test_perfect_one_missed_one_false():
    for kind in ("2d", "bev", "3d"):
        assert ap(many(50), many(50), np.linspace(1, 0.5, 50), kind=kind) == pytest.approx((100, 100))
    missed = ap(many(50), many(50)[:25], np.linspace(1, 0.5, 25))                           # recall stops at a half: 20 of 40, 6 of 11
    assert missed == pytest.approx((50, 600 / 11))
    false = ap(many(50), [*many(50), dict(x=-50.)], [*np.linspace(0.9, 0.5, 50), 1.0])    # the best score is a false alarm
    assert false == pytest.approx((100 * 50 / 51, 100 * 50 / 51))
    late = ap(many(50), [*many(50), dict(x=-50.)], [*np.linspace(0.9, 0.5, 50), 0.1])
    assert late == pytest.approx((100, 100))
    twice = ap(many(50), [*many(50), dict(x=0.)], [*np.linspace(0.9, 0.5, 50), 0.95])     # a second box on a car: false, but where only it is above the threshold
    assert twice == pytest.approx((100 * 50 / 51, 100 * (1 + 10 * 50 / 51) / 11))
    assert all(math.isnan(v) for v in ap([], many(3), [1, 1, 1]))
    assert ap(many(50), [], []) == (0, 0)


def test_levels_take_height_occlusion_and_truncation():
    hard = [dict(x=6. * i, height=30., occluded=1, truncated=0.2) for i in range(50, 100)]
    gt, found = many(50) + hard, many(50)
    scores = np.linspace(1, 0.5, 50)
    assert ap(gt, found, scores, level=0) == pytest.approx((100, 100))                      # the hard ones need not be found
    assert ap(gt, found, scores, level=1)[0] == pytest.approx(50)
    assert ap(gt, many(50) + [dict(x=6. * i) for i in range(50, 100)], np.linspace(1, 0.5, 100), level=0) == pytest.approx((100, 100))   # nor do they harm if found
    low = [*many(50), *[dict(x=-6. * i - 6, height=39.) for i in range(20)]]                # false alarms too low for easy
    assert ap(many(50), low, [*np.linspace(0.6, 0.5, 50), *[0.9] * 20], level=0) == pytest.approx((100, 100))
    assert ap(many(50), low, [*np.linspace(0.6, 0.5, 50), *[0.9] * 20], level=1)[0] == pytest.approx(100 * 50 / 70)
    assert ap(many(50, height=25.), many(50), scores, level=1) != ap(many(50, height=25.1), many(50), scores, level=1)


def test_neighbouring_classes_and_dont_care():
    vans = [dict(type="Van", x=-6. * i - 6) for i in range(10)]
    extra = [dict(x=-6. * i - 6) for i in range(10)]
    scores = [*np.linspace(0.6, 0.5, 50), *[0.9] * 10]
    assert ap(many(50) + vans, many(50) + extra, scores) == pytest.approx((100, 100))
    trucks = [dict(v, type="Truck") for v in vans]
    assert ap(many(50) + trucks, many(50) + extra, scores)[0] == pytest.approx(100 * 50 / 60)
    stuff = [dict(v, type="DontCare") for v in vans]
    assert ap(many(50) + stuff, many(50) + extra, scores, kind="2d") == pytest.approx((100, 100))
    for rows in (stuff,):
        gt = rows_of(*many(50), *rows)
        gt["location"][50:] = -1000                                                         # as on disk: no place in 3-D
        assert kitti_ap([(gt, rows_of(*many(50), *extra), np.array(scores))], "Car", 1, "3d")[0] == pytest.approx(100 * 50 / 60)


# ==== tests/test_kitti.py ====

def test_sitting_persons_are_neither_pedestrians_nor_false():
    people, sitting = many(50, type="Pedestrian"), [dict(x=-6. * i - 6, type="Person_sitting") for i in range(10)]
    found = rows_of(*people, *[dict(row, type="Pedestrian") for row in sitting])
    scores = np.array([*np.linspace(0.6, 0.5, 50), *[0.9] * 10])
    assert finetune.kitti_ap([(rows_of(*people, *sitting), found, scores)], "Pedestrian", 1, "3d") == pytest.approx((100, 100))
    assert finetune.kitti_ap([(rows_of(*people), found, scores)], "Pedestrian", 1, "3d")[0] == pytest.approx(100 * 50 / 60)
    cars = rows_of(*many(50), *sitting)                                                     # to a car nobody is alike but a van
    assert finetune.kitti_ap([(cars, rows_of(*many(50), *[dict(row, type="Car") for row in sitting]), scores)], "Car", 1, "3d")[0] == pytest.approx(100 * 50 / 60)


# ---- a slow transcription ----

def slow_ap(frames, name, level, kind):
    """evaluate_object as it is written there: loops, flags, the order of its decisions."""
    min_height, max_occlusion, max_truncation = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))[level]
    least, alike = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}[name], {"Car": "Van", "Pedestrian": "Person_sitting"}.get(name)
    n_gt, prepared = 0, []
    for gt, found, score in frames:
        ignored_gt = []
        for g in gt:
            valid = 1 if g["type"] == name else 0 if g["type"] == alike else -1
            ignore = g["occluded"] > max_occlusion or g["truncated"] > max_truncation or g["bbox"][3] - g["bbox"][1] <= min_height
            if valid == 1 and not ignore:
                ignored_gt.append(0)
                n_gt += 1
            else:
                ignored_gt.append(1 if valid == 0 or valid == 1 else -1)
        ignored_det = [1 if d["bbox"][3] - d["bbox"][1] < min_height else 0 if d["type"] == name else -1 for d in found]
        prepared.append((gt, found, score, ignored_gt, ignored_det, kitti_iou(gt, found, kind)))

    def statistics(frame, compute_fp, threshold):
        gt, found, score, ignored_gt, ignored_det, iou = frame
        assigned, ignored_threshold = [False] * len(found), [compute_fp and s < threshold for s in score]
        tp = fp = 0
        scores = []
        for i in range(len(gt)):
            if ignored_gt[i] == -1:
                continue
            det, best_score, best_overlap, assigned_ignored = None, -1.0, 0.0, False
            for j in range(len(found)):
                if ignored_det[j] == -1 or assigned[j] or ignored_threshold[j]:
                    continue
                if not compute_fp and iou[i, j] > least and score[j] > best_score:
                    det, best_score = j, score[j]
                elif compute_fp and iou[i, j] > least and (iou[i, j] > best_overlap or assigned_ignored) and ignored_det[j] == 0:
                    det, best_overlap, assigned_ignored = j, iou[i, j], False
                elif compute_fp and iou[i, j] > least and det is None and ignored_det[j] == 1:
                    det, assigned_ignored = j, True
            if det is not None:
                assigned[det] = True
                if ignored_gt[i] != 1 and ignored_det[det] != 1:
                    tp += 1
                    scores.append(score[det])
        if compute_fp:
            fp = sum(not (assigned[j] or ignored_det[j] != 0 or ignored_threshold[j]) for j in range(len(found)))
            if kind == "2d":
                for g in gt[gt["type"] == "DontCare"]:
                    for j, d in enumerate(found):
                        if assigned[j] or ignored_det[j] != 0 or ignored_threshold[j]:
                            continue
                        w = min(d["bbox"][2], g["bbox"][2]) - max(d["bbox"][0], g["bbox"][0])
                        h = min(d["bbox"][3], g["bbox"][3]) - max(d["bbox"][1], g["bbox"][1])
                        if w > 0 and h > 0 and w * h / ((d["bbox"][2] - d["bbox"][0]) * (d["bbox"][3] - d["bbox"][1])) > least:
                            assigned[j] = True
                            fp -= 1
        return tp, fp, scores
    v = sorted((s for frame in prepared for s in statistics(frame, False, 0)[2]), reverse=True)
    thresholds, current = [], 0.0
    for i in range(len(v)):
        left, right = (i + 1) / n_gt, (i + 2) / n_gt if i < len(v) - 1 else (i + 1) / n_gt
        if right - current < current - left and i < len(v) - 1:
            continue
        thresholds.append(v[i])
        current += 1 / 40
    precision = [0.0] * 41
    for n, t in enumerate(thresholds):
        counts = [statistics(frame, True, t) for frame in prepared]
        tp, fp = sum(c[0] for c in counts), sum(c[1] for c in counts)
        precision[n] = tp / (tp + fp)
    for n in range(len(thresholds)):
        precision[n] = max(precision[n:])
    return 100 * sum(precision[1:]) / 40, 100 * sum(precision[i] for i in range(0, 41, 4)) / 11


def test_random_frames_score_as_in_the_transcription():
    rng, compared = np.random.default_rng(0), 0
    kinds = ["Car", "Van", "Pedestrian", "Cyclist", "DontCare", "Truck"]
    for trial in range(3):
        frames = []
        for _ in range(12):
            gt = [dict(type=str(rng.choice(kinds, p=[.4, .1, .2, .1, .1, .1])), x=rng.uniform(-30, 30), z=rng.uniform(5, 40), ry=rng.uniform(-3, 3),
                       height=rng.uniform(15, 90), occluded=rng.integers(0, 4), truncated=rng.choice([0, 0.2, 0.4, 0.6])) for _ in range(14)]
            found = [g | dict(x=g["x"] + rng.normal(0, 0.15), ry=g["ry"] + rng.normal(0, 0.05), height=g["height"] + rng.normal(0, 4),
                              type=str(rng.choice([g["type"], "Car"])) if g["type"] in kinds[:4] else "Car") for g in gt for _ in range(rng.integers(0, 3))]
            found += [dict(type="Car", x=float(rng.uniform(-30, 30)), height=float(rng.uniform(20, 60))) for _ in range(3)]
            frames.append((rows_of(*gt), rows_of(*found), rng.random(len(found)).round(2)))
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


def test_a_box_that_reaches_behind_the_camera_is_left_out_and_one_at_the_edge_ends_there(kitti):
    dataset = data.open_dataset(kitti)
    boxes = np.array([[1., 0, -1, 4, 2, 1.5, 0, 0, 0], [6, -5, -1, 4, 2, 1.5, 0, 0, 0]])
    rows, kept = finetune.kitti_rows(dataset, 0, boxes, np.array([0, 2]))
    assert kept.tolist() == [1] and rows["type"].tolist() == ["Cyclist"] and rows["bbox"][0, 2] == 1241 and 0 < rows["bbox"][0, 0] < 1200


def test_what_is_written_of_a_kitti_run(kitti, tmp_path, monkeypatch):
    """The labelled car of each frame as a detection, in one frame raised by a metre, after a better scored box behind the camera; easy, moderate, hard."""
    dataset = data.open_dataset(kitti)
    numbers, annotations, frames = np.flatnonzero([bool(frame.labels) for frame in dataset.frames])[:3], dataset.annotations, {}

    def harder(i):
        rows = annotations(i)
        rows["occluded"][0] = list(numbers).index(i)
        return rows
    monkeypatch.setattr(dataset, "annotations", harder)
    for n, i in enumerate(numbers):
        car = annotations(i)["box"][0]
        boxes = np.stack([[-15., 0, -1, 4, 2, 1.5, 0, 0, 0], np.nan_to_num(car) + [0, 0, n == 2, 0, 0, 0, 0, 0, 0]])
        frames[dataset.names[i]] = boxes, np.zeros(2, int), np.array([0.9, 0.7 - 0.1 * n]), np.eye(4)
    told = finetune.finish_kitti(SimpleNamespace(dataset=dataset), frames, tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["frames"] == 3 and set(found) == {"2d", "bev", "3d", "frames"} and found["bev"]["Cyclist"]["R40"] == [None] * 3
    assert found["bev"]["Car"]["R40"] == pytest.approx([0, 2.5, 5]) and found["bev"]["Car"]["R11"] == pytest.approx([100 / 11] * 3)
    for kind in ("2d", "3d"):                                                               # the raised one, scored last: its truth is missed
        assert found[kind]["Car"]["R40"] == pytest.approx([0, 2.5, 2.5]), kind
    assert told == "3D AP|R40 moderate Car 2.50, Pedestrian nan, Cyclist nan"
    table = {kind: {"Car": {r: [n + m + k for k in (.1, .2, .3)] for m, r in ((0, "R40"), (4, "R11"))}} for n, kind in enumerate(("2d", "bev", "3d"), 1)}
    monkeypatch.setattr(finetune, "kitti_score", lambda *_: table)
    assert finetune.finish_kitti(SimpleNamespace(dataset=dataset), frames, tmp_path) == "3D AP|R40 moderate Car 3.20"
    for n, i in enumerate(numbers[:2]):
        line, = (tmp_path / "kitti" / f"{dataset.names[i].rsplit('/', 1)[1]}.txt").read_text().splitlines()
        label = Path(dataset.root, dataset.frames[i].labels).read_text().splitlines()[0].split()
        words = line.split()
        assert words[:3] == ["Car", "-1", "-1"] and float(words[15]) == pytest.approx(0.7 - 0.1 * n)
        np.testing.assert_allclose(np.array(words[3:15], float), np.array(label[3:], float), atol=0.02)


# ---- labels and runs ----

def test_kitti_runs_stay_within_the_picture_and_ahead(kitti, tmp_path, monkeypatch):
    """What train and --eval-only hand to their loaders: points that the picture shows, no mirroring of x, and to be scored the held-out frames."""
    given, loader = [], data.loader
    monkeypatch.setattr(data, "loader", lambda *words, **more: given.append(loader(*words, **more)) or given[-1])
    for name in ("finish", "loss_curves"):
        monkeypatch.setattr(finetune, name, lambda *_: None)
    tiny = {**finetune.SMALL, "width": 4, "bins": 12, "steps": 1, "batch": 1}
    cfg = finetune.Config(preset="small", data=str(kitti), out=str(tmp_path / "run"), gpus=0, modality="lidar", fraction=1., rotation=0., scale=0., **tiny)
    finetune.train(0, 1, cfg)
    finetune.train(0, 1, replace(finetune.Config(), eval_only=cfg.out, gpus=0, workers=0))
    train, *scored = given
    drawn, plain = [batch for _, batch in zip(range(8), train.begin_at(0))], data.open_dataset(kitti, "small").load(0).points
    assert all((batch.points[:, 0] > 0).all() and 400 < len(batch.points) < 700 for batch in drawn)
    first = [batch.points[0] for batch in drawn if batch.names[0].endswith("000000")]
    assert {float(point[1]) for point in first} == {float(plain[0, 1]), -float(plain[0, 1])}                     # y is mirrored now and then
    for held_out in scored:
        batch, = held_out.once()
        assert batch.names[0].endswith("000007") and (batch.points[:, 0] > 0).all() and 400 < len(batch.points) < 700
    assert len(scored) == 2


def check_labels(root):
    """Label boxes through our LiDAR frame and back are the label rows; as detections they are all found."""
    dataset, met = data.open_dataset(root), 0
    for i in range(len(dataset)):
        rows = dataset.annotations(i)
        rows = rows[rows["label"] >= 0]
        if not len(rows):
            continue
        back, kept = kitti_rows(dataset, i, rows["box"], rows["label"])
        assert len(kept) == len(rows) and (back["type"] == rows["type"]).all()
        for field, room in (("hwl", 1e-6), ("location", 1e-6), ("rotation_y", 1e-3), ("alpha", 0.05)):
            gap = back[field] - rows[field]
            gap = np.arctan2(np.sin(gap), np.cos(gap)) if field in ("rotation_y", "alpha") else gap
            np.testing.assert_allclose(gap, 0, atol=room)
        whole = rows["truncated"] == 0
        np.testing.assert_allclose(kitti_iou(rows[whole], back[whole], "2d").diagonal(), 1, atol=0.25)
        np.testing.assert_allclose(kitti_iou(rows, back, "3d").diagonal(), 1, atol=0.01)
        met += len(rows)
    assert met


def test_fabricated_labels_survive_the_round_trip(kitti):
    check_labels(kitti)


def test_real_labels_survive_the_round_trip(kitti_root):
    check_labels(kitti_root)


def test_a_box_that_the_picture_does_not_show_is_left_out(kitti):
    dataset = data.open_dataset(kitti)
    boxes = np.array([[15., 0, -1, 4, 2, 1.5, 0, 0, 0], [-15, 0, -1, 4, 2, 1.5, 0, 0, 0], [10, 60, -1, 4, 2, 1.5, 0, 0, 0]])
    rows, kept = kitti_rows(dataset, 0, boxes, np.array([0, 0, 0]))
    assert kept.tolist() == [0] and (rows["bbox"] >= 0).all() and rows["bbox"][0, 2] <= 1242 and rows["bbox"][0, 3] <= 375


def test_a_detector_is_trained_and_scored_on_kitti(kitti, tmp_path, capsys):
    torch.manual_seed(0)
    tiny = {**finetune.SMALL, "width": 4, "bins": 12, "steps": 1, "batch": 1}
    cfg = finetune.Config(preset="small", **tiny, data=str(kitti), out=str(tmp_path / "run"), gpus=0, fraction=1.)
    finetune.train(0, 1, cfg)
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert None in (ap for one in found["3d"].values() for ap in one["R40"])                        # a class without truth
    assert set(found) == {"2d", "bev", "3d", "frames"} and found["frames"] == 1 and "3D AP|R40 moderate Car" in last
    lines = (tmp_path / "run" / "kitti" / "000007.txt").read_text().splitlines()
    assert lines and all(len(line.split()) == 16 and line.split()[0] in ("Car", "Pedestrian", "Cyclist") for line in lines)
    for name in ("bev", "images", "losses"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="belong to no scene"):
        finetune.train(0, 1, replace(cfg, draw="scenes", out=str(tmp_path / "other")))
