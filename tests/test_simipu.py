"""simipu.py: geometry, samplings, matching and losses against slow transcriptions and closed
forms; which loss trains which part; the script as it is run.

Next to the paper read test_both_losses_match_plain_loops: Eq. 1 and 3 to 8 in loops. F_P of
Eq. 2 is the model's own there; its parts are in the tests of sampling and neighbours.
"""
import copy
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from torchvision.models import resnet18

import common
import data
import finetune
import simipu
from conftest import ROOT, Waits, run
from simipu import (
    SMALL,
    Config,
    SimIPU,
    TwoViews,
    ball_query,
    farthest_features,
    farthest_points,
    greedy_pairs,
    per_frame,
    random_transform,
    transform_points,
)

GRID = data.GRIDS["nuscenes", "small"]
FLAGS = dict(SMALL, points=256, width=4, zoom_low=0.515, zoom_high=1.92)
TINY = Config(preset="small", **FLAGS)
VIEWS = TwoViews(GRID, TINY.points, TINY.rotation, TINY.scale, (0.6, 1.2))


@pytest.fixture(scope="module")
def batch(world):
    loader = data.loader(str(world), "train", 2, preset="small", image=(48, 128), augment=VIEWS)
    return next(loader.begin_at(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SimIPU(TINY)


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    return rng.uniform((-20, -20, -2), (20, 20, 2), (400, 3)).astype(np.float32)


def greedy_loop(rows, count):
    """From row 0 on, always the row farthest from those chosen, in float64."""
    rows = np.asarray(rows, np.float64)
    chosen = [0]
    while len(chosen) < count:
        nearest = cdist(rows[chosen], rows).min(0)
        chosen.append(int(nearest.argmax()))
    return chosen


# ---- geometry ------------------------------------------------------------------------

def test_T_turns_about_the_centre_then_scales_about_the_origin_then_mirrors(cloud):
    centre = np.array([35.2, 0, -1])
    sides = set()
    for seed in range(20):
        T, mirrored = random_transform(np.random.default_rng(seed), centre, 1.5708, 0.25)
        again = np.random.default_rng(seed)
        angle = again.uniform(-1.5708, 1.5708)
        scale = again.uniform(0.75, 1.25)
        cos, sin = math.cos(angle), math.sin(angle)
        side = -1 if mirrored else 1
        expected = np.empty((len(cloud), 3))
        for n, (x, y, z) in enumerate(cloud - centre):
            turned = np.array([cos * x - sin * y, sin * x + cos * y, z]) + centre
            expected[n] = scale * turned * [1, side, 1]
        moved = cloud @ T[:3, :3].T + T[:3, 3]
        np.testing.assert_allclose(moved, expected, atol=1e-9)
        assert np.linalg.det(T[:3, :3]) == pytest.approx(side * scale ** 3)
        inverse = np.linalg.inv(T)
        back = moved @ inverse[:3, :3].T + inverse[:3, 3]
        np.testing.assert_allclose(back, cloud, atol=1e-4)
        sides.add(mirrored)
    assert sides == {True, False}


def test_resized_and_mirrored_images_keep_their_points(world):
    """A point's pixel in a changed image is its pixel in the original, changed likewise."""
    frame = data.open_dataset(world, "small").load(0)
    xyz1 = np.concatenate([frame.points[:, :3], np.ones((len(frame.points), 1))], 1)
    ramp = np.tile(np.arange(256, dtype=np.uint8), (96, 1))
    frame = replace(frame, images=[np.stack([ramp, ramp, ramp])] * 6)
    for factor, mirrored in ((1.4, False), (0.55, True), (1.0, True)):
        H, W = round(96 * factor), round(256 * factor)
        other = data.crop_images(frame, [(0, 0, 96, 256)] * 6, [(H, W)] * 6, [mirrored] * 6)
        assert all(image.shape == (3, H, W) for image in other.images)
        for before, after in zip(frame.lidar2img, other.lidar2img):
            u, v, d = (xyz1 @ before.T)[:, :3].T
            u_after, v_after, d_after = (xyz1 @ after.T)[:, :3].T
            front = d > 1
            np.testing.assert_allclose(d_after, d, rtol=1e-5, atol=1e-4)
            column = (u / d * W / 256)[front]
            row = (v / d * H / 96)[front]
            if mirrored:
                column = W - column
            np.testing.assert_allclose((u_after / d_after)[front], column, rtol=1e-3, atol=0.05)
            np.testing.assert_allclose((v_after / d_after)[front], row, rtol=1e-3, atol=0.05)
        # the ramp shows which column of the original each column came from
        columns = other.images[0][0, 10].astype(float)
        source = (np.arange(W) + 0.5) * 256 / W - 0.5
        if mirrored:
            source = source[::-1]
        np.testing.assert_allclose(columns[4:-4], source[4:-4], atol=1.0)


def test_C5_is_read_at_each_point_s_pixel_in_images_of_mixed_sizes(world, model, monkeypatch):
    """A feature map that shows its own coordinates gives each point its pixel, except in the
    outer half cell, where the value of the border holds.
    """
    wide = replace(VIEWS, zoom=(TINY.zoom_low, TINY.zoom_high))
    dataset = data.open_dataset(world, "small")
    frames = [wide(dataset.load(i), np.random.default_rng(seed))
              for i, seed in ((0, 1), (1, 2), (3, 3))]
    assert len({frame.images[0].shape for frame in frames}) == 3
    mixed = data.collate(frames, [0, 1, 2])

    def own_coordinates(images, masked):
        count, _, H, W = images.shape
        assert H % 32 == W % 32 == 0
        for padding, (h, w) in zip(masked, mixed.hw.tolist()):      # masked: the mean colour
            assert not padding[:h, :w].any() and padding.sum() == H * W - h * w
        v, u = torch.meshgrid(torch.arange(H // 32) * 32. + 16, torch.arange(W // 32) * 32. + 16,
                              indexing="ij")
        return [torch.stack([u, v]).expand(count, 2, -1, -1)]

    monkeypatch.setattr(model.camera, "stages", own_coordinates)
    c5, size = model.image_features(mixed.images, mixed.hw)
    l = mixed.points.view(3, -1, 5)[..., :3]
    point, image, uv = model.in_images(l, mixed)
    sampled = common.sample_image(c5, image, uv, size)
    inner = ((uv > 16) & (uv < torch.tensor(size[::-1]) - 16)).all(1)
    torch.testing.assert_close(sampled[inner], uv[inner], atol=1e-3, rtol=0)
    assert inner.sum() > 100
    assert (image // 6 == point // l.shape[1]).all()
    assert len(point.unique()) == len(point)
    height, width = mixed.hw[image].unbind(1)
    assert ((uv >= 0).all(1) & (uv[:, 0] < width) & (uv[:, 1] < height)).all()
    # near the right edge of a smaller image: the released code errs there
    assert ((uv[:, 0] > width - 16) & inner).any()


def test_only_alpha_is_projected(batch, model):
    model.eval()
    still = replace(batch, extra={**batch.extra, "a2b": torch.eye(4).repeat(2, 1)})
    assert not torch.equal(batch.extra["a2b"], still.extra["a2b"])
    with torch.no_grad():
        moved_terms = model(batch)[1]
        still_terms = model(still)[1]
    assert moved_terms["L_inter"] == still_terms["L_inter"]
    assert moved_terms["L_intra"] != still_terms["L_intra"]


# ---- sampling and neighbours ---------------------------------------------------------

def test_farthest_points_match_a_greedy_loop_and_ignore_T(cloud):
    chosen = greedy_loop(cloud, 60)
    assert farthest_points(cloud, 60).tolist() == chosen
    assert farthest_points(cloud, 120)[:60].tolist() == chosen
    T, _ = random_transform(np.random.default_rng(3), np.zeros(3), 1.5, 0.25)
    assert farthest_points(cloud @ T[:3, :3].T + T[:3, 3], 60).tolist() == chosen
    # PointEncoder counts on this
    longer = cloud[farthest_points(cloud, 120)]
    assert farthest_points(longer, 60).tolist() == list(range(60))
    gaps = []
    for k in range(2, 60):
        between = cdist(cloud[chosen[:k]], cloud[chosen[:k]])
        gaps.append(between[np.triu_indices(k, 1)].min())
    assert all(a >= b for a, b in zip(gaps, gaps[1:]))
    # equal distances and equal places: the first row of them
    lattice = np.random.default_rng(1).integers(0, 6, (300, 3)).astype(np.float32)
    assert len(np.unique(lattice, axis=0)) < 220
    assert farthest_points(lattice, 300).tolist() == greedy_loop(lattice, 300)


def test_farthest_features_match_a_greedy_loop_in_joined_space(cloud):
    features = np.random.default_rng(1).normal(0, 5, (200, 8))
    x = np.concatenate([cloud[:200], features], 1)
    both = torch.tensor(np.stack([x, x[::-1]]), dtype=torch.float32)
    for rows, chosen in zip(both.numpy(), farthest_features(both, 50).tolist()):
        assert chosen == greedy_loop(rows, 50)
    T, _ = random_transform(np.random.default_rng(3), np.zeros(3), 1.5, 0.)
    turn = torch.tensor(T[:3, :3], dtype=torch.float32)
    turned = torch.cat([both[..., :3] @ turn.t(), both[..., 3:]], 2)
    assert torch.equal(farthest_features(turned, 50), farthest_features(both, 50))
    larger = torch.cat([both[..., :3] * 3, both[..., 3:]], 2)
    assert not torch.equal(farthest_features(larger, 50), farthest_features(both, 50))


KERNEL = """
import torch
import simipu
torch.manual_seed(0)
for B, n, count in ((2, 32, 32), (2, 50, 20), (1, 5, 3)):
    features = torch.randn(B, n, 9)
    whole = torch.randint(0, 3, (B, n, 3)).float()          # many equal distances
    for x in (features, whole, features * torch.nan):
        # below 0, as rounding makes the smallest
        distance = (x[:, :, None] - x[:, None]).square().sum(3) - 2
        chosen = simipu.farthest_by_kernel(distance, count)
        if x.isfinite().all():
            assert torch.equal(chosen, simipu.farthest_by_rounds(distance, count)), (n, count)
        assert chosen.amin() >= 0 and chosen.amax() < n     # or a GPU would read elsewhere
assert simipu.kernel_works(torch.device("cpu"))
"""


def test_the_kernel_chooses_as_the_rounds_do():
    """In Triton's own interpreter, which needs no GPU. On one: python -m pytest -m cuda."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, "-c", KERNEL], cwd=ROOT, env=environment,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize("case", ["fails", "errs", "is right"])
def test_a_kernel_that_fails_or_errs_is_not_used(case, monkeypatch, capsys):
    def kernel(distance, count):
        if case == "fails":
            raise RuntimeError("Failed to find C compiler")
        chosen = simipu.farthest_by_rounds(distance, count).clone()
        chosen[1, 19] += case == "errs"
        return chosen

    monkeypatch.setattr(simipu, "farthest_by_kernel", kernel)
    works = simipu.kernel_works.__wrapped__(torch.device("cpu"))
    printed = capsys.readouterr().out
    assert works == (case == "is right") == (not printed)
    if case == "fails":
        assert "Failed to find C compiler" in printed


def test_ball_query_takes_the_first_of_each_shell_in_order(cloud):
    sources = torch.tensor(np.stack([cloud[:300] / 4, cloud[100:] / 4 + 40]))
    sources[:, 7] = sources[:, 5]                           # the same place twice
    rows = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(i))[:60]
                        for i in range(2)])
    centres = sources.gather(1, rows[..., None].expand(-1, -1, 3))
    radii = (0.7, 1.4, 2.8)
    most = (3, 8, 20)
    full = 0
    shells = ball_query(centres, sources, radii, most)
    for inner, outer, count, neighbours in zip((0., *radii), radii, most, shells):
        for b, m in itertools.product(range(2), range(60)):
            hits = []
            for i, place in enumerate(sources[b]):
                d = float((place - centres[b, m]).square().sum()) ** 0.5
                if (inner <= d < outer or d == 0) and len(hits) < count:
                    hits.append(i)
            full += len(hits) == count
            padded = hits + hits[:1] * (count - len(hits))
            assert neighbours[b * 60 + m].tolist() == [b * 300 + i for i in padded]
    assert full > 20


def test_set_abstraction_is_the_maximum_over_true_neighbours(cloud):
    torch.manual_seed(0)
    stage = simipu.SetAbstraction(2, [(4, 6), (5, 7)], 9, (1.5, 4.0), (200, 200)).eval()
    for module in stage.modules():                          # batch norms that do something
        if isinstance(module, common.BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    xyz = torch.tensor(cloud[None, :200] / 2)
    f = torch.randn(1, 200, 2)
    chosen = torch.arange(0, 200, 20)[None]
    centres, (out,) = stage(xyz, [f], chosen)
    assert torch.equal(centres[0], xyz[0, chosen[0]])
    for m, at in enumerate(chosen[0]):
        distance = (xyz[0] - xyz[0, at]).norm(dim=1)
        parts = []
        for network, inner, outer in zip(stage.shells, (0, 1.5), (1.5, 4.0)):
            inside = (distance < outer) & (distance >= inner) | (distance == 0)
            values = [network(torch.cat([xyz[0, i] - xyz[0, at], f[0, i]])[None])[0]
                      for i in inside.nonzero()[:, 0]]
            parts.append(torch.stack(values).amax(0))
        expected = stage.aggregate(torch.cat(parts)[None])[0]
        torch.testing.assert_close(out[0, m], expected, atol=1e-5, rtol=1e-4)


def test_point_encoder_gives_a_sixteenth_and_ignores_translation(batch, model):
    model.eval()
    alpha = model.views(batch)[0]
    first = per_frame(batch, "first_alpha")
    (l,), (f,), (row,) = model.points([alpha], [first])
    assert l.shape == (2, 16, 3) and f.shape == (2, 16, 128) and (f >= 0).all()
    assert torch.equal(l, alpha[..., :3].gather(1, row[..., None].expand(-1, -1, 3)))
    # both blocks begin with the first point
    assert (row[:, 0] == first[:, 0]).all() and (row[:, 8] == first[:, 0]).all()
    shifted = alpha + torch.tensor([3., -2., 0.5, 0.])
    _, (f_shifted,), (row_shifted,) = model.points([shifted], [first])
    assert torch.equal(row_shifted, row)
    torch.testing.assert_close(f_shifted, f, atol=1e-3, rtol=1e-3)


def test_two_views_at_once_are_each_view_alone(batch, model):
    """The same points and features, the batch norms see view after view, only alpha learns."""
    alpha, beta, _ = model.views(batch)
    firsts = [per_frame(batch, "first_alpha"), per_frame(batch, "first_beta")]
    together = copy.deepcopy(model).train().points
    alone = copy.deepcopy(together)
    l, f, row = together([alpha, beta], firsts)
    for view, first, *expected in zip((alpha, beta), firsts, l, f, row):
        for value, part in zip(expected, alone([view], [first])):
            assert torch.equal(value, part[0])
    for (name, value), other in zip(together.named_buffers(), alone.buffers()):
        assert torch.equal(value, other), name
    assert f[0].requires_grad and not f[1].requires_grad


def test_last_points_are_half_chosen_by_features_and_half_by_distance(cloud, model):
    """Of the block that F-FPS chose and of the block that D-FPS chose one half each, sampled
    as the block was (D4). Greedy loops in float64.
    """
    p = 16
    points = torch.from_numpy(cloud[:256]).float()[None]
    points = torch.cat([points, torch.rand(1, 256, 1)], 2)
    first = torch.from_numpy(farthest_points(cloud[:256], 64))[None]
    net = copy.deepcopy(model).eval().points
    for stage in (net.stage1, net.stage2):      # features that tell more apart than places do
        torch.nn.init.constant_(stage.aggregate[-2].weight, 300.0)
    with torch.no_grad():
        l, (f,) = net.stage1(points[..., :3], [points[..., 3:]], first)
        by_features = greedy_loop(torch.cat([l, f], 2)[0], p)
        assert by_features != greedy_loop(l[0], p) and by_features != greedy_loop(f[0], p)
        fused = torch.tensor([by_features + list(range(p))])
        l, (f,) = net.stage2(l, [f], fused)
        by_features = greedy_loop(torch.cat([l, f], 2)[0, :p], p // 2)
        assert by_features != greedy_loop(l[0, :p], p // 2)
        halves = by_features + list(range(p, p + p // 2))
        (l,), _, (row,) = net([points], [first])
    assert row[0].tolist() == first[0, fused[0, halves]].tolist()
    assert torch.equal(l[0], points[0, row[0], :3])


# ---- matching ------------------------------------------------------------------------

def least_cost(cost):
    """Of a square matrix, by scipy."""
    return cost[linear_sum_assignment(cost)].sum()


def test_pair_points_is_optimal(cloud):
    rng = np.random.default_rng(2)
    for n in (1, 2, 5, 6):
        a = rng.normal(0, 3, (n, 3))
        b = rng.normal(0, 3, (n, 3))
        ids = np.arange(n)
        best = min(itertools.permutations(range(n)),
                   key=lambda p: np.linalg.norm(a - b[list(p)], axis=1).sum())
        assert common.pair_points(a, b, ids, ids + n).tolist() == list(best)
    for trial in range(20):                                 # overlapping draws, some points twice
        ids_a = rng.choice(150, 100, replace=bool(trial % 2))
        ids_b = rng.choice(150, 100, replace=bool(trial % 2))
        a = cloud[ids_a]
        b = cloud[ids_b]
        cost = cdist(a, b)
        pairs = common.pair_points(a, b, ids_a, ids_b)
        assert sorted(pairs) == list(range(100))
        assert cost[range(100), pairs].sum() == pytest.approx(least_cost(cost), rel=1e-9)
        greedy = greedy_pairs(a, b)
        assert sorted(greedy) == list(range(100))
        assert cost[range(100), greedy].sum() >= least_cost(cost) - 1e-9
    planted = rng.permutation(400)
    pairs = common.pair_points(cloud, cloud[planted], np.arange(400), 1000 + planted)
    assert pairs.tolist() == planted.argsort().tolist()     # without the help of ids


def test_greedy_takes_row_by_row_the_nearest_free_partner():
    a = np.array([[0., 0, 0], [0.1, 0, 0], [5, 0, 0]])
    b = np.array([[0.1, 0, 0], [1, 0, 0], [0.2, 0, 0]])
    assert greedy_pairs(a, b).tolist() == [0, 2, 1]


def test_pairs_stay_in_their_frame_and_undoing_T_costs_the_same(batch, model):
    model.eval()
    alpha, beta, T = model.views(batch)
    first = [per_frame(batch, "first_alpha"), per_frame(batch, "first_beta")]
    (l_alpha, l_beta), _, (id_alpha, row_beta) = model.points([alpha, beta], first)
    id_beta = per_frame(batch, "order").gather(1, row_beta)
    pairing = model.start_pairing(transform_points(T, l_alpha), l_beta, id_alpha, id_beta)
    i, j = model.intra_pairs(pairing, batch)
    assert torch.equal(i, torch.arange(32))
    assert (j // 16 == torch.arange(32) // 16).all() and sorted(j.tolist()) == list(range(32))
    back = transform_points(torch.linalg.inv(T), l_beta)
    for b in range(2):
        cost = cdist(l_alpha[b], back[b])
        partners = j[b * 16:b * 16 + 16] - b * 16
        assert cost[range(16), partners].sum() == pytest.approx(least_cost(cost), rel=1e-4)


def test_identical_views_are_matched_to_themselves(batch, model):
    model.eval()
    same = dict(batch.extra, a2b=torch.eye(4).repeat(2, 1), order=torch.arange(256).repeat(2),
                first_beta=batch.extra["first_alpha"])
    with torch.no_grad():
        terms = model(replace(batch, extra=same))[1]
    assert terms["matched_p90"] == 0 and terms["L_intra"] < math.log(32)


def test_real_kitti_clouds_are_matched_at_the_optimum(kitti_root):
    """The pairs cost as much as scipy's, and greedy's cost more, on every frame at hand."""
    dataset = data.open_dataset(kitti_root)
    views = TwoViews(dataset.grid, 4096, 1.5708, 0.25, (0.9, 1.1))
    torch.manual_seed(0)
    points = simipu.PointEncoder(8, 1.0).eval()
    for i in range(len(dataset)):
        frame = data.collate([views(dataset.load(i), np.random.default_rng(i))], [0])
        T = frame.extra["a2b"]
        order = frame.extra["order"]
        alpha = frame.points[None, :, :4]
        beta = torch.cat([alpha[..., :3] @ T[:3, :3].t() + T[:3, 3], alpha[..., 3:]], 2)
        with torch.no_grad():
            first = [frame.extra["first_alpha"][None], frame.extra["first_beta"][None]]
            (l_alpha, l_beta), _, (id_alpha, row_beta) = points([alpha, beta[:, order]], first)
        moved = (l_alpha[0] @ T[:3, :3].t() + T[:3, 3]).numpy()
        l_beta = l_beta[0].numpy()
        pairs = common.pair_points(moved, l_beta, id_alpha[0].numpy(), order[row_beta[0]].numpy())
        greedy = greedy_pairs(moved, l_beta)
        cost = cdist(moved, l_beta)
        rows = np.arange(256)
        assert cost[rows, pairs].sum() == pytest.approx(least_cost(cost), rel=1e-6)
        assert cost[rows, greedy].sum() > least_cost(cost)


# ---- losses --------------------------------------------------------------------------

def test_info_nce_has_its_closed_forms():
    tau = 0.07
    M = 256

    def mean(q, k):
        return common.info_nce(q, k, tau).mean().item()

    # every feature its own axis
    perfect = math.log(1 + (M - 1) * math.exp(-1 / tau))
    assert common.info_nce(torch.eye(M), torch.eye(M), tau).shape == (M,)
    assert mean(torch.eye(M), torch.eye(M)) == pytest.approx(perfect, rel=1e-3)
    # all alike
    assert mean(torch.ones(M, 8), torch.ones(M, 8)) == pytest.approx(math.log(M), rel=1e-5)
    # each twice
    twice = torch.eye(M).repeat(2, 1)
    others = (2 * M - 2) / 2 * math.exp(-1 / tau)
    assert mean(twice, twice) == pytest.approx(math.log(2) + others, rel=1e-3)
    # at random
    torch.manual_seed(0)
    q, k = torch.randn(2, 1000, 128)
    by_chance = math.log(1000) + 1 / (2 * 128 * tau ** 2)
    assert mean(q, k) == pytest.approx(by_chance, abs=0.15)
    # in another order, and with every pair twice
    order = torch.randperm(1000)
    plain = common.info_nce(q, k, tau)
    torch.testing.assert_close(common.info_nce(q[order], k[order], tau), plain[order])
    doubled = common.info_nce(torch.cat([q, q]), torch.cat([k, k]), tau)
    torch.testing.assert_close(doubled, (plain + math.log(2)).repeat(2))
    # in loops
    part = [[math.exp(F.cosine_similarity(q[i], k[j], 0) / tau) for j in range(20)]
            for i in range(20)]
    loops = torch.tensor([-math.log(part[i][i] / sum(part[i])) for i in range(20)])
    torch.testing.assert_close(common.info_nce(q[:20], k[:20], tau), loops, atol=1e-4, rtol=1e-4)
    # features of length 0, and none
    assert common.info_nce(torch.zeros(3, 4), k[:3, :4], tau).isfinite().all()
    assert common.info_nce(q[:0], k[:0], tau).sum() == 0


def contrast_in_loops(queries, keys, tau):
    """Eq. 4 and Eq. 7: how large a share of the softmax over all keys is each query's own?

    The paper sums over pairs; like the code, this is their mean (D2).
    """
    q = F.normalize(queries.double(), dim=1)
    k = F.normalize(keys.double(), dim=1)
    loss = 0.0
    for i in range(len(q)):
        own = math.exp(q[i] @ k[i] / tau)
        every = sum(math.exp(q[i] @ k[n] / tau) for n in range(len(k)))
        loss -= math.log(own / every)
    return loss / len(q)


def plain_c5(model, batch):
    """F_I of Eq. 5 in torchvision's own words: RGB, ImageNet's mean and deviation."""
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    x = (batch.images / 255 - mean) / std
    for image, (h, w) in zip(x, batch.hw.tolist()):
        image[:, h:] = 0                                    # padding has the mean colour
        image[:, :, w:] = 0
    x = F.pad(x, (0, -x.shape[3] % 32, 0, -x.shape[2] % 32))
    net = model.camera.resnet
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def points_and_features(model, view, first):
    """F_P of Eq. 2 for one view (256, 4) -> l (16, 3), f (16, C)."""
    (l,), (f,), _ = model.points([view[None]], [first[None]])
    return l[0], f[0]


def first_pixel(xyz, b, batch):
    """M_2 of Eq. 6 for one point of frame b: the first camera that sees it. -> image, u, v."""
    xyz1 = torch.cat([xyz.double(), torch.ones(1)])
    for image in range(b * 6, b * 6 + 6):
        h, w = batch.hw[image].tolist()
        u, v, d, _ = batch.lidar2img[image].double() @ xyz1
        if d > 0.1 and 0 <= u / d < w and 0 <= v / d < h:
            return image, u / d, v / d
    return None


def test_both_losses_match_plain_loops(batch, model):
    """Eq. 1 to 8 once more: scipy's Hungarian method with T undone instead of applied, torch's
    grid_sample, and loops over frames, points and pairs. The networks are the model's.
    """
    model = copy.deepcopy(model)
    # with momentum 1 one training pass sets the running statistics to this batch's, so that
    # points differ in their features, as those of a trained network do
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.
    with torch.no_grad():
        model.train()(batch)
        model.eval()
        L, terms = model(batch)

        z_alpha, z_beta = [], []                            # queries and keys of Eq. 4
        z_point, z_image = [], []                           # queries and keys of Eq. 7
        distances = []
        c5 = plain_c5(model, batch)                         # Eq. 5, for all images at once
        H, W = 32 * c5.shape[2], 32 * c5.shape[3]           # px that C5 covers
        for b in range(2):
            # Eq. 1: beta is alpha moved by T, in an order of its own
            alpha = batch.points.view(2, 256, 5)[b, :, :4]
            T = batch.extra["a2b"].view(2, 4, 4)[b].double()
            moved = (alpha[:, :3].double() @ T[:3, :3].t() + T[:3, 3]).float()
            order = batch.extra["order"].view(2, 256)[b]
            beta = torch.cat([moved, alpha[:, 3:]], 1)[order]

            # Eq. 2: 16 points and features of each view
            first_alpha = batch.extra["first_alpha"].view(2, 64)[b]
            first_beta = batch.extra["first_beta"].view(2, 64)[b]
            l_alpha, f_alpha = points_and_features(model, alpha, first_alpha)
            l_beta, f_beta = points_and_features(model, beta, first_beta)

            # Eq. 3: one-to-one pairs with the least sum of distances
            back = (l_beta.double() - T[:3, 3]) @ torch.linalg.inv(T[:3, :3]).t()
            _, j = linear_sum_assignment(cdist(l_alpha, back))
            distances.append((l_alpha - back[j]).norm(dim=1))

            # Eq. 4: the point of alpha asks, its partner of beta is the key
            z_alpha.append(model.head_intra(f_alpha))
            z_beta.append(model.head_intra(f_beta[j]))

            # Eq. 6 and 7: the point asks, C5 where the image shows it is the key
            for l, f in zip(l_alpha, f_alpha):
                pixel = first_pixel(l, b, batch)
                if pixel is None:
                    continue
                image, u, v = pixel
                at = torch.tensor([[[[2 * u / W - 1, 2 * v / H - 1]]]]).float()
                f_image = F.grid_sample(c5[image][None], at, mode="bilinear",
                                        padding_mode="border", align_corners=False)
                z_point.append(model.head_point(f[None]))
                z_image.append(model.head_image(f_image[:, :, 0, 0]))

        L_intra = contrast_in_loops(torch.cat(z_alpha), torch.cat(z_beta), 0.07)    # Eq. 4
        L_inter = contrast_in_loops(torch.cat(z_point), torch.cat(z_image), 0.07)   # Eq. 7
        other_way = contrast_in_loops(torch.cat(z_image), torch.cat(z_point), 0.07)
    assert abs(other_way - L_inter) > 0.05      # the code's transpose of Eq. 7 would show (D1)
    assert len(z_alpha) == 2 and len(z_point) > 20
    assert terms["chance_inter"] == pytest.approx(math.log(len(z_point)))
    assert float(terms["L_intra"]) == pytest.approx(L_intra, rel=1e-4)
    assert float(terms["L_inter"]) == pytest.approx(L_inter, rel=1e-4)
    assert float(L) == pytest.approx(L_intra + L_inter, rel=1e-4)               # Eq. 8
    # in metres of view alpha
    for name, share in (("matched_median", 0.5), ("matched_p90", 0.9)):
        expected = float(torch.cat(distances).quantile(share))
        assert float(terms[name]) == pytest.approx(expected, rel=1e-3)


def test_beta_is_a_constant_and_the_losses_have_their_weights(batch, monkeypatch):
    """D2: of Eq. 4 only alpha's side learns, of Eq. 7 both; Eq. 8 weighs them."""
    learns = []
    plain = simipu.info_nce

    def watched(queries, keys, tau):
        learns.append((queries.requires_grad, keys.requires_grad))
        return plain(queries, keys, tau)

    monkeypatch.setattr(simipu, "info_nce", watched)
    L, terms = SimIPU(replace(TINY, w_intra=0.3, w_inter=2.0))(batch)
    assert learns == [(True, False), (True, True)]
    expected = 0.3 * terms["L_intra"].item() + 2.0 * terms["L_inter"].item()
    assert L.item() == pytest.approx(expected)


def test_two_views_draw_visible_points_in_range_and_mirror_images_with_the_cloud(world):
    frame = data.open_dataset(world, "small").load(0, (48, 128))
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (48, 1))
    matrices = frame.lidar2img
    frame = replace(frame, images=[np.stack([ramp] * 3)] * 6)
    outside = ~data.visible_points(frame.points, matrices, [(48, 128)] * 6).any(0)
    assert outside.sum() > 100
    assert (abs(frame.points[~outside, :2]) > 25.6).any(1).sum() > 100
    sides = set()
    for seed in range(12):
        view = VIEWS(frame, np.random.default_rng(seed))
        again = np.random.default_rng(seed)
        random_transform(again, np.zeros(3), TINY.rotation, TINY.scale)
        factor = min(again.uniform(0.6, 1.2), again.uniform(0.6, 1.2))
        size = (round(48 * factor), round(128 * factor))
        assert all(image.shape[1:] == size for image in view.images)
        mirrored = bool(np.linalg.det(view.extra["a2b"][:3, :3]) < 0)
        assert all((image[0, 0, 0] > image[0, 0, -1]) == mirrored for image in view.images)
        sides.add(mirrored)
        assert ((view.points[:, :3] > GRID.low) & (view.points[:, :3] < GRID.high)).all()
        assert data.visible_points(view.points, matrices, [(48, 128)] * 6).any(0).all()
        assert len(np.unique(view.points, axis=0)) == 256
    assert sides == {True, False}


def parts_of(model):
    return dict(points=model.points, intra=model.head_intra,
                camera=model.camera, point=model.head_point, image=model.head_image)


def test_which_loss_trains_which_part(batch, model):
    model.train()

    def learns(part):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        return any(gradient.abs().sum() > 0 for gradient in gradients)

    def trained_by(name):
        model.zero_grad()
        model(batch)[1][name].backward()
        return {name for name, part in parts_of(model).items() if learns(part)}

    assert trained_by("L_intra") == {"points", "intra"}
    # the points' head learns: the paper's reading of Eq. 7 (D1)
    assert trained_by("L_inter") == {"camera", "point", "image"}
    for flags, frozen in ((dict(w_intra=0.), {"points", "intra"}),
                          (dict(w_inter=0.), {"camera", "point", "image"})):
        torch.manual_seed(0)
        other = SimIPU(replace(TINY, **flags))
        other(batch)[0].backward()
        without = {name for name, part in parts_of(other).items()
                   if all(p.grad is None for p in part.parameters())}
        assert without == frozen


def test_every_parameter_learns(batch):
    torch.manual_seed(1)
    model = SimIPU(TINY)
    for module in model.camera.modules():                   # residual branches begin at zero
        if hasattr(module, "bn2"):
            torch.nn.init.ones_(module.bn2.weight)
    model(batch)[0].backward()
    idle = [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() < 1e-6]
    # the batch norm that follows takes these out
    assert idle == [f"head_{kind}.0.6.bias" for kind in ("intra", "point", "image")]


def test_a_frame_that_shows_no_point_has_no_pair(world, model):
    dataset = data.open_dataset(world, "small")
    rng = np.random.default_rng(0)
    empty = data.select(dataset.load(1, (48, 128)), np.zeros(0, np.int64))
    few = dataset.load(0, (48, 128))
    visible = data.visible_points(few.points, few.lidar2img, [(48, 128)] * 6).any(0)
    few = data.select(few, np.flatnonzero(visible)[:100])
    frames = [VIEWS(few, rng), VIEWS(empty, rng)]
    # drawn with repetition
    assert 0 < len(np.unique(frames[0].points, axis=0)) <= 100 and len(frames[0].points) == 256
    # nothing in one place: those would be neighbours by the million
    assert not len(cKDTree(frames[1].points[:, :3]).query_pairs(2 * 9.6))
    loss, terms = model.train()(data.collate(frames, [0, 1]))
    assert loss.isfinite() and terms["chance_intra"] == pytest.approx(math.log(16))
    both = data.collate(frames, [0, 1]).to("cpu")
    assert isinstance(both.extra["seen"], list) and both.extra["seen"][1] == 0   # never on a GPU
    stand_in = both.points.view(2, -1, 5)[1, :, :3]
    assert data.visible_points(stand_in.numpy(), frames[1].lidar2img, [(9999, 9999)] * 6).any()
    point, _, _ = model.in_images(both.points.view(2, -1, 5)[..., :3], both)
    assert len(point) > 200 and (point < 256).all()
    nothing, terms = model(data.collate([frames[1]], [0]))
    assert nothing == 0 and not terms["matched_median"]
    for one in (loss, nothing):
        model.zero_grad()
        one.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # hundreds of copies of three points: slow, and nothing to learn
    assert VIEWS(data.select(few, np.arange(3)), rng).extra["seen"] == 0


def test_neither_loss_has_more_pairs_than_asked(batch):
    model = SimIPU(replace(TINY, pairs=10)).eval()
    with torch.no_grad():
        terms = model(batch)[1]
    assert terms["chance_intra"] == terms["chance_inter"] == pytest.approx(math.log(10))


def test_forward_waits_twice_a_level_and_once_for_the_pixels(batch, world):
    """However many frames there are; and once more, not seen here, to fetch what is paired."""
    model = SimIPU(TINY)
    frame = data.open_dataset(world, "small").load(0, (48, 128))
    one = data.collate([VIEWS(frame, np.random.default_rng(0))], [0])
    for frames in (batch, one):
        with Waits() as waits:
            model(frames)
        expected = ["repeat_interleave", "nonzero"] * 3 + ["nonzero"]
        assert waits.names == expected


@pytest.mark.slow
def test_two_scenes_are_learned_by_heart(batch):
    torch.manual_seed(0)
    model = SimIPU(TINY)
    others = [p for name, p in model.named_parameters() if not name.startswith("points")]
    opts = [torch.optim.AdamW(model.points.parameters(), 1e-3), torch.optim.SGD(others, 0.03, 0.9)]
    for _ in range(120):
        loss, terms = model(batch)
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
    assert terms["L_intra"] < 0.65 * math.log(32), terms
    assert terms["L_inter"] < 0.3 * math.log(32) + terms["cell_inter"], terms
    assert terms["std_alpha"] > 0.05 and terms["std_image"] > 0.05      # 0.088 is spread evenly


def test_effective_rank_is_that_of_the_singular_values():
    assert float(simipu.effective_rank(torch.eye(6).view(6, 2, 3))) == pytest.approx(6)
    assert float(simipu.effective_rank(torch.ones(6, 4))) == pytest.approx(1)
    weight = common.ResNet(18).resnet.conv1.weight
    values = torch.linalg.svdvals(weight.flatten(1).double()) ** 2
    expected = float(values.sum() ** 2 / (values ** 2).sum())
    assert 35 < float(simipu.effective_rank(weight)) == pytest.approx(expected, rel=1e-4)


def test_log_multiplicity_counts_equal_rows(batch):
    ids = torch.tensor([4, 4, 4, 7])
    assert simipu.log_multiplicity(ids).item() == pytest.approx(3 * math.log(3) / 4)
    two_columns = torch.stack([ids, torch.tensor([1, 1, 2, 1])], 1)
    assert simipu.log_multiplicity(two_columns).item() == pytest.approx(2 * math.log(2) / 4)
    assert simipu.log_multiplicity(torch.arange(5)) == 0
    assert simipu.log_multiplicity(torch.arange(0)) == 0
    assert simipu.log_multiplicity(torch.zeros(0, 3, dtype=torch.int64)) == 0


def test_the_same_row_of_two_frames_is_not_the_same_point(world, model):
    frame = VIEWS(data.open_dataset(world, "small").load(0, (48, 128)), np.random.default_rng(0))
    frame.extra["order"][:] = np.arange(256)                # the same rows in both views
    model.eval()
    with torch.no_grad():
        one = model(data.collate([frame], [0]))[1]["floor_intra"]
        two = model(data.collate([frame] * 2, [0, 1]))[1]["floor_intra"]
    torch.testing.assert_close(one, two)


# ---- the script ----------------------------------------------------------------------

def test_the_weights_of_a_run_fit_torchvision_and_the_detector(three_frames, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(common.ResNet(18).resnet.state_dict(), tmp_path / "start.pth")
    out = tmp_path / "whole"
    whole = run("simipu.py", out, "--data", str(three_frames), "--points", "256",
                "--zoom-low", "0.4", "--zoom-high", "0.5", "--eval-every", "2",
                "--steps", "2", "--save-every", "1", "--image-init", str(tmp_path / "start.pth"))
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert "loaded 120/120 tensors of the image network" in whole.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"val L_intra {metrics['L_intra']}" in whole.stdout.splitlines()[-1]
    for name in ("matches", "similarity", "losses"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000

    weights = load_file(out / "backbones.safetensors")
    assert all(name.startswith("camera.resnet.") for name in weights)
    plain = resnet18(weights=None)
    plain.fc = torch.nn.Identity()
    plain.load_state_dict({name.removeprefix("camera.resnet."): value        # strict
                           for name, value in weights.items()})
    other = common.ResNet(18)
    common.load_resnet(out, other.resnet, 0)
    assert all(torch.equal(value, weights["camera." + name])
               for name, value in other.state_dict().items())

    grid = data.GRIDS["nuscenes", "small"]
    flags = {**finetune.SMALL, "width": 4, "bins": 12}
    cfg = finetune.Config(preset="small", modality="camera", **flags)
    detector = finetune.Detector(cfg, grid)
    units = ["camera.resnet", "camera.neck", "fuse"]
    finetune.load_units(out, detector, (), units, grid, 0)
    assert "loaded camera.resnet 120/120 tensors of step 2" in capsys.readouterr().out
    assert all(torch.equal(value, weights[name])
               for name, value in detector.state_dict().items() if name in weights)


@pytest.mark.parametrize("flags, least, most", [
    (dict(), 40, 64),
    (dict(optimiser="sgd", lr=0.03), 1, 20),
])
def test_the_first_layer_stays_alive_only_with_adamw(
        flags, least, most, three_frames, tmp_path):
    """D11: with the released code's optimiser and two frames a step it is lost at once."""
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, steps=4, **flags)
    simipu.train(0, 1, cfg)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    stem = [json.loads(line)["stem"] for line in lines if '"stem"' in line]
    assert stem[0] > 40 and least < stem[-1] < most


@pytest.mark.parametrize("flags", [dict(w_intra=0.), dict(w_inter=0.), dict(match="greedy")])
def test_the_ablations_run_to_their_end(flags, three_frames, tmp_path):
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0,
                  epochs=0, steps=1, batch=1, **flags)
    simipu.train(0, 1, cfg)
    assert math.isfinite(json.loads((tmp_path / "metrics.json").read_text())["L_intra"])


def test_learning_rates_fall_each_epoch(three_frames, tmp_path, monkeypatch):
    for name in ("save_figure", "loss_curves", "load_tool"):
        monkeypatch.setattr(simipu, name, lambda *_: None)
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0,
                  steps=3, batch=1, decay=0.5)
    simipu.train(0, 1, cfg)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == [TINY.lr, TINY.lr, TINY.lr / 2]
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    points, others = (opt["param_groups"][0] for opt in state["optimizers"])
    assert points["lr"] == TINY.lr_points / 2
    assert points["betas"] == (0.95, 0.99)
    assert points["weight_decay"] == 0.01
    assert others["lr"] == TINY.lr / 2


@pytest.mark.parametrize("flags, message", [
    (dict(epochs=2), "one of them must be 0"),
    (dict(steps=-5), "--steps -5: expected a whole number from 0"),
    (dict(points=100), "a multiple of 32"),
    (dict(w_intra=0., w_inter=0.), "not both 0"),
    (dict(scale=1.5), "--scale 1.5: expected a number below 1"),
    (dict(radius_scale=0.), "expected a number above 0"),
    (dict(zoom_low=3.), "0 < low <= high"),
    (dict(batch=0), "--batch 0: expected a whole number from 1"),
])
def test_flags_that_cannot_work_are_refused(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        simipu.train(0, 1, replace(TINY, out=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case, message", [
    ("other depth", "do not fit"),
    ("cut", "no readable weights"),
    ("pickle", "no readable weights"),
    ("absent", "no readable weights"),
])
def test_image_weights_that_do_not_fit_are_refused(case, message, tmp_path):
    path = tmp_path / "weights.pth"
    if case != "absent":
        torch.save(print if case == "pickle" else common.ResNet(50).resnet.state_dict(), path)
    if case == "cut":
        path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(SystemExit, match=message):
        common.load_resnet(path, common.ResNet(18).resnet, 0)
