"""The dense layer: y = x Wᵀ + b.

On a CPU the matrix products are our own: torch's come from a library that stays with AVX2 on AMD's processors, and none
knows that half of a Dreamer's feature [h, z] is one-hot. Elsewhere torch's are as fast as they get, so there is only
C++, in csrc/linear.cpp over csrc/matmul.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import backend
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.contract import FLOATING


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, differentiable once in all three tensors.

    Args:
        x: (..., I), any strides.
        weight: (O, I) in the dtype of `x`.
        bias: (O,) in the dtype of `x`, or None.

    Returns:
        (..., O), contiguous. Inside autocast it is torch's own, in the precision that autocast asks for.

    Where the last columns of `x` are zeros and a few ones, as one-hot vectors are, C++ sums columns of `weight` instead
    of multiplying. The result, gradients included, does not depend on the number of threads, to the last bit.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: the shapes do not fit, or the devices differ.

    >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0.5, 0.0]))
    tensor([[11.5000,  2.0000]])
    """
    arguments = _prepare(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(*arguments)
    return _op(*arguments)


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    """The checked arguments of the schema."""
    tensors = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
        if not (x.is_cpu and tensor.is_cpu) and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"x, weight: expected shapes (..., I) and (O, I) that are not empty, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return x, weight, bias


# The implementation below takes and returns the tensors of these schemas. `needed` says which of x, weight and bias
# want a gradient; the others get an empty one.
_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
_BACKWARD_SCHEMA = "(Tensor grad, Tensor x, Tensor weight, bool[] needed) -> (Tensor, Tensor, Tensor)"


def _fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(grad, x, weight, needed):
    return tuple(
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip((x.shape, weight.shape, weight.shape[:1]), needed, strict=True)
    )


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    needed = list(ctx.needs_input_grad[:3])
    grads = ctx.run_backward(grad, *ctx.saved_tensors, needed)
    return tuple(g if wanted else None for g, wanted in zip(grads, needed, strict=True))


def _rows(x):
    """x as (N, I)."""
    return x.reshape(-1, x.shape[-1])


def _view(rows):
    """As C++ takes it: (address, rows, stride of rows, stride of columns)."""
    return rows.data_ptr(), rows.shape[0], *rows.stride()


def _cpu_forward(x, weight, bias):
    y = _fake(x, weight, bias)
    rows = _rows(x)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    backend.extension.linear_forward(
        _view(rows),
        weight.data_ptr(),
        *weight.shape,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _cpu_backward(grad, x, weight, needed):
    grads = _fake_backward(grad, x, weight, needed)
    rows = _rows(x)
    grad, weight = grad.contiguous(), weight.contiguous()
    addresses = (g.data_ptr() if wanted else 0 for g, wanted in zip(grads, needed, strict=True))
    backend.extension.linear_backward(
        grad.data_ptr(), _view(rows), weight.data_ptr(), *weight.shape, *addresses, torch.get_num_threads()
    )
    return grads


def _cpu_refuse(x, weight, bias):
    return backend.refuse_cpu(x, (torch.float32,))


def _cpu_plan(x, weight, bias):
    threads = torch.get_num_threads()
    return f"C++, up to {threads} thread{'s' * (threads > 1)}, one-hot columns gathered"


_FEWEST_ROWS, _FEW_ROWS, _FEW_WEIGHTS, _FEWEST_OUTPUTS = 8, 32, 1 << 17, 16


def _cpu_slower(x, weight, bias):
    rows = x.numel() // weight.shape[1]
    if rows < _FEWEST_ROWS:
        return f"with fewer than {_FEWEST_ROWS} rows, all it does is read the weights, and torch's does that faster"
    if rows < _FEW_ROWS and weight.numel() < _FEW_WEIGHTS:
        return f"with fewer than {_FEW_ROWS} rows and {_FEW_WEIGHTS} weights, the call takes as long as the work"
    if weight.shape[0] < _FEWEST_OUTPUTS:
        return f"with fewer than {_FEWEST_OUTPUTS} outputs, laying out the rows takes as long as using them"
    return ""


_op = Op(
    "linear",
    prepare=_prepare,
    reference=F.linear,
    schema=_SCHEMA,
    backward_schema=_BACKWARD_SCHEMA,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    backward=_backward,
    backends=(Backend("cpu", _cpu_forward, _cpu_backward, _cpu_refuse, _cpu_plan, _cpu_slower),),
    torch_is_best=("triton",),
)
