"""torchrl (Meta): our replay in the place of the buffer that its Dreamer loops make.

`TorchrlReplay` is what `ReplayBuffer(storage=LazyTensorStorage(n), sampler=SliceSampler(slice_len=T, traj_key=...))` is
to `sota-implementations/dreamer_v3`, `TorchrlTensorDictReplay` what `TensorDictReplayBuffer` with that sampler is to
`sota-implementations/dreamer` and to the trainer.

Source: torchrl/data/replay_buffers/, torchrl/collectors/, torchrl/trainers/trainers.py and sota-implementations/ of
github.com/pytorch/rl, 0.14.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from phyxdream.compat.replay_rows import Rows, stored_dtype
from phyxdream.errors import MissingDependency, suggest
from phyxdream.replay.buffer import integer

if TYPE_CHECKING:
    from tensordict import TensorDict

Key = str | tuple[str, ...]

_DONE = ("next", "done")


class TorchrlReplay:
    """A replay of TensorDicts that samples slices of `slice_len` rows, each within one trajectory.

    Rows are stored as they come, with their ("next", ...) entries: the action of a row was taken at its observation,
    ("next", "reward") came after it. Batches hold the same keys, dtypes and bits.

    A trajectory goes on as long as `traj_key` stays the same from one row of an environment to the next; without that
    key in the data, it ends where ("next", "done") is true.

    Two things differ from torchrl. Every slice is equally likely, where torchrl first draws a trajectory, so that
    slices of short ones come more often. And trajectories shorter than `slice_len` are never drawn, as with
    `strict_length=True`; with False, batches have fewer rows than their loop's reshape to (-1, slice_len) can take.

    It lives in one process: collectors in other processes cannot write to it.

    Args:
        max_size: rows kept in total over all environments, a multiple of `num_envs`.
        slice_len: rows of a slice T.
        batch_size: rows of a batch, a multiple of `slice_len`; None: `sample` says it.
        num_envs: environments N that `extend` gets. With 1, data is flat, as after `reshape(-1)`, where a new
            trajectory may begin with every row; it plays the part of torchrl's storage with `ndim=1`. With more, data
            is (N, T) and each environment has a ring of its own, as with `ndim=2`.
        traj_key: the key whose value tells trajectories apart; None: ("next", "done") does.
        transform: called with every batch before it is given out, such as `lambda batch: batch.to("cuda")`.
        seed, directory: as for `Replay`.

    Raises:
        MissingDependency: there is no tensordict.
        ValueError, TypeError: an argument that cannot be used.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> rb = TorchrlReplay(100, slice_len=5, batch_size=20)
        >>> next_ = {"reward": torch.zeros(30, 1), "done": torch.zeros(30, 1, dtype=torch.bool)}
        >>> indices = rb.extend(TensorDict({"action": torch.zeros(30, 2), "next": next_}, [30]))
        >>> rb.sample().reshape(-1, 5)["next", "reward"].shape
        torch.Size([4, 5, 1])
    """

    def __init__(
        self,
        max_size: int,
        *,
        slice_len: int,
        batch_size: int | None = None,
        num_envs: int = 1,
        traj_key: Key | None = ("collector", "traj_ids"),
        transform: Callable[[TensorDict], TensorDict] | None = None,
        seed: int = 0,
        directory: str | os.PathLike[str] | None = None,
    ):
        _tensordict()
        max_size, num_envs = integer("max_size", max_size), integer("num_envs", num_envs)
        if max_size % num_envs:
            raise ValueError(f"max_size: got {max_size}, expected a multiple of num_envs, which is {num_envs}")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: got {transform!r}, expected a function of a TensorDict, or None")
        self._slice_len = integer("slice_len", slice_len)
        self._batch_size = None if batch_size is None else self._checked(batch_size)
        self._traj_key = None if traj_key is None else _joined("traj_key", traj_key)
        self._transform = transform
        self._rows = Rows(max_size // num_envs, num_envs, integer("seed", seed, low=0), directory)

    # -------------------------------------------------------------------------------------------------------- adding

    def add(self, data: TensorDict) -> int | Tensor:
        """Stores one row of every environment: a TensorDict of batch size (), or (N,) with N > 1 environments.

        Returns:
            The row's index, or int64 (N,); as `extend` gives them.

        Raises:
            ValueError, TypeError: as `extend`.
        """
        index = self._store(data, (), "() for one row")
        return int(index) if self._rows.num_envs == 1 else index

    def extend(self, data: TensorDict) -> Tensor:
        """Stores rows in their order in time.

        Args:
            data: a TensorDict of batch size (T,), or (N, T) with N > 1 environments. The first one fixes keys, shapes
                and dtypes. Tensors may be on a GPU.

        Returns:
            int64 (T,) or (N * T,): a number for each row that stays its own for ever, as batches have it in "index".

        Raises:
            ValueError: another batch size, a key that is missing or unknown, another shape. Nothing has been stored
                then.
            TypeError: `data` is no TensorDict, something in it is no tensor, or another dtype. Nothing has been stored
                then.
        """
        return self._store(data, None, "(steps,)").flatten()

    def _store(self, data: TensorDict, time: tuple[int, ...] | None, expected: str) -> Tensor:
        envs = self._rows.num_envs
        if not _tensordict().is_tensor_collection(data):
            raise TypeError(f"data: got {type(data).__name__}, expected a TensorDict")
        lead = () if envs == 1 else (envs,)
        if data.shape[: len(lead)] != lead or data.ndim != len(lead) + (time is None):
            expected = expected if envs == 1 else f"({envs}, steps)" if time is None else f"({envs},)"
            raise ValueError(f"data: got batch size {tuple(data.shape)}, expected {expected} with num_envs={envs}")
        steps = data.shape[-1] if time is None else 1
        tensors = _leaves(data, (envs, steps))
        spec = self._rows.spec or {k: (tuple(t.shape[2:]), str(t.dtype).removeprefix("torch."))
                                   for k, t in tensors.items()}  # fmt: skip
        _check(tensors, spec)
        columns = {}
        for key, tensor in tensors.items():
            stored = getattr(torch, stored_dtype(key, spec[key][1]))
            columns[key] = tensor.view(stored).numpy()
        begins = self._begins(tensors)
        if not self._rows.spec:
            self._rows.fix(spec)
        ends = [rows.stop for rows in self._rows.stored()]
        self._rows.append(columns, np.arange(envs), begins)
        index = [self._rows.ids(env, range(end, end + steps)) for env, end in enumerate(ends)]
        return torch.stack(index).reshape(data.shape)

    def _begins(self, tensors: dict[str, Tensor]) -> np.ndarray:
        """(N, T) bool: whether a row begins a trajectory."""
        by_id, key = (True, self._traj_key) if self._traj_key in tensors else (False, "/".join(_DONE))
        if key not in tensors:
            asked = f"{self._traj_key!r} or " if self._traj_key else ""
            raise ValueError(f"traj_key: data has neither, expected {asked}'{key}' among {', '.join(tensors)}")
        marks = tensors[key].unsqueeze(-1).flatten(2)
        begins = torch.ones(marks.shape[:2], dtype=torch.bool)
        if by_id:
            begins[:, 1:] = (marks[:, 1:] != marks[:, :-1]).any(-1)
        else:
            begins[:, 1:] = marks[:, :-1].any(-1)
        for env, rows in enumerate(self._rows.stored()):
            if rows:
                last = self._rows.read(env, rows.stop - 1, key).flatten()
                begins[env, :1] = (marks[env, :1] != last).any() if by_id else last.any()
        return begins.numpy()

    # ------------------------------------------------------------------------------------------------------ sampling

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Draws slices with replacement.

        Args:
            batch_size: rows of the batch, a multiple of `slice_len`; None: the buffer's own.
            return_info: also give out what torchrl's `SliceSampler` tells about the batch.

        Returns:
            A new TensorDict of batch size (batch_size,), one slice after the other, on the CPU unless `transform` takes
            it elsewhere; with `return_info` also a dict of tensors (batch_size, ...): ("next", "truncated"), true at
            the end of every slice; ("next", "done"), the rows' own or that; ("next", "terminated"), the rows' own or
            zeros; "is_init", if rows have it, true also where a slice begins; and "index", as `extend` returns.

        Raises:
            ValueError: a batch size that cannot be used, or no trajectory has `slice_len` rows.
        """
        batch, info = self._draw(batch_size)
        batch = self._finished(batch)
        return (batch, info) if return_info else batch

    def _draw(self, batch_size: int | None) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        batch_size = self._batch_size if batch_size is None else self._checked(batch_size)
        if batch_size is None:
            raise ValueError("batch_size: got None, and the buffer has none of its own")
        slices = batch_size // self._slice_len
        try:
            drawn, ids = self._rows.sample(slices, self._slice_len, cross_episodes=False)
        except ValueError as error:
            raise ValueError(f"slice_len: no stored trajectory has {self._slice_len} rows ({error})") from None
        batch = {_split(key): value.transpose(0, 1).flatten(0, 1) for key, value in drawn.items()}
        cut = torch.zeros(slices, self._slice_len, 1, dtype=torch.bool)
        cut[:, -1] = True
        cut = cut.flatten(0, 1)
        done, terminated = batch.get(_DONE), batch.get(("next", "terminated"))
        info = {
            ("next", "truncated"): cut,
            _DONE: cut.clone() if done is None else done | cut.reshape(-1, *[1] * (done.ndim - 1)),
            ("next", "terminated"): torch.zeros_like(cut) if terminated is None else terminated,
        }
        if "is_init" in batch:
            info["is_init"] = batch["is_init"].clone()
            info["is_init"][:: self._slice_len] = True
        return batch, info | {"index": ids.transpose(0, 1).flatten()}

    def _finished(self, batch: dict[Key, Tensor]) -> TensorDict:
        size = [len(next(iter(batch.values())))]
        result = _tensordict().TensorDict(batch, size, device="cpu")
        return result if self._transform is None else self._transform(result)

    def _checked(self, batch_size: int) -> int:
        batch_size = integer("batch_size", batch_size)
        if batch_size % self._slice_len:
            raise ValueError(f"batch_size: got {batch_size}, expected a multiple of slice_len, {self._slice_len}")
        return batch_size

    # ------------------------------------------------------------------------------------------------------- lasting

    def empty(self) -> None:
        """Forgets all rows, their keys and the counts."""
        self._rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """All rows and the state of the sampling. It takes as much memory as they do: `dumps` is for large ones."""
        return {"batch_size": self._batch_size, "files": self._rows.snapshot()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` of a buffer of the same size and environments gave, and samples on as it would.

        Raises:
            CheckpointError: it is another buffer's, or corrupted. Nothing has changed then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"batch_size", "files"}:
            keys = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"state_dict: got {keys}, expected the keys batch_size and files")
        self._rows.restore(state_dict["files"])
        self._batch_size = state_dict["batch_size"]

    def dumps(self, path: str | os.PathLike[str]) -> None:
        """Writes all rows and the state of the sampling into the folder `path`, as `Replay.save` does.

        Raises:
            CheckpointError: it could not be written, or there are no rows yet.
        """
        self._rows.save(path)

    def loads(self, path: str | os.PathLike[str]) -> None:
        """Takes over what `dumps` of a buffer of the same size and environments wrote.

        Raises:
            CheckpointError: as `Replay.load`, or it is another buffer's. Nothing has changed then.
        """
        self._rows.load(path)

    # ------------------------------------------------------------------------------------------------- looking at it

    shared = False  # collectors in other processes ask

    def share(self) -> None:
        """Raises: other processes cannot write to it."""
        raise NotImplementedError(
            "this buffer lives in one process, expected a collector in the same one, such as torchrl's Collector"
        )

    def __len__(self) -> int:
        """Rows stored now."""
        return sum(map(len, self._rows.stored()))

    @property
    def write_count(self) -> int:
        """Rows ever added, of all environments together."""
        return self._rows.total_added()

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch, if `sample` does not say it."""
        return self._batch_size

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self):,} of {self._rows.length * self._rows.num_envs:,} rows, "
            f"slice_len={self._slice_len}, batch_size={self._batch_size}, num_envs={self._rows.num_envs})"
        )


class TorchrlTensorDictReplay(TorchrlReplay):
    """A `TorchrlReplay` whose batches hold what `return_info` tells, in the place of the rows' own entries.

    So ("next", "done") is true at the end of every slice and "is_init" at its beginning, as with torchrl's
    `TensorDictReplayBuffer`; "index" has shape (batch_size, 1) there. Arguments are those of `TorchrlReplay`.
    """

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """As `TorchrlReplay.sample`; `transform` sees the added entries, too."""
        batch, info = self._draw(batch_size)
        batch = self._finished(batch | info | {"index": info["index"][:, None]})
        return (batch, info) if return_info else batch

    def update_tensordict_priority(self, data: TensorDict) -> None:
        """Of no effect, as with torchrl's `SliceSampler`: slices have no priorities. The trainer calls it."""


def _tensordict() -> Any:
    try:
        import tensordict
    except ImportError as error:
        raise MissingDependency(f"this buffer needs tensordict: pip install tensordict ({error})") from error
    return tensordict


def _joined(argument: str, key: Key) -> str:
    """A nested key as one string."""
    parts = (key,) if isinstance(key, str) else key
    if not parts or not all(isinstance(part, str) and part and "/" not in part for part in parts):
        raise ValueError(f"{argument}: got the key {key!r}, expected a string without '/', or a tuple of these")
    return "/".join(parts)


def _split(key: str) -> Key:
    parts = tuple(key.split("/"))
    return parts[0] if len(parts) == 1 else parts


def _leaves(data: TensorDict, lead: tuple[int, int]) -> dict[str, Tensor]:
    """Every tensor of `data` in CPU memory as (N, T, ...)."""
    tensors = {}
    for key, value in data.items(include_nested=True, leaves_only=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"data: the key {key!r} holds {type(value).__name__}, expected a tensor")
        tensors[_joined("data", key)] = value.detach().cpu().reshape(*lead, *value.shape[data.ndim :])
    if not tensors:
        raise ValueError("data: got no keys, expected a TensorDict of tensors")
    return tensors


def _check(tensors: dict[str, Tensor], spec: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    if missing := [key for key in spec if key not in tensors]:
        raise ValueError(f"data: no {', '.join(map(repr, missing))}; expected the keys {', '.join(spec)}")
    for key, tensor in tensors.items():
        if key not in spec:
            raise ValueError(f"data: unknown key {key!r}{suggest(key, spec)}; `select` those of the first rows")
        shape, dtype = spec[key]
        if tuple(tensor.shape[2:]) != shape:
            raise ValueError(f"data: {key!r} has shape {tuple(tensor.shape[2:])} of one row, expected {shape}")
        if tensor.dtype != getattr(torch, dtype):
            raise TypeError(f"data: {key!r} has dtype {tensor.dtype}, expected torch.{dtype} as in the first rows")
