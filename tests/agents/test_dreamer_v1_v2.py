"""DreamerV1 and V2: losses against numbers worked out from the papers' equations, and what learns from which loss."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from phyxdream.agents import DreamerAgent, preset
from phyxdream.agents.dreamer_v1 import WorldModelV1
from phyxdream.agents.lambda_behaviour import frozen, lambda_targets, state_weights
from phyxdream.agents.optimizer import ClippedAdam
from phyxdream.errors import ConfigError
from phyxdream.nn.distributions import UnitNormal
from phyxdream.nn.rssm import State, Trajectory

SMALL = dict(
    batch_size=3, batch_length=6, units=16, deter_size=16, hidden_size=16, embed_size=16, imagine_horizon=4,
    num_envs=2, prefill=0, replay_capacity=2_000, encoder_layers=1, decoder_layers=1,
)  # fmt: skip


def make(name, env="gym:Pendulum-v1", **options):
    return DreamerAgent(preset(name, env=env, **{**SMALL, **options}))


def batch_of(agent, T=6, B=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = {}
    for name, (shape, dtype) in agent.replay_spec.items():
        x = torch.randn(T, B, *shape, generator=g)
        values = {"bool": x > 1, "int32": x > 0}.get(dtype, x)
        batch[name] = values.to(getattr(torch, dtype))
    batch["is_first"][:] = False
    batch["is_first"][0] = True
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Equations, on numbers small enough to be done on paper.


def test_lambda_targets_by_hand():
    """γ = 0.5, λ = 0.5, two steps and the state after them:
    target_1 = 2 + 0.5 (0.5·8 + 0.5·8) = 6;  target_0 = 1 + 0.5 (0.5·4 + 0.5·6) = 3.5."""
    reward, value = torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([[7.0], [4.0], [8.0]])
    discount = torch.full((3, 1), 0.5)
    assert lambda_targets(reward, value, discount, 0.5).flatten().tolist() == [3.5, 6.0]
    # A state where the episode ends has its reward and no more.
    discount[1] = 0.0
    assert lambda_targets(reward, value, discount, 0.5).flatten().tolist() == [1 + 0.5 * (0.5 * 4 + 0.5 * 2), 2.0]
    assert state_weights(discount).flatten().tolist() == [1.0, 0.5, 0.0]


class Fixed(nn.Module):
    """A head whose mean is a given linear map of the feature."""

    def __init__(self, weight, bias=0.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), bias

    def forward(self, feature):
        return UnitNormal(feature @ self.weight + self.bias)


class Policy(nn.Module):
    """Deterministic for V1, and of a known log-probability for REINFORCE."""

    dist = "tanh_normal"

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def forward(self, feature):
        return self

    def log_prob(self, action):
        return self.a * action[..., 0]

    def entropy(self, generator):
        return 2.0 * self.a


class Line(nn.Module):
    """Dynamics h' = h + a with z = 0: features are [h, 0]."""

    def imagine_policy(self, policy, start, horizon, generator=None, detach_feature=False, clip_action=False):
        assert detach_feature  # as published: gradients pass through actions alone
        assert clip_action  # as the environment takes them; on this line no action is beyond 1
        h, states, actions = start.deter, [start.deter], []
        for _ in range(horizon):
            a = policy.a.expand(len(h), 1)
            h = h + a
            states.append(h)
            actions.append(a)
        deter = torch.stack(states)
        return Trajectory(State(deter, torch.zeros_like(deter)), torch.stack(actions))


def on_a_line(name, start=(1.0,), slope=2.0, ended=False, cont=0.5, **options):
    """An agent whose imagination walks on a line: reward h, value 2h (or another slope), discount 0.5, predicted as
    `cont`; the episode has ended at the last start or not."""
    agent = make(name, imagine_horizon=2, td_lambda=0.5, discount=0.5, **options)
    model = agent.model
    model.world_model.rssm, model.actor = Line(), Policy()
    model.world_model.reward, model.critic = Fixed([1.0, 0.0]), Fixed([slope, 0.0])
    model.world_model.cont = Fixed([0.0, 0.0], cont)
    if name != "dreamer_v1":
        model.slow_critic = Fixed([slope, 0.0]).requires_grad_(False)
    over = torch.zeros(len(start), dtype=torch.bool)
    over[-1] = ended
    start = State(torch.tensor([start]).T, torch.zeros(len(start), 1))
    return model, model.imagine(start, over, None)[0]


def test_v1s_behaviour_by_hand():
    """a = 0.5, h = 1, 1.5, 2. V1 looks at h = 1.5 and 2 alone: target = 1.5 + 0.5 (0.5·v + 0.5·v), v(2) = 4: 3.5.
    It moves with a by 1 + 0.5·2·2 = 3. The critic says 3 there."""
    model, losses = on_a_line("dreamer_v1")
    assert losses["actor"].item() == pytest.approx(-3.5)
    assert losses["critic"].item() == pytest.approx(0.5 * (3.0 - 3.5) ** 2)
    losses["actor"].backward()
    assert model.actor.a.grad.item() == pytest.approx(-3.0)
    assert model.critic.weight.grad is None and model.world_model.reward.weight.grad is None
    losses["critic"].backward()  # d/dw ½ (1.5 w − 3.5)² at w = 2
    assert model.critic.weight.grad[0].item() == pytest.approx((3.0 - 3.5) * 1.5)


@pytest.mark.parametrize(("gradient", "mix"), [("dynamics", 0.0), ("reinforce", 1.0), ("both", 0.9)])
def test_v2s_behaviour_by_hand(gradient, mix):
    """h = 1, 1.5, 2: target_1 = 3.5 as for V1; target_0 = 1 + 0.5 (0.5·3 + 0.5·3.5) = 2.625. The action at h = 1 is
    paid by target_1 = 3.5; v(1) = 2, so its advantage is 1.5. log π = a · 0.5 and entropy 2a, with a weight of 0.1."""
    model, losses = on_a_line("dreamer_v2", actor_gradient=gradient, actor_mix=0.1, entropy_coeff=0.1)
    objective = mix * (0.5 * 0.5) * 1.5 + (1 - mix) * 3.5 + 0.1 * 1.0
    assert losses["actor"].item() == pytest.approx(-objective)
    # Of h = 1 with weight 1 and of h = 1.5 with weight 0.5.
    critic = 0.5 * (1.0 * (2 - 2.625) ** 2 + 0.5 * (3 - 3.5) ** 2) / 2
    assert losses["critic"].item() == pytest.approx(critic)
    losses["actor"].backward()
    # d log π / da at a fixed action of 0.5 is 0.5; d target_1 / da is 3; d entropy / da is 2.
    slope = mix * 0.5 * 1.5 + (1 - mix) * 3.0 + 0.1 * 2
    assert model.actor.a.grad.item() == pytest.approx(-slope)
    assert model.critic.weight.grad is None and model.slow_critic.weight.grad is None


def test_v1_learns_nothing_from_what_follows_an_end():
    """Two starts as by hand above, the second of them an end: half of all there was."""
    model, losses = on_a_line("dreamer_v1", (1.0, 1.0), ended=True)
    assert losses["actor"].item() == pytest.approx(-3.5 / 2)
    assert losses["critic"].item() == pytest.approx(0.5 * (3.0 - 3.5) ** 2 / 2)
    losses["actor"].backward()
    assert model.actor.a.grad.item() == pytest.approx(-3.0 / 2)


def test_v2_knows_the_discount_where_it_starts():
    """Where 0.25 is predicted: target_1 = 1.5 + 0.25·4 = 2.5. Of two starts the first goes on, with 0.5:
    target_0 = 1 + 0.5 (0.5·3 + 0.5·2.5) = 2.375. The second is an end: target_0 = 1, the reward there and no more, and
    h = 1.5 has no weight. The action there is paid as anywhere else, as published: nothing depends on it."""
    options = dict(actor_gradient="dynamics", entropy_coeff=0.0)
    _, losses = on_a_line("dreamer_v2", (1.0, 1.0), ended=True, cont=0.25, **options)
    assert losses["actor"].item() == pytest.approx(-2.5)
    errors = (2 - 2.375) ** 2 + (2 - 1) ** 2 + 0.5 * (3 - 2.5) ** 2
    assert losses["critic"].item() == pytest.approx(0.5 * errors / 4)


@pytest.mark.parametrize("name", ["dreamer_v1", "dreamer_v2"])
def test_ends_are_those_of_the_states_imagined_from(name):
    """Of a batch of six steps, with the episode over at the fourth of the second sequence and the last of the third."""
    agent = make(name, imagine_last=4)
    model, batch = agent.model, batch_of(agent)
    batch["is_terminal"][:] = False
    batch["is_terminal"][3, 1] = batch["is_terminal"][5, 2] = True
    seen = {}
    model.imagine = lambda start, ended, generator: seen.update(start=start, ended=ended) or ({}, {})
    model.loss(batch)
    assert seen["ended"].nonzero().flatten().tolist() == [1 * 3 + 1, 3 * 3 + 2] and len(seen["start"].deter) == 12


@pytest.mark.parametrize(("gradient", "objective"), [("dynamics", 7.0), ("reinforce", 0.5 * 0.5 * 1.0)])
def test_daydreamers_behaviour_by_hand(gradient, objective):
    """From h = 1 and 3 with v = 3h: target_1 = (h + 0.5) + 0.5·3 (h + 1) = 4.5 and 9.5, advantages 1.5 and 0.5: their
    mean is 1, their deviation 0.5, by which V2's objective is divided. Entropy 2a = 1, with a weight of 0.1."""
    options = dict(actor_gradient=gradient, entropy_coeff=0.1, continue_coeff=0.0)
    _, losses = on_a_line("daydreamer", (1.0, 3.0), 3.0, **options)
    assert losses["actor"].item() == pytest.approx(-(objective / 0.5 + 0.1))


def test_free_nats_are_of_the_mean():
    """KL(N(1, 1) ‖ N(0, 1)) is ½ a variable: with four, 2 nats a step."""
    config = preset("dreamer_v1", **SMALL).resolve()
    model = WorldModelV1(config, {"state": (3,)}, 1)
    ones, zeros = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    mean = torch.ones(2, 3, 4).requires_grad_()
    deter = torch.zeros(2, 3, 5)
    with torch.no_grad():
        mean[0] = 3.0  # ½·9·4 = 18 nats in the first step, 2 in the second: 10 on average
    post, prior = State(deter, mean, mean=mean, std=ones), State(deter, mean, mean=zeros, std=ones)
    dynamics, representation = model.kl(post, prior, 3.0)
    torch.testing.assert_close(dynamics[:, 0], torch.tensor([18.0, 2.0]))  # the second is below 3 nats, and counts
    (grad,) = torch.autograd.grad(representation.mean(), mean)
    torch.testing.assert_close(grad[0, 0], torch.full((4,), 3.0 / 6))
    dynamics, representation = model.kl(post, prior, 11.0)
    assert ((dynamics == 11.0).all() and not representation.requires_grad) or representation.mean().item() == 11.0
    (grad,) = torch.autograd.grad(representation.mean(), mean, allow_unused=True)
    assert grad is None or not grad.any()


def test_rewards_of_unit_variance():
    distribution = UnitNormal(torch.tensor([1.0, 2.0]))
    assert distribution.loss(torch.tensor([3.0, 2.0])).tolist() == [2.0, 0.0]
    expected = -2.0 - 0.5 * math.log(2 * math.pi)
    assert distribution.log_prob(torch.tensor([3.0, 2.0]))[0].item() == pytest.approx(expected)


def test_frozen_weights_are_constants():
    layer, x = nn.Linear(2, 1), torch.ones(2, requires_grad=True)
    with frozen(layer):
        y = layer(x).sum()
    y.backward()
    assert x.grad is not None and layer.weight.grad is None and layer.weight.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser.


def test_clipped_adam_is_adam_below_the_clip():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(x.clone()) for x in (torch.randn(3, 2), torch.randn(4))] for _ in range(2))
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    optimizer = ClippedAdam([dict(params=ours[:1], lr=1e-2), dict(params=ours[1:], lr=1e-3)], clip=1e6, eps=1e-5)
    reference = torch.optim.Adam([dict(params=theirs[:1], lr=1e-2), dict(params=theirs[1:], lr=1e-3)], eps=1e-5)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        norm = optimizer.step()
        reference.step()
        expected = torch.cat([x.grad.flatten() for x in ours]).norm()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_clip_is_of_each_group_and_decay_of_matrices():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = ClippedAdam([dict(params=[matrix, vector], lr=0.0)], clip=1.0, decay=0.1)
    matrix.grad, vector.grad = torch.full((2, 2), 30.0), torch.full((2,), 40.0)
    assert optimizer.step().item() == pytest.approx(math.sqrt(4 * 900 + 2 * 1600))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.9))
    torch.testing.assert_close(vector.detach(), torch.ones(2))
    scale = 1 / math.sqrt(4 * 900 + 2 * 1600)
    torch.testing.assert_close(optimizer.state[matrix]["momentum"], torch.full((2, 2), 0.1 * 30 * scale))


# ---------------------------------------------------------------------------------------------------------------------
# Whole agents.


@pytest.mark.parametrize("env", ["gym:Pendulum-v1", "gym:CartPole-v1"])
@pytest.mark.parametrize("name", ["dreamer_v1", "dreamer_v2"])
@pytest.mark.parametrize("continues", [0.0, 1.0])
def test_every_part_learns_from_its_own_losses(name, env, continues):
    agent = make(name, env, continue_coeff=continues)
    model, batch = agent.model, batch_of(agent)
    batch["action"] = agent.encode_action(batch["action"])
    loss = model.loss(batch, torch.Generator().manual_seed(0))
    assert loss.total.isfinite() and loss.model_loss.shape == (6, 3)
    loss.total.backward()
    parts = {"actor": model.actor, "critic": model.critic, "world_model": model.world_model}
    for part, module in parts.items():
        found = [n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()]
        assert found, part
    # The behaviour's losses alone leave the world model as it is.
    model.zero_grad()
    over = torch.zeros(18, dtype=torch.bool)
    losses, _ = model.imagine(loss.post.flatten(), over, torch.Generator().manual_seed(0))
    (losses["actor"] + losses["critic"]).backward()
    assert all(p.grad is None for p in model.world_model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.actor.parameters())


def test_slow_critic_is_renewed_every_so_many_updates():
    agent = make("dreamer_v2", slow_critic_every=3)
    model, batch = agent.model, batch_of(agent)

    def same():
        pairs = zip(model.critic.parameters(), model.slow_critic.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    found = []
    for _ in range(7):
        agent.update(batch)
        found.append(same())
    assert found == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("name", ["dreamer_v1", "dreamer_v2", "dreaming", "daydreamer"])
def test_a_target_needs_a_state_after_it(name):
    with pytest.raises(ConfigError, match=f"imagine_horizon: agent '{name}' needs at least 2 steps, got 1"):
        preset(name, imagine_horizon=1).resolve()


@pytest.mark.parametrize("env", ["gym:Pendulum-v1", "gym:CartPole-v1"])
@pytest.mark.parametrize("name", ["dreamer_v1", "dreamer_v2", "dreaming", "daydreamer"])
def test_acts_at_random_until_the_first_update(name, env):
    """Uniform, whatever the actor says; but shows what it would do when asked for its best."""
    options = dict(pixels=None, image_size=None, crop_pixels=0, act="elu") if name == "dreaming" else {}
    agent = make(name, env, exploration_noise=0.0, **options)
    with torch.no_grad():
        agent.model.actor.out.weight.zero_()
        agent.model.actor.out.bias.fill_(5.0)  # means at the upper bound, or its first class
        agent.model.actor.out.bias[agent.action_size if not agent.discrete else 1 :] = -5.0  # and little noise
    shape = agent.observation_space["state"].shape
    observation = {"state": np.zeros((400, *shape), np.float32)}
    first = np.ones(400, bool)

    def mean(explore):
        action, _ = agent.act(observation, first, explore=explore)
        return action.mean()

    uniform, best = (0.5, 0.0) if agent.discrete else (0.0, 1.0)
    assert mean(True) == pytest.approx(uniform, abs=0.12)  # four standard errors of either
    assert mean(False) == pytest.approx(best, abs=0.01)
    before = agent.tensors()["model"]["learned"].clone()
    agent.update(batch_of(agent))
    assert mean(True) == pytest.approx(best, abs=0.3)
    assert not before and agent.tensors()["model"]["learned"]


@pytest.mark.parametrize(("kind", "expected"), [(None, [-3.0, 0.0, 2.0]), ("sign", [-1, 0, 1]), ("tanh", None)])
def test_rewards_are_clipped_for_learning_alone(kind, expected):
    agent = make("dreamer_v2", clip_rewards=kind)
    batch, seen = batch_of(agent), {}
    batch["reward"] = torch.tensor([-3.0, 0.0, 2.0]).expand(6, 3).clone()
    given, original = batch["reward"].clone(), agent.model.loss
    agent.model.loss = lambda batch, generator: seen.update(batch) or original(batch, generator)
    agent.update(batch)
    expected = [math.tanh(x) for x in (-3, 0, 2)] if expected is None else expected
    torch.testing.assert_close(seen["reward"][0], torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(batch["reward"], given)


def test_exploration_noise():
    agent = make("dreamer_v1", exploration_noise=0.3)
    g = torch.Generator().manual_seed(0)
    noisy = agent.model.add_noise(torch.zeros(4000, 1), g)
    assert noisy.std().item() == pytest.approx(0.3, rel=0.1) and noisy.abs().max() <= 1
    agent = make("dreamer_v1", "gym:CartPole-v1", exploration_noise=0.4)
    action = torch.zeros(4000, 2)
    action[:, 0] = 1
    noisy = agent.model.add_noise(action, g)
    assert (noisy.sum(-1) == 1).all() and noisy[:, 1].mean().item() == pytest.approx(0.2, abs=0.03)
    agent = make("dreamer_v1", exploration_noise=0.0)
    assert agent.model.add_noise(action, g) is action


@pytest.mark.parametrize("name", ["dreamer_v1", "dreamer_v2"])
def test_trains_stops_and_resumes(name, in_two_halves, tmp_path):
    """A run in two halves ends where one in a piece does."""
    options = dict(total_steps=120, log_every=40, eval_episodes=1, train_ratio=9.0, time_limit=20, num_envs=2)
    in_two_halves(make(name, logdir=str(tmp_path / "whole"), **options), at=60)
