"""Few-label detection: a CenterPoint-style head on the shared camera + LiDAR trunk, from a pre-training run or from nothing, scored by the official metric.

    python finetune.py --init runs/clap                       # what the pre-training is worth with 5 % of the labels
    python finetune.py --init none --out runs/none            # the baseline: the same labels, the same steps
    python finetune.py --eval-only runs/finetune              # predict and score again

Read with: common.py §3 trunk; data.py Batch, warp_boxes. Everything pre-trained on the trunk is loaded, the fusion layer too; the head is new.
Source: CenterPoint (Yin et al., CVPR 2021, arXiv 2006.11275). [code] marks its released code and OpenPCDet's, [ours] our choice.

    fused volume (B, C, Z, Y, X) -> flatten Z -> BevNeck -> one Head a class group: heat map (B, classes, Y, X) and box code (B, 10, Y, X)
    box code: offset y, x of the centre from its cell's (cells); z (m); log l, w, h; sin, cos of yaw; velocity x, y (m/s)

Departures:
  D1  Cells are 8 voxels wide, as the trunk leaves them (0.6 m on nuScenes, as OpenPCDet's); CenterPoint's own code upsamples no further either.
  D2  No suppression after the 3 x 3 peaks; at most 500 boxes a frame, as the metric takes.
  D3  Attributes, which a detector without an attribute head must guess, follow speed and class (the released code's rule).
  D4  Boxes without a LiDAR point are not learned from, whatever the branches (OpenPCDet's and mmdetection3d's rule); the metric does not count them either.
"""
import hashlib
import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import nn

import data
from common import (Log, cosine, figure, half, launch, load_units, loss_curves, mean_over_ranks, parse, processes, resume, save, share_buffers, start, trunk, wrap,
                    write_text)

UNITS = "lidar", "camera.resnet", "camera.neck", "fuse"             # what a pre-training run may hold
GROUPS = {                                                          # classes that share a head [code CenterPoint]
    "nuscenes": (("car",), ("truck", "construction_vehicle"), ("bus", "trailer"), ("barrier",), ("motorcycle", "bicycle"), ("pedestrian", "traffic_cone")),
    "kitti": (("Car", "Pedestrian", "Cyclist"),)}
CODE = 2, 1, 3, 2, 2                                                # offset, z, log size, sin and cos of yaw, velocity
MOST = 500                                                          # boxes a frame [devkit]
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
    eval_only: str = ""                # a run folder: predict and score it again, train nothing
    # what is learned from
    init: str = "none"                 # a pre-training run folder, or none
    use: tuple[str, ...] = ()          # units to load from it; default: every unit that it holds and the modality has
    modality: Literal["fusion", "lidar", "camera"] = "fusion"  # branches of the trunk
    fraction: float = 0.05             # share of the training labels; 0.05 [paper CLAP]
    draw: Literal["frames", "scenes"] = "frames"  # what the fraction is drawn from; frames [paper CLAP]
    # optimisation
    epochs: int = 20                   # over the drawn frames; 20 [code CenterPoint], on full data; small 0: steps decide
    steps: int = 0                     # 0: epochs decide; small 60 [ours]
    batch: int = 4                     # frames a process; 4 [code CenterPoint], small 2 [ours]
    lr: float = 1e-3                   # of what starts from nothing; AdamW, half a cosine to 0; 1e-3 [code CenterPoint]
    lr_init: float = 1e-3              # of what was loaded; 1e-3 [code CenterPoint]
    warmup: int = 200                  # steps from a third of it; 200, small 10 [ours]
    weight_decay: float = 0.01         # 0.01 [code CenterPoint]
    clip: float = 35.0                 # gradient norm [code CenterPoint]
    turn: float = 0.3927               # rad, rotation U(-turn, turn) about z [code CenterPoint]
    scale: float = 0.05                # scaling U(1 - scale, 1 + scale) [code CenterPoint]; x and y flip with probability 1/2 where the range is symmetric
    # networks
    resnet: Literal[18, 50] = 50       # image backbone, as pre-trained; small 18 [ours]
    width: int = 16                    # first sparse stage; BEV neck and heads have 16 and 4 times that; 16 [code OpenPCDet], small 8 [ours]
    bins: int = 118                    # depth bins of the lift, as pre-trained; small 36 [ours]
    # losses and targets
    w_box: float = 0.25                # of the box codes against the heat maps [code CenterPoint]
    w_velocity: float = 0.2            # of velocity within the box code [code CenterPoint]
    overlap: float = 0.1               # IoU that a box moved by the Gaussian's radius keeps [code CenterPoint]
    radius: int = 2                    # cells, smallest radius [code CenterPoint]


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
    r = gaussian_radius(length, width, cfg.overlap).floor().clamp_min(cfg.radius)          # (M,)
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
        heat, *code = (branch(x) for branch in self.branches)
        return heat.float(), torch.cat(code, 1).float()


class Detector(nn.Module):
    """lidar, camera, fuse are the pre-trained trunk; neck, shared, heads are new."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg, self.grid, w = cfg, grid, cfg.width
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

    def maps(self, batch):
        """-> [(heat (B, C, Y, X) logits, code (B, 10, Y, X))], one a group."""
        lidar = None if self.lidar is None else self.lidar(batch.points, batch.b_points)[-1].dense(batch.size)
        camera = None if self.camera is None else self.camera(batch, self.cells)[0]
        volume = self.fuse(lidar, camera)                                                  # (B, 4 w, Z, Y, X)
        with half(volume.device):
            bev = self.shared(self.neck(volume.flatten(1, 2)))                             # (B, 4 w, Y, X)
            return [head(bev) for head in self.heads]

    def forward(self, batch):
        """-> L (), {name: ()}. Boxes whose centre lies off the map are not asked for; velocities that are unknown neither."""
        cfg, L, terms = self.cfg, 0.0, {}
        cell, code, within = encode(batch.boxes, self.cells)
        L_heat = L_box = 0.0                                                                                            # [code CenterPoint]
        for group, (heat, codes) in zip(self.groups, self.maps(batch)):
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
        terms = dict(L_heat=L_heat, L_box=L_box, boxes=within.float().sum())
        return L, terms

    @torch.no_grad()
    def predict(self, batch):
        """-> [(boxes (n, 9), labels (n,) into Grid.classes, scores (n,))], one a frame, best first, n <= 500."""
        found = [[] for _ in range(batch.size)]
        for group, (heat, codes) in zip(self.groups, self.maps(batch)):
            heat = heat.sigmoid()
            heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))                            # 3 x 3 peaks
            (Y, X), n = heat.shape[2:], min(MOST, heat[0].numel())
            scores, best = heat.flatten(1).topk(n)                                         # (B, n)
            for b in range(batch.size):
                at = torch.stack([best[b] % (Y * X) // X, best[b] % X], 1)                 # (n, 2) y, x
                labels = batch.b_points.new_tensor(group)[best[b] // (Y * X)]
                found[b].append((decode(at, codes[b, :, at[:, 0], at[:, 1]].t(), self.cells), labels, scores[b]))
        frames = []
        for parts in found:
            boxes, labels, scores = map(torch.cat, zip(*parts))
            order = scores.argsort(descending=True, stable=True)[:MOST]
            order = order[scores[order] > 0]
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


def describe_draw(names, cfg, out, rank):
    """Write the drawn names and their hash; print how many of them the pre-training has seen."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    if rank:
        return
    write_text(Path(out) / "labels.txt", "\n".join(names) + "\n")
    seen, overlap = Path(cfg.init) / "frames.txt", ""
    if seen.is_file():
        overlap = f"; {len(set(names) & set(seen.read_text().split()))} of them were in the pre-training of {cfg.init}, without their labels"
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


def nuscenes_results(frames, classes):
    """Predictions in the official format. frames {name: (boxes (n, 9), labels (n,), scores (n,), lidar2world (4, 4))} as arrays -> dict for JSON."""
    results = {}
    for name, (boxes, labels, scores, lidar2world) in frames.items():
        token = name.rsplit("/", 1)[1]
        boxes = data.warp_boxes(boxes, lidar2world)                                        # (n, 9) float64, in the world
        turn = Rotation.from_euler("z", boxes[:, 6:7]).as_quat()[:, [3, 0, 1, 2]] if len(boxes) else np.zeros((0, 4))     # w, x, y, z
        results[token] = [dict(sample_token=token, translation=box[:3].tolist(), size=box[[4, 3, 5]].tolist(), rotation=q.tolist(), velocity=box[7:9].tolist(),
                               detection_name=classes[label], detection_score=float(score), attribute_name=attribute(classes[label], float(np.hypot(*box[7:9]))))
                          for box, label, score, q in zip(boxes, labels, scores, turn)]
    return dict(meta=dict(use_camera=True, use_lidar=True, use_radar=False, use_map=False, use_external=False), results=results)


def nuscenes_score(dataset, path, reach=math.inf):
    """nuscenes-devkit's DetectionEval, detection_cvpr_2019, on the frames of a results file: a whole split or not. reach (m) narrows the classes' ranges.

    -> its metrics as a dict, its precision-recall data, and the classes that have ground truth after its filters.
    """
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens, load_prediction_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval
    official = NuScenes(dataset.version, str(dataset.root), verbose=False)
    tokens = list(json.loads(Path(path).read_text())["results"])
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


def predict_all(model, loader, device):
    """Boxes of every frame of the split, from all processes. -> {name: (boxes (n, 9), labels (n,), scores (n,), lidar2world (4, 4))} arrays, in the split's order."""
    share_buffers(model)
    model.eval()
    mine = {}
    for batch in loader.once():
        for name, pose, found in zip(batch.names, batch.lidar2world.numpy(), model.predict(batch.to(device))):
            mine[name] = *(part.cpu().numpy() for part in found), pose
    model.train()
    parts = [mine]
    if processes() > 1:
        parts = [None] * processes()
        torch.distributed.all_gather_object(parts, mine)
    frames = {name: found for part in parts for name, found in part.items()}
    names = loader.dataset.names
    return {names[i]: frames[names[i]] for i in loader.indices}


def finish(model, cfg, out, held_out, device, rank):
    """Predict the held-out split, write results_nusc.json, metrics.json and the figures into `out`, print the table and the README row."""
    frames = predict_all(model, held_out, device)
    if rank:
        return
    grid, out = held_out.grid, Path(out)
    write_text(out / "results_nusc.json", json.dumps(nuscenes_results(frames, grid.classes)))
    reach = min(-grid.low[0], -grid.low[1], grid.high[0], grid.high[1])                    # m, the circle inside the range
    official, curves, present = nuscenes_score(held_out.dataset, out / "results_nusc.json")
    near, _, near_present = nuscenes_score(held_out.dataset, out / "results_nusc.json", reach)
    absent = [name for name in grid.classes if name not in present]
    found = dict(mAP=official["mean_ap"], NDS=official["nd_score"], mAP_present=mean_of(official["mean_dist_aps"], present), reach=reach,
                 mAP_reach=mean_of(near["mean_dist_aps"], near_present), NDS_reach=near["nd_score"], errors=official["tp_errors"], AP=official["mean_dist_aps"],
                 AP_reach={name: near["mean_dist_aps"][name] for name in near_present}, absent=absent, frames=len(frames))
    write_text(out / "metrics.json", json.dumps(found, indent=1))
    draw(model, held_out, frames, curves, present, out, device)
    print(f"{'class':22}{'AP':>8}{f'AP within {reach:g} m':>18}")
    for name in grid.classes:
        remark = "   no labelled box after the metric's filters" if name in absent else ""
        print(f"{name:22}{official['mean_dist_aps'][name]:8.4f}{found['AP_reach'].get(name, math.nan):18.4f}{remark}")
    print("  ".join(f"m{name.split('_')[0].title()} {value:.3f}" for name, value in official["tp_errors"].items()))
    if absent:
        print(f"classes without ground truth count as 0 in the official mAP; over the {len(present)} present it is {found['mAP_present']:.4f}")
    print(f"{out}: | {cfg.init} | {cfg.modality} | {cfg.fraction:g} of the {cfg.draw} | seed {cfg.seed} | mAP {found['mAP']:.4f} | NDS {found['NDS']:.4f} | "
          f"mAP within {reach:g} m {found['mAP_reach']:.4f} |")


def mean_of(table, names):
    return sum(table[name] for name in names) / max(len(names), 1)


# ---- figures ---------------------------------------------------------------------------------------------------------------------

def draw(model, held_out, frames, curves, present, out, device):
    """figures/bev.png and images.png of frames spread over the held-out split, precision_recall.png of every class present."""
    grid, names = held_out.grid, held_out.dataset.names
    chosen = held_out.indices[np.unique(np.linspace(0, len(held_out.indices) - 1, PER_FRAME_SHOWN).astype(int))]
    bev, images = [], []
    for i in chosen:
        frame = held_out.dataset.load(int(i), held_out.image)
        boxes, labels, scores, _ = frames[names[i]]
        shown = boxes[scores > SCORE_SHOWN]

        def picture(ax, frame=frame, shown=shown):
            ax.scatter(-frame.points[:, 1], frame.points[:, 0], 0.2, "0.7")
            for group, colour in ((frame.boxes, "C2"), (shown, "C3")):
                for box in group:
                    x, y, _ = data.box_corners(box)[[0, 2, 6, 4, 0]].T
                    ax.plot(-y, x, colour, lw=1)
                    ax.plot([-box[1], -(y[2] + y[3]) / 2], [box[0], (x[2] + x[3]) / 2], colour, lw=1)              # heading
            ax.set_xlim(-grid.high[1], -grid.low[1])
            ax.set_ylim(grid.low[0], grid.high[0])
            ax.set_aspect("equal")
        bev.append((f"{frame.name.split('/')[1]}: truth green, score > {SCORE_SHOWN} red", picture))
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

    def curve(name):
        def plot(ax):
            for distance in (0.5, 1.0, 2.0, 4.0):
                found = curves[name, distance]
                ax.plot(found.recall, found.precision, label=f"{distance:g} m")
            ax.set_xlim(0, 1)
            ax.set_ylim(0, 1)
            ax.legend(fontsize=6)
        return plot
    figure(out / "figures" / "bev.png", bev, 2, (5.0, 5.0))
    figure(out / "figures" / "images.png", images, 2, (6.0, 2.4))
    figure(out / "figures" / "precision_recall.png", [(f"{name}: precision over recall", curve(name)) for name in present], 4, (2.6, 2.2))


# ---- training --------------------------------------------------------------------------------------------------------------------

def augment(frame, rng, turn, scale, flip):
    """data.loader's: boxes that hold no point of the key sweep leave, the rest turns, scales and mirrors with the cloud.  D4"""
    xyz = frame.points[frame.points[:, 4] == 0, :3]
    keep = np.array([data.inside_box(xyz, box).any() for box in frame.boxes], bool)
    return data.augment_cloud(replace(frame, boxes=frame.boxes[keep], labels=frame.labels[keep]), rng, turn, scale, flip)


def check(cfg, dataset):
    """What cannot work, before anything is written."""
    labelled = dataset.grid.dataset == "nuscenes" and len(dataset.boxes) > 0
    for wrong, told in ((bool(cfg.epochs) == bool(cfg.steps), f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0, the other decides"),
                        (min(cfg.batch, cfg.save_every) < 1, "--batch and --save-every start at 1"),
                        (dataset.grid.dataset != "nuscenes", f"{dataset.what}: finetune.py scores by the nuScenes metric only so far; give a nuScenes root"),
                        (dataset.grid.dataset == "nuscenes" and not labelled, f"{dataset.what}: no box is annotated here, so there is nothing to learn detection from")):
        if wrong:
            raise SystemExit(told)


def asked_units(cfg):
    """The units to load: --use, or all of the run's that the modality has (None: the run decides)."""
    absent = {"lidar": ("camera.resnet", "camera.neck"), "camera": ("lidar",), "fusion": ()}[cfg.modality]
    for unit in cfg.use:
        if unit not in UNITS or unit in absent:
            raise SystemExit(f"--use {unit} with --modality {cfg.modality}: expected some of {', '.join(u for u in UNITS if u not in absent)}")
    return cfg.use, [u for u in UNITS if u not in absent]


def train(rank, world, cfg):
    if cfg.eval_only:
        return rescore(rank, world, cfg)
    dataset = data.open_dataset(cfg.data, cfg.preset)
    check(cfg, dataset)
    wanted, possible = asked_units(cfg)
    drawn = draw_labels(dataset, dataset.split("train"), cfg.fraction, cfg.draw, cfg.seed)
    count = np.bincount(np.concatenate([dataset.annotations(i)["label"] for i in drawn]) + 1, minlength=len(dataset.grid.classes) + 1)[1:]
    if not count.sum():
        raise SystemExit(f"--fraction {cfg.fraction:g} --seed {cfg.seed}: no box of a detection class in the {len(drawn)} frames drawn; draw more, or with another seed")

    device = start(cfg, rank, world)
    torch.manual_seed(cfg.seed)
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed, workers=cfg.workers,
                         augment=partial(augment, turn=cfg.turn, scale=cfg.scale, flip=dataset.grid.mirrors))
    held_out = data.loader(dataset, "val", cfg.batch, rank, world, cfg.seed, workers=cfg.workers)
    loader.indices = drawn
    describe_draw([dataset.names[i] for i in drawn], cfg, cfg.out, rank)
    if rank == 0:
        print("labelled boxes: " + ", ".join(f"{name} {n}" for name, n in zip(dataset.grid.classes, count)), flush=True)
    model = Detector(cfg, dataset.grid).to(device)
    loaded = load_units(cfg.init, model, wanted, possible, dataset.grid, rank) if cfg.init != "none" else set()
    groups = [[p for name, p in model.named_parameters() if (name in loaded) == old] for old in (False, True)]
    opt = torch.optim.AdamW([dict(params=group, base=lr) for group, lr in zip(groups, (cfg.lr, cfg.lr_init))], weight_decay=cfg.weight_decay, fused=True)
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, opt)
    net = wrap(model, device, world)
    log = Log(cfg.out, rank, first, steps, cfg.batch * world, device)
    if rank == 0:
        print(f"{cfg.out}: steps {first} to {steps} of {cfg.batch * world} frames ({cfg.batch} x {world}), "
              f"lr {cfg.lr:g} new, {cfg.lr_init:g} loaded, {device}", flush=True)

    for step, batch in log.batches(loader, first):
        for group in opt.param_groups:
            group["lr"] = group["base"] * cosine(step, cfg.warmup, steps)
        loss, terms = net(batch)
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        log(step, batch.names, loss=loss, **terms, grad_norm=norm, lr=opt.param_groups[0]["lr"])
        opt.step()
        stop = log.stopping()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            save(cfg, step + 1, model, opt, ("lidar", "camera.resnet", "camera.neck", "fuse", "neck", "shared", "heads"), dataset.grid)
        if stop and step + 1 < steps:
            print(f"{cfg.out}: asked to stop, saved after step {step + 1}; the same command goes on from there", flush=True)
            sys.exit(143)

    finish(model, cfg, cfg.out, held_out, device, rank)
    if rank == 0:
        loss_curves(cfg.out)
    log.close()


def rescore(rank, world, cfg):
    """--eval-only RUN: the run's own configuration and weights, predicted and scored again into its folder."""
    path = Path(cfg.eval_only, "config.json")
    if not path.is_file():
        raise SystemExit(f"--eval-only {cfg.eval_only}: no config.json there; give a folder that finetune.py wrote")
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k in Config.__dataclass_fields__}
    run = replace(Config(**kept | dict(use=tuple(kept["use"]))), gpus=cfg.gpus, workers=cfg.workers, eval_only="")
    device = torch.device("cuda", rank) if torch.cuda.is_available() and cfg.gpus != 0 else torch.device("cpu")
    dataset = data.open_dataset(run.data, run.preset)
    model = Detector(run, dataset.grid).to(device)
    if not resume(cfg.eval_only, model):
        raise SystemExit(f"--eval-only {cfg.eval_only}: no last.pt there; finish a run first")
    finish(model, run, cfg.eval_only, data.loader(dataset, "val", run.batch, rank, world, run.seed, workers=run.workers), device, rank)


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
