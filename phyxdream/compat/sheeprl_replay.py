"""sheeprl (Eclectic-Sheep): our replay in the place of the buffer that its Dreamer loops make.

In `dreamer_v1.py`, `dreamer_v2.py`, `dreamer_v3.py` and the `p2e_dv*` files, import `SheeprlReplay` instead of
`EnvIndependentReplayBuffer`; the rest of the loop and its checkpoints stay as they are:

    from phyxdream.compat.sheeprl_replay import SheeprlReplay as EnvIndependentReplayBuffer

Source: sheeprl/data/buffers.py, sheeprl/utils/callback.py and the loops under sheeprl/algos/ of
github.com/Eclectic-Sheep/sheeprl.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phyxdream.compat.replay_rows import Rows, stored_dtype
from phyxdream.errors import suggest
from phyxdream.replay.buffer import integer

try:  # its checkpoint callback and its resuming ask for this class; without sheeprl nobody asks
    from sheeprl.data.buffers import EnvIndependentReplayBuffer as _Base
except ImportError:
    _Base = object


class SheeprlReplay(_Base):
    """What `EnvIndependentReplayBuffer(..., buffer_cls=SequentialReplayBuffer)` is to sheeprl's Dreamer loops.

    Rows are stored as they are added. The action of a row is the one taken at its observation in DreamerV3, the one
    that led to it in V1 and V2; where an episode ends, the loops add a row of their own. Nothing is shifted, no flag is
    set or repaired, so the loop samples what it would sample from its own buffer, bit for bit.

    Two things differ. Every stored sequence is equally likely, where sheeprl first draws an environment: the same
    unless some have fewer rows than others. And an environment with too few rows is passed over, where sheeprl fails
    if it happens to draw it.

    Args:
        buffer_size: rows kept of every environment, as in sheeprl.
        n_envs: number of environments.
        obs_keys: of no effect: only a buffer that samples next observations needs them, which no Dreamer loop does.
        memmap: keep the rows in a file in `memmap_dir` instead of in RAM. Unlike sheeprl's, it is gone with the
            process, and a checkpoint holds the rows themselves.
        memmap_dir: that folder; it is made if it is not there.
        buffer_cls: sheeprl's `SequentialReplayBuffer`, or None.
        seed: seed of the sampling. sheeprl's buffer cannot be seeded.

    Raises:
        ValueError, TypeError: an argument that cannot be used.

    Example:
        >>> import numpy as np
        >>> rb = SheeprlReplay(buffer_size=100, n_envs=2)
        >>> for t in range(10):
        ...     rb.add({"rewards": np.full((1, 2, 1), float(t)), "is_first": np.full((1, 2, 1), t == 0)})
        >>> rb.sample_tensors(4, sequence_length=5, n_samples=3)["rewards"].shape
        torch.Size([3, 5, 4, 1])
    """

    def __init__(
        self,
        buffer_size: int,
        n_envs: int = 1,
        obs_keys: Sequence[str] = (),
        memmap: bool = False,
        memmap_dir: str | os.PathLike[str] | None = None,
        buffer_cls: type | None = None,
        seed: int = 0,
    ):
        buffer_size, n_envs = integer("buffer_size", buffer_size), integer("n_envs", n_envs)
        if buffer_cls is not None and getattr(buffer_cls, "__name__", None) != "SequentialReplayBuffer":
            raise ValueError(f"buffer_cls: got {buffer_cls!r}, expected SequentialReplayBuffer or None")
        if memmap and memmap_dir is None:
            raise ValueError("memmap_dir: got None, expected a folder since memmap is true")
        if memmap:
            os.makedirs(memmap_dir, exist_ok=True)
        self._memmap = bool(memmap)
        self._rows = Rows(buffer_size, n_envs, integer("seed", seed, low=0), memmap_dir if memmap else None)

    # -------------------------------------------------------------------------------------------------------- adding

    def add(self, data: Mapping[str, np.ndarray], indices: Sequence[int] | None = None,
            validate_args: bool = False) -> None:  # fmt: skip
        """Stores rows of every environment, or of those in `indices`.

        Args:
            data: for every key an array (steps, n, ...). The first call fixes keys, shapes and dtypes: later values
                are cast to these dtypes as an assignment in NumPy does, which sheeprl relies on (its flags begin as
                float64 and come as bool).
            indices: the n environments, each at most once; None for all in order.
            validate_args: of no effect: arguments are always checked.

        Raises:
            ValueError: shapes that do not fit one another or the first rows, a key that is missing or unknown,
                environments that are unknown or named twice. Nothing has been stored then.
            TypeError: `data` is no dict, or a dtype that cannot be stored. Nothing has been stored then.
        """
        arrays, steps, envs = _arrays(data)
        ids = self._ids(indices, envs)
        spec = self._rows.spec or {key: (a.shape[2:], a.dtype.name) for key, a in arrays.items()}
        if missing := [key for key in spec if key not in arrays]:
            raise ValueError(f"data: no {', '.join(map(repr, missing))}; expected the keys {', '.join(spec)}")
        columns = {}
        for key, array in arrays.items():
            if key not in spec:
                raise ValueError(f"data: unknown key {key!r}{suggest(str(key), spec)}")
            shape, dtype = spec[key]
            if array.shape[2:] != shape:
                raise ValueError(f"data: {key!r} has shape {array.shape}, expected {(steps, envs, *shape)}")
            stored = stored_dtype(key, dtype)
            columns[key] = _cast(key, array, dtype).view(stored).swapaxes(0, 1)
        if not self._rows.spec:
            self._rows.fix(spec)
        self._rows.append(columns, ids, np.zeros((envs, steps), bool))

    def _ids(self, indices: Sequence[int] | None, count: int) -> np.ndarray:
        ids = np.arange(self.n_envs) if indices is None else np.asarray(indices)
        if ids.shape != (count,) or (count and ids.dtype.kind not in "iu"):
            got = f"None, which is {self.n_envs} environments" if indices is None else repr(indices)
            raise ValueError(f"indices: got {got}, expected {count} integers as data has {count} environments")
        if count and (ids.min() < 0 or ids.max() >= self.n_envs):
            raise ValueError(f"indices: got {indices!r}, expected environments from 0 to {self.n_envs - 1}")
        if len(np.unique(ids)) != count:
            raise ValueError(f"indices: got {indices!r}, expected each environment at most once")
        return ids.astype(np.int64)

    # ------------------------------------------------------------------------------------------------------ sampling

    def sample(self, batch_size: int, *, sequence_length: int = 1, n_samples: int = 1) -> dict[str, np.ndarray]:
        """`sample_tensors` as NumPy arrays."""
        batch = self.sample_tensors(batch_size, sequence_length=sequence_length, n_samples=n_samples)
        return {key: value.numpy() for key, value in batch.items()}

    def sample_tensors(
        self,
        batch_size: int,
        *,
        sequence_length: int = 1,
        n_samples: int = 1,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        from_numpy: bool = False,
    ) -> dict[str, Tensor]:
        """Draws sequences of consecutive rows of one environment, with replacement, across episodes as sheeprl does.

        Args:
            batch_size: sequences of a batch B.
            sequence_length: rows of a sequence T.
            n_samples: number of batches N.
            dtype: of the tensors; None: as stored.
            device: of the tensors.
            from_numpy: of no effect: there are no arrays in between.

        Returns:
            For every key a new tensor (N, T, B, ...). With N > 1 it is a view of (T, N * B, ...).

        Raises:
            ValueError: no environment has that many rows yet.
        """
        batch_size, n_samples = integer("batch_size", batch_size), integer("n_samples", n_samples)
        length = integer("sequence_length", sequence_length)
        most = max(map(len, self._rows.stored()))
        if length > most:
            raise ValueError(f"sequence_length: got {length}, expected at most {most}, the rows of the fullest env")
        batch, _ = self._rows.sample(n_samples * batch_size, length, cross_episodes=True)
        return {
            key: value.unflatten(1, (n_samples, batch_size)).transpose(0, 1).to(device, dtype or value.dtype)
            for key, value in batch.items()
        }

    # ------------------------------------------------------------------------------------------------- looking at it

    @property
    def buffer(self) -> tuple[SheeprlEnvRows, ...]:
        """One view per environment, for the loop and the checkpoint callback, which look at its latest row."""
        return tuple(SheeprlEnvRows(self._rows, env) for env in range(self.n_envs))

    @property
    def buffer_size(self) -> int:
        """Rows kept of every environment."""
        return self._rows.length

    @property
    def n_envs(self) -> int:
        """Number of environments."""
        return self._rows.num_envs

    @property
    def full(self) -> tuple[bool, ...]:
        """Per environment, whether the next row takes the place of one."""
        return tuple(env.full for env in self.buffer)

    @property
    def empty(self) -> tuple[bool, ...]:
        """Per environment, whether it has no row."""
        return tuple(env.empty for env in self.buffer)

    @property
    def is_memmap(self) -> tuple[bool, ...]:
        """Per environment, whether its rows are in a file."""
        return (self._memmap,) * self.n_envs

    def __len__(self) -> int:
        """`buffer_size`, as in sheeprl."""
        return self.buffer_size


class SheeprlEnvRows:
    """The rows of one environment of a `SheeprlReplay`, numbered as in a ring of `buffer_size`.

    `rows[key][row]` is a copy (1, ...) of one row, `rows[key][row] = value` overwrites it; `row` may be followed by
    more indices: `rows[key][row, :]`.
    """

    def __init__(self, rows: Rows, env: int):
        self._rows, self._env = rows, env

    @property
    def buffer_size(self) -> int:
        """Rows that are kept."""
        return self._rows.length

    @property
    def full(self) -> bool:
        """Whether the next row takes the place of one."""
        return len(self._rows.stored()[self._env]) == self.buffer_size

    @property
    def empty(self) -> bool:
        """Whether there is no row."""
        return not self._rows.stored()[self._env]

    @property
    def _pos(self) -> int:  # the name that sheeprl's loops and callback use
        """Where the next row goes."""
        return self._rows.stored()[self._env].stop % self.buffer_size

    def __getitem__(self, key: str) -> _Column:
        if key not in self._rows.spec:
            raise KeyError(
                f"got {key!r}, expected one of {', '.join(self._rows.spec) or 'none yet: nothing is stored'}"
            )
        return _Column(self._rows, self._env, key)


class _Column:
    """One key of one environment."""

    def __init__(self, rows: Rows, env: int, key: str):
        self._rows, self._env, self._key = rows, env, key

    def __getitem__(self, index: Any) -> np.ndarray:
        number, rest = self._find(index)
        return self._row(number)[rest]

    def __setitem__(self, index: Any, value: Any) -> None:
        number, rest = self._find(index)
        row = self._row(number)
        row[rest] = value
        self._rows.write(self._env, number, self._key, torch.from_numpy(row)[0])

    def _row(self, number: int) -> np.ndarray:
        return self._rows.read(self._env, number, self._key)[None].numpy()

    def _find(self, index: Any) -> tuple[int, tuple[Any, ...]]:
        """The number of the row that is at this place of the ring now, and the indices within it."""
        row, *rest = index if isinstance(index, tuple) else (index,)
        row = integer("row", row, low=0)
        stored = self._rows.stored()[self._env]
        number = stored.stop - 1 - (stored.stop - 1 - row) % self._rows.length
        if row >= self._rows.length or number not in stored:
            raise IndexError(f"row: got {row}, expected one of the {len(stored)} stored")
        return number, tuple(rest) or (...,)


def _arrays(data: Any) -> tuple[dict[str, np.ndarray], int, int]:
    """The arrays, and how many steps of how many environments they have."""
    if not isinstance(data, Mapping):
        raise TypeError(f"data: got {type(data).__name__}, expected a dict of arrays")
    if not data:
        raise ValueError("data: got no keys, expected a dict of arrays (steps, envs, ...)")
    if not all(isinstance(key, str) for key in data):
        raise TypeError(f"data: got the keys {list(data)}, expected strings")
    arrays = {key: np.asarray(value) for key, value in data.items()}
    lead = next(iter(arrays.values())).shape[:2]
    for key, array in arrays.items():
        if array.ndim < 2 or array.shape[:2] != lead:
            expected = (*lead, "...") if len(lead) == 2 else ("steps", "envs", "...")
            raise ValueError(f"data: {key!r} has shape {array.shape}, expected ({', '.join(map(str, expected))})")
    return arrays, *lead


def _cast(key: str, array: np.ndarray, dtype: str) -> np.ndarray:
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            return array.astype(dtype, copy=False)
    except (TypeError, ValueError):
        raise TypeError(f"data: {key!r} has dtype {array.dtype}, expected {dtype} as in the first rows") from None
