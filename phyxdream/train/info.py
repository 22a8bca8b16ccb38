"""What `phyxdream info` shows: versions, hardware, and every backend with the reason when it is off."""

from __future__ import annotations

import importlib.metadata
import os

from phyxdream import envs
from phyxdream.agents.config import PRESETS, SIZES
from phyxdream.envs import unity
from phyxdream.errors import PhyxdreamError
from phyxdream.train.run import environment

Rows = list[tuple[str, str]]


def collect() -> dict[str, Rows]:
    """Tables by title, each a list of (name, value)."""
    found = environment()
    gpu = ", ".join(found["gpu"]) or "none"
    machine: Rows = [
        ("phyxdream", found["phyxdream"]),
        ("python", found["python"]),
        ("platform", found["platform"]),
        ("cpu", f"{found['cpu']}, {found['cores']} cores, {found['threads']} torch threads"),
        ("gpu", gpu + (f" (CUDA {found['cuda']})" if found["cuda"] else "")),
    ]
    packages = ("torch", "triton", "numpy", "gymnasium", "envpool", "dm_control", "mujoco", "gymnasium-robotics")
    return {
        "machine": machine,
        "packages": [(name, _version(name)) for name in packages],
        "op backends": _op_backends(),
        "environments": _environments(),
        "presets": [("presets", ", ".join(PRESETS)), ("sizes", ", ".join(SIZES))],
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _op_backends() -> Rows:
    from phyxdream.ops.backend import status

    rows = [(name, "on" if not problem else f"off: {problem}") for name, problem in status().items()]
    forced = os.environ.get("PHYXDREAM_BACKEND")
    return [*rows, ("PHYXDREAM_BACKEND", forced)] if forced else rows


def _environments() -> Rows:
    rows = []
    for backend in ("envpool", "gym", "dmc", "robotics"):
        try:
            rows.append((backend, f"{len(envs.list_ids(backend))} ids"))
        except PhyxdreamError as error:
            rows.append((backend, f"off: {error}"))
    try:
        rows.append(("unity", f"mlagents-envs {unity.version()} of {unity.interpreter()}"))
    except PhyxdreamError as error:
        rows.append(("unity", f"off: {error}"))
    return rows
