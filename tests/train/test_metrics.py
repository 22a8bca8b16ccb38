import json
import math
import sys

import numpy as np
import pytest
import torch

from phyxdream.errors import CheckpointError
from phyxdream.train import metrics
from phyxdream.train.metrics import Metrics
from phyxdream.train.run import Run


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", {})


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def rows(run):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in run.metrics.read_text().splitlines()]


def test_rows_and_columns(run, clock):
    with Metrics(run) as log:
        clock.now += 1.5
        log.log(10, {"loss/a": torch.tensor([0.1]), "x": 2}, updates=3)
        log.log(20, {"episode/return": np.float32(0.5)}, updates=6)
    assert list(rows(run)[0].items()) == [
        ("step", 10), ("updates", 3), ("time", 1.5), ("loss/a", float(np.float32(0.1))), ("x", 2.0),
    ]  # fmt: skip
    columns = metrics.read(run.metrics)
    np.testing.assert_array_equal(columns["step"], [10, 20])
    np.testing.assert_array_equal(columns["x"], [2, np.nan])
    np.testing.assert_array_equal(columns["episode/return"], [np.nan, 0.5])
    assert metrics.read(run.path / "nothing") == {}


def test_non_finite_numbers_stay_valid_json_and_come_back(run):
    with Metrics(run) as log:
        log.log(1, {"nan": math.nan, "inf": torch.tensor(math.inf), "minus": -math.inf})
    assert len(rows(run)) == 1
    columns = metrics.read(run.metrics)
    assert math.isnan(columns["nan"][0]) and columns["inf"][0] == math.inf and columns["minus"][0] == -math.inf


@pytest.mark.parametrize(
    ("step", "values", "counters", "message"),
    [
        (4, {}, {}, "backwards: got 4 after 5"),
        (6, {"step": 1}, {}, "'step' is taken"),
        (6, {"updates": 1}, {"updates": 1}, "'updates' is taken"),
        (6, {"a": torch.zeros(2)}, {}, r"values\['a'\]: expected one element, got shape \(2,\)"),
    ],
)
def test_bad_rows_are_refused_and_not_written(run, step, values, counters, message):
    with Metrics(run) as log:
        log.log(5, {})
        with pytest.raises(ValueError, match=message):
            log.log(step, values, **counters)
        assert [row["step"] for row in rows(run)] == [5]


@pytest.mark.parametrize("tail", [b'{"step": 30, "ti', b"\n", b"\0\0\0\0", b"not json\n"])
def test_a_half_written_line_is_left_out_and_cut_off(run, clock, tail):
    with Metrics(run) as log:
        clock.now += 7
        log.log(10, {"a": 1})
    with open(run.metrics, "ab") as file:
        file.write(tail)
    np.testing.assert_array_equal(metrics.read(run.metrics)["step"], [10])
    with Metrics(run) as log:
        assert log.elapsed == 7
        log.log(20, {"a": 2})
    assert [row["step"] for row in rows(run)] == [10, 20]


def test_a_damaged_line_in_the_middle_is_skipped_with_a_warning(run):
    run.metrics.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.warns(RuntimeWarning, match=r"1 damaged line"):
        np.testing.assert_array_equal(metrics.read(run.metrics)["step"], [1, 3])


def test_a_resumed_run_has_every_step_once_and_the_clock_goes_on(run, clock):
    with Metrics(run) as log:
        for step in (10, 20, 30, 40):
            clock.now += 1
            log.log(step, {"a": step})
    clock.now += 10_000  # the machine was off
    with Metrics(run) as log:
        log.truncate_after(25)
        assert log.elapsed == 2
        for step in (30, 40, 50):
            clock.now += 1
            log.log(step, {"a": -step})
    columns = metrics.read(run.metrics)
    np.testing.assert_array_equal(columns["step"], [10, 20, 30, 40, 50])
    np.testing.assert_array_equal(columns["a"], [10, 20, -30, -40, -50])
    np.testing.assert_array_equal(columns["time"], [1, 2, 3, 4, 5])


def test_tensorboard_has_the_scalars_and_forgets_the_abandoned_ones(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(run) as log:
        for step in (10, 20, 30):
            log.log(step, {"a": step}, updates=step)
    with Metrics(run) as log:
        log.truncate_after(15)
        log.log(20, {"a": -20}, updates=20)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(10, 10), (20, -20)]
    assert "updates" in events.Tags()["scalars"]


def test_broken_tensorboard_does_not_end_a_training(run):
    run.tensorboard.write_text("a file where the directory should be")
    with Metrics(run) as log:
        with pytest.warns(RuntimeWarning, match="TensorBoard logging stopped"):
            log.log(1, {"a": 1})
        log.log(2, {"a": 2})
    assert [row["step"] for row in rows(run)] == [1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk_leaves_whole_lines(run):
    import resource

    log = Metrics(run)
    log._tensorboard_works = False
    log.log(1, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: File too large"):
            log.log(2, {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.log(2, {"a": 2})
    log.close()
    assert [row["step"] for row in rows(run)] == [1, 2]
