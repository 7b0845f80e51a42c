"""CLAP (Chen et al., ICLR 2026, arXiv 2412.03059): render a masked scene where surfaces bend.

Camera and LiDAR networks and their fusion are pre-trained jointly, with one optimiser
and one checkpoint. Afterwards finetune.py --init RUN trains a detector from it.

    python clap.py --data /nuscenes --gpus 8  # full size, the paper's numbers where known
    python clap.py                            # the embedded world, minutes on two cores

Read with: common.py §1 geometry (project, rays), §3 rendering (neus_weights), §5
curvature (surface_variation), §8 the trunk (VoxelResNet, CameraNet, FusionNet), §9
processes (mean_rows); data.py (Batch).
Each loss in plain loops: tests/test_clap.py, test_rendering_losses_in_plain_loops
(L_range, L_colour), test_surface_loss_is_the_mean_absolute_sdf_at_the_drawn_points,
test_prototype_losses_in_plain_loops. Their parts: test_render_in_plain_loops (w, r~,
c~) and test_sinkhorn_matches_swav (Q).

No code of the authors is public, and the paper's body was not at hand: its equations
and numbers are known from one public reading note, which the reviews and the summaries
of v1 support where they overlap. [paper] marks them, [sister] the same authors' TREND,
[code X] the released code of ingredient X, [ours] what none of them says. Only
equations 13 and 14 have a public number. Elsewhere the tag says what the equation is
about.

    paper                 here                  meaning
    P, I, T               batch                 its points, images, lidar2img
    P^, I^                lidar, image          volumes of the branches: sparse, dense
    F^                    fused                 f_fusion(concat(P^, I^))
    F~                    shallow, table        f^3D(F^); its cells as rows
    f^SDF, s              Field.sdf, s          signed distance at a point, scaled units
    n~, omega             normal, omega         unit normal; sampling weight of any sampler
    alpha, t, w, h        neus_weights, w, h    opacity, transmittance, weight; sharpness
    r, c; r~, c~          r, c; r_hat, c_hat    range and colour, measured; rendered
    K, N_K, d_K           K, N_K, dims          512 prototypes of 128 numbers, learnable
    S, Q                  S_P, S_I, Q_P, Q_I    cells against prototypes; their codes
    omega_r...omega_GMM   w_rend ... w_gmm      loss weights, in Config

In shapes: B frames, K cameras, N points, M targets, R rays, Q pixels, S coarse and S'
fine samples of a ray, N_3D cells that both modalities see. b is the frame of each row.
view is a row of batch.images; v and u are a pixel's row and column.

Departures and readings; the reasons are in the code, at the same numbers:
  D1  Sampling weight is PCA surface variation, from the first step. The paper's, of the SDF
      and after N_warmup epochs, is --sampler sdf. Both are clipped at a 99th percentile.
  D2  ResNet and a pulled, depth-weighted lift; masked pixels take the mean colour.
  D3  The colour head has three layers, not UniPAD's four, and sees feature, geometry and
      view: no SDF gradient, no position.
  D4  Targets and curvature are of the keyframe sweep, on Waymo of the top LiDAR alone; other
      points are only input. Masked and visible points are targets alike.
  D5  A section's range is its middle, its colour the mean of its ends.
  D6  L_SwAV has exp(S / tau), not the printed exp(S) / tau; L_EM has no temperature.
  D7  Prototypes meet cells with a visible point that a camera sees, at most 8192 a frame.
  D8  Sinkhorn runs in the log domain, over all ranks; L_GMM is signed, as printed.
  D9  Finer samples follow the coarse ones' own weights at h = 64, drawn independently.
  D10  The fusion is a 1 x 1 x 1 and a 3 x 3 x 3 convolution, the detector's own.
  D11  Ranges and distances are of the scene scaled to +-1, in the losses too.
  D12  Projection heads are Linear, batch norm, ReLU, Linear; bfloat16 encoders on CUDA.
"""
import functools
import json
import math
from dataclasses import dataclass
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
    project, rays, box_exit, valid_pixels, inside_boxes,  # geometry
    constant, rows_where, multilinear, gather_weighted,
    neus_weights, stratified, importance,  # rendering
    perplexity, surface_variation,  # contrast, curvature
    trunk, mlp, conv3d, ravel,  # networks
    all_reduce, mean_rows,  # processes
    parse, require, check_numbers, launch, start, wrap, resume, save,  # runs
    draw_labels, destroy_group, cosine, Run, evaluate, frame_rngs, figure, loss_curves,
    load_tool, write_text, to_json,
)

UNITS = "lidar", "camera.resnet", "camera.neck", "fuse"  # what backbones.safetensors holds
VAL_FRAMES = 12  # frames of the val split that are evaluated [ours]
NEAR = 1.0  # m, where the samples of a ray begin [code UniPAD]
CLOSE = 3.0  # m, nearer LiDAR points are no targets [code UniPAD, there in the plane]


@dataclass
class Config:
    # Each number with its source. The values of --preset small are in SMALL below.

    # the run
    data: str = ""             # root of the data set; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # default small exactly when --data is not given
    out: str = "runs/clap"     # run folder; the same command again resumes it
    gpus: int | None = None    # processes on this machine; 0: CPU; default 1 with CUDA, else 0
    workers: int = 4           # loader processes for each rank [ours]
    seed: int = 0              # of order, augmentation, masks, draws and initial weights
    eval_every: int = 1000     # steps between the losses on val frames [ours]
    save_every: int = 500      # steps between checkpoints [ours]
    profile: int = 0           # steps to time instead of training; 0: train [ours]

    # what is learned from
    share: float = 1.0         # of the training frames, drawn as finetune.py draws labels [ours]

    # optimisation
    # The paper's epochs are unknown: UniPAD has 12, PonderV2 24, TREND 48. lr is not
    # rescaled for another batch. x and y also flip with probability 1/2, on KITTI y
    # only [code OpenPCDet].
    epochs: int = 24           # 0: steps decide [ours]
    steps: int = 0             # 0: epochs decide [ours]
    batch: int = 3             # frames for each rank [sister, on 8 ranks]
    accumulate: int = 1        # batches of a step, one after the other [ours]
    lr: float = 2e-4           # AdamW, half a cosine to 0; for a global batch of 24 [sister]
    warmup: int = 500          # steps, from lr / 3 [code UniPAD]
    weight_decay: float = 0.01  # prototypes included [code UniPAD, PonderV2]
    clip: float = 35.0         # gradient norm [code UniPAD, OpenPCDet]
    rotation: float = 0.3927   # rad, 22.5 degrees, U(-r, r) about z [code UniPAD: 0.3925]
    scale: float = 0.05        # scaling U(1 - scale, 1 + scale) [code UniPAD]

    # networks
    # Channels in units of `width`: LiDAR volume 8 [code OpenPCDet], image volume 5 [code
    # BEVFusion], fusion 4 [ours] D10, the field's features 2 [code UniPAD].
    resnet: Literal[18, 50] = 50  # image backbone, random initial weights [ours] D2
    width: int = 16            # channels of the first sparse stage [code OpenPCDet]
    bins: int = 118            # depth bins of the lift [code BEVFusion]

    # masking
    mask_points: float = 0.9   # probability [sister] of an 8 x 8 x 8 voxel block [code UniPAD]
    mask_pixels: float = 0.3   # probability of a patch of 32 x 32 px [code UniPAD]

    # curvature sampling
    # With 16 neighbours half of the neighbourhoods in a real 32-beam sweep are a line,
    # whose variation is 0; with 32 a fifth. sigma of the blur is torchvision's, 0.3
    # ((blur - 1) / 2 - 1) + 0.8 px.
    sampler: Literal["pca", "sdf", "uniform"] = "pca"  # sdf: the paper's; uniform: its ablation D1
    neighbours: int = 32       # of the PCA, from all sweeps [ours]
    uniform_epochs: float = 4  # N_warmup: epochs of uniform sampling before sdf [paper]
    rays: int = 8192           # N_L, points drawn a frame [paper]
    pixels: int = 1024         # N_C / cameras, pixels drawn in each image [paper]
    blur: int = 9              # K_gaus, size of the Gaussian in px [ours]
    sky: float = 0.4           # top share of rows that uniform leaves out [code UniPAD]

    # rendering
    samples: int = 72          # stratified samples of a ray [code UniPAD]; 72 + 24 = 96 [paper]
    importance_samples: int = 24  # finer samples of a ray [code UniPAD]
    w_rend: float = 2.0        # omega_r [paper]
    w_surface: float = 0.05    # omega_sur [paper]
    w_colour: float = 0.05     # omega_C [paper]

    # prototypes
    prototypes: int = 512      # N_K [paper]
    dims: int = 128            # d_K [code SwAV]
    tau: float = 1.0           # softmax temperature [paper] D6
    epsilon: float = 0.05      # of Sinkhorn [code SwAV]
    sinkhorn: int = 3          # iterations, N_sink [paper]
    w_proto: float = 1.0       # omega_proto [paper]
    w_swav: float = 1.0        # omega_SwAV [paper]
    w_em: float = 0.1          # omega_EM [paper]
    w_gmm: float = 0.1         # omega_GMM [paper]
    without: Literal["", "prototypes"] = ""  # the paper's ablation


SMALL = dict(                  # --preset small: minutes on two CPU cores; all [ours]
    workers=0, eval_every=80, save_every=80,
    epochs=0, steps=340, batch=2, lr=2e-3, warmup=50,
    resnet=18, width=8, bins=36,
    uniform_epochs=0.5, rays=1024, pixels=128, samples=32, importance_samples=16,
    w_colour=0.5,              # a few hundred steps at 0.05 leave the colours grey
    # Sinkhorn wants several cells for each prototype: a batch has 350, a KITTI frame 240
    prototypes=64,
)


def check(cfg):
    """Refuse flags that contradict each other, before anything is written."""
    check_numbers(
        cfg,
        "batch accumulate eval_every save_every lr clip width bins neighbours rays pixels blur "
        "samples importance_samples dims tau epsilon sinkhorn share",
        dict(workers=256, share=1, width=512, bins=10_000, dims=10_000, prototypes=100_000,
             neighbours=1000, blur=999, samples=10_000, importance_samples=10_000, sinkhorn=1000))
    require(min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
            f"--epochs {cfg.epochs} and --steps {cfg.steps}: "
            "one of them must be 0, the other positive")
    require(cfg.blur % 2 == 1,
            f"--blur {cfg.blur}: a Gaussian has a middle, give an odd number of pixels")
    require(cfg.prototypes >= 2,
            f"--prototypes {cfg.prototypes}: at least 2, or --without prototypes")
    shares = cfg.mask_points, cfg.mask_pixels, cfg.sky
    require(max(shares) < 1,
            f"--mask-points {cfg.mask_points}, --mask-pixels {cfg.mask_pixels} and "
            f"--sky {cfg.sky}: these are shares, from 0 to below 1")
    require(cfg.samples >= 2,
            f"--samples {cfg.samples}: start at 2, a section lies between two samples")
    require(cfg.scale < 1, f"--scale {cfg.scale}: expected a number below 1")
    learned = cfg.w_rend + (0 if cfg.without else cfg.w_proto)
    require(learned > 0, "--w-rend 0 without a weight of prototypes: nothing would be learned")
    require(cfg.neighbours >= 4,
            f"--neighbours {cfg.neighbours}: three points always lie in a plane, "
            "give 4 or more")


# ---- mask ----------------------------------------------------------------------------

def mask_points(points, b, lidar, share, rngs):
    """Mask whole blocks of 8 x 8 x 8 voxels, the same blocks in all sweeps.

    Each block is drawn by itself [ours]; UniPAD masks an exact share of the occupied ones.
    points (N, 5), b (N,), lidar a VoxelResNet -> (N,) bool, True = masked.
    """
    device = points.device
    extent = torch.tensor(lidar.high) - torch.tensor(lidar.low)  # (3,) m, on the host
    blocks = extent / (8 * torch.tensor(lidar.voxel))
    shape = blocks.ceil().int().tolist()                # X, Y, Z
    masked = torch.stack([torch.rand(shape, generator=rng, device=device) < share
                          for rng in rngs])             # (B, X, Y, Z)
    low = constant(tuple(lidar.low), device)            # (3,) m
    block = 8 * constant(tuple(lidar.voxel), device)    # (3,) m
    last = constant(tuple(n - 1 for n in shape), device, torch.int64)
    index = ((points[:, :3] - low) / block).long()      # (N, 3)
    index = index.clamp_min(0).minimum(last)            # the encoder drops points outside
    x, y, z = index.unbind(1)
    return masked[b, x, y, z]


def mask_pixels(images, cameras, share, rngs, patch=32):
    """Mask whole patches. images (B K, 3, H, W) -> (B K, H, W) bool, True = masked."""
    H, W = images.shape[-2:]
    rows = math.ceil(H / patch)
    columns = math.ceil(W / patch)
    masked = torch.cat([
        torch.rand(cameras, rows, columns, generator=rng, device=images.device) < share
        for rng in rngs])                               # (B K, rows, columns)
    masked = masked.repeat_interleave(patch, 1)
    masked = masked.repeat_interleave(patch, 2)
    return masked[:, :H, :W]


# ---- sample where surfaces bend ------------------------------------------------------

@dataclass(frozen=True)
class Curvature:
    """data.loader's prepare: surface variation at each keyframe point, 0 at older ones. D4

    The neighbours come from all sweeps. It is computed once a frame and cached.
    """
    neighbours: int

    @property
    def key(self):
        return f"surface-variation-1-k{self.neighbours}"

    def __call__(self, frame):
        xyz = frame.points[:, :3]
        keyframe = frame.points[:, 4] == 0
        curvature = np.zeros(len(xyz), np.float32)
        curvature[keyframe] = surface_variation(xyz[keyframe], xyz, self.neighbours)
        return {"points_curvature": curvature}


# The three samplers have one signature, and each uses what it needs:
#   xyz (M, 3) m, b (M,); pca: surface variation (M,), or None; sdf: a function of (xyz, b)
#   that gives (M,); step: of the differences, m  ->  weights (M,) >= 0.

def pca_curvature(xyz, b, pca, sdf, step):
    return pca                                          # D1: it needs no trained SDF


@functools.cache
def second_differences(device):
    """The sums of two of the six directions: distinct ones (19, 3), and which of them (36,)."""
    unit = torch.cat([torch.eye(3), -torch.eye(3)])     # (6, 3): + x y z, - x y z
    pairs = unit[:, None] + unit[None]                  # (6, 6, 3)
    offsets, where = torch.unique(pairs.view(36, 3), dim=0, return_inverse=True)
    return offsets.to(device), where.to(device)


def sdf_curvature(xyz, b, pca, sdf, step):
    """omega = ||d n~ / d p||, n~ = grad s / ||grad s|| [paper, curvature sampling] D1

    It is 0 on a plane, 1 / R on a cylinder of radius R, and sqrt(2) / R on a sphere.
    Central differences of `step` take 19 distinct values of the field for each point.
    """
    # D1: the printed norm ||.||_2 is read as Frobenius. Exact autograd of a trilinear
    # field gives a norm 3.5 times too small, hence differences [ours]. Beyond the
    # outermost cell centres the feature is constant: tilted surfaces within two cells
    # of the box's faces can look bent.
    offsets, where = second_differences(xyz.device)     # (19, 3), (36,)
    chunk = 4096 if xyz.device.type == "cpu" else 32768
    omega = [xyz.new_zeros(0)]
    for p, b_p in zip(xyz.split(chunk), b.split(chunk)):
        around = p[:, None] + step * offsets            # (m, 19, 3)
        b_around = b_p.repeat_interleave(19)
        s = sdf(around.view(-1, 3), b_around).view(-1, 19)
        s = s[:, where].view(-1, 6, 6)
        gradient = s[:, :, :3] - s[:, :, 3:]            # (m, 6, 3): 2 step grad s
        normal = F.normalize(gradient, dim=2)           # (m, 6, 3): n~ at p + step unit
        change = normal[:, :3] - normal[:, 3:]
        jacobian = change / (2 * step)                  # (m, 3, 3): row i is d n~ / d p_i
        omega.append(jacobian.flatten(1).norm(dim=1))
    return torch.cat(omega)


def uniform_weights(xyz, b, pca, sdf, step):
    return xyz.new_ones(len(xyz))


SAMPLERS = {"pca": pca_curvature, "sdf": sdf_curvature, "uniform": uniform_weights}


def clean_weights(weights):
    """Make weights safe for torch.multinomial: finite, positive, uniform if none is positive.

    They are clipped at their 99th percentile, so that a few outliers do not take every draw
    D1, and get a tiny floor [ours]. (M,) -> (M,)
    """
    if len(weights) == 0:
        return weights
    weights = torch.nan_to_num(weights, 0.0, 0.0, 0.0)
    place = int(0.99 * (len(weights) - 1))
    top = weights.sort().values[place]
    # top is 0 where fewer than 1 % of the weights are positive: these become equal
    clipped = weights.clamp_max(top.clamp_min(1e-12))
    clipped = clipped + 1e-6 * clipped.mean()
    return torch.where(weights.amax() > 0, clipped, 1.0)


def draw(weights, n, rng):
    """n of each row's columns by weight, without replacement: torch.multinomial's own draws.

    It would wait for the GPU, to see whether the weights are valid. weights (..., M) -> (..., n).
    """
    waiting = torch.empty_like(weights).exponential_(generator=rng)
    return (weights / waiting).topk(n).indices


def draw_points(weights, counts, n, rngs):
    """Draw at most n rows of each frame by weight [paper], without replacement [ours].

    weights (M,), counts: of the frames' rows -> rows (R,).
    """
    rows = torch.arange(len(weights), device=weights.device).split(counts)
    drawn = [row[draw(part, min(n, len(part)), rng)]
             for row, part, rng in zip(rows, weights.split(counts), rngs)]
    return torch.cat(drawn)


def pixel_weights(weights, xyz, counts, batch, blur):
    """Spread the weights of points over the images: a pixel's largest, then a Gaussian [paper].

    A point that stands behind another one in the image counts too [ours].
    weights (M,), xyz (M, 3) m, counts: of the frames' rows -> (B K, H, W).
    """
    count = len(batch.images)
    H, W = batch.images.shape[-2:]
    point, view, uv, _ = project(xyz, counts, batch.lidar2img, batch.hw)
    u, v = uv.long().unbind(1)
    pixel = (view * H + v) * W + u
    hit = weights.new_zeros(count * H * W)              # D1: the largest of a pixel's points
    hit.scatter_reduce_(0, pixel, weights[point], "amax")
    half = blur // 2
    sigma = 0.3 * ((blur - 1) / 2 - 1) + 0.8            # px
    tap = torch.arange(blur, device=hit.device) - half
    kernel = torch.exp(-0.5 * (tap / sigma) ** 2)
    kernel = kernel / kernel.sum()
    spread = hit.view(count, 1, H, W)
    spread = F.conv2d(spread, kernel.view(1, 1, 1, -1), padding=(0, half))
    spread = F.conv2d(spread, kernel.view(1, 1, -1, 1), padding=(half, 0))
    spread = spread[:, 0].clamp_min(0)                  # convolution may round below 0
    return spread * valid_pixels(batch.hw, (H, W))      # none in the padding


def below_sky(batch, sky):
    """Weight 1 below an image's top share `sky`, 0 above and in padding. -> (B K, H, W)."""
    H, W = batch.images.shape[-2:]
    v = torch.arange(H, device=batch.hw.device)[:, None]
    below = v >= sky * batch.hw[:, 0, None, None]       # (B K, H, 1)
    return (below & valid_pixels(batch.hw, (H, W))).float()


def draw_pixels(weights, n, rngs):
    """Draw n pixels of each image by weight [paper], without replacement [ours].

    weights (B K, H, W) -> view, v, u (Q,), and positive (Q,) bool: False where the weight is 0.
    """
    W = weights.shape[-1]
    parts = weights.flatten(1)                          # (B K, H W)
    # an image without a positive weight draws anywhere, and zeros come where few are positive
    some = parts.sum(1, keepdim=True) > 0               # (B K, 1)
    filled = torch.where(some, parts, 1.0)
    count = min(n, parts.shape[1])
    pixel = torch.cat([draw(part, count, rng)           # (B K, n)
                       for part, rng in zip(filled.chunk(len(rngs)), rngs)])
    positive = parts.gather(1, pixel) > 0
    view = torch.arange(len(parts), device=pixel.device).repeat_interleave(count)
    pixel = pixel.flatten()
    return view, pixel // W, pixel % W, positive.flatten()


# ---- field and rendering -------------------------------------------------------------

class Field(nn.Module):
    """f^SDF and f^RGB on trilinear features of the volume. Widths of [code UniPAD].

    Coordinates, distances and h are of the scene scaled to +-1. D11 The scaled point
    enters the first layer; the feature is added before each of the five. There is no
    geometric initialisation.
    """

    def __init__(self, channels, cells, scale, width=16, depth=5):
        super().__init__()
        self.cells = cells
        self.scale = scale                              # scaled units per metre
        self.place = nn.Linear(3, width)
        self.inject = nn.Linear(channels, depth * width)  # for all layers, in one product
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.output = nn.Linear(width, 1 + width)
        # D3: without the SDF's gradient the render path needs no second derivative.
        # Position and the fourth layer of UniPAD's head are left out too; and its SDF
        # adds the feature once more, before the output [ours].
        self.rgb = nn.Sequential(
            nn.Linear(channels + width + 3, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 3), nn.Sigmoid())
        self.sharpness = nn.Parameter(torch.tensor(0.3))  # ln(h) / 10

    @property
    def h(self):
        """Sharpness of the surface, 20.1 at first [code NeuS, UniPAD]. -> ()"""
        return (10 * self.sharpness).exp().clamp(1e-6, 1e6)

    def sdf(self, table, xyz, b):
        """SDF, geometry and feature at points. table (B Z Y X, C): the volume's cells as rows.

        xyz (M, 3) m, b (M,) -> s (M,), geometry (M, 16), feature (M, C).
        """
        flat, weight = multilinear(self.cells.index(xyz), self.cells.shape)
        first = b * math.prod(self.cells.shape)         # (M,) of the frame's cells
        feature = gather_weighted(table, flat + first[:, None], weight)  # (M, C)
        x = self.place(xyz * self.scale)                # (M, 16)
        injections = self.inject(feature).chunk(len(self.layers), 1)
        for layer, injection in zip(self.layers, injections):
            # beta [code UniPAD]. Linear from 10 / beta on: faster, and at most 5e-7 away
            x = F.softplus(layer(x + injection), beta=100, threshold=10)
        s, geometry = self.output(x).split([1, x.shape[1]], 1)
        return s[:, 0], geometry, feature

    def sdf_along(self, table, origin, direction, b, depth):
        """The field at samples along rays.

        origin, direction (R, 3), b (R,), depth (R, S) m
        -> s (R, S), geometry (R S, 16), feature (R S, C).
        """
        xyz = origin[:, None] + direction[:, None] * depth[..., None]  # (R, S, 3)
        b_samples = b.repeat_interleave(depth.shape[1])
        s, geometry, feature = self.sdf(table, xyz.view(-1, 3), b_samples)
        return s.view_as(depth), geometry, feature

    def render(self, table, origin, direction, b, far, jitter, quantile, colour):
        """Range and, if asked, colour along rays [paper, rendering].

        origin, direction (R, 3), b (R,), far (R,) m: where the ray leaves the volume's
        box. jitter (R, S) places S samples from NEAR to far, quantile (R, S') more
        where a surface is likely; both in [0, 1). -> range (R,) m, colour (R, 3) on
        black [code UniPAD] or None.
        """
        # D9: for these weights NeuS and UniPAD take the steeper of two neighbouring
        # sections. They space the quantiles evenly, and UniPAD jitters a ray's samples
        # by one number. Ours are the rendering's own weights and independent numbers. h
        # = 64 is theirs.
        with torch.no_grad():
            coarse = stratified(torch.full_like(far, NEAR), far, jitter)  # (R, S)
            s, _, _ = self.sdf_along(table, origin, direction, b, coarse)
            fine = importance(coarse, neus_weights(s, 64.0), quantile)  # (R, S')
            depth = torch.cat([coarse, fine], 1).sort(1).values  # (R, S + S')
        s, geometry, feature = self.sdf_along(table, origin, direction, b, depth)
        w = neus_weights(s, self.h)                     # (R, S + S' - 1): w_n = t_n alpha_n
        # D5: the middle of a section is NeuS's; with its start every range would be half a
        # section short. The weights are not divided by their sum, as printed.
        middle = (depth[:, 1:] + depth[:, :-1]) / 2     # (R, S + S' - 1)
        r_hat = (w * middle).sum(1)                     # (R,): r~ = sum w_n r_n
        if not colour:
            return r_hat, None
        direction = direction.repeat_interleave(depth.shape[1], 0)
        c = self.rgb(torch.cat([feature, geometry, direction], 1))
        c = c.view(*depth.shape, 3)                     # (R, S + S', 3)
        c_middle = (c[:, 1:] + c[:, :-1]) / 2           # D5: the field is not asked again there
        c_hat = (w[..., None] * c_middle).sum(1)        # (R, 3): c~ = sum w_n c_n
        return r_hat, c_hat


# ---- prototypes ----------------------------------------------------------------------

@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes Q: exp(S / epsilon), its columns scaled to equal sums, then its rows to 1, in turn.

    The order is SwAV's. scores (N, N_K) -> (N, N_K).
    """
    # D8: in logarithms, since exp(S / 0.05) overflows. A prototype's share is over the cells
    # of all ranks; the padded row gives a rank without cells a maximum.
    log_q = scores / epsilon
    for _ in range(iterations):
        padded = F.pad(log_q, (0, 0, 0, 1), value=-1e9)
        top = all_reduce(padded.amax(0), torch.distributed.ReduceOp.MAX)  # (N_K,)
        share = all_reduce((log_q - top).exp().sum(0))  # (N_K,), times exp(-top)
        log_q = log_q - (share.log() + top)             # equal shares, up to a constant
        log_q = log_q - log_q.logsumexp(1, keepdim=True)  # rows of sum 1: it cancels here
    return log_q.exp()


def entropy(scores):
    """Entropy of softmax(scores) over prototypes. scores (N, N_K) -> (N,) nats."""
    log_p = F.log_softmax(scores, 1)
    return -(log_p.exp() * log_p).sum(1)


class Prototypes(nn.Module):
    """One set of prototypes for the cells of both modalities [paper, prototypes]."""

    def __init__(self, cfg, lidar_width, image_width):
        super().__init__()
        self.cfg = cfg
        # random, not normalised [ours]: with unit prototypes and tau = 1, L_EM would be inert
        self.K = nn.Parameter(torch.randn(cfg.prototypes, cfg.dims))
        # D12: SwAV's heads, as wide inside as the LiDAR volume [ours]; the paper has no details
        self.head_lidar = mlp(lidar_width, lidar_width, cfg.dims)
        self.head_image = mlp(image_width, lidar_width, cfg.dims)

    def forward(self, lidar, image):
        """The three losses. lidar (N, C), image (N, C') are features of the same N cells.

        -> L_SwAV, L_EM, L_GMM (), {monitor: ()}.
        """
        cfg = self.cfg
        K = self.K                                      # (N_K, d_K)
        N_K = len(K)
        S_P = F.normalize(self.head_lidar(lidar), dim=1) @ K.t()  # (N, N_K) Eq. 13
        S_I = F.normalize(self.head_image(image), dim=1) @ K.t()  # (N, N_K) Eq. 14
        Q_P = sinkhorn(S_P, cfg.epsilon, cfg.sinkhorn)  # (N, N_K), no gradient
        Q_I = sinkhorn(S_I, cfg.epsilon, cfg.sinkhorn)
        # D6: as printed, tau stands outside the exponential, where it cancels; L_EM's softmax
        # is printed without tau. At the paper's tau = 1 all readings agree.
        log_p_P = F.log_softmax(S_P / cfg.tau, 1)       # (N, N_K)
        log_p_I = F.log_softmax(S_I / cfg.tau, 1)
        swapped = Q_I * log_p_P + Q_P * log_p_I         # (N, N_K)
        # mean_rows is over the rows of all ranks, and sums the other axes
        L_SwAV = -mean_rows(swapped) / N_K              # [paper, swapped prediction]
        L_EM = mean_rows(entropy(S_P) + entropy(S_I)) / N_K  # [paper, EM]
        G = K @ K.t()                                   # (N_K, N_K)
        # D8: the sum is signed, so it has no lower bound: prototypes may grow (prototype_norm)
        off_diagonal = G.sum() - G.diagonal().sum()
        L_GMM = off_diagonal / (N_K * (N_K - 1))        # [paper, Gram] D8
        return L_SwAV, L_EM, L_GMM, self.monitors(S_P, S_I, Q_P)

    @torch.no_grad()
    def monitors(self, S_P, S_I, Q_P):
        """Prototypes in use; how often both modalities choose the same. -> {name: ()}"""
        N_K = len(self.K)
        best_P = S_P.argmax(1)                          # (N,)
        best_I = S_I.argmax(1)
        same = (best_P == best_I).float()
        return dict(perplexity_P=perplexity(best_P, N_K),
                    perplexity_I=perplexity(best_I, N_K),
                    perplexity_Q=perplexity(Q_P.argmax(1), N_K),
                    agreement=same.sum() / max(len(same), 1),
                    prototype_norm=self.K.norm(dim=1).mean())


# ---- the method ----------------------------------------------------------------------

class CLAP(nn.Module):
    """Both losses of a batch. Fine-tuning loads lidar, camera and fuse, and nothing else."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg = cfg
        self.grid = grid
        width = cfg.width
        # D2: the paper has Swin and a lift through T. ResNet is the image network of
        # all methods here. It has no mask token: masked pixels take the mean colour.
        # The lift pulls: each cell asks its pixels for the feature, times the
        # probability of the cell's depth, times the number of bins. Nothing is lifted
        # beyond the last bin. D10: the paper does not say. Ours is the detector's, so
        # that fine-tuning loads it. On nuScenes the volume is 5 x 180 x 180.
        # D12: on CUDA the convolutions of these three run in bfloat16, but for the one that
        # reads coordinates; everything else runs in float32.
        self.lidar, self.camera, self.fuse = trunk(grid, cfg.resnet, width, cfg.bins)
        self.shallow = conv3d(4 * width, 2 * width, 3)  # f^3D [paper]; its shape [code UniPAD]
        # D11: the largest x or y becomes 1 [code UniPAD]. In metres L_range alone would weigh 54
        # times as much on nuScenes. The paper does not say.
        faces = *grid.low[:2], *grid.high[:2]
        extent = max(map(abs, faces))                   # m
        self.field = Field(2 * width, self.lidar.cells[-1], 1 / extent)
        self.proto = None
        if cfg.without != "prototypes":
            self.proto = Prototypes(cfg, 8 * width, 5 * width)

    def draw_masks(self, batch, rngs):
        """The masks of each frame, from its own random stream; True = masked.

        -> points (N,) bool, pixels (B K, H, W) bool.
        """
        cfg = self.cfg
        masked = mask_points(batch.points, batch.b_points, self.lidar,
                             cfg.mask_points, rngs)
        masked_px = mask_pixels(batch.images, batch.cameras, cfg.mask_pixels, rngs)
        return masked, masked_px

    def encode(self, batch, masked, masked_px):
        """Both branches and their fusion, of what the masks leave.

        masked (N,), masked_px (B K, H, W) bool, True = masked -> F~ as a table
        (B Z Y X, C), lidar Level, image (B, C', Z, Y, X), and the cells that a camera
        sees (B, Z, Y, X) bool.
        """
        visible = (~masked).nonzero()[:, 0]
        points = batch.points[visible]
        b = batch.b_points[visible]
        lidar = self.lidar(points, b, batch.size)[-1]   # P^, sparse
        image, seen = self.camera(batch, lidar.cells, masked_px)  # I^
        fused = self.fuse(lidar.dense(), image)  # F^ (B, 4 width, Z, Y, X)
        # not in bfloat16: the sdf sampler takes second differences of it
        shallow = self.shallow(fused)                   # F~ (B, 2 width, Z, Y, X)
        table = shallow.permute(0, 2, 3, 4, 1).flatten(0, 3)
        return table, lidar, image, seen

    def targets(self, batch):
        """Keyframe points in the box, over CLOSE from the LiDAR, masked or not.

        -> rows (M,) of batch.points, counts: how many of them in each frame, direction
        (M, 3), range (M,) m from the LiDAR's place.
        """
        # D4: older sweeps, and Waymo's four other lasers (1 ms of age), were shot from
        # elsewhere. All rays of a sweep start where the LiDAR stands at the frame's
        # time, although it moves while it scans. (The paper draws about one point in a
        # hundred, which fits all ten sweeps better than one.)
        away = batch.points[:, :3] - batch.origin[batch.b_points]  # (N, 3)
        r = away.norm(dim=1)                            # (N,)
        keyframe = batch.points[:, 4] == 0
        valid = self.lidar.inside(batch.points) & keyframe & (r > CLOSE)
        rows, counts = rows_where(valid, batch.counts)
        r = r[rows]
        return rows, counts, away[rows] / r[:, None], r

    @torch.no_grad()
    def sampling_weights(self, table, batch, rows, counts, sampler):
        """The sampler's weight of points, cleaned frame by frame. rows (M,), counts -> (M,)"""
        def sdf(xyz, b):
            return self.field.sdf(table, xyz, b)[0]

        xyz = batch.points[rows, :3]
        b = batch.b_points[rows]
        pca = batch.extra["points_curvature"][rows] if sampler == "pca" else None
        size = self.lidar.cells[-1].step[0]             # m, of a cell
        step = size / 2                                 # of the differences [ours]
        omega = SAMPLERS[sampler](xyz, b, pca, sdf, step)
        return torch.cat([clean_weights(part) for part in omega.split(counts)])

    @torch.no_grad()
    def pixel_maps(self, omega, xyz, counts, batch, sampler):
        """Weight of every pixel: the points' own, spread, or uniform. -> (B K, H, W)"""
        if sampler == "uniform":
            return below_sky(batch, self.cfg.sky)
        return pixel_weights(omega, xyz, counts, batch, self.cfg.blur)

    def ray_noise(self, counts, rngs):
        """Random numbers of the rays of each frame, from its own stream. -> (R, S + S')"""
        width = self.cfg.samples + self.cfg.importance_samples
        return torch.cat([torch.rand(n, width, generator=rng, device=rng.device)
                          for n, rng in zip(counts, rngs)])

    def render(self, table, origin, direction, b, counts, rngs, colour):
        """Range and, if asked, colour along rays that leave the box farther than NEAR.

        Without gradient, 8192 at a time. origin, direction (R, 3), b (R,) sorted, counts: of
        the frames' rays -> range (R,) m, colour (R, 3) or None.
        """
        noise = self.ray_noise(counts, rngs)            # (R, S + S')
        far = box_exit(origin, direction, self.grid.low, self.grid.high)  # (R,) m
        # split(0) would be an error
        chunk = max(len(b), 1) if torch.is_grad_enabled() else 8192
        ranges = []
        colours = []
        rows = torch.arange(len(b), device=b.device)
        for part in rows.split(chunk):
            jitter, quantile = noise[part].tensor_split([self.cfg.samples], 1)
            r, c = self.field.render(table, origin[part], direction[part], b[part],
                                     far[part], jitter, quantile, colour)
            ranges.append(r)
            colours.append(c)
        return torch.cat(ranges), torch.cat(colours) if colour else None

    def render_pixels(self, table, batch, view, v, u, positive, rngs):
        """Colour of pixels, true and rendered.

        Those of no weight do not count, nor those whose ray leaves the box nearer than NEAR.
        view, v, u, positive (Q,) -> c, c_hat (Q', 3).
        """
        uv = torch.stack([u, v], 1) + 0.5               # (Q, 2) px, pixel centres
        origin, direction = rays(uv, view, batch.lidar2img)
        far = box_exit(origin, direction, self.grid.low, self.grid.high)
        drawn = [len(view) // batch.size] * batch.size
        rows, counts = rows_where(positive & (far > NEAR), drawn)  # (Q',)
        view = view[rows]
        b = view // batch.cameras
        _, c_hat = self.render(table, origin[rows], direction[rows], b, counts, rngs, colour=True)
        c = batch.images[view, :, v[rows], u[rows]].float()  # (Q', 3)
        return c / 255, c_hat

    @torch.no_grad()
    def shared_cells(self, lidar, seen, batch, masked, rngs, most=8192):
        """Sparse sites with a visible point in their own cell, which a camera sees. D7

        lidar a Level of V sites, seen (B, Z, Y, X) bool, masked (N,) bool, True = masked
        -> rows (N_3D,) of the level, at most `most` random ones a frame [ours].
        """
        # D7: the paper does not say which cells. All sites of the encoder would be three to
        # four times as many: strided convolutions spread points over their neighbours.
        cells = lidar.cells
        zyx = cells.index(batch.points[:, :3]).round().long()
        last = constant(tuple(n - 1 for n in cells.shape), zyx.device, torch.int64)
        zyx = zyx.clamp_min(0).minimum(last)            # border cells reach to the faces
        bzyx = torch.cat([batch.b_points[:, None], zyx], 1)
        cell = ravel(bzyx, cells.shape, lidar.size).long()
        visible = self.lidar.inside(batch.points) & ~masked
        points = torch.zeros(seen.numel(), dtype=torch.int32, device=cell.device)
        points.index_add_(0, cell, visible.int())       # (B Z Y X,) visible points in each cell
        shared = seen.flatten() & (points > 0)
        shared = shared[lidar.keys()]                   # (V,)
        frames = torch.arange(batch.size + 1, device=cell.device)
        first = torch.searchsorted(lidar.coords[:, 0].contiguous(), frames)
        before = F.pad(shared.cumsum(0), (1, 0))[first]  # (B + 1,) shared sites before a frame
        counts = before.diff().tolist()
        rows = torch.nonzero_static(shared, size=sum(counts))[:, 0]
        drawn = []
        for part, rng in zip(rows.split(counts), rngs):
            order = torch.randperm(len(part), generator=rng, device=part.device)
            drawn.append(part[order[:most]])
        return torch.cat(drawn)

    def forward(self, batch, uniform=False):
        """-> L (), {term: ()}. uniform: sample uniformly while the SDF is still noise."""
        cfg = self.cfg
        rngs = frame_rngs(batch.seeds, batch.points.device)
        sampler = "uniform" if uniform else cfg.sampler

        # 1 both branches see what is left of the same frame
        masked, masked_px = self.draw_masks(batch, rngs)        # (N,) (B K, H, W)
        table, lidar, image, seen = self.encode(batch, masked, masked_px)

        # 2 curvature sampling: points by omega, pixels by omega spread over the images
        rows, counts, direction, r = self.targets(batch)        # (M,) (M, 3) (M,)
        xyz, b = batch.points[rows, :3], batch.b_points[rows]   # (M, 3) (M,)
        omega = self.sampling_weights(table, batch, rows, counts, sampler)  # (M,)
        maps = self.pixel_maps(omega, xyz, counts, batch, sampler)  # (B K, H, W)
        drawn = draw_points(omega, counts, cfg.rays, rngs)      # (R,), R <= B N_L
        pixels = draw_pixels(maps, cfg.pixels, rngs)            # view, v, u, positive (B N_C,)
        xyz, b, direction, r = xyz[drawn], b[drawn], direction[drawn], r[drawn]  # R rows now
        counts = [min(count, cfg.rays) for count in counts]

        # 3 render range along LiDAR rays and colour along camera rays
        origin = batch.origin[b]                                # (R, 3)
        r_hat, _ = self.render(table, origin, direction, b, counts, rngs, colour=False)
        s, _, _ = self.field.sdf(table, xyz, b)                 # (R,), 0 on a surface
        c, c_hat = self.render_pixels(table, batch, *pixels, rngs)  # (Q', 3), Q' <= B N_C
        L_range = mean_rows((r - r_hat).abs()) * self.field.scale  # [paper, rendering] D11
        L_surface = mean_rows(s.abs())                          # [paper, rendering]
        L_colour = mean_rows((c - c_hat).abs()) / 3             # [paper, rendering]
        L_rend = L_range + cfg.w_surface * L_surface + cfg.w_colour * L_colour  # [paper]
        L = cfg.w_rend * L_rend                                 # [paper, total loss]
        terms = dict(L_rend=L_rend, L_range=L_range, L_surface=L_surface,
                     L_colour=L_colour, h=self.field.h)

        # 4 prototypes: of a cell that both modalities see, each predicts the other's code
        if self.proto is not None:
            cell = self.shared_cells(lidar, seen, batch, masked, rngs)  # (N_3D,) D7
            b_cell, z, y, x = lidar.coords[cell].unbind(1)
            f_lidar = lidar.features[cell]                      # (N_3D, C)
            f_image = image[b_cell, :, z, y, x]                 # (N_3D, C')
            L_SwAV, L_EM, L_GMM, monitors = self.proto(f_lidar, f_image)
            L_proto = cfg.w_swav * L_SwAV + cfg.w_em * L_EM + cfg.w_gmm * L_GMM  # [paper]
            L = L + cfg.w_proto * L_proto                       # [paper, total loss]
            terms |= dict(L_proto=L_proto, L_SwAV=L_SwAV, L_EM=L_EM, L_GMM=L_GMM,
                          cells=float(len(cell)), **monitors)
        return L, terms | self.sampling_stats(batch, xyz, counts)

    @torch.no_grad()
    def sampling_stats(self, batch, xyz, counts):
        """Share of the drawn points within 0.3 m of a flat road, and in labelled boxes.

        Labels are read for this monitor only. xyz (R, 3) m, counts: of the frames' points
        -> {name: ()}
        """
        count = max(len(xyz), 1)
        on_ground = (xyz[:, 2] - self.grid.ground).abs() < 0.3  # (R,)
        stats = dict(on_ground=on_ground.float().sum() / count)
        if batch.boxes is not None:
            on_boxes = inside_boxes(xyz, counts, batch.boxes, batch.box_counts)  # (R,)
            stats["on_boxes"] = on_boxes.float().sum() / count
        return stats


# ---- val errors ----------------------------------------------------------------------

@torch.no_grad()
def held_out_errors(model, batches, device):
    """Mean absolute errors on val frames under the training mask, in m, colours in [0, 1].

    range_hidden and range_visible are of rays whose point was masked, or not. beam_mean
    and nearest_ray are guesses for the masked ones. None: no such ray. -> {name: float}
    """
    model.eval()
    ray_table = []
    colour_errors = []
    for batch in batches:
        batch = batch.to(device)
        rngs = frame_rngs(batch.seeds, device)
        masked, masked_px = model.draw_masks(batch, rngs)
        table = model.encode(batch, masked, masked_px)[0]
        ray_table.append(val_rays(model, table, batch, masked, rngs))
        pixels = val_pixels(model, table, batch, rngs)
        fresh = frame_rngs(batch.seeds, device)
        c, c_hat = model.render_pixels(table, batch, *pixels, fresh)
        colour_errors.append((c - c_hat).abs().mean(1))
    model.train()
    elevation, r, hidden, error, error_near = torch.cat(ray_table).cpu().double().unbind(1)
    hidden = hidden.bool()
    error_beam = (r - beam_mean(elevation, r)).abs()
    return rounded(range_hidden=error[hidden].mean(), range_visible=error[~hidden].mean(),
                   beam_mean=error_beam[hidden].mean(),
                   nearest_ray=error_near[hidden].nanmean(),
                   colour=torch.cat(colour_errors).cpu().double().mean())


def val_rays(model, table, batch, masked, rngs):
    """Elevation in rad, range in m, whether the point was masked, and two errors in m.

    The errors are of the rendered range and of the nearest visible ray. -> (M, 5)
    """
    rows, counts, direction, r = model.targets(batch)
    b = batch.b_points[rows]
    hidden = masked[rows]
    r_hat, _ = model.render(table, batch.origin[b], direction, b, counts, rngs, colour=False)
    r_near = nearest_visible(direction, r, b, hidden)
    elevation = direction[:, 2].asin()
    error = (r - r_hat).abs()
    error_near = (r - r_near).abs()
    return torch.stack([elevation, r, hidden.float(), error, error_near], 1)


def val_pixels(model, table, batch, rngs):
    """Pixels of a batch, drawn as in training, masked or not. -> view, v, u, positive (Q,)"""
    cfg = model.cfg
    rows, counts, _, _ = model.targets(batch)
    xyz = batch.points[rows, :3]
    omega = model.sampling_weights(table, batch, rows, counts, cfg.sampler)
    maps = model.pixel_maps(omega, xyz, counts, batch, cfg.sampler)
    return draw_pixels(maps, cfg.pixels, rngs)


def beam_mean(elevation, r):
    """Mean range in each ray's half degree of elevation, which is its beam on nuScenes.

    The mean is over these very rays, which flatters it. (M,) rad, (M,) m -> (M,) m
    """
    half_degree = (elevation.rad2deg() * 2).round()
    _, beam, count = torch.unique(half_degree, return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=r.dtype)
    total.index_add_(0, beam, r)
    return (total / count)[beam]


def nearest_visible(direction, r, b, masked):
    """Range of the nearest visible ray of the frame, in angle; nan: none. -> (M,) m"""
    nearest = torch.full_like(r, math.nan)
    for frame in b.unique().tolist():
        rows = (b == frame).nonzero()[:, 0]
        visible = rows[~masked[rows]]
        if len(visible):
            tree = cKDTree(direction[visible].cpu().numpy())
            _, neighbour = tree.query(direction[rows].cpu().numpy())
            neighbour = torch.as_tensor(neighbour, device=r.device)
            nearest[rows] = r[visible[neighbour]]
    return nearest


def rounded(**metrics):
    """Four digits after the point; None for a mean over nothing. -> {name: float}"""
    return {name: round(float(value), 4) if value.isfinite() else None
            for name, value in metrics.items()}


# ---- figure --------------------------------------------------------------------------

@torch.no_grad()
def save_figure(model, batch, out):
    """figures/rendered.png: range and colour of the first frame: true, visible, rendered."""
    model.eval()
    rngs = frame_rngs(batch.seeds, batch.points.device)
    masked, masked_px = model.draw_masks(batch, rngs)
    table = model.encode(batch, masked, masked_px)[0]
    rows, counts, direction, r = model.targets(batch)
    b = batch.b_points[rows]
    r_hat, _ = model.render(table, batch.origin[b], direction, b, counts, rngs, colour=False)
    first = b == 0
    visible = first & ~masked[rows]
    style = dict(cmap="turbo", vmin=0, vmax=float(r[first].max()), aspect="auto",
                 interpolation="nearest")
    panels = [("range, m: truth", range_image(direction[first], r[first]), style),
              ("visible", range_image(direction[visible], r[visible]), style),
              ("rendered", range_image(direction[first], r_hat[first]), style)]
    for view in range(min(batch.cameras, 3)):
        h, w = batch.hw[view].tolist()
        image = batch.images[view, :, :h, :w].permute(1, 2, 0).cpu()
        visible = ~masked_px[view, :h, :w, None].cpu()
        rendered = render_image(model, table, batch, view, rngs)
        panels += [(f"camera {view}: truth", image), ("visible", image * visible),
                   ("rendered, black above the volume", rendered)]
    figure(Path(out) / "figures" / "rendered.png", panels, 3, (5.0, 2.0))
    model.train()


def render_image(model, table, batch, view, rngs, stride=2):
    """Every stride-th pixel of an image, rendered on black. -> (h, w, 3) in [0, 1]"""
    h, w = batch.hw[view].tolist()
    rows = torch.arange(0, h, stride, device=table.device)
    columns = torch.arange(0, w, stride, device=table.device)
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    uv = torch.stack([u, v], -1).view(-1, 2) + 0.5      # (R, 2) px
    views = torch.full((len(uv),), view, device=uv.device)
    origin, direction = rays(uv, views, batch.lidar2img)
    met = box_exit(origin, direction, model.grid.low, model.grid.high) > NEAR
    b = views[met] // batch.cameras
    counts = [0] * batch.size
    counts[view // batch.cameras] = len(b)
    _, c_hat = model.render(table, origin[met], direction[met], b, counts, rngs, colour=True)
    image = torch.zeros_like(origin)
    image[met] = c_hat
    return image.view(*v.shape, 3).cpu()


def range_image(direction, r):
    """Rays sorted into elevations of 1.33 degrees and azimuths of 1 degree, as a picture.

    1.33 degrees are a 32-beam LiDAR's. Forward is in the middle, left on the left.
    direction (M, 3), r (M,) m -> (rows, 360) m, nan where no ray is.
    """
    x, y, z = direction.cpu().unbind(1)
    azimuth = torch.atan2(y, x).rad2deg()
    column = (180 - azimuth).long() % 360
    row = (z.asin().rad2deg() / 1.33).round().long()
    image = torch.full((136, 360), math.nan)
    image[68 - row, column] = r.cpu()
    return image[image.isfinite().any(1)]


def first_with_targets(model, batches, device):
    """The first batch whose first frame has a range target, on the device; else None."""
    for batch in batches:
        batch = batch.to(device)
        _, counts, _, _ = model.targets(batch)
        if counts[0]:
            return batch
    return None


# ---- training ------------------------------------------------------------------------

def train(rank, world, cfg):
    check(cfg)

    # data
    dataset = data.open_dataset(cfg.data, cfg.preset, labels=False)
    data.announce(dataset, cfg.batch)
    prepare = Curvature(cfg.neighbours) if cfg.sampler == "pca" else None
    augment = partial(data.augment_cloud, rotation=cfg.rotation, scale=cfg.scale,
                      flip=dataset.grid.mirrors)
    drawn = draw_labels(dataset, dataset.split("train"), cfg.share, "frames", cfg.seed)
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed,
                         workers=cfg.workers, augment=augment, prepare=prepare,
                         indices=drawn, accumulate=cfg.accumulate)
    val_loader = data.loader(dataset, "val", 2, seed=cfg.seed, workers=cfg.workers,
                             prepare=prepare,
                             indices=data.spread(dataset.split("val"), VAL_FRAMES))

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = CLAP(cfg, dataset.grid)
    device = start(cfg, rank, world, dataset, drawn)
    model.to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr,
                            weight_decay=cfg.weight_decay, fused=True)
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling", "--profile").profile(
            cfg, net, loader, [opt], device, rank, cfg.share,
            lidar=(model.lidar, "forward"), camera=(model.camera, "forward"),
            render=(model, "render"))

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    uniform_steps = cfg.uniform_epochs * loader.steps_per_epoch
    require(cfg.sampler != "sdf" or uniform_steps < steps,
            f"--uniform-epochs {cfg.uniform_epochs:g} are {uniform_steps:.0f} steps, "
            f"the run has {steps}: the SDF would never guide the sampling. "
            "Give fewer epochs, or --sampler uniform")
    first = resume(cfg.out, model, opt)  # 0 when there is nothing to resume
    run = Run(cfg, rank, world, first, steps, device, f"lr {cfg.lr:g} not rescaled")
    val_batches = data.keep(val_loader.once())  # the same on every rank

    # train
    for step, batches in run.batches(loader, first):
        uniform = cfg.sampler == "sdf" and step < uniform_steps
        if step % cfg.eval_every == 0:
            run.log_val(step, evaluate(model, val_batches, device, uniform))
        lr = cfg.lr * cosine(step, cfg.warmup, steps)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.zero_grad()
        terms = []
        for batch in batches:  # one, without --accumulate
            loss, more = net(batch, uniform)
            (loss / cfg.accumulate).backward()
            terms.append(dict(loss=loss, **more))
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        # raises if a term is not finite, before the update
        run.log(step, batches, terms, grad_norm=norm, lr=lr)
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
        tool = load_tool("figures")
        metrics = held_out_errors(model, val_batches, device)
        if tool:
            metrics |= tool.clap_diagnostics(model, val_batches, device)
        write_text(Path(cfg.out) / "metrics.json", to_json(metrics))
        shown = first_with_targets(model, val_batches, device)
        if shown:
            save_figure(model, shown, cfg.out)
        loss_curves(cfg.out)
        if shown and tool:
            tool.clap_figures(model, shown, cfg.out)
        print(json.dumps(metrics))
        print(f"{cfg.out}: val range error {metrics['range_hidden']} m where points were "
              f"masked (beam mean {metrics['beam_mean']}, nearest visible ray "
              f"{metrics['nearest_ray']}), {metrics['range_visible']} m where visible")


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
