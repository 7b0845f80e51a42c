"""Data sets as one record: a folder on disk -> Frame -> prepare (cached) -> augment -> Batch.

    python data.py /nuscenes                                         # the doctor: what is wrong with these files, where, and the fix
    batches = loader("/nuscenes", "train", batch=4).begin_at(0)      # an endless iterator of Batch
    batches = loader("", "train", batch=2, preset="small").once()    # the embedded world, each frame once

Read in this order: Frame and Batch (what everything downstream sees), the augmentations, the readers of nuScenes, KITTI and Waymo
(each quirk of a format has its comment), the loader, the doctor. Frames hold numpy arrays, batches hold tensors. Tags: [devkit] nuscenes-devkit does
the same; [ours] our decision.
"""
import argparse
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.linalg import rq
from scipy.spatial.transform import Rotation
from tqdm import tqdm

cv2.setNumThreads(0)        # its threads do not survive the fork of a worker: resize would wait for them for ever

VERSION = 3         # of everything cached: raise it when the index, or what load() returns for the same files, changes


class DataError(ValueError):
    """The files are not what they should be. The message says which file or frame, what was found, what was expected, what to do."""


# ---- Grid, Frame, Batch ----

@dataclass(frozen=True)
class Grid:
    """What belongs to a data set rather than to a method: range, voxels, pictures, classes. x forward, y left, z up, metres."""
    dataset: str
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    voxel: tuple[float, float, float]
    image: tuple[int, int]          # height, width
    cameras: tuple[str, ...]
    classes: tuple[str, ...]        # Frame.labels index this
    sweeps: int                     # LiDAR sweeps in a frame, the key sweep included
    ground: float                   # z of a flat road under the LiDAR; for pictures and monitors only

    @property
    def mirrors(self):
        """Whether x, y may be mirrored: whether the range is symmetric along them."""
        return self.low[0] == -self.high[0], self.low[1] == -self.high[1]

    @property
    def paper_frames(self):
        """Training frames of the published split: for --profile."""
        return dict(nuscenes=28130, kitti=3712, waymo=158081)[self.dataset]


CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
CLASSES = ("car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone")
KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
WAYMO = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT"), ("Vehicle", "Pedestrian", "Cyclist")        # cameras 1 to 5, classes
GRIDS = {
    ("nuscenes", "paper"): Grid("nuscenes", (-54., -54., -5.), (54., 54., 3.), (.075, .075, .2), (256, 704), CAMERAS, CLASSES, 10, -1.84),
    ("nuscenes", "small"): Grid("nuscenes", (-25.6, -25.6, -3.), (25.6, 25.6, 1.), (.1, .1, .125), (96, 256), CAMERAS, CLASSES, 1, -1.84),
    ("kitti", "paper"): Grid("kitti", (0., -40., -3.), (70.4, 40., 1.), (.05, .05, .1), (384, 1248), ("image_2",), KITTI_CLASSES, 1, -1.73),
    ("waymo", "paper"): Grid("waymo", (-75.2, -75.2, -2.), (75.2, 75.2, 4.), (.1, .1, .15), (320, 480), *WAYMO, 1, 0.),
    ("waymo", "small"): Grid("waymo", (-25.6, -25.6, -1.), (25.6, 25.6, 3.), (.1, .1, .125), (96, 144), *WAYMO, 1, 0.),     # z from the road, not from the LiDAR
    ("kitti", "small"): Grid("kitti", (0., -25.6, -3.), (51.2, 25.6, 1.), (.1, .1, .125), (80, 256), ("image_2",), KITTI_CLASSES, 1, -1.73),
}


@dataclass(frozen=True)
class Frame:
    """One LiDAR sweep and the K camera images nearest in time. Every data set becomes exactly this; nothing downstream asks which.

    points       (N, 5) float32        x forward, y left, z up, metres; intensity in [0, 1]; seconds before the key sweep.
                                       Key-sweep points come first, N may be 0
    origin       (3,) float32          where the LiDAR stands in that frame (zero for nuScenes and KITTI)
    images       K x (3, H, W) uint8   RGB, after resize and crop; sizes may differ between cameras
    lidar2img    (K, 4, 4) float32     (u d, v d, d, 1) = lidar2img (x, y, z, 1); u right, v down, pixel centres at +0.5; d = depth, m
    lidar2world  (4, 4) float64        pose at the key sweep's time; the identity for KITTI
    time         float                 seconds; 0 for KITTI's object frames, which have none
    boxes        (M, 9) float32, None  centre xyz, l, w, h (m), yaw (rad, x towards y), velocity xy (m/s, NaN where unknown)
    labels       (M,) int64, None      index into Grid.classes
    extra        {name: array}         what `prepare` computed; "points_*" has a row for each point and follows the points
    name         str                   "nuscenes/scene-0061/<sample token>"; every error about this frame starts with it
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
        n, m = len(self.points), None if self.boxes is None else len(self.boxes)
        expected = [("points", (n, 5), "float32"), ("origin", (3,), "float32"), ("lidar2img", (len(self.images), 4, 4), "float32"),
                    ("lidar2world", (4, 4), "float64")]
        if (self.boxes is None) != (self.labels is None):
            raise ValueError(f"{self.name}: boxes and labels must be both there or both None")
        if self.boxes is not None:
            expected += [("boxes", (m, 9), "float32"), ("labels", (m,), "int64")]
        for what, shape, dtype in expected:
            found = getattr(self, what)
            if found.shape != shape or found.dtype != dtype:
                raise ValueError(f"{self.name}: {what} is {found.dtype} {found.shape}, expected {dtype} {shape}")
        for k, image in enumerate(self.images):
            if image.ndim != 3 or image.shape[0] != 3 or image.dtype != "uint8":
                raise ValueError(f"{self.name}: image {k} is {image.dtype} {image.shape}, expected uint8 (3, H, W)")
        for what in ("lidar2img", "lidar2world") if self.boxes is None else ("lidar2img", "lidar2world", "boxes"):
            if not np.isfinite(getattr(self, what)[..., :7]).all():                                  # a velocity may be unknown
                raise DataError(f"{self.name}: {what} has numbers that are not finite, or too large; check the calibration, poses and labels that it is made from")
        for what, value in self.extra.items():
            if what.startswith("points_") and len(value) != n:
                raise ValueError(f"{self.name}: extra {what} has {len(value)} rows, expected one for each of the {n} points")


@dataclass
class Batch:
    """B frames joined along the first axis; b_x is the frame of each row of x. Sizes are stated, never inferred: a frame may be empty."""
    points: torch.Tensor            # (N, 5) float32
    b_points: torch.Tensor          # (N,) int64
    origin: torch.Tensor            # (B, 3) float32
    images: torch.Tensor            # (B K, 3, H, W) uint8, padded with zeros at the bottom and right
    hw: torch.Tensor                # (B K, 2) int64, each image's own height and width
    lidar2img: torch.Tensor         # (B K, 4, 4) float32
    lidar2world: torch.Tensor       # (B, 4, 4) float64
    time: torch.Tensor              # (B,) float64, s
    boxes: torch.Tensor | None      # (M, 9) float32
    b_boxes: torch.Tensor | None    # (M,) int64
    labels: torch.Tensor | None     # (M,) int64
    extra: dict[str, torch.Tensor]  # rows joined; "b_" + name beside each that is not one row a point
    names: list[str]
    seeds: torch.Tensor             # (B,) int64, a random stream a frame: a function of (seed, epoch, index)
    size: int                       # B
    cameras: int                    # K

    def map(self, change):
        """The same batch with change(tensor) for each tensor."""
        tensors = {f.name: change(getattr(self, f.name)) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}
        return replace(self, **tensors, extra={name: change(value) for name, value in self.extra.items()})

    def to(self, device):
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):           # torch's DataLoader calls this
        return self.map(torch.Tensor.pin_memory)


def collate(frames, seeds):
    """Join frames (a list of Frame with the same K) and seeds (a list of int) into a Batch."""
    def join(arrays):
        return torch.cat([torch.as_tensor(a) for a in arrays])

    def rows_of(arrays):
        return torch.repeat_interleave(torch.tensor([len(a) for a in arrays]))

    pictures = [image for frame in frames for image in frame.images]
    hw = torch.tensor([image.shape[1:] for image in pictures])                           # (B K, 2)
    images = torch.zeros(len(pictures), 3, *hw.amax(0).tolist(), dtype=torch.uint8)
    for padded, image in zip(images, pictures):
        padded[:, :image.shape[1], :image.shape[2]] = torch.from_numpy(image)
    points = [frame.points for frame in frames]
    boxes = None if any(frame.boxes is None for frame in frames) else [frame.boxes for frame in frames]
    extra = {}
    for name in frames[0].extra:
        values = [frame.extra[name] for frame in frames]
        extra[name] = join(values)
        if not name.startswith("points_"):
            extra["b_" + name] = rows_of(values)
    return Batch(
        points=join(points), b_points=rows_of(points), origin=torch.tensor(np.stack([frame.origin for frame in frames])),
        images=images, hw=hw, lidar2img=join([frame.lidar2img for frame in frames]),
        lidar2world=torch.tensor(np.stack([frame.lidar2world for frame in frames])),
        time=torch.tensor([frame.time for frame in frames], dtype=torch.float64),
        boxes=boxes and join(boxes), b_boxes=boxes and rows_of(boxes), labels=boxes and join([frame.labels for frame in frames]),
        extra=extra, names=[frame.name for frame in frames], seeds=torch.tensor(seeds, dtype=torch.int64),
        size=len(frames), cameras=len(frames[0].images))


# ---- augmentation: pure functions of a Frame ----

def warp_boxes(boxes, a2b):
    """boxes (M, 9) in frame a -> (M, 9) float64 in frame b. a2b (4, 4) rotates, scales alike in all directions, mirrors and moves.

    Yaw and velocity follow as directions; what a tilted a2b adds to their z is dropped (a box has a yaw only).
    """
    linear, shift = a2b[:3, :3], a2b[:3, 3]
    centre = boxes[:, :3] @ linear.T + shift
    size = boxes[:, 3:6] * np.cbrt(abs(np.linalg.det(linear)))
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) @ linear[:2, :2].T        # (M, 2), any length
    velocity = boxes[:, 7:9] @ linear[:2, :2].T
    return np.concatenate([centre, size, np.arctan2(heading[:, 1], heading[:, 0])[:, None], velocity], 1, dtype=np.float64)


def warp_frame(frame, a2b):
    """Move the whole cloud by a2b (4, 4) float64: rotation or reflection, one scale, translation. Images stay as they are.

    Points, origin and boxes are mapped; lidar2img and lidar2world take the inverse from the right, so that a point keeps its
    pixel, its depth in true metres and its place in the world. Raises ValueError for a shear or uneven scale: boxes have no such form.
    """
    a2b = np.asarray(a2b, np.float64)
    gram = a2b[:3, :3].T @ a2b[:3, :3]
    if a2b.shape != (4, 4) or not gram[0, 0] > 0 or not np.allclose(gram, gram[0, 0] * np.eye(3), rtol=1e-5, atol=1e-5 * gram[0, 0]):
        raise ValueError(f"{frame.name}: a2b is no rotation or reflection with one scale:\n{a2b}")
    b2a = np.linalg.inv(a2b)
    points = frame.points.copy()
    points[:, :3] = frame.points[:, :3] @ a2b[:3, :3].T + a2b[:3, 3]
    return replace(
        frame, points=points, origin=(a2b[:3, :3] @ frame.origin + a2b[:3, 3]).astype(np.float32),
        boxes=None if frame.boxes is None else warp_boxes(frame.boxes, a2b).astype(np.float32),
        lidar2img=(frame.lidar2img @ b2a).astype(np.float32), lidar2world=frame.lidar2world @ b2a)


def augment_cloud(frame, rng, rotation, scale, flip):
    """Random turn about z ~ U(-rotation, rotation) rad, scale ~ U(1 - scale, 1 + scale), and x and y mirrored with p = 0.5 each where flip (x, y) says so.

    flip is the data set's Grid.mirrors: mirroring x on KITTI would put what the camera sees behind the range. rng is a np.random.Generator;
    the same numbers are drawn whatever the options, so switching one off leaves the others as they were.
    """
    angle, size, mirror = rng.uniform(-rotation, rotation), rng.uniform(1 - scale, 1 + scale), rng.random(2) < 0.5
    a2b = np.eye(4)
    a2b[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    a2b[:3, :3] *= size
    a2b[:2] *= np.where(mirror & flip, -1., 1.)[:, None]
    return warp_frame(frame, a2b)


def crop_images(frame, boxes, sizes, mirrored):
    """A part of each picture, resized, and mirrored left to right where asked; lidar2img follows with the exact ratios.

    boxes K x (top, left, height, width) px, sizes K x (H, W), mirrored K x bool.
    """
    images, matrices = [], []
    for image, matrix, (top, left, h, w), (H, W), mirror in zip(frame.images, frame.lidar2img, boxes, sizes, mirrored, strict=True):
        part = np.ascontiguousarray(image[:, top:top + h, left:left + w].transpose(1, 2, 0))
        part = cv2.resize(part, (W, H), interpolation=cv2.INTER_AREA if H * W < h * w else cv2.INTER_LINEAR)
        change = np.diag([W / w, H / h, 1., 1.])
        change[:2, 2] = -left * W / w, -top * H / h
        if mirror:
            part, change[0] = part[:, ::-1], W * change[2] - change[0]                               # u d -> W d - u d
        images.append(np.ascontiguousarray(part.transpose(2, 0, 1)))
        matrices.append(change @ matrix)
    return replace(frame, images=images, lidar2img=np.stack(matrices).astype(np.float32))


def select(frame, keep):
    """Keep the points in `keep`, a mask (N,) bool or row numbers (n,) int; extras named "points_*" follow."""
    extra = {name: value[keep] if name.startswith("points_") else value for name, value in frame.extra.items()}
    return replace(frame, points=frame.points[keep], extra=extra)


def visible_points(points, lidar2img, hw):
    """Which points each picture shows, in float64. points (N, 3 or more) m, lidar2img (K, 4, 4), hw (K, 2) px -> (K, N) bool."""
    uvd = points[:, :3].astype(np.float64) @ np.swapaxes(lidar2img[:, :3, :3], 1, 2) + lidar2img[:, None, :3, 3]     # (K, N, 3): u d, v d, d
    height, width = np.asarray(hw).T[..., None]                                                      # (K, 1)
    u, v, d = np.moveaxis(uvd, -1, 0)                                                                # (K, N)
    return (u >= 0) & (u < width * d) & (v >= 0) & (v < height * d)                                  # d <= 0 satisfies none of it


def is_keyframe(points):
    """Which points (N, 5) are of the key sweep, those of Waymo's other lasers included, which carry ELSEWHERE seconds of age. -> (N,) bool."""
    return points[:, 4] < 0.01


def crop_to_view(frame):
    """The frame without the points that none of its pictures shows: what KITTI's "reduced" clouds are to its full scans."""
    return select(frame, visible_points(frame.points, frame.lidar2img, [image.shape[1:] for image in frame.images]).any(0))


def box_corners(box):
    """box (9,) as a row of Frame.boxes -> (8, 3) m."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
    cos, sin = np.cos(box[6]), np.sin(box[6])
    return signs * box[3:6] @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + box[:3]


def inside_box(xyz, box):
    """Which points lie strictly inside one box. xyz (N, 3), box (9,) as a row of Frame.boxes -> (N,) bool."""
    offset, (cos, sin) = xyz - box[:3], (np.cos(box[6]), np.sin(box[6]))
    along, across = offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin
    return (abs(along) < box[3] / 2) & (abs(across) < box[4] / 2) & (abs(offset[:, 2]) < box[5] / 2)


# ---- files: where caches live, and what may be read ----

def cache_dir():
    """Folder of all that can be computed again: $LIDAR_CAMERA_CACHE, else lidar-camera-pretraining under $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("LIDAR_CAMERA_CACHE") or Path(home) / "lidar-camera-pretraining")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(folder, error) from error
    return folder


def not_writable(folder, error):
    """The DataError for an OSError on something in the cache."""
    return DataError(f"{folder}: this part of the cache cannot be written ({error.strerror}); make room there, or point LIDAR_CAMERA_CACHE to another folder")


def temp_path(path):
    """A new name beside `path`, to write what is then renamed to it: made by open or mkdir, so that it is for whom the umask says, unlike tempfile's."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")


@contextmanager
def locked(folder):
    """One process at a time builds `folder`: the other ranks wait instead of doing the same work again."""
    try:
        lock = open(f"{folder}.lock", "a")
    except OSError as error:
        raise not_writable(Path(folder), error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass            # a file system without locks: builders race, and the rename that publishes the folder decides
        yield


@functools.cache
def print_once(text):
    """Print each text once: from rank 0 of a run, not from a loader's worker."""
    if os.environ.get("RANK", "0") == "0" and torch.utils.data.get_worker_info() is None:
        print(text, flush=True)


def inside(root, file, who):
    """Path of `file` (relative, from a table) under root; DataError if it leads elsewhere. Tables are input, not to be trusted."""
    path = os.path.realpath(os.path.join(root, file))
    if not path.startswith(os.path.join(root, "")):
        raise DataError(f"{who}: {file} leads to {path}, expected a place inside {root}; "
                        "correct the table, or put the files themselves (no links to elsewhere) under the root")
    return path


def split_frames(who, split_of, name):
    """Rows where split_of (n,) bytes is `name`, "train", "val" or "test" -> (m,) int64: the data set's own split.

    If train or val has no frame on disk, both come from all frames there but those of test, which have no labels (from these only if there is nothing else),
    cut 80/20 in their order. Both are cut anew even if only one is empty: else frames could be in both.
    """
    if name not in ("train", "val", "test"):
        raise DataError(f"{who}: no split {name!r}; there are train, val and test")
    indices = np.flatnonzero(split_of == name.encode())
    if name != "test" and not ((split_of == b"train").any() and (split_of == b"val").any()):
        pool = np.flatnonzero(split_of != b"test") if (split_of != b"test").any() else np.arange(len(split_of))
        cut = max(1, len(pool) * 4 // 5)
        print_once(f"{who}: {(split_of == b'train').sum()} train and {(split_of == b'val').sum()} val frames on disk; "
            f"{len(pool)} of its {len(split_of)} frames are cut in their order: the first {cut} are train, the other {len(pool) - cut} val")
        indices = pool[:cut] if name == "train" else pool[cut:]
    if not len(indices):
        raise DataError(f"{who}: its {len(split_of)} frames on disk leave none for {name}; extract more of them")
    return indices


# ---- pictures ----

def read_image(file, size, name, expected=None):
    """Picture on disk -> as decode."""
    try:
        return decode(Path(file).read_bytes(), file, size, name, expected)
    except OSError as error:
        raise DataError(f"{name}: {file} cannot be read ({error.strerror}); extract the camera files again") from error


def decode(raw, file, size, name, expected=None):
    """Picture as bytes -> pixels (3, H, W) uint8 of this size (H, W), and the (3, 3) that takes pixels on disk to pixels in it.

    Cut to whole pixels of the decoded picture, the sides alike, the rest from the top, where the sky is, then resized [ours]: the two scales may differ by
    half a pixel in its width, and the matrix has both. expected (width, height) is what the calibration was made for; file and name are for messages.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=["JPEG", "PNG"]) as header:                         # nothing is decoded yet
            kind, (across, down) = header.format, header.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: {file} is not a whole JPEG or PNG ({error}), {len(raw)} bytes; extract it again") from error
    if (across, down) != (expected or (across, down)):
        raise DataError(f"{name}: {file} is {across} x {down}, expected {expected[0]} x {expected[1]}, "
                        "the size that the calibration is for: extract the original file again")
    (height, width), scale = size, max(size[0] / down, size[1] / across)
    shrink = next(f for f in (8, 4, 2, 1) if f == 1 or kind == "JPEG" and f * scale <= 1)            # a JPEG decodes at 1/2, 1/4, 1/8 for less
    how = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}[shrink]
    decoded = cv2.imdecode(np.frombuffer(raw, np.uint8), how | cv2.IMREAD_IGNORE_ORIENTATION)
    # the decoder fills up what a cut file lacks; neither marker occurs within compressed data
    if decoded is None or (b"\xff\xd9" if kind == "JPEG" else b"IEND") not in raw[-1024:]:
        raise DataError(f"{name}: {file} is not a whole {kind}: its end is missing, {len(raw)} bytes; extract it again")
    columns, rows = (min(max(round(n / scale / shrink), 1), whole // shrink) for n, whole in ((width, across), (height, down)))
    left, top = (across // shrink - columns) // 2, down // shrink - rows
    part = decoded[top:top + rows, left:left + columns]
    pixels = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if scale * shrink < 0.5 else cv2.INTER_LINEAR)
    x, y, planes = width / columns, height / rows, np.empty((3, height, width), np.uint8)
    cv2.split(pixels, list(planes[::-1]))                                                            # BGR, written into its place as RGB
    return planes, np.array([[x / shrink, 0, -left * x], [0, y / shrink, -top * y], [0, 0, 1]])


# ---- nuScenes: the tables, once, into three arrays ----

DETECTION = {       # category of an annotation -> class of the detection task; other categories have none         [devkit]
    "vehicle.car": "car", "vehicle.truck": "truck", "vehicle.construction": "construction_vehicle", "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus", "vehicle.trailer": "trailer", "movable_object.barrier": "barrier", "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle", "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian", "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone"}
TURN = np.array([[0., 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])      # LiDAR axes on disk (x right, y forward) -> ours


TEXTS = {"token", "sensor_token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "scene_token", "instance_token", "category_token",
         "channel", "filename", "name", "prev", "next"}                           # columns of text; the others are numbers, see Table.numbers


class Table:
    """One JSON table as columns: table["name"] is a list; `link` and `numbers` give checked arrays."""

    def __init__(self, folder, name, columns, keep=None):
        self.path, self.columns = folder / f"{name}.json", ("token", *columns.split())
        if not self.path.is_file():
            raise DataError(f"{self.path}: this table is missing; extract the metadata archive of {folder.name} again")
        try:        # rows become tuples as they are parsed: whole rows of the 2.6 million in sample_data would need gigabytes
            rows = json.loads(self.path.read_bytes(), object_hook=lambda row: self.pick(row) if keep is None or keep(row) else ())
        except DataError:                                                                            # pick's own; a DataError is a ValueError
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.path}: not a JSON list of rows ({error}); extract the metadata archive again") from error
        if type(rows) is not list or any(type(row) is not tuple for row in rows):
            raise DataError(f"{self.path}: not a JSON list of rows; extract the metadata archive again")
        rows = [row for row in rows if row]
        self.data = dict(zip(self.columns, zip(*rows))) if rows else {column: () for column in self.columns}
        for column in set(self.columns) & TEXTS:
            for i, value in enumerate(self[column]):
                if not (type(value) is str and len(value) <= 500 and value.isprintable()):
                    raise DataError(f"{self.path}: row {str(self['token'][i])[:80]} has {column} {str(value)[:80]!r}, expected a short text; "
                                    "extract the metadata archive again")
        self.number = {token: i for i, token in enumerate(self["token"])}
        if len(self.number) < len(rows):
            token, count = Counter(self["token"]).most_common(1)[0]
            raise DataError(f"{self.path}: token {token} occurs {count} times, expected once; extract the metadata archive again")

    def pick(self, row):
        for column in self.columns:
            if column not in row:
                raise DataError(f"{self.path}: row {row.get('token')} has no field {column}, only {sorted(row)}")
        return tuple(row[column] for column in self.columns)

    def __getitem__(self, column):
        return self.data[column]

    def __len__(self):
        return len(self.number)

    def link(self, column, other, rows=None, end=False):
        """Row numbers in table `other` of the tokens in `column`, of these rows or all; with end=True an empty token is -1."""
        rows = range(len(self)) if rows is None else rows
        found = np.array([other.number.get(self[column][i], -1) for i in rows], np.int64)
        for i in np.asarray(rows)[found < 0]:
            if not (end and self[column][i] == ""):
                raise DataError(f"{self.path}: row {self['token'][i]} has {column} {self[column][i]!r}, and {other.path.name} has no such "
                                "row; the tables are incomplete: extract the metadata archive again")
        return found

    def numbers(self, column, *shape, rows=None):
        """Finite numbers in `column` of these rows, or all -> (len(rows), *shape) float64."""
        rows = range(len(self)) if rows is None else rows
        values = np.zeros((len(rows), *shape))
        for n, i in enumerate(rows):
            try:
                values[n] = self[column][i]
                fine = (abs(values[n]) < 2 ** 62).all()                                              # NaN is not
            except (ValueError, TypeError, OverflowError):
                fine = False
            if not fine:
                raise DataError(f"{self.path}: row {self['token'][i]} has {column} {str(self[column][i])[:80]}, expected "
                                f"{' x '.join(map(str, shape)) or 'one'} finite number(s); extract the metadata archive again")
        return values

    def poses(self):
        """Columns translation (m) and rotation (quaternion w, x, y, z) -> (len(self), 4, 4) float64, row's frame to its parent's."""
        quaternion, pose = self.numbers("rotation", 4), np.tile(np.eye(4), (len(self), 1, 1))
        norm = np.linalg.norm(quaternion, axis=1)
        bad = np.flatnonzero(abs(norm - 1) > 1e-3)
        if len(bad):
            raise DataError(f"{self.path}: row {self['token'][bad[0]]} has a rotation of length {norm[bad[0]]:g}, not a unit quaternion")
        pose[:, :3, 3] = self.numbers("translation", 3)
        if len(self):
            pose[:, :3, :3] = Rotation.from_quat(quaternion[:, [1, 2, 3, 0]]).as_matrix()       # scipy has w last
        return pose


def in_order(table, time, link, column):
    """Neighbours in a chain must lie in order of time; a cycle, however long, breaks that somewhere."""
    i = np.flatnonzero(link >= 0)
    wrong = i[(time[link[i]] >= time[i]) if column == "prev" else (time[link[i]] <= time[i])]
    if len(wrong):
        raise DataError(f"{table.path}: row {table['token'][wrong[0]]} has {column} {table[column][wrong[0]]}, which does not lie "
                        f"{'before' if column == 'prev' else 'after'} it in time; "
                        "the chain is cyclic or broken: extract the metadata archive again")


def pack(**columns):
    """Equally long arrays (or lists of str, kept as bytes) -> one structured array with a field for each."""
    columns = {name: np.char.encode(np.array(c, "U")) if isinstance(c, (list, tuple)) else c for name, c in columns.items()}
    packed = np.empty(len(next(iter(columns.values()))), [(name, c.dtype, c.shape[1:]) for name, c in columns.items()])
    for name, c in columns.items():
        packed[name] = c
    return packed


def official_splits(folder):
    """{scene name: "train", "val" or "test"}: the official lists. In folder/splits.json, the devkit's place for own ones, those whose names end in train, val
    or test stand instead of the official list of that end."""
    from nuscenes.utils.splits import create_splits_scenes  # slow to import, and needed only here
    official, own = create_splits_scenes(), {}
    if (folder / "splits.json").is_file():
        try:
            own = json.loads((folder / "splits.json").read_bytes())
            if not all(type(scene) is str for scenes in own.values() for scene in scenes):
                raise TypeError("a name is no text")
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'splits.json'}: not a JSON list of scene names for each split ({error}); get the file again") from error
    ends, mini = ("train", "val", "test"), "mini_" if folder.name == "v1.0-mini" else ""
    unused = [name for name in own if not name.endswith(ends)]
    if unused:
        print_once(f"{folder / 'splits.json'}: {', '.join(unused)[:200]} not used: names that end in train, val or test are")
    split_of = {}
    for end in ends:
        lists = [scenes for name, scenes in own.items() if name.endswith(end)] or [official.get(mini + end, ())]
        for scene in (scene for scenes in lists for scene in scenes):
            if split_of.setdefault(scene, end) != end:
                raise DataError(f"{folder / 'splits.json'}: {scene} is in {split_of[scene]} and in {end}, expected one split a scene; "
                                "a list that is not in this file is the official one")
    return split_of


def build_index(root, version):
    """Parse the tables of root/version -> {name: structured array}: all that load() needs, checked, without a Python object.

    frames  token, scene, split; time (us); sensors (1 + K,) rows of `sensors`, LiDAR first; boxes (2,) first and last + 1 row of `boxes`
    sensors file; to_world (4, 4), of the LiDAR in our axes; intrinsic (3, 3); height, width; time (us); prev, the sweep before or -1
    boxes   box (9,) as Frame.boxes but in the world; category, token, instance; label or -1; lidar_points
    counts  (2,) frames in the tables, frames left out because none of their files is on disk
    """
    folder, channels = Path(root) / version, ("LIDAR_TOP", *CAMERAS)
    bar = tqdm(total=9, desc=f"{version}: reading the tables, once", unit=" tables", disable=None)      # None: quiet when not on a terminal

    def read(name, columns, keep=None):
        table = Table(folder, name, columns, keep)
        bar.update()
        return table

    # who measures: the channel number of each calibrated sensor, -1 for radars
    sensor, calibrated = read("sensor", "channel"), read("calibrated_sensor", "sensor_token translation rotation camera_intrinsic")
    channel = np.array([channels.index(c) if c in channels else -1 for c in sensor["channel"]])[calibrated.link("sensor_token", sensor)]
    intrinsic = np.zeros((len(calibrated), 3, 3))
    intrinsic[channel > 0] = calibrated.numbers("camera_intrinsic", 3, 3, rows=np.flatnonzero(channel > 0))

    # what was measured: every LiDAR sweep, and the images of key frames; a row of an unknown sensor is kept, for link() to complain
    channel_of = dict(zip(calibrated["token"], channel.tolist()))
    data = read("sample_data", "sample_token ego_pose_token calibrated_sensor_token timestamp is_key_frame height width filename prev",
                lambda row: (c := channel_of.get(row.get("calibrated_sensor_token"), 0)) == 0 or c > 0 and row.get("is_key_frame", True))
    wanted = set(data["ego_pose_token"])
    ego = read("ego_pose", "translation rotation", lambda row: row.get("token") in wanted)
    calibration = data.link("calibrated_sensor_token", calibrated)
    channel, intrinsic, is_lidar = channel[calibration], intrinsic[calibration], channel[calibration] == 0
    to_world = ego.poses()[data.link("ego_pose_token", ego)] @ calibrated.poses()[calibration]
    to_world[is_lidar] = to_world[is_lidar] @ TURN.T
    time, prev, sweeps = data.numbers("timestamp").astype(np.int64), np.full(len(data), -1), np.flatnonzero(is_lidar)
    prev[sweeps] = data.link("prev", data, rows=sweeps, end=True)
    in_order(data, time, prev, "prev")
    for token, file in zip(data["token"], data["filename"]):
        if os.path.isabs(file) or ".." in file.split("/"):
            raise DataError(f"{data.path}: row {token} has filename {file}, expected a path inside {root}; correct the table")

    # frames: scenes by their start, samples by time; which of their files are on disk
    scene, sample = read("scene", "name"), read("sample", "timestamp scene_token next")
    sample_time, sample_scene = sample.numbers("timestamp").astype(np.int64), sample.link("scene_token", scene)
    in_order(sample, sample_time, sample.link("next", sample, end=True), "next")
    start = np.full(len(scene), np.iinfo(np.int64).max)
    np.minimum.at(start, sample_scene, sample_time)
    key = np.flatnonzero(data["is_key_frame"])
    sensors = np.full((len(sample), len(channels)), -1)
    sensors[data.link("sample_token", sample, rows=key), channel[key]] = key
    for i, c in np.argwhere(sensors < 0)[:1]:
        raise DataError(f"{data.path}: no key-frame row of {channels[c]} for sample {sample['token'][i]}; "
                        "the tables are incomplete: extract the metadata archive again")
    if len(key) > sensors.size:
        raise DataError(f"{data.path}: {len(key)} key-frame rows for {len(sample)} samples, expected {len(channels)} each; "
                        "extract the metadata archive again")
    places = [os.path.split(os.path.join(root, data["filename"][i])) for i in sensors.ravel()]       # (folder, name) of each file
    listing = {place: set(os.listdir(place)) if os.path.isdir(place) else set() for place in {place for place, _ in places}}
    there = np.array([file in listing[place] for place, file in places]).reshape(sensors.shape)
    for i, c in np.argwhere(~there & there.any(1, keepdims=True))[:1]:
        file = os.path.join(root, data["filename"][sensors[i, c]])
        raise DataError(f"nuscenes/{scene['name'][sample_scene[i]]}/{sample['token'][i]}: {file} is missing, "
                        "while other files of this frame are there; extract the file blobs again")
    order = np.lexsort((sample_time, sample_scene, start[sample_scene]))
    order = order[there[order].all(1)]
    if not len(order):
        raise DataError(f"{root}: none of the {len(sample)} frames of {version} has its files under samples/; extract the file blobs there")

    # annotations, in the world
    category, instance = read("category", "name"), read("instance", "category_token")
    annotation = read("sample_annotation", "sample_token instance_token translation size rotation prev next num_lidar_pts")
    of_sample, pose = annotation.link("sample_token", sample), annotation.poses()
    before, after = annotation.link("prev", annotation, end=True), annotation.link("next", annotation, end=True)
    seen = sample_time[of_sample]
    in_order(annotation, seen, before, "prev")
    in_order(annotation, seen, after, "next")
    first, last = np.where(before < 0, np.arange(len(annotation)), before), np.where(after < 0, np.arange(len(annotation)), after)
    span = (seen[last] - seen[first]) * 1e-6                                                         # seconds, 0 for a lone box
    known = (span > 0) & (span <= np.where((before >= 0) & (after >= 0), 3., 1.5))                   # [devkit] box_velocity
    velocity = (pose[last, :2, 3] - pose[first, :2, 3]) / np.where(known, span, np.nan)[:, None]
    box = np.concatenate([pose[:, :3, 3], annotation.numbers("size", 3)[:, [1, 0, 2]],               # on disk w, l, h
                          np.arctan2(pose[:, 1, 0], pose[:, 0, 0])[:, None], velocity], 1)
    number = np.full(len(sample), -1)
    number[order] = np.arange(len(order))                                                            # sample -> frame, -1 if left out
    rows = np.argsort(number[of_sample], kind="stable")
    rows = rows[number[of_sample[rows]] >= 0]
    bounds = np.searchsorted(number[of_sample[rows]], np.arange(len(order) + 1))
    name = [category["name"][c] for c in instance.link("category_token", category)[annotation.link("instance_token", instance)]]
    label = np.array([CLASSES.index(DETECTION[n]) if n in DETECTION else -1 for n in name], np.int64)
    split_of = official_splits(folder)
    bar.close()
    return dict(
        frames=pack(token=[sample["token"][i] for i in order], scene=[scene["name"][sample_scene[i]] for i in order],
                    split=[split_of.get(scene["name"][sample_scene[i]], "") for i in order], time=sample_time[order],
                    sensors=sensors[order], boxes=np.stack([bounds[:-1], bounds[1:]], 1)),
        sensors=pack(file=data["filename"], to_world=to_world, intrinsic=intrinsic, height=data.numbers("height").astype(np.int64),
                     width=data.numbers("width").astype(np.int64), time=time, prev=prev),
        boxes=pack(box=box[rows], category=[name[i] for i in rows], token=[annotation["token"][i] for i in rows],
                   instance=[annotation["instance_token"][i] for i in rows], label=label[rows],
                   lidar_points=annotation.numbers("num_lidar_pts").astype(np.int64)[rows]),
        counts=np.array([len(sample), len(sample) - len(order)]))


def find_version(root, version):
    """Name of the folder of tables in root: `version` if given, else v1.0-trainval, else v1.0-mini, else the only one there is."""
    found = sorted({path.parent.name for path in root.glob("v1.0-*/*.json")})
    if version in found:
        return version
    if version is None:
        for choice in ("v1.0-trainval", "v1.0-mini", *found[:1] * (len(found) == 1)):
            if choice in found:
                if len(found) > 1:
                    print_once(f"{root}: {' and '.join(found)} are here; reading {choice}. For another give its folder, such as {root / found[found[0] == choice]}")
                return choice
    raise DataError(f"{root}: found {', '.join(found) or 'no tables'}, not {version or 'v1.0-trainval or v1.0-mini'}; "
                    f"give the folder of the one that is meant{', such as ' + str(root / found[0]) if found else ''}")


class NuScenes:
    """Reader of nuScenes. Opening parses the tables once and keeps an index under cache_dir(); reading a frame touches mapped rows only.

    .grid  .root  .version  .frames (structured array, a row a frame, see build_index)  .names  .split(name)  .load(i)
    """

    LAYOUTS, LAYOUT_HINT = {"nuScenes": ("v1.0-*/*.json",)}, "samples/ and v1.0-*/"

    def __init__(self, root, preset="paper", version=None):
        self.grid, self.preset = GRIDS["nuscenes", preset], preset
        self.root = os.path.realpath(root)
        for folder in ("samples", "sweeps"):            # a link to elsewhere is refused: now, not after the index is built
            inside(self.root, folder, self.root)
        self.version = find_version(Path(self.root), version)
        self.what = f"{self.root}: nuScenes {self.version}"
        tables, samples = Path(self.root, self.version).glob("*.json"), Path(self.root, "samples").glob("*")
        state = sorted([(str(path), stat.st_size, stat.st_mtime_ns) for path in tables for stat in [path.stat()]]
                       + [(str(path), path.stat().st_mtime_ns) for path in samples])     # folders: more blobs may be extracted later
        self.key = hashlib.sha256(repr((VERSION, state)).encode()).hexdigest()[:16]
        self.open_index()
        total, left_out = self.counts
        if left_out:
            print_once(f"{self.root}: {left_out} of the {total} frames of {self.version} have no file on disk and are left out")

    def open_index(self):
        folder = cache_dir() / f"index-{self.key}"
        if self.map_index(folder):
            return
        with locked(folder):
            if self.map_index(folder):                  # another process was first
                return
            index, aside = build_index(self.root, self.version), temp_path(folder)
            try:
                shutil.rmtree(folder, ignore_errors=True)
                aside.mkdir()
                for name, array in index.items():
                    np.save(aside / f"{name}.npy", array, allow_pickle=False)
            except OSError as error:
                shutil.rmtree(aside, ignore_errors=True)
                raise not_writable(folder, error) from error
            try:
                aside.rename(folder)
            except OSError:                             # another process was first (see locked): its index is as good
                shutil.rmtree(aside)
            if not self.map_index(folder):
                raise DataError(f"{folder}: this index cannot be read back; point LIDAR_CAMERA_CACHE to another folder")

    def map_index(self, folder):
        """Map the index if it is there and whole -> whether it is."""
        try:
            self.frames, self.sensors, self.boxes, self.counts = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                                                                  for name in ("frames", "sensors", "boxes", "counts"))
            return True
        except FileNotFoundError:
            return False                                # not built yet
        except PermissionError as error:
            raise DataError(f"{folder}: this index of another user cannot be read; let its owner open it, or point LIDAR_CAMERA_CACHE to another folder") from error
        except (OSError, ValueError, EOFError) as error:
            print_once(f"{folder}: damaged ({error}), built again")
            return False

    def __getstate__(self):                             # what a worker receives: no array, it maps the index itself
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, np.ndarray)}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.open_index()

    def __len__(self):
        return len(self.frames)

    def name(self, i):
        return f"nuscenes/{self.frames['scene'][i].decode()}/{self.frames['token'][i].decode()}"

    @property
    def names(self):
        return [self.name(i) for i in range(len(self))]

    def split(self, name):
        """Frame numbers of "train", "val" or "test", scenes by their start and frames by time; (n,) int64. See split_frames."""
        return split_frames(self.what, self.frames["split"], name)

    def sweep(self, i):
        """Key sweep of frame i as it is on disk, ego vehicle included -> (N, 5) float32: x forward, y left, z up; intensity; ring."""
        return self.read_sweep(self.sensors[self.frames["sensors"][i, 0]], self.name(i))

    def read_sweep(self, sensor, name):
        file = inside(self.root, sensor["file"].decode(), name)
        try:
            raw = np.fromfile(file, np.uint8)
        except OSError as error:
            raise DataError(f"{name}: {file} cannot be read ({error.strerror}); extract the LiDAR blobs (samples and sweeps) again") from error
        if raw.size == 0 or raw.size % 20:
            raise DataError(f"{name}: {file} has {raw.size} bytes, expected N x 20 (five float32 a point, N > 0); "
                            "the file is truncated: extract it again")
        x, y, z, intensity, ring = columns = np.ascontiguousarray(raw.view(np.float32).reshape(-1, 5).T)
        low, high = columns.min(1), columns.max(1)                                                   # NaN where any is
        if not (low[:3] > -300).all() or not (high[:3] < 300).all() or not low[3] >= 0 or not high[3] <= 255:
            raise DataError(f"{name}: {file} has columns from {low} to {high}, expected finite x, y, z within 300 m and "
                            "intensity in 0..255; the file is damaged or not five float32 a point: extract it again")
        # a file of 4 floats a point can pass for one of 5 by its size; its "rings" give it away
        if not low[4] >= 0 or not high[4] <= 31 or (ring != np.rint(ring)).any():
            raise DataError(f"{name}: {file} has rings from {low[4]:g} to {high[4]:g}, expected whole numbers in 0..31; "
                            "is it written with another number of floats a point than 5?")
        return np.stack([y, -x, z, intensity / 255, ring], 1)                                        # TURN

    def annotations(self, i):
        """All boxes of frame i, as structured rows: box (9,) float64 as Frame.boxes but in the world, category, token, instance,
        label (-1: a category outside the detection task), lidar_points (in the key sweep)."""
        return self.boxes[slice(*self.frames["boxes"][i])]

    def calibrated_by(self, i):
        """Which files say where the cameras of frame i are: for messages."""
        return f"{self.version}/calibrated_sensor.json and ego_pose.json"

    def label_evidence(self, i):
        """-> how many boxes of frame i hold as many points of the key sweep as their annotation says, how many boxes, and what that tests."""
        points, rows = self.sweep(i), self.annotations(i)
        to_world = self.sensors[self.frames["sensors"][i, 0]]["to_world"]
        world = points[:, :3].astype(np.float64) @ to_world[:3, :3].T + to_world[:3, 3]
        right = sum(inside_box(world, row["box"]).sum() == row["lidar_points"] for row in rows)
        return right, len(rows), f"boxes hold the number of LiDAR points that {self.version}/sample_annotation.json states"

    def load(self, i, image=None):
        """Read frame i -> Frame. image (H, W) is the size of its pictures, default the grid's."""
        name, row = self.name(i), self.frames[i]
        lidar, cameras = self.sensors[row["sensors"][0]], self.sensors[row["sensors"][1:]]
        lidar2world = np.array(lidar["to_world"])
        world2lidar = np.linalg.inv(lidar2world)

        clouds, sensor = [], lidar
        for _ in range(self.grid.sweeps):
            points = self.read_sweep(sensor, name)
            x, y = points[:, 0], points[:, 1]
            # the car itself, 3 % of it beyond the devkit's |x|, |y| < 1: bonnet and tail, and nothing else fits there        [ours]
            points = np.compress(~((x > -1.5) & (x < 2.5) & (abs(y) < 1)), points, 0)                # a third of the time of points[mask]
            if sensor is not lidar:
                move = (world2lidar @ sensor["to_world"]).astype(np.float32)                         # product in float64
                points[:, :3] = (move[:3, :3] @ points[:, :3].T + move[:3, 3:]).T                    # columns: a third of the time of rows
            points[:, 4] = (lidar["time"] - sensor["time"]) * 1e-6
            clouds.append(points)
            if sensor["prev"] < 0:
                break
            sensor = self.sensors[sensor["prev"]]

        # LiDAR -> world -> camera with each sensor's own ego pose: the car moves up to a metre between sweep and shutter
        images, crops = zip(*[read_image(inside(self.root, camera["file"].decode(), name), image or self.grid.image, name,
                                         (camera["width"], camera["height"])) for camera in cameras])
        world2img = np.tile(np.eye(4), (len(cameras), 1, 1))
        world2img[:, :3, :3] = np.stack(crops) @ cameras["intrinsic"]
        lidar2img = world2img @ np.linalg.inv(cameras["to_world"]) @ lidar2world

        boxes = labels = None
        if len(self.boxes):                             # v1.0-test has no annotation at all
            rows = self.annotations(i)
            rows = rows[rows["label"] >= 0]
            boxes, labels = warp_boxes(rows["box"], world2lidar).astype(np.float32), rows["label"].astype(np.int64)
        return Frame(np.concatenate(clouds), np.zeros(3, np.float32), list(images), lidar2img.astype(np.float32), lidar2world,
                     row["time"] * 1e-6, boxes, labels, {}, name)


# ---- KITTI: object frames or raw drives ----

KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare")
KITTI_LABEL = [("type", "U14"), ("truncated", "f8"), ("occluded", "i8"), ("alpha", "f8"), ("bbox", "f8", 4), ("hwl", "f8", 3), ("location", "f8", 3),
               ("rotation_y", "f8"), ("box", "f8", 9), ("label", "i8")]


class KittiFile(NamedTuple):
    """Where the files of one frame are, relative to the root."""
    name: str
    split: str                      # train, val, test or "" (object frames that no ImageSet lists)
    cloud: str
    image: str
    calibration: tuple[str, ...]    # one file (object) or two (raw)
    labels: str                     # "" where there are none


def read_calibration(path, keys, name):
    """Lines "key: numbers" of a calibration file. keys {key: shape} -> list of float64 arrays in their order; other lines are not looked at."""
    try:
        lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    except FileNotFoundError as error:
        raise DataError(f"{name}: {path} is missing; extract the calibration files again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {path} is not text ({error}); extract the calibration files again") from error
    arrays = []
    for key, shape in keys.items():
        if key not in lines:
            raise DataError(f"{name}: {path} has no line {key}, only {', '.join(lines) or 'none'}; extract the calibration files again")
        try:
            array = np.array(lines[key].split(), np.float64)
        except ValueError:
            array = np.full(0, np.nan)
        if array.size != np.prod(shape) or not np.isfinite(array).all():
            raise DataError(f"{name}: {path} has {key}:{lines[key][:80]}, expected {np.prod(shape)} finite numbers; extract the calibration files again")
        arrays.append(array.reshape(shape))
    return arrays


def homogeneous(matrix):
    """(3, 3) or (3, 4) -> (4, 4)."""
    out = np.eye(4)
    out[:3, :matrix.shape[1]] = matrix
    return out


class Kitti:
    """Reader of KITTI, left colour camera and full scans: object frames (training/, testing/) or, without those, raw drives (<date>/<date>_drive_<n>_sync/).

    .grid  .root  .layout ("object frames" or "raw drives")  .frames (list of KittiFile)  .names  .split(name)  .load(i)
    """

    LAYOUTS = {"object frames": ("training/velodyne", "testing/velodyne"),
               "raw drives": ("*_drive_*_sync/velodyne_points", "*/*_drive_*_sync/velodyne_points")}
    LAYOUT_HINT = "training/velodyne, or <date>/<date>_drive_<n>_sync"

    def __init__(self, root, preset="paper"):
        self.grid, self.preset, self.root = GRIDS["kitti", preset], preset, os.path.realpath(root)
        there = {layout: places for layout, patterns in self.LAYOUTS.items() if (places := [p for pattern in patterns for p in sorted(Path(self.root).glob(pattern))])}
        self.layout = next(iter(there))
        self.what = f"{self.root}: KITTI {self.layout}"
        if len(there) > 1:
            print_once(f"{self.root}: object frames and raw drives are here; reading the object frames. "
                f"For the drives of one day give {there['raw drives'][0].parent.parent}, for all of them a folder that holds only the dates")
        self.frames = self.find_object_frames() if self.layout == "object frames" else self.find_raw_frames(there[self.layout])
        if not self.frames:
            raise DataError(f"{self.root}: no frame among its {self.layout}; extract the scans (.bin) and left colour pictures (.png)")
        folders = sorted({os.path.dirname(file) for frame in self.frames for file in (frame.cloud, frame.image, *frame.calibration)})
        for folder in filter(None, folders):            # a link to elsewhere is refused before the first frame
            inside(self.root, folder, self.root)

    def listing(self, folder, ending):
        """Names without `ending` of the files in a folder under the root; empty where there is none."""
        path = os.path.join(self.root, folder)
        return {file[:-len(ending)] for file in os.listdir(path) if file.endswith(ending) and file[0] != "."} if os.path.isdir(path) else set()      # "._": a Mac's

    def find_object_frames(self):
        """Frames of training/ and testing/ by number; splits from ImageSets/ where it is."""
        split_of, frames = {}, []
        lists = [os.path.isfile(os.path.join(self.root, "ImageSets", f"{split}.txt")) for split in ("train", "val")]
        if any(lists) != all(lists):
            raise DataError(f"{self.root}: ImageSets has {'val' if lists[1] else 'train'}.txt alone, expected train.txt and val.txt, or neither; put the other there too")
        for split in ("train", "val", "test"):
            path = Path(self.root, "ImageSets", f"{split}.txt")
            for number, line in enumerate(path.read_text(errors="replace").split() if path.is_file() else (), 1):
                folder = "testing" if split == "test" else "training"
                if not re.fullmatch(r"\d{6}", line):
                    raise DataError(f"{path}: entry {number} is {line[:80]!r}, expected six digits, the number of a frame; get the file again")
                if split_of.setdefault((folder, line), split) != split:
                    raise DataError(f"{path}: frame {line} is in {split_of[folder, line]}.txt too, expected one split a frame; get the files again")
        for folder in ("training", "testing"):
            kinds = [("velodyne", ".bin"), ("image_2", ".png"), ("calib", ".txt"), ("label_2", ".txt")]
            labelled = folder == "training" and os.path.isdir(os.path.join(self.root, folder, "label_2"))
            there = [self.listing(f"{folder}/{kind}", ending) for kind, ending in kinds[:3 + labelled]]
            for number in sorted(there[0] | there[1]):      # all calibrations and labels beside a few scans are nothing unusual
                name, files = f"kitti/{folder}/{number}", [f"{folder}/{kind}/{number}{ending}" for kind, ending in kinds]
                for file, present in zip(files, there):
                    if number not in present:
                        raise DataError(f"{name}: {os.path.join(self.root, file)} is missing, while other files of this frame are there; extract it again")
                split = "test" if folder == "testing" else split_of.get((folder, number), "" if split_of else "train")
                frames.append(KittiFile(name, split, files[0], files[1], (files[2],), files[3] if labelled else ""))
        absent = len(split_of.keys() - {tuple(frame.name.split("/")[1:]) for frame in frames})
        if absent:
            print_once(f"{self.root}: {absent} of the {len(split_of)} frames in ImageSets have no scan or picture on disk and are left out")
        return frames

    def find_raw_frames(self, places):
        """Frames of every drive in order of time; those without a scan or a picture (some drives lack a few scans) are left out aloud."""
        frames, left_out = [], 0
        for place in places:
            drive = place.parent.relative_to(self.root)
            clouds, images = self.listing(drive / "velodyne_points/data", ".bin"), self.listing(drive / "image_02/data", ".png")
            left_out += len(clouds ^ images)
            frames += [KittiFile(f"kitti/{place.parent.name}/{number}", "", str(drive / f"velodyne_points/data/{number}.bin"), str(drive / f"image_02/data/{number}.png"),
                                 (str(drive.parent / "calib_cam_to_cam.txt"), str(drive.parent / "calib_velo_to_cam.txt")), "") for number in sorted(clouds & images)]
        if left_out:
            print_once(f"{self.root}: {left_out} raw frames have only a scan or only a picture and are left out")
        return frames

    def __len__(self):
        return len(self.frames)

    @property
    def names(self):
        return [frame.name for frame in self.frames]

    def split(self, name):
        """Frame numbers of "train", "val" or "test" -> (n,) int64. See split_frames."""
        return split_frames(self.what, np.array([frame.split.encode() for frame in self.frames]), name)

    def sweep(self, i):
        """Full scan of frame i as it is on disk -> (N, 4) float32: x forward, y left, z up; reflectance 0..1."""
        name = self.frames[i].name
        file = inside(self.root, self.frames[i].cloud, name)
        size = os.path.getsize(file) if os.path.isfile(file) else 0
        if size == 0 or size % 16:
            raise DataError(f"{name}: {file} has {size} bytes, expected N x 16 (four float32 a point, N > 0); the file is missing or truncated: extract it again")
        points = np.fromfile(file, np.float32).reshape(-1, 4)
        low, high = points.min(0), points.max(0)                                                     # NaN where any is
        if not (low[:3] > -300).all() or not (high[:3] < 300).all() or not low[3] >= 0 or not high[3] <= 1:
            raise DataError(f"{name}: {file} has columns from {low} to {high}, expected finite x, y, z within 300 m and "
                            "reflectance in 0..1; the file is damaged or not four float32 a point: extract it again")
        return points

    def calibration(self, i):
        """-> lidar2rect (4, 4), LiDAR to rectified camera 0, where the labels are; rect2img (4, 4), from there to the pixels on disk; both float64."""
        frame, paths = self.frames[i], [inside(self.root, file, self.frames[i].name) for file in self.frames[i].calibration]
        if self.layout == "object frames":
            P, R, T = read_calibration(paths[0], {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}, frame.name)
        else:
            P, R = read_calibration(paths[0], {"P_rect_02": (3, 4), "R_rect_00": (3, 3)}, frame.name)
            T = np.concatenate(read_calibration(paths[1], {"R": (3, 3), "T": (3, 1)}, frame.name), 1)
        return homogeneous(R) @ homogeneous(T), homogeneous(P)

    def annotations(self, i):
        """Label rows of frame i as they are on disk, "DontCare" included, as structured rows (KITTI_LABEL): bbox left, top, right, bottom in px; location the
        middle of the bottom face in rectified camera 0; and box (9,) as Frame.boxes, NaN for DontCare; label, -1 outside Grid.classes. No row without labels."""
        frame = self.frames[i]
        if not frame.labels:
            return np.zeros(0, KITTI_LABEL)
        path = Path(inside(self.root, frame.labels, frame.name))
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{frame.name}: {path} cannot be read ({error}); extract the labels again") from error
        rows = np.zeros(len(lines), KITTI_LABEL)
        for n, line in enumerate(lines):
            kind, *words = line.split() or [""]
            try:
                v = np.array(words, np.float64)
            except ValueError:
                v = np.zeros(0)
            if kind not in KITTI_TYPES or v.shape != (14,) or not (abs(v) < 1e6).all():             # NaN is not
                raise DataError(f"{frame.name}: {path}, line {n + 1} is {line[:200]!r}, expected one of {', '.join(KITTI_TYPES)} and 14 finite numbers; "
                                "extract the labels again")
            label = self.grid.classes.index(kind) if kind in self.grid.classes else -1
            rows[n] = kind, *v[:3], v[3:7], v[7:10], v[10:13], v[13], np.nan, label
        rect2lidar = np.linalg.inv(self.calibration(i)[0])
        centre, y = rows["location"] - rows["hwl"][:, :1] / 2 * [0, 1, 0], rows["rotation_y"]         # camera y points down
        heading = np.stack([np.cos(y), np.zeros(len(y)), -np.sin(y)], 1) @ rect2lidar[:3, :3].T      # -(rotation_y + pi / 2), but for the sensors' tilt
        rows["box"] = np.concatenate([centre @ rect2lidar[:3, :3].T + rect2lidar[:3, 3], rows["hwl"][:, ::-1],
                                      np.arctan2(heading[:, 1], heading[:, 0])[:, None], np.full((len(y), 2), np.nan)], 1)
        rows["box"][rows["type"] == "DontCare"] = np.nan
        return rows

    def picture_size(self, i):
        """Width, height of frame i's picture as it is on disk, px: it varies."""
        with Image.open(inside(self.root, self.frames[i].image, self.frames[i].name)) as picture:
            return picture.size

    def shown(self, i, points):
        """Which points (N, 3 or more) the picture of frame i, as it is on disk, shows -> (N,) bool."""
        lidar2rect, rect2img = self.calibration(i)
        return visible_points(points, (rect2img @ lidar2rect)[None], [self.picture_size(i)[::-1]])[0]

    def calibrated_by(self, i):
        """Which files say where the camera of frame i is: for messages."""
        return " and ".join(self.frames[i].calibration)

    def label_evidence(self, i):
        """-> how many cars of frame i, plainly in the picture, whose 3-D box projects onto their 2-D box (IoU > 0.7), how many such cars, and what that tests."""
        rows, (lidar2rect, rect2img), right = self.annotations(i), self.calibration(i), 0
        rows = rows[(rows["type"] == "Car") & (rows["truncated"] == 0) & (rows["occluded"] == 0)]
        for row in rows:
            uvd = box_corners(row["box"]) @ (rect2img @ lidar2rect)[:3, :3].T + (rect2img @ lidar2rect)[:3, 3]
            uv = uvd[:, :2] / uvd[:, 2:]
            a, b = np.concatenate([uv.min(0), uv.max(0)]), row["bbox"]
            both = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
            right += both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both) > 0.7
        return right, len(rows), "unoccluded cars of label_2 whose projected box meets their 2-D box with an IoU above 0.7"

    def load(self, i, image=None):
        """Read frame i -> Frame. image (H, W) is the size of its picture, default the grid's."""
        frame, scan = self.frames[i], self.sweep(i)
        lidar2rect, rect2img = self.calibration(i)
        pixels, crop = read_image(inside(self.root, frame.image, frame.name), image or self.grid.image, frame.name)    # sizes vary between recording days
        lidar2img = homogeneous(crop) @ rect2img @ lidar2rect
        boxes = labels = None
        if frame.labels:
            rows = self.annotations(i)
            rows = rows[rows["label"] >= 0]
            boxes, labels = rows["box"].astype(np.float32), rows["label"].astype(np.int64)
        time = 0.1 * int(frame.name.rsplit("/", 1)[1]) if self.layout == "raw drives" else 0.        # 10 Hz
        points = np.pad(scan, ((0, 0), (0, 1)))                                                      # one sweep: 0 s before itself
        return Frame(points, np.zeros(3, np.float32), [pixels], lidar2img[None].astype(np.float32), np.eye(4), time, boxes, labels, {}, frame.name)


# ---- Waymo Open Dataset v2: parquet tables, a file for each segment and component ----

WAYMO_TYPES = {1: "Vehicle", 2: "Pedestrian", 4: "Cyclist"}                 # 3 is signs, no class of the detection task
WAYMO_BOX = [("box", "f8", 9), ("label", "i8"), ("lidar_points", "i8"), ("difficulty", "i8"), ("token", "U64")]
OPENCV = np.array([[0., -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])    # a Waymo camera looks along x, z up -> right, down, forward
TOP, ELSEWHERE = 1, 0.001                                                   # the laser that `origin` is of; s: the other lasers' points are no rays from there


class WaymoFrame(NamedTuple):
    folder: str                     # training, validation or testing
    segment: str
    time: int                       # us, start of the scan


def range_image_points(distance, extrinsic, inclinations, pixel_poses=None, vehicle2world=None):
    """Range image -> points in the vehicle's place at the frame's pose, float64. Source: the official range_image_utils.

    distance (H, W) m, > 0 where something was hit; extrinsic (4, 4) laser to vehicle; inclinations (H,) rad, lowest beam first; pixel_poses (H, W, 6) roll, pitch,
    yaw, x, y, z of the vehicle when each pixel was shot (TOP only), vehicle2world (4, 4) -> (n, 3), rows (n,), columns (n,).
    """
    H, W = distance.shape
    row, column = np.nonzero(distance > 0)
    inclination = inclinations[::-1][row]                                                            # row 0 is the highest beam
    azimuth = ((W - column - 0.5) / W * 2 - 1) * np.pi - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    ray = np.stack([np.cos(azimuth) * np.cos(inclination), np.sin(azimuth) * np.cos(inclination), np.sin(inclination)], 1)
    points = (ray * distance[row, column, None]) @ extrinsic[:3, :3].T + extrinsic[:3, 3]
    if pixel_poses is not None:
        pose, world2vehicle = pixel_poses[row, column].astype(np.float64), np.linalg.inv(vehicle2world)
        shift = pose[:, 3:] - vehicle2world[:3, 3]                                                   # first: coordinates of 10 km keep their millimetres
        points = (Rotation.from_euler("xyz", pose[:, :3]).apply(points) + shift) @ world2vehicle[:3, :3].T
    return points, row, column


def rows_of_time(file, columns, key, time):
    """The rows of an open parquet file where column `key` is `time` -> a table of these columns.

    Decoded a few rows at a time and no further than needed: a row group of the official files has 256 rows, of pixel poses a whole segment, 800 MB.
    """
    import pyarrow
    times, begin, found = file.read([key], use_threads=False)[key].to_numpy(), 0, []
    size = 4 if any(column.endswith(("values", "image")) for column in columns) else 4096
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        wanted, at = np.flatnonzero(times[begin:end] == time), 0
        for batch in file.iter_batches(size, [group], columns, use_threads=False) if len(wanted) else ():
            here = wanted[(wanted >= at) & (wanted < at + len(batch))] - at
            if len(here):
                found.append(batch.take(pyarrow.array(here)))
            at += len(batch)
            if at > wanted[-1]:
                break
        begin = end
    return pyarrow.Table.from_batches(found, pyarrow.schema([file.schema_arrow.field(column) for column in columns]))


GROUPED = dict(lidar=5, lidar_pose=1, camera_image=5)                        # rows of a frame in the large components
COMPONENTS = (*GROUPED, "lidar_calibration", "vehicle_pose", "lidar_box", "camera_calibration")      # what is read here; testing has no lidar_box


def regroup(root, target):
    """A copy of a Waymo folder, as far as Waymo reads it, whose large files have a row group for each few rows: a frame is read without what lies before it.

    A file that is there already is left, so that the same call goes on after an interruption.
    """
    import pyarrow
    import pyarrow.parquet as parquet
    files = [path for name in COMPONENTS for path in sorted(Path(root).glob(f"*/{name}/[!.]*.parquet"))]
    if not files:
        raise DataError(f"{root}: no parquet file of the Waymo Open Dataset v2 here; give the folder that holds {Waymo.LAYOUT_HINT}")
    for path in tqdm(files, unit=" files", disable=None):
        copy = Path(target) / path.relative_to(root)
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        part, rows = copy.with_name(copy.name + ".part"), GROUPED.get(path.parent.name)
        try:
            if rows:
                with parquet.ParquetFile(path, buffer_size=2**20) as file, parquet.ParquetWriter(part, file.schema_arrow) as out:
                    for batch in file.iter_batches(rows):
                        out.write_batch(batch)
            else:
                shutil.copyfile(path, part)
            os.replace(part, copy)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, pyarrow.ArrowException):
                raise DataError(f"{path} is not a whole parquet file ({str(error)[:120]}); download it again") from error
            raise


class Waymo:
    """Reader of the Waymo Open Dataset v2: <split>/<component>/<segment>.parquet. Needs pyarrow, no TensorFlow and no conversion.

    First returns of all lasers outside no-label zones; those of the four short-range ones carry 1 ms of age, since they were not shot from `origin`, where TOP
    stands. The frame is the vehicle's: x forward, y left, z up from the road. Pictures are freed of their lens distortion after resizing, so that lidar2img is exact
    for a rigid world.
    .grid  .root  .frames (list of WaymoFrame)  .names  .split(name)  .load(i)
    """

    LAYOUTS = {"segments": ("training/vehicle_pose/*.parquet", "validation/vehicle_pose/*.parquet", "testing/vehicle_pose/*.parquet")}
    LAYOUT_HINT = "training/vehicle_pose/<segment>.parquet"
    SPLITS = {"training": "train", "validation": "val", "testing": "test"}

    def __init__(self, root, preset="paper"):
        self.grid, self.preset, self.root = GRIDS["waymo", preset], preset, os.path.realpath(root)
        self.what = f"{self.root}: Waymo v2"
        files = [path for folder in self.SPLITS for path in sorted(Path(self.root, folder, "vehicle_pose").glob("[!.]*.parquet"))]
        wanted = [path.parents[1] / component / path.name for path in files for component in COMPONENTS if (component, path.parents[1].name) != ("lidar_box", "testing")]
        there = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {file.parent for file in wanted}}
        missing = [file for file in wanted if file.name not in there[file.parent]]
        self.frames, partial = [], {(file.parents[1].name, file.name) for file in missing}
        if len(partial) == len(files):
            raise DataError(f"{self.what}: none of its {len(files)} segments is whole, {missing[0]} is missing; download every component: {', '.join(COMPONENTS)}")
        if partial:
            print_once(f"{self.what}: {len(partial)} of its {len(files)} segments lack files and are left out; the first is {missing[0]}")
        for path in (path for path in files if (path.parents[1].name, path.name) not in partial):
            segment = WaymoFrame(path.parent.parent.name, path.stem, 0)
            self.frames += [segment._replace(time=int(t)) for t in sorted(self.read(segment, "vehicle_pose", ["key.frame_timestamp_micros"])[0])]
        if not self.frames:
            raise DataError(f"{self.what}: no frame in its vehicle_pose files; download them again")

    def read(self, frame, component, columns, all_times=False):
        """Columns of one component of a frame's segment, the rows of its time only (time 0 or all_times: every row) -> a list of values for each column.

        columns: "key.x", or "field.subfield" without the component's own prefix. Nothing is kept.
        """
        import pyarrow
        import pyarrow.parquet as parquet
        name, path, key = self.name_of(frame), inside(self.root, f"{frame.folder}/{component}/{frame.segment}.parquet", self.what), "key.frame_timestamp_micros"
        one_time = frame.time and not all_times
        try:
            with parquet.ParquetFile(path, buffer_size=2**20) as file:         # bytes: else a whole column of a row group is held
                schema = file.schema_arrow
                full = {column: next((c for c in schema.names if c == column or c.endswith("]." + column)), None) for column in [*columns, *[key] * bool(one_time)]}
                for column in full:
                    if full[column] is None:
                        raise DataError(f"{name}: {path} has no column {column}, only {', '.join(schema.names)[:200]}; "
                                        "expected version 2 of the data set: download it again")
                    if not self.fits(column, kind := schema.field(full[column]).type):
                        raise DataError(f"{name}: {path} has {kind} in column {column}; expected version 2 of the data set: download it again")
                chosen = [full[column] for column in columns]
                table = rows_of_time(file, chosen, full[key], frame.time) if one_time else file.read(chosen, use_threads=False)
            values = [table[full[column]].to_pylist() if not column.endswith("values") else table[full[column]] for column in columns]
        except FileNotFoundError as error:
            raise DataError(f"{name}: {path} is missing; download the component {component} of this segment") from error
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            size = os.path.getsize(path)
            raise DataError(f"{name}: {path} is not a whole parquet file ({str(error)[:120]}), {size} bytes; download it again") from error
        for column in columns:
            if table[full[column]].null_count and not column.startswith(("beam_inclination", "difficulty", "num_lidar", "speed")):
                raise DataError(f"{name}: {path} has rows without {column}; download it again")
        return values

    @staticmethod
    def fits(column, kind):
        """Whether a column of the data set may be of this Arrow type: lists of numbers, a picture's bytes, a text, or a number."""
        from pyarrow import types
        if column.endswith(("values", "shape", "transform")):
            return hasattr(kind, "value_type") and (types.is_floating(kind.value_type) or types.is_integer(kind.value_type))
        if column in ("image", "key.laser_object_id"):
            return types.is_binary(kind) if column == "image" else types.is_string(kind)
        return types.is_integer(kind) or types.is_floating(kind) and column != "type" and not column.startswith("key.")

    def arrays(self, frame, component, columns, shape):
        """Images of float numbers of one frame, by laser: {laser: (H, W, shape)} float32; columns (values, shape)."""
        lasers, values, sizes = self.read(frame, component, ["key.laser_name", *columns])
        found = {}
        for laser, value, size in zip(lasers, values, sizes):
            flat = np.asarray(value.values, np.float32)
            if size is None or len(size) != 3 or size[2] != shape or flat.size != np.prod(size):
                raise DataError(f"{self.name_of(frame)}: {component} of laser {laser} has {flat.size} values for the shape {size}, expected H x W x {shape}; "
                                "download it again")
            found[int(laser)] = flat.reshape(size)
        return found

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
        return split_frames(self.what, np.array([self.SPLITS[frame.folder].encode() for frame in self.frames]), name)

    def matrix(self, rows, who):
        """A (4, 4) float64 from one row of 16 numbers."""
        values = np.array(rows, np.float64)
        turn = values.reshape(4, 4)[:3, :3] if values.shape == (16,) else np.zeros((3, 3))
        if not np.allclose(turn @ turn.T, np.eye(3), atol=1e-3) or not (abs(values) < 1e8).all():        # NaN is not
            raise DataError(f"{who} is {str(rows)[:80]}, expected 16 finite numbers, a rotation and a shift; download it again")
        return values.reshape(4, 4)

    def pose(self, frame):
        """Vehicle to world at the frame's own pose -> (4, 4) float64."""
        (transform,) = self.read(frame, "vehicle_pose", ["world_from_vehicle.transform"])
        if len(transform) != 1:
            raise DataError(f"{self.name_of(frame)}: vehicle_pose has {len(transform)} rows of this time, expected one; download it again")
        return self.matrix(transform[0], f"{self.name_of(frame)}: vehicle_pose")

    def points(self, frame, vehicle2world):
        """First returns of every laser -> points (N, 5) float32, TOP's first, and where TOP stands (3,)."""
        name = self.name_of(frame)
        images = self.arrays(frame, "lidar", ["range_image_return1.values", "range_image_return1.shape"], 4)
        poses = self.arrays(frame, "lidar_pose", ["range_image_return1.values", "range_image_return1.shape"], 6)
        calibration = {laser: row for laser, *row in zip(*self.read(frame, "lidar_calibration", [
            "key.laser_name", "extrinsic.transform", "beam_inclination.min", "beam_inclination.max", "beam_inclination.values"], all_times=True))}
        clouds, origin = [], None
        for laser, image in sorted(images.items()):
            if laser not in calibration:
                raise DataError(f"{name}: lidar_calibration has no laser {laser}, only {sorted(calibration)}; download it again")
            transform, low, high, values = calibration[laser]
            extrinsic, H = self.matrix(transform, f"{name}: lidar_calibration of laser {laser}"), len(image)
            values = values.as_py()
            inclinations = np.array(values, np.float64) if values else (np.arange(H) + 0.5) / H * (high - low) + low
            if len(inclinations) != H or laser == TOP and (laser not in poses or poses[laser].shape[:2] != image.shape[:2]):
                raise DataError(f"{name}: laser {laser} has an image of {H} rows, {len(inclinations)} inclinations"
                                f"{'' if laser != TOP or laser in poses else ', no pixel poses'}; download lidar_calibration and lidar_pose again")
            distance = np.where(image[..., 3] > 0, -1, image[..., 0]).astype(np.float64)             # nothing is annotated in no-label zones
            if not distance.max(initial=0) < 300:                                                    # NaN too
                raise DataError(f"{name}: ranges of laser {laser} go up to {distance.max()}, expected finite ones below 300 m; download lidar again")
            xyz, row, column = range_image_points(distance, extrinsic, inclinations, poses.get(laser), vehicle2world)
            if not (abs(xyz) < 300).all():                                                           # NaN too
                raise DataError(f"{name}: points of laser {laser} lie up to {abs(xyz).max()} m away, expected finite ones within 300 m; "
                                "download lidar_calibration and lidar_pose again")
            clouds.append(np.column_stack([xyz, np.tanh(np.nan_to_num(image[row, column, 1]).clip(0)), np.full(len(xyz), 0 if laser == TOP else ELSEWHERE)]))
            origin = extrinsic[:3, 3] if laser == TOP else origin
        if origin is None:
            raise DataError(f"{name}: lidar has no image of TOP (laser 1), only of {sorted(images)}; download it again")
        return np.concatenate(clouds).astype(np.float32), origin.astype(np.float32)

    def annotations(self, i):
        """Boxes of frame i as structured rows: box (9,) as Frame.boxes, label or -1 (signs), lidar_points, difficulty (0 unsaid, 1, 2), token. No row in testing."""
        frame = self.frames[i]
        if not os.path.isfile(os.path.join(self.root, frame.folder, "lidar_box", f"{frame.segment}.parquet")) and frame.folder == "testing":
            return np.zeros(0, WAYMO_BOX)
        columns = [f"box.{part}.{axis}" for part in ("center", "size") for axis in "xyz"] + ["box.heading", "speed.x", "speed.y"]
        columns += ["type", "num_lidar_points_in_box", "difficulty_level.detection", "key.laser_object_id"]
        *numbers, kind, count, difficulty, token = self.read(frame, "lidar_box", columns)
        rows = np.zeros(len(kind), WAYMO_BOX)
        rows["box"] = np.array([[np.nan if v is None else v for v in column] for column in numbers], np.float64).reshape(9, -1).T
        if not np.isfinite(rows["box"][:, :7]).all() or not (rows["box"][:, 3:6] > 0).all():
            raise DataError(f"{self.name_of(frame)}: lidar_box has a box without a place or size; download it again")
        rows["label"] = [self.grid.classes.index(WAYMO_TYPES[int(k)]) if int(k) in WAYMO_TYPES else -1 for k in kind]
        rows["lidar_points"], rows["difficulty"] = (np.nan_to_num(np.array(values, np.float64)) for values in (count, difficulty))        # null: 0
        rows["token"] = token
        rows["box"][:, 7:9] = rows["box"][:, 7:9] @ self.pose(frame)[:2, :2]         # speeds are the world's
        return rows

    def calibrated_by(self, i):
        """Which files say where the cameras of frame i are: for messages."""
        return f"{self.frames[i].folder}/camera_calibration/{self.frames[i].segment}.parquet"

    def label_evidence(self, i):
        """-> how many boxes of frame i hold at least half and not more of our first returns than their count of all returns, how many of 5 or more, what that tests."""
        frame, rows = self.frames[i], self.annotations(i)
        rows, (points, _) = rows[rows["lidar_points"] >= 5], self.points(frame, self.pose(frame))
        held = np.array([inside_box(points[:, :3].astype(np.float64), row["box"]).sum() for row in rows])
        right = (held >= 0.5 * rows["lidar_points"]) & (held <= rows["lidar_points"]) if len(rows) else held
        return int(right.sum()), len(rows), "boxes of 5 points or more hold half to all of the points that lidar_box states"

    def load(self, i, image=None):
        """Read frame i -> Frame. image (H, W) is the size of the front pictures, default the grid's; the lower side pictures keep that width and their own shape."""
        frame, name = self.frames[i], self.name_of(self.frames[i])
        vehicle2world = self.pose(frame)
        points, origin = self.points(frame, vehicle2world)
        pictures = {camera: row for camera, *row in zip(*self.read(frame, "camera_image", ["key.camera_name", "image", "pose.transform"]))}
        columns = ["key.camera_name", "extrinsic.transform", "width", "height"]
        columns += ["intrinsic." + part for part in ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")]
        cameras = {camera: row for camera, *row in zip(*self.read(frame, "camera_calibration", columns, all_times=True))}
        images, matrices, (H, W) = [], [], image or self.grid.image
        for number, camera in enumerate(self.grid.cameras, 1):
            if number not in pictures or number not in cameras:
                raise DataError(f"{name}: no {'picture' if number not in pictures else 'calibration'} of camera {number} ({camera}) in this frame, "
                                f"only of {sorted(set(pictures) & set(cameras))}; download camera_image and camera_calibration of this segment again")
            transform, *lens = cameras[number]
            if not (np.abs(lens) < 1e5).all() or not min(lens[:4]) > 0:                              # NaN is not
                raise DataError(f"{name}: camera_calibration of {camera} has {lens}, expected finite numbers, of them a width, height and focal lengths above 0; "
                                "download it again")
            width, height, f_u, f_v, c_u, c_v, *distortion = lens
            K = np.array([[f_u, 0, c_u], [0, f_v, c_v], [0, 0, 1]], np.float64)
            size = min(H, round(W * height / width)), W
            pixels, crop = decode(pictures[number][0], f"picture of camera {number}", size, name, (int(width), int(height)))
            K = crop @ K
            middle = K - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]                                       # OpenCV's pixels have whole centres
            straight = cv2.undistort(np.ascontiguousarray(pixels.transpose(1, 2, 0)), middle, np.array(distortion, np.float64))
            images.append(np.ascontiguousarray(straight.transpose(2, 0, 1)))
            camera2vehicle = self.matrix(transform, f"{name}: camera_calibration of {camera}")
            vehicle2then = np.linalg.inv(self.matrix(pictures[number][1], f"{name}: camera_image pose of {camera}")) @ vehicle2world   # it moved between scan and shutter
            matrices.append(homogeneous(K) @ OPENCV @ np.linalg.inv(camera2vehicle) @ vehicle2then)
        boxes = labels = None
        if frame.folder != "testing":
            rows = self.annotations(i)
            rows = rows[rows["label"] >= 0]
            boxes, labels = rows["box"].astype(np.float32), rows["label"].astype(np.int64)
        return Frame(points, origin, images, np.stack(matrices).astype(np.float32), vehicle2world, frame.time * 1e-6, boxes, labels, {}, name)


# ---- which data set ----

def lies_in(root, reader):
    """Whether root holds one of the reader's layouts."""
    return any(True for places in reader.LAYOUTS.values() for place in places for _ in root.glob(place))


def open_dataset(root, preset="paper"):
    """The data set in folder `root`, told apart by what lies there; of nuScenes also the folder of its tables, .../v1.0-mini, where several are in one root.

    "" is the embedded world, written under cache_dir() at first use.
    """
    if root == "":
        import synthetic  # the one arrow from data to synthetic
        root = cache_dir() / f"world-{synthetic.VERSION}"
        if not root.exists():
            with locked(root):
                if not root.exists():                   # no other process was first
                    print_once(f"writing the embedded world to {root}, once; this takes a few minutes")
                    synthetic.write(root)
    root = Path(os.path.realpath(root))
    for reader in (NuScenes, Kitti, Waymo):
        if lies_in(root, reader):
            return reader(root, preset)
    if root.match("v1.0-*") and lies_in(root.parent, NuScenes):
        return NuScenes(root.parent, preset, root.name)
    for place in (root.parent, root.parent.parent, *sorted(path for path in root.glob("*") if path.is_dir())):
        for reader in (NuScenes, Kitti, Waymo):
            if lies_in(place, reader):
                raise DataError(f"{root}: this is not the root of a data set, which holds {reader.LAYOUT_HINT}; give {place}")
    there = ", ".join(sorted(path.name for path in root.glob("*"))[:8]) if root.is_dir() else "no such folder"
    raise DataError(f"{root}: no data set here; looked for nuScenes ({NuScenes.LAYOUT_HINT}), KITTI ({Kitti.LAYOUT_HINT}) and Waymo ({Waymo.LAYOUT_HINT}), found {there or 'nothing'}; "
                    "give the folder that the archives were extracted into")


# ---- loader ----

def prepared(frame, prepare, folder):
    """What prepare(frame) returns, as arrays, from its file in `folder` or computed and written there; a damaged file, or one of other points, is written anew.

    Where it cannot be written it is computed each time, with a warning.
    """
    path, stamp = folder / f"{frame.name.replace('/', '_')}.npz", zlib.crc32(frame.points)
    try:
        with np.load(path, allow_pickle=False) as stored:
            extra = dict(stored)
        if extra.pop("stamp") == stamp:
            return extra
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError):
        pass                                            # not there yet, or truncated or garbled
    extra = {name: np.asarray(value) for name, value in prepare(frame).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(whole := io.BytesIO(), **extra, stamp=stamp)                    # a ZipFile on a full disk complains once more when it is forgotten
        aside = temp_path(path)
        try:
            aside.write_bytes(whole.getbuffer())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"{folder} cannot be written ({error.strerror}): what belongs there is computed anew for every frame. Make room there, or name another "
                      "folder as LIDAR_CAMERA_CACHE", stacklevel=1)
    return extra


def start_worker(_):
    """One thread a worker, in a process group of its own: Ctrl-C reaches the main process, which finishes its step with workers alive.

    SIGTERM, at the end of the run or to all processes of a job, ends it quietly: torch's own handler would raise an error in the main process.
    """
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def collate_jobs(pairs):
    frames, seeds = zip(*pairs)
    return collate(frames, seeds)


class Loader:
    """Batches of one split for one rank; see loader(). The contents are a function of seed, step and frames a step, never of rank or workers.

    `indices` are the frames that it reads.
    """

    def __init__(self, dataset, split, batch, rank, world, seed, workers, image, augment, prepare, crop, indices):
        if not 0 <= rank < world or batch < 1 or workers < 0:
            raise ValueError(f"rank {rank} of world {world}, batch {batch}, workers {workers}: "
                             "expected 0 <= rank < world, batch >= 1, workers >= 0")
        self.dataset, self.grid, self.indices = dataset, dataset.grid, dataset.split(split) if indices is None else indices
        self.batch, self.rank, self.world, self.seed, self.workers = batch, rank, world, seed, workers
        self.image, self.augment, self.prepare, self.crop = image or dataset.grid.image, augment, prepare, crop
        if crop and not hasattr(dataset, "shown"):
            raise ValueError(f"{dataset.what}: crop is for KITTI, whose labels end with the picture")
        if prepare:
            if not re.fullmatch(r"[\w.=,+-]+", prepare.key):
                raise ValueError(f"prepare.key is {prepare.key!r}, expected letters, digits and _ . = , + - only: it names a folder")
            what = hashlib.sha256(repr((VERSION, dataset.root, self.grid, self.image)).encode()).hexdigest()[:16]   # each file is stamped with its points
            self.folder = cache_dir() / "prepared" / what / prepare.key

    @property
    def steps_per_epoch(self):
        return max(1, len(self.indices) // (self.batch * self.world))

    def __getitem__(self, job):
        """(epoch, index, training) -> (Frame, seed). What a worker computes."""
        epoch, index, training = job
        frame = self.dataset.load(index, self.image)
        if self.prepare:
            frame = replace(frame, extra=prepared(frame, self.prepare, self.folder))
        if self.crop:
            frame = select(frame, self.dataset.shown(index, frame.points))
        if training and self.augment:
            frame = self.augment(frame, np.random.default_rng((self.seed, epoch, index)))
        # the trailing words keep this stream and the order's apart from augment's: numpy pads short seeds with zeros
        return frame, int(np.random.SeedSequence((self.seed, epoch, index, 1)).generate_state(1, np.uint64)[0]) >> 1

    def jobs_from(self, step):
        size = self.batch * self.world
        whole = len(self.indices) // size * size or len(self.indices)               # of an epoch; a split smaller than a batch takes several epochs a step
        epoch = None
        while True:
            share = []
            for place in range(step * size + self.rank * self.batch, step * size + (self.rank + 1) * self.batch):
                if epoch != place // whole:
                    epoch = place // whole
                    order = np.random.default_rng((self.seed, epoch, 0, 2)).permutation(self.indices)
                share.append((epoch, int(order[place % whole]), True))
            yield share
            step += 1

    def batches(self, jobs):
        if not self.workers:
            for job in jobs:
                yield collate_jobs([self[item] for item in job])
            return
        yield from torch.utils.data.DataLoader(self, batch_sampler=jobs, num_workers=self.workers, collate_fn=collate_jobs,
                                               worker_init_fn=start_worker, pin_memory=torch.cuda.is_initialized())

    def begin_at(self, step):
        """Endless batches from this step on: what a run that was never interrupted would see there."""
        return self.batches(self.jobs_from(step))

    def first(self, n):
        """The first n batches of begin_at(0), as a list: to look at the same ones again and again."""
        return list(islice(self.begin_at(0), n))

    def once(self):
        """This rank's share of the split, every world-th frame, in order and not augmented; the last batch may be smaller."""
        mine = [(0, int(index), False) for index in self.indices[self.rank::self.world]]
        return self.batches(mine[i:i + self.batch] for i in range(0, len(mine), self.batch))


def spread(indices, n):
    """At most n of these frames, every k-th, in order. indices (N,) -> (n or fewer,)."""
    return indices[::max(len(indices) // n, 1)][:n]


def loader(root, split, batch, rank=0, world=1, seed=0, *, preset="paper", workers=0, image=None, augment=None, prepare=None, crop=False, indices=None):
    """Loader of `split` of the data set in folder `root` ("": the embedded world; or what open_dataset returned), `batch` frames a rank.

    image    (H, W) of the pictures, default the grid's
    augment  augment(frame, rng) -> Frame, in begin_at only; rng is a np.random.Generator of (seed, epoch, index of the frame)
    prepare  prepare(frame) -> {name: array or tensor} of the unaugmented frame's points; computed once, kept under cache_dir() until they change,
             put into frame.extra before augment. Its attribute `key` (a str) names what it computes: name, version, parameters
    crop     leave out points that the picture on disk does not show: of KITTI, whose labels end there
    indices  the frames to read, as dataset.split(split) gives them, where that is not the whole split
    With workers > 0, augment and prepare must be picklable where processes are spawned: top-level functions or objects.
    """
    dataset = open_dataset(root, preset) if isinstance(root, (str, Path)) else root
    return Loader(dataset, split, batch, rank, world, seed, workers, image, augment, prepare, crop, indices)


# ---- the doctor: python data.py ROOT ----

CAMERA_YAW = dict(zip((*CAMERAS, *WAYMO[0]), (0, -55, -110, 180, 110, 55, 0, 45, -45, 90, -90)), image_2=0)      # degrees from straight ahead, left positive; +- 30
CHECKED_FRAMES = 24                                                                 # frames looked at without --all


def camera_faults(lidar2img, hw, yaw):
    """What contradicts a camera on a car in its matrix. lidar2img (4, 4), hw of its picture, yaw degrees that it should look at -> list of str."""
    height, width = hw
    matrix = np.asarray(lidar2img, np.float64)[:3]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:, :3])) < 1e-6:
        return ["its projection matrix is singular or not finite"]
    K, R = rq(matrix[:, :3])
    signs = np.sign(np.diag(K))
    K, R = K * signs, R * signs[:, None]                                    # K's diagonal is positive, rows of R are right, down, forward
    centre, looks = -np.linalg.solve(matrix[:, :3], matrix[:, 3]), np.degrees(np.arctan2(R[2, 1], R[2, 0]))
    checks = [
        (np.linalg.det(R) > 0, "it is mirrored", "its rotation turns right hands into right hands"),
        (abs(K[2, 2] - 1) < 0.01, f"its depth counts {K[2, 2]:.3g} m as one", "metres"),
        (abs(K[0, 0] / K[1, 1] - 1) < 0.03 and abs(K[0, 1] / K[0, 0]) < 0.03, f"its pixels are {K[1, 1] / K[0, 0]:.3g} times as wide as high, skewed by "
         f"{K[0, 1] / K[0, 0]:.3g}", "square pixels"),
        (0.25 < K[0, 0] / K[2, 2] / width < 4, f"its focal length is {K[0, 0] / K[2, 2] / width:.3g} picture widths", "0.25 to 4"),
        (abs(K[0, 2] / K[2, 2] / width - 0.5) < 0.25, f"its axis meets the picture at {K[0, 2] / K[2, 2] / width:.0%} of its width", "the middle half"),
        (np.linalg.norm(centre) < 5, f"it stands {np.linalg.norm(centre):.1f} m from the LiDAR", "less than 5 m"),
        (-R[1, 2] > 0.7, f"its picture's down is {np.degrees(np.arccos(np.clip(-R[1, 2], -1, 1))):.0f} degrees from down", "upright"),
        (abs((looks - yaw + 180) % 360 - 180) < 30, f"it looks {looks:.0f} degrees to the left of straight ahead", f"{yaw} +- 30")]
    return [f"{found}, expected {expected}" for fine, found, expected in checks if not fine]


class Checkup:
    """checkup[i]: what is wrong with frame i (list of str), points (), share of them in each picture (K,), label evidence; a frame's work for one worker."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        dataset = self.dataset
        try:
            frame, evidence = dataset.load(i), dataset.label_evidence(i)
        except DataError as error:
            return [str(error)], None, None, None
        faults, hw = [], [image.shape[1:] for image in frame.images]
        for camera, matrix, size, image in zip(dataset.grid.cameras, frame.lidar2img, hw, frame.images):
            faults += [f"{frame.name}: {camera}: {fault}; check {dataset.calibrated_by(i)}" for fault in camera_faults(matrix, size, CAMERA_YAW[camera])]
            if image.min() == image.max():
                faults.append(f"{frame.name}: {camera}: the picture has one colour, expected a scene; extract it again")
        key = frame.points[frame.points[:, 4] == 0]
        if len(key) < 500:
            faults.append(f"{frame.name}: {len(key)} points in the key sweep, expected thousands; extract it again")
        elif key[:, 3].min() == key[:, 3].max():
            faults.append(f"{frame.name}: every point has intensity {key[0, 3]:g}, expected different ones; extract it again")
        return faults, len(key), visible_points(key, frame.lidar2img, hw).mean(1), evidence


def doctor(root, everything=False):
    """Look at the data set in `root`, at SAMPLE frames spread over it or at every one, print what was seen -> list of what is wrong, where and the fix."""
    try:
        dataset = open_dataset(root)
        sizes = {name: len(dataset.split(name)) for name in ("train", "val")}
    except DataError as error:
        return [str(error)]
    chosen = np.arange(len(dataset)) if everything else np.unique(np.linspace(0, len(dataset) - 1, CHECKED_FRAMES).astype(int))
    print(f"{dataset.what}, {len(dataset)} frames, of them {sizes['train']} train, {sizes['val']} val; "
          f"looking at {len(chosen)}{'' if len(chosen) == len(dataset) else ', --all looks at every one'}", flush=True)
    found = torch.utils.data.DataLoader(Checkup(dataset), sampler=chosen.tolist(), batch_size=None, collate_fn=list, num_workers=os.cpu_count() if everything else 0)
    faults, points, shares, evidence = zip(*tqdm(found, total=len(chosen), unit=" frames", disable=None))
    faults = [fault for frame in faults for fault in frame]
    whole = [e for e in evidence if e is not None]
    if whole:
        print(f"points in a key sweep: median {np.median([n for n in points if n is not None]):.0f}")
        share = np.mean([s for s in shares if s is not None], 0)
        print("points in each picture: " + ", ".join(f"{camera} {s:.1%}" for camera, s in zip(dataset.grid.cameras, share)))
        faults += [f"{dataset.root}: {camera}: {s:.2%} of the points land in its pictures, expected at least 1 %; check {dataset.calibrated_by(chosen[0])}"
                   for camera, s in zip(dataset.grid.cameras, share) if s < 0.01]
        right, boxes = np.sum([e[:2] for e in whole], 0)
        told = f"{right} of {boxes} {whole[0][2]}"
        if boxes:
            print(told)
        if right < 0.9 * boxes:
            faults.append(f"{dataset.root}: {told}, expected at least 90 %; calibration, poses, boxes or scans do not belong together: extract all of them again")
    return faults


def main():
    parser = argparse.ArgumentParser(description="Check a data set: layout, tables, files, calibration, labels. Exit status 1 if anything is wrong.")
    parser.add_argument("root", nargs="?", default="", help="its root folder; default the embedded world")
    parser.add_argument("--all", action="store_true", help=f"look at every frame, not at {CHECKED_FRAMES}")
    parser.add_argument("--regroup", metavar="FOLDER", help="check nothing, copy a Waymo folder into this new one, which is read many times faster")
    args = parser.parse_args()
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
