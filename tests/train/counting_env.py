"""An environment that numbers its steps: the observation is the step's number in the episode and what the episode is
called, so that a replay can be searched for steps that are missing or there twice."""

import os

import gymnasium
import numpy as np
from gymnasium import spaces


class Counting(gymnasium.Env):
    observation_space = spaces.Box(0, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._name = list(os.urandom(6))  # whoever else runs, whatever the seed
        self._count, self._length = 0, int(self.np_random.integers(3, 12))
        return self._observation(), {}

    def step(self, action):
        self._count += 1
        over = self._count == self._length
        return self._observation(), float(self._count), over and self._length % 2 == 0, over, {}

    def _observation(self):
        first, second = (int.from_bytes(self._name[i : i + 3], "big") for i in (0, 3))  # a float32 holds 24 bits
        return np.array([self._count, first, second], np.float32)


class Broken(Counting):
    """Fails in its second episode, in a way of its environment's own or of ours."""

    def reset(self, **options):
        if hasattr(self, "_count"):
            raise OSError("the arm is not connected")
        return super().reset(**options)


class Wrong(Counting):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float("nan"), *rest


for kind in (Counting, Broken, Wrong):
    gymnasium.register(f"{kind.__name__}-v0", kind)
