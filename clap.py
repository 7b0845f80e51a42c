"""CLAP (Chen et al., ICLR 2026, arXiv 2412.03059): images and LiDAR are pre-trained together by rendering what was hidden, where surfaces bend.

    python clap.py --data /nuscenes --gpus 8          # the paper's sizes
    python clap.py                                    # the embedded world, minutes on two CPU cores

Read with: common.py §1 project, rays; §3 VoxelResNet, CameraNet, FusionNet; §4 neus_weights; §6 surface_variation; data.py Batch.
One optimiser, one checkpoint: both branches and their fusion learn jointly. Later: finetune.py --init RUN.

No code of the authors is public. [paper] marks what the paper's public text states (second-hand in part: a reading note, the reviews, the summaries of v1),
[sister] the same authors' TREND, [code X] the ingredient's released code, [ours] what none of them says. Few equation numbers are public (13 and 14, from
a review); elsewhere stands what the equation is about.

    paper                  here                        meaning
    P, I, T                batch.points, .images, .lidar2img
    P^, I^                 lidar, image                volumes of the two branches: a sparse level, and (B, C, Z, Y, X)
    F^, F~                 fused; shallow, table       f_fusion(concat(P^, I^)); f^3D(F^), its cells as rows, trilinear between them
    f^SDF, s               Field.sdf                   signed distance at a point, scaled units
    n~, omega              normal, omega               unit normal; the norm of its derivative: the sampling weight, of whichever sampler
    alpha, t, w, h         neus_weights                opacity, transmittance, weight; learnable sharpness
    r~, c~                 r_hat, c_hat                against r, c of a LiDAR point, of a pixel
    K, N_K, d_K            Prototypes.K                512 learnable prototypes of 128 numbers, not normalised
    S, Q                   S_P, S_I, Q_P, Q_I          embeddings against prototypes; their Sinkhorn assignment
    omega_r ... omega_GMM  w_* in Config               loss weights

Departures and readings:
  D1  Points are drawn by PCA surface variation of the raw cloud, as this project was asked to; the paper's weight, the norm of the derivative of the learned
      SDF's unit normal, is --sampler sdf (Frobenius norm, central differences: exact autograd of a trilinear field underestimates it 3.5 times; the feature
      is constant beyond the outermost cell centres, so tilted surfaces within one cell of the box's low faces and two of its high ones look bent). Weights of
      either are clipped at the 99th percentile of a frame, and a pixel takes the largest of its points'.
  D2  The image branch is a ResNet whose hidden pixels take the mean colour (no mask token), with a lift by pulling: depth probability times the number of
      bins, nothing beyond the last bin. The paper has Swin and a lift through T. The volume is 5 x 180 x 180 on nuScenes.
  D3  The colour head is three plain layers on feature, geometry and view: no SDF gradient (no second-order derivatives in the render path) and no position, which
      UniPAD's four layers have; the SDF's feature enters before its five hidden layers, UniPAD's also before the output.
  D4  Range targets are of the key sweep only, since older sweeps were shot from elsewhere; so is curvature, its neighbours are of all sweeps, as is the encoder's
      input. Rays start where the LiDAR stands at the frame's time, also to points that a reader has moved to it. (The paper draws about one point in a hundred,
      which fits all ten sweeps better than one.)
  D5  r_n is the middle of its section (NeuS), c_n the mean of its ends; section starts would shorten every range by half a section. Weights are not
      renormalised, as printed.
  D6  The printed softmax has tau outside the exponential, where it cancels; here exp(S / tau) in L_SwAV, the same at the paper's tau = 1; L_EM has none.
  D7  Prototypes meet cells that hold a point left visible and that some camera sees, at most 8192 a frame; the paper does not say which. (The sparse
      encoder's last sites are three to four times as many: strided convolutions spread each point over its neighbours.)
  D8  Sinkhorn runs in the log domain (exp(S / 0.05) overflows) and counts every process's cells; L_GMM is linear and signed, as printed.
  D9  Finer samples follow the weights of the coarse ones at h = 64, drawn independently; NeuS estimates them from the steepest of neighbouring sections, UniPAD draws
      evenly spread ones.
  D10  The fusion is a 1 x 1 x 1 and a 3 x 3 x 3 convolution to 4 times the first width, the detector's own; the paper does not say.
  D11  Ranges and distances are of the scene scaled to +-1 by its largest x or y, in the losses too (UniPAD); in metres L_range alone would weigh 54 times as much
      on nuScenes. The paper does not say.
  D12  Projection heads are a linear layer, batch norm, ReLU and a linear layer (SwAV), which the paper does not describe; on CUDA the encoders run in bfloat16,
      field, rendering and prototypes in float32.
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
from common import (Run, all_reduce, box_exit, conv3d, cosine, destroy_group, evaluate, figure, frame_rngs, gather_weighted, importance, valid_pixels, inside_boxes,
                    launch, record_frames, loss_curves, mean_over_ranks, mlp, multilinear, neus_weights, parse, load_tool, perplexity, project, ravel, rays, resume, save,
                    start, stratified, surface_variation, trunk, wrap, write_text)

UNITS = "lidar", "camera.resnet", "camera.neck", "fuse"             # what backbones.safetensors holds
VAL_FRAMES = 12                                                     # frames of the val split that are looked at [ours]
NEAR, CLOSE = 1.0, 3.0                                              # m, where a ray's samples begin; nearer LiDAR points are no targets [code UniPAD, there in the plane]


@dataclass
class Config:
    # the run
    data: str = ""                     # data set root, told apart by its folders; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # sizes: the paper's, or what two CPU cores do in minutes; default small exactly when no --data is given
    out: str = "runs/clap"             # run folder; the same command again resumes it
    gpus: int | None = None            # processes on this machine; 0: CPU; default 1 where CUDA is, else 0
    workers: int = 4                   # loader processes for each training process [ours]
    seed: int = 0                      # of everything: order, augmentation, masks, draws, initial weights
    eval_every: int = 1000             # steps between held-out terms; 1000, small 80 [ours]
    save_every: int = 500              # steps between checkpoints; 500, small 80 [ours]
    profile: int = 0                   # steps to time instead of training; 0: train [ours]
    # optimisation
    epochs: int = 24                   # 24 [ours]; the paper's is unknown, UniPAD 12, PonderV2 24, TREND 48; small 0: steps decide
    steps: int = 0                     # 0: epochs decide; small 340 [ours]
    batch: int = 3                     # frames a process; 3 [sister, on 8 processes], small 2 [ours]
    lr: float = 2e-4                   # AdamW, half a cosine to 0; 2e-4 [sister] at a global batch of 24, not rescaled for others; small 2e-3 [ours]
    warmup: int = 500                  # steps from lr / 3; 500 [code UniPAD], small 50 [ours]
    weight_decay: float = 0.01         # prototypes included [code UniPAD, PonderV2]
    clip: float = 35.0                 # gradient norm [code UniPAD, OpenPCDet]
    rotation: float = 0.3927           # rad, rotation U(-rotation, rotation) about z, 22.5 degrees [code UniPAD: 0.3925]
    scale: float = 0.05                # scaling U(1 - scale, 1 + scale); 0.05 [code UniPAD]; x and y flip with probability 1/2, on KITTI y only [code OpenPCDet]
    # networks
    resnet: Literal[18, 50] = 50       # image backbone, random initial weights; 50, small 18 [ours] D2
    width: int = 16                    # first sparse stage, small 8; volume, image, fusion, field: 8, 5, 4, 2 times that [code OpenPCDet, BEVFusion, D10, UniPAD]
    bins: int = 118                    # depth bins of the lift; 118 [code BEVFusion], small 36 [ours]
    # masking
    mask_points: float = 0.9           # share of the blocks, 0.9 [sister]; a block is 8 x 8 x 8 voxels [code UniPAD]
    mask_pixels: float = 0.3           # share of 32 x 32 patches [code UniPAD]
    # curvature sampling
    sampler: Literal["pca", "sdf", "uniform"] = "pca"  # sdf: the paper's; uniform: its ablation D1
    neighbours: int = 32               # of the PCA, from all sweeps [ours]: at 16, half the neighbourhoods of a 32-beam sweep are a line
    uniform_epochs: float = 4          # N_warmup, with sdf: epochs of uniform sampling at first; 4 [paper], small 0.5 [ours]
    rays: int = 8192                   # N_L, points drawn a frame; 8192 [paper], small 1024 [ours]
    pixels: int = 1024                 # N_C / cameras, pixels drawn in each; 1024 [paper], small 128 [ours]
    blur: int = 9                      # K_gaus, px; sigma = 0.3 ((blur - 1) / 2 - 1) + 0.8 [ours; torchvision's rule]
    sky: float = 0.4                   # top share of rows that uniform sampling leaves out [code UniPAD]
    # rendering
    samples: int = 72                  # stratified samples a ray; 72 [code UniPAD], with the next 96 [paper]; small 32 [ours]
    importance_samples: int = 24       # samples by importance; 24 [code UniPAD], small 16 [ours]
    w_rend: float = 2.0                # omega_r [paper]
    w_surface: float = 0.05            # omega_sur [paper]
    w_colour: float = 0.05             # omega_C; 0.05 [paper], small 0.5 [ours]: a few hundred steps at 0.05 leave the colours grey
    # prototypes
    prototypes: int = 512              # N_K; 512 [paper], small 64 [ours]: a small batch has 380 cells, a KITTI frame 240; Sinkhorn wants several a prototype
    dims: int = 128                    # d_K [code SwAV]
    tau: float = 1.0                   # softmax temperature [paper] D6
    epsilon: float = 0.05              # Sinkhorn [code SwAV]
    sinkhorn: int = 3                  # iterations, N_sink [paper]
    w_proto: float = 1.0               # omega_proto [paper]
    w_swav: float = 1.0                # omega_SwAV [paper]
    w_em: float = 0.1                  # omega_EM [paper]
    w_gmm: float = 0.1                 # omega_GMM [paper]
    without: Literal["", "prototypes"] = ""  # the paper's ablation


SMALL = dict(workers=0, eval_every=80, save_every=80, epochs=0, steps=340, batch=2, lr=2e-3, warmup=50, resnet=18, width=8, bins=36, uniform_epochs=0.5,
             rays=1024, pixels=128, samples=32, importance_samples=16, w_colour=0.5, prototypes=64)      # explained in Config


def check(cfg):
    """Flags that contradict themselves, before anything is written."""
    for wrong, told in ((not min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
                         f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0, the other positive"),
                        (cfg.blur % 2 == 0, f"--blur {cfg.blur}: a Gaussian has a middle, give an odd number of pixels"),
                        (cfg.prototypes < 2, f"--prototypes {cfg.prototypes}: at least 2, or --without prototypes"),
                        (min(cfg.batch, cfg.eval_every, cfg.save_every) < 1, "--batch, --eval-every and --save-every start at 1"),
                        (not 0 <= min(cfg.mask_points, cfg.mask_pixels, cfg.sky) <= max(cfg.mask_points, cfg.mask_pixels, cfg.sky) < 1,
                         f"--mask-points {cfg.mask_points}, --mask-pixels {cfg.mask_pixels}, --sky {cfg.sky}: shares, from 0 to below 1"),
                        (cfg.samples < 2 or min(cfg.rays, cfg.pixels, cfg.importance_samples, cfg.blur, cfg.sinkhorn) < 1,
                         "--rays, --pixels, --importance-samples, --blur and --sinkhorn start at 1, --samples at 2"),
                        (min(cfg.rotation, cfg.scale) < 0 or cfg.scale >= 1, f"--rotation {cfg.rotation}, --scale {cfg.scale}: from 0, and scale below 1"),
                        (min(cfg.tau, cfg.epsilon) <= 0, f"--tau {cfg.tau}, --epsilon {cfg.epsilon}: temperatures are positive"),
                        (cfg.neighbours < 4, f"--neighbours {cfg.neighbours}: three points always lie in a plane, give 4 or more")):
        if wrong:
            raise SystemExit(told)


# ---- hide ------------------------------------------------------------------------------------------------------------------------

def mask_points(points, b, size, lidar, share, rngs):
    """Which points to hide: whole blocks of 8 x 8 x 8 voxels, the same for all sweeps. -> (N,) bool, True = hidden."""
    low, block = points.new_tensor(lidar.low), 8 * points.new_tensor(lidar.voxel)          # (3,), (3,) m
    shape = ((points.new_tensor(lidar.high) - low) / block).ceil().long()                  # X, Y, Z
    masked = torch.stack([torch.rand(shape.tolist(), generator=g, device=points.device) < share for g in rngs])   # (B, X, Y, Z)
    index = ((points[:, :3] - low) / block).long().clamp_min(0).minimum(shape - 1)         # (N, 3); points outside the range never enter
    return masked[b, index[:, 0], index[:, 1], index[:, 2]]


def mask_pixels(images, cameras, share, rngs, patch=32):
    """Which pixels to hide: whole patches. images (B K, 3, H, W) -> (B K, H, W) bool, True = hidden."""
    H, W = images.shape[-2:]
    shape = cameras, -(-H // patch), -(-W // patch)
    masked = torch.cat([torch.rand(shape, generator=g, device=images.device) < share for g in rngs])              # (B K, h, w)
    return masked.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :H, :W]


# ---- sample where surfaces bend --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Curvature:
    """data.loader's prepare: surface variation at the key sweep's points, neighbours from all sweeps; 0 at older sweeps' points. Once a frame, cached."""
    neighbours: int

    @property
    def key(self):
        return f"surface-variation-1-k{self.neighbours}"

    def __call__(self, frame):
        points = frame.points
        key, out = points[:, 4] == 0, np.zeros(len(points), np.float32)
        out[key] = surface_variation(points[key, :3], points[:, :3], self.neighbours)
        return {"points_curvature": out}


# The three samplers, one signature: xyz (M, 3) m, b (M,), pca (M,) surface variation or None, sdf a function (xyz, b) -> (M,), step m -> weights (M,) >= 0.

def pca_curvature(xyz, b, pca, sdf, step):
    return pca


def sdf_curvature(xyz, b, pca, sdf, step):
    """omega = ||d n~ / d p||_F, n~ = grad s / ||grad s||, by central differences of `step`: 19 distinct values of the field a point. [paper, curvature sampling] D1

    A plane gives 0, a cylinder of radius R 1 / R, a sphere sqrt(2) / R.
    """
    unit = torch.cat([torch.eye(3), -torch.eye(3)]).to(xyz)                                # (6, 3): + x y z, - x y z
    offsets, where = torch.unique((unit[:, None] + unit[None]).view(36, 3), dim=0, return_inverse=True)                 # (19, 3), (36,)
    out, chunk = [], 4096 if xyz.device.type == "cpu" else 32768
    for a in range(0, len(xyz), chunk):
        p, bp = xyz[a:a + chunk], b[a:a + chunk]
        at = (p[:, None] + step * offsets).view(-1, 3)
        s = sdf(at, bp.repeat_interleave(len(offsets))).view(len(p), -1)[:, where].view(-1, 6, 6)
        normal = F.normalize(s[:, :, :3] - s[:, :, 3:], dim=2)                             # (m, 6, 3): n~ at p + step unit
        jacobian = (normal[:, :3] - normal[:, 3:]) / (2 * step)                            # (m, 3, 3): d n~ / d p, row = direction
        out.append(jacobian.flatten(1).norm(dim=1))
    return torch.cat(out) if out else xyz.new_zeros(0)


def uniform_weights(xyz, b, pca, sdf, step):
    return xyz.new_ones(len(xyz))


SAMPLERS = {"pca": pca_curvature, "sdf": sdf_curvature, "uniform": uniform_weights}


def clean_weights(weights):
    """Sampling weights that multinomial can take: no NaN, clipped at the 99th percentile, all positive (a tiny floor), all 1 if none was. [ours] weights (M,) -> (M,)."""
    weights = torch.nan_to_num(weights, 0.0, 0.0, 0.0)
    if len(weights) == 0 or weights.max() <= 0:
        return torch.ones_like(weights)
    ranked = weights.sort().values
    weights = weights.clamp_max(ranked[int(0.99 * (len(ranked) - 1))].clamp_min(1e-12))
    return weights + 1e-6 * weights.mean()


def draw_points(weights, b, n, rngs):
    """At most n rows of each frame, without replacement, probability by weight. weights (M,), b (M,) -> rows (R,)."""
    drawn = []
    for frame, generator in enumerate(rngs):
        rows = (b == frame).nonzero()[:, 0]
        if len(rows):
            drawn.append(rows[torch.multinomial(weights[rows], min(n, len(rows)), generator=generator)])
    return torch.cat(drawn) if drawn else b[:0]


def pixel_weights(weights, xyz, b, batch, blur):
    """The points' weights spread over the images: the largest at each hit pixel, then a Gaussian. weights (M,), xyz (M, 3) -> (B K, H, W)."""
    count, (H, W) = len(batch.images), batch.images.shape[-2:]
    point, image, uv, _ = project(xyz, b, batch.lidar2img, batch.hw, batch.size)
    u, v = uv.long().unbind(1)
    flat = weights.new_zeros(count * H * W).scatter_reduce_(0, (image * H + v) * W + u, weights[point], "amax")
    tap = torch.arange(blur, device=flat.device) - blur // 2
    kernel = torch.exp(-0.5 * (tap / (0.3 * ((blur - 1) / 2 - 1) + 0.8)) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    spread = F.conv2d(flat.view(count, 1, H, W), kernel, padding=(0, blur // 2))
    spread = F.conv2d(spread, kernel.transpose(2, 3), padding=(blur // 2, 0))[:, 0].clamp_min(0)                        # of a transform's rounding
    return spread * valid_pixels(batch.hw, (H, W))                                           # none in the padding


def below_sky(batch, sky):
    """Equal weight for every pixel of an image below its top share `sky`, none for padding. -> (B K, H, W) float."""
    v = torch.arange(batch.images.shape[-2], device=batch.hw.device)[:, None]
    return (valid_pixels(batch.hw, batch.images.shape[-2:]) & (v >= sky * batch.hw[:, 0, None, None])).float()


def draw_pixels(weights, n, size, rngs):
    """n pixels of each image, probability by weight. weights (B K, H, W) -> image (R,), v (R,), u (R,); pixels of zero weight are dropped."""
    K, W, drawn = len(weights) // size, weights.shape[-1], []
    for frame, generator in enumerate(rngs):
        part = weights[frame * K:(frame + 1) * K].flatten(1)                               # (K, H W)
        filled = torch.where(part.sum(1, keepdim=True) > 0, part, torch.ones_like(part))   # multinomial refuses a row of zeros
        pixel = torch.multinomial(filled, min(n, part.shape[1]), generator=generator)      # (K, n)
        k, j = (part.gather(1, pixel) > 0).nonzero(as_tuple=True)                          # it also returns zero weights when too few are not
        drawn.append(torch.stack([k + frame * K, pixel[k, j] // W, pixel[k, j] % W]))
    return torch.cat(drawn, 1)


# ---- the neural field and its rendering ------------------------------------------------------------------------------------------

class Field(nn.Module):
    """f^SDF and f^RGB on trilinear features of the volume. Widths of [code UniPAD], D3; coordinates, distances and h in the scene scaled to +-1.

    The scaled point enters the first layer, the feature is added before each of the five. No geometric initialisation.
    """

    def __init__(self, channels, cells, scale, width=16, depth=5):
        super().__init__()
        self.cells, self.scale = cells, scale                                              # scale: scaled units per metre
        self.place = nn.Linear(3, width)
        self.inject = nn.Linear(channels, depth * width)                                  # the depth layers' own injections, in one product
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, 1 + width)
        self.rgb = nn.Sequential(nn.Linear(channels + width + 3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3), nn.Sigmoid())
        self.sharpness = nn.Parameter(torch.tensor(0.3))                                   # h = exp(10 sharpness), 20.1 at first [code NeuS, UniPAD]

    @property
    def h(self):
        return (10 * self.sharpness).exp().clamp(1e-6, 1e6)

    def sdf(self, table, xyz, b):
        """table (B Z Y X, C) the volume's cells, xyz (M, 3) m, b (M,) -> s (M,), geometry (M, 16), feature (M, C)."""
        flat, weight = multilinear(self.cells.index(xyz), self.cells.shape)
        feature = gather_weighted(table, flat + b[:, None] * math.prod(self.cells.shape), weight)   # (M, C)
        x = self.place(xyz * self.scale)
        for layer, more in zip(self.layers, self.inject(feature).chunk(len(self.layers), 1)):
            x = F.softplus(layer(x + more), beta=100, threshold=10)                        # (M, 16); beta [code UniPAD]; the threshold saves time, costs 5e-7
        s, geometry = self.output(x).split([1, x.shape[1]], 1)
        return s[:, 0], geometry, feature

    def render(self, table, origin, direction, b, far, jitter, u, colour):
        """Range and, if asked, colour along rays [paper, rendering]. origin, direction (R, 3), b (R,), far (R,) m, jitter (R, S), u (R, S') in [0, 1)
        -> range (R,) m, colour (R, 3) on black or None. Samples lie between NEAR and far, where the ray leaves the volume's box."""
        def at(depth):
            return (origin[:, None] + direction[:, None] * depth[..., None]).view(-1, 3), b.repeat_interleave(depth.shape[1])

        with torch.no_grad():                                                              # where to look closer, h = 64 [code NeuS, UniPAD]  D9
            depth = stratified(torch.full_like(far, NEAR), far, jitter)                    # (R, S)
            s = self.sdf(table, *at(depth))[0].view_as(depth)
            depth = torch.cat([depth, importance(depth, neus_weights(s, 64.0), u)], 1).sort(1).values                   # (R, S + S')
        s, geometry, feature = self.sdf(table, *at(depth))
        w = neus_weights(s.view_as(depth), self.h)                                         # (R, N - 1)          alpha, t, w
        middle = (depth[:, 1:] + depth[:, :-1]) / 2                                        # (R, N - 1)          D5
        r = (w * middle).sum(1)                                                            # (R,)                r~ = sum w_n r_n
        if not colour:
            return r, None
        view = direction.repeat_interleave(depth.shape[1], 0)
        c = self.rgb(torch.cat([feature, geometry, view], 1)).view(*depth.shape, 3)        # (R, N, 3)           D3
        return r, (w[..., None] * (c[:, 1:] + c[:, :-1]) / 2).sum(1)                       # (R, 3)              c~ = sum w_n c_n


# ---- prototypes shared by both modalities ----------------------------------------------------------------------------------------

@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Assignment codes Q: exp(S / epsilon) scaled so that every prototype gets its equal share and every sample sums to 1; SwAV's order, log domain. D8

    scores (N, N_K) -> (N, N_K). The prototypes' shares count the samples of every process.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        top = all_reduce(F.pad(log_q, (0, 0, 0, 1), value=-1e9).amax(0), torch.distributed.ReduceOp.MAX)                # (N_K,)
        log_q = log_q - (all_reduce((log_q - top).exp().sum(0)).log() + top)               # prototypes; a constant cancels below
        log_q = log_q - log_q.logsumexp(1, keepdim=True)                                   # samples
    return log_q.exp()


class Prototypes(nn.Module):
    """One set of prototypes that cells of both modalities are assigned to [paper, prototype learning]."""

    def __init__(self, cfg, lidar_width, image_width):
        super().__init__()
        self.cfg = cfg
        self.K = nn.Parameter(torch.randn(cfg.prototypes, cfg.dims))                       # raw: with unit prototypes and tau = 1 L_EM would be inert
        self.head_lidar, self.head_image = mlp(lidar_width, lidar_width, cfg.dims), mlp(image_width, lidar_width, cfg.dims)                  # D12

    def forward(self, lidar, image):
        """lidar (N, C), image (N, C') features of the same N cells -> L_SwAV, L_EM, L_GMM, {monitor: ()}."""
        cfg, K, N, N_K = self.cfg, self.K, len(lidar), len(self.K)
        S_P = F.normalize(self.head_lidar(lidar), dim=1) @ K.t()                           # (N, N_K)            Eq. 13
        S_I = F.normalize(self.head_image(image), dim=1) @ K.t()                           # (N, N_K)            Eq. 14
        Q_P, Q_I = sinkhorn(S_P, cfg.epsilon, cfg.sinkhorn), sinkhorn(S_I, cfg.epsilon, cfg.sinkhorn)                   # no gradient
        log_P, log_I = F.log_softmax(S_P / cfg.tau, 1), F.log_softmax(S_I / cfg.tau, 1)    # (N, N_K)            D6
        L_SwAV = mean_over_ranks(-(Q_I * log_P + Q_P * log_I).sum(), N) / N_K              # [paper, swapped prediction]
        L_EM = mean_over_ranks(entropy(S_P).sum() + entropy(S_I).sum(), N) / N_K           # [paper, EM]
        G = K @ K.t()                                                                      # (N_K, N_K)
        L_GMM = (G.sum() - G.diagonal().sum()) / (N_K * (N_K - 1))                         # [paper, Gram]         D8
        with torch.no_grad():
            best_P, best_I = S_P.argmax(1), S_I.argmax(1)
            monitors = dict(perplexity_P=perplexity(best_P, N_K), perplexity_I=perplexity(best_I, N_K), perplexity_Q=perplexity(Q_P.argmax(1), N_K),
                            agreement=(best_P == best_I).float().sum() / max(N, 1), prototype_norm=K.norm(dim=1).mean())
        return L_SwAV, L_EM, L_GMM, monitors


def entropy(scores):
    """Entropy of softmax(scores) over prototypes, scores (N, N_K) -> (N,) nats."""
    log_p = F.log_softmax(scores, 1)
    return -(log_p.exp() * log_p).sum(1)


# ---- the method ------------------------------------------------------------------------------------------------------------------

class CLAP(nn.Module):
    """Both losses of a batch. lidar, camera and fuse are what fine-tuning loads; the rest is thrown away."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg, self.grid, w = cfg, grid, cfg.width
        extent = max(abs(v) for v in (*grid.low[:2], *grid.high[:2]))                      # m
        self.lidar, self.camera, self.fuse = trunk(grid, cfg.resnet, w, cfg.bins)
        self.shallow = conv3d(4 * w, 2 * w, 3)                                             # f^3D
        self.field = Field(2 * w, self.lidar.cells[-1], 1 / extent)
        self.proto = None if cfg.without == "prototypes" else Prototypes(cfg, 8 * w, 5 * w)

    def draw_masks(self, batch, rngs):
        """The mask of each frame, from its own random stream -> hidden points (N,), hidden pixels (B K, H, W) bool, True = hidden."""
        return (mask_points(batch.points, batch.b_points, batch.size, self.lidar, self.cfg.mask_points, rngs),
                mask_pixels(batch.images, batch.cameras, self.cfg.mask_pixels, rngs))

    def encode(self, batch, masked, masked_px):
        """hidden (N,), hidden_px (B K, H, W) bool, True = hidden -> F~ as a table (B Z Y X, C), lidar Level, image volume (B, C, Z, Y, X), seen (B, Z, Y, X)."""
        cells = self.lidar.cells[-1]
        lidar = self.lidar(batch.points[~masked], batch.b_points[~masked])[-1]             # P^, sparse
        image, seen = self.camera(batch, cells, masked_px)                                 # I^
        fused = self.fuse(lidar.dense(batch.size), image)                                  # F^ (B, C, Z, Y, X)
        shallow = self.shallow(fused)                                                      # F~, not in bfloat16: the sampler takes its second differences
        return shallow.permute(0, 2, 3, 4, 1).reshape(-1, 2 * self.cfg.width), lidar, image, seen

    def targets(self, batch):
        """Key-sweep points inside the box and not too close: rows (M,) of batch.points, direction (M, 3), range (M,) m from the LiDAR's own place."""
        away = batch.points[:, :3] - batch.origin[batch.b_points]
        r = away.norm(dim=1)
        rows = (self.lidar.inside(batch.points) & (batch.points[:, 4] == 0) & (r > CLOSE)).nonzero()[:, 0]
        return rows, away[rows] / r[rows, None], r[rows]

    def render(self, table, origin, direction, b, rngs, colour):
        """Rays in frame order, random numbers from each ray's frame; rays that leave the box before NEAR are dropped first. Without gradient 8192 at a time.
        -> range (R',) m, colour (R', 3) or None, valid (R,) with R' true."""
        cfg, far = self.cfg, box_exit(origin, direction, self.grid.low, self.grid.high)
        counts = torch.bincount(b, minlength=len(rngs)).tolist()
        noise = torch.cat([torch.rand(n, cfg.samples + cfg.importance_samples, generator=g, device=b.device) for n, g in zip(counts, rngs)])
        valid = far > NEAR
        rows = valid.nonzero()[:, 0]
        jitter, u = noise[rows].split([cfg.samples, cfg.importance_samples], 1)
        most = max(len(b), 1) if torch.is_grad_enabled() else 8192
        chunks = zip(*(x.split(most) for x in (origin[rows], direction[rows], b[rows], far[rows], jitter, u)))
        r, c = zip(*(self.field.render(table, *chunk, colour) for chunk in chunks))
        return torch.cat(r), torch.cat(c) if colour else None, valid

    def forward(self, batch, uniform=False):
        """-> L (), {name: ()}. uniform: sample uniformly for now, while the SDF is noise."""
        cfg, rngs = self.cfg, frame_rngs(batch.seeds, batch.points.device)
        sampler = "uniform" if uniform else cfg.sampler

        # 1 both branches see what is left of the same frame
        masked, masked_px = self.draw_masks(batch, rngs)                                   # (N,) (B K, H, W)
        table, lidar, image, seen = self.encode(batch, masked, masked_px)

        # 2 curvature sampling: points by omega, pixels by omega spread over the images
        rows, direction, r = self.targets(batch)                                           # (M,) (M, 3) (M,)
        xyz, b = batch.points[rows, :3], batch.b_points[rows]
        with torch.no_grad():
            omega = self.weights(table, batch, rows, sampler)                              # (M,)
            drawn = draw_points(omega, b, cfg.rays, rngs)                            # (R,) into M, R <= B N_L
            at, v, u = draw_pixels(self.pixel_maps(omega, xyz, b, batch, sampler), cfg.pixels, batch.size, rngs)        # (R',) each, R' <= B N_C
        xyz, b, direction, r = xyz[drawn], b[drawn], direction[drawn], r[drawn]

        # 3 render range along LiDAR rays and colour along camera rays
        r_hat, _, _ = self.render(table, batch.origin[b], direction, b, rngs, colour=False)                       # (R,), all valid
        s = self.field.sdf(table, xyz, b)[0]                                               # (R,), 0 on a surface
        origin, away = rays(torch.stack([u, v], 1) + 0.5, at, batch.lidar2img)
        _, c_hat, valid = self.render(table, origin, away, at // batch.cameras, rngs, colour=True)                # (R'', 3): of rays that meet the box
        c = (batch.images[at, :, v, u].float() / 255)[valid]                               # (R'', 3)
        scale = self.field.scale
        L_range = mean_over_ranks((r - r_hat).abs().sum() * scale, len(r))                                              # [paper, rendering]
        L_surface = mean_over_ranks(s.abs().sum(), len(s))                                                              # [paper, rendering]
        L_colour = mean_over_ranks((c - c_hat).abs().sum() / 3, len(c))                                                 # [paper, rendering]
        L_rend = L_range + cfg.w_surface * L_surface + cfg.w_colour * L_colour                                          # [paper, rendering]
        terms = dict(L_rend=L_rend, L_range=L_range, L_surface=L_surface, L_colour=L_colour, h=self.field.h)

        # 4 prototypes: the same cells seen by both modalities, each predicts the other's code
        L = cfg.w_rend * L_rend                                                                                         # [paper, total loss]
        if self.proto is not None:
            cell = self.shared_cells(lidar, seen, batch.points[~masked], batch.b_points[~masked], rngs)               # (N_3D,) into the sparse level  D7
            b_, z, y, x = lidar.coords[cell].unbind(1)
            L_SwAV, L_EM, L_GMM, monitors = self.proto(lidar.features[cell], image[b_, :, z, y, x])                     # [paper, prototypes]
            L_proto = cfg.w_swav * L_SwAV + cfg.w_em * L_EM + cfg.w_gmm * L_GMM                                         # [paper, prototypes]
            L = L + cfg.w_proto * L_proto                                                                               # [paper, total loss]
            terms |= dict(L_proto=L_proto, L_SwAV=L_SwAV, L_EM=L_EM, L_GMM=L_GMM, cells=float(len(cell)), **monitors)
        return L, terms | self.sampling_stats(batch, xyz, b)

    @torch.no_grad()
    def weights(self, table, batch, rows, sampler):
        """This sampler's weight of each of these points, made safe frame by frame. Its step for differences is half a cell [ours]. rows (M,) -> (M,)."""
        xyz, b = batch.points[rows, :3], batch.b_points[rows]
        pca = batch.extra["points_curvature"][rows] if sampler == "pca" else None
        omega = SAMPLERS[sampler](xyz, b, pca, lambda p, frame: self.field.sdf(table, p, frame)[0], self.lidar.cells[-1].step[0] / 2)
        safe = torch.empty_like(omega)
        for frame in b.unique().tolist():
            safe[b == frame] = clean_weights(omega[b == frame])
        return safe

    @torch.no_grad()
    def pixel_maps(self, omega, xyz, b, batch, sampler):
        """Weight of every pixel: the points' own, spread; under uniform sampling equal below the sky. -> (B K, H, W)."""
        if sampler == "uniform":
            return below_sky(batch, self.cfg.sky)
        return pixel_weights(omega, xyz, b, batch, self.cfg.blur)

    @torch.no_grad()
    def shared_cells(self, lidar, seen, points, b_points, rngs, most=8192):
        """Sparse sites whose own cell holds a visible point and that some camera sees, at most `most` random ones a frame [ours].  D7  -> rows (N_3D,) of the level."""
        cells, inside = lidar.cells, self.lidar.inside(points)
        zyx = cells.index(points[inside, :3]).round().long().clamp_min(0)
        zyx = zyx.minimum(zyx.new_tensor(cells.shape) - 1)                                 # the outer half of a border cell
        held = torch.zeros_like(seen).flatten()
        held[ravel(torch.cat([b_points[inside, None], zyx], 1), cells.shape).long()] = True
        b = lidar.coords[:, 0]
        visible, kept = (seen.flatten() & held)[ravel(lidar.coords, cells.shape).long()], []
        for frame, generator in enumerate(rngs):
            rows = (visible & (b == frame)).nonzero()[:, 0]
            kept.append(rows[torch.randperm(len(rows), generator=generator, device=rows.device)[:most]])
        return torch.cat(kept)

    @torch.no_grad()
    def sampling_stats(self, batch, xyz, b):
        """Share of the drawn points inside labelled boxes and within 0.3 m of a flat road: what sampling looks at. Labels are read for this monitor only."""
        found = dict(on_ground=((xyz[:, 2] - self.grid.ground).abs() < 0.3).float().sum() / max(len(xyz), 1))
        if batch.boxes is not None:
            found["on_boxes"] = inside_boxes(xyz, b, batch.boxes, batch.b_boxes).float().sum() / max(len(xyz), 1)
        return found


# ---- held-out errors -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_errors(model, batches, device):
    """What the volume knows of held-out frames under the training mask. -> {name: float}, ranges in metres, colours in [0, 1], all mean absolute errors.

    range_hidden / range_visible: rays whose point was hidden / seen. On the hidden rays also beam_mean: the mean range in the ray's half degree of elevation (on
    nuScenes its beam) over these very frames, which flatters it; nearest_ray: the range of the angularly nearest visible ray. range_swapped: the cloud of the other
    held-out frame of its batch went in, in the embedded world often one of the same scene. range_all is over the same rays. colour / colour_blind: pixels drawn as in
    training, hidden or not, with the training mask and with every pixel hidden; colour_mean: of their mean colour. None where no ray is left.
    """
    model.eval()
    cfg, ray, colour = model.cfg, [], []
    for batch in batches:
        batch = batch.to(device)
        rngs = frame_rngs(batch.seeds, device)
        masked, masked_px = model.draw_masks(batch, rngs)
        rows, direction, r = model.targets(batch)
        b, xyz, hid = batch.b_points[rows], batch.points[rows, :3], masked[rows]
        swapped = replace(batch, b_points=(batch.b_points + 1) % batch.size)               # each frame gets its neighbour's cloud
        given, other = (model.encode(x, masked, masked_px)[0] for x in (batch, swapped))
        blind = model.encode(batch, masked, torch.ones_like(masked_px))[0]
        r_hat = model.render(given, batch.origin[b], direction, b, rngs, colour=False)[0]
        r_other = model.render(other, batch.origin[b], direction, b, rngs, colour=False)[0] if batch.size > 1 else torch.full_like(r, math.nan)
        ray.append(torch.stack([direction[:, 2].asin(), r, hid.float(), (r - r_hat).abs(), (r - r_other).abs(), (r - nearest_visible(direction, r, b, hid)).abs()], 1))
        omega = model.weights(given, batch, rows, cfg.sampler)
        at, v, u = draw_pixels(model.pixel_maps(omega, xyz, b, batch, cfg.sampler), cfg.pixels, batch.size, rngs)
        origin, away = rays(torch.stack([u, v], 1) + 0.5, at, batch.lidar2img)
        _, c_hat, valid = model.render(given, origin, away, at // batch.cameras, frame_rngs(batch.seeds, device), colour=True)
        _, c_blind, _ = model.render(blind, origin, away, at // batch.cameras, frame_rngs(batch.seeds, device), colour=True)
        c = (batch.images[at, :, v, u].float() / 255)[valid]
        colour.append(torch.cat([(c - c_hat).abs().mean(1, keepdim=True), (c - c_blind).abs().mean(1, keepdim=True), c], 1))
    model.train()
    elevation, r, hid, error, error_other, error_near = torch.cat(ray).cpu().double().unbind(1)
    _, beam, count = torch.unique((elevation.rad2deg() * 2).round(), return_inverse=True, return_counts=True)           # half-degree bins
    mean = torch.zeros(len(count), dtype=r.dtype).index_add_(0, beam, r) / count
    error_colour, error_blind, c = torch.cat(colour).cpu().double().split([1, 1, 3], 1)
    hid, both = hid.bool(), error_other.isfinite()
    found = dict(range_hidden=error[hid].mean(), range_visible=error[~hid].mean(), beam_mean=(r - mean[beam])[hid].abs().mean(),
                 nearest_ray=error_near[hid].nanmean(), range_all=error[both].mean(), range_swapped=error_other[both].mean(),
                 colour=error_colour.mean(), colour_blind=error_blind.mean(), colour_mean=(c - c.mean(0)).abs().mean())
    return {k: round(float(v), 4) if v.isfinite() else None for k, v in found.items()}


def nearest_visible(direction, r, b, masked):
    """Range of the angularly nearest ray of the same frame that was not hidden; nan where a frame has none. -> (M,)."""
    out = torch.full_like(r, math.nan)
    for frame in b.unique().tolist():
        mine, shown = (b == frame).nonzero()[:, 0], ((b == frame) & ~masked).nonzero()[:, 0]
        if len(shown):
            found = cKDTree(direction[shown].cpu().numpy()).query(direction[mine].cpu().numpy())[1]
            out[mine] = r[shown[torch.as_tensor(found, device=r.device)]]
    return out


# ---- figures ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def save_figures(model, batch, out, stride=2):
    """figures/rendered.png, samples.png, sampled_pixels.png and prototypes.png of a held-out batch's first frame, under the training mask."""
    model.eval()
    cfg, K, rngs = model.cfg, batch.cameras, frame_rngs(batch.seeds, batch.points.device)
    masked, masked_px = model.draw_masks(batch, rngs)
    table, lidar, image, seen = model.encode(batch, masked, masked_px)
    rows, direction, r = model.targets(batch)
    mine = batch.b_points[rows] == 0
    rows, direction, r = rows[mine], direction[mine], r[mine]
    b, xyz, hid = batch.b_points[rows], batch.points[rows, :3], masked[rows]

    r_hat = model.render(table, batch.origin[b], direction, b, rngs, colour=False)[0]
    pictures = [(name, range_image(direction[keep], values[keep]), dict(cmap="turbo", vmin=0, vmax=float(r.max()), aspect="auto", interpolation="nearest"))
                for name, values, keep in (("range, m: truth", r, r > 0), ("visible to the encoder", r, ~hid), ("rendered", r_hat, r > 0))]
    panels = []
    for k in range(min(K, 3)):
        h, w = batch.hw[k].tolist()
        v, u = torch.meshgrid(torch.arange(0, h, stride, device=r.device), torch.arange(0, w, stride, device=r.device), indexing="ij")
        origin, away = rays(torch.stack([u, v], -1).view(-1, 2) + 0.5, torch.full((v.numel(),), k, device=r.device), batch.lidar2img)
        rendered, zeros = torch.zeros_like(origin), torch.zeros(len(origin), dtype=torch.int64, device=r.device)
        _, c, valid = model.render(table, origin, away, zeros, rngs, colour=True)
        rendered[valid] = c
        truth = batch.images[k, :, :h, :w].permute(1, 2, 0).cpu()
        panels += [(f"camera {k}: truth", truth), ("visible", truth * ~masked_px[k, :h, :w, None].cpu()),
                   ("rendered, black above the volume", rendered.view(*v.shape, 3).cpu())]
    figure(Path(out) / "figures" / "rendered.png", pictures + panels, 3, (5.0, 2.0))

    omega = model.weights(table, batch, rows, model.cfg.sampler)
    drawn = draw_points(omega, b, cfg.rays, rngs[:1])
    first = replace(batch, size=1, images=batch.images[:K], hw=batch.hw[:K], lidar2img=batch.lidar2img[:K])
    maps = model.pixel_maps(omega, xyz, b, first, model.cfg.sampler)
    at, v, u = draw_pixels(maps, cfg.pixels, 1, rngs[:1])
    top, x, y = float(omega.quantile(0.99)), xyz[:, 0].cpu(), xyz[:, 1].cpu()
    panels = [(f"{cfg.sampler} weight of every point", lambda ax: ax.scatter(-y, x, 1, omega.cpu(), cmap="viridis", vmax=top)),
              (f"{len(drawn)} points drawn", lambda ax: ax.scatter(-y[drawn.cpu()], x[drawn.cpu()], 1, "C3"))]
    figure(Path(out) / "figures" / "samples.png", [square(p) for p in panels], 2, (5.0, 5.0))
    over = [(f"camera {k}: blurred weight and pixels drawn", dots(maps[k].cpu(), u[at == k].cpu(), v[at == k].cpu())) for k in range(min(K, 3))]
    figure(Path(out) / "figures" / "sampled_pixels.png", over, 1, (9.0, 3.6))

    if model.proto is not None:
        cell = model.shared_cells(lidar, seen, batch.points[~masked], batch.b_points[~masked], rngs)
        cell = cell[lidar.coords[cell, 0] == 0]
        b_, z, y_, x_ = lidar.coords[cell].unbind(1)
        ids = [(F.normalize(head(f), dim=1) @ model.proto.K.t()).argmax(1).cpu()
               for head, f in ((model.proto.head_lidar, lidar.features[cell]), (model.proto.head_image, image[b_, :, z, y_, x_]))]
        centre, colour = lidar.centre()[cell].cpu(), np.random.default_rng(0).permutation(cfg.prototypes)
        look = dict(cmap="gist_rainbow", vmin=0, vmax=cfg.prototypes)
        panels = [(f"prototype of each cell, {name}", lambda ax, i=i: ax.scatter(-centre[:, 1], centre[:, 0], 12, colour[i], **look))
                  for name, i in zip(("LiDAR", "image"), ids)]
        figure(Path(out) / "figures" / "prototypes.png", [square(p) for p in panels], 2, (5.0, 5.0))
    model.train()


def square(panel):
    """A bird's-eye panel with equal axes, x (forward) up."""
    title, plot = panel

    def picture(ax):
        plot(ax)
        ax.set_aspect("equal")
    return title, picture


def dots(weights, u, v):
    def picture(ax):
        ax.imshow(weights, cmap="viridis")
        ax.plot(u, v, "r.", ms=2)
        ax.axis("off")
    return picture


def range_image(direction, r):
    """Rays sorted into 1.33-degree elevations (a 32-beam LiDAR's) and 1-degree azimuths, forward in the middle, left on the left. -> (rows, 360), nan: none."""
    row = (direction[:, 2].asin().rad2deg() / 1.33).round().long().cpu()
    column = ((180 - torch.atan2(direction[:, 1], direction[:, 0]).rad2deg()).long() % 360).cpu()
    picture = torch.full((136, 360), math.nan)
    picture[68 - row, column] = r.cpu()
    kept = picture.isfinite().any(1)
    return picture[kept]


# ---- training --------------------------------------------------------------------------------------------------------------------

def train(rank, world, cfg):
    check(cfg)

    # data
    dataset = data.open_dataset(cfg.data, cfg.preset)
    prepare = Curvature(cfg.neighbours) if cfg.sampler == "pca" else None
    augment = partial(data.augment_cloud, rotation=cfg.rotation, scale=cfg.scale, flip=dataset.grid.mirrors)
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed, workers=cfg.workers, augment=augment, prepare=prepare)
    val_loader = data.loader(dataset, "val", 2, seed=cfg.seed, prepare=prepare, indices=data.spread(dataset.split("val"), VAL_FRAMES))

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = CLAP(cfg, dataset.grid)
    device = start(cfg, rank, world)
    model.to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling").profile(cfg, net, loader, [opt], device, rank, lidar=(model.lidar, "forward"), camera=(model.camera, "forward"),
                                              render=(model, "render"))

    # resume
    steps, uniform_steps = cfg.steps or cfg.epochs * loader.steps_per_epoch, cfg.uniform_epochs * loader.steps_per_epoch
    if cfg.sampler == "sdf" and uniform_steps >= steps:
        raise SystemExit(f"--uniform-epochs {cfg.uniform_epochs:g} are {uniform_steps:.0f} steps, the run has {steps}: the SDF would never be sampled by")
    first = resume(cfg.out, model, opt)                             # 0 when there is nothing to resume
    record_frames(Path(cfg.out) / "frames.txt", dataset, loader.indices, first, rank)      # for fine-tuning: what was seen
    run = Run(cfg, rank, world, first, steps, device, f"lr {cfg.lr:g} not rescaled")
    val_batches = list(val_loader.once())                           # the same on every rank

    # train
    for step, batch in run.batches(loader, first):
        uniform = cfg.sampler == "sdf" and step < uniform_steps
        if step % cfg.eval_every == 0:
            run.log(step, ["held-out frames"], prefix="val_", **evaluate(model, val_batches, device, uniform))
        lr = cfg.lr * cosine(step, cfg.warmup, steps)
        for group in opt.param_groups:
            group["lr"] = lr
        loss, terms = net(batch, uniform)
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        run.log(step, batch.names, loss=loss, **terms, grad_norm=norm, lr=lr)    # raises before the update if a term is not finite
        opt.step()
        stop = run.interrupted()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            save(cfg, step + 1, model, [opt], UNITS, dataset.grid)
        if stop:
            run.leave(step)

    # results
    run.close()
    destroy_group()
    if rank == 0:
        found = held_out_errors(model, val_batches, device)
        write_text(Path(cfg.out) / "metrics.json", json.dumps(found, indent=1))
        shown = next((batch for batch in val_batches if (model.targets(batch.to(device))[0] < (batch.b_points == 0).sum()).any()), None)
        if shown is not None:                                       # the first batch whose first frame has a target
            save_figures(model, shown.to(device), cfg.out)
        loss_curves(cfg.out)
        print(json.dumps(found))
        print(f"{cfg.out}: held-out range error {found['range_hidden']} m where points were hidden (beam mean {found['beam_mean']}, "
              f"nearest visible ray {found['nearest_ray']}), {found['range_visible']} m where visible")


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
