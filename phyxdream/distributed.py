"""Learning with several processes: who they are, and what passes between them.

`torchrun --nproc-per-node 2 -m phyxdream train` starts the same program several times and tells each its place in
environment variables. Every process has environments, a replay and random numbers of its own and the same weights;
gradients, and whatever else is a statistic over the batch, are taken over all of them. So `world_size()` processes with
batches of B learn as one with a batch of `world_size() * B`.

The collective functions must be called by all processes, in the same order. In a process on its own, each is the
identity. Transport is torch.distributed: gloo for CPU tensors, NCCL for those on GPUs.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from phyxdream.errors import ConfigError, DistributedError, PhyxdreamError

Result = TypeVar("Result")

# Others wait while the first process evaluates and writes the report. A process that dies is noticed at once, not by
# this.
TIMEOUT = datetime.timedelta(hours=1)
# Apart from what a seed is otherwise added to: the environments' numbers, restarts, the seeds of evaluations.
SEED_STRIDE = 5_000_011


def world_size() -> int:
    """How many processes learn together."""
    return dist.get_world_size() if _joined() else _variable("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process among them; 0 logs, evaluates and reports."""
    return dist.get_rank() if _joined() else _variable("RANK", 0) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    return rank() == 0


def own_seed(seed: int) -> int:
    """A seed of this process's own; `seed` itself in process 0."""
    return seed + SEED_STRIDE * rank()


def own_gpu() -> int:
    """The number of this process's GPU on its machine.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    number, count = _variable("LOCAL_RANK", rank()), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(f"torchrun started more processes on this machine than it has GPUs ({count}): start "
                          f"--nproc-per-node {count}, or train with --device cpu")  # fmt: skip
    return number


def _variable(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if value and not value.isdecimal():
        raise ConfigError(f"environment variable {name}: expected a number as torchrun sets it, got {value!r}")
    return int(value) if value else default


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def join(device: torch.device) -> None:
    """Join the processes that torchrun started, until this one ends.

    Does nothing in a process on its own, or where torch.distributed is initialised already.

    Args:
        device: what this process learns on.

    Raises:
        ConfigError: the others cannot be found.
    """
    if _joined() or world_size() == 1:
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError, AttributeError) as e:  # AttributeError: torch was built without
        raise ConfigError(f"RANK and WORLD_SIZE are set, but the group of processes could not be joined ({e}): start "
                          "them with torchrun, or unset both to train alone") from e  # fmt: skip
    # Not earlier: joining anew could meet processes that have not left yet.
    atexit.register(lambda: _joined() and dist.destroy_process_group())


# ---------------------------------------------------------------------------------------------------------- tensors


def gather(x: Tensor) -> Tensor:
    """The tensors (*shape) of all processes, (world_size, *shape). They must have the same shape; no gradient."""
    if world_size() == 1:
        return x.detach()[None]
    with _explained():
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return mean(grad)[rank()] * world_size()


def joined(x: Tensor) -> Tensor:
    """The sequences (T, B, ...) of all processes side by side, (T, world_size · B, ...), with a gradient: what the
    losses of all of them have to say to one's own, added up. Those of this process start at `rank() * B`."""
    if world_size() == 1:
        return x
    return _Gathered.apply(x).movedim(0, 1).flatten(1, 2)


def mean(x: Tensor) -> Tensor:
    """The mean over all processes of a tensor of the same shape in each, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().clone(memory_format=torch.contiguous_format)
    with _explained():
        dist.all_reduce(x)
    return x / world_size()


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over all processes, in one call for all of them.

    Not DistributedDataParallel, which watches one `forward`: here a loss calls the parts of a model as it needs them.
    """
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    joined = mean(torch.cat([g.reshape(-1) for g in grads]))
    for grad, part in zip(grads, joined.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of process 0."""
    if world_size() == 1:
        return
    for x in tensors:
        value = x.detach().contiguous()
        with _explained():
            dist.broadcast(value, 0)
        x.copy_(value)


# ------------------------------------------------------------------------------------------------- everything else


def gather_objects(value: Any) -> list[Any]:
    """What every process gave, in order; it must pickle. Meant for what happens rarely."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with _explained():
        dist.all_gather_object(values, value)
    return values


def together(function: Callable[[], Result]) -> Result:
    """`function()`, which must not call collectives: a `PhyxdreamError` it raises in one process is raised in all."""
    result = error = None
    try:
        result = function()
    except PhyxdreamError as e:
        error = e
    errors = gather_objects(error)
    if error := error or next(filter(None, errors), None):
        raise error
    return result


def on_first(function: Callable[[], Result]) -> Result:
    """What `function()` returns in process 0, the only one to call it; the others wait. Errors as for `together`."""
    result = together(function if is_first() else lambda: None)
    if world_size() == 1:
        return result
    shared = gather_objects(result)[0]
    return result if is_first() else shared


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise DistributedError(f"process {rank()} lost the others: one of them has failed, and says why, or was "
                               f"killed ({str(e).splitlines()[0]})") from e  # fmt: skip
