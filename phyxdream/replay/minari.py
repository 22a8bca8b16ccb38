"""Minari datasets: one becomes a `Replay`, and the episodes of a replay become one.

Minari keeps T+1 observations of an episode beside T actions, rewards and flags, action t being taken at observation t.
A replay step is what one observation brought, so here that action, its reward and its flags stand at observation t+1,
and the first step of an episode has zeros and `is_first`. (https://minari.farama.org, dataset standards)
"""

from __future__ import annotations

import heapq
import operator
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from phyxdream.envs.spaces import ActionMap, ObservationMap, flatten
from phyxdream.errors import ConfigError, EnvError, MissingDependency, suggest
from phyxdream.replay.buffer import Replay
from phyxdream.replay.inspect import find_episodes

Array = NDArray[Any]
Entry = tuple[tuple[int, ...], str]  # shape and dtype of one key

# The entry of a dataset's metadata in which `to_minari` leaves the shapes and dtypes of the replay.
NOTE = "phyxdream_replay"
_FLAGS = ("is_first", "is_last", "is_terminal")
_BATCH_BYTES = 64 << 20  # episodes handed to Minari at once


def from_minari(
    dataset: Any,
    *,
    num_envs: int = 1,
    capacity: int | str | None = None,
    keys: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    rescale_actions: bool = True,
    **options: Any,
) -> Replay:
    """A replay filled with the episodes of a Minari dataset.

    The keys are those that `phyxdream.envs.make` gives the same spaces: pictures are uint8 (C, H, W), all else is a
    flat float32 vector (`Discrete` one-hot), nested names are joined by "_", a lone picture is "image", a lone vector
    "state". `action` is int32 from 0 for `Discrete`, else float32; `reward` is float32. A dataset that `to_minari`
    wrote comes back in the shapes and dtypes of the replay it was written from. Nothing is downloaded.

    Args:
        dataset: a `minari.MinariDataset`, also a filtered one, or the id of one that is on this machine.
        num_envs: rings of the replay. Every episode goes to the one with the fewest steps so far.
        capacity: as in `Replay`; None makes room for the whole dataset. When it is too small the latest episodes
            are kept, with a warning, and an episode longer than a ring keeps its end.
        keys: names of the observations to import; None for all. Those that no replay can hold may be left out so.
        image_size: (height, width) that pictures are resized to by area averaging; None leaves them.
        rescale_actions: map actions from finite bounds to [-1, 1], the range agents act in. False keeps their units;
            a space without finite bounds always does.
        **options: the other arguments of `Replay`: seed, directory, latents, selector, limiter ...

    Raises:
        MissingDependency: Minari, or the package it stores data with, is not installed.
        ConfigError: there is no such dataset on this machine, or it has no episodes.
        EnvError: a space that cannot be handled (Tuple, Text, Graph ...), naming it.
        ValueError: an episode that breaks Minari's format (lengths, a flag before the end, numbers that are not
            finite), an unknown key, or an argument that `Replay` does not take.
    """
    minari = _minari()
    num_envs = operator.index(num_envs)
    if num_envs < 1:
        raise ValueError(f"num_envs: got {num_envs}, expected 1 or more")
    if isinstance(dataset, str):
        dataset = _local(minari, dataset)
    elif not isinstance(dataset, minari.MinariDataset):
        raise TypeError(f"dataset: got {type(dataset).__name__}, expected a minari.MinariDataset or the id of one")
    form = _Form.of(dataset, image_size, rescale_actions, keys)
    with _dependencies():
        chosen = dataset.episode_indices
        lengths = [int(entry["total_steps"]) + 1 for entry in dataset.storage.get_episode_metadata(chosen)]
    if not lengths:
        raise ConfigError(f"the Minari dataset {dataset.id!r} has no episodes")
    loads = _deal(lengths, num_envs)
    replay = Replay(form.spec, num_envs * max(loads) if capacity is None else capacity, num_envs, **options)
    if (total := sum(lengths)) > replay.capacity:
        # What would be overwritten anyway is not read: rings fill evenly but for the length of an episode.
        from_the_end = np.cumsum(lengths[::-1])
        needed = int(np.searchsorted(from_the_end, replay.capacity + num_envs * max(lengths))) + 1
        chosen, lengths = chosen[-needed:], lengths[-needed:]
    free = [(0, env) for env in range(num_envs)]
    ids = np.arange(num_envs)
    with _dependencies():
        for episode in dataset.iterate_episodes(chosen):
            steps = form.steps(episode)
            load, env = free[0]
            heapq.heapreplace(free, (load + len(steps["is_first"]), env))
            for t in range(len(steps["is_first"])):
                replay.add({key: value[t : t + 1] for key, value in steps.items()}, ids[env : env + 1])
    if len(replay) < total:
        warnings.warn(
            f"the Minari dataset {dataset.id!r} has {total:,} steps, the replay keeps the latest {len(replay):,}: "
            f"capacity is {replay.capacity:,} in {num_envs} rings",
            stacklevel=2,
        )
    return replay


def to_minari(
    replay: Replay,
    dataset_id: str,
    *,
    env: Any = None,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    rescale_actions: bool = True,
    **metadata: Any,
) -> Any:
    """Write the complete episodes of a replay as a new Minari dataset.

    Left out are episodes whose first or last step is not stored, and those without an action. An episode that was
    abandoned before `is_last` counts as truncated. Latents are not exported.

    Without spaces the dataset has a `Dict` of Boxes (pictures as (H, W, C), lossless) and the replay's own actions,
    and `from_minari` gives back the same steps bit for bit. With `env` or the spaces, observations and actions are
    turned back into what that environment shows and takes, so that the dataset is one of that environment.

    Args:
        replay: with the keys "action" and "reward". Every other key but the flags is an observation.
        dataset_id: "name-v0" or "namespace/name-v0"; must be new.
        env: the environment the steps are from, for `recover_environment`: a gymnasium id, `EnvSpec` or `Env`.
        observation_space: the space of one observation; None takes that of `env`.
        action_space: the space of one action; None takes that of `env`.
        rescale_actions: actions are in [-1, 1] and the given space has other bounds to map them to. False when they
            already have its units.
        **metadata: other arguments of `minari.create_dataset_from_buffers`: algorithm_name, author, author_email,
            code_permalink, description, data_format, eval_env, jpeg_encoding ...

    Returns:
        The `minari.MinariDataset`.

    Raises:
        MissingDependency: Minari is not installed, or too old to store pictures without loss.
        ConfigError: the replay has no complete episode, or the dataset exists already.
        EnvError: a given space that cannot be handled.
        ValueError: keys or values of the replay that do not fit the given spaces, or a malformed id.
    """
    minari = _minari()
    for key in ("action", "reward"):
        if key not in replay.spec:
            raise ValueError(f"replay: there is no key {key!r}; a Minari dataset needs actions and rewards")
    path = _new_path(minari, dataset_id)
    episodes = find_episodes(replay)
    episodes = episodes[episodes["begun"] & episodes["ended"] & (episodes["steps"] > 1)]
    if not len(episodes):
        raise ConfigError(f"the replay has no complete episode to export: {replay!r}")
    if env is not None:
        shown, taken = _env_spaces(env)
        observation_space = shown if observation_space is None else observation_space
        action_space = taken if action_space is None else action_space
    note: dict[str, Any] = {"spec": {key: [list(shape), dtype] for key, (shape, dtype) in replay.spec.items()}}
    observation_keys = [key for key in replay.spec if key not in ("action", "reward", *_FLAGS)]
    if not observation_keys:
        raise ValueError(f"replay: there is no observation among the keys {', '.join(replay.spec)}")
    if observation_space is None:
        observation_space, show = _own_observations(replay, observation_keys)
        note["pictures"] = [key for key in observation_keys if _is_picture(*replay.spec[key])]
    else:
        show = _shown_by(observation_space, replay, observation_keys)
    if action_space is None:
        action_space = _own_actions(replay, episodes)
        note["action"] = True
        act: Callable[[Array], Array] = lambda action: action.astype(action_space.dtype, copy=False)  # noqa: E731
    else:
        act = _taken_by(action_space, replay, rescale_actions)
    metadata = {"jpeg_encoding": False, **metadata}
    try:
        return _write(minari, replay, episodes, dataset_id, note, show, act, {
            "env": env, "observation_space": observation_space, "action_space": action_space, **metadata})  # fmt: skip
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # a dataset without all its episodes is none
        raise


# Import


@dataclass(frozen=True)
class _Form:
    """What the steps of a dataset look like in the replay."""

    name: str
    spec: dict[str, Entry]
    observe: Callable[[Any], dict[str, Array]]
    act: Callable[[Array], Array]

    @classmethod
    def of(cls, dataset: Any, image_size: tuple[int, int] | None, rescale: bool, keys: Sequence[str] | None) -> _Form:
        note = dataset.storage.metadata.get(NOTE)
        noted = {key: (tuple(shape), dtype) for key, (shape, dtype) in note["spec"].items()} if note else {}
        try:
            if note and "pictures" in note and image_size is None:
                observations = {key: noted[key] for key in noted if key not in ("action", "reward", *_FLAGS)}
                observe = _as_noted(observations, note["pictures"])
            else:
                space = dataset.observation_space if keys is None else _supported(dataset.observation_space)
                observe = ObservationMap(space, image_size)
                observations = {leaf.key: (leaf.space.shape, leaf.space.dtype.name) for leaf in observe.leaves}
            if note and "action" in note:
                action, act = noted["action"], lambda value: value
            else:
                action, act = _actions(dataset.action_space, rescale)
        except EnvError as error:
            hint = "; keys=[...] imports only the observations named" if keys is None else ""
            raise EnvError(f"the Minari dataset {dataset.id!r}: {error}{hint}") from None
        for key in keys or ():
            if key not in observations:
                raise ValueError(f"keys: {dataset.id!r} has no observation {key!r}{suggest(key, observations)}")
        spec = {key: entry for key, entry in observations.items() if keys is None or key in keys}
        spec |= {"action": action, "reward": ((), "float32"), **{key: ((), "bool") for key in _FLAGS}}
        if noted:  # flags that the replay did not have are not added, and its reward keeps its dtype
            spec = {key: noted.get(key, entry) if key == "reward" else entry
                    for key, entry in spec.items() if key in noted or key not in _FLAGS}  # fmt: skip
        return cls(dataset.id, spec, observe, act)

    def steps(self, episode: Any) -> dict[str, Array]:
        """Arrays (T+1, ...) of an episode of T actions."""
        where = f"episode {episode.id} of the Minari dataset {self.name!r}"
        length = len(episode.rewards)
        given = {".".join(("observations", *path)): value for path, value in flatten(episode.observations)}
        expected = {**dict.fromkeys(given, length + 1), "actions": length, "terminations": length,
                    "truncations": length}  # fmt: skip
        for name, value in {**given, **{key: getattr(episode, key) for key in expected if key not in given}}.items():
            if len(value) != expected[name]:
                raise ValueError(f"{where} has {len(value)} {name} beside {length} rewards; expected {expected[name]}")
        terminal = np.append(False, episode.terminations).astype(bool)
        last = terminal | np.append(False, episode.truncations).astype(bool)
        if last[:-1].any():
            raise ValueError(
                f"{where} has ended at action {int(last.argmax())} of {length}; expected no termination or truncation "
                "before the last (filter_episodes leaves such episodes out)"
            )
        last[-1] = True
        action = self.act(np.asarray(episode.actions))
        steps = {
            **self.observe(episode.observations),
            "action": np.concatenate([np.zeros_like(action[:1], shape=(1, *action.shape[1:])), action]),
            "reward": np.append(0.0, episode.rewards),
            "is_first": np.arange(length + 1) == 0,
            "is_last": last,
            "is_terminal": terminal,
        }
        # What the spec cannot hold is found out by `Replay.add`; infinities are found here, where they have a name.
        with np.errstate(over="ignore"):
            steps = {key: _cast(steps[key], *self.spec[key]) for key in self.spec}
        for key, value in steps.items():
            if value.dtype.kind == "f" and not (finite := np.isfinite(value.reshape(length + 1, -1)).all(1)).all():
                raise ValueError(f"{where}: {key} is not finite at observation {int(finite.argmin())}")
        return steps


def _cast(value: Array, shape: tuple[int, ...], dtype: str) -> Array:
    # NumPy has no bfloat16: the replay rounds float32 to it.
    return np.ascontiguousarray(value, "float32" if dtype == "bfloat16" else dtype).reshape(len(value), *shape)


def _supported(space: spaces.Space) -> spaces.Space:
    """The space without the entries that no replay can hold (Text, Sequence ...)."""
    if not isinstance(space, spaces.Dict):
        return space
    kinds = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict)
    return spaces.Dict({key: _supported(inner) for key, inner in space.items() if isinstance(inner, kinds)})


def _as_noted(entries: dict[str, Entry], pictures: Sequence[str]) -> Callable[[Any], dict[str, Array]]:
    def observe(observations: Mapping[str, Array]) -> dict[str, Array]:
        return {key: np.moveaxis(observations[key], -1, 1) if key in pictures else observations[key]
                for key in entries}  # fmt: skip

    return observe


def _actions(space: spaces.Space, rescale: bool) -> tuple[Entry, Callable[[Array], Array]]:
    if isinstance(space, spaces.Discrete):
        return ((), "int32"), lambda action: action - int(space.start)
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        ActionMap(space)  # raises
    entry = ((int(np.prod(space.shape, dtype=int)),), "float32")
    if not rescale or _is_unit(space) or not _is_bounded(space):
        return entry, lambda action: action
    low = space.low.astype(np.float64)
    size = space.high.astype(np.float64) - low
    # Where the bounds meet there is one action, and no scale.
    return entry, lambda action: np.where(size > 0, 2.0 * (action - low) / np.where(size > 0, size, 1.0) - 1.0, 0.0)


def _deal(lengths: Sequence[int], num_envs: int) -> list[int]:
    """Steps of every ring when each episode goes to the one that has the fewest."""
    loads = [0] * num_envs
    for length in lengths:
        heapq.heapreplace(loads, loads[0] + length)
    return loads


# Export


def _write(
    minari: Any, replay: Replay, episodes: Array, dataset_id: str, note: dict[str, Any],
    show: Callable[[dict[str, Array]], Any], act: Callable[[Array], Array], arguments: dict[str, Any],
) -> Any:  # fmt: skip
    buffers = _buffers(replay, episodes, show, act)
    dataset = None
    with _dependencies():
        for batch in _batches(buffers):
            if dataset is None:
                dataset = minari.create_dataset_from_buffers(dataset_id, batch, **arguments)
            else:
                dataset.update_dataset_from_buffer(batch)
        assert dataset is not None
        dataset.storage.update_metadata({NOTE: note})
    return dataset


def _buffers(
    replay: Replay, episodes: Array, show: Callable[[dict[str, Array]], Any], act: Callable[[Array], Array]
) -> Iterator[tuple[Any, int]]:
    """A Minari episode buffer for each of `episodes`, and its bytes."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    for episode in episodes:
        steps = _read(replay, int(episode["env"]), int(episode["start"]), int(episode["steps"]), list(replay.spec))
        terminal = steps.get("is_terminal", np.zeros(episode["steps"], bool))[1:]
        if terminal[:-1].any():
            raise ValueError(
                f"replay: is_terminal is set at step {episode['start'] + 1 + terminal.argmax()} of env {episode['env']}"
                ", after which the episode goes on"
            )
        truncated = np.zeros(len(terminal), bool)
        truncated[-1] = not terminal[-1]
        buffer = EpisodeBuffer(
            observations=show(steps), actions=act(steps["action"][1:]), rewards=steps["reward"][1:],
            terminations=terminal, truncations=truncated, infos={},
        )  # fmt: skip
        yield buffer, sum(value.nbytes for value in steps.values())


def _batches(buffers: Iterator[tuple[Any, int]]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    held = 0
    for buffer, size in buffers:
        batch.append(buffer)
        held += size
        if held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _read(replay: Replay, env: int, first: int, count: int, keys: Sequence[str]) -> dict[str, Array]:
    return {
        key: (value.float() if replay.spec[key][1] == "bfloat16" else value).numpy()
        for key, value in replay.read(env, first, count, keys).items()
    }


def _own_observations(replay: Replay, keys: Sequence[str]) -> tuple[spaces.Dict, Callable[[dict[str, Array]], Any]]:
    """The Dict space that holds these keys as they are, and what puts them into it."""
    boxes = {}
    for key in keys:
        shape, dtype = replay.spec[key]
        if _is_picture(shape, dtype):
            shape = (*shape[1:], shape[0])
        boxes[key] = _box(shape, dtype)

    def show(steps: dict[str, Array]) -> dict[str, Array]:
        return {key: (np.moveaxis(steps[key], 1, -1) if _is_picture(*replay.spec[key]) else steps[key]).astype(
                boxes[key].dtype, copy=False) for key in keys}  # fmt: skip

    return spaces.Dict(boxes), show


def _own_actions(replay: Replay, episodes: Array) -> spaces.Space:
    shape, dtype = replay.spec["action"]
    floating = np.issubdtype(_numpy(dtype), np.floating)
    if floating or shape:
        unit = floating and _extent(replay, episodes)[1] <= 1
        return spaces.Box(-1.0, 1.0, shape, _numpy(dtype)) if unit else _box(shape, dtype)
    low, high = _extent(replay, episodes, absolute=False)
    return spaces.Discrete(int(high) + 1) if low >= 0 else _box(shape, dtype)


def _extent(replay: Replay, episodes: Array, absolute: bool = True) -> tuple[float, float]:
    """Smallest and largest action of these episodes, or of its absolute values."""
    low, high = np.inf, -np.inf
    for episode in episodes:
        env, start, steps = (int(episode[name]) for name in ("env", "start", "steps"))
        action = _read(replay, env, start, steps, ["action"])["action"][1:]
        action = np.abs(action) if absolute else action
        low, high = min(low, action.min()), max(high, action.max())
    return low, high


def _shown_by(space: spaces.Space, replay: Replay, keys: Sequence[str]) -> Callable[[dict[str, Array]], Any]:
    """What turns steps of the replay back into observations of `space`."""
    shown = ObservationMap(space)
    leaves = list(zip(shown.leaves, (leaf for _, leaf in flatten(space)), strict=True))
    for leaf in shown.leaves:
        expected = (leaf.space.shape, leaf.space.dtype.name)
        if leaf.key not in keys:
            raise ValueError(
                f"observation_space: the replay has no key {leaf.key!r}{suggest(leaf.key, keys)} (its observations are "
                f"{', '.join(keys)})"
            )
        if replay.spec[leaf.key] != expected:
            raise ValueError(f"observation_space: {leaf.key} is {_words(replay.spec[leaf.key])} in the replay, "
                             f"but {_words(expected)} in that space")  # fmt: skip
    if foreign := set(keys) - {leaf.key for leaf in shown.leaves}:
        raise ValueError(f"observation_space: it has no place for the replay's {', '.join(sorted(foreign))}")

    def show(steps: dict[str, Array]) -> Any:
        tree: dict[str, Any] = {}
        for leaf, inner in leaves:
            value = _restored(inner, leaf.space, steps[leaf.key])
            if not leaf.path:
                return value
            node = tree
            for name in leaf.path[:-1]:
                node = node.setdefault(name, {})
            node[leaf.path[-1]] = value
        return tree

    return show


def _restored(inner: spaces.Space, space: spaces.Box, value: Array) -> Array:
    """The inverse of what `ObservationMap` did to one entry."""
    if isinstance(inner, spaces.Discrete):
        return value.argmax(1).astype(inner.dtype) + inner.start
    if isinstance(inner, spaces.MultiDiscrete):
        hot = np.split(value, np.cumsum(inner.nvec.ravel())[:-1], axis=1)
        found = np.stack([part.argmax(1) for part in hot], 1).reshape(len(value), *inner.shape)
        return (found + getattr(inner, "start", 0)).astype(inner.dtype)
    if space.dtype == np.uint8:
        if inner.shape != space.shape:
            value = value[:, 0] if len(inner.shape) == 2 else np.moveaxis(value, 1, -1)
        if inner.dtype != np.uint8:
            value = value * (float(inner.high.flat[0]) / 255.0)
    elif np.issubdtype(inner.dtype, np.integer):
        value = np.rint(value)
    return value.reshape(len(value), *inner.shape).astype(inner.dtype)


def _taken_by(space: spaces.Space, replay: Replay, rescale: bool) -> Callable[[Array], Array]:
    """What turns actions of the replay into actions of `space`."""
    shape, dtype = replay.spec["action"]
    integers = np.issubdtype(_numpy(dtype), np.integer)
    if isinstance(space, spaces.Discrete) and not (shape == () and integers):
        raise ValueError(f"action_space: got {space}, but the replay's actions are {_words((shape, dtype))}")
    if isinstance(space, spaces.Box):
        if integers or int(np.prod(shape, dtype=int)) != int(np.prod(space.shape, dtype=int)):
            raise ValueError(f"action_space: got {space}, but the replay's actions are {_words((shape, dtype))}")
        if not rescale or _is_unit(space) or not _is_bounded(space):
            return lambda action: action.reshape(len(action), *space.shape).astype(space.dtype)
    convert = ActionMap(space)

    def act(action: Array) -> Array:
        if not integers:
            if np.abs(action).max() > 1:
                raise ValueError(
                    "action_space: the replay has actions outside [-1, 1], which cannot be mapped to its bounds; "
                    "give rescale_actions=False if they are in its units already"
                )
            action = action.reshape(len(action), -1)
        return convert(action, len(action))

    return act


def _env_spaces(env: Any) -> tuple[spaces.Space, spaces.Space]:
    if isinstance(env, gymnasium.Env):
        return env.observation_space, env.action_space
    try:
        made = gymnasium.make(env)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise EnvError(f"env: {env!r} could not be made: {error}") from error
    with made:
        return made.observation_space, made.action_space


def _box(shape: tuple[int, ...], dtype: str) -> spaces.Box:
    kind = np.dtype(np.int8) if dtype == "bool" else _numpy(dtype)
    if kind.kind == "f":
        return spaces.Box(-np.inf, np.inf, shape, kind)
    limits = np.iinfo(kind)
    return spaces.Box(limits.min, limits.max, shape, kind)


def _numpy(dtype: str) -> np.dtype:
    return np.dtype(np.float32) if dtype == "bfloat16" else np.dtype(dtype)


def _is_picture(shape: tuple[int, ...], dtype: str) -> bool:
    """A (C, H, W) picture, which Minari and its viewers expect as (H, W, C)."""
    return dtype == "uint8" and len(shape) == 3 and shape[0] < min(shape[1:])


def _is_bounded(space: spaces.Box) -> bool:
    return bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())


def _is_unit(space: spaces.Box) -> bool:
    return bool((space.low == -1).all() and (space.high == 1).all())


def _words(entry: Entry) -> str:
    shape, dtype = entry
    return f"{dtype} {list(shape)}" if shape else f"one {dtype}"


# Minari itself


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise MissingDependency(
            f"Minari datasets need the package minari: pip install 'phyxdream[minari]' ({error})"
        ) from error
    return minari


class _dependencies:
    """Context manager: a storage package that Minari misses becomes one sentence."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ImportError):
            raise MissingDependency(f"Minari cannot read or write this dataset: {error}") from error


def _local(minari: Any, dataset_id: str) -> Any:
    with _dependencies():
        try:
            return minari.load_dataset(dataset_id)
        except FileNotFoundError:
            near = suggest(dataset_id, minari.list_local_datasets())
            raise ConfigError(
                f"there is no Minari dataset {dataset_id!r} on this machine{near} "
                f"(`minari download {dataset_id}` fetches one that Farama hosts)"
            ) from None


def _new_path(minari: Any, dataset_id: str) -> Path:
    """Where the dataset will lie; raises when it cannot."""
    from minari.storage import get_dataset_path

    if "jpeg_encoding" not in signature(minari.create_dataset_from_buffers).parameters:
        raise MissingDependency(
            f"exporting needs Minari 0.5.4 or newer, which stores pictures without loss; {minari.__version__} is here"
        )
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", dataset_id):
        raise ValueError(f"dataset_id: got {dataset_id!r}, expected 'name-v0' or 'namespace/name-v0'")
    path = get_dataset_path(dataset_id)
    if path.exists():
        raise ConfigError(f"the Minari dataset {dataset_id!r} exists already at {path}; choose another name or version")
    return path
