"""Figures and val diagnostics of finished runs that a method's reader may skip.

Loaded by the scripts through common.load_tool.
"""
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import bird_eye, figure, frame_rngs, overlay

# ---- CLAP ----------------------------------------------------------------------------


@torch.no_grad()
def clap_diagnostics(model, batches, device):
    """What the volume knows of val frames: errors with the wrong cloud, and without any pixel.

    range_swapped: the same rays, rendered from another frame's cloud (the next of its batch, in
    the embedded world often one of the same scene). range_all is over the same rays, with their
    own cloud. colour_blind: the pixels of `colour` with every pixel masked. colour_mean: one
    constant colour, their mean. Absolute errors, ranges in m, colours in [0, 1].
    -> {name: float or None}
    """
    import clap
    model.eval()
    ray_errors = []
    pixel_errors = []
    for batch in batches:
        batch = batch.to(device)
        rngs = frame_rngs(batch.seeds, device)
        masked, masked_px = model.draw_masks(batch, rngs)
        rows, direction, r = model.targets(batch)
        b = batch.b_points[rows]
        origin = batch.origin[b]

        # ranges: with each frame's own cloud, then with its neighbour's
        own = model.encode(batch, masked, masked_px)[0]
        r_own, _, _ = model.render(own, origin, direction, b, rngs, colour=False)
        r_swapped = torch.full_like(r, math.nan)
        if batch.size > 1:
            swapped = replace(batch, b_points=(batch.b_points + 1) % batch.size)
            other = model.encode(swapped, masked, masked_px)[0]
            r_swapped, _, _ = model.render(other, origin, direction, b, rngs, colour=False)
        ray_errors.append(torch.stack([(r - r_own).abs(), (r - r_swapped).abs()], 1))

        # colours: of the pixels of held_out_errors, with no pixel visible
        view, v, u = clap.val_pixels(model, own, batch, rngs)
        blind = model.encode(batch, masked, torch.ones_like(masked_px))[0]
        noise = frame_rngs(batch.seeds, device)
        c, c_blind = model.render_pixels(blind, batch, view, v, u, noise)
        pixel_errors.append(torch.cat([(c - c_blind).abs().mean(1, keepdim=True), c], 1))
    model.train()

    error_own, error_swapped = torch.cat(ray_errors).cpu().double().unbind(1)
    both = error_swapped.isfinite()
    error_blind, c = torch.cat(pixel_errors).cpu().double().split([1, 3], 1)
    return clap.rounded(
        range_all=error_own[both].mean(),
        range_swapped=error_swapped[both].mean(),
        colour_blind=error_blind.mean(),
        colour_mean=(c - c.mean(0)).abs().mean())


@torch.no_grad()
def clap_figures(model, batch, out):
    """samples.png, sampled_pixels.png, prototypes.png of a val batch's first frame, masked.

    The points and pixels are those that a training step would draw from this batch.
    """
    model.eval()
    rngs = frame_rngs(batch.seeds, batch.points.device)
    masked, masked_px = model.draw_masks(batch, rngs)
    table, lidar, image, seen = model.encode(batch, masked, masked_px)
    folder = Path(out) / "figures"
    clap_samples(model, table, batch, rngs, folder)
    if model.proto is not None:
        visible = batch.points[~masked]
        b_visible = batch.b_points[~masked]
        cell = model.shared_cells(lidar, seen, visible, b_visible, rngs)
        clap_prototypes(model, lidar, image, cell, folder)
    model.train()


def clap_samples(model, table, batch, rngs, folder):
    """Where sampling looks: weight and draw of points from above, of pixels in the images."""
    import clap
    cfg = model.cfg
    rows, _, _ = model.targets(batch)
    xyz = batch.points[rows, :3]
    b = batch.b_points[rows]
    omega = model.sampling_weights(table, batch, rows, cfg.sampler)
    maps = model.pixel_maps(omega, xyz, b, batch, cfg.sampler).cpu()
    drawn = clap.draw_points(omega, b, cfg.rays, rngs)
    view, v, u = clap.draw_pixels(maps.to(omega), cfg.pixels, rngs)

    first = b == 0
    top = float(omega[first].quantile(0.99))
    points = xyz[drawn[b[drawn] == 0]].cpu()
    weights = bird_eye(xyz[first].cpu(), omega[first].cpu(), cmap="viridis", vmax=top)
    panels = [(f"{cfg.sampler} weight of every point", weights),
              (f"{len(points)} points drawn", bird_eye(points, "C3"))]
    figure(folder / "samples.png", panels, 2, (5.0, 5.0))

    panels = []
    for k in range(min(batch.cameras, 3)):
        uv = torch.stack([u, v], 1)[view == k].cpu()
        dots = overlay(maps[k], uv, "r")
        panels.append((f"camera {k}: blurred weight and pixels drawn", dots))
    figure(folder / "sampled_pixels.png", panels, 1, (9.0, 3.6))


def clap_prototypes(model, lidar, image, cell, folder):
    """The prototype of each cell of the first frame, by LiDAR and by image, from above."""
    cell = cell[lidar.coords[cell, 0] == 0]
    b, z, y, x = lidar.coords[cell].unbind(1)
    proto = model.proto
    embeddings = [("LiDAR", proto.head_lidar(lidar.features[cell])),
                  ("image", proto.head_image(image[b, :, z, y, x]))]
    centre = lidar.centre()[cell].cpu()
    colour = np.random.default_rng(0).permutation(len(proto.K))  # neighbouring numbers apart
    look = dict(cmap="gist_rainbow", vmin=0, vmax=len(proto.K))
    panels = []
    for name, embedding in embeddings:
        best = (F.normalize(embedding, dim=1) @ proto.K.t()).argmax(1).cpu()
        cells = bird_eye(centre, colour[best], 12, **look)
        panels.append((f"prototype of each cell, {name}", cells))
    figure(folder / "prototypes.png", panels, 2, (5.0, 5.0))
