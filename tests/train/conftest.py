import pytest

from phyxdream.agents import DreamerConfig, preset


@pytest.fixture
def tiny(tmp_path) -> DreamerConfig:
    """A run of seconds: gymnasium's CartPole and a model of a few thousand weights."""
    return preset(
        "dreamer_v3", env="gym:CartPole-v1", num_envs=2, size="1m", deter_size=16, hidden_size=8, stoch_size=4,
        classes=4, units=8, depth=2, batch_size=4, batch_length=8, train_ratio=16.0, prefill=64, total_steps=400,
        replay_capacity=1_000, imagine_horizon=3, log_every=50, eval_episodes=3, learning_rate=1e-3,
        logdir=str(tmp_path / "run"),
    )  # fmt: skip
