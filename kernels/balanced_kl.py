"""KL between latent states for CUDA devices (contract and reference: phyxdream/ops/balanced_kl.py; the formulas:
csrc/balanced_kl.cpp).

A program takes a block of whole rows, so that the KL of a row is one sum in a fixed order; a row with more variables
than fit goes by in several steps. All arithmetic is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from phyxdream.kernels.rows import flat, memory_order, written

TILE = 1024  # elements of one tensor per step of a program


@triton.jit
def _load(pointer, at, inside, other):
    return tl.load(pointer + at, mask=inside, other=other).to(tl.float32)


@triton.jit
def _store(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


# Offsets are 64-bit: a stride fits 32 bits, its product with the number of rows need not.


@triton.jit
def _at(row, stride_row, variable, stride_variable):
    return row.to(tl.int64) * stride_row + variable.to(tl.int64) * stride_variable


@triton.jit
def _class_at(row, stride_row, variable, stride_variable, column, stride_class):
    return _at(row, stride_row, variable, stride_variable)[:, None] + column.to(tl.int64) * stride_class


@triton.jit
def _store_results(dynamics, representation, kl, row, rows, value, free_nats):
    clipped = tl.where(value < free_nats, free_nats, value)  # unlike a maximum, keeps NaN
    tl.store(dynamics + row, clipped, mask=row < rows)
    tl.store(representation + row, clipped, mask=row < rows)
    tl.store(kl + row, value, mask=row < rows)


@triton.jit
def _inflow(grad, kl, row, rows, free_nats):
    flows = tl.load(kl + row, mask=row < rows, other=0.0) >= free_nats
    return tl.where(flows, tl.load(grad + row, mask=row < rows, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _probabilities(logits, is_class, classes, unimix, MIXED: tl.constexpr):
    """Softmax, and after unimix the probabilities and their logarithms. Beyond `classes`, first and last are 0."""
    logits = tl.where(is_class, logits, float("-inf"))
    logits -= tl.max(logits, 1)[:, None]
    e = tl.exp(logits)
    total = tl.sum(e, 1)[:, None]
    p = e / total
    if MIXED:
        mixed = (1 - unimix) * p + unimix / classes
        log = tl.log(mixed)
    else:
        mixed = p
        log = logits - tl.log(total)
    return p, mixed, tl.where(is_class, log, 0.0)


@triton.jit(do_not_specialize=["rows"])
def categorical_forward(
    dynamics, representation, kl, post, prior, free_nats, unimix, rows, variables, classes,
    post_row, post_variable, post_class, prior_row, prior_variable, prior_class,
    MIXED: tl.constexpr, ROWS: tl.constexpr, VARIABLES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, ROWS * VARIABLES)  # rows × variables
    row = tl.program_id(0) * ROWS + lane // VARIABLES
    column = tl.arange(0, CLASSES)[None, :]
    is_class = column < classes
    sums = tl.zeros((ROWS * VARIABLES,), tl.float32)
    for first in range(0, variables, VARIABLES):
        variable = first + lane % VARIABLES
        exists = (row < rows) & (variable < variables)
        inside = exists[:, None] & is_class
        at = _class_at(row, post_row, variable, post_variable, column, post_class)
        _, p, log_p = _probabilities(_load(post, at, inside, 0.0), is_class, classes, unimix, MIXED)
        at = _class_at(row, prior_row, variable, prior_variable, column, prior_class)
        _, _, log_q = _probabilities(_load(prior, at, inside, 0.0), is_class, classes, unimix, MIXED)
        sums += tl.where(exists, tl.sum(p * (log_p - log_q), 1), 0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _store_results(dynamics, representation, kl, row, rows, tl.sum(tl.reshape(sums, (ROWS, VARIABLES)), 1), free_nats)


@triton.jit(do_not_specialize=["rows"])
def categorical_backward(
    grad_dynamics, grad_representation, kl, post, prior, grad_post, grad_prior,
    free_nats, unimix, rows, variables, classes,
    post_row, post_variable, post_class, prior_row, prior_variable, prior_class,
    grad_post_row, grad_post_variable, grad_post_class, grad_prior_row, grad_prior_variable, grad_prior_class,
    MIXED: tl.constexpr, ROWS: tl.constexpr, VARIABLES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, ROWS * VARIABLES)
    row = tl.program_id(0) * ROWS + lane // VARIABLES
    column = tl.arange(0, CLASSES)[None, :]
    is_class = column < classes
    into_post = _inflow(grad_representation, kl, row, rows, free_nats)[:, None]
    into_prior = _inflow(grad_dynamics, kl, row, rows, free_nats)[:, None]
    for first in range(0, variables, VARIABLES):
        variable = first + lane % VARIABLES
        inside = ((row < rows) & (variable < variables))[:, None] & is_class
        at = _class_at(row, post_row, variable, post_variable, column, post_class)
        p, mixed_p, log_p = _probabilities(_load(post, at, inside, 0.0), is_class, classes, unimix, MIXED)
        at = _class_at(row, prior_row, variable, prior_variable, column, prior_class)
        q, mixed_q, log_q = _probabilities(_load(prior, at, inside, 0.0), is_class, classes, unimix, MIXED)
        log = log_p - log_q
        of_post = (1 - unimix) * p * (log - tl.sum(p * log, 1)[:, None])
        at = _class_at(row, grad_post_row, variable, grad_post_variable, column, grad_post_class)
        _store(grad_post, at, into_post * of_post, inside)
        if MIXED:
            ratio = mixed_p / mixed_q
            of_prior = (1 - unimix) * q * (tl.sum(q * ratio, 1)[:, None] - ratio)
        else:
            of_prior = q - p
        at = _class_at(row, grad_prior_row, variable, grad_prior_variable, column, grad_prior_class)
        _store(grad_prior, at, into_prior * of_prior, inside)


@triton.jit(do_not_specialize=["rows"])
def gaussian_forward(
    dynamics, representation, kl, post_mean, post_std, prior_mean, prior_std, free_nats, rows, variables,
    post_mean_row, post_mean_variable, post_std_row, post_std_variable,
    prior_mean_row, prior_mean_variable, prior_std_row, prior_std_variable,
    ROWS: tl.constexpr, VARIABLES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = row[:, None]
    sums = tl.zeros((ROWS, VARIABLES), tl.float32)
    for first in range(0, variables, VARIABLES):
        variable = (first + tl.arange(0, VARIABLES))[None, :]
        inside = (line < rows) & (variable < variables)
        p_mean = _load(post_mean, _at(line, post_mean_row, variable, post_mean_variable), inside, 0.0)
        p_std = _load(post_std, _at(line, post_std_row, variable, post_std_variable), inside, 1.0)
        q_mean = _load(prior_mean, _at(line, prior_mean_row, variable, prior_mean_variable), inside, 0.0)
        q_std = _load(prior_std, _at(line, prior_std_row, variable, prior_std_variable), inside, 1.0)
        r, d = p_std / q_std, (p_mean - q_mean) / q_std
        sums += 0.5 * (r * r + d * d - 1) - tl.log(r)
    _store_results(dynamics, representation, kl, row, rows, tl.sum(sums, 1), free_nats)


@triton.jit(do_not_specialize=["rows"])
def gaussian_backward(
    grad_dynamics, grad_representation, kl, post_mean, post_std, prior_mean, prior_std,
    grad_post_mean, grad_post_std, grad_prior_mean, grad_prior_std, free_nats, rows, variables,
    post_mean_row, post_mean_variable, post_std_row, post_std_variable,
    prior_mean_row, prior_mean_variable, prior_std_row, prior_std_variable,
    grad_post_mean_row, grad_post_mean_variable, grad_post_std_row, grad_post_std_variable,
    grad_prior_mean_row, grad_prior_mean_variable, grad_prior_std_row, grad_prior_std_variable,
    ROWS: tl.constexpr, VARIABLES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = row[:, None]
    into_post = _inflow(grad_representation, kl, row, rows, free_nats)[:, None]
    into_prior = _inflow(grad_dynamics, kl, row, rows, free_nats)[:, None]
    for first in range(0, variables, VARIABLES):
        variable = (first + tl.arange(0, VARIABLES))[None, :]
        inside = (line < rows) & (variable < variables)
        p_mean = _load(post_mean, _at(line, post_mean_row, variable, post_mean_variable), inside, 0.0)
        p_std = _load(post_std, _at(line, post_std_row, variable, post_std_variable), inside, 1.0)
        q_mean = _load(prior_mean, _at(line, prior_mean_row, variable, prior_mean_variable), inside, 0.0)
        q_std = _load(prior_std, _at(line, prior_std_row, variable, prior_std_variable), inside, 1.0)
        r, d = p_std / q_std, (p_mean - q_mean) / q_std
        at = _at(line, grad_post_mean_row, variable, grad_post_mean_variable)
        _store(grad_post_mean, at, into_post * d / q_std, inside)
        at = _at(line, grad_post_std_row, variable, grad_post_std_variable)
        _store(grad_post_std, at, into_post * (r / q_std - 1 / p_std), inside)
        at = _at(line, grad_prior_mean_row, variable, grad_prior_mean_variable)
        _store(grad_prior_mean, at, -into_prior * d / q_std, inside)
        at = _at(line, grad_prior_std_row, variable, grad_prior_std_variable)
        _store(grad_prior_std, at, into_prior * (1 - r * r - d * d) / q_std, inside)


@dataclass(frozen=True)
class Plan:
    """What is launched: a program takes `tile["ROWS"]` rows and goes through their variables in steps."""

    programs: int
    warps: int
    tile: dict[str, int] = field(hash=False)

    def __str__(self) -> str:
        return f"Triton, {self.programs} programs of {self.tile['ROWS']} rows"


def plan(rows: int, variables: int, classes: int | None = None) -> Plan:
    """For (rows, variables, classes) logits, or (rows, variables) Gaussian states."""
    lanes = triton.next_power_of_2(classes or 1)
    tile_size = TILE // 4 if classes is None else TILE  # eight Gaussian tensors crowd the registers, two of logits less
    tile_variables = min(triton.next_power_of_2(variables), max(1, tile_size // lanes))
    tile_rows = max(1, tile_size // (lanes * tile_variables))
    tile = {"ROWS": tile_rows, "VARIABLES": tile_variables}
    if classes is not None:
        tile["CLASSES"] = lanes
    return Plan(triton.cdiv(rows, tile_rows), max(4, lanes // 256), tile)


def forward(
    event_axes: int, results: tuple[Tensor, ...], inputs: tuple[Tensor, ...], numbers: tuple[float, ...]
) -> None:
    """Fills dynamics, representation and KL, each (...)."""
    kernel = categorical_forward if event_axes == 2 else gaussian_forward
    _launch(kernel, event_axes, results, inputs, (), numbers)


def backward(
    event_axes: int,
    per_row: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    numbers: tuple[float, ...],
) -> None:
    """Fills the gradients of the inputs, from those of dynamics and representation and the KL, each (...)."""
    kernel = categorical_backward if event_axes == 2 else gaussian_backward
    _launch(kernel, event_axes, per_row, inputs, grads, numbers)


def _launch(kernel, event_axes, per_row, inputs, grads, numbers):
    order = memory_order(inputs[0], event_axes)
    flat_rows, flat_inputs, flat_grads = ([flat(x, order) for x in group] for group in (per_row, inputs, grads))
    shape = flat_inputs[0].shape
    p = plan(*shape)
    free_nats, *unimix = numbers
    constants = p.tile | {"MIXED": unimix[0] > 0} if unimix else p.tile
    strides = [stride for x in (*flat_inputs, *flat_grads) for stride in x.stride()]
    with torch.cuda.device_of(inputs[0]):
        kernel[(p.programs,)](
            *flat_rows, *flat_inputs, *flat_grads, free_nats or -math.inf, *unimix, *shape, *strides, **constants,
            num_warps=p.warps,
        )  # fmt: skip
    for y, flat_y in zip(grads or per_row, flat_grads or flat_rows, strict=True):
        written(y, flat_y, order)
