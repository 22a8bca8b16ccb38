"""Errors a user can act on: they name what was given, what was expected, and the nearest known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PhyxdreamError(Exception):
    """Base of the errors that the command line prints as one sentence instead of a traceback."""


class ConfigError(PhyxdreamError, ValueError):
    """A configuration value, preset or name that cannot be used."""


class EnvError(PhyxdreamError, ValueError):
    """An environment that cannot be made, or that broke its own contract (NaN reward, foreign observation)."""


class MissingDependency(PhyxdreamError, ImportError):
    """An optional package or system library that is not there; the message says how to get it."""


class CheckpointError(PhyxdreamError, RuntimeError):
    """A checkpoint that is missing, truncated, foreign, or could not be written."""


class DistributedError(PhyxdreamError, RuntimeError):
    """The processes that learn together cannot reach each other any more."""


class ActorError(PhyxdreamError, RuntimeError):
    """An actor of a parallel run that does not come to life, or that gives what cannot be."""


class ReplayClosed(PhyxdreamError, RuntimeError):
    """The replay, or its loader, was closed: whoever waited for it may stop."""


def suggest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """`"; did you mean 'a' or 'b'?"` with the known names nearest to `name`, or an empty string."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    lowered = {k.lower(): k for k in known}
    near = near or [lowered[k] for k in difflib.get_close_matches(name.lower(), lowered, n=limit, cutoff=0.5)]
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
