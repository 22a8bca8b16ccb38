import gc

import gymnasium
import numpy as np
import pytest

from phyxdream import envs


@pytest.mark.parametrize("options", [{}, {"vectorization": "async"}], ids=["sync", "async"])
def test_same_seed_same_observations(rollout, assert_same, options):
    def play(seed):
        return rollout(envs.make("gym:Pendulum-v1", num_envs=2, seed=seed, time_limit=7, **options), 20)

    one, again, other = play(3), play(3), play(4)
    assert_same(one, again)
    assert not np.array_equal(one[0][0]["state"], other[0][0]["state"])
    starts = [o["state"] for o, info in one if info["is_first"].all()]
    assert len(starts) == 3 and not np.array_equal(starts[0], starts[1])


def test_against_gymnasium_itself():
    env = envs.make("gym:Pendulum-v1", num_envs=2, seed=5)
    plain = [gymnasium.make("Pendulum-v1") for _ in range(2)]
    observation, _ = env.reset()
    expected = [p.reset(seed=5 + i)[0] for i, p in enumerate(plain)]
    np.testing.assert_array_equal(observation["state"], expected)
    rng = np.random.default_rng(0)
    for step in range(200):
        action = rng.uniform(-1.5, 1.5, (2, 1)).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        expected = [p.step(2 * a.clip(-1, 1)) for p, a in zip(plain, action, strict=True)]
        np.testing.assert_allclose(observation["state"], [e[0] for e in expected], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(reward, [e[1] for e in expected], rtol=1e-5, atol=1e-5)
        assert not terminated.any() and (truncated == (step == 199)).all()
    _, reward, _, truncated, info = env.step(action)
    assert (reward == 0).all() and not truncated.any() and info["is_first"].all()
    env.close()


def test_action_repeat_sums_rewards_and_time_limit_counts_single_steps():
    repeated = envs.make("gym:Pendulum-v1", num_envs=1, seed=1, action_repeat=3, time_limit=7)
    single = envs.make("gym:Pendulum-v1", num_envs=1, seed=1)
    repeated.reset(), single.reset()
    action = np.full((1, 1), 0.3, np.float32)
    for steps in (3, 3, 1):
        observation, reward, _, truncated, info = repeated.step(action)
        parts = [single.step(action) for _ in range(steps)]
        np.testing.assert_array_equal(observation["state"], parts[-1][0]["state"])
        np.testing.assert_allclose(reward, sum(p[1] for p in parts), rtol=1e-6)
        assert truncated.all() == (steps == 1)
    assert info["is_last"].all() and not info["is_terminal"].any()
    assert repeated.step(action)[4]["is_first"].all()


def test_termination_is_terminal():
    env = envs.make("gym:CartPole-v1", num_envs=2, seed=0)
    env.reset()
    for _ in range(50):
        _, _, terminated, _, info = env.step(np.ones(2, int))
        if terminated.any():
            break
    np.testing.assert_array_equal(info["is_terminal"], terminated)
    assert terminated.any() and info["is_last"][terminated].all()


def test_rendered_pictures(gl):
    pytest.importorskip("mujoco")
    env = envs.make("gym:HalfCheetah-v5", num_envs=1, pixels=True, image_size=(32, 40))
    observation, _ = env.reset()
    assert {k: (v.shape, v.dtype.name) for k, v in observation.items()} == {"image": ((1, 3, 32, 40), "uint8")}
    assert np.ptp(observation["image"]) > 50
    env.close()
    with pytest.raises(envs.EnvError, match="camera is 44; expected a number from -1 to 0"):
        envs.make("gym:HalfCheetah-v5", num_envs=1, pixels=True, camera=44)


def test_pictures_do_not_depend_on_who_else_renders(gl):
    pytest.importorskip("mujoco")

    def pictures(disturb):
        env = envs.make("gym:HalfCheetah-v5", num_envs=1, seed=0, pixels=True, image_size=16)
        out = [env.reset()[0]["image"]]
        other = envs.make("gym:Reacher-v5", num_envs=1, seed=0, pixels=True, image_size=24) if disturb else None
        for step in range(3):
            if other and step == 0:
                other.reset()
            if other and step == 1:
                other.close()
                other = None
                gc.collect()
            out.append(env.step(np.full((1, 6), 0.5, np.float32))[0]["image"])
        env.close()
        return np.stack(out).astype(int)

    alone = pictures(False)
    assert np.ptp(alone[-1]) > 50
    # Software drivers round now this way, now that.
    assert np.abs(pictures(True) - alone).mean() < 3


def test_segmentation_of_mujoco(gl):
    pytest.importorskip("mujoco")
    env = envs.make("gym:HalfCheetah-v5", num_envs=2, pixels=True, image_size=(48, 64), segmentation=True)
    observation, info = env.reset()
    for _ in range(3):
        observation, _, _, _, info = env.step(env.action_space.sample())
    assert list(observation) == ["image"]
    mask = info["segmentation"]
    assert mask.shape == (2, 48, 64) and set(np.unique(mask)) == {0, 1}
    # The cheetah is brown, all else grey.
    brown = observation["image"][:, 0].astype(int) - observation["image"][:, 2]
    assert (brown[mask == 1] > 20).mean() > 0.7 > 0.1 > (brown[mask == 0] > 20).mean()
    env.close()
    with pytest.raises(envs.EnvError, match="segmentation is True, but gym:HalfCheetah-v5 draws no picture"):
        envs.make("gym:HalfCheetah-v5", num_envs=1, segmentation=True)
