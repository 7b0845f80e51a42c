"""CMCR (Zhang and Hou, IJCV 2026, arXiv 2412.08973): image-to-LiDAR distillation that also keeps what only one of the two can know.

    python cmcr.py --data /nuscenes --gpus 6          # the released code's sizes, the published MoCo-v2 teacher
    python cmcr.py                                    # the embedded world, minutes on two CPU cores

Read with: common.py §1 project, sample_image; §3 VoxelResNet (point_features), ResNet; §5 info_nce; data.py Batch, crop_images.
What is kept is the point network: finetune.py --init RUN --modality lidar.

Why it is not contrast alone (our paraphrase; the statements are the paper's Theorems 1 and 2, after FactorCL, Liang et al., NeurIPS 2023): the best contrastive features
hold what point cloud and image have in common; if each also knows something of the task that the other does not, that part is lost, and the error stays above
what the cloud itself allows (1). Features G beside the shared F that explain the rest of their own modality, here by rebuilding hidden pixels and by occupancy, bring
it back, if F and G do not repeat each other (2).

[figure] is the overview figure, [code] the release of March 2026, [ours] what neither says; the paper's equations were not at hand, so sections stand instead.
The release lacks the replacement (3D features in masked cells) and collapses the point-pixel pairs to two a camera; here is what the figure shows.

    figure                 here                            meaning
    F^3D, G^3D             shared_3d, specific_3d          heads of a point's features in all levels; F of unit length
    F^2D, G^2D             shared_2d, specific_2d          heads of C5 (stride 32); F of unit length
    F-bar                  Codebook.quantise(F)            the nearest code, gradient straight through
    Z^2D, Z^3D             Z                               G + F-bar, what both decoders read
    L_NCE, L_c, L_rec      the same                        contrast, commitment, reconstruction of masked pixels
    L_occ, L_orth          the same                        occupancy (ALSO), F and G unlike each other
    -                      L_int                           intensity of a query's point (ALSO): in the code only
    -                      p, q; a, b                      unit features of a pair's point and pixel; their nearest codes

Departures:
  D1  Masks are whole cells of stride 32 of the cropped picture, as in the figure, exactly half of them; the release hides 16-pixel squares of the full picture.
  D2  Masked cells get the code of their points' mean feature, or a learned token where no point falls: the figure's replacement, which the release has not.
  D3  Pairs are distinct, visible, and shared by contrast and codebook; quantisation and decoding work on cells, not on the million pixels that interpolate them.
      A pixel's feature is read between cell centres (the code aligns corners), so beside a hidden cell it holds some of that.
  D4  One symmetric codebook step, sums taken over all processes first (the release averages them, so with six processes its first steps are a sixth of these).
      Counts are not kept: codes have unit length, so counts cancel.
  D5  L_rec is over masked pixels only; L_orth over F and G of both modalities, with one weight (the code has that of its voxels alone, here rows are points),
      divided by the rows of all processes, so that it does not grow with the batch.
  D6  Neighbours of a query are the nearest 32 within 1 m (the code's library takes some 32); queries are drawn anew each epoch, after the augmentation.
  D7  The trunk is the one that the detector loads (VoxelResNet, the data set's range and voxels, the mean of all five point features in a voxel; the age is 0 here,
      since only the key sweep is read) instead of a MinkUNet on the intensity of one point in each voxel of 0.1 m; on CUDA it and the teacher run in bfloat16.
      Of Waymo all lasers' points go in, queries start from TOP's rays.
  D8  The cross-modal code matching of the code is left out: over 400 codes of unit length it is a constant within 0.04 nats.
  D9  --teacher none trains a random ResNet along, so that the embedded world needs no download; the default with --data is frozen, as published.
  D10  Cuts are taken from pictures of the data set's size in data.py (times --image-scale), which show less height than those on disk, with an aspect within 10 % of the
       cut's and a share of the largest part of that aspect: 12 to 48 % of a nuScenes picture where the code keeps 30 to 100 % of any aspect from 14/9 to 17/9.
       They are shrunk by area, the code's without antialiasing.
  D11  The figure's L_kl on G^3D is left out: the code has no trace of it, and what it would need, classes of an image model, the method has not.
  D12  All 700 training scenes of nuScenes are seen; the release keeps a fixed 100 of them for choosing parameters.
"""
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import nn

import data
from common import (AllReduceSum, Run, ResNet, VoxelResNet, all_reduce, random_subset, bf16_autocast, cosine, destroy_group, evaluate, figure, frame_rngs, info_nce,
                    launch, record_frames, load_resnet, loss_curves, mean_over_ranks, parse, perplexity, load_tool, project, resume, sample_image, save, segment_sum, start,
                    wrap, write_text)

UNITS = "lidar",                                                    # what backbones.safetensors holds
MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", "a04e12f8"      # and the beginning of its MD5
STRIDE = 32                                                         # px, of C5: one cell
VAL_BATCHES = 3                                                     # held-out batches that are looked at [ours]


@dataclass
class Config:
    # the run
    data: str = ""                     # data set root, told apart by its folders; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # sizes: the released code's, or what two CPU cores do in minutes; default small exactly when no --data is given
    out: str = "runs/cmcr"             # run folder; the same command again resumes it
    gpus: int | None = None            # processes on this machine; 0: CPU; default 1 where CUDA is, else 0
    workers: int = 4                   # loader processes for each training process [ours]
    seed: int = 0                      # of everything: order, augmentation, masks, pairs, initial weights
    eval_every: int = 500              # steps between held-out terms; 500, small 50 [ours]
    save_every: int = 500              # steps between checkpoints; 500, small 80 [ours]
    profile: int = 0                   # steps to time instead of training; 0: train [ours]
    teacher: str = ""                  # moco, none (random, trained along), or weights with torchvision's names; default moco with --data and --resnet 50, else none D9
    # optimisation
    epochs: int = 10                   # 10 [code]; small 0: steps decide
    steps: int = 0                     # 0: epochs decide; small 320 [ours]
    batch: int = 2                     # frames a process; 2 [code, on 6 processes]
    lr: float = 1e-3                   # AdamW; 1e-3 [code], small 2e-3 [ours]
    lr_end: float = 1.0                # share of lr at the last step, along half a cosine; 1, constant [code]
    weight_decay: float = 0.01         # [code: the library's default]
    rotation: float = 3.1416           # rad, rotation U(-rotation, rotation) about z [code]; a quarter where the range lies ahead of the car only [ours]
    crop_h: int = 224                  # px, what a camera's picture is cut and resized to; 224 [code], small 128 [ours]
    crop_w: int = 416                  # px; 416 [code], small 224 [ours]
    image_scale: float = 1.0           # pictures are read at the data set's size times this, then cut; 1 [ours] D10
    crop_min_area: float = 0.3         # least share in area of the largest part of the cut's aspect; 0.3 [code: of the whole picture] D10
    crop_points: int = 1024            # a cut that shows fewer is drawn again, unless it shows 3/4 of the picture's points; 1024 [code], small 256 [ours]
    # networks
    resnet: Literal[18, 50] = 50       # teacher; 50 [code], small 18 [ours]
    width: int = 16                    # first sparse stage; the four levels have 1, 2, 4, 8 times that; 16 [code OpenPCDet], small 8 [ours]
    dims: int = 64                     # of F and G [code]
    # contrast and codebook
    pairs: int = 2048                  # most point-pixel pairs a process [code], small 1024 [ours]
    tau: float = 0.07                  # temperature [code]
    codes: int = 400                   # K; 400 [code], small 64 [ours]
    momentum: float = 0.999            # of the codes; 0.999 [code], small 0.99 [ours]: a few hundred steps
    beta: float = 0.25                 # of the commitment [code]
    # masked image modelling
    mask_cells: float = 0.5            # share of the cells of a masked picture [code]
    mask_images: float = 0.5           # share of the pictures that are masked [code]
    # occupancy
    queries: int = 2048                # a frame: a third each just behind a point, just before it, anywhere before it; 2048 [code], small 1024 [ours]
    depth: float = 0.1                 # m, behind and before [code]
    query_radius: float = 1.0          # m, neighbours of a query [code]
    neighbours: int = 32               # at most [code] D6
    w_orth: float = 1.2                # of L_orth; 1.2 [ours]: the gradient that the code's form has at first D5
    without: Literal["", "replacement", "codebook", "specific"] = ""  # ablations of the figure's parts [ours]


SMALL = dict(workers=0, eval_every=50, save_every=80, epochs=0, steps=320, lr=2e-3, crop_h=128, crop_w=224, crop_points=256, resnet=18, width=8, pairs=1024,
             codes=64, momentum=0.99, queries=1024)                 # explained in Config


def check(cfg):
    """Flags that contradict themselves, before anything is written."""
    for wrong, told in ((not min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
                         f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0, the other positive"),
                        (cfg.crop_h % STRIDE or cfg.crop_w % STRIDE or min(cfg.crop_h, cfg.crop_w) < STRIDE,
                         f"--crop-h {cfg.crop_h} --crop-w {cfg.crop_w}: masks are whole cells, give multiples of {STRIDE}"),
                        (not 0 < cfg.crop_min_area <= 1, f"--crop-min-area {cfg.crop_min_area}: expected more than 0 and at most 1"),
                        (not 0 <= cfg.mask_cells <= 1 or not 0 <= cfg.mask_images <= 1, "--mask-cells and --mask-images are shares: 0 to 1"),
                        (cfg.image_scale <= 0 or not 0 <= cfg.lr_end <= 1, f"--image-scale {cfg.image_scale} starts above 0, --lr-end {cfg.lr_end} lies in 0 to 1"),
                        (cfg.codes < 2, f"--codes {cfg.codes}: at least 2, or --without codebook"),
                        (cfg.teacher == "moco" and cfg.resnet != 50,
                         f"--teacher moco is a ResNet-50, --resnet is {cfg.resnet}: give --resnet 50, or --teacher none or WEIGHTS"),
                        (cfg.rotation < 0 or min(cfg.tau, cfg.query_radius) <= 0,
                         f"--rotation {cfg.rotation} starts at 0; --tau {cfg.tau} and --query-radius {cfg.query_radius} are positive"),
                        (min(cfg.batch, cfg.pairs, cfg.queries, cfg.neighbours, cfg.eval_every, cfg.save_every) < 1,
                         "--batch, --pairs, --queries, --neighbours, --eval-every and --save-every start at 1")):
        if wrong:
            raise SystemExit(told)


# ---- what a frame gives ----------------------------------------------------------------------------------------------------------

def occupancy_queries(xyz, intensity, origin, n, depth, rng):
    """Queries on the rays from the LiDAR to its points: behind a point (occupied), just before it, anywhere before it (both free) [code; ALSO].

    xyz (N, 3), intensity (N,), origin (3,) -> place (n, 3) m, occupied (n,), intensity (n,) of the point, -1 for the far ones; float32.
    """
    far = before = n // 3
    behind = n - far - before
    if len(xyz) == 0:
        return np.zeros((0, 3), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    rows = np.concatenate([np.resize(rng.permutation(len(xyz)), k) for k in (behind, before, far)])
    ray, u = xyz[rows] - origin, rng.random((n, 1))
    away = ray / np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-6)
    kind = np.repeat([0, 1, 2], (behind, before, far))[:, None]
    place = np.where(kind == 2, origin + u * ray, xyz[rows] + np.where(kind == 0, depth, -depth) * u * away)
    return place.astype(np.float32), (kind[:, 0] == 0).astype(np.float32), np.where(kind[:, 0] == 2, -1, intensity[rows]).astype(np.float32)


def random_crop(rng, size, uv, aspect, cfg):
    """A random part of a picture (H, W): area U(crop_min_area, 1) of the largest part of a drawn aspect, within 10 % of `aspect`; redrawn at most 50 times while it
    shows too few of the points at uv (n, 2) px; then the middle. -> top, left, height, width px, whole numbers. D10"""
    (H, W), enough = size, min(cfg.crop_points, 0.75 * len(uv))
    for attempt in range(51):
        shape, share = aspect * rng.uniform(0.9, 1.1), rng.uniform(cfg.crop_min_area, 1)
        height = min(H, W / shape) * (share ** 0.5 if attempt < 50 else 1)
        h, w = max(int(height), 1), max(int(height * shape), 1)
        top, left = (rng.integers(H - h + 1), rng.integers(W - w + 1)) if attempt < 50 else ((H - h) // 2, (W - w) // 2)
        within = ((uv >= (left, top)) & (uv < (left + w, top + h))).all(1).sum()
        if within >= enough:
            break
    return int(top), int(left), h, w


@dataclass(frozen=True)
class Views:
    """data.loader's augment: the key sweep turned and mirrored, a cut of each picture mirrored by its own coin, occupancy queries and their neighbours.

    -> points those of the key sweep in range; extra: queries (Q, 3) m, occupied (Q,), intensity (Q,), neighbours (Q, n) rows of points, nearest first, -1 for none.
    """
    grid: data.Grid
    cfg: Config

    def __call__(self, frame, rng):
        cfg, grid = self.cfg, self.grid
        frame = data.augment_cloud(frame, rng, cfg.rotation if grid.mirrors[0] else cfg.rotation / 4, 0.0, grid.mirrors)
        low, high = np.float32(grid.low), np.float32(grid.high)
        frame = data.select(frame, ((frame.points[:, :3] >= low) & (frame.points[:, :3] < high)).all(1) & data.is_keyframe(frame.points))
        size = cfg.crop_h, cfg.crop_w
        boxes, coins, seen = [], [], data.visible_points(frame.points, frame.lidar2img, [image.shape[1:] for image in frame.images])
        for image, matrix, mine in zip(frame.images, frame.lidar2img, seen):
            uvd = frame.points[mine, :3] @ matrix[:3, :3].T + matrix[:3, 3]
            boxes.append(random_crop(rng, image.shape[1:], uvd[:, :2] / uvd[:, 2:], size[1] / size[0], cfg))
            coins.append(rng.random() < 0.5)                        # mirrored [code]
        frame = data.crop_images(frame, boxes, [size] * len(boxes), coins)
        xyz, ray = frame.points[:, :3], frame.points[:, 4] == 0     # Waymo's other lasers' points are no rays from the origin
        queries, occupied, intensity = occupancy_queries(xyz[ray], frame.points[ray, 3], frame.origin, cfg.queries, cfg.depth, rng)
        near = np.full((len(queries), cfg.neighbours), -1, np.int64)
        if len(xyz):
            found = cKDTree(xyz).query(queries, cfg.neighbours, distance_upper_bound=cfg.query_radius)[1].reshape(near.shape)
            near = np.where(found < len(xyz), found, -1).astype(np.int64)
        return replace(frame, extra=dict(queries=queries, occupied=occupied, intensity=intensity, neighbours=near))


def mask_cells(cameras, shape, cfg, rngs):
    """Which cells of C5 to hide: exactly a share of them, in a share of the pictures. shape (h, w) -> (B K, h, w) bool, True = hidden."""
    n, masked = shape[0] * shape[1], []
    for g in rngs:
        order = torch.rand(cameras, n, generator=g, device=g.device).argsort(1).argsort(1)
        chosen = torch.rand(cameras, 1, generator=g, device=g.device) < cfg.mask_images
        masked.append((order < round(cfg.mask_cells * n)) & chosen)
    return torch.cat(masked).view(-1, *shape)


def pixels_of(cells):
    """cells (B K, h, w) of stride 32 -> their pixels (B K, 1, H, W)."""
    return cells.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)[:, None]


# ---- the codebook shared by both modalities --------------------------------------------------------------------------------------

class Codebook(nn.Module):
    """K unit codes that follow the pairs assigned to them: moving average, no gradient [figure, code]. D4"""

    def __init__(self, codes, dims, momentum):
        super().__init__()
        self.momentum = momentum
        start_ = F.normalize(torch.rand(codes, dims) * 2 - 1, dim=1)
        self.register_buffer("codes", start_)                      # (codes, D)
        self.register_buffer("total", start_.clone())              # (codes, D), decayed sums; the codes are their directions

    def nearest(self, x):
        """x (N, D) of unit length -> (N,) the code at the least distance, which is the greatest cosine."""
        return (x.detach() @ self.codes.t()).argmax(1)

    def quantise(self, x):
        """The nearest code, straight through: its gradient reaches x unchanged. x (N, D) -> (N, D)."""
        return x + (self.codes[self.nearest(x)] - x).detach()

    def commitment(self, x, own, other, beta):
        """Pull x (M, D) to its own code, half as much to its partner's -> (M,) [figure, code]."""
        return beta * (2 * (x - self.codes[own]).square().mean(1) + (x - self.codes[other]).square().mean(1))

    @torch.no_grad()
    def update(self, p, q, a, b):
        """One step: total <- momentum total + (1 - momentum) (sum of (p + q) / 2 over the pairs that either modality assigned). p, q (M, D), a, b (M,).

        A total begins with length 1, so a code with many pairs goes to their mean within a few steps; later it moves by about 1 - momentum.
        """
        both = (p + q) / 2
        total = torch.zeros_like(self.total).index_add_(0, torch.cat([a, b]), torch.cat([both, both]))
        self.total.mul_(self.momentum).add_(all_reduce(total), alpha=1 - self.momentum)
        self.codes.copy_(F.normalize(self.total, dim=1))


# ---- the method ------------------------------------------------------------------------------------------------------------------

def orthogonality(shared, specific):
    """|| F^T G ||_Frobenius / N over the unit rows of every process: 0 if no column of one goes with a column of the other, at most 1.
    shared, specific (N, D) -> ()."""
    product = AllReduceSum.apply(F.normalize(shared, dim=1).t() @ F.normalize(specific, dim=1))                         # (D, D)
    return product.norm() / all_reduce(product.new_tensor(float(len(shared)))).clamp_min(1)


class CMCR(nn.Module):
    """All losses of a batch. lidar is what fine-tuning loads; teacher, heads, codebook and decoders are thrown away."""

    def __init__(self, cfg, grid, frozen):
        super().__init__()
        self.cfg, self.grid, self.frozen, D = cfg, grid, frozen, cfg.dims
        self.lidar, self.teacher = VoxelResNet(grid.low, grid.high, grid.voxel, cfg.width), ResNet(cfg.resnet)
        self.teacher.requires_grad_(not frozen)
        C_3D, C_2D = 15 * cfg.width, self.teacher.widths[-1]
        self.shared_3d, self.shared_2d = nn.Linear(C_3D, D), nn.Conv2d(C_2D, D, 1)
        if cfg.without != "specific":
            self.specific_3d, self.specific_2d = nn.Linear(C_3D, D), nn.Conv2d(C_2D, D, 1)
        if cfg.without != "codebook":
            self.codebook = Codebook(cfg.codes, D, cfg.momentum)
        if cfg.without != "replacement":
            self.token = nn.Parameter(torch.randn(D) * D ** -0.5)
        self.paint = nn.Sequential(nn.Conv2d(D, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(inplace=True),
                                   nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid())                                                          # [code]
        self.occupancy = nn.Sequential(nn.Linear(D + 3, 128), nn.ReLU(inplace=True), nn.Linear(128, 128), nn.ReLU(inplace=True),
                                       nn.Linear(128, 128), nn.Linear(128, 2))                               # two linear ones in a row   [code; ALSO]
        self.train()                                                # a frozen teacher never is in training mode, not even before the first evaluation

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.teacher.eval()                                     # its batch norms stay as published
        return self

    def quantise(self, x):
        return x if self.cfg.without == "codebook" else self.codebook.quantise(x)

    def points_3d(self, batch):
        """-> F^3D (N, D) of unit length, Z^3D (N, D) = G^3D + F-bar^3D, G^3D (N, D) or None."""
        f = self.lidar.point_features(self.lidar(batch.points, batch.b_points), batch.points, batch.b_points)           # (N, 15 w)
        shared, specific = F.normalize(self.shared_3d(f), dim=1), None
        Z = self.quantise(shared)
        if self.cfg.without != "specific":
            specific = self.specific_3d(f)
            Z = Z + specific
        return shared, Z, specific

    def images_2d(self, images, masked):
        """images (B K, 3, H, W), hidden (B K, h, w) -> shared head's map (B K, D, h, w), cells F^2D (B K h w, D) of unit length, G^2D likewise or None."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), bf16_autocast(images.device):
            c5 = self.teacher.stages(images.masked_fill(pixels_of(masked), 0))[-1].float()            # (B K, C, h, w); hidden pixels are black [code]
        shared = self.shared_2d(c5)
        specific = None if self.cfg.without == "specific" else self.specific_2d(c5).permute(0, 2, 3, 1).flatten(0, 2)
        return shared, F.normalize(shared.permute(0, 2, 3, 1).flatten(0, 2), dim=1), specific

    def rebuild(self, masked, cells, specific, shared_3d, point, cell):
        """Pictures from Z^2D, in which a masked cell has its points' code. hidden (B K, h, w), cells, specific (B K h w, D), pairs' point (P,) into shared_3d, cell (P,)
        -> (n, 3, H, W) in [0, 1] of the n pictures with a hidden cell, share of hidden cells with a point ()."""
        masked_flat, n = masked.flatten(), cells.shape[0]
        Z, mine = self.quantise(cells), masked_flat[cell].nonzero()[:, 0]
        count = torch.bincount(cell[mine], minlength=n)[:, None]                                                        # (B K h w, 1) points
        if self.cfg.without != "replacement":                                                                           # D2
            total = segment_sum(shared_3d.index_select(0, point[mine]), cell[mine], n)
            held = self.quantise(F.normalize(total, dim=1))                                # quantise of the mean's direction
            Z = torch.where(masked_flat[:, None], torch.where(count > 0, held, self.token), Z)
        if specific is not None:
            Z = Z + specific
        Z = Z.view(*masked.shape, -1).permute(0, 3, 1, 2)[masked.flatten(1).any(1)]        # (n, D, h, w)
        covered = (count[masked_flat] > 0).float().sum() / masked_flat.sum().clamp_min(1)
        return self.paint(F.interpolate(Z, scale_factor=STRIDE, mode="bilinear")), covered

    def occupied(self, Z, batch):
        """Decoder on every edge from a point to a query near it. Z (N, D) -> (E, 2) occupancy logit and intensity, query (E,)."""
        count = torch.bincount(batch.b_points, minlength=batch.size)
        first = count.cumsum(0) - count                                                    # (B,)
        near = batch.extra["neighbours"]                                                   # (Q, neighbours)
        query, k = (near >= 0).nonzero(as_tuple=True)
        s = near[query, k] + first[batch.extra["b_neighbours"][query]]                     # (E,) into the points
        offset = batch.extra["queries"][query] - batch.points[s, :3]
        return self.occupancy(torch.cat([Z.index_select(0, s), offset], 1)), query

    def forward(self, batch):
        """-> L (), {name: ()}."""
        cfg, rngs = self.cfg, frame_rngs(batch.seeds, batch.points.device)
        h, w = cfg.crop_h // STRIDE, cfg.crop_w // STRIDE

        # 1 both modalities, the pictures with cells hidden
        masked = mask_cells(batch.cameras, (h, w), cfg, rngs)                        # (B K, h, w)             D1
        F_3D, Z_3D, G_3D = self.points_3d(batch)                                           # (N, D) each
        shared, F_2D, G_2D = self.images_2d(batch.images, masked)                          # (B K, D, h, w), (B K h w, D) each

        # 2 what points and visible pixels share: contrast, codebook
        point, image, uv, cell = self.pairs(batch)                                         # (P,) each, uv (P, 2)
        i = random_subset(cfg.pairs, (~masked.flatten()[cell]).nonzero()[:, 0], rngs[0])   # (M,) visible pairs      D3
        p = F_3D.index_select(0, point[i])                                                 # (M, D); the gradient of x[i] has no fixed order on a CPU
        q = F.normalize(sample_image(shared, image[i], uv[i], batch.images.shape[-2:]), dim=1)                          # (M, D)
        L_NCE = mean_over_ranks(info_nce(p, q, cfg.tau).sum(), len(i))                                                  # [code], points ask
        L = L_NCE                                                                                                       # [figure]
        terms = dict(L_NCE=L_NCE, chance=math.log(max(len(i), 1)), distinct=len(torch.unique(point[i] * len(batch.images) + image[i])) / max(len(i), 1))
        if cfg.without != "codebook":
            a, b = self.codebook.nearest(p), self.codebook.nearest(q)                      # (M,) codes before this step's update
            L_c3D = mean_over_ranks(self.codebook.commitment(p, a, b, cfg.beta).sum(), len(i))                          # [code]
            L_c2D = mean_over_ranks(self.codebook.commitment(q, b, a, cfg.beta).sum(), len(i))                          # [figure], [code]
            L = L + L_c3D + L_c2D                                                                                       # [figure: L_c2D], [code]
            terms |= dict(L_c3D=L_c3D, L_c2D=L_c2D, perplexity_3D=perplexity(a, cfg.codes), perplexity_2D=perplexity(b, cfg.codes),
                          agreement=(a == b).float().sum() / max(len(i), 1))

        # 3 what each alone knows: hidden pixels from codes of both, occupancy and intensity from points
        rebuilt, covered = self.rebuild(masked, F_2D, G_2D, F_3D, point, cell)             # (n, 3, H, W)            D2
        some = masked.flatten(1).any(1)
        pixels = pixels_of(masked[some])
        truth = batch.images[some].float() / 255                                           # (n, 3, H, W)
        mean = (truth * ~pixels).sum((2, 3), keepdim=True) / (~pixels).sum((2, 3), keepdim=True).clamp_min(1)           # (n, 3, 1, 1) of what is visible

        def error(x):                                                                      # over hidden pixels and channels
            return mean_over_ranks(((x - truth).square() * pixels).sum() / 3, int(pixels.sum()))
        L_rec = error(rebuilt)                                                                                          # [figure]  D5
        out, query = self.occupied(Z_3D, batch)                                            # (E, 2), (E,)            D6
        occupied, intensity = batch.extra["occupied"][query], batch.extra["intensity"][query]
        known = (intensity >= 0).float()
        L_occ = mean_over_ranks(F.binary_cross_entropy_with_logits(out[:, 0], occupied, reduction="sum"), len(out))     # [figure], [code; ALSO]
        L_int = mean_over_ranks(((out[:, 1] - intensity).abs() * known).sum(), int(known.sum()))                        # [code; ALSO]
        L = L + L_rec + L_occ + L_int                                                                                   # [figure], [code: L_int]
        share = occupied.sum() / max(len(occupied), 1)
        terms |= dict(L_rec=L_rec, guess_rec=error(mean), covered=covered, L_occ=L_occ, chance_occ=F.binary_cross_entropy(share, share), L_int=L_int,
                      edges=float(len(out)))
        if cfg.without != "specific":
            visible = ~masked.flatten()
            L_orth = orthogonality(F_3D, G_3D) + orthogonality(F_2D[visible], G_2D[visible])                            # [figure]  D5
            L = L + cfg.w_orth * L_orth                                                                                 # [figure], weight [ours]
            terms["L_orth"] = L_orth
        if self.training and cfg.without != "codebook":
            self.codebook.update(p.detach(), q.detach(), a, b)
        return L, terms

    def pairs(self, batch):
        """Every pair of a point and a picture that shows it: point (P,), picture (P,), uv (P, 2) px, cell (P,) into (B K h w)."""
        point, image, uv, _ = project(batch.points[:, :3], batch.b_points, batch.lidar2img, batch.hw, batch.size, near=1.0)          # m [code]
        u, v = (uv / STRIDE).long().unbind(1)
        return point, image, uv, (image * (self.cfg.crop_h // STRIDE) + v) * (self.cfg.crop_w // STRIDE) + u


# ---- the teacher -----------------------------------------------------------------------------------------------------------------

def load_teacher(name, resnet, rank, cache):
    """moco: the published file, fetched once into cache / teachers, its MD5 checked; else a file or run folder with torchvision's names."""
    if name != "moco":
        return load_resnet(name, resnet, rank)
    url, digest = MOCO
    path = cache / "teachers" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.locked(path):                                         # one process fetches it, the others wait
        try:
            if not path.is_file():
                torch.hub.download_url_to_file(url, str(path), progress=rank == 0)         # aside, then renamed
        except OSError as error:
            raise SystemExit(f"--teacher moco: {url} could not be fetched ({error}). Put that file at {path}, or give --teacher WEIGHTS, or --teacher none") from error
    found = hashlib.md5(path.read_bytes()).hexdigest()
    if not found.startswith(digest):
        raise SystemExit(f"{path}: its MD5 begins with {found[:8]}, expected {digest}; delete it and run again, or fetch {url} yourself")
    load_resnet(path, resnet, rank, prefix="module.encoder_q.")


# ---- figures ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def save_figures(model, batch, out):
    """figures/reconstruction.png, codes.png and occupancy.png of a held-out batch; the last two of its first frame."""
    model.eval()
    cfg, K = model.cfg, batch.cameras
    h, w = cfg.crop_h // STRIDE, cfg.crop_w // STRIDE
    masked = mask_cells(K, (h, w), cfg, frame_rngs(batch.seeds, batch.points.device))
    F_3D, Z_3D, _ = model.points_3d(batch)
    _, F_2D, G_2D = model.images_2d(batch.images, masked)
    point, image, uv, cell = model.pairs(batch)
    rebuilt, _ = model.rebuild(masked, F_2D, G_2D, F_3D, point, cell)
    masked_flat = masked.flatten(1).any(1).nonzero()[:, 0]
    panels = []
    for n, k in enumerate(masked_flat[:3].tolist()):
        truth = batch.images[k].permute(1, 2, 0).cpu()
        cover = pixels_of(masked)[k].permute(1, 2, 0).cpu()
        panels += [(f"picture {k}: truth", truth), ("what the teacher saw", truth * ~cover),
                   ("hidden cells rebuilt", torch.where(cover, (rebuilt[n].permute(1, 2, 0).cpu() * 255).byte(), truth))]
    if panels:
        figure(Path(out) / "figures" / "reconstruction.png", panels, 3, (4.4, 2.7))

    first = batch.b_points == 0
    xyz = batch.points[first, :3].cpu()
    if cfg.without != "codebook":
        look = dict(cmap="gist_rainbow", vmin=0, vmax=cfg.codes)
        colour = torch.as_tensor(np.random.default_rng(0).permutation(cfg.codes))
        of_points, of_cells = model.codebook.nearest(F_3D[first]).cpu(), model.codebook.nearest(F_2D).cpu().view(-1, h, w)[:K]

        def above(ax):
            ax.scatter(-xyz[:, 1], xyz[:, 0], 0.6, colour[of_points], **look)
            ax.set_aspect("equal")

        def use(ax):
            for n, ids in enumerate((of_points, of_cells.flatten())):
                ax.bar(np.arange(cfg.codes) + 0.4 * n, torch.bincount(ids, minlength=cfg.codes) / len(ids), 0.4)
        panels = [("codes of the points from above", above), ("how often each code is taken: points blue, cells orange", use)]
        for k in range(min(K, 3)):
            mine = (image == k)

            def over(ax, k=k, mine=mine):
                ax.imshow(batch.images[k].permute(1, 2, 0).cpu() // 2 + 100)
                ax.scatter(*uv[mine].t().cpu(), 4, colour[model.codebook.nearest(F_3D[point[mine]]).cpu()], **look)
                ax.axis("off")
            panels += [(f"picture {k}: codes of its points", over),
                       ("codes of its cells, some hidden", colour[of_cells[k]].numpy(), look)]
        figure(Path(out) / "figures" / "codes.png", panels, 2, (5.0, 3.4))

    def rays(ax):
        """Probability of being occupied along a few rays, from the points within reach; the ray's own point at 0."""
        rng, at, curves = np.random.default_rng(0), np.linspace(-0.8, 0.8, 33), []
        tree, origin = cKDTree(xyz.numpy()), batch.origin[0].cpu().numpy()
        rays_own = (batch.points[first, 4].cpu().numpy() == 0) & (np.linalg.norm(xyz.numpy() - origin, axis=1) > 0)     # Waymo's other lasers shot from elsewhere
        for n in rng.permutation(np.flatnonzero(rays_own))[:200]:
            ray = xyz[n].numpy() - origin
            places = xyz[n].numpy() + at[:, None] * ray / np.linalg.norm(ray)
            near = tree.query(places.astype(np.float32), cfg.neighbours, distance_upper_bound=cfg.query_radius)[1].reshape(len(at), -1)
            q, k = np.nonzero(near < len(xyz))
            s = torch.as_tensor(near[q, k])
            offset = torch.as_tensor(places[q], dtype=torch.float32) - xyz[s]
            logit = model.occupancy(torch.cat([Z_3D[first][s.to(Z_3D.device)], offset.to(Z_3D.device)], 1))[:, 0].sigmoid().cpu().numpy()
            mean = np.bincount(q, logit, len(at)) / np.maximum(np.bincount(q, minlength=len(at)), 1)
            curves.append(np.where(np.bincount(q, minlength=len(at)) > 0, mean, np.nan))
            if len(curves) <= 30:
                ax.plot(at, curves[-1], color="0.8", lw=0.7)
        ax.plot(at, np.nanmean(curves, 0), "C0", lw=2)
        ax.axvline(0, color="0.4", ls="--")
        ax.set_ylim(0, 1)
    if len(xyz):
        figure(Path(out) / "figures" / "occupancy.png", [("occupied? against metres behind the ray's point; 30 rays in grey, mean of 200 in blue", rays)], 1, (6.0, 4.0))
    model.train()


# ---- training --------------------------------------------------------------------------------------------------------------------

def train(rank, world, cfg):
    cfg = replace(cfg, teacher=cfg.teacher or ("moco" if cfg.data and cfg.resnet == 50 else "none"))
    check(cfg)

    # data
    dataset = data.open_dataset(cfg.data, cfg.preset)
    dataset.grid = replace(dataset.grid, sweeps=1)                  # Views keeps no other; D7
    views = Views(dataset.grid, cfg)
    size = tuple(round(cfg.image_scale * n) for n in dataset.grid.image)
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed, workers=cfg.workers, augment=views, image=size)
    val_loader = data.loader(dataset, "val", 2, augment=views, image=size)

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = CMCR(cfg, dataset.grid, frozen=cfg.teacher != "none")
    if model.frozen:
        load_teacher(cfg.teacher, model.teacher.resnet, rank, data.cache_dir())
    device = start(cfg, rank, world)
    model.to(device)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling").profile(cfg, net, loader, [opt], device, rank, lidar=(model.lidar, "forward"), camera=(model.teacher, "stages"),
                                              rebuild=(model, "rebuild"), occupancy=(model, "occupied"))

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, opt)                             # 0 when there is nothing to resume
    record_frames(Path(cfg.out) / "frames.txt", dataset, loader.indices, first, rank)      # for fine-tuning: what was seen
    run = Run(cfg, rank, world, first, steps, device, f"lr {cfg.lr:g} not rescaled, teacher {cfg.teacher}")
    val_batches = val_loader.first(VAL_BATCHES)                     # the same on every rank and for every seed

    # train
    for step, batch in run.batches(loader, first):
        if step % cfg.eval_every == 0:
            run.log(step, ["held-out frames"], prefix="val_", **evaluate(model, val_batches, device))
        lr = cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * cosine(step, 0, steps))
        for group in opt.param_groups:
            group["lr"] = lr
        loss, terms = net(batch)
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])
        run.log(step, batch.names, loss=loss, **terms, grad_norm=norm, lr=lr)                                # raises before the update if one is not finite
        opt.step()
        stop = run.interrupted()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            save(cfg, step + 1, model, [opt], UNITS, dataset.grid)
        if stop:
            run.leave(step)

    # results
    run.close()
    found = {k: round(v, 4) for k, v in evaluate(model, val_batches, device).items()}       # by every process: means are over all of them
    destroy_group()
    if rank == 0:
        write_text(Path(cfg.out) / "metrics.json", json.dumps(found, indent=1))
        save_figures(model, val_batches[0].to(device), cfg.out)
        loss_curves(cfg.out, {"L_NCE": (found["chance"],), "L_rec": (found["guess_rec"],), "L_occ": (found["chance_occ"],)})
        print(json.dumps(found))
        print(f"{cfg.out}: held-out L_NCE {found['L_NCE']} (chance {found['chance']}), L_rec {found['L_rec']} (the picture's mean {found['guess_rec']}), "
              f"L_occ {found['L_occ']} (chance {found['chance_occ']})")


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
