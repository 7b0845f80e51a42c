"""depth.py: points, bins, metrics and the guess against plain loops; a frozen network stays as it
is; runs that stop, run on two processes, or score again."""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import depth
from conftest import on_two
from depth import BINS, METRICS, SMALL, Config, DepthNet, decode, depth_points, encode

CPU = torch.device("cpu")
GRID = data.GRIDS["nuscenes", "small"]
TINY = depth.with_defaults(replace(Config(preset="small", gpus=0, **SMALL), probe=True, points=50,
                                   batch=2, steps=3, warmup=0))


@pytest.fixture(scope="module")
def batch(world):
    return data.loader(str(world), "train", 2, preset="small").first(1)[0]


def seeded(cfg=TINY):
    torch.manual_seed(0)
    return DepthNet(cfg, GRID)


# ---- points, bins, metrics, guess ----------------------------------------------------

def shown(batch, k):
    """Points of a batch that its image k shows, in float64 -> (n, 3) column, row, depth."""
    first = sum(batch.counts[:k // batch.cameras])
    xyz = batch.points[first:first + batch.counts[k // batch.cameras], :3].double().numpy()
    uvd = xyz @ batch.lidar2img[k, :3, :3].double().numpy().T
    uvd = uvd + batch.lidar2img[k, :3, 3].double().numpy()
    uvd = uvd[(uvd[:, 2] > depth.NEAR) & (uvd[:, 2] < depth.FAR)]
    uvd[:, :2] /= uvd[:, 2:]
    height, width = batch.hw[k].tolist()
    return uvd[(uvd[:, :2] >= 0).all(1) & (uvd[:, 0] < width) & (uvd[:, 1] < height)]


def test_points_behind_much_nearer_ones_are_dropped(batch):
    image, uv, metres = depth_points(batch)
    rows = torch.cat([image[:, None], uv, metres[:, None]], 1).double().numpy()
    cropped = torch.cat([part.view(len(part), -1) for part in depth_points(batch, "kitti")], 1)
    for k in (1, 10):
        height, width = batch.hw[k].tolist()
        points = shown(batch, k)
        pixels = np.floor(points[:, :2])
        clear = []
        for point, pixel in zip(points, pixels):
            hidden = False
            for other, place in zip(points, pixels):
                hidden |= max(abs(place - pixel)) <= 4 and other[2] < 0.7 * point[2]
            if not hidden:
                clear.append(point)
        assert 100 < len(clear) < len(points) - 10
        share = np.array(clear)[:, :2] / (width, height)
        inside = (share > (0.03594771, 0.40810811)) & (share < (0.96405229, 0.99189189))
        # in another order, and rounding moves single points over a border
        for seen, expected in ((rows, np.array(clear)),
                               (cropped.double().numpy(), np.array(clear)[inside.all(1)])):
            own = seen[seen[:, 0] == k, 1:]
            missed = sum(abs(own - point).max(1).min() > 1e-3 for point in expected)
            assert abs(len(own) - len(expected)) <= 2 and missed <= 2


def test_points_are_drawn_frame_by_frame(batch, world):
    whole = depth.drawn_points(batch, 50)
    assert len(whole[0]) == 100
    assert depth.drawn_points(batch, 10**6)[2].tolist() == depth_points(batch)[2].tolist()
    dataset = data.open_dataset(world, "small")
    order = [dataset.names.index(name) for name in batch.names]
    alone = data.collate([dataset.load(order[1])], batch.seeds[1:].tolist())
    image, uv, metres = depth.drawn_points(alone, 50)
    assert torch.equal(uv, whole[1][50:]) and torch.equal(image + 6, whole[0][50:])


def test_a_bin_decodes_to_its_centre():
    edges = [70 ** (k / BINS) for k in range(BINS + 1)]
    centres = torch.tensor([math.sqrt(a * b) for a, b in zip(edges, edges[1:])])
    assert encode(centres).tolist() == list(range(BINS))
    torch.testing.assert_close(decode(1000 * torch.eye(BINS)), centres)
    assert encode(torch.tensor([0.01, 0.999, 1.001, 69.9, 79.0])).tolist() == [0, 0, 0, 63, 63]
    two = torch.full((1, BINS), -1000.0)
    two[0, [3, 40]] = torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(decode(two), centres[3:4] ** 0.75 * centres[40:41] ** 0.25)


def test_metrics_are_eigens_for_each_image():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.1, 79, 300)
    found = truth * np.exp(rng.normal(0, 0.4, 300))
    image = np.sort(rng.choice([0, 2, 3], 300))
    metrics = depth.image_metrics(*map(torch.tensor, (found, truth, image)), 5)
    assert metrics.shape == (3, 9)                  # images 1 and 4 show no point
    for row, k in zip(metrics.tolist(), (0, 2, 3)):
        d, t = found[image == k], truth[image == k]
        ratio = np.maximum(d / t, t / d)
        g = np.log(d) - np.log(t)
        expected = [
            np.mean(abs(d - t) / t), np.mean((d - t) ** 2 / t), np.sqrt(np.mean((d - t) ** 2)),
            np.sqrt(np.mean(g ** 2)), np.mean(abs(np.log10(d) - np.log10(t))),
            100 * np.sqrt(np.mean(g ** 2) - np.mean(g) ** 2),
            np.mean(ratio < 1.25), np.mean(ratio < 1.25 ** 2), np.mean(ratio < 1.25 ** 3)]
        assert row == pytest.approx(expected, rel=1e-9)


def test_the_guess_is_the_depth_of_labelled_points_at_the_same_place(world):
    dataset = data.open_dataset(world, "small", sweeps=1)
    model = seeded(replace(TINY, probe=False))
    depth.measure(model, model.cfg, dataset, dataset.split("train")[:2], CPU, 0, 1)
    labelled = []
    for i in dataset.split("train")[:2]:
        image, uv, metres = depth_points(data.collate([dataset.load(i)], [0]))
        labelled += [(k, v // 4, u // 16, math.log(d)) for k, (u, v), d in zip(
            image.tolist(), uv.tolist(), metres.tolist())]
    labelled = [row for row in labelled if row[0] < 5]
    model.table[5] = 0              # a camera without points
    image, uv, _ = depth_points(data.collate([dataset.load(dataset.split("val")[0])], [0]))
    image, uv = image[::40], uv[::40]
    levels = set()
    for k, (u, v), guess in zip(image.tolist(), uv.tolist(), model.guess(image, uv).tolist()):
        alike = [[row[3] for row in labelled if row[:n] == (k, v // 4, u // 16)[:n]]
                 for n in (3, 2, 0)]
        level = next(n for n, logs in enumerate(alike) if logs)
        levels.add(level)
        assert guess == pytest.approx(math.exp(np.mean(alike[level])), rel=1e-5)
    assert levels == {0, 1, 2}


# ---- the network ---------------------------------------------------------------------

def test_a_frame_without_points_has_no_loss(batch):
    empty = replace(batch, points=batch.points[:0], counts=[0, 0])
    for model in (seeded(), seeded(replace(TINY, probe=False))):
        loss, terms = model(empty)
        loss.backward()
        assert loss == 0 and terms["abs_rel"] == 0
        loss, _ = model(batch)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(BINS), rel=0.1)   # the head starts at zero


def test_kept_maps_are_those_of_the_pictures(batch):
    model = seeded()
    points = depth_points(batch)[:2]
    torch.nn.init.normal_(model.head.weight)
    model.norm.eval()
    first = model.logits(batch, *points)
    assert list(model.cache) == batch.names
    assert torch.equal(model.logits(batch, *points), first)
    whole = seeded(replace(TINY, probe=False))
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(whole.eval().logits(batch, *points), first, rtol=1e-3, atol=1e-3)
    for part in (model.eval(), whole):
        part.cache.clear()
        part.logits(batch, *points)
        assert not part.cache       # val frames are seen once


# ---- whole runs ----------------------------------------------------------------------

def train(out, world, **fields):
    cfg = replace(TINY, data=str(world), out=str(out), **fields)
    depth.train(0, 1, cfg)
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def probe(world, tmp_path_factory):
    """The folder of a whole run of --probe."""
    out = tmp_path_factory.mktemp("probe") / "run"
    train(out, world)
    return out


def test_a_frozen_network_keeps_its_weights_and_its_collected_statistics(probe, world, tmp_path):
    torch.manual_seed(0)
    model = DepthNet(TINY, GRID)
    loader = data.loader(str(world), "train", 2, preset="small")
    dataset = loader.dataset
    maps = [model.maps(batch.images, batch.hw)[2] for batch in loader.first(1)]
    assert maps[0].isfinite().all()
    depth.measure(model, TINY, dataset, dataset.split("train")[:1], CPU, 0, 1)
    trained = torch.load(probe / "last.pt", weights_only=True)["model"]
    norms = 0
    for name, value in model.state_dict().items():
        if name.startswith("camera."):
            assert torch.equal(trained[name], value), name      # whatever frames are labelled
        norms += name.startswith("camera.") and name.endswith("running_var") and bool(
            (value != 1).all())
    assert norms == 20 and not torch.equal(trained["head.weight"], model.head.weight)
    state = train(tmp_path / "whole", world, probe=False, steps=4, fraction=0.5)
    for name, value in seeded(replace(TINY, probe=False)).named_parameters():
        assert torch.equal(state["model"][name], value) == name.startswith("norm."), name


def test_a_run_that_stops_goes_on_bit_for_bit(probe, world, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "load_tool", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "interrupted", lambda run: True)
        for _ in range(2):          # a step each
            with pytest.raises(SystemExit):
                train(tmp_path / "run", world)
    again = train(tmp_path / "run", world)
    once = torch.load(probe / "last.pt", weights_only=True)
    assert again["step"] == 3
    for name, value in once["model"].items():
        assert torch.equal(again["model"][name], value), name
    for name in ("log.jsonl", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (probe / name).read_bytes()


def test_a_run_scores_again_and_says_so_in_its_last_line(probe, world, tmp_path, capsys):
    for name in ("figures/depth.png", "figures/losses.png", "labels.txt", "backbones.safetensors"):
        assert (probe / name).stat().st_size > 0
    before = json.loads((probe / "metrics.json").read_text())
    (probe / "metrics.json").unlink()
    depth.train(0, 1, replace(Config(), eval_only=str(probe), gpus=0, workers=0))
    metrics = json.loads((probe / "metrics.json").read_text())
    assert metrics == before and metrics.keys() == {*METRICS, "guess", "pictures"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert "| none | probe | 1 of the frames | seed 0 | abs rel " in last
    assert f"{metrics['abs_rel']:.3f} (guess {metrics['guess']['abs_rel']:.3f})" in last

    # the mean is over pictures
    model = DepthNet(TINY, GRID)
    common.resume(str(probe), model)
    rows = []
    for frame in data.loader(str(world), "val", 1, preset="small").once():
        image, uv, metres = depth_points(frame)
        with torch.no_grad():
            found = decode(model.eval().logits(frame, image, uv))
        for k in image.unique():
            rows.append(((found - metres).abs() / metres)[image == k].mean().item())
    assert len(rows) == metrics["pictures"]
    assert metrics["abs_rel"] == pytest.approx(np.mean(rows), rel=1e-5)


def half_a_run(rank, cfg):
    sys.modules["__main__"] = depth
    depth.train(rank, 2, replace(cfg, batch=1))


def test_two_processes_do_as_one(server, probe, world, tmp_path):
    cfg = replace(TINY, data=str(world), out=str(tmp_path / "run"))
    on_two(server, half_a_run, tmp_path, cfg)
    one = torch.load(probe / "last.pt", weights_only=True)["model"]
    two = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    torch.testing.assert_close(two["table"], one["table"])
    for name, value in one.items():
        if not name.startswith("head."):    # AdamW divides by gradients that may be rounding alone
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)
    for line, same in zip(*[Path(out, "log.jsonl").read_text().splitlines()
                            for out in (probe, tmp_path / "run")], strict=True):
        assert json.loads(line) == pytest.approx(json.loads(same), rel=1e-2)
    a, b = [json.loads(Path(out, "metrics.json").read_text()) for out in (probe, tmp_path / "run")]
    assert a["guess"] == pytest.approx(b["guess"]) and a["pictures"] == b["pictures"]
    assert a["abs_rel"] == pytest.approx(b["abs_rel"], rel=1e-2)


@pytest.mark.parametrize("flag", ["init", "image_init"])
def test_an_image_network_is_loaded(world, tmp_path, monkeypatch, flag):
    torch.manual_seed(5)
    other = torch.nn.ModuleDict(dict(camera=common.ResNet(18), fuse=torch.nn.Linear(2, 2)))
    source = tmp_path / "before"
    source.mkdir()
    common.save(replace(TINY, out=str(source)), 1, other, [], ["camera.resnet", "fuse"], GRID)
    if flag == "image_init":
        source = tmp_path / "weights.pth"
        torch.save(other["camera"].resnet.state_dict(), source)
    monkeypatch.setattr(depth, "finish", lambda *_: None)
    state = train(tmp_path / "run", world, steps=1, **{flag: str(source)})
    for name, value in other["camera"].named_parameters():
        assert torch.equal(state["model"][f"camera.{name}"], value), name
    assert not any("fuse" in name for name in state["model"])
    rates = [group["base"] for group in state["optimizers"][0]["param_groups"]]
    assert rates == [TINY.lr]
    whole = train(tmp_path / "whole", world, steps=1, probe=False, **{flag: str(source)})
    rates = [group["base"] for group in whole["optimizers"][0]["param_groups"]]
    assert rates == [TINY.lr, TINY.lr_pretrained]


@pytest.mark.parametrize("name", ["kitti", "waymo"])
def test_other_data_sets_work(name, tmp_path, request, capsys):
    root = request.getfixturevalue(name)
    train(tmp_path / "run", root, steps=1, batch=1)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["pictures"] == (1 if name == "kitti" else 10)
    assert 0 < metrics["guess"]["abs_rel"] < 5
    assert (tmp_path / "run" / "figures" / "depth.png").exists()


# ---- what cannot work ----------------------------------------------------------------

@pytest.mark.parametrize("fields, message", [
    (dict(epochs=2), "--epochs 2 and --steps 3: one of them must be 0"),
    (dict(init="a", image_init="b"), "--image-init b: --init a brings an image network too"),
    (dict(points=0), "--points 0: expected a whole number from 1"),
    (dict(fraction=1.5), "--fraction 1.5: expected a number above 0 to 1"),
    (dict(init="lidar"), "holds lidar; asked for camera.resnet"),
    (dict(labels="lidar/labels.txt"), "--labels .*: cannot be read"),
    (dict(eval_only="lidar"), "--eval-only lidar: not a run of depth.py"),
    (dict(eval_only="empty"), "no checkpoint there; finish a run first"),
])
def test_what_cannot_work_is_one_line(world, probe, tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(depth, "measure", None)
    lidar = torch.nn.ModuleDict(dict(lidar=torch.nn.Linear(2, 2)))
    Path("lidar").mkdir()
    Path("lidar/config.json").write_text('{"preset": "small", "data": "", "seed": 0}')
    common.save(replace(TINY, out="lidar"), 1, lidar, [], ["lidar"], GRID)
    Path("empty").mkdir()
    config = json.loads((probe / "config.json").read_text())
    Path("empty/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=message) as refusal:
        depth.train(0, 1, replace(TINY, data=str(world), out="run", **fields))
    assert len(str(refusal.value).splitlines()) == 1 and not Path("run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_without_points_end_before_the_first_step(world, tmp_path, monkeypatch, split):
    dataset = data.open_dataset(world, "small", sweeps=1)
    empty = {dataset.names[i] for i in dataset.split(split)}
    points = depth.depth_points

    def blind(batch, *more):
        return tuple(part[:0] if batch.names[0] in empty else part for part in points(batch, *more))
    monkeypatch.setattr(depth, "depth_points", blind)
    with pytest.raises(SystemExit, match=f"no picture of the . {split} frames shows a point"):
        train(tmp_path / "run", world)
    assert not (tmp_path / "run").exists()
    empty.pop()         # one of them shows points: the others are left out
    train(tmp_path / "run", world)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["pictures"] == (6 if split == "val" else 18)


def test_a_depth_that_is_not_finite_is_refused(probe, world):
    model = DepthNet(TINY, GRID)
    model.head.bias.data[0] = math.nan
    loader = data.loader(str(world), "val", 1, preset="small")
    scores = (probe / "metrics.json").read_bytes()
    with pytest.raises(FloatingPointError, match="nuscenes/.*: a predicted depth is not finite"):
        depth.finish(model, TINY, str(probe), loader, CPU, 0)
    assert (probe / "metrics.json").read_bytes() == scores
