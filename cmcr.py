"""CMCR (Zhang and Hou, IJCV 2026, arXiv 2412.08973): image-to-LiDAR distillation beyond contrast.

Contrast teaches the LiDAR network what it shares with an image network. Rebuilding
masked pixels and estimating occupancy teach it what contrast alone would lose.

    python cmcr.py --data /nuscenes --gpus 6   # the released code's sizes, MoCo-v2 teacher
    python cmcr.py                             # the embedded world, minutes on two CPU cores

Read with: common.py geometry (project, sample_image), contrast (info_nce), networks
(VoxelResNet.point_features, ResNet.stages), processes (mean_over_ranks, AllReduceSum);
data.py Frame, Batch, augment_cloud, crop_images.
Begin at CMCR.forward. Each loss in plain loops: tests/test_cmcr.py,
test_every_loss_matches_plain_loops; the codebook's step: test_codes_follow_the_closed_form.
What is kept is the LiDAR network: finetune.py --init RUN --modality lidar.

Why contrast alone is not enough (Theorems 1 and 2 as far as we can reconstruct them
from FactorCL, Liang et al., NeurIPS 2023, which they follow): the best contrastive
features hold what point cloud and image have in common. What only one of them knows
about the task is lost, so the error stays above what the cloud itself allows (1). CMCR
adds specific features G to the shared features F. G explains the rest of its own
modality and brings the lost part back, if F and G do not repeat each other (2).

[figure] is the paper's overview figure (for the codebook also its Fig. 4), [code] the
release of March 2026, [ours] what neither says. We could not read the paper's
equations. The release lacks the replacement (D2) and repeats two point-pixel pairs for
each camera (D3), so this file follows the figure and takes sizes and weights from the
release. "The release" is always that code; a "code" is a row of the codebook. ALSO is
Boulch et al., CVPR 2023.

    paper              here                meaning
    F^3D, G^3D         F_3D, G_3D          heads shared_3d, specific_3d of a point's features
    F^2D, G^2D         F_2D, G_2D          heads shared_2d, specific_2d of a cell's C5, the
                                           ResNet's last stage (stride 32)
    F-bar              quantise(F)         nearest code, gradient straight through
    Z^3D, Z^2D         Z_3D, Z             F-bar + G, what the two decoders read
    L_NCE              L_NCE               contrast: points are queries, pixels are keys
    L_c                L_c2D, L_c3D        commitment to codes; L_c3D is [code] only
    L_rec, L_occ       L_rec, L_occ        masked pixels; occupancy (ALSO)
    L_orth             L_orth              F and G unlike each other
    -                  L_int               intensity at a query (ALSO), [code] only
    -                  p, q                F^3D and F^2D of the drawn pairs
    -                  a, b                rows of their nearest codes

F, p, q and the codes have unit length. Shapes: B frames, K cameras, N points, P pairs
of a point and an image that shows it, M of them drawn, Q occupancy queries, E edges
from a point to a query near it, D = --dims, H x W pixels of a crop, h x w cells of 32 x
32 pixels, n masked images.

Departures (the reasons stand where the code departs):
  D1  Exactly half of a crop's 32-px cells are masked; release: 16-px squares of the full image.
  D2  A masked cell gets the code of its points' mean, or a token; the release lacks this.
  D3  Pairs are distinct, visible, shared by contrast and codebook; cells, not pixels, get codes.
  D4  One codebook step for both modalities, of sums over all processes, without counts.
  D5  L_rec is of masked pixels only; L_orth is of both modalities, divided by the number of rows.
  D6  Neighbours are the nearest 32 within 1 m; queries are drawn after the augmentation.
  D7  The trunk is the detector's VoxelResNet, not a MinkUNet; bfloat16 on CUDA.
  D8  The release's cross-modal code matching is left out: it is constant within 0.04 nats.
  D9  --teacher none trains a random ResNet too; any other teacher is frozen, as in the release.
  D10  Crops come from the resized image, 12 to 48 % of a nuScenes one; release: 30 to 100 %.
  D11  The figure's L_kl on G^3D is left out: the release has no trace of it.
  D12  All 700 training scenes of nuScenes are seen; the release keeps 100 to choose parameters.
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
from common import (
    project, sample_image,  # geometry
    info_nce, perplexity,  # contrast
    random_subset, frame_rngs, cosine,  # schedules and random streams
    segment_sum, VoxelResNet, ResNet, bf16_autocast,  # networks
    all_reduce, mean_over_ranks, mean_rows, AllReduceSum,  # processes
    parse, require, check_numbers, launch, start, wrap, resume, save,  # runs: skip
    draw_labels, load_resnet, destroy_group, Run, evaluate, figure, loss_curves, load_tool,
    write_text, to_json,
)

UNITS = ("lidar",)             # what backbones.safetensors holds
STRIDE = 32                    # px, side of a cell: the stride of C5 [code]
VAL_BATCHES = 3                # batches of two val frames that are evaluated [ours]
MOCO = (
    "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/"
    "moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
    "a04e12f8",                # the beginning of its MD5
)


@dataclass
class Config:
    # the run
    data: str = ""             # root of the data set; empty: the embedded world
    preset: Literal["paper", "small"] = "paper"  # default small exactly when --data is not given
    out: str = "runs/cmcr"     # run folder; the same command again resumes it
    gpus: int | None = None    # processes on this machine; 0: CPU; default 1 with CUDA, else 0
    workers: int = 4           # loader processes for each rank [ours]
    seed: int = 0              # of order, augmentation, masks, draws and initial weights
    eval_every: int = 500      # steps between the losses on val frames [ours]
    save_every: int = 500      # steps between checkpoints [ours]
    profile: int = 0           # steps to time instead of training; 0: train [ours]

    # what is learned from
    share: float = 1.0         # of the training frames, drawn as finetune.py draws labels [ours]

    # optimisation
    epochs: int = 10           # 0: --steps decides [code]
    steps: int = 0             # 0: --epochs decides [ours]
    batch: int = 2             # frames for each rank [code, on 6 ranks]
    accumulate: int = 1        # batches of a step, one after the other [ours]
    lr: float = 1e-3           # of AdamW [code]
    lr_end: float = 1.0        # half a cosine to this share of lr; 1: constant [code]
    weight_decay: float = 0.01  # [code: the library's default]

    # augmentation
    rotation: float = 3.1416   # rad, about z [code]; a quarter of it on KITTI [ours]
    crop_h: int = 224          # px, a camera image is cropped and resized to it [code]
    crop_w: int = 416          # px [code]
    image_scale: float = 1.0   # of the data set's image size, before crops [ours]  D10
    crop_min_area: float = 0.3  # share of the largest crop [code: of the image]  D10
    crop_points: int = 1024    # a crop shows this many points, or 3/4 of its image's [code]

    # networks
    teacher: str = ""          # moco [code], none or WEIGHTS; "": moco if --data and ResNet-50
    resnet: Literal[18, 50] = 50  # depth of the teacher [code]
    width: int = 16            # of the first sparse level, then 2, 4, 8 times [code of OpenPCDet]
    dims: int = 64             # of F and G [code]

    # contrast and codebook
    pairs: int = 2048          # most point-pixel pairs of a rank [code]
    tau: float = 0.07          # temperature [code]
    codes: int = 400           # how many [code]
    momentum: float = 0.999    # of the codes [code]
    beta: float = 0.25         # of the commitment [code]

    # masked image modelling
    mask_cells: float = 0.5    # share of the cells of a masked image [figure], [code]
    mask_images: float = 0.5   # probability that an image is masked [code]

    # occupancy
    queries: int = 2048        # of a frame, in equal thirds: see occupancy_queries [code]
    depth: float = 0.1         # m, most that a query lies behind or just before its point [code]
    query_radius: float = 1.0  # m, to the neighbours of a query [code]
    neighbours: int = 32       # most of a query [code]  D6

    # total loss
    w_orth: float = 1.2        # of L_orth; the release's 0.1 at 50,000 voxels [ours]  D5
    without: Literal["", "replacement", "codebook", "specific"] = ""  # ablation [ours]


SMALL = dict(                  # --preset small: minutes on two CPU cores; all [ours]
    workers=0, eval_every=50, save_every=80,
    epochs=0, steps=320, lr=2e-3,
    crop_h=128, crop_w=224, crop_points=256,
    resnet=18, width=8,
    pairs=1024, codes=64, queries=1024,
    momentum=0.99,             # for a few hundred steps
)


def check(cfg):
    """Refuse flags that contradict themselves, before anything is written."""
    check_numbers(
        cfg,
        "batch accumulate eval_every save_every lr image_scale width dims pairs tau queries depth "
        "query_radius neighbours share",
        dict(workers=256, share=1, width=512, dims=10_000, codes=100_000, neighbours=1000,
             image_scale=10, crop_h=8192, crop_w=8192, momentum=1))
    require(min(cfg.epochs, cfg.steps) == 0 < max(cfg.epochs, cfg.steps),
            f"--epochs {cfg.epochs} and --steps {cfg.steps}: one of them must be 0, "
            "the other positive")
    require(all(n >= STRIDE and n % STRIDE == 0 for n in (cfg.crop_h, cfg.crop_w)),
            f"--crop-h {cfg.crop_h} --crop-w {cfg.crop_w}: masks are whole cells, "
            f"give multiples of {STRIDE}")
    require(0 < cfg.crop_min_area <= 1,
            f"--crop-min-area {cfg.crop_min_area}: expected more than 0 and at most 1")
    require(max(cfg.mask_cells, cfg.mask_images) <= 1,
            f"--mask-cells {cfg.mask_cells} --mask-images {cfg.mask_images}: "
            "these are shares, give 0 to 1")
    require(cfg.lr_end <= 1,
            f"--lr-end {cfg.lr_end}: this is a share of --lr, give 0 to 1")
    require(cfg.codes >= 2,
            f"--codes {cfg.codes}: give at least 2, or --without codebook")
    require(cfg.teacher != "moco" or cfg.resnet == 50,
            f"--teacher moco is a ResNet-50, but --resnet is {cfg.resnet}: "
            "give --resnet 50, or --teacher none or WEIGHTS")


# ---- crops and queries of one frame, in the loader -----------------------------------

def random_crop(rng, size, uv, aspect, cfg):
    """A random part of an image. size (H, W) -> top, left, height, width, whole px.

    Its aspect (width / height) is within 10 % of `aspect` [ours]; its area is
    U(crop_min_area, 1) of the largest part with that aspect. At most 50 are drawn [ours],
    until one shows enough of the points at uv (n, 2) px; after that it is the middle.
    """
    # D10: The loader gives images of one size to all methods, data.Grid.image times
    # --image-scale; they show less height than those on disk. Shares are of the largest
    # part of them: 12 to 48 % of a nuScenes image on disk. The release keeps 30 to
    # 100 %, with an aspect from 14/9 to 17/9. Where a crop is shrunk its pixels are
    # averaged; the release does not antialias.
    H, W = size
    enough = min(cfg.crop_points, 0.75 * len(uv))
    for attempt in range(51):
        middle = attempt == 50
        ratio = aspect * rng.uniform(0.9, 1.1)
        share = rng.uniform(cfg.crop_min_area, 1)
        height = min(H, W / ratio)                  # of the largest part
        if not middle:
            height = height * share ** 0.5
        h = max(int(height), 1)
        w = max(int(height * ratio), 1)
        top = (H - h) // 2 if middle else rng.integers(H - h + 1)
        left = (W - w) // 2 if middle else rng.integers(W - w + 1)
        within = ((uv >= (left, top)) & (uv < (left + w, top + h))).all(1)
        if within.sum() >= enough:
            break
    return int(top), int(left), h, w


def occupancy_queries(xyz, intensity, origin, n, depth, rng):
    """Queries on the rays from the LiDAR to its points [code; ALSO].

    A third of them lie up to `depth` m behind a point (occupied), a third up to `depth`
    before it, a third anywhere before it (both free).
    xyz (N, 3) m, intensity (N,), origin (3,) m
    -> place (n, 3) m, occupied (n,), intensity (n,) of the point, -1 if far; float32.
    """
    if len(xyz) == 0:
        return np.zeros((0, 3), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    counts = (n - 2 * (n // 3), n // 3, n // 3)                 # behind, before, far
    kind = np.repeat(["behind", "before", "far"], counts)       # (n,)
    # each kind has points of its own permutation; they repeat where there are too few
    rows = [np.resize(rng.permutation(len(xyz)), count) for count in counts]
    rows = np.concatenate(rows)                                 # (n,) into the points
    u = rng.random((n, 1))
    ray = xyz[rows] - origin                                    # (n, 3)
    direction = ray / np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-6)
    step = np.where(kind == "behind", depth, -depth)[:, None]   # (n, 1) m
    far = kind == "far"
    place = np.where(far[:, None], origin + u * ray, xyz[rows] + step * u * direction)
    occupied = kind == "behind"
    target = np.where(far, -1, intensity[rows])
    return tuple(x.astype(np.float32) for x in (place, occupied, target))


def nearest_points(queries, xyz, n, radius):
    """The n points nearest to each query, within radius m.

    queries (Q, 3), xyz (N, 3) m -> (Q, n) rows of xyz, nearest first, -1 for none.
    """
    # D6: the release's library takes any n of those within the radius, other ones on a
    # GPU than on a CPU
    if len(xyz) == 0:
        return np.full((len(queries), n), -1, np.int64)
    # built in half the time of the default, which is for clouds of many equal points
    tree = cKDTree(xyz, balanced_tree=False, compact_nodes=False)
    _, rows = tree.query(queries, n, distance_upper_bound=radius)
    rows = rows.reshape(len(queries), n)                        # scipy gives (Q,) if n = 1
    return np.where(rows < len(xyz), rows, -1).astype(np.int64)  # and row N for none


@dataclass(frozen=True)
class Views:
    """data.loader's augment: it turns the cloud, crops images and draws queries.

    Only points of the keyframe sweep that lie in the range are kept. The cloud is
    rotated and mirrored; each image is cropped, and mirrored or not whatever the cloud
    was.
    Frame -> Frame with extra: queries (Q, 3) m, occupied (Q,), intensity (Q,), and edges
    (E, 2), the rows of a query and of a point near it, the nearest first for each query.
    """
    grid: data.Grid
    cfg: Config

    def __call__(self, frame, rng):
        cfg, grid = self.cfg, self.grid
        rotation = cfg.rotation if grid.mirrors[0] else cfg.rotation / 4
        frame = data.augment_cloud(frame, rng, rotation, 0.0, grid.mirrors)
        xyz = np.asfortranarray(frame.points[:, :3])            # in a tenth of the time of rows
        in_range = (xyz >= np.float32(grid.low)) & (xyz < np.float32(grid.high))
        frame = data.select(frame, in_range.all(1) & data.is_keyframe(frame.points))
        frame = self.crop(frame, rng)

        # D6: The release draws them before it turns the cloud. Rays and distances turn
        # with the cloud, so this is the same, but for the range. Waymo: the points of
        # all lasers go in, but only TOP's (age 0) lie on rays from the origin.
        xyz = frame.points[:, :3]
        ray = frame.points[:, 4] == 0
        queries, occupied, intensity = occupancy_queries(
            xyz[ray], frame.points[ray, 3], frame.origin, cfg.queries, cfg.depth, rng)
        neighbours = nearest_points(queries, xyz, cfg.neighbours, cfg.query_radius)
        query, k = np.nonzero(neighbours >= 0)                  # (E,) each
        edges = np.stack([query, neighbours[query, k]], 1)
        return replace(frame, extra=dict(queries=queries, occupied=occupied,
                                         intensity=intensity, edges=edges))

    def crop(self, frame, rng):
        """A crop of each image, resized to crop_h x crop_w, some mirrored. -> Frame"""
        size = self.cfg.crop_h, self.cfg.crop_w
        hw = [image.shape[1:] for image in frame.images]
        visible = data.visible_points(frame.points, frame.lidar2img, hw)  # (K, N)
        boxes = []
        mirrored = []
        for k, matrix in enumerate(frame.lidar2img):
            uvd = frame.points[visible[k], :3] @ matrix[:3, :3].T + matrix[:3, 3]
            uv = uvd[:, :2] / uvd[:, 2:]                        # (n, 2) px
            boxes.append(random_crop(rng, hw[k], uv, size[1] / size[0], self.cfg))
            mirrored.append(rng.random() < 0.5)                 # [code]
        return data.crop_images(frame, boxes, [size] * len(boxes), mirrored)


# ---- masks and cells -----------------------------------------------------------------

def mask_cells(cameras, shape, cfg, rngs):
    """Which cells are masked. An image is, with p = mask_images: mask_cells of its cells.

    cameras K, shape (h, w), rngs: one for each frame -> (B K, h, w) bool, True = masked.
    """
    # D1: As in the figure. The release masks 16-px squares of the full image, 4 to 7 px
    # of a crop, so that every cell keeps half of its pixels.
    n = shape[0] * shape[1]
    masked = []
    for rng in rngs:
        noise = torch.rand(cameras, n, generator=rng, device=rng.device)
        place = noise.argsort(1).argsort(1)                     # (K, n), ranks
        chosen = torch.rand(cameras, 1, generator=rng, device=rng.device) < cfg.mask_images
        masked.append((place < round(cfg.mask_cells * n)) & chosen)
    return torch.cat(masked).view(-1, *shape)


def select(masked, cell):
    """The rows that the losses pick by the masks. The GPU is waited for once.

    masked (B K, h, w) bool, True = masked; cell (P,) of each pair, row of all cells
    -> rows of visible cells, of pairs on visible cells, of pairs on masked cells,
    of images with a masked cell.
    """
    hidden = masked.flatten()                               # (B K h w,) bool
    choices = ~hidden, ~hidden[cell], hidden[cell], masked.flatten(1).any(1)
    sizes = torch.stack([chosen.sum() for chosen in choices]).tolist()
    return [torch.nonzero_static(chosen, size=size)[:, 0]
            for chosen, size in zip(choices, sizes)]


def pixels_of(cells):
    """cells (B K, h, w) of stride 32 -> their pixels (B K, 1, H, W)."""
    return cells.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)[:, None]


def rows_of(maps):
    """maps (B K, D, h, w) -> a row for each cell (B K h w, D)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


# ---- the codebook shared by both modalities ------------------------------------------

class Codebook(nn.Module):
    """Unit codes that follow the pairs assigned to them as moving averages."""

    def __init__(self, codes, dims, momentum):
        super().__init__()
        self.momentum = momentum
        initial = F.normalize(torch.rand(codes, dims) * 2 - 1, dim=1)  # [code]
        self.register_buffer("codes", initial)              # (codes, D)
        self.register_buffer("total", initial.clone())      # (codes, D) decayed sums

    def nearest(self, x):
        """x (N, D) of unit length -> (N,) row of its nearest code, of greatest cosine [code]."""
        return (x.detach() @ self.codes.t()).argmax(1)

    def quantise(self, x):
        """x (N, D) -> F-bar (N, D): its nearest code, gradient straight through [figure]."""
        return x + (self.codes[self.nearest(x)] - x).detach()

    def commitment(self, x, own, other, beta):
        """Pull x (M, D) to its own code, half as much to its partner's. -> (M,)"""
        # [code]; the figure pulls pixels to their partner's code
        to_own = (x - self.codes[own]).square().mean(1)
        to_other = (x - self.codes[other]).square().mean(1)
        return beta * (2 * to_own + to_other)

    @torch.no_grad()
    def update(self, p, q, a, b):
        """Move each code towards the pairs that either modality assigned to it [figure 4].

        total_k <- momentum total_k + (1 - momentum) sum_k, where sum_k is of
        (p_i + q_i) / 2 over the pairs with a_i = k and over those with b_i = k.
        p, q (M, D), a, b (M,).
        A total begins with length 1, so a code that n pairs a step choose turns to their
        mean in about 1 / (n (1 - momentum)) steps. Later, each step takes it 1 - momentum
        of the way to the mean of the step.
        """
        # D4: The release makes a step for each modality, and decays twice: its codes
        # forget twice as fast. It averages over processes, so that with six of them its
        # first steps are a sixth of these. Its division by counts cancels at unit
        # length.
        mean = (p + q) / 2
        sums = torch.zeros_like(self.total)
        sums.index_add_(0, torch.cat([a, b]), torch.cat([mean, mean]))
        self.total.mul_(self.momentum).add_(all_reduce(sums), alpha=1 - self.momentum)
        self.codes.copy_(F.normalize(self.total, dim=1))


# ---- losses --------------------------------------------------------------------------
# L_NCE is common.info_nce, L_occ and L_int stand in CMCR.forward. Two are left out. D8:
# the release also matches soft codes across modalities, but over 400 codes of unit
# length that loss is constant within 0.04 nats. D11: the figure's L_kl is probably left
# over from OLIVINE, where it needs classes of an image model, which CMCR does not have.

def masked_error(x, truth, pixels):
    """Mean squared error over the masked pixels of all processes and three colours.

    x (n, 3, H, W) or (n, 3, 1, 1), truth (n, 3, H, W), pixels (n, 1, H, W) bool, True =
    masked -> ().
    """
    # D5: the figure shows visible pixels as they are; the release's mean is over all pixels
    total = ((x - truth).square() * pixels).sum() / 3
    return mean_over_ranks(total, pixels.sum())


def orthogonality(shared, specific):
    """|| F^T G ||_Frobenius / N, over the unit rows (N, D) of every process -> ().

    It is 0 if every column of F is orthogonal to every column of G, and at most 1.
    """
    # D5: The release has it for voxels alone; here rows are points and visible cells.
    # It divides by D^2 instead of N, so there it grows with the batch. Its weight is
    # 0.1: with 50,000 voxels, 0.1 x 50,000 / 64^2 = 1.2 of this.
    product = F.normalize(shared, dim=1).t() @ F.normalize(specific, dim=1)
    product = AllReduceSum.apply(product)                       # (D, D)
    N = all_reduce(product.new_full((), len(shared)))
    return product.norm() / N.clamp_min(1)


# ---- the method ----------------------------------------------------------------------

class CMCR(nn.Module):
    """All losses of a batch. Fine-tuning loads `lidar`; the rest is thrown away."""

    def __init__(self, cfg, grid, frozen):
        super().__init__()
        self.cfg = cfg
        self.frozen = frozen
        self.cells = cfg.crop_h // STRIDE, cfg.crop_w // STRIDE  # h, w
        D = cfg.dims
        # D7: What fine-tuning loads, so with the data set's range and voxels. It reads
        # the mean of all five point features in a voxel (the age is 0 or, for Waymo's
        # other lasers, 0.001 s), and a point has the features of its site on all four
        # levels. The release's MinkUNet has no range; it reads the intensity of one
        # point in a voxel of 0.1 m and decodes to these voxels. bfloat16: for speed,
        # losses are in float32.
        self.lidar = VoxelResNet(grid.low, grid.high, grid.voxel, cfg.width)
        self.teacher = ResNet(cfg.resnet).requires_grad_(not frozen)
        C_3D = 15 * cfg.width       # of four levels: 1 + 2 + 4 + 8
        C_2D = self.teacher.widths[-1]
        self.shared_3d = nn.Linear(C_3D, D)                     # one layer for each [code]
        self.shared_2d = nn.Conv2d(C_2D, D, 1)
        if cfg.without != "specific":
            self.specific_3d = nn.Linear(C_3D, D)
            self.specific_2d = nn.Conv2d(C_2D, D, 1)
        if cfg.without != "codebook":
            self.codebook = Codebook(cfg.codes, D, cfg.momentum)
        if cfg.without != "replacement":
            self.token = nn.Parameter(torch.randn(D) * D ** -0.5)  # length about 1 [ours]
        self.paint = nn.Sequential(                             # [code]
            nn.Conv2d(D, 32, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid())
        self.occupancy = nn.Sequential(                         # [code; ALSO]
            nn.Linear(D + 3, 128), nn.ReLU(inplace=True),
            nn.Linear(128, 128), nn.ReLU(inplace=True),
            nn.Linear(128, 128), nn.Linear(128, 2))             # no ReLU before the last
        self.train()                # which puts a frozen teacher into eval mode

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.teacher.eval()     # its batch norms stay as published
        return self

    def points_3d(self, batch):
        """-> F^3D (N, D), Z^3D = G^3D + F-bar^3D (N, D), G^3D (N, D) or None."""
        levels = self.lidar(batch.points, batch.b_points, batch.size)
        f = self.lidar.point_features(levels, batch.points, batch.b_points)
        F_3D = F.normalize(self.shared_3d(f), dim=1)
        Z_3D = self.quantise(F_3D)
        if self.cfg.without == "specific":
            return F_3D, Z_3D, None
        G_3D = self.specific_3d(f)
        return F_3D, Z_3D + G_3D, G_3D

    def images_2d(self, images, masked):
        """Features of images whose masked cells are black [code].

        images (B K, 3, H, W) uint8, masked (B K, h, w) bool, True = masked
        -> the shared head's map (B K, D, h, w), F^2D (B K h w, D): its cells at unit length,
        and G^2D (B K h w, D) or None.
        """
        black = images.masked_fill(pixels_of(masked), 0)
        learn = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(learn), bf16_autocast(images.device):
            c5 = self.teacher.stages(black)[-1].float()         # (B K, C, h, w)
        shared_map = self.shared_2d(c5)
        G_2D = None if self.cfg.without == "specific" else rows_of(self.specific_2d(c5))
        return shared_map, F.normalize(rows_of(shared_map), dim=1), G_2D

    def quantise(self, x):
        """F-bar of x (N, D); x itself without a codebook."""
        return x if self.cfg.without == "codebook" else self.codebook.quantise(x)

    def pairs(self, batch):
        """Every pair of a point and an image that shows it, deeper than 1 m [code].

        -> point (P,), image (P,), uv (P, 2) px, cell (P,) row of F^2D.
        """
        xyz = batch.points[:, :3]
        point, image, uv, _ = project(
            xyz, batch.counts, batch.lidar2img, batch.hw, near=1.0)
        column, row = (uv / STRIDE).long().unbind(1)
        h, w = self.cells
        return point, image, uv, (image * h + row) * w + column

    def pixel_features(self, shared_map, image, uv, batch):
        """F^2D at pixels. shared_map (B K, D, h, w), image (M,), uv (M, 2) px -> (M, D)."""
        # D3: Only visible pixels come here: under a mask F^2D is a guess from what is
        # around. Contrast and codebook share them; the release draws two samples, of
        # pairs that a fault has reduced to two for each camera. Bilinear between the
        # centres of cells, where the release enlarges the map with corners aligned.
        # Either way, a pixel next to a masked cell holds some of that cell's feature.
        q = sample_image(shared_map, image, uv, batch.images.shape[-2:])
        return F.normalize(q, dim=1)

    def rebuild(self, masked, F_2D, G_2D, F_3D, point, cell, images):
        """Images decoded from Z^2D, in which a masked cell has the code of its points.

        masked (B K, h, w) bool; F_2D, G_2D (B K h w, D); F_3D (N, D); point, cell (P,) of
        the pairs on masked cells; images (n,) rows of those with a masked cell
        -> (n, 3, H, W) in [0, 1], covered (): share of the masked cells that have a point.
        """
        hidden = masked.flatten()                               # (B K h w,) bool
        F_bar = self.quantise(F_2D)
        has_point = torch.zeros_like(hidden).index_fill_(0, cell, True)
        if self.cfg.without != "replacement":
            # D2: The figure puts codes of points into the masked area; one code for a cell,
            # of the mean of its points, and a token where there is none are [ours].
            total = segment_sum(F_3D.index_select(0, point), cell, len(F_bar))
            code = self.quantise(F.normalize(total, dim=1))     # a sum points where the mean does
            replaced = torch.where(has_point[:, None], code, self.token)
            F_bar = torch.where(hidden[:, None], replaced, F_bar)
        Z = F_bar if G_2D is None else F_bar + G_2D
        # D3: The release enlarges F and G to the crop's size first and finds a code for
        # each of a million pixels. It decodes all images; those without a mask have no
        # L_rec here.
        maps = Z.view(*masked.shape, -1).index_select(0, images)  # (n, h, w, D)
        maps = maps.permute(0, 3, 1, 2)                         # (n, D, h, w)
        maps = F.interpolate(maps, scale_factor=STRIDE, mode="bilinear")
        return self.paint(maps), has_point.sum() / hidden.sum().clamp_min(1)

    def decode_queries(self, Z, batch):
        """The decoder on every edge from a point to a query near it.

        Z (N, D) -> (E, 2) occupancy logit and intensity, query (E,).
        """
        extra = batch.extra
        b = extra["b_edges"]                                    # (E,)
        frame = torch.arange(batch.size, device=b.device)
        first_query = torch.searchsorted(extra["b_queries"], frame)  # (B,) row of its first one
        first_point = torch.searchsorted(batch.b_points, frame)
        query, point = extra["edges"].unbind(1)                 # (E,) each, in their own frame
        query = query + first_query[b]
        point = point + first_point[b]
        offset = extra["queries"][query] - batch.points[point, :3]
        return self.occupancy(torch.cat([Z.index_select(0, point), offset], 1)), query

    def forward(self, batch):
        """-> L (), {term: ()}."""
        cfg = self.cfg
        rngs = frame_rngs(batch.seeds, batch.points.device)

        # 1 masks and pairs; features of both modalities, the images with cells masked
        masked = mask_cells(batch.cameras, self.cells, cfg, rngs)  # (B K, h, w) bool  D1
        point, image, uv, cell = self.pairs(batch)              # (P,) each, uv (P, 2) px
        visible, visible_pair, masked_pair, masked_image = select(masked, cell)
        F_3D, Z_3D, G_3D = self.points_3d(batch)                # (N, D) each
        shared_map, F_2D, G_2D = self.images_2d(batch.images, masked)  # F, G (B K h w, D)

        # 2 what points and visible pixels share: contrast, codebook
        i = random_subset(cfg.pairs, visible_pair, rngs[0])     # (M,)  D3
        # index_select, not F_3D[...]: its gradient is repeatable on a CPU
        p = F_3D.index_select(0, point[i])                      # (M, D)
        q = self.pixel_features(shared_map, image[i], uv[i], batch)
        L_NCE = mean_rows(info_nce(p, q, cfg.tau))              # one direction [code]
        L = L_NCE                                               # [figure]
        terms = dict(L_NCE=L_NCE, **pair_monitors(point[i], image[i]))
        if cfg.without != "codebook":
            a = self.codebook.nearest(p)                        # (M,), before the update
            b = self.codebook.nearest(q)
            L_c3D = mean_rows(self.codebook.commitment(p, a, b, cfg.beta))  # [code]
            L_c2D = mean_rows(self.codebook.commitment(q, b, a, cfg.beta))  # [figure], [code]
            L = L + L_c3D + L_c2D                               # [figure: L_c2D], [code]
            terms |= dict(L_c3D=L_c3D, L_c2D=L_c2D, **code_monitors(a, b, cfg.codes))

        # 3a the rest of the images: masked pixels, rebuilt with the help of points' codes
        rebuilt, covered = self.rebuild(                        # (n, 3, H, W)  D2
            masked, F_2D, G_2D, F_3D, point[masked_pair], cell[masked_pair], masked_image)
        truth = batch.images[masked_image].float() / 255        # (n, 3, H, W)
        pixels = pixels_of(masked[masked_image])                # (n, 1, H, W) bool
        L_rec = masked_error(rebuilt, truth, pixels)            # [figure]  D5
        guess = masked_error(visible_mean(truth, pixels), truth, pixels)

        # 3b the rest of the points: occupancy and intensity at queries near them
        out, query = self.decode_queries(Z_3D, batch)           # (E, 2), (E,)  D6
        occupied = batch.extra["occupied"][query]               # (E,) 1, or 0: free
        intensity = batch.extra["intensity"][query]             # (E,), -1: unknown
        known = intensity >= 0
        bce = F.binary_cross_entropy_with_logits(out[:, 0], occupied, reduction="none")
        L_occ = mean_rows(bce)                                  # [figure], [code; ALSO]
        error = (out[:, 1] - intensity).abs() * known
        L_int = mean_over_ranks(error.sum(), known.sum())       # [code; ALSO]
        L = L + L_rec + L_occ + L_int                           # [figure], [code: L_int]
        terms |= dict(L_rec=L_rec, guess_rec=guess, covered=covered, L_occ=L_occ,
                      chance_occ=share_entropy(occupied), L_int=L_int, edges=len(out))

        # 4 shared and specific features do not repeat each other
        if cfg.without != "specific":
            L_orth = (orthogonality(F_3D, G_3D)                 # [figure]  D5
                      + orthogonality(F_2D[visible], G_2D[visible]))
            L = L + cfg.w_orth * L_orth                         # [figure], weight [ours]
            terms["L_orth"] = L_orth
        if self.training and cfg.without != "codebook":         # after all have read the codes
            self.codebook.update(p.detach(), q.detach(), a, b)
        return L, terms


# ---- monitors ------------------------------------------------------------------------

def pair_monitors(point, image):
    """chance: L_NCE if all features are alike; distinct: share of distinct pairs, 1 by D3.

    point, image (M,)
    """
    M = max(len(point), 1)
    # not unique, which waits for the GPU
    pair = (image * 2**32 + point).sort().values
    repeated = (pair[1:] == pair[:-1]).sum()
    return dict(chance=math.log(M), distinct=(len(point) - repeated) / M)


def code_monitors(a, b, codes):
    """How many codes are in use; share of pairs whose point and pixel have the same code.

    a, b (M,)
    """
    return dict(perplexity_3D=perplexity(a, codes), perplexity_2D=perplexity(b, codes),
                agreement=(a == b).float().sum() / max(len(a), 1))


def visible_mean(truth, pixels):
    """Mean colour of each image's visible pixels, a guess for the masked ones.

    truth (n, 3, H, W), pixels (n, 1, H, W) bool, True = masked -> (n, 3, 1, 1).
    """
    count = (~pixels).sum((2, 3), keepdim=True).clamp_min(1)
    return (truth * ~pixels).sum((2, 3), keepdim=True) / count


def share_entropy(occupied):
    """L_occ of the best constant guess: entropy of the share of ones. (E,) -> ()"""
    share = occupied.sum() / max(len(occupied), 1)
    return F.binary_cross_entropy(share, share)


# ---- the teacher's weights -----------------------------------------------------------

def load_teacher(name, resnet, rank, cache):
    """Load into `resnet` the weights of moco, or of a file or run folder.

    moco is the published file, fetched once into cache / teachers; its MD5 is checked.
    """
    if name != "moco":
        return load_resnet(name, resnet, rank)
    url, digest = MOCO
    path = cache / "teachers" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.locked(path):             # one process fetches it, the others wait
        try:
            if not path.is_file():      # written under another name, then renamed
                torch.hub.download_url_to_file(url, str(path), progress=rank == 0)
        except OSError as error:
            raise SystemExit(
                f"--teacher moco: {url} could not be fetched ({error}). Put that file "
                f"at {path}, or give --teacher WEIGHTS, or --teacher none") from error
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    require(md5.startswith(digest),
            f"{path}: its MD5 begins with {md5[:8]}, expected {digest}; "
            f"delete it and run again, or fetch {url} yourself")
    load_resnet(path, resnet, rank, prefix="module.encoder_q.")


# ---- figure --------------------------------------------------------------------------

@torch.no_grad()
def save_figure(model, batch, out):
    """figures/reconstruction.png: up to three masked images of a val batch."""
    model.eval()
    rngs = frame_rngs(batch.seeds, batch.points.device)
    masked = mask_cells(batch.cameras, model.cells, model.cfg, rngs)
    F_3D, _, _ = model.points_3d(batch)
    _, F_2D, G_2D = model.images_2d(batch.images, masked)
    point, _, _, cell = model.pairs(batch)
    _, _, masked_pair, masked_image = select(masked, cell)
    rebuilt, _ = model.rebuild(
        masked, F_2D, G_2D, F_3D, point[masked_pair], cell[masked_pair], masked_image)
    panels = []
    for n, k in enumerate(masked_image[:3].tolist()):
        truth = batch.images[k].permute(1, 2, 0).cpu()          # (H, W, 3)
        pixels = pixels_of(masked)[k].permute(1, 2, 0).cpu()    # (H, W, 1)
        painted = (rebuilt[n].permute(1, 2, 0).cpu() * 255).byte()
        panels += [(f"image {k}: truth", truth),
                   ("what the teacher saw", truth * ~pixels),
                   ("masked cells rebuilt", torch.where(pixels, painted, truth))]
    if panels:
        figure(Path(out) / "figures" / "reconstruction.png", panels, 3, (4.4, 2.7))
    model.train()


# ---- training ------------------------------------------------------------------------

def train(rank, world, cfg):
    # D9: the embedded world needs no download
    default = "moco" if cfg.data and cfg.resnet == 50 else "none"
    cfg = replace(cfg, teacher=cfg.teacher or default)
    check(cfg)

    # data
    # D12: as OLIVINE does; sizes are the release's, so no scenes are needed to choose them
    # Views keeps one sweep [code]
    dataset = data.open_dataset(cfg.data, cfg.preset, sweeps=1, labels=False)
    data.announce(dataset, cfg.batch)
    views = Views(dataset.grid, cfg)
    size = tuple(round(cfg.image_scale * n) for n in dataset.grid.image)
    drawn = draw_labels(dataset, dataset.split("train"), cfg.share, "frames", cfg.seed)
    loader = data.loader(dataset, "train", cfg.batch, rank, world, cfg.seed,
                         workers=cfg.workers, augment=views, image=size, indices=drawn,
                         accumulate=cfg.accumulate)
    # val frames are augmented too, always in the same way
    val_loader = data.loader(dataset, "val", 2, workers=cfg.workers, augment=views, image=size)

    # model, optimiser
    torch.manual_seed(cfg.seed)
    model = CMCR(cfg, dataset.grid, frozen=cfg.teacher != "none")
    if model.frozen:
        load_teacher(cfg.teacher, model.teacher.resnet, rank, data.cache_dir())
    device = start(cfg, rank, world, dataset, drawn)
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    net = wrap(model, device, world)
    if cfg.profile:
        return load_tool("profiling", "--profile").profile(
            cfg, net, loader, [opt], device, rank, cfg.share,
            lidar=(model.lidar, "forward"), camera=(model.teacher, "stages"),
            rebuild=(model, "rebuild"), occupancy=(model, "decode_queries"))

    # resume
    steps = cfg.steps or cfg.epochs * loader.steps_per_epoch
    first = resume(cfg.out, model, opt)  # 0 when there is nothing to resume
    run = Run(cfg, rank, world, first, steps, device,
              f"lr {cfg.lr:g} not rescaled, teacher {cfg.teacher}")
    val_batches = val_loader.first(VAL_BATCHES)  # the same on every rank, for every seed

    # train
    for step, batches in run.batches(loader, first):
        if step % cfg.eval_every == 0:
            run.log_val(step, evaluate(model, val_batches, device))
        lr = cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * cosine(step, 0, steps))
        for group in opt.param_groups:
            group["lr"] = lr
        opt.zero_grad()
        terms = []
        for batch in batches:  # one, without --accumulate
            loss, more = net(batch)
            (loss / cfg.accumulate).backward()
            terms.append(dict(loss=loss, **more))
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
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
    metrics = evaluate(model, val_batches, device)  # on every rank: mean_rows is a collective
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    destroy_group()
    if rank == 0:
        write_text(Path(cfg.out) / "metrics.json", to_json(metrics))
        shown = val_batches[0].to(device)
        save_figure(model, shown, cfg.out)
        loss_curves(cfg.out, {"L_NCE": (metrics["chance"],),
                              "L_rec": (metrics["guess_rec"],),
                              "L_occ": (metrics["chance_occ"],)})
        tool = load_tool("figures")
        if tool:
            tool.cmcr_figures(model, shown, cfg.out)
        print(json.dumps(metrics))
        print(f"{cfg.out}: val L_NCE {metrics['L_NCE']} (chance {metrics['chance']}), "
              f"L_rec {metrics['L_rec']} (the visible mean {metrics['guess_rec']}), "
              f"L_occ {metrics['L_occ']} (chance {metrics['chance_occ']})")


if __name__ == "__main__":
    launch(train, parse(Config, SMALL))
