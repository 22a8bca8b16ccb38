"""The world model of slots, in both modes: losses, parameters, permuted slots, what a replay keeps, acting."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from phyxdream import DreamerAgent, nn
from phyxdream.agents import DreamerConfig, PhyXDreamer, preset
from phyxdream.agents.slot_world_model import SlotWorldModel
from phyxdream.errors import ConfigError

T, B, A, K, D = 6, 3, 2, 3, 8
SHAPES = {"image": (3, 9, 8), "depth": (1, 9, 8), "state": (4,)}
TINY = dict(
    size="1m", deter_size=16, hidden_size=8, stoch_size=3, classes=4, blocks=4, units=8, depth=2, depth_mults=(1,),
    encoder_layers=1, decoder_layers=1, actor_layers=1, critic_layers=1, batch_size=B, batch_length=T, num_envs=2,
    imagine_horizon=3, learning_rate=1e-3, warmup=0, device="cpu", slots=K, slot_size=D, slot_depth=4, slot_layers=2,
    slot_decoder_size=8, slot_decoder_layers=1, slot_message_size=8, slot_mode="embed",
)  # fmt: skip
# Modes, cells, latents and ways of slots through time, each of them with several of the others.
VARIANTS = [
    dict(),
    dict(slot_mode="per_slot"),
    dict(slot_initial="gaussian", cell="gru", classes=0, initial="learned"),
    dict(slot_recurrent=True, cell="layernorm_gru", l1_coeff=0.3, slot_patch=2),
    dict(slot_mode="per_slot", slot_initial="gaussian", cell="layernorm_gru", embed_size=5, slot_stride=2),
    dict(slot_mode="per_slot", slot_recurrent=True, slot_predictor=True, cell="gru", classes=0),
    dict(slot_mode="per_slot", slot_message_size=0, initial="learned"),
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())) or "embed")


def make(shapes=SHAPES, **options):
    torch.manual_seed(0)
    model = SlotWorldModel(DreamerConfig(**(TINY | options)).resolve(), shapes, A)
    head = model.reward.head if model.per_slot else model.reward
    torch.nn.init.normal_(head.out.weight, std=0.3)  # it starts at zero
    return model


def make_batch(T=T):
    g = torch.Generator().manual_seed(1)
    batch = {
        name: torch.randint(0, 256, (T, B, *shape), generator=g, dtype=torch.uint8) for name, shape in SHAPES.items()
    }
    batch |= {
        "state": torch.randn(T, B, 4, generator=g),
        "action": torch.rand(T, B, A, generator=g) * 2 - 1,
        "reward": torch.randn(T, B, generator=g),
        **{name: torch.zeros(T, B, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")},
    }
    batch["is_terminal"][2, 0] = batch["is_last"][2, 0] = batch["is_first"][3, 0] = True
    return batch


def generator():
    return torch.Generator().manual_seed(2)


@variants
def test_losses_and_gradients(options):
    model, batch = make(free_nats=0.0, **options), make_batch()
    out = model.loss(batch, generator())
    assert out.losses.keys() == {"dynamics", "representation", "reward", "continue", "slots", *SHAPES}
    assert all(loss.shape == (T, B) for loss in out.losses.values())
    sum(loss.mean() for loss in out.losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@variants
def test_pictures_are_mixtures(options):
    model, batch = make(**options), make_batch()
    post = model.filter(batch, generator=generator())
    decoded = model.decoder(post.feature)
    assert isinstance(decoded["image"], nn.SlotMixture)
    assert decoded["image"].pictures.shape == (T, B, K, *SHAPES["image"])
    torch.testing.assert_close(decoded["image"].masks, decoded["depth"].masks)
    assert decoded["state"].mode.shape == (T, B, 4)
    error = decoded["depth"].mode - batch["depth"] / 255
    expected = (error**2 + model.config.l1_coeff * error.abs()).sum((-1, -2, -3))
    torch.testing.assert_close(model.loss(batch, generator()).losses["depth"], expected)
    video = model.open_loop(batch, 2, generator())
    assert {name: tuple(x.shape) for name, x in video.items()} == {n: (T, B, *s) for n, s in SHAPES.items()}


def test_embedding_is_the_slots_in_their_order():
    model, batch = make(), make_batch()
    slots, vector, _, _ = model.encoder(batch, batch["is_first"])
    encoded = model.encode(batch, None, None)
    embed, carry = encoded.embed, encoded.carry
    torch.testing.assert_close(embed, torch.cat([*slots.unbind(2), vector], -1))
    assert carry is None
    torch.testing.assert_close(model.embed({name: batch[name] for name in SHAPES}), embed)


@variants
def test_encoder_learns_from_what_its_own_slots_paint(options):
    model, batch = make(**options), make_batch()
    encoded = model.encode(batch, None, generator())
    assert encoded.slots.shape == (T, B, K, D)
    mixture = model.decoder.painter(encoded.slots)
    error = mixture.mode - torch.cat([batch[name] for name in ("depth", "image")], -3) / 255
    expected = (error**2 + model.config.l1_coeff * error.abs()).sum((-1, -2, -3))
    found = model.loss(batch, generator()).losses["slots"]
    torch.testing.assert_close(found, expected)
    found.mean().backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"encoder", "decoder"}
    assert make(slot_coeff=3.0, reconstruction_coeff=2.0).loss_coeff("slots") == 3.0
    assert "slots" not in make(slot_coeff=0.0, **options).loss(batch, generator()).losses


def test_kl_is_that_of_all_slots():
    model, batch = make(slot_mode="per_slot"), make_batch()
    post = model.filter(batch, generator=generator())
    prior = model.rssm.prior_at(post)
    expected = sum(nn.kl_divergence(post[:, :, k], prior[:, :, k], model.config.unimix) for k in range(K))
    torch.testing.assert_close(model.kl(post, prior, 0.0)[0], expected)
    free = expected.median().item()
    torch.testing.assert_close(model.kl(post, prior, free)[1], expected.clamp(min=free))


def test_heads_do_not_see_the_order_of_slots():
    model, order = make(slot_mode="per_slot"), torch.tensor([2, 0, 1])
    feature = model.filter(make_batch(), generator=generator()).feature
    permuted = feature[:, :, order]
    torch.testing.assert_close(model.reward(permuted).logits, model.reward(feature).logits)
    torch.testing.assert_close(model.decoder(permuted)["state"].mode, model.decoder(feature)["state"].mode)
    torch.testing.assert_close(model.decoder(permuted)["image"].mode, model.decoder(feature)["image"].mode)


@variants
@pytest.mark.parametrize("context", [1, 3])
def test_replay_context(context, options):
    """What a replay keeps says how a sequence goes on: the state, and where slots start."""
    model, batch = make(replay_context=context, **options), make_batch()
    post = model.filter(batch, generator=generator())
    batch |= model.pack(post)
    slots = dict(slots=((K, D), "bfloat16")) if model.encoder.slots.carries else {}
    lead = (K,) if model.per_slot else ()
    stoch = ((*lead, 3), "uint8" if model.config.classes else "bfloat16")
    assert model.latent_spec == {"deter": ((*lead, 16), "bfloat16"), "stoch": stoch, **slots}
    packed = {name: (tuple(batch[name].shape), batch[name].dtype) for name in model.latent_spec}
    assert packed == {n: ((T, B, *shape), getattr(torch, d)) for n, (shape, d) in model.latent_spec.items()}
    rest, state = model.replay_context(batch, generator())
    assert not state.feature.requires_grad
    if context == 1:
        torch.testing.assert_close(state.feature, post[0].feature.detach(), rtol=2**-7, atol=2**-8)
        if slots:
            torch.testing.assert_close(state.slots, post[0].slots.detach(), rtol=2**-7, atol=0)
    out = model.loss(rest, generator(), state)
    going_on = model.filter(rest, state, generator())
    torch.testing.assert_close(out.post.feature, going_on.feature)


def test_gaussian_slots_keep_their_draw_through_an_episode():
    model, batch = make(slot_initial="gaussian"), make_batch()
    post = model.filter(batch, generator=generator())
    slots = post.slots
    assert torch.equal(slots[:, 1:], slots[:1, 1:].expand_as(slots[:, 1:]))
    assert torch.equal(slots[:3, 0], slots[:1, 0].expand(3, -1, -1))
    assert torch.equal(slots[3:, 0], slots[3:4, 0].expand(3, -1, -1))
    assert not torch.equal(slots[0, 0], slots[3, 0])
    again = model.filter({name: x[1:] for name, x in batch.items()}, post[0], generator())
    assert torch.equal(again.slots[:, 1], slots[1:, 1])


# -- Agent ------------------------------------------------------------------------------------------------------------

OBSERVATION = spaces.Dict(
    {name: spaces.Box(0, 255, shape, np.uint8) for name, shape in SHAPES.items() if len(shape) == 3}
    | {"state": spaces.Box(-np.inf, np.inf, (4,), np.float32)}
)


def make_agent(discrete=False, **options):
    space = spaces.Discrete(A) if discrete else spaces.Box(-1, 1, (A,), np.float32)
    return DreamerAgent(DreamerConfig(**(TINY | options)), OBSERVATION, space)


def observe(seed=0, n=3):
    rng = np.random.default_rng(seed)
    return {name: space.dtype.type(rng.uniform(0, 255, (n, *space.shape))) for name, space in OBSERVATION.items()}


@variants
def test_update_learns_a_fixed_batch(options):
    agent = make_agent(learning_rate=3e-3, **options)
    assert isinstance(agent.model, PhyXDreamer)
    batch = make_batch()
    history = [agent.update(batch) for _ in range(30)]
    assert all(np.isfinite(float(x)) for update in history for x in update.metrics.values())
    first, last = (float(history[i].metrics["loss/image"]) for i in (0, -1))
    assert last < 0.9 * first
    assert {name: tuple(x.shape) for name, x in history[0].latents.items()} == {
        name: (T, B, *shape) for name, (shape, _) in agent.latent_spec.items()
    }
    assert history[0].model_loss.shape == (T, B)


def test_update_moves_everything():
    agent = make_agent(slot_mode="per_slot", discrete=True)
    batch = make_batch()
    batch["action"] = batch["action"].argmax(-1).int()
    before = {n: p.detach().clone() for n, p in agent.model.named_parameters()}
    for _ in range(3):
        agent.update(batch)
    assert [n for n, p in agent.model.named_parameters() if torch.equal(p, before[n])] == []


@variants
def test_acting_filters_as_training_does(options):
    """Step by step with the carry, and one sequence with the stored actions, reach the same distributions."""
    agent = make_agent(**options)
    carry, actions, states = None, [np.zeros((3, A), np.float32)], []
    for i in range(4):
        action, carry = agent.act(observe(i), np.full(3, i == 0), carry)
        actions.append(action)
        states.append(carry.state)
    packed = agent.latents(carry)
    assert {n: tuple(x.shape) for n, x in packed.items()} == {n: (3, *s) for n, (s, _) in agent.latent_spec.items()}
    state = states[0]
    for t in range(1, 4):
        step = {name: torch.as_tensor(x)[None] for name, x in observe(t).items()}
        step |= {"action": torch.as_tensor(actions[t])[None], "is_first": torch.zeros(1, 3, dtype=torch.bool)}
        post = agent.model.world_model.filter(step, state)[0]
        state = states[t]
        torch.testing.assert_close(post.deter, state.deter)
        for name in ("logits", "mean", "std", "slots"):
            if getattr(state, name) is not None:
                torch.testing.assert_close(getattr(post, name), getattr(state, name))


@variants
def test_round_trip_continues_bit_exactly(options):
    agent, twin, batch = make_agent(**options), make_agent(seed=5, **options), make_batch()
    _, carry = agent.act(observe(), np.ones(3, bool))
    agent.update(batch)
    twin.load_tensors(agent.tensors())
    for _ in range(2):
        one, other = agent.update(batch), twin.update(batch)
        assert all(torch.equal(x, other.metrics[name]) for name, x in one.metrics.items())
    acted = [x.act(observe(1), np.zeros(3, bool), carry) for x in (agent, twin)]
    np.testing.assert_array_equal(acted[0][0], acted[1][0])


def test_pictures_that_cannot_be_handled():
    with pytest.raises(ConfigError, match=r"slot_mode: expected pictures, all of one size, got none"):
        make({"state": (4,)})
    with pytest.raises(ConfigError, match=r"slot_mode: .*image \(3, 9, 8\), wide \(3, 9, 16\); image_size"):
        make({"image": (3, 9, 8), "wide": (3, 9, 16)})


def test_preset():
    config = preset("phyxdream").resolve()
    assert (config.slot_mode, config.env_id) == ("embed", "gym:phyxdream/Sprites-v0")
    hands = {
        "phyxdream-hand": "envpool:HandManipulateBlockRotateZDense-v1",
        "phyxdream-hand-touch": "robotics:HandManipulateBlockRotateZ_BooleanTouchSensorsDense-v1",
        "phyxdream-leap": "envpool:LeapCubeReorient-v1",
    }
    for name, env in hands.items():
        config = preset(name).resolve()
        assert (config.slot_mode, config.env_id) == ("embed", env) and config.pixels and config.image_size == 64
    assert DreamerConfig().slot_mode is None
