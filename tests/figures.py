"""Figures and val diagnostics of finished runs that a reader of the methods may skip.

The scripts load this file through common.load_tool at the end of a run.
"""
from functools import partial

import data
from common import figure


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
