"""segment.py: losses, the range, the probe, the official scores, result files, whole runs."""
import json
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import conftest
import data
import segment
from common import VoxelResNet, collect_statistics, draw_labels, listed_labels
from conftest import Waits, on_two
from segment import SMALL, Config, Segmenter

TINY = segment.with_defaults(Config(preset="small", **{**SMALL, "width": 4}))
GRID = segment.wide(data.GRIDS["nuscenes", "small"])
CPU = torch.device("cpu")

run = partial(conftest.run, "segment.py")


@pytest.fixture(scope="module")
def dataset(world):
    return segment.open_labelled(replace(TINY, data=str(world)))


def thin(frame, _):
    """A fifth of the points."""
    return data.select(frame, np.arange(len(frame.points)) % 5 == 0)


@pytest.fixture(scope="module")
def batch(dataset):
    return data.loader(dataset, "train", 2, augment=thin).first(1)[0]


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch):
    monkeypatch.setattr(segment, "STATISTICS", 4)


def random_segmenter(cfg=TINY):
    """A head of zeros gives no gradient to the network: here it is random."""
    torch.manual_seed(0)
    model = Segmenter(cfg, GRID)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


# ---- the range -----------------------------------------------------------------------

@pytest.mark.parametrize("name", data.POINT_CLASSES)
@pytest.mark.parametrize("preset", ["paper", "small"])
def test_the_range_grows_by_whole_cells_of_the_coarsest_level(name, preset):
    grid = data.GRIDS[name, preset]
    wide = segment.wide(grid)
    reach = segment.REACH[name]
    for axis, (least, most) in enumerate([(-reach, reach), (-reach, reach), segment.HEIGHT]):
        assert wide.low[axis] <= least + 1e-6 and wide.high[axis] >= most - 1e-6
        moved = (grid.low[axis] - wide.low[axis]) / (8 * grid.voxel[axis])
        assert moved == pytest.approx(round(moved)) and moved >= 0
        length = (wide.high[axis] - wide.low[axis]) / (8 * grid.voxel[axis])
        assert length == pytest.approx(round(length))
        assert length * 8 * grid.voxel[axis] < most - least + 3 * 8 * grid.voxel[axis] + 60


def test_a_wider_range_changes_no_feature():
    """Points far from every face have the features that they had in the range of pre-training."""
    grid = replace(data.GRIDS["nuscenes", "small"], low=(-12.8, -12.8, -6.), high=(12.8, 12.8, 6.))
    rng = np.random.default_rng(0)
    index = rng.integers(-20, 20, (400, 3))
    voxel = np.array(grid.voxel)
    points = torch.tensor(np.c_[(index + 0.5) * voxel, rng.random((400, 2))], dtype=torch.float32)
    b = torch.zeros(400, dtype=torch.int64)
    levels = []
    for around in (grid, segment.wide(grid)):
        torch.manual_seed(0)
        net = VoxelResNet(around.low, around.high, around.voxel, 4).eval()
        with torch.no_grad():
            levels.append(net(points, b, 1))
    for near, far in zip(*levels):  # all their sites are at the same places, in one order
        sites = [level.cells.centre(level.coords[:, 1:]) for level in (near, far)]
        torch.testing.assert_close(*sites, rtol=0, atol=1e-4)
        torch.testing.assert_close(near.features, far.features, rtol=0, atol=1e-5)


def test_a_point_outside_has_the_class_of_the_nearest_inside(batch):
    xyz = np.array([[0, 0, 0], [10, 0, 0], [11, 0, 0], [-3, 0, 0]], np.float32)
    inside = np.array([True, True, False, False])
    assert segment.fill_outside(xyz, inside, np.array([4, 7, 0, 0])).tolist() == [4, 7, 7, 4]
    none = np.zeros(4, bool)
    assert segment.fill_outside(xyz, none, np.zeros(4, int)).tolist() == [0, 0, 0, 0]

    model = random_segmenter().eval()
    far = replace(batch, points=batch.points.clone())
    last = batch.counts[0] - 1
    far.points[last, :3] = torch.tensor([500.0, 0, 0])
    of_frame = far.points[:last, :3].double()
    nearest = int((of_frame - far.points[last, :3].double()).norm(dim=1).argmin())
    classes = model.predict(far)
    assert [len(part) for part in classes] == batch.counts
    assert classes[0][last] == classes[0][nearest]


# ---- losses --------------------------------------------------------------------------

def slow_lovasz(probability, labels):
    """The mean over present classes of an integral over thresholds.

    The Lovasz extension of 1 - IoU at the errors e is the integral over t of the loss that is
    made when the points with e > t are wrong.
    """
    losses = []
    for c in sorted(set(labels.tolist())):
        truth = labels == c
        error = np.where(truth, 1 - probability[:, c], probability[:, c])
        levels = np.unique(np.r_[0, error])
        total = 0.0
        for low, high in zip(levels[:-1], levels[1:]):
            wrong = error > (low + high) / 2
            hits = (truth & ~wrong).sum()
            union = (truth | wrong).sum()
            total += (high - low) * (1 - hits / union)
        losses.append(total)
    return np.mean(losses)


def test_losses_match_plain_loops(batch):
    model = random_segmenter()
    label = batch.extra["points_label"].clone()
    label[::3] = -1
    batch = replace(batch, extra=dict(points_label=label))
    L, terms = model(batch)
    rows = [i for i in range(len(label)) if label[i] >= 0]
    with torch.no_grad():
        probability = model.logits(batch, torch.tensor(rows)).softmax(1).numpy().astype(np.float64)
    truth = label[rows].numpy()
    ce = np.mean([-np.log(p[t]) for p, t in zip(probability, truth)])
    assert float(terms["L_ce"]) == pytest.approx(ce, rel=1e-4)
    assert float(terms["L_lovasz"]) == pytest.approx(slow_lovasz(probability, truth), rel=1e-3)
    assert float(terms["accuracy"]) == pytest.approx((probability.argmax(1) == truth).mean())
    assert float(L) == pytest.approx(float(terms["L_ce"] + terms["L_lovasz"]))


def test_a_batch_without_a_labelled_point_has_the_loss_0_and_a_gradient(batch):
    model = random_segmenter()
    label = torch.full_like(batch.extra["points_label"], -1)
    L, terms = model(replace(batch, extra=dict(points_label=label)))
    L.backward()
    assert float(L) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.head.parameters())
    empty = replace(batch, points=batch.points[:0], b_points=batch.b_points[:0], counts=[0, 0],
                    extra=dict(points_label=label[:0]))
    L, _ = model(empty)
    assert float(L) == 0
    assert [len(part) for part in model.predict(empty)] == [0, 0]


def test_the_losses_wait_for_the_gpu_once(batch):
    model = random_segmenter()
    label = batch.extra["points_label"]
    probability = torch.rand(len(label), 16)
    with Waits() as waits:
        segment.lovasz(probability, label.clamp_min(0))
    assert waits.names == []
    with Waits() as before:
        model.encode(batch)
    with Waits() as waits:
        model(batch)
    assert len(waits.names) - len(before.names) <= 1  # the rows that have a label


# ---- the probe -----------------------------------------------------------------------

def test_a_frozen_network_keeps_every_bit(world, tmp_path, monkeypatch):
    """After its statistics are collected; and these are those of the training clouds."""
    monkeypatch.setattr(segment, "finish", lambda *_: None)
    monkeypatch.setattr(segment, "loss_curves", lambda *_: None)
    cfg = replace(TINY, data=str(world), out=str(tmp_path / "run"), gpus=0, probe=True, steps=3,
                  seed=5, fraction=0.3)
    segment.train(0, 1, cfg)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]

    torch.manual_seed(5)
    model = Segmenter(cfg, GRID)
    dataset = segment.open_labelled(cfg)
    train = dataset.split("train")
    clouds = data.loader(dataset, "train", 1, seed=5, indices=data.spread(train, 4))
    collect_statistics(model.lidar, model.encode, islice(clouds.begin_at(0), 4))
    for name, value in model.lidar.state_dict().items():
        assert torch.equal(saved["lidar." + name], value), name
    assert not torch.equal(saved["head.weight"], model.head.weight)
    assert saved["norm.running_var"].ne(1).all()


def test_collected_statistics_are_those_of_the_clouds(batch):
    model = random_segmenter().eval()
    before = model.encode(batch)[0].features.std(0).mean()
    weights = [p.clone() for p in model.parameters()]
    collect_statistics(model.lidar, model.encode, [batch] * 60)
    assert not model.lidar.training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    eval_features = [level.features for level in model.encode(batch)]
    model.lidar.train()
    train_features = [level.features for level in model.encode(batch)]
    for a, b in zip(eval_features, train_features):
        assert float((a - b).abs().mean()) < 0.2 * float(b.std())
    assert eval_features[0].std(0).mean() > 1.2 * before


def test_each_way_of_drawing(dataset, tmp_path):
    train = dataset.split("train")  # 2 scenes of 3 frames
    second = draw_labels(dataset, train, 0.5, "every", 0)
    scenes = [row["name"] for row in json.loads(
        Path(dataset.root, dataset.version, "scene.json").read_text())]
    names = dataset.names
    assert len(second) == 3
    in_train = [name for name in scenes if any(f"/{name}/" in names[i] for i in train)]
    assert all(f"/{in_train[1]}/" in names[i] for i in second)
    assert list(draw_labels(dataset, train, 1, "every", 0)) == list(train)
    with pytest.raises(data.DataError, match="2 scenes, of which every 10-th is asked for"):
        draw_labels(dataset, train, 0.1, "every", 0)

    listing = tmp_path / "labels.txt"
    listing.write_text("\n".join(names[i] for i in second[::-1]) + "\n")
    assert list(listed_labels(dataset, train, listing)) == list(second)
    listing.write_text(names[second[0]] + "\nnuscenes/scene-0000/no\n")
    with pytest.raises(SystemExit, match="1 of its 2 lines name no frame of the train split"):
        listed_labels(dataset, train, listing)
    with pytest.raises(SystemExit, match="cannot be read"):
        listed_labels(dataset, train, tmp_path / "none.txt")


# ---- scores --------------------------------------------------------------------------

def random_confusion(C, seed):
    """Rows of truth; class 3 has none and is never predicted, class 5 has none but is."""
    confusion = np.random.default_rng(seed).integers(0, 1000, (C, C))
    confusion[3] = confusion[:, 3] = 0
    confusion[5] = 0
    return confusion


def test_the_score_is_the_devkits_to_the_last_digit():
    utils = pytest.importorskip("nuscenes.eval.lidarseg.utils")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 17, 5000)
    truth[truth == 12] = 0
    predicted = np.where(rng.random(5000) < 0.6, np.maximum(truth, 1), rng.integers(1, 17, 5000))
    predicted[predicted == 12] = 1
    official = utils.ConfusionMatrix(17, 0)
    official.update(truth, predicted)
    ours = np.zeros((16, 16), int)
    for t, p in zip(truth, predicted):
        if t:
            ours[t - 1, p - 1] += 1
    scores = segment.score("nuscenes", ours)
    assert scores["mIoU"] == official.get_mean_iou()
    assert scores["fwIoU"] == pytest.approx(official.get_freqweighted_iou())
    assert np.isnan(scores["IoU"]["other_flat"])
    np.testing.assert_allclose(list(scores["IoU"].values()), official.get_per_class_iou()[1:],
                               rtol=1e-6)


@pytest.mark.parametrize("name, absent", [("kitti", 0.0), ("waymo", 1.0)])
def test_absent_classes_count_as_the_official_programs_have_it(name, absent):
    C = len(data.POINT_CLASSES[name])
    confusion = random_confusion(C, 1)
    iou = []
    for c in range(C):
        union = confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]
        iou.append(confusion[c, c] / union if union else absent)
    scores = segment.score(name, confusion)
    assert scores["mIoU"] == pytest.approx(np.mean(iou))
    present = [c for c in range(C) if c not in (3, 5)]
    assert scores["mIoU_present"] == pytest.approx(np.mean([iou[c] for c in present]))
    assert iou[5] == 0 and scores["accuracy"] == np.trace(confusion) / confusion.sum()


def test_one_false_point_of_an_absent_class_costs_its_share():
    confusion = np.diag([100] * 16)
    assert segment.score("nuscenes", confusion)["mIoU"] == 1
    confusion[11, 11] = 0
    assert segment.score("nuscenes", confusion)["mIoU"] == 1  # neither truth nor prediction
    confusion[0, 11] = 1
    scores = segment.score("nuscenes", confusion)
    assert scores["IoU"]["other_flat"] == 0
    assert scores["mIoU"] == pytest.approx((14 + 100 / 101) / 16, abs=1e-6)
    assert scores["mIoU_present"] == pytest.approx((14 + 100 / 101) / 15)


def test_truth_as_predictions_scores_1_and_files_hold_every_point(dataset, tmp_path):
    class Perfect(torch.nn.Module):
        def predict(self, batch):
            return [part.clamp_min(0).numpy()
                    for part in batch.extra["points_label"].split(batch.counts)]

    loader = data.loader(dataset, "val", 2)
    confusion = segment.confusion_of(Perfect(), loader, tmp_path, CPU)
    labelled = 0
    for i in loader.indices:
        points = dataset.sweep(i)
        token = dataset.frames["sweep"][i].decode()
        file = tmp_path / "lidarseg" / "val" / f"{token}_lidarseg.bin"
        result = np.fromfile(file, np.uint8)
        assert len(result) == len(points) and result.min() >= 1 and result.max() <= 16
        labelled += (dataset.point_truth(i, len(points)) >= 0).sum()
    assert confusion.sum() == labelled == np.trace(confusion) > 10_000
    assert segment.score("nuscenes", confusion)["mIoU"] == 1


# ---- whole runs ----------------------------------------------------------------------

def pretrained(folder, width=4):
    """A run folder whose lidar unit holds random weights."""
    folder.mkdir()
    cfg = replace(TINY, out=str(folder), width=width, init="none")
    model = random_segmenter(cfg)
    opt = torch.optim.AdamW(model.parameters())
    (folder / "config.json").write_text('{"preset": "small"}')
    common.save(cfg, 7, model, [opt], ["lidar"], data.GRIDS["nuscenes", "small"])
    return model


def test_train_from_a_run_then_score_again(three_frames, tmp_path, capsys):
    before = pretrained(tmp_path / "before")
    out = tmp_path / "run"
    done = run(out, "--data", str(three_frames), "--init", str(tmp_path / "before"),
               "--fraction", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "labels of 2 frames" in done.stdout and "labelled points of 2 of these" in done.stdout
    last = done.stdout.splitlines()[-1]
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"mIoU {metrics['mIoU']:.4f} | mIoU_present {metrics['mIoU_present']:.4f}" in last
    assert "| whole network | 1 of the frames | seed 0 |" in last
    assert np.sum(metrics["confusion"]) > 5000 and metrics["frames"] == 1
    state = torch.load(out / "last.pt", weights_only=True)
    head, lidar = state["optimizers"][0]["param_groups"]
    assert head["base"] == 1e-2 and len(head["params"]) == 2
    assert lidar["base"] == 1e-3 and len(lidar["params"]) == len(list(before.lidar.parameters()))
    for name in ("labels.txt", "backbones.safetensors", "figures/segmentation.png",
                 "figures/confusion.png", "figures/losses.png", "results/val/submission.json"):
        assert (out / name).stat().st_size > 0, name

    capsys.readouterr()
    segment.train(0, 1, replace(Config(), eval_only=str(out), gpus=0, workers=0))
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize("probe", [False, True])
def test_resumed_bit_for_bit(world, tmp_path, monkeypatch, probe):
    monkeypatch.setattr(segment, "finish", lambda *_: None)
    monkeypatch.setattr(segment, "loss_curves", lambda *_: None)
    cfg = replace(TINY, data=str(world), gpus=0, steps=4, save_every=2, seed=1, batch=1,
                  probe=probe, fraction=1.0)
    segment.train(0, 1, replace(cfg, out=str(tmp_path / "whole")))

    class Killed(Exception):
        pass

    def die(step, *_):
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(segment, "cosine", lambda step, *more: die(step) or
                      common.cosine(step, *more))
        with pytest.raises(Killed):
            segment.train(0, 1, replace(cfg, out=str(tmp_path / "parts")))
    segment.train(0, 1, replace(cfg, out=str(tmp_path / "parts")))
    whole, parts = [torch.load(tmp_path / name / "last.pt", weights_only=True)
                    for name in ("whole", "parts")]
    assert whole["step"] == parts["step"] == 4
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def a_frame_each(rank, model, frames, folder):
    """Statistics, loss, gradient and confusion of one of two frames, on each process."""
    batch = data.collate([frames[rank]], [rank])
    collect_statistics(model.lidar, model.encode, [batch])
    net = common.wrap(model, CPU, 2)
    loss, _ = net(batch)
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradient, dict(model.lidar.named_buffers())


@pytest.mark.parametrize("probe", [False, True])
def test_two_processes_train_as_one(server, dataset, tmp_path, probe):
    """Without Lovasz, which each process takes over its own points."""
    model = random_segmenter(replace(TINY, probe=probe, w_lovasz=0.0))
    model.norm.eval()  # its last bits would switch ReLUs in the whole network
    frames = [thin(dataset.load(i), None) for i in (0, 4)]
    one, two = on_two(server, a_frame_each, tmp_path, model, frames, str(tmp_path))
    both = data.collate(frames, [0, 1])
    collect_statistics(model.lidar, model.encode, [both])
    loss, _ = model(both)
    loss.backward()
    torch.testing.assert_close((one[0] + two[0]) / 2, loss.detach(), rtol=1e-4, atol=1e-5)
    apart = 0.0
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(one[1][name], two[1][name]), name
            apart += float((one[1][name] - p.grad).square().sum())
    norm = float(torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]))
    assert apart ** 0.5 < 0.03 * norm
    assert len(one[1]) == (2 if probe else len(list(model.lidar.parameters())) + 2)
    for name, value in model.lidar.named_buffers():
        torch.testing.assert_close(one[2][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags, message", [
    (dict(fraction=1.5), "fraction"),
    (dict(epochs=2, steps=3), "--epochs 2 and --steps 3: one of them must be 0"),
    (dict(scale=1.0), "--scale 1.0"),
    (dict(init="nowhere"), "backbones.safetensors: no such file"),
])
def test_flags_that_cannot_work_are_refused(flags, message, tmp_path):
    cfg = replace(TINY, data=str(tmp_path / "no data"), out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=message):
        segment.train(0, 1, replace(cfg, **flags))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_script_is_not_scored(tmp_path):
    (tmp_path / "config.json").write_text('{"preset": "small", "w_box": 0.25}')
    with pytest.raises(SystemExit, match="not a run of segment.py"):
        segment.train(0, 1, replace(TINY, eval_only=str(tmp_path)))


def test_the_voxels_are_those_of_the_pretraining_or_of_the_data(
        world, tmp_path, monkeypatch, capsys):
    for name in ("finish", "loss_curves"):
        monkeypatch.setattr(segment, name, lambda *_: None)
    model = random_segmenter()
    init = tmp_path / "init"
    init.mkdir()
    grid = replace(data.GRIDS["waymo", "small"], voxel=(0.2, 0.2, 0.25))
    common.save(replace(TINY, out=str(init)), 1, model, [], ["lidar"], grid)
    cfg = replace(TINY, data=str(world), init=str(init), gpus=0, steps=1)
    for choice, voxel in (("init", [0.2, 0.2, 0.25]), ("data", [0.1, 0.1, 0.125])):
        out = tmp_path / f"voxels_of_{choice}"
        segment.train(0, 1, replace(cfg, voxel=choice, out=str(out)))
        stored = json.loads(common.read_units(out)[1]["grid"])
        assert stored["voxel"] == voxel and stored["dataset"] == "nuscenes"
        assert stored["high"][0] >= 102.4


@pytest.mark.slow
def test_six_frames_can_be_learned_by_heart(world, tmp_path, monkeypatch):
    for name in ("finish", "loss_curves"):
        monkeypatch.setattr(segment, name, lambda *_: None)
    cfg = replace(TINY, data=str(world), out=str(tmp_path / "run"), gpus=0, steps=250, width=8,
                  fraction=1.0, rotation=0.0, scale=0.0, lr_network=1e-2)
    segment.train(0, 1, cfg)
    dataset = segment.open_labelled(cfg)
    model = Segmenter(cfg, GRID)
    common.resume(tmp_path / "run", model)
    loader = data.loader(dataset, "train", 2)
    confusion = segment.confusion_of(model, loader, tmp_path / "results", CPU)
    assert segment.score("nuscenes", confusion)["mIoU_present"] > 0.9
