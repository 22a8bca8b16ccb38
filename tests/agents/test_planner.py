"""The cross-entropy method: beliefs and scores worked out by hand, problems whose best plan is known, real models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phyxdream.agents import DreamerConfig
from phyxdream.agents.planner import CategoricalBelief, NormalBelief, Planner
from phyxdream.agents.slot_world_model import SlotWorldModel
from phyxdream.agents.world_model import WorldModel
from phyxdream.nn.distributions import UnitNormal
from phyxdream.nn.rssm import State


class Line(nn.Module):
    """A world on a line: h' = h + a, or h − 1, h, h + 1 by one-hot actions; z = 0. It keeps what it was asked for."""

    def __init__(self, reward, cont=lambda h: torch.ones_like(h)):
        super().__init__()
        self.rssm, self.calls = self, []
        self.reward, self.cont = (lambda f: UnitNormal(reward(f[..., 0]))), (lambda f: UnitNormal(cont(f[..., 0])))

    def draw_noise(self, *leading, generator=None):
        return torch.rand(*leading, 1, generator=generator)

    def imagine(self, action, state, noise=None):
        self.calls.append((action, state, noise))
        move = action if action.shape[-1] == 1 else action @ torch.tensor([[-1.0], [0.0], [1.0]])
        deter = state.deter + move.cumsum(0)
        return State(deter, torch.zeros_like(deter))


def at(*h):
    deter = torch.tensor(h).unsqueeze(-1)
    return State(deter, torch.zeros_like(deter))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# By hand.


def test_refit_to_the_elites_by_hand():
    """Two of four plans. In the first environment plans 0 and 1 are best: first actions 1 and 0.5, mean 0.75 and
    variance 0.0625; second actions 0 and 1, mean 0.5 and variance 0.25. In the second environment plans 2 and 3."""
    planner = Planner(action_size=1, discrete=False, horizon=2, candidates=4, elites=2)
    first, second = [1.0, 0.5, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]
    action = torch.tensor([[first, first], [second, second]]).unsqueeze(-1)
    score = torch.tensor([[3.0, 2.0, -5.0, 0.0], [0.0, -1.0, 9.0, 1.0]])
    belief = planner.refit(planner.start(at(0.0, 0.0)), action, score)
    torch.testing.assert_close(belief.mean.squeeze(-1), torch.tensor([[0.75, -0.5], [0.5, -0.5]]))
    variance = torch.tensor([[0.0625, 0.25], [0.25, 0.25]])
    torch.testing.assert_close(belief.std.squeeze(-1), (variance + 1e-6).sqrt())
    assert belief.best.tolist() == [[0.75], [-0.5]]


def test_refit_to_frequencies_by_hand():
    """Three of four plans take actions 2, 2 and 0 first, and 1, 1, 1 after that."""
    planner = Planner(action_size=3, discrete=True, horizon=2, candidates=4, elites=3)
    action = nn.functional.one_hot(torch.tensor([[[2, 1, 2, 0]], [[1, 0, 1, 1]]]), 3).float()
    belief = planner.refit(planner.start(at(0.0)), action, torch.tensor([[5.0, -1.0, 4.0, 3.0]]))
    torch.testing.assert_close(belief.probs, torch.tensor([[[1 / 3, 0.0, 2 / 3]], [[0.0, 1.0, 0.0]]]))
    assert belief.best.tolist() == [[0.0, 0.0, 1.0]]
    again = belief.sample(500, generator())
    assert (again.sum(-1) == 1).all() and not again[0, ..., 1].any() and again[1, ..., 1].all()
    assert again[0, ..., 2].mean().item() == pytest.approx(2 / 3, abs=0.06)


def test_score_by_hand():
    """From 1 by 0.5, −1 and 2 to h = 1.5, 0.5, 2.5, each of which is its own reward."""
    planner = Planner(action_size=1, discrete=False)
    action = torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1)
    score = [
        planner.score(Line(lambda h: h, cont), at(1.0), action, torch.zeros(3, 1, 1)).item()
        for cont in (torch.ones_like, lambda h: torch.full_like(h, 0.5), lambda h: h - 0.5)
    ]
    # The sum; 1.5 + 0.5·0.5 + 0.25·2.5; and with continuation 1 after 1.5, none after 0.5, whose own reward counts.
    assert score == [4.5, 2.375, 2.0]


def test_first_candidates_are_drawn_from_the_start():
    belief = NormalBelief.start((2, 1, 1), torch.zeros(()))
    action = belief.sample(4000, generator())
    assert action.shape == (2, 1, 4000, 1)
    # Of N(0, 1), 0.317 lie beyond ±1 and are brought there.
    assert (action.abs() == 1).float().mean().item() == pytest.approx(0.317, abs=0.02)
    assert action.mean().item() == pytest.approx(0.0, abs=0.04)
    belief = CategoricalBelief.start((2, 1, 4), torch.zeros(()))
    action = belief.sample(4000, generator())
    torch.testing.assert_close(action.mean(2), torch.full((2, 1, 4), 0.25), atol=0.03, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Best plans that are known.


@pytest.mark.parametrize("discrete", (False, True))
def test_finds_the_best_action(discrete):
    """Reward −(h − 0.6)²: from 0 go by 0.6, from 1 by −0.4, from 3 as fast as one can. Steps of 1 go from −2 right,
    from 0 right (0.4 away, not 0.6), stay at 1, and go from 3 left."""
    planner = Planner(3 if discrete else 1, discrete, horizon=4, candidates=200, iterations=8, elites=20)
    starts = (-2.0, 0.0, 1.0, 3.0)
    action = planner(Line(lambda h: -(h - 0.6).square()), at(*starts), generator())
    if discrete:
        assert (action.argmax(-1) - 1).tolist() == [1, 1, 0, -1]
    else:
        torch.testing.assert_close(action.flatten(), torch.tensor([1.0, 0.6, -0.4, -1.0]), atol=0.05, rtol=0)


def test_looks_as_far_ahead_as_it_is_told():
    """Behind a dip lies what is worth it: −1 at h = 1 and 2, then 10 from h = 3 on."""

    def reward(h):
        return torch.where(h > 2.5, 10.0, torch.where(h > 0.5, -1.0, 0.0))

    def first_step(horizon):
        planner = Planner(3, True, horizon, candidates=300, iterations=5, elites=30)
        return planner(Line(reward), at(0.0), generator()).argmax().item() - 1

    assert first_step(horizon=2) != 1
    assert first_step(horizon=3) == 1


def test_an_end_is_worth_avoiding():
    """1 a step, and the episode ends at h > 1.5: standing still is best, however much more the way there earns."""

    def first_step(cont):
        planner = Planner(3, True, horizon=6, candidates=300, iterations=5, elites=30)
        return planner(Line(lambda h: 1 + 0.1 * h, cont), at(1.0), generator()).argmax().item() - 1

    assert first_step(lambda h: (h < 1.5).float()) == 0
    assert first_step(torch.ones_like) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Whatever is given.

scores = st.lists(st.integers(-1000, 1000), min_size=8, max_size=8, unique=True)


@settings(max_examples=40, deadline=None)
@given(scores, st.permutations(range(8)), st.booleans(), st.integers(1, 8))
def test_refit_depends_on_the_order_of_scores_alone(values, order, discrete, elites):
    A = 3
    planner = Planner(A, discrete, horizon=2, candidates=8, elites=elites)
    start = planner.start(at(0.0))
    action, score = start.sample(8, generator()), torch.tensor([values], dtype=torch.float64)
    belief = planner.refit(start, action, score)
    moved = planner.refit(start, action[:, :, order], 3 * score[:, order] - 7)
    for name, value in vars(belief).items():
        torch.testing.assert_close(getattr(moved, name), value)
    if discrete:
        torch.testing.assert_close(belief.probs.sum(-1), torch.ones(2, 1))
    else:
        assert belief.mean.abs().max() <= 1 and belief.std.min() > 0
    best = action[:, :, score[0].argsort(descending=True)[:elites]].mean(2)[0]
    torch.testing.assert_close(belief.probs[0] if discrete else belief.mean[0], best)


# ---------------------------------------------------------------------------------------------------------------------
# How imagination is asked.


def test_one_call_an_iteration_for_all_candidates_of_all():
    planner = Planner(1, False, horizon=5, candidates=7, iterations=3, elites=2)
    world = Line(lambda h: h)
    planner(world, at(1.0, 2.0), generator())
    assert len(world.calls) == 3
    for action, state, noise in world.calls:
        assert action.shape == (5, 14, 1)
        assert state.deter.flatten().tolist() == [1.0] * 7 + [2.0] * 7
        assert noise.shape == (5, 14, 1)
    assert world.calls[0][1] is world.calls[2][1]  # candidates start there at every iteration: repeated once


@pytest.mark.parametrize(("kind", "different"), [("own", 14), ("common", 2)])
def test_noise_of_candidates(kind, different):
    """Seven candidates of two environments: their own, or one of each environment; never that of another iteration."""
    planner = Planner(1, False, horizon=5, candidates=7, iterations=3, elites=2, noise=kind)
    world = Line(lambda h: h)
    planner(world, at(1.0, 2.0), generator())
    drawn = torch.stack([noise for *_, noise in world.calls])
    for step in drawn.flatten(0, 1):
        assert len(step.unique()) == different
        assert kind == "own" or (len(step[:7].unique()) == len(step[7:].unique()) == 1)
    assert len(drawn.unique()) == 3 * 5 * different


TINY = dict(
    size="1m", deter_size=16, hidden_size=8, stoch_size=3, classes=4, blocks=4, units=8, encoder_layers=1,
    decoder_layers=1, slots=3, slot_size=8, slot_depth=4, slot_layers=1, slot_decoder_size=8, slot_message_size=8,
)  # fmt: skip


@pytest.mark.parametrize("discrete", (False, True))
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(cell="gru", classes=0), dict(slot_mode="embed", slot_initial="gaussian"),
        dict(slot_mode="per_slot"),
        dict(slot_mode="per_slot", slot_message_size=0, slot_recurrent=True, cell="gru", classes=0),
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "plain",
)  # fmt: skip
@pytest.mark.parametrize("noise", ("own", "common"))
def test_plans_in_every_world_model(options, discrete, noise):
    torch.manual_seed(0)
    make = SlotWorldModel if "slot_mode" in options else WorldModel
    model = make(DreamerConfig(**(TINY | options)).resolve(), {"image": (3, 8, 8)}, 2)
    nn.init.normal_(getattr(model.reward, "head", model.reward).out.weight, std=0.1)  # it starts at zero
    g = generator()
    first = torch.ones(1, 4, dtype=torch.bool)
    batch = {"image": torch.rand(1, 4, 3, 8, 8, generator=g), "action": torch.zeros(1, 4, 2), "is_first": first}
    with torch.no_grad():
        state = model.filter(batch, generator=g)[0]
    planner = Planner(2, discrete, horizon=3, candidates=6, iterations=2, elites=2, noise=noise)
    torch.manual_seed(1)
    action = planner(model, state, generator(5))
    assert action.shape == (4, 2) and not action.requires_grad and action.abs().max() <= 1
    if discrete:
        assert (action.sum(-1) == 1).all() and set(action.unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(2)  # the global generator plays no part
    assert torch.equal(planner(model, state, generator(5)), action)
    with torch.no_grad():
        candidates = planner.start(state).sample(6, generator(7)).flatten(1, 2)
        starts = state.map(lambda x: x.repeat_interleave(6, 0))
        drawn = planner.draw_noise(model, state, generator(8))
        scores = planner.score(model, starts, candidates, drawn).view(4, 6)
        assert scores.std(1).min() > 0
        # Of the same actions, candidates with noise in common expect the same.
        candidates = candidates.unflatten(1, (4, 6))[:, :, :1].expand(-1, -1, 6, -1).flatten(1, 2)
        scores = planner.score(model, starts, candidates, drawn).view(4, 6)
        same = scores.std(1) < 1e-5 * scores.abs().amax(1)
        assert same.all() if noise == "common" else not same.any()
