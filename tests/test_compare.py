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


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Made-up rows of every learning rate and of five seeds: clap better than none by about 0.05, cmcr and an ablation of clap not."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    rng, rows = np.random.default_rng(0), []
    for init, best in (("none", 1e-3), ("clap", 4e-4), ("cmcr", 3e-3), ("clap_sdf", 4e-4)):
        rows += [dict(key=f"rate/{init}/{lr:g}", mAP=0.1, NDS=0.1 if lr == best else 0.05) for lr in compare.RATES if init not in compare.ABLATIONS]
        rows += [dict(key=f"finetune/{init}/0.05/fusion/{seed}", command=f"python finetune.py --lr {best:g} --out runs/x",
                      **{name: rng.normal(0.1 + 0.05 * (init == "clap"), 0.01) for name in ("mAP", "NDS", "mAP_reach")})
                 for seed in compare.SEEDS if (init, seed) not in (("cmcr", 4), ("clap_sdf", 3), ("clap_sdf", 4))]
    rows.append(rows[3] | dict(mAP=0.123))                          # a row that was run again: the newest counts
    (tmp_path / "compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["key"]: row for row in rows}


def test_the_table_is_the_paired_comparison(results, tmp_path, capsys):
    compare.table()
    table = (tmp_path / "compare.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    lines = {cells[3]: cells for cells in (re.split(r" *\| *", line.strip("| ")) for line in table.splitlines()) if cells[0] == "fusion"}
    assert [lines[init][4] for init in ("none", "clap", "cmcr", "clap_sdf")] == ["0.001", "0.0004", "0.003", "0.0004"]
    ours, ablations = (part.splitlines() for part in table.split("\n\n")[:2])
    assert "beyond `none`" in ours[0] and len(ours) == 5 and "beyond the whole method" in ablations[0] and len(ablations) == 3
    seeds, against = dict(cmcr=4, clap_sdf=3), dict(clap_sdf="clap")
    for init in lines:
        for n, name in enumerate(("mAP", "NDS", "mAP_reach")):
            mine, base = ([results[f"finetune/{of}/0.05/fusion/{seed}"][name] for seed in range(seeds.get(init, 5))]
                          for of in (init, against.get(init, "none")))
            assert lines[init][6 + n] == f"{np.mean(mine):.3f} ± {stats.tstd(mine):.3f}"
            if init != "none" and n < 2:
                low, high = stats.ttest_rel(mine, base).confidence_interval(0.95)
                assert lines[init][9 + n] == f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}", (init, name)
    assert "clap" in lines and float(lines["clap"][9].split(" ± ")[0]) > float(lines["clap"][9].split(" ± ")[1])


def test_a_row_brings_what_it_needs_and_all_is_planned_before_it(tmp_path):
    plan = compare.plan()
    needs, place = dict(plan), {key: n for n, (key, _) in enumerate(plan)}
    assert len(place) == len(plan)
    for key in place:
        assert all(place[before] < place[key] for before in compare.needed(key, needs)), key
    assert compare.needed("finetune/cmcr_no_codebook/0.05/lidar/2", needs) == {
        "pretrain/cmcr_no_codebook/2", "pretrain/cmcr/0", "rate/cmcr/0.0004", "rate/cmcr/0.001", "rate/cmcr/0.003"}
    assert compare.needed("finetune/none/0.2/fusion/1", needs) == {"rate/none/0.0004", "rate/none/0.001", "rate/none/0.003"}


def test_a_row_s_command_has_its_own_pre_training_and_the_chosen_rate(results, tmp_path):
    def flags(key):
        script, *rest = compare.command(key, results, tmp_path)[0]
        return script, dict(zip(rest[::2], rest[1::2]))
    script, asked = flags("finetune/clap/0.2/lidar/3")
    assert script == "finetune.py" and asked["--init"] == str(tmp_path / "pretrain_clap_3") and asked["--seed"] == "3"
    assert asked["--lr"] == asked["--lr-pretrained"] == "0.0004" and asked["--fraction"] == "0.2" and asked["--modality"] == "lidar" and "--steps" not in asked
    assert flags("longer/none/0.05/fusion/1")[1].items() >= {"--init": "none", "--steps": "240", "--lr": "0.001"}.items()
    _, asked = flags("rate/cmcr/0.003")
    assert asked["--init"] == str(tmp_path / "pretrain_cmcr_0") and asked["--seed"] == "9" and asked["--lr"] == "0.003"
    assert flags("pretrain/clap_sdf/2") == ("clap.py", {"--seed": "2", "--sampler": "sdf", "--out": str(tmp_path / "pretrain_clap_sdf_2")})


def test_whatever_ends_it_what_runs_is_asked_to_save_and_its_time_is_kept(results, tmp_path, monkeypatch):
    run = "import pathlib, signal, sys, time; signal.signal(15, lambda *_: (pathlib.Path(sys.argv[1] + '.saved').touch(), sys.exit(143)))\n" \
          "pathlib.Path(sys.argv[1] + '.begun').touch(); time.sleep(60)"
    monkeypatch.setattr(compare, "command", lambda key, rows, runs: (["-c", run, str(runs / key.replace("/", "_"))], runs / key.replace("/", "_")))
    monkeypatch.setattr(compare.data, "open_dataset", lambda root: None)
    sleep = time.sleep

    def interrupted(seconds):
        sleep(0.05)
        if len(list(tmp_path.glob("runs/*.begun"))) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(compare.time, "sleep", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        compare.work(2, None, None, tmp_path / "runs")
    signal.signal(signal.SIGTERM, before)
    assert {path.name for path in tmp_path.glob("runs/*.saved")} == {"pretrain_clap_0.saved", "pretrain_cmcr_0.saved"}
    assert len(list(tmp_path.glob("runs/*.seconds"))) == 2


def test_a_run_that_ends_becomes_a_row_and_one_that_fails_ends_it_all(results, tmp_path, monkeypatch):
    ends = "import json, pathlib, sys; out = pathlib.Path(sys.argv[1]); out.mkdir(); (out / 'metrics.json').write_text(json.dumps(dict(L_NCE=5.5, told='x')))\n" \
           "(out / 'provenance.json').write_text(json.dumps([dict(commit='a'), dict(commit='a'), dict(commit='b+')]))\n" \
           "(out / 'log.jsonl').write_text(''.join(json.dumps({'step': n, 'loss': 1, 'L_NCE': 7 - n}) + '\\n' for n in range(6)))"
    script = {"pretrain/cmcr/3": ends, "pretrain/cmcr/4": "import sys; print('no'); sys.exit(1)"}
    monkeypatch.setattr(compare, "command", lambda key, rows, runs: (["-c", script[key], str(runs / key.replace("/", "_"))], runs / key.replace("/", "_")))
    monkeypatch.setattr(compare.data, "open_dataset", lambda root: None)
    before = signal.getsignal(signal.SIGTERM)
    compare.work(1, None, "pretrain/cmcr/3", tmp_path / "runs")
    row = compare.done()["pretrain/cmcr/3"]
    assert row["commit"] == "a b+" and row["L_NCE"] == 5.5 and "told" not in row and row["command"].endswith("runs/pretrain_cmcr_3")
    assert [json.loads(line) for line in (tmp_path / "curves" / "cmcr_3.jsonl").read_text().splitlines()] == [{"step": n, "L_NCE": 7 - n} for n in (0, 4)]
    with pytest.raises(SystemExit, match="pretrain/cmcr/4: exit status 1; its output is in .*pretrain_cmcr_4.txt"):
        compare.work(1, None, "pretrain/cmcr/4", tmp_path / "runs")
    assert "pretrain/cmcr/4" not in compare.done() and (tmp_path / "runs/pretrain_cmcr_4.txt").read_text() == "no\n"
    signal.signal(signal.SIGTERM, before)


def test_a_row_s_pre_training_is_made_again_where_only_its_row_is_there(results, tmp_path, monkeypatch):
    ends = "import json, pathlib, sys; out, init = map(pathlib.Path, sys.argv[1:3]); assert out == init or (init / 'metrics.json').exists(); out.mkdir(exist_ok=True)\n" \
           "(out / 'metrics.json').write_text(json.dumps(dict(L=5)))\n(out / 'provenance.json').write_text('[]'); (out / 'log.jsonl').touch()"
    monkeypatch.setattr(compare, "command", lambda key, rows, runs: (["-c", ends, *(str(runs / k.replace("/", "_")) for k in (key, dict(compare.plan())[key] or key))],
                                                                     runs / key.replace("/", "_")))
    monkeypatch.setattr(compare.data, "open_dataset", lambda root: None)
    monkeypatch.setattr(compare.time, "sleep", lambda seconds, sleep=time.sleep: sleep(0.01))
    before, path = signal.getsignal(signal.SIGTERM), tmp_path / "compare.jsonl"
    path.write_text(path.read_text() + json.dumps(dict(key="pretrain/clap/3")) + "\n")
    for _ in range(2):                                              # the second time its folder is there
        compare.work(2, None, "finetune/clap/0.05/fusion/3", tmp_path / "runs")
        made = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert made.count("pretrain/clap/3") == 2 and made[-1] == "finetune/clap/0.05/fusion/3"
    signal.signal(signal.SIGTERM, before)


def test_figures_are_drawn_from_what_is_there(results, tmp_path):
    (tmp_path / "curves").mkdir()
    for seed in range(2):
        lines = [{"step": n, "L_intra": 3 - n / 9, "L_inter": 4.0, **({"val_L_intra": 3.0} if n % 4 == 0 else {})} for n in range(9)]
        (tmp_path / "curves" / f"simipu_{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare.figures(tmp_path / "no runs")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("label_efficiency.png", "curves.png")) and not (tmp_path / "bev.png").exists()
