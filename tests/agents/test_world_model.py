"""The world model's losses against direct transcriptions."""

import math

import pytest
import torch

from phyxdream.agents import DreamerConfig
from phyxdream.agents.world_model import WorldModel
from phyxdream.errors import ConfigError

T, B, A = 6, 3, 2
SHAPES = {"image": (3, 9, 8), "state": (4,)}


def config(**options):
    tiny = dict(
        size="1m", deter_size=16, hidden_size=8, stoch_size=3, classes=4, blocks=4, units=8, depth=2, depth_mults=(1,),
        encoder_layers=1, decoder_layers=1, batch_size=B, batch_length=T, num_envs=1,
    )  # fmt: skip
    return DreamerConfig(**(tiny | options)).resolve()


def make(shapes=SHAPES, **options):
    torch.manual_seed(0)
    model = WorldModel(config(**options), shapes, A)
    # Reward predictions start at zero; give them something to be wrong about.
    torch.nn.init.normal_(model.reward.out.weight, std=0.3)
    return model


def make_batch():
    g = torch.Generator().manual_seed(1)
    batch = {
        "image": torch.randint(0, 256, (T, B, *SHAPES["image"]), generator=g, dtype=torch.uint8),
        "state": torch.randn(T, B, 4, generator=g) * 10,
        "action": torch.rand(T, B, A, generator=g) * 2 - 1,
        "reward": torch.randn(T, B, generator=g),
        "is_first": torch.zeros(T, B, dtype=torch.bool),
        "is_last": torch.zeros(T, B, dtype=torch.bool),
        "is_terminal": torch.zeros(T, B, dtype=torch.bool),
    }
    batch["is_terminal"][2, 0] = batch["is_last"][2, 0] = batch["is_first"][3, 0] = True
    return batch


def generator():
    return torch.Generator().manual_seed(2)


def test_losses():
    model, batch = make(free_nats=0.3, discount=0.9), make_batch()
    out = model.loss(batch, generator())
    assert out.losses.keys() == {"dynamics", "representation", "reward", "continue", "image", "state"}
    assert all(loss.shape == (T, B) for loss in out.losses.values())
    embed = model.embed(batch)
    post, prior = model.rssm.observe(embed, batch["action"], batch["is_first"], generator=generator())
    torch.testing.assert_close(out.post.feature, post.feature)

    p, q = ((0.99 * torch.softmax(s.logits, -1) + 0.01 / 4) for s in (post, prior))
    kl = (p * (p / q).log()).sum((-1, -2))
    torch.testing.assert_close(out.losses["dynamics"], kl.clamp(min=0.3))
    torch.testing.assert_close(out.losses["representation"], kl.clamp(min=0.3))
    torch.testing.assert_close(out.metrics["kl"], kl.mean())

    feature = post.feature
    decoded = model.decoder(feature)
    image = batch["image"].float() / 255
    torch.testing.assert_close(out.losses["image"], (decoded["image"].mode - image).square().sum((-1, -2, -3)))
    state = torch.sign(batch["state"]) * (batch["state"].abs() + 1).log()
    torch.testing.assert_close(out.losses["state"], (decoded["state"].prediction - state).square().sum(-1))
    torch.testing.assert_close(out.losses["reward"], model.reward(feature).loss(batch["reward"]))
    # The discount is baked into the continuation target, once.
    logit = model.cont(feature).logit
    target = 0.9 * (1 - batch["is_terminal"].float())
    expected = -(target * torch.sigmoid(logit).log() + (1 - target) * torch.sigmoid(-logit).log())
    torch.testing.assert_close(out.losses["continue"], expected)


def test_byte_vectors_are_not_taken_for_pictures():
    """Byte vectors (a console's RAM) are decoded on the scale on which they were encoded."""
    model = make({"ram": (4,)})
    batch = make_batch()
    batch["ram"] = torch.randint(0, 256, (T, B, 4), dtype=torch.uint8)
    out = model.loss(batch, generator())
    prediction = model.decoder(out.post.feature)["ram"].prediction
    expected = (prediction - torch.log1p(batch["ram"].float())).square().sum(-1)
    torch.testing.assert_close(out.losses["ram"], expected)


def test_weights_of_the_losses():
    model = make(kl_loss_coeff=2.0, dynamics_coeff=0.5, representation_coeff=0.1, reward_coeff=3.0, continue_coeff=5.0,
                 reconstruction_coeff=7.0)  # fmt: skip
    names = ("dynamics", "representation", "reward", "continue", "image", "state")
    assert [model.loss_coeff(n) for n in names] == [1.0, 0.2, 3.0, 5.0, 7.0, 7.0]


@pytest.mark.parametrize("options", [{}, dict(cell="gru", classes=0, initial="learned"), dict(embed_size=5)])
def test_every_parameter_learns(options):
    model = make(free_nats=0.0, **options)
    out = model.loss(make_batch(), generator())
    sum(loss.mean() for loss in out.losses.values()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_gradients_of_the_kl_terms():
    """The dynamics term does not move the encoder's path directly: only the sequence model and the prior."""
    model = make(free_nats=0.0)
    out = model.loss(make_batch(), generator())
    grads = torch.autograd.grad(out.losses["dynamics"].mean(), list(model.rssm.prior.parameters()), retain_graph=True)
    assert all(g.abs().max() > 0 for g in grads)
    representation = torch.autograd.grad(
        out.losses["representation"].mean(), list(model.rssm.prior.parameters()), allow_unused=True
    )
    assert representation == (None,) * len(representation)


@pytest.mark.parametrize(("classes", "dtype"), [(4, "uint8"), (256, "uint8"), (257, "int16"), (0, "bfloat16")], ids=str)
def test_packed_states(classes, dtype):
    """Class indices come back exactly, the rest with bfloat16's eight bits."""
    model = make(classes=classes)
    state = model.rssm.observe(torch.randn(T, B, model.rssm.embed_size), torch.randn(T, B, A),
                               torch.zeros(T, B, dtype=torch.bool))[0]  # fmt: skip
    assert model.latent_spec == {"deter": ((16,), "bfloat16"), "stoch": ((3,), dtype)}
    packed = model.pack(state)
    assert {n: (tuple(x.shape), x.dtype) for n, x in packed.items()} == {
        n: ((T, B, *shape), getattr(torch, d)) for n, (shape, d) in model.latent_spec.items()
    }
    back = model.unpack(packed)
    assert back.feature.dtype == torch.float32 and not back.feature.requires_grad
    torch.testing.assert_close(back.deter, state.deter.detach(), rtol=2**-8, atol=0)
    if classes:
        assert torch.equal(back.stoch, state.stoch.detach())
    else:
        torch.testing.assert_close(back.stoch, state.stoch.detach(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("classes", [4, 0])
@pytest.mark.parametrize("context", [1, 3])
def test_replay_context(context, classes):
    model, batch = make(replay_context=context, classes=classes), make_batch()
    post = model.rssm.filter(model.embed(batch), batch["action"], batch["is_first"], generator=generator())
    batch |= model.pack(post)
    rest, state = model.replay_context(batch, generator())
    assert rest.keys() == batch.keys()
    assert all(torch.equal(rest[name], batch[name][context:]) for name in batch)
    g, expected = generator(), model.unpack({name: batch[name][0] for name in ("deter", "stoch")})
    noise = model.rssm.draw_noise(context - 1, B, generator=g)
    for t in range(1, context):
        embed = model.embed({name: batch[name][t : t + 1] for name in SHAPES})
        expected = model.rssm.filter(embed, batch["action"][t : t + 1], batch["is_first"][t : t + 1], expected,
                                     noise[t - 1 : t])[0]  # fmt: skip
    torch.testing.assert_close(state.feature, expected.feature.detach())
    assert not state.feature.requires_grad
    # What follows is filtered from there.
    out = model.loss(rest, generator(), state)
    going_on = model.rssm.filter(model.embed(rest), rest["action"], rest["is_first"], state, generator=generator())
    assert out.post.deter.shape[0] == T - context
    torch.testing.assert_close(out.post.feature, going_on.feature)


def test_open_loop():
    model, batch = make(), make_batch()
    video = model.open_loop(batch, 2, generator())
    assert {name: tuple(x.shape) for name, x in video.items()} == {n: (T, B, *s) for n, s in SHAPES.items()}
    g = generator()
    rssm, embed = model.rssm, model.embed({n: batch[n][:2] for n in SHAPES})
    post = rssm.filter(embed, batch["action"][:2], batch["is_first"][:2], generator=g)
    prior = rssm.imagine(batch["action"][2:], post[1], generator=g)
    for name, decoded in model.decoder(torch.cat([post.feature, prior.feature])).items():
        torch.testing.assert_close(video[name], decoded.mode)
    # What happens after the context is predicted from actions alone.
    blind = {**batch, "image": batch["image"].clone(), "state": batch["state"].clone()}
    blind["image"][2:] = 0
    blind["state"][2:] = math.nan
    for name, x in model.open_loop(blind, 2, generator()).items():
        torch.testing.assert_close(x, video[name], rtol=0, atol=0)
    moved = {**batch, "action": batch["action"].clone()}
    moved["action"][2:] *= -1
    changed = model.open_loop(moved, 2, generator())["image"]
    torch.testing.assert_close(changed[:2], video["image"][:2], rtol=0, atol=0)
    assert not torch.allclose(changed[2:], video["image"][2:])


def test_pictures_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"'image'.*\(3, 4, 4\)"):
        make({"image": (3, 4, 4)})
