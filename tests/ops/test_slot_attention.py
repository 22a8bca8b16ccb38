"""Slot attention: its backward by hand against autograd, and C++ and Triton against the reference."""

import dataclasses
import importlib
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F

from phyxdream import ops
from phyxdream.ops import SlotAttentionWeights
from phyxdream.ops.backend import BackendError, extension

op = importlib.import_module("phyxdream.ops.slot_attention")  # the package has the function under this name

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)


class Case:
    """Arguments of one call: tensors and weights by name, so that tests can change or differentiate any of them."""

    def __init__(self, B=3, N=10, K=4, I=7, D=6, Q=5, H=9, dtype=torch.float64, seed=0, biases=False, **options):
        g = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=g, dtype=dtype)
        self.tensors = dict(inputs=2 * normal(B, N, I) + 1, slots=normal(B, K, D))
        names = {name: torch.empty(0) for name in SlotAttentionWeights._fields}
        left_out = () if biases else SlotAttentionWeights._field_defaults
        names |= dict(to_k=torch.empty(Q, 0), mlp_in=torch.empty(H, 0))
        self.weights = {}
        shapes = SlotAttentionWeights(**names).shapes(I, D)
        for name, shape in ((name, shape) for name, shape in shapes.items() if name not in left_out):
            self.weights[name] = normal(shape) / (shape[1] if len(shape) == 2 else 4) ** 0.5
            if name.endswith("_gain"):
                self.weights[name] += 1
        self.options = options

    def to(self, *to):
        """A copy on another device, or in another dtype."""
        other = object.__new__(type(self))
        other.tensors, other.weights = ({k: x.to(*to) for k, x in y.items()} for y in (self.tensors, self.weights))
        mask, device = self.options.get("slot_mask"), other.tensors["inputs"].device
        other.options = self.options | ({} if mask is None else {"slot_mask": mask.to(device)})
        return other

    @property
    def inputs(self):
        """Everything that has a gradient, by name."""
        return {**self.tensors, **self.weights}

    def call(self, inputs=None, **options):
        given = {**self.inputs, **(inputs or {})}
        weights = SlotAttentionWeights(*(given[name] for name in self.weights))
        return ops.slot_attention(given["inputs"], given["slots"], weights, **{**self.options, **options})

    def run(self, backend, **options):
        """Results, and the gradients of all inputs under fixed gradients of the results, by name."""
        leaves = {k: x.detach().requires_grad_() for k, x in self.inputs.items()}
        with ops.use_backend(backend):
            outputs = [x for x in self.call(leaves, **options) if x is not None]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads_of(outputs), allow_unused=True)
        results = {k: x.detach() for k, x in zip(["slots", "attention"], outputs, strict=False)}
        return results | {f"grad of {k}": x for k, x in zip(leaves, found, strict=True) if x is not None}


def grads_of(outputs):
    g = torch.Generator().manual_seed(99)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in outputs]


def assert_same(actual, expected, tolerance=1e-5):
    """By the norm of the difference over the norm: what is summed over thousands of terms has no better scale.

    What moves all slots alike leaves the softmax as it is: the gradient of `slots_shift` is 0 but for rounding, and its
    terms are as large as those of `slots_gain`.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        scale = expected[name.replace("slots_shift", "slots_gain")].norm().item() or 1.0
        assert (actual[name] - value).norm().item() <= tolerance * scale, name


MASK = torch.tensor([[True, True, True, True], [False, True, False, True], [False, False, False, False]])


# ---------------------------------------------------------------------------------------------------------------------
# The backward by hand, in plain PyTorch: the formulas that the fast implementations follow.


def norm_backward(grad, x, gain, eps=1e-5):
    """The gradients of x, gain and shift of a layer norm."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, d = centred * inverse, grad * gain
    dx = inverse * (d - d.mean(-1, keepdim=True) - n * (d * n).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    return dx, (grad * n).sum(rows), grad.sum(rows)


def manual(case, grads):
    """Results and gradients without autograd, and without keys and values: W_k moves to the queries, W_v behind the sum
    over tokens, and gain and shift of the inputs' norm with them."""
    w, s, mask = case.weights, case.tensors["slots"], case.options.get("slot_mask")
    eps, iterations = case.options.get("eps", 1e-8), case.options.get("iterations", 3)
    taped = 1 if case.options.get("implicit") else iterations
    norm = partial(F.layer_norm, eps=1e-5)
    I, D, Q = w["to_k"].shape[1], s.shape[2], w["to_k"].shape[0]
    g, b = w["inputs_gain"], w["inputs_shift"]
    h = norm(case.tensors["inputs"], (I,))
    to_query = w["to_k"].t() @ w["to_q"] * Q**-0.5  # (I, D)
    present = torch.ones(s.shape[:2], dtype=torch.bool) if mask is None else mask
    steps = []
    for _ in range(iterations):
        k = {"s": s, "y": norm(s, (D,), w["slots_gain"], w["slots_shift"])}
        k["query"] = k["y"] @ to_query.t()  # (B, K, I)
        logits = h @ (g * k["query"]).transpose(1, 2) + (k["query"] @ b).unsqueeze(1)
        k["a"] = logits.masked_fill(~present.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num()
        k["w"] = k["a"] + eps  # (B, N, K)
        k["total"] = torch.where(present, k["w"].sum(1), 1.0)
        k["m"] = k["w"].transpose(1, 2) @ h / k["total"].unsqueeze(2)
        k["x"] = g * k["m"] + b
        k["u"] = k["x"] @ w["to_v"].t()
        i = F.linear(k["u"], w["input_gates"], w["input_bias"]).chunk(3, -1)
        j = F.linear(s, w["hidden_gates"], w["hidden_bias"]).chunk(3, -1)
        r, z = torch.sigmoid(i[0] + j[0]), torch.sigmoid(i[1] + j[1])
        n = torch.tanh(i[2] + r * j[2])
        k["gates"] = r, z, n, j[2]
        k["cell"] = n + z * (s - n)
        k["y2"] = norm(k["cell"], (D,), w["mlp_gain"], w["mlp_shift"])
        k["hidden"] = F.linear(k["y2"], w["mlp_in"], w["mlp_in_bias"]).relu()
        new = k["cell"] + F.linear(k["hidden"], w["mlp_out"], w["mlp_out_bias"])
        s = torch.where(present.unsqueeze(2), new, s)
        steps.append(k)
    results = {"slots": s, "attention": steps[-1]["a"].transpose(1, 2)}

    found = {name: torch.zeros_like(x) for name, x in case.weights.items()}
    grad_to_query, dh = torch.zeros_like(to_query), torch.zeros_like(h)
    ds = grads[0]

    def linear(name, grad, source, bias=None):
        found[name] += torch.einsum("bko,bki->oi", grad, source)
        if bias:
            found[bias] += grad.sum((0, 1))

    for step, k in reversed(list(enumerate(steps))[iterations - taped :]):
        out = torch.where(present.unsqueeze(2), ds, 0.0)
        linear("mlp_out", out, k["hidden"], "mlp_out_bias")
        d = (out @ w["mlp_out"]) * (k["hidden"] > 0)
        linear("mlp_in", d, k["y2"], "mlp_in_bias")
        d, gain, shift = norm_backward(d @ w["mlp_in"], k["cell"], w["mlp_gain"])
        found["mlp_gain"] += gain
        found["mlp_shift"] += shift
        d = d + out
        r, z, n, hn = k["gates"]
        dn = d * (1 - z) * (1 - n * n)
        di = torch.cat([dn * hn * r * (1 - r), d * (k["s"] - n) * z * (1 - z), dn], -1)
        dj = torch.cat([di[..., : 2 * D], dn * r], -1)
        linear("input_gates", di, k["u"], "input_bias")
        linear("hidden_gates", dj, k["s"], "hidden_bias")
        ds = torch.where(present.unsqueeze(2), 0.0, ds) + d * z + dj @ w["hidden_gates"]
        du = di @ w["input_gates"]
        linear("to_v", du, k["x"])
        dx = du @ w["to_v"]
        found["inputs_gain"] += (dx * k["m"]).sum((0, 1))
        found["inputs_shift"] += dx.sum((0, 1))
        e = dx * g / k["total"].unsqueeze(2)  # (B, K, I)
        # Σ_n w (h·e) is m·e: the sum over tokens that the division needs is known before the pass.
        da = h @ e.transpose(1, 2) - (k["m"] * e).sum(-1).unsqueeze(1)
        if step == iterations - 1:
            da = da + grads[1].transpose(1, 2)
        dl = k["a"] * (da - (da * k["a"]).sum(-1, keepdim=True))
        dh = dh + dl @ (g * k["query"]) + k["w"] @ e
        dq, dc = dl.transpose(1, 2) @ h, dl.sum(1).unsqueeze(2)
        found["inputs_gain"] += (dq * k["query"]).sum((0, 1))
        found["inputs_shift"] += (dc * k["query"]).sum((0, 1))
        dq = g * dq + b * dc
        grad_to_query += torch.einsum("bki,bkd->id", dq, k["y"])
        d, gain, shift = norm_backward(dq @ to_query, k["s"], w["slots_gain"])
        found["slots_gain"] += gain
        found["slots_shift"] += shift
        ds = ds + d
    found["to_k"] = w["to_q"] @ grad_to_query.t() * Q**-0.5
    found["to_q"] = w["to_k"] @ grad_to_query * Q**-0.5
    found["inputs"] = norm_backward(dh, case.tensors["inputs"], torch.ones_like(g))[0]
    if not case.options.get("implicit"):
        found["slots"] = ds
    return results | {f"grad of {name}": found[name] for name in case.inputs if name in found}


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(iterations=1),
        dict(eps=0.01),
        dict(slot_mask=MASK),
        dict(implicit=True),
        dict(implicit=True, iterations=1),
    ],
    ids=str,
)  # fmt: skip
def test_the_backward_by_hand_equals_autograd(options):
    case = Case(**options)
    expected = case.run("reference")
    assert_same(manual(case, grads_of(list(expected.values())[:2])), expected, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The reference.


def test_the_reference_is_the_algorithm():
    """Against torch's own modules, token by token and slot by slot."""
    case = Case(B=1, N=3, K=2, I=4, D=5, Q=5, H=6, iterations=2, eps=0.1, biases=True)
    w, gru = case.weights, torch.nn.GRUCell(5, 5, dtype=torch.float64)
    gru.load_state_dict(
        dict(weight_ih=w["input_gates"], weight_hh=w["hidden_gates"], bias_ih=w["input_bias"], bias_hh=w["hidden_bias"])
    )

    def norm(x, name):
        layer = torch.nn.LayerNorm(x.shape, dtype=x.dtype)
        layer.load_state_dict(dict(weight=w[f"{name}_gain"], bias=w[f"{name}_shift"]))
        return layer(x)

    tokens, slots = [norm(x, "inputs") for x in case.tensors["inputs"][0]], list(case.tensors["slots"][0])
    for _ in range(2):
        queries = [w["to_q"] @ norm(s, "slots") / 5**0.5 for s in slots]
        attention = torch.stack(
            [torch.stack([(w["to_k"] @ x + w["to_k_bias"]) @ q for q in queries]).softmax(0) for x in tokens]
        )
        share = (attention + 0.1) / (attention + 0.1).sum(0)
        updates = [sum(share[n, k] * (w["to_v"] @ x + w["to_v_bias"]) for n, x in enumerate(tokens)) for k in range(2)]
        slots = [gru(u[None], s[None])[0] for u, s in zip(updates, slots, strict=True)]
        slots = [
            s + w["mlp_out"] @ (w["mlp_in"] @ norm(s, "mlp") + w["mlp_in_bias"]).relu() + w["mlp_out_bias"]
            for s in slots
        ]
    with ops.use_backend("reference"):
        found = case.call()
    torch.testing.assert_close(found[0][0], torch.stack(slots))
    torch.testing.assert_close(found[1][0], attention.t())


@pytest.mark.parametrize("options", [{}, dict(slot_mask=MASK[:2, :3])], ids=["all", "masked"])
def test_gradcheck_of_the_reference(options):
    case = Case(B=2, N=3, K=3, I=3, D=2, Q=2, H=3, iterations=2, **options)
    names = list(case.inputs)

    def attend(*values):
        return case.call(dict(zip(names, values, strict=True)))

    values = [x.clone().requires_grad_() for x in case.inputs.values()]
    assert torch.autograd.gradcheck(attend, values, fast_mode=True)


# ---------------------------------------------------------------------------------------------------------------------
# What holds for every implementation.

sizes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 16), st.integers(1, 20), st.integers(0, 2**31))


@pytest.mark.parametrize("backend", ["reference", cpu])
@settings(max_examples=15, deadline=None)
@given(size=sizes)
def test_slots_compete_and_neither_order_matters(backend, size):
    """Attention sums to 1 over slots; permuted slots give permuted slots, permuted tokens the same ones."""
    B, N, K, I, seed = size
    case = Case(B, N, K, I, dtype=torch.float32, seed=seed)
    g = torch.Generator().manual_seed(seed)
    of_slots, of_tokens = torch.randperm(K, generator=g), torch.randperm(N, generator=g)
    x, s = case.tensors["inputs"], case.tensors["slots"]
    with ops.use_backend(backend):
        slots, attention = case.call()
        others = case.call(dict(inputs=x[:, of_tokens], slots=s[:, of_slots]))
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)  # three iterations amplify what order rounds
    close(attention.sum(1), torch.ones(B, N))
    assert (attention >= 0).all()
    close(others[0], slots[:, of_slots])
    close(others[1], attention[:, of_slots][:, :, of_tokens])


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_absent_slots_change_nothing(backend):
    """The others do as if they were alone; absent ones come back, even where they hold NaN-free nonsense."""
    case = Case(dtype=torch.float32)
    case.tensors["slots"][1, [0, 2]] = 1e6
    masked = case.run(backend, slot_mask=MASK)
    assert torch.equal(masked["slots"][~MASK], case.tensors["slots"][~MASK])
    assert not masked["attention"][~MASK].any()
    alone = Case(dtype=torch.float32)
    alone.tensors = dict(inputs=case.tensors["inputs"][1:2], slots=case.tensors["slots"][1:2, [1, 3]])
    with ops.use_backend(backend):
        slots, attention = alone.call()
    torch.testing.assert_close(masked["slots"][1, [1, 3]], slots[0])
    torch.testing.assert_close(masked["attention"][1, [1, 3]], attention[0])
    given_grad = grads_of([masked["slots"]])[0]
    assert torch.equal(masked["grad of slots"][~MASK], given_grad[~MASK])


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_absent_slots_need_no_eps(backend):
    results = Case(dtype=torch.float32, slot_mask=MASK, eps=0.0).run(backend)
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_implicit_gradient_is_that_of_one_more_step(backend):
    case = Case(dtype=torch.float32)
    found = case.run(backend, implicit=True, iterations=4)
    with ops.use_backend(backend):
        case.tensors["slots"] = case.call(iterations=3)[0]
    expected = case.run(backend, iterations=1)
    expected.pop("grad of slots")
    assert_same(found, expected)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_attention_may_be_left_out(backend):
    case = Case(dtype=torch.float32)
    with ops.use_backend(backend):
        assert case.call(return_attention=False)[1] is None
    leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
    with ops.use_backend(backend):
        slots, _ = case.call(leaves)
    expected = torch.autograd.grad(slots, list(leaves.values()), grads_of([slots]))
    found = case.run(backend, return_attention=False)
    assert_same(
        found, {"slots": slots.detach()} | {f"grad of {k}": x for k, x in zip(leaves, expected, strict=True)}, 0
    )


# ---------------------------------------------------------------------------------------------------------------------
# C++ against the reference.


@needs_extension
@pytest.mark.parametrize(
    "sizes",
    [
        dict(B=1, N=1, K=1, I=3, D=3, Q=1, H=1),
        dict(B=2, N=16, K=2, I=16, D=16, Q=16, H=16),
        dict(B=1, N=33, K=16, I=17, D=33, Q=15, H=31),
        dict(B=5, N=100, K=7, I=64, D=64, Q=64, H=128),
        dict(B=37, N=3, K=5, I=11, D=9, Q=10, H=8),  # more groups of slots than one, and elements across groups
        dict(B=2, N=1100, K=9, I=20, D=12, Q=7, H=5),  # more chunks of tokens than one
        dict(B=1, N=16384, K=3, I=8, D=8, Q=8, H=8),
        dict(B=3, N=1024, K=3, I=1030, D=5, Q=4, H=3),  # every element a stretch of its own
        *(dict(B=2, N=50, K=K) for K in (1, 3, 6, 8, 10, 12)),
    ],
    ids=str,
)
def test_cpu_agrees_with_the_reference(sizes):
    case = Case(dtype=torch.float32, **sizes)
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        dict(B=st.integers(1, 4), N=st.integers(1, 70), K=st.integers(1, 16), I=st.integers(1, 40))
        | {name: st.integers(2, 40) for name in "DQH"}
        | dict(seed=st.integers(0, 2**31))
    )
)
def test_cpu_agrees_with_the_reference_at_any_size(sizes):
    case, exact = Case(dtype=torch.float32, iterations=2, **sizes), Case(iterations=2, **sizes)
    exact.tensors, exact.weights = ({k: x.double() for k, x in y.items()} for y in (case.tensors, case.weights))
    expected, reference = exact.run("reference"), case.run("reference")
    for name, x in case.run("cpu").items():
        # Where layer norms amplify what is rounded, the reference is no nearer to the truth than this.
        usual = (reference[name] - expected[name]).norm()
        scale = expected[name.replace("slots_shift", "slots_gain")].norm()
        assert (x - expected[name]).norm() <= 1e-5 * scale + 4 * usual + 1e-6, name


@needs_extension
@pytest.mark.parametrize(
    "options",
    [
        dict(iterations=1), dict(iterations=5), dict(eps=0.1), dict(eps=0.0), dict(layer_eps=0.1),
        dict(implicit=True), dict(implicit=True, iterations=1), dict(slot_mask=MASK),
        dict(slot_mask=MASK, implicit=True, eps=0.01),
    ],
    ids=str,
)  # fmt: skip
def test_cpu_takes_the_options(options):
    case = Case(dtype=torch.float32, **options)
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
@pytest.mark.parametrize("options", [{}, dict(slot_mask=MASK, iterations=2), dict(implicit=True)], ids=str)
def test_cpu_takes_biases_of_keys_and_values(options):
    case = Case(dtype=torch.float32, biases=True, **options)
    assert_same(case.run("cpu"), case.run("reference"))
    case.weights["to_v_bias"] = torch.zeros_like(case.weights["to_v_bias"])
    moved = case.run("cpu")["attention"]
    case.weights["to_k_bias"] = torch.zeros_like(case.weights["to_k_bias"])
    assert (case.run("cpu")["attention"] - moved).abs().max() > 1e-3  # a bias of keys moves attention


@needs_extension
def test_cpu_holds_far_from_zero():
    """Inputs whose mean is a thousand times their deviation, and logits in the hundreds."""
    case = Case(dtype=torch.float32)
    exact = Case()
    for c in (case, exact):
        c.tensors["inputs"] = ((c.tensors["inputs"] + 2000).float()).to(c.tensors["slots"].dtype)
        c.weights["to_q"] *= 100
    expected = {k: x.float() for k, x in exact.run("reference").items()}
    reference = case.run("reference")
    for name, x in case.run("cpu").items():
        error, usual = (x - expected[name]).norm(), (reference[name] - expected[name]).norm()
        assert error <= 3 * usual + 1e-5 * expected[name].norm(), name


@needs_extension
def test_any_strides():
    case = Case(dtype=torch.float32, slot_mask=MASK)
    expected = case.run("cpu")

    def strided(x):
        wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)
        return wide.movedim(0, -1).contiguous().movedim(-1, 0)[..., 0] if x.dim() > 1 else wide[..., 0]

    for group in (case.tensors, case.weights):
        group.update({k: strided(x) for k, x in group.items()})
    case.options["slot_mask"] = MASK.t().contiguous().t()
    assert not case.tensors["inputs"].is_contiguous()
    assert_same(case.run("cpu"), expected, 0)
    case.tensors["inputs"] = Case(dtype=torch.float32).tensors["inputs"].transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(case.run("cpu"), expected, 0)


@needs_extension
@pytest.mark.parametrize("left", [0, 1])
def test_a_loss_may_leave_out_a_result(left):
    case = Case(dtype=torch.float32)
    found = []
    for backend in ("cpu", "reference"):
        leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
        with ops.use_backend(backend):
            result = case.call(leaves)[1 - left]
        result.square().sum().backward()
        found.append({k: x.grad for k, x in leaves.items()})
    assert_same(*found)


@needs_extension
def test_the_number_of_threads_changes_no_bit():
    case = Case(B=5, N=1100, K=7, I=64, D=64, Q=64, H=128, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run("cpu")
        torch.set_num_threads(3)
        assert_same(case.run("cpu"), expected, 0)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# torch.library, torch.compile, autocast.


@needs_extension
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("options", [{}, dict(slot_mask=MASK, implicit=True, return_attention=False)], ids=str)
def test_opcheck(options, biases):
    case = Case(dtype=torch.float32, biases=biases, **options)
    leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
    weights = SlotAttentionWeights(*(leaves[name] for name in case.weights))
    args = op._prepare(leaves["inputs"], leaves["slots"], weights, **options)
    opcheck(torch.ops.phyxdream.slot_attention.default, args)


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("options", [{}, dict(slot_mask=MASK, implicit=True)], ids=["plain", "masked, implicit"])
def test_compiles_as_one_graph(backend, options):
    case = Case(dtype=torch.float32, **options)
    expected = case.run(backend)
    eager = case.call
    torch.compiler.reset()  # a compiled function keeps the backend it was traced with
    case.call = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_same(case.run(backend), expected)


@needs_extension
def test_autocast_computes_in_float32():
    case = Case(dtype=torch.float32)
    half = {"inputs": case.tensors["inputs"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend("cpu"):
        outputs = case.call(half)
    case.tensors["inputs"] = half["inputs"].float()
    assert all(x.dtype is torch.float32 for x in outputs)
    torch.testing.assert_close(outputs[0], case.run("cpu")["slots"], rtol=0, atol=0)


def test_half_precision_is_computed_in_float32():
    case = Case(dtype=torch.float32)
    half = {k: x.bfloat16() for k, x in case.inputs.items()}
    slots, attention = case.call(half)
    assert slots.dtype is attention.dtype is torch.bfloat16
    with ops.use_backend("reference"):
        exact = case.call({k: x.float() for k, x in half.items()})
    assert torch.equal(slots, exact[0].bfloat16())
    assert torch.equal(attention, exact[1].bfloat16())


@needs_extension
def test_a_second_derivative_is_refused():
    case = Case(dtype=torch.float32)
    slots = case.tensors["slots"].requires_grad_()
    with ops.use_backend("cpu"):
        result = case.call()[0]
    (grad,) = torch.autograd.grad(result.sum(), slots, create_graph=True)
    with pytest.raises(RuntimeError, match="slot_attention is differentiable once"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Choice of backend, errors.


@needs_extension
def test_explain():
    case = Case(dtype=torch.float32)
    x, s = case.tensors.values()
    explanation = ops.explain(ops.slot_attention, x, s, SlotAttentionWeights(**case.weights))
    assert explanation.backend == "cpu"
    assert "3 elements at a time" in explanation.reasons["cpu"]
    case = Case()
    with ops.use_backend("cpu"), pytest.raises(BackendError, match=r"torch.float64; it takes torch.float32"):
        case.call()


def changed(name, f):
    return lambda case: case.tensors.update({name: f(case.tensors[name])})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed("inputs", lambda x: x[0]), ValueError, r"inputs: expected shape \(B, N, I\), got \(10, 7\)"),
        (changed("slots", lambda x: x[1:]), ValueError, r"slots: expected shape \(3, K, D\), got \(2, 4, 6\)"),
        (changed("inputs", lambda x: x[:, :0]), ValueError, r"no empty axis, got shapes \(3, 0, 7\) and \(3, 4, 6\)"),
        (changed("inputs", lambda x: x.numpy()), TypeError, r"inputs: expected a tensor, got ndarray"),
        (changed("slots", lambda x: x.long()), TypeError, r"slots: expected a floating-point tensor, got torch.int64"),
        (changed("slots", lambda x: x.float()), TypeError, r"dtype of inputs, torch.float64, got slots torch.float32"),
        (lambda c: c.weights.update(to_v=torch.zeros(5, 6)), ValueError, r"weights.to_v: expected shape \(5, 7\), got"),
        (lambda c: c.weights.update(mlp_in=torch.zeros(0, 6)), ValueError, r"weights.mlp_in: .*\(0, 6\), not empty"),
        (lambda c: c.weights.update(to_q=None), TypeError, r"weights.to_q: expected a tensor, got NoneType"),
    ],
)
def test_bad_arguments(change, error, message):
    case = Case()
    change(case)
    with pytest.raises(error, match=message):
        case.call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(iterations=0), ValueError, r"iterations: expected at least 1, got 0"),
        (dict(iterations=1.5), TypeError, r"iterations: expected an integer, got float"),
        (dict(eps=-1e-8), ValueError, r"eps: .*not negative, got -1e-08"),
        (dict(layer_eps=float("nan")), ValueError, r"layer_eps: .*got nan"),
        (dict(eps="1"), TypeError, r"eps: expected a number, got str"),
        (dict(slot_mask=MASK.int()), TypeError, r"slot_mask: expected a tensor of torch.bool, got torch.int32"),
        (dict(slot_mask=MASK[:2]), ValueError, r"slot_mask: expected shape \(3, 4\), got \(2, 4\)"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Case().call(**options)


def test_bad_weights():
    x, s = Case().tensors.values()
    with pytest.raises(TypeError, match="weights: expected SlotAttentionWeights, got dict"):
        ops.slot_attention(x, s, {})


# ---------------------------------------------------------------------------------------------------------------------
# Triton.


def triton_run(case, *, splits=1, fused=False, **options):
    """With so many programs for the tokens of an element, whatever their number."""
    kernels = importlib.import_module("phyxdream.kernels.slot_attention")

    def plan(*args):
        return dataclasses.replace(chosen(*args), splits=splits, fused=fused)

    chosen = kernels.plan
    with mock.patch.object(kernels, "plan", plan):
        return case.run("triton", **options)


def check_sizes_in_the_interpreter():
    for sizes in (
        dict(),
        dict(B=1, N=1, K=1, I=3, D=3, Q=1, H=1),
        dict(B=1, N=70, K=16, I=17, D=33, Q=15, H=31),
        dict(B=4, N=10, K=5, I=33, D=17, Q=9, H=20),  # tiles of slots of several elements
    ):
        case = Case(dtype=torch.float32, iterations=2, **sizes)
        assert_same(triton_run(case, fused=sizes.get("K") == 16), case.run("reference"))
    case = Case(iterations=2, dtype=torch.float32, biases=True)
    assert_same(triton_run(case), case.run("reference"))
    case = Case(B=1, N=100, K=2, iterations=2, dtype=torch.float32)
    assert_same(triton_run(case, splits=5), case.run("reference"))  # the last of them without a token


def check_options_in_the_interpreter():
    for options in (
        dict(iterations=1, eps=0.1),
        dict(slot_mask=MASK),
        dict(slot_mask=MASK, eps=0.0, implicit=True, iterations=2, layer_eps=0.1),
        dict(implicit=True, iterations=2, return_attention=False),
    ):
        case = Case(dtype=torch.float32, **options)
        fused = "eps" in options
        assert_same(triton_run(case, fused=fused), case.run("reference"))


def check_what_else_triton_takes_in_the_interpreter():
    case = Case(dtype=torch.float32, iterations=2, slot_mask=MASK)
    case.tensors = {k: x.movedim(0, -1).contiguous().movedim(-1, 0) for k, x in case.tensors.items()}
    case.weights = {k: x.t().contiguous().t() for k, x in case.weights.items()}
    case.options["slot_mask"] = MASK.t().contiguous().t()
    expected = case.run("reference")
    assert_same(triton_run(case), expected)

    found = []
    for backend in ("triton", "reference"):
        for left in (0, 1):
            leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
            with ops.use_backend(backend):
                result = case.call(leaves)[left]
            result.square().sum().backward()
            found.append({f"{left} {k}": x.grad for k, x in leaves.items()})
    assert_same(found[0] | {k.replace("0", "1", 1): x for k, x in found[1].items()}, found[2] | found[3])

    # float16 rounds at 2⁻¹¹ what enters every product; the interpreter knows no bfloat16.
    half = {k: x.half() for k, x in case.inputs.items()}
    with ops.use_backend("triton"), torch.no_grad():
        slots, attention = case.call(half)
    assert slots.dtype is attention.dtype is torch.float16
    got = {"slots": slots.float(), "attention": attention.float()}
    assert_same(got, {k: expected[k] for k in got}, 1e-2)

    for sizes, message in ((dict(K=17), "at most 16 slots"), (dict(I=65), "at most 64 features in torch.float32")):
        with ops.use_backend("triton"), pytest.raises(BackendError, match=message):
            Case(dtype=torch.float32, **sizes).call()
    x, s = case.tensors.values()
    with ops.use_backend("triton"):
        reasons = ops.explain(ops.slot_attention, x, s, SlotAttentionWeights(**case.weights)).reasons
    assert "1 program for the tokens of each of 3 elements, 64 at a time, two launches" in reasons["triton"]


@pytest.mark.parametrize(
    "check",
    [
        check_sizes_in_the_interpreter,
        check_options_in_the_interpreter,
        check_what_else_triton_takes_in_the_interpreter,
    ],
)
def test_triton_in_the_interpreter(run_interpreted, check):
    run_interpreted(check)


def assert_compiles_and_fits(assert_launches_fit, direction, dtype, **sizes):
    kernels = pytest.importorskip("phyxdream.kernels.slot_attention")

    def call():
        case = Case(dtype=dtype, slot_mask=torch.ones(sizes["B"], sizes["K"], dtype=torch.bool), **sizes)
        x, s = case.tensors.values()
        args = op._prepare(x, s, SlotAttentionWeights(**case.weights), **case.options)
        outputs = op._triton_forward(*args)
        op._triton_backward(*outputs, *args)

    assert_launches_fit(call, kernels, f"{direction}_kernel")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_triton_compiles_and_fits(assert_launches_fit, direction):
    sizes = dict(B=1024, N=64, K=7, I=32, D=32, Q=32, H=64)  # which compile in half the time of those that matter
    assert_compiles_and_fits(assert_launches_fit, direction, torch.bfloat16, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("sizes", "dtypes"),
    [
        (dict(B=1024, N=64, K=7, I=64, D=64, Q=64, H=128), (torch.bfloat16, torch.float32)),
        (dict(B=32, N=4096, K=7, I=64, D=64, Q=64, H=128), (torch.bfloat16, torch.float32)),
        (dict(B=64, N=256, K=16, I=128, D=128, Q=128, H=256), (torch.bfloat16,)),
    ],
    ids=str,
)
def test_triton_compiles_and_fits_at_all_sizes(assert_launches_fit, sizes, dtypes, direction):
    for dtype in dtypes:
        assert_compiles_and_fits(assert_launches_fit, direction, dtype, **sizes)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(
    "options", [{}, dict(implicit=True, iterations=2), dict(eps=0.1, return_attention=False)], ids=str
)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(B=1, N=1, K=1, I=3, D=3, Q=1, H=1),
        dict(B=5, N=100, K=7, I=64, D=64, Q=64, H=128),
        dict(B=3, N=1100, K=16, I=33, D=19, Q=12, H=40),
        dict(B=2, N=16384, K=5, I=64, D=64, Q=64, H=128),
    ],
    ids=str,
)
def test_triton_on_a_gpu(sizes, options):
    mask = torch.rand(sizes["B"], sizes["K"], generator=torch.Generator().manual_seed(0)) < 0.8
    case = Case(dtype=torch.float32, slot_mask=mask, **sizes, **options).to("cuda")
    expected = case.run("reference")
    for split in ({}, dict(splits=2), dict(fused=True)):
        assert_same(triton_run(case, **split), expected)
    got = case.to("cuda", torch.bfloat16).run("triton")  # which rounds at 2⁻⁸
    assert all(x.dtype is torch.bfloat16 for x in got.values())
    assert_same({k: x.float() for k, x in got.items()}, expected, 5e-2)


@pytest.mark.gpu
@on_a_gpu
def test_opcheck_on_a_gpu():
    case = Case(dtype=torch.float32).to("cuda")
    leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
    weights = SlotAttentionWeights(*(leaves[name] for name in case.weights))
    opcheck(torch.ops.phyxdream.slot_attention.default, op._prepare(leaves["inputs"], leaves["slots"], weights))
