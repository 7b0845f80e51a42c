"""compare.py: what a row needs and runs, and the table's statistics against scipy's paired test."""
import json
import os
import re
import signal
import time

import numpy as np
import pytest
from scipy import stats

import compare

SCORES = ("mAP", "NDS", "mAP_reach")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Made-up rows of every learning rate and of five seeds.

    CLAP is better than none by about 0.05. CMCR and an ablation of CLAP are not.
    """
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    rng = np.random.default_rng(0)
    missing = (("cmcr", 4), ("clap_sdf", 3), ("clap_sdf", 4))
    rows = []
    for init, best in (("none", 1e-3), ("clap", 4e-4), ("cmcr", 3e-3), ("clap_sdf", 4e-4)):
        for lr in compare.RATES if init not in compare.ABLATIONS else ():
            NDS = 0.1 if lr == best else 0.05
            rows.append(dict(key=f"rate/{init}/{lr:g}", mAP=0.1, NDS=NDS))
        for seed in compare.SEEDS:
            if (init, seed) not in missing:
                mean = 0.1 + 0.05 * (init == "clap")
                rows.append(dict(key=f"finetune/{init}/0.05/fusion/{seed}",
                                 command=f"python finetune.py --lr {best:g} --out runs/x",
                                 **{name: rng.normal(mean, 0.01) for name in SCORES}))
    rows.append(rows[3] | dict(mAP=0.123))    # a row that was run again: the newest counts
    (tmp_path / "compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["key"]: row for row in rows}


@pytest.fixture
def sigterm():
    """compare.work sets a handler of its own; the test's is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def folder_of(key, runs):
    return runs / key.replace("/", "_")


def replace_commands(monkeypatch, code, *arguments):
    """Let compare run Python code instead of each row's command.

    code(key) -> source, which gets the run's folder as its argument, and then arguments(key, runs).
    """
    def command(key, rows, runs):
        out = folder_of(key, runs)
        more = [str(argument(key, runs)) for argument in arguments]
        return ["-c", code(key), str(out), *more], out
    monkeypatch.setattr(compare, "command", command)
    monkeypatch.setattr(compare.data, "open_dataset", lambda root: None)


def test_table_matches_the_paired_t_test(results, tmp_path, capsys):
    compare.table()
    table = (tmp_path / "compare.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    cells = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines()]
    lines = {cell[3]: cell for cell in cells if cell[0] == "fusion"}
    rates = [lines[init][4] for init in ("none", "clap", "cmcr", "clap_sdf")]
    assert rates == ["0.001", "0.0004", "0.003", "0.0004"]
    methods, ablations = (part.splitlines() for part in table.split("\n\n")[:2])
    assert "beyond `none`" in methods[0] and len(methods) == 5
    assert "beyond the whole method" in ablations[0] and len(ablations) == 3

    seeds = dict(cmcr=4, clap_sdf=3)
    bases = dict(clap_sdf="clap")

    def scores(init, name, count):
        return [results[f"finetune/{init}/0.05/fusion/{seed}"][name] for seed in range(count)]

    for init in lines:
        for n, name in enumerate(SCORES):
            count = seeds.get(init, 5)
            own = scores(init, name, count)
            base = scores(bases.get(init, "none"), name, count)
            assert lines[init][6 + n] == f"{np.mean(own):.3f} ± {stats.tstd(own):.3f}"
            if init != "none" and n < 2:
                low, high = stats.ttest_rel(own, base).confidence_interval(0.95)
                expected = f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}"
                assert lines[init][9 + n] == expected, (init, name)
    gain, half_interval = lines["clap"][9].split(" ± ")
    assert "clap" in lines and float(gain) > float(half_interval)


def test_rows_are_planned_after_what_they_need(tmp_path):
    plan = compare.plan()
    needs = dict(plan)
    place = {key: n for n, (key, _) in enumerate(plan)}
    assert len(place) == len(plan)
    for key in place:
        assert all(place[before] < place[key] for before in compare.needed(key, needs)), key
    assert compare.needed("finetune/cmcr_no_codebook/0.05/lidar/2", needs) == {
        "pretrain/cmcr_no_codebook/2", "pretrain/cmcr/0",
        "rate/cmcr/0.0004", "rate/cmcr/0.001", "rate/cmcr/0.003"}
    assert compare.needed("finetune/none/0.2/fusion/1", needs) == {
        "rate/none/0.0004", "rate/none/0.001", "rate/none/0.003"}


def test_commands_have_the_init_of_their_seed_and_the_chosen_rate(results, tmp_path):
    def flags(key):
        script, *rest = compare.command(key, results, tmp_path)[0]
        return script, dict(zip(rest[::2], rest[1::2]))

    script, values = flags("finetune/clap/0.2/lidar/3")
    assert script == "finetune.py"
    assert values["--init"] == str(tmp_path / "pretrain_clap_3") and values["--seed"] == "3"
    assert values["--lr"] == values["--lr-pretrained"] == "0.0004"
    assert values["--fraction"] == "0.2" and values["--modality"] == "lidar"
    assert "--steps" not in values

    longer = {"--init": "none", "--steps": "240", "--lr": "0.001"}
    assert flags("longer/none/0.05/fusion/1")[1].items() >= longer.items()
    _, values = flags("rate/cmcr/0.003")
    assert values["--init"] == str(tmp_path / "pretrain_cmcr_0")
    assert values["--seed"] == "9" and values["--lr"] == "0.003"
    assert flags("pretrain/clap_sdf/2") == ("clap.py", {
        "--seed": "2", "--sampler": "sdf", "--out": str(tmp_path / "pretrain_clap_sdf_2")})


SAVES_WHEN_ASKED = """
import pathlib, signal, sys, time

def save(*_):
    pathlib.Path(sys.argv[1] + '.saved').touch()
    sys.exit(143)

signal.signal(15, save)
pathlib.Path(sys.argv[1] + '.begun').touch()
time.sleep(60)
"""


def test_sigterm_lets_runs_save_and_stores_their_seconds(results, tmp_path, monkeypatch, sigterm):
    replace_commands(monkeypatch, lambda key: SAVES_WHEN_ASKED)
    sleep = time.sleep

    def interrupted(seconds):
        sleep(0.05)
        if len(list(tmp_path.glob("runs/*.begun"))) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(compare.time, "sleep", interrupted)
    with pytest.raises(SystemExit, match="143"):
        compare.work(2, None, None, tmp_path / "runs")
    saved = {path.name for path in tmp_path.glob("runs/*.saved")}
    assert saved == {"pretrain_clap_0.saved", "pretrain_cmcr_0.saved"}
    assert len(list(tmp_path.glob("runs/*.seconds"))) == 2


FINISHES = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir()
(out / 'metrics.json').write_text(json.dumps(dict(L_NCE=5.5, note='x')))
starts = [dict(commit='a'), dict(commit='a'), dict(commit='b+')]
(out / 'provenance.json').write_text(json.dumps(starts))
steps = [{'step': n, 'loss': 1, 'L_NCE': 7 - n} for n in range(6)]
(out / 'log.jsonl').write_text(''.join(json.dumps(step) + '\\n' for step in steps))
"""


def test_a_finished_run_becomes_a_row_and_a_failed_one_stops_all(results, tmp_path, monkeypatch,
                                                                 sigterm):
    code = {"pretrain/cmcr/3": FINISHES, "pretrain/cmcr/4": "import sys; print('no'); sys.exit(1)"}
    replace_commands(monkeypatch, code.get)
    compare.work(1, None, "pretrain/cmcr/3", tmp_path / "runs")
    row = compare.done()["pretrain/cmcr/3"]
    assert row["commit"] == "a b+" and row["L_NCE"] == 5.5 and "note" not in row
    assert row["command"].endswith("runs/pretrain_cmcr_3")
    curve = (tmp_path / "curves" / "cmcr_3.jsonl").read_text().splitlines()
    expected = [{"step": n, "L_NCE": 7 - n} for n in (0, 4)]
    assert [json.loads(line) for line in curve] == expected

    message = "pretrain/cmcr/4: exit status 1; its output is in .*pretrain_cmcr_4.txt"
    with pytest.raises(SystemExit, match=message):
        compare.work(1, None, "pretrain/cmcr/4", tmp_path / "runs")
    assert "pretrain/cmcr/4" not in compare.done()
    assert (tmp_path / "runs/pretrain_cmcr_4.txt").read_text() == "no\n"


NEEDS_ITS_INIT = """
import json, pathlib, sys
out, init = map(pathlib.Path, sys.argv[1:3])
assert out == init or (init / 'metrics.json').exists()
out.mkdir(exist_ok=True)
(out / 'metrics.json').write_text(json.dumps(dict(L=5)))
(out / 'provenance.json').write_text('[]')
(out / 'log.jsonl').touch()
"""


def test_a_missing_pretraining_run_is_made_again(results, tmp_path, monkeypatch, sigterm):
    """Its row is in compare.jsonl, but the folder is not on this machine."""
    plan = dict(compare.plan())
    replace_commands(monkeypatch, lambda key: NEEDS_ITS_INIT,
                     lambda key, runs: folder_of(plan[key] or key, runs))
    sleep = time.sleep
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: sleep(0.01))
    path = tmp_path / "compare.jsonl"
    path.write_text(path.read_text() + json.dumps(dict(key="pretrain/clap/3")) + "\n")
    for _ in range(2):    # the second time its folder exists
        compare.work(2, None, "finetune/clap/0.05/fusion/3", tmp_path / "runs")
        made = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert made.count("pretrain/clap/3") == 2 and made[-1] == "finetune/clap/0.05/fusion/3"


def test_figures_are_drawn_from_the_rows_and_curves(results, tmp_path):
    (tmp_path / "curves").mkdir()
    for seed in range(2):
        lines = []
        for n in range(9):
            val = {"val_L_intra": 3.0} if n % 4 == 0 else {}
            lines.append({"step": n, "L_intra": 3 - n / 9, "L_inter": 4.0, **val})
        path = tmp_path / "curves" / f"simipu_{seed}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare.figures(tmp_path / "no runs")
    for name in ("label_efficiency.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert not (tmp_path / "bev.png").exists()
