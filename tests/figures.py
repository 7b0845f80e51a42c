"""Figures and held-out diagnostics of finished runs that a method's reader may skip. Loaded by the scripts through common.load_tool."""
from pathlib import Path

import numpy as np
import torch

from common import bird_eye, figure

# ---- SimIPU ---------------------------------------------------------------------------


@torch.no_grad()
def simipu_figures(model, batch, out):
    """figures/matches.png: the pairs of the first frame from above, and how far apart they are."""
    from matplotlib import colormaps

    from simipu import per_frame, transform_points
    model.eval()
    alpha, beta, T = model.views(batch)
    l_alpha, _, id_alpha = model.points(alpha, per_frame(batch, "first_alpha"))
    l_beta, _, row_beta = model.points(beta, per_frame(batch, "first_beta"))
    id_beta = per_frame(batch, "order").gather(1, row_beta)
    model.train()
    j = model.pair(transform_points(T, l_alpha), l_beta, id_alpha, id_beta)
    points = l_alpha[0].cpu()                               # (p, 3) m
    beta_in_alpha = transform_points(torch.linalg.inv(T), l_beta)[0]
    partners = beta_in_alpha[j[:len(points)]].cpu()         # (p, 3) m, where each was in view alpha
    distance = (points - partners).norm(dim=1)
    colours = colormaps["turbo"]((distance / 2).clamp(max=1).numpy())
    cloud_panel = bird_eye(alpha[0].cpu(), "0.8", 0.3)
    points_panel = bird_eye(points, colours, 4)

    def pairs_panel(ax):
        cloud_panel(ax)
        for a, b, colour in zip(points, partners, colours):
            ax.plot([-a[1], -b[1]], [a[0], b[0]], "-", color=colour, lw=1.2)
        points_panel(ax)

    def histogram_panel(ax):
        ax.hist(distance.clamp(max=5).numpy(), np.linspace(0, 5, 51))

    panels = [(f"{len(points)} pairs, blue 0 m to red 2 m or more", pairs_panel),
              ("m between partners, 5 or more in the last bin", histogram_panel)]
    figure(Path(out) / "figures" / "matches.png", panels, 2, (6.0, 6.0))
