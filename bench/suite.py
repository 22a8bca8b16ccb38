"""What a bench file declares: cases, and for each of them the calls that compete."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phyxdream import ops
from phyxdream.bench.timing import Contender, capture
from phyxdream.errors import MissingDependency


def _fast(device: torch.device) -> str:
    """The fused backend of an op. Triton's interpreter takes the tensors of the CPU: then every launch can be tried."""
    return "triton" if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "cpu"


@dataclass(frozen=True)
class Work:
    """What one call does: so many `FLOP` or `B` (bytes that must move at least), of which the machine has a measured
    peak, or so many of anything else, which is only counted per second."""

    amount: float
    unit: str


@dataclass(frozen=True)
class Call:
    """`function(*arguments)`, which returns a tensor or tensors, to be timed on every backend; `forward+backward`
    differentiates it by `leaves`."""

    function: Callable[..., Any]
    arguments: tuple = ()
    leaves: Sequence[Tensor] = ()
    work: Work | None = None


@dataclass(frozen=True)
class Rivals:
    """Calls that do the same by other means than backends of an op, by the names that the case announced, or the
    reason why one cannot take part; `close` is called when all is done."""

    runs: dict[str, Callable[[], Any] | str]
    work: Work | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One row of a bench: an op at a size in a direction.

    Attributes:
        op: name of the op, or of the part of a whole.
        size: short name, as `--sizes` takes it.
        direction: `forward` (as training calls it), `forward+backward`, `no-grad`, or empty where nothing of the kind
            is meant.
        build: makes the inputs on a device, in torch's default dtype.
        label: the size in full.
        names: who competes, the one to compare with first: names of `Rivals`, or backends; empty is every backend
            that one op can have.
        automatic: compete as `phyxdream`, where nothing is forced, in place of the fused backend: what a user gets,
            who may get the reference where that is faster.
        default: False where it runs only when its size is asked for.
        headline: whether the README shows it.
    """

    op: str
    size: str
    direction: str
    build: Callable[[torch.device], Call | Rivals]
    label: str
    names: tuple[str, ...] = ()
    automatic: bool = False
    default: bool = True
    headline: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.direction, self.size)))

    def contenders(self, device: torch.device, compile: bool = False) -> tuple[str, ...]:
        """Names of who competes on a device; `compile` adds `torch.compile` of the reference."""
        if self.names:
            return self.names
        names = ["reference", "compile"] if compile else ["reference"]
        ours = "phyxdream" if self.automatic else _fast(device)
        on_cuda = device.type == "cuda"
        return (*names, *(["cuda_graph"] if on_cuda else []), ours, *([f"{ours}_graph"] if on_cuda else []))


@dataclass(frozen=True)
class Suite:
    """The cases of one file, in the order of its tables; sizes go from small to large."""

    name: str
    summary: str
    cases: tuple[Case, ...]

    def sizes(self, default_only: bool = False) -> list[str]:
        """Names of the sizes, smallest first."""
        return list(dict.fromkeys(case.size for case in self.cases if case.default or not default_only))


@dataclass
class Entry:
    """A case ready to run: who competes, and who cannot and why."""

    contenders: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    work: Work | None = None


@contextlib.contextmanager
def enter(
    case: Case, device: torch.device, names: Sequence[str], dtype: torch.dtype = torch.float32
) -> Iterator[Entry]:
    """Build a case on a device for some of its contenders, with floats of `dtype`.

    Whoever fails its first call is skipped, with the first line of its complaint: the others can still be timed.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        built = case.build(device)
    finally:
        torch.set_default_dtype(default)
    entry = Entry(work=built.work)
    try:
        for name in names:
            try:
                contender = _rival(name, built) if isinstance(built, Rivals) else _backend(name, case, built)
                with contender.context():
                    contender.run()
            except Exception as error:
                entry.skipped[name] = complaint(error)
            else:
                entry.contenders.append(contender)
        yield entry
    finally:
        if isinstance(built, Rivals):
            built.close()


def complaint(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _rival(name: str, rivals: Rivals) -> Contender:
    run = rivals.runs[name]
    if isinstance(run, str):
        raise MissingDependency(run)
    return Contender(name, run)


def _backend(name: str, case: Case, call: Call) -> Contender:
    backend = name.removesuffix("_graph")
    forced = {"phyxdream": None, "compile": "reference", "cuda": "reference"}.get(backend, backend)
    context = functools.partial(_context, case.direction, forced)
    if name == "compile":
        return _compiled(case, call, context)
    if name.endswith("_graph"):
        return capture(name, runner(case, call), context)
    return Contender(name, runner(case, call), context)


@contextlib.contextmanager
def _context(direction: str, backend: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if backend:
            stack.enter_context(ops.use_backend(backend))
        if direction == "no-grad":
            stack.enter_context(torch.no_grad())
        yield


@functools.cache
def _warm_compiler() -> None:
    """Loading the compiler takes seconds, which are not those of the first case that is compiled."""
    torch.compile(lambda x: x + 1)(torch.ones(1))


def _compiled(case: Case, call: Call, context: Callable) -> Contender:
    from torch._inductor import config  # takes as long to load as the rest of torch

    _warm_compiler()
    torch.compiler.reset()
    # A cache on the disk would make the second bench of a machine tell a compile time that no first user has.
    with config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no cache, among others
        run = runner(case, call, torch.compile(call.function))
        start = time.perf_counter()
        with context():
            run()
        return Contender("compile", run, context, setup_seconds=time.perf_counter() - start)


def runner(case: Case, call: Call, function: Callable | None = None) -> Callable[[], Any]:
    """What is timed: the call, and with `forward+backward` the gradients of its leaves for the same random gradients
    of its outputs every time."""
    function, arguments = function or call.function, call.arguments
    if case.direction != "forward+backward" or not call.leaves:
        return lambda: function(*arguments)
    leaves, grads = list(call.leaves), []

    def forward_backward():
        outputs = function(*arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not grads:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            grads.extend(torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) for x in outputs)
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    return forward_backward
