"""Between agent and environments: steps them, turns what comes back into replay steps, and remembers the actions."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from phyxdream import envs
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.dreamer import FLAGS
from phyxdream.envs import VectorEnv
from phyxdream.errors import EnvError

# What environments that are started again add to their seed each time.
RESTART_SEED_STRIDE = 10_007


def make_env(
    config: DreamerConfig, num_envs: int | None = None, seed: int | None = None, segmentation: bool = False
) -> VectorEnv:
    """The environments a configuration asks for; `segmentation` as for `envs.make`."""
    try:
        return envs.make(
            config.env_id,
            num_envs=num_envs or config.num_envs,
            seed=config.seed if seed is None else seed,
            action_repeat=config.action_repeat,
            time_limit=config.time_limit,
            image_size=config.image_size,
            pixels=config.pixels,
            segmentation=segmentation,
            **({} if config.camera is None else {"camera": config.camera}),
            **config.env_arguments,
        )
    except EnvError as error:
        if not config.env_options:
            raise
        given = " ".join(config.env_options)
        raise EnvError(f"{error} (env_options: {given}; `--env-options` alone is none of them)") from error


@dataclass
class Episode:
    """A finished episode: sum of rewards, and length in actions."""

    episode_return: float
    length: int


class Driver:
    """Steps vectorised environments and keeps, in `row`, the replay step each one is at, and in `info` what else came.

    The actions since the environments were made are kept too: environments cannot be saved, but the same seed and
    actions bring them back exactly (`replay_actions`). Recording ends after `budget` seconds of stepping, when
    bringing them back would take longer than a user wants to wait.

    With a `rate`, a step takes at least 1 / rate seconds, as on a robot, where an action has to be carried out before
    there is something new to see.
    """

    def __init__(self, env: VectorEnv, budget: float = 0.0, rate: float | None = None):
        self.env, self.budget = env, budget
        self.seconds = 0.0
        self._period = 1 / rate if rate else 0.0
        self.discrete = not env.single_action_space.shape
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._actions: list[np.ndarray] | None = []
        observation, self.info = env.reset()
        zeros = np.zeros((env.num_envs, *env.single_action_space.shape), np.int32 if self.discrete else np.float32)
        self.row = {**observation, "action": zeros, "reward": np.zeros(env.num_envs, np.float32)}
        self.row |= {name: self.info[name] for name in FLAGS}

    def step(self, action: np.ndarray) -> tuple[int, list[Episode]]:
        """Take one action (N,) or (N, A) everywhere; `row` is the new replay step.

        Returns how many environments acted (the others began a new episode and ignored their action), and the
        episodes that ended.
        """
        seen = time.monotonic() + self._period
        result = self._step(action)
        if self._period:
            time.sleep(max(0.0, seen - time.monotonic()))
        return result

    def _step(self, action: np.ndarray) -> tuple[int, list[Episode]]:
        start = time.perf_counter()
        observation, reward, _, _, self.info = self.env.step(action)
        self.seconds += time.perf_counter() - start
        action = action.astype(self.row["action"].dtype)
        if self._actions is not None:
            self._actions.append(action)
            if self.seconds > self.budget:
                self._actions = None
        first, last = self.info["is_first"], self.info["is_last"]
        led_here = np.where(first.reshape(-1, *[1] * (action.ndim - 1)), 0, action).astype(action.dtype)
        self.row = {**observation, "action": led_here, "reward": reward}
        self.row |= {name: self.info[name] for name in FLAGS}
        self._returns[first], self._lengths[first] = 0.0, 0
        self._returns += reward
        self._lengths += ~first
        finished = [Episode(float(self._returns[i]), int(self._lengths[i])) for i in np.flatnonzero(last)]
        return int((~first).sum()), finished

    @property
    def actions(self) -> np.ndarray | None:
        """Every action since the environments were made, (steps, N, ...), or None when there are too many."""
        if self._actions is None:
            return None
        dtype = self.row["action"].dtype
        return np.stack(self._actions) if self._actions else np.zeros((0, *self.row["action"].shape), dtype)

    def replay_actions(self, actions: np.ndarray) -> None:
        """Bring fresh environments to where the recorded actions had led them."""
        for action in actions:
            self._step(action.astype(np.int64) if self.discrete else action)
