"""`DreamerConfig`: names, filling in, checks, and the trip through JSON."""

import json
import math
from dataclasses import fields, replace

import pytest

from phyxdream.agents import PRESETS, SIZES, DreamerConfig, preset
from phyxdream.errors import ConfigError


def test_the_names_of_the_literature_exist():
    config = DreamerConfig()
    config.env_backend = "gym"
    config.env = "Pendulum-v1"
    config.total_steps = 1_000_000
    config.stoch_size, config.deter_size, config.embed_size = 30, 200, 1024
    config.imagine_horizon, config.discount, config.td_lambda, config.kl_loss_coeff = 15, 0.99, 0.95, 1.0
    resolved = config.resolve()
    assert resolved.env_id == "gym:Pendulum-v1"
    assert (resolved.deter_size, resolved.embed_size) == (200, 1024)


@pytest.mark.parametrize(
    ("backend", "env", "expected"),
    [
        ("envpool", "Catch-v0", "envpool:Catch-v0"),
        ("gym", "dmc:walker_walk", "dmc:walker_walk"),
        ("unity_mlagents", "build/Game", "unity:build/Game"),
    ],
)
def test_env_id(backend, env, expected):
    assert DreamerConfig(env_backend=backend, env=env).env_id == expected


# deter, hidden, classes as the paper's table gives them; units follow hidden, depth is units / 16.
TABLE = {
    "1m": (512, 64, 4), "12m": (2048, 256, 16), "25m": (3072, 384, 24), "50m": (4096, 512, 32),
    "100m": (6144, 768, 48), "200m": (8192, 1024, 64), "400m": (12288, 1536, 96),
}  # fmt: skip


def test_sizes():
    assert SIZES.keys() == TABLE.keys()
    for size, (deter, hidden, classes) in TABLE.items():
        config = DreamerConfig(size=size).resolve()
        assert (config.deter_size, config.hidden_size, config.classes) == (deter, hidden, classes)
        assert (config.units, config.depth, config.stoch_size) == (hidden, hidden // 16, 32)


def test_explicit_values_win_and_the_original_stays():
    config = DreamerConfig(size="1m", classes=0, units=100)
    resolved = config.resolve()
    assert (resolved.classes, resolved.units, resolved.deter_size) == (0, 100, 512)
    assert config.deter_size is None
    assert resolved.resolve() == resolved
    # What has no rule stays None: "the environment's own".
    assert (resolved.time_limit, resolved.actor_dist, resolved.imagine_last) == (None, None, None)


def test_the_defaults_are_those_of_dreamer_v3():
    config = DreamerConfig().resolve()
    published = dict(
        batch_size=16, batch_length=64, imagine_horizon=15, td_lambda=0.95, entropy_coeff=3e-4, learning_rate=4e-5,
        agc=0.3, beta1=0.9, beta2=0.999, adam_eps=1e-20, warmup=1000, unimix=0.01, free_nats=1.0, dynamics_coeff=1.0,
        representation_coeff=0.1, replay_critic_coeff=0.3, slow_critic_rate=0.02, slow_critic_coeff=1.0,
        return_norm_rate=0.01, blocks=8, cell="block_gru", actor_layers=3, critic_layers=3, reward_layers=1,
        continue_layers=1, encoder_layers=3, decoder_layers=3, act="silu", norm="rms", replay_context=1,
        replay_online=True, replay_selector="uniform",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    assert config.discount == pytest.approx(1 - 1 / 333)


BAD = [
    *((name, bad) for name, bad in [
        ("num_envs", 0), ("action_repeat", 0), ("time_limit", 0), ("image_size", 4), ("total_steps", 0),
        ("log_every", 0), ("eval_every", -1), ("eval_episodes", 0), ("checkpoint_every", -1.0),
        ("resume_replay_seconds", -1.0), ("replay_capacity", 0), ("prefill", -1), ("batch_size", 0),
        ("batch_length", 1), ("replay_context", -1), ("replay_prefetch", -1),
        ("deter_size", 0), ("hidden_size", 0), ("stoch_size", 0), ("classes", -1), ("blocks", 0),
        ("embed_size", 0), ("depth", 0), ("residual_blocks", -1), ("units", 0), ("encoder_layers", 0),
        ("decoder_layers", 0), ("reward_layers", 0), ("continue_layers", 0), ("actor_layers", 0), ("critic_layers", 0),
        ("reconstruction_coeff", -0.1), ("reward_coeff", -0.1), ("continue_coeff", -0.1), ("kl_loss_coeff", -0.1),
        ("dynamics_coeff", -0.1), ("representation_coeff", -0.1), ("free_nats", -0.1), ("imagine_horizon", 0),
        ("imagine_last", 1), ("entropy_coeff", -1e-9), ("slow_critic_coeff", -1.0), ("replay_critic_coeff", -1.0),
        ("adam_eps", -1.0), ("warmup", -1), ("seed", -1),
        ("train_ratio", 0.0), ("learning_rate", 0.0), ("agc", -0.3),
        ("discount", 1.01), ("td_lambda", -0.01), ("unimix", 1.0), ("beta1", 1.0), ("beta2", 1.0),
        ("slow_critic_rate", 1.5), ("return_norm_rate", 0.0), ("return_norm_rate", 1.1),
        ("replay_context", 1.0), ("replay_context", None), ("replay_prefetch", True),
        ("slots", 0), ("slot_size", 0), ("slot_iterations", 0), ("slot_depth", 0), ("slot_layers", 0),
        ("slot_stride", 0), ("slot_decoder_size", 0), ("slot_decoder_layers", 0), ("slot_patch", 0),
        ("exploration_noise", -0.1), ("slow_critic_every", 0), ("weight_decay", -1e-6), ("grad_clip", 0.0),
        ("actor_learning_rate", 0.0), ("critic_learning_rate", -1.0), ("actor_mix", 1.1),
        ("image_bits", 0), ("image_bits", 9), ("overshooting", -1), ("overshooting", 63), ("overshooting_coeff", -0.1),
        ("plan_horizon", 0), ("plan_candidates", 0), ("plan_iterations", 0), ("plan_elites", 0), ("plan_elites", 1001),
        ("slot_message_size", -1), ("slot_message_size", 6), ("l1_coeff", -0.1), ("slot_coeff", -1),
        ("mixtures", 0), ("population", 3), ("dreams", 0), ("evolve_after", -1), ("evolve_every", 0),
        ("dream_temperature", 0.0), ("cma_sigma", -0.1),
        ("contrastive_coeff", -0.1), ("crop_pixels", -1),
        ("actors", 0), ("actors", 2), ("publish_every", -1.0), ("control_rate", 0.0),
        ("depth_mults", ()), ("depth_mults", (2, 0)), ("depth_mults", (1.5,)),
    ]),
    # Of the wrong kind, or not finite.
    ("batch_size", 2.5), ("batch_size", None), ("batch_size", "16"), ("num_envs", True), ("total_steps", 1e6),
    ("entropy_coeff", math.nan), ("free_nats", math.inf), ("learning_rate", "4e-5"), ("learning_rate", math.nan),
    ("train_ratio", math.inf), ("discount", math.nan), ("discount", None), ("unimix", "0.01"), ("beta1", None),
    # Names.
    ("size", "13m"), ("env_backend", "openai"), ("cell", "lstm"), ("initial", "ones"), ("norm", "batch"),
    ("act", "swish"), ("actor_dist", "normal"), ("replay_selector", "newest"),
    ("agent", "dreamer_v4"), ("actor_gradient", "pathwise"), ("behaviour", "policy"), ("plan_noise", "none"),
    ("dream_start", "end"), ("conv_act", "swish"), ("clip_rewards", "clip"),
    ("representation", "rewards"), ("contrastive_critic", "dot"),
    ("actor_backend", "threads"),
    ("slot_mode", "slots"), ("slot_initial", "zeros"), ("slot_predictor", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_every_check_names_its_option(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: ") as caught:
        replace(DreamerConfig(), **{name: value}).resolve()
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


def test_every_number_is_checked():
    """No numeric option may be added without a bound."""
    checked = {name for name, _ in BAD}
    numeric = {f.name for f in fields(DreamerConfig) if f.type.split(" ")[0] in ("int", "float")} - {"camera"}
    assert numeric <= checked


def test_combinations():
    with pytest.raises(ConfigError, match="slot_mode: needs agent 'dreamer_v3', got 'dreamer_v1'"):
        DreamerConfig(slot_mode="embed", agent="dreamer_v1").resolve()
    with pytest.raises(ConfigError, match=r"deter_size: .*blocks=8.*got 100"):
        DreamerConfig(deter_size=100).resolve()
    DreamerConfig(deter_size=100, cell="gru").resolve()
    for context, smallest in ((0, 512), (1, 520), (3, 536)):
        options = dict(num_envs=8, batch_length=64, replay_context=context)
        DreamerConfig(**options, replay_capacity=smallest).resolve()
        with pytest.raises(ConfigError, match=rf"replay_capacity: .*{smallest} steps, got {smallest - 1}"):
            DreamerConfig(**options, replay_capacity=smallest - 1).resolve()
    with pytest.raises(ConfigError, match=r"imagine_last: .*64.*got 65"):
        DreamerConfig(imagine_last=65).resolve()


def test_options_of_the_environment():
    """Values are read as JSON or Python writes them; what is neither is text."""
    given = ("a=0.25", "b=true", "c=True", "d=[1, 2]", "e=None", "f=word", "g=", "h=x=y", 'i={"j": 1}', "k='1'",
             "m={[1]: 2}")  # fmt: skip
    expected = dict(a=0.25, b=True, c=True, d=[1, 2], e=None, f="word", g="", h="x=y", i={"j": 1}, k="1", m="{[1]: 2}")
    config = DreamerConfig(env_options=given).resolve()
    assert config.env_arguments == expected and DreamerConfig().env_arguments == {}
    for option, message in (("a", "expected NAME=VALUE, got 'a'"), ("a b=1", "expected NAME=VALUE"), ("=1", "got '=1'"),
                            ("seed=1", "seed is no option of the environment's own, got 'seed=1'")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"env_options: .*{message}"):
            DreamerConfig(env_options=(option,)).resolve()
    with pytest.raises(ConfigError, match="env_options: expected each option once, got a=1 a=2"):
        DreamerConfig(env_options=("a=1", "a=2")).resolve()


def test_the_predictor_of_slots():
    options = dict(slot_recurrent=True, slot_predictor=True)
    DreamerConfig(**options, slot_size=12).resolve()
    with pytest.raises(ConfigError, match=r"slot_size: .*multiple of 4.*got 10"):
        DreamerConfig(**options, slot_size=10).resolve()


def test_boundary_values_are_accepted():
    replace(
        DreamerConfig(), discount=1.0, td_lambda=0, unimix=0.0, return_norm_rate=1.0, warmup=0, classes=0, prefill=0,
        eval_every=0, replay_critic_coeff=0.0, imagine_last=64, replay_context=0, replay_prefetch=0, free_nats=0,
    ).resolve()  # fmt: skip


def test_unknown_attributes_are_refused():
    config = DreamerConfig()
    config.imagination_horizon = 10
    with pytest.raises(ConfigError, match="'imagination_horizon'; did you mean 'imagine_horizon'"):
        config.resolve()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_round_trip(name):
    config = preset(name, seed=3, depth_mults=(1, 2, 3), time_limit=None)
    assert DreamerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    resolved = config.resolve()
    assert DreamerConfig.from_dict(json.loads(json.dumps(resolved.to_dict()))).resolve() == resolved


def test_presets():
    assert preset("dreamer_v3") == DreamerConfig()
    assert preset("catch").preset == "catch"
    for name in PRESETS:
        preset(name).resolve()
    assert preset("catch", batch_size=4).batch_size == 4
    with pytest.raises(ConfigError, match=r"preset: .*'dreamerv3'.*did you mean 'dreamer_v3'"):
        preset("dreamerv3")
    with pytest.raises(ConfigError, match="'horizn'"):
        preset("catch", horizn=3)
    with pytest.raises(ConfigError, match="'batchsize'; did you mean 'batch_size'"):
        DreamerConfig.from_dict({"batchsize": 3})
