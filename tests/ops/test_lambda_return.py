import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from phyxdream import ops
from phyxdream.ops.backend import extension

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)

TOLERANCE = {
    # The same few operations a step in another order (fused multiply-adds, scans): a few units of the last place each,
    # which fade along the recurrence (d·λ < 1) instead of piling up; cancellation in R_{t+1} - v_t needs the rest.
    torch.float32: {"rtol": 2e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    # Sums are float32 on both sides. What differs is the last rounding and that of the returns saved for the backward;
    # besides, Triton's interpreter truncates to bfloat16 where a GPU rounds.
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
}


def time_major(draw, shape):
    return draw(shape)


def batch_major(draw, shape):
    return draw(shape[1:] + shape[:1]).movedim(-1, 0)


def every_other(draw, shape):
    return draw([2 * n for n in shape])[tuple(slice(1, None, 2) for _ in shape)]


def columns_reversed(draw, shape):
    return draw(shape[:1] + shape[:0:-1]).permute(0, *range(len(shape) - 1, 0, -1))


def same_for_all_steps(draw, shape):
    return draw(shape[1:]).expand(shape)


def one_number(draw, shape):
    return draw(()).expand(shape)


LAYOUTS = [time_major, batch_major, every_other, columns_reversed, same_for_all_steps, one_number]


def make(shape, layouts=(time_major,), dtype=torch.float32, seed=0, device="cpu"):
    """reward, next_value, discount and λ in these layouts (the last for the rest), and a gradient for the returns."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, dtype=dtype, device=device, generator=generator)
    uniform = partial(torch.rand, dtype=dtype, device=device, generator=generator)
    layouts = [*layouts, *[layouts[-1]] * (5 - len(layouts))]
    draws = (normal, normal, uniform, uniform, normal)
    return [layout(draw, shape) for layout, draw in zip(layouts, draws, strict=True)]


def run(backend, inputs, grad):
    """The returns and the gradient of every tensor among `inputs`."""
    inputs = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    with ops.use_backend(backend):
        returns = ops.lambda_return(*inputs)
        return returns, *torch.autograd.grad(returns, [x for x in inputs if isinstance(x, torch.Tensor)], grad)


def assert_as_reference(backend, inputs, grad):
    names = ("returns", "grad of reward", "grad of next_value", "grad of discount", "grad of lambda_")
    for name, actual, expected in zip(names, run(backend, inputs, grad), run("reference", inputs, grad), strict=False):
        torch.testing.assert_close(actual, expected, **TOLERANCE[grad.dtype], msg=lambda m, name=name: f"{name}: {m}")


# The definition


def test_equals_the_mixture_of_n_step_returns():
    """Hafner et al. 2020, eq. 5 and 6: (1 - λ) Σ_{n<H} λ^{n-1} V^n + λ^{H-1} V^H."""
    reward, next_value, discount, _, _ = make((6, 3), dtype=torch.float64)
    lambda_, horizon = 0.7, 6

    def n_step(n):
        total, weight = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        for t in range(n):
            total += weight * reward[t]
            weight = weight * discount[t]
        return total + weight * next_value[n - 1]

    mixture = (1 - lambda_) * sum(lambda_ ** (n - 1) * n_step(n) for n in range(1, horizon))
    mixture += lambda_ ** (horizon - 1) * n_step(horizon)
    torch.testing.assert_close(ops.lambda_return(reward, next_value, discount, lambda_)[0], mixture)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_lambda_zero_is_the_one_step_target(backend):
    reward, next_value, discount, _, _ = make((5, 4))
    with ops.use_backend(backend):
        returns = ops.lambda_return(reward, next_value, discount, 0.0)
    torch.testing.assert_close(returns, reward + discount * next_value)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_lambda_one_is_the_discounted_sum_that_ends_in_the_last_value(backend):
    reward, next_value = torch.ones(4, 1), torch.full((4, 1), 100.0)
    with ops.use_backend(backend):
        returns = ops.lambda_return(reward, next_value, torch.full((4, 1), 0.5), 1)
    assert returns[0].item() == 1 + 0.5 + 0.25 + 0.125 + 100 / 16


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_is_linear_in_reward_and_value(backend):
    a, b = make((7, 5), dtype=torch.float64), make((7, 5), dtype=torch.float64, seed=1)
    discount = a[2]
    with ops.use_backend(backend):
        mixed = ops.lambda_return(2 * a[0] - b[0], 2 * a[1] - b[1], discount)
        parts = 2 * ops.lambda_return(a[0], a[1], discount) - ops.lambda_return(b[0], b[1], discount)
    torch.testing.assert_close(mixed, parts)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_nothing_crosses_a_discount_of_zero(backend):
    reward, next_value, discount, _, _ = make((6, 2))
    discount[2] = 0
    changed = [torch.cat([x[:3], x[3:] + 10]) for x in (reward, next_value)]
    with ops.use_backend(backend):
        before = ops.lambda_return(reward, next_value, discount)
        after = ops.lambda_return(*changed, discount)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


# Gradients


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (4, 2, 3)])
@pytest.mark.parametrize("layout", [time_major, batch_major])
def test_gradcheck(backend, shape, layout):
    inputs = [x.requires_grad_() for x in make(shape, [layout], torch.float64)[:4]]
    with ops.use_backend(backend):
        assert gradcheck(ops.lambda_return, inputs)
        assert gradcheck(partial(ops.lambda_return, lambda_=0.9), inputs[:3])


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_input_alone(backend, wanted):
    inputs = make((5, 3), dtype=torch.float64)[:4]
    expected = run("reference", inputs, torch.ones(5, 3, dtype=torch.float64))[1 + wanted]
    inputs[wanted].requires_grad_()
    with ops.use_backend(backend):
        ops.lambda_return(*inputs).sum().backward()  # the gradient of a sum is expanded: all strides are 0
    torch.testing.assert_close(inputs[wanted].grad, expected)


@needs_extension
@pytest.mark.parametrize("op", [ops.lambda_return, lambda *x: torch.ops.phyxdream.lambda_return(*x, None, 0.9)])
def test_a_second_derivative_is_refused(op):
    inputs = [x.requires_grad_() for x in make((4, 2))[:3]]
    (grad,) = torch.autograd.grad(op(*inputs).sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="lambda_return is differentiable once"):
        grad.sum().backward()


def test_the_reference_is_differentiable_twice():
    inputs = [x.requires_grad_() for x in make((3, 2), dtype=torch.float64)[:4]]
    with ops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(ops.lambda_return, inputs)


# C++ against the reference

shapes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9)),
    st.tuples(st.integers(1, 300)),
    st.sampled_from([(2, 1100), (600, 9), (257, 3, 1), (3, 2, 2, 5)]),
)


@needs_extension
@settings(deadline=None, max_examples=150)
@given(
    shape=shapes,
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    tensor_lambda=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cpu_agrees_with_the_reference(shape, layouts, dtype, tensor_lambda, seed):
    *inputs, grad = make(shape, layouts, dtype, seed)
    inputs[3] = inputs[3] if tensor_lambda else 0.95
    assert_as_reference("cpu", inputs, grad)


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_cpu_agrees_with_the_reference_where_threads_share_the_work(layout):
    *inputs, grad = make((70, 8200), [layout])
    assert_as_reference("cpu", [*inputs[:3], 0.95], grad)


@needs_extension
@pytest.mark.parametrize("layout", [time_major, batch_major, columns_reversed])
def test_cpu_keeps_the_memory_layout_of_the_reward(layout):
    reward, next_value, discount, _, _ = make((5, 4, 3), [layout])
    with ops.use_backend("cpu"):
        assert ops.lambda_return(reward, next_value, discount).stride() == reward.stride()


@needs_extension
def test_cpu_spreads_neither_nan_nor_infinity_to_other_columns():
    reward, next_value, discount, _, _ = make((6, 3))
    clean = ops.lambda_return(reward, next_value, discount)
    reward[2, 0], reward[4, 2] = math.nan, math.inf
    returns = ops.lambda_return(reward, next_value, discount)
    assert returns[:3, 0].isnan().all()
    assert returns[:5, 2].isinf().all()
    assert torch.equal(returns[:, 1], clean[:, 1])
    assert torch.equal(returns[3:, 0], clean[3:, 0])


# λ, dtypes, autocast


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_a_tensor_of_equal_lambdas_is_a_number(backend):
    *inputs, _, grad = make((6, 4), dtype=torch.float64)
    number, *grads = run(backend, [*inputs, 0.9], grad)
    for lambda_ in (torch.tensor(0.9, dtype=torch.float64), torch.full((6, 4), 0.9, dtype=torch.float64)):
        returns, *others, grad_lambda = run(backend, [*inputs, lambda_], grad)
        assert grad_lambda.shape == lambda_.shape
        torch.testing.assert_close([returns, *others], [number, *grads])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype):
    reward, next_value, discount, _, _ = make((200, 3), dtype=dtype)
    exact = ops.lambda_return(reward.float(), next_value.float(), discount.float())
    returns = ops.lambda_return(reward, next_value, discount)
    assert returns.dtype == dtype
    with ops.use_backend("reference"):
        assert torch.equal(ops.lambda_return(reward, next_value, discount), returns)
    torch.testing.assert_close(returns.float(), exact.to(dtype).float(), rtol=0, atol=2**-7)


def test_autocast_turns_mixed_precision_into_float32():
    reward, next_value, discount, _, _ = make((5, 4))
    next_value = next_value.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        returns = ops.lambda_return(reward, next_value, discount)
    assert returns.dtype == torch.float32
    torch.testing.assert_close(returns, ops.lambda_return(reward, next_value.float(), discount))
    returns.sum().backward()
    assert next_value.grad.dtype == torch.bfloat16


def test_inference_mode():
    with torch.inference_mode():
        inputs = make((5, 4))[:3]
        returns = ops.lambda_return(*inputs)
    assert returns.is_inference()


def test_a_lazily_negated_view_is_read_with_its_sign():
    reward = torch.complex(torch.zeros(3, 2), torch.ones(3, 2)).conj().imag
    assert reward.is_neg()
    returns = ops.lambda_return(reward, torch.zeros(3, 2), torch.zeros(3, 2))
    assert torch.equal(returns, -torch.ones(3, 2))
    leaf = torch.zeros(3, 2, requires_grad=True)
    ops.lambda_return(leaf, torch.zeros(3, 2), torch.zeros(3, 2)).backward(reward)
    assert torch.equal(leaf.grad, -torch.ones(3, 2))


# torch's machinery


@needs_extension
@pytest.mark.parametrize("tensor_lambda", [False, True])
@pytest.mark.parametrize("layout", [time_major, batch_major])
def test_opcheck(tensor_lambda, layout):
    reward, next_value, discount, lambda_, grad = make((5, 4), [layout])
    inputs = [x.requires_grad_() for x in (reward, next_value, discount)]
    forward_args = (*inputs, lambda_.requires_grad_() if tensor_lambda else None, 0.0 if tensor_lambda else 0.9)
    opcheck(torch.ops.phyxdream.lambda_return, forward_args)
    saved = [x.detach() for x in (next_value, discount)]
    tail = (lambda_.detach() if tensor_lambda else None, 0.9, [True, True, False, tensor_lambda])
    opcheck(torch.ops.phyxdream.lambda_return_backward, (grad, reward.detach(), *saved, *tail))


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("tensor_lambda", [False, True])
def test_compiles_as_one_graph(backend, tensor_lambda):
    *inputs, grad = make((5, 4))
    inputs[3] = inputs[3] if tensor_lambda else 0.95

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(reward, *rest):
        return 2 * ops.lambda_return(reward + 0, *rest)  # of an intermediate result too, not of graph inputs alone

    expected = run(backend, inputs, 2 * grad)
    inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    with ops.use_backend(backend):
        returns = compiled(*inputs)
        grads = torch.autograd.grad(returns, [x for x in inputs if isinstance(x, torch.Tensor)], grad)
    torch.testing.assert_close([returns, *grads], [2 * expected[0], *expected[1:]])


@needs_extension
def test_compiles_inside_autocast():
    reward, next_value, discount, _, _ = make((5, 4))

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def target(reward, next_value, discount):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.lambda_return(reward, next_value, discount)

    returns = target(reward, next_value.bfloat16(), discount)
    torch.testing.assert_close(returns, ops.lambda_return(reward, next_value.bfloat16().float(), discount))


def test_function_transforms_take_the_reference():
    reward, next_value, discount, _, _ = make((5, 4), dtype=torch.float64)
    mapped = torch.vmap(ops.lambda_return, in_dims=1, out_dims=1)(reward, next_value, discount)
    torch.testing.assert_close(mapped, ops.lambda_return(reward, next_value, discount))
    tangent = torch.func.jvp(lambda r: ops.lambda_return(r, next_value, discount), (reward,), (reward,))[1]
    torch.testing.assert_close(tangent, ops.lambda_return(reward, torch.zeros_like(next_value), discount))


def test_forward_mode_differentiation_takes_the_reference():
    reward, next_value, discount, _, _ = make((5, 4), dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(reward, reward)
        tangent = torch.autograd.forward_ad.unpack_dual(ops.lambda_return(dual, next_value, discount)).tangent
    torch.testing.assert_close(tangent, ops.lambda_return(reward, torch.zeros_like(next_value), discount))


# Bad input

x = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, x, x), TypeError, "reward: expected a tensor, got NoneType"),
        ((x, [0.0], x), TypeError, "next_value: expected a tensor, got list"),
        ((x, x, x.int()), TypeError, r"discount: expected a floating-point tensor, got torch\.int32"),
        ((x.cfloat(), x, x), TypeError, r"reward: expected a floating-point tensor, got torch\.complex64"),
        ((x, x.double(), x), TypeError, r"expected one dtype, got .*next_value torch\.float64"),
        ((x, x, x[:2]), ValueError, r"discount: expected the shape of reward, \(3, 2\), got \(2, 2\)"),
        ((x, x, x[:, :1]), ValueError, r"discount: expected the shape of reward, \(3, 2\), got \(3, 1\)"),
        ((x, x.to("meta"), x), ValueError, "next_value: expected the device of reward, cpu, got meta"),
        ((x[:0], x[:0], x[:0]), ValueError, r"reward: .*not empty, got shape \(0, 2\)"),
        ((x[:, :0], x[:, :0], x[:, :0]), ValueError, r"reward: .*not empty, got shape \(3, 0\)"),
        ((x[0, 0], x[0, 0], x[0, 0]), ValueError, r"reward: .*\(T, \.\.\.\).*got shape \(\)"),
        ((x, x, x, 1.5), ValueError, r"lambda_: expected a number in \[0, 1\], got 1\.5"),
        ((x, x, x, -0.1), ValueError, r"lambda_: expected a number in \[0, 1\], got -0\.1"),
        ((x, x, x, math.nan), ValueError, r"lambda_: expected a number in \[0, 1\], got nan"),
        ((x, x, x, math.inf), ValueError, r"lambda_: expected a number in \[0, 1\], got inf"),
        ((x, x, x, "0.9"), TypeError, "lambda_: expected a number or a tensor, got str"),
        ((x, x, x, x[:, 0]), ValueError, r"lambda_: expected the shape of reward, \(3, 2\), got \(3,\)"),
        ((x, x, x, torch.tensor(1)), TypeError, r"lambda_: expected a floating-point tensor, got torch\.int64"),
        ((None, x, x, torch.tensor(1.0)), TypeError, "reward: expected a tensor, got NoneType"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.lambda_return(*arguments)


# Triton

KERNELS = ["forward_sequential", "forward_scan", "backward_sequential", "backward_scan"]


def check_triton_in_the_interpreter():
    for shape in [(1, 1), (5, 40), (15, 3, 2), (70, 3), (1100, 2), (90,)]:  # sequential and scan, one block and more
        for dtype in (torch.float32, torch.bfloat16):
            for layouts in ([time_major], [batch_major], LAYOUTS):
                *inputs, grad = make(shape, layouts[:5], dtype)
                assert_as_reference("triton", inputs, grad)
                assert_as_reference("triton", [*inputs[:3], 0.95], grad)
    reward, next_value, discount, _, _ = make((6, 3))
    with ops.use_backend("triton"):
        ops.lambda_return(reward.requires_grad_(), next_value, discount).sum().backward()
    assert "scan" in ops.explain("lambda_return", *make((70, 3))[:3]).reasons["triton"]


def test_triton_in_the_interpreter(run_interpreted):
    run_interpreted(check_triton_in_the_interpreter)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "tensor_lambda"), [("fp32", False), ("fp32", True), ("bf16", False), ("fp16", True)])
def test_triton_compiles_and_fits(compile_ahead, kernel, dtype, tensor_lambda):
    kernels = pytest.importorskip("phyxdream.kernels.lambda_return")
    plan = kernels.plan(*((15, 1024) if "sequential" in kernel else (1024, 4)))
    pointers = {"returns", "reward", "next_value", "discount", "grad", "grad_reward", "grad_value", "grad_discount"}
    pointers |= {"lambda_tensor", "grad_lambda"} if tensor_lambda else set()
    left_out = {"lambda_tensor", "grad_lambda"} - pointers
    kinds = {"lambda_value": "fp32", "BLOCK": plan.block}
    kinds |= dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(left_out)
    function = getattr(kernels, kernel)
    resources = compile_ahead(function, {name: kinds.get(name, "i32") for name in function.arg_names}, plan.num_warps)
    resources.assert_fits()
    assert resources.registers <= 128, resources  # four warps a scheduler: loads under way hide each other's latency


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (15, 1024), (64, 20000), (70, 3), (5000, 7), (15, 8, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_on_a_gpu(shape, layout, dtype):
    *inputs, grad = make(shape, [layout], dtype, device="cuda")
    assert_as_reference("triton", inputs, grad)
    assert_as_reference("triton", [*inputs[:3], 0.95], grad)
