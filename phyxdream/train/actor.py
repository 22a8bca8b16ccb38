"""The acting side of a parallel run: an agent in its environments, in a process of its own or on another machine.

The learner (`phyxdream.train.parallel`) asks for rows, again and again, and hands over new weights with a question when
it has published some; so an actor has no state that would have to be saved, and ends when nobody asks any more. What
passes between them is safetensors: nothing is unpickled.

`python -c "... serve(fd)"` is such a process; under Ray, `Actor` is a Ray actor as it is.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from phyxdream import errors
from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.agents.dreamer import Carry
from phyxdream.distributed import SEED_STRIDE
from phyxdream.train.driver import RESTART_SEED_STRIDE, Driver, Episode, make_env

# A block is given away after so many rows, or after this many seconds.
ROWS, SECONDS = 16, 0.1
# How long an environment may take to close before its process ends anyway.
CLOSE_SECONDS = 10.0


@dataclass
class Block:
    """Rows that an actor gives away: K steps of its N environments.

    Attributes:
        actor, incarnation: which actor, and how often it was started before.
        first: the number of its first row, counted from 0 in each incarnation.
        updates: after how many of the learner's updates the weights that acted were published.
        ago: (K,) seconds before it was given away that each row was acted on.
        episodes: those that ended with one of these rows.
        rows: what `Replay.add` takes at each step, (K, N, ...).
    """

    actor: int
    incarnation: int
    first: int
    updates: int
    ago: Tensor
    episodes: list[Episode]
    rows: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.ago)

    def pack(self) -> bytes:
        """The block as one message."""
        numbers = torch.tensor([self.actor, self.incarnation, self.first, self.updates])
        ended = [[e.episode_return, e.length] for e in self.episodes]
        ended = torch.tensor(ended, dtype=torch.float64).reshape(-1, 2)
        own = {"numbers": numbers, "ago": self.ago, "episodes": ended}
        return save(own | {f"row/{name}": x for name, x in self.rows.items()})

    @classmethod
    def unpack(cls, message: bytes) -> Block:
        """The inverse of `pack`; a message that tells of a failure raises it.

        Raises:
            PhyxdreamError: as the actor raised it; ActorDied: any other exception ended the actor.
        """
        tensors = load(message)
        if "failure" in tensors:
            found = json.loads(bytes(tensors["failure"].tolist()))
            kind = getattr(errors, found["kind"], None)
            if isinstance(kind, type) and issubclass(kind, errors.PhyxdreamError):
                raise kind(found["text"])
            raise ActorDied(found["traceback"])
        episodes = [Episode(r, int(length)) for r, length in tensors["episodes"].tolist()]
        rows = {name.removeprefix("row/"): x for name, x in tensors.items() if name.startswith("row/")}
        return cls(*tensors["numbers"].tolist(), tensors["ago"], episodes, rows)


class ActorDied(Exception):
    """An actor is gone; the text says how, with the traceback where there is one."""


def pack_weights(weights: Mapping[str, Tensor], updates: int) -> bytes:
    """The weights of an agent's model, as they are after so many updates, for `Actor.collect`."""
    tensors = {f"weight/{name}": x.detach().cpu().contiguous() for name, x in weights.items()}
    return save(tensors | {"updates": torch.tensor(updates)})


class Actor:
    """Acts in environments of its own, and gives away in blocks what came of it.

    Nothing is made before the first `collect`, so that what cannot be made is told like any other failure.

    Args:
        config: of the run, as `DreamerConfig.to_dict` gives it.
        number: which of the run's actors it is.
        incarnation: how often it was started before.
    """

    def __init__(self, config: dict[str, Any], number: int = 0, incarnation: int = 0):
        self._number, self._incarnation = number, incarnation
        config = DreamerConfig.from_dict(config)
        seed = config.seed + SEED_STRIDE * number + RESTART_SEED_STRIDE * incarnation
        self._config = replace(config, seed=seed, device="cpu")
        self._driver: Driver | None = None
        self._carry: Carry | None = None
        self._ended: list[Episode] = []  # with the row that the driver holds
        self._rows = self._updates = 0

    def collect(self, weights: bytes | None = None) -> bytes:
        """Take over weights, if there are new ones, and act for a moment: a packed `Block`, or a failure."""
        try:
            if self._driver is None:
                self._start()
            if weights:
                tensors = load(weights)
                self._updates = int(tensors.pop("updates"))
                given = {name.removeprefix("weight/"): x for name, x in tensors.items()}
                self._agent.load_tensors({"model": given}, weights_only=True)
            return self._act().pack()
        except Exception as e:
            told = {"kind": type(e).__name__, "text": str(e), "traceback": traceback.format_exc()}
            return save({"failure": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)})

    def close(self) -> None:
        """Close the environments."""
        if self._driver is not None:
            self._driver.env.close()
            self._driver = None

    def _start(self) -> None:
        env = make_env(self._config)
        try:
            self._agent = DreamerAgent(self._config, env.single_observation_space, env.single_action_space)
            self._driver = Driver(env, rate=self._config.control_rate)
        except BaseException:
            env.close()
            raise

    def _act(self) -> Block:
        rows: list[dict[str, Any]] = []
        times: list[float] = []
        episodes: list[Episode] = []
        first, start, now = self._rows, time.monotonic(), 0.0
        while len(rows) < ROWS and now < start + SECONDS:
            row = self._driver.row
            action, self._carry = self._agent.act(row, row["is_first"], self._carry)
            rows.append(row | self._agent.latents(self._carry))
            episodes += self._ended
            times.append(time.monotonic())
            _, self._ended = self._driver.step(action)
            now = time.monotonic()
        self._rows += len(rows)
        stacked = {name: _stack([row[name] for row in rows]) for name in rows[0]}
        ago = now - torch.tensor(times, dtype=torch.float64)
        return Block(self._number, self._incarnation, first, self._updates, ago, episodes, stacked)


def _stack(values: list[Any]) -> Tensor:
    return torch.stack(values) if isinstance(values[0], Tensor) else torch.from_numpy(np.stack(values))


def serve(fd: int) -> None:
    """Be an actor for whoever holds the other end of the socket `fd`, until it is closed.

    The first message is the JSON of `Actor`'s arguments; every other one is a question, new weights or nothing.
    """
    torch.set_num_threads(1)  # the learner wants the cores
    connection = Connection(fd)
    questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def listen() -> None:
        # Always at the other end of the line: so that neither side waits to send while the other does, and so that a
        # learner that is gone is noticed whatever the environment is at.
        try:
            while True:
                questions.put(connection.recv_bytes())
        except (EOFError, OSError):
            questions.put(None)
        time.sleep(CLOSE_SECONDS)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    arguments = questions.get()
    if arguments is None:
        return
    actor = Actor(**json.loads(arguments))
    try:
        while (question := questions.get()) is not None:
            connection.send_bytes(actor.collect(question))
    except OSError:  # nobody wants this block any more
        pass
    finally:
        actor.close()
