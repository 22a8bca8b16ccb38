"""The report of a run: one HTML file with everything inlined, readable in light, in dark and on paper."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from phyxdream.errors import PhyxdreamError
from phyxdream.train import metrics
from phyxdream.train.progress import clock
from phyxdream.train.run import Run

# Drawn in these, and turned into CSS variables of the same names when a figure goes into the page.
INK = {"ink": "#1b2430", "muted": "#66727f", "line": "#dfe4ea", "accent": "#2563eb", "second": "#d9660b"}
LEGEND = {"fontsize": 8, "frameon": False, "labelcolor": INK["muted"]}
SEEN, IMAGINED = (56, 189, 248), (245, 158, 11)  # frame colours: the model saw the picture, the model imagines it
_GIF_BYTES = 2_500_000
PAGE_WIDTH = 1030  # pixels of a section's inside
_FRAME_MS = 160


class Panel(NamedTuple):
    """A further part of the report.

    Attributes:
        title: its heading.
        content: a matplotlib `Figure`, a uint8 image (H, W), (H, W, 1 or 3), the bytes of a PNG or GIF, a mapping of
            names to numbers, or plain text.
        caption: a sentence below.
    """

    title: str
    content: Any
    caption: str = ""


def write_report(
    run: Run,
    *,
    video: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    extra_panels: Iterable[Panel | tuple[Any, ...]] = (),
) -> Path:
    """Write report.html (self-contained) and learning_curve.png of `run`, and open_loop.gif/.png when there is a video.

    What is missing or cannot be drawn becomes a sentence in the report.

    Args:
        run: the run, finished or not.
        video: open-loop prediction: "truth" and "model" uint8 (T, B, H, W, C) with C 1 or 3 (or no C), "context" = how
            many first frames the model was shown (5 when left out), optionally "error" (T, B, H, W[, C]) uint8 or
            float in [0, 1]; by default the absolute difference.
        evaluation: a row or rows as for `Run.add_evaluation`, shown instead of those in eval.json.
        extra_panels: `Panel`s, or tuples in their order.

    Returns:
        The path of report.html.

    Raises:
        PhyxdreamError: the report cannot be written (full disk, no permission).
    """
    columns: dict[str, np.ndarray] = {}
    with contextlib.suppress(OSError):
        columns = metrics.read(run.metrics)
    if evaluation is None:
        rows = _attempt(run.evaluations, [])
    else:
        rows = [dict(evaluation)] if isinstance(evaluation, Mapping) else [dict(row) for row in evaluation]
    starts = _attempt(run.versions, [])
    greedy = [row for row in rows if not row.get("explore")]

    files: dict[str, bytes] = {}
    sections = [
        ("Learning curve", lambda: _learning_curve(columns, greedy, files)),
        ("Evaluation", lambda: evaluation_table(rows)),
        ("Open-loop video prediction", lambda: _video_section(video, files)),
        *((panel.title, lambda panel=panel: _extra(panel)) for panel in (Panel(*p) for p in extra_panels)),
        ("Losses", lambda: _grid(columns, "loss/", "No loss has been logged yet.")),
        ("Throughput", lambda: _grid(_throughput(columns), "throughput/", "Too few rows to tell a rate.")),
        ("Other signals", lambda: _others(columns)),
        ("How to reproduce", lambda: _reproduce(run, starts)),
        ("Configuration and versions", lambda: _configuration(run, starts)),
    ]
    body = [_section("", lambda: _header(run, columns, greedy, starts))]
    body += [_section(title, make) for title, make in sections]
    files[run.report.name] = page(_title(run), body)
    try:
        write_files(run.path, files)
    except OSError as e:
        raise PhyxdreamError(f"could not write the report to {run.path}: {e.strerror or e}") from e
    return run.report


def curve_figure(columns: Mapping[str, np.ndarray], evaluations: Sequence[Mapping[str, Any]] = ()) -> Figure | None:
    """The learning curve, against environment steps and against wall-clock time; None without a single return.

    Args:
        columns: as from `metrics.read`, of which "step", "time" and "episode/return" are used.
        evaluations: rows as for `Run.add_evaluation`, drawn as diamonds with one standard deviation.
    """
    value = columns.get("episode/return", np.empty(0))
    step, seconds = (columns.get(name, np.empty(0)) for name in ("step", "time"))
    summaries = [(row, summary) for row in evaluations if (summary := summarise(row))]
    if not np.isfinite(value).any() and not any("step" in row for row, _ in summaries):
        return None
    longest = float(np.nanmax(seconds)) if np.isfinite(seconds).any() else 0.0
    scale, unit = time_unit(longest)
    panels = []
    for label, key, x, divisor in (
        ("environment steps", "step", step, 1),
        (f"wall-clock {unit}", "time", seconds, scale),
    ):
        points = [(row[key] / divisor, s) for row, s in summaries if is_number(row.get(key))]
        if points or np.isfinite(x).any():
            panels.append((label, x / divisor, points))
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, x, points) in zip(grid, panels, strict=True):
        dress(axes)
        _draw(axes, x, value, dots=True)
        _draw_evaluations(axes, points)
        axes.set_xlabel(label, color=INK["muted"], fontsize=9)
    left = grid[0]
    left.set_ylabel("episode return", color=INK["muted"], fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3, **LEGEND)
    return figure


def summarise(row: Mapping[str, Any]) -> dict[str, float] | None:
    """Mean, std, min, max and episodes of an evaluation row, from its "returns" where it has them; None if empty."""
    returns = np.asarray(row.get("returns", ()), dtype=np.float64).ravel()
    if returns.size:
        return {
            "mean": float(returns.mean()), "std": float(returns.std()), "min": float(returns.min()),
            "max": float(returns.max()), "episodes": returns.size,
        }  # fmt: skip
    if not is_number(row.get("mean")):
        return None
    return {key: float(row.get(key, math.nan)) for key in ("mean", "std", "min", "max", "episodes")}


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The evaluations as an HTML table, newest last; a sentence when there is none."""
    summaries = [(row, summary) for row in rows if (summary := summarise(row))]
    if not summaries:
        return sentence("This run has not been evaluated yet.")
    names = ("mean", "std", "min", "max", "episodes")
    head = "".join(f"<th>{name}</th>" for name in ("steps", *names, "seed"))
    lines = []
    for row, summary in summaries:
        cells = [count(row.get("step")), *(_score(summary[n]) for n in names[:-1]), count(summary["episodes"])]
        cells.append(html.escape(str(row.get("seed", "–"))) + (", exploring" if row.get("explore") else ""))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table class="figures"><tr>{head}</tr>{"".join(lines)}</table></div>'


# Pieces of the page


def page(title: str, body: Iterable[str]) -> bytes:
    """A whole HTML page in the look of the report; `body` is its HTML, part by part."""
    text = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(part for part in body if part))
    return text.encode("utf-8")


def _section(title: str, make: Callable[[], str]) -> str:
    try:
        content = make()
    except Exception as e:  # A report of what is there beats none: the part that fails says so.
        content = sentence(f"This part could not be drawn: {type(e).__name__}: {e}")
    if not content:
        return ""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if title else content


def _attempt(read: Callable[[], list[Any]], otherwise: list[Any]) -> list[Any]:
    try:
        return read()
    except PhyxdreamError:
        return otherwise


def _title(run: Run) -> str:
    return f"{env_name(run)} · {run.config.get('preset') or 'phyxdream'}"


def env_name(run: Run) -> str:
    """The environment of a run with its backend, "envpool:Catch-v0"; the directory's name if it has none."""
    env, backend = str(run.config.get("env") or run.path.name), run.config.get("env_backend")
    return f"{backend}:{env}" if backend and ":" not in env else env


def _header(
    run: Run, columns: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> str:
    summary = next((s for row in reversed(rows) if (s := summarise(row))), None)
    big, note = "–", "not evaluated yet"
    if summary:
        big = _score(summary["mean"])
        note = f"± {_score(summary['std'])} over {count(summary['episodes'])} episodes"
        note += f" · {_score(summary['min'])} to {_score(summary['max'])}"
    hero = f'<div class="hero"><div class="label">evaluation return</div><div class="big">{big}</div>'
    hero += f'<div class="label">{note}</div></div>'
    last = starts[-1] if starts else {}
    hardware, cores = machine(last)
    seconds = _last(columns, "time")
    tiles = [
        ("environment steps", count(_last(columns, "step")), _of_total(run)),
        ("updates", count(_last(columns, "updates")), ""),
        ("wall time", clock(seconds) if seconds is not None else "–", ""),
        ("hardware", html.escape(hardware), html.escape(cores)),
    ]
    boxes = "".join(
        f'<div class="tile"><div class="label">{label}</div><div class="{"name" if label == "hardware" else "value"}">'
        f'{value}</div><div class="label">{note}</div></div>'
        for label, value, note in tiles
    )
    line = " · ".join(
        html.escape(str(part))
        for part in (
            f"preset {run.config['preset']}" if run.config.get("preset") else None,
            f"seed {run.config['seed']}" if "seed" in run.config else None,
            f"started {starts[0]['started'].replace('T', ' ')[:16]}" if starts and "started" in starts[0] else None,
            f"resumed {len(starts) - 1}×" if len(starts) > 1 else None,
        )
        if part
    )
    name = html.escape(env_name(run))
    return f'<header><h1>{name}</h1><p class="label">{line}</p></header><div class="top">{hero}{boxes}</div>'


def machine(start: Mapping[str, Any]) -> tuple[str, str]:
    """What a start of a run (`Run.versions`) ran on: GPUs or else the CPU, and the number of cores."""
    gpu = start.get("gpu") or []
    cores = f"{count(start.get('cores'))} CPU cores" + ("" if gpu else ", no GPU")
    return ", ".join(gpu) if gpu else str(start.get("cpu") or "unknown"), cores


def _of_total(run: Run) -> str:
    total = run.config.get("total_steps")
    return f"of {count(total)}" if is_number(total) else ""


def _learning_curve(
    columns: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]], files: dict[str, bytes]
) -> str:
    figure = curve_figure(columns, rows)
    if figure is None:
        return sentence("No episode has ended yet, so there is no learning curve.")
    files["learning_curve.png"] = figure_png(figure)
    return f"<figure>{svg(figure)}</figure>"


def _video_section(video: Mapping[str, Any] | None, files: dict[str, bytes]) -> str:
    if video is None:
        return sentence("There is no video prediction: none was made, or the model does not see pictures.")
    try:
        prediction = _prediction(video)
    except (KeyError, TypeError, ValueError) as e:
        return sentence(f"The video prediction cannot be shown: {e}")
    files["open_loop.gif"] = animation = _gif(prediction)
    files["open_loop.png"] = strip = png(_strip(prediction))
    frames, context = len(prediction.truth), prediction.context
    shown = plural(min(context, frames), "picture")
    swatch = '<span class="swatch" style="background:rgb{}"></span>'
    caption = (
        f"{swatch.format(SEEN)}the model is shown the first {shown} · "
        f"{swatch.format(IMAGINED)}from then on it imagines, given the actions alone "
        f"({plural(max(0, frames - context), 'step')})"
    )
    moving = f'<figure class="screen">{_image(animation, "gif", "open-loop prediction, animated")}</figure>'
    chart = f"<figure>{svg(_horizon_figure(prediction))}</figure>" if 0 < context < frames else ""
    still = f'<figure class="scroll">{_image(strip, "png", "open-loop prediction, frame by frame")}</figure>'
    return f'<div class="beside">{moving}<div><p>{caption}</p>{chart}</div></div>{still}'


def _extra(panel: Panel) -> str:
    content = panel.content
    if isinstance(content, Figure):
        body = f"<figure>{svg(content)}</figure>"
    elif isinstance(content, str):
        body = f"<p>{html.escape(content)}</p>"
    elif isinstance(content, Mapping):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in content)
        row = "".join(f"<td>{_short(float(value))}</td>" for value in content.values())
        body = f'<div class="scroll"><table class="figures"><tr>{head}</tr><tr>{row}</tr></table></div>'
    elif isinstance(content, (bytes, bytearray)):
        kind = "gif" if content[:3] == b"GIF" else "png"
        body = f'<figure class="scroll">{_image(bytes(content), kind, panel.title)}</figure>'
    else:
        array = _array(content)
        if array.dtype != np.uint8:
            raise TypeError(f"expected a uint8 image, got {array.dtype}")
        image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
        image = image.resize([side * upscaling(*image.size[::-1]) for side in image.size], Image.Resampling.NEAREST)
        body = f'<figure class="scroll">{_image(png(image), "png", panel.title)}</figure>'
    return body + (f"<p>{html.escape(panel.caption)}</p>" if panel.caption else "")


def _grid(columns: Mapping[str, np.ndarray], group: str, empty: str) -> str:
    names = [name for name in columns if name.startswith(group)]
    return _panels(columns, names, group) if names else sentence(empty)


def _throughput(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rates between rows. Derived here and not logged, so that the log of a run is the same on every machine."""
    if len(columns.get("step", ())) < 3:
        return {}
    seconds = np.diff(columns["time"], prepend=np.nan)
    seconds[seconds <= 0] = np.nan
    rates = {"environment steps per second": "step", "updates per second": "updates"}
    found = {
        title: np.diff(columns[name], prepend=np.nan) / seconds for title, name in rates.items() if name in columns
    }
    return {"step": columns["step"], **{f"throughput/{title}": rate for title, rate in found.items()}}


def _others(columns: Mapping[str, np.ndarray]) -> str:
    own = ("step", "time", "updates", "episode/return")
    names = [n for n in columns if n not in own and not n.startswith("loss/")]
    if not names:
        return ""
    return f"<details><summary>{plural(len(names), 'signal')}</summary>{_panels(columns, names, '')}</details>"


def _panels(columns: Mapping[str, np.ndarray], names: Sequence[str], group: str) -> str:
    panels = []
    for name in names:
        values = columns[name]
        last = values[np.isfinite(values)][-1:]
        label = f"<figcaption><b>{html.escape(name.removeprefix(group).replace('_', ' '))}</b>"
        label += f"<span>{_short(float(last[0]))}</span></figcaption>" if len(last) else "</figcaption>"
        drawing = svg(_panel_figure(columns["step"], values)) if len(last) else sentence("No finite value.")
        panels.append(f"<figure>{label}{drawing}</figure>")
    return f'<div class="panels">{"".join(panels)}</div>'


def _reproduce(run: Run, starts: Sequence[Mapping[str, Any]]) -> str:
    path = shlex.quote(str(run.path))
    lines = []
    first = starts[0] if starts else {}
    git = (first.get("git") or {}).get("phyxdream") or {}
    if git.get("revision"):
        dirty = " and uncommitted changes" if git.get("dirty") else ""
        lines.append(f"# phyxdream {first.get('phyxdream')} at git revision {git['revision']}{dirty}")
    elif first.get("phyxdream"):
        lines.append(f"# phyxdream {first['phyxdream']}")
    for start in starts:
        lines.append(f"{start.get('command', '')}    # {start.get('started', '')}")
    lines += [
        "", f"phyxdream train --resume --logdir {path}", f"phyxdream eval {path}", f"phyxdream report {path}",
    ]  # fmt: skip
    return f"<pre>{html.escape(chr(10).join(lines).strip())}</pre>"


def _configuration(run: Run, starts: Sequence[Mapping[str, Any]]) -> str:
    tables = [("Resolved configuration", run.config)]
    for i, start in enumerate(starts):
        tables.append(("Versions and hardware" if i == 0 else f"Versions and hardware, resume {i}", start))
    parts = []
    for title, mapping in tables:
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in _flatten(mapping)
        )
        parts.append(f'<details><summary>{title}</summary><div class="scroll"><table>{rows}</table></div></details>')
    return "".join(parts)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [
            pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, (list, tuple)):
        return [(prefix, ", ".join(str(item) for item in value) or "–")]
    return [(prefix, "–" if value is None else str(value))]


# Plots


def figure_png(figure: Figure, dpi: int = 160) -> bytes:
    """A figure as PNG on white, for documents outside the report."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def time_unit(longest: float) -> tuple[int, str]:
    """Seconds per unit, and its name, for an axis that goes up to `longest` seconds."""
    return (3600, "hours") if longest > 2 * 3600 else (60, "minutes") if longest > 120 else (1, "seconds")


def svg(figure: Figure) -> str:
    """A figure as inline SVG that takes its colours and font from the page."""
    buffer = io.StringIO()
    # fonttype "none" keeps text as text; the salt makes ids, so that the same run gives the same report.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "phyxdream"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"\n\s*", "\n", text)
    for name, colour in INK.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def dress(axes: Axes) -> None:
    """Grid, ticks and colours as all plots of the report have them."""
    axes.grid(True, color=INK["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK["line"])
    axes.tick_params(colors=INK["muted"], labelsize=8, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, *, dots: bool, log: bool = False) -> None:
    """Raw values, faint, and a smoothed line over them."""
    keep = np.isfinite(x[: len(y)]) & np.isfinite(y[: len(x)])
    x, y = x[keep], y[keep]
    if not len(y):
        return
    smooth = np.exp(_smoothed(np.log(y))) if log else _smoothed(y)
    line = np.unique(np.linspace(0, len(y) - 1, 400).astype(int))
    if dots or len(y) < 3:
        some = np.unique(np.linspace(0, len(y) - 1, 800).astype(int))
        axes.plot(
            x[some], y[some], "o", color=INK["accent"], markersize=3, alpha=0.35 if len(y) > 2 else 1,
            markeredgewidth=0, label="training episodes",
        )  # fmt: skip
    else:
        axes.plot(x[line], y[line], color=INK["accent"], linewidth=0.8, alpha=0.3)
    if len(y) > 2:
        axes.plot(x[line], smooth[line], color=INK["accent"], linewidth=1.8, label="smoothed", zorder=3)


def _draw_evaluations(axes: Axes, points: Sequence[tuple[float, Mapping[str, float]]]) -> None:
    """Diamonds at the means; the bars are one standard deviation, but never beyond the lowest and highest return."""
    if not points:
        return
    x, y = [at for at, _ in points], [s["mean"] for _, s in points]
    bars = [[np.nanmin((s["std"], abs(s["mean"] - s[end]), 1e30)) for _, s in points] for end in ("min", "max")]
    style = {"fmt": "D", "markersize": 5, "capsize": 3, "linewidth": 1.2, "zorder": 4}
    axes.errorbar(x, y, np.where(np.array(bars) < 1e30, bars, 0), color=INK["second"], label="evaluation", **style)


def _panel_figure(step: np.ndarray, values: np.ndarray) -> Figure:
    figure = Figure(figsize=(3.5, 1.9), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    finite = values[np.isfinite(values)]
    log = bool((finite > 0).all() and finite.max() > 30 * finite.min())
    _draw(axes, step, values, dots=False, log=log)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
    return figure


def _horizon_figure(prediction: _Prediction) -> Figure:
    """Mean error per frame, beside that of a picture frozen at the last one seen."""
    truth = prediction.truth.astype(np.float32) / 255
    over = tuple(range(1, truth.ndim))
    model = prediction.error.mean(axis=tuple(range(1, prediction.error.ndim)))
    frozen = np.abs(truth - truth[prediction.context - 1]).mean(axis=over)
    figure = Figure(figsize=(6.4, 2.3), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    time = np.arange(1, len(truth) + 1)
    axes.plot(time, model, color=INK["accent"], linewidth=1.8, label="model")
    axes.plot(
        time[prediction.context - 1 :], frozen[prediction.context - 1 :], color=INK["muted"], linewidth=1.2,
        linestyle="--", label="last picture seen, frozen",
    )  # fmt: skip
    axes.axvline(prediction.context + 0.5, color=INK["second"], linewidth=1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("frame", color=INK["muted"], fontsize=9)
    axes.set_ylabel("mean error", color=INK["muted"], fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, **LEGEND)
    return figure


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Gaussian mean over about a fiftieth of the row, renormalised at the ends."""
    width = max(1.0, len(y) / 50)
    reach = min(len(y) - 1, math.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    full = [np.convolve(row, kernel)[reach : reach + len(y)] for row in (y, np.ones_like(y))]
    return full[0] / full[1]


# Video


class _Prediction(NamedTuple):
    truth: np.ndarray  # (T, B, H, W, 3) uint8
    model: np.ndarray  # (T, B, H, W, 3) uint8
    error: np.ndarray  # (T, B, H, W) float32 in [0, 1]
    context: int


def _prediction(video: Mapping[str, Any]) -> _Prediction:
    pictures = {}
    for name in ("truth", "model"):
        if name not in video:
            raise ValueError(f"video lacks {name!r}")
        pictures[name] = _frames(_array(video[name]), f"video[{name!r}]")
    truth, model = pictures["truth"], pictures["model"]
    if truth.shape != model.shape:
        raise ValueError(f"video: 'truth' and 'model' must have one shape, got {truth.shape} and {model.shape}")
    if video.get("error") is None:
        error = np.abs(truth.astype(np.float32) - model).mean(axis=-1) / 255
    else:
        error = _array(video["error"])
        error = error.astype(np.float32) / (255 if error.dtype == np.uint8 else 1)
        error = error.mean(axis=-1) if error.ndim == 5 else error
        if error.shape != truth.shape[:4]:
            raise ValueError(f"video['error']: expected (T, B, H, W) = {truth.shape[:4]}, got {error.shape}")
        error = np.clip(np.nan_to_num(error, nan=1.0), 0, 1)
    return _Prediction(truth, model, error, int(video.get("context", 5)))


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _frames(array: np.ndarray, name: str) -> np.ndarray:
    array = array[..., None] if array.ndim == 4 else array
    if array.ndim != 5 or array.shape[-1] not in (1, 3) or array.dtype != np.uint8 or not array.size:
        raise ValueError(
            f"{name}: expected non-empty uint8 (T, B, H, W, C) with C 1 or 3, got {array.dtype} {array.shape}"
        )
    return np.broadcast_to(array, (*array.shape[:-1], 3))


def upscaling(height: int, width: int) -> int:
    """How often the pixels of small pictures are repeated."""
    return max(1, round(112 / max(height, width)))


def _gif(prediction: _Prediction) -> bytes:
    """The animation, with fewer sequences, smaller or fewer frames where it would be too many bytes."""
    times = list(range(min(len(prediction.truth), 100)))
    sequences = min(6, prediction.truth.shape[1])
    scale = upscaling(*prediction.truth.shape[2:4])
    while True:
        sample = times[:: math.ceil(len(times) / 4)]
        if len(_encode(prediction, sample, sequences, scale)) * len(times) / len(sample) < 0.9 * _GIF_BYTES:
            break
        if sequences > 2:
            sequences -= 1 + (sequences > 4)
        elif scale > 1:
            scale -= 1
        elif sequences > 1:
            sequences = 1
        elif len(times) > 8:
            times = times[::2]
        else:
            break
    return _encode(prediction, times, sequences, scale)


def _encode(prediction: _Prediction, times: Sequence[int], sequences: int, scale: int) -> bytes:
    frames = [_frame(prediction, t, sequences, scale) for t in times]
    frames = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
    durations = [_FRAME_MS] * (len(frames) - 1) + [1200]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, disposal=1)
    return buffer.getvalue()


def _frame(prediction: _Prediction, t: int, sequences: int, scale: int) -> Image.Image:
    """One picture of the animation: rows truth, model, error; a column per sequence; the time below."""
    frames, _, height, width = prediction.truth.shape[:4]
    border, gap, left, top, bottom = 3, 6, 52, 26, 16
    cell_w, cell_h = width * scale + 2 * border, height * scale + 2 * border
    total_w = max(left + sequences * (cell_w + gap) + gap, 250)
    image = Image.new("RGB", (total_w, top + 3 * (cell_h + gap) + bottom), (15, 23, 32))
    draw = ImageDraw.Draw(image)
    seen = t < prediction.context
    colour = SEEN if seen else IMAGINED
    draw.text((left + gap, top / 2), f"frame {t + 1} of {frames}", fill=(226, 232, 240), font=font(13), anchor="lm")
    draw.text((left + gap + 120, top / 2), "seen" if seen else "imagined", fill=colour, font=font(13), anchor="lm")
    for row, (label, pictures) in enumerate(_rows(prediction, [t], sequences)):
        y = top + row * (cell_h + gap)
        draw.text((left - 4, y + cell_h / 2), label, fill=(148, 163, 184), font=font(12), anchor="rm")
        for column in range(sequences):
            x = left + gap + column * (cell_w + gap)
            image.paste(cell(pictures[0, column], scale, colour, border), (x, y))
    y, start, length = image.height - 10, left + gap, total_w - left - 2 * gap
    for first, last, shade in ((0, prediction.context, SEEN), (prediction.context, frames, IMAGINED)):
        last = min(last, frames)
        if first >= last:
            continue
        x0, x1 = (start + length * i / frames for i in (first, last))
        draw.rectangle((x0, y, x1 - 1, y + 3), fill=tuple(c // 3 for c in shade))
        if t >= first:
            draw.rectangle((x0, y, start + length * min(t + 1, last) / frames - 1, y + 3), fill=shade)
    return image


def _strip(prediction: _Prediction) -> Image.Image:
    """The same as a still on white: time to the right, up to two sequences one below the other."""
    frames, batch, height, width = prediction.truth.shape[:4]
    context = min(prediction.context, frames)
    sequences = min(2, batch)
    scale, border, gap, left, top = upscaling(height, width), 3, 4, 52, 22
    cell_w, cell_h = width * scale + 2 * border, height * scale + 2 * border
    room = min(12, max(4, (PAGE_WIDTH - left - gap) // (cell_w + gap)))
    times = [*spread(0, context, room // 3), *spread(context, frames, room - room // 3)]
    block = 3 * (cell_h + gap) + 10
    image = Image.new("RGB", (left + len(times) * (cell_w + gap) + gap, top + sequences * block), "white")
    draw = ImageDraw.Draw(image)
    for column, t in enumerate(times):
        x = left + gap + column * (cell_w + gap)
        draw.text((x + cell_w / 2, top / 2), str(t + 1), fill=(71, 85, 105), font=font(12), anchor="mm")
    for row, (label, pictures) in enumerate(_rows(prediction, times, sequences)):
        for sequence in range(sequences):
            y = top + sequence * block + row * (cell_h + gap)
            draw.text((left - 4, y + cell_h / 2), label, fill=(71, 85, 105), font=font(12), anchor="rm")
            for column, t in enumerate(times):
                colour = SEEN if t < prediction.context else IMAGINED
                x = left + gap + column * (cell_w + gap)
                image.paste(cell(pictures[column, sequence], scale, colour, border), (x, y))
    return image


def spread(first: int, last: int, count: int) -> list[int]:
    """Up to `count` of the frames `first` to `last - 1`, evenly, with both ends."""
    return np.unique(np.linspace(first, last - 1, count).astype(int)).tolist() if first < last else []


def _rows(prediction: _Prediction, times: Sequence[int], sequences: int) -> list[tuple[str, np.ndarray]]:
    error = (matplotlib.colormaps["magma"](prediction.error[times, :sequences])[..., :3] * 255).astype(np.uint8)
    truth, model = (pictures[times, :sequences] for pictures in (prediction.truth, prediction.model))
    return [("truth", truth), ("model", model), ("error", error)]


def cell(picture: np.ndarray, scale: int, colour: tuple[int, int, int], border: int) -> Image.Image:
    """A picture (H, W, 3) uint8, enlarged without blur, in a frame of one colour."""
    pixels = np.ascontiguousarray(picture).repeat(scale, 0).repeat(scale, 1)
    framed = Image.new("RGB", (pixels.shape[1] + 2 * border, pixels.shape[0] + 2 * border), colour)
    framed.paste(Image.fromarray(pixels), (border, border))
    return framed


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def png(image: Image.Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _image(data: bytes, kind: str, label: str) -> str:
    source = base64.b64encode(data).decode("ascii")
    return f'<img alt="{html.escape(label)}" src="data:image/{kind};base64,{source}">'


# Numbers and words


def sentence(text: str) -> str:
    """A paragraph in the colour of what is missing."""
    return f'<p class="none">{html.escape(text)}</p>'


def plural(number: int, noun: str) -> str:
    """`1 seed`, `1,234 seeds`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _last(columns: Mapping[str, np.ndarray], name: str) -> float | None:
    values = columns.get(name, np.empty(0))
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def count(value: Any) -> str:
    """An integer with its thousands apart; a dash for what is none."""
    return f"{int(value):,}" if is_number(value) else "–"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _score(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else _short(value)


def _tick(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:.4g}"


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace the files of `folder` that `files` names: none of them unless there is room for all, and never a part.

    Raises:
        OSError: what is there stays, and nothing else is left behind.
    """
    temporary = {name: folder / f".{name}.tmp" for name in files}
    try:
        for name, data in files.items():
            temporary[name].write_bytes(data)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except OSError:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
        raise


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --muted: #66727f; --line: #dfe4ea;
  --accent: #2563eb; --second: #d9660b; }
@media (prefers-color-scheme: dark) { :root { --page: #0f141a; --card: #171e26; --ink: #e6ebf1; --muted: #93a0ae;
  --line: #2a343f; --accent: #6ea8fe; --second: #ffa94d; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #1b2430; --muted: #4a5561;
  --line: #dfe4ea; --accent: #2563eb; --second: #d9660b; } .screen { display: none; } section { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 12px; }
header p { margin: 4px 0 20px; }
section, .tile, .hero { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 18px 20px; margin-top: 16px; }
.top { display: grid; gap: 12px; grid-template-columns: 1.5fr 1fr 1fr 1fr 1.5fr; }
@media (max-width: 820px) { .top { grid-template-columns: 1fr 1fr; } .hero { grid-column: 1 / -1; } }
.tile, .hero { padding: 14px 16px; display: flex; flex-direction: column; justify-content: space-between; }
.big { font-size: 46px; font-weight: 700; line-height: 1.15; color: var(--accent); font-variant-numeric: tabular-nums; }
.value { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.name { font-weight: 600; font-size: 14px; line-height: 1.3; }
.label { color: var(--muted); font-size: 13px; min-height: 1.5em; }
.none { color: var(--muted); margin: 0; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figure img { max-width: 100%; height: auto; display: block; border-radius: 6px; image-rendering: pixelated; }
.beside { display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: center; }
.beside > div { flex: 1 1 380px; }
figure + figure, p + figure, .beside + figure { margin-top: 12px; }
.panels { display: grid; gap: 18px 22px; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); }
.panels figure { margin: 0; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 13px; overflow-wrap: anywhere; }
figcaption span { color: var(--muted); font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
td, th { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 500; }
td:first-child { white-space: nowrap; width: 25%; }
.figures td, .figures th { text-align: right; font-variant-numeric: tabular-nums; }
.figures td:first-child, .figures th:first-child { text-align: left; }
details + details { margin-top: 8px; }
summary { cursor: pointer; font-weight: 500; margin-bottom: 8px; }
pre { margin: 0; padding: 12px 14px; background: var(--page); border-radius: 6px; overflow-x: auto;
  font: 13px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
