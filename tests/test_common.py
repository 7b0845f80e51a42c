"""common.py against dense convolutions, torch's own interpolation, closed forms and brute force."""
import errno
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import clap
import common
import data
import finetune
from conftest import Waits, die_with_the_server, on_two, trained

ROOT = Path(common.__file__).parent

# 32 (+1) x 64 x 64 voxels
GRID = dict(low=(-3.2, -3.2, -2.0), high=(3.2, 3.2, 1.2), voxel=(0.1, 0.1, 0.1))
CPU = torch.device("cpu")
SCRIPTS = ["clap", "cmcr", "simipu", "finetune"]


def pinhole(size=1, cameras=1, focal=40.0, centre=(32.0, 24.0), yaw=0.0):
    """Cameras at the origin looking along x turned by yaw + k 90 degrees."""
    out = []
    for k in range(cameras):
        a = yaw + k * math.pi / 2
        forward = torch.tensor([math.cos(a), math.sin(a), 0.0])
        right = torch.tensor([math.sin(a), -math.cos(a), 0.0])
        down = torch.tensor([0.0, 0.0, -1.0])
        K = torch.tensor([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
        matrix = torch.eye(4)
        matrix[:3, :3] = K @ torch.stack([right, down, forward])
        out.append(matrix)
    return torch.stack(out).repeat(size, 1, 1)


# ---- §1 geometry ---------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5), (1, 4, 5)])
def test_multilinear_interpolation_matches_grid_sample(shape):
    torch.manual_seed(0)
    D = len(shape)
    table = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    # some positions lie outside the outermost centres
    position = torch.rand(200, D, dtype=torch.float64) * 1.4 - 0.2
    index, weight = common.multilinear(position * (torch.tensor(shape) - 1), shape)
    ours = common.gather_weighted(table.reshape(-1, 3), index, weight)
    where = (position * 2 - 1).flip(1).view(1, *[1] * (D - 1), -1, D)
    volume = table.permute(-1, *range(D))[None]
    expected = F.grid_sample(volume, where, align_corners=True, padding_mode="border")
    expected = expected.reshape(3, -1).t()
    torch.testing.assert_close(ours, expected)
    pull = torch.randn_like(ours)
    gradient = torch.autograd.grad((ours * pull).sum(), table)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * pull).sum(), table)[0])


def test_interpolating_at_no_position_gives_no_row():
    index, weight = common.multilinear(torch.zeros(0, 3), (2, 3, 4))
    assert common.gather_weighted(torch.randn(24, 5), index, weight).shape == (0, 5)


def test_image_sampling_has_area_centres():
    torch.manual_seed(0)
    size = torch.tensor([64.0, 48.0])
    features = torch.randn(3, 4, 6, 8)
    uv = torch.rand(100, 2) * size
    image = torch.randint(3, (100,))
    ours = common.sample_image(features, image, uv, (48, 64))
    expected = []
    for i, place in zip(image, uv / size * 2 - 1):
        sampled = F.grid_sample(features[i:i + 1], place.view(1, 1, 1, 2), align_corners=False,
                                padding_mode="border")
        expected.append(sampled[0, :, 0, 0])
    torch.testing.assert_close(ours, torch.stack(expected))


def test_rays_undo_a_projection_which_sees_only_what_is_ahead():
    torch.manual_seed(0)
    lidar2img = pinhole(2, 4)
    hw = torch.tensor([[48, 64]] * 7 + [[30, 40]])
    xyz = torch.randn(500, 3) * 8
    b = (torch.arange(500) >= 200).long()
    point, image, uv, depth = common.project(xyz, [200, 300], lidar2img, hw)
    origin, away = common.rays(uv, image, lidar2img)
    along = (xyz[point] - origin).norm(dim=1)
    torch.testing.assert_close(origin + away * along[:, None], xyz[point], atol=1e-4, rtol=1e-4)
    assert (depth > 0.1).all() and (image // 4 == b[point]).all()
    expected = set()  # the same, a pair at a time
    for n in range(500):
        for k in range(4):
            i = int(b[n]) * 4 + k
            u, v, d = (lidar2img[i, :3, :3].double() @ xyz[n].double()).tolist()
            if d > 0.1 and 0 <= u / d < int(hw[i, 1]) and 0 <= v / d < int(hw[i, 0]):
                expected.add((n, i))
    assert expected == set(zip(point.tolist(), image.tolist())) and len(expected) > 100
    # an image smaller than the padding
    assert (uv[image == 7] < torch.tensor([40.0, 30.0])).all() and (image == 7).any()


def test_rays_leave_the_box_at_its_face():
    torch.manual_seed(0)
    origin = torch.rand(200, 3) - 0.5
    away = F.normalize(torch.randn(200, 3), dim=1)
    away[0] = torch.tensor([0.0, 0.0, 1.0])  # a zero component
    low, high = (-1, -1, -2), (1, 1, 2)
    far = common.box_exit(origin, away, low, high)
    end = (origin + away * far[:, None]) / torch.tensor([1.0, 1.0, 2.0])
    torch.testing.assert_close(end.abs().amax(1), torch.ones(200), atol=1e-4, rtol=0)
    ahead = torch.tensor([[1.0, 0, 0]])
    assert common.box_exit(torch.tensor([[5.0, 0, 0]]), ahead, low, high) < 0


def test_points_in_boxes_match_rotated_coordinates():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-5, 5, (800, 3)).astype(np.float32)
    b = np.sort(rng.integers(0, 2, 800))
    centre = rng.uniform(-3, 3, (6, 3))
    size = rng.uniform(1, 4, (6, 3))
    yaw = rng.uniform(-3, 3, (6, 1))
    boxes = np.concatenate([centre, size, yaw, np.zeros((6, 2))], 1).astype(np.float32)
    b_boxes = np.array([0, 0, 0, 1, 1, 1])
    expected = np.zeros(800, bool)
    for box, frame in zip(boxes, b_boxes):
        cos, sin = math.cos(box[6]), math.sin(box[6])
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        inside = (np.abs((xyz - box[:3]) @ turn) < box[3:6] / 2).all(1)
        expected |= inside & (b == frame)
    assert 20 < expected.sum() < 750
    counts = np.bincount(b).tolist()
    inside = common.inside_boxes(torch.as_tensor(xyz), counts, torch.as_tensor(boxes), [3, 3])
    assert (inside.numpy() == expected).all()


# Query, trunk and lift have one definition of where a cell is: each leaves a linear field as it
# is. Half-cell shifts are the classic silent bug.

SLOPE = torch.tensor([0.7, -1.3, 2.1])


def linear_field(xyz):
    """The field at these points. xyz (..., 3) m -> (...)."""
    return xyz @ SLOPE + 0.3


def test_a_linear_field_survives_the_query():
    cells = common.VoxelResNet(**GRID, width=2).cells[-1]
    field = linear_field(cells.centres("cpu"))  # by cell, the memory order of dense volumes
    extent = (torch.tensor(cells.shape[::-1]) - 1) * torch.tensor(cells.step)
    inner = torch.rand(300, 3) * extent + torch.tensor(cells.first)
    index, weight = common.multilinear(cells.index(inner), cells.shape)
    ours = common.gather_weighted(field[:, None], index, weight)[:, 0]
    torch.testing.assert_close(ours, linear_field(inner), atol=1e-5, rtol=1e-5)


def test_a_linear_field_survives_the_trunk():
    """Means over full 3 x 3 x 3 neighbourhoods, level by level."""
    net = common.VoxelResNet(**GRID, width=2)
    finest = net.cells[0]
    zyx = torch.cartesian_prod(*map(torch.arange, finest.shape))
    every = torch.cat([torch.zeros(len(zyx), 1, dtype=torch.int64), zyx], 1)
    level = common.Level(every, linear_field(finest.centres("cpu"))[:, None], finest, 1)
    for pad, below in zip(net.pads, net.cells[1:]):
        coords, kmap = common.strided_map(level.coords, level.cells.shape, pad, 1)
        kernel = torch.full((27, 1, 1), 1 / 27)
        mean = common.SparseConvolution.apply(level.features, kernel, kmap)
        full = torch.bincount(kmap.outs, minlength=len(coords)) == 27
        level = common.Level(coords, coords.new_zeros(len(coords), 1).float(), below, 1)
        expected = linear_field(level.centre())
        torch.testing.assert_close(mean[full, 0], expected[full], atol=1e-4, rtol=1e-4)
        assert full.float().mean() > 0.4
        level = level._replace(features=expected[:, None])
    assert level.cells == net.cells[-1]
    field = linear_field(net.cells[-1].centres("cpu"))
    torch.testing.assert_close(level.dense().flatten(), field)


def test_the_coordinates_of_an_image_survive_the_lift():
    """An image that shows its own coordinates, which are linear too."""
    cells = common.VoxelResNet(**GRID, width=2).cells[-1]
    centres = cells.centres("cpu")
    camera = common.CameraNet(18, channels=2, max_depth=6.0, bins=4)
    images = torch.zeros(4, 3, 48, 64, dtype=torch.uint8)
    batch = SimpleNamespace(images=images, hw=torch.tensor([[48, 64]] * 4),
                            lidar2img=pinhole(1, 4), size=1)
    v, u = torch.meshgrid(torch.arange(6) * 8.0 + 4, torch.arange(8) * 8.0 + 4, indexing="ij")
    features = torch.stack([u, v])[None].repeat(4, 1, 1, 1)
    volume, seen = camera.lift(features, torch.full((4, 4, 6, 8), 0.25), batch, cells)
    point, image, uv, depth = common.project(centres, [len(centres)], batch.lidar2img, batch.hw,
                                             near=1.0)
    by_one_camera = (torch.bincount(point, minlength=len(centres)) == 1)[point]
    inner = ((uv > 4) & (uv < torch.tensor([60.0, 44.0]))).all(1)
    once = by_one_camera & inner
    lifted = volume[0].flatten(1).t()[point[once]]
    torch.testing.assert_close(lifted, uv[once], atol=1e-3, rtol=1e-4)
    assert once.sum() > 20 and seen.sum() == len(point.unique())


def test_the_gradient_of_an_interpolation_counts_every_row():
    """More rows than one chunk of the backward pass holds."""
    torch.manual_seed(0)
    table = torch.randn(30, 3, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(10_000, 3, dtype=torch.float64)
    position = torch.rand(10_000, 2, dtype=torch.float64) * 4
    index, weight = common.multilinear(position, (5, 6))
    ours = common.gather_weighted(table, index, weight)
    plain = (table[index] * weight[..., None]).sum(1)
    gradient = torch.autograd.grad((ours * pull).sum(), table)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((plain * pull).sum(), table)[0])


# ---- §3 rendering --------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 8.0))
def test_weights_match_the_paper_s_product(seed, h):
    """alpha, t and w written out term by term in float64."""
    g = torch.Generator().manual_seed(seed)
    sdf = torch.randn(3, 9, generator=g, dtype=torch.float64)
    ours = common.neus_weights(sdf, h)
    for ray in range(3):
        passed = 1.0
        for n in range(8):
            phi, phi_next = [1 / (1 + math.exp(-h * float(sdf[ray, i]))) for i in (n, n + 1)]
            alpha = max((phi - phi_next) / phi, 0.0)
            assert float(ours[ray, n]) == pytest.approx(passed * alpha, abs=1e-12)
            passed *= 1 - alpha
    assert (ours >= 0).all() and (ours.sum(1) <= 1 + 1e-6).all()


def test_weights_hold_deep_behind_a_surface_and_are_zero_when_leaving_one():
    # the plain form gives 2e-10 in float32
    behind = torch.tensor([[-5.0, -20.0]])
    assert common.neus_weights(behind, 10.0).item() == pytest.approx(1.0)
    away = torch.linspace(-1, 1, 20)[None]  # leaving a surface: the SDF grows
    assert common.neus_weights(away, 50.0).abs().max() == 0
    sdf = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(common.neus_weights, (sdf, h))


@pytest.mark.parametrize("h", [4.0, 16.0, 64.0])
def test_an_analytic_plane_and_sphere_render_at_their_depth(h):
    """96 samples over 59 m of the true SDF are within half a section, at its middle.

    Shorter sections have a smaller error.
    """
    def rendered(sdf, depth):
        return (common.neus_weights(sdf, h) * (depth[:, 1:] + depth[:, :-1]) / 2).sum(1)

    depth = torch.linspace(1, 60, 96, dtype=torch.float64)[None]
    half = (depth[0, 1] - depth[0, 0]) / 2
    assert (rendered(20.0 - depth, depth) - 20.0).abs() < half
    # a sphere of 5 m at 20 m, whose edge stands at 0.2527 rad
    angle = torch.linspace(0, 0.2, 9, dtype=torch.float64)[:, None]
    along, across = depth * angle.cos(), depth * angle.sin()
    sdf = ((along - 20) ** 2 + across ** 2).sqrt() - 5
    truth = 20 * angle.cos() - (25 - (20 * angle.sin()) ** 2).sqrt()
    limit = half if h > 4 else 2 * half
    assert ((rendered(sdf, depth) - truth[:, 0]).abs() < limit).all()
    fine = torch.linspace(1, 60, 3000, dtype=torch.float64)[None]
    assert (rendered(20.0 - fine, fine) - 20.0).abs() < 2e-2 + 0.5 / h ** 2


def test_samples_are_stratified_and_follow_the_weights():
    g = torch.Generator().manual_seed(0)
    near, far = torch.full((50,), 1.0), torch.full((50,), 33.0)
    depth = common.stratified(near, far, torch.rand(50, 16, generator=g))
    assert torch.equal(((depth - 1) / 2).long(), torch.arange(16).expand(50, 16))
    edges = torch.arange(5.0)[None]
    weights = torch.tensor([[0.1, 0.0, 0.6, 0.3]])
    samples = common.importance(edges, weights, torch.rand(1, 200_000, generator=g))[0]
    share = torch.bincount(samples.long(), minlength=4) / 200_000
    torch.testing.assert_close(share, weights[0], atol=3e-3, rtol=0)
    third = samples[(samples >= 2) & (samples < 3)]
    assert abs(float(third.mean()) - 2.5) < 5e-3  # even within a section
    of_nan = common.importance(edges, torch.full_like(weights, math.nan), torch.rand(1, 9))
    assert of_nan.isfinite().all() and (of_nan >= 0).all() and (of_nan <= 4).all()


# ---- §5 curvature --------------------------------------------------------------------

def test_surface_variation_is_0_on_plane_and_line_and_a_third_in_a_ball():
    rng = np.random.default_rng(0)
    plane = np.concatenate([rng.uniform(-5, 5, (2000, 2)), np.zeros((2000, 1))], 1)
    plane = (plane.astype(np.float32) + [50, -40, 1]).astype(np.float32)
    assert common.surface_variation(plane[:200], plane).max() < 1e-6
    line = (np.linspace(-5, 5, 500)[:, None] * [1, 2, 3]).astype(np.float32)
    assert common.surface_variation(line, line).max() < 1e-6
    ball = rng.normal(size=(20000, 3)).astype(np.float32)
    middle = common.surface_variation(np.zeros((1, 3), np.float32), ball, k=20000)
    assert middle[0] == pytest.approx(1 / 3, abs=0.02)
    same = np.ones((40, 3), np.float32)
    assert (common.surface_variation(same, same) == 0).all()  # no spread, no NaN
    assert common.surface_variation(ball[:0], ball).shape == (0,)
    assert common.surface_variation(ball[:3], ball[:0]).tolist() == [0, 0, 0]


def test_surface_variation_is_the_ratio_of_eigenvalues():
    rng = np.random.default_rng(1)
    cloud = (rng.normal(size=(3000, 3)) * [8, 3, 0.5] + [40, 10, -1]).astype(np.float32)
    ours = common.surface_variation(cloud[:300], cloud, 32)
    expected = []
    for p in cloud[:300].astype(np.float64):  # brute-force neighbours, LAPACK eigenvalues
        squared = ((cloud - p) ** 2).sum(1)
        near = cloud[np.argsort(squared, kind="stable")[:32]].astype(np.float64)
        values = np.linalg.eigvalsh(np.cov(near.T, bias=True))
        expected.append(values[0] / values.sum())
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    moved = (cloud @ turn * 1.7).astype(np.float32)
    queries = (cloud[:300] @ turn * 1.7).astype(np.float32)
    np.testing.assert_allclose(common.surface_variation(queries, moved), ours, atol=2e-5)


# ---- §6 schedules and random streams -------------------------------------------------

def test_the_learning_rate_warms_up_and_follows_half_a_cosine():
    assert common.cosine(0, 10, 100) == pytest.approx(1 / 3)
    assert common.cosine(10, 10, 100) == 1
    assert common.cosine(55, 10, 100) == pytest.approx(0.5)
    assert common.cosine(100, 10, 100) == pytest.approx(0)
    rates = [common.cosine(step, 10, 100) for step in range(10, 100)]
    assert all(rate > later for rate, later in zip(rates, rates[1:]))


def test_random_streams_belong_to_frames():
    def draws(seeds):
        return torch.stack([torch.rand(3, generator=g) for g in common.frame_rngs(seeds, CPU)])

    seeds = torch.tensor([5, 2**61 + 7])
    forward = draws(seeds)
    assert torch.equal(forward, draws(seeds.flip(0)).flip(0))
    assert not torch.equal(forward[0], forward[1])


def test_a_random_subset_is_uniform_and_in_order():
    def subset(n, seed):
        return common.random_subset(n, rows, torch.Generator().manual_seed(seed))

    rows = torch.arange(100, 400, 3)
    drawn = torch.stack([subset(30, seed) for seed in range(300)])
    assert (drawn.diff(dim=1) > 0).all() and torch.isin(drawn, rows).all()
    share = torch.bincount(drawn.flatten(), minlength=400)[rows] / 300
    assert (share - 0.3).abs().max() < 0.13  # each as often; standard deviation 0.026
    assert torch.equal(subset(30, 7), drawn[7])
    assert torch.equal(common.random_subset(101, rows, torch.Generator()), rows)


# ---- §7 sparse convolutions ----------------------------------------------------------

def sites(seed=0, shape=(5, 7, 6), frames=4, share=0.3, empty=2):
    """Random sorted coordinates; frame `empty` has none."""
    taken = torch.rand(frames, *shape, generator=torch.Generator().manual_seed(seed)) < share
    taken[empty] = False
    return taken.nonzero()


def dense(coords, x, frames, shape):
    """Rows of sites as a volume. coords (V, 4), x (V, C) -> (B, C, Z, Y, X)."""
    volume = x.new_zeros(frames, *shape, x.shape[1])
    return volume.index_put(tuple(coords.t()), x).permute(0, 4, 1, 2, 3)


def ravelled(coords, shape):
    return torch.as_tensor(np.ravel_multi_index(tuple(coords.t().numpy()), (100, *shape)))


class OnCuda(torch.Tensor):
    """A tensor that says it lies on a GPU, for what asks it."""
    is_cuda = True


def kernel_map(coords, shape, size, pad=None, on_gpu=False):
    """The map of a device, strided where there is a pad -> coordinates of the outputs, map."""
    if on_gpu:
        coords = coords.as_subclass(OnCuda)
    if pad is None:
        kmap = common.submanifold_map(coords, shape, size)
    else:
        coords, kmap = common.strided_map(coords, shape, pad, size)
    assert isinstance(kmap, common.KernelTable if on_gpu else common.KernelPairs)
    fields = [field.as_subclass(torch.Tensor) if isinstance(field, torch.Tensor) else field
              for field in kmap]
    return coords.as_subclass(torch.Tensor), type(kmap)(*fields)


def joined(kmap, n_in):
    """A kernel map's pairs, as the set of (offset, output, input)."""
    if isinstance(kmap, common.KernelPairs):
        counts = kmap.ends.diff(prepend=torch.zeros(1, dtype=torch.int32))
        offset = torch.repeat_interleave(torch.arange(27), counts)
        pairs = list(zip(offset.tolist(), kmap.outs.tolist(), kmap.ins.tolist()))
    else:
        pairs = [(offset, output, kmap.ins[output, offset].item())
                 for output, offset in (kmap.ins < n_in).nonzero().tolist()]
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


PADS = {"submanifold": None, "strided": (1, 1, 1), "strided, no padding in z": (0, 1, 1)}


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.02])
@pytest.mark.parametrize("kind", PADS)
def test_sparse_convolution_matches_conv3d_on_occupied_sites(kind, share, on_gpu, monkeypatch):
    """Dense sites, and a few, where most offsets have no pair.

    A GPU's map is multiplied 11 rows at a time here.
    """
    chunks = [slice(start, start + 11) for start in range(0, 800, 11)]
    monkeypatch.setattr(common, "chunks", lambda n, width: chunks[:-(-n // 11)])
    torch.manual_seed(0)
    shape = (5, 7, 6)
    frames = 4
    coords = sites(share=share)
    pad = PADS[kind]
    x = torch.randn(len(coords), 3, requires_grad=True)
    weight = torch.randn(27, 3, 5, requires_grad=True)
    kernel = weight.double().view(3, 3, 3, 3, 5).permute(4, 3, 0, 1, 2)
    volume = dense(coords, x.double(), frames, shape)
    out, kmap = kernel_map(coords, shape, frames, pad, on_gpu)
    if pad is None:
        expected = F.conv3d(volume, kernel, padding=1)
    else:
        expected = F.conv3d(volume, kernel, stride=2, padding=pad)
        assert (ravelled(out, expected.shape[2:]).diff() > 0).all()  # sorted
        everywhere = torch.zeros(frames, *expected.shape[2:], dtype=torch.bool)
        everywhere[tuple(out.t())] = True
        # no output site is missing
        assert (expected.permute(0, 2, 3, 4, 1)[~everywhere] == 0).all()
    expected = expected.permute(0, 2, 3, 4, 1)[tuple(out.t())]
    ours = common.SparseConvolution.apply(x, weight, kmap)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours, common.SparseConvolution.apply(x, weight, kmap))
    pull = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * pull).sum(), (x, weight))
    expected_gradients = torch.autograd.grad((expected * pull).sum(), (x, weight))
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    # of the weight alone, as in the first layer
    again = common.SparseConvolution.apply(x.detach(), weight, kmap)
    assert torch.equal(torch.autograd.grad((again * pull).sum(), weight)[0], gradients[1])
    # as on CUDA
    rough = common.SparseConvolution.apply(x.bfloat16(), weight.bfloat16(), kmap)
    torch.testing.assert_close(rough.double(), expected, atol=0.15, rtol=0.05)
    rough_gradients = torch.autograd.grad((rough * pull).sum(), (x, weight))
    for a, b in zip(rough_gradients, expected_gradients):
        assert (a - b).norm() < 0.02 * b.norm()


def test_chunks_cover_every_row_and_are_bounded():
    for n, width in ((0, 27), (10, 2**25), (9, 2**25), (5, 2**27)):
        parts = [range(n)[part] for part in common.chunks(n, width)]
        assert [row for part in parts for row in part] == list(range(n))
        assert all(0 < len(part) * width <= 2**27 for part in parts)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("shape, moved", [((4, 5, 6), (0, 0, 0, 0)),
                                          ((4, 1505, 1504), (239, 0, 1500, 1498))])
def test_kernel_maps_match_a_dictionary(shape, moved, on_gpu):
    """In one small volume, and in the last corner of the last of many large ones.

    The keys of the latter do not fit 32 bits.
    """
    near = sites(1, (4, 5, 6), share=0.4)
    coords = near + torch.tensor(moved)
    size = moved[0] + 4
    keys = common.ravel(coords, shape, size)
    assert keys.dtype == (torch.int64 if any(moved) else torch.int32)
    assert torch.equal(common.unravel(keys, shape), coords)
    # moved by an even number of cells: the same strided map, moved by half
    half = torch.tensor([moved[0], *(m // 2 for m in moved[1:])])
    for pad in ((1, 1, 1), (0, 1, 1)):
        out, kmap = kernel_map(coords, shape, size, pad, on_gpu)
        near_out, near_map = kernel_map(near, (4, 5, 6), 4, pad, on_gpu)
        assert torch.equal(out - near_out, half.expand_as(out))
        for field, near_field in zip(kmap, near_map):
            assert torch.equal(torch.as_tensor(field), torch.as_tensor(near_field))
        reads = set()
        row = {tuple(c): i for i, c in enumerate(coords.tolist())}
        for o, (b, *zyx) in enumerate(out.tolist()):
            for k in range(27):
                t = k // 9, k // 3 % 3, k % 3
                cell = b, *(2 * v - p + at for v, p, at in zip(zyx, pad, t))
                if cell in row:
                    reads.add((k, o, row[cell]))
        assert joined(kmap, len(coords)) == reads
    expected = set()
    for (b, z, y, x), o in row.items():
        for k in range(27):
            neighbour = b, z + k // 9 - 1, y + k // 3 % 3 - 1, x + k % 3 - 1
            if neighbour in row:
                expected.add((k, o, row[neighbour]))
    _, kmap = kernel_map(coords, shape, size, None, on_gpu)
    assert joined(kmap, len(coords)) == expected
    if on_gpu:
        return
    for o in range(len(coords)):  # the same pairs again, by output
        pairs = kmap.order[kmap.first[o]:kmap.first[o + 1]]
        assert (kmap.outs[pairs] == o).all() and len(pairs) == (kmap.outs == o).sum()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_kernel_maps_of_no_sites_are_empty(on_gpu):
    none = torch.zeros(0, 4, dtype=torch.int64)
    w = torch.randn(27, 3, 4, requires_grad=True)
    for pad in (None, (1, 1, 1)):
        x = torch.zeros(0, 3, requires_grad=True)
        out, kmap = kernel_map(none, (4, 4, 4), 2, pad, on_gpu)
        ours = common.SparseConvolution.apply(x, w, kmap)
        assert out.shape == (0, 4) and ours.shape == (0, 4)
        grad_x, grad_w = torch.autograd.grad(ours.sum(), (x, w))
        assert grad_x.shape == (0, 3) and (grad_w == 0).all()


def test_the_trunk_waits_for_a_gpu_seven_times():
    """For the number of voxels, and twice for each reduction. Never in backward."""
    net = common.VoxelResNet(**GRID, width=2)
    points, b = cloud()
    with Waits() as forward:
        last = net(points.as_subclass(OnCuda), b.as_subclass(OnCuda), 3)[-1]
    assert forward.names == 7 * ["nonzero"]
    loss = last.features.as_subclass(torch.Tensor).square().sum()
    with Waits() as backward:
        loss.backward()
    assert not backward.names
    assert all(p.grad is not None for p in net.parameters())
    # and it is the trunk of a CPU
    torch.testing.assert_close(last.features.as_subclass(torch.Tensor),
                               net(points, b, 3)[-1].features, atol=1e-4, rtol=1e-4)


def test_segment_sum_is_the_same_with_and_without_torch_scatter(monkeypatch):
    pytest.importorskip("torch_scatter")
    assert common.torch_scatter is not None
    values = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randint(7, (50,))
    ours = common.segment_sum(values, index, 9)
    grad = torch.autograd.grad(ours.square().sum(), values)[0]
    monkeypatch.setattr(common, "torch_scatter", None)
    plain = common.segment_sum(values, index, 9)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grad, torch.autograd.grad(plain.square().sum(), values)[0])
    expected = torch.stack([values[index == i].sum(0) for i in range(9)])
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize("scatter", [True, False])
def test_segment_mean_is_that_of_each_segment(scatter, monkeypatch):
    """With torch-scatter and without. Rows after the last segment do not count."""
    if scatter:
        pytest.importorskip("torch_scatter")
        assert common.torch_scatter is not None
        monkeypatch.setattr(torch, "segment_reduce", None)
    else:
        monkeypatch.setattr(common, "torch_scatter", None)
    values = torch.randn(50, 3)
    first = torch.tensor([0, 1, 4, 20, 47])
    ours = common.segment_mean(values, first)
    expected = [values[a:b].double().mean(0) for a, b in zip(first, first[1:])]
    torch.testing.assert_close(ours, torch.stack(expected).float())
    assert common.segment_mean(values, first[:1]).shape == (0, 3)
    assert common.segment_mean(values[:0], first[:1]).shape == (0, 3)


# ---- §8 the trunk --------------------------------------------------------------------

def cloud(n=400, size=3, seed=0):
    """Random points in the range of GRID, and the frame of each, sorted."""
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(n, 3, generator=g) * torch.tensor([6.4, 6.4, 3.2]) + torch.tensor(GRID["low"])
    points = torch.cat([xyz, torch.rand(n, 2, generator=g)], 1)
    return points, torch.sort(torch.randint(size, (n,), generator=g)).values


def test_voxels_hold_the_mean_of_their_points():
    net = common.VoxelResNet(**GRID, width=2)
    points, b = cloud(3000)
    points[1500:, :3] = points[:1500, :3].clone()  # two in a voxel, which differ in the rest
    b[1500:] = b[:1500].clone()
    points[:5, 0] = 99.0                           # outside
    level = net.voxelise(points, b, 3)
    low = np.array(GRID["low"])
    expected = {}
    for p, frame in zip(points[5:].double().numpy(), b[5:].tolist()):
        cell = np.floor((p[:3] - low) / 0.1 + 1e-9).astype(int)
        expected.setdefault((frame, *cell[::-1].tolist()), []).append(p)
    voxels = {tuple(c): f for c, f in zip(level.coords.tolist(), level.features.numpy())}
    in_both = voxels.keys() & expected.keys()
    assert len(in_both) > 0.995 * len(expected)
    assert len(voxels) == pytest.approx(len(expected), abs=8)  # float32 at the faces
    inner = []  # cells with no point near a face, which might be another cell's
    for cell in in_both:
        part = (np.array(expected[cell])[:, :3] - low) / 0.1 % 1
        if (abs(part - 0.5) < 0.499).all():
            inner.append(cell)
    for cell in inner:
        np.testing.assert_allclose(voxels[cell], np.mean(expected[cell], 0), atol=1e-5)
    assert sum(len(expected[cell]) > 1 for cell in inner) > 1000


def test_the_encoder_ignores_point_order_empty_frames_and_shifts_by_whole_cells():
    torch.manual_seed(0)
    net = common.VoxelResNet(**GRID, width=2).eval()
    points, b = cloud()
    a = net(points, b, 3)[-1]
    shuffled = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))
    other = net(points[shuffled], b[shuffled], 3)[-1]
    torch.testing.assert_close(a.features, other.features, atol=1e-5, rtol=1e-4)
    assert torch.equal(a.coords, other.coords)
    # an empty last frame
    more = net(points, b, 4)[-1].dense()
    assert torch.equal(more[:3], a.dense()) and (more[3] == 0).all()

    small = points[:, :3].abs().amax(1) < 1.2
    points = points[small]
    b = b[small]
    moved = points.clone()
    moved[:, 0] += 0.8  # a whole cell of the last level
    original = net.voxelise

    def without_xyz(points, b, size):
        level = original(points, b, size)
        return level._replace(features=level.features * torch.tensor([0, 0, 0, 1, 1]))

    net.voxelise = without_xyz
    first = net(points, b, 3)[-1]
    second = net(moved, b, 3)[-1]
    assert torch.equal(first.coords + torch.tensor([0, 0, 0, 1]), second.coords)
    assert len(first.coords) > 5
    torch.testing.assert_close(first.features, second.features, atol=1e-5, rtol=1e-4)


def test_kernel_maps_are_built_once_a_level(monkeypatch):
    calls = []

    def counted(name, original, *words):
        calls.append(name)
        return original(*words)

    for name in ("submanifold_map", "strided_map"):
        monkeypatch.setattr(common, name, partial(counted, name, getattr(common, name)))
    common.VoxelResNet(**GRID, width=2)(*cloud(), 3)
    assert calls.count("submanifold_map") == 4 and calls.count("strided_map") == 3


def test_batch_norm_of_one_row_is_finite_and_leaves_the_statistics():
    norm = common.BatchNorm(3).train()
    for rows in (0, 1):
        assert norm(torch.randn(rows, 3)).isfinite().all()
    assert (norm.running_mean == 0).all() and int(norm.num_batches_tracked) == 0
    norm(torch.randn(5, 3))
    assert (norm.running_mean != 0).all()


KINDS = [
    (torch.nn.BatchNorm1d, (6, 4), torch.contiguous_format),
    (torch.nn.BatchNorm2d, (2, 4, 5, 3), torch.contiguous_format),
    (torch.nn.BatchNorm2d, (2, 4, 5, 3), torch.channels_last),
    (torch.nn.BatchNorm3d, (2, 4, 3, 5, 2), torch.contiguous_format),
    (torch.nn.BatchNorm3d, (2, 4, 3, 5, 2), torch.channels_last_3d),
]


def norm_and_input(shape, layout, dtype=torch.float32):
    """A batch norm with random weights and statistics, an input far from 0, and a gradient.

    The gradient is contiguous, whatever the layout of the input.
    """
    torch.manual_seed(0)
    norm = trained(common.BatchNorm(shape[1], eps=1e-3)).train()
    x = (10 + torch.randn(shape)).to(dtype).contiguous(memory_format=layout)
    return norm, x.requires_grad_(), torch.randn(shape).to(dtype)


def pass_through(norm, x, grad):
    """What a layer does with x: output, all gradients, statistics."""
    y = norm(x)
    gradients = torch.autograd.grad(y, [x, norm.weight, norm.bias], grad)
    return [y.detach(), *gradients, *[buffer.clone() for buffer in norm.buffers()]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind, shape, layout", KINDS)
def test_batch_norm_of_one_process_is_torch_s_bit_for_bit(kind, shape, layout, training):
    norm, x, grad = norm_and_input(shape, layout)
    torch_s = kind(shape[1], eps=1e-3)
    torch_s.load_state_dict(norm.state_dict())
    for layer in (norm, torch_s):
        layer.train(training)
    for a, b in zip(pass_through(norm, x, grad), pass_through(torch_s, x, grad), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("kind, shape, layout", KINDS)
@pytest.mark.parametrize("dtype, close", [(torch.float32, dict(rtol=1e-5, atol=1e-5)),
                                          (torch.bfloat16, dict(rtol=2e-2, atol=2e-2))])
def test_synchronised_batch_norm_is_torch_s(monkeypatch, kind, shape, layout, dtype, close):
    """Of one process that thinks it is one of several, against torch's in float64."""
    monkeypatch.setattr(common, "processes", lambda: 2)
    norm, x, grad = norm_and_input(shape, layout, dtype)
    exact = kind(shape[1], eps=1e-3)
    exact.load_state_dict(norm.state_dict())
    double = x.detach().double().requires_grad_()
    expected = pass_through(exact.double(), double, grad.double())
    y, grad_x, *others = pass_through(norm, x, grad)
    assert y.dtype == grad_x.dtype == dtype
    assert y.stride() == grad_x.stride() == x.stride()
    torch.testing.assert_close(y.double(), expected[0], **close)
    torch.testing.assert_close(grad_x.double(), expected[1], **close)
    for a, b in zip(others, expected[2:], strict=True):  # float32 in any case
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 2), (2, 3, 2, 3, 2), (1, 3)])
def test_synchronised_batch_norm_has_the_gradient_of_differences(monkeypatch, shape):
    """In float64. A single row takes the running statistics, which do not depend on it."""
    monkeypatch.setattr(common, "processes", lambda: 2)
    norm, x, _ = norm_and_input(shape, torch.contiguous_format, torch.float64)
    norm.double()
    assert torch.autograd.gradcheck(lambda x, *weights: norm(x), (x, norm.weight, norm.bias))


def test_synchronised_batch_norm_keeps_its_input_once(monkeypatch):
    monkeypatch.setattr(common, "processes", lambda: 2)
    norm, x, _ = norm_and_input((2, 4, 5, 3), torch.channels_last, torch.bfloat16)
    sizes = []

    def keep(tensor):
        sizes.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x * 1)
    large = [size for size in sizes if size[1] > 4]
    assert large == [(torch.bfloat16, 120)], sizes


@pytest.mark.parametrize("depth", [18, 50])
def test_image_weights_have_torchvision_s_names_without_fc(depth):
    reference = {18: torchvision.models.resnet18, 50: torchvision.models.resnet50}[depth]()
    expected = {k for k in reference.state_dict() if not k.startswith("fc.")}
    assert expected == set(common.CameraNet(depth, 4, bins=3).resnet.state_dict())


def camera_net_and_cells():
    """A CameraNet in eval mode, and the cells of a small volume."""
    net = common.CameraNet(18, 4, max_depth=6.0, bins=3).eval()
    return net, common.VoxelResNet(**GRID, width=2).cells[-1]


def images_and_no_mask():
    """Four random images of 48 x 64 pixels, and a mask that masks none of them."""
    images = torch.randint(0, 255, (4, 3, 48, 64), dtype=torch.uint8)
    return images, torch.zeros(4, 48, 64, dtype=torch.bool)


def camera_volume(net, cells, images, masked, size=(48, 64)):
    """The lifted volume of one frame with four cameras. size: each image's own height, width."""
    batch = SimpleNamespace(images=images, hw=torch.tensor([size] * 4),
                            lidar2img=pinhole(1, 4), size=1)
    return net(batch, cells, masked)[0]


def test_masked_pixels_and_padding_do_not_matter_and_visible_ones_do():
    torch.manual_seed(0)
    net, cells = camera_net_and_cells()
    images, masked = images_and_no_mask()
    masked[:, :, :32] = True
    left = images.clone()
    left[..., :32] = 255 - left[..., :32]
    right = images.clone()
    right[..., 32:] = 255 - right[..., 32:]
    volume = partial(camera_volume, net, cells)
    assert torch.equal(volume(images, masked), volume(left, masked))
    assert not torch.equal(volume(images, masked), volume(right, masked))
    assert torch.equal(volume(images, None, (48, 32)), volume(right, None, (48, 32)))
    assert not torch.equal(volume(images, None), volume(right, None))


def test_padding_stays_masked_where_a_mask_is_given():
    """Waymo's side images under CLAP's mask, which does not know where an image ends."""
    torch.manual_seed(0)
    net, cells = camera_net_and_cells()
    images, masked = images_and_no_mask()
    masked[:, :16] = True
    other = torch.cat([images[..., :32], 255 - images[..., 32:]], 3)
    volume = camera_volume(net, cells, images, masked, (48, 32))
    assert torch.equal(volume, camera_volume(net, cells, other, masked, (48, 32)))
    assert volume.any()


def test_an_absent_branch_counts_as_zeros():
    net = common.FusionNet(4, 3, 5).eval()
    lidar = torch.randn(2, 4, 2, 6, 6)
    camera = torch.randn(2, 3, 2, 6, 6)
    assert torch.equal(net(lidar, None), net(lidar, torch.zeros_like(camera)))
    assert torch.equal(net(None, camera), net(torch.zeros_like(lidar), camera))
    assert not torch.equal(net(lidar, camera), net(lidar, None))


def test_the_encoder_matches_the_dense_network_on_occupied_sites():
    """Convolutions, norms, residuals and the four levels written out with conv3d.

    test_export.py asks the same of spconv, where that is installed.
    """
    def layer(x, conv, bn, occupied, **how):
        weight = conv.weight.view(3, 3, 3, *conv.weight.shape[1:]).permute(4, 3, 0, 1, 2)
        y = F.conv3d(x, weight, **how)
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3)
        return y * occupied

    def residual(x, block, occupied):
        y = layer(x, block.conv1, block.bn1, occupied, padding=1).relu()
        return (x + layer(y, block.conv2, block.bn2, occupied, padding=1)).relu()

    torch.manual_seed(0)
    net = trained(common.VoxelResNet(**GRID, width=2))
    points, b = cloud(3000, 2)
    level = net.voxelise(points, b, 2)
    x = dense(level.coords, level.features, 2, level.cells.shape)
    occupied = dense(level.coords, torch.ones(len(level.coords), 1), 2, level.cells.shape)
    x = layer(x, net.conv_input.conv, net.conv_input.bn, occupied, padding=1).relu()
    expected = []
    for blocks, pad in ((net.conv1, None), (net.conv2, (1, 1, 1)), (net.conv3, (1, 1, 1)),
                        (net.conv4, (0, 1, 1))):
        if pad:
            down, *blocks = blocks
            reached = F.conv3d(occupied, torch.ones(1, 1, 3, 3, 3), stride=2, padding=pad)
            occupied = (reached > 0).float()
            x = layer(x, down.conv, down.bn, occupied, stride=2, padding=pad).relu()
        for block in blocks:
            x = residual(x, block, occupied)
        expected.append((x, occupied))
    for level, (x, occupied) in zip(net(points, b, 2), expected, strict=True):
        assert torch.equal(level.coords, occupied[:, 0].nonzero()) and level.features.std() > 0.02
        torch.testing.assert_close(level.dense(), x, atol=1e-5, rtol=1e-4)


def test_the_lift_matches_a_sum_written_out_camera_by_camera(monkeypatch):
    """Two frames, three cameras that look at the same cells.

    The feature and the probability of the depth come from torch's own interpolation, and are
    summed over the cameras that see a cell.
    """
    torch.manual_seed(0)
    C, D = 3, 5
    far = 3.0
    cells = common.VoxelResNet(**GRID, width=2).cells[-1]
    net = common.CameraNet(18, C, max_depth=far, bins=D).eval()
    x = 2 * torch.randn(6, C + D, 6, 8)
    matrices = torch.cat([pinhole(yaw=yaw) for yaw in (0.0, 0.3, 2.5)] * 2)
    hw = torch.tensor([[48, 64], [48, 64], [40, 56]] * 2)
    shift = torch.eye(4).repeat(6, 1, 1)
    shift[:, :3, 3] = 0.4 * torch.randn(6, 3)
    batch = SimpleNamespace(images=torch.zeros(6, 3, 48, 64, dtype=torch.uint8), hw=hw,
                            lidar2img=matrices @ shift, size=2)
    monkeypatch.setattr(net.neck, "forward", lambda stages: x)
    with torch.no_grad():
        volume, seen = net(batch, cells)
    centres = cells.centres("cpu")
    expected = torch.zeros(2, C, len(centres))
    cameras = torch.zeros(2, len(centres), dtype=torch.int64)  # that see each cell
    beyond = 0
    how = dict(align_corners=False, padding_mode="border")
    for i, (matrix, (h, w)) in enumerate(zip(batch.lidar2img, hw.tolist())):
        u, v, depth = (centres @ matrix[:3, :3].t() + matrix[:3, 3]).unbind(1)
        u, v = u / depth, v / depth
        visible = (depth > 1) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
        beyond += (visible & (depth >= far)).sum()
        visible &= depth < far
        place = torch.stack([u / 64, v / 48, (depth - 1) / (far - 1)], 1)[visible] * 2 - 1
        p = x[i, C:].exp() / x[i, C:].exp().sum(0)
        pulled = F.grid_sample(x[None, i, :C], place[None, None, :, :2], **how)[0, :, 0]
        p = F.grid_sample(p[None, None], place[None, None, None], **how)[0, 0, 0, 0]
        expected[i // 3][:, visible] += pulled * p * D
        cameras[i // 3] += visible
    assert (cameras > 1).sum() > 20 < beyond and cameras.amax(1).tolist() == [2, 2]
    torch.testing.assert_close(volume.flatten(2), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(seen.flatten(1), cameras > 0)


@pytest.mark.parametrize("low, high, depth", [((-54., -54., -5.), (54., 54., 3.), 60.),
                                              ((0., -40., -3.), (70.4, 40., 1.), 70.4 * 60 / 54)])
def test_the_lift_reaches_as_far_as_the_range(low, high, depth):
    """BEVFusion's 60 m are for 54 m; KITTI's range ends at 70.4 m, Waymo's at 75.2 m."""
    grid = SimpleNamespace(low=low, high=high, voxel=(0.4, 0.4, 0.4))
    _, camera, _ = common.trunk(grid, 18, 2, 4)
    assert camera.max_depth == pytest.approx(depth)


# ---- §9 processes --------------------------------------------------------------------

COUNTS = [(5, 2), (4, 0), (1, 1), (1, 0), (0, 0), (3, 3)]  # rows on the two processes


def normalise_part(rank):
    """What batch norm does with one process's rows: output, gradients, statistics, a dtype."""
    results = []
    for counts in COUNTS:
        norm, x, weight = batch_norm_case(counts)
        rows = slice(0, counts[0]) if rank == 0 else slice(counts[0], sum(counts))
        part = x[rows].detach().requires_grad_()
        y = norm(part)
        (y * weight[rows]).sum().backward()
        statistics = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
        statistics = [tensor.clone() for tensor in statistics]
        rough = norm(part.detach().bfloat16())
        results.append((y.detach(), part.grad, norm.weight.grad, norm.bias.grad, *statistics,
                        rough.dtype))
    return results


def batch_norm_case(counts):
    """A batch norm with random weights and statistics, rows far from 0, and their weights."""
    g = torch.Generator().manual_seed(sum(counts))
    norm = common.BatchNorm(4, eps=1e-3)
    norm.weight.data = torch.rand(4, generator=g) + 0.5
    norm.bias.data = torch.randn(4, generator=g)
    norm.running_mean = torch.randn(4, generator=g)
    norm.running_var = torch.rand(4, generator=g) + 0.5
    x = 100 + torch.randn(sum(counts), 4, generator=g)
    return norm, x, torch.randn(sum(counts), 4, generator=g)


def test_batch_norm_over_two_processes_is_that_of_the_joined_rows(server, tmp_path):
    parts = on_two(server, normalise_part, tmp_path)
    close = dict(rtol=1e-4, atol=2e-4)
    for counts, one, two in zip(COUNTS, *parts, strict=True):
        norm, x, weight = batch_norm_case(counts)
        x.requires_grad_()
        few = sum(counts) < 2  # then the running statistics stand in, unchanged
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                         not few, 0.1, 1e-3)
        (y * weight).sum().backward()
        torch.testing.assert_close(torch.cat([one[0], two[0]]), y.detach(), **close)
        expected = x.grad if len(x) else torch.zeros(0, 4)
        torch.testing.assert_close(torch.cat([one[1], two[1]]), expected, **close)
        for i, grad in ((2, norm.weight.grad), (3, norm.bias.grad)):  # DDP adds them up
            torch.testing.assert_close(one[i] + two[i], grad, **close)
        for part in (one, two):
            torch.testing.assert_close(part[4], norm.running_mean, **close)
            torch.testing.assert_close(part[5], norm.running_var, rtol=1e-3, atol=1e-3)
            assert part[6] == (not few) and part[7] == torch.bfloat16


def failures(*words):
    """Failed processes as torch's launcher reports them. words: exit code, s of each rank."""
    return {rank: SimpleNamespace(exitcode=code, timestamp=seconds)
            for rank, (code, seconds) in enumerate(words)}


def test_the_process_that_failed_first_by_itself_is_blamed():
    # of errors the first
    assert common.rank_to_blame(failures((1, 7), (1, 5), (1, 6))) == 1
    # a killed process, whose others lose the connection and leave before it is noticed
    assert common.rank_to_blame(failures((1, 5), (-signal.SIGKILL, 6))) == 1
    # the launcher ends the others with SIGTERM, NCCL with SIGABRT
    assert common.rank_to_blame(failures((-signal.SIGTERM, 5), (1, 6))) == 0
    assert common.rank_to_blame(failures((-signal.SIGABRT, 5), (-signal.SIGSEGV, 6))) == 1
    # killed after more than 10 s: it was hanging, and the launcher killed it
    assert common.rank_to_blame(failures((1, 5), (-signal.SIGKILL, 15))) == 1
    assert common.rank_to_blame(failures((1, 5), (-signal.SIGKILL, 16))) == 0
    # who was asked to stop, and has saved, did so because of another one
    assert common.rank_to_blame(failures((143, 5), (1, 5))) == 1
    assert common.rank_to_blame(failures((143, 5), (143, 6))) == 0
    # at the same second the one that says why
    both = failures((1, 5), (1, 5))
    both[1].message = {"message": "SystemExit: no batch"}
    assert common.rank_to_blame(both) == 1
    assert common.describe_failure(1, 2, both[1]) == "rank 1 of 2: no batch"


class Trio(torch.nn.Module):
    """Small networks of images, volumes and rows, with these classes of batch norm."""

    def __init__(self, image, volume, row):
        super().__init__()
        relu = partial(torch.nn.ReLU, inplace=True)
        self.images = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2), image(8), relu(), torch.nn.Conv2d(8, 4, 1), image(4))
        self.images.to(memory_format=torch.channels_last)
        self.volumes = torch.nn.Sequential(
            torch.nn.Conv3d(2, 4, 3), volume(4), relu(), torch.nn.Conv3d(4, 2, 1), volume(2))
        self.rows = torch.nn.Sequential(
            torch.nn.Linear(3, 8), row(8), relu(), torch.nn.Linear(8, 2), row(2), relu())

    def forward(self, images, volumes, rows):
        """images (B, 3, H, W), volumes (B, 2, Z, Y, X), rows (N, 3) -> ()."""
        images = self.images(images.contiguous(memory_format=torch.channels_last))
        terms = [images.square().mean((1, 2, 3)).sum(),
                 self.volumes(volumes).cos().mean((1, 2, 3, 4)).sum()]
        return sum(terms) + self.rows(rows).square().sum() / 10


def two_frames(counts):
    """Images, volumes and rows of two frames, with so many rows."""
    g = torch.Generator().manual_seed(sum(counts))
    images = [5 + torch.randn(1, 3, 9, 12, generator=g) for _ in range(2)]
    volumes = [torch.randn(1, 2, 4, 5, 6, generator=g) for _ in range(2)]
    rows = [torch.randn(n, 3, generator=g) - 3 for n in counts]
    return images, volumes, rows


def train_trio(net, model, frames):
    """Three steps -> the gradients of each, and the state after them."""
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    gradients = []
    for _ in range(3):
        opt.zero_grad()
        net(*frames).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        opt.step()
    return gradients, model.state_dict()


def train_half_a_trio(rank, state, pairs):
    """One of two processes: it trains on a frame of each pair, with DDP."""
    collectives = []
    for name in ("all_gather", "all_reduce"):
        monitored(common, name, collectives)
    results = []
    for images, volumes, rows in pairs:
        model = Trio(common.BatchNorm, common.BatchNorm, common.BatchNorm)
        model.load_state_dict(state)
        net = common.wrap(model, CPU, 2)
        results.append(train_trio(net, model, (images[rank], volumes[rank], rows[rank])))
    return results, collectives


def monitored(module, name, calls):
    """Note each call of module.name in `calls`."""
    function = getattr(module, name)

    def call(*words):
        calls.append(name)
        return function(*words)

    setattr(module, name, call)


def test_training_on_two_processes_is_that_of_one(server, tmp_path):
    """Two frames on one process with torch's batch norms, and a frame on each of two with ours.

    In the second case the second frame has no row, in the third the first.
    """
    torch.manual_seed(0)
    torch_s = torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.BatchNorm1d
    state = Trio(*torch_s).state_dict()
    pairs = [two_frames(counts) for counts in ((7, 5), (6, 0), (0, 9))]
    (one, calls), (two, _) = on_two(server, train_half_a_trio, tmp_path, state, pairs)
    # six layers, three steps: one collective forward, one backward
    assert calls.count("all_gather") == calls.count("all_reduce") == 6 * 3 * len(pairs)
    for pair, ours, other in zip(pairs, one, two, strict=True):
        model = Trio(*torch_s)
        model.load_state_dict(state)
        frames = [torch.cat(parts) for parts in pair]
        expected = train_trio(lambda *frames, model=model: model(*frames) / 2, model, frames)
        for step, joined in zip(ours[0], expected[0], strict=True):
            torch.testing.assert_close(step, joined, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-5)
        for name, value in ours[1].items():
            assert torch.equal(value, other[1][name]), name


def one_frame_a_step(out):
    """What Run reads of a configuration."""
    return SimpleNamespace(out=str(out), batch=1, accumulate=1)


# ---- §10 run folders -----------------------------------------------------------------

@dataclass
class Config:
    data: str = ""
    preset: str = "paper"
    init: str = "none"
    steps: int = 0  # of training


@dataclass
class PresetConfig(Config):
    preset: Literal["paper", "small"] = "paper"


def test_help_ends_before_the_reading_list(monkeypatch, capsys):
    doc = "What it does.\n\n    python it.py\n\nRead with: common.py §1.\nDepartures:\n  D1  None."
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", doc)
    monkeypatch.setattr(sys, "argv", ["it.py", "--help"])
    with pytest.raises(SystemExit):
        common.parse(Config, {})
    printed = capsys.readouterr().out
    assert "What it does." in printed and "    python it.py" in printed and "--steps" in printed
    assert "Read with" not in printed and "Departures" not in printed


@pytest.mark.parametrize("doc", ["What it does.\n\nMore of it, with no reading list.", None])
def test_help_without_a_reading_list_is_the_whole_docstring(doc):
    assert common.summary(doc) == doc


@pytest.mark.parametrize("flags, preset, steps", [
    ([], "small", 340), (["--data", "x"], "paper", 0), (["--preset", "paper"], "paper", 0),
    (["--data", "x", "--preset", "small"], "small", 340), (["--init", "RUN"], "paper", 0),
    (["--init", "RUN", "--preset", "small"], "small", 340)])
def test_the_preset_is_the_flag_s_else_that_of_init_else_small_without_data(
        flags, preset, steps, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"preset": "paper"}')
    flags = [str(tmp_path) if flag == "RUN" else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", ["it.py", *flags])
    cfg = common.parse(Config, dict(steps=340))
    assert (cfg.preset, cfg.steps) == (preset, steps)


@pytest.mark.parametrize("flags, message", [
    (["--data", ""], "--data was given an empty text"),
    (["--data="], "--data was given an empty text"),
    (["--init", ""], "--init was given an empty text"),
    (["--preset", "large"], 2),
    (["--steps", "nan"], 2),
    (["--init", "x" * 5000], None),
])
def test_flags_that_no_shell_should_give_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["it.py", *flags])
    if message is None:
        assert common.parse(PresetConfig, {}).preset == "small"
        return
    with pytest.raises(SystemExit) as refusal:
        common.parse(PresetConfig, {})
    code = refusal.value.code
    assert code == message or isinstance(code, str) and message in code


@pytest.mark.parametrize("variables, gpus, message", [
    ("RANK=0", 2, "WORLD_SIZE is not set in the environment"),
    ("WORLD_SIZE=4", None, "RANK is not set in the environment"),
    ("RANK=abc WORLD_SIZE=1", None, "RANK=abc in the environment: expected a whole number"),
    ("RANK=-1 WORLD_SIZE=2", None, "RANK=-1 in the environment"),
    ("RANK=0 WORLD_SIZE=0", None, "WORLD_SIZE=0 in the environment"),
    ("RANK=1 WORLD_SIZE=1", None, "expected a rank below the number of processes"),
    ("RANK=0 WORLD_SIZE=1", 2, "--gpus 2, but RANK=0 and WORLD_SIZE=1"),
])
def test_an_environment_that_makes_no_sense_is_refused(variables, gpus, message, monkeypatch):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(SystemExit, match=message):
        common.launch(None, SimpleNamespace(gpus=gpus))


def test_the_environment_of_a_launcher_is_taken(monkeypatch):
    for name, value in dict(RANK=9, WORLD_SIZE=16, LOCAL_WORLD_SIZE=8).items():
        monkeypatch.setenv(name, str(value))
    for gpus in (None, 0, 8):
        assert common.place_in_job(SimpleNamespace(gpus=gpus)) == (9, 16)
    monkeypatch.setenv("LIDAR_CAMERA_TIMEOUT", "abc")
    with pytest.raises(SystemExit, match="LIDAR_CAMERA_TIMEOUT=abc .*expected a whole number"):
        common.environment_number("LIDAR_CAMERA_TIMEOUT", 300, 1)


def test_metrics_are_json_without_nan():
    text = common.to_json({"a": math.nan, "b": [math.inf, 0.1]})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 0.1]}


def refuse_the_data(rank):
    """What a process that opens a run folder on broken data gives back."""
    def act():
        raise data.DataError("nuscenes/scene/token: the scan is missing; extract it again")
    with pytest.raises(SystemExit) as refusal:
        common.rank0_first(rank, act)
    return refusal.value.code


def test_all_ranks_end_if_rank_0_refuses_the_data(server, tmp_path):
    codes = on_two(server, refuse_the_data, tmp_path)
    assert codes == ["nuscenes/scene/token: the scan is missing; extract it again", 1]


def outlive(pid_file):
    """A process that starts a rank, which ends with it."""
    die_with_the_server()
    rank = os.fork()
    if rank == 0:
        common.end_with_parent()
        Path(pid_file).write_text(str(os.getpid()))
    time.sleep(100)


def test_a_rank_ends_with_its_launcher(server, tmp_path):
    pid_file = tmp_path / "pid"
    launcher = server.Process(target=outlive, args=(pid_file,))
    launcher.start()
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    rank = Path("/proc", pid_file.read_text())
    assert rank.exists()
    launcher.kill()
    launcher.join()
    while rank.exists() and "State:\tZ" not in (rank / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_weight_file_with_something_else_than_tensors_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"bn1.bias": 3, "epoch": 7}, path)
    with pytest.raises(SystemExit, match="first bn1.bias: no tensor in the file, .64,. in the mod"):
        common.load_resnet(path, common.ResNet(18).resnet, 0)


# ---- §10 run folders: what is stored ------------------------------------------------

@dataclass
class FewFrames:
    """What open_run asks of a data set: two training frames and one of val."""
    root: str = "/nowhere/data"
    names: tuple = ("s/0", "s/1", "s/2")
    holds: str = "as it was"

    def split(self, name):
        return np.array([0, 1] if name == "train" else [2])

    def fingerprint(self):
        return {"tables": self.holds, "a.bin": "1"}


def begin(out, dataset=None, **fields):
    """Open a run folder as a script does. -> its Config"""
    dataset = dataset or FewFrames()
    cfg = clap.Config(preset="small", gpus=0, out=str(out), **fields)
    common.start(cfg, 0, 1, dataset, dataset.split("train"))
    return cfg


def small_model(width=2):
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"lidar": torch.nn.Linear(width, 2)})


def save_steps(cfg, *steps, model=None):
    """Write the checkpoints of these steps. -> the model"""
    model = model or small_model()
    opt = torch.optim.AdamW(model.parameters())
    for step in steps:
        model["lidar"](torch.ones(1, 2)).sum().backward()
        opt.step()
        common.save(cfg, step, model, [opt], ("lidar",), data.GRIDS["nuscenes", "small"])
    return model


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints of steps 2 and 4."""
    save_steps(begin(tmp_path / "run"), 2, 4)
    return tmp_path / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def flip(path, place):
    """Flip a bit of one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_flipped_bit_in_any_part_of_a_checkpoint_is_noticed(run, capsys):
    whole = (run / "last.pt").read_bytes()
    with zipfile.ZipFile(run / "last.pt") as archive:
        parts = [(part.filename, part.header_offset, part.file_size)
                 for part in archive.infolist() if part.file_size]
    assert sum("/data/" in name for name, *_ in parts) > 4 and len(parts) > 6
    for name, offset, size in parts:
        (run / "last.pt").write_bytes(whole)
        head = whole[offset:offset + 30]
        start = offset + 30 + int.from_bytes(head[26:28], "little")
        start += int.from_bytes(head[28:30], "little")
        flip(run / "last.pt", start + size // 2)
        assert common.checkpoint(run, verbose=True)["step"] == 2, name
        assert f"its part {name} is damaged" in capsys.readouterr().out
    assert common.checkpoint(run, verbose=True, repair=True)["step"] == 2
    assert "renamed to unreadable.pt. Going on from previous.pt, step 2" in capsys.readouterr().out
    assert (run / "unreadable.pt").exists() and not (run / "last.pt").exists()


def eio_behind_another_error(*_):
    try:
        raise OSError(errno.EIO, "Input/output error")
    except OSError:
        raise zipfile.BadZipFile("File is not a zip file")  # noqa: B904


def no_permission(*_):
    raise PermissionError(errno.EACCES, "Permission denied")


def no_memory(*_):
    raise MemoryError


def no_memory_of_torch(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate "
                       "memory: you tried to allocate 4096 bytes")


@pytest.mark.parametrize("place, failure, why", [
    ("zipfile.ZipFile", eio_behind_another_error, "File is not a zip file"),
    ("zipfile.ZipFile", no_permission, "Permission denied"),
    ("zipfile.ZipFile", no_memory, "MemoryError"),
    ("torch.load", no_memory_of_torch, "allocate"),
])
def test_what_cannot_be_read_just_now_is_not_called_damaged(
        run, monkeypatch, place, failure, why):
    before = contents(run)
    monkeypatch.setattr(f"common.{place}", failure)
    for read in (partial(common.checkpoint, run, True, True), partial(begin, run)):
        with pytest.raises(SystemExit) as refusal:
            read()
        message = str(refusal.value)
        assert "last.pt: cannot be read just now (" in message and why in message, message
        assert "nothing was changed" in message and "elete" not in message
    assert contents(run) == before
    monkeypatch.undo()
    assert common.checkpoint(run)["step"] == 4


def test_weights_that_cannot_be_read_just_now_are_not_called_damaged(run, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", no_memory)
    with pytest.raises(SystemExit, match="safetensors: cannot be read just now"):
        common.read_units(run)


def test_no_advice_is_to_delete_a_run():
    for script in ("common", "clap", "cmcr", "simipu", "finetune"):
        source = (ROOT / f"{script}.py").read_text()
        assert not re.search(r"[Dd]elete (the|this) (run|folder)", source), script


def rewrite(path, change):
    """Write the tensors of a safetensors file again, changed, under the same header."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(path, "pt") as file:
        tensors = {name: change(file.get_tensor(name)) for name in file.keys()}
        header = file.metadata()
    save_file(tensors, path, header)


@pytest.mark.parametrize("how", ["a bit", "zeros", "float16", "the header"])
def test_weights_that_have_changed_are_refused_wherever_they_are_read(run, how):
    path = run / "backbones.safetensors"
    if how == "a bit":
        flip(path, -1)
    if how == "zeros":
        rewrite(path, torch.zeros_like)
    if how == "float16":
        rewrite(path, torch.Tensor.half)
    if how == "the header":
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b'"step":"4"', b'"step":"5"'))
        assert path.read_bytes() != raw
    export = finetune.Config(export="openpcdet", init=str(run), out=str(run / "x.pth"))
    for read in (partial(common.read_units, run), partial(finetune.export, export),
                 partial(common.load_resnet, run, None, 0),
                 partial(common.load_resnet, path, None, 0)):
        with pytest.raises(SystemExit, match="its bytes are not those that were written"):
            read()


def test_weights_without_a_digest_are_still_read(run):
    from safetensors.torch import save_file
    path, header, tensors = common.read_units(run)
    assert "digest" not in header
    save_file(tensors, path, header)
    assert common.read_units(run)[1] == header


def test_weights_that_are_not_finite_are_never_saved(run):
    before = contents(run)
    cfg = begin(run)
    model = small_model()
    with torch.no_grad():
        model["lidar"].weight[0, 0] = math.nan
    with pytest.raises(SystemExit, match="after step 6, 1 of the 2 tensors of the model are not "
                                         "finite, first lidar.weight; this is not saved"):
        common.save(cfg, 6, model, [], ("lidar",), data.GRIDS["nuscenes", "small"])
    after = contents(run)
    assert {name: after[name] for name in before if name[:4] not in ("prov", "conf")} == {
        name: before[name] for name in before if name[:4] not in ("prov", "conf")}
    with torch.no_grad():
        model["lidar"].weight[0] = 3e38  # its sum is not finite, the weights are
    assert common.not_finite(model.state_dict()) == []


def store(run, **changes):
    """Write last.pt again, with other fields."""
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save({**state, **changes}, run / "last.pt")


@pytest.mark.parametrize("changes, message", [
    (dict(step=-1), "its step is -1"),
    (dict(step=2.5), "its step is 2.5"),
    (dict(step="x"), "its step is 'x'"),
    (dict(config="not JSON"), "JSONDecodeError"),
    (dict(config="[]"), "its configuration is none"),
    (dict(model=[1]), "its model is not a dict"),
    (dict(optimizers={}), "its optimizers are not a list"),
    (dict(model={"lidar.weight": torch.full((2, 2), math.inf)}), "1 of its 1 tensors are not fin"),
])
def test_a_checkpoint_with_odd_fields_falls_back(run, capsys, changes, message):
    store(run, **changes)
    assert common.checkpoint(run, verbose=True)["step"] == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("changes, message", [
    (dict(model=small_model(3).state_dict()),
     r"1 of the 2 tensors of this model do not fit, first lidar.weight: \(2, 3\) in the file, "
     r"\(2, 2\) in the model"),
    (dict(model=small_model().half().state_dict()), r"\(2,\) torch.float16 in the file"),
    (dict(optimizers=[]), "empty states of 0 optimisers, expected those of 1"),
    (dict(optimizers=[{"state": {}, "param_groups": []}]), "empty states of 1 optimisers"),
    (dict(optimizers=[{"state": {0: {}}, "param_groups": []}]), "the optimisers' states do not"),
])
def test_a_checkpoint_of_another_model_is_refused_in_one_line(run, changes, message):
    store(run, **changes)
    model = small_model()
    with pytest.raises(SystemExit, match=message) as refusal:
        common.resume(run, model, torch.optim.AdamW(model.parameters()))
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="of step 1000000000, and a run with .* has 4 steps"):
        common.Run(one_frame_a_step(tmp_path), 0, 1, 10**9, 4, CPU, "a test")


def test_weights_for_another_project_are_named_as_such(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    path = tmp_path / "backbones.safetensors"
    weights = {"w": torch.ones(2)}
    grid = dict(dataset="x", low=[0, 0, 0], high=[1, 1, 1], voxel=[1, 1, 1], sweeps=1)
    good = dict(config='{"preset": "small"}', grid=json.dumps(grid), commit="x", step="3",
                units="lidar")
    for header in (None, {}, {**good, "config": "x"}, {**good, "config": "[]"},
                   {**good, "grid": "{}"}, {**good, "grid": json.dumps(grid | dict(low=3))},
                   {**good, "step": "x"}, {**good, "units": ""}):
        save_file(weights, path, header)
        with pytest.raises(SystemExit, match="its header is not one that these scripts write"):
            common.read_units(tmp_path)
    save_file(weights, path, good)
    monkeypatch.setattr(sys, "argv", ["it.py", "--init", str(tmp_path), "--data", "x"])
    assert common.parse(Config, dict(steps=340)).preset == "small"  # no config.json there
    with pytest.raises(SystemExit, match="no such file; --init names"):
        common.read_units("x" * 5000)
    for text in ("[]", "{}", '{"preset": 3}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SystemExit, match="no readable configuration of a run"):
            common.parse(Config, {})


def test_unfinished_and_fine_tuned_weights_are_said(run):
    _, header, _ = common.read_units(run)
    remarks = partial(common.remarks, run)
    assert remarks(header, {"steps": 9}) == " of 9: that run is not finished"
    (run / "log.jsonl").write_text("")
    assert "never scored" in remarks(header, {"steps": 0})
    (run / "metrics.json").write_text("{}")
    assert remarks(header, {"steps": 4}) == ""
    assert "has seen labels" in remarks({**header, "units": "lidar,heads"}, {})


# ---- §10 run folders: whose they are, and what data they began with -------------------

@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "metrics.json", "labels.txt", "x.py"])
def test_somebody_else_s_folder_is_refused_and_not_changed(tmp_path, name):
    (tmp_path / name).write_text('{"preset": "small"}')
    (tmp_path / "shell.log").write_text("")
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=f"--out {tmp_path} holds {name}, and no run of this"):
        begin(tmp_path)
    assert contents(tmp_path) == before


def test_a_log_of_the_shell_and_a_run_that_has_saved_nothing_are_no_hindrance(tmp_path):
    (tmp_path / "train.log").write_text("")
    (tmp_path / ".nfs0001").write_text("")
    begin(tmp_path)
    begin(tmp_path, lr=1.0)  # killed before its first checkpoint
    # killed in its first save, after the weights and before the checkpoint
    (tmp_path / "backbones.safetensors").write_text("")
    (tmp_path / "last.pt.0123456789abcdef.part").write_text("")
    begin(tmp_path)
    assert not (tmp_path / "backbones.safetensors").exists()
    assert not list(tmp_path.glob("*.part"))


def killed_in_its_first_save(out):
    """A process that dies between the weights and the checkpoint."""
    sys.modules["__main__"] = clap
    cfg = begin(out)
    move = os.replace

    def die(source, target):
        if Path(target).name == "last.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target)
    common.os.replace = die
    save_steps(cfg, 2)


def test_a_run_killed_in_its_first_save_starts_over(server, tmp_path):
    process = server.Process(target=killed_in_its_first_save, args=(tmp_path / "run",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / "backbones.safetensors").exists()
    assert not (tmp_path / "run" / "last.pt").exists()
    save_steps(begin(tmp_path / "run"), 2)
    assert common.checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("left", ["backbones.safetensors", "metrics.json"])
def test_a_run_without_its_checkpoints_is_not_started_over(run, left):
    (run / "metrics.json").write_text("{}")
    for name in ("last.pt", "previous.pt", "backbones.safetensors", "metrics.json"):
        if name != left:
            (run / name).unlink()
    before = contents(run)
    with pytest.raises(SystemExit, match=r"a run without its checkpoints \(last.pt, previous.pt\)"):
        begin(run)
    assert contents(run) == before


def test_a_run_does_not_write_where_it_reads(run, tmp_path):
    for file in ("last.pt", "previous.pt"):
        (run / file).unlink()
    inside = tmp_path / "data" / "v1.0-mini"
    inside.mkdir(parents=True)
    dataset = FewFrames(root=str(tmp_path / "data"))
    for out, message in ((str(run), f"--out {run} is the run of --init"),
                         (str(inside), "lies inside the data set"),
                         (str(tmp_path / "data"), "lies inside the data set"),
                         ("", "--out is empty")):
        cfg = finetune.Config(preset="small", gpus=0, out=out, init=str(run))
        with pytest.raises(SystemExit, match=message):
            common.start(cfg, 0, 1, dataset, dataset.split("train"), "labels.txt")
    assert not list(inside.iterdir())


def test_what_a_killed_save_left_is_swept_and_no_link_is_followed(tmp_path):
    """The names of parts cannot be foreseen, and links in a run folder lead nowhere."""
    out = tmp_path / "run"
    cfg = begin(out)
    victim = tmp_path / "victim"
    names = ["last.pt", "config.json", "data.json", "provenance.json", "frames.txt"]
    for name in names:
        (out / f"{name}.part").symlink_to(victim)
    (out / "figures").mkdir()
    (out / "figures" / "a.png.0123456789abcdef.part").write_text("")
    begin(out)
    save_steps(cfg, 2)
    assert not victim.exists() and not list(out.rglob("*.part"))
    assert not any((out / name).is_symlink() for name in names)
    (out / "lock").unlink()
    (out / "lock").symlink_to(victim)
    with pytest.raises(SystemExit, match="run: cannot write there"):
        begin(out)
    assert not victim.exists()


def test_a_run_whose_lock_was_removed_does_not_save_over_another_process(run):
    cfg = begin(run)
    (run / "lock").unlink()
    save_steps(cfg, 6)  # nobody else: the lock is taken again
    assert (run / "lock").exists()
    (run / "lock").unlink()
    code = ("import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('locked', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(run / "lock")], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        before = contents(run)
        with pytest.raises(SystemExit, match="another process is writing this run"):
            save_steps(cfg, 8)
        other.stdin.close()
    assert contents(run) == before


def test_data_that_has_changed_is_refused_and_data_that_has_moved_is_not(run):
    begin(run, FewFrames(root="/elsewhere"), data="/elsewhere")
    before = contents(run)
    for dataset, message in (
            (FewFrames(names=("s/0", "s/1", "s/9")), "val: this run began with 1 frames; now there "
             r"are 1, 1 of them new, 1 gone \(s/2, s/9, ...\)"),
            (FewFrames(names=("s/0", "s/3", "s/2")), "frames.txt: this run began with 2 frames"),
            (FewFrames(holds="moved labels"), "1 of the 2 parts that are compared, first tables")):
        with pytest.raises(SystemExit, match=message):
            begin(run, dataset, data="/third")
        assert contents(run) == before
    (run / "data.json").unlink()  # a run of before
    with pytest.raises(SystemExit, match="data was '', is '/third'"):
        begin(run, data="/third")
    begin(run)
    assert (run / "data.json").exists()


def test_side_files_that_cannot_be_parsed_stop_no_run(run, capsys):
    whole = (run / "provenance.json").read_bytes()
    for content in (b"", b"{}", whole[:30], b"\xff"):
        (run / "provenance.json").write_bytes(content)
        begin(run)
        assert "provenance.json: cannot be parsed" in capsys.readouterr().out
        assert (run / "provenance.unreadable.json").read_bytes() == content
    assert {path.name for path in run.glob("source*")} == {"source"} | {
        f"source-{n}" for n in (2, 3, 4, 5)}
    for content in (b"[", b"{}", b'{"val": 3}'):
        (run / "data.json").write_bytes(content)
        begin(run)
        assert "data.json: " in capsys.readouterr().out
    (run / "frames.txt").write_bytes(b"\xff\n")
    cfg = begin(run)
    assert "frames.txt: no text in UTF-8" in capsys.readouterr().out
    assert (run / "frames.txt").read_text() == "s/0\ns/1\n"
    (run / "provenance.json").unlink()  # while it runs
    save_steps(cfg, 6)
    assert common.read_units(run)[1]["commit"] == "unknown"


def test_log_lines_that_cannot_be_parsed_stop_no_run(tmp_path, capsys):
    rows = ['{"step": 0, "loss": 1.0}', '{"step": 1, \0\0\0}', '{"loss": 2}', '{"step": "x"}',
            "[1]", '{"step": 1, "loss": 2.0}', '{"step": 2, "lo']
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    common.Run(one_frame_a_step(tmp_path), 0, 1, 3, 10, CPU, "a test").close()
    assert (tmp_path / "log.jsonl").read_text() == f"{rows[0]}\n{rows[5]}\n"
    assert "4 of 7 lines cannot be parsed and are left out, first line 2" in capsys.readouterr().out
    common.loss_curves(tmp_path)


def test_a_log_that_was_removed_is_named(tmp_path):
    run = common.Run(one_frame_a_step(tmp_path), 0, 1, 0, 10, CPU, "a test")
    run.write(0, dict(loss=1.0))
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(SystemExit, match="log.jsonl: step 1 .* It was removed while the run"):
        run.write(1, dict(loss=1.0))
    run.close()


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit, match=r"last.pt: could not be written \(No space left on dev"):
        with common.atomic_write(tmp_path / "last.pt") as part:
            part.symlink_to("/dev/full")
            raise RuntimeError("unexpected pos 410368 vs 410264")  # as torch.save says it
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(SystemExit, match=r"a.png: could not be written \(No space left"):
        common.figure(tmp_path / "figures" / "a.png", [("", np.zeros((2, 2)))], 1)
    monkeypatch.setattr(common.shutil, "copy", full)
    with pytest.raises(SystemExit, match=r"py: could not be written \(No space left"):
        begin(tmp_path / "run")


def test_a_flag_whose_tool_is_absent_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.load_tool("figures") is None
    with pytest.raises(SystemExit, match="--profile: .*tests/profiling.py is absent"):
        common.load_tool("profiling", "--profile")


# ---- §11 log and figures -------------------------------------------------------------

def logged_steps(folder):
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_term_that_is_not_finite_is_named_and_not_logged(tmp_path):
    cfg = one_frame_a_step(tmp_path)
    run = common.Run(cfg, 0, 1, 0, 10, CPU, "a test")
    frame = SimpleNamespace(names=["nuscenes/scene/token"])
    run.log(0, [frame], [dict(loss=torch.tensor(1.0), L_x=torch.tensor(0.5))], lr=0.1)
    message = "step 1, rank 0: L_x not finite on nuscenes/scene/token; nothing was updated"
    with pytest.raises(FloatingPointError, match=message):
        run.log(1, [frame], [dict(loss=torch.tensor(1.0), L_x=torch.tensor(math.nan))], lr=0.1)
    assert [row["step"] for row in logged_steps(tmp_path)] == [0]
    run.close()
    # resuming at step 0 drops the steps that come again
    common.Run(cfg, 0, 1, 0, 10, CPU, "a test").close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_figure_shows_what_it_is_given(tmp_path):
    from PIL import Image
    red = np.zeros((8, 8, 3))
    red[..., 0] = 1
    panels = [("picture", red), ("plot", lambda ax: ax.plot([0, 1], [0, 1], "b"))]
    common.figure(tmp_path / "a" / "b.png", panels, 2)
    pixels = np.asarray(Image.open(tmp_path / "a" / "b.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == [255, 0, 0]).all(1).mean() > 0.1
    assert (pixels == [0, 0, 255]).all(1).any()


class Judge(torch.nn.Module):
    """A model with running statistics: its terms are those of normalised rows."""

    def __init__(self, mean):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2, affine=False)
        self.norm.running_mean.fill_(mean)

    def forward(self, batch, factor=1.0):
        y = factor * self.norm(batch.rows)
        return y.sum(), {"L_sum": y.sum(), "L_most": y.max()}


def rows_of(*sizes):
    """Batches of so many rows: 0, 1, 2, ..."""
    batches = [SimpleNamespace(rows=torch.arange(2.0 * n).view(n, 2)) for n in sizes]
    for batch in batches:
        batch.to = lambda device, batch=batch: batch
    return batches


def test_val_terms_are_those_of_eval_mode_and_leave_no_trace():
    model = Judge(3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    terms = common.evaluate(model, rows_of(4, 2), CPU, 2.0)
    expected = [2 * (batch.rows - 3) / (1 + 1e-5) ** 0.5 for batch in rows_of(4, 2)]
    sums = np.mean([float(y.sum()) for y in expected])
    maxima = np.mean([float(y.max()) for y in expected])
    assert terms == {"L_sum": pytest.approx(sums), "L_most": pytest.approx(maxima)}
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def log_and_stop(rank, out):
    """One of two processes: it logs two steps, and is asked to stop between them or not."""
    run = common.Run(SimpleNamespace(out=out, batch=1, accumulate=2), rank, 2, 0, 10, CPU, "a test")
    frame = SimpleNamespace(names=["a"])
    terms = [dict(loss=torch.tensor(2.0 * rank), L_x=0.25 * rank),
             dict(loss=torch.tensor(2.0 + 2 * rank), L_x=0.25 * rank)]
    run.log(3, [frame, frame], terms, lr=0.5)
    stops = [run.interrupted()]
    run.asked = float(rank)  # only one of the two is asked to stop: both learn it at the next step
    stops.append(run.interrupted())
    run.log(4, [frame, frame], terms, lr=0.5)
    stops.append(run.interrupted())
    run.close()
    return stops


def test_two_processes_log_their_mean_and_stop_together(server, tmp_path):
    one, two = on_two(server, log_and_stop, tmp_path, str(tmp_path))
    row = {"loss": 2.0, "L_x": 0.125, "lr": 0.5}
    assert logged_steps(tmp_path) == [{"step": 3, **row}, {"step": 4, **row}]
    assert one == two == [False, False, True]


def log_a_nan(rank, out):
    """One of two processes: a term is not finite, on rank 1 alone."""
    run = common.Run(SimpleNamespace(out=out, batch=1, accumulate=1), rank, 2, 0, 10, CPU, "a test")
    frame = SimpleNamespace(names=[f"frame {rank}"])
    try:
        run.log(0, [frame], [dict(loss=torch.tensor(float("nan") if rank else 1.0))])
    except (FloatingPointError, SystemExit) as error:
        return str(error)


def test_a_term_that_is_not_finite_on_one_process_ends_all_of_them_at_once(server, tmp_path):
    one, two = on_two(server, log_a_nan, tmp_path, str(tmp_path))
    assert one == "1"  # the status: without a word of its own
    assert two.startswith("step 0, rank 1: loss not finite on frame 1; nothing was updated")
    assert logged_steps(tmp_path) == []


# ---- every script --------------------------------------------------------------------

def prepared(script, module, dataset, cfg):
    """What a script's loader does to each frame -> (augment, prepare)."""
    import data
    grid = dataset.grid
    if script == "clap":
        turn = partial(data.augment_cloud, rotation=0.1, scale=0., flip=grid.mirrors)
        return turn, module.Curvature(32)
    if script == "cmcr":
        return module.Views(grid, cfg), None
    if script == "simipu":
        zoom = (cfg.zoom_low, cfg.zoom_high)
        return module.TwoViews(grid, cfg.points, cfg.rotation, cfg.scale, zoom), None
    return None, None


def built(script, module, dataset, cfg):
    """A script's model."""
    if script == "clap":
        return module.CLAP(cfg, dataset.grid)
    if script == "cmcr":
        return module.CMCR(cfg, dataset.grid, False)
    if script == "simipu":
        return module.SimIPU(cfg)
    return module.Detector(cfg, dataset.grid)


def model_and_batches(script, three_frames):
    """A script's module, its model, fusion where there is a choice, and two batches of a frame."""
    import data
    from test_faults import config
    cfg = config(script, three_frames, "")
    dataset = data.open_dataset(three_frames, "small")
    module = importlib.import_module(script)
    if script == "finetune":
        cfg = replace(cfg, modality="fusion")
    augment, prepare = prepared(script, module, dataset, cfg)
    loader = data.loader(dataset, "train", 1, augment=augment, prepare=prepare)
    batches = loader.begin_at(0)
    torch.manual_seed(0)
    return module, built(script, module, dataset, cfg), [next(batches), next(batches)]


def a_step_of_each(rank, cases):
    """One of two processes: a step of every script's model -> the states after it."""
    states = []
    for model, batches in cases:
        net = common.wrap(model, CPU, 2)
        net(batches[rank])[0].backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def test_processes_agree_on_every_weight_and_buffer_though_buffers_are_not_sent(
        server, three_frames, tmp_path):
    """The first process's state is saved; every process scores val frames with its own."""
    cases = []
    for script in SCRIPTS:
        _, model, batches = model_and_batches(script, three_frames)
        for layer in model.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                assert isinstance(layer, common.BatchNorm), (script, layer)
        cases.append((model, batches))
    one, two = on_two(server, a_step_of_each, tmp_path, cases)
    for (model, _), state, other in zip(cases, one, two, strict=True):
        before = model.state_dict()
        for name, value in state.items():
            assert torch.equal(value, other[name]), name
        for name, _ in model.named_buffers():
            assert not torch.equal(state[name], before[name]), name


class Begun(Exception):
    """A run has written what it writes before its first step."""


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_a_share_of_the_training_frames_is_drawn(script, world, tmp_path, monkeypatch):
    """Those of a smaller share are among those of a larger one; all are all, in their order."""
    module = importlib.import_module(script)
    loaders = []
    loader = data.loader

    def recorded(*words, **more):
        loaders.append(loader(*words, **more))
        return loaders[-1]

    def begun(*_):
        raise Begun

    monkeypatch.setattr(data, "loader", recorded)
    monkeypatch.setattr(module, "wrap", begun)
    split = data.open_dataset(world, "small").split("train")
    names = data.open_dataset(world, "small").names

    def drawn(**fields):
        out = tmp_path / f"{len(loaders)}"
        cfg = module.Config(preset="small", **{**module.SMALL, "width": 4})
        with pytest.raises(Begun):
            module.train(0, 1, replace(cfg, data=str(world), out=str(out), gpus=0, **fields))
        indices = loaders[-2].indices
        assert (out / "frames.txt").read_text().split() == [names[i] for i in indices]
        return indices.tolist()

    assert drawn() == split.tolist() and len(split) == 6
    one, two, four = (drawn(share=share) for share in (0.01, 0.34, 0.6))
    assert [len(indices) for indices in (one, two, four)] == [1, 2, 4]
    assert set(one) < set(two) < set(four) < set(split.tolist())
    assert two == sorted(two) == drawn(share=0.34)
    assert len({tuple(drawn(share=0.34, seed=seed)) for seed in range(4)}) > 1
    for share, expected in ((0.0, "above 0"), (1.5, "above 0 to 1")):
        cfg = module.Config(preset="small", **module.SMALL)
        with pytest.raises(SystemExit, match=f"--share {share}: expected a number {expected}"):
            module.train(0, 1, replace(cfg, out=str(tmp_path / "none"), share=share))
        assert not (tmp_path / "none").exists()


# ---- bfloat16, as on CUDA ------------------------------------------------------------

@pytest.fixture
def no_onednn():
    """With one thread, oneDNN's bfloat16 gradient of Conv3d corrupts the heap (torch 2.14.1)."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def bf16_on_cpu(device):
    return torch.autocast("cpu", torch.bfloat16)


def test_coordinates_are_not_rounded_to_bfloat16(monkeypatch):
    """The first convolution reads metres: in bfloat16 50.1 m is 50.0 m."""
    net = common.VoxelResNet(**GRID, width=2)
    kinds = []
    for conv in (net.conv_input.conv, net.conv1[0].conv1):
        conv.register_forward_hook(lambda module, words, out: kinds.append(out.dtype))
    monkeypatch.setattr(common, "bf16_autocast", bf16_on_cpu)
    net(*cloud(), 3)
    assert kinds == [torch.float32, torch.bfloat16]


def test_an_encoder_in_bfloat16_stays_near_float32(monkeypatch):
    torch.manual_seed(0)
    net = common.VoxelResNet((-8., -8., -2.), (8., 8., 2.), (0.25, 0.25, 0.25), 8)
    size = torch.tensor([16., 16., 1., 1., 0.])
    points = torch.rand(4000, 5) * size - torch.tensor([8., 8., 1., 0., 0.])
    b = torch.zeros(4000, dtype=torch.int64)
    exact = net(points, b, 1)
    monkeypatch.setattr(common, "bf16_autocast", bf16_on_cpu)
    rough = net(points, b, 1)
    for x, y in zip(exact, rough, strict=True):
        assert y.features.dtype == torch.float32 and torch.equal(x.coords, y.coords)
        assert (x.features - y.features).norm() < 0.05 * x.features.norm()
        assert not torch.equal(x.features, y.features)
    rough[-1].features.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_in_bfloat16(script, three_frames, monkeypatch, no_onednn):
    """No operation meets two kinds of number, and the loss is about that of float32."""
    module, model, (batch, _) = model_and_batches(script, three_frames)
    exact = model(batch)[0]
    for place in {common, module}:
        if hasattr(place, "bf16_autocast"):
            monkeypatch.setattr(place, "bf16_autocast", bf16_on_cpu)
    rough = model(batch)[0]
    rough.backward()
    assert rough.dtype == torch.float32 and rough != exact, (rough, exact)
    assert abs(rough - exact) < 0.1 * abs(exact), (rough, exact)
    for p in model.parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all()
            assert p.grad.dtype == torch.float32
