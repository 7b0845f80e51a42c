"""The GPU path against the CPU, for whoever has a card: python -m pytest -m cuda

Without a card every test is skipped. It was written without one: nothing here has run on a card
yet. Under eight minutes on one H100 [estimated]; what a step costs there is printed.

Both devices get the same frames, weights and random numbers, see Draws. How far apart they may be
was measured on a CPU, on these very models and frames:
  FLOAT32   autocast off. oneDNN off and one rounding error on each weight move a loss term by
            3e-6, a running statistic by 4e-6, the gradient by 1e-2, that of one parameter by 2e-2
            (a few units change sides in ReLU). Allowed: seven times that for gradients, thirty
            times for the rest, since cuDNN rounds otherwise. TF32 would move a term by some 1e-3.
  BFLOAT16  the encoders in bfloat16, as in training, against float32. With autocast's CUDA rules
            and CPU arithmetic (a simulated GPU) terms move by 1e-2, statistics by 1e-2, the
            gradient by 0.3 to 0.7: 20 to 40 layers of random weights, in each of which half a
            percent of the units change sides. Allowed: three to five times that, and a gradient
            that is nearer to the CPU's than none at all. The parts are held to less.
"""
import copy
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torchvision.models import resnet50

import clap
import cmcr
import common
import data
import finetune
import simipu
import test_clap
import test_cmcr
import test_faults
import test_finetune
import test_simipu

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
GRID = data.GRIDS["nuscenes", "small"]
SCRIPTS = "clap", "cmcr", "simipu", "finetune"
SPAWN = multiprocessing.get_context("spawn")     # a forked process may not use CUDA


class Tolerance(NamedTuple):
    """How far apart two devices may be, relative to the CPU's value."""
    term: float       # of each loss term
    buffer: float     # of each running statistic and of the codes, in norm
    gradient: float   # of all parameters together, in norm
    each: float       # of each parameter's gradient; below a thousandth of all: of that


FLOAT32 = Tolerance(1e-4, 1e-4, 8e-2, 1.5e-1)
BFLOAT16 = Tolerance(3e-2, 5e-2, 1.0, math.inf)


@pytest.fixture(autouse=True)
def all_bits():
    """No TF32, as in training: common.init_process."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def without_autocast(monkeypatch):
    """Let the encoders compute in float32."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def distance(x, reference, least=0.0):
    """|x - reference| / |reference|, in norm; a reference below `least` counts as that."""
    reference = reference.detach().double().cpu()
    x = x.detach().double().cpu()
    assert x.shape == reference.shape
    return float((x - reference).norm() / reference.norm().clamp_min(max(least, 1e-30)))


# ---- whole methods -------------------------------------------------------------------

class Draws(TorchFunctionMode):
    """Notes the random numbers of a first pass and puts them into every later one.

    The generator of a GPU gives other numbers than that of a CPU with the same seed.
    """

    def __init__(self):
        super().__init__()
        self.noted = []
        self.left = None             # of a later pass: what is still to be drawn

    def again(self):
        self.left = iter(self.noted)
        return self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        drawn = function(*args, **(kwargs or {}))
        if (kwargs or {}).get("generator") is None:
            return drawn
        if self.left is None:
            self.noted.append(drawn.detach().cpu().clone())
            return drawn
        before = next(self.left)
        assert drawn.shape == before.shape, "a point fell on the other side of an edge"
        return drawn.copy_(before)


class Pass(NamedTuple):
    """What one pass forward and backward gives, on the CPU."""
    terms: dict       # {name: float}, the loss and its terms
    gradients: dict   # {parameter: tensor}
    buffers: dict     # {buffer: tensor} after it: running statistics, codes


def one_pass(model, batch, device, draws=None, ranks=1):
    """A pass of a copy of the model. Random numbers are the device's own without draws."""
    model = copy.deepcopy(model).to(device)
    net = common.wrap(model, device, ranks)
    with draws or nullcontext():
        loss, terms = net(batch.to(device))
    loss.backward()
    values = {"loss": float(loss.detach())}
    for name, value in terms.items():
        if name.startswith("L_"):
            values[name] = float(value.detach())
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    return Pass(values, gradients, buffers)


def small_model(script):
    """A model of the script in which no residual block begins as an identity.

    So every gradient shows.
    """
    torch.manual_seed(0)
    if script == "clap":
        model = clap.CLAP(test_clap.TINY, GRID)
    elif script == "cmcr":
        model = cmcr.CMCR(test_cmcr.TINY, GRID, frozen=False)
    elif script == "simipu":
        model = simipu.SimIPU(test_simipu.TINY)
    else:
        model = finetune.Detector(test_finetune.TINY, GRID)
    for layer in model.modules():
        if isinstance(layer, common.BatchNorm):
            torch.nn.init.ones_(layer.weight)
    return model


def two_frames(script, root):
    """Two frames of the embedded world as the script's loader gives them."""
    dataset = data.open_dataset(root, "small")
    rng = np.random.default_rng(0)
    frames = []
    for i in range(2):
        frame = dataset.load(i, (48, 128))
        if script == "clap":
            frame = replace(frame, extra=clap.Curvature(32)(frame))
        elif script == "cmcr":
            frame = test_cmcr.VIEWS(dataset.load(i), rng)
        elif script == "simipu":
            frame = test_simipu.VIEWS(frame, rng)
        frames.append(frame)
    return frames


def compare(ours, reference, tolerance):
    """Terms, buffers and gradients of two passes."""
    assert ours.terms.keys() == reference.terms.keys()
    for name, value in reference.terms.items():
        assert math.isclose(ours.terms[name], value, rel_tol=tolerance.term, abs_tol=1e-6), (
            name, ours.terms[name], value)
    for name, buffer in reference.buffers.items():
        apart = distance(ours.buffers[name], buffer)
        assert apart < tolerance.buffer, (name, apart)
    whole = joined(reference.gradients)
    apart = distance(joined(ours.gradients), whole)
    assert apart < tolerance.gradient, apart
    for name, gradient in reference.gradients.items():
        apart = distance(ours.gradients[name], gradient, 1e-3 * float(whole.norm()))
        assert apart < tolerance.each, (name, apart)


def joined(gradients):
    """All of them as one vector."""
    return torch.cat([gradient.double().flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_and_gradients_are_those_of_the_cpu(script, world, monkeypatch):
    """In float32 and, with the encoders in bfloat16, about so."""
    model = small_model(script)
    batch = data.collate(two_frames(script, world), [3, 4])
    draws = Draws()
    reference = one_pass(model, batch, CPU, draws)
    compare(one_pass(model, batch, GPU, draws.again()), reference, BFLOAT16)
    without_autocast(monkeypatch)
    compare(one_pass(model, batch, GPU, draws.again()), reference, FLOAT32)


# ---- their parts ---------------------------------------------------------------------

def sites_of(kind):
    """Coordinates (V, 4) of two frames in a volume of 6 x 12 x 14 cells, sorted."""
    occupied = torch.zeros(2, 6, 12, 14, dtype=torch.bool)
    if kind == "cloud":
        occupied = torch.rand(occupied.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    elif kind == "line":             # 24 of 27 offsets join no pair
        occupied[0, 2, 5] = True
    return occupied.nonzero()


def convolve(convolution, coords, x, strided, dtype):
    """A sparse convolution forward and backward -> output, gradients of x and weight."""
    shape = 6, 12, 14
    convolution = copy.deepcopy(convolution).to(x.device)
    if strided:
        _, kmap = common.strided_map(coords, shape, (1, 1, 1), 2)
    else:
        kmap = common.submanifold_map(coords, shape, 2)
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = convolution(x, kmap)
    (y.float() * torch.linspace(-1, 1, y.shape[1], device=y.device)).sum().backward()
    return y, x.grad, convolution.weight.grad


@pytest.mark.parametrize("strided", [False, True], ids=["submanifold", "strided"])
@pytest.mark.parametrize("kind", ["cloud", "line", "none"])
def test_sparse_convolutions_are_those_of_the_cpu(kind, strided):
    """In float32 and bfloat16, from 5 channels and from 16.

    Also where an offset joins no pair, and where there is no site at all.
    """
    coords = sites_of(kind)
    for inputs in (5, 16):
        torch.manual_seed(0)
        convolution = common.SparseConv(inputs, 32)
        x = torch.randn(len(coords), inputs)
        reference = convolve(convolution, coords, x, strided, torch.float32)
        for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            parts = convolve(convolution, coords.to(GPU), x.to(GPU), strided, dtype)
            for name, part, expected in zip(("y", "x.grad", "w.grad"), parts, reference):
                apart = distance(part, expected)
                assert apart < most, (name, inputs, dtype, apart)


def normalise(norm, x):
    """A batch norm forward and backward, in training -> output, gradients, statistics."""
    norm = copy.deepcopy(norm).to(x.device)
    x = x.detach().requires_grad_()
    y = norm(x)
    weight = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.device)
    (y.float() * weight).sum().backward()
    return y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def with_a_larger_other(monkeypatch):
    """As on the first of two processes, when the other's mean, variance and rows are twice its."""
    monkeypatch.setattr(common, "processes", lambda: 2)
    monkeypatch.setattr(common, "all_gather", lambda x: torch.stack([x, 2 * x]))
    monkeypatch.setattr(common, "all_reduce", lambda x: 3 * x.detach())


@pytest.mark.parametrize("processes", [1, 2])
def test_batch_norm_is_that_of_the_cpu(processes, monkeypatch):
    """Of no row, of one, of many, of images and of volumes in both memory formats."""
    if processes == 2:
        with_a_larger_other(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    norm = common.BatchNorm(16)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    cases = [torch.randn(rows, 16, generator=generator) * 3 + 5 for rows in (0, 1, 3000)]
    for shape, order in (((2, 16, 12, 20), torch.channels_last),
                         ((2, 16, 4, 9, 10), torch.channels_last_3d)):
        x = torch.randn(shape, generator=generator) * 3 + 5
        cases += [x, x.contiguous(memory_format=order)]
    for x in cases:
        for part, expected in zip(normalise(norm, x.to(GPU)), normalise(norm, x), strict=True):
            assert distance(part, expected) < 1e-4, x.shape
        rounded = x.bfloat16()       # the CPU reads the same rounded rows, in float32
        reference = normalise(norm, rounded.float())
        for part, expected in zip(normalise(norm, rounded.to(GPU)), reference, strict=True):
            assert distance(part, expected) < 5e-2, x.shape


def lift(camera, batch, cells, maps, device):
    """CameraNet.lift forward and backward -> volume, seen, gradient of the maps."""
    maps = maps.to(device).requires_grad_()
    features, logits = maps.split([camera.channels, camera.bins], 1)
    volume, seen = camera.lift(features, logits.softmax(1), batch.to(device), cells)
    weight = torch.linspace(-1, 1, volume.numel()).view_as(volume).to(device)
    (volume * weight).sum().backward()
    return volume, seen, maps.grad


def test_the_lift_is_that_of_the_cpu(world):
    batch = data.collate(two_frames("finetune", world), [3, 4])
    model = small_model("finetune")
    channels = model.camera.channels + model.camera.bins
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(len(batch.images), channels, 6, 16, generator=generator)
    reference = lift(model.camera, batch, model.cells, maps.clone(), CPU)
    parts = lift(model.camera, batch, model.cells, maps.clone(), GPU)
    for part, expected in zip(parts, reference):
        assert distance(part, expected) < 1e-4


def whole_numbers(frames, n, channels):
    """Features (B, n, C) with a mean of 0 whose distances are exact in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-250, 250, (frames, n, channels), generator=generator)
    excess = x.sum(1, keepdim=True)                               # (B, 1, C)
    x -= excess.sign() * (torch.arange(n)[:, None] < excess.abs())
    return x.float()


def test_the_same_features_are_chosen_as_on_the_cpu():
    """By the Triton kernel, if Triton is there; at the sizes of the paper too.

    Of features that are not finite it chooses some rows, which exist.
    """
    if simipu.triton:
        assert simipu.kernel_works(GPU)
    for n, count in ((64, 16), (4096, 1024), (1024, 512)):
        x = whole_numbers(2, n, 8)
        chosen = simipu.farthest_features(x.to(GPU), count).cpu()
        assert torch.equal(chosen, simipu.farthest_features(x, count))
    chosen = simipu.farthest_features(x.to(GPU) * math.nan, count).cpu()
    assert chosen.min() >= 0 and chosen.max() < n


def test_the_same_neighbours_are_found_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    sources = torch.rand(2, 2048, 3, generator=generator) * torch.tensor([40.0, 40.0, 4.0])
    centres = sources[:, ::4].contiguous()
    for radii in simipu.RADII:
        words = radii, simipu.NEIGHBOURS[0]
        shells = simipu.ball_query(centres.to(GPU), sources.to(GPU), *words)
        for ours, expected in zip(shells, simipu.ball_query(centres, sources, *words)):
            assert torch.equal(ours.cpu(), expected)


# ---- two cards -----------------------------------------------------------------------

def one_of_two_cards(rank, port, folder):
    """One process of two: a pass of each case with its own frame."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = common.init_process(SimpleNamespace(gpus=None), 2)
    torch.autocast = lambda *_, **__: nullcontext()
    passes = [tuple(one_pass(model, batches[rank], device, ranks=2))
              for model, batches in torch.load(folder / "cases.pt", weights_only=False)]
    torch.save(passes, folder / f"{rank}.pt")
    common.destroy_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices are visible")
def test_two_cards_are_one_with_both_frames(world, tmp_path, monkeypatch):
    """Losses, gradients and statistics over NCCL, those of the images' batch norms too.

    CLAP and the detector: the other two have negatives of their own process only.
    """
    scripts = "clap", "finetune"
    models = [small_model(script) for script in scripts]
    frames = [two_frames(script, world) for script in scripts]
    apart = [[data.collate([first], [3]), data.collate([second], [4])] for first, second in frames]
    torch.save(list(zip(models, apart)), tmp_path / "cases.pt")
    port = test_faults.free_port()
    both = [SPAWN.Process(target=one_of_two_cards, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]

    without_autocast(monkeypatch)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for model, pair, first, second in zip(models, frames, *ranks):
        first, second = Pass(*first), Pass(*second)
        mean = {name: (first.terms[name] + second.terms[name]) / 2 for name in first.terms}
        whole = one_pass(model, data.collate(pair, [3, 4]), GPU)
        compare(first._replace(terms=mean), whole, FLOAT32)
        for name, gradient in first.gradients.items():
            assert torch.equal(gradient, second.gradients[name]), name


# ---- whole runs ----------------------------------------------------------------------

def kill_in_step(module, step):
    """Fault: SIGKILL once this step has been logged, before its update."""
    write = common.Run.write

    def written(self, now, values):
        write(self, now, values)
        if now == step and "loss" in values:
            os.kill(os.getpid(), signal.SIGKILL)
    common.Run.write = written


@pytest.mark.parametrize("script", ["clap", "simipu"])
def test_a_killed_run_goes_on_where_it_was_saved(script, three_frames, tmp_path):
    """The steps since the checkpoint come again and are what they were.

    Sums on a GPU are not repeatable bit by bit, so about: the first of these steps shows that the
    weights are back, the second one that the optimisers are.
    """
    out = tmp_path / "run"
    cfg = test_faults.config(script, three_frames, out, gpus=None, steps=6, save_every=3,
                             eval_every=100)
    code, output = test_faults.Run(SPAWN, script, cfg, kill_in_step, 4).end()
    assert code == -signal.SIGKILL and test_faults.step_of(out / "last.pt") == 3, output
    killed = {row["step"]: row for row in test_faults.log_rows(out) if "loss" in row}
    code, output = test_faults.Run(SPAWN, script, cfg).end()
    assert code == 0 and "steps 3 to 6" in output and "cuda" in output, output
    rows = {row["step"]: row for row in test_faults.log_rows(out) if "loss" in row}
    assert sorted(rows) == list(range(6))
    for step, most in ((3, 1e-3), (4, 1e-2)):
        for name in ("loss", "grad_norm"):
            assert rows[step][name] == pytest.approx(killed[step][name], rel=most), (step, name)


def profiled(script, root, out, *flags):
    """What SCRIPT --profile 10 prints at paper size."""
    command = [sys.executable, str(ROOT / f"{script}.py"), "--data", str(root), "--out", str(out),
               "--preset", "paper", "--profile", "10", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


WAITS = 30    # of the CPU for the GPU in a step, at most; 8 to 13 in the simulation


@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_steps_at_paper_size(script, world, tmp_path, capsys):
    """Frames a second, peak memory and waits of each script are printed; waits have a limit."""
    flags = ["--fraction", "1"] if script == "finetune" else []
    if script == "cmcr":             # the published teacher is a download, a random one as large
        torch.save(resnet50().state_dict(), tmp_path / "teacher.pth")
        flags = ["--teacher", str(tmp_path / "teacher.pth")]
    output = profiled(script, world, tmp_path / "run", *flags)
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, {script}:\n{output}")
    waits = int(re.search(r"(\d+) waits of the CPU", output)[1])
    assert "frames/s" in output and waits <= WAITS
