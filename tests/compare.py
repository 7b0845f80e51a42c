"""The three methods and no pre-training: one trunk, one detector, one protocol.

    python tests/compare.py                # every missing row, in order
    python tests/compare.py --minutes 60   # the same; the rest waits for the next time
    python tests/compare.py --only finetune/clap/0.05/fusion/0    # run this row (again)
    python tests/compare.py --table        # compare.md
    python tests/compare.py --figures      # label_efficiency.png, curves.png, bev.png

All on the embedded world. Rows go to tests/results/compare.jsonl. Stop it whenever
you like: runs are saved, and the same command goes on. --only also runs what its row
needs. compare.md has means, deviations and paired differences of the rows so far.
bev.png needs the run folders of seed 0.

Protocol. Each seed has its own pre-training run (`python METHOD.py --seed S`, all
defaults of the small preset), its own label draw and its own initial weights. Every
fine-tuning run takes the same 60 steps of two frames. The `longer` ones take 240,
which tells a head start from a gain that stays (three seeds, the inits that gain).
The learning rate is chosen for each init, `none` included, by NDS on a spare seed (9,
from the pre-training of seed 0), from the same three values, at 60 steps and 5 % of
the labels, fusion. Half of NDS is mAP, which is near zero where little is found.
Ablations have three seeds. A row holds its key, its command, the commits that ran it,
the device, the seconds, and the scores of nuscenes-devkit.
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
METHODS = ("clap", "cmcr", "simipu")
INITS = ("none", *METHODS)
SEEDS = range(5)
FRACTIONS = (0.05, 0.2)            # of the labels
RATES = (4e-4, 1e-3, 3e-3)         # learning rates that are tried
SPARE = 9                          # the seed on which they are tried
LONGER = 240                       # steps of the rows called so, four times the others
SCORE_SHOWN = 0.2                  # least score of a box in bev.png
ABLATIONS = {                      # name: method, flags, the modality that it can change
    "clap_uniform": ("clap", ("--sampler", "uniform"), "fusion"),
    "clap_sdf": ("clap", ("--sampler", "sdf"), "fusion"),
    "clap_no_prototypes": ("clap", ("--without", "prototypes"), "fusion"),
    "simipu_greedy": ("simipu", ("--match", "greedy"), "camera"),
    "cmcr_no_replacement": ("cmcr", ("--without", "replacement"), "lidar"),
    "cmcr_no_codebook": ("cmcr", ("--without", "codebook"), "lidar"),
    "cmcr_no_specific": ("cmcr", ("--without", "specific"), "lidar"),
}


# ---- the rows ------------------------------------------------------------------------

def plan():
    """Every row in the order in which they are run -> [(key, key of what it needs or None)].

    Keys: pretrain/NAME/SEED, rate/INIT/LR, finetune/INIT/FRACTION/MODALITY/SEED, and
    longer/ likewise.
    """
    rows = []

    def pretraining(init, seed):
        return None if init == "none" else f"pretrain/{init}/{seed}"

    def add(init, fraction, modality, seed, kind="finetune"):
        key = f"{kind}/{init}/{fraction:g}/{modality}/{seed}"
        rows.append((key, pretraining(init, seed)))

    few, more = FRACTIONS
    for seed in SEEDS:
        rows += [(f"pretrain/{method}/{seed}", None) for method in METHODS]
        if seed == 0:
            rows += [(f"rate/{init}/{lr:g}", pretraining(init, 0))
                     for init, lr in product(INITS, RATES)]
        for init in INITS:
            add(init, few, "fusion", seed)
    for seed in SEEDS:
        for init in INITS:
            add(init, more, "fusion", seed)
        for init in ("none", "clap", "cmcr"):
            add(init, few, "lidar", seed)
        for init in ("none", "clap", "simipu"):
            add(init, few, "camera", seed)
    for seed, (name, (_, _, modality)) in product(range(3), ABLATIONS.items()):
        rows.append((f"pretrain/{name}/{seed}", None))
        add(name, few, modality, seed)
    # SimIPU gains nothing that could stay.
    for init, seed in product(("none", "clap", "cmcr"), range(3)):
        add(init, few, "fusion", seed, "longer")
    return rows


def read_lines(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def done():
    """{key: row} of the rows that have been run, the newest of each."""
    path = RESULTS / "compare.jsonl"
    return {row["key"]: row for row in (read_lines(path) if path.exists() else ())}


def whole_method(init):
    """The method that an init belongs to: an ablation's, or itself."""
    return ABLATIONS[init][0] if init in ABLATIONS else init


def best_rate(init, rows):
    """The learning rate of an init: the one with the best NDS on the spare seed.

    An ablation takes its method's. None while one of the three is missing.
    """
    init = whole_method(init)
    scores = [(rows[key]["NDS"], lr) for lr in RATES if (key := f"rate/{init}/{lr:g}") in rows]
    return max(scores)[1] if len(scores) == len(RATES) else None


def command(key, rows, runs):
    """-> the arguments of a row's run, and its folder."""
    kind, name, *rest = key.split("/")
    out = runs / key.replace("/", "_")
    if kind == "pretrain":
        flags = ABLATIONS[name][1] if name in ABLATIONS else ()
        return [f"{whole_method(name)}.py", "--seed", rest[0], *flags, "--out", str(out)], out

    if kind == "rate":
        fraction, modality, seed = f"{FRACTIONS[0]:g}", "fusion", str(SPARE)
        lr = float(rest[0])
        of_seed = 0
    else:
        fraction, modality, seed = rest
        lr = best_rate(name, rows)
        of_seed = seed
    init = "none" if name == "none" else str(runs / f"pretrain_{name}_{of_seed}")
    steps = ["--steps", str(LONGER)] if kind == "longer" else []
    return ["finetune.py", *steps, "--preset", "small", "--init", init, "--fraction", fraction,
            "--modality", modality, "--seed", seed, "--lr", f"{lr:g}",
            "--lr-pretrained", f"{lr:g}", "--out", str(out)], out


def append_row(key, argv, out, seconds, threads, runs):
    """Append the row of a finished run. A pre-training run's curve is stored too."""
    metrics = json.loads((out / "metrics.json").read_text())
    if "NDS" in metrics:
        scores = {name: metrics[name] for name in ("mAP", "NDS", "mAP_reach")}
    else:
        scores = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    line = " ".join(["python", *argv]).replace(str(runs) + os.sep, "runs/")
    starts = json.loads((out / "provenance.json").read_text())
    commits = dict.fromkeys(start["commit"] for start in starts)
    row = dict(key=key, command=line, commit=" ".join(commits), device=f"cpu, {threads} threads",
               seconds=round(seconds), **scores)
    with open(RESULTS / "compare.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    if key.startswith("pretrain/"):
        write_curve(key, out)
    print(json.dumps(row), flush=True)


def write_curve(key, out):
    """The losses of a pre-training run: of every fourth step, and all on val frames."""
    curve = []
    for line in read_lines(out / "log.jsonl"):
        if line["step"] % 4 == 0 or any(k.startswith("val_") for k in line):
            losses = {k: float(f"{v:.4g}") for k, v in line.items()
                      if k.startswith(("L_", "val_L_"))}
            curve.append({"step": line["step"], **losses})
    _, name, seed = key.split("/")
    (RESULTS / "curves").mkdir(exist_ok=True)
    path = RESULTS / "curves" / f"{name}_{seed}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in curve))


def needed(key, needs):
    """The keys of the rows that one row needs. -> set

    Its pre-training, and for its learning rate the three of the spare seed with theirs.
    """
    first = {needs[key]} - {None}
    if key.startswith(("finetune/", "longer/")):
        init = whole_method(key.split("/")[1])
        first |= {f"rate/{init}/{lr:g}" for lr in RATES}
    return first.union(*(needed(k, needs) for k in first))


# ---- running them --------------------------------------------------------------------

def store_seconds(out, since):
    """Write next to a run's folder how long it has taken, for when it goes on. -> s"""
    seconds = time.monotonic() - since
    Path(f"{out}.seconds").write_text(f"{seconds:.0f}")
    return seconds


def missing_rows(only, rows, needs, runs):
    """The keys that have to be run, in order."""
    asked = needs if only is None else needed(only, needs) | {only}
    todo = []
    for key, first in needs.items():
        if key in asked and (key not in rows or key == only):
            if first and first not in todo:
                folder = command(first, rows, runs)[1]
                if not (folder / "metrics.json").exists():    # its row came from elsewhere
                    todo.append(first)
            todo.append(key)
    return todo


def start_run(argv, out, threads):
    """-> the process of a run, and when it would have begun had it never been stopped."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads),
                   "OMP_WAIT_POLICY": "PASSIVE"}
    spent = Path(f"{out}.seconds")
    since = time.monotonic() - (float(spent.read_text()) if spent.exists() else 0)
    process = subprocess.Popen([sys.executable, *argv, "--gpus", "0"], cwd=ROOT, env=environment,
                               stdout=open(f"{out}.txt", "w"), stderr=subprocess.STDOUT)
    return process, since


def work(jobs, minutes, only, runs):
    """Run what is missing, `jobs` at a time, each on its share of the cores."""
    rows = done()
    needs = dict(plan())
    begun = time.monotonic()
    running = {}                                  # key: process, argv, folder, when it began
    threads = max((os.cpu_count() or 1) // jobs, 1)
    todo = missing_rows(only, rows, needs, runs)
    runs.mkdir(parents=True, exist_ok=True)
    data.open_dataset("")                         # written once, before two processes ask for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while (todo or running) and not (minutes and time.monotonic() - begun > 60 * minutes):
            for key, (process, argv, out, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                seconds = store_seconds(out, since)
                if process.returncode:
                    raise SystemExit(f"{key}: exit status {process.returncode}; "
                                     f"its output is in {out}.txt")
                append_row(key, argv, out, seconds, threads, runs)
                rows = done()
            ready = [key for key in todo if needed(key, needs) <= rows.keys()
                     and needs[key] not in (*todo, *running)]
            if ready and len(running) < jobs:
                key = ready[0]
                todo.remove(key)                  # a run that has finished is only scored again
                argv, out = command(key, rows, runs)
                process, since = start_run(argv, out, threads)
                running[key] = process, argv, out, since
                continue
            time.sleep(1)
    finally:    # however this ends, the runs save and go on from there the next time
        for process, *_ in running.values():
            process.terminate()
        for process, _, out, since in running.values():
            process.wait()
            store_seconds(out, since)
    print(f"{len(todo) + len(running)} rows are left", flush=True)


# ---- the table -----------------------------------------------------------------------

def interval(values):
    """Mean of two or more values, and half of its 95 % interval (Student)."""
    n = len(values)
    return np.mean(values), stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n ** 0.5


def table():
    """compare.md: a line for each init, fraction, modality and length.

    Mean, standard deviation, and the paired difference of the same seeds with its 95 %
    interval. The difference is to `none`; for an ablation, in a second table, it is to
    its whole method.
    """
    rows = done()
    settings = {}                                 # {(modality, fraction, kind, init): {seed: row}}
    for key, row in rows.items():
        if key.startswith(("finetune/", "longer/")):
            kind, init, fraction, modality, seed = key.split("/")
            settings.setdefault((modality, fraction, kind, init), {})[seed] = row

    lines = table_of(settings, "`none`", [s for s in settings if s[3] not in ABLATIONS])
    lines += table_of(settings, "the whole method", [s for s in settings if s[3] in ABLATIONS])
    minutes = []
    for name in (*METHODS, *ABLATIONS):
        seconds = [row["seconds"] for key, row in rows.items()
                   if key.startswith(f"pretrain/{name}/")]
        if seconds:
            minutes.append(f"{name} {np.median(seconds) / 60:.0f}")
    lines.append("Pre-training, minutes a run: " + ", ".join(minutes))
    (RESULTS / "compare.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def table_of(settings, base_name, shown):
    """The lines of one table. shown: the settings that are in it."""
    order = {name: n for n, name in enumerate((*INITS, *ABLATIONS))}

    def rank(setting):
        modality, fraction, kind, init = setting
        return modality != "fusion", modality, float(fraction), kind, order[init]

    lines = [f"| branches | labels | steps | init | lr | seeds | mAP | NDS | mAP within 25.6 m "
             f"| mAP beyond {base_name}, paired | NDS beyond {base_name}, paired |",
             "|---" * 11 + "|"]
    for modality, fraction, kind, init in sorted(shown, key=rank):
        own = settings[modality, fraction, kind, init]
        base_init = whole_method(init) if init in ABLATIONS else "none"
        base = settings.get((modality, fraction, kind, base_init), {})
        cells = []
        for name in ("mAP", "NDS", "mAP_reach"):
            scores = [row[name] for row in own.values()]
            deviation = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
            cells.append(f"{np.mean(scores):.3f}{deviation}")
        for name in ("mAP", "NDS"):
            gaps = [own[seed][name] - base[seed][name] for seed in own if seed in base]
            if init == "none" or len(gaps) < 2:
                cells.append("")
            else:
                cells.append("{:+.3f} ± {:.3f}".format(*interval(gaps)))
        rates = {row["command"].split("--lr ")[1].split()[0] for row in own.values()}
        steps = LONGER if kind == "longer" else finetune.SMALL["steps"]
        lines.append(f"| {modality} | {float(fraction):.0%} | {steps} | {init} "
                     f"| {' '.join(sorted(rates))} | {len(own)} | {' | '.join(cells)} |")
    return [*lines, ""]


# ---- the figures ---------------------------------------------------------------------

TERMS = dict(                                     # what curves.png shows of each method
    clap=("L_range", "L_surface", "L_colour", "L_SwAV"),
    cmcr=("L_NCE", "L_rec", "L_occ", "L_orth"),
    simipu=("L_intra", "L_inter"),
)


def figures(runs):
    """label_efficiency.png (fusion), curves.png, and bev.png where seed 0's runs are left."""
    rows = done()
    panels = [(f"{name}, fusion, mean and standard deviation",
               partial(draw_efficiency, rows=rows, name=name)) for name in ("mAP", "NDS")]
    figure(RESULTS / "label_efficiency.png", panels, 2, (4.6, 3.4))

    panels = []
    for method, names in TERMS.items():
        paths = sorted((RESULTS / "curves").glob(f"{method}_[0-9].jsonl"))
        logs = [read_lines(path) for path in paths]
        for name in names if logs else ():
            panels.append((f"{method}: {name}, {len(logs)} seeds",
                           partial(draw_curve, logs=logs, name=name)))
    if panels:
        figure(RESULTS / "curves.png", panels, 4, (3.2, 2.2))

    folders = {init: runs / f"finetune_{init}_{FRACTIONS[0]:g}_fusion_0" for init in INITS}
    if all((folder / "last.pt").is_file() for folder in folders.values()):
        draw_boxes(folders)
    else:
        names = ", ".join(folder.name for folder in folders.values())
        print(f"bev.png is left as it is: it needs the folders {names} in {runs}")


def draw_efficiency(ax, rows, name):
    """A score over the share of labels: mean and deviation of the seeds, by init."""
    for n, init in enumerate(INITS):
        scores = {}                               # {fraction: of each seed}
        for fraction in FRACTIONS:
            begin = f"finetune/{init}/{fraction:g}/fusion/"
            values = [row[name] for key, row in rows.items() if key.startswith(begin)]
            if values:
                scores[fraction] = values
        x = [100 * fraction for fraction in scores]
        mean = np.array([np.mean(v) for v in scores.values()])
        sd = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for v in scores.values()])
        seeds = ", ".join(str(len(v)) for v in scores.values())
        ax.plot(x, mean, f"C{n}o-", label=f"{init} ({seeds} seeds)")
        ax.fill_between(x, mean - sd, mean + sd, color=f"C{n}", alpha=0.2)
    ax.set_xticks([100 * f for f in FRACTIONS], [f"{f:.0%} of labels" for f in FRACTIONS])
    ax.margins(x=0.2)
    ax.legend(fontsize=7)


def draw_curve(ax, logs, name):
    """One loss over the steps, training and val: mean of the seeds, range as a band."""
    for key, colour in ((name, "C0"), ("val_" + name, "C3")):
        of_seeds = [{row["step"]: row[key] for row in log if key in row} for log in logs]
        steps = sorted(set.intersection(*(set(values) for values in of_seeds)))
        values = np.array([[of_seed[step] for step in steps] for of_seed in of_seeds])
        if key == name:                           # single batches: a running median of nine
            values = np.array([running_median(curve) for curve in values])
        ax.plot(steps, values.mean(0), colour, marker="." if key != name else "")
        ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.25)


def running_median(values):
    """Median of the nine values around each, fewer at the ends."""
    return [np.median(values[max(i - 4, 0):i + 5]) for i in range(len(values))]


def draw_boxes(folders):
    """bev.png: two val frames as the detector of seed 0 sees them from each init.

    The frames stand at one and at two thirds of the split.
    """
    dataset = data.open_dataset("", "small")
    val = dataset.split("val")
    frames = [dataset.load(int(val[n * len(val) // 3]), dataset.grid.image) for n in (1, 2)]
    upper, lower = [], []                         # a row for each frame
    for init, folder in folders.items():
        model = finetune.Detector(finetune.config_of(folder), dataset.grid)
        resume(folder, model)
        predictions = model.eval().predict(data.collate(frames, [0, 1]))
        for panels, frame, (boxes, _, scores) in zip((upper, lower), frames, predictions):
            shown = boxes[scores > SCORE_SHOWN].numpy()
            draw = partial(finetune.birds_eye, frame=frame, shown=shown, grid=dataset.grid)
            panels.append((f"{init}: {len(shown)} boxes, score > {SCORE_SHOWN}", draw))
    figure(RESULTS / "bev.png", upper + lower, len(folders), (3.2, 3.2))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=0,
                        help="stop after so many minutes; 0: when all is done")
    parser.add_argument("--only", help="key of one row")
    parser.add_argument("--runs", type=Path, default=None,
                        help="where run folders go; default the cache folder")
    parser.add_argument("--table", action="store_true", help="write compare.md")
    parser.add_argument("--figures", action="store_true", help="draw the figures")
    args = parser.parse_args()
    runs = args.runs or data.cache_dir() / "compare"
    keys = [key for key, _ in plan()]
    if args.only and args.only not in keys:
        parser.error(f"there is no row {args.only}; there are {', '.join(keys[:30])}, ...")
    if args.table:
        table()
    if args.figures:
        figures(runs)
    if not args.table and not args.figures:
        work(args.jobs, args.minutes, args.only, runs)


if __name__ == "__main__":
    main()
