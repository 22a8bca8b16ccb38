"""Batches made ahead of time, in memory that is used again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phyxdream import _C
from phyxdream.errors import ReplayClosed

if TYPE_CHECKING:
    from phyxdream.replay.buffer import Replay


@contextmanager
def translated_errors() -> Iterator[None]:
    """The core's errors of waiting, as the ones of the public interface."""
    try:
        yield
    except _C.ReplayClosedError as error:
        raise ReplayClosed(str(error)) from None
    except _C.ReplayTimeoutError as error:
        raise TimeoutError(str(error)) from None


class Loader(Iterator[dict[str, Any]]):
    """An endless iterator over batches of a `Replay`; made by `Replay.loader`, where its arguments are explained.

    A batch on the CPU is valid until the next one is taken: its memory is a slot of a ring of `prefetch + 1` (one
    without prefetch). Clone what is to live longer. Batches on CUDA are tensors of their own.

    Which sequences a batch holds is decided in the calling thread, `prefetch` batches ahead; the threads only copy.
    So the same calls give the same batches whatever the number of threads.
    """

    def __init__(self, replay: Replay, batch_size: int, length: int, options: Any, prefetch: int, threads: int,
                 device: torch.device, consecutive: int, context: int, probability: bool):  # fmt: skip
        self._length, self._consecutive, self._context = length, consecutive, context
        self._device = device
        self._pieces: Iterator[dict[str, Any]] = iter(())
        total = consecutive * length + context
        pinned = device.type == "cuda"
        slots = [
            replay._empty_batch(batch_size, total, pinned, probability=probability)
            for _ in range(prefetch + 1 if prefetch else 1)
        ]
        self._slots = [batch for batch, _ in slots]
        addresses = [address for _, address in slots]
        self._core = _C.ReplayLoader(replay._core, batch_size, total, options, addresses, threads if prefetch else 0)
        self._upload = _Upload(self._next_on_cpu, self._core.ready, device) if pinned else None

    def __next__(self) -> dict[str, Any]:
        piece = next(self._pieces, None)
        if piece is None:
            batch = self._upload.next() if self._upload else self._next_on_cpu()
            if self._consecutive == 1:
                return batch
            self._pieces = self._cut(batch)
            piece = next(self._pieces)
        return piece

    def _next_on_cpu(self) -> dict[str, Any]:
        with translated_errors():
            return dict(self._slots[self._core.next()])

    def _cut(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        for i in range(self._consecutive):
            steps = slice(i * self._length, (i + 1) * self._length + self._context)
            yield {k: v if k == "probability" else v[steps] for k, v in batch.items()} | {"consecutive": i}

    def close(self) -> None:
        """End the threads. Batches that were taken stay as they are; the iterator cannot be used any more."""
        self._pieces = iter(())
        self._core.close()

    def __del__(self) -> None:
        if hasattr(self, "_core"):
            self.close()  # before the memory that the threads write to goes away

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Upload:
    """Copies to a GPU on a stream of its own, one batch ahead of the one that is handed out."""

    def __init__(self, source: Callable[[], dict[str, Tensor]], ready: Callable[[], bool], device: torch.device):
        self._source, self._ready, self._device = source, ready, device
        self._stream = torch.cuda.Stream(device)
        self._ahead: dict[str, Tensor] | None = None

    def _start(self) -> None:
        self._stream.synchronize()  # the slot that `source` fills again must have been read
        batch = self._source()
        with torch.cuda.stream(self._stream):
            self._ahead = {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}

    def next(self) -> dict[str, Tensor]:
        if self._ahead is None:
            self._start()
        batch, self._ahead = self._ahead, None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for value in batch.values():
            value.record_stream(current)
        if self._ready():
            self._start()
        return batch
