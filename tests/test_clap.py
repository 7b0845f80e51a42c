"""clap.py: every loss against a slow transcription from the paper, analytic curvature and rendering, what reaches what, and whole runs."""
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
from common import VoxelResNet, wrap
from conftest import on_two

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = clap.Config(preset="small", **{**clap.SMALL, "w_colour": 0.05, "rays": 96,
                                      "pixels": 24, "samples": 12, "importance_samples": 6, "prototypes": 8, "dims": 16, "width": 4, "bins": 12})


@pytest.fixture(scope="module")
def batch(world):
    """Two frames of the embedded world with small images and their curvature; every seventh point as if of an older sweep."""
    made = next(data.loader(str(world), "train", 2, preset="small", image=(48, 128), prepare=clap.Curvature(32),
                            augment=partial(data.augment_cloud, rotation=0.39, scale=0.05, flip=True)).begin_at(0))
    made.points[::7, 4] = 0.1
    return made


@pytest.fixture()
def model():
    torch.manual_seed(0)
    made = clap.CLAP(TINY, data.GRIDS["nuscenes", "small"])
    for layer in made.camera.resnet.modules():                                          # no block begins as an identity here: gradients show at once
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(layer.weight)
    return made


# ---- prototypes ----

def slow_sinkhorn(S, epsilon, iterations):
    """SwAV's listing in the plain domain, float64."""
    Q = np.exp(np.asarray(S, np.float64).T / epsilon)                                   # prototypes x samples
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(1, keepdims=True)
        Q /= len(Q)
        Q /= Q.sum(0, keepdims=True)
        Q /= Q.shape[1]
    return (Q * Q.shape[1]).T


def test_sinkhorn_is_swav_s_and_balances():
    torch.manual_seed(0)
    S = F.normalize(torch.randn(2048, 128), dim=1) @ F.normalize(torch.randn(32, 128), dim=1).t()
    Q = clap.sinkhorn(S.double(), 0.05, 3)
    np.testing.assert_allclose(Q.numpy(), slow_sinkhorn(S, 0.05, 3), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(Q.sum(1), torch.ones(2048, dtype=torch.float64))
    share = Q.sum(0) / (2048 / 32)
    assert 0.99 < share.min() < share.max() < 1.01
    torch.testing.assert_close(clap.sinkhorn(S.double(), 0.05, 200).sum(0), torch.full((32,), 64.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(clap.sinkhorn(S.double() + 3.7, 0.05, 3), Q)
    order = torch.randperm(2048)
    torch.testing.assert_close(clap.sinkhorn(S.double()[order], 0.05, 3), Q[order])


def test_sinkhorn_at_the_edges():
    assert clap.sinkhorn(torch.randn(50, 8) * 100, 0.05, 3).isfinite().all()            # exp would overflow
    assert clap.sinkhorn(torch.zeros(0, 8), 0.05, 3).shape == (0, 8)
    one = torch.zeros(50, 8)
    one[:, 3] = 5.0                                                                     # one prototype takes all
    torch.testing.assert_close(clap.sinkhorn(one, 0.05, 3), torch.full((50, 8), 1 / 8))
    assert not clap.sinkhorn(torch.randn(5, 8, requires_grad=True), 0.05, 3).requires_grad


def prototypes(scores_P, scores_I, **change):
    """The module with its heads replaced so that unit embeddings give the wanted scores: embeddings along the axes, prototypes the transposed scores."""
    cfg = replace(TINY, prototypes=scores_P.shape[1], **change)
    module = clap.Prototypes(cfg, 4, 4)
    N = len(scores_P)
    module.head_lidar = module.head_image = torch.nn.Identity()
    module.K = torch.nn.Parameter(torch.cat([scores_P, scores_I]).t().contiguous())     # (N_K, 2 N)
    eye = torch.eye(2 * N, dtype=scores_P.dtype)
    return module(3 * eye[:N], 0.2 * eye[N:])                                           # of any length before they are normalised


def test_prototype_losses_written_out_in_loops():
    torch.manual_seed(0)
    S_P, S_I = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    L_SwAV, L_EM, L_GMM, _ = prototypes(S_P, S_I, tau=0.7)
    Q_P, Q_I = slow_sinkhorn(S_P, 0.05, 3), slow_sinkhorn(S_I, 0.05, 3)
    swav = em = 0.0
    for n in range(6):
        for S, Q in ((S_P, Q_I), (S_I, Q_P)):                                           # images teach points, points teach images
            row, soft = [math.exp(v / 0.7) for v in S[n].tolist()], [math.exp(v) for v in S[n].tolist()]
            for m in range(5):
                swav -= Q[n, m] * math.log(row[m] / sum(row)) / (6 * 5)
                em -= soft[m] / sum(soft) * math.log(soft[m] / sum(soft)) / (6 * 5)
    K = torch.cat([S_P, S_I]).t().tolist()
    gram = sum(sum(a * b for a, b in zip(K[n], K[m])) for n in range(5) for m in range(5) if m != n) / (5 * 4)
    assert [float(L_SwAV), float(L_EM), float(L_GMM)] == pytest.approx([swav, em, gram], rel=1e-6)
    assert swav * 5 >= -(Q_P * np.log(Q_P) + Q_I * np.log(Q_I)).sum() / 6               # a cross entropy is at least the entropy
    other = prototypes(S_I, S_P, tau=0.7)
    assert float(other[0]) == pytest.approx(float(L_SwAV)) and float(other[1]) == pytest.approx(float(L_EM))    # symmetric in the modalities


def test_prototype_losses_at_known_points():
    zero = torch.zeros(6, 512)
    L_SwAV, L_EM, _, _ = prototypes(zero, zero)
    assert float(L_SwAV) == pytest.approx(2 * math.log(512) / 512, rel=1e-5) and float(L_EM) == pytest.approx(2 * math.log(512) / 512, rel=1e-5)
    sure = torch.eye(6, 8) * 1e3
    assert float(prototypes(sure, sure)[1]) == pytest.approx(0, abs=1e-6)
    assert float(prototypes(sure, sure)[3]["agreement"]) == 1 and float(prototypes(sure, sure.flip(0))[3]["agreement"]) == 0
    assert float(prototypes(sure, sure)[3]["perplexity_P"]) == pytest.approx(6, rel=1e-5)

    def gram(K):
        module = clap.Prototypes(replace(TINY, prototypes=len(K), dims=K.shape[1]), 4, 4).eval()
        module.K = torch.nn.Parameter(K)
        return float(module(torch.randn(3, 4), torch.randn(3, 4))[2])
    unit = F.normalize(torch.randn(1, 16), dim=1).expand(10, 16).contiguous()
    assert gram(unit) == pytest.approx(1, rel=1e-5) and gram(torch.eye(10, 16)) == 0 and gram(3 * unit) == pytest.approx(9, rel=1e-5)
    assert gram(torch.cat([unit[:5], -unit[5:]])) == pytest.approx(-1 / 9, rel=1e-4)    # two antipodal piles: its minimum at unit norm


# ---- curvature ----

def sphere(p, b):
    return (p - p.new_tensor([2.0, 1.0, 0.0])).norm(dim=1) - 3


SHAPES = [("plane", lambda p, b: p @ p.new_tensor([0.6, 0.0, 0.8]) - 1, 0.0), ("cylinder", lambda p, b: p[:, :2].norm(dim=1) - 2, 1 / 2),
          ("sphere", sphere, math.sqrt(2) / 3)]


@pytest.mark.parametrize("name, sdf, expected", SHAPES)
def test_sdf_curvature_of_analytic_shapes(name, sdf, expected):
    """Plane 0, cylinder 1 / R, sphere sqrt(2) / R, on the surface; float64 leaves the truncation of the differences alone."""
    torch.manual_seed(0)
    away = F.normalize(torch.randn(64, 3, dtype=torch.float64), dim=1)
    p = {"plane": away, "cylinder": away * torch.tensor([1.0, 1.0, 5.0]), "sphere": away * 3 + torch.tensor([2.0, 1.0, 0.0])}[name]
    if name == "cylinder":
        p = torch.cat([2 * F.normalize(p[:, :2], dim=1), p[:, 2:]], 1)
    b = torch.zeros(64, dtype=torch.int64)
    ours = clap.sdf_curvature(p, b, None, sdf, 0.02)
    torch.testing.assert_close(ours, torch.full_like(ours, expected), atol=2e-4, rtol=0)
    torch.testing.assert_close(clap.sdf_curvature(p, b, None, lambda q, f: 7 * sdf(q, f), 0.02), ours)             # n~ is normalised
    torch.testing.assert_close(clap.sdf_curvature(2 * p, b, None, lambda q, f: sdf(q / 2, f), 0.04), ours / 2, atol=2e-4, rtol=0)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(clap.sdf_curvature(p @ turn, b, None, lambda q, f: sdf(q @ turn.t(), f), 0.02), ours, atol=2e-4, rtol=0)


def test_sdf_orders_edges_before_faces():
    """A box of side 2: on its edges and corners, not on its faces nor the ground about it."""
    def sdf(p, b):
        q = p.abs() - 1
        return torch.minimum(q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0), p[:, 2] + 1)
    at = torch.linspace(-0.6, 0.6, 5)
    edge, corner = torch.stack([torch.ones(5), at, torch.ones(5)], 1), torch.ones(1, 3)
    face, ground = torch.stack([at, at.flip(0), torch.ones(5)], 1), torch.stack([3 + at, at, -torch.ones(5)], 1)
    weight = clap.sdf_curvature(torch.cat([corner, edge, face, ground]), torch.zeros(16, dtype=torch.int64), None, sdf, 0.2)
    assert weight[0] > weight[1:6].max() and weight[1:6].min() > 2 and weight[6:].max() < 1e-4


def test_sdf_curvature_asks_for_19_values_a_point():
    asked = []
    clap.sdf_curvature(torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64), None, lambda p, b: asked.append(len(p)) or p[:, 0], 0.3)
    assert sum(asked) == 190


def test_pca_orders_edges_before_faces():
    """A box: the weight is on its edge, hardly any on its faces."""
    g = np.random.default_rng(0)
    top = np.concatenate([g.uniform(-1, 1, (3000, 2)), np.ones((3000, 1))], 1)
    side = np.stack([np.ones(3000), g.uniform(-1, 1, 3000), g.uniform(0, 1, 3000)], 1)
    points = np.zeros((6000, 5), np.float32)
    points[:, :3] = np.concatenate([top, side])
    frame = SimpleNamespace(points=points)
    weight = clap.Curvature(32)(frame)["points_curvature"]
    edge = (np.abs(points[:, 0] - 1) < 0.05) & (points[:, 2] > 0.95)
    face = (np.abs(points[:, 0]) < 0.5) & (points[:, 2] == 1)
    assert weight[edge].mean() > 20 * weight[face].mean() and weight[face].max() < 1e-3
    points[:, 4] = 0.1
    points[:50, 4] = 0
    again = clap.Curvature(32)(frame)["points_curvature"]
    assert (again[50:] == 0).all() and np.allclose(again[:50], weight[:50], atol=1e-6)  # neighbours from all sweeps, values at key points


def test_weights_are_made_safe():
    w = clap.clean_weights(torch.tensor([0.0, 1.0, float("nan"), float("inf"), 2.0] + [1.0] * 200))
    assert w.isfinite().all() and (w > 0).all() and w.max() < 1.1
    assert torch.equal(clap.clean_weights(torch.zeros(4)), torch.ones(4)) and clap.clean_weights(torch.zeros(0)).shape == (0,)


def test_draws_follow_the_weights_within_each_frame():
    g = [torch.Generator().manual_seed(i) for i in range(3)]
    weights, b = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0, 5.0]), torch.tensor([0, 0, 0, 0, 2, 2])
    count = torch.zeros(6)
    for _ in range(4000):
        count[clap.draw_points(weights, b, 1, g)] += 1
    torch.testing.assert_close(count[:4] / 4000, torch.tensor([1, 2, 4, 8]) / 15, atol=0.025, rtol=0)
    assert count[4] == 0 and count[5] == 4000
    rows = clap.draw_points(torch.ones(6), b, 100, g)
    assert sorted(rows.tolist()) == list(range(6))                                      # without replacement


def test_pixel_weights_stay_near_points(batch):
    xyz, b = batch.points[:, :3], batch.b_points
    weights = torch.rand(len(xyz)) + 0.1
    maps = clap.pixel_weights(weights, xyz, b, batch, 9)
    count, H, W = len(batch.images), *batch.images.shape[-2:]
    hit = torch.zeros(count, H, W, dtype=torch.float64)
    matrix = batch.lidar2img.double()
    for i in range(count):                                                              # the same, one image at a time, the largest kept by a loop
        mine = (b == i // batch.cameras).nonzero()[:, 0]
        uvd = xyz[mine].double() @ matrix[i, :3, :3].t() + matrix[i, :3, 3]
        for n, (u, v, d) in zip(mine.tolist(), uvd.tolist()):
            if d > 0.1 and 0 <= u / d < W and 0 <= v / d < H:
                hit[i, int(v / d), int(u / d)] = max(hit[i, int(v / d), int(u / d)], float(weights[n]))
    tap = torch.arange(-4, 5, dtype=torch.float64)
    kernel = torch.exp(-tap ** 2 / (2 * 1.7 ** 2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    expected = F.conv2d(hit[:, None], kernel[None, None], padding=4)[:, 0]
    assert ((maps.double() - expected).abs() < 1e-4).double().mean() > 0.999            # fp32 may floor a point to the next pixel
    assert (maps[F.max_pool2d(hit[:, None].float(), 9, 1, 4)[:, 0] == 0] == 0).float().mean() > 0.999
    assert maps.sum() > 0.9 * hit.sum()                                                 # the rest was blurred over the border
    smaller = batch.hw.clone()
    smaller[1] = torch.tensor([H // 2, W - 30])                                         # padded below and on the right
    padded = clap.pixel_weights(weights, xyz, b, replace(batch, hw=smaller), 9)
    assert padded[1, H // 2:].sum() == padded[1, :, W - 30:].sum() == 0 and padded[1].sum() > 0 and torch.equal(padded[2], maps[2])


def test_pixels_without_weight_are_not_drawn():
    weights = torch.zeros(2, 6, 8)
    weights[0, 3, 4] = 1.0
    image, v, u = clap.draw_pixels(weights, 20, 2, [torch.Generator(), torch.Generator()])
    assert (image.tolist(), v.tolist(), u.tolist()) == ([0], [3], [4])


def test_pixels_are_drawn_by_weight():
    weights, generator = torch.zeros(1, 2, 3), torch.Generator().manual_seed(0)
    weights[0, 0, 1], weights[0, 0, 2], weights[0, 1, 0], weights[0, 1, 2] = 1, 2, 4, 8
    count = torch.zeros(2, 3)
    for _ in range(4000):
        _, v, u = clap.draw_pixels(weights, 1, 1, [generator])
        count[v, u] += 1
    torch.testing.assert_close(count / 4000, weights[0] / 15, atol=0.025, rtol=0)


def test_the_field_is_not_trusted_for_exactly_the_warm_up(three_frames, tmp_path, monkeypatch):
    """--sampler sdf: uniform for uniform_epochs epochs, held-out terms likewise; a step an epoch here."""
    asked, forward = [], clap.CLAP.forward
    for name in ("save_figures", "loss_curves"):
        monkeypatch.setattr(clap, name, lambda *_: None)
    monkeypatch.setattr(clap, "held_out_errors", lambda *_: dict.fromkeys(("range_hidden", "beam_mean", "nearest_ray", "range_visible")))
    monkeypatch.setattr(clap.CLAP, "forward", lambda self, batch, uniform=False: asked.append((self.training, uniform)) or forward(self, batch, uniform))
    clap.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, sampler="sdf", batch=2, steps=3, uniform_epochs=2, eval_every=1))
    assert [uniform for training, uniform in asked if training] == [True, True, False] == [uniform for training, uniform in asked if not training]


def test_a_warm_up_that_never_ends_is_refused(three_frames, tmp_path):
    with pytest.raises(SystemExit, match="--uniform-epochs 2 are 2 steps, the run has 2: the SDF would never"):
        clap.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, sampler="sdf", batch=2, steps=2, uniform_epochs=2))


def test_warm_up_and_ablation_sample_uniformly_below_the_sky(batch, model, monkeypatch):
    asked = []
    monkeypatch.setattr(clap, "SAMPLERS", {k: (lambda *a, k=k, f=f: asked.append(k) or f(*a)) for k, f in clap.SAMPLERS.items()})
    drawn = []
    original = clap.draw_pixels
    monkeypatch.setattr(clap, "draw_pixels", lambda *a: drawn.append(original(*a)) or drawn[-1])
    model.cfg = replace(TINY, sampler="sdf")
    model(batch, uniform=True)
    model(batch)
    model.cfg = replace(TINY, sampler="uniform")
    model(batch)
    assert asked == ["uniform", "sdf", "uniform"]
    assert drawn[0][1].min() >= 0.4 * 48 and drawn[2][1].min() >= 0.4 * 48


# ---- the field, its rendering, the rendering losses ----

def slow_field(field, volume, p, direction):
    """SDF and colour at one point by grid_sample and one layer after the other."""
    where = field.cells.index(p[None].float()).to(p).flip(1) / (torch.tensor(field.cells.shape[::-1]) - 1) * 2 - 1
    f = F.grid_sample(volume, where.view(1, 1, 1, 1, 3), align_corners=True, padding_mode="border").flatten()
    x = field.place(p * field.scale)
    for i, layer in enumerate(field.layers):
        x = layer(x + field.inject.weight[16 * i:16 * i + 16] @ f + field.inject.bias[16 * i:16 * i + 16])
        x = torch.where(x > 0.2, x, torch.log1p(torch.exp(100 * x.clamp(max=0.2))) / 100)      # softplus, beta 100
    out = field.output(x)
    return float(out[0].detach()), field.rgb(torch.cat([f, out[1:], direction]))


def slow_ray(field, volume, origin, direction, far, jitter, u):
    """One ray by the book: scalar loops, the paper's alpha, float64."""
    def at(depth):
        return slow_field(field, volume, origin + direction * depth, direction)

    def weights(s, h):
        passed, w = 1.0, []
        for a, b in zip(s, s[1:]):
            phi = [1 / (1 + math.exp(-h * v)) for v in (a, b)]
            alpha = max((phi[0] - phi[1]) / phi[0], 0)
            w.append(passed * alpha)
            passed *= 1 - alpha
        return w
    S = len(jitter)
    depth = [clap.NEAR + (far - clap.NEAR) * (i + j) / S for i, j in enumerate(jitter.tolist())]
    w = np.array(weights([at(d)[0] for d in depth], 64.0)) + 1e-5
    cdf = np.concatenate([[0], np.cumsum(w / w.sum())])
    depth = sorted(depth + np.interp(u.numpy(), cdf, depth).tolist())
    values = [at(d) for d in depth]
    w = weights([s for s, _ in values], float(torch.exp(10 * field.sharpness)))
    r = sum(w_n * (a + b) / 2 for w_n, a, b in zip(w, depth, depth[1:]))
    c = sum(w_n * (a[1] + b[1]) / 2 for w_n, a, b in zip(w, values, values[1:]))
    return r, c


def test_rendering_is_the_book_s_ray_by_ray(model):
    torch.manual_seed(3)
    field = model.field.double()
    with torch.no_grad():
        field.output.weight[0] *= 20                                                    # a field with surfaces in it
        field.sharpness.fill_(0.4)
    volume = torch.randn(1, 8, *field.cells.shape, dtype=torch.float64)
    table = volume[0].permute(1, 2, 3, 0).reshape(-1, 8)
    away = F.normalize(torch.randn(6, 3, dtype=torch.float64) * torch.tensor([1, 1, 0.05]), dim=1)
    origin, far = torch.rand(6, 3, dtype=torch.float64), torch.full((6,), 24.0, dtype=torch.float64)
    jitter, u = torch.rand(6, 10, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    with torch.no_grad():
        r, c = field.render(table, origin, away, torch.zeros(6, dtype=torch.int64), far, jitter, u, True)
        for i in range(6):
            r_slow, c_slow = slow_ray(field, volume, origin[i], away[i], 24.0, jitter[i], u[i])
            assert float(r[i]) == pytest.approx(float(r_slow), abs=1e-3)
            torch.testing.assert_close(c[i], c_slow, atol=1e-4, rtol=1e-3)
    assert r.max() > 1 and r.std() > 0.1


def test_rays_that_leave_the_box_at_once_are_dropped_and_empty_space_renders_nothing(model, monkeypatch):
    origin, away = torch.tensor([[0.0, 0, 0], [25.3, 0, 0], [30.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]).expand(3, 3)
    monkeypatch.setattr(model.field, "sdf", lambda table, p, b: (torch.ones(len(p)), torch.zeros(len(p), 16), torch.zeros(len(p), 8)))
    r, c, valid = model.render(None, origin, away, torch.zeros(3, dtype=torch.int64), [torch.Generator()], True)
    assert valid.tolist() == [True, False, False] and r.tolist() == [0] and (c == 0).all()


def test_an_oracle_field_renders_its_sphere(model, monkeypatch):
    """Through Field.render, importance samples included: every ray within half a stratum of the truth, and nearer with the finer samples."""
    field, R = model.field, 200
    with torch.no_grad():
        field.sharpness.fill_(math.log(400.0) / 10)
    centre = torch.tensor([12.0, 2.0, 0.0])
    monkeypatch.setattr(field, "sdf", lambda table, p, b: (((p - centre).norm(dim=1) - 4) * field.scale, torch.zeros(len(p), 16), torch.zeros(len(p), 8)))
    g = torch.Generator().manual_seed(0)
    to = F.normalize(centre, dim=0) + torch.randn(R, 3, generator=g) * 0.08
    away = F.normalize(to, dim=1)
    along = away @ centre
    truth = along - (16 - (centre.norm() ** 2 - along ** 2)).clamp_min(0).sqrt()
    hit = centre.norm() ** 2 - along ** 2 < 12
    def render(n, finer, colour):
        noise = torch.rand(R, n, generator=g), torch.rand(R, finer, generator=g)
        return field.render(None, torch.zeros(R, 3), away, torch.zeros(R, dtype=torch.int64), torch.full((R,), 25.0), *noise, colour)

    def error(n, finer):
        return (render(n, finer, False)[0] - truth)[hit].abs()
    assert error(32, 16).max() < 24 / 32 and error(32, 16).mean() < 0.6 * error(32, 1).mean() and hit.sum() > 100
    assert render(32, 16, True)[1].isfinite().all()


def test_rendering_losses_written_out_in_loops(batch, model, monkeypatch):
    seen = {}
    original, originals = clap.draw_pixels, model.render
    monkeypatch.setattr(clap, "draw_pixels", lambda *a: seen.setdefault("pixels", original(*a)))
    def render(table, origin, direction, b, rngs, colour):
        seen["colour" if colour else "range"] = origin, direction, (out := originals(table, origin, direction, b, rngs, colour))
        return out
    monkeypatch.setattr(model, "render", render)
    L, terms = model(batch)
    origin, direction, (r_hat, _, _) = seen["range"]
    key = batch.points[batch.points[:, 4] == 0, :3]
    total = 0.0
    for o, d, r_ in zip(origin, direction, r_hat.tolist()):                             # find each ray's point again: the nearest in direction
        away = key - o
        at = int((F.normalize(away, dim=1) @ d).argmax())
        total += abs(float(away[at].norm()) - r_) / 25.6
    assert float(terms["L_range"]) == pytest.approx(total / len(r_hat), rel=2e-3)
    image, v, u = (part[seen["colour"][2][2]] for part in seen["pixels"])               # of the rays that enter the box
    for i, y, x, o, d in list(zip(*seen["pixels"], *seen["colour"][:2]))[::7]:           # the ray goes through the middle of the pixel it is compared with
        p, q, depth = (batch.lidar2img[i] @ torch.cat([o + 9 * d, torch.ones(1)]))[:3].tolist()
        assert (p / depth, q / depth) == pytest.approx((int(x) + 0.5, int(y) + 0.5), abs=0.02)
    c_hat = seen["colour"][2][1].detach()
    colour = sum(abs(int(batch.images[i, j, y, x]) / 255 - float(c[j])) for i, y, x, c in zip(image, v, u, c_hat) for j in range(3))
    assert float(terms["L_colour"]) == pytest.approx(colour / (3 * len(c_hat)), rel=1e-4)
    proto = 1.0 * float(terms["L_SwAV"]) + 0.1 * float(terms["L_EM"]) + 0.1 * float(terms["L_GMM"])
    rend = float(terms["L_range"]) + 0.05 * float(terms["L_surface"]) + 0.05 * float(terms["L_colour"])
    assert float(L) == pytest.approx(2.0 * rend + 1.0 * proto, rel=1e-5)
    assert len(r_hat) == 2 * 96 and len(image) <= 12 * 24


def slow_targets(batch):
    """Rows of the points that a ray is cast at, by a loop: inside the small grid, of the key sweep, further than 3 m from the LiDAR."""
    found = []
    for i, (x, y, z, _, t) in enumerate(batch.points.tolist()):
        if -25.6 < x < 25.6 and -25.6 < y < 25.6 and -3 < z < 1 and t == 0 and math.dist((x, y, z), batch.origin[batch.b_points[i]].tolist()) > 3:
            found.append(i)
    return torch.tensor(found)


def test_surface_term_is_the_mean_absolute_sdf_at_the_drawn_points(batch, model, monkeypatch):
    drawn, original, tables, encode = [], clap.draw_points, [], model.encode
    monkeypatch.setattr(clap, "draw_points", lambda *a: drawn.append(original(*a)) or drawn[-1])
    monkeypatch.setattr(model, "encode", lambda *a: tables.append(encode(*a)) or tables[-1])
    _, terms = model.eval()(batch)
    values, field = [], model.field
    volume = tables[0][0].view(2, *field.cells.shape, 8).permute(0, 4, 1, 2, 3)
    for i in slow_targets(batch)[drawn[0]]:
        value, _ = slow_field(field, volume[batch.b_points[i]][None], batch.points[i, :3], torch.zeros(3))
        values.append(abs(value))
    assert float(terms["L_surface"]) == pytest.approx(sum(values) / len(values), rel=1e-3)


# ---- what reaches what ----

PARTS = ("lidar", "camera.resnet", "camera.neck", "fuse", "shallow", "field.place", "field.inject", "field.layers", "field.output", "field.rgb", "field.sharpness",
         "proto.head_lidar", "proto.head_image", "proto.K")
ENCODERS = {"lidar", "camera.resnet", "camera.neck", "fuse", "shallow"}
SDF = {"field.place", "field.inject", "field.layers", "field.output"}
REACH = {"L_range": ENCODERS | SDF | {"field.sharpness"}, "L_surface": ENCODERS | SDF, "L_colour": ENCODERS | SDF | {"field.rgb", "field.sharpness"},
         "L_SwAV": {"lidar", "camera.resnet", "camera.neck", "proto.head_lidar", "proto.head_image", "proto.K"},
         "L_EM": {"lidar", "camera.resnet", "camera.neck", "proto.head_lidar", "proto.head_image", "proto.K"}, "L_GMM": {"proto.K"}}


@pytest.mark.parametrize("term", REACH)
def test_each_term_reaches_just_its_modules(batch, model, term):
    _, terms = model(batch)
    terms[term].backward()
    reached = {part for part in PARTS for name, p in model.named_parameters() if name.startswith(part) and p.grad is not None and p.grad.abs().max() > 0}
    assert reached == REACH[term]


def test_every_parameter_gets_gradient(batch, model):
    model(batch)[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    assert all(any(name.startswith(part) for part in PARTS) for name, _ in model.named_parameters())


def test_without_prototypes_only_rendering_is_left(batch):
    torch.manual_seed(0)
    model = clap.CLAP(replace(TINY, without="prototypes"), data.GRIDS["nuscenes", "small"])
    L, terms = model(batch)
    assert float(L) == pytest.approx(2 * float(terms["L_rend"])) and "L_SwAV" not in terms and not any("proto" in n for n, _ in model.named_parameters())
    L.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_hidden_stays_hidden(batch, model):
    """Nothing of a hidden point or pixel enters the volume; most is hidden; blocks are 8 voxels wide."""
    model.eval()
    masked = clap.mask_points(batch.points, batch.b_points, 2, model.lidar, 0.9, clap.frame_rngs(batch.seeds, CPU))
    masked_px = clap.mask_pixels(batch.images, batch.cameras, 0.3, clap.frame_rngs(batch.seeds, CPU))
    before = model.encode(batch, masked, masked_px)[0]
    points, images = batch.points.clone(), batch.images.clone()
    points[masked, :4] = points[masked, :4].flip(0)
    images.permute(0, 2, 3, 1)[masked_px] = 255 - images.permute(0, 2, 3, 1)[masked_px]
    assert torch.equal(before, model.encode(replace(batch, points=points, images=images), masked, masked_px)[0])
    assert not torch.equal(before, model.encode(replace(batch, points=batch.points * 0.9), masked, masked_px)[0])
    inside = ((batch.points[:, :3].abs() < torch.tensor([25.6, 25.6, 1.0])).all(1)) & (batch.points[:, 2] > -3)
    block = torch.cat([batch.b_points[inside, None], ((batch.points[inside, :3] + torch.tensor([25.6, 25.6, 3.0])) / torch.tensor([0.8, 0.8, 1.0])).long()], 1)
    _, which = block.unique(dim=0, return_inverse=True)
    assert 0.85 < masked[inside].float().mean() < 0.95 and 0.15 < masked_px.float().mean() < 0.45
    assert all(len(masked[inside][which == i].unique()) == 1 for i in range(int(which.max()) + 1))
    patches = masked_px[:, :32].unflatten(2, (4, 32))                                   # of 48 x 128 pixels: a whole row of patches and half a row
    assert (patches.flatten(3).any(3) == patches.flatten(3).all(3)).all() and torch.equal(patches.all(3).all(1), patches[:, 0, :, 0])
    assert (patches[:, 0, 1:, 0] != patches[:, 0, :-1, 0]).any() and (masked_px[:, 32] != masked_px[:, 31]).any()


def test_prototypes_meet_cells_that_hold_a_point_and_that_a_camera_sees(batch, model):
    g, cells = clap.frame_rngs(batch.seeds, CPU), model.lidar.cells[-1]
    none = torch.zeros(len(batch.points), dtype=torch.bool)
    _, lidar, _, seen = model.encode(batch, none, torch.zeros(len(batch.images), 48, 128, dtype=torch.bool))
    cell = model.shared_cells(lidar, seen, batch.points, batch.b_points, g)
    found = set(map(tuple, lidar.coords[cell].tolist()))
    expected = set()
    for b, (x, y, z) in zip(batch.b_points.tolist(), batch.points[:, :3].tolist()):
        if -25.6 <= x < 25.6 and -25.6 <= y < 25.6 and -3 <= z < 1:
            at = [min(max(round((v - f) / s), 0), n - 1) for v, f, s, n in zip((z, y, x), cells.first[::-1], cells.step[::-1], cells.shape)]
            if seen[b, at[0], at[1], at[2]]:
                expected.add((b, *at))
    assert len(found ^ expected) <= 0.01 * len(expected) and len(cell) == len(found) and 100 < len(found) < 0.6 * len(lidar.coords)    # fp32 at faces
    assert torch.bincount(lidar.coords[model.shared_cells(lidar, seen, batch.points, batch.b_points, g, most=7), 0]).tolist() == [7, 7]


def test_targets_and_sampling(batch, model):
    assert torch.equal(model.targets(batch)[0], slow_targets(batch))
    table = torch.randn(2 * math.prod(model.lidar.cells[-1].shape), 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = model.targets(batch)[0]
    mine = batch.b_points[rows] == 1
    for sampler in clap.SAMPLERS:
        given = batch if sampler == "pca" else replace(batch, extra={})
        omega = model.weights(table, given, rows, sampler)
        assert not omega.requires_grad and omega.isfinite().all() and (omega > 0).all(), sampler
        assert (omega.std() > 1e-3 * omega.mean()) == (sampler != "uniform")
        torch.testing.assert_close(model.weights(table, given, rows[mine], sampler), omega[mine])           # whatever its neighbours are
        other = model.weights(table, replace(given, b_points=1 - batch.b_points), rows, sampler)             # the sdf's volume is the frame's own
        assert torch.allclose(other, omega) == (sampler != "sdf"), sampler


def test_settings_of_the_field_and_the_prototypes(batch, model, monkeypatch):
    """h begins at e^3; prototypes as normal numbers, since L_EM is inert with short ones; the SDF's differences are half a cell wide."""
    assert float(model.field.h) == pytest.approx(math.exp(3))
    assert float(clap.Prototypes(replace(TINY, prototypes=64), 4, 4).K.norm(dim=1).mean()) == pytest.approx(math.sqrt(16), rel=0.1)
    steps = []
    monkeypatch.setitem(clap.SAMPLERS, "sdf", lambda xyz, b, pca, sdf, step: steps.append(step) or xyz[:, 0].abs())
    model.weights(None, batch, model.targets(batch)[0], "sdf")
    assert steps == pytest.approx([0.4])                                                # m: a cell is 8 voxels of 0.1


def test_forward_hides_draws_by_curvature_and_pairs_what_stayed_visible(batch, model, monkeypatch):
    """What the pieces are given, against slow or independent values: masks, weights, the rays' origins, cells and their pairing."""
    points, calls = batch.points, {}
    batch = replace(batch, origin=torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 0.0]]))

    def spy(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: calls.setdefault(name, []).append((a, out := original(*a, **k))) or out)
    for owner, name in ((model, "encode"), (model, "render"), (model.proto, "forward"), (clap, "draw_points"), (clap, "draw_pixels")):
        spy(owner, name)
    model(batch)
    (_, masked, masked_px), (_, lidar, image, seen) = calls["encode"][0]
    assert all(torch.equal(a, b) for a, b in zip((masked, masked_px), model.draw_masks(batch, clap.frame_rngs(batch.seeds, CPU))))
    rows = slow_targets(batch)
    b, omega = batch.b_points[rows], batch.extra["points_curvature"][rows]
    omega = torch.cat([clap.clean_weights(omega[b == frame]) for frame in range(2)])
    assert torch.equal(calls["draw_points"][0][0][0], omega) and omega.std() > 0
    assert torch.equal(calls["draw_pixels"][0][0][0], clap.pixel_weights(omega, points[rows, :3], b, batch, 9))
    drawn, (_, origin, direction, *_) = rows[calls["draw_points"][0][1]], calls["render"][0][0]
    assert torch.equal(origin, batch.origin[batch.b_points[drawn]])
    torch.testing.assert_close(direction, F.normalize(points[drawn, :3] - origin, dim=1))

    shown = ~masked & model.lidar.inside(points)
    zyx = lidar.cells.index(points[shown, :3])
    zyx = torch.stack([zyx[:, axis].round().clamp(0, n - 1) for axis, n in enumerate(lidar.cells.shape)], 1).long()
    held = torch.cat([batch.b_points[shown, None], zyx], 1).unique(dim=0)
    held = tuple(held[seen[tuple(held.t())]].t())
    expected = torch.cat([volume.permute(0, 2, 3, 4, 1)[held] for volume in (lidar.dense(2), image)], 1)     # a cell's two halves side by side
    given = torch.cat(calls["forward"][0][0], 1)
    assert len(given) == len(expected) > 30
    assert sorted(map(tuple, given.tolist())) == sorted(map(tuple, expected.tolist()))


def test_sdf_curvature_through_the_trilinear_volume():
    """An exact sphere SDF stored at the cells and interpolated as the field does: within a few per cent of sqrt(2) / R on even cells."""
    cells = VoxelResNet((-8, -8, -8), (8, 8, 8), (0.075, 0.075, 0.075), 2).cells[-1]
    R = 3.0
    table = (cells.centres(CPU).norm(dim=1) - R)[:, None]

    def sdf(p, b):
        flat, weight = clap.multilinear(cells.index(p), cells.shape)
        return clap.gather_weighted(table, flat, weight)[:, 0]
    p = F.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1) * R
    omega = clap.sdf_curvature(p, torch.zeros(500, dtype=torch.int64), None, sdf, cells.step[0] / 2)
    assert abs(float(omega.mean()) / (math.sqrt(2) / R) - 1) < 0.02 and omega.std() < 0.02


def test_range_targets_start_at_the_lidar(batch, model):
    moved = replace(batch, origin=torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]]))
    rows, direction, r = model.targets(moved)
    torch.testing.assert_close(moved.origin[batch.b_points[rows]] + direction * r[:, None], batch.points[rows, :3], atol=1e-4, rtol=1e-4)
    assert (r > 3).all() and (batch.points[rows, 4] == 0).all()


# ---- bad frames ----

@pytest.mark.parametrize("trouble", ["one empty cloud", "no points at all", "no camera sees", "no valid ray", "one prototype takes all", "single point"])
def test_bad_frames_give_a_finite_loss_and_gradient(batch, model, trouble):
    bad = batch
    if trouble == "one empty cloud":
        keep = batch.b_points == 0
        bad = replace(batch, points=batch.points[keep], b_points=batch.b_points[keep], extra={"points_curvature": batch.extra["points_curvature"][keep]})
    if trouble in ("no points at all", "single point"):
        n = trouble == "single point"
        bad = replace(batch, points=batch.points[:n], b_points=batch.b_points[:n], extra={"points_curvature": batch.extra["points_curvature"][:n]})
    if trouble == "no camera sees":
        bad = replace(batch, lidar2img=torch.diag(torch.tensor([1.0, 1.0, 1e-9, 1.0])).expand_as(batch.lidar2img) + 0)
    if trouble == "no valid ray":
        points = batch.points.clone()
        points[:, :3] *= 100
        bad = replace(batch, points=points)
    if trouble == "one prototype takes all":
        with torch.no_grad():
            model.proto.K.zero_()[3] = 50.0
    for sampler in ("pca", "sdf"):
        model.cfg = replace(TINY, sampler=sampler)
        model.zero_grad()
        L, terms = model(bad)
        L.backward()
        assert L.isfinite() and all(math.isfinite(float(v)) for v in terms.values()), (trouble, terms)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- learning and runs ----

@pytest.mark.slow
def test_one_frame_can_be_learned(batch, model):
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = None
    for _ in range(25):
        L, terms = model(batch)
        opt.zero_grad()
        L.backward()
        opt.step()
        first = first or {k: float(v) for k, v in terms.items()}
    assert float(terms["L_range"]) < 0.4 * first["L_range"]
    assert float(terms["L_SwAV"]) < first["L_SwAV"]


def run(world, out, *more, wait=True):
    command = [sys.executable, str(ROOT / "clap.py"), "--data", str(world), "--preset", "small", "--out", str(out), "--steps", "4", "--save-every", "1",
               "--eval-every", "2", "--batch", "1",
               "--rays", "64", "--pixels", "16", "--samples", "8", "--importance-samples", "4", "--width", "4", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if wait:
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=out.parent)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=out.parent)


def test_held_out_errors_written_out(batch, model, monkeypatch):
    """A volume that renders 7 m everywhere, 9 with the other frame's cloud; grey 7 / 20, with every pixel hidden 5 / 20. Slow loops."""
    asked = model.draw_masks(batch, clap.frame_rngs(batch.seeds, CPU))

    def encode(x, masked, masked_px):
        assert torch.equal(masked, asked[0]) and (masked_px.all() or torch.equal(masked_px, asked[1]))
        return (torch.tensor(9.0 if not torch.equal(x.b_points, batch.b_points) else 5.0 if masked_px.all() else 7.0),)

    def render(table, origin, direction, b, rngs, colour):
        return table.expand(len(b)), (table / 20).expand(len(b), 3), torch.ones(len(b), dtype=torch.bool)
    drawn, original = [], clap.draw_pixels
    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model, "render", render)
    monkeypatch.setattr(clap, "draw_pixels", lambda *a: drawn.append(original(*a)) or drawn[-1])
    found = clap.held_out_errors(model, [batch], CPU)
    masked = model.draw_masks(batch, clap.frame_rngs(batch.seeds, CPU))[0]
    targets = []                                                                        # frame, direction, range, hidden
    for n, (x, y, z, _, age) in enumerate(batch.points.double().tolist()):
        r = math.sqrt(x * x + y * y + z * z)
        if r > 3 and age == 0 and -25.6 <= x < 25.6 and -25.6 <= y < 25.6 and -3 <= z < 1:
            targets.append((int(batch.b_points[n]), np.array([x, y, z]) / r, r, bool(masked[n])))
    beams, near = {}, []
    for _, ray, r, _ in targets:
        beams.setdefault(round(2 * math.degrees(math.asin(ray[2]))), []).append(r)
    for frame in range(2):
        shown = np.array([[*other, r_] for b, other, r_, hid in targets if b == frame and not hid])
        near += [abs(r - shown[(shown[:, :3] @ ray).argmax(), 3]) for b, ray, r, hid in targets if b == frame and hid]
    image, v, u = drawn[0]
    c = batch.images[image, :, v, u].double() / 255
    expected = dict(range_hidden=np.mean([abs(r - 7) for *_, r, hid in targets if hid]), range_visible=np.mean([abs(r - 7) for *_, r, hid in targets if not hid]),
                    beam_mean=np.mean([abs(r - np.mean(beams[round(2 * math.degrees(math.asin(ray[2])))])) for _, ray, r, hid in targets if hid]),
                    nearest_ray=np.mean(near), range_all=np.mean([abs(r - 7) for *_, r, _ in targets]), range_swapped=np.mean([abs(r - 9) for *_, r, _ in targets]),
                    colour=float((c - 0.35).abs().mean()), colour_blind=float((c - 0.25).abs().mean()), colour_mean=float((c - c.mean(0)).abs().mean()))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name


def test_a_run_leaves_what_it_should(three_frames, tmp_path):
    whole = run(three_frames, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "held-out range error" in whole.stdout.splitlines()[-1]
    for name in ("config.json", "provenance.json", "log.jsonl", "last.pt", "previous.pt", "backbones.safetensors", "metrics.json", "source/clap.py",
                 "figures/rendered.png", "figures/samples.png", "figures/sampled_pixels.png", "figures/prototypes.png", "figures/losses.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0, name
    last = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)

    from safetensors import safe_open
    with safe_open(tmp_path / "whole" / "backbones.safetensors", "pt") as stored:
        assert {k.split(".")[0] for k in stored.keys()} == {"lidar", "camera", "fuse"} and stored.metadata()["units"] == "lidar,camera.resnet,camera.neck,fuse"
        assert json.loads(stored.metadata()["config"])["width"] == 4
        assert torch.equal(stored.get_tensor("camera.resnet.conv1.weight"), last["model"]["camera.resnet.conv1.weight"])
        assert json.loads(stored.metadata()["grid"])["voxel"] == [0.1, 0.1, 0.125]
    assert all(v is not None for k, v in json.loads((tmp_path / "whole" / "metrics.json").read_text()).items() if k not in ("range_swapped", "range_all"))


@pytest.mark.parametrize("flags, told", [(dict(epochs=2), "one of them must be 0"), (dict(blur=8), "odd"), (dict(prototypes=1), "at least 2"),
                                         (dict(eval_every=0), "start at 1"), (dict(mask_points=90), "shares"), (dict(sky=-0.1), "shares"), (dict(rays=0), "start at 1"),
                                         (dict(samples=1), "at 2"), (dict(tau=0.0), "positive"), (dict(neighbours=3), "plane")])
def test_contradictory_flags_are_refused_before_anything_is_written(tmp_path, flags, told):
    with pytest.raises(SystemExit, match=told):
        clap.train(0, 1, replace(TINY, out=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_help_has_names_values_and_sources():
    shown = subprocess.run([sys.executable, str(ROOT / "clap.py"), "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, cwd=ROOT)
    assert shown.returncode == 0
    for words in ("8192", "N_L", "[paper]", "--sampler {pca,sdf,uniform}", "omega_GMM", "[code SwAV]"):
        assert words in shown.stdout, words


def sinkhorn_and_means(rank):
    torch.manual_seed(0)
    S, x = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, dtype=torch.float64, requires_grad=True)
    mine = slice(0, 11) if rank == 0 else slice(11, 30)
    Q = clap.sinkhorn(S[mine], 0.05, 3)
    mean = clap.mean_over_ranks(x[mine].square().sum(), len(x[mine]))
    mean.backward()
    empty = clap.mean_over_ranks(x[:0].sum() if rank else x.sum(), 0 if rank else 30)
    return Q, x.grad / 2, mean.detach() / 2, empty.detach() / 2                                         # DDP's average over two processes


def test_two_processes_give_sinkhorn_and_means_of_one(server, tmp_path):
    torch.manual_seed(0)
    S, x = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, dtype=torch.float64, requires_grad=True)
    x.square().mean().backward()
    parts = on_two(server, sinkhorn_and_means, tmp_path)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), clap.sinkhorn(S, 0.05, 3))
    torch.testing.assert_close(parts[0][1] + parts[1][1], x.grad)
    torch.testing.assert_close(parts[0][2] + parts[1][2], x.detach().square().mean())
    torch.testing.assert_close(parts[0][3] + parts[1][3], x.detach().mean())


def a_frame_each(rank, cases):
    """The whole method on two processes, a frame each, through DDP: loss, terms, gradients."""
    results = []
    for model, batches in cases:
        net = wrap(model, CPU, 2)
        loss, terms = net(batches[rank])
        loss.backward()
        results.append((loss.detach(), {k: torch.as_tensor(v).detach() for k, v in terms.items()}, {k: p.grad for k, p in model.named_parameters()}))
    return results


def test_two_processes_give_the_loss_and_gradient_of_one(server, batch, model, tmp_path):
    """Batch norm in eval mode; in the second case one frame has no point, in the third batch norm trains and must not hang on such a frame."""
    model.eval()
    empty = replace(batch, points=batch.points[batch.b_points == 0], b_points=batch.b_points[batch.b_points == 0],
                    extra={k: v[batch.b_points == 0] for k, v in batch.extra.items()})

    def halves(whole):
        parts = []
        for b in range(2):
            points, pictures, boxes = whole.b_points == b, slice(b * whole.cameras, (b + 1) * whole.cameras), whole.b_boxes == b
            parts.append(replace(whole, points=whole.points[points], b_points=whole.b_points[points] * 0, origin=whole.origin[b:b + 1], images=whole.images[pictures],
                                 hw=whole.hw[pictures], lidar2img=whole.lidar2img[pictures], boxes=whole.boxes[boxes], b_boxes=whole.b_boxes[boxes] * 0,
                                 labels=whole.labels[boxes], extra={k: v[points] for k, v in whole.extra.items()}, names=whole.names[b:b + 1],
                                 seeds=whole.seeds[b:b + 1], size=1))
        return parts
    training = copy.deepcopy(model).train()
    cases = [(copy.deepcopy(model), halves(batch)), (copy.deepcopy(model), halves(empty)), (training, halves(empty))]
    parts = on_two(server, a_frame_each, tmp_path, cases)
    monitors = {"h", "cells", "perplexity_P", "perplexity_I", "perplexity_Q", "agreement", "prototype_norm", "on_ground", "on_boxes"}
    for whole, *two in zip((batch, empty), *(part[:2] for part in parts), strict=True):
        one = copy.deepcopy(model)
        loss, terms = one(whole)
        loss.backward()
        torch.testing.assert_close((two[0][0] + two[1][0]) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
        for name in terms.keys() - monitors:                                        # no term of CLAP has local negatives
            assert name.startswith("L_")
            torch.testing.assert_close((two[0][1][name] + two[1][1][name]) / 2, terms[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
        for name, p in one.named_parameters():
            torch.testing.assert_close(two[0][2][name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-9, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(two[0][2][name], two[1][2][name]), name
    assert all(part[2][0].isfinite() and all(g.isfinite().all() for g in part[2][2].values()) for part in parts)


# ---- runs that are stopped ----

def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def ranks_of(launcher):
    """{RANK: pid} of the processes that a launcher has started."""
    return {dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair).get("RANK"): pid for pid in children(launcher)}


def begun(world, out, *more):
    """A run that has finished at least one step, and its output so far."""
    command = [sys.executable, str(ROOT / "clap.py"), "--data", str(world), "--preset", "small", "--out", str(out), "--width", "4", "--rays", "64", "--pixels", "16",
               "--eval-every", "1000", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step "):
            return process, said
    pytest.fail(said)


def test_a_dead_process_ends_the_job_and_is_named(world, tmp_path):
    process, _ = begun(world, tmp_path / "run", "--gpus", "2", "--batch", "1", "--steps", "500")
    os.kill(ranks_of(process.pid)["1"], signal.SIGKILL)
    died = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert time.monotonic() - died < 30 and process.returncode == 1
    assert rest.splitlines()[-1] == "rank 1 of 2 was killed by signal 9; the others were stopped. The same command goes on from the last checkpoint."


def test_a_process_that_fails_is_named_with_its_error(world, tmp_path):
    folder = Path(tmp_path / "cut")
    shutil.copytree(world, folder)
    for file in (folder / "samples/LIDAR_TOP").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    failed = run(folder, tmp_path / "run", "--gpus", "2", "--batch", "1")
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1 and re.match(r"rank [01] of 2 left with exit code 1 \(DataError: nuscenes/.*truncated.*\); the others were stopped", last), last


@pytest.mark.slow
def test_two_processes_stopped_by_sigterm_end_as_if_nothing_had_happened(three_frames, tmp_path):
    two = "--gpus", "2", "--batch", "1", "--steps", "3"
    both = run(three_frames, tmp_path / "whole", *two)
    assert both.returncode == 0, both.stderr[-3000:]
    assert "2 CPU processes over gloo" in both.stdout and "of 2 frames (1 x 2)" in both.stdout and "held-out range error" in both.stdout.splitlines()[-1]
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())
    with pytest.raises(SystemExit, match="world was 2, is 1"):
        clap.train(0, 1, clap.Config(**{k: v for k, v in stored.items() if k != "world"}))
    stopped = run(three_frames, tmp_path / "stopped", *two, wait=False)
    deadline = time.monotonic() + 100
    while not (tmp_path / "stopped" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == 143                                              # the launcher's status
    assert 1 <= torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)["step"] < 3
    again = run(three_frames, tmp_path / "stopped", *two)
    assert again.returncode == 0, again.stderr[-3000:]
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "stopped" / "log.jsonl").read_text()


def test_sigterm_to_everybody_still_saves(world, tmp_path):
    process, _ = begun(world, tmp_path / "run", "--workers", "2", "--steps", "500")
    workers = children(process.pid)
    assert len(workers) >= 2
    for pid in (*workers, process.pid):                                             # as a scheduler does, in no order that we could count on
        os.kill(pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on from there" in rest, rest
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 1


def test_profile_tells_where_a_step_goes_and_writes_nothing(three_frames, tmp_path, capsys):
    threads = torch.get_num_threads()
    clap.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), gpus=0, batch=1, profile=2))
    said = capsys.readouterr().out
    parts = {line[:18].strip(): line[18:].split() for line in said.splitlines() if " ms a step" in line}
    assert list(parts) == ["wait for data", "transfer", "lidar", "camera", "render", "rest of forward", "backward", "optimiser", "in all"]
    times = {name: float(words[0]) for name, words in parts.items()}
    assert sum(times.values()) - times["in all"] == pytest.approx(times["in all"], abs=1) and times["backward"] > 0 < times["lidar"]
    assert f"2 steps of 1 frames, small size, cpu, {threads} threads" in said and "GFLOP a step" in said and "28130 training frames of nuscenes" in said
    assert not (tmp_path / "run").exists()
