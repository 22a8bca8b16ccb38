"""A robot of sorts: joints, touch, two cameras of different sizes and two of depth, in a dict observation."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Sensors(gymnasium.Env):
    observation_space = spaces.Dict(
        joints=spaces.Box(-np.inf, np.inf, (7,), np.float64),
        touch=spaces.MultiBinary(5),
        wrist=spaces.Box(0, 255, (16, 16, 3), np.uint8),
        front=spaces.Box(0, 255, (12, 20, 3), np.uint8),
        depth=spaces.Box(0.0, 1.0, (16, 16), np.float32),
        far=spaces.Box(0, 255, (16, 16, 1), np.uint8),
    )

    def __init__(self, discrete):
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self._count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self._count += 1
        return self.observation_space.sample(), float(np.sum(action)), False, self._count == 20, {}


gymnasium.register("Discrete-v0", Sensors, kwargs=dict(discrete=True))
gymnasium.register("Continuous-v0", Sensors, kwargs=dict(discrete=False))
