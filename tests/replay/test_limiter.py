import threading
import time

import numpy as np
import pytest

from phyxdream.errors import ReplayClosed
from phyxdream.replay import Limiter, Replay

SPEC = {"x": ((), "int64"), "is_first": ((), "bool")}


def make(*limits, envs=1, capacity=1000, **more):
    return Replay(SPEC, capacity, envs, limiter=Limiter(*limits, **more))


def add(replay, steps):
    for _ in range(steps):
        replay.add({"x": np.zeros(1, int), "is_first": [False]}, [0])


class Waiter(threading.Thread):
    """Runs `work` aside; `done` once it ended, with what it gave or raised."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self.work, self.outcome = work, None
        self.start()

    def run(self):
        try:
            self.outcome = self.work()
        except BaseException as error:
            self.outcome = error

    def still_waits(self):
        self.join(0.15)
        return self.is_alive()

    def result(self):
        self.join(30)
        assert not self.is_alive()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def test_the_budget_is_exact():
    replay = make(2.0, min_size=5, timeout=0.01)
    add(replay, 5)
    assert not replay.ready(1, 1)
    with pytest.raises(TimeoutError):
        replay.sample(1, 1)
    add(replay, 3)  # 2 * 3 = 6 steps may be sampled
    assert replay.ready(3, 2) and replay.ready(6, 1) and not replay.ready(7, 1) and not replay.ready(3, 3)
    with pytest.raises(TimeoutError):
        replay.sample(7, 1)
    assert replay.total_sampled == 0
    replay.sample(2, 2)
    assert replay.total_sampled == 4
    assert replay.ready(2, 1) and not replay.ready(3, 1)
    replay.sample(1, 2)
    assert not replay.ready(1, 1)
    add(replay, 1)
    assert replay.ready(2, 1) and not replay.ready(3, 1)


def test_a_fraction_of_a_sample_per_insert():
    replay = make(0.25, min_size=1, timeout=0.01)
    add(replay, 4)
    assert not replay.ready(1, 1)
    add(replay, 1)
    assert replay.ready(1, 1)
    replay.sample(1, 1)
    add(replay, 3)
    assert not replay.ready(1, 1)
    add(replay, 1)
    assert replay.ready(1, 1)


def test_adding_waits_when_it_is_too_far_ahead():
    replay = make(1.0, min_size=1, lead=4.0, timeout=0.01)
    add(replay, 5)  # the budget is 4: not more than the lead
    add(replay, 1)  # now it is 5
    with pytest.raises(TimeoutError):
        add(replay, 1)
    assert replay.total_added == 6
    replay.sample(1, 1)
    add(replay, 1)
    with pytest.raises(TimeoutError):
        add(replay, 1)
    assert replay.total_added == 7


def test_without_a_lead_adding_never_waits():
    replay = make(8.0, timeout=0.01)
    add(replay, 1500)
    assert replay.total_added == 1500


def test_a_sample_waits_for_its_steps():
    replay = make(1.0, min_size=2)
    waiter = Waiter(lambda: replay.sample(2, 2))
    add(replay, 5)
    assert waiter.still_waits() and replay.total_sampled == 0
    add(replay, 1)
    assert waiter.result()["x"].shape == (2, 2)
    assert replay.total_sampled == 4


def test_an_add_waits_for_samples():
    replay = make(1.0, min_size=1, lead=2.0)
    add(replay, 4)
    waiter = Waiter(lambda: add(replay, 1))
    assert waiter.still_waits() and replay.total_added == 4
    replay.sample(1, 1)
    waiter.result()
    assert replay.total_added == 5


def test_many_samplers_share_the_budget():
    replay = make(1.0, min_size=0)
    waiters = [Waiter(lambda: replay.sample(1, 1)) for _ in range(6)]
    add(replay, 4)
    deadline = time.monotonic() + 30
    while replay.total_sampled < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert replay.total_sampled == 4 and sum(waiter.is_alive() for waiter in waiters) == 2
    add(replay, 2)
    for waiter in waiters:
        waiter.result()
    assert replay.total_sampled == 6


def test_writers_and_readers_keep_in_step():
    """Whatever the order of the threads, neither side gets further ahead than allowed."""
    replay, steps, seen = make(2.0, min_size=10, lead=16.0), 400, []

    def read():
        while replay.total_sampled < 2 * (steps - 10) - 40:
            replay.sample(2, 2)
            # A writer may be between the check and the count, hence added is read after sampled.
            sampled, added = replay.total_sampled, replay.total_added
            seen.append(2 * (added - 10) - sampled)

    threads = [Waiter(lambda: add(replay, steps // 2)) for _ in range(2)] + [Waiter(read)]
    threads[-1].result()
    assert min(seen) >= 0 and max(seen) <= 16 + 2 * 2 * 2
    replay.close()
    for waiter in threads[:-1]:
        waiter.join(30)
        assert not waiter.is_alive()


def test_the_timeout_is_waited_for():
    replay = make(1.0, timeout=0.2)
    before = time.monotonic()
    with pytest.raises(TimeoutError, match="limiter"):
        replay.sample(1, 1)
    assert time.monotonic() - before > 0.19


@pytest.mark.parametrize("what", ["sample", "add", "loader", "loader_inline"])
def test_closing_wakes_who_waits(what):
    replay = make(1.0, min_size=1, lead=2.0)
    add(replay, 4 if what == "add" else 1)
    work = {
        "sample": lambda: replay.sample(1, 1),
        "add": lambda: add(replay, 1),
        "loader": lambda: next(replay.loader(1, 1, threads=2)),
        "loader_inline": lambda: next(replay.loader(1, 1, prefetch=0)),
    }[what]
    waiters = [Waiter(work) for _ in range(2)]
    assert all(waiter.still_waits() for waiter in waiters)
    replay.close()
    for waiter in waiters:
        with pytest.raises(ReplayClosed):
            waiter.result()


def test_the_counts_survive_a_restart(tmp_path):
    replay = make(2.0, min_size=5, lead=50.0, timeout=0.01)
    add(replay, 10)
    replay.sample(3, 2)
    replay.save(tmp_path / "replay")
    loaded = Replay.load(tmp_path / "replay")
    assert loaded.limiter == replay.limiter == Limiter(2.0, 5, 50.0, 0.01)
    assert (loaded.total_added, loaded.total_sampled) == (10, 6)
    assert loaded.ready(4, 1) and not loaded.ready(5, 1)
    with pytest.raises(TimeoutError):
        loaded.sample(5, 1)
    loaded.sample(4, 1)


def test_a_sample_waits_for_an_env_that_is_long_enough():
    """With a limiter, steps that are still to come are waited for; without one, or if they can't be, it is an error."""
    replay = make(100.0, capacity=20)
    add(replay, 5)
    assert not replay.ready(1, 6)
    waiter = Waiter(lambda: replay.sample(1, 6))
    assert waiter.still_waits()
    add(replay, 1)
    assert waiter.result()["x"].shape == (6, 1)
    with pytest.raises(ValueError, match="no env has 21 steps"):
        replay.sample(1, 21)
    assert replay.total_sampled == 6


def test_a_short_lead_does_not_lock_both_sides_out():
    """The budget is spent only once an env has a sequence: adding must not wait for a draw that cannot be yet."""
    replay = make(512.0, lead=64.0, timeout=10.0)
    waiter = Waiter(lambda: replay.sample(1, 64))
    add(replay, 64)
    assert waiter.result()["x"].shape == (64, 1)


@pytest.mark.parametrize(
    "limits, name",
    [
        ({"samples_per_insert": 0.0}, "samples_per_insert"),
        ({"samples_per_insert": -1.0}, "samples_per_insert"),
        ({"samples_per_insert": float("nan")}, "samples_per_insert"),
        ({"samples_per_insert": "a"}, "samples_per_insert"),
        ({"samples_per_insert": 1.0, "min_size": -1}, "min_size"),
        ({"samples_per_insert": 1.0, "min_size": 1.5}, "min_size"),
        ({"samples_per_insert": 1.0, "lead": -1.0}, "lead"),
        ({"samples_per_insert": 1.0, "lead": float("nan")}, "lead"),
        ({"samples_per_insert": 1.0, "timeout": -1.0}, "timeout"),
        ({"samples_per_insert": 1.0, "timeout": float("nan")}, "timeout"),
    ],
)
def test_bad_limits(limits, name):
    with pytest.raises((ValueError, TypeError), match=name):
        Replay(SPEC, 10, 1, limiter=Limiter(**limits))
