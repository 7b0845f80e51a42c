"""Data sets as one record: a folder on disk -> Frame -> prepare (cached) -> augment -> Batch.

    python data.py /nuscenes      # the doctor: names what is wrong with these files, and the fix
    batches = loader("/nuscenes", "train", batch=4).begin_at(0)      # an endless iterator of Batch
    batches = loader("", "train", batch=2, preset="small").once()    # the embedded world, once

The sections follow a cloud on its way from the disk into a batch:

    record            Grid, Frame, Batch: what all code downstream sees
    augmentation      pure functions of a Frame
    open              open_dataset: the folder is recognised, its reader opened
    loader            the frames of a split, prepared, augmented and joined into batches

A method's reader may stop after the section "loader". The rest says how files become frames:

    files and caches  what may be read, where caches live, how frames are split
    camera images     decoding and resizing
    nuScenes, KITTI, Waymo    the readers, a comment on each quirk of a format
    doctor            python data.py ROOT

Frames hold numpy arrays, batches hold tensors. Tags: [devkit] nuscenes-devkit does the same;
[ours] our decision.
"""
import argparse
import fcntl
import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from time import monotonic, sleep, time as now
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.linalg import rq
from scipy.ndimage import distance_transform_edt
from scipy.spatial.transform import Rotation
from tqdm import tqdm

# OpenCV's threads do not survive the fork of a worker: resize would wait for them for ever
cv2.setNumThreads(0)

# a batch of so many frames is accepted whatever the size of the data set
LARGE_BATCH = 64

# Of everything cached: raise it when the index, or what load() returns for the same files, changes
VERSION = 4
INDEX_VERSION = 1            # of nuScenes' index alone
DIGEST_FRAMES = 32           # frames whose files a resumed run compares (file_digests)


class DataError(ValueError):
    """The files are not as they should be.

    The message says which file or frame, what was found, what was expected and what to
    do.
    """
    one_line = True  # common.launch shows the message without a traceback


class NoPointLabels(DataError):
    """The data set has no classes of points at all: for the doctor, no fault."""


# ---- record: Grid, Frame, Batch ------------------------------------------------------

@dataclass(frozen=True)
class Grid:
    """What belongs to a data set and not to a method: range, voxels, image size, classes.

    x forward, y left, z up, in metres.
    """
    dataset: str
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    voxel: tuple[float, float, float]
    image: tuple[int, int]    # height, width
    cameras: tuple[str, ...]
    classes: tuple[str, ...]  # Frame.labels index this
    sweeps: int               # LiDAR sweeps in a frame, the keyframe sweep included
    ground: float             # z of a flat road under the LiDAR; for figures and monitors only

    @property
    def mirrors(self):
        """Whether x and y may be mirrored: whether the range is symmetric along each."""
        return self.low[0] == -self.high[0], self.low[1] == -self.high[1]

    @property
    def paper_frames(self):
        """Training frames of the published split: for --profile."""
        return dict(nuscenes=28130, kitti=3712, waymo=158081)[self.dataset]


CAMERAS = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT",
    "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT",
)
CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer",
    "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone",
)
KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
WAYMO_CAMERAS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT")  # 1 to 5
WAYMO_CLASSES = ("Vehicle", "Pedestrian", "Cyclist")
POINT_CLASSES = {             # of semantic segmentation: labels of points index these
    "nuscenes": (
        "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian",
        "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk",
        "terrain", "manmade", "vegetation"),
    "kitti": (
        "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist",
        "motorcyclist", "road", "parking", "sidewalk", "other-ground", "building", "fence",
        "vegetation", "trunk", "terrain", "pole", "traffic-sign"),
    "waymo": (
        "CAR", "TRUCK", "BUS", "OTHER_VEHICLE", "MOTORCYCLIST", "BICYCLIST", "PEDESTRIAN", "SIGN",
        "TRAFFIC_LIGHT", "POLE", "CONSTRUCTION_CONE", "BICYCLE", "MOTORCYCLE", "BUILDING",
        "VEGETATION", "TREE_TRUNK", "CURB", "ROAD", "LANE_MARKER", "OTHER_GROUND", "WALKABLE",
        "SIDEWALK"),
}

NUSCENES_GRID = Grid(
    dataset="nuscenes",
    low=(-54., -54., -5.),
    high=(54., 54., 3.),
    voxel=(.075, .075, .2),
    image=(256, 704),
    cameras=CAMERAS,
    classes=CLASSES,
    sweeps=10,
    ground=-1.84,
)
KITTI_GRID = Grid(
    dataset="kitti",
    low=(0., -40., -3.),
    high=(70.4, 40., 1.),
    voxel=(.05, .05, .1),
    image=(384, 1248),
    cameras=("image_2",),
    classes=KITTI_CLASSES,
    sweeps=1,
    ground=-1.73,
)
WAYMO_GRID = Grid(
    dataset="waymo",
    low=(-75.2, -75.2, -2.),
    high=(75.2, 75.2, 4.),
    voxel=(.1, .1, .15),
    image=(320, 480),
    cameras=WAYMO_CAMERAS,
    classes=WAYMO_CLASSES,
    sweeps=1,
    ground=0.,                # z is counted from the road, not from the LiDAR
)


def small_grid(grid, low, high, image):
    """The grid of the small preset: a shorter range, coarser voxels, one sweep."""
    return replace(grid, low=low, high=high, voxel=(.1, .1, .125), image=image, sweeps=1)


GRIDS = {
    ("nuscenes", "paper"): NUSCENES_GRID,
    ("nuscenes", "small"): small_grid(
        NUSCENES_GRID, low=(-25.6, -25.6, -3.), high=(25.6, 25.6, 1.), image=(96, 256)),
    ("kitti", "paper"): KITTI_GRID,
    ("kitti", "small"): small_grid(
        KITTI_GRID, low=(0., -25.6, -3.), high=(51.2, 25.6, 1.), image=(80, 256)),
    ("waymo", "paper"): WAYMO_GRID,
    ("waymo", "small"): small_grid(
        WAYMO_GRID, low=(-25.6, -25.6, -1.), high=(25.6, 25.6, 3.), image=(96, 144)),
}


def choose_grid(dataset, preset, sweeps=None):
    """The Grid of a data set, of at most `sweeps` sweeps where that is given."""
    grid = GRIDS[dataset, preset]
    return replace(grid, sweeps=min(sweeps or grid.sweeps, grid.sweeps))


@dataclass(frozen=True)
class Frame:
    """One LiDAR sweep and the K camera images nearest to it in time.

    Every data set becomes exactly this, and nothing downstream asks which one it was.

    points       (N, 5) float32        x forward, y left, z up, metres; intensity in [0, 1];
                                       seconds before the keyframe sweep. The points of the
                                       keyframe sweep come first. N may be 0
    origin       (3,) float32          where the LiDAR stands in that frame (zero for nuScenes
                                       and KITTI)
    images       K x (3, H, W) uint8   RGB, after resize and crop; sizes may differ between
                                       cameras. K = 0 where none is read (open_dataset)
    lidar2img    (K, 4, 4) float32     (u d, v d, d, 1) = lidar2img (x, y, z, 1); u right,
                                       v down, pixel centres at +0.5; d = depth, m
    lidar2world  (4, 4) float64        pose at the time of the keyframe sweep; the identity for
                                       KITTI
    time         float                 seconds; 0 for KITTI's object frames, which have none
    boxes        (M, 9) float32, None  centre xyz, l, w, h (m), yaw (rad, x towards y),
                                       velocity xy (m/s, NaN where unknown)
    labels       (M,) int64, None      index into Grid.classes
    extra        {name: array}         what `prepare` computed; "points_*" has one row for each
                                       point and follows the points. An augment may add an int.
                                       points_label (N,) int64: index into POINT_CLASSES, -1 for
                                       none, where the data set is opened with point_labels
    name         str                   "nuscenes/scene-0061/<sample token>"; every error about
                                       this frame starts with it
    """
    points: np.ndarray
    origin: np.ndarray
    images: list[np.ndarray]
    lidar2img: np.ndarray
    lidar2world: np.ndarray
    time: float
    boxes: np.ndarray | None
    labels: np.ndarray | None
    extra: dict[str, np.ndarray]
    name: str

    def __post_init__(self):
        N = len(self.points)
        K = len(self.images)
        expected = {
            "points": ((N, 5), "float32"),
            "origin": ((3,), "float32"),
            "lidar2img": ((K, 4, 4), "float32"),
            "lidar2world": ((4, 4), "float64"),
        }
        finite = ["lidar2img", "lidar2world"]
        if (self.boxes is None) != (self.labels is None):
            raise ValueError(f"{self.name}: only one of boxes and labels is given; "
                             "expected both, or None for both")
        if self.boxes is not None:
            M = len(self.boxes)
            expected["boxes"] = ((M, 9), "float32")
            expected["labels"] = ((M,), "int64")
            finite.append("boxes")

        for field, (shape, dtype) in expected.items():
            array = getattr(self, field)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{self.name}: {field} is {array.dtype} {array.shape}, "
                                 f"expected {dtype} {shape}")
        for k, image in enumerate(self.images):
            if image.ndim != 3 or image.shape[0] != 3 or image.dtype != "uint8":
                raise ValueError(f"{self.name}: image {k} is {image.dtype} {image.shape}, "
                                 "expected uint8 (3, H, W)")
        for field in finite:
            if not np.isfinite(getattr(self, field)[..., :7]).all():  # a velocity may be unknown
                raise DataError(f"{self.name}: {field} has numbers that are not finite, or too "
                                "large; check the calibration, poses and labels that it is made "
                                "from")
        for field, array in self.extra.items():
            if field.startswith("points_") and len(array) != N:
                raise ValueError(f"{self.name}: extra {field} has {len(array)} rows, expected "
                                 f"one for each of the {N} points")


# of a Batch, what only the CPU reads: it stays there
ON_HOST = ("lidar2world", "time", "seeds")


@dataclass
class Batch:
    """B frames joined along the first axis; b_x is the frame of each row of x.

    Sizes are stated, never inferred: a frame may be empty.
    """
    points: torch.Tensor            # (N, 5) float32
    b_points: torch.Tensor          # (N,) int64
    origin: torch.Tensor            # (B, 3) float32
    images: torch.Tensor            # (B K, 3, H, W) uint8, zeros at the bottom and right
    hw: torch.Tensor                # (B K, 2) int64, each image's own height and width
    lidar2img: torch.Tensor         # (B K, 4, 4) float32
    lidar2world: torch.Tensor       # (B, 4, 4) float64
    time: torch.Tensor              # (B,) float64, s
    boxes: torch.Tensor | None      # (M, 9) float32
    b_boxes: torch.Tensor | None    # (M,) int64
    labels: torch.Tensor | None     # (M,) int64
    # rows joined; "b_" + name too where rows are not points. Of an int: a list of B, on the CPU
    extra: dict[str, torch.Tensor | list[int]]
    names: list[str]
    seeds: torch.Tensor             # (B,) int64, random stream of a frame: (seed, epoch, index)
    size: int                       # B
    cameras: int                    # K
    counts: list[int]               # points of each frame, B
    box_counts: list[int] | None    # boxes of each frame, B

    def map(self, change, leave=()):
        """The same batch with change(tensor) for each tensor whose name is not in `leave`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(value) for name, value in values.items()
                   if isinstance(value, torch.Tensor) and name not in leave}
        extra = {name: change(value) if isinstance(value, torch.Tensor) else value
                 for name, value in self.extra.items()}
        return replace(self, **tensors, extra=extra)

    def to(self, device):
        return self.map(lambda tensor: tensor.to(device, non_blocking=True), leave=ON_HOST)

    def pin_memory(self):  # torch's DataLoader calls this
        return self.map(torch.Tensor.pin_memory, leave=ON_HOST)


def join(arrays):
    """Arrays joined along the first axis, as a tensor."""
    return torch.cat([torch.as_tensor(array) for array in arrays])


def frame_of_rows(arrays):
    """The number of the array that each row of join(arrays) comes from -> (rows,) int64."""
    return torch.repeat_interleave(torch.tensor([len(array) for array in arrays]))


def collate(frames, seeds):
    """Join frames (a list of Frame with the same K) and seeds (a list of int) into a Batch."""
    all_images = [image for frame in frames for image in frame.images]
    hw = torch.tensor([image.shape[1:] for image in all_images], dtype=torch.int64)
    hw = hw.reshape(-1, 2)  # (B K, 2), K may be 0
    H, W = hw.amax(0).tolist() if len(hw) else (0, 0)
    images = np.zeros((len(all_images), 3, H, W), np.uint8)
    for padded, image in zip(images, all_images):
        h, w = image.shape[1:]
        padded[:, :h, :w] = image

    points = [frame.points for frame in frames]
    boxes = b_boxes = labels = box_counts = None
    if all(frame.boxes is not None for frame in frames):
        boxes = join([frame.boxes for frame in frames])
        b_boxes = frame_of_rows([frame.boxes for frame in frames])
        labels = join([frame.labels for frame in frames])
        box_counts = [len(frame.boxes) for frame in frames]
    extra = {}
    for name in frames[0].extra:
        arrays = [frame.extra[name] for frame in frames]
        if isinstance(arrays[0], int):
            extra[name] = arrays
            continue
        extra[name] = join(arrays)
        if not name.startswith("points_"):
            extra["b_" + name] = frame_of_rows(arrays)
    return Batch(
        points=join(points),
        b_points=frame_of_rows(points),
        origin=torch.tensor(np.stack([frame.origin for frame in frames])),
        images=torch.from_numpy(images),
        hw=hw,
        lidar2img=join([frame.lidar2img for frame in frames]),
        lidar2world=torch.tensor(np.stack([frame.lidar2world for frame in frames])),
        time=torch.tensor([frame.time for frame in frames], dtype=torch.float64),
        boxes=boxes,
        b_boxes=b_boxes,
        labels=labels,
        extra=extra,
        names=[frame.name for frame in frames],
        seeds=torch.tensor(seeds, dtype=torch.int64),
        size=len(frames),
        cameras=len(frames[0].images),
        counts=[len(frame.points) for frame in frames],
        box_counts=box_counts,
    )


# ---- augmentation: pure functions of a Frame -----------------------------------------

def warp_boxes(boxes, a2b):
    """boxes (M, 9) in frame a -> (M, 9) float64 in frame b.

    a2b (4, 4) rotates, scales alike in all directions, mirrors and moves. Yaw and
    velocity follow as directions. What a tilted a2b adds to their z is dropped, since a
    box has only a yaw.
    """
    linear = a2b[:3, :3]
    centre = boxes[:, :3] @ linear.T + a2b[:3, 3]
    size = boxes[:, 3:6] * np.cbrt(abs(np.linalg.det(linear)))
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
    heading = heading @ linear[:2, :2].T  # (M, 2), any length
    yaw = np.arctan2(heading[:, 1], heading[:, 0])
    velocity = boxes[:, 7:9] @ linear[:2, :2].T
    return np.concatenate([centre, size, yaw[:, None], velocity], 1, dtype=np.float64)


def warp_frame(frame, a2b):
    """Move the whole cloud by a2b (4, 4) float64: rotation or reflection, one scale, translation.

    Points, origin and boxes are mapped. lidar2img and lidar2world are multiplied by the
    inverse from the right, so that a point keeps its pixel, its depth in true metres
    and its place in the world. Images stay as they are. Raises ValueError for a shear
    or an uneven scale, which boxes cannot follow.
    """
    a2b = np.asarray(a2b, np.float64)
    linear = a2b[:3, :3]
    gram = linear.T @ linear
    scale2 = gram[0, 0]  # square of the scale
    if (a2b.shape != (4, 4) or not scale2 > 0
            or not np.allclose(gram, scale2 * np.eye(3), rtol=1e-5, atol=1e-5 * scale2)):
        raise ValueError(f"{frame.name}: a2b is no rotation or reflection with one scale:\n{a2b}")
    b2a = np.linalg.inv(a2b)
    points = frame.points.copy()
    # as columns: half the time of rows
    xyz = linear @ points[:, :3].T.astype(np.float64, order="C")
    xyz += a2b[:3, 3:]
    points[:, :3] = xyz.T
    boxes = None
    if frame.boxes is not None:
        boxes = warp_boxes(frame.boxes, a2b).astype(np.float32)
    return replace(
        frame,
        points=points,
        origin=(linear @ frame.origin + a2b[:3, 3]).astype(np.float32),
        boxes=boxes,
        lidar2img=(frame.lidar2img @ b2a).astype(np.float32),
        lidar2world=frame.lidar2world @ b2a,
    )


def augment_cloud(frame, rng, rotation, scale, flip):
    """Turn the cloud about z at random, scale it, and mirror x and y.

    The angle is U(-rotation, rotation) rad, the scale U(1 - scale, 1 + scale). x and y
    are each mirrored with p = 0.5 where flip (x, y) allows it. flip is the data set's
    Grid.mirrors: mirroring x on KITTI would put what the camera sees behind the range.
    rng is a np.random.Generator. The same numbers are drawn whatever the options, so
    that switching one off leaves the others as they were.
    """
    angle = rng.uniform(-rotation, rotation)
    size = rng.uniform(1 - scale, 1 + scale)
    mirror = rng.random(2) < 0.5
    a2b = np.eye(4)
    a2b[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    a2b[:3, :3] *= size
    a2b[:2] *= np.where(mirror & flip, -1., 1.)[:, None]
    return warp_frame(frame, a2b)


def crop_images(frame, boxes, sizes, mirrored):
    """Crop each image, resize the crop, and mirror it left to right where asked.

    boxes K x (top, left, height, width) px, sizes K x (H, W), mirrored K x bool.
    lidar2img follows with the exact ratios.
    """
    images = []
    matrices = []
    for image, matrix, (top, left, h, w), (H, W), mirror in zip(
            frame.images, frame.lidar2img, boxes, sizes, mirrored, strict=True):
        method = cv2.INTER_AREA if H * W < h * w else cv2.INTER_LINEAR
        planes = np.empty((3, H, W), np.uint8)
        for plane, whole in zip(planes, image):
            crop = whole[top:top + h, left:left + w]
            cv2.resize(crop, (W, H), plane, interpolation=method)
            if mirror:
                cv2.flip(plane, 1, plane)
        change = np.diag([W / w, H / h, 1., 1.])
        change[:2, 2] = -left * W / w, -top * H / h
        if mirror:
            change[0] = W * change[2] - change[0]  # u d -> W d - u d
        images.append(planes)
        matrices.append(change @ matrix)
    return replace(frame, images=images, lidar2img=np.stack(matrices).astype(np.float32))


def select(frame, keep):
    """Keep the points in `keep`, a mask (N,) bool or row numbers (n,) int.

    The extras named "points_*" follow.
    """
    extra = {name: array[keep] if name.startswith("points_") else array
             for name, array in frame.extra.items()}
    return replace(frame, points=frame.points[keep], extra=extra)


def visible_points(points, lidar2img, hw):
    """Which points each image shows, computed in float64.

    points (N, 3 or more) m, lidar2img (K, 4, 4), hw (K, 2) px -> (K, N) bool.
    """
    xyz = points[:, :3].T.astype(np.float64, order="C")
    visible = np.empty((len(lidar2img), len(points)), bool)
    for k, (matrix, (height, width)) in enumerate(zip(lidar2img, hw, strict=True)):
        u, v, d = matrix[:3, :3] @ xyz + matrix[:3, 3:]  # (N,) each: u d, v d, d
        # a depth d <= 0 satisfies none of it
        visible[k] = (u >= 0) & (u < width * d) & (v >= 0) & (v < height * d)
    return visible


def is_keyframe(points):
    """Which points (N, 5) are of the keyframe sweep -> (N,) bool.

    Those of Waymo's other lasers are too: they carry OTHER_LASER_AGE seconds of age.
    """
    return points[:, 4] < 0.01


def crop_to_view(frame):
    """The frame without the points that none of its images shows.

    This is what KITTI's "reduced" clouds are to its full scans.
    """
    hw = [image.shape[1:] for image in frame.images]
    return select(frame, visible_points(frame.points, frame.lidar2img, hw).any(0))


def box_corners(box):
    """box (9,) as a row of Frame.boxes -> (8, 3) m."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
    cos = np.cos(box[6])
    sin = np.sin(box[6])
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    return signs * box[3:6] @ rotation + box[:3]


def inside_box(xyz, box):
    """Which points lie strictly inside a box.

    xyz (N, 3), box (9,) as a row of Frame.boxes -> (N,) bool.
    """
    offset = xyz - box[:3]
    cos = np.cos(box[6])
    sin = np.sin(box[6])
    along = offset[:, 0] * cos + offset[:, 1] * sin
    across = offset[:, 1] * cos - offset[:, 0] * sin
    length, width, height = box[3:6]
    return ((abs(along) < length / 2) & (abs(across) < width / 2)
            & (abs(offset[:, 2]) < height / 2))


# ---- open: which data set a folder holds ---------------------------------------------

def open_dataset(root, preset="paper", *, sweeps=None, images=True, labels=True,
                 point_labels=False):
    """The data set in folder `root`, recognised by its layout -> a NuScenes, Kitti or Waymo.

    "" is the embedded world, written under cache_dir() at first use. Where a nuScenes
    root has several versions, the folder of one's tables (ROOT/v1.0-mini) chooses that
    one.

    sweeps  at most so many LiDAR sweeps in a frame, default the grid's
    images  False: no image is read, and none need be on disk
    labels  False: labels may be absent or damaged; such a frame then has no boxes
    point_labels  True: the class of each point is read too; frames without are left out
    Frames that lack a file of what is read are left out, and their number is printed.

    A data set of your own is easiest written in nuScenes' layout. It may have fewer
    cameras than nuScenes (with names out of CAMERAS) and up to 256 beams. Otherwise it
    needs an entry in GRIDS for each preset, a reader here (Kitti is the shortest), and
    its cameras in CAMERA_YAW.
    """
    embedded = root == ""
    root = Path(os.path.realpath(embedded_world() if embedded else root))
    try:
        with reading(root, "look at what is mounted there"):
            reader, place, *version = recognise(root)
            dataset = reader(place, preset, *version, sweeps=sweeps, images=images,
                             labels=labels, point_labels=point_labels)
        damage = dataset.notes[0] if embedded and dataset.notes else ""
    except DataError as error:
        if not embedded:
            raise
        damage = str(error)
    if damage:
        raise DataError(f"{damage}. This is the embedded world: delete {root}, and the next "
                        "start writes it again")
    return dataset


def recognise(root):
    """What is in the folder `root` (a Path) -> (reader, its root) or (NuScenes, root, version)."""
    readers = NuScenes, Kitti, Waymo
    for reader in readers:
        if has_layout(root, reader):
            return reader, root
    if root.match("v1.0-*") and has_layout(root.parent, NuScenes):
        return NuScenes, root.parent, root.name

    if root.is_file():
        raise DataError(f"{root}: this is a file; if it is an archive, extract it, and give the "
                        "folder that it was extracted into")
    if not root.is_dir():
        tilde = "; the shell has left ~ as it is: write $HOME" if "~" in root.parts else ""
        raise DataError(f"{root}: no such folder; give the root folder of a data set{tilde}")
    # no data set: look one or two folders up, and one down, to name the right root
    children = sorted(path for path in root.glob("*") if path.is_dir())
    for place in (root, *children):
        if not os.access(place, os.R_OK | os.X_OK):
            raise DataError(f"{place}: this folder cannot be read (Permission denied); "
                            f"{ASK_OWNER}")
    for place in (root.parent, root.parent.parent, *children):
        for reader in readers:
            if has_layout(place, reader):
                raise DataError(f"{root}: this is not the root of a data set, which holds "
                                f"{reader.LAYOUT_HINT}; give {place}")
    for patterns, message in ALMOST.items():
        for path in (path for pattern in patterns for path in root.glob(pattern)):
            raise DataError(f"{root}: {path.relative_to(root)} is here, but {message}")
    listing = ", ".join(sorted(path.name for path in root.glob("*"))[:8]) or "nothing"
    raise DataError(f"{root}: no data set here; looked for nuScenes ({NuScenes.LAYOUT_HINT}), "
                    f"KITTI ({Kitti.LAYOUT_HINT}) and Waymo ({Waymo.LAYOUT_HINT}), "
                    f"found {listing}; give the folder that the archives were extracted into")


# what is found where something else lacks, and what that is
ALMOST = {
    ("samples", "sweeps"):
        "no table (v1.0-*/*.json); extract the metadata archive of nuScenes here too",
    ("*/*.tfrecord*", "*.tfrecord*"):
        "version 2 of the Waymo Open Dataset is read, which is parquet; "
        "download waymo_open_dataset_v_2",
    ("*/camera_image/*.parquet", "*/lidar/*.parquet"):
        "no training/vehicle_pose; download the component vehicle_pose",
    ("training/image_2", "training/calib"):
        "no training/velodyne; extract the scans of KITTI's object frames",
    ("*/*_sync",): "no velodyne_points; extract the synced scans of KITTI's raw drives",
    ("sequences/*/labels", "dataset/sequences/*/labels", "sequences/*/image_2"):
        "no velodyne next to it; extract the scans of KITTI's odometry set",
}


def has_layout(root, reader):
    """Whether root holds one of the reader's layouts."""
    patterns = [pattern for places in reader.LAYOUTS.values() for pattern in places]
    return any(True for pattern in patterns for _ in root.glob(pattern))


def announce(dataset, batch):
    """Say which data set a run reads. A batch (frames of a rank) beyond it is refused."""
    train = len(dataset.split("train"))
    val = len(dataset.split("val"))
    most = max(train, LARGE_BATCH)
    if batch > most:
        raise DataError(f"--batch {batch}: the train split of {dataset.what} has {train} frames; "
                        f"give at most {most}")
    print_once(f"{dataset.what}, {train} train and {val} val frames")


def embedded_world():
    """Root of the embedded world, written at first use."""
    import synthetic  # the one arrow from data to synthetic
    root = cache_dir() / f"world-{synthetic.VERSION}"
    if not root.exists():
        with locked(root):
            if not root.exists():  # no other process was first
                print_once(f"writing the embedded world to {root}, once; "
                           "this takes a few minutes")
                try:
                    synthetic.write(root)
                except OSError as error:
                    raise not_writable(root, error) from error
    return root


# ---- loader --------------------------------------------------------------------------

def loader(root, split, batch, rank=0, world=1, seed=0, *, preset="paper", workers=0, image=None,
           augment=None, prepare=None, crop=False, indices=None, accumulate=1):
    """A Loader of `split` of the data set in folder `root`, `batch` frames for each rank.

    root     a folder; "" for the embedded world; or what open_dataset returned
    image    (H, W) of the images, default the grid's
    augment  augment(frame, rng) -> Frame, in begin_at only; rng is a np.random.Generator of
             (seed, epoch, index of the frame)
    prepare  prepare(frame) -> {name: array or tensor} of the unaugmented frame's points. It is
             computed once, kept under cache_dir() until the points change, and put into
             frame.extra before augment. Its attribute `key` (a str) names what it computes: name,
             version, parameters
    crop     leave out points that the image on disk does not show: for KITTI, whose labels end
             where the image does
    indices  the frames to read, as dataset.split(split) gives them, where that is not the whole
             split
    accumulate  batches of a step, which come one after the other: with batch 1 and accumulate 3
             the frames of a step are those of batch 3
    With workers > 0, augment and prepare must be picklable where processes are spawned: top-level
    functions or objects.
    """
    dataset = open_dataset(root, preset) if isinstance(root, (str, Path)) else root
    return Loader(dataset, split, batch, rank, world, seed, workers, image, augment, prepare,
                  crop, indices, accumulate)


def spread(indices, n):
    """At most n of these frames, every k-th, in order. indices (N,) -> (n or fewer,)."""
    return indices[::max(len(indices) // n, 1)][:n]


class Loader:
    """Batches of one split for one rank; see loader(). `indices` are the frames that it reads.

    The contents are a function of seed, step and frames a step, never of rank or
    workers.
    """

    def __init__(self, dataset, split, batch, rank, world, seed, workers, image, augment, prepare,
                 crop, indices, accumulate):
        if not 0 <= rank < world or batch < 1 or workers < 0:
            raise ValueError(f"rank {rank} of world {world}, batch {batch}, workers {workers}: "
                             "expected 0 <= rank < world, batch >= 1, workers >= 0")
        self.dataset = dataset
        self.grid = dataset.grid
        self.indices = dataset.split(split) if indices is None else indices
        self.batch = batch
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.seed = seed
        self.workers = workers
        self.image = image or dataset.grid.image
        self.augment = augment
        self.prepare = prepare
        self.crop = crop
        if crop and not hasattr(dataset, "image_shows"):
            raise ValueError(f"{dataset.what}: crop is for KITTI, whose labels end where the "
                             "image does")
        if prepare:
            if not re.fullmatch(r"[\w.=,+-]+", prepare.key):
                raise ValueError(f"prepare.key is {prepare.key!r}, expected letters, digits and "
                                 "_ . = , + - only: it names a folder")
            # each file in the folder is also stamped with its points
            source = repr((VERSION, dataset.root, self.grid, self.image))
            digest = hashlib.sha256(source.encode()).hexdigest()[:16]
            self.folder = cache_dir() / "prepared" / digest / prepare.key
            remove_leftovers(self.folder, "*.part", age=3600)  # a live one is there for an instant

    @property
    def steps_per_epoch(self):
        return max(1, len(self.indices) // (self.batch * self.accumulate * self.world))

    def begin_at(self, step):
        """Endless batches from this step on: what an uninterrupted run would see from there.

        Each step has `accumulate` of them.
        """
        return self.batches(self.jobs_from(step))

    def first(self, n):
        """The first n batches of begin_at(0), to keep: the same ones at every call."""
        return keep(self.batches(islice(self.jobs_from(0), n)))

    def once(self):
        """This rank's share of the split, every world-th frame, in order and not augmented.

        The last batch may be smaller.
        """
        indices = self.indices[self.rank::self.world]
        jobs = [(0, int(index), False) for index in indices]
        return self.batches(jobs[i:i + self.batch] for i in range(0, len(jobs), self.batch))

    def jobs_from(self, step):
        """For each batch from this step on, its jobs: a list of (epoch, index of a frame, True)."""
        frames_a_rank = self.batch * self.accumulate
        frames_a_step = frames_a_rank * self.world
        # of an epoch, what fills whole steps; a split smaller than that takes several epochs a step
        length = len(self.indices) // frames_a_step * frames_a_step or len(self.indices)
        epoch = None
        while True:
            jobs = []
            first = step * frames_a_step + self.rank * frames_a_rank
            for position in range(first, first + frames_a_rank):
                if epoch != position // length:
                    epoch = position // length
                    rng = np.random.default_rng((self.seed, epoch, 0, 2))
                    order = rng.permutation(self.indices)
                jobs.append((epoch, int(order[position % length]), True))
            for part in range(0, frames_a_rank, self.batch):
                yield jobs[part:part + self.batch]
            step += 1

    def batches(self, jobs):
        """A Batch for each list of jobs, computed here or by workers; pinned for a GPU."""
        pin = torch.cuda.is_initialized()
        if not self.workers:
            for batch in jobs:
                with time_limit(self.workers):
                    pairs = [self[job] for job in batch]
                batch = collate_jobs(pairs)
                yield batch.pin_memory() if pin else batch
            return
        handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        source = iter(torch.utils.data.DataLoader(
            self, batch_sampler=jobs, num_workers=self.workers, collate_fn=collate_jobs,
            worker_init_fn=start_worker, pin_memory=pin))
        # torch's handler raises a worker's death in the middle of a step; without it the wait
        # for the next batch does, after which a run can still be saved
        if in_main_thread():
            signal.signal(signal.SIGCHLD, handler)
        first = True
        while True:
            with time_limit(self.workers):
                batch = next(source, None)
            if batch is None:
                return
            if first:
                refuse_small_memory(batch, self.workers)
            first = False
            yield batch

    def __getitem__(self, job):
        """(epoch, index, training) -> (Frame, seed). This is what a worker computes."""
        epoch, index, training = job
        frame = self.dataset.load(index, self.image)
        if self.prepare:
            prepared = cached_extra(frame, self.prepare, self.folder)
            frame = replace(frame, extra=frame.extra | prepared)
        if self.crop:
            frame = select(frame, self.dataset.image_shows(index, frame.points))
        if training and self.augment:
            frame = self.augment(frame, np.random.default_rng((self.seed, epoch, index)))
        # the last number keeps this stream and the order's apart from augment's: numpy pads short
        # seeds with zeros
        stream = np.random.SeedSequence((self.seed, epoch, index, 1))
        return frame, int(stream.generate_state(1, np.uint64)[0]) >> 1


def collate_jobs(pairs):
    """A list of (Frame, seed) -> Batch."""
    return collate([frame for frame, _ in pairs], [seed for _, seed in pairs])


def keep(batches):
    """A list of these batches that takes none of /dev/shm, through which workers send them."""
    return [batch.map(lambda tensor: tensor.clone() if tensor.is_shared() else tensor)
            for batch in batches]


class Stalled(BaseException):
    """The data have been waited for too long. No `except Exception` of a reader stops it."""


def in_main_thread():
    """Whether signals can be handled here."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def time_limit(workers):
    """Wait for a batch within; DataError if that takes too long or a worker has died.

    Too long is half the time for which a rank waits for another one, so that a rank
    without data ends with its reason before the others end without it.
    """
    def stall(*_):
        raise Stalled

    limit = int(os.environ.get("LIDAR_CAMERA_TIMEOUT", 300)) / 2
    try:
        if in_main_thread():
            handler = signal.signal(signal.SIGALRM, stall)
            signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        finally:
            if in_main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, handler)
    except Stalled as error:
        for worker in multiprocessing.active_children():
            worker.kill()  # one that hangs would be waited for at the end of the program
        advice = "Does a disk not answer?"
        if workers:
            advice = (f"{shared_memory()}: if that is full, enlarge it (docker: --shm-size 8g or "
                      "--ipc=host) or give --workers 0. If not, does a disk not answer?")
        raise DataError(f"no batch for {limit:.0f} s. {advice} A larger LIDAR_CAMERA_TIMEOUT "
                        "waits longer; the same command goes on from the last checkpoint"
                        ) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(f"{str(error).strip()}: a loader worker was killed, as the kernel does "
                        f"where memory runs out. {shared_memory()}. Give fewer --workers or a "
                        "smaller --batch; the same command goes on from the last checkpoint"
                        ) from error


def shared_memory():
    """How much of /dev/shm is free, for a message."""
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:
        return "Batches wait in shared memory"
    free = disk.f_bavail * disk.f_frsize / 2**20
    total = disk.f_blocks * disk.f_frsize / 2**20
    return f"/dev/shm, where batches wait, has {free:.0f} of {total:.0f} MB free"


def refuse_small_memory(batch, workers):
    """DataError if /dev/shm cannot hold the batches that wait there: two for each worker.

    A worker that finds it full drops its batch without a word to the main process.
    """
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:
        return
    sizes = []
    batch.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)
    size = sum(sizes) * 2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    total = disk.f_blocks * disk.f_frsize
    if size * workers > total:
        raise DataError(
            f"/dev/shm has {total / 2**20:.1f} MB, but the batches of --workers {workers} that "
            f"wait there take {size * workers / 2**20:.1f} MB; enlarge it (docker: --shm-size 8g "
            f"or --ipc=host), or give --workers {int(total / size)}")


def start_worker(_):
    """One thread for a worker, in a process group of its own.

    So Ctrl-C reaches the main process only, which finishes its step while the workers
    live. SIGTERM, at the end of the run or to all processes of a job, ends a worker
    quietly: torch's own handler would raise an error in the main process.
    """
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


LARGEST_EXTRA = 2 ** 30  # bytes; what prepare returns for a frame is thousands of times smaller


def cached_extra(frame, prepare, folder):
    """What prepare(frame) returns, as arrays, from its file in `folder`.

    It is computed and written there if the file is missing or made from other points,
    and also, with a warning, if it is damaged. Where the file cannot be written, the
    arrays are computed each time, with a warning.
    """
    path = folder / f"{frame.name.replace('/', '_')}.npz"
    stamp = zlib.crc32(frame.points)
    try:
        extra = read_extra(path, stamp, len(frame.points))
        if extra is not None:
            return extra
    except (FileNotFoundError, NotADirectoryError):
        pass  # not written yet
    except Exception as error:  # whatever numpy and zipfile make of bytes that are not theirs
        warnings.warn(f"{path} cannot be used ({error}): what it should hold is computed again",
                      stacklevel=1)
    extra = {name: np.asarray(value) for name, value in prepare(frame).items()}
    # in memory first: on a full disk a ZipFile complains once more when it is forgotten
    archive = io.BytesIO()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(archive, **extra, stamp=stamp)
        with zipfile.ZipFile(archive, "a") as file:
            file.comment = extra_digest(extra, stamp)
        part = temp_path(path)
        try:
            part.write_bytes(archive.getbuffer())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"{folder} cannot be written ({error.strerror}): what belongs there is "
                      "computed anew for every frame. Make room there, or name another folder as "
                      "LIDAR_CAMERA_CACHE", stacklevel=1)
    return extra


def read_extra(path, stamp, N):
    """The arrays of a prepared file of N points; None if they were made from other points.

    Raises an error of any kind if the file is damaged. Files without a digest are from
    before there was one.
    """
    with np.load(path, allow_pickle=False) as stored:
        size = sum(member.file_size for member in stored.zip.infolist())
        if size > LARGEST_EXTRA:
            raise ValueError(f"it unpacks to {size} bytes")
        if int(stored["stamp"]) != stamp:
            return None
        extra = {name: stored[name] for name in stored.files if name != "stamp"}
        digest = stored.zip.comment
    if digest and digest != extra_digest(extra, stamp):
        raise ValueError("its digest is of other arrays")
    for name, array in extra.items():
        if name.startswith("points_") and len(array) != N:
            raise ValueError(f"{name} has {len(array)} rows for {N} points")
    return extra


def extra_digest(extra, stamp):
    """Hash of prepared arrays and the stamp of their points -> bytes, the zip file's comment."""
    digest = hashlib.sha256(str(stamp).encode())
    for name, array in sorted(extra.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest().encode()


# ======================================================================================
# A method's reader may stop here. What follows says how files become frames, one data set
# after the other, and how the doctor checks them.
# ======================================================================================


# ---- files and caches ----------------------------------------------------------------

def cache_dir():
    """The folder of all that can be computed again.

    It is $LIDAR_CAMERA_CACHE, else lidar-camera-pretraining under $XDG_CACHE_HOME or
    ~/.cache.
    """
    folder = os.environ.get("LIDAR_CAMERA_CACHE")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.path.join(base, "lidar-camera-pretraining")
    folder = Path(os.path.expanduser(folder))
    if folder.parts[0].startswith("~"):
        raise DataError(f"{folder}: this user has no home folder; name a folder for the cache as "
                        "LIDAR_CAMERA_CACHE")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(folder, error) from error
    return folder


def not_writable(folder, error):
    """The DataError for an OSError on something in the cache."""
    reason = error.strerror or error
    return DataError(f"{folder}: this part of the cache cannot be written ({reason}); "
                     "make room there, or point LIDAR_CAMERA_CACHE to another folder")


def temp_path(path):
    """A new name next to `path`, for a file or folder that is then renamed to it.

    The caller makes it with open or mkdir, so that the umask holds, unlike for
    tempfile's files.
    """
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")


@contextmanager
def locked(folder):
    """One process at a time builds `folder`: other ranks wait and do not repeat the work.

    Whoever has the lock is the only builder, and removes what killed ones have left.
    """
    folder = Path(folder)
    try:
        lock = open(f"{folder}.lock", "a")
    except OSError as error:
        raise not_writable(folder, error) from error
    with lock:
        try:
            wait_for_lock(lock, folder)
            name = glob.escape(folder.name)
            remove_leftovers(folder.parent, f"{name}.*.part*")  # temp_path's and torch.hub's
            remove_leftovers(folder.parent, f".{name}-*")       # synthetic.write's
        except OSError:
            # a file system without locks: builders race, and the rename that publishes the
            # folder decides
            pass
        yield


def wait_for_lock(lock, folder):
    """Lock an open file; whoever waits for longer than a few seconds is told for what."""
    deadline = monotonic() + 3
    while monotonic() < deadline:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sleep(0.05)
    print_once(f"{folder}: another process is writing it; waiting until it is done or ends. "
               f"It holds {lock.name}")
    fcntl.flock(lock, fcntl.LOCK_EX)


def remove_leftovers(folder, pattern, age=0):
    """Remove what killed processes were writing, if nothing has changed it for `age` seconds."""
    for path in folder.glob(pattern):
        try:
            if now() - path.stat().st_mtime < age:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except OSError:
            pass  # renamed by its writer meanwhile, or another user's


@functools.cache
def print_once(text):
    """Print each text once, from rank 0 of a run and not from a loader's worker."""
    if os.environ.get("RANK", "0") == "0" and torch.utils.data.get_worker_info() is None:
        print(text, flush=True)


def path_inside(root, file, owner):
    """Path of `file`, which a table names, under root; DataError if it is absolute or goes up.

    Tables are input and are not to be trusted. Links under the root are the user's own
    and are followed. `owner` begins the message.
    """
    if os.path.isabs(file) or ".." in file.split("/"):
        raise DataError(f"{owner}: {file} is absolute or goes upwards, expected a path inside "
                        f"{root}; correct the table")
    return os.path.join(root, file)


ASK_OWNER = "ask its owner for the right to read it (chmod), or run as a user who has it"


@contextmanager
def reading(owner, fix, file=None):
    """An OSError in here becomes a DataError that says which file it is and why.

    `owner` begins the message, `fix` is what to do where the file is missing. A `file`
    that is a pipe or a device is refused: reading one would wait for ever.
    """
    try:
        if file is not None:
            mode = os.stat(file).st_mode
            if not (S_ISREG(mode) or S_ISDIR(mode)):
                raise DataError(f"{owner}: {file} is a pipe or a device, expected a file; {fix}")
        yield
    except OSError as error:
        path = error.filename or ""
        message = f"{owner}: {path} cannot be read ({error.strerror or error})"
        if isinstance(error, FileNotFoundError):
            message = f"{owner}: {path} is missing"
        elif isinstance(error, PermissionError):
            fix = ASK_OWNER
        else:
            fix = f"see to the disk that it lies on; {fix}"
        raise DataError(f"{message}; {fix}") from error


def files_in(folder):
    """Names of the files in a folder -> set of str, empty where there is no such folder.

    Links are followed. No file is opened, and only links are looked up one by one.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def describe_counts(counts):
    """{"a": 2, "b": 1} -> "a 2, b 1"; what counts 0 is left out."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def frame_boxes(dataset, i):
    """Boxes (M, 9) float32 of frame i that have a class of the grid, labels (M,) int64.

    Where labels are not wanted (open_dataset), damaged ones are none.
    """
    try:
        rows = dataset.annotations(i)
    except DataError:
        if dataset.labels:
            raise
        return np.zeros((0, 9), np.float32), np.zeros(0, np.int64)
    rows = rows[rows["label"] >= 0]
    return rows["box"].astype(np.float32), rows["label"].astype(np.int64)


def split_frames(dataset, split_of, name):
    """The data set's own split: rows where split_of (n,) bytes is `name` -> (m,) int64.

    name is "train", "val" or "test"; `dataset` begins the messages. If train or val has
    no frame on disk, both come from all frames on disk, cut 80/20 in their order. Test
    frames, which have no labels, are used for this only if there are no others. Both
    splits are cut anew even if only one of them is empty: otherwise frames could be in
    both.
    """
    if name not in ("train", "val", "test"):
        raise DataError(f"{dataset}: no split {name!r}; expected train, val or test")
    indices = np.flatnonzero(split_of == name.encode())
    train_count = (split_of == b"train").sum()
    val_count = (split_of == b"val").sum()
    if name != "test" and not (train_count and val_count):
        pool = np.flatnonzero(split_of != b"test")
        if not len(pool):
            pool = np.arange(len(split_of))
        cut = max(1, len(pool) * 4 // 5)
        print_once(f"{dataset}: {train_count} train and {val_count} val frames on disk; "
                   f"{len(pool)} of its {len(split_of)} frames are cut in their order: "
                   f"the first {cut} are train, the other {len(pool) - cut} val")
        indices = pool[:cut] if name == "train" else pool[cut:]
    if not len(indices):
        raise DataError(f"{dataset}: its {len(split_of)} frames on disk leave none for {name}; "
                        "extract more of them")
    return indices


def file_digests(dataset):
    """Digests of the files of some frames, spread over the data set -> {file: digest}.

    They are what a run compares when it is resumed, wherever the data set lies then: no
    path, no time. Of each file, its size and its last 64 KiB.
    """
    digests = {}
    for i in spread(np.arange(len(dataset)), DIGEST_FRAMES):
        for file in dataset.files(int(i)):
            if file not in digests:
                path = path_inside(dataset.root, file, dataset.what)
                digests[file] = file_digest(path, dataset.what)
    return digests


def file_digest(path, owner):
    """Size and CRC of the last 64 KiB of a file, as text. owner: begins an error's message."""
    if not os.path.isfile(path):
        return "absent"
    with reading(owner, "extract it again"), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 2**16, 0))
        return f"{size} {zlib.crc32(file.read()):08x}"


def has_box(dataset, i):
    """Whether frame i has a 3-D box of a class that is detected."""
    rows = dataset.annotations(i)
    return ((rows["label"] >= 0) & (rows["box"][:, 3:6] > 0).all(1)).any()


def labelled_val_frames(dataset, n):
    """Up to n val frames with a box, spread over the split -> list of int.

    DataError if there is none, since nothing could be scored.
    """
    val = dataset.split("val")
    candidates = dict.fromkeys([*spread(val, 10 * n).tolist(), *val.tolist()])
    frames = list(islice((i for i in candidates if has_box(dataset, i)), n))
    if not frames:
        raise DataError(f"{dataset.what}: none of its {len(val)} val frames has a 3-D box of a "
                        "detection class, so there is nothing to score; give their labels too")
    return frames


# ---- camera images -------------------------------------------------------------------

REDUCED = {  # a JPEG decodes at 1/2, 1/4 and 1/8 of its size for less
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # neither occurs within compressed data


DECODING = threading.Lock()  # stderr belongs to the whole process


def imdecode(raw, flags):
    """cv2.imdecode -> pixels (H, W, 3) uint8 or None, and what libjpeg finds damaged, or "".

    libjpeg goes on with grey or shifted pixels, and says so to stderr alone: a file in
    memory takes the place of stderr meanwhile. That costs 3 us of an image's 2 ms or
    more. A flipped bit after which the file is still a valid JPEG cannot be found.
    """
    encoded = np.frombuffer(raw, np.uint8)
    with DECODING:
        try:
            stderr = os.dup(2)
        except OSError:  # closed
            return cv2.imdecode(encoded, flags), ""
        messages = os.memfd_create("stderr")
        os.dup2(messages, 2)
        try:
            pixels = cv2.imdecode(encoded, flags)
        finally:
            os.dup2(stderr, 2)
            text = os.pread(messages, 2 ** 16, 0)
            os.close(messages)
            os.close(stderr)
    complaint = re.search(rb"Corrupt JPEG data.*|Premature end of JPEG.*", text)
    if complaint:
        return pixels, complaint[0].decode(errors="replace")
    if text:  # somebody else's
        os.write(2, text)
    return pixels, ""


def read_image(file, size, name, expected=None):
    """Image on disk -> as decode."""
    with reading(name, "extract the camera files again", file):
        raw = Path(file).read_bytes()
    return decode(raw, file, size, name, expected)


def decode(raw, file, size, name, expected=None):
    """Image as bytes -> pixels (3, H, W) uint8 of this size (H, W), and the (3, 3) crop matrix.

    The matrix takes pixels on disk to pixels in the result. The decoded image is cut to
    whole pixels, the same number at both sides and the rest at the top, where the sky
    is, and is then resized [ours]. The two scales may therefore differ by half a pixel
    in its width, and the matrix has both. expected (width, height) is what the
    calibration was made for; file and name are for messages.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=["JPEG", "PNG"]) as header:
            kind = header.format  # nothing is decoded yet
            full_width, full_height = header.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: {file} is not a whole JPEG or PNG ({error}), {len(raw)} bytes; "
                        "extract it again") from error
    if expected and (full_width, full_height) != expected:
        raise DataError(f"{name}: {file} is {full_width} x {full_height}, "
                        f"expected {expected[0]} x {expected[1]}, the size that the calibration "
                        "is for: extract the original file again")

    # the decoder fills up what a cut file lacks
    if LAST_BYTES[kind] not in raw[-1024:]:
        raise DataError(f"{name}: {file} is not a whole {kind}: its end is missing, "
                        f"{len(raw)} bytes; extract it again")

    height, width = size
    scale = max(height / full_height, width / full_width)
    shrink = 1
    if kind == "JPEG":
        shrink = max(factor for factor in REDUCED if factor == 1 or factor * scale <= 1)
    decoded, complaint = imdecode(raw, REDUCED[shrink] | cv2.IMREAD_IGNORE_ORIENTATION)
    if decoded is None or complaint:
        raise DataError(f"{name}: {file} is a damaged {kind} ({complaint or 'it does not decode'}),"
                        f" {len(raw)} bytes; extract it again")

    columns = min(max(round(width / scale / shrink), 1), full_width // shrink)
    rows = min(max(round(height / scale / shrink), 1), full_height // shrink)
    left = (full_width // shrink - columns) // 2
    top = full_height // shrink - rows
    crop = decoded[top:top + rows, left:left + columns]
    method = cv2.INTER_AREA if scale * shrink < 0.5 else cv2.INTER_LINEAR
    pixels = cv2.resize(crop, (width, height), interpolation=method)
    planes = np.empty((3, height, width), np.uint8)
    cv2.split(pixels, list(planes[::-1]))  # BGR, written into its place as RGB
    x = width / columns
    y = height / rows
    matrix = np.array([[x / shrink, 0, -left * x], [0, y / shrink, -top * y], [0, 0, 1]])
    return planes, matrix


def projections(lidar2img, cameras, name, files):
    """lidar2img (K, 4, 4) as Frame has it, float32; DataError if one is no camera's.

    cameras are their names; name of the frame; files say where the cameras are.
    """
    for camera, matrix in zip(cameras, lidar2img):
        if not abs(np.linalg.det(matrix[:3, :3])) > 1e-6:  # NaN is not
            raise DataError(f"{name}: {camera}: its projection matrix is singular or not finite, "
                            f"{np.round(matrix[:3], 3).tolist()}; check {files}")
    return lidar2img.astype(np.float32)


def pad_to_4x4(matrix):
    """(3, 3) or (3, 4) -> (4, 4), the rest of which is the identity's."""
    padded = np.eye(4)
    padded[:3, :matrix.shape[1]] = matrix
    return padded


# ---- nuScenes: the tables, parsed once -----------------------------------------------

CHANNELS = ("LIDAR_TOP", *CAMERAS)  # the sensors of a frame

# category of an annotation -> class of the detection task; other categories have none  [devkit]
DETECTION = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}

# category of a point -> class of the segmentation task; other categories have none  [devkit]
SEGMENTATION = {
    **{name: label for name, label in DETECTION.items()},
    "flat.driveable_surface": "driveable_surface",
    "flat.other": "other_flat",
    "flat.sidewalk": "sidewalk",
    "flat.terrain": "terrain",
    "static.manmade": "manmade",
    "static.vegetation": "vegetation",
}

# LiDAR axes on disk (x right, y forward) -> ours
NUSCENES_AXES = np.array([[0., 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

# columns of text; the others are numbers, see Table.numbers
TEXTS = {
    "token", "sensor_token", "sample_token", "ego_pose_token", "calibrated_sensor_token",
    "scene_token", "instance_token", "category_token", "sample_data_token",
    "channel", "filename", "name", "prev", "next",
}


# what nuscenes-devkit takes as truth of a box, by column
SCORED = {
    "attribute_tokens": "[] or one token of attribute.json",
    "num_lidar_pts": "a whole number",
    "num_radar_pts": "a whole number (0 where there is no radar)",
    "size": "three numbers above 0",
}


class Table:
    """One JSON table as columns.

    table["name"] is a list; `link`, `numbers` and `poses` give checked arrays.
    keep(row), where it is given, says which rows are needed.
    """

    def __init__(self, folder, name, columns, keep=None):
        self.path = folder / f"{name}.json"
        self.columns = ("token", *columns.split())
        if not self.path.is_file():
            raise DataError(f"{self.path}: this table is missing; "
                            f"extract the metadata archive of {folder.name} again")

        def parse(row):
            return self.pick(row) if keep is None or keep(row) else ()

        # rows become tuples as they are parsed: whole rows of the 2.6 million in sample_data would
        # need gigabytes
        with reading(self.path, "extract the metadata archive again"):
            text = self.path.read_bytes()
        try:
            rows = json.loads(text, object_hook=parse)
        except DataError:  # from pick; a DataError is a ValueError
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.path}: not a JSON list of rows ({error}); "
                            "extract the metadata archive again") from error
        if type(rows) is not list or any(type(row) is not tuple for row in rows):
            raise DataError(f"{self.path}: not a JSON list of rows; "
                            "extract the metadata archive again")
        rows = [row for row in rows if row]
        self.data = {column: () for column in self.columns}
        if rows:
            self.data = dict(zip(self.columns, zip(*rows)))
        for column in set(self.columns) & TEXTS:
            self.check_texts(column)
        self.row_of = {token: i for i, token in enumerate(self["token"])}
        if len(self.row_of) < len(rows):
            token, count = Counter(self["token"]).most_common(1)[0]
            raise DataError(f"{self.path}: token {token} occurs {count} times, expected once; "
                            "extract the metadata archive again")

    def pick(self, row):
        """A row (a dict) as a tuple of this table's columns."""
        for column in self.columns:
            if column not in row:
                raise DataError(f"{self.path}: row {row.get('token')} has no field {column}, "
                                f"only {sorted(row)}")
        return tuple(row[column] for column in self.columns)

    def check_texts(self, column):
        for i, value in enumerate(self[column]):
            if not (type(value) is str and len(value) <= 500 and value.isprintable()):
                token = str(self["token"][i])[:80]
                raise DataError(f"{self.path}: row {token} has {column} {str(value)[:80]!r}, "
                                "expected a short text; extract the metadata archive again")

    def __getitem__(self, column):
        return self.data[column]

    def __len__(self):
        return len(self.row_of)

    def link(self, column, other, rows=None, end=False):
        """Row numbers in table `other` of the tokens in `column`, of these rows or of all.

        With end=True an empty token is -1.
        """
        rows = range(len(self)) if rows is None else rows
        targets = np.array([other.row_of.get(self[column][i], -1) for i in rows], np.int64)
        for i in np.asarray(rows)[targets < 0]:
            if not (end and self[column][i] == ""):
                raise DataError(f"{self.path}: row {self['token'][i]} has {column} "
                                f"{self[column][i]!r}, and {other.path.name} has no such row; "
                                "the tables are incomplete: extract the metadata archive again")
        return targets

    def numbers(self, column, *shape, rows=None):
        """Finite numbers in `column` of these rows, or of all -> (len(rows), *shape) float64.

        A text is none, whatever it reads.
        """
        rows = range(len(self)) if rows is None else rows
        values = np.zeros((len(rows), *shape))
        for n, i in enumerate(rows):
            try:
                values[n] = self[column][i]
                valid = (abs(values[n]) < 2 ** 62).all() and not has_text(self[column][i])
            except (ValueError, TypeError, OverflowError):
                valid = False
            if not valid:
                count = " x ".join(map(str, shape)) or "one"
                raise DataError(f"{self.path}: row {self['token'][i]} has {column} "
                                f"{str(self[column][i])[:80]}, expected {count} finite number(s); "
                                "extract the metadata archive again")
        return values

    def poses(self):
        """Columns translation (m) and rotation (quaternion w, x, y, z) -> (len(self), 4, 4).

        float64, from the row's frame to its parent's.
        """
        quaternion = self.numbers("rotation", 4)
        norm = np.linalg.norm(quaternion, axis=1)
        bad = np.flatnonzero(abs(norm - 1) > 1e-3)
        if len(bad):
            token = self["token"][bad[0]]
            raise DataError(f"{self.path}: row {token} has a rotation of length "
                            f"{norm[bad[0]]:g}, expected a unit quaternion; "
                            "extract the metadata archive again")
        pose = np.tile(np.eye(4), (len(self), 1, 1))
        pose[:, :3, 3] = self.numbers("translation", 3)
        if len(self):
            rotation = Rotation.from_quat(quaternion[:, [1, 2, 3, 0]])  # scipy has w last
            pose[:, :3, :3] = rotation.as_matrix()
        return pose


def has_text(cell):
    """Whether a cell of a table is a text, or a list with one."""
    return str in map(type, cell) if type(cell) is list else type(cell) is str


def check_time_order(table, time, link, column):
    """Neighbours in a chain must lie in order of time.

    A cycle, however long, breaks that somewhere. time (n,), link (n,) row numbers or
    -1; column is "prev" or "next".
    """
    i = np.flatnonzero(link >= 0)
    if column == "prev":
        wrong = i[time[link[i]] >= time[i]]
        side = "before"
    else:
        wrong = i[time[link[i]] <= time[i]]
        side = "after"
    if len(wrong):
        row = wrong[0]
        raise DataError(f"{table.path}: row {table['token'][row]} has {column} "
                        f"{table[column][row]}, which does not lie {side} it in time; "
                        "the chain is cyclic or broken: extract the metadata archive again")


def pack(**columns):
    """Equally long arrays, or lists of str, which become bytes -> one structured array.

    It has a field for each of them.
    """
    for name, column in columns.items():
        if isinstance(column, (list, tuple)):
            columns[name] = np.char.encode(np.array(column, "U"))
    length = len(next(iter(columns.values())))
    dtype = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    packed = np.empty(length, dtype)
    for name, column in columns.items():
        packed[name] = column
    return packed


def official_splits(folder):
    """{scene name: "train", "val" or "test"}: the official lists, or the user's own.

    Own lists are in folder/splits.json, the devkit's place for them. Those whose names
    end in train, val or test replace the official list of that end.
    """
    from nuscenes.utils.splits import create_splits_scenes  # slow to import, needed only here
    official = create_splits_scenes()
    file = folder / "splits.json"
    own = {}
    if file.is_file():
        try:
            own = json.loads(file.read_bytes())
            if not all(type(scene) is str for scenes in own.values() for scene in scenes):
                raise TypeError("a name is not a text")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: not a JSON list of scene names for each split ({error}); "
                            "get the file again") from error

    ends = ("train", "val", "test")
    unused = [name for name in own if not name.endswith(ends)]
    if unused:
        print_once(f"{file}: {', '.join(unused)[:200]} not used; only lists whose names end in "
                   "train, val or test are")
    mini = "mini_" if folder.name == "v1.0-mini" else ""
    split_of = {}
    for end in ends:
        lists = [scenes for name, scenes in own.items() if name.endswith(end)]
        if not lists:
            lists = [official.get(mini + end, ())]
        for scene in (scene for scenes in lists for scene in scenes):
            if split_of.setdefault(scene, end) != end:
                raise DataError(f"{file}: {scene} is in {split_of[scene]} and in {end}, expected "
                                "one split for each scene; a list that is not in this file is the "
                                "official one")
    return split_of


class Samples(NamedTuple):
    """The keyframes of a version: the table `sample`, and what other tables say of each row."""
    table: Table
    time: np.ndarray     # (n,) int64, us
    scene: list          # (n,) name of its scene
    scene_row: np.ndarray  # (n,) row of its scene in scene.json
    channels: np.ndarray  # (1 + K,) those of CHANNELS that the tables have, LiDAR first
    sensors: np.ndarray  # (n, 1 + K) rows of sample_data
    order: np.ndarray    # (m,) the rows that are frames: on disk; scenes by start, then by time


def build_index(root, version):
    """Parse the tables of root/version into all that load() needs, checked.

    -> {name: structured array}, without a Python object:
    frames  token, scene, split; time (us); sensors (1 + K,) rows of `sensors`, LiDAR first;
            boxes (2,) first and last + 1 row of `boxes`; sweep, token of the keyframe sweep;
            scene_row, that of its scene in scene.json; lidarseg, the file with the classes of
            its points, empty where the tables have none
    sensors file; on_disk, whether it is there; to_world (4, 4), of the LiDAR in our axes;
            intrinsic (3, 3); height, width; time (us); prev, the sweep before or -1
    boxes   box (9,) as Frame.boxes but in the world; category, token, instance; label or -1;
            lidar_points
    counts  one row: frames in the tables; of them absent, without a keyframe sweep on disk,
            which are not in `frames`; sweeps that are no keyframes' in the tables and
            sweeps_on_disk; channels (7,) bool, which of CHANNELS the tables have
    categories  name; index, which stands for it in a lidarseg file, or -1
    """
    folder = Path(root) / version
    bar = tqdm(total=9, desc=f"{version}: reading the tables, once", unit=" tables",
               disable=None)  # None: quiet when not on a terminal

    def read(name, columns, keep=None):
        table = Table(folder, name, columns, keep)
        bar.update()
        return table

    data, channel, sensors = index_sensors(read, root)
    on_disk = sensors["on_disk"]
    samples = index_samples(read, root, version, data, channel, on_disk)
    boxes, bounds = index_boxes(read, samples)
    lidarseg, categories = index_point_labels(folder, data)
    split_of = official_splits(folder)
    bar.close()
    order = samples.order
    scene = [samples.scene[i] for i in order]
    frames = pack(
        token=[samples.table["token"][i] for i in order],
        scene=scene,
        split=[split_of.get(name, "") for name in scene],
        time=samples.time[order],
        sensors=samples.sensors[order],
        boxes=bounds,
        sweep=[data["token"][row] for row in samples.sensors[order, 0]],
        scene_row=samples.scene_row[order],
        lidarseg=[lidarseg.get(row, "") for row in samples.sensors[order, 0].tolist()],
    )
    older = (channel == 0) & ~np.array(data["is_key_frame"], bool)
    counts = pack(
        frames=np.array([len(samples.table)]),
        absent=np.array([len(samples.table) - len(order)]),
        sweeps=np.array([older.sum()]),
        sweeps_on_disk=np.array([(older & on_disk).sum()]),
        channels=np.isin(np.arange(len(CHANNELS)), samples.channels)[None],
    )
    return dict(frames=frames, sensors=sensors, boxes=boxes, counts=counts, categories=categories)


def index_sensors(read, root):
    """What was measured: every LiDAR sweep, and the images of keyframes.

    read(name, columns, keep) reads a table -> table sample_data; channel (n,), the
    place of each row's sensor in CHANNELS; `sensors` of the index.
    """
    # the sensors: radars get channel -1
    sensor = read("sensor", "channel")
    calibrated = read("calibrated_sensor",
                      "sensor_token translation rotation camera_intrinsic")
    others = [name for name in sensor["channel"] if name not in CHANNELS
              and not name.startswith("RADAR")]
    if others:
        print_once(f"{sensor.path}: {', '.join(others)[:200]} not read; the LiDAR and the cameras "
                   f"that are have the names {', '.join(CHANNELS)}")
    places = [CHANNELS.index(name) if name in CHANNELS else -1 for name in sensor["channel"]]
    channel = np.array(places)[calibrated.link("sensor_token", sensor)]
    cameras = np.flatnonzero(channel > 0)
    intrinsic = np.zeros((len(calibrated), 3, 3))
    intrinsic[cameras] = calibrated.numbers("camera_intrinsic", 3, 3, rows=cameras)
    channel_of = dict(zip(calibrated["token"], channel.tolist()))

    def is_needed(row):
        # a row of an unknown sensor is needed too, for link() to complain about
        place = channel_of.get(row.get("calibrated_sensor_token"), 0)
        return place == 0 or place > 0 and row.get("is_key_frame", True)

    data = read("sample_data",
                "sample_token ego_pose_token calibrated_sensor_token timestamp is_key_frame "
                "height width filename prev", is_needed)
    poses = set(data["ego_pose_token"])
    ego = read("ego_pose", "translation rotation", lambda row: row.get("token") in poses)

    calibration = data.link("calibrated_sensor_token", calibrated)
    channel = channel[calibration]
    lidar = channel == 0
    ego2world = ego.poses()[data.link("ego_pose_token", ego)]
    to_world = ego2world @ calibrated.poses()[calibration]
    to_world[lidar] = to_world[lidar] @ NUSCENES_AXES.T
    time = data.numbers("timestamp").astype(np.int64)
    sweeps = np.flatnonzero(lidar)
    prev = np.full(len(data), -1)
    prev[sweeps] = data.link("prev", data, rows=sweeps, end=True)
    check_time_order(data, time, prev, "prev")
    for token, flag in zip(data["token"], data["is_key_frame"]):
        if type(flag) is not bool:
            raise DataError(f"{data.path}: row {token} has is_key_frame {str(flag)[:80]!r}, "
                            "expected true or false; extract the metadata archive again")
    files = [path_inside(root, file, f"{data.path}: row {token}")
             for token, file in zip(data["token"], data["filename"])]
    sensors = pack(
        file=data["filename"],
        on_disk=files_on_disk(files),
        to_world=to_world,
        intrinsic=intrinsic[calibration],
        height=data.numbers("height").astype(np.int64),
        width=data.numbers("width").astype(np.int64),
        time=time,
        prev=prev,
    )
    return data, channel, sensors


def index_samples(read, root, version, data, channel, on_disk):
    """The keyframes, their sensors, and which of them are on disk -> Samples.

    data is the table sample_data; channel (n,), that of each of its rows; on_disk (n,),
    whether its file is there.
    """
    scene = read("scene", "name")
    sample = read("sample", "timestamp scene_token next")
    time = sample.numbers("timestamp").astype(np.int64)
    sample_scene = sample.link("scene_token", scene)
    check_time_order(sample, time, sample.link("next", sample, end=True), "next")
    start = np.full(len(scene), np.iinfo(np.int64).max)
    np.minimum.at(start, sample_scene, time)

    rows = np.flatnonzero(data["is_key_frame"])
    # data of one's own may have fewer cameras, the same ones in every sample
    channels = np.union1d(0, channel[rows])
    sensors = np.full((len(sample), len(channels)), -1)
    place = np.searchsorted(channels, channel[rows])
    sensors[data.link("sample_token", sample, rows=rows), place] = rows
    for i, c in np.argwhere(sensors < 0)[:1]:
        raise DataError(f"{data.path}: no key-frame row of {CHANNELS[channels[c]]} for sample "
                        f"{sample['token'][i]}, expected one of each sensor; "
                        "the tables are incomplete: extract the metadata archive again")
    if len(rows) > sensors.size:
        raise DataError(f"{data.path}: {len(rows)} key-frame rows for {len(sample)} samples, "
                        f"expected {len(channels)} each; extract the metadata archive again")

    order = np.lexsort((time, sample_scene, start[sample_scene]))
    order = order[on_disk[sensors[order, 0]]]
    if not len(order):
        raise DataError(f"{root}: none of the {len(sample)} frames of {version} has its "
                        "keyframe sweep under samples/LIDAR_TOP; extract the file blobs there")
    names = [scene["name"][s] for s in sample_scene]
    return Samples(sample, time, names, sample_scene, channels, sensors, order)


def files_on_disk(files):
    """Which of the files (a list of paths) exist -> (n,) bool. Lists each folder once."""
    places = [os.path.split(file) for file in files]
    listing = {folder: files_in(folder) for folder in {folder for folder, _ in places}}
    return np.array([name in listing[folder] for folder, name in places], bool)


def index_boxes(read, samples):
    """The annotations of all frames -> `boxes` of the index; (frames, 2) first and last + 1 row."""
    category = read("category", "name")
    instance = read("instance", "category_token")
    annotation = read("sample_annotation", "sample_token instance_token translation size "
                      "rotation prev next num_lidar_pts")
    sample = annotation.link("sample_token", samples.table)
    pose = annotation.poses()
    before = annotation.link("prev", annotation, end=True)
    after = annotation.link("next", annotation, end=True)
    time = samples.time[sample]
    check_time_order(annotation, time, before, "prev")
    check_time_order(annotation, time, after, "next")

    # velocity: from the box before to the box after; at an end of the chain, from or to itself
    first = np.where(before < 0, np.arange(len(annotation)), before)
    last = np.where(after < 0, np.arange(len(annotation)), after)
    span = (time[last] - time[first]) * 1e-6  # seconds, 0 for a lone box
    longest = np.where((before >= 0) & (after >= 0), 3., 1.5)  # [devkit] box_velocity
    known = (span > 0) & (span <= longest)
    shift = pose[last, :2, 3] - pose[first, :2, 3]
    velocity = shift / np.where(known, span, np.nan)[:, None]
    centre = pose[:, :3, 3]
    size = annotation.numbers("size", 3)[:, [1, 0, 2]]  # on disk w, l, h
    yaw = np.arctan2(pose[:, 1, 0], pose[:, 0, 0])
    box = np.concatenate([centre, size, yaw[:, None], velocity], 1)  # in the world

    # sort by frame, leave out boxes of samples that are no frames
    frame_of_sample = np.full(len(samples.table), -1)
    frame_of_sample[samples.order] = np.arange(len(samples.order))
    frame = frame_of_sample[sample]
    rows = np.argsort(frame, kind="stable")
    rows = rows[frame[rows] >= 0]
    bounds = np.searchsorted(frame[rows], np.arange(len(samples.order) + 1))

    lidar_points = annotation.numbers("num_lidar_pts").astype(np.int64)
    for i in np.flatnonzero(lidar_points < 0)[:1]:
        raise DataError(f"{annotation.path}: row {annotation['token'][i]} has num_lidar_pts "
                        f"{lidar_points[i]}, expected 0 or more; "
                        "extract the metadata archive again")
    category_of_instance = instance.link("category_token", category)
    categories = category_of_instance[annotation.link("instance_token", instance)]
    names = [category["name"][c] for c in categories]
    labels = [CLASSES.index(DETECTION[name]) if name in DETECTION else -1 for name in names]
    boxes = pack(
        box=box[rows],
        category=[names[i] for i in rows],
        token=[annotation["token"][i] for i in rows],
        instance=[annotation["instance_token"][i] for i in rows],
        label=np.array(labels, np.int64)[rows],
        lidar_points=lidar_points[rows],
    )
    return boxes, np.stack([bounds[:-1], bounds[1:]], 1)


def index_point_labels(folder, data):
    """nuScenes-lidarseg, where it is extracted: which file has the classes of a sweep's points.

    data: the table sample_data -> {row of data: file}, `categories` of the index.
    """
    category = Table(folder, "category", "name")
    names = category["name"]
    if not (folder / "lidarseg.json").exists():
        return {}, pack(name=names, index=np.full(len(names), -1))
    table = Table(folder, "lidarseg", "sample_data_token filename")
    rows = table.link("sample_data_token", data)
    try:
        index = Table(folder, "category", "name index").numbers("index").astype(np.int64)
    except DataError:  # that of the download without lidarseg: see check_point_labels
        index = np.full(len(names), -1)
    index[(index < 0) | (index > 255)] = -1
    return dict(zip(rows.tolist(), table["filename"])), pack(name=names, index=index)


def find_version(root, version):
    """Name of the folder of tables in root.

    It is `version` if given, else v1.0-trainval, else v1.0-mini, else the only one
    there is.
    """
    versions = sorted({path.parent.name for path in root.glob("v1.0-*/*.json")})
    if version in versions:
        return version
    if version is None:
        choices = ["v1.0-trainval", "v1.0-mini"]
        if len(versions) == 1:
            choices += versions
        for choice in choices:
            if choice in versions:
                if len(versions) > 1:
                    other = next(name for name in versions if name != choice)
                    print_once(f"{root}: {' and '.join(versions)} are here; reading {choice}. "
                               f"For another give its folder, such as {root / other}")
                return choice
    example = f", such as {root / versions[0]}" if versions else ""
    raise DataError(f"{root}: found {', '.join(versions) or 'no tables'}, "
                    f"not {version or 'v1.0-trainval or v1.0-mini'}; "
                    f"give the folder of the one that is meant{example}")


# the arrays of an index, each in its file
INDEX = ("frames", "sensors", "boxes", "counts", "categories")


def index_digest(folder, key):
    """Hash of an index's key and files -> str. It differs if they are damaged or another's."""
    digest = hashlib.sha256(key.encode())
    for name in INDEX:
        with open(folder / f"{name}.npy", "rb") as file:
            while block := file.read(2 ** 20):
                digest.update(block)
    return digest.hexdigest()


class NuScenes:
    """Reader of nuScenes, as it is downloaded.

    The root holds samples/, sweeps/ and v1.0-trainval, v1.0-mini, v1.0-test or other
    folders of tables. Scoring (finetune.py) also wants maps/. Of several versions one
    is taken, and printed: v1.0-trainval, else v1.0-mini. `--data ROOT/v1.0-mini` takes
    that one. Folders and files may be links to elsewhere; what the tables name may not
    be absolute or go upwards (path_inside).

    The official tables are read as they are. Opening parses them once, with a progress
    bar, into an index under cache_dir(), never inside the data set. The index is
    memory-mapped after that, so that reading a frame touches its own rows only.

    A partial download works: frames of which a file is missing are left out, and their
    number is printed. Where no sweep but the keyframes' is on disk, each frame has that
    one alone, which is printed too. If train or val has no frame on disk, both are cut
    80/20 in order of time from the frames on disk (split_frames). Own lists of scenes
    go into splits.json next to the tables (official_splits).

    A frame has the keyframe sweep and up to Grid.sweeps - 1 sweeps before it, moved to
    its place. The LiDAR's axes on disk (x right, y forward) become ours, intensity
    0..255 becomes 0..1, and the points on the car itself are taken off. The images
    (six, or those of CAMERAS that the tables have) are projected each from the car's
    pose at its own shutter. v1.0-test has no labels.

    .grid  .root  .version  .frames (structured array, a row a frame, see build_index)  .names
    .split(name)  .load(i)
    """

    LAYOUTS = {"nuScenes": ("v1.0-*/*.json",)}
    LAYOUT_HINT = "samples/ and v1.0-*/"

    def __init__(self, root, preset="paper", version=None, *, sweeps=None, images=True,
                 labels=True, point_labels=False):
        self.grid = choose_grid("nuscenes", preset, sweeps)
        self.sweeps = self.grid.sweeps  # of what is opened; a user may change .grid
        self.preset = preset
        self.images = images
        self.labels = labels
        self.point_labels = point_labels
        self.root = os.path.realpath(root)
        self.version = find_version(Path(self.root), version)
        self.what = f"{self.root}: nuScenes {self.version}"
        self.key = self.index_key()
        self.open_index()
        cameras = np.flatnonzero(self.counts["channels"][0, 1:])
        self.grid = replace(self.grid, cameras=tuple(CAMERAS[c] for c in cameras))
        self.notes = self.leave_out_frames()
        for note in self.notes:
            print_once(note)
        if point_labels:
            self.check_point_labels()

    def leave_out_frames(self):
        """Leave out the frames that lack a file of what is read -> notes, which say so."""
        counts = self.counts[0]
        notes = []
        if counts["absent"]:
            notes.append(f"{self.root}: {counts['absent']} of the {counts['frames']} frames of "
                         f"{self.version} have no keyframe sweep on disk and are left out")
        if self.images:
            notes += self.leave_out_without("images", self.frames["sensors"][:, 1:])
            if not self.grid.cameras:
                raise DataError(f"{self.what}: the tables have no camera; expected some of "
                                f"{', '.join(CAMERAS)}. finetune.py --modality lidar reads none")
        absent = counts["sweeps"] - counts["sweeps_on_disk"]
        if absent and not counts["sweeps_on_disk"] and self.sweeps > 1:
            notes.append(f"{self.root}: no sweep but the keyframes' is on disk: each frame has "
                         f"that one alone, not up to {self.sweeps}; extract sweeps/ of the "
                         "LiDAR blobs to have them (--preset small needs none)")
        elif absent:
            notes += self.leave_out_without("older sweeps", self.older_sweeps())
        return notes

    def leave_out_without(self, what, rows):
        """Leave out frames of which a file is missing -> notes, none where all are there.

        rows (n, files) of .sensors for each frame, -1 for none; what they are.
        """
        missing = (rows >= 0) & ~self.sensors["on_disk"][rows]
        lacking = missing.any(1)
        if not lacking.any():
            return []
        first = self.sensors["file"][rows[missing][0]].decode()
        cameras = ""
        if what == "images":
            counts = dict(zip(self.grid.cameras, missing.sum(0)))
            cameras = f" ({describe_counts(counts)})"
        message = (f"{self.root}: {lacking.sum()} of the {len(lacking)} frames of {self.version} "
                   f"lack {what}{cameras}; the first file is {first}")
        hint = "finetune.py --modality lidar" if what == "images" else "--preset small"
        if lacking.all():
            raise DataError(f"{message}; extract these file blobs too ({hint} reads none)")
        self.frames = self.frames[~lacking]
        return [f"{message}; these frames are left out. To have them, extract these file blobs "
                f"too ({hint} reads none)"]

    def older_sweeps(self):
        """Rows of .sensors of the sweeps before each frame's own, -1 for none.

        -> (n, sweeps - 1)
        """
        row = self.frames["sensors"][:, 0]
        older = np.full((len(row), self.sweeps - 1), -1)
        for n in range(self.sweeps - 1):
            row = np.where(row < 0, -1, self.sensors["prev"][row])
            older[:, n] = row
        return older

    def index_key(self):
        """Names the index: changes with any table, and with the folders of the file blobs."""
        state = []
        for path in Path(self.root, self.version).glob("*.json"):
            stat = path.stat()
            # a copy may keep size and mtime, but never the ctime
            state.append((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        for folder in ("samples", "sweeps"):
            # the folders in them: more blobs may be extracted later
            for path in Path(self.root, folder).glob("*"):
                if path.exists():  # a link may lead nowhere
                    state.append((str(path), path.stat().st_mtime_ns))
        key = repr((VERSION, INDEX_VERSION, sorted(state)))
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def open_index(self):
        folder = cache_dir() / f"index-{self.key}"
        if self.map_index(folder):
            return
        with locked(folder):
            if self.map_index(folder):  # another process was first
                return
            index = build_index(self.root, self.version)
            part = temp_path(folder)
            try:
                shutil.rmtree(folder, ignore_errors=True)
                part.mkdir()
                for name in INDEX:
                    np.save(part / f"{name}.npy", index[name], allow_pickle=False)
                (part / "digest").write_text(index_digest(part, self.key))
            except OSError as error:
                shutil.rmtree(part, ignore_errors=True)
                raise not_writable(folder, error) from error
            try:
                part.rename(folder)
            except OSError:  # another process was first (see locked): its index is as good
                shutil.rmtree(part)
            if not self.map_index(folder):
                raise DataError(f"{folder}: this index cannot be read back; "
                                "point LIDAR_CAMERA_CACHE to another folder")

    def map_index(self, folder):
        """Map the index if it is there and whole -> whether it is.

        Its digest is compared first, 0.3 s for all of nuScenes. An index without one is
        from before there was any.
        """
        digest = folder / "digest"
        try:
            if digest.exists() and digest.read_text() != index_digest(folder, self.key):
                raise ValueError("its digest is of other bytes")
            self.frames, self.sensors, self.boxes, self.counts, self.categories = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in INDEX)
            return True
        except FileNotFoundError:
            return False  # not built yet
        except PermissionError as error:
            raise DataError(f"{folder}: this index of another user cannot be read; let its owner "
                            "open it, or point LIDAR_CAMERA_CACHE to another folder") from error
        except Exception as error:  # whatever numpy makes of bytes that are not its own
            print_once(f"{folder}: damaged ({error}), built again")
            return False

    def __getstate__(self):
        """What a worker receives: no array, since it maps the index itself."""
        return {name: value for name, value in self.__dict__.items()
                if not isinstance(value, np.ndarray)}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.open_index()
        self.leave_out_frames()

    def __len__(self):
        return len(self.frames)

    def name(self, i):
        return f"nuscenes/{self.frames['scene'][i].decode()}/{self.frames['token'][i].decode()}"

    @property
    def names(self):
        return [self.name(i) for i in range(len(self))]

    def split(self, name):
        """Frame numbers of "train", "val" or "test" -> (n,) int64. See split_frames.

        Scenes are ordered by their start, frames by time.
        """
        return split_frames(self.what, self.frames["split"], name)

    def files(self, i):
        """The files of frame i below the root: the keyframe sweep and the images.

        The file of point labels too where they are read.
        """
        files = [self.sensors["file"][row].decode() for row in self.frames["sensors"][i]]
        if self.point_labels:
            files.append(self.frames["lidarseg"][i].decode())
        return files

    def fingerprint(self):
        """What tells whether the data set is still the same -> {what: digest}."""
        digest = hashlib.sha256()
        for array in (self.frames, self.sensors, self.boxes):
            digest.update(array)
        index = f"index {VERSION}.{INDEX_VERSION}"
        tables = {f"tables of {self.version}, {index}": digest.hexdigest()[:16]}
        return tables | file_digests(self)

    def load(self, i, image=None):
        """Read frame i -> Frame. image (H, W) is the size of its images, default the grid's."""
        name = self.name(i)
        row = self.frames[i]
        lidar = self.sensors[row["sensors"][0]]
        lidar2world = np.array(lidar["to_world"])
        world2lidar = np.linalg.inv(lidar2world)
        points, on_car = self.merge_sweeps(lidar, world2lidar, name)
        extra = {}
        if self.point_labels:
            label = np.full(len(points), -1)
            own = self.point_truth(i, len(on_car))[~on_car]
            label[:len(own)] = own  # the keyframe sweep comes first
            extra["points_label"] = label
        images = []
        world2img = np.zeros((0, 4, 4))
        if self.images:
            images, world2img = self.camera_images(row, image or self.grid.image, name)
        boxes = labels = None
        if len(self.boxes):  # v1.0-test has no annotation at all
            rows = self.annotations(i)
            rows = rows[rows["label"] >= 0]
            boxes = warp_boxes(rows["box"], world2lidar).astype(np.float32)
            labels = rows["label"].astype(np.int64)
        return Frame(
            points=points,
            origin=np.zeros(3, np.float32),
            images=images,
            lidar2img=projections(world2img @ lidar2world, self.grid.cameras, name,
                                  self.calibration_files(i)),
            lidar2world=lidar2world,
            time=row["time"] * 1e-6,
            boxes=boxes,
            labels=labels,
            extra=extra,
            name=name,
        )

    def merge_sweeps(self, lidar, world2lidar, name):
        """The keyframe sweep `lidar` and those before it, in its place.

        -> points (N, 5) float32; which points of the keyframe's file are on the car, and not
        among them (n,) bool.

        Those before it that are not on disk are passed over: see leave_out_frames.
        """
        clouds = []
        key_on_car = None
        for sensor in self.chain(lidar):
            columns = self.read_sweep(sensor, name)
            on_car = is_on_car(columns)
            if sensor is lidar:
                key_on_car = on_car
            columns = np.compress(~on_car, columns, 1)  # a third of the time of columns[:, mask]
            if sensor is not lidar:
                move = (world2lidar @ sensor["to_world"]).astype(np.float32)  # product in float64
                columns[:3] = move[:3, :3] @ columns[:3] + move[:3, 3:]
            columns[4] = (lidar["time"] - sensor["time"]) * 1e-6
            clouds.append(columns)
        points = np.empty((sum(cloud.shape[1] for cloud in clouds), 5), np.float32)
        return np.concatenate(clouds, 1, out=points.T).T, key_on_car

    def chain(self, lidar):
        """The keyframe sweep `lidar`, then those of the Grid.sweeps - 1 before it on disk."""
        yield lidar
        sensor = lidar
        for _ in range(self.grid.sweeps - 1):
            if sensor["prev"] < 0:
                return
            sensor = self.sensors[sensor["prev"]]
            if sensor["on_disk"]:
                yield sensor

    def camera_images(self, row, size, name):
        """Images of a frame (a row of .frames) -> K x (3, H, W) uint8; world2img (K, 4, 4).

        LiDAR -> world -> camera goes through each sensor's own ego pose: the car moves
        up to a metre between sweep and shutter.
        """
        cameras = self.sensors[row["sensors"][1:]]
        images = []
        crops = []
        for camera in cameras:
            file = path_inside(self.root, camera["file"].decode(), name)
            expected = camera["width"], camera["height"]
            pixels, crop = read_image(file, size, name, expected)
            images.append(pixels)
            crops.append(crop)
        camera2img = np.tile(np.eye(4), (len(cameras), 1, 1))
        camera2img[:, :3, :3] = np.stack(crops) @ cameras["intrinsic"]
        return images, camera2img @ np.linalg.inv(cameras["to_world"])

    def sweep(self, i):
        """The keyframe sweep of frame i as it is on disk, ego vehicle included.

        -> (N, 5) float32: x forward, y left, z up; intensity; ring.
        """
        columns = self.read_sweep(self.sensors[self.frames["sensors"][i, 0]], self.name(i))
        return np.ascontiguousarray(columns.T)

    def read_sweep(self, sensor, name):
        """One file of the LiDAR -> (5, N) float32: x forward, y left, z up, intensity, ring.

        Columns: whatever is done to them takes a third of the time of rows.
        """
        file = path_inside(self.root, sensor["file"].decode(), name)
        with reading(name, "extract the LiDAR blobs (samples and sweeps) again", file):
            raw = np.fromfile(file, np.uint8)
        if raw.size == 0 or raw.size % 20:
            raise DataError(f"{name}: {file} has {raw.size} bytes, expected N x 20 (five float32 "
                            "for each point, N > 0); the file is truncated: extract it again")
        columns = np.ascontiguousarray(raw.view(np.float32).reshape(-1, 5).T)
        x, y, z, intensity, ring = columns
        low = columns.min(1)
        high = columns.max(1)  # NaN where any is
        if not ((low[:3] > -300).all() and (high[:3] < 300).all()
                and low[3] >= 0 and high[3] <= 255):
            raise DataError(f"{name}: {file} has columns from {low} to {high}, expected finite "
                            "x, y, z within 300 m and intensity in 0..255; the file is damaged or "
                            "not five float32 for each point: extract it again. Of your own "
                            "LiDAR, scale the intensity and leave out points that are not finite")
        # a file of 4 floats a point can pass for one of 5 by its size; its "rings" give it away
        if not (low[4] >= 0 and high[4] <= 255) or (ring != np.rint(ring)).any():
            raise DataError(f"{name}: {file} has rings from {low[4]:g} to {high[4]:g}, expected "
                            "whole numbers in 0..255; is it written with another number of floats "
                            "for each point than 5?")
        return np.stack([y, -x, z, intensity / 255, ring])  # NUSCENES_AXES

    def annotations(self, i):
        """All boxes of frame i, as structured rows.

        box (9,) float64 as Frame.boxes but in the world, category, token, instance,
        label (-1: a category outside the detection task), lidar_points (in the keyframe
        sweep).
        """
        return self.boxes[slice(*self.frames["boxes"][i])]

    def check_point_labels(self):
        """End if the classes of the points cannot be read, of all frames that are."""
        tables = f"{self.root}/{self.version}"
        lacking = self.frames["lidarseg"] == b""
        if lacking.all():
            raise NoPointLabels(f"{tables}: no lidarseg.json, which lists the classes of points; "
                                "extract the archive of nuScenes-lidarseg here too")
        if (self.categories["index"] < 0).any():
            raise DataError(f"{tables}/category.json: not every row has an index from 0 to 255; it "
                            "is that of the download without lidarseg: put the category.json of "
                            "the archive of nuScenes-lidarseg in its place")
        files = [self.root + "/" + file.decode() for file in self.frames["lidarseg"]]
        on_disk = files_on_disk(files)
        if not on_disk.all():
            first = files[np.flatnonzero(~on_disk)[0]]
            if lacking.any():
                first = f"those of frame {self.name(np.flatnonzero(lacking)[0])}"
            raise DataError(f"{self.what}: of {len(files)} frames {(~on_disk).sum()} have no file "
                            f"of point labels, first {first}; extract the archive of "
                            "nuScenes-lidarseg again")

    def point_truth(self, i, n):
        """The class of each of the n points in the file of frame i -> (n,) int64, -1 for none."""
        name = self.name(i)
        file = path_inside(self.root, self.frames["lidarseg"][i].decode(), name)
        with reading(name, "extract the archive of nuScenes-lidarseg again", file):
            ids = np.fromfile(file, np.uint8)
        if len(ids) != n:
            raise DataError(f"{name}: {file} has {len(ids)} labels, expected one for each of the "
                            f"{n} points of its sweep; extract it again")
        classes = POINT_CLASSES["nuscenes"]
        label = np.full(256, -2)
        for category, index in zip(self.categories["name"], self.categories["index"]):
            class_name = SEGMENTATION.get(category.decode())
            label[index] = classes.index(class_name) if class_name else -1
        truth = label[ids]
        if (truth == -2).any():
            raise DataError(f"{name}: {file} has the label {ids[truth == -2][0]}, of which "
                            f"{self.version}/category.json has no row; the two do not belong "
                            "together: extract the archive of nuScenes-lidarseg again")
        return truth

    def points_on_disk(self, i, classes):
        """Classes of the points of load(i) -> of all points in the file, and their truth.

        Points on the car itself, which load leaves out, become driveable surface: the truth
        has no class there.
        classes (n,) -> two (N,) int64.
        """
        on_car = is_on_car(self.sweep(i).T)
        full = np.full(len(on_car), POINT_CLASSES["nuscenes"].index("driveable_surface"))
        full[~on_car] = classes[:(~on_car).sum()]
        return full, self.point_truth(i, len(on_car))

    def write_points(self, folder, i, classes):
        """The result file of frame i in the official format. classes (N,) as on disk."""
        token = self.frames["sweep"][i].decode()
        path = Path(folder, "lidarseg", self.eval_set, f"{token}_lidarseg.bin")
        path.parent.mkdir(parents=True, exist_ok=True)
        (classes + 1).astype(np.uint8).tofile(path)
        about = Path(folder, self.eval_set, "submission.json")
        if not about.exists():
            about.parent.mkdir(exist_ok=True)
            sources = "camera", "lidar", "radar", "map", "external"
            meta = {f"use_{source}": source == "lidar" for source in sources}
            about.write_text(json.dumps(dict(meta=meta)))

    @property
    def eval_set(self):
        """The devkit's name of the val split."""
        return "mini_val" if self.version == "v1.0-mini" else "val"

    def every_kth(self, indices, k):
        """Every k-th scene of these frames, from the k-th, in the tables' order [code SLidR]."""
        rows = self.frames["scene_row"][indices]
        scenes = np.unique(rows)[k - 1::k]
        if not len(scenes):
            raise DataError(f"{self.what}: {len(np.unique(rows))} scenes, of which every {k}-th is "
                            "asked for; give a larger --fraction")
        return indices[np.isin(rows, scenes)]

    def lacking_for_scoring(self):
        """What nuscenes-devkit would trip over when it scores the val frames -> list of str.

        It opens tables, columns and images that load() does not read.
        """
        folder = Path(self.root, self.version)
        try:
            Table(folder, "visibility", "")
            Table(folder, "sensor", "modality")
            log = Table(folder, "log", "")
            maps = Table(folder, "map", "filename log_tokens")
            return self.map_faults(maps, log) + self.truth_faults(folder)
        except DataError as error:
            return [f"{error} (nuscenes-devkit wants it when it scores)"]

    def map_faults(self, maps, log):
        """Maps that are missing, and logs that are on no map -> list of str."""
        faults = []
        for file in maps["filename"]:
            path = path_inside(self.root, file, maps.path)
            if not os.path.isfile(path):
                faults.append(f"{path} is missing, which nuscenes-devkit opens before it scores; "
                              "extract the maps/ of the metadata archive too")
        on_a_map = {str(token) for tokens in maps["log_tokens"] for token in tokens}
        lost = [token for token in log["token"] if token not in on_a_map]
        if lost or not len(maps):
            faults.append(f"{maps.path}: of {len(log)} logs {len(lost)} are in the log_tokens of "
                          f"none of its {len(maps)} rows, first {lost[:1]}; nuscenes-devkit wants "
                          "each log on a map when it scores: extract the metadata archive again")
        return faults

    def truth_faults(self, folder):
        """Val frames and their boxes that cannot be truth of the metric -> list of str."""
        val = self.split("val")
        faults = []
        for token in self.frames["token"][val]:
            if b"/" in token:
                faults.append(f"{folder / 'sample.json'}: token {token.decode()!r}, expected one "
                              "without a slash, which separates the parts of a frame's name; "
                              "correct the tables")
        boxes = np.concatenate([self.annotations(i) for i in val])
        boxes = boxes[boxes["label"] >= 0]  # the metric knows no others
        size_of = {box["token"].decode(): box["box"][3:6] for box in boxes}
        attribute = Table(folder, "attribute", "name")
        truth = Table(folder, "sample_annotation", "attribute_tokens num_lidar_pts num_radar_pts",
                      lambda row: row.get("token") in size_of)
        wrong = {}  # column: [(token, value)]
        for n, token in enumerate(truth["token"]):
            names = truth["attribute_tokens"][n]
            if not (isinstance(names, list) and len(names) <= 1
                    and all(str(name) in attribute.row_of for name in names)):
                wrong.setdefault("attribute_tokens", []).append((token, names))
            for column in ("num_lidar_pts", "num_radar_pts"):
                if type(truth[column][n]) is not int:
                    wrong.setdefault(column, []).append((token, truth[column][n]))
            if not (size_of[token] > 0).all():
                wrong.setdefault("size", []).append((token, size_of[token].tolist()))
        for column, cells in wrong.items():
            token, value = cells[0]
            faults.append(f"{truth.path}: row {token} has {column} {str(value)[:80]}, expected "
                          f"{SCORED[column]}, without which nuscenes-devkit cannot score; so have "
                          f"{len(cells)} of {len(truth)} boxes of val: correct the table, or "
                          "extract the metadata archive again")
        return faults

    def calibration_files(self, i):
        """Which files say where the cameras of frame i are: for messages."""
        return f"{self.version}/calibrated_sensor.json and ego_pose.json"

    def label_evidence(self, i):
        """How many boxes of frame i hold as many points of the keyframe sweep as they should.

        -> that number, the number of boxes, and what this tests.
        """
        points = self.sweep(i)
        rows = self.annotations(i)
        to_world = self.sensors[self.frames["sensors"][i, 0]]["to_world"]
        world = points[:, :3].astype(np.float64) @ to_world[:3, :3].T + to_world[:3, 3]
        right = 0
        for row in rows:
            right += inside_box(world, row["box"]).sum() == row["lidar_points"]
        test = (f"boxes hold the number of LiDAR points that "
                f"{self.version}/sample_annotation.json states")
        return right, len(rows), test


def is_on_car(columns):
    """Which points of a sweep are on the car that carries the LiDAR. columns (5, N) -> (N,) bool.

    3 % of it lie beyond the devkit's |x|, |y| < 1: bonnet and tail; nothing else fits in this
    place [ours].
    """
    x, y = columns[:2]
    return (x > -1.5) & (x < 2.5) & (abs(y) < 1)


# ---- KITTI: object frames, raw drives or sequences -----------------------------------

KITTI_TYPES = (
    "Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare",
)
KITTI_LABEL = [
    ("type", "U14"),
    ("truncated", "f8"),
    ("occluded", "i8"),
    ("alpha", "f8"),
    ("bbox", "f8", 4),      # left, top, right, bottom, px
    ("hwl", "f8", 3),
    ("location", "f8", 3),  # middle of the bottom face in rectified camera 0
    ("rotation_y", "f8"),
    ("box", "f8", 9),       # as Frame.boxes
    ("label", "i8"),
]

# class of the segmentation task -> its ids in SemanticKITTI's labels, the written one first
SEMANTIC_KITTI = {
    "car": (10, 252),
    "bicycle": (11,),
    "motorcycle": (15,),
    "truck": (18, 258),
    "other-vehicle": (20, 13, 16, 256, 257, 259),
    "person": (30, 254),
    "bicyclist": (31, 253),
    "motorcyclist": (32, 255),
    "road": (40, 60),
    "parking": (44,),
    "sidewalk": (48,),
    "other-ground": (49,),
    "building": (50,),
    "fence": (51,),
    "vegetation": (70,),
    "trunk": (71,),
    "terrain": (72,),
    "pole": (80,),
    "traffic-sign": (81,),
}
NO_CLASS = (0, 1, 52, 99)     # unlabelled, outlier, other structure, other object
# the official splits of the sequences; others have none
SEQUENCES = {
    **dict.fromkeys(("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"), "train"),
    "08": "val",
    **dict.fromkeys(map(str, range(11, 22)), "test"),
}


class KittiFile(NamedTuple):
    """Where the files of one frame are, relative to the root."""
    name: str
    split: str                    # train, val, test or "" (object frames that no ImageSet lists)
    cloud: str
    image: str
    calibration: tuple[str, ...]  # one file, two of a raw frame; a sequence may have none
    labels: str                   # of boxes, "" where there are none
    points: str = ""              # of points, likewise


def read_calibration(path, keys, name):
    """Lines "key: numbers" of a calibration file; other lines are not looked at.

    keys {key: shape} -> list of float64 arrays in their order.
    """
    try:
        with reading(name, "extract the calibration files again", path):
            text = Path(path).read_text()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {path} is not text ({error}); "
                        "extract the calibration files again") from error
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    arrays = []
    for key, shape in keys.items():
        if key not in lines:
            raise DataError(f"{name}: {path} has no line {key}, only {', '.join(lines) or 'none'};"
                            " extract the calibration files again")
        try:
            array = np.array(lines[key].split(), np.float64)
        except ValueError:
            array = np.full(0, np.nan)
        if array.size != np.prod(shape) or not np.isfinite(array).all():
            raise DataError(f"{name}: {path} has {key}:{lines[key][:80]}, expected "
                            f"{np.prod(shape)} finite numbers; "
                            "extract the calibration files again")
        arrays.append(array.reshape(shape))
    return arrays


def read_rows(path, width, owner):
    """A text file of `width` numbers in each line -> (n, width) float64, n = 0 without a file."""
    if not os.path.isfile(path):
        return np.zeros((0, width))
    with reading(owner, "extract it again", path):
        lines = Path(path).read_bytes().rstrip().splitlines()
    try:
        rows = np.array([line.split() for line in lines], np.float64)
    except ValueError:  # no number, or lines of different lengths
        rows = np.zeros(0)
    if rows.shape[1:] != (width,) or not (abs(rows) < 1e6).all():
        raise DataError(f"{owner}: {path}: expected {width} finite numbers in each of its "
                        f"{len(lines)} lines; extract it again")
    return rows


class Kitti:
    """Reader of KITTI: the left colour camera (image_2) and the full scans.

    The root holds object frames, training/ with testing/ and ImageSets/ where they are;
    or raw drives, <date>/<date>_drive_<n>_sync/ (the folder of one date will do); or the
    odometry set's sequences/<nn>/, which SemanticKITTI labels (or dataset/ with them). Of
    several, the first of these is read, and it is printed how to take another; where the
    classes of points are asked for, the sequences. Folders and files may be links to
    elsewhere.

    Object frames: velodyne/ (else velodyne_reduced/), image_2/ (png or jpg) and calib/
    are needed; label_2/ in training/ too, or not at all. Splits are those of
    ImageSets/. Without ImageSets, or where no frame of train or val is on disk,
    labelled frames are cut 80/20 in their order (split_frames). train.txt without
    val.txt is an error, and the other way round. Frames that lack a file, and those of
    ImageSets that are not on disk, are left out, and their number is printed. Object
    frames have no time.

    Raw drives have no labels. Their frames have a time (10 Hz). Frames that lack a scan
    or an image are left out, and their number is printed.

    Sequences: velodyne/ is needed, and image_2/ and calib.txt where images are read. 00 to
    07, 09 and 10 are train, 08 is val and 11 to 21 test. Line n of times.txt and poses.txt
    belongs to scan n; without them scans are 0.1 s apart, and lidar2world is the identity,
    as it is without calib.txt. The LiDAR of the first scan is the world. labels/ holds the
    classes of points. They have no boxes.

    The others have no pose here: lidar2world is the identity. The sizes of the images vary,
    and each is resized to the grid's. Boxes are of cars, pedestrians and cyclists;
    their labels end where the image does, so training wants crop=True (Loader), and
    crop_to_view makes the "reduced" clouds. The range lies ahead of the car, so only y
    is mirrored in training.

    .grid  .root  .layout (a key of LAYOUTS)  .frames (list of KittiFile)  .names  .split(name)
    .load(i)
    """

    LAYOUTS = {
        "object frames": ("training/velodyne", "testing/velodyne",
                          "training/velodyne_reduced", "testing/velodyne_reduced"),
        "raw drives": ("*_drive_*_sync/velodyne_points", "*/*_drive_*_sync/velodyne_points"),
        "sequences": ("sequences/[0-9][0-9]/velodyne", "dataset/sequences/[0-9][0-9]/velodyne"),
    }
    LAYOUT_HINT = "training/velodyne, <date>/<date>_drive_<n>_sync or sequences/<nn>/velodyne"

    def __init__(self, root, preset="paper", *, sweeps=None, images=True, labels=True,
                 point_labels=False):
        self.grid = choose_grid("kitti", preset, sweeps)
        self.preset = preset
        self.images = images
        self.labels = labels
        self.point_labels = point_labels
        self.notes = []
        self.root = os.path.realpath(root)
        places = {}  # layout -> its folders of scans
        for layout, patterns in self.LAYOUTS.items():
            folders = []
            for pattern in patterns:
                folders += sorted(Path(self.root).glob(pattern))
            if folders:
                places[layout] = folders
        self.layout = "sequences" if point_labels else next(iter(places))
        if self.layout not in places:
            raise NoPointLabels(f"{self.root}: KITTI's {' and '.join(places)} have no classes of "
                                "points; give a folder with SemanticKITTI's sequences/<nn>/, "
                                "velodyne and labels")
        self.what = f"{self.root}: KITTI {self.layout}"
        if len(places) > 1:
            self.describe_choice(places)
        if self.layout == "object frames":
            self.frames = self.find_object_frames()
        elif self.layout == "raw drives":
            self.frames = self.find_raw_frames(places[self.layout])
        else:
            self.frames = self.find_sequence_frames(places[self.layout])
        if not self.frames:
            nested = [path for folder in places[self.layout] for path in folder.glob("0*/*.bin")]
            hint = "extract the scans (.bin) and left colour images (.png)"
            if nested:
                hint = (f"{nested[0].relative_to(self.root)} is of the tracking set, whose layout "
                        "is not read; extract the object frames, or raw drives")
            if self.layout == "sequences":
                hint = ("extract velodyne/, image_2/ and calib.txt of the odometry set (segment.py "
                        "reads velodyne/ and labels/ alone)")
            raise DataError(f"{self.root}: no whole frame among its {self.layout}; "
                            f"{' '.join([*self.notes, hint])}")
        for note in self.notes:
            print_once(note)

    def describe_choice(self, places):
        """Say which of several layouts is read, and how to take another. places: their folders."""
        hints = []
        if self.layout == "sequences":
            hints = ["Only their points have classes"]
        elif "raw drives" in places:
            date = places["raw drives"][0].parent.parent
            hints.append(f"For the drives of one day give {date}, for all of them a folder that "
                         "holds only the dates")
        if self.layout != "sequences" and "sequences" in places:
            parent = places["sequences"][0].parents[2]
            if str(parent) == self.root:
                parent = "a folder that holds only them"
            hints.append(f"For the sequences give {parent}")
        print_once(f"{self.root}: {' and '.join(places)} are here; reading the {self.layout}. "
                   + ". ".join(hints))

    def list_files(self, folder, *endings):
        """{name without its ending: path under the root} of the files in a folder."""
        files = {}
        for file in sorted(files_in(os.path.join(self.root, folder))):
            stem, ending = os.path.splitext(file)
            if ending in endings and file[0] != ".":  # "._": a Mac's
                if not file.isprintable():
                    raise DataError(f"{self.root}: {folder} has a file {file!r}, whose name is "
                                    "not text; rename it")
                files[stem] = f"{folder}/{file}"
        return files

    def read_image_sets(self):
        """{(folder, number): split} of the lists in ImageSets/."""
        folder = Path(self.root, "ImageSets")
        has_train = (folder / "train.txt").is_file()
        has_val = (folder / "val.txt").is_file()
        if has_train != has_val:
            present = "train" if has_train else "val"
            raise DataError(f"{self.root}: ImageSets has {present}.txt alone, expected train.txt "
                            "and val.txt, or neither; put the other next to it")
        split_of = {}
        for split in ("train", "val", "test"):
            path = folder / f"{split}.txt"
            entries = ()
            if path.is_file():
                entries = path.read_text("utf-8-sig", errors="replace").split()
            part = "testing" if split == "test" else "training"
            for number, entry in enumerate(entries, 1):
                if not re.fullmatch(r"[0-9]+", entry):
                    raise DataError(f"{path}: entry {number} is {entry[:80]!r}, expected digits "
                                    "only, the number of a frame; correct it")
                if split_of.setdefault((part, entry), split) != split:
                    raise DataError(f"{path}: frame {entry} is in {split_of[part, entry]}.txt too,"
                                    " expected one split for each frame; get the files again")
        return split_of

    def find_object_frames(self):
        """Frames of training/ and testing/ by number; splits from ImageSets/ where it is."""
        split_of = self.read_image_sets()
        frames = []
        on_disk = set()
        lacking = Counter()  # kind of file: frames without it
        missing = []
        for folder in ("training", "testing"):
            is_there = {kind: os.path.isdir(os.path.join(self.root, folder, kind))
                        for kind in ("velodyne", "velodyne_reduced", "label_2")}
            reduced = is_there["velodyne_reduced"] and not is_there["velodyne"]
            scans = "velodyne_reduced" if reduced else "velodyne"
            files = {
                scans: self.list_files(f"{folder}/{scans}", ".bin"),
                "image_2": self.list_files(f"{folder}/image_2", ".png", ".jpg"),
                "calib": self.list_files(f"{folder}/calib", ".txt"),
                "label_2": self.list_files(f"{folder}/label_2", ".txt"),
            }
            if reduced:
                self.notes.append(f"{self.root}: {folder} has no velodyne/; velodyne_reduced/ is "
                                  "read, the points that the image shows.")
            labelled = folder == "training" and is_there["label_2"]
            needed = [scans, "calib"]
            needed += ["image_2"] * self.images + ["label_2"] * (labelled and self.labels)
            # all calibrations and labels next to a few scans are nothing unusual
            for number in sorted(files[scans].keys() | files["image_2"].keys()):
                on_disk.add((folder, number))
                absent = [kind for kind in needed if number not in files[kind]]
                if absent:
                    lacking.update(absent)
                    missing.append(f"{folder}/{absent[0]} of {number}")
                    continue
                if folder == "testing":
                    split = "test"
                else:
                    split = split_of.get((folder, number), "" if split_of else "train")
                labels = f"{folder}/label_2/{number}.txt" if labelled else ""
                frames.append(KittiFile(
                    f"kitti/{folder}/{number}", split, files[scans][number],
                    files["image_2"].get(number, ""), (files["calib"][number],), labels))
        if missing:
            self.notes.append(f"{self.root}: {len(missing)} of the {len(on_disk)} object frames "
                              f"lack files ({describe_counts(lacking)}), the first is "
                              f"{missing[0]}; these frames are left out. To have them, extract "
                              "these files too.")
        absent = len(split_of.keys() - on_disk)
        if absent:
            self.notes.append(f"{self.root}: {absent} of the {len(split_of)} frames in ImageSets "
                              "have no scan or image on disk and are left out.")
        return frames

    def find_raw_frames(self, places):
        """Frames of every drive in order of time.

        Those without a scan, an image (some drives lack a few scans) or a calibration
        are left out, and their number is printed.
        """
        frames = []
        left_out = 0
        for place in places:
            drive = place.parent.relative_to(self.root)
            clouds = self.list_files(drive / "velodyne_points/data", ".bin")
            images = self.list_files(drive / "image_02/data", ".png", ".jpg")
            calibration = (str(drive.parent / "calib_cam_to_cam.txt"),
                           str(drive.parent / "calib_velo_to_cam.txt"))
            numbers = clouds.keys() & images.keys() if self.images else clouds.keys()
            numbers = {number for number in numbers if re.fullmatch(r"[0-9]+", number)}
            if not all(os.path.isfile(os.path.join(self.root, file)) for file in calibration):
                numbers = set()
            left_out += len(clouds.keys() | images.keys()) - len(numbers)
            for number in sorted(numbers):
                frames.append(KittiFile(
                    name=f"kitti/{place.parent.name}/{number}",
                    split="",
                    cloud=clouds[number],
                    image=images.get(number, ""),
                    calibration=calibration,
                    labels=""))
        if left_out:
            self.notes.append(f"{self.root}: {left_out} raw frames have only a scan or only an "
                              "image, no number for a name, or no calibration (calib_*_to_cam.txt "
                              "of their day), and are left out.")
        return frames

    def find_sequence_frames(self, places):
        """Frames of every sequence in order of their numbers.

        Those without an image or a calibration are left out where images are read, and
        their number is printed.
        """
        frames = []
        self.tracks = {}  # sequence: times (n,), poses (n, 12)
        lacking = Counter()  # kind of file: frames without it
        missing = []
        parent = places[0].parents[1]  # sequences/ of the root, rather than of its dataset/
        for place in (place for place in places if place.parents[1] == parent):
            sequence = place.parent.name
            folder = str(place.parent.relative_to(self.root))
            clouds = self.list_files(f"{folder}/velodyne", ".bin")
            images = self.list_files(f"{folder}/image_2", ".png", ".jpg")
            labels = self.list_files(f"{folder}/labels", ".label")
            numbers = sorted(number for number in clouds if re.fullmatch(r"[0-9]+", number))
            calibration = ()
            if os.path.isfile(os.path.join(self.root, folder, "calib.txt")):
                calibration = (f"{folder}/calib.txt",)
            self.tracks[sequence] = self.read_track(folder, numbers)
            for number in numbers:
                absent = ["image_2"] * (self.images and number not in images)
                absent += ["calib.txt"] * (self.images and not calibration)
                if absent:
                    lacking.update(absent)
                    missing.append(f"{folder}/{absent[0]} of {number}")
                    continue
                frames.append(KittiFile(
                    name=f"kitti/{sequence}/{number}",
                    split=SEQUENCES.get(sequence, ""),
                    cloud=clouds[number],
                    image=images.get(number, ""),
                    calibration=calibration,
                    labels="",
                    points=labels.get(number, "")))
        if missing:
            self.notes.append(f"{self.root}: {len(missing)} of the {len(missing) + len(frames)} "
                              f"scans lack files ({describe_counts(lacking)}), the first is "
                              f"{missing[0]}; these frames are left out. To have them, extract "
                              "these files too.")
        return self.labelled_frames(frames) if self.point_labels and frames else frames

    def labelled_frames(self, frames):
        """Those of the frames that have classes of points: not the official test's.

        DataError if another one has none.
        """
        labelled = [frame for frame in frames if frame.points]
        if not labelled:
            raise NoPointLabels(f"{self.what}: no labels/*.label next to velodyne/, the classes of "
                                "points; extract the labels of SemanticKITTI here too")
        missing = [frame for frame in frames if not frame.points and frame.split != "test"]
        if missing:
            raise DataError(f"{self.what}: of {len(frames)} scans {len(missing)} have no file of "
                            f"point labels, first that of {missing[0].cloud}; extract the labels "
                            "of SemanticKITTI again")
        if len(labelled) < len(frames):
            self.notes.append(f"{self.what}: {len(frames) - len(labelled)} of its {len(frames)} "
                              "scans are of the official test, have no labels and are left out")
        return labelled

    def read_track(self, folder, numbers):
        """Times (n,) s and poses (n, 12) of a sequence, with a row for each of the scans.

        Either is empty where its file is not there. numbers: of the scans, sorted.
        """
        track = []
        for file, width in (("times.txt", 1), ("poses.txt", 12)):
            path = os.path.join(self.root, folder, file)
            rows = read_rows(path, width, self.what)
            if len(rows) and numbers and int(numbers[-1]) >= len(rows):
                raise DataError(f"{self.what}: {path} has {len(rows)} lines, expected one for each "
                                f"scan from 0 to {numbers[-1]}; extract it again")
            track.append(rows)
        times, poses = track
        return times[:, 0], poses

    def __len__(self):
        return len(self.frames)

    @property
    def names(self):
        return [frame.name for frame in self.frames]

    def split(self, name):
        """Frame numbers of "train", "val" or "test" -> (n,) int64. See split_frames."""
        split_of = np.array([frame.split.encode() for frame in self.frames])
        return split_frames(self.what, split_of, name)

    def files(self, i):
        """The files of frame i below the root."""
        frame = self.frames[i]
        files = [frame.cloud, frame.image, *frame.calibration, frame.labels]
        files += [frame.points] * self.point_labels
        return [file for file in files if file]

    def fingerprint(self):
        """What tells whether the data set is still the same -> {what: digest}."""
        return file_digests(self)

    def load(self, i, image=None):
        """Read frame i -> Frame. image (H, W) is the size of its image, default the grid's."""
        frame = self.frames[i]
        scan = self.sweep(i)
        points = np.zeros((len(scan), 5), np.float32)  # one sweep: 0 s before itself
        points[:, :4] = scan
        extra = {}
        if self.point_labels:
            extra["points_label"] = self.point_truth(i, len(points))
        lidar2rect = rect2img = None
        if frame.calibration:
            lidar2rect, rect2img = self.calibration(i)
        images = []
        lidar2img = np.zeros((0, 4, 4))
        if self.images:
            file = os.path.join(self.root, frame.image)
            # no expected size: it varies between recording days
            pixels, crop = read_image(file, image or self.grid.image, frame.name)
            images = [pixels]
            lidar2img = (pad_to_4x4(crop) @ rect2img @ lidar2rect)[None]
        boxes = labels = None
        if frame.labels:
            boxes, labels = frame_boxes(self, i)
        time = 0.
        lidar2world = np.eye(4)
        if self.layout == "raw drives":
            time = 0.1 * int(frame.name.rsplit("/", 1)[1])  # 10 Hz
        elif self.layout == "sequences":
            time, lidar2world = self.time_and_pose(frame, lidar2rect)
        return Frame(
            points=points,
            origin=np.zeros(3, np.float32),
            images=images,
            lidar2img=projections(lidar2img, self.grid.cameras, frame.name,
                                  self.calibration_files(i)),
            lidar2world=lidar2world,
            time=time,
            boxes=boxes,
            labels=labels,
            extra=extra,
            name=frame.name,
        )

    def time_and_pose(self, frame, lidar2rect):
        """Time (s) of a sequence's frame and its lidar2world (4, 4), the first scan's LiDAR.

        lidar2rect (4, 4) or None.
        """
        _, sequence, number = frame.name.split("/")
        times, poses = self.tracks[sequence]
        time = float(times[int(number)]) if len(times) else 0.1 * int(number)  # 10 Hz
        lidar2world = np.eye(4)
        if len(poses) and lidar2rect is not None:
            rect2first = pad_to_4x4(poses[int(number)].reshape(3, 4))
            lidar2world = np.linalg.inv(lidar2rect) @ rect2first @ lidar2rect
        return time, lidar2world

    def sweep(self, i):
        """Full scan of frame i as it is on disk.

        -> (N, 4) float32: x forward, y left, z up; reflectance 0..1.
        """
        name = self.frames[i].name
        file = os.path.join(self.root, self.frames[i].cloud)
        with reading(name, "extract it again", file):
            raw = np.fromfile(file, np.uint8)
        if raw.size == 0 or raw.size % 16:
            raise DataError(f"{name}: {file} has {raw.size} bytes, expected N x 16 (four float32 "
                            "for each point, N > 0); the file is truncated: extract it again")
        points = raw.view(np.float32).reshape(-1, 4)
        columns = np.ascontiguousarray(points.T)
        low = columns.min(1)
        high = columns.max(1)  # NaN where any is
        if not ((low[:3] > -300).all() and (high[:3] < 300).all()
                and low[3] >= 0 and high[3] <= 1):
            raise DataError(f"{name}: {file} has columns from {low} to {high}, expected finite "
                            "x, y, z within 300 m and reflectance in 0..1; the file is damaged or "
                            "not four float32 for each point: extract it again. Of your own "
                            "LiDAR, scale the intensity to 0..1 and leave out points that are "
                            "not finite")
        return points

    def calibration(self, i):
        """-> lidar2rect (4, 4), rect2img (4, 4), both float64.

        lidar2rect goes from the LiDAR to rectified camera 0, where the labels are,
        rect2img from there to the pixels on disk.
        """
        frame = self.frames[i]
        paths = [os.path.join(self.root, file) for file in frame.calibration]
        if not paths:
            raise DataError(f"{frame.name}: no calib.txt of its sequence; extract the calibration "
                            "files of the odometry set too")
        if self.layout == "object frames":
            keys = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}
            P, R, T = read_calibration(paths[0], keys, frame.name)
        elif self.layout == "sequences":
            P, T = read_calibration(paths[0], {"P2": (3, 4), "Tr": (3, 4)}, frame.name)
            R = np.eye(3)  # the rectification is in Tr
        else:
            keys = {"P_rect_02": (3, 4), "R_rect_00": (3, 3)}
            P, R = read_calibration(paths[0], keys, frame.name)
            T = read_calibration(paths[1], {"R": (3, 3), "T": (3, 1)}, frame.name)
            T = np.concatenate(T, 1)
        lidar2rect = pad_to_4x4(R) @ pad_to_4x4(T)
        turn = lidar2rect[:3, :3]
        if not np.allclose(turn @ turn.T, np.eye(3), atol=0.05):
            raise DataError(f"{frame.name}: {' and '.join(paths)}: the rectification times the "
                            f"rotation from the LiDAR is {turn.round(3).tolist()}, expected a "
                            "rotation; extract the calibration files again")
        return lidar2rect, pad_to_4x4(P)

    def annotations(self, i):
        """Label rows of frame i as they are on disk, "DontCare" included.

        -> structured rows (KITTI_LABEL), none for a frame without labels. box is NaN
        for DontCare, label is -1 outside Grid.classes.
        """
        frame = self.frames[i]
        if not frame.labels:
            return np.zeros(0, KITTI_LABEL)
        path = Path(self.root, frame.labels)
        try:
            with reading(frame.name, "extract the labels again", path):
                text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{frame.name}: {path} cannot be read ({error}); "
                            "extract the labels again") from error
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = np.zeros(len(lines), KITTI_LABEL)
        for row, (n, line) in enumerate(lines):
            kind, *words = line.split()
            try:
                v = np.array(words, np.float64)
            except ValueError:
                v = np.zeros(0)
            valid = v.shape in ((14,), (15,)) and (abs(v) < 1e6).all()  # NaN is not; 15: a score
            label = self.grid.classes.index(kind) if kind in self.grid.classes else -1
            if not valid or label >= 0 and not (0 < v[7:10].min() <= v[7:10].max() < 100):
                raise DataError(f"{frame.name}: {path}, line {n} is {line[:200]!r}, expected a "
                                "class and 14 finite numbers, with sides of the box between 0 and "
                                "100 m; correct it, or extract the labels again")
            if kind not in KITTI_TYPES:
                print_once(f"{self.what}: objects of class {kind[:80]!r} count as none of "
                           f"{', '.join(self.grid.classes)}; {path} has one")
                kind = "Misc"
            truncated, occluded, alpha = v[:3]
            rows[row] = (kind, truncated, occluded, alpha, v[3:7], v[7:10], v[10:13], v[13],
                         np.nan, label)

        rect2lidar = np.linalg.inv(self.calibration(i)[0])
        turn = rect2lidar[:3, :3]
        # the middle of the box: the camera's y points down
        centre = rows["location"] - rows["hwl"][:, :1] / 2 * [0, 1, 0]
        # the yaw is -(rotation_y + pi / 2), but for the sensors' tilt
        angle = rows["rotation_y"]
        heading = np.stack([np.cos(angle), np.zeros(len(angle)), -np.sin(angle)], 1) @ turn.T
        yaw = np.arctan2(heading[:, 1], heading[:, 0])
        velocity = np.full((len(angle), 2), np.nan)
        rows["box"] = np.concatenate([
            centre @ turn.T + rect2lidar[:3, 3],
            rows["hwl"][:, ::-1],
            yaw[:, None],
            velocity,
        ], 1)
        rows["box"][rows["type"] == "DontCare"] = np.nan
        return rows

    def point_truth(self, i, n):
        """The class of each of the n points in the file of frame i -> (n,) int64, -1 for none."""
        frame = self.frames[i]
        file = os.path.join(self.root, frame.points)
        with reading(frame.name, "extract the labels of SemanticKITTI again", file):
            raw = np.fromfile(file, np.uint8)
        if raw.size != 4 * n:
            raise DataError(f"{frame.name}: {file} has {raw.size} bytes, expected {4 * n}, a "
                            f"uint32 for each of the {n} points of its scan; extract it again")
        ids = raw.view("<u4") & 0xFFFF  # above it is the instance
        label = np.full(2**16, -2)
        label[list(NO_CLASS)] = -1
        for c, name in enumerate(POINT_CLASSES["kitti"]):
            label[list(SEMANTIC_KITTI[name])] = c
        truth = label[ids]
        if (truth == -2).any():
            raise DataError(f"{frame.name}: {file} has the label {ids[truth == -2][0]}, expected "
                            "one of SemanticKITTI's; extract the labels again")
        return truth

    def points_on_disk(self, i, classes):
        """Classes of the points of load(i) -> of all points in the file, the same, and their truth.

        classes (N,) -> two (N,) int64.
        """
        return classes, self.point_truth(i, len(classes))

    def write_points(self, folder, i, classes):
        """The result file of frame i in the official format. classes (N,) as on disk."""
        _, sequence, number = self.frames[i].name.split("/")
        path = Path(folder, "sequences", sequence, "predictions", f"{number}.label")
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = [SEMANTIC_KITTI[name][0] for name in POINT_CLASSES["kitti"]]
        np.array(ids, "<u4")[classes].tofile(path)

    def every_kth(self, indices, k):
        """Every k-th of these frames, from the first [code SLidR]."""
        return indices[::k]

    def picture_size(self, i):
        """Width and height of frame i's image as it is on disk, px: they vary.

        Where no image is on disk (see open_dataset), 1242 x 375, which most have.
        """
        frame = self.frames[i]
        if not frame.image:
            return 1242, 375
        file = os.path.join(self.root, frame.image)
        with reading(frame.name, "extract it again", file):
            with Image.open(file) as image:
                return image.size

    def image_shows(self, i, points):
        """Which points the image of frame i, as it is on disk, shows.

        points (N, 3 or more) -> (N,) bool.
        """
        lidar2rect, rect2img = self.calibration(i)
        width, height = self.picture_size(i)
        return visible_points(points, (rect2img @ lidar2rect)[None], [(height, width)])[0]

    def calibration_files(self, i):
        """Which files say where the camera of frame i is: for messages."""
        return " and ".join(self.frames[i].calibration)

    def label_evidence(self, i):
        """Whether 3-D boxes project onto 2-D boxes: of the cars of frame i, plainly in the image.

        -> how many do (IoU > 0.7), how many such cars, and what this tests.
        """
        rows = self.annotations(i)
        lidar2rect, rect2img = self.calibration(i)
        lidar2img = rect2img @ lidar2rect
        rows = rows[(rows["type"] == "Car") & (rows["truncated"] == 0) & (rows["occluded"] == 0)]
        right = 0
        for row in rows:
            uvd = box_corners(row["box"]) @ lidar2img[:3, :3].T + lidar2img[:3, 3]
            uv = uvd[:, :2] / uvd[:, 2:]
            projected = np.concatenate([uv.min(0), uv.max(0)])
            right += rectangle_iou(projected, row["bbox"]) > 0.7
        test = ("unoccluded cars of label_2 whose projected box meets their 2-D box "
                "with an IoU above 0.7")
        return right, len(rows), test


def rectangle_iou(a, b):
    """Intersection over union of two rectangles (left, top, right, bottom)."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = np.prod(np.clip(sides, 0, None))
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


# ---- Waymo Open Dataset v2: parquet tables, a file for each segment and component ----

WAYMO_TYPES = {1: "Vehicle", 2: "Pedestrian", 4: "Cyclist"}  # 3 is signs, not a detection class
WAYMO_BOX = [
    ("box", "f8", 9),         # as Frame.boxes
    ("label", "i8"),          # -1 for signs
    ("lidar_points", "i8"),
    ("difficulty", "i8"),     # 1, 2; 0 where none is stated
    ("token", "U64"),
]
# a Waymo camera looks along x, z up -> right, down, forward
CAMERA_AXES = np.array([[0., -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
TOP = 1                       # the laser that stands at `origin`
OTHER_LASER_AGE = 0.001       # s: the other lasers' points are no rays from `origin`
TIME_KEY = "key.frame_timestamp_micros"
RANGE_IMAGE = ["range_image_return1.values", "range_image_return1.shape"]
# of camera_image: when its pose holds, when the shutter opened and the last column was read (s),
# and the vehicle's motion (m/s in the world, rad/s around its own axes); may be absent
SHUTTER = (
    "pose_timestamp",
    "rolling_shutter_params.camera_trigger_time",
    "rolling_shutter_params.camera_readout_done_time",
    *(f"velocity.linear_velocity.{axis}" for axis in "xyz"),
    *(f"velocity.angular_velocity.{axis}" for axis in "xyz"),
)

# rows of a frame in the large components
ROWS_A_FRAME = dict(lidar=5, lidar_pose=1, camera_image=5)
POINT_COMPONENT = "lidar_segmentation"  # classes of points: TOP, a row for labelled frames alone
# of them those that every frame needs: column, numbers in it
NEEDED_ROWS = dict(
    lidar=("key.laser_name", (TOP,)),
    lidar_pose=("key.laser_name", (TOP,)),
    camera_image=("key.camera_name", tuple(range(1, len(WAYMO_CAMERAS) + 1))),
)
# what is read here; testing has no lidar_box
COMPONENTS = (*ROWS_A_FRAME, "lidar_calibration", "vehicle_pose", "lidar_box",
              "camera_calibration")


class WaymoFrame(NamedTuple):
    folder: str   # training, validation or testing
    segment: str
    time: int     # us, start of the scan


def range_image_points(distance, extrinsic, inclinations, pixel_poses=None, vehicle2world=None):
    """Range image -> points in the vehicle's place at the frame's pose, float64.

    distance (H, W) m, > 0 where something was hit; extrinsic (4, 4) laser to vehicle;
    inclinations (H,) rad, lowest beam first; pixel_poses (H, W, 6) roll, pitch, yaw, x,
    y, z of the vehicle when each pixel was shot (TOP only), vehicle2world (4, 4) -> (n,
    3), rows (n,), columns (n,). Source: the official range_image_utils.
    """
    W = distance.shape[1]
    row, column = np.nonzero(distance > 0)
    inclination = inclinations[::-1][row]  # row 0 is the highest beam
    mounting = np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    azimuth = ((W - column - 0.5) / W * 2 - 1) * np.pi - mounting
    ray = np.stack([
        np.cos(azimuth) * np.cos(inclination),
        np.sin(azimuth) * np.cos(inclination),
        np.sin(inclination),
    ], 1)
    points = (ray * distance[row, column, None]) @ extrinsic[:3, :3].T + extrinsic[:3, 3]
    if pixel_poses is not None:
        pose = pixel_poses[row, column].astype(np.float64)
        world2vehicle = np.linalg.inv(vehicle2world)
        # the shift first: coordinates of 10 km keep their millimetres
        shift = pose[:, 3:] - vehicle2world[:3, 3]
        turned = Rotation.from_euler("xyz", pose[:, :3]).apply(points)
        points = (turned + shift) @ world2vehicle[:3, :3].T
    return points, row, column


def rows_at_time(file, columns, key, time):
    """The rows of an open parquet file where column `key` is `time` -> a table of these columns.

    Decoded a few rows at a time and no further than needed: a row group of the official
    files has 256 rows, of pixel poses a whole segment, 800 MB.
    """
    import pyarrow
    times = file.read([key], use_threads=False)[key].to_numpy()
    large = any(column.endswith(("values", "image")) for column in columns)
    batches = []
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        rows = np.flatnonzero(times[start:end] == time)
        if len(rows):
            batches += take_rows(file, group, columns, rows, 4 if large else 4096)
        start = end
    schema = pyarrow.schema([file.schema_arrow.field(column) for column in columns])
    return pyarrow.Table.from_batches(batches, schema)


def take_rows(file, group, columns, rows, size):
    """Rows (n,) of a row group of an open parquet file, `size` of them decoded at a time.

    Yields record batches.
    """
    import pyarrow
    start = 0
    for batch in file.iter_batches(size, [group], columns, use_threads=False):
        end = start + len(batch)
        in_batch = rows[(rows >= start) & (rows < end)] - start
        if len(in_batch):
            yield batch.take(pyarrow.array(in_batch))
        if end > rows[-1]:
            return
        start = end


def segment_files(path, components):
    """The files of the segment whose vehicle_pose file is `path`, one for each component."""
    folder = path.parents[1]
    return [folder / component / path.name for component in components
            if (component, folder.name) != ("lidar_box", "testing")]


def regroup(root, target):
    """Copy a Waymo folder, as far as Waymo reads it, into files with small row groups.

    The large files of the copy have a row group for the rows of each frame, so that a
    frame is read without what lies before it. A file that the copy has already is left
    as it is: the same call goes on after an interruption.
    """
    import pyarrow
    import pyarrow.parquet as parquet
    files = []
    for component in (*COMPONENTS, POINT_COMPONENT):
        files += sorted(Path(root).glob(f"*/{component}/[!.]*.parquet"))
    if not files:
        raise DataError(f"{root}: no parquet file of the Waymo Open Dataset v2 here; "
                        f"give the folder that holds {Waymo.LAYOUT_HINT}")
    for path in tqdm(files, unit=" files", disable=None):
        copy = Path(target) / path.relative_to(root)
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_name(copy.name + ".part")
        rows = (ROWS_A_FRAME | {POINT_COMPONENT: 1}).get(path.parent.name)
        try:
            if rows:
                with parquet.ParquetFile(path, buffer_size=2**20) as file, \
                        parquet.ParquetWriter(part, file.schema_arrow) as writer:
                    for batch in file.iter_batches(rows):
                        writer.write_batch(batch)
            else:
                shutil.copyfile(path, part)
            os.replace(part, copy)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, pyarrow.ArrowException):
                raise DataError(f"{path} is not a whole parquet file ({str(error)[:120]}); "
                                "download it again") from error
            raise


class Waymo:
    """Reader of the Waymo Open Dataset v2: <split>/<component>/<segment>.parquet.

    The root holds training/, validation/ and, where it is, testing/, each with one
    folder of parquet files for each component. lidar, lidar_pose, lidar_calibration,
    vehicle_pose, lidar_box (not in testing), camera_image and camera_calibration are
    needed. Segments that lack one are left out, and so are frames that lack the picture
    of a camera, as some of the official ones do; their number is printed. Folders and
    files may be links to elsewhere. lidar_segmentation, the classes of points, is of some
    frames alone: where they are asked for, the others are left out and counted. Points of
    the other lasers have no class.

    pyarrow reads a few rows at a time: no TensorFlow, no conversion. The official files
    have large row groups, of which everything before the wanted rows must be decoded
    too. `python data.py ROOT --regroup FOLDER` writes a copy with small ones: of a
    fabricated file of 198 rows, 1.6 MB each, a row takes 1.3 to 2.0 s, from the copy
    0.02 s.

    Points are the first returns of all lasers outside no-label zones: beams from the
    highest down, azimuth corrected for the mounting, TOP's rays from the vehicle's pose
    at each pixel, intensity through tanh. The points of the four short-range lasers
    carry 1 ms of age, because they were not shot from `origin`, where TOP stands. The
    frame is the vehicle's: x forward, y left, z up from the road.

    Images are freed of their lens distortion after resizing, and each is projected from
    the vehicle's pose when its middle column is exposed. That is exact in this column,
    and everywhere for a vehicle at rest in a rigid world. The cameras read their
    columns one after the other (rolling shutter), which no single matrix follows: at
    3.7 m/s and 50 ms, the official projection differs by 5 of 1920 px in the median
    within 10 m and by 1 px at 20 to 40 m in the front image, by 17 and 4 px in a side
    image. Testing has no labels. No real Waymo frame may be shared, so all this is
    tested on a fabricated segment in the official column names and types.

    .grid  .root  .frames (list of WaymoFrame)  .names  .split(name)  .load(i)
    """

    LAYOUTS = {"segments": (
        "training/vehicle_pose/*.parquet",
        "validation/vehicle_pose/*.parquet",
        "testing/vehicle_pose/*.parquet",
    )}
    LAYOUT_HINT = "training/vehicle_pose/<segment>.parquet"
    SPLITS = {"training": "train", "validation": "val", "testing": "test"}

    def __init__(self, root, preset="paper", *, sweeps=None, images=True, labels=True,
                 point_labels=False):
        self.grid = choose_grid("waymo", preset, sweeps)
        self.preset = preset
        self.images = images
        self.labels = labels
        self.point_labels = point_labels
        self.notes = []
        self.root = os.path.realpath(root)
        self.what = f"{self.root}: Waymo v2"
        unread = ("camera_image", "camera_calibration") * (not images)
        unread += ("lidar_box",) * (not labels)
        self.components = [component for component in COMPONENTS if component not in unread]
        segments = []  # their vehicle_pose files
        for folder in self.SPLITS:
            segments += sorted(Path(self.root, folder, "vehicle_pose").glob("[!.]*.parquet"))
        files = [file for path in segments for file in segment_files(path, self.components)]
        listing = {folder: files_in(folder) for folder in {file.parent for file in files}}
        missing = [file for file in files if file.name not in listing[file.parent]]
        partial = {(file.parents[1].name, file.name) for file in missing}
        if len(partial) == len(segments):
            raise DataError(f"{self.what}: none of its {len(segments)} segments is whole, "
                            f"{missing[0]} is missing; download every component: "
                            f"{', '.join(self.components)} (pre-training reads no lidar_box, "
                            "finetune.py --modality lidar no camera)")
        if partial:
            self.notes.append(f"{self.what}: {len(partial)} of its {len(segments)} segments lack "
                              f"files and are left out; the first is {missing[0]}")
        # pre-training may do without them
        self.has_boxes = any(Path(self.root).glob("*/lidar_box/*.parquet"))
        if point_labels and not any(Path(self.root).glob(f"*/{POINT_COMPONENT}/[!.]*.parquet")):
            raise NoPointLabels(f"{self.what}: no classes of points; download the component "
                                f"{POINT_COMPONENT}")

        self.last_returns = -1, None  # frame, its first_returns
        self.frames = []
        total = 0
        unlabelled = 0  # whole frames without classes of points
        lacking = Counter()  # component and sensor: frames without it
        for path in segments:
            folder = path.parents[1].name
            if (folder, path.name) in partial:
                continue
            segment = WaymoFrame(folder, path.stem, time=0)
            (times,) = self.read(segment, "vehicle_pose", [TIME_KEY])
            total += len(times)
            whole = self.whole_times(segment, times, self.components, lacking)
            if point_labels:
                labelled = self.labelled_times(segment)
                unlabelled += len(whole) - len(labelled.intersection(whole))
                whole = [time for time in whole if time in labelled]
            for time in whole:
                self.frames.append(segment._replace(time=int(time)))
        if not total:
            raise DataError(f"{self.what}: no frame in its vehicle_pose files; "
                            "download them again")
        if lacking:
            left_out = total - len(self.frames) - unlabelled
            self.notes.append(f"{self.what}: {left_out} of its {total} frames "
                              f"lack rows ({describe_counts(lacking)}) and are left out")
        if unlabelled:
            self.notes.append(f"{self.what}: {unlabelled} of its {total} frames have no row in "
                              f"{POINT_COMPONENT}, as most of the official ones, and are left out")
        if not self.frames:
            raise DataError(f"{self.notes[-1]}; none is left, download these components again")
        for note in self.notes:
            print_once(note)

    def whole_times(self, segment, times, components, lacking):
        """Those of the times of a segment's frames at which each sensor has its row, sorted.

        lacking (a Counter) is told what is not there.
        """
        whole = set(times)
        for component, (key, sensors) in NEEDED_ROWS.items():
            if component not in components:
                continue
            if self.count_rows(segment, component) == ROWS_A_FRAME[component] * len(times):
                continue  # the official number: no row need be read
            present = set(zip(*self.read(segment, component, [key, TIME_KEY])))
            for sensor in sensors:
                without = {time for time in times if (sensor, time) not in present}
                if without:
                    lacking[f"{component} of {key[4:-5]} {sensor}:"] += len(without)
                whole -= without
        return sorted(whole)

    def labelled_times(self, segment):
        """The times at which the points of a segment's TOP have classes -> set of int."""
        file = Path(self.root, segment.folder, POINT_COMPONENT, f"{segment.segment}.parquet")
        if not file.exists():  # no frame of this segment is labelled
            return set()
        lasers, times = self.read(segment, POINT_COMPONENT, ["key.laser_name", TIME_KEY])
        return {time for laser, time in zip(lasers, times) if laser == TOP}

    def read(self, frame, component, columns, all_times=False):
        """Columns of one component of a frame's segment -> a list of values for each column.

        The rows are those of the frame's time; with time 0 or all_times, every row.
        columns are "key.x", or "field.subfield" without the component's own prefix.
        Nothing is kept in memory.
        """
        one_time = frame.time and not all_times
        with self.open_file(frame, component) as (file, where):
            needed = [*columns, TIME_KEY] if one_time else columns
            full = self.full_names(file.schema_arrow, needed, where)
            selected = [full[column] for column in columns if column in full]
            if one_time:
                table = rows_at_time(file, selected, full[TIME_KEY], frame.time)
            else:
                table = file.read(selected, use_threads=False)
            values = []
            for column in columns:
                if column in full:
                    array = table[full[column]]
                    values.append(array if column.endswith("values") else array.to_pylist())
                else:
                    values.append([None] * len(table))
        may_be_null = ("beam_inclination", "difficulty", "num_lidar", "speed", *SHUTTER)
        for column in columns:
            if not column.startswith(may_be_null) and table[full[column]].null_count:
                raise DataError(f"{where} has rows without {column}; download it again")
        return values

    def count_rows(self, frame, component):
        """Rows of one component of a frame's segment, from the end of the file alone."""
        with self.open_file(frame, component) as (file, _):
            return file.metadata.num_rows

    @contextmanager
    def open_file(self, frame, component):
        """The open parquet file of a component of a frame's segment, and where it is.

        What pyarrow finds wrong with it meanwhile becomes a DataError.
        """
        import pyarrow
        import pyarrow.parquet as parquet
        path = os.path.join(self.root, frame.folder, component, f"{frame.segment}.parquet")
        where = f"{self.name_of(frame)}: {path}"
        try:
            # a buffer of so many bytes: without it a whole column of a row group is held
            with reading(self.name_of(frame),
                         f"download the component {component} of this segment", path):
                open(path, "rb").close()  # what the system says, before pyarrow
            with parquet.ParquetFile(path, buffer_size=2**20) as file:
                yield file, where
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            size = os.path.getsize(path)
            raise DataError(f"{where} is not a whole parquet file ({str(error)[:120]}), "
                            f"{size} bytes; download it again") from error

    def full_names(self, schema, columns, where):
        """{column: its name in the file}, each with a type that it may have.

        Those of SHUTTER may be absent.
        """
        full = {}
        for column in columns:
            names = [name for name in schema.names
                     if name == column or name.endswith("]." + column)]
            if not names and column in SHUTTER:
                continue
            if not names:
                raise DataError(f"{where} has no column {column}, "
                                f"only {', '.join(schema.names)[:200]}; "
                                "expected version 2 of the data set: download it again")
            full[column] = names[0]
            kind = schema.field(names[0]).type
            if not self.has_valid_type(column, kind):
                raise DataError(f"{where} has {kind} in column {column}; "
                                "expected version 2 of the data set: download it again")
        return full

    @staticmethod
    def has_valid_type(column, kind):
        """Whether a column of the data set may be of this Arrow type.

        It may be lists of numbers, an image's bytes, a text, or a number.
        """
        from pyarrow import types
        if column.endswith(("values", "shape", "transform")):
            if not hasattr(kind, "value_type"):
                return False
            return types.is_floating(kind.value_type) or types.is_integer(kind.value_type)
        if types.is_dictionary(kind):  # as other programs write the same values
            kind = kind.value_type
        if column == "image":
            return types.is_binary(kind) or types.is_large_binary(kind)
        if column == "key.laser_object_id":
            return types.is_string(kind) or types.is_large_string(kind)
        if types.is_integer(kind):
            return True
        return types.is_floating(kind) and column != "type" and not column.startswith("key.")

    def read_by(self, frame, component, key, columns, all_times=False):
        """As read, but by row -> {value of column `key`: list of the row's other values}."""
        keys, *values = self.read(frame, component, [key, *columns], all_times)
        return {key: row for key, *row in zip(keys, *values)}

    def arrays(self, frame, component, columns, shape):
        """Images of float numbers of one frame, by laser -> {laser: (H, W, shape)} float32.

        columns are (values, shape).
        """
        images = {}
        rows = self.read_by(frame, component, "key.laser_name", columns)
        for laser, (value, size) in rows.items():
            flat = np.asarray(value.values, np.float32)
            if size is None or len(size) != 3 or size[2] != shape or flat.size != np.prod(size):
                raise DataError(f"{self.name_of(frame)}: {component} of laser {laser} has "
                                f"{flat.size} values for the shape {size}, expected "
                                f"H x W x {shape}; download it again")
            images[int(laser)] = flat.reshape(size)
        return images

    @staticmethod
    def name_of(frame):
        return f"waymo/{frame.segment}/{frame.time}"

    def __len__(self):
        return len(self.frames)

    @property
    def names(self):
        return [self.name_of(frame) for frame in self.frames]

    def split(self, name):
        """Frame numbers of "train", "val" or "test" -> (n,) int64. See split_frames."""
        split_of = np.array([self.SPLITS[frame.folder].encode() for frame in self.frames])
        return split_frames(self.what, split_of, name)

    def files(self, i):
        """The files of the segment of frame i below the root."""
        frame = self.frames[i]
        first = Path(self.root, frame.folder, "vehicle_pose", f"{frame.segment}.parquet")
        components = self.components + [POINT_COMPONENT] * self.point_labels
        return [str(file.relative_to(self.root)) for file in segment_files(first, components)]

    def fingerprint(self):
        """What tells whether the data set is still the same -> {what: digest}."""
        return file_digests(self)

    def load(self, i, image=None):
        """Read frame i -> Frame.

        image (H, W) is the size of the front images, default the grid's. The side
        images are lower: they keep that width and their own shape.
        """
        frame = self.frames[i]
        vehicle2world = self.pose(frame)
        points, origin, returns = self.points(frame, vehicle2world)
        extra = {}
        if self.point_labels:
            label = np.full(len(points), -1)
            own = self.point_truth(i, returns.shape)[returns]
            label[:len(own)] = own  # TOP's points come first
            extra["points_label"] = label
        size = image or self.grid.image
        images = []
        lidar2img = np.zeros((0, 4, 4))
        if self.images:
            images, lidar2img = self.camera_images(frame, vehicle2world, size)
        boxes = labels = None
        if frame.folder != "testing" and self.has_boxes:
            boxes, labels = frame_boxes(self, i)
        return Frame(
            points=points,
            origin=origin,
            images=images,
            lidar2img=projections(lidar2img, self.grid.cameras, self.name_of(frame),
                                  self.calibration_files(i)),
            lidar2world=vehicle2world,
            time=frame.time * 1e-6,
            boxes=boxes,
            labels=labels,
            extra=extra,
            name=self.name_of(frame),
        )

    def matrix(self, values, owner):
        """A (4, 4) float64 from one row of 16 numbers. `owner` begins the message."""
        array = np.array(values, np.float64)
        turn = array.reshape(4, 4)[:3, :3] if array.shape == (16,) else np.zeros((3, 3))
        is_rotation = np.allclose(turn @ turn.T, np.eye(3), atol=1e-3)
        if not is_rotation or not (abs(array) < 1e8).all():  # NaN is not
            raise DataError(f"{owner} is {str(values)[:80]}, expected 16 finite numbers, "
                            "a rotation and a shift; download it again")
        return array.reshape(4, 4)

    def pose(self, frame):
        """Vehicle to world at the frame's own pose -> (4, 4) float64."""
        (transform,) = self.read(frame, "vehicle_pose", ["world_from_vehicle.transform"])
        if len(transform) != 1:
            raise DataError(f"{self.name_of(frame)}: vehicle_pose has {len(transform)} rows of "
                            "this time, expected one; download it again")
        return self.matrix(transform[0], f"{self.name_of(frame)}: vehicle_pose")

    def points(self, frame, vehicle2world):
        """First returns of every laser.

        -> points (N, 5) float32, TOP's first; origin (3,) float32, where TOP stands;
        returns (H, W) bool, the pixels of TOP's image whose points these are, row by row.
        """
        name = self.name_of(frame)
        images = self.arrays(frame, "lidar", RANGE_IMAGE, 4)
        poses = self.arrays(frame, "lidar_pose", RANGE_IMAGE, 6)
        columns = ["extrinsic.transform", "beam_inclination.min", "beam_inclination.max",
                   "beam_inclination.values"]
        calibration = self.read_by(frame, "lidar_calibration", "key.laser_name", columns,
                                   all_times=True)
        clouds = []
        origin = returns = None
        for laser, image in sorted(images.items()):
            if laser not in calibration:
                raise DataError(f"{name}: lidar_calibration has no laser {laser}, "
                                f"only {sorted(calibration)}; download it again")
            transform, low, high, values = calibration[laser]
            extrinsic = self.matrix(transform, f"{name}: lidar_calibration of laser {laser}")
            if laser == TOP:
                origin = extrinsic[:3, 3]
                _, returns = first_returns(image)
            inclinations = beam_inclinations(len(image), low, high, values.as_py())
            clouds.append(self.laser_points(name, laser, image, extrinsic, inclinations,
                                            poses.get(laser), vehicle2world))
        if origin is None:
            raise DataError(f"{name}: lidar has no image of TOP (laser 1), only of "
                            f"{sorted(images)}; download it again")
        return np.concatenate(clouds).astype(np.float32), origin.astype(np.float32), returns

    def top_returns(self, i):
        """As first_returns, of TOP's image of frame i. Those of the last such frame are kept."""
        if self.last_returns[0] != i:
            frame = self.frames[i]
            images = self.arrays(frame, "lidar", RANGE_IMAGE, 4)
            if TOP not in images:
                raise DataError(f"{self.name_of(frame)}: lidar has no image of TOP (laser 1), only "
                                f"of {sorted(images)}; download it again")
            self.last_returns = i, first_returns(images[TOP])
        return self.last_returns[1]

    def laser_points(self, name, laser, image, extrinsic, inclinations, poses, vehicle2world):
        """First returns of one laser -> (n, 5) float64.

        image (H, W, 4) range, intensity, elongation, in a no-label zone; inclinations
        (H,); poses (H, W, 6) or None; see range_image_points.
        """
        H = len(image)
        poses_fit = poses is not None and poses.shape[:2] == image.shape[:2]
        if len(inclinations) != H or laser == TOP and not poses_fit:
            no_poses = ", no pixel poses" if laser == TOP and poses is None else ""
            raise DataError(f"{name}: laser {laser} has an image of {H} rows, "
                            f"{len(inclinations)} inclinations{no_poses}; "
                            "download lidar_calibration and lidar_pose again")
        # nothing is annotated in no-label zones
        distance = np.where(image[..., 3] > 0, -1, image[..., 0]).astype(np.float64)
        if not distance.max(initial=0) < 300:  # NaN too
            raise DataError(f"{name}: ranges of laser {laser} go up to {distance.max()}, expected "
                            "finite ones below 300 m; download lidar again")
        xyz, row, column = range_image_points(distance, extrinsic, inclinations, poses,
                                              vehicle2world)
        if not (abs(xyz) < 300).all():  # NaN too
            raise DataError(f"{name}: points of laser {laser} lie up to {abs(xyz).max()} m away, "
                            "expected finite ones within 300 m; "
                            "download lidar_calibration and lidar_pose again")
        intensity = np.tanh(np.nan_to_num(image[row, column, 1]).clip(0))
        age = np.full(len(xyz), 0 if laser == TOP else OTHER_LASER_AGE)
        return np.column_stack([xyz, intensity, age])

    def camera_images(self, frame, vehicle2world, size):
        """Images of a frame -> K x (3, H, W) uint8; lidar2img (K, 4, 4) float64.

        size (H, W) of the front images.
        """
        name = self.name_of(frame)
        pictures = self.read_by(frame, "camera_image", "key.camera_name",
                                ["image", "pose.transform", *SHUTTER])
        columns = ["extrinsic.transform", "width", "height"]
        lens = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
        columns += ["intrinsic." + part for part in lens]
        cameras = self.read_by(frame, "camera_calibration", "key.camera_name", columns,
                               all_times=True)
        images = []
        matrices = []
        for number, camera in enumerate(self.grid.cameras, 1):
            if number not in pictures or number not in cameras:
                lacking = "picture" if number not in pictures else "calibration"
                whole = sorted(set(pictures) & set(cameras))
                raise DataError(f"{name}: no {lacking} of camera {number} ({camera}) in this "
                                f"frame, only of {whole}; download camera_image and "
                                "camera_calibration of this segment again")
            transform, *lens = cameras[number]
            if not (np.abs(lens) < 1e5).all() or not min(lens[:4]) > 0:  # NaN is not
                raise DataError(f"{name}: camera_calibration of {camera} has {lens}, expected "
                                "finite numbers, of them a width, height and focal lengths above "
                                "0; download it again")
            raw, shutter_pose, *shutter = pictures[number]
            image, intrinsic = straight_image(raw, f"picture of camera {number}", size, name, lens)
            images.append(image)
            owner = f"{name}: camera_calibration of {camera}"
            camera2vehicle = self.matrix(transform, owner)
            # the vehicle moved between scan and shutter
            owner = f"{name}: camera_image pose of {camera}"
            shutter2world = middle_pose(self.matrix(shutter_pose, owner), shutter, owner)
            vehicle2shutter = np.linalg.inv(shutter2world) @ vehicle2world
            matrices.append(pad_to_4x4(intrinsic) @ CAMERA_AXES @ np.linalg.inv(camera2vehicle)
                            @ vehicle2shutter)
        return images, np.stack(matrices)

    def annotations(self, i):
        """Boxes of frame i as structured rows (WAYMO_BOX); none in testing."""
        frame = self.frames[i]
        path = os.path.join(self.root, frame.folder, "lidar_box", f"{frame.segment}.parquet")
        if frame.folder == "testing" and not os.path.isfile(path):
            return np.zeros(0, WAYMO_BOX)
        columns = [f"box.{part}.{axis}" for part in ("center", "size") for axis in "xyz"]
        columns += ["box.heading", "speed.x", "speed.y"]
        columns += ["type", "num_lidar_points_in_box", "difficulty_level.detection",
                    "key.laser_object_id"]
        *box, kinds, counts, difficulty, token = self.read(frame, "lidar_box", columns)
        rows = np.zeros(len(kinds), WAYMO_BOX)
        box = [[np.nan if value is None else value for value in column] for column in box]
        rows["box"] = np.array(box, np.float64).reshape(9, -1).T
        if not np.isfinite(rows["box"][:, :7]).all() or not (rows["box"][:, 3:6] > 0).all():
            raise DataError(f"{self.name_of(frame)}: lidar_box has a box without a place or size; "
                            "download it again")
        for n, kind in enumerate(kinds):
            name = WAYMO_TYPES.get(int(kind))
            rows["label"][n] = self.grid.classes.index(name) if name else -1
        rows["lidar_points"] = np.nan_to_num(np.array(counts, np.float64))  # null: 0
        rows["difficulty"] = np.nan_to_num(np.array(difficulty, np.float64))
        rows["token"] = token
        # speeds are the world's
        rows["box"][:, 7:9] = rows["box"][:, 7:9] @ self.pose(frame)[:2, :2]
        return rows

    def point_truth(self, i, shape):
        """The class of each pixel of TOP's image of frame i, -1 for none -> (H, W) int64.

        shape (H, W) of that image.
        """
        frame = self.frames[i]
        name = self.name_of(frame)
        images = self.arrays(frame, POINT_COMPONENT, RANGE_IMAGE, 2)
        if TOP not in images or images[TOP].shape[:2] != shape:
            sizes = {laser: image.shape[:2] for laser, image in images.items()}
            raise DataError(f"{name}: {POINT_COMPONENT} has images of the sizes {sizes} by laser, "
                            f"expected one of TOP (laser 1) of {shape}, as lidar has; download "
                            "both again")
        classes = images[TOP][..., 1]  # the other channel is the instance
        known = np.isin(classes, range(len(POINT_CLASSES["waymo"]) + 1))
        if not known.all():
            raise DataError(f"{name}: {POINT_COMPONENT} has the class {classes[~known][0]:g}, "
                            f"expected 0 to {len(POINT_CLASSES['waymo'])}; download it again")
        return classes.astype(np.int64) - 1

    def points_on_disk(self, i, classes):
        """Classes of the points of load(i) -> of all first returns of TOP, and their truth.

        Returns in no-label zones, which load leaves out, take the class of the nearest pixel.
        classes (n,) -> two (N,) int64, N in the order of the pixels, row by row.
        """
        is_return, is_point = self.top_returns(i)
        image = np.zeros(is_point.shape, np.int64)
        image[is_point] = classes[:is_point.sum()]  # TOP's points come first
        if is_point.any():
            row, column = distance_transform_edt(~is_point, return_distances=False,
                                                 return_indices=True)
            image = image[row, column]
        return image[is_return], self.point_truth(i, is_return.shape)[is_return]

    def write_points(self, folder, i, classes):
        """The classes of frame i as a range image of TOP: uint8 (H, W), 1 to 22, 0 for no return.

        It is lidar_segmentation/<segment>_<time>.npy. The official server wants a protobuf,
        which this is not. classes (N,) as points_on_disk gives them.
        """
        is_return, _ = self.top_returns(i)
        image = np.zeros(is_return.shape, np.uint8)
        image[is_return] = classes + 1
        frame = self.frames[i]
        path = Path(folder, POINT_COMPONENT, f"{frame.segment}_{frame.time}.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image)

    def every_kth(self, indices, k):
        """Every k-th of these frames, from the first."""
        return indices[::k]

    def calibration_files(self, i):
        """Which files say where the cameras of frame i are: for messages."""
        frame = self.frames[i]
        return f"{frame.folder}/camera_calibration/{frame.segment}.parquet"

    def label_evidence(self, i):
        """How many boxes of frame i hold about as many points as lidar_box counts.

        Ours are first returns only, so at least half of the stated count and not more.
        -> that number, the number of boxes of 5 or more points, and what this tests.
        """
        frame = self.frames[i]
        rows = self.annotations(i)
        rows = rows[rows["lidar_points"] >= 5]
        points, *_ = self.points(frame, self.pose(frame))
        xyz = points[:, :3].astype(np.float64)
        right = 0
        for row in rows:
            count = inside_box(xyz, row["box"]).sum()
            right += 0.5 * row["lidar_points"] <= count <= row["lidar_points"]
        test = "boxes of 5 points or more hold half to all of the points that lidar_box states"
        return int(right), len(rows), test


def first_returns(image):
    """Pixels of a laser's range image (H, W, 4) with a first return, and those that are points.

    The others lie in a no-label zone. -> two (H, W) bool
    """
    is_return = image[..., 0] > 0
    return is_return, is_return & ~(image[..., 3] > 0)


def beam_inclinations(H, low, high, values):
    """The stated inclinations of H beams, or H of them spread evenly from low to high -> (H,)."""
    if values:
        return np.array(values, np.float64)
    return (np.arange(H) + 0.5) / H * (high - low) + low


def middle_pose(pose, shutter, owner):
    """The vehicle's pose when the middle column of an image is exposed.

    pose (4, 4) float64, vehicle to world, as stored; shutter: the values of SHUTTER, of
    which any may be None: the pose is taken as it is then. `owner` begins the message.
    """
    if None in shutter:
        return pose
    stated, opened, done = shutter[:3]
    velocity, spin = np.reshape(shutter[3:], (2, 3))
    delay = (opened + done) / 2 - stated
    if not abs(delay) < 1 or not (abs(np.array(shutter[3:])) < 200).all():  # NaN is not
        raise DataError(f"{owner} is of {stated} s, the image of {opened} to {done} s, with "
                        f"velocities {shutter[3:]}; expected finite numbers and times within a "
                        "second: download it again")
    moved = pose.copy()
    moved[:3, :3] = pose[:3, :3] @ Rotation.from_rotvec(delay * spin).as_matrix()
    moved[:3, 3] += delay * velocity
    return moved


def straight_image(raw, file, front_size, name, lens):
    """Decode one camera image and take its lens distortion off.

    lens: width, height, f_u, f_v, c_u, c_v, k1, k2, p1, p2, k3. front_size (H, W) is
    the size of a front image; a lower one keeps that W and its own shape. -> (3, H, W)
    uint8, intrinsic (3, 3).
    """
    width, height, f_u, f_v, c_u, c_v, *distortion = lens
    H, W = front_size
    size = min(H, round(W * height / width)), W
    pixels, crop = decode(raw, file, size, name, (int(width), int(height)))
    intrinsic = crop @ np.array([[f_u, 0, c_u], [0, f_v, c_v], [0, 0, 1]], np.float64)
    # OpenCV's pixels have whole centres
    opencv_intrinsic = intrinsic - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    straight = cv2.undistort(pixels, opencv_intrinsic, np.array(distortion, np.float64))
    return np.ascontiguousarray(straight.transpose(2, 0, 1)), intrinsic


# ---- doctor: python data.py ROOT -----------------------------------------------------

# where each camera looks: degrees from straight ahead, left positive; +- 30
CAMERA_YAW = {
    "CAM_FRONT": 0,
    "CAM_FRONT_RIGHT": -55,
    "CAM_BACK_RIGHT": -110,
    "CAM_BACK": 180,
    "CAM_BACK_LEFT": 110,
    "CAM_FRONT_LEFT": 55,
    "FRONT": 0,
    "FRONT_LEFT": 45,
    "FRONT_RIGHT": -45,
    "SIDE_LEFT": 90,
    "SIDE_RIGHT": -90,
    "image_2": 0,
}
CHECKED_FRAMES = 24  # frames looked at without --all
# class of a box -> what its points may be, where that is not the same name
POINTS_OF_BOX = {
    "Vehicle": ("CAR", "TRUCK", "BUS", "OTHER_VEHICLE", "MOTORCYCLE", "MOTORCYCLIST"),
    "Pedestrian": ("PEDESTRIAN",),
    "Cyclist": ("BICYCLE", "BICYCLIST"),
}


def camera_faults(lidar2img, hw, yaw):
    """What in a camera's matrix contradicts a camera on a car.

    lidar2img (4, 4), hw of its image, yaw degrees at which it should look -> list of
    str.
    """
    width = hw[1]
    matrix = np.asarray(lidar2img, np.float64)[:3]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:, :3])) < 1e-6:
        return ["its projection matrix is singular or not finite"]
    K, R = rq(matrix[:, :3])
    signs = np.sign(np.diag(K))
    K = K * signs           # its diagonal is positive
    R = R * signs[:, None]  # its rows are right, down, forward
    centre = -np.linalg.solve(matrix[:, :3], matrix[:, 3])

    focal = K[0, 0] / K[2, 2] / width  # in image widths
    axis = K[0, 2] / K[2, 2] / width
    skew = K[0, 1] / K[0, 0]
    distance = np.linalg.norm(centre)
    tilt = np.degrees(np.arccos(np.clip(-R[1, 2], -1, 1)))
    heading = np.degrees(np.arctan2(R[2, 1], R[2, 0]))
    off = (heading - yaw + 180) % 360 - 180

    faults = []
    if not np.linalg.det(R) > 0:
        faults.append("it is mirrored, expected a rotation that turns right hands into right "
                      "hands")
    if not abs(K[2, 2] - 1) < 0.01:
        faults.append(f"its depth counts {K[2, 2]:.3g} m as one, expected metres")
    if not (abs(K[0, 0] / K[1, 1] - 1) < 0.03 and abs(skew) < 0.03):
        faults.append(f"its pixels are {K[1, 1] / K[0, 0]:.3g} times as wide as high, "
                      f"skewed by {skew:.3g}, expected square pixels")
    if not 0.25 < focal < 4:
        faults.append(f"its focal length is {focal:.3g} image widths, expected 0.25 to 4")
    if not abs(axis - 0.5) < 0.25:
        faults.append(f"its axis meets the image at {axis:.0%} of its width, "
                      "expected the middle half")
    if not distance < 5:
        faults.append(f"it stands {distance:.1f} m from the LiDAR, expected less than 5 m")
    if not -R[1, 2] > 0.7:
        faults.append(f"its image's down is {tilt:.0f} degrees from down, expected upright")
    if not abs(off) < 30:
        faults.append(f"it looks {heading:.0f} degrees to the left of straight ahead, "
                      f"expected {yaw} +- 30")
    return faults


class FrameReport(NamedTuple):
    """What the doctor saw of one frame; None where the frame cannot be read."""
    faults: list                 # list of str
    points: int | None           # in the keyframe sweep
    shares: np.ndarray | None    # (K,), of those points in each image
    evidence: tuple | None       # see label_evidence


class Checkup:
    """checkup[i]: the FrameReport of frame i. The work of a frame for one worker."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        dataset = self.dataset
        try:
            frame = dataset.load(i)
            evidence = dataset.label_evidence(i)
        except DataError as error:
            return FrameReport([str(error)], None, None, None)
        faults = []
        hw = [image.shape[1:] for image in frame.images]
        cameras = dataset.grid.cameras
        for camera, matrix, size, image in zip(cameras, frame.lidar2img, hw, frame.images):
            owner = f"{frame.name}: {camera}"
            for fault in camera_faults(matrix, size, CAMERA_YAW[camera]):
                faults.append(f"{owner}: {fault}; check {dataset.calibration_files(i)}")
            if image.min() == image.max():
                faults.append(f"{owner}: the image has one colour, expected a scene; "
                              "extract it again")
        points = frame.points[frame.points[:, 4] == 0]
        intensity = points[:, 3]
        if len(points) < 500:
            faults.append(f"{frame.name}: {len(points)} points in the keyframe sweep, "
                          "expected thousands; extract it again")
        elif intensity.min() == intensity.max():
            faults.append(f"{frame.name}: every point has intensity {intensity[0]:g}, "
                          "expected different ones; extract it again")
        shares = visible_points(points, frame.lidar2img, hw).sum(1) / max(len(points), 1)
        return FrameReport(faults, len(points), shares, evidence)


class PointReport(NamedTuple):
    """What the doctor saw of the classes of one frame's points."""
    faults: list                 # list of str
    points: int = 0
    labelled: int = 0            # of them, those with a class
    boxed: int = 0               # of these, those in a box
    right: int = 0               # of these, those whose class is the box's


class PointCheckup:
    """checkup[i]: the PointReport of frame i of a data set with classes of points."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        try:
            frame = self.dataset.load(i)
        except DataError as error:
            return PointReport([str(error)])
        label = frame.extra["points_label"]
        xyz = frame.points[:, :3].astype(np.float64)
        classes = POINT_CLASSES[self.dataset.grid.dataset]
        boxed = right = 0
        if frame.boxes is not None:
            for box, c in zip(frame.boxes, frame.labels):
                name = self.dataset.grid.classes[c]
                same = [classes.index(other) for other in POINTS_OF_BOX.get(name, (name,))]
                inside = label[inside_box(xyz, box) & (label >= 0)]
                boxed += len(inside)
                right += np.isin(inside, same).sum()
        return PointReport([], len(label), (label >= 0).sum(), boxed, right)


def merge_faults(faults):
    """What several frames have in common is said once. faults [(frame name, str)] -> list of str.

    Each message begins with the name of its frame.
    """
    frames = {}
    for name, fault in faults:
        frames.setdefault(fault.removeprefix(f"{name}: "), []).append(fault)
    merged = []
    for first, *others in frames.values():
        more = f" (and of {len(others)} more frames)" if others else ""
        merged.append(first + more)
    return merged


def unchanged(report):
    """Keeps torch's DataLoader from turning a report into tensors."""
    return report


def doctor(root, everything=False):
    """Look at the data set in `root`, at CHECKED_FRAMES frames spread over it or at every one.

    Prints what was seen -> list of str: what is wrong, where, and the fix.
    """
    faults, of_frames = frame_faults(root, everything)
    more, of_points = point_faults(root, everything)
    # a sweep that cannot be read stops both
    of_frames += [fault for fault in of_points if fault not in of_frames]
    faults += [fault for fault in more if fault not in faults]
    return merge_faults(of_frames) + faults


def look_at(checkup, indices, everything):
    """The reports of a checkup of these frames, by worker processes where it is every frame."""
    reports = torch.utils.data.DataLoader(
        checkup, sampler=indices.tolist(), batch_size=None, collate_fn=unchanged,
        num_workers=os.cpu_count() if everything else 0)
    return list(tqdm(reports, total=len(indices), unit=" frames", disable=None))


def frames_to_check(dataset, everything):
    """At most CHECKED_FRAMES frames spread over the data set, or every one -> (n,) int64."""
    total = len(dataset)
    if everything:
        return np.arange(total)
    return np.unique(np.linspace(0, total - 1, CHECKED_FRAMES).astype(int))


def frame_faults(root, everything):
    """What is wrong with the frames -> list of str, and of single ones [(frame name, str)]."""
    try:
        dataset = open_dataset(root)
        train = len(dataset.split("train"))
        val = len(dataset.split("val"))
    except DataError as error:
        return [str(error)], []
    indices = frames_to_check(dataset, everything)
    hint = "" if len(indices) == len(dataset) else ", --all looks at every one"
    print(f"{dataset.what}, {len(dataset)} frames, of them {train} train, {val} val; "
          f"looking at {len(indices)}{hint}", flush=True)
    reports = look_at(Checkup(dataset), indices, everything)
    names = dataset.names
    of_frames = [(names[i], fault) for i, report in zip(indices, reports)
                 for fault in report.faults]
    texts = [fault for _, fault in of_frames]
    faults = [fault for fault in scoring_faults(dataset, indices) if fault not in texts]
    readable = [report for report in reports if report.evidence is not None]
    if readable:
        cameras = f"check {dataset.calibration_files(indices[0])}"
        faults += summary_faults(dataset, readable, cameras)
    return faults, of_frames


def point_faults(root, everything):
    """As frame_faults, of the classes of points, where there are any."""
    try:
        dataset = open_dataset(root, sweeps=1, images=False, labels=False, point_labels=True)
    except NoPointLabels:
        return [], []
    except DataError as error:
        return [str(error)], []
    indices = frames_to_check(dataset, everything)
    reports = look_at(PointCheckup(dataset), indices, everything)
    names = dataset.names
    of_frames = [(names[i], fault) for i, report in zip(indices, reports)
                 for fault in report.faults]
    points, labelled, boxed, right = np.sum([report[1:] for report in reports], 0)
    if not points:
        return [], of_frames
    summary = f"{labelled / points:.1%} of the points of {len(indices)} frames have a class"
    if boxed:
        summary += f", in boxes {right} of {boxed} that of their box"
    print(summary)
    faults = []
    if not labelled or right < 0.75 * boxed:
        faults.append(f"{dataset.what}: {summary}, expected some, and in boxes at least 75 %; "
                      "labels, scans or boxes do not belong together: extract all of them again")
    return faults, of_frames


def scoring_faults(dataset, indices):
    """What would keep finetune.py from a score -> list of str.

    Nothing if the frames `indices` have no box: these data are not for detection.
    """
    try:
        if not any(len(dataset.annotations(i)) for i in indices):
            return []
        labelled_val_frames(dataset, 1)
        return dataset.lacking_for_scoring() if dataset.grid.dataset == "nuscenes" else []
    except DataError as error:
        return [str(error)]


def summary_faults(dataset, reports, check_cameras):
    """Print what readable frames have in common -> list of str, what is wrong with it."""
    print(f"points in a keyframe sweep: median {np.median([r.points for r in reports]):.0f}")
    shares = np.mean([report.shares for report in reports], 0)
    shares = list(zip(dataset.grid.cameras, shares))
    print("points in each image: "
          + ", ".join(f"{camera} {share:.1%}" for camera, share in shares))
    faults = []
    for camera, share in shares:
        if share < 0.01:
            faults.append(f"{dataset.root}: {camera}: {share:.2%} of the points land in its "
                          f"images, expected at least 1 %; {check_cameras}")
    right, boxes = np.sum([report.evidence[:2] for report in reports], 0)
    summary = f"{right} of {boxes} {reports[0].evidence[2]}"
    if boxes:
        print(summary)
    if right < 0.9 * boxes:
        faults.append(f"{dataset.root}: {summary}, expected at least 90 %; calibration, poses, "
                      "boxes or scans do not belong together: extract all of them again")
    return faults


def main():
    parser = argparse.ArgumentParser(
        description="Check a data set: layout, tables, files, calibration, labels. "
                    "Exit status 1 if anything is wrong.")
    parser.add_argument("root", nargs="?", default="",
                        help="its root folder; default the embedded world")
    parser.add_argument("--all", action="store_true",
                        help=f"look at every frame, not at {CHECKED_FRAMES}")
    parser.add_argument("--regroup", metavar="FOLDER",
                        help="check nothing; copy a Waymo folder into this new one, which is read "
                             "many times faster")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this quietly
    if args.regroup:
        try:
            return regroup(args.root, args.regroup)
        except DataError as error:
            raise SystemExit(f"WRONG  {error}") from error
    faults = doctor(args.root, args.all)
    for fault in faults[:50]:
        print(f"WRONG  {fault}")
    if len(faults) > 50:
        print(f"WRONG  and {len(faults) - 50} more")
    print(f"{len(faults)} fault(s)" if faults else "nothing wrong found")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
