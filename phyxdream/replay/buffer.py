"""The sequence replay buffer: steps go in as they come from the environments, time-major torch batches come out.

Storage, selection, copying and snapshots are C++ (`csrc/replay/`); this file is the door: it checks, converts and names
errors.
"""

from __future__ import annotations

import math
import operator
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phyxdream import _C
from phyxdream.errors import CheckpointError, ConfigError, suggest
from phyxdream.replay.loader import Loader, translated_errors
from phyxdream.replay.memory import BatchMemory
from phyxdream.replay.selectors import Limiter, Selector, Uniform, selector_from, selector_options

Spec = Mapping[str, tuple[Sequence[int], Any]]

# What batches hold besides the keys of the spec.
RESERVED = ("step_id", "probability", "mask", "consecutive")


class Replay:
    """Keeps the latest steps of several environments and samples sequences of them.

    Every environment has a ring of its own, contiguous in time, so a sequence is copied in one piece (two where the
    ring wraps). Memory is taken as the buffer fills, not when it is made. Any number of threads may add, sample, update
    and save at once: every sequence that is sampled is whole.

    Args:
        spec: for every key of a step, its shape (of one environment) and dtype: "uint8", "int8", "int16", "int32",
            "int64", "float16", "bfloat16", "float32" or "bool". `is_first` with shape () and dtype "bool" must be among
            the keys; `is_last`, if it is there, must be the same.
        capacity: steps kept in total over all environments, or their size in memory as a string such as "8 GB" or
            "500 MiB"; the oldest of the same environment make room. Environment i has room for
            `capacity // num_envs` steps, one more if `i < capacity % num_envs`.
        num_envs: number of environments.
        seed: seed of the sampling. The same seed and the same calls give the same batches.
        directory: keep the steps in a file in this folder, mapped into memory, instead of in RAM. The file has no name
            and is gone with the process; `save` is what lasts. Its disk space is reserved at once.
        latents: further keys, which `update` overwrites, such as the model's state at a step. `add` may leave them
            out: then they are zero at first.
        selector: which sequences are sampled: `Uniform()`, `Recency()`, `Prioritized()`, `Curious()`, or a mixture
            as a dict with shares: `{Uniform(): 0.5, Prioritized(): 0.3, Recency(): 0.2}`.
        limiter: keeps adding and sampling threads in step; None: neither waits for the other.
        prefault: touch all memory now, so that the first fill is as fast as later ones.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
        ConfigError: `capacity` steps do not fit into this machine's memory, or the directory's disk.

    Example:
        >>> import numpy as np
        >>> replay = Replay({"reward": ((), "float32"), "is_first": ((), "bool")}, capacity=1000, num_envs=2)
        >>> for t in range(10):
        ...     replay.add({"reward": np.full(2, float(t)), "is_first": np.full(2, t == 0)})
        >>> batch = replay.sample(batch_size=4, length=5)
        >>> batch["reward"].shape, batch["step_id"].shape
        (torch.Size([5, 4]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        spec: Spec,
        capacity: int | str,
        num_envs: int,
        seed: int = 0,
        directory: str | os.PathLike[str] | None = None,
        *,
        latents: Spec | None = None,
        selector: Selector | Mapping[Selector, float] = Uniform(),  # noqa: B008 (frozen)
        limiter: Limiter | None = None,
        prefault: bool = False,
    ):
        normal = [(*entry, False) for entry in _normal_spec("spec", spec)]
        if ("is_first", (), "bool", False) not in normal:
            raise ValueError("spec: 'is_first' must be there as ((), 'bool')")
        if "is_last" in spec and ("is_last", (), "bool", False) not in normal:
            raise ValueError("spec: 'is_last' must be ((), 'bool')")
        for name, shape, dtype in _normal_spec("latents", latents or {}):
            if name in spec:
                raise ValueError(f"latents: the key {name!r} is in spec already")
            normal.append((name, shape, dtype, True))
        num_envs = integer("num_envs", num_envs)
        if isinstance(capacity, str):
            capacity = _steps_in(capacity, normal)
        capacity = integer("capacity", capacity)
        if capacity < num_envs:
            raise ValueError(f"capacity: got {capacity}, expected at least one step for each of {num_envs} envs")
        seed = integer("seed", seed, low=0)
        if limiter is not None and not isinstance(limiter, Limiter):
            raise TypeError(f"limiter: got {limiter!r}, expected a Limiter or None")
        options = selector_options(selector)
        folder = _folder(directory)
        try:
            core = _C.ReplayBuffer(normal, capacity, num_envs, seed, folder, bool(prefault), options, _numbers(limiter))
        except MemoryError as error:
            raise ConfigError(f"capacity: {error}") from None
        self._take(core)

    def _take(self, core: _C.ReplayBuffer) -> None:
        self._core = core
        self._fields = {name: (tuple(shape), dtype) for name, shape, dtype, _ in core.spec}
        self._latents = [name for name, _, _, latent in core.spec if latent]
        self._memory = BatchMemory()
        self._weighted = not isinstance(self.selector, Uniform)

    # -------------------------------------------------------------------------------------------------------- adding

    def add(self, step: Mapping[str, Any], env_ids: Any = None) -> None:
        """Stores one step of every environment, or of those in `env_ids`.

        Args:
            step: for every key of the spec an array (N, *shape): NumPy, CPU torch or anything NumPy understands, of any
                strides. Another dtype of the same kind is converted (float64 to float32, int64 to int32). Where the
                spec has (C, H, W) with 1, 3 or 4 channels, pictures (N, H, W, C) are taken too. Latents may be left
                out. All arrays are free for reuse afterwards.
            env_ids: (N,) integers in any order, each at most once; None for all environments in order.

        Raises:
            ValueError: a key that is missing or unknown, a wrong shape, values the spec's dtype cannot hold, a reward
                that is not finite, environments that are unknown or named twice. Nothing has been stored then.
            TypeError: a dtype of another kind, or something that is no array.
            TimeoutError, ReplayClosed: while the limiter let it wait.
        """
        with translated_errors():
            if not self._core.add(step, env_ids):
                self._core.add(*self._converted(step, env_ids))

    def _converted(self, step: Mapping[str, Any], env_ids: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The step and its ids in the form the core stores, or the error that says why not."""
        if not isinstance(step, Mapping):
            raise TypeError(f"step: got {type(step).__name__}, expected a dict of arrays")
        ids = np.arange(self.num_envs) if env_ids is None else _array("env_ids", env_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"env_ids: got shape {ids.shape} {ids.dtype}, expected a list of integers")
        needed = [name for name in self._fields if name not in self._latents]
        if missing := [name for name in needed if name not in step]:
            raise ValueError(f"step: no {', '.join(map(repr, missing))}; expected the keys {', '.join(needed)}")
        for name in step:
            if name not in self._fields:
                raise ValueError(f"step: unknown key {name!r}{suggest(str(name), self._fields)}")
        arrays = {
            name: _fit(name, step[name], (len(ids), *shape), dtype)
            for name, (shape, dtype) in self._fields.items()
            if name in step
        }
        return arrays, np.ascontiguousarray(ids, dtype=np.int64)

    # ------------------------------------------------------------------------------------------------------ sampling

    def sample(
        self,
        batch_size: int,
        length: int,
        *,
        online: bool = False,
        cross_episodes: bool = True,
        force_is_first: bool = False,
    ) -> dict[str, Tensor]:
        """Draws sequences of consecutive steps of one environment, with replacement.

        `is_last` is true in a batch also where the environment's next step begins an episode: an episode that was
        abandoned ends at its last step.

        Args:
            batch_size: number of sequences B.
            length: steps of a sequence T.
            online: first the sequences that were never handed out this way: the environments take turns, each giving
                its steps in order in pieces of `length` that do not overlap. What has made room is passed over. When
                there are none, the selector draws (the online queue of danijar/dreamerv3).
            cross_episodes: a sequence may go on into the next episode; if not, it lies in one. Among those, `Uniform`
                keeps all equally likely.
            force_is_first: set `is_first[0]`, for models that begin every sequence in their initial state.

        Returns:
            New CPU tensors (T, B, *shape) of the spec's and the latents' dtypes, and `step_id` (T, B) int64: a number
            that belongs to one stored step for ever and rises by one along a sequence. With a selector other than
            `Uniform`, and unless `cross_episodes=False`, also `probability` (B,) float64: how likely the selector was
            to draw this sequence, for importance weights.

        Raises:
            ValueError: there is no such sequence.
            TimeoutError, ReplayClosed: while the limiter let it wait.
        """
        batch_size = integer("batch_size", batch_size)
        length = integer("length", length)
        batch, addresses = self._empty_batch(batch_size, length, probability=self._weighted and cross_episodes)
        with translated_errors():
            options = _C.ReplaySampleOptions(online, cross_episodes, force_is_first)
            self._core.sample(batch_size, length, options, addresses)
        return batch

    def sample_episodes(self, batch_size: int) -> dict[str, Tensor]:
        """Draws whole episodes, each that is stored from its first step to its last equally likely, with replacement.

        Returns:
            As `sample`, T being the steps of the longest; shorter ones are filled up with zeros, `step_id` with -1.
            `mask` (T, B) bool is true where there is a step.

        Raises:
            ValueError: no episode is stored whole.
        """
        batch_size = integer("batch_size", batch_size)
        with translated_errors():
            drawn = _C.ReplayEpisodes(self._core, batch_size)
        batch, addresses = self._empty_batch(batch_size, drawn.length, mask=True)
        drawn.copy(addresses)
        return batch

    def loader(
        self,
        batch_size: int,
        length: int,
        *,
        prefetch: int = 2,
        threads: int = 1,
        device: str | torch.device = "cpu",
        consecutive: int = 1,
        context: int = 0,
        online: bool = False,
        cross_episodes: bool = True,
        force_is_first: bool = False,
    ) -> Loader:
        """An endless iterator over batches that C++ threads make ahead of time, in memory that is used again.

        A batch on the CPU is valid until the next one is taken. Close the loader, or use it as a context manager.

        Args:
            batch_size, length, online, cross_episodes, force_is_first: as for `sample`.
            prefetch: batches made ahead; 0: each is made when it is asked for, by the thread that asks.
            threads: C++ threads that copy. The batches do not depend on it.
            device: with "cuda", batches go through pinned memory on a stream of their own, one ahead.
            consecutive: cut sequences of `consecutive * length + context` steps into that many batches, given one after
                the other, each with `consecutive`, its place from 0: a recurrent state can be carried on from one to
                the next.
            context: so many steps more at the beginning of every batch; within consecutive ones they are the last of
                the batch before.

        Raises:
            ValueError, TypeError: an argument that cannot be used. Iterating raises what `sample` raises.
        """
        batch_size, length = integer("batch_size", batch_size), integer("length", length)
        prefetch, context = integer("prefetch", prefetch, low=0), integer("context", context, low=0)
        threads, consecutive = integer("threads", threads), integer("consecutive", consecutive)
        try:
            device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device: got {device!r}, expected 'cpu' or 'cuda'") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: got {str(device)!r}, expected 'cpu' or 'cuda'")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: got {str(device)!r}, but no CUDA device is available")
        if online and not cross_episodes:
            raise ValueError("online: fresh sequences cross episodes, expected cross_episodes=True")
        options = _C.ReplaySampleOptions(online, cross_episodes, force_is_first)
        weighted = self._weighted and cross_episodes
        return Loader(self, batch_size, length, options, prefetch, threads, device, consecutive, context, weighted)

    def _empty_batch(
        self, batch_size: int, length: int, pinned: bool = False, mask: bool = False, probability: bool = False
    ) -> tuple[dict[str, Tensor], tuple[list[int], int, int, int]]:
        """Uninitialised tensors for a batch, and their addresses as the core takes them."""
        specs = {name: ((length, batch_size, *shape), getattr(torch, dtype))
                 for name, (shape, dtype) in self._fields.items()}  # fmt: skip
        specs["step_id"] = (length, batch_size), torch.int64
        if mask:
            specs["mask"] = (length, batch_size), torch.bool
        if probability:
            specs["probability"] = (batch_size,), torch.float64
        if pinned:
            batch = {k: torch.empty(shape, dtype=dtype, pin_memory=True) for k, (shape, dtype) in specs.items()}
        else:
            batch = self._memory.tensors(specs)
        address = lambda name: batch[name].data_ptr() if name in batch else 0  # noqa: E731
        columns = [batch[name].data_ptr() for name in self._fields]
        return batch, (columns, address("step_id"), address("probability"), address("mask"))

    def read(self, env: int, first: int, count: int, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Steps [first, first + count) of one environment, numbered from 0 in the order they were added.

        Args:
            env: environment.
            first, count: which steps; `stored_steps` tells which there are.
            keys: which keys of spec and latents; None for all.

        Returns:
            New CPU tensors (count, *shape).

        Raises:
            ValueError: an unknown environment or key, or steps that are not stored.
        """
        env, first, count = integer("env", env, 0), integer("first", first, 0), integer("count", count, 0)
        if env >= self.num_envs:
            raise ValueError(f"env: got {env}, expected 0 to {self.num_envs - 1}")
        names = list(self._fields)
        chosen = names if keys is None else list(keys)
        for name in chosen:
            if name not in self._fields:
                raise ValueError(f"keys: unknown key {name!r}{suggest(str(name), names)}")
        begin, end = self._core.spans()[env]
        result = {}
        for name in chosen:
            there = begin <= first and first + count <= end  # before memory is asked for
            if there:
                shape, dtype = self._fields[name]
                result[name] = torch.empty((count, *shape), dtype=getattr(torch, dtype))
                there = self._core.read(env, first, count, names.index(name), result[name].data_ptr())
            if not there:
                asked = f"steps {first} to {first + count} of env {env}"
                raise ValueError(f"first: got {asked}, which has {begin} to {end}")
        return result

    # ---------------------------------------------------------------------------------------------------- writing back

    def update(self, step_id: Any, **latents: Any) -> int:
        """Overwrites latents of steps that were sampled.

        Args:
            step_id: int64 array of any shape S, as batches have it. Steps that are no longer stored, and -1, are passed
                over; of a step that is named twice, the later entry stays.
            latents: arrays (*S, *shape), converted to the dtype they are stored in (float32 to bfloat16, for example).
                Tensors may be on a GPU.

        Returns:
            How many entries were written.

        Raises:
            ValueError, TypeError: an unknown key, a wrong shape or dtype. Nothing has been written then.
        """
        ids = _ids(step_id)
        if not latents:
            raise ValueError(
                f"latents: got none, expected some of {', '.join(self._latents) or '(this replay has none)'}"
            )
        fields, tensors = [], []
        for name, value in latents.items():
            if name not in self._latents:
                raise ValueError(f"latents: unknown key {name!r}{suggest(name, self._latents)}")
            shape, dtype = self._fields[name]
            tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(_array(name, value))
            if tensor.shape != (*ids.shape, *shape):
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {(*ids.shape, *shape)}")
            stored = getattr(torch, dtype)
            _check_fits(name, tensor, stored)
            fields.append(list(self._fields).index(name))
            tensors.append(tensor.to("cpu", stored).contiguous())
        return self._core.update(ids.data_ptr(), ids.numel(), fields, [tensor.data_ptr() for tensor in tensors])

    def prioritize(self, step_id: Any, priority: Any) -> int:
        """Sets what `Prioritized` or `Curious` draw by.

        Args:
            step_id: int64 array of any shape S, as batches have it; steps that are no longer stored are passed over.
            priority: finite numbers of at least 0 (S): priorities for `Prioritized`, losses for `Curious`.

        Returns:
            How many entries were still stored.

        Raises:
            ValueError: another selector, a wrong shape, a number that is negative or not finite.
        """
        options = self._core.selector
        if not options["priority"]:
            raise ValueError(f"priority: the selector is {self.selector}, expected one with Prioritized() or Curious()")
        ids = _ids(step_id)
        values = priority.detach() if isinstance(priority, Tensor) else torch.from_numpy(_array("priority", priority))
        if values.shape != ids.shape:
            raise ValueError(f"priority: got shape {tuple(values.shape)}, expected {tuple(ids.shape)}")
        values = values.to("cpu", torch.float64).contiguous()
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(
                "priority: got a number that is negative or not finite, expected finite ones of at least 0"
            )
        return self._core.prioritize(ids.data_ptr(), ids.numel(), values.data_ptr())

    # ------------------------------------------------------------------------------------------------------- lasting

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a snapshot of everything, the state of the sampling included, into the folder `path`.

        Steps that the last snapshot of this buffer holds are not written again: their files are kept, or hard-linked
        from there. Whatever happens, the folder holds the old snapshot or the new one, whole. Other threads go on
        meanwhile.

        Raises:
            CheckpointError: it could not be written (full disk, no permission, a folder with other files in it).
            TypeError, ValueError: `path` is no path.
        """
        try:
            self._core.save(_encoded(path))
        except _C.ReplaySnapshotError as error:
            raise CheckpointError(f"cannot save the replay to {os.fspath(path)!r}: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None) -> Replay:
        """The buffer that `save` wrote: the same configuration and steps, and it samples on as that one would have.

        Args:
            path: the snapshot's folder.
            directory: as for `Replay`.

        Raises:
            CheckpointError: the snapshot is missing, truncated, corrupted or something else, or its buffer does not
                fit into this machine's memory.
        """
        encoded = _encoded(path)
        try:
            replay = cls.__new__(cls)
            replay._take(_C.ReplayBuffer.load(encoded, _folder(directory)))
        except (_C.ReplaySnapshotError, MemoryError) as error:
            raise CheckpointError(f"cannot load the replay from {os.fspath(path)!r}: {error}") from None
        except UnicodeDecodeError:
            raise CheckpointError(
                f"cannot load the replay from {os.fspath(path)!r}: 'replay.index' is corrupted: a name is no text"
            ) from None
        return replay

    def close(self) -> None:
        """Ends every wait for the limiter with `ReplayClosed`, now and later. What is stored stays readable."""
        self._core.close()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------- looking at it

    def ready(self, batch_size: int, length: int) -> bool:
        """Whether `sample` would return without waiting: some environment has `length` steps, the limiter agrees."""
        return self._core.ready(integer("batch_size", batch_size), integer("length", length))

    def num_sequences(self, length: int) -> int:
        """Number of different sequences of `length` steps."""
        return self._core.num_sequences(integer("length", length))

    @property
    def num_episodes(self) -> int:
        """Number of episodes stored from their first step to their last."""
        return self._core.num_episodes

    def __len__(self) -> int:
        """Steps stored now."""
        return self._core.size

    @property
    def stored_steps(self) -> list[range]:
        """Per environment the numbers of the steps it still has, as `read` takes them."""
        return [range(begin, end) for begin, end in self._core.spans()]

    @property
    def total_added(self) -> int:
        """Steps ever added, those that have made room since included."""
        return self._core.total_added

    @property
    def total_sampled(self) -> int:
        """Steps ever sampled."""
        return self._core.total_sampled

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
        """Shape and dtype name of every key that `add` needs."""
        return {name: entry for name, entry in self._fields.items() if name not in self._latents}

    @property
    def latents(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every key that `update` writes."""
        return {name: self._fields[name] for name in self._latents}

    @property
    def selector(self) -> Selector | dict[Selector, float]:
        """How sequences are chosen."""
        return selector_from(self._core.selector)

    @property
    def limiter(self) -> Limiter | None:
        """What keeps adding and sampling in step."""
        ratio, min_size, lead, timeout = self._core.limiter
        finite = lambda value: value if math.isfinite(value) else None  # noqa: E731
        return Limiter(ratio, min_size, finite(lead), finite(timeout)) if ratio else None

    def __repr__(self) -> str:
        keys = ", ".join(f"{name} {dtype}{list(shape) or ''}" for name, (shape, dtype) in self._fields.items())
        full = self.capacity * self._core.step_bytes
        return (
            f"Replay({len(self):,} of {self.capacity:,} steps, {self.nbytes / 1e6:,.1f} of {full / 1e6:,.1f} MB, "
            f"{self.num_envs} envs: {keys})"
        )


def _numbers(limiter: Limiter | None) -> tuple[float, int, float, float]:
    if limiter is None:
        return 0.0, 0, math.inf, math.inf
    lead, timeout = (math.inf if value is None else value for value in (limiter.lead, limiter.timeout))
    return limiter.samples_per_insert, limiter.min_size, lead, timeout


def integer(name: str, value: Any, low: int = 1) -> int:
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


_UNITS = {"B": 1} | {f"{prefix}{suffix}": base**i for suffix, base in (("B", 1000), ("iB", 1024))
                     for i, prefix in enumerate("KMGT", 1)}  # fmt: skip


def _steps_in(capacity: str, spec: list[tuple[str, tuple[int, ...], str, bool]]) -> int:
    """How many steps fit into memory of this size."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]+)\s*", capacity)
    units = {name.lower(): size for name, size in _UNITS.items()}
    if not match or match[2].lower() not in units:
        raise ValueError(
            f"capacity: got {capacity!r}, expected a number of steps, or a size such as '8 GB' or '500 MiB'"
        )
    size = float(match[1]) * units[match[2].lower()]
    if size >= 2**62:
        raise ValueError(f"capacity: got {reprlib.repr(capacity)}, more than any memory")
    try:
        step = sum(math.prod(shape) * getattr(torch, dtype).itemsize for _, shape, dtype, _ in spec)
    except AttributeError:
        return 2**62  # the core names the dtype that it does not know
    if size < step:
        raise ValueError(f"capacity: got {capacity!r}, expected room for one step at least, which has {step:,} bytes")
    return int(size) // step


def _folder(directory: str | os.PathLike[str] | None) -> bytes:
    if directory is None:
        return b""
    if not isinstance(directory, (str, bytes, os.PathLike)):
        raise TypeError(f"directory: got {directory!r}, expected the path of a folder")
    if not os.path.isdir(directory):
        raise ConfigError(f"directory: {os.fspath(directory)!r} is no folder")
    return _encoded(directory)


def _encoded(path: str | os.PathLike[str]) -> bytes:
    """The path as the system takes it, which ends at a null byte."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a name without null bytes")
    return encoded


def _normal_spec(argument: str, spec: Spec) -> list[tuple[str, tuple[int, ...], str]]:
    """The spec as (key, shape, dtype name) triples; the core knows which dtypes there are."""
    if not isinstance(spec, Mapping):
        raise TypeError(f"{argument}: got {type(spec).__name__}, expected a dict of key: (shape, dtype)")
    normal = []
    for name, entry in spec.items():
        if not isinstance(name, str) or not name or not name.isprintable() or name in RESERVED:
            raise ValueError(f"{argument}: the key {name!r} cannot be used, expected a name other than "
                             + ", ".join(map(repr, RESERVED)))  # fmt: skip
        try:
            shape, dtype = entry
            sides = tuple(shape)
            dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
            dtype = dtype if dtype == "bfloat16" else np.dtype(dtype).name
        except (TypeError, ValueError):
            raise TypeError(f"{argument}: key {name!r} has {reprlib.repr(entry)}, expected (shape, dtype)") from None
        normal.append((name, tuple(integer(f"{argument}: a side of {name!r}", side) for side in sides), dtype))
    return normal


def _ids(step_id: Any) -> Tensor:
    ids = step_id.detach() if isinstance(step_id, Tensor) else torch.from_numpy(_array("step_id", step_id))
    if ids.dtype != torch.int64:
        raise TypeError(f"step_id: got dtype {ids.dtype}, expected int64 as batches have it")
    return ids.cpu().contiguous()


def _check_fits(name: str, tensor: Tensor, stored: torch.dtype) -> None:
    """Whether the stored dtype holds what the tensor has; floats are rounded."""
    kinds = [(d.is_floating_point, d is torch.bool) for d in (tensor.dtype, stored)]
    if kinds[0] != kinds[1] or tensor.is_complex():
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {stored} or another of its kind")
    if tensor.dtype != stored and not stored.is_floating_point and tensor.numel():
        limits = torch.iinfo(stored)
        if int(tensor.min()) < limits.min or int(tensor.max()) > limits.max:
            raise ValueError(f"{name}: holds values beyond the range of {stored}, got dtype {tensor.dtype}")


def _array(name: str, value: Any) -> np.ndarray:
    """`value` as a NumPy array, without a copy where possible; bfloat16 as the raw bytes NumPy has instead."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"{name}: got a tensor on {value.device}, expected CPU memory")
        value = value.detach()
        if value.dtype == torch.bfloat16:
            return value.contiguous().view(torch.int16).numpy().view("V2")
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {reprlib.repr(value)}, which is no array: {error}") from None


def _fit(name: str, value: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """`value` in the stored dtype and a shape that the core takes, or the error that says why it cannot be."""
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16 and dtype != "bfloat16":
        value = value.float()
    array = _array(name, value)
    channels_last = (*shape[:1], *shape[2:], shape[1]) if len(shape) == 4 and shape[1] in (1, 3, 4) else shape
    if array.shape not in (shape, channels_last):
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    if dtype == "bfloat16":
        if array.dtype.kind != "V":
            if array.dtype.kind not in "fiu":
                raise TypeError(f"{name}: got dtype {array.dtype}, expected bfloat16 or another of its kind")
            fitted = torch.from_numpy(np.ascontiguousarray(array, np.float32)).bfloat16()
            if bool((fitted.isinf() & torch.from_numpy(np.isfinite(array))).any()):
                raise ValueError(f"{name}: holds values beyond the range of bfloat16, got dtype {array.dtype}")
            return _array(name, fitted)
        return array
    stored = np.dtype(dtype)
    if not np.can_cast(array.dtype, stored, casting="same_kind"):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {stored} or another of its kind")
    with np.errstate(over="ignore"):
        fitted = np.ascontiguousarray(array, dtype=stored)
    if stored.kind == "f":
        lost = np.isinf(fitted).sum() > np.isinf(array).sum() if array.dtype != stored else False
    else:
        lost = not np.array_equal(fitted, array)
    if lost:
        raise ValueError(f"{name}: holds values beyond the range of {stored}, got dtype {array.dtype}")
    return fitted
