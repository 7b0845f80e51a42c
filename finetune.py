"""Few-label detection: CenterPoint's head on the pre-trained trunk, with the official metrics.

    python finetune.py --init runs/clap             # after pre-training, 5 % of the labels
    python finetune.py --init none --out runs/none  # the baseline: same labels and steps
    python finetune.py --eval-only runs/finetune    # predict and score again
    python finetune.py --export openpcdet --init runs/clap --out clap.pth
                               # only write its LiDAR network for OpenPCDet

Read with: common.py §8 trunk, §9 mean_over_ranks; data.py Batch, warp_boxes.
Source: CenterPoint (Yin et al., CVPR 2021, arXiv 2006.11275).
Both losses in plain loops: tests/test_finetune.py, test_losses_match_plain_loops.
[code] marks CenterPoint's released code and OpenPCDet's, [ours] our choice.

All units of the trunk that the run of --init holds are loaded, the fusion layers too.
Neck and heads are new. The run may be of another data set: what differs is printed, and the
lift's depth bins keep their metres.

    fused volume (B, C, Z, Y, X) -> flatten Z -> BevNeck -> shared 3 x 3
    -> for each group of classes a Head: heat map (B, classes, Y, X) and box code (B, 10, Y, X)

    box code: offset y, x of the centre from its cell's (cells); z (m); log l, w, h;
    sin, cos of yaw; velocity x, y (m/s)

Departures:
  D1  Frames are drawn evenly, no boxes are pasted in, half a cosine replaces the one cycle.
  D2  3 x 3 peaks replace suppression by overlap: no least score, at most 500 boxes a frame.
  D3  Attributes follow speed and class, by the released code's rule.
  D4  Boxes without a LiDAR point are not learned from.
  D5  Loss weights, learning rate and rotation are those for nuScenes on every data set.
"""
import io
import json
import math
import os
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.spatial.transform import Rotation
from torch import nn

import data
from common import (
    constant,  # geometry
    BatchNorm, CameraNet, trunk, lift_depth, bf16_autocast,  # networks
    all_reduce, mean_over_ranks, processes,  # processes
    parse, require, check_numbers, launch, init_process, start, wrap, resume, save,  # runs: skip
    cosine, to_json, rank0_first, lock_run_folder, run_config, stored_config, check_run,
    read_units, load_units, load_resnet, first_line, labelled_frames, describe_draw, labels_text,
    describe_scored, destroy_group, Run, figure, bird_eye, loss_curves, load_tool, write_text,
    atomic_write,
)

UNITS = "lidar", "camera.resnet", "camera.neck", "fuse"  # what pre-training may have written
CODE = 2, 1, 3, 2, 2         # channels: offset, z, log size, sin and cos of yaw, velocity
MAX_BOXES = 500              # boxes a frame [devkit]
TRIAL_FRAMES = 3             # val frames whose truth is scored before the first step [ours]
FIGURE_FRAMES = 4            # frames in the figures [ours]
FIGURE_SCORE = 0.3           # least score of a box in the figures [ours]
GROUPS = {                   # classes that share a head [code CenterPoint]
    "nuscenes": (("car",), ("truck", "construction_vehicle"), ("bus", "trailer"),
                 ("barrier",), ("motorcycle", "bicycle"), ("pedestrian", "traffic_cone")),
    "kitti": (("Car", "Pedestrian", "Cyclist"),),
    "waymo": (("Vehicle", "Pedestrian", "Cyclist"),),
}


@dataclass
class Config:
    # the run
    data: str = ""             # root of the data set; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # default: as --init; else small without --data
    out: str = "runs/finetune"  # run folder; the same command again resumes it
    gpus: int | None = None    # processes on this machine; 0: CPU; default 1 with CUDA, else 0
    workers: int = 4           # loader processes for each rank [ours]
    seed: int = 0              # of drawn labels, order, augmentation, initial weights
    save_every: int = 500      # steps between checkpoints [ours]
    profile: int = 0           # steps to time instead of training; 0: train [ours]
    eval_only: str = ""        # run folder to only score again; --data: its data's new root
    export: Literal["", "openpcdet", "torchvision"] = ""  # only write --init's network to --out

    # what is learned from
    init: str = "none"         # run folder of a pre-training, or none
    use: tuple[str, ...] = ()  # units to load, such as lidar fuse; default: all it holds
    image_init: str = ""       # ResNet weights with torchvision's names, a file or a run
    freeze: bool = False       # train neither what is loaded nor its batch-norm statistics
    modality: Literal["fusion", "lidar", "camera"] = "fusion"  # branches of the trunk
    fraction: float = 0.05     # share of the training labels [paper CLAP]
    draw: Literal["frames", "scenes", "every"] = "frames"  # [paper CLAP]; every k-th [code SLidR]
    labels: str = ""           # file with the names of the frames to learn from, instead

    # optimisation; CenterPoint's epochs are over all data
    epochs: int = 20           # over the drawn frames; 0: steps decide [code CenterPoint] D1
    steps: int = 0             # 0: epochs decide [ours]
    batch: int = 4             # frames for each rank [code CenterPoint]
    accumulate: int = 1        # batches of a step, one after the other [ours]
    lr: float = 1e-3           # of new layers; half a cosine to 0 [code CenterPoint] D1 D5
    lr_pretrained: float = 1e-3  # of loaded weights; best of three, embedded world [ours]
    warmup: int = 200          # steps from a third of lr, at most a quarter of all [ours]
    weight_decay: float = 0.01  # of AdamW [code CenterPoint]
    clip: float = 35.0         # gradient norm [code CenterPoint]

    # augmentation; x and y also flip with probability 1/2 where the range is symmetric
    rotation: float = 0.3927   # rad about z, +-; 0.3925 at 0.1 m voxels [code CenterPoint] D5
    scale: float = 0.05        # size U(1 - scale, 1 + scale) [code CenterPoint]

    # networks
    resnet: Literal[18, 50] = 50  # image backbone, as in the pre-training
    width: int = 16            # w, first sparse stage; neck 16 w, heads 4 w [code OpenPCDet]
    bins: int = 118            # depth bins of the lift, as pre-trained [code BEVFusion]
    max_depth: float = 0.0     # m, end of the depth bins; 0: as pre-trained, or by range [ours]

    # losses and targets
    # D5: CenterPoint's Waymo configuration has a box loss of weight 2, a learning rate three
    # times as high, twice the rotation and no velocity
    w_box: float = 0.25        # of box codes against heat maps [code CenterPoint] D5
    w_velocity: float = 0.2    # of velocity within the box code [code CenterPoint]
    gaussian_overlap: float = 0.1  # IoU that a move by the radius keeps [code CenterPoint]
    min_radius: int = 2        # cells, smallest radius of a Gaussian [code CenterPoint]


# --preset small: minutes on two CPU cores; all [ours]
SMALL = dict(
    workers=0, save_every=60,
    epochs=0, steps=60, batch=2, warmup=10,
    resnet=18, width=8, bins=36,  # as in the methods' small presets, whose weights must fit
)


def check_flags(cfg):
    """Refuse flags that cannot work, before the data set is opened."""
    check_numbers(
        cfg, "batch accumulate save_every fraction lr clip width bins",
        dict(workers=256, fraction=1, width=512, bins=10_000, min_radius=10_000))
    require(min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
            f"--epochs {cfg.epochs} and --steps {cfg.steps}: "
            "one of them must be 0, the other positive")
    require(max(cfg.scale, cfg.gaussian_overlap) < 1,
            f"--scale {cfg.scale} and --gaussian-overlap {cfg.gaussian_overlap}: "
            "expected numbers below 1")
    require(cfg.max_depth == 0 or cfg.max_depth > CameraNet.near,
            f"--max-depth {cfg.max_depth:g}: expected more than {CameraNet.near:g} m, "
            "where the depth bins begin")
    asked, possible = asked_units(cfg)
    require(not cfg.freeze or cfg.init != "none" or cfg.image_init,
            "--freeze with --init none: random weights would stay random; name a pre-training run "
            "with --init, or weights of the image network with --image-init")
    # refused before the embedded world is written
    stored = ()
    if cfg.init != "none":
        _, header, _ = read_units(cfg.init)
        stored = header["units"].split(",")
    if cfg.image_init:
        require("camera.resnet" in possible,
                f"--image-init {cfg.image_init} with --modality {cfg.modality}: "
                "there is no image network; leave one of them out")
        require("camera.resnet" not in (asked or stored),
                f"--image-init {cfg.image_init}: --init {cfg.init} brings an image network too; "
                "leave one of them out, or name the other units with --use")
        require(os.path.exists(cfg.image_init),
                f"--image-init {cfg.image_init}: no such file or folder")


def check(cfg, dataset):
    """End with a message if this cannot work, before anything is written."""
    require(cfg.draw == "frames" or dataset.grid.dataset != "kitti",
            "--draw scenes: KITTI's object frames belong to no scene; draw frames")
    require(not cfg.use or cfg.init != "none",
            f"--use {' '.join(cfg.use)} with --init none: there is nothing to load it "
            "from; name a pre-training run with --init")
    frames = [i for split in ("train", "val") for i in dataset.split(split)[:1000]]
    require(any(len(dataset.annotations(i)) for i in frames),
            f"{dataset.what}: no box is annotated here, "
            "so there is nothing to learn detection from")


def try_score(val_loader, modality):
    """End with a message unless the truth of some val frames can be scored. Rank 0 only.

    It is scored as predictions are at the end of the run, with all that is read for that.
    """
    dataset = val_loader.dataset
    began = time.monotonic()
    indices = data.labelled_val_frames(dataset, TRIAL_FRAMES)
    if dataset.grid.dataset == "nuscenes":
        faults = dataset.lacking_for_scoring()
        more = f" (and {len(faults) - 1} more faults: see python data.py)" * (len(faults) > 1)
        require(not faults, "".join(faults[:1]) + more)
    frames = {}
    for i in indices:
        frame, _ = val_loader[0, i, False]
        scores = np.linspace(0.9, 0.5, len(frame.boxes))
        boxes = np.nan_to_num(frame.boxes)
        frames[frame.name] = boxes, frame.labels, scores, frame.lidar2world
    try:
        if dataset.grid.dataset == "nuscenes":
            tokens = [dataset.frames["token"][i].decode() for i in val_loader.indices]
            devkit(dataset, tokens)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            score_frames(val_loader, frames, Path(folder), modality)
    except Exception as error:
        raise SystemExit(f"{dataset.what}: the labelled boxes of {', '.join(frames)} cannot be "
                         f"scored ({reason(error)}), so neither could a run at its end; mend "
                         "what this names, or leave those frames out") from error
    seconds = time.monotonic() - began
    if seconds > 5:
        print(f"{dataset.what}: the metric works on the labels of {len(frames)} val frames "
              f"({seconds:.0f} s; done once, before the first step)", flush=True)


def asked_units(cfg):
    """-> units that --use names, () for all that the run holds; units of the modality."""
    absent = dict(fusion=(), lidar=("camera.resnet", "camera.neck"), camera=("lidar",))
    possible = [unit for unit in UNITS if unit not in absent[cfg.modality]]
    use = tuple(unit for word in cfg.use for unit in word.split(","))
    for unit in use:
        require(unit in possible,
                f"--use {unit} with --modality {cfg.modality}: "
                f"expected some of {' '.join(possible)}")
    return use, possible


# ---- boxes <-> codes -----------------------------------------------------------------

def encode(boxes, cells):
    """What a head learns of each box, and in which cell.

    boxes (M, 9) -> cell (M, 2) int64, row y and column x of the centre's cell;
    code (M, 10); within (M,) bool: the centre lies on the map.
    """
    index = cells.index(boxes[:, :3])[:, 1:]  # (M, 2) y, x, whole at cell centres
    cell = index.round().long()
    size = constant(cells.shape[1:], cell.device, torch.int64)
    within = ((cell >= 0) & (cell < size)).all(1)
    z = boxes[:, 2:3]
    log_size = boxes[:, 3:6].log()
    yaw = boxes[:, 6:7]
    velocity = boxes[:, 7:9]
    code = torch.cat([index - cell, z, log_size, yaw.sin(), yaw.cos(), velocity], 1)
    return cell, code, within


def decode(cell, code, cells):
    """The inverse: cell (..., 2), code (..., 10) -> boxes (..., 9)."""
    offset, z, log_size, sin_cos, velocity = code.split(CODE, -1)
    y, x = (cell + offset).unbind(-1)
    centre = cells.centre(torch.stack([torch.zeros_like(y), y, x], -1))
    yaw = torch.atan2(sin_cos[..., :1], sin_cos[..., 1:])
    return torch.cat([centre[..., :2], z, log_size.exp(), yaw, velocity], -1)


def gaussian_radius(length, width, overlap):
    """Largest move of a corner that keeps this IoU. length, width (M,) cells -> (M,).

    CornerNet's three cases, each x^2 - b x + c = 0, with the roots that its code takes.
    """
    area = length * width
    half_round = length + width
    moved = half_round, area * (1 - overlap) / (1 + overlap)
    smaller = 2 * half_round, 4 * (1 - overlap) * area
    larger = -2 * overlap * half_round, 4 * overlap * (overlap - 1) * area
    radii = []
    for b, c in (moved, smaller, larger):
        radii.append((b + (b * b - 4 * c).clamp_min(0).sqrt()) / 2)
    return torch.stack(radii).amin(0)


def gaussian(d, r):
    """6 sigma = 2 r + 1, and 0 beyond r. d (M, n), r (M, 1) cells -> (M, n)."""
    sigma = (2 * r + 1) / 6
    return torch.exp(-d * d / (2 * sigma ** 2)) * (d.abs() <= r)


def heat_targets(cell, within, label, b, boxes, shape, cells, cfg):
    """A Gaussian at each centre that lies on the map, the largest where they meet.

    cell (M, 2), within (M,) bool, label (M,), b (M,), boxes (M, 9), shape (B, C, Y, X)
    -> (B, C, Y, X), 1 at centres.
    """
    B, C, Y, X = shape
    length = boxes[:, 3] / cells.step[0]
    width = boxes[:, 4] / cells.step[1]
    r = gaussian_radius(length, width, cfg.gaussian_overlap)
    r = r.floor().clamp_min(cfg.min_radius)[:, None]  # (M, 1)
    dy = torch.arange(Y, device=cell.device) - cell[:, :1]  # (M, Y)
    dx = torch.arange(X, device=cell.device) - cell[:, 1:]  # (M, X)
    column = gaussian(dy, r) * within[:, None]
    gauss = column[:, :, None] * gaussian(dx, r)[:, None]  # (M, Y, X)
    plane = (b * C + label)[:, None, None].expand_as(gauss)
    heat = torch.zeros(B * C, Y, X, device=cell.device)
    return heat.scatter_reduce_(0, plane, gauss, "amax").view(shape)


# ---- the detector --------------------------------------------------------------------

def with_norm(conv):
    """The convolution, then batch norm and ReLU."""
    norm = BatchNorm(conv.out_channels, eps=1e-3)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


def conv2d(inputs, outputs, stride=1):
    return with_norm(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))


class BevNeck(nn.Module):
    """Two blocks of six convolutions, at strides 1 and 2, joined at stride 1.

    Source: SECOND [code OpenPCDet].
    """

    def __init__(self, inputs, w):
        super().__init__()
        self.reduce = with_norm(nn.Conv2d(inputs, 16 * w, 1, bias=False))
        self.fine = nn.Sequential(
            conv2d(16 * w, 8 * w), *(conv2d(8 * w, 8 * w) for _ in range(5)))
        self.coarse = nn.Sequential(
            conv2d(8 * w, 16 * w, 2), *(conv2d(16 * w, 16 * w) for _ in range(5)))
        self.up = nn.ModuleList([
            with_norm(nn.ConvTranspose2d(8 * w, 16 * w, 1, 1, bias=False)),
            with_norm(nn.ConvTranspose2d(16 * w, 16 * w, 2, 2, bias=False)),
        ])

    def forward(self, x):
        """x (B, C, Y, X) -> (B, 32 w, Y, X)."""
        Y, X = x.shape[2:]
        fine = self.fine(self.reduce(x))  # (B, 8 w, Y, X)
        coarse = self.coarse(fine)  # (B, 16 w, Y / 2, X / 2), rounded up
        return torch.cat([self.up[0](fine), self.up[1](coarse)[..., :Y, :X]], 1)


def branch(inputs, outputs):
    return nn.Sequential(conv2d(inputs, inputs), nn.Conv2d(inputs, outputs, 3, padding=1))


class Head(nn.Module):
    """Heat map and box code of one group of classes: a branch for each quantity."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.branches = nn.ModuleList(branch(inputs, n) for n in (classes, *CODE))
        # a probability of 0.1 at first [code CenterPoint]
        nn.init.constant_(self.branches[0][-1].bias, -2.19)

    def forward(self, x):
        """x (B, C, Y, X) -> heat (B, classes, Y, X) logits, code (B, 10, Y, X)."""
        features = [branch[0](x) for branch in self.branches]
        # float32: logits in bfloat16 tie, and two tied neighbours would both be peaks
        with torch.autocast(x.device.type, enabled=False):
            maps = [branch[1](f.float()) for branch, f in zip(self.branches, features)]
        return maps[0], torch.cat(maps[1:], 1)


def focal(logits, target):
    """Gaussian focal loss of each cell, alpha 2, beta 4. Source: CornerNet.

    logits, target of one shape -> that shape.
    """
    p = logits.sigmoid()
    at_centre = -(1 - p) ** 2 * F.logsigmoid(logits)
    elsewhere = -p ** 2 * (1 - target) ** 4 * F.logsigmoid(-logits)
    return torch.where(target == 1, at_centre, elsewhere)


class Detector(nn.Module):
    """lidar, camera, fuse are the pre-trained trunk; neck, shared, heads are new."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg = cfg
        w = cfg.width
        lidar, camera, self.fuse = trunk(grid, cfg.resnet, w, cfg.bins, cfg.max_depth)
        self.cells = lidar.cells[-1]
        self.lidar = None if cfg.modality == "camera" else lidar
        self.camera = None if cfg.modality == "lidar" else camera
        self.neck = BevNeck(4 * w * self.cells.shape[0], w)
        self.shared = conv2d(32 * w, 4 * w)
        groups = GROUPS[grid.dataset]
        self.classes = len(grid.classes)
        self.groups = [tuple(grid.classes.index(name) for name in group) for group in groups]
        self.heads = nn.ModuleList(Head(4 * w, len(group)) for group in groups)
        for part in (self.neck, self.shared, self.heads):
            part.to(memory_format=torch.channels_last)  # a quarter faster
        self.frozen = ()

    def freeze(self, units):
        """Train these units no more: no gradients, and their batch norms as in prediction."""
        self.frozen = units
        for unit in units:
            self.get_submodule(unit).requires_grad_(False)
        self.train()

    def train(self, mode=True):
        """Also of a frozen unit, batch norms in train mode would adapt to the labelled frames."""
        super().train(mode)
        for unit in self.frozen:
            self.get_submodule(unit).eval()
        return self

    def predict_maps(self, batch):
        """-> [(heat (B, C, Y, X) logits, code (B, 10, Y, X))], one for each group."""
        lidar = camera = None  # (B, C, Z, Y, X) each
        if self.lidar is not None:
            lidar = self.lidar(batch.points, batch.b_points, batch.size)[-1].dense()
        if self.camera is not None:
            camera = self.camera(batch, self.cells)[0]
        volume = self.fuse(lidar, camera)  # (B, 4 w, Z, Y, X)
        with bf16_autocast(volume.device):
            bev = self.shared(self.neck(volume.flatten(1, 2)))  # (B, 4 w, Y, X)
            return [head(bev) for head in self.heads]

    def box_errors(self, predicted, target, own):
        """Weighted L1; 0 where the target is unknown: velocities may be NaN.

        predicted, target (M, 10), own (M,) bool, elsewhere it is 0 too -> (M, 10).
        """
        target = target.where(target.isfinite() & own[:, None], predicted)
        weight = constant((1.0,) * 8 + (self.cfg.w_velocity,) * 2, target.device)
        return (predicted - target).abs() * weight

    def forward(self, batch):
        """-> L (), {name: ()}. Boxes whose centre is off the map are left out."""
        cfg = self.cfg

        # 1 the cell and the code of each labelled box, a Gaussian around it
        cell, code, within = encode(batch.boxes, self.cells)  # (M, 2), (M, 10), (M,)
        shape = batch.size, self.classes, *self.cells.shape[1:]
        targets = heat_targets(  # (B, classes, Y, X)
            cell, within, batch.labels, batch.b_boxes, batch.boxes, shape, self.cells, cfg)

        # 2 heat maps and codes, then for each group of classes its boxes
        L_heat = L_box = 0.0  # [code CenterPoint]
        y, x = cell.where(within[:, None], 0).unbind(1)
        for group, (heat, codes) in zip(self.groups, self.predict_maps(batch)):
            group = constant(group, heat.device, torch.int64)
            # rows of other groups get the weight 0: to pick a group's would wait for the GPU
            own = within & (batch.labels[:, None] == group).any(1)  # (M,)
            count = own.sum()

            # 3 the heat map against Gaussians, every cell
            loss = focal(heat, targets.index_select(1, group)).sum()
            L_heat = L_heat + mean_over_ranks(loss, count)  # [code CenterPoint]

            # 4 the code, at the centres only
            errors = self.box_errors(codes[batch.b_boxes, :, y, x], code, own)  # (M, 10)
            L_box = L_box + mean_over_ranks(errors.sum(), count)  # [code CenterPoint]

        L = L_heat + cfg.w_box * L_box  # [code CenterPoint]
        return L, dict(L_heat=L_heat, L_box=L_box, boxes=within.float().sum())

    @torch.no_grad()
    def predict(self, batch):
        """-> [(boxes (n, 9), labels (n,), scores (n,))], one for each frame, on the CPU.

        Best first, n <= 500; labels are indices into Grid.classes.
        """
        candidates = []
        frame = torch.arange(batch.size, device=batch.points.device)[:, None]

        # 1 heat maps and codes of each group of classes
        for group, (heat, codes) in zip(self.groups, self.predict_maps(batch)):
            # 2 the best peaks of the heat map
            scores, cell, labels = best_peaks(heat, group)  # (B, n), (B, n, 2), (B, n)

            # 3 the boxes that the codes describe there
            y, x = cell.unbind(2)
            boxes = decode(cell, codes[frame, :, y, x], self.cells)  # (B, n, 9)
            candidates.append(torch.cat([boxes, labels[..., None], scores[..., None]], 2))

        # 4 the best of all groups
        return best_boxes(torch.cat(candidates, 1))


def best_peaks(heat, group):
    """The cells that no neighbour in 3 x 3 exceeds, best first.

    heat (B, C, Y, X) logits, group: C labels
    -> scores (B, n), cell (B, n, 2) y, x, labels (B, n).
    """
    # D2: the released code suppresses by overlap and drops scores below 0.1;
    # the metric takes at most 500 boxes a frame
    heat = heat.sigmoid()
    heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
    Y, X = heat.shape[2:]
    scores, best = heat.flatten(1).topk(min(MAX_BOXES, heat[0].numel()))
    cell = torch.stack([best % (Y * X) // X, best % X], 2)
    labels = constant(group, heat.device, torch.int64)[best // (Y * X)]
    return scores, cell, labels


def best_boxes(candidates):
    """The best of all groups' boxes in each frame. The GPU is waited for once.

    candidates (B, n, 11): a box, its label, its score
    -> [(boxes (n, 9), labels (n,), scores (n,))], one for each frame, on the CPU.
    """
    order = candidates[:, :, 10].argsort(dim=1, descending=True, stable=True)[:, :MAX_BOXES]
    best = []
    for rows in candidates.take_along_dim(order[:, :, None], 1).cpu():
        # the score is 0 where there is no peak; NaN stays, for check_predictions
        rows = rows[~(rows[:, 10] <= 0)]
        best.append((rows[:, :9], rows[:, 9].long(), rows[:, 10]))
    return best


# ---- few labels ----------------------------------------------------------------------

def count_boxes(dataset, indices, device):
    """Labelled boxes of each class, over all ranks. indices: this rank's frames."""
    counts = np.zeros(len(dataset.grid.classes), int)
    for i in indices:
        labels = dataset.annotations(i)["label"]
        counts += np.bincount(labels[labels >= 0], minlength=len(counts))
    return all_reduce(torch.tensor(counts, device=device)).tolist()


# ---- training ------------------------------------------------------------------------

def augment(frame, rng, rotation, scale, flip):
    """The augment of data.loader: turns, scales and mirrors cloud and boxes.

    Boxes that hold no point of the keyframe sweep are left out.  D4
    """
    # D4: OpenPCDet's and mmdetection3d's rule, whatever the branches. Of these boxes,
    # nuScenes' metric counts those that hold a radar point, KITTI's all, Waymo's none
    # as columns: a third of the time of rows
    xyz = np.asfortranarray(frame.points[data.is_keyframe(frame.points), :3])
    holds_point = [data.inside_box(xyz, box).any() for box in frame.boxes]
    rows = np.array(holds_point, bool)
    frame = replace(frame, boxes=frame.boxes[rows], labels=frame.labels[rows])
    return data.augment_cloud(frame, rng, rotation, scale, flip)


def train(rank, world, cfg):
    check_flags(cfg)
    if cfg.eval_only:
        return rescore(rank, world, cfg)

    # data
    dataset = data.open_dataset(cfg.data, cfg.preset, images=cfg.modality != "lidar")
    data.announce(dataset, cfg.batch)
    check(cfg, dataset)
    # D1: CenterPoint draws frames with rare classes more often and pastes in boxes of other
    # frames (ground-truth sampling)
    split = dataset.split("train")
    drawn = labelled_frames(cfg, dataset, split)
    asked = f"--fraction {cfg.fraction:g} --seed {cfg.seed}"
    if cfg.labels:
        asked = f"--labels {cfg.labels}"
    require(any(data.has_box(dataset, i) for i in drawn),
            f"{asked}: no 3-D box of a detection class in the {len(drawn)} frames drawn; "
            "draw more, or others")
    crop = dataset.grid.dataset == "kitti"  # labels end where its image does [code OpenPCDet]
    warp = partial(augment, rotation=cfg.rotation, scale=cfg.scale,
                   flip=dataset.grid.mirrors)
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed,
                         workers=cfg.workers, crop=crop, indices=drawn, augment=warp,
                         accumulate=cfg.accumulate)
    val_loader = data.loader(dataset, "val", cfg.batch, rank, world, cfg.seed,
                             workers=cfg.workers, crop=crop)
    if rank == 0 and not cfg.profile:
        try_score(val_loader, cfg.modality)

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = Detector(cfg, dataset.grid)
    asked, possible = asked_units(cfg)
    loaded = set()
    if cfg.init != "none":
        loaded = load_units(cfg.init, model, asked, possible, dataset.grid, rank)
        cfg = replace(cfg, max_depth=recorded_depth(cfg, model, dataset.grid))
    if cfg.image_init:
        load_resnet(cfg.image_init, model.camera.resnet, rank)
        loaded |= {f"camera.resnet.{name}" for name in model.camera.resnet.state_dict()}
    if cfg.freeze:
        model.freeze([unit for unit in UNITS if any(name.startswith(unit + ".")
                                                    for name in loaded)])
    device = start(cfg, rank, world, dataset, drawn, "labels.txt")
    model.to(device)
    new = [p for name, p in model.named_parameters() if name not in loaded]
    old = [p for name, p in model.named_parameters() if name in loaded and p.requires_grad]
    groups = [dict(params=new, base=cfg.lr), dict(params=old, base=cfg.lr_pretrained)]
    # D1: in CenterPoint the betas follow one cycle too; here they stay 0.9 and 0.999
    opt = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=True)
    net = wrap(model, device, world)
    if cfg.profile:
        names = ("lidar", "camera") if cfg.modality == "fusion" else (cfg.modality,)
        timed = {name: (getattr(model, name), "forward") for name in names}
        return load_tool("profiling", "--profile").profile(
            cfg, net, loader, [opt], device, rank, cfg.fraction, **timed)

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, opt)  # 0 when there is nothing to resume
    counts = count_boxes(dataset, drawn[rank::world], device)
    if rank == 0:
        describe_draw(cfg, "labelled boxes", dict(zip(dataset.grid.classes, counts)))
    about = f"lr {cfg.lr:g} new, {cfg.lr_pretrained:g} loaded"
    if cfg.freeze:
        about = f"lr {cfg.lr:g}, frozen {', '.join(model.frozen)}"
    run = Run(cfg, rank, world, first, steps, device, about)

    # train
    for step, batches in run.batches(loader, first):
        rate = cosine(step, min(cfg.warmup, steps // 4), steps)
        for group in opt.param_groups:
            group["lr"] = group["base"] * rate
        opt.zero_grad()
        terms = []
        for batch in batches:  # one, without --accumulate
            loss, more = net(batch)
            (loss / cfg.accumulate).backward()
            terms.append(dict(loss=loss, **more))
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        lr = cfg.lr * rate
        # raises if a term is not finite, before the update
        run.log(step, batches, terms, grad_norm=norm, lr=lr)
        opt.step()
        stop = run.interrupted()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            units = [*possible, "neck", "shared", "heads"]
            save(cfg, step + 1, model, [opt], units, dataset.grid)
        if stop:
            run.leave(step)

    # results
    run.close()
    finish(model, cfg, cfg.out, val_loader, device, rank)
    if rank == 0:
        loss_curves(cfg.out)


def recorded_depth(cfg, model, grid):
    """The max_depth that config.json states, so that --eval-only needs no --init: 0 by the range.

    model: with the units of --init. A --max-depth that is not theirs is refused.
    """
    if cfg.modality == "lidar":
        return cfg.max_depth
    end = model.camera.max_depth
    require(cfg.max_depth in (0, end),
            f"--max-depth {cfg.max_depth:g}: the depth bins of --init {cfg.init} end at {end:g} m, "
            "and stay there; leave the flag out")
    return 0.0 if end == lift_depth(grid.low, grid.high) else end


def rescore(rank, world, cfg):
    """--eval-only RUN: predict and score again, with its own configuration and weights.

    The results go into its folder. --data: where its data set is now.
    """
    require("use" in run_config(cfg.eval_only),
            f"--eval-only {cfg.eval_only}: a run of pre-training, which has no detector; "
            "expected a folder that finetune.py wrote")
    trained = stored_config(Config, cfg.eval_only)
    trained = replace(trained, data=cfg.data or trained.data, gpus=cfg.gpus,
                      workers=cfg.workers, eval_only="")
    dataset = data.open_dataset(trained.data, trained.preset,
                                images=trained.modality != "lidar")
    data.announce(dataset, trained.batch)
    crop = dataset.grid.dataset == "kitti"
    val_loader = data.loader(dataset, "val", trained.batch, rank, world, trained.seed,
                             workers=trained.workers, crop=crop)
    if rank == 0:
        try_score(val_loader, trained.modality)
    device = init_process(cfg, world)
    rank0_first(rank, lambda: lock_run_folder(Path(cfg.eval_only)))
    model = Detector(trained, dataset.grid).to(device)
    sizes = "preset", "modality", "resnet", "width", "bins", "max_depth"
    rank0_first(rank, lambda: check_run(cfg.eval_only, trained, dataset, model, sizes))
    step = resume(cfg.eval_only, model)
    if rank == 0:
        describe_scored(cfg.eval_only, step, dataset)
    finish(model, trained, cfg.eval_only, val_loader, device, rank)


# ---- prediction ----------------------------------------------------------------------

def predict_all(model, loader, device):
    """Boxes of every frame of the split, from all ranks, on rank 0; none on the others.

    -> {name: (boxes (n, 9), labels (n,), scores (n,), lidar2world (4, 4))}, arrays, in the
    order of the split.
    """
    model.eval()
    predicted = {}
    for batch in loader.once():
        poses = batch.lidar2world.numpy()
        boxes = model.predict(batch.to(device))
        for name, pose, parts in zip(batch.names, poses, boxes):
            predicted[name] = *(part.numpy() for part in parts), pose
    model.train()
    shares = [predicted]
    if processes() > 1:
        shares = [None] * processes() if loader.rank == 0 else None
        torch.distributed.gather_object(predicted, shares)
    if loader.rank:
        return {}
    frames = {name: parts for share in shares for name, parts in share.items()}
    names = loader.dataset.names
    order = [names[i] for i in loader.indices]
    check_predictions(frames, order)
    return {name: frames[name] for name in order}


def check_predictions(frames, names):
    """Refuse what the metric would trip over or not notice. frames as from predict_all.

    A frame missing or too many, too many boxes, numbers that are not finite.
    """
    if frames.keys() != set(names):
        name = min(frames.keys() ^ set(names))
        problem = "held out but not predicted"
        if name in frames:
            problem = "predicted but not held out"
        raise ValueError(
            f"{name}: {problem}; expected each of the {len(names)} val frames once")
    for name, (boxes, _, scores, _) in frames.items():
        broken = ~np.isfinite(np.c_[boxes, scores]).all(1)
        if len(boxes) > MAX_BOXES or broken.any():
            raise FloatingPointError(
                f"{name}: {len(boxes)} boxes predicted, {broken.sum()} of them with numbers "
                f"that are not finite; expected at most {MAX_BOXES} and finite ones: "
                "the weights are broken, go back to an earlier checkpoint")


def finish(model, cfg, out, val_loader, device, rank):
    """Predict the val split, score it, draw, print the table and the README row.

    Detections, metrics.json and the figures are written into the folder `out`.
    """
    frames = predict_all(model, val_loader, device)
    destroy_group()
    if rank:
        return
    folder = Path(out)
    try:
        scores = score_frames(val_loader, frames, folder, cfg.modality)
    except (Exception, SystemExit) as error:
        place = folder / PREDICTIONS[val_loader.grid.dataset]
        predictions = f"the predictions are in {place}, " * place.exists()
        raise SystemExit(f"{out}: not scored ({reason(error)}). Nothing else is lost: "
                         f"{predictions}the weights in {folder / 'last.pt'}. When the cause is "
                         f"mended, score again: python finetune.py --eval-only {out}") from error
    try:
        save_figures(val_loader, frames, folder)
    finally:  # whatever becomes of the figures
        start = cfg.init + f" and image {cfg.image_init}" * bool(cfg.image_init)
        start += " frozen" * cfg.freeze
        print(f"{out}: | {start} | {cfg.modality} | {labels_text(cfg)} "
              f"| seed {cfg.seed} | {scores} |", flush=True)


def reason(error):
    """Why something failed: the message that is meant for a user, else the error's first line."""
    return str(error) if isinstance(error, (SystemExit, data.DataError)) else first_line(error)


PREDICTIONS = {  # files in the run folder, written before they are scored
    "nuscenes": "results_nusc.json",
    "kitti": "kitti",
    "waymo": "predictions.npz",
}


def score_frames(val_loader, frames, folder, modality):
    """Write predictions, score them, write metrics.json, print the table -> scores of the row.

    frames as predict_all's.
    """
    finish_dataset = dict(
        nuscenes=partial(finish_nuscenes, modality=modality),
        kitti=finish_kitti,
        waymo=finish_waymo,
    )
    return finish_dataset[val_loader.grid.dataset](val_loader, frames, folder)


# ---- nuScenes' metric ----------------------------------------------------------------

def attribute(name, speed):
    """The attribute that the released code guesses from class and speed (m/s).  D3"""
    # D3: the metric asks for attributes, and there is no attribute head: they are guessed
    moving = speed > 0.2
    if name in ("barrier", "traffic_cone"):
        return ""
    if name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    if name in ("motorcycle", "bicycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    if moving:
        return "vehicle.moving"
    return "vehicle.stopped" if name == "bus" else "vehicle.parked"


def nuscenes_box(token, box, turn, name, score):
    """A box in the official format. box (9,) in the world, turn (4,) as w, x, y, z."""
    speed = float(np.hypot(*box[7:9]))
    return dict(
        sample_token=token,
        translation=box[:3].tolist(),
        size=box[[4, 3, 5]].tolist(),  # w, l, h
        rotation=turn.tolist(),
        velocity=box[7:9].tolist(),
        detection_name=name,
        detection_score=float(score),
        attribute_name=attribute(name, speed),
    )


def nuscenes_results(frames, classes, modality="fusion"):
    """Predictions in the official format. frames as predict_all's -> dict for JSON."""
    results = {}
    for name, (boxes, labels, scores, lidar2world) in frames.items():
        token = name.rsplit("/", 1)[1]
        boxes = data.warp_boxes(boxes, lidar2world)  # (n, 9) float64, in the world
        turns = np.zeros((len(boxes), 4))  # w, x, y, z
        if len(boxes):
            turns = Rotation.from_euler("z", boxes[:, 6:7]).as_quat()[:, [3, 0, 1, 2]]
        results[token] = [
            nuscenes_box(token, box, turn, classes[label], score)
            for box, turn, label, score in zip(boxes, turns, labels, scores)
        ]
    meta = dict(
        use_camera=modality != "lidar",
        use_lidar=modality != "camera",
        use_radar=False,
        use_map=False,
        use_external=False,
    )
    return dict(meta=meta, results=results)


LOADED = {}  # (root, version): the devkit's tables, and the instances of which they have boxes


def devkit(dataset, tokens):
    """The devkit with its own tables, for scoring these frames. They are read once and kept.

    Rows that scoring never asks for are left out, sweeps, images and other frames' boxes: full
    nuScenes would fill 8 GB of memory, and so fills 0.7.
    """
    from nuscenes import NuScenes
    index = {token.decode(): i for i, token in enumerate(dataset.frames["token"])}
    rows = [dataset.annotations(index[token])["instance"] for token in tokens]
    instances = {instance.decode() for instance in np.concatenate(rows)}
    key = dataset.root, dataset.version
    tables, present = LOADED.get(key, (None, set()))
    if instances <= present:
        return tables

    class ScoringTables(NuScenes):
        def __load_table__(self, name):
            if name == "ego_pose":  # comes before sample_data, which says what poses are needed
                lidars = {row["token"] for row in self.sensor if row["channel"] == "LIDAR_TOP"}
                mounts = {row["token"] for row in self.calibrated_sensor
                          if row["sensor_token"] in lidars}
                self.keyframes = self.rows("sample_data", lambda row: (
                    row["is_key_frame"] and row["calibrated_sensor_token"] in mounts))
                poses = {row["ego_pose_token"] for row in self.keyframes}
                return self.rows(name, lambda row: row["token"] in poses)
            if name == "sample_data":
                return self.keyframes
            if name == "sample_annotation":
                return self.rows(name, lambda row: row["instance_token"] in instances)
            return self.rows(name, lambda row: True)

        def rows(self, name, keep):
            text = Path(self.table_root, f"{name}.json").read_bytes()
            rows = json.loads(text, object_hook=lambda row: row if keep(row) else None)
            return [row for row in rows if row is not None]

    size = sum(file.stat().st_size for file in Path(dataset.root, dataset.version).glob("*.json"))
    if size > 2e8:
        print(f"{dataset.what}: nuscenes-devkit reads its {size / 1e9:.1f} GB of tables, once",
              flush=True)
    tables = ScoringTables(dataset.version, str(dataset.root), verbose=False)
    LOADED[key] = tables, instances
    return tables


def nuscenes_score(dataset, path, tokens, reach=math.inf):
    """nuscenes-devkit's DetectionEval, detection_cvpr_2019, on frames of a results file.

    tokens: those of the frames, a whole split or not; reach (m) narrows the classes' ranges.
    -> its metrics as a dict, its precision-recall data, and the classes that have ground
    truth after its filters.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.loaders import (
        add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens,
        load_prediction_of_sample_tokens)
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval
    official = devkit(dataset, tokens)

    # its constructor insists on an official split, so the fields are set from here
    scorer = DetectionEval.__new__(DetectionEval)
    scorer.cfg = config_factory("detection_cvpr_2019")
    scorer.verbose = False
    scorer.sample_tokens = tokens
    ranges = {name: min(limit, reach) for name, limit in scorer.cfg.class_range.items()}
    scorer.cfg.class_range = ranges

    most = scorer.cfg.max_boxes_per_sample
    predicted, scorer.meta = load_prediction_of_sample_tokens(
        str(path), most, DetectionBox, tokens)
    with redirect_stderr(io.StringIO()):  # a progress bar, which would end with the terminal
        truth = load_gt_of_sample_tokens(official, tokens, DetectionBox)
    for boxes in (predicted, truth):
        require(any(boxes[token] for token in tokens),
                f"{path}: no predicted box, or no labelled one, in any of its {len(tokens)} "
                "frames: nothing to score")
    predicted = add_center_dist(official, predicted)
    truth = add_center_dist(official, truth)
    scorer.pred_boxes = filter_eval_boxes(official, predicted, ranges)
    scorer.gt_boxes = filter_eval_boxes(official, truth, ranges)
    metrics, curves = scorer.evaluate()
    present = sorted({box.detection_name for box in scorer.gt_boxes.all})
    return metrics.serialize(), curves, present


def mean_of(table, names):
    return sum(table[name] for name in names) / max(len(names), 1)


def finish_nuscenes(val_loader, frames, out, modality):
    """results_nusc.json, metrics.json, precision_recall.png, table -> scores of the row."""
    dataset = val_loader.dataset
    grid = val_loader.grid
    path = out / "results_nusc.json"
    write_text(path, json.dumps(nuscenes_results(frames, grid.classes, modality)))
    tokens = [name.rsplit("/", 1)[1] for name in frames]
    official, curves, present = nuscenes_score(dataset, path, tokens)

    # m; the metric measures from the ego vehicle, the range from the LiDAR
    reach = min(-grid.low[0], -grid.low[1], grid.high[0], grid.high[1])
    near = official
    near_present = present
    if reach < 50:  # m, the widest range of a class in the metric
        near, _, near_present = nuscenes_score(dataset, path, tokens, reach)

    metrics = dict(
        mAP=official["mean_ap"],
        NDS=official["nd_score"],
        mAP_present=mean_of(official["mean_dist_aps"], present),
        reach=reach,
        mAP_reach=mean_of(near["mean_dist_aps"], near_present),
        errors=official["tp_errors"],
        AP=official["mean_dist_aps"],
        AP_reach={name: near["mean_dist_aps"][name] for name in near_present},
        absent=[name for name in grid.classes if name not in present],
        frames=len(frames),
    )
    write_text(out / "metrics.json", to_json(metrics))
    tool = load_tool("figures")
    if tool and present:
        tool.precision_recall(curves, present, out)
    print_nuscenes(metrics, grid.classes)
    return (f"mAP {metrics['mAP']:.4f} | NDS {metrics['NDS']:.4f} "
            f"| mAP within {reach:g} m {metrics['mAP_reach']:.4f}")


def print_nuscenes(metrics, classes):
    """The table of finish_nuscenes' metrics."""
    absent = metrics["absent"]
    within = f"AP within {metrics['reach']:g} m"
    print(f"{'class':22}{'AP':>8}{within:>18}")
    for name in classes:
        ap = metrics["AP"][name]
        ap_reach = metrics["AP_reach"].get(name, math.nan)
        remark = "   no labelled box after the metric's filters" if name in absent else ""
        print(f"{name:22}{ap:8.4f}{ap_reach:18.4f}{remark}")
    errors = []
    for name, value in metrics["errors"].items():  # trans_err is printed as mTrans
        errors.append(f"m{name.split('_')[0].title()} {value:.3f}")
    print("  ".join(errors))
    if absent:
        present = len(classes) - len(absent)
        print("classes without ground truth count as 0 in the official mAP; "
              f"over the {present} present it is {metrics['mAP_present']:.4f}")


# ---- KITTI's metric ------------------------------------------------------------------
# Source: the rules of the official devkit's evaluate_object, in its own camera
# coordinates and in the order of its decisions.

KITTI_LEVELS = (  # px of height, occlusion, truncation
    (40, 0, 0.15),  # easy
    (25, 1, 0.30),  # moderate
    (25, 2, 0.50),  # hard
)
KITTI_IOU = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
KITTI_ALIKE = {"Car": "Van", "Pedestrian": "Person_sitting"}  # neither missed nor false


def rectangles(boxes):
    """boxes (N, 5) x, y, l, w, yaw -> (N,) shapely polygons."""
    import shapely
    cos = np.cos(boxes[:, 4:])
    sin = np.sin(boxes[:, 4:])
    along = np.concatenate([cos, sin], 1) * boxes[:, 2:3] / 2
    across = np.concatenate([-sin, cos], 1) * boxes[:, 3:4] / 2
    corners = [along + across, along - across, -along - across, across - along]
    return shapely.polygons(boxes[:, None, :2] + np.stack(corners, 1))


def shared_area(a, b):
    """Area that each two turned rectangles share; only those near each other are cut.

    a (M, 5), b (N, 5) x, y, l, w, yaw -> (M, N) m^2.
    """
    import shapely
    area = np.zeros((len(a), len(b)))
    radius_a = np.hypot(a[:, 2], a[:, 3]) / 2
    radius_b = np.hypot(b[:, 2], b[:, 3]) / 2
    distance = np.hypot(a[:, None, 0] - b[:, 0], a[:, None, 1] - b[:, 1])
    i, j = np.nonzero(distance < radius_a[:, None] + radius_b)
    if len(i):
        both = shapely.intersection(rectangles(a)[i], rectangles(b)[j])
        area[i, j] = shapely.area(both)
    return area


def shared_length(low_a, high_a, low_b, high_b):
    """Length that each two intervals share. a (M,), b (N,) -> (M, N)."""
    high = np.minimum(high_a[:, None], high_b)
    return (high - np.maximum(low_a[:, None], low_b)).clip(0)


def shared_pixels(a, b):
    """Area that each two boxes of an image share. a (M, 4), b (N, 4) px -> (M, N)."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum(a[:, None, 2:], b[:, 2:])
    return (high - low).clip(0).prod(2)


def pixels(boxes):
    """Areas of boxes of an image. boxes (M, 4) px -> (M,)."""
    return np.prod(boxes[:, 2:] - boxes[:, :2], 1)


def kitti_ground(rows):
    """Label rows (M,) -> (M, 5) x, z, l, w and turn on the ground."""
    x_z = rows["location"][:, ::2]
    l_w = rows["hwl"][:, :0:-1]
    return np.concatenate([x_z, l_w, -rows["rotation_y"][:, None]], 1)


def kitti_iou(a, b, kind):
    """Intersection over union of label rows. a (M,), b (N,) KITTI_LABEL -> (M, N).

    kind: "2d" (image), "bev" (ground) or "3d".
    """
    if kind == "2d":
        shared = shared_pixels(a["bbox"], b["bbox"])
        size_a = pixels(a["bbox"])
        size_b = pixels(b["bbox"])
    else:
        shared = shared_area(kitti_ground(a), kitti_ground(b))
        size_a = a["hwl"][:, 1] * a["hwl"][:, 2]
        size_b = b["hwl"][:, 1] * b["hwl"][:, 2]
    if kind == "3d":  # y points down, the location is the bottom
        bottom_a = a["location"][:, 1]
        bottom_b = b["location"][:, 1]
        height_a = a["hwl"][:, 0]
        height_b = b["hwl"][:, 0]
        top_a = bottom_a - height_a
        top_b = bottom_b - height_b
        shared = shared * shared_length(top_a, bottom_a, top_b, bottom_b)
        size_a = size_a * height_a
        size_b = size_b * height_b
    return shared / np.maximum(size_a[:, None] + size_b - shared, 1e-12)


def kitti_states(truth, detected, name, level):
    """Which label rows count for a class. truth (M,), detected (N,) -> (M,), (N,) int.

    0: counted; 1: ignored, neither hit nor false; -1: left out.
    """
    height, occlusion, truncation = KITTI_LEVELS[level]
    tall = truth["bbox"][:, 3] - truth["bbox"][:, 1]
    hard = truth["occluded"] > occlusion
    hard |= truth["truncated"] > truncation
    hard |= tall <= height
    alike = np.isin(truth["type"], (name, KITTI_ALIKE.get(name, name)))
    truth_state = np.where(alike, 1, -1)
    truth_state[(truth["type"] == name) & ~hard] = 0
    tall = detected["bbox"][:, 3] - detected["bbox"][:, 1]
    state = np.where(detected["type"] == name, 0, -1)
    state[tall < height] = 1
    return truth_state, state


def kitti_covered(truth, detected, name):
    """Which detections a DontCare region covers in the image. -> (N,) bool."""
    regions = truth[truth["type"] == "DontCare"]["bbox"]
    shared = shared_pixels(detected["bbox"], regions)  # (N, regions)
    return (shared > KITTI_IOU[name] * pixels(detected["bbox"])[:, None]).any(1)


def kitti_match(iou, truth, detected, score, least, threshold=None, covered=None):
    """Match the truths of one frame, each in turn, to its detections.

    iou (M, N), above `least` for a match; truth (M,), detected (N,) as from kitti_states;
    score (N,); covered (N,) bool as from kitti_covered
    -> scores of the hits, number of false alarms.

    Without a threshold a truth takes its candidate of best score, with one that of best
    overlap, and an ignored one only if there is nothing else.
    """
    hits = []
    free = detected >= 0
    if threshold is not None:
        free &= score >= threshold
    for g in np.flatnonzero(truth >= 0):
        candidates = np.flatnonzero(free & (iou[g] > least))
        if not len(candidates):
            continue
        counted = candidates[detected[candidates] == 0]
        if threshold is None:
            best = candidates[score[candidates].argmax()]
        elif len(counted):
            best = counted[iou[g, counted].argmax()]
        else:
            best = candidates[0]
        free[best] = False
        if truth[g] == 0 and detected[best] == 0:
            hits.append(score[best])
    false = free & (detected == 0)
    if covered is not None:
        false &= ~covered
    return hits, int(false.sum())


def kitti_thresholds(scores, total):
    """The scores at which recall comes nearest to 0, 1/40, 2/40, ...

    scores of the hits, best first; total: the number of truths.
    """
    thresholds = []
    recall = 0.0
    for n, score in enumerate(scores, 1):
        last = n == len(scores)
        if last or (n + 1) / total - recall >= recall - n / total:
            thresholds.append(score)
            recall += 1 / 40
    return thresholds


def kitti_ap(frames, name, level, kind):
    """AP over 40 and over 11 recall positions, in %; nan without a truth.

    frames [(truth rows, detected rows, scores)], level 0 easy, 1 moderate, 2 hard.
    """
    least = KITTI_IOU[name]
    cases = []  # the arguments of kitti_match
    regions = []  # whether DontCare covers: those regions have a box in the image only
    total = 0
    for truth, detected, score in frames:
        iou = kitti_iou(truth, detected, kind)
        truth_state, state = kitti_states(truth, detected, name, level)
        cases.append((iou, truth_state, state, score, least))
        regions.append(kitti_covered(truth, detected, name) if kind == "2d" else None)
        total += (truth_state == 0).sum()
    if not total:
        return math.nan, math.nan

    scores = [score for case in cases for score in kitti_match(*case)[0]]
    thresholds = kitti_thresholds(sorted(scores, reverse=True), total)
    precision = np.zeros(41)
    for n, threshold in enumerate(thresholds[:41]):
        hits = alarms = 0
        for case, covered in zip(cases, regions):
            matched, false = kitti_match(*case, threshold, covered)
            hits += len(matched)
            alarms += false
        precision[n] = hits / max(hits + alarms, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return 100 * precision[1:].mean(), 100 * precision[::4].mean()


def kitti_rows(dataset, i, boxes, labels):
    """Detections of frame i as label rows. boxes (n, 9), labels (n,) -> rows (m,), (m,).

    Also the indices of those boxes: they lie before the camera, and the image shows them.
    """
    lidar2rect, rect2img = dataset.calibration(i)
    turn = lidar2rect[:3, :3]
    rows = np.zeros(len(boxes), data.KITTI_LABEL)
    rows["type"] = np.array(dataset.grid.classes)[labels]
    rows["truncated"] = -1
    rows["occluded"] = -1
    rows["hwl"] = boxes[:, 5:2:-1]
    rows["box"] = boxes
    rows["label"] = labels
    centre = boxes[:, :3] @ turn.T + lidar2rect[:3, 3]
    rows["location"] = centre + rows["hwl"][:, :1] / 2 * [0, 1, 0]  # the bottom
    yaw = boxes[:, 6]
    heading = np.stack([np.cos(yaw), np.sin(yaw), np.zeros(len(boxes))], 1) @ turn.T
    rows["rotation_y"] = np.arctan2(-heading[:, 2], heading[:, 0])
    ray = np.arctan2(rows["location"][:, 0], rows["location"][:, 2])
    alpha = rows["rotation_y"] - ray
    rows["alpha"] = np.arctan2(np.sin(alpha), np.cos(alpha))

    width, height = dataset.picture_size(i)
    lidar2img = rect2img @ lidar2rect
    for row in rows:
        corners = data.box_corners(row["box"])  # (8, 3)
        uvd = corners @ lidar2img[:3, :3].T + lidar2img[:3, 3]
        if (uvd[:, 2] > 0.1).all():
            uv = uvd[:, :2] / uvd[:, 2:]
            bbox = [*uv.min(0), *uv.max(0)]
            limit = [width - 1, height - 1, width - 1, height - 1]
            row["bbox"] = np.clip(bbox, 0, limit)  # as the labels are
    shown = (rows["bbox"][:, 2:] > rows["bbox"][:, :2]).all(1)
    return rows[shown], np.flatnonzero(shown)


def kitti_line(row, score):
    """A detection as a line of the official result file."""
    box = *row["bbox"], *row["hwl"], *row["location"]
    values = row["alpha"], *box, row["rotation_y"]
    numbers = " ".join(f"{value:.4f}" for value in values)
    return f"{row['type']} -1 -1 {numbers} {score:.9g}\n"


def kitti_score(dataset, frames, folder):
    """AP of all classes, kinds and levels; detections as official result files in `folder`.

    frames as predict_all's -> {kind: {class: {"R40": [easy, moderate, hard], "R11": [3]}}}.
    """
    index = {name: i for i, name in enumerate(dataset.names)}
    folder.mkdir(parents=True, exist_ok=True)
    detections = {}  # i: rows, scores
    for name, (boxes, labels, scores, _) in frames.items():
        i = index[name]
        rows, which = kitti_rows(dataset, i, boxes.astype(np.float64), labels)
        scores = scores[which]
        detections[i] = rows, scores
        lines = [kitti_line(row, score) for row, score in zip(rows, scores)]
        write_text(folder / f"{name.rsplit('/', 1)[1]}.txt", "".join(lines))
    cases = [(dataset.annotations(i), *parts) for i, parts in detections.items()]
    metrics = {}
    for kind in ("2d", "bev", "3d"):
        metrics[kind] = {}
        for name in dataset.grid.classes:
            levels = [kitti_ap(cases, name, level, kind) for level in range(3)]
            metrics[kind][name] = dict(R40=[r40 for r40, _ in levels],
                                       R11=[r11 for _, r11 in levels])
    return metrics


def kitti_truths(dataset, names):
    """How many boxes of these frames count -> {class: [easy, moderate, hard]}."""
    index = {name: i for i, name in enumerate(dataset.names)}
    counts = {name: [0, 0, 0] for name in dataset.grid.classes}
    for frame in names:
        rows = dataset.annotations(index[frame])
        for name, levels in counts.items():
            for level in range(3):
                state, _ = kitti_states(rows, rows[:0], name, level)
                levels[level] += int((state == 0).sum())
    return counts


def kitti_bound(total):
    """AP|R40 and AP|R11 of a perfect detector, in %: under 100 for fewer than 41 truths.

    n truths give n thresholds, and by the official definition no precision beyond them.
    """
    if not total:
        return math.nan, math.nan
    precision = np.arange(41) < total  # at recall 0, 1/40, 2/40, ...
    return 100 * precision[1:].mean(), 100 * precision[::4].mean()


def kitti_overall(classes):
    """The mean of the classes' AP at each level, SimIPU's Overall; nan if one has no truth.

    classes {name: {"R40": [3], "R11": [3]}} -> {"R40": [3], "R11": [3]}.
    """
    overall = {}
    for positions in ("R40", "R11"):
        values = [ap[positions] for ap in classes.values()]
        overall[positions] = np.mean(values, 0).tolist()
    return overall


def finish_kitti(val_loader, frames, out):
    """kitti/<frame>.txt, metrics.json, the table -> the row's scores."""
    metrics = kitti_score(val_loader.dataset, frames, out / "kitti")
    moderate = {name: ap["R40"][1] for name, ap in metrics["3d"].items()}
    for classes in metrics.values():
        classes["Overall"] = kitti_overall(classes)
    truths = kitti_truths(val_loader.dataset, frames)
    bounds = {}
    for name, counts in truths.items():
        levels = [kitti_bound(count) for count in counts]
        bounds[name] = dict(R40=[r40 for r40, _ in levels], R11=[r11 for _, r11 in levels])
    write_text(out / "metrics.json", to_json(
        metrics | dict(frames=len(frames), truths=truths, perfect_detector=bounds)))
    levels = f"{'easy':>8}{'mod.':>8}{'hard':>8}"
    print(f"{'':16}{'AP|R40':>24}   {'AP|R11':>24}")
    print(f"{'':16}{levels}   {levels}")
    for kind, classes in metrics.items():
        for name, ap in classes.items():
            r40 = "".join(f"{value:8.2f}" for value in ap["R40"])
            r11 = "".join(f"{value:8.2f}" for value in ap["R11"])
            print(f"{kind:4}{name:12}{r40}   {r11}")
    for name, counts in truths.items():
        if min(counts) < 41:
            n = "".join(f"{count:8}" for count in counts)
            r40 = "".join(f"{value:8.2f}" for value in bounds[name]["R40"])
            r11 = "".join(f"{value:8.2f}" for value in bounds[name]["R11"])
            print(f"{'n':4}{name:12}{n}   truths, fewer than 41: a perfect detector gets")
            print(f"{'max':4}{name:12}{r40}   {r11}")
    scores = ", ".join(f"{name} {value:.2f}" for name, value in moderate.items())
    return f"3D AP|R40 moderate {scores}"


# ---- Waymo's metric ------------------------------------------------------------------
# Source: the official detection_metrics.cc and metrics_utils.cc with the configuration
# of compute_detection_metrics_main.cc; here detections in no-label zones count.

WAYMO_IOU = {"Vehicle": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
# least scores, at each of which the detections are matched to the truth anew
WAYMO_CUTOFFS = (np.arange(101) / 100).astype(np.float32)
WAYMO_RECALL = 0.05          # the curve is sampled at least this densely


def upright_iou(a, b):
    """3-D intersection over union. a (M, 9), b (N, 9) as Frame.boxes -> (M, N)."""
    half_a = a[:, 5] / 2
    half_b = b[:, 5] / 2
    bottom_a = a[:, 2] - half_a
    bottom_b = b[:, 2] - half_b
    top_a = a[:, 2] + half_a
    top_b = b[:, 2] + half_b
    ground = [0, 1, 3, 4, 6]  # x, y, l, w, yaw
    shared = shared_area(a[:, ground], b[:, ground])
    shared = shared * shared_length(bottom_a, top_a, bottom_b, top_b)
    volume_a = a[:, 3:6].prod(1)
    volume_b = b[:, 3:6].prod(1)
    return shared / np.maximum(volume_a[:, None] + volume_b - shared, 1e-12)


def waymo_counts(truth, boxes, scores, least):
    """What one frame adds at each of K score cut-offs, for one class.

    truth (M,) as Waymo.annotations, boxes (n, 9), scores (n,)
    -> (5, K): hits, hits weighted by heading, false alarms, missed at levels 1 and 2.

    The detections are assigned to the truths so that the sum of their overlaps is
    greatest (Hungarian); an overlap below `least` is none.
    """
    # level 2: marked so, or unmarked with 5 points or fewer
    hard = truth["difficulty"] == 2
    hard |= (truth["difficulty"] == 0) & (truth["lidar_points"] <= 5)
    iou = upright_iou(boxes, truth["box"])  # (n, M)
    iou[iou < least] = 0
    turn = (boxes[:, None, 6] - truth["box"][:, 6] + np.pi) % (2 * np.pi) - np.pi
    accuracy = 1 - abs(turn) / np.pi  # (n, M)
    candidates = np.flatnonzero(iou.any(1))
    counts = np.zeros((5, len(WAYMO_CUTOFFS)))
    before = None
    for n, cutoff in enumerate(WAYMO_CUTOFFS):
        above = candidates[scores[candidates] >= cutoff]
        # with as many detections as at the last cut-off the matches are the same
        if before is None or len(above) < before:
            i, g = linear_sum_assignment(iou[above], maximize=True)
            i = above[i]
            overlap = iou[i, g] > 0
            i = i[overlap]
            g = g[overlap]
            before = len(above)
        counts[0, n] = len(i)
        counts[1, n] = accuracy[i, g].sum()
        counts[2, n] = (scores >= cutoff).sum() - len(i)
        counts[3, n] = (~hard).sum() - (~hard)[g].sum()
        counts[4, n] = len(truth) - len(g)
    return counts


def waymo_ap(frames, label, least):
    """AP and APH in % -> [(AP, APH) at level 1, at level 2], nan without a truth.

    frames [(truth rows as Waymo.annotations, boxes (n, 9), labels (n,), scores (n,))].

    Truths without a point are left out. At level 1 a hard truth does not count if it is
    missed, and counts if it is matched. APH weights each hit by 1 - |turn| / pi in the
    precision; recall has no weight.
    """
    counts = np.zeros((5, len(WAYMO_CUTOFFS)))
    total = 0
    for truth, boxes, labels, scores in frames:
        truth = truth[(truth["label"] == label) & (truth["lidar_points"] > 0)]
        own = labels == label
        counts += waymo_counts(truth, boxes[own], scores[own], least)
        total += len(truth)
    if not total:
        return [(math.nan, math.nan)] * 2
    hits, weighted, alarms, *missed = counts
    predicted = np.maximum(hits + alarms, 1)
    levels = []
    for lost in missed:
        recall = hits / np.maximum(hits + lost, 1)
        ap = 100 * waymo_area(recall, hits / predicted)
        aph = 100 * waymo_area(recall, weighted / predicted)
        levels.append((ap, aph))
    return levels


def waymo_area(recall, precision):
    """Area under the curve through these points, with precision made non-increasing.

    Where recall jumps by more than WAYMO_RECALL, the higher point's precision is held.
    """
    best = {0.0: 1.0}  # recall: precision
    for r, p in zip(recall, precision):
        best[r] = max(best.get(r, 0.0), p)
    curve = []  # from the highest recall down
    greatest = 0.0
    for r in sorted(best, reverse=True):
        while curve and curve[-1][0] - r > WAYMO_RECALL + 1e-6:
            curve.append((curve[-1][0] - WAYMO_RECALL, greatest))
        greatest = max(greatest, best[r])
        curve.append((r, greatest))
    x, y = np.array(curve).T
    if len(y) > 1:
        y[-1] = y[-2]  # no detection earned the precision 1 at recall 0
    return float((-np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def waymo_score(dataset, frames):
    """frames as predict_all's -> {class: {"L1": (AP, APH), "L2": (AP, APH)}} in %."""
    index = {name: i for i, name in enumerate(dataset.names)}
    cases = []
    for name, (boxes, labels, scores, _) in frames.items():
        truth = dataset.annotations(index[name])
        cases.append((truth, boxes.astype(np.float64), labels, scores))
    metrics = {}
    for label, name in enumerate(dataset.grid.classes):
        level_1, level_2 = waymo_ap(cases, label, WAYMO_IOU[name])
        metrics[name] = dict(L1=level_1, L2=level_2)
    return metrics


def save_predictions(path, frames):
    """Write what predict_all returned, the boxes of all frames in a row.

    frame (F,) names, count (F,) boxes of each; boxes (n, 9), labels (n,), scores (n,).
    """
    parts = list(frames.values())
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez(
            file,
            frame=list(frames),
            count=[len(scores) for _, _, scores, _ in parts],
            boxes=np.concatenate([boxes for boxes, _, _, _ in parts]),
            labels=np.concatenate([labels for _, labels, _, _ in parts]),
            scores=np.concatenate([scores for _, _, scores, _ in parts]))


def finish_waymo(val_loader, frames, out):
    """predictions.npz, metrics.json, the table -> the row's scores."""
    save_predictions(out / PREDICTIONS["waymo"], frames)
    metrics = waymo_score(val_loader.dataset, frames)
    write_text(out / "metrics.json", to_json(metrics | dict(frames=len(frames))))
    print(f"{'':12}{'L1 AP':>8}{'APH':>8}{'L2 AP':>8}{'APH':>8}"
          "   (our implementation, not the official server)")
    for name, levels in metrics.items():
        values = *levels["L1"], *levels["L2"]
        print(f"{name:12}" + "".join(f"{value:8.2f}" for value in values))
    mAP = np.nanmean([levels["L2"][0] for levels in metrics.values()])
    mAPH = np.nanmean([levels["L2"][1] for levels in metrics.values()])
    return f"L2 mAP {mAP:.2f} | L2 mAPH {mAPH:.2f}"


# ---- figures -------------------------------------------------------------------------

def birds_eye(ax, frame, shown, grid):
    """A frame from above: points grey, its boxes green, shown (n, 9) red.

    A stroke leads from each centre to the front.
    """
    bird_eye(frame.points, size=0.2)(ax)
    for boxes, colour in ((frame.boxes, "C2"), (shown, "C3")):
        for box in boxes:
            x, y, _ = data.box_corners(box)[[0, 2, 6, 4, 0]].T
            ax.plot(-y, x, colour, lw=1)
            front = (x[2] + x[3]) / 2, (y[2] + y[3]) / 2
            ax.plot([-box[1], -front[1]], [box[0], front[0]], colour, lw=1)
    ax.set_xlim(-grid.high[1], -grid.low[1])
    ax.set_ylim(grid.low[0], grid.high[0])


def save_figures(val_loader, frames, out):
    """figures/bev.png of some val frames, then the figures of tests/figures.py."""
    grid = val_loader.grid
    names = val_loader.dataset.names
    places = np.linspace(0, len(val_loader.indices) - 1, FIGURE_FRAMES).astype(int)
    shown = []
    for i in val_loader.indices[np.unique(places)]:
        boxes, _, scores, _ = frames[names[i]]
        frame = val_loader.dataset.load(int(i), val_loader.image)
        shown.append((frame, boxes[scores > FIGURE_SCORE]))
    panels = []
    for frame, boxes in shown:
        name = frame.name.split("/", 1)[1][:28]
        title = f"{name}: truth green, score > {FIGURE_SCORE} red"
        panels.append((title, partial(birds_eye, frame=frame, shown=boxes, grid=grid)))
    figure(out / "figures" / "bev.png", panels, 2, (5.0, 5.0))
    tool = load_tool("figures")
    if tool and val_loader.dataset.images:
        tool.finetune_figures(shown, grid, out)


# ---- weights for other projects ------------------------------------------------------

def to_openpcdet(state):
    """Tensors of VoxelResNet {name: tensor} as OpenPCDet's VoxelResBackBone8x has them.

    Names and shapes are those under its backbone_3d. Source: its spconv_backbone.py,
    spconv 2. A convolution (27, in, out), offsets z slowest, becomes (out, 3, 3, 3, in)
    with z, y, x in the middle; in the residual blocks it has a bias there: zeros. Strides,
    paddings, spatial shape and the eps of the batch norms are the same. Their momentum is
    0.1 here and 0.01 there, which only training reads.
    """
    renamed = {}
    for name, value in state.items():
        name = "backbone_3d." + name.replace(".conv.", ".0.").replace(".bn.", ".1.")
        renamed[name] = value
        if value.dim() == 3:
            weight = value.unflatten(0, (3, 3, 3)).permute(4, 0, 1, 2, 3)
            renamed[name] = weight.contiguous()
        if name.endswith((".conv1.weight", ".conv2.weight")):
            bias = name.removesuffix("weight") + "bias"
            renamed[bias] = value.new_zeros(value.shape[2])
    return renamed


def export(cfg):
    """--export PROJECT --init RUN --out FILE: a network of RUN as PROJECT loads it.

    From RUN/backbones.safetensors, float32 on the CPU.

    openpcdet    {"model_state": {name: tensor}, "epoch", "it", "optimizer_state",
                 "version"}, for its --pretrained_model. Its conv_out is not in it: the
                 trunk here has none, and it keeps its initial weights there. The points
                 must be Frame.points, the boxes in their frame. OpenPCDet's nuScenes
                 reader leaves x to the right, y ahead and intensity up to 255; its KITTI
                 reader gives four features, for which it leaves the first convolution
                 out; the fifth feature of its Waymo reader is elongation. It takes the
                 mean of at most 5 or 10 points a voxel, we of all.
    torchvision  {name: tensor} of resnet18 or resnet50 without fc; images are RGB,
                 normalised as in ResNet.stages.
    """
    unit = dict(openpcdet="lidar", torchvision="camera.resnet")[cfg.export]
    path = Path(cfg.out)
    require(path.suffix == ".pth", f"--out {path}: --export writes one file; "
                                   "expected a name that ends in .pth")
    source, header, stored = read_units(cfg.init)
    prefix = unit + "."
    state = {name.removeprefix(prefix): value
             for name, value in stored.items() if name.startswith(prefix)}
    units = header["units"].replace(",", ", ")
    require(state, f"{source} holds {units}; --export {cfg.export} wants {unit}, "
                   "which this run has not trained")
    if cfg.export == "openpcdet":
        first = state.get("conv_input.conv.weight")
        require(first is not None and first.dim() == 3,
                f"{source}: its {unit} is not the network of this program: no "
                "conv_input.conv.weight of three axes")
        message = openpcdet_message(first.shape[2])
        state = dict(
            model_state=to_openpcdet(state),
            epoch=0,
            it=int(header["step"]),
            optimizer_state=None,
            version=f"lidar-camera {header['commit']}",
        )
    else:
        depth = json.loads(header["config"]).get("resnet")
        message = f"torchvision's resnet{depth} with fc = Identity()"
    with atomic_write(path, advice="then export again") as part:
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, part)
    step = header["step"]
    print(f"{path}: {unit} of {cfg.init}, step {step}, for {message}.", flush=True)


def openpcdet_message(width):
    """What a user of the exported LiDAR network must know. width: of its first stage."""
    message = (
        "OpenPCDet's VoxelResBackBone8x, --pretrained_model. "
        "Not in it: conv_out, which starts from random weights there.\n"
        "It wants points as here: x forward, y left, z up (m), intensity 0 to 1, seconds "
        "before the keyframe sweep. OpenPCDet's readers give others: nuScenes x right, "
        "y forward, intensity to 255; KITTI four features; Waymo elongation")
    if width != 16:
        message += (
            f".\nThis run is {width} wide, OpenPCDet's network 16: it would leave out every "
            "tensor of another shape. Narrow it, or pre-train with --width 16")
    return message


if __name__ == "__main__":
    cfg = parse(Config, SMALL)
    if cfg.export:
        export(cfg)
    else:
        launch(train, cfg)
