"""An update as a CUDA graph: recorded once, then launched as a whole, without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Result = TypeVar("Result")


class Graphed(Generic[Result]):
    """`function(batch)` on a CUDA device, replayed from a graph after a few ordinary calls.

    A graph keeps the addresses of everything it touches: the batch is copied into tensors that stay, weights and
    optimiser states must be updated in place and not be replaced (make a new `Graphed` after that), and whatever
    changes between calls must be a tensor. Results are copies, so that the next call does not overwrite them.

    Args:
        function: takes a dict of tensors and returns tensors in dicts or tuples; must not wait for the device.
        generators: random generators that `function` draws from.
        device: a CUDA device.
        warmup: ordinary calls before the recording, in which lazily made things (optimiser states, compiled kernels,
            handles of libraries) come to be.

    A batch of other shapes starts anew. Source: "Whole-network capture" in PyTorch's notes on CUDA semantics.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], Result],
        generators: tuple[torch.Generator, ...],
        device: torch.device,
        warmup: int = 3,
    ):
        self.function, self.generators, self.device, self.warmup = function, generators, device, warmup
        self._forget(None)

    def _forget(self, kind: dict | None) -> None:
        self._kind, self._calls, self._graph = kind, 0, None
        self._inputs: dict[str, Tensor] = {}
        self._output: Result | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Result:
        kind = {name: (x.shape, x.dtype) for name, x in batch.items()}
        if kind != self._kind:
            self._forget(kind)
            self._inputs = {name: torch.empty_like(x, device=self.device) for name, x in batch.items()}
        for name, x in batch.items():
            self._inputs[name].copy_(x, non_blocking=True)
        self._calls += 1
        if self._calls <= self.warmup:
            return self._run_aside()
        if self._graph is None:
            self._record()
        self._graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, self._output)

    def _run_aside(self) -> Result:
        # The stream that records must not be the default one, and what is made lazily should know it.
        main, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            result = self.function(self._inputs)
        main.wait_stream(side)
        pytree.tree_map_only(Tensor, lambda x: x.record_stream(main), result)
        return result

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # Loader threads may pin and copy meanwhile: only this thread's calls are held to the rules of a capture.
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._output = self.function(self._inputs)
        self._graph = graph
