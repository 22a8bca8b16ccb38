"""How the replay chooses its sequences, and how it keeps sampling and adding in step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Union


@dataclass(frozen=True)
class Uniform:
    """Every stored sequence is equally likely."""


@dataclass(frozen=True)
class Recency:
    """The newer, the likelier: a sequence has chance ∝ age**-exponent, the newest of each environment having age 1.

    Source: the recency selector of danijar/dreamerv3, which uses exponent 1.
    """

    exponent: float = 1.0


@dataclass(frozen=True)
class Prioritized:
    """A step is picked with chance ∝ priority**exponent, then any of the sequences that hold it.

    A sequence's chance is so the mean of its steps' priorities, whatever its length. `Replay.prioritize` sets them.

    Args:
        exponent: 0 for uniform steps, 1 for chances proportional to priorities (Schaul et al. 2016 use 0.6 to 0.7).
        initial: priority of a new step; None for the largest one given so far, 1 at first.
    """

    exponent: float = 0.8
    initial: float | None = None


@dataclass(frozen=True)
class Curious:
    """Curious Replay: what the model has seen seldom or predicts badly comes first.

    A step's priority is c·beta**visits + (loss + epsilon)**alpha, where each `Replay.prioritize` with a loss counts as
    a visit; a step is picked with chance ∝ priority, then any of the sequences that hold it.

    Source: Kauvar, Doyle, Zhou & Haber 2023, with their constants.
    """

    c: float = 1e4
    beta: float = 0.7
    alpha: float = 0.7
    epsilon: float = 0.01
    initial: float = 1e5
    """Priority of a new step."""


Selector = Union[Uniform, Recency, Prioritized, Curious]  # noqa: UP007 (the docs show it; `|` needs no import)


@dataclass(frozen=True)
class Limiter:
    """Keeps sampling and adding in step, for threads that do one or the other.

    Sampling n steps waits until samples_per_insert * (steps added - min_size) - (steps sampled) is at least n. Adding
    waits while that budget is above `lead`.

    Args:
        samples_per_insert: sampled steps per added step, the field's train ratio.
        min_size: steps to be added before the first is sampled.
        lead: sampled steps by which adding may be ahead; None: adding never waits.
        timeout: seconds after which a thread that waits gets a `TimeoutError`; None: never.
    """

    samples_per_insert: float
    min_size: int = 1
    lead: float | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        _check_number("Limiter.samples_per_insert", self.samples_per_insert, positive=True)
        if not isinstance(self.min_size, int) or isinstance(self.min_size, bool) or not 0 <= self.min_size < 2**63:
            raise ValueError(f"Limiter.min_size: got {self.min_size!r}, expected an integer of at least 0")
        for name in ("lead", "timeout"):
            if getattr(self, name) is not None:
                _check_number(f"Limiter.{name}", getattr(self, name), positive=True)


def selector_options(selector: Selector | Mapping[Selector, float]) -> dict[str, Any]:
    """The mixture as the core takes it; checks every number."""
    shares = selector if isinstance(selector, Mapping) else {selector: 1.0}
    if not shares:
        raise ValueError("selector: got an empty mixture, expected {selector: share}")
    options: dict[str, Any] = {"uniform": 0.0}
    for part, share in shares.items():
        if not isinstance(part, (Uniform, Recency, Prioritized, Curious)):
            raise TypeError(f"selector: got {part!r}, expected Uniform(), Recency(), Prioritized(), Curious() or a "
                            "dict of them with their shares")  # fmt: skip
        _check_number(f"selector: the share of {part}", share, positive=True)
        for field in fields(part):
            value = getattr(part, field.name)
            if not (field.name == "initial" and value is None):
                positive = field.name == "initial" or (isinstance(part, Curious) and field.name == "epsilon")
                _check_number(f"{type(part).__name__}.{field.name}", value, positive)
        kind = _KINDS[type(part)]
        if options.get(kind):
            raise ValueError(f"selector: got two of a kind in {list(shares)}, expected at most one of Uniform, one of "
                             "Recency, and one of Prioritized or Curious")  # fmt: skip
        options[kind] = float(share)
        match part:
            case Recency(exponent):
                options["recency_exponent"] = float(exponent)
            case Prioritized(exponent, initial):
                options |= {"curious": False, "exponent": float(exponent), "initial": float(initial or 0)}
            case Curious(c, beta, alpha, epsilon, initial):
                options |= {"curious": True, "exponent": float(alpha), "c": float(c), "beta": float(beta),
                            "epsilon": float(epsilon), "initial": float(initial)}  # fmt: skip
    return options


def selector_from(options: Mapping[str, Any]) -> Selector | dict[Selector, float]:
    """The inverse of `selector_options`."""
    shares: dict[Selector, float] = {}
    if options["uniform"]:
        shares[Uniform()] = options["uniform"]
    if options["recency"]:
        shares[Recency(options["recency_exponent"])] = options["recency"]
    if options["priority"] and options["curious"]:
        curious = Curious(options["c"], options["beta"], options["exponent"], options["epsilon"], options["initial"])
        shares[curious] = options["priority"]
    elif options["priority"]:
        shares[Prioritized(options["exponent"], options["initial"] or None)] = options["priority"]
    return next(iter(shares)) if len(shares) == 1 else shares


_KINDS = {Uniform: "uniform", Recency: "recency", Prioritized: "priority", Curious: "priority"}


def _check_number(name: str, value: Any, positive: bool) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (positive and value == 0):
        expected = "a positive number" if positive else "a number of at least 0"
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
