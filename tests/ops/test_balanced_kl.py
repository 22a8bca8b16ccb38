import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as td
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from phyxdream import ops
from phyxdream.ops.backend import extension

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)

TOLERANCE = {
    # Of float32 arithmetic against the reference in float64: sums of a few hundred terms, in which logarithms cancel.
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    # Rounded once, in the gradients alone; Triton's interpreter truncates to bfloat16 where a GPU rounds.
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-8},
    torch.float16: {"rtol": 2**-9, "atol": 2**-11},
}
SHARED = (1000, 32, 16)  # enough elements for threads to share


def contiguous(draw, shape):
    return draw(shape)


def batch_major(draw, shape):
    """The first two axes swapped in memory, as in a (B, T, ...) batch seen as (T, B, ...)."""
    return draw((shape[1], shape[0], *shape[2:])).transpose(0, 1)


def every_other_row(draw, shape):
    return draw((2 * shape[0], *shape[1:]))[1::2]


def half_of_the_last_axis(draw, shape):
    return draw((*shape[:-1], 2 * shape[-1]))[..., : shape[-1]]


def last_axis_first(draw, shape):
    return draw((shape[-1], *shape[:-1])).movedim(0, -1)


def same_row(draw, shape):
    return draw(shape[1:]).expand(shape)


def one_number(draw, shape):
    return draw(()).expand(shape)


LAYOUTS = [
    contiguous, batch_major, every_other_row, half_of_the_last_axis, last_axis_first, same_row, one_number
]  # fmt: skip


def inputs_of(kinds, shape, layouts, dtype, seed, device):
    generator = torch.Generator(device).manual_seed(seed)

    def draw(kind):
        return lambda shape: kind(torch.randn(shape, device=device, generator=generator, dtype=dtype))

    layouts = layouts or (contiguous,)
    return [layout(draw(kind), shape) for layout in (layouts[0], layouts[-1]) for kind in kinds]


def logits(shape, *layouts, dtype=torch.float32, seed=0, device="cpu"):
    """post_logits and prior_logits; `layouts` are one for both, or one for each."""
    return inputs_of([lambda x: 2 * x], shape, layouts, dtype, seed, device)


def gaussians(shape, *layouts, dtype=torch.float32, seed=0, device="cpu"):
    """post_mean, post_std, prior_mean and prior_std; `layouts` as for logits."""
    return inputs_of([lambda x: x, lambda x: x.abs() + 0.2], shape, layouts, dtype, seed, device)


def run(backend, op, inputs, *numbers, grads=None):
    """The two results, then the gradients of the inputs; `grads` are those of the results."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with ops.use_backend(backend):
        results = op(*inputs, *numbers)
        grads = grads or [torch.ones_like(x) for x in results]
        return *results, *torch.autograd.grad(results, inputs, grads)


def assert_as_reference(backend, op, inputs, *numbers):
    dtype, exact = inputs[0].dtype, torch.float64
    lead = inputs[0].shape[: -2 if op is ops.balanced_kl else -1]
    grads = [
        torch.linspace(first, 1.0, max(1, math.prod(lead)), device=inputs[0].device).reshape(lead)
        for first in (-1.0, 0.5)
    ]
    actual = run(backend, op, inputs, *numbers, grads=grads)
    expected = run("reference", op, [x.to(exact) for x in inputs], *numbers, grads=[g.to(exact) for g in grads])
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == (torch.float32 if i < 2 else dtype)
        tolerance = TOLERANCE[torch.float32 if i < 2 else dtype]
        name = f"output {i}" if i < 2 else f"gradient of argument {i - 2}"
        # A gradient is a difference of numbers as large as the KL.
        tolerance = {**tolerance, "atol": tolerance["atol"] * max(1.0, expected[0].abs().max().item())}
        torch.testing.assert_close(a.to(exact), e, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def threads():
    """`threads(n)` sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


BOTH = [(ops.balanced_kl, logits, (5, 3, 7)), (ops.balanced_kl_gaussian, gaussians, (5, 7))]

# The definition


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5, 1.0])
def test_categorical_equals_torch_distributions(backend, unimix):
    inputs = logits((5, 2, 3, 7))
    p, q = (
        td.Independent(td.Categorical(probs=(1 - unimix) * torch.softmax(x.double(), -1) + unimix / 7), 1)
        for x in inputs
    )
    with ops.use_backend(backend):
        for half in ops.balanced_kl(*inputs, 0.0, unimix):
            torch.testing.assert_close(half.double(), td.kl_divergence(p, q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_gaussian_equals_torch_distributions(backend):
    inputs = gaussians((5, 2, 7))
    mean_p, std_p, mean_q, std_q = (x.double() for x in inputs)
    p, q = td.Independent(td.Normal(mean_p, std_p), 1), td.Independent(td.Normal(mean_q, std_q), 1)
    with ops.use_backend(backend):
        for half in ops.balanced_kl_gaussian(*inputs, 0.0):
            torch.testing.assert_close(half.double(), td.kl_divergence(p, q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_each_half_trains_one_side(backend, op, make, shape):
    inputs = [x.requires_grad_() for x in make(shape)]
    post, prior = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
    zero, one = torch.zeros(5), torch.ones(5)
    of_dynamics = run(backend, op, inputs, 0.0, grads=[one, zero])[2:]
    of_representation = run(backend, op, inputs, 0.0, grads=[zero, one])[2:]
    assert all(g.abs().max() == 0 for g in (*of_dynamics[: len(post)], *of_representation[len(prior) :]))
    assert all(g.abs().max() > 0 for g in (*of_dynamics[len(post) :], *of_representation[: len(prior)]))


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_free_nats_clip_value_and_gradient_as_clamp_does(backend, op, make, shape):
    inputs = make(shape)
    kl, _, *unclipped = run(backend, op, inputs, 0.0)
    free_nats = kl.median().item()  # one row is exactly there, where clamp lets the gradient through
    dynamics, representation, *grads = run(backend, op, inputs, free_nats)
    assert torch.equal(dynamics, kl.clamp(min=free_nats))
    assert torch.equal(representation, dynamics)
    flows = kl >= free_nats
    assert flows.sum() == 3
    for g, full in zip(grads, unclipped, strict=True):
        assert torch.equal(g[flows], full[flows])
        assert g[~flows].abs().max() == 0


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_equal_logits_have_no_divergence(backend, unimix):
    post = logits((40, 5, 33))[0]
    dynamics, _, grad_post, grad_prior = run(backend, ops.balanced_kl, [post, post.clone()], 0.0, unimix)
    assert torch.equal(dynamics, torch.zeros(40))
    assert max(grad_post.abs().max(), grad_prior.abs().max()) < 1e-6
    with ops.use_backend(backend):  # the same distribution, other logits: nothing but rounding is left
        assert ops.balanced_kl(post, post + 3.0, 0.0, unimix)[0].abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_equal_gaussians_have_no_divergence(backend):
    mean, std = gaussians((40, 33))[:2]
    results = run(backend, ops.balanced_kl_gaussian, [mean, std, mean.clone(), std.clone()], 0.0)
    assert torch.equal(results[0], torch.zeros(40))
    assert max(g.abs().max() for g in results[2:]) < 1e-5


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("unimix", [0.0, 1e-30, 0.01])
def test_extreme_logits(backend, unimix):
    """All the probability on one class, another one for the prior; then both on the same."""
    post, prior = torch.full((2, 1, 4), -1e4), torch.full((2, 1, 4), -1e4)
    post[:, 0, 1] = prior[0, 0, 2] = prior[1, 0, 1] = 1e4
    kl, _, *grads = run(backend, ops.balanced_kl, [post, prior], 0.0, unimix)
    likely, unlikely = 1 - unimix + unimix / 4, unimix / 4
    apart = (likely - unlikely) * math.log(likely / unlikely) if unimix else 2e4
    torch.testing.assert_close(kl, torch.tensor([apart, 0.0]), rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in grads)
    if not unimix:
        torch.testing.assert_close(grads[1][0, 0], torch.tensor([0.0, -1.0, 1.0, 0.0]))


@needs_extension
def test_the_logarithm_is_accurate_over_the_whole_range():
    """With one variable and a narrow posterior, KL + (1 - r²)/2 = -ln r is seen alone."""
    std = torch.logspace(-37, -1, 20_001).unsqueeze(1)
    zero, one = torch.zeros_like(std), torch.ones_like(std)
    with ops.use_backend("cpu"):
        kl, _ = ops.balanced_kl_gaussian(zero, std, zero, one, 0.0)
    torch.testing.assert_close(
        kl.double(), (-std.double().log() + (std.double() ** 2 - 1) / 2)[:, 0], rtol=2e-7, atol=0
    )


@needs_extension
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
@pytest.mark.parametrize("argument", [0, 1, -1])
def test_cpu_spreads_neither_nan_nor_infinity_to_other_rows(op, make, shape, argument):
    inputs = make(shape)
    clean = run("cpu", op, inputs, 0.0)
    inputs[argument][2].flatten()[3] = math.nan
    inputs[argument][4].flatten()[3] = math.inf
    kl, _, *grads = run("cpu", op, inputs, 0.0)
    assert kl[2].isnan()
    assert not kl[4].isfinite()
    others = [0, 1, 3]
    assert all(torch.equal(a[others], b[others]) for a, b in zip((kl, *grads), (clean[0], *clean[2:]), strict=True))


# Gradients


@pytest.mark.parametrize("free_nats", [0.0, 2.0])
@pytest.mark.parametrize("unimix", [0.0, 0.05])
def test_gradcheck_of_the_categorical_reference(free_nats, unimix):
    post, prior = (x.requires_grad_() for x in logits((4, 2, 3), dtype=torch.float64))
    for checked in (gradcheck, gradgradcheck):
        assert checked(lambda x: ops.balanced_kl(post.detach(), x, free_nats, unimix)[0], (prior,))
        assert checked(lambda x: ops.balanced_kl(x, prior.detach(), free_nats, unimix)[1], (post,))


def test_gradcheck_of_the_gaussian_reference():
    inputs = [x.requires_grad_() for x in gaussians((4, 3), dtype=torch.float64)]
    post, prior = inputs[:2], inputs[2:]
    for checked in (gradcheck, gradgradcheck):
        assert checked(lambda *x: ops.balanced_kl_gaussian(*(p.detach() for p in post), *x)[0], prior)
        assert checked(lambda *x: ops.balanced_kl_gaussian(*x, *(p.detach() for p in prior))[1], post)


@pytest.mark.parametrize("unimix", [0.0, 0.05, 1.0])
def test_the_hand_written_categorical_backward(unimix):
    """The formulas of the kernels against autograd."""
    inputs = logits((6, 3, 5), dtype=torch.float64)
    p, q = (torch.softmax(x, -1) for x in inputs)
    mixed_p, mixed_q = ((1 - unimix) * x + unimix / 5 for x in (p, q))
    log, ratio = torch.log(mixed_p / mixed_q), mixed_p / mixed_q
    grad_post = (1 - unimix) * p * (log - (p * log).sum(-1, keepdim=True))
    grad_prior = (1 - unimix) * q * ((q * ratio).sum(-1, keepdim=True) - ratio)
    expected = run("reference", ops.balanced_kl, inputs, 0.0, unimix)[2:]
    torch.testing.assert_close((grad_post, grad_prior), expected, rtol=1e-12, atol=1e-14)


def test_the_hand_written_gaussian_backward():
    inputs = p_mean, p_std, q_mean, q_std = gaussians((6, 5), dtype=torch.float64)
    r, d = p_std / q_std, (p_mean - q_mean) / q_std
    actual = d / q_std, r / q_std - 1 / p_std, -d / q_std, (1 - r * r - d * d) / q_std
    expected = run("reference", ops.balanced_kl_gaussian, inputs, 0.0)[2:]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@needs_extension
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_gradient_of_one_input_alone(op, make, shape):
    inputs = make(shape)
    expected = run("cpu", op, inputs)[2:]
    for wanted, full in enumerate(expected):
        alone = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        with ops.use_backend("cpu"):
            sum(x.sum() for x in op(*alone)).backward()  # the gradient of a sum is expanded: its strides are 0
        assert torch.equal(alone[wanted].grad, full)


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_a_half_that_is_not_in_the_loss_has_no_gradient(backend, op, make, shape):
    inputs = [x.requires_grad_() for x in make(shape)]
    half = len(inputs) // 2
    expected = run("reference", op, inputs, 0.0)[2:]
    with ops.use_backend(backend):
        dynamics, representation = op(*inputs, 0.0)
        of_dynamics = torch.autograd.grad(dynamics.sum(), inputs, allow_unused=True, retain_graph=True)
        of_representation = torch.autograd.grad(representation.sum(), inputs, allow_unused=True)
    assert of_dynamics[:half] == of_representation[half:] == (None,) * half
    torch.testing.assert_close(of_dynamics[half:], expected[half:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_representation[:half], expected[:half], rtol=1e-5, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_a_second_derivative_is_refused(compiled, op, make, shape):
    inputs = [x.requires_grad_() for x in make(shape)]
    numbers = (0.0, 0.01) if op is ops.balanced_kl else (0.0,)
    dynamics = (getattr(torch.ops.phyxdream, op.__name__) if compiled else op)(*inputs, *numbers)[0]
    (grad,) = torch.autograd.grad(dynamics.sum(), inputs[-1], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.__name__} is differentiable once"):
        grad.sum().backward()


# C++ against the reference

categorical_shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 33), st.sampled_from([1, 2, 4, 16, 32])),
    st.tuples(st.integers(1, 9), st.integers(1, 300)),
    st.sampled_from([(600, 32, 32), (3, 2, 5000)]),
)


@needs_extension
@settings(deadline=None, max_examples=150)
@given(
    shape=categorical_shapes,
    post_layout=st.sampled_from(LAYOUTS),
    prior_layout=st.sampled_from(LAYOUTS),
    free_nats=st.sampled_from([0.0, 1.0, 20.0]),
    unimix=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_categorical_cpu_agrees_with_the_reference(shape, post_layout, prior_layout, free_nats, unimix, seed):
    assert_as_reference("cpu", ops.balanced_kl, logits(shape, post_layout, prior_layout, seed=seed), free_nats, unimix)


@needs_extension
@settings(deadline=None, max_examples=80)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 70)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40)),
        st.sampled_from([(9000, 32), (2, 128)]),
    ),
    post_layout=st.sampled_from(LAYOUTS),
    prior_layout=st.sampled_from(LAYOUTS),
    free_nats=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_gaussian_cpu_agrees_with_the_reference(shape, post_layout, prior_layout, free_nats, seed):
    assert_as_reference(
        "cpu", ops.balanced_kl_gaussian, gaussians(shape, post_layout, prior_layout, seed=seed), free_nats
    )


@needs_extension
def test_without_leading_axes():
    assert_as_reference("cpu", ops.balanced_kl, logits((32, 16)), 1.0, 0.01)
    assert_as_reference("cpu", ops.balanced_kl_gaussian, gaussians((30,)), 1.0)
    assert ops.balanced_kl(*logits((32, 16)))[0].shape == ()


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, batch_major, last_axis_first])
def test_gradients_keep_the_memory_layout(layout):
    inputs = logits((2, 3, 5, 4), layout)
    for x, grad in zip(inputs, run("cpu", ops.balanced_kl, inputs)[2:], strict=True):
        assert grad.stride() == x.stride()


# Threads


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, batch_major])
@pytest.mark.parametrize(
    ("op", "make", "shape"), [(ops.balanced_kl, logits, SHARED), (ops.balanced_kl_gaussian, gaussians, (9000, 30))]
)
def test_neither_threads_nor_neighbours_change_a_bit(threads, op, make, shape, layout):
    inputs = make(shape, layout)
    threads(1)
    expected = run("cpu", op, inputs)
    for n in (2, 3, 40):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(run("cpu", op, inputs), expected, strict=True))
    part = run("cpu", op, [x[7:12] for x in inputs])
    assert all(torch.equal(a, b[7:12]) for a, b in zip(part, expected, strict=True))


# Dtypes, autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_half_precision_is_computed_in_float32(op, make, shape, dtype):
    inputs = make(shape, dtype=dtype)
    dynamics, representation, *grads = run("reference", op, inputs, 0.5)
    exact = run("reference", op, [x.float() for x in inputs], 0.5)
    assert torch.equal(dynamics, exact[0])
    assert torch.equal(representation, exact[1])
    for actual, expected in zip(grads, exact[2:], strict=True):
        assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_autocast_takes_mixed_dtypes_and_computes_in_float32(op, make, shape):
    inputs = make(shape)
    inputs[0] = inputs[0].bfloat16()
    with pytest.raises(TypeError, match="expected one dtype"):
        op(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = op(*[x.requires_grad_() for x in inputs])[1]
    assert result.dtype == torch.float32
    assert torch.equal(result, op(*[x.float() for x in inputs])[1])
    assert torch.autograd.grad(result.sum(), inputs[0])[0].dtype == torch.bfloat16


def test_inference_mode():
    with torch.inference_mode():
        assert all(x.is_inference() for x in ops.balanced_kl(*logits((5, 3, 4))))


# torch's machinery


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, batch_major, last_axis_first])
def test_opcheck(layout):
    post, prior = logits((2, 3, 4, 5), layout)
    grad, kl = torch.randn(2, 3), torch.rand(2, 3) + 0.5
    opcheck(torch.ops.phyxdream.balanced_kl, (post.requires_grad_(), prior.requires_grad_(), 1.0, 0.01))
    opcheck(torch.ops.phyxdream.balanced_kl_backward, (grad, grad, kl, post.detach(), prior.detach(), 1.0, 0.01))
    inputs = gaussians((2, 3, 5), layout)
    opcheck(torch.ops.phyxdream.balanced_kl_gaussian, (*[x.requires_grad_() for x in inputs], 1.0))
    opcheck(torch.ops.phyxdream.balanced_kl_gaussian_backward, (grad, grad, kl, *[x.detach() for x in inputs], 1.0))


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize(("op", "make", "shape"), BOTH)
def test_compiles_as_one_graph(backend, op, make, shape):
    inputs = make(shape)
    expected = run(backend, op, inputs, 1.0)
    compiled = torch.compile(lambda *args: op(*args, 1.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(backend, compiled, inputs), expected)


def test_function_transforms_take_the_reference():
    post, prior = logits((5, 3, 4))
    torch.testing.assert_close(torch.vmap(ops.balanced_kl)(post, prior), ops.balanced_kl(post, prior))


@needs_extension
def test_explain_tells_of_threads_and_copies(threads):
    threads(2)
    post, prior = logits((3, 4, 5))
    assert "C++, 1 thread, SIMD over variables" in ops.explain(ops.balanced_kl, post, prior).reasons["cpu"]
    assert "2 threads" in ops.explain(ops.balanced_kl, *logits(SHARED)).reasons["cpu"]
    assert "copy" in ops.explain(ops.balanced_kl, post, prior.mT.contiguous().mT).reasons["cpu"]
    assert "SIMD over rows" in ops.explain(ops.balanced_kl_gaussian, *gaussians((3, 4))).reasons["cpu"]
    assert ops.explain(ops.balanced_kl, post.double(), prior.double()).backend == "reference"


# Bad input

x = torch.zeros(2, 3, 4)
m = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        (ops.balanced_kl, (None, x), TypeError, "post_logits: expected a tensor, got NoneType"),
        (ops.balanced_kl, (x, x.int()), TypeError, r"prior_logits: expected a floating-point tensor, got torch\.int32"),
        (ops.balanced_kl, (x, x.double()), TypeError, r"post_logits, prior_logits: expected one dtype, got .*float64"),
        (ops.balanced_kl, (x, x[:1]), ValueError, r"prior_logits: expected the shape of post_logits, \(2, 3, 4\)"),
        (ops.balanced_kl, (x, x.to("meta")), ValueError, "prior_logits: expected the device of post_logits, cpu"),
        (ops.balanced_kl, (x[:0], x[:0]), ValueError, "post_logits: expected a tensor .* that is not empty"),
        (ops.balanced_kl, (m[0], m[0]), ValueError, r"post_logits: expected shape \(\.\.\., S, C\), got \(3,\)"),
        (ops.balanced_kl, (x, x, -1.0), ValueError, r"free_nats: expected a finite number .* got -1\.0"),
        (ops.balanced_kl, (x, x, math.nan), ValueError, "free_nats: expected a finite number .* got nan"),
        (ops.balanced_kl, (x, x, math.inf), ValueError, "free_nats: expected a finite number .* got inf"),
        (ops.balanced_kl, (x, x, None), TypeError, "free_nats: expected a number, got NoneType"),
        (ops.balanced_kl, (x, x, 1.0, 1.5), ValueError, r"unimix: expected a number in \[0, 1\], got 1\.5"),
        (ops.balanced_kl, (x, x, 1.0, math.nan), ValueError, r"unimix: expected a number in \[0, 1\], got nan"),
        (ops.balanced_kl, (x, x, 1.0, "0"), TypeError, "unimix: expected a number, got str"),
        (ops.balanced_kl_gaussian, (m, 1.0, m, m), TypeError, "post_std: expected a tensor, got float"),
        (ops.balanced_kl_gaussian, (m, m, m, m[0]), ValueError, "prior_std: expected the shape of post_mean"),
        (ops.balanced_kl_gaussian, (m[0, 0],) * 4, ValueError, r"post_mean: expected a tensor .* got shape \(\)"),
        (ops.balanced_kl_gaussian, (m, m, m, m, -1), ValueError, "free_nats: expected a finite number .* got -1"),
    ],
)
def test_bad_arguments(op, arguments, error, message):
    with pytest.raises(error, match=message):
        op(*arguments)


# Triton


def check_triton_in_the_interpreter():
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            for shape in [(1, 1, 1), (5, 3, 7), (3, 2, 32, 16)]:
                assert_as_reference("triton", ops.balanced_kl, logits(shape, layout, dtype=dtype), 1.0, 0.01)
                assert_as_reference("triton", ops.balanced_kl, logits(shape, layout, dtype=dtype), 0.0, 0.0)
                assert_as_reference("triton", ops.balanced_kl_gaussian, gaussians(shape, layout, dtype=dtype), 1.0)
    for shape in [(4, 5), (3, 5, 300), (2, 40, 33), (2, 3, 2000)]:  # rows of several steps, of one variable each
        assert_as_reference("triton", ops.balanced_kl, logits(shape), 1.0, 0.01)
    for shape in [(7,), (2, 2500)]:
        assert_as_reference("triton", ops.balanced_kl_gaussian, gaussians(shape), 1.0)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="at most 4096 classes"):
        ops.balanced_kl(torch.ones(1, 5000), torch.ones(1, 5000))


def test_triton_in_the_interpreter(run_interpreted):
    run_interpreted(check_triton_in_the_interpreter)


def assert_compiles_and_fits(compile_ahead, kernel, dtype, plan, given):
    kinds = {name: f"*{dtype}" for name in kernel.arg_names if name.startswith(("post", "prior", "grad_p"))}
    kinds |= {name: "i32" for name in kernel.arg_names if name.endswith(("_row", "_variable"))}
    kinds |= {name: 1 for name in kernel.arg_names if name.endswith("_class")}  # as the launcher specialises them
    kinds |= dict.fromkeys(("dynamics", "representation", "kl", "grad_dynamics", "grad_representation"), "*fp32")
    kinds |= {"free_nats": "fp32", "unimix": "fp32", "rows": "i32", "variables": "i32", "classes": "i32"}
    kinds |= plan.tile | given
    compile_ahead(kernel, {name: kinds[name] for name in kernel.arg_names}, plan.warps).assert_fits()


@pytest.mark.parametrize("kernel", ["categorical_forward", "categorical_backward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("classes", "mixed"), [(4, True), (32, True), (32, False), (96, True), (4096, True)])
def test_triton_compiles_and_fits(compile_ahead, kernel, dtype, classes, mixed):
    kernels = pytest.importorskip("phyxdream.kernels.balanced_kl")
    plan = kernels.plan(1024, 32, classes)
    assert_compiles_and_fits(compile_ahead, getattr(kernels, kernel), dtype, plan, {"MIXED": mixed})


@pytest.mark.parametrize("kernel", ["gaussian_forward", "gaussian_backward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_gaussian_triton_compiles_and_fits(compile_ahead, kernel, dtype):
    kernels = pytest.importorskip("phyxdream.kernels.balanced_kl")
    plan = kernels.plan(1024, 30)
    one = {name: 1 for name in getattr(kernels, kernel).arg_names if name.endswith("_variable")}
    assert_compiles_and_fits(compile_ahead, getattr(kernels, kernel), dtype, plan, one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_triton_on_a_gpu(layout, dtype, unimix):
    for shape in [(1, 1, 1), (1024, 32, 32), (64, 16, 32, 24), (3, 70, 300), (5, 2, 4096)]:
        inputs = logits(shape, layout, dtype=dtype, device="cuda")
        assert_as_reference("triton", ops.balanced_kl, inputs, 1.0, unimix)
    for shape in [(1, 1), (1024, 32), (64, 16, 30), (3, 5000)]:
        inputs = gaussians(shape, layout, dtype=dtype, device="cuda")
        assert_as_reference("triton", ops.balanced_kl_gaussian, inputs, 1.0)
