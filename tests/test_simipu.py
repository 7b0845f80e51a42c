"""simipu.py: geometry, samplings, matching and losses against slow transcriptions and closed forms; which loss teaches what; the script as it is run."""
import copy
import itertools
import json
import math
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
from conftest import run
from simipu import SMALL, Config, SimIPU, TwoViews, ball_query, farthest_features, farthest_points, greedy_pairs, random_transform

GRID = data.GRIDS["nuscenes", "small"]
TINY = Config(preset="small", **{**SMALL, "points": 256, "width": 4, "zoom_low": 0.515, "zoom_high": 1.92})
VIEWS = TwoViews(GRID, TINY.points, TINY.rotation, TINY.scale, (0.6, 1.2))


@pytest.fixture(scope="module")
def batch(world):
    return next(data.loader(str(world), "train", 2, preset="small", image=(48, 128), augment=VIEWS).begin_at(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SimIPU(TINY)


@pytest.fixture
def cloud():
    return np.random.default_rng(0).uniform((-20, -20, -2), (20, 20, 2), (400, 3)).astype(np.float32)


# ---- geometry ----

def test_T_is_turn_about_the_centre_then_scale_about_the_origin_then_mirror(cloud):
    centre = np.array([35.2, 0, -1])
    seen = set()
    for seed in range(20):
        T, mirrored = random_transform(np.random.default_rng(seed), centre, 1.5708, 0.25)
        again = np.random.default_rng(seed)
        angle, s = again.uniform(-1.5708, 1.5708), again.uniform(0.75, 1.25)
        expected = np.empty((len(cloud), 3))
        for n, (x, y, z) in enumerate(cloud - centre):
            turned = np.array([math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y, z]) + centre
            expected[n] = s * turned * [1, -1 if mirrored else 1, 1]
        moved = cloud @ T[:3, :3].T + T[:3, 3]
        np.testing.assert_allclose(moved, expected, atol=1e-9)
        assert np.linalg.det(T[:3, :3]) == pytest.approx((-1 if mirrored else 1) * s ** 3)
        np.testing.assert_allclose(moved @ np.linalg.inv(T)[:3, :3].T + np.linalg.inv(T)[:3, 3], cloud, atol=1e-4)
        seen.add(mirrored)
    assert seen == {True, False}


def test_pictures_keep_their_points(world):
    """A point's place in a resized and mirrored picture is its place in the original, resized and mirrored."""
    frame = data.open_dataset(world, "small").load(0)
    before = np.concatenate([frame.points[:, :3], np.ones((len(frame.points), 1))], 1)
    ramp = np.tile(np.arange(256, dtype=np.uint8), (96, 1))
    frame = replace(frame, images=[np.stack([ramp, ramp, ramp])] * 6)
    for factor, mirrored in ((1.4, False), (0.55, True), (1.0, True)):
        H, W = round(96 * factor), round(256 * factor)
        other = data.crop_images(frame, [(0, 0, 96, 256)] * 6, [(H, W)] * 6, [mirrored] * 6)
        assert all(image.shape == (3, H, W) for image in other.images)
        for a, b in zip(frame.lidar2img, other.lidar2img):
            (u, v, d), (u_, v_, d_) = (before @ a.T)[:, :3].T, (before @ b.T)[:, :3].T
            keep = d > 1
            np.testing.assert_allclose(d_, d, rtol=1e-5, atol=1e-4)
            wanted = (u / d * W / 256)[keep]
            np.testing.assert_allclose((u_ / d_)[keep], W - wanted if mirrored else wanted, rtol=1e-3, atol=0.05)
            np.testing.assert_allclose((v_ / d_)[keep], (v / d * H / 96)[keep], rtol=1e-3, atol=0.05)
        columns = other.images[0][0, 10].astype(float)                                      # the ramp shows which column each came from
        came = (np.arange(W) + 0.5) * 256 / W - 0.5
        np.testing.assert_allclose(columns[4:-4], (came[::-1] if mirrored else came)[4:-4], atol=1.0)


def test_sampling_reads_the_cell_a_point_falls_on_also_with_mixed_sizes(world, model, monkeypatch):
    """A feature map that shows its own coordinates gives each point its pixel, except in the outer half cell, where the border value holds."""
    wide = replace(VIEWS, zoom=(TINY.zoom_low, TINY.zoom_high))
    frames = [wide(data.open_dataset(world, "small").load(i), np.random.default_rng(seed)) for i, seed in ((0, 1), (1, 2), (3, 3))]
    assert len({frame.images[0].shape for frame in frames}) == 3
    mixed = data.collate(frames, [0, 1, 2])

    def own_coordinates(images, masked):
        count, _, H, W = images.shape
        assert H % 32 == W % 32 == 0
        assert all(not shown[:h, :w].any() and shown.sum() == H * W - h * w for shown, (h, w) in zip(masked, mixed.hw.tolist()))    # padding: the mean colour
        v, u = torch.meshgrid(torch.arange(H // 32) * 32. + 16, torch.arange(W // 32) * 32. + 16, indexing="ij")
        return [torch.stack([u, v]).expand(count, 2, -1, -1)]
    monkeypatch.setattr(model.camera, "stages", own_coordinates)
    c5, padded = model.image_features(mixed.images, mixed.hw)
    l = mixed.points.view(3, -1, 5)[..., :3]
    point, image, uv = model.in_images(l, mixed)
    found = common.sample_image(c5, image, uv, padded)
    inner = ((uv > 16) & (uv < torch.tensor(padded[::-1]) - 16)).all(1)
    torch.testing.assert_close(found[inner], uv[inner], atol=1e-3, rtol=0)
    assert inner.sum() > 100 and (image // 6 == point // l.shape[1]).all() and len(point.unique()) == len(point)
    height, width = mixed.hw[image].unbind(1)
    assert ((uv >= 0).all(1) & (uv[:, 0] < width) & (uv[:, 1] < height)).all()
    assert ((uv[:, 0] > width - 16) & inner).any()                                          # near the right edge of a smaller picture: the released code errs there


def test_only_alpha_is_projected(batch, model):
    model.eval()
    turned = replace(batch, extra={**batch.extra, "a2b": torch.eye(4).repeat(2, 1)})
    assert not torch.equal(batch.extra["a2b"], turned.extra["a2b"])
    with torch.no_grad():
        a, b = model(batch)[1], model(turned)[1]
    assert a["L_inter"] == b["L_inter"] and a["L_intra"] != b["L_intra"]


# ---- sampling and neighbours ----

def test_farthest_points_are_the_greedy_choice_and_do_not_mind_T(cloud):
    chosen = [0]
    for _ in range(59):
        chosen.append(int(cdist(cloud[chosen].astype(float), cloud.astype(float)).min(0).argmax()))
    assert farthest_points(cloud, 60).tolist() == chosen == farthest_points(cloud, 120)[:60].tolist()
    T, _ = random_transform(np.random.default_rng(3), np.zeros(3), 1.5, 0.25)
    assert farthest_points(cloud @ T[:3, :3].T + T[:3, 3], 60).tolist() == chosen
    assert farthest_points(cloud[farthest_points(cloud, 120)], 60).tolist() == list(range(60))           # what PointEncoder counts on
    gaps = [cdist(cloud[chosen[:k]], cloud[chosen[:k]])[np.triu_indices(k, 1)].min() for k in range(2, 60)]
    assert all(a >= b for a, b in zip(gaps, gaps[1:]))


def test_farthest_features_are_the_greedy_choice_in_joined_space(cloud):
    x = np.concatenate([cloud[:200], np.random.default_rng(1).normal(0, 5, (200, 8))], 1)
    both = torch.tensor(np.stack([x, x[::-1]]), dtype=torch.float32)
    for rows, found in zip(both.numpy(), farthest_features(both, 50).tolist()):
        chosen = [0]
        for _ in range(49):
            chosen.append(int(cdist(rows[chosen].astype(float), rows.astype(float)).min(0).argmax()))
        assert found == chosen
    turn = torch.tensor(random_transform(np.random.default_rng(3), np.zeros(3), 1.5, 0.)[0][:3, :3], dtype=torch.float32)
    moved = torch.cat([both[..., :3] @ turn.t(), both[..., 3:]], 2)
    assert torch.equal(farthest_features(moved, 50), farthest_features(both, 50))
    assert not torch.equal(farthest_features(torch.cat([both[..., :3] * 3, both[..., 3:]], 2), 50), farthest_features(both, 50))


def test_ball_query_takes_the_first_of_each_shell_in_order(cloud):
    sources = torch.tensor(np.stack([cloud[:300] / 4, cloud[100:] / 4 + 40]))
    sources[:, 7] = sources[:, 5]                                                           # the same place twice
    rows = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(i))[:60] for i in range(2)])
    centres = sources.gather(1, rows[..., None].expand(-1, -1, 3))
    radii, most = (0.7, 1.4, 2.8), (3, 8, 20)
    full = 0
    for inner, outer, k, found in zip((0., *radii), radii, most, ball_query(centres, sources, radii, most)):
        for b, m in itertools.product(range(2), range(60)):
            hits = []
            for i, place in enumerate(sources[b]):
                d = float((place - centres[b, m]).square().sum()) ** 0.5
                if (inner <= d < outer or d == 0) and len(hits) < k:
                    hits.append(i)
            full += len(hits) == k
            assert found[b * 60 + m].tolist() == [b * 300 + i for i in hits + hits[:1] * (k - len(hits))]
    assert full > 20


def test_set_abstraction_is_the_maximum_over_true_neighbours(cloud):
    torch.manual_seed(0)
    stage = simipu.SetAbstraction(2, [(4, 6), (5, 7)], 9, (1.5, 4.0), (200, 200)).eval()
    for module in stage.modules():                                                          # batch norms that do something
        if isinstance(module, common.BatchNorm):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    xyz, f = torch.tensor(cloud[None, :200] / 2), torch.randn(1, 200, 2)
    chosen = torch.arange(0, 200, 20)[None]
    centres, out = stage(xyz, f, chosen)
    assert torch.equal(centres[0], xyz[0, chosen[0]])
    for m, at in enumerate(chosen[0]):
        distance, parts = (xyz[0] - xyz[0, at]).norm(dim=1), []
        for network, inner, outer in zip(stage.shells, (0, 1.5), (1.5, 4.0)):
            members = ((distance < outer) & (distance >= inner) | (distance == 0)).nonzero()[:, 0]
            parts.append(torch.stack([network(torch.cat([xyz[0, i] - xyz[0, at], f[0, i]])[None])[0] for i in members]).amax(0))
        torch.testing.assert_close(out[0, m], stage.aggregate(torch.cat(parts)[None])[0], atol=1e-5, rtol=1e-4)


def test_the_point_network_gives_a_sixteenth_and_does_not_mind_moving(batch, model):
    model.eval()
    alpha = model.views(batch)[0]
    first = batch.extra["first_alpha"].view(2, -1)
    l, f, row = model.points(alpha, first)
    assert l.shape == (2, 16, 3) and f.shape == (2, 16, 128) and (f >= 0).all()
    assert torch.equal(l, alpha[..., :3].gather(1, row[..., None].expand(-1, -1, 3)))
    assert (row[:, 0] == first[:, 0]).all() and (row[:, 8] == first[:, 0]).all()            # both blocks begin with the first point
    l_, f_, row_ = model.points(alpha + torch.tensor([3., -2., 0.5, 0.]), first)
    assert torch.equal(row_, row)
    torch.testing.assert_close(f_, f, atol=1e-3, rtol=1e-3)


def test_the_last_points_are_half_chosen_by_features_and_half_by_distance(cloud, model):
    """n/16 points: of the block that F-FPS chose and of the block that D-FPS chose a half each, sampled as it was. Greedy loops in float64."""
    points, m = torch.from_numpy(cloud[:256]).float()[None], 16
    points = torch.cat([points, torch.rand(1, 256, 1)], 2)
    first = torch.from_numpy(simipu.farthest_points(cloud[:256], 64))[None]
    net = copy.deepcopy(model).eval().points
    for stage in (net.stage1, net.stage2):                          # features that tell points apart more than their places do
        torch.nn.init.constant_(stage.aggregate[-2].weight, 300.0)

    def greedy(x, n):
        chosen, x = [0], x.double()
        while len(chosen) < n:
            chosen.append(int((x[:, None] - x[chosen]).norm(dim=2).amin(1).argmax()))
        return chosen
    with torch.no_grad():
        l, f = net.stage1(points[..., :3], points[..., 3:], first)
        by_features = greedy(torch.cat([l, f], 2)[0], m)
        assert by_features != greedy(l[0], m) and by_features != greedy(f[0], m)
        fused = torch.tensor([by_features + list(range(m))])
        l, f = net.stage2(l, f, fused)
        halves = greedy(torch.cat([l, f], 2)[0, :m], m // 2) + list(range(m, m + m // 2))
        assert halves[:m // 2] != greedy(l[0, :m], m // 2)
        l, f, row = net(points, first)
    assert row[0].tolist() == first[0, fused[0, halves]].tolist() and torch.equal(l[0], points[0, row[0], :3])


# ---- matching ----

def test_pairs_are_optimal(cloud):
    rng = np.random.default_rng(2)
    for n in (1, 2, 5, 6):
        a, b, ids = rng.normal(0, 3, (n, 3)), rng.normal(0, 3, (n, 3)), np.arange(n)
        best = min(itertools.permutations(range(n)), key=lambda p: np.linalg.norm(a - b[list(p)], axis=1).sum())
        assert common.pair_points(a, b, ids, ids + n).tolist() == list(best)
    for trial in range(20):                                                                 # overlapping draws, some points twice
        ids_a, ids_b = (rng.choice(150, 100, replace=bool(trial % 2)) for _ in range(2))
        pairs = common.pair_points(cloud[ids_a], cloud[ids_b], ids_a, ids_b)
        assert sorted(pairs) == list(range(100))
        cost = cdist(cloud[ids_a], cloud[ids_b])
        best = cost[linear_sum_assignment(cost)].sum()
        assert cost[range(100), pairs].sum() == pytest.approx(best, rel=1e-9)
        greedy = greedy_pairs(cloud[ids_a], cloud[ids_b])
        assert sorted(greedy) == list(range(100)) and cost[range(100), greedy].sum() >= best - 1e-9
    planted = rng.permutation(400)
    assert common.pair_points(cloud, cloud[planted], np.arange(400), 1000 + planted).tolist() == planted.argsort().tolist()      # without the help of ids


def test_greedy_takes_row_by_row_the_nearest_that_is_free():
    a, b = np.array([[0., 0, 0], [0.1, 0, 0], [5, 0, 0]]), np.array([[0.1, 0, 0], [1, 0, 0], [0.2, 0, 0]])
    assert greedy_pairs(a, b).tolist() == [0, 2, 1]


def test_pairs_stay_in_their_frame_and_either_direction_gives_the_same(batch, model):
    model.eval()
    alpha, beta, T = model.views(batch)
    order = batch.extra["order"].view(2, -1)
    l_a, _, row_a = model.points(alpha, batch.extra["first_alpha"].view(2, -1))
    l_b, _, row_b = model.points(beta, batch.extra["first_beta"].view(2, -1))
    j = model.pair(simipu.transform_points(T, l_a), l_b, row_a, order.gather(1, row_b))
    assert (j // 16 == torch.arange(32) // 16).all() and sorted(j.tolist()) == list(range(32))
    back = simipu.transform_points(torch.linalg.inv(T), l_b)
    for b in range(2):
        cost = cdist(l_a[b], back[b])
        mine = cost[range(16), (j[b * 16:b * 16 + 16] - b * 16)].sum()
        assert mine == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-4)


def test_the_same_view_twice_is_matched_to_itself(batch, model):
    model.eval()
    same = {**batch.extra, "a2b": torch.eye(4).repeat(2, 1), "order": torch.arange(256).repeat(2), "first_beta": batch.extra["first_alpha"]}
    with torch.no_grad():
        terms = model(replace(batch, extra=same))[1]
    assert terms["matched_p90"] == 0 and terms["L_intra"] < math.log(32)


def test_real_kitti_clouds_are_matched_at_the_optimum(kitti_root):
    """Total cost of the pairs equals scipy's, and greedy's is higher, on every frame at hand."""
    dataset = data.open_dataset(kitti_root)
    views = TwoViews(dataset.grid, 4096, 1.5708, 0.25, (0.9, 1.1))
    torch.manual_seed(0)
    points = simipu.PointEncoder(8, 1.0).eval()
    for i in range(len(dataset)):
        b = data.collate([views(dataset.load(i), np.random.default_rng(i))], [0])
        alpha, T = b.points[None, :, :4], b.extra["a2b"]
        order = b.extra["order"]
        beta = torch.cat([alpha[..., :3] @ T[:3, :3].t() + T[:3, 3], alpha[..., 3:]], 2)[:, order]
        with torch.no_grad():
            (l_a, _, row_a), (l_b, _, row_b) = points(alpha, b.extra["first_alpha"][None]), points(beta, b.extra["first_beta"][None])
        moved, l_b = (l_a[0] @ T[:3, :3].t() + T[:3, 3]).numpy(), l_b[0].numpy()
        cost = cdist(moved, l_b)
        rows = np.arange(256)
        ours, best, greedy = cost[rows, common.pair_points(moved, l_b, row_a[0].numpy(), order[row_b[0]].numpy())].sum(), cost[linear_sum_assignment(cost)].sum(), \
            cost[rows, greedy_pairs(moved, l_b)].sum()
        assert ours == pytest.approx(best, rel=1e-6) and greedy > best


# ---- losses ----

def test_info_nce_has_its_closed_forms():
    tau, M = 0.07, 256
    perfect = common.info_nce(torch.eye(M), torch.eye(M), tau)
    assert perfect.shape == (M,) and perfect.mean().item() == pytest.approx(math.log(1 + (M - 1) * math.exp(-1 / tau)), rel=1e-3)
    assert common.info_nce(torch.ones(M, 8), torch.ones(M, 8), tau).mean().item() == pytest.approx(math.log(M), rel=1e-5)
    twice = torch.eye(M).repeat(2, 1)
    assert common.info_nce(twice, twice, tau).mean().item() == pytest.approx(math.log(2) + (2 * M - 2) / 2 * math.exp(-1 / tau), rel=1e-3)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1000, 128)
    assert common.info_nce(q, k, tau).mean().item() == pytest.approx(math.log(1000) + 1 / (2 * 128 * tau ** 2), abs=0.15)
    order = torch.randperm(1000)
    torch.testing.assert_close(common.info_nce(q[order], k[order], tau), common.info_nce(q, k, tau)[order])
    torch.testing.assert_close(common.info_nce(torch.cat([q, q]), torch.cat([k, k]), tau), (common.info_nce(q, k, tau) + math.log(2)).repeat(2))
    part = [[math.exp(F.cosine_similarity(q[i], k[j], 0) / tau) for j in range(20)] for i in range(20)]
    loops = [-math.log(part[i][i] / sum(part[i])) for i in range(20)]
    torch.testing.assert_close(common.info_nce(q[:20], k[:20], tau), torch.tensor(loops), atol=1e-4, rtol=1e-4)
    assert common.info_nce(torch.zeros(3, 4), k[:3, :4], tau).isfinite().all() and common.info_nce(q[:0], k[:0], tau).sum() == 0


def test_both_losses_written_out(batch, model):
    """The forward against a transcription with plain scipy, T undone instead of applied, torch's grid_sample and loops over pairs."""
    model.eval()
    with torch.no_grad():
        L, terms = model(batch)
        alpha = batch.points.view(2, 256, 5)[..., :4]
        q_intra, k_intra, q_inter, k_inter, apart = [], [], [], [], []
        images = (batch.images / 255 - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) / torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
        for image, (h, w) in zip(images, batch.hw.tolist()):
            image[:, h:], image[:, :, w:] = 0, 0
        net, images = model.camera.resnet, F.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))
        c5 = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images))))))))
        H, W = c5.shape[2] * 32, c5.shape[3] * 32
        for b in range(2):
            T = batch.extra["a2b"].view(2, 4, 4)[b].double()
            order = batch.extra["order"].view(2, -1)[b]
            beta = torch.cat([(alpha[b, :, :3].double() @ T[:3, :3].t() + T[:3, 3]).float(), alpha[b, :, 3:]], 1)[order]
            l_a, f_a, _ = model.points(alpha[b:b + 1], batch.extra["first_alpha"].view(2, -1)[b:b + 1])
            l_b, f_b, _ = model.points(beta[None], batch.extra["first_beta"].view(2, -1)[b:b + 1])
            back = (l_b[0].double() - T[:3, 3]) @ torch.linalg.inv(T[:3, :3]).t()
            _, j = linear_sum_assignment(cdist(l_a[0], back))
            apart.append((l_a[0] - back[j]).norm(dim=1))
            q_intra.append(model.head_intra(f_a[0]))
            k_intra.append(model.head_intra(f_b[0][j]))
            for p in range(16):
                for k in range(6):
                    u, v, d, _ = batch.lidar2img[b * 6 + k].double() @ torch.cat([l_a[0, p].double(), torch.ones(1)])
                    h, w = batch.hw[b * 6 + k].tolist()
                    if d > 0.1 and 0 <= u / d < w and 0 <= v / d < h:
                        at = torch.tensor([[[[2 * u / d / W - 1, 2 * v / d / H - 1]]]]).float()
                        value = F.grid_sample(c5[b * 6 + k][None], at, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0, 0]
                        q_inter.append(model.head_point(f_a[:, p]))
                        k_inter.append(model.head_image(value[None]))
                        break
        found = {}
        for name, q, k in (("L_intra", q_intra, k_intra), ("L_inter", q_inter, k_inter)):
            q, k = (F.normalize(torch.cat(part).double(), dim=1) for part in (q, k))
            found[name] = -sum(math.log(math.exp(q[i] @ k[i] / 0.07) / sum(math.exp(q[i] @ k[n] / 0.07) for n in range(len(k)))) for i in range(len(q))) / len(q)
    assert len(q_intra) == 2 and len(q_inter) > 20 and terms["chance_inter"] == pytest.approx(math.log(len(q_inter)))
    for name, value in found.items():
        assert float(terms[name]) == pytest.approx(value, rel=2e-3), name
    assert float(L) == pytest.approx(found["L_intra"] + found["L_inter"], rel=2e-3)
    for name, share in (("matched_median", 0.5), ("matched_p90", 0.9)):                     # in metres of view alpha
        assert float(terms[name]) == pytest.approx(float(torch.cat(apart).quantile(share)), rel=1e-3)


def test_beta_is_a_constant_and_the_losses_have_their_weights(batch, monkeypatch):
    """D2: of Eq. 4 only alpha's side learns, of Eq. 7 both; Eq. 8 weighs them."""
    asked, plain = [], simipu.info_nce
    monkeypatch.setattr(simipu, "info_nce", lambda q, k, tau: asked.append((q.requires_grad, k.requires_grad)) or plain(q, k, tau))
    L, terms = SimIPU(replace(TINY, w_intra=0.3, w_inter=2.0))(batch)
    assert asked == [(True, False), (True, True)]
    assert L.item() == pytest.approx(0.3 * terms["L_intra"].item() + 2.0 * terms["L_inter"].item())


def test_two_views_draw_what_is_seen_in_range_and_mirror_the_pictures_with_the_cloud(world):
    frame = data.open_dataset(world, "small").load(0, (48, 128))
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (48, 1))
    frame, matrices, sides = replace(frame, images=[np.stack([ramp] * 3)] * 6), frame.lidar2img, set()
    outside = ~data.visible_points(frame.points, matrices, [(48, 128)] * 6).any(0)
    assert outside.sum() > 100 and (abs(frame.points[~outside, :2]) > 25.6).any(1).sum() > 100
    for seed in range(12):
        view, again = VIEWS(frame, np.random.default_rng(seed)), np.random.default_rng(seed)
        random_transform(again, np.zeros(3), TINY.rotation, TINY.scale)
        factor = min(again.uniform(0.6, 1.2), again.uniform(0.6, 1.2))
        assert all(image.shape[1:] == (round(48 * factor), round(128 * factor)) for image in view.images)
        mirrored = bool(np.linalg.det(view.extra["a2b"][:3, :3]) < 0)
        assert all((image[0, 0, 0] > image[0, 0, -1]) == mirrored for image in view.images)
        sides.add(mirrored)
        assert ((view.points[:, :3] > GRID.low) & (view.points[:, :3] < GRID.high)).all()
        assert data.visible_points(view.points, matrices, [(48, 128)] * 6).any(0).all()
        assert len(np.unique(view.points, axis=0)) == 256
    assert sides == {True, False}


def test_which_loss_teaches_what(batch, model):
    model.train()
    parts = dict(points=model.points, intra=model.head_intra, camera=model.camera, point=model.head_point, image=model.head_image)

    def taught(name):
        model.zero_grad()
        model(batch)[1][name].backward()
        return {part for part, module in parts.items() if any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())}
    assert taught("L_intra") == {"points", "intra"}
    assert taught("L_inter") == {"camera", "point", "image"}                                # the points' head learns: the paper's reading of Eq. 7
    for flags, frozen in ((dict(w_intra=0.), {"points", "intra"}), (dict(w_inter=0.), {"camera", "point", "image"})):
        torch.manual_seed(0)
        other = SimIPU(replace(TINY, **flags))
        other(batch)[0].backward()
        still = {name for name, module in dict(points=other.points, intra=other.head_intra, camera=other.camera, point=other.head_point, image=other.head_image).items()
                 if all(p.grad is None for p in module.parameters())}
        assert still == frozen


def test_every_parameter_learns(batch):
    torch.manual_seed(1)
    model = SimIPU(TINY)
    for module in model.camera.modules():                                                   # residual branches begin at zero
        if hasattr(module, "bn2"):
            torch.nn.init.ones_(module.bn2.weight)
    model(batch)[0].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert idle == [f"head_{kind}.0.6.bias" for kind in ("intra", "point", "image")]           # the batch norm that follows takes them out


def test_a_frame_that_shows_no_point_has_no_pair(world, model):
    dataset, rng = data.open_dataset(world, "small"), np.random.default_rng(0)
    empty = data.select(dataset.load(1, (48, 128)), np.zeros(0, np.int64))
    few = dataset.load(0, (48, 128))
    few = data.select(few, np.flatnonzero(data.visible_points(few.points, few.lidar2img, [(48, 128)] * 6).any(0))[:100])
    frames = [VIEWS(few, rng), VIEWS(empty, rng)]
    assert 0 < len(np.unique(frames[0].points, axis=0)) <= 100 and len(frames[0].points) == 256                          # drawn with repetition
    mixed = data.collate(frames, [0, 1])
    assert not len(cKDTree(frames[1].points[:, :3]).query_pairs(2 * 9.6))                     # nothing in one place, which would be neighbours by the million
    loss, terms = model.train()(mixed)
    assert loss.isfinite() and terms["chance_intra"] == pytest.approx(math.log(16))
    nothing = data.collate([frames[1]], [0])
    other, terms = model(nothing)
    assert other == 0 and not terms["matched_median"]
    for one in (loss, other):
        model.zero_grad()
        one.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert VIEWS(data.select(few, np.arange(3)), rng).extra["seen"] == 0                     # hundreds of copies of three points: slow, and nothing to learn


def test_no_more_pairs_than_asked(batch):
    model = SimIPU(replace(TINY, pairs=10)).eval()
    with torch.no_grad():
        terms = model(batch)[1]
    assert terms["chance_intra"] == terms["chance_inter"] == pytest.approx(math.log(10))


@pytest.mark.slow
def test_two_scenes_are_learned_by_heart(batch):
    torch.manual_seed(0)
    model = SimIPU(TINY)
    opts = [torch.optim.AdamW(model.points.parameters(), 1e-3), torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("points")], 0.03, 0.9)]
    for _ in range(120):
        loss, terms = model(batch)
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
    floor = terms["cell_inter"]
    assert terms["L_intra"] < 0.65 * math.log(32) and terms["L_inter"] < 0.3 * math.log(32) + floor, terms
    assert terms["std_alpha"] > 0.05 and terms["std_image"] > 0.05                          # 0.088 is spread evenly


def test_directions_of_filters():
    assert float(simipu.effective_rank(torch.eye(6).view(6, 2, 3))) == pytest.approx(6) and float(simipu.effective_rank(torch.ones(6, 4))) == pytest.approx(1)
    weight = common.ResNet(18).resnet.conv1.weight
    values = torch.linalg.svdvals(weight.flatten(1).double()) ** 2
    assert 35 < float(simipu.effective_rank(weight)) == pytest.approx(float(values.sum() ** 2 / (values ** 2).sum()), rel=1e-4)


def test_floors_count_the_rows_that_share(batch):
    assert simipu.log_multiplicity(torch.tensor([4, 4, 4, 7])).item() == pytest.approx(3 * math.log(3) / 4)
    assert simipu.log_multiplicity(torch.arange(5)) == 0 and simipu.log_multiplicity(torch.arange(0)) == 0


def test_rows_of_two_frames_share_no_point(world, model):
    frame = VIEWS(data.open_dataset(world, "small").load(0, (48, 128)), np.random.default_rng(0))
    frame.extra["order"][:] = np.arange(256)                                                 # the same rows are drawn in both views
    with torch.no_grad():
        one, two = (model.eval()(data.collate([frame] * n, list(range(n))))[1]["floor_intra"] for n in (1, 2))
    torch.testing.assert_close(one, two)


# ---- the script ----

def test_a_run_s_weights_fit_torchvision_and_the_detector(three_frames, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(common.ResNet(18).resnet.state_dict(), tmp_path / "start.pth")
    flags = ("--data", str(three_frames), "--points", "256", "--zoom-low", "0.4", "--zoom-high", "0.5", "--eval-every", "2", "--steps", "2", "--save-every", "1",
             "--image-init", str(tmp_path / "start.pth"))
    whole = run("simipu.py", tmp_path / "whole", *flags)
    assert whole.returncode == 0 and "loaded 120/120 tensors of the image network" in whole.stdout, whole.stderr[-2000:]
    weights = load_file(tmp_path / "whole" / "backbones.safetensors")
    found = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert f"held-out L_intra {found['L_intra']}" in whole.stdout.splitlines()[-1]
    for name in ("matches", "similarity", "losses"):
        assert (tmp_path / "whole" / "figures" / f"{name}.png").stat().st_size > 10_000
    assert all(name.startswith("camera.resnet.") for name in weights)
    plain = resnet18(weights=None)
    plain.fc = torch.nn.Identity()
    plain.load_state_dict({name.removeprefix("camera.resnet."): value for name, value in weights.items()})              # strict
    other = common.ResNet(18)
    common.load_resnet(tmp_path / "whole", other.resnet, 0)
    assert all(torch.equal(value, weights["camera." + name]) for name, value in other.state_dict().items())
    grid = data.GRIDS["nuscenes", "small"]
    detector = finetune.Detector(finetune.Config(preset="small", modality="camera", **{**finetune.SMALL, "width": 4, "bins": 12}), grid)
    finetune.load_units(tmp_path / "whole", detector, (), ["camera.resnet", "camera.neck", "fuse"], grid, 0)
    assert "loaded camera.resnet 120/120 tensors of step 2" in capsys.readouterr().out
    assert all(torch.equal(value, weights[name]) for name, value in detector.state_dict().items() if name in weights)


@pytest.mark.parametrize("flags, least, most", [(dict(), 40, 64), (dict(optimiser="sgd", lr=0.03), 1, 20)])
def test_the_first_layer_stays_alive_in_the_small_preset(flags, least, most, three_frames, tmp_path):
    """What D11 is for: with the released code's optimiser and two frames a step it is lost at once."""
    simipu.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, steps=4, **flags))
    stem = [json.loads(line)["stem"] for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"stem"' in line]
    assert stem[0] > 40 and least < stem[-1] < most


@pytest.mark.parametrize("flags", [dict(w_intra=0.), dict(w_inter=0.), dict(match="greedy")])
def test_the_ablations_run_to_their_end(flags, three_frames, tmp_path):
    simipu.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, epochs=0, steps=1, batch=1, **flags))
    assert math.isfinite(json.loads((tmp_path / "metrics.json").read_text())["L_intra"])


def test_rates_fall_an_epoch(three_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(simipu, "save_figures", lambda *_: None)
    monkeypatch.setattr(simipu, "loss_curves", lambda *_: None)
    simipu.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, steps=3, batch=1, decay=0.5))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if "lr" in row] == [TINY.lr, TINY.lr, TINY.lr / 2]
    points, rest = (opt["param_groups"][0] for opt in torch.load(tmp_path / "last.pt", weights_only=True)["optimizers"])
    assert (points["lr"], points["betas"], points["weight_decay"]) == (TINY.lr_points / 2, (0.95, 0.99), 0.01) and rest["lr"] == TINY.lr / 2


@pytest.mark.parametrize("flags, told", [(dict(epochs=2), "one of them must be 0"), (dict(points=100), "a multiple of 32"), (dict(w_intra=0., w_inter=0.), "not both 0"),
                                         (dict(zoom_low=3.), "0 < low <= high"), (dict(batch=0), "start at 1"), (dict(scale=1.5), "scale below 1"),
                                         (dict(radius_scale=0.), "positive"), (dict(steps=-5), "the other positive")])
def test_flags_that_cannot_work_are_refused(flags, told, tmp_path):
    with pytest.raises(SystemExit, match=told):
        simipu.train(0, 1, replace(TINY, out=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case, told", [("other depth", "do not fit"), ("cut", "no readable weights"), ("pickle", "no readable weights"),
                                        ("absent", "no readable weights")])
def test_image_weights_that_do_not_fit_are_refused(case, told, tmp_path):
    path = tmp_path / "weights.pth"
    if case != "absent":
        torch.save(print if case == "pickle" else common.ResNet(50).resnet.state_dict(), path)
    if case == "cut":
        path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(SystemExit, match=told):
        common.load_resnet(path, common.ResNet(18).resnet, 0)
