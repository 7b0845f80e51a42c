"""What a method's reader may skip: figures and diagnostics of finished runs, on val frames.

The scripts load this file through common.load_tool at the end of a run.
"""
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from common import bird_eye, figure, frame_rngs, overlay


# ---- CLAP ----------------------------------------------------------------------------


@torch.no_grad()
def clap_diagnostics(model, batches, device):
    """What the volume knows of val frames: errors with the wrong cloud, and without any pixel.

    range_swapped: the same rays, rendered from the cloud of the other frame of a batch of two
    (in the embedded world often of the same scene) and their own images. range_all is over the
    same rays, with their own cloud. colour_blind: the pixels of `colour` with every pixel
    masked. colour_mean: one constant colour, their mean. Absolute errors, ranges in m, colours
    in [0, 1].
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
        rows, counts, direction, r = model.targets(batch)
        b = batch.b_points[rows]
        origin = batch.origin[b]

        # ranges: with each frame's own cloud, then with its neighbour's
        own = model.encode(batch, masked, masked_px)[0]
        r_own, _ = model.render(own, origin, direction, b, counts, rngs, colour=False)
        r_swapped = torch.full_like(r, math.nan)
        if batch.size > 1:
            swapped = replace(batch, b_points=(batch.b_points + 1) % batch.size)
            other = model.encode(swapped, masked, masked_px)[0]
            noise = frame_rngs(batch.seeds, device)
            r_swapped, _ = model.render(other, origin, direction, b, counts, noise, colour=False)
        ray_errors.append(torch.stack([(r - r_own).abs(), (r - r_swapped).abs()], 1))

        # colours: of the pixels of held_out_errors, with no pixel visible
        pixels = clap.val_pixels(model, own, batch, rngs)
        blind = model.encode(batch, masked, torch.ones_like(masked_px))[0]
        noise = frame_rngs(batch.seeds, device)
        c, c_blind = model.render_pixels(blind, batch, *pixels, noise)
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
        cell = model.shared_cells(lidar, seen, batch, masked, rngs)
        clap_prototypes(model, lidar, image, cell, folder)
    model.train()


def clap_samples(model, table, batch, rngs, folder):
    """Where sampling looks: weight and draw of points from above, of pixels in the images."""
    import clap
    cfg = model.cfg
    rows, counts, _, _ = model.targets(batch)
    xyz = batch.points[rows, :3]
    b = batch.b_points[rows]
    omega = model.sampling_weights(table, batch, rows, counts, cfg.sampler)
    maps = model.pixel_maps(omega, xyz, counts, batch, cfg.sampler).cpu()
    drawn = clap.draw_points(omega, counts, cfg.rays, rngs)
    view, v, u, positive = clap.draw_pixels(maps.to(omega), cfg.pixels, rngs)

    first = b == 0
    top = float(omega[first].quantile(0.99))
    points = xyz[drawn[b[drawn] == 0]].cpu()
    weights = bird_eye(xyz[first].cpu(), omega[first].cpu(), cmap="viridis", vmax=top)
    panels = [(f"{cfg.sampler} weight of every point", weights),
              (f"{len(points)} points drawn", bird_eye(points, "C3"))]
    figure(folder / "samples.png", panels, 2, (5.0, 5.0))

    panels = []
    for k in range(min(batch.cameras, 3)):
        uv = torch.stack([u, v], 1)[positive & (view == k)].cpu()
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
    """Codes as colours: of points from above and in images, of cells; how often each is used."""
    from cmcr import mask_cells
    K, codes = batch.cameras, model.cfg.codes
    style = dict(cmap="gist_rainbow", vmin=0, vmax=codes)
    # neighbouring codes get unlike colours
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
        on_image = image == k
        pale = batch.images[k].permute(1, 2, 0).cpu() // 2 + 100
        colour = shuffled[point_codes[point[on_image].cpu()]]
        panels += [
            (f"image {k}: codes of its points", overlay(pale, uv[on_image].cpu(), colour, **style)),
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
    # Waymo's other lasers stand elsewhere
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

    title = ("occupied? against metres behind the ray's point; up to 30 rays in grey, "
             f"mean of {len(rows)} in blue")
    figure(path, [(title, plot)], 1, (6.0, 4.0))


def occupied_along_ray(model, xyz, Z_3D, origin, n, along):
    """Mean probability of "occupied" at places along the ray of point n -> (len(along),).

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
    occupied = model.occupancy(torch.cat([Z, offset], 1))[:, 0].sigmoid().cpu().numpy()
    count = np.bincount(place, minlength=len(along))
    mean = np.bincount(place, occupied, len(along)) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)


# ---- SimIPU ---------------------------------------------------------------------------


@torch.no_grad()
def simipu_figures(model, batch, out):
    """figures/matches.png: the pairs of the first frame from above, and how far apart they are."""
    from matplotlib import colormaps

    from simipu import per_frame, transform_points
    model.eval()
    alpha, beta, T = model.views(batch)
    first = [per_frame(batch, "first_alpha"), per_frame(batch, "first_beta")]
    (l_alpha, l_beta), _, (id_alpha, row_beta) = model.points([alpha, beta], first)
    id_beta = per_frame(batch, "order").gather(1, row_beta)
    j = next(model.start_pairing(transform_points(T, l_alpha), l_beta, id_alpha, id_beta))
    model.train()
    points = l_alpha[0].cpu()                               # (p, 3) m
    beta_in_alpha = transform_points(torch.linalg.inv(T), l_beta)[0]
    partners = beta_in_alpha.cpu()[j]                     # (p, 3) m, where each was in view alpha
    distance = (points - partners).norm(dim=1)
    colours = colormaps["turbo"]((distance / 2).clamp(max=1).numpy())
    cloud_panel = bird_eye(alpha[0].cpu(), "0.8", 0.3)
    points_panel = bird_eye(points, colours, 4)

    def pairs_panel(ax):
        cloud_panel(ax)
        for a, b, colour in zip(points, partners, colours):
            # as in bird_eye: x up, y to the left
            ax.plot([-a[1], -b[1]], [a[0], b[0]], "-", color=colour, lw=1.2)
        points_panel(ax)

    def histogram_panel(ax):
        ax.hist(distance.clamp(max=5).numpy(), np.linspace(0, 5, 51))

    panels = [(f"{len(points)} pairs, blue 0 m to red 2 m or more", pairs_panel),
              ("m between partners, 5 or more in the last bin", histogram_panel)]
    figure(Path(out) / "figures" / "matches.png", panels, 2, (6.0, 6.0))


# ---- finetune ------------------------------------------------------------------------

EDGES = (  # of data.box_corners: along z, y, x
    (0, 1), (2, 3), (4, 5), (6, 7),
    (0, 2), (1, 3), (4, 6), (5, 7),
    (0, 4), (1, 5), (2, 6), (3, 7),
)


def boxes_in_image(ax, frame, shown, camera=0):
    """The image of a camera with the frame's boxes green and shown (n, 9) red, whole ones only."""
    image = frame.images[camera].transpose(1, 2, 0)
    matrix = frame.lidar2img[camera]
    ax.imshow(image)
    for boxes, colour in ((frame.boxes, "C2"), (shown, "C3")):
        for box in boxes:
            uvd = data.box_corners(box) @ matrix[:3, :3].T + matrix[:3, 3]  # (8, 3)
            if (uvd[:, 2] > 0.5).all():
                uv = uvd[:, :2] / uvd[:, 2:]
                for a, b in EDGES:
                    ax.plot(uv[[a, b], 0], uv[[a, b], 1], colour, lw=0.7)
    ax.set_xlim(0, image.shape[1])
    ax.set_ylim(image.shape[0], 0)
    ax.axis("off")


def finetune_figures(shown, grid, out):
    """figures/images.png of the first camera. shown [(frame, boxes (n, 9))]."""
    panels = []
    for frame, boxes in shown:
        draw = partial(boxes_in_image, frame=frame, shown=boxes)
        panels.append((grid.cameras[0], draw))
    figure(out / "figures" / "images.png", panels, 2, (6.0, 2.4))


def precision_recall(curves, present, out):
    """figures/precision_recall.png of every class present, from nuscenes-devkit's curves."""
    def panel(ax, name):
        for distance in (0.5, 1.0, 2.0, 4.0):
            curve = curves[name, distance]
            ax.plot(curve.recall, curve.precision, label=f"{distance:g} m")
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.legend(fontsize=6)
    panels = [(f"{name}: precision over recall", partial(panel, name=name)) for name in present]
    figure(out / "figures" / "precision_recall.png", panels, 4, (2.6, 2.2))


# ---- segmentation --------------------------------------------------------------------

def segment_figures(shown, confusion, classes, out):
    """figures/segmentation.png and figures/confusion.png.

    shown [(name, xyz (n, 3), truth (n,) -1 for none, predicted (n,))], confusion (C, C) with
    rows of the truth, classes C names.
    """
    from matplotlib.colors import hsv_to_rgb
    n = np.arange(len(classes))
    colours = hsv_to_rgb(np.stack([n * 0.382 % 1, 1 - 0.35 * (n % 2), 0.9 - 0.3 * (n % 3 == 0)], 1))
    panels = []
    for name, xyz, truth, predicted in shown:
        rows = truth >= 0
        xyz, truth, predicted = xyz[rows], truth[rows], predicted[rows]
        wrong = truth != predicted
        red = np.where(wrong[:, None], (0.8, 0.1, 0.1), (0.8, 0.8, 0.8))
        legend = partial(class_names, classes=() if panels else classes, colours=colours)
        panels += [
            (f"{name.split('/', 1)[1][:24]}: truth", partial(near_points, xyz, colours[truth])),
            ("predicted", partial(near_points, xyz, colours[predicted])),
            (f"{wrong.mean():.0%} wrong (of all points), red", partial(near_points, xyz, red)),
            ("", legend),
        ]
    figure(out / "figures" / "segmentation.png", panels, 4, (3.6, 3.6))
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    title = "% of the points of each class (row) by prediction (column)"
    panel = partial(confusion_matrix, classes=classes, share=share)
    figure(out / "figures" / "confusion.png", [(title, panel)], 1, (8.0, 8.0))


def near_points(xyz, colours, ax):
    """Points within 40 m from above. xyz (n, 3), colours (n, 3)."""
    bird_eye(xyz, colours, 4.0, lw=0)(ax)
    ax.set_xlim(-40, 40)
    ax.set_ylim(-40, 40)


def class_names(ax, classes, colours):
    """The name of each class in its colour."""
    for n, name in enumerate(classes):
        ax.text(0, 1 - (n + 1) / 23, name, color=colours[n], fontsize=8, weight="bold")
    ax.axis("off")


def confusion_matrix(ax, classes, share):
    """A matrix of shares (C, C), those of 1 % and more in numbers."""
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(share >= 0.01):
        value = share[row, column]
        ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                color="w" if value > 0.5 else "k")
    ax.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    ax.set_yticks(range(len(classes)), classes, fontsize=7)
    ax.figure.subplots_adjust(left=0.2, bottom=0.2)


# ---- depth ---------------------------------------------------------------------------

@torch.no_grad()
def depth_figure(model, depth_points, decode, val_loader, device, out):
    """figures/depth.png: pictures of four val frames, found and true depth at the points, error.

    depth_points, decode: of depth.py. A frame's picture is its first that shows a point.
    """
    panels = []
    indices = data.spread(val_loader.indices, 4)
    for batch in data.loader(val_loader.dataset, "val", 1, indices=indices).once():
        batch = batch.to(device)
        image, uv, depth = depth_points(batch)
        if not len(image):
            continue
        own = image == image[0]
        predicted = decode(model.logits(batch, image[own], uv[own]))
        height, width = batch.hw[image[0]].tolist()
        picture = batch.images[image[0], :, :height, :width].permute(1, 2, 0).cpu().numpy()
        scene = batch.names[0].split("/", 1)[1][:20]
        panels.append((f"{scene}, {val_loader.grid.cameras[image[0]]}", picture))
        ratio = (predicted / depth[own]).log()
        columns = (
            ("predicted depth, red 1 m to blue 80 m", predicted.log(), "turbo_r", (0, 4.4)),
            ("true depth", depth[own].log(), "turbo_r", (0, 4.4)),
            ("predicted / true, blue 0.5 to red 2", ratio, "coolwarm", (-0.7, 0.7)),
        )
        for title, colour, cmap, (low, high) in columns:
            panels.append((title, overlay(picture // 4, uv[own].cpu(), colour.cpu(), 3.0,
                                          cmap=cmap, vmin=low, vmax=high)))
    if panels:
        figure(Path(out) / "figures" / "depth.png", panels, 4, (4.0, 1.9))
