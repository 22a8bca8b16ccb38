"""DayDreamer: one set of hyperparameters for all tasks, all sensors at once, actor and learner side by side."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from phyxdream.agents import DayDreamer, DreamerAgent, preset
from phyxdream.agents.daydreamer import MovingDeviation, Symlog

SMALL = dict(
    batch_size=3, batch_length=6, units=16, deter_size=16, hidden_size=16, embed_size=16, imagine_horizon=4, depth=2,
    num_envs=2, prefill=40, replay_capacity=2_000, encoder_layers=1, decoder_layers=1, device="cpu",
)  # fmt: skip
KINDS = pytest.mark.parametrize("kind", ["Discrete", "Continuous"])
SENSORS = {"joints", "touch", "wrist", "front", "depth", "far"}


@pytest.fixture
def make(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def make(kind, *args, **options):
        return DreamerAgent(preset("daydreamer", env=f"gym:sensors_env:{kind}-v0", **{**SMALL, **options}), *args)

    return make


def batch_of(agent, T=6, B=3):
    g = torch.Generator().manual_seed(0)
    batch = {}
    for name, (shape, dtype) in agent.replay_spec.items():
        x = torch.rand(T, B, *shape, generator=g)
        scale = {"bool": 0, "int32": 2, "uint8": 255}.get(dtype, 1)
        batch[name] = (scale * x).to(getattr(torch, dtype))
    batch["is_first"][0] = True
    return batch


def test_a_moving_deviation_by_hand():
    """Rate ½. First 1, 3: mean 2, mean square 5, deviation 1. Then 0, 0, 0: half the weight is theirs, half of the rest
    the first ones', so that the means are 2/3 and 5/3: √(5/3 − 4/9) = √11/3."""
    deviation = MovingDeviation(0.5)
    assert deviation(torch.tensor([1.0, 3.0])).item() == pytest.approx(1.0)
    assert deviation(torch.zeros(3)).item() == pytest.approx(11**0.5 / 3)
    assert MovingDeviation()(torch.full((4,), 7.0)).item() > 0


def test_scalars_in_symlog_space_by_hand(make):
    """symlog(e² − 1) = 2: half of (0.5 − 2)². And e^0.5 − 1 is what 0.5 stands for."""
    found = Symlog(torch.tensor([0.5, -0.5]))
    assert found.mean.tolist() == pytest.approx([math.exp(0.5) - 1, 1 - math.exp(0.5)])
    assert found.loss(torch.tensor([math.exp(2) - 1, 0.0])).tolist() == pytest.approx([1.125, 0.125])
    model = make("Discrete").model
    feature = torch.zeros(4, model.world_model.rssm.feature_size)
    for head in (model.critic, model.slow_critic, model.world_model.reward):
        assert isinstance(head(feature), Symlog)


def test_one_set_of_hyperparameters(make):
    """Of the preset, and REINFORCE or the dynamics as the actions ask for it."""
    config = preset("daydreamer").resolve()
    assert (config.deter_size, config.stoch_size, config.classes) == (512, 32, 32)
    assert (config.batch_size, config.batch_length, config.discount) == (32, 32, 0.995)
    assert config.learning_rate == config.actor_learning_rate == config.critic_learning_rate == 1e-4
    assert config.parallel
    discrete, continuous = make("Discrete"), make("Continuous")
    assert isinstance(discrete.model, DayDreamer) and isinstance(continuous.model, DayDreamer)
    assert (discrete.model.mix, continuous.model.mix) == (1.0, 0.0)


@KINDS
def test_every_sensor_is_seen_and_predicted(make, kind):
    agent = make(kind)
    assert agent.shapes == {"joints": (7,), "touch": (5,), "wrist": (3, 16, 16), "front": (3, 12, 20),
                            "depth": (1, 16, 16), "far": (1, 16, 16)}  # fmt: skip
    model, batch = agent.model.world_model, batch_of(agent)
    embed = model.embed(batch)
    for name in SENSORS:
        other = batch[name].clone()
        other[2, 1] = other[2, 1].flip(-1)
        changed = (model.embed({**batch, name: other}) != embed).any(-1)
        assert changed[2, 1] and changed.sum() == 1, name
    metrics = agent.update(batch).metrics
    assert {f"loss/{name}" for name in SENSORS} <= metrics.keys()
    assert all(value.isfinite() for value in metrics.values())
    for name, p in [*model.encoder.named_parameters(), *model.decoder.named_parameters()]:
        assert p.grad is not None and p.grad.any(), name


@KINDS
def test_depth_as_floats(make, kind):
    """Spaces that are given directly may have pictures of floats in [0, 1]."""
    observation = spaces.Dict(
        joints=spaces.Box(-1, 1, (7,), np.float32),
        camera=spaces.Box(0, 255, (3, 16, 16), np.uint8),
        depth=spaces.Box(0, 1, (1, 16, 16), np.float32),
    )
    action = spaces.Discrete(3) if kind == "Discrete" else spaces.Box(-1, 1, (2,), np.float32)
    agent = make(kind, observation, action)
    assert agent.replay_spec["depth"] == ((1, 16, 16), "float32")
    batch = batch_of(agent)
    exact = agent.model.world_model.embed(batch)
    rounded = agent.model.world_model.embed({**batch, "depth": (batch["depth"] * 255).round().to(torch.uint8)})
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)
    assert not torch.equal(exact, rounded)
    assert agent.update(batch).metrics["loss/depth"].isfinite()
    row = {name: x[0].numpy() for name, x in batch.items()}
    chosen, _ = agent.act(row, row["is_first"])
    assert chosen.shape == ((3,) if kind == "Discrete" else (3, 2))


def test_trains_stops_and_resumes(make, in_two_halves, tmp_path):
    """By turns, to the last bit."""
    options = dict(total_steps=100, log_every=30, eval_episodes=1, train_ratio=4.0, parallel=False)
    in_two_halves(make("Discrete", logdir=str(tmp_path / "whole"), **options), at=60)


def test_an_actor_beside_its_learner(make, tmp_path):
    """The preset as it is: all sensors, a process of its own."""
    agent = make("Continuous", total_steps=120, log_every=30, eval_episodes=1, train_ratio=4.0, publish_every=0.1,
                 logdir=str(tmp_path / "run"))  # fmt: skip
    result = agent.train(quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.steps >= 120 and result.report.exists()
    assert rows[-1]["updates"] >= (result.steps - 40) * 4 // 18
    assert any(row.get("actor/weights_age", -1) >= 0 for row in rows)
