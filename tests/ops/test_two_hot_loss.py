"""Two-hot loss and mean: the references against dense formulas, the backends against the references."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from phyxdream import ops
from phyxdream.nn import symexp_bins, symlog
from phyxdream.ops.backend import extension

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)

# Relative errors, of a difference relative to its terms. float32: some units of the last place in the exponentials, and
# another order of the sums. Half precision, of gradients alone: both compute in float32 and round once; Triton's
# interpreter truncates to bfloat16 where a GPU rounds.
EPS = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHARED = (1200, 255)  # enough elements for threads to share


# Layouts give the same values, but for same_row and same, in other strides.


def contiguous(x):
    return x


def batch_major(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


def every_other_row(x):
    for axis in range(x.dim() - 1):
        x = x.repeat_interleave(2, axis)
    return x[tuple(slice(1, None, 2) for _ in x.shape[:-1])]


def half_of_the_columns(x):
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def columns_first(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def same_row(x):
    return x.reshape(-1, x.shape[-1])[0].expand(x.shape)


def strided(x):
    return torch.stack([x, x], -1)[..., 1]


def axes_reversed(x):
    axes = list(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def same(x):
    return x.flatten()[0].expand(x.shape)


LAYOUTS = [contiguous, batch_major, every_other_row, half_of_the_columns, columns_first, same_row]
ROW_LAYOUTS = [contiguous, strided, axes_reversed, same]
BINS = {
    "symexp": symexp_bins,
    "symlog": partial(torch.linspace, -20, 20),
    "positive": lambda size: torch.linspace(-3, 4, size).exp(),
}


def make(shape, layout=contiguous, row_layout=contiguous, bins="symexp", dtype=torch.float32, seed=0, device="cpu"):
    """logits, target, bins, and a gradient of the results; a sixth of the targets lies outside the bins."""
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.randn, device=device, generator=generator, dtype=torch.float64)
    full = torch.float64 if dtype is torch.float64 else torch.float32
    bins = BINS[bins](shape[-1]).to(device, full)
    at = (0.5 + random(shape[:-1]) * 0.35) * (len(bins) - 1)
    below = at.long().clamp(0, len(bins) - 2)
    target = bins[below] + (at - below) * (bins[below + 1] - bins[below])
    grad = random(shape[:-1]).to(full)
    return layout(2 * random(shape).to(dtype)), row_layout(target.to(full)), bins, row_layout(grad)


def dense_two_hot(target, bins):
    """(..., K) weights in float64 from the definition: linear interpolation is a hat over every bin."""
    bins = bins.double()
    target = target.double().clamp(bins[0], bins[-1]).unsqueeze(-1)
    rise, fall = (target - bins[:-1]) / bins.diff(), (bins[1:] - target) / bins.diff()
    end = torch.ones_like(target)
    return torch.minimum(torch.cat([end, rise], -1), torch.cat([fall, end], -1)).clamp(min=0)


def manual(logits, target, bins, grad):
    """Loss, its gradient, mean, its gradient, in float64, with the hand-written backward."""
    logits, bins, grad = logits.double(), bins.double(), grad.double().unsqueeze(-1)
    p, two_hot = torch.softmax(logits, -1), dense_two_hot(target, bins)
    loss = (torch.logsumexp(logits, -1, keepdim=True) - logits).mul(two_hot).sum(-1)
    mean = (p * bins).sum(-1)
    return loss, grad * (p - two_hot), mean, grad * p * (bins - mean.unsqueeze(-1))


def run(backend, logits, target, bins, grad):
    """Loss, its gradient, mean, its gradient."""
    logits = logits.detach().requires_grad_()
    with ops.use_backend(backend):
        results = []
        for y in (ops.two_hot_loss(logits, target, bins), ops.two_hot_mean(logits, bins)):
            results += [y.detach(), *torch.autograd.grad(y, logits, grad)]
        return results


def assert_agrees(actual, expected, logits, target, bins, grad):
    """Errors relative to what the differences and sums are made of."""
    p, grad = torch.softmax(logits.double(), -1), grad.double().abs().unsqueeze(-1)
    spread = (p * bins.double().abs()).sum(-1)
    magnitudes = {
        "loss": 1 + logits.double().abs().amax(-1),
        "grad of loss": grad.expand(logits.shape),
        "mean": spread,
        "grad of mean": grad * p * (bins.double().abs() + spread.unsqueeze(-1)),
    }
    for (name, magnitude), a, e in zip(magnitudes.items(), actual, expected, strict=True):
        assert a.shape == e.shape == magnitude.shape
        if a.numel():
            eps = EPS[a.dtype if a.dtype in EPS else torch.float32]
            error = ((a.double() - e.double()).abs() / (magnitude + 1e-30)).amax().item()
            assert error <= eps, (name, error)  # also fails for NaN


def assert_as_reference(backend, *inputs):
    actual, expected = run(backend, *inputs), run("reference", *inputs)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert_agrees(actual, expected, *inputs)


@pytest.fixture
def threads():
    """`threads(n)` sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The definition


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("shape", [(6, 5, 255), (50, 40), (3, 16), (4, 2), (255,)])
def test_equals_the_formula(backend, shape, bins):
    inputs = make(shape, bins=bins)
    assert_agrees(run(backend, *inputs), manual(*inputs), *inputs)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_a_target_on_a_bin_is_that_class(backend):
    bins = symexp_bins()
    logits = make((255, 255))[0].requires_grad_()
    with ops.use_backend(backend):
        loss = ops.two_hot_loss(logits, bins, bins)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(255), reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), logits)[0], torch.softmax(logits, -1) - torch.eye(255), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_targets_beyond_the_ends_count_as_the_ends(backend):
    bins = symexp_bins()
    outside = torch.tensor([-math.inf, -3e38, -1e9, 1e9, 3e38, math.inf])
    logits, _, _, grad = make((6, 255))
    ends = bins[[0, 0, 0, -1, -1, -1]]
    for actual, expected in zip(
        run(backend, logits, outside, bins, grad), run(backend, logits, ends, bins, grad), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_bins_in_symlog_space_take_a_symlog_target(backend):
    logits = make((7, 255))[0]
    target = torch.tensor([-1e6, -3.0, -1e-3, 0.0, 0.2, 17.0, 1e7])
    bins = torch.linspace(-20, 20, 255)
    at = (symlog(target.double()) + 20) / 40 * 254
    below = at.long()
    logp = torch.log_softmax(logits.double(), -1)
    pick = [logp.gather(-1, k.unsqueeze(-1)).squeeze(-1) for k in (below, below + 1)]
    with ops.use_backend(backend):
        loss = ops.two_hot_loss(logits, symlog(target), bins)
    torch.testing.assert_close(loss.double(), -torch.lerp(*pick, at - below), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("size", [2, 3, 16, 17, 40, 41, 64, 255, 256, 1001])
def test_mirrored_logits_have_mean_zero_exactly(backend, size):
    half = 3 * torch.randn(20, (size + 1) // 2, generator=torch.Generator().manual_seed(size))
    mirrored = torch.cat([half, half.flip(-1)[:, size % 2 :]], -1)
    with ops.use_backend(backend):
        assert ops.two_hot_mean(mirrored, symexp_bins(size)).tolist() == [0.0] * 20
        assert ops.two_hot_mean(torch.full((3, size), -7.3), symexp_bins(size)).tolist() == [0.0] * 3


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("size", [3, 16, 255])
def test_adding_a_number_to_all_logits_changes_nothing(backend, size):
    logits, *rest = make((9, size))
    logits = (logits * 64).round() / 64  # so that the sum is exact
    for actual, expected in zip(run(backend, logits + 2.0**15, *rest), run(backend, logits, *rest), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_extreme_logits(backend):
    bins = torch.tensor([-1.0, 0.0, 2.0])
    huge = 1e30
    logits = torch.tensor([[huge, huge, huge], [huge, 0.0, -huge], [-huge, -huge, 0.0], [0.0, -3e38, -math.inf]])
    loss, grad, mean, mean_grad = run(backend, logits, torch.tensor([0.0, -1.0, 1.0, -1.0]), bins, torch.ones(4))
    torch.testing.assert_close(loss, torch.tensor([math.log(3), 0.0, huge / 2, 0.0]))
    torch.testing.assert_close(mean, torch.tensor([1 / 3, -1.0, 2.0, -1.0]))
    expected = [[1 / 3, -2 / 3, 1 / 3], [0, 0, 0], [0, -0.5, 0.5], [0, 0, 0]]
    torch.testing.assert_close(grad, torch.tensor(expected))
    torch.testing.assert_close(mean_grad[1:], torch.zeros(3, 3))


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 20, 39])
def test_nan_and_infinity_stay_in_their_row(backend, bad, column):
    logits, target, bins, grad = make((6, 40))
    clean = run(backend, logits, target, bins, grad)
    logits[2, column] = bad
    target[4] = math.nan
    loss, loss_grad, mean, mean_grad = run(backend, logits, target, bins, grad)
    assert loss[2].isnan()
    assert mean[2].isnan()
    assert loss_grad[2].isnan().any()
    assert mean_grad[2].isnan().any()
    assert loss[4].isnan()
    assert torch.equal(mean[4], clean[2][4])
    others = [0, 1, 3, 5]
    for actual, expected in zip((loss, loss_grad, mean, mean_grad), clean, strict=True):
        assert torch.equal(actual[others], expected[others])


# Gradients


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), (6,), (3, 2)])
def test_gradcheck_of_the_references(shape):
    logits, target, bins, _ = make(shape, bins="symlog", dtype=torch.float64)
    logits.requires_grad_()
    for function in (lambda x: ops.two_hot_loss(x, target, bins), lambda x: ops.two_hot_mean(x, bins)):
        assert gradcheck(function, (logits,))
        assert torch.autograd.gradgradcheck(function, (logits,))


@pytest.mark.parametrize("size", [2, 7, 40, 255])
def test_the_hand_written_backward_is_autograds(size):
    inputs = make((30, size), dtype=torch.float64)
    for actual, expected in zip(run("reference", *inputs), manual(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_target_and_bins_get_no_gradient(backend):
    logits, target, bins, _ = make((4, 9))
    target.requires_grad_()
    bins.requires_grad_()
    with ops.use_backend(backend):
        assert not ops.two_hot_loss(logits, target, bins).requires_grad
        assert not ops.two_hot_mean(logits, bins).requires_grad
        loss = ops.two_hot_loss(logits.requires_grad_(), target, bins).sum()
    assert torch.autograd.grad(loss, (target, bins), allow_unused=True) == (None, None)


@needs_extension
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["two_hot_loss", "two_hot_mean"])
def test_a_second_derivative_is_refused(name, compiled):
    logits, target, bins, _ = make((4, 3))
    inputs = (logits.requires_grad_(), target, bins) if name == "two_hot_loss" else (logits.requires_grad_(), bins)
    y = getattr(torch.ops.phyxdream if compiled else ops, name)(*inputs)
    (grad,) = torch.autograd.grad(y.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} is differentiable once"):
        grad.sum().backward()


@needs_extension
def test_a_mean_changed_in_place_is_no_silent_error():
    logits, _, bins, _ = make((4, 9))
    mean = ops.two_hot_mean(logits.requires_grad_(), bins)
    result = mean.square()
    with torch.no_grad():
        mean.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


# C++ against the reference

shapes = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(2, 70)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(2, 300)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 15, 16, 17, 32, 255])),
    st.tuples(st.integers(2, 300)),
    st.sampled_from([(1200, 255), (40, 5000), (3, 40000)]),
)


@needs_extension
@settings(deadline=None, max_examples=150)
@given(
    shape=shapes,
    layout=st.sampled_from(LAYOUTS),
    row_layout=st.sampled_from(ROW_LAYOUTS),
    bins=st.sampled_from(list(BINS)),
    seed=st.integers(0, 1000),
)
def test_cpu_agrees_with_the_reference(shape, layout, row_layout, bins, seed):
    assert_as_reference("cpu", *make(shape, layout, row_layout, bins, seed=seed))


@needs_extension
def test_strided_bins():
    logits, target, bins, grad = make((5, 40))
    two_apart = strided(bins)
    assert not two_apart.is_contiguous()
    for backend in ("reference", "cpu"):
        for actual, expected in zip(
            run(backend, logits, target, two_apart, grad), run(backend, logits, target, bins, grad), strict=True
        ):
            assert torch.equal(actual, expected)


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, batch_major, columns_first])
def test_cpu_keeps_the_memory_layout_of_the_logits(layout):
    inputs = make((3, 5, 40), layout)
    loss, grad, mean, mean_grad = run("cpu", *inputs)
    assert grad.stride() == mean_grad.stride() == inputs[0].stride()
    assert loss.is_contiguous()
    assert mean.is_contiguous()


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3)])
def test_no_rows(backend, shape):
    loss, grad, mean, mean_grad = run(
        backend, torch.zeros(shape), torch.zeros(shape[:-1]), symexp_bins(shape[-1]), torch.zeros(shape[:-1])
    )
    assert loss.shape == mean.shape == shape[:-1]
    assert grad.shape == mean_grad.shape == shape


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, batch_major, every_other_row])
@pytest.mark.parametrize("shape", [SHARED, (9, 150, 255), (3, 100_000)])
def test_the_number_of_threads_changes_no_bit(threads, shape, layout):
    inputs = make(shape, layout)
    threads(1)
    expected = run("cpu", *inputs)
    for n in (2, 3, 2, 40):
        threads(n)
        for actual, one_thread in zip(run("cpu", *inputs), expected, strict=True):
            assert torch.equal(actual, one_thread)


# Dtypes, autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("others", [torch.float32, None])
def test_half_precision_is_computed_and_returned_in_float32(dtype, others):
    logits, target, bins, grad = make((20, 70), bins="symlog", dtype=dtype)
    target, bins = target.to(others or dtype), bins.to(others or dtype)
    actual = run("reference", logits, target, bins, grad)
    exact = run("reference", logits.float(), target.float(), bins.float(), grad)
    assert [x.dtype for x in actual] == [torch.float32, dtype, torch.float32, dtype]
    for a, e in zip(actual, exact, strict=True):
        assert torch.equal(a, e.to(a.dtype))


def test_autocast_changes_nothing():
    logits, target, bins, _ = make((5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        for x in (logits, logits.bfloat16()):
            loss, mean = ops.two_hot_loss(x, target, bins), ops.two_hot_mean(x, bins)
            assert loss.dtype == mean.dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(loss, ops.two_hot_loss(x, target, bins))
                assert torch.equal(mean, ops.two_hot_mean(x, bins))


def test_inference_mode():
    logits, target, bins, _ = make((5, 4))
    with torch.inference_mode():
        assert ops.two_hot_loss(logits, target, bins).is_inference()
        assert ops.two_hot_mean(logits, bins).is_inference()


# torch's machinery


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, batch_major, columns_first])
def test_opcheck(layout):
    logits, target, bins, grad = make((3, 4, 5), layout, axes_reversed)
    mean = torch.ops.phyxdream.two_hot_mean(logits, bins)
    opcheck(torch.ops.phyxdream.two_hot_loss_backward, (grad, logits, target, bins))
    opcheck(torch.ops.phyxdream.two_hot_mean_backward, (grad, logits, mean, bins))
    opcheck(torch.ops.phyxdream.two_hot_loss, (logits.requires_grad_(), target, bins))
    opcheck(torch.ops.phyxdream.two_hot_mean, (logits, bins))


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_compiles_as_one_graph(backend):
    def both(logits, target, bins):
        return ops.two_hot_loss(logits, target, bins) + 2 * ops.two_hot_mean(logits, bins)

    logits, target, bins, grad = make((5, 33), bins="symlog")
    logits.requires_grad_()
    with ops.use_backend(backend):
        results = [
            (y.detach(), *torch.autograd.grad(y, logits, grad))
            for y in (
                both(logits, target, bins),
                torch.compile(both, fullgraph=True, backend="aot_eager")(logits, target, bins),
            )
        ]
    torch.testing.assert_close(*results)


def test_function_transforms_take_the_reference():
    logits, target, bins, _ = make((5, 4))
    expected = ops.two_hot_loss(logits, target, bins), ops.two_hot_mean(logits, bins)
    actual = (
        torch.vmap(ops.two_hot_loss, (0, 0, None))(logits, target, bins),
        torch.vmap(ops.two_hot_mean, (0, None))(logits, bins),
    )
    torch.testing.assert_close(actual, expected)


@needs_extension
@pytest.mark.parametrize("op", [ops.two_hot_mean, ops.two_hot_loss])
def test_explain_tells_of_threads_and_copies(threads, op):
    threads(2)

    def explained(logits, bins):
        inputs = (logits, bins) if op is ops.two_hot_mean else (logits, logits[..., 0], bins)
        return ops.explain(op, *inputs)

    bins = torch.arange(8.0)
    assert explained(torch.ones(3, 8), bins).reasons["cpu"].startswith("can: C++, 1 thread,")
    assert "2 threads" in explained(torch.ones(1 << 16, 8), bins).reasons["cpu"]
    assert "copy" in explained(torch.ones(8, 3).T, bins).reasons["cpu"]
    assert explained(torch.ones(3, 8).double(), bins.double()).backend == "reference"


# Bad input

x = torch.zeros(3, 2)
t = torch.zeros(3)
b = torch.arange(2.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, t, b), TypeError, "logits: expected a tensor, got NoneType"),
        ((x, 1.0, b), TypeError, "target: expected a tensor, got float"),
        ((x, t, [0.0, 1.0]), TypeError, "bins: expected a tensor, got list"),
        ((x.int(), t, b), TypeError, r"logits: expected a floating-point tensor, got torch\.int32"),
        ((x, t.long(), b), TypeError, r"target: expected the dtype of logits, torch\.float32, .*got torch\.int64"),
        ((x, t.double(), b), TypeError, r"target: expected the dtype of logits, torch\.float32, .*got torch\.float64"),
        ((x, t, b.double()), TypeError, r"bins: expected the dtype of logits, torch\.float32, .*got torch\.float64"),
        ((x.bfloat16(), t.half(), b), TypeError, r"target: expected .*torch\.bfloat16, or float32 .*torch\.float16"),
        ((x, t, torch.zeros(3)), ValueError, r"shapes \(\.\.\., K\) and \(K,\) with K > 1, got \(3, 2\) and \(3,\)"),
        ((x, t, x), ValueError, r"logits, bins: .*got \(3, 2\) and \(3, 2\)"),
        ((x[0, 0], t, b), ValueError, r"logits, bins: .*got \(\) and \(2,\)"),
        ((x[:, :1], t, b[:1]), ValueError, r"logits, bins: .*got \(3, 1\) and \(1,\)"),
        ((x, t[:2], b), ValueError, r"target: .*without its last axis, \(3,\), got \(2,\) \(no broadcast\)"),
        ((x, t[0], b), ValueError, r"target: .*\(3,\), got \(\)"),
        ((x, x, b), ValueError, r"target: .*\(3,\), got \(3, 2\)"),
        ((x, t.to("meta"), b), ValueError, "target: expected the device of logits, cpu, got meta"),
        ((x, t, b.to("meta")), ValueError, "bins: expected the device of logits, cpu, got meta"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.two_hot_loss(*arguments)
    if "target" not in message:
        with pytest.raises(error, match=message):
            ops.two_hot_mean(arguments[0], arguments[2])


# Triton


def check_triton_in_the_interpreter():
    for shape in [(1, 2), (5, 40), (3, 2, 41), (9, 255), (2, 2, 3, 16), (255,), (2, 3000)]:
        for dtype in (torch.float32, torch.bfloat16):
            for layout, row_layout in zip(LAYOUTS, [*ROW_LAYOUTS, contiguous, strided], strict=True):
                assert_as_reference("triton", *make(shape, layout, row_layout, dtype=dtype))
    for bins in BINS:
        assert_as_reference("triton", *make((7, 33), bins=bins))
    logits, target, bins, grad = make((4, 255))
    target[0], target[1], target[2], logits[3, 7] = math.inf, -1e30, math.nan, math.nan
    loss, _, mean, _ = run("triton", logits, target, bins, grad)
    expected, _, expected_mean, _ = run("reference", logits, target, bins, grad)
    torch.testing.assert_close([loss, mean], [expected, expected_mean], equal_nan=True)
    assert loss.isnan().tolist() == [False, False, True, True]
    with ops.use_backend("triton"):
        for size in (2, 40, 255):
            assert ops.two_hot_mean(torch.full((3, size), 3.3), symexp_bins(size)).tolist() == [0.0] * 3
        with pytest.raises(ops.BackendError, match="at most 16384 bins"):
            ops.two_hot_mean(torch.ones(1, 40000), torch.ones(40000))


def test_triton_in_the_interpreter(run_interpreted):
    run_interpreted(check_triton_in_the_interpreter)


@pytest.mark.parametrize("kernel", ["loss_forward", "loss_backward", "mean_forward", "mean_backward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [41, 255, 16384])
def test_triton_compiles_and_fits(compile_ahead, kernel, dtype, size):
    kernels = pytest.importorskip("phyxdream.kernels.two_hot_loss")
    plan = kernels.plan(1 << 14, size)
    kinds = dict.fromkeys(("x", "grad_x"), f"*{dtype}")
    kinds |= dict.fromkeys(("loss", "mean", "target", "bins", "grad"), "*fp32")
    kinds |= {"ROWS": plan.rows, "COLUMNS": plan.columns, "HALF": plan.columns // 2}
    # As the launcher specialises them.
    kinds |= dict.fromkeys(("x_column", "gx_column", "target_row", "mean_row", "grad_row"), 1)
    function = getattr(kernels, f"{kernel}_kernel")
    resources = compile_ahead(function, {name: kinds.get(name, "i32") for name in function.arg_names}, plan.warps)
    resources.assert_fits()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (16, 64, 255), (1000, 41), (3, 10000), (15, 1024, 255)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_on_a_gpu(shape, layout, dtype):
    assert_as_reference("triton", *make(shape, layout, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [2, 3, 40, 255])
def test_equal_logits_have_mean_zero_on_a_gpu(size):
    bins = symexp_bins(size).cuda()
    with ops.use_backend("triton"):
        assert ops.two_hot_mean(torch.full((5, size), 3.3, device="cuda"), bins).tolist() == [0.0] * 5
