"""Pictures of a results file: one a suite, a panel a case, a bar a backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phyxdream.bench import results
from phyxdream.bench.results import ratio_text, seconds_text

INK, MUTED, LINE = "#1b2430", "#66727f", "#dfe4ea"
BASE, OTHER, OURS = "#a9b4c0", "#6f7f90", "#2563eb"
_OURS = ("cpu", "triton", "triton_graph", "phyxdream", "phyxdream_graph", "sample", "loader")


def write_plots(path: Path, result: dict[str, Any]) -> list[Path]:
    """Write one PNG a suite beside the results file `path`; returns their paths."""
    written = []
    for suite in dict.fromkeys(row["suite"] for row in result["benchmarks"]):
        rows = [row for row in result["benchmarks"] if row["suite"] == suite]
        target = path.with_name(f"{path.stem}-{suite}.png")
        suite_figure(suite, rows, result["machine"]).savefig(target, dpi=110)
        written.append(target)
    return written


def suite_figure(suite: str, rows: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    """Panels in a grid, sizes along one side and ops along the other where all sizes have the same; each panel from
    zero on its own scale."""
    cases, columns = _grid(list(results.cases(rows).values()))
    lines = math.ceil(len(cases) / columns)
    bars = max(map(len, cases))
    height = lines * (0.62 + 0.27 * bars) + 0.75
    figure = Figure(figsize=(max(4.4 * columns, 7), height), layout="constrained")
    foot = 0.22 / height
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.12, rect=(0, foot, 1, 1 - foot))
    title = f"{suite}: median time of a call, {results.machine_name(machine)}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=INK, fontweight="bold")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, case in zip(axes, cases, strict=False):
        _panel(ax, case, bars)
    for ax in axes[len(cases) :]:
        ax.set_axis_off()
    versions = f"torch {machine.get('torch')}, phyxdream {machine.get('phyxdream')}, {machine['started'][:10]}"
    figure.text(0.988, 0.004, versions, ha="right", va="bottom", fontsize=7, color=MUTED)
    return figure


def _grid(cases: list[list[dict[str, Any]]]) -> tuple[list[list[dict[str, Any]]], int]:
    """The cases in the order of their panels, and how many stand side by side."""
    kinds = list(dict.fromkeys(results.title(case[0]) for case in cases))
    sizes = list(dict.fromkeys(case[0]["size"] for case in cases))
    if len(kinds) * len(sizes) == len(cases):
        if 1 < len(kinds) <= 4:
            return cases, len(kinds)
        if 1 < len(sizes) <= 3:
            return sorted(cases, key=lambda case: kinds.index(results.title(case[0]))), len(sizes)
    return cases, min(3, len(cases))


def _panel(ax: Axes, case: list[dict[str, Any]], bars: int) -> None:
    names = [results.BACKENDS.get(row["backend"], row["backend"]) for row in case]
    times = [row["median_seconds"] for row in case]
    half = [row["iqr_seconds"] / 2 for row in case]
    colors = [OURS if row["backend"] in _OURS else OTHER if i else BASE for i, row in enumerate(case)]
    ax.barh(range(len(case)), times, height=0.68, color=colors, xerr=half, error_kw={"lw": 0.8, "ecolor": INK})
    longest = max(times)
    for i, row in enumerate(case):
        text = seconds_text(row["median_seconds"])
        if i and row["ratio"]:
            text += f"   {ratio_text(row['ratio'])}"
        if row.get("setup_seconds"):
            text += f", after {seconds_text(row['setup_seconds'])}"
        bold = "bold" if row["backend"] in _OURS else "normal"
        ax.text(times[i] + half[i] + 0.02 * longest, i, text, va="center", fontsize=8, color=INK, fontweight=bold)
    ax.set_yticks(range(len(case)), names, fontsize=8, color=INK)
    ax.set_ylim(bars - 0.4, -0.6)  # the first on top, bars of all panels equally thick
    ax.set_xlim(0, 1.6 * max(t + h for t, h in zip(times, half, strict=True)))
    ax.set_xticks([])
    ax.set_title(results.title(case[0]), loc="left", fontsize=9, color=INK, pad=13)
    ax.text(0, 1.03, case[0]["label"], transform=ax.transAxes, fontsize=7.5, color=MUTED)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)
    ax.spines["left"].set_color(LINE)
    ax.tick_params(left=False)
