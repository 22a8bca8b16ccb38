"""PlaNet, and planners in the place of actor and critic: losses by hand, seed episodes, whole agents."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phyxdream.agents import DreamerAgent, preset
from phyxdream.agents.learner import PlannerLearner
from phyxdream.agents.planet import WorldModelPlaNet
from phyxdream.errors import ConfigError
from phyxdream.nn.rssm import State

OBSERVATION = spaces.Dict(
    {"image": spaces.Box(0, 255, (3, 8, 8), np.uint8), "state": spaces.Box(-np.inf, np.inf, (3,), np.float32)}
)
ACTIONS = {"discrete": spaces.Discrete(3), "continuous": spaces.Box(-1, 1, (2,), np.float32)}
T, B = 6, 3
PLANS = dict(plan_horizon=3, plan_candidates=8, plan_iterations=2, plan_elites=2)
SMALL = dict(
    batch_size=B, batch_length=T, units=16, deter_size=16, hidden_size=16, embed_size=16, stoch_size=4, depth=2,
    depth_mults=(1,), num_envs=2, prefill=0, replay_capacity=2_000, encoder_layers=1, decoder_layers=1, device="cpu",
)  # fmt: skip


def make(name="planet", actions="continuous", **options):
    return DreamerAgent(preset(name, **{**SMALL, **PLANS, **options}), OBSERVATION, ACTIONS[actions])


def batch_of(agent, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = {
        "image": torch.randint(0, 256, (T, B, 3, 8, 8), generator=g, dtype=torch.uint8),
        "state": torch.randn(T, B, 3, generator=g),
        "reward": torch.randn(T, B, generator=g),
        **{name: torch.zeros(T, B, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")},
    }
    batch["is_first"][0] = batch["is_first"][3, 1] = batch["is_last"][2, 1] = True
    if agent.discrete:
        return batch | {"action": torch.randint(0, 3, (T, B), generator=g, dtype=torch.int32)}
    return batch | {"action": torch.rand(T, B, 2, generator=g) * 2 - 1}


def observe(n=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8),
        "state": rng.normal(size=(n, 3)).astype(np.float32),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Latent overshooting, on a line: h' = h + a, and p(z | h) = N(h, 1). KL(N(m, 1) ‖ N(h, 1)) = ½ (m − h)².


class Line(nn.Module):
    def imagine(self, action, state, generator=None):
        deter = state.deter + action.cumsum(0)
        return State(deter, deter, mean=deter, std=torch.ones_like(deter))


def on_a_line(distance, free_nats=0.0, length=T):
    config = preset("planet", **{**SMALL, "overshooting": distance, "free_nats": free_nats, "batch_length": length})
    model = WorldModelPlaNet(config.resolve(), {"state": (3,)}, 1)
    model.rssm = Line()
    return model


def walk(*means):
    """Posterior states (T, 1, 1) with h and mean as given, and actions of 1."""
    mean = torch.tensor(means, dtype=torch.float32).view(-1, 1, 1).requires_grad_()
    deter = mean.detach().clone().requires_grad_()
    return State(deter, deter, mean=mean, std=torch.ones_like(mean)), torch.ones(len(means), 1, 1)


def starts(*steps, length=4):
    is_first = torch.zeros(length, 1, dtype=torch.bool)
    is_first[list(steps)] = True
    return is_first


def test_overshooting_by_hand():
    """States 0, 1, 3, 4, and 2 and 3 steps ahead (D = 2). From 0: 2 expected where 3 came, 3 where 4 came, ½ + ½, the
    mean over D being ½. From 1: 3 where 4 came, ½, and the end: ¼. From 3 and 4 nothing is left to compare."""
    model, (post, action) = on_a_line(2), walk(0, 1, 3, 4)
    assert model.overshoot(post, action, starts(0)).flatten().tolist() == [0.5, 0.25, 0.0, 0.0]
    # Steps of 2: from 0 on 4 where 3 came, and 6 where 4 came; from 1 on 5 where 4 came.
    assert model.overshoot(post, 2 * action, starts(0)).flatten().tolist() == [(0.5 + 2) / 2, 0.25, 0.0, 0.0]


def test_overshooting_stays_within_episodes():
    model, (post, action) = on_a_line(2), walk(0, 1, 3, 4)
    # 4 is the first of another episode: what is left is 2 expected where 3 came.
    assert model.overshoot(post, action, starts(0, 3)).flatten().tolist() == [0.25, 0.0, 0.0, 0.0]
    assert model.overshoot(post, action, starts(0, 2)).flatten().tolist() == [0.0] * 4
    # The action that "led" there does not count, whatever it is; nor does that of the first step.
    action[3], action[0] = 100.0, 100.0
    assert model.overshoot(post, action, starts(0, 3)).flatten().tolist() == [0.25, 0.0, 0.0, 0.0]


def test_free_nats_of_overshooting():
    """3 nats in the place of ½ for each distance that there is."""
    model, (post, action) = on_a_line(2, free_nats=3.0), walk(0, 1, 3, 4)
    assert model.overshoot(post, action, starts(0)).flatten().tolist() == [3.0, 1.5, 0.0, 0.0]


def test_gradients_of_overshooting():
    """KL(sg q ‖ p): from h = 0, ½ ((3 − h − 2)² + (4 − h − 3)²) / 2 has the slope −1 at 0. The posterior that came
    stays as it is."""
    model, (post, action) = on_a_line(2), walk(0, 1, 3, 4)
    model.overshoot(post, action, starts(0))[0].sum().backward()
    assert post.deter.grad.flatten().tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert post.mean.grad is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=7, max_size=7), st.integers(1, 5), st.integers(0, 1000))
def test_overshooting_counts_every_pair_of_steps(first, distance, seed):
    g = torch.Generator().manual_seed(seed)
    post, action = walk(*torch.randn(7, generator=g).tolist())
    action = torch.randn(7, 1, 1, generator=g)
    found = on_a_line(distance, length=7).overshoot(post, action, torch.tensor(first).view(7, 1))
    h, a = post.deter.flatten().tolist(), action.flatten().tolist()
    for t in range(7):
        expected = sum(
            0.5 * (h[to] - h[t] - sum(a[t + 1 : to + 1])) ** 2
            for to in range(t + 2, min(7, t + distance + 2))
            if not any(first[t + 1 : to + 1])
        )
        assert found[t].item() == pytest.approx(expected / distance, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The other things of its own.


def test_free_nats_are_of_every_step():
    """KL(N(1, 1) ‖ N(0, 1)) is ½ a variable, KL(N(3, 1) ‖ N(0, 1)) 4½: with four, 2 and 18 nats."""
    model = WorldModelPlaNet(preset("planet", **SMALL).resolve(), {"state": (3,)}, 1)
    deter, mean, ones = torch.zeros(2, 3, 5), torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    mean[0] = 3.0
    post, prior = State(deter, mean, mean=mean, std=ones), State(deter, mean, mean=torch.zeros(2, 3, 4), std=ones)
    for half in model.kl(post, prior, 3.0):
        torch.testing.assert_close(half, torch.tensor([[18.0] * 3, [3.0] * 3]))


def test_pictures_of_five_bits():
    """Values 0 to 7 are the first of 32 bins, 248 to 255 the last."""
    model = make(image_bits=5).model.world_model
    image = torch.tensor([0, 7, 8, 128, 248, 255], dtype=torch.uint8).repeat(3, 32, 1).view(1, 3, 3, 8, 8)
    coarse = model.coarse({"image": image, "state": torch.zeros(1, 3, 3)}, torch.Generator().manual_seed(0))
    bins = (image // 8).float() / 32
    inside = coarse["image"] - bins
    assert inside.min() >= 0 and inside.max() < 1 / 32 and inside.std() > 0.25 / 32
    assert set((32 * coarse["image"]).floor().unique().tolist()) == {0.0, 1.0, 16.0, 31.0}
    again = model.coarse(coarse, torch.Generator().manual_seed(0))  # floats are left as they are
    assert torch.equal(again["image"], coarse["image"])
    batch = {"image": image}
    assert make(image_bits=8).model.world_model.coarse(batch, None) is batch


def test_rewards_count_ten_times():
    agent = make(reward_coeff=10.0, overshooting=2, overshooting_coeff=0.5)
    batch = batch_of(agent)
    loss = agent.model.loss(batch, torch.Generator().manual_seed(0))
    out = agent.model.world_model.loss(batch, torch.Generator().manual_seed(0))
    expected = 10 * out.losses["reward"] + out.losses["dynamics"] + out.losses["representation"]
    expected = expected + 0.5 * (out.losses["image"] + out.losses["state"]) + 0.5 * out.losses["overshooting"]
    torch.testing.assert_close(loss.model_loss, expected.detach())
    torch.testing.assert_close(loss.total, expected.mean())
    assert out.losses["overshooting"].shape == (T, B) and out.losses["overshooting"][-2:].eq(0).all()


@pytest.mark.parametrize("actions", ACTIONS)
def test_seed_episodes_are_random(actions):
    """Before the first update actions to learn from are uniform; then they are planned, with noise."""
    agent = make(actions=actions, exploration_noise=0.0)
    first = np.ones(600, bool)
    wide = observe(600)
    drawn, _ = agent.act(wide, first)
    if agent.discrete:
        np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 600, 1 / 3, atol=0.07)
    else:
        assert drawn.min() < -0.98 and drawn.max() > 0.98 and abs(drawn.mean()) < 0.06
        assert drawn.std() == pytest.approx(1 / np.sqrt(3), abs=0.04)
    agent.update(batch_of(agent))
    few, first = observe(3), np.ones(3, bool)

    def play(explore):
        return agent.act(few, first, None, explore, torch.Generator().manual_seed(1))[0]

    np.testing.assert_array_equal(play(True), play(False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.model.config, "exploration_noise", 0.9)
        few, first = observe(60), np.ones(60, bool)
        differ = (play(True) != play(False)).mean()
        # Of discrete actions nine in ten are drawn anew, two thirds of which are others.
        assert differ == pytest.approx(0.6, abs=0.2) if agent.discrete else differ > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Whole agents.

V3 = dict(
    agent="dreamer_v3", behaviour="planner", size="1m", cell="block_gru", blocks=4, classes=4, act="silu", norm="rms",
    replay_context=1, slots=2, slot_size=8, slot_depth=4, slot_layers=1, slot_decoder_size=8, slot_message_size=8,
    image_bits=8, continue_coeff=1.0, discount=0.95, plan_noise="common",
)  # fmt: skip
AGENTS = {
    "planet": dict(),
    "planet-discrete-latents": dict(classes=4, overshooting=3, cell="layernorm_gru"),
    "planet-overshooting": dict(overshooting=2, continue_coeff=1.0),
    "dreamer_v3": V3,
    "phyxdream": V3 | dict(slot_mode="embed"),
    "phyxdream-per-slot": V3 | dict(slot_mode="per_slot"),
}  # fmt: skip
agents = pytest.mark.parametrize("options", AGENTS.values(), ids=AGENTS)


@agents
@pytest.mark.parametrize("actions", ACTIONS)
def test_learns_and_plans(options, actions):
    agent = make(actions=actions, **options)
    assert isinstance(agent.model, PlannerLearner) and not hasattr(agent.model, "actor")
    before = {name: value.clone() for name, value in agent.model.state_dict().items()}
    carry = None
    for i in range(2):
        action, carry = agent.act(observe(seed=i), np.full(2, i == 0), carry)
    batch = batch_of(agent)
    K = agent.config.replay_context
    if K:
        batch |= {name: x.expand(T, -1, *x.shape[1:])[:, :1].repeat(1, B, *[1] * (x.ndim - 1))
                  for name, x in agent.latents(carry).items()}  # fmt: skip
    update = agent.update(batch)
    assert all(value.isfinite().all() for value in update.metrics.values())
    assert update.model_loss.shape == (T - K, B)
    changed = {name for name, value in agent.model.state_dict().items() if not torch.equal(value, before[name])}
    for part in ("encoder", "rssm", "decoder", "reward"):
        assert any(name.startswith(f"world_model.{part}.") for name in changed), part
    assert "learned" in changed
    for i in range(2):
        action, carry = agent.act(observe(seed=i), np.full(2, i == 0), carry)
    assert action.shape == ((2,) if agent.discrete else (2, 2))
    # What was learned is all in the checkpoint: another agent plans the same.
    other = make(actions=actions, seed=1, **options)
    other.load_tensors(agent.tensors())
    actions = [a.act(observe(seed=5), np.ones(2, bool))[0] for a in (agent, other)]
    np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize("options", [AGENTS["planet-overshooting"], AGENTS["dreamer_v3"]], ids=("planet", "dreamer_v3"))
def test_trains_stops_and_resumes(options, in_two_halves, tmp_path):
    """A run in two halves ends where one in a piece does, the random actions at its beginning included."""
    common = dict(
        env="gym:Pendulum-v1", total_steps=80, log_every=40, eval_episodes=1, train_ratio=6.0, prefill=24,
        time_limit=20, action_repeat=1, warmup=0,
    )  # fmt: skip
    options = {**SMALL, **PLANS, **options, **common}
    whole = DreamerAgent(preset("planet", logdir=str(tmp_path / "whole"), **options))
    half = in_two_halves(whole, at=20)
    assert whole.model.learned and not half.model.learned


def test_what_does_not_fit_is_refused():
    for agent in ("dreamer_v1", "dreamer_v2"):
        with pytest.raises(ConfigError, match=f"behaviour: agent '{agent}' takes 'actor_critic', got 'planner'"):
            preset(agent, behaviour="planner").resolve()
    with pytest.raises(ConfigError, match="behaviour: agent 'planet' takes 'planner', got 'actor_critic'"):
        preset("planet", behaviour="actor_critic").resolve()
    with pytest.raises(ConfigError, match="slot_mode: needs agent 'dreamer_v3', got 'planet'"):
        preset("planet", slot_mode="embed").resolve()
    with pytest.raises(ConfigError, match="plan_elites: expected at most plan_candidates = 50, got 100"):
        preset("planet", plan_candidates=50).resolve()
    with pytest.raises(ConfigError, match="overshooting: expected at most batch_length - 2 = 8 steps, got 9"):
        preset("planet", overshooting=9, batch_length=10).resolve()
    with pytest.raises(ConfigError, match="image_bits: expected at most 8, got 9"):
        preset("planet", image_bits=9).resolve()
    assert preset("planet").resolve().behaviour == "planner"
    assert preset("dreamer_v2").resolve().behaviour == preset("phyxdream").resolve().behaviour == "actor_critic"
