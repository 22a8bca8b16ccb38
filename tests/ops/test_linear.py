from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn import functional as F

from phyxdream import ops
from phyxdream.ops.backend import extension
from phyxdream.ops.linear import _op

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)


def one_hots(variables, classes, *shape):
    return F.one_hot(torch.randint(classes, (*shape, variables)), classes).flatten(-2).float()


def feature(rows, deter=40, variables=16, classes=16):
    """[h, z], whose last 256 columns hold 16 ones a row."""
    return torch.cat([torch.randn(rows, deter), one_hots(variables, classes, rows)], -1)


def make(x, outputs, bias=True):
    """Weight, bias and a gradient of the output."""
    inputs = x.shape[-1]
    return torch.randn(outputs, inputs), torch.randn(outputs) if bias else None, torch.randn(*x.shape[:-1], outputs)


def run(backend, x, weight, bias, grad):
    """The output and the gradients of x, weight and bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    with ops.use_backend(backend):
        y = ops.linear(*leaves)
        return y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad)


def assert_as_float64(x, weight, bias, grad):
    """Every entry is a sum of products; its error is relative to the sum of their magnitudes."""
    double = [None if t is None else t.double() for t in (x, weight, bias, grad)]
    magnitudes = run("reference", *(None if t is None else t.abs() for t in double))
    results = zip(run("cpu", x, weight, bias, grad), run("reference", *double), magnitudes, strict=True)
    for name, (found, exact, magnitude) in zip(("y", "x", "weight", "bias"), results, strict=False):
        assert found.shape == exact.shape
        assert ((found - exact).abs() <= 1e-6 * magnitude).all(), name


CASES = {
    "one row": lambda: torch.randn(1, 3),
    "odd": lambda: torch.randn(5, 7, 19),
    "large": lambda: torch.randn(300, 520),
    "a vector": lambda: torch.randn(11),
    "time-major seen batch-major": lambda: torch.randn(9, 40, 24).transpose(0, 1),
    "every other column": lambda: torch.randn(60, 48)[:, ::2],
    "transposed": lambda: torch.randn(48, 60).t(),
    "one-hot tail": lambda: feature(200),
    "one-hot only": lambda: one_hots(16, 16, 150),
    "tail that ends within a tile": lambda: feature(140, deter=37, variables=17, classes=13),
    "zeros": lambda: torch.zeros(200, 256),
    "a row that is no one-hot": lambda: torch.cat([feature(150), torch.randn(1, 296), feature(150)]),
    "a row of ones": lambda: torch.cat([feature(150), torch.ones(1, 296), feature(150)]),
}


@needs_extension
@pytest.mark.parametrize("outputs", [1, 16, 65, 130])
@pytest.mark.parametrize("case", CASES)
def test_cpu_agrees_with_float64(case, outputs):
    torch.manual_seed(0)
    x = CASES[case]()
    assert_as_float64(x, *make(x, outputs))


@needs_extension
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.5, -1.0])
def test_an_odd_value_among_one_hots_is_not_lost(value):
    torch.manual_seed(0)
    x = feature(300)
    x[101, 200] = value
    weight, bias, _ = make(x, 24)
    with ops.use_backend("cpu"):
        y = ops.linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4, equal_nan=True)


@needs_extension
def test_strided_weight_bias_and_gradient_and_no_bias():
    torch.manual_seed(0)
    x = feature(150)
    weight, bias, grad = torch.randn(296, 20).t(), torch.randn(40)[::2], torch.randn(20, 150).t()
    assert_as_float64(x, weight, bias, grad)
    assert_as_float64(x, weight, None, torch.randn(20).expand(150, 20))


@needs_extension
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradient_of_one_input_alone(wanted):
    torch.manual_seed(0)
    tensors = [feature(64), torch.randn(8, 296), torch.randn(8)]
    tensors[wanted].requires_grad_()
    with ops.use_backend("cpu"):
        ops.linear(*tensors).square().sum().backward()
    found = tensors[wanted].grad.clone()
    tensors[wanted].grad = None
    F.linear(*tensors).square().sum().backward()
    torch.testing.assert_close(found, tensors[wanted].grad, rtol=1e-4, atol=1e-3)
    assert all(t.grad is None for i, t in enumerate(tensors) if i != wanted)


def test_gradcheck_of_the_reference():
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,))]
    with ops.use_backend("reference"):
        assert gradcheck(ops.linear, tensors)


@needs_extension
def test_a_second_derivative_is_refused():
    x, weight = torch.randn(40, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with ops.use_backend("cpu"):
        (grad,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@needs_extension
@pytest.mark.parametrize("draw", [partial(torch.randn, 300, 700), partial(feature, 600)])
def test_the_number_of_threads_changes_no_bit(draw):
    torch.manual_seed(0)
    x = draw()
    rest = make(x, 200)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("cpu", x, *rest))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_autocast_is_torchs_own(backend):
    x, weight, bias = torch.randn(64, 24), torch.randn(8, 24), torch.randn(8)
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
        assert ops.linear(x.bfloat16(), weight, bias).dtype is torch.bfloat16


@needs_extension
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x = torch.randn(6, 4, 24).transpose(0, 1).requires_grad_()
    weight = torch.randn(8, 24, requires_grad=True)
    opcheck(_op.registered, (x, weight, torch.randn(8, requires_grad=True) if bias else None))


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_compiles_as_one_graph(backend):
    x, weight, bias = torch.randn(64, 24), torch.randn(8, 24, requires_grad=True), torch.randn(8)
    with ops.use_backend(backend):
        compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
        compiled(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(8, -1))


def test_function_transforms_take_the_reference():
    x, weight = torch.randn(5, 40, 24), torch.randn(8, 24)
    torch.testing.assert_close(torch.vmap(lambda row: ops.linear(row, weight))(x), F.linear(x, weight))


@needs_extension
def test_few_rows_or_outputs_are_left_to_torch_and_gpus_too():
    weight = torch.randn(16, 24)
    assert ops.explain(ops.linear, torch.randn(2, 24), weight).backend == "reference"
    assert ops.explain(ops.linear, torch.randn(4, 64, 24), weight).backend == "cpu"
    assert ops.explain(ops.linear, torch.randn(4, 64, 24), weight[:8]).backend == "reference"
    with ops.use_backend("triton"):
        assert ops.explain(ops.linear, torch.randn(64, 24), weight).backend == "reference"
        ops.linear(torch.randn(64, 24), weight)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
@pytest.mark.parametrize("backend", ["reference", cpu])
def test_no_rows(backend, shape):
    y, grad_x, grad_weight, grad_bias = run(backend, torch.randn(shape), *make(torch.randn(shape), 8))
    assert y.shape == (*shape[:-1], 8) and grad_x.shape == shape
    assert not grad_weight.any() and not grad_bias.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, torch.ones(2, 3)), TypeError, "x: expected a tensor, got NoneType"),
        ((torch.ones(4, 3, dtype=torch.long), torch.ones(2, 3)), TypeError, "x: expected a floating-point tensor"),
        ((torch.ones(4, 3), torch.ones(2, 3).double()), TypeError, "weight: expected the dtype of x"),
        ((torch.ones(4, 3), torch.ones(2, 4)), ValueError, r"got \(4, 3\) and \(2, 4\)"),
        ((torch.ones(4, 3), torch.ones(3)), ValueError, r"got \(4, 3\) and \(3,\)"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(3)), ValueError, r"bias: expected shape \(2,\), got \(3,\)"),
        ((torch.ones(4, 3), torch.ones(2, 3, device="meta")), ValueError, "weight: expected the device of x"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear(*arguments)
