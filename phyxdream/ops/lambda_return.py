"""λ-return: the target of every critic of the family.

    R_t = r_t + d_t ((1 - λ_t) v_{t+1} + λ_t R_{t+1}),   R_T = v_T

C++ in csrc/lambda_return.cpp, Triton in kernels/lambda_return.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phyxdream.ops import backend
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.contract import HALF, require_alike


def lambda_return(reward: Tensor, next_value: Tensor, discount: Tensor, lambda_: float | Tensor = 0.95) -> Tensor:
    """λ-return of every step, differentiable once in all tensors.

    `R_t = r_t + d_t ((1 - λ_t) v_{t+1} + λ_t R_{t+1})`, seeded with `R_T = v_T`, so no bootstrap argument is needed.
    λ = 0 is the one-step target, λ = 1 the discounted sum that ends in the last value.

    Args:
        reward: (T, ...) `r_t`; float32, float64, bfloat16 or float16, any strides.
        next_value: (T, ...) `v_{t+1}`, the value of the state that step t leads to.
        discount: (T, ...) `d_t`, γ times the probability that the episode goes on after step t.
        lambda_: λ in [0, 1]: a number, or a tensor of shape () or (T, ...) (its values are not checked).

    Returns:
        (T, ...) returns in the dtype and, where it is dense, the memory layout of `reward`. Half precision is
        accumulated in float32 and rounded once; under autocast it is returned in float32.

    Raises:
        TypeError: an argument is not a floating-point tensor (λ: nor a number), or the dtypes differ.
        ValueError: shapes or devices differ (nothing is broadcast but λ), a tensor is empty, or λ is outside [0, 1].

    Source: Hafner et al., "Dream to Control", 2020, eq. 6; "Mastering Atari with Discrete World Models", 2021, eq. 4.

    >>> reward, next_value, discount = torch.ones(3, 1), torch.zeros(3, 1), torch.full((3, 1), 0.5)
    >>> lambda_return(reward, next_value, discount, lambda_=1.0).flatten()
    tensor([1.7500, 1.5000, 1.0000])
    """
    return _op(*_prepare(reward, next_value, discount, lambda_))


def _prepare(reward: Tensor, next_value: Tensor, discount: Tensor, lambda_: float | Tensor = 0.95) -> tuple:
    """The checked arguments of the schema: λ is a tensor, or None and a number."""
    if isinstance(lambda_, Tensor):
        if lambda_.dim() == 0 and isinstance(reward, Tensor):
            lambda_ = lambda_.expand(reward.shape)
        reward, next_value, discount, lambda_ = require_alike(
            reward=reward, next_value=next_value, discount=discount, lambda_=lambda_
        )
        return reward, next_value, discount, lambda_, 0.0
    if not isinstance(lambda_, (float, int)):
        raise TypeError(f"lambda_: expected a number or a tensor, got {type(lambda_).__name__}")
    if not 0.0 <= lambda_ <= 1.0:  # also catches NaN
        raise ValueError(f"lambda_: expected a number in [0, 1], got {lambda_}")
    reward, next_value, discount = require_alike(reward=reward, next_value=next_value, discount=discount)
    return reward, next_value, discount, None, float(lambda_)


def _reference(reward, next_value, discount, lambda_tensor, lambda_value):
    dtype = reward.dtype
    if dtype in HALF:
        reward, next_value, discount = reward.float(), next_value.float(), discount.float()
    lambda_ = [lambda_value] * len(reward) if lambda_tensor is None else lambda_tensor.to(reward.dtype)
    following = next_value[-1]  # R_T = v_T
    returns = []
    for t in reversed(range(len(reward))):
        following = reward[t] + discount[t] * ((1 - lambda_[t]) * next_value[t] + lambda_[t] * following)
        returns.append(following)
    return torch.stack(returns[::-1]).to(dtype)


# The implementations below take and return the tensors of these schemas. `wanted` says which of the four gradients to
# compute; the others come back as empty tensors.
_SCHEMA = "(Tensor reward, Tensor next_value, Tensor discount, Tensor? lambda_tensor, float lambda_value) -> Tensor"
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor returns, Tensor next_value, Tensor discount, Tensor? lambda_tensor, float lambda_value, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _fake(reward, next_value, discount, lambda_tensor, lambda_value):
    return torch.empty_like(reward)


def _fake_backward(grad, returns, next_value, discount, lambda_tensor, lambda_value, wanted):
    return tuple([torch.empty_like(returns) if want else returns.new_empty(0) for want in wanted])


def _save(ctx, inputs, output):
    _, next_value, discount, lambda_tensor, ctx.lambda_value = inputs
    ctx.save_for_backward(output, next_value, discount, lambda_tensor)


def _backward(ctx, grad):
    wanted = list(ctx.needs_input_grad[:4])
    grads = ctx.run_backward(grad, *ctx.saved_tensors, ctx.lambda_value, wanted)
    return *[g if want else None for g, want in zip(grads, wanted, strict=True)], None


def _view(x):
    return None if x is None else (x.data_ptr(), x.stride())


def _cpu_forward(reward, next_value, discount, lambda_tensor, lambda_value):
    returns = torch.empty_like(reward)
    backend.extension.lambda_return_forward(
        reward.element_size(),
        backend.cpu_threads(reward),
        reward.shape,
        (returns.data_ptr(), returns.stride()),
        (reward.data_ptr(), reward.stride()),
        (next_value.data_ptr(), next_value.stride()),
        (discount.data_ptr(), discount.stride()),
        lambda_value if lambda_tensor is None else _view(lambda_tensor),
    )
    return returns


def _cpu_backward(grad, returns, next_value, discount, lambda_tensor, lambda_value, wanted):
    grads = _fake_backward(grad, returns, next_value, discount, lambda_tensor, lambda_value, wanted)
    backend.extension.lambda_return_backward(
        returns.element_size(),
        backend.cpu_threads(returns),
        returns.shape,
        *(_view(g) if want else None for g, want in zip(grads, wanted, strict=True)),
        _view(grad),
        _view(returns),
        _view(next_value),
        _view(discount),
        lambda_value if lambda_tensor is None else _view(lambda_tensor),
    )
    return grads


def _cpu_refuse(reward, next_value, discount, lambda_tensor, lambda_value):
    return backend.refuse_cpu(reward, (torch.float32, torch.float64))


def _cpu_plan(reward, next_value, discount, lambda_tensor, lambda_value):
    threads = backend.cpu_threads(reward)
    innermost = "time" if reward.stride(0) == 1 and reward[0].numel() > 1 else "columns"
    return f"C++, {threads} thread{'s' * (threads > 1)}, SIMD over {innermost}"


def _triton_forward(*args):
    return backend.triton_kernels("lambda_return").forward(*args)


def _triton_backward(*args):
    return backend.triton_kernels("lambda_return").backward(*args)


def _triton_refuse(reward, next_value, discount, lambda_tensor, lambda_value):
    return backend.refuse_triton(reward, (torch.float32, torch.bfloat16, torch.float16))


def _triton_plan(reward, next_value, discount, lambda_tensor, lambda_value):
    return str(backend.triton_kernels("lambda_return").plan(len(reward), reward[0].numel()))


_op = Op(
    "lambda_return",
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
