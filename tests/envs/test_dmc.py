import importlib.metadata

import numpy as np
import pytest

from phyxdream import envs
from phyxdream.errors import EnvError, MissingDependency

pytest.importorskip("dm_control")


def test_state_and_determinism(rollout, assert_same):
    def play():
        return rollout(envs.make("dmc:cartpole_balance", num_envs=2, seed=3, time_limit=6), 15)

    one = play()
    assert_same(one, play())
    observation = one[0][0]
    assert {k: v.shape for k, v in observation.items()} == {"position": (2, 3), "velocity": (2, 2)}
    assert not np.array_equal(observation["position"][0], observation["position"][1])
    assert all(o["position"].dtype == np.float32 for o, _ in one)


def test_the_end_of_an_episode_is_no_termination():
    env = envs.make("dmc:cartpole_balance", num_envs=1, action_repeat=250)
    env.reset()
    flags = [env.step(np.zeros((1, 1), np.float32))[2:4] for _ in range(4)]
    assert [bool(truncated[0]) for _, truncated in flags] == [False, False, False, True]
    assert not any(terminated[0] for terminated, _ in flags)
    env.close()


def test_pictures(gl):
    env = envs.make("dmc:cartpole_balance", num_envs=1, pixels=True)
    observation, _ = env.reset()
    assert {k: v.shape for k, v in observation.items()} == {"image": (1, 3, 64, 64)}
    assert np.ptp(observation["image"]) > 50
    env.close()
    with pytest.raises(EnvError, match="camera_id=99"):
        envs.make("dmc:cartpole_balance", num_envs=1, pixels=True, camera=99)


def test_segmentation(gl):
    env = envs.make("dmc:manipulator_bring_ball", num_envs=1, seed=0, pixels=True, image_size=64, segmentation=True)
    observation, info = env.reset()
    assert list(observation) == ["image"]
    mask = info["segmentation"]
    assert mask.shape == (1, 64, 64) and mask.dtype == np.int32 and set(np.unique(mask)) == {0, 1, 2, 3}
    assert (mask == 1).sum() > (mask == 2).sum() > 0  # the arm; the ball and its goal
    assert env.step(env.action_space.sample())[4]["segmentation"].shape == mask.shape
    env.close()
    with pytest.raises(EnvError, match="only pictures"):
        envs.make("dmc:walker_walk", num_envs=1, segmentation=True)


def test_a_simulation_that_diverges_ends_its_episode():
    from phyxdream.envs.dmc import DMControl

    task = DMControl("cartpole", "balance", None, {})
    start, _ = task.reset(seed=0)
    task._env.physics.data.qpos[:] = np.nan
    with pytest.warns(UserWarning, match="diverged"):
        observation, reward, terminated, truncated, _ = task.step(np.zeros(1))
    np.testing.assert_array_equal(observation["position"], start["position"])
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert np.isfinite(task.reset()[0]["position"]).all()


def test_unknown_task():
    with pytest.raises(EnvError, match="did you mean 'walker_walk'"):
        envs.make("dmc:walker_wlk")
    with pytest.raises(EnvError, match="foo"):
        envs.make("dmc:walker_walk", foo=1)


def test_a_mujoco_that_does_not_fit_is_named_with_versions_that_do(monkeypatch):
    from dm_control import suite

    def load(*args, **kwargs):
        raise AttributeError("'MjModel' object has no attribute 'flex_vertedge'")

    monkeypatch.setattr(suite, "load", load)
    monkeypatch.setattr(importlib.metadata, "version", {"dm_control": "1.0.50", "mujoco": "4.0.0"}.__getitem__)
    with pytest.raises(MissingDependency, match=r"dm_control 1\.0\.50 does not work with mujoco 4\.0\.0.*mujoco>=3\.2"):
        envs.make("dmc:walker_walk")
