import io
import threading

import pytest

from phyxdream.train import progress
from phyxdream.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Ascii(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_every_interval_and_a_last_one(clock):
    file = io.StringIO()
    with Progress(1000, title="train", file=file) as bar:
        assert bar.mode == "plain"
        for step in range(0, 1000, 10):
            clock.now += 0.25
            bar.update(step + 10, updates=step // 10, return_=0.5, loss=2.0)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3  # after 10 s and 20 s of 25 s, and at the end
    assert (
        lines[0] == "train  400/1,000 steps (40%)  FPS 40  updates 39  updates/s 4  return 0.5  loss 2  0:10  ETA 0:15"
    )
    assert lines[-1].startswith("train  1,000/1,000 steps (100%)") and lines[-1].endswith("0:25")


def test_a_resumed_run_counts_rates_from_here_and_time_from_the_start(clock):
    bar = Progress(2000, step=1000, elapsed=3600, file=io.StringIO())
    assert bar.elapsed == 3600
    clock.now += 10
    bar.update(1100, updates=500)
    assert "FPS 10 " in bar._line() and bar._line().endswith("1:00:10  ETA 1:30")


def test_live_bar_shows_the_figures_and_restores_the_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    file = Terminal()
    with Progress(1000, title="train envpool:Catch-v0", file=file) as bar:
        assert bar.mode == "live"
        bar.update(500, updates=20, return_=0.75)
        bar.print("saved a checkpoint")
    text = file.getvalue()
    assert "500/1,000 steps" in text and "0.75" in text and "saved a checkpoint" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


@pytest.mark.parametrize("columns", ["1", "7", "20", "300", "nonsense"])
@pytest.mark.parametrize("term", ["xterm", "dumb", ""])
def test_odd_terminals(monkeypatch, columns, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", columns)
    with Progress(0, title="train [bold] it", file=Terminal()) as bar:
        bar.update(5, loss=float("nan"), scale=float("inf"), tiny=1e-30, big=1e30)
        bar.print("[/not markup]")


@pytest.mark.parametrize("mode", ["live", "plain"])
def test_streams_that_cannot_take_it(mode):
    for file in (Ascii(), Closed()):
        with Progress(10, title="λ → ∞", file=file, mode=mode) as bar:
            bar.update(5)
            bar.print("μ")
    closed = io.StringIO()
    closed.close()
    with Progress(10, file=closed, mode=mode) as bar:
        bar.update(5)


def test_no_standard_output(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with Progress(10) as bar:
        bar.update(5)


def test_silent_is_silent():
    file = Terminal()
    with Progress(10, file=file, mode="silent", interval=0) as bar:
        bar.update(5)
        bar.print("hello")
    assert file.getvalue() == ""


def test_unknown_mode():
    with pytest.raises(ValueError, match="'loud'"):
        Progress(10, mode="loud")


def test_drawing_while_updating(monkeypatch):
    monkeypatch.setattr(progress, "_SAMPLE", 0.0)
    bar = Progress(10, file=Terminal(), mode="live")
    failures = []

    def draw():
        try:
            for _ in range(300):
                bar._render()
        except RuntimeError as e:
            failures.append(e)

    thread = threading.Thread(target=draw)
    thread.start()
    step = 0
    while thread.is_alive():
        bar.update(step, **{f"value{step % 50}": step})
        step += 1
    thread.join()
    assert not failures


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.9, "1:01"), (3600, "1:00:00"), (90061, "1d 1:01:01")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text
