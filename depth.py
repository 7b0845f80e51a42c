"""Depth at the LiDAR's points from one picture: what the features of an image network know.

    python depth.py --init runs/simipu --probe        # one linear layer on frozen features
    python depth.py --init none --probe --out runs/none_depth  # the baseline
    python depth.py --init runs/simipu                # the whole image network, few labels
    python depth.py --eval-only runs/depth            # score again

Read with: common.py §1 project, sample_image, §8 ResNet, collect_statistics; data.py Batch.
Source: SimIPU's depth task (Li et al., AAAI 2022, arXiv 2112.04680, Table 3) and Eigen's metrics.
[paper] and [code] mark SimIPU's paper and its toolbox, [ours] our choice.

    maps of stride 8, 16, 32 -> bilinear at projected points of the sweep (M, C)
    -> batch norm without weights -> linear -> 64 bins of log depth
    depth = geometric mean of the bins under the softmax

The guess beside each metric is the depth of labelled points at the same place in the picture.
The linear layer does not know the camera: lenses of another focal length mislead it.

Departures:
  D1  One linear layer replaces the DenseDepth decoder; the stage of stride 4 is not read.
  D2  Truth is one sweep's points, not eleven scans; points behind nearer ones are left out.
  D3  Cross-entropy over bins from 1 to 70 m replaces SigLoss.
  D4  AdamW with our rates; no augmentation, no flip test; --probe freezes the image network.
  D5  Our data sets and splits, not Eigen's. Garg's crop is for KITTI alone, of pictures as read:
      those have lost 2 % of their columns before, 3 % in the small preset.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
from common import (
    constant, project, valid_pixels, sample_image,  # geometry
    ResNet, BatchNorm, collect_statistics, segment_sum, bf16_autocast,  # networks
    frame_rngs, random_subset,  # random streams
    all_reduce, mean_over_ranks,  # processes
    parse, require, check_numbers, launch, init_process, start, wrap, resume, save,  # runs: skip
    cosine, to_json, rank0_first, lock_run_folder, run_config, stored_config, check_run,
    read_units, load_units, load_resnet, labelled_frames, describe_draw, labels_text,
    describe_scored, destroy_group, Run, loss_curves, load_tool, write_text,
)

UNITS = "camera.resnet", "norm", "head"  # what backbones.safetensors holds
NEAR, FAR = 1e-3, 80.0       # m, depths that count [code]
BINS, FIRST, LAST = 64, 1.0, 70.0  # bins of log depth, and their range, m [ours] D3
RADIUS, MUCH_NEARER = 4, 0.7  # px, and share of a depth: what hides a point [ours] D2
GARG = (0.03594771, 0.40810811), (0.96405229, 0.99189189)  # low, high share of u, v [code]
CELL = 4, 16                 # rows and columns of a place in the picture, px [ours]
STATISTICS_FRAMES = 24       # that a frozen network's statistics are of [ours]
TABLE_FRAMES = 1000          # most labelled frames that the guess is of [ours]
CACHE_BYTES = 2**30          # most memory for a frozen network's maps [ours]
METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog",
           "delta1", "delta2", "delta3")
SHOWN = dict(abs_rel="abs rel", rmse="RMSE", delta1="delta")  # in the last line


@dataclass
class Config:
    # the run
    data: str = ""             # root of the data set; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # default: as --init; else small without --data
    out: str = "runs/depth"    # run folder; the same command again resumes it
    gpus: int | None = None    # processes on this machine; 0: CPU; default 1 with CUDA, else 0
    workers: int = 4           # loader processes for each rank [ours]
    seed: int = 0              # of drawn labels, order, drawn points, initial weights
    save_every: int = 500      # steps between checkpoints [ours]
    profile: int = 0           # steps to time instead of training; 0: train [ours]
    eval_only: str = ""        # run folder to only score again; --data: its data's new root

    # what is learned from
    init: str = "none"         # run folder of a pre-training, or none
    image_init: str = ""       # or a file of weights with torchvision's names
    probe: bool = False        # the image network stays as it is
    fraction: float = 0.0      # share of the frames; 0: 1 with --probe, else 0.05 [ours]
    draw: Literal["frames", "scenes", "every"] = "frames"  # every: every k-th [ours]
    labels: str = ""           # file with the names of the frames to learn from, instead
    points: int = 800          # most points of a frame in a step [ours]

    # optimisation
    epochs: int = 24           # over the drawn frames; 0: steps decide [code]
    steps: int = 0             # 0: epochs decide; both 0: 300 with --probe, else 60 [ours]
    batch: int = 8             # frames for each rank [code]
    accumulate: int = 1        # batches of a step, one after the other [ours]
    lr: float = 1e-2           # of the linear layer; half a cosine to 0 [ours] D4
    lr_network: float = 3e-3   # of a new image network [ours]
    lr_pretrained: float = 1e-3  # of a loaded one [ours]
    warmup: int = 200          # steps from a third of lr, at most a quarter of all [ours]
    weight_decay: float = 0.01  # of AdamW [ours]
    clip: float = 35.0         # gradient norm [code]

    # network
    resnet: Literal[18, 50] = 50  # image backbone, as in the pre-training [paper]


# --preset small: minutes on two CPU cores; all [ours]
SMALL = dict(workers=0, save_every=100, epochs=0, batch=4, warmup=10, resnet=18)


def with_defaults(cfg):
    """The Config with the fraction and the steps that --probe, or its absence, stands for."""
    steps, fraction = (300, 1.0) if cfg.probe else (60, 0.05)
    if cfg.epochs or cfg.steps:
        steps = cfg.steps
    return replace(cfg, steps=steps, fraction=cfg.fraction or fraction)


def check_flags(cfg):
    """Refuse flags that cannot work, before the data set is opened."""
    check_numbers(
        cfg, "batch accumulate save_every fraction points lr lr_network lr_pretrained clip",
        dict(workers=256, fraction=1))
    require(min(cfg.epochs, cfg.steps) == 0,
            f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0")
    require(cfg.init == "none" or not cfg.image_init,
            f"--image-init {cfg.image_init}: --init {cfg.init} brings an image network too; "
            "give one of them")
    if cfg.init != "none":
        read_units(cfg.init)  # refused before the embedded world is written


# ---- points and their depths ---------------------------------------------------------

def depth_points(batch, dataset=""):
    """Points that a picture shows and that none much nearer hides.  D2

    Hidden: another is less than MUCH_NEARER times as far, at most RADIUS pixels away along rows
    and along columns. dataset: of KITTI's, only those in Garg's crop of their picture.
    -> image (M,) row of batch.images, uv (M, 2) px, depth (M,) m, sorted by image.
    """
    _, image, uv, depth = project(
        batch.points[:, :3], batch.counts, batch.lidar2img, batch.hw, NEAR, FAR)
    # D2: the LiDAR stands above the cameras and sees what they do not
    images, _, H, W = batch.images.shape
    column, row = uv.long().unbind(1)
    pixel = (image * H + row) * W + column
    nearest = torch.full((images * H * W,), FAR, device=depth.device)
    nearest = nearest.scatter_reduce(0, pixel, depth, "amin").view(images, 1, H, W)
    nearest = -F.max_pool2d(-nearest, 2 * RADIUS + 1, 1, RADIUS)
    rows = nearest.flatten()[pixel] >= MUCH_NEARER * depth
    if dataset == "kitti":  # D5
        low, high = constant(GARG, uv.device)
        share = uv / batch.hw.flip(1)[image]
        rows &= ((share > low) & (share < high)).all(1)
    return image[rows], uv[rows], depth[rows]


def drawn_points(batch, most):
    """As depth_points, at most so many of each frame, the same ones in any batch."""
    image, uv, depth = depth_points(batch)
    counts = torch.bincount(image // batch.cameras, minlength=batch.size).tolist()
    frames = torch.arange(len(image), device=image.device).split(counts)
    rngs = frame_rngs(batch.seeds, image.device)
    rows = torch.cat([random_subset(most, own, rng) for own, rng in zip(frames, rngs)])
    return image[rows], uv[rows], depth[rows]


def encode(depth):
    """depth (M,) m -> its bin (M,) int64, the first or the last one beyond their range."""
    share = (depth / FIRST).log() / math.log(LAST / FIRST)
    return (share * BINS).long().clamp(0, BINS - 1)


def decode(logits):
    """logits (M, BINS) -> (M,) m, the geometric mean of the bins under the softmax."""
    centre = (torch.arange(BINS, device=logits.device) + 0.5) / BINS
    return FIRST * (LAST / FIRST) ** (logits.softmax(1) @ centre)


# ---- the network ---------------------------------------------------------------------

class DepthNet(nn.Module):
    """camera.resnet may be pre-trained; head is new; table is the guess's."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg = cfg
        self.camera = ResNet(cfg.resnet).requires_grad_(not cfg.probe)
        channels = sum(self.camera.widths)
        self.norm = BatchNorm(channels).requires_grad_(False)  # one scale, whatever the init
        self.head = nn.Linear(channels, BINS)  # D1
        nn.init.zeros_(self.head.weight)
        places = [-(-size // cell) for size, cell in zip(grid.image, CELL)]  # rows, columns
        shape = len(grid.cameras), *places, 2  # the last: number of points, sum of log depths
        self.register_buffer("table", torch.zeros(shape, dtype=torch.float64))
        self.cache = {}  # of a frozen network: its maps of a training frame
        self.train()

    def train(self, mode=True):
        """A frozen network stays in eval mode."""
        super().train(mode)
        self.camera.train(mode and not self.cfg.probe)
        return self

    def maps(self, images, hw):
        """images (n, 3, H, W) uint8, hw (n, 2) px -> 3 x (n, C, h, w) of stride 8, 16, 32."""
        images = F.pad(images, (0, -images.shape[-1] % 32, 0, -images.shape[-2] % 32))
        padding = ~valid_pixels(hw, images.shape[-2:])
        with bf16_autocast(images.device):
            return [stage.float() for stage in self.camera.stages(images, padding)]

    def frozen_maps(self, batch):
        """As maps. Each frame's alone: the same in any batch, so that they can be kept."""
        parts = []
        frames = batch.images.split(batch.cameras), batch.hw.split(batch.cameras)
        for name, images, hw in zip(batch.names, *frames):
            maps = self.cache.get(name) or self.maps(images, hw)
            room = CACHE_BYTES // sum(stage.nbytes for stage in maps)
            if self.training and len(self.cache) < room:
                self.cache[name] = maps
            parts.append(maps)
        return [torch.cat(stages) for stages in zip(*parts)]

    def logits(self, batch, image, uv):
        """Of the bins at pixels. image (M,), uv (M, 2) px -> (M, BINS)."""
        maps = self.frozen_maps(batch) if self.cfg.probe else self.maps(batch.images, batch.hw)
        size = [side + -side % 32 for side in batch.images.shape[-2:]]  # px that the maps cover
        features = torch.cat([sample_image(stage, image, uv, size) for stage in maps], 1)
        return self.head(self.norm(features))

    def forward(self, batch):
        """-> L (), {term: ()}."""
        image, uv, depth = drawn_points(batch, self.cfg.points)
        logits = self.logits(batch, image, uv)  # (M, BINS)
        loss = F.cross_entropy(logits, encode(depth), reduction="sum")
        L = mean_over_ranks(loss, len(depth))  # [ours] D3
        error = (decode(logits.detach()) - depth).abs() / depth
        return L, dict(abs_rel=mean_over_ranks(error.sum(), len(depth)))

    def place(self, image, uv):
        """The place in the picture of each pixel -> camera, row, column of the table, (M,) each."""
        row, column = (uv.flip(1) / constant(CELL, uv.device)).long().unbind(1)
        return image % len(self.table), row, column

    def guess(self, image, uv):
        """Geometric-mean depth of the labelled points at each pixel's place -> (M,) m.

        Where there is none: of those in the same rows of that camera, or of all.
        """
        rows = self.table.sum(2, keepdim=True)
        table = self.table.where(self.table[..., :1] > 0, rows)
        table = table.where(table[..., :1] > 0, self.table.sum((0, 1, 2)))
        count, log_depth = table[self.place(image, uv)].unbind(1)
        return (log_depth / count).exp()


@torch.no_grad()
def measure(model, cfg, dataset, drawn, device, rank, world):
    """Before the first step: a frozen network's statistics, and the table of the guess.

    The statistics are of frames of the whole train split, the table is of those drawn.
    """
    if cfg.probe:
        loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed,
                             workers=cfg.workers)
        batches = loader.first(max(STATISTICS_FRAMES // (cfg.batch * world), 1))
        collect_statistics(model.camera, lambda images: model.maps(*images), [
            (batch.images.to(device), batch.hw.to(device)) for batch in batches])
    loader = data.loader(dataset, "train", 1, rank, world, workers=cfg.workers,
                         indices=data.spread(drawn, TABLE_FRAMES))
    for batch in loader.once():
        image, uv, depth = depth_points(batch.to(device))
        values = torch.stack([torch.ones_like(depth), depth.log()], 1).double()
        model.table.index_put_(model.place(image, uv), values, accumulate=True)
    model.table.copy_(all_reduce(model.table))


# ---- training ------------------------------------------------------------------------

def train(rank, world, cfg):
    if cfg.eval_only:
        return rescore(rank, world, cfg)
    cfg = with_defaults(cfg)
    check_flags(cfg)

    # data
    dataset = data.open_dataset(cfg.data, cfg.preset, sweeps=1, labels=False)
    data.announce(dataset, cfg.batch)
    drawn = labelled_frames(cfg, dataset, dataset.split("train"))
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed, workers=cfg.workers,
                         indices=drawn, accumulate=cfg.accumulate)
    val_loader = data.loader(dataset, "val", 1, rank, world, cfg.seed, workers=cfg.workers)
    for name, indices in (("train", drawn), ("val", val_loader.indices)):
        frames = data.loader(dataset, name, 1, indices=indices).once()
        require(any(len(depth_points(frame, dataset.grid.dataset)[0]) for frame in frames),
                f"{dataset.what}: no picture of the {len(indices)} {name} frames shows a point; "
                "check the calibration, or give other frames")

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = DepthNet(cfg, dataset.grid)
    loaded = cfg.init != "none" or cfg.image_init != ""
    if cfg.image_init:
        load_resnet(cfg.image_init, model.camera.resnet, rank)
    elif loaded:
        load_units(cfg.init, model, (), ["camera.resnet"], dataset.grid, rank)
    device = start(cfg, rank, world, dataset, drawn, "labels.txt")
    model.to(device)
    groups = [dict(params=model.head.parameters(), base=cfg.lr)]
    if not cfg.probe:
        base = cfg.lr_pretrained if loaded else cfg.lr_network
        groups.append(dict(params=model.camera.parameters(), base=base))
    opt = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=True)  # D4
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling", "--profile").profile(
            cfg, net, loader, [opt], device, rank, cfg.fraction, camera=(model.camera, "stages"))

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, opt)  # 0 when there is nothing to resume
    if not first:
        measure(model, cfg, dataset, drawn, device, rank, world)
    if rank == 0:
        counts = model.table[..., 0].sum((1, 2)).long().tolist()
        describe_draw(cfg, "points with depth", dict(zip(dataset.grid.cameras, counts)))
    run = Run(cfg, rank, world, first, steps, device, f"lr {cfg.lr:g}")

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
        # raises if a term is not finite, before the update
        run.log(step, batches, terms, grad_norm=norm, lr=cfg.lr * rate)
        opt.step()
        stop = run.interrupted()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            save(cfg, step + 1, model, [opt], UNITS, dataset.grid)
        if stop:
            run.leave(step)

    # results
    run.close()
    finish(model, cfg, cfg.out, val_loader, device, rank)
    if rank == 0:
        loss_curves(cfg.out)


def rescore(rank, world, cfg):
    """--eval-only RUN: score again, with its own configuration and weights."""
    require("lr_network" in run_config(cfg.eval_only) and "points" in run_config(cfg.eval_only),
            f"--eval-only {cfg.eval_only}: not a run of depth.py; give a folder that it wrote")
    trained = stored_config(Config, cfg.eval_only)
    trained = replace(trained, data=cfg.data or trained.data, workers=cfg.workers)
    dataset = data.open_dataset(trained.data, trained.preset, sweeps=1, labels=False)
    data.announce(dataset, trained.batch)
    val_loader = data.loader(dataset, "val", 1, rank, world, workers=trained.workers)
    device = init_process(cfg, world)
    rank0_first(rank, lambda: lock_run_folder(Path(cfg.eval_only)))
    model = DepthNet(trained, dataset.grid).to(device)
    rank0_first(rank, lambda: check_run(cfg.eval_only, trained, dataset, model,
                                        ("preset", "resnet", "probe")))
    step = resume(cfg.eval_only, model)
    if rank == 0:
        describe_scored(cfg.eval_only, step, dataset)
    finish(model, trained, cfg.eval_only, val_loader, device, rank)


# ---- results -------------------------------------------------------------------------

def image_metrics(predicted, truth, image, images):
    """METRICS of each image that has a point, I of them. Source: Eigen's evaluation.

    predicted, truth (M,) m, image (M,) in [0, images) -> (I, 9) float64.
    """
    predicted, truth = predicted.double(), truth.double()
    error = predicted - truth
    g = predicted.log() - truth.log()
    terms = [error.abs() / truth, error ** 2 / truth, error ** 2, g ** 2, g.abs() / math.log(10), g]
    terms += [(g.abs() < k * math.log(1.25)).double() for k in (1, 2, 3)]
    count = torch.bincount(image, minlength=images)[:, None]
    means = (segment_sum(torch.stack(terms, 1), image, images) / count)[count[:, 0] > 0]
    abs_rel, sq_rel, square, log_square, log10, log, *deltas = means.unbind(1)
    silog = 100 * (log_square - log ** 2).clamp_min(0).sqrt()
    roots = square.sqrt(), log_square.sqrt()
    return torch.stack([abs_rel, sq_rel, *roots, log10, silog, *deltas], 1)


@torch.no_grad()
def finish(model, cfg, out, val_loader, device, rank):
    """Score every point of the val split beside the guess; metrics.json, figure, table, row."""
    model.eval()
    total = torch.zeros(2, len(METRICS) + 1, dtype=torch.float64, device=device)
    for batch in val_loader.once():
        batch = batch.to(device)
        image, uv, depth = depth_points(batch, val_loader.grid.dataset)
        predicted = decode(model.logits(batch, image, uv))
        if not predicted.isfinite().all():
            raise FloatingPointError(f"{', '.join(batch.names)}: a predicted depth is not finite: "
                                     "the weights are broken, go back to an earlier checkpoint")
        for row, depths in enumerate((predicted, model.guess(image, uv))):
            values = image_metrics(depths, depth, image, len(batch.images))
            total[row] += F.pad(values, (0, 1), value=1.0).sum(0)
    total = all_reduce(total)
    destroy_group()
    if rank:
        return
    means = (total[:, :-1] / total[:, -1:]).tolist()
    metrics, guess = [dict(zip(METRICS, row)) for row in means]
    write_text(Path(out) / "metrics.json",
               to_json(metrics | dict(guess=guess, pictures=int(total[0, -1]))))
    for name, value in metrics.items():
        print(f"{name:10}{value:8.3f}   guess {guess[name]:8.3f}")
    try:
        tool = load_tool("figures")
        if tool:
            tool.depth_figure(model, depth_points, decode, val_loader, device, out)
    finally:  # whatever becomes of the figure
        mode = "probe" if cfg.probe else "whole network"
        scores = " | ".join(f"{title} {metrics[name]:.3f} (guess {guess[name]:.3f})"
                            for name, title in SHOWN.items())
        print(f"{out}: | {cfg.image_init or cfg.init} | {mode} | {labels_text(cfg)} "
              f"| seed {cfg.seed} | {scores} |", flush=True)


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
