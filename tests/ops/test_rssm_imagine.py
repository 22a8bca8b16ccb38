"""The imagine scan: what its reference must do, and C++ and Triton against it.

What the modules make of it is in tests/nn/test_rssm.py.
"""

import importlib
import itertools
import math
from functools import partial
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

from phyxdream import ops
from phyxdream.ops import rssm_cells
from phyxdream.ops.backend import BackendError, extension
from phyxdream.ops.rssm_cells import CELLS, POLICIES, HeadWeights, LayerWeights, Sizes
from phyxdream.ops.rssm_contract import NEEDED

op = importlib.import_module("phyxdream.ops.rssm_imagine")  # the package has the function under this name

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)

LATENTS = {"categorical": (3, 4), "gaussian": (5,)}
NORMS = {"none": (False, False), "rms": (True, False), "layer": (True, True)}
OWN_NORM = {"gru": "none", "layernorm_gru": "layer", "block_gru": "rms"}
LOOPS = ("open", *POLICIES)
KINDS = list(itertools.product(CELLS, LATENTS, LOOPS))


class Case:
    """Arguments of one call: tensors and weights by name, so that tests can change or differentiate any of them."""

    def __init__(
        self, kind="layernorm_gru", latent=(3, 4), loop="open", H=4, B=3, A=2, D=8, U=6, V=(7, 5), W=(6, 9), blocks=2,
        norm=None, dtype=torch.float64, seed=0, one_hot_start=False,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=g, dtype=dtype)
        uniform = partial(torch.rand, generator=g, dtype=dtype)
        self.loop, self.kind = loop, CELLS[kind]
        Z = math.prod(latent)
        self.noise = (uniform if len(latent) == 2 else normal)(H, B, *latent)
        self.action_noise = (uniform if loop == "categorical" else normal)(H, B, A)
        if loop == "tanh_normal":
            self.action_noise *= 0.1  # its deviation is 5, and where tanh is 1, its slope has no digits left
        self.tensors = dict(action=2 * normal(H, B, A), deter=normal(B, D), stoch=normal(B, *latent))
        if one_hot_start:
            self.tensors["stoch"] = F.one_hot(self.tensors["stoch"].argmax(-1), latent[1]).to(dtype)
        if loop != "open":
            del self.tensors["action"]
        gain, shift = NORMS[norm or OWN_NORM[kind]]

        def draw(name, shape):
            fan_in = shape[-1] if len(shape) == 2 else shape[-2] if len(shape) == 3 else 4
            drawn = normal(shape) / fan_in**0.5
            if "gates" in name:
                return drawn + 1 if name.endswith("gain") else drawn
            if name.endswith("gain"):
                return drawn + 1 if gain else None
            return None if name.endswith("shift") and not shift else drawn

        fields = {name: torch.empty(0) for name in self.kind._fields}
        fields["in_deter" if kind == "block_gru" else "in_stoch"] = torch.empty(U, 0)
        if kind == "block_gru":
            fields["mix_deter"] = torch.empty(blocks, 0, 0)
        shapes = self.kind(**fields).shapes(Sizes(0, A, D, Z))
        self.weights = {f"cell.{name}": draw(name, shape) for name, shape in shapes.items()}
        self.layers = {}
        heads = {"prior": (D, V, Z if len(latent) == 2 else 2 * Z)}
        if loop != "open":
            heads["policy"] = (D + Z, W, A if loop == "categorical" else 2 * A)
        for owner, (inputs, sizes, statistics) in heads.items():
            for i, size in enumerate(sizes):
                for part in LayerWeights._fields:
                    shape = (size, inputs) if part == "weight" else (size,)
                    self.weights[f"{owner}.{i}.{part}"] = draw(part, shape)
                inputs = size
            self.layers[owner] = len(sizes)
            self.weights[f"{owner}.out_weight"] = draw("out_weight", (statistics, inputs))
            self.weights[f"{owner}.out_bias"] = draw("out_bias", (statistics,))

    @property
    def inputs(self):
        """Everything that has a gradient, by name."""
        return {k: x for k, x in {**self.tensors, **self.weights}.items() if x is not None}

    def arguments(self, inputs=None, **options):
        inputs = {**self.inputs, **(inputs or {})}
        cell = self.kind(**{name: inputs.get(f"cell.{name}") for name in self.kind._fields})
        heads = []
        for owner, count in self.layers.items():
            layers = tuple(
                LayerWeights(*(inputs.get(f"{owner}.{i}.{part}") for part in LayerWeights._fields))
                for i in range(count)
            )
            heads.append(HeadWeights(layers, inputs[f"{owner}.out_weight"], inputs[f"{owner}.out_bias"]))
        first = inputs["action"] if self.loop == "open" else self.action_noise
        if self.loop != "open":
            options["dist"] = self.loop
        return (first, inputs["deter"], inputs["stoch"], self.noise, cell, *heads), options

    def to(self, *args):
        """Of another dtype or on another device."""
        for group in (self.tensors, self.weights):
            group.update({k: None if x is None else x.to(*args) for k, x in group.items()})
        self.noise, self.action_noise = self.noise.to(*args), self.action_noise.to(*args)
        return self

    @property
    def function(self):
        return ops.rssm_imagine if self.loop == "open" else ops.rssm_imagine_policy

    def call(self, inputs=None, **options):
        args, keywords = self.arguments(inputs, **options)
        return self.function(*args, **keywords)

    def run(self, backend, wanted=None, **options):
        """Results, and the gradients of the wanted inputs (or all) under fixed gradients of the results, by name."""
        leaves = {k: x.detach().requires_grad_(wanted is None or k in wanted) for k, x in self.inputs.items()}
        with ops.use_backend(backend):
            outputs = self.call(leaves, **options)
        g = torch.Generator().manual_seed(99)
        grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in outputs]
        leaves = {k: x for k, x in leaves.items() if x.requires_grad}
        outputs, grads = zip(*((x, d) for x, d in zip(outputs, grads, strict=True) if x.requires_grad), strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        results = {f"result {i}": x.detach() for i, x in enumerate(outputs)}
        return results | {f"grad of {k}": x for k, x in zip(leaves, found, strict=True)}


def assert_same(actual, expected, tolerance=1e-5):
    """By the norm of the difference over the norm: what is summed over thousands of terms has no better scale."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        scale = value.norm().item() or 1.0
        assert (actual[name] - value).norm().item() <= tolerance * scale, name


# ---------------------------------------------------------------------------------------------------------------------
# The reference.


@pytest.mark.parametrize(("kind", "loop"), [("gru", "open"), ("layernorm_gru", "bounded_normal"),
                                            ("block_gru", "tanh_normal")])  # fmt: skip
def test_gradcheck_of_the_reference(kind, loop):
    """Normal latents and actions, since a sampled class has no derivative; actions below 1, where block_gru's divisor
    is 1."""
    case = Case(kind, (2,), loop, H=3, B=2, A=2, D=4, U=3, V=(3,), W=(3,))
    if loop == "open":
        case.tensors["action"] *= 0.1
    names = list(case.inputs)

    def scan(*values):
        return case.call(dict(zip(names, values, strict=True)))

    values = [x.clone().requires_grad_() for x in case.inputs.values()]
    assert torch.autograd.gradcheck(scan, values, fast_mode=True)


@pytest.mark.parametrize("latent", LATENTS)
def test_no_embedding_tells_more_than_the_prior(latent):
    """Imagination is observation by a posterior that ignores what it sees and is the prior."""
    case = Case("block_gru", LATENTS[latent], V=(7,))
    args, _ = case.arguments()
    (layer,), out_weight, out_bias = args[5]
    blind = torch.cat([layer.weight, torch.zeros(7, 1, dtype=torch.float64)], 1)
    posterior = ops.PosteriorWeights(blind, *layer[1:], out_weight, out_bias)
    embed, is_first = torch.randn(4, 3, 1, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.bool)
    seen = ops.rssm_observe(embed, args[0], is_first, *args[1:5], posterior)
    for actual, expected in zip(case.call(), seen, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("loop", POLICIES)
def test_the_closed_loop_is_the_open_one_under_its_own_actions(loop):
    case = Case("layernorm_gru", loop=loop)
    *states, action = case.call()
    args, _ = case.arguments()
    for actual, expected in zip(ops.rssm_imagine(action, *args[1:6]), states, strict=True):
        torch.testing.assert_close(actual, expected)


def test_actions_follow_their_distribution():
    """Of 20,000 first actions: the share of each class, and mean and standard deviation of the normal."""
    B = 20_000
    for loop in ("categorical", "bounded_normal"):
        case = Case(loop=loop, H=1, B=B, A=3, norm="none")
        case.tensors = {k: x[:1].expand(B, *x.shape[1:]) for k, x in case.tensors.items()}
        args, _ = case.arguments()
        feature = torch.cat([args[1], args[2].flatten(1)], -1)[:1]
        statistics = rssm_cells.head(args[6], feature, rssm_cells.Options("silu", 0, 0, 0, 0))[0]
        action = case.call()[-1][0]
        if loop == "categorical":
            expected = 0.99 * statistics.softmax(-1) + 0.01 / 3
            assert (action.sum(-1) == 1).all()
            assert ((action.mean(0) - expected).abs() < 5 * (expected * (1 - expected) / B).sqrt()).all()
        else:
            mean, std = rssm_cells.action_moments(statistics, loop)
            assert ((action.mean(0) - mean).abs() < 5 * std / B**0.5).all()
            assert ((action.std(0) / std - 1).abs() < 5 / (2 * B) ** 0.5).all()


@pytest.mark.parametrize("loop", POLICIES)
def test_gradients_cross_steps_through_actions_and_classes(loop):
    """An action moves all that follows it: the policy learns from the last state alone."""
    case = Case(loop=loop)
    for wanted in ("policy.0.weight", "policy.out_bias", "deter", "stoch"):
        leaf = case.inputs[wanted].clone().requires_grad_()
        (grad,) = torch.autograd.grad(case.call({wanted: leaf})[2][-1].square().sum(), leaf)
        assert grad.abs().max() > 0, wanted


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("loop", POLICIES)
def test_a_policy_that_detaches_passes_the_start_no_gradient(loop, latent, backend):
    """What is left is the gradient under the same actions; and the policy still learns."""
    case = Case("gru", LATENTS[latent], loop, dtype=torch.float32)
    start = {k: case.tensors[k].clone().requires_grad_() for k in ("deter", "stoch")}
    weight = case.weights["policy.0.weight"].clone().requires_grad_()
    with ops.use_backend(backend):
        *states, action = case.call(start | {"policy.0.weight": weight}, detach_feature=True)
        args, _ = case.arguments(start)
        expected = ops.rssm_imagine(action.detach(), *args[1:6])
    of_states = lambda xs: sum((x * (i + 1)).square().sum() for i, x in enumerate(xs[:2]))  # noqa: E731
    *found, learned = torch.autograd.grad(of_states(states), [*start.values(), weight])
    for x, y in zip(found, torch.autograd.grad(of_states(expected), list(start.values())), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    assert learned.abs().max() > 0
    (kept,) = torch.autograd.grad(of_states(case.call(start)), start["deter"])
    assert not torch.allclose(kept, found[0], rtol=1e-2)


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("kind", CELLS)
def test_clipped_actions_lead_where_actions_within_bounds_do(kind, backend):
    """States and their gradients are those of the clipped actions; what the policy drew is returned as it is."""
    case = Case(kind, loop="bounded_normal", dtype=torch.float32)
    start = {k: case.tensors[k].clone().requires_grad_() for k in ("deter", "stoch")}
    with ops.use_backend(backend):
        *states, action = case.call(start, clip_action=True, policy_max_std=3.0, detach_feature=True)
        args, _ = case.arguments(start)
        expected = ops.rssm_imagine(action.detach().clamp(-1, 1), *args[1:6])
        *free, unclipped = case.call(policy_max_std=3.0)
    assert (action.abs() > 1).any()
    torch.testing.assert_close(unclipped[0], action[0])  # drawn at the same state
    for x, y in zip(states, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert torch.equal(free[0], states[0]) == (kind == "block_gru")  # which clips by itself
    total = lambda xs: sum((x * (i + 1)).square().sum() for i, x in enumerate(xs[:2]))  # noqa: E731
    leaves = list(start.values())
    for x, y in zip(*(torch.autograd.grad(total(xs), leaves) for xs in (states, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


def test_the_bound_of_a_clipped_action_gets_no_gradient():
    """By hand: beyond 1, d(a/|a|)/da is taken as 1/|a|."""
    action = torch.tensor([[-3.0, 0.5, 1.0, 2.0]], requires_grad=True)
    taken = rssm_cells.clip_action(action)
    assert taken.tolist() == [[-1.0, 0.5, 1.0, 1.0]]
    (grad,) = torch.autograd.grad(taken.sum(), action)
    torch.testing.assert_close(grad, torch.tensor([[1 / 3, 1.0, 1.0, 0.5]]))


# ---------------------------------------------------------------------------------------------------------------------
# C++ against the reference.


@needs_extension
@pytest.mark.parametrize(("kind", "latent", "loop"), KINDS)
@pytest.mark.parametrize(("H", "B"), [(4, 3), (1, 1), (2, 37)])
def test_cpu_agrees_with_the_reference(kind, latent, loop, H, B):
    case = Case(kind, LATENTS[latent], loop, H=H, B=B, dtype=torch.float32)
    found = {name: x.double() for name, x in case.run("cpu").items()}
    assert_same(found, case.to(torch.float64).run("reference"))  # in float32, it is further off than C++


@needs_extension
@pytest.mark.parametrize(("kind", "loop"), list(itertools.product(CELLS, ("open", "categorical", "tanh_normal"))))
@pytest.mark.parametrize(
    "sizes",
    [
        dict(D=34, U=19, V=(33,), W=(18, 3, 40), latent=(3, 17), A=1),  # no size a multiple of a tile, blocks of 17
        dict(D=64, U=48, V=(16, 16, 16), W=(16,), latent=(8, 32), A=20, B=150),  # blocks of sequences, the last short
        dict(D=12, U=70, V=(5,), W=(5, 5), latent=(40,), blocks=1, A=17, B=70),
        dict(D=300, U=200, V=(200,), W=(200, 100), latent=(4, 24), H=3, B=20),  # enough for threads to share
    ],
    ids=str,
)
def test_cpu_agrees_at_odd_sizes(kind, loop, sizes):
    case = Case(kind, loop=loop, dtype=torch.float32, **sizes)
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
@pytest.mark.parametrize(("kind", "norm"), list(itertools.product(CELLS, NORMS)))
@pytest.mark.parametrize(("act", "policy_act"), [("silu", "relu"), ("elu", None), ("relu", "elu")])
def test_cpu_takes_every_norm_and_these_activations(kind, norm, act, policy_act):
    case = Case(kind, loop="bounded_normal", norm=norm, dtype=torch.float32)
    options = dict(act=act, policy_act=policy_act)
    assert_same(case.run("cpu", **options), case.run("reference", **options))


@needs_extension
@pytest.mark.parametrize(
    ("loop", "options"),
    [
        ("categorical", dict(unimix=0.0, policy_unimix=0.3)),
        ("categorical", dict(unimix=0.3, policy_unimix=0.0)),
        ("categorical", dict(gumbel=True)),
        ("open", dict(gumbel=True, unimix=0.0)),
        ("bounded_normal", dict(policy_min_std=0.3, policy_max_std=2.5)),
        ("tanh_normal", dict(rms_eps=0.1, layer_eps=0.2)),
        *((loop, dict(detach_feature=True)) for loop in POLICIES),
        *((loop, dict(clip_action=True, policy_max_std=2.5)) for loop in POLICIES),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", CELLS)
def test_cpu_takes_the_options(kind, loop, options):
    case = Case(kind, loop=loop, dtype=torch.float32)
    assert_same(case.run("cpu", **options), case.run("reference", **options))


@needs_extension
@pytest.mark.parametrize("loop", ["open", "categorical"])
@pytest.mark.parametrize("kind", CELLS)
def test_cpu_takes_one_number_a_variable(kind, loop):
    case = Case(kind, loop=loop, latent=(6, 19), B=21, dtype=torch.float32)
    case.noise = case.noise[..., 0]
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
def test_cpu_takes_min_std():
    case = Case("gru", (5,), dtype=torch.float32)
    assert_same(case.run("cpu", min_std=0.7), case.run("reference", min_std=0.7))


@needs_extension
@pytest.mark.parametrize("kind", CELLS)
def test_optional_biases_may_be_left_out(kind):
    case = Case(kind, loop="categorical", dtype=torch.float32)
    for name in case.weights:
        if name.endswith("bias") and name.split(".")[-1] not in NEEDED:
            case.weights[name] = None
    assert_same(case.run("cpu"), case.run("reference"))


WANTED = {
    "actor": lambda name: name.startswith("policy"),
    "actor and start": lambda name: name.startswith("policy") or name in ("deter", "stoch"),
    "model": lambda name: name.startswith(("cell", "prior")),
    "start": lambda name: name == "stoch",
    "one gain": lambda name: name == "policy.0.gain",
    "one weight": lambda name: name == "cell.in_stoch",
    "a bias of the prior": lambda name: name == "prior.0.bias",
}


@needs_extension
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("kind", CELLS)
def test_only_what_is_wanted_has_a_gradient(kind, latent, wanted):
    case = Case(kind, LATENTS[latent], "bounded_normal", norm="layer", dtype=torch.float32)
    names = [name for name in case.inputs if WANTED[wanted](name)]
    expected, actual = case.run("reference", names), case.run("cpu", names)
    assert set(actual) == set(expected)
    assert_same(actual, expected)


@needs_extension
@pytest.mark.parametrize(("kind", "latent", "loop"), KINDS)
def test_without_gradients_the_results_are_the_same(kind, latent, loop):
    """Then no tape is kept."""
    case = Case(kind, LATENTS[latent], loop, B=150, dtype=torch.float32, one_hot_start=latent == "categorical")
    with ops.use_backend("cpu"):
        taped = case.call({k: x.clone().requires_grad_() for k, x in case.inputs.items()})
        for actual, expected in zip(case.call(), taped, strict=True):
            assert torch.equal(actual, expected)


@needs_extension
@pytest.mark.parametrize("loop", LOOPS)
def test_any_strides(loop):
    case = Case("block_gru", loop=loop, dtype=torch.float32)
    expected = case.run("cpu")

    def strided(x):
        if x is None:
            return None
        wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)
        return wide.movedim(0, -1).contiguous().movedim(-1, 0)[..., 0] if x.dim() > 1 else wide[..., 0]

    for group in (case.tensors, case.weights):
        group.update({k: strided(x) for k, x in group.items()})
    case.noise, case.action_noise = strided(case.noise), strided(case.action_noise)
    assert not case.noise.is_contiguous()
    assert_same(case.run("cpu"), expected, 1e-6)


@needs_extension
@pytest.mark.parametrize(("latent", "loop"), list(itertools.product(LATENTS, LOOPS)))
def test_a_loss_may_leave_out_results(latent, loop):
    case = Case("layernorm_gru", LATENTS[latent], loop, B=16, A=5, dtype=torch.float32)
    for i in range(4):
        grads = []
        for backend in ("cpu", "reference"):
            leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
            with ops.use_backend(backend):
                results = case.call(leaves)
            if i < len(results):
                weights = torch.randn(results[i].shape, generator=torch.Generator().manual_seed(i))
                (results[i] * weights).sum().backward()
            grads.append({k: x.grad for k, x in leaves.items() if x.grad is not None and x.grad.any()})
        assert_same(*grads)


@needs_extension
@pytest.mark.parametrize("B", [20, 150])
def test_the_number_of_threads_changes_no_bit(B):
    """Threads share the features of few sequences, and share out many."""
    case = Case(loop="categorical", D=100, U=100, V=(100,), latent=(4, 24), H=2, B=B, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run("cpu")
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same(case.run("cpu"), expected, 0.0)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Triton.


def launched_as(shape):
    kernels = importlib.import_module("phyxdream.kernels.rssm_scan")
    return mock.patch.object(kernels, "choose_shape", lambda *args: shape)


def triton_run(case, shape, wanted=None, **options):
    with launched_as(shape):
        return case.run("triton", wanted, **options)


def results(case, backend, shape=None, **options):
    """Without gradient, by name."""
    with launched_as(shape), ops.use_backend(backend), torch.no_grad():
        return {f"result {i}": x for i, x in enumerate(case.call(**options))}


def check_loops_in_the_interpreter():
    """Each with one cell and one kind of latent."""
    kinds = ("gru", "layernorm_gru", "block_gru", "gru")
    for kind, loop, latent in zip(kinds, LOOPS, itertools.cycle(LATENTS), strict=False):
        case = Case(kind, LATENTS[latent], loop, H=2, dtype=torch.float32)
        expected = case.run("reference")
        assert_same(triton_run(case, "tile"), expected)
        found = results(case, "triton", "tile")  # without a tape
        assert_same(found, {name: expected[name] for name in found})


def check_all_kinds_in_the_interpreter():
    for kind, latent, loop in KINDS:
        case = Case(kind, LATENTS[latent], loop, H=3, dtype=torch.float32)
        expected = case.run("reference")
        for shape in ("tile", "persistent", "split"):
            assert_same(triton_run(case, shape), expected)
            found = results(case, "triton", shape)
            assert_same(found, {name: expected[name] for name in found})


def check_shapes_in_the_interpreter():
    """Beside one program: the phases one by one, with a program per tile, and one program that meets itself."""
    odd = dict(D=34, U=19, V=(33,), W=(18, 35), latent=(3, 17), A=1, H=2, B=17, dtype=torch.float32)
    case, options = Case("layernorm_gru", loop="tanh_normal", norm="layer", **odd), dict(act="relu", policy_act="elu")
    assert_same(triton_run(case, "split", **options), case.run("reference", **options))
    small = dict(D=6, U=5, V=(4, 35, 3), W=(5,), latent=(20, 2), A=19, H=2, blocks=3, dtype=torch.float32)
    for kind, loop in (("gru", "open"), ("block_gru", "categorical")):
        case, options = Case(kind, loop=loop, norm="rms", **small), dict(unimix=0.0, rms_eps=0.1)
        if loop != "open":
            options["policy_unimix"] = 0.3
        assert_same(triton_run(case, "persistent", **options), case.run("reference", **options))
    options = dict(policy_min_std=0.3, policy_max_std=2.5, min_std=0.7, policy_unimix=0.0)
    case = Case("block_gru", (5,), "bounded_normal", H=1, B=1, norm="none", dtype=torch.float32)
    assert_same(triton_run(case, "split", **options), case.run("reference", **options))
    case = Case("gru", loop="categorical", H=2, dtype=torch.float32)
    assert_same(triton_run(case, "tile", gumbel=True), case.run("reference", gumbel=True))
    case.noise = case.noise[..., 0].contiguous()
    assert_same(triton_run(case, "split"), case.run("reference"))
    options = dict(detach_feature=True, clip_action=True, policy_max_std=2.5)
    for latent, shape, loop in (((3, 4), "tile", "tanh_normal"), ((5,), "split", "bounded_normal")):
        case = Case("layernorm_gru", latent, loop, H=3, dtype=torch.float32)
        assert_same(triton_run(case, shape, **options), case.run("reference", **options))


def check_what_else_triton_takes_in_the_interpreter():
    case = Case("block_gru", loop="bounded_normal", H=2, dtype=torch.float32)
    for name in case.weights:
        if name.endswith("bias") and name.split(".")[-1] not in NEEDED:
            case.weights[name] = None
    case.tensors = {k: x.movedim(0, -1).contiguous().movedim(-1, 0) for k, x in case.tensors.items()}
    case.action_noise = case.action_noise.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(triton_run(case, "tile"), case.run("reference"))  # no biases, other strides

    case = Case("gru", loop="categorical", norm="layer", H=2, dtype=torch.float32)
    for wanted in (("policy.0.weight", "policy.out_bias"), ("stoch", "prior.1.gain", "cell.in_action")):
        assert_same(triton_run(case, "tile", wanted), case.run("reference", wanted))
    grads = []
    for backend in ("triton", "reference"):  # of a loss that leaves out results
        leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
        with ops.use_backend(backend):
            case.call(leaves)[0].square().sum().backward()
        grads.append({k: x.grad for k, x in leaves.items() if x.grad is not None and x.grad.any()})
    assert_same(*grads)

    # float16 rounds at 2⁻¹¹ what enters every product; the interpreter knows no bfloat16. Noise may be precise.
    case = Case("layernorm_gru", (5,), "bounded_normal", H=2, dtype=torch.float32)
    noise = case.noise, case.action_noise
    case.to(torch.float16)
    case.noise, case.action_noise = noise
    got = triton_run(case, "tile")
    assert all(x.dtype is torch.float16 for x in got.values())
    expected = case.to(torch.float32).run("reference")
    assert_same({k: x.float() for k, x in got.items()}, expected, 5e-3)

    case = Case(loop="categorical", dtype=torch.float32)
    args, keywords = case.arguments()
    with ops.use_backend("triton"):
        reasons = ops.explain(ops.rssm_imagine_policy, *args, **keywords).reasons["triton"]
        assert "tile scan: 1 program of 32 features for each of 1 tiles of 16 sequences" in reasons
        with pytest.raises(BackendError, match="activations silu, elu, relu, not tanh"):
            case.call(policy_act="tanh")
        with pytest.raises(BackendError, match=r"at most 256 actions; action_noise is \(4, 3, 300\)"):
            Case(loop="categorical", A=300, dtype=torch.float32).call()


@pytest.mark.parametrize(
    "check",
    [check_loops_in_the_interpreter, check_shapes_in_the_interpreter, check_what_else_triton_takes_in_the_interpreter],
)
def test_triton_in_the_interpreter(run_interpreted, check):
    run_interpreted(check)


@pytest.mark.slow
def test_triton_in_the_interpreter_with_every_loop(run_interpreted):
    run_interpreted(check_all_kinds_in_the_interpreter)


# V1, then early V3, then V3's sizes 12M and 50M, each with its actor.
MODELS = {
    "V1": dict(kind="gru", loop="tanh_normal", D=200, U=200, V=(200,), W=(400,) * 4, latent=(30,)),
    "512": dict(kind="layernorm_gru", loop="categorical", D=512, U=512, V=(512,), W=(512,) * 3, latent=(32, 32)),
    "12M": dict(kind="block_gru", loop="bounded_normal", D=2048, U=256, V=(256,) * 2, W=(256,) * 3, latent=(32, 16),
                blocks=8),
    "50M": dict(kind="block_gru", loop="bounded_normal", D=4096, U=512, V=(512,) * 2, W=(512,) * 3, latent=(32, 32),
                blocks=8),
}  # fmt: skip


def assert_compiles_and_fits(assert_launches_fit, model, dtype, taped, direction="forward"):
    """What is launched where a batch of 16 sequences of 64 steps is imagined from."""
    kernels = pytest.importorskip("phyxdream.kernels.rssm_scan")

    def call():
        case = Case(H=15, B=1024, A=6, dtype=dtype, **MODELS[model])
        args, keywords = case.arguments({k: x.requires_grad_(taped) for k, x in case.inputs.items()})
        args = op._prepare(*args, **keywords, clip_action=True)
        outputs = op._triton_forward(*args)
        if direction == "backward":
            wanted = [False, True, True, False] + [True] * len(args[4])
            op._triton_backward(*outputs[:4], wanted, *outputs, *args)

    with torch.set_grad_enabled(taped):
        assert_launches_fit(call, kernels, f"{direction}_kernel")


def test_triton_compiles_and_fits(assert_launches_fit):
    """The largest in one kernel."""
    assert_compiles_and_fits(assert_launches_fit, "V1", torch.bfloat16, True, "backward")


@pytest.mark.slow
@pytest.mark.parametrize(("taped", "direction"), [(False, "forward"), (True, "forward"), (True, "backward")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_triton_compiles_and_fits_at_all_sizes(assert_launches_fit, model, dtype, taped, direction):
    assert_compiles_and_fits(assert_launches_fit, model, dtype, taped, direction)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["tile", "persistent", "split"])
@pytest.mark.parametrize(("kind", "latent", "loop"), KINDS)
def test_triton_on_a_gpu(kind, latent, loop, shape):
    odd = dict(D=136, U=70, V=(33, 20), W=(50, 40), A=5, B=19, H=7)
    large = dict(D=512, U=256, V=(320,), W=(400,), A=6, B=128, H=5, blocks=8)
    for sizes in ({}, odd, large):
        classes = (12, 17) if latent == "categorical" else (30,)
        case = Case(kind, classes, loop, dtype=torch.float32, **sizes).to("cuda")
        expected = case.run("reference")
        assert_same(triton_run(case, shape), expected)
        # bfloat16 rounds at 2⁻⁸, and so draws other classes now and then: only Gaussians stay near.
        if latent == "gaussian" and loop in ("open", "bounded_normal"):
            got = results(case.to(torch.bfloat16), "triton", shape)
            assert_same({k: x.float() for k, x in got.items()}, {k: expected[k] for k in got}, 5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["tile", "persistent", "split"])
def test_triton_in_a_cuda_graph(shape):
    case = Case("block_gru", loop="categorical", H=5, B=16, D=64, U=32, dtype=torch.float32).to("cuda")
    expected = results(case, "reference")
    with torch.cuda.stream(torch.cuda.Stream()):
        results(case, "triton", shape)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(case, "triton", shape)
    for _ in range(2):
        for x in got.values():
            x.zero_()
        graph.replay()
        assert_same(got, expected)


# ---------------------------------------------------------------------------------------------------------------------
# torch.library, torch.compile, autocast.


@needs_extension
@pytest.mark.parametrize(("kind", "loop"), [("gru", "open"), ("layernorm_gru", "categorical"),
                                            ("block_gru", "tanh_normal")])  # fmt: skip
@pytest.mark.parametrize("latent", LATENTS)
def test_opcheck(kind, latent, loop):
    case = Case(kind, LATENTS[latent], loop, H=2, dtype=torch.float32)
    args, keywords = case.arguments({k: x.clone().requires_grad_() for k, x in case.inputs.items()})
    registered = getattr(torch.ops.phyxdream, case.function.__name__).default
    opcheck(registered, op._prepare(*args, **keywords))


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize(("kind", "loop"), [("gru", "open"), ("block_gru", "bounded_normal")])
def test_compiles_as_one_graph(kind, loop, backend):
    case = Case(kind, loop=loop, H=2, dtype=torch.float32)
    expected = case.run(backend)
    eager = case.call
    torch.compiler.reset()  # a compiled function keeps the backend it was traced with
    case.call = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_same(case.run(backend), expected, 1e-6)


@needs_extension
def test_autocast_computes_in_float32():
    case = Case(dtype=torch.float32)
    half = {"action": case.tensors["action"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend("cpu"):
        outputs = case.call(half)
    case.tensors["action"] = half["action"].float()
    assert all(x.dtype is torch.float32 for x in outputs)
    torch.testing.assert_close(outputs[0], case.run("cpu")["result 0"], rtol=0, atol=0)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("loop", ["open", "bounded_normal"])
def test_half_precision_is_rounded_once(loop, latent):
    """And noise may be precise."""
    case = Case(latent=LATENTS[latent], loop=loop, dtype=torch.float32)
    noise = case.noise, case.action_noise
    case.to(torch.bfloat16)
    case.noise, case.action_noise = noise
    half = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
    precise = {k: x.float().requires_grad_() for k, x in case.inputs.items()}
    with ops.use_backend("reference"):
        outputs, expected = case.call(half), case.call(precise)
    assert all(x.dtype is torch.bfloat16 for x in outputs)
    for x, y in zip(outputs[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y.bfloat16(), rtol=0, atol=0)
    for scan in (outputs, expected):
        scan[0].sum().backward()
    for name, x in half.items():
        if x.grad is not None:
            torch.testing.assert_close(x.grad, precise[name].grad.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("loop", ["open", "categorical"])
def test_autocast_on_cuda_computes_in_its_dtype(loop):
    """By what enters the op; the tensors are on a GPU that need not exist."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            case = Case(loop=loop, dtype=torch.float32)
            for group in (case.tensors, case.weights):
                group |= {k: torch.empty_like(x, device="cuda") for k, x in group.items() if x is not None}
            noises = case.noise, case.action_noise
            case.noise, case.action_noise = (torch.empty_like(x, device="cuda") for x in noises)
            args, keywords = case.arguments()
            args = op._prepare(*args, **keywords)
            outputs = op._fake(*args[:-1], True)  # with a tape
    finally:
        torch.set_autocast_enabled("cuda", False)
    half = torch.get_autocast_dtype("cuda")
    first, deter, stoch, noise, weights = args[:5]
    assert noise.dtype is torch.float32
    assert first.dtype is (half if loop == "open" else torch.float32)
    assert {x.dtype for x in (deter, stoch, *weights)} == {half}
    assert [x.dtype for x in outputs] == [half] * 4 + [torch.float32, torch.int32]
    assert outputs[4].numel() > 0


@needs_extension
def test_a_second_derivative_is_refused():
    case = Case(loop="categorical", dtype=torch.float32)
    deter = case.tensors["deter"].requires_grad_()
    with ops.use_backend("cpu"):
        result = case.call()[0]
    (grad,) = torch.autograd.grad(result.sum(), deter, create_graph=True)
    with pytest.raises(RuntimeError, match="rssm_imagine_policy is differentiable once"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Choice of backend, errors.


@needs_extension
def test_explain():
    args, keywords = Case(dtype=torch.float32).arguments()
    explanation = ops.explain(ops.rssm_imagine, *args, **keywords)
    assert explanation.backend == "cpu"
    assert "1 group of 16 sequences" in explanation.reasons["cpu"]
    args, keywords = Case(H=1, dtype=torch.float32).arguments()
    assert ops.explain(ops.rssm_imagine, *args, **keywords).backend == "reference"
    args, keywords = Case(loop="categorical", B=200, dtype=torch.float32).arguments()
    explanation = ops.explain(ops.rssm_imagine_policy, *args, **keywords)
    assert "each with sequences of its own" in explanation.reasons["cpu"]
    keywords["policy_act"] = "gelu"
    assert ops.explain(ops.rssm_imagine_policy, *args, **keywords).backend == "reference"
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="activations silu, elu, relu, not gelu"):
        ops.rssm_imagine_policy(*args, **keywords)


def tensor(**changes):
    return lambda case: case.tensors.update({k: f(case.tensors[k]) for k, f in changes.items()})


def weight(name, value):
    return lambda case: case.weights.update({name: value})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (tensor(deter=lambda x: x[0]), ValueError, r"deter: expected shape \(3, D\), got \(8,\)"),
        (tensor(deter=lambda x: x[1:]), ValueError, r"deter: expected shape \(3, D\), got \(2, 8\)"),
        (tensor(stoch=lambda x: x[..., 0]), ValueError, r"stoch: expected shape \(3, 3, 4\), got \(3, 3\)"),
        (tensor(deter=lambda x: x.float()), TypeError, r"dtype of deter, .*32, got action_noise torch.float64"),
        (tensor(stoch=lambda x: x.numpy()), TypeError, r"stoch: expected a tensor, got ndarray"),
        (tensor(stoch=lambda x: x.long()), TypeError, r"stoch: expected a floating-point tensor, got torch.int64"),
        (lambda case: setattr(case, "noise", case.noise[0, 0]), ValueError, r"noise: expected shape .*got \(3, 4\)"),
        (lambda case: setattr(case, "action_noise", case.action_noise[1:]), ValueError,
         r"action_noise: expected shape \(4, 3, A\), got \(3, 3, 2\)"),
        (lambda case: setattr(case, "action_noise", case.action_noise[..., :0]), ValueError,
         r"expected no empty axis, got .*'A': 0"),
        (weight("cell.in_action", torch.zeros(6, 3)), ValueError, r"cell.in_action: expected shape \(6, 2\), got"),
        (weight("prior.0.gain", None), ValueError, r"prior.layers\[0\].gain: .*beside the shift of a LayerNorm"),
        (weight("prior.1.weight", torch.zeros(5, 3)), ValueError, r"prior.layers\[1\].weight: expected shape \(5, 7\)"),
        (weight("policy.0.weight", torch.zeros(6, 8)), ValueError, r"policy.layers\[0\].weight: .*\(6, 20\), got"),
        (weight("policy.out_bias", torch.zeros(4)), ValueError, r"policy.out_bias: expected shape \(2,\), got \(4,\)"),
        (weight("policy.0.weight", None), TypeError, r"policy.layers\[0\].weight: expected a tensor, got NoneType"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    case = Case(loop="categorical")
    change(case)
    with pytest.raises(error, match=message):
        case.call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(unimix=1.0), ValueError, r"unimix: expected a number in \[0, 1\), got 1.0"),
        (dict(policy_unimix=-0.1), ValueError, r"policy_unimix: expected a number in \[0, 1\), got -0.1"),
        (dict(min_std=float("nan")), ValueError, r"min_std: .*got nan"),
        (dict(policy_max_std="1"), TypeError, r"policy_max_std: expected a number, got str"),
        (dict(act="swish"), ValueError, r"act: expected one of .*'swish'"),
        (dict(policy_act="swish"), ValueError, r"policy_act: expected one of .*'swish'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Case(loop="categorical").call(**options)


def test_bad_weights():
    args, keywords = Case(loop="categorical").arguments()
    imagine = partial(ops.rssm_imagine_policy, *args[:4], **keywords)
    with pytest.raises(TypeError, match=r"cell: expected one of GRUWeights, .*got dict"):
        imagine({}, *args[5:])
    with pytest.raises(TypeError, match="prior: expected HeadWeights, got NoneType"):
        imagine(args[4], None, args[6])
    with pytest.raises(TypeError, match=r"policy.layers\[0\]: expected LayerWeights, got tuple"):
        imagine(args[4], args[5], args[6]._replace(layers=(tuple(args[6].layers[0]),)))
    with pytest.raises(ValueError, match=r"prior.layers: expected at least one layer, got none"):
        imagine(args[4], args[5]._replace(layers=()), args[6])
    with pytest.raises(ValueError, match=r"dist: expected one of .*got 'normal'"):
        ops.rssm_imagine_policy(*args, dist="normal")
