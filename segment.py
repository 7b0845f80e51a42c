"""LiDAR semantic segmentation on the pre-trained LiDAR network: a linear probe, or few labels.

    python segment.py --init runs/clap --probe      # one linear layer on the frozen network
    python segment.py --init runs/clap              # the whole network, 5 % of the labels
    python segment.py --init none --probe --out runs/none_probe     # the baseline

Read with: common.py §8 VoxelResNet.point_features; data.py POINT_CLASSES, Batch.
Sources: SLidR's downstream code (Sautier et al., CVPR 2022), ScaLR's probe (Puy et al., CVPR
2024), Lovasz-softmax (Berman et al., CVPR 2018). [ours] marks our choice.
Both losses in plain loops: tests/test_segment.py, test_losses_match_plain_loops.

    points (N, 5) -> VoxelResNet -> the features of each point's site on four levels (N, 15 w)
    -> batch norm -> one linear layer -> logits (N, C)

The range holds every point, and every point of the file on disk is scored, by the rules of the
data set. Of Waymo, these are the first returns of the top LiDAR.

Departures from SLidR's downstream code, which CMCR uses:
  D1  The network is the detector's, without a decoder: a point has the features of its sites.
  D2  Voxels are Cartesian, a point has five features, and labels are of points, not of voxels.
  D3  A batch norm stands before the linear layer, whose weights begin at zero, as in ScaLR.
  D4  A frozen network normalises by the statistics of these clouds, for every --init.
  D5  The probe sees clouds as they are, without augmentation.
  D6  AdamW and half a cosine; their rates are for SGD and another network.
"""
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import nn

import data
from common import (
    VoxelResNet, BatchNorm, collect_statistics,  # networks
    all_reduce, mean_over_ranks,  # processes
    parse, require, check_numbers, launch, init_process, start, wrap, resume, save,  # runs: skip
    cosine, to_json, rank0_first, lock_run_folder, run_config, stored_config, check_run,
    read_units, load_units, labelled_frames, describe_draw, labels_text, describe_scored,
    destroy_group, Run, loss_curves, load_tool, write_text, first_line,
)

REACH = {"nuscenes": 102.4, "kitti": 81.6, "waymo": 102.4}  # |x|, |y| of the range, at least, m
HEIGHT = -10.0, 26.0         # z of the range, at least, m [ours]
STATISTICS = 24              # frames whose statistics a frozen network takes [ours]
COUNTED_FRAMES = 24          # labelled frames whose points are counted, to be printed [ours]
FIGURE_FRAMES = 3            # val frames in segmentation.png [ours]


@dataclass
class Config:
    # the run
    data: str = ""             # root of the data set; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # default: as --init; else small without --data
    out: str = "runs/segment"  # run folder; the same command again resumes it
    gpus: int | None = None    # processes on this machine; 0: CPU; default 1 with CUDA, else 0
    workers: int = 4           # loader processes for each rank [ours]
    seed: int = 0              # of drawn labels, order, augmentation, initial weights
    save_every: int = 500      # steps between checkpoints [ours]
    profile: int = 0           # steps to time instead of training; 0: train [ours]
    eval_only: str = ""        # run folder to only score again; --data: its data's new root

    # what is learned from
    init: str = "none"         # run folder of a pre-training, or none
    probe: bool = False        # freeze the network: the linear layer alone learns
    voxel: Literal["init", "data"] = "init"  # voxels of the pre-training, or of this data set
    fraction: float = 0.0      # share of the training labels; 0: 0.05, with --probe 1 [ours]
    draw: Literal["frames", "scenes", "every"] = "frames"  # every: each k-th scene [code SLidR]
    labels: str = ""           # file with the names of the frames to learn from, instead

    # optimisation
    epochs: int = 50           # over the drawn frames; 0: steps decide [code SLidR]
    steps: int = 0             # 0: epochs decide; both 0: 60 steps, with --probe 300 [ours]
    batch: int = 2             # frames for each rank: 16 in all on 8 [code SLidR]
    accumulate: int = 1        # batches of a step, one after the other [ours]
    lr: float = 1e-2           # of the linear layer; half a cosine to 0 [ours] D6
    lr_network: float = 3e-3   # of a new network [ours] D6
    lr_pretrained: float = 1e-3  # of a pre-trained network [ours] D6
    warmup: int = 200          # steps from a third of lr, at most a quarter of all [ours]
    weight_decay: float = 0.01  # of AdamW [ours]
    clip: float = 35.0         # gradient norm [ours]
    w_lovasz: float = 1.0      # of Lovasz against cross-entropy [code SLidR]

    # augmentation, without --probe; x and y also flip with probability 1/2 [code SLidR]
    rotation: float = math.pi  # rad about z, +- [code SLidR] D5
    scale: float = 0.05        # size U(1 - scale, 1 + scale); SLidR has none [code SuperFlow] D5

    # network
    width: int = 16            # w, first sparse stage, as in the pre-training [code OpenPCDet]


# --preset small: minutes on two CPU cores; all [ours]
SMALL = dict(workers=0, save_every=60, epochs=0, warmup=10, width=8)


def with_defaults(cfg):
    """The Config with the fraction and the steps that --probe, or its absence, stands for."""
    fraction = cfg.fraction or (1.0 if cfg.probe else 0.05)
    steps = cfg.steps
    if not cfg.epochs and not steps:
        steps = 300 if cfg.probe else 60
    return replace(cfg, fraction=fraction, steps=steps)


def check_flags(cfg):
    """Refuse flags that cannot work, before the data set is opened."""
    check_numbers(
        cfg, "batch accumulate save_every fraction lr lr_network lr_pretrained clip width",
        dict(workers=256, fraction=1, width=512))
    require(min(cfg.epochs, cfg.steps) == 0,
            f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0")
    require(cfg.scale < 1, f"--scale {cfg.scale}: expected a number below 1")
    if cfg.init != "none":
        read_units(cfg.init)  # refused before the embedded world is written


# ---- data ----------------------------------------------------------------------------

def open_labelled(cfg):
    """The data set: of each frame the keyframe sweep and the classes of its points."""
    return data.open_dataset(cfg.data, cfg.preset, sweeps=1, images=False, labels=False,
                             point_labels=True)


def wide(grid):
    """The Grid with a range that holds every point: all of them are scored.

    Its faces move outwards by whole multiples of 8 voxels, so that the cells of every stride
    stay where the pre-training had them.
    """
    reach = REACH[grid.dataset]
    limits = (-reach, reach), (-reach, reach), HEIGHT
    low = []
    high = []
    for axis, (least, most) in enumerate(limits):
        cell = 8 * grid.voxel[axis]
        down = max(math.ceil((grid.low[axis] - least) / cell - 1e-6), 0)
        low.append(grid.low[axis] - down * cell)
        high.append(low[axis] + math.ceil((most - low[axis]) / cell - 1e-6) * cell)
    return replace(grid, low=tuple(low), high=tuple(high))


def grid_of_run(run, grid):
    """The Grid of a data set with the range and the voxels that a run was trained with."""
    stored = json.loads(read_units(run)[1]["grid"])
    return replace(grid, **{name: tuple(stored[name]) for name in ("low", "high", "voxel")})


def count_labels(dataset, indices):
    """Labelled points of each class in these frames -> {class: n}."""
    classes = data.POINT_CLASSES[dataset.grid.dataset]
    label = np.concatenate([dataset.load(i).extra["points_label"] for i in indices])
    return dict(zip(classes, np.bincount(label[label >= 0], minlength=len(classes)).tolist()))


# ---- the network ---------------------------------------------------------------------

def lovasz(probability, labels):
    """Lovasz-softmax, a convex stand-in for 1 - IoU: mean over the classes that are present.

    probability (N, C), labels (N,) in [0, C) -> (); 0 without a point.
    """
    classes = torch.arange(probability.shape[1], device=labels.device)
    truth = (labels[:, None] == classes).float()     # (N, C)
    error, order = (truth - probability).abs().sort(0, descending=True)
    truth = truth.gather(0, order)
    count = truth.sum(0)                             # (C,)
    hits = count - truth.cumsum(0)                   # if the n points of most error are wrong
    union = count + (1 - truth).cumsum(0)
    jaccard = 1 - hits / union
    growth = torch.cat([jaccard[:1], jaccard.diff(dim=0)])
    present = (count > 0).float()
    losses = (error * growth).sum(0)                 # (C,)
    return (losses * present).sum() / present.sum().clamp_min(1)


class Segmenter(nn.Module):
    """lidar is the pre-trained network; the head is new."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg = cfg
        self.lidar = VoxelResNet(grid.low, grid.high, grid.voxel, cfg.width)
        self.lidar.requires_grad_(not cfg.probe)
        features = 15 * cfg.width
        self.norm = BatchNorm(features).requires_grad_(False)  # D3: the linear layer scales
        self.head = nn.Linear(features, len(data.POINT_CLASSES[grid.dataset]))
        nn.init.zeros_(self.head.weight)  # [code ScaLR]
        nn.init.zeros_(self.head.bias)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.cfg.probe:
            self.lidar.eval()  # else its statistics would follow the labelled frames
        return self

    def encode(self, batch):
        """-> the four Levels of the LiDAR network."""
        return self.lidar(batch.points, batch.b_points, batch.size)

    def logits(self, batch, rows):
        """Logits of these points, which must lie inside the range. rows (M,) -> (M, C)."""
        points = batch.points.index_select(0, rows)
        b = batch.b_points.index_select(0, rows)
        features = self.lidar.point_features(self.encode(batch), points, b)  # (M, 15 w)  D1
        return self.head(self.norm(features))

    def forward(self, batch):
        """-> L (), {name: ()}. Points without a label are left out.  D2"""
        label = batch.extra["points_label"]          # (N,)
        rows = (self.lidar.inside(batch.points) & (label >= 0)).nonzero()[:, 0]
        label = label.index_select(0, rows)          # (M,)
        logits = self.logits(batch, rows)            # (M, C)

        # the mean over the points of all processes; Lovasz over those of its own
        L_ce = mean_over_ranks(F.cross_entropy(logits, label, reduction="sum"), len(label))
        L_lovasz = lovasz(logits.softmax(1), label)  # [code SLidR]
        L = L_ce + self.cfg.w_lovasz * L_lovasz      # [code SLidR]
        hits = (logits.argmax(1) == label).float().sum()
        return L, dict(L_ce=L_ce, L_lovasz=L_lovasz, accuracy=mean_over_ranks(hits, len(label)))

    @torch.no_grad()
    def predict(self, batch):
        """-> [(n,) int64], the class of each point of each frame, on the CPU.

        A point outside the range has that of the nearest point inside.
        """
        inside = self.lidar.inside(batch.points)
        rows = inside.nonzero()[:, 0]
        classes = torch.zeros(len(inside), dtype=torch.int64, device=inside.device)
        classes[rows] = self.logits(batch, rows).argmax(1)
        columns = batch.points[:, :3], inside, classes
        frames = zip(*[column.cpu().split(batch.counts) for column in columns])
        return [fill_outside(*[column.numpy() for column in frame]) for frame in frames]


def fill_outside(xyz, inside, classes):
    """Points outside the range take the class of the nearest inside. Arrays of n rows -> (n,)."""
    if inside.all() or not inside.any():
        return classes
    _, nearest = cKDTree(xyz[inside]).query(xyz[~inside])
    filled = classes.copy()
    filled[~inside] = classes[inside][nearest]
    return filled


# ---- training ------------------------------------------------------------------------

def train(rank, world, cfg):
    if cfg.eval_only:
        return rescore(rank, world, cfg)
    cfg = with_defaults(cfg)
    check_flags(cfg)

    # data
    dataset = open_labelled(cfg)
    data.announce(dataset, cfg.batch)
    split = dataset.split("train")
    drawn = labelled_frames(cfg, dataset, split)
    warp = partial(data.augment_cloud, rotation=cfg.rotation, scale=cfg.scale, flip=(True, True))
    if cfg.probe:
        warp = None  # D5
    make_loader = partial(data.loader, dataset, batch=cfg.batch, rank=rank, world=world,
                          seed=cfg.seed, workers=cfg.workers)
    loader = make_loader(split="train", indices=drawn, augment=warp, accumulate=cfg.accumulate)
    cloud_loader = make_loader(split="train", indices=data.spread(split, STATISTICS), batch=1)
    val_loader = make_loader(split="val")
    if rank == 0:
        try_score(dataset)

    # model, optimiser
    torch.manual_seed(cfg.seed)
    grid = dataset.grid
    if cfg.init != "none" and cfg.voxel == "init":
        grid = grid_of_run(cfg.init, grid)
    model = Segmenter(cfg, wide(grid))
    loaded = set()
    if cfg.init != "none":
        loaded = load_units(cfg.init, model, ["lidar"], ["lidar"], grid, rank)
    device = start(cfg, rank, world, dataset, drawn, "labels.txt")
    model.to(device)
    rates = dict(head=cfg.lr, lidar=cfg.lr_pretrained if loaded else cfg.lr_network)
    if cfg.probe:
        del rates["lidar"]
    groups = [dict(params=list(getattr(model, part).parameters()), base=rate)
              for part, rate in rates.items()]
    opt = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=True)  # D6
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling", "--profile").profile(
            cfg, net, loader, [opt], device, rank, cfg.fraction, lidar=(model.lidar, "forward"))

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, opt)  # 0 when there is nothing to resume
    if cfg.probe and not first:  # D4
        clouds = cloud_loader.first(-(-STATISTICS // world))  # as many on every process
        clouds = (batch.to(device) for batch in clouds)
        collect_statistics(model.lidar, model.encode, clouds)
    if rank == 0:
        counted = data.spread(drawn, COUNTED_FRAMES)
        describe_draw(cfg, f"labelled points of {len(counted)} of these frames",
                      count_labels(dataset, counted))
    about = ", ".join(f"lr {rate:g} {part}" for part, rate in rates.items())
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
            save(cfg, step + 1, model, [opt], ["lidar", "norm", "head"], wide(grid))
        if stop:
            run.leave(step)

    # results
    run.close()
    finish(model, cfg, cfg.out, val_loader, device, rank)
    if rank == 0:
        loss_curves(cfg.out)


def rescore(rank, world, cfg):
    """--eval-only RUN: predict and score again, with its own configuration and weights."""
    require("w_lovasz" in run_config(cfg.eval_only),
            f"--eval-only {cfg.eval_only}: not a run of segment.py; give a folder that it wrote")
    trained = stored_config(Config, cfg.eval_only)
    trained = replace(trained, data=cfg.data or trained.data, workers=cfg.workers)
    dataset = open_labelled(trained)
    data.announce(dataset, trained.batch)
    val_loader = data.loader(dataset, "val", trained.batch, rank, world, trained.seed,
                             workers=trained.workers)
    if rank == 0:
        try_score(dataset)
    device = init_process(cfg, world)
    rank0_first(rank, lambda: lock_run_folder(Path(cfg.eval_only)))
    model = Segmenter(trained, grid_of_run(cfg.eval_only, dataset.grid)).to(device)
    sizes = "preset", "width"
    rank0_first(rank, lambda: check_run(cfg.eval_only, trained, dataset, model, sizes))
    step = resume(cfg.eval_only, model)
    if rank == 0:
        describe_scored(cfg.eval_only, step, dataset)
    finish(model, trained, cfg.eval_only, val_loader, device, rank)


# ---- scores --------------------------------------------------------------------------
# One confusion matrix over all frames. What a class counts that neither the truth nor the
# predictions have differs between the official programs.

def score(dataset, confusion):
    """Scores of a confusion matrix. dataset: its short name; confusion (C, C) int, rows truth.

    -> {"IoU": {class: x, NaN without truth and predictions}, "mIoU": the official one,
    "mIoU_present": over the classes that have truth, "fwIoU", "accuracy"}.
    """
    hits = np.diagonal(confusion)
    truth = confusion.sum(1)
    union = truth + confusion.sum(0) - hits
    iou = np.where(union > 0, hits / np.maximum(union, 1), np.nan)  # (C,)
    if dataset == "nuscenes":   # without truth and predictions: left out [devkit]
        from nuscenes.eval.lidarseg.utils import ConfusionMatrix
        matrix = ConfusionMatrix(len(confusion) + 1, ignore_idx=0)
        matrix.global_cm = np.pad(confusion, ((1, 0), (1, 0)))
        official = matrix.get_mean_iou()
    elif dataset == "kitti":    # ... 0 [code semantic-kitti-api]
        official = np.nan_to_num(iou, nan=0.0).mean()
    else:                       # ... 1 [code Waymo]
        official = np.nan_to_num(iou, nan=1.0).mean()
    present = truth > 0
    total = max(truth.sum(), 1)
    return dict(
        IoU=dict(zip(data.POINT_CLASSES[dataset], iou.tolist())),
        mIoU=float(official),
        mIoU_present=float(iou[present].mean()),
        fwIoU=float((iou[present] * truth[present]).sum() / total),
        accuracy=float(hits.sum() / total),
    )


def try_score(dataset):
    """End with a message unless val frames have labels and the metric works. Rank 0 only."""
    val = data.spread(dataset.split("val"), 3)
    require(any(count_labels(dataset, val).values()),
            f"{dataset.what}: none of the points of {len(val)} val frames has a class, so nothing "
            "could be scored at the end of the run; give the folder with their labels")
    name = dataset.grid.dataset
    try:
        score(name, np.eye(len(data.POINT_CLASSES[name]), dtype=np.int64))
    except Exception as error:
        raise SystemExit(f"the metric does not work ({first_line(error)}), so no run could be "
                         "scored at its end; install requirements.txt again") from error


def confusion_of(model, loader, folder, device):
    """Predict the val split, and write its result files for every point on disk.

    -> confusion (C, C) int64 over all processes, rows of the truth.
    """
    dataset = loader.dataset
    index = {name: i for i, name in enumerate(dataset.names)}
    C = len(data.POINT_CLASSES[dataset.grid.dataset])
    confusion = np.zeros(C * C, np.int64)
    model.eval()
    for batch in loader.once():
        for name, classes in zip(batch.names, model.predict(batch.to(device))):
            classes, truth = dataset.points_on_disk(index[name], classes)
            dataset.write_points(folder, index[name], classes)
            valid = truth >= 0
            confusion += np.bincount(C * truth[valid] + classes[valid], minlength=C * C)
    model.train()
    confusion = torch.from_numpy(confusion).to(device)
    return all_reduce(confusion).view(C, C).cpu().numpy()


def finish(model, cfg, out, val_loader, device, rank):
    """Predict the val split, score it, draw, print the table and the README row.

    results/, metrics.json and the figures are written into the folder `out`.
    """
    folder = Path(out)
    dataset = val_loader.dataset
    confusion = confusion_of(model, val_loader, folder / "results", device)
    destroy_group()
    if rank:
        return
    metrics = score(dataset.grid.dataset, confusion)
    write_text(folder / "metrics.json", to_json(
        metrics | dict(frames=len(val_loader.indices), confusion=confusion.tolist())))
    for (name, iou), points in zip(metrics["IoU"].items(), confusion.sum(1)):
        print(f"{name:22}{iou:8.4f}   of {points} points", flush=True)
    kind = "probe" if cfg.probe else "whole network"
    scores = " | ".join(f"{name} {metrics[name]:.4f}" for name in ("mIoU", "mIoU_present"))
    try:
        save_figures(model, val_loader, confusion, folder, device)
    finally:  # whatever becomes of the figures
        print(f"{out}: | {cfg.init} | {kind} | {labels_text(cfg)} | seed {cfg.seed} | {scores} |",
              flush=True)


def save_figures(model, loader, confusion, folder, device):
    """figures/segmentation.png of some val frames and figures/confusion.png: tests/figures.py."""
    tool = load_tool("figures")
    if not tool:
        return
    places = np.linspace(0, len(loader.indices) - 1, FIGURE_FRAMES).astype(int)
    jobs = [[(0, int(i), False)] for i in loader.indices[np.unique(places)]]
    shown = []
    model.eval()
    for batch in loader.batches(jobs):
        classes = model.predict(batch.to(device))[0]
        label = batch.extra["points_label"].numpy()
        name, = batch.names
        shown.append((name, batch.points[:, :3].numpy(), label, classes))
    model.train()
    tool.segment_figures(shown, confusion, data.POINT_CLASSES[loader.grid.dataset], folder)


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
