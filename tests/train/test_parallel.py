"""Actors in processes of their own: what they saw is in the replay once and whole, whoever is killed when; the learner
learns meanwhile; a run of theirs stops, resumes and fails like any other."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.errors import ActorError, CheckpointError, ConfigError, EnvError, MissingDependency
from phyxdream.replay import Replay
from phyxdream.train import checkpoint, parallel
from phyxdream.train.actor import ROWS, Actor, ActorDied, Block, pack_weights
from phyxdream.train.driver import Driver, Episode, make_env
from phyxdream.train.journal import Journal
from phyxdream.train.parallel import LEAD, ParallelSession
from phyxdream.train.run import Run

HERE = str(Path(__file__).parent)


@pytest.fixture
def counting(tiny, monkeypatch) -> DreamerConfig:
    monkeypatch.syspath_prepend(HERE)
    return replace(tiny, env="gym:counting_env:Counting-v0", parallel=True, num_envs=2, replay_capacity=100_000,
                   publish_every=0.0, log_every=10**6, device="cpu")  # fmt: skip


class Local:
    """An actor in this process, quick to start and to kill."""

    def __init__(self, config, number, incarnation):
        self.actor, self.answers, self.dead = Actor(config.to_dict(), number, incarnation), [], False
        self.number = number

    def ask(self, weights):
        self.answers.append(weights)

    def answer(self):
        if self.dead:
            raise ActorDied("killed")
        return self.actor.collect(self.answers.pop(0))

    def stop(self):
        self.dead = True


@pytest.fixture
def local(monkeypatch):
    monkeypatch.setitem(parallel.BACKENDS, "process", Local)


def start(config, resume=False) -> ParallelSession:
    session = ParallelSession(DreamerAgent(config))
    session.run = Run.create(config.logdir, config.to_dict(), resume=resume)
    if resume and (newest := checkpoint.latest(session.run)):
        session.restore(newest)
    session.said = []
    session.begin(session.said.append)
    return session


def run_until(session, condition) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        session.step()


def episodes(replay: Replay) -> list[list[int]]:
    """The counters of every episode, environment by environment, after checking that each has one name, begins with 0
    and counts on by one, and that no name comes twice."""
    found, names = [], set()
    for env, steps in enumerate(replay.stored_steps):
        if not len(steps):
            continue
        rows = replay.read(env, steps.start, len(steps), ["state", "is_first"])
        for (count, *name), first in zip(rows["state"].tolist(), rows["is_first"].tolist(), strict=True):
            assert first == (count == 0)
            if first:
                assert tuple(name) not in names
                names.add(current := tuple(name))
                found.append([])
            assert tuple(name) == current
            assert count == len(found[-1])
            found[-1].append(int(count))
    return found


def check(session) -> None:
    """Counters and replay agree with each other, and with the checkpoint."""
    with session.changed:
        found = episodes(session.replay)
        assert sum(map(len, found)) == session.replay.total_added == len(session.replay)
        assert session.counters.actions == session.counters.steps == sum(len(e) - 1 for e in found)


# -- Pieces -----------------------------------------------------------------------------------------------------------


def test_blocks_and_weights_travel(counting):
    config = replace(counting, replay_context=1).resolve()
    actor, env = Actor(config.to_dict(), number=3, incarnation=2), make_env(config)
    agent = DreamerAgent(config, env.single_observation_space, env.single_action_space)
    env.close()
    with torch.no_grad():
        for p in agent.model.actor.parameters():
            p.add_(1.0)
    block = Block.unpack(actor.collect(pack_weights(agent.model.state_dict(), 7)))
    assert (block.actor, block.incarnation, block.first, block.updates) == (3, 2, 0, 7)
    for name, x in agent.model.state_dict().items():
        assert torch.equal(actor._agent.model.state_dict()[name], x)
    spec = agent.replay_spec | agent.latent_spec
    assert 0 < len(block) <= ROWS and block.rows.keys() == spec.keys()
    for name, (shape, dtype) in spec.items():
        assert block.rows[name].shape == (len(block), 2, *shape)
        assert block.rows[name].dtype == getattr(torch, dtype)
    assert block.rows["is_first"][0].all() and (block.ago >= 0).all() and (block.ago.diff() <= 0).all()
    second = Block.unpack(actor.collect())
    assert (second.first, second.updates) == (len(block), 7)
    lasts = torch.cat([block.rows["is_last"], second.rows["is_last"]])
    ended = block.episodes + second.episodes
    assert len(ended) == lasts.sum()
    counts = torch.cat([block.rows["state"], second.rows["state"]])[..., 0][lasts].tolist()
    assert ended == [Episode(n * (n + 1) / 2, int(n)) for n in counts]  # rewards are 1, 2, ..., n
    actor.close()


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        ("Broken-v0", ActorDied, "the arm is not connected"),
        ("Wrong-v0", EnvError, "reward.*nan"),
        ("None-v0", EnvError, "None-v0"),
    ],
)
def test_failures_travel(counting, env, error, message):
    actor = Actor(replace(counting, env=f"gym:counting_env:{env}").resolve().to_dict())
    with pytest.raises(error, match=message):
        for _ in range(20):
            Block.unpack(actor.collect())
    actor.close()


def test_a_journal_gives_back_what_it_was_given(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.append(b"a" * 1000)
    journal.append(b"")
    second = journal.turn()
    journal.append(b"c")
    assert list(journal.read()) == [b"a" * 1000, b"", b"c"]
    assert list(journal.read(second)) == [b"c"]
    again = Journal(tmp_path / "journal")
    again.append(b"d")
    assert list(again.read(second)) == [b"c", b"d"]
    again.drop_before(second)
    assert list(again.read()) == [b"c", b"d"]


def test_a_torn_record_ends_a_journals_file(tmp_path):
    messages = [b"first", b"second record", b"third"]
    journal = Journal(tmp_path / "journal")
    for message in messages:
        journal.append(message)
    file = next((tmp_path / "journal").iterdir())
    whole = file.read_bytes()
    ends = np.cumsum([12 + len(m) for m in messages]).tolist()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert list(journal.read()) == messages[: sum(end <= size for end in ends)]
    # What a power cut may leave: zeros, or a length that no memory would hold.
    for tail in (bytes(4096), struct.pack("<QI", 2**60, 1) + b"x"):
        file.write_bytes(whole + tail)
        assert list(journal.read()) == messages
    damaged = bytearray(whole)
    damaged[ends[0] + 15] ^= 1
    file.write_bytes(damaged)
    assert list(journal.read()) == messages[:1]


def test_a_disk_that_fills_up_leaves_the_journal_whole(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal")
    journal.append(b"whole")
    write, calls = os.write, []

    def full(fd, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(fd, data[:3])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match="No space left"):
            journal.append(b"lost")
    journal.append(b"after")
    assert list(journal.read()) == [b"whole", b"after"]


def test_a_control_rate_makes_steps_last(counting, monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", slept.append)
    for rate in (10.0, None):
        driver = Driver(make_env(counting), rate=rate)
        step, takes = driver._step, iter((0.03, 0.25, 0.0, 0.0, 0.0))

        def slow(action, step=step, takes=takes):
            now[0] += next(takes)
            return step(action)

        driver._step = slow
        for _ in range(3):
            driver.step(np.zeros(2, np.int64))
        driver.replay_actions(np.zeros((2, 2), np.int64))
        driver.env.close()
    assert slept == pytest.approx([0.07, 0.0, 0.1])


# -- Acting and learning ----------------------------------------------------------------------------------------------


def test_actors_wait_for_a_learner_that_is_behind(counting, local):
    session = start(replace(counting, train_ratio=4.0, total_steps=100_000))
    n, a_block = session.counters, ROWS * 2 * 4 // 32  # in updates
    with session.changed:  # the learner pauses
        assert session.changed.wait_for(lambda: session.learns and n.updates + LEAD < session.updates_due(), 60)
    most, rows = session.updates_due(), n.actions
    assert most <= n.updates + LEAD + 1 + a_block
    run_until(session, lambda: n.actions > rows)
    assert n.updates + LEAD >= most > LEAD
    session.close()


def test_the_learner_does_not_wait_for_actors(counting, local, monkeypatch):
    go = threading.Event()
    answer = Local.answer

    def reluctant(self):
        if self.actor._rows > 100:
            go.wait()
        return answer(self)

    monkeypatch.setattr(Local, "answer", reluctant)
    session = start(replace(counting, train_ratio=0.1, total_steps=100_000))
    n = session.counters
    run_until(session, lambda: n.updates >= 50)
    assert session.updates_due() <= 1
    assert session.published.updates == n.updates
    go.set()
    session.close()


def test_a_run_ends_when_it_has_learned_what_it_saw(counting, local):
    counting = replace(counting, total_steps=300, train_ratio=8.0, log_every=100)
    result = DreamerAgent(counting).train(quiet=True)
    rows = [json.loads(line) for line in (result.run.path / "metrics.jsonl").read_text().splitlines()]
    assert result.steps >= 300
    assert rows[-1]["updates"] >= int((result.steps - counting.prefill) * 8 / 32)
    assert all(row["actor/weights_age"] >= 0 for row in rows if "actor/weights_age" in row)
    assert any(row.get("actor/updates_behind", -1) >= 0 for row in rows)
    assert result.report.exists() and len(result.evaluation.returns) == 3


@pytest.mark.parametrize("actors", [1, 3])
def test_nothing_is_lost_whoever_dies(counting, local, tmp_path, actors):
    """Actors and learners are killed at random moments: learners also in the middle of a record."""
    rng = random.Random(actors)
    config = replace(counting, actors=actors, prefill=10**9, total_steps=10**6)
    held = 0
    for life in range(4):
        config = replace(config, logdir=str(tmp_path / "run"))
        session = start(config, resume=life > 0)
        check(session)
        assert len(session.replay) >= held
        for _ in range(3):
            target = len(session.replay) + rng.randrange(1, 150)
            run_until(session, lambda: len(session.replay) >= target)  # noqa: B023
            session.workers[rng.randrange(actors)].dead = True
        check(session)
        if rng.random() < 0.6:
            session.save()
        if rng.random() < 0.5:  # a checkpoint that was begun
            with session.changed:
                session.journal.turn()
        target = len(session.replay) + rng.randrange(1, 100)
        run_until(session, lambda: len(session.replay) >= target)  # noqa: B023
        session.end()  # as a kill -9 does: nothing is saved
        held = len(session.replay)
        check(session)
        with open(max((tmp_path / "run" / "journal").iterdir()), "ab") as file:
            file.write(session.published.weights[: rng.randrange(40)])  # the record it was at
        session.close()
    assert any("died" in said for said in session.said)


def test_a_row_that_comes_twice_or_is_missing_is_refused(counting, local):
    session = start(replace(counting, prefill=10**9))
    run_until(session, lambda: session.lives[0][1] > 0)
    session.end()
    held = len(session.replay)
    actor = Actor(session.config.to_dict())
    message = actor.collect()
    actor.close()
    with pytest.raises(ActorError, match="gave row 0 of its life 0"):
        session.take(message)
    assert len(session.replay) == held
    session.close()


def test_latents_come_with_the_rows(counting, local):
    """And sequences go on from them, updates overwrite them, as in a synchronous run."""
    session = start(replace(counting, replay_context=1, total_steps=10**6))
    run_until(session, lambda: session.counters.updates >= 3)
    batch = session.replay.sample(64, 2)
    assert batch["deter"].abs().sum(-1).gt(0).float().mean() > 0.9
    session.close()


@pytest.mark.parametrize("env", ["Broken-v0", "Wrong-v0"])
def test_an_actor_that_cannot_go_on_ends_the_run(counting, local, env):
    config = replace(counting, prefill=10**9, total_steps=10**6, env=f"gym:counting_env:{env}")
    error, message = (EnvError, "nan") if env == "Wrong-v0" else (ActorError, "(?s)in a row.*Traceback.*the arm is not")
    with pytest.raises(error, match=message):
        DreamerAgent(config).train(quiet=True)


def test_an_actor_that_does_not_answer_is_told_of(counting, local, monkeypatch):
    """Once; the others go on, and it does when it wakes."""
    monkeypatch.setattr(parallel, "SILENCE", 0.05)
    wakes, answer = threading.Event(), Local.answer

    def answer_or_hang(self):
        if self.number == 1 and not wakes.is_set():
            wakes.wait()
        return answer(self)

    monkeypatch.setattr(Local, "answer", answer_or_hang)
    session = start(replace(counting, actors=2, total_steps=10**6, prefill=10**9))
    run_until(session, lambda: any("actor 1 has not answered" in x for x in session.said))
    rows = session.lives[0][1]
    run_until(session, lambda: session.lives[0][1] > rows + ROWS)
    assert sum("actor 1 has not answered for 0 s: it is still starting" in x for x in session.said) == 1
    assert not session.lives[1][1]
    wakes.set()
    run_until(session, lambda: session.lives[1][1])
    session.close()


def test_actors_are_stopped_together(counting, monkeypatch):
    """None of them waits until another has closed."""
    together = threading.Barrier(3, timeout=60)

    class Slow(Local):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.asked, self.closed = threading.Lock(), threading.Event()

        def answer(self):
            self.closed.wait()
            raise ActorDied("closed")

        def stop(self):
            if self.asked.acquire(blocking=False):
                together.wait()
                self.closed.set()

    monkeypatch.setitem(parallel.BACKENDS, "process", Slow)
    session = start(replace(counting, actors=3))
    run_until(session, lambda: len(session.workers) == 3)
    session.close()
    assert all(worker.closed.is_set() for worker in session.workers.values())


def test_a_parallel_run_stays_one(counting, local):
    config = replace(counting, total_steps=10**6)
    session = start(config)
    run_until(session, lambda: session.counters.steps > 0)
    session.save()
    session.close()
    with pytest.raises(CheckpointError, match=r"parallel=True, this configuration has False"):
        DreamerAgent(replace(config, parallel=False)).train(resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="its replay has num_envs 2, this configuration asks for 6"):
        DreamerAgent(replace(config, actors=3)).train(resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="actors=1 and num_envs=2, this configuration has 2 and 1"):
        DreamerAgent(replace(config, actors=2, num_envs=1)).train(resume=True, quiet=True)


@pytest.mark.parametrize("change", [dict(actors=2), dict(num_envs=3)], ids=str)
def test_a_journal_without_a_checkpoint_stays_one_too(counting, local, change):
    config = replace(counting, total_steps=10**6)
    session = start(replace(config, actors=3))
    run_until(session, lambda: all(rows for _, rows in session.lives))
    session.close()
    with pytest.raises(CheckpointError, match=r"journal has rows of actor .*: resume it as it was"):
        DreamerAgent(replace(config, **change)).train(resume=True, quiet=True)


def test_not_under_torchrun(counting, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"parallel: .*torchrun"):
        ParallelSession(DreamerAgent(counting))


# -- Real processes ---------------------------------------------------------------------------------------------------

LEARNER = """
import json, sys
from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.train.parallel import ParallelSession
take = ParallelSession.take
def take_and_tell(self, message):
    take(self, message)
    print(self.workers[0].pid, self.replay.total_added, flush=True)
ParallelSession.take = take_and_tell
DreamerAgent(DreamerConfig.from_dict(json.loads(sys.argv[1]))).train(quiet=True)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_learner_killed_9_is_resumed_and_its_actor_ends_by_itself(counting):
    config = replace(counting, checkpoint_every=0.5, total_steps=10**6)
    # Elsewhere: in the current folder there may be sources without the extension.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", LEARNER, json.dumps(config.to_dict())], text=True,
                               stdout=subprocess.PIPE, env=environment, cwd=Path(config.logdir).parent)  # fmt: skip
    rng = random.Random()
    for line in process.stdout:
        pid, taken = map(int, line.split())
        if taken >= 150 and rng.random() < 0.1:
            break
    process.kill()
    for line in process.stdout:  # what it had said by then
        taken = int(line.split()[1]) if line.endswith("\n") else taken
    process.wait()
    session = start(config, resume=True)
    assert session.replay.total_added >= taken
    check(session)
    run_until(session, lambda: session.replay.total_added >= taken + 50)
    session.end()
    check(session)
    session.close()
    deadline = time.monotonic() + 240
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_actor_killed_9_is_started_again_and_ctrl_c_stops_and_saves(counting, monkeypatch):
    counting = replace(counting, total_steps=10**6)
    session = None
    init, step, killed = ParallelSession.__init__, ParallelSession.step, []
    rng = random.Random()

    def remember(self, agent):
        nonlocal session
        session = self
        init(self, agent)

    def step_and_kill(self):
        step(self)
        life, rows = self.lives[0]
        if len(killed) == life and rows > 40 and rng.random() < 0.1:
            killed.append(self.workers[0].pid)
            os.kill(*[(killed[0], signal.SIGKILL), (os.getpid(), signal.SIGINT)][life])

    monkeypatch.setattr(ParallelSession, "__init__", remember)
    monkeypatch.setattr(ParallelSession, "step", step_and_kill)
    previous = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell has us in the background
    try:
        result = DreamerAgent(counting).train(quiet=True)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert result.signal == signal.SIGINT and len(set(killed)) == 2 and gone(killed[0]) and gone(killed[1])
    check(session)
    saved = Replay.load(checkpoint.load(checkpoint.latest(result.run)).replay_path)
    assert episodes(saved) == episodes(session.replay) and len(saved) == len(session.replay)


def test_ray_actors(counting):
    ray = pytest.importorskip("ray")
    # Its workers do not know the path of this process.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=environment)
    try:
        session = start(replace(counting, actor_backend="ray", total_steps=10**6))
        run_until(session, lambda: session.lives[0][1] > 60)
        ray.kill(session.workers[0]._actor)
        run_until(session, lambda: session.lives[0] > [1, 60])
        session.end()
        check(session)
        session.save()
        held = len(session.replay)
        session.close()
        session = start(replace(counting, actor_backend="ray", total_steps=10**6), resume=True)
        run_until(session, lambda: len(session.replay) > held)
        session.end()
        check(session)
        session.close()
    finally:
        ray.shutdown()


def test_ray_is_an_extra(counting, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"phyxdream\[ray\]"):
        ParallelSession(DreamerAgent(replace(counting, actor_backend="ray")))
