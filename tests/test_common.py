"""common.py against dense convolutions, torch's own interpolation, closed forms and brute force."""
import importlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from conftest import on_two, trained

GRID = dict(low=(-3.2, -3.2, -2.0), high=(3.2, 3.2, 1.2), voxel=(0.1, 0.1, 0.1))      # 32 (+1) x 64 x 64 voxels


def pinhole(size=1, cameras=1, focal=40.0, centre=(32.0, 24.0), yaw=0.0):
    """Cameras at the origin looking along x turned by yaw + k 90 degrees."""
    out = []
    for k in range(cameras):
        a = yaw + k * math.pi / 2
        forward, left = torch.tensor([math.cos(a), math.sin(a), 0.0]), torch.tensor([-math.sin(a), math.cos(a), 0.0])
        K = torch.tensor([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
        matrix = torch.eye(4)
        matrix[:3, :3] = K @ torch.stack([-left, torch.tensor([0.0, 0.0, -1.0]), forward])
        out.append(matrix)
    return torch.stack(out).repeat(size, 1, 1)


# ---- §1 geometry ----

@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5), (1, 4, 5)])
def test_multilinear_interpolation_is_grid_sample(shape):
    torch.manual_seed(0)
    table = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    at = torch.rand(200, len(shape), dtype=torch.float64) * 1.4 - 0.2                  # some outside the outermost centres
    index, weight = common.multilinear(at * (torch.tensor(shape) - 1), shape)
    ours = common.gather_weighted(table.reshape(-1, 3), index, weight)
    where = (at * 2 - 1).flip(1).view(1, *[1] * (len(shape) - 1), -1, len(shape))
    theirs = F.grid_sample(table.permute(-1, *range(len(shape)))[None], where, align_corners=True, padding_mode="border").reshape(3, -1).t()
    torch.testing.assert_close(ours, theirs)
    pull = torch.randn_like(ours)
    a, b = (torch.autograd.grad((y * pull).sum(), table)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b)


def test_interpolating_nothing():
    index, weight = common.multilinear(torch.zeros(0, 3), (2, 3, 4))
    assert common.gather_weighted(torch.randn(24, 5), index, weight).shape == (0, 5)


def test_image_sampling_has_area_centres():
    torch.manual_seed(0)
    features, uv, image = torch.randn(3, 4, 6, 8), torch.rand(100, 2) * torch.tensor([64.0, 48.0]), torch.randint(3, (100,))
    ours = common.sample_image(features, image, uv, (48, 64))
    where = uv / torch.tensor([64.0, 48.0]) * 2 - 1
    theirs = torch.stack([F.grid_sample(features[i:i + 1], w.view(1, 1, 1, 2), align_corners=False, padding_mode="border")[0, :, 0, 0] for i, w in zip(image, where)])
    torch.testing.assert_close(ours, theirs)


def test_projection_is_undone_by_rays_and_sees_only_what_is_ahead():
    torch.manual_seed(0)
    lidar2img, hw = pinhole(2, 4), torch.tensor([[48, 64]] * 7 + [[30, 40]])
    xyz, b = torch.randn(500, 3) * 8, torch.arange(500) % 2
    point, image, uv, depth = common.project(xyz, b, lidar2img, hw, 2)
    origin, away = common.rays(uv, image, lidar2img)
    along = (xyz[point] - origin).norm(dim=1)
    torch.testing.assert_close(origin + away * along[:, None], xyz[point], atol=1e-4, rtol=1e-4)
    assert (depth > 0.1).all() and (image // 4 == b[point]).all()
    expected = set()                                                                    # the same, a pair at a time
    for n in range(500):
        for k in range(4):
            i = int(b[n]) * 4 + k
            u, v, d = (lidar2img[i, :3, :3].double() @ xyz[n].double()).tolist()
            if d > 0.1 and 0 <= u / d < int(hw[i, 1]) and 0 <= v / d < int(hw[i, 0]):
                expected.add((n, i))
    assert expected == set(zip(point.tolist(), image.tolist())) and len(expected) > 100
    assert (uv[image == 7] < torch.tensor([40.0, 30.0])).all() and (image == 7).any()    # an image smaller than the padding


def test_rays_leave_the_box_at_its_face():
    torch.manual_seed(0)
    origin, away = torch.rand(200, 3) - 0.5, F.normalize(torch.randn(200, 3), dim=1)
    away[0] = torch.tensor([0.0, 0.0, 1.0])                                             # a zero component
    far = common.box_exit(origin, away, (-1, -1, -2), (1, 1, 2))
    end = (origin + away * far[:, None]) / torch.tensor([1.0, 1.0, 2.0])
    torch.testing.assert_close(end.abs().amax(1), torch.ones(200), atol=1e-4, rtol=0)
    assert common.box_exit(torch.tensor([[5.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]), (-1, -1, -2), (1, 1, 2)) < 0


def test_points_in_boxes_against_rotated_coordinates():
    rng = np.random.default_rng(0)
    xyz, b = rng.uniform(-5, 5, (800, 3)).astype(np.float32), rng.integers(0, 2, 800)
    boxes = np.concatenate([rng.uniform(-3, 3, (6, 3)), rng.uniform(1, 4, (6, 3)), rng.uniform(-3, 3, (6, 1)), np.zeros((6, 2))], 1).astype(np.float32)
    b_boxes = np.array([0, 0, 0, 1, 1, 1])
    expected = np.zeros(800, bool)
    for box, frame in zip(boxes, b_boxes):
        turn = np.array([[math.cos(box[6]), -math.sin(box[6]), 0], [math.sin(box[6]), math.cos(box[6]), 0], [0, 0, 1]])
        expected |= (np.abs((xyz - box[:3]) @ turn) < box[3:6] / 2).all(1) & (b == frame)
    assert 20 < expected.sum() < 750
    assert (common.inside_boxes(*map(torch.as_tensor, (xyz, b, boxes, b_boxes))).numpy() == expected).all()


def test_a_linear_field_survives_trunk_lift_and_query():
    """One definition of where a cell is: half-cell shifts are the classic silent bug."""
    net = common.VoxelResNet(**GRID, width=2)
    slope, cells = torch.tensor([0.7, -1.3, 2.1]), net.cells[-1]
    field = cells.centres("cpu") @ slope + 0.3                                          # by cell, the memory order of dense volumes
    inner = torch.rand(300, 3) * (torch.tensor(cells.shape[::-1]) - 1) * torch.tensor(cells.step) + torch.tensor(cells.first)
    index, weight = common.multilinear(cells.index(inner), cells.shape)
    torch.testing.assert_close(common.gather_weighted(field[:, None], index, weight)[:, 0], inner @ slope + 0.3, atol=1e-5, rtol=1e-5)

    every = torch.cat([torch.zeros(math.prod(net.cells[0].shape), 1, dtype=torch.int64), torch.cartesian_prod(*map(torch.arange, net.cells[0].shape))], 1)
    level = common.Level(every, net.cells[0].centres("cpu") @ slope[:, None] + 0.3, net.cells[0])
    for pad, below in zip(net.pads, net.cells[1:]):                                     # means over full 3 x 3 x 3 neighbourhoods, down the trunk
        coords, kmap = common.strided_map(level.coords, level.cells.shape, pad)
        mean = common.SparseConvolution.apply(level.features, torch.full((27, 1, 1), 1 / 27), kmap)
        full = torch.bincount(kmap.outs, minlength=len(coords)) == 27
        level = common.Level(coords, coords.new_zeros(len(coords), 1).float(), below)
        torch.testing.assert_close(mean[full, 0], (level.centre() @ slope + 0.3)[full], atol=1e-4, rtol=1e-4)
        assert full.float().mean() > 0.4
        level = level._replace(features=(level.centre() @ slope + 0.3)[:, None])
    assert level.cells == cells
    torch.testing.assert_close(level.dense(1).flatten(), field)

    camera = common.CameraNet(18, channels=2, max_depth=6.0, bins=4)                        # the lift: an image that shows its own coordinates
    batch = SimpleNamespace(images=torch.zeros(4, 3, 48, 64, dtype=torch.uint8), hw=torch.tensor([[48, 64]] * 4), lidar2img=pinhole(1, 4), size=1)
    v, u = torch.meshgrid(torch.arange(6) * 8.0 + 4, torch.arange(8) * 8.0 + 4, indexing="ij")
    volume, seen = camera.lift(torch.stack([u, v])[None].repeat(4, 1, 1, 1), torch.full((4, 4, 6, 8), 0.25), batch, cells)
    point, image, uv, depth = common.project(cells.centres("cpu"), torch.zeros(len(field), dtype=torch.int64), batch.lidar2img, batch.hw, 1, near=1.0)
    once = (torch.bincount(point, minlength=len(field)) == 1)[point] & ((uv > 4) & (uv < torch.tensor([60.0, 44.0]))).all(1)
    torch.testing.assert_close(volume[0].flatten(1).t()[point[once]], uv[once], atol=1e-3, rtol=1e-4)
    assert once.sum() > 20 and seen.sum() == len(point.unique())


def test_the_gradient_of_an_interpolation_counts_every_row():
    """More rows than one chunk of the backward pass holds."""
    torch.manual_seed(0)
    table, pull = torch.randn(30, 3, dtype=torch.float64, requires_grad=True), torch.randn(10_000, 3, dtype=torch.float64)
    index, weight = common.multilinear(torch.rand(10_000, 2, dtype=torch.float64) * 4, (5, 6))
    ours, plain = common.gather_weighted(table, index, weight), (table[index] * weight[..., None]).sum(1)
    torch.testing.assert_close(*(torch.autograd.grad((y * pull).sum(), table)[0] for y in (ours, plain)))


# ---- §3 networks ----

def sites(seed=0, shape=(5, 7, 6), frames=4, share=0.3, empty=2):
    """Random sorted coordinates; frame `empty` has none."""
    taken = torch.rand(frames, *shape, generator=torch.Generator().manual_seed(seed)) < share
    taken[empty] = False
    return taken.nonzero()


def dense(coords, x, frames, shape):
    return x.new_zeros(frames, *shape, x.shape[1]).index_put(tuple(coords.t()), x).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("kind", ["submanifold", "strided", "strided, no padding in z"])
def test_sparse_convolution_is_conv3d_on_occupied_sites(kind):
    torch.manual_seed(0)
    shape, frames = (5, 7, 6), 4
    coords = sites()
    x, weight = torch.randn(len(coords), 3, requires_grad=True), torch.randn(27, 3, 5, requires_grad=True)
    kernel = weight.double().view(3, 3, 3, 3, 5).permute(4, 3, 0, 1, 2)
    if kind == "submanifold":
        out, kmap = coords, common.submanifold_map(coords, shape)
        expected = F.conv3d(dense(coords, x.double(), frames, shape), kernel, padding=1)
    else:
        pad = (1, 1, 1) if kind == "strided" else (0, 1, 1)
        out, kmap = common.strided_map(coords, shape, pad)
        expected = F.conv3d(dense(coords, x.double(), frames, shape), kernel, stride=2, padding=pad)
        assert (ravelled(out, expected.shape[2:]).diff() > 0).all()                    # sorted
        everywhere = torch.zeros(frames, *expected.shape[2:], dtype=torch.bool)
        everywhere[tuple(out.t())] = True
        assert (expected.permute(0, 2, 3, 4, 1)[~everywhere] == 0).all()               # no output site is missing
    expected = expected.permute(0, 2, 3, 4, 1)[tuple(out.t())]
    ours = common.SparseConvolution.apply(x, weight, kmap)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours, common.SparseConvolution.apply(x, weight, kmap))
    pull = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * pull).sum(), (x, weight)), torch.autograd.grad((expected * pull).sum(), (x, weight))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    rough = common.SparseConvolution.apply(x.bfloat16(), weight.bfloat16(), kmap)                      # as on CUDA
    torch.testing.assert_close(rough.double(), expected, atol=0.15, rtol=0.05)


def ravelled(coords, shape):
    return torch.as_tensor(np.ravel_multi_index(tuple(coords.t().numpy()), (100, *shape)))


@pytest.mark.parametrize("shape, moved", [((4, 5, 6), (0, 0, 0, 0)), ((4, 1505, 1504), (239, 0, 1500, 1498))])
def test_kernel_maps_match_a_dictionary(shape, moved):
    """In one small volume, and in the last corner of the last of many large ones, whose keys do not fit 32 bits."""
    near = sites(1, (4, 5, 6), share=0.4)
    coords = near + torch.tensor(moved)
    assert common.ravel(coords, shape).dtype == (torch.int64 if any(moved) else torch.int32) and torch.equal(common.unravel(common.ravel(coords, shape), shape), coords)
    for pad in ((1, 1, 1), (0, 1, 1)):                                                  # moved by an even number of cells: the same map, moved by half
        (out, kmap), (near_out, near_map) = common.strided_map(coords, shape, pad), common.strided_map(near, (4, 5, 6), pad)
        assert torch.equal(out - near_out, torch.tensor([moved[0], *(m // 2 for m in moved[1:])]).expand_as(out))
        assert all(torch.equal(getattr(kmap, name), getattr(near_map, name)) for name in ("ins", "outs", "ends", "order", "first"))
    row = {tuple(c): i for i, c in enumerate(coords.tolist())}
    kmap = common.submanifold_map(coords, shape)
    offset = torch.repeat_interleave(torch.arange(27), kmap.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)))
    expected = {(k, o, row[n]) for (b, z, y, x), o in row.items() for k in range(27)
                if (n := (b, z + k // 9 - 1, y + k // 3 % 3 - 1, x + k % 3 - 1)) in row}
    assert set(zip(offset.tolist(), kmap.outs.tolist(), kmap.ins.tolist())) == expected and len(offset) == len(expected)
    for o in range(len(coords)):                                                        # the same pairs again, by output
        mine = kmap.order[kmap.first[o]:kmap.first[o + 1]]
        assert (kmap.outs[mine] == o).all() and len(mine) == (kmap.outs == o).sum()

    class OnCuda(torch.Tensor):
        is_cuda = True
    for there, here in zip(common.by_output(kmap.outs.as_subclass(OnCuda), kmap.ends, len(coords)), (kmap.order, kmap.first), strict=True):
        assert torch.equal(there.as_subclass(torch.Tensor), here)


def test_no_sites_at_all():
    none = torch.zeros(0, 4, dtype=torch.int64)
    kmap = common.submanifold_map(none, (4, 4, 4))
    out, strided = common.strided_map(none, (4, 4, 4), (1, 1, 1))
    assert len(kmap.first) - 1 == len(out) == len(strided.first) - 1 == 0
    w = torch.randn(27, 3, 4, requires_grad=True)
    common.SparseConvolution.apply(torch.zeros(0, 3), w, strided).sum().backward()
    assert (w.grad == 0).all()


def cloud(n=400, size=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(n, 3, generator=g) * torch.tensor([6.4, 6.4, 3.2]) + torch.tensor(GRID["low"])
    return torch.cat([xyz, torch.rand(n, 2, generator=g)], 1), torch.sort(torch.randint(size, (n,), generator=g)).values


def test_voxels_hold_the_mean_of_their_points():
    net = common.VoxelResNet(**GRID, width=2)
    points, b = cloud(3000)
    points[1500:, :3], b[1500:] = points[:1500, :3].clone(), b[:1500].clone()           # two in a voxel, which differ in the rest
    points[:5, 0] = 99.0                                                                # outside
    level, expected = net.voxelise(points, b), {}
    for p, f in zip(points[5:].double().numpy(), b[5:].tolist()):
        cell = np.floor((p[:3] - np.array(GRID["low"])) / 0.1 + 1e-9).astype(int)
        expected.setdefault((f, *cell[::-1].tolist()), []).append(p)
    found = {tuple(c): f for c, f in zip(level.coords.tolist(), level.features.numpy())}
    common_cells = found.keys() & expected.keys()
    assert len(common_cells) > 0.995 * len(expected) and len(found) == pytest.approx(len(expected), abs=8)    # fp32 faces
    inner = [cell for cell in common_cells if (abs((np.array(expected[cell])[:, :3] - GRID["low"]) / 0.1 % 1 - 0.5) < 0.499).all()]
    for cell in inner:                                                                  # no point near a face, which might be another cell's
        np.testing.assert_allclose(found[cell], np.mean(expected[cell], 0), atol=1e-5)
    assert sum(len(expected[cell]) > 1 for cell in inner) > 1000


def test_voxel_net_does_not_mind_order_empty_frames_or_whole_steps():
    torch.manual_seed(0)
    net = common.VoxelResNet(**GRID, width=2).eval()
    points, b = cloud()
    a, shuffled = net(points, b)[-1], torch.randperm(len(points), generator=torch.Generator().manual_seed(1))
    other = net(points[shuffled], b[shuffled])[-1]
    torch.testing.assert_close(a.features, other.features, atol=1e-5, rtol=1e-4)
    assert torch.equal(a.coords, other.coords)
    assert torch.equal(a.dense(4)[:3], a.dense(3)) and (a.dense(4)[3] == 0).all()      # an empty last frame
    small = points[:, :3].abs().amax(1) < 1.2
    points, b = points[small], b[small]
    moved = points.clone()
    moved[:, 0] += 0.8                                                                  # a whole cell of the last level
    original = net.voxelise
    net.voxelise = lambda p, f: (level := original(p, f))._replace(features=level.features * torch.tensor([0, 0, 0, 1, 1]))    # all but where it is
    first, second = net(points, b)[-1], net(moved, b)[-1]
    assert torch.equal(first.coords + torch.tensor([0, 0, 0, 1]), second.coords) and len(first.coords) > 5
    torch.testing.assert_close(first.features, second.features, atol=1e-5, rtol=1e-4)


def test_kernel_maps_are_built_once_a_level(monkeypatch):
    calls = []
    for name in ("submanifold_map", "strided_map"):
        original = getattr(common, name)
        monkeypatch.setattr(common, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    common.VoxelResNet(**GRID, width=2)(*cloud())
    assert calls.count("submanifold_map") == 4 and calls.count("strided_map") == 3


def test_segment_sum_is_the_same_with_and_without_torch_scatter(monkeypatch):
    pytest.importorskip("torch_scatter")
    assert common.torch_scatter is not None
    values, index = torch.randn(50, 3, dtype=torch.float64, requires_grad=True), torch.randint(7, (50,))
    ours = common.segment_sum(values, index, 9)
    grad = torch.autograd.grad(ours.square().sum(), values)[0]
    monkeypatch.setattr(common, "torch_scatter", None)
    plain = common.segment_sum(values, index, 9)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grad, torch.autograd.grad(plain.square().sum(), values)[0])
    expected = torch.stack([values[index == i].sum(0) for i in range(9)])
    torch.testing.assert_close(plain, expected)


def test_batch_norm_of_one_row_is_finite_and_leaves_statistics():
    norm = common.BatchNorm(3).train()
    for rows in (0, 1):
        assert norm(torch.randn(rows, 3)).isfinite().all()
    assert (norm.running_mean == 0).all() and int(norm.num_batches_tracked) == 0
    norm(torch.randn(5, 3))
    assert (norm.running_mean != 0).all()


@pytest.mark.parametrize("depth", [18, 50])
def test_image_weights_are_torchvision_s_less_fc(depth):
    theirs = {18: torchvision.models.resnet18, 50: torchvision.models.resnet50}[depth]()
    wanted = {k for k in theirs.state_dict() if not k.startswith("fc.")}
    assert wanted == set(common.CameraNet(depth, 4, bins=3).resnet.state_dict())


def test_hidden_pixels_and_padding_do_not_matter_and_seen_ones_do():
    torch.manual_seed(0)
    net, cells = common.CameraNet(18, 4, max_depth=6.0, bins=3).eval(), common.VoxelResNet(**GRID, width=2).cells[-1]
    images, masked = torch.randint(0, 255, (4, 3, 48, 64), dtype=torch.uint8), torch.zeros(4, 48, 64, dtype=torch.bool)
    masked[:, :, :32] = True
    def volume(images, masked=masked, size=(48, 64)):
        batch = SimpleNamespace(images=images, hw=torch.tensor([size] * 4), lidar2img=pinhole(1, 4), size=1)
        return net(batch, cells, masked)[0]
    left, right = images.clone(), images.clone()
    left[..., :32], right[..., 32:] = 255 - left[..., :32], 255 - right[..., 32:]
    assert torch.equal(volume(images), volume(left)) and not torch.equal(volume(images), volume(right))
    assert torch.equal(volume(images, None, (48, 32)), volume(right, None, (48, 32))) and not torch.equal(volume(images, None), volume(right, None))


def test_an_absent_branch_counts_as_zeros():
    net, lidar, camera = common.FusionNet(4, 3, 5).eval(), torch.randn(2, 4, 2, 6, 6), torch.randn(2, 3, 2, 6, 6)
    assert torch.equal(net(lidar, None), net(lidar, torch.zeros_like(camera))) and torch.equal(net(None, camera), net(torch.zeros_like(lidar), camera))
    assert not torch.equal(net(lidar, camera), net(lidar, None))


def test_the_encoder_is_the_dense_network_on_occupied_sites():
    """Convolutions, norms, residuals and the four levels written out with conv3d; what test_export.py asks of spconv, where that is installed."""
    torch.manual_seed(0)
    net, (points, b) = trained(common.VoxelResNet(**GRID, width=2)), cloud(3000, 2)
    level = net.voxelise(points, b)
    x, shown = (dense(level.coords, f, 2, level.cells.shape) for f in (level.features, torch.ones(len(level.coords), 1)))

    def layer(x, conv, bn, shown, **how):
        weight = conv.weight.view(3, 3, 3, *conv.weight.shape[1:]).permute(4, 3, 0, 1, 2)
        return F.batch_norm(F.conv3d(x, weight, **how), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3) * shown

    def block(x, part, shown):
        y = layer(x, part.conv1, part.bn1, shown, padding=1).relu()
        return (x + layer(y, part.conv2, part.bn2, shown, padding=1)).relu()
    x, expected = layer(x, net.conv_input.conv, net.conv_input.bn, shown, padding=1).relu(), []
    for blocks, pad in ((net.conv1, None), (net.conv2, (1, 1, 1)), (net.conv3, (1, 1, 1)), (net.conv4, (0, 1, 1))):
        if pad:
            down, *blocks = blocks
            shown = (F.conv3d(shown, torch.ones(1, 1, 3, 3, 3), stride=2, padding=pad) > 0).float()
            x = layer(x, down.conv, down.bn, shown, stride=2, padding=pad).relu()
        for part in blocks:
            x = block(x, part, shown)
        expected.append((x, shown))
    for found, (x, shown) in zip(net(points, b), expected, strict=True):
        assert torch.equal(found.coords, shown[:, 0].nonzero()) and found.features.std() > 0.02
        torch.testing.assert_close(found.dense(2), x, atol=1e-5, rtol=1e-4)


def test_the_lift_written_out_camera_by_camera(monkeypatch):
    """Two frames, three cameras that look at the same cells: feature and chance of the depth by torch's own interpolation, summed over the cameras that see a cell."""
    torch.manual_seed(0)
    C, D, far, cells = 3, 5, 3.0, common.VoxelResNet(**GRID, width=2).cells[-1]
    net, x = common.CameraNet(18, C, max_depth=far, bins=D).eval(), 2 * torch.randn(6, C + D, 6, 8)
    matrices, hw = torch.cat([pinhole(yaw=yaw) for yaw in (0.0, 0.3, 2.5)] * 2), torch.tensor([[48, 64], [48, 64], [40, 56]] * 2)
    shift = torch.eye(4).repeat(6, 1, 1)
    shift[:, :3, 3] = 0.4 * torch.randn(6, 3)
    batch = SimpleNamespace(images=torch.zeros(6, 3, 48, 64, dtype=torch.uint8), hw=hw, lidar2img=matrices @ shift, size=2)
    monkeypatch.setattr(net.neck, "forward", lambda stages: x)
    with torch.no_grad():
        volume, seen = net(batch, cells)
    expected, cameras, beyond = torch.zeros(2, C, len(cells.centres("cpu"))), torch.zeros(2, len(cells.centres("cpu")), dtype=torch.int64), 0
    for i, (matrix, (h, w)) in enumerate(zip(batch.lidar2img, hw.tolist())):
        u, v, depth = (cells.centres("cpu") @ matrix[:3, :3].t() + matrix[:3, 3]).unbind(1)
        u, v = u / depth, v / depth
        shown = (depth > 1) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
        beyond += (shown & (depth >= far)).sum()
        shown &= depth < far
        at = torch.stack([u / 64, v / 48, (depth - 1) / (far - 1)], 1)[shown] * 2 - 1
        chance = x[i, C:].exp() / x[i, C:].exp().sum(0)
        pulled = F.grid_sample(x[None, i, :C], at[None, None, :, :2], align_corners=False, padding_mode="border")[0, :, 0]
        chance = F.grid_sample(chance[None, None], at[None, None, None], align_corners=False, padding_mode="border")[0, 0, 0, 0]
        expected[i // 3][:, shown] += pulled * chance * D
        cameras[i // 3] += shown
    assert (cameras > 1).sum() > 20 < beyond and cameras.amax(1).tolist() == [2, 2]
    torch.testing.assert_close(volume.flatten(2), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(seen.flatten(1), cameras > 0)


def test_padding_stays_hidden_where_a_mask_is_given():
    """Waymo's side pictures under CLAP's mask, which does not know where a picture ends."""
    torch.manual_seed(0)
    net, cells = common.CameraNet(18, 4, max_depth=6.0, bins=3).eval(), common.VoxelResNet(**GRID, width=2).cells[-1]
    images, masked = torch.randint(0, 255, (4, 3, 48, 64), dtype=torch.uint8), torch.zeros(4, 48, 64, dtype=torch.bool)
    masked[:, :16] = True
    other = torch.cat([images[..., :32], 255 - images[..., 32:]], 3)
    one, two = (net(SimpleNamespace(images=x, hw=torch.tensor([[48, 32]] * 4), lidar2img=pinhole(1, 4), size=1), cells, masked)[0] for x in (images, other))
    assert torch.equal(one, two) and one.any()


def test_the_lift_reaches_as_far_as_the_range():
    """BEVFusion's 60 m are for 54 m; KITTI's range ends at 70.4 m, Waymo's at 75.2 m."""
    for low, high, depth in (((-54., -54., -5.), (54., 54., 3.), 60.), ((0., -40., -3.), (70.4, 40., 1.), 70.4 * 60 / 54)):
        _, camera, _ = common.trunk(SimpleNamespace(low=low, high=high, voxel=(0.4, 0.4, 0.4)), 18, 2, 4)
        assert camera.max_depth == pytest.approx(depth)


# ---- §4 rendering ----

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 8.0))
def test_weights_are_the_paper_s_product(seed, h):
    """alpha, t and w written out term by term in float64."""
    sdf = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = common.neus_weights(sdf, h)
    for ray in range(3):
        passed = 1.0
        for n in range(8):
            phi = [1 / (1 + math.exp(-h * float(sdf[ray, i]))) for i in (n, n + 1)]
            alpha = max((phi[0] - phi[1]) / phi[0], 0.0)
            assert float(ours[ray, n]) == pytest.approx(passed * alpha, abs=1e-12)
            passed *= 1 - alpha
    assert (ours >= 0).all() and (ours.sum(1) <= 1 + 1e-6).all()


def test_weights_hold_deep_behind_a_surface_and_reversed_signs_render_nothing():
    assert common.neus_weights(torch.tensor([[-5.0, -20.0]]), 10.0).item() == pytest.approx(1.0)     # the plain form gives 2e-10 in float32
    away = torch.linspace(-1, 1, 20)[None]                                              # leaving a surface: sdf grows
    assert common.neus_weights(away, 50.0).abs().max() == 0
    sdf = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, h: common.neus_weights(s, h), (sdf, torch.tensor(3.0, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("h", [4.0, 16.0, 64.0])
def test_analytic_plane_and_sphere_have_their_depth(h):
    """96 samples over 59 m, true SDF: within half a section at the section's middle; shorter sections, smaller error."""
    depth = torch.linspace(1, 60, 96, dtype=torch.float64)[None]
    half = (depth[0, 1] - depth[0, 0]) / 2
    def rendered(sdf, depth):
        return (common.neus_weights(sdf, h) * (depth[:, 1:] + depth[:, :-1]) / 2).sum(1)
    assert (rendered(20.0 - depth, depth) - 20.0).abs() < half
    angle = torch.linspace(0, 0.2, 9, dtype=torch.float64)[:, None]                     # the sphere's edge stands at 0.2527 rad
    along, across = depth * angle.cos(), depth * angle.sin()
    truth = 20 * angle.cos() - (25 - (20 * angle.sin()) ** 2).sqrt()
    assert ((rendered(((along - 20) ** 2 + across ** 2).sqrt() - 5, depth) - truth[:, 0]).abs() < (half if h > 4 else 2 * half)).all()
    fine = torch.linspace(1, 60, 3000, dtype=torch.float64)[None]
    assert (rendered(20.0 - fine, fine) - 20.0).abs() < 2e-2 + 0.5 / h ** 2


def test_samples_are_stratified_and_follow_the_weights():
    g = torch.Generator().manual_seed(0)
    depth = common.stratified(torch.full((50,), 1.0), torch.full((50,), 33.0), torch.rand(50, 16, generator=g))
    assert torch.equal(((depth - 1) / 2).long(), torch.arange(16).expand(50, 16))
    edges, weights = torch.arange(5.0)[None], torch.tensor([[0.1, 0.0, 0.6, 0.3]])
    samples = common.importance(edges, weights, torch.rand(1, 200_000, generator=g))[0]
    share = torch.bincount(samples.long(), minlength=4) / 200_000
    torch.testing.assert_close(share, weights[0], atol=3e-3, rtol=0)
    inside = samples[(samples >= 2) & (samples < 3)]
    assert abs(float(inside.mean()) - 2.5) < 5e-3                                       # even within a section
    lost = common.importance(edges, torch.full_like(weights, math.nan), torch.rand(1, 9))
    assert lost.isfinite().all() and (lost >= 0).all() and (lost <= 4).all()


# ---- §6 curvature ----

def test_surface_variation_of_plane_line_and_ball():
    rng = np.random.default_rng(0)
    flat = np.concatenate([rng.uniform(-5, 5, (2000, 2)), np.zeros((2000, 1))], 1).astype(np.float32) + [50, -40, 1]
    assert common.surface_variation(flat[:200].astype(np.float32), flat.astype(np.float32)).max() < 1e-6
    line = (np.linspace(-5, 5, 500)[:, None] * [1, 2, 3]).astype(np.float32)
    assert common.surface_variation(line, line).max() < 1e-6
    ball = rng.normal(size=(20000, 3)).astype(np.float32)
    assert common.surface_variation(np.zeros((1, 3), np.float32), ball, k=20000)[0] == pytest.approx(1 / 3, abs=0.02)
    same = np.ones((40, 3), np.float32)
    assert (common.surface_variation(same, same) == 0).all()                            # no spread, no NaN
    assert common.surface_variation(ball[:0], ball).shape == (0,) and common.surface_variation(ball[:3], ball[:0]).tolist() == [0, 0, 0]


def test_surface_variation_is_the_eigenvalue_ratio():
    rng = np.random.default_rng(1)
    cloud = (rng.normal(size=(3000, 3)) * [8, 3, 0.5] + [40, 10, -1]).astype(np.float32)
    ours, expected = common.surface_variation(cloud[:300], cloud, 32), []
    for p in cloud[:300].astype(np.float64):                                            # brute-force neighbours, LAPACK eigenvalues
        near = cloud[np.argsort(((cloud - p) ** 2).sum(1), kind="stable")[:32]].astype(np.float64)
        values = np.linalg.eigvalsh(np.cov(near.T, bias=True))
        expected.append(values[0] / values.sum())
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    np.testing.assert_allclose(common.surface_variation((cloud[:300] @ turn * 1.7).astype(np.float32), (cloud @ turn * 1.7).astype(np.float32)), ours, atol=2e-5)


# ---- §7 runs ----

def test_learning_rate_schedule():
    assert common.cosine(0, 10, 100) == pytest.approx(1 / 3) and common.cosine(10, 10, 100) == 1 and common.cosine(55, 10, 100) == pytest.approx(0.5)
    assert common.cosine(100, 10, 100) == pytest.approx(0)
    assert all(common.cosine(s, 10, 100) > common.cosine(s + 1, 10, 100) for s in range(10, 99))


def test_a_term_that_is_not_finite_is_named(tmp_path):
    cfg = SimpleNamespace(out=str(tmp_path), batch=1)
    run = common.Run(cfg, 0, 1, 0, 10, torch.device("cpu"), "a test")
    run.log(0, ["a"], loss=torch.tensor(1.0), L_x=torch.tensor(0.5))
    with pytest.raises(FloatingPointError, match=r"step 1, rank 0: L_x not finite on nuscenes/scene/token; nothing was updated"):
        run.log(1, ["nuscenes/scene/token"], loss=torch.tensor(1.0), L_x=torch.tensor(float("nan")))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0]
    run.close()
    common.Run(cfg, 0, 1, 0, 10, torch.device("cpu"), "a test").close()                      # resuming at step 0 drops what comes again
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_random_streams_belong_to_frames():
    seeds = torch.tensor([5, 2**61 + 7])
    a, b = (torch.stack([torch.rand(3, generator=g) for g in common.frame_rngs(s, torch.device("cpu"))]) for s in (seeds, seeds.flip(0)))
    assert torch.equal(a, b.flip(0)) and not torch.equal(a[0], a[1])


def test_a_figure_shows_what_it_is_given(tmp_path):
    from PIL import Image
    red = np.zeros((8, 8, 3))
    red[..., 0] = 1
    common.figure(tmp_path / "a" / "b.png", [("picture", red), ("plot", lambda ax: ax.plot([0, 1], [0, 1], "b"))], 2)
    picture = np.asarray(Image.open(tmp_path / "a" / "b.png").convert("RGB")).reshape(-1, 3)
    assert (picture == [255, 0, 0]).all(1).mean() > 0.1 and (picture == [0, 0, 255]).all(1).any()


def test_some_rows_are_drawn_at_random_and_stay_in_order():
    rows = torch.arange(100, 400, 3)
    drawn = torch.stack([common.random_subset(30, rows, torch.Generator().manual_seed(seed)) for seed in range(300)])
    assert (drawn.diff(dim=1) > 0).all() and torch.isin(drawn, rows).all()
    assert (torch.bincount(drawn.flatten(), minlength=400)[rows] / 300 - 0.3).abs().max() < 0.13                        # each as often; sd 0.026
    assert torch.equal(common.random_subset(30, rows, torch.Generator().manual_seed(7)), drawn[7]) and torch.equal(common.random_subset(101, rows, torch.Generator()), rows)


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


def test_held_out_terms_are_those_of_eval_mode_and_leave_no_trace():
    model = Judge(3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = common.evaluate(model, rows_of(4, 2), "cpu", 2.0)
    expected = [2 * (batch.rows - 3) / (1 + 1e-5) ** 0.5 for batch in rows_of(4, 2)]
    assert found == {"L_sum": pytest.approx(np.mean([float(y.sum()) for y in expected])), "L_most": pytest.approx(np.mean([float(y.max()) for y in expected]))}
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- several processes ----

COUNTS = [(5, 2), (4, 0), (1, 1), (1, 0), (0, 0), (3, 3)]                           # rows on the two processes


def normalise_part(rank):
    results = []
    for counts in COUNTS:
        norm, x, weight = batch_norm_case(counts)
        mine = slice(0, counts[0]) if rank == 0 else slice(counts[0], sum(counts))
        part = x[mine].detach().requires_grad_()
        y = norm(part)
        (y * weight[mine]).sum().backward()
        statistics = [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]
        results.append((y.detach(), part.grad, norm.weight.grad, norm.bias.grad, *statistics, norm(part.detach().bfloat16()).dtype))
    return results


def batch_norm_case(counts):
    g = torch.Generator().manual_seed(sum(counts))
    norm = common.BatchNorm(4, eps=1e-3)
    norm.weight.data, norm.bias.data = torch.rand(4, generator=g) + 0.5, torch.randn(4, generator=g)
    norm.running_mean, norm.running_var = torch.randn(4, generator=g), torch.rand(4, generator=g) + 0.5
    return norm, 100 + torch.randn(sum(counts), 4, generator=g), torch.randn(sum(counts), 4, generator=g)


def test_batch_norm_over_two_processes_is_that_of_the_joined_rows(server, tmp_path):
    parts = on_two(server, normalise_part, tmp_path)
    for counts, one, two in zip(COUNTS, *parts, strict=True):
        norm, x, weight = batch_norm_case(counts)
        x.requires_grad_()
        few = sum(counts) < 2                                                       # then the running statistics stand in, unchanged
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, not few, 0.1, 1e-3)
        (y * weight).sum().backward()
        close = dict(rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(torch.cat([one[0], two[0]]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([one[1], two[1]]), x.grad if len(x) else torch.zeros(0, 4), **close)
        for i, grad in ((2, norm.weight.grad), (3, norm.bias.grad)):                # DDP adds them up
            torch.testing.assert_close(one[i] + two[i], grad, **close)
        for part in (one, two):
            torch.testing.assert_close(part[4], norm.running_mean, **close)
            torch.testing.assert_close(part[5], norm.running_var, rtol=1e-3, atol=1e-3)
            assert part[6] == (not few) and part[7] == torch.bfloat16


def log_stop_and_score(rank, out):
    run = common.Run(SimpleNamespace(out=out, batch=1), rank, 2, 0, 10, torch.device("cpu"), "a test")
    run.log(3, ["a"], loss=torch.tensor(1.0 + 2 * rank), L_x=0.25 * rank)
    run.asked = float(rank)                                                         # only one of the two was asked to stop
    stop = run.interrupted()
    run.close()
    return stop, common.evaluate(Judge(float(rank)), rows_of(3), "cpu")


def test_two_processes_log_their_mean_stop_together_and_score_with_the_saved_statistics(server, tmp_path):
    one, two = on_two(server, log_stop_and_score, tmp_path, str(tmp_path))
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [{"step": 3, "loss": 2.0, "L_x": 0.125}]
    assert one == two == (True, common.evaluate(Judge(0.0), rows_of(3), "cpu"))       # rank 0's are the ones that are saved


# ---- bfloat16, as on CUDA ----

def test_coordinates_are_not_rounded_to_bfloat16(monkeypatch):
    """The first convolution reads metres: in bfloat16 50.1 m is 50.0 m."""
    net, kinds = common.VoxelResNet(**GRID, width=2), []
    for conv in (net.conv_input.conv, net.conv1[0].conv1):
        conv.register_forward_hook(lambda module, given, out: kinds.append(out.dtype))
    monkeypatch.setattr(common, "bf16_autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    net(*cloud())
    assert kinds == [torch.float32, torch.bfloat16]


def test_an_encoder_in_bfloat16_stays_near_float32(monkeypatch):
    torch.manual_seed(0)
    net = common.VoxelResNet((-8., -8., -2.), (8., 8., 2.), (0.25, 0.25, 0.25), 8)
    points = torch.rand(4000, 5) * torch.tensor([16., 16., 1., 1., 0.]) - torch.tensor([8., 8., 1., 0., 0.])
    exact = net(points, torch.zeros(4000, dtype=torch.int64))
    monkeypatch.setattr(common, "bf16_autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    rough = net(points, torch.zeros(4000, dtype=torch.int64))
    for a, b in zip(exact, rough, strict=True):
        assert b.features.dtype == torch.float32 and torch.equal(a.coords, b.coords)
        assert (a.features - b.features).norm() < 0.05 * a.features.norm() and not torch.equal(a.features, b.features)
    rough[-1].features.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("script", ["clap", "cmcr", "simipu", "finetune"])
def test_every_script_trains_in_bfloat16(script, three_frames, monkeypatch):
    """No operation meets two kinds of number, and the loss is about that of float32."""
    from functools import partial

    import data
    from test_faults import config
    cfg, dataset = config(script, three_frames, ""), data.open_dataset(three_frames, "small")
    module, modality = importlib.import_module(script), dict(modality="fusion") if script == "finetune" else {}
    cfg, prepare = replace(cfg, **modality), module.Curvature(32) if script == "clap" else None
    augment = dict(clap=lambda: partial(data.augment_cloud, rotation=0.1, scale=0., flip=dataset.grid.mirrors), cmcr=lambda: module.Views(dataset.grid, cfg),
                   finetune=lambda: None, simipu=lambda: module.TwoViews(dataset.grid, cfg.points, cfg.rotation, cfg.scale, (cfg.zoom_low, cfg.zoom_high)))[script]()
    batch = next(data.loader(dataset, "train", 1, augment=augment, prepare=prepare).begin_at(0))
    torch.manual_seed(0)
    model = dict(clap=lambda: module.CLAP(cfg, dataset.grid), cmcr=lambda: module.CMCR(cfg, dataset.grid, False), simipu=lambda: module.SimIPU(cfg),
                 finetune=lambda: module.Detector(cfg, dataset.grid))[script]()
    exact = model(batch)[0]
    for place in {common, module}:
        if hasattr(place, "bf16_autocast"):
            monkeypatch.setattr(place, "bf16_autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    rough = model(batch)[0]
    rough.backward()
    assert rough.dtype == torch.float32 and rough != exact and abs(rough - exact) < 0.1 * abs(exact), (rough, exact)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_on_cuda_image_norms_become_synchronised_and_keep_their_tensors(monkeypatch):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, devices: model)
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), torch.nn.BatchNorm3d(4), common.BatchNorm(4))
    model[1].eval()
    tensors = list(model.parameters())
    wrapped = common.wrap(model, torch.device("cuda", 0), 2)
    assert [type(m) for m in (wrapped[0][1], wrapped[1], wrapped[2])] == [torch.nn.SyncBatchNorm, torch.nn.SyncBatchNorm, common.BatchNorm]
    assert all(a is b for a, b in zip(tensors, wrapped.parameters(), strict=True)) and wrapped[0][1].training and not wrapped[1].training
