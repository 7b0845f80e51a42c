"""The embedded world: procedural streets, so that each command runs without a download.

    python synthetic.py ROOT                   # 24 + 8 scenes of 8 keyframes, 71 MB
    python synthetic.py ROOT --format waymo    # the same world in Waymo's layout
    python synthetic.py ROOT --format kitti    # or in KITTI's: the front camera only

The world is written as a nuScenes folder, which takes about two minutes on two cores.
It is a demonstration and a test bench, never evidence for the papers' numbers. Every
modelling number in this file is [ours].

The sections stand in the order in which a world comes about:

    solids     affine images of a cube, a frustum or a ball
    things     the catalogue of what stands or moves in a street, built of solids
    street     a straight or bent road, the light of day, houses, kerbs, the ground
    traffic    compose: the things of a scene and how they move without touching each
               other; a pure function of (seed, index)
    rays       cast: the nearest hit of rays with solids, culled by the rays that each
               solid can cover; the LiDAR, the cameras and the sun all use it
    LiDAR      sweep: 32 beams by 360 azimuths, with noise, drop-outs and intensity, and
               what each point hit
    cameras    render: texture, sun and its shadows, sky, haze
    scene      the .pcd.bin, .jpg and lidarseg files of one scene, and its table rows
    tables     the thirteen tables, lidarseg.json and splits.json, version v1.0-embedded
    layouts    the same world as KITTI's files, and as Waymo's
    world      write: all of it; the same arguments give the same bytes

Frames: a thing's own (x forward, y left, z up, z = 0 where it stands); the scene's
plane (x along the road at s = 0, z up), in which everything is computed; the global
frame, which is entered only when poses and boxes are written. Road coordinates are s
(along the centre line) and l (to its left). Rotations are (3, 3) with local axes as
columns; a2b (4, 4) maps a to b. Units are metres, radians and seconds; on disk, time
is in nuScenes' microseconds.

Each sensor sees the world at its own time stamp. Within one sweep or image nothing
moves. The shadows in all pictures of a frame are those of the sweep's moment.
"""
import argparse
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time as clock
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

VERSION = 2
TABLES = "v1.0-embedded"


# ---- solids -------------------------------------------------------------------------

# kinds of solids, and textures
CUBE, FRUSTUM, BALL = range(3)
PLAIN, WINDOWS, LEAVES, STRIPES, PANES, RIBS, BANDS = range(7)
# a turn after which local z lies across
SIDEWAYS = Rotation.from_euler("x", 90, degrees=True).as_matrix()


class Solid(NamedTuple):
    """A unit shape, scaled by `half`, turned by `axes` and moved to `centre`.

    The unit shapes are the cube [-1, 1]^3, a frustum of radius 1 and height 2, and a
    unit ball. At z = +1 the frustum's radius, or the cube's x and y, is 1 - taper.
    """
    kind: int
    centre: tuple
    half: tuple
    colour: tuple                  # linear albedo
    texture: int = PLAIN
    taper: float = 0.0
    shine: float = 0.4             # LiDAR reflectance, 0 to 1
    axes: np.ndarray = np.eye(3)


@dataclass(frozen=True)
class World:
    """P solids at one instant, in the scene's plane: Solid's fields, and owners."""
    kind: np.ndarray
    centre: np.ndarray             # (P, 3)
    half: np.ndarray               # (P, 3)
    colour: np.ndarray             # (P, 3)
    texture: np.ndarray
    taper: np.ndarray
    shine: np.ndarray
    axes: np.ndarray               # (P, 3, 3) local to plane
    owner: np.ndarray              # an index into Scene.things, or -1 for scenery
    category: np.ndarray           # an index into CATEGORIES


def stack(solids, owner, categories):
    """Solids, and the owner and the category's name of each -> World."""
    columns = {}
    for name in Solid._fields:
        dtype = int if name in ("kind", "texture") else float
        columns[name] = np.array([getattr(solid, name) for solid in solids], dtype)
    category = np.array([CATEGORIES.index(name) for name in categories], int)
    return World(**columns, owner=np.array(owner), category=category)


def block(x, y, z, colour, texture=PLAIN, taper=0.0, shine=0.4, kind=CUBE):
    """A solid from its extents: x, y and z are each (from, to), or r for (-r, r)."""
    extents = [edge if isinstance(edge, tuple) else (-edge, edge) for edge in (x, y, z)]
    low, high = np.array(extents, float).T
    centre = (low + high) / 2
    half = (high - low) / 2
    return Solid(kind, tuple(centre), tuple(half), colour, texture, taper, shine)


def both_sides(x, y, half, z, colour, **looks):
    """Two blocks 2 half wide, one at -y and one at y."""
    right = block(x, (-y - half, -y + half), z, colour, **looks)
    left = block(x, (y - half, y + half), z, colour, **looks)
    return [right, left]


def pillar(radius, z, colour, *, x=0.0, y=0.0, kind=FRUSTUM, **looks):
    """A solid that is as wide as deep, by default a cylinder, around (x, y)."""
    across = (x - radius, x + radius)
    along = (y - radius, y + radius)
    return block(across, along, z, colour, kind=kind, **looks)


def beam(centre, half, angle, colour):
    """A cube pitched by `angle`."""
    axes = Rotation.from_euler("y", angle).as_matrix()
    return Solid(CUBE, centre, half, colour, axes=axes)


def wheel(x, y, radius, width):
    centre = (x, y, radius)
    half = (radius, radius, width / 2)
    return Solid(FRUSTUM, centre, half, RUBBER, shine=.1, axes=SIDEWAYS)


def wheels(axles, side, radius, width):
    """Two wheels at each x of `axles`, whose outer faces lie at y = -side and side."""
    solids = []
    for x in axles:
        solids.append(wheel(x, -side + width / 2, radius, width))
        solids.append(wheel(x, side - width / 2, radius, width))
    return solids


# ---- the catalogue of things --------------------------------------------------------

GLASS = (.03, .04, .05)
RUBBER = (.02, .02, .02)
STEEL = (.3, .3, .32)
LAMP = (.9, .9, .8)
REAR = (.5, .02, .02)
SKIN = (.55, .36, .26)
PAINTS = [
    (.75, .75, .76),     # silver
    (.05, .05, .06),     # black
    (.35, .36, .38),     # grey
    (.5, .04, .04),      # red
    (.05, .12, .4),      # blue
    (.85, .85, .83),     # white
    (.1, .25, .12),      # green
    (.45, .4, .3),       # beige
]
CLOTHES = [
    (.55, .08, .08), (.08, .12, .35), (.1, .1, .1), (.6, .6, .58),
    (.1, .3, .15), (.5, .4, .1), (.35, .15, .35),
]
TROUSERS = [(.05, .06, .15), (.04, .04, .04), (.25, .22, .18)]
UNIFORMS = {
    "construction_worker": (.9, .4, .02),
    "police_officer": (.03, .05, .2),
}
LOADS = [(.8, .8, .8), (.6, .6, .62), (.7, .68, .6), (.2, .3, .5)]
SIGNS = [(.6, .03, .03), (.04, .15, .5), (.8, .65, .05)]
BINS = [(.05, .25, .08), (.05, .1, .3), (.15, .15, .15)]
WALLS = [
    (.45, .3, .22), (.6, .55, .45), (.5, .5, .5),
    (.62, .45, .3), (.35, .2, .16), (.7, .68, .62),
]
BUS_PAINTS = PAINTS[3:5] + SIGNS + BINS[:1]
SIZES = {                # metres; width, length and height are each drawn from a range
    "car": ((1.75, 1.95), (4.0, 4.9), (1.42, 1.78)),
    "truck": ((2.2, 2.5), (6.2, 8.5), (2.7, 3.4)),
    "bus": ((2.5, 2.65), (10, 11.8), (3.1, 3.5)),
    "barrier": ((1.9, 2.4), (.45, .6), (.9, 1.1)),
}


@dataclass
class Thing:
    """Something with a box: what it is made of and how it moves.

    At time t it is at (s + vs t, l + vl t) in road coordinates.
    """
    category: str                  # "static..." is scenery and clutter: it gets no box
    size: tuple                    # w, l, h; the solids of a labelled thing lie inside
    solids: list
    attribute: str = ""
    s: float = 0.0
    l: float = 0.0
    vs: float = 0.0                # on the centre line; the speed is vs (1 - curve l)
    vl: float = 0.0
    turn: float = 0.0              # heading against the road's


def pick(rng, colours):
    return colours[rng.integers(len(colours))]


def draw_size(rng, name):
    """Width, length and height."""
    return tuple(rng.uniform(*limits) for limits in SIZES[name])


def car(rng):
    w, l, h = draw_size(rng, "car")
    paint = pick(rng, PAINTS)
    front = l / 2
    back = -front
    side = w / 2 - .03
    waist = .52 * h
    estate = rng.random() < .5                       # or else a saloon
    tail = back + (.06 if estate else .16) * l
    windows = (tail, .26 * l)
    roof = (.89 * tail + .03 * l, .235 * l + .1 * tail)
    headlights = (front - .05, front - .01)
    tail_lights = (back + .01, back + .05)
    return Thing("vehicle.car", (w, l, h), [
        block(front - .03, side, (.28, waist), paint),
        block(windows, side - .05, (waist, h - .05), GLASS, PANES, .22, .15),
        block(roof, .76 * side, (h - .09, h - .02), paint),
        *wheels((-.3 * l, .31 * l), side + .02, .33, .22),
        *both_sides(headlights, .6 * side, .17, (.55, .7), LAMP, shine=.9),
        *both_sides(tail_lights, .65 * side, .17, (.6, .76), REAR, shine=.9),
    ])


def truck(rng):
    w, l, h = draw_size(rng, "truck")
    paint = pick(rng, PAINTS)
    load = pick(rng, LOADS)
    front = l / 2
    back = -front
    side = w / 2 - .03
    cabin = (front - 1.9, front - .05)
    windows = (front - 1.3, front - .03)
    box = (back + .05, front - 2.1)
    chassis = (back + .1, front - .4)
    tail_light = (back + .01, back + .05)
    axles = (-.32 * l, -.18 * l, .33 * l)
    return Thing("vehicle.truck", (w, l, h), [
        block(cabin, side, (.5, .72 * h), paint, taper=.06),
        block(windows, side - .15, (.42 * h, .66 * h), GLASS, shine=.15),
        block(box, side, (.95, h - .03), load, RIBS),
        block(chassis, side - .5, (.5, .95), STEEL),
        block(tail_light, side - .1, (.8, .92), REAR, shine=.9),
        *wheels(axles, side, .45, .3),
    ])


def bus(rng):
    w, l, h = draw_size(rng, "bus")
    paint = pick(rng, BUS_PAINTS)
    front = l / 2
    side = w / 2 - .04
    headlight = (front - .03, front - .01)
    windows = (.42 * h, .78 * h)
    return Thing("vehicle.bus.rigid", (w, l, h), [
        block(front - .03, side, (.35, h - .03), paint),
        block(front - .02, side + .02, windows, GLASS, PANES, shine=.15),
        block(headlight, side - .2, (.85, 1.05), LAMP, shine=.9),
        *wheels((-.28 * l, .3 * l), side + .03, .48, .3),
    ])


def trailer(rng):
    """It has the shape of a bus and looks different."""
    w, l, h = draw_size(rng, "bus")
    front = l / 2
    back = -front
    side = w / 2 - .04
    tail_light = (back + .01, back + .03)
    return Thing("vehicle.trailer", (w, l, h), [
        block(front - .03, side, (.35, h - .03), pick(rng, LOADS[:3]), RIBS),
        block(tail_light, side - .2, (.6, .8), REAR, shine=.9),
        *wheels((-.38 * l, -.28 * l), side + .03, .48, .3),
    ])


def digger(rng):
    w = 2.5
    l = rng.uniform(6.2, 7.4)
    h = rng.uniform(3.0, 3.4)
    paint = (.8, .45, .02)
    front = l / 2
    back = -front
    tracks = (back + .1, front - 3.1)
    body = (back + .03, front - 3.2)
    cabin = (back + 1.2, front - 3.3)
    engine = (back + .1, back + 1.0)
    shovel = (front - 1.0, front - .1)
    return Thing("vehicle.construction", (w, l, h), [
        *both_sides(tracks, .92, .28, (0, .8), RUBBER, shine=.15),
        block(body, 1.1, (.8, 1.7), paint),
        block(cabin, (-.05, 1.05), (1.7, h - .05), GLASS, PANES, .1, .2),
        block(engine, 1., (1.7, 2.1), (.1, .1, .1)),
        beam((front - 2.5, -.4, 2.15), (1.05, .17, .2), -.75, paint),
        beam((front - 1.1, -.4, 1.95), (.95, .14, .17), .95, paint),
        block(shovel, (-.9, .1), (.25, .95), STEEL, taper=.2),
    ])


def barrier(rng):
    w, l, h = draw_size(rng, "barrier")
    red = (.6, .04, .03)
    return Thing("movable_object.barrier", (w, l, h), [
        block(.06, w / 2 - .02, (.3 * h, h - .02), red, STRIPES, shine=.7),
        *both_sides(l / 2 - .02, .35 * w, .08, (0, .3 * h), STEEL, taper=.3),
    ])


def person(height, shirt, trousers, x=0.0, base=0.0, seated=False):
    """A pedestrian or a rider, about 0.5 m wide, from z = base to base + height."""
    head = .13 * height / 1.75                       # its radius
    hips = base + .48 * height
    neck = base + .85 * height
    top = base + height
    solids = []
    if not seated:
        for y in (-.11, .11):
            solids.append(pillar(.09, (base, hips), trousers, x=x, y=y))
    torso = block((x - .15, x + .15), .26, (hips - .05, neck), shirt,
                  taper=.15, shine=.5, kind=FRUSTUM)
    skull = pillar(head, (top - 2 * head, top), SKIN, x=x, kind=BALL)
    return [*solids, torso, skull]


def motorcycle(rng, ridden=False):
    l = rng.uniform(2.0, 2.25)
    h = 1.7 if ridden else 1.2
    paint = pick(rng, PAINTS[3:])
    shirt = pick(rng, CLOTHES)
    solids = [
        wheel(-l / 2 + .35, 0, .32, .18),
        wheel(l / 2 - .35, 0, .32, .18),
        block((-.35 * l, .3 * l), .17, (.38, .82), paint, taper=.2),
        block((.22 * l, .27 * l), .36, (.95, 1.03), RUBBER),
        block((.24 * l, .34 * l), .12, (.7, 1.1), LAMP, shine=.8),
    ]
    if ridden:
        solids += person(1.05, shirt, RUBBER, -.1, .63, seated=True)
    attribute = "cycle.with_rider" if ridden else "cycle.without_rider"
    return Thing("vehicle.motorcycle", (.8, l, h), solids, attribute)


def bicycle(rng, ridden=False):
    l = rng.uniform(1.65, 1.85)
    h = 1.75 if ridden else 1.1
    paint = pick(rng, PAINTS[3:])
    shirt = pick(rng, CLOTHES)
    fork = (.3 * l, .33 * l)
    solids = [
        wheel(-l / 2 + .37, 0, .34, .05),
        wheel(l / 2 - .37, 0, .34, .05),
        beam((0, 0, .58), (.42, .025, .05), -.25, paint),
        block(fork, .03, (.4, 1.0), paint),
        block(fork, .28, (.98, 1.04), STEEL),
        block((-.22, -.02), .1, (.85, .92), RUBBER),
    ]
    if ridden:
        solids += person(1.0, shirt, RUBBER, -.08, .73, seated=True)
        solids.append(pillar(.12, (.5, 1.2), TROUSERS[0]))
    attribute = "cycle.with_rider" if ridden else "cycle.without_rider"
    return Thing("vehicle.bicycle", (.65, l, h), solids, attribute)


def pedestrian(rng, kind="adult"):
    limits = (1.05, 1.35) if kind == "child" else (1.58, 1.88)
    h = rng.uniform(*limits)
    clothes = pick(rng, CLOTHES)
    trousers = pick(rng, TROUSERS)
    shirt = UNIFORMS.get(kind, clothes)
    return Thing(f"human.pedestrian.{kind}", (.66, .6, h + .03),
                 person(h, shirt, trousers), "pedestrian.standing")


def cone(rng):
    h = rng.uniform(.65, .9)
    orange = (.95, .25, .02)
    return Thing("movable_object.trafficcone", (.4, .4, h), [
        pillar(.19, (0, .06), (.06, .06, .06), kind=CUBE),
        pillar(.15, (.06, h - .02), orange, texture=BANDS, taper=.8, shine=.8),
    ])


def wheelie_bin(rng):
    colour = pick(rng, BINS)
    return Thing("movable_object.pushable_pullable", (.62, .75, 1.1), [
        block(.3, .26, (.08, 1.0), colour),
        block(.34, .29, (1.0, 1.08), colour),
        *wheels((-.24,), .28, .1, .06),
    ])


def clutter(rng):
    """A thing without a box that by shape alone, or by colour alone, may be an object."""
    u = rng.uniform(.9, 1.1)
    box_colour = pick(rng, CLOTHES)
    container_colour = pick(rng, WALLS + BINS)
    sign_colour = pick(rng, SIGNS)
    wall = block(.2, u, (0, .95), (.4, .38, .35), RIBS)
    post_box = [
        pillar(.25, (0, 1.5 * u), box_colour),
        pillar(.27, (1.4 * u, 1.7 * u), RUBBER, kind=BALL),
    ]
    container = block(2.1 * u, .9, (.05, 1.5), container_colour, RIBS)
    orange_box = pillar(.25, (0, .55 * u), (.9, .3, .04), kind=CUBE)
    bollard = pillar(.12, (0, .8 * u), STEEL)
    rack = []
    for x in (-.7, -.25, .25, .7):
        rack.append(block((x - .03, x + .03), .2, (0, .9 * u), STEEL))
    bush = pillar(.8 * u, (-.3, 1.25 * u), (.08, .2, .05), texture=LEAVES, kind=BALL)
    sign = [
        pillar(.04, (0, 2.4), STEEL),
        block((-.09, -.05), .32, (1.75, 2.4), sign_colour, shine=1.),
    ]
    kinds = [                                        # what it resembles:
        Thing("static.manmade", (2.1 * u, .5, 1.), [wall]),            # a barrier
        Thing("static.manmade", (.6, .6, 1.7 * u), post_box),          # a pedestrian
        Thing("static.manmade", (1.9, 4.3 * u, 1.55), [container]),    # a car
        Thing("static.manmade", (.55, .55, .6), [orange_box]),         # a cone, by its orange
        Thing("static.manmade", (.3, .3, .85), [bollard]),             # a cone, by its size
        Thing("static_object.bicycle_rack", (.5, 1.7, 1.), rack),      # a bicycle
        Thing("static.vegetation", (1.7 * u, 1.7 * u, 1.3), [bush]),
        Thing("static.manmade", (.7, .2, 2.5), sign),
    ]
    return kinds[rng.integers(8)]


def tree(rng):
    h = rng.uniform(5, 9)
    r = rng.uniform(1.3, 2.2)
    green = np.array([.07, .19, .04]) * rng.uniform(.7, 1.4)
    autumn = np.array([.12, .05, 0]) * (rng.random() < .25)
    colour = green + autumn
    offsets = rng.uniform(-.6, .6, (3, 3)) * r
    solids = [pillar(.16, (0, h - r), (.16, .1, .06), taper=.3)]
    if rng.random() < .3:
        dark = tuple(.7 * colour)
        solids.append(pillar(r, (1.6, h), dark, texture=LEAVES, taper=.95))
    else:
        for x, y, z in offsets:
            height = (h - 1.9 * r + z, h + z)
            solids.append(pillar(r, height, tuple(colour), x=x, y=y, texture=LEAVES,
                                 kind=BALL))
    return Thing("static.vegetation", (1., 1., h), solids)


def lamp_post(rng):
    return Thing("static.manmade", (.3, .3, 7.), [
        pillar(.09, (0, 7), STEEL, taper=.4),
        block(.1, (-1.6, .1), (6.9, 7.05), STEEL),
        block(.15, (-1.9, -1.2), (6.8, 6.95), (.7, .7, .65)),
    ])


# ---- the street ---------------------------------------------------------------------

HALF_ROAD = 6.5          # metres: half the road's width
PAVEMENT = 4.0           # metres: the pavement's width
EGO_LANE = -1.75         # metres: l of the middle of the ego vehicle's lane
SIDES = (-1, 1)          # right and left of the road


class Daylight(NamedTuple):
    chance: float
    elevation: tuple     # degrees: lowest and highest sun
    sunlight: tuple      # linear colours
    skylight: tuple
    zenith: tuple
    horizon: tuple


DAYLIGHTS = {
    "noon": Daylight(
        .4, (40, 65),
        sunlight=(1.9, 1.8, 1.65),
        skylight=(.45, .52, .65),
        zenith=(.12, .28, .62),
        horizon=(.60, .70, .80)),
    "evening": Daylight(
        .25, (14, 25),
        sunlight=(1.9, 1.35, .8),
        skylight=(.4, .42, .5),
        zenith=(.2, .32, .55),
        horizon=(.85, .66, .48)),
    "overcast": Daylight(
        .2, (40, 65),
        sunlight=(.25, .25, .25),
        skylight=(.85, .88, .92),
        zenith=(.55, .58, .62),
        horizon=(.72, .74, .76)),
    "dusk": Daylight(
        .15, (8, 14),
        sunlight=(.5, .3, .2),
        skylight=(.22, .25, .36),
        zenith=(.06, .09, .22),
        horizon=(.45, .3, .28)),
}


@dataclass
class Scene:
    name: str
    curve: float                   # 1/m, left positive, never 0
    crossing: float                # s where another road crosses
    speed: float                   # of the ego vehicle
    phase: float                   # of its weaving in the lane
    plane2world: np.ndarray        # (4, 4) float64
    light: dict                    # see draw_light
    things: list = field(default_factory=list)
    solids: World = None           # scenery in the plane, things each in its own frame


def about_z(yaw):
    """A turn to the left: (3, 3)."""
    cos = np.cos(yaw)
    sin = np.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def rigid(rotation, translation):
    """Rotation (3, 3) and translation (3,) -> (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


def pose(xyz, yaw):
    return rigid(about_z(yaw), xyz)


def to_plane(curve, s, l):
    """Road coordinates -> x, y and the road's heading at that place."""
    angle = curve * s
    x = (1 / curve - l) * np.sin(angle)
    y = 1 / curve - (1 / curve - l) * np.cos(angle)
    return x, y, angle


def to_road(curve, x, y):
    """x, y -> s, l: the inverse of to_plane."""
    s = np.arctan2(curve * x, 1 - curve * y) / curve
    l = (1 - np.hypot(curve * x, 1 - curve * y)) / curve
    return s, l


def ego2plane(scene, t):
    """Where the ego vehicle's rear axle is at time t: (4, 4)."""
    rate = 2 * np.pi / 7           # it weaves 25 cm to each side in 7 s
    wave = rate * t + scene.phase
    l = EGO_LANE + .25 * np.sin(wave)
    x, y, heading = to_plane(scene.curve, scene.speed * t, l)
    return pose((x, y, 0), heading + np.arctan2(.25 * rate * np.cos(wave), scene.speed))


def thing2plane(scene, thing, t):
    """Where a thing is at time t: (4, 4); 3 cm up, so that its box holds no ground."""
    s = thing.s + thing.vs * t
    l = thing.l + thing.vl * t
    x, y, heading = to_plane(scene.curve, s, l)
    return pose((x, y, .03), heading + thing.turn)


def world_at(scene, t):
    """Everything in the scene at time t, moved into the plane."""
    solids = scene.solids
    poses = [np.eye(4)]                              # the scenery, with owner -1, stays
    for thing in scene.things:
        poses.append(thing2plane(scene, thing, t))
    poses = np.array(poses)[solids.owner + 1]        # (P, 4, 4)
    turn = poses[:, :3, :3]
    centre = np.einsum("pij,pj->pi", turn, solids.centre) + poses[:, :3, 3]
    return replace(solids, centre=centre, axes=turn @ solids.axes)


def draw_light(rng):
    """Noon, evening, overcast or dusk, each a little different.

    -> sun: the direction to it, (3,); sunlight, skylight, zenith, horizon: linear
       colours, (3,)
    """
    chances = [day.chance for day in DAYLIGHTS.values()]
    day = list(DAYLIGHTS.values())[rng.choice(4, p=chances)]
    up = np.radians(rng.uniform(*day.elevation))
    around = rng.uniform(0, 2 * np.pi)
    gain = rng.uniform(.85, 1.15)
    x = np.cos(around) * np.cos(up)
    y = np.sin(around) * np.cos(up)
    light = {"sun": np.array([x, y, np.sin(up)])}
    for name in ("sunlight", "skylight", "zenith", "horizon"):
        light[name] = gain * np.array(getattr(day, name))
    return light


def draw_street(rng, index):
    """A scene with a road and light, empty but for the ego vehicle."""
    bend = rng.uniform(1 / 350, 1 / 130)
    curve = rng.choice([1e-5, bend], p=[.4, .6]) * rng.choice(SIDES)
    crossing = 1e3                                   # out of sight
    if rng.random() < .5:
        crossing = rng.uniform(25, 60)
    speed = rng.uniform(3, 10)
    phase = rng.uniform(0, 2 * np.pi)
    x, y = rng.uniform(300, 1500, 2)
    plane2world = pose((x, y, 0), rng.uniform(-np.pi, np.pi))
    light = draw_light(rng)
    name = f"embedded-{index:04d}"
    return Scene(name, curve, crossing, speed, phase, plane2world, light)


def houses(scene, rng, side):
    """Solids of the houses along one side of the road, none of them in the crossing."""
    solids = []
    s = -75.0
    while s < 125:
        wide = rng.uniform(9, 20)
        deep = rng.uniform(7, 12)
        high = rng.choice([rng.uniform(3.5, 6), rng.uniform(6, 16)])
        middle = s + wide / 2
        front = HALF_ROAD + PAVEMENT + rng.uniform(.5, 4)
        wall = pick(rng, WALLS)
        clear = abs(middle - scene.crossing) > wide / 2 + 9
        if clear and rng.random() < .8:
            x, y, heading = to_plane(scene.curve, middle, side * (front + deep / 2))
            axes = about_z(heading)
            centre = (x, y, high / 2)
            half = (wide / 2, deep / 2, high / 2)
            solids.append(Solid(CUBE, centre, half, wall, WINDOWS, axes=axes))
            if high < 6:                             # a pitched roof
                centre = (x, y, high + .9)
                half = (wide / 2 + .3, deep / 2 + .3, .9)
                tiles = (.3, .12, .08)
                solids.append(Solid(CUBE, centre, half, tiles, taper=.75, axes=axes))
        s += wide + rng.uniform(.5, 5)
    return solids


def kerbs(scene, side):
    """Solids of the kerb along one side of the road, none of them in the crossing."""
    solids = []
    for s in np.arange(-75, 125, 8.0):
        if abs(s - scene.crossing) > 11:
            x, y, heading = to_plane(scene.curve, s, side * (HALF_ROAD + .12))
            half = (4.05, .12, .08)
            stone = (.5, .5, .48)
            solids.append(Solid(CUBE, (x, y, .06), half, stone, axes=about_z(heading)))
    return solids


def speckle(*cells):
    """A number in [0, 1) for each integer cell: (N,) arrays -> (N,)."""
    h = np.zeros(np.shape(cells[0]), np.uint32)
    for cell in cells:
        number = np.floor(cell).astype(np.int64).astype(np.uint32)
        h = (h ^ number) * np.uint32(0x9E3779B1)
        h ^= h >> np.uint32(15)
    return (h * np.uint32(0x85EBCA77) >> np.uint32(8)) / 2.0 ** 24


def road_and_pavement(scene, s, l):
    """Which places (N,) in road coordinates are road, and which pavement; the rest is grass."""
    side = abs(l)
    road = (side < HALF_ROAD) | (abs(s - scene.crossing) < 5)
    return road, ~road & (side < HALF_ROAD + PAVEMENT)


def ground_categories(scene, x, y):
    """x, y (N,) -> index into CATEGORIES (N,)"""
    road, pavement = road_and_pavement(scene, *to_road(scene.curve, x, y))
    names = "flat.driveable_surface", "flat.sidewalk", "flat.terrain"
    drive, walk, grass = [CATEGORIES.index(name) for name in names]
    return np.select([road, pavement], [drive, walk], grass)


def ground_colour(scene, x, y):
    """Asphalt, markings, pavement, grass.

    x, y (N,) -> albedo (N, 3), LiDAR reflectance (N,)
    """
    s, l = to_road(scene.curve, x, y)
    road, pavement = road_and_pavement(scene, s, l)
    across = abs(s - scene.crossing)
    side = abs(l)
    middle_line = (side < .08) & (s % 6 < 3)
    lane_line = (abs(side - 3.55) < .07) & (s % 3 < 2)
    edge_line = abs(side - HALF_ROAD + .2) < .06
    line = middle_line | lane_line | edge_line
    zebra = (abs(across - 6.6) < 1.4) & (side < HALF_ROAD - .4) & (l % 1.1 < .55)
    paint = road & (line & (across > 8) | zebra)
    joint = pavement & ((s % 1 < .06) | (l % 1 < .06))         # between flagstones
    coarse = speckle(s / 3.1, l / 2.3)
    fine = speckle(s / .12, l / .12)
    patch = .85 + .15 * coarse + .3 * (fine - .5)
    kinds = [paint, road, pavement]                  # the first that holds, else grass
    colours = [[.75, .75, .72], [.16, .16, .165], [.42, .4, .37]]
    grass = [.13, .22, .06]
    albedo = np.select([kind[:, None] for kind in kinds], colours, grass)
    shine = np.select(kinds, [.9, .12, .3], .35)
    return albedo * (patch * (1 - .3 * joint))[:, None], shine


# ---- traffic ------------------------------------------------------------------------

class Spot(NamedTuple):
    """Where a thing may be: its place and velocity in road coordinates.

    turn, its heading against the road's, counts only for what does not move.
    """
    s: float
    l: float
    vs: float = 0.0
    vl: float = 0.0
    turn: float = 0.0


class Way(NamedTuple):
    """The rectangle, parallel to the road, that a thing covers at T instants."""
    s: np.ndarray                  # (T,)
    l: np.ndarray                  # (T,)
    long: float                    # half its length along the road, with the gap
    wide: float                    # half its width across

    def meets(self, other):
        along = abs(self.s - other.s) < self.long + other.long
        across = abs(self.l - other.l) < self.wide + other.wide
        return np.any(along & across)


class Planner:
    """Places things in a scene so that none ever touches another or the ego vehicle."""

    def __init__(self, scene, rng, frames):
        self.scene = scene
        self.rng = rng
        self.end = scene.speed * .5 * frames         # of the ego vehicle, from s = 0
        instants = max(12, 3 * frames // 2)
        self.times = np.linspace(-.1, .5 * frames, instants)
        ego = Way(scene.speed * self.times + 1.3, np.full(instants, EGO_LANE), 2.9, 1.3)
        self.ways = [ego]

    def place(self, thing, spot, gap=.35):
        """Place a thing unless it would meet another. -> whether it was placed."""
        w, l, _ = thing.size
        if abs(np.cos(spot.turn)) < .7:              # it stands across the road
            w, l = l, w
        s_at = spot.s + spot.vs * self.times
        l_at = spot.l + spot.vl * self.times
        way = Way(s_at, l_at, l / 2 + gap, w / 2 + gap)
        if any(way.meets(other) for other in self.ways):
            return False
        self.ways.append(way)
        self.settle(thing, spot)
        self.scene.things.append(thing)
        return True

    def settle(self, thing, spot):
        """Give a thing its place, motion, heading and attribute."""
        moves = bool(spot.vs or spot.vl)
        thing.s = spot.s
        thing.l = spot.l
        thing.vs = spot.vs
        thing.vl = spot.vl
        thing.turn = spot.turn
        if moves:
            thing.turn = np.arctan2(spot.vl, spot.vs * (1 - self.scene.curve * spot.l))
        if thing.category.startswith("human") and moves:
            thing.attribute = "pedestrian.moving"
        if thing.category.startswith("vehicle") and not thing.attribute:
            thing.attribute = "vehicle.moving" if moves else "vehicle.parked"

    def add(self, number, make, spot, gap=.35, **options):
        """Make a number of things, and draw up to 30 spots for each until it fits."""
        for _ in range(number):
            thing = make(self.rng, **options)
            for _ in range(30):
                if self.place(thing, spot(), gap):
                    break

    # spots; traffic keeps to the right

    def between(self, before, beyond):
        """s, from `before` to `beyond` metres past the end of the ego vehicle's way."""
        return self.rng.uniform(before, self.end + beyond)

    def parking(self):
        side = self.rng.choice(SIDES)
        s = self.between(-25, 30)
        l = side * self.rng.uniform(4.9, 5.1)
        return Spot(s, l, turn=0 if side < 0 else np.pi)

    def driving(self):
        if self.rng.random() < .6:
            s = self.between(-30, 60)
            return Spot(s, -EGO_LANE, vs=-self.rng.uniform(3, 10))
        ahead = self.rng.choice(SIDES, p=[.3, .7])   # or else behind the ego vehicle
        s = ahead * self.rng.uniform(11, 40)
        return Spot(s, EGO_LANE, vs=self.scene.speed * self.rng.uniform(.8, 1.1))

    def cycling(self):
        side = self.rng.choice(SIDES)
        s = self.between(-10, 25)
        return Spot(s, 3.35 * side, vs=-side * self.rng.uniform(2.5, 5))

    def walking(self):
        pace = self.rng.choice([-1, 0, 1], p=[.35, .3, .35]) * self.rng.uniform(.7, 1.7)
        s = self.between(-15, 20)
        l = self.rng.choice(SIDES) * self.rng.uniform(7.2, 9.8)
        return Spot(s, l, vs=pace, turn=self.rng.uniform(-3, 3))

    def crossing(self):
        side = self.rng.choice(SIDES)
        s = self.between(14, 25)
        l = side * self.rng.uniform(2, 7)
        return Spot(s, l, vl=-side * self.rng.uniform(.8, 1.6))

    def kerb(self):
        s = self.between(0, 20)
        return Spot(s, self.rng.choice(SIDES) * self.rng.uniform(6, 7))

    def pavement(self):
        turn = self.rng.choice([0, np.pi / 2, np.pi]) + self.rng.normal(0, .08)
        s = self.between(-20, 25)
        l = self.rng.choice(SIDES) * self.rng.uniform(7.1, 10)
        return Spot(s, l, turn=turn)


def add_road_works(planner, rng, rare):
    """A digger between barriers and cones."""
    side = rng.choice(SIDES)
    start = rng.uniform(4, planner.end + 6)
    if rare[0]:
        thing = digger(rng)
        turn = rng.choice([0, np.pi]) + rng.normal(0, .1)
        planner.place(thing, Spot(start + 7, side * 4.9, turn=turn))
    for k in range(rng.integers(2, 6) * rare[1]):
        thing = barrier(rng)
        turn = np.pi / 2 + rng.normal(0, .08)
        planner.place(thing, Spot(start + 2.6 * k, side * 3.35, turn=turn), gap=.01)
    for k in range(rng.integers(3, 7) * rare[2]):
        thing = cone(rng)
        l = side * 2.95 + .1 * rng.normal()
        planner.place(thing, Spot(start - 3 + 2.6 * k, l), gap=.02)


def add_vehicles(planner, rng, rare):
    """Long ones first, as they find room less easily."""
    planner.add(rng.integers(1, 3) * rare[3], trailer, planner.parking)
    buses = rng.integers(1, 3) * rare[0]
    planner.add(buses, bus, planner.driving if rng.random() < .7 else planner.parking)
    planner.add(1, truck, planner.parking)
    planner.add(rng.integers(0, 2), truck, planner.driving)
    planner.add(rng.integers(0, 2) + rare[1], motorcycle, planner.driving, ridden=True)
    planner.add(rng.integers(0, 2), motorcycle, planner.pavement)
    planner.add(rng.integers(0, 2) + rare[2], bicycle, planner.cycling, gap=.1,
                ridden=True)
    planner.add(rng.integers(1, 3), bicycle, planner.pavement)
    planner.add(rng.integers(2, 5), car, planner.driving)
    planner.add(rng.integers(5, 10), car, planner.parking)


def add_pedestrians(planner, rng):
    planner.add(rng.integers(3, 7), pedestrian, planner.walking, gap=.1)
    kinds = ["adult", "child", "construction_worker", "police_officer"]
    for kind in rng.choice(kinds, 3):
        planner.add(1, pedestrian, planner.walking, gap=.1, kind=kind)
    planner.add(rng.integers(0, 3), pedestrian, planner.crossing, gap=.1)


def add_small_things(planner, rng):
    planner.add(rng.integers(1, 4), cone, planner.kerb)
    planner.add(rng.integers(0, 2), barrier, planner.pavement)
    planner.add(rng.integers(0, 3), wheelie_bin, planner.pavement)
    planner.add(rng.integers(10, 16), clutter, planner.pavement)


def add_trees_and_lamps(planner, rng):
    for s in np.arange(-60, 115, 9.0):
        for side in SIDES:
            if rng.random() < .65:
                make = tree if rng.random() < .6 else lamp_post
                thing = make(rng)
                turn = 0 if side > 0 else np.pi      # a lamp's arm is over the road
                shift = rng.uniform(-2, 2)
                planner.place(thing, Spot(s + shift, side * 7.1, turn=turn))


def compose(seed, index, frames=8):
    """Scene number `index` of world `seed`: road, light, houses, things, motion."""
    rng = np.random.default_rng((seed, index))
    scene = draw_street(rng, index)
    planner = Planner(scene, rng, frames)
    # Four groups of rare classes: digger and bus, barrier and motorcycle, cone and
    # bicycle, trailer. Each is in three scenes of four, and in others by chance.
    rare = [int((index + k) % 4 != 0 or rng.random() < .5) for k in range(4)]
    add_road_works(planner, rng, rare)
    add_vehicles(planner, rng, rare)
    add_pedestrians(planner, rng)
    add_small_things(planner, rng)
    add_trees_and_lamps(planner, rng)

    solids = []
    categories = []
    for side in SIDES:
        row = houses(scene, rng, side)
        kerb = kerbs(scene, side)
        solids += row + kerb
        categories += ["static.manmade"] * len(row) + ["flat.sidewalk"] * len(kerb)
    owner = [-1] * len(solids)
    for i, thing in enumerate(scene.things):
        solids += thing.solids
        owner += [i] * len(thing.solids)
        categories += [thing.category] * len(thing.solids)
    scene.solids = stack(solids, owner, categories)
    return scene


# ---- rays ---------------------------------------------------------------------------

NOTHING, GROUND = -1, -2                             # ids of rays that hit no solid


def cube_sides(taper):
    """The six sides of tapered unit cubes; inside, normals @ xyz <= offsets.

    taper (N,) -> normals (N, 6, 3), offsets (N, 6)
    """
    normals = np.zeros((len(taper), 6, 3))
    normals[:, range(6), [0, 0, 1, 1, 2, 2]] = [1, -1, 1, -1, 1, -1]
    normals[:, :4, 2] = taper[:, None] / 2
    offsets = np.ones((len(taper), 6))
    offsets[:, :4] = 1 - taper[:, None] / 2
    return normals, offsets


def hit(world, i, origin, rays):
    """Distance along each ray to solid i, inf where it is missed.

    origin (3,), rays (N, 3) -> (N,), in lengths of a ray
    """
    # The solid becomes its unit shape. Distances along rays stay what they are.
    scaled = world.axes[i] / world.half[i]
    o = (origin - world.centre[i]) @ scaled          # (3,)
    d = scaled.T @ rays.T                            # (3, N)
    with np.errstate(divide="ignore", invalid="ignore"):
        if world.kind[i] == CUBE:
            return hit_cube(o, d, world.taper[i:i + 1])
        if world.kind[i] == BALL:
            return hit_ball(o, d)
        return hit_frustum(o, d, world.taper[i])


def hit_cube(o, d, taper):
    """A ray is inside where it is inside all six half spaces."""
    normals, offsets = cube_sides(taper)
    gap = offsets[0] - normals[0] @ o                # (6,) inside is gap >= 0
    rate = normals[0] @ d                            # (6, N)
    cut = gap[:, None] / rate
    enter = np.where(rate < 0, cut, -np.inf).max(0)
    leave = np.where(rate > 0, cut, np.inf).min(0)
    outside = ((rate == 0) & (gap < 0)[:, None]).any(0)
    return np.where((enter < leave) & (enter > 0) & ~outside, enter, np.inf)


def hit_ball(o, d):
    """|o + t d|^2 = 1."""
    a = (d * d).sum(0)
    b = o @ d
    c = o @ o - 1
    return first_between_caps(o, d, (a, b, c), (0.0, 0.0))


def hit_frustum(o, d, taper):
    """x^2 + y^2 = (r + dr t)^2 between two caps."""
    r = 1 - taper * (1 + o[2]) / 2
    dr = -taper * d[2] / 2
    a = d[0] ** 2 + d[1] ** 2 - dr ** 2
    b = o[:2] @ d[:2] - r * dr
    c = o[:2] @ o[:2] - r * r
    return first_between_caps(o, d, (a, b, c), (1.0, (1 - taper) ** 2))


def first_between_caps(o, d, quadratic, caps):
    """The least positive t on a mantle, or on its caps at z = -1 and z = 1.

    quadratic: a, b, c of a t^2 + 2 b t + c = 0, the mantle; caps: their radii squared
    """
    a, b, c = quadratic
    root = np.sqrt(b * b - a * c)
    best = np.full(d.shape[1], np.inf)
    for t in ((-b - root) / a, (-b + root) / a):
        between = abs(o[2] + t * d[2]) <= 1
        best = np.where((t > 0) & between & (t < best), t, best)
    for z, radius2 in zip((-1, 1), caps):
        t = (z - o[2]) / d[2]
        x = o[0] + t * d[0]
        y = o[1] + t * d[1]
        on_cap = x ** 2 + y ** 2 < radius2
        best = np.where((t > 0) & on_cap & (t < best), t, best)
    return best


def cast(world, origin, rays, rects=None, ground=True):
    """The nearest surface along each ray.

    origin (3,); rays (H, W, 3) of any length; rects (P, 4) int: from row, to row, from
    column, to column (modulo W) of the rays that may hit each solid, None for all
    -> distance (H, W) in lengths of a ray, inf for none;
       ids (H, W): the solid, GROUND or NOTHING;
       touched: for each solid the flat indices of all rays that meet it, seen or not
    """
    H, W = rays.shape[:2]
    P = len(world.kind)
    with np.errstate(divide="ignore"):
        falling = (rays[..., 2] < 0) & ground
        distance = np.where(falling, -origin[2] / rays[..., 2], np.inf)
    ids = np.where(np.isfinite(distance), GROUND, NOTHING)
    touched = [np.empty(0, int)] * P
    if rects is None:
        rects = [(0, H, 0, W)] * P
    for i, (r0, r1, c0, c1) in enumerate(rects):
        if r0 >= r1 or c0 >= c1:
            continue
        columns = np.arange(c0, c1) % W
        unbroken = 0 <= c0 and c1 <= W               # a slice is faster than indices
        part = slice(r0, r1), slice(c0, c1) if unbroken else columns
        part_rays = rays[part]
        t = hit(world, i, origin, part_rays.reshape(-1, 3)).reshape(part_rays.shape[:2])
        flat = np.arange(r0, r1)[:, None] * W + columns
        touched[i] = flat[np.isfinite(t)]
        nearer = t < distance[part]
        distance[part] = np.where(nearer, t, distance[part])
        ids[part] = np.where(nearer, i, ids[part])
    return distance, ids, touched


def corners(world):
    """The eight corners of each solid's own box: (P, 8, 3)."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    offsets = np.einsum("pij,pkj->pki", world.axes, signs * world.half[:, None])
    return world.centre[:, None] + offsets


def surface(world, ids, xyz):
    """What was hit: ids (N,) of solids, xyz (N, 3)

    -> normals (N, 3) in the plane; normals (N, 3) and xyz (N, 3) in the solid's axes
    """
    axes = world.axes[ids]
    half = world.half[ids]
    kind = world.kind[ids][:, None]
    taper = world.taper[ids]
    unit = np.einsum("nji,nj->ni", axes, xyz - world.centre[ids]) / half
    cube = cube_normals(unit, taper)
    frustum = frustum_normals(unit, taper)
    normal = np.select([kind == CUBE, kind == BALL], [cube, unit], frustum) / half
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return np.einsum("nij,nj->ni", axes, normal), normal, unit * half


def cube_normals(unit, taper):
    """Normals (N, 3) of the sides of a unit cube on which points (N, 3) lie."""
    normals, offsets = cube_sides(taper)
    reach = np.einsum("nsi,ni->ns", normals, unit) - offsets   # 0 on their side
    return normals[np.arange(len(unit)), reach.argmax(1)]


def frustum_normals(unit, taper):
    """Normals (N, 3) of points (N, 3) on a unit frustum's mantle or caps."""
    x, y, z = unit.T
    zero = 0 * taper
    radius = np.hypot(x, y)
    from_cap = 1 - abs(z)
    from_mantle = abs(radius - (1 - taper * (1 + z) / 2))
    mantle = np.stack([x, y, taper / 2 * radius], 1)
    cap = np.stack([zero, zero, np.sign(z)], 1)
    return np.where((from_cap > from_mantle)[:, None], mantle, cap)


# ---- LiDAR --------------------------------------------------------------------------

LIDAR_MOUNT = (0.94, 0.0, 1.84)    # metres, in the ego frame
REACH = 70.0                       # metres
LIDAR_AXES = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]])  # x right, y forward


def beam_elevations(beams):
    return np.radians(np.linspace(-30, 10, beams))


def beam_rays(elevations, azimuths):
    """Unit rays of one turn in the LiDAR's axes, clockwise from the front.

    -> (beams, azimuths, 3)
    """
    angles = 2 * np.pi * np.arange(azimuths) / azimuths
    up, turn = np.meshgrid(elevations, angles, indexing="ij")
    x = np.cos(up) * np.sin(turn)
    y = np.cos(up) * np.cos(turn)
    return np.stack([x, y, np.sin(up)], -1)


def beam_rects(world, lidar2plane, elevations, azimuths):
    """The beams and azimuth steps that each solid can cover, for cast: (P, 4).

    They follow from its axis-parallel bounds in the LiDAR frame.
    """
    local = (corners(world) - lidar2plane[:3, 3]) @ lidar2plane[:3, :3]
    low = local.min(1)                               # (P, 3)
    high = local.max(1)                              # (P, 3)
    # level distances to the nearest and to the farthest point
    near = np.linalg.norm(np.clip(0, low[:, :2], high[:, :2]), axis=1)
    far = np.linalg.norm(np.maximum(abs(low), abs(high))[:, :2], axis=1)
    top = np.arctan2(high[:, 2], np.where(high[:, 2] > 0, near, far))
    bottom = np.arctan2(low[:, 2], np.where(low[:, 2] < 0, near, far))
    r0 = np.searchsorted(elevations, bottom - 1e-6)
    r1 = np.searchsorted(elevations, top + 1e-6)

    middle = np.arctan2(low[:, 0] + high[:, 0], low[:, 1] + high[:, 1])
    edges = []
    for x in (low[:, 0], high[:, 0]):
        for y in (low[:, 1], high[:, 1]):
            edges.append(np.arctan2(x, y))
    edges = np.stack(edges, 1) - middle[:, None]     # (P, 4)
    edges = (edges + np.pi) % (2 * np.pi) - np.pi
    step = 2 * np.pi / azimuths
    c0 = np.floor((middle + edges.min(1)) / step) - 1
    c1 = np.ceil((middle + edges.max(1)) / step) + 2
    overhead = near == 0                             # all round
    c0 = np.where(overhead, 0, c0)
    c1 = np.where(overhead, azimuths, np.minimum(c1, c0 + azimuths))

    rects = np.stack([r0, r1, c0, c1], 1).astype(int)
    rects[near > REACH] = 0
    return rects


def sweep(world, scene, lidar2plane, roof, beams, azimuths, rng):
    """One turn of the LiDAR; roof: the ego vehicle's own, a World.

    -> (N, 5) float32: x right, y forward, z up, intensity 0 to 255, ring;
       (N,) uint8: what each point hit, an index into CATEGORIES
    """
    elevations = beam_elevations(beams)
    local = beam_rays(elevations, azimuths)
    origin = lidar2plane[:3, 3]
    rays = local @ lidar2plane[:3, :3].T
    rects = beam_rects(world, lidar2plane, elevations, azimuths)
    distance, ids, _ = cast(world, origin, rays, rects)
    own, _, _ = cast(roof, origin, rays, ground=False)
    clear = distance < own                           # not stopped by its own roof
    shine, cosine = echoes(world, scene, origin, rays, distance, ids, clear)
    distance = np.minimum(distance, own)
    echo = shine * np.sqrt(cosine) * np.exp(-distance / 45)    # what returns, 0 to 1
    lost = .02 + .5 * np.exp(-echo / .012)           # by chance; or dark, far or grazed
    keep = (distance < REACH) & (rng.random(ids.shape) > lost)
    noisy = np.where(keep, distance, 0) + rng.normal(0, .015, ids.shape)
    intensity = np.clip(255 * echo * rng.uniform(.85, 1.15, ids.shape), 0, 255).round()
    ring = np.broadcast_to(np.arange(beams)[:, None], ids.shape)
    columns = [local * noisy[..., None], intensity[..., None], ring[..., None]]
    points = np.concatenate(columns, -1)
    hits = categories_hit(world, scene, origin, rays, distance, ids, clear)
    as_fired = keep.T
    return points.transpose(1, 0, 2)[as_fired].astype(np.float32), hits.T[as_fired]


def categories_hit(world, scene, origin, rays, distance, ids, clear):
    """What each ray hits: (H, W) uint8, an index into CATEGORIES; 0 is noise, nothing."""
    hits = np.zeros(ids.shape, np.uint8)
    ground = ids == GROUND
    xy = origin[:2] + rays[ground][:, :2] * distance[ground][:, None]
    hits[ground] = ground_categories(scene, *xy.T)
    hits[ids >= 0] = world.category[ids[ids >= 0]]
    hits[~clear] = CATEGORIES.index("vehicle.ego")
    return hits


def echoes(world, scene, origin, rays, distance, ids, clear):
    """Reflectance and cosine of incidence (H, W) of what the clear rays hit.

    Elsewhere both are those of the vehicle's own roof.
    """
    shine = np.full(ids.shape, .5)
    cosine = np.full(ids.shape, .6)
    xyz = origin + rays * np.where(ids == NOTHING, 0, distance)[..., None]
    ground = (ids == GROUND) & clear
    _, shine[ground] = ground_colour(scene, xyz[ground][:, 0], xyz[ground][:, 1])
    cosine[ground] = -rays[ground][:, 2]
    solid = (ids >= 0) & clear
    normal, _, _ = surface(world, ids[solid], xyz[solid])
    shine[solid] = world.shine[ids[solid]]
    cosine[solid] = abs((normal * rays[solid]).sum(-1))
    return shine, cosine


# ---- cameras ------------------------------------------------------------------------

class Camera(NamedTuple):
    yaw: int             # degrees, to the left
    view: int            # degrees, the horizontal field of view
    mount: tuple         # metres, in the ego frame
    delay: int           # microseconds from sweep to picture


CAMERAS = {
    "CAM_FRONT": Camera(0, 68, (1.70, 0.00, 1.51), -34_300),
    "CAM_FRONT_RIGHT": Camera(-55, 68, (1.55, -0.49, 1.50), -26_200),
    "CAM_BACK_RIGHT": Camera(-110, 68, (1.02, -0.48, 1.56), -18_500),
    "CAM_BACK": Camera(180, 100, (0.03, 0.00, 1.58), -9_200),
    "CAM_BACK_LEFT": Camera(110, 68, (1.04, 0.48, 1.59), 700),
    "CAM_FRONT_LEFT": Camera(55, 68, (1.52, 0.49, 1.51), -42_100),
}
# x right, y down, z forward
CAMERA_AXES = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def pinhole(focal, u, v):
    return np.array([[focal, 0, u], [0, focal, v], [0, 0, 1]])


def pixel_rays(camera2plane, K, hw):
    """Rays through the pixel centres (at +0.5), of depth 1: (H, W, 3)."""
    v, u = np.mgrid[:hw[0], :hw[1]] + .5
    x = (u - K[0, 2]) / K[0, 0]
    y = (v - K[1, 2]) / K[1, 1]
    return np.stack([x, y, np.ones(hw)], -1) @ camera2plane[:3, :3].T


def pixel_rects(world, camera2plane, K, hw):
    """The rows and columns that each solid can cover in an image, for cast: (P, 4).

    A solid that reaches behind the lens can cover all.
    """
    height, width = hw
    local = (corners(world) - camera2plane[:3, 3]) @ camera2plane[:3, :3]
    xy = local[..., :2]                              # (P, 8, 2)
    depth = local[..., 2:]                           # (P, 8, 1)
    focal = K[[0, 1], [0, 1]]
    middle = K[:2, 2]
    size = np.array([width, height])
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = focal * xy / depth + middle
    low = np.floor(uv.min(1))
    high = np.ceil(uv.max(1)) + 1
    rects = np.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], 1)
    rects[depth.min((1, 2)) < .1] = 0, height, 0, width
    # past one edge of the view: (P, 2)
    before = (xy < -middle / focal * depth).all(1)
    beyond = (xy > (size - middle) / focal * depth).all(1)
    behind = depth.max((1, 2)) < .1
    rects[(before | beyond).any(1) | behind] = 0
    return np.clip(rects, 0, [height, height, width, width]).astype(int)


def solid_colour(world, ids, normal, local):
    """Textures.

    ids (N,); normals (N, 3) and coordinates (N, 3) in the solid's axes -> albedo (N, 3)
    """
    colour = world.colour[ids]
    texture = world.texture[ids]
    half_height = world.half[ids, 2]
    u = np.where(abs(normal[:, 0]) > abs(normal[:, 1]), local[:, 1], local[:, 0])
    v = local[:, 2]
    z = v + half_height                              # height above its foot
    upright = abs(normal[:, 2]) < .7

    house = (texture == WINDOWS) & upright
    glow = speckle(u / 2.6, z / 3, ids)[:, None]     # one number a window
    window = house & (abs(u / 2.6 % 1 - .5) < .23) & (abs(z / 3 % 1 - .54) < .24)
    some_lit = np.where(glow < .12, [.75, .6, .3], [.05, .07, .1] + .15 * glow)
    colour[window] = some_lit[window]
    colour[house & (z < .5)] *= .6

    leaves = texture == LEAVES
    colour[leaves] *= .45 + 1.1 * speckle(*(local[leaves].T / .3))[:, None]
    colour[(texture == STRIPES) & ((u + v) / .5 % 1 < .5)] = .8
    colour[(texture == PANES) & upright & (u / 1.25 % 1 < .12)] = .25
    colour[(texture == RIBS) & upright & (u / .55 % 1 < .18)] *= .65
    colour[(texture == BANDS) & (abs(v / half_height - .1) < .3)] = .85
    return colour


class Shadows(NamedTuple):
    """The sun's view of a scene."""
    sun2plane: np.ndarray          # (4, 4)
    K: np.ndarray                  # (3, 3)
    depth: np.ndarray              # (size, size)


def shadow_map(world, scene, middle, size=560, span=112.0):
    """Shadows as of a pinhole 1 km away that looks at `middle` (2,)."""
    z = -scene.light["sun"]
    x = np.cross(z, [0, 0, 1.0])
    x /= np.linalg.norm(x)
    y = np.cross(z, x)
    sun2plane = rigid(np.stack([x, y, z], 1), np.append(middle, 0) - 1000 * z)
    K = pinhole(1000 * size / span, size / 2, size / 2)
    hw = (size, size)
    rays = pixel_rays(sun2plane, K, hw)
    rects = pixel_rects(world, sun2plane, K, hw)
    depth, _, _ = cast(world, sun2plane[:3, 3], rays, rects, ground=False)
    return Shadows(sun2plane, K, depth)


def lit(shadows, xyz, margin=.25):
    """1 where the sun reaches xyz (N, 3), else 0; outside the map it always does."""
    sun2plane, K, depth = shadows
    local = (xyz - sun2plane[:3, 3]) @ sun2plane[:3, :3]
    uv = K[[0, 1], [0, 1]] * local[:, :2] / local[:, 2:] + K[:2, 2]
    u, v = np.floor(uv).astype(int).T
    inside = (np.minimum(u, v) >= 0) & (np.maximum(u, v) < len(depth))
    first = depth[np.where(inside, v, 0), np.where(inside, u, 0)]
    return np.where(inside & (first < local[:, 2] - margin), 0.0, 1.0)


def sky(light, d, length):
    """Colours (N, 3) of the sky along rays d (N, 3) of length (N,)."""
    up = np.clip(d[:, 2:] / length[:, None], 0, 1)
    glow = np.clip(d @ light["sun"] / length, 0, 1)[:, None] ** 40
    blue = light["horizon"] + (light["zenith"] - light["horizon"]) * up ** .5
    return blue + .35 * glow * light["sunlight"]


def materials(world, scene, ids, xyz):
    """What lies at xyz (N, 3), of ids (N,).

    -> albedo (N, 3), normals (N, 3); 0 for NOTHING
    """
    albedo = np.zeros_like(xyz)
    normal = np.zeros_like(xyz)
    ground = np.flatnonzero(ids == GROUND)
    albedo[ground], _ = ground_colour(scene, xyz[ground, 0], xyz[ground, 1])
    normal[ground] = [0, 0, 1]
    solid = np.flatnonzero(ids >= 0)
    normal[solid], normal_local, local = surface(world, ids[solid], xyz[solid])
    albedo[solid] = solid_colour(world, ids[solid], normal_local, local)
    return albedo, normal


def render(world, scene, camera2plane, K, hw, shadows, rng):
    """A photograph (H, W, 3) uint8, with ids and touched as from cast."""
    light = scene.light
    origin = camera2plane[:3, 3]
    rays = pixel_rays(camera2plane, K, hw)
    rects = pixel_rects(world, camera2plane, K, hw)
    depth, ids, touched = cast(world, origin, rays, rects)

    flat = ids.ravel()
    d = rays.reshape(-1, 3)
    length = np.linalg.norm(d, axis=1)
    reach = np.where(flat == NOTHING, 0, depth.ravel())[:, None]
    xyz = origin + d * reach
    albedo, normal = materials(world, scene, flat, xyz)

    sunny = np.clip(normal @ light["sun"], 0, None) * lit(shadows, xyz + .05 * normal)
    direct = sunny[:, None] * light["sunlight"]
    ambient = light["skylight"] * (.65 + .35 * normal[:, 2:])
    colour = albedo * (direct + ambient)             # Lambert
    clear = np.exp(-reach * length[:, None] / 220)   # haze
    hazy = colour * clear + light["horizon"] * (1 - clear)
    colour = np.where(flat[:, None] == NOTHING, sky(light, d, length), hazy)
    image = 255 * np.clip(.9 * colour, 0, 1) ** (1 / 2.2) + rng.normal(0, 1.5, d.shape)
    return np.clip(image, 0, 255).astype(np.uint8).reshape(*hw, 3), ids, touched


# ---- one scene: its files and its table rows ----------------------------------------

PERIOD = 500_000                   # microseconds between keyframes
EPOCH = 1_600_000_000_000_000      # microseconds: the first scene starts
SCENE_EVERY = 60_000_000           # microseconds from scene to scene
LABEL_REACH = 60.0                 # metres from the ego vehicle
VISIBILITY = {                     # per cent of a thing's pixels that show it
    "1": (0, 40),
    "2": (40, 60),
    "3": (60, 80),
    "4": (80, 100),
}


def token(*names):
    return hashlib.md5("/".join(map(str, names)).encode()).hexdigest()


def wxyz(rotation):
    """A rotation matrix as nuScenes' quaternion, real part first."""
    return Rotation.from_matrix(rotation).as_quat()[[3, 0, 1, 2]].tolist()


def visibility(percent):
    """nuScenes' number of the highest range whose lower end is reached."""
    return max(number for number, (low, _) in VISIBILITY.items() if percent >= low)


def calibration(rng, channel, hw):
    """A sensor's mount and intrinsics, each scene's own to a quarter of a degree.

    -> sensor2ego (4, 4); K (3, 3), empty for the LiDAR
    """
    wobble = Rotation.from_euler("xyz", rng.normal(0, .004, 3)).as_matrix()
    if channel == "LIDAR_TOP":
        return rigid(LIDAR_AXES @ wobble, LIDAR_MOUNT), np.empty((0, 0))
    camera = CAMERAS[channel]
    turn = about_z(np.radians(camera.yaw))
    sensor2ego = rigid(turn @ CAMERA_AXES @ wobble, camera.mount)
    focal = hw[1] / 2 / np.tan(np.radians(camera.view) / 2)
    # square pixels, some sky cropped
    u, v = np.array([.5, .42]) * hw[::-1] + rng.normal(0, .5, 2)
    return sensor2ego, pinhole(focal, u, v)


def count_inside(points, sensor2world, translation, size, yaw):
    """How many points lie strictly inside a global box.

    points (N, 3), float32 as written; size: w, l, h
    """
    w, l, h = size
    world = points.astype(np.float64) @ sensor2world[:3, :3].T + sensor2world[:3, 3]
    local = (world - translation) @ about_z(yaw)
    inside = abs(local) < np.array([l, w, h]) / 2
    return int(inside.all(1).sum())


class Sweep(NamedTuple):
    """What the pictures and annotations of a keyframe need of its sweep."""
    points: np.ndarray             # (N, 5)
    lidar2world: np.ndarray        # (4, 4)
    ego: np.ndarray                # (4, 4) ego to plane at the sweep's moment
    shadows: Shadows


class Recorder:
    """Drives through one scene, writes its files, and collects its table rows."""

    def __init__(self, root, seed, index, frames, beams, azimuths, image):
        self.root = root
        self.seed = seed
        self.frames = frames
        self.beams = beams
        self.azimuths = azimuths
        self.image = image
        self.scene = compose(seed, index, frames)
        self.rng = np.random.default_rng((seed, index, 1))
        self.start = EPOCH + index * SCENE_EVERY
        self.sensors = {}
        for channel in ("LIDAR_TOP", *CAMERAS):
            self.sensors[channel] = calibration(self.rng, channel, image)
        roof = Solid(FRUSTUM, (.94, 0, 1.4), (.555, .555, .14), STEEL)
        self.roof = stack([roof], [-1], ["vehicle.ego"])  # two of 32 beams meet it
        self.rows = {}                               # table -> its rows
        self.tracks = {}                             # thing's index -> its annotations

    def key(self, *names):
        return token(self.seed, self.scene.name, *names)

    def neighbour(self, k, *names):
        """The key of keyframe k's row, empty beyond the scene's ends."""
        return self.key(*names, k) if 0 <= k < self.frames else ""

    def add(self, table, **row):
        self.rows.setdefault(table, []).append(row)

    def record(self):
        """Drive through the scene. -> rows {table: [row]}"""
        self.add_sensors()
        for k in range(self.frames):
            moment = k * PERIOD + int(self.rng.integers(-2000, 2000))
            self.add_sample(k, moment)
            swept = self.write_sweep(k, moment)
            shown, whole = self.write_pictures(k, moment, swept.shadows)
            self.annotate(k, moment, swept, shown, whole)
        self.add_instances()
        self.add_scene()
        return self.rows

    def add_sensors(self):
        for channel, (sensor2ego, K) in self.sensors.items():
            self.add("calibrated_sensor",
                     token=self.key(channel),
                     sensor_token=token("sensor", channel),
                     translation=sensor2ego[:3, 3].tolist(),
                     rotation=wxyz(sensor2ego[:3, :3]),
                     camera_intrinsic=K.tolist())

    def add_sample(self, k, moment):
        self.add("sample",
                 token=self.key("sample", k),
                 timestamp=self.start + moment,
                 prev=self.neighbour(k - 1, "sample"),
                 next=self.neighbour(k + 1, "sample"),
                 scene_token=self.key("scene"))

    def add_data(self, k, channel, stamp, ego2world, ending, hw):
        """Add the rows of one file, `stamp` microseconds after the scene's start.

        -> the path of the file below root
        """
        name = self.scene.name
        time = self.start + stamp
        path = f"samples/{channel}/{name}__{channel}__{time}.{ending}"
        self.add("ego_pose",
                 token=self.key(channel, k),
                 timestamp=time,
                 rotation=wxyz(ego2world[:3, :3]),
                 translation=ego2world[:3, 3].tolist())
        self.add("sample_data",
                 token=self.key(channel, k),
                 sample_token=self.key("sample", k),
                 ego_pose_token=self.key(channel, k),
                 calibrated_sensor_token=self.key(channel),
                 timestamp=time,
                 fileformat=ending.split(".")[0],
                 is_key_frame=True,
                 height=hw[0],
                 width=hw[1],
                 filename=path,
                 prev=self.neighbour(k - 1, channel),
                 next=self.neighbour(k + 1, channel))
        return path

    def write_sweep(self, k, moment):
        scene = self.scene
        sensor2ego, _ = self.sensors["LIDAR_TOP"]
        world = world_at(scene, moment / 1e6)
        ego = ego2plane(scene, moment / 1e6)
        ego2world = scene.plane2world @ ego
        path = self.add_data(k, "LIDAR_TOP", moment, ego2world, "pcd.bin", (0, 0))
        roof = replace(self.roof, centre=self.roof.centre @ ego[:3, :3].T + ego[:3, 3])
        points, categories = sweep(world, scene, ego @ sensor2ego, roof, self.beams,
                                   self.azimuths, self.rng)
        points.tofile(self.root / path)
        self.write_categories(self.key("LIDAR_TOP", k), categories)
        shadows = shadow_map(world, scene, ego[:2, 3])
        return Sweep(points, ego2world @ sensor2ego, ego, shadows)

    def write_categories(self, key, categories):
        """The lidarseg file of a sweep, and its row."""
        path = f"lidarseg/{TABLES}/{key}_lidarseg.bin"
        categories.tofile(self.root / path)
        self.add("lidarseg", token=key, sample_data_token=key, filename=path)

    def write_pictures(self, k, moment, shadows):
        """Write the pictures of all cameras.

        -> for each thing, how many pixels show it, and how many would if it were alone
        """
        scene = self.scene
        shown = np.zeros(len(scene.things))
        whole = np.zeros(len(scene.things))
        for channel in CAMERAS:
            sensor2ego, K = self.sensors[channel]
            stamp = moment + CAMERAS[channel].delay
            world = world_at(scene, stamp / 1e6)
            ego = ego2plane(scene, stamp / 1e6)
            ego2world = scene.plane2world @ ego
            path = self.add_data(k, channel, stamp, ego2world, "jpg", self.image)
            picture, ids, touched = render(world, scene, ego @ sensor2ego, K,
                                           self.image, shadows, self.rng)
            Image.fromarray(picture).save(self.root / path, quality=90)
            owners = world.owner[ids[ids >= 0]]
            shown += np.bincount(owners[owners >= 0], minlength=len(shown))
            for i in range(len(whole)):
                pixels = [touched[j] for j in np.flatnonzero(world.owner == i)]
                whole[i] += len(np.unique(np.concatenate(pixels)))
        return shown, whole

    def annotate(self, k, moment, swept, shown, whole):
        """Annotations of the things with a box around the ego vehicle."""
        for i, thing in enumerate(self.scene.things):
            place = thing2plane(self.scene, thing, moment / 1e6)
            distance = np.linalg.norm(place[:2, 3] - swept.ego[:2, 3])
            if thing.category.startswith("static") or distance > LABEL_REACH:
                continue
            thing2world = self.scene.plane2world @ place
            size = [float(edge) for edge in thing.size]
            centre = thing2world[:3, 3] + [0, 0, size[2] / 2]
            yaw = np.arctan2(thing2world[1, 0], thing2world[0, 0])
            percent = 100 * shown[i] / max(whole[i], 1)
            attributes = []
            if thing.attribute:
                attributes.append(token("attribute", thing.attribute))
            inside = count_inside(swept.points[:, :3], swept.lidar2world, centre, size,
                                  yaw)
            self.tracks.setdefault(i, []).append(dict(
                token=self.key("annotation", i, k),
                sample_token=self.key("sample", k),
                instance_token=self.key("instance", i),
                visibility_token=visibility(percent),
                attribute_tokens=attributes,
                translation=centre.tolist(),
                size=size,
                rotation=[float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
                prev="",
                next="",
                num_lidar_pts=inside,
                num_radar_pts=0))

    def add_instances(self):
        """Link the annotations of each thing; things in the order of their first."""
        self.rows["sample_annotation"] = []
        for i, track in self.tracks.items():
            for before, after in zip(track, track[1:]):
                before["next"] = after["token"]
                after["prev"] = before["token"]
            self.rows["sample_annotation"] += track
            self.add("instance",
                     token=self.key("instance", i),
                     category_token=token("category", self.scene.things[i].category),
                     nbr_annotations=len(track),
                     first_annotation_token=track[0]["token"],
                     last_annotation_token=track[-1]["token"])

    def add_scene(self):
        self.add("log",
                 token=self.key("log"),
                 logfile=self.scene.name,
                 vehicle="embedded",
                 date_captured="2020-09-13",
                 location="embedded-town")
        self.add("scene",
                 token=self.key("scene"),
                 log_token=self.key("log"),
                 nbr_samples=self.frames,
                 first_sample_token=self.key("sample", 0),
                 last_sample_token=self.key("sample", self.frames - 1),
                 name=self.scene.name,
                 description="a procedural street")


# ---- nuScenes' tables ---------------------------------------------------------------

ATTRIBUTES = [
    "vehicle.moving", "vehicle.stopped", "vehicle.parked",
    "cycle.with_rider", "cycle.without_rider",
    "pedestrian.standing", "pedestrian.moving", "pedestrian.sitting_lying_down",
]
CATEGORIES = [           # nuScenes-lidarseg's, at their indices
    "noise",
    "animal",
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.stroller",
    "human.pedestrian.wheelchair",
    "movable_object.barrier",
    "movable_object.debris",
    "movable_object.pushable_pullable",
    "movable_object.trafficcone",
    "static_object.bicycle_rack",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.car",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.motorcycle",
    "vehicle.trailer",
    "vehicle.truck",
    "flat.driveable_surface",
    "flat.other",
    "flat.sidewalk",
    "flat.terrain",
    "static.manmade",
    "static.other",
    "static.vegetation",
    "vehicle.ego",
]


def named_rows(table, names):
    return [dict(token=token(table, name), name=name, description="") for name in names]


def shared_tables():
    """The tables that do not depend on the scenes."""
    categories = named_rows("category", CATEGORIES)
    for index, row in enumerate(categories):
        row["index"] = index
    sensors = []
    for channel in (*CAMERAS, "LIDAR_TOP"):
        modality = "camera" if channel in CAMERAS else "lidar"
        key = token("sensor", channel)
        sensors.append(dict(token=key, channel=channel, modality=modality))
    levels = []
    for number, (low, high) in VISIBILITY.items():
        text = f"{low} to {high} % of the object is visible"
        levels.append(dict(token=number, level=f"v{low}-{high}", description=text))
    return {
        "attribute": named_rows("attribute", ATTRIBUTES),
        "category": categories,
        "sensor": sensors,
        "visibility": levels,
    }


def write_tables(root, seed, train):
    """Join the scenes' rows, add what all scenes share, name the splits."""
    tables = {}
    for path in sorted((root / "rows").glob("*.json")):
        for table, rows in json.loads(path.read_text()).items():
            tables.setdefault(table, []).extend(rows)
    tables.update(shared_tables())
    picture = f"maps/{token(seed, 'map')}.png"       # the devkit expects a file
    Image.new("L", (16, 16)).save(root / picture)
    tables["map"] = [dict(
        category="semantic_prior",
        token=token(seed, "map"),
        filename=picture,
        log_tokens=[log["token"] for log in tables["log"]])]
    names = [scene["name"] for scene in tables["scene"]]
    tables["splits"] = {"embedded_train": names[:train], "embedded_val": names[train:]}
    for table, rows in tables.items():
        (root / TABLES / f"{table}.json").write_text(json.dumps(rows, indent=0))


class Label(NamedTuple):
    """A box in the world, as the tables have it."""
    kind: str                      # the second word of its category
    instance: str
    centre: np.ndarray             # (3,)
    size: np.ndarray               # l, w, h
    yaw: float
    points: int
    visibility: int                # 1 to 4
    velocity: np.ndarray           # (3,)


class Picture(NamedTuple):
    file: Path
    K: np.ndarray                  # (3, 3)
    camera2ego: np.ndarray         # (4, 4)
    ego2world: np.ndarray          # (4, 4)


@dataclass
class Keyframe:
    """A frame of the nuScenes layout, for a conversion to another."""
    scene: str
    split: str
    time: int
    points: np.ndarray = None      # (N, 5) without those on the ego vehicle's own roof
    categories: np.ndarray = None  # (N,) what they hit, indices into CATEGORIES
    lidar2ego: np.ndarray = None   # (4, 4)
    ego2world: np.ndarray = None   # (4, 4)
    pictures: dict = field(default_factory=dict)     # channel -> Picture
    labels: list = field(default_factory=list)


class Tables:
    """The tables on disk in the nuScenes layout, those with tokens as {token: row}."""

    def __init__(self, root):
        self.root = root
        self.splits = self.read("splits")
        self.data = self.read("sample_data")
        self.lidarseg = {row["sample_data_token"]: row["filename"]
                         for row in self.read("lidarseg")}
        self.scenes = self.by_token("scene")
        self.samples = self.by_token("sample")
        self.poses = self.by_token("ego_pose")
        self.mounts = self.by_token("calibrated_sensor")
        self.sensors = self.by_token("sensor")
        self.categories = self.by_token("category")
        self.instances = self.by_token("instance")
        self.annotations = self.by_token("sample_annotation")

    def read(self, name):
        return json.loads((self.root / TABLES / f"{name}.json").read_text())

    def by_token(self, name):
        return {row["token"]: row for row in self.read(name)}

    def keyframes(self):
        """All Keyframes in the order of time."""
        frames = {}
        for name, row in self.samples.items():
            scene = self.scenes[row["scene_token"]]["name"]
            split = "train" if scene in self.splits["embedded_train"] else "val"
            frames[name] = Keyframe(scene, split, row["timestamp"])
        for row in self.data:
            self.add_file(frames[row["sample_token"]], row)
        for row in self.annotations.values():
            frames[row["sample_token"]].labels.append(self.label(row))
        return sorted(frames.values(), key=lambda frame: frame.time)

    def add_file(self, frame, row):
        mount = self.mounts[row["calibrated_sensor_token"]]
        channel = self.sensors[mount["sensor_token"]]["channel"]
        sensor2ego = row_pose(mount)
        ego2world = row_pose(self.poses[row["ego_pose_token"]])
        path = self.root / row["filename"]
        if channel == "LIDAR_TOP":
            points = np.fromfile(path, np.float32).reshape(-1, 5)
            x = points[:, 0]
            y = points[:, 1]
            roof = (y > -1.5) & (y < 2.5) & (abs(x) < 1)
            categories = np.fromfile(self.root / self.lidarseg[row["token"]], np.uint8)
            frame.points = points[~roof]
            frame.categories = categories[~roof]
            frame.lidar2ego = sensor2ego
            frame.ego2world = ego2world
        else:
            K = np.array(mount["camera_intrinsic"])
            frame.pictures[channel] = Picture(path, K, sensor2ego, ego2world)

    def label(self, row):
        before = self.annotations[row["prev"]] if row["prev"] else row
        after = self.annotations[row["next"]] if row["next"] else row
        gap = (self.time(after) - self.time(before)) * 1e-6
        velocity = np.zeros(3)
        if gap:
            velocity = (np.array(after["translation"]) - before["translation"]) / gap
        category = self.instances[row["instance_token"]]["category_token"]
        kind = self.categories[category]["name"].split(".")[1]
        yaw = 2 * np.arctan2(row["rotation"][3], row["rotation"][0])
        w, l, h = row["size"]
        return Label(
            kind=kind,
            instance=row["instance_token"],
            centre=np.array(row["translation"]),
            size=np.array([l, w, h]),
            yaw=yaw,
            points=row["num_lidar_pts"],
            visibility=int(row["visibility_token"]),
            velocity=velocity)

    def time(self, annotation):
        return self.samples[annotation["sample_token"]]["timestamp"]


def row_pose(row):
    """The (4, 4) matrix of a row with nuScenes' rotation and translation."""
    rotation = Rotation.from_quat(np.roll(row["rotation"], -1)).as_matrix()
    return rigid(rotation, row["translation"])


# ---- the same world in KITTI's layout -----------------------------------------------

KITTI_TYPE = {
    "car": "Car",
    "truck": "Truck", "bus": "Truck", "trailer": "Truck", "construction": "Truck",
    "pedestrian": "Pedestrian",
    "bicycle": "Cyclist", "motorcycle": "Cyclist",
}
SEMANTIC_KITTI = {           # ids of SemanticKITTI; of other categories 0, unlabelled
    "vehicle.car": 10, "vehicle.bicycle": 11, "vehicle.bus.rigid": 13, "vehicle.motorcycle": 15,
    "vehicle.truck": 18, "vehicle.trailer": 20, "vehicle.construction": 20,
    "human.pedestrian.adult": 30, "human.pedestrian.child": 30,
    "human.pedestrian.construction_worker": 30, "human.pedestrian.police_officer": 30,
    "flat.driveable_surface": 40, "flat.sidewalk": 48, "flat.terrain": 72,
    "static.manmade": 50, "static.vegetation": 70, "movable_object.barrier": 51,
    "movable_object.pushable_pullable": 99, "movable_object.trafficcone": 99,
    "static_object.bicycle_rack": 52,
}
SEQUENCES = {"train": "00", "val": "08"}
# x forward, y left -> x right, y forward
FORWARD2LIDAR = rigid(LIDAR_AXES.T, (0, 0, 0))


def to_kitti(source, root):
    """training/{velodyne, image_2, calib, label_2} and ImageSets of the front camera.

    The labels are of what its picture shows. dataset/sequences holds the same sweeps with a
    label for each point, as SemanticKITTI has them, without pictures and calibration.
    """
    training = root / "training"
    ids = np.array([SEMANTIC_KITTI.get(name, 0) for name in CATEGORIES], np.uint32)
    for sequence in SEQUENCES.values():
        for folder in ("velodyne", "labels"):
            (root / "dataset" / "sequences" / sequence / folder).mkdir(parents=True)
    for folder in ("velodyne", "image_2", "calib", "label_2"):
        (training / folder).mkdir(parents=True)
    (root / "ImageSets").mkdir()
    lists = dict(train=[], val=[])
    for number, frame in enumerate(Tables(source).keyframes()):
        name = f"{number:06d}"
        lists[frame.split].append(name)
        front = frame.pictures["CAM_FRONT"]
        picture = Image.open(front.file)
        picture.save(training / "image_2" / f"{name}.png")
        kitti_points(frame.points).tofile(training / "velodyne" / f"{name}.bin")

        world2camera = np.linalg.inv(front.ego2world @ front.camera2ego)
        velo2camera = world2camera @ frame.ego2world @ frame.lidar2ego @ FORWARD2LIDAR
        calibration_text = kitti_calibration(front.K, velo2camera)
        (training / "calib" / f"{name}.txt").write_text(calibration_text)
        lines = ""
        for label in frame.labels:
            lines += kitti_label(label, world2camera, front.K, picture.size)
        (training / "label_2" / f"{name}.txt").write_text(lines)

        sequence = root / "dataset" / "sequences" / SEQUENCES[frame.split]
        kitti_points(frame.points).tofile(sequence / "velodyne" / f"{name}.bin")
        ids[frame.categories].tofile(sequence / "labels" / f"{name}.label")
    for split, names in lists.items():
        (root / "ImageSets" / f"{split}.txt").write_text("\n".join(names))


def kitti_points(points):
    """(N, 5) -> (N, 4): x forward, y left, z up, intensity 0 to 1."""
    x, y, z, intensity, _ = points.T
    return np.stack([y, -x, z, intensity / 255], 1).astype(np.float32)


def kitti_calibration(K, velo2camera):
    """The text of a calibration file; all four cameras are the front one."""
    P = np.concatenate([K, np.zeros((3, 1))], 1)
    matrices = {f"P{n}": P for n in range(4)}
    matrices["R0_rect"] = np.eye(3)
    matrices["Tr_velo_to_cam"] = velo2camera[:3]
    matrices["Tr_imu_to_velo"] = np.eye(4)[:3]
    text = ""
    for key, matrix in matrices.items():
        values = " ".join(f"{value:.12e}" for value in np.ravel(matrix))
        text += f"{key}: {values}\n"
    return text + "\n"


def kitti_label(label, world2camera, K, size):
    """The line of a label; "" for no type of KITTI, or outside the picture."""
    if label.kind not in KITTI_TYPE:
        return ""
    rotation = world2camera[:3, :3]
    l, w, h = label.size
    heading = rotation @ [np.cos(label.yaw), np.sin(label.yaw), 0]
    heading = heading / np.hypot(*heading[::2]) * [1, 0, 1]    # level
    across = np.cross(heading, [0, 1, 0])
    bottom = rotation @ label.centre + world2camera[:3, 3] + [0, h / 2, 0]

    signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (0, 1)])
    edges = np.stack([heading, across, [0, -h, 0]])
    uvd = (bottom + signs * [l / 2, w / 2, 1] @ edges) @ K.T   # (8, 3)
    if (uvd[:, 2] < 0.5).any():
        return ""
    uv = uvd[:, :2] / uvd[:, 2:]
    whole = np.array([*uv.min(0), *uv.max(0)])
    box = np.clip(whole, 0, [*size, *size])
    if (box[2:] - box[:2] < 1).any():
        return ""
    truncated = 1 - np.prod(box[2:] - box[:2]) / np.prod(whole[2:] - whole[:2])
    occluded = 4 - label.visibility
    turn = np.arctan2(-heading[2], heading[0])
    alpha = turn - np.arctan2(bottom[0], bottom[2])
    numbers = [alpha, *box, h, w, l, *bottom, turn]
    text = " ".join(f"{number:.2f}" for number in numbers)
    return f"{KITTI_TYPE[label.kind]} {truncated:.2f} {occluded} {text}\n"


# ---- the same world in Waymo's layout -----------------------------------------------

WAYMO_TYPE = {
    "car": 1, "truck": 1, "bus": 1, "trailer": 1, "construction": 1, "motorcycle": 1,
    "pedestrian": 2,
    "bicycle": 4,
}
WAYMO_CLASS = {              # of lidar_segmentation; of other categories 0, undefined
    "vehicle.car": 1, "vehicle.truck": 2, "vehicle.bus.rigid": 3, "vehicle.trailer": 4,
    "vehicle.construction": 4, "vehicle.bicycle": 12, "vehicle.motorcycle": 13,
    "human.pedestrian.adult": 7, "human.pedestrian.child": 7,
    "human.pedestrian.construction_worker": 7, "human.pedestrian.police_officer": 7,
    "movable_object.trafficcone": 11, "static.manmade": 14, "static_object.bicycle_rack": 14,
    "static.vegetation": 15, "flat.driveable_surface": 18, "flat.terrain": 21,
    "flat.sidewalk": 22,
}
WAYMO_CAMERAS = {
    1: "CAM_FRONT",
    2: "CAM_FRONT_LEFT",
    3: "CAM_FRONT_RIGHT",
    4: "CAM_BACK_LEFT",
    5: "CAM_BACK_RIGHT",
}
WAYMO_FOLDERS = {"train": "training", "val": "validation"}
WAYMO_KEYS = {
    "segment": ("key.segment_context_name", "string"),
    "time": ("key.frame_timestamp_micros", "int64"),
    "laser": ("key.laser_name", "int8"),
    "camera": ("key.camera_name", "int8"),
    "object": ("key.laser_object_id", "string"),
}


class Component(NamedTuple):
    """A kind of parquet file: its keys, its columns and their types for arrow_type."""
    keys: str
    prefix: str                    # of the names of its columns
    columns: dict


WAYMO_COMPONENTS = {
    "lidar": Component("segment time laser", "[LiDARComponent].", {
        "range_image_return1.values": "floats",
        "range_image_return1.shape": "shape",
        "range_image_return2.values": "floats",
        "range_image_return2.shape": "shape",
    }),
    "lidar_segmentation": Component(
        "segment time laser", "[LiDARSegmentationLabelComponent].", {
            "range_image_return1.values": "ints",
            "range_image_return1.shape": "shape",
            "range_image_return2.values": "ints",
            "range_image_return2.shape": "shape",
        }),
    "lidar_pose": Component("segment time laser", "[LiDARPoseComponent].", {
        "range_image_return1.values": "floats",
        "range_image_return1.shape": "shape",
    }),
    "lidar_calibration": Component("segment laser", "[LiDARCalibrationComponent].", {
        "extrinsic.transform": "matrix",
        "beam_inclination.min": "double",
        "beam_inclination.max": "double",
        "beam_inclination.values": "doubles",
    }),
    "camera_image": Component("segment time camera", "[CameraImageComponent].", {
        "image": "binary",
        "pose.transform": "matrix",
    }),
    "camera_calibration": Component("segment camera", "[CameraCalibrationComponent].", {
        "intrinsic.f_u": "double", "intrinsic.f_v": "double",
        "intrinsic.c_u": "double", "intrinsic.c_v": "double",
        "intrinsic.k1": "double", "intrinsic.k2": "double",
        "intrinsic.p1": "double", "intrinsic.p2": "double",
        "intrinsic.k3": "double",
        "extrinsic.transform": "matrix",
        "width": "int32",
        "height": "int32",
    }),
    "vehicle_pose": Component("segment time", "[VehiclePoseComponent].", {
        "world_from_vehicle.transform": "matrix",
    }),
    "lidar_box": Component("segment time object", "[LiDARBoxComponent].", {
        "box.center.x": "double", "box.center.y": "double", "box.center.z": "double",
        "box.size.x": "double", "box.size.y": "double", "box.size.z": "double",
        "box.heading": "double",
        "speed.x": "double",
        "speed.y": "double",
        "type": "int8",
        "num_lidar_points_in_box": "int64",
        "difficulty_level.detection": "int8",
    }),
}


def to_waymo(source, root, beams, azimuths):
    """<split>/<component>/<segment>.parquet, one segment a scene.

    The LiDAR is TOP. The vehicle's axes are turned a little, so that the columns have
    their middles on the rays. The pictures of five cameras keep their pixels and have
    no lens error.
    """
    segments = {}
    for frame in Tables(source).keyframes():
        segments.setdefault((frame.split, frame.scene), []).append(frame)
    for (split, name), frames in segments.items():
        rows = Segment(name, frames[0], beams, azimuths).record(frames)
        for tag, component in WAYMO_COMPONENTS.items():
            path = root / WAYMO_FOLDERS[split] / tag / f"{name}.parquet"
            write_parquet(path, component, rows[tag])


class Segment:
    """The rows of one segment's components."""

    def __init__(self, name, first, beams, azimuths):
        self.name = name
        self.beams = beams
        self.azimuths = azimuths
        self.rows = {tag: [] for tag in WAYMO_COMPONENTS}
        mounting = np.radians(148)
        mount = first.lidar2ego @ FORWARD2LIDAR @ pose((0, 0, 0), mounting)
        half_column = np.pi / azimuths
        turn = np.arctan2(mount[1, 0], mount[0, 0]) - mounting - half_column
        self.vehicle2ego = pose((0, 0, 0), turn)
        ego2vehicle = np.linalg.inv(self.vehicle2ego)
        self.add_calibrations(first, ego2vehicle, ego2vehicle @ mount)

    def add(self, tag, *values):
        self.rows[tag].append((self.name, *values))

    def add_calibrations(self, first, ego2vehicle, top2vehicle):
        elevations = beam_elevations(self.beams)
        self.add("lidar_calibration", 1, top2vehicle.ravel(),
                 elevations[0], elevations[-1], elevations)
        # a camera's x right, y down, z forward -> x out of the lens, y left, z up
        upright = rigid(CAMERA_AXES, (0, 0, 0))
        lens = (0.,) * 5                             # k1, k2, p1, p2, k3
        for number, channel in WAYMO_CAMERAS.items():
            picture = first.pictures[channel]
            K = picture.K
            intrinsic = (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
            extrinsic = ego2vehicle @ picture.camera2ego @ upright.T
            width, height = Image.open(picture.file).size
            self.add("camera_calibration", number, *intrinsic, *lens,
                     extrinsic.ravel(), width, height)

    def record(self, frames):
        """Add all frames. -> rows {component: [row]}"""
        for frame in frames:
            vehicle2world = frame.ego2world @ self.vehicle2ego
            self.add_sweep(frame, vehicle2world)
            self.add("vehicle_pose", frame.time, vehicle2world.ravel())
            for number, channel in WAYMO_CAMERAS.items():
                picture = frame.pictures[channel]
                pose_then = picture.ego2world @ self.vehicle2ego
                self.add("camera_image", frame.time, number, picture.file.read_bytes(),
                         pose_then.ravel())
            self.add_boxes(frame, np.linalg.inv(vehicle2world))
        return self.rows

    def add_sweep(self, frame, vehicle2world):
        row, column = self.pixels(frame.points.astype(np.float64))
        image = self.range_image(frame.points.astype(np.float64), row, column)
        classes = np.array([WAYMO_CLASS.get(name, 0) for name in CATEGORIES], np.int32)
        labels = np.zeros((self.beams, self.azimuths, 2), np.int32)  # instance, class
        labels[row, column, 1] = classes[frame.categories]
        self.add("lidar_segmentation", frame.time, 1, labels.ravel(), labels.shape,
                 np.zeros_like(labels).ravel(), labels.shape)
        no_second_return = np.full(image.size, -1, np.float32)
        self.add("lidar", frame.time, 1, image.ravel(), image.shape,
                 no_second_return, image.shape)
        angles = Rotation.from_matrix(vehicle2world[:3, :3]).as_euler("xyz")
        pixel = np.concatenate([angles, vehicle2world[:3, 3]]).astype(np.float32)
        poses = np.tile(pixel, (self.beams, self.azimuths, 1))
        self.add("lidar_pose", frame.time, 1, poses.ravel(), poses.shape)

    def pixels(self, points):
        """Row and column (N,) of points (N, 5) in the range image."""
        row = self.beams - 1 - points[:, 4].astype(int)
        azimuth = np.arctan2(-points[:, 0], points[:, 1])      # from ahead to the left
        step = 2 * np.pi / self.azimuths
        # Middles are at pi - (k + 1/2) steps; the vehicle is turned by half a step.
        column = (np.round((np.pi - azimuth) / step).astype(int) - 1) % self.azimuths
        return row, column

    def range_image(self, points, row, column):
        """(N, 5) -> (beams, azimuths, 4) float32: range, intensity, elongation, -1."""
        image = np.full((self.beams, self.azimuths, 4), -1, np.float32)
        image[..., 1:3] = 0
        image[row, column, 0] = np.linalg.norm(points[:, :3], axis=1)
        image[row, column, 1] = np.arctanh(np.clip(points[:, 3] / 255, 0, 0.999))
        return image

    def add_boxes(self, frame, world2vehicle):
        rotation = world2vehicle[:3, :3]
        for label in frame.labels:
            if label.kind not in WAYMO_TYPE:
                continue
            centre = rotation @ label.centre + world2vehicle[:3, 3]
            ahead = rotation @ [np.cos(label.yaw), np.sin(label.yaw), 0]
            heading = np.arctan2(ahead[1], ahead[0])
            kind = WAYMO_TYPE[label.kind]
            unmarked = 0                             # the detection difficulty
            self.add("lidar_box", frame.time, label.instance, *centre, *label.size,
                     heading, *label.velocity[:2], kind, label.points, unmarked)


def arrow_type(name):
    import pyarrow as pa
    composed = {
        "floats": pa.list_(pa.float32()),
        "doubles": pa.list_(pa.float64()),
        "ints": pa.list_(pa.int32()),
        "shape": pa.list_(pa.int32(), 3),
        "matrix": pa.list_(pa.float64(), 16),
    }
    return composed[name] if name in composed else pa.type_for_alias(name)


def write_parquet(path, component, rows):
    """Rows of a component's keys and columns, in their order."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    columns = [WAYMO_KEYS[key] for key in component.keys.split()]
    for name, kind in component.columns.items():
        columns.append((component.prefix + name, kind))
    table = {}
    for n, (name, kind) in enumerate(columns):
        values = [row[n] for row in rows]
        values = [v.tolist() if isinstance(v, np.ndarray) else v for v in values]
        table[name] = pa.array(values, arrow_type(kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(table), path, row_group_size=8)


# ---- the whole world ----------------------------------------------------------------

ALONE = 16               # frames; fewer are written without child processes
CHILDREN = 2


def write(root, *, seed=0, train=24, val=8, frames=8, beams=32, azimuths=360,
          image=(96, 256), format="nuscenes"):
    """Write the world in the layout of nuScenes, or of format "kitti" or "waymo".

    The nuScenes layout is root/v1.0-embedded with 13 tables and splits.json,
    root/samples and root/maps. train and val count scenes, frames a scene's keyframes.

    The folder appears whole: it is written next to its place and renamed. Of two
    writers the second discards its own. Two children that run this file share the
    scenes, so nothing of the caller's is forked or imported twice. A writer that is
    killed takes its children and its folder with it. Raises FileExistsError where root
    holds anything.
    """
    root = Path(root).absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not empty; the embedded world "
                              "goes into a new folder: name another or remove this one")
    root.parent.mkdir(parents=True, exist_ok=True)
    # data.locked removes it in case that nobody here can
    staging = root.with_name(f".{root.name}-{secrets.token_hex(8)}")
    job = dict(parts=CHILDREN, seed=seed, scenes=train + val, frames=frames,
               beams=beams, azimuths=azimuths, image=tuple(image))
    with removed_at_the_end(staging):
        samples = [f"samples/{channel}" for channel in ("LIDAR_TOP", *CAMERAS)]
        samples.append(f"lidarseg/{TABLES}")
        for folder in ("maps", "rows", TABLES, *samples):
            (staging / folder).mkdir(parents=True)
        write_scenes(staging, root, job)
        write_tables(staging, seed, train)
        shutil.rmtree(staging / "rows")
        publish(convert(staging, format, beams, azimuths), root)


@contextmanager
def removed_at_the_end(folder):
    """Remove `folder` however this ends, SIGTERM and SIGHUP included.

    They are raised as SystemExit meanwhile, unless the caller handles them, and end the
    process once more afterwards.
    """
    received = []

    def leave(number, _):
        received.append(number)
        raise SystemExit(128 + number)

    caught = []
    if threading.current_thread() is threading.main_thread():
        caught = [number for number in (signal.SIGTERM, signal.SIGHUP)
                  if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in caught:
            signal.signal(number, leave)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        for number in received:
            signal.raise_signal(number)


def write_scenes(staging, root, job):
    """Write all scenes, with two children if they are many; errors name root."""
    children = []
    try:
        if job["scenes"] * job["frames"] < ALONE:
            write_part(staging, part=0, **{**job, "parts": 1})
        else:
            for part in range(CHILDREN):
                children.append(start_child(staging, dict(job, part=part)))
        wait_for(children, staging / "rows", job["scenes"])
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
                child.wait()
            child.stdin.close()
    codes = [child.returncode for child in children]
    if any(codes):
        raise RuntimeError(f"{root}: the writing processes ended with exit codes "
                           f"{codes}, expected 0; the message of the one that failed "
                           "is above")


def start_child(staging, job):
    """This file in a process of its own, which runs write_part.

    Its stdin is a pipe that nobody writes to: it closes when this process ends.
    """
    command = [sys.executable, __file__, str(staging), "--job", json.dumps(job)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdin=subprocess.PIPE)


def end_with_parent(staging):
    """End this child when its parent has ended, however that was, and remove their folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is for the parent

    def watch():
        os.read(0, 1)
        shutil.rmtree(staging, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def wait_for(children, folder, scenes):
    """Show how many of the scenes are done, until all children have ended."""
    text = "writing the embedded world"
    with tqdm(total=scenes, unit="scene", desc=text, disable=None) as bar:
        while any(child.poll() is None for child in children):
            clock.sleep(.1)
            done = len(list(folder.glob("*.json")))
            bar.update(done - bar.n)


def write_part(root, part, parts, seed, scenes, frames, beams, azimuths, image):
    """Every parts-th scene from `part` on; their rows wait in root/rows."""
    for index in range(part, scenes, parts):
        rows = Recorder(root, seed, index, frames, beams, azimuths, image).record()
        waiting = root / "rows" / f"{index:04d}.part"
        waiting.write_text(json.dumps(rows))
        waiting.rename(waiting.with_suffix(".json"))


def convert(staging, format, beams, azimuths):
    """The folder of the world in the layout that was asked for."""
    if format == "nuscenes":
        return staging
    converted = staging / "converted"
    converted.mkdir()
    if format == "kitti":
        to_kitti(staging, converted)
    else:
        to_waymo(staging, converted, beams, azimuths)
    return converted


def publish(folder, root):
    """Rename a finished folder to root, unless another writer was faster."""
    try:
        folder.rename(root)
    except OSError:
        if not any(root.iterdir()):                  # no other writer filled it
            raise


def count(text):
    """A number that is not negative, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"is {number}, expected 0 or more")
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="a new folder")
    parser.add_argument("--seed", type=count, default=0)
    parser.add_argument("--train", type=count, default=24, help="scenes to train on")
    parser.add_argument("--val", type=count, default=8, help="scenes of the val split")
    parser.add_argument("--frames", type=count, default=8, help="keyframes of each scene")
    parser.add_argument("--format", choices=("nuscenes", "kitti", "waymo"),
                        default="nuscenes", help="layout on disk")
    # what write asks of a child
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    job = options.pop("job")
    if job:
        end_with_parent(options["root"])
        return write_part(options["root"], **job)
    if not (options["train"] + options["val"] and options["frames"]):
        parser.error(f"--train {options['train']} --val {options['val']} --frames "
                     f"{options['frames']} leave nothing to write: give at least one scene and "
                     "one frame")
    try:
        write(**options)
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
