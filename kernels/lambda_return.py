"""λ-return on CUDA GPUs (contract and reference: phyxdream/ops/lambda_return.py; the maths: csrc/lambda_return.cpp).

Tensors are seen as (T, N) with any two strides. `*_sequential` gives every column a lane and loops over time, so that
a step of neighbouring columns is one coalesced access; `*_scan` gives every column a program and combines blocks of
time with `tl.associative_scan`: for few columns and long T, when the loop would leave the GPU idle. Everything is
float32 from the load on. A tensor left out (λ given as a number, a gradient nobody wants) is None. Offsets are 64-bit:
a stride fits 32 bits, its product with T need not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Plan:
    """Which pair of kernels runs (T, N), and how."""

    kernel: str  # "sequential" or "scan"
    block: int  # columns per program, or steps per block of a scan
    programs: int
    num_warps: int

    def __str__(self) -> str:
        unit = "columns" if self.kernel == "sequential" else "steps"
        return (
            f"Triton {self.kernel}, {self.programs} programs of {self.num_warps} warps, blocks of {self.block} {unit}"
        )


def plan(steps: int, columns: int) -> Plan:
    """Loop over time while the horizon is short or there are columns enough to fill a GPU; scan otherwise."""
    if steps > 64 and columns < 2048:
        block = min(512, triton.next_power_of_2(steps))
        return Plan("scan", block, columns, num_warps=block // 64)  # more than 2 steps a lane crowd the registers
    block = 128 if columns >= 16384 else 32  # one column a lane; single warps spread a small batch over all SMs
    return Plan("sequential", block, triton.cdiv(columns, block), num_warps=block // 32)


@triton.jit
def load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, value, mask):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def at(pointer, t, n, time_stride, column_stride):
    return pointer + tl.cast(t, tl.int64) * time_stride + tl.cast(n, tl.int64) * column_stride


@triton.jit
def load_lambda(lambda_tensor, lambda_value, t, n, time_stride, column_stride, mask):
    if lambda_tensor is None:
        return lambda_value
    else:
        return load(at(lambda_tensor, t, n, time_stride, column_stride), mask)


@triton.jit(do_not_specialize=["T", "N"])
def forward_sequential(
    returns, reward, next_value, discount, lambda_tensor, lambda_value, T, N,
    returns_t, returns_n, reward_t, reward_n, value_t, value_n, discount_t, discount_n, lambda_t, lambda_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    following = load(at(next_value, T - 1, n, value_t, value_n), inside)
    for i in tl.range(0, T, loop_unroll_factor=4):  # unrolled, so that several steps' loads are under way at once
        t = T - 1 - i
        r = load(at(reward, t, n, reward_t, reward_n), inside)
        v = load(at(next_value, t, n, value_t, value_n), inside)
        d = load(at(discount, t, n, discount_t, discount_n), inside)
        lambda_ = load_lambda(lambda_tensor, lambda_value, t, n, lambda_t, lambda_n, inside)
        following = r + d * ((1 - lambda_) * v + lambda_ * following)
        store(at(returns, t, n, returns_t, returns_n), following, inside)


@triton.jit
def then(a_first, b_first, a_second, b_second):
    """x -> a + b x, the first map and then the second."""
    return a_second + b_second * a_first, b_second * b_first


@triton.jit(do_not_specialize=["T", "N"])
def forward_scan(
    returns, reward, next_value, discount, lambda_tensor, lambda_value, T, N,
    returns_t, returns_n, reward_t, reward_n, value_t, value_n, discount_t, discount_n, lambda_t, lambda_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    step = tl.arange(0, BLOCK)
    following = tl.load(at(next_value, T - 1, n, value_t, value_n)).to(tl.float32)
    for i in range(tl.cdiv(T, BLOCK)):
        t = T - (i + 1) * BLOCK + step  # the last block, the first in time, may begin before 0
        inside = t >= 0
        r = load(at(reward, t, n, reward_t, reward_n), inside)
        v = load(at(next_value, t, n, value_t, value_n), inside)
        d = load(at(discount, t, n, discount_t, discount_n), inside)
        lambda_ = load_lambda(lambda_tensor, lambda_value, t, n, lambda_t, lambda_n, inside)
        a, b = tl.associative_scan((r + d * (1 - lambda_) * v, d * lambda_), 0, then, reverse=True)
        result = a + b * following
        store(at(returns, t, n, returns_t, returns_n), result, inside)
        following = tl.sum(tl.where(step == 0, result, 0.0))


@triton.jit
def store_gradients(
    adjoint, v, d, lambda_, following, is_last, t, n, inside,
    grad_reward, grad_value, grad_discount, grad_lambda,
    grad_reward_t, grad_reward_n, grad_value_t, grad_value_n, grad_discount_t, grad_discount_n,
    grad_lambda_t, grad_lambda_n,
):  # fmt: skip
    following = tl.where(is_last, v, following)  # R_T = v_T
    if grad_reward is not None:
        store(at(grad_reward, t, n, grad_reward_t, grad_reward_n), adjoint, inside)
    if grad_value is not None:
        share = tl.where(is_last, 1.0, 1 - lambda_)
        store(at(grad_value, t, n, grad_value_t, grad_value_n), adjoint * d * share, inside)
    if grad_discount is not None:
        target = (1 - lambda_) * v + lambda_ * following
        store(at(grad_discount, t, n, grad_discount_t, grad_discount_n), adjoint * target, inside)
    if grad_lambda is not None:
        store(at(grad_lambda, t, n, grad_lambda_t, grad_lambda_n), adjoint * d * (following - v), inside)


@triton.jit(do_not_specialize=["T", "N"])
def backward_sequential(
    grad_reward, grad_value, grad_discount, grad_lambda,
    grad, returns, next_value, discount, lambda_tensor, lambda_value, T, N,
    grad_reward_t, grad_reward_n, grad_value_t, grad_value_n, grad_discount_t, grad_discount_n,
    grad_lambda_t, grad_lambda_n,
    grad_t, grad_n, returns_t, returns_n, value_t, value_n, discount_t, discount_n, lambda_t, lambda_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    inflow = tl.zeros((BLOCK,), tl.float32)
    for t in tl.range(0, T, loop_unroll_factor=4):
        g = load(at(grad, t, n, grad_t, grad_n), inside)
        v = load(at(next_value, t, n, value_t, value_n), inside)
        d = load(at(discount, t, n, discount_t, discount_n), inside)
        following = load(at(returns, t + 1, n, returns_t, returns_n), inside & (t + 1 < T))
        lambda_ = load_lambda(lambda_tensor, lambda_value, t, n, lambda_t, lambda_n, inside)
        adjoint = g + inflow
        inflow = d * lambda_ * adjoint
        store_gradients(
            adjoint, v, d, lambda_, following, t == T - 1, t, n, inside,
            grad_reward, grad_value, grad_discount, grad_lambda,
            grad_reward_t, grad_reward_n, grad_value_t, grad_value_n, grad_discount_t, grad_discount_n,
            grad_lambda_t, grad_lambda_n,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N"])
def backward_scan(
    grad_reward, grad_value, grad_discount, grad_lambda,
    grad, returns, next_value, discount, lambda_tensor, lambda_value, T, N,
    grad_reward_t, grad_reward_n, grad_value_t, grad_value_n, grad_discount_t, grad_discount_n,
    grad_lambda_t, grad_lambda_n,
    grad_t, grad_n, returns_t, returns_n, value_t, value_n, discount_t, discount_n, lambda_t, lambda_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    step = tl.arange(0, BLOCK)
    adjoint_before = 0.0
    for i in range(tl.cdiv(T, BLOCK)):
        t = i * BLOCK + step
        inside = t < T
        has_before = inside & (t > 0)
        g = load(at(grad, t, n, grad_t, grad_n), inside)
        v = load(at(next_value, t, n, value_t, value_n), inside)
        d = load(at(discount, t, n, discount_t, discount_n), inside)
        d_before = load(at(discount, t - 1, n, discount_t, discount_n), has_before)
        following = load(at(returns, t + 1, n, returns_t, returns_n), t + 1 < T)
        lambda_ = load_lambda(lambda_tensor, lambda_value, t, n, lambda_t, lambda_n, inside)
        lambda_before = load_lambda(lambda_tensor, lambda_value, t - 1, n, lambda_t, lambda_n, has_before)
        a, b = tl.associative_scan((g, d_before * lambda_before), 0, then)
        adjoint = a + b * adjoint_before
        adjoint_before = tl.sum(tl.where(step == BLOCK - 1, adjoint, 0.0))
        store_gradients(
            adjoint, v, d, lambda_, following, t == T - 1, t, n, inside,
            grad_reward, grad_value, grad_discount, grad_lambda,
            grad_reward_t, grad_reward_n, grad_value_t, grad_value_n, grad_discount_t, grad_discount_n,
            grad_lambda_t, grad_lambda_n,
        )  # fmt: skip


def _columns(x):
    """(T, N); a view, unless the column dimensions of `x` have no common stride, as in (B, T, C) seen as (T, B, C)."""
    return None if x is None else x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _strides(*tensors):
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride())]


def _fill(outputs, launch):
    """Let `launch` write the (T, N) views of `outputs`; one that has no such view gets its values by copy."""
    flat = [_columns(x) for x in outputs]
    launch(*flat)
    for x, columns in zip(outputs, flat, strict=True):
        if x is not None and columns.data_ptr() != x.data_ptr():
            x.copy_(columns.view(x.shape))


def forward(reward, next_value, discount, lambda_tensor, lambda_value):
    inputs = [_columns(x) for x in (reward, next_value, discount, lambda_tensor)]
    steps, columns = inputs[0].shape
    chosen = plan(steps, columns)
    kernel = forward_sequential if chosen.kernel == "sequential" else forward_scan
    returns = torch.empty_like(reward)

    def launch(out):
        kernel[(chosen.programs,)](
            out, *inputs, lambda_value, steps, columns, *_strides(out, *inputs),
            BLOCK=chosen.block, num_warps=chosen.num_warps,
        )  # fmt: skip

    with torch.cuda.device_of(reward):
        _fill([returns], launch)
    return returns


def backward(grad, returns, next_value, discount, lambda_tensor, lambda_value, wanted):
    inputs = [_columns(x) for x in (grad, returns, next_value, discount, lambda_tensor)]
    steps, columns = inputs[0].shape
    chosen = plan(steps, columns)
    kernel = backward_sequential if chosen.kernel == "sequential" else backward_scan
    grads = [torch.empty_like(returns) if want else None for want in wanted]

    def launch(*outputs):
        kernel[(chosen.programs,)](
            *outputs, *inputs, lambda_value, steps, columns, *_strides(*outputs, *inputs),
            BLOCK=chosen.block, num_warps=chosen.num_warps,
        )  # fmt: skip

    with torch.cuda.device_of(returns):
        _fill(grads, launch)
    return tuple([returns.new_empty(0) if g is None else g for g in grads])
