"""phyxdream: fast world-model agents of the Dreamer family, and the fused kernels behind them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from phyxdream import agents, compat, envs, nn, ops
    from phyxdream.agents import DreamerAgent, DreamerConfig
    from phyxdream.compat import accelerate, restore
    from phyxdream.ops.backend import explain, use_backend
    from phyxdream.replay import Replay

# Resolved on first use, so that `from phyxdream import ops` does not load environments or agents.
_lazy = {
    "ops": ("phyxdream.ops", None),
    "nn": ("phyxdream.nn", None),
    "envs": ("phyxdream.envs", None),
    "agents": ("phyxdream.agents", None),
    "compat": ("phyxdream.compat", None),
    "accelerate": ("phyxdream.compat", "accelerate"),
    "restore": ("phyxdream.compat", "restore"),
    "Replay": ("phyxdream.replay", "Replay"),
    "DreamerAgent": ("phyxdream.agents", "DreamerAgent"),
    "DreamerConfig": ("phyxdream.agents", "DreamerConfig"),
    "use_backend": ("phyxdream.ops.backend", "use_backend"),
    "explain": ("phyxdream.ops.backend", "explain"),
}
__all__ = [
    "DreamerAgent",
    "DreamerConfig",
    "Replay",
    "__version__",
    "accelerate",
    "agents",
    "compat",
    "envs",
    "explain",
    "nn",
    "ops",
    "restore",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _lazy:
        raise AttributeError(f"module 'phyxdream' has no attribute {name!r}")
    module, attribute = _lazy[name]
    value = importlib.import_module(module)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
