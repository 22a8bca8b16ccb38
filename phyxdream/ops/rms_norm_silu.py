"""RMS norm followed by SiLU: what DreamerV3 puts after every dense and convolutional layer.

    y = silu(x / √(mean(x²) + ε) · w),   silu(u) = u / (1 + e^-u)

C++ in csrc/rms_norm_silu.cpp, Triton in kernels/rms_norm_silu.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops import backend
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.contract import FLOATING, HALF


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float = 1e-4) -> Tensor:
    """RMS norm over the last axis, then SiLU; differentiable once in both tensors.

    Args:
        x: (..., D) float32, float64, bfloat16 or float16, any strides. Fastest where the last axis is contiguous, as
            it is in a channels-last picture permuted to (N, H, W, C); rows may lie anywhere.
        weight: (D,) gain in the dtype of `x`; float32 also goes with half precision.
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype and, where it is dense, the memory layout of `x`. Half precision is computed in float32
        and rounded once, in and outside autocast.

    On the CPU the result, gradients included, does not depend on the number of threads, to the last bit.

    Raises:
        TypeError: an argument is not a floating-point tensor (eps: not a number), or the dtypes do not go together.
        ValueError: weight is not (D,), the devices differ, or eps is negative or not finite.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; danijar/dreamerv3, `norm: rms, act: silu`.

    >>> rms_norm_silu(torch.tensor([[3.0, -4.0]]), torch.ones(2))
    tensor([[ 0.5942, -0.2760]])
    """
    return _op(*_prepare(x, weight, eps))


def _prepare(x: Tensor, weight: Tensor, eps: float = 1e-4) -> tuple:
    """The checked arguments of the schema."""
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if weight.dim() != 1 or not x.dim() or x.shape[-1] != weight.shape[0] or not weight.shape[0]:
        raise ValueError(
            f"x, weight: expected shapes (..., D) and (D,) with D > 0, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype is not x.dtype and not (weight.dtype is torch.float32 and x.dtype in HALF):
        raise TypeError(
            f"weight: expected the dtype of x, {x.dtype}, or float32 for half precision, got {weight.dtype}"
        )
    if not (x.is_cpu and weight.is_cpu) and x.device != weight.device:
        raise ValueError(f"weight: expected the device of x, {x.device}, got {weight.device}")
    if not isinstance(eps, (float, int)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0.0 <= eps < math.inf:  # also catches NaN
        raise ValueError(f"eps: expected a finite number that is not negative, got {eps}")
    return x, weight, float(eps)


def _reference(x, weight, eps):
    dtype = x.dtype
    if dtype in HALF:
        x, weight = x.float(), weight.float()
    return F.silu(F.rms_norm(x, weight.shape, weight, eps)).to(dtype)


# The implementations below take and return the tensors of these schemas.
_SCHEMA = "(Tensor x, Tensor weight, float eps) -> Tensor"
_BACKWARD_SCHEMA = "(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)"


def _fake(x, weight, eps):
    return torch.empty_like(x)


def _fake_backward(grad, x, weight, eps):
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)  # everything else is cheaper to compute again than to keep


def _backward(ctx, grad):
    return *ctx.run_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _contiguous_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _cpu_forward(x, weight, eps):
    y = torch.empty_like(x)
    x, weight, rows = _contiguous_rows(x), weight.contiguous(), _contiguous_rows(y)
    backend.extension.rms_norm_silu_forward(
        x.shape,
        (rows.data_ptr(), rows.stride()),
        (x.data_ptr(), x.stride()),
        weight.data_ptr(),
        eps,
        backend.cpu_threads(x),
    )
    return y if rows is y else y.copy_(rows)


def _cpu_backward(grad, x, weight, eps):
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad, x, weight, rows = _contiguous_rows(grad), _contiguous_rows(x), weight.contiguous(), _contiguous_rows(grad_x)
    backend.extension.rms_norm_silu_backward(
        x.shape,
        (rows.data_ptr(), rows.stride()),
        grad_weight.data_ptr(),
        (grad.data_ptr(), grad.stride()),
        (x.data_ptr(), x.stride()),
        weight.data_ptr(),
        eps,
        backend.cpu_threads(x),
    )
    return grad_x if rows is grad_x else grad_x.copy_(rows), grad_weight


def _cpu_refuse(x, weight, eps):
    return backend.refuse_cpu(x, (torch.float32,))


def _cpu_plan(x, weight, eps):
    copies = "" if x.stride(-1) == 1 else ", after a copy since the last axis is not contiguous"
    threads = backend.cpu_threads(x)
    return f"C++, {threads} thread{'s' * (threads > 1)}, SIMD over the last axis{copies}"


_LONGEST_ON_TRITON = 1 << 15  # a row must fit into the registers of one program


def _triton_forward(*args):
    return backend.triton_kernels("rms_norm_silu").forward(*args)


def _triton_backward(*args):
    return backend.triton_kernels("rms_norm_silu").backward(*args)


def _triton_refuse(x, weight, eps):
    if x.numel() == 0 or len(weight) > _LONGEST_ON_TRITON:
        return f"it takes at least one row, of at most {_LONGEST_ON_TRITON} columns; x is {tuple(x.shape)}"
    return backend.refuse_triton(x, (torch.float32, *HALF))


def _triton_plan(x, weight, eps):
    return str(backend.triton_kernels("rms_norm_silu").plan(x.numel() // len(weight), len(weight)))


_op = Op(
    "rms_norm_silu",
    prepare=_prepare,
    reference=_reference,
    schema=_SCHEMA,
    backward_schema=_BACKWARD_SCHEMA,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    backward=_backward,
    backends=(
        Backend("cpu", _cpu_forward, _cpu_backward, _cpu_refuse, _cpu_plan),
        Backend("triton", _triton_forward, _triton_backward, _triton_refuse, _triton_plan),
    ),
)
