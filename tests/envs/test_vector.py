import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from phyxdream.envs import VectorEnv
from phyxdream.errors import EnvError


class Clock:
    """Counts steps; environment i ends after 2 + i steps: even ones terminate, odd ones are truncated."""

    observation_space = spaces.Dict(
        time=spaces.Box(0, np.inf, (), np.float64), picture=spaces.Box(0, 1, (5, 5), np.float32)
    )
    action_space = spaces.Discrete(2)

    def __init__(self, num_envs=3):
        self.num_envs = num_envs
        self.length = 2 + np.arange(num_envs)
        self.time = np.zeros(num_envs)
        self.picture = np.zeros((num_envs, 5, 5), np.float32)
        self.reward = np.ones(num_envs)
        self.seeds = []
        self.closed = 0

    def reset(self, seed):
        self.seeds.append(seed)
        self.time[:] = 0
        return {"time": self.time, "picture": self.picture}

    def step(self, actions):
        starting = self.time == self.length
        self.time[:] = np.where(starting, 0, self.time + 1)
        over = self.time == self.length
        odd = np.arange(self.num_envs) % 2 == 1
        reward = np.where(starting, 0, self.reward)
        return {"time": self.time, "picture": self.picture}, reward, over & ~odd, over & odd

    def close(self):
        self.closed += 1


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def env(clock):
    return VectorEnv(clock, "test:Clock", seed=11)


IDLE = np.zeros(3, int)


def test_flags_tell_the_replay_where_episodes_begin_and_end(env):
    _, info = env.reset()
    assert info["is_first"].all() and not info["is_last"].any() and not info["is_terminal"].any()
    log = [env.step(IDLE) for _ in range(6)]
    first = np.array([entry[4]["is_first"] for entry in log])
    last = np.array([entry[4]["is_last"] for entry in log])
    terminal = np.array([entry[4]["is_terminal"] for entry in log])
    time = np.array([entry[0]["time"][:, 0] for entry in log])
    for env_index in range(3):
        period = 3 + env_index  # length and the step that brings the first frame
        expected = (np.arange(1, 7) % period) == period - 1
        np.testing.assert_array_equal(last[:, env_index], expected)
        np.testing.assert_array_equal(first[:, env_index], np.arange(1, 7) % period == 0)
        np.testing.assert_array_equal(terminal[:, env_index], expected & (env_index % 2 == 0))
        np.testing.assert_array_equal(time[:, env_index], np.arange(1, 7) % period)
        np.testing.assert_array_equal([e[1][env_index] for e in log], ~first[:, env_index])
    for _, reward, terminated, truncated, info in log:
        assert reward.dtype == np.float32 and terminated.dtype == truncated.dtype == bool
        np.testing.assert_array_equal(terminated | truncated, info["is_last"])
        np.testing.assert_array_equal(terminated, info["is_terminal"])


def test_it_is_a_gymnasium_vector_env(env):
    assert isinstance(env, gymnasium.vector.VectorEnv)
    observation, _ = env.reset()
    assert observation in env.observation_space
    recorded = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    recorded.reset()
    infos = [recorded.step(recorded.action_space.sample())[4] for _ in range(2)]
    assert infos[-1]["episode"]["r"][0] == 2.0


def test_what_is_handed_out_is_the_receivers_own(env, clock):
    kept, kept_info = env.reset()
    env.step(IDLE)
    assert (kept["time"] == 0).all() and kept_info["is_first"].all()
    observation, _, terminated, _, info = env.step(IDLE)
    clock.time += 100
    terminated[:] = info["is_last"][:] = True
    assert observation["time"].max() == 2
    assert not env.step(IDLE)[4]["is_first"][1:].any()


def test_seeds(env, clock):
    env.reset()
    env.reset()
    env.reset(seed=5)
    env.reset()
    assert clock.seeds == [11, None, 5, None]
    with pytest.raises(EnvError, match="seed is -1"):
        env.reset(seed=-1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_reward_that_is_not_finite_is_reported_before_it_is_handed_out(env, clock, value):
    env.reset()
    env.step(IDLE)
    clock.reward[1] = value
    with pytest.raises(EnvError, match=r"test:Clock: reward of env 1 is (nan|inf) at step 2"):
        env.step(IDLE)
    clock.reward[1] = 1
    with pytest.raises(EnvError, match="reset"):
        env.step(IDLE)
    env.reset()
    env.step(IDLE)


def test_an_observation_that_is_not_finite_is_reported(env, clock):
    env.reset()
    clock.time[2] = np.nan
    with pytest.raises(EnvError, match=r"time of env 2 is nan at step 1"):
        env.step(IDLE)
    clock.picture[0, 3, 3] = np.inf
    with pytest.raises(EnvError, match=r"image of env 0 is inf at step 0"):
        env.reset()


def test_wrong_use_is_refused_and_harms_nothing(env, clock):
    with pytest.raises(EnvError, match="reset\\(\\) must come before step"):
        env.step(IDLE)
    env.reset()
    with pytest.raises(EnvError, match=r"test:Clock: actions have shape \(2,\)"):
        env.step(np.zeros(2, int))
    with pytest.raises(EnvError, match="options"):
        env.reset(options={"x": 1})
    assert env.step(IDLE)[0]["time"][0, 0] == 1


def test_close_twice_closes_once(env, clock):
    env.close()
    env.close()
    assert clock.closed == 1
    with pytest.raises(EnvError, match="closed"):
        env.reset()
