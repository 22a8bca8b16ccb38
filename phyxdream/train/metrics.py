"""Metrics of a run: one JSON object a line in metrics.jsonl, the same scalars in TensorBoard.

Names are grouped with a slash, and the report goes by the groups: `episode/return` (mean return of the episodes that
ended since the last row), `episode/length`, `loss/<name>`, `throughput/fps`, `throughput/updates_per_second`; anything
else gets a panel of its own. Of a parallel run, `actor/weights_age` and `actor/updates_behind` tell how old the weights
were that acted, in seconds and updates since they were published, on average over the rows.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from phyxdream.errors import CheckpointError
from phyxdream.train.run import Run

_OWN = ("step", "time")


class Metrics:
    """Writer of a run's metrics; continues the file that is there.

    A line that a killed process left half-written is cut off, and `elapsed` goes on from the last row. Log the row of
    a step before its checkpoint is saved: then checkpoint and metrics agree after `truncate_after`.

    Args:
        run: the run to log into.

    Raises:
        CheckpointError: metrics.jsonl cannot be written.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._path = run.metrics
        try:
            self._file = self._open()
            rows = _rows(self._path)
            self._file.truncate(rows[-1][0] if rows else 0)
        except OSError as e:
            raise self._error(e) from e
        self._last_step = rows[-1][1]["step"] if rows else None
        self._start(rows)
        self._purge_step = None if self._last_step is None else self._last_step + 1
        self._tensorboard: Any = None
        self._tensorboard_works = True

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, the earlier parts of a resumed run included, the time between them not."""
        return time.monotonic() - self._origin

    def log(self, step: int, values: Mapping[str, float | torch.Tensor], **counters: int) -> None:
        """Append one row.

        Args:
            step: environment steps so far; never below that of the row before.
            values: numbers, or tensors with one element; those on a GPU come over in one transfer per device.
            counters: integers such as `updates`, which stand in front of the values.

        Raises:
            ValueError: a step that goes backwards, a name that is taken, a tensor with several elements.
            CheckpointError: the disk is full or the file cannot be written; the rows before are untouched.
        """
        if self._last_step is not None and step < self._last_step:
            raise ValueError(f"step must not go backwards: got {step} after {self._last_step}")
        for name in (*values, *counters):
            if name in _OWN or (name in values and name in counters):
                raise ValueError(f"values: the name {name!r} is taken")
        numbers = _numbers(values)
        row = {"step": int(step)}
        row |= {name: int(value) for name, value in counters.items()}
        row |= {"time": round(self.elapsed, 3)}
        row |= {name: value if math.isfinite(value) else _name_nonfinite(value) for name, value in numbers.items()}
        self._append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._last_step = int(step)
        self._log_tensorboard(int(step), {**counters, **numbers})

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps than `step`, that of the checkpoint a run resumes from.

        The clock goes back to the last row that stays. Call it before the first `log`: TensorBoard is told to forget
        those steps when its writer starts.
        """
        rows = _rows(self._path)
        kept = [(line, row) for _, row, line in rows if row["step"] <= step]
        if len(kept) < len(rows):
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            try:
                with open(temporary, "wb") as file:
                    file.writelines(line for line, _ in kept)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path)
                self._file.close()
                self._file = self._open()
            except OSError as e:
                temporary.unlink(missing_ok=True)
                raise self._error(e) from e
        self._start([(0, row) for _, row in kept])
        self._last_step = kept[-1][1]["step"] if kept else None
        self._purge_step = step + 1

    def close(self) -> None:
        """Flush both logs to disk; logging afterwards is an error."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
        if self._tensorboard is not None:
            self._guard_tensorboard(self._tensorboard.close)
            self._tensorboard = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> IO[bytes]:
        return open(self._path, "ab", buffering=0)  # one write a row: a kill cuts at most the last

    def _start(self, rows: list[Any]) -> None:
        self._origin = time.monotonic() - (float(rows[-1][1].get("time", 0.0)) if rows else 0.0)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # a disk that fills up takes a part first and then raises the reason
                line = line[self._file.write(line) :]
        except OSError as e:
            self._file.truncate(end)
            raise self._error(e) from e

    def _error(self, e: OSError) -> CheckpointError:
        return CheckpointError(
            f"could not write {self._path}: {e.strerror or e}; earlier rows and checkpoints are untouched"
        )

    def _log_tensorboard(self, step: int, numbers: Mapping[str, float]) -> None:
        def write() -> None:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter  # here because it takes a second

                self._tensorboard = SummaryWriter(str(self._run.tensorboard), purge_step=self._purge_step)
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

        if self._tensorboard_works:
            self._guard_tensorboard(write)

    def _guard_tensorboard(self, action: Any) -> None:
        # metrics.jsonl is the record; TensorBoard is a view of it, and a view must not end a training.
        try:
            action()
        except Exception as e:
            self._tensorboard_works = False
            warnings.warn(f"TensorBoard logging stopped: {e}", RuntimeWarning, stacklevel=2)


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The columns of a metrics.jsonl: name to float64 array, one element per row, NaN where a row lacks the name.

    Lines that are not whole (the last one after kill -9) are left out; a missing file has no columns.
    """
    rows = [row for _, row, _ in _rows(Path(path))]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([_as_float(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def _rows(path: Path) -> list[tuple[int, dict[str, Any], bytes]]:
    """Whole rows as (offset of the end, row, line)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    rows, end, broken = [], 0, 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((end, row, line))
        elif end < len(data):
            broken += 1
    if broken:
        warnings.warn(f"{path}: {broken} damaged line(s) skipped", RuntimeWarning, stacklevel=3)
    return rows


def _numbers(values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """Python floats in the order given, with one device-to-host copy per device."""
    tensors: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    result: dict[str, float] = {}
    for name, value in values.items():
        result[name] = math.nan  # holds the place in the order
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(f"values[{name!r}]: expected one element, got shape {tuple(value.shape)}")
            tensors.setdefault(value.device, []).append((name, value.detach().reshape(()).to(torch.float64)))
        else:
            result[name] = float(value)
    for members in tensors.values():
        names, scalars = zip(*members, strict=True)
        result.update(zip(names, torch.stack(scalars).tolist(), strict=True))
    return result


def _name_nonfinite(value: float) -> str:
    """JSON has no NaN and infinity; these names are read back by float()."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
