"""The training loop: act, store, learn; log, checkpoint, evaluate, report; stop and resume without losing a step.

Several processes (`phyxdream.distributed`) take these steps together. Whatever decides what happens next, counters
above all, is summed or agreed on first, so that it is the same in all of them. Process 0 logs, evaluates and reports.
"""

from __future__ import annotations

import datetime
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phyxdream import distributed
from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.agents.dreamer import Carry
from phyxdream.errors import CheckpointError, ConfigError
from phyxdream.nn.rssm import State
from phyxdream.replay import Curious, Loader, Prioritized, Recency, Replay, Uniform
from phyxdream.train import checkpoint
from phyxdream.train.driver import RESTART_SEED_STRIDE, Driver, Episode, make_env
from phyxdream.train.evaluate import Evaluation, evaluate
from phyxdream.train.memory import keep_freed_memory
from phyxdream.train.metrics import Metrics
from phyxdream.train.progress import Progress
from phyxdream.train.report import write_report
from phyxdream.train.report_slots import slot_panels
from phyxdream.train.run import Run
from phyxdream.train.video import open_loop_video

EVAL_SEED_OFFSET = 1_000_000
SELECTORS = {"uniform": Uniform(), "recency": Recency(), "prioritized": Prioritized(), "curious": Curious()}


@dataclass
class TrainResult:
    """What `train` leaves behind. `evaluation` and `report` are None when the run was interrupted."""

    run: Run
    steps: int
    evaluation: Evaluation | None = None
    report: Path | None = None
    signal: int | None = None


@dataclass
class Window:
    """Sums since the last row of metrics. Part of the checkpoint, so that a resumed run logs the same rows."""

    sums: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rows: int = 0
    row_sums: dict[str, float] = field(default_factory=dict)

    def add_update(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Take in an update's metrics, means over all processes; returns them as numbers, brought over in one
        transfer."""
        values = dict(zip(metrics, distributed.mean(torch.stack(list(metrics.values()))).tolist(), strict=True))
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.updates += 1
        return values

    def add_episodes(self, episodes: list[Episode]) -> None:
        self.returns += [e.episode_return for e in episodes]
        self.lengths += [e.length for e in episodes]

    def add_rows(self, count: int, sums: dict[str, float]) -> None:
        """Take in what is known of so many rows, summed over them."""
        for name, value in sums.items():
            self.row_sums[name] = self.row_sums.get(name, 0.0) + value
        self.rows += count

    def means(self) -> dict[str, float]:
        values = {name: total / self.updates for name, total in self.sums.items()}
        values |= {name: total / self.rows for name, total in self.row_sums.items()}
        if self.returns:
            values |= {"episode/return": float(np.mean(self.returns)), "episode/length": float(np.mean(self.lengths)),
                       "episode/count": len(self.returns)}  # fmt: skip
        return values


@dataclass
class Counters:
    """Where a run is: environment steps, actions taken, gradient updates, episodes, and the next steps to log and
    evaluate at. Steps, actions and episodes are those of all processes together."""

    steps: int = 0
    actions: int = 0
    updates: int = 0
    episodes: int = 0
    next_log: int = 0
    next_eval: int = 0
    restarts: int = 0


class Learning:
    """One run in progress, whoever acts in it: agent, replay, counters, and how they are saved and read.

    Args:
        agent: learns.
        num_envs: environments whose steps the replay keeps.
    """

    def __init__(self, agent: DreamerAgent, num_envs: int):
        c = self.config = agent.config
        self.agent = agent
        self.run: Run | None = None
        self.counters = Counters(next_log=c.log_every, next_eval=c.eval_every)
        self.window = Window()
        self.seed = distributed.own_seed(c.seed)
        self.replay = Replay(agent.replay_spec, c.replay_capacity, num_envs, self.seed, latents=agent.latent_spec,
                             selector=SELECTORS[c.replay_selector])  # fmt: skip
        self.loader = self._make_loader()

    def close(self) -> None:
        self.loader.close()
        self.replay.close()

    def _make_loader(self) -> Loader:
        c, device = self.config, self.agent.device
        prefetch = c.replay_prefetch
        if prefetch is None:
            prefetch = 2 if device.type == "cuda" else 0
        return self.replay.loader(
            c.batch_size, c.batch_length, context=c.replay_context, prefetch=prefetch, device=device,
            online=c.replay_online, force_is_first=not c.replay_context,
        )  # fmt: skip

    def _save(self, acting: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint of this very moment, with tensors and JSON of whoever acts; `CheckpointError` leaves the
        last one untouched."""
        tensors = self.agent.tensors()
        if not distributed.is_first():  # the same in all processes but for the random numbers
            tensors = {"generators": tensors["generators"]}
        tensors["acting"] = acting
        state = {"counters": asdict(self.counters), "window": asdict(self.window), **state}
        return checkpoint.save(self.run, self.counters.steps, tensors, state, self.replay)

    def _read(self, path: Path) -> checkpoint.Checkpoint:
        """Go on from a checkpoint in all but acting."""
        wrote, now = checkpoint.world_size(path), distributed.world_size()
        if wrote != now:
            how = f"start {wrote} processes with torchrun" if wrote > 1 else "start it without torchrun"
            raise CheckpointError(f"{path} was written by {_processes(wrote)}, each with environments and a replay of "
                                  f"its own, and {_processes(now)} cannot go on with it: {how}")  # fmt: skip
        found = checkpoint.load(path, distributed.rank())
        if found.replay_path is None:
            raise CheckpointError(f"{path}: it holds no replay to go on with")
        if (parallel := "actors" in found.state) != self.config.parallel:
            raise CheckpointError(f"{path} was written by a run with parallel={parallel}, this configuration has "
                                  f"{self.config.parallel}: resume it as it was")  # fmt: skip
        replay = Replay.load(found.replay_path)
        for name in ("spec", "latents", "num_envs", "selector"):
            stored, own = getattr(replay, name), getattr(self.replay, name)
            if stored != own:
                raise CheckpointError(f"{path}: its replay has {name} {stored}, this configuration asks for {own}")
        self.agent.load_tensors(found.tensors)
        self.loader.close()
        self.replay.close()
        self.replay = replay
        self.loader = self._make_loader()
        self.counters, self.window = Counters(**found.state["counters"]), Window(**found.state["window"])
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # What depends on who acts.

    def save(self) -> Path:
        """Write a checkpoint of this very moment; `CheckpointError` leaves the last one untouched."""
        raise NotImplementedError

    def restore(self, path: Path) -> str:
        """Go on from a checkpoint; returns a sentence on how the environments were brought back."""
        raise NotImplementedError

    def begin(self, say: Callable[[str], None]) -> None:
        """Called once before the first step; `say` shows the user a sentence."""

    def step(self) -> None:
        """Some acting, or learning, or both."""
        raise NotImplementedError

    def end(self) -> None:
        """Called after the last step, if no error came between."""

    @property
    def done(self) -> bool:
        """Whether the run is at its end."""
        return self.counters.steps >= self.config.total_steps

    # -----------------------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """One gradient step on the next batch; what it found out about the replayed steps goes back to the replay."""
        c = self.config
        batch = next(self.loader)
        update = self.agent.update(batch)
        values = self.window.add_update(update.metrics)
        if not math.isfinite(values["loss/total"]):
            raise FloatingPointError(
                f"the loss became {values['loss/total']} at update {self.counters.updates}: "
                + ", ".join(f"{k} {v:.3g}" for k, v in values.items() if k.startswith("loss/"))
            )
        step_id = batch["step_id"][c.replay_context :]
        if update.latents:
            self.replay.update(step_id, **update.latents)
        if isinstance(self.replay.selector, (Prioritized, Curious)):
            self.replay.prioritize(step_id, update.model_loss)

    def updates_due(self) -> int:
        c = self.config
        replayed = distributed.world_size() * c.batch_size * c.batch_length
        return int(max(0, self.counters.actions - c.prefill) * c.train_ratio / replayed)

    def log(self, metrics: Metrics | None) -> None:
        """One row: means over the window."""
        n = self.counters
        if metrics is not None:
            metrics.log(n.steps, self.window.means(), updates=n.updates, episodes=n.episodes)
        n.next_log += self.config.log_every * max(1, (n.steps - n.next_log) // self.config.log_every + 1)
        self.window = Window()

    def evaluate(self, metrics: Metrics | None) -> Evaluation:
        """Evaluate now and note the result in the run."""
        return distributed.on_first(lambda: self._evaluate(metrics.elapsed))

    def _evaluate(self, elapsed: float) -> Evaluation:
        c = self.config
        seed, step = c.seed + EVAL_SEED_OFFSET, self.counters.steps  # actors beside this process may go on
        result = evaluate(self.agent, c.eval_episodes, seed)
        self.run.add_evaluation({"step": step, "returns": result.returns, "lengths": result.lengths,
                                 "time": elapsed, "seed": seed})  # fmt: skip
        return result


class Session(Learning):
    """A run that acts and learns by turns: one action everywhere, then the updates that the train ratio allows."""

    def __init__(self, agent: DreamerAgent):
        super().__init__(agent, agent.config.num_envs)
        self.carry: Carry | None = None
        self.driver = self._make_driver(self.seed)

    def close(self) -> None:
        super().close()
        self.driver.env.close()

    def _make_driver(self, seed: int) -> Driver:
        c = self.config
        return Driver(make_env(c, seed=seed), budget=c.resume_replay_seconds, rate=c.control_rate)

    def save(self) -> Path:
        acting = _pack_carry(self.carry)
        actions = self.driver.actions
        if actions is not None:
            acting["env_actions"] = torch.from_numpy(_narrow(actions))
        return self._save(acting, {"env_seconds": max(distributed.gather_objects(self.driver.seconds))})

    def restore(self, path: Path) -> str:
        found = distributed.together(lambda: self._read(path))
        acting, env_seconds = dict(found.tensors["acting"]), found.state["env_seconds"]
        actions = acting.pop("env_actions", None)
        self.carry = _unpack_carry(acting, self.agent.device)
        exactly = actions is not None and env_seconds <= self.config.resume_replay_seconds
        if all(distributed.gather_objects(exactly)):
            if self.counters.restarts:
                self._restart_envs()
            self.driver.replay_actions(actions.numpy())
            return f"environments brought back exactly by replaying {len(actions)} steps"
        # New episodes under a new seed. The recurrent state is reset by is_first, and sampling takes the last step
        # before it for the end of the episode that was left.
        self.counters.restarts += 1
        self._restart_envs()
        return f"environments start new episodes (replaying {env_seconds:.0f} s of steps exceeds resume_replay_seconds)"

    def _restart_envs(self) -> None:
        self.driver.env.close()
        self.driver = self._make_driver(self.seed + RESTART_SEED_STRIDE * self.counters.restarts)

    def step(self) -> None:
        """One action everywhere, and the updates that the train ratio then allows."""
        c, n, row = self.config, self.counters, self.driver.row
        action, self.carry = self.agent.act(row, row["is_first"], self.carry)
        # A step enters the replay once the state after it is known; the newest one waits in the driver.
        self.replay.add(row | self.agent.latents(self.carry))
        acted, finished = self.driver.step(action)
        ready = self.replay.ready(c.batch_size, c.batch_length + c.replay_context)
        acted, finished, ready = self._everywhere(acted, finished, ready)
        n.actions += acted
        n.steps += acted * c.action_repeat
        n.episodes += len(finished)
        self.window.add_episodes(finished)
        while ready and n.updates < self.updates_due():
            self.update()
            n.updates += 1

    def _everywhere(self, acted: int, finished: list[Episode], ready: bool) -> tuple[int, list[Episode], bool]:
        """The actions and finished episodes of all processes, and whether all of their replays are ready."""
        if distributed.world_size() == 1:
            return acted, finished, ready
        row = torch.zeros(self.config.num_envs + 1, 2, dtype=torch.float64)  # of one size, whatever has happened
        row[0, 0], row[0, 1] = acted, ready
        for i, episode in enumerate(finished, 1):
            row[i, 0], row[i, 1] = episode.episode_return, episode.length
        rows = distributed.gather(row)
        episodes = [Episode(r, int(length)) for r, length in rows[:, 1:].flatten(0, 1).tolist() if length]
        return int(rows[:, 0, 0].sum()), episodes, bool(rows[:, 0, 1].all())


def train(agent: DreamerAgent, resume: bool = False, quiet: bool = False) -> TrainResult:
    """Train `agent` to `config.total_steps` in its run directory.

    Ctrl-C and SIGTERM finish the step at hand, write a checkpoint and return; a second Ctrl-C raises at once. Where
    torchrun started several processes, all must call this, with the same configuration.

    Raises:
        ConfigError: the run directory cannot be used; CheckpointError: nothing to resume from, or a checkpoint could
        not be read or written; EnvError: an environment broke its contract; DistributedError: another process has
        failed. The last checkpoint stays valid.
    """
    keep_freed_memory()
    distributed.join(agent.device)
    _agree(agent)
    session = _session(agent)  # before all else: an environment that cannot be made leaves no run directory behind
    try:
        return _train(session, resume, quiet)
    finally:
        session.close()


def _session(agent: DreamerAgent) -> Learning:
    if not agent.config.parallel:
        return Session(agent)
    from phyxdream.train.parallel import ParallelSession

    return ParallelSession(agent)


def _agree(agent: DreamerAgent) -> None:
    """All processes must do the same with the same weights; they take those of process 0."""
    own = agent.config.to_dict()
    for rank, other in enumerate(distributed.gather_objects(own)):
        if names := [name for name in own if own[name] != other[name]]:
            name = names[0]
            raise ConfigError(f"{name}: expected the same in all processes that learn together, got {own[name]!r} in "
                              f"process {distributed.rank()} and {other[name]!r} in process {rank}")  # fmt: skip
    distributed.take_from_first(agent.model.state_dict().values())


def _train(session: Learning, resume: bool, quiet: bool) -> TrainResult:
    c, first = session.config, distributed.is_first()
    logdir = c.logdir or default_logdir(c)
    run = session.run = distributed.on_first(lambda: Run.create(logdir, c.to_dict(), resume=resume))
    distributed.together(lambda: _require_shared(run))
    with Metrics(run) if first else nullcontext() as metrics, catch_signals() as received:
        newest = checkpoint.latest(run) if resume else None
        note = ""
        if newest is not None:
            note = session.restore(newest)
        elif resume:
            note = "no checkpoint was written yet: starting from the beginning"
        n = session.counters
        if resume and first:
            metrics.truncate_after(n.steps)
            run.drop_evaluations_after(n.steps)
        title = f"train {c.preset} on {c.env_id}"
        with Progress(c.total_steps, step=n.steps, elapsed=metrics.elapsed if first else 0.0, title=title,
                      mode="auto" if first and not quiet else "silent") as progress:  # fmt: skip
            progress.print(f"run directory: {run.path}")
            if (together := distributed.world_size()) > 1:
                graph = ", without cuda_graph" if session.agent.device.type == "cuda" and c.cuda_graph else ""
                progress.print(f"{together} processes learn together{graph}")
            if note:
                progress.print(f"resumed at step {n.steps}: {note}")
            session.begin(progress.print)
            stop = _loop(session, metrics, progress, received)
            session.end()
            if stop:
                path = session.save()
                name = signal.Signals(stop).name
                progress.print(f"stopped by {name} at step {n.steps}; saved {path}")
                start = f"torchrun --nproc-per-node {together} -m " if together > 1 else ""
                progress.print(f"continue with: {start}phyxdream train --resume --logdir {run.path}")
                return TrainResult(run, n.steps, signal=stop)
            if session.window.updates or session.window.returns:
                session.log(metrics)
            session.save()
            result = session.evaluate(metrics)
            report = distributed.on_first(lambda: _report(session))
        return TrainResult(run, n.steps, result, report)


def _require_shared(run: Run) -> None:
    if not run.path.is_dir():
        raise ConfigError(f"process {distributed.rank()} does not see {run.path}: processes on several machines need a "
                          "--logdir on a file system that all of them share")  # fmt: skip


def _report(session: Learning) -> Path:
    video, panels = open_loop_video(session.agent, session.replay), slot_panels(session.agent)
    return write_report(session.run, video=video, extra_panels=panels)


def _loop(session: Learning, metrics: Metrics | None, progress: Progress, received: list[int]) -> int:
    """Train to the end or to a signal, whose number is returned."""
    c, n = session.config, session.counters
    saved = time.monotonic()
    stop, _ = _asked(received)
    while not session.done and not stop:
        session.step()
        if session.window.returns:
            progress.update(n.steps, updates=n.updates, return_=float(np.mean(session.window.returns[-100:])))
        elif session.window.updates:
            loss = session.window.sums["loss/total"] / session.window.updates
            progress.update(n.steps, updates=n.updates, loss=loss)
        else:
            progress.update(n.steps, updates=n.updates)
        if n.steps >= n.next_log:
            session.log(metrics)
        if c.eval_every and n.steps >= n.next_eval:
            result = session.evaluate(metrics)
            progress.print(f"step {n.steps}: evaluation return {result.mean:.3f} ± {result.std:.3f} "
                           f"over {len(result.returns)} episodes")  # fmt: skip
            n.next_eval += c.eval_every * ((n.steps - n.next_eval) // c.eval_every + 1)
        stop, save = _asked(received, time.monotonic() - saved >= c.checkpoint_every)
        if save:
            session.save()
            saved = time.monotonic()
    return stop


def _asked(received: list[int], save: bool = False) -> tuple[int, bool]:
    """The signal that any process has received, else 0, and whether it is time to save by the clock of process 0."""
    if distributed.world_size() == 1:
        return received[0] if received else 0, save
    asked = distributed.gather(torch.tensor([received[0] if received else 0, save]))
    return int(asked[:, 0].max()), bool(asked[0, 1])


def load_agent(run: Run) -> tuple[DreamerAgent, checkpoint.Checkpoint]:
    """The agent of a run as its newest checkpoint has it; the run may still be training."""
    agent = DreamerAgent(DreamerConfig.from_dict(run.config))
    found = checkpoint.load_latest(run)
    agent.load_tensors(found.tensors, weights_only=True)
    return agent, found


def default_logdir(config: DreamerConfig) -> str:
    """runs/<preset>-<env>-<date and time>"""
    name = config.env_id.split(":", 1)[1].replace("/", "-")
    return f"runs/{config.preset}-{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying from them; a second SIGINT interrupts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _narrow(actions: np.ndarray) -> np.ndarray:
    """Discrete actions in one byte each where they fit."""
    return actions.astype(np.uint8) if actions.dtype == np.int32 and actions.max(initial=0) < 256 else actions


def _pack_carry(carry: Carry | None) -> dict[str, Tensor]:
    if carry is None:
        return {}
    state = {f"state/{k}": v for k, v in vars(carry.state).items() if v is not None}
    return {**state, "action": carry.action}


def _unpack_carry(tensors: dict[str, Tensor], device: torch.device) -> Carry | None:
    if not tensors:
        return None
    tensors = {k: v.to(device) for k, v in tensors.items()}
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    return Carry(State(**state), tensors["action"])
