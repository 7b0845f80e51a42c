"""cmcr.py: cuts, masks, pairs, codebook, queries and losses against slow transcriptions and closed forms; which loss teaches what; the script as it is run."""
import copy
import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cmcr
import common
import data
import finetune
from conftest import on_two, run
from cmcr import SMALL, CMCR, Codebook, Config, Views, mask_cells, occupancy_queries, orthogonality, random_crop

GRID = data.GRIDS["nuscenes", "small"]
TINY = Config(preset="small", **{**SMALL, "width": 4, "crop_h": 64, "crop_w": 96, "crop_points": 60, "codes": 16, "pairs": 200, "queries": 90, "mask_images": 0.7})
VIEWS = Views(GRID, TINY)


@pytest.fixture(scope="module")
def batch(world):
    return next(data.loader(str(world), "train", 2, preset="small", augment=VIEWS).begin_at(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CMCR(TINY, GRID, frozen=False)


def pairs_of(batch):
    point, image, uv, _ = common.project(batch.points[:, :3], batch.b_points, batch.lidar2img, batch.hw, batch.size, near=1.0)
    h, w = batch.images.shape[2] // 32, batch.images.shape[3] // 32
    return point, image, uv, (image * h + (uv[:, 1] / 32).long()) * w + (uv[:, 0] / 32).long()


def masked_of(batch, cfg=TINY):
    return mask_cells(batch.cameras, (2, 3), cfg, common.frame_rngs(batch.seeds, torch.device("cpu")))


# ---- cuts and masks ----

@pytest.mark.parametrize("whole", [False, True])
def test_a_cut_keeps_the_points_on_their_colours(world, whole):
    """Pictures are ramps; after cut, resize and mirror (whole: all of Views, the cloud turned), the ramp at a point's pixel is where it was in the whole picture."""
    frame = data.open_dataset(world, "small").load(0)
    v, u = np.meshgrid(np.arange(96), np.arange(256), indexing="ij")
    points = frame.points.copy()
    points[:, 3] = np.arange(len(points)) / 2 ** 16                 # who is who
    frame = data.replace(frame, points=points, images=[np.stack([u, v, 0 * u]).astype(np.uint8)] * 6)
    other = VIEWS(frame, np.random.default_rng(0)) if whole else data.crop_images(frame, [(3, 40, 61, 120)] * 6, [(64, 96)] * 6, [False, True] * 3)
    assert all(image.shape == (3, 64, 96) for image in other.images)
    assert whole != np.allclose(other.points[:, :3], points[(other.points[:, 3] * 2 ** 16).astype(int), :3], atol=0.1)
    rows = points[(other.points[:, 3] * 2 ** 16).astype(int)]
    before, after = (np.c_[xyz[:, :3], np.ones(len(xyz))] @ np.swapaxes(of.lidar2img, 1, 2).astype(float) for xyz, of in ((rows, frame), (other.points, other)))
    met = 0
    for image, a, b in zip(other.images, before, after):
        uv, uv_ = a[:, :2] / a[:, 2:3], b[:, :2] / b[:, 2:3]
        inner = (a[:, 2] > 1) & ((uv_ > 2) & (uv_ < (94, 62))).all(1)
        column, row = uv_[inner].astype(int).T
        np.testing.assert_allclose(image[:2, row, column].T, uv[inner] - 0.5, atol=1.5)
        np.testing.assert_allclose(a[inner, 2], b[inner, 2], rtol=1e-4)
        met += inner.sum()
    assert met > 200


def test_cuts_show_enough_points_or_are_the_middle():
    rng, seen = np.random.default_rng(0), []
    uv = rng.uniform((0, 40), (250, 96), (500, 2))
    for _ in range(50):
        top, left, h, w = random_crop(rng, (96, 256), uv, 96 / 64, TINY)
        assert 0 <= top and top + h <= 96 and 0 <= left and left + w <= 256 and 1.3 < w / h < 1.7
        within = ((uv >= (left, top)) & (uv < (left + w, top + h))).all(1).sum()
        assert within >= 60 or w * h > 0.9 * 96 * 130
        seen.append((h / 96) ** 2)                                  # share of the largest part of its aspect, which is as high as the picture
    assert 0.28 < min(seen) < 0.45 and max(seen) > 0.9
    apart = np.concatenate([np.tile([(0., 0)], (500, 1)), np.tile([(255., 95)], (500, 1))])                                 # no cut shows three quarters of these
    top, left, h, w = random_crop(rng, (96, 256), apart, 96 / 64, replace(TINY, crop_points=1000))
    assert h >= 95 and (top, left) == ((96 - h) // 2, (256 - w) // 2)
    assert random_crop(rng, (96, 256), np.zeros((0, 2)), 1.5, TINY)[2] > 0                                                   # a camera without points


def test_masks_hide_exactly_half_of_the_cells_of_some_pictures():
    cfg, rngs = Config(), [torch.Generator().manual_seed(i) for i in range(40)]
    masked = mask_cells(6, (7, 13), cfg, rngs)
    count = masked.flatten(1).sum(1)
    assert masked.shape == (240, 7, 13) and set(count.tolist()) == {0, round(0.5 * 91)}
    assert 0.4 < (count > 0).float().mean() < 0.6
    assert 0.4 < masked[count > 0].float().mean(0).min() + 0.1 and masked[count > 0].float().mean(0).max() < 0.68            # every cell alike
    assert torch.equal(mask_cells(6, (7, 13), cfg, [torch.Generator().manual_seed(3)]), masked[18:24])                       # a frame's own stream


def test_what_is_hidden_does_not_reach_the_network_and_its_change_is_not_seen(batch, model):
    model.eval()
    masked = masked_of(batch)
    cover = masked.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    assert masked.any() and not masked.all()
    other = torch.where(cover, 255 - batch.images, batch.images)
    for a, b in zip(model.images_2d(batch.images, masked), model.images_2d(other, masked)):
        assert torch.equal(a, b)
    visible = replace(batch, images=torch.where(cover, batch.images, 255 - batch.images))
    shown = [model.images_2d(x.images, masked)[1] for x in (batch, visible)]
    assert not torch.equal(*shown)
    with torch.no_grad():
        terms, changed = model(batch)[1], model(replace(batch, images=other))[1]
    assert changed["L_rec"] != terms["L_rec"] and changed["L_NCE"] == terms["L_NCE"]


# ---- points, pairs ----

def test_point_features_are_those_of_the_nearest_site_of_each_level(batch, model):
    levels = model.lidar(batch.points, batch.b_points)
    found = model.lidar.point_features(levels, batch.points, batch.b_points)
    assert found.shape == (len(batch.points), 15 * 4)
    low, voxel = torch.tensor(GRID.low), torch.tensor(GRID.voxel)
    middle, at = low + (((batch.points[:, :3] - low) / voxel).floor() + 0.5) * voxel, 0                # of each point's voxel
    for level in levels:
        centre, width = level.centre(), level.features.shape[1]
        for n in range(0, len(batch.points), 97):
            mine = (level.coords[:, 0] == batch.b_points[n]).nonzero()[:, 0]
            gap = ((centre[mine] - middle[n]) / torch.tensor(level.cells.step)).abs().amax(1)
            assert gap.min() < 0.501 or level is levels[-1] or level is levels[-2]          # at the border the last cell's centre is farther
            assert any(torch.equal(found[n, at:at + width], level.features[m]) for m in mine[gap < gap.min() + 1e-3])
        at += width


def test_pairs_are_distinct_visible_and_of_one_frame(batch, model):
    point, image, uv, cell = model.pairs(batch)
    assert all(torch.equal(a, b) for a, b in zip((point, image, uv, cell), pairs_of(batch)))
    assert (batch.b_points[point] == image // 6).all() and len(torch.unique(point * 100 + image)) == len(point)
    masked_flat = masked_of(batch).flatten()[cell]
    shown = ~masked_flat
    assert shown.any() and masked_flat.any()
    chosen = common.random_subset(TINY.pairs, shown.nonzero()[:, 0], torch.Generator().manual_seed(0))
    assert len(chosen) == TINY.pairs == len(chosen.unique()) and not masked_flat[chosen].any()
    everything = common.random_subset(10**6, shown.nonzero()[:, 0], torch.Generator().manual_seed(0))
    assert len(everything.unique()) == shown.sum()                                          # the release comes to two a camera
    with torch.no_grad():
        assert model.eval()(batch)[1]["distinct"] == 1


@pytest.mark.parametrize("name, most", [("nuscenes", math.pi), ("kitti", math.pi / 4)])
def test_clouds_are_rotated_and_mirrored_as_the_range_allows_pictures_each_by_itself(world, name, most):
    frame = data.open_dataset(world, "small").load(0)
    points, ramp = frame.points[frame.points[:, 4] == 0], np.tile(np.arange(256, dtype=np.uint8), (96, 1))
    points[:, 3] = np.arange(len(points)) / 2 ** 16                                         # who is who
    frame, views = replace(frame, points=points, images=[np.stack([ramp] * 3)] * 6), Views(data.GRIDS[name, "small"], TINY)
    angles, flips, coins = [], set(), []
    for seed in range(16):
        viewed = views(frame, np.random.default_rng(seed))
        rows = points[(viewed.points[:, 3] * 2 ** 16).astype(int)]
        linear = np.linalg.lstsq(rows[:, :2], viewed.points[:, :2], rcond=None)[0].T         # mirror @ rotation
        flip = bool(np.linalg.det(linear) < 0)
        flips.add(flip)
        turned = np.diag([1, -1 if flip else 1]) @ linear                                    # where only y may be mirrored
        angles.append(abs(math.atan2(turned[1, 0], turned[0, 0])))
        coins += [image[0, 0, 0] > image[0, 0, -1] for image in viewed.images]
    assert most / 2 < max(angles) <= most + 1e-3 and flips == {True, False} and 0.25 < np.mean(coins) < 0.75


# ---- codebook ----

def test_codes_follow_the_closed_form():
    torch.manual_seed(0)
    book, (p, v) = Codebook(5, 8, 0.9), F.normalize(torch.randn(2, 30, 8), dim=2)
    a, b = book.nearest(p), book.nearest(v)
    assert a.tolist() == [int(((book.codes - row) ** 2).sum(1).argmin()) for row in p]
    start, sums = book.total.clone(), torch.zeros(5, 8)
    for i in range(30):                                                                     # the formula, pair by pair
        sums[a[i]] += (p[i] + v[i]) / 2
        sums[b[i]] += (p[i] + v[i]) / 2
    swapped = Codebook(5, 8, 0.9)
    swapped.load_state_dict(book.state_dict())
    swapped.update(v, p, b, a)
    for _ in range(7):
        book.update(p, v, a, b)
    torch.testing.assert_close(book.total, 0.9 ** 7 * start + (1 - 0.9 ** 7) * sums)
    torch.testing.assert_close(book.codes, F.normalize(book.total, dim=1))
    torch.testing.assert_close(swapped.total, 0.9 * start + 0.1 * sums)
    idle = [k for k in range(5) if k not in a.tolist() + b.tolist()]
    book.update(p[:0], v[:0], a[:0], b[:0])
    assert book.codes.isfinite().all() and all(torch.allclose(book.codes[k], start[k]) for k in idle)


def test_quantising_is_straight_through_and_commitment_pulls_features_only():
    book = Codebook(6, 4, 0.9)
    x = F.normalize(torch.randn(10, 4), dim=1).requires_grad_()
    y = book.quantise(x)
    torch.testing.assert_close(y, book.codes[book.nearest(x)])
    pull = torch.randn(10, 4)
    (y * pull).sum().backward()
    torch.testing.assert_close(x.grad, pull)
    book.codes.copy_(torch.eye(6, 4))
    v = torch.eye(4)[1:2].requires_grad_()
    loss = book.commitment(v, own=torch.tensor([1]), other=torch.tensor([0]), beta=0.25)   # v on its own code, the partner's is orthogonal
    assert loss.item() == pytest.approx(0.25 * 2 / 4)
    assert book.commitment(v, torch.tensor([0]), torch.tensor([1]), 0.25).item() == pytest.approx(2 * 0.25 * 2 / 4)
    loss.sum().backward()
    assert v.grad.abs().sum() > 0 and not book.codes.requires_grad


def test_the_codebook_is_saved_and_rests_when_it_is_looked_at(batch, model):
    assert {"codebook.codes", "codebook.total"} <= model.state_dict().keys() and not [n for n, _ in model.named_parameters() if "codebook" in n]
    before = model.codebook.codes.clone()
    with torch.no_grad():
        model.eval()(batch)
        assert torch.equal(model.codebook.codes, before)
        model.train()(batch)
    assert not torch.equal(model.codebook.codes, before)


def test_a_step_reads_the_codes_before_its_update(batch, model):
    model.train()
    still = copy.deepcopy(model)
    still.codebook.update = lambda *_: None
    (L, terms), (expected, wanted) = model(batch), still(batch)
    assert not torch.equal(model.codebook.codes, still.codebook.codes)
    assert torch.equal(L, expected) and all(float(value) == float(wanted[name]) for name, value in terms.items())


def test_codes_stay_of_unit_length(batch, model):
    model.train()(batch)
    torch.testing.assert_close(model.codebook.codes.norm(dim=1), torch.ones(16))


def three_updates(rank):
    book, p, v = codebook_case()
    mine = slice(0, 7) if rank == 0 else slice(7, 30)
    for _ in range(3):
        book.update(p[mine], v[mine], book.nearest(p[mine]), book.nearest(v[mine]))
    return book.state_dict()


def codebook_case():
    torch.manual_seed(5)
    return Codebook(9, 16, 0.9), *F.normalize(torch.randn(2, 30, 16), dim=2)


def test_two_processes_make_the_codebook_of_one(server, tmp_path):
    book, p, v = codebook_case()
    for _ in range(3):
        book.update(p, v, book.nearest(p), book.nearest(v))
    for found in on_two(server, three_updates, tmp_path):
        for name, value in book.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def orthogonality_case(mine):
    torch.manual_seed(6)
    shared, specific = (x.requires_grad_() for x in torch.randn(2, 30, 4, dtype=torch.float64))
    loss = orthogonality(shared[mine], specific[mine])
    loss.backward()
    return loss.detach(), shared.grad, specific.grad


def half_of_it(rank):
    loss, *grads = orthogonality_case(slice(0, 7) if rank == 0 else slice(7, 30))
    return loss, *(grad / 2 for grad in grads)                                              # DDP's average over two processes


def test_two_processes_have_the_orthogonality_of_one(server, tmp_path):
    parts, whole = on_two(server, half_of_it, tmp_path), orthogonality_case(slice(None))
    for n in range(3):
        torch.testing.assert_close(parts[0][n] + parts[1][n] if n else parts[0][n], whole[n])


# ---- occupancy ----

def test_points_of_other_lasers_stay_and_are_no_rays(world):
    """Waymo's side lasers: 0.001 s of age. Were they taken for rays from the origin, queries would lie on them."""
    frame = data.open_dataset(world, "small").load(0, (48, 128))
    points = frame.points[frame.points[:, 4] == 0]
    points[np.linalg.norm(points[:, :2], axis=1) > 10, 4] = 0.001
    viewed = VIEWS(replace(frame, points=points), np.random.default_rng(0))
    far_points, far_queries = (np.linalg.norm(x[:, :2], axis=1) > 10.1 for x in (viewed.points, viewed.extra["queries"]))
    assert far_points.sum() > 300 and not far_queries.any() and len(far_queries) == TINY.queries


def test_queries_lie_behind_before_and_far_before_their_points():
    rng = np.random.default_rng(0)
    origin = np.array([1., 2., 0.5])
    yz = rng.uniform(-8, 8, (300, 2))
    wall = np.column_stack([np.full(300, 10.), yz]).astype(np.float32)                      # the plane x = 10
    place, occupied, intensity = occupancy_queries(wall, np.linspace(0, 1, 300), origin, 2048, 0.1, rng)
    assert occupied.sum() == 684 and (intensity == -1).sum() == 682 and len(place) == 2048
    assert place.dtype == occupied.dtype == intensity.dtype == np.float32
    for n, q in enumerate(place):
        hit = origin + (q - origin) * (10 - origin[0]) / (q[0] - origin[0])                # where the query's ray meets the wall
        assert np.abs(wall[:, 1:] - hit[1:]).max(1).min() < 2e-3
        gap = np.linalg.norm(q - origin) - np.linalg.norm(hit - origin)
        if occupied[n]:
            assert -1e-4 <= gap <= 0.1001
        elif intensity[n] >= 0:
            assert -0.1001 <= gap <= 1e-4
        else:
            assert gap < 1e-4
    assert (np.linalg.norm(place - origin, axis=1)[intensity == -1] < 5).mean() > 0.3
    for cloud in (wall[:0], np.zeros((1, 3), np.float32)):
        found = occupancy_queries(cloud, np.zeros(len(cloud)), np.zeros(3), 30, 0.1, rng)
        assert len(found[0]) == 30 * len(cloud) and np.isfinite(found[0]).all()


def test_neighbours_are_the_nearest_within_reach_of_the_same_frame(batch):
    near = batch.extra["neighbours"]
    assert near.shape == (180, 32)
    first = [0, int((batch.b_points == 0).sum())]
    for q in range(0, 180, 7):
        b = int(batch.extra["b_neighbours"][q])
        xyz = batch.points[batch.b_points == b, :3]
        distance = (xyz - batch.extra["queries"][q]).norm(dim=1)
        expected = distance.argsort()[:32]
        expected = expected[distance[expected] < 1.0]
        found = near[q][near[q] >= 0]
        assert len(found) == len(expected)
        torch.testing.assert_close(distance[found], distance[expected], atol=1e-5, rtol=1e-5)
    assert first[1] > 0 and (near >= 0).any() and (near < 0).any()


def test_moving_points_and_queries_together_changes_nothing(batch, model):
    Z, shift = torch.randn(len(batch.points), 64), torch.tensor([3., -1., 0.2])
    moved = replace(batch, points=batch.points + F.pad(shift, (0, 2)), extra={**batch.extra, "queries": batch.extra["queries"] + shift})
    with torch.no_grad():
        (a, query), (b, _) = model.decode_queries(Z, batch), model.decode_queries(Z, moved)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(query) == (batch.extra["neighbours"] >= 0).sum()


# ---- all losses ----

def test_every_loss_written_out(batch, model):
    """The forward against loops over pairs, cells, pixels and edges."""
    model.eval()
    with torch.no_grad():
        L, terms = model(batch)
        masked = masked_of(batch)
        codes, cfg = model.codebook.codes, TINY

        def nearest(x):
            return int((codes @ x).argmax())
        f = model.lidar.point_features(model.lidar(batch.points, batch.b_points), batch.points, batch.b_points)
        F_3D, G_3D = F.normalize(model.shared_3d(f), dim=1), model.specific_3d(f)
        black = batch.images.clone()
        for n, r, c in masked.nonzero().tolist():
            black[n, :, 32 * r:32 * r + 32, 32 * c:32 * c + 32] = 0
        c5 = model.teacher.stages(black)[-1]
        shared, G_2D = model.shared_2d(c5), model.specific_2d(c5)
        point, image, uv, cell = pairs_of(batch)
        rngs = common.frame_rngs(batch.seeds, torch.device("cpu"))
        mask_cells(batch.cameras, (2, 3), cfg, rngs)
        chosen = common.random_subset(TINY.pairs, (~masked.flatten()[cell]).nonzero()[:, 0], rngs[0])
        p, q = F_3D[point[chosen]], []
        for n in chosen.tolist():
            u, v = uv[n].tolist()
            at = torch.tensor([[[[2 * u / 96 - 1, 2 * v / 64 - 1]]]])
            q.append(F.normalize(F.grid_sample(shared[image[n]][None], at, padding_mode="border", align_corners=False)[0, :, 0, 0], dim=0))
        q = torch.stack(q)
        part = (p.double() @ q.double().t() / 0.07).exp()
        expected = dict(L_NCE=-sum(math.log(part[i, i] / part[i].sum()) for i in range(len(p))) / len(p))
        a, b = [nearest(x) for x in p], [nearest(x) for x in q]
        for name, x, own, other in (("L_c3D", p, a, b), ("L_c2D", q, b, a)):
            expected[name] = sum(0.25 * float(2 * (x[i] - codes[own[i]]).square().mean() + (x[i] - codes[other[i]]).square().mean()) for i in range(len(x))) / len(x)
        expected["agreement"] = sum(m == n for m, n in zip(a, b)) / len(a)

        Z = torch.zeros(len(masked), 64, 2, 3)
        held = 0
        for n, r, c in torch.cartesian_prod(torch.arange(len(masked)), torch.arange(2), torch.arange(3)).tolist():
            value = codes[nearest(F.normalize(shared[n, :, r, c], dim=0))]
            if masked[n, r, c]:
                mine = point[cell == (n * 2 + r) * 3 + c]
                value = codes[nearest(F_3D[mine].mean(0))] if len(mine) else model.token
                held += len(mine) > 0
            Z[n, :, r, c] = value + G_2D[n, :, r, c]
        expected["covered"] = held / int(masked.sum())
        error, guess, count = 0.0, 0.0, 0
        for n in masked.flatten(1).any(1).nonzero()[:, 0].tolist():
            rebuilt = model.paint(F.interpolate(Z[n][None], size=(64, 96), mode="bilinear", align_corners=False))[0]
            picture = batch.images[n].float() / 255
            mean = torch.stack([picture[:, 32 * r:32 * r + 32, 32 * c:32 * c + 32].mean((1, 2)) for r, c in (~masked[n]).nonzero().tolist()]).mean(0)
            for r, c in masked[n].nonzero().tolist():
                window = np.s_[:, 32 * r:32 * r + 32, 32 * c:32 * c + 32]
                error += float((rebuilt[window] - picture[window]).square().sum())
                guess += float((mean[:, None, None] - picture[window]).square().sum())
                count += 3 * 32 * 32
        expected |= dict(L_rec=error / count, guess_rec=guess / count)

        Z_3D = G_3D + torch.stack([codes[nearest(x)] for x in F_3D])
        bce, l1, edges, known, ones, start = 0.0, 0.0, 0, 0, 0, [0, int((batch.b_points == 0).sum())]
        for n in range(180):
            for k in batch.extra["neighbours"][n].tolist():
                if k >= 0:
                    s = k + start[int(batch.extra["b_neighbours"][n])]
                    logit, value = model.occupancy(torch.cat([Z_3D[s], batch.extra["queries"][n] - batch.points[s, :3]])).tolist()
                    label, intensity = float(batch.extra["occupied"][n]), float(batch.extra["intensity"][n])
                    bce += math.log1p(math.exp(-logit)) if label else math.log1p(math.exp(logit))
                    edges, ones = edges + 1, ones + label
                    if intensity >= 0:
                        l1, known = l1 + abs(value - intensity), known + 1
        expected |= dict(L_occ=bce / edges, L_int=l1 / known, edges=edges,
                         chance_occ=-(ones * math.log(ones / edges) + (edges - ones) * math.log(1 - ones / edges)) / edges)
        shown = ~masked
        cells = [(shared[n, :, r, c], G_2D[n, :, r, c]) for n, r, c in shown.nonzero().tolist()]
        expected["L_orth"] = 0.0
        for rows in (list(zip(F_3D, G_3D)), cells):
            matrix = sum(torch.outer(F.normalize(x, dim=0), F.normalize(y, dim=0)) for x, y in rows)
            expected["L_orth"] += float(matrix.square().sum().sqrt()) / len(rows)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=2e-3, abs=1e-5), name
    total = sum(expected[name] for name in ("L_NCE", "L_c3D", "L_c2D", "L_rec", "L_occ", "L_int")) + 1.2 * expected["L_orth"]
    assert float(L) == pytest.approx(total, rel=2e-3) and terms["chance"] == pytest.approx(math.log(200))


def test_orthogonality_has_its_closed_forms():
    x, sign = torch.randn(40, 6), torch.tensor([[1.], [-1.]]).repeat(20, 1)
    alike = x[:20].repeat_interleave(2, 0)
    assert orthogonality(alike, alike * sign) < 1e-6                                        # as often along as against: nothing in common
    assert orthogonality(F.pad(x, (0, 6)), F.pad(x, (6, 0))) > 0.1                          # but not if one tells the other, in other columns
    one = torch.eye(6)[:1].expand(50, -1)
    assert orthogonality(one, one).item() == pytest.approx(1) and orthogonality(one[:5], one[:5]).item() == pytest.approx(1)
    assert orthogonality(x[:0], x[:0]) == 0
    torch.testing.assert_close(orthogonality(x.repeat(5, 1), x.repeat(5, 1)), orthogonality(x, x))        # whatever the batch


PARTS = dict(trunk="lidar.", shared_3d="shared_3d.", specific_3d="specific_3d.", teacher="teacher.", shared_2d="shared_2d.", specific_2d="specific_2d.",
             paint="paint.", occupancy="occupancy.", token="token")
REACH = dict(L_NCE={"trunk", "shared_3d", "shared_2d"}, L_c3D={"trunk", "shared_3d"}, L_c2D={"shared_2d"},
             L_rec={"trunk", "shared_3d", "shared_2d", "specific_2d", "paint", "token"}, L_occ={"trunk", "shared_3d", "specific_3d", "occupancy"},
             L_int={"trunk", "shared_3d", "specific_3d", "occupancy"}, L_orth={"trunk", "shared_3d", "specific_3d", "shared_2d", "specific_2d"})


@pytest.mark.parametrize("frozen", [True, False])
def test_which_loss_teaches_what(batch, frozen):
    """With a trained teacher, what reaches a head of the image reaches the teacher too; a frozen one is never reached."""
    torch.manual_seed(0)
    model = CMCR(TINY, GRID, frozen)
    for name, parts in REACH.items():
        model.zero_grad()
        model(batch)[1][name].backward()
        reached = {part for part, prefix in PARTS.items() for n, p in model.named_parameters() if n.startswith(prefix) and p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == parts | ({"teacher"} if not frozen and parts & {"shared_2d", "specific_2d"} else set()), name


def test_the_reconstruction_reaches_the_points_through_the_replacement_alone(batch, model):
    """Gradient goes to the features of exactly the points that fall on a masked cell; without the replacement to none."""
    masked = masked_of(batch)
    point, image, _, cell = pairs_of(batch)
    for without in ("", "replacement"):
        model.cfg = replace(TINY, without=without)
        shared = F.normalize(torch.randn(len(batch.points), 64), dim=1).requires_grad_()
        _, F_2D, G_2D = model.images_2d(batch.images, masked)
        model.rebuild(masked, F_2D, G_2D, shared, point, cell)[0].square().sum().backward()
        reached = set() if shared.grad is None else set(shared.grad.abs().sum(1).nonzero()[:, 0].tolist())
        assert reached == (set(point[masked.flatten()[cell]].tolist()) if not without else set()), without


def test_a_frozen_teacher_stays_as_it_is(batch):
    torch.manual_seed(0)
    model = CMCR(TINY, GRID, frozen=True)
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):                                              # as a run that is taken up again does: no evaluation has called train() before
        model(batch)[0].backward()
        opt.step()
    assert not model.teacher.training and all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("without, gone", [("replacement", "token"), ("codebook", "codebook"), ("specific", "specific")])
def test_ablations_leave_nothing_idle(batch, without, gone):
    model = CMCR(replace(TINY, without=without), GRID, frozen=True)
    assert not [name for name in model.state_dict() if name.startswith(gone)]
    loss, terms = model(batch)
    loss.backward()
    assert loss.isfinite() and [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_frames_without_points_or_masks_are_fine(world):
    dataset, rng = data.open_dataset(world, "small"), np.random.default_rng(0)
    full, empty = VIEWS(dataset.load(0), rng), VIEWS(data.select(dataset.load(1), np.zeros(0, np.int64)), rng)
    assert empty.extra["neighbours"].shape == (0, 32)
    for frames, share in (([full, empty], 0.7), ([empty], 1.0), ([full], 0.0)):
        model = CMCR(replace(TINY, mask_images=share), GRID, frozen=True)
        loss, terms = model(data.collate(frames, list(range(len(frames)))))
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        if share == 0:
            assert terms["L_rec"] == 0 and terms["covered"] == 0


@pytest.mark.slow
def test_one_scene_is_learned_by_heart(batch):
    torch.manual_seed(0)
    model = CMCR(replace(TINY, momentum=0.9), GRID, frozen=True)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = None
    for _ in range(25):
        loss, terms = model(batch)
        first = first or {k: float(v) for k, v in terms.items()}
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert terms["L_occ"] < 0.8 * math.log(2) and terms["L_NCE"] < first["L_NCE"] - 1 and terms["L_rec"] < 0.9 * first["L_rec"], (first, terms)
    assert terms["L_orth"] < first["L_orth"]


# ---- teacher ----

def test_the_published_teacher_is_checked_and_its_absence_explained(tmp_path, monkeypatch):
    torch.manual_seed(0)
    published, resnet = common.ResNet(18).resnet, common.ResNet(18).resnet
    path = tmp_path / "teachers" / "moco_v2_800ep_pretrain.pth.tar"

    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit, match=r"could not be fetched \(no network\). Put that file at .*teachers.moco_v2_800ep_pretrain.pth.tar"):
        cmcr.load_teacher("moco", resnet, 0, tmp_path)
    assert not path.exists()

    def fetched(url, place, progress):
        weights = {f"module.encoder_q.{k}": v for k, v in published.state_dict().items()}
        torch.save(dict(epoch=800, state_dict={**weights, "module.encoder_q.fc.0.weight": torch.zeros(3), "module.queue": torch.zeros(2)}), place)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetched)
    with pytest.raises(SystemExit, match="expected a04e12f8; delete it"):
        cmcr.load_teacher("moco", resnet, 0, tmp_path)
    monkeypatch.setattr(cmcr, "MOCO", (cmcr.MOCO[0], hashlib.md5(path.read_bytes()).hexdigest()[:8]))
    cmcr.load_teacher("moco", resnet, 0, tmp_path)
    assert all(torch.equal(v, published.state_dict()[k]) for k, v in resnet.state_dict().items())


# ---- the script ----

def test_the_script_and_what_is_built_on_it(three_frames, tmp_path, capsys):
    flags = ("--data", str(three_frames), "--teacher", "none", "--crop-h", "64", "--crop-w", "96", "--crop-points", "60", "--pairs", "200", "--queries", "90",
             "--eval-every", "2", "--steps", "2", "--save-every", "1")
    whole = run("cmcr.py", tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr[-2000:]
    found = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert f"val L_NCE {found['L_NCE']}" in whole.stdout.splitlines()[-1]
    for name in ("codes", "occupancy", "losses"):
        assert (tmp_path / "whole" / "figures" / f"{name}.png").stat().st_size > 10_000
    detector = finetune.Detector(finetune.Config(preset="small", modality="lidar", **{**finetune.SMALL, "width": 4, "bins": 12}), GRID)
    finetune.load_units(tmp_path / "whole", detector, (), ["lidar", "fuse"], GRID, 0)
    assert "loaded lidar 120/120 tensors of step 2" in capsys.readouterr().out


def test_the_rate_ends_where_it_was_asked_to_and_the_small_preset_needs_no_download(three_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(cmcr, "save_figure", lambda *_: None)
    monkeypatch.setattr(cmcr, "loss_curves", lambda *_, **__: None)
    cmcr.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, steps=2, lr_end=0.2))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx([TINY.lr, 0.6 * TINY.lr])


@pytest.mark.parametrize("flags, told", [(dict(epochs=2), "one of them must be 0"), (dict(crop_h=100), "multiples of 32"), (dict(codes=1), "--without codebook"),
                                         (dict(mask_cells=1.5), "0 to 1"), (dict(teacher="moco"), "is a ResNet-50"), (dict(batch=0, teacher="none"), "start at 1"),
                                         (dict(rotation=-1.0, teacher="none"), "starts at 0"), (dict(query_radius=0.0, teacher="none"), "positive"),
                                         (dict(steps=-5), "the other positive"), (dict(teacher="nowhere.pth"), "no readable weights")])
def test_flags_that_cannot_work_are_refused(flags, told, three_frames, tmp_path):
    with pytest.raises(SystemExit, match=told):
        cmcr.train(0, 1, replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()
