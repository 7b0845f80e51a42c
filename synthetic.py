"""The embedded world: procedural streets written as a nuScenes folder, so that every command here runs without a download.

    python synthetic.py ROOT                   # 24 + 8 scenes of 8 keyframes: about two minutes on two cores, 71 MB
    python synthetic.py ROOT --format waymo    # the same world in Waymo's layout, or KITTI's (front camera only)

It is a demonstration and a test bench, never evidence for the papers' numbers. Every modelling number in this file is [ours].

    things     what stands or moves in a street, built of solids: affine images of a cube, a frustum or a ball
    compose    a scene: a straight or bent road, light of day, things that move along it, the ego vehicle's path; pure in (seed, index)
    cast       rays against solids: the nearest hit, culled by the rays that each solid can cover; LiDAR, cameras and sun all use it
    sweep      32 beams by 360 azimuths with noise, drop-outs and intensity;  render: texture, sun and its shadows, sky, haze
    write      the thirteen tables, .pcd.bin, .jpg and splits.json, version v1.0-embedded; same arguments, same bytes

Frames: a thing's own (x forward, y left, z up, z = 0 where it stands); the scene's plane (x along the road at s = 0, z up), where all
is computed; the global frame, entered only when poses and boxes are written. Road coordinates are s (along the centre line) and l (to its
left). Rotations are (3, 3) with local axes as columns; a2b (4, 4) maps a to b. Metres, radians, seconds; nuScenes' microseconds on disk.
Each sensor sees the world at its own time stamp; within one sweep or image nothing moves. Shadows are those of the sweep's moment in all pictures of a frame.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time as clock
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

ALONE = 16          # frames; fewer are written without children
VERSION = 1
TABLES = "v1.0-embedded"
CUBE, FRUSTUM, BALL = 0, 1, 2                                              # kinds of solids
PLAIN, WINDOWS, LEAVES, STRIPES, PANES, RIBS, BANDS = range(7)             # textures
NOTHING, GROUND = -1, -2                                                   # ids of rays that hit no solid
CAMERAS = {                                                                # yaw (degrees, to the left), horizontal field of view (degrees),
    "CAM_FRONT": (0, 68, (1.70, 0.00, 1.51), -34_300),                     # mount in the ego frame, microseconds from sweep to picture
    "CAM_FRONT_RIGHT": (-55, 68, (1.55, -0.49, 1.50), -26_200),
    "CAM_BACK_RIGHT": (-110, 68, (1.02, -0.48, 1.56), -18_500),
    "CAM_BACK": (180, 100, (0.03, 0.00, 1.58), -9_200),
    "CAM_BACK_LEFT": (110, 68, (1.04, 0.48, 1.59), 700),
    "CAM_FRONT_LEFT": (55, 68, (1.52, 0.49, 1.51), -42_100)}
LIDAR_MOUNT, REACH, LABEL_REACH = (0.94, 0.0, 1.84), 70.0, 60.0
HALF_ROAD, WALK = 6.5, 4.0                                                 # half the road's width, the pavement's width
PERIOD = 500_000                                                           # microseconds between keyframes


# ---- solids and things -------------------------------------------------------------------------------------------------------------------

class Solid(NamedTuple):
    """A cube [-1, 1]^3, a frustum of radius 1 and height 2, or a unit ball; scaled by `half`, turned by `axes`, moved to `centre`."""
    kind: int
    centre: tuple
    half: tuple
    colour: tuple                             # linear albedo
    texture: int = PLAIN
    taper: float = 0.0                        # a frustum's radius, or a cube's x and y, is 1 - taper at z = +1
    shine: float = 0.4                        # LiDAR reflectance, 0..1
    axes: np.ndarray = np.eye(3)


@dataclass
class Thing:
    """Something with a box: what it is made of and how it moves. At time t it is at (s + vs t, l + vl t) in road coordinates."""
    category: str                             # "" is clutter: drawn, never labelled
    size: tuple                               # w, l, h; every solid of a labelled thing lies inside
    solids: list
    attribute: str = ""
    s: float = 0.0
    l: float = 0.0
    vs: float = 0.0                           # along the centre line: the speed is vs (1 - curve l)
    vl: float = 0.0
    turn: float = 0.0                         # heading against the road's


def block(x, y, z, colour, texture=PLAIN, taper=0.0, shine=0.4, kind=CUBE):
    """A solid from its extents: x, y, z = (from, to)."""
    lo, hi = np.array([x, y, z], float).T
    return Solid(kind, tuple((lo + hi) / 2), tuple((hi - lo) / 2), colour, texture, taper, shine)


def pillar(radius, z, colour, *, x=0.0, y=0.0, texture=PLAIN, taper=0.0, shine=0.4, kind=FRUSTUM):
    return block((x - radius, x + radius), (y - radius, y + radius), z, colour, texture, taper, shine, kind)


def beam(centre, half, angle, colour):
    """A cube pitched by `angle`."""
    return Solid(CUBE, centre, half, colour, axes=Rotation.from_euler("y", angle).as_matrix())


def wheel(x, y, radius, width):
    return Solid(FRUSTUM, (x, y, radius), (radius, radius, width / 2), RUBBER, shine=.1, axes=SIDEWAYS)


def wheels(at, across, radius, width):
    return [wheel(x, y, radius, width) for x in at for y in (-across + width / 2, across - width / 2)]


def person(height, shirt, trousers, x=0.0, base=0.0, seated=False):
    """A pedestrian or a rider, about 0.5 m wide, from z = base to base + height."""
    head, hips, neck = .13 * height / 1.75, base + .48 * height, base + .85 * height
    legs = [] if seated else [pillar(.09, (base, hips), trousers, x=x, y=y) for y in (-.11, .11)]
    torso = block((x - .15, x + .15), (-.26, .26), (hips - .05, neck), shirt, taper=.15, shine=.5, kind=FRUSTUM)
    return [*legs, torso, pillar(head, (base + height - 2 * head, base + height), SKIN, x=x, kind=BALL)]


SIDEWAYS = Rotation.from_euler("x", 90, degrees=True).as_matrix()          # local z lies across
PAINTS = [(.75, .75, .76), (.05, .05, .06), (.35, .36, .38), (.5, .04, .04), (.05, .12, .4), (.85, .85, .83), (.1, .25, .12), (.45, .4, .3)]
CLOTHES = [(.55, .08, .08), (.08, .12, .35), (.1, .1, .1), (.6, .6, .58), (.1, .3, .15), (.5, .4, .1), (.35, .15, .35)]
TROUSERS = [(.05, .06, .15), (.04, .04, .04), (.25, .22, .18)]
LOADS = [(.8, .8, .8), (.6, .6, .62), (.7, .68, .6), (.2, .3, .5)]
SIGNS = [(.6, .03, .03), (.04, .15, .5), (.8, .65, .05)]
BINS = [(.05, .25, .08), (.05, .1, .3), (.15, .15, .15)]
WALLS = [(.45, .3, .22), (.6, .55, .45), (.5, .5, .5), (.62, .45, .3), (.35, .2, .16), (.7, .68, .62)]
GLASS, RUBBER, STEEL, LAMP, REAR, SKIN = (.03, .04, .05), (.02, .02, .02), (.3, .3, .32), (.9, .9, .8), (.5, .02, .02), (.55, .36, .26)


def any_of(rng, colours):
    return colours[rng.integers(len(colours))]


def car(rng):
    w, l, h = rng.uniform(1.75, 1.95), rng.uniform(4.0, 4.9), rng.uniform(1.42, 1.78)
    paint, a, b, waist = any_of(rng, PAINTS), l / 2, w / 2 - .03, .52 * h
    rear = -a + (.06 if rng.random() < .5 else .16) * l                    # estate or saloon
    return Thing("vehicle.car", (w, l, h), [
        block((-a + .03, a - .03), (-b, b), (.28, waist), paint),
        block((rear, .26 * l), (-b + .05, b - .05), (waist, h - .05), GLASS, PANES, .22, .15),
        block((.89 * rear + .03 * l, .235 * l + .1 * rear), (-.76 * b, .76 * b), (h - .09, h - .02), paint),
        *wheels((-.3 * l, .31 * l), b + .02, .33, .22),
        *[block((a - .05, a - .01), (y - .17, y + .17), (.55, .7), LAMP, shine=.9) for y in (-.6 * b, .6 * b)],
        *[block((-a + .01, -a + .05), (y - .17, y + .17), (.6, .76), REAR, shine=.9) for y in (-.65 * b, .65 * b)]])


def truck(rng):
    w, l, h = rng.uniform(2.2, 2.5), rng.uniform(6.2, 8.5), rng.uniform(2.7, 3.4)
    paint, a, b = any_of(rng, PAINTS), l / 2, w / 2 - .03
    return Thing("vehicle.truck", (w, l, h), [
        block((a - 1.9, a - .05), (-b, b), (.5, .72 * h), paint, taper=.06),
        block((a - 1.3, a - .03), (-b + .15, b - .15), (.42 * h, .66 * h), GLASS, shine=.15),
        block((-a + .05, a - 2.1), (-b, b), (.95, h - .03), any_of(rng, LOADS), RIBS),
        block((-a + .1, a - .4), (-b + .5, b - .5), (.5, .95), STEEL),
        block((-a + .01, -a + .05), (-b + .1, b - .1), (.8, .92), REAR, shine=.9),
        *wheels((-.32 * l, -.18 * l, .33 * l), b, .45, .3)])


def bus(rng):
    w, l, h = rng.uniform(2.5, 2.65), rng.uniform(10, 11.8), rng.uniform(3.1, 3.5)
    paint, a, b = any_of(rng, PAINTS[3:5] + SIGNS + BINS[:1]), l / 2, w / 2 - .04
    return Thing("vehicle.bus.rigid", (w, l, h), [
        block((-a + .03, a - .03), (-b, b), (.35, h - .03), paint),
        block((-a + .02, a - .02), (-b - .02, b + .02), (.42 * h, .78 * h), GLASS, PANES, shine=.15),
        block((a - .03, a - .01), (-b + .2, b - .2), (.85, 1.05), LAMP, shine=.9),
        *wheels((-.28 * l, .3 * l), b + .03, .48, .3)])


def trailer(rng):
    """A bus by shape, not by looks."""
    w, l, h = rng.uniform(2.5, 2.65), rng.uniform(10, 11.8), rng.uniform(3.1, 3.5)
    a, b = l / 2, w / 2 - .04
    return Thing("vehicle.trailer", (w, l, h), [
        block((-a + .03, a - .03), (-b, b), (.35, h - .03), any_of(rng, LOADS[:3]), RIBS),
        block((-a + .01, -a + .03), (-b + .2, b - .2), (.6, .8), REAR, shine=.9),
        *wheels((-.38 * l, -.28 * l), b + .03, .48, .3)])


def digger(rng):
    w, l, h, paint = 2.5, rng.uniform(6.2, 7.4), rng.uniform(3.0, 3.4), (.8, .45, .02)
    a = l / 2
    return Thing("vehicle.construction", (w, l, h), [
        *[block((-a + .1, a - 3.1), (y - .28, y + .28), (0, .8), RUBBER, shine=.15) for y in (-.92, .92)],
        block((-a + .03, a - 3.2), (-1.1, 1.1), (.8, 1.7), paint),
        block((-a + 1.2, a - 3.3), (-.05, 1.05), (1.7, h - .05), GLASS, PANES, .1, .2),
        block((-a + .1, -a + 1.0), (-1., 1.), (1.7, 2.1), (.1, .1, .1)),
        beam((a - 2.5, -.4, 2.15), (1.05, .17, .2), -.75, paint), beam((a - 1.1, -.4, 1.95), (.95, .14, .17), .95, paint),
        block((a - 1.0, a - .1), (-.9, .1), (.25, .95), STEEL, taper=.2)])


def barrier(rng):
    w, l, h = rng.uniform(1.9, 2.4), rng.uniform(.45, .6), rng.uniform(.9, 1.1)
    return Thing("movable_object.barrier", (w, l, h), [
        block((-.06, .06), (-w / 2 + .02, w / 2 - .02), (.3 * h, h - .02), (.6, .04, .03), STRIPES, shine=.7),
        *[block((-l / 2 + .02, l / 2 - .02), (y - .08, y + .08), (0, .3 * h), STEEL, taper=.3) for y in (-.35 * w, .35 * w)]])


def motorcycle(rng, ridden=False):
    l, h, paint = rng.uniform(2.0, 2.25), 1.7 if ridden else 1.2, any_of(rng, PAINTS[3:])
    rider = person(1.05, any_of(rng, CLOTHES), RUBBER, -.1, .63, seated=True)
    return Thing("vehicle.motorcycle", (.8, l, h), [
        wheel(-l / 2 + .35, 0, .32, .18), wheel(l / 2 - .35, 0, .32, .18),
        block((-.35 * l, .3 * l), (-.17, .17), (.38, .82), paint, taper=.2),
        block((.22 * l, .27 * l), (-.36, .36), (.95, 1.03), RUBBER),
        block((.24 * l, .34 * l), (-.12, .12), (.7, 1.1), LAMP, shine=.8),
        *(rider if ridden else [])], "cycle.with_rider" if ridden else "cycle.without_rider")


def bicycle(rng, ridden=False):
    l, h, paint = rng.uniform(1.65, 1.85), 1.75 if ridden else 1.1, any_of(rng, PAINTS[3:])
    rider = [*person(1.0, any_of(rng, CLOTHES), RUBBER, -.08, .73, seated=True), pillar(.12, (.5, 1.2), TROUSERS[0])]
    return Thing("vehicle.bicycle", (.65, l, h), [
        wheel(-l / 2 + .37, 0, .34, .05), wheel(l / 2 - .37, 0, .34, .05), beam((0, 0, .58), (.42, .025, .05), -.25, paint),
        block((.3 * l, .33 * l), (-.03, .03), (.4, 1.0), paint), block((.3 * l, .33 * l), (-.28, .28), (.98, 1.04), STEEL),
        block((-.22, -.02), (-.1, .1), (.85, .92), RUBBER),
        *(rider if ridden else [])], "cycle.with_rider" if ridden else "cycle.without_rider")


def pedestrian(rng, kind="adult"):
    h = rng.uniform(1.05, 1.35) if kind == "child" else rng.uniform(1.58, 1.88)
    shirt = {"construction_worker": (.9, .4, .02), "police_officer": (.03, .05, .2)}.get(kind, any_of(rng, CLOTHES))
    return Thing(f"human.pedestrian.{kind}", (.66, .6, h + .03), person(h, shirt, any_of(rng, TROUSERS)), "pedestrian.standing")


def cone(rng):
    h = rng.uniform(.65, .9)
    return Thing("movable_object.trafficcone", (.4, .4, h), [
        pillar(.19, (0, .06), (.06, .06, .06), kind=CUBE), pillar(.15, (.06, h - .02), (.95, .25, .02), texture=BANDS, taper=.8, shine=.8)])


def wheelie_bin(rng):
    colour = any_of(rng, BINS)
    return Thing("movable_object.pushable_pullable", (.62, .75, 1.1), [
        block((-.3, .3), (-.26, .26), (.08, 1.0), colour), block((-.34, .34), (-.29, .29), (1.0, 1.08), colour),
        *wheels((-.24,), .28, .1, .06)])


def clutter(rng):
    """Unlabelled things of object size: what shape alone, or colour alone, would take for one of the ten classes."""
    u = rng.uniform(.9, 1.1)
    wall = block((-.2, .2), (-u, u), (0, .95), (.4, .38, .35), RIBS)
    post_box = [pillar(.25, (0, 1.5 * u), any_of(rng, CLOTHES)), pillar(.27, (1.4 * u, 1.7 * u), RUBBER, kind=BALL)]
    bush = pillar(.8 * u, (-.3, 1.25 * u), (.08, .2, .05), texture=LEAVES, kind=BALL)
    container = block((-2.1 * u, 2.1 * u), (-.9, .9), (.05, 1.5), any_of(rng, WALLS + BINS), RIBS)
    sign = [pillar(.04, (0, 2.4), STEEL), block((-.09, -.05), (-.32, .32), (1.75, 2.4), any_of(rng, SIGNS), shine=1.)]
    size, solids = [                                                       # compare with
        ((2.1 * u, .5, 1.), [wall]), ((.6, .6, 1.7 * u), post_box),        # barrier, pedestrian
        ((1.9, 4.3 * u, 1.55), [container]),                               # car
        ((.55, .55, .6), [pillar(.25, (0, .55 * u), (.9, .3, .04), kind=CUBE)]),               # cone, by its orange
        ((.3, .3, .85), [pillar(.12, (0, .8 * u), STEEL)]),                                    # cone, by its size
        ((.5, 1.7, 1.), [block((x - .03, x + .03), (-.2, .2), (0, .9 * u), STEEL) for x in (-.7, -.25, .25, .7)]),     # bicycle: a rack
        ((1.7 * u, 1.7 * u, 1.3), [bush]), ((.7, .2, 2.5), sign),
    ][rng.integers(8)]
    return Thing("", size, solids)


def tree(rng):
    h, r = rng.uniform(5, 9), rng.uniform(1.3, 2.2)
    green = np.array([.07, .19, .04]) * rng.uniform(.7, 1.4) + np.array([.12, .05, 0]) * (rng.random() < .25)       # some in autumn
    trunk, three = pillar(.16, (0, h - r), (.16, .1, .06), taper=.3), rng.uniform(-.6, .6, (3, 3)) * r
    conifer = [pillar(r, (1.6, h), tuple(.7 * green), texture=LEAVES, taper=.95)]
    crown = [pillar(r, (h - 1.9 * r + z, h + z), tuple(green), x=x, y=y, texture=LEAVES, kind=BALL) for x, y, z in three]
    return Thing("", (1., 1., h), [trunk, *(conifer if rng.random() < .3 else crown)])


def lamp_post(rng):
    return Thing("", (.3, .3, 7.), [pillar(.09, (0, 7), STEEL, taper=.4), block((-.1, .1), (-1.6, .1), (6.9, 7.05), STEEL),
                                    block((-.15, .15), (-1.9, -1.2), (6.8, 6.95), (.7, .7, .65))])


# ---- a scene -----------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    """Solids at one instant, P rows in the scene's plane: Solid's fields, and whose each is, an index into Scene.things or -1."""
    kind: np.ndarray
    centre: np.ndarray                        # (P, 3)
    half: np.ndarray                          # (P, 3)
    colour: np.ndarray                        # (P, 3)
    texture: np.ndarray
    taper: np.ndarray
    shine: np.ndarray
    axes: np.ndarray                          # (P, 3, 3) local to plane
    owner: np.ndarray


@dataclass
class Scene:
    name: str
    curve: float                              # 1/m, left positive, never 0
    crossing: float                           # s where another road crosses
    speed: float                              # of the ego vehicle
    phase: float                              # of its weaving in the lane
    plane2world: np.ndarray                   # (4, 4) float64
    light: dict                               # sun (3,), the direction to it; sunlight, skylight, zenith, horizon (3,) linear colours
    things: list = field(default_factory=list)
    solids: World = None                      # of the scenery in the plane, of things each in its own frame


def pose(xyz, yaw):
    m = np.eye(4)
    m[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    m[:3, 3] = xyz
    return m


def to_plane(curve, s, l):
    """Road coordinates -> x, y and the road's heading there."""
    angle = curve * s
    return (1 / curve - l) * np.sin(angle), 1 / curve - (1 / curve - l) * np.cos(angle), angle


def to_road(curve, x, y):
    """x, y -> s, l: the inverse of to_plane."""
    return np.arctan2(curve * x, 1 - curve * y) / curve, (1 - np.hypot(curve * x, 1 - curve * y)) / curve


def ego2plane(scene, t):
    """Where the ego vehicle's rear axle is at time t: (4, 4)."""
    wave = 2 * np.pi / 7
    x, y, heading = to_plane(scene.curve, scene.speed * t, -1.75 + .25 * np.sin(wave * t + scene.phase))
    return pose((x, y, 0), heading + np.arctan2(.25 * wave * np.cos(wave * t + scene.phase), scene.speed))


def thing2plane(scene, thing, t):
    """Where a thing is at time t: (4, 4). It stands 3 cm above the road, so that its box holds no ground."""
    x, y, heading = to_plane(scene.curve, thing.s + thing.vs * t, thing.l + thing.vl * t)
    return pose((x, y, .03), heading + thing.turn)


def stack(solids, owner):
    """Solids as a World."""
    columns = [np.array(column) if i in (0, 4) else np.array(column, float) for i, column in enumerate(zip(*solids))]
    return World(*columns, np.array(owner))


def world_at(scene, t):
    """Everything in the scene at time t, moved into the plane."""
    w = scene.solids
    moves = np.array([np.eye(4)] + [thing2plane(scene, thing, t) for thing in scene.things])[w.owner + 1]           # (P, 4, 4)
    turn = moves[:, :3, :3]
    return replace(w, centre=np.einsum("pij,pj->pi", turn, w.centre) + moves[:, :3, 3], axes=turn @ w.axes)


def light_of_day(rng):
    """Noon, evening, overcast or dusk, each a little different."""
    sun, sky, zenith, horizon, heights = [
        ((1.9, 1.8, 1.65), (.45, .52, .65), (.12, .28, .62), (.60, .70, .80), (40, 65)),
        ((1.9, 1.35, .8), (.4, .42, .5), (.2, .32, .55), (.85, .66, .48), (14, 25)),
        ((.25, .25, .25), (.85, .88, .92), (.55, .58, .62), (.72, .74, .76), (40, 65)),
        ((.5, .3, .2), (.22, .25, .36), (.06, .09, .22), (.45, .3, .28), (8, 14))][rng.choice(4, p=[.4, .25, .2, .15])]
    up, around, gain = np.radians(rng.uniform(*heights)), rng.uniform(0, 2 * np.pi), rng.uniform(.85, 1.15)
    light = {"sunlight": sun, "skylight": sky, "zenith": zenith, "horizon": horizon}
    return {"sun": np.array([np.cos(around) * np.cos(up), np.sin(around) * np.cos(up), np.sin(up)]),
            **{name: gain * np.array(colour) for name, colour in light.items()}}


def put(scene, taken, times, thing, s, l, vs=0.0, vl=0.0, turn=0.0, gap=.35):
    """Place a thing unless it would meet another at one of `times`, and say whether it stands; turn counts only for what does not move.

    taken: list of (s (T,), l (T,), half length, half width) in road coordinates, extended here
    """
    across = abs(np.cos(turn)) < .7
    long, wide = (size / 2 + gap for size in (thing.size if across else thing.size[1::-1])[:2])
    here = s + vs * times, l + vl * times, long, wide
    if any(np.any((abs(here[0] - o[0]) < long + o[2]) & (abs(here[1] - o[1]) < wide + o[3])) for o in taken):
        return False
    taken.append(here)
    moves = bool(vs or vl)
    thing.s, thing.l, thing.vs, thing.vl, thing.turn = s, l, vs, vl, np.arctan2(vl, vs * (1 - scene.curve * l)) if moves else turn
    if thing.category.startswith("human") and moves:
        thing.attribute = "pedestrian.moving"
    if thing.category.startswith("vehicle") and not thing.attribute:
        thing.attribute = "vehicle.moving" if moves else "vehicle.parked"
    scene.things.append(thing)
    return True


def compose(seed, index, frames=8):
    """Scene number `index` of world `seed`: road, light, houses, trees, clutter, things of the ten classes and their motion."""
    rng = np.random.default_rng((seed, index))
    scene = Scene(name=f"embedded-{index:04d}", curve=rng.choice([1e-5, rng.uniform(1 / 350, 1 / 130)], p=[.4, .6]) * rng.choice([-1, 1]),
                  crossing=rng.uniform(25, 60) if rng.random() < .5 else 1e3, speed=rng.uniform(3, 10), phase=rng.uniform(0, 2 * np.pi),
                  plane2world=pose([*rng.uniform(300, 1500, 2), 0], rng.uniform(-np.pi, np.pi)), light=light_of_day(rng))
    instants = max(12, 3 * frames // 2)                                                        # at which nothing may touch another thing
    times, end = np.linspace(-.1, .5 * frames, instants), scene.speed * .5 * frames            # the ego's way is from s = 0 to `end`
    taken = [(scene.speed * times + 1.3, np.full(instants, -1.75), 2.9, 1.3)]                  # the ego vehicle itself

    # 1 where things may be, as s, l, vs, vl, turn
    def parking():
        q = rng.choice([-1, 1])                                            # side of the road; traffic keeps to the right
        return rng.uniform(-25, end + 30), q * rng.uniform(4.9, 5.1), 0, 0, 0 if q < 0 else np.pi

    def driving():
        if rng.random() < .6:
            return rng.uniform(-30, end + 60), 1.75, -rng.uniform(3, 10), 0, 0
        return rng.choice([-1, 1], p=[.3, .7]) * rng.uniform(11, 40), -1.75, scene.speed * rng.uniform(.8, 1.1), 0, 0

    def cycling():
        q = rng.choice([-1, 1])
        return rng.uniform(-10, end + 25), 3.35 * q, -q * rng.uniform(2.5, 5), 0, 0

    def walking():
        pace = rng.choice([-1, 0, 1], p=[.35, .3, .35]) * rng.uniform(.7, 1.7)
        return rng.uniform(-15, end + 20), rng.choice([-1, 1]) * rng.uniform(7.2, 9.8), pace, 0, rng.uniform(-3, 3)

    def crossing():
        q = rng.choice([-1, 1])
        return rng.uniform(14, end + 25), q * rng.uniform(2, 7), 0, -q * rng.uniform(.8, 1.6), 0

    def kerb():
        return rng.uniform(0, end + 20), rng.choice([-1, 1]) * rng.uniform(6, 7), 0, 0, 0

    def pavement():
        turn = rng.choice([0, np.pi / 2, np.pi]) + rng.normal(0, .08)
        return rng.uniform(-20, end + 25), rng.choice([-1, 1]) * rng.uniform(7.1, 10), 0, 0, turn

    def some(make, number, spot, gap=.35, **options):
        for _ in range(number):
            thing = make(rng, **options)
            any(put(scene, taken, times, thing, *spot(), gap=gap) for _ in range(30))          # up to 30 tries

    # 2 road works: a digger between barriers and cones; each rare class is in three scenes of four, and in others by chance
    rare = [int((index + k) % 4 != 0 or rng.random() < .5) for k in range(4)]
    side, start = rng.choice([-1, 1]), rng.uniform(4, end + 6)
    if rare[0]:
        put(scene, taken, times, digger(rng), start + 7, side * 4.9, turn=rng.choice([0, np.pi]) + rng.normal(0, .1))
    for k in range(rng.integers(2, 6) * rare[1]):
        put(scene, taken, times, barrier(rng), start + 2.6 * k, side * 3.35, turn=np.pi / 2 + rng.normal(0, .08), gap=.01)
    for k in range(rng.integers(3, 7) * rare[2]):
        put(scene, taken, times, cone(rng), start - 3 + 2.6 * k, side * 2.95 + .1 * rng.normal(), gap=.02)

    # 3 the rest, long things first
    some(trailer, rng.integers(1, 3) * rare[3], parking)
    some(bus, rng.integers(1, 3) * rare[0], driving if rng.random() < .7 else parking)
    some(truck, 1, parking)
    some(truck, rng.integers(0, 2), driving)
    some(motorcycle, rng.integers(0, 2) + rare[1], driving, ridden=True)
    some(motorcycle, rng.integers(0, 2), pavement)
    some(bicycle, rng.integers(0, 2) + rare[2], cycling, .1, ridden=True)
    some(bicycle, rng.integers(1, 3), pavement)
    some(car, rng.integers(2, 5), driving)
    some(car, rng.integers(5, 10), parking)
    some(pedestrian, rng.integers(3, 7), walking, .1)
    for kind in rng.choice(["adult", "child", "construction_worker", "police_officer"], 3):
        some(pedestrian, 1, walking, .1, kind=kind)
    some(pedestrian, rng.integers(0, 3), crossing, .1)
    some(cone, rng.integers(1, 4), kerb)
    some(barrier, rng.integers(0, 2), pavement)
    some(wheelie_bin, rng.integers(0, 3), pavement)
    some(clutter, rng.integers(10, 16), pavement)
    for s in np.arange(-60, 115, 9.0):
        for q in (-1, 1):
            if rng.random() < .65:
                make = tree if rng.random() < .6 else lamp_post
                put(scene, taken, times, make(rng), s + rng.uniform(-2, 2), q * 7.1, turn=0 if q > 0 else np.pi)

    rows = [(solid, -1) for solid in houses_and_kerbs(scene, rng)]
    rows += [(solid, i) for i, thing in enumerate(scene.things) for solid in thing.solids]
    scene.solids = stack(*zip(*rows))
    return scene


def houses_and_kerbs(scene, rng):
    """Solids in the plane along both sides of the road, none in the crossing."""
    solids = []
    for q in (-1, 1):
        s = -75.0
        while s < 125:
            wide, deep, high = rng.uniform(9, 20), rng.uniform(7, 12), rng.choice([rng.uniform(3.5, 6), rng.uniform(6, 16)])
            middle, out, wall = s + wide / 2, HALF_ROAD + WALK + rng.uniform(.5, 4), any_of(rng, WALLS)
            if abs(middle - scene.crossing) > wide / 2 + 9 and rng.random() < .8:
                x, y, heading = to_plane(scene.curve, middle, q * (out + deep / 2))
                axes = pose((0, 0, 0), heading)[:3, :3]
                solids.append(Solid(CUBE, (x, y, high / 2), (wide / 2, deep / 2, high / 2), wall, WINDOWS, axes=axes))
                if high < 6:                                               # a pitched roof
                    solids.append(Solid(CUBE, (x, y, high + .9), (wide / 2 + .3, deep / 2 + .3, .9), (.3, .12, .08), taper=.75, axes=axes))
            s += wide + rng.uniform(.5, 5)
        for s in np.arange(-75, 125, 8.0):
            if abs(s - scene.crossing) > 11:
                x, y, heading = to_plane(scene.curve, s, q * (HALF_ROAD + .12))
                solids.append(Solid(CUBE, (x, y, .06), (4.05, .12, .08), (.5, .5, .48), axes=pose((0, 0, 0), heading)[:3, :3]))
    return solids


# ---- rays --------------------------------------------------------------------------------------------------------------------------------

def hit(world, i, origin, rays):
    """Distance along each ray to solid i, inf where it is missed.  origin (3,), rays (N, 3) -> (N,), in lengths of a ray."""
    into, k = world.axes[i] / world.half[i], world.taper[i]                # the solid becomes its unit shape, distances along rays stay
    o, d = (origin - world.centre[i]) @ into, into.T @ rays.T              # (3,) (3, N)
    with np.errstate(divide="ignore", invalid="ignore"):
        if world.kind[i] == CUBE:                                          # six half spaces
            sides = np.array([[1, 0, k / 2], [-1, 0, k / 2], [0, 1, k / 2], [0, -1, k / 2], [0, 0, 1], [0, 0, -1]])
            gap, rate = np.array([1 - k / 2] * 4 + [1, 1]) - sides @ o, sides @ d              # (6,) (6, N): inside is gap >= 0
            cut = gap[:, None] / rate
            enter, leave = np.where(rate < 0, cut, -np.inf).max(0), np.where(rate > 0, cut, np.inf).min(0)
            outside = ((rate == 0) & (gap < 0)[:, None]).any(0)
            return np.where((enter < leave) & (enter > 0) & ~outside, enter, np.inf)
        if world.kind[i] == BALL:
            a, b, c, caps = (d * d).sum(0), o @ d, o @ o - 1, (0.0, 0.0)
        else:                                                              # x^2 + y^2 = (r + dr t)^2 between two caps
            r, dr = 1 - k * (1 + o[2]) / 2, -k * d[2] / 2
            a, b, c = d[0] ** 2 + d[1] ** 2 - dr ** 2, o[:2] @ d[:2] - r * dr, o[:2] @ o[:2] - r * r
            caps = 1.0, (1 - k) ** 2
        root, best = np.sqrt(b * b - a * c), np.full(len(rays), np.inf)
        for t in ((-b - root) / a, (-b + root) / a):
            best = np.where((t > 0) & (abs(o[2] + t * d[2]) <= 1) & (t < best), t, best)
        for z, r2 in zip((-1, 1), caps):
            t = (z - o[2]) / d[2]
            best = np.where((t > 0) & ((o[0] + t * d[0]) ** 2 + (o[1] + t * d[1]) ** 2 < r2) & (t < best), t, best)
    return best


def cast(world, origin, rays, rects=None, ground=True):
    """The nearest surface along each ray.

    origin (3,); rays (H, W, 3) of any length; rects (P, 4) int: from row, to row, from column, to column (modulo W) of the rays that may
    hit each solid, None for all -> distance (H, W) in lengths of a ray, inf for none; ids (H, W): the solid, GROUND or NOTHING;
    touched: for each solid the flat indices of all rays that meet it, seen or hidden
    """
    H, W = rays.shape[:2]
    with np.errstate(divide="ignore"):
        distance = np.where((rays[..., 2] < 0) & ground, -origin[2] / rays[..., 2], np.inf)
    ids = np.where(np.isfinite(distance), GROUND, NOTHING)
    touched = [np.empty(0, int)] * len(world.kind)
    for i, (r0, r1, c0, c1) in enumerate([(0, H, 0, W)] * len(world.kind) if rects is None else rects):
        if r0 >= r1 or c0 >= c1:
            continue
        part = slice(r0, r1), slice(c0, c1) if 0 <= c0 and c1 <= W else np.arange(c0, c1) % W
        some = rays[part]
        t = hit(world, i, origin, some.reshape(-1, 3)).reshape(some.shape[:2])
        touched[i] = (np.arange(r0, r1)[:, None] * W + np.arange(c0, c1) % W)[np.isfinite(t)]
        nearer = t < distance[part]
        distance[part] = np.where(nearer, t, distance[part])
        ids[part] = np.where(nearer, i, ids[part])
    return distance, ids, touched


def corners(world):
    """The eight corners of each solid's own box: (P, 8, 3)."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    return world.centre[:, None] + np.einsum("pij,pkj->pki", world.axes, signs * world.half[:, None])


def pixel_rays(camera2plane, K, hw):
    """Rays through the pixel centres (at +0.5), of depth 1: (H, W, 3)."""
    v, u = np.mgrid[:hw[0], :hw[1]] + .5
    return np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(hw)], -1) @ camera2plane[:3, :3].T


def pixel_rects(world, camera2plane, K, hw):
    """-> (P, 4), rows and columns that each solid can cover in a pinhole image; all of them for one that reaches behind the lens."""
    local = (corners(world) - camera2plane[:3, 3]) @ camera2plane[:3, :3]                      # (P, 8, 3)
    xy, depth, focal, middle, size = local[..., :2], local[..., 2:], K[[0, 1], [0, 1]], K[:2, 2], np.array(hw[::-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = focal * xy / depth + middle
    (u0, v0), (u1, v1) = np.floor(uv.min(1)).T, np.ceil(uv.max(1)).T + 1
    rects = np.stack([v0, v1, u0, u1], 1)
    rects[depth.min((1, 2)) < .1] = 0, hw[0], 0, hw[1]
    beyond = (xy < -middle / focal * depth).all(1) | (xy > (size - middle) / focal * depth).all(1)     # (P, 2) past one edge of the view
    rects[beyond.any(1) | (depth.max((1, 2)) < .1)] = 0
    return np.clip(rects, 0, [hw[0], hw[0], hw[1], hw[1]]).astype(int)


def beam_rays(elevations, azimuths):
    """Unit rays of one turn in the LiDAR's axes (x right, y forward), clockwise from the front: (beams, azimuths, 3)."""
    up, turn = np.meshgrid(elevations, 2 * np.pi * np.arange(azimuths) / azimuths, indexing="ij")
    return np.stack([np.cos(up) * np.sin(turn), np.cos(up) * np.cos(turn), np.sin(up)], -1)


def beam_rects(world, lidar2plane, elevations, azimuths):
    """-> (P, 4), beams and azimuth steps that each solid can cover, from its axis-parallel bounds in the LiDAR frame."""
    local = (corners(world) - lidar2plane[:3, 3]) @ lidar2plane[:3, :3]
    lo, hi = local.min(1), local.max(1)                                                        # (P, 3)
    near = np.linalg.norm(np.clip(0, lo[:, :2], hi[:, :2]), axis=1)                            # level distance to the nearest point
    far = np.linalg.norm(np.maximum(abs(lo), abs(hi))[:, :2], axis=1)
    top = np.arctan2(hi[:, 2], np.where(hi[:, 2] > 0, near, far))
    bottom = np.arctan2(lo[:, 2], np.where(lo[:, 2] < 0, near, far))
    middle = np.arctan2(lo[:, 0] + hi[:, 0], lo[:, 1] + hi[:, 1])
    edges = np.stack([np.arctan2(x, y) for x in (lo[:, 0], hi[:, 0]) for y in (lo[:, 1], hi[:, 1])], 1)      # (P, 4)
    edges = (edges - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    step = 2 * np.pi / azimuths
    c0, c1 = np.floor((middle + edges.min(1)) / step) - 1, np.ceil((middle + edges.max(1)) / step) + 2
    c0, c1 = np.where(near == 0, 0, c0), np.where(near == 0, azimuths, np.minimum(c1, c0 + azimuths))        # all round one overhead
    rects = np.stack([np.searchsorted(elevations, bottom - 1e-6), np.searchsorted(elevations, top + 1e-6), c0, c1], 1).astype(int)
    rects[near > REACH] = 0
    return rects


def surface(world, ids, xyz):
    """What was hit: ids (N,) of solids, xyz (N, 3) -> normals (N, 3) in the plane, normals (N, 3) and xyz (N, 3) in the solid's axes."""
    axes, half, kind, k = world.axes[ids], world.half[ids], world.kind[ids], world.taper[ids]
    unit = np.einsum("nji,nj->ni", axes, xyz - world.centre[ids]) / half
    sides = np.zeros((len(ids), 6, 3))                                                         # as in hit
    sides[:, :4, 2] = k[:, None] / 2
    sides[:, range(6), [0, 0, 1, 1, 2, 2]] = [1, -1, 1, -1, 1, -1]
    reach = np.einsum("nsi,ni->ns", sides, unit) - np.stack([1 - k / 2] * 4 + [np.ones_like(k)] * 2, 1)      # 0 on the side that was hit
    radius, above = np.hypot(unit[:, 0], unit[:, 1]), np.sign(unit[:, 2])
    mantle = 1 - abs(unit[:, 2]) > abs(radius - (1 - k * (1 + unit[:, 2]) / 2))                # a frustum's side rather than its caps
    round_ = np.where(mantle[:, None], np.stack([unit[:, 0], unit[:, 1], k / 2 * radius], 1), np.stack([0 * k, 0 * k, above], 1))
    normal = np.select([kind[:, None] == CUBE, kind[:, None] == BALL], [sides[np.arange(len(ids)), reach.argmax(1)], unit], round_) / half
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return np.einsum("nij,nj->ni", axes, normal), normal, unit * half


# ---- what a sensor records ---------------------------------------------------------------------------------------------------------------

def speckle(*cells):
    """A number in [0, 1) for each integer cell: (N,) arrays -> (N,)."""
    h = np.zeros(np.shape(cells[0]), np.uint32)
    for cell in cells:
        h = (h ^ np.floor(cell).astype(np.int64).astype(np.uint32)) * np.uint32(0x9E3779B1)
        h ^= h >> np.uint32(15)
    return (h * np.uint32(0x85EBCA77) >> np.uint32(8)) / 2.0 ** 24


def ground_colour(scene, x, y):
    """Asphalt, markings, pavement, grass.  x, y (N,) -> albedo (N, 3), LiDAR reflectance (N,)."""
    s, l = to_road(scene.curve, x, y)
    across, side = abs(s - scene.crossing), abs(l)
    road = (side < HALF_ROAD) | (across < 5)
    walk = ~road & (side < HALF_ROAD + WALK)
    line = (side < .08) & (s % 6 < 3) | (abs(side - 3.55) < .07) & (s % 3 < 2) | (abs(side - HALF_ROAD + .2) < .06)
    zebra = (abs(across - 6.6) < 1.4) & (side < HALF_ROAD - .4) & (l % 1.1 < .55)
    paint = road & (line & (across > 8) | zebra)
    joint = walk & ((s % 1 < .06) | (l % 1 < .06))                                             # between flagstones
    patch = .85 + .15 * speckle(s / 3.1, l / 2.3) + .3 * (speckle(s / .12, l / .12) - .5)
    colour = np.select([paint[:, None], road[:, None], walk[:, None]], [[.75, .75, .72], [.16, .16, .165], [.42, .4, .37]], [.13, .22, .06])
    return colour * (patch * (1 - .3 * joint))[:, None], np.select([paint, road, walk], [.9, .12, .3], .35)


def solid_colour(world, ids, normal, local):
    """Textures.  ids (N,), normals and coordinates in the solid's axes (N, 3) -> albedo (N, 3)."""
    colour, kind = world.colour[ids], world.texture[ids]
    u, v = np.where(abs(normal[:, 0]) > abs(normal[:, 1]), local[:, 1], local[:, 0]), local[:, 2]
    z, upright = v + world.half[ids, 2], abs(normal[:, 2]) < .7
    house, glow = (kind == WINDOWS) & upright, speckle(u / 2.6, z / 3, ids)
    window = house & (abs(u / 2.6 % 1 - .5) < .23) & (abs(z / 3 % 1 - .54) < .24)
    colour[window] = np.where(glow[:, None] < .12, [.75, .6, .3], [.05, .07, .1] + .15 * glow[:, None])[window]      # some are lit
    colour[house & (z < .5)] *= .6
    leaf = kind == LEAVES
    colour[leaf] *= .45 + 1.1 * speckle(*(local[leaf].T / .3))[:, None]
    colour[(kind == STRIPES) & ((u + v) / .5 % 1 < .5)] = .8
    colour[(kind == PANES) & upright & (u / 1.25 % 1 < .12)] = .25
    colour[(kind == RIBS) & upright & (u / .55 % 1 < .18)] *= .65
    colour[(kind == BANDS) & (abs(v / world.half[ids, 2] - .1) < .3)] = .85
    return colour


def shadow_map(world, scene, middle, size=560, span=112.0):
    """The sun's view, as of a pinhole 1 km away that looks at `middle` (2,): sun2plane (4, 4), K (3, 3), distance (size, size)."""
    z = -scene.light["sun"]
    x = np.cross(z, [0, 0, 1.0])
    x /= np.linalg.norm(x)
    sun2plane, focal, hw = np.eye(4), 1000 * size / span, (size, size)
    sun2plane[:3, :3], sun2plane[:3, 3] = np.stack([x, np.cross(z, x), z], 1), np.append(middle, 0) - 1000 * z
    K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    rays, rects = pixel_rays(sun2plane, K, hw), pixel_rects(world, sun2plane, K, hw)
    return sun2plane, K, cast(world, sun2plane[:3, 3], rays, rects, ground=False)[0]


def lit(shadows, xyz, margin=.25):
    """1 where the sun reaches xyz (N, 3), else 0; nothing is in shadow outside the map."""
    sun2plane, K, depth = shadows
    local = (xyz - sun2plane[:3, 3]) @ sun2plane[:3, :3]
    u, v = np.floor(K[[0, 1], [0, 1]] * local[:, :2] / local[:, 2:] + K[:2, 2]).astype(int).T
    inside = (np.minimum(u, v) >= 0) & (np.maximum(u, v) < len(depth))
    return np.where(inside & (depth[np.where(inside, v, 0), np.where(inside, u, 0)] < local[:, 2] - margin), 0.0, 1.0)


def render(world, scene, camera2plane, K, hw, shadows, rng):
    """A photograph (H, W, 3) uint8, its depth (H, W), and ids and touched as from cast."""
    origin, rays, light = camera2plane[:3, 3], pixel_rays(camera2plane, K, hw), scene.light
    depth, ids, touched = cast(world, origin, rays, pixel_rects(world, camera2plane, K, hw))
    flat, d = ids.ravel(), rays.reshape(-1, 3)
    length = np.linalg.norm(d, axis=1)
    up, glow = np.clip(d[:, 2:] / length[:, None], 0, 1), np.clip(d @ light["sun"] / length, 0, 1)[:, None] ** 40
    sky = light["horizon"] + (light["zenith"] - light["horizon"]) * up ** .5 + .35 * glow * light["sunlight"]        # (H W, 3)
    reach = np.where(flat == NOTHING, 0, depth.ravel())[:, None]
    xyz, albedo, normal = origin + d * reach, np.zeros_like(d), np.zeros_like(d)
    g, o = np.flatnonzero(flat == GROUND), np.flatnonzero(flat >= 0)
    albedo[g], normal[g] = ground_colour(scene, xyz[g, 0], xyz[g, 1])[0], [0, 0, 1]
    normal[o], normal_local, local = surface(world, flat[o], xyz[o])
    albedo[o] = solid_colour(world, flat[o], normal_local, local)
    sunny = np.clip(normal @ light["sun"], 0, None) * lit(shadows, xyz + .05 * normal)
    colour = albedo * (sunny[:, None] * light["sunlight"] + light["skylight"] * (.65 + .35 * normal[:, 2:]))         # Lambert
    clear = np.exp(-reach * length[:, None] / 220)                                             # haze
    colour = np.where(flat[:, None] == NOTHING, sky, colour * clear + light["horizon"] * (1 - clear))
    image = 255 * np.clip(.9 * colour, 0, 1) ** (1 / 2.2) + rng.normal(0, 1.5, d.shape)
    return np.clip(image, 0, 255).astype(np.uint8).reshape(*hw, 3), depth, ids, touched


def sweep(world, scene, lidar2plane, roof, beams, azimuths, rng):
    """One turn of the LiDAR: (N, 5) float32 x right, y forward, z up, intensity 0..255, ring; roof: the vehicle's own, a World."""
    elevations = np.radians(np.linspace(-30, 10, beams))
    local, origin = beam_rays(elevations, azimuths), lidar2plane[:3, 3]
    rays = local @ lidar2plane[:3, :3].T
    distance, ids, _ = cast(world, origin, rays, beam_rects(world, lidar2plane, elevations, azimuths))
    own = cast(roof, origin, rays, ground=False)[0]
    xyz = origin + rays * np.where(ids == NOTHING, 0, distance)[..., None]
    shine, cosine = np.full(ids.shape, .5), np.full(ids.shape, .6)
    g, o = (ids == GROUND) & (distance < own), (ids >= 0) & (distance < own)
    shine[g], cosine[g] = ground_colour(scene, *xyz[g].T[:2])[1], -rays[g][:, 2]
    shine[o], cosine[o] = world.shine[ids[o]], abs((surface(world, ids[o], xyz[o])[0] * rays[o]).sum(-1))
    distance = np.minimum(distance, own)
    echo = shine * np.sqrt(cosine) * np.exp(-distance / 45)                                    # what comes back, 0..1
    lost = .02 + .5 * np.exp(-echo / .012)                                                     # by chance; dark, far or grazed
    keep = (distance < REACH) & (rng.random(ids.shape) > lost)
    noisy = np.where(keep, distance, 0) + rng.normal(0, .015, ids.shape)
    intensity = np.clip(255 * echo * rng.uniform(.85, 1.15, ids.shape), 0, 255).round()
    ring = np.broadcast_to(np.arange(beams)[:, None], ids.shape)
    points = np.concatenate([local * noisy[..., None], intensity[..., None], ring[..., None]], -1)
    return points.transpose(1, 0, 2)[keep.T].astype(np.float32)                                # in the order of firing


# ---- the folder on disk ------------------------------------------------------------------------------------------------------------------

ATTRIBUTES = ["vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
              "pedestrian.standing", "pedestrian.moving", "pedestrian.sitting_lying_down"]
CATEGORIES = ["human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker", "human.pedestrian.police_officer",
              "movable_object.barrier", "movable_object.pushable_pullable", "movable_object.trafficcone", "vehicle.bicycle",
              "vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck"]
VISIBILITY = {"1": (0, 40), "2": (40, 60), "3": (60, 80), "4": (80, 100)}  # per cent of a thing's pixels that show it


def token(*names):
    return hashlib.md5("/".join(map(str, names)).encode()).hexdigest()


def wxyz(rotation):
    """A rotation matrix as nuScenes' quaternion, real part first."""
    return Rotation.from_matrix(rotation).as_quat()[[3, 0, 1, 2]].tolist()


def calibration(rng, channel, hw):
    """A sensor's mount and intrinsics, each scene's own to a quarter degree: sensor2ego (4, 4), K (3, 3), empty for the LiDAR."""
    sensor2ego, wobble = np.eye(4), Rotation.from_euler("xyz", rng.normal(0, .004, 3)).as_matrix()
    if channel == "LIDAR_TOP":                                             # x right, y forward
        sensor2ego[:3, :3], sensor2ego[:3, 3] = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]) @ wobble, LIDAR_MOUNT
        return sensor2ego, np.empty((0, 0))
    yaw, view, mount, _ = CAMERAS[channel]                                 # x right, y down, z forward
    sensor2ego[:3, :3] = pose((0, 0, 0), np.radians(yaw))[:3, :3] @ np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]) @ wobble
    sensor2ego[:3, 3], focal = mount, hw[1] / 2 / np.tan(np.radians(view) / 2)
    u, v = np.array([.5, .42]) * hw[::-1] + rng.normal(0, .5, 2)           # square pixels, some sky cropped
    return sensor2ego, np.array([[focal, 0, u], [0, focal, v], [0, 0, 1]])


def count_inside(points, sensor2world, translation, size, yaw):
    """How many points (N, 3), float32 as written, lie strictly inside a global box of size w, l, h."""
    local = (points.astype(np.float64) @ sensor2world[:3, :3].T + sensor2world[:3, 3] - translation) @ pose((0, 0, 0), yaw)[:3, :3]
    return int((abs(local) < np.array(size)[[1, 0, 2]] / 2).all(1).sum())


def write_scene(root, seed, index, frames, beams, azimuths, image):
    """Write the pictures and sweeps of one scene below root; -> its rows {table: [row]}."""
    scene, rng = compose(seed, index, frames), np.random.default_rng((seed, index, 1))
    name, start, rows = scene.name, 1_600_000_000_000_000 + index * 60_000_000, {}
    key = lambda *parts: token(seed, name, *parts)
    near = lambda k, *parts: key(*parts, k) if 0 <= k < frames else ""
    add = lambda table, **row: rows.setdefault(table, []).append(row)
    sensors = {channel: calibration(rng, channel, image) for channel in ["LIDAR_TOP", *CAMERAS]}
    for channel, (sensor2ego, K) in sensors.items():
        add("calibrated_sensor", token=key(channel), sensor_token=token("sensor", channel), translation=sensor2ego[:3, 3].tolist(),
            rotation=wxyz(sensor2ego[:3, :3]), camera_intrinsic=K.tolist())
    roof = stack([Solid(FRUSTUM, (.94, 0, 1.4), (.555, .555, .14), STEEL)], [-1])              # two of 32 beams meet it
    tracks = {}                                                            # thing -> its annotations
    for k in range(frames):
        moment = k * PERIOD + int(rng.integers(-2000, 2000))
        add("sample", token=key("sample", k), timestamp=start + moment, prev=near(k - 1, "sample"), next=near(k + 1, "sample"),
            scene_token=key("scene"))
        seen, whole = np.zeros((2, len(scene.things)))                     # pixels that show a thing; that would if it stood alone
        for channel, (sensor2ego, K) in sensors.items():                   # the LiDAR first
            lidar = channel == "LIDAR_TOP"
            stamp = moment + (0 if lidar else CAMERAS[channel][3])
            world, ego = world_at(scene, stamp / 1e6), ego2plane(scene, stamp / 1e6)
            ego2world = scene.plane2world @ ego
            path = f"samples/{channel}/{name}__{channel}__{start + stamp}." + ("pcd.bin" if lidar else "jpg")
            add("ego_pose", token=key(channel, k), timestamp=start + stamp, rotation=wxyz(ego2world[:3, :3]),
                translation=ego2world[:3, 3].tolist())
            add("sample_data", token=key(channel, k), sample_token=key("sample", k), ego_pose_token=key(channel, k),
                calibrated_sensor_token=key(channel), timestamp=start + stamp, fileformat="pcd" if lidar else "jpg", is_key_frame=True,
                height=0 if lidar else image[0], width=0 if lidar else image[1], filename=path,
                prev=near(k - 1, channel), next=near(k + 1, channel))
            if lidar:
                here = replace(roof, centre=roof.centre @ ego[:3, :3].T + ego[:3, 3])
                points = sweep(world, scene, ego @ sensor2ego, here, beams, azimuths, rng)
                points.tofile(root / path)
                lidar2world, ego_then, shadows = ego2world @ sensor2ego, ego, shadow_map(world, scene, ego[:2, 3])
            else:
                picture, _, ids, touched = render(world, scene, ego @ sensor2ego, K, image, shadows, rng)
                Image.fromarray(picture).save(root / path, quality=90)
                owners = world.owner[ids[ids >= 0]]
                seen += np.bincount(owners[owners >= 0], minlength=len(seen))
                for i in range(len(whole)):
                    whole[i] += len(np.unique(np.concatenate([touched[j] for j in np.flatnonzero(world.owner == i)])))
        for i, thing in enumerate(scene.things):
            thing2world = scene.plane2world @ (place := thing2plane(scene, thing, moment / 1e6))
            if not thing.category or np.linalg.norm(place[:2, 3] - ego_then[:2, 3]) > LABEL_REACH:
                continue
            size, share = [float(edge) for edge in thing.size], 100 * seen[i] / max(whole[i], 1)
            centre, yaw = thing2world[:3, 3] + [0, 0, size[2] / 2], np.arctan2(thing2world[1, 0], thing2world[0, 0])
            tracks.setdefault(i, []).append(dict(
                token=key("annotation", i, k), sample_token=key("sample", k), instance_token=key("instance", i),
                visibility_token=max(number for number, (low, _) in VISIBILITY.items() if share >= low),
                attribute_tokens=[token("attribute", thing.attribute)] if thing.attribute else [], translation=centre.tolist(), size=size,
                rotation=[float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))], prev="", next="",
                num_lidar_pts=count_inside(points[:, :3], lidar2world, centre, size, yaw), num_radar_pts=0))
    for i, track in tracks.items():
        for before, after in zip(track, track[1:]):
            before["next"], after["prev"] = after["token"], before["token"]
        add("instance", token=key("instance", i), category_token=token("category", scene.things[i].category), nbr_annotations=len(track),
            first_annotation_token=track[0]["token"], last_annotation_token=track[-1]["token"])
    rows["sample_annotation"] = [row for track in tracks.values() for row in track]
    add("log", token=key("log"), logfile=name, vehicle="embedded", date_captured="2020-09-13", location="embedded-town")
    add("scene", token=key("scene"), log_token=key("log"), nbr_samples=frames, first_sample_token=key("sample", 0),
        last_sample_token=key("sample", frames - 1), name=name, description="a procedural street")
    return rows


def write_part(root, part, parts, seed, scenes, frames, beams, azimuths, image):
    """Every parts-th scene from `part` on; their rows wait in root/rows."""
    for index in range(part, scenes, parts):
        waiting = root / "rows" / f"{index:04d}.part"
        waiting.write_text(json.dumps(write_scene(root, seed, index, frames, beams, azimuths, image)))
        waiting.rename(waiting.with_suffix(".json"))


def write_tables(root, seed, train):
    """Join the scenes' rows, add what all scenes share, name the splits."""
    tables = {}
    for path in sorted((root / "rows").glob("*.json")):
        for table, rows in json.loads(path.read_text()).items():
            tables.setdefault(table, []).extend(rows)
    named = lambda table, names: [dict(token=token(table, name), name=name, description="") for name in names]
    tables["attribute"] = named("attribute", ATTRIBUTES)
    tables["category"] = [dict(row, index=i) for i, row in enumerate(named("category", CATEGORIES), 1)]
    tables["sensor"] = [dict(token=token("sensor", channel), channel=channel, modality="camera" if channel in CAMERAS else "lidar")
                        for channel in [*CAMERAS, "LIDAR_TOP"]]
    tables["visibility"] = [dict(token=number, level=f"v{low}-{high}", description=f"{low} to {high} % of the object is visible")
                            for number, (low, high) in VISIBILITY.items()]
    picture = f"maps/{token(seed, 'map')}.png"                             # the devkit wants a file
    Image.new("L", (16, 16)).save(root / picture)
    tables["map"] = [dict(category="semantic_prior", token=token(seed, "map"), filename=picture,
                          log_tokens=[log["token"] for log in tables["log"]])]
    names = [scene["name"] for scene in tables["scene"]]
    for table, rows in {**tables, "splits": {"embedded_train": names[:train], "embedded_val": names[train:]}}.items():
        (root / TABLES / f"{table}.json").write_text(json.dumps(rows, indent=0))


def write(root, *, seed=0, train=24, val=8, frames=8, beams=32, azimuths=360, image=(96, 256), format="nuscenes"):
    """Write the world in the nuScenes layout: root/v1.0-embedded with 13 tables and splits.json, root/samples, root/maps. format "kitti" or "waymo": in theirs.

    The folder appears whole: it is written beside and renamed; of two writers the second discards its own. Two children that run this file
    share the scenes, so nothing of the caller's is forked or imported twice. Raises FileExistsError where root holds anything.
    """
    root = Path(root).absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is there and is not empty: the embedded world wants a new folder; name another or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    scenes, children = train + val, []
    job = dict(parts=2, seed=seed, scenes=scenes, frames=frames, beams=beams, azimuths=azimuths, image=tuple(image))
    try:
        for folder in ("maps", "rows", TABLES, *[f"samples/{channel}" for channel in ("LIDAR_TOP", *CAMERAS)]):
            (aside / folder).mkdir(parents=True)
        if scenes * frames < ALONE:
            write_part(aside, **{**job, "part": 0, "parts": 1})
        else:
            commands = [[sys.executable, __file__, str(aside), "--job", json.dumps({**job, "part": part})] for part in range(2)]
            children += [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in commands]
        with tqdm(total=scenes, unit="scene", desc="writing the embedded world", disable=None) as bar:
            while any(child.poll() is None for child in children):
                clock.sleep(.1)
                bar.update(len(list((aside / "rows").glob("*.json"))) - bar.n)
        if any(child.returncode for child in children):
            raise RuntimeError(f"{root}: a writing process stopped with {[child.returncode for child in children]}; its message is above")
        write_tables(aside, seed, train)
        shutil.rmtree(aside / "rows")
        whole = aside
        if format != "nuscenes":
            whole = aside / "converted"
            whole.mkdir()
            to_kitti(aside, whole) if format == "kitti" else to_waymo(aside, whole, beams, azimuths)
        whole.chmod(0o755)                                                 # mkdtemp's folder is its owner's alone
        try:
            whole.rename(root)
        except OSError:
            if not any(root.iterdir()):                                    # lost to no other writer: a real complaint
                raise
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
                child.wait()
        shutil.rmtree(aside, ignore_errors=True)


# ---- the same world in other layouts -----------------------------------------------------------------------------------------------------

KITTI_TYPE = dict(car="Car", truck="Truck", bus="Truck", trailer="Truck", construction="Truck", pedestrian="Pedestrian", bicycle="Cyclist", motorcycle="Cyclist")
WAYMO_TYPE = dict(car=1, truck=1, bus=1, trailer=1, construction=1, motorcycle=1, pedestrian=2, bicycle=4)
WAYMO_CAMERAS = "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"     # cameras 1 to 5


def keyframes(root):
    """What is on disk in the nuScenes layout, frame by frame: dicts of scene, split, time, sweep (N, 5), lidar2ego, ego2world, cameras {channel: (file, K, camera2ego,
    ego2world)}, boxes [(kind, instance, centre, size l w h, yaw in the world, points, visibility 1..4, velocity)]; the car's own points are left out."""
    table = lambda name: json.loads((root / TABLES / f"{name}.json").read_text())
    by_token = lambda name: {row["token"]: row for row in table(name)}
    rigid = lambda row: np.block([[Rotation.from_quat(np.roll(row["rotation"], -1)).as_matrix(), np.array(row["translation"])[:, None]], [np.zeros((1, 3)), 1]])
    mounts, poses, samples, scenes = (by_token(name) for name in ("calibrated_sensor", "ego_pose", "sample", "scene"))
    channels, kinds = {row["token"]: row["channel"] for row in table("sensor")}, {row["token"]: row["name"] for row in table("category")}
    instances, annotations, splits = by_token("instance"), by_token("sample_annotation"), table("splits")
    frames = {name: dict(scene=scenes[row["scene_token"]]["name"], time=row["timestamp"], cameras={}, boxes=[]) for name, row in samples.items()}
    for row in table("sample_data"):
        frame, mount = frames[row["sample_token"]], mounts[row["calibrated_sensor_token"]]
        channel, sensor2ego, ego2world = channels[mount["sensor_token"]], rigid(mount), rigid(poses[row["ego_pose_token"]])
        if channel == "LIDAR_TOP":
            points = np.fromfile(root / row["filename"], np.float32).reshape(-1, 5)
            points = points[~((points[:, 1] > -1.5) & (points[:, 1] < 2.5) & (abs(points[:, 0]) < 1))]
            frame |= dict(sweep=points, lidar2ego=sensor2ego, ego2world=ego2world)
        else:
            frame["cameras"][channel] = root / row["filename"], np.array(mount["camera_intrinsic"]), sensor2ego, ego2world
    for row in annotations.values():
        near = [annotations[row[side]] if row[side] else row for side in ("prev", "next")]
        gap = (samples[near[1]["sample_token"]]["timestamp"] - samples[near[0]["sample_token"]]["timestamp"]) * 1e-6
        velocity = (np.array(near[1]["translation"]) - near[0]["translation"]) / gap if gap else np.zeros(3)
        kind = kinds[instances[row["instance_token"]]["category_token"]].split(".")[1]
        yaw = 2 * np.arctan2(row["rotation"][3], row["rotation"][0])
        frames[row["sample_token"]]["boxes"].append((kind, row["instance_token"], np.array(row["translation"]), np.array(row["size"])[[1, 0, 2]], yaw,
                                                     row["num_lidar_pts"], int(row["visibility_token"]), velocity))
    for frame in sorted(frames.values(), key=lambda frame: frame["time"]):
        yield frame | dict(split="train" if frame["scene"] in splits["embedded_train"] else "val")


def to_kitti(source, root):
    """training/{velodyne, image_2, calib, label_2} and ImageSets of the front camera; labels are of what its picture shows."""
    lists = dict(train=[], val=[])
    for folder in ("velodyne", "image_2", "calib", "label_2"):
        (root / "training" / folder).mkdir(parents=True)
    (root / "ImageSets").mkdir()
    for number, frame in enumerate(keyframes(source)):
        name, (file, K, camera2ego, ego2world) = f"{number:06d}", frame["cameras"]["CAM_FRONT"]
        lists[frame["split"]].append(name)
        x, y, z, intensity, _ = frame["sweep"].T
        np.stack([y, -x, z, intensity / 255], 1).astype(np.float32).tofile(root / "training" / "velodyne" / f"{name}.bin")
        picture = Image.open(file)
        picture.save(root / "training" / "image_2" / f"{name}.png")
        turned = np.array([[0., -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])              # our LiDAR axes -> nuScenes'
        world2camera = np.linalg.inv(ego2world @ camera2ego)
        velo2camera = world2camera @ frame["ego2world"] @ frame["lidar2ego"] @ turned
        line = lambda key, values: f"{key}: {' '.join(f'{v:.12e}' for v in np.ravel(values))}\n"
        P = np.concatenate([K, np.zeros((3, 1))], 1)
        (root / "training" / "calib" / f"{name}.txt").write_text("".join(line(f"P{n}", P) for n in range(4)) + line("R0_rect", np.eye(3))
                                                                 + line("Tr_velo_to_cam", velo2camera[:3]) + line("Tr_imu_to_velo", np.eye(4)[:3]) + "\n")
        labels = ""
        for kind, _, centre, (l, w, h), yaw, _, visible, _ in frame["boxes"]:
            heading = world2camera[:3, :3] @ [np.cos(yaw), np.sin(yaw), 0]
            across = np.cross(heading := heading / np.hypot(*heading[::2]) * [1, 0, 1], [0, 1, 0])
            bottom = world2camera[:3, :3] @ centre + world2camera[:3, 3] + [0, h / 2, 0]
            signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (0, 1)])
            uvd = (bottom + signs * [l / 2, w / 2, 1] @ np.stack([heading, across, [0, -h, 0]])) @ K.T
            if kind not in KITTI_TYPE or (uvd[:, 2] < 0.5).any():
                continue
            uv = uvd[:, :2] / uvd[:, 2:]
            whole, (width, height) = np.array([*uv.min(0), *uv.max(0)]), picture.size
            box = np.clip(whole, 0, [width, height] * 2)
            area = [np.prod(b[2:] - b[:2]) for b in (box, whole)]
            if (box[2:] - box[:2] < 1).any():
                continue
            turn = np.arctan2(-heading[2], heading[0])
            numbers = [turn - np.arctan2(bottom[0], bottom[2]), *box, h, w, l, *bottom, turn]
            labels += f"{KITTI_TYPE[kind]} {1 - area[0] / area[1]:.2f} {4 - visible} {' '.join(f'{v:.2f}' for v in numbers)}\n"
        (root / "training" / "label_2" / f"{name}.txt").write_text(labels)
    for split, names in lists.items():
        (root / "ImageSets" / f"{split}.txt").write_text("\n".join(names))


def to_waymo(source, root, beams, azimuths):
    """<split>/<component>/<segment>.parquet, one segment a scene. The LiDAR is TOP; the vehicle's axes are turned by so little that its columns have their middles on
    the rays; the pictures of five cameras keep their pixels and have no lens error."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    keys = [("segment", "key.segment_context_name", pa.string()), ("time", "key.frame_timestamp_micros", pa.int64()), ("laser", "key.laser_name", pa.int8()),
            ("camera", "key.camera_name", pa.int8()), ("object", "key.laser_object_id", pa.string())]
    floats, shape, matrix, double = pa.list_(pa.float32()), pa.list_(pa.int32(), 3), pa.list_(pa.float64(), 16), pa.float64()
    image_part = [(f"[LiDARComponent].range_image_return{n}.{name}", kind) for n in (1, 2) for name, kind in (("values", floats), ("shape", shape))]
    pixel, laser, lens, box = "[LiDARPoseComponent].range_image_return1.", "[LiDARCalibrationComponent].", "[CameraCalibrationComponent].", "[LiDARBoxComponent]."
    components = dict(
        lidar=("segment time laser", image_part), lidar_pose=("segment time laser", [(pixel + "values", floats), (pixel + "shape", shape)]),
        lidar_calibration=("segment laser", [(laser + "extrinsic.transform", matrix), (laser + "beam_inclination.min", double), (laser + "beam_inclination.max", double),
                                             (laser + "beam_inclination.values", pa.list_(double))]),
        camera_image=("segment time camera", [("[CameraImageComponent].image", pa.binary()), ("[CameraImageComponent].pose.transform", matrix)]),
        camera_calibration=("segment camera", [*[(f"{lens}intrinsic.{name}", double) for name in "f_u f_v c_u c_v k1 k2 p1 p2 k3".split()],
                                               (lens + "extrinsic.transform", matrix), (lens + "width", pa.int32()), (lens + "height", pa.int32())]),
        vehicle_pose=("segment time", [("[VehiclePoseComponent].world_from_vehicle.transform", matrix)]),
        lidar_box=("segment time object", [*[(f"{box}box.{p}.{a}", double) for p in ("center", "size") for a in "xyz"], (box + "box.heading", double),
                                           (box + "speed.x", double), (box + "speed.y", double), (box + "type", pa.int8()),
                                           (box + "num_lidar_points_in_box", pa.int64()), (box + "difficulty_level.detection", pa.int8())]))
    scenes = {}
    for frame in keyframes(source):
        scenes.setdefault((frame["split"], frame["scene"]), []).append(frame)
    turned = lambda angle: pose((0, 0, 0), angle)
    upright = np.array([[0., 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])                # a camera's right, down, forward -> x out, y left, z up
    ours, mounting = np.array([[0., -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), np.radians(148)
    for (split, segment), frames in scenes.items():
        rows = {name: [] for name in components}
        mount = frames[0]["lidar2ego"] @ ours @ turned(mounting)
        extra = np.arctan2(mount[1, 0], mount[0, 0]) - mounting - np.pi / azimuths                 # half a column
        vehicle2ego = turned(extra)
        ego2vehicle = np.linalg.inv(vehicle2ego)
        top = ego2vehicle @ mount
        elevations = np.radians(np.linspace(-30, 10, beams))
        rows["lidar_calibration"].append((segment, 1, top.ravel(), elevations[0], elevations[-1], elevations))
        for number, channel in enumerate(WAYMO_CAMERAS, 1):
            file, K, camera2ego, _ = frames[0]["cameras"][channel]
            pinhole = K[0, 0], K[1, 1], K[0, 2], K[1, 2], 0., 0., 0., 0., 0.
            rows["camera_calibration"].append((segment, number, *pinhole, (ego2vehicle @ camera2ego @ upright.T).ravel(), *Image.open(file).size))
        for frame in frames:
            vehicle2world, time, sweep = frame["ego2world"] @ vehicle2ego, frame["time"], frame["sweep"].astype(np.float64)
            image = np.full((beams, azimuths, 4), -1, np.float32)
            image[..., 1:3] = 0
            row = beams - 1 - sweep[:, 4].astype(int)
            azimuth = np.arctan2(-sweep[:, 0], sweep[:, 1])                                        # from ahead to the left
            column = (np.round((np.pi - azimuth) / (2 * np.pi / azimuths)).astype(int) - 1) % azimuths      # middles at pi - (k + 1/2) steps, turned by half of one
            image[row, column, 0], image[row, column, 1] = np.linalg.norm(sweep[:, :3], axis=1), np.arctanh(np.clip(sweep[:, 3] / 255, 0, 0.999))
            nothing = np.full(image.size, -1, np.float32)
            rows["lidar"].append((segment, time, 1, image.ravel(), image.shape, nothing, image.shape))
            angles = Rotation.from_matrix(vehicle2world[:3, :3]).as_euler("xyz")
            per_pixel = np.tile(np.concatenate([angles, vehicle2world[:3, 3]]).astype(np.float32), (beams, azimuths, 1))
            rows["lidar_pose"].append((segment, time, 1, per_pixel.ravel(), per_pixel.shape))
            rows["vehicle_pose"].append((segment, time, vehicle2world.ravel()))
            for number, channel in enumerate(WAYMO_CAMERAS, 1):
                file, _, _, ego2world = frame["cameras"][channel]
                rows["camera_image"].append((segment, time, number, file.read_bytes(), (ego2world @ vehicle2ego).ravel()))
            world2vehicle = np.linalg.inv(vehicle2world)
            for kind, instance, centre, size, yaw, points, _, velocity in frame["boxes"]:
                if kind in WAYMO_TYPE:
                    heading = world2vehicle[:3, :3] @ [np.cos(yaw), np.sin(yaw), 0]
                    rows["lidar_box"].append((segment, time, instance, *world2vehicle[:3, :3] @ centre + world2vehicle[:3, 3], *size,
                                              np.arctan2(heading[1], heading[0]), *velocity[:2], WAYMO_TYPE[kind], points, 0))
        for component, (named, columns) in components.items():
            path = root / dict(train="training", val="validation")[split] / component / f"{segment}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            described = [next((full, kind) for short, full, kind in keys if short == name) for name in named.split()] + columns
            values = zip(*rows[component]) if rows[component] else [[] for _ in described]
            parquet.write_table(pa.table({name: pa.array([v.tolist() if isinstance(v, np.ndarray) else v for v in value], kind)
                                          for (name, kind), value in zip(described, values)}), path, row_group_size=8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="a new folder")
    for option, value in dict(seed=0, train=24, val=8, frames=8).items():
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--format", choices=("nuscenes", "kitti", "waymo"), default="nuscenes", help="layout on disk")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # one of write's two children
    options = vars(parser.parse_args())
    job = options.pop("job")
    if job:
        write_part(options["root"], **job)
    else:
        write(**options)


if __name__ == "__main__":
    main()
