"""cmcr.py against slow transcriptions and closed forms.

Crops, masks, pairs, the codebook, queries and all losses; which loss teaches what; the script as
it is run. Readers of the paper begin at "each loss in plain loops".
"""
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
from cmcr import (
    CMCR, SMALL, Codebook, Config, Views, mask_cells, occupancy_queries, orthogonality, random_crop,
)
from conftest import Waits, on_two, run

GRID = data.GRIDS["nuscenes", "small"]
TINY = Config(preset="small", **{
    **SMALL, "width": 4, "crop_h": 64, "crop_w": 96, "crop_points": 60, "codes": 16,
    "pairs": 200, "queries": 90, "mask_images": 0.7})
VIEWS = Views(GRID, TINY)


@pytest.fixture(scope="module")
def batch(world):
    loader = data.loader(str(world), "train", 2, preset="small", augment=VIEWS)
    return next(loader.begin_at(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CMCR(TINY, GRID, frozen=False)


def pairs_of(batch):
    """What CMCR.pairs should give: point, image, uv, cell."""
    point, image, uv, _ = common.project(batch.points[:, :3], batch.counts, batch.lidar2img,
                                         batch.hw, near=1.0)
    h, w = (size // 32 for size in batch.images.shape[2:])
    row = (uv[:, 1] / 32).long()
    column = (uv[:, 0] / 32).long()
    return point, image, uv, (image * h + row) * w + column


def masked_of(batch, cfg=TINY):
    """The masks (B K, 2, 3) that the forward draws for this batch."""
    rngs = common.frame_rngs(batch.seeds, torch.device("cpu"))
    return mask_cells(batch.cameras, (2, 3), cfg, rngs)


# ---- each loss in plain loops --------------------------------------------------------
# Written as the paper's overview figure and the released code have them: one pair, cell, pixel,
# edge at a time. test_every_loss_matches_plain_loops holds CMCR.forward to them.

def nearest_code(x, codes):
    """The code with the greatest cosine to the feature x (D,), of any length -> its row."""
    return int((codes @ x).argmax())


def contrast(p, q, tau=0.07):
    """L_NCE = -1/M sum_i log ( exp(p_i q_i / tau) / sum_j exp(p_i q_j / tau) )"""
    loss = 0.0
    for i in range(len(p)):
        likeness = (q.double() @ p[i].double() / tau).exp()     # (M,) of point i to every pixel
        loss -= math.log(likeness[i] / likeness.sum())
    return loss / len(p)


def commitment(x, own, other, codes, beta=0.25):
    """L_c = beta/M sum_i ( 2 |x_i - e_own|^2 + |x_i - e_other|^2 ) / D"""
    loss = 0.0
    for i in range(len(x)):
        to_own = (x[i] - codes[own[i]]).square().mean()
        to_other = (x[i] - codes[other[i]]).square().mean()
        loss += float(beta * (2 * to_own + to_other))
    return loss / len(x)


def cell_codes(masked, shared, F_3D, point, cell, codes, token):
    """The code of each cell: of its own feature, of its points where it is masked, or the token.

    -> F-bar^2D (B K, D, h, w), the share of masked cells that some point falls in.
    """
    n, h, w = masked.shape
    F_bar = torch.zeros(n, shared.shape[1], h, w)
    covered = 0
    for k in range(n):
        for r in range(h):
            for c in range(w):
                points = point[cell == (k * h + r) * w + c]
                if not masked[k, r, c]:
                    feature = F.normalize(shared[k, :, r, c], dim=0)
                    F_bar[k, :, r, c] = codes[nearest_code(feature, codes)]
                elif len(points):
                    F_bar[k, :, r, c] = codes[nearest_code(F_3D[points].mean(0), codes)]
                    covered += 1
                else:
                    F_bar[k, :, r, c] = token
    return F_bar, covered / int(masked.sum())


def cell_window(r, c):
    """The pixels of cell (r, c) of an image (3, H, W)."""
    return np.s_[:, 32 * r:32 * r + 32, 32 * c:32 * c + 32]


def reconstruction(masked, images, Z, paint):
    """L_rec = mean over masked pixels of (rebuilt - truth)^2; guess_rec: of the visible mean."""
    error = 0.0
    guess = 0.0
    count = 0
    for k in masked.flatten(1).any(1).nonzero()[:, 0].tolist():
        enlarged = F.interpolate(Z[k][None], size=(64, 96), mode="bilinear", align_corners=False)
        rebuilt = paint(enlarged)[0]
        truth = images[k].float() / 255
        colours = [truth[cell_window(r, c)].mean((1, 2))
                   for r, c in (~masked[k]).nonzero().tolist()]
        mean = torch.stack(colours).mean(0)[:, None, None]
        for r, c in masked[k].nonzero().tolist():
            window = cell_window(r, c)
            error += float((rebuilt[window] - truth[window]).square().sum())
            guess += float((mean - truth[window]).square().sum())
            count += 3 * 32 * 32
    return dict(L_rec=error / count, guess_rec=guess / count)


def points_near(batch, frame, query):
    """The points that the loader joined to a query of a frame: rows of that frame's points."""
    edges = batch.extra["edges"][batch.extra["b_edges"] == frame]
    return edges[edges[:, 0] == query, 1].tolist()


def occupancy(batch, Z_3D, decoder):
    """L_occ, L_int = means over edges (query, near point) of the decoder's two errors.

    The decoder reads the point's Z^3D and the query's place relative to the point. The errors are
    the binary cross-entropy of "occupied?" and |intensity - truth| where the truth is known.
    """
    # row of the first point and of the first query of each frame
    first = [0, int((batch.b_points == 0).sum())]
    first_query = [0, int((batch.extra["b_queries"] == 0).sum())]
    bce = 0.0
    l1 = 0.0
    edges = 0
    known = 0
    occupied = 0
    for query, place in enumerate(batch.extra["queries"]):
        frame = int(batch.extra["b_queries"][query])
        label = float(batch.extra["occupied"][query])
        intensity = float(batch.extra["intensity"][query])
        for k in points_near(batch, frame, query - first_query[frame]):
            point = first[frame] + k
            offset = place - batch.points[point, :3]
            logit, value = decoder(torch.cat([Z_3D[point], offset])).tolist()
            bce += math.log1p(math.exp(-logit if label else logit))
            edges += 1
            occupied += label
            if intensity >= 0:
                l1 += abs(value - intensity)
                known += 1
    share = occupied / edges
    chance = -share * math.log(share) - (1 - share) * math.log(1 - share)
    return dict(L_occ=bce / edges, L_int=l1 / known, edges=edges, chance_occ=chance)


def frobenius(rows):
    """|| sum_n f_n g_n^T ||_F / N over unit rows (f_n, g_n)"""
    matrix = sum(torch.outer(F.normalize(f, dim=0), F.normalize(g, dim=0)) for f, g in rows)
    return float(matrix.square().sum().sqrt()) / len(rows)


@torch.no_grad()
def test_every_loss_matches_plain_loops(batch, model):
    model.eval()
    L, terms = model(batch)
    codes = model.codebook.codes
    expected = {}

    # 1 features: points from the trunk, cells from images whose masked cells are black
    masked = masked_of(batch)
    levels = model.lidar(batch.points, batch.b_points, batch.size)
    f = model.lidar.point_features(levels, batch.points, batch.b_points)
    F_3D = F.normalize(model.shared_3d(f), dim=1)
    G_3D = model.specific_3d(f)
    black = batch.images.clone()
    for k, r, c in masked.nonzero().tolist():
        black[k][cell_window(r, c)] = 0
    c5 = model.teacher.stages(black)[-1]
    shared = model.shared_2d(c5)
    G_2D = model.specific_2d(c5)

    # 2 contrast and commitment of the drawn pairs
    point, image, uv, cell = pairs_of(batch)
    rngs = common.frame_rngs(batch.seeds, torch.device("cpu"))
    mask_cells(batch.cameras, (2, 3), TINY, rngs)           # the masks are drawn first
    visible = (~masked.flatten()[cell]).nonzero()[:, 0]
    chosen = common.random_subset(TINY.pairs, visible, rngs[0])
    p = F_3D[point[chosen]]
    q = []
    for n in chosen.tolist():
        u, v = uv[n].tolist()
        place = torch.tensor([[[[2 * u / 96 - 1, 2 * v / 64 - 1]]]])
        feature = F.grid_sample(shared[image[n]][None], place, padding_mode="border",
                                align_corners=False)
        q.append(F.normalize(feature[0, :, 0, 0], dim=0))
    q = torch.stack(q)
    a = [nearest_code(x, codes) for x in p]
    b = [nearest_code(x, codes) for x in q]
    expected["L_NCE"] = contrast(p, q)
    expected["L_c3D"] = commitment(p, a, b, codes)
    expected["L_c2D"] = commitment(q, b, a, codes)
    expected["agreement"] = sum(m == n for m, n in zip(a, b)) / len(a)

    # 3a masked pixels
    F_bar, expected["covered"] = cell_codes(masked, shared, F_3D, point, cell, codes, model.token)
    expected |= reconstruction(masked, batch.images, F_bar + G_2D, model.paint)

    # 3b occupancy and intensity
    Z_3D = G_3D + torch.stack([codes[nearest_code(x, codes)] for x in F_3D])
    expected |= occupancy(batch, Z_3D, model.occupancy)

    # 4 orthogonality of points and of visible cells
    cells = [(shared[k, :, r, c], G_2D[k, :, r, c]) for k, r, c in (~masked).nonzero().tolist()]
    expected["L_orth"] = frobenius(list(zip(F_3D, G_3D))) + frobenius(cells)

    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=2e-5), name
    summed = ("L_NCE", "L_c3D", "L_c2D", "L_rec", "L_occ", "L_int")
    total = sum(expected[name] for name in summed) + 1.2 * expected["L_orth"]
    assert float(L) == pytest.approx(total, rel=2e-5)
    assert terms["chance"] == pytest.approx(math.log(200))


def test_orthogonality_has_its_closed_forms():
    x = torch.randn(40, 6)
    sign = torch.tensor([[1.], [-1.]]).repeat(20, 1)
    alike = x[:20].repeat_interleave(2, 0)
    # as often along as against: nothing in common
    assert orthogonality(alike, alike * sign) < 1e-6
    # but not if one tells the other, in other columns
    assert orthogonality(F.pad(x, (0, 6)), F.pad(x, (6, 0))) > 0.1
    one = torch.eye(6)[:1].expand(50, -1)
    assert orthogonality(one, one).item() == pytest.approx(1)
    assert orthogonality(one[:5], one[:5]).item() == pytest.approx(1)
    assert orthogonality(x[:0], x[:0]) == 0
    # whatever the batch
    torch.testing.assert_close(orthogonality(x.repeat(5, 1), x.repeat(5, 1)), orthogonality(x, x))


# ---- crops and masks -----------------------------------------------------------------

@pytest.mark.parametrize("whole", [False, True])
def test_crops_keep_points_on_their_colours(world, whole):
    """Images are ramps, so a pixel's colour tells where it was before crop, resize and mirror.

    whole: all of Views, in which the cloud turns too.
    """
    frame = data.open_dataset(world, "small").load(0)
    v, u = np.meshgrid(np.arange(96), np.arange(256), indexing="ij")
    points = frame.points.copy()
    points[:, 3] = np.arange(len(points)) / 2 ** 16         # which point it is
    frame = data.replace(frame, points=points,
                         images=[np.stack([u, v, 0 * u]).astype(np.uint8)] * 6)
    if whole:
        other = VIEWS(frame, np.random.default_rng(0))
    else:
        other = data.crop_images(frame, [(3, 40, 61, 120)] * 6, [(64, 96)] * 6, [False, True] * 3)
    assert all(image.shape == (3, 64, 96) for image in other.images)
    rows = points[(other.points[:, 3] * 2 ** 16).astype(int)]
    assert whole != np.allclose(other.points[:, :3], rows[:, :3], atol=0.1)

    def projected(xyz, matrices):
        """-> (K, N, 4): u d, v d, d, 1"""
        corners = np.c_[xyz[:, :3], np.ones(len(xyz))]
        return corners @ np.swapaxes(matrices, 1, 2).astype(float)

    before = projected(rows, frame.lidar2img)
    after = projected(other.points, other.lidar2img)
    compared = 0
    for image, a, b in zip(other.images, before, after):
        uv = a[:, :2] / a[:, 2:3]
        uv_crop = b[:, :2] / b[:, 2:3]
        inner = (a[:, 2] > 1) & ((uv_crop > 2) & (uv_crop < (94, 62))).all(1)
        column, row = uv_crop[inner].astype(int).T
        np.testing.assert_allclose(image[:2, row, column].T, uv[inner] - 0.5, atol=1.5)
        np.testing.assert_allclose(a[inner, 2], b[inner, 2], rtol=1e-4)
        compared += inner.sum()
    assert compared > 200


def test_crops_show_enough_points_or_are_the_middle():
    rng = np.random.default_rng(0)
    shares = []
    uv = rng.uniform((0, 40), (250, 96), (500, 2))
    for _ in range(50):
        top, left, h, w = random_crop(rng, (96, 256), uv, 96 / 64, TINY)
        assert 0 <= top and top + h <= 96 and 0 <= left and left + w <= 256 and 1.3 < w / h < 1.7
        within = ((uv >= (left, top)) & (uv < (left + w, top + h))).all(1).sum()
        assert within >= 60 or w * h > 0.9 * 96 * 130
        shares.append((h / 96) ** 2)        # of the largest part, which is as high as the image
    assert 0.28 < min(shares) < 0.45 and max(shares) > 0.9

    # no crop shows three quarters of these
    apart = np.concatenate([np.tile([(0., 0)], (500, 1)), np.tile([(255., 95)], (500, 1))])
    cfg = replace(TINY, crop_points=1000)
    top, left, h, w = random_crop(rng, (96, 256), apart, 96 / 64, cfg)
    assert h >= 95 and (top, left) == ((96 - h) // 2, (256 - w) // 2)
    # a camera without points
    assert random_crop(rng, (96, 256), np.zeros((0, 2)), 1.5, TINY)[2] > 0


def test_masks_are_exactly_half_of_the_cells_of_some_images():
    cfg = Config()
    rngs = [torch.Generator().manual_seed(i) for i in range(40)]
    masked = mask_cells(6, (7, 13), cfg, rngs)
    count = masked.flatten(1).sum(1)
    assert masked.shape == (240, 7, 13) and set(count.tolist()) == {0, round(0.5 * 91)}
    assert 0.4 < (count > 0).float().mean() < 0.6
    # every cell alike
    often = masked[count > 0].float().mean(0)
    assert 0.4 < often.min() + 0.1 and often.max() < 0.68
    # from the frame's own stream
    alone = mask_cells(6, (7, 13), cfg, [torch.Generator().manual_seed(3)])
    assert torch.equal(alone, masked[18:24])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pairs", [0, 50])
def test_select_gives_the_rows_on_either_side_of_the_masks(share, pairs):
    torch.manual_seed(0)
    masked = torch.rand(5, 2, 3) < share
    masked[1] = False
    cell = torch.randint(30, (pairs,))
    visible, visible_pair, masked_pair, masked_image = cmcr.select(masked, cell)
    hidden = [bool(masked[n // 6, n // 3 % 2, n % 3]) for n in range(30)]
    assert visible.tolist() == [n for n in range(30) if not hidden[n]]
    assert visible_pair.tolist() == [n for n, c in enumerate(cell.tolist()) if not hidden[c]]
    assert masked_pair.tolist() == [n for n, c in enumerate(cell.tolist()) if hidden[c]]
    assert masked_image.tolist() == [k for k in range(5) if masked[k].sum() > 0]


def test_masked_pixels_reach_the_loss_but_not_the_network(batch, model):
    model.eval()
    masked = masked_of(batch)
    pixels = masked.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    assert masked.any() and not masked.all()
    inverted = torch.where(pixels, 255 - batch.images, batch.images)
    outputs = model.images_2d(batch.images, masked)
    for a, b in zip(outputs, model.images_2d(inverted, masked)):
        assert torch.equal(a, b)
    visible = torch.where(pixels, batch.images, 255 - batch.images)
    features = [model.images_2d(images, masked)[1] for images in (batch.images, visible)]
    assert not torch.equal(*features)
    with torch.no_grad():
        _, terms = model(batch)
        _, changed = model(replace(batch, images=inverted))
    assert changed["L_rec"] != terms["L_rec"] and changed["L_NCE"] == terms["L_NCE"]


# ---- points and pairs ----------------------------------------------------------------

def test_point_features_are_those_of_the_nearest_site_of_each_level(batch, model):
    levels = model.lidar(batch.points, batch.b_points, batch.size)
    features = model.lidar.point_features(levels, batch.points, batch.b_points)
    assert features.shape == (len(batch.points), 15 * 4)
    low = torch.tensor(GRID.low)
    voxel = torch.tensor(GRID.voxel)
    middle = low + (((batch.points[:, :3] - low) / voxel).floor() + 0.5) * voxel    # of its voxel
    begin = 0
    for level in levels:
        centre = level.centre()
        end = begin + level.features.shape[1]
        for n in range(0, len(batch.points), 97):
            sites = (level.coords[:, 0] == batch.b_points[n]).nonzero()[:, 0]
            gap = ((centre[sites] - middle[n]) / torch.tensor(level.cells.step)).abs().amax(1)
            # at the border the last cell's centre is farther
            assert gap.min() < 0.501 or level is levels[-1] or level is levels[-2]
            nearest = sites[gap < gap.min() + 1e-3]
            assert any(torch.equal(features[n, begin:end], level.features[m]) for m in nearest)
        begin = end


def test_pairs_are_distinct_visible_and_of_one_frame(batch, model):
    point, image, uv, cell = model.pairs(batch)
    assert all(torch.equal(a, b) for a, b in zip((point, image, uv, cell), pairs_of(batch)))
    assert (batch.b_points[point] == image // 6).all()
    assert len(torch.unique(point * 100 + image)) == len(point)
    masked_pairs = masked_of(batch).flatten()[cell]
    visible_pairs = ~masked_pairs
    assert visible_pairs.any() and masked_pairs.any()
    rows = visible_pairs.nonzero()[:, 0]
    chosen = common.random_subset(TINY.pairs, rows, torch.Generator().manual_seed(0))
    assert len(chosen) == TINY.pairs == len(chosen.unique()) and not masked_pairs[chosen].any()
    # the release comes to two a camera
    everything = common.random_subset(10**6, rows, torch.Generator().manual_seed(0))
    assert len(everything.unique()) == visible_pairs.sum()
    with torch.no_grad():
        assert model.eval()(batch)[1]["distinct"] == 1


def test_monitors_count_distinct_pairs_and_codes_in_use():
    point = torch.tensor([3, 1, 3, 3, 1])
    image = torch.tensor([0, 0, 1, 0, 2])                   # the fourth pair is the first again
    terms = cmcr.pair_monitors(point, image)
    assert terms["distinct"] == pytest.approx(4 / 5) and terms["chance"] == math.log(5)
    assert cmcr.pair_monitors(point[:1], image[:1]) == dict(chance=0, distinct=1)
    assert cmcr.pair_monitors(point[:0], image[:0]) == dict(chance=0, distinct=0)

    terms = cmcr.code_monitors(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 5, 5, 5]), 6)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert float(terms["perplexity_3D"]) == pytest.approx(2)
    assert float(terms["perplexity_2D"]) == pytest.approx(math.exp(entropy))
    assert terms["agreement"] == 0.25
    none = torch.zeros(0, dtype=torch.int64)
    assert cmcr.code_monitors(none, none, 6) == dict(perplexity_3D=1, perplexity_2D=1, agreement=0)


@pytest.mark.parametrize("name, most", [("nuscenes", math.pi), ("kitti", math.pi / 4)])
def test_clouds_turn_and_flip_as_the_range_allows_and_images_flip_alone(world, name, most):
    frame = data.open_dataset(world, "small").load(0)
    points = frame.points[frame.points[:, 4] == 0]
    points[:, 3] = np.arange(len(points)) / 2 ** 16         # which point it is
    ramp = np.tile(np.arange(256, dtype=np.uint8), (96, 1))
    frame = replace(frame, points=points, images=[np.stack([ramp] * 3)] * 6)
    views = Views(data.GRIDS[name, "small"], TINY)
    angles = []
    flips = set()
    image_flips = []
    for seed in range(16):
        view = views(frame, np.random.default_rng(seed))
        rows = points[(view.points[:, 3] * 2 ** 16).astype(int)]
        linear = np.linalg.lstsq(rows[:, :2], view.points[:, :2], rcond=None)[0].T
        flip = bool(np.linalg.det(linear) < 0)              # linear = mirror @ rotation
        flips.add(flip)
        rotation = np.diag([1, -1 if flip else 1]) @ linear     # where only y may be mirrored
        angles.append(abs(math.atan2(rotation[1, 0], rotation[0, 0])))
        image_flips += [image[0, 0, 0] > image[0, 0, -1] for image in view.images]
    assert most / 2 < max(angles) <= most + 1e-3 and flips == {True, False}
    assert 0.25 < np.mean(image_flips) < 0.75


# ---- codebook ------------------------------------------------------------------------

def test_codes_follow_the_closed_form():
    torch.manual_seed(0)
    book = Codebook(5, 8, 0.9)
    p, q = F.normalize(torch.randn(2, 30, 8), dim=2)
    a = book.nearest(p)
    b = book.nearest(q)
    assert a.tolist() == [int(((book.codes - row) ** 2).sum(1).argmin()) for row in p]
    start = book.total.clone()
    sums = torch.zeros(5, 8)
    for i in range(30):                                     # the formula, pair by pair
        sums[a[i]] += (p[i] + q[i]) / 2
        sums[b[i]] += (p[i] + q[i]) / 2
    swapped = Codebook(5, 8, 0.9)
    swapped.load_state_dict(book.state_dict())
    swapped.update(q, p, b, a)
    for _ in range(7):
        book.update(p, q, a, b)
    torch.testing.assert_close(book.total, 0.9 ** 7 * start + (1 - 0.9 ** 7) * sums)
    torch.testing.assert_close(book.codes, F.normalize(book.total, dim=1))
    torch.testing.assert_close(swapped.total, 0.9 * start + 0.1 * sums)
    idle = [k for k in range(5) if k not in a.tolist() + b.tolist()]
    book.update(p[:0], q[:0], a[:0], b[:0])
    assert book.codes.isfinite().all()
    assert all(torch.allclose(book.codes[k], start[k]) for k in idle)


def test_quantise_is_straight_through_and_commitment_pulls_features_only():
    book = Codebook(6, 4, 0.9)
    x = F.normalize(torch.randn(10, 4), dim=1).requires_grad_()
    y = book.quantise(x)
    torch.testing.assert_close(y, book.codes[book.nearest(x)])
    pull = torch.randn(10, 4)
    (y * pull).sum().backward()
    torch.testing.assert_close(x.grad, pull)

    # v lies on its own code, and its partner's is orthogonal
    book.codes.copy_(torch.eye(6, 4))
    v = torch.eye(4)[1:2].requires_grad_()
    loss = book.commitment(v, own=torch.tensor([1]), other=torch.tensor([0]), beta=0.25)
    assert loss.item() == pytest.approx(0.25 * 2 / 4)
    other_way = book.commitment(v, torch.tensor([0]), torch.tensor([1]), 0.25)
    assert other_way.item() == pytest.approx(2 * 0.25 * 2 / 4)
    loss.sum().backward()
    assert v.grad.abs().sum() > 0 and not book.codes.requires_grad


def test_the_codebook_is_saved_and_rests_in_eval_mode(batch, model):
    assert {"codebook.codes", "codebook.total"} <= model.state_dict().keys()
    assert not [n for n, _ in model.named_parameters() if "codebook" in n]
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
    L, terms = model(batch)
    L_still, terms_still = still(batch)
    assert not torch.equal(model.codebook.codes, still.codebook.codes)
    assert torch.equal(L, L_still)
    assert all(float(value) == float(terms_still[name]) for name, value in terms.items())


def test_codes_keep_unit_length(batch, model):
    model.train()(batch)
    torch.testing.assert_close(model.codebook.codes.norm(dim=1), torch.ones(16))


def codebook_case():
    torch.manual_seed(5)
    return Codebook(9, 16, 0.9), *F.normalize(torch.randn(2, 30, 16), dim=2)


def three_updates(rank):
    book, p, q = codebook_case()
    rows = slice(0, 7) if rank == 0 else slice(7, 30)
    for _ in range(3):
        book.update(p[rows], q[rows], book.nearest(p[rows]), book.nearest(q[rows]))
    return book.state_dict()


def test_two_processes_have_the_codebook_of_one(server, tmp_path):
    book, p, q = codebook_case()
    for _ in range(3):
        book.update(p, q, book.nearest(p), book.nearest(q))
    for state in on_two(server, three_updates, tmp_path):
        for name, value in book.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)


def orthogonality_case(rows):
    torch.manual_seed(6)
    shared, specific = (x.requires_grad_() for x in torch.randn(2, 30, 4, dtype=torch.float64))
    loss = orthogonality(shared[rows], specific[rows])
    loss.backward()
    return loss.detach(), shared.grad, specific.grad


def orthogonality_of_one_rank(rank):
    loss, *grads = orthogonality_case(slice(0, 7) if rank == 0 else slice(7, 30))
    return loss, *(grad / 2 for grad in grads)              # DDP's average over two processes


def test_two_processes_have_the_orthogonality_of_one(server, tmp_path):
    parts = on_two(server, orthogonality_of_one_rank, tmp_path)
    whole = orthogonality_case(slice(None))
    for n in range(3):
        joined = parts[0][n] + parts[1][n] if n else parts[0][n]
        torch.testing.assert_close(joined, whole[n])


# ---- occupancy -----------------------------------------------------------------------

def test_other_lasers_points_stay_but_make_no_queries(world):
    """Waymo's side lasers have 0.001 s of age. Were their points taken for ends of rays from the
    origin, queries would lie on those."""
    frame = data.open_dataset(world, "small").load(0, (48, 128))
    points = frame.points[frame.points[:, 4] == 0]
    points[np.linalg.norm(points[:, :2], axis=1) > 10, 4] = 0.001
    view = VIEWS(replace(frame, points=points), np.random.default_rng(0))
    queries = view.extra["queries"]
    far_points = np.linalg.norm(view.points[:, :2], axis=1) > 10.1
    far_queries = np.linalg.norm(queries[:, :2], axis=1) > 10.1
    assert far_points.sum() > 300 and not far_queries.any() and len(far_queries) == TINY.queries


def test_queries_lie_behind_before_and_far_before_their_points():
    rng = np.random.default_rng(0)
    origin = np.array([1., 2., 0.5])
    yz = rng.uniform(-8, 8, (300, 2))
    wall = np.column_stack([np.full(300, 10.), yz]).astype(np.float32)      # the plane x = 10
    place, occupied, intensity = occupancy_queries(
        wall, np.linspace(0, 1, 300), origin, 2048, 0.1, rng)
    assert occupied.sum() == 684 and (intensity == -1).sum() == 682 and len(place) == 2048
    assert place.dtype == occupied.dtype == intensity.dtype == np.float32
    for n, q in enumerate(place):
        # where the query's ray meets the wall
        hit = origin + (q - origin) * (10 - origin[0]) / (q[0] - origin[0])
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
        place, _, _ = occupancy_queries(cloud, np.zeros(len(cloud)), np.zeros(3), 30, 0.1, rng)
        assert len(place) == 30 * len(cloud) and np.isfinite(place).all()


def test_neighbours_are_the_nearest_within_reach_in_the_same_frame(batch):
    places = batch.extra["queries"]
    edges = 0
    for b in range(2):
        xyz = batch.points[batch.b_points == b, :3]
        own = places[batch.extra["b_queries"] == b]
        for q in range(0, 90, 7):
            distance = (xyz - own[q]).norm(dim=1)
            expected = distance.argsort()[:32]
            expected = expected[distance[expected] < 1.0]
            near = points_near(batch, b, q)
            assert len(near) == len(expected)
            torch.testing.assert_close(distance[near], distance[expected], atol=1e-5, rtol=1e-5)
            edges += len(near)
    assert len(places) == 180 and 100 < edges < 26 * 32


def test_moving_points_and_queries_together_changes_nothing(batch, model):
    Z = torch.randn(len(batch.points), 64)
    shift = torch.tensor([3., -1., 0.2])
    moved = replace(batch, points=batch.points + F.pad(shift, (0, 2)),
                    extra={**batch.extra, "queries": batch.extra["queries"] + shift})
    with torch.no_grad():
        a, query = model.decode_queries(Z, batch)
        b, _ = model.decode_queries(Z, moved)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(query) == len(batch.extra["edges"]) > 500


# ---- which loss teaches what ---------------------------------------------------------

# part of the model: the beginning of its parameters' names
PARTS = dict(
    trunk="lidar.", shared_3d="shared_3d.", specific_3d="specific_3d.",
    teacher="teacher.", shared_2d="shared_2d.", specific_2d="specific_2d.",
    paint="paint.", occupancy="occupancy.", token="token",
)
# loss: the parts that its gradient reaches
REACH = dict(
    L_NCE={"trunk", "shared_3d", "shared_2d"},
    L_c3D={"trunk", "shared_3d"},
    L_c2D={"shared_2d"},
    L_rec={"trunk", "shared_3d", "shared_2d", "specific_2d", "paint", "token"},
    L_occ={"trunk", "shared_3d", "specific_3d", "occupancy"},
    L_int={"trunk", "shared_3d", "specific_3d", "occupancy"},
    L_orth={"trunk", "shared_3d", "specific_3d", "shared_2d", "specific_2d"},
)


def has_gradient(p):
    return p.grad is not None and bool(p.grad.abs().sum() > 0)


@pytest.mark.parametrize("frozen", [True, False])
def test_which_loss_teaches_what(batch, frozen):
    """What reaches a head of the images reaches the teacher too, unless that is frozen."""
    torch.manual_seed(0)
    model = CMCR(TINY, GRID, frozen)
    for name, parts in REACH.items():
        model.zero_grad()
        model(batch)[1][name].backward()
        reached = {part for part, prefix in PARTS.items()
                   for n, p in model.named_parameters() if n.startswith(prefix) and has_gradient(p)}
        through = not frozen and parts & {"shared_2d", "specific_2d"}
        assert reached == parts | ({"teacher"} if through else set()), name


def test_reconstruction_reaches_points_through_the_replacement_alone(batch, model):
    """Exactly the points that fall on a masked cell get a gradient; without replacement none."""
    masked = masked_of(batch)
    point, image, _, cell = pairs_of(batch)
    for without in ("", "replacement"):
        model.cfg = replace(TINY, without=without)
        F_3D = F.normalize(torch.randn(len(batch.points), 64), dim=1).requires_grad_()
        _, F_2D, G_2D = model.images_2d(batch.images, masked)
        _, _, pair, masked_image = cmcr.select(masked, cell)
        rebuilt, _ = model.rebuild(
            masked, F_2D, G_2D, F_3D, point[pair], cell[pair], masked_image)
        rebuilt.square().sum().backward()
        reached = set()
        if F_3D.grad is not None:
            reached = set(F_3D.grad.abs().sum(1).nonzero()[:, 0].tolist())
        expected = set() if without else set(point[masked.flatten()[cell]].tolist())
        assert reached == expected, without


@pytest.mark.parametrize("frames", [1, 2])
def test_losses_wait_for_the_pairs_and_once_for_all_selections(world, model, monkeypatch, frames):
    """Whatever the number of frames, and never in backward. The trunk has waits of its own.

    The sizes of the selections are fetched by tolist(), which is no operator on a CPU.
    """
    loader = data.loader(str(world), "train", frames, preset="small", augment=VIEWS)
    batch = next(loader.begin_at(0))
    F_3D, Z_3D, G_3D = torch.randn(3, len(batch.points), TINY.dims, requires_grad=True)
    monkeypatch.setattr(model, "points_3d", lambda batch: (F.normalize(F_3D, dim=1), Z_3D, G_3D))
    fetches = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: fetches.append(x.shape) or tolist(x))
    with Waits() as waits:
        loss, _ = model(batch)
        loss.backward()
    assert waits.names == ["nonzero"]                       # of common.project
    assert fetches == [batch.seeds.shape, (4,)]


def test_a_frozen_teacher_stays_as_it_is(batch):
    torch.manual_seed(0)
    model = CMCR(TINY, GRID, frozen=True)
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):              # as in a resumed run: no evaluation has called train() before
        model(batch)[0].backward()
        opt.step()
    assert not model.teacher.training
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("without, gone", [
    ("replacement", "token"), ("codebook", "codebook"), ("specific", "specific")])
def test_ablations_leave_no_idle_parameter(batch, without, gone):
    model = CMCR(replace(TINY, without=without), GRID, frozen=True)
    assert not [name for name in model.state_dict() if name.startswith(gone)]
    loss, _ = model(batch)
    loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert loss.isfinite() and idle == []


def test_frames_without_points_or_masks_are_fine(world):
    dataset = data.open_dataset(world, "small")
    rng = np.random.default_rng(0)
    full = VIEWS(dataset.load(0), rng)
    empty = VIEWS(data.select(dataset.load(1), np.zeros(0, np.int64)), rng)
    assert empty.extra["edges"].shape == (0, 2)
    for frames, share in (([full, empty], 0.7), ([empty], 1.0), ([full], 0.0)):
        model = CMCR(replace(TINY, mask_images=share), GRID, frozen=True)
        loss, terms = model(data.collate(frames, list(range(len(frames)))))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all()
                   for p in model.parameters() if p.requires_grad)
        if share == 0:
            assert terms["L_rec"] == 0 and terms["covered"] == 0
        if share == 1:                                      # no point at all
            assert terms["L_occ"] == terms["L_int"] == terms["edges"] == 0
            assert terms["L_NCE"] == terms["distinct"] == terms["covered"] == 0


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
    assert terms["L_occ"] < 0.8 * math.log(2), (first, terms)
    assert terms["L_NCE"] < first["L_NCE"] - 1, (first, terms)
    assert terms["L_rec"] < 0.9 * first["L_rec"], (first, terms)
    assert terms["L_orth"] < first["L_orth"]


# ---- teacher -------------------------------------------------------------------------

def test_the_published_teacher_is_checked_and_its_absence_explained(tmp_path, monkeypatch):
    torch.manual_seed(0)
    published = common.ResNet(18).resnet
    resnet = common.ResNet(18).resnet
    path = tmp_path / "teachers" / "moco_v2_800ep_pretrain.pth.tar"

    def offline(*_, **__):
        raise OSError("no network")

    def fetched(url, place, progress):
        weights = {f"module.encoder_q.{k}": v for k, v in published.state_dict().items()}
        weights |= {"module.encoder_q.fc.0.weight": torch.zeros(3), "module.queue": torch.zeros(2)}
        torch.save(dict(epoch=800, state_dict=weights), place)

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit, match=r"could not be fetched \(no network\). Put that file at "
                                         r".*teachers.moco_v2_800ep_pretrain.pth.tar"):
        cmcr.load_teacher("moco", resnet, 0, tmp_path)
    assert not path.exists()
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetched)
    with pytest.raises(SystemExit, match="expected a04e12f8; delete it"):
        cmcr.load_teacher("moco", resnet, 0, tmp_path)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(cmcr, "MOCO", (cmcr.MOCO[0], md5[:8]))
    cmcr.load_teacher("moco", resnet, 0, tmp_path)
    weights = published.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in resnet.state_dict().items())


# ---- the script ----------------------------------------------------------------------

def test_the_script_trains_draws_and_leaves_weights_for_fine_tuning(three_frames, tmp_path, capsys):
    flags = ("--data", str(three_frames), "--teacher", "none", "--crop-h", "64", "--crop-w", "96",
             "--crop-points", "60", "--pairs", "200", "--queries", "90", "--eval-every", "2",
             "--steps", "2", "--save-every", "1")
    whole = run("cmcr.py", tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr[-2000:]
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert f"val L_NCE {metrics['L_NCE']}" in whole.stdout.splitlines()[-1]
    for name in ("codes", "occupancy", "losses"):
        assert (tmp_path / "whole" / "figures" / f"{name}.png").stat().st_size > 10_000
    cfg = finetune.Config(preset="small", modality="lidar",
                          **{**finetune.SMALL, "width": 4, "bins": 12})
    detector = finetune.Detector(cfg, GRID)
    finetune.load_units(tmp_path / "whole", detector, (), ["lidar", "fuse"], GRID, 0)
    assert "loaded lidar 120/120 tensors of step 2" in capsys.readouterr().out


def test_the_rate_ends_at_lr_end_and_the_small_preset_needs_no_download(
        three_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(cmcr, "save_figure", lambda *_: None)
    monkeypatch.setattr(cmcr, "loss_curves", lambda *_, **__: None)
    monkeypatch.setattr(cmcr, "load_tool", lambda _: None)
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path), gpus=0, steps=2, lr_end=0.2)
    cmcr.train(0, 1, cfg)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == pytest.approx([TINY.lr, 0.6 * TINY.lr])


@pytest.mark.parametrize("flags, message", [
    (dict(epochs=2), "one of them must be 0"),
    (dict(steps=-5), "--steps -5: expected a whole number from 0"),
    (dict(crop_h=100), "multiples of 32"),
    (dict(codes=1), "--without codebook"),
    (dict(mask_cells=1.5), "0 to 1"),
    (dict(teacher="moco"), "is a ResNet-50"),
    (dict(teacher="nowhere.pth"), "no readable weights"),
    (dict(batch=0, teacher="none"), "--batch 0: expected a whole number from 1"),
    (dict(rotation=-1.0, teacher="none"), "expected a number from 0"),
    (dict(query_radius=0.0, teacher="none"), "expected a number above 0"),
])
def test_flags_that_cannot_work_are_refused(flags, message, three_frames, tmp_path):
    cfg = replace(TINY, data=str(three_frames), out=str(tmp_path / "run"), **flags)
    with pytest.raises(SystemExit, match=message):
        cmcr.train(0, 1, cfg)
    assert not (tmp_path / "run").exists()
