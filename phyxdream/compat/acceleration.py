"""`accelerate`: our ops in place of the loops of somebody else's Dreamer, on its own Parameters, and `restore`.

A module is recognised by the names of its parts, its weights are read where they lie, and before anything is changed a
copy of it with other weights is run both ways from one seed: outputs and gradients must agree. Then its class becomes a
subclass of its own with the fast methods, which is all that changes: Parameters, hooks on the module, state dict,
optimisers stay, and pickling, `copy.deepcopy`, `.to()` and wrappers work as before.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from phyxdream.compat.structure import Misfit, watched

TOLERANCE = 1e-3  # of the trial's float32 outputs and gradients, by norm; what is not the same model is off by far more


class Accelerated:
    """Base of the classes that stand before a module's own: fast methods that fall back on those of the original."""

    kind: ClassVar[str]  # what it is called in summaries
    replaces: ClassVar[tuple[str, ...]]  # methods
    remark: ClassVar[str] = ""  # what differs, for the summary

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        """Whether the module has the parts that its kind has."""
        raise NotImplementedError

    @staticmethod
    def read(module: nn.Module) -> Any:
        """Its weights as the ops take them; raises `Misfit`."""
        raise NotImplementedError

    @staticmethod
    def simplify(module: nn.Module) -> None:
        """Puts stand-ins in place of the parts of a copy that a trial cannot feed."""

    @staticmethod
    def trials(module: nn.Module) -> Sequence[tuple[str | Callable[..., Any], Callable[[], tuple]]]:
        """Methods by name, or functions of the module, each with what makes the other arguments of a small call."""
        raise NotImplementedError

    def fitted(self, *inputs: Any) -> Any:
        """What `read` returns, or None where this call is left to the original: weights that have changed so that they
        fit no more, inputs of another dtype, autocast on the CPU, a backward hook on a part."""
        try:
            model = _read(self, type(self))
        except Misfit:
            return None
        if torch.is_autocast_enabled("cpu") and model.like.device.type == "cpu":
            return None
        autocast = torch.is_autocast_enabled(model.like.device.type)
        floats = (x for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
        if any(x.device != model.like.device or (x.dtype != model.like.dtype and not autocast) for x in floats):
            return None
        return model

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(protocol)
        return _rebuilt, type(self).__bases__, *rest


@functools.cache
def _class_of(mixin: type[Accelerated], base: type[nn.Module]) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)


def _rebuilt(mixin: type[Accelerated], base: type[nn.Module]) -> nn.Module:
    kind = _class_of(mixin, base)
    return kind.__new__(kind)


@dataclass(frozen=True)
class Part:
    """One module that was looked at: its path, the class of module, and what was replaced, or why it was not."""

    path: str
    kind: str
    replaced: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        what = f"{', '.join(self.replaced)} replaced" if self.replaced else "left alone"
        return f"{self.path or '(the module itself)'}: {self.kind}: {what}{': ' * bool(self.reason)}{self.reason}"


@dataclass(frozen=True)
class Summary:
    """What `accelerate` did: parts with methods replaced, and parts left alone with the reason."""

    replaced: tuple[Part, ...]
    left: tuple[Part, ...]

    def __str__(self) -> str:
        lines = [str(part) for part in (*self.replaced, *self.left)]
        return "\n".join(lines) or "no RSSM and no slot attention found: nothing replaced"


def accelerate(module: Any, *, linear: bool = False) -> Summary:
    """Replace the loops of every RSSM and slot attention in `module` by fused ops, in place, on the same Parameters.

    Args:
        module: an `nn.Module`, or an agent that holds modules in its attributes.
        linear: whether every plain `nn.Linear` is to use `ops.linear` too, on a CPU: twice as fast there and more where
            torch's library stays with AVX2, but differentiable once only, so not for models with gradient penalties.

    Returns:
        A `Summary`; print it. What cannot be matched exactly is left alone and listed with the reason.

    Raises:
        TypeError: `module` is no module and holds none, or `linear` is no bool.

    The results are those of the original up to rounding, the samples too from the same seed. Inside autocast on CUDA,
    states stay in float32 (the original rounds them to the region's dtype); inside autocast on the CPU, with weights or
    inputs in half precision, and wherever else the numbers would differ, calls go to the original.

    `restore` undoes it. Call it again after replacing parts of the module: what is accelerated already is listed as is.
    """
    from phyxdream.compat.linear import Linear

    if not isinstance(linear, bool):
        raise TypeError(f"linear: expected True or False, got {type(linear).__name__}")
    replaced, left, layers = [], [], 0
    for path, part in _modules(module):
        if linear and Linear.recognises(part):
            part.__class__ = _class_of(Linear, nn.Linear)
        if isinstance(part, Linear):
            layers += 1
            continue
        if isinstance(part, Accelerated):
            replaced.append(Part(path, part.kind, part.replaces, part.remark))
            continue
        refused = None
        for mixin in (kind for kind in _kinds() if kind.recognises(part)):
            try:
                _fit(part, mixin)
            except Misfit as reason:
                refused = refused or Part(path, mixin.kind, reason=str(reason))
            else:
                replaced.append(Part(path, mixin.kind, mixin.replaces, mixin.remark))
                break
        else:
            if refused:
                left.append(refused)
                continue
            known = (x.path for x in (*replaced, *left))
            inside = any(not x or path.startswith(f"{x}.") for x in known)  # of something that was looked at
            if not inside and (reason := _almost(part)):
                left.append(Part(path, type(part).__name__, reason=reason))
    if layers:
        replaced.append(Part(f"{layers} layers", Linear.kind, Linear.replaces, Linear.remark))
    return Summary(tuple(replaced), tuple(left))


def restore(module: Any) -> tuple[str, ...]:
    """Undo `accelerate`: every part of `module` gets its own class back. Returns their paths.

    Raises:
        TypeError: `module` is no module and holds none.
    """
    paths = []
    for path, part in _modules(module):
        if isinstance(part, Accelerated):
            part.__class__ = type(part).__bases__[1]
            paths.append(path)
    return tuple(paths)


def _modules(module: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Module):
        return iter(list(module.named_modules()))
    held = {name: x for name, x in getattr(module, "__dict__", {}).items() if isinstance(x, nn.Module)}
    if not held:
        raise TypeError(f"module: expected an nn.Module, or an agent that holds some, got {type(module).__name__}")
    memo: set[nn.Module] = set()
    return iter([found for name, x in held.items() for found in x.named_modules(memo, prefix=name)])


def _kinds() -> tuple[type[Accelerated], ...]:
    from phyxdream.compat import dreamerv3_torch, r2dreamer, rllib, sheeprl, slot_attention, torchrl

    return (
        dreamerv3_torch.RSSM,
        r2dreamer.RSSM,
        sheeprl.RSSMV3,
        sheeprl.RSSMV2,
        sheeprl.RSSMV1,
        torchrl.RolloutV3,
        torchrl.RolloutV3Cumulative,
        torchrl.PriorV3,
        torchrl.PriorV3Cumulative,
        rllib.WorldModel,
        slot_attention.SlotAttention,
    )


def _almost(module: nn.Module) -> str:
    """Of something like an RSSM that is none of the known: why it is left alone."""
    name = type(module).__name__
    own = type(module).__module__.startswith("phyxdream.")
    if own or not ("RSSM" in name or "SlotAttention" in name):
        return ""
    if any(True for x in module.children() if "RSSM" in type(x).__name__ or isinstance(x, nn.ModuleList)):
        return "an ensemble, or a composition that is not known"
    return "its parts are not named as in a codebase that is known"


def _read(module: nn.Module, mixin: type[Accelerated]) -> Any:
    try:
        return mixin.read(module)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise Misfit(f"parts that are not made as there ({error})") from error


def _fit(module: nn.Module, mixin: type[Accelerated]) -> None:
    """Gives the module its fast class, or raises `Misfit`."""
    if name := watched(module):
        raise Misfit(f"hooks on its part {name}, which would not run")
    _read(module, mixin)
    if next(module.parameters()).device.type == "meta":
        raise Misfit("weights on the meta device, which cannot be tried")
    _try(module, mixin)
    module.__class__ = _class_of(mixin, type(module))


def _try(module: nn.Module, mixin: type[Accelerated]) -> None:
    """Runs a copy both ways. The copy has weights in which nothing is zero or one by chance, so that every path is
    seen; a class drawn otherwise for one rounding is so rare that a second seed is a second chance."""
    try:
        original = copy.deepcopy(module)
    except Exception as error:
        raise Misfit(f"no copy of it to try on could be made ({type(error).__name__}: {error})") from error
    mixin.simplify(original)
    device = mixin.read(original).like.device
    difference = ""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.no_grad():
                for x in original.parameters():
                    fan_in = x[0].numel() if x.dim() > 1 else 25
                    x.copy_(x.mean().nan_to_num() * (x.dim() == 1) + torch.randn_like(x) / fan_in**0.5)
            fast = copy.deepcopy(original)
            fast.__class__ = _class_of(mixin, type(module))
            difference = next(filter(None, _differences(original, fast, mixin)), "")
            if not difference:
                return
    raise Misfit(difference)


def _differences(original: nn.Module, fast: nn.Module, mixin: type[Accelerated]) -> Iterator[str]:
    for (run, make), seed in zip(mixin.trials(original), itertools.count(10)):
        method, results = run if isinstance(run, str) else run.__name__, []
        for module in (original, fast):
            torch.manual_seed(seed)
            arguments = make()
            inputs = {name: x for name, x in _leaves(arguments, "input") if x.requires_grad}
            torch.manual_seed(seed)
            try:
                found = getattr(module, run)(*arguments) if isinstance(run, str) else run(module, *arguments)
                results.append(_observed(found, inputs, module))
            except Exception as error:
                if module is original:
                    yield f"its own {method} fails on a small call ({type(error).__name__}: {error})"
                    return
                raise
        expected, found = results
        if expected.keys() != found.keys():
            yield f"its {method} returns other things: {sorted(expected.keys() ^ found.keys())}"
        # What is 0 but for rounding is measured by all that is not.
        scale = 1e-3 * max((x.double().norm().item() for x in expected.values() if x is not None), default=0.0)
        for name in filter(found.__contains__, expected):
            yield _difference(method, name, expected[name], found[name], scale)


def _difference(method: str, name: str, expected: Tensor | None, found: Tensor | None, scale: float) -> str:
    if expected is None or found is None:
        given = next((x for x in (expected, found) if x is not None), None)
        return "" if given is None or not given.any() else f"its {method} has another {name}"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"its {method} returns {name} as {tuple(expected.shape)} {expected.dtype}"
    scale = max(scale, expected.double().norm().item()) or 1.0
    off = (expected.double() - found.double()).norm().item() / scale
    return "" if off <= TOLERANCE else f"its {method} computes something else: {name} differs by {off:.0%}"


def _observed(outputs: Any, inputs: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor | None]:
    """Outputs by name, and the gradients that random weights of them bring to inputs and Parameters."""
    named = dict(_leaves(outputs, "output"))
    leaves = {**inputs, **{name: x for name, x in module.named_parameters() if x.requires_grad}}
    total = sum(
        (torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).sin().view(x.shape) * x).sum()
        for x in named.values()
        if x.requires_grad
    )
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if isinstance(total, Tensor) and leaves:
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found: dict[str, Tensor | None] = {name: x.detach() for name, x in named.items()}
    return found | {f"the gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict) or hasattr(tree, "items"):
        for key, value in tree.items():
            yield from _leaves(value, f"{name} {key}")
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{name} {i}")
