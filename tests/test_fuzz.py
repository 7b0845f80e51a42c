"""Random geometry against independent computations, and files with random damage: a clear error of ours or a valid frame, nothing else.

100 damaged copies a reader; `python -m pytest -m slow tests/test_fuzz.py -s` tries 500 and prints the counts.
"""
import collections
import contextlib
import json
import os
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
from test_data import clone, put

GRID = data.GRIDS["nuscenes", "small"]
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


# ---- geometry ----

angles, metres = st.floats(-3.1, 3.1), st.floats(-20, 20)


@QUICK
@given(st.integers(0, 2**31), st.floats(200, 1500), angles, st.floats(-0.3, 0.3))
def test_what_is_projected_comes_back_along_its_ray(seed, focal, yaw, pitch):
    rng = np.random.default_rng(seed)
    turn = np.eye(4)
    turn[:3, :3] = data.Rotation.from_euler("zy", [yaw, pitch]).as_matrix() @ np.array([[0., 0, 1], [-1, 0, 0], [0, -1, 0]])     # right, down, forward -> ours
    turn[:3, 3] = rng.uniform(-2, 2, 3)
    K = np.diag([focal, focal, 1, 1.])
    K[:2, 2] = 128, 48
    points = np.c_[rng.uniform(-3, 3, (60, 2)), rng.uniform(2, 40, 60), np.ones(60)] @ turn.T        # about half of them in the picture
    lidar2img = torch.as_tensor(K @ np.linalg.inv(turn), dtype=torch.float32)[None]
    hw = torch.tensor([[96, 256]])
    point, image, uv, depth = common.project(torch.as_tensor(points[:, :3], dtype=torch.float32), torch.zeros(60, dtype=torch.int64), lidar2img, hw, 1, near=1.0)
    origin, direction = common.rays(uv, image, lidar2img)
    along = ((torch.as_tensor(points[:, :3], dtype=torch.float32)[point] - origin) * direction).sum(1, keepdim=True)
    torch.testing.assert_close(origin + along * direction, torch.as_tensor(points[:, :3], dtype=torch.float32)[point], atol=0.02, rtol=1e-3)
    uvd = points @ (K @ np.linalg.inv(turn))[:3].T
    inside = (uvd[:, 2] > 1.01) & ((uvd[:, :2] > 0.1 * uvd[:, 2:]) & (uvd[:, :2] < (255.9, 95.9) * uvd[:, 2:])).all(1)
    assert set(np.flatnonzero(inside)) <= set(point.tolist())
    assert (image == 0).all() and ((uv >= 0) & (uv < hw.flip(1))).all() and (depth >= 1).all() and len(torch.unique(point)) == len(point)


def clip(corners, others):
    """Sutherland-Hodgman: what of one convex polygon lies in another, both counter-clockwise. -> area"""
    polygon = list(corners)
    for a, b in zip(others, np.roll(others, -1, 0)):
        left, kept = [(b - a)[0] * (p - a)[1] - (b - a)[1] * (p - a)[0] for p in polygon], []
        for n, p in enumerate(polygon):
            if (left[n] >= 0) != (left[n - 1] >= 0):
                kept.append(polygon[n - 1] + left[n - 1] / (left[n - 1] - left[n]) * (p - polygon[n - 1]))
            if left[n] >= 0:
                kept.append(p)
        polygon = kept
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


rectangles = st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.2, 5), st.floats(0.2, 5), angles)


@QUICK
@given(rectangles, rectangles)
def test_shared_area_is_that_of_clipped_polygons_and_symmetric(a, b):
    a, b = np.array([a]), np.array([b])
    found, corners = finetune.shared_area(a, b)[0, 0], []
    for x, y, l, w, yaw in (*a, *b):
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        corners.append(np.array([[l, w], [-l, w], [-l, -w], [l, -w]]) / 2 @ turn.T + (x, y))
    assert found == pytest.approx(clip(*corners), abs=1e-6) and found == pytest.approx(finetune.shared_area(b, a)[0, 0], abs=1e-9)
    assert -1e-9 <= found <= min(a[0, 2] * a[0, 3], b[0, 2] * b[0, 3]) + 1e-9 and finetune.shared_area(a, a)[0, 0] == pytest.approx(a[0, 2] * a[0, 3])


@QUICK
@given(st.tuples(st.floats(-25.9, 25.2), st.floats(-25.9, 25.2), st.floats(-3, 3), st.floats(0.1, 20), st.floats(0.1, 20), st.floats(0.1, 5), angles, metres, metres))
def test_boxes_survive_their_code(box):
    cells = common.VoxelResNet(GRID.low, GRID.high, GRID.voxel, 2).cells[-1]                # centres at -25.55, -24.75, ... 24.85 m
    box = torch.tensor([box], dtype=torch.float64)
    cell, code, within = finetune.encode(box, cells)
    assert within.all()
    torch.testing.assert_close(finetune.decode(cell, code, cells), box, atol=1e-4, rtol=1e-5)


@QUICK
@given(arrays.arrays(bool, st.tuples(*[st.integers(1, n) for n in (3, 4, 5, 5)]), elements=st.booleans()), st.booleans(), st.integers(0, 9))
def test_sparse_convolutions_of_any_sites_are_dense_ones(taken, strided, seed):
    """Nothing at all, one voxel, borders, empty frames in the batch, full volumes."""
    generator = torch.Generator().manual_seed(seed)
    coords, (frames, *shape) = torch.as_tensor(taken).nonzero(), taken.shape
    x, weight = torch.randn(len(coords), 2, generator=generator), torch.randn(27, 2, 3, generator=generator)
    volume = torch.zeros(frames, *shape, 2).index_put(tuple(coords.t()), x).permute(0, 4, 1, 2, 3)
    kernel = weight.view(3, 3, 3, 2, 3).permute(4, 3, 0, 1, 2)
    out, kmap = common.strided_map(coords, shape, (1, 1, 1)) if strided else (coords, common.submanifold_map(coords, shape))
    dense = F.conv3d(volume, kernel, padding=1, stride=2 if strided else 1).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(common.SparseConvolution.apply(x, weight, kmap), dense[tuple(out.t())], atol=1e-4, rtol=1e-4)
    left = dense.clone()
    left[tuple(out.t())] = 0
    assert not strided or not left.any()                                                # every site that receives anything is there


@QUICK
@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 60), st.just(3)), elements=st.floats(-30, 30, width=32)), st.integers(1, 3))
def test_voxels_are_the_means_of_their_points(xyz, frames):
    """Doubled points, borders, points outside, frames without any."""
    net = common.VoxelResNet(GRID.low, GRID.high, GRID.voxel, 2)
    b = torch.arange(len(xyz)) % frames
    points = torch.cat([torch.as_tensor(xyz), torch.rand(len(xyz), 2)], 1)
    level, sums = net.voxelise(points, b), {}
    low, step = np.array(GRID.low, np.float32), np.array(GRID.voxel, np.float32)
    for frame, point in zip(b.tolist(), points.numpy()):
        if (point[:3] >= low).all() and (point[:3] < np.array(GRID.high, np.float32)).all():
            site = tuple(np.minimum(np.floor((point[:3] - low) / step), np.array(level.cells.shape[::-1]) - 1).astype(int))
            sums.setdefault((frame, *site[::-1]), []).append(point)
    assert len(level.coords) == len(sums)
    found = {tuple(site): mean for site, mean in zip(level.coords.tolist(), level.features.numpy())}
    for site in found.keys() & sums.keys():
        held = np.array(sums[site], np.float64)
        if (abs((held[:, :3] - low) / step % 1 - 0.5) < 0.49).all():
            np.testing.assert_allclose(found[site], held.mean(0), rtol=1e-5, atol=1e-5)
    border = (abs((points[:, :3].numpy() - low) / step % 1 - 0.5) > 0.499).any(1).sum()           # within rounding of it a point may fall on either side
    assert len(found.keys() ^ sums.keys()) <= 2 * border


# ---- damaged files ----

def flip(raw, rng):
    raw = np.frombuffer(raw, np.uint8).copy()
    at = rng.integers(len(raw), size=rng.integers(1, 20))
    raw[at] ^= rng.integers(1, 256, len(at), dtype=np.uint8)
    return raw.tobytes()


def block(raw, rng):
    a, b = sorted(rng.integers(len(raw) + 1, size=2))
    return raw[:a] + (bytes(b - a) if rng.random() < 0.5 else raw[b:] + raw[a:b]) + (raw[b:] if rng.random() < 0.5 else b"")


STRANGE = (None, "", "x", -1, 0, 1e308, -1e308, float("nan"), float("inf"), 2**70, [], [[]], [1], {}, {"a": 1}, True, "../..", "\ud800", "a" * 100_000,
           [0.] * 9, ["b"] * 4)


def wrong_type(raw, rng):
    """A JSON table of which one value, one row or the whole is something else."""
    try:
        rows = json.loads(raw)
        row = rows[int(rng.integers(len(rows)))] if isinstance(rows, list) else rows
        key = list(row)[int(rng.integers(len(row)))]
    except (ValueError, LookupError, TypeError):
        return flip(raw, rng)
    value = STRANGE[int(rng.integers(len(STRANGE)))]
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
    words[int(rng.integers(len(words)))] = str(STRANGE[int(rng.integers(len(STRANGE)))]).encode("utf-8", "replace")
    return b" ".join(words)


def wrong_column(raw, rng):
    """A parquet table of which one column has other values, another type or is gone."""
    import io

    import pyarrow
    import pyarrow.parquet as parquet
    try:
        table = parquet.read_table(io.BytesIO(raw))
    except (pyarrow.ArrowException, OSError):                                           # damaged already
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
        values = {3: [None] * table.num_rows, 4: ["x"] * table.num_rows, 5: [float(STRANGE[int(rng.choice([3, 4, 5, 7, 8]))])] * table.num_rows}[kind]
        table = table.set_column(n, table.column_names[n], pyarrow.array(values))
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def damage(root, rng):
    """Damage one file of the folder, or remove it. -> what was done"""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".npy")
    endings = sorted({path.suffix for path in files})
    ending = endings[int(rng.integers(len(endings)))]                                   # tables as often as pictures and clouds
    file = [path for path in files if path.suffix == ending]
    file = file[int(rng.integers(len(file)))]
    raw, ways = file.read_bytes(), [flip, block, lambda raw, rng: raw[:int(rng.integers(len(raw)))], lambda raw, rng: b""]
    special = {".json": wrong_type, ".txt": wrong_word, ".parquet": wrong_column}.get(ending)
    ways = [special] * 6 + ways if special else ways
    way = ways[int(rng.integers(len(ways)))]
    put(file, way(raw, rng) if len(raw) else b"x")
    return f"{file.relative_to(root)}, {way.__name__}"


def too_long(*_):
    raise TimeoutError("a reader hangs")


def largest_size():
    """Of this process since it was last asked to forget it, KiB."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def try_damaged(root, place, cases, seed):
    """Read damaged copies of `root`. -> Counter of what came of it; anything but a frame or a DataError fails with its seed."""
    outcomes = collections.Counter()
    with contextlib.suppress(OSError):                                                  # not everywhere allowed
        Path("/proc/self/clear_refs").write_text("5")                                   # the largest size starts anew
    before, handler = largest_size(), signal.signal(signal.SIGALRM, too_long)
    for case in range(seed, seed + cases):
        rng = np.random.default_rng(case)
        copy = clone(Path(root), place / str(case))
        done = [damage(copy, rng) for _ in range(rng.integers(1, 3))]
        signal.alarm(30)
        try:
            with np.errstate(all="ignore"):                                             # enormous numbers overflow before they are refused
                dataset = data.open_dataset(copy, "small")
                for name in ("train", "val"):
                    for i in dataset.split(name)[:2]:
                        frame = dataset.load(int(i))
                        rows = dataset.annotations(int(i))
                        assert np.isfinite(frame.points).all() and np.isfinite(frame.lidar2img).all() and np.isfinite(frame.lidar2world).all(), done
                        assert frame.boxes is None or np.isfinite(frame.boxes[:, :7]).all() and len(rows) >= len(frame.boxes), done
                        data.collate([frame], [0])
            outcomes["frames"] += 1
        except data.DataError as error:
            assert len(str(error)) < 5000, (case, done)
            outcomes["clear errors"] += 1
        except BaseException as error:
            raise AssertionError(f"case {case}: {done}: {type(error).__name__}: {str(error)[:500]}") from error
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
    """Root of a whole data set of each kind; a cache of its own."""
    monkeypatch.setenv("LIDAR_CAMERA_CACHE", str(tmp_path / "cache"))
    if request.param == "raw":
        root = clone(request.getfixturevalue("kitti"), tmp_path / "drives")
        for folder in ("training", "testing", "ImageSets"):
            os.rename(root / folder, tmp_path / folder)
        return root
    return request.getfixturevalue({"nuscenes": "three_frames"}.get(request.param, request.param))


def test_damaged_files_give_clear_errors_or_frames(whole, tmp_path):
    found = try_damaged(whole, tmp_path, 100 if whole.name != "drives" else 30, seed=0)
    assert found["clear errors"] > 10


@pytest.mark.slow
def test_five_hundred_damaged_copies_of_each(whole, tmp_path):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(whole.name, dict(try_damaged(whole, tmp_path, 500, seed)), "from seed", seed)
