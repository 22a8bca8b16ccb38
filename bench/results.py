"""What a results file holds, and how its figures are written.

    {"machine": {"started", "phyxdream", "torch", "cpu", "cores", "threads", "gpu", "device", "dtype", ..., "peak",
                 "load", "warnings", "memory_means"},
     "benchmarks": [{"suite", "op", "direction", "size", "label", "backend", "median_seconds", "iqr_seconds", "rounds",
                     "calls", "ratio", "work", "of_peak", "memory_bytes", "setup_seconds", "headline"}, ...],
     "skipped": [{"suite", "op", "direction", "size", "backend", "reason"}, ...]}

`ratio` is how many times faster than the first backend of its case, the median within rounds; `of_peak` the share of
the machine's peak for the unit of `work`; `memory_bytes` the peak of one call; `setup_seconds` the time to compile.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phyxdream.errors import PhyxdreamError
from phyxdream.train.run import environment, write_json

FOLDER = Path("bench/results")
_MACHINE = ("started", "phyxdream", "python", "torch", "triton", "numpy", "platform", "cpu", "cores", "threads", "gpu")
_ROW = {
    "suite": str,
    "op": str,
    "direction": str,
    "size": str,
    "label": str,
    "backend": str,
    "median_seconds": float,
    "iqr_seconds": float,
    "rounds": int,
}
BACKENDS = {
    "reference": "PyTorch",
    "compile": "torch.compile",
    "cuda_graph": "CUDA graph",
    "cpu": "C++",
    "triton": "Triton",
    "triton_graph": "Triton, CUDA graph",
}
"""How backends are called in tables and plots; other contenders go by their own names."""


class ResultsError(PhyxdreamError, ValueError):
    """A results file that is damaged or of another kind."""


def machine() -> dict[str, Any]:
    """Versions, hardware and the current time."""
    found = environment()
    return {name: found.get(name) for name in _MACHINE}


def machine_name(found: Mapping[str, Any]) -> str:
    """The hardware in a few words, and the dtype if it is not float32.

    >>> machine_name({"cpu": "AMD EPYC 9B14 64-Core Processor", "cores": 2, "gpu": []})
    'AMD EPYC 9B14, 2 cores'
    >>> machine_name({"cpu": "AMD EPYC", "cores": 8, "gpu": ["NVIDIA H200"], "device": "cuda"})
    'NVIDIA H200'
    """
    dtype = "" if found.get("dtype", "float32") == "float32" else f", {found['dtype']}"
    if found.get("device") == "cuda" and found["gpu"]:
        return found["gpu"][0] + dtype
    cpu = re.sub(r"\(R\)|\(TM\)|( \d+-Core)? Processor| CPU @.*", "", found["cpu"] or "CPU").strip()
    return f"{cpu}, {found['cores']} core{'s' * (found['cores'] != 1)}{dtype}"


def file_stem(found: Mapping[str, Any]) -> str:
    """Name of a results file: date, time and machine.

    >>> file_stem({"started": "2026-11-21T05:15:55+00:00", "cpu": "AMD EPYC", "cores": 2, "gpu": []})
    '2026-11-21-051555-amd-epyc-2-cores'
    """
    date, time = found["started"][:10], found["started"][11:19].replace(":", "")
    return f"{date}-{time}-{re.sub(r'[^a-z0-9]+', '-', machine_name(found).lower()).strip('-')}"


def check(result: Any, source: str) -> dict[str, Any]:
    """`result`, if it is what the module's docstring says; else a `ResultsError` that names what is wrong."""
    if not isinstance(result, dict) or not isinstance(result.get("machine"), dict):
        raise ResultsError(f"{source}: expected an object with 'machine' and 'benchmarks'")
    for name in ("started", "cpu", "cores", "gpu"):
        if name not in result["machine"]:
            raise ResultsError(f"{source}: machine lacks {name!r}")
    rows = result.get("benchmarks")
    if not isinstance(rows, list):
        raise ResultsError(f"{source}: 'benchmarks' must be a list")
    for i, row in enumerate(rows):
        for name, kind in _ROW.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
                raise ResultsError(f"{source}: benchmarks[{i}].{name}: expected {kind.__name__}, got {value!r}")
            if kind is float and not (math.isfinite(value) and value >= 0):
                raise ResultsError(f"{source}: benchmarks[{i}].{name}: expected a time, got {value}")
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a results file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, check(result, str(path)))
    except OSError as error:
        raise ResultsError(f"could not write {path}: {error.strerror or error}") from error


def read(path: Path) -> dict[str, Any]:
    """A JSON file; `check` says whether it is of this kind."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultsError(f"{path}: expected JSON, but {error}") from error


def cases(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    """Rows of one case under (suite, op, direction, size), in the order they come in."""
    found: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["suite"], row["op"], row["direction"], row["size"]), []).append(row)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Figures as text.


def title(row: Mapping[str, Any]) -> str:
    """Op and direction.

    >>> title({"op": "rssm_observe", "direction": "forward"})
    'rssm_observe forward'
    """
    return f"{row['op']} {row['direction']}".strip()


def seconds_text(seconds: float) -> str:
    """A time with three digits or so.

    >>> [seconds_text(s) for s in (5.57e-6, 0.0006395, 0.0997, 4.979, 247.2)]
    ['5.6 µs', '639.5 µs', '99.7 ms', '4.98 s', '247 s']
    """
    for limit, factor, unit, digits in ((1e-3, 1e6, "µs", 1), (1.0, 1e3, "ms", 1), (100.0, 1, "s", 2)):
        if seconds * factor < round(limit * factor, 6):
            return f"{seconds * factor:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def bytes_text(count: float) -> str:
    """Memory in powers of ten.

    >>> [bytes_text(n) for n in (0, 12_000, 80_003_072, 2_500_000_000)]
    ['0 kB', '12 kB', '80 MB', '2.5 GB']
    """
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def ratio_text(ratio: float) -> str:
    """How many times faster.

    >>> ratio_text(114.86), ratio_text(3.42)
    ('115×', '3.4×')
    """
    return f"{ratio:.0f}×" if ratio >= 99.95 else f"{ratio:.1f}×"


def rate_text(work: Mapping[str, Any] | None, seconds: float) -> str:
    """What a call does in a second.

    >>> rate_text({"amount": 2e9, "unit": "FLOP"}, 0.02), rate_text({"amount": 8, "unit": "frames"}, 1e-5)
    ('100 GFLOP/s', '800k frames/s')
    """
    if not work:
        return ""
    rate, unit = work["amount"] / seconds, work["unit"]
    if unit in ("FLOP", "B"):
        return f"{rate / 1e9:.{0 if rate >= 1e10 else 1}f} G{unit}/s"
    if rate >= 1e6:
        return f"{rate / 1e6:.1f}M {unit}/s"
    return f"{rate / 1e3:.0f}k {unit}/s" if rate >= 1e4 else f"{rate:.0f} {unit}/s"


def share_text(share: float | None) -> str:
    """A share of the peak.

    >>> share_text(0.2345), share_text(0.004), share_text(None)
    ('23 %', '0.4 %', '')
    """
    if share is None:
        return ""
    return f"{share * 100:.0f} %" if share >= 0.0995 else f"{share * 100:.1f} %"
