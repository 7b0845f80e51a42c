"""SimIPU (Li et al., AAAI 2022, arXiv 2112.04680): an image network learns 3-D by matching its features to those of a point network, which learns from itself.

    python simipu.py --data /kitti --gpus 8           # the released code's sizes
    python simipu.py                                  # the embedded world, minutes on two CPU cores

Read with: common.py §1 project, sample_image; §2 pair_points; §3 ResNet; §5 info_nce; data.py Batch, crop_images.
What is kept is the image network: finetune.py --init RUN --modality camera, or any torchvision ResNet (keys of camera.resnet, minus fc).

[paper] is the paper, [code] the released inter_intro_decorator_moco_better.py and simipu_kitti.py, [ours] what neither says.

    paper                  here                        meaning
    p^alpha, p^beta        alpha, beta                 the cloud as recorded, and moved by T; (B, n, 4) x, y, z, intensity
    T                      T; a2b in the batch         turn, scale, mirror as one 4 x 4 matrix                  Eq. 1
    F_P; l, f              points; l_*, f_*            point network; its points' places and features           Eq. 2
    M_1                    i, j                        Hungarian pairs of T(l_alpha) with l_beta                Eq. 3
    F_I                    camera.resnet               ResNet, last stage (C5)                                  Eq. 5
    M_2; f^gamma           k, image, uv; f_image       points that a picture sees, and C5 where they are seen   Eq. 6
    lambda, mu, tau        w_intra, w_inter, tau       weights of the two losses, temperature                   Eq. 8, 4

Without the inter-modal loss the image network learns nothing (the paper's row "w/o inter" is its row "scratch"); without the intra-modal one it matches a random,
frozen point network. The points of a frame fall on few cells of stride 32: cell_inter, the mean log of the pairs in one cell, is where L_inter would stop if
features were read from the nearest cell. They are interpolated, so it can go below, but the network has no more than those cells to say it with.

Departures:
  D1  Eq. 7 as printed: points ask, images answer, and f_alpha is cut *before* its head, which therefore learns. In the code image features are the queries and the cut is
      after the head, which so keeps its random initial weights.
  D2  beta is a constant in Eq. 4, as in the code; the paper does not say. Both losses are means over pairs (the paper writes sums).
  D3  Relative coordinates go into every set abstraction, as in the two works it cites; the released configuration leaves them out (intensity alone).
  D4  The last sampling takes half of the points from the feature-sampled block and half from the distance-sampled one, split at their border, as 3DSSD means it;
      the code's split is a left-over of other sizes.
  D5  Sampling of C5 divides by the size of the padded batch, in the area convention; a point that no camera sees makes no pair. The code divides by each image's
      own size and lets unseen points read zeros.
  D6  Images are RGB with ImageNet's mean and deviation, their network's batch norms are torchvision's: weights go in and out without a change; residual blocks begin as
      identities, the point network as torch draws it (the code's as mmcv does). Batch norms over points and pairs count every process's rows (the code's only
      their own), those of the point network with eps 1e-3 throughout (the code's 1e-5 where shells are joined); on CUDA the image network runs in bfloat16.
  D7  With several cameras a point's pair is in the first that sees it; clouds are cut to what some camera sees, as the paper's are to the one, of the key sweep alone.
      Of Waymo all five cameras are used (the paper: the front one).
  D8  At most 4096 pairs a process: the paper's number is the code's 4 frames of 1024; negatives are those of the same process.
  D9  Pictures have the data set's size in data.py before they are resized at random, not that on disk.
  D10  Of Waymo every fifth frame is seen, as the release's README says, and of KITTI the 3,712 of the training split, as in its configuration; the paper counts all
      of Waymo's, and KITTI's test frames too (11,230).
  D11  The small preset trains image network and heads with AdamW. With the code's SGD at 0.03 and two frames a step the first layer became a blur of brightness
      within ten steps (`stem` 45 to 2) while L_inter fell as if all were well; whether that happens at the code's batch of 32 is not known: look at `stem`.
"""
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import nn

import data
from common import (BatchNorm, Run, ResNet, random_subset, bf16_autocast, destroy_group, evaluate, figure, frame_rngs, valid_pixels, info_nce, launch, record_frames,
                    load_resnet, loss_curves, mean_over_ranks, mlp, pair_points, parse, load_tool, project, resume, sample_image, save, start, wrap, write_text)

UNITS = "camera.resnet",                                            # what backbones.safetensors holds            FORK 3
RADII = (0.2, 0.4, 0.8), (0.4, 0.8, 1.6), (1.6, 3.2, 4.8)           # m, outer radii of the shells of the three set abstractions [code]
NEIGHBOURS = (32, 32, 64), (32, 32, 64), (16, 16, 16)               # most points in each [code]
WAYMO_EVERY = 5                                                     # of Waymo's frames every n-th is seen [code: its README] D10
VAL_BATCHES = 3                                                     # held-out batches that are looked at [ours]


@dataclass
class Config:
    # the run
    data: str = ""                     # data set root, told apart by its folders; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # sizes: the released code's, or what two CPU cores do in minutes; default small exactly when no --data is given
    out: str = "runs/simipu"           # run folder; the same command again resumes it
    gpus: int | None = None            # processes on this machine; 0: CPU; default 1 where CUDA is, else 0
    workers: int = 4                   # loader processes for each training process [ours]
    seed: int = 0                      # of everything: order, points, T, pictures' sizes, initial weights
    eval_every: int = 500              # steps between held-out terms; 500, small 50 [ours]
    save_every: int = 500              # steps between checkpoints; 500, small 100 [ours]
    profile: int = 0                   # steps to time instead of training; 0: train [ours]
    image_init: str = ""               # weights that the image network starts from, torchvision's names: the paper's "double fine-tuning"; empty: random
    # optimisation
    epochs: int = 50                   # 50 [code: every published weight file is of epoch 50 of 100]; small 0: steps decide
    steps: int = 0                     # 0: epochs decide; small 300 [ours]
    batch: int = 4                     # frames a process; 4 [code, on 8 processes], small 2 [ours]
    lr_points: float = 1e-3            # of the point network, AdamW with betas 0.95, 0.99 and weight decay 0.01 [code]
    optimiser: Literal["sgd", "adamw"] = "sgd"  # of the image network and the heads; sgd, momentum 0.9, weight decay 1e-4 [code], small adamw, 0.01 [ours] D11
    lr: float = 0.03                   # of the same; 0.03 [code], small 1e-3 [ours]
    decay: float = 0.99                # of both learning rates, an epoch [code]
    # the two views
    points: int = 16384                # points drawn of a cloud, of which a sixteenth is matched; 16384 [code], small 4096 [ours]
    rotation: float = 1.5708           # rad, T turns by U(-rotation, rotation) about z [code]
    scale: float = 0.25                # T scales by U(1 - scale, 1 + scale); y is mirrored with probability 1/2, the pictures with it; no translation [code]
    zoom_low: float = 0.515            # pictures are resized by the smaller of two draws from U(zoom_low, zoom_high); 0.515 [code], small 0.75 [ours]
    zoom_high: float = 1.92            # 1.92 [code], small 1.5 [ours]
    # networks
    resnet: Literal[18, 50] = 50       # image network; 50 [paper], small 18 [ours]
    width: int = 32                    # first layers of the point network; its points have 32 times that; 32 [code], small 16 [ours]
    radius_scale: float = 1.0          # factor of RADII; 1 [code], small 2 [ours]: the embedded LiDAR is a third as dense
    dims: int = 128                    # of what is compared [paper]
    # losses
    match: Literal["hungarian", "greedy"] = "hungarian"  # greedy: row by row, each partner once, as the code has it and never calls it [code]; Table 5's "repeats"
    pairs: int = 4096                  # most pairs of either loss a process [paper] D8
    tau: float = 0.07                  # temperature [code]
    w_intra: float = 1.0               # lambda [code]; 0 leaves the point network's weights as they were drawn: the paper's ablation
    w_inter: float = 1.0               # mu [code]


SMALL = dict(workers=0, eval_every=50, save_every=100, epochs=0, steps=300, batch=2, points=4096, zoom_low=0.75, zoom_high=1.5, resnet=18, width=16,
             optimiser="adamw", lr=1e-3, radius_scale=2.0)          # explained in Config


def check(cfg):
    """Flags that contradict themselves, before anything is written."""
    for wrong, told in ((not min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
                         f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0, the other positive"),
                        (cfg.points < 64 or cfg.points % 32, f"--points {cfg.points}: a multiple of 32, at least 64; a sixteenth is matched, half from each sampler"),
                        (cfg.w_intra < 0 or cfg.w_inter < 0 or not cfg.w_intra + cfg.w_inter, "--w-intra and --w-inter: not negative and not both 0"),
                        (not 0 <= cfg.scale < 1 or cfg.rotation < 0, f"--rotation {cfg.rotation}, --scale {cfg.scale}: from 0, and scale below 1"),
                        (min(cfg.tau, cfg.radius_scale) <= 0, f"--tau {cfg.tau} and --radius-scale {cfg.radius_scale} are positive"),
                        (not 0 < cfg.zoom_low <= cfg.zoom_high, f"--zoom-low {cfg.zoom_low} --zoom-high {cfg.zoom_high}: expected 0 < low <= high"),
                        (min(cfg.batch, cfg.eval_every, cfg.save_every, cfg.pairs) < 1, "--batch, --pairs, --eval-every and --save-every start at 1")):
        if wrong:
            raise SystemExit(told)


# ---- two views of a cloud: FORK 1, what a frame gives ----------------------------------------------------------------------------

def random_transform(rng, centre, rotation, scale):
    """T: turn about the vertical through `centre` (3,), then scale about the origin, then mirror y half of the time [code]. -> (4, 4) float64, mirrored bool."""
    angle, size, mirrored = rng.uniform(-rotation, rotation), rng.uniform(1 - scale, 1 + scale), bool(rng.random() < 0.5)
    T = np.eye(4)
    T[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    T[:3, 3] = centre - T[:3, :3] @ centre
    T[:3] *= size
    T[1] *= -1 if mirrored else 1
    return T, mirrored


def farthest_points(xyz, count):
    """D-FPS: from row 0 on, always the point farthest from those chosen. xyz (n, 3) -> (count,) int64. In the loader's workers: numpy in, numpy out.

    Invariant to rotation, mirroring and scaling of the cloud. Greedy: the first k of a sample are the sample of k, from the cloud or from any larger sample of it.
    """
    planes, chosen = np.ascontiguousarray(xyz.T, np.float32), np.zeros(count, np.int64)
    nearest, square, parts = np.full(len(xyz), np.inf, np.float32), np.empty(len(xyz), np.float32), np.empty_like(planes)
    for i in range(1, count):
        np.subtract(planes, planes[:, chosen[i - 1], None], out=parts)
        np.multiply(parts, parts, out=parts)
        np.add(parts[0], parts[1], out=square)
        np.add(square, parts[2], out=square)
        np.minimum(nearest, square, out=nearest)
        chosen[i] = nearest.argmax()
    return chosen


@dataclass(frozen=True)
class TwoViews:
    """data.loader's augment: draws the points, T, and the pictures' size and side; what of the sampling needs no feature is done here, in the worker.

    -> points the same n rows for both views, in view alpha's order; extra: a2b (4, 4) T; order (n,) rows of alpha in beta's order; first_alpha, first_beta (n / 4,)
    D-FPS of each; seen (1,) how many points of the frame were to draw from. One that shows fewer than n / 64 counts as empty: n points far apart, seen 0.
    """
    grid: data.Grid
    points: int
    rotation: float
    scale: float
    zoom: tuple[float, float]

    def __call__(self, frame, rng):
        low, high, cloud = np.array(self.grid.low), np.array(self.grid.high), frame.points
        seen = data.visible_points(cloud, frame.lidar2img, [image.shape[1:] for image in frame.images]).any(0)
        rows = ((cloud[:, :3] > low) & (cloud[:, :3] < high)).all(1) & data.is_keyframe(cloud) & seen
        rows = rows.nonzero()[0] if rows.sum() >= self.points / 64 else np.zeros(0, np.int64)          # copies of a few points would be neighbours by the million
        T, mirrored = random_transform(rng, (low + high) / 2, self.rotation, self.scale)
        whole, factor = [(0, 0, *image.shape[1:]) for image in frame.images], min(rng.uniform(*self.zoom, 2))
        frame = data.crop_images(frame, whole, [(max(round(h * factor), 1), max(round(w * factor), 1)) for _, _, h, w in whole], [mirrored] * len(whole))
        if len(rows):                                               # in random order; with repetition if there are too few
            frame = data.select(frame, rng.choice(rows, self.points, replace=len(rows) < self.points))
        else:
            apart = np.outer(100.0 * np.arange(self.points), [1, 0, 0, 0, 0])               # m: nobody's neighbours
            frame = replace(frame, points=apart.astype(np.float32))
        order = rng.permutation(self.points)
        first = [farthest_points(frame.points[at, :3], self.points // 4) for at in (slice(None), order)]
        return replace(frame, extra=dict(a2b=T.astype(np.float32), order=order, first_alpha=first[0], first_beta=first[1], seen=np.array([len(rows)])))


# ---- the point network -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def farthest_features(x, count):
    """F-FPS: the greedy choice of farthest_points in the space of x = (xyz, feature), frame by frame. x (B, n, C) -> (B, count) int64."""
    x = x - x.mean(1, keepdim=True)                                                        # the expanded square cancels less
    square = x.square().sum(2)
    distance = torch.baddbmm(square[:, :, None] + square[:, None], x, x.transpose(1, 2), alpha=-2)                      # (B, n, n)
    frames, nearest = torch.arange(len(x), device=x.device), torch.full_like(square, math.inf)
    chosen = torch.zeros(len(x), count, dtype=torch.int64, device=x.device)
    for i in range(1, count):
        torch.minimum(nearest, distance[frames, chosen[:, i - 1]], out=nearest)
        chosen[:, i] = nearest.argmax(1)
    return chosen


@torch.no_grad()
def ball_query(centres, sources, radii, most):
    """Neighbours of each centre in spherical shells: the first k sources, in their order, with r_in <= d < r_out; a source at distance 0 is in every shell.

    Fewer than k are filled up with the first. centres (B, m, 3) are among sources (B, n, 3) m, radii increasing, most a k for each
    -> [(B m, k) int64 rows of the (B n) sources]. Sources are sorted into cells as wide as the largest radius; three cells in a row are one run. [ours]
    """
    (B, m, _), n, device = centres.shape, sources.shape[1], centres.device
    low, width = sources.amin((0, 1)), 1.001 * radii[-1]
    shape = ((sources.amax((0, 1)) - low) / width).long() + 3                              # a cell of border on every side
    plane, row = int(shape[0] * shape[1]), int(shape[0])

    def key(xyz):
        x, y, z = ((xyz - low) / width).long().unbind(2)
        return ((torch.arange(B, device=device)[:, None] * shape[2] + z + 1) * plane + (y + 1) * row + x + 1).flatten()
    keys, order = key(sources).sort(stable=True)
    around = torch.tensor([dz * plane + dy * row for dz in (-1, 0, 1) for dy in (-1, 0, 1)], device=device)
    wanted = key(centres)[:, None] + around                                                # (B m, 9): the middle of each run of three cells
    begin, end = torch.searchsorted(keys, wanted - 1), torch.searchsorted(keys, wanted + 1, right=True)
    count = (end - begin).flatten()
    run = torch.repeat_interleave(count)                                                   # (P,) which run each candidate is in
    source = order[(begin.flatten() - count.cumsum(0) + count)[run] + torch.arange(len(run), device=device)]
    centre = run // 9
    square = (sources.flatten(0, 1)[source] - centres.flatten(0, 1)[centre]).square().sum(1)                            # (P,) m^2
    near = (square < radii[-1] ** 2).nonzero()[:, 0]
    near = near[(centre[near] * (B * n) + source[near]).argsort()]
    centre, source, square = centre[near], source[near], square[near]
    found = []
    for inner, outer, k in zip((0.0, *radii), radii, most):
        hit = ((square < outer ** 2) & (square >= inner ** 2) | (square == 0)).nonzero()[:, 0]
        c, s = centre[hit], source[hit]
        first = torch.searchsorted(c, torch.arange(B * m, device=device))
        rank = torch.arange(len(c), device=device) - first[c]
        neighbours, kept = s[first][:, None].repeat(1, k), (rank < k).nonzero()[:, 0]
        neighbours[c[kept], rank[kept]] = s[kept]
        found.append(neighbours)
    return found


def layers(*widths):
    """Linear, batch norm, ReLU between each two widths."""
    return nn.Sequential(*(part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b, bias=False), BatchNorm(b, eps=1e-3), nn.ReLU(inplace=True))))


class SetAbstraction(nn.Module):
    """PointNet++: a shared network on the neighbours in each shell, their maximum, and one layer on all shells together."""

    def __init__(self, inputs, widths, outputs, radii, most):
        super().__init__()
        self.radii, self.most = radii, most
        self.shells = nn.ModuleList(layers(inputs + 3, *w) for w in widths)
        self.aggregate = layers(sum(w[-1] for w in widths), outputs)

    def forward(self, xyz, f, chosen):
        """xyz (B, n, 3) m, f (B, n, C), chosen (B, m) -> xyz (B, m, 3), f (B, m, C')."""
        centres, out = xyz.gather(1, chosen[..., None].expand(-1, -1, 3)), []              # (B, m, 3)
        rows = torch.cat([xyz, f], 2).flatten(0, 1)                                        # (B n, 3 + C)
        for network, near in zip(self.shells, ball_query(centres, xyz, self.radii, self.most)):
            x = rows.index_select(0, near.flatten()).view(*near.shape, -1)                 # (B m, k, 3 + C); the gradient of x[i] has no fixed order on a CPU
            x = torch.cat([x[..., :3] - centres.flatten(0, 1)[:, None], x[..., 3:]], 2)    # relative coordinates           D3
            x = network(x.flatten(0, 1)).view(*near.shape, -1)                             # (B m, k, C'')
            out.append(x.amax(1))
        return centres, self.aggregate(torch.cat(out, 1)).view(*chosen.shape, -1)


class PointEncoder(nn.Module):
    """F_P: three set abstractions, n -> n/4 -> n/8 -> n/16 points, w = 32: 128, 256, 1024 features [code]."""

    def __init__(self, w, radius_scale):
        super().__init__()
        self.channels = 32 * w
        radii = [tuple(radius_scale * r for r in shells) for shells in RADII]

        def stage(inputs, a, outputs, level):
            return SetAbstraction(inputs, [(a, a, 2 * a), (a, a, 2 * a), (2 * a, 2 * a, 4 * a)], outputs, radii[level], NEIGHBOURS[level])
        self.stage1, self.stage2 = stage(1, w, 4 * w, 0), stage(4 * w, 2 * w, 8 * w, 1)
        self.stage3 = stage(8 * w, 4 * w, 32 * w, 2)

    def forward(self, points, first):
        """points (B, n, 4), first (B, n/4) their D-FPS -> l (B, n/16, 3) m, f (B, n/16, 32 w), row (B, n/16) of points that each is. Source: 3DSSD."""
        m = points.shape[1] // 16
        spread = torch.arange(m, device=points.device).expand(len(points), m)              # the first m of a D-FPS order are a D-FPS
        l, f = self.stage1(points[..., :3], points[..., 3:], first)                        # D-FPS
        fused = torch.cat([farthest_features(torch.cat([l, f], 2), m), spread], 1)         # FS: F-FPS and D-FPS of all
        l, f = self.stage2(l, f, fused)
        chosen = torch.cat([farthest_features(torch.cat([l, f], 2)[:, :m], m // 2), m + spread[:, :m // 2]], 1)          # of each block       D4
        l, f = self.stage3(l, f, chosen)
        return l, f, first.gather(1, fused.gather(1, chosen))


# ---- matching --------------------------------------------------------------------------------------------------------------------

def greedy_pairs(a, b):
    """Row by row the nearest that is still free [code]. a, b (n, 3) -> (n,) rows of b."""
    cost, pairs = cdist(a, b), np.zeros(len(a), np.int64)
    for i in range(len(a)):
        pairs[i] = cost[i].argmin()
        cost[:, pairs[i]] = np.inf
    return pairs


# ---- the method: FORK 2, the losses ----------------------------------------------------------------------------------------------

class SimIPU(nn.Module):
    """Both losses of a batch. camera.resnet is what is kept; the point network and the heads are thrown away."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.points, self.camera = PointEncoder(cfg.width, cfg.radius_scale), ResNet(cfg.resnet)
        P, C = self.points.channels, self.camera.widths[-1]
        self.head_intra, self.head_point, self.head_image = (nn.Sequential(mlp(c, c, c, cfg.dims), BatchNorm(cfg.dims)) for c in (P, P, C))
        for weight, parts in ((cfg.w_intra, (self.points, self.head_intra)), (cfg.w_inter, (self.camera, self.head_point, self.head_image))):
            for part in parts:
                part.requires_grad_(weight > 0)

    def views(self, batch):
        """-> alpha, beta (B, n, 4), T (B, 4, 4)."""
        alpha, a2b = batch.points.view(batch.size, -1, 5)[..., :4], batch.extra["a2b"].view(-1, 4, 4)
        moved = torch.cat([transform_points(a2b, alpha[..., :3]), alpha[..., 3:]], 2)                                              # Eq. 1
        return alpha, moved.gather(1, batch.extra["order"].view(batch.size, -1, 1).expand(-1, -1, 4)), a2b

    @torch.no_grad()
    def pair(self, moved, l_beta, id_alpha, id_beta):
        """Pairs within each frame. moved, l_beta (B, p, 3), ids (B, p): the same for the same point -> j (B p,) row of l_beta for each row of moved."""
        def of_frame(a, b, id_a, id_b):
            return pair_points(a, b, id_a, id_b) if self.cfg.match == "hungarian" else greedy_pairs(a, b)
        with ThreadPoolExecutor() as threads:                       # scipy lets the others run: a batch takes as long as its slowest frame
            found = list(threads.map(of_frame, *(part.cpu().numpy() for part in (moved, l_beta, id_alpha, id_beta))))
        return torch.as_tensor(np.concatenate([j + n * len(j) for n, j in enumerate(found)]), device=moved.device)

    def image_features(self, images, hw):
        """images (B K, 3, H, W) uint8, hw (B K, 2) -> C5 (B K, C, h, w), size (2,) px that it is of: that of the batch, up to whole cells of stride 32."""
        H, W = images.shape[-2:]
        images = F.pad(images, (0, -W % 32, 0, -H % 32))
        with bf16_autocast(images.device):
            return self.camera.stages(images, ~valid_pixels(hw, images.shape[-2:]))[-1].float(), images.shape[-2:]

    @torch.no_grad()
    def in_images(self, l, batch):
        """Where each point is seen, in the first of the frame's pictures that sees it. l (B, p, 3) -> row (M,) of (B p), image (M,), uv (M, 2) px."""
        b = torch.arange(batch.size, device=l.device).repeat_interleave(l.shape[1])
        point, image, uv, _ = project(l.flatten(0, 1), b, batch.lidar2img, batch.hw, batch.size)
        first = torch.full((len(b),), len(point), device=l.device).scatter_reduce_(0, point, torch.arange(len(point), device=l.device), "amin")
        first = first[first < len(point)]                                                                               # D7
        return point[first], image[first], uv[first]

    def forward(self, batch):
        """-> L (), {name: ()}."""
        cfg = self.cfg

        # 1 two views of each cloud
        alpha, beta, T = self.views(batch)                                                 # (B, n, 4) both          Eq. 1
        first_alpha, first_beta, order = (batch.extra[name].view(batch.size, -1) for name in ("first_alpha", "first_beta", "order"))
        l_alpha, f_alpha, row_alpha = self.points(alpha, first_alpha)                      # (B, p, 3), (B, p, C)    Eq. 2
        with torch.no_grad():                                                              # beta is a constant      D2
            l_beta, f_beta, row_beta = self.points(beta, first_beta)                       # (B, p, 3), (B, p, C)    Eq. 2

        # 2 intra-modal: pair the views one to one, contrast
        moved = transform_points(T, l_alpha)
        j = self.pair(moved, l_beta, row_alpha, order.gather(1, row_beta))                 # (B p,)                  Eq. 3
        alive = (batch.extra["seen"] > 0).repeat_interleave(l_alpha.shape[1])
        i = random_subset(cfg.pairs, alive.nonzero()[:, 0], frame_rngs(batch.seeds[:1], alive.device)[0])               # (M,) into (B p)         D8
        z_alpha = self.head_intra(f_alpha.flatten(0, 1).index_select(0, i))                # (M, 128)
        with torch.no_grad():
            z_beta = self.head_intra(f_beta.flatten(0, 1)[j[i]])                           # (M, 128)
        L_intra = mean_over_ranks(info_nce(z_alpha, z_beta, cfg.tau).sum(), len(i))                                     # Eq. 4

        # 3 inter-modal: where each point lands, what the image says there; only the image network learns
        c5, padded = self.image_features(batch.images, batch.hw)                           # (B K, C, h, w)          Eq. 5
        k, image, uv = self.in_images(l_alpha, batch)                                      # (M',) into (B p)        Eq. 6
        kept = random_subset(cfg.pairs, alive[k].nonzero()[:, 0], frame_rngs(batch.seeds[:1], alive.device)[0])         # D8
        k, image, uv = k[kept], image[kept], uv[kept]
        f_image = sample_image(c5, image, uv, padded)                                      # (M', C)                 Eq. 6  D5
        z_point = self.head_point(f_alpha.detach().flatten(0, 1)[k])                       # (M', 128)               D1
        z_image = self.head_image(f_image)                                                 # (M', 128)
        L_inter = mean_over_ranks(info_nce(z_point, z_image, cfg.tau).sum(), len(k))                                    # Eq. 7
        L = cfg.w_intra * L_intra + cfg.w_inter * L_inter                                                               # Eq. 8

        with torch.no_grad():
            distance = (moved.flatten(0, 1)[i] - l_beta.flatten(0, 1)[j[i]]).norm(dim=1) / torch.linalg.det(T[:, :3, :3]).abs().pow(1 / 3)[i // l_alpha.shape[1]]
            cell = (uv / 32).long()
            terms = dict(L_intra=L_intra, L_inter=L_inter, matched_median=quantile(distance, 0.5), matched_p90=quantile(distance, 0.9),
                         chance_intra=math.log(max(len(i), 1)), chance_inter=math.log(max(len(k), 1)),
                         floor_intra=log_multiplicity(row_alpha.flatten()[i] + i // l_alpha.shape[1] * alpha.shape[1]),
                         cell_inter=log_multiplicity((image * 4096 + cell[:, 1]) * 4096 + cell[:, 0]),
                         stem=effective_rank(self.camera.resnet.conv1.weight), std_alpha=feature_std(z_alpha), std_point=feature_std(z_point), std_image=feature_std(z_image))
        return L, terms


def transform_points(a2b, xyz):
    """a2b (B, 4, 4), xyz (B, n, 3) m -> (B, n, 3)."""
    return xyz @ a2b[:, :3, :3].transpose(1, 2) + a2b[:, None, :3, 3]


def quantile(x, q):
    return x.quantile(q) if len(x) else x.new_zeros(())


def log_multiplicity(ids):
    """Mean over rows of log(rows with the same id): the lower bound of InfoNCE if equal ids have equal features. ids (M,) -> ()."""
    _, where, count = torch.unique(ids, return_inverse=True, return_counts=True)
    return count[where].float().log().sum() / max(len(ids), 1)


def effective_rank(weight):
    """How many directions the filters of a layer share evenly, (sum of l)^2 / sum of l^2 over their Gram matrix' eigenvalues l: all of them if orthogonal and of one
    length, 1 if they are multiples of one. weight (N, ...) -> ()."""
    gram = weight.flatten(1) @ weight.flatten(1).t()                                       # (N, N)
    return gram.trace().square() / gram.square().sum()


def feature_std(z):
    """Standard deviation of the unit features over rows, mean over dimensions: 0.088 for 128 that are spread evenly, near 0 if all collapse."""
    return F.normalize(z, dim=1).std(0, correction=0).mean() if len(z) else z.new_zeros(())


# ---- figures ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def save_figures(model, batch, out):
    """figures/matches.png and similarity.png of a held-out batch's first frame."""
    import matplotlib.pyplot as plt
    model.eval()
    alpha, beta, T = model.views(batch)
    first_alpha, first_beta, order = (batch.extra[name].view(batch.size, -1) for name in ("first_alpha", "first_beta", "order"))
    l_alpha, f_alpha, row_alpha = model.points(alpha, first_alpha)
    l_beta, _, row_beta = model.points(beta, first_beta)
    moved = transform_points(T, l_alpha)
    j = model.pair(moved, l_beta, row_alpha, order.gather(1, row_beta))[:l_alpha.shape[1]].cpu()
    back = transform_points(torch.linalg.inv(T), l_beta)[0].cpu()[j]                                  # (p, 3) where each partner was in alpha
    here, distance = l_alpha[0].cpu(), (l_alpha[0].cpu() - back).norm(dim=1)

    def matches(ax):
        ax.scatter(-alpha[0, :, 1].cpu(), alpha[0, :, 0].cpu(), 0.3, "0.8")
        colours = plt.get_cmap("turbo")((distance / 2).clamp(max=1))
        for a, b, colour in zip(here, back, colours):
            ax.plot([-a[1], -b[1]], [a[0], b[0]], "-", color=colour, lw=1.2)
        ax.scatter(-here[:, 1], here[:, 0], 4, colours)
        ax.set_aspect("equal")

    def histogram(ax):
        ax.hist(distance.clamp(max=5).numpy(), np.linspace(0, 5, 51))
    panels = [(f"{len(here)} pairs, blue 0 m to red 2 m or more", matches), ("m between partners, 5 or more in the last bin", histogram)]
    figure(Path(out) / "figures" / "matches.png", panels, 2, (6.0, 6.0))

    c5, (H, W) = model.image_features(batch.images[:batch.cameras], batch.hw[:batch.cameras])   # (K, C, h, w)
    cells = F.normalize(model.head_image(c5.permute(0, 2, 3, 1).flatten(0, 2)), dim=1).view(len(c5), *c5.shape[-2:], -1)
    k, image, uv = model.in_images(l_alpha[:1], replace(batch, size=1, hw=batch.hw[:batch.cameras], lidar2img=batch.lidar2img[:batch.cameras]))
    ask, panels = F.normalize(model.head_point(f_alpha[0]), dim=1), []
    for camera in range(min(batch.cameras, 3)):
        mine = (image == camera).nonzero()[:, 0]
        mine = mine[uv[mine, 0].argsort()]
        for at in mine[[int(len(mine) * share) for share in (0.15, 0.5, 0.85)]] if len(mine) else []:
            seen = torch.einsum("hwc,c->hw", cells[camera], ask[k[at]])
            seen = F.interpolate(seen[None, None], size=(H, W), mode="bilinear")[0, 0].cpu()
            h, w = batch.hw[camera].tolist()

            def picture(ax, camera=camera, seen=seen, at=at, h=h, w=w):
                ax.imshow(batch.images[camera, :, :h, :w].permute(1, 2, 0).cpu())
                ax.imshow(seen[:h, :w], cmap="turbo", alpha=0.5, vmin=-1, vmax=1)
                ax.plot(*uv[at].cpu(), "w+", ms=14, mew=2)
                ax.axis("off")
            panels.append((f"camera {camera}: similarity to the point at +", picture))
    if panels:
        figure(Path(out) / "figures" / "similarity.png", panels, 3, (5.0, 2.2))
    model.train()


# ---- training --------------------------------------------------------------------------------------------------------------------

def train(rank, world, cfg):
    check(cfg)

    # data
    dataset = data.open_dataset(cfg.data, cfg.preset)
    dataset.grid = replace(dataset.grid, sweeps=1)                  # TwoViews keeps no other; D7
    augment = TwoViews(dataset.grid, cfg.points, cfg.rotation, cfg.scale, (cfg.zoom_low, cfg.zoom_high))
    every = WAYMO_EVERY if dataset.grid.dataset == "waymo" else 1
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed, workers=cfg.workers, augment=augment, indices=dataset.split("train")[::every])
    val_loader = data.loader(dataset, "val", 2, augment=augment)

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = SimIPU(cfg)
    if cfg.image_init:
        load_resnet(cfg.image_init, model.camera.resnet, rank)
    device = start(cfg, rank, world)
    model.to(device)
    rest = [p for part in (model.camera, model.head_intra, model.head_point, model.head_image) for p in part.parameters()]
    opts = [torch.optim.AdamW(model.points.parameters(), lr=cfg.lr_points, betas=(0.95, 0.99), weight_decay=0.01),                    # [code]
            torch.optim.AdamW(rest, lr=cfg.lr, weight_decay=0.01) if cfg.optimiser == "adamw" else                                    # [ours] D11
            torch.optim.SGD(rest, lr=cfg.lr, momentum=0.9, weight_decay=1e-4)]                                                        # [code]
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling").profile(cfg, net, loader, opts, device, rank, 1 / every, points=(model.points, "forward"),
                                              camera=(model.camera, "stages"), matching=(model, "pair"))

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, *opts)                           # 0 when there is nothing to resume
    record_frames(Path(cfg.out) / "frames.txt", dataset, loader.indices, first, rank)      # for fine-tuning: what was seen
    run = Run(cfg, rank, world, first, steps, device, f"lr {cfg.lr_points:g} and {cfg.lr:g} not rescaled")
    val_batches = val_loader.first(VAL_BATCHES)                     # the same on every rank and for every seed

    # train
    for step, batch in run.batches(loader, first):
        if step % cfg.eval_every == 0:
            run.log(step, ["held-out frames"], prefix="val_", **evaluate(model, val_batches, device))
        factor = cfg.decay ** (step // loader.steps_per_epoch)
        for opt, lr in zip(opts, (cfg.lr_points, cfg.lr)):
            for group in opt.param_groups:
                group["lr"] = lr * factor
        loss, terms = net(batch)
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])       # a loss of weight 0 trains nothing
        run.log(step, batch.names, loss=loss, **terms, grad_norm=norm, lr=cfg.lr * factor)                   # raises before the update if one is not finite
        for opt in opts:
            opt.step()
        stop = run.interrupted()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            save(cfg, step + 1, model, opts, UNITS, dataset.grid)
        if stop:
            run.leave(step)

    # results
    run.close()
    found = {k: round(v, 4) for k, v in evaluate(model, val_batches, device).items()}       # by every process: means are over all of them
    destroy_group()
    if rank == 0:
        write_text(Path(cfg.out) / "metrics.json", json.dumps(found, indent=1))
        save_figures(model, val_batches[0].to(device), cfg.out)
        loss_curves(cfg.out, {"L_intra": (found["chance_intra"], found["floor_intra"]), "L_inter": (found["chance_inter"], found["cell_inter"])})
        print(json.dumps(found))
        print(f"{cfg.out}: held-out L_intra {found['L_intra']} (chance {found['chance_intra']}, floor {found['floor_intra']}), "
              f"L_inter {found['L_inter']} (chance {found['chance_inter']}, one cell {found['cell_inter']})")


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
