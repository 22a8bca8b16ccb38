"""Slot attention as a module: where slots start, what the op is given, the state dict."""

import pytest
import torch

from phyxdream import nn, ops
from phyxdream.errors import ConfigError


def model_and_inputs(**keywords):
    torch.manual_seed(0)
    return nn.SlotAttention(slots=3, slot_size=8, input_size=5, hidden_size=6, **keywords), torch.randn(2, 10, 5)


def test_the_op_gets_the_parameters():
    model, inputs = model_and_inputs(iterations=2, eps=0.1)
    slots = torch.randn(2, 4, 8)  # one more than the module starts with
    found = model(inputs, slots)
    expected = ops.slot_attention(inputs, slots, model.weights, iterations=2, eps=0.1)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(model(inputs, slots, iterations=1)[0], found[0])
    named = dict(model.named_parameters())
    given = {id(x) for x in model.weights}
    assert {name for name, x in named.items() if id(x) not in given} == {"initial_mean", "initial_log_std"}


def test_shapes_and_masks():
    model, inputs = model_and_inputs()
    slots, attention = model(inputs)
    assert slots.shape == (2, 3, 8)
    torch.testing.assert_close(attention.sum(1), torch.ones(2, 10))
    assert model(inputs, return_attention=False)[1] is None


def test_noise_and_generator_decide_where_slots_start():
    model, inputs = model_and_inputs()
    noise = model.draw_noise(2, torch.Generator().manual_seed(1))
    expected = model(inputs, noise=noise)[0]
    assert torch.equal(model(inputs, generator=torch.Generator().manual_seed(1))[0], expected)
    start = model.initial_mean + model.initial_log_std.exp() * noise
    assert torch.equal(model(inputs, start)[0], expected)
    assert model(inputs, noise=torch.randn(2, 7, 8))[0].shape == (2, 7, 8)
    assert not torch.equal(model(inputs)[0], model(inputs)[0])


def test_learned_slots_start_where_they_are():
    model, inputs = model_and_inputs(initial="learned")
    assert torch.equal(model(inputs)[0], model(inputs, model.initial_slots.expand(2, -1, -1))[0])
    assert not torch.equal(*model.initial_slots[:2])


@pytest.mark.parametrize("initial", ["gaussian", "learned"])
def test_every_parameter_learns(initial):
    model, inputs = model_and_inputs(initial=initial)
    slots, attention = model(inputs)
    (slots.square().sum() + attention.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_implicit_gradients_do_not_reach_the_start():
    model, inputs = model_and_inputs(implicit=True)
    model(inputs)[0].sum().backward()
    assert model.initial_mean.grad is None
    assert model.gru.weight_hh.grad.abs().max() > 0


def test_absent_slots():
    model, inputs = model_and_inputs()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    _, attention = model(inputs, slot_mask=mask)
    assert not attention[~mask].any()
    torch.testing.assert_close(attention.sum(1), torch.ones(2, 10))


@pytest.mark.parametrize(
    ("initial", "start"), [("gaussian", {"initial_mean", "initial_log_std"}), ("learned", {"initial_slots"})]
)
def test_state_dict(initial, start):
    model, _ = model_and_inputs(initial=initial)
    norms = {f"norm_{name}.{part}" for name in ("inputs", "slots", "mlp") for part in ("weight", "bias")}
    maps = {f"to_{x}.weight" for x in "qkv"} | {f"mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    gru = {f"gru.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert set(model.state_dict()) == norms | maps | gru | start


def test_learns_to_part_two_kinds_of_tokens():
    """Tokens of two kinds end in two slots."""
    torch.manual_seed(0)
    model = nn.SlotAttention(slots=2, slot_size=16, input_size=4, hidden_size=16)
    kind = torch.arange(12) % 2
    tokens = torch.nn.functional.one_hot(kind, 4).float()
    decode = torch.nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*model.parameters(), *decode.parameters()], 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        inputs = tokens + 0.1 * torch.randn(8, 12, 4, generator=generator)
        slots, attention = model(inputs, generator=generator)
        loss = (torch.einsum("bkn,bki->bni", attention, decode(slots)) - inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first = attention.argmax(1) == 0  # (B, N)
    assert ((first == (kind == 0)).all(1) | (first == (kind == 1)).all(1)).float().mean() > 0.8


def test_transformer_block_is_equivariant_and_learns():
    torch.manual_seed(0)
    block, slots, order = nn.SlotTransformer(8, 2, 6), torch.randn(4, 2, 3, 8), torch.tensor([2, 0, 1])
    out = block(slots)
    torch.testing.assert_close(block(slots[..., order, :]), out[..., order, :])
    torch.testing.assert_close(block(slots[1, 0]), out[1, 0])
    # One head at a time, as the equation reads.
    q, k, v = block.qkv(block.norm_attention(slots)).chunk(3, -1)
    heads = [(a @ b.mT / 4**0.5).softmax(-1) @ c for a, b, c in zip(*(x.split(4, -1) for x in (q, k, v)), strict=True)]
    middle = slots + block.out(torch.cat(heads, -1))
    torch.testing.assert_close(out, middle + block.mlp(block.norm_mlp(middle)))
    out.square().sum().backward()
    assert all(p.grad.any() for p in block.parameters())
    with pytest.raises(ConfigError, match="heads: expected a number that divides 8, got 3"):
        nn.SlotTransformer(8, 3)


def test_bad_arguments():
    model, inputs = model_and_inputs()
    with pytest.raises(ConfigError, match=r"initial: expected one of .*'gauss'.*gaussian"):
        nn.SlotAttention(initial="gauss")
    with pytest.raises(ConfigError, match="iterations: expected at least 1, got 0"):
        nn.SlotAttention(iterations=0)
    with pytest.raises(ValueError, match=r"inputs: expected a tensor \(B, N, I\), got \(10, 5\)"):
        model(inputs[0])
    with pytest.raises(ValueError, match=r"noise: expected shape \(2, K, 8\), got \(3, 3, 8\)"):
        model(inputs, noise=torch.randn(3, 3, 8))
    with pytest.raises(ValueError, match="noise: expected None beside slots"):
        model(inputs, torch.randn(2, 3, 8), noise=torch.randn(2, 3, 8))
    learned, _ = model_and_inputs(initial="learned")
    with pytest.raises(ValueError, match="noise: expected None, since slots start where they are learned to"):
        learned(inputs, noise=torch.randn(2, 3, 8))
