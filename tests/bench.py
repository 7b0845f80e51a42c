"""The hot pieces against what one would write first and against peer libraries: ratios of CPU time in one process with one thread.

    python tests/bench.py                   # real nuScenes frames in $NUSCENES or ../shared/real/nuscenes, else the embedded world
    python tests/bench.py --quick           # fewer rounds
    python tests/bench.py --device cuda     # the torch pieces on a GPU: wall time after it is done; without demands, the targets are one CPU thread's
    python tests/bench.py --scaling         # how cost grows with points, voxels, rays and frames
    python tests/bench.py --samplers runs/clap       # the three samplers of a finished run: what they look at, time and memory of a step

A row: median ms of our piece, of the alternative or of a peer (spconv, fpsample, torch_cluster, open3d: measured where they can be imported), the ratio, the target
of performance.md ("seen": not a demand there, but implied by what it measured; none: only to know). The verdict: ok; ok* = within 1.2 times the target, the noise of
single runs; miss. A miss of a demand makes the exit status 1. Each pair is first asserted to compute the same. On a CPU wall time plays no part.
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
from itertools import product
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"        # read when numpy and torch are imported
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

DEVICE = torch.device("cpu")            # of --device
PRINTED = []                            # (piece, its row in words, whether it misses a demand)


def move(x):
    """A tensor, module or batch on the device that is measured."""
    return x.to(DEVICE)


def cpu_only(what, why="numpy, in the loader's workers"):
    """Whether to pass over a piece that does not run on the GPU that is measured; then it says so."""
    if DEVICE.type == "cuda":
        print(f"{what:46.46}CPU only: {why}", flush=True)
    return DEVICE.type == "cuda"


def installed(name):
    """The module of a peer; None where it is not there or not built for this torch, or not for the GPU that is measured."""
    try:
        found = importlib.import_module(name)
    except Exception:                   # whatever a library raises when it was built for another torch
        return None
    return None if DEVICE.type == "cuda" and getattr(getattr(found, "ops", None), "CPU_ONLY_BUILD", False) else found       # spconv's name for it


def clock():
    """s of this process's CPU time; on a GPU of wall time, once all work is done."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(rounds, *pieces):
    """Median ms of each function after one call to warm up, None for None; the rounds are interleaved, so what else the machine does meets all alike."""
    spent = [[] for _ in pieces]
    for turn in range(rounds + 1):
        for piece, ms in zip(pieces, spent):
            if piece is not None:
                begin = clock()
                piece()
                if turn:
                    ms.append(1e3 * (clock() - begin))
    return [float(np.median(ms)) if ms else None for ms in spent]


def row(what, against, value, sign="", target=None, ours=None, other=None, peer=None):
    """Print one line. value against target ("<=" or ">=", None: none); ours, other or peer ms where the value is their ratio; value None: the peer is not installed."""
    verdict, demand = "", ""
    if value is not None and target is not None:
        excess = value / target if sign.endswith("<=") else target / max(value, 1e-12)
        verdict = "ok" if excess <= 1 else "ok*" if excess <= 1.2 else "miss"
    if target is not None:
        sign = "CPU " + sign[-2:] if DEVICE.type == "cuda" else sign
        demand = f"{sign:>7} {target:<7g}"
    times = "".join(f"{ms:{width}.1f}" if ms is not None else " " * width for ms, width in ((ours, 9), (other, 10), (peer, 10)))
    times = f"{times:29}{value:10.3g}" if value is not None else f"{times[:19]}{'not installed':>20}"
    line = f"{against:38.38}{times}  {demand:15}{verdict}".rstrip()
    print(f"{what:46.46}{line}", flush=True)
    piece = what if what[:1].strip() else PRINTED[-1][0] if not what else f"{PRINTED[-1][0].partition(': ')[0]}: {what.strip()}"
    PRINTED.append((piece, f"{piece}; {against}: {value and format(value, '.3g')}, demanded {demand.strip()}", verdict == "miss" and sign in ("<=", ">=")))


def compare(rounds, what, against, target, ours, other, sign="<=", peers=()):
    """peers: (name, function or None where it is not installed, sign and target where it has one)."""
    a, b, *theirs = timed(rounds, ours, other, *(peer[1] for peer in peers))
    row(what, against, a / b, sign, target, a, b)
    for (name, _, *demand), c in zip(peers, theirs):
        row("", name, c and a / c, *demand, ours=a, peer=c)


def same(a, b, tolerance, what):
    """Largest |a - b| over the largest |b|, asserted to be within tolerance."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)}, expected {tuple(b.shape)}"
    error = float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
    assert error <= tolerance, f"{what}: relative difference {error:.2g}, expected at most {tolerance}"
    return error


# ---- sparse convolution ----------------------------------------------------------------------------------------------------------

def searched_map(coords, shape):
    """Submanifold map by 27 binary searches, in the order of coords (V, 4) -> ins (P,), outs (P,), counts."""
    padded = [s + 2 for s in shape]
    keys = common.ravel(coords + coords.new_tensor([0, 1, 1, 1]), padded)
    table, order = keys.sort()
    ins, outs = [], []
    for z, y, x in product((-1, 0, 1), repeat=3):
        wanted = keys + (z * padded[1] + y) * padded[2] + x
        at = torch.searchsorted(table, wanted).clamp_max(len(table) - 1)
        outs.append((table[at] == wanted).nonzero()[:, 0])
        ins.append(order[at[outs[-1]]])
    return torch.cat(ins), torch.cat(outs), [len(o) for o in outs]


def candidate_map(coords, shape, pad):
    """Strided map by 27 candidates a voxel, masked by parity and range, and one unique -> coords (V', 4), ins (P,), outs (P,), counts."""
    out_shape = [(n + 2 * p - 3) // 2 + 1 for n, p in zip(shape, pad)]
    keys, ins = [], []
    for t in product((0, 1, 2), repeat=3):
        v = coords[:, 1:] + coords.new_tensor(pad) - coords.new_tensor(t)
        ins.append(((v % 2 == 0) & (v >= 0) & (v // 2 < coords.new_tensor(out_shape))).all(1).nonzero()[:, 0])
        keys.append(common.ravel(torch.cat([coords[ins[-1], :1], v[ins[-1]] // 2], 1), out_shape))
    unique, outs = torch.unique(torch.cat(keys), return_inverse=True)
    return common.unravel(unique, out_shape), torch.cat(ins), outs, [len(i) for i in ins]


def counts_of(kmap):
    """Pairs of each of the 27 offsets."""
    return kmap.ends.diff(prepend=kmap.ends.new_zeros(1)).tolist()


def by_offset(ins, outs, counts):
    """Pairs (P, 3) offset, in, out in one order. An offset joins an input with one output only."""
    offset = torch.repeat_interleave(move(torch.tensor(counts)))
    return torch.stack([offset, ins, outs], 1)[torch.argsort(offset * (int(ins.max()) + 1) + ins)]


def spconv_map(spconv, coords, shape, stride, pad):
    """coords (V, 4) int32 -> coords (V', 4) int32 in any order, pairs (2, 27, V) int32, counts (27,)."""
    return spconv.ops.get_indice_pairs(coords, 1, list(shape), spconv.ConvAlgo.Native, [3] * 3, [stride] * 3, list(pad), [1] * 3, [0] * 3, subm=stride == 1)


def spconv_pairs(out, pairs, counts, shape):
    """What spconv_map gave, as by_offset has it, the outputs in order. Of a submanifold map it lists the first 13 offsets only; the rest is implied."""
    there = torch.arange(pairs.shape[2], device=pairs.device) < counts[:, None]
    rank = common.ravel(out.long(), shape).argsort().argsort()
    return by_offset(pairs[0][there].long(), rank[pairs[1][there].long()], counts.tolist())


def bench_maps(rounds, level, pad):
    """Ours wants sorted voxels, which voxelise and strided_map give: the sort is in row 4. spconv gets them sorted too."""
    coords, shape, spconv = level.coords, level.cells.shape, installed("spconv.pytorch")
    narrow = coords.int()
    mixed = move(torch.randperm(len(coords), generator=torch.Generator().manual_seed(0)))
    shuffled = coords[mixed]
    kmap, (ins, outs, counts) = common.submanifold_map(coords, shape), searched_map(shuffled, shape)
    pairs = by_offset(kmap.ins, kmap.outs, counts_of(kmap))
    assert torch.equal(pairs, by_offset(mixed[ins], mixed[outs], counts)), "submanifold maps differ"
    assert torch.equal(pairs, by_offset(*searched_map(coords, shape))), "submanifold maps differ"
    if spconv:
        theirs = spconv_pairs(*spconv_map(spconv, narrow, shape, 1, (1, 1, 1)), shape)
        assert len(theirs) >= (len(pairs) - len(coords)) // 2 and torch.equal(pairs[:len(theirs)], theirs), "submanifold maps differ from spconv's"
    what = f"1 submanifold map, {len(coords)} voxels"
    a, plain, ordered, peer = timed(rounds, lambda: common.submanifold_map(coords, shape), lambda: searched_map(shuffled, shape),
                                    lambda: searched_map(coords, shape), spconv and (lambda: spconv_map(spconv, narrow, shape, 1, (1, 1, 1))))
    row(what, "27 searches, voxels in any order", a / plain, "seen <=", 0.11, a, plain)
    row("", "27 searches, sorted voxels", a / ordered, "<=", 0.3, a, ordered)
    row("", "spconv get_indice_pairs", peer and a / peer, "<=", 0.5, a, peer=peer)

    out, kmap = common.strided_map(coords, shape, pad)
    pairs, (out_, ins, outs, counts) = by_offset(kmap.ins, kmap.outs, counts_of(kmap)), candidate_map(coords, shape, pad)
    assert torch.equal(out, out_) and torch.equal(pairs, by_offset(ins, outs, counts)), "strided maps differ"
    if spconv:
        theirs, half_shape = spconv_map(spconv, narrow, shape, 2, pad), level.cells.halved(pad).shape
        assert len(out) == len(theirs[0]) and torch.equal(pairs, spconv_pairs(*theirs, half_shape)), "strided maps differ from spconv's"
    compare(rounds, f"2 strided map, to {len(out)}", "27 candidates, parity masks, unique", 0.17,
            lambda: common.strided_map(coords, shape, pad), lambda: candidate_map(coords, shape, pad), "seen <=",
            [("spconv get_indice_pairs", spconv and (lambda: spconv_map(spconv, narrow, shape, 2, pad)), "<=", 0.4)])


def masked_convolution(x, weight, table):
    """Autograd on table (27, V) of input rows, -1 = none: a bool mask and advanced indexing an offset."""
    out = x.new_zeros(table.shape[1], weight.shape[2])
    for k in range(27):
        there = table[k] >= 0
        out[there] += x[table[k, there]] @ weight[k]
    return out


def open3d_layer(level, x, weight):
    """open3d's sparse convolution with our weights -> function that searches its neighbours itself, as it always does; None where it is not installed."""
    open3d, C = installed("open3d.ml.torch"), x.shape[1]
    if open3d is None:
        return None
    layer, at = move(open3d.layers.SparseConv(C, C, [3, 3, 3], use_bias=False)), level.coords[:, 1:].flip(1) + 0.5            # x, y, z of the voxels' centres
    layer.kernel.data = weight.detach().view(3, 3, 3, C, C)
    return lambda: layer(x.detach(), at, at, 1.0)


def bench_convolution(rounds, level, C, share):
    kmap, torch_rng = common.submanifold_map(level.coords, level.cells.shape), torch.Generator().manual_seed(C)
    x, grad = move(torch.randn(2, kmap.n_in, C, generator=torch_rng))
    weight = move(torch.randn(27, C, C, generator=torch_rng) / C ** 0.5)
    x.requires_grad_(), weight.requires_grad_()
    counts = counts_of(kmap)
    offset, table = torch.repeat_interleave(move(torch.tensor(counts))), move(torch.full((27, len(kmap.first) - 1), -1))
    table[offset, kmap.outs] = kmap.ins
    chunk = 4096 if DEVICE.type == "cpu" else max(counts)                                  # what stays in a CPU's cache
    buffer, peer = move(torch.empty(chunk, C)), open3d_layer(level, x, weight)

    def ours():
        return common.SparseConvolution.apply(x, weight, kmap)

    @torch.no_grad()
    def products():
        """The matrix products alone, same shapes, into one reused buffer."""
        for k, count in enumerate(counts):
            for a in range(0, count, chunk):
                part = x[a:min(a + chunk, count)]
                torch.mm(part, weight[k], out=buffer[:len(part)])

    true = masked_convolution(x.double(), weight.double(), table)
    error = same(ours(), true, 1e-5, "sparse convolution")
    assert torch.equal(ours(), ours()), "the sparse convolution is not bitwise repeatable"
    for a, b in zip(torch.autograd.grad(ours(), (x, weight), grad), torch.autograd.grad(true, (x, weight), grad.double())):
        same(a, b, 1e-5, "gradient of the sparse convolution")
    if peer:
        same(peer(), true, 1e-4, "open3d's sparse convolution")
    with torch.no_grad():
        a, b, floor, theirs = timed(rounds, ours, lambda: masked_convolution(x, weight, table), products, peer)
    what = f"3 sparse conv C={C}, {kmap.n_in} voxels, {len(kmap.ins) / kmap.n_in:.1f} of 27"
    row(what, "mask and index an offset", a / b, "seen <=", 0.59, a, b)
    row("", "open3d SparseConv, with its search", theirs and a / theirs, ours=a, peer=theirs)
    row("  share of the products' floor", "27 matmuls into a reused buffer", floor / a, ">=", share, a, floor)
    compare(rounds, "  forward + backward", "the same by autograd", 0.71, lambda: torch.autograd.grad(ours(), (x, weight), grad),
            lambda: torch.autograd.grad(masked_convolution(x, weight, table), (x, weight), grad), "seen <=")
    row("  max relative error", "float64", error, "<=", 1e-6)


def spconv_trunk(spconv, net):
    """VoxelResNet's layers as spconv's modules with net's weights, and net's own batch norms -> function of Level 0 that gives the sites of stride 8, the weights."""
    weights, algo = [], spconv.ConvAlgo.Native if DEVICE.type == "cpu" else None           # None: it chooses
    if DEVICE.type == "cpu":
        spconv.ops.get_current_stream = lambda: 0                                          # its backward asks for CUDA's

    def convolution(conv, level, pad=None):
        channels = conv.weight.shape[1:]
        layer = move(spconv.SubMConv3d(*channels, 3, bias=False, indice_key=level, algo=algo) if pad is None
                     else spconv.SparseConv3d(*channels, 3, 2, pad, bias=False, algo=algo))
        layer.weight.data = conv.weight.detach().view(3, 3, 3, *channels).permute(4, 0, 1, 2, 3).contiguous()
        weights.append(layer.weight)
        return layer

    def after(bn, x, more=0):
        return x.replace_feature(F.relu(bn(x.features) + more))

    def down(ours, level, pad=None):
        conv = convolution(ours.conv, level, pad)
        return lambda x: after(ours.bn, conv(x))

    def block(ours, level):
        one, two = convolution(ours.conv1, level), convolution(ours.conv2, level)
        return lambda x: after(ours.bn2, two(after(ours.bn1, one(x))), x.features)

    layers = [down(net.conv_input, "0"), *(block(ours, "0") for ours in net.conv1)]
    for level, pad, (first, *rest) in zip("123", net.pads, (net.conv2, net.conv3, net.conv4)):
        layers += [down(first, None, pad), *(block(ours, level) for ours in rest)]

    def forward(level):
        x = spconv.SparseConvTensor(level.features, level.coords.int(), list(level.cells.shape), 1)
        for layer in layers:
            x = layer(x)
        return x
    return forward, weights


def bench_trunk(rounds, net, points, b):
    """All twenty convolutions from the voxels on, kernel maps included. Batch norms in eval mode; float32 on a GPU too, where training takes bfloat16."""
    spconv, level = installed("spconv.pytorch"), net.eval().voxelise(points, b)
    weights = [part.weight for part in net.modules() if isinstance(part, common.SparseConv)]
    forward = backward = None
    with mock.patch.object(net, "voxelise", lambda *_: level), mock.patch.object(common, "bf16_autocast", lambda _: contextlib.nullcontext()):
        last = net(points, b)[-1]
        grad = move(torch.randn(last.features.shape, generator=torch.Generator().manual_seed(0)))
        if spconv:
            run, theirs = spconv_trunk(spconv, net)

            def ordered():
                """spconv's sites as ours are ordered."""
                sites = run(level)
                order = common.ravel(sites.indices.long(), last.cells.shape).argsort()
                assert torch.equal(sites.indices[order].long(), last.coords), "the sites of stride 8 differ from spconv's"
                return sites.features[order]

            same(ordered(), last.features, 1e-4, "spconv's features of stride 8")
            with mock.patch.object(F, "relu", F.silu):                                     # no kinks, which rounding would cross
                for a, c in zip(torch.autograd.grad(ordered(), theirs, grad), torch.autograd.grad(net(points, b)[-1].features, weights, grad)):
                    same(a.permute(1, 2, 3, 4, 0).reshape(c.shape), c, 1e-4, "gradient of spconv's trunk")
            forward, backward = lambda: run(level), lambda: torch.autograd.grad(run(level).features, theirs, grad)
        with torch.no_grad():
            a, c = timed(rounds, lambda: net(points, b), forward)
        row(f"14 sparse trunk, {len(level.coords)} voxels", "spconv, the same weights", c and a / c, "<=", 1.0, a, peer=c)
        a, c = timed(rounds, lambda: torch.autograd.grad(net(points, b)[-1].features, weights, grad), backward)
        row("  forward + backward", "spconv, the same weights", c and a / c, "<=", 1.05, a, peer=c)


# ---- points ----------------------------------------------------------------------------------------------------------------------

def unique_voxels(net, points, b):
    """Mean of each voxel's points by torch.unique over rows -> coords (V, 4), mean (V, 5)."""
    low, high, voxel = (points.new_tensor(v) for v in (net.low, net.high, net.voxel))
    inside = ((points[:, :3] >= low) & (points[:, :3] < high)).all(1)
    points, b = points[inside], b[inside]
    index = ((points[:, :3] - low) / voxel).long().flip(1)
    coords, of, count = torch.unique(torch.cat([b[:, None], index], 1), dim=0, return_inverse=True, return_counts=True)
    return coords, points.new_zeros(len(coords), 5).index_add_(0, of, points) / count[:, None]


def bench_voxels(rounds, net, points, b):
    level, (coords, mean) = net.voxelise(points, b), unique_voxels(net, points, b)
    assert torch.equal(level.coords, coords), "voxels differ"
    same(level.features, mean, 1e-5, "voxel means")
    compare(rounds, f"4 voxelise {len(points)} points to {len(coords)}", "torch.unique(dim=0) + index_add_", 0.1,
            lambda: net.voxelise(points, b), lambda: unique_voxels(net, points, b))
    if common.torch_scatter is None:
        return print("9 torch-scatter: skipped, it is not installed (or not for this torch); segment_sum is index_add_")
    for C, order in ((5, "sorted"), (64, "random")):
        index = torch.randint(len(coords), (len(points),), generator=torch.Generator().manual_seed(C))
        index, values = move(index.sort().values if order == "sorted" else index), move(torch.randn(len(index), C))
        same(common.segment_sum(values, index, len(coords)), values.new_zeros(len(coords), C).index_add_(0, index, values), 1e-5, "segment sums")
        compare(rounds, f"9 segment_sum (torch-scatter), C={C}, {order}", "index_add_", 1.03, lambda v=values, i=index: common.segment_sum(v, i, len(coords)),
                lambda v=values, i=index: v.new_zeros(len(coords), v.shape[1]).index_add_(0, i, v), "seen <=")
    return None


def bench_curvature(rounds, xyz, k=32):
    if cpu_only("5 surface variation"):
        return

    def nearest():
        return cKDTree(xyz).query(xyz, k)[1]

    def obvious():
        near = xyz.astype(np.float64)[nearest()]                                           # (N, k, 3)
        offset = near - near.mean(1, keepdims=True)
        values = np.linalg.eigh((offset[..., :, None] * offset[..., None, :]).mean(1))[0]
        return values[:, 0] / values.sum(1).clip(1e-12)

    ours, true = common.surface_variation(xyz, xyz, k), obvious()
    error, top = np.abs(ours - true).max(), min(8192, len(xyz) // 4)
    overlap = len(np.intersect1d(np.argsort(ours)[-top:], np.argsort(true)[-top:])) / top
    assert error < 1e-4, f"surface variation differs from float64 by {error:.2g}"
    a, tree, b = timed(rounds, lambda: common.surface_variation(xyz, xyz, k), nearest, obvious)
    row(f"5 surface variation, {len(xyz)} points, k={k}", "cKDTree build and query alone", a / tree, "<=", 1.3, a, tree)
    row("", "cKDTree + outer products + eigh, fp64", a / b, "seen <=", 0.54, a, b)
    row("  max |difference|", "float64", error, "<=", 1e-6)
    row(f"  overlap of the top {top}", "float64", overlap, ">=", 0.999)


# ---- rendering and images --------------------------------------------------------------------------------------------------------

def sample_volume(volume, index):
    """F.grid_sample in place of multilinear and gather_weighted. volume (1, C, Z, Y, X), index (M, 3) fractional cells z, y, x -> (M, C)."""
    at = index / (index.new_tensor(volume.shape[2:]) - 1) * 2 - 1
    return F.grid_sample(volume, at.flip(1).view(1, 1, 1, -1, 3), "bilinear", "border", True)[0, :, 0, 0].t()


PLAINLY = dict(multilinear=lambda index, shape: (index, None), gather_weighted=lambda volume, index, _: sample_volume(volume, index))


def shoot(xyz, grid, R):
    """R rays from the LiDAR to its points. xyz (M, 3) m -> origin (R, 3), direction (R, 3), range (R,) m, where they leave the volume (R,) m."""
    away = xyz[move(torch.randperm(len(xyz))[:R])]
    origin, direction = torch.zeros_like(away), F.normalize(away, dim=1)
    return origin, direction, away.norm(dim=1), common.box_exit(origin, direction, grid.low, grid.high)


def field_step(plain, end, noise, u, field, volume, origin, direction):
    """Render, backward to the volume and all weights -> gradients. plain: by grid_sample; else from a table, whose change of layout is paid for."""
    b = torch.zeros(len(origin), dtype=torch.int64, device=origin.device)
    with mock.patch.multiple(clap, **PLAINLY) if plain else contextlib.nullcontext():
        where = volume if plain else volume.permute(0, 2, 3, 4, 1).reshape(-1, volume.shape[1])
        r, c = field.render(where, origin, direction, b, end, noise, u, colour=True)
    return torch.autograd.grad(r.sum() + c.sum(), [volume, *field.parameters()])


def bench_rendering(rounds, xyz, grid, R=2048, C=32, S=72, finer=24, reach=60.0):
    """R rays from the LiDAR to its points, samples as in the paper's preset. xyz (M, 3) m."""
    torch.manual_seed(0)
    cells = common.VoxelResNet(grid.low, grid.high, grid.voxel).cells[-1]
    volume = move(torch.randn(1, C, *cells.shape)).requires_grad_()
    table = volume.detach().permute(0, 2, 3, 4, 1).reshape(-1, C).requires_grad_()
    origin, direction, surface, far = shoot(xyz, grid, R)
    depth = common.stratified(torch.full_like(far, clap.NEAR), far, move(torch.rand(len(far), S + finer)))
    at, grad = (direction[:, None] * depth[..., None]).view(-1, 3), move(torch.randn(depth.numel(), C))

    def gather():
        return common.gather_weighted(table, *common.multilinear(cells.index(at), cells.shape))

    a, b = torch.autograd.grad(gather(), table, grad)[0], torch.autograd.grad(sample_volume(volume, cells.index(at)), volume, grad)[0]
    same(gather(), sample_volume(volume, cells.index(at)), 1e-4, "trilinear samples")
    same(a, b[0].permute(1, 2, 3, 0).reshape(-1, C), 1e-3, "gradient of trilinear samples")
    compare(rounds, f"6 trilinear fwd+bwd, {len(at)} samples, C={C}", "F.grid_sample", 0.5, lambda: torch.autograd.grad(gather(), table, grad),
            lambda: torch.autograd.grad(sample_volume(volume, cells.index(at)), volume, grad))

    field = move(clap.Field(C, cells, 1 / max(grid.high)))
    inside = float((far - clap.NEAR).mean()) / (reach - clap.NEAR)                         # share of the way to `reach` that lies in the box
    jitter, more, u = (move(torch.rand(len(far), n)) for n in (S, round(S / inside), finer))
    exact = [v.double() for v in (far, jitter, u, copy.deepcopy(field), volume, origin, direction)]       # alpha's kink makes single precision jump
    for g, g_ in zip(field_step(False, *exact), field_step(True, *exact)):
        same(g, g_, 1e-6, "gradient of the field step")
    scene = u, field, volume, origin, direction
    sdf = ((surface[:, None] - depth) * field.scale).requires_grad_()                      # of a surface at each point; noise would underflow, which is slow
    beyond = torch.full_like(far, reach)

    def weights():
        """Both evaluations of a step: where to look closer, without gradient, then all samples."""
        with torch.no_grad():
            common.neus_weights(sdf[:, :S], 64.0)
        return torch.autograd.grad(common.neus_weights(sdf, field.h.detach()).sum(), sdf)

    a, equal, obvious, part = timed(rounds, lambda: field_step(False, far, jitter, *scene), lambda: field_step(True, far, jitter, *scene),
                                    lambda: field_step(True, beyond, more, *scene), weights)
    row(f"  field step fwd+bwd, {len(far)} rays x {S} + {finer}", f"grid_sample, to {reach:.0f} m ({inside:.0%} inside)", a / obvious, "<=", 0.5, a, obvious)
    row("", "grid_sample, the same samples", a / equal, "<=", 1, a, equal)
    row("  compositing", "share of the field step", part / a, "<=", 0.02, part, a)


def bench_images(rounds, frame, key, C=64):
    """The key sweep's points (N, 3) into six feature maps of stride 4."""
    H, W = frame.images[0].shape[1:]
    matrix, b = move(torch.from_numpy(frame.lidar2img)), move(torch.zeros(len(key), dtype=torch.int64))
    hw = move(torch.tensor([image.shape[1:] for image in frame.images]))
    features = torch.randn(len(matrix), C, H // 4, W // 4, generator=torch.Generator().manual_seed(0))
    features = move(features).to(memory_format=torch.channels_last)                        # as the networks make them

    def ours():
        point, image, uv, _ = common.project(key, b, matrix, hw, 1)
        return point, image, common.sample_image(features, image, uv, (H, W))

    def everywhere():
        uvd = key @ matrix[:, :3, :3].transpose(1, 2) + matrix[:, None, :3, 3]             # (K, N, 3)
        uv = uvd[..., :2] / uvd[..., 2:].clamp_min(0.1)
        seen = (uvd[..., 2] > 0.1) & ((uv >= 0) & (uv < hw[:, None].flip(-1))).all(-1)     # (K, N)
        at = uv / uv.new_tensor([W, H]) * 2 - 1
        return F.grid_sample(features, at[:, None], "bilinear", "border", False)[:, :, 0] * seen[:, None], seen

    (point, image, values), (all_values, seen) = ours(), everywhere()
    assert torch.equal(torch.stack([image, point], 1), seen.nonzero()), "points in view differ"
    same(values, all_values[image, :, point], 1e-4, "image features")
    compare(rounds, f"7 image features of {len(key)} points", "every point in every camera, masked", 0.15, ours, everywhere)


def bench_lift(rounds, frame, cells, camera):
    """Image features and depths into the volume's cells, every one asking every camera. camera: a CameraNet, for its sizes."""
    batch, C, D, near, reach = move(data.collate([frame], [0])), camera.channels, camera.bins, camera.near, camera.max_depth
    H, W = batch.images.shape[-2:]
    torch_rng, matrix, centres = torch.Generator().manual_seed(0), batch.lidar2img, cells.centres(batch.hw.device)
    features, logits = (move(torch.randn(len(matrix), n, H // 8, W // 8, generator=torch_rng)).to(memory_format=torch.channels_last) for n in (C, D))
    inputs = features.requires_grad_(), logits.softmax(1).requires_grad_()
    grad = move(torch.randn(1, C, *cells.shape, generator=torch_rng))

    def ours():
        return camera.lift(*inputs, batch, cells)

    def obvious():
        uvd = centres @ matrix[:, :3, :3].transpose(1, 2) + matrix[:, None, :3, 3]         # (K, V, 3)
        depth, uv = uvd[..., 2], uvd[..., :2] / uvd[..., 2:].clamp_min(near)
        seen = (depth > near) & (depth < reach) & ((uv >= 0) & (uv < batch.hw[:, None].flip(-1))).all(-1)                   # (K, V)
        at, volume = torch.cat([uv / uv.new_tensor([W, H]), (depth[..., None] - near) / (reach - near)], -1) * 2 - 1, 0.0
        for image, chances, where, there in zip(*inputs, at, seen):
            pulled = F.grid_sample(image[None], where[None, None, :, :2], "bilinear", "border", False)[0, :, 0]             # (C, V)
            chance = F.grid_sample(chances[None, None], where[None, None, None], "bilinear", "border", False)[0, 0, 0]      # (1, V)
            volume = volume + pulled * chance * D * there
        return volume.view(1, C, *cells.shape), seen.any(0).view(1, *cells.shape)

    (volume, seen), (volume_, seen_) = ours(), obvious()
    assert torch.equal(seen, seen_), "the cells in view differ"
    same(volume, volume_, 1e-4, "lifted volume")
    for a, b in zip(torch.autograd.grad(volume, inputs, grad), torch.autograd.grad(volume_, inputs, grad)):
        same(a, b, 1e-3, "gradient of the lift")
    with torch.no_grad():
        compare(rounds, f"15 lift to {len(centres)} cells, C={C}, D={D}", "grid_sample in every camera, masked", None, ours, obvious)
    compare(rounds, "  forward + backward", "the same by autograd", None, lambda: torch.autograd.grad(ours()[0], inputs, grad),
            lambda: torch.autograd.grad(obvious()[0], inputs, grad))


def bench_loading(rounds, dataset, i):
    """Frame i: its six pictures, then all of it."""
    if cpu_only("8 loading", "Pillow and OpenCV, in the loader's workers"):
        return
    name, (height, width) = dataset.name(i), dataset.grid.image
    cameras = dataset.sensors[dataset.frames[i]["sensors"][1:]]

    def ours():
        return np.stack([data.read_image(os.path.join(dataset.root, camera["file"].decode()), (height, width), name)[0] for camera in cameras])

    def full():
        pictures = []
        for camera in cameras:
            with Image.open(Path(dataset.root) / camera["file"].decode()) as image:
                scale = max(height / image.height, width / image.width)
                whole = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
            left, top = (whole.width - width) // 2, whole.height - height
            pictures.append(np.array(whole.crop((left, top, left + width, top + height))).transpose(2, 0, 1))
        return np.stack(pictures)

    psnr = 10 * np.log10(255 ** 2 / np.mean((ours().astype(float) - full()) ** 2))
    assert psnr > 40, f"{name}: pictures differ from a full decode, PSNR {psnr:.1f} dB"
    compare(rounds, f"8 six pictures to {height} x {width}", "PIL full decode + resize", 0.6, ours, full)
    row("  PSNR, dB", "PIL full decode + resize", psnr, ">=", 45)
    clouds, single = len(np.unique(dataset.load(i).points[:, 4])), copy.copy(dataset)
    single.grid = dataclasses.replace(dataset.grid, sweeps=1)
    whole, key, decoded = timed(rounds, lambda: dataset.load(i), lambda: single.load(i), full)
    for ms, sweeps in ((key, 1), (whole, clouds)):
        row(f"  load, {sweeps} sweeps", "PIL full decode + resize, no points", ms / decoded, "<=", 0.6, ms, decoded)
        row("", "frames/s of one core", 1e3 / ms, "seen >=", 30 if sweeps == 1 else None)


def torch_fps(xyz, count):
    """The loop that is copied from file to file: distances of all points to the last chosen, torch, one cloud. xyz (n, 3) -> (count,)."""
    chosen, nearest, at = torch.zeros(count, dtype=torch.int64), torch.full((len(xyz),), 1e10), torch.zeros((), dtype=torch.int64)
    for i in range(count):
        chosen[i] = at
        nearest = torch.minimum(nearest, ((xyz - xyz[at]) ** 2).sum(-1))
        at = nearest.argmax()
    return chosen


def sorted_ball(centres, sources, radius, k):
    """Every distance, rows out of reach set to the number of sources, one sort of all. -> (m, k) rows of sources in order, filled up with the first."""
    index = torch.arange(len(sources), device=sources.device).expand(len(centres), -1).clone()
    index[torch.cdist(centres, sources, compute_mode="donot_use_mm_for_euclid_dist") >= radius] = len(sources)
    index = index.sort(1).values[:, :k]
    return torch.where(index == len(sources), index[:, :1], index)


def fpsample_pieces(cloud, count):
    """fpsample's exact samplers -> (name, function or None). Their first points are their own: asserted to choose what ours does from there."""
    fpsample = installed("fpsample")
    pieces = [("fpsample fps_sampling", fpsample and (lambda: fpsample.fps_sampling(cloud, count, start_idx=0))),
              ("fpsample bucket_fps_kdline_sampling", fpsample and (lambda: fpsample.bucket_fps_kdline_sampling(cloud, count, h=5, start_idx=0)))]
    for name, piece in pieces if fpsample else ():
        theirs = piece().astype(np.int64)
        ours = (simipu.farthest_points(np.roll(cloud, -theirs[0], 0), count) + theirs[0]) % len(cloud)
        assert np.array_equal(*(np.unique(cloud[rows], axis=0) for rows in (ours, theirs))), f"{name} chooses other points"     # rows may repeat a point
    return pieces


def bench_matching(rounds, xyz):
    """Sampling, neighbours and pairs of SimIPU on a real sweep of at least 16384 points (else with repetition). xyz (N, 3) array."""
    rng = np.random.default_rng(0)
    cloud = xyz[rng.choice(len(xyz), 16384, replace=len(xyz) < 16384)]
    chosen = simipu.farthest_points(cloud, 4096)
    if not cpu_only("10 farthest points"):
        assert torch.equal(torch.from_numpy(chosen), torch_fps(torch.from_numpy(cloud), 4096)), "farthest points differ"
        compare(rounds, "10 farthest points, 16384 to 4096", "the usual torch loop", 0.15, lambda: simipu.farthest_points(cloud, 4096),
                lambda: torch_fps(torch.from_numpy(cloud), 4096), peers=fpsample_pieces(cloud, 4096))
    sources, torch_cluster = move(torch.from_numpy(cloud))[None], installed("torch_cluster")
    centres = sources[:, move(torch.from_numpy(chosen))]
    for radius in (0.4, 1.6):
        def theirs(radius=radius):
            """-> (2, P) rows of centres and of sources, at most 32 a centre, any of those in reach."""
            return torch_cluster.radius(sources[0], centres[0], radius, max_num_neighbors=32)

        ours, plain = simipu.ball_query(centres, sources, (radius,), (32,))[0], sorted_ball(centres[0], sources[0], radius, 32)
        assert (ours == plain).all(1).float().mean() > 0.999, "neighbours differ"               # but for those within rounding of the radius
        if torch_cluster:
            found = 1 + (ours != ours[:, :1]).sum(1)
            assert (torch.bincount(theirs()[0], minlength=len(ours)) == found).float().mean() > 0.999, "torch_cluster finds other neighbours"
        compare(rounds, f"11 ball query of 4096, {radius} m, 32 of them", "all distances, one sort", 0.1,
                lambda radius=radius: simipu.ball_query(centres, sources, (radius,), (32,)), lambda radius=radius: sorted_ball(centres[0], sources[0], radius, 32),
                peers=[("torch_cluster.radius, any 32", torch_cluster and theirs)])
    if cpu_only("12 pairs", "scipy, in the loader's workers"):
        return
    T, _ = simipu.random_transform(np.random.default_rng(1), np.zeros(3), 1.5708, 0.25)
    for n, target in ((1024, 0.6), (4096, 0.25)):                                               # two views: each its own start of the farthest points
        orders = rng.permutation(len(cloud)), rng.permutation(len(cloud))
        id_a, id_b = (order[simipu.farthest_points(cloud[order], n)] for order in orders)
        a, b = (cloud[ids] @ T[:3, :3].T + T[:3, 3] for ids in (id_a, id_b))
        cost = cdist(a, b)
        best = cost[linear_sum_assignment(cost)].sum()
        assert abs(cost[np.arange(n), common.pair_points(a, b, id_a, id_b)].sum() / best - 1) < 1e-6, "the pairs are not optimal"
        compare(rounds, f"12 pairs of {n}, {len(np.intersect1d(id_a, id_b)) / n:.0%} in both views", "scipy's assignment alone, with its costs", target,
                lambda a=a, b=b, id_a=id_a, id_b=id_b: common.pair_points(a, b, id_a, id_b), lambda a=a, b=b: linear_sum_assignment(cdist(a, b)))


def bench_overlap(rounds):
    """Shared area of 500 x 500 turned boxes strewn as in a busy frame."""
    if cpu_only("13 shared area of turned boxes", "shapely, in the evaluation"):
        return
    rng = np.random.default_rng(0)
    a, b = (np.column_stack([rng.uniform(-50, 50, (500, 2)), rng.uniform(0.5, 5, (500, 2)), rng.uniform(-4, 4, 500)]) for _ in range(2))

    def plain():
        shapes = [[shapely.affinity.translate(shapely.affinity.rotate(shapely.box(-l / 2, -w / 2, l / 2, w / 2), yaw, (0, 0), use_radians=True), x, y)
                   for x, y, l, w, yaw in boxes] for boxes in (a, b)]
        return np.array([[one.intersection(two).area for two in shapes[1]] for one in shapes[0]])
    assert np.abs(finetune.shared_area(a, b) - plain()).max() < 1e-9, "shared areas differ"
    compare(1, "13 shared area of 500 x 500 turned boxes", "shapely in two loops", 0.05, lambda: finetune.shared_area(a, b), plain, "seen <=")


def bench_scaling(rounds, net, levels, points, b, sweep, grid):
    """Time at four sizes over a decade and the exponent of its growth, by least squares in logarithms: 1 is linear, less has a constant part."""
    def sizes(most):
        return [round(most * 10 ** (i / 3 - 1)) for i in range(4)]

    def fit(what, counts, pieces):
        ms = timed(rounds, *pieces)
        exponent = np.polyfit(np.log(counts), np.log(ms), 1)[0]
        print(f"{what:46.46}{'  '.join(f'{n:7d}: {t:8.1f}' for n, t in zip(counts, ms))}{exponent:10.2f}", flush=True)

    print(f"{'':46}{'size: ms':>18}{'':54}{'exponent':>10}")
    mixed = move(torch.randperm(len(points), generator=torch.Generator().manual_seed(0)))
    parts = [mixed[:n].sort().values for n in sizes(len(points))]
    fit("points: voxelise", sizes(len(points)), [lambda rows=rows: net.voxelise(points[rows], b[rows]) for rows in parts])

    (coords, _, cells), pad, weight = levels[1], net.pads[1], move(torch.randn(27, 32, 32))
    bearing = torch.atan2(*(coords[:, 2:] - coords.new_tensor(cells.shape[1:]) / 2).unbind(1)).argsort()                      # a sector is as dense as the whole
    sectors = [coords[bearing[:n].sort().values] for n in sizes(len(coords))]

    def convolve(coords):
        common.strided_map(coords, cells.shape, pad)
        return common.SparseConvolution.apply(x[:len(coords)], weight, common.submanifold_map(coords, cells.shape))
    x = move(torch.randn(len(coords), 32))
    fit("voxels: both maps, one convolution C=32", sizes(len(coords)), [lambda part=part: convolve(part) for part in sectors])

    origin, direction, _, far = shoot(sweep[sweep[:, :3].norm(dim=1) > clap.CLOSE, :3], grid, 8192)
    volume, field = move(torch.randn(1, 32, *net.cells[-1].shape)).requires_grad_(), move(clap.Field(32, net.cells[-1], 1 / max(grid.high)))
    jitter, u = move(torch.rand(len(far), 72)), move(torch.rand(len(far), 24))
    fit("rays: rendering step, fwd+bwd", sizes(len(far)),
        [lambda n=n: field_step(False, far[:n], jitter[:n], u[:n], field, volume, origin[:n], direction[:n]) for n in sizes(len(far))])

    frames = [(sweep.repeat(n, 1), move(torch.arange(n).repeat_interleave(len(sweep)))) for n in sizes(10)]
    with torch.no_grad():
        fit(f"frames of {len(sweep)} points: VoxelResNet forward", sizes(10), [lambda batch=batch: net.eval()(*batch) for batch in frames])


def sample_with(sampler, run, rounds):
    """Steps of a finished run's model under one sampler, in a process of its own -> share on boxes, on the ground, median CPU ms of a step, peak GiB."""
    torch.set_num_threads(1)
    common.keep_large_buffers()
    stored = json.loads((Path(run) / "config.json").read_text())
    cfg = clap.Config(**{f.name: stored[f.name] for f in dataclasses.fields(clap.Config)} | {"sampler": sampler})
    loader = data.loader(cfg.data, "val", cfg.batch, seed=cfg.seed, preset=cfg.preset, prepare=clap.Curvature(cfg.neighbours))
    model = clap.CLAP(cfg, loader.grid)
    model.load_state_dict(torch.load(Path(run) / "last.pt", weights_only=True)["model"])
    found = []
    for _, batch in zip(range(rounds), loader.begin_at(0)):
        begin = time.process_time()
        loss, terms = model(batch)
        loss.backward()
        found.append([float(terms["on_boxes"].detach()), float(terms["on_ground"].detach()), 1e3 * (time.process_time() - begin)])
    return [*np.mean(found, 0)[:2], np.median(found[1:], 0)[2], common.peak_memory()]


def bench_samplers(run, rounds):
    """Ratios to uniform sampling; the weights of `sdf` come from the run's own field."""
    print(f"{run}, {rounds} passes forward and backward over held-out frames, 1 thread")
    print(f"{'sampler':10}{'on boxes':>10}{'on ground':>11}{'ms a step':>11}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}")
    rows = {}
    for sampler in ("uniform", "pca", "sdf"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows[sampler] = pool.submit(sample_with, sampler, run, rounds).result()
    for sampler, (boxes, ground, ms, memory) in rows.items():
        print(f"{sampler:10}{boxes:10.1%}{ground:11.1%}{ms:11.0f}{ms / rows['uniform'][2]:8.3f}{memory:10.2f}{memory / rows['uniform'][3]:8.3f}")


def main():
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the torch pieces run")
    parser.add_argument("--scaling", action="store_true", help="measure how cost grows with size instead")
    parser.add_argument("--samplers", metavar="RUN", help="compare clap.py's samplers on this finished run instead")
    asked = parser.parse_args()
    rounds, DEVICE = 3 if asked.quick else 7, torch.device(asked.device)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    if asked.samplers:
        return bench_samplers(asked.samplers, 3 * rounds)
    torch.set_num_threads(1)
    common.keep_large_buffers()
    named = os.environ.get("NUSCENES")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "real" / "nuscenes"
    real = root.is_dir()
    dataset = data.open_dataset(root if real else "", "paper" if real else "small")
    last = len(dataset) - 1                             # real: ten sweeps in one frame; the embedded world: ten frames laid over each other
    frame, grid = dataset.load(last), dataset.grid
    cloud = frame.points if real else np.concatenate([dataset.load(i).points for i in range(10)])
    points, b = move(torch.from_numpy(cloud)), move(torch.zeros(len(cloud), dtype=torch.int64))
    sweep = move(torch.from_numpy(frame.points[frame.points[:, 4] == 0]))
    key = sweep[:, :3].contiguous()
    print(f"{os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")
    if DEVICE.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, wall ms until it is done, medians of {rounds} interleaved rounds\n"
              "the targets are those of one CPU thread: nothing is demanded here")
    else:
        print(f"1 thread, CPU ms, medians of {rounds} interleaved rounds\n"
              "common.keep_large_buffers() is on, as in training on a CPU: it spares the alternatives more page faults than us")
    print(f"input: {frame.name if real else 'ten frames of the embedded world'}, {len(points)} points, {len(key)} of one sweep", flush=True)

    net, levels = move(common.VoxelResNet(grid.low, grid.high, grid.voxel)), []
    levels.append(net.voxelise(points, b))
    for pad, cells in zip(net.pads[:2], net.cells[1:]):
        coords = common.strided_map(levels[-1].coords, levels[-1].cells.shape, pad)[0]
        levels.append(common.Level(coords, None, cells))
    if asked.scaling:
        return bench_scaling(rounds, net, levels, points, b, sweep, grid)
    print(f"{'':84}{'ours':>9}{'other':>10}{'peer':>10}{'ratio':>10}{'target':>12}", flush=True)
    bench_maps(rounds, levels[0], net.pads[0])
    for level, C, share in zip(levels, (16, 32, 64), (0.24, 0.28, 0.52)):
        bench_convolution(rounds, level, C, share)
    bench_trunk(min(rounds, 3), net, points, b)             # half a minute a round
    bench_voxels(rounds, net, points, b)
    bench_curvature(rounds, key.cpu().numpy())
    bench_rendering(rounds, key[key.norm(dim=1) > clap.CLOSE], data.GRIDS["nuscenes", "paper"])
    bench_images(rounds, frame, key)
    bench_lift(rounds, frame, net.cells[-1], move(common.CameraNet(18)))
    bench_matching(rounds, key.cpu().numpy())
    bench_overlap(rounds)
    if real:
        bench_loading(rounds, dataset, last)
    else:
        print(f"8 loading: skipped, it wants real 1600 x 900 pictures and there is no folder {root} (NUSCENES is {named or 'not set'})")
    missed = [words for _, words, miss in PRINTED if miss]
    print(f"{len(missed)} rows miss a demand by more than a fifth" + "".join(f"\n  {words}" for words in missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
