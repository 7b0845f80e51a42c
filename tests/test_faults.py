"""What happens when a run is killed, starved or lied to: for CLAP, one of the three methods, and for finetune.py, in processes of their own.

The numbers are those of the list of faults that this project keeps; what another file tests:
 8 broken sample files     test_data.py::test_broken_folder, test_broken_kitti_folder, test_the_doctor_names_the_culprit, test_waymo.py, test_fuzz.py.
                           There is no --skip-bad: a frame that cannot be read ends the run and is named, so nothing is skipped silently
 9 empty geometry          test_clap.py::test_bad_frames_give_a_finite_loss_and_gradient, test_simipu.py::test_a_frame_that_shows_no_point_has_no_pair,
                           test_cmcr.py::test_frames_without_points_or_masks_are_fine, test_finetune.py::test_every_parameter_learns_and_...
11 idle parameters         test_clap.py::test_every_parameter_gets_gradient, test_simipu.py::test_every_parameter_learns, test_cmcr.py::test_which_loss_teaches_what,
                           test_finetune.py::test_every_parameter_learns_and_...
13 a process that dies     test_clap.py::test_a_dead_process_ends_the_job_and_is_named
15 determinism             test_a_run_killed_twice_... here; test_data.py::test_batches_do_not_depend_on_workers
18 foreign weights         test_simipu.py::test_image_weights_that_do_not_fit_are_refused; the hostile checkpoint is here
19 hostile tables          test_data.py::test_broken_folder: absolute and upward paths, links, an enormous picture, NaN calibration, cyclic and doubled tokens
20 caches                  test_data.py::test_two_processes_may_build_the_index_at_once, test_index_is_built_again_..., test_losing_the_race_...; here: no pickles
21 weights that do not fit test_finetune.py::test_weights_that_do_not_fit_are_refused
Not applicable: 7 and 26. No step is skipped or scaled, whatever its loss: bfloat16 needs no scaler.
"""
import contextlib
import copy
import importlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import clap
import cmcr
import common
import data
import finetune
import simipu
import test_cmcr
import test_simipu
from conftest import die_with_the_server, on_two
from test_clap import a_frame_each, ranks_of

ROOT = Path(__file__).parent.parent
STEPS, RUNNING = 4, []
SMALL = dict(preset="small", gpus=0, batch=1, width=4)
RUNS = {        # script: fields of its Config that make a step take a fraction of a second
    "clap": dict(SMALL, steps=STEPS, save_every=1, eval_every=3, rays=64, pixels=16, samples=8, importance_samples=4),
    "simipu": dict(SMALL, steps=STEPS, save_every=1, eval_every=3, points=256, zoom_low=0.4, zoom_high=0.5),
    "cmcr": dict(SMALL, steps=STEPS, save_every=1, eval_every=3, teacher="none", crop_h=64, crop_w=96, crop_points=60, pairs=200, queries=90),
    "finetune": dict(SMALL, steps=STEPS, save_every=1, bins=12, modality="lidar", fraction=1.0, warmup=2),
}


def config(script, root, out, **more):
    module = importlib.import_module(script)
    return module.Config(**{**module.SMALL, **RUNS[script], "data": str(root), "out": str(out), **more})


# ---- processes: see conftest.server ----

@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    yield
    for process in RUNNING:
        process.kill()
    RUNNING.clear()


def go(script, cfg, said, fault, argument):
    """In its own process: what the script does with this configuration, once fault(module, argument) has been prepared. No figures: they take longer than the run."""
    die_with_the_server()
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    module = sys.modules["__main__"] = importlib.import_module(script)
    for name in ("save_figures", "draw_curves", "loss_curves"):
        if hasattr(module, name):
            setattr(module, name, lambda *_: None)
    if fault:
        fault(module, argument)
    common.launch(module.train, cfg)


class Run:
    """A run in a process of its own; its output is in .said()."""

    def __init__(self, server, script, cfg, fault=None, argument=None, said=None):
        self.file = Path(said or f"{cfg.out}.said")
        self.file.write_text("")
        self.process = server.Process(target=go, args=(script, cfg, str(self.file), fault, argument))
        self.process.start()
        RUNNING.append(self.process)

    def said(self):
        return self.file.read_text()

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition() and self.process.is_alive():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        assert condition(), self.said()

    def end(self, seconds=120):
        """-> exit status, output."""
        self.process.join(seconds)
        assert not self.process.is_alive(), "still running:\n" + self.said()
        return self.process.exitcode, self.said()


def run(*words, **options):
    return Run(*words, **options).end()


def terminate_at(module, step):
    """Fault: SIGTERM from outside in the middle of this step."""
    interrupted, steps = common.Run.interrupted, itertools.count()

    def asked(log):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return interrupted(log)
    common.Run.interrupted = asked


@pytest.fixture(scope="module")
def folders(server, three_frames, tmp_path_factory):
    """begun(script): a run that SIGTERM stopped after 3 of 4 steps, with last.pt and previous.pt; whole(script): the same left alone. Each is made once."""
    made, home = {}, tmp_path_factory.mktemp("runs")

    class Folders:
        def make(self, kind, script, status, *fault):
            if (kind, script) not in made:
                out = home / f"{kind}_{script}"
                code, said = run(server, script, config(script, three_frames, out), *fault)
                assert code == status, said
                made[kind, script] = out
            return made[kind, script]

        def whole(self, script):
            return self.make("whole", script, 0)

        def begun(self, script, into):
            """A copy of it as into/run, so that a fault may spoil it."""
            made = self.make("begun", script, 143, terminate_at, 2)
            shutil.copytree(made, into / "run")
            shutil.copy(f"{made}.said", into / "run" / "said")
            return into / "run"

        def again(self, script, out, *fault, **more):
            """Run it on from the folder `out`. -> exit status, output."""
            return run(server, script, config(script, three_frames, out, **more), *fault)

        def same(self, script, out):
            """Whether the run in `out` ended as the one that was left alone: weights and optimiser bit for bit, log and metrics byte for byte."""
            a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (self.whole(script), out))
            assert a["step"] == b["step"] == STEPS and equal(a["model"], b["model"]) and equal(a["optimizers"], b["optimizers"])
            for name in ("log.jsonl", "metrics.json"):
                assert (self.whole(script) / name).read_bytes() == (out / name).read_bytes(), name
            assert not list(out.glob("*.part"))
            return True
    return Folders()


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def steps_logged(out):
    return [row["step"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]


# ---- 1-3, 17: killed, asked to stop, run again ----

def kill_after(module, what):
    """Fault: SIGKILL once the second step has been logged, or has moved the weights."""
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    log, interrupted, steps = common.Run.log, common.Run.interrupted, itertools.count(1)

    def logged(self, step, names, prefix="", **terms):
        log(self, step, names, prefix, **terms)
        if what == "log" and not prefix and next(steps) == 2:
            kill()

    def moved(self):
        if what == "update" and next(steps) == 2:
            kill()
        return interrupted(self)
    common.Run.log, common.Run.interrupted = logged, moved


@pytest.mark.parametrize("script", ["simipu", "finetune"])
def test_a_run_killed_twice_ends_as_if_nothing_had_happened(folders, tmp_path, script):
    out = tmp_path / "run"
    for what in ("log", "update"):
        code, said = folders.again(script, out, kill_after, what)
        assert code == -signal.SIGKILL, said
    code, said = folders.again(script, out)
    assert code == 0 and "steps 2 to 4" in said and folders.same(script, out), said


def kill_often(server, cfg, script, kills):
    """Kill a run so many times, each at a random moment within two seconds of its first step or of its start, then let it finish. -> seed of the moments."""
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        one = Run(server, script, cfg)
        if rng.random() < 0.7:
            one.until(lambda one=one: "steps" in one.said())
        one.process.join(rng.uniform(0, 2))
        one.process.kill()
        one.process.join()
        assert one.process.exitcode in (0, -signal.SIGKILL), (seed, one.said())
    code, said = run(server, script, cfg)
    assert code == 0, (seed, said)
    return seed


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_a_run_killed_twenty_times_ends_as_if_nothing_had_happened(server, folders, three_frames, tmp_path, script):
    assert run(server, script, config(script, three_frames, tmp_path / "whole", steps=40))[0] == 0
    seed = kill_often(server, config(script, three_frames, tmp_path / "run", steps=40), script, 20)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "run"))
    assert equal(a["model"], b["model"]) and equal(a["optimizers"], b["optimizers"]), seed
    for name in ("log.jsonl", "metrics.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), (seed, name)


def wait_for(module, gate):
    """Fault: every step waits until this file exists."""
    interrupted = common.Run.interrupted

    def held(log):
        while not Path(gate).exists():
            time.sleep(0.01)
        return interrupted(log)
    common.Run.interrupted = held


def test_a_folder_that_a_running_process_writes_is_refused_to_a_second_one(server, three_frames, tmp_path):
    cfg = config("finetune", three_frames, tmp_path / "run")
    first = Run(server, "finetune", cfg, wait_for, tmp_path / "gate")
    first.until(lambda: "step 1/" in first.said())
    before = files(tmp_path / "run")
    code, said = run(server, "finetune", cfg, said=tmp_path / "second.said")
    assert code == 1 and "run: another process is writing this run" in said and "another --out" in said, said
    assert files(tmp_path / "run") == before
    first.process.kill()
    first.process.join()
    assert run(server, "finetune", cfg, said=tmp_path / "third.said")[0] == 0


def killed_while_saving(module, moment):
    """Fault: SIGKILL in the third save: half of the checkpoint written, or between the two renames."""
    torch_save, move, saves = torch.save, os.replace, itertools.count(1)

    def half_written(state, path):
        if state["step"] == 3 and moment == "writing":
            whole = io.BytesIO()
            torch_save(state, whole)
            Path(path).write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        torch_save(state, path)

    def between(a, b):
        if Path(b).name == "last.pt" and next(saves) == 3 and moment == "renaming":
            os.kill(os.getpid(), signal.SIGKILL)
        move(a, b)
    torch.save, common.os.replace = half_written, between


@pytest.mark.parametrize("moment, told", [("writing", "steps 2 to 4"), ("renaming", "last.pt: missing. Going on from previous.pt, step 2")])
def test_killed_while_saving_loses_no_checkpoint(server, folders, three_frames, tmp_path, moment, told):
    out = tmp_path / "run"
    code, said = folders.again("finetune", out, killed_while_saving, moment)
    assert code == -signal.SIGKILL, said
    assert (out / "last.pt.part").exists() and (out / "last.pt").exists() == (moment == "writing")
    code, said = folders.again("finetune", out)
    assert code == 0 and told in said and folders.same("finetune", out), said


@pytest.mark.parametrize("script", ["clap", "finetune"])
def test_sigterm_saves_after_the_step_and_the_next_start_goes_on(folders, tmp_path, script):
    out = folders.begun(script, tmp_path)
    assert "asked to stop, saved after step 3; the same command goes on from there" in (out / "said").read_text()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3 and torch.load(out / "previous.pt", weights_only=True)["step"] == 2
    assert steps_logged(out) == [0, 1, 2]
    code, said = folders.again(script, out)
    assert code == 0 and "steps 3 to 4" in said and folders.same(script, out), said


def test_ctrl_c_saves_and_a_second_one_ends_at_once(server, three_frames, tmp_path):
    one = Run(server, "finetune", config("finetune", three_frames, tmp_path / "one", steps=1000))
    one.until(lambda: "step 1/" in one.said())
    os.kill(one.process.pid, signal.SIGINT)
    code, said = one.end()
    step = torch.load(tmp_path / "one" / "last.pt", weights_only=True)["step"]
    assert code == 143 and f"saved after step {step}" in said and steps_logged(tmp_path / "one") == list(range(step))

    two = Run(server, "finetune", config("finetune", three_frames, tmp_path / "two", steps=1000), fault=never_stopping)
    two.until(lambda: "step 1/" in two.said())
    os.kill(two.process.pid, signal.SIGINT)
    time.sleep(1)
    assert two.process.is_alive()
    for _ in range(9):                                              # the first one counts from when the process saw it
        two.process.join(1.5)
        if two.process.is_alive():
            os.kill(two.process.pid, signal.SIGINT)
    code, said = two.end(10)
    assert code == 1 and "KeyboardInterrupt" in said


def never_stopping(module, _):
    """Fault: a step that does not end."""
    common.Run.interrupted = lambda log: time.sleep(1000)


def test_a_finished_run_is_left_as_it_is(folders, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folders.whole("finetune"), out)
    before = files(out)
    code, said = folders.again("finetune", out)
    after = files(out)
    assert code == 0 and "steps 4 to 4" in said
    assert all(after[name] == before[name] for name in ("last.pt", "previous.pt", "backbones.safetensors", "log.jsonl", "metrics.json"))
    rates = [json.loads(line)["lr"] for line in (out / "log.jsonl").read_text().splitlines()]
    lr = config("finetune", "", "").lr
    np.testing.assert_allclose(rates, [lr / 3, lr, lr * 3 / 4, lr / 4], atol=1e-7)  # a quarter of the steps warms up from a third, then half a cosine over three


# ---- 4, 18: checkpoints that are cut, empty, foreign or hostile ----

class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def bomb(marker):
    it = Bomb()
    it.path = str(marker)
    whole = io.BytesIO()
    torch.save(dict(step=3, config="{}", model=it, optimizers=[]), whole)
    return whole.getvalue()


SPOILS = {"empty": lambda old, marker: b"", "cut": lambda old, marker: old[:len(old) * 2 // 3], "zeros": lambda old, marker: bytes(len(old)),
          "a pickle that runs a command": lambda old, marker: bomb(marker), "another program's": lambda old, marker: foreign()}


def foreign():
    whole = io.BytesIO()
    torch.save({"epoch": 3, "model_state": {"w": torch.ones(2)}}, whole)
    return whole.getvalue()


@pytest.mark.parametrize("how", SPOILS)
def test_a_bad_checkpoint_falls_back_to_the_one_before(folders, tmp_path, how):
    out = folders.begun("finetune", tmp_path)
    (out / "last.pt").write_bytes(SPOILS[how]((out / "last.pt").read_bytes(), tmp_path / "ran"))
    code, said = folders.again("finetune", out)
    assert code == 0 and "last.pt: not a readable checkpoint" in said and "Going on from previous.pt, step 2." in said, said
    assert folders.same("finetune", out) and (out / "unreadable.pt").exists() and not (tmp_path / "ran").exists()


def test_two_bad_checkpoints_are_an_error_and_not_a_new_start(folders, tmp_path):
    out = folders.begun("finetune", tmp_path)
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes((out / name).read_bytes()[:1000])
    before = files(out)
    code, said = folders.again("finetune", out)
    assert code == 1 and said.count("not a readable checkpoint") == 2 and "1000 bytes" in said and "give another --out" in said, said
    assert files(out) == before


# ---- 5: no room ----

def no_room(module, limit):
    """Fault: no file may grow beyond so many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_log(module, _):
    """Fault: the device of the log is full."""
    enter = common.Run.__init__

    def full(log, *words):
        enter(log, *words)
        log.file = open("/dev/full", "w")
    common.Run.__init__ = full


@pytest.mark.parametrize("fault, told", [(no_room, "last.pt: could not be written ("), (full_log, "log.jsonl: step 3 could not be written (No space left on device)")])
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoints(folders, tmp_path, fault, told):
    out = folders.begun("finetune", tmp_path)
    before = files(out)
    most = max(path.stat().st_size for path in (out / "backbones.safetensors", *ROOT.glob("*.py")))
    assert most < len(before["last.pt"])
    code, said = folders.again("finetune", out, fault, most + 4096)
    assert code == 1 and told in said and "the same command goes on from the last checkpoint" in said, said
    after = files(out)
    assert after["last.pt"] == before["last.pt"] and after["previous.pt"] == before["previous.pt"] and not [name for name in after if name.endswith(".part")]
    code, said = folders.again("finetune", out)
    assert code == 0 and folders.same("finetune", out), said


def test_a_folder_that_cannot_be_made_is_named(three_frames, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"--out {tmp_path}/file/run: cannot write there .Not a directory.; give a folder that can be written"):
        finetune.train(0, 1, config("finetune", three_frames, tmp_path / "file" / "run"))


# ---- 6: numbers that are not finite ----

def poison(module, where):
    """Fault: in the second step that is made here, the loss or the gradient is not finite."""
    model = getattr(module, {"clap": "CLAP", "finetune": "Detector"}[module.__name__])
    forward, steps = model.forward, itertools.count(1)

    def spoiled(self, *words):
        loss, terms = forward(self, *words)
        if self.training and next(steps) == 2:
            if where == "gradient":
                next(self.parameters()).register_hook(lambda g: g * float("inf"))
            else:
                loss = loss * float("nan")
        return loss, terms
    model.forward = spoiled


@pytest.mark.parametrize("script, where, told", [("clap", "loss", "loss, grad_norm not finite"), ("finetune", "loss", "loss, grad_norm not finite"),
                                                 ("finetune", "gradient", "grad_norm not finite")])
def test_nan_ends_the_run_before_the_update(folders, tmp_path, script, where, told):
    out = tmp_path / "run"
    code, said = folders.again(script, out, poison, where)
    assert code == 1 and f"FloatingPointError: step 1, rank 0: {told} on nuscenes/" in said and "nothing was updated, the last checkpoint stands" in said, said
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 1 and steps_logged(out) == [0]


@pytest.mark.parametrize("script", ["simipu", "cmcr"])
def test_every_method_looks_at_its_gradient(script):
    """Each training loop logs the gradient's norm, which Run refuses if it is not finite, before the optimiser's step."""
    loop = (ROOT / f"{script}.py").read_text().split("in run.batches(loader, first):")[1]
    assert loop.index("norm = ") < loop.index("grad_norm=norm") < loop.index(".step()")


@pytest.mark.parametrize("script", ["finetune", "clap"])
def test_a_learning_rate_of_1e20_is_noticed(folders, tmp_path, script):
    code, said = folders.again(script, tmp_path / "run", lr=1e20, steps=30)
    assert code == 1 and "not finite on nuscenes/" in said, said


# ---- 10, 12: one process has nothing, the other everything ----

def test_fine_tuning_on_two_processes_is_that_of_one_also_when_one_frame_is_empty(server, three_frames, tmp_path):
    """Loss and gradient of two frames at once and of one on each process; then one process's frame has neither point nor box, and batch norm trains."""
    dataset = data.open_dataset(three_frames, "small")
    frames = [dataset.load(i) for i in range(2)]
    bare = replace(frames[1], points=frames[1].points[:0], boxes=frames[1].boxes[:0], labels=frames[1].labels[:0])
    torch.manual_seed(0)
    model = finetune.Detector(config("finetune", three_frames, ""), dataset.grid).eval()
    apart = [[data.collate([frame], [n]) for n, frame in enumerate(pair)] for pair in (frames, (frames[0], bare))]
    together = [data.collate(pair, [0, 1]) for pair in (frames, [frames[0], bare])]
    cases = [*((copy.deepcopy(model), pair) for pair in apart), (copy.deepcopy(model).train(), apart[1])]
    parts = on_two(server, a_frame_each, tmp_path, cases)
    for joined, (loss, _, gradient), (other, _, same) in zip(together, *parts):
        one = copy.deepcopy(model)
        whole, _ = one(joined)
        whole.backward()
        tiny = 1e-6 * max(float(p.grad.abs().max()) for p in one.parameters())
        torch.testing.assert_close((loss + other) / 2, whole.detach(), rtol=1e-5, atol=1e-6)
        for name, p in one.named_parameters():
            torch.testing.assert_close(gradient[name], p.grad, rtol=1e-4, atol=tiny, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(gradient[name], same[name]), name
    assert all(part[2][0].isfinite() and all(g.isfinite().all() for g in part[2][2].values()) for part in parts)


def resumed(rank, folders):
    """What one of two processes finds in its folder: a step or what it says."""
    try:
        return common.resume(folders[rank], torch.nn.Linear(2, 2))
    except SystemExit as refusal:
        return str(refusal)


def test_processes_that_find_different_checkpoints_do_not_go_on(server, tmp_path):
    """Two nodes without a common folder, or one whose disk failed for a moment: they would train on different weights."""
    for name, step in (("a", 7), ("b", 5)):
        (tmp_path / name).mkdir()
        torch.save(dict(step=step, config="{}", model=torch.nn.Linear(2, 2).state_dict(), optimizers=[]), tmp_path / name / "last.pt")
    cases = {("a", "a"): (7, 7), ("a", "b"): "step 5, some that of 7", ("b", "nowhere"): "step 0, some that of 5"}
    for folders, expected in cases.items():
        found = on_two(server, resumed, tmp_path, [str(tmp_path / name) for name in folders])
        (tmp_path / "meet").unlink(missing_ok=True)
        assert found == [7, 7] if expected == (7, 7) else all(expected in said and "they must all see one folder" in said for said in found), found


@pytest.mark.parametrize("method", [simipu, cmcr])
def test_contrast_on_two_processes_goes_on_when_one_has_no_point(server, method, three_frames, tmp_path):
    """Negatives are each process's own, so the loss is not that of the joined batch; it is finite, both end with the same gradient, and its mean is the full frame's."""
    of = {simipu: test_simipu, cmcr: test_cmcr}[method]
    dataset, rng = data.open_dataset(three_frames, "small"), np.random.default_rng(0)
    frames = [dataset.load(i) for i in range(2)]
    full, bare = of.VIEWS(frames[0], rng), of.VIEWS(replace(frames[1], points=frames[1].points[:0]), rng)
    torch.manual_seed(0)
    model = simipu.SimIPU(of.TINY) if method is simipu else cmcr.CMCR(of.TINY, dataset.grid, False)
    model.eval()
    apart = [data.collate([frame], [n]) for n, frame in enumerate((full, bare))]
    parts = on_two(server, a_frame_each, tmp_path, [(copy.deepcopy(model), apart), (copy.deepcopy(model).train(), apart)])
    for (loss, _, gradient), (other, _, same) in zip(*parts):
        assert loss.isfinite() and other.isfinite() and all(g.isfinite().all() and torch.equal(g, same[name]) for name, g in gradient.items())
    contrast = "L_intra" if method is simipu else "L_NCE"
    alone = method.SimIPU(of.TINY).eval() if method is simipu else cmcr.CMCR(of.TINY, dataset.grid, False).eval()
    alone.load_state_dict(model.state_dict())
    torch.testing.assert_close((parts[0][0][1][contrast] + parts[1][0][1][contrast]) / 2, alone(apart[0])[1][contrast].detach())


# ---- 14, 24, 25: several processes ----

def join(module, words):
    """Fault, or its setting: this process is one of two, and waits so many seconds for the other."""
    rank, port, common.TIMEOUT = words
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_process_that_hangs_is_not_waited_for_longer_than_the_limit(server, three_frames, tmp_path):
    out, port = tmp_path / "run", free_port()
    one, two = (Run(server, "finetune", config("finetune", three_frames, out, steps=5000), join, (rank, port, 4), said=tmp_path / str(rank)) for rank in range(2))
    try:
        one.until(lambda: "step 1/" in one.said())
        os.kill(two.process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        code, said = one.end(30)
    finally:
        two.process.kill()
        two.process.join()
    assert code == 1 and time.monotonic() - begun < 15 and "imed out" in said, said


@pytest.mark.slow                                                                   # torch's launcher gives what is left 30 seconds
def test_a_process_that_hangs_ends_the_job_whatever_port_is_taken(three_frames, tmp_path):
    """Rank 1 is stopped, not dead: rank 0 waits LIDAR_CAMERA_TIMEOUT seconds, then the launcher ends both. Torch's usual port is taken by somebody else."""
    fields = {k: v for k, v in RUNS["finetune"].items() if k not in ("gpus", "steps")}
    words = [word for key, value in fields.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIDAR_CAMERA_TIMEOUT": "4", "MASTER_PORT": "29500"}
    command = [sys.executable, str(ROOT / "finetune.py"), "--data", str(three_frames), "--out", str(tmp_path / "run"), "--steps", "5000", "--gpus", "2", *words]
    with socket.socket() as other:
        with contextlib.suppress(OSError):                                          # taken already: as well
            other.bind(("127.0.0.1", 29500))
            other.listen()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)
        try:
            assert any(line.startswith("step ") for line in process.stdout)
            ranks = ranks_of(process.pid)
            os.kill(ranks["1"], signal.SIGSTOP)
            rest, _ = process.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and "rank 0 of 2 left with exit code 1 (RuntimeError" in rest.splitlines()[-1] and "imed out" in rest, rest[-3000:]
    assert not Path(f"/proc/{ranks['1']}").exists()


def test_more_gpus_than_there_are_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(SystemExit, match=r"--gpus 2: this machine shows 1 \(CUDA_VISIBLE_DEVICES=3\)"):
        common.launch(None, clap.Config(gpus=2))
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--gpus 1: no CUDA device is visible; --gpus 0"):
            common.launch(None, clap.Config(gpus=1))


def ends(rank, folder, port, asked):
    """One of two processes: a collective, then an end that takes rank 0 until the other has left; or a stop that was asked for, and a save on rank 0."""
    die_with_the_server()
    join(None, (rank, port, 60))

    def train(rank, world, cfg):
        device = common.init_process(cfg, world)
        assert common.all_reduce(torch.ones(1, device=device)) == 2
        if not asked:
            common.destroy_group()
        if rank == 0:
            while not asked and not (folder / "other has left").exists():
                time.sleep(0.01)
            time.sleep(0.5)
            (folder / "done").touch()
        if asked:
            sys.exit(143)
    common.launch(train, replace(finetune.Config(), gpus=0))


@pytest.mark.parametrize("asked", [False, True])
def test_a_long_end_of_rank_0_is_not_waited_for_and_its_save_is(server, tmp_path, asked):
    port = free_port()
    both = [server.Process(target=ends, args=(rank, tmp_path, port, asked)) for rank in (0, 1)]
    for process in both:
        process.start()
    both[1].join(90)
    assert (tmp_path / "done").exists() == asked
    (tmp_path / "other has left").touch()
    both[0].join(90)
    assert [process.exitcode for process in both] == [143 if asked else 0] * 2 and (tmp_path / "done").exists()


def test_fine_tuning_on_two_processes_to_the_end_scores_every_frame_once(server, world, tmp_path, capsys):
    """Three held-out frames on two processes; predicted again by one they are the same."""
    cfg, port = config("finetune", world, tmp_path / "run", steps=2), free_port()
    both = [Run(server, "finetune", cfg, join, (rank, port, 100), said=tmp_path / str(rank)) for rank in range(2)]
    for code, said in [one.end() for one in both]:
        assert code == 0, said
    first = files(tmp_path / "run")
    assert json.loads(first["metrics.json"])["frames"] == 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    finetune.train(0, 1, replace(finetune.Config(), eval_only=str(tmp_path / "run"), gpus=0, workers=0))
    torch.set_num_threads(threads)
    assert "the weights after step 2" in capsys.readouterr().out
    assert files(tmp_path / "run")["results_nusc.json"] == first["results_nusc.json"] and files(tmp_path / "run")["metrics.json"] == first["metrics.json"]


# ---- 16: resumed with another configuration, or other data ----

@pytest.mark.parametrize("script, listed", [("clap", "frames.txt"), ("finetune", "labels.txt")])
def test_a_resume_notices_that_the_frames_have_changed(folders, tmp_path, script, listed):
    out = folders.begun(script, tmp_path)
    names = (out / listed).read_text()
    (out / listed).write_text("nuscenes/gone/1\n" + names)
    before = files(out)
    code, said = folders.again(script, out)
    assert code == 1 and f"{listed}: this run began with" in said and "0 of them new, 1 gone (nuscenes/gone/1, ...)" in said, said
    assert all(files(out)[name] == before[name] for name in ("last.pt", listed))


@pytest.mark.parametrize("more, told", [(dict(width=8), "width was 4, is 8"), (dict(lr=5e-4), "lr was 0.001, is 0.0005"), (dict(steps=6), "steps was 4, is 6"),
                                        (dict(seed=1), "seed was 0, is 1")])
def test_what_changes_the_result_may_not_change_between_stop_and_resume(folders, tmp_path, more, told):
    out = folders.begun("finetune", tmp_path)
    before = files(out)
    (out / "config.json").unlink()                                                  # the checkpoint knows it too
    code, said = folders.again("finetune", out, None, None, **more)
    assert code == 1 and f"{out} holds a run with another configuration: {told}. Repeat its command" in said, said
    assert files(out) == {k: v for k, v in before.items() if k != "config.json"}


def test_what_only_changes_the_telling_may(folders, three_frames, tmp_path):
    out = folders.begun("finetune", tmp_path)
    moved = out.rename(tmp_path / "elsewhere")
    code, said = folders.again("finetune", moved, None, None, save_every=3, workers=1)
    assert code == 0 and folders.same("finetune", moved), said


# ---- 20, 22, 23 ----

def test_arrays_in_caches_and_files_hold_no_pickles():
    for script in ROOT.glob("*.py"):
        source = script.read_text()
        calls = {name: [call.split("\n")[0] for call in source.split(name + "(")[1:]] for name in ("np.load", "torch.load")}
        assert all("allow_pickle=False" in call for call in calls["np.load"]) and all("weights_only=True" in call for call in calls["torch.load"]), script.name
        assert "pickle.load" not in source, script.name


def found(*changes):
    """Predictions of two frames, changed in the second."""
    frames = {name: [np.ones((3, 9), np.float32), np.zeros(3, np.int64), np.full(3, 0.5, np.float32), np.eye(4)] for name in ("nuscenes/s/a", "nuscenes/s/b")}
    for index, value in changes:
        frames["nuscenes/s/b"][index] = value
    return {name: tuple(parts) for name, parts in frames.items()}


def test_predictions_are_checked_before_they_are_scored():
    names = ["nuscenes/s/a", "nuscenes/s/b"]
    finetune.check_predictions(found(), names)
    for wrong, error, told in (({names[0]: found()[names[0]]}, ValueError, "nuscenes/s/b: held out but not predicted"),
                               ({**found(), "nuscenes/s/c": found()[names[0]]}, ValueError, "nuscenes/s/c: predicted but not held out"),
                               (found((2, np.array([0.5, np.nan, 0.4], np.float32))), FloatingPointError, "nuscenes/s/b: 3 boxes predicted, 1 of them"),
                               (found((0, np.full((3, 9), np.inf, np.float32))), FloatingPointError, "3 of them with numbers that are not finite"),
                               (found((0, np.ones((501, 9))), (2, np.ones(501))), FloatingPointError, "501 boxes predicted.*at most 500")):
        with pytest.raises(error, match=told):
            finetune.check_predictions(wrong, names)


def test_broken_weights_do_not_score_as_no_detections(three_frames):
    dataset = data.open_dataset(three_frames, "small")
    torch.manual_seed(0)
    model = finetune.Detector(config("finetune", three_frames, ""), dataset.grid)
    with torch.no_grad():
        next(model.shared.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nuscenes/.* boxes predicted.*the weights are broken"):
        finetune.predict_all(model, data.loader(dataset, "val", 1, 0, 1, 0), torch.device("cpu"))


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_a_run_folder_without_a_readable_configuration_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SystemExit, match="config.json: no readable configuration of a run .*give a folder"):
        finetune.train(0, 1, replace(finetune.Config(), eval_only=str(tmp_path)))


def test_a_run_of_pre_training_is_not_scored_as_a_detector(folders):
    with pytest.raises(SystemExit, match="a run of pre-training, which has no detector; expected a folder that finetune.py wrote"):
        finetune.train(0, 1, replace(finetune.Config(), eval_only=str(folders.whole("clap"))))


def test_a_configuration_is_written_as_it_was_asked_for(folders):
    stored = json.loads((folders.whole("finetune") / "config.json").read_text())
    asked = asdict(config("finetune", stored["data"], stored["out"]))
    assert stored == json.loads(json.dumps({**asked, "world": 1}))
    assert json.loads(torch.load(folders.whole("finetune") / "last.pt", weights_only=True)["config"]) == stored
    header, weights = common.read_units(folders.whole("finetune"))[1:]
    assert header["units"] == "lidar,fuse,neck,shared,heads" and {name.split(".")[0] for name in weights} == set(header["units"].split(","))
