"""Few-label detection: a CenterPoint-style head on the shared camera + LiDAR trunk, from a pre-training run or from nothing, scored by the official metric.

    python finetune.py --init runs/clap                       # what the pre-training is worth with 5 % of the labels
    python finetune.py --init none --out runs/none            # the baseline: the same labels, the same steps
    python finetune.py --eval-only runs/finetune              # predict and score again
    python finetune.py --export openpcdet --init runs/clap --out clap.pth     # its LiDAR network for OpenPCDet; torchvision: its image network

Read with: common.py §3 trunk; data.py Batch, warp_boxes. Everything pre-trained on the trunk is loaded, the fusion layer too; the head is new.
Source: CenterPoint (Yin et al., CVPR 2021, arXiv 2006.11275). [code] marks its released code and OpenPCDet's, [ours] our choice.

    fused volume (B, C, Z, Y, X) -> flatten Z -> BevNeck -> shared 3 x 3 -> one Head a class group: heat map (B, classes, Y, X) and box code (B, 10, Y, X)
    box code: offset y, x of the centre from its cell's (cells); z (m); log l, w, h; sin, cos of yaw; velocity x, y (m/s)

Departures:
  D1  Frames are drawn evenly (CenterPoint draws those with rare classes more often), no boxes of other frames are pasted in (it does: ground-truth sampling),
      the learning rate follows half a cosine and AdamW's betas stay 0.9 and 0.999 (there one cycle of both).
  D2  3 x 3 peaks instead of the released code's suppression by overlap, no least score (there 0.1), at most 500 boxes a frame, as the metric takes.
  D3  Attributes, which a detector without an attribute head must guess, follow speed and class (the released code's rule).
  D4  Boxes without a LiDAR point are not learned from, whatever the branches (OpenPCDet's and mmdetection3d's rule); nuScenes' metric still counts those that
      hold a radar point, KITTI's all, Waymo's none.
  D5  Loss weights, learning rate and turn are those of its nuScenes configuration on every data set; its Waymo configuration has a box loss of weight 2, a rate
      three times as high, twice the turn and no velocity.
"""
import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.spatial.transform import Rotation
from torch import nn

import data
from common import (Run, all_reduce, bf16_autocast, lock_run_folder, cosine, destroy_group, figure, init_process, launch, record_frames, load_units, loss_curves, mean_over_ranks,
                    parse, processes, load_tool, rank0_first, read_units, resume, run_config, save, share_buffers, start, trunk, wrap, write_text, atomic_write)

UNITS = "lidar", "camera.resnet", "camera.neck", "fuse"             # what a pre-training run may hold
GROUPS = {                                                          # classes that share a head [code CenterPoint]
    "nuscenes": (("car",), ("truck", "construction_vehicle"), ("bus", "trailer"), ("barrier",), ("motorcycle", "bicycle"), ("pedestrian", "traffic_cone")),
    "kitti": (("Car", "Pedestrian", "Cyclist"),), "waymo": (("Vehicle", "Pedestrian", "Cyclist"),)}
CODE = 2, 1, 3, 2, 2                                                # offset, z, log size, sin and cos of yaw, velocity
MAX_BOXES = 500                                                     # boxes a frame [devkit]
PER_FRAME_SHOWN, SCORE_SHOWN = 4, 0.3                               # figures only [ours]


@dataclass
class Config:
    # the run
    data: str = ""                     # data set root; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # sizes; default: those of --init, else small exactly when no --data is given
    out: str = "runs/finetune"         # run folder; the same command again resumes it
    gpus: int | None = None            # processes on this machine; 0: CPU; default 1 where CUDA is, else 0
    workers: int = 4                   # loader processes for each training process [ours]
    seed: int = 0                      # of everything: labels drawn, order, augmentation, initial weights
    save_every: int = 500              # steps between checkpoints; 500, small 60 [ours]
    profile: int = 0                   # steps to time instead of training; 0: train [ours]
    eval_only: str = ""                # a run folder: predict and score it again, train nothing; --data: where its data set lies now
    export: Literal["", "openpcdet", "torchvision"] = ""  # write the network of --init to the file --out (.pth) as that project loads it, train nothing
    # what is learned from
    init: str = "none"                 # a pre-training run folder, or none
    use: tuple[str, ...] = ()          # units to load from it, such as lidar fuse; default: every unit that it holds and the modality has
    modality: Literal["fusion", "lidar", "camera"] = "fusion"  # branches of the trunk
    fraction: float = 0.05             # share of the training labels; 0.05 [paper CLAP]
    draw: Literal["frames", "scenes"] = "frames"  # what the fraction is drawn from; frames [paper CLAP]
    # optimisation
    epochs: int = 20                   # over the drawn frames; 20 [code CenterPoint, on full data, rare classes drawn more often] D1; small 0: steps decide
    steps: int = 0                     # 0: epochs decide; small 60 [ours]
    batch: int = 4                     # frames a process; 4 [code CenterPoint], small 2 [ours]
    lr: float = 1e-3                   # of new layers; AdamW, half a cosine to 0; 1e-3 [code CenterPoint] D1
    lr_pretrained: float = 1e-3        # of the weights loaded from --init; 1e-3 [ours]: the best of three on the embedded world
    warmup: int = 200                  # steps from a third of it, at most a quarter of all; 200, small 10 [ours]
    weight_decay: float = 0.01         # 0.01 [code CenterPoint]
    clip: float = 35.0                 # gradient norm [code CenterPoint]
    rotation: float = 0.3927           # rad, rotation U(-rotation, rotation) about z [code CenterPoint: its configuration of 0.1 m voxels, 0.3925]
    scale: float = 0.05                # scaling U(1 - scale, 1 + scale) [code CenterPoint]; x and y flip with probability 1/2 where the range is symmetric
    # networks
    resnet: Literal[18, 50] = 50       # image backbone, as pre-trained; small 18 [ours]
    width: int = 16                    # first sparse stage; BEV neck and heads have 16 and 4 times that; 16 [code OpenPCDet], small 8 [ours]
    bins: int = 118                    # depth bins of the lift, as pre-trained; small 36 [ours]
    # losses and targets
    w_box: float = 0.25                # of the box codes against the heat maps [code CenterPoint]
    w_velocity: float = 0.2            # of velocity within the box code [code CenterPoint]
    gaussian_overlap: float = 0.1      # IoU that a box moved by the Gaussian's radius keeps [code CenterPoint]
    min_radius: int = 2                # cells, smallest radius [code CenterPoint]


SMALL = dict(workers=0, save_every=60, epochs=0, steps=60, batch=2, warmup=10, resnet=18, width=8, bins=36)     # explained in Config


# ---- boxes <-> codes -------------------------------------------------------------------------------------------------------------

def encode(boxes, cells):
    """boxes (M, 9) -> cell (M, 2) int64 row y, column x of the centre's cell, code (M, 10), within (M,) bool: the centre lies on the map."""
    index = cells.index(boxes[:, :3])[:, 1:]                                               # (M, 2) y, x, whole at cell centres
    cell = index.round().long()
    within = ((cell >= 0) & (cell < cell.new_tensor(cells.shape[1:]))).all(1)
    code = torch.cat([index - cell, boxes[:, 2:3], boxes[:, 3:6].log(), boxes[:, 6:7].sin(), boxes[:, 6:7].cos(), boxes[:, 7:9]], 1)
    return cell, code, within


def decode(cell, code, cells):
    """The inverse: cell (M, 2), code (M, 10) -> boxes (M, 9)."""
    y, x = (cell + code[:, :2]).unbind(1)
    xyz = cells.centre(torch.stack([torch.zeros_like(y), y, x], 1))
    return torch.cat([xyz[:, :2], code[:, 2:3], code[:, 3:6].exp(), torch.atan2(code[:, 6], code[:, 7])[:, None], code[:, 8:]], 1)


def gaussian_radius(length, width, overlap):
    """Largest move of a corner, in cells, that keeps the IoU; the three cases of CornerNet with the roots that its code takes. length, width (M,) cells -> (M,)."""
    area, half_round = length * width, length + width
    both = half_round, area * (1 - overlap) / (1 + overlap)                                # x^2 - b x + c = 0
    inner = 2 * half_round, 4 * (1 - overlap) * area
    outer = -2 * overlap * half_round, 4 * overlap * (overlap - 1) * area
    return torch.stack([(b + (b * b - 4 * c).clamp_min(0).sqrt()) / 2 for b, c in (both, inner, outer)]).amin(0)


def heat_targets(cell, label, b, boxes, shape, cells, cfg):
    """Gaussians at the centres, the largest where they meet. cell (M, 2), label (M,) within the group, b (M,), shape (B, C, Y, X) -> that shape, 1 at centres."""
    length, width = boxes[:, 3] / cells.step[0], boxes[:, 4] / cells.step[1]
    r = gaussian_radius(length, width, cfg.gaussian_overlap).floor().clamp_min(cfg.min_radius)   # (M,)
    sigma = (2 * r + 1) / 6
    dy, dx = (torch.arange(n, device=cell.device) - cell[:, axis, None] for axis, n in enumerate(shape[2:]))            # (M, Y), (M, X)
    gauss = [torch.exp(-d * d / (2 * sigma[:, None] ** 2)) * (d.abs() <= r[:, None]) for d in (dy, dx)]
    gauss = gauss[0][:, :, None] * gauss[1][:, None]                                       # (M, Y, X)
    row = (b * shape[1] + label)[:, None, None].expand_as(gauss)
    return torch.zeros(shape[0] * shape[1], *shape[2:], device=cell.device).scatter_reduce_(0, row, gauss, "amax").view(shape)


# ---- the detector ----------------------------------------------------------------------------------------------------------------

def conv2d(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU(inplace=True))


class BevNeck(nn.Module):
    """1 x 1 to 16 w, two blocks of six convolutions at strides 1 and 2, both brought to the full map and joined. Source: SECOND [code OpenPCDet]."""

    def __init__(self, inputs, w):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(inputs, 16 * w, 1, bias=False), nn.BatchNorm2d(16 * w, eps=1e-3), nn.ReLU(inplace=True))
        self.fine = nn.Sequential(conv2d(16 * w, 8 * w), *(conv2d(8 * w, 8 * w) for _ in range(5)))
        self.coarse = nn.Sequential(conv2d(8 * w, 16 * w, 2), *(conv2d(16 * w, 16 * w) for _ in range(5)))
        self.up = nn.ModuleList(nn.Sequential(nn.ConvTranspose2d(c, 16 * w, s, s, bias=False), nn.BatchNorm2d(16 * w, eps=1e-3), nn.ReLU(inplace=True))
                                for c, s in ((8 * w, 1), (16 * w, 2)))

    def forward(self, x):
        """x (B, C, Y, X) -> (B, 32 w, Y, X)."""
        fine = self.fine(self.reduce(x))
        coarse = self.up[1](self.coarse(fine))[..., :x.shape[2], :x.shape[3]]               # one row too many where Y is odd
        return torch.cat([self.up[0](fine), coarse], 1)


class Head(nn.Module):
    """Heat map and box code of one group of classes: a branch of two convolutions for each quantity."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(conv2d(inputs, inputs), nn.Conv2d(inputs, n, 3, padding=1)) for n in (classes, *CODE))
        nn.init.constant_(self.branches[0][-1].bias, -2.19)                                # a probability of 0.1 at first [code CenterPoint]

    def forward(self, x):
        """x (B, C, Y, X) -> heat (B, classes, Y, X) logits, code (B, 10, Y, X)."""
        inner = [branch[0](x) for branch in self.branches]
        with torch.autocast(x.device.type, enabled=False):                                 # logits of bfloat16 tie, and of two tied neighbours both are peaks
            heat, *code = (branch[1](one.float()) for branch, one in zip(self.branches, inner))
        return heat, torch.cat(code, 1)


class Detector(nn.Module):
    """lidar, camera, fuse are the pre-trained trunk; neck, shared, heads are new."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg, w = cfg, cfg.width
        lidar, camera, self.fuse = trunk(grid, cfg.resnet, w, cfg.bins)
        self.cells = lidar.cells[-1]
        self.lidar = None if cfg.modality == "camera" else lidar
        self.camera = None if cfg.modality == "lidar" else camera
        self.neck = BevNeck(4 * w * self.cells.shape[0], w)
        self.shared = conv2d(32 * w, 4 * w)
        self.groups = [[grid.classes.index(name) for name in group] for group in GROUPS[grid.dataset]]
        self.heads = nn.ModuleList(Head(4 * w, len(group)) for group in self.groups)
        for part in (self.neck, self.shared, self.heads):
            part.to(memory_format=torch.channels_last)                                     # a quarter faster

    def predict_maps(self, batch):
        """-> [(heat (B, C, Y, X) logits, code (B, 10, Y, X))], one a group."""
        lidar = None if self.lidar is None else self.lidar(batch.points, batch.b_points)[-1].dense(batch.size)
        camera = None if self.camera is None else self.camera(batch, self.cells)[0]
        volume = self.fuse(lidar, camera)                                                  # (B, 4 w, Z, Y, X)
        with bf16_autocast(volume.device):
            bev = self.shared(self.neck(volume.flatten(1, 2)))                             # (B, 4 w, Y, X)
            return [head(bev) for head in self.heads]

    def forward(self, batch):
        """-> L (), {name: ()}. Boxes whose centre is off the map and unknown (NaN) velocities are left out of the losses."""
        cfg = self.cfg
        cell, code, within = encode(batch.boxes, self.cells)
        L_heat = L_box = 0.0                                                                                            # [code CenterPoint]
        for group, (heat, codes) in zip(self.groups, self.predict_maps(batch)):
            rows = (within & torch.isin(batch.labels, batch.labels.new_tensor(group))).nonzero()[:, 0]                  # (M,) boxes of this group
            b, at = batch.b_boxes[rows], cell[rows]
            label = (batch.labels[rows, None] == batch.labels.new_tensor(group)).float().argmax(1)
            target = heat_targets(at, label, b, batch.boxes[rows], heat.shape, self.cells, cfg)
            L_heat = L_heat + mean_over_ranks(focal(heat, target).sum(), len(rows))                                     # [code CenterPoint]
            wanted, found = code[rows], codes[b, :, at[:, 0], at[:, 1]]                                                 # (M, 10) both
            known = wanted.isfinite()
            weight = known * wanted.new_tensor([1.] * 8 + [cfg.w_velocity] * 2)
            L_box = L_box + mean_over_ranks(((found - wanted.where(known, found)).abs() * weight).sum(), len(rows))     # [code CenterPoint]
        L = L_heat + cfg.w_box * L_box                                                                                  # [code CenterPoint]
        return L, dict(L_heat=L_heat, L_box=L_box, boxes=within.float().sum())

    @torch.no_grad()
    def predict(self, batch):
        """-> [(boxes (n, 9), labels (n,) into Grid.classes, scores (n,))], one a frame, best first, n <= 500."""
        found = [[] for _ in range(batch.size)]
        for group, (heat, codes) in zip(self.groups, self.predict_maps(batch)):
            heat = heat.sigmoid()
            heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))                            # 3 x 3 peaks
            (Y, X), n = heat.shape[2:], min(MAX_BOXES, heat[0].numel())
            scores, best = heat.flatten(1).topk(n)                                         # (B, n)
            for b in range(batch.size):
                at = torch.stack([best[b] % (Y * X) // X, best[b] % X], 1)                 # (n, 2) y, x
                labels = batch.b_points.new_tensor(group)[best[b] // (Y * X)]
                found[b].append((decode(at, codes[b, :, at[:, 0], at[:, 1]].t(), self.cells), labels, scores[b]))
        frames = []
        for parts in found:
            boxes, labels, scores = map(torch.cat, zip(*parts))
            order = scores.argsort(descending=True, stable=True)[:MAX_BOXES]
            order = order[~(scores[order] <= 0)]                                           # a score that is no number stays: see check_predictions
            frames.append((boxes[order], labels[order], scores[order]))
        return frames


def focal(logits, target):
    """Gaussian focal loss, alpha 2, beta 4, of each cell. Source: CornerNet. logits, target of one shape -> that shape."""
    p, log_p, log_not = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
    return torch.where(target == 1, -(1 - p) ** 2 * log_p, -p ** 2 * (1 - target) ** 4 * log_not)


# ---- few labels ------------------------------------------------------------------------------------------------------------------

def draw_labels(dataset, indices, fraction, draw, seed):
    """A seeded share of these frames, at least one frame or scene; a smaller fraction's draw is part of a larger one's. -> sorted indices (n,)."""
    if not 0 < fraction <= 1:
        raise SystemExit(f"--fraction {fraction}: expected more than 0 and at most 1")
    rng, names = np.random.default_rng((seed, 7)), dataset.names
    scenes = [names[i].rsplit("/", 1)[0] for i in indices]
    units = np.unique(scenes) if draw == "scenes" else np.arange(len(indices))
    kept = rng.permutation(units)[:max(1, round(fraction * len(units)))]
    return np.sort(indices[np.isin(scenes, kept)] if draw == "scenes" else indices[kept])


def describe_draw(cfg):
    """Print how labels.txt, the drawn names, begins its SHA-256, and how many of them the pre-training has seen."""
    out = Path(cfg.out)
    names, digest = (out / "labels.txt").read_text().splitlines(), hashlib.sha256((out / "labels.txt").read_bytes()).hexdigest()[:16]
    seen, overlap = Path(cfg.init) / "frames.txt", ""
    if seen.is_file():
        overlap = f"; {len(set(names) & set(seen.read_text().splitlines()))} of them were in the pre-training of {cfg.init}, without their labels"
    print(f"{out}: labels of {len(names)} frames, {cfg.draw} drawn with seed {cfg.seed}, hash {digest} (labels.txt){overlap}", flush=True)


# ---- official metric -------------------------------------------------------------------------------------------------------------

def attribute(name, speed):
    """What the released code guesses from class and speed (m/s). D3"""
    if name in ("barrier", "traffic_cone"):
        return ""
    if name == "pedestrian":
        return "pedestrian.moving" if speed > 0.2 else "pedestrian.standing"
    if name in ("motorcycle", "bicycle"):
        return "cycle.with_rider" if speed > 0.2 else "cycle.without_rider"
    return "vehicle.moving" if speed > 0.2 else "vehicle.stopped" if name == "bus" else "vehicle.parked"


def nuscenes_results(frames, classes, modality="fusion"):
    """Predictions in the official format. frames {name: (boxes (n, 9), labels (n,), scores (n,), lidar2world (4, 4))} as arrays -> dict for JSON."""
    results = {}
    for name, (boxes, labels, scores, lidar2world) in frames.items():
        token = name.rsplit("/", 1)[1]
        boxes = data.warp_boxes(boxes, lidar2world)                                        # (n, 9) float64, in the world
        turn = Rotation.from_euler("z", boxes[:, 6:7]).as_quat()[:, [3, 0, 1, 2]] if len(boxes) else np.zeros((0, 4))     # w, x, y, z
        results[token] = [dict(sample_token=token, translation=box[:3].tolist(), size=box[[4, 3, 5]].tolist(), rotation=q.tolist(), velocity=box[7:9].tolist(),
                               detection_name=classes[label], detection_score=float(score), attribute_name=attribute(classes[label], float(np.hypot(*box[7:9]))))
                          for box, label, score, q in zip(boxes, labels, scores, turn)]
    return dict(meta=dict(use_camera=modality != "lidar", use_lidar=modality != "camera", use_radar=False, use_map=False, use_external=False), results=results)


@cache
def devkit(version, root):
    """The devkit's own tables, read once."""
    from nuscenes import NuScenes
    return NuScenes(version, root, verbose=False)


def nuscenes_score(dataset, path, tokens, reach=math.inf):
    """nuscenes-devkit's DetectionEval, detection_cvpr_2019, on the frames of a results file: a whole split or not. reach (m) narrows the classes' ranges.

    -> its metrics as a dict, its precision-recall data, and the classes that have ground truth after its filters.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens, load_prediction_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval
    official = devkit(dataset.version, str(dataset.root))
    scorer = DetectionEval.__new__(DetectionEval)                                          # its __init__ knows whole official splits only
    scorer.cfg, scorer.verbose, scorer.sample_tokens = config_factory("detection_cvpr_2019"), False, tokens
    scorer.cfg.class_range = {name: min(r, reach) for name, r in scorer.cfg.class_range.items()}
    predicted, scorer.meta = load_prediction_of_sample_tokens(str(path), scorer.cfg.max_boxes_per_sample, DetectionBox, tokens)
    truth = load_gt_of_sample_tokens(official, tokens, DetectionBox)
    if not any(predicted[token] for token in tokens) or not any(truth[token] for token in tokens):
        raise SystemExit(f"{path}: no predicted box, or no labelled one, in any of its {len(tokens)} frames: nothing to score")
    scorer.pred_boxes, scorer.gt_boxes = (filter_eval_boxes(official, add_center_dist(official, boxes), scorer.cfg.class_range) for boxes in (predicted, truth))
    metrics, curves = scorer.evaluate()
    present = sorted({box.detection_name for box in scorer.gt_boxes.all})
    return metrics.serialize(), curves, present


# ---- KITTI's metric --------------------------------------------------------------------------------------------------------------
# Source: the rules of the official devkit's evaluate_object, in its own camera coordinates and order of decisions.

KITTI_LEVELS = (40, 0, 0.15), (25, 1, 0.30), (25, 2, 0.50)          # easy, moderate, hard: px of height, occlusion, truncation
KITTI_IOU = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
KITTI_ALIKE = {"Car": "Van", "Pedestrian": "Person_sitting"}        # neither missed nor false


def shared_area(a, b):
    """Area that each two turned rectangles share; only those near each other are cut. a (M, 5), b (N, 5) x, y, l, w, yaw -> (M, N) m^2."""
    import shapely

    def polygons(boxes):
        cos, sin = np.cos(boxes[:, 4:]), np.sin(boxes[:, 4:])
        along, across = np.concatenate([cos, sin], 1) * boxes[:, 2:3] / 2, np.concatenate([-sin, cos], 1) * boxes[:, 3:4] / 2
        return shapely.polygons(boxes[:, None, :2] + np.stack([along + across, along - across, -along - across, across - along], 1))
    out, half_ = np.zeros((len(a), len(b))), [np.hypot(boxes[:, 2], boxes[:, 3]) / 2 for boxes in (a, b)]
    i, j = np.nonzero(np.hypot(a[:, None, 0] - b[:, 0], a[:, None, 1] - b[:, 1]) < half_[0][:, None] + half_[1])
    if len(i):
        out[i, j] = shapely.area(shapely.intersection(polygons(a)[i], polygons(b)[j]))
    return out


def kitti_iou(a, b, kind):
    """Intersection over union of label rows, kind "2d" (pictures), "bev" (ground) or "3d". a (M,), b (N,) KITTI_LABEL -> (M, N)."""
    if kind == "2d":
        low, high = np.maximum(a["bbox"][:, None, :2], b["bbox"][:, :2]), np.minimum(a["bbox"][:, None, 2:], b["bbox"][:, 2:])
        both, (one, two) = (high - low).clip(0).prod(2), (np.prod(rows["bbox"][:, 2:] - rows["bbox"][:, :2], 1) for rows in (a, b))
    else:
        ground = [np.concatenate([rows["location"][:, ::2], rows["hwl"][:, :0:-1], -rows["rotation_y"][:, None]], 1) for rows in (a, b)]   # x, z, l, w, turn
        both, (one, two) = shared_area(*ground), (rows["hwl"][:, 1] * rows["hwl"][:, 2] for rows in (a, b))
        if kind == "3d":                                            # y points down, the location is the bottom
            bottom, top = ([rows["location"][:, 1] - up * rows["hwl"][:, 0] for rows in (a, b)] for up in (0, 1))
            both = both * (np.minimum(bottom[0][:, None], bottom[1]) - np.maximum(top[0][:, None], top[1])).clip(0)
            one, two = one * a["hwl"][:, 0], two * b["hwl"][:, 0]
    return both / np.maximum(one[:, None] + two - both, 1e-12)


def kitti_match(iou, truth, found, score, least, threshold=None, stuff=None):
    """One frame. iou (M, N), truth (M,), found (N,): 0 counted, 1 ignored (neither hit nor false), -1 left out -> scores of the hits, false alarms.

    Without a threshold a truth takes its best-scored candidate, with one its best-overlapping; what is passed over is taken only if nothing else is.
    stuff (N,) bool: detections that a DontCare covers.
    """
    hits, free = [], found >= 0
    if threshold is not None:
        free &= score >= threshold
    for g in np.flatnonzero(truth >= 0):
        options = np.flatnonzero(free & (iou[g] > least))
        if len(options):
            counted = options[found[options] == 0]
            best = options[score[options].argmax()] if threshold is None else counted[iou[g, counted].argmax()] if len(counted) else options[0]
            free[best] = False
            if truth[g] == 0 and found[best] == 0:
                hits.append(score[best])
    false = free & (found == 0)
    return hits, int((false & ~stuff).sum() if stuff is not None else false.sum())


def kitti_ap(frames, name, level, kind):
    """AP over 40 and over 11 recall positions, in %. frames [(truth rows, detected rows, scores)], level 0 easy, 1 moderate, 2 hard; nan without a truth."""
    height, occlusion, truncation = KITTI_LEVELS[level]
    cases, total = [], 0
    for gt, found, score in frames:
        tall = gt["bbox"][:, 3] - gt["bbox"][:, 1]
        hard = (gt["occluded"] > occlusion) | (gt["truncated"] > truncation) | (tall <= height)
        truth = np.where((gt["type"] == name) & ~hard, 0, np.where(np.isin(gt["type"], (name, KITTI_ALIKE.get(name, name))), 1, -1))
        state = np.where(found["bbox"][:, 3] - found["bbox"][:, 1] < height, 1, np.where(found["type"] == name, 0, -1))
        stuff = None
        if kind == "2d":                                            # DontCare regions have a box in the picture only
            covers, area = gt[gt["type"] == "DontCare"]["bbox"], np.prod(found["bbox"][:, 2:] - found["bbox"][:, :2], 1)
            both = (np.minimum(found["bbox"][:, None, 2:], covers[:, 2:]) - np.maximum(found["bbox"][:, None, :2], covers[:, :2])).clip(0).prod(2)
            stuff = (both > KITTI_IOU[name] * area[:, None]).any(1)
        cases.append((kitti_iou(gt, found, kind), truth, state, score, KITTI_IOU[name], stuff))
        total += (truth == 0).sum()
    if not total:
        return math.nan, math.nan
    scores = sorted((s for *case, _ in cases for s in kitti_match(*case)[0]), reverse=True)
    thresholds, recall = [], 0.0
    for n, s in enumerate(scores, 1):                               # the scores at which recall comes nearest to 0, 1/40, 2/40, ...
        if n == len(scores) or (n + 1) / total - recall >= recall - n / total:
            thresholds.append(s)
            recall += 1 / 40
    precision = np.zeros(41)
    for n, threshold in enumerate(thresholds[:41]):
        counts = [kitti_match(*case, threshold, stuff) for *case, stuff in cases]
        hits = sum(len(h) for h, _ in counts)
        precision[n] = hits / max(hits + sum(f for _, f in counts), 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return 100 * precision[1:].mean(), 100 * precision[::4].mean()


def kitti_rows(dataset, i, boxes, labels):
    """Detections of frame i as label rows. boxes (n, 9), labels (n,) -> rows (m,), kept (m,): those that the picture shows whole before the camera."""
    lidar2rect, rect2img = dataset.calibration(i)
    rows = np.zeros(len(boxes), data.KITTI_LABEL)
    rows["type"], rows["truncated"], rows["occluded"] = np.array(dataset.grid.classes)[labels], -1, -1
    rows["hwl"], rows["box"], rows["label"] = boxes[:, 5:2:-1], boxes, labels
    rows["location"] = boxes[:, :3] @ lidar2rect[:3, :3].T + lidar2rect[:3, 3] + rows["hwl"][:, :1] / 2 * [0, 1, 0]
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(len(boxes))], 1) @ lidar2rect[:3, :3].T
    rows["rotation_y"] = np.arctan2(-heading[:, 2], heading[:, 0])
    turn = rows["rotation_y"] - np.arctan2(rows["location"][:, 0], rows["location"][:, 2])
    rows["alpha"] = np.arctan2(np.sin(turn), np.cos(turn))
    width, height = dataset.picture_size(i)
    lidar2img = rect2img @ lidar2rect
    for row in rows:
        uvd = data.box_corners(row["box"]) @ lidar2img[:3, :3].T + lidar2img[:3, 3]
        if (uvd[:, 2] > 0.1).all():
            uv = uvd[:, :2] / uvd[:, 2:]
            row["bbox"] = np.clip([*uv.min(0), *uv.max(0)], 0, [width - 1, height - 1] * 2)         # as the labels are
    kept = np.flatnonzero((rows["bbox"][:, 2:] > rows["bbox"][:, :2]).all(1))
    return rows[kept], kept


def kitti_score(dataset, frames, folder):
    """AP of all classes, kinds and levels; the detections as official result files in `folder`. frames as predict_all has them -> {kind: {class: {"R40", "R11": 3}}}."""
    number, cases = {name: i for i, name in enumerate(dataset.names)}, []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (boxes, labels, scores, _) in frames.items():
        rows, kept = kitti_rows(dataset, number[name], boxes.astype(np.float64), labels)
        cases.append((dataset.annotations(number[name]), rows, scores[kept]))
        write_text(folder / f"{name.rsplit('/', 1)[1]}.txt", "".join(
            f"{row['type']} -1 -1 {' '.join(f'{v:.4f}' for v in (row['alpha'], *row['bbox'], *row['hwl'], *row['location'], row['rotation_y']))} {score:.9g}\n"
            for row, score in zip(rows, scores[kept])))
    found = {}
    for kind in ("2d", "bev", "3d"):
        found[kind] = {}
        for name in dataset.grid.classes:
            ap = [kitti_ap(cases, name, level, kind) for level in range(3)]
            found[kind][name] = {"R40": [a for a, _ in ap], "R11": [b for _, b in ap]}
    return found


# ---- Waymo's metric --------------------------------------------------------------------------------------------------------------
# Source: the official detection_metrics.cc and metrics_utils.cc with the configuration of compute_detection_metrics_main.cc; detections in no-label zones count here.

WAYMO_IOU = {"Vehicle": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
WAYMO_CUTOFFS = (np.arange(101) / 100).astype(np.float32)                             # least scores at which detections are matched to the truth anew
WAYMO_RECALL = 0.05                                                 # the curve is sampled at least so densely


def upright_iou(a, b):
    """3-D intersection over union of upright boxes. a (M, 9), b (N, 9) as Frame.boxes -> (M, N)."""
    ground = (boxes[:, [0, 1, 3, 4, 6]] for boxes in (a, b))
    top, bottom = ([boxes[:, 2] + side * boxes[:, 5] / 2 for boxes in (a, b)] for side in (1, -1))
    both = shared_area(*ground) * (np.minimum(top[0][:, None], top[1]) - np.maximum(bottom[0][:, None], bottom[1])).clip(0)
    return both / np.maximum(a[:, 3:6].prod(1)[:, None] + b[:, 3:6].prod(1) - both, 1e-12)


def waymo_ap(frames, label, least):
    """AP and APH in % -> [at level 1, at level 2], nan without a truth. frames [(truth rows as Waymo.annotations, boxes (n, 9), labels (n,), scores (n,))].

    At each score cut-off the detections are assigned to the truths so that the sum of their overlaps is greatest (Hungarian), overlaps below `least` being none.
    Truths without a point are left out. Hard (level 2): marked so, or unmarked with 5 points or fewer. At level 1 a hard one that is missed does not count, one that is
    found does. APH weighs each hit by 1 - |turn| / pi in the precision; recall has no weight.
    """
    hits, weighted, alarms = np.zeros((3, len(WAYMO_CUTOFFS)))
    missed, total = np.zeros((2, len(WAYMO_CUTOFFS))), 0                                   # at level 1 and 2
    for rows, boxes, labels, scores in frames:
        rows = rows[(rows["label"] == label) & (rows["lidar_points"] > 0)]
        hard = (rows["difficulty"] == 2) | (rows["difficulty"] == 0) & (rows["lidar_points"] <= 5)
        counts, mine = np.stack([~hard, np.ones_like(hard)]), labels == label
        boxes, scores = boxes[mine], scores[mine]
        iou = upright_iou(boxes, rows["box"])                                                      # (n, truths)
        iou[iou < least] = 0
        accuracy = 1 - abs((boxes[:, None, 6] - rows["box"][:, 6] + np.pi) % (2 * np.pi) - np.pi) / np.pi                    # (n, truths)
        able, before = np.flatnonzero(iou.any(1)), None
        for n, cutoff in enumerate(WAYMO_CUTOFFS):
            kept = able[scores[able] >= cutoff]
            if before is None or len(kept) < before:                # else the same detections as at the last cut-off
                i, g = linear_sum_assignment(iou[kept], maximize=True)
                i, g = kept[i][iou[kept[i], g] > 0], g[iou[kept[i], g] > 0]
                before = len(kept)
            hits[n] += len(i)
            weighted[n] += accuracy[i, g].sum()
            alarms[n] += (scores >= cutoff).sum() - len(i)
            missed[:, n] += counts.sum(1) - counts[:, g].sum(1)
        total += len(rows)
    found = np.maximum(hits + alarms, 1)
    return [tuple(100 * waymo_area(hits / np.maximum(hits + lost, 1), right / found) if total else math.nan for right in (hits, weighted)) for lost in missed]


def waymo_area(recall, precision):
    """The area under the curve through these points, precision made non-increasing; where recall jumps by more than WAYMO_RECALL the higher point's precision is held."""
    best = {0.0: 1.0}
    for r, p in zip(recall, precision):
        best[r] = max(best.get(r, 0.0), p)
    curve, most = [], 0.0                                           # from the highest recall down
    for r in sorted(best, reverse=True):
        while curve and curve[-1][0] - r > WAYMO_RECALL + 1e-6:
            curve.append((curve[-1][0] - WAYMO_RECALL, most))
        most = max(most, best[r])
        curve.append((r, most))
    x, y = np.array(curve).T
    if len(y) > 1:
        y[-1] = y[-2]                                               # the precision 1 at recall 0 is nobody's
    return float((-np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def waymo_score(dataset, frames):
    """-> {class: {"L1": (AP, APH), "L2": (AP, APH)}} in %."""
    number = {name: i for i, name in enumerate(dataset.names)}
    cases = [(dataset.annotations(number[name]), boxes.astype(np.float64), labels, scores) for name, (boxes, labels, scores, _) in frames.items()]
    return {name: dict(zip(("L1", "L2"), waymo_ap(cases, label, WAYMO_IOU[name]))) for label, name in enumerate(dataset.grid.classes)}


def predict_all(model, loader, device):
    """Boxes of every frame of the split, from all processes, on rank 0 (none on the others), in the split's order.

    -> {name: (boxes (n, 9), labels (n,), scores (n,), lidar2world (4, 4))} arrays.
    """
    share_buffers(model)
    model.eval()
    mine = {}
    for batch in loader.once():
        for name, pose, found in zip(batch.names, batch.lidar2world.numpy(), model.predict(batch.to(device))):
            mine[name] = *(part.cpu().numpy() for part in found), pose
    model.train()
    parts = [mine]
    if processes() > 1:
        parts = [None] * processes() if loader.rank == 0 else None
        torch.distributed.gather_object(mine, parts)
    if loader.rank:
        return {}
    frames = {name: found for part in parts for name, found in part.items()}
    names = loader.dataset.names
    check_predictions(frames, [names[i] for i in loader.indices])
    return {names[i]: frames[names[i]] for i in loader.indices}


def check_predictions(frames, names):
    """What the metric would trip over, or not notice: a frame missing or too many, too many boxes, numbers that are not finite. frames as predict_all has them."""
    if frames.keys() != set(names):
        name = sorted(frames.keys() ^ set(names))[0]
        raise ValueError(f"{name}: {'predicted but not held out' if name in frames else 'held out but not predicted'}; expected each of {len(names)} frames once")
    for name, (boxes, _, scores, _) in frames.items():
        strange = ~np.isfinite(np.c_[boxes, scores]).all(1)
        if len(boxes) > MAX_BOXES or strange.any():
            raise FloatingPointError(f"{name}: {len(boxes)} boxes predicted, {strange.sum()} of them with numbers that are not finite; "
                                     f"expected at most {MAX_BOXES} and finite ones: the weights are broken, go back to an earlier checkpoint")


def finish(model, cfg, out, val_loader, device, rank):
    """Predict the held-out split, write detections, metrics.json and the figures into `out`, print the table and the README row."""
    frames = predict_all(model, val_loader, device)
    destroy_group()
    if rank == 0:
        of_nuscenes = partial(finish_nuscenes, modality=cfg.modality)
        told = dict(nuscenes=of_nuscenes, kitti=finish_kitti, waymo=finish_waymo)[val_loader.grid.dataset](val_loader, frames, Path(out))
        save_figures(val_loader, frames, Path(out))
        print(f"{out}: | {cfg.init} | {cfg.modality} | {cfg.fraction:g} of the {cfg.draw} | seed {cfg.seed} | {told} |")


def finish_nuscenes(val_loader, frames, out, modality):
    """results_nusc.json, metrics.json, precision_recall.png, the table -> the scores of the README row."""
    grid = val_loader.grid
    write_text(out / "results_nusc.json", json.dumps(nuscenes_results(frames, grid.classes, modality)))
    reach = min(-grid.low[0], -grid.low[1], grid.high[0], grid.high[1])                    # m; the metric measures from the ego vehicle, the range from the LiDAR
    score = partial(nuscenes_score, val_loader.dataset, out / "results_nusc.json", [name.rsplit("/", 1)[1] for name in frames])
    official, curves, present = score()
    near, _, near_present = score(reach) if reach < 50 else (official, curves, present)    # m, the widest class range
    absent = [name for name in grid.classes if name not in present]
    found = dict(mAP=official["mean_ap"], NDS=official["nd_score"], mAP_present=mean_of(official["mean_dist_aps"], present), reach=reach,
                 mAP_reach=mean_of(near["mean_dist_aps"], near_present), errors=official["tp_errors"], AP=official["mean_dist_aps"],
                 AP_reach={name: near["mean_dist_aps"][name] for name in near_present}, absent=absent, frames=len(frames))
    write_text(out / "metrics.json", to_json(found))
    if present:
        draw_curves(curves, present, out)
    print(f"{'class':22}{'AP':>8}{f'AP within {reach:g} m':>18}")
    for name in grid.classes:
        remark = "   no labelled box after the metric's filters" if name in absent else ""
        print(f"{name:22}{official['mean_dist_aps'][name]:8.4f}{found['AP_reach'].get(name, math.nan):18.4f}{remark}")
    print("  ".join(f"m{name.split('_')[0].title()} {value:.3f}" for name, value in official["tp_errors"].items()))
    if absent:
        print(f"classes without ground truth count as 0 in the official mAP; over the {len(present)} present it is {found['mAP_present']:.4f}")
    return f"mAP {found['mAP']:.4f} | NDS {found['NDS']:.4f} | mAP within {reach:g} m {found['mAP_reach']:.4f}"


def finish_kitti(val_loader, frames, out):
    """kitti/<frame>.txt, metrics.json, the table -> the scores of the README row."""
    found = kitti_score(val_loader.dataset, frames, out / "kitti")
    write_text(out / "metrics.json", to_json(found | dict(frames=len(frames))))
    print(f"{'':16}{'AP|R40':>24}   {'AP|R11':>24}\n{'':16}" + "   ".join([f"{'easy':>8}{'mod.':>8}{'hard':>8}"] * 2))
    for kind, classes in found.items():
        for name, ap in classes.items():
            print(f"{kind:4}{name:12}" + "   ".join("".join(f"{v:8.2f}" for v in ap[r]) for r in ("R40", "R11")))
    return "3D AP|R40 moderate " + ", ".join(f"{name} {ap['R40'][1]:.2f}" for name, ap in found["3d"].items())


def finish_waymo(val_loader, frames, out):
    """metrics.json, the table -> the scores of the README row."""
    found = waymo_score(val_loader.dataset, frames)
    write_text(out / "metrics.json", to_json(found | dict(frames=len(frames))))
    print(f"{'':12}{'L1 AP':>8}{'APH':>8}{'L2 AP':>8}{'APH':>8}   (our implementation, not the official server)")
    for name, levels in found.items():
        print(f"{name:12}" + "".join(f"{v:8.2f}" for level in ("L1", "L2") for v in levels[level]))
    mean = [np.nanmean([levels["L2"][n] for levels in found.values()]) for n in (0, 1)]
    return f"L2 mAP {mean[0]:.2f} | L2 mAPH {mean[1]:.2f}"


def to_json(found):
    """A table as JSON text, null where a class has no truth: JSON has no NaN."""
    return json.dumps(json.loads(json.dumps(found), parse_constant=lambda name: None), indent=1)


def mean_of(table, names):
    return sum(table[name] for name in names) / max(len(names), 1)


# ---- figures ---------------------------------------------------------------------------------------------------------------------

def birds_eye(ax, frame, shown, grid):
    """A frame from above, ahead is up: points grey, its boxes green, shown (n, 9) red, a stroke to the front of each."""
    ax.scatter(-frame.points[:, 1], frame.points[:, 0], 0.2, "0.7")
    for group, colour in ((frame.boxes, "C2"), (shown, "C3")):
        for box in group:
            x, y, _ = data.box_corners(box)[[0, 2, 6, 4, 0]].T
            ax.plot(-y, x, colour, lw=1)
            ax.plot([-box[1], -(y[2] + y[3]) / 2], [box[0], (x[2] + x[3]) / 2], colour, lw=1)
    ax.set_xlim(-grid.high[1], -grid.low[1])
    ax.set_ylim(grid.low[0], grid.high[0])
    ax.set_aspect("equal")


def save_figures(val_loader, frames, out):
    """figures/bev.png and images.png of frames spread over the held-out split."""
    grid, names = val_loader.grid, val_loader.dataset.names
    chosen = val_loader.indices[np.unique(np.linspace(0, len(val_loader.indices) - 1, PER_FRAME_SHOWN).astype(int))]
    bev, images = [], []
    for i in chosen:
        frame = val_loader.dataset.load(int(i), val_loader.image)
        boxes, labels, scores, _ = frames[names[i]]
        shown = boxes[scores > SCORE_SHOWN]

        bev.append((f"{frame.name.split('/', 1)[1][:28]}: truth green, score > {SCORE_SHOWN} red", partial(birds_eye, frame=frame, shown=shown, grid=grid)))
        image, matrix = frame.images[0].transpose(1, 2, 0), frame.lidar2img[0]

        def overlay(ax, image=image, matrix=matrix, frame=frame, shown=shown):
            ax.imshow(image)
            for group, colour in ((frame.boxes, "C2"), (shown, "C3")):
                for box in group:
                    uvd = data.box_corners(box) @ matrix[:3, :3].T + matrix[:3, 3]
                    if (uvd[:, 2] > 0.5).all():
                        for a, b in ((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7)):
                            ax.plot(*(uvd[[a, b], :2] / uvd[[a, b], 2:]).T, colour, lw=0.7)
            ax.set_xlim(0, image.shape[1])
            ax.set_ylim(image.shape[0], 0)
            ax.axis("off")
        images.append((grid.cameras[0], overlay))

    figure(out / "figures" / "bev.png", bev, 2, (5.0, 5.0))
    figure(out / "figures" / "images.png", images, 2, (6.0, 2.4))


def draw_curves(curves, present, out):
    """figures/precision_recall.png of every class present."""
    def curve(name):
        def plot(ax):
            for distance in (0.5, 1.0, 2.0, 4.0):
                found = curves[name, distance]
                ax.plot(found.recall, found.precision, label=f"{distance:g} m")
            ax.set_xlim(0, 1)
            ax.set_ylim(0, 1)
            ax.legend(fontsize=6)
        return plot
    figure(out / "figures" / "precision_recall.png", [(f"{name}: precision over recall", curve(name)) for name in present], 4, (2.6, 2.2))


# ---- training --------------------------------------------------------------------------------------------------------------------

def augment(frame, rng, rotation, scale, flip):
    """data.loader's: boxes that hold no point of the key sweep leave, the rest turns, scales and mirrors with the cloud.  D4"""
    xyz = frame.points[data.is_keyframe(frame.points), :3]
    keep = np.array([data.inside_box(xyz, box).any() for box in frame.boxes], bool)
    return data.augment_cloud(replace(frame, boxes=frame.boxes[keep], labels=frame.labels[keep]), rng, rotation, scale, flip)


def check(cfg, dataset):
    """What cannot work, before anything is written."""
    labelled = any(len(dataset.annotations(i)) for split in ("train", "val") for i in dataset.split(split)[:1000])
    for wrong, told in ((not min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
                         f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0, the other positive"),
                        (min(cfg.batch, cfg.save_every) < 1, "--batch and --save-every start at 1"),
                        (cfg.draw == "scenes" and dataset.grid.dataset == "kitti", "--draw scenes: KITTI's object frames belong to no scene; draw frames"),
                        (bool(cfg.use) and cfg.init == "none", f"--use {' '.join(cfg.use)} with --init none: there is nothing to load it from"),
                        (not labelled, f"{dataset.what}: no box is annotated here, so there is nothing to learn detection from")):
        if wrong:
            raise SystemExit(told)
    if dataset.grid.dataset == "nuscenes":                          # what the devkit will open to score, and data.py has not
        tables = Path(dataset.root, dataset.version)
        for name in ("attribute", "visibility", "log"):
            data.Table(tables, name, "")
        for file in data.Table(tables, "map", "filename")["filename"]:
            if not Path(dataset.root, file).is_file():
                raise SystemExit(f"{Path(dataset.root, file)} is missing, which nuscenes-devkit opens before it scores; extract the maps/ of the metadata archive too")


def asked_units(cfg):
    """-> the units that --use names (none: all that the run holds), all that the modality has."""
    absent = {"lidar": ("camera.resnet", "camera.neck"), "camera": ("lidar",), "fusion": ()}[cfg.modality]
    use = tuple(unit for word in cfg.use for unit in word.split(","))
    for unit in use:
        if unit not in UNITS or unit in absent:
            raise SystemExit(f"--use {unit} with --modality {cfg.modality}: expected some of {' '.join(u for u in UNITS if u not in absent)}")
    return use, [u for u in UNITS if u not in absent]


def train(rank, world, cfg):
    if cfg.eval_only:
        return rescore(rank, world, cfg)
    # data
    dataset = data.open_dataset(cfg.data, cfg.preset)
    check(cfg, dataset)
    wanted, possible = asked_units(cfg)
    drawn = draw_labels(dataset, dataset.split("train"), cfg.fraction, cfg.draw, cfg.seed)
    if not any((dataset.annotations(i)["label"] >= 0).any() for i in drawn):
        raise SystemExit(f"--fraction {cfg.fraction:g} --seed {cfg.seed}: no box of a detection class in the {len(drawn)} frames drawn; draw more, or with another seed")
    crop = dataset.grid.dataset == "kitti"                          # labels end where the picture does [code OpenPCDet]
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed, workers=cfg.workers, crop=crop, indices=drawn,
                         augment=partial(augment, rotation=cfg.rotation, scale=cfg.scale, flip=dataset.grid.mirrors))
    val_loader = data.loader(dataset, "val", cfg.batch, rank, world, cfg.seed, workers=cfg.workers, crop=crop)

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = Detector(cfg, dataset.grid)
    device = start(cfg, rank, world)
    model.to(device)
    loaded = load_units(cfg.init, model, wanted, possible, dataset.grid, rank) if cfg.init != "none" else set()
    groups = [[p for name, p in model.named_parameters() if (name in loaded) == old] for old in (False, True)]
    opt = torch.optim.AdamW([dict(params=group, base=lr) for group, lr in zip(groups, (cfg.lr, cfg.lr_pretrained))], weight_decay=cfg.weight_decay, fused=True)
    net = wrap(model, device, world)
    if cfg.profile:
        branches = {name: (branch, "forward") for name, branch in (("lidar", model.lidar), ("camera", model.camera)) if branch is not None}
        return load_tool("profiling").profile(cfg, net, loader, [opt], device, rank, cfg.fraction, **branches)

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, opt)
    record_frames(Path(cfg.out) / "labels.txt", dataset, drawn, first, rank)
    mine = np.concatenate([np.zeros(0, int), *[dataset.annotations(i)["label"] for i in drawn[rank::world]]])
    count = all_reduce(torch.tensor(np.bincount(mine + 1, minlength=len(dataset.grid.classes) + 1)[1:], device=device)).tolist()
    if rank == 0:
        describe_draw(cfg)
        print("labelled boxes: " + ", ".join(f"{name} {n}" for name, n in zip(dataset.grid.classes, count)), flush=True)
    run = Run(cfg, rank, world, first, steps, device, f"lr {cfg.lr:g} new, {cfg.lr_pretrained:g} loaded")

    # train
    for step, batch in run.batches(loader, first):
        for group in opt.param_groups:
            group["lr"] = group["base"] * cosine(step, min(cfg.warmup, steps // 4), steps)
        loss, terms = net(batch)
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        run.log(step, batch.names, loss=loss, **terms, grad_norm=norm, lr=opt.param_groups[0]["lr"])
        opt.step()
        stop = run.interrupted()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            save(cfg, step + 1, model, [opt], [*possible, "neck", "shared", "heads"], dataset.grid)
        if stop:
            run.leave(step)

    # results
    run.close()
    finish(model, cfg, cfg.out, val_loader, device, rank)
    if rank == 0:
        loss_curves(cfg.out)


def config_of(folder):
    """The Config that a run folder was made with."""
    kept = {k: v for k, v in run_config(folder).items() if k in Config.__dataclass_fields__}
    return Config(**kept | dict(use=tuple(kept["use"])))


def rescore(rank, world, cfg):
    """--eval-only RUN: the run's own configuration and weights, predicted and scored again into its folder. --data: where its data set lies now."""
    if "use" not in run_config(cfg.eval_only):
        raise SystemExit(f"--eval-only {cfg.eval_only}: a run of pre-training, which has no detector; expected a folder that finetune.py wrote")
    trained = config_of(cfg.eval_only)
    trained = replace(trained, data=cfg.data or trained.data, gpus=cfg.gpus, workers=cfg.workers, eval_only="")
    device, dataset = init_process(cfg, world), data.open_dataset(trained.data, trained.preset)
    model = Detector(trained, dataset.grid).to(device)
    step = resume(cfg.eval_only, model)
    if not step:
        raise SystemExit(f"--eval-only {cfg.eval_only}: no checkpoint there; finish a run first")
    rank0_first(rank, lambda: lock_run_folder(Path(cfg.eval_only)))
    if rank == 0:
        print(f"{cfg.eval_only}: the weights after step {step}", flush=True)
    val_loader = data.loader(dataset, "val", trained.batch, rank, world, trained.seed, workers=trained.workers, crop=dataset.grid.dataset == "kitti")
    finish(model, trained, cfg.eval_only, val_loader, device, rank)


# ---- weights for other projects --------------------------------------------------------------------------------------------------

def openpcdet_names(state):
    """VoxelResNet's tensors {name: tensor} as OpenPCDet's VoxelResBackBone8x under backbone_3d names and shapes them. Source: its spconv_backbone.py, spconv 2.

    A convolution (27, in, out), offsets z slowest, becomes (out, 3, 3, 3, in) with z, y, x in the middle; those of the residual blocks have a bias there: zeros.
    Strides, paddings, spatial shape and the batch norms' eps are the same; the norms' momentum is 0.1 here and 0.01 there, which training alone reads.
    """
    out = {}
    for name, value in state.items():
        name = "backbone_3d." + name.replace(".conv.", ".0.").replace(".bn.", ".1.")
        out[name] = value.unflatten(0, (3, 3, 3)).permute(4, 0, 1, 2, 3).contiguous() if value.dim() == 3 else value
        if name.endswith((".conv1.weight", ".conv2.weight")):
            out[name.removesuffix("weight") + "bias"] = value.new_zeros(value.shape[2])
    return out


def export(cfg):
    """--export PROJECT --init RUN --out FILE: the network in RUN/backbones.safetensors as PROJECT loads it, float32 on the CPU.

    openpcdet    {"model_state": {name: tensor}, "epoch", "it", "optimizer_state", "version"}, for its --pretrained_model. Its conv_out, which the trunk
                 here has not, stays as it was initialised there. The points must be Frame.points, the boxes in their frame: OpenPCDet's nuScenes reader leaves
                 x to the right, y ahead and intensity up to 255; its KITTI reader gives four features, for which it leaves the first convolution out;
                 the fifth of its Waymo reader is elongation. It means over at most 5 or 10 points a voxel, we over all.
    torchvision  {name: tensor} of resnet18 or resnet50 without fc; images RGB, normalised as ResNet.stages does.
    """
    unit, target = dict(openpcdet="lidar", torchvision="camera.resnet")[cfg.export], Path(cfg.out)
    if target.suffix != ".pth":
        raise SystemExit(f"--out {target}: --export writes one file; expected a name that ends in .pth")
    path, header, stored = read_units(cfg.init)
    state = {name.removeprefix(unit + "."): value for name, value in stored.items() if name.startswith(unit + ".")}
    if not state:
        raise SystemExit(f"{path} holds {header['units'].replace(',', ', ')}; --export {cfg.export} wants {unit}, which this run has not trained")
    told = f"torchvision's resnet{json.loads(header['config'])['resnet']} with fc = Identity()"
    if cfg.export == "openpcdet":
        width = state["conv_input.conv.weight"].shape[2]
        state = dict(model_state=openpcdet_names(state), epoch=0, it=int(header["step"]), optimizer_state=None, version=f"lidar-camera {header['commit']}")
        told = ("OpenPCDet's VoxelResBackBone8x, --pretrained_model. Not in it: conv_out, which starts from nothing there.\n"
                "It wants points as here: x forward, y left, z up (m), intensity 0 to 1, seconds before the key sweep. OpenPCDet's readers give others: "
                "nuScenes x right, y forward, intensity to 255; KITTI four features; Waymo elongation")
        if width != 16:
            told += f".\nThis run is {width} wide, OpenPCDet's network 16: it would leave out every tensor of another shape. Narrow it, or pre-train with --width 16"
    with atomic_write(target) as part:
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, part)
    print(f"{target}: {unit} of {cfg.init}, step {header['step']}, for {told}.", flush=True)


if __name__ == "__main__":
    cfg = parse(Config, SMALL)
    export(cfg) if cfg.export else launch(train, cfg)
