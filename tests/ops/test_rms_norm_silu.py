import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from phyxdream import ops
from phyxdream.ops.backend import extension

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)

TOLERANCE = {
    # Other order of the sums, another exponential: some units of the last place. The gradient of x is a difference.
    torch.float32: {"rtol": 2e-5, "atol": 1e-5},
    # Both compute in float32 and round once; Triton's interpreter truncates to bfloat16 where a GPU rounds.
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-7},
    torch.float16: {"rtol": 2**-9, "atol": 2**-10},
}
SHARED = (300, 1024)  # enough elements for threads to share


def contiguous(draw, shape):
    return draw(shape)


def channels_last(draw, shape):
    """A channels-last picture seen as (N, H, W, C); the same as `contiguous` for other shapes."""
    if len(shape) != 4:
        return draw(shape)
    n, h, w, c = shape
    return draw((n, c, h, w)).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def batch_major(draw, shape):
    return draw(shape[-2::-1] + shape[-1:]).permute(*range(len(shape) - 2, -1, -1), len(shape) - 1)


def every_other_row(draw, shape):
    return draw([2 * n for n in shape[:-1]] + [shape[-1]])[tuple(slice(1, None, 2) for _ in shape[:-1])]


def half_of_the_columns(draw, shape):
    return draw((*shape[:-1], 2 * shape[-1]))[..., : shape[-1]]


def columns_first(draw, shape):
    return draw(shape[-1:] + shape[:-1]).movedim(0, -1)


def same_row(draw, shape):
    return draw(shape[-1:]).expand(shape)


def one_number(draw, shape):
    return draw(()).expand(shape)


LAYOUTS = [
    contiguous, channels_last, batch_major, every_other_row, half_of_the_columns, columns_first, same_row, one_number,
]  # fmt: skip


def make(shape, layout=contiguous, grad_layout=None, dtype=torch.float32, seed=0, device="cpu"):
    """x, weight and a gradient of the output; the weight is float32 beside half precision."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, device=device, generator=generator, dtype=dtype)
    weight_dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    weight = 0.5 + torch.rand(shape[-1], device=device, generator=generator, dtype=weight_dtype)
    return layout(normal, shape), weight, (grad_layout or layout)(normal, shape)


def run(backend, x, weight, grad):
    """The output and the gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with ops.use_backend(backend):
        y = ops.rms_norm_silu(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), grad)


def assert_as_reference(backend, x, weight, grad):
    y, grad_x, grad_weight = run(backend, x, weight, grad)
    expected_y, expected_x, expected_weight = run("reference", x, weight, grad)
    torch.testing.assert_close(y, expected_y, **TOLERANCE[x.dtype], msg=lambda m: f"output: {m}")
    # A difference of terms that grow as the row gets small: its error is theirs, its value may be near zero.
    size = grad.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-4)
    size = size.abs().amax(-1, keepdim=True).clamp(min=1.0).to(x.dtype)
    torch.testing.assert_close(grad_x / size, expected_x / size, **TOLERANCE[x.dtype], msg=lambda m: f"grad of x: {m}")
    # A sum over the rows: its error is that of the terms, too.
    scale = max(1.0, math.sqrt(x.numel() / x.shape[-1]))
    tolerance = {"rtol": TOLERANCE[x.dtype]["rtol"], "atol": scale * TOLERANCE[x.dtype]["atol"]}
    torch.testing.assert_close(grad_weight, expected_weight, **tolerance, msg=lambda m: f"grad of weight: {m}")


@pytest.fixture
def threads():
    """`threads(n)` sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The definition


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_equals_the_formula(backend):
    x, weight, _ = make((5, 3, 7))
    u = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 0.25) * weight
    with ops.use_backend(backend):
        torch.testing.assert_close(ops.rms_norm_silu(x, weight, 0.25), u / (1 + torch.exp(-u)))


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_does_not_depend_on_the_scale_of_a_row(backend):
    x, weight, _ = make((5, 64))
    with ops.use_backend(backend):
        y, scaled = ops.rms_norm_silu(x, weight, 0), ops.rms_norm_silu(1024 * x, weight, 0)
    assert torch.equal(y, scaled)


@needs_extension
def test_silu_is_accurate_over_the_whole_range():
    """A row of ones leaves u = weight, so that the exponential is seen alone."""
    u = torch.cat([torch.linspace(-86, 90, 200_001), torch.tensor([0.0, 1e-30, -1e-30, 1e30, 3e38])])
    exact = torch.nn.functional.silu(u.double())
    with ops.use_backend("cpu"):
        y = ops.rms_norm_silu(torch.ones(1, len(u)), u, 0.0)[0]
    torch.testing.assert_close(y.double(), exact, rtol=3e-7, atol=0)


@needs_extension
def test_silu_vanishes_far_below_zero():
    u = torch.tensor([-87.0, -88.0, -100.0, -1e4, -1e30, -3e38])
    with ops.use_backend("cpu"):
        y = ops.rms_norm_silu(torch.ones(1, len(u)), u, 0.0)[0]
    assert y.abs().max() < 1e-35


@needs_extension
def test_cpu_spreads_neither_nan_nor_infinity_to_other_rows():
    x, weight, grad = make((6, 40))
    clean = run("cpu", x, weight, grad)
    x[2, 7], x[4, 3] = math.nan, math.inf
    y, grad_x, _ = run("cpu", x, weight, grad)
    assert y[2].isnan().all()
    assert y[4, 3].isnan()
    others = [0, 1, 3, 5]
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(grad_x[others], clean[1][others])


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_a_row_of_zeros_has_a_finite_gradient(backend):
    x, weight, grad = torch.zeros(3, 8), torch.ones(8), torch.ones(3, 8)
    y, grad_x, grad_weight = run(backend, x, weight, grad)
    assert torch.equal(y, x)
    torch.testing.assert_close(grad_x, torch.full((3, 8), 0.5 / math.sqrt(1e-4)))
    assert torch.equal(grad_weight, torch.zeros(8))


# Gradients


@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (4, 2, 3), (6,)])
def test_gradcheck_of_the_reference(shape):
    x, weight, _ = make(shape, dtype=torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(ops.rms_norm_silu, inputs)
    assert torch.autograd.gradgradcheck(ops.rms_norm_silu, inputs)


@needs_extension
@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input_alone(wanted):
    inputs = list(make((5, 33))[:2])
    expected = run("reference", *inputs, torch.ones(5, 33))[1 + wanted]
    inputs[wanted].requires_grad_()
    with ops.use_backend("cpu"):
        ops.rms_norm_silu(*inputs).sum().backward()  # the gradient of a sum is expanded: all strides are 0
    torch.testing.assert_close(inputs[wanted].grad, expected, rtol=2e-5, atol=1e-5)
    assert inputs[1 - wanted].grad is None


@needs_extension
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused(compiled):
    x, weight, _ = make((4, 3))
    op = torch.ops.phyxdream.rms_norm_silu if compiled else ops.rms_norm_silu
    y = op(x.requires_grad_(), weight, 1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_silu is differentiable once"):
        grad.sum().backward()


# C++ against the reference

shapes = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 8, 16, 32])),
    st.tuples(st.integers(1, 300)),
    st.sampled_from([(2000, 32), (40, 5000), (3, 40000)]),
)


@needs_extension
@settings(deadline=None, max_examples=150)
@given(
    shape=shapes,
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
@example((3, 40000), one_number, one_number, 0)  # equal terms round the same way
def test_cpu_agrees_with_the_reference(shape, layout, grad_layout, seed):
    assert_as_reference("cpu", *make(shape, layout, grad_layout, seed=seed))


@needs_extension
def test_a_strided_weight():
    x, weight, grad = make((5, 8))
    strided = weight.repeat_interleave(3)[::3]
    assert not strided.is_contiguous()
    for actual, expected in zip(run("cpu", x, strided, grad), run("cpu", x, weight, grad), strict=True):
        assert torch.equal(actual, expected)


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, channels_last, batch_major, columns_first])
def test_cpu_keeps_the_memory_layout_of_x(layout):
    x, weight, grad = make((2, 3, 5, 4), layout, contiguous)
    y, grad_x, _ = run("cpu", x, weight, grad)
    assert y.stride() == grad_x.stride() == x.stride()


@needs_extension
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3)])
def test_no_rows(shape):
    y, grad_x, grad_weight = run("cpu", *make(shape))
    assert y.shape == grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(shape[-1]))


# Threads


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, batch_major, every_other_row])
@pytest.mark.parametrize("shape", [SHARED, (9, 1000, 32), (3, 100_000)])
def test_the_number_of_threads_changes_no_bit(threads, shape, layout):
    inputs = make(shape, layout)
    threads(1)
    expected = run("cpu", *inputs)
    for n in (2, 3, 2, 40):
        threads(n)
        for actual, one_thread in zip(run("cpu", *inputs), expected, strict=True):
            assert torch.equal(actual, one_thread)


@needs_extension
def test_several_callers_at_once(threads):
    threads(3)
    inputs = [make(SHARED, seed=seed) for seed in range(4)]
    expected = [run("cpu", *x) for x in inputs]

    def call(i):
        return [run("cpu", *inputs[i]) for _ in range(20)]

    with ThreadPoolExecutor(4) as callers:
        for i, results in enumerate(callers.map(call, range(4))):
            assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected[i], strict=True))


FORK = """
import os
import torch
from phyxdream import ops

torch.set_num_threads(3)
x, weight = torch.ones(300, 1024), torch.ones(1024)
with ops.use_backend("cpu"):
    before = ops.rms_norm_silu(x, weight).numpy()
    child = os.fork()
    if child == 0:
        for _ in range(3):
            after = ops.rms_norm_silu(x, weight).numpy()
        os._exit(0 if (after == before).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (ops.rms_norm_silu(x, weight).numpy() == before).all()
"""


@needs_extension
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_child_starts_threads_of_its_own_and_both_exit(tmp_path):
    script = tmp_path / "fork.py"
    script.write_text(FORK)
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", script], check=True, timeout=120)


# Dtypes, autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, weight_dtype):
    x, weight, grad = make((20, 70), dtype=dtype)
    weight = weight.to(weight_dtype or dtype)
    y, grad_x, grad_weight = run("reference", x, weight, grad)
    exact, exact_x, exact_weight = run("reference", x.float(), weight.float(), grad.float())
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, weight.dtype)
    assert torch.equal(y, exact.to(dtype))
    assert torch.equal(grad_x, exact_x.to(dtype))
    assert torch.equal(grad_weight, exact_weight.to(weight.dtype))


def test_autocast_keeps_the_dtype_of_x():
    x, weight, _ = make((5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.rms_norm_silu(x, weight).dtype == torch.float32
        assert ops.rms_norm_silu(x.bfloat16(), weight).dtype == torch.bfloat16


def test_inference_mode():
    with torch.inference_mode():
        assert ops.rms_norm_silu(*make((5, 4))[:2]).is_inference()


def test_a_lazily_negated_view_is_read_with_its_sign():
    x = torch.complex(torch.zeros(3, 2), torch.ones(3, 2)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(ops.rms_norm_silu(x, torch.ones(2)), ops.rms_norm_silu(-torch.ones(3, 2), torch.ones(2)))


# torch's machinery


@needs_extension
@pytest.mark.parametrize("layout", [contiguous, channels_last, columns_first])
def test_opcheck(layout):
    x, weight, grad = make((2, 3, 4, 5), layout)
    opcheck(torch.ops.phyxdream.rms_norm_silu, (x.requires_grad_(), weight.requires_grad_(), 1e-4))
    opcheck(torch.ops.phyxdream.rms_norm_silu_backward, (grad, x.detach(), weight.detach(), 1e-4))


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_compiles_as_one_graph(backend):
    x, weight, grad = make((5, 33))
    compiled = torch.compile(lambda *args: 2 * ops.rms_norm_silu(*args), fullgraph=True, backend="aot_eager")
    expected = run(backend, x, weight, 2 * grad)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    with ops.use_backend(backend):
        y = compiled(*inputs)
        grads = torch.autograd.grad(y, inputs, grad)
    torch.testing.assert_close([y, *grads], [2 * expected[0], *expected[1:]])


def test_function_transforms_take_the_reference():
    x, weight, _ = make((5, 4))
    torch.testing.assert_close(torch.vmap(ops.rms_norm_silu, (0, None))(x, weight), ops.rms_norm_silu(x, weight))


@needs_extension
def test_explain_tells_of_threads_and_copies(threads):
    threads(2)
    weight = torch.ones(8)
    assert ops.explain(ops.rms_norm_silu, torch.ones(3, 8), weight).reasons["cpu"].startswith("can: C++, 1 thread,")
    assert "2 threads" in ops.explain(ops.rms_norm_silu, torch.ones(1 << 16, 8), weight).reasons["cpu"]
    assert "copy" in ops.explain(ops.rms_norm_silu, torch.ones(8, 3).T, weight).reasons["cpu"]
    assert ops.explain(ops.rms_norm_silu, torch.ones(3, 8).double(), weight.double()).backend == "reference"


# Bad input

x = torch.zeros(3, 2)
w = torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, w), TypeError, "x: expected a tensor, got NoneType"),
        ((x, [1.0, 1.0]), TypeError, "weight: expected a tensor, got list"),
        ((x.int(), w), TypeError, r"x: expected a floating-point tensor, got torch\.int32"),
        ((x, w.cfloat()), TypeError, r"weight: expected a floating-point tensor, got torch\.complex64"),
        ((x, w.double()), TypeError, r"weight: expected the dtype of x, torch\.float32, .*got torch\.float64"),
        ((x, w.bfloat16()), TypeError, r"weight: expected the dtype of x, torch\.float32, .*got torch\.bfloat16"),
        ((x, torch.zeros(3)), ValueError, r"shapes \(\.\.\., D\) and \(D,\) with D > 0, got \(3, 2\) and \(3,\)"),
        ((x, torch.zeros(1)), ValueError, r"got \(3, 2\) and \(1,\)"),
        ((x, x), ValueError, r"got \(3, 2\) and \(3, 2\)"),
        ((x[0, 0], w), ValueError, r"got \(\) and \(2,\)"),
        ((x[:, :0], w[:0]), ValueError, r"got \(3, 0\) and \(0,\)"),
        ((x, w.to("meta")), ValueError, "weight: expected the device of x, cpu, got meta"),
        ((x, w, -1e-4), ValueError, r"eps: expected a finite number that is not negative, got -0\.0001"),
        ((x, w, math.nan), ValueError, "eps: expected a finite number that is not negative, got nan"),
        ((x, w, math.inf), ValueError, "eps: expected a finite number that is not negative, got inf"),
        ((x, w, "1e-4"), TypeError, "eps: expected a number, got str"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm_silu(*arguments)


# Triton


def check_triton_in_the_interpreter():
    for shape in [(1, 1), (5, 40), (15, 3, 2), (300, 64), (2, 2, 3, 16), (7,), (2, 5000)]:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in LAYOUTS:
                assert_as_reference("triton", *make(shape, layout, dtype=dtype))
    x, weight, grad = make((2000, 500))  # more tiles than programs
    kernels = sys.modules["phyxdream.kernels.rms_norm_silu"]
    kernels.PROGRAMS = 3
    assert_as_reference("triton", x, weight, grad)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="at most 32768 columns"):
        ops.rms_norm_silu(torch.ones(1, 40000), torch.ones(40000))


def test_triton_in_the_interpreter(run_interpreted):
    run_interpreted(check_triton_in_the_interpreter)


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [32, 512, 4096])
def test_triton_compiles_and_fits(compile_ahead, kernel, dtype, size):
    kernels = pytest.importorskip("phyxdream.kernels.rms_norm_silu")
    plan = kernels.plan(1 << 16, size)
    kinds = dict.fromkeys(("x", "y", "grad", "grad_x"), f"*{dtype}") | {"weight": "*fp32", "shares": "*fp32"}
    kinds |= {"eps": "fp32", "ROWS": plan.rows, "COLUMNS": plan.columns}
    kinds |= {name: 1 for name in ("x_column", "y_column", "g_column", "gx_column")}  # as the launcher specialises them
    function = getattr(kernels, kernel)
    resources = compile_ahead(function, {name: kinds.get(name, "i32") for name in function.arg_names}, plan.warps)
    resources.assert_fits()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (16, 512), (100_000, 32), (3, 30000), (4, 16, 16, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_on_a_gpu(shape, layout, dtype):
    assert_as_reference("triton", *make(shape, layout, dtype=dtype, device="cuda"))
