"""What the machine has: rendering tests are left out only where the system's own libraries are not there."""

import ctypes

import numpy as np
import pytest

from phyxdream.envs import opengl


@pytest.fixture(scope="session")
def gl():
    if not opengl.egl_works():
        pytest.skip("no system OpenGL (apt-get install libegl1 libgl1 libgl1-mesa-dri)")


@pytest.fixture(scope="session")
def qt():
    try:
        ctypes.CDLL("libQt5Core.so.5"), ctypes.CDLL("libQt5Gui.so.5")
    except OSError:
        pytest.skip("no system Qt 5 (apt-get install libqt5core5a libqt5gui5)")


@pytest.fixture
def rollout():
    """Reset, then step with actions drawn from a fixed seed; everything that came, as one list."""

    def play(env, steps, seed=7):
        env.action_space.seed(seed)
        observation, info = env.reset()
        out = [(observation, info)]
        for _ in range(steps):
            observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
            out.append(({**observation, "reward": reward, "terminated": terminated, "truncated": truncated}, info))
        env.close()
        return out

    return play


@pytest.fixture
def assert_same():
    def check(one, other):
        assert len(one) == len(other)
        for step, (a, b) in enumerate(zip(one, other, strict=True)):
            for mine, yours in zip(a, b, strict=True):
                assert mine.keys() == yours.keys()
                for key in mine:
                    np.testing.assert_array_equal(mine[key], yours[key], err_msg=f"{key} at step {step}")

    return check
