"""Memory for batches: a block is used again as soon as nobody holds a tensor of the batch that was in it.

A batch of pictures is tens of megabytes. Memory that is new to the process has to be mapped page by page, which takes
longer than filling it, and memory that was used a moment ago is still in the cache.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64
_HUGE_PAGE = 2 << 20
_IDLE_BLOCKS = 2


class BatchMemory:
    """Hands out tensors that lie in one block each time; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[np.ndarray] = []

    def tensors(self, specs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Uninitialised CPU tensors of these shapes and dtypes. Their memory is theirs until the last is gone."""
        places, size = {}, 0
        for name, (shape, dtype) in specs.items():
            bytes_ = math.prod(shape) * dtype.itemsize
            places[name] = slice(size, size + bytes_)
            size += -(-bytes_ // _ALIGN) * _ALIGN
        block = self._take(size)
        return {
            name: torch.from_numpy(block[places[name]]).view(dtype).view(shape)
            for name, (shape, dtype) in specs.items()
        }

    def _take(self, size: int) -> np.ndarray:
        """A view of a block that nobody else has one of."""
        with self._lock:
            counts = _reference_counts(self._blocks)
            idle = [i for i, count in enumerate(counts) if count == _UNUSED]
            fitting = next((i for i in idle if self._blocks[i].size == size), None)
            kept = [i for i in idle if i != fitting][: _IDLE_BLOCKS - 1]
            block = _new_block(size) if fitting is None else self._blocks[fitting]
            in_use = [b for b, count in zip(self._blocks, counts, strict=True) if count != _UNUSED]
            self._blocks = [block, *(self._blocks[i] for i in kept), *in_use]
            return block[:]


def _reference_counts(blocks: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


_UNUSED = _reference_counts([np.empty(1)])[0]  # of an array that only a list holds; every view holds it too


def _new_block(size: int) -> np.ndarray:
    if size < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size)
