import base64
import io
import os
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from phyxdream.errors import PhyxdreamError
from phyxdream.train import report
from phyxdream.train.metrics import Metrics
from phyxdream.train.report import Panel, _throughput, evaluation_table, summarise, write_report
from phyxdream.train.run import Run

CONFIG = {
    "env_backend": "envpool",
    "env": "Catch-v0",
    "preset": "catch",
    "seed": 0,
    "total_steps": 2000,
    "model": {"deter_size": 64},
}
VOID = {"meta", "img", "path", "use", "link", "br"}
SEEN, IMAGINED = report.SEEN, report.IMAGINED


class Page(HTMLParser):
    """Checks that tags are balanced and nothing outside the file is asked for; collects text and pictures."""

    def __init__(self, path):
        super().__init__()
        self.open, self.text, self.images = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open
        self.text = " ".join(self.text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/", "#")), value
            if name == "src":
                self.images.append(base64.b64decode(value.partition(",")[2]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def page(run, **arguments):
    path = write_report(run, **arguments)
    assert path == run.report
    page = Page(path)
    assert "could not be drawn" not in page.text
    return page


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", CONFIG)


def log(run, rows, **extra):
    with Metrics(run) as metrics:
        metrics._tensorboard_works = False
        for i in range(rows):
            values = {"loss/image": np.exp(-i / 10), "loss/actor": (-1.0) ** i, "other": i}
            if i % 2:
                values["episode/return"] = i / rows
            metrics.log(10 * (i + 1), {**values, **extra}, updates=i)


def video(shape=(12, 4, 10, 5, 1), seed=0, **extra):
    rng = np.random.default_rng(seed)
    truth, model = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
    return {"truth": truth, "model": model, **extra}


def test_a_full_report(run):
    log(run, 100)
    run.add_evaluation({"step": 500, "time": 1.0, "returns": [0.0, 1.0], "seed": 7})
    run.add_evaluation({"step": 1000, "time": 2.0, "returns": [1.0, 1.0, 0.5, 0.9], "seed": 8})
    full = page(run, video=video(), extra_panels=[Panel("Slots", "three words here")])
    header = ("envpool:Catch-v0", "preset catch", "1,000", "of 2,000", "0.85", "± 0.21 over 4 episodes")
    rest = (
        "1 signal",
        "first 5 pictures",
        "Slots",
        "three words here",
        f"phyxdream eval {run.path}",
        "model.deter_size",
    )
    for text in (*header, *rest):
        assert text in full.text, text
    assert len(full.images) == 2
    for name in ("learning_curve.png", "open_loop.gif", "open_loop.png"):
        Image.open(run.path / name).verify()
    assert full.images == [(run.path / name).read_bytes() for name in ("open_loop.gif", "open_loop.png")]
    assert run.report.stat().st_size < 3_000_000


def test_an_empty_run_gets_sentences(run):
    text = page(run).text
    for sentence in (
        "No episode has ended yet",
        "has not been evaluated yet",
        "There is no video prediction",
        "No loss has been logged yet",
        "Too few rows to tell a rate",
    ):
        assert sentence in text
    assert not (run.path / "learning_curve.png").exists()


def test_throughput_is_steps_and_updates_by_time():
    columns = {"step": np.array([10.0, 30.0, 60.0]), "time": np.array([1.0, 2.0, 2.0]), "updates": np.arange(3.0)}
    rates = _throughput(columns)
    np.testing.assert_array_equal(rates["throughput/environment steps per second"], [np.nan, 20.0, np.nan])
    np.testing.assert_array_equal(rates["throughput/updates per second"], [np.nan, 1.0, np.nan])
    assert _throughput({}) == {}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows(run, rows):
    log(run, rows)
    assert ("No episode has ended yet" in page(run).text) == (rows == 1)


def test_rows_without_a_finite_number(run):
    log(run, 4, **{"loss/image": float("nan"), "episode/return": float("inf"), "loss/zero": 0.0})
    text = page(run).text
    assert "No finite value." in text and "No episode has ended yet" in text


def test_a_damaged_run_still_gets_a_report(run):
    run.metrics.write_bytes(b"\0\0\0")
    run.evaluation.write_text("{")
    (run.path / "versions.json").write_text("{")
    assert "has not been evaluated yet" in page(run).text


def test_names_are_escaped(tmp_path):
    run = Run.create(tmp_path, {"env": "<script>alert(1)</script>", "a<b": "&"})
    log(run, 3, **{"loss/<img src=x>": 1.0})
    assert "<script>alert(1)</script>" in page(run, extra_panels=[("<b>", "<i>")]).text


@pytest.mark.parametrize(
    ("shape", "context"),
    [((12, 4, 10, 5, 1), 5), ((12, 4, 10, 5), 5), ((6, 1, 64, 64, 3), 5), ((1, 1, 5, 5, 1), 5), ((7, 9, 8, 8, 3), 0),
     ((4, 2, 8, 8, 1), 4), ((4, 2, 8, 8, 1), 99)],
)  # fmt: skip
def test_the_border_changes_where_the_open_loop_starts(run, shape, context):
    page(run, video=video(shape, context=context))
    # In the film the border of the first cell (left of its top row) and in the strip that of every column.
    film = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(run.path / "open_loop.gif"))]
    assert len(film) == shape[0]
    for t, frame in enumerate(film):
        pixel = np.array(frame.getpixel((52 + 6 + 1, 26 + 1)), int)
        expected, other = (SEEN, IMAGINED) if t < context else (IMAGINED, SEEN)
        assert np.abs(pixel - expected).sum() < np.abs(pixel - other).sum()
    strip = np.asarray(Image.open(run.path / "open_loop.png").convert("RGB"))
    colours = {tuple(pixel) for pixel in strip[22 + 1, 52:].tolist()}
    assert (SEEN in colours) == (context > 0) and (IMAGINED in colours) == (context < shape[0])


@pytest.mark.parametrize(("shape", "scale"), [((3, 1, 10, 5, 1), 11), ((3, 1, 64, 64, 3), 2), ((3, 1, 128, 96, 3), 1)])
def test_small_pictures_are_enlarged_without_blur(run, shape, scale):
    clip = video(shape, context=1)
    page(run, video=clip)
    strip = np.asarray(Image.open(run.path / "open_loop.png").convert("RGB"))
    top, left, (height, width) = 22 + 3, 52 + 4 + 3, shape[2:4]
    shown = strip[top : top + height * scale, left : left + width * scale]
    np.testing.assert_array_equal(
        shown, np.broadcast_to(clip["truth"][0, 0], (height, width, 3)).repeat(scale, 0).repeat(scale, 1)
    )


def test_error_is_the_absolute_difference_or_what_is_given(run):
    clip = video((6, 2, 4, 4, 3))
    computed = report._prediction(clip).error
    expected = np.abs(clip["truth"].astype(int) - clip["model"].astype(int)).mean(-1) / 255
    np.testing.assert_allclose(computed, expected, atol=1e-6)
    for error in (expected.astype(np.float32), (expected * 255).astype(np.uint8), expected[..., None]):
        np.testing.assert_allclose(report._prediction({**clip, "error": error}).error, expected, atol=1 / 254)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({}, "lacks 'truth'"),
        ({**video(), "model": np.zeros((3, 4, 10, 5, 1), np.uint8)}, "one shape"),
        ({**video(), "truth": np.zeros((12, 4, 10, 5, 1))}, "uint8"),
        ({**video(), "truth": np.zeros((12, 4, 10, 5, 2), np.uint8)}, "C 1 or 3"),
        ({**video(), "truth": np.zeros((0, 4, 10, 5, 1), np.uint8)}, "non-empty"),
        ({**video(), "error": np.zeros((1, 2))}, "video['error']"),
    ],
)
def test_a_bad_video_becomes_a_sentence(run, clip, message):
    text = page(run, video=clip).text
    assert "The video prediction cannot be shown" in text and message in text
    assert not (run.path / "open_loop.gif").exists()


def test_incompressible_video_stays_small(run):
    page(run, video=video((30, 6, 64, 64, 3)))
    assert (run.path / "open_loop.gif").stat().st_size <= report._GIF_BYTES
    assert run.report.stat().st_size < 5_000_000


def test_extra_panels(run):
    figure = Figure()
    figure.subplots().plot([0, 1], label="line")
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    image = np.zeros((4, 8), np.uint8)
    shown = page(
        run,
        extra_panels=[
            Panel("Figure", figure, "a caption"),
            ("Bytes", buffer.getvalue()),
            ("Gray", image),
            ("Channel", image[..., None]),
            ("Colour", np.zeros((4, 8, 3), np.uint8)),
        ],
    )
    assert "a caption" in shown.text
    assert shown.images[0] == buffer.getvalue()
    assert [Image.open(io.BytesIO(data)).size for data in shown.images[1:]] == [(8 * 14, 4 * 14)] * 3


def test_a_part_that_fails_says_so_and_the_rest_stands(run):
    log(run, 10)
    text = Page(write_report(run, extra_panels=[("Odd", np.zeros((2, 2)))])).text
    assert "could not be drawn: TypeError: expected a uint8 image, got float64" in text
    assert "Losses" in text and "How to reproduce" in text


def test_evaluation_rows():
    assert summarise({"returns": [0.0, 2.0]}) == {"mean": 1.0, "std": 1.0, "min": 0.0, "max": 2.0, "episodes": 2}
    assert summarise({"step": 1}) is None and summarise({"returns": []}) is None
    assert summarise({"mean": 1.0, "episodes": 3})["episodes"] == 3
    assert evaluation_table([]) == evaluation_table([{}])
    table = evaluation_table([{"step": 12345, "mean": 0.985, "std": 0.1, "episodes": 100}])
    assert "12,345" in table and "0.98" in table and "100" in table


def test_an_exploring_evaluation_is_in_the_table_alone(run):
    run.add_evaluation({"step": 3, "returns": [0.25, 0.75], "seed": 8})
    shown = write_report(run).read_text().split('class="big">')[1].split("<")[0]
    run.add_evaluation({"step": 3, "returns": [0.99], "seed": 9, "explore": True})
    text = write_report(run).read_text()
    assert text.split('class="big">')[1].split("<")[0] == shown and "0.5" in shown
    assert "9, exploring" in text and "8, exploring" not in text


def test_a_given_evaluation_is_shown_instead_of_the_stored(run):
    run.add_evaluation({"step": 1, "returns": [0.11]})
    text = page(run, evaluation={"step": 2, "mean": 0.77, "std": 0.0, "episodes": 5}).text
    assert "0.77" in text and "0.11" not in text


def test_the_same_run_gives_the_same_report(run):
    log(run, 20)
    first = write_report(run, video=video()).read_bytes()
    assert write_report(run, video=video()).read_bytes() == first


def test_a_report_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    before = write_report(run).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(PhyxdreamError, match="No space left on device"):
        write_report(run)
    assert run.report.read_bytes() == before
    assert not list(run.path.glob(".*.tmp"))


def test_pyplot_stays_out():
    code = "import sys, phyxdream.train.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0
