"""Moving sprites with true masks: scenes to learn objects from, and a task in which one sprite is pushed to a goal.

Pictures are unit squares, x to the right and y down; a sprite of radius r fits into a circle of about that radius.

>>> scenes = SpriteScenes(batch_size=4, length=6, size=32, sprites=(2, 3), seed=0)
>>> batch = scenes.batch(0)
>>> batch["image"].shape, batch["mask"].shape
((6, 4, 3, 32, 32), (6, 4, 32, 32))
>>> bool((next(iter(scenes))["image"] == batch["image"]).all())
True
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Array = NDArray[Any]

SHAPES = ("square", "triangle", "disc", "cross")
WALL = 0.8  # a sprite's centre stays that many radii inside the picture
MOST = 254  # sprites in a picture, for a mask of uint8
_REACH = 1.1  # no shape reaches further from its centre, in radii
_CHUNK = 32  # frames drawn at once: their patches stay in the cache


@dataclass
class Sprites:
    """Sprites of N frames, K each. Those of radius 0 are not there.

    Attributes:
        shape: (N, K) index into `SHAPES`.
        center: (N, K, 2) x and y in [0, 1].
        radius: (N, K) in picture sides.
        angle: (N, K) radians.
        colour: (N, K, 3) in [0, 1].
        order: (N, K) sprites from back to front, a permutation of 0 .. K-1 in every frame.
    """

    shape: Array
    center: Array
    radius: Array
    angle: Array
    colour: Array
    order: Array


def draw(sprites: Sprites, background: Array, size: int) -> tuple[Array, Array]:
    """Antialiased pictures of sprites, and which one every pixel shows.

    Args:
        sprites: of N frames.
        background: (N, 3) colours or (N, size, size, 3) pictures, in [0, 1].
        size: height and width S in pixels.

    Returns:
        Pictures (N, 3, S, S) uint8, and masks (N, S, S) uint8: 0 background, k + 1 sprite k. A pixel belongs to the
        front sprite that covers at least half of it.
    """
    frames = len(sprites.radius)
    image, mask = np.empty((frames, 3, size, size), np.uint8), np.empty((frames, size, size), np.uint8)
    background = background.reshape(frames, *((1, 1, 3) if background.ndim == 2 else background.shape[1:]))
    for first in range(0, frames, _CHUNK):
        part = slice(first, first + _CHUNK)
        chunk = Sprites(*(value[part] for value in vars(sprites).values()))
        image[part], mask[part] = _draw(chunk, background[part], size)
    return image, mask


def _draw(sprites: Sprites, background: Array, size: int) -> tuple[Array, Array]:
    frames = len(sprites.radius)
    # Only a patch of P x P pixels around each sprite is looked at; a margin around the canvas spares all clipping.
    P = int(np.ceil(2 * _REACH * size * sprites.radius.max(initial=0.0))) + 2
    corner = np.floor(sprites.center * size - P / 2).astype(np.int64).clip(-P, size)  # (N, K, 2)
    pixel = (corner[..., None] + np.arange(P) + 0.5).astype(np.float32) / size  # (N, K, 2, P)
    offset = pixel - sprites.center[..., None].astype(np.float32)
    x, y = offset[:, :, 0, None, :], offset[:, :, 1, :, None]  # (N, K, 1, P), (N, K, P, 1)
    scale = 1 / np.maximum(sprites.radius, 1e-6)
    cos, sin = ((turn(sprites.angle) * scale).astype(np.float32)[..., None, None] for turn in (np.cos, np.sin))
    u, v = cos * x + sin * y, cos * y - sin * x  # the sprite's own axes, in radii
    distance = np.empty_like(u)
    for index, outline in enumerate(_OUTLINES):
        chosen = sprites.shape == index
        distance[chosen] = outline(u[chosen], v[chosen])
    in_pixels = (sprites.radius * size).astype(np.float32)[..., None, None]
    cover = np.where(in_pixels > 0, (0.5 - distance * in_pixels).clip(0, 1), 0)  # (N, K, P, P)

    canvas = np.zeros((frames, size + 2 * P, size + 2 * P, 3), np.float32)
    canvas[:, P:-P, P:-P] = background * 255
    owner = np.zeros((frames, size + 2 * P, size + 2 * P), np.uint8)
    colour = (sprites.colour * 255).astype(np.float32)
    frame = np.arange(frames)
    for k in sprites.order.T:  # (N,)
        column, row = (corner[frame, k] + P).T[..., None] + np.arange(P)  # (N, P) each
        at = frame[:, None, None], row[:, :, None], column[:, None, :]
        share = cover[frame, k]
        under = canvas[at]
        canvas[at] = under + share[..., None] * (colour[frame, k][:, None, None] - under)
        owner[at] = np.where(share > 0.5, (k + 1)[:, None, None], owner[at])
    inside = np.rint(canvas[:, P:-P, P:-P]).astype(np.uint8)
    return np.moveaxis(inside, -1, 1), owner[:, P:-P, P:-P]


# Signed distances to outlines, in radii: negative inside. Areas are about 2 radii squared (the triangle's 1.6).


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.7


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(v, np.abs(u) * (np.sqrt(3) / 2).astype(np.float32) - v / 2) - 0.55


def _disc(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - 0.8


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.9, v - 0.35), np.maximum(u - 0.35, v - 0.9))


_OUTLINES = (_square, _triangle, _disc, _cross)


def bounce(position: Array, low: Array | float, high: Array | float) -> Array:
    """Where a straight path has come to that is reflected at `low` and `high`."""
    span = np.maximum(np.asarray(high) - low, 1e-9)
    return low + span - np.abs((position - low) % (2 * span) - span)


def scatter(
    rng: np.random.Generator,
    scenes: int,
    count: tuple[int, int],
    radius: tuple[float, float],
    shapes: tuple[str, ...] = SHAPES,
    upright: bool = False,
    hues: tuple[float, float] = (0.0, 1.0),
) -> Sprites:
    """Random sprites of `scenes` frames: the most of `count` in each, of which those too many have radius 0.

    Bright colours, whose hues stand apart within a scene and lie within `hues` (0 red, 1/3 green, 2/3 blue, 1 red).
    """
    B, K = scenes, count[1]
    present = np.arange(K) < rng.integers(count[0], K + 1, (B, 1))
    radii = rng.uniform(*radius, (B, K)) * present
    # Of a few places for each sprite, the one that the others leave most room: they may overlap, but seldom does one
    # begin right behind another.
    wall = WALL * radii[..., None, None]
    candidates = rng.uniform(wall, 1 - wall, (B, K, 6, 2))
    center = candidates[:, :, 0].copy()
    for k in range(1, K):
        apart = np.linalg.norm(candidates[:, k, :, None] - center[:, None, :k], axis=-1)  # (B, 6, k)
        room = (apart - radii[:, None, :k] - radii[:, k, None, None]).min(-1).clip(max=0)
        center[:, k] = candidates[np.arange(B), k, room.argmax(-1)]
    return Sprites(
        shape=rng.choice([SHAPES.index(shape) for shape in shapes], (B, K)),
        center=center,
        radius=radii,
        angle=rng.uniform(0, 2 * np.pi, (B, K)) * (not upright),
        colour=_colours(rng, B, K, hues),
        order=rng.permuted(np.tile(np.arange(K), (B, 1)), axis=1),
    )


def velocities(rng: np.random.Generator, scenes: int, count: int, speed: tuple[float, float]) -> Array:
    """(scenes, count, 2) random velocities in picture sides a frame, of a speed within `speed`."""
    direction, length = rng.uniform(0, 2 * np.pi, (scenes, count)), rng.uniform(*speed, (scenes, count))
    return length[..., None] * np.stack([np.cos(direction), np.sin(direction)], -1)


def backdrop(rng: np.random.Generator, scenes: int, size: int, texture: bool) -> Array:
    """Dark greys (scenes, 3), or pictures (scenes, size, size, 3) with a gentle pattern of waves over them."""
    grey = np.repeat(rng.uniform(0.1, 0.35, (scenes, 1)), 3, axis=1)
    if not texture:
        return grey
    waves = 3
    frequency = rng.uniform(-3, 3, (2, scenes, waves, 1, 1)) * 2 * np.pi
    phase = rng.uniform(0, 2 * np.pi, (scenes, waves, 1, 1))
    tint = rng.uniform(0, 0.04, (scenes, waves, 1, 1, 3))
    at = (np.arange(size) + 0.5) / size
    wave = np.sin(frequency[0] * at + frequency[1] * at[:, None] + phase)  # (scenes, waves, S, S)
    return (grey[:, None, None] + (wave[..., None] * tint).sum(1)).clip(0, 1)


def _colours(rng: np.random.Generator, scenes: int, count: int, hues: tuple[float, float]) -> Array:
    place = rng.permuted(np.tile(np.arange(count), (scenes, 1)), axis=1)
    turn = rng.uniform(0, 1, (scenes, 1)) * (hues == (0.0, 1.0))  # a full circle has no ends
    hue = hues[0] + (hues[1] - hues[0]) / max(count, 1) * (place + turn + rng.uniform(0.2, 0.8, (scenes, count)))
    value, saturation = rng.uniform(0.7, 1, (2, scenes, count, 1))
    # The distance around the colour circle to red, green and blue, of which each reaches a third of the way.
    away = np.abs((hue[..., None] * 6 - np.array([0, 2, 4]) + 3) % 6 - 3)
    return value * (1 - saturation * (1 - (2 - away).clip(0, 1)))


class SpriteScenes:
    """Endless batches of scenes of sprites that move, turn, bounce off the walls and hide one another.

    Batch i depends on the arguments and i alone: iterate, or ask for any by `batch`. Other seeds are other scenes, so
    held-out scenes are those of another seed.

    Args:
        batch_size: B scenes a batch.
        length: T frames a scene, or None for single frames.
        size: height and width S of the pictures.
        sprites: fewest and most in a scene; K is the latter.
        shapes: names from `SHAPES` to draw from.
        radius: smallest and largest, in picture sides.
        speed: slowest and fastest, in picture sides a frame.
        spin: fastest turning, in radians a frame; None: sprites stand upright.
        texture: a gentle pattern of waves on the background, which is a plain grey otherwise.
        seed: an integer of at least 0.

    Raises:
        ValueError: for an argument out of range, naming it.

    A batch is a dict of `image`, uint8 (T, B, 3, S, S), and `mask`, uint8 (T, B, S, S): 0 for the background and
    1 .. K for sprites, each the same number through time. Without the T axis if `length` is None.
    """

    def __init__(
        self,
        batch_size: int,
        length: int | None = None,
        *,
        size: int = 64,
        sprites: tuple[int, int] = (2, 5),
        shapes: tuple[str, ...] = SHAPES,
        radius: tuple[float, float] = (0.11, 0.19),
        speed: tuple[float, float] = (0.01, 0.04),
        spin: float | None = 0.15,
        texture: bool = False,
        seed: int = 0,
    ):
        for name, value in {"batch_size": batch_size, "length": length, "size": size}.items():
            if not (isinstance(value, int) and value >= 1) and not (name == "length" and value is None):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not 1 <= sprites[0] <= sprites[1] <= MOST:
            raise ValueError(f"sprites: expected (fewest, most) from 1 to {MOST}, got {sprites!r}")
        if not shapes or set(shapes) - set(SHAPES):
            raise ValueError(f"shapes: expected names from {SHAPES}, got {shapes!r}")
        if not 0 < radius[0] <= radius[1] < 0.5:
            raise ValueError(f"radius: expected (smallest, largest) within 0 and 0.5, got {radius!r}")
        if not 0 <= speed[0] <= speed[1]:
            raise ValueError(f"speed: expected (slowest, fastest) of at least 0, got {speed!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: expected an integer of at least 0, got {seed!r}")
        self.batch_size, self.length, self.size, self.seed = batch_size, length, size, seed
        self._sprites, self._shapes, self._radius = sprites, shapes, radius
        self._speed, self._spin, self._texture = speed, spin, texture

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return map(self.batch, itertools.count())

    def batch(self, index: int) -> dict[str, Array]:
        """Batch number `index`, at least 0."""
        rng = np.random.default_rng((self.seed, index))
        T, B, K = self.length or 1, self.batch_size, self._sprites[1]
        first = scatter(rng, B, self._sprites, self._radius, self._shapes, self._spin is None)
        velocity, spin = velocities(rng, B, K, self._speed), rng.uniform(-1, 1, (B, K)) * (self._spin or 0.0)
        time, wall = np.arange(T)[:, None, None], WALL * first.radius[..., None]
        moved = {
            "center": bounce(first.center + velocity * time[..., None], wall, 1 - wall),  # (T, B, K, 2)
            "angle": first.angle + spin * time,
        }
        still = {n: np.broadcast_to(v, (T, *v.shape)) for n, v in vars(first).items() if n not in moved}
        frames = Sprites(**{n: v.reshape(T * B, *v.shape[2:]) for n, v in (still | moved).items()})
        background = backdrop(rng, B, self.size, self._texture)
        image, mask = draw(frames, np.tile(background, (T, *(1,) * (background.ndim - 1))), self.size)
        lead = (B,) if self.length is None else (T, B)
        return {"image": image.reshape(*lead, *image.shape[1:]), "mask": mask.reshape(*lead, *mask.shape[1:])}


class SpritesEnv(gymnasium.Env):
    """Push a red disc onto the pale square: `gym:phyxdream/Sprites-v0`, and `SpritesContinuous-v0` for floats.

    The reward is the part of the way that a step brings the disc nearer, so that the return of an episode is
    1 - (distance at its end) / (distance at its start): 1 for a perfect policy, 0 for one that does nothing. Distances
    count from `TOLERANCE` off the square's centre. Episodes have 50 steps (gymnasium's `max_episode_steps`), of which
    the longest way takes a quarter, and do not end at the goal: the disc must stay there.

    Observation: a picture (S, S, 3) uint8, or a dict of it and of `segmentation`. Actions: 0 rest, 1 left, 2 right,
    3 up, 4 down; or the shares in [-1, 1] of the longest step to the right and down.

    Args:
        size: height and width S of the picture.
        distractors: how many other sprites there are, which drift on their own and change nothing.
        continuous: actions are Box(-1, 1, (2,)) instead of Discrete(5).
        segmentation: observe the mask (S, S) uint8 as well: 0 background, 1 square, 2 disc, 3 and on distractors.
        texture: a background that differs between episodes, with a gentle pattern, instead of one grey.
        render_mode: None or "rgb_array".

    Raises:
        ValueError: `size` or `distractors` out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012  (gymnasium's own name and type)

    MOVES = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)], np.float64)
    STEP, TOLERANCE, APART = 0.1, 0.08, 0.3
    GREY = 0.1
    SQUARE = {"shape": "square", "radius": 0.22, "colour": (0.9, 0.9, 0.8)}  # noqa: RUF012
    DISC = {"shape": "disc", "radius": 0.16, "colour": (0.95, 0.15, 0.1)}  # noqa: RUF012

    def __init__(
        self,
        size: int = 32,
        distractors: int = 1,
        continuous: bool = False,
        segmentation: bool = False,
        texture: bool = False,
        render_mode: str | None = None,
    ):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: expected an integer of at least 1, got {size!r}")
        if not isinstance(distractors, int) or not 0 <= distractors <= MOST - 2:
            raise ValueError(f"distractors: expected an integer from 0 to {MOST - 2}, got {distractors!r}")
        self._size, self._distractors, self._texture = size, distractors, texture
        self._segmentation, self.render_mode = segmentation, render_mode
        self.action_space = spaces.Box(-1, 1, (2,), np.float32) if continuous else spaces.Discrete(len(self.MOVES))
        picture, mask = spaces.Box(0, 255, (size, size, 3), np.uint8), spaces.Box(0, MOST, (size, size), np.uint8)
        self.observation_space = spaces.Dict(image=picture, segmentation=mask) if segmentation else picture

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode: all places and the distractors are drawn anew."""
        super().reset(seed=seed)
        rng, count = self.np_random, (self._distractors, self._distractors)
        # Greens to violets, which neither the disc nor the square have.
        others = scatter(rng, 1, count, (0.09, 0.13), hues=(0.25, 0.8))
        own = [self.SQUARE, self.DISC]
        far = False
        while not far:
            places = np.stack([rng.uniform(r, 1 - r, 2) for r in (body["radius"] for body in own)])
            far = np.linalg.norm(places[0] - places[1]) >= self.APART
        first = {
            "shape": [SHAPES.index(body["shape"]) for body in own],
            "center": places,
            "radius": [body["radius"] for body in own],
            "angle": [0.0, 0.0],
            "colour": [body["colour"] for body in own],
        }
        joined = {n: np.concatenate([np.array(v)[None], getattr(others, n)], 1) for n, v in first.items()}
        # The square lies at the back and the disc on top of all.
        order = np.concatenate([[[0]], others.order + 2, [[1]]], 1)
        self._sprites = Sprites(**joined, order=order)
        self._velocity = velocities(rng, 1, self._distractors, (0.01, 0.03))[0]
        self._background = backdrop(rng, 1, self._size, True) if self._texture else np.full((1, 3), self.GREY)
        self._start = self._distance()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Push the disc, and let the distractors drift."""
        before = self._distance()
        move = np.clip(action, -1, 1) if isinstance(self.action_space, spaces.Box) else self.MOVES[action]
        center, wall = self._sprites.center[0], WALL * self._sprites.radius[0, :, None]
        center[1] = (center[1] + self.STEP * move).clip(wall[1], 1 - wall[1])
        path = center[2:] + self._velocity
        center[2:] = bounce(path, wall[2:], 1 - wall[2:])
        self._velocity *= np.where((path < wall[2:]) | (path > 1 - wall[2:]), -1, 1)
        return self._observe(), (before - self._distance()) / self._start, False, False, {}

    def render(self) -> Array | None:
        """The picture (S, S, 3) in mode "rgb_array"."""
        return self._draw()[0] if self.render_mode == "rgb_array" else None

    def _distance(self) -> float:
        square, disc = self._sprites.center[0, :2]
        return max(0.0, float(np.linalg.norm(square - disc)) - self.TOLERANCE)

    def _draw(self) -> tuple[Array, Array]:
        image, mask = draw(self._sprites, self._background, self._size)
        return np.moveaxis(image[0], 0, -1), mask[0]

    def _observe(self) -> Any:
        image, mask = self._draw()
        return {"image": image, "segmentation": mask} if self._segmentation else image


def register() -> None:
    """Have gymnasium know `phyxdream/Sprites-v0` and `phyxdream/SpritesContinuous-v0`."""
    entry = f"{__name__}:{SpritesEnv.__name__}"
    gymnasium.register("phyxdream/Sprites-v0", entry, max_episode_steps=50)
    gymnasium.register("phyxdream/SpritesContinuous-v0", entry, max_episode_steps=50, kwargs={"continuous": True})
