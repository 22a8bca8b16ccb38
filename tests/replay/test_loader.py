import gc
import itertools
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from phyxdream.errors import ReplayClosed
from phyxdream.replay import Limiter, Loader, Prioritized, Recency, Replay, Uniform


def clones(batch):
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}


def take(loader, count):
    return [clones(next(loader)) for _ in range(count)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 7])
def test_the_same_batches_as_sample(wrapped, same, prefetch, threads):
    for selector in (Uniform(), {Prioritized(): 1, Recency(): 1}):
        options = {"capacity": 90, "selector": selector}
        (replay, _), (twin, _) = wrapped(**options), wrapped(**options)
        with replay.loader(5, 4, prefetch=prefetch, threads=threads) as loader:
            assert isinstance(loader, Loader) and iter(loader) is loader
            batches = take(loader, 20)
        for batch in batches:
            assert same(batch, twin.sample(5, 4))
        # The loader has drawn `prefetch` batches more than it gave.
        for _ in range(prefetch):
            twin.sample(5, 4)
        assert replay.total_sampled == twin.total_sampled == 20 * (20 + prefetch)
        assert same(replay.sample(5, 4), twin.sample(5, 4))


@pytest.mark.parametrize(
    "options",
    [{"online": True}, {"force_is_first": True}, {"cross_episodes": False}, {"online": True, "force_is_first": True}],
)
def test_the_options_are_those_of_sample(wrapped, same, options):
    (replay, _), (twin, _) = (wrapped(capacity=90) for _ in range(2))
    with replay.loader(3, 3, threads=2, **options) as loader:
        for batch in take(loader, 8):
            assert same(batch, twin.sample(3, 3, **options))


def test_adds_between_the_batches_are_deterministic(coded, same):
    """The k-th batch is what the buffer held when it was drawn, whatever is added before it is taken."""
    runs = []
    for threads in (1, 3, 2):
        replay, numbers = Replay(coded.spec, 200, 3, seed=1, latents=coded.latents), np.zeros(3, np.int64)
        rng = np.random.default_rng(0)
        coded.fill(replay, numbers, 40, rng)
        batches = []
        with replay.loader(16, 20, threads=threads, prefetch=3, online=True) as loader:
            for k in range(60):
                batches += take(loader, 1)
                replay.update(batches[-1]["step_id"], **coded.latent(batches[-1]["step_id"].numpy(), k % 60))
                coded.fill(replay, numbers, int(rng.integers(0, 30)), rng)
        for batch in batches:
            coded.check(batch)
        runs.append(batches)
        assert numbers.min() > 300  # the rings have wrapped many times
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert same(a, b)


def test_draws_happen_when_a_batch_is_taken(coded):
    """Batch k + prefetch is drawn in the call that returns batch k."""
    replay, numbers = Replay(coded.small_spec, 1000, 1), np.zeros(1, np.int64)
    coded.fill(replay, numbers, 3)
    with replay.loader(1, 3, prefetch=2, online=True) as loader:
        next(loader)  # 0, 1 and 2 are drawn
        coded.fill(replay, numbers, 6)  # two fresh sequences
        starts = [int(next(loader)["step_id"][0, 0]) for _ in range(6)]
    assert starts[:2] == [0, 0]
    assert starts[2:4] == [3, 6]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_the_ring_of_buffers(wrapped, same, prefetch):
    """The memory of a batch is used again after `prefetch` others, never earlier, and never while it is the latest."""
    replay, _ = wrapped(capacity=300)
    with replay.loader(4, 5, prefetch=prefetch, threads=2) as loader:
        seen = []
        for _ in range(4 * (prefetch + 1)):
            batch = next(loader)
            kept = clones(batch)
            time.sleep(0.002)
            assert same(batch, kept)
            seen.append({name: value.data_ptr() for name, value in batch.items() if torch.is_tensor(value)})
    for name in seen[0]:
        memory = [pointers[name] for pointers in seen]
        assert len(set(memory)) == prefetch + 1
        assert memory[prefetch + 1 :] == memory[: -prefetch - 1]


def test_the_last_batch_outlives_everything(wrapped, coded, same):
    replay, _ = wrapped(latents=coded.latents)
    batch = next(replay.loader(4, 3, threads=2))
    kept = clones(batch)
    gc.collect()
    replay.close()
    del replay
    gc.collect()
    junk = [torch.full((3, 4, 100), 77.0) for _ in range(100)]
    assert same(batch, kept) and junk


# ------------------------------------------------------------------------------------------- consecutive and context


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("consecutive, context", [(1, 2), (3, 0), (3, 1), (4, 5)])
def test_consecutive_chunks(wrapped, coded, same, consecutive, context, prefetch):
    length = 4
    whole = consecutive * length + context
    options = {"capacity": 120, "latents": coded.latents, "selector": Recency()}
    (replay, _), (twin, _) = wrapped(**options), wrapped(**options)
    with replay.loader(
        3, length, prefetch=prefetch, threads=2, consecutive=consecutive, context=context, force_is_first=True
    ) as loader:
        for _ in range(5):
            expected = twin.sample(3, whole, force_is_first=True)
            before = None
            for part in range(consecutive):
                batch = next(loader)
                assert batch.get("consecutive") == (part if consecutive > 1 else None)
                tensors = {name: value for name, value in batch.items() if name != "consecutive"}
                rows = slice(part * length, (part + 1) * length + context)
                cut = {name: v if name == "probability" else v[rows] for name, v in expected.items()}
                assert same(tensors, cut)
                if before is not None:  # views of one memory: the context is what the chunk before ended with
                    for name, value in tensors.items():
                        if name != "probability":
                            assert value.data_ptr() - before[name].data_ptr() == length * value[0].nbytes
                before = tensors


def test_plain_batches_have_no_word_of_chunks(wrapped):
    replay, _ = wrapped()
    assert "consecutive" not in next(replay.loader(2, 3))


def test_consecutive_chunks_use_the_ring_by_sequence(wrapped):
    replay, _ = wrapped(capacity=120)
    with replay.loader(3, 4, prefetch=1, consecutive=3) as loader:
        memory = [next(loader)["number"].data_ptr() for _ in range(18)]
    assert len(set(memory)) == 6 and memory[:6] * 3 == memory


# --------------------------------------------------------------------------------------------------------------- ending


def test_a_closed_loader_cannot_be_used(wrapped):
    replay, _ = wrapped()
    loader = replay.loader(2, 3)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ReplayClosed):
        next(loader)
    replay.sample(2, 3)  # the buffer lives on
    with replay.loader(2, 3, prefetch=0) as loader:
        next(loader)
    with pytest.raises(ReplayClosed):
        next(loader)
    with replay.loader(2, 3, consecutive=2, context=1) as loader:
        next(loader)
    with pytest.raises(ReplayClosed):
        next(loader)


def test_a_loop_may_be_left_at_any_time(wrapped):
    replay, _ = wrapped()
    for _ in range(20):
        for batch in itertools.islice(replay.loader(2, 3, threads=2), 3):
            assert batch["number"].shape == (3, 2)
    for _ in range(20):
        replay.loader(2, 3, threads=2)  # not even begun
    gc.collect()
    assert threading.active_count() < 20


def test_several_loaders_at_once(wrapped, coded):
    replay, numbers = wrapped(capacity=90)
    with replay.loader(3, 4, threads=2) as a, replay.loader(2, 5, prefetch=0) as b, replay.loader(4, 2) as c:
        for _ in range(30):
            for loader in (a, b, c):
                coded.check(next(loader), ends=numbers)


def test_threads_may_share_a_loader(wrapped, coded):
    """Each call takes another batch; who clones it under a lock has it whole."""
    (replay, numbers), (twin, _) = wrapped(capacity=90), wrapped(capacity=90)
    seen, lock = [], threading.Lock()
    with replay.loader(3, 4, threads=2) as loader:

        def work():
            for _ in range(20):
                with lock:
                    seen.append(clones(next(loader)))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 60
    for batch in seen:
        coded.check(batch, ends=numbers)
        assert torch.equal(batch["step_id"], twin.sample(3, 4)["step_id"])


def test_closing_the_buffer_ends_the_wait_of_its_loaders(coded):
    replay = Replay(coded.small_spec, 40, 1, limiter=Limiter(1.0, min_size=0))
    coded.uneven(replay, [20])
    for prefetch, left in ((2, 2), (0, 0)):
        loader = replay.loader(2, 3, prefetch=prefetch)
        if prefetch:
            next(loader)  # and two are on their way: 18 of 20 steps
        replay.close()
        with pytest.raises(ReplayClosed):
            for _ in range(left + 1):
                next(loader)


def test_closing_the_loader_wakes_who_waits_in_it(coded):
    replay = Replay(coded.small_spec, 10, 1, limiter=Limiter(1.0))
    loader, outcome = replay.loader(1, 1), []

    def work():
        try:
            outcome.append(next(loader))
        except ReplayClosed:
            outcome.append("ended")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    loader.close()
    thread.join(5)
    assert outcome == ["ended"]


def test_a_buffer_that_is_too_empty(coded):
    replay, numbers = Replay(coded.small_spec, 40, 1), np.zeros(1, np.int64)
    with replay.loader(2, 5, threads=2) as loader:
        for _ in range(2):
            with pytest.raises(ValueError, match="no env has 5 steps yet"):
                next(loader)
        coded.fill(replay, numbers, 5)
        coded.check(next(loader), ends=numbers)  # it can go on from there
    assert replay.total_sampled <= 3 * 10


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"length": 0}, ValueError, "length: got 0"),
        ({"length": 1.5}, TypeError, "length: got 1.5"),
        ({"prefetch": -1}, ValueError, "prefetch: got -1"),
        ({"threads": 0}, ValueError, "threads: got 0"),
        ({"consecutive": 0}, ValueError, "consecutive: got 0"),
        ({"context": -1}, ValueError, "context: got -1"),
        ({"device": "nonsense"}, (ValueError, RuntimeError), "device|nonsense"),
        ({"device": 3.5}, (ValueError, TypeError), "device"),
        ({"online": True, "cross_episodes": False}, ValueError, "cross_episodes"),
    ],
)
def test_bad_arguments(wrapped, options, error, message):
    replay, _ = wrapped()
    with pytest.raises(error, match=message):
        replay.loader(**{"batch_size": 2, "length": 3, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(wrapped):
    replay, _ = wrapped()
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)cuda"):
        replay.loader(2, 3, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_cuda_batches(wrapped, coded, same, prefetch):
    options = {"capacity": 300, "latents": coded.latents}
    (replay, _), (twin, _) = wrapped(**options), wrapped(**options)
    given = []
    with replay.loader(16, 10, prefetch=prefetch, threads=2, device="cuda") as loader:
        for _ in range(30):
            batch = next(loader)
            assert all(value.is_cuda for value in batch.values())
            given.append(batch)
            latent = {name: torch.as_tensor(v).cuda() for name, v in coded.latent(batch["step_id"].cpu(), 3).items()}
            assert replay.update(batch["step_id"], **latent) == twin.update(batch["step_id"], **latent)
            expected = twin.sample(16, 10)
            names = [name for name in expected if name not in coded.latents]  # written back after the draw
            assert same({name: batch[name].cpu() for name in names}, {name: expected[name] for name in names})


# -------------------------------------------------------------------------------------------------------- concurrency


@pytest.mark.parametrize("prefetch, threads", [(0, 1), (3, 2)])
def test_never_torn_while_others_add(coded, prefetch, threads):
    replay, envs, stop, failures = Replay(coded.spec, 4 * 60, 4), 4, threading.Event(), []
    coded.uneven(replay, [40] * envs)

    def write(env):
        try:
            for number in range(40, 100_000):
                if stop.is_set():
                    return
                replay.add(coded.step([env], [number]), [env])
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(env,)) for env in range(envs)]
    for thread in writers:
        thread.start()
    try:
        with replay.loader(16, 33, prefetch=prefetch, threads=threads) as loader:
            for _ in range(250):
                coded.check(next(loader))
    finally:
        stop.set()
    for thread in writers:
        thread.join()
    assert not failures and replay.total_added > 4 * 120


WAIT = """
import signal
import sys
from phyxdream.replay import Limiter, Replay

replay = Replay({"is_first": ((), "bool")}, 10, 1, limiter=Limiter(1.0, min_size=0, lead=1.0))
if sys.argv[1] == "add":
    replay.add({"is_first": [True]})
    replay.add({"is_first": [True]})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored
print("waiting", flush=True)
try:
    if sys.argv[1] == "add":
        replay.add({"is_first": [True]})
    elif sys.argv[1] == "sample":
        replay.sample(1, 1)
    else:
        next(replay.loader(1, 1, prefetch=int(sys.argv[1]), threads=2))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_a_wait(tmp_path):
    """In the main thread, in processes of their own."""
    waiting = [
        subprocess.Popen([sys.executable, "-c", WAIT, what], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for what in ("add", "sample", "0", "2")
    ]
    try:
        for process in waiting:
            assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        for process in waiting:
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        for process in waiting:
            assert process.communicate(timeout=60)[0] == "interrupted\n"
            assert process.returncode == 0
    finally:
        for process in waiting:
            process.kill()


def test_a_process_ends_with_loaders_at_work(tmp_path):
    script = """
import itertools, threading
from phyxdream.replay import Limiter, Replay
replay = Replay({"is_first": ((), "bool")}, 1000, 1)
for _ in range(50):
    replay.add({"is_first": [True]})
loader = replay.loader(4, 3, threads=3, prefetch=5)
next(loader)
limited = Replay({"is_first": ((), "bool")}, 1000, 1, limiter=Limiter(1.0))
stuck = limited.loader(1, 1)
threading.Thread(target=lambda: next(stuck), daemon=True).start()
cycle = [replay, loader]
cycle.append(cycle)
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
