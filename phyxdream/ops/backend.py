"""Which implementation of an op runs, and how torch comes to know the op.

Every op has a `reference` in plain PyTorch, the definition of correct, and may have a `cpu` (C++) and a `triton`
implementation. The choice is automatic by device and by what an implementation accepts; `use_backend` or the
environment variable `PHYXDREAM_BACKEND` (read once, at import) force it.

Three ways lead through an op:

- plain eager calls go straight to the implementation, wrapped in one `autograd.Function` when a gradient is wanted:
  torch's dispatcher would cost more than a small kernel;
- under `torch.compile`, `torch.export`, dispatch modes (fake tensors) and for tensor subclasses, the op registered with
  `torch.library` is called, which is opaque to the tracer;
- whatever an implementation does not take (`torch.func` transforms and forward-mode differentiation among it) goes
  to the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from phyxdream.errors import ConfigError, PhyxdreamError, suggest

BACKENDS = ("reference", "cpu", "triton")

try:
    from phyxdream import _C as extension

    extension_problem = ""
except ImportError as error:  # a source checkout: every op still has its reference
    extension = None
    extension_problem = f"the compiled extension phyxdream._C cannot be imported ({error})"


class BackendError(PhyxdreamError, ValueError):
    """A forced backend that cannot take the call."""


def _known_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(
            f"{source}: unknown backend {name!r}{suggest(str(name), BACKENDS)} (known: {', '.join(BACKENDS)})"
        )
    return name


_environment = os.environ.get("PHYXDREAM_BACKEND")
_forced: ContextVar[str | None] = ContextVar(
    "phyxdream_backend", default=_known_backend(_environment, "PHYXDREAM_BACKEND") if _environment else None
)


def _forced_while_tracing() -> str | None:
    """For Dynamo, which cannot trace a context variable: it calls this once and keeps the answer."""
    return _forced.get()


_forced_while_tracing._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without loading Dynamo


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Force every op called inside the `with` block, in this thread or task, to one backend.

    Args:
        name: "reference", "cpu" or "triton".

    Raises:
        ConfigError: the name is unknown.
        BackendError: (from the op) the forced backend cannot take the call; it says why.

    A function compiled by `torch.compile` keeps the backend it was traced with.

    >>> import torch
    >>> from phyxdream import ops
    >>> with ops.use_backend("reference"):
    ...     ops.lambda_return(torch.ones(2, 1), torch.zeros(2, 1), torch.ones(2, 1), lambda_=1.0)
    tensor([[2.],
            [1.]])
    """
    return _using(_known_backend(name, "use_backend"))


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def triton_kernels(op: str) -> ModuleType:
    """The module of Triton kernels of one op; imported when first needed, since Triton takes a second to load."""
    return importlib.import_module(f"phyxdream.kernels.{op}")


@functools.cache
def _triton_problem() -> str:
    try:
        importlib.import_module("triton")
        importlib.import_module("phyxdream.kernels")
    except ImportError as error:
        return f"its kernels cannot be imported ({error})"
    return ""


_triton_problem._dynamo_marked_constant = True


def status() -> dict[str, str]:
    """Why each backend is off on this machine, by name; an empty string for those that are on."""
    no_device = "" if torch.cuda.is_available() or _interpreting() else "no CUDA device is available"
    return {"reference": "", "cpu": extension_problem, "triton": no_device or _triton_problem()}


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs its kernels on CPU tensors too


def refuse_cpu(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why C++ cannot read `x` and tensors that `require_alike` found alike; an empty string if it can."""
    if extension is None:
        return extension_problem
    if not x.is_cpu:
        return f"the tensors are on {x.device}, not on the CPU"
    return "" if x.dtype in dtypes else _dtype_problem(x, dtypes)


def cpu_threads(x: torch.Tensor) -> int:
    """Threads for an op that streams over a few tensors like `x`: below a megabyte, waking one costs what it saves."""
    return torch.get_num_threads() if x.numel() >= 1 << 18 else 1


def refuse_triton(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why Triton cannot read `x` and tensors that `require_alike` found alike; an empty string if it can."""
    if not x.is_cuda and not (x.is_cpu and _interpreting()):
        return f"the tensors are on {x.device}, not on a CUDA device"
    return _triton_problem() if x.dtype in dtypes else _dtype_problem(x, dtypes)


def _dtype_problem(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str:
    return f"the tensors are {x.dtype}; it takes {', '.join(map(str, dtypes))}"


@dataclass(frozen=True)
class Backend:
    """One fast implementation of an op. The functions take the op's arguments in the order of its schema.

    Attributes:
        name: "cpu" or "triton".
        forward: as `Op.schema`, without autograd.
        backward: as `Op.backward_schema`; None if it refuses every call that wants a gradient.
        refuse: why it cannot take these arguments; an empty string when it can.
        plan: what it would launch for these arguments, in a few words.
        slower: why the reference is faster for arguments that it can take, so that only force brings it; else "".
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    refuse: Callable[..., str]
    plan: Callable[..., str]
    slower: Callable[..., str] = lambda *args: ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend a call would take, and for every backend why or why not."""

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} -> {self.backend}"]
        lines += [f"  {'*' if name == self.backend else ' '} {name}: {why}" for name, why in self.reasons.items()]
        return "\n".join(lines)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ops: dict[str, Op] = {}
_library = torch.library.Library("phyxdream", "FRAGMENT")  # registrations live as long as this object


class Op:
    """An op: its contract, its reference, its fast backends, and its registration with torch.

    Args:
        name: of the public function, of the registered op `phyxdream::name`, and of the kernel files.
        prepare: takes the public arguments, checks them, returns the arguments of the schema as a tuple.
        reference: the definition of correct in plain PyTorch, taking the arguments of the schema.
        schema: `torch.library` schema of the forward.
        backward_schema: likewise of the backward.
        fake: empty outputs for the arguments of the schema (for tracing).
        backward_fake: likewise for the backward.
        save: `save(ctx, inputs, output)` keeps what the backward needs.
        backward: `backward(ctx, *grads)` returns one gradient per argument of the schema, a list for a list; it calls
            `ctx.run_backward`, which is the backward of whichever implementation ran the forward. Beware that
            `ctx.needs_input_grad` has lists or is flat, as `torch.library` or the eager way leaves it.
        backends: the fast implementations.
        torch_is_best: backends that have no implementation since torch's own is as fast there: force leaves the op to
            the reference.
    """

    def __init__(
        self,
        name: str,
        *,
        prepare: Callable[..., tuple],
        reference: Callable[..., Any],
        schema: str,
        backward_schema: str,
        fake: Callable[..., Any],
        backward_fake: Callable[..., Any],
        save: Callable[..., None],
        backward: Callable[..., tuple],
        backends: tuple[Backend, ...],
        torch_is_best: tuple[str, ...] = (),
    ):
        self.name, self.prepare, self.reference, self.torch_is_best = name, prepare, reference, torch_is_best
        self.backends = {backend.name: backend for backend in backends}
        # The order of trial: on a CPU tensor `cpu` accepts first, on a CUDA tensor it refuses at once.
        self.automatic = backends
        self.registered = self._register(schema, backward_schema, fake, backward_fake, save, backward)
        registered_backward = getattr(torch.ops.phyxdream, f"{name}_backward").default
        self.function = _eager_function(name, save, backward, registered_backward)
        _ops[name] = self

    def __call__(self, *args: Any) -> Any:
        backend = self.choose(args)
        if backend is None:
            return self.reference(*args)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return self.registered(*args)
        wants_grad = False
        layout = None
        if any(isinstance(x, list) for x in args):
            layout = [len(x) if isinstance(x, list) else None for x in args]
        for x in args if layout is None else _flatten(args):
            if isinstance(x, torch.Tensor):
                # The dispatcher knows how to unwrap subclasses and resolve lazy negation; raw memory does not.
                if x.__class__ not in _PLAIN or x.is_neg():
                    return self.registered(*args)
                wants_grad = wants_grad or x.requires_grad
        if wants_grad and torch.is_grad_enabled():
            return self.function.apply(*(args if layout is None else _flatten(args)), layout, backend)
        return backend.forward(*args)

    def choose(self, args: tuple) -> Backend | None:
        """The backend for these prepared arguments; None is the reference."""
        tracing = torch.compiler.is_compiling()
        forced = _forced_while_tracing() if tracing else _forced.get()
        if forced == "reference" or forced in self.torch_is_best:
            return None
        transformed = "" if tracing else _refuse_transforms()
        if forced is None:
            if transformed:
                return None
            for backend in self.automatic:
                if not backend.refuse(*args):
                    return None if backend.slower(*args) else backend
            return None
        if forced not in self.backends:
            raise BackendError(f"{self.name}: backend {forced!r} was forced, but this op has no such implementation")
        why_not = transformed or self.backends[forced].refuse(*args)
        if why_not:
            raise BackendError(f"{self.name}: backend {forced!r} was forced, but cannot take this call: {why_not}")
        return self.backends[forced]

    def explain(self, args: tuple) -> Explanation:
        forced = _forced.get()
        transformed = _refuse_transforms()
        refusals = {name: transformed or backend.refuse(*args) for name, backend in self.backends.items()}
        slower = {name: "" if refusals[name] else backend.slower(*args) for name, backend in self.backends.items()}
        able = [name for name in self.backends if not refusals[name] and not slower[name]]
        chosen = forced or (able[0] if able else "reference")
        if chosen in self.torch_is_best:
            chosen = "reference"
        reasons = {"reference": "plain PyTorch; takes every call, slower than the others"}
        for name in BACKENDS[1:]:
            if name not in self.backends:
                reasons[name] = "this op has no such implementation"
                if name in self.torch_is_best:
                    reasons[name] += "; torch's own is as fast there"
            else:
                reasons[name] = (
                    f"cannot: {refusals[name]}" if refusals[name] else f"can: {self.backends[name].plan(*args)}"
                )
                if slower[name]:
                    reasons[name] += f"; slower than the reference: {slower[name]}"
        if forced:
            reasons[forced] += " (forced by use_backend or PHYXDREAM_BACKEND)"
        return Explanation(self.name, chosen, reasons)

    def _register(self, schema, backward_schema, fake, backward_fake, save, backward):
        forward_name, backward_name = f"phyxdream::{self.name}", f"phyxdream::{self.name}_backward"
        _library.define(self.name + schema)
        _library.define(f"{self.name}_backward{backward_schema}")
        for key, backend_name in (("CPU", "cpu"), ("CUDA", "triton")):
            if backend_name in self.backends:
                _library.impl(self.name, self.backends[backend_name].forward, key)
                if self.backends[backend_name].backward is not None:
                    _library.impl(f"{self.name}_backward", self.backends[backend_name].backward, key)
        torch.library.register_fake(forward_name, fake, lib=_library)
        torch.library.register_fake(backward_name, backward_fake, lib=_library)
        registered_backward = getattr(torch.ops.phyxdream, f"{self.name}_backward").default

        def save_for_registered(ctx, inputs, output):
            save(ctx, inputs, output)
            ctx.run_backward = registered_backward

        def refuse_double_backward(ctx, *grads):
            raise RuntimeError(f"{self.name} is differentiable once; use_backend('reference') is differentiable twice")

        torch.library.register_autograd(forward_name, backward, setup_context=save_for_registered, lib=_library)
        torch.library.register_autograd(backward_name, refuse_double_backward, lib=_library)
        return getattr(torch.ops.phyxdream, self.name).default


def _flatten(args):
    """The arguments with those of lists in their place: an autograd function does not see the tensors in a list."""
    return [y for x in args for y in (x if isinstance(x, list) else (x,))]


def _unflatten(flat, layout):
    rest = iter(flat)
    return [next(rest) if size is None else [next(rest) for _ in range(size)] for size in layout]


def _eager_function(name, save, backward, registered_backward):
    # Written with ctx in forward: a separate setup_context costs torch an inspect.signature per call.
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args_and_backend):
            *args, layout, ctx.backend = args_and_backend
            if layout is not None:
                args = _unflatten(args, layout)
            output = ctx.backend.forward(*args)
            save(ctx, args, output)
            if isinstance(output, torch.Tensor):
                ctx.set_materialize_grads(False)  # as torch's own ops: where no gradient comes in, none goes out
            return output

        @staticmethod
        def backward(ctx, *grads):
            if all(g is None for g in grads):
                return (None,) * len(ctx.needs_input_grad)
            # With create_graph the registered op goes into the graph: it knows how to refuse a second derivative.
            ctx.run_backward = registered_backward if torch.is_grad_enabled() else ctx.backend.backward
            found = backward(ctx, *[None if g is None else g.resolve_neg() for g in grads])
            return *_flatten(found), None, None

    Function.__name__ = Function.__qualname__ = name
    return Function


def _refuse_transforms() -> str:
    if torch._C._are_functorch_transforms_active():
        return "it is called inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "it is called inside forward-mode differentiation"
    return ""


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would take, and why each other one would not.

    Args:
        op: an op of `phyxdream.ops`, or its name.
        *args, **kwargs: as for the op.

    Returns:
        An `Explanation`: `.backend` is the name, `.reasons` maps every backend to a sentence, `print` shows both.

    Raises:
        ConfigError: the op is unknown. Bad arguments raise what the op itself would raise.

    >>> import torch
    >>> from phyxdream import ops
    >>> x = torch.zeros(15, 4, dtype=torch.bfloat16)
    >>> ops.explain(ops.lambda_return, x, x, x).backend
    'reference'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _ops:
        raise ConfigError(f"explain: unknown op {name!r}{suggest(name, _ops)} (known: {', '.join(sorted(_ops))})")
    return _ops[name].explain(_ops[name].prepare(*args, **kwargs))
