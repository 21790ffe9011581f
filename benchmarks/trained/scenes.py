"""Scenes drawn by formulas, each with a caption of its attributes.

A scene has a background (colour and pattern) and one or two objects (size, colour, shape), with
their relation if there are two. Drawn with NumPy alone, so a seed gives the same pixels on every
machine. No data of others is used.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

SIDE = 128  # pixels
TRAINING_SCENES = 40960  # the seeds from 0 on

COLOURS = {
    "red": (0.85, 0.13, 0.12),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.96, 0.85, 0.20),
    "green": (0.16, 0.60, 0.25),
    "blue": (0.13, 0.30, 0.80),
    "purple": (0.50, 0.20, 0.65),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.10),
}
PATTERNS = ("plain", "striped", "checkered")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring")
SIZES = {"small": 17.0, "large": 28.0}  # radius in pixels
# Caption, and the direction from the second object to the first.
RELATIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
_SHADOW_OFFSET, _SHADOW_BLUR, _SHADOW_STRENGTH = 4.0, 8.0, 0.35
_STRIPE, _CHECK = 16, 16  # pixels
_PER_TASK = 256  # scenes
_FIRST_UNSEEN = 10**6  # seed

Image = NDArray[np.float32]
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + np.float32(0.5)


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, and the centre in pixels."""

    size: str
    colour: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a caption says, and where the objects are."""

    colour: str
    pattern: str
    things: tuple[Thing, ...]
    relation: str | None

    @property
    def caption(self) -> str:
        """Every attribute in one sentence."""
        names = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in self.things]
        return f"{f' {self.relation} '.join(names)} on a {self.pattern} {self.colour} background"


def random_scene(random: np.random.Generator) -> Scene:
    """Draw the attributes of one scene; no object has the background's colour."""

    def choose(options: list[str]) -> str:
        return options[int(random.integers(len(options)))]

    background = choose(list(COLOURS))
    others = [colour for colour in COLOURS if colour != background]
    relation = choose(list(RELATIONS)) if random.random() < 0.7 else None
    jitter = random.uniform(-6, 6, size=(2, 2))
    centre = SIDE / 2
    if relation is None:
        offsets = [(0.0, 0.0)]
    else:
        dx, dy = RELATIONS[relation]
        offsets = [(28.0 * dx, 28.0 * dy), (-28.0 * dx, -28.0 * dy)]
    things = tuple(
        Thing(
            choose(list(SIZES)),
            choose(others),
            choose(list(SHAPES)),
            centre + x + float(jitter[i, 0]),
            centre + y + float(jitter[i, 1]),
        )
        for i, (x, y) in enumerate(offsets)
    )
    return Scene(background, choose(list(PATTERNS)), things, relation)


def _distance(shape: str, x: Image, y: Image, radius: float) -> Image:
    """Signed distance to the outline in pixels, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1.1 * radius) * np.float32(2**-0.5)
    if shape == "triangle":
        y = y - 0.15 * radius
        sides = np.abs(x) * np.float32(0.75**0.5) - 0.5 * y
        return np.maximum(sides, y) - 0.58 * radius
    # A star of five points: fold the plane into half a point, whose edge is one line.
    step = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + step) % (2 * step) - step)
    length = np.hypot(x, y)
    along, across = length * np.cos(angle), length * np.sin(angle)
    outer, inner = 1.15 * radius, 0.5 * radius
    edge = np.array([inner * np.cos(step) - outer, inner * np.sin(step)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    result: Image = (along - outer) * np.float32(normal[0]) + across * np.float32(normal[1])
    return result


def _paint(image: Image, colour: Image, coverage: Image) -> Image:
    return image + coverage[..., None] * (colour - image)


def draw(scene: Scene) -> Image:
    """Draw a scene.

    Returns:
        float32 [128, 128, 3], red, green and blue in -1..1.
    """
    ground = np.float32(COLOURS[scene.colour])
    # The second tone of a pattern: darker, or lighter if the colour is dark.
    second = ground * np.float32(0.72) if ground.mean() > 0.2 else ground + np.float32(0.22)
    if scene.pattern == "striped":
        second_tone = (_Y // _STRIPE) % 2
    elif scene.pattern == "checkered":
        second_tone = (_X // _CHECK + _Y // _CHECK) % 2
    else:
        second_tone = np.zeros_like(_X)
    image = _paint(np.broadcast_to(ground, (SIDE, SIDE, 3)), second, second_tone)
    for thing in scene.things:
        x, y = _X - np.float32(thing.x), _Y - np.float32(thing.y)
        radius = SIZES[thing.size]
        shadow = _distance(thing.shape, x - _SHADOW_OFFSET, y - _SHADOW_OFFSET, radius)
        soft = np.clip(0.5 - shadow / _SHADOW_BLUR, 0, 1) * np.float32(_SHADOW_STRENGTH)
        image = _paint(image, np.zeros(3, np.float32), soft)
        # Light from the upper left.
        light = 1 - np.float32(0.22) * (x + y) / np.float32(2 * radius)
        colour = np.clip(np.float32(COLOURS[thing.colour]) * light[..., None], 0, 1)
        image = _paint(image, colour, np.clip(0.5 - _distance(thing.shape, x, y, radius), 0, 1))
    return (2 * image - 1).astype(np.float32)


def to_bytes(image: Image) -> NDArray[np.uint8]:
    """Round -1..1 to 0..255."""
    return np.clip(np.round((image + 1) * 127.5), 0, 255).astype(np.uint8)


def draw_many(count: int) -> list[tuple[Scene, NDArray[np.uint8]]]:
    """Draw the scenes of the seeds 0 to `count`, in several processes.

    Returns:
        Each scene and its pixels, [3, 128, 128].
    """
    tasks = [range(i, min(i + _PER_TASK, count)) for i in range(0, count, _PER_TASK)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [pair for part in pool.map(_draw_seeds, tasks) for pair in part]


def _draw_seeds(seeds: range) -> list[tuple[Scene, NDArray[np.uint8]]]:
    drawn = [random_scene(np.random.default_rng(seed)) for seed in seeds]
    return [(scene, to_bytes(draw(scene)).transpose(2, 0, 1)) for scene in drawn]


def unseen_captions(count: int) -> dict[str, int]:
    """Return captions that no scene of the training has, always the same ones, with their seeds."""
    seen = {random_scene(np.random.default_rng(seed)).caption for seed in range(TRAINING_SCENES)}
    found: dict[str, int] = {}
    for seed in itertools.count(_FIRST_UNSEEN):
        if len(found) == count:
            return found
        caption = random_scene(np.random.default_rng(seed)).caption
        if caption not in seen:
            found.setdefault(caption, seed)
    raise AssertionError


def words() -> list[str]:
    """All words of all captions, sorted."""
    fixed = ["a", "on", "background"]
    relations = [word for relation in RELATIONS for word in relation.split()]
    return sorted({*fixed, *relations, *COLOURS, *PATTERNS, *SHAPES, *SIZES})
