"""Frames a second of the environments, 8 at a time, acting at random.

envpool is also stepped on its own, so that the price of our face is seen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from phyxdream import envs
from phyxdream.bench.suite import Case, Rivals, Suite, Work

IDS = (
    "envpool:Catch-v0",
    "envpool:CartPole-v1",
    "envpool:CartpoleBalance-v1",
    "envpool:WalkerWalk-v1",
    "envpool:Pong-v5",
    "envpool:CoinrunEasy-v0",
    "envpool:HandManipulateBlockRotateZDense-v1",
    "gym:Pendulum-v1",
    "dmc:cartpole_balance",
)
ENVS = 8


def build(id: str, device: torch.device) -> Rivals:
    env = envs.make(id, num_envs=ENVS)
    env.reset()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(64)]
    runs = {"phyxdream": stepping(env.step, actions)}
    if id.startswith("envpool:"):
        bare = [env._act(action, env.num_envs) for action in actions]
        runs["envpool"] = stepping(env._backend._pool.step, bare)
    return Rivals(runs, Work(ENVS, "frames"), env.close)


def stepping(step: Callable[[Any], Any], actions: list[Any]) -> Callable[[], Any]:
    turn = itertools.cycle(actions)
    return lambda: step(next(turn))


SUITE = Suite(
    "envs",
    f"stepping {ENVS} environments with random actions",
    tuple(
        Case("step", id.split(":")[1], "", functools.partial(build, id), id,
             names=("envpool", "phyxdream") if id.startswith("envpool:") else ("phyxdream",))
        for id in IDS
    ),
)  # fmt: skip
