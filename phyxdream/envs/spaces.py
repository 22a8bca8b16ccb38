"""From a backend's spaces to the two that agents meet: a flat dict of pictures and vectors, and one action."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image

from phyxdream.errors import EnvError

Array = NDArray[Any]

# The smallest side that the picture encoders take; what is smaller is a vector.
MIN_PICTURE_SIDE = 5
# Entry of an observation that goes to `info`: which object every pixel shows.
SEGMENTATION = "segmentation"
# Names of the other entries of a replay step.
RESERVED_KEYS = frozenset(
    {"action", "reward", "is_first", "is_last", "is_terminal", "deter", "stoch"}
    | {"step_id", "probability", "mask", "consecutive"}
)


def flatten(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves of a nested mapping (or `gymnasium.spaces.Dict`) with their paths, in insertion order."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, (*path, str(key)))
    else:
        yield path, tree


@dataclass(frozen=True)
class Leaf:
    """One entry of the observation: where it comes from, what it becomes, and how (on a whole batch)."""

    path: tuple[str, ...]
    key: str
    space: spaces.Box
    convert: Callable[[Array], Array]


class ObservationMap:
    """Turns batched observations of any supported space into a dict of uint8 CHW pictures and float32 vectors.

    Boxes of two or three dimensions with both sides of at least 5 are pictures when they are uint8, or float with
    bounds [0, 1] or [0, 255]; other boxes, `MultiBinary` included, become flat float32 vectors. `Discrete` and
    `MultiDiscrete` become one-hot vectors. Nested dicts are flattened, with keys joined by "_". A lone picture is
    called "image", a lone vector without a name "state"; names that a replay step uses get the prefix "obs_".

    Args:
        space: the backend's observation space of one environment.
        image_size: (height, width) that every picture is resized to by area averaging, or None.

    Raises:
        EnvError: if a space cannot be handled (Text, Sequence, Graph, Tuple ...), naming it.
    """

    def __init__(self, space: spaces.Space, image_size: tuple[int, int] | None = None):
        leaves = [_leaf(path, leaf, image_size) for path, leaf in flatten(space)]
        if not leaves:
            raise EnvError("the observation space is an empty Dict; expected at least one entry")
        pictures = [i for i, leaf in enumerate(leaves) if leaf.space.dtype == np.uint8]
        names = [_name(leaf.path) for leaf in leaves]
        if len(pictures) == 1 and names.count("image") == (names[pictures[0]] == "image"):
            names[pictures[0]] = "image"
        for name in names:
            if names.count(name) > 1:
                raise EnvError(f"several observations are called {name!r} once flattened: {[x.path for x in leaves]}")
        self.leaves = [Leaf(x.path, name, x.space, x.convert) for x, name in zip(leaves, names, strict=True)]
        self.space = spaces.Dict({leaf.key: leaf.space for leaf in self.leaves})
        self.has_picture = bool(pictures)

    def __call__(self, observation: Any) -> dict[str, Array]:
        """Convert one batch; every array is a new one that owns its memory."""
        given = dict(flatten(observation))
        return {leaf.key: leaf.convert(np.asarray(given[leaf.path])) for leaf in self.leaves}


def _name(path: tuple[str, ...]) -> str:
    name = re.sub(r"\W", "_", "_".join(path), flags=re.ASCII) or "state"
    return f"obs_{name}" if name in RESERVED_KEYS else name


def _leaf(path: tuple[str, ...], space: spaces.Space, image_size: tuple[int, int] | None) -> Leaf:
    where = ".".join(path) or "the observation"
    if isinstance(space, spaces.Box):
        picture = _picture(space, image_size)
        out, convert = picture or (_unbounded(int(np.prod(space.shape, dtype=int))), _to_vector)
    elif isinstance(space, spaces.MultiBinary):
        out, convert = _unbounded(int(np.prod(space.shape))), _to_vector
    elif isinstance(space, spaces.Discrete):
        out, convert = _one_hot([int(space.n)], np.asarray([int(space.start)]))
    elif isinstance(space, spaces.MultiDiscrete):
        start = getattr(space, "start", np.zeros_like(space.nvec))
        out, convert = _one_hot([int(n) for n in space.nvec.ravel()], np.asarray(start).ravel())
    else:
        raise EnvError(
            f"{where} has the space {space!r}, which cannot be handled; "
            "expected Box, Discrete, MultiDiscrete, MultiBinary or a Dict of these"
        )
    return Leaf(path, "", out, convert)


def _unbounded(size: int) -> spaces.Box:
    # Declared bounds are not kept: several backends declare wrong ones.
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def _to_vector(batch: Array) -> Array:
    with np.errstate(over="ignore"):  # what overflows float32 is reported as non-finite
        return np.array(batch.reshape(len(batch), -1), np.float32)


def _one_hot(sizes: list[int], start: Array) -> tuple[spaces.Box, Callable[[Array], Array]]:
    offset = np.concatenate([[0], np.cumsum(sizes)[:-1]]) - start
    width = sum(sizes)

    def convert(batch: Array) -> Array:
        out = np.zeros((len(batch), width), np.float32)
        np.put_along_axis(out, batch.reshape(len(batch), -1) + offset, 1.0, axis=1)
        return out

    return spaces.Box(0.0, 1.0, (width,), np.float32), convert


def _picture(
    space: spaces.Box, image_size: tuple[int, int] | None
) -> tuple[spaces.Box, Callable[[Array], Array]] | None:
    if len(space.shape) not in (2, 3):
        return None
    if space.dtype == np.uint8:
        scale = 1.0
    elif np.issubdtype(space.dtype, np.floating) and np.all(space.low == 0) and space.high.min() == space.high.max():
        if space.high.flat[0] not in (1.0, 255.0):
            return None
        scale = 255.0 / float(space.high.flat[0])
    else:
        return None
    channels_last = len(space.shape) == 3 and _channels_last(space.shape)
    if len(space.shape) == 2:
        channels, height, width = 1, *space.shape
    elif channels_last:
        height, width, channels = space.shape
    else:
        channels, height, width = space.shape
    if min(height, width) < MIN_PICTURE_SIDE:
        return None
    resize = image_size is not None and image_size != (height, width)
    is_uint8 = space.dtype == np.uint8

    def convert(batch: Array) -> Array:
        if batch.ndim == 3:
            batch = batch[:, None]
        elif channels_last:
            batch = np.moveaxis(batch, -1, 1)
        if not is_uint8:
            if not np.isfinite(batch).all():
                return np.array(batch, np.float32)  # handed on as it is, for the check that names it
            batch = np.rint(batch * scale).clip(0, 255)
        batch = np.array(batch, np.uint8, order="C")
        return _resize(batch, image_size) if resize else batch

    return spaces.Box(0, 255, (channels, *(image_size or (height, width))), np.uint8), convert


def _channels_last(shape: tuple[int, ...]) -> bool:
    first, _, last = shape
    if (first in (1, 3, 4)) != (last in (1, 3, 4)):
        return last in (1, 3, 4)
    if (shape[0] == shape[1]) != (shape[1] == shape[2]):  # the two equal sides are height and width
        return shape[0] == shape[1]
    return last < first


def _resize(batch: Array, size: tuple[int, int]) -> Array:
    height, width = size
    out = np.empty((*batch.shape[:2], height, width), np.uint8)
    for target, picture in zip(out, batch, strict=True):
        for channel in range(len(picture)):
            # BOX averages areas when shrinking and repeats pixels when enlarging.
            target[channel] = Image.fromarray(picture[channel]).resize((width, height), Image.Resampling.BOX)
    return out


class ActionMap:
    """Gives agents `Discrete(n)` or `Box(-1, 1, (A,), float32)`, and checks and converts what they send.

    Args:
        space: the backend's action space of one environment.

    Raises:
        EnvError: for a Box with infinite bounds or of integers, and for any space but Discrete and Box.
    """

    def __init__(self, space: spaces.Space):
        self.inner = space
        self.space: spaces.Discrete | spaces.Box
        if isinstance(space, spaces.Discrete):
            self.space = spaces.Discrete(int(space.n))
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                raise EnvError(f"the action space {space} has infinite bounds; expected finite ones, to rescale to")
            self.space = spaces.Box(-1.0, 1.0, (int(np.prod(space.shape, dtype=int)),), np.float32)
            self._low = space.low.astype(np.float64)
            self._range = space.high.astype(np.float64) - self._low
        else:
            raise EnvError(f"the action space {space} cannot be handled; expected Discrete or a Box of floats")

    def __call__(self, actions: Any, num_envs: int) -> Array:
        """Convert a batch, (N,) integers or (N, A) floats, to the backend's own dtype, shape and range.

        Raises:
            EnvError: for a wrong shape, dtype, range of integers, or non-finite floats.
        """
        actions = np.asarray(actions)
        if isinstance(self.space, spaces.Discrete):
            expected, kind = (num_envs,), np.integer
        else:
            expected, kind = (num_envs, *self.space.shape), np.floating
        if actions.shape != expected or not np.issubdtype(actions.dtype, kind):
            raise EnvError(
                f"actions have shape {actions.shape} and dtype {actions.dtype}; "
                f"expected shape {expected} and {'integers' if kind is np.integer else 'floats'}"
            )
        if kind is np.integer:
            wrong = (actions < 0) | (actions >= self.space.n)
            if wrong.any():
                env = int(wrong.argmax())
                raise EnvError(f"the action of env {env} is {actions[env]}; expected 0 to {self.space.n - 1}")
            return (actions + int(self.inner.start)).astype(self.inner.dtype)
        finite = np.isfinite(actions).reshape(num_envs, -1).all(1)
        if not finite.all():
            env = int(finite.argmin())
            raise EnvError(f"the action of env {env} is {actions[env]}; expected finite numbers")
        unit = (actions.clip(-1.0, 1.0).astype(np.float64) + 1.0) / 2.0
        return (self._low + self._range * unit.reshape(num_envs, *self.inner.shape)).astype(self.inner.dtype)
