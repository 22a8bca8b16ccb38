"""An RSSM for each slot: against `RSSM` step by step, permuted slots, and what slots learn of each other."""

import pytest
import torch

from phyxdream import nn
from phyxdream.errors import ConfigError

T, B, K, E, A = 5, 2, 3, 6, 2
CELLS = [("gru", 0), ("layernorm_gru", 4), ("block_gru", 4), ("block_gru", 0)]


def make(cell="block_gru", classes=4, message_size=8, **options):
    torch.manual_seed(0)
    sizes = dict(deter_size=16, stoch_size=3, hidden_size=8, blocks=4)
    return nn.SlotRSSM(K, E, A, message_size, cell=cell, classes=classes, **sizes, **options)


def data(model, T=T):
    g = torch.Generator().manual_seed(1)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0] = True
    is_first[3:4, 1] = True
    embed, action = torch.randn(T, B, K, E, generator=g), torch.randn(T, B, A, generator=g)
    return embed, action, is_first, model.draw_noise(T, B, generator=g)


def start(model):
    g = torch.Generator().manual_seed(2)
    embed, action, is_first, _ = data(model, 1)
    return model.filter(embed, action, is_first, noise=model.draw_noise(1, B, generator=g))[0]


def close(actual, expected, **tolerance):
    for name, x in vars(expected).items():
        if x is not None:
            torch.testing.assert_close(getattr(actual, name), x, **tolerance)


@pytest.mark.parametrize(("cell", "classes"), CELLS)
def test_observe_is_one_rssm_step_a_slot(cell, classes):
    """Slot by slot and step by step with the RSSM itself; a message is a further part of the action."""
    model = make(cell, classes)
    embed, action, is_first, noise = data(model)
    state = first = start(model)
    post, prior = model.observe(embed, action, is_first, state, noise=noise)
    assert post.feature.shape == (T, B, K, model.feature_size)
    for t in range(T):
        told = model.message(state.feature)  # (B, K, M)
        slots = []
        for k in range(K):
            led = torch.cat([action[t], told[:, k]], -1)[None]
            slots.append(model.each.observe(embed[t : t + 1, :, k], led, is_first[t : t + 1], state[:, k],
                                            noise=noise[t : t + 1, :, k]))  # fmt: skip
        for k, (post_k, prior_k) in enumerate(slots):
            close(post[t][:, k], post_k[0])
            close(prior[t][:, k], prior_k[0])
        state = post[t]
    assert not torch.allclose(post.deter[-1], first.deter)


def test_without_messages_slots_are_entries_of_a_batch():
    model = make(message_size=0)
    embed, action, is_first, noise = data(model)
    state = start(model)
    post = model.filter(embed, action, is_first, state, noise)
    prior = model.imagine(action, state, noise)
    for k in range(K):
        close(post[:, :, k], model.each.filter(embed[:, :, k], action, is_first, state[:, k], noise[:, :, k]))
        close(prior[:, :, k], model.each.imagine(action, state[:, k], noise[:, :, k]))


@pytest.mark.parametrize("message_size", [0, 8])
def test_permuted_slots(message_size):
    model, order = make(message_size=message_size), torch.tensor([2, 0, 1])
    embed, action, is_first, noise = data(model)
    state = start(model)
    post, prior = model.observe(embed, action, is_first, state, noise)
    post2, prior2 = model.observe(embed[:, :, order], action, is_first, state[:, order], noise[:, :, order])
    close(post2, post[:, :, order])
    close(prior2, prior[:, :, order])
    dream = model.imagine(action, state, noise)
    close(model.imagine(action, state[:, order], noise[:, :, order]), dream[:, :, order])


@pytest.mark.parametrize("message_size", [0, 8])
def test_what_one_slot_sees_the_others_hear_of_a_step_later(message_size):
    model = make(classes=0, message_size=message_size)  # no small change is lost in a choice among classes
    embed, action, is_first, noise = data(model)
    changed = embed.clone()
    changed[1, 0, 0] += 5
    post, other = (model.filter(x, action, is_first, noise=noise) for x in (embed, changed))
    assert torch.equal(other.deter[:2], post.deter[:2])
    assert torch.equal(other.deter[:, 1], post.deter[:, 1])  # another sequence
    assert torch.equal(other.deter[2:, 0, 1:], post.deter[2:, 0, 1:]) == (not message_size)
    assert not torch.equal(other.deter[2:, 0, 0], post.deter[2:, 0, 0])


def test_a_reset_forgets_messages_too():
    model = make()
    embed, action, is_first, noise = data(model)
    is_first[2] = True
    post = model.filter(embed, action, is_first, noise=noise)
    fresh = model.filter(embed[2:], action[2:], is_first[2:], noise=noise[2:])
    close(post[2:], fresh)


@pytest.mark.parametrize(("cell", "classes"), CELLS)
@pytest.mark.parametrize("message_size", [0, 8])
def test_imagine_policy_equals_imagine_under_its_actions(cell, classes, message_size):
    model = make(cell, classes, message_size)
    _, _, _, noise = data(model)
    state = start(model)
    asked = []

    def policy(feature):
        asked.append(feature)
        return torch.tanh(feature.sum((1, 2)))[:, None].expand(-1, A)

    trajectory = model.imagine_policy(policy, state, T, noise)
    assert trajectory.action.shape == (T, B, A)
    assert trajectory.state.feature.shape == (T + 1, B, K, model.feature_size)
    close(trajectory.state[1:], model.imagine(trajectory.action, state, noise))
    torch.testing.assert_close(torch.stack(asked), trajectory.state.feature[:-1])


def test_an_actor_is_sampled_with_the_generator():
    model = make()
    actor = nn.SlotHead(model.feature_size, 8, lambda size: nn.Actor(size, A, 8, 1, "categorical"))
    runs = [model.imagine_policy(actor, start(model), T, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0].action, runs[1].action)
    assert not torch.equal(runs[0].action, runs[2].action)
    torch.testing.assert_close(runs[0].action.sum(-1), torch.ones(T, B))


@pytest.mark.parametrize(("cell", "classes"), CELLS)
def test_every_parameter_learns(cell, classes):
    model = make(cell, classes, initial="learned")
    embed, action, is_first, noise = data(model)
    post, prior = model.observe(embed, action, is_first, noise=noise)
    statistics = [x for state in (post, prior) for x in (state.logits, state.mean, state.std) if x is not None]
    (sum(x.square().sum() for x in statistics) + post.feature.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bad_arguments():
    with pytest.raises(ConfigError, match="message_size: expected at least 0, got -4"):
        make(message_size=-4)
    with pytest.raises(ConfigError, match="heads: expected a number that divides 6, got 4"):
        make(message_size=6)
    model = make()
    embed, action, is_first, noise = data(model)
    with pytest.raises(ValueError, match=rf"embed: expected shape \(\*, \*, {K}, {E}\), got \({T}, {B}, {E}\)"):
        model.observe(embed[:, :, 0], action, is_first)
    with pytest.raises(ValueError, match="noise: expected shape"):
        model.observe(embed, action, is_first, noise=noise[:, :, 0])
    with pytest.raises(ValueError, match="action: expected shape"):
        model.imagine(action[..., :1], start(model))
    with pytest.raises(ValueError, match="horizon: expected at least 1"):
        model.imagine_policy(lambda feature: feature, start(model), 0)
