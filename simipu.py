"""SimIPU (Li et al., AAAI 2022, arXiv 2112.04680): image features learn 3-D from points.

The point network learns from itself, by matching two views of a cloud. The image
network learns to give a pixel the feature that the point network gives its point.

    python simipu.py --data /kitti --gpus 8    # the released code's sizes
    python simipu.py                           # the embedded world, minutes on two cores

Read with: common.py geometry (project_frame, valid_pixels, sample_image), matching
(pair_points), contrast (info_nce), networks (ResNet, BatchNorm, mlp); data.py Frame,
Batch, crop_images.
Each loss in plain loops: tests/test_simipu.py, test_both_losses_match_plain_loops.
To fork this file, change the three places that say FORK.

What is kept is the image network. finetune.py --init RUN --modality camera loads it, and
so does torchvision's ResNet of the same depth (keys of camera.resnet, without fc).

[paper] is the paper; [code] is the release (github.com/zhyever/SimIPU at 5b346e3), mostly
its inter_intro_decorator_moco_better.py and simipu_kitti.py; [ours] is what neither says.

    paper            here                    meaning
    p^alpha, p^beta  alpha, beta             the cloud as recorded; the same points
                                             moved by T, in another order;
                                             (B, n, 4) x, y, z, intensity
    T                T; a2b in the batch     turn, scale, mirror; (4, 4)          Eq. 1
    F_P; l, f        points; l_*, f_*        point network; places (B, p, 3) and  Eq. 2
                                             features (B, p, C) of p = n / 16 points
    M_1              i, j                    pairs of T(l_alpha) and l_beta       Eq. 3
    F_I              camera.resnet           ResNet, last stage (C5)              Eq. 5
    M_2; f^gamma     point, image, uv;       points that an image shows; C5 at    Eq. 6
                     f_image                 these pixels
    lambda, mu       w_intra, w_inter        weights of the two losses            Eq. 8
    tau              tau                     temperature                          Eq. 4
    -                head_*; z_*             projection heads; what is contrasted

Shapes: B frames, K cameras, n points drawn of a cloud, p of them with features; M pairs
in L_intra, M' in L_inter. (B p) stands for rows, frame after frame.

Without the inter-modal loss the image network learns nothing: the paper's row "w/o
inter" is its row "scratch". Without the intra-modal loss it matches a random, frozen
point network. The points of a frame fall on few cells of stride 32. If each point took
the feature of its nearest cell, L_inter could not fall below cell_inter, the mean over
pairs of the log of the number of pairs in the same cell. Features are interpolated, so
it can.

Departures from the paper or the code; the reasons stand in the code, at the same numbers:
  D1  Eq. 7 as printed: points are queries, images keys. f_alpha is cut before its head.
      The code: images are queries, the cut is after the head.
  D2  The keys of Eq. 4 have no gradient, as in the code; the losses are means, not sums.
  D3  Relative coordinates go into every set abstraction; the code leaves them out.
  D4  The last sampling splits its points at 1024, where D-FPS begins; the code at 512.
  D5  Pixels become cells of C5 by the padded batch's size; the code takes each image's own.
  D6  Normalisation, initial weights and precision are not the code's.
  D7  All cameras are used, a point in the first that sees it; a cloud is one sweep.
  D8  At most 4096 pairs a rank, at random; the code takes all. Negatives are of the rank.
  D9  Images are brought to the data set's size in data.py before the random resize.
  D10  Every fifth frame of Waymo and KITTI's 3,712 training frames, as in the code.
  D11  The small preset trains the image network and the heads with AdamW, not SGD.
  D12  T has no translation and mirrors y, as in the code; the paper has a translation.
  D13  A frame that shows fewer than n / 64 points has no pair; the code repeats points.
"""
import functools
import json
import math
from bisect import bisect_left, bisect_right
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
from common import (
    constant, send, project_frame, valid_pixels, sample_image,  # geometry
    pair_points,  # matching
    info_nce,  # contrast
    ResNet, BatchNorm, mlp, bf16_autocast,  # networks
    mean_rows,  # processes
    frame_rngs, random_subset,  # random streams
    parse, require, check_numbers, launch, start, wrap, resume, save,  # runs: skip
    draw_labels, load_resnet, destroy_group, Run, evaluate, figure, overlay, loss_curves,
    load_tool, write_text, to_json, first_line,
)

# torch for CUDA brings it along; torch for CPUs does not
try:
    import triton
    import triton.language as tl
except (ImportError, OSError, RuntimeError):
    triton = None

UNITS = ("camera.resnet",)     # FORK: what backbones.safetensors holds
RADII = (                      # m, outer radii of the shells of each abstraction [code]
    (0.2, 0.4, 0.8),
    (0.4, 0.8, 1.6),
    (1.6, 3.2, 4.8),
)
NEIGHBOURS = (                 # most points in each shell [code]
    (32, 32, 64),
    (32, 32, 64),
    (16, 16, 16),
)
# D10: the release's README says every fifth frame of Waymo, its configuration has KITTI's
# training split. The paper counts all of Waymo's, and KITTI's test frames too (11,230).
WAYMO_EVERY = 5                # train on every fifth frame of Waymo [code]
VAL_BATCHES = 3                # of two val frames each, for evaluation [ours]


@dataclass
class Config:
    # the run
    data: str = ""             # root of the data set; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # default small exactly when --data is not given
    out: str = "runs/simipu"   # run folder; the same command again resumes it
    gpus: int | None = None    # processes on this machine; 0: CPU; default 1 with CUDA, else 0
    workers: int = 4           # loader processes for each rank [ours]
    seed: int = 0              # of order, augmentation, draws and initial weights
    eval_every: int = 500      # steps between the losses on val frames [ours]
    save_every: int = 500      # steps between checkpoints [ours]
    profile: int = 0           # steps to time instead of training; 0: train [ours]

    # what is learned from
    share: float = 1.0         # of the training frames: a seeded draw, for Fig. 5 [paper]

    # initial weights of the image network
    image_init: str = ""       # weight file or run, for "double fine-tuning"; empty: random [paper]

    # optimisation
    epochs: int = 50           # 0: steps decide; published weights are of 50 of 100 [code]
    steps: int = 0             # 0: epochs decide [ours]
    batch: int = 4             # frames for each rank [code, on 8 ranks]
    accumulate: int = 1        # batches of a step, one after the other [ours]
    lr_points: float = 1e-3    # of the point network, always AdamW [code]
    optimiser: Literal["sgd", "adamw"] = "sgd"  # of image network and heads [code] D11
    lr: float = 0.03           # of image network and heads [code]
    decay: float = 0.99        # factor on both learning rates after each epoch [code]

    # the two views
    points: int = 16384        # n, drawn of a cloud; a sixteenth of them is matched [code]
    rotation: float = 1.5708   # rad, T turns by U(-rotation, rotation) about z [code]
    scale: float = 0.25        # T scales by U(1 - scale, 1 + scale) [code]
    # images are resized by the lower of two draws of U(zoom_low, zoom_high)
    zoom_low: float = 0.515    # 640 of 1242 px; the code's height: 192 of 375, 0.512 [code]
    zoom_high: float = 1.92    # 720 of 375 px; the code's width: 2400 of 1242, 1.932 [code]

    # networks
    resnet: Literal[18, 50] = 50  # depth of the image network [paper]
    width: int = 32            # channels of the point network's first layers; C = 32 width [code]
    radius_scale: float = 1.0  # factor on RADII [code]
    dims: int = 128            # channels of the contrasted features z [paper]

    # losses
    match: Literal["hungarian", "greedy"] = "hungarian"  # [paper]; greedy: the code's [code]
    pairs: int = 4096          # most pairs of either loss, a rank [paper] D8
    tau: float = 0.07          # temperature [code]
    w_intra: float = 1.0       # lambda; 0: the point network stays random (Table 5) [code]
    w_inter: float = 1.0       # mu; 0: the image network stays random (Table 5) [code]


SMALL = dict(                  # --preset small: minutes on two CPU cores; all [ours]
    workers=0, eval_every=50, save_every=100,
    epochs=0, steps=300, batch=2,
    # D11: with the code's SGD at 0.03 and two frames a step, all filters of the first
    # layer became alike within ten steps (`stem`, their effective rank, fell from 45 to
    # 2), and L_inter fell all the same. We do not know what happens at the code's batch
    # of 32
    optimiser="adamw", lr=1e-3,
    points=4096, zoom_low=0.75, zoom_high=1.5,
    resnet=18, width=16,
    radius_scale=2.0,          # the points drawn are about three times as far apart as KITTI's
)


def check(cfg):
    """Refuse flags that contradict each other, before anything is written."""
    check_numbers(
        cfg,
        "batch accumulate eval_every save_every lr_points lr decay zoom_low width radius_scale "
        "dims pairs tau share",
        dict(workers=256, share=1, width=512, dims=10_000, zoom_high=10, decay=1,
             radius_scale=1000))
    require(min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
            f"--epochs {cfg.epochs} and --steps {cfg.steps}: "
            "one of them must be 0, the other positive")
    require(cfg.points >= 64 and cfg.points % 32 == 0,
            f"--points {cfg.points}: expected a multiple of 32, at least 64; "
            "a sixteenth is matched, half from each sampler")
    require(cfg.w_intra + cfg.w_inter > 0,
            f"--w-intra {cfg.w_intra} and --w-inter {cfg.w_inter}: "
            "expected weights that are not both 0")
    require(cfg.radius_scale >= 0.001,
            f"--radius-scale {cfg.radius_scale}: expected a number from 0.001 to 1000")
    require(cfg.scale < 1, f"--scale {cfg.scale}: expected a number below 1")
    require(cfg.zoom_low <= cfg.zoom_high,
            f"--zoom-low {cfg.zoom_low}, --zoom-high {cfg.zoom_high}: "
            "expected 0 < low <= high")


# ---- two views of a cloud: FORK, what a frame gives ----------------------------------

def random_transform(rng, centre, rotation, scale):
    """T: turn about the vertical through `centre` (3,), then scale about the origin, then
    mirror y half of the time [code]. -> (4, 4) float64, mirrored bool.
    """
    # D12: the paper lists rotation, translation and scaling and calls T rigid; the code's
    # translation has deviation 0, and its mirroring is not in the paper
    angle = rng.uniform(-rotation, rotation)
    size = rng.uniform(1 - scale, 1 + scale)
    mirrored = bool(rng.random() < 0.5)
    cos, sin = np.cos(angle), np.sin(angle)
    T = np.eye(4)
    T[:2, :2] = [[cos, -sin], [sin, cos]]
    T[:3, 3] = centre - T[:3, :3] @ centre
    T[:3] *= size
    if mirrored:
        T[1] *= -1
    return T, mirrored


def farthest_points(xyz, count):
    """D-FPS: from row 0 on, always the point farthest from those chosen.

    xyz (n, 3) m -> (count,) int64. In the loader's workers: numpy in, numpy out.
    T does not change the choice. The first k chosen are the choice of k; and applied to its
    own result, in that order, the sampling takes the first rows.
    """
    points = np.ascontiguousarray(xyz, np.float32)[:, :, None]      # (n, 3, 1)
    order = np.argsort(xyz[:, 0])                           # along x
    planes = np.ascontiguousarray(points[order, :, 0].T)    # (3, n), in that order
    x = planes[0].tolist()
    x_of = points[:, 0, 0].tolist()
    parts = np.empty_like(planes)
    nearest = np.full(len(xyz), np.inf, np.float32)         # m^2, to what was chosen
    chosen = np.zeros(count, np.int64)
    last, low, high = 0, 0, len(xyz)
    for step in range(1, count):
        part = parts[:, :high - low]
        np.subtract(planes[:, low:high], points[last], out=part)
        np.multiply(part, part, out=part)
        square = part[0]
        np.add(square, part[1], out=square)
        np.add(square, part[2], out=square)
        rows = order[low:high]
        nearest[rows] = np.minimum(nearest[rows], square)
        last = int(nearest.argmax())
        chosen[step] = last
        # farther along x than the largest distance that is left, none changes
        reach = 1.001 * float(nearest[last]) ** 0.5
        low = bisect_left(x, x_of[last] - reach)
        high = bisect_right(x, x_of[last] + reach)
    return chosen


@dataclass(frozen=True)
class TwoViews:
    """data.loader's augment: draws points and T; resizes the images and mirrors them.

    The sampling that needs no features is done here too, in the worker. -> Frame with
    points (n, 5), the same for both views, in the order of view alpha; and with extra
        a2b (4, 4)                        T
        order (n,)                        rows of alpha in the order of beta
        first_alpha, first_beta (n / 4,)  D-FPS of each view
        seen ()                           how many points there were to draw from
    D13: fewer than n / 64 count as none: seen is 0 and n points far apart stand in.
    """
    grid: data.Grid
    points: int
    rotation: float
    scale: float
    zoom: tuple[float, float]

    def __call__(self, frame, rng):
        rows = self.usable(frame)
        centre = (np.array(self.grid.low) + np.array(self.grid.high)) / 2
        T, mirrored = random_transform(rng, centre, self.rotation, self.scale)
        frame = self.resized(frame, mirrored, rng)
        if len(rows):
            # in random order; if there are fewer than n, all with repetition [code]
            drawn = rng.choice(rows, self.points, replace=len(rows) < self.points)
            frame = data.select(frame, drawn)
        else:
            # 100 m apart, so that no ball query joins them
            apart = np.outer(100.0 * np.arange(self.points), [1, 0, 0, 0, 0])
            frame = replace(frame, points=apart.astype(np.float32))
        order = rng.permutation(self.points)
        xyz = frame.points[:, :3]
        extra = dict(
            a2b=T.astype(np.float32),
            order=order,
            first_alpha=farthest_points(xyz, self.points // 4),
            first_beta=farthest_points(xyz[order], self.points // 4),   # T changes nothing
            seen=len(rows),
        )
        return replace(frame, extra=extra)

    def usable(self, frame):
        """Rows of the points to draw from: in range, keyframe sweep, seen by a camera."""
        xyz = np.asfortranarray(frame.points[:, :3])    # in a tenth of the time of rows
        low = np.array(self.grid.low)
        high = np.array(self.grid.high)
        hw = [image.shape[1:] for image in frame.images]
        # D7: what some camera sees. The paper has one camera, on Waymo the front one,
        # and cuts the clouds to it; here a data set's cameras are all used, as by the
        # detector
        rows = ((xyz > low) & (xyz < high)).all(1)
        rows &= data.is_keyframe(frame.points)
        rows &= data.visible_points(frame.points, frame.lidar2img, hw).any(0)
        if rows.sum() < self.points / 64:
            # D13 [ours]: every copy is a neighbour of every other: millions of pairs
            return np.zeros(0, np.int64)
        return rows.nonzero()[0]

    def resized(self, frame, mirrored, rng):
        """The frame with its images resized by a random factor, and mirrored if beta is.

        The code mirrors with one coin, too [code]; lidar2img follows, so alpha stays.
        """
        # D9: as for the detector, whose readers resize; KITTI's change by 0.5 and 2.4
        # %, Waymo's shrink to a quarter
        factor = min(rng.uniform(*self.zoom, 2))
        boxes = []
        sizes = []
        for image in frame.images:
            h, w = image.shape[1:]
            H = max(round(h * factor), 1)
            W = max(round(w * factor), 1)
            boxes.append((0, 0, h, w))
            sizes.append((H, W))
        return data.crop_images(frame, boxes, sizes, [mirrored] * len(boxes))


def per_frame(batch, name):
    """An extra of TwoViews, one row for each frame. -> (B, n or n / 4)."""
    return batch.extra[name].view(batch.size, -1)


def transform_points(a2b, xyz):
    """a2b (B, 4, 4), xyz (B, n, 3) m -> (B, n, 3)."""
    return xyz @ a2b[:, :3, :3].transpose(1, 2) + a2b[:, None, :3, 3]


# ---- the point network ---------------------------------------------------------------

@torch.no_grad()
def farthest_features(x, count):
    """F-FPS: the greedy choice of farthest_points in the space of x = (xyz, feature).

    x (B, n, C) -> (B, count) int64, frame by frame.
    """
    x = x - x.mean(1, keepdim=True)     # the expanded square below cancels less
    square = x.square().sum(2)          # (B, n)
    distance = square[:, :, None] + square[:, None]
    distance.baddbmm_(x, x.transpose(1, 2), alpha=-2)       # (B, n, n) squared
    if x.is_cuda and kernel_works(x.device):
        return farthest_by_kernel(distance, count)
    return farthest_by_rounds(distance, count)


def farthest_by_rounds(distance, count):
    """distance (B, n, n) -> (B, count) int64; three operators for each round."""
    nearest = torch.full_like(distance[:, 0], math.inf)     # (B, n)
    frames = torch.arange(len(distance), device=distance.device)
    chosen = torch.zeros(count, len(distance), dtype=torch.int64, device=distance.device)
    for step in range(1, count):
        torch.minimum(nearest, distance[frames, chosen[step - 1]], out=nearest)
        torch.argmax(nearest, 1, out=chosen[step])
    return chosen.t()


# The rounds are some 4,600 operators a step, too small to keep a GPU busy. Here one program
# does all rounds of a frame, with `nearest` in registers.
if triton is not None:
    @triton.jit
    def farthest_kernel(distance, chosen, n, count, block: tl.constexpr):
        frame = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, block)
        inside = column < n
        nearest = tl.where(inside, float("inf"), float("-inf"))     # columns past n never win
        last = 0
        tl.store(chosen + frame * count, last)
        for step in range(1, count):
            row = distance + (frame * n + last) * n
            nearest = tl.minimum(nearest, tl.load(row + column, inside, 0.0))
            last = tl.argmax(nearest, 0)                            # of equal ones the first
            tl.store(chosen + frame * count + step, last)


def farthest_by_kernel(distance, count):
    """farthest_by_rounds as one operator. distance (B, n, n) float32 on a GPU."""
    B, n, _ = distance.shape
    chosen = torch.empty(B, count, dtype=torch.int64, device=distance.device)
    farthest_kernel[(B,)](distance, chosen, n, count, triton.next_power_of_2(n), num_warps=8)
    return chosen


@functools.cache
def kernel_works(device):
    """Whether Triton compiles the kernel here, and it chooses as farthest_by_rounds does."""
    # small whole numbers: exact distances, many of them equal
    places = (torch.arange(300, device=device) ** 2 % 91 % 12).view(2, 50, 3).float()
    distance = (places[:, :, None] - places[:, None]).square().sum(3)
    try:
        if torch.equal(farthest_by_kernel(distance, 20), farthest_by_rounds(distance, 20)):
            return True
        reason = "it chooses other points"
    except Exception as error:          # e.g. no Triton, no C compiler, no room for its cache
        reason = first_line(error)
    print(f"simipu: the Triton kernel of farthest_features is not used ({reason}): three small "
          "operators for each point take its place, which is slower", flush=True)
    return False


@torch.no_grad()
def ball_query(centres, sources, radii, most):
    """The first `most` neighbours of each centre in each shell, in the order of sources.

    A shell holds r_in <= d < r_out; a source at distance 0 is in every shell. Where there
    are fewer, the first is repeated. In metres: centres (B, m, 3), all among sources
    (B, n, 3); radii, increasing. most: one number for each radius.
    -> for each radius (B m, most) int64, rows of the (B n) sources.
    """
    (B, m, _), n = centres.shape, sources.shape[1]
    centre, source = nearby(centres, sources, 1.001 * radii[-1])    # cells are rounded
    offset = sources.flatten(0, 1)[source] - centres.flatten(0, 1)[centre]
    square = offset.square().sum(1)                         # (P,) m^2
    near = (square < radii[-1] ** 2).nonzero()[:, 0]
    pair = centre[near] * (B * n) + source[near]
    near = near[pair.argsort()]                             # by centre, then by source
    centre = centre[near]
    source = source[near]
    square = square[near]
    # where each centre's pairs begin, and where the last one's end
    begin = torch.searchsorted(centre, torch.arange(B * m + 1, device=centres.device))
    shells = []
    for inner, outer, count in zip((0.0, *radii), radii, most):
        inside = (square < outer ** 2) & (square >= inner ** 2) | (square == 0)
        before = F.pad(inside.cumsum(0), (1, 0))[begin]     # (B m + 1,) pairs inside, before it
        first = before[:-1, None]                           # (B m, 1)
        rank = torch.arange(count, device=centres.device)
        rank = torch.where(rank < before[1:, None] - first, rank, 0)    # (B m, most)
        # places of the pairs inside; size, the most there can be, spares a wait for the GPU
        place = torch.nonzero_static(inside, size=len(inside))[:, 0]
        shells.append(source[place[first + rank]])
    return shells


def nearby(centres, sources, width):
    """Each centre with every source of the 3 x 3 x 3 cells around it. [ours]

    centres (B, m, 3) m, sources (B, n, 3) m, width of a cell m -> (P,) row of the (B m)
    centres, (P,) row of the (B n) sources. Sources are sorted by cell, x fastest: three
    cells along x are one run of them.
    """
    low = sources.amin((0, 1))
    high = sources.amax((0, 1))
    shape = ((high - low) / width).long() + 3               # with a border of cells
    row_size = shape[0]
    plane_size = shape[0] * shape[1]
    frames = torch.arange(len(centres), device=centres.device)[:, None]

    def key(xyz):
        x, y, z = ((xyz - low) / width).long().unbind(2)
        plane = frames * shape[2] + z + 1
        return (plane * plane_size + (y + 1) * row_size + x + 1).flatten()

    keys, order = key(sources).sort(stable=True)
    dy = constant((-1, 0, 1), centres.device, torch.int64)
    around = (dy[:, None] * plane_size + dy * row_size).flatten()   # dz, then dy
    middle = key(centres)[:, None] + around                 # (B m, 9) middles of runs
    begin = torch.searchsorted(keys, middle - 1).flatten()
    end = torch.searchsorted(keys, middle + 1, right=True).flatten()
    count = end - begin                                     # (B m 9,)
    run = torch.repeat_interleave(count)                    # (P,)
    before = count.cumsum(0) - count                        # candidates in earlier runs
    place = torch.arange(len(run), device=run.device) - before[run]
    return run // 9, order[begin[run] + place]


def layers(*widths):
    """Linear, batch norm, ReLU between each two widths."""
    # D6: plain torch. Initial weights are its own (the code: mmcv's Kaiming-normal);
    # eps is 1e-3 in the whole point network (the code: 1e-5 where shells are joined).
    # Batch norms over points and pairs count the rows of every rank, so that a rank
    # without points does no harm (the code: only their own)
    modules = []
    for inputs, outputs in zip(widths, widths[1:]):
        modules.append(nn.Linear(inputs, outputs, bias=False))
        modules.append(BatchNorm(outputs, eps=1e-3))
        modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


class SetAbstraction(nn.Module):
    """PointNet++: a shared network on the neighbours in each shell, their maximum, and
    one layer on all shells together.
    """

    def __init__(self, inputs, widths, outputs, radii, most):
        super().__init__()
        self.radii = radii
        self.most = most
        self.shells = nn.ModuleList(layers(inputs + 3, *shell) for shell in widths)
        self.aggregate = layers(sum(shell[-1] for shell in widths), outputs)

    def forward(self, xyz, f, chosen):
        """xyz (V B, n, 3) m, f V x (B, n, C), chosen (V B, m), view after view
        -> xyz (V B, m, 3), f V x (B, m, C').
        """
        centres = xyz.gather(1, chosen[..., None].expand(-1, -1, 3))
        neighbours = ball_query(centres, xyz, self.radii, self.most)
        out = []
        for view in range(len(f)):
            # D2: only the first view, alpha, gets a gradient, as in the code; half the memory
            with torch.set_grad_enabled(view == 0 and torch.is_grad_enabled()):
                l, c = [part.chunk(len(f))[view] for part in (xyz, centres)]
                rows = [part.chunk(len(f))[view] - view * l[..., 0].numel() for part in neighbours]
                out.append(self.features(l, f[view], c, rows).view(*c.shape[:2], -1))
        return centres, out

    def features(self, xyz, f, centres, shells):
        """xyz (B, n, 3) m, f (B, n, C), centres (B, m, 3) m, shells: rows (B m, most) of the
        (B n) points -> (B m, C').
        """
        sources = torch.cat([xyz, f], 2).flatten(0, 1)      # (B n, 3 + C)
        out = []
        for network, rows in zip(self.shells, shells):
            # index_select, not x[rows]: its backward is deterministic on a CPU
            x = sources.index_select(0, rows.flatten())     # (B m most, 3 + C)
            x = x.view(*rows.shape, -1)                     # (B m, most, 3 + C)
            # D3: as in PointNet++ and 3DSSD, which the paper cites. The released
            # configuration has use_xyz=False: features alone go in, in the first
            # abstraction the intensity. Then turning or mirroring a cloud hardly
            # changes a feature: L_intra asks little
            relative = x[..., :3] - centres.flatten(0, 1)[:, None]
            x = torch.cat([relative, x[..., 3:]], 2)
            x = network(x.flatten(0, 1)).view(*rows.shape, -1)  # (B m, most, C'')
            out.append(x.amax(1))
        return self.aggregate(torch.cat(out, 1))


class PointEncoder(nn.Module):
    """F_P: three set abstractions, n -> n/4 -> n/8 -> n/16 points. Source: 3DSSD.

    They give 4, 8 and 32 times `width` channels: 128, 256 and 1024 [code].
    """

    def __init__(self, width, radius_scale):
        super().__init__()
        self.channels = 32 * width
        self.stage1 = self.stage(0, 1, width, 4 * width, radius_scale)
        self.stage2 = self.stage(1, 4 * width, 2 * width, 8 * width, radius_scale)
        self.stage3 = self.stage(2, 8 * width, 4 * width, 32 * width, radius_scale)

    def stage(self, level, inputs, width, outputs, radius_scale):
        """A set abstraction from `inputs` to `outputs` channels; `width`: of its first layers."""
        radii = tuple(radius_scale * radius for radius in RADII[level])
        narrow = (width, width, 2 * width)
        wide = (2 * width, 2 * width, 4 * width)
        widths = (narrow, narrow, wide)
        return SetAbstraction(inputs, widths, outputs, radii, NEIGHBOURS[level])

    def forward(self, views, first):
        """One view of the clouds or two, which are sampled and grouped in one go.

        views V x (B, n, 4), first V x (B, n / 4) their D-FPS -> l V x (B, p, 3) m,
        f V x (B, p, C), row V x (B, p): which of the points each is.
        p = n / 16, C = 32 width. Only the first view has a gradient.
        """
        V, points, first = len(views), torch.cat(views), torch.cat(first)
        p = points.shape[1] // 16
        # the first p of a D-FPS order are a D-FPS
        spread = torch.arange(p, device=points.device).expand(len(points), p)
        f = [view[..., 3:] for view in views]
        l, f = self.stage1(points[..., :3], f, first)       # D-FPS
        distinct = farthest_features(torch.cat([l, torch.cat(f)], 2), p)
        fused = torch.cat([distinct, spread], 1)            # FS: F-FPS and D-FPS of all
        l, f = self.stage2(l, f, fused)
        # D4: F-FPS of the first p (F-FPS's), D-FPS of the last p (D-FPS's), as in 3DSSD. The
        # code has twice 3DSSD's points but still splits at its 512: F-FPS takes all of those
        distinct = farthest_features(torch.cat([l, torch.cat(f)], 2)[:, :p], p // 2)
        chosen = torch.cat([distinct, p + spread[:, :p // 2]], 1)
        l, f = self.stage3(l, f, chosen)
        row = first.gather(1, fused.gather(1, chosen))
        return l.chunk(V), f, row.chunk(V)


# ---- matching ------------------------------------------------------------------------

def greedy_pairs(a, b, *_):
    """Row by row the nearest that is still free. a, b (n, 3) arrays -> (n,) rows of b.

    The code defines this and never calls it [code]. The greedy row of the paper's Table 5
    takes the nearest option "and repeats"; whether a partner may be taken twice is not said.
    """
    cost = cdist(a, b)
    pairs = np.zeros(len(a), np.int64)
    for row in range(len(a)):
        pairs[row] = cost[row].argmin()
        cost[:, pairs[row]] = np.inf
    return pairs


# ---- the method: FORK, the losses ----------------------------------------------------

def head(inputs, outputs):
    """Three layers between features and contrast, each with a batch norm [code]."""
    return nn.Sequential(mlp(inputs, inputs, inputs, outputs), BatchNorm(outputs))


class SimIPU(nn.Module):
    """Both losses of a batch. camera.resnet is kept, point network and heads are not."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.points = PointEncoder(cfg.width, cfg.radius_scale)
        # D6: images are RGB with ImageNet's mean and deviation, batch norms are
        # torchvision's, so that weights go in and out without a change. Initial weights
        # are torchvision's too, but residual blocks begin as identities (the code: torch's
        # default for each layer)
        self.camera = ResNet(cfg.resnet)
        self.head_intra = head(self.points.channels, cfg.dims)
        # D1: here this head learns. In the code image features are the queries and the
        # cut is after this head, which therefore keeps its random initial weights
        self.head_point = head(self.points.channels, cfg.dims)
        self.head_image = head(self.camera.widths[-1], cfg.dims)
        # a loss of weight 0 trains nothing, not even by weight decay
        for part in (self.points, self.head_intra):
            part.requires_grad_(cfg.w_intra > 0)
        for part in (self.camera, self.head_point, self.head_image):
            part.requires_grad_(cfg.w_inter > 0)

    def views(self, batch):
        """-> alpha, beta (B, n, 4), T (B, 4, 4)."""
        alpha = batch.points.view(batch.size, -1, 5)[..., :4]
        T = batch.extra["a2b"].view(-1, 4, 4)
        moved = transform_points(T, alpha[..., :3])         # Eq. 1
        moved = torch.cat([moved, alpha[..., 3:]], 2)
        order = per_frame(batch, "order")[..., None].expand(-1, -1, 4)
        return alpha, moved.gather(1, order), T

    @torch.no_grad()
    def start_pairing(self, moved, l_beta, id_alpha, id_beta):
        """Begin to pair the points of each frame one to one, in threads.

        moved, l_beta (B, p, 3) m, ids (B, p): equal for the same point
        -> iterator over B x (p,): the row of l_beta for each row of moved.
        """
        match = pair_points if self.cfg.match == "hungarian" else greedy_pairs
        # one fetch from the GPU; float64 holds the ids too
        parts = [moved, l_beta, id_alpha[..., None], id_beta[..., None]]
        rows = torch.cat([part.double() for part in parts], 2).cpu().numpy()
        id_alpha, id_beta = rows[..., 6].astype(np.int64), rows[..., 7].astype(np.int64)
        # scipy releases the GIL: with enough cores a batch takes as long as its slowest frame
        threads = ThreadPoolExecutor()
        partners = threads.map(match, rows[..., :3], rows[..., 3:6], id_alpha, id_beta)
        threads.shutdown(wait=False)            # each ends when its work is done
        return partners

    def intra_pairs(self, partners, batch):
        """M_1, the pairs of Eq. 3. -> i (M,) rows of (B p) in alpha, j (M,) in beta."""
        j = [rows + frame * len(rows) for frame, rows in enumerate(partners)]
        device = batch.points.device
        j = send(torch.from_numpy(np.concatenate(j)), device)   # (B p,)
        rows = torch.arange(len(j), device=device).chunk(batch.size)
        shown = [row if seen else row[:0] for row, seen in zip(rows, batch.extra["seen"])]
        i = self.draw_pairs(torch.cat(shown), batch)
        return i, j[i]

    def draw_pairs(self, rows, batch):
        """Which rows become pairs: cfg.pairs of them at random, or all. rows (N,) -> (M,)."""
        # D8: the paper's 4096 pairs are the code's 4 frames of 1024; the cap keeps
        # that, and the size of the logits, at a larger batch. One stream, that of the
        # first frame, so both losses draw the same points
        rng = frame_rngs(batch.seeds[:1], rows.device)[0]
        return random_subset(self.cfg.pairs, rows, rng)

    def image_features(self, images, hw):
        """images (B K, 3, H, W) uint8, hw (B K, 2) px -> C5 (B K, C, h, w), size (2,) px.

        size: the pixels that C5 covers, the batch's H, W rounded up to multiples of 32.
        """
        # D5: sample_image divides by it. The code divides by each image's own padded size,
        # though the batch is padded to the largest, so smaller images are read in the wrong
        # place; and it has align_corners=True, off by half a cell, 16 px, at the edges
        H, W = images.shape[-2:]
        images = F.pad(images, (0, -W % 32, 0, -H % 32))
        size = images.shape[-2:]
        padding = ~valid_pixels(hw, size)
        with bf16_autocast(images.device):      # D6: bfloat16 on CUDA, for speed
            c5 = self.camera.stages(images, padding)[-1]
        return c5.float(), size

    def inter_pairs(self, l, batch):
        """M_2, the pairs of Eq. 6. -> point (M',) of (B p), image (M',), uv (M', 2) px."""
        point, image, uv = self.in_images(l, batch)
        rows = self.draw_pairs(torch.arange(len(point), device=point.device), batch)
        return point[rows], image[rows], uv[rows]

    @torch.no_grad()
    def in_images(self, l, batch):
        """Where each point lands, in the first of its frame's images that shows it.

        l (B, p, 3) m -> point (N,) row of (B p), image (N,), uv (N, 2) px. TwoViews draws
        only points that a camera sees; one lost by rounding at an edge has no pair. Nor has
        a frame that shows none (D13).
        """
        K = batch.cameras
        frames = zip(l, batch.lidar2img.split(K), batch.hw.split(K), batch.extra["seen"])
        parts = []
        for frame, (xyz, lidar2img, hw, count) in enumerate(frames):
            # (K, p) bool, (K, p, 2) px
            seen, uv, _ = project_frame(xyz, lidar2img, hw, near=0.1, far=math.inf)
            image = seen.byte().argmax(0)       # (p,) D7: one pair a point, as with one camera
            uv = uv[image, torch.arange(len(image), device=l.device)]       # (p, 2)
            shown = seen.any(0) if count else seen.new_zeros(len(image))
            parts.append((shown, image + frame * K, uv))
        shown, image, uv = [torch.cat(part) for part in zip(*parts)]
        point = shown.nonzero()[:, 0]           # the only wait for the GPU here
        return point, image[point], uv[point]

    def forward(self, batch):
        """-> L (), {term: ()}."""
        cfg = self.cfg

        # 1 two views (B, n, 4) -> of each l (B, p, 3) m, f (B, p, C), id (B, p) row of alpha
        alpha, beta, T = self.views(batch)                              # Eq. 1
        first = [per_frame(batch, "first_alpha"), per_frame(batch, "first_beta")]
        (l_alpha, l_beta), (f_alpha, f_beta), (id_alpha, row_beta) = \
            self.points([alpha, beta], first)                           # Eq. 2, D2
        id_beta = per_frame(batch, "order").gather(1, row_beta)

        # 2 intra-modal: pair the points one to one while the GPU computes C5, contrast the pairs
        moved = transform_points(T, l_alpha)                            # (B, p, 3) m
        pairing = self.start_pairing(moved, l_beta, id_alpha, id_beta)  # Eq. 3, in threads
        point, image, uv = self.inter_pairs(l_alpha, batch)     # (M',), (M',), (M', 2)  Eq. 6
        c5, size = self.image_features(batch.images, batch.hw)          # (B K, C, h, w)  Eq. 5
        i, j = self.intra_pairs(pairing, batch)                         # (M,)  Eq. 3
        z_alpha = self.head_intra(f_alpha.flatten(0, 1).index_select(0, i))     # (M, 128)
        with torch.no_grad():
            z_beta = self.head_intra(f_beta.flatten(0, 1)[j])           # (M, 128)
        L_intra = mean_rows(info_nce(z_alpha, z_beta, cfg.tau))         # Eq. 4, as a mean  D2

        # 3 inter-modal: contrast a point with C5 where it lands; F_P gets no gradient here
        f_image = sample_image(c5, image, uv, size)         # (M', C)  Eq. 6, D5
        z_point = self.head_point(f_alpha.detach().flatten(0, 1)[point])    # (M', 128)  D1
        z_image = self.head_image(f_image)                  # (M', 128)
        L_inter = mean_rows(info_nce(z_point, z_image, cfg.tau))        # Eq. 7

        L = cfg.w_intra * L_intra + cfg.w_inter * L_inter               # Eq. 8
        monitors = self.monitors(T, moved, l_beta, id_alpha, i, j, z_alpha,
                                 image, uv, z_point, z_image)
        return L, dict(L_intra=L_intra, L_inter=L_inter, **monitors)

    @torch.no_grad()
    def monitors(self, T, moved, l_beta, id_alpha, i, j, z_alpha,
                 image, uv, z_point, z_image):
        """What is logged next to the losses, as README explains it. -> {name: ()}."""
        frame = i // moved.shape[1]                         # (M,)
        scale = torch.linalg.det(T[:, :3, :3]).abs().pow(1 / 3)
        apart = moved.flatten(0, 1)[i] - l_beta.flatten(0, 1)[j]
        distance = apart.norm(dim=1) / scale[frame]         # (M,) m in view alpha
        point = torch.stack([frame, id_alpha.flatten()[i]], 1)      # (M, 2)
        cell = torch.cat([image[:, None], (uv / 32).long()], 1)     # (M', 3)
        return dict(
            matched_median=quantile(distance, 0.5),
            matched_p90=quantile(distance, 0.9),
            chance_intra=math.log(max(len(i), 1)),
            chance_inter=math.log(max(len(uv), 1)),
            floor_intra=log_multiplicity(point),
            cell_inter=log_multiplicity(cell),
            stem=effective_rank(self.camera.resnet.conv1.weight),
            std_alpha=feature_std(z_alpha),
            std_point=feature_std(z_point),
            std_image=feature_std(z_image),
        )


def quantile(x, share):
    """Quantile of x (M,), 0 where there is none. -> ()."""
    return x.quantile(share) if len(x) else x.new_zeros(())


def log_multiplicity(ids):
    """Mean over rows of log(rows with the same id): the lower bound of InfoNCE if equal
    ids have equal features. ids (M,) from 0, or (M, ...) where several numbers are one id -> ().
    """
    if not len(ids):
        return torch.zeros((), device=ids.device)
    ids = ids.view(len(ids), -1)
    key = torch.zeros_like(ids[:, 0])
    for column in ids.unbind(1):
        key = key * (column.max() + 1) + column             # one number for each id
    # counted in the sorted keys: unlike torch.unique it never waits for the GPU
    ordered = key.sort().values
    count = torch.searchsorted(ordered, key, right=True) - torch.searchsorted(ordered, key)
    return count.float().log().sum() / len(ids)


def effective_rank(weight):
    """Effective number of directions of a layer's filters. weight (N, ...) -> ().

    (sum of e)^2 / sum of e^2 over the eigenvalues e of their Gram matrix: N if filters
    are orthogonal and of one length, 1 if they are multiples of one.
    """
    rows = weight.flatten(1)
    gram = rows @ rows.t()                                  # (N, N)
    return gram.trace().square() / gram.square().sum()


def feature_std(z):
    """Standard deviation of the unit features over rows, mean over dimensions.

    z (M, C) -> (): 0.088 for 128 that are spread evenly, near 0 if all collapse.
    """
    if not len(z):
        return z.new_zeros(())
    return F.normalize(z, dim=1).std(0, correction=0).mean()


# ---- figure --------------------------------------------------------------------------

@torch.no_grad()
def save_figure(model, batch, out):
    """figures/similarity.png: where in an image z_image is like z_point, for three points."""
    model.eval()
    alpha, _, _ = model.views(batch)
    (l,), (f,), _ = model.points([alpha], [per_frame(batch, "first_alpha")])
    point, image, uv = model.in_images(l, batch)
    panels = []
    for camera in range(min(batch.cameras, 3)):             # of the first frame
        one = slice(camera, camera + 1)
        h, w = batch.hw[camera].tolist()
        c5, size = model.image_features(batch.images[one], batch.hw[one])
        z_image = model.head_image(c5[0].flatten(1).t())    # (cells, 128)
        rows = (image == camera).nonzero()[:, 0]
        rows = rows[uv[rows, 0].argsort()]                  # from left to right
        if not len(rows):
            continue
        for share in (0.15, 0.5, 0.85):
            row = rows[int(len(rows) * share)]
            z_point = model.head_point(f[0, point[row], None])  # (1, 128), a row of frame 0
            heat = F.cosine_similarity(z_point, z_image).view(1, 1, *c5.shape[-2:])
            heat = F.interpolate(heat, size=size, mode="bilinear")[0, 0, :h, :w]
            picture = tinted(batch.images[camera, :, :h, :w], heat)
            panel = overlay(picture, uv[row, None].cpu(), "w", 200, marker="+", linewidths=2)
            panels.append((f"camera {camera}: similarity to the point at +", panel))
    if panels:
        figure(Path(out) / "figures" / "similarity.png", panels, 3, (5.0, 2.2))
    model.train()


def tinted(image, heat):
    """image (3, H, W) uint8 with the colours of heat (H, W), -1 to 1 -> (H, W, 3), 0 to 1."""
    from matplotlib import colormaps
    picture = image.permute(1, 2, 0).cpu().numpy() / 255
    colours = colormaps["turbo"](heat.cpu().numpy() / 2 + 0.5)
    return (picture + colours[..., :3]) / 2


# ---- training ------------------------------------------------------------------------

def train(rank, world, cfg):
    check(cfg)

    # data
    # D7: no older sweeps, as the data sets of the paper
    dataset = data.open_dataset(cfg.data, cfg.preset, sweeps=1, labels=False)
    data.announce(dataset, cfg.batch)
    zoom = (cfg.zoom_low, cfg.zoom_high)
    augment = TwoViews(dataset.grid, cfg.points, cfg.rotation, cfg.scale, zoom)
    every = WAYMO_EVERY if dataset.grid.dataset == "waymo" else 1   # D10
    drawn = draw_labels(dataset, dataset.split("train")[::every], cfg.share, "frames", cfg.seed)
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed,
                         workers=cfg.workers, augment=augment, indices=drawn,
                         accumulate=cfg.accumulate)
    val_loader = data.loader(dataset, "val", 2, workers=cfg.workers, augment=augment)

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = SimIPU(cfg)
    if cfg.image_init:
        load_resnet(cfg.image_init, model.camera.resnet, rank)
    device = start(cfg, rank, world, dataset, drawn)
    torch.backends.cudnn.benchmark = False  # the pictures' size changes from batch to batch
    model.to(device)
    others = [*model.camera.parameters(), *model.head_intra.parameters(),
              *model.head_point.parameters(), *model.head_image.parameters()]
    opt_points = torch.optim.AdamW(model.points.parameters(), lr=cfg.lr_points,
                                   betas=(0.95, 0.99), weight_decay=0.01)       # [code]
    if cfg.optimiser == "sgd":
        opt_others = torch.optim.SGD(others, lr=cfg.lr,
                                     momentum=0.9, weight_decay=1e-4)           # [code]
    else:
        opt_others = torch.optim.AdamW(others, lr=cfg.lr, weight_decay=0.01)    # [ours] D11
    opts = [opt_points, opt_others]
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling", "--profile").profile(
            cfg, net, loader, opts, device, rank, cfg.share / every,
            points=(model.points, "forward"), camera=(model.camera, "stages"),
            matching=(model, "intra_pairs"))

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, *opts)  # 0 when there is nothing to resume
    about = f"lr {cfg.lr_points:g} and {cfg.lr:g} not rescaled"
    run = Run(cfg, rank, world, first, steps, device, about)
    val_batches = val_loader.first(VAL_BATCHES)  # the same on every rank, for every seed

    # train
    for step, batches in run.batches(loader, first):
        if step % cfg.eval_every == 0:
            run.log_val(step, evaluate(model, val_batches, device))
        factor = cfg.decay ** (step // loader.steps_per_epoch)
        for opt, base in zip(opts, (cfg.lr_points, cfg.lr)):
            for group in opt.param_groups:
                group["lr"] = base * factor
        for opt in opts:
            opt.zero_grad()
        terms = []
        for batch in batches:  # one, without --accumulate
            loss, more = net(batch)
            (loss / cfg.accumulate).backward()
            terms.append(dict(loss=loss, **more))
        # a loss of weight 0 leaves no gradient
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        lr = cfg.lr * factor
        # raises if a term is not finite, before the update
        run.log(step, batches, terms, grad_norm=norm, lr=lr)
        for opt in opts:
            opt.step()
        stop = run.interrupted()
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stop):
            save(cfg, step + 1, model, opts, UNITS, dataset.grid)
        if stop:
            run.leave(step)

    # results
    run.close()
    metrics = evaluate(model, val_batches, device)  # on every rank: mean_rows is a collective
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    destroy_group()
    if rank == 0:
        write_text(Path(cfg.out) / "metrics.json", to_json(metrics))
        shown = val_batches[0].to(device)
        save_figure(model, shown, cfg.out)
        # lines at val's levels; training has more pairs a rank if --batch is above 2
        loss_curves(cfg.out, {
            "L_intra": (metrics["chance_intra"], metrics["floor_intra"]),
            "L_inter": (metrics["chance_inter"], metrics["cell_inter"]),
        })
        tool = load_tool("figures")
        if tool:
            tool.simipu_figures(model, shown, cfg.out)
        print(json.dumps(metrics))
        print(f"{cfg.out}: val L_intra {metrics['L_intra']} "
              f"(chance {metrics['chance_intra']}, floor {metrics['floor_intra']}), "
              f"L_inter {metrics['L_inter']} "
              f"(chance {metrics['chance_inter']}, one cell {metrics['cell_inter']})")


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
