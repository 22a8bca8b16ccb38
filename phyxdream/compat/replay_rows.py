"""A `Replay` of rows as they come: the first one fixes keys, shapes and dtypes, and batches give the same bits back.

A plain `Replay` wants its spec beforehand, knows the dtypes that models use, and repairs the flags of its batches.
Other code bases' buffers do none of this, so their keys are stored under names that mean nothing to the replay: the key
and its dtype, such as "rewards:float64", the values as integers of the same size where the replay lacks the dtype.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phyxdream.errors import CheckpointError
from phyxdream.replay import Replay

Spec = Mapping[str, tuple[tuple[int, ...], str]]

_STORED = {
    "float64": "int64",
    "complex64": "int64",
    "uint64": "int64",
    "uint32": "int32",
    "uint16": "int16",
    "bfloat16": "int16",
} | {name: name for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32")}

_STEP_BITS = 40  # a step_id of `Replay` has the env in the bits above


def stored_dtype(key: str, dtype: str) -> str:
    """Name of the dtype in which values of `dtype` are stored, bit for bit."""
    if dtype not in _STORED:
        raise TypeError(f"data: the key {key!r} has dtype {dtype}, expected one of {', '.join(sorted(_STORED))}")
    return _STORED[dtype]


class Rows:
    """The latest `length` rows of each of `num_envs` environments.

    Args:
        length: rows kept of an environment.
        num_envs: number of environments.
        seed, directory: as for `Replay`.
    """

    def __init__(self, length: int, num_envs: int, seed: int, directory: str | os.PathLike[str] | None):
        self.length, self.num_envs = length, num_envs
        self._seed, self._directory = seed, directory
        self.clear()

    def clear(self) -> None:
        """Forgets everything, what the first row fixed included."""
        self._replay: Replay | None = None
        self.spec: dict[str, tuple[tuple[int, ...], str]] = {}

    def fix(self, spec: Spec) -> None:
        """Makes room for rows of these keys: shape and dtype name of each."""
        # As latents, since these may be overwritten later.
        latents = {f"{key}:{dtype}": (shape, stored_dtype(key, dtype)) for key, (shape, dtype) in spec.items()}
        flags = {"is_first": ((), "bool")}
        capacity = self.length * self.num_envs
        self._take(Replay(flags, capacity, self.num_envs, self._seed, self._directory, latents=latents))

    def _take(self, replay: Replay) -> None:
        split = {name.rpartition(":"): shape for name, (shape, _) in replay.latents.items()}
        self.spec = {key: (shape, dtype) for (key, _, dtype), shape in split.items()}
        self._replay = replay

    def append(self, columns: Mapping[str, np.ndarray], env_ids: np.ndarray, begins: np.ndarray) -> None:
        """Stores `steps` rows of each of the n environments named.

        Args:
            columns: for every key of the spec (n, steps, *shape) in the stored dtype, checked by the caller.
            env_ids: (n,) int64, each at most once.
            begins: (n, steps) bool: the row begins an episode.
        """
        columns = {f"{key}:{self.spec[key][1]}": column for key, column in columns.items()} | {"is_first": begins}
        for t in range(begins.shape[1]):
            self._replay.add({name: column[:, t] for name, column in columns.items()}, env_ids)

    def sample(self, batch_size: int, length: int, *, cross_episodes: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Sequences as `Replay.sample` draws them: for every key (length, batch_size, *shape), and their step ids.

        Raises:
            ValueError: there is no such sequence.
        """
        if self._replay is None:
            raise ValueError("length: nothing has been added yet")
        batch = self._replay.sample(batch_size, length, cross_episodes=cross_episodes)
        values = {key: batch[f"{key}:{dtype}"].view(getattr(torch, dtype)) for key, (_, dtype) in self.spec.items()}
        return values, batch["step_id"]

    def stored(self) -> list[range]:
        """Per environment the numbers of its rows, counted from 0 in the order they came."""
        return [range(0)] * self.num_envs if self._replay is None else self._replay.stored_steps

    def total_added(self) -> int:
        """Rows ever added."""
        return 0 if self._replay is None else self._replay.total_added

    def ids(self, env: int, numbers: range) -> Tensor:
        """The step ids of these rows."""
        return torch.arange(numbers.start, numbers.stop) | env << _STEP_BITS

    def read(self, env: int, number: int, key: str) -> Tensor:
        """One row's value of a key, (*shape)."""
        name = f"{key}:{self.spec[key][1]}"
        return self._replay.read(env, number, 1, [name])[name][0].view(getattr(torch, self.spec[key][1]))

    def write(self, env: int, number: int, key: str, value: Tensor) -> None:
        """Overwrites one row's value of a key."""
        dtype = self.spec[key][1]
        stored = value.view(getattr(torch, stored_dtype(key, dtype)))
        self._replay.update(self.ids(env, range(number, number + 1)), **{f"{key}:{dtype}": stored[None]})

    # ---------------------------------------------------------------------------------------------------------- lasting

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a snapshot into a folder, as `Replay.save` does."""
        if self._replay is None:
            raise CheckpointError(f"cannot save the replay to {os.fspath(path)!r}: nothing has been added yet")
        self._replay.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over what `save` wrote for as many environments and rows.

        Raises:
            CheckpointError: as `Replay.load`, or the snapshot is of another kind of buffer. Nothing has changed then.
        """
        replay = Replay.load(path, self._directory)
        problem = None
        if list(replay.spec) != ["is_first"] or not all(":" in name for name in replay.latents):
            problem = f"a replay with the keys {', '.join([*replay.spec, *replay.latents])}, expected one of rows"
        elif (replay.num_envs, replay.capacity) != (self.num_envs, self.length * self.num_envs):
            problem = (f"{replay.num_envs} envs with {replay.capacity // replay.num_envs} rows each, "
                       f"expected {self.num_envs} with {self.length}")  # fmt: skip
        if problem:
            raise CheckpointError(f"cannot load the replay: got {problem}")
        self._take(replay)

    def snapshot(self) -> dict[str, Tensor]:
        """What `save` would write, as uint8 tensors by file name; empty if nothing has been added yet."""
        if self._replay is None:
            return {}
        with tempfile.TemporaryDirectory(dir=self._directory) as folder:
            path = Path(folder, "replay")
            self._replay.save(path)
            return {file.name: torch.from_numpy(np.fromfile(file, np.uint8)) for file in sorted(path.iterdir())}

    def restore(self, files: Mapping[str, Tensor]) -> None:
        """The inverse of `snapshot`."""
        if not files:
            return self.clear()
        with tempfile.TemporaryDirectory(dir=self._directory) as folder:
            for name, content in files.items():
                content.numpy().tofile(Path(folder, Path(name).name))
            self.load(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"length": self.length, "num_envs": self.num_envs, "seed": self._seed, "directory": self._directory,
                "files": self.snapshot()}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.pop("files")
        if state["directory"] is not None:  # this may be another machine
            os.makedirs(state["directory"], exist_ok=True)
        self.__init__(**state)
        self.restore(files)
