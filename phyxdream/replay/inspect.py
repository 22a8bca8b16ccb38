"""What lies in a replay: counts, episodes, returns, what looks wrong, and a contact sheet of frames."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phyxdream.errors import CheckpointError, ConfigError
from phyxdream.replay.buffer import Replay

if TYPE_CHECKING:
    from PIL import ImageFont
    from rich.console import Console

# One record per episode; see `find_episodes`.
EPISODE = np.dtype(
    [("env", "i8"), ("start", "i8"), ("steps", "i8"), ("return", "f8"),
     ("begun", "?"), ("ended", "?"), ("flagged", "?"), ("terminal", "?")]
)  # fmt: skip

_PIECE_BYTES = 4 << 20  # how much of a key is looked at in one piece
_CHECKED_BYTES = 4096  # larger entries of a step are pictures: looked at in samples, not searched for NaN
_SAMPLES = 32
_BINS, _BAR = 10, 40
_ROWS, _COLUMNS, _LINES = 8, 10, 32
_FIRST, _TERMINAL, _LAST, _BETWEEN = "#2563eb", "#dc2626", "#d97706", "#cbd5e1"
_INK, _MUTED, _LINE = "#0f172a", "#64748b", "#e2e8f0"


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: the snapshot directory that was read; None for a replay in memory.
        replay: the replay itself, for what is not counted here.
        steps_per_env: steps stored now, for every environment.
        episodes: one record per stored episode or part of one, as `find_episodes` gives them.
        warnings: sentences about what looks wrong; empty for a replay as it should be.
    """

    path: Path | None
    replay: Replay = field(repr=False)
    steps_per_env: tuple[int, ...]
    episodes: np.ndarray = field(repr=False)
    warnings: tuple[str, ...]

    @property
    def complete(self) -> np.ndarray:
        """The records of the episodes that are stored from their first step to their last."""
        return self.episodes[self.episodes["begun"] & self.episodes["ended"]]

    @property
    def returns(self) -> np.ndarray:
        """Sum of rewards of every complete episode, (episodes,) float64."""
        return self.complete["return"]

    @property
    def lengths(self) -> np.ndarray:
        """Length in actions of every complete episode: one less than its steps, (episodes,) int64."""
        return self.complete["steps"] - 1


def inspect(path: str | os.PathLike[str] | Replay) -> Inspection:
    """Look through a replay, in pieces of a few megabytes. Nothing may be added meanwhile.

    Args:
        path: a snapshot directory (`Replay.save`), a checkpoint directory that holds one, a run directory, whose
            newest checkpoint is taken, or a `Replay`.

    Raises:
        CheckpointError: there is no replay at `path`, or it is damaged.
        ConfigError: `path` is a damaged run directory.

    Example:
        >>> replay = Replay({"reward": ((), "float32"), "is_first": ((), "bool")}, capacity=100, num_envs=1)
        >>> for t in range(10):
        ...     replay.add({"reward": np.ones(1, "float32"), "is_first": np.array([t % 5 == 0])})
        >>> found = inspect(replay)
        >>> found.returns, found.lengths
        (array([5.]), array([4]))
    """
    if isinstance(path, Replay):
        replay, path = path, None
    else:
        replay, path = _load(Path(path))
    steps = tuple(map(len, replay.stored_steps))
    episodes = find_episodes(replay)
    return Inspection(path, replay, steps, episodes, tuple(_warnings(replay, episodes)))


def find_episodes(replay: Replay) -> np.ndarray:
    """The stored episodes, those cut at either end included, ordered by their first stored step, then environment.

    Returns:
        A structured array of dtype `EPISODE`: `env`; `start`, the number of the first stored step in its environment;
        `steps` stored; `return`, the sum of their rewards (nan without a key "reward"); `begun`, its first step is
        stored; `ended`, its last step is; `flagged`, the last stored step says is_last; `terminal`, it says
        is_terminal.
    """
    found = [_episodes_of(replay, env, stored) for env, stored in enumerate(replay.stored_steps) if stored]
    episodes = np.concatenate([np.empty(0, EPISODE), *found])
    return episodes[np.lexsort((episodes["env"], episodes["start"]))]


def _episodes_of(replay: Replay, env: int, stored: range) -> np.ndarray:
    keys = [key for key in ("is_first", "is_last", "is_terminal", "reward") if key in replay.spec]
    starts, returns = [np.empty(0, np.int64)], [np.empty(0)]
    flags: dict[str, list[np.ndarray]] = {"is_last": [], "is_terminal": []}
    begun = False
    for first, part in _pieces(replay, env, stored, keys):
        is_first = part["is_first"]
        reward = part["reward"].astype(np.float64) if "reward" in part else np.full(len(is_first), np.nan)
        borders = np.union1d([0], np.flatnonzero(is_first))
        sums = np.add.reduceat(reward, borders)
        if first == stored.start:
            begun = bool(is_first[0])
        elif not is_first[0]:  # the piece begins inside the episode the last one ended in
            returns[-1][-1] += sums[0]
            borders, sums = borders[1:], sums[1:]
        if len(borders):
            starts.append(first + borders)
            returns.append(sums)
        for key in flags.keys() & part.keys():
            flags[key].append(first + np.flatnonzero(part[key]))
    start = np.concatenate(starts)
    stop = np.append(start[1:], stored.stop)
    episodes = np.zeros(len(start), EPISODE)
    episodes["env"], episodes["start"], episodes["steps"] = env, start, stop - start
    episodes["return"] = np.concatenate(returns)
    episodes["begun"] = True
    episodes["begun"][0] = begun
    for name, key in (("flagged", "is_last"), ("terminal", "is_terminal")):
        episodes[name] = np.isin(stop - 1, np.concatenate([np.empty(0, np.int64), *flags[key]]))
    episodes["ended"] = True
    episodes["ended"][-1] = episodes["flagged"][-1]
    return episodes


def _pieces(
    replay: Replay, env: int, stored: range, keys: Sequence[str]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    size = max(1, _PIECE_BYTES // max(_row_bytes(replay, key) for key in keys))
    for first in stored[::size]:
        yield first, _read(replay, env, first, min(size, stored.stop - first), keys)


def _read(replay: Replay, env: int, first: int, count: int, keys: Sequence[str]) -> dict[str, np.ndarray]:
    tensors = replay.read(env, first, count, keys)
    return {key: (t.float() if _entries(replay)[key][1] == "bfloat16" else t).numpy() for key, t in tensors.items()}


def _entries(replay: Replay) -> dict[str, tuple[tuple[int, ...], str]]:
    return {**replay.spec, **replay.latents}


def _row_bytes(replay: Replay, key: str) -> int:
    shape, dtype = _entries(replay)[key]
    return int(np.prod(shape, dtype=np.int64)) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)


# Where the replay lies


def _load(path: Path) -> tuple[Replay, Path]:
    from phyxdream.train.checkpoint import latest
    from phyxdream.train.run import Run

    if not path.is_dir():
        what = "is a file; expected a directory" if path.exists() else "does not exist"
        raise CheckpointError(f"no replay at {path}: it {what}")
    if not (path / "versions.json").is_file():
        found = path / "replay" if (path / "replay").is_dir() else path
        if found == path and (path / "manifest.json").is_file() and (path / "state.json").is_file():
            raise CheckpointError(f"the checkpoint {path} holds no replay")
        return Replay.load(found), found
    run = Run.open(path)
    for last_try in (False, True):
        newest = latest(run)
        if newest is None:
            raise CheckpointError(f"{path}: no checkpoint was written yet")
        found = newest / "replay"
        try:
            if newest.is_dir() and not found.is_dir():
                raise CheckpointError(f"the newest checkpoint of {path}, {newest.name}, holds no replay")
            return Replay.load(found), found
        except CheckpointError:
            if last_try or newest.exists():
                raise  # otherwise the run, still training, has just replaced it
    raise AssertionError("unreachable")


# What looks wrong


def _warnings(replay: Replay, episodes: np.ndarray) -> Iterator[str]:
    if not len(replay):
        yield "nothing is stored yet"
        return
    counts = _count_oddities(replay, episodes)
    if not episodes["begun"].any():
        yield "no stored step is_first: it is never set, or every episode is longer than what is kept of it"
    elif len(episodes) > 1 and (episodes["steps"] == 1).all():
        yield "is_first is set at every step: no episode has a second one"
    if "reward" not in replay.spec:
        yield "there is no key 'reward'"
    elif not counts["reward"]:
        yield "every reward is zero"
    if "is_last" in replay.spec and (cut := int((episodes["ended"] & ~episodes["flagged"]).sum())):
        yield f"{_plural(cut, 'episode')} cut off: the next one begins without an is_last before it"
    for key in ("is_last", "is_terminal"):
        if counts[f"stray {key}"]:
            yield f"{key} is set at {_plural(counts[f'stray {key}'], 'step')} after which the episode goes on"
    for key in ("action", "reward"):
        if counts[f"first {key}"]:
            yield (
                f"{key} is not zero at {_plural(counts[f'first {key}'], 'first step')}: "
                f"a step holds the {key} that led to its observation"
            )
    for key in replay.spec:
        if bad := counts[f"non-finite {key}"]:
            yield f"{key} is NaN or infinite at {_plural(bad, 'step')}"
    for key in _pictures(replay):
        if len(replay) >= _SAMPLES and _never_changes(replay, key):
            yield f"{key} is the same picture in all of {_SAMPLES} steps looked at"


def _count_oddities(replay: Replay, episodes: np.ndarray) -> dict[str, int]:
    """Steps with a reward, with flags, actions or rewards where none belong, and with numbers that are not finite."""
    keys = [key for key in replay.spec if _row_bytes(replay, key) <= _CHECKED_BYTES and key not in _pictures(replay)]
    counts = dict.fromkeys(
        ["reward", "stray is_last", "stray is_terminal", "first action", "first reward",
         *(f"non-finite {key}" for key in replay.spec)], 0
    )  # fmt: skip
    for env, stored in enumerate(replay.stored_steps):
        mine = episodes[episodes["env"] == env]
        ends = mine["start"] + mine["steps"] - 1
        for first, part in _pieces(replay, env, stored, keys):
            is_first = part["is_first"]
            for key, value in part.items():
                rows = value.reshape(len(value), -1)
                if value.dtype.kind == "f":
                    counts[f"non-finite {key}"] += int((~np.isfinite(rows)).any(1).sum())
                if key == "reward":
                    counts["reward"] += int((rows != 0).any(1).sum())
                if key in ("action", "reward"):
                    counts[f"first {key}"] += int((rows[is_first] != 0).any(1).sum())
                if key in ("is_last", "is_terminal"):
                    counts[f"stray {key}"] += int((~np.isin(first + np.flatnonzero(value), ends)).sum())
    return counts


def _pictures(replay: Replay) -> list[str]:
    """Keys of uint8 pictures: (H, W), (C, H, W) or (H, W, C), "image" first."""
    found = [
        key for key, (shape, dtype) in replay.spec.items()
        if dtype == "uint8" and len(shape) in (2, 3) and sorted(shape)[-2] >= 5
    ]  # fmt: skip
    return sorted(found, key=lambda key: key != "image")


def _never_changes(replay: Replay, key: str) -> bool:
    rings = [(env, stored) for env, stored in enumerate(replay.stored_steps) if stored]
    seen = None
    for i in range(_SAMPLES):
        env, stored = rings[i % len(rings)]
        picture = _read(replay, env, stored[(len(stored) - 1) * i // (_SAMPLES - 1)], 1, [key])[key]
        if seen is not None and not np.array_equal(seen, picture):
            return False
        seen = picture
    return True


# In the terminal


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Tables of counts, keys and episodes, the histogram of returns, and the warnings."""
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
        out = Table(
            title=title, title_justify="left", title_style="bold", show_header=bool(header), header_style="dim",
            box=None, padding=(0, 2),
        )  # fmt: skip
        for i in range(len(rows[0])):
            out.add_column(header[i] if header else "", overflow="fold")
        for row in rows:
            out.add_row(*map(escape, row))
        console.print(out, "")

    replay = inspection.replay
    used = len(replay) / replay.capacity
    rows = [
        ("steps", f"{len(replay):,} of {replay.capacity:,} ({used:.0%}), {replay.total_added:,} ever added"),
        ("memory", _size(replay.nbytes)),
        ("environments", f"{replay.num_envs:,}, holding {_spread(np.array(inspection.steps_per_env))} steps"),
        ("selector", f"{replay.selector}"),
    ]
    table(str(inspection.path or "replay"), rows)
    table(
        "keys",
        [
            (key, dtype, "×".join(map(str, shape)) or "scalar", _size(_row_bytes(replay, key)),
             "latent" if key in replay.latents else "")
            for key, (shape, dtype) in _entries(replay).items()
        ],
        ("key", "dtype", "shape", "a step", ""),
    )  # fmt: skip
    episodes, complete = inspection.episodes, inspection.complete
    rows = [
        ("complete", f"{len(complete):,}" + (f", {int(complete['terminal'].sum()):,} of them by termination"
                                            if "is_terminal" in replay.spec and len(complete) else "")),
        ("in part", f"{int((~episodes['begun']).sum()):,} without their beginning, "
                    f"{int((~episodes['ended']).sum()):,} still open"),
    ]  # fmt: skip
    if len(complete):
        rows.append(("length", f"{_spread(inspection.lengths)} actions"))
        if "reward" in replay.spec:
            rows.append(("return", f"{_spread(inspection.returns)}, mean {_number(inspection.returns.mean())}"))
    table("episodes", rows)
    if len(complete) and np.isfinite(inspection.returns).any():
        table("returns", _bars(inspection.returns, "#" if console.options.ascii_only else "█"))
    for warning in inspection.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def _bars(returns: np.ndarray, block: str) -> list[tuple[str, str, str]]:
    returns = returns[np.isfinite(returns)]
    values, exact = np.unique(returns, return_counts=True)
    if len(values) <= _BINS:
        labels, counts = [_number(value) for value in values], exact
    else:
        counts, edges = np.histogram(returns, _BINS)
        labels = [f"{_number(low)} to {_number(high)}" for low, high in itertools.pairwise(edges)]
    widths = [-(-_BAR * int(count) // int(counts.max())) for count in counts]  # a count above zero is seen
    return [(label, block * width, f"{count:,}") for label, width, count in zip(labels, widths, counts, strict=True)]


def _spread(values: np.ndarray) -> str:
    low, middle, high = values.min(), np.median(values), values.max()
    if low == high:
        return _number(low)
    return f"{_number(low)} to {_number(high)}, median {_number(middle)}"


def _number(value: float) -> str:
    if not np.isfinite(value) or (value == int(value) and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# The contact sheet


def write_contact_sheet(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Write a PNG: frames of up to eight episodes, or without pictures, returns and the numbers of one episode.

    The episodes are spread evenly over the time they were recorded at; complete ones are preferred. Frames are spread
    evenly over an episode, the first and the last included.

    Raises:
        ConfigError: nothing is stored, or `path` cannot be written or does not end in ".png".
    """
    path = Path(path)
    check_picture_path(path)
    if not len(inspection.episodes):
        raise ConfigError(f"there are no frames to write to {path}: nothing is stored yet")
    pictures = _pictures(inspection.replay)
    data = _contact_sheet(inspection, pictures[0]) if pictures else _plots(inspection)
    try:
        path.write_bytes(data)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror or e}") from e


def check_picture_path(path: Path) -> None:
    """Raise `ConfigError` unless `path` names a PNG in an existing folder."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"frames: got {str(path)!r}, expected a name that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"frames: there is no folder {str(path.parent)!r} to write {path.name} into")


def _chosen(inspection: Inspection, count: int) -> np.ndarray:
    episodes = inspection.complete if len(inspection.complete) else inspection.episodes
    return episodes[_evenly(0, len(episodes), count)]


def _evenly(first: int, stop: int, count: int) -> np.ndarray:
    """Up to `count` of the numbers `first` to `stop - 1`, both ends among them."""
    return np.unique(np.linspace(first, stop - 1, count).round().astype(np.int64))


def _contact_sheet(inspection: Inspection, key: str) -> bytes:
    from PIL import Image, ImageDraw

    replay = inspection.replay
    episodes = _chosen(inspection, _ROWS)
    rows = [
        [(step, _frame(_read(replay, int(e["env"]), int(step), 1, [key])[key][0]))
         for step in _evenly(e["start"], e["start"] + e["steps"], _COLUMNS)]
        for e in episodes
    ]  # fmt: skip
    height, width = rows[0][0][1].shape[:2]
    scale = max(1, round(96 / max(height, width))) if max(height, width) <= 160 else 160 / max(height, width)
    cell_w, cell_h = max(1, round(width * scale)), max(1, round(height * scale))
    border, gap, margin, label, top, caption = 3, 10, 20, 132, 66, 18
    row_h = max(cell_h + 2 * border + caption, 100) + gap
    columns = max(len(row) for row in rows)
    size = (
        max(2 * margin + label + columns * (cell_w + 2 * border + gap) - gap, 640),
        top + len(rows) * (row_h + gap) - gap + margin,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    title = f"{key}: {len(rows)} of {_plural(len(inspection.episodes), 'episode')}, evenly over the time stored"
    draw.text((margin, 22), title, _INK, _font(15, bold=True), "lm")
    x = margin
    for colour, word in ((_FIRST, "first"), (_TERMINAL, "terminal"), (_LAST, "last, not terminal")):
        draw.rectangle((x, 41, x + 9, 50), fill=colour)
        draw.text((x + 15, 46), word, _MUTED, _font(12), "lm")
        x += 15 + draw.textlength(word, _font(12)) + 18
    draw.text((x, 46), "below a frame: its step in the episode", _MUTED, _font(12), "lm")
    for row, (episode, frames) in enumerate(zip(episodes, rows, strict=True)):
        y = top + row * (row_h + gap)
        draw.line((margin, y - gap / 2 - 1, size[0] - margin, y - gap / 2 - 1), fill=_LINE)
        for line, (text, colour) in enumerate(_label(episode)):
            font = _font(16, bold=True) if line == 0 else _font(12)
            draw.text((margin, y + 12 + (line > 0) * 6 + line * 17), text, colour, font, "lm")
        for column, (step, frame) in enumerate(frames):
            x = margin + label + column * (cell_w + 2 * border + gap)
            colour = _border(episode, int(step))
            draw.rectangle((x, y, x + cell_w + 2 * border - 1, y + cell_h + 2 * border - 1), fill=colour)
            filter = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
            sheet.paste(Image.fromarray(frame).resize((cell_w, cell_h), filter), (x + border, y + border))
            number = f"{step - episode['start']:,}" if episode["begun"] else f"step {step:,}"
            place = (x + border + cell_w / 2, y + cell_h + 2 * border + caption / 2)
            draw.text(place, number, _MUTED if colour == _BETWEEN else colour, _font(11), "mm")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _label(episode: np.void) -> list[tuple[str, str]]:
    score = "" if np.isnan(episode["return"]) else f"return {_number(episode['return'])}"
    parts = [
        text for text, there in (("beginning gone", episode["begun"]), ("still open", episode["ended"])) if not there
    ]
    lines = [_plural(int(episode["steps"] - episode["begun"]), "action"),
             f"env {episode['env']}, step {_number(episode['start'])}", *parts]  # fmt: skip
    return [(score, _INK), *((line, _MUTED) for line in lines)]


def _border(episode: np.void, step: int) -> str:
    if step == episode["start"] and episode["begun"]:
        return _FIRST
    if step == episode["start"] + episode["steps"] - 1 and episode["ended"]:
        return _TERMINAL if episode["terminal"] else _LAST
    return _BETWEEN


def _frame(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of a stored picture; of stacked frames the last one."""
    if picture.ndim == 2:
        picture = picture[None]
    elif picture.shape[0] > picture.shape[2] and picture.shape[2] <= 4:
        picture = np.moveaxis(picture, -1, 0)
    channels = 3 if len(picture) % 3 == 0 else 1
    return np.ascontiguousarray(np.broadcast_to(np.moveaxis(picture[-channels:], 0, -1), (*picture.shape[1:], 3)))


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _plots(inspection: Inspection) -> bytes:
    """Returns over the steps they were made at, and the numbers of the episode with the median return."""
    from matplotlib.figure import Figure

    replay, complete = inspection.replay, inspection.complete
    episode = _median(complete) if len(complete) else inspection.episodes[-1]
    count = min(int(episode["steps"]), 1000)
    keys = [
        key for key, (_, dtype) in replay.spec.items()
        if dtype != "bool" and _row_bytes(replay, key) <= _CHECKED_BYTES
    ]  # fmt: skip
    part = _read(replay, int(episode["env"]), int(episode["start"]), count, keys) if keys else {}
    figure = Figure((9, 2.6 + 1.7 * len(part)), dpi=110, layout="constrained")
    axes: Any = figure.subplots(1 + len(part), 1, squeeze=False, height_ratios=[1.5, *[1] * len(part)])[:, 0]
    ends = complete["start"] + complete["steps"] - 1
    axes[0].plot(
        ends, complete["return"], ".", color=_FIRST, markersize=5, alpha=max(0.15, min(1, 200 / (len(ends) + 1)))
    )
    axes[0].set_title(f"returns of {_plural(len(complete), 'complete episode')}", loc="left", fontsize=10)
    axes[0].set_xlabel("step of the environment at which it ended", fontsize=8, color=_MUTED)
    for axis, (key, value) in zip(axes[1:], part.items(), strict=True):
        stairs = key == "reward" or value.dtype.kind in "iu"
        lines = value.reshape(count, -1)[:, :_LINES].astype(np.float64)
        axis.plot(np.arange(count), lines, linewidth=1, drawstyle="steps-mid" if stairs else "default")
        axis.set_ylabel(key, fontsize=9)
        axis.set_xlim(-0.5, count - 0.5)
        if value.dtype.kind in "iu":
            axis.yaxis.get_major_locator().set_params(integer=True)
    if part:
        name = f"env {episode['env']}, step {episode['start']:,}, return {_number(episode['return'])}"
        axes[1].set_title(f"one episode: {name}", loc="left", fontsize=10)
        axes[-1].set_xlabel("step of the episode", fontsize=8, color=_MUTED)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_BETWEEN)
        axis.tick_params(labelsize=8, colors=_MUTED, color=_BETWEEN)
        axis.grid(color=_LINE, linewidth=0.6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _median(episodes: np.ndarray) -> np.void:
    return episodes[np.argsort(episodes["return"], kind="stable")[len(episodes) // 2]]
