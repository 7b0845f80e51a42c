"""The hot pieces against what one would write first: ratios of CPU time in one process with one thread.

    python tests/bench.py            # real nuScenes frames in $NUSCENES or ../shared/real/nuscenes, else the embedded world
    python tests/bench.py --quick    # fewer rounds
    python tests/bench.py --samplers runs/clap       # the three samplers of a finished run: what they look at, time and memory of a step

A row: median CPU ms of our piece, of the alternative, their ratio, the target of performance.md ("seen": not a demand there, but implied by what it measured).
The verdict: ok; ok* = within 1.2 times the target, the noise of single runs; miss. Each pair is first asserted to compute the same. Wall time plays no part.
"""
import argparse
import contextlib
import copy
import dataclasses
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


def cpu_ms(rounds, **pieces):
    """Median CPU ms of each function after one call to warm up; the rounds are interleaved, so what else the machine does meets all alike."""
    spent = {name: [] for name in pieces}
    for turn in range(rounds + 1):
        for name, piece in pieces.items():
            begin = time.process_time()
            piece()
            if turn:
                spent[name].append(1e3 * (time.process_time() - begin))
    return [float(np.median(ms)) for ms in spent.values()]


def row(what, against, value, sign, target, ours=None, other=None):
    """Print one line. value against target ("<=" or ">="); ours, other ms where the value is their ratio."""
    at_most, limit = sign.endswith("<="), abs(target)
    excess = value / limit if at_most else limit / max(value, 1e-12)
    verdict = "ok" if excess <= 1 else "ok*" if excess <= 1.2 else "miss"
    ms = f"{ours:9.1f}{other:10.1f}" if ours is not None else " " * 19
    print(f"{what:46.46}{against:38.38}{ms}{value:10.3g}  {sign:>7} {target:<7g}{verdict}", flush=True)


def compare(rounds, what, against, target, ours, other, sign="<="):
    a, b = cpu_ms(rounds, ours=ours, other=other)
    row(what, against, a / b, sign, target, a, b)


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
    return kmap.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()


def by_offset(ins, outs, counts):
    """Pairs (P, 3) offset, in, out in one order. An offset joins an input with one output only."""
    offset = torch.repeat_interleave(torch.tensor(counts))
    return torch.stack([offset, ins, outs], 1)[torch.argsort(offset * (int(ins.max()) + 1) + ins)]


def bench_maps(rounds, level, pad):
    """Ours wants sorted voxels, which voxelise and strided_map give: the sort is in row 4."""
    coords, shape = level.coords, level.cells.shape
    mixed = torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))
    shuffled = coords[mixed]
    kmap, (ins, outs, counts) = common.submanifold_map(coords, shape), searched_map(shuffled, shape)
    pairs = by_offset(kmap.ins, kmap.outs, counts_of(kmap))
    assert torch.equal(pairs, by_offset(mixed[ins], mixed[outs], counts)), "submanifold maps differ"
    assert torch.equal(pairs, by_offset(*searched_map(coords, shape))), "submanifold maps differ"
    what = f"1 submanifold map, {len(coords)} voxels"
    a, plain, ordered = cpu_ms(rounds, ours=lambda: common.submanifold_map(coords, shape), plain=lambda: searched_map(shuffled, shape),
                               ordered=lambda: searched_map(coords, shape))
    row(what, "27 searches, voxels in any order", a / plain, "seen <=", 0.11, a, plain)
    row("", "27 searches, sorted voxels", a / ordered, "<=", 0.3, a, ordered)

    out, kmap = common.strided_map(coords, shape, pad)
    out_, ins, outs, counts = candidate_map(coords, shape, pad)
    assert torch.equal(out, out_) and torch.equal(by_offset(kmap.ins, kmap.outs, counts_of(kmap)), by_offset(ins, outs, counts)), "strided maps differ"
    compare(rounds, f"2 strided map, to {len(out)}", "27 candidates, parity masks, unique", 0.17,
            lambda: common.strided_map(coords, shape, pad), lambda: candidate_map(coords, shape, pad), "seen <=")


def masked_convolution(x, weight, table):
    """Autograd on table (27, V) of input rows, -1 = none: a bool mask and advanced indexing an offset."""
    out = x.new_zeros(table.shape[1], weight.shape[2])
    for k in range(27):
        there = table[k] >= 0
        out[there] += x[table[k, there]] @ weight[k]
    return out


def bench_convolution(rounds, level, C, share):
    kmap, torch_rng = common.submanifold_map(level.coords, level.cells.shape), torch.Generator().manual_seed(C)
    x, grad = torch.randn(2, kmap.n_in, C, generator=torch_rng)
    weight = torch.randn(27, C, C, generator=torch_rng) / C ** 0.5
    x.requires_grad_(), weight.requires_grad_()
    counts = counts_of(kmap)
    offset, table = torch.repeat_interleave(torch.tensor(counts)), torch.full((27, len(kmap.first) - 1), -1)
    table[offset, kmap.outs] = kmap.ins
    buffer = torch.empty(4096, C)

    def ours():
        return common.SparseConvolution.apply(x, weight, kmap)

    @torch.no_grad()
    def products():
        """The matrix products alone, same shapes, into one reused buffer."""
        for k, count in enumerate(counts):
            for a in range(0, count, 4096):
                part = x[a:min(a + 4096, count)]
                torch.mm(part, weight[k], out=buffer[:len(part)])

    true = masked_convolution(x.double(), weight.double(), table)
    error = same(ours(), true, 1e-5, "sparse convolution")
    assert torch.equal(ours(), ours()), "the sparse convolution is not bitwise repeatable"
    for a, b in zip(torch.autograd.grad(ours(), (x, weight), grad), torch.autograd.grad(true, (x, weight), grad.double())):
        same(a, b, 1e-5, "gradient of the sparse convolution")
    with torch.no_grad():
        a, b, floor = cpu_ms(rounds, ours=ours, naive=lambda: masked_convolution(x, weight, table), floor=products)
    what = f"3 sparse conv C={C}, {kmap.n_in} voxels, {len(kmap.ins) / kmap.n_in:.1f} of 27"
    row(what, "mask and index an offset", a / b, "seen <=", 0.59, a, b)
    row("  share of the products' floor", "27 matmuls into a reused buffer", floor / a, ">=", share, a, floor)
    compare(rounds, "  forward + backward", "the same by autograd", 0.71, lambda: torch.autograd.grad(ours(), (x, weight), grad),
            lambda: torch.autograd.grad(masked_convolution(x, weight, table), (x, weight), grad), "seen <=")
    row("  max relative error", "float64", error, "<=", 1e-6)


# ---- points ----------------------------------------------------------------------------------------------------------------------

def unique_voxels(net, points, b):
    """Mean of each voxel's points by torch.unique over rows -> coords (V, 4), mean (V, 5)."""
    low, high, voxel = (points.new_tensor(v) for v in (net.low, net.high, net.voxel))
    inside = ((points[:, :3] >= low) & (points[:, :3] < high)).all(1)
    points, b = points[inside], b[inside]
    index = ((points[:, :3] - low) / voxel).long().flip(1)
    coords, of, count = torch.unique(torch.cat([b[:, None], index], 1), dim=0, return_inverse=True, return_counts=True)
    return coords, torch.zeros(len(coords), 5).index_add_(0, of, points) / count[:, None]


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
        index, values = index.sort().values if order == "sorted" else index, torch.randn(len(index), C)
        same(common.segment_sum(values, index, len(coords)), torch.zeros(len(coords), C).index_add_(0, index, values), 1e-5, "segment sums")
        compare(rounds, f"9 segment_sum (torch-scatter), C={C}, {order}", "index_add_", 1.03, lambda v=values, i=index: common.segment_sum(v, i, len(coords)),
                lambda v=values, i=index: torch.zeros(len(coords), v.shape[1]).index_add_(0, i, v), "seen <=")
    return None


def bench_curvature(rounds, xyz, k=32):
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
    a, tree, b = cpu_ms(rounds, ours=lambda: common.surface_variation(xyz, xyz, k), tree=nearest, obvious=obvious)
    row(f"5 surface variation, {len(xyz)} points, k={k}", "cKDTree build and query alone", a / tree, "<=", 1.3, a, tree)
    row("", "cKDTree + outer products + eigh, fp64", a / b, "seen <=", 0.54, a, b)
    row("  max |difference|", "float64", error, "<=", 1e-6)
    row(f"  overlap of the top {top}", "float64", overlap, ">=", 0.999)


# ---- rendering and images --------------------------------------------------------------------------------------------------------

def sample_volume(volume, index):
    """F.grid_sample in place of corners and gather_weighted. volume (1, C, Z, Y, X), index (M, 3) fractional cells z, y, x -> (M, C)."""
    at = index / (index.new_tensor(volume.shape[2:]) - 1) * 2 - 1
    return F.grid_sample(volume, at.flip(1).view(1, 1, 1, -1, 3), "bilinear", "border", True)[0, :, 0, 0].t()


def bench_rendering(rounds, xyz, grid, R=2048, C=32, S=72, finer=24, reach=60.0):
    """R rays from the LiDAR to its points, samples as in the paper's preset. xyz (M, 3) m."""
    torch.manual_seed(0)
    cells = common.VoxelNet(grid.low, grid.high, grid.voxel).cells[-1]
    volume = torch.randn(1, C, *cells.shape, requires_grad=True)
    table = volume.detach().permute(0, 2, 3, 4, 1).reshape(-1, C).requires_grad_()
    away = xyz[torch.randperm(len(xyz))[:R]]
    direction, origin, b = F.normalize(away, dim=1), torch.zeros_like(away), torch.zeros(len(away), dtype=torch.int64)
    far = common.box_exit(origin, direction, grid.low, grid.high)
    depth = common.stratified(far.new_full((), clap.NEAR).expand_as(far), far, torch.rand(len(far), S + finer))
    at, grad = (direction[:, None] * depth[..., None]).view(-1, 3), torch.randn(depth.numel(), C)

    def gather():
        return common.gather_weighted(table, *common.corners(cells.index(at), cells.shape))

    a, b_ = torch.autograd.grad(gather(), table, grad)[0], torch.autograd.grad(sample_volume(volume, cells.index(at)), volume, grad)[0]
    same(gather(), sample_volume(volume, cells.index(at)), 1e-4, "trilinear samples")
    same(a, b_[0].permute(1, 2, 3, 0).reshape(-1, C), 1e-3, "gradient of trilinear samples")
    compare(rounds, f"6 trilinear fwd+bwd, {len(at)} samples, C={C}", "F.grid_sample", 0.5, lambda: torch.autograd.grad(gather(), table, grad),
            lambda: torch.autograd.grad(sample_volume(volume, cells.index(at)), volume, grad))

    field = clap.Field(C, cells, 1 / max(grid.high))
    plainly = dict(corners=lambda index, shape: (index, None), gather_weighted=lambda volume, index, _: sample_volume(volume, index))
    inside = float((far - clap.NEAR).mean()) / (reach - clap.NEAR)                         # share of the way to `reach` that lies in the box
    jitter, more, u = torch.rand(len(far), S), torch.rand(len(far), round(S / inside)), torch.rand(len(far), finer)

    def step(plain, end, noise, u, field, volume, origin, direction):
        """Render, backward to the volume and all weights -> gradients. plain: by grid_sample; else from a table, whose change of layout is paid for."""
        with mock.patch.multiple(clap, **plainly) if plain else contextlib.nullcontext():
            where = volume if plain else volume.permute(0, 2, 3, 4, 1).reshape(-1, C)
            r, c = field.render(where, origin, direction, b, end, noise, u, colour=True)
        return torch.autograd.grad(r.sum() + c.sum(), [volume, *field.parameters()])

    exact = [v.double() for v in (far, jitter, u, copy.deepcopy(field), volume, origin, direction)]       # alpha's kink makes single precision jump
    for g, g_ in zip(step(False, *exact), step(True, *exact)):
        same(g, g_, 1e-6, "gradient of the field step")
    scene = u, field, volume, origin, direction
    sdf = ((away.norm(dim=1, keepdim=True) - depth) * field.scale).requires_grad_()         # of a surface at each point; noise would underflow, which is slow
    beyond = torch.full_like(far, reach)

    def weights():
        """Both evaluations of a step: where to look closer, without gradient, then all samples."""
        with torch.no_grad():
            common.neus_weights(sdf[:, :S], 64.0)
        return torch.autograd.grad(common.neus_weights(sdf, field.h.detach()).sum(), sdf)

    a, equal, obvious, part = cpu_ms(rounds, ours=lambda: step(False, far, jitter, *scene), equal=lambda: step(True, far, jitter, *scene),
                                     obvious=lambda: step(True, beyond, more, *scene), part=weights)
    row(f"  field step fwd+bwd, {len(far)} rays x {S} + {finer}", f"grid_sample, to {reach:.0f} m ({inside:.0%} inside)", a / obvious, "<=", 0.5, a, obvious)
    row("", "grid_sample, the same samples", a / equal, "<=", 1, a, equal)
    row("  compositing", "share of the field step", part / a, "<=", 0.02, part, a)


def bench_images(rounds, frame, key, C=64):
    """The key sweep's points (N, 3) into six feature maps of stride 4."""
    H, W = frame.images[0].shape[1:]
    matrix, b = torch.from_numpy(frame.lidar2img), torch.zeros(len(key), dtype=torch.int64)
    hw = torch.tensor([image.shape[1:] for image in frame.images])
    features = torch.randn(len(matrix), C, H // 4, W // 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)  # as the networks make them

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


def bench_loading(rounds, dataset, i):
    """Frame i: its six pictures, then all of it."""
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
    whole, key, decoded = cpu_ms(rounds, whole=lambda: dataset.load(i), key=lambda: single.load(i), decoded=full)
    for ms, sweeps in ((key, 1), (whole, clouds)):
        row(f"  load, {sweeps} sweeps", "PIL full decode + resize, no points", ms / decoded, "seen <=", 0.6, ms, decoded)
        row("", "frames/s of one core", 1e3 / ms, ">=", 30)


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
    index = torch.arange(len(sources)).expand(len(centres), -1).clone()
    index[torch.cdist(centres, sources, compute_mode="donot_use_mm_for_euclid_dist") >= radius] = len(sources)
    index = index.sort(1).values[:, :k]
    return torch.where(index == len(sources), index[:, :1], index)


def bench_matching(rounds, xyz):
    """Sampling, neighbours and pairs of SimIPU on a real sweep of at least 16384 points (else with repetition)."""
    rng = np.random.default_rng(0)
    cloud = xyz[rng.choice(len(xyz), 16384, replace=len(xyz) < 16384)].numpy()
    chosen = simipu.farthest_points(cloud, 4096)
    assert torch.equal(torch.from_numpy(chosen), torch_fps(torch.from_numpy(cloud), 4096)), "farthest points differ"
    compare(rounds, "10 farthest points, 16384 to 4096", "the usual torch loop", 0.15, lambda: simipu.farthest_points(cloud, 4096),
            lambda: torch_fps(torch.from_numpy(cloud), 4096))
    sources = torch.from_numpy(cloud)[None]
    centres = sources[:, torch.from_numpy(chosen)]
    for radius in (0.4, 1.6):
        ours, plain = simipu.ball_query(centres, sources, (radius,), (32,))[0], sorted_ball(centres[0], sources[0], radius, 32)
        assert (ours == plain).all(1).float().mean() > 0.999, "neighbours differ"               # but for those within rounding of the radius
        compare(rounds, f"11 ball query of 4096, {radius} m, 32 of them", "all distances, one sort", 0.1,
                lambda radius=radius: simipu.ball_query(centres, sources, (radius,), (32,)), lambda radius=radius: sorted_ball(centres[0], sources[0], radius, 32))
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
    rng = np.random.default_rng(0)
    a, b = (np.column_stack([rng.uniform(-50, 50, (500, 2)), rng.uniform(0.5, 5, (500, 2)), rng.uniform(-4, 4, 500)]) for _ in range(2))

    def plain():
        shapes = [[shapely.affinity.translate(shapely.affinity.rotate(shapely.box(-l / 2, -w / 2, l / 2, w / 2), yaw, (0, 0), use_radians=True), x, y)
                   for x, y, l, w, yaw in boxes] for boxes in (a, b)]
        return np.array([[one.intersection(two).area for two in shapes[1]] for one in shapes[0]])
    assert np.abs(finetune.shared_area(a, b) - plain()).max() < 1e-9, "shared areas differ"
    compare(1, "13 shared area of 500 x 500 turned boxes", "shapely in two loops", 0.05, lambda: finetune.shared_area(a, b), plain, "seen <=")


def sample_with(sampler, run, rounds):
    """Steps of a finished run's model under one sampler, in a process of its own -> share on boxes, on the ground, median CPU ms of a step, peak GiB."""
    torch.set_num_threads(1)
    common.keep_large_buffers()
    stored = json.loads((Path(run) / "config.json").read_text())
    cfg = clap.Config(**{f.name: stored[f.name] for f in dataclasses.fields(clap.Config)} | {"sampler": sampler})
    loader = data.loader(cfg.data, "val", cfg.batch, seed=cfg.seed, preset=cfg.preset, prepare=clap.Curvature(cfg.neighbours))
    model = clap.Clap(cfg, loader.grid)
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
    print(f"{run}, {rounds} training steps on held-out frames, 1 thread")
    print(f"{'sampler':10}{'on boxes':>10}{'on ground':>11}{'ms a step':>11}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}")
    rows = {}
    for sampler in ("uniform", "pca", "sdf"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows[sampler] = pool.submit(sample_with, sampler, run, rounds).result()
    for sampler, (boxes, ground, ms, memory) in rows.items():
        print(f"{sampler:10}{boxes:10.1%}{ground:11.1%}{ms:11.0f}{ms / rows['uniform'][2]:8.3f}{memory:10.2f}{memory / rows['uniform'][3]:8.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    parser.add_argument("--samplers", metavar="RUN", help="compare clap.py's samplers on this finished run instead")
    asked = parser.parse_args()
    rounds = 3 if asked.quick else 7
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
    points, b = torch.from_numpy(cloud), torch.zeros(len(cloud), dtype=torch.int64)
    key = points[points[:, 4] == 0, :3] if real else torch.from_numpy(frame.points[:, :3])
    print(f"{os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}\n"
          f"1 thread, CPU ms, medians of {rounds} interleaved rounds\n"
          "common.keep_large_buffers() is on, as in training on a CPU: it spares the alternatives more page faults than us\n"
          f"input: {frame.name if real else 'ten frames of the embedded world'}, {len(points)} points, {len(key)} of one sweep\n"
          f"{'':84}{'ours':>9}{'other':>10}{'ratio':>10}{'target':>12}", flush=True)

    net, levels = common.VoxelNet(grid.low, grid.high, grid.voxel), []
    levels.append(net.voxelise(points, b))
    for pad, cells in zip(net.pads[:2], net.cells[1:]):
        coords = common.strided_map(levels[-1].coords, levels[-1].cells.shape, pad)[0]
        levels.append(common.Level(coords, None, cells))
    bench_maps(rounds, levels[0], net.pads[0])
    for level, C, share in zip(levels, (16, 32, 64), (0.24, 0.28, 0.52)):
        bench_convolution(rounds, level, C, share)
    bench_voxels(rounds, net, points, b)
    bench_curvature(rounds, key.numpy())
    bench_rendering(rounds, key[key.norm(dim=1) > clap.CLOSE], data.GRIDS["nuscenes", "paper"])
    bench_images(rounds, frame, key)
    bench_matching(rounds, key)
    bench_overlap(rounds)
    if real:
        bench_loading(rounds, dataset, last)
    else:
        print(f"8 loading: skipped, it wants real 1600 x 900 pictures and there is no folder {root} (NUSCENES is {named or 'not set'})")


if __name__ == "__main__":
    main()
