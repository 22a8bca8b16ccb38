"""Actor and learner in parallel, as DayDreamer runs them: actors act in processes of their own, or on other machines,
while this process learns; nobody waits for the other's turn.

    actor    asked for rows, acts for a moment with the newest weights it was given and answers with what it saw
    thread   one for each actor: asks, writes the answer to the journal, adds it to the replay, asks again
    learner  this process's main thread: once `prefill` actions are in, one update after the other; publishes its
             weights every `publish_every` seconds

The learner has no train ratio to keep, but `train_ratio` is the least: actors wait where they are more than `LEAD`
updates ahead of it, and a run ends when `total_steps` were taken and learned from at that ratio. So a parallel run
learns at least as much from every step as the synchronous one, and simulators that are faster than learning cannot
outrun it.

Nothing is lost or counted twice: a row is in the journal before it is in the replay, every one carries which life of
which actor it is from and its number in it, and a checkpoint takes replay, counters and the journal's place at one
moment. An actor that dies is started again, in new episodes; what it had not handed over never happened. A learner that
dies takes its actors with it, and finds what it had taken in checkpoint and journal.

Source: Wu et al., "DayDreamer: World Models for Physical Robot Learning", 2022.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from phyxdream import distributed
from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.errors import ActorError, CheckpointError, ConfigError, MissingDependency
from phyxdream.train.actor import CLOSE_SECONDS, Actor, ActorDied, Block, pack_weights
from phyxdream.train.journal import Journal
from phyxdream.train.loop import Learning

# Updates by which acting may be ahead of `train_ratio`: enough for an evaluation's or a checkpoint's pause of a robot.
LEAD = 16
# Questions an actor has at once: it acts on one while the answer to the other is taken.
QUESTIONS = 2
# How often an actor may die without having handed over a row before the run is given up.
DEATHS = 3
# Seconds without an answer after which the learner says so.
SILENCE = 60.0
# Published weights whose age is known.
_REMEMBERED = 256


class Worker(Protocol):
    """An actor, wherever it runs. Made by a backend of `BACKENDS` from a resolved config, the actor's number, and its
    incarnation; used by one thread, but for `stop`."""

    def ask(self, weights: bytes | None) -> None:
        """Ask for a block, with new weights or without; raises `ActorDied`."""

    def answer(self) -> bytes:
        """Wait for the answer to the oldest question; raises `ActorDied`."""

    def stop(self) -> None:
        """Let it go; whoever waits for its answer gets `ActorDied`. May be called from any thread, and again."""


class ProcessWorker:
    """An actor in a process of this machine."""

    def __init__(self, config: DreamerConfig, number: int, incarnation: int):
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        # The path as it is here, and whatever the current folder is: the same modules are to be found.
        code = f"import sys; sys.path[:] = {sys.path!r}; from phyxdream.train.actor import serve; "
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{code}serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the learner
            )
        except OSError as e:
            raise ActorDied(f"its process could not be started: {e}") from e
        finally:
            theirs.close()
        arguments = {"config": config.to_dict(), "number": number, "incarnation": incarnation}
        self.ask(json.dumps(arguments).encode())

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, weights: bytes | None) -> None:
        try:
            self._connection.send_bytes(weights or b"")
        except OSError:
            raise ActorDied(self._obituary()) from None

    def answer(self) -> bytes:
        try:
            while not self._connection.poll(1):
                if self._process.poll() is not None:  # a child that it left behind may hold the line open
                    raise EOFError
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise ActorDied(self._obituary()) from None

    def stop(self) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)  # unlike close, it wakes whoever waits
        try:
            self._process.wait(CLOSE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _obituary(self) -> str:
        self.stop()
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}"


class RayWorker:
    """An actor that Ray places, on this machine or another."""

    def __init__(self, config: DreamerConfig, number: int, incarnation: int):
        import ray

        self._ray = ray
        # One restart policy, ours, for all backends: a new life is a new incarnation.
        remote = ray.remote(Actor).options(num_cpus=1, max_restarts=0, max_task_retries=0)
        self._actor = remote.remote(config.to_dict(), number, incarnation)
        self._answers: collections.deque[Any] = collections.deque()

    def ask(self, weights: bytes | None) -> None:
        self._answers.append(self._actor.collect.remote(weights))

    def answer(self) -> bytes:
        try:
            return self._ray.get(self._answers.popleft())
        except self._ray.exceptions.RayError as e:
            raise ActorDied(str(e)) from None

    def stop(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.close.remote(), timeout=CLOSE_SECONDS)
        self._ray.kill(self._actor)


BACKENDS: dict[str, Callable[[DreamerConfig, int, int], Worker]] = {"process": ProcessWorker, "ray": RayWorker}


@dataclass
class Published:
    """Weights for actors: packed as they were after so many updates, and when that was."""

    weights: bytes
    updates: int
    time: float


class ParallelSession(Learning):
    """A run whose actors act while it learns.

    What is shared with the threads is read and changed under `changed`: counters but for the updates, the window, the
    journal, the replay's writing end.

    Raises:
        ConfigError: torchrun started this process, or this system has no POSIX processes; MissingDependency: Ray is
            asked for and not installed.
    """

    def __init__(self, agent: DreamerAgent):
        c = agent.config
        if distributed.world_size() > 1:
            raise ConfigError("parallel: expected False under torchrun, where every process acts and learns by turns, "
                              "got True; several actors are --actors N")  # fmt: skip
        if c.actor_backend == "process" and os.name != "posix":
            raise ConfigError("parallel: actor_backend 'process' runs on Linux and macOS only")
        if c.actor_backend == "ray":
            _join_ray()  # before signals are caught: it takes SIGTERM for itself
        super().__init__(agent, c.actors * c.num_envs)
        self.changed = threading.Condition(threading.RLock())
        self.lives = [[0, 0] for _ in range(c.actors)]
        """Of each actor, the incarnation of its newest row and how many rows that has given."""
        self.journal: Journal | None = None
        self.published: Published | None = None
        self.workers: dict[int, Worker] = {}
        self._waiting_since: dict[int, float] = {}
        self._silent: list[Worker] = []
        self._oldest_journal = 0
        self._threads: list[threading.Thread] = []
        self._published_at: dict[int, float] = {}
        self._error: BaseException | None = None
        self._ending = False
        self._say: Callable[[str], None] = lambda message: None
        self._torch_threads = torch.get_num_threads()

    def close(self) -> None:
        self.end()
        if self.journal is not None:
            self.journal.close()
        super().close()

    def save(self) -> Path:
        with self.changed:
            journal = self.journal.turn()
            path = self._save({}, {"journal": journal, "actors": self.lives, "num_envs": self.config.num_envs})
        self.journal.drop_before(journal)
        return path

    def restore(self, path: Path) -> str:
        found = self._read(path)
        stored, own = found.state, self.config
        if (len(stored["actors"]), stored["num_envs"]) != (own.actors, own.num_envs):
            raise CheckpointError(f"{path} was written by a run with actors={len(stored['actors'])} and "
                                  f"num_envs={stored['num_envs']}, this configuration has {own.actors} and "
                                  f"{own.num_envs}: resume it as it was")  # fmt: skip
        self._oldest_journal, self.lives = stored["journal"], stored["actors"]
        return "actors start new episodes"

    def begin(self, say: Callable[[str], None]) -> None:
        c, n = self.config, self.counters
        self._say = say
        self.journal = Journal(self.run.path / "journal", after=self._oldest_journal)
        before = n.steps
        for message in self.journal.read(self._oldest_journal):
            block = Block.unpack(message)
            self._check(block)
            self._add(block)
        if n.steps > before:
            say(f"{n.steps - before} steps taken since the last checkpoint were found in the journal")
        self.journal.turn()
        if c.actor_backend == "process" and self.agent.device.type == "cpu":
            # Each actor needs a core: two threads on one would wait for each other in every operation.
            torch.set_num_threads(max(1, min(self._torch_threads, _cores() - c.actors)))
        self.publish()
        for number in range(c.actors):
            thread = threading.Thread(target=self._follow, args=(number,), name=f"actor {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def end(self) -> None:
        with self.changed:
            self._ending = True
            self.changed.notify_all()
        workers = list(self.workers.values())
        with ThreadPoolExecutor(max(1, len(workers))) as pool:  # an environment that hangs keeps no other one waiting
            list(pool.map(lambda worker: worker.stop(), workers))
        for thread in self._threads:
            thread.join()
        self._threads = []
        torch.set_num_threads(self._torch_threads)

    @property
    def done(self) -> bool:
        n = self.counters
        return n.steps >= self.config.total_steps and not (self.learns and n.updates < self.updates_due())

    @property
    def learns(self) -> bool:
        """Whether the first fill is complete."""
        c = self.config
        return self.counters.actions >= c.prefill and self.replay.ready(c.batch_size, c.batch_length + c.replay_context)

    # -----------------------------------------------------------------------------------------------------------------
    # The learner.

    def step(self) -> None:
        """One update; or, before the first fill is complete, a moment's wait for more rows."""
        if self._error is not None:
            raise self._error
        self._tell_of_silence()
        if not self.learns:
            with self.changed:
                self.changed.wait(0.1)
            return
        self.update()
        with self.changed:
            self.counters.updates += 1
            self.changed.notify_all()
        if time.monotonic() - self.published.time >= self.config.publish_every:
            self.publish()

    def _tell_of_silence(self) -> None:
        """Say once in the life of an actor that it does not answer. It is not killed: nobody knows how long a step may
        take."""
        now = time.monotonic()
        for number, since in list(self._waiting_since.items()):
            if now - since > SILENCE and (worker := self.workers.get(number)) not in self._silent:
                self._silent.append(worker)
                where = f" (process {pid})" if (pid := getattr(worker, "pid", None)) else ""
                self._say(f"actor {number}{where} has not answered for {SILENCE:.0f} s: it is still starting, or its "
                          "environment hangs. Once killed, it is started again")  # fmt: skip

    def publish(self) -> None:
        """Give out the weights as they are: actors get them with their next question, all of them or none."""
        updates = self.counters.updates
        weights = pack_weights(self.agent.model.state_dict(), updates)
        self.published = Published(weights, updates, time.monotonic())
        self._published_at[updates] = self.published.time
        if len(self._published_at) > _REMEMBERED:
            del self._published_at[next(iter(self._published_at))]

    def log(self, metrics: Any) -> None:
        with self.changed:
            super().log(metrics)

    # -----------------------------------------------------------------------------------------------------------------
    # The threads.

    def _follow(self, number: int) -> None:
        """Keep actor `number` alive and take what it gives, until the run ends."""
        incarnation, rows = self.lives[number]
        deaths = 0
        try:
            while not self._ending and self._error is None:
                incarnation += bool(rows or deaths)
                try:
                    self._live(number, incarnation)
                except ActorDied as e:
                    if self._ending:
                        return
                    deaths = 1 if self.lives[number][0] == incarnation and self.lives[number][1] else deaths + 1
                    if deaths > DEATHS:
                        raise ActorError(f"actor {number} died {deaths} times in a row, the last ones before it gave "
                                         f"a row: {e}") from None  # fmt: skip
                    self._say(f"actor {number} died and is started again: {str(e).strip().splitlines()[-1]}")
        except BaseException as e:
            with self.changed:
                self._error = self._error or e
                self.changed.notify_all()

    def _live(self, number: int, incarnation: int) -> None:
        """One life of an actor; ends with `ActorDied`, or with the run."""
        worker = BACKENDS[self.config.actor_backend](self.config, number, incarnation)
        given = None
        with self.changed:
            self.workers[number] = worker
        try:
            for turn in range(sys.maxsize):
                if turn >= QUESTIONS:
                    self._waiting_since[number] = time.monotonic()
                    message = worker.answer()
                    self._waiting_since.pop(number, None)
                    if self._ending:
                        return
                    self.take(message)
                if not self._wait_for_turn():
                    return
                newest = self.published
                worker.ask(newest.weights if newest is not given else None)
                given = newest
        finally:
            self._waiting_since.pop(number, None)
            worker.stop()

    def _wait_for_turn(self) -> bool:
        """Wait while acting is too far ahead of learning; False when the run ends."""
        n = self.counters

        def may_act() -> bool:
            behind = self.learns and n.updates + LEAD < self.updates_due()
            return n.steps < self.config.total_steps and not behind

        with self.changed:
            self.changed.wait_for(lambda: self._ending or self._error is not None or may_act())
            return not self._ending and self._error is None

    def take(self, message: bytes) -> None:
        """Journal a block, add it to the replay, and count it."""
        block = Block.unpack(message)
        with self.changed:
            self._check(block)
            self.journal.append(message)
            self._add(block)
            if (published := self._published_at.get(block.updates)) is not None:
                age = time.monotonic() - published - block.ago
                behind = len(block) * (self.counters.updates - block.updates)
                self.window.add_rows(len(block), {"actor/weights_age": float(age.sum()),
                                                  "actor/updates_behind": float(behind)})  # fmt: skip
            self.changed.notify_all()

    def _check(self, block: Block) -> None:
        c, envs = self.config, block.rows["is_first"].shape[1]
        if block.actor >= c.actors or envs != c.num_envs:
            raise CheckpointError(f"{self.journal.path} has rows of actor {block.actor} with num_envs={envs}, this "
                                  f"configuration has {c.actors} of {c.num_envs}: resume it as it was")  # fmt: skip
        incarnation, rows = self.lives[block.actor]
        expected = rows if block.incarnation == incarnation else 0
        if block.incarnation < incarnation or block.first != expected:
            raise ActorError(f"actor {block.actor} gave row {block.first} of its life {block.incarnation}, expected "
                             f"row {rows} of life {incarnation} or row 0 of a later one")  # fmt: skip

    def _add(self, block: Block) -> None:
        c, n = self.config, self.counters
        env_ids = np.arange(c.num_envs) + block.actor * c.num_envs
        for k in range(len(block)):
            self.replay.add({name: x[k] for name, x in block.rows.items()}, env_ids)
        self.lives[block.actor] = [block.incarnation, block.first + len(block)]
        acted = int((~block.rows["is_first"]).sum())
        n.actions += acted
        n.steps += acted * c.action_repeat
        n.episodes += len(block.episodes)
        self.window.add_episodes(block.episodes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _join_ray() -> None:
    try:
        import ray
    except ImportError as e:
        raise MissingDependency("actor_backend 'ray' needs Ray: pip install 'phyxdream[ray]'") from e
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS, else one on this machine
