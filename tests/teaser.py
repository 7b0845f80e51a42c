"""The picture at the top of README.md, from a finished run: python tests/teaser.py runs/clap

A LiDAR sweep that was held out, the tenth of its points that CLAP is given, and the ranges that it
renders. tests/results/clap.png.
"""
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clap  # noqa: E402
import data  # noqa: E402
from common import figure, frame_rngs, resume, run_config  # noqa: E402


@torch.no_grad()
def main(run):
    stored = run_config(run)
    cfg = clap.Config(**{name: stored[name] for name in clap.Config.__dataclass_fields__
                         if name in stored})
    dataset = data.open_dataset(cfg.data, cfg.preset, labels=False)
    model = clap.CLAP(cfg, dataset.grid)
    resume(run, model)
    model.eval()
    loader = data.loader(dataset, "val", 1, seed=cfg.seed, prepare=clap.Curvature(cfg.neighbours),
                         indices=data.spread(dataset.split("val"), 1))
    batch, = loader.first(1)
    rngs = frame_rngs(batch.seeds, batch.points.device)
    masked, masked_px = model.draw_masks(batch, rngs)
    table = model.encode(batch, masked, masked_px)[0]
    rows, counts, direction, r = model.targets(batch)
    b = batch.b_points[rows]
    r_hat, _ = model.render(table, batch.origin[b], direction, b, counts, rngs, colour=False)
    visible = ~masked[rows]

    style = dict(cmap="turbo", vmin=0, vmax=float(r.max()), aspect="auto",
                 interpolation="nearest")
    every = torch.ones_like(visible)
    share = f"{visible.float().mean():.0%}"
    cases = [("a LiDAR sweep", r, every), (f"the {share} that CLAP sees", r, visible),
             ("what it renders", r_hat, every)]
    panels = [(title, clap.range_image(direction[which], ranges[which]), style)
              for title, ranges, which in cases]
    path = ROOT / "tests" / "results" / "clap.png"
    figure(path, panels, 3, (3.3, 1.6))
    error = (r_hat - r).abs()
    print(f"{path}: {batch.names[0]}, mean error {error[~visible].mean():.3f} m where masked, "
          f"{error[visible].mean():.3f} m where visible, {np.round(path.stat().st_size / 1000)} kB")


if __name__ == "__main__":
    main(sys.argv[1])
