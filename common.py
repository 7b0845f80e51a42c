"""What the methods and the detector share, and the textbook pieces. Pure functions first, run-keeping last.

To fork a method read: its file, the functions on its import line, data.Batch. Nothing else.

    section       pieces                                                              used by
    §0 processes  processes, all_reduce, mean_over_ranks, mean_rows, AllReduceSum,               clap, cmcr, simipu, finetune
                  share_buffers
    §1 geometry   Cells, multilinear, gather_weighted, project, valid_pixels, rays,     clap, cmcr, simipu
                  sample_image, box_exit, inside_boxes
    §2 matching   pair_points                                                         simipu
    §3 networks   trunk, VoxelResNet, ResNet, mlp, conv3d, BatchNorm, segment_sum,    clap, cmcr, simipu, finetune
                  ravel, bf16_autocast
    §4 rendering  neus_weights, stratified, importance                                clap
    §5 contrast   info_nce, perplexity                                                clap, cmcr, simipu
    §6 curvature  surface_variation                                                   clap
    §7 runs       parse, run_config, launch, init_process, start, destroy_group,      clap, cmcr, simipu, finetune
                  lock_run_folder, record_frames, rank0_first, wrap, frame_rngs, random_subset,
                  cosine, resume, save, read_units, load_units, load_resnet, Run,
                  evaluate, load_tool, require, atomic_write, write_text, figure,
                  bird_eye, overlay, loss_curves

Nothing here knows a data set.
Metres, radians, seconds. xyz is x forward, y left, z up; volumes and cell coordinates are (Z, Y, X). b_x is the frame of each row of x.
"""
import dataclasses
import fcntl
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
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

try:                                   # the one optional import: compiled against one torch, so it may be absent or stale
    import torch_scatter
except (ImportError, OSError, RuntimeError):
    torch_scatter = None

TIMEOUT = int(os.environ.get("LIDAR_CAMERA_TIMEOUT", 300))           # s, how long a process waits for another that says nothing [ours]


# ---- §0 processes ----------------------------------------------------------------------------------------------------------------
# What is summed over the processes of a run. Each works without a process group too. A collective is called by every process or by none.

def all_reduce(x, op=torch.distributed.ReduceOp.SUM):
    """Sum (or op) of a tensor over all processes, no gradient; itself without a process group."""
    x = x.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, op)
    return x


def processes():
    """How many processes run together: 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def mean_over_ranks(total, count):
    """The mean over every process's rows: (sum of totals) / (sum of counts). total (): this process's sum, with gradient; count: its number of rows.

    DDP averages gradients over processes, so each process returns its total x world / all counts: the average of those is the mean, and so is their gradient.
    """
    return total * processes() / all_reduce(total.new_full((), float(count))).clamp_min(1)


def mean_rows(x):
    """Mean over the rows of every process, other axes summed. x (N, ...) -> ()."""
    return mean_over_ranks(x.sum(), len(x))


def share_buffers(model):
    """Broadcast rank 0's batch-norm statistics, the ones that are saved. To be called before held-out frames are scored; DDP does it before a training step."""
    if processes() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of the gradients that the processes have for it."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


# ---- §1 geometry -----------------------------------------------------------------------------------------------------------------
# Where cells are, multilinear interpolation, the pinhole camera, the volume's box. Source: textbook.

class Cells(NamedTuple):
    """Where the cells of one resolution are: the only definition, shared by sparse levels, camera lift and field query."""
    shape: tuple[int, int, int]             # Z, Y, X
    first: tuple[float, float, float]       # x, y, z of the centre of cell (0, 0, 0), m
    step: tuple[float, float, float]        # x, y, z between centres, m

    def centre(self, zyx):
        """zyx (..., 3) int or float -> xyz (..., 3) m."""
        return zyx.flip(-1) * zyx.new_tensor(self.step, dtype=torch.float32) + zyx.new_tensor(self.first, dtype=torch.float32)

    def index(self, xyz):
        """xyz (..., 3) m -> fractional zyx (..., 3); whole numbers at cell centres."""
        return ((xyz - xyz.new_tensor(self.first)) / xyz.new_tensor(self.step)).flip(-1)

    def centres(self, device):
        """-> (Z Y X, 3) m, the centre of every cell in memory order."""
        return self.centre(torch.cartesian_prod(*(torch.arange(n, device=device) for n in self.shape)))

    def halved(self, pad):
        """The cells after a 3 x 3 x 3 convolution of stride 2. pad (z, y, x): output o reads inputs 2 o - pad + {0, 1, 2}, so its centre is input 2 o + 1 - pad."""
        shape = tuple((n + 2 * p - 3) // 2 + 1 for n, p in zip(self.shape, pad))
        first = tuple(f + s * (1 - p) for f, s, p in zip(self.first, self.step, pad[::-1]))
        return Cells(shape, first, tuple(2 * s for s in self.step))


def multilinear(index, shape):
    """The 2^D cells around a fractional index and their multilinear weights; outside the outermost centres the border value holds.

    index (M, D) float, shape D sizes -> flat (M, 2^D) int64 into a table of prod(shape) rows, weight (M, 2^D) float, rows sum to 1.
    """
    flat = torch.zeros(len(index), 1, dtype=torch.int64, device=index.device)
    weight = torch.ones(len(index), 1, dtype=index.dtype, device=index.device)
    for axis, n in enumerate(shape):
        at = index[:, axis].clamp(0, n - 1)
        low = at.floor().clamp(max=max(n - 2, 0))
        part = (at - low)[:, None]                                                         # (M, 1)
        ends = torch.stack([low, (low + 1).clamp(max=n - 1)], 1).long()                    # (M, 2)
        flat = (flat[:, :, None] * n + ends[:, None, :]).flatten(1)
        weight = (weight[:, :, None] * torch.cat([1 - part, part], 1)[:, None, :]).flatten(1)
    return flat, weight


class GatherWeighted(torch.autograd.Function):
    """sum_j weight[m, j] table[index[m, j]]; the gradient goes to the table alone."""

    @staticmethod
    def forward(ctx, table, index, weight):
        ctx.save_for_backward(index, weight)
        ctx.rows = table.shape
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx, grad):
        index, weight = ctx.saved_tensors
        out = grad.new_zeros(ctx.rows)
        chunk = 2**18 if grad.is_cuda else 4096                     # on a CPU a temporary that outgrows the cache costs more than the loop
        for a in range(0, len(index), chunk):
            part = slice(a, a + chunk)
            out.index_add_(0, index[part].flatten(), (grad[part, None] * weight[part, :, None]).flatten(0, 1))
        return out, None, None


def gather_weighted(table, index, weight):
    """Interpolation: table (T, C) float, index (M, J) int64, weight (M, J) -> (M, C). Not differentiable in the weights."""
    return GatherWeighted.apply(table.contiguous(), index.contiguous(), weight.to(table.dtype).contiguous())


def project(xyz, b, lidar2img, hw, size, near=0.1):
    """Every pair of a point and an image that sees it (deeper than near, inside that image's own height and width).

    xyz (N, 3) m, b (N,) frame, lidar2img (B K, 4, 4), hw (B K, 2), size B
    -> point (M,) row of xyz, image (M,) row of lidar2img, uv (M, 2) px with pixel centres at +0.5, depth (M,) m; sorted by frame, image, point.
    """
    K, found = len(lidar2img) // size, []
    for frame in range(size):
        rows = (b == frame).nonzero()[:, 0]
        matrix = lidar2img[frame * K:(frame + 1) * K]
        uvd = xyz[rows] @ matrix[:, :3, :3].transpose(1, 2) + matrix[:, None, :3, 3]       # (K, n, 3): u d, v d, d
        depth = uvd[..., 2]
        uv = uvd[..., :2] / depth.clamp_min(near)[..., None]
        height, width = hw[frame * K:(frame + 1) * K, :, None].unbind(1)                   # (K, 1)
        u, v = uv.unbind(-1)                                                               # (K, n)
        k, n = ((depth > near) & (u >= 0) & (u < width) & (v >= 0) & (v < height)).nonzero(as_tuple=True)
        found.append((rows[n], k + frame * K, uv[k, n], depth[k, n]))
    return tuple(torch.cat(part) for part in zip(*found))


def valid_pixels(hw, padded_hw):
    """Which pixels of padded images are the pictures' own. hw (B K, 2) px, padded_hw (H, W) -> (B K, H, W) bool."""
    v, u = (torch.arange(n, device=hw.device) for n in padded_hw)
    return (v[:, None] < hw[:, 0, None, None]) & (u < hw[:, 1, None, None])


def rays(uv, image, lidar2img):
    """The ray of each pixel position. uv (R, 2) px, image (R,), lidar2img (B K, 4, 4) -> origin (R, 3) m, direction (R, 3) unit."""
    inverse = torch.linalg.inv(lidar2img.double()).float()[image]                          # (R, 4, 4)
    away = (inverse[:, :3, :3] @ F.pad(uv, (0, 1), value=1.0)[..., None])[..., 0]          # (R, 3) m per metre of depth
    return inverse[:, :3, 3], F.normalize(away, dim=1)


def grid_index(uv, feature_hw, padded_hw):
    """uv (M, 2) px of the padded image -> fractional (row, column) (M, 2) of its feature map; both have centres at +0.5 (area convention)."""
    scale = uv.new_tensor([feature_hw[1] / padded_hw[1], feature_hw[0] / padded_hw[0]])
    return (uv * scale - 0.5).flip(1)


def sample_image(features, image, uv, padded_hw):
    """Bilinear sampling. features (B K, C, h, w), image (M,), uv (M, 2) px, padded_hw (H, W) of the image tensor -> (M, C)."""
    C, h, w = features.shape[1:]
    flat, weight = multilinear(grid_index(uv, (h, w), padded_hw), (h, w))
    return gather_weighted(features.permute(0, 2, 3, 1).reshape(-1, C), flat + image[:, None] * (h * w), weight)


def box_exit(origin, direction, low, high):
    """Distance along each ray to where it leaves an axis-aligned box; <= 0 when the box is behind. origin, direction (R, 3), low, high 3 numbers -> (R,) m."""
    slope = torch.where(direction.abs() < 1e-6, torch.full_like(direction, 1e-6), direction)
    return torch.maximum((origin.new_tensor(low) - origin) / slope, (origin.new_tensor(high) - origin) / slope).amin(1)


def inside_boxes(xyz, b, boxes, b_boxes):
    """Which points lie strictly inside some box of their own frame. xyz (N, 3), boxes (M, 9) centre, l, w, h, yaw, ... -> (N,) bool."""
    inside = torch.zeros(len(xyz), dtype=torch.bool, device=xyz.device)
    for frame in b_boxes.unique().tolist():
        rows, box = (b == frame).nonzero()[:, 0], boxes[b_boxes == frame]
        offset = xyz[rows, None] - box[None, :, :3]                                        # (n, m, 3)
        cos, sin = box[:, 6].cos(), box[:, 6].sin()
        along, across = offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin
        local = torch.stack([along, across, offset[..., 2]], -1)                           # (n, m, 3)
        inside[rows] = (local.abs() < box[None, :, 3:6] / 2).all(-1).any(1)
    return inside


# ---- §2 matching -----------------------------------------------------------------------------------------------------------------
# One-to-one pairs of two point sets. Source: the Hungarian method, scipy's.

def pair_points(a, b, id_a, id_b):
    """The one-to-one pairs with the least sum of Euclidean distances. a, b (n, 3) arrays, id_a, id_b (n,) int: equal for the same point -> (n,) row of b for each of a.

    The same point in both is settled first. Such a pair is part of an optimum: exchanging partners, (p, b') and (a', p) for (p, p) and (a', b'),
    costs d(a', b') <= d(a', p) + d(p, b'). It would not be for squared distances.
    """
    def numbered(ids):                                              # the k-th row of a repeated id is a point of its own
        order = np.argsort(ids, kind="stable")
        sorted_ = ids[order]
        rank = np.arange(len(ids)) - np.searchsorted(sorted_, sorted_)
        out = np.empty(len(ids), np.int64)
        out[order] = sorted_ * (len(ids) + 1) + rank
        return out
    pairs, left_a, left_b = np.empty(len(a), np.int64), np.ones(len(a), bool), np.ones(len(b), bool)
    _, same_a, same_b = np.intersect1d(numbered(id_a), numbered(id_b), assume_unique=True, return_indices=True)
    pairs[same_a], left_a[same_a], left_b[same_b] = same_b, False, False
    left_a, left_b = left_a.nonzero()[0], left_b.nonzero()[0]
    rows, columns = linear_sum_assignment(cdist(a[left_a], b[left_b]))
    pairs[left_a[rows]] = left_b[columns]
    return pairs


# ---- §3 networks -----------------------------------------------------------------------------------------------------------------
# The fusion trunk: sparse voxel encoder, image network with lift, fusion. Source: shapes of OpenPCDet's VoxelResBackBone8x and of BEVFusion; [ours] the lift.

def segment_sum(values, index, n):
    """Sum of the rows of each segment. values (N, C), index (N,) int64 in [0, n) -> (n, C). torch-scatter where installed (its sum is pure torch, any device)."""
    if torch_scatter is not None:
        return torch_scatter.scatter_sum(values, index, 0, dim_size=n)
    return torch.zeros(n, values.shape[1], dtype=values.dtype, device=values.device).index_add_(0, index, values)


class KernelMap(NamedTuple):
    """Pairs of rows that a 3 x 3 x 3 sparse convolution joins, grouped by the 27 kernel offsets (z slowest). Offset t of output o reads input stride o - pad + t."""
    ins: torch.Tensor           # (P,) int64 row of the input
    outs: torch.Tensor          # (P,) int64 row of the output
    ends: torch.Tensor          # (27,) int32 where each offset's pairs end
    order: torch.Tensor         # (P,) the pairs sorted by output
    first: torch.Tensor         # (n_out + 1,) where each output's pairs begin in that order
    n_in: int
    same: bool                  # submanifold: the outputs are the inputs, so the pairs of offset 26 - t are those of t exchanged

    @classmethod
    def of(cls, ins, outs, ends, n_in, n_out, same):
        return cls(ins, outs, ends, *by_output(outs, ends, n_out), n_in, same)             # once for every convolution of the level, forward and backward

    def reversed(self):
        return KernelMap.of(self.outs, self.ins, self.ends, len(self.first) - 1, self.n_in, False)


def by_output(outs, ends, n):
    """KernelMap's order and first. On a CPU scipy's transposition of a sparse (27, n) matrix, which counts instead of sorting: a quarter of the time."""
    if outs.is_cuda:
        return torch.argsort(outs.int(), stable=True), F.pad(torch.bincount(outs, minlength=n).cumsum(0), (1, 0))
    pairs, starts = np.arange(len(outs), dtype=np.int32), np.concatenate([[0], ends.numpy()]).astype(np.int32)
    columns = csr_array((pairs, outs.int().numpy(), starts), shape=(27, n)).tocsc()
    return torch.from_numpy(columns.data), torch.from_numpy(columns.indptr)


def narrowest(values, coords, shape):
    """values as int32 if every key of `coords` (V, 4) in volumes of this shape fits, else as they are: sorts and divisions cost half."""
    frames = int(coords[:, 0].max()) + 1 if len(coords) else 1
    return values.int() if frames * math.prod(shape) < 2**31 else values


def ravel(coords, shape):
    """coords (V, 4) b, z, y, x -> (V,) row-major key, int32 where it fits; sorted coordinates have sorted keys."""
    coords = narrowest(coords, coords, shape)
    return ((coords[:, 0] * shape[0] + coords[:, 1]) * shape[1] + coords[:, 2]) * shape[2] + coords[:, 3]


def unravel(keys, shape):
    """The inverse of ravel -> (V, 4) int64."""
    parts = []
    for n in reversed(shape):
        rest = torch.div(keys, n, rounding_mode="trunc")
        parts.append(keys - rest * n)
        keys = rest
    return torch.stack([keys, *reversed(parts)], 1).long()


def submanifold_map(coords, shape):
    """The kernel map whose outputs are its inputs. coords (V, 4) sorted, shape (Z, Y, X).

    Keys carry one empty cell on every side, so neighbours never alias. Only the later 13 offsets are searched, one search a row of three (the other
    two follow by stepping); the earlier 13 are the same pairs with input and output exchanged. [ours]
    """
    n, (_, Y, X) = len(coords), shape
    keys = ravel(coords + coords.new_tensor([0, 1, 1, 1]), [s + 2 for s in shape])         # with the border, a neighbour's key fits too
    row, plane = X + 2, (X + 2) * (Y + 2)
    table = torch.cat([keys, keys.new_full((1,), torch.iinfo(keys.dtype).max)])
    first = (table[1:] == keys + 1).nonzero()[:, 0]
    outs, ins = [first], [first + 1]
    for delta in (row - 1, plane - row - 1, plane - 1, plane + row - 1):
        wanted, at = keys + delta, torch.searchsorted(keys, keys + delta)
        for _ in range(3):
            hit = table.index_select(0, at) == wanted               # table[at] takes a third longer
            outs.append(hit.nonzero()[:, 0])
            ins.append(at.index_select(0, outs[-1]))
            wanted, at = wanted + 1, at + hit
    self_ = [torch.arange(n, device=coords.device)]
    counts = [len(o) for o in outs]
    ends = torch.tensor(counts[::-1] + [n] + counts, device=coords.device).cumsum(0, dtype=torch.int32)
    return KernelMap.of(torch.cat(outs[::-1] + self_ + ins), torch.cat(ins[::-1] + self_ + outs), ends, n, n, True)


def strided_map(coords, shape, pad):
    """Coordinates and kernel map of a stride-2 convolution. coords (V, 4), pad (z, y, x) -> out coords (V', 4) sorted, KernelMap.

    An input feeds one or two outputs an axis; expanding axis by axis and one unique replace every search. [ours]
    """
    out_shape = [(n + 2 * p - 3) // 2 + 1 for n, p in zip(shape, pad)]
    columns = narrowest(coords, coords, out_shape).t().contiguous()
    key, offset = columns[0], torch.zeros(len(coords), dtype=torch.uint8, device=coords.device)
    source = torch.arange(len(coords), device=coords.device)
    for axis, n in enumerate(out_shape):
        v = columns[1 + axis].index_select(0, source) + pad[axis]   # v = 2 o + t
        o, t = v >> 1, (v & 1).byte()
        key, offset = key * n + o, offset * 3 + t
        near = (o < n).nonzero()[:, 0]
        far = ((t == 0) & (o >= 1) & (o <= n)).nonzero()[:, 0]                             # an even v is also t = 2 of the output before
        key = torch.cat([key.index_select(0, near), key.index_select(0, far) - 1])
        offset = torch.cat([offset.index_select(0, near), offset.index_select(0, far) + 2])
        source = torch.cat([source.index_select(0, near), source.index_select(0, far)])
    unique, outs = torch.unique(key, return_inverse=True)
    order = torch.argsort(offset, stable=True)
    ends = torch.bincount(offset, minlength=27).cumsum(0, dtype=torch.int32)
    return unravel(unique, out_shape), KernelMap.of(source.index_select(0, order), outs.index_select(0, order), ends, len(coords), len(unique), False)


def gather(x, rows):
    """x (V, C), rows (P,) -> (P, C up to a multiple of 8): grouped_mm wants rows of a multiple of 16 bytes."""
    x = F.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x     # F.pad would copy also where there is nothing to do
    return x.index_select(0, rows)


def multiply(pairs, weight, kmap):
    """Grouped matrix product, sum over the pairs of each output: nothing is added atomically, so repeatable bit by bit. pairs (P, C), weight (27, C, C') -> (V', C')."""
    C, out = weight.shape[1:]
    products = F.grouped_mm(pairs, F.pad(weight, (0, -out % 8, 0, -C % 8)).contiguous(), offs=kmap.ends)                # (P, C')
    return F.embedding_bag(kmap.order, products, kmap.first, mode="sum", include_last_offset=True)[:, :out]


class SparseConvolution(torch.autograd.Function):
    """x (V, C), weight (27, C, C'), KernelMap -> (V', C'). Keeps x and weight only and gathers again in backward."""

    @staticmethod
    def forward(ctx, x, weight, kmap):
        ctx.save_for_backward(x, weight)
        ctx.kmap = kmap
        return multiply(gather(x, kmap.ins), weight, kmap)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), kmap = ctx.saved_tensors, ctx.kmap
        C, out = weight.shape[1:]
        ins, outs = (kmap.outs, kmap.ins) if kmap.same else (kmap.ins, kmap.outs)          # submanifold: offset 26 - t has the pairs of t exchanged,
        weight = weight.flip(0) if kmap.same else weight                                   # so one gather of grad serves both products below
        grads, grad_x = gather(grad, outs), None
        if ctx.needs_input_grad[0]:                                 # the transpose: pairs exchanged, matrices transposed
            grad_x = multiply(grads, weight.transpose(1, 2), kmap if kmap.same else kmap.reversed())
        grad_w = F.grouped_mm(gather(x, ins).t(), grads, offs=kmap.ends)[:, :C, :out]
        some = kmap.ends.diff(prepend=kmap.ends.new_zeros(1)) > 0
        grad_w = torch.where(some[:, None, None], grad_w, 0)        # some GPUs leave the product of no pair unset
        return grad_x, grad_w.flip(0) if kmap.same else grad_w, None


class SparseConv(nn.Module):
    """3 x 3 x 3 sparse convolution without bias (a batch norm follows). weight (27, C, C'), offsets z slowest."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(27, inputs, outputs))
        nn.init.uniform_(self.weight, -(27 * inputs) ** -0.5, (27 * inputs) ** -0.5)       # torch's default for a dense Conv3d

    def forward(self, x, kmap):
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return SparseConvolution.apply(x.to(kind), self.weight.to(kind), kmap)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of every process, on any device; fewer than two rows have no variance and take the running statistics.

    torch's SyncBatchNorm runs on CUDA only and wants rows on every process (and one dtype of them, which an empty bfloat16 part has not).
    """

    def forward(self, x):
        if not self.training or processes() == 1 and len(x) > 1:
            return super().forward(x)
        if processes() == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        rows, n = x.float(), all_reduce(x.new_full((), len(x), dtype=torch.float32))
        mean = AllReduceSum.apply(rows.sum(0)) / n.clamp_min(1)                            # (C,)
        var = AllReduceSum.apply((rows - mean).square().sum(0)) / n.clamp_min(1)           # (C,), of centred rows: nothing cancels
        with torch.no_grad():
            share = self.momentum * (n > 1)                                                # 0 leaves the running statistics as they are
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var * n / (n - 1).clamp_min(1), share)
            self.num_batches_tracked += (n > 1).long()
        mean, var = torch.where(n > 1, mean, self.running_mean), torch.where(n > 1, var, self.running_var)
        return ((rows - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


class SparseBlock(nn.Module):
    """Two submanifold convolutions and the identity. Names as in OpenPCDet's SparseBasicBlock."""

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
        self.conv, self.bn = SparseConv(inputs, outputs), BatchNorm(outputs, eps=1e-3)

    def forward(self, x, kmap):
        return F.relu(self.bn(self.conv(x, kmap)))


class Level(NamedTuple):
    """The occupied sites of one resolution."""
    coords: torch.Tensor        # (V, 4) int64 b, z, y, x, sorted
    features: torch.Tensor      # (V, C)
    cells: Cells

    def centre(self):
        """-> (V, 3) m."""
        return self.cells.centre(self.coords[:, 1:])

    def dense(self, size):
        """-> (B, C, Z, Y, X), zero where no site is."""
        flat = self.features.new_zeros(size * math.prod(self.cells.shape), self.features.shape[1])
        flat = flat.index_copy(0, ravel(self.coords, self.cells.shape).long(), self.features)
        return flat.view(size, *self.cells.shape, -1).permute(0, 4, 1, 2, 3)


class VoxelResNet(nn.Module):
    """Mean of the points in each voxel, then a residual sparse encoder of stride 8: width 1, 1, 2, 4, 8 times `width`.

    The shape of OpenPCDet's VoxelResBackBone8x (less the biases before batch norm, which do nothing): one spare layer of voxels above, no padding in z
    in the last reduction, so that 8 m of 0.2 m voxels become 5 cells.
    """

    def __init__(self, low, high, voxel, width=16):
        super().__init__()
        self.low, self.high, self.voxel = low, high, voxel
        Z, Y, X = (round((high[a] - low[a]) / voxel[a]) for a in (2, 1, 0))
        cells = Cells((Z + 1, Y, X), tuple(lo + v / 2 for lo, v in zip(low, voxel)), tuple(voxel))
        self.pads = (1, 1, 1), (1, 1, 1), (0, 1, 1)
        self.cells = [cells]
        for pad in self.pads:
            self.cells.append(self.cells[-1].halved(pad))
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.conv_input = Down(5, widths[0])
        self.conv1 = nn.ModuleList([SparseBlock(widths[1]), SparseBlock(widths[1])])
        self.conv2, self.conv3, self.conv4 = (nn.ModuleList([Down(a, b), SparseBlock(b), SparseBlock(b)]) for a, b in zip(widths[1:], widths[2:]))

    def inside(self, points):
        """Which points lie in the range. points (N, 3 or more) -> (N,) bool."""
        (x, y, z), low, high = points[:, :3].unbind(1), self.low, self.high
        return (x >= low[0]) & (x < high[0]) & (y >= low[1]) & (y < high[1]) & (z >= low[2]) & (z < high[2])

    def voxelise(self, points, b):
        """points (N, 5), b (N,) -> Level 0: the mean point of each occupied voxel. Points outside the range are dropped."""
        cells, rows = self.cells[0], self.inside(points).nonzero()[:, 0]
        points, b = points.index_select(0, rows), b.index_select(0, rows)
        keys, low, voxel = narrowest(b, b[:, None], cells.shape), points.new_tensor(self.low), points.new_tensor(self.voxel)
        for a, n in zip((2, 1, 0), cells.shape):                                           # as ravel does, a column at a time
            keys = keys * n + ((points[:, a] - low[a]) / voxel[a]).int().clamp(max=n - 1)  # rounding at the upper face
        keys, segment, count = torch.unique(keys, return_inverse=True, return_counts=True)
        mean = segment_sum(points, segment, len(keys)) / count[:, None]
        return Level(unravel(keys, cells.shape), mean, cells)

    def point_features(self, levels, points, b):
        """The features of each point's site in every level, side by side. levels as forward gave them for these points, all inside the range -> (N, 15 width)."""
        low, voxel, finest = points.new_tensor(self.low), points.new_tensor(self.voxel), self.cells[0]
        zyx = ((points[:, :3] - low) / voxel).int().flip(1).minimum(torch.tensor(finest.shape, device=points.device) - 1)           # (N, 3), as voxelise has it
        found = []
        for level in levels:
            at = level.cells.index(finest.centre(zyx)).round().long().clamp_min(0)         # the site nearest to the voxel: the strides reach it
            at = at.minimum(at.new_tensor(level.cells.shape) - 1)
            keys, wanted = (ravel(coords, level.cells.shape).long() for coords in (level.coords, torch.cat([b[:, None], at], 1)))
            found.append(level.features.index_select(0, torch.searchsorted(keys, wanted)))
        return torch.cat(found, 1)

    def forward(self, points, b):
        """points (N, 5) x, y, z, intensity, time; b (N,) frame -> four Levels of stride 1, 2, 4, 8; dense(size) of the last is the volume."""
        level = self.voxelise(points, b)
        kmap = submanifold_map(level.coords, level.cells.shape)
        x = self.conv_input(level.features, kmap)                   # in float32: bfloat16 would round coordinates to a quarter of a metre
        with bf16_autocast(points.device):
            for block in self.conv1:
                x = block(x, kmap)
            levels = [level._replace(features=x)]
            for pad, cells, (down, *blocks) in zip(self.pads, self.cells[1:], (self.conv2, self.conv3, self.conv4)):
                coords, kmap = strided_map(levels[-1].coords, levels[-1].cells.shape, pad)
                x = down(x, kmap)
                kmap = submanifold_map(coords, cells.shape)         # built once, used by the four convolutions of the level
                for block in blocks:
                    x = block(x, kmap)
                levels.append(Level(coords, x, cells))
        return [level._replace(features=level.features.float()) for level in levels]


def bf16_autocast(device):
    """bfloat16 for the encoders on CUDA, nothing on a CPU. What they return is float32 again."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def mlp(*widths):
    """Linear, batch norm, ReLU, ..., Linear."""
    layers = []
    for a, b in zip(widths, widths[1:-1]):
        layers += [nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def conv3d(inputs, outputs, kernel):
    """Dense convolution, batch norm, ReLU, same size."""
    return nn.Sequential(nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm3d(outputs, eps=1e-3), nn.ReLU(inplace=True))


class Neck(nn.Module):
    """Feature pyramid down to stride 8: 1 x 1 laterals, nearest upsampling, one 3 x 3. torchvision's would train two outputs that nobody reads. [ours]"""

    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in inputs)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.output = nn.Conv2d(width, outputs, 1)

    def forward(self, stages):
        x = self.lateral[-1](stages[-1])
        for lateral, stage in zip(self.lateral[-2::-1], stages[-2::-1]):
            x = lateral(stage) + F.interpolate(x, size=stage.shape[-2:])
        return self.output(self.smooth(x))


class ResNet(nn.Module):
    """torchvision's ResNet, its key names, without fc."""
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet, RGB: what every published torchvision-named ResNet expects

    def __init__(self, depth=50):
        super().__init__()
        self.resnet = {18: resnet18, 50: resnet50}[depth](weights=None, zero_init_residual=True)    # blocks begin as identities: learns sooner [ours]
        self.resnet.to(memory_format=torch.channels_last).fc = nn.Identity()                # faster convolutions; no classifier
        self.widths = {18: (128, 256, 512), 50: (512, 1024, 2048)}[depth]

    def stages(self, images, masked=None):
        """images (B K, 3, H, W) uint8, hidden (B K, H, W) bool, True = hidden -> ResNet stages of stride 8, 16, 32. A hidden pixel becomes the mean colour."""
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.MEAN, self.STD))
        x = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)     # (B K, 3, H, W)
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

    Each cell centre asks every camera that sees it: the bilinear image feature, weighted by the probability of the cell's depth at that pixel, summed over
    cameras. Pulling instead of splatting: no frustum tensor, and the same projection as everywhere else. [ours; LSS's depth distribution]
    """

    def __init__(self, depth=50, channels=80, max_depth=60.0, bins=118):
        super().__init__(depth)
        self.neck = Neck(self.widths, 2 * channels, channels + bins)
        self.channels, self.bins, self.near, self.max_depth = channels, bins, 1.0, max_depth

    def forward(self, batch, cells, masked=None):
        """batch with images, hw, lidar2img, size; cells of the volume -> volume (B, C, Z, Y, X), seen (B, Z, Y, X) bool: some camera sees the centre.
        Hidden pixels and the padding of smaller pictures become the mean colour."""
        padding = ~valid_pixels(batch.hw, batch.images.shape[-2:])
        masked = padding if masked is None else masked | padding
        with bf16_autocast(batch.images.device):
            x = self.neck(self.stages(batch.images, masked))                               # (B K, C + D, H/8, W/8)
        features, logits = x.float().split([self.channels, self.bins], 1)
        return self.lift(features, logits.softmax(1), batch, cells)

    def lift(self, features, probability, batch, cells):
        """features (B K, C, h, w), probability (B K, D, h, w) of depth -> volume (B, C, Z, Y, X), seen (B, Z, Y, X)."""
        (C, h, w), D, V = features.shape[1:], self.bins, math.prod(cells.shape)
        centres = cells.centres(features.device)                                           # (V, 3)
        b = torch.arange(batch.size, device=centres.device).repeat_interleave(V)           # (B V,)
        cell, image, uv, depth = project(centres.repeat(batch.size, 1), b, batch.lidar2img, batch.hw, batch.size, self.near)
        cell, image, uv, depth = (part[depth < self.max_depth] for part in (cell, image, uv, depth))
        padded = batch.images.shape[-2:]
        pulled = sample_image(features, image, uv, padded)                                 # (M, C)
        bin_ = (depth - self.near) / (self.max_depth - self.near) * D - 0.5                # (M,) whole numbers at bin centres
        flat, weight = multilinear(torch.cat([grid_index(uv, (h, w), padded), bin_[:, None]], 1), (h, w, D))
        chance = gather_weighted(probability.permute(0, 2, 3, 1).reshape(-1, 1), flat + image[:, None] * (h * w * D), weight)   # (M, 1)
        volume = segment_sum(pulled * chance * D, cell, batch.size * V)                    # (B V, C); D: 1 at a uniform distribution
        seen = torch.zeros(batch.size * V, dtype=torch.bool, device=cell.device)
        seen[cell] = True
        return volume.view(batch.size, *cells.shape, C).permute(0, 4, 1, 2, 3), seen.view(batch.size, *cells.shape)


class FusionNet(nn.Module):
    """LiDAR volume and camera volume -> fused volume: 1 x 1 x 1, then 3 x 3 x 3. An absent branch counts as zeros. Source: BEVFusion's ConvFuser, kept 3-D [ours]."""

    def __init__(self, lidar, camera, width=64):
        super().__init__()
        self.widths = lidar, camera
        self.reduce = conv3d(lidar + camera, width, 1)
        self.mix = conv3d(width, width, 3)

    def forward(self, lidar=None, camera=None):
        """lidar (B, C, Z, Y, X) or None, camera (B, C', Z, Y, X) or None -> (B, width, Z, Y, X) float32."""
        there = lidar if lidar is not None else camera
        parts = [v if v is not None else there.new_zeros(len(there), c, *there.shape[2:]) for v, c in zip((lidar, camera), self.widths)]
        with bf16_autocast(there.device):
            return self.mix(self.reduce(torch.cat(parts, 1))).float()


def trunk(grid, resnet, width, bins):
    """VoxelResNet, CameraNet and FusionNet that fit together on a grid: pre-training trains them, fine-tuning loads them. resnet 18 or 50, width of stage 1."""
    extent = max(abs(v) for v in (*grid.low[:2], *grid.high[:2]))                          # m
    camera = CameraNet(resnet, 5 * width, max_depth=extent * 60 / 54, bins=bins)           # BEVFusion's 60 m for 54 m
    return VoxelResNet(grid.low, grid.high, grid.voxel, width), camera, FusionNet(8 * width, 5 * width, 4 * width)


# ---- §4 rendering ----------------------------------------------------------------------------------------------------------------
# NeuS opacity along rays and where to place samples. Source: NeuS (Wang et al. 2021) for opacity and up-sampling.

def neus_weights(sdf, h):
    """Weights of the sections between consecutive samples of a ray.

    alpha_n = max((Phi(h s_n) - Phi(h s_n+1)) / Phi(h s_n), 0), w_n = alpha_n prod_{i<n} (1 - alpha_i), Phi the logistic function. Since
    1 - alpha_n = min(Phi(h s_n+1) / Phi(h s_n), 1), everything is a running sum of log Phi: nothing under- or overflows behind a surface.
    sdf (R, S) from near to far, h () > 0 -> (R, S - 1), >= 0, rows sum to <= 1.
    """
    log_phi = F.logsigmoid(h * sdf)
    log_pass = (log_phi[:, 1:] - log_phi[:, :-1]).clamp_max(0)                             # (R, S - 1): log(1 - alpha)
    return (log_pass.cumsum(1) - log_pass).exp() * -torch.expm1(log_pass)


def stratified(near, far, jitter):
    """One sample in each of S equal parts of [near, far]. near, far (R,) m, jitter (R, S) in [0, 1) -> (R, S) m, increasing."""
    S = jitter.shape[1]
    return near[:, None] + (far - near)[:, None] * (torch.arange(S, device=near.device) + jitter) / S


def importance(depth, weights, u):
    """Samples from the sections' weights by inverting their cumulative sum. depth (R, S), weights (R, S - 1), u (R, n) in [0, 1) -> (R, n). No gradient.

    NaN weights give finite depths, since a NaN position would be an index out of range; the NaN shows in the loss, which is of the same field.
    """
    weights = weights + 1e-5                                        # a ray without a surface is sampled evenly
    cdf = F.pad((weights / weights.sum(1, keepdim=True)).cumsum(1), (1, 0))                # (R, S)
    k = (torch.searchsorted(cdf, u.contiguous(), right=True) - 1).clamp(0, weights.shape[1] - 1)
    low, high = cdf.gather(1, k), cdf.gather(1, k + 1)
    part = (u - low) / (high - low).clamp_min(1e-8)
    start = depth.gather(1, k)
    return start + part.nan_to_num().clamp(0, 1) * (depth.gather(1, k + 1) - start)


# ---- §5 contrast -----------------------------------------------------------------------------------------------------------------
# InfoNCE, and how many codes are in use. Source: CPC (van den Oord et al. 2018).

def info_nce(queries, keys, tau):
    """-log of the softmax share of each row's own key among all keys, of unit features, in float32. queries, keys (M, C) -> (M,).

    Negatives are the other rows of this process. Features that are all alike give ln M; every key twice, at best ln 2.
    """
    logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).t() / tau                           # (M, M)
    return logits.logsumexp(1) - logits.diagonal()


def perplexity(assigned, n):
    """exp of the entropy of how often each of n prototypes is assigned: how many are in use. assigned (N,) -> ()."""
    p = torch.bincount(assigned, minlength=n) / max(len(assigned), 1)
    return torch.special.entr(p).sum().exp()


# ---- §6 curvature ----------------------------------------------------------------------------------------------------------------
# Surface variation of a point cloud. Source: Pauly et al. 2002. In the loader's workers: numpy in, numpy out.

def smallest_eigenvalue(xx, xy, xz, yy, yz, zz):
    """Smallest eigenvalue of symmetric 3 x 3 matrices, trigonometric form, float64. Each argument and the result (N,)."""
    q = (xx + yy + zz) / 3
    a, b, c = xx - q, yy - q, zz - q
    p = np.sqrt((a * a + b * b + c * c + 2 * (xy * xy + xz * xz + yz * yz)) / 6)
    det = a * (b * c - yz * yz) - xy * (xy * c - yz * xz) + xz * (xy * yz - b * xz)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine_ = np.clip(np.nan_to_num(det / (2 * p ** 3)), -1, 1)
    return q + 2 * p * np.cos(np.arccos(cosine_) / 3 + 2 * np.pi / 3)


def surface_variation(queries, cloud, k=32):
    """lambda_0 / (lambda_0 + lambda_1 + lambda_2) of the covariance of each query's k nearest points: 0 on a plane or line, 1/3 where isotropic.

    queries (Q, 3), cloud (N, 3) float32 m -> (Q,) float32. Coordinates are taken relative to the query (fp32 would cancel at 50 m), eigenvalues in float64.
    """
    if len(queries) == 0 or len(cloud) == 0:
        return np.zeros(len(queries), np.float32)
    k, chunk, out = min(k, len(cloud)), 2048, []
    tree = cKDTree(cloud)
    for a in range(0, len(queries), chunk):                         # keeps the temporaries in cache
        query = queries[a:a + chunk]
        near = tree.query(query, k)[1].reshape(len(query), k)
        planes = [cloud[:, axis][near] - query[:, axis, None] for axis in range(3)]       # three of (q, k)
        x, y, z = (plane - plane.mean(1, keepdims=True) for plane in planes)
        # k times the covariance, as the ratio does not mind
        xx, xy, xz, yy, yz, zz = (np.einsum("nk,nk->n", *pair).astype(np.float64) for pair in ((x, x), (x, y), (x, z), (y, y), (y, z), (z, z)))
        trace = xx + yy + zz
        low = smallest_eigenvalue(xx, xy, xz, yy, yz, zz)
        out.append(np.where(trace > 1e-12, np.clip(low, 0, None) / np.maximum(trace, 1e-12), 0.0))
    return np.concatenate(out).astype(np.float32)


# ---- §7 runs ---------------------------------------------------------------------------------------------------------------------
# Flags, processes, checkpoints, logs, figures. All randomness of a run is a function of (seed, epoch, frame), so there is no random state to restore.

def parse(config, small):
    """Command line -> config. Defaults are the class's (the paper's), or `small`'s values where --preset small: the default of --init's run, else without --data."""
    import argparse

    import tyro
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--data", default="")
    peek.add_argument("--preset")
    peek.add_argument("--init", default="none")
    known, _ = peek.parse_known_args()
    begun = (Path(known.init) / "config.json").is_file()
    preset = known.preset or (run_config(known.init)["preset"] if begun else "paper" if known.data else "small")
    return tyro.cli(config, default=dataclasses.replace(config(), preset=preset, **(small if preset == "small" else {})), description=sys.modules["__main__"].__doc__)


def run_config(folder):
    """config.json of a run folder, as a dict."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: no readable configuration of a run ({error}); give a folder that one of these scripts wrote") from error


def launch(train, cfg):
    """Run train(rank, world, cfg): here, or in cfg.gpus processes that start this very command again. Under torchrun the environment decides."""
    if "RANK" not in os.environ and (cfg.gpus or 0) > 1:
        if 0 < torch.cuda.device_count() < cfg.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
            raise SystemExit(f"--gpus {cfg.gpus}: this machine shows {torch.cuda.device_count()} (CUDA_VISIBLE_DEVICES={visible})")
        if not torch.cuda.is_available():
            print(f"--gpus {cfg.gpus} without CUDA: {cfg.gpus} CPU processes over gloo", flush=True)
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main
        try:
            return main(["--standalone", "--nproc-per-node", str(cfg.gpus), "--shutdown-timeout", "120", *sys.argv])      # s to finish a step and save
        except ChildFailedError as error:
            # a killed process comes first: the others then lose the connection to it, and NCCL aborts them. One killed much later was hanging, and the launcher did it
            earliest = min(failure.timestamp for failure in error.failures.values())
            rank, failure = min(error.failures.items(), key=lambda item: (
                item[1].exitcode >= 0 or item[1].exitcode in (-signal.SIGTERM, -signal.SIGABRT) or item[1].timestamp > earliest + 10, item[1].timestamp))
            if failure.exitcode == 128 + signal.SIGTERM:
                raise SystemExit(failure.exitcode) from None                # asked to stop, saved
            how = f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"left with exit code {failure.exitcode}"
            why = f" ({failure.message['message'].splitlines()[0]})" if isinstance(failure.message, dict) else ""     # what `record` wrote down, if it could
            raise SystemExit(f"rank {rank} of {cfg.gpus} {how}{why}; the others were stopped. The same command goes on from the last checkpoint.") from None
        except SignalException:                         # passed on to the processes, which have saved and left
            raise SystemExit(128 + signal.SIGTERM) from None
    if "RANK" not in os.environ and cfg.gpus == 1 and not torch.cuda.is_available():
        raise SystemExit("--gpus 1: no CUDA device is visible; --gpus 0 (the default here) runs on the CPU")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return train(rank, world, cfg)
    from torch.distributed.elastic.multiprocessing.errors import record
    status = 0
    try:
        record(train)(rank, world, cfg)                 # tells the launcher what went wrong here
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM:
            raise
        status = stop.code                              # asked to stop: all wait below until rank 0 has saved
    destroy_group()
    sys.stdout.flush()
    os._exit(status)                    # gloo's threads may abort a finished interpreter on its way out


def destroy_group():
    """The last collective of a run: a barrier, then the process group is destroyed. After it rank 0 may take long over figures and scores; nobody waits for it."""
    if processes() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def init_process(cfg, world):
    """This process's device, made ready; with several processes their group."""
    cuda = torch.cuda.is_available() and cfg.gpus != 0
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False             # projection and field are float32 in earnest
    else:
        keep_large_buffers()
    if world > 1 and not torch.distributed.is_initialized():
        from datetime import timedelta
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT), device_id=device if cuda else None)
    return device


def start(cfg, rank, world, free=("out", "gpus", "workers", "eval_every", "save_every", "profile", "export")):
    """Device, process group and run folder: config.json, source copies, provenance. -> device.

    A folder that holds another configuration is refused with the difference; fields named in `free` and nothing else may change between stop and resume.
    """
    device = init_process(cfg, world)
    if cfg.profile:
        return device
    rank0_first(rank, lambda: open_run(cfg, world, free))
    return device


def rank0_first(rank, act):
    """Run act() on rank 0 while the others wait. If it raises SystemExit, every process exits, rank 0 with the message."""
    told = [None]
    if rank == 0:
        try:
            act()
        except SystemExit as refusal:
            told = [str(refusal)]
    if processes() > 1:
        torch.distributed.broadcast_object_list(told)
    if told[0]:
        raise SystemExit(told[0] if rank == 0 else 1)


def open_run(cfg, world, free):
    """The run folder: made or found, taken, its configuration compared; config.json, provenance.json, source copies."""
    out, asked = Path(cfg.out), run_record(cfg, world)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {out}: cannot write there ({error.strerror}); give a folder that can be written") from error
    lock_run_folder(out)
    state = checkpoint(out, verbose=True, mmap=True)
    if state:
        before = json.loads(state["config"])
        changed = {k: (before.get(k), asked.get(k)) for k in {**before, **asked} if before.get(k) != asked.get(k) and k not in free}
        if changed:
            told = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
            raise SystemExit(f"{out} holds a run with another configuration: {told}. Repeat its command to resume it, or give another --out.")
    write_text(out / "config.json", json.dumps(asked, indent=1))
    starts = json.loads((out / "provenance.json").read_text()) if state and (out / "provenance.json").exists() else []
    starts.append(dict(argv=sys.argv, commit=commit(), python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__))
    write_text(out / "provenance.json", json.dumps(starts, indent=1))                  # a line for each start and resume
    source = out / ("source" if len(starts) == 1 else f"source-{len(starts)}")
    source.mkdir(exist_ok=True)
    for file in {Path(sys.modules["__main__"].__file__), Path(__file__), Path(__file__).with_name("data.py")}:
        shutil.copy(file, source)


def record_frames(path, dataset, indices, first, rank):
    """Write the training frames of a run, a name a line. A resumed run (first > 0) whose frames have changed since is refused: it would go on with another schedule."""
    def write():
        names = dataset.names                           # of every frame: made once
        now = [names[i] for i in indices]
        before = path.read_text().splitlines() if first and path.exists() else now
        if before != now:
            old, new = set(before), set(now)
            raise SystemExit(f"{path}: this run began with {len(before)} frames; now there are {len(now)}, {len(new - old)} of them new, {len(old - new)} gone "
                             f"({', '.join(sorted(old ^ new)[:2]) or 'in another order'}, ...). Bring the data set back to what it was, or give another --out.")
        write_text(path, "".join(name + "\n" for name in now))
    rank0_first(rank, write)


def lock_run_folder(out):
    """Take a run folder for this process, however that ends. One that another process is writing is refused: the two would mix their logs and checkpoints."""
    try:
        lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT)        # not closed: the lock would be gone
    except OSError as error:
        raise SystemExit(f"{out}: cannot write there ({error.strerror}); make the folder writable, or give another --out") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)            # not flock, which a killed run's loader workers would go on holding
    except (BlockingIOError, PermissionError) as error:
        raise SystemExit(f"{out}: another process is writing this run. Wait for it or end it, then the same command goes on; or give another --out.") from error
    except OSError:
        pass                                                        # a file system without locks


def keep_large_buffers():
    """Tell glibc not to hand large freed buffers back to the kernel, which would page-fault each of them in again: a third of a CPU step. Elsewhere nothing."""
    import ctypes
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            if mallopt(-3, 2**30):                      # M_MMAP_THRESHOLD; glibc before 2.35 refuses it, and is then left to adapt by itself
                mallopt(-1, 2**31 - 1)                  # M_TRIM_THRESHOLD
                mallopt(-2, 2**28)                      # M_TOP_PAD


def commit():
    """The checkout's commit, with '+' where files differ from it; 'unknown' outside a checkout."""
    def git(*words):
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--", ".", ":!tests/results")) or "unknown"


def first_line(error):
    """What kind of error, and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error)}".splitlines()[0][:200]


def run_record(cfg, world):
    """What config.json and checkpoints say of a run: its configuration and the number of processes."""
    return json.loads(json.dumps({**dataclasses.asdict(cfg), "world": world}))


@contextmanager
def atomic_write(path, keep=None):
    """Write to the yielded path; at the end that becomes `path`, and what stood there `keep` if given. A reader sees the old file or the new, whole.

    If writing fails, what was there stands, nothing half-written is left, and the error says so.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())                 # renamed before its bytes are on the disk, a power cut would leave it empty
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:       # torch.save tells a full disk as a RuntimeError
        with suppress(OSError):
            part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or first_line(error)
        raise SystemExit(f"{path}: could not be written ({why}); what stood there stands. "
                         "Make room there, or the folder writable; the same command goes on from the last checkpoint.") from error


def write_text(path, text):
    """A whole text file, see written."""
    with atomic_write(path) as part:
        part.write_text(text)


def wrap(model, device, world):
    """The module that the loop calls: with several processes DDP. Batch norm over rows counts every process's by itself; over images and volumes it does so on CUDA."""
    if world == 1:
        return model
    if device.type == "cuda":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) in (nn.BatchNorm2d, nn.BatchNorm3d):                        # never empty, so torch's will do
                    setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
    return nn.parallel.DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def require(condition, message):
    """End with this message unless the condition holds."""
    if not condition:
        raise SystemExit(message)


def frame_rngs(seeds, device):
    """One random stream a frame, whatever process or batch it is in. seeds (B,) int64 -> B generators on the device."""
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds.tolist()]


def random_subset(n, rows, generator):
    """A random n of these rows, or all if there are fewer; in their order, so that what they index is read in order. rows (M,) -> (n or M,)."""
    return rows[torch.randperm(len(rows), generator=generator, device=rows.device)[:n].sort().values]


def cosine(step, warmup, steps):
    """Learning-rate factor: linear from 1/3 over `warmup` steps, then half a cosine to 0 at `steps`."""
    if step < warmup:
        return 1 / 3 + 2 / 3 * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def checkpoint(out, verbose=False, mmap=False):
    """The newest whole checkpoint of a run folder: last.pt, else previous.pt -> its dict, or None if neither file exists. If none of them can be read: SystemExit.

    aloud: say when it is not last.pt, and move an unreadable last.pt out of the way. mmap: leave the tensors on the disk until they are looked at.
    """
    last, previous, bad = Path(out) / "last.pt", Path(out) / "previous.pt", []
    for path in (last, previous):
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if state.keys() != {"step", "config", "model", "optimizers"}:
                raise ValueError(f"it holds {', '.join(map(str, state))[:100]}")
        except Exception as error:                  # a cut archive, a pickle that wants more than tensors, another program's file
            bad.append(f"{path}: not a readable checkpoint of this program ({first_line(error)}), {path.stat().st_size} bytes")
            continue
        if verbose and path == previous:
            if bad:
                os.replace(last, last.with_name("unreadable.pt"))
            told = bad[0] + "; it was renamed to unreadable.pt" if bad else f"{last}: missing"
            print(f"{told}. Going on from {previous.name}, step {state['step']}.", flush=True)
        return state
    if bad:
        raise SystemExit("\n".join(bad) + "\nDelete the run folder to start over, or give another --out.")


def resume(out, model, *opts):
    """Load the newest whole checkpoint if the run folder has one, into the optimisers too where they are given -> the next step, else 0."""
    state = checkpoint(out)
    step = state["step"] if state else 0
    low, high = all_reduce(torch.tensor([-step, step], device=next(model.parameters()).device), torch.distributed.ReduceOp.MAX).tolist()
    if -low != high:
        raise SystemExit(f"{out}: of {processes()} processes some found the checkpoint of step {-low}, some that of {high}; they must all see one folder: "
                         "give an --out that they share, or try again if it could not be read for a moment")
    if state:
        model.load_state_dict(state["model"])
        for opt, kept in zip(opts, state["optimizers"]):
            opt.load_state_dict(kept)
    return step


def save(cfg, step, model, opts, units, grid):
    """Rank 0 only: last.pt (to resume; the one before becomes previous.pt) and backbones.safetensors (`units`: name prefixes of what fine-tuning loads;
    config, grid and commit in its header)."""
    from safetensors.torch import save_file
    out, state = Path(cfg.out), model.state_dict()
    weights = {k: v.contiguous().cpu() for k, v in state.items() if k.startswith(tuple(u + "." for u in units))}
    started = json.loads((out / "provenance.json").read_text())[-1]["commit"]               # not today's: files may have changed since
    header = {"config": json.dumps(dataclasses.asdict(cfg)), "grid": json.dumps(dataclasses.asdict(grid)), "commit": started, "step": str(step), "units": ",".join(units)}
    with atomic_write(out / "backbones.safetensors") as part:
        save_file(weights, part, header)
    with atomic_write(out / "last.pt", keep=out / "previous.pt") as part:
        torch.save(dict(step=step, config=json.dumps(run_record(cfg, processes())), model=state, optimizers=[opt.state_dict() for opt in opts]), part)


def read_units(run):
    """run/backbones.safetensors -> path, header, {name: tensor}."""
    from safetensors import safe_open
    path = Path(run) / "backbones.safetensors"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; --init names the folder that a pre-training run wrote")
    try:
        with safe_open(path, "pt") as file:
            return path, file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise SystemExit(f"{path}: not a whole safetensors file ({error}), {path.stat().st_size} bytes; copy it again or repeat the pre-training") from error


def load_units(run, model, wanted, possible, grid, rank):
    """Copy units of run/backbones.safetensors into the model, strictly. wanted: names, or () for all of `possible` that the run holds -> names of the tensors."""
    path, header, stored = read_units(run)
    there, then = header["units"].split(","), json.loads(header["config"])
    units = wanted or [unit for unit in possible if unit in there]
    if not units or set(units) - set(there):
        raise SystemExit(f"{path} holds {', '.join(there)}; asked for {', '.join(wanted or possible)}")
    own, loaded, told = model.state_dict(), set(), []
    for unit in units:
        mine, theirs = ({name: tuple(t.shape) for name, t in state.items() if name.startswith(unit + ".")} for state in (own, stored))
        wrong = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
        if wrong:
            name = wrong[0]
            flags = " ".join(f"--{flag} {then[flag]}" for flag in {"camera.resnet": ("resnet",)}.get(unit, ("resnet", "width", "bins")) if flag in then)
            raise SystemExit(f"{path}: {len(wrong)} of the {len(mine)} tensors of {unit} do not fit, first {name}: {theirs.get(name, 'absent')} in the file, "
                             f"{mine.get(name, 'absent')} in the model. The run has {flags}: give the same.")
        loaded |= mine.keys()
        told.append(f"{unit} {len(mine)}/{len(mine)}")
    model.load_state_dict({**own, **{name: stored[name] for name in loaded}})
    if rank == 0:
        print(f"{path}: loaded {', '.join(told)} tensors of step {header['step']}", flush=True)
        if json.loads(header["grid"]) != json.loads(json.dumps(dataclasses.asdict(grid))):
            print("it was trained on another grid, which convolutions do not mind", flush=True)
    return loaded


def load_resnet(source, resnet, rank, prefix=""):
    """Copy weights with torchvision's names into a ResNet without fc, strictly: a .pth or .safetensors file, or a run folder's camera.resnet.

    prefix is what stands before those names in the file. A checkpoint's "state_dict" is taken where it has one.
    """
    from safetensors.torch import load_file
    path = Path(source)
    path, prefix = (path / "backbones.safetensors", "camera.resnet.") if path.is_dir() else (path, prefix)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path}: no readable weights ({first_line(error)}); give a .pth or .safetensors file of tensors, or a run folder") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    stored = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and not k.removeprefix(prefix).startswith("fc.")}
    own = resnet.state_dict()
    wrong = [k for k in sorted(own.keys() | stored.keys()) if getattr(own.get(k), "shape", None) != getattr(stored.get(k), "shape", None)]
    if wrong:
        there, here = (tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else "absent" for tensors in (stored, own))
        raise SystemExit(f"{path}: {len(wrong)} of the {len(own)} tensors of this ResNet do not fit, first {wrong[0]}: {there} in the file, {here} in the model; "
                         "expected torchvision's names and the depth of --resnet")
    resnet.load_state_dict(stored)
    if rank == 0:
        print(f"{path}: loaded {len(stored)}/{len(own)} tensors of the image network", flush=True)


class Run:
    """log.jsonl (nothing in it depends on the clock), TensorBoard, a progress line every few seconds. On ranks other than 0 it only checks.

    Also answers SIGTERM and Ctrl-C: the first asks for a stop after the step (see interrupted), one more than two seconds later stops at once
    (a launcher may pass on what the terminal has sent too).
    """

    def __init__(self, cfg, rank, world, first, steps, device, about):
        out, frames = cfg.out, cfg.batch * world
        self.rank, self.steps, self.frames, self.device, self.path = rank, steps, frames, device, Path(out) / "log.jsonl"
        self.begin = self.said = time.monotonic()
        self.first, self.waited, self.asked = first, 0.0, 0.0
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        if rank == 0:
            from torch.utils.tensorboard import SummaryWriter
            lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []       # the last may be cut
            write_text(self.path, "".join(line + "\n" for line in lines if line[:1] + line[-1:] == "{}" and json.loads(line)["step"] < first))
            self.file, self.board = open(self.path, "a"), SummaryWriter(Path(out) / "tensorboard", purge_step=first)
            print(f"{out}: steps {first} to {steps} of {frames} frames ({cfg.batch} x {world}), {about}, {device}", flush=True)

    def ask(self, number, _):
        if self.asked and time.monotonic() - self.asked > 2:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()

    def interrupted(self):
        """Whether any process was asked to stop: the same answer on every rank, so that all leave after the same step."""
        if processes() == 1:
            return self.asked > 0                       # no wait for the GPU
        return bool(all_reduce(torch.tensor(float(self.asked > 0), device=self.device), torch.distributed.ReduceOp.MAX))

    def batches(self, loader, first):
        """(step, batch on the device) from step `first` on, timing the wait for data."""
        source = iter(loader.begin_at(first))
        for step in range(first, self.steps):
            asked = time.monotonic()
            try:
                batch = next(source).to(self.device)
            except RuntimeError as error:
                if self.asked:                          # a signal to everybody has ended the workers too
                    raise SystemExit(f"stopped while waiting for the data of step {step + 1}; the same command goes on from the last checkpoint") from error
                raise
            self.waited += time.monotonic() - asked
            yield step, batch

    def log(self, step, names, prefix="", **terms):
        """Average the terms over processes and write them. Raises FloatingPointError, before any update, if one is not finite, naming it and the frames."""
        local = torch.stack([torch.as_tensor(v, dtype=torch.float32).detach().to(self.device) for v in terms.values()])
        bad = [k for k, v in zip(terms, local.tolist()) if not math.isfinite(v)]
        if bad:
            raise FloatingPointError(f"step {step}, rank {self.rank}: {', '.join(bad)} not finite on {', '.join(names)}; nothing was updated, the last checkpoint stands")
        values = {prefix + k: round(v, 7) for k, v in zip(terms, (all_reduce(local) / processes()).tolist())}
        if self.rank:
            return
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
            for k, v in values.items():
                self.board.add_scalar(k, v, step)
        except OSError as error:
            raise SystemExit(f"{self.path}: step {step} could not be written ({error.strerror}). "
                             "Make room there; the same command goes on from the last checkpoint.") from error
        now, done = time.monotonic(), step + 1 - self.first
        if not prefix and (done == 1 or now - self.said > 10 or step + 1 == self.steps):
            self.said, spent = now, now - self.begin
            memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else peak_memory()
            told = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k == "loss" or k.startswith("L_"))
            print(f"step {step + 1}/{self.steps}  {told}  | {done * self.frames / spent:.1f} frames/s, waiting for data {self.waited / spent:.0%}, "
                  f"{memory:.1f} GiB, {spent / done * (self.steps - step - 1) / 60:.0f} min left", flush=True)

    def leave(self, step):
        """After a stop that was asked for has been saved: exit status 143."""
        if self.rank == 0:
            print(f"{self.path.parent}: asked to stop, saved after step {step + 1}; the same command goes on from there", flush=True)
        sys.exit(128 + signal.SIGTERM)

    def close(self):
        """The end of training: signals mean again what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.rank == 0:
            self.file.close()
            self.board.close()


@torch.no_grad()
def evaluate(model, batches, device, *more):
    """Mean of every term of model(batch, *more) over held-out batches, in eval mode. Seeds are the frames': every call has the same masks. -> {name: float}."""
    share_buffers(model)
    model.eval()
    rows = [model(batch.to(device), *more)[1] for batch in batches]
    model.train()
    return {k: sum(float(row[k]) for row in rows) / len(rows) for k in rows[0]}


def load_tool(name):
    """tests/<name>.py as a module: what a run offers that a method's reader may skip. None, said aloud, where it is absent, as beside a forked file."""
    path = Path(__file__).with_name("tests") / f"{name}.py"
    if not path.is_file():
        print(f"{path} is absent: what it would do is left out", flush=True)
        return None
    spec = importlib.util.spec_from_file_location(f"tests_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak_memory():
    """Largest resident size of this process so far, GiB."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def figure(path, panels, columns, size=(4.0, 3.0)):
    """A grid of panels. Each is (title, picture, options): picture an array (H, W) or (H, W, 3) for imshow(**options), or a function of the axes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = -(-len(panels) // columns)
    width, height = size[0] * columns, size[1] * rows
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    fig.subplots_adjust(0.5 / width, 0.3 / height, 1 - 0.1 / width, 1 - 0.3 / height, 0.7 / size[0], 0.7 / size[1])    # inches; measured layouts cost seconds
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, (title, picture, *options) in zip(axes.flat, panels):
        ax.set_title(title, fontsize=9)
        if callable(picture):
            picture(ax)
        else:
            ax.imshow(np.asarray(picture), **(options[0] if options else {}))
            ax.axis("off")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def bird_eye(xyz, colour="0.7", size=1.0, **style):
    """A panel for figure: points from above, x (forward) up, y (left) to the left. xyz (N, 2 or more) m, colour one for all or (N,), style of scatter."""
    def plot(ax):
        ax.scatter(-xyz[:, 1], xyz[:, 0], size, colour, **style)
        ax.set_aspect("equal")
    return plot


def overlay(image, uv, colour, size=4.0, **style):
    """A panel for figure: points on a picture. image (H, W) or (H, W, 3), uv (N, 2) px, colour one for all or (N,), style of scatter."""
    def plot(ax):
        ax.imshow(image)
        ax.scatter(uv[:, 0], uv[:, 1], size, colour, **style)
        ax.axis("off")
    return plot


def loss_curves(out, levels=None):
    """figures/losses.png from log.jsonl: every logged term, training in grey with its running median, held-out values as dots. levels {term: heights of dashed lines}."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k != "step" and not k.startswith("val_")]

    def curve(name):
        def draw(ax):
            x, y = np.array([(row["step"], row[name]) for row in rows if name in row]).T
            half_width = max(len(y) // 50, 1)
            ax.plot(x, y, color="0.8", lw=0.6)
            some = np.unique(np.linspace(0, len(y) - 1, 1000).round().astype(int))
            ax.plot(x[some], [np.median(y[max(i - half_width, 0):i + half_width + 1]) for i in some], color="C0", lw=1.2)
            held = [(row["step"], row["val_" + name]) for row in rows if "val_" + name in row]
            if held:
                ax.plot(*np.array(held).T, "C3.", ms=4)
            for level in (levels or {}).get(name, ()):
                ax.axhline(level, color="0.4", ls="--", lw=0.8)
        return draw
    figure(Path(out) / "figures" / "losses.png", [(name, curve(name)) for name in names], 4, (3.2, 2.2))
