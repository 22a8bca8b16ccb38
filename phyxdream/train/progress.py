"""Progress of long work: a live bar in a terminal, a line every ten seconds in a log, or silence."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections import deque
from typing import IO, Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_WINDOW = 30.0  # seconds that rates and ETA look back
_SAMPLE = 0.25  # seconds between the samples in that window


class Progress:
    """Shows environment steps, updates, both per second, return, loss, elapsed time and ETA.

    Use it as a context manager. It never raises because of the terminal: output that cannot be written is dropped.

    Args:
        total: steps when the work is done.
        step: steps done already (of a resumed run); rates and ETA count from here.
        elapsed: seconds done already, so that the time shown is that of the whole run.
        title: what is being done, such as "train envpool:Catch-v0".
        unit: what a step is.
        mode: "live" (a bar that redraws), "plain" (lines), "silent", or "auto": live in a terminal, else plain.
        file: where to write; standard output by default.
        interval: seconds between plain lines.

    Raises:
        ValueError: an unknown `mode`.
    """

    def __init__(
        self,
        total: int,
        *,
        step: int = 0,
        elapsed: float = 0.0,
        title: str = "",
        unit: str = "steps",
        mode: Literal["auto", "live", "plain", "silent"] = "auto",
        file: IO[str] | None = None,
        interval: float = 10.0,
    ) -> None:
        if mode not in ("auto", "live", "plain", "silent"):
            raise ValueError(f"mode must be 'auto', 'live', 'plain' or 'silent', got {mode!r}")
        target = _Steady(file if file is not None else sys.stdout)
        self._console = Console(file=target, highlight=False, quiet=mode == "silent")
        if mode == "auto":
            terminal = self._console.is_terminal and not self._console.is_dumb_terminal
            mode = "live" if terminal and target.isatty() else "plain"
        self.mode = mode
        self.total = total
        self.title = title
        self.unit = unit
        self._target = target
        self._interval = interval
        self._step = step
        self._values: dict[str, float] = {}
        self._origin = time.monotonic() - elapsed
        self._samples: deque[tuple[float, int, int]] = deque([(time.monotonic(), step, -1)])
        self._next_line = time.monotonic() + interval
        self._live: Live | None = None
        self._lock = threading.Lock()  # the bar is drawn by a thread of its own

    def __enter__(self) -> Progress:
        if self.mode == "live":
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self.mode == "plain":
            self._write(self._line())

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run so far."""
        return time.monotonic() - self._origin

    def update(self, step: int, **values: float) -> None:
        """Report where the work is. Cheap enough to call at every step.

        Args:
            step: steps so far.
            values: the newest numbers to show under their names; `updates` also gets a rate. A value stays until
                it is given again. A trailing underscore is not shown, for names like `return_`.
        """
        now = time.monotonic()
        with self._lock:
            self._step = step
            self._values |= {name.rstrip("_"): float(value) for name, value in values.items()}
            if now - self._samples[-1][0] >= _SAMPLE:
                self._samples.append((now, step, int(self._values.get("updates", -1))))
                while now - self._samples[0][0] > _WINDOW and len(self._samples) > 2:
                    self._samples.popleft()
        if self.mode == "plain" and now >= self._next_line:
            self._write(self._line())
            self._next_line = now + self._interval

    def print(self, message: str) -> None:
        """Write a line above the bar (in silence: nothing)."""
        if self._live is not None:
            self._console.print(Text(message))
        elif self.mode != "silent":
            self._write(message)

    def _write(self, line: str) -> None:
        self._target.write(line + "\n")
        self._target.flush()

    def _rate(self, column: int) -> float | None:
        samples = [s for s in self._samples if s[column] >= 0]
        if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
            return None
        return (samples[-1][column] - samples[0][column]) / (samples[-1][0] - samples[0][0])

    def _figures(self) -> dict[str, str]:
        """What is shown besides the bar, as name -> text."""
        figures = {}
        if (fps := self._rate(1)) is not None:
            figures["FPS"] = _number(fps)
        if "updates" in self._values:
            figures["updates"] = f"{int(self._values['updates']):,}"
            if (rate := self._rate(2)) is not None:
                figures["updates/s"] = _number(rate)
        figures |= {name: _number(value) for name, value in self._values.items() if name != "updates"}
        return figures

    def _times(self) -> str:
        fps = self._rate(1)
        remaining = max(0, self.total - self._step)
        eta = clock(remaining / fps) if fps else "-:--"
        return f"{clock(self.elapsed)}  ETA {eta}" if remaining else clock(self.elapsed)

    def _line(self) -> str:
        with self._lock:
            step, figures, times = self._step, self._figures(), self._times()
        share = f"{100 * step / self.total:.0f}%" if self.total else "100%"
        parts = [f"{step:,}/{self.total:,} {self.unit} ({share})"]
        parts += [f"{name} {text}" for name, text in figures.items()]
        return "  ".join([*([self.title] if self.title else []), *parts, times])

    def _render(self) -> RenderableType:
        with self._lock:
            step, figures, times = self._step, self._figures(), self._times()
        row = Table.grid(padding=(0, 1), expand=True)
        cells: list[RenderableType] = []
        if self.title:
            row.add_column(no_wrap=True, overflow="ellipsis")
            cells.append(Text(self.title, style="bold"))
        row.add_column(ratio=1, min_width=4)
        cells.append(ProgressBar(total=max(1, self.total), completed=min(step, self.total)))
        for text, style in ((f"{step:,}/{self.total:,} {self.unit}", "cyan"), (times, "yellow")):
            row.add_column(no_wrap=True, justify="right")
            cells.append(Text(text, style=style))
        row.add_row(*cells)
        line = Text(no_wrap=True, overflow="ellipsis")
        for name, text in figures.items():
            line.append(f"{name} ", style="dim").append(f"{text}   ", style="bold")
        return Group(row, line)


class _Steady(io.TextIOBase):
    """Text stream that drops what cannot be written: closed pipes, missing streams, letters the encoding lacks."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._file, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._file is not None and self._file.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._file is None:
            raise OSError("no stream")
        return self._file.fileno()

    def write(self, text: str) -> int:
        try:
            if self._file is not None:
                self._file.write(text.encode(self.encoding, "replace").decode(self.encoding))
        except (OSError, ValueError, LookupError):
            pass
        return len(text)

    def flush(self) -> None:
        try:
            if self._file is not None:
                self._file.flush()
        except (OSError, ValueError):
            pass


def clock(seconds: float) -> str:
    """Seconds as `m:ss`, `h:mm:ss` or `3d 4:05:06`."""
    seconds = max(0, int(seconds))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    short = f"{hours}:{minutes:02d}:{seconds % 60:02d}" if days or hours else f"{minutes}:{seconds % 60:02d}"
    return f"{days}d {short}" if days else short


def _number(value: Any) -> str:
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}" if magnitude < 1e7 else f"{value:.3g}"
    return f"{value:.1f}" if magnitude >= 100 else f"{value:.3g}"
