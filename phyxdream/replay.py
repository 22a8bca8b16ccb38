"""The sequence replay buffer: steps go in as they come from the environments, time-major torch batches come out.

Storage, sampling and snapshots are C++ (`csrc/replay/`); this file is the door: it checks, converts and names errors.
"""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from phyxdream import _C
from phyxdream.errors import CheckpointError, ConfigError, suggest

Spec = Mapping[str, tuple[Sequence[int], Any]]


class Replay:
    """Keeps the latest steps of several environments and samples sequences of them uniformly.

    Every environment has a ring of its own, contiguous in time, so a sequence is copied in one piece (two where the
    ring wraps). Sequences may cross episode borders: `is_first` inside them says where. Memory is taken as the buffer
    fills, not when it is made. All methods may be called from several threads at once.

    Args:
        spec: for every key of a step, its shape (of one environment) and dtype: "uint8", "int32", "int64",
            "float16", "float32" or "bool". `is_first` with shape () and dtype "bool" must be among the keys.
        capacity: steps kept in total over all environments; the oldest of the same environment make room. Environment
            i has room for `capacity // num_envs` steps, one more if `i < capacity % num_envs`.
        num_envs: number of environments.
        seed: seed of the sampling. The same seed and the same calls give the same batches.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
        ConfigError: `capacity` steps do not fit into this machine's memory.

    Example:
        >>> import numpy as np
        >>> replay = Replay({"reward": ((), "float32"), "is_first": ((), "bool")}, capacity=1000, num_envs=2)
        >>> for t in range(10):
        ...     replay.add({"reward": np.full(2, float(t)), "is_first": np.full(2, t == 0)})
        >>> batch = replay.sample(batch_size=4, length=5)
        >>> batch["reward"].shape, batch["step_id"].shape
        (torch.Size([5, 4]), torch.Size([5, 4]))
    """

    def __init__(self, spec: Spec, capacity: int, num_envs: int, seed: int = 0):
        normal = _normal_spec(spec)
        capacity = _integer("capacity", capacity)
        num_envs = _integer("num_envs", num_envs)
        if capacity < num_envs:
            raise ValueError(f"capacity: got {capacity}, expected at least one step for each of {num_envs} envs")
        seed = _integer("seed", seed, low=0)
        try:
            core = _C.ReplayBuffer(normal, capacity, num_envs, seed)
        except MemoryError as error:
            raise ConfigError(f"capacity: {error}") from None
        self._take(core)

    def _take(self, core: _C.ReplayBuffer) -> None:
        self._core = core
        self._spec = {name: (tuple(shape), dtype) for name, shape, dtype in core.spec}

    def add(self, step: Mapping[str, Any], env_ids: Any = None) -> None:
        """Stores one step of every environment, or of those in `env_ids`.

        Args:
            step: for every key of the spec an array (N, *shape): NumPy, CPU torch or anything NumPy understands.
                Another dtype of the same kind is converted (float64 to float32, int64 to int32). Arrays that are
                C-contiguous and have the spec's dtype are copied straight into the ring; all are free for reuse
                afterwards.
            env_ids: (N,) integers in any order, each at most once; None for all environments in order.

        Raises:
            ValueError: a key that is missing or unknown, a wrong shape, values the spec's dtype cannot hold, a reward
                that is not finite, environments that are unknown or named twice. Nothing has been stored then.
            TypeError: a dtype of another kind, or something that is no array.
        """
        if not self._core.add(step, env_ids):
            self._core.add(*self._converted(step, env_ids))

    def _converted(self, step: Mapping[str, Any], env_ids: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The step and its ids in the form the core stores, or the error that says why not."""
        if not isinstance(step, Mapping):
            raise TypeError(f"step: got {type(step).__name__}, expected a dict of arrays")
        ids = np.arange(self.num_envs) if env_ids is None else _array("env_ids", env_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"env_ids: got shape {ids.shape} {ids.dtype}, expected a list of integers")
        if missing := [name for name in self._spec if name not in step]:
            raise ValueError(f"step: no {', '.join(map(repr, missing))}; expected the keys {', '.join(self._spec)}")
        for name in step:
            if name not in self._spec:
                raise ValueError(f"step: unknown key {name!r}{suggest(str(name), self._spec)}")
        arrays = {
            name: _fit(name, _array(name, step[name]), (len(ids), *shape), np.dtype(dtype))
            for name, (shape, dtype) in self._spec.items()
        }
        return arrays, np.ascontiguousarray(ids, dtype=np.int64)

    def sample(self, batch_size: int, length: int) -> dict[str, torch.Tensor]:
        """Draws sequences, every stored stretch of `length` steps being equally likely, with replacement.

        Args:
            batch_size: number of sequences B.
            length: steps of a sequence T.

        Returns:
            New CPU tensors (T, B, *shape) of the spec's dtypes, and `step_id` (T, B) int64: a number that belongs to
            one stored step for ever and rises by one along a sequence.

        Raises:
            ValueError: no environment has `length` steps.
        """
        batch_size = _integer("batch_size", batch_size)
        length = _integer("length", length)
        batch = {
            name: torch.empty((length, batch_size, *shape), dtype=getattr(torch, dtype))
            for name, (shape, dtype) in self._spec.items()
        }
        step_id = torch.empty((length, batch_size), dtype=torch.int64)
        self._core.sample(batch_size, length, [value.data_ptr() for value in batch.values()], step_id.data_ptr())
        batch["step_id"] = step_id
        return batch

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything, the state of the sampling included, to one file.

        The new file is written beside `path`, flushed to the disk and then renamed: whatever happens, `path` is the
        old file or the new one, whole. Adding and sampling wait meanwhile.

        Raises:
            CheckpointError: the file could not be written (full disk, no permission, no such folder).
            TypeError, ValueError: `path` is no path.
        """
        try:
            self._core.save(_encoded(path))
        except _C.ReplaySnapshotError as error:
            raise CheckpointError(f"cannot save the replay to {os.fspath(path)!r}: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Replay:
        """The buffer that `save` wrote, with the same spec, capacity and steps; it samples on as that one would have.

        Raises:
            CheckpointError: the file is missing, truncated, corrupted or no replay snapshot, or its buffer does not
                fit into this machine's memory.
        """
        encoded = _encoded(path)
        try:
            core = _C.ReplayBuffer.load(encoded)
            _normal_spec({name: (shape, dtype) for name, shape, dtype in core.spec})
        except (_C.ReplaySnapshotError, MemoryError, ValueError) as error:
            raise CheckpointError(f"cannot load the replay from {os.fspath(path)!r}: {error}") from None
        replay = cls.__new__(cls)
        replay._take(core)
        return replay

    def num_sequences(self, length: int) -> int:
        """Number of different sequences of `length` steps that `sample` draws from."""
        return self._core.num_sequences(_integer("length", length))

    def __len__(self) -> int:
        """Steps stored now."""
        return self._core.size

    @property
    def total_added(self) -> int:
        """Steps ever added, those that have made room since included."""
        return self._core.total_added

    @property
    def capacity(self) -> int:
        """Steps kept at most, over all environments."""
        return self._core.capacity

    @property
    def num_envs(self) -> int:
        """Number of environments."""
        return self._core.num_envs

    @property
    def nbytes(self) -> int:
        """Bytes of the steps stored now."""
        return len(self) * self._core.step_bytes

    @property
    def spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every key."""
        return dict(self._spec)

    def __repr__(self) -> str:
        keys = ", ".join(f"{name} {dtype}{list(shape) or ''}" for name, (shape, dtype) in self._spec.items())
        full = self.capacity * self._core.step_bytes
        return (
            f"Replay({len(self):,} of {self.capacity:,} steps, {self.nbytes / 1e6:,.1f} of {full / 1e6:,.1f} MB, "
            f"{self.num_envs} envs: {keys})"
        )


def _integer(name: str, value: Any, low: int = 1) -> int:
    """`value` as an int in [low, 2**63)."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an integer")
    if not low <= number < 2**63:
        raise ValueError(f"{name}: got {number}, expected {low} or more{' and below 2**63' if number > 0 else ''}")
    return number


def _encoded(path: str | os.PathLike[str]) -> bytes:
    """The path as the system takes it, which ends at a null byte."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a name without null bytes")
    return encoded


def _normal_spec(spec: Spec) -> list[tuple[str, tuple[int, ...], str]]:
    """The spec as (key, shape, dtype name) triples; the core knows which dtypes there are."""
    if not isinstance(spec, Mapping):
        raise TypeError(f"spec: got {type(spec).__name__}, expected a dict of key: (shape, dtype)")
    normal = []
    for name, entry in spec.items():
        if not isinstance(name, str) or not name or not name.isprintable() or name == "step_id":
            raise ValueError(f"spec: the key {name!r} cannot be used, expected a name other than 'step_id'")
        try:
            shape, dtype = entry
            sides = tuple(shape)
            dtype = np.dtype(dtype).name
        except (TypeError, ValueError):
            raise TypeError(f"spec: key {name!r} has {reprlib.repr(entry)}, expected (shape, dtype)") from None
        normal.append((name, tuple(_integer(f"spec: a side of {name!r}", side) for side in sides), dtype))
    if ("is_first", (), "bool") not in normal:
        raise ValueError("spec: 'is_first' must be there as ((), 'bool')")
    return normal


def _array(name: str, value: Any) -> np.ndarray:
    """`value` as a NumPy array, without a copy where possible."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"{name}: got a tensor on {value.device}, expected CPU memory")
        value = value.detach()
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {reprlib.repr(value)}, which is no array: {error}") from None


def _fit(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`array` contiguous and in the spec's dtype, or the error that says why it cannot be."""
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    if not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {dtype} or another of its kind")
    with np.errstate(over="ignore"):
        fitted = np.ascontiguousarray(array, dtype=dtype)
    if dtype.kind == "f":
        lost = np.isinf(fitted).sum() > np.isinf(array).sum() if array.dtype != dtype else False
    else:
        lost = not np.array_equal(fitted, array)
    if lost:
        raise ValueError(f"{name}: holds values beyond the range of {dtype}, got dtype {array.dtype}")
    return fitted
