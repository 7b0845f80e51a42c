"""What the scripts share: mathematics, networks, run-keeping.

To fork a method, read its file, the functions that it imports from here, and data.Batch.

    section                 pieces                                 used by

    MATHEMATICS
    §1 geometry             constant, send, rows_where, Cells,     all but segment
                            multilinear, gather_weighted,
                            project, project_frame,
                            valid_pixels, rays, sample_image,
                            box_exit, inside_boxes
    §2 matching             pair_points                            simipu
    §3 rendering            neus_weights, stratified, importance   clap
    §4 contrast             info_nce, perplexity                   clap, cmcr, simipu
    §5 curvature            surface_variation                      clap
    §6 schedules            frame_rngs, random_subset, cosine      all

    NETWORKS
    §7 sparse convolutions  segment_sum, ravel                     clap, cmcr, depth
    §8 the trunk            trunk, lift_depth, VoxelResNet,        all
                            ResNet, CameraNet, mlp, conv3d,
                            BatchNorm, collect_statistics,
                            bf16_autocast

    RUNS
    §9 processes            processes, all_reduce, AllReduceSum,   all
                            mean_over_ranks, mean_rows, launch,
                            init_process, start, rank0_first,
                            wrap, destroy_group
    §10 run folders         parse, require, check_numbers,         all
                            to_json, run_config,
                            describe_data, data_changes,
                            checkpoint, refuse_misfit,
                            first_line, lock_run_folder,
                            atomic_write, write_text, resume,
                            save, read_units, load_units,
                            load_resnet, stored_config,
                            check_run, describe_scored,
                            labelled_frames, draw_labels,
                            describe_draw, labels_text
    §11 log and figures     Run, evaluate, load_tool, figure,      all
                            bird_eye, overlay, loss_curves

Nothing here knows a data set. Units are metres, radians and seconds.
xyz is x forward, y left, z up. Volumes and cell coordinates are (Z, Y, X).
b_x is the frame of each row of x.
"""
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from torch import nn
from torchvision.models import resnet18, resnet50

# the one optional import: it is compiled against one torch, so it may be absent or stale
try:
    import torch_scatter
except (ImportError, OSError, RuntimeError):
    torch_scatter = None



def environment_number(name, default, least):
    """A whole number of the environment, at least `least`; `default` where it is not set."""
    text = os.environ.get(name, default)
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise SystemExit(f"{name}={text} in the environment: expected a whole number from "
                         f"{least}; correct it or unset it")
    return number


# how long a process waits for another one that does not answer, s [ours]
TIMEOUT = environment_number("LIDAR_CAMERA_TIMEOUT", 300, 1)


# ==== MATHEMATICS =====================================================================
# Pure functions, to read next to a paper.

# ---- §1 geometry ---------------------------------------------------------------------
# Where cells are, multilinear interpolation, the pinhole camera, boxes. Source: textbook.

@functools.cache
def constant(values, device, dtype=torch.float32):
    """These numbers as a tensor, made once for each device: the GPU is not waited for again.

    values: a tuple, of tuples for more axes. The tensor is shared: do not change it in place.
    """
    return torch.tensor(values, device=device, dtype=dtype)


def send(x, device):
    """A tensor of the CPU on the device: from pinned memory, or the copy would wait for a GPU."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def rows_where(mask, counts):
    """The rows that a mask keeps, and how many of them each frame has: one wait for the GPU.

    mask (N,) bool, sorted by frame; counts: of the frames' rows -> (M,) int64, list of int.
    """
    left = torch.stack([part.sum() for part in mask.split(counts)]).tolist()
    return torch.nonzero_static(mask, size=sum(left))[:, 0], left


class Cells(NamedTuple):
    """Where the cells of one resolution are.

    This is the only definition: sparse levels, camera lift and field query share it.
    """
    shape: tuple[int, int, int]        # Z, Y, X
    first: tuple[float, float, float]  # x, y, z of the centre of cell (0, 0, 0), m
    step: tuple[float, float, float]   # x, y, z between centres, m

    def centre(self, zyx):
        """zyx (..., 3) int or float -> xyz (..., 3) m."""
        step = constant(self.step, zyx.device)
        first = constant(self.first, zyx.device)
        return zyx.flip(-1) * step + first

    def index(self, xyz):
        """xyz (..., 3) m -> fractional zyx (..., 3); whole numbers at cell centres."""
        first = constant(self.first, xyz.device, xyz.dtype)
        step = constant(self.step, xyz.device, xyz.dtype)
        return ((xyz - first) / step).flip(-1)

    def centres(self, device):
        """The centre of every cell in memory order -> (Z Y X, 3) m."""
        axes = [torch.arange(n, device=device) for n in self.shape]
        return self.centre(torch.cartesian_prod(*axes))

    def halved(self, pad):
        """The cells after a 3 x 3 x 3 convolution of stride 2. pad (z, y, x) -> Cells.

        Output o reads inputs 2 o - pad + {0, 1, 2}, so its centre is input 2 o + 1 - pad.
        """
        corner = zip(self.first, self.step, reversed(pad))
        first = tuple(f + s * (1 - p) for f, s, p in corner)
        step = tuple(2 * s for s in self.step)
        return Cells(halved_shape(self.shape, pad), first, step)


def halved_shape(shape, pad):
    """Sizes after a convolution of kernel 3 and stride 2. shape, pad (z, y, x) -> 3 sizes."""
    return tuple((n + 2 * p - 3) // 2 + 1 for n, p in zip(shape, pad))


def multilinear(index, shape):
    """The 2^D cells around a fractional index, and their multilinear weights.

    Outside the outermost centres the border value holds.
    index (M, D) float, shape D sizes
    -> flat (M, 2^D) int64 into a table of prod(shape) rows, weight (M, 2^D), rows sum to 1.
    """
    flat = torch.zeros(len(index), 1, dtype=torch.int64, device=index.device)
    weight = torch.ones(len(index), 1, dtype=index.dtype, device=index.device)
    for axis, n in enumerate(shape):
        position = index[:, axis].clamp(0, n - 1)
        low = position.floor().clamp(max=max(n - 2, 0))
        high = (low + 1).clamp(max=n - 1)
        part = (position - low)[:, None]            # (M, 1)
        ends = torch.stack([low, high], 1).long()   # (M, 2)
        shares = torch.cat([1 - part, part], 1)     # (M, 2)
        flat = (flat[:, :, None] * n + ends[:, None, :]).flatten(1)
        weight = (weight[:, :, None] * shares[:, None, :]).flatten(1)
    return flat, weight


class GatherWeighted(torch.autograd.Function):
    """sum_j weight[m, j] table[index[m, j]]; only the table gets a gradient."""

    @staticmethod
    def forward(ctx, table, index, weight):
        ctx.save_for_backward(index, weight)
        ctx.table_shape = table.shape
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx, grad):
        index, weight = ctx.saved_tensors
        out = grad.new_zeros(ctx.table_shape)
        # on a CPU a temporary that outgrows the cache costs more than the loop
        chunk = 2**18 if grad.is_cuda else 4096
        for start in range(0, len(index), chunk):
            part = slice(start, start + chunk)
            rows = grad[part, None] * weight[part, :, None]  # (m, J, C)
            out.index_add_(0, index[part].flatten(), rows.flatten(0, 1))
        return out, None, None


def gather_weighted(table, index, weight):
    """Interpolation. table (T, C) float, index (M, J) int64, weight (M, J) -> (M, C).

    It is not differentiable in the weights.
    """
    weight = weight.to(table.dtype).contiguous()
    return GatherWeighted.apply(table.contiguous(), index.contiguous(), weight)


def project(xyz, counts, lidar2img, hw, near=0.1, far=math.inf):
    """Every pair of a point and an image that sees it.

    Seen: deeper than near, less than far, and inside that image's own height and width.
    xyz (N, 3) m, sorted by frame; counts: how many of them are in each of the B frames;
    lidar2img (B K, 4, 4), hw (B K, 2) px
    -> point (M,) row of xyz, image (M,) row of lidar2img, uv (M, 2) px, depth (M,) m.
    Pixel centres are at +0.5. Pairs are sorted by frame, image, point.
    """
    K = len(lidar2img) // len(counts)
    rows = torch.arange(len(xyz), device=xyz.device).split(counts)
    images = torch.arange(len(lidar2img), device=xyz.device).split(K)
    parts = []
    for row, image, points in zip(rows, images, xyz.split(counts)):
        at = slice(len(parts) * K, (len(parts) + 1) * K)
        seen, uv, depth = project_frame(points, lidar2img[at], hw[at], near, far)
        point = row.expand(K, -1)                 # (K, n), as the others
        parts.append((seen, point, image[:, None].expand(-1, len(row)), uv, depth))
    seen, point, image, uv, depth = [torch.cat([x.flatten(0, 1) for x in part])
                                     for part in zip(*parts)]
    pair = seen.nonzero()[:, 0]                   # the only wait for the GPU here
    return tuple(x.index_select(0, pair) for x in (point, image, uv, depth))


def project_frame(xyz, lidar2img, hw, near, far):
    """Where the points of a frame land in each of its images.

    xyz (n, 3), lidar2img (K, 4, 4), hw (K, 2)
    -> seen (K, n) bool, uv (K, n, 2) px, depth (K, n) m.
    """
    turn = lidar2img[:, :3, :3].transpose(1, 2)
    uvd = xyz @ turn + lidar2img[:, None, :3, 3]  # (K, n, 3): u d, v d, d
    depth = uvd[..., 2]                           # (K, n)
    uv = uvd[..., :2] / depth.clamp_min(near)[..., None]
    u, v = uv.unbind(-1)                          # (K, n) each
    height, width = hw[:, :, None].unbind(1)      # (K, 1) each
    seen = (depth > near) & (depth < far)
    seen = seen & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return seen, uv, depth


def valid_pixels(hw, padded_hw):
    """Which pixels of padded images are the images' own, not padding.

    hw (B K, 2) px, padded_hw (H, W) -> (B K, H, W) bool, True = the image's own.
    """
    v = torch.arange(padded_hw[0], device=hw.device)
    u = torch.arange(padded_hw[1], device=hw.device)
    in_height = v[:, None] < hw[:, 0, None, None]  # (B K, H, 1)
    in_width = u < hw[:, 1, None, None]            # (B K, 1, W)
    return in_height & in_width


def rays(uv, image, lidar2img):
    """The ray through each pixel position.

    uv (R, 2) px, image (R,), lidar2img (B K, 4, 4)
    -> origin (R, 3) m, direction (R, 3) of unit length.
    """
    # inv_ex: inv would wait for the GPU, to see whether a matrix is singular
    inverse = torch.linalg.inv_ex(lidar2img.double())[0].float()[image]  # (R, 4, 4)
    pixel = F.pad(uv, (0, 1), value=1.0)[..., None]  # (R, 3, 1)
    away = (inverse[:, :3, :3] @ pixel)[..., 0]      # (R, 3) m per metre of depth
    return inverse[:, :3, 3], F.normalize(away, dim=1)


def grid_index(uv, feature_hw, padded_hw):
    """Where a pixel lies on a feature map; both have their centres at +0.5 (area convention).

    uv (M, 2) px of the padded image -> (M, 2) fractional row and column.
    """
    scale_u = feature_hw[1] / padded_hw[1]
    scale_v = feature_hw[0] / padded_hw[0]
    return (uv * constant((scale_u, scale_v), uv.device) - 0.5).flip(1)


def sample_image(features, image, uv, padded_hw):
    """Bilinear sampling of feature maps.

    features (B K, C, h, w), image (M,), uv (M, 2) px, padded_hw (H, W) of the images
    -> (M, C).
    """
    C, h, w = features.shape[1:]
    table = features.permute(0, 2, 3, 1).reshape(-1, C)
    flat, weight = multilinear(grid_index(uv, (h, w), padded_hw), (h, w))
    return gather_weighted(table, flat + image[:, None] * (h * w), weight)


def box_exit(origin, direction, low, high):
    """Distance along each ray to where it leaves an axis-aligned box.

    origin, direction (R, 3), low, high 3 numbers each -> (R,) m, <= 0 if the box is behind.
    """
    flat = direction.abs() < 1e-6
    slope = torch.where(flat, torch.full_like(direction, 1e-6), direction)
    to_low = (constant(tuple(low), origin.device) - origin) / slope
    to_high = (constant(tuple(high), origin.device) - origin) / slope
    return torch.maximum(to_low, to_high).amin(1)


def inside_boxes(xyz, counts, boxes, box_counts):
    """Which points lie strictly inside some box of their own frame.

    xyz (N, 3), boxes (M, 9) centre, l, w, h, yaw, ..., sorted by frame; counts and box_counts:
    how many each frame has -> (N,) bool.
    """
    inside = []
    for points, box in zip(xyz.split(counts), boxes.split(box_counts)):
        cos, sin = box[:, 6].cos(), box[:, 6].sin()
        x, y, z = (points[:, None] - box[None, :, :3]).unbind(-1)  # (n, m) each
        local = torch.stack([x * cos + y * sin, y * cos - x * sin, z], -1)
        inside.append((local.abs() < box[None, :, 3:6] / 2).all(-1).any(1))
    return torch.cat(inside)


# ---- §2 matching ---------------------------------------------------------------------
# One-to-one pairs of two point sets. Source: the Hungarian method, as scipy has it.

def pair_points(a, b, id_a, id_b):
    """The one-to-one pairs with the least sum of Euclidean distances.

    a, b (n, 3) arrays, id_a, id_b (n,) int, equal for the same point
    -> (n,) the row of b that is paired with each row of a.

    A point that is in both sets is paired with itself first. Such a pair is part of some
    optimum: exchanging the partners of (p, b') and (a', p) gives (p, p) and (a', b'), and
    d(a', b') <= d(a', p) + d(p, b'). This does not hold for squared distances.
    """
    _, same_a, same_b = np.intersect1d(distinct_ids(id_a), distinct_ids(id_b),
                                       assume_unique=True, return_indices=True)
    rest_a = np.delete(np.arange(len(a)), same_a)
    rest_b = np.delete(np.arange(len(b)), same_b)
    rows, columns = linear_sum_assignment(cdist(a[rest_a], b[rest_b]))
    pairs = np.empty(len(a), np.int64)
    pairs[same_a] = same_b
    pairs[rest_a[rows]] = rest_b[columns]
    return pairs


def distinct_ids(ids):
    """Make ids unique: the k-th row of a repeated id gets an id of its own. (n,) -> (n,)."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    repetition = np.arange(len(ids)) - np.searchsorted(ordered, ordered)
    out = np.empty(len(ids), np.int64)
    out[order] = ordered * (len(ids) + 1) + repetition
    return out


# ---- §3 rendering --------------------------------------------------------------------
# NeuS opacity along rays, and where to place samples. Source: NeuS (Wang et al. 2021).

def neus_weights(sdf, h):
    """Weights of the sections between consecutive samples of a ray.

    w_n = alpha_n prod_{i<n} (1 - alpha_i), with Phi the logistic function in
    alpha_n = max((Phi(h s_n) - Phi(h s_n+1)) / Phi(h s_n), 0).
    Since 1 - alpha_n = min(Phi(h s_n+1) / Phi(h s_n), 1), everything is a running sum of
    log Phi: nothing under- or overflows behind a surface.
    sdf (R, S) from near to far, h () > 0 -> (R, S - 1), >= 0, rows sum to <= 1.
    """
    log_phi = F.logsigmoid(h * sdf)
    log_pass = (log_phi[:, 1:] - log_phi[:, :-1]).clamp_max(0)  # (R, S - 1): log(1 - alpha)
    return (log_pass.cumsum(1) - log_pass).exp() * -torch.expm1(log_pass)


def stratified(near, far, jitter):
    """One sample in each of S equal parts of [near, far].

    near, far (R,) m, jitter (R, S) in [0, 1) -> (R, S) m, increasing.
    """
    S = jitter.shape[1]
    part = torch.arange(S, device=near.device) + jitter
    return near[:, None] + (far - near)[:, None] * part / S


def importance(depth, weights, u):
    """Samples from the sections' weights by inverting their cumulative sum. No gradient.

    depth (R, S), weights (R, S - 1), u (R, n) in [0, 1) -> (R, n).
    NaN weights give finite depths, since a NaN position would be an index out of range.
    The NaN shows in the loss, which reads the same field.
    """
    weights = weights + 1e-5  # a ray without a surface is sampled evenly
    cdf = F.pad((weights / weights.sum(1, keepdim=True)).cumsum(1), (1, 0))  # (R, S)
    k = torch.searchsorted(cdf, u.contiguous(), right=True) - 1              # (R, n)
    k = k.clamp(0, weights.shape[1] - 1)
    low = cdf.gather(1, k)
    high = cdf.gather(1, k + 1)
    part = (u - low) / (high - low).clamp_min(1e-8)
    start = depth.gather(1, k)
    return start + part.nan_to_num().clamp(0, 1) * (depth.gather(1, k + 1) - start)


# ---- §4 contrast ---------------------------------------------------------------------
# InfoNCE, and how many codes are in use. Source: CPC (van den Oord et al. 2018).

def info_nce(queries, keys, tau):
    """-log of the softmax share of each row's own key among all keys.

    queries, keys (M, C) -> (M,). They are scaled to unit length, in float32.
    Negatives are the other rows of this process. Features that are all alike give ln M.
    If every key occurs twice, the best is ln 2.
    """
    queries = F.normalize(queries.float(), dim=1)
    keys = F.normalize(keys.float(), dim=1)
    logits = queries @ keys.t() / tau  # (M, M)
    return logits.logsumexp(1) - logits.diagonal()


def perplexity(assigned, n):
    """How many of n prototypes are in use: exp of the entropy of the assignment. (N,) -> ()."""
    # not bincount, which waits for the GPU
    count = torch.zeros(n, device=assigned.device)
    count.index_add_(0, assigned, torch.ones_like(assigned, dtype=count.dtype))
    p = count / max(len(assigned), 1)
    return torch.special.entr(p).sum().exp()


# ---- §5 curvature --------------------------------------------------------------------
# Surface variation of a point cloud. Source: Pauly et al. 2002.
# It runs in the loader's workers: numpy in, numpy out.

def smallest_eigenvalue(xx, xy, xz, yy, yz, zz):
    """Smallest eigenvalue of symmetric 3 x 3 matrices, by the trigonometric form in float64.

    Each argument and the result (N,).
    """
    q = (xx + yy + zz) / 3
    a, b, c = xx - q, yy - q, zz - q
    p = np.sqrt((a * a + b * b + c * c + 2 * (xy * xy + xz * xz + yz * yz)) / 6)
    det = a * (b * c - yz * yz) - xy * (xy * c - yz * xz) + xz * (xy * yz - b * xz)
    with np.errstate(invalid="ignore", divide="ignore"):
        cos = np.clip(np.nan_to_num(det / (2 * p ** 3)), -1, 1)
    return q + 2 * p * np.cos(np.arccos(cos) / 3 + 2 * np.pi / 3)


def surface_variation(queries, cloud, k=32):
    """lambda_0 / (lambda_0 + lambda_1 + lambda_2) of the covariance of the k nearest points.

    It is 0 on a plane or a line, and 1/3 where the points are isotropic.
    queries (Q, 3), cloud (N, 3) float32 m -> (Q,) float32.
    Coordinates are relative to the query, since float32 would cancel at 50 m; eigenvalues are
    in float64.
    """
    if len(queries) == 0 or len(cloud) == 0:
        return np.zeros(len(queries), np.float32)
    k = min(k, len(cloud))
    tree = cKDTree(cloud)
    chunk = 2048  # keeps the temporaries in cache
    out = []
    for start in range(0, len(queries), chunk):
        query = queries[start:start + chunk]
        near = tree.query(query, k)[1].reshape(len(query), k)  # (q, k) rows of cloud
        x, y, z = [centred(cloud[:, i][near] - query[:, i, None]) for i in range(3)]
        # k times the covariance: the ratio is scale-invariant
        xx = row_dot(x, x)
        yy = row_dot(y, y)
        zz = row_dot(z, z)
        low = smallest_eigenvalue(xx, row_dot(x, y), row_dot(x, z), yy, row_dot(y, z), zz)
        trace = xx + yy + zz
        ratio = np.clip(low, 0, None) / np.maximum(trace, 1e-12)
        out.append(np.where(trace > 1e-12, ratio, 0.0))
    return np.concatenate(out).astype(np.float32)


def centred(x):
    """x (q, k) less the mean of each row -> (q, k)."""
    return x - x.mean(1, keepdims=True)


def row_dot(x, y):
    """Scalar product of each row, summed in float32. x, y (q, k) -> (q,) float64."""
    return np.einsum("nk,nk->n", x, y).astype(np.float64)


# ---- §6 schedules and random streams -------------------------------------------------
# All randomness of a run is a function of (seed, epoch, frame), so a resumed run has no
# random state to restore.

def frame_rngs(seeds, device):
    """One random stream for each frame, whatever process or batch it is in.

    seeds (B,) int64 -> B generators on the device.
    """
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds.tolist()]


def random_subset(n, rows, generator):
    """A random n of these rows, or all of them if there are fewer. rows (M,) -> (n or M,).

    They stay in their order, so that what they index is read in order.
    """
    order = torch.randperm(len(rows), generator=generator, device=rows.device)
    return rows[order[:n].sort().values]


def cosine(step, warmup, steps):
    """Learning-rate factor: linear from 1/3 over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return 1 / 3 + 2 / 3 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# ==== NETWORKS ========================================================================
# The trunk that all methods pre-train and the detector loads.

# ---- §7 sparse convolutions ----------------------------------------------------------
# Convolutions on occupied cells: which rows meet (kernel maps), then matrix products.

def segment_sum(values, index, n):
    """Sum of the rows of each segment. values (N, C), index (N,) int64 in [0, n) -> (n, C).

    torch-scatter does it where installed (its sum is pure torch, for any device).
    """
    if torch_scatter is not None:
        return torch_scatter.scatter_sum(values, index, 0, dim_size=n)
    zeros = torch.zeros(n, values.shape[1], dtype=values.dtype, device=values.device)
    return zeros.index_add_(0, index, values)


def segment_mean(values, first):
    """Mean of the rows of each segment. values (N, C), first (n + 1,) int64 -> (n, C).

    Segment i is the rows from first[i] up to first[i + 1], which may not be none. Rows after
    the last segment do not count. torch-scatter does it where it is built for the device.
    """
    if len(first) == 1:  # no segment, by whose number torch-scatter would divide
        return values[:0]
    if torch_scatter is None or (values.is_cuda and torch.ops.torch_scatter.cuda_version() < 0):
        return torch.segment_reduce(values, "mean", offsets=first, unsafe=True)
    return torch_scatter.segment_csr(values, first, reduce="mean")


def narrow(values, shape, size):
    """values as int32 if every key in `size` volumes of this shape fits, else as they are.

    Sorts and divisions of int32 cost half.
    """
    return values.int() if size * math.prod(shape) < 2**31 else values


def ravel(coords, shape, size):
    """Row-major keys of coordinates in `size` volumes. coords (V, 4) b, z, y, x -> (V,).

    They are int32 where that fits. Sorted coordinates have sorted keys.
    """
    coords = narrow(coords, shape, size)
    plane = coords[:, 0] * shape[0] + coords[:, 1]
    row = plane * shape[1] + coords[:, 2]
    return row * shape[2] + coords[:, 3]


def unravel(keys, shape):
    """The inverse of ravel -> (V, 4) int64."""
    columns = []
    for n in reversed(shape):
        rest = torch.div(keys, n, rounding_mode="trunc")
        columns.append(keys - rest * n)
        keys = rest
    return torch.stack([keys, *reversed(columns)], 1).long()


def group(keys, beyond):
    """Bring equal keys together.

    keys (N,) up to beyond, which does not count -> unique keys (n,) sorted; order (N,) that
    sorts the rows; in that order number (N,) of the key, n for beyond, and first (n + 1,) row
    of each key and of beyond.
    """
    keys, order = F.pad(keys, (0, 1), value=beyond).sort(stable=True)
    begins = keys.diff(prepend=keys.new_full((1,), -1)) != 0
    first = begins.nonzero()[:, 0]
    number = begins.cumsum(0) - 1
    return keys.index_select(0, first[:-1]), order[:-1], number[:-1], first


def submanifold_map(coords, shape, size):
    """The kernel map whose outputs are its inputs: KernelPairs on a CPU, KernelTable on a GPU.

    coords (V, 4) sorted, shape (Z, Y, X), size: the number of frames.
    """
    kind = KernelTable if coords.is_cuda else KernelPairs
    return kind.submanifold(later_neighbours(coords, shape, size))


def strided_map(coords, shape, pad, size):
    """Coordinates and kernel map of a stride-2 convolution.

    coords (V, 4), shape (Z, Y, X), pad (z, y, x), size: the number of frames
    -> out coords (V', 4) sorted, KernelPairs on a CPU or KernelTable on a GPU.
    """
    kind = KernelTable if coords.is_cuda else KernelPairs
    out, *pairs = fed_outputs(coords, shape, pad, size)
    return out, kind.strided(*pairs, len(coords), len(out))


def later_neighbours(coords, shape, size):
    """The site at each of the kernel offsets 14 to 26 of each site.

    -> 13 x (hit (V,) whether there is one, row (V,) int32 of coords if so).
    Keys carry one empty cell on every side, so neighbours never alias. There is one search for
    each row of three cells: the other two follow by stepping. [ours]
    """
    n = len(coords)
    device = coords.device
    _, Y, X = padded = [s + 2 for s in shape]  # with the border, a neighbour's key fits too
    keys = ravel(coords + constant((0, 1, 1, 1), device, coords.dtype), padded, size)
    table = F.pad(keys, (0, 1), value=-1)
    starts = (X - 1, Y * X - X - 1, Y * X - 1, Y * X + X - 1)
    target = keys + constant(starts, device, keys.dtype)[:, None]  # (4, V)
    row = torch.searchsorted(keys, target, out_int32=True)
    steps = []
    for _ in range(3):
        # table[row] takes a third longer
        hit = table.index_select(0, row.flatten()).view_as(row) == target
        steps.append(zip(hit, row))
        target = target + 1
        row = row + hit
    following = torch.arange(1, n + 1, device=device, dtype=torch.int32)
    after = table[1:] == keys + 1, following  # x + 1 comes next in order
    return [after, *(pair for trio in zip(*steps) for pair in trio)]


def fed_outputs(coords, shape, pad, size):
    """The outputs of a stride-2 convolution, and which of them each input feeds.

    An input feeds one or two outputs on each axis, so eight at most. [ours]
    -> out coords (V', 4) sorted; for each of P pairs its place (P,) in a table (8, V) of the
    inputs, row (P,) of out, offset (P,) of the kernel.
    """
    n = halved_shape(shape, pad)
    cells = math.prod(n)
    coords = narrow(coords.t(), n, size)              # (4, V)
    const = partial(constant, device=coords.device, dtype=coords.dtype)
    v = coords[1:] + const(pad)[:, None]              # (3, V), v = 2 o + t
    o = torch.stack([v, v - 2]) >> 1                  # (2, 3, V)
    t = v - 2 * o                                     # 0 or 1, and 2 or 3
    fed = (t <= 2) & (o >= 0) & (o < const(n)[:, None])
    place = corners(torch.logical_and, fed).nonzero()[:, 0]
    offset = corners(torch.add, t * const((9, 3, 1))[:, None]).index_select(0, place)
    o = o * const((n[1] * n[2], n[2], 1))[:, None]
    o[:, 0] += coords[0] * cells
    keys, order, number, _ = group(corners(torch.add, o).index_select(0, place), size * cells)
    row = torch.empty_like(number).scatter_(0, order, number)
    return unravel(keys, n), place, row, offset


def corners(join, ends):
    """One of two on each of three axes, joined. ends (2, 3, V) -> (8 V,)."""
    z, y, x = ends.unbind(1)
    plane = join(z[:, None], y).flatten(0, 1)         # (4, V)
    return join(plane[:, None], x).flatten()


class KernelPairs(NamedTuple):
    """The kernel map for a CPU: pairs of rows that a 3 x 3 x 3 sparse convolution joins.

    They are grouped by the 27 kernel offsets, z slowest.
    Offset t of output o reads input stride o - pad + t.
    """
    ins: torch.Tensor    # (P,) int64 row of the input
    outs: torch.Tensor   # (P,) int64 row of the output
    ends: torch.Tensor   # (27,) int32 where each offset's pairs end
    order: torch.Tensor  # (P,) the pairs sorted by output
    first: torch.Tensor  # (n_out + 1,) where each output's pairs begin in that order
    n_in: int
    # submanifold: the outputs are the inputs, so offset 26 - t has the pairs of t exchanged
    same: bool

    @classmethod
    def of(cls, ins, outs, ends, n_in, n_out, same):
        """Sort by output, once for every convolution of the level, forward and backward.

        scipy transposes a sparse (27, n_out) matrix, which counts instead of sorting: a quarter
        of the time.
        """
        pairs = np.arange(len(outs), dtype=np.int32)
        starts = np.concatenate([[0], ends.numpy()]).astype(np.int32)
        columns = csr_array((pairs, outs.int().numpy(), starts), shape=(27, n_out)).tocsc()
        order = torch.from_numpy(columns.data)
        first = torch.from_numpy(columns.indptr)
        return cls(ins, outs, ends, order, first, n_in, same)

    @classmethod
    def submanifold(cls, later):
        """later: of later_neighbours. The earlier 13 offsets have their pairs exchanged."""
        n = len(later[0][0])
        outs = [hit.nonzero()[:, 0] for hit, _ in later]
        ins = [row.index_select(0, out).long() for (_, row), out in zip(later, outs)]
        middle = [torch.arange(n)]
        counts = [len(rows) for rows in outs]
        ends = torch.tensor(counts[::-1] + [n] + counts).cumsum(0, dtype=torch.int32)
        all_ins = torch.cat(outs[::-1] + middle + ins)
        all_outs = torch.cat(ins[::-1] + middle + outs)
        return cls.of(all_ins, all_outs, ends, n, n, True)

    @classmethod
    def strided(cls, place, row, offset, n_in, n_out):
        """place, row, offset (P,) of fed_outputs."""
        offset = offset.byte()
        order = torch.argsort(offset, stable=True)
        ends = torch.bincount(offset, minlength=27).cumsum(0, dtype=torch.int32)
        ins = place.index_select(0, order) % n_in
        return cls.of(ins, row.index_select(0, order), ends, n_in, n_out, False)

    def reversed(self):
        """The map of the transposed convolution: inputs and outputs exchanged."""
        n_out = len(self.first) - 1
        return self.of(self.outs, self.ins, self.ends, n_out, self.n_in, False)

    def convolve(self, x, weight):
        """x (V, C), weight (27, C, C') -> (V', C')."""
        return self.multiply(padded_rows(x, self.ins), weight)

    def multiply(self, pairs, weight):
        """Grouped matrix product, then the sum over the pairs of each output.

        pairs (P, C), weight (27, C, C') -> (V', C').
        """
        C, out = weight.shape[1:]
        weight = F.pad(weight, (0, -out % 8, 0, -C % 8)).contiguous()
        products = F.grouped_mm(pairs, weight, offs=self.ends)  # (P, C')
        sums = F.embedding_bag(self.order, products, self.first, mode="sum",
                               include_last_offset=True)
        return sums[:, :out]

    def gradients(self, x, weight, grad, wants_x):
        """grad (V', C') -> those of x, None unless wanted, and of weight."""
        C, out = weight.shape[1:]
        ins, outs = self.ins, self.outs
        if self.same:
            # offset 26 - t has the pairs of t exchanged: one gather of grad serves both products
            ins, outs = outs, ins
            weight = weight.flip(0)
        pairs = padded_rows(grad, outs)
        grad_x = None
        if wants_x:  # the transpose: pairs exchanged, matrices transposed
            exchanged = self if self.same else self.reversed()
            grad_x = exchanged.multiply(pairs, weight.transpose(1, 2))
        grad_w = F.grouped_mm(padded_rows(x, ins).t(), pairs, offs=self.ends)[:, :C, :out]
        return grad_x, grad_w.flip(0) if self.same else grad_w


def padded_rows(x, rows):
    """Rows of x. x (V, C), rows (P,) -> (P, C up to a multiple of 8).

    grouped_mm wants rows of a multiple of 16 bytes.
    """
    if x.shape[1] % 8:  # F.pad would copy also where there is nothing to do
        x = F.pad(x, (0, -x.shape[1] % 8))
    return x.index_select(0, rows)


class KernelTable(NamedTuple):
    """The kernel map for a GPU: what each output of a 3 x 3 x 3 sparse convolution reads.

    Offset t, z slowest, of output o reads input stride o - pad + t. All 27 inputs of an output
    stand side by side, zeros where there is no site, and one product serves all offsets. It
    does what need not be done, but nothing depends on how many pairs there are: the GPU is
    never waited for.
    """
    ins: torch.Tensor          # (V', 27) int32 row of the input, V where there is none
    # (8, V) int32 place in ins of each input, 27 V' where there is none; None: submanifold,
    # where offset 26 - t joins the same sites the other way round
    uses: torch.Tensor | None

    @classmethod
    def submanifold(cls, later):
        """later: of later_neighbours. The earlier 13 offsets are the way back."""
        hit, row = map(torch.stack, zip(*later))  # (13, V) each
        n = row.shape[1]
        later = torch.where(hit, row, n)
        rows = torch.arange(n, device=later.device, dtype=torch.int32)[None]
        earlier = later.new_full((13, n + 1), n)
        earlier = earlier.scatter_(1, later.long(), rows.expand(13, -1))[:, :n]
        return cls(torch.cat([earlier.flip(0), rows, later]).t().contiguous(), None)

    @classmethod
    def strided(cls, place, row, offset, n_in, n_out):
        """place, row, offset (P,) of fed_outputs."""
        read = 27 * row + offset
        ins = place.new_full((n_out * 27,), n_in).scatter_(0, read, place % n_in)
        uses = place.new_full((8 * n_in,), n_out * 27).scatter_(0, place, read)
        return cls(ins.int().view(n_out, 27), uses.int().view(8, n_in))

    def convolve(self, x, weight):
        """x (V, C), weight (27, C, C') -> (V', C')."""
        matrix = weight.flatten(0, 1)              # (27 C, C')
        x = F.pad(x, (0, 0, 0, 1))                 # a row of zeros for V
        out = x.new_empty(len(self.ins), matrix.shape[1])
        for part in chunks(len(out), len(matrix)):
            torch.mm(side_by_side(x, self.ins[part]), matrix, out=out[part])
        return out

    def gradients(self, x, weight, grad, wants_x):
        """grad (V', C') -> those of x, None unless wanted, and of weight."""
        if self.uses is None:
            return self.submanifold_gradients(x, weight, grad, wants_x)
        return self.strided_gradients(x, weight, grad)

    def submanifold_gradients(self, x, weight, grad, wants_x):
        """Input i is read at offset 26 - t by the site at its offset t."""
        C, out = weight.shape[1:]
        matrix = weight.flip(0).transpose(1, 2).flatten(0, 1)  # (27 C', C)
        grad = F.pad(grad, (0, 0, 0, 1))
        grad_x = torch.empty_like(x) if wants_x else None
        grad_w = x.new_zeros(C, 27 * out, dtype=torch.float32)
        for part in chunks(len(x), len(matrix)):
            columns = side_by_side(grad, self.ins[part])       # (n, 27 C')
            grad_w += x[part].t() @ columns
            if wants_x:
                torch.mm(columns, matrix, out=grad_x[part])
        grad_w = grad_w.view(C, 27, out).transpose(0, 1).flip(0)
        return grad_x, grad_w.to(weight.dtype)

    def strided_gradients(self, x, weight, grad):
        """What each output sends back to its 27 inputs, then for each input the sum of that."""
        C, out = weight.shape[1:]
        matrix = weight.flatten(0, 1).t()                      # (C', 27 C)
        sent = x.new_empty(27 * len(grad) + 1, C)
        sent[-1] = 0
        of_output = sent[:-1].view(len(grad), 27 * C)
        x = F.pad(x, (0, 0, 0, 1))
        grad_w = x.new_zeros(27 * C, out, dtype=torch.float32)
        for part in chunks(len(grad), 27 * C):
            grad_w += side_by_side(x, self.ins[part]).t() @ grad[part]
            torch.mm(grad[part], matrix, out=of_output[part])
        grad_x = sent.index_select(0, self.uses.flatten()).view(8, -1, C).sum(0)
        return grad_x, grad_w.view(27, C, out).to(weight.dtype)


def side_by_side(x, rows):
    """x (V + 1, C), rows (n, 27) -> (n, 27 C)."""
    return x.index_select(0, rows.flatten()).view(len(rows), -1)


def chunks(n, width):
    """Slices of n rows, so that a matrix of `width` columns has at most 2^27 numbers."""
    rows = 2**27 // width
    return [slice(start, start + rows) for start in range(0, n, rows)]


class SparseConvolution(torch.autograd.Function):
    """x (V, C), weight (27, C, C'), KernelPairs or KernelTable -> (V', C').

    It keeps x and weight only, and gathers again in backward. Nothing is added atomically, so
    it is repeatable bit by bit.
    """

    @staticmethod
    def forward(ctx, x, weight, kmap):
        ctx.save_for_backward(x, weight)
        ctx.kmap = kmap
        return kmap.convolve(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_w = ctx.kmap.gradients(x, weight, grad, ctx.needs_input_grad[0])
        return grad_x, grad_w, None


class SparseConv(nn.Module):
    """3 x 3 x 3 sparse convolution without bias, since a batch norm follows.

    weight (27, C, C'), offsets z slowest.
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(27, inputs, outputs))
        bound = (27 * inputs) ** -0.5  # torch's default for a dense Conv3d
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x, kmap):
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return SparseConvolution.apply(x.to(dtype), self.weight.to(dtype), kmap)


# ---- §8 the trunk --------------------------------------------------------------------
# Sparse voxel encoder, image network with lift, and their fusion. Source: the shapes of
# OpenPCDet's VoxelResBackBone8x and of BEVFusion; the lift is [ours].

class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of every process, on any device.

    x (N, C), images (B, C, H, W) or volumes (B, C, Z, Y, X); a pixel or a cell is a row here.
    A process may have none. Fewer than two rows in all have no variance and take the running
    statistics.
    torch's SyncBatchNorm runs on CUDA only, and waits for the GPU three times a layer.
    """

    def forward(self, x):
        if self.training and processes() > 1:
            mean, var, share = self.joint_statistics(x)
            return Normalise.apply(x, self.weight, self.bias, mean, var, share, self.eps)
        batch = self.training and x.numel() > self.num_features
        if batch:
            self.num_batches_tracked += 1
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            batch, self.momentum, self.eps)

    @torch.no_grad()
    def joint_statistics(self, x):
        """Mean (C,), biased variance (C,) and 1 / n () of the n rows of all processes.

        If n < 2, the running statistics and 0.
        Every process does the same sums of the same numbers, so its running statistics are
        those of the others bit for bit.
        """
        C = self.num_features
        rows = x.numel() // C
        if rows:
            # of bfloat16 a CPU would give statistics in bfloat16
            values = x if x.is_cuda else x.to(self.weight.dtype)
            mean, var = torch.batch_norm_update_stats(values, None, None, 0.0)
        else:
            mean = var = torch.zeros_like(self.running_mean)
        parts = all_gather(torch.cat([mean, var, mean.new_full((1,), rows)]))
        means, variances, counts = parts.split([C, C, 1], 1)  # a row for each process
        n = counts.sum()
        several = n > 1
        share = several / n.clamp_min(1)
        weights = counts * share
        mean = (weights * means).sum(0)
        apart = means - mean  # squared below: nothing cancels
        var = (weights * torch.addcmul(variances, apart, apart)).sum(0)
        mean = torch.where(several, mean, self.running_mean)
        var = torch.where(several, var, self.running_var)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var / (1 - share), self.momentum)
        self.num_batches_tracked += several
        return mean, var, share


@torch.no_grad()
def collect_statistics(network, encode, batches):
    """The batch norms of a network follow these batches as in training; its weights stay.

    encode(batch) runs the network. A network that is frozen needs it: a new one normalises by
    mean 0 and variance 1, which its features do not have, and a pre-trained one by what it saw
    masked or augmented.
    """
    # with the momentum of training: after their plain mean a new network is worse (segment.py's
    # probe in the embedded world: 14.1 mIoU, so 20.4)
    training = network.training
    network.train()
    for batch in batches:
        encode(batch)
    network.train(training)


class Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) weight + bias, where mean and var are of x on all processes.

    x (N, C, ...), weight, bias, mean, var (C,), share () -> as x.
    share: how much one row counts in mean and var; 0 if they are not of x.
    It keeps x, mean and var only. The gradients of weight and bias are of this process's
    rows: DDP joins them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, share, eps):
        ctx.save_for_backward(x, weight, mean, var, share)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, var, share = ctx.saved_tensors
        invstd = (var + ctx.eps).rsqrt()
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)  # the kernels read both in one order
        if x.numel():
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, invstd, True, ctx.eps, [False, True, True])
        else:
            grad_weight = grad_bias = torch.zeros_like(mean)
        # what each row gives back through the deviation and through the mean
        along, level = all_reduce(torch.stack([grad_weight, grad_bias])) * share
        if x.is_cuda and x.numel():  # one kernel for what follows, and one rounding
            one = mean.new_ones(1, dtype=torch.int32)  # the sums are over all rows already
            grad_x = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, level,
                                                     along / invstd, one)
        else:
            slope = weight * invstd
            back = F.batch_norm(x, mean, var, -slope * along, -slope * level, eps=ctx.eps)
            shape = (1, -1, *[1] * (x.dim() - 2))
            grad_x = torch.addcmul(back, grad, slope.view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class SparseBlock(nn.Module):
    """Two submanifold convolutions and the identity; names of OpenPCDet's SparseBasicBlock."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = SparseConv(width, width), BatchNorm(width, eps=1e-3)
        self.conv2, self.bn2 = SparseConv(width, width), BatchNorm(width, eps=1e-3)

    def forward(self, x, kmap):
        y = F.relu(self.bn1(self.conv1(x, kmap)))
        return F.relu(x + self.bn2(self.conv2(y, kmap)))


class Down(nn.Module):
    """A convolution (submanifold or strided, as its map says), batch norm, ReLU."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = SparseConv(inputs, outputs)
        self.bn = BatchNorm(outputs, eps=1e-3)

    def forward(self, x, kmap):
        return F.relu(self.bn(self.conv(x, kmap)))


class Level(NamedTuple):
    """The occupied sites of one resolution."""
    coords: torch.Tensor    # (V, 4) int64 b, z, y, x, sorted
    features: torch.Tensor  # (V, C)
    cells: Cells
    size: int               # frames

    def centre(self):
        """The centre of each site -> (V, 3) m."""
        return self.cells.centre(self.coords[:, 1:])

    def keys(self):
        """The place of each site in the table (B Z Y X, ...) of all cells -> (V,) int64."""
        return ravel(self.coords, self.cells.shape, self.size).long()

    def dense(self):
        """All cells -> (B, C, Z, Y, X), zero where there is no site."""
        shape = self.cells.shape
        flat = self.features.new_zeros(self.size * math.prod(shape), self.features.shape[1])
        flat = flat.index_copy(0, self.keys(), self.features)
        return flat.view(self.size, *shape, -1).permute(0, 4, 1, 2, 3)


class VoxelResNet(nn.Module):
    """Mean of the points in each voxel, then a residual sparse encoder of stride 8.

    Its stages are 1, 1, 2, 4, 8 times `width` wide.
    The shape is that of OpenPCDet's VoxelResBackBone8x, without the biases before batch
    norm, which do nothing. There is one spare layer of voxels above, and no padding in z in
    the last reduction, so that 8 m of 0.2 m voxels become 5 cells.
    """

    def __init__(self, low, high, voxel, width=16):
        super().__init__()
        self.low, self.high, self.voxel = low, high, voxel
        Z, Y, X = [round((high[axis] - low[axis]) / voxel[axis]) for axis in (2, 1, 0)]
        first = tuple(lo + v / 2 for lo, v in zip(low, voxel))
        self.cells = [Cells((Z + 1, Y, X), first, tuple(voxel))]
        self.pads = (1, 1, 1), (1, 1, 1), (0, 1, 1)
        for pad in self.pads:
            self.cells.append(self.cells[-1].halved(pad))
        self.conv_input = Down(5, width)
        self.conv1 = nn.ModuleList([SparseBlock(width), SparseBlock(width)])
        self.conv2 = self.stage(width, 2 * width)
        self.conv3 = self.stage(2 * width, 4 * width)
        self.conv4 = self.stage(4 * width, 8 * width)

    @staticmethod
    def stage(inputs, outputs):
        """A reduction and two residual blocks."""
        down = Down(inputs, outputs)
        return nn.ModuleList([down, SparseBlock(outputs), SparseBlock(outputs)])

    def inside(self, points):
        """Which points lie in the range. points (N, 3 or more) -> (N,) bool."""
        x, y, z = points[:, :3].unbind(1)
        low, high = self.low, self.high
        inside = (x >= low[0]) & (x < high[0]) & (y >= low[1]) & (y < high[1])
        return inside & (z >= low[2]) & (z < high[2])

    def voxelise(self, points, b, size):
        """The mean point of each occupied voxel.

        points (N, 5), b (N,) frame of `size` -> the finest Level. Points outside the range are
        dropped.
        """
        cells = self.cells[0]
        beyond = size * math.prod(cells.shape)  # the key of points outside, after all others
        low = constant(self.low, points.device)
        voxel = constant(self.voxel, points.device)
        keys = narrow(b, cells.shape, size)
        for axis, n in zip((2, 1, 0), cells.shape):  # as ravel does, a column at a time
            place = ((points[:, axis] - low[axis]) / voxel[axis]).int()
            keys = keys * n + place.clamp(max=n - 1)  # rounding at the upper face
        keys = torch.where(self.inside(points), keys, beyond)
        keys, order, _, first = group(keys, beyond)
        mean = segment_mean(points.index_select(0, order), first)
        return Level(unravel(keys, cells.shape), mean, cells, size)

    def point_features(self, levels, points, b):
        """The features of each point's site in every level, concatenated -> (N, 15 width).

        levels: what forward gave for these points, which must all lie inside the range.
        """
        low = constant(self.low, points.device)
        voxel = constant(self.voxel, points.device)
        finest = self.cells[0]
        last = constant(finest.shape, points.device, torch.int32) - 1
        # as in voxelise
        zyx = ((points[:, :3] - low) / voxel).int().flip(1).minimum(last)  # (N, 3)
        centre = finest.centre(zyx)
        features = []
        for level in levels:
            # the site nearest to the voxel: the strides reach it
            site = level.cells.index(centre).round().long().clamp_min(0)
            site = site.minimum(constant(level.cells.shape, site.device, site.dtype) - 1)
            targets = ravel(torch.cat([b[:, None], site], 1), level.cells.shape, level.size)
            rows = torch.searchsorted(level.keys(), targets.long())
            features.append(level.features.index_select(0, rows))
        return torch.cat(features, 1)

    def forward(self, points, b, size):
        """points (N, 5) x, y, z, intensity, time; b (N,) frame of `size` -> four Levels.

        Their strides are 1, 2, 4, 8. dense() of the last one is the volume.
        """
        level = self.voxelise(points, b, size)
        kmap = submanifold_map(level.coords, level.cells.shape, size)
        # in float32: bfloat16 would round coordinates to a quarter of a metre
        x = self.conv_input(level.features, kmap)
        with bf16_autocast(points.device):
            for block in self.conv1:
                x = block(x, kmap)
            levels = [level._replace(features=x)]
            stages = (self.conv2, self.conv3, self.conv4)
            for pad, cells, (down, *blocks) in zip(self.pads, self.cells[1:], stages):
                coords, kmap = strided_map(levels[-1].coords, levels[-1].cells.shape, pad, size)
                x = down(x, kmap)
                kmap = submanifold_map(coords, cells.shape, size)  # serves four convolutions
                for block in blocks:
                    x = block(x, kmap)
                levels.append(Level(coords, x, cells, size))
        return [level._replace(features=level.features.float()) for level in levels]


def bf16_autocast(device):
    """bfloat16 for the encoders on CUDA, nothing on a CPU. They return float32 all the same."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def mlp(*widths):
    """Linear, batch norm, ReLU, ..., Linear."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:-1]):
        layers.append(nn.Linear(inputs, outputs, bias=False))
        layers.append(BatchNorm(outputs))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def conv3d(inputs, outputs, kernel):
    """Dense convolution, batch norm, ReLU, same size."""
    conv = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, BatchNorm(outputs, eps=1e-3), nn.ReLU(inplace=True))


class Neck(nn.Module):
    """Feature pyramid down to stride 8: 1 x 1 laterals, nearest upsampling, one 3 x 3.

    torchvision's would train two outputs that are never read. [ours]
    """

    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in inputs)
        smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.smooth = nn.Sequential(smooth, BatchNorm(width), nn.ReLU(inplace=True))
        self.output = nn.Conv2d(width, outputs, 1)

    def forward(self, stages):
        x = self.lateral[-1](stages[-1])
        for lateral, stage in zip(self.lateral[-2::-1], stages[-2::-1]):
            x = lateral(stage) + F.interpolate(x, size=stage.shape[-2:])
        return self.output(self.smooth(x))


class ResNet(nn.Module):
    """torchvision's ResNet with its key names, without fc."""
    # ImageNet's, RGB: what every published ResNet with torchvision's names expects
    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self, depth=50):
        super().__init__()
        build = {18: resnet18, 50: resnet50}[depth]
        # blocks begin as identities, which learns sooner [ours]
        self.resnet = build(weights=None, zero_init_residual=True, norm_layer=BatchNorm)
        self.resnet.to(memory_format=torch.channels_last)  # faster convolutions
        self.resnet.fc = nn.Identity()
        self.widths = {18: (128, 256, 512), 50: (512, 1024, 2048)}[depth]

    def stages(self, images, masked=None):
        """Features of stride 8, 16 and 32.

        images (B K, 3, H, W) uint8, masked (B K, H, W) bool, True = masked
        -> 3 x (B K, C, H / stride, W / stride). A masked pixel becomes the mean colour.
        """
        mean = constant(self.MEAN, images.device).view(1, 3, 1, 1)
        std = constant(self.STD, images.device).view(1, 3, 1, 1)
        x = (images.float() / 255 - mean) / std  # (B K, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        if masked is not None:
            x = x.masked_fill(masked[:, None], 0.0)
        net = self.resnet
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        stages = []
        for layer in (net.layer2, net.layer3, net.layer4):
            x = layer(x)
            stages.append(x)
        return stages


class CameraNet(ResNet):
    """ResNet, neck to stride 8, and the lift of image features into the volume.

    Each cell centre asks every camera that sees it for the bilinear image feature, weighted
    by the probability of the cell's depth at that pixel, and sums over the cameras. Pulling
    instead of splatting needs no frustum tensor, and uses the same projection as everywhere
    else. [ours; LSS's depth distribution]
    """
    near = 1.0  # m, where the depth bins begin; they end at max_depth

    def __init__(self, depth=50, channels=80, max_depth=60.0, bins=118):
        super().__init__(depth)
        self.neck = Neck(self.widths, 2 * channels, channels + bins)
        self.channels = channels
        self.bins = bins
        self.max_depth = max_depth

    def forward(self, batch, cells, masked=None):
        """Volume of image features, and which of its cells some camera sees.

        batch: images, hw, lidar2img, size; cells of the volume;
        masked (B K, H, W) bool, True = masked
        -> volume (B, C, Z, Y, X), seen (B, Z, Y, X) bool.
        Masked pixels and the padding of smaller images become the mean colour.
        """
        padding = ~valid_pixels(batch.hw, batch.images.shape[-2:])
        masked = padding if masked is None else masked | padding
        with bf16_autocast(batch.images.device):
            x = self.neck(self.stages(batch.images, masked))  # (B K, C + D, H/8, W/8)
        features, logits = x.float().split([self.channels, self.bins], 1)
        return self.lift(features, logits.softmax(1), batch, cells)

    def lift(self, features, probability, batch, cells):
        """Pull the image features to the cells, each weighted by its depth's probability.

        features (B K, C, h, w), probability (B K, D, h, w)
        -> volume (B, C, Z, Y, X), seen (B, Z, Y, X) bool.
        """
        C = features.shape[1]
        V = math.prod(cells.shape)
        centres = cells.centres(features.device)  # (V, 3)
        xyz = centres.repeat(batch.size, 1)       # (B V, 3)
        cell, image, uv, depth = project(xyz, [V] * batch.size, batch.lidar2img, batch.hw,
                                         self.near, self.max_depth)
        padded_hw = batch.images.shape[-2:]
        pulled = sample_image(features, image, uv, padded_hw)  # (M, C)
        p = self.depth_probability(probability, image, uv, depth, padded_hw)
        # (B V, C); times D: the factor is 1 at a uniform distribution
        volume = segment_sum(pulled * p * self.bins, cell, batch.size * V)
        seen = torch.zeros(batch.size * V, dtype=torch.bool, device=cell.device)
        seen[cell] = True
        volume = volume.view(batch.size, *cells.shape, C).permute(0, 4, 1, 2, 3)
        return volume, seen.view(batch.size, *cells.shape)

    def depth_probability(self, probability, image, uv, depth, padded_hw):
        """Trilinear sampling of the depth distribution.

        probability (B K, D, h, w), image (M,), uv (M, 2) px, depth (M,) m -> (M, 1).
        """
        D, h, w = probability.shape[1:]
        # whole numbers at bin centres
        bin_index = (depth - self.near) / (self.max_depth - self.near) * D - 0.5
        index = torch.cat([grid_index(uv, (h, w), padded_hw), bin_index[:, None]], 1)
        flat, weight = multilinear(index, (h, w, D))
        table = probability.permute(0, 2, 3, 1).reshape(-1, 1)
        return gather_weighted(table, flat + image[:, None] * (h * w * D), weight)


class FusionNet(nn.Module):
    """LiDAR volume and camera volume -> fused volume: 1 x 1 x 1, then 3 x 3 x 3.

    An absent branch counts as zeros. Source: BEVFusion's ConvFuser, kept in 3-D [ours].
    """

    def __init__(self, lidar, camera, width=64):
        super().__init__()
        self.widths = lidar, camera
        self.reduce = conv3d(lidar + camera, width, 1)
        self.mix = conv3d(width, width, 3)

    def forward(self, lidar=None, camera=None):
        """lidar (B, C, Z, Y, X) or None, camera (B, C', Z, Y, X) or None
        -> (B, width, Z, Y, X) float32."""
        present = lidar if lidar is not None else camera
        volumes = []
        for volume, width in zip((lidar, camera), self.widths):
            if volume is None:
                volume = present.new_zeros(len(present), width, *present.shape[2:])
            volumes.append(volume)
        with bf16_autocast(present.device):
            return self.mix(self.reduce(torch.cat(volumes, 1))).float()


def lift_depth(low, high):
    """Where the depth bins of a lift end on a grid, m: BEVFusion's 60 m for 54 m of range.

    low, high: the corners of the range, m.
    """
    extent = max(abs(v) for v in (*low[:2], *high[:2]))
    return extent * 60 / 54


def trunk(grid, resnet, width, bins, max_depth=0.0):
    """VoxelResNet, CameraNet and FusionNet that fit together on a grid.

    Pre-training trains them, fine-tuning loads them.
    grid: low, high, voxel; resnet 18 or 50; width of the first stage; bins of depth;
    max_depth: where these end (m), 0: by the range.
    """
    max_depth = max_depth or lift_depth(grid.low, grid.high)
    camera = CameraNet(resnet, 5 * width, max_depth=max_depth, bins=bins)
    lidar = VoxelResNet(grid.low, grid.high, grid.voxel, width)
    return lidar, camera, FusionNet(8 * width, 5 * width, 4 * width)


# ==== RUNS ============================================================================
# Processes, flags, checkpoints, logs and figures. A method's reader may stop here.

# ---- §9 processes --------------------------------------------------------------------
# Sums over the processes of a run; they work without a process group too. A collective is
# called by every process or by none. Then: how processes start and end.

def processes():
    """How many processes run together: 1 without a process group."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def all_reduce(x, op=torch.distributed.ReduceOp.SUM):
    """Sum (or op) of a tensor over all processes, without gradient.

    Without a process group it is the tensor itself.
    """
    x = x.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, op)
    return x


def all_gather(x):
    """The tensor of every process, in order of ranks -> (processes, ...), without gradient."""
    if not torch.distributed.is_initialized():
        return x[None]
    parts = x.new_empty(processes(), *x.shape)
    torch.distributed.all_gather_single(parts, x[None])
    return parts


def mean_over_ranks(total, count):
    """The mean over the rows of every process: (sum of totals) / (sum of counts).

    total (): this process's sum, with gradient; count: its number of rows, a number or a ()
    tensor -> ().
    DDP averages gradients over processes. So each process returns its total x world / all
    counts: the average of those is the mean, and so is the average of their gradients.
    """
    if not isinstance(count, torch.Tensor):
        count = total.new_full((), float(count))
    rows = all_reduce(count.to(total.dtype))
    return total * processes() / rows.clamp_min(1)


def mean_rows(x):
    """Mean over the rows of every process; other axes are summed. x (N, ...) -> ()."""
    return mean_over_ranks(x.sum(), len(x))


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of all their gradients."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


def launch(train, cfg):
    """Run train(rank, world, cfg): here, or in cfg.gpus processes.

    Each of those starts this command again. Under torchrun the environment decides.
    What a user can mend ends with one line and status 1, see one_line.
    """
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), LenientStream):
            setattr(sys, name, LenientStream(getattr(sys, name)))
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        rank, world = place_in_job(cfg)
    elif (cfg.gpus or 0) > 1:
        return launch_processes(cfg.gpus)
    else:
        rank, world = 0, 1
        if cfg.gpus == 1 and not torch.cuda.is_available():
            raise SystemExit("--gpus 1: no CUDA device is visible; --gpus 0 (the default here) "
                             "runs on the CPU")
    if world > 1:
        run_rank(train, rank, world, cfg)
    handlers = catch_signals(stop_at_once, signal.SIGTERM, signal.SIGHUP)
    try:
        with one_line():
            return train(rank, world, cfg)
    finally:
        restore_signals(handlers)


def place_in_job(cfg):
    """This process's rank and the number of ranks, as the environment has them."""
    hint = "unset RANK, WORLD_SIZE and LOCAL_RANK to start without a launcher"
    for name in ("RANK", "WORLD_SIZE"):
        require(name in os.environ, f"{name} is not set in the environment, though RANK or "
                                    f"WORLD_SIZE is: left over from a job? {hint}")
    world = environment_number("WORLD_SIZE", 1, 1)
    rank = environment_number("RANK", 0, 0)
    require(rank < world, f"RANK={rank} and WORLD_SIZE={world} in the environment: expected a "
                          f"rank below the number of processes; {hint}")
    local_world = environment_number("LOCAL_WORLD_SIZE", world, 1)
    require(not cfg.gpus or cfg.gpus == local_world,
            f"--gpus {cfg.gpus}, but RANK={rank} and WORLD_SIZE={world} in the environment say "
            f"that {local_world} processes run on this machine; {hint}, or leave --gpus out")
    return rank, world


def run_rank(train, rank, world, cfg):
    """Run train as one of several processes, and end this process."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    status = 0
    try:
        with one_line():
            record(train)(rank, world, cfg)  # tells the launcher what went wrong here
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            get_error_handler().record_exception(stop)  # the launcher's last line repeats it
            status = 1
    if status in (0, 128 + signal.SIGTERM):  # asked to stop: all wait until rank 0 has saved
        destroy_group()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may abort a finished interpreter on its way out


class LenientStream:
    """A text stream on which a failure ends nothing.

    The terminal may be closed, the reader of a pipe gone, the disk full: the run goes on.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        with suppress(AttributeError, OSError):
            self.stream.reconfigure(errors="backslashreplace")  # a name that ASCII lacks

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def one_line():
    """Turn an error that a user can mend into SystemExit with one line.

    LIDAR_CAMERA_DEBUG=1 in the environment shows its traceback too.
    """
    try:
        yield
    except BaseException as error:
        line = describe_error(error)
        if line is None:
            raise
        if os.environ.get("LIDAR_CAMERA_DEBUG"):
            traceback.print_exc()
        raise SystemExit(line) from error


def describe_error(error):
    """One line for an error that a user can mend; None for a fault of the program.

    Errors whose class has `one_line` are for users, data.DataError for instance.
    """
    # a loader worker's error arrives with its traceback: its message is the last line
    text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else None
    if isinstance(error, KeyboardInterrupt):
        return "KeyboardInterrupt: ended at once; the same command goes on from the last checkpoint"
    if isinstance(error, FloatingPointError):
        return f"FloatingPointError: {text.removeprefix('FloatingPointError: ')}"
    if getattr(error, "one_line", False):
        return text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    if isinstance(error, OSError):
        return f"{text}; the same command goes on from the last checkpoint, if there is one"
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if memory or "DefaultCPUAllocator" in str(error):
        return (f"not enough memory ({str(error).splitlines()[0][:200] if str(error) else text}); "
                "give a smaller --batch or smaller sizes")
    return None


def end_with_parent():
    """Ask Linux to send SIGTERM to this process when its launcher ends, in whatever way."""
    import ctypes
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended in the meantime
        raise SystemExit("the launcher has ended")


def catch_signals(handler, *numbers):
    """Handle these signals from now on -> {number: handler until now}.

    A SIGHUP that is ignored stays so: nohup wants it.
    """
    handlers = {}
    for number in numbers:
        before = signal.getsignal(number)
        if number != signal.SIGHUP or before != signal.SIG_IGN:
            handlers[number] = signal.signal(number, handler)
    return handlers


def restore_signals(handlers):
    """Undo catch_signals."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop_at_once(number, _):
    """End a process that is asked to while it does not train: nothing is to be saved."""
    raise SystemExit(f"ended by {signal.Signals(number).name}; the same command goes on from the "
                     "last checkpoint, if there is one")


def launch_processes(n):
    """Start this command again in n processes, and end as they end."""
    devices = torch.cuda.device_count()
    if 0 < devices < n:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise SystemExit(f"--gpus {n}: this machine shows {devices} "
                         f"(CUDA_VISIBLE_DEVICES={visible})")
    if not torch.cuda.is_available():
        print(f"--gpus {n} without CUDA: {n} CPU processes over gloo", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIDAR_CAMERA_SAVED"] = f"{folder}/saved"  # rank 0 makes it, see Run.leave
        return end_as_ranks_end(n, Path(folder, "saved"))


def end_as_ranks_end(n, saved):
    """Run n processes under torch's launcher. saved: the file that says that rank 0 has saved."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main
    flags = ["--standalone", "--nproc-per-node", str(n)]
    flags += ["--shutdown-timeout", "120"]  # s to finish a step and save
    # neither looks up this machine's name, which nothing may resolve
    flags += ["--local-addr", "127.0.0.1"]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under nohup
        flags += ["--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"]
    try:
        return main([*flags, *sys.argv])
    except ChildFailedError as error:
        rank = rank_to_blame(error.failures)
        failure = error.failures[rank]
        if failure.exitcode == 128 + signal.SIGTERM:  # it was asked to stop, and has saved
            raise SystemExit(failure.exitcode) from None
        raise SystemExit(describe_failure(rank, n, failure)) from None
    except SignalException as stop:  # it was passed on to the processes, which have left
        if saved.exists():
            raise SystemExit(128 + signal.SIGTERM) from None
        raise SystemExit(f"ended by {stop.sigval.name} before a step could be saved; the same "
                         "command goes on from the last checkpoint, if there is one") from None


def rank_to_blame(failures):
    """Which process failed first by itself. failures {rank: torch's failure} -> rank.

    A killed process comes first: the others then lose the connection to it. SIGTERM does not
    count as killed, since the launcher ends the others with it, nor does SIGABRT, with which
    NCCL does. Nor does a process killed more than 10 s after the first failure: it was
    hanging, and the launcher killed it. One that has saved and left, as it was asked to, is
    not to blame for the others.
    """
    saved = 128 + signal.SIGTERM
    failures = {rank: failure for rank, failure in failures.items()
                if failure.exitcode != saved} or failures
    first = min(failure.timestamp for failure in failures.values())
    killed = []
    for rank, failure in failures.items():
        by_the_others = failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT)
        hung = failure.timestamp > first + 10
        if failure.exitcode < 0 and not by_the_others and not hung:
            killed.append(rank)

    def order(rank):  # at one second the one that says why
        failure = failures[rank]
        silent = not isinstance(getattr(failure, "message", None), dict)
        return failure.timestamp, silent
    return min(killed or failures, key=order)


def describe_failure(rank, n, failure):
    """The launcher's last line: which of n ranks failed, how, and why where it wrote that down."""
    text = ""
    if isinstance(failure.message, dict):  # what run_rank wrote
        text = failure.message["message"].splitlines()[0]
    if text.startswith("SystemExit: "):  # it is for the user and says what to do
        return f"rank {rank} of {n}: {text.removeprefix('SystemExit: ')}"
    if failure.exitcode < 0:
        how = f"was killed by signal {-failure.exitcode}"
    else:
        how = f"left with exit code {failure.exitcode}"
    if text:
        how += f" ({text})"
    return (f"rank {rank} of {n} {how}; the others were stopped. The same command goes on from "
            "the last checkpoint.")


def start(cfg, rank, world, dataset, indices, listing="frames.txt",
          free=("out", "gpus", "workers", "eval_every", "save_every", "profile", "export")):
    """Start a run: device, process group and run folder -> device.

    A folder that holds another configuration, or a run on other data, is refused with the
    difference. Only the fields named in `free` may change between stop and resume, and
    --data where the same data set now lies.
    indices: the frames that are trained on; their names go into the file `listing`.
    """
    device = init_process(cfg, world)
    if not cfg.profile:
        rank0_first(rank, lambda: open_run(cfg, world, dataset, indices, listing, free))
    return device


def init_process(cfg, world):
    """Make this process's device ready, and the group of several processes -> device."""
    cuda = torch.cuda.is_available() and cfg.gpus != 0
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # projection and field need all bits of float32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        # weight gradients of the sparse convolutions are sums over up to 300,000 rows
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # the fastest convolution for each size of pictures, which a run has few of
        torch.backends.cudnn.benchmark = True
    else:
        keep_large_buffers()
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT),
            device_id=device if cuda else None)
    return device


def keep_large_buffers():
    """Tell glibc not to hand large freed buffers back to the kernel; elsewhere do nothing.

    The kernel would page-fault each of them in again, which is a third of a CPU step.
    """
    import ctypes
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # M_MMAP_THRESHOLD; glibc before 2.35 refuses it, and is then left to adapt by itself
    if mallopt(-3, 2**30):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 2**28)      # M_TOP_PAD


def rank0_first(rank, act):
    """Run act() on rank 0 while the others wait.

    If it raises what one_line turns into a message, every process exits, rank 0 with it.
    """
    message = [None]  # a list, because torch broadcasts the objects in a list
    if rank == 0:
        try:
            with one_line():
                act()
        except SystemExit as refusal:
            message = [str(refusal)]
    if processes() > 1:
        torch.distributed.broadcast_object_list(message)
    if message[0]:
        raise SystemExit(message[0] if rank == 0 else 1)


def wrap(model, device, world):
    """The module that the loop calls: DDP around the model with several processes.

    Buffers are not sent: each is computed from the numbers of all processes, so they are equal.
    """
    if world == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, devices, forward_sync_buffers=False,
                                               gradient_as_bucket_view=True)


def destroy_group():
    """The last collective of a run: a barrier, then the process group is destroyed.

    After it rank 0 may take long over figures and scores, and no process waits for it.
    """
    if processes() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ---- §10 run folders -----------------------------------------------------------------
# Flags, config.json, checkpoints, and weights for other runs.

def parse(config, small):
    """Command line -> config.

    Defaults are those of the class (the paper's), or `small`'s values where --preset is small.
    The preset's own default is that of --init's run, else small without --data, else paper.
    --help shows the paper's values, which the sources next to them belong to.
    """
    import argparse

    import tyro
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset")
    peek.add_argument("--init", default="none")
    peek.add_argument("--data")
    texts = [field.name for field in dataclasses.fields(config) if field.type is str]
    for name in {*texts} - {"preset", "init", "data"}:
        peek.add_argument("--" + name.replace("_", "-"), "--" + name, dest=name)
    flags, _ = peek.parse_known_args()
    for name in texts:
        require(getattr(flags, name) != "",
                f"--{name.replace('_', '-')} was given an empty text (a shell variable that is "
                "not set?); give its value, or leave the flag out for its default")
    wants_help = not {"-h", "--help"}.isdisjoint(sys.argv)
    preset = "paper" if flags.data or wants_help else "small"
    if os.path.isfile(os.path.join(flags.init, "config.json")):
        stored = run_config(flags.init)
        require(isinstance(stored, dict) and stored.get("preset") in ("paper", "small"),
                f"{flags.init}/config.json: no preset of a run in it; --init names the folder that "
                "a pre-training run wrote")
        preset = stored["preset"]
    elif os.path.isfile(os.path.join(flags.init, "backbones.safetensors")):
        preset = json.loads(read_units(flags.init)[1]["config"])["preset"]
    if flags.preset in ("paper", "small"):  # tyro refuses others
        preset = flags.preset
    changes = small if preset == "small" else {}
    default = dataclasses.replace(config(), preset=preset, **changes)
    doc = sys.modules["__main__"].__doc__
    return tyro.cli(config, default=default, description=summary(doc))


def summary(doc):
    """The beginning of a script's docstring, for --help: what it does, and its commands.

    It ends before the line that starts with "Read with:", or with the docstring.
    """
    if doc is None:
        return None
    return doc.partition("\nRead with:")[0].rstrip()


def require(condition, message):
    """End with this message unless the condition holds."""
    if not condition:
        raise SystemExit(message)


# counts of steps, epochs and draws, which may be as large as one likes
LONG = ("epochs", "steps", "seed", "warmup", "eval_every", "save_every", "profile")


def check_numbers(cfg, positive, most):
    """End unless each number of a configuration makes sense: finite and from 0.

    positive: the fields that may not be 0, as words of a text. most {field: greatest value};
    else that is 10^6 for whole numbers, but those in LONG, and 10^30 for others.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if not isinstance(value, (int, float)):
            continue
        limit = 1e30
        if isinstance(value, int):
            limit = 10**15 if field.name in LONG else 10**6
        limit = most.get(field.name, limit)
        above_0 = field.name in positive.split()
        if isinstance(value, int):
            least = "a whole number from 1" if above_0 else "a whole number from 0"
        else:
            least = "a number above 0" if above_0 else "a number from 0"
        require(0 <= value <= limit and (value or not above_0),
                f"--{field.name.replace('_', '-')} {value}: expected {least} to {limit:g}")


def to_json(metrics):
    """Metrics as JSON text, null for what is not a number: JSON has no NaN."""
    metrics = json.loads(json.dumps(metrics), parse_constant=lambda name: None)
    return json.dumps(metrics, indent=1)


def run_config(folder):
    """config.json of a run folder, as a dict."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or config.get("preset") not in ("paper", "small"):
            raise ValueError("it names no preset, paper or small")
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: no readable configuration of a run ({error}); give a folder "
                         "that one of these scripts wrote") from error


def run_record(cfg, world):
    """What config.json and checkpoints say of a run: its configuration and its processes."""
    return json.loads(json.dumps({**dataclasses.asdict(cfg), "world": world}))


def open_run(cfg, world, dataset, indices, listing, free):
    """Make the run folder or take the one that exists, on rank 0.

    It is locked, and its configuration, frames and data set are compared with these. Then
    config.json, provenance.json (an entry for each start and resume), the names of the frames,
    data.json and the source copies are written.
    """
    out = Path(cfg.out)
    check_place(cfg, dataset)
    try:
        out.mkdir(parents=True, exist_ok=True)
        refuse_foreign_files(out)
    except OSError as error:
        raise SystemExit(f"--out {out}: cannot write there ({error.strerror}); give a folder that "
                         "can be written") from error
    lock_run_folder(out)
    state = checkpoint(out, verbose=True, repair=True, mmap=True)
    record = run_record(cfg, world)
    names = frame_names(dataset, indices)
    now = describe_data(dataset)
    if state:
        changes = data_changes(out, now)
        same_data = () if changes is None else ("data",)  # then the path says nothing
        refuse_changes(out, json.loads(state["config"]), record, (*free, *same_data))
        refuse_other_frames(out / listing, names)
        require(not changes, f"{out}: {'; '.join(changes or ())}. Bring the data set back to what "
                             "it was, or give another --out.")
    else:
        # of a first save that was killed: it must not outlive the traces of that (see save)
        (out / "backbones.safetensors").unlink(missing_ok=True)
    sweep(out)
    write_text(out / "config.json", json.dumps(record, indent=1))
    starts = (read_json(out / "provenance.json", list) or []) if state else []
    starts.append(dict(argv=sys.argv, commit=commit(), python=sys.version.split()[0],
                       torch=torch.__version__, numpy=np.__version__))
    write_text(out / "provenance.json", json.dumps(starts, indent=1))
    write_text(out / listing, "".join(name + "\n" for name in names))
    write_text(out / "data.json", json.dumps(now, indent=1))
    copy_source(out, len(starts), overwrite=not state)


def check_place(cfg, dataset):
    """End if a run must not be written to --out: where it reads from, or nowhere."""
    require(cfg.out, "--out is empty; name a folder for this run")
    place = os.path.realpath(cfg.out)
    for field in ("init", "image_init", "teacher"):
        source = getattr(cfg, field, "")
        same = os.path.isdir(source) and os.path.realpath(source) == place
        require(not same,
                f"--out {cfg.out} is the run of --{field.replace('_', '-')}, which would be "
                "overwritten; give another --out")
    root = os.path.realpath(dataset.root)
    begun = any(os.path.lexists(os.path.join(place, name)) for name in ("last.pt", "previous.pt"))
    require(begun or os.path.commonpath([root, place]) != root,
            f"--out {cfg.out} lies inside the data set {root}; give a place outside it")


def refuse_foreign_files(out):
    """End if a folder without a checkpoint holds what a new run must not overwrite.

    A run of ours that has saved nothing yet may be started over. A log that the shell has put
    there is no hindrance.
    """
    names = sorted(os.listdir(out))
    if "last.pt" in names or "previous.pt" in names:
        return
    try:
        ours = {"data", "out", "world"} <= run_config(out).keys()
    except SystemExit:
        ours = False
    if ours:
        # while the first checkpoint is saved, its part is there before these weights (see save)
        saved = "backbones.safetensors" in names or "metrics.json" in names
        saving = any(re.fullmatch(r"last\.pt.*\.part", name) for name in names)
        require(saving or not saved,
                f"{out} holds a run without its checkpoints (last.pt, previous.pt): it cannot be "
                "resumed, and is not started over. Put one of them back, or give another --out.")
        return
    for name in names:
        log = name.endswith((".log", ".out", ".err", ".txt"))
        log = log and name not in ("frames.txt", "labels.txt")
        harmless = log or name[0] == "." or name == "lock" or name.endswith(".part")
        require(harmless, f"--out {out} holds {name}, and no run of this program; give a new "
                          "folder, or an empty one")


def sweep(out):
    """Remove what killed processes have left half-written in a run folder."""
    for folder, _, names in os.walk(out):  # it follows no links
        for name in names:
            if name.endswith(".part"):
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))


def copy_source(out, start, overwrite):
    """Copy the script, common.py and data.py into source/, source-2/ at the second start, ...

    overwrite: a run that starts over has no earlier copy to keep.
    """
    script = Path(sys.modules["__main__"].__file__)
    folder = out / ("source" if start == 1 else f"source-{start}")
    while folder.exists() and not overwrite:  # provenance.json was lost
        start += 1
        folder = out / f"source-{start}"
    for file in {script, Path(__file__), Path(__file__).with_name("data.py")}:
        with atomic_write(folder / file.name) as part:
            folder.mkdir(exist_ok=True)
            shutil.copy(file, part)


def read_json(path, kind):
    """A JSON file of a run folder, a list or a dict; None where there is none.

    One that cannot be parsed stops no run: that is said, and it is renamed.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        return value
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SystemExit(unreadable_now(path, error)) from error
    except (ValueError, RecursionError) as error:
        spoilt = path.with_name(f"{path.stem}.unreadable{path.suffix}")
        with suppress(OSError):
            os.replace(path, spoilt)
        print(f"{path}: cannot be parsed ({first_line(error)}); it is now {spoilt.name}, and the "
              "run goes on without it", flush=True)
        return None


# flags that older runs did not have, and what they did
OLDER = dict(accumulate=1, labels="", max_depth=0.0, image_init="", freeze=False, share=1.0)


def refuse_changes(out, before, now, free):
    """End if two run records differ in a field that is not free, with what it was and is."""
    older = {field: value for field, value in OLDER.items() if field in now}
    before = {**older, **before}
    changes = []
    for field in {**before, **now}:
        old, new = before.get(field), now.get(field)
        if old != new and field not in free:
            changes.append(f"{field} was {old!r}, is {new!r}")
    require(not changes, f"{out} holds a run with another configuration: {'; '.join(changes)}. "
                         "Repeat its command to resume it, or give another --out.")


def frame_names(dataset, indices):
    """The names of these frames, a list."""
    all_names = dataset.names  # made once, for all frames
    return [all_names[i] for i in indices]


def describe_data(dataset):
    """What data.json says of a data set: its val frames, and digests of what it holds."""
    return dict(val=frame_names(dataset, dataset.split("val")), holds=dataset.fingerprint())


def data_changes(out, now):
    """How a data set differs from the one that a run began with.

    now: what describe_data says of it -> [text]; None where the run folder does not say what
    it began with.
    """
    path = Path(out) / "data.json"
    before = read_json(path, dict)
    if before is None:
        return None
    names = before.get("val")
    holds = before.get("holds")
    if not isinstance(names, list) or not isinstance(holds, dict):
        print(f"{path}: it lacks val or holds; the data set is not compared", flush=True)
        return None
    changes = []
    if names != now["val"]:
        changes.append("val: " + frame_changes(list(map(str, names)), now["val"]))
    common = holds.keys() & now["holds"].keys()
    differ = sorted(name for name in common if holds[name] != now["holds"][name])
    if differ:
        changes.append(f"the data set has changed since the run began: {len(differ)} of the "
                       f"{len(common)} parts that are compared, first {differ[0]}")
    return changes


def frame_changes(before, now):
    """How a list of frame names differs from an earlier one, as text."""
    old, new = set(before), set(now)
    examples = ", ".join(sorted(old ^ new)[:2]) or "in another order"
    return (f"this run began with {len(before)} frames; now there are {len(now)}, "
            f"{len(new - old)} of them new, {len(old - new)} gone ({examples}, ...)")


def refuse_other_frames(path, now):
    """End if a run's training frames are not those that it began with, listed in `path`.

    It would go on with another schedule. now: the names of the frames.
    """
    try:
        before = path.read_text().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise SystemExit(unreadable_now(path, error)) from error
    except ValueError:
        print(f"{path}: no text in UTF-8; the frames are not compared, and it is written again",
              flush=True)
        return
    require(before == now, f"{path}: {frame_changes(before, now)}. Bring the data set back to "
                           "what it was, or give another --out.")


LOCKS = {}  # run folder: the open lock file of this process


def lock_run_folder(out):
    """Lock a run folder for this process, until it ends in whatever way.

    A folder that another process is writing is refused: the two would mix their logs and
    checkpoints.
    """
    try:
        # it is left open: to close it would be to unlock the folder
        lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise SystemExit(f"{out}: cannot write there ({error.strerror}); make the folder writable, "
                         "or give another --out") from error
    try:
        # not flock: a killed run's loader workers would go on holding it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise SystemExit(f"{out}: another process is writing this run{lock_holder(lock)}. "
                         "Wait for it or end it, then "
                         "the same command goes on; or give another --out.") from error
    except OSError:
        pass  # a file system without locks
    LOCKS[str(out)] = lock


def keep_lock(out):
    """Lock a run folder again if its lock has been removed; end if another process was first."""
    lock = LOCKS.get(str(out))
    if lock is None:
        return  # this process has never locked it
    try:
        held = os.path.samestat(os.fstat(lock), os.stat(out / "lock"))
    except OSError:
        held = False
    if not held:
        lock_run_folder(out)


def lock_holder(lock):
    """Which process holds a lock, as part of a message; nothing where that is not known."""
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
    try:
        pid = struct.unpack("hhqqi4x", fcntl.fcntl(lock, fcntl.F_GETLK, query))[4]
    except (OSError, struct.error):
        return ""
    return f" (pid {pid})" if pid > 0 else ""


def commit():
    """The checkout's commit, with '+' if files differ from it; 'unknown' outside a checkout."""
    head = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!tests/results")
    return head + "+" * bool(changes) or "unknown"


def git(*words):
    """What a git command prints in this file's folder; nothing where there is no git."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", Path(__file__).parent, *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def first_line(error):
    """The kind of an error, and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error)}".splitlines()[0][:200]


def is_temporary(error):
    """Whether an error says nothing of a file: it could not be read just now.

    A permission, a failing disk, no memory. Such an error may hide behind another one.
    """
    while error:
        system = isinstance(error, OSError) and error.errno not in (
            None, errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
        # how torch and safetensors say it
        memory = isinstance(error, MemoryError) or re.search(
            r"allocate|bad_alloc|unable to mmap|os error (5|12|13)\b", str(error))
        if system or memory:
            return True
        error = error.__cause__ or error.__context__
    return False


def unreadable_now(path, error):
    """The message for a file that cannot be read just now: nothing is wrong with it."""
    why = getattr(error, "strerror", None) or first_line(error)
    return (f"{path}: cannot be read just now ({why}); nothing was changed. See to its "
            "permissions, to free memory or to the disk; then the same command goes on.")


@contextmanager
def atomic_write(path, keep=None, advice="the same command goes on from the last checkpoint"):
    """Write to the yielded path; at the end it becomes `path`.

    The old file becomes `keep` if that is given, else it is replaced. A reader sees the old
    file or the new one, whole. If writing fails, the old file stays, no part of the new one
    does, and the error says so. advice: what to do when the cause is gone.
    """
    # a name that nobody can foresee, and put a link there
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # renamed before that, a power cut would leave it empty
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"{path}: could not be written ({why_not_written(part, error)}); the old "
                         "file, if there was one, is unchanged. Make room there, or make the "
                         f"folder writable; {advice}.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def why_not_written(part, error):
    """What the system says against writing: torch.save reports a full disk as something else."""
    try:
        with open(part, "ab") as file:
            file.write(bytes(2**20))
            os.fsync(file.fileno())
    except OSError as refusal:
        return refusal.strerror
    return getattr(error, "strerror", None) or first_line(error)


def write_text(path, text):
    """Write a whole text file, as atomic_write does."""
    with atomic_write(path) as part:
        part.write_text(text)


def checkpoint(out, verbose=False, repair=False, mmap=False):
    """The newest whole checkpoint of a run folder: last.pt, else previous.pt -> its dict.

    It is None if neither file exists. If there are files and none is whole: SystemExit, and
    also if one cannot be read just now, which says nothing of it.
    verbose: say when it is not last.pt. repair: move a damaged last.pt out of the way.
    mmap: leave the tensors on the disk until they are read.
    """
    last = Path(out) / "last.pt"
    previous = Path(out) / "previous.pt"
    problems = []
    for path in (last, previous):
        try:
            state = read_archive(path, mmap)
            check_state(state)
        except FileNotFoundError:
            continue
        except Exception as error:  # cut, damaged, a pickle of more than tensors, foreign
            if is_temporary(error):
                raise SystemExit(unreadable_now(path, error)) from error
            problems.append(f"{path}: not a readable checkpoint of this program "
                            f"({first_line(error)}), {path.stat().st_size} bytes")
            continue
        if path == previous:
            problem = problems[0] if problems else f"{last}: missing"
            if problems and repair:
                os.replace(last, last.with_name("unreadable.pt"))
                problem += "; it was renamed to unreadable.pt"
            if verbose:
                print(f"{problem}. Going on from {previous.name}, step {state['step']}.",
                      flush=True)
        return state
    if problems:
        raise SystemExit("\n".join(problems) + "\nPut a copy back if there is one; to start over, "
                         "give another --out.")


def read_archive(path, mmap=False):
    """What torch.save wrote, tensors only; ValueError if a byte is not as it was written."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    check_archive(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


@functools.cache
def check_archive(path, stamp):
    """ValueError if a part of a file of torch.save differs from its CRC, which torch ignores.

    stamp: what changes with the file, since each is read once a process (0.7 s for 1 GB).
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":  # old files of torch are no archives
            damaged = zipfile.ZipFile(file).testzip()
            if damaged:
                raise ValueError(f"its part {damaged} is damaged")


def check_state(state):
    """ValueError unless a checkpoint holds what `save` writes."""
    if not isinstance(state, dict) or state.keys() != {"step", "config", "model", "optimizers"}:
        raise ValueError(f"it holds {', '.join(map(str, state))[:100]}")
    step = state["step"]
    if type(step) is not int or step < 1:
        raise ValueError(f"its step is {step!r}")
    if not isinstance(json.loads(state["config"]), dict):
        raise ValueError("its configuration is none")
    model = state["model"]
    if not isinstance(model, dict) or "no tensor" in shapes(model).values():
        raise ValueError("its model is not a dict of tensors")
    states = state["optimizers"]
    if not isinstance(states, list) or not all(isinstance(opt, dict) for opt in states):
        raise ValueError("its optimizers are not a list of dicts")
    broken = not_finite(model)
    if broken:
        raise ValueError(f"{len(broken)} of its {len(model)} tensors are not finite, "
                         f"first {broken[0]}")


def not_finite(state):
    """Names of the tensors that hold a NaN or an infinity. {name: tensor} -> [name].

    The GPU is waited for once: a tensor is looked at only if some sum is not finite.
    """
    floats = {name: x for name, x in state.items() if x.is_floating_point()}
    sums = [x.detach().sum(dtype=torch.float32) for x in floats.values()]
    if not sums or torch.stack(sums).isfinite().all():
        return []
    return [name for name, x in floats.items() if not x.isfinite().all()]


def resume(out, model, *opts, verbose=False):
    """Load the newest whole checkpoint if the run folder has one -> the next step, else 0.

    The optimisers are loaded too where they are given. verbose: say when it is not last.pt.
    """
    state = checkpoint(out, verbose)
    step = state["step"] if state else 0
    extremes = torch.tensor([-step, step], device=next(model.parameters()).device)
    low, high = all_reduce(extremes, torch.distributed.ReduceOp.MAX).tolist()
    require(-low == high,
            f"{out}: of {processes()} processes some found the checkpoint of step {-low}, some "
            f"that of {high}; they must all see one folder: give an --out that they share, or try "
            "again if it could not be read for a moment")
    if not state:
        return 0
    where = f"{out}: checkpoint of step {step}"
    refuse_misfit(where, model.state_dict(), state["model"], "this model",
                  "; are --data and config.json those of the run?")
    model.load_state_dict(state["model"])
    if opts:
        load_optimizers(where, opts, state["optimizers"])
    return step


def load_optimizers(where, opts, states):
    """Load the states of optimisers; end if they do not fit. where: begins the message."""
    count = len(states)
    empty = not any(state.get("state") for state in states)
    require(count == len(opts) and not empty,
            f"{where}: {'empty states' if empty else 'states'} of {count} optimisers, expected "
            f"those of {len(opts)}; give another --out")
    try:
        for opt, state in zip(opts, states):
            opt.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{where}: the optimisers' states do not fit ({first_line(error)}); "
                         "give another --out") from error


def save(cfg, step, model, opts, units, grid):
    """Write a checkpoint and the weights for fine-tuning. Rank 0 only.

    last.pt is for resuming; the one before becomes previous.pt. backbones.safetensors has the
    weights of `units`, name prefixes, with config, grid, commit and a digest in its header.
    Weights that are not finite end the run instead: the last checkpoint stands.
    """
    from safetensors.torch import save_file
    out = Path(cfg.out)
    state = model.state_dict()
    broken = not_finite(state)
    require(not broken,
            f"{out}: after step {step}, {len(broken)} of the {len(state)} tensors of the model are "
            f"not finite, first {', '.join(broken[:1])}; this is not saved, the last checkpoint "
            "stands. The last update broke them: are the rates and --clip sensible?")
    keep_lock(out)
    prefixes = tuple(unit + "." for unit in units)
    weights = {}
    for name, tensor in state.items():
        if name.startswith(prefixes):
            weights[name] = tensor.contiguous().cpu()
    header = {"config": json.dumps(dataclasses.asdict(cfg)),
              "grid": json.dumps(dataclasses.asdict(grid)),
              "commit": started_commit(out), "step": str(step), "units": ",".join(units)}
    header["digest"] = weights_digest(header, weights)
    config = json.dumps(run_record(cfg, processes()))
    optimizers = [opt.state_dict() for opt in opts]
    # the checkpoint last, so that a resumed run repeats what it may lack; but its part first, so
    # that weights without any trace of a checkpoint are known to have lost it
    with atomic_write(out / "last.pt", keep=out / "previous.pt") as part:
        torch.save(dict(step=step, config=config, model=state, optimizers=optimizers), part)
        with atomic_write(out / "backbones.safetensors") as weights_part:
            save_file(weights, weights_part, header)


def started_commit(out):
    """The commit that a run was started or resumed with: files may have changed since."""
    starts = None
    with suppress(SystemExit):  # that it cannot be read now is no reason not to save
        starts = read_json(out / "provenance.json", list)
    if starts and isinstance(starts[-1], dict):
        return str(starts[-1].get("commit", "unknown"))
    return "unknown"


def weights_digest(header, tensors):
    """SHA-256 of a header and of each tensor's name, type, shape and bytes, as hex digits."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_safetensors(path):
    """A safetensors file -> header, {name: tensor}.

    A digest in the header is checked; files of before, and of others, have none.
    """
    from safetensors import safe_open
    try:
        open(path, "rb").close()  # its errors are clearer
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            header = file.metadata() or {}
    except Exception as error:
        if is_temporary(error):
            raise SystemExit(unreadable_now(path, error)) from error
        raise SystemExit(f"{path}: not a whole safetensors file ({error}), {file_size(path)}; "
                         "copy it again or repeat the pre-training") from error
    digest = header.pop("digest", None)
    require(digest is None or digest == weights_digest(header, tensors),
            f"{path}: its bytes are not those that were written: the digest in its header is "
            "another; copy it again or repeat the pre-training")
    return header, tensors


def file_size(path):
    """The size of a file, as text."""
    return f"{os.path.getsize(path)} bytes" if os.path.exists(path) else "no such file"


def read_units(run):
    """backbones.safetensors of a run folder -> path, header, {name: tensor}."""
    path = Path(run) / "backbones.safetensors"
    require(os.path.isfile(path), f"{path}: no such file; --init names the folder that a "
                                  "pre-training run wrote")
    header, tensors = read_safetensors(path)
    try:
        parts = [json.loads(header[name]) for name in ("config", "grid", "step")]
        if list(map(type, parts)) != [dict, dict, int] or not header["units"]:
            raise ValueError("config, grid, step and units are of other kinds")
        parts[0]["preset"], header["commit"]  # a KeyError is caught
        grid_text(parts[1]), stored_depth(header)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise SystemExit(f"{path}: its header is not one that these scripts write "
                         f"({first_line(error)}); --init names the folder that a pre-training run "
                         "wrote") from error
    return path, header, tensors


def load_units(run, model, asked, possible, grid, rank):
    """Copy units of a run's backbones.safetensors into the model, strictly.

    asked: the units' names, or () for all of `possible` that the run holds
    -> the names of the tensors, a set.
    With camera.neck the model's depth bins end where the run's did (max_depth).
    """
    path, header, stored = read_units(run)
    stored_units = header["units"].split(",")
    config = json.loads(header["config"])
    units = asked or [unit for unit in possible if unit in stored_units]
    require(units and set(units) <= set(stored_units),
            f"{path} holds {', '.join(stored_units)}; asked for {', '.join(asked or possible)}")
    state = model.state_dict()
    loaded = {}
    counts = []
    for unit in units:
        in_model = with_prefix(state, unit + ".")
        in_file = with_prefix(stored, unit + ".")
        sizes = ("resnet",) if unit == "camera.resnet" else ("resnet", "width", "bins")
        flags = " ".join(f"--{flag} {config[flag]}" for flag in sizes if flag in config)
        refuse_misfit(path, in_model, in_file, unit,
                      f". The run has {flags}: give the same.")
        loaded.update(in_file)
        counts.append(f"{unit} {len(in_model)}/{len(in_model)}")
    model.load_state_dict({**state, **loaded})
    changes = grid_changes(json.loads(header["grid"]), dataclasses.asdict(grid))
    if "camera.neck" in units:  # what a bin has learned belongs to its metres
        model.camera.max_depth = stored_depth(header)
        own = lift_depth(grid.low, grid.high)
        if model.camera.max_depth != own:
            changes.append(f"depth bins to {model.camera.max_depth:.4g} m, which stay "
                           f"(by the range here {own:.4g} m)")
    if rank == 0:
        print(f"{path}: loaded {', '.join(counts)} tensors of step {header['step']}"
              f"{remarks(run, header, config)}", flush=True)
        if changes:
            print(f"{path}: trained with {'; '.join(changes)}", flush=True)
    return set(loaded)


def stored_depth(header):
    """Where the depth bins of a run's camera.neck end, m. header: of its weights."""
    grid = json.loads(header["grid"])
    config = json.loads(header["config"])
    return float(config.get("max_depth") or lift_depth(grid["low"], grid["high"]))


def grid_text(grid):
    """What matters of a grid to weights trained on it. dict -> {what: text}."""
    numbers = {name: " ".join(f"{v:g}" for v in grid[name]) for name in ("low", "high", "voxel")}
    return {
        "data set": grid["dataset"],
        "voxels": f"{numbers['voxel']} m",
        "sweeps": f"{grid['sweeps']}",
        "range": f"{numbers['low']} to {numbers['high']} m",
    }


def grid_changes(before, now):
    """How the grid that weights were trained on differs from this one. Two dicts -> [text]."""
    here = grid_text(now)
    changes = []
    for what, text in grid_text(before).items():
        if text != here[what]:
            changes.append(f"{what} {text} (here {here[what]})")
    return changes


def remarks(run, header, config):
    """What a user of a run's weights should know: unfinished, or fine-tuned already."""
    text = ""
    steps = config.get("steps")
    scored = os.path.exists(os.path.join(run, "metrics.json"))
    begun = os.path.exists(os.path.join(run, "log.jsonl"))
    if isinstance(steps, int) and int(header["step"]) < steps:
        text += f" of {steps}: that run is not finished"
    elif begun and not scored:
        text += ": that run is not finished, or was never scored"
    if "heads" in header["units"].split(","):
        text += "; it is a fine-tuned detector, which has seen labels"
    return text


def with_prefix(state, prefix):
    """The tensors whose names begin with a prefix. {name: tensor} -> {name: tensor}."""
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def refuse_misfit(path, in_model, in_file, what, advice):
    """End unless a file has the model's tensors: the same names, the same shapes.

    in_model, in_file {name: tensor}; what: the part that is loaded, for the message.
    """
    expected, present = shapes(in_model), shapes(in_file)
    names = sorted(expected.keys() | present.keys())
    misfits = [name for name in names if expected.get(name) != present.get(name)]
    if misfits:
        name = misfits[0]
        raise SystemExit(f"{path}: {len(misfits)} of the {len(expected)} tensors of {what} do not "
                         f"fit, first {name}: {present.get(name, 'absent')} in the file, "
                         f"{expected.get(name, 'absent')} in the model{advice}")


def shapes(state):
    """{name: tensor} -> {name: shape}; what is no tensor has the shape "no tensor".

    A type other than float32 and int64 is part of it.
    """
    out = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            out[name] = "no tensor"
        elif value.dtype in (torch.float32, torch.int64):
            out[name] = tuple(value.shape)
        else:
            out[name] = f"{tuple(value.shape)} {value.dtype}"
    return out


def load_resnet(source, resnet, rank, prefix=""):
    """Copy weights with torchvision's names into a ResNet without fc, strictly.

    source: a .pth or .safetensors file, or a run folder, whose camera.resnet is taken.
    prefix: what stands before those names in the file.
    A checkpoint's "state_dict" is taken where it has one.
    """
    path = Path(source)
    if os.path.isdir(path):
        path = path / "backbones.safetensors"
        prefix = "camera.resnet."
    if path.suffix == ".safetensors":
        _, state = read_safetensors(path)
    else:
        try:
            state = read_archive(path)
        except Exception as error:
            if is_temporary(error):
                raise SystemExit(unreadable_now(path, error)) from error
            raise SystemExit(f"{path}: no readable weights ({first_line(error)}); give a .pth or "
                             ".safetensors file of tensors, or a run folder") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    stored = {}
    for name, tensor in with_prefix(state, prefix).items():
        name = name.removeprefix(prefix)
        if not name.startswith("fc."):
            half = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            stored[name] = tensor.float() if half else tensor
    refuse_misfit(path, resnet.state_dict(), stored, "this ResNet",
                  "; expected torchvision's names and the depth of --resnet")
    resnet.load_state_dict(stored)
    if rank == 0:
        count = len(stored)
        print(f"{path}: loaded {count}/{count} tensors of the image network", flush=True)


def stored_config(config, folder):
    """The Config that a run folder was made with. config: its class."""
    fields = {}
    for name, value in run_config(folder).items():
        default = getattr(config(), name, None)
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        fits = default is None or type(value) is type(default) or (
            type(value) is int and type(default) is float)
        require(fits, f"{folder}/config.json: {name} is {value!r}, expected something like "
                      f"{default!r}; put the file back as the run wrote it")
        if name in config.__dataclass_fields__:
            fields[name] = value
    return config(**fields)


def check_run(run, trained, dataset, model, sizes):
    """End with a message if a run's folder, its checkpoint and this data set do not fit.

    trained: the configuration in its config.json; model: made from it; sizes: the fields that
    the model is made from.
    """
    listing = Path(run, "labels.txt")
    names = listing.read_text(errors="replace") if listing.is_file() else ""
    kind = names.partition("/")[0] or dataset.grid.dataset
    require(kind == dataset.grid.dataset,
            f"--eval-only {run}: a run on {kind}, and {dataset.what} is {dataset.grid.dataset}; "
            f"give the root of {kind} as --data")
    state = checkpoint(run, verbose=True, mmap=True)
    require(state, f"--eval-only {run}: no checkpoint there; finish a run first")
    stored = json.loads(state["config"])
    for field in sizes:
        now = getattr(trained, field)
        before = stored.get(field, now)
        require(before == now,
                f"{run}/config.json: {field} is {now!r}, in the checkpoint it is {before!r}; "
                "put the file back as the run wrote it")
    refuse_misfit(f"{run}: checkpoint of step {state['step']}", model.state_dict(),
                  state["model"], "this model",
                  "; put config.json back as the run wrote it, and give its data set")


def describe_scored(run, step, dataset):
    """Print whose weights --eval-only scores, and on which other data than the run's if so."""
    print(f"{run}: the weights after step {step}", flush=True)
    changes = data_changes(run, describe_data(dataset))
    if changes:
        print(f"{run}: scored on other data than the run's: {'; '.join(changes)}", flush=True)


def labelled_frames(cfg, dataset, indices):
    """The frames to learn from: those that --labels lists, else a draw -> indices (n,), sorted."""
    if cfg.labels:
        return listed_labels(dataset, indices, cfg.labels)
    return draw_labels(dataset, indices, cfg.fraction, cfg.draw, cfg.seed)


def labels_text(cfg):
    """Which labels were learned from, for the last line of a run."""
    if cfg.labels:
        return f"labels of {cfg.labels}"
    if cfg.draw == "every":
        return f"every {round(1 / cfg.fraction)}-th"
    return f"{cfg.fraction:g} of the {cfg.draw}"


def draw_labels(dataset, indices, fraction, draw, seed):
    """A seeded share of these frames, at least one frame or scene -> indices (n,), sorted.

    draw: frames, scenes or every; every takes the share that the field does (every_kth of the
    reader), whatever the seed. The draw of a smaller fraction is part of that of a larger one,
    but for every.
    """
    require(0 < fraction <= 1,
            f"--fraction {fraction}: expected more than 0 and at most 1")
    if draw == "every":
        return dataset.every_kth(indices, round(1 / fraction))
    rng = np.random.default_rng((seed, 7))
    names = dataset.names
    scenes = [names[i].rsplit("/", 1)[0] for i in indices]
    units = np.unique(scenes) if draw == "scenes" else np.arange(len(indices))
    count = max(1, round(fraction * len(units)))
    drawn = rng.permutation(units)[:count]
    if draw == "scenes":
        return np.sort(indices[np.isin(scenes, drawn)])
    return np.sort(indices[drawn])


def listed_labels(dataset, indices, path):
    """The frames that a file names, one a line, as labels.txt of a run does -> indices (n,)."""
    try:
        names = Path(path).read_text(errors="replace").split()
    except OSError as error:
        raise SystemExit(f"--labels {path}: cannot be read ({error.strerror}); give a file with "
                         "the name of a frame on each line, such as labels.txt of a run") from error
    all_names = dataset.names
    place = {all_names[i]: i for i in indices}
    others = [name for name in names if name not in place]
    require(names and not others,
            f"--labels {path}: {len(others)} of its {len(names)} lines name no frame of the train "
            f"split of {dataset.what}, first {others[:1]}; expected names such as "
            f"{all_names[indices[0]]}")
    return np.unique([place[name] for name in names])


def describe_draw(cfg, what, counts):
    """Print which labels are learned from, and how many of the frames the pre-training has seen.

    what: is counted, counts {class: n}. The hash is the beginning of the SHA-256 of labels.txt,
    which lists the frames' names.
    """
    folder = Path(cfg.out)
    path = folder / "labels.txt"
    names = path.read_text().splitlines()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    seen = Path(cfg.init) / "frames.txt"
    overlap = ""
    if seen.is_file():
        count = len(set(names) & set(seen.read_text(errors="replace").splitlines()))
        overlap = (f"; {count} of them were in the pre-training of {cfg.init}, "
                   "without their labels")
    drawn = f"{cfg.draw} drawn with seed {cfg.seed}"
    if cfg.draw == "every":
        drawn = "every k-th"
    if cfg.labels:
        drawn = f"listed in {cfg.labels}"
    print(f"{folder}: labels of {len(names)} frames, {drawn}, hash {digest} "
          f"(labels.txt){overlap}", flush=True)
    print(f"{what}: " + ", ".join(f"{name} {n}" for name, n in counts.items()), flush=True)


# ---- §11 log and figures -------------------------------------------------------------
# What a run writes while it trains and when it is done.

class StopWaiting(KeyboardInterrupt):
    """A stop is asked for while a run waits for data."""


class Run:
    """A training run: it hands out the batches, logs every step, and notices signals.

    batches: (step, its batches) on the device, from the first step or the one to resume at.
    log: log.jsonl (nothing in it depends on the clock), TensorBoard, and a progress line every
    few seconds. On ranks other than 0 it only checks that every term is finite.
    interrupted, leave: the first SIGTERM, SIGHUP or Ctrl-C asks for a stop after the step, or
    while the next batch is waited for. Another one more than two seconds later stops at once.
    An earlier one is ignored, since a launcher may pass on what the terminal has sent too.
    The next batches are fetched in log or in interrupted: a run without data stops where it can
    be saved.
    """

    def __init__(self, cfg, rank, world, first, steps, device, about):
        require(first <= steps, f"{cfg.out}: its checkpoint is of step {first}, and a run with "
                                f"this configuration has {steps} steps; give another --out")
        self.rank = rank
        self.first = first
        self.steps = steps
        self.parts = cfg.accumulate      # batches of one step
        self.frames = cfg.batch * cfg.accumulate * world  # of one step
        self.device = device
        self.path = Path(cfg.out) / "log.jsonl"
        self.began = time.monotonic()
        self.printed = self.began        # when the last progress line was
        self.waited = 0.0                # for data, s
        self.waiting = False             # for data, now
        self.asked = 0.0                 # when a signal asked for a stop; 0: not yet
        self.source = None               # of the batches
        self.next = None                 # batches of the next step, on the CPU
        self.left = 0                    # steps whose batches are still to be fetched
        self.failure = None              # why there is no next batch here
        self.stopping = False            # whether a process was asked to stop
        self.starved = False             # whether a process has no next batch
        self.handlers = catch_signals(self.on_signal, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if rank == 0:
            self.open_log()
            parts = f"{cfg.batch} x {world}" + f" x {self.parts}" * (self.parts > 1)
            print(f"{cfg.out}: steps {first} to {steps} of {self.frames} frames "
                  f"({parts}), {about}, {device}", flush=True)

    def open_log(self):
        """Open log.jsonl and TensorBoard, without the steps that come again."""
        from torch.utils.tensorboard import SummaryWriter
        before = [line for line, row in read_log(self.path) if row["step"] < self.first]
        write_text(self.path, "".join(line + "\n" for line in before))
        self.file = open(self.path, "a")
        folder = self.path.with_name("tensorboard")
        self.board = SummaryWriter(folder, purge_step=self.first)

    def on_signal(self, number, _):
        """Remember that a stop was asked for; stop at once if it is asked for again."""
        if self.asked and time.monotonic() - self.asked > 2:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()
        if self.waiting:
            raise StopWaiting

    def interrupted(self):
        """Whether to stop here: a process was asked to, or has no batch for the next step.

        Several processes have agreed in log, so that all leave after the same step; what was
        asked since then counts at the next one.
        """
        if processes() == 1:
            self.fetch()
            self.stopping = self.asked > 0
            self.starved = self.failure is not None
        return self.stopping or self.starved

    def fetch(self):
        """Wait for the batches of the next step, unless they are here or a stop was asked for."""
        if self.next is not None or not self.left or self.asked:
            return
        began = time.monotonic()
        try:
            self.waiting = True
            self.next = [next(self.source) for _ in range(self.parts)]
            self.waiting = False
            self.left -= 1
        except StopWaiting:
            for worker in multiprocessing.active_children():
                worker.kill()  # one that hangs would be waited for at the end of the program
        except Exception as error:  # of a loader worker, or of a frame
            self.failure = error
        self.waiting = False
        self.waited += time.monotonic() - began

    def batches(self, loader, first):
        """(step, its batches on the device) from step `first` on; the wait for data is timed."""
        self.source = loader.begin_at(first)
        self.left = self.steps - first
        self.fetch()
        wishes = torch.tensor([self.asked > 0, self.failure is not None], device=self.device)
        self.stopping, self.starved = all_reduce(wishes.long()).bool().tolist()
        if self.stopping or self.starved:
            self.leave(first - 1)
        for step in range(first, self.steps):
            self.fetch()  # log or interrupted has done so, if it was called
            if self.next is None:
                raise self.failure or KeyboardInterrupt
            batches, self.next = self.next, None
            yield step, [batch.to(self.device) for batch in batches]

    def log(self, step, batches, terms, **more):
        """Average the terms over batches and processes and write them, with `more`.

        terms: a dict for each batch. Called before the update: if a term is not finite,
        FloatingPointError names it and the frames, and no process makes the update. One
        collective, and one wait for the GPU.
        """
        if processes() > 1:
            self.fetch()  # so that all learn here whether one has no data
        more |= dict(stopping=self.asked > 0, starved=self.failure is not None)
        rows = [to_tensor({**row, **more}, self.device) for row in terms]
        local = torch.stack(rows).mean(0)                               # (T,)
        both = torch.stack([local, all_reduce(local) / processes()])    # (2, T)
        own, means = [dict(zip([*terms[0], *more], row)) for row in both.tolist()]
        self.stopping = means.pop("stopping") > 0
        self.starved = means.pop("starved") > 0
        self.refuse_nan(step, [name for batch in batches for name in batch.names], own, means)
        if self.rank == 0:
            self.write(step, means)
            self.print_progress(step, means)

    def log_val(self, step, values):
        """Write what evaluate gave, the same on every process."""
        self.refuse_nan(step, ["val frames"], values, values)
        if self.rank == 0:
            self.write(step, {"val_" + name: value for name, value in values.items()})

    def refuse_nan(self, step, names, own, means):
        """End if a term is NaN or infinite: where it is so here, with FloatingPointError.

        own, means {name: float}: the terms here, and over all processes.
        """
        bad = [name for name, value in own.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"step {step}, rank {self.rank}: {', '.join(bad)} not finite on "
                f"{', '.join(names)}; nothing was updated, the last checkpoint stands")
        if not all(map(math.isfinite, means.values())):
            sys.exit(1)  # another process says which term, and on which frames

    def write(self, step, values):
        """One line of log.jsonl, and TensorBoard. values {name: float}."""
        values = {name: round(value, 7) for name, value in values.items()}
        try:
            os.stat(self.path)  # a removed file could be written all the same
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            advice = "Make room there"
            if error.errno == errno.ENOENT:
                advice = "It was removed while the run was writing it"
            raise SystemExit(f"{error.filename or self.path}: step {step} could not be written "
                             f"({error.strerror}). {advice}; the same command goes on from the "
                             "last checkpoint.") from error

    def print_progress(self, step, values):
        """Losses, speed and time left: at the first step, the last one, and every 10 s."""
        now = time.monotonic()
        done = step + 1 - self.first
        if done > 1 and step + 1 < self.steps and now - self.printed <= 10:
            return
        self.printed = now
        spent = now - self.began
        left = spent / done * (self.steps - step - 1)
        memory = peak_memory()
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        losses = []
        for name, value in values.items():
            if name == "loss" or name.startswith("L_"):
                losses.append(f"{name} {value:.4g}")
        print(f"step {step + 1}/{self.steps}  {'  '.join(losses)}  | "
              f"{done * self.frames / spent:.1f} frames/s, "
              f"waiting for data {self.waited / spent:.0%}, {memory:.1f} GiB, "
              f"{left / 60:.0f} min left", flush=True)

    def leave(self, step):
        """End after `step`, which has been saved: with what went wrong, else with status 143."""
        saved = step >= 0
        if saved and self.rank == 0:
            why = "no data for the next step" if self.starved else "asked to stop"
            print(f"{self.path.parent}: {why}, saved after step {step + 1}; the same "
                  "command goes on from there", flush=True)
            if "LIDAR_CAMERA_SAVED" in os.environ:
                Path(os.environ["LIDAR_CAMERA_SAVED"]).touch()  # for the launcher
        destroy_group()  # rank 0 has saved now
        if self.failure:
            raise self.failure
        require(saved, f"{self.path.parent}: asked to stop before step 1, so there is nothing to "
                       "save; the same command starts again")
        sys.exit(128 + signal.SIGTERM)

    def close(self):
        """The end of training: signals mean again what they meant before."""
        restore_signals(self.handlers)
        if self.rank == 0:
            self.file.close()
            self.board.close()


def read_log(path):
    """The lines of log.jsonl that can be parsed -> [(line, its dict)].

    A damaged line is left out, which is said. Only the last may be cut without a word: the run
    was killed while it wrote.
    """
    if not path.exists():
        return []
    rows = []
    damaged = []
    lines = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] + 0  # a TypeError if it is no number
            rows.append((line, row))
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):  # a whole file ends in an empty one
                damaged.append(number)
    if damaged:
        print(f"{path}: {len(damaged)} of {len(lines)} lines cannot be parsed and are left out, "
              f"first line {damaged[0]}", flush=True)
    return rows


def peak_memory():
    """Largest resident size of this process so far, GiB."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def evaluate(model, batches, device, *more):
    """Mean of every term of model(batch, *more) over val batches, in eval mode.

    Seeds belong to frames, so every call has the same masks. -> {name: float}
    """
    model.eval()
    rows = []
    for batch in batches:
        _, terms = model(batch.to(device), *more)
        rows.append(to_tensor(terms, device))
    model.train()
    return dict(zip(terms, torch.stack(rows).mean(0).tolist()))


def to_tensor(terms, device):
    """Terms {name: () tensor on the device, or a number} -> (T,) float64, without a wait."""
    numbers = torch.zeros(len(terms), dtype=torch.float64)
    for place, term in enumerate(terms.values()):
        if not isinstance(term, torch.Tensor):
            numbers[place] = term
    numbers = send(numbers, device)
    out = [term.detach().double() if isinstance(term, torch.Tensor) else numbers[place]
           for place, term in enumerate(terms.values())]
    return torch.stack(out)


def load_tool(name, flag=None):
    """tests/<name>.py as a module: what a run offers that a method's reader may skip.

    Where that file is absent, as next to a forked method, it is None, and a line says so.
    flag: what asked for it; then the run ends.
    """
    path = Path(__file__).with_name("tests") / f"{name}.py"
    if not path.is_file():
        require(not flag, f"{flag}: {path} is absent, which does it; copy tests/ next to "
                          f"{Path(__file__).name}")
        print(f"{path} is absent: what it would do is left out", flush=True)
        return None
    spec = importlib.util.spec_from_file_location(f"tests_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(path, panels, columns, size=(4.0, 3.0)):
    """Save a grid of panels. Each is (title, picture) or (title, picture, options).

    picture: an array (H, W) or (H, W, 3) for imshow(**options), or a function of the axes.
    size: width and height of a panel, inches.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = -(-len(panels) // columns)
    width, height = size[0] * columns, size[1] * rows
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # margins in inches: measured layouts cost seconds
    fig.subplots_adjust(left=0.5 / width, bottom=0.3 / height,
                        right=1 - 0.1 / width, top=1 - 0.3 / height,
                        wspace=0.7 / size[0], hspace=0.7 / size[1])
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels):
        draw_panel(ax, *panel)
    path = Path(path)
    with atomic_write(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(part, dpi=110, format=path.suffix[1:])
    plt.close(fig)


def draw_panel(ax, title, picture, options=None):
    """One panel of a figure: its title, and an image without axes or what a function draws."""
    ax.set_title(title, fontsize=9)
    if callable(picture):
        picture(ax)
    else:
        ax.imshow(np.asarray(picture), **(options or {}))
        ax.axis("off")


def bird_eye(xyz, colour="0.7", size=1.0, **style):
    """A panel for figure: points from above, x (forward) up, y (left) to the left.

    xyz (N, 2 or more) m, colour one for all or (N,), style of scatter.
    """
    def plot(ax):
        ax.scatter(-xyz[:, 1], xyz[:, 0], size, colour, **style)
        ax.set_aspect("equal")
    return plot


def overlay(image, uv, colour, size=4.0, **style):
    """A panel for figure: points on an image.

    image (H, W) or (H, W, 3), uv (N, 2) px, colour one for all or (N,), style of scatter.
    """
    def plot(ax):
        ax.imshow(image)
        ax.scatter(uv[:, 0], uv[:, 1], size, colour, **style)
        ax.axis("off")
    return plot


def loss_curves(out, levels=None):
    """figures/losses.png from log.jsonl: a panel for every logged term.

    Training in grey with its running median, val frames as dots.
    levels {term: heights of dashed lines}.
    """
    rows = [row for _, row in read_log(Path(out) / "log.jsonl")]
    names = dict.fromkeys(name for row in rows for name in row)  # each once, in order
    panels = []
    for name in names:
        if name != "step" and not name.startswith("val_"):
            heights = (levels or {}).get(name, ())
            panels.append((name, partial(draw_term, rows, name, heights)))
    if panels:  # none where the log of a finished run has gone
        figure(Path(out) / "figures" / "losses.png", panels, 4, (3.2, 2.2))


def draw_term(rows, name, heights, ax):
    """One panel of loss_curves. rows: the lines of log.jsonl, heights: of dashed lines."""
    steps, values = logged(rows, name)
    ax.plot(steps, values, color="0.8", lw=0.6)
    reach = max(len(values) // 50, 1)
    centres = np.unique(np.linspace(0, len(values) - 1, 1000).round().astype(int))
    medians = [np.median(values[max(i - reach, 0):i + reach + 1]) for i in centres]
    ax.plot(steps[centres], medians, color="C0", lw=1.2)
    ax.plot(*logged(rows, "val_" + name), "C3.", ms=4)
    for height in heights:
        ax.axhline(height, color="0.4", ls="--", lw=0.8)


def logged(rows, name):
    """Steps at which a term was logged, and its values -> (2, n)."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return np.array(pairs).reshape(-1, 2).T
