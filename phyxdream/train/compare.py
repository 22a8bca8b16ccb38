"""Runs side by side: learning curves with bands over seeds, against environment steps and wall-clock, and a table.

    IQM       = mean of the scores of all runs × tasks, without the lowest and the highest quarter of them
    interval  = 2.5th to 97.5th percentile of the IQM of 2000 resamples: for each task, as many runs as it has are drawn
                with replacement (a stratified bootstrap)

Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", 2021, whose library
rliable has the same formulas. Every environment is a task of its own here: returns of two have no common scale.

Between the points that a run logged, its curve is a straight line. The runs of a method meet on the points of all of
them, from where the last of them has begun to where the first one ends: nothing is extrapolated.

>>> interquartile_mean(np.array([[1.0], [2.0], [4.0], [100.0]]))
array(3.)
>>> bootstrap_interval(np.array([[5.0], [5.0], [5.0]]))
array([5., 5.])
"""

from __future__ import annotations

import html
import itertools
import json
import math
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from phyxdream.agents.config import SIZES, DreamerConfig
from phyxdream.errors import ConfigError, PhyxdreamError, suggest
from phyxdream.train import metrics
from phyxdream.train.report import (
    INK,
    LEGEND,
    count,
    dress,
    env_name,
    figure_png,
    is_number,
    machine,
    page,
    plural,
    summarise,
    svg,
    time_unit,
    write_files,
)
from phyxdream.train.run import Run

Array = NDArray[Any]

REPETITIONS, CONFIDENCE, SEED = 2000, 0.95, 0
POINTS = 200  # of a curve
# Say nothing about how the agent learns, so they set no two methods apart.
_NOT_METHOD = ("seed", "logdir", "checkpoint_every", "resume_replay_seconds", "log_every", "eval_every",
               "eval_episodes", "env", "env_backend")  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers can tell apart, but for black and yellow: pages are dark or white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_AXES = {"step": "environment steps", "time": "wall-clock"}
_RULE = (
    f"Lines are interquartile means (IQM) over seeds, bands {100 * CONFIDENCE:.0f} % intervals of a stratified "
    f"bootstrap with {REPETITIONS:,} repetitions (Agarwal et al., 2021). Runs are interpolated linearly between the "
    "points they logged, from where the last run of a method has begun to where the first one ends."
)


class Curve(NamedTuple):
    """Values `y` of one run at increasing `x`."""

    x: Array
    y: Array


class Band(NamedTuple):
    """Values of several runs at common `x`: their interquartile mean, and `interval` (2, len(x)); None for one run."""

    x: Array
    iqm: Array
    interval: Array | None


@dataclass
class Member:
    """One run, as it was read.

    Attributes:
        path: its directory.
        env: its environment with the backend.
        options: its configuration, options that it does not have at their defaults.
        step, seconds: how far it is.
        machine: what its last start ran on.
        training, evaluation: curves of returns by "step" and by "time" (seconds).
        final: "step", "mean", "std" and "episodes" of its newest evaluation, None without one.
        notes: what a reader should know about it.
    """

    path: Path
    env: str
    options: dict[str, Any]
    step: int
    seconds: float
    machine: str
    training: dict[str, Curve]
    evaluation: dict[str, Curve]
    final: dict[str, float] | None
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        total = self.options.get("total_steps")
        return not is_number(total) or self.step >= total


@dataclass
class Group:
    """The runs of one method in one environment.

    Attributes:
        env: the environment.
        method: the options that make the method, in the order of the configuration.
        members: its runs, by seed.
        label: what sets it apart from the other methods.
    """

    env: str
    method: dict[str, Any]
    members: list[Member]
    label: str = ""

    @property
    def size(self) -> str:
        """`3 seeds`, or `3 runs` where a seed came twice or runs have none."""
        seeds = [member.options.get("seed") for member in self.members]
        distinct = len(set(map(str, seeds))) == len(seeds) and None not in seeds
        return plural(len(seeds), "seed" if distinct else "run")

    @cached_property
    def bands(self) -> dict[tuple[str, str], Band]:
        """By ("training" or "evaluation", "step" or "time"), as far as there are any."""
        found = {}
        for kind, axis in itertools.product(("training", "evaluation"), _AXES):
            curves = [getattr(member, kind).get(axis) for member in self.members]
            # One evaluation at the end is a number for the table, not a curve.
            shortest = 1 if kind == "training" else 2
            if all(curve is not None and len(curve.x) >= shortest for curve in curves):
                band = common_band(curves)
                if band is not None:
                    found[kind, axis] = band
        return found

    @cached_property
    def final(self) -> dict[str, Any] | None:
        """Of the newest evaluations of its runs: mean and std over all episodes, IQM over runs and its interval."""
        rows = [member.final for member in self.members if member.final]
        if not rows:
            return None
        scores = np.array([[row["mean"]] for row in rows])
        interval = bootstrap_interval(scores).tolist() if len(rows) > 1 else None
        return {**_pooled(rows), "runs": len(rows), "iqm": float(interquartile_mean(scores)), "interval": interval}


# Statistics


def interquartile_mean(scores: Array) -> Array:
    """Mean of the middle half of all scores.

    Of n scores, ⌊n/4⌋ are left out at either end: none of up to three.

    Args:
        scores: (runs, tasks, ...).

    Returns:
        (...), for every element of the trailing dimensions.
    """
    flat = np.sort(scores.reshape(-1, *scores.shape[2:]), axis=0)
    cut = len(flat) // 4
    return np.asarray(flat[cut : len(flat) - cut].mean(axis=0))


def bootstrap_interval(
    scores: Array, repetitions: int = REPETITIONS, confidence: float = CONFIDENCE, seed: int = SEED
) -> Array:
    """Percentile interval of the interquartile mean by a stratified bootstrap: runs are redrawn within every task.

    A resample takes the same runs at all trailing elements; each of them has the interval it would have alone.

    Args:
        scores: (runs, tasks, ...).
        repetitions: number of resamples.
        confidence: share of them that lies between the ends.
        seed: of the draws; the same one gives the same interval.

    Returns:
        (2, ...): lower and upper ends.
    """
    runs, tasks = scores.shape[:2]
    draws = np.random.default_rng(seed).integers(runs, size=(repetitions, runs, tasks))
    tail = scores.reshape(runs, tasks, -1)
    ends = np.empty((2, tail.shape[-1]))
    percentiles = 50 * np.array([1 - confidence, 1 + confidence])
    for start in range(0, tail.shape[-1], 32):  # in pieces, for memory
        piece = slice(start, start + 32)
        samples = tail[..., piece][draws, np.arange(tasks)]  # (repetitions, runs, tasks, piece)
        estimates = interquartile_mean(np.moveaxis(samples, 0, 2))  # (repetitions, piece)
        ends[:, piece] = np.percentile(estimates, percentiles, axis=0)
    return ends.reshape(2, *scores.shape[2:])


def common_band(curves: Sequence[Curve]) -> Band | None:
    """Interquartile mean and interval of curves, on at most `POINTS` of the points where one of them has a value.

    Curves are interpolated linearly, and only where all of them are defined: None if there is no such point.
    """
    first, last = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    grid = np.unique(np.concatenate([curve.x for curve in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    if not len(grid):
        return None
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, POINTS).round().astype(int))]
    scores = np.stack([np.interp(grid, curve.x, curve.y) for curve in curves])[:, None]  # (runs, 1 task, points)
    return Band(grid, interquartile_mean(scores), bootstrap_interval(scores) if len(curves) > 1 else None)


def _pooled(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over the episodes of several evaluations, from those of each."""
    episodes = np.array([row["episodes"] for row in rows], dtype=np.float64)
    mean, std = (np.array([row[name] for row in rows]) for name in ("mean", "std"))
    overall = float(np.average(mean, weights=episodes))
    variance = np.average(std**2 + (mean - overall) ** 2, weights=episodes)
    return {"mean": overall, "std": math.sqrt(variance), "episodes": int(episodes.sum())}


# Reading


def read_member(path: str | os.PathLike[str]) -> Member:
    """Read a run directory, whether the run is finished or not.

    Raises:
        ConfigError: it is no run, no episode has ended in it yet, or a file in it is damaged; the message names it.
    """
    run = Run.open(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            columns = metrics.read(run.metrics)
        except OSError as e:
            raise ConfigError(f"could not read {run.metrics}: {e.strerror or e}") from e
    damage = [str(warning.message) for warning in caught]
    if not columns:
        if damage:
            raise ConfigError(f"{run.metrics} is damaged: none of its lines can be read")
        raise ConfigError(f"{run.path} has no metrics yet: wait until its training has logged some, or leave it out")
    step, seconds = columns["step"], columns.get("time", np.full(len(columns["step"]), np.nan))
    value = columns.get("episode/return", np.full(len(step), np.nan))
    training = _curves({"step": step, "time": seconds}, value)
    if not training:
        raise ConfigError(f"{run.path} has no episode return yet: wait until an episode has ended, or leave it out")
    evaluations = _evaluations(run, step, seconds)
    points = {name: np.array([row[name] for row in evaluations]) for name in ("step", "time", "mean")}
    start = run.versions()[-1:]
    if not all(isinstance(row, dict) for row in start):
        raise ConfigError(f"{run.path / 'versions.json'} is damaged: its starts are no objects")
    hardware = " · ".join(machine(start[0])) if start else "unknown"
    host = start[0].get("host") if start else None
    return Member(
        path=run.path,
        env=env_name(run),
        options={**DreamerConfig().to_dict(), **run.config},
        step=int(step[-1]),
        seconds=float(np.nanmax(seconds)) if np.isfinite(seconds).any() else math.nan,
        machine=f"{host}: {hardware}" if host else hardware,
        training=training,
        evaluation=_curves({"step": points["step"], "time": points["time"]}, points["mean"]),
        final=evaluations[-1] if evaluations else None,
        notes=damage,
    )


def _curves(axes: Mapping[str, Array], y: Array) -> dict[str, Curve]:
    """The finite points by each axis, without axes that have none; of points at one place, the last."""
    curves = {}
    for name, x in axes.items():
        keep = np.isfinite(x) & np.isfinite(y)
        if keep.any():
            at, back = np.unique(x[keep][::-1], return_index=True)
            curves[name] = Curve(at, y[keep][::-1][back])
    return curves


def _evaluations(run: Run, step: Array, seconds: Array) -> list[dict[str, float]]:
    """By step: all evaluations of the greedy policy at a step are one. `step` and `seconds` tell the time of those that
    do not have it."""
    found: dict[int, dict[Any, dict[str, float]]] = {}
    for row in run.evaluations():
        try:
            summary = summarise(row)
            usable = summary is not None and all(math.isfinite(summary[k]) for k in ("mean", "std", "episodes"))
        except (TypeError, ValueError) as e:
            raise ConfigError(f"{run.evaluation} is damaged: {e}") from e
        if usable and summary["episodes"] > 0 and is_number(row.get("step")) and not row.get("explore"):
            # Evaluating again with the same seed plays the same episodes again.
            found.setdefault(int(row["step"]), {})[str(row.get("seed"))] = {**summary, "time": row.get("time")}
    rows = []
    for at, by_seed in sorted(found.items()):
        times = [row["time"] for row in by_seed.values() if is_number(row["time"])]
        time = times[0] if times else float(np.interp(at, step, seconds))
        rows.append({"step": at, "time": time, **_pooled(list(by_seed.values()))})
    return rows


# Grouping


def group(members: Iterable[Member], by: Sequence[str] = ()) -> list[Group]:
    """Put the runs of one method in one environment together, and name each group by what sets it apart.

    Args:
        members: runs, each of them once.
        by: options that make a method, instead of all but the seed and those that say nothing about learning.

    Raises:
        ConfigError: `by` names an option that no run has.
    """
    members = list(members)
    known = dict.fromkeys(name for member in members for name in member.options)
    for name in by:
        if name not in known:
            raise ConfigError(f"by: no run has an option {name!r}{suggest(name, known)}")
    groups: dict[str, Group] = {}
    for member in members:
        names = by or [name for name in known if name not in _NOT_METHOD]
        method = {name: member.env if name == "env" else member.options.get(name) for name in names}
        found = groups.setdefault(f"{member.env} {_canonical(method)}", Group(member.env, method, []))
        found.members.append(member)
    ordered = list(groups.values())
    for found in ordered:
        found.members.sort(key=lambda member: (_canonical(member.options.get("seed")).zfill(12), str(member.path)))
    for found, label in zip(ordered, _labels(ordered, by), strict=True):
        found.label = label
    return sorted(ordered, key=lambda g: [h.env for h in ordered].index(g.env))


def differing(groups: Iterable[Group]) -> list[str]:
    """The options in which methods differ, but for sizes that every method has from its `size`."""
    methods = [g.method for g in groups]
    names = [n for n in methods[0] if len({_canonical(m[n]) for m in methods}) > 1]
    implied = [n for n in names if all(n in (s := SIZES.get(m.get("size"), {})) and s[n] == m[n] for m in methods)]
    return [name for name in names if name not in implied]


def _labels(groups: Sequence[Group], by: Sequence[str]) -> list[str]:
    """The preset, and the options in which methods of that preset differ in one of the environments."""
    if by:
        return [", ".join(_option(name, g.method[name]) for name in by) for g in groups]
    rows = []
    for g in groups:
        preset = g.method["preset"]
        rivals: dict[str, list[Group]] = {}
        for h in groups:
            if h.method["preset"] == preset:
                rivals.setdefault(h.env, []).append(h)
        names = {"preset", *(name for some in rivals.values() for name in differing(some))}
        rows.append([_option(name, value) for name, value in g.method.items() if name in names])
    # A label need not hold every option, but no two in one environment may be alike.
    for length in range(5, max(map(len, rows)) + 1):
        labels = [", ".join(row[:length]) + (", …" if len(row) > length else "") for row in rows]
        if len({(g.env, label) for g, label in zip(groups, labels, strict=True)}) == len(groups):
            return labels
    return [", ".join(row) for row in rows]


def _option(name: str, value: Any) -> str:
    return _text(value) if name in ("preset", "env") else f"{name}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "×".join(_text(item) for item in value) or "none"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _canonical(value: Any) -> str:
    """Equal for equal values: 64 and 64.0, tuples and the lists that JSON makes of them."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_canonical(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_canonical, value)) + "]"
    return repr(value)


# The comparison


@dataclass
class Comparison:
    """Groups of runs, and what `compare` wrote about them.

    Attributes:
        groups: by environment, in the order in which the runs came.
        files: what was written: pictures, page and numbers.
    """

    groups: list[Group]
    files: list[Path] = field(default_factory=list)

    @property
    def envs(self) -> list[str]:
        return list(dict.fromkeys(g.env for g in self.groups))

    @property
    def machines(self) -> list[str]:
        """The machines that runs were made on."""
        return list(dict.fromkeys(member.machine for g in self.groups for member in g.members))

    def rows(self) -> list[dict[str, str]]:
        """The table, column by name; the machine is a column only where runs come from several."""
        rows = []
        for g in self.groups:
            steps, seconds = ([getattr(m, name) for m in g.members] for name in ("step", "seconds"))
            unfinished = sum(not member.finished for member in g.members)
            row = {
                "method": g.label,
                "environment": g.env,
                "seeds": count(len(g.members)),
                "env steps": _range(steps, count) + (f" ({unfinished} unfinished)" if unfinished else ""),
                "minutes": _range(seconds, _minutes),
                "evaluation": _mean_std(g.final),
                "episodes": count(g.final and g.final["episodes"]),
                "IQM [95 %]": _iqm(g.final),
            }
            if len(self.machines) > 1:
                row["machine"] = "; ".join(dict.fromkeys(member.machine for member in g.members))
            rows.append(row)
        return rows

    def notes(self) -> list[str]:
        """What a reader should know: runs unfinished or not evaluated, curves cut short, seeds that came twice."""
        return [note for g in self.groups for note in _notes(g)]

    def tables(self) -> list[Table]:
        """The table for a terminal, one an environment."""
        rows, tables = self.rows(), []
        for env in self.envs:
            table = Table(title=env, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
            shown = [name for name in rows[0] if name not in ("environment", "episodes")]
            longest = max(len(word) for row in rows for word in row["method"].split())
            for name in shown:
                side, least = ("left", longest) if name == "method" else ("right", None)
                folds = name in ("method", "env steps", "machine")
                table.add_column(name, justify=side, min_width=least, no_wrap=not folds)
            for row in rows:
                if row["environment"] == env:
                    # The interval has a line of its own: terminals are narrow.
                    table.add_row(*(escape(row[name].replace(" [", "\n[")) for name in shown))
            tables.append(table)
        return tables


def compare(runs: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], by: Sequence[str] = ()) -> Comparison:
    """Write compare.png, compare.html and compare.json about runs, and a picture an environment if there are several.

    Args:
        runs: run directories; finished or not. One that comes twice counts once.
        out: the directory to write to; made if it is not there.
        by: see `group`.

    Raises:
        ConfigError: there is no run; a directory is not a run, has no metrics yet or is damaged; `by` is unknown; `out`
            is a file. Nothing is written then.
        PhyxdreamError: the files cannot be written; those of an earlier comparison stay.
    """
    paths = list({Path(path).expanduser().resolve(): Path(path) for path in runs}.values())
    if not paths:
        raise ConfigError("expected at least one run directory, got none")
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out must name a directory")
    comparison = Comparison(group([read_member(path) for path in paths], by))
    files = {"compare.png": figure_png(curves_figure(comparison.groups))}
    if len(comparison.envs) > 1:
        for env in comparison.envs:
            here = [g for g in comparison.groups if g.env == env]
            files[f"compare-{_file_name(env)}.png"] = figure_png(curves_figure(here, comparison.groups))
    files["compare.json"] = (json.dumps(_numbers(comparison), indent=1, allow_nan=False) + "\n").encode()
    files["compare.html"] = _page(comparison)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_files(out, files)
    except OSError as e:
        raise PhyxdreamError(f"could not write the comparison to {out}: {e.strerror or e}") from e
    comparison.files = [out / name for name in files]
    return comparison


def _notes(g: Group) -> list[str]:
    name = f"{g.label} in {g.env}"
    notes = []
    for member in g.members:
        notes += member.notes
        if not member.finished:
            notes.append(f"{member.path}: unfinished, at {member.step:,} of {member.options['total_steps']:,} steps.")
        if member.final is None:
            notes.append(f"{member.path}: not evaluated yet.")
    ends = [member.step for member in g.members]
    if min(ends) < 0.95 * max(ends):
        notes.append(f"{name}: curves end at {min(ends):,} steps with the shortest run; the longest has {max(ends):,}.")
    elif not any(kind == "training" for kind, _ in g.bands):
        notes.append(f"{name}: runs have no part in common, so there is no curve.")
    evaluated = sorted({int(member.final["step"]) for member in g.members if member.final})
    if len(evaluated) > 1 and evaluated[0] < 0.95 * evaluated[-1]:
        notes.append(f"{name}: evaluated at different steps, {evaluated[0]:,} to {evaluated[-1]:,}.")
    options = [{k: v for k, v in member.options.items() if k not in _NOT_METHOD} for member in g.members]
    pooled = [key for key in options[0] if len({_canonical(o.get(key)) for o in options}) > 1]
    if pooled:
        more = f" and {plural(len(pooled) - 5, 'other option')}" if len(pooled) > 5 else ""
        notes.append(f"{name}: its runs differ in {', '.join(pooled[:5])}{more}.")
    seeds = [_canonical(member.options.get("seed")) for member in g.members]
    if not pooled and len(set(seeds)) < len(seeds):
        notes.append(f"{name}: a seed came twice; such runs are not independent, and the band is too narrow.")
    return notes


# Figures


def curves_figure(groups: Sequence[Group], among: Sequence[Group] | None = None, title: bool = True) -> Figure:
    """Curves of all groups, an environment below the other: training, and evaluations where there are several of them.

    Args:
        groups: what is drawn.
        among: the groups that colours are given out to, so that a method has one in all figures; by default `groups`.
        title: name the environment, and what bands are.
    """
    envs = list(dict.fromkeys(g.env for g in groups))
    names = list(dict.fromkeys(g.label for g in (among or groups)))
    styles = {
        name: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)]}
        for i, name in enumerate(names)
    }
    kinds = {env: [k for k in ("training", "evaluation") if any((k, "step") in g.bands for g in groups if g.env == env)]
             for env in envs}  # fmt: skip
    heights = [0.75 + 0.2 * len([g for g in groups if g.env == env]) + 2.75 * max(1, len(kinds[env])) for env in envs]
    scale, unit = time_unit(max((m.seconds for g in groups for m in g.members if math.isfinite(m.seconds)), default=0))
    figure = Figure(figsize=(9.6, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(envs), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, env in zip(parts, envs, strict=True):
        here = [g for g in groups if g.env == env]
        left, right = _draw_env(part, here, kinds[env] or ["training"], styles, scale, unit)
        if title:
            left.set_title(env, loc="left", fontsize=11, fontweight="bold", color=INK["ink"])
        if title and any(len(g.members) > 1 for g in here):
            bands = f"IQM over seeds, {100 * CONFIDENCE:.0f} % bootstrap bands"
            right.set_title(bands, loc="right", fontsize=8, color=INK["muted"])
    return figure


def _draw_env(
    part: SubFigure, groups: Sequence[Group], kinds: Sequence[str], styles: Mapping[str, Any], scale: int, unit: str
) -> Sequence[Axes]:
    """Returns the upper axes."""
    grid = part.subplots(len(kinds), 2, sharex="col", sharey="row", squeeze=False)
    for row, kind in zip(grid, kinds, strict=True):
        for axes, axis in zip(row, _AXES, strict=True):
            dress(axes)
            for g in groups:
                _draw(axes, g, kind, axis, 1 if axis == "step" else scale, styles[g.label])
        row[0].set_ylabel(f"{kind} return", color=INK["muted"], fontsize=9)
    for axes, label in zip(grid[-1], (_AXES["step"], f"{_AXES['time']} {unit}"), strict=True):
        axes.set_xlabel(label, color=INK["muted"], fontsize=9)
    handles = [grid[0, 0].plot([], [], linewidth=2, **styles[g.label])[0] for g in groups]
    labels = [textwrap.fill(f"{g.label} ({g.size})", 110) for g in groups]
    columns = max(1, min(len(groups), int(9.2 / (0.5 + 0.068 * max(map(len, labels))))))
    part.legend(handles, labels, loc="outside lower left", ncols=columns, **LEGEND)
    return grid[0]


def _draw(axes: Axes, g: Group, kind: str, axis: str, scale: int, style: Mapping[str, Any]) -> None:
    band = g.bands.get((kind, axis))
    if band is not None:
        few = kind == "evaluation" or len(band.x) < 3
        x = band.x / scale
        axes.plot(x, band.iqm, linewidth=1.8, marker="o" if few else None, markersize=4, zorder=3, **style)
        if band.interval is not None:
            axes.fill_between(x, *band.interval, color=style["color"], alpha=0.18, linewidth=0, zorder=2)
    elif kind == "evaluation" and g.final and g.final["runs"] == len(g.members):
        # Evaluated at the end only, beside methods that have a curve: a point with its interval.
        x = np.mean([member.final[axis] for member in g.members]) / scale
        interval = g.final["interval"] or (g.final["iqm"], g.final["iqm"])
        axes.plot(x, g.final["iqm"], "D", color=style["color"], markersize=5, zorder=3)
        axes.vlines(x, *interval, color=style["color"], linewidth=1.5, zorder=3)


# Page and numbers


def _page(comparison: Comparison) -> bytes:
    groups, envs = comparison.groups, comparison.envs
    title = envs[0] if len(envs) == 1 else f"Comparison in {len(envs)} environments"
    line = f"{plural(sum(len(g.members) for g in groups), 'run')} of {plural(len({g.label for g in groups}), 'method')}"
    body = [f'<header><h1>{html.escape(title)}</h1><p class="label">{line}</p></header>']
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes())
    body.append(_section("Results", _table(comparison.rows()) + notes))
    for env in envs:
        figure = curves_figure([g for g in groups if g.env == env], groups, title=False)
        body.append(_section("Learning curves" if len(envs) == 1 else env, f"<figure>{svg(figure)}</figure>"))
    clock = "Wall-clock is the time spent on training; for a resumed run, that of all its parts."
    body.append(_section("How curves and intervals are made", f"<p>{html.escape(_RULE)} {clock}</p>"))
    if len(groups) > 1 and (names := differing(groups)):
        lines = [{"option": n, **{f"{i} {g.label}": _text(g.method[n]) for i, g in enumerate(groups)}} for n in names]
        heads = ["option", *(g.label if len(envs) == 1 else f"{g.label} in {g.env}" for g in groups)]
        body.append(_section("Options in which methods differ", _table(lines, heads)))
    body.append(_section("Runs", _table([_run_row(g, member) for g in groups for member in g.members])))
    return page(title, body)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _table(rows: Sequence[Mapping[str, str]], heads: Iterable[str] | None = None) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads or rows[0])
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="figures"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _run_row(g: Group, member: Member) -> dict[str, str]:
    return {
        "run": str(member.path),
        "method": g.label,
        "seed": str(member.options.get("seed", "–")),
        "env steps": count(member.step) + ("" if member.finished else f" of {count(member.options['total_steps'])}"),
        "minutes": _range([member.seconds], _minutes),
        "evaluation": _mean_std(member.final),
        "episodes": count(member.final and member.final["episodes"]),
        "machine": member.machine,
    }


def _numbers(comparison: Comparison) -> dict[str, Any]:
    """What compare.json holds: everything that figures and table show."""
    return {
        "statistics": {"aggregate": "interquartile mean", "interval": "stratified bootstrap, percentile",
                       "confidence": CONFIDENCE, "repetitions": REPETITIONS, "seed": SEED, "rule": _RULE},
        "groups": [
            {
                "label": g.label, "environment": g.env, "method": g.method, "evaluation": g.final,
                "curves": {f"{kind} return by {axis}": _band_numbers(band) for (kind, axis), band in g.bands.items()},
                "runs": [
                    {"path": str(m.path), "seed": m.options.get("seed"), "step": m.step, "finished": m.finished,
                     "seconds": _finite(m.seconds), "machine": m.machine,
                     "evaluation": m.final and {key: _finite(value) for key, value in m.final.items()}}
                    for m in g.members
                ],
            }
            for g in comparison.groups
        ],
        "notes": comparison.notes(),
    }  # fmt: skip


def _band_numbers(band: Band) -> dict[str, Any]:
    ends = {} if band.interval is None else {"low": band.interval[0].tolist(), "high": band.interval[1].tolist()}
    return {"x": band.x.tolist(), "iqm": band.iqm.tolist(), **ends}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """`5.8`, or `5.8–11.8`; a dash if a value is unknown."""
    if not all(map(math.isfinite, values)):
        return "–"
    return "–".join(dict.fromkeys((text(min(values)), text(max(values)))))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f}"


def _mean_std(final: Mapping[str, Any] | None) -> str:
    return f"{_score(final['mean'], final)} ± {_score(final['std'], final)}" if final else "–"


def _iqm(final: Mapping[str, Any] | None) -> str:
    """`0.884 [0.834, 0.933]`, without the interval for one run."""
    if not final:
        return "–"
    ends = ", ".join(_score(end, final) for end in final["interval"] or ())
    return _score(final["iqm"], final) + (f" [{ends}]" if ends else "")


def _score(value: float, final: Mapping[str, Any]) -> str:
    """A number, with as many decimals as the evaluation it belongs to deserves."""
    size = abs(final["mean"]) + final["std"]
    return f"{value:,.{3 if size < 10 else 2 if size < 100 else 1 if size < 10_000 else 0}f}"


def _file_name(env: str) -> str:
    return re.sub(r"[^\w.-]+", "-", env)
