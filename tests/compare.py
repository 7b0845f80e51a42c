"""The three methods and no pre-training under one trunk, one detector, one protocol, on the embedded world: rows of tests/results/compare.jsonl.

    python tests/compare.py                     # every row that is missing, in order; stop it whenever you like and give the same command again
    python tests/compare.py --minutes 60        # the same, but what is not done after an hour is saved and left for the next time
    python tests/compare.py --only finetune/clap/0.05/fusion/0     # this row (and what it needs), also when it is there already
    python tests/compare.py --table             # means, deviations and paired differences of the rows that are there; compare.md
    python tests/compare.py --figures           # label_efficiency.png, curves.png; bev.png where seed 0's run folders are

Protocol. Each seed has a pre-training run of its own (`python METHOD.py --seed S`, all defaults of the small preset), a label draw and initial weights of its own. Every
fine-tuning run has the same 60 steps of two frames; `longer` ones 240, which tells a head start from a gain that stays (three seeds, the inits that gain). The learning
rate is chosen for each init, `none` included, by NDS (half of which is mAP, near zero where little is found) on a spare seed (9, from the pre-training of seed 0) from
the same three values, at 60 steps and 5 % of the labels, fusion. Ablations have three seeds. A row: key, command, the commits that ran it, device, seconds, scores
(nuscenes-devkit's).
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import finetune  # noqa: E402
from common import figure, resume  # noqa: E402

RESULTS = ROOT / "tests" / "results"
METHODS, SEEDS, FRACTIONS, RATES, SPARE = ("clap", "cmcr", "simipu"), range(5), (0.05, 0.2), (4e-4, 1e-3, 3e-3), 9
LONGER = 240                                                        # steps of the rows called so, four times the others
SHOWN = 0.2                                                         # least score of a box in bev.png
ABLATIONS = {   # name: method, flags, the modality that it can change
    "clap_uniform": ("clap", ("--sampler", "uniform"), "fusion"), "clap_sdf": ("clap", ("--sampler", "sdf"), "fusion"),
    "clap_no_prototypes": ("clap", ("--without", "prototypes"), "fusion"), "simipu_greedy": ("simipu", ("--match", "greedy"), "camera"),
    **{f"cmcr_no_{part}": ("cmcr", ("--without", part), "lidar") for part in ("replacement", "codebook", "specific")}}


def plan():
    """Every row in the order in which it is wanted -> [(key, key of what it needs or None)].

    Keys: pretrain/NAME/SEED, rate/INIT/LR, finetune/INIT/FRACTION/MODALITY/SEED, longer/ likewise.
    """
    rows = []

    def add(init, fraction, modality, seed, kind="finetune"):
        rows.append((f"{kind}/{init}/{fraction:g}/{modality}/{seed}", None if init == "none" else f"pretrain/{init}/{seed}"))
    for seed in SEEDS:
        rows += [(f"pretrain/{method}/{seed}", None) for method in METHODS]
        if seed == 0:
            rows += [(f"rate/{init}/{lr:g}", None if init == "none" else f"pretrain/{init}/0") for init, lr in product(("none", *METHODS), RATES)]
        for init in ("none", *METHODS):
            add(init, FRACTIONS[0], "fusion", seed)
    for seed in SEEDS:
        for init in ("none", *METHODS):
            add(init, FRACTIONS[1], "fusion", seed)
        for modality, inits in (("lidar", ("none", "clap", "cmcr")), ("camera", ("none", "clap", "simipu"))):
            for init in inits:
                add(init, FRACTIONS[0], modality, seed)
    for seed, (name, (_, _, modality)) in product(range(3), ABLATIONS.items()):
        rows.append((f"pretrain/{name}/{seed}", None))
        add(name, FRACTIONS[0], modality, seed)
    for init, seed in product(("none", "clap", "cmcr"), range(3)):         # SimIPU gains nothing that could stay
        add(init, FRACTIONS[0], "fusion", seed, "longer")
    return rows


def done():
    """{key: row} of what is there, the newest of each."""
    path = RESULTS / "compare.jsonl"
    return {row["key"]: row for row in map(json.loads, path.read_text().splitlines() if path.exists() else ())}


def best_rate(init, rows):
    """The learning rate of an init: that of the spare seed's best NDS. An ablation takes its method's. None while one of the three is missing."""
    init = ABLATIONS[init][0] if init in ABLATIONS else init
    scores = [(rows[key]["NDS"], lr) for lr in RATES if (key := f"rate/{init}/{lr:g}") in rows]
    return max(scores)[1] if len(scores) == len(RATES) else None


def command(key, rows, runs):
    """-> argv of a row's run and its folder."""
    kind, name, *rest = key.split("/")
    out = runs / key.replace("/", "_")
    if kind == "pretrain":
        method, flags = ABLATIONS[name][:2] if name in ABLATIONS else (name, ())
        return [f"{method}.py", "--seed", rest[0], *flags, "--out", str(out)], out
    fraction, modality, seed = rest if kind != "rate" else (f"{FRACTIONS[0]:g}", "fusion", str(SPARE))
    lr = best_rate(name, rows) if kind != "rate" else float(rest[0])
    init = "none" if name == "none" else str(runs / f"pretrain_{name}_{seed if kind != 'rate' else 0}")
    steps = ["--steps", str(LONGER)] if kind == "longer" else []
    return ["finetune.py", *steps, "--preset", "small", "--init", init, "--fraction", fraction, "--modality", modality, "--seed", seed,
            "--lr", f"{lr:g}", "--lr-pretrained", f"{lr:g}", "--out", str(out)], out


def keep(key, argv, out, seconds, threads, runs):
    """Append the row of a finished run; of a pre-training run also its curve, every fourth step and the held-out terms."""
    found = json.loads((out / "metrics.json").read_text())
    scores = {name: found[name] for name in ("mAP", "NDS", "mAP_reach")} if "NDS" in found else {k: v for k, v in found.items() if isinstance(v, (int, float))}
    told = " ".join(["python", *argv]).replace(str(runs) + os.sep, "runs/")
    commits = dict.fromkeys(start["commit"] for start in json.loads((out / "provenance.json").read_text()))
    row = dict(key=key, command=told, commit=" ".join(commits), device=f"cpu, {threads} threads", seconds=round(seconds), **scores)
    with open(RESULTS / "compare.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    if key.startswith("pretrain/"):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        kept = [{k: float(f"{v:.4g}") if k != "step" else v for k, v in line.items() if k == "step" or k.startswith(("L_", "val_L_"))}
                for line in lines if line["step"] % 4 == 0 or any(k.startswith("val_") for k in line)]
        (RESULTS / "curves").mkdir(exist_ok=True)
        (RESULTS / "curves" / f"{key.split('/')[1]}_{key.split('/')[2]}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    print(json.dumps(row), flush=True)


def needed(key, needs):
    """The rows that one row needs: its pre-training, and for its learning rate the three of the spare seed with theirs. -> set of keys."""
    first = {needs[key]} - {None}
    if key.startswith(("finetune/", "longer/")):
        name = key.split("/")[1]
        first |= {f"rate/{ABLATIONS[name][0] if name in ABLATIONS else name}/{lr:g}" for lr in RATES}
    return first.union(*(needed(k, needs) for k in first))


def stopped(out, since):
    """Leave beside a run's folder how long it took so far, for when it is taken up again. -> s."""
    seconds = time.monotonic() - since
    Path(f"{out}.seconds").write_text(f"{seconds:.0f}")
    return seconds


def work(jobs, minutes, only, runs):
    """Run what is missing, `jobs` at a time, each on its share of the cores."""
    rows, needs, begun = done(), dict(plan()), time.monotonic()
    running, threads = {}, max((os.cpu_count() or 1) // jobs, 1)
    wanted = needs if only is None else needed(only, needs) | {only}
    todo = []
    for key, first in needs.items():
        if key in wanted and (key not in rows or key == only):
            if first and first not in todo and not (command(first, rows, runs)[1] / "metrics.json").exists():
                todo.append(first)                                  # its row came from elsewhere
            todo.append(key)
    runs.mkdir(parents=True, exist_ok=True)
    data.open_dataset("")                                           # written once, before two processes want it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while (todo or running) and not (minutes and time.monotonic() - begun > 60 * minutes):
            for key, (process, argv, out, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                seconds = stopped(out, since)
                if process.returncode:
                    raise SystemExit(f"{key}: exit status {process.returncode}; its output is in {out}.txt")
                keep(key, argv, out, seconds, threads, runs)
                rows = done()
            ready = [key for key in todo if needed(key, needs) <= rows.keys() and needs[key] not in (*todo, *running)]
            if ready and len(running) < jobs:
                key = ready[0]
                todo.remove(key)                                    # a run that is there and finished is scored again, nothing more
                argv, out = command(key, rows, runs)
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
                spent = Path(f"{out}.seconds")
                since = time.monotonic() - (float(spent.read_text()) if spent.exists() else 0)
                process = subprocess.Popen([sys.executable, *argv, "--gpus", "0"], cwd=ROOT, env=environment, stdout=open(f"{out}.txt", "w"), stderr=subprocess.STDOUT)
                running[key] = process, argv, out, since
                continue
            time.sleep(1)
    finally:                                                        # whatever ends this, what runs is saved and goes on from there the next time
        for process, *_ in running.values():
            process.terminate()
        for process, _, out, since in running.values():
            process.wait()
            stopped(out, since)
    print(f"{len(todo) + len(running)} rows are left", flush=True)


def interval(values):
    """Mean of two or more and half of its 95 % interval (Student)."""
    n = len(values)
    return np.mean(values), stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n ** 0.5


def table():
    """compare.md: a line for each init, fraction, modality and length: mean, deviation, paired difference of the same seeds with its 95 % interval.

    The difference is to `none`, and for an ablation, in a second table, to its whole method.
    """
    rows = done()
    settings = {}
    for key, row in rows.items():
        if key.startswith(("finetune/", "longer/")):
            kind, init, fraction, modality, seed = key.split("/")
            settings.setdefault((modality, fraction, kind, init), {})[seed] = row
    order = {"none": 0, **{name: n for n, name in enumerate((*METHODS, *ABLATIONS), 1)}}
    lines = []
    for ablations, whole in ((False, "`none`"), (True, "the whole method")):
        lines += [f"| branches | labels | steps | init | lr | seeds | mAP | NDS | mAP within 25.6 m | mAP beyond {whole}, paired | NDS beyond {whole}, paired |",
                  "|---" * 11 + "|"]
        shown = [setting for setting in settings if (setting[3] in ABLATIONS) == ablations]
        for modality, fraction, kind, init in sorted(shown, key=lambda s: (s[0] != "fusion", s[0], float(s[1]), s[2], order[s[3]])):
            mine = settings[modality, fraction, kind, init]
            base = settings.get((modality, fraction, kind, ABLATIONS[init][0] if ablations else "none"), {})
            scores = [[row[name] for row in mine.values()] for name in ("mAP", "NDS", "mAP_reach")]
            cells = [f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") for v in scores]
            for name in ("mAP", "NDS"):
                gaps = [mine[seed][name] - base[seed][name] for seed in mine if seed in base]
                cells.append("" if init == "none" or len(gaps) < 2 else "{:+.3f} ± {:.3f}".format(*interval(gaps)))
            rates = {row["command"].split("--lr ")[1].split()[0] for row in mine.values()}
            steps = LONGER if kind == "longer" else finetune.SMALL["steps"]
            lines.append(f"| {modality} | {float(fraction):.0%} | {steps} | {init} | {' '.join(sorted(rates))} | {len(mine)} | {' | '.join(cells)} |")
        lines.append("")
    cost = {name: [row["seconds"] for key, row in rows.items() if key.startswith(f"pretrain/{name}/")] for name in (*METHODS, *ABLATIONS)}
    lines.append("Pre-training, minutes a run: " + ", ".join(f"{name} {np.median(seconds) / 60:.0f}" for name, seconds in cost.items() if seconds))
    (RESULTS / "compare.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def figures(runs):
    """label_efficiency.png (fusion), curves.png (held-out and training terms over the seeds as a band), bev.png."""
    rows = done()

    def efficiency(name):
        def plot(ax):
            for n, init in enumerate(("none", *METHODS)):
                found = {fraction: [row[name] for key, row in rows.items() if key.startswith(f"finetune/{init}/{fraction:g}/fusion/")] for fraction in FRACTIONS}
                found = {fraction: values for fraction, values in found.items() if values}
                x, mean, sd = [100 * f for f in found], *(np.array([of(v) for v in found.values()]) for of in (np.mean, lambda v: np.std(v, ddof=1) if len(v) > 1 else 0))
                ax.plot(x, mean, f"C{n}o-", label=f"{init} ({', '.join(str(len(v)) for v in found.values())} seeds)")
                ax.fill_between(x, mean - sd, mean + sd, color=f"C{n}", alpha=0.2)
            ax.set_xticks([100 * f for f in FRACTIONS], [f"{f:.0%} of labels" for f in FRACTIONS])
            ax.margins(x=0.2)
            ax.legend(fontsize=7)
        return plot
    figure(RESULTS / "label_efficiency.png", [(f"{name}, fusion, mean and standard deviation", efficiency(name)) for name in ("mAP", "NDS")], 2, (4.6, 3.4))

    panels = []
    for method, names in dict(clap=("L_range", "L_surface", "L_colour", "L_SwAV"), cmcr=("L_NCE", "L_rec", "L_occ", "L_orth"), simipu=("L_intra", "L_inter")).items():
        logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted((RESULTS / "curves").glob(f"{method}_[0-9].jsonl"))]
        for name in names if logs else ():
            def curve(ax, logs=logs, name=name):
                for key, colour in ((name, "C0"), ("val_" + name, "C3")):
                    both = [{row["step"]: row[key] for row in log if key in row} for log in logs]
                    steps = sorted(set.intersection(*(set(values) for values in both)))
                    values = np.array([[one[step] for step in steps] for one in both])
                    if key == name:                                 # single batches: a running median of nine
                        values = np.array([[np.median(one[max(i - 4, 0):i + 5]) for i in range(len(one))] for one in values])
                    ax.plot(steps, values.mean(0), colour, marker="." if key != name else "")
                    ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.25)
            panels.append((f"{method}: {name}, {len(logs)} seeds", curve))
    if panels:
        figure(RESULTS / "curves.png", panels, 4, (3.2, 2.2))
    folders = {init: runs / f"finetune_{init}_{FRACTIONS[0]:g}_fusion_0" for init in ("none", *METHODS)}
    if all((folder / "last.pt").is_file() for folder in folders.values()):
        birds_eyes(folders)
    else:
        print(f"bev.png left as it is: it wants the folders {', '.join(folder.name for folder in folders.values())} in {runs}")


def birds_eyes(folders):
    """bev.png: two held-out frames, at one and two thirds of the split, as the detector of seed 0 sees them from each init."""
    dataset, panels = data.open_dataset("", "small"), []
    held_out = dataset.split("val")
    frames = [dataset.load(int(held_out[n * len(held_out) // 3]), dataset.grid.image) for n in (1, 2)]
    for init, folder in folders.items():
        model = finetune.Detector(finetune.config_of(folder), dataset.grid)
        resume(folder, model)
        for frame, (boxes, _, scores) in zip(frames, model.eval().predict(data.collate(frames, [0, 1]))):
            shown = boxes[scores > SHOWN].numpy()
            panels.append((f"{init}: {len(shown)} boxes, score > {SHOWN}", partial(finetune.birds_eye, frame=frame, shown=shown, grid=dataset.grid)))
    figure(RESULTS / "bev.png", panels[::2] + panels[1::2], len(folders), (3.2, 3.2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many; 0: when all is done")
    parser.add_argument("--only", help="key of one row")
    parser.add_argument("--runs", type=Path, default=None, help="where run folders go; default the cache folder")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figures", action="store_true")
    asked = parser.parse_args()
    runs = asked.runs or data.cache_dir() / "compare"
    if asked.only and asked.only not in dict(plan()):
        parser.error(f"no row {asked.only}; there are {', '.join(key for key, _ in plan()[:30])}, ...")
    if asked.table or asked.figures:
        return [job() for job, wanted in ((table, asked.table), (lambda: figures(runs), asked.figures)) if wanted]
    return work(asked.jobs, asked.minutes, asked.only, runs)


if __name__ == "__main__":
    main()
