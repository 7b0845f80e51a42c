"""The hot pieces against the obvious alternative and against peer libraries, as ratios.

    python tests/bench.py                   # CPU time of one process with one thread
    python tests/bench.py --quick           # fewer rounds
    python tests/bench.py --device cuda     # the torch pieces on a GPU: wall time, no demands
    python tests/bench.py --scaling         # how cost grows with points, voxels, rays, frames
    python tests/bench.py --samplers runs/clap    # the samplers of a finished run of clap.py

The input is real nuScenes frames, in $NUSCENES or ../shared/real/nuscenes, else the embedded world.
--samplers shows what each of the three looks at, and the time and memory of a step.

A row: median ms of our piece, of the alternative or of a peer (spconv, fpsample, torch_cluster,
open3d: measured where they can be imported), the ratio, the target ("seen": not a demand, but what
an earlier measurement gave; none: only to know). The verdict: ok; ok*, within 1.2 times the target,
the noise of single runs; miss. A miss of a demand makes the exit status 1. Each pair is first
asserted to compute the same. On a CPU wall time plays no part. On a GPU time ends when the work is
done, and the targets, which are one CPU thread's, demand nothing.
"""
import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"         # read when numpy and torch are imported
os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import shapely
import shapely.affinity
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import clap
import common
import data
import finetune
import simipu

DEVICE = torch.device("cpu")    # of --device
PRINTED = []                    # (piece, its row in words, whether it misses a demand)


def move(x):
    """A tensor, module or batch on the device that is measured."""
    return x.to(DEVICE)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def cpu_only(what, why="numpy, in the loader's workers"):
    """Whether to skip a piece that does not run on the GPU that is measured; it is printed then."""
    if DEVICE.type == "cuda":
        print(f"{what:46.46}CPU only: {why}", flush=True)
    return DEVICE.type == "cuda"


def installed(name):
    """The module of a peer.

    None where it is missing, not built for this torch, or not for the GPU that is measured.
    """
    try:
        module = importlib.import_module(name)
    except Exception:    # whatever a library raises when it was built for another torch
        return None
    without_cuda = getattr(getattr(module, "ops", None), "CPU_ONLY_BUILD", False)    # spconv's name
    return None if DEVICE.type == "cuda" and without_cuda else module


# ---- timing and rows -----------------------------------------------------------------

def clock():
    """CPU time of this process, s. On a GPU wall time, once all work is done."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(rounds, *pieces):
    """Median ms of each function after one call to warm up. None for None.

    The rounds are interleaved, so what else the machine does meets all alike.
    """
    spent = [[] for _ in pieces]
    for turn in range(rounds + 1):
        for piece, ms in zip(pieces, spent):
            if piece is not None:
                begin = clock()
                piece()
                if turn:
                    ms.append(1e3 * (clock() - begin))
    return [float(np.median(ms)) if ms else None for ms in spent]


def verdict_of(value, sign, target):
    if value is None or target is None:
        return ""
    excess = value / target if sign.endswith("<=") else target / max(value, 1e-12)
    if excess <= 1:
        return "ok"
    return "ok*" if excess <= 1.2 else "miss"


def piece_of(what):
    """The name of the piece that a row belongs to. An indented or empty title is of the last."""
    if what[:1].strip():
        return what
    last = PRINTED[-1][0]
    return f"{last.partition(': ')[0]}: {what.strip()}" if what else last


def row(what, against, value, sign="", target=None, ours=None, other=None, peer=None):
    """Print one line.

    value against target: sign "<=" or ">="; target None: only to know. ours, other and peer: ms,
    where the value is their ratio. value None: the peer is not installed.
    """
    verdict = verdict_of(value, sign, target)
    demand = ""
    if target is not None:
        sign = "CPU " + sign[-2:] if DEVICE.type == "cuda" else sign
        demand = f"{sign:>7} {target:<7g}"
    times = ""
    for ms, width in ((ours, 9), (other, 10), (peer, 10)):
        times += f"{ms:{width}.1f}" if ms is not None else " " * width
    if value is not None:
        times = f"{times:29}{value:10.3g}"
    else:
        times = f"{times[:19]}{'not installed':>20}"
    line = f"{against:38.38}{times}  {demand:15}{verdict}".rstrip()
    print(f"{what:46.46}{line}", flush=True)

    piece = piece_of(what)
    number = value and format(value, ".3g")
    words = f"{piece}; {against}: {number}, demanded {demand.strip()}"
    PRINTED.append((piece, words, verdict == "miss" and sign in ("<=", ">=")))


def compare(rounds, what, against, target, ours, other, sign="<=", peers=()):
    """Time ours against other, and against peers: (name, function, sign and target if any).

    The function of a peer that is not installed is None.
    """
    a, b, *of_peers = timed(rounds, ours, other, *(peer[1] for peer in peers))
    row(what, against, a / b, sign, target, a, b)
    for (name, _, *demand), c in zip(peers, of_peers):
        row("", name, c and a / c, *demand, ours=a, peer=c)


def same(a, b, tolerance, what):
    """Largest |a - b| over the largest |b|, asserted to be within tolerance."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)}, expected {tuple(b.shape)}"
    error = float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
    assert error <= tolerance, (
        f"{what}: relative difference {error:.2g}, expected at most {tolerance}")
    return error


# ---- sparse convolution --------------------------------------------------------------

def searched_map(coords, shape):
    """Submanifold map by 27 binary searches, in the order of coords.

    coords (V, 4) -> ins (P,), outs (P,), counts
    """
    padded = [s + 2 for s in shape]
    keys = common.ravel(coords + coords.new_tensor([0, 1, 1, 1]), padded, 1)
    table, order = keys.sort()
    ins, outs = [], []
    for z, y, x in product((-1, 0, 1), repeat=3):
        neighbour = keys + (z * padded[1] + y) * padded[2] + x
        at = torch.searchsorted(table, neighbour).clamp_max(len(table) - 1)
        outs.append((table[at] == neighbour).nonzero()[:, 0])
        ins.append(order[at[outs[-1]]])
    return torch.cat(ins), torch.cat(outs), [len(o) for o in outs]


def candidate_map(coords, shape, pad):
    """Strided map by 27 candidates a voxel, masked by parity and range, and one unique.

    coords (V, 4) -> coords (V', 4), ins (P,), outs (P,), counts
    """
    out_shape = [(n + 2 * p - 3) // 2 + 1 for n, p in zip(shape, pad)]
    keys, ins = [], []
    for t in product((0, 1, 2), repeat=3):
        v = coords[:, 1:] + coords.new_tensor(pad) - coords.new_tensor(t)
        inside = (v % 2 == 0) & (v >= 0) & (v // 2 < coords.new_tensor(out_shape))
        rows = inside.all(1).nonzero()[:, 0]
        ins.append(rows)
        keys.append(common.ravel(torch.cat([coords[rows, :1], v[rows] // 2], 1), out_shape, 1))
    unique, outs = torch.unique(torch.cat(keys), return_inverse=True)
    return common.unravel(unique, out_shape), torch.cat(ins), outs, [len(i) for i in ins]


def pairs_of(kmap, n_in):
    """The pairs of our kernel map of n_in inputs -> ins (P,), outs (P,), counts"""
    if isinstance(kmap, common.KernelPairs):
        counts = kmap.ends.diff(prepend=kmap.ends.new_zeros(1))
        return kmap.ins, kmap.outs, counts.tolist()
    joined = kmap.ins.t() < n_in   # (27, V')
    offset, outs = joined.nonzero().t()
    return kmap.ins[outs, offset].long(), outs, joined.sum(1).tolist()


def by_offset(ins, outs, counts):
    """Pairs (P, 3) offset, in, out in one order. An offset joins an input with one output only."""
    offset = torch.repeat_interleave(move(torch.tensor(counts)))
    pairs = torch.stack([offset, ins, outs], 1)
    return pairs[torch.argsort(offset * (int(ins.max()) + 1) + ins)]


def spconv_map(spconv, coords, shape, stride, pad):
    """spconv's kernel map.

    coords (V, 4) int32 -> coords (V', 4) int32 in any order, pairs (2, 27, V) int32, counts (27,)
    """
    return spconv.ops.get_indice_pairs(
        coords, 1, list(shape), spconv.ConvAlgo.Native, [3] * 3, [stride] * 3, list(pad),
        [1] * 3, [0] * 3, subm=stride == 1)


def spconv_pairs(out, pairs, counts, shape):
    """What spconv_map gave, in the form of by_offset, the outputs in order.

    Of a submanifold map spconv lists only the first 13 offsets; the rest is implied.
    """
    valid = torch.arange(pairs.shape[2], device=pairs.device) < counts[:, None]
    rank = common.ravel(out.long(), shape, 1).argsort().argsort()
    return by_offset(pairs[0][valid].long(), rank[pairs[1][valid].long()], counts.tolist())


def bench_maps(rounds, level, pad):
    """Rows 1 and 2. Ours takes sorted voxels, which voxelise and strided_map give.

    That sort is in row 4. spconv gets the voxels sorted too.
    """
    coords = level.coords
    shape = level.cells.shape
    spconv = installed("spconv.pytorch")
    narrow = coords.int()
    mixed = move(torch.randperm(len(coords), generator=seeded(0)))
    shuffled = coords[mixed]

    def submanifold():
        return common.submanifold_map(coords, shape, 1)

    def searched():
        return searched_map(shuffled, shape)

    def searched_in_order():
        return searched_map(coords, shape)

    def spconv_submanifold():
        return spconv_map(spconv, narrow, shape, 1, (1, 1, 1))

    kmap = submanifold()
    pairs = by_offset(*pairs_of(kmap, len(coords)))
    ins, outs, counts = searched()
    expected = by_offset(mixed[ins], mixed[outs], counts)
    assert torch.equal(pairs, expected), "submanifold maps differ"
    assert torch.equal(pairs, by_offset(*searched_in_order())), "submanifold maps differ"
    if spconv:
        listed = spconv_pairs(*spconv_submanifold(), shape)
        enough = len(listed) >= (len(pairs) - len(coords)) // 2
        equal = torch.equal(pairs[:len(listed)], listed)
        assert enough and equal, "submanifold maps differ from spconv's"
    a, plain, ordered, peer = timed(rounds, submanifold, searched, searched_in_order,
                                    spconv and spconv_submanifold)
    row(f"1 submanifold map, {len(coords)} voxels", "27 searches, voxels in any order",
        a / plain, "seen <=", 0.11, a, plain)
    row("", "27 searches, sorted voxels", a / ordered, "<=", 0.3, a, ordered)
    row("", "spconv get_indice_pairs", peer and a / peer, "<=", 0.5, a, peer=peer)

    def strided():
        return common.strided_map(coords, shape, pad, 1)

    def candidates():
        return candidate_map(coords, shape, pad)

    def spconv_strided():
        return spconv_map(spconv, narrow, shape, 2, pad)

    out, kmap = strided()
    pairs = by_offset(*pairs_of(kmap, len(coords)))
    expected_out, ins, outs, counts = candidates()
    assert torch.equal(out, expected_out), "strided maps differ"
    assert torch.equal(pairs, by_offset(ins, outs, counts)), "strided maps differ"
    if spconv:
        spconv_out = spconv_strided()
        half_shape = level.cells.halved(pad).shape
        assert len(out) == len(spconv_out[0]), "strided maps differ from spconv's"
        expected = spconv_pairs(*spconv_out, half_shape)
        assert torch.equal(pairs, expected), "strided maps differ from spconv's"
    compare(rounds, f"2 strided map, to {len(out)}", "27 candidates, parity masks, unique", 0.17,
            strided, candidates, "seen <=",
            [("spconv get_indice_pairs", spconv and spconv_strided, "<=", 0.4)])


def masked_convolution(x, weight, table):
    """Sparse convolution by autograd, a bool mask and advanced indexing an offset.

    table (27, V): input rows, -1 = none.
    """
    out = x.new_zeros(table.shape[1], weight.shape[2])
    for k in range(27):
        valid = table[k] >= 0
        out[valid] += x[table[k, valid]] @ weight[k]
    return out


def open3d_layer(level, x, weight):
    """open3d's sparse convolution with our weights. It always searches its neighbours itself.

    -> a function, None where it is not installed
    """
    open3d = installed("open3d.ml.torch")
    if open3d is None:
        return None
    C = x.shape[1]
    layer = move(open3d.layers.SparseConv(C, C, [3, 3, 3], use_bias=False))
    layer.kernel.data = weight.detach().view(3, 3, 3, C, C)
    centres = level.coords[:, 1:].flip(1) + 0.5    # x, y, z of the voxels
    return lambda: layer(x.detach(), centres, centres, 1.0)


def bench_convolution(rounds, level, C, share):
    """Row 3. share: the least part of its time that the bare products take."""
    voxels = len(level.coords)
    kmap = common.submanifold_map(level.coords, level.cells.shape, 1)
    torch_rng = seeded(C)
    x, grad = move(torch.randn(2, voxels, C, generator=torch_rng))
    weight = move(torch.randn(27, C, C, generator=torch_rng) / C ** 0.5)
    x.requires_grad_()
    weight.requires_grad_()
    ins, outs, counts = pairs_of(kmap, voxels)
    offset = torch.repeat_interleave(move(torch.tensor(counts)))
    table = move(torch.full((27, voxels), -1))
    table[offset, outs] = ins
    chunk = 4096 if DEVICE.type == "cpu" else max(counts)    # what stays in a CPU's cache
    buffer = move(torch.empty(chunk, C))
    peer = open3d_layer(level, x, weight)

    def ours():
        return common.SparseConvolution.apply(x, weight, kmap)

    def masked():
        return masked_convolution(x, weight, table)

    @torch.no_grad()
    def products():
        """The matrix products alone, same shapes, into one reused buffer."""
        for k, count in enumerate(counts):
            for a in range(0, count, chunk):
                part = x[a:min(a + chunk, count)]
                torch.mm(part, weight[k], out=buffer[:len(part)])

    def gradients(out, grad):
        return torch.autograd.grad(out, (x, weight), grad)

    exact = masked_convolution(x.double(), weight.double(), table)
    error = same(ours(), exact, 1e-5, "sparse convolution")
    assert torch.equal(ours(), ours()), "the sparse convolution is not bitwise repeatable"
    for a, b in zip(gradients(ours(), grad), gradients(exact, grad.double())):
        same(a, b, 1e-5, "gradient of the sparse convolution")
    if peer:
        same(peer(), exact, 1e-4, "open3d's sparse convolution")
    with torch.no_grad():
        a, b, floor, of_peer = timed(rounds, ours, masked, products, peer)
    row(f"3 sparse conv C={C}, {voxels} voxels, {len(ins) / voxels:.1f} of 27",
        "mask and index an offset", a / b, "seen <=", 0.59, a, b)
    row("", "open3d SparseConv, with its search", of_peer and a / of_peer, ours=a, peer=of_peer)
    row("  share of the products' floor", "27 matmuls into a reused buffer",
        floor / a, ">=", share, a, floor)
    compare(rounds, "  forward + backward", "the same by autograd", 0.71,
            lambda: gradients(ours(), grad), lambda: gradients(masked(), grad), "seen <=")
    row("  max relative error", "float64", error, "<=", 1e-6)


class SpconvTrunk:
    """VoxelResNet's layers as spconv's modules, with net's weights and net's own batch norms.

    Called with Level 0 it gives the sites of stride 8. weights: spconv's, in the order of net's.
    """

    def __init__(self, spconv, net):
        self.spconv = spconv
        self.weights = []
        self.algorithm = None    # spconv chooses
        if DEVICE.type == "cpu":
            self.algorithm = spconv.ConvAlgo.Native
            spconv.ops.get_current_stream = lambda: 0    # its backward asks for CUDA's
        self.layers = [self.down(net.conv_input, "0")]
        self.layers += [self.block(ours, "0") for ours in net.conv1]
        for level, pad, blocks in zip("123", net.pads, (net.conv2, net.conv3, net.conv4)):
            first, *rest = blocks
            self.layers.append(self.down(first, None, pad))
            self.layers += [self.block(ours, level) for ours in rest]

    def convolution(self, conv, level, pad=None):
        channels = conv.weight.shape[1:]
        if pad is None:
            layer = self.spconv.SubMConv3d(*channels, 3, bias=False, indice_key=level,
                                           algo=self.algorithm)
        else:
            layer = self.spconv.SparseConv3d(*channels, 3, 2, pad, bias=False,
                                             algo=self.algorithm)
        layer = move(layer)
        weight = conv.weight.detach().view(3, 3, 3, *channels)
        layer.weight.data = weight.permute(4, 0, 1, 2, 3).contiguous()
        self.weights.append(layer.weight)
        return layer

    def down(self, ours, level, pad=None):
        conv = self.convolution(ours.conv, level, pad)
        return lambda x: norm_relu(ours.bn, conv(x))

    def block(self, ours, level):
        one = self.convolution(ours.conv1, level)
        two = self.convolution(ours.conv2, level)
        return lambda x: norm_relu(ours.bn2, two(norm_relu(ours.bn1, one(x))), x.features)

    def __call__(self, level):
        x = self.spconv.SparseConvTensor(level.features, level.coords.int(),
                                         list(level.cells.shape), 1)
        for layer in self.layers:
            x = layer(x)
        return x


def norm_relu(bn, x, more=0):
    """ReLU(batch norm + more) of spconv's tensor."""
    return x.replace_feature(F.relu(bn(x.features) + more))


def ordered_features(sites, last):
    """The features of spconv's sites in the order of ours. last: our level of stride 8."""
    order = common.ravel(sites.indices.long(), last.cells.shape, 1).argsort()
    assert torch.equal(sites.indices[order].long(), last.coords), (
        "the sites of stride 8 differ from spconv's")
    return sites.features[order]


def bench_trunk(rounds, net, points, b):
    """Row 14: all twenty convolutions from the voxels on, kernel maps included.

    Batch norms are in eval mode. float32 on a GPU too, where training takes bfloat16.
    """
    spconv = installed("spconv.pytorch")
    level = net.eval().voxelise(points, b, 1)
    weights = [part.weight for part in net.modules() if isinstance(part, common.SparseConv)]
    same_voxels = mock.patch.object(net, "voxelise", lambda *_: level)
    in_float32 = mock.patch.object(common, "bf16_autocast", lambda _: contextlib.nullcontext())
    with same_voxels, in_float32:
        last = net(points, b, 1)[-1]
        grad = move(torch.randn(last.features.shape, generator=seeded(0)))

        def forward():
            return net(points, b, 1)

        def backward():
            return torch.autograd.grad(net(points, b, 1)[-1].features, weights, grad)

        def spconv_forward():
            return trunk(level)

        def spconv_backward():
            return torch.autograd.grad(trunk(level).features, trunk.weights, grad)

        if spconv:
            trunk = SpconvTrunk(spconv, net)
            features = ordered_features(trunk(level), last)
            same(features, last.features, 1e-4, "spconv's features of stride 8")
            with mock.patch.object(F, "relu", F.silu):    # no kinks, which rounding would cross
                features = ordered_features(trunk(level), last)
                of_spconv = torch.autograd.grad(features, trunk.weights, grad)
                for a, c in zip(of_spconv, backward()):
                    a = a.permute(1, 2, 3, 4, 0).reshape(c.shape)
                    same(a, c, 1e-4, "gradient of spconv's trunk")
        with torch.no_grad():
            a, c = timed(rounds, forward, spconv and spconv_forward)
        row(f"14 sparse trunk, {len(level.coords)} voxels", "spconv, the same weights",
            c and a / c, "<=", 1.0, a, peer=c)
        a, c = timed(rounds, backward, spconv and spconv_backward)
        row("  forward + backward", "spconv, the same weights", c and a / c, "<=", 1.05, a, peer=c)


# ---- points --------------------------------------------------------------------------

def unique_voxels(net, points, b):
    """Mean of each voxel's points by torch.unique over rows -> coords (V, 4), mean (V, 5)."""
    low = points.new_tensor(net.low)
    high = points.new_tensor(net.high)
    voxel = points.new_tensor(net.voxel)
    inside = ((points[:, :3] >= low) & (points[:, :3] < high)).all(1)
    points, b = points[inside], b[inside]
    index = ((points[:, :3] - low) / voxel).long().flip(1)
    coords, of, count = torch.unique(torch.cat([b[:, None], index], 1), dim=0,
                                     return_inverse=True, return_counts=True)
    total = points.new_zeros(len(coords), 5).index_add_(0, of, points)
    return coords, total / count[:, None]


def bench_voxels(rounds, net, points, b):
    """Rows 4 and 9."""
    level = net.voxelise(points, b, 1)
    coords, mean = unique_voxels(net, points, b)
    assert torch.equal(level.coords, coords), "voxels differ"
    same(level.features, mean, 1e-5, "voxel means")
    compare(rounds, f"4 voxelise {len(points)} points to {len(coords)}",
            "torch.unique(dim=0) + index_add_", 0.1,
            lambda: net.voxelise(points, b, 1), lambda: unique_voxels(net, points, b))
    if common.torch_scatter is None:
        print("9 torch-scatter: skipped, it is not installed (or not for this torch); "
              "segment_sum is index_add_ and segment_mean segment_reduce")
        return
    bench_segment_mean(rounds, points, len(coords))
    for C, order in ((5, "sorted"), (64, "random")):
        index = torch.randint(len(coords), (len(points),), generator=seeded(C))
        bench_segment_sum(rounds, index, len(coords), C, order)


def bench_segment_mean(rounds, points, count):
    """Row 9: the means of voxels, of points that are sorted by voxel."""
    index = torch.randint(count, (len(points) - count,), generator=seeded(0))
    index = move(torch.cat([torch.arange(count), index]).sort().values)    # none is empty
    first = torch.searchsorted(index, move(torch.arange(count + 1)))

    def ours():
        return common.segment_mean(points, first)

    def scattered():
        total = common.segment_sum(points, index, count)
        return total / first.diff()[:, None]

    same(ours(), scattered(), 1e-5, "segment means")
    compare(rounds, f"9 segment_mean (torch-scatter), C={points.shape[1]}", "segment_sum / counts",
            1.03, ours, scattered, "seen <=")


def bench_segment_sum(rounds, index, count, C, order):
    index = move(index.sort().values if order == "sorted" else index)
    values = move(torch.randn(len(index), C))

    def ours():
        return common.segment_sum(values, index, count)

    def plain():
        return values.new_zeros(count, C).index_add_(0, index, values)

    same(ours(), plain(), 1e-5, "segment sums")
    compare(rounds, f"9 segment_sum (torch-scatter), C={C}, {order}", "index_add_", 1.03,
            ours, plain, "seen <=")


def bench_curvature(rounds, xyz, k=32):
    """Row 5. xyz (N, 3) array."""
    if cpu_only("5 surface variation"):
        return

    def nearest():
        return cKDTree(xyz).query(xyz, k)[1]

    def obvious():
        near = xyz.astype(np.float64)[nearest()]                          # (N, k, 3)
        offset = near - near.mean(1, keepdims=True)
        products = offset[..., :, None] * offset[..., None, :]            # (N, k, 3, 3)
        values = np.linalg.eigh(products.mean(1))[0]
        return values[:, 0] / values.sum(1).clip(1e-12)

    def ours():
        return common.surface_variation(xyz, xyz, k)

    variation, exact = ours(), obvious()
    error = np.abs(variation - exact).max()
    top = min(8192, len(xyz) // 4)
    in_both = np.intersect1d(np.argsort(variation)[-top:], np.argsort(exact)[-top:])
    assert error < 1e-4, f"surface variation differs from float64 by {error:.2g}"
    a, tree, b = timed(rounds, ours, nearest, obvious)
    row(f"5 surface variation, {len(xyz)} points, k={k}", "cKDTree build and query alone",
        a / tree, "<=", 1.3, a, tree)
    row("", "cKDTree + outer products + eigh, fp64", a / b, "seen <=", 0.54, a, b)
    row("  max |difference|", "float64", error, "<=", 1e-6)
    row(f"  overlap of the top {top}", "float64", len(in_both) / top, ">=", 0.999)


# ---- rendering and images ------------------------------------------------------------

def sample_volume(volume, index):
    """F.grid_sample in place of multilinear and gather_weighted.

    volume (1, C, Z, Y, X), index (M, 3) fractional cells z, y, x -> (M, C)
    """
    at = index / (index.new_tensor(volume.shape[2:]) - 1) * 2 - 1
    at = at.flip(1).view(1, 1, 1, -1, 3)
    return F.grid_sample(volume, at, "bilinear", "border", True)[0, :, 0, 0].t()


PLAINLY = dict(    # what clap.py's field uses, by F.grid_sample
    multilinear=lambda index, shape: (index, None),
    gather_weighted=lambda volume, index, _: sample_volume(volume, index),
)


def as_table(volume):
    """volume (1, C, Z, Y, X) -> (Z Y X, C)"""
    return volume.permute(0, 2, 3, 4, 1).reshape(-1, volume.shape[1])


def shoot(xyz, grid, R):
    """R rays from the LiDAR to its points. xyz (M, 3) m

    -> origin (R, 3), direction (R, 3), range (R,) m, where they leave the volume (R,) m
    """
    away = xyz[move(torch.randperm(len(xyz))[:R])]
    origin = torch.zeros_like(away)
    direction = F.normalize(away, dim=1)
    far = common.box_exit(origin, direction, grid.low, grid.high)
    return origin, direction, away.norm(dim=1), far


def field_step(plain, end, noise, u, field, volume, origin, direction):
    """Render, backward to the volume and all weights -> gradients.

    plain: by grid_sample, else from a table, whose change of layout is paid for.
    """
    b = torch.zeros(len(origin), dtype=torch.int64, device=origin.device)
    with mock.patch.multiple(clap, **PLAINLY) if plain else contextlib.nullcontext():
        features = volume if plain else as_table(volume)
        r, c = field.render(features, origin, direction, b, end, noise, u, colour=True)
    return torch.autograd.grad(r.sum() + c.sum(), [volume, *field.parameters()])


def bench_rendering(rounds, xyz, grid, R=2048, C=32, S=72, finer=24, reach=60.0):
    """Row 6: R rays from the LiDAR to its points, samples as in the paper's preset.

    xyz (M, 3) m
    """
    torch.manual_seed(0)
    cells = common.VoxelResNet(grid.low, grid.high, grid.voxel).cells[-1]
    volume = move(torch.randn(1, C, *cells.shape)).requires_grad_()
    origin, direction, surface, far = shoot(xyz, grid, R)
    samples = move(torch.rand(len(far), S + finer))
    depth = common.stratified(torch.full_like(far, clap.NEAR), far, samples)
    bench_trilinear(rounds, volume, cells, (direction[:, None] * depth[..., None]).view(-1, 3))

    field = move(clap.Field(C, cells, 1 / max(grid.high)))
    inside = float((far - clap.NEAR).mean()) / (reach - clap.NEAR)    # of the way to `reach`
    jitter = move(torch.rand(len(far), S))
    jitter_to_reach = move(torch.rand(len(far), round(S / inside)))
    u = move(torch.rand(len(far), finer))
    # In float64: alpha's kink makes single precision jump.
    exact = [v.double()
             for v in (far, jitter, u, copy.deepcopy(field), volume, origin, direction)]
    for g, g_plain in zip(field_step(False, *exact), field_step(True, *exact)):
        same(g, g_plain, 1e-6, "gradient of the field step")

    scene = u, field, volume, origin, direction
    # The field of a surface at each point. That of noise would underflow, which is slow.
    sdf = ((surface[:, None] - depth) * field.scale).requires_grad_()
    beyond = torch.full_like(far, reach)

    def weights():
        """Both evaluations of a step: where to look closer, without gradient; all samples."""
        with torch.no_grad():
            common.neus_weights(sdf[:, :S], 64.0)
        return torch.autograd.grad(common.neus_weights(sdf, field.h.detach()).sum(), sdf)

    a, equal, obvious, part = timed(
        rounds,
        lambda: field_step(False, far, jitter, *scene),
        lambda: field_step(True, far, jitter, *scene),
        lambda: field_step(True, beyond, jitter_to_reach, *scene),
        weights)
    row(f"  field step fwd+bwd, {len(far)} rays x {S} + {finer}",
        f"grid_sample, to {reach:.0f} m ({inside:.0%} inside)", a / obvious, "<=", 0.5, a, obvious)
    row("", "grid_sample, the same samples", a / equal, "<=", 1, a, equal)
    row("  compositing", "share of the field step", part / a, "<=", 0.02, part, a)


def bench_trilinear(rounds, volume, cells, xyz):
    """Samples of a volume (1, C, Z, Y, X) at positions (M, 3) m, forward and backward."""
    C = volume.shape[1]
    table = as_table(volume.detach()).requires_grad_()
    grad = move(torch.randn(len(xyz), C))

    def gather():
        return common.gather_weighted(table, *common.multilinear(cells.index(xyz), cells.shape))

    def plain():
        return sample_volume(volume, cells.index(xyz))

    def gather_gradient():
        return torch.autograd.grad(gather(), table, grad)

    def plain_gradient():
        return torch.autograd.grad(plain(), volume, grad)

    same(gather(), plain(), 1e-4, "trilinear samples")
    same(gather_gradient()[0], as_table(plain_gradient()[0]), 1e-3,
         "gradient of trilinear samples")
    compare(rounds, f"6 trilinear fwd+bwd, {len(xyz)} samples, C={C}", "F.grid_sample", 0.5,
            gather_gradient, plain_gradient)


def bench_images(rounds, frame, key, C=64):
    """Row 7: the keyframe sweep's points (N, 3) into six feature maps of stride 4."""
    H, W = frame.images[0].shape[1:]
    matrix = move(torch.from_numpy(frame.lidar2img))
    hw = move(torch.tensor([image.shape[1:] for image in frame.images]))
    features = torch.randn(len(matrix), C, H // 4, W // 4, generator=seeded(0))
    features = move(features).to(memory_format=torch.channels_last)    # as the networks make them

    def ours():
        point, image, uv, _ = common.project(key, [len(key)], matrix, hw)
        return point, image, common.sample_image(features, image, uv, (H, W))

    def everywhere():
        uvd = key @ matrix[:, :3, :3].transpose(1, 2) + matrix[:, None, :3, 3]    # (K, N, 3)
        uv = uvd[..., :2] / uvd[..., 2:].clamp_min(0.1)
        in_image = ((uv >= 0) & (uv < hw[:, None].flip(-1))).all(-1)              # (K, N)
        seen = (uvd[..., 2] > 0.1) & in_image                                     # (K, N)
        at = uv / uv.new_tensor([W, H]) * 2 - 1
        values = F.grid_sample(features, at[:, None], "bilinear", "border", False)[:, :, 0]
        return values * seen[:, None], seen

    point, image, values = ours()
    all_values, seen = everywhere()
    assert torch.equal(torch.stack([image, point], 1), seen.nonzero()), "points in view differ"
    same(values, all_values[image, :, point], 1e-4, "image features")
    compare(rounds, f"7 image features of {len(key)} points",
            "every point in every camera, masked", 0.15, ours, everywhere)


def bench_lift(rounds, frame, cells, camera):
    """Row 15: image features and depths into the volume's cells, every one from every camera.

    camera: a CameraNet, for its sizes.
    """
    batch = move(data.collate([frame], [0]))
    C = camera.channels
    D = camera.bins
    near = camera.near
    reach = camera.max_depth
    H, W = batch.images.shape[-2:]
    torch_rng = seeded(0)
    matrix = batch.lidar2img
    centres = cells.centres(batch.hw.device)                                      # (V, 3)

    def random_maps(channels):
        maps = torch.randn(len(matrix), channels, H // 8, W // 8, generator=torch_rng)
        return move(maps).to(memory_format=torch.channels_last)

    features = random_maps(C).requires_grad_()
    chances = random_maps(D).softmax(1).requires_grad_()
    inputs = features, chances
    grad = move(torch.randn(1, C, *cells.shape, generator=torch_rng))

    def ours():
        return camera.lift(*inputs, batch, cells)

    def obvious():
        uvd = centres @ matrix[:, :3, :3].transpose(1, 2) + matrix[:, None, :3, 3]    # (K, V, 3)
        depth = uvd[..., 2]
        uv = uvd[..., :2] / uvd[..., 2:].clamp_min(near)
        in_image = ((uv >= 0) & (uv < batch.hw[:, None].flip(-1))).all(-1)
        seen = (depth > near) & (depth < reach) & in_image                        # (K, V)
        uv = uv / uv.new_tensor([W, H])
        at = torch.cat([uv, (depth[..., None] - near) / (reach - near)], -1) * 2 - 1
        volume = 0.0
        for image, chance, where, visible in zip(*inputs, at, seen):
            pulled = F.grid_sample(image[None], where[None, None, :, :2],
                                   "bilinear", "border", False)[0, :, 0]          # (C, V)
            weight = F.grid_sample(chance[None, None], where[None, None, None],
                                   "bilinear", "border", False)[0, 0, 0]          # (1, V)
            volume = volume + pulled * weight * D * visible
        return volume.view(1, C, *cells.shape), seen.any(0).view(1, *cells.shape)

    volume, seen = ours()
    expected, expected_seen = obvious()
    assert torch.equal(seen, expected_seen), "the cells in view differ"
    same(volume, expected, 1e-4, "lifted volume")
    gradients = torch.autograd.grad(volume, inputs, grad)
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs, grad)):
        same(a, b, 1e-3, "gradient of the lift")
    with torch.no_grad():
        compare(rounds, f"15 lift to {len(centres)} cells, C={C}, D={D}",
                "grid_sample in every camera, masked", None, ours, obvious)
    compare(rounds, "  forward + backward", "the same by autograd", None,
            lambda: torch.autograd.grad(ours()[0], inputs, grad),
            lambda: torch.autograd.grad(obvious()[0], inputs, grad))


def bench_loading(rounds, dataset, i):
    """Row 8: frame i's six pictures, then all of it."""
    if cpu_only("8 loading", "Pillow and OpenCV, in the loader's workers"):
        return
    name = dataset.name(i)
    height, width = dataset.grid.image
    cameras = dataset.sensors[dataset.frames[i]["sensors"][1:]]
    files = [os.path.join(dataset.root, camera["file"].decode()) for camera in cameras]

    def ours():
        return np.stack([data.read_image(file, (height, width), name)[0] for file in files])

    def full():
        pictures = []
        for file in files:
            with Image.open(file) as image:
                scale = max(height / image.height, width / image.width)
                size = round(image.width * scale), round(image.height * scale)
                whole = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
            left = (whole.width - width) // 2
            top = whole.height - height
            cropped = whole.crop((left, top, left + width, top + height))
            pictures.append(np.array(cropped).transpose(2, 0, 1))
        return np.stack(pictures)

    psnr = 10 * np.log10(255 ** 2 / np.mean((ours().astype(float) - full()) ** 2))
    assert psnr > 40, f"{name}: pictures differ from a full decode, PSNR {psnr:.1f} dB"
    compare(rounds, f"8 six pictures to {height} x {width}", "PIL full decode + resize", 0.6,
            ours, full)
    row("  PSNR, dB", "PIL full decode + resize", psnr, ">=", 45)
    clouds = len(np.unique(dataset.load(i).points[:, 4]))
    single = copy.copy(dataset)
    single.grid = dataclasses.replace(dataset.grid, sweeps=1)
    whole, key, decoded = timed(rounds, lambda: dataset.load(i), lambda: single.load(i), full)
    for ms, sweeps in ((key, 1), (whole, clouds)):
        row(f"  load, {sweeps} sweeps", "PIL full decode + resize, no points",
            ms / decoded, "<=", 0.6, ms, decoded)
        row("", "frames/s of one core", 1e3 / ms, "seen >=", 30 if sweeps == 1 else None)


# ---- matching and boxes --------------------------------------------------------------

def torch_fps(xyz, count):
    """The farthest-point loop that is copied from file to file, torch, one cloud.

    Distances of all points to the last chosen. xyz (n, 3) -> (count,)
    """
    chosen = torch.zeros(count, dtype=torch.int64)
    nearest = torch.full((len(xyz),), 1e10)
    at = torch.zeros((), dtype=torch.int64)
    for i in range(count):
        chosen[i] = at
        nearest = torch.minimum(nearest, ((xyz - xyz[at]) ** 2).sum(-1))
        at = nearest.argmax()
    return chosen


def sorted_ball(centres, sources, radius, k):
    """Every distance, rows out of reach set to the number of sources, one sort of all.

    -> (m, k) rows of sources in order, filled up with the first
    """
    index = torch.arange(len(sources), device=sources.device).expand(len(centres), -1).clone()
    distance = torch.cdist(centres, sources, compute_mode="donot_use_mm_for_euclid_dist")
    index[distance >= radius] = len(sources)
    index = index.sort(1).values[:, :k]
    return torch.where(index == len(sources), index[:, :1], index)


def fpsample_pieces(cloud, count):
    """fpsample's exact samplers -> [(name, function or None)].

    Their first points are their own: asserted to choose what ours does from there.
    """
    fpsample = installed("fpsample")

    def plain():
        return fpsample.fps_sampling(cloud, count, start_idx=0)

    def bucket():
        return fpsample.bucket_fps_kdline_sampling(cloud, count, h=5, start_idx=0)

    pieces = [("fpsample fps_sampling", fpsample and plain),
              ("fpsample bucket_fps_kdline_sampling", fpsample and bucket)]
    for name, piece in pieces if fpsample else ():
        rows = piece().astype(np.int64)
        first = rows[0]
        ours = (simipu.farthest_points(np.roll(cloud, -first, 0), count) + first) % len(cloud)
        # As sets of points: rows may repeat a point.
        chosen, expected = (np.unique(cloud[index], axis=0) for index in (rows, ours))
        assert np.array_equal(chosen, expected), f"{name} chooses other points"
    return pieces


def bench_matching(rounds, xyz):
    """Rows 10 to 12: sampling, neighbours and pairs of SimIPU on a real sweep.

    xyz (N, 3) array, at least 16384 points, else with repetition.
    """
    rng = np.random.default_rng(0)
    cloud = xyz[rng.choice(len(xyz), 16384, replace=len(xyz) < 16384)]
    chosen = simipu.farthest_points(cloud, 4096)
    if not cpu_only("10 farthest points"):
        as_tensor = torch.from_numpy(cloud)
        expected = torch_fps(as_tensor, 4096)
        assert torch.equal(torch.from_numpy(chosen), expected), "farthest points differ"
        compare(rounds, "10 farthest points, 16384 to 4096", "the usual torch loop", 0.15,
                lambda: simipu.farthest_points(cloud, 4096), lambda: torch_fps(as_tensor, 4096),
                peers=fpsample_pieces(cloud, 4096))
    sources = move(torch.from_numpy(cloud))[None]
    centres = sources[:, move(torch.from_numpy(chosen))]
    for radius in (0.4, 1.6):
        bench_ball(rounds, centres, sources, radius)
    if cpu_only("12 pairs", "scipy, in the loader's workers"):
        return
    T, _ = simipu.random_transform(np.random.default_rng(1), np.zeros(3), 1.5708, 0.25)
    for n, target in ((1024, 0.6), (4096, 0.25)):
        # Two views: each has its own start of the farthest points.
        orders = rng.permutation(len(cloud)), rng.permutation(len(cloud))
        ids = [order[simipu.farthest_points(cloud[order], n)] for order in orders]
        bench_pairs(rounds, cloud, T, *ids, target)


def bench_ball(rounds, centres, sources, radius, k=32):
    """Row 11. centres (1, m, 3), sources (1, n, 3), radius m"""
    torch_cluster = installed("torch_cluster")

    def ours():
        return simipu.ball_query(centres, sources, (radius,), (k,))

    def plain():
        return sorted_ball(centres[0], sources[0], radius, k)

    def peer():
        """-> (2, P) rows of centres and of sources, at most k a centre, any in reach"""
        return torch_cluster.radius(sources[0], centres[0], radius, max_num_neighbors=k)

    index = ours()[0]
    equal = (index == plain()).all(1).float().mean()
    assert equal > 0.999, "neighbours differ"    # but for those within rounding of the radius
    if torch_cluster:
        count = 1 + (index != index[:, :1]).sum(1)
        equal = (torch.bincount(peer()[0], minlength=len(index)) == count).float().mean()
        assert equal > 0.999, "torch_cluster finds other neighbours"
    compare(rounds, f"11 ball query of {centres.shape[1]}, {radius} m, {k} of them",
            "all distances, one sort", 0.1, ours, plain,
            peers=[("torch_cluster.radius, any 32", torch_cluster and peer)])


def bench_pairs(rounds, cloud, T, id_a, id_b, target):
    """Row 12: pairs of two views, each a choice of the cloud's rows, moved by T."""
    a, b = (cloud[ids] @ T[:3, :3].T + T[:3, 3] for ids in (id_a, id_b))
    n = len(a)
    cost = cdist(a, b)
    best = cost[linear_sum_assignment(cost)].sum()
    total = cost[np.arange(n), common.pair_points(a, b, id_a, id_b)].sum()
    assert abs(total / best - 1) < 1e-6, "the pairs are not optimal"
    in_both = len(np.intersect1d(id_a, id_b)) / n
    compare(rounds, f"12 pairs of {n}, {in_both:.0%} in both views",
            "scipy's assignment alone, with its costs", target,
            lambda: common.pair_points(a, b, id_a, id_b),
            lambda: linear_sum_assignment(cdist(a, b)))


def random_boxes(rng, count):
    """Turned boxes strewn as in a busy frame -> x, y, l, w, yaw (count, 5)."""
    xy = rng.uniform(-50, 50, (count, 2))
    size = rng.uniform(0.5, 5, (count, 2))
    return np.column_stack([xy, size, rng.uniform(-4, 4, count)])


def polygon(box):
    """A shapely polygon."""
    x, y, l, w, yaw = box
    shape = shapely.box(-l / 2, -w / 2, l / 2, w / 2)
    shape = shapely.affinity.rotate(shape, yaw, (0, 0), use_radians=True)
    return shapely.affinity.translate(shape, x, y)


def bench_overlap(rounds):
    """Row 13: shared area of 500 x 500 turned boxes."""
    if cpu_only("13 shared area of turned boxes", "shapely, in the evaluation"):
        return
    rng = np.random.default_rng(0)
    a = random_boxes(rng, 500)
    b = random_boxes(rng, 500)

    def plain():
        polygons_a = [polygon(box) for box in a]
        polygons_b = [polygon(box) for box in b]
        return np.array([[one.intersection(two).area for two in polygons_b]
                         for one in polygons_a])
    assert np.abs(finetune.shared_area(a, b) - plain()).max() < 1e-9, "shared areas differ"
    compare(1, "13 shared area of 500 x 500 turned boxes", "shapely in two loops", 0.05,
            lambda: finetune.shared_area(a, b), plain, "seen <=")


# ---- how cost grows ------------------------------------------------------------------

def sizes(most):
    """Four sizes over a decade."""
    return [round(most * 10 ** (i / 3 - 1)) for i in range(4)]


def fit(rounds, what, counts, pieces):
    """Print the ms of each size, and the exponent by least squares in logarithms."""
    times = timed(rounds, *pieces)
    exponent = np.polyfit(np.log(counts), np.log(times), 1)[0]
    columns = "  ".join(f"{n:7d}: {ms:8.1f}" for n, ms in zip(counts, times))
    print(f"{what:46.46}{columns}{exponent:10.2f}", flush=True)


def bench_scaling(rounds, net, levels, points, b, sweep, grid):
    """Time at four sizes and the exponent of its growth.

    1 is linear, less has a constant part.
    """
    print(f"{'':46}{'size: ms':>18}{'':54}{'exponent':>10}")
    mixed = move(torch.randperm(len(points), generator=seeded(0)))

    def voxelise(rows):
        return net.voxelise(points[rows], b[rows], 1)

    counts = sizes(len(points))
    parts = [mixed[:n].sort().values for n in counts]
    fit(rounds, "points: voxelise", counts, [partial(voxelise, rows) for rows in parts])

    coords, _, cells, _ = levels[1]
    pad = net.pads[1]
    weight = move(torch.randn(27, 32, 32))
    from_middle = coords[:, 2:] - coords.new_tensor(cells.shape[1:]) / 2
    bearing = torch.atan2(*from_middle.unbind(1)).argsort()    # a sector is as dense as the whole
    x = move(torch.randn(len(coords), 32))

    def convolve(coords):
        common.strided_map(coords, cells.shape, pad, 1)
        kmap = common.submanifold_map(coords, cells.shape, 1)
        return common.SparseConvolution.apply(x[:len(coords)], weight, kmap)

    counts = sizes(len(coords))
    sectors = [coords[bearing[:n].sort().values] for n in counts]
    fit(rounds, "voxels: both maps, one convolution C=32", counts,
        [partial(convolve, sector) for sector in sectors])

    xyz = sweep[sweep[:, :3].norm(dim=1) > clap.CLOSE, :3]
    origin, direction, _, far = shoot(xyz, grid, 8192)
    volume = move(torch.randn(1, 32, *net.cells[-1].shape)).requires_grad_()
    field = move(clap.Field(32, net.cells[-1], 1 / max(grid.high)))
    jitter = move(torch.rand(len(far), 72))
    u = move(torch.rand(len(far), 24))

    def render(n):
        return field_step(False, far[:n], jitter[:n], u[:n], field, volume, origin[:n],
                          direction[:n])

    counts = sizes(len(far))
    fit(rounds, "rays: rendering step, fwd+bwd", counts, [partial(render, n) for n in counts])

    def trunk(points, b, size):
        return net.eval()(points, b, size)

    counts = sizes(10)
    frames = [(sweep.repeat(n, 1), move(torch.arange(n).repeat_interleave(len(sweep))), n)
              for n in counts]
    with torch.no_grad():
        fit(rounds, f"frames of {len(sweep)} points: VoxelResNet forward", counts,
            [partial(trunk, *frame) for frame in frames])


# ---- clap.py's samplers --------------------------------------------------------------

def sample_with(sampler, run, rounds):
    """Steps of a finished run's model under one sampler, in a process of its own.

    -> share on boxes, share on the ground, median CPU ms of a step, peak GiB
    """
    torch.set_num_threads(1)
    common.keep_large_buffers()
    stored = json.loads((Path(run) / "config.json").read_text())
    fields = {f.name: stored[f.name] for f in dataclasses.fields(clap.Config)}
    cfg = clap.Config(**fields | {"sampler": sampler})
    loader = data.loader(cfg.data, "val", cfg.batch, seed=cfg.seed, preset=cfg.preset,
                         prepare=clap.Curvature(cfg.neighbours))
    model = clap.CLAP(cfg, loader.grid)
    model.load_state_dict(torch.load(Path(run) / "last.pt", weights_only=True)["model"])
    shares, times = [], []
    for _, batch in zip(range(rounds), loader.begin_at(0)):
        begin = time.process_time()
        loss, terms = model(batch)
        loss.backward()
        shares.append([float(terms[name].detach()) for name in ("on_boxes", "on_ground")])
        times.append(1e3 * (time.process_time() - begin))
    return [*np.mean(shares, 0), np.median(times[1:]), common.peak_memory()]


def bench_samplers(run, rounds):
    """Ratios to uniform sampling. The weights of `sdf` come from the run's own field."""
    print(f"{run}, {rounds} passes forward and backward over held-out frames, 1 thread")
    print(f"{'sampler':10}{'on boxes':>10}{'on ground':>11}{'ms a step':>11}{'ratio':>8}"
          f"{'peak GiB':>10}{'ratio':>8}")
    rows = {}
    for sampler in ("uniform", "pca", "sdf"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows[sampler] = pool.submit(sample_with, sampler, run, rounds).result()
    _, _, ms_uniform, memory_uniform = rows["uniform"]
    for sampler, (boxes, ground, ms, memory) in rows.items():
        print(f"{sampler:10}{boxes:10.1%}{ground:11.1%}{ms:11.0f}{ms / ms_uniform:8.3f}"
              f"{memory:10.2f}{memory / memory_uniform:8.3f}")


# ---- all of it -----------------------------------------------------------------------

def print_machine(rounds):
    print(f"{os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, "
          f"load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")
    if DEVICE.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, wall ms until it is done, "
              f"medians of {rounds} interleaved rounds\n"
              "the targets are those of one CPU thread: nothing is demanded here")
    else:
        print(f"1 thread, CPU ms, medians of {rounds} interleaved rounds\n"
              "common.keep_large_buffers() is on, as in training on a CPU: "
              "it spares the alternatives more page faults than us")


def first_levels(net, points, b):
    """The voxels of the first three resolutions, without features in the second and third."""
    levels = [net.voxelise(points, b, 1)]
    for pad, cells in zip(net.pads[:2], net.cells[1:]):
        last = levels[-1]
        coords = common.strided_map(last.coords, last.cells.shape, pad, 1)[0]
        levels.append(common.Level(coords, None, cells, 1))
    return levels


def main():
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where the torch pieces run")
    parser.add_argument("--scaling", action="store_true",
                        help="measure how cost grows with size instead")
    parser.add_argument("--samplers", metavar="RUN",
                        help="compare clap.py's samplers on this finished run instead")
    args = parser.parse_args()
    rounds = 3 if args.quick else 7
    DEVICE = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU on this machine; leave the flag out")
    if args.samplers:
        return bench_samplers(args.samplers, 3 * rounds)

    torch.set_num_threads(1)
    common.keep_large_buffers()
    named = os.environ.get("NUSCENES")
    root = Path(named) if named else (
        Path(__file__).resolve().parents[2] / "shared" / "real" / "nuscenes")
    real = root.is_dir()
    dataset = data.open_dataset(root if real else "", "paper" if real else "small")
    last = len(dataset) - 1
    frame = dataset.load(last)
    grid = dataset.grid
    if real:         # one frame has ten sweeps
        cloud = frame.points
    else:            # ten frames laid over each other
        cloud = np.concatenate([dataset.load(i).points for i in range(10)])
    points = move(torch.from_numpy(cloud))
    b = move(torch.zeros(len(cloud), dtype=torch.int64))
    sweep = move(torch.from_numpy(frame.points[frame.points[:, 4] == 0]))
    key = sweep[:, :3].contiguous()
    print_machine(rounds)
    print(f"input: {frame.name if real else 'ten frames of the embedded world'}, "
          f"{len(points)} points, {len(key)} of one sweep", flush=True)

    net = move(common.VoxelResNet(grid.low, grid.high, grid.voxel))
    levels = first_levels(net, points, b)
    if args.scaling:
        return bench_scaling(rounds, net, levels, points, b, sweep, grid)

    print(f"{'':84}{'ours':>9}{'other':>10}{'peer':>10}{'ratio':>10}{'target':>12}", flush=True)
    bench_maps(rounds, levels[0], net.pads[0])
    for level, C, share in zip(levels, (16, 32, 64), (0.24, 0.28, 0.52)):
        bench_convolution(rounds, level, C, share)
    bench_trunk(min(rounds, 3), net, points, b)    # half a minute a round
    bench_voxels(rounds, net, points, b)
    bench_curvature(rounds, key.cpu().numpy())
    away = key[key.norm(dim=1) > clap.CLOSE]
    bench_rendering(rounds, away, data.GRIDS["nuscenes", "paper"])
    bench_images(rounds, frame, key)
    bench_lift(rounds, frame, net.cells[-1], move(common.CameraNet(18)))
    bench_matching(rounds, key.cpu().numpy())
    bench_overlap(rounds)
    if real:
        bench_loading(rounds, dataset, last)
    else:
        print("8 loading: skipped, it wants real 1600 x 900 pictures and there is no folder "
              f"{root} (NUSCENES is {named or 'not set'})")
    missed = [words for _, words, miss in PRINTED if miss]
    print(f"{len(missed)} rows miss a demand by more than a fifth"
          + "".join(f"\n  {words}" for words in missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
