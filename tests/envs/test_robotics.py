import importlib.metadata

import gymnasium
import numpy as np
import pytest

from phyxdream import envs
from phyxdream.errors import EnvError, MissingDependency

pytest.importorskip("gymnasium_robotics")
HAND = "robotics:HandManipulateBlockRotateZDense-v1"


def test_shadow_hand_state():
    env = envs.make(HAND, num_envs=1)
    observation, _ = env.reset()
    assert {k: v.shape[1:] for k, v in observation.items()} == {
        "achieved_goal": (7,),
        "desired_goal": (7,),
        "observation": (61,),
    }
    assert env.single_action_space.shape == (20,)
    env.step(env.action_space.sample())
    env.close()


def test_picture_beside_the_state(gl):
    env = envs.make(HAND, num_envs=1, pixels=True)
    observation, _ = env.reset()
    assert observation["image"].shape == (1, 3, 64, 64) and observation["observation"].shape == (1, 61)
    assert np.ptp(observation["image"]) > 50
    env.close()
    with pytest.raises(EnvError, match="camera is 3"):
        envs.make(HAND, num_envs=1, pixels=True, camera=3)


def test_touch_and_goal_beside_the_picture(gl):
    env = envs.make(
        "robotics:HandManipulateBlockRotateZ_BooleanTouchSensorsDense-v1", num_envs=1, pixels=True, segmentation=True
    )
    observation, _ = env.reset()
    shapes = {"achieved_goal": (7,), "desired_goal": (7,), "image": (3, 64, 64), "observation": (61 + 92,)}
    assert {key: value.shape[1:] for key, value in observation.items()} == shapes
    env.action_space.seed(0)
    touched = set()
    while touched != {0, 1}:  # the first contact may take some steps; a test that waits too long fails by its time
        observation, reward, _, _, info = env.step(env.action_space.sample())
        touched |= set(np.unique(observation["observation"][0, 61:]).tolist())
        assert touched <= {0, 1} and reward[0] < 0
    assert set(np.unique(info["segmentation"])) == {0, 1, 2, 3}  # sensors belong to the hand
    env.close()


def test_segmentation_of_hand_block_and_goal(gl):
    env = envs.make(HAND, num_envs=1, seed=1, pixels=True, image_size=96, segmentation=True)
    observation, info = env.reset()
    assert sorted(observation) == ["achieved_goal", "desired_goal", "image", "observation"]
    for _ in range(2):
        mask, image = info["segmentation"][0], observation["image"][0].astype(int)
        hand, block, goal = ((mask == number) for number in (1, 2, 3))
        assert hand.sum() > block.sum() > 20 and goal.sum() > 20
        grey = np.ptp(image, axis=0) < 25  # the hand is white and grey; the others are coloured, as is what is behind
        assert grey[hand].mean() > 0.8 > 0.5 > grey[block | goal].mean()
        assert grey[mask == 0].mean() < 0.1
        observation, _, _, _, info = env.step(env.action_space.sample())
    env.close()
    with pytest.raises(EnvError, match="only pictures"):
        envs.make(HAND, num_envs=1, segmentation=True)


def test_unknown_id():
    with pytest.raises(EnvError, match="did you mean 'HandManipulateBlockRotateZDense-v1'"):
        envs.make("robotics:HandManipulateBlockRotateZDens-v1")


def test_a_mujoco_that_does_not_fit_is_named_with_versions_that_do(monkeypatch):
    def make(*args, **kwargs):
        raise AssertionError

    versions = {"gymnasium-robotics": "1.4.2", "mujoco": "3.12.0"}
    monkeypatch.setattr(gymnasium, "make", make)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(
        MissingDependency, match=r"gymnasium-robotics 1\.4\.2 does not work with mujoco 3\.12\.0.*<3\.12"
    ):
        envs.make(HAND, num_envs=1)
