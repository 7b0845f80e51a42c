"""Random geometry against independent computations, and files with random damage.

A damaged file gives a clear error of ours or a valid frame, nothing else. There are 100 damaged
copies a reader; `python -m pytest -m slow tests/test_fuzz.py -s` tries 500 and prints the counts.
"""
import collections
import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import common
import data
import finetune
import synthetic
from test_common import kernel_map
from test_data import clone, put

GRID = data.GRIDS["nuscenes", "small"]
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


# ---- geometry ------------------------------------------------------------------------

angles = st.floats(-3.1, 3.1)
metres = st.floats(-20, 20)
CAMERA_AXES = np.array([[0., 0, 1], [-1, 0, 0], [0, -1, 0]])    # right, down, forward -> ours


@QUICK
@given(st.integers(0, 2**31), st.floats(200, 1500), angles, st.floats(-0.3, 0.3))
def test_projected_points_lie_on_their_rays(seed, focal, yaw, pitch):
    rng = np.random.default_rng(seed)
    turn = np.eye(4)
    turn[:3, :3] = data.Rotation.from_euler("zy", [yaw, pitch]).as_matrix() @ CAMERA_AXES
    turn[:3, 3] = rng.uniform(-2, 2, 3)
    K = np.diag([focal, focal, 1, 1.])
    K[:2, 2] = 128, 48
    in_camera = np.c_[rng.uniform(-3, 3, (60, 2)), rng.uniform(2, 40, 60), np.ones(60)]
    points = in_camera @ turn.T    # about half of them in the image
    matrix = K @ np.linalg.inv(turn)
    xyz = torch.as_tensor(points[:, :3], dtype=torch.float32)
    lidar2img = torch.as_tensor(matrix, dtype=torch.float32)[None]
    hw = torch.tensor([[96, 256]])
    point, image, uv, depth = common.project(xyz, [60], lidar2img, hw, near=1.0)
    origin, direction = common.rays(uv, image, lidar2img)
    along = ((xyz[point] - origin) * direction).sum(1, keepdim=True)
    torch.testing.assert_close(origin + along * direction, xyz[point], atol=0.02, rtol=1e-3)

    uvd = points @ matrix[:3].T
    low = uvd[:, :2] > 0.1 * uvd[:, 2:]
    high = uvd[:, :2] < (255.9, 95.9) * uvd[:, 2:]
    inside = (uvd[:, 2] > 1.01) & (low & high).all(1)
    assert set(np.flatnonzero(inside)) <= set(point.tolist())
    assert (image == 0).all() and ((uv >= 0) & (uv < hw.flip(1))).all() and (depth >= 1).all()
    assert len(torch.unique(point)) == len(point)


def clip(corners, others):
    """Area that two convex polygons share, both counter-clockwise (Sutherland-Hodgman)."""
    polygon = list(corners)
    for a, b in zip(others, np.roll(others, -1, 0)):
        left = [(b - a)[0] * (p - a)[1] - (b - a)[1] * (p - a)[0] for p in polygon]
        clipped = []
        for n, p in enumerate(polygon):
            if (left[n] >= 0) != (left[n - 1] >= 0):
                share = left[n - 1] / (left[n - 1] - left[n])
                clipped.append(polygon[n - 1] + share * (p - polygon[n - 1]))
            if left[n] >= 0:
                clipped.append(p)
        polygon = clipped
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


rectangles = st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.2, 5), st.floats(0.2, 5),
                       angles)


@QUICK
@given(rectangles, rectangles)
def test_shared_area_matches_clipped_polygons_and_is_symmetric(a, b):
    a, b = np.array([a]), np.array([b])
    corners = []
    for x, y, l, w, yaw in (*a, *b):
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        square = np.array([[l, w], [-l, w], [-l, -w], [l, -w]]) / 2
        corners.append(square @ turn.T + (x, y))
    shared = finetune.shared_area(a, b)[0, 0]
    area_a = a[0, 2] * a[0, 3]
    area_b = b[0, 2] * b[0, 3]
    assert shared == pytest.approx(clip(*corners), abs=1e-6)
    assert shared == pytest.approx(finetune.shared_area(b, a)[0, 0], abs=1e-9)
    assert -1e-9 <= shared <= min(area_a, area_b) + 1e-9
    assert finetune.shared_area(a, a)[0, 0] == pytest.approx(area_a)


# Cell centres of the small grid stand at -25.55, -24.75, ... 24.85 m.
boxes = st.tuples(st.floats(-25.9, 25.2), st.floats(-25.9, 25.2), st.floats(-3, 3),
                  st.floats(0.1, 20), st.floats(0.1, 20), st.floats(0.1, 5),
                  angles, metres, metres)


@QUICK
@given(boxes)
def test_decode_inverts_encode(box):
    cells = common.VoxelResNet(GRID.low, GRID.high, GRID.voxel, 2).cells[-1]
    box = torch.tensor([box], dtype=torch.float64)
    cell, code, within = finetune.encode(box, cells)
    assert within.all()
    torch.testing.assert_close(finetune.decode(cell, code, cells), box, atol=1e-4, rtol=1e-5)


occupied_sites = arrays.arrays(bool, st.tuples(*[st.integers(1, n) for n in (3, 4, 5, 5)]),
                               elements=st.booleans())


@QUICK
@given(occupied_sites, st.booleans(), st.booleans(), st.integers(0, 9))
def test_sparse_convolutions_match_dense_ones(occupied, strided, on_gpu, seed):
    """Nothing at all, one voxel, borders, empty frames in the batch, full volumes."""
    generator = torch.Generator().manual_seed(seed)
    coords = torch.as_tensor(occupied).nonzero()
    frames, *shape = occupied.shape
    x = torch.randn(len(coords), 2, generator=generator)
    weight = torch.randn(27, 2, 3, generator=generator)
    volume = torch.zeros(frames, *shape, 2).index_put(tuple(coords.t()), x).permute(0, 4, 1, 2, 3)
    kernel = weight.view(3, 3, 3, 2, 3).permute(4, 3, 0, 1, 2)
    out, kmap = kernel_map(coords, shape, frames, (1, 1, 1) if strided else None, on_gpu)
    dense = F.conv3d(volume, kernel, padding=1, stride=2 if strided else 1)
    dense = dense.permute(0, 2, 3, 4, 1)
    sparse = common.SparseConvolution.apply(x, weight, kmap)
    torch.testing.assert_close(sparse, dense[tuple(out.t())], atol=1e-4, rtol=1e-4)
    left = dense.clone()
    left[tuple(out.t())] = 0
    assert not strided or not left.any()    # no site that receives anything is missing


clouds = arrays.arrays(np.float32, st.tuples(st.integers(0, 60), st.just(3)),
                       elements=st.floats(-30, 30, width=32))


@QUICK
@given(clouds, st.integers(1, 3))
def test_voxels_are_the_means_of_their_points(xyz, frames):
    """Doubled points, borders, points outside, frames without any."""
    net = common.VoxelResNet(GRID.low, GRID.high, GRID.voxel, 2)
    b = torch.arange(len(xyz)) % frames
    points = torch.cat([torch.as_tensor(xyz), torch.rand(len(xyz), 2)], 1)
    level = net.voxelise(points, b, frames)
    low = np.array(GRID.low, np.float32)
    high = np.array(GRID.high, np.float32)
    step = np.array(GRID.voxel, np.float32)
    last = np.array(level.cells.shape[::-1]) - 1
    members = {}                                  # {(frame, z, y, x): points}
    for frame, point in zip(b.tolist(), points.numpy()):
        if (point[:3] >= low).all() and (point[:3] < high).all():
            site = np.minimum(np.floor((point[:3] - low) / step), last).astype(int)
            members.setdefault((frame, *site[::-1]), []).append(point)
    assert len(level.coords) == len(members)

    # Within rounding of a border a point may fall on either side.
    def from_middle(points):
        return abs((points[:, :3] - low) / step % 1 - 0.5)

    means = {tuple(site): mean
             for site, mean in zip(level.coords.tolist(), level.features.numpy())}
    for site in means.keys() & members.keys():
        inside = np.array(members[site], np.float64)
        if (from_middle(inside) < 0.49).all():
            np.testing.assert_allclose(means[site], inside.mean(0), rtol=1e-5, atol=1e-5)
    border = (from_middle(points.numpy()) > 0.499).any(1).sum()
    assert len(means.keys() ^ members.keys()) <= 2 * border


# ---- damaged files -------------------------------------------------------------------

def choose(items, rng):
    """One of the items at random."""
    return items[int(rng.integers(len(items)))]


def flip(raw, rng):
    """Change a few bytes."""
    raw = np.frombuffer(raw, np.uint8).copy()
    at = rng.integers(len(raw), size=rng.integers(1, 20))
    raw[at] ^= rng.integers(1, 256, len(at), dtype=np.uint8)
    return raw.tobytes()


def block(raw, rng):
    """Replace a stretch by zeros or by the rest and itself; the rest follows or is gone."""
    a, b = sorted(rng.integers(len(raw) + 1, size=2))
    middle = bytes(b - a) if rng.random() < 0.5 else raw[b:] + raw[a:b]
    return raw[:a] + middle + (raw[b:] if rng.random() < 0.5 else b"")


def cut(raw, rng):
    """End the file early."""
    return raw[:int(rng.integers(len(raw)))]


def empty(raw, rng):
    return b""


STRANGE = (None, "", "x", -1, 0, 1e308, -1e308, float("nan"), float("inf"), 2**70,
           [], [[]], [1], {}, {"a": 1}, True, "../..", "\ud800", "a" * 100_000,
           [0.] * 9, ["b"] * 4)
NUMBERS = [3, 4, 5, 7, 8]    # which of them fill a column of numbers


def wrong_type(raw, rng):
    """A JSON table of which one value, one row or the whole is something else."""
    try:
        rows = json.loads(raw)
        row = choose(rows, rng) if isinstance(rows, list) else rows
        key = choose(list(row), rng)
    except (ValueError, LookupError, TypeError):
        return flip(raw, rng)
    value = choose(STRANGE, rng)
    how = rng.random()
    if how < 0.8:
        row[key] = value
    elif how < 0.9 and isinstance(rows, list):
        rows[int(rng.integers(len(rows)))] = value
    else:
        rows = value
    return json.dumps(rows).encode()


def wrong_word(raw, rng):
    """A text of which one word is something else."""
    words = raw.split(b" ")
    word = str(choose(STRANGE, rng)).encode("utf-8", "replace")
    words[int(rng.integers(len(words)))] = word
    return b" ".join(words)


def wrong_column(raw, rng):
    """A parquet table of which one column has other values, another type or is gone."""
    import pyarrow
    import pyarrow.parquet as parquet
    try:
        table = parquet.read_table(io.BytesIO(raw))
    except (pyarrow.ArrowException, OSError):    # it is damaged already
        return flip(raw, rng)
    n = int(rng.integers(table.num_columns))
    kind = int(rng.integers(6))
    if kind == 0:
        table = table.remove_column(n)
    elif kind == 1:
        table = table.slice(0, int(rng.integers(table.num_rows + 1)))
    elif kind == 2:
        table = pyarrow.concat_tables([table, table])
    else:
        number = float(STRANGE[int(rng.choice(NUMBERS))])
        value = {3: None, 4: "x", 5: number}[kind]
        column = pyarrow.array([value] * table.num_rows)
        table = table.set_column(n, table.column_names[n], column)
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def damage(root, rng):
    """Damage one file of the folder, or remove it. -> what was done"""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".npy")
    ending = choose(sorted({path.suffix for path in files}), rng)    # tables as often as clouds
    file = choose([path for path in files if path.suffix == ending], rng)
    raw = file.read_bytes()
    ways = [flip, block, cut, empty]
    special = {".json": wrong_type, ".txt": wrong_word, ".parquet": wrong_column}.get(ending)
    if special:
        ways = [special] * 6 + ways
    way = choose(ways, rng)
    put(file, way(raw, rng) if len(raw) else b"x")
    return f"{file.relative_to(root)}, {way.__name__}"


def too_long(*_):
    raise TimeoutError("a reader hangs")


def largest_size():
    """The largest size of this process since it was last asked to forget it, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise OSError("/proc/self/status: no line VmHWM")


def read_frames(root, done, **kinds):
    """Read two frames of each split and hold them to what a valid frame has.

    kinds: what is read, as open_dataset takes it.
    """
    dataset = data.open_dataset(root, "small", **kinds)
    for name in ("train", "val"):
        for i in dataset.split(name)[:2]:
            frame = dataset.load(int(i))
            rows = dataset.annotations(int(i))
            assert np.isfinite(frame.points).all(), done
            assert np.isfinite(frame.lidar2img).all() and np.isfinite(frame.lidar2world).all(), done
            if frame.boxes is not None:
                assert np.isfinite(frame.boxes[:, :7]).all(), done
                assert len(rows) >= len(frame.boxes), done
            data.collate([frame], [0])
            if dataset.point_labels:
                label = frame.extra["points_label"]
                classes = len(data.POINT_CLASSES[dataset.grid.dataset])
                assert label.shape == (len(frame.points),), done
                assert ((label >= -1) & (label < classes)).all(), done
                full, truth = dataset.points_on_disk(int(i), label.clip(0))
                assert full.shape == truth.shape, done
                dataset.write_points(root / "results", int(i), full)


def try_damaged(root, place, cases, seed, **kinds):
    """Read damaged copies of `root`, `kinds` of what is in them. -> Counter of what came of it

    Anything but a frame or a DataError fails with its seed.
    """
    outcomes = collections.Counter()
    with contextlib.suppress(OSError):                      # not allowed everywhere
        Path("/proc/self/clear_refs").write_text("5")       # the largest size starts anew
    before = largest_size()
    handler = signal.signal(signal.SIGALRM, too_long)
    for case in range(seed, seed + cases):
        rng = np.random.default_rng(case)
        copy = clone(Path(root), place / str(case))
        done = [damage(copy, rng) for _ in range(rng.integers(1, 3))]
        signal.alarm(30)
        try:
            with np.errstate(all="ignore"):    # enormous numbers overflow before they are refused
                read_frames(copy, done, **kinds)
            outcomes["frames"] += 1
        except data.DataError as error:
            assert len(str(error)) < 5000, (case, done)
            outcomes["clear errors"] += 1
        except BaseException as error:
            message = f"case {case}: {done}: {type(error).__name__}: {str(error)[:500]}"
            raise AssertionError(message) from error
        finally:
            signal.alarm(0)
        for file in sorted(copy.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    signal.signal(signal.SIGALRM, handler)
    grown = (largest_size() - before) / 2**20
    assert grown < 1.0, f"{grown:.1f} GiB more memory"
    return outcomes


@pytest.fixture(params=["nuscenes", "kitti", "raw", "waymo"])
def whole(request, tmp_path, monkeypatch):
    """Root of an undamaged data set of each kind, with a cache of its own."""
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(tmp_path / "cache"))
    if request.param == "raw":
        root = clone(request.getfixturevalue("kitti"), tmp_path / "drives")
        for folder in ("training", "testing", "ImageSets"):
            os.rename(root / folder, tmp_path / folder)
        return root
    fixture = {"nuscenes": "three_frames"}.get(request.param, request.param)
    return request.getfixturevalue(fixture)


def test_damaged_files_give_clear_errors_or_frames(whole, tmp_path):
    outcomes = try_damaged(whole, tmp_path, 100 if whole.name != "drives" else 30, seed=0)
    assert outcomes["clear errors"] > 10


@pytest.fixture(scope="module", params=["nuscenes", "kitti", "waymo"])
def labelled(request, tmp_path_factory):
    """Root of a data set of each kind with classes of points, and without pictures."""
    root = tmp_path_factory.mktemp("labelled") / request.param
    synthetic.write(root, train=2, val=1, frames=1, format=request.param)
    for folder in ("samples/CAM_*", "maps", "*/camera_*", "ImageSets"):
        for path in root.glob(folder):
            shutil.rmtree(path)
    if request.param != "kitti":
        return root
    rng = np.random.default_rng(0)
    for sequence in root.glob("dataset/sequences/*"):
        calibration = (root / "training/calib/000000.txt").read_text()
        (sequence / "calib.txt").write_text(calibration.replace("Tr_velo_to_cam", "Tr"))
        np.savetxt(sequence / "poses.txt", np.tile(np.eye(4)[:3].ravel(), (5, 1)))
        np.savetxt(sequence / "times.txt", rng.random(5))
    return root / "dataset"


POINTS = dict(images=False, labels=False, point_labels=True)


def test_damaged_classes_of_points_give_clear_errors_or_frames(labelled, tmp_path):
    outcomes = try_damaged(labelled, tmp_path, 100, seed=0, **POINTS)
    assert outcomes["clear errors"] > 10 and outcomes["frames"] > 2


@pytest.mark.slow
def test_five_hundred_damaged_copies_with_classes_of_points(labelled, tmp_path):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    outcomes = try_damaged(labelled, tmp_path, 500, seed, **POINTS)
    print(labelled, dict(outcomes), "from seed", seed)


@pytest.mark.slow
def test_five_hundred_damaged_copies_of_each(whole, tmp_path):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    outcomes = try_damaged(whole, tmp_path, 500, seed)
    print(whole.name, dict(outcomes), "from seed", seed)
