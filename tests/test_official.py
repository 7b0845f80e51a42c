"""The metrics of finetune.py against the official programs, on made-up truths and detections.

official/kitti.json and official/waymo.json hold the boxes and what the program said of them;
nuscenes-devkit is installed, and runs here.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
import finetune

HERE = Path(__file__).resolve().parent / "official"
CLASSES = {kind: data.GRIDS[kind, "small"].classes for kind in ("kitti", "waymo")}


def read(name):
    return json.loads((HERE / f"{name}.json").read_text())


# ---- KITTI: evaluate_object in C++ ---------------------------------------------------

def kitti_rows(lines):
    """Lines of a label file, or of a result file -> rows (M,) KITTI_LABEL, scores (M,)."""
    rows = np.zeros(len(lines), data.KITTI_LABEL)
    scores = np.zeros(len(lines))
    for n, line in enumerate(lines):
        kind, truncated, occluded, *numbers = line.split()
        v = np.array(numbers, float)
        rows[n]["type"] = kind
        rows[n]["truncated"] = float(truncated)
        rows[n]["occluded"] = int(occluded)
        rows[n]["alpha"] = v[0]
        rows[n]["bbox"] = v[1:5]
        rows[n]["hwl"] = v[5:8]
        rows[n]["location"] = v[8:11]
        rows[n]["rotation_y"] = v[11]
        scores[n] = v[12] if len(v) == 13 else 0
    return rows, scores


@pytest.fixture(scope="module")
def kitti():
    return read("kitti")


def test_kitti_ap_is_that_of_the_official_program(kitti):
    """Each kind, class and level, to the last bit."""
    frames = []
    for name, lines in kitti["labels"].items():
        truth, _ = kitti_rows(lines)
        frames.append((truth, *kitti_rows(kitti["detections"][name])))
    assert len(kitti["ap"]) == 27
    for kind, name, level, r40, r11 in kitti["ap"]:
        assert finetune.kitti_ap(frames, name, level, kind) == (r40, r11), (kind, name, level)


def test_kitti_score_writes_what_the_official_program_read(kitti, tmp_path, monkeypatch):
    """Byte for byte, and puts its numbers where they belong."""
    names = [f"kitti/training/{name}" for name in kitti["labels"]]
    files = list(kitti["detections"].values())
    frames = {}
    for name, lines in zip(names, files):
        _, scores = kitti_rows(lines)
        frames[name] = np.zeros((len(lines), 9)), np.zeros(len(lines), int), scores, np.eye(4)
    dataset = SimpleNamespace(
        names=names,
        grid=SimpleNamespace(classes=CLASSES["kitti"]),
        annotations=lambda i: kitti_rows(kitti["labels"][names[i].rsplit("/", 1)[1]])[0])
    # the boxes are made up in the camera's coordinates, so nothing is projected
    monkeypatch.setattr(finetune, "kitti_rows", lambda dataset, i, boxes, labels: (
        kitti_rows(files[i])[0], np.arange(len(boxes))))
    metrics = finetune.kitti_score(dataset, frames, tmp_path)
    for name, lines in kitti["detections"].items():
        text = "".join(line + "\n" for line in lines)
        assert (tmp_path / f"{name}.txt").read_text() == text
    for kind, name, level, r40, r11 in kitti["ap"]:
        ap = metrics[kind][name]
        assert (ap["R40"][level], ap["R11"][level]) == (r40, r11), (kind, name, level)


# ---- Waymo: the operator detection_metrics -------------------------------------------

def test_waymo_ap_is_that_of_the_official_operator():
    """To 1.7e-5 points: the operator's numbers are float32."""
    waymo = read("waymo")
    labels = np.array(waymo["labels"])          # frame, class, x y z l w h yaw, points, level
    detections = np.array(waymo["detections"])  # frame, class, x y z l w h yaw, score
    frames = []
    for frame in np.unique(np.r_[labels[:, 0], detections[:, 0]]):
        own = labels[labels[:, 0] == frame]
        truth = np.zeros(len(own), data.WAYMO_BOX)
        truth["label"] = own[:, 1]
        truth["box"][:, :7] = own[:, 2:9]
        truth["lidar_points"] = own[:, 9]
        truth["difficulty"] = own[:, 10]
        predicted = detections[detections[:, 0] == frame]
        boxes = np.c_[predicted[:, 2:9], np.zeros((len(predicted), 2))]
        frames.append((truth, boxes, predicted[:, 1].astype(int), predicted[:, 9]))
    assert len(waymo["ap"]) == 6
    for label, level, ap, aph in waymo["ap"]:
        least = finetune.WAYMO_IOU[CLASSES["waymo"][label]]
        ours = finetune.waymo_ap(frames, label, least)[level - 1]
        assert ours == pytest.approx((100 * ap, 100 * aph), abs=1.7e-5), (label, level)


# ---- nuScenes: the devkit's DetectionEval --------------------------------------------

def noisy(frames, rng, classes):
    """Truths moved, turned and scaled, some missed, some of another class, and false alarms."""
    result = {}
    for name, (boxes, labels, _, pose) in frames.items():
        rows = np.r_[np.flatnonzero(rng.random(len(boxes)) < 0.8), rng.integers(0, len(boxes), 20)]
        boxes = boxes[rows].copy()
        boxes[:, :2] += rng.normal(0, 0.8, (len(rows), 2))
        boxes[:, 3:6] *= rng.uniform(0.8, 1.2, (len(rows), 3))
        boxes[:, 6] += rng.normal(0, 0.5, len(rows))
        boxes[:, 7:9] += rng.normal(0, 0.5, (len(rows), 2))
        labels = np.where(rng.random(len(rows)) < 0.9, labels[rows],
                          rng.integers(0, classes, len(rows)))
        result[name] = boxes, labels, rng.random(len(rows)), pose
    return result


def test_nuscenes_score_is_that_of_the_devkit(world, tmp_path):
    """Its constructor reads a whole split, ours is given frames: all numbers are the same."""
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    dataset = data.open_dataset(world, "small")
    frames = {}
    for i in dataset.split("val"):
        frame = dataset.load(int(i), (12, 32))
        frames[frame.name] = (
            np.nan_to_num(frame.boxes), frame.labels, None, frame.lidar2world)
    frames = noisy(frames, np.random.default_rng(0), len(dataset.grid.classes))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(finetune.nuscenes_results(frames, dataset.grid.classes)))
    tokens = [name.rsplit("/", 1)[1] for name in frames]
    ours, _, _ = finetune.nuscenes_score(dataset, path, tokens)

    tables = NuScenes(dataset.version, dataset.root, verbose=False)
    official = DetectionEval(tables, config_factory("detection_cvpr_2019"), str(path),
                             "embedded_val", str(tmp_path), verbose=False)
    expected = official.evaluate()[0].serialize()
    assert 0.05 < expected["mean_ap"] < 0.95
    for metrics in (ours, expected):
        del metrics["eval_time"]
    assert json.dumps(ours, sort_keys=True) == json.dumps(expected, sort_keys=True)
