"""clap.py: each loss against plain loops from the paper, analytic shapes, whole runs."""
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clap
import data
import figures
from common import BatchNorm, VoxelResNet, mean_over_ranks, wrap
from conftest import on_two

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GRID = data.GRIDS["nuscenes", "small"]
TINY = clap.Config(preset="small", **{
    **clap.SMALL, "w_colour": 0.05, "rays": 96, "pixels": 24, "samples": 12,
    "importance_samples": 6, "prototypes": 8, "dims": 16, "width": 4, "bins": 12})


@pytest.fixture(scope="module")
def batch(world):
    """Two frames of the embedded world with small images and their curvature.

    Every seventh point is as if of an older sweep.
    """
    augment = partial(data.augment_cloud, rotation=0.39, scale=0.05, flip=True)
    loader = data.loader(str(world), "train", 2, preset="small", image=(48, 128),
                         prepare=clap.Curvature(32), augment=augment)
    batch = next(loader.begin_at(0))
    batch.points[::7, 4] = 0.1
    return batch


@pytest.fixture()
def model():
    """A tiny CLAP in which no residual block begins as an identity: gradients show at once."""
    torch.manual_seed(0)
    model = clap.CLAP(TINY, GRID)
    for layer in model.camera.resnet.modules():
        if isinstance(layer, BatchNorm):
            torch.nn.init.ones_(layer.weight)
    return model


def record(monkeypatch, owner, name):
    """Let owner.name work as before and note each call. -> list of (arguments, result)"""
    calls = []
    original = getattr(owner, name)

    def call(*words, **named):
        result = original(*words, **named)
        calls.append((words, result))
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


# ---- prototypes ----------------------------------------------------------------------

def plain_sinkhorn(S, epsilon, iterations):
    """SwAV's listing, in float64 and without logarithms."""
    Q = np.exp(np.asarray(S, np.float64).T / epsilon)  # prototypes x samples
    Q /= Q.sum()
    K, B = Q.shape
    for _ in range(iterations):
        Q /= Q.sum(1, keepdims=True)
        Q /= K
        Q /= Q.sum(0, keepdims=True)
        Q /= B
    return (Q * B).T


def test_sinkhorn_matches_swav():
    """It balances the prototypes, ignores a constant, and follows the order of the rows."""
    torch.manual_seed(0)
    features = F.normalize(torch.randn(2048, 128), dim=1)
    S = features @ F.normalize(torch.randn(32, 128), dim=1).t()
    Q = clap.sinkhorn(S.double(), 0.05, 3)
    np.testing.assert_allclose(Q.numpy(), plain_sinkhorn(S, 0.05, 3), rtol=1e-6, atol=1e-9)

    torch.testing.assert_close(Q.sum(1), torch.ones(2048, dtype=torch.float64))
    share = Q.sum(0) / (2048 / 32)
    assert 0.99 < share.min() < share.max() < 1.01
    balanced = clap.sinkhorn(S.double(), 0.05, 200).sum(0)
    expected = torch.full((32,), 64.0, dtype=torch.float64)
    torch.testing.assert_close(balanced, expected, rtol=1e-6, atol=1e-6)

    torch.testing.assert_close(clap.sinkhorn(S.double() + 3.7, 0.05, 3), Q)
    order = torch.randperm(2048)
    torch.testing.assert_close(clap.sinkhorn(S.double()[order], 0.05, 3), Q[order])


def test_sinkhorn_at_the_edges():
    assert clap.sinkhorn(torch.randn(50, 8) * 100, 0.05, 3).isfinite().all()  # exp would overflow
    assert clap.sinkhorn(torch.zeros(0, 8), 0.05, 3).shape == (0, 8)
    one = torch.zeros(50, 8)
    one[:, 3] = 5.0  # one prototype takes all
    torch.testing.assert_close(clap.sinkhorn(one, 0.05, 3), torch.full((50, 8), 1 / 8))
    assert not clap.sinkhorn(torch.randn(5, 8, requires_grad=True), 0.05, 3).requires_grad


def prototypes(S_P, S_I, **change):
    """Prototypes.forward on embeddings whose scores are S_P and S_I (N, N_K).

    The embeddings lie along the axes, of any length before they are normalised. The
    prototypes are the transposed scores.
    """
    cfg = replace(TINY, prototypes=S_P.shape[1], **change)
    module = clap.Prototypes(cfg, 4, 4)
    N = len(S_P)
    module.head_lidar = module.head_image = torch.nn.Identity()
    module.K = torch.nn.Parameter(torch.cat([S_P, S_I]).t().contiguous())  # (N_K, 2 N)
    eye = torch.eye(2 * N, dtype=S_P.dtype)
    return module(3 * eye[:N], 0.2 * eye[N:])


def softmax(row, tau=1.0):
    exponentials = [math.exp(s / tau) for s in row]
    return [e / sum(exponentials) for e in exponentials]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def test_prototype_losses_in_plain_loops():
    """L_SwAV, L_EM and L_GMM of six cells and five prototypes, term by term."""
    torch.manual_seed(0)
    N, N_K, tau = 6, 5, 0.7
    S_P = torch.randn(N, N_K, dtype=torch.float64)
    S_I = torch.randn(N, N_K, dtype=torch.float64)
    Q_P = plain_sinkhorn(S_P, 0.05, 3)
    Q_I = plain_sinkhorn(S_I, 0.05, 3)

    L_SwAV = 0.0
    L_EM = 0.0
    for n in range(N):
        for S, Q in ((S_P, Q_I), (S_I, Q_P)):  # images teach points, points teach images
            p = softmax(S[n].tolist(), tau)
            s_hat = softmax(S[n].tolist())
            for m in range(N_K):
                L_SwAV -= Q[n, m] * math.log(p[m]) / (N * N_K)
                L_EM -= s_hat[m] * math.log(s_hat[m]) / (N * N_K)

    L_GMM = 0.0
    K = torch.cat([S_P, S_I]).t().tolist()
    for n in range(N_K):
        for m in range(N_K):
            if m != n:
                L_GMM += dot(K[n], K[m]) / (N_K * (N_K - 1))

    ours = prototypes(S_P, S_I, tau=tau)[:3]
    assert [float(L) for L in ours] == pytest.approx([L_SwAV, L_EM, L_GMM], rel=1e-6)

    # a cross entropy is at least the entropy of its targets
    entropy = -(Q_P * np.log(Q_P) + Q_I * np.log(Q_I)).sum() / N
    assert L_SwAV * N_K >= entropy
    # and both are symmetric in the modalities
    exchanged = prototypes(S_I, S_P, tau=tau)
    assert float(exchanged[0]) == pytest.approx(L_SwAV)
    assert float(exchanged[1]) == pytest.approx(L_EM)


def test_prototype_losses_at_known_points():
    zero = torch.zeros(6, 512)
    L_SwAV, L_EM, _, _ = prototypes(zero, zero)
    assert float(L_SwAV) == pytest.approx(2 * math.log(512) / 512, rel=1e-5)
    assert float(L_EM) == pytest.approx(2 * math.log(512) / 512, rel=1e-5)

    sure = torch.eye(6, 8) * 1e3
    _, L_EM, _, monitors = prototypes(sure, sure)
    assert float(L_EM) == pytest.approx(0, abs=1e-6)
    assert float(monitors["agreement"]) == 1
    assert float(monitors["perplexity_P"]) == pytest.approx(6, rel=1e-5)
    _, _, _, monitors = prototypes(sure, sure.flip(0))
    assert float(monitors["agreement"]) == 0


def test_gram_loss_at_known_points():
    def gram(K):
        cfg = replace(TINY, prototypes=len(K), dims=K.shape[1])
        module = clap.Prototypes(cfg, 4, 4).eval()
        module.K = torch.nn.Parameter(K)
        return float(module(torch.randn(3, 4), torch.randn(3, 4))[2])

    same = F.normalize(torch.randn(1, 16), dim=1).expand(10, 16).contiguous()
    assert gram(same) == pytest.approx(1, rel=1e-5)
    assert gram(3 * same) == pytest.approx(9, rel=1e-5)
    assert gram(torch.eye(10, 16)) == 0
    piles = torch.cat([same[:5], -same[5:]])  # antipodal: its minimum at unit norm
    assert gram(piles) == pytest.approx(-1 / 9, rel=1e-4)


# ---- curvature -----------------------------------------------------------------------

CENTRE = 2.0, 1.0, 0.0  # of the sphere, radius 3


def plane(p, b):
    return p @ p.new_tensor([0.6, 0.0, 0.8]) - 1


def cylinder(p, b):
    return p[:, :2].norm(dim=1) - 2


def sphere(p, b):
    return (p - p.new_tensor(CENTRE)).norm(dim=1) - 3


def points_on(sdf):
    """64 points, on the surface where the shape is curved. -> (64, 3) float64"""
    away = F.normalize(torch.randn(64, 3, dtype=torch.float64), dim=1)
    if sdf is sphere:
        return away * 3 + torch.tensor(CENTRE)
    if sdf is cylinder:
        return torch.cat([2 * F.normalize(away[:, :2], dim=1), 5 * away[:, 2:]], 1)
    return away


@pytest.mark.parametrize("sdf, expected", [
    (plane, 0.0), (cylinder, 1 / 2), (sphere, math.sqrt(2) / 3)])
def test_sdf_curvature_of_analytic_shapes(sdf, expected):
    """Plane 0, cylinder 1 / R, sphere sqrt(2) / R; of any scale and pose.

    float64 leaves the truncation of the differences alone.
    """
    torch.manual_seed(0)
    p = points_on(sdf)
    b = torch.zeros(64, dtype=torch.int64)
    omega = clap.sdf_curvature(p, b, None, sdf, 0.02)
    close = partial(torch.testing.assert_close, atol=2e-4, rtol=0)
    close(omega, torch.full_like(omega, expected))

    steeper = clap.sdf_curvature(p, b, None, lambda q, f: 7 * sdf(q, f), 0.02)
    torch.testing.assert_close(steeper, omega)  # n~ is normalised
    doubled = clap.sdf_curvature(2 * p, b, None, lambda q, f: sdf(q / 2, f), 0.04)
    close(doubled, omega / 2)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    turned = clap.sdf_curvature(p @ turn, b, None, lambda q, f: sdf(q @ turn.t(), f), 0.02)
    close(turned, omega)


def test_sdf_curvature_is_on_edges_not_on_faces():
    """A box of side 2: on its edges and corners, not on its faces nor the ground about it."""
    def box_on_ground(p, b):
        q = p.abs() - 1
        box = q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0)
        return torch.minimum(box, p[:, 2] + 1)

    along, one = torch.linspace(-0.6, 0.6, 5), torch.ones(5)
    corner = torch.ones(1, 3)
    edge = torch.stack([one, along, one], 1)
    face = torch.stack([along, along.flip(0), one], 1)
    ground = torch.stack([3 + along, along, -one], 1)
    p = torch.cat([corner, edge, face, ground])
    omega = clap.sdf_curvature(p, torch.zeros(16, dtype=torch.int64), None, box_on_ground, 0.2)
    assert omega[0] > omega[1:6].max()
    assert omega[1:6].min() > 2
    assert omega[6:].max() < 1e-4


def test_sdf_curvature_asks_for_19_values_a_point():
    counts = []

    def sdf(p, b):
        counts.append(len(p))
        return p[:, 0]

    clap.sdf_curvature(torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64), None, sdf, 0.3)
    assert sum(counts) == 190


def test_sdf_curvature_through_the_trilinear_volume():
    """A sphere's exact SDF, stored at even cells and interpolated as the field does it.

    The curvature is within a few per cent of sqrt(2) / R.
    """
    cells = VoxelResNet((-8, -8, -8), (8, 8, 8), (0.075, 0.075, 0.075), 2).cells[-1]
    R = 3.0
    table = (cells.centres(CPU).norm(dim=1) - R)[:, None]

    def sdf(p, b):
        flat, weight = clap.multilinear(cells.index(p), cells.shape)
        return clap.gather_weighted(table, flat, weight)[:, 0]

    generator = torch.Generator().manual_seed(0)
    p = F.normalize(torch.randn(500, 3, generator=generator), dim=1) * R
    b = torch.zeros(500, dtype=torch.int64)
    omega = clap.sdf_curvature(p, b, None, sdf, cells.step[0] / 2)
    assert abs(float(omega.mean()) / (math.sqrt(2) / R) - 1) < 0.02
    assert omega.std() < 0.02


def test_pca_curvature_is_on_edges_not_on_faces():
    """A box: the weight is on its edge, hardly any on its faces."""
    rng = np.random.default_rng(0)
    top = np.concatenate([rng.uniform(-1, 1, (3000, 2)), np.ones((3000, 1))], 1)
    side = np.stack([np.ones(3000), rng.uniform(-1, 1, 3000), rng.uniform(0, 1, 3000)], 1)
    points = np.zeros((6000, 5), np.float32)
    points[:, :3] = np.concatenate([top, side])
    frame = SimpleNamespace(points=points)
    weight = clap.Curvature(32)(frame)["points_curvature"]
    edge = (np.abs(points[:, 0] - 1) < 0.05) & (points[:, 2] > 0.95)
    face = (np.abs(points[:, 0]) < 0.5) & (points[:, 2] == 1)
    assert weight[edge].mean() > 20 * weight[face].mean()
    assert weight[face].max() < 1e-3

    # neighbours come from all sweeps, values are at keyframe points only
    points[:, 4] = 0.1
    points[:50, 4] = 0
    again = clap.Curvature(32)(frame)["points_curvature"]
    assert (again[50:] == 0).all()
    assert np.allclose(again[:50], weight[:50], atol=1e-6)


# ---- drawing points and pixels -------------------------------------------------------

def test_clean_weights_are_finite_positive_and_clipped():
    weights = [0.0, 1.0, float("nan"), float("inf"), 2.0] + [1.0] * 200
    weights = clap.clean_weights(torch.tensor(weights))
    assert weights.isfinite().all() and (weights > 0).all() and weights.max() < 1.1
    assert torch.equal(clap.clean_weights(torch.zeros(4)), torch.ones(4))
    assert clap.clean_weights(torch.zeros(0)).shape == (0,)


def test_points_are_drawn_by_weight_within_each_frame():
    rngs = [torch.Generator().manual_seed(i) for i in range(3)]
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0, 5.0])
    counts = [4, 0, 2]
    count = torch.zeros(6)
    for _ in range(4000):
        count[clap.draw_points(weights, counts, 1, rngs)] += 1
    expected = torch.tensor([1, 2, 4, 8]) / 15
    torch.testing.assert_close(count[:4] / 4000, expected, atol=0.025, rtol=0)
    assert count[4] == 0 and count[5] == 4000
    rows = clap.draw_points(torch.ones(6), counts, 100, rngs)
    assert sorted(rows.tolist()) == list(range(6))  # without replacement


@pytest.mark.parametrize("n", [1, 7, 50])
def test_draws_are_those_of_torch_multinomial(n):
    """Bit for bit, without its waits: runs of before go on with the same draws."""
    weights = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.multinomial(weights, n, generator=torch.Generator().manual_seed(1))
    assert torch.equal(clap.draw(weights, n, torch.Generator().manual_seed(1)), expected)


def plain_hits(weights, batch):
    """The largest weight of the points in each pixel, one image and one point at a time."""
    H, W = batch.images.shape[-2:]
    hit = torch.zeros(len(batch.images), H, W, dtype=torch.float64)
    for i, matrix in enumerate(batch.lidar2img.double()):
        rows = (batch.b_points == i // batch.cameras).nonzero()[:, 0]
        xyz = batch.points[rows, :3].double()
        uvd = xyz @ matrix[:3, :3].t() + matrix[:3, 3]
        for n, (ud, vd, d) in zip(rows.tolist(), uvd.tolist()):
            u, v = ud / d, vd / d
            if d > 0.1 and 0 <= u < W and 0 <= v < H:
                hit[i, int(v), int(u)] = max(hit[i, int(v), int(u)], float(weights[n]))
    return hit


def test_pixel_weights_are_the_blurred_largest_of_their_points(batch):
    xyz, counts = batch.points[:, :3], batch.counts
    H, W = batch.images.shape[-2:]
    weights = torch.rand(len(xyz)) + 0.1
    maps = clap.pixel_weights(weights, xyz, counts, batch, 9)

    hit = plain_hits(weights, batch)
    tap = torch.arange(-4, 5, dtype=torch.float64)
    kernel = torch.exp(-tap ** 2 / (2 * 1.7 ** 2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    expected = F.conv2d(hit[:, None], kernel[None, None], padding=4)[:, 0]
    same = (maps.double() - expected).abs() < 1e-4
    assert same.double().mean() > 0.999  # fp32 may floor a point to the next pixel
    near = F.max_pool2d(hit[:, None].float(), 9, 1, 4)[:, 0] > 0
    assert (maps[~near] == 0).float().mean() > 0.999
    assert maps.sum() > 0.9 * hit.sum()  # the rest was blurred over the border

    # a smaller image is padded below and on the right: no weight there
    smaller = batch.hw.clone()
    smaller[1] = torch.tensor([H // 2, W - 30])
    padded = clap.pixel_weights(weights, xyz, counts, replace(batch, hw=smaller), 9)
    assert padded[1, H // 2:].sum() == padded[1, :, W - 30:].sum() == 0
    assert padded[1].sum() > 0
    assert torch.equal(padded[2], maps[2])


def test_pixels_without_weight_are_not_drawn():
    weights = torch.zeros(2, 6, 8)
    weights[0, 3, 4] = 1.0
    pixels = clap.draw_pixels(weights, 20, [torch.Generator(), torch.Generator()])
    view, v, u, positive = torch.stack(pixels)
    assert len(positive) == 40
    drawn = positive.bool()
    assert (view[drawn].tolist(), v[drawn].tolist(), u[drawn].tolist()) == ([0], [3], [4])


def test_pixels_are_drawn_by_weight():
    rng = torch.Generator().manual_seed(0)
    weights = torch.tensor([[[0.0, 1.0, 2.0], [4.0, 0.0, 8.0]]])
    count = torch.zeros(2, 3)
    for _ in range(4000):
        _, v, u, _ = clap.draw_pixels(weights, 1, [rng])
        count[v, u] += 1
    torch.testing.assert_close(count / 4000, weights[0] / 15, atol=0.025, rtol=0)


def test_sdf_sampling_starts_exactly_after_the_warm_up(three_frames, tmp_path, monkeypatch):
    """uniform_epochs epochs are uniform, val losses likewise; an epoch is one step here."""
    uniform = {True: [], False: []}  # by whether the model trains
    original = clap.CLAP.forward

    def forward(self, batch, uniform_now=False):
        uniform[self.training].append(uniform_now)
        return original(self, batch, uniform_now)

    names = "range_hidden", "beam_mean", "nearest_ray", "range_visible"
    monkeypatch.setattr(clap.CLAP, "forward", forward)
    monkeypatch.setattr(clap, "held_out_errors", lambda *_: dict.fromkeys(names))
    monkeypatch.setattr(clap, "save_figure", lambda *_: None)
    monkeypatch.setattr(clap, "loss_curves", lambda *_: None)
    monkeypatch.setattr(clap, "load_tool", lambda *_: None)
    clap.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, batch=2,
                             sampler="sdf", steps=3, uniform_epochs=2, eval_every=1))
    assert uniform == {True: [True, True, False], False: [True, True, False]}


def test_a_warm_up_that_never_ends_is_refused(three_frames, tmp_path):
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, batch=2,
                  sampler="sdf", steps=2, uniform_epochs=2)
    message = "--uniform-epochs 2 are 2 steps, the run has 2: the SDF would never"
    with pytest.raises(SystemExit, match=message):
        clap.train(0, 1, cfg)


def test_warm_up_and_ablation_sample_uniformly_below_the_sky(batch, model, monkeypatch):
    calls = []

    def spy(name, sampler):
        def call(*words):
            calls.append(name)
            return sampler(*words)
        return call

    spies = {name: spy(name, sampler) for name, sampler in clap.SAMPLERS.items()}
    monkeypatch.setattr(clap, "SAMPLERS", spies)
    draws = record(monkeypatch, clap, "draw_pixels")
    model.cfg = replace(TINY, sampler="sdf")
    model(batch, uniform=True)
    model(batch)
    model.cfg = replace(TINY, sampler="uniform")
    model(batch)
    assert calls == ["uniform", "sdf", "uniform"]
    for i in (0, 2):
        _, (view, v, u, _) = draws[i]
        assert v.min() >= 0.4 * 48


# ---- the field, its rendering, the rendering losses ----------------------------------

def plain_field(field, volume, p, direction):
    """SDF and colour at one point, by grid_sample and one layer after the other.

    volume (1, C, Z, Y, X), p and direction (3,) -> s, c (3,).
    """
    zyx = field.cells.index(p[None].float()).to(p)
    size = torch.tensor(field.cells.shape[::-1])
    xyz = zyx.flip(1) / (size - 1) * 2 - 1  # in [-1, 1]
    f = F.grid_sample(volume, xyz.view(1, 1, 1, 1, 3), align_corners=True,
                      padding_mode="border").flatten()
    x = field.place(p * field.scale)
    for i, layer in enumerate(field.layers):
        rows = slice(16 * i, 16 * (i + 1))
        x = layer(x + field.inject.weight[rows] @ f + field.inject.bias[rows])
        softplus = torch.log1p(torch.exp(100 * x.clamp(max=0.2))) / 100  # beta 100
        x = torch.where(x > 0.2, x, softplus)
    x = field.output(x)
    c = field.rgb(torch.cat([f, x[1:], direction]))
    return float(x[0].detach()), c


def plain_weights(s, h):
    """w_n = t_n alpha_n from the SDF at the samples of a ray, with the paper's alpha."""
    t = 1.0
    w = []
    for s_n, s_next in zip(s, s[1:]):
        phi = 1 / (1 + math.exp(-h * s_n))
        phi_next = 1 / (1 + math.exp(-h * s_next))
        alpha = max((phi - phi_next) / phi, 0)
        w.append(t * alpha)
        t *= 1 - alpha
    return w


def plain_ray(field, volume, origin, direction, far, jitter, quantile):
    """Range and colour of one ray, in scalar loops and float64. -> r, c (3,)"""
    def at(depth):
        return plain_field(field, volume, origin + direction * depth, direction)

    # coarse samples: one in each of S equal parts
    S = len(jitter)
    section = (far - clap.NEAR) / S
    depth = [clap.NEAR + section * (i + j) for i, j in enumerate(jitter.tolist())]

    # fine samples: invert the cumulative sum of the coarse weights at h = 64
    w = np.array(plain_weights([at(d)[0] for d in depth], 64.0)) + 1e-5
    cdf = np.concatenate([[0], np.cumsum(w / w.sum())])
    depth = sorted(depth + np.interp(quantile.numpy(), cdf, depth).tolist())

    # r~ = sum w_n r_n, c~ = sum w_n c_n
    values = [at(d) for d in depth]
    w = plain_weights([s for s, _ in values], float(torch.exp(10 * field.sharpness)))
    r = 0.0
    c = torch.zeros(3, dtype=torch.float64)
    for n, w_n in enumerate(w):
        r += w_n * (depth[n] + depth[n + 1]) / 2
        c = c + w_n * (values[n][1] + values[n + 1][1]) / 2
    return r, c


def test_render_in_plain_loops(model):
    """Field.render is plain_ray, ray by ray."""
    torch.manual_seed(3)
    field = model.field.double()
    with torch.no_grad():
        field.output.weight[0] *= 20  # a field with surfaces in it
        field.sharpness.fill_(0.4)
    volume = torch.randn(1, 8, *field.cells.shape, dtype=torch.float64)
    table = volume[0].permute(1, 2, 3, 0).reshape(-1, 8)
    direction = torch.randn(6, 3, dtype=torch.float64) * torch.tensor([1, 1, 0.05])
    direction = F.normalize(direction, dim=1)
    origin = torch.rand(6, 3, dtype=torch.float64)
    far = torch.full((6,), 24.0, dtype=torch.float64)
    jitter = torch.rand(6, 10, dtype=torch.float64)
    quantile = torch.rand(6, 5, dtype=torch.float64)
    b = torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        r, c = field.render(table, origin, direction, b, far, jitter, quantile, True)
        for i in range(6):
            r_plain, c_plain = plain_ray(field, volume, origin[i], direction[i], 24.0,
                                         jitter[i], quantile[i])
            assert float(r[i]) == pytest.approx(float(r_plain), abs=1e-3)
            torch.testing.assert_close(c[i], c_plain, atol=1e-4, rtol=1e-3)
    assert r.max() > 1 and r.std() > 0.1


def test_rays_that_miss_the_box_are_dropped_and_empty_space_renders_nothing(model, monkeypatch):
    def empty(table, p, b):
        return torch.ones(len(p)), torch.zeros(len(p), 16), torch.zeros(len(p), 8)

    monkeypatch.setattr(model.field, "sdf", empty)
    origin = torch.tensor([[0.0, 0, 0], [25.3, 0, 0], [30.0, 0, 0], [0.0, 0, 0]])
    direction = torch.tensor([[1.0, 0, 0]]).expand(4, 3)
    monkeypatch.setattr(clap, "rays", lambda *_: (origin, direction))
    images = torch.arange(4, dtype=torch.uint8).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    batch = SimpleNamespace(images=images, lidar2img=None, size=1, cameras=1)
    zero = torch.zeros(4, dtype=torch.int64)
    positive = torch.tensor([True, True, True, False])
    c, c_hat = model.render_pixels(None, batch, zero, zero, torch.arange(4), positive,
                                   [torch.Generator()])
    assert torch.equal(c, torch.zeros(1, 3))  # the first pixel's, no other's
    assert (c_hat == 0).all() and len(c_hat) == 1
    r, _ = model.render(None, origin[:1], direction[:1], zero[:1], [1], [torch.Generator()], False)
    assert r.tolist() == [0]


def test_an_oracle_field_renders_its_sphere(model, monkeypatch):
    """Every ray is within half a stratum of the truth, nearer with the finer samples."""
    field = model.field
    R = 200
    centre = torch.tensor([12.0, 2.0, 0.0])

    def sdf(table, p, b):
        s = ((p - centre).norm(dim=1) - 4) * field.scale
        return s, torch.zeros(len(p), 16), torch.zeros(len(p), 8)

    monkeypatch.setattr(field, "sdf", sdf)
    with torch.no_grad():
        field.sharpness.fill_(math.log(400.0) / 10)
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(R, 3, generator=generator) * 0.08
    direction = F.normalize(F.normalize(centre, dim=0) + spread, dim=1)
    along = direction @ centre
    aside = centre.norm() ** 2 - along ** 2  # squared distance of the ray from the centre
    truth = along - (16 - aside).clamp_min(0).sqrt()
    hit = aside < 12
    assert hit.sum() > 100

    def render(n, finer, colour):
        jitter = torch.rand(R, n, generator=generator)
        quantile = torch.rand(R, finer, generator=generator)
        origin = torch.zeros(R, 3)
        b = torch.zeros(R, dtype=torch.int64)
        far = torch.full((R,), 25.0)
        return field.render(None, origin, direction, b, far, jitter, quantile, colour)

    def error(n, finer):
        r, _ = render(n, finer, False)
        return (r - truth)[hit].abs()

    assert error(32, 16).max() < 24 / 32
    assert error(32, 16).mean() < 0.6 * error(32, 1).mean()
    assert render(32, 16, True)[1].isfinite().all()


def plain_targets(batch):
    """Rows of the points that a ray is cast at, one by one.

    They are inside the small grid, of the keyframe sweep, over 3 m from the LiDAR. -> (M,)
    """
    rows = []
    for n, (x, y, z, _, age) in enumerate(batch.points.tolist()):
        inside = -25.6 < x < 25.6 and -25.6 < y < 25.6 and -3 < z < 1
        origin = batch.origin[batch.b_points[n]].tolist()
        if inside and age == 0 and math.dist((x, y, z), origin) > 3:
            rows.append(n)
    return torch.tensor(rows)


def test_rendering_losses_in_plain_loops(batch, model, monkeypatch):
    """L_range and L_colour from the rendered rays, the points and the pixels; then the total."""
    draws = record(monkeypatch, clap, "draw_pixels")
    renders = record(monkeypatch, model, "render")
    L, terms = model(batch)
    (_, origin, direction, *_), (r_hat, _) = renders[0]
    (_, eye, away, *_), (_, c_hat) = renders[1]
    _, (view, v, u, positive) = draws[0]
    view, v, u = view[positive], v[positive], u[positive]  # every ray here meets the box
    assert len(view) == len(eye)

    # L_range: |r - r~|, of the scene scaled to +-1. The point of each ray is searched
    # again: the nearest in direction
    keyframe = batch.points[batch.points[:, 4] == 0, :3]
    L_range = 0.0
    for o, d, r_ in zip(origin, direction, r_hat.tolist()):
        offset = keyframe - o
        nearest = int((F.normalize(offset, dim=1) @ d).argmax())
        r = float(offset[nearest].norm())
        L_range += abs(r - r_) / 25.6
    L_range /= len(r_hat)
    assert float(terms["L_range"]) == pytest.approx(L_range, rel=2e-3)

    # each camera ray goes through the middle of the pixel that it is compared with
    for i in range(0, len(view), 7):
        p = torch.cat([eye[i] + 9 * away[i], torch.ones(1)])
        ud, vd, d = (batch.lidar2img[view[i]] @ p)[:3].tolist()
        middle = int(u[i]) + 0.5, int(v[i]) + 0.5
        assert (ud / d, vd / d) == pytest.approx(middle, abs=0.02)

    # L_colour: |c - c~| over three channels, of the rays that meet the box
    L_colour = 0.0
    pixels = list(zip(view.tolist(), v.tolist(), u.tolist()))
    for (image, y, x), c_ in zip(pixels, c_hat.detach().tolist()):
        for j in range(3):
            c = int(batch.images[image, j, y, x]) / 255
            L_colour += abs(c - c_[j])
    L_colour /= 3 * len(c_hat)
    assert float(terms["L_colour"]) == pytest.approx(L_colour, rel=1e-4)

    # L = omega_r L_rend + omega_proto L_proto
    t = {name: float(value) for name, value in terms.items()}
    L_rend = t["L_range"] + 0.05 * t["L_surface"] + 0.05 * t["L_colour"]
    L_proto = 1.0 * t["L_SwAV"] + 0.1 * t["L_EM"] + 0.1 * t["L_GMM"]
    assert float(L) == pytest.approx(2.0 * L_rend + 1.0 * L_proto, rel=1e-5)
    assert len(r_hat) == 2 * 96 and len(pixels) <= 12 * 24


def test_surface_loss_is_the_mean_absolute_sdf_at_the_drawn_points(batch, model, monkeypatch):
    draws = record(monkeypatch, clap, "draw_points")
    encodings = record(monkeypatch, model, "encode")
    field = model.eval().field
    with torch.no_grad():
        _, terms = model(batch)
        field.output.bias[0] -= terms["L_surface"]  # about half of the values become negative
    _, terms = model(batch)
    _, drawn = draws[-1]
    _, (table, *_) = encodings[-1]
    volume = table.view(2, *field.cells.shape, 8).permute(0, 4, 1, 2, 3)
    values = []
    for n in plain_targets(batch)[drawn]:
        frame = volume[batch.b_points[n]][None]
        s, _ = plain_field(field, frame, batch.points[n, :3], torch.zeros(3))
        values.append(s)
    assert min(values) < 0 < max(values)
    L_surface = sum(abs(s) for s in values) / len(values)
    assert float(terms["L_surface"]) == pytest.approx(L_surface, rel=1e-3)


# ---- what reaches what ---------------------------------------------------------------

ENCODERS = {"lidar", "camera.resnet", "camera.neck", "fuse", "shallow"}
SDF = {"field.place", "field.inject", "field.layers", "field.output"}
SHARPNESS = {"field.sharpness"}
BRANCHES = {"lidar", "camera.resnet", "camera.neck"}
PROTO = {"proto.head_lidar", "proto.head_image", "proto.K"}
PARTS = ENCODERS | SDF | SHARPNESS | {"field.rgb"} | PROTO
REACH = {
    "L_range": ENCODERS | SDF | SHARPNESS,
    "L_surface": ENCODERS | SDF,
    "L_colour": ENCODERS | SDF | SHARPNESS | {"field.rgb"},
    "L_SwAV": BRANCHES | PROTO,
    "L_EM": BRANCHES | PROTO,
    "L_GMM": {"proto.K"},
}


@pytest.mark.parametrize("term", REACH)
def test_each_term_reaches_just_its_modules(batch, model, term):
    _, terms = model(batch)
    terms[term].backward()
    reached = set()
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 0:
            reached |= {part for part in PARTS if name.startswith(part)}
    assert reached == REACH[term]


def test_every_parameter_gets_gradient(batch, model):
    model(batch)[0].backward()
    idle = [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []
    for name, _ in model.named_parameters():
        assert name.startswith(tuple(PARTS)), name


def test_without_prototypes_only_rendering_is_left(batch):
    torch.manual_seed(0)
    model = clap.CLAP(replace(TINY, without="prototypes"), GRID)
    L, terms = model(batch)
    assert float(L) == pytest.approx(2 * float(terms["L_rend"]))
    assert "L_SwAV" not in terms
    assert not any("proto" in name for name, _ in model.named_parameters())
    L.backward()
    assert all(p.grad is not None for p in model.parameters())


def draw_masks_apart(batch, model):
    """The two masks, each from fresh streams. -> points (N,), pixels (B K, H, W) bool"""
    masked = clap.mask_points(batch.points, batch.b_points, model.lidar, 0.9,
                              clap.frame_rngs(batch.seeds, CPU))
    masked_px = clap.mask_pixels(batch.images, batch.cameras, 0.3,
                                 clap.frame_rngs(batch.seeds, CPU))
    return masked, masked_px


def test_nothing_of_a_masked_point_or_pixel_enters_the_volume(batch, model):
    model.eval()
    masked, masked_px = draw_masks_apart(batch, model)
    before = model.encode(batch, masked, masked_px)[0]

    points = batch.points.clone()
    points[masked, :4] = points[masked, :4].flip(0)
    images = batch.images.clone()
    pixels = images.permute(0, 2, 3, 1)
    pixels[masked_px] = 255 - pixels[masked_px]
    changed = replace(batch, points=points, images=images)
    assert torch.equal(before, model.encode(changed, masked, masked_px)[0])

    moved = replace(batch, points=batch.points * 0.9)
    assert not torch.equal(before, model.encode(moved, masked, masked_px)[0])


def test_masks_are_blocks_of_8_voxels_and_patches_of_32_pixels(batch, model):
    masked, masked_px = draw_masks_apart(batch, model)
    xyz = batch.points[:, :3]
    inside = (xyz.abs() < torch.tensor([25.6, 25.6, 1.0])).all(1) & (xyz[:, 2] > -3)
    low, size = torch.tensor([-25.6, -25.6, -3.0]), torch.tensor([0.8, 0.8, 1.0])
    block = torch.cat([batch.b_points[inside, None], ((xyz[inside] - low) / size).long()], 1)
    _, which = block.unique(dim=0, return_inverse=True)
    assert 0.85 < masked[inside].float().mean() < 0.95
    for i in range(int(which.max()) + 1):
        assert len(masked[inside][which == i].unique()) == 1

    # 48 x 128 pixels: a whole row of patches and half a row
    assert 0.15 < masked_px.float().mean() < 0.45
    patches = masked_px[:, :32].unflatten(2, (4, 32))
    assert (patches.flatten(3).any(3) == patches.flatten(3).all(3)).all()
    assert torch.equal(patches.all(3).all(1), patches[:, 0, :, 0])
    assert (patches[:, 0, 1:, 0] != patches[:, 0, :-1, 0]).any()
    assert (masked_px[:, 32] != masked_px[:, 31]).any()


def test_shared_cells_hold_a_point_and_are_seen_by_a_camera(batch, model):
    rngs = clap.frame_rngs(batch.seeds, CPU)
    cells = model.lidar.cells[-1]
    unmasked = torch.zeros(len(batch.points), dtype=torch.bool)
    unmasked_px = torch.zeros(len(batch.images), 48, 128, dtype=torch.bool)
    _, lidar, _, seen = model.encode(batch, unmasked, unmasked_px)
    cell = model.shared_cells(lidar, seen, batch, unmasked, rngs)
    shared = set(map(tuple, lidar.coords[cell].tolist()))

    expected = set()
    for b, (x, y, z) in zip(batch.b_points.tolist(), batch.points[:, :3].tolist()):
        if -25.6 <= x < 25.6 and -25.6 <= y < 25.6 and -3 <= z < 1:
            zyx = []
            for value, first, step, n in zip((z, y, x), cells.first[::-1], cells.step[::-1],
                                             cells.shape):
                zyx.append(min(max(round((value - first) / step), 0), n - 1))
            if seen[(b, *zyx)]:
                expected.add((b, *zyx))
    assert len(shared ^ expected) <= 0.01 * len(expected)  # fp32 at faces
    assert len(cell) == len(shared)
    assert 100 < len(shared) < 0.6 * len(lidar.coords)

    few = model.shared_cells(lidar, seen, batch, unmasked, rngs, most=7)
    assert torch.bincount(lidar.coords[few, 0]).tolist() == [7, 7]


def test_targets_match_a_plain_loop(batch, model):
    rows, counts, _, _ = model.targets(batch)
    expected = plain_targets(batch)
    assert torch.equal(rows, expected)
    assert counts == torch.bincount(batch.b_points[expected], minlength=batch.size).tolist()


def test_range_targets_start_at_the_lidar(batch, model):
    moved = replace(batch, origin=torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]]))
    rows, _, direction, r = model.targets(moved)
    end = moved.origin[batch.b_points[rows]] + direction * r[:, None]
    torch.testing.assert_close(end, batch.points[rows, :3], atol=1e-4, rtol=1e-4)
    assert (r > 3).all() and (batch.points[rows, 4] == 0).all()


@pytest.mark.parametrize("sampler", clap.SAMPLERS)
def test_sampling_weights_are_of_each_frame_alone(batch, model, sampler):
    cells = math.prod(model.lidar.cells[-1].shape)
    table = torch.randn(2 * cells, 8, generator=torch.Generator().manual_seed(0))
    table.requires_grad_()
    rows, counts, _, _ = model.targets(batch)
    given = batch if sampler == "pca" else replace(batch, extra={})
    omega = model.sampling_weights(table, given, rows, counts, sampler)
    assert not omega.requires_grad and omega.isfinite().all() and (omega > 0).all()
    assert (omega.std() > 1e-3 * omega.mean()) == (sampler != "uniform")

    # whatever the other frame of the batch is
    second = batch.b_points[rows] == 1
    alone = model.sampling_weights(table, given, rows[second], [0, counts[1]], sampler)
    torch.testing.assert_close(alone, omega[second])

    # the volume that sdf looks at is the frame's own
    exchanged = replace(given, b_points=1 - batch.b_points)
    other = model.sampling_weights(table, exchanged, rows, counts, sampler)
    assert torch.allclose(other, omega) == (sampler != "sdf")


def test_initial_sharpness_prototypes_and_step(batch, model, monkeypatch):
    """h begins at e^3, prototypes as normal numbers: L_EM is inert with short ones.

    The SDF's differences are half a cell wide.
    """
    assert float(model.field.h) == pytest.approx(math.exp(3))
    module = clap.Prototypes(replace(TINY, prototypes=64), 4, 4)
    assert float(module.K.norm(dim=1).mean()) == pytest.approx(math.sqrt(16), rel=0.1)
    steps = []

    def sdf_curvature(xyz, b, pca, sdf, step):
        steps.append(step)
        return xyz[:, 0].abs()

    monkeypatch.setitem(clap.SAMPLERS, "sdf", sdf_curvature)
    model.sampling_weights(None, batch, *model.targets(batch)[:2], "sdf")
    assert steps == pytest.approx([0.4])  # m: a cell is 8 voxels of 0.1


def test_forward_masks_draws_by_curvature_and_pairs_visible_cells(batch, model, monkeypatch):
    """What the pieces are given, against plain or independent values.

    These are the masks, the weights, the rays' origins, the cells and their pairing.
    """
    points = batch.points
    batch = replace(batch, origin=torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 0.0]]))
    encodings = record(monkeypatch, model, "encode")
    renders = record(monkeypatch, model, "render")
    losses = record(monkeypatch, model.proto, "forward")
    point_draws = record(monkeypatch, clap, "draw_points")
    pixel_draws = record(monkeypatch, clap, "draw_pixels")
    model(batch)

    (_, masked, masked_px), (_, lidar, image, seen) = encodings[0]
    expected = model.draw_masks(batch, clap.frame_rngs(batch.seeds, CPU))
    assert torch.equal(masked, expected[0]) and torch.equal(masked_px, expected[1])

    rows = plain_targets(batch)
    b = batch.b_points[rows]
    omega = batch.extra["points_curvature"][rows]
    omega = torch.cat([clap.clean_weights(omega[b == frame]) for frame in range(2)])
    (weights, *_), drawn = point_draws[0]
    assert torch.equal(weights, omega) and omega.std() > 0
    (maps, *_), _ = pixel_draws[0]
    counts = torch.bincount(b).tolist()
    assert torch.equal(maps, clap.pixel_weights(omega, points[rows, :3], counts, batch, 9))

    drawn = rows[drawn]
    (_, origin, direction, *_), _ = renders[0]
    assert torch.equal(origin, batch.origin[batch.b_points[drawn]])
    away = F.normalize(points[drawn, :3] - origin, dim=1)
    torch.testing.assert_close(direction, away)

    # the two halves of a cell are paired, of cells with a visible point that a camera sees
    visible = ~masked & model.lidar.inside(points)
    zyx = lidar.cells.index(points[visible, :3]).round().long()
    zyx = zyx.clamp_min(0).minimum(torch.tensor(lidar.cells.shape) - 1)
    occupied = torch.cat([batch.b_points[visible, None], zyx], 1).unique(dim=0)
    shared = tuple(occupied[seen[tuple(occupied.t())]].t())
    volumes = torch.cat([lidar.dense(), image], 1).permute(0, 2, 3, 4, 1)
    expected = volumes[shared]
    given = torch.cat(losses[0][0], 1)
    assert len(given) == len(expected) > 30
    assert sorted(map(tuple, given.tolist())) == sorted(map(tuple, expected.tolist()))


# ---- bad frames ----------------------------------------------------------------------

def only(batch, rows):
    """The batch with just these of its points. rows: a mask or a slice"""
    extra = {name: values[rows] for name, values in batch.extra.items()}
    b = batch.b_points[rows]
    counts = torch.bincount(b, minlength=batch.size).tolist()
    return replace(batch, points=batch.points[rows], b_points=b, counts=counts, extra=extra)


@pytest.mark.parametrize("trouble", [
    "one empty cloud", "no points at all", "no camera sees", "no valid ray",
    "one prototype takes all", "single point"])
def test_bad_frames_give_a_finite_loss_and_gradient(batch, model, trouble):
    if trouble == "one empty cloud":
        batch = only(batch, batch.b_points == 0)
    if trouble == "no points at all":
        batch = only(batch, slice(0))
    if trouble == "single point":
        batch = only(batch, slice(1))
    if trouble == "no camera sees":
        flat = torch.diag(torch.tensor([1.0, 1.0, 1e-9, 1.0]))
        batch = replace(batch, lidar2img=flat.expand_as(batch.lidar2img) + 0)
    if trouble == "no valid ray":
        points = batch.points.clone()
        points[:, :3] *= 100
        batch = replace(batch, points=points)
    if trouble == "one prototype takes all":
        with torch.no_grad():
            model.proto.K.zero_()[3] = 50.0
    for sampler in ("pca", "sdf"):
        model.cfg = replace(TINY, sampler=sampler)
        model.zero_grad()
        L, terms = model(batch)
        L.backward()
        assert L.isfinite()
        assert all(math.isfinite(float(value)) for value in terms.values()), terms
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- learning and runs ---------------------------------------------------------------

@pytest.mark.slow
def test_one_frame_can_be_learned(batch, model):
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for _ in range(25):
        L, terms = model(batch)
        opt.zero_grad()
        L.backward()
        opt.step()
        history.append({name: float(value) for name, value in terms.items()})
    assert history[-1]["L_range"] < 0.4 * history[0]["L_range"]
    assert history[-1]["L_SwAV"] < history[0]["L_SwAV"]


def command(world, out, *flags):
    """clap.py as it is run, narrow and with few rays."""
    return [sys.executable, str(ROOT / "clap.py"), "--data", str(world), "--out", str(out),
            "--preset", "small", "--width", "4", "--rays", "64", "--pixels", "16", *flags]


def run(world, out, *flags, wait=True):
    """Four steps of one frame -> subprocess.CompletedProcess, or Popen if not waited for."""
    words = command(world, out, "--steps", "4", "--save-every", "1", "--eval-every", "2",
                    "--batch", "1", "--samples", "8", "--importance-samples", "4", *flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if wait:
        return subprocess.run(words, capture_output=True, text=True, env=environment,
                              timeout=240, cwd=out.parent)
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=environment, cwd=out.parent)


def plain_rays(batch, masked):
    """The range targets, one by one -> list of (frame, unit direction, range m, masked)."""
    rays = []
    for n, (x, y, z, _, age) in enumerate(batch.points.double().tolist()):
        r = math.sqrt(x * x + y * y + z * z)
        inside = -25.6 <= x < 25.6 and -25.6 <= y < 25.6 and -3 <= z < 1
        if r > 3 and age == 0 and inside:
            direction = np.array([x, y, z]) / r
            rays.append((int(batch.b_points[n]), direction, r, bool(masked[n])))
    return rays


def half_degree(direction):
    return round(2 * math.degrees(math.asin(direction[2])))


def test_held_out_errors_in_plain_loops(batch, model, monkeypatch):
    """A volume that renders 7 m everywhere, and 9 m with the other frame's cloud.

    Its colour is a grey of 7 / 20, with every pixel masked 5 / 20.
    """
    masked, masked_px = model.draw_masks(batch, clap.frame_rngs(batch.seeds, CPU))

    def encode(given, given_masked, given_masked_px):
        blind = given_masked_px.all()
        swapped = not torch.equal(given.b_points, batch.b_points)
        assert torch.equal(given_masked, masked)
        assert blind or torch.equal(given_masked_px, masked_px)
        return (torch.tensor(9.0 if swapped else 5.0 if blind else 7.0),)

    def render(table, origin, direction, b, counts, rngs, colour):
        clap.CLAP.ray_noise(model, counts, rngs)
        return table.expand(len(b)), (table / 20).expand(len(b), 3)

    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model, "render", render)
    draws = record(monkeypatch, clap, "draw_pixels")
    errors = clap.held_out_errors(model, [batch], CPU)
    assert list(errors) == ["range_hidden", "range_visible", "beam_mean", "nearest_ray",
                            "colour"]
    errors |= figures.clap_diagnostics(model, [batch], CPU)

    # ranges
    rays = plain_rays(batch, masked)
    hidden = [(frame, direction, r) for frame, direction, r, m in rays if m]
    visible = [(frame, direction, r) for frame, direction, r, m in rays if not m]
    beams = {}
    for _, direction, r, _ in rays:
        beams.setdefault(half_degree(direction), []).append(r)
    beam_means = {beam: np.mean(ranges) for beam, ranges in beams.items()}
    directions = {b: np.array([d for frame, d, _ in visible if frame == b]) for b in (0, 1)}
    ranges = {b: [r for frame, _, r in visible if frame == b] for b in (0, 1)}
    beam_errors = []
    near_errors = []
    for frame, direction, r in hidden:
        beam_errors.append(abs(r - beam_means[half_degree(direction)]))
        nearest = (directions[frame] @ direction).argmax()
        near_errors.append(abs(r - ranges[frame][nearest]))

    # colours, of the same pixels in both functions
    (_, pixels), (_, again) = draws
    assert all(torch.equal(a, b) for a, b in zip(pixels, again))
    view, v, u = [part[pixels[3]] for part in pixels[:3]]
    c = batch.images[view, :, v, u].double() / 255

    expected = dict(
        range_hidden=np.mean([abs(r - 7) for _, _, r in hidden]),
        range_visible=np.mean([abs(r - 7) for _, _, r in visible]),
        beam_mean=np.mean(beam_errors),
        nearest_ray=np.mean(near_errors),
        range_all=np.mean([abs(r - 7) for _, _, r in hidden + visible]),
        range_swapped=np.mean([abs(r - 9) for _, _, r in hidden + visible]),
        colour=float((c - 0.35).abs().mean()),
        colour_blind=float((c - 0.25).abs().mean()),
        colour_mean=float((c - c.mean(0)).abs().mean()))
    assert errors.keys() == expected.keys()
    for name, value in expected.items():
        assert errors[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name


def test_a_run_leaves_what_it_should(three_frames, tmp_path):
    whole = run(three_frames, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "val range error" in whole.stdout.splitlines()[-1]
    for name in ("config.json", "provenance.json", "log.jsonl", "last.pt", "previous.pt",
                 "backbones.safetensors", "metrics.json", "source/clap.py",
                 "figures/rendered.png", "figures/samples.png", "figures/sampled_pixels.png",
                 "figures/prototypes.png", "figures/losses.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0, name
    last = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)

    from safetensors import safe_open
    with safe_open(tmp_path / "whole" / "backbones.safetensors", "pt") as stored:
        units = {name.split(".")[0] for name in stored.keys()}
        header = stored.metadata()
        conv1 = stored.get_tensor("camera.resnet.conv1.weight")
    assert units == {"lidar", "camera", "fuse"}
    assert header["units"] == "lidar,camera.resnet,camera.neck,fuse"
    assert json.loads(header["config"])["width"] == 4
    assert json.loads(header["grid"])["voxel"] == [0.1, 0.1, 0.125]
    assert torch.equal(conv1, last["model"]["camera.resnet.conv1.weight"])

    # the val split has one frame, so no other cloud can be swapped in
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    absent = {name for name, value in metrics.items() if value is None}
    assert absent <= {"range_swapped", "range_all"}


@pytest.mark.parametrize("flags, message", [
    (dict(epochs=2), "one of them must be 0"),
    (dict(blur=8), "odd"),
    (dict(prototypes=1), "at least 2"),
    (dict(eval_every=0), "--eval-every 0: expected a whole number from 1"),
    (dict(mask_points=90), "shares"),
    (dict(sky=-0.1), "--sky -0.1: expected a number from 0"),
    (dict(rays=0), "--rays 0: expected a whole number from 1"),
    (dict(samples=1), "at 2"),
    (dict(rotation=-0.1), "--rotation -0.1: expected a number from 0"),
    (dict(scale=1.0), "below 1"),
    (dict(tau=0.0), "--tau 0.0: expected a number above 0"),
    (dict(neighbours=3), "plane"),
])
def test_contradictory_flags_are_refused_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        clap.train(0, 1, replace(TINY, out=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_help_has_names_values_and_sources():
    shown = subprocess.run([sys.executable, str(ROOT / "clap.py"), "--help"], cwd=ROOT,
                           capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert shown.returncode == 0
    for words in ("8192", "N_L", "[paper]", "--sampler {pca,sdf,uniform}", "omega_GMM",
                  "[code SwAV]"):
        assert words in shown.stdout, words


# ---- two processes -------------------------------------------------------------------

def sinkhorn_and_means(rank):
    """Codes, gradient and two means over the rows of both ranks, 11 and 19, or 30 and none."""
    torch.manual_seed(0)
    S = torch.randn(30, 6, dtype=torch.float64)
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    rows = slice(0, 11) if rank == 0 else slice(11, 30)
    Q = clap.sinkhorn(S[rows], 0.05, 3)
    mean = mean_over_ranks(x[rows].square().sum(), len(x[rows]))
    mean.backward()
    rows = slice(0, 30) if rank == 0 else slice(0)
    lopsided = mean_over_ranks(x[rows].sum(), len(x[rows]))
    return Q, x.grad / 2, mean.detach() / 2, lopsided.detach() / 2  # DDP averages over two


def test_two_processes_give_sinkhorn_and_means_of_one(server, tmp_path):
    torch.manual_seed(0)
    S = torch.randn(30, 6, dtype=torch.float64)
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    x.square().mean().backward()
    one, two = on_two(server, sinkhorn_and_means, tmp_path)
    torch.testing.assert_close(torch.cat([one[0], two[0]]), clap.sinkhorn(S, 0.05, 3))
    torch.testing.assert_close(one[1] + two[1], x.grad)
    torch.testing.assert_close(one[2] + two[2], x.detach().square().mean())
    torch.testing.assert_close(one[3] + two[3], x.detach().mean())


def a_frame_each(rank, cases):
    """The whole method on two processes, a frame each, through DDP: loss, terms, gradients."""
    results = []
    for model, batches in cases:
        net = wrap(model, CPU, 2)
        loss, terms = net(batches[rank])
        loss.backward()
        terms = {name: torch.as_tensor(value).detach() for name, value in terms.items()}
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss.detach(), terms, gradients))
    return results


def halves(batch):
    """A batch of two frames as two batches of one."""
    parts = []
    for b in range(2):
        points = batch.b_points == b
        boxes = batch.b_boxes == b
        images = slice(b * batch.cameras, (b + 1) * batch.cameras)
        frame = slice(b, b + 1)
        parts.append(replace(
            batch, size=1, names=batch.names[frame], seeds=batch.seeds[frame],
            counts=batch.counts[frame], box_counts=batch.box_counts[frame],
            points=batch.points[points], b_points=batch.b_points[points] * 0,
            extra={name: values[points] for name, values in batch.extra.items()},
            origin=batch.origin[frame], images=batch.images[images], hw=batch.hw[images],
            lidar2img=batch.lidar2img[images], boxes=batch.boxes[boxes],
            b_boxes=batch.b_boxes[boxes] * 0, labels=batch.labels[boxes]))
    return parts


MONITORS = {"h", "cells", "perplexity_P", "perplexity_I", "perplexity_Q", "agreement",
            "prototype_norm", "on_ground", "on_boxes"}


def test_two_processes_give_the_loss_and_gradient_of_one(server, batch, model, tmp_path):
    """With all points, and with none in one frame, batch norm in eval mode.

    In the third case batch norm trains, and must not hang on the frame without points.
    """
    model.eval()
    empty = only(batch, batch.b_points == 0)
    training = copy.deepcopy(model).train()
    cases = [(copy.deepcopy(model), halves(batch)), (copy.deepcopy(model), halves(empty)),
             (training, halves(empty))]
    ranks = on_two(server, a_frame_each, tmp_path, cases)

    for i, whole in enumerate((batch, empty)):
        one = copy.deepcopy(model)
        loss, terms = one(whole)
        loss.backward()
        (loss_0, terms_0, gradients_0), (loss_1, terms_1, gradients_1) = ranks[0][i], ranks[1][i]
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
        close((loss_0 + loss_1) / 2, loss.detach())
        for name in terms.keys() - MONITORS:  # no term of CLAP has local negatives
            assert name.startswith("L_")
            close((terms_0[name] + terms_1[name]) / 2, terms[name].detach(), msg=name)
        for name, p in one.named_parameters():
            close(gradients_0[name], p.grad, rtol=1e-4,
                  atol=1e-5 * float(p.grad.abs().max()) + 1e-9,
                  msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(gradients_0[name], gradients_1[name]), name
    for rank in ranks:
        loss, _, gradients = rank[2]
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


# ---- runs that are stopped -----------------------------------------------------------

def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def ranks_of(launcher):
    """{RANK: pid} of the processes that a launcher has started."""
    ranks = {}
    for pid in children(launcher):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        environment = dict(pair.split("=", 1) for pair in variables if "=" in pair)
        ranks[environment.get("RANK")] = pid
    return ranks


def begun(world, out, *flags):
    """A run that has finished at least one step. -> subprocess.Popen"""
    words = command(world, out, "--eval-every", "1000", *flags)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               start_new_session=True)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step "):
            return process
    pytest.fail(output)


def test_a_dead_process_ends_the_job_and_is_named(world, tmp_path):
    process = begun(world, tmp_path / "run", "--gpus", "2", "--batch", "1", "--steps", "500")
    os.kill(ranks_of(process.pid)["1"], signal.SIGKILL)
    died = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert time.monotonic() - died < 30 and process.returncode == 1
    assert rest.splitlines()[-1] == (
        "rank 1 of 2 was killed by signal 9; the others were stopped. "
        "The same command goes on from the last checkpoint.")


def test_a_process_that_fails_is_named_with_its_error(world, tmp_path):
    folder = Path(tmp_path / "cut")
    shutil.copytree(world, folder)
    for file in (folder / "samples/LIDAR_TOP").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    failed = run(folder, tmp_path / "run", "--gpus", "2", "--batch", "1")
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1
    assert re.match(r"rank [01] of 2: nuscenes/.*truncated", last), last


@pytest.mark.slow
def test_two_processes_stopped_by_sigterm_end_as_if_never_stopped(three_frames, tmp_path):
    flags = "--gpus", "2", "--batch", "1", "--steps", "3"
    whole = tmp_path / "whole"
    both = run(three_frames, whole, *flags)
    assert both.returncode == 0, both.stderr[-3000:]
    assert "2 CPU processes over gloo" in both.stdout and "of 2 frames (1 x 2)" in both.stdout
    assert "val range error" in both.stdout.splitlines()[-1]
    stored = json.loads((whole / "config.json").read_text())
    stored.pop("world")
    with pytest.raises(SystemExit, match="world was 2, is 1"):
        clap.train(0, 1, clap.Config(**stored))

    stopped = tmp_path / "stopped"
    process = run(three_frames, stopped, *flags, wait=False)
    deadline = time.monotonic() + 100
    while not (stopped / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143  # the launcher's status
    assert 1 <= torch.load(stopped / "last.pt", weights_only=True)["step"] < 3

    again = run(three_frames, stopped, *flags)
    assert again.returncode == 0, again.stderr[-3000:]
    a = torch.load(whole / "last.pt", weights_only=True)["model"]
    b = torch.load(stopped / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "log.jsonl").read_text() == (stopped / "log.jsonl").read_text()


def test_sigterm_to_every_process_still_saves(world, tmp_path):
    process = begun(world, tmp_path / "run", "--workers", "2", "--steps", "500")
    workers = children(process.pid)
    assert len(workers) >= 2
    for pid in (*workers, process.pid):  # as a scheduler does, in no order to count on
        os.kill(pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    assert "the same command goes on from there" in rest, rest
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 1


def test_profile_prints_where_a_step_goes_and_writes_nothing(three_frames, tmp_path, capsys):
    threads = torch.get_num_threads()
    clap.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), gpus=0,
                             batch=1, profile=2))
    output = capsys.readouterr().out
    times = {}
    for line in output.splitlines():
        if " ms a step" in line:
            times[line[:18].strip()] = float(line[18:].split()[0])
    assert list(times) == ["wait for data", "transfer", "lidar", "camera", "render",
                           "rest of forward", "backward", "optimiser", "in all"]
    total = times.pop("in all")
    assert sum(times.values()) == pytest.approx(total, abs=1)
    assert times["backward"] > 0 and times["lidar"] > 0
    assert f"2 steps of 1 frames, small size, cpu, {threads} threads" in output
    assert "GFLOP a step" in output and "28130 training frames of nuscenes" in output
    assert not (tmp_path / "run").exists()
