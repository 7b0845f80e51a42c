"""Figures and diagnostics of finished runs on val frames that a method's reader may skip.

The scripts load this file through common.load_tool.
"""
from pathlib import Path

import numpy as np
import torch

from common import bird_eye, figure, frame_rngs, overlay

# ---- CMCR ----------------------------------------------------------------------------


def cmcr_figures(model, batch, out):
    """figures/codes.png and figures/occupancy.png of the first frame of a val batch."""
    model.eval()
    with torch.no_grad():
        F_3D, Z_3D, _ = model.points_3d(batch)
        if model.cfg.without != "codebook":
            cmcr_codes(model, batch, F_3D, Path(out) / "figures" / "codes.png")
        if (batch.b_points == 0).any():
            cmcr_occupancy(model, batch, Z_3D, Path(out) / "figures" / "occupancy.png")
    model.train()


def cmcr_codes(model, batch, F_3D, path):
    """Codes as colours: of the points from above and in the images, of the images' cells."""
    from cmcr import mask_cells
    K, codes = batch.cameras, model.cfg.codes
    style = dict(cmap="gist_rainbow", vmin=0, vmax=codes)
    shuffled = torch.as_tensor(np.random.default_rng(0).permutation(codes))
    rngs = frame_rngs(batch.seeds, batch.points.device)
    masked = mask_cells(K, model.cells, model.cfg, rngs)
    _, F_2D, _ = model.images_2d(batch.images, masked)
    point, image, uv, _ = model.pairs(batch)
    first = batch.b_points == 0
    point_codes = model.codebook.nearest(F_3D).cpu()                # (N,)
    cell_codes = model.codebook.nearest(F_2D).cpu()
    cell_codes = cell_codes.view(-1, *model.cells)[:K]              # (K, h, w)
    frame_codes = point_codes[first.cpu()]

    def histogram(ax):
        for n, ids in enumerate((frame_codes, cell_codes.flatten())):
            share = torch.bincount(ids, minlength=codes) / len(ids)
            ax.bar(np.arange(codes) + 0.4 * n, share, 0.4)

    panels = [
        ("codes of the points from above",
         bird_eye(batch.points[first].cpu(), shuffled[frame_codes], 0.6, **style)),
        ("how often each code is taken: points blue, cells orange", histogram),
    ]
    for k in range(min(K, 3)):
        pairs = image == k
        pale = batch.images[k].permute(1, 2, 0).cpu() // 2 + 100
        colour = shuffled[point_codes[point[pairs].cpu()]]
        panels += [
            (f"image {k}: codes of its points", overlay(pale, uv[pairs].cpu(), colour, **style)),
            ("codes of its cells, some masked", shuffled[cell_codes[k]].numpy(), style),
        ]
    figure(path, panels, 2, (5.0, 3.4))


def cmcr_occupancy(model, batch, Z_3D, path):
    """Probability of being occupied along rays, in metres behind each ray's own point."""
    first = batch.b_points == 0
    xyz = batch.points[first, :3].cpu().numpy()
    Z_3D = Z_3D[first]
    origin = batch.origin[0].cpu().numpy()
    along = np.linspace(-0.8, 0.8, 33)
    # Waymo's other lasers shot from elsewhere
    is_ray = batch.points[first, 4].cpu().numpy() == 0
    is_ray &= np.linalg.norm(xyz - origin, axis=1) > 0
    rows = np.random.default_rng(0).permutation(np.flatnonzero(is_ray))[:200]
    curves = [occupied_along_ray(model, xyz, Z_3D, origin, n, along) for n in rows]

    def plot(ax):
        for curve in curves[:30]:
            ax.plot(along, curve, color="0.8", lw=0.7)
        if curves:
            ax.plot(along, np.nanmean(curves, 0), "C0", lw=2)
        ax.axvline(0, color="0.4", ls="--")
        ax.set_ylim(0, 1)

    title = "occupied? against metres behind the ray's point; 30 rays in grey, mean of 200 in blue"
    figure(path, [(title, plot)], 1, (6.0, 4.0))


def occupied_along_ray(model, xyz, Z_3D, origin, n, along):
    """The mean over the points near each place on the ray of point n -> (len(along),).

    It is NaN where no point is near.
    """
    from cmcr import nearest_points
    cfg = model.cfg
    ray = xyz[n] - origin
    places = xyz[n] + along[:, None] * ray / np.linalg.norm(ray)    # (A, 3) m
    places = places.astype(np.float32)
    near = nearest_points(places, xyz, cfg.neighbours, cfg.query_radius)
    place, k = np.nonzero(near >= 0)
    point = near[place, k]
    offset = torch.as_tensor(places[place] - xyz[point], device=Z_3D.device)
    Z = Z_3D[torch.as_tensor(point, device=Z_3D.device)]
    chance = model.occupancy(torch.cat([Z, offset], 1))[:, 0].sigmoid().cpu().numpy()
    count = np.bincount(place, minlength=len(along))
    mean = np.bincount(place, chance, len(along)) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)
