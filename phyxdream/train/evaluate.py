"""Evaluation: episodes of the greedy policy in fresh environments, without touching the training run's state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.train.driver import Driver, make_env


@dataclass
class Evaluation:
    """Returns and lengths (in actions), one per episode."""

    returns: list[float]
    lengths: list[int]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))


def evaluate(
    agent: DreamerAgent, episodes: int, seed: int, progress: Callable[[int], None] | None = None, explore: bool = False
) -> Evaluation:
    """Run `episodes` episodes; `explore` acts as in training instead of taking the most likely action. `progress` is
    called with the number of episodes done."""
    generator, carry = torch.Generator(agent.device).manual_seed(seed), None

    def act(driver: Driver) -> np.ndarray:
        nonlocal carry
        action, carry = agent.act(driver.row, driver.row["is_first"], carry, explore, generator)
        return action

    return run_episodes(agent.config, episodes, seed, act, progress)


def run_episodes(
    config: DreamerConfig,
    episodes: int,
    seed: int,
    act: Callable[[Driver], np.ndarray],
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run `episodes` episodes with the actions (N, ...) that `act` returns at a driver's row.

    Every environment contributes the same number of episodes (the first of them one more), so short episodes are not
    over-represented.
    """
    num_envs = min(config.num_envs, episodes)
    quota = np.full(num_envs, episodes // num_envs) + (np.arange(num_envs) < episodes % num_envs)
    env = make_env(config, num_envs=num_envs, seed=seed)
    try:
        driver = Driver(env)
        results: list[list] = [[] for _ in range(num_envs)]
        done = 0
        while done < episodes:
            _, finished = driver.step(act(driver))
            for i, episode in zip(np.flatnonzero(driver.row["is_last"]), finished, strict=True):
                if len(results[i]) < quota[i]:
                    results[i].append(episode)
                    done += 1
            if finished and progress:
                progress(done)
    finally:
        env.close()
    flat = [episode for column in results for episode in column]
    return Evaluation([e.episode_return for e in flat], [e.length for e in flat])
