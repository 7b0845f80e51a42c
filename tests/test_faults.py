"""What happens when a run is killed, starved or given bad input.

For CLAP, as one of the three methods, and for finetune.py, in processes of their own. The numbers
are those of the project's list of faults. Other files test some of them:
 8 broken sample files     test_data.py (folders, the doctor), test_waymo.py, test_fuzz.py.
                           There is no --skip-bad: a frame that cannot be read ends the run and is
                           named, so nothing is skipped silently.
 9 empty geometry          test_clap.py, test_simipu.py, test_cmcr.py, test_finetune.py: frames
                           without points, pairs, masks or boxes
11 idle parameters         the same four: which parameters get a gradient
13 a process that dies     test_clap.py: it ends the job and is named
15 determinism             here: resumed runs; test_data.py: batches do not depend on workers
18 foreign weights         test_simipu.py: image weights; here: the hostile checkpoint
19 hostile tables          test_data.py, broken folders: absolute and upward paths, links, an
                           enormous picture, NaN calibration, cyclic and doubled tokens
20 caches                  test_data.py: two processes build the index, it is built again, the race
                           is lost; here: no pickles
21 weights that do not fit test_finetune.py
Not applicable: 7 and 26. No step is skipped or scaled, whatever its loss, since bfloat16 needs no
scaler.
"""
import ast
import contextlib
import copy
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
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
STEPS = 4
RUNNING = []    # the processes of the current test
SMALL = dict(preset="small", gpus=0, batch=1, width=4)
RUNS = {        # script: fields of its Config that make a step take a fraction of a second
    "clap": dict(
        SMALL, steps=STEPS, save_every=1, eval_every=3,
        rays=64, pixels=16, samples=8, importance_samples=4,
    ),
    "simipu": dict(
        SMALL, steps=STEPS, save_every=1, eval_every=3,
        points=256, zoom_low=0.4, zoom_high=0.5,
    ),
    "cmcr": dict(
        SMALL, steps=STEPS, save_every=1, eval_every=3,
        teacher="none", crop_h=64, crop_w=96, crop_points=60, pairs=200, queries=90,
    ),
    "finetune": dict(
        SMALL, steps=STEPS, save_every=1,
        bins=12, modality="lidar", fraction=1.0, warmup=2,
    ),
    "segment": dict(SMALL, steps=STEPS, save_every=1, fraction=1.0, warmup=2),
    "depth": dict(
        {name: value for name, value in SMALL.items() if name != "width"},
        steps=STEPS, save_every=1, fraction=1.0, warmup=2, points=50,
    ),
}
FIGURES = ("save_figure", "save_figures", "draw_curves", "loss_curves", "load_tool")


def config(script, root, out, **more):
    module = importlib.import_module(script)
    fields = {**module.SMALL, **RUNS[script], "data": str(root), "out": str(out), **more}
    return module.Config(**fields)


# ---- processes: see conftest.server --------------------------------------------------

@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    yield
    for process in RUNNING:
        process.kill()
    RUNNING.clear()


def train_in_this_process(script, cfg, path, fault, argument):
    """Train a script with this configuration, after fault(module, argument); output goes to path.

    Without figures: they take longer than the run.
    """
    die_with_the_server()
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    sys.modules["__main__"] = module
    for name in FIGURES:
        if hasattr(module, name):
            setattr(module, name, lambda *_, **__: None)
    if fault:
        fault(module, argument)
    common.launch(module.train, cfg)


class Run:
    """A run in a process of its own; .output() is what it has printed so far."""

    def __init__(self, server, script, cfg, fault=None, argument=None, path=None):
        self.file = Path(path or f"{cfg.out}.output")
        self.file.write_text("")
        words = (script, cfg, str(self.file), fault, argument)
        self.process = server.Process(target=train_in_this_process, args=words)
        self.process.start()
        RUNNING.append(self.process)

    def output(self):
        return self.file.read_text()

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition() and self.process.is_alive():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)
        assert condition(), self.output()

    def until_step_1(self):
        self.until(lambda: "step 1/" in self.output())

    def end(self, seconds=120):
        """-> exit status, output"""
        self.process.join(seconds)
        assert not self.process.is_alive(), "still running:\n" + self.output()
        return self.process.exitcode, self.output()


def run(*words, **options):
    return Run(*words, **options).end()


def terminate_at(module, step):
    """Fault: SIGTERM from outside in the middle of this step."""
    interrupted = common.Run.interrupted
    steps = itertools.count()

    def terminate(self):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return interrupted(self)
    common.Run.interrupted = terminate


class Folders:
    """Run folders that several tests start from, each made once."""

    def __init__(self, server, root, home):
        self.server = server
        self.root = root
        self.home = home
        self.made = {}

    def make(self, kind, script, status, *fault):
        if (kind, script) not in self.made:
            out = self.home / f"{kind}_{script}"
            code, output = run(self.server, script, config(script, self.root, out), *fault)
            assert code == status, output
            self.made[kind, script] = out
        return self.made[kind, script]

    def whole(self, script):
        """A run that nothing has disturbed."""
        return self.make("whole", script, 0)

    def begun(self, script, into):
        """A run that SIGTERM stopped after 3 of 4 steps, with last.pt and previous.pt.

        -> a copy of it, into/run, which a fault may spoil
        """
        folder = self.make("begun", script, 143, terminate_at, 2)
        shutil.copytree(folder, into / "run")
        shutil.copy(f"{folder}.output", into / "run" / "output.txt")
        return into / "run"

    def again(self, script, out, *fault, **more):
        """Run on from the folder `out`. -> exit status, output"""
        return run(self.server, script, config(script, self.root, out, **more), *fault)

    def same(self, script, out):
        """Whether the run in `out` ended as the undisturbed one did.

        Weights and optimiser bit for bit, log and metrics byte for byte.
        """
        whole = self.whole(script)
        a = torch.load(whole / "last.pt", weights_only=True)
        b = torch.load(out / "last.pt", weights_only=True)
        assert a["step"] == b["step"] == STEPS
        assert equal(a["model"], b["model"]) and equal(a["optimizers"], b["optimizers"])
        for name in ("log.jsonl", "metrics.json"):
            assert (whole / name).read_bytes() == (out / name).read_bytes(), name
        assert not list(out.glob("*.part"))
        return True


@pytest.fixture(scope="module")
def folders(server, three_frames, tmp_path_factory):
    return Folders(server, three_frames, tmp_path_factory.mktemp("runs"))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def log_rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_logged(out):
    return [row["step"] for row in log_rows(out) if "loss" in row]


def break_weights(module, steps):
    """Fault: the update before the save of this step leaves a NaN in the weights."""
    save = module.save

    def broken(cfg, step, model, *words):
        if step == steps:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = float("nan")
        save(cfg, step, model, *words)
    module.save = broken


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


# ---- 1-3, 17: killed, asked to stop, run again ---------------------------------------

def kill_after(module, what):
    """Fault: SIGKILL once the second step has been logged, or has moved the weights."""
    log = common.Run.log
    interrupted = common.Run.interrupted
    steps = itertools.count(1)

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def logged(self, step, batches, terms, **more):
        log(self, step, batches, terms, **more)
        if what == "log" and next(steps) == 2:
            kill()

    def moved(self):
        if what == "update" and next(steps) == 2:
            kill()
        return interrupted(self)
    common.Run.log = logged
    common.Run.interrupted = moved


@pytest.mark.parametrize("script", ["simipu", "finetune"])
def test_resume_after_two_kills_is_bit_identical(folders, tmp_path, script):
    out = tmp_path / "run"
    for what in ("log", "update"):
        code, output = folders.again(script, out, kill_after, what)
        assert code == -signal.SIGKILL, output
    code, output = folders.again(script, out)
    assert code == 0 and "steps 2 to 4" in output and folders.same(script, out), output


def kill_often(server, cfg, script, kills):
    """Kill a run so many times, then let it finish. -> seed of the moments

    Each moment is random, within two seconds of the run's first step or of its start.
    """
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        one = Run(server, script, cfg)
        if rng.random() < 0.7:
            one.until(lambda one=one: "steps" in one.output())
        one.process.join(rng.uniform(0, 2))
        one.process.kill()
        one.process.join()
        assert one.process.exitcode in (0, -signal.SIGKILL), (seed, one.output())
    code, output = run(server, script, cfg)
    assert code == 0, (seed, output)
    return seed


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_resume_after_twenty_kills_is_bit_identical(server, three_frames, tmp_path, script):
    whole = tmp_path / "whole"
    killed = tmp_path / "run"
    assert run(server, script, config(script, three_frames, whole, steps=40))[0] == 0
    seed = kill_often(server, config(script, three_frames, killed, steps=40), script, 20)
    a = torch.load(whole / "last.pt", weights_only=True)
    b = torch.load(killed / "last.pt", weights_only=True)
    assert equal(a["model"], b["model"]) and equal(a["optimizers"], b["optimizers"]), seed
    for name in ("log.jsonl", "metrics.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), (seed, name)


def wait_for(module, gate):
    """Fault: every step waits until this file exists."""
    interrupted = common.Run.interrupted

    def wait(self):
        while not Path(gate).exists():
            time.sleep(0.01)
        return interrupted(self)
    common.Run.interrupted = wait


def test_a_second_process_is_refused_the_run_folder(server, three_frames, tmp_path):
    cfg = config("finetune", three_frames, tmp_path / "run")
    first = Run(server, "finetune", cfg, wait_for, tmp_path / "gate")
    first.until_step_1()
    before = files(tmp_path / "run")
    code, output = run(server, "finetune", cfg, path=tmp_path / "second.output")
    message = f"run: another process is writing this run (pid {first.process.pid})"
    assert code == 1 and message in output and "Traceback" not in output, output
    assert "another --out" in output, output
    assert files(tmp_path / "run") == before
    first.process.kill()
    first.process.join()
    assert run(server, "finetune", cfg, path=tmp_path / "third.output")[0] == 0


def kill_while_saving(module, moment):
    """Fault: SIGKILL in the third save: half of the file written, or between the two renames."""
    torch_save = torch.save
    move = os.replace
    saves = itertools.count(1)

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
    torch.save = half_written
    common.os.replace = between


@pytest.mark.parametrize("moment, message", [
    ("writing", "steps 2 to 4"),
    ("renaming", "last.pt: missing. Going on from previous.pt, step 2"),
])
def test_a_kill_while_saving_loses_no_checkpoint(folders, tmp_path, moment, message):
    out = tmp_path / "run"
    code, output = folders.again("finetune", out, kill_while_saving, moment)
    assert code == -signal.SIGKILL, output
    assert list(out.glob("last.pt.*.part"))
    assert (out / "last.pt").exists() == (moment == "writing")
    code, output = folders.again("finetune", out)
    assert code == 0 and message in output and folders.same("finetune", out), output


@pytest.mark.parametrize("script", ["clap", "finetune"])
def test_sigterm_saves_after_the_step_and_the_same_command_resumes(folders, tmp_path, script):
    out = folders.begun(script, tmp_path)
    message = "asked to stop, saved after step 3; the same command goes on from there"
    assert message in (out / "output.txt").read_text()
    assert step_of(out / "last.pt") == 3 and step_of(out / "previous.pt") == 2
    assert steps_logged(out) == [0, 1, 2]
    code, output = folders.again(script, out)
    assert code == 0 and "steps 3 to 4" in output and folders.same(script, out), output


def never_stop(module, _):
    """Fault: a step that does not end."""
    common.Run.interrupted = lambda self: time.sleep(1000)


def test_ctrl_c_saves_and_a_second_one_exits_at_once(server, three_frames, tmp_path):
    cfg = config("finetune", three_frames, tmp_path / "one", steps=1000)
    one = Run(server, "finetune", cfg)
    one.until_step_1()
    os.kill(one.process.pid, signal.SIGINT)
    code, output = one.end()
    step = step_of(tmp_path / "one" / "last.pt")
    assert code == 143 and f"saved after step {step}" in output
    assert steps_logged(tmp_path / "one") == list(range(step))

    cfg = config("finetune", three_frames, tmp_path / "two", steps=1000)
    two = Run(server, "finetune", cfg, fault=never_stop)
    two.until_step_1()
    os.kill(two.process.pid, signal.SIGINT)
    time.sleep(1)
    assert two.process.is_alive()
    for _ in range(9):    # the first one counts from when the process saw it
        two.process.join(1.5)
        if two.process.is_alive():
            os.kill(two.process.pid, signal.SIGINT)
    code, output = two.end(10)
    assert code == 1 and "KeyboardInterrupt" in output


def test_a_closed_terminal_is_a_request_to_stop_unless_nohup_ignores_it(
        server, three_frames, tmp_path):
    closed = config("finetune", three_frames, tmp_path / "closed", steps=1000, save_every=1000)
    one = Run(server, "finetune", closed)
    one.until_step_1()
    os.kill(one.process.pid, signal.SIGHUP)
    code, output = one.end()
    step = step_of(tmp_path / "closed" / "last.pt")
    assert code == 143 and f"saved after step {step}" in output, output

    cfg = config("finetune", three_frames, tmp_path / "nohup")
    two = Run(server, "finetune", cfg, ignore_hangup)
    two.until_step_1()
    os.kill(two.process.pid, signal.SIGHUP)
    code, output = two.end()
    assert code == 0 and "asked to stop" not in output, output


def ignore_hangup(module, _):
    """Fault, or a setting: as under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def close_output(module, how):
    """Fault: nothing can be printed any more."""
    file = os.open("/dev/full", os.O_WRONLY)
    if how == "pipe":
        reader, file = os.pipe()
        os.close(reader)
    for stream in (1, 2):
        os.dup2(file, stream)


@pytest.mark.parametrize("how", ["full", "pipe"])
def test_output_that_nobody_takes_ends_nothing(folders, tmp_path, how):
    code, _ = folders.again("finetune", tmp_path / "run", close_output, how, steps=1)
    assert code == 0 and (tmp_path / "run" / "metrics.json").exists()
    stream = common.LenientStream(None)  # what Python has where these are closed
    assert stream.write("word") == 4 and stream.flush() is None


# ---- a loader that gives nothing -----------------------------------------------------

def spoil_data(module, words):
    """Fault: from job n on, what reads the data hangs, dies or finds a broken file.

    In this process or in a loader's worker, which counts its own jobs.
    """
    n, what, timeout = words
    multiprocessing.set_start_method("fork", force=True)  # else workers have no fault
    os.environ["LIDAR_CAMERA_TIMEOUT"] = str(timeout)
    read = data.Loader.__getitem__
    jobs = itertools.count()

    def spoiled(self, job):
        if job[2] and next(jobs) >= n:
            if what == "hangs":
                time.sleep(1000)
            if what in ("stops", "dies"):
                time.sleep(1)  # until its thread has handed over the batch before
                os.kill(os.getpid(), signal.SIGSTOP if what == "stops" else signal.SIGKILL)
            raise data.DataError("nuscenes/a/b: broken, repair it")
        return read(self, job)
    data.Loader.__getitem__ = spoiled


@pytest.mark.parametrize("what, workers, message", [
    ("stops", 1, "no batch for 5 s. /dev/shm, where batches wait, has .* MB free: if that is full"),
    ("hangs", 0, "no batch for 5 s. Does a disk not answer"),
    ("dies", 1, "a loader worker was killed, as the kernel does where memory runs out"),
    ("broken", 1, "nuscenes/a/b: broken, repair it"),
    ("broken", 0, "nuscenes/a/b: broken, repair it"),
])
def test_a_run_without_data_is_saved_and_says_why(folders, tmp_path, what, workers, message):
    out = tmp_path / "run"
    timeout = 10 if what in ("stops", "hangs") else 600
    code, output = folders.again("finetune", out, spoil_data, (2, what, timeout), save_every=1000,
                                 workers=workers)
    assert code == 1 and re.search(message, output.splitlines()[-1]), output
    step = step_of(out / "last.pt")
    assert 1 <= step <= 2 and "Traceback" not in output, output
    message = f"run: no data for the next step, saved after step {step}; the same command goes on"
    assert message in output, output
    if what == "dies":
        code, output = folders.again("finetune", out)
        assert code == 0 and folders.same("finetune", out), output


@pytest.mark.parametrize("n, workers", [(1, 0), (1, 1), (0, 0)])
def test_a_run_that_waits_for_data_stops_at_once(server, three_frames, tmp_path, n, workers):
    out = tmp_path / "run"
    cfg = config("finetune", three_frames, out, save_every=1000, workers=workers)
    one = Run(server, "finetune", cfg, spoil_data, (n, "hangs", 600))
    one.until(lambda: ("step 1/" if n else "steps 0 to") in one.output())
    time.sleep(0.5)
    asked = time.monotonic()
    os.kill(one.process.pid, signal.SIGTERM)
    code, output = one.end(20)
    assert time.monotonic() - asked < 10 and "Traceback" not in output, output
    if n:
        assert code == 143 and "asked to stop, saved after step 1" in output, output
        assert step_of(out / "last.pt") == 1
    else:
        assert code == 1 and "asked to stop before step 1" in output, output
        assert not (out / "last.pt").exists()


def test_shared_memory_must_hold_the_batches_that_wait(three_frames, monkeypatch):
    loader = data.loader(three_frames, "train", 1, preset="small", workers=1)
    batch = next(data.loader(three_frames, "train", 1, preset="small").begin_at(0))
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, **__: [batch])
    size = []
    batch.map(lambda tensor: size.append(tensor.nbytes) or tensor)
    blocks = 2 * sum(size) // 4096
    for total, fits in ((blocks + 2, True), (blocks - 1, False)):
        disk = os.statvfs_result((4096, 4096, total, total, total, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path, disk=disk: disk)
        for batches in (loader.begin_at(0), loader.once()):
            if fits:
                next(batches)
                continue
            message = "/dev/shm has .* --shm-size 8g .*--workers 0"
            with pytest.raises(data.DataError, match=message):
                next(batches)


def test_each_run_says_first_what_it_reads(folders, three_frames):
    for script in ("clap", "finetune"):
        lines = Path(f"{folders.whole(script)}.output").read_text().splitlines()
        assert f"{three_frames}: nuScenes v1.0-embedded, 2 train and 1 val frames" == lines[0]
    dataset = data.open_dataset(three_frames, "small")
    data.announce(dataset, 64)
    with pytest.raises(data.DataError, match="--batch 65: the train split of .* has 2 frames"):
        data.announce(dataset, 65)


def test_a_traceback_is_shown_where_it_is_asked_for(folders, tmp_path, monkeypatch):
    code, output = folders.again("finetune", tmp_path / "run", debug, (1, "broken", 600))
    assert code == 1 and output.startswith("nuscenes", output.rindex("\n", 0, -1) + 1), output
    assert "Traceback" in output


def debug(module, words):
    """Fault: as spoil_data, with tracebacks."""
    os.environ["LIDAR_CAMERA_DEBUG"] = "1"
    spoil_data(module, words)


def test_a_finished_run_is_not_changed(folders, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folders.whole("finetune"), out)
    before = files(out)
    code, output = folders.again("finetune", out)
    after = files(out)
    assert code == 0 and "steps 4 to 4" in output
    for name in ("last.pt", "previous.pt", "backbones.safetensors", "log.jsonl", "metrics.json"):
        assert after[name] == before[name], name
    # A quarter of the steps warms up from a third, then half a cosine over the other three.
    rates = [row["lr"] for row in log_rows(out)]
    lr = config("finetune", "", "").lr
    np.testing.assert_allclose(rates, [lr / 3, lr, lr * 3 / 4, lr / 4], atol=1e-7)


# ---- 4, 18: checkpoints that are cut, empty, foreign or hostile ----------------------

class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def saved_bytes(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def spoil(checkpoint, how, marker):
    """The bytes of a bad checkpoint in place of a good one's. marker: the bomb's file."""
    if how == "empty":
        return b""
    if how == "cut":
        return checkpoint[:len(checkpoint) * 2 // 3]
    if how == "zeros":
        return bytes(len(checkpoint))
    if how == "a pickle that runs a command":
        return saved_bytes(dict(step=3, config="{}", model=Bomb(marker), optimizers=[]))
    assert how == "another program's"
    return saved_bytes({"epoch": 3, "model_state": {"w": torch.ones(2)}})


@pytest.mark.parametrize("how", [
    "empty", "cut", "zeros", "a pickle that runs a command", "another program's"])
def test_a_bad_checkpoint_falls_back_to_previous_pt(folders, tmp_path, how):
    out = folders.begun("finetune", tmp_path)
    checkpoint = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(spoil(checkpoint, how, tmp_path / "ran"))
    code, output = folders.again("finetune", out)
    assert code == 0 and "last.pt: not a readable checkpoint" in output, output
    assert "Going on from previous.pt, step 2." in output, output
    assert folders.same("finetune", out)
    assert (out / "unreadable.pt").exists() and not (tmp_path / "ran").exists()


def test_two_bad_checkpoints_are_an_error_and_not_a_new_start(folders, tmp_path):
    out = folders.begun("finetune", tmp_path)
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes((out / name).read_bytes()[:1000])
    before = files(out)
    code, output = folders.again("finetune", out)
    assert code == 1 and output.count("not a readable checkpoint") == 2, output
    assert "1000 bytes" in output and "give another --out" in output, output
    assert files(out) == before


# ---- 5: no room ----------------------------------------------------------------------

def fill_disk(module, limit):
    """Fault: no file may grow beyond so many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def fill_log(module, _):
    """Fault: the device of the log is full."""
    init = common.Run.__init__

    def init_with_a_full_log(self, *words):
        init(self, *words)
        self.file = open("/dev/full", "w")
    common.Run.__init__ = init_with_a_full_log


@pytest.mark.parametrize("fault, message", [
    (fill_disk, "last.pt: could not be written ("),
    (fill_log, "log.jsonl: step 3 could not be written (No space left on device)"),
])
def test_a_full_disk_ends_the_run_and_spares_the_checkpoints(folders, tmp_path, fault, message):
    out = folders.begun("finetune", tmp_path)
    before = files(out)
    others = (out / "backbones.safetensors", *ROOT.glob("*.py"))
    most = max(path.stat().st_size for path in others)
    assert most < len(before["last.pt"])
    code, output = folders.again("finetune", out, fault, most + 4096)
    assert code == 1 and message in output, output
    assert "the same command goes on from the last checkpoint" in output, output
    after = files(out)
    assert after["last.pt"] == before["last.pt"] and after["previous.pt"] == before["previous.pt"]
    assert not [name for name in after if name.endswith(".part")]
    code, output = folders.again("finetune", out)
    assert code == 0 and folders.same("finetune", out), output


def test_an_out_folder_that_cannot_be_made_is_named(three_frames, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    message = (f"--out {out}: cannot write there .Not a directory.; "
               "give a folder that can be written")
    with pytest.raises(SystemExit, match=message):
        finetune.train(0, 1, config("finetune", three_frames, out))


# ---- 6: numbers that are not finite --------------------------------------------------

def poison(module, where):
    """Fault: in the second step from here on, the loss or the gradient is not finite."""
    model = {"clap": "CLAP", "finetune": "Detector"}[module.__name__]
    model = getattr(module, model)
    forward = model.forward
    steps = itertools.count(1)

    def spoiled(self, *words):
        loss, terms = forward(self, *words)
        if self.training and next(steps) == 2:
            if where == "gradient":
                next(self.parameters()).register_hook(lambda g: g * float("inf"))
            else:
                loss = loss * float("nan")
        return loss, terms
    model.forward = spoiled


@pytest.mark.parametrize("script, where, terms", [
    ("clap", "loss", "loss, grad_norm not finite"),
    ("finetune", "loss", "loss, grad_norm not finite"),
    ("finetune", "gradient", "grad_norm not finite"),
])
def test_nan_ends_the_run_before_the_update(folders, tmp_path, script, where, terms):
    out = tmp_path / "run"
    code, output = folders.again(script, out, poison, where)
    message = f"FloatingPointError: step 1, rank 0: {terms} on nuscenes/"
    assert code == 1 and message in output and "Traceback" not in output, output
    assert "nothing was updated, the last checkpoint stands" in output, output
    assert step_of(out / "last.pt") == 1 and steps_logged(out) == [0]


def test_a_run_that_broke_its_weights_saves_nothing_and_fails(folders, tmp_path):
    """At the last step, too, after which no loss would show it."""
    out = folders.begun("finetune", tmp_path)
    before = files(out)
    code, output = folders.again("finetune", out, break_weights, STEPS)
    assert code == 1 and "of the model are not finite, first " in output, output
    after = files(out)
    for name in ("last.pt", "previous.pt", "backbones.safetensors"):
        assert after[name] == before[name], name


@pytest.mark.parametrize("script", RUNS)
def test_each_script_saves_with_the_function_that_looks_at_the_weights(script):
    module = importlib.import_module(script)
    assert module.save is common.save
    assert (ROOT / f"{script}.py").read_text().count(" save(cfg, step + 1, model, ") == 1


@pytest.mark.parametrize("script", ["simipu", "cmcr"])
def test_each_method_logs_its_gradient_norm_before_the_update(script):
    """Run refuses a norm that is not finite."""
    source = (ROOT / f"{script}.py").read_text()
    loop = source.split("in run.batches(loader, first):")[1]
    assert loop.index("norm = ") < loop.index("grad_norm=norm") < loop.index(".step()")


@pytest.mark.parametrize("script", ["finetune", "clap"])
def test_a_learning_rate_of_1e20_ends_the_run(folders, tmp_path, script):
    code, output = folders.again(script, tmp_path / "run", lr=1e20, steps=30)
    assert code == 1 and "not finite on nuscenes/" in output, output


# ---- flags that make no sense ---------------------------------------------------------

VALUES = dict(int=(-1, 0, 10**9), float=(-1.0, 0.0, 1e9, float("nan"), float("inf"), 1e-30))
ENDLESS = {"epochs", "steps", "profile"}    # 10^9 of these is a run that one may ask for


def swept(script):
    """(field, value) for each number of a script's Config and each value of VALUES."""
    for field in fields(importlib.import_module(script).Config):
        kind = "int" if "int" in str(field.type) else getattr(field.type, "__name__", "")
        for value in VALUES.get(kind, ()):
            yield field.name, value


def check_of(script):
    module = importlib.import_module(script)
    return module.check if script in ("clap", "cmcr", "simipu") else module.check_flags


def accepts(check, cfg):
    try:
        check(cfg)
    except SystemExit as refusal:
        assert isinstance(refusal.code, str) and refusal.code.startswith("--"), refusal.code
        return False
    return True


@pytest.mark.parametrize("script", RUNS)
def test_each_number_of_each_script_is_checked_before_anything_is_written(script):
    """nan, inf and negative numbers are refused everywhere, and so are enormous counts."""
    check = check_of(script)
    assert accepts(check, config(script, "", ""))
    for name, value in swept(script):
        accepted = accepts(check, config(script, "", "", **{name: value}))
        if not 0 <= value < float("inf"):
            assert not accepted, (name, value)
        if isinstance(value, int) and value > 1 and name not in common.LONG:
            assert not accepted, (name, value)


def accepted_values(script):
    """What the check lets through, but runs without an end."""
    check = check_of(script)
    return [(name, value) for name, value in swept(script)
            if (value < 10**9 or name not in ENDLESS)
            and accepts(check, config(script, "", "", **{name: value}))]


def one_step(cfg):
    return replace(cfg, epochs=0, steps=1, profile=min(cfg.profile, 1))


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_a_strange_number_gives_one_line_or_a_run(server, three_frames, tmp_path, script):
    for name, value in accepted_values(script):
        cfg = one_step(config(script, three_frames, tmp_path / "run", **{name: value}))
        code, output = run(server, script, cfg)
        assert code in (0, 1) and "Traceback" not in output, (name, value, output)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("script, name, value", [
    ("finetune", "weight_decay", 1e9), ("finetune", "warmup", 10**9), ("simipu", "w_inter", 1e9),
    ("cmcr", "tau", 1e-30), ("finetune", "workers", -1),
])
def test_a_few_strange_numbers_give_one_line_or_a_run(
        server, three_frames, tmp_path, script, name, value):
    out = tmp_path / "run"
    code, output = run(server, script,
                       one_step(config(script, three_frames, out, **{name: value})))
    assert code in (0, 1) and "Traceback" not in output, output
    if name == "workers":
        assert code == 1 and output.splitlines() == [
            "--workers -1: expected a whole number from 0 to 256"]
        assert not out.exists()


# ---- 10, 12: one process has nothing, the other everything ---------------------------

def test_fine_tuning_on_two_processes_matches_one(server, three_frames, tmp_path):
    """Loss and gradient of two frames at once, and of one on each process.

    In every second case one frame has neither point nor box. In the last two batch norm trains:
    there the last bit of the weights changes some gradients by 1 to 5 %, since ReLUs switch.
    """
    dataset = data.open_dataset(three_frames, "small")
    frames = [dataset.load(i) for i in range(2)]
    bare = replace(frames[1], points=frames[1].points[:0], boxes=frames[1].boxes[:0],
                   labels=frames[1].labels[:0])
    torch.manual_seed(0)
    model = finetune.Detector(config("finetune", three_frames, ""), dataset.grid)
    pairs = (frames, [frames[0], bare])
    together = [data.collate(pair, [0, 1]) for pair in pairs]
    apart = [[data.collate([frame], [n]) for n, frame in enumerate(pair)] for pair in pairs]
    models = [copy.deepcopy(model).train(training) for training in (False, True) for _ in pairs]
    cases = [(copy.deepcopy(one), batches) for one, batches in zip(models, 2 * apart, strict=True)]
    parts = on_two(server, a_frame_each, tmp_path, cases)
    for one, joined, (loss, _, gradient), (other, _, same) in zip(models, 2 * together, *parts):
        whole, _ = one(joined)
        whole.backward()
        torch.testing.assert_close((loss + other) / 2, whole.detach(), rtol=1e-5, atol=1e-6)
        tiny = 1e-6 * max(float(p.grad.abs().max()) for p in one.parameters())
        apart_2 = 0.0  # squared distance of all gradients
        for name, p in one.named_parameters():
            assert torch.equal(gradient[name], same[name]), name
            apart_2 += float((gradient[name] - p.grad).square().sum())
            if not one.training:
                torch.testing.assert_close(gradient[name], p.grad, rtol=1e-4, atol=tiny,
                                           msg=lambda text, name=name: f"{name}: {text}")
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]))
        assert apart_2 ** 0.5 < 0.03 * norm


def resumed(rank, folders):
    """What one of two processes resumes in its folder: a step, or the message that refuses it."""
    try:
        return common.resume(folders[rank], torch.nn.Linear(2, 2))
    except SystemExit as refusal:
        return str(refusal)


def test_processes_with_different_checkpoints_do_not_go_on(server, tmp_path):
    """They would train on different weights.

    Two nodes have no common folder, or the disk of one failed for a moment.
    """
    for name, step in (("a", 7), ("b", 5)):
        (tmp_path / name).mkdir()
        state = dict(step=step, config="{}", model=torch.nn.Linear(2, 2).state_dict(),
                     optimizers=[])
        torch.save(state, tmp_path / name / "last.pt")
    cases = {
        ("a", "a"): (7, 7),
        ("a", "b"): "step 5, some that of 7",
        ("b", "nowhere"): "step 0, some that of 5",
    }
    for folders, expected in cases.items():
        results = on_two(server, resumed, tmp_path, [str(tmp_path / name) for name in folders])
        (tmp_path / "meet").unlink(missing_ok=True)
        if expected == (7, 7):
            assert results == [7, 7]
        else:
            for message in results:
                assert expected in message and "they must all see one folder" in message, results


@pytest.mark.parametrize("method", [simipu, cmcr])
def test_contrast_goes_on_when_one_process_has_no_point(server, method, three_frames, tmp_path):
    """The loss stays finite, both processes end with the same gradient.

    Negatives are each process's own, so the loss is not that of the joined batch. Its mean is the
    loss of the full frame.
    """
    its_test = {simipu: test_simipu, cmcr: test_cmcr}[method]
    cfg = its_test.TINY
    dataset = data.open_dataset(three_frames, "small")
    rng = np.random.default_rng(0)
    frames = [dataset.load(i) for i in range(2)]
    full = its_test.VIEWS(frames[0], rng)
    bare = its_test.VIEWS(replace(frames[1], points=frames[1].points[:0]), rng)

    def new_model():
        if method is simipu:
            return simipu.SimIPU(cfg)
        return cmcr.CMCR(cfg, dataset.grid, False)

    torch.manual_seed(0)
    model = new_model()
    model.eval()
    apart = [data.collate([frame], [n]) for n, frame in enumerate((full, bare))]
    cases = [(copy.deepcopy(model), apart), (copy.deepcopy(model).train(), apart)]
    parts = on_two(server, a_frame_each, tmp_path, cases)
    for (loss, _, gradient), (other, _, same) in zip(*parts):
        assert loss.isfinite() and other.isfinite()
        for name, g in gradient.items():
            assert g.isfinite().all() and torch.equal(g, same[name])
    contrast = "L_intra" if method is simipu else "L_NCE"
    alone = new_model().eval()
    alone.load_state_dict(model.state_dict())
    mean = (parts[0][0][1][contrast] + parts[1][0][1][contrast]) / 2
    torch.testing.assert_close(mean, alone(apart[0])[1][contrast].detach())


# ---- 14, 24, 25: several processes ---------------------------------------------------

def join(module, words):
    """Fault, or its setting: this process is one of two and waits so long for the other."""
    rank, port, common.TIMEOUT = words
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_two(server, cfg, folder, timeout):
    """finetune.py on two processes of one job, their output in folder/0 and folder/1."""
    port = free_port()
    return [Run(server, "finetune", cfg, join, (rank, port, timeout), path=folder / str(rank))
            for rank in (0, 1)]


def test_a_hung_process_is_waited_for_only_until_the_timeout(server, three_frames, tmp_path):
    cfg = config("finetune", three_frames, tmp_path / "run", steps=5000)
    one, two = run_two(server, cfg, tmp_path, timeout=4)
    try:
        one.until_step_1()
        os.kill(two.process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        code, output = one.end(30)
    finally:
        two.process.kill()
        two.process.join()
    assert code == 1 and time.monotonic() - begun < 15 and "imed out" in output, output


def join_without_data(module, words):
    """Fault: one of two processes, of which rank 1 finds a broken frame in its second step."""
    join(module, words)
    if words[0] == 1:
        spoil_data(module, (1, "broken", 100))


def test_a_process_without_data_ends_the_job_saved(server, three_frames, tmp_path):
    port = free_port()
    cfg = config("finetune", three_frames, tmp_path / "run", steps=1000, save_every=1000)
    both = [Run(server, "finetune", cfg, join_without_data, (rank, port, 100),
                path=tmp_path / str(rank)) for rank in (0, 1)]
    (code, output), (other_code, other) = [one.end() for one in both]
    assert code == 143 and "no data for the next step, saved after step 1" in output, output
    assert other_code == 1 and other.splitlines()[-1] == "nuscenes/a/b: broken, repair it", other
    assert step_of(tmp_path / "run" / "last.pt") == 1


@pytest.mark.slow    # torch's launcher gives what is left 30 seconds
def test_a_hung_process_ends_the_job_even_if_the_port_is_taken(three_frames, tmp_path):
    """Rank 1 is stopped, not dead. Torch's usual port is taken by another program.

    Rank 0 waits LIDAR_CAMERA_TIMEOUT seconds, then the launcher ends both.
    """
    command = [sys.executable, str(ROOT / "finetune.py"), "--data", str(three_frames),
               "--out", str(tmp_path / "run"), "--steps", "5000", "--gpus", "2"]
    for key, value in RUNS["finetune"].items():
        if key not in ("gpus", "steps"):
            command += [f"--{key.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIDAR_CAMERA_TIMEOUT": "4",
                   "MASTER_PORT": "29500"}
    with socket.socket() as other:
        with contextlib.suppress(OSError):    # taken already, which is as good
            other.bind(("127.0.0.1", 29500))
            other.listen()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, env=environment, start_new_session=True)
        try:
            assert any(line.startswith("step ") for line in process.stdout)
            ranks = ranks_of(process.pid)
            os.kill(ranks["1"], signal.SIGSTOP)
            rest, _ = process.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    message = "rank 0 of 2 left with exit code 1 (RuntimeError"
    assert process.returncode == 1 and message in rest.splitlines()[-1], rest[-3000:]
    assert "imed out" in rest, rest[-3000:]
    assert not Path(f"/proc/{ranks['1']}").exists()


def test_more_gpus_than_are_visible_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    message = r"--gpus 2: this machine shows 1 \(CUDA_VISIBLE_DEVICES=3\)"
    with pytest.raises(SystemExit, match=message):
        common.launch(None, clap.Config(gpus=2))
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--gpus 1: no CUDA device is visible; --gpus 0"):
            common.launch(None, clap.Config(gpus=1))


def end_job(rank, folder, port, asked):
    """One of two processes: a collective, then the end of a run.

    Either an end that takes rank 0 until the other has left, or, if asked to stop, rank 0's save.
    """
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
def test_rank_0_may_finish_alone_but_its_save_is_waited_for(server, tmp_path, asked):
    port = free_port()
    both = [server.Process(target=end_job, args=(rank, tmp_path, port, asked)) for rank in (0, 1)]
    for process in both:
        process.start()
    both[1].join(90)
    assert (tmp_path / "done").exists() == asked
    (tmp_path / "other has left").touch()
    both[0].join(90)
    assert [process.exitcode for process in both] == [143 if asked else 0] * 2
    assert (tmp_path / "done").exists()


def test_two_processes_score_every_frame_once(server, world, tmp_path, capsys):
    """Three val frames on two processes. One process alone predicts the same."""
    out = tmp_path / "run"
    both = run_two(server, config("finetune", world, out, steps=2), tmp_path, timeout=100)
    for code, output in [one.end() for one in both]:
        assert code == 0, output
    first = files(out)
    assert json.loads(first["metrics.json"])["frames"] == 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cfg = replace(finetune.Config(), eval_only=str(out), gpus=0, workers=0)
    finetune.train(0, 1, cfg)
    torch.set_num_threads(threads)
    assert "the weights after step 2" in capsys.readouterr().out
    again = files(out)
    assert again["results_nusc.json"] == first["results_nusc.json"]
    assert again["metrics.json"] == first["metrics.json"]


# ---- 16: resumed with another configuration, or other data ---------------------------

@pytest.mark.parametrize("script, listed", [("clap", "frames.txt"), ("finetune", "labels.txt")])
def test_resume_refuses_other_frames(folders, tmp_path, script, listed):
    out = folders.begun(script, tmp_path)
    names = (out / listed).read_text()
    (out / listed).write_text("nuscenes/gone/1\n" + names)
    before = files(out)
    code, output = folders.again(script, out)
    assert code == 1 and f"{listed}: this run began with" in output, output
    assert "0 of them new, 1 gone (nuscenes/gone/1, ...)" in output, output
    after = files(out)
    assert all(after[name] == before[name] for name in ("last.pt", listed))


@pytest.mark.parametrize("more, difference", [
    (dict(width=8), "width was 4, is 8"),
    (dict(lr=5e-4), "lr was 0.001, is 0.0005"),
    (dict(steps=6), "steps was 4, is 6"),
    (dict(seed=1), "seed was 0, is 1"),
])
def test_resume_refuses_flags_that_change_the_result(folders, tmp_path, more, difference):
    out = folders.begun("finetune", tmp_path)
    before = files(out)
    (out / "config.json").unlink()    # the checkpoint knows it too
    code, output = folders.again("finetune", out, None, None, **more)
    message = f"{out} holds a run with another configuration: {difference}. Repeat its command"
    assert code == 1 and message in output, output
    assert files(out) == {k: v for k, v in before.items() if k != "config.json"}


def test_resume_allows_new_logging_flags(folders, three_frames, tmp_path):
    """Another folder, fewer checkpoints, other workers: none of them changes the result."""
    out = folders.begun("finetune", tmp_path)
    moved = out.rename(tmp_path / "elsewhere")
    code, output = folders.again("finetune", moved, None, None, save_every=3, workers=1)
    assert code == 0 and folders.same("finetune", moved), output


def test_resume_takes_the_same_data_elsewhere_and_refuses_other_data(
        folders, server, three_frames, tmp_path):
    out = folders.begun("finetune", tmp_path)
    moved = Path(shutil.copytree(three_frames, tmp_path / "moved", copy_function=shutil.copyfile))
    pictures = {path: path.read_bytes() for path in moved.glob("samples/CAM_FRONT/*.jpg")}
    one, other = list(pictures.values())[:2]
    for path in pictures:
        path.write_bytes(other if pictures[path] == one else one)
    cfg = config("finetune", moved, out)
    code, output = run(server, "finetune", cfg, path=tmp_path / "1")
    assert code == 1 and "the data set has changed since the run began" in output, output
    assert "parts that are compared, first samples/CAM_FRONT/" in output, output
    for path, picture in pictures.items():
        path.write_bytes(picture)
    code, output = run(server, "finetune", cfg, path=tmp_path / "2")
    assert code == 0 and folders.same("finetune", out), output
    assert json.loads((out / "config.json").read_text())["data"] == str(moved)


def test_eval_only_says_which_checkpoint_and_which_data_it_takes(
        folders, three_frames, tmp_path, monkeypatch, capsys):
    out = folders.begun("finetune", tmp_path)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    stored = json.loads((out / "data.json").read_text())
    (out / "data.json").write_text(json.dumps({**stored, "val": ["nuscenes/gone/1"]}))
    monkeypatch.setattr(finetune, "finish", lambda *_: None)
    cfg = replace(finetune.Config(), eval_only=str(out), gpus=0, workers=0)
    finetune.train(0, 1, cfg)
    printed = capsys.readouterr().out
    assert "last.pt: not a readable checkpoint of this program" in printed
    assert "Going on from previous.pt, step 2." in printed
    assert f"{out}: the weights after step 2" in printed
    assert "scored on other data than the run's: val: this run began with 1 frames" in printed
    assert (out / "last.pt").stat().st_size == 1000    # to score changes no checkpoint

    whole = json.loads((out / "config.json").read_text())
    for name, value, message in (("width", 8, "width is 8, in the checkpoint it is 4; put"),
                                 ("modality", "camera", "modality is .camera., in the check"),
                                 ("width", "4", "width is '4', expected something like 16")):
        (out / "config.json").write_text(json.dumps({**whole, name: value}))
        with pytest.raises(SystemExit, match=message) as refusal:
            finetune.train(0, 1, cfg)
        assert "\n" not in str(refusal.value)


# ---- 20, 22, 23 ----------------------------------------------------------------------

def test_files_are_read_without_pickles():
    safe = {"np.load": "allow_pickle=False", "torch.load": "weights_only=True"}
    for script in ROOT.glob("*.py"):
        source = script.read_text()
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) in safe]
        assert len(loads) == sum(source.count(f"{function}(") for function in safe), script.name
        for call in loads:
            keywords = [ast.unparse(keyword) for keyword in call.keywords]
            assert safe[ast.unparse(call.func)] in keywords, (script.name, call.lineno)
        assert "pickle.load" not in source, script.name


def predictions(*changes):
    """Predictions of two frames, changed in the second."""
    def one_frame():
        boxes = np.ones((3, 9), np.float32)
        labels = np.zeros(3, np.int64)
        scores = np.full(3, 0.5, np.float32)
        return [boxes, labels, scores, np.eye(4)]
    frames = {"nuscenes/s/a": one_frame(), "nuscenes/s/b": one_frame()}
    for index, value in changes:
        frames["nuscenes/s/b"][index] = value
    return {name: tuple(parts) for name, parts in frames.items()}


def test_predictions_are_checked_before_they_are_scored():
    names = ["nuscenes/s/a", "nuscenes/s/b"]
    good = predictions()
    first = good[names[0]]
    finetune.check_predictions(good, names)

    nan_score = (2, np.array([0.5, np.nan, 0.4], np.float32))
    infinite_boxes = (0, np.full((3, 9), np.inf, np.float32))
    too_many = ((0, np.ones((501, 9))), (2, np.ones(501)))
    for wrong, error, message in (
        ({names[0]: first}, ValueError, "nuscenes/s/b: held out but not predicted"),
        ({**good, "nuscenes/s/c": first}, ValueError,
         "nuscenes/s/c: predicted but not held out"),
        (predictions(nan_score), FloatingPointError, "nuscenes/s/b: 3 boxes predicted, 1 of them"),
        (predictions(infinite_boxes), FloatingPointError,
         "3 of them with numbers that are not finite"),
        (predictions(*too_many), FloatingPointError, "501 boxes predicted.*at most 500"),
    ):
        with pytest.raises(error, match=message):
            finetune.check_predictions(wrong, names)


def test_broken_weights_are_not_scored_as_no_detections(three_frames):
    dataset = data.open_dataset(three_frames, "small")
    torch.manual_seed(0)
    model = finetune.Detector(config("finetune", three_frames, ""), dataset.grid)
    with torch.no_grad():
        next(model.shared.parameters()).fill_(float("nan"))
    loader = data.loader(dataset, "val", 1, 0, 1, 0)
    message = "nuscenes/.* boxes predicted.*the weights are broken"
    with pytest.raises(FloatingPointError, match=message):
        finetune.predict_all(model, loader, torch.device("cpu"))


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_a_run_folder_without_a_readable_configuration_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    message = "config.json: no readable configuration of a run .*give a folder"
    with pytest.raises(SystemExit, match=message):
        finetune.train(0, 1, replace(finetune.Config(), eval_only=str(tmp_path)))


def test_a_pretraining_run_is_not_scored_as_a_detector(folders):
    message = ("a run of pre-training, which has no detector; "
               "expected a folder that finetune.py wrote")
    with pytest.raises(SystemExit, match=message):
        finetune.train(0, 1, replace(finetune.Config(), eval_only=str(folders.whole("clap"))))


def test_the_configuration_of_a_run_is_stored(folders):
    out = folders.whole("finetune")
    stored = json.loads((out / "config.json").read_text())
    cfg = asdict(config("finetune", stored["data"], stored["out"]))
    assert stored == json.loads(json.dumps({**cfg, "world": 1}))
    assert json.loads(torch.load(out / "last.pt", weights_only=True)["config"]) == stored
    header, weights = common.read_units(out)[1:]
    assert header["units"] == "lidar,fuse,neck,shared,heads"
    assert {name.split(".")[0] for name in weights} == set(header["units"].split(","))
