"""Balanced KL between the posterior and the prior of a latent state: the loss that trains both, each at its own rate.

    dynamics       = max(free, KL(sg(post) ‖ prior))   trains the prior towards the posterior
    representation = max(free, KL(post ‖ sg(prior)))   keeps the posterior predictable

Forward computes the one KL, backward both gradients in one pass from the saved inputs. C++ in csrc/balanced_kl.cpp,
Triton in kernels/balanced_kl.py.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from phyxdream.ops import backend
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.contract import HALF, require_alike


def balanced_kl(
    post_logits: Tensor, prior_logits: Tensor, free_nats: float = 1.0, unimix: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The two halves of the KL loss between categorical states, summed over their S variables, in nats.

    Both have the same value; the gradient of the first goes to `prior_logits` alone, that of the second to
    `post_logits` alone, once differentiable. Where the KL is below `free_nats`, neither has a gradient.

    Args:
        post_logits: (..., S, C) float32, float64, bfloat16 or float16, any strides. Fastest where the last two axes
            are contiguous; rows may lie anywhere.
        prior_logits: (..., S, C) alike.
        free_nats: the least value of each result; 0 leaves the KL as it is.
        unimix: the share in [0, 1] of the uniform distribution in both: (1 - unimix) softmax(logits) + unimix / C.

    Returns:
        dynamics, representation: (...) in the dtype of the logits; for half precision, which is computed in float32
        and not rounded again, in float32.

    Raises:
        TypeError: an argument is not a floating-point tensor (the last two: not a number), or the dtypes differ.
        ValueError: the logits have fewer than two axes, are empty, or differ in shape or device; free_nats is negative
            or not finite; unimix is outside [0, 1].

    Source: Hafner et al., "Mastering Atari with Discrete World Models", 2021, algorithm 2 (the balance); "Mastering
    Diverse Domains through World Models", 2023, eq. 3 (free nats at every step, unimix).

    >>> post, prior = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    >>> balanced_kl(post, prior, free_nats=0.0, unimix=0.0)
    (tensor(0.4338), tensor(0.4338))
    """
    return _categorical(*_prepare_categorical(post_logits, prior_logits, free_nats, unimix))[:2]


def balanced_kl_gaussian(
    post_mean: Tensor, post_std: Tensor, prior_mean: Tensor, prior_std: Tensor, free_nats: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The two halves of the KL loss between Gaussian states, summed over their S variables, in nats.

    As `balanced_kl`: one value, whose gradient the first half sends to the prior, the second to the posterior.

    Args:
        post_mean, post_std: (..., S) float32, float64, bfloat16 or float16, any strides; std is positive (its values
            are not checked).
        prior_mean, prior_std: (..., S) alike.
        free_nats: the least value of each result; 0 leaves the KL as it is.

    Returns:
        dynamics, representation: (...) in the dtype of the inputs; float32 for half precision.

    Raises:
        TypeError: an argument is not a floating-point tensor (free_nats: not a number), or the dtypes differ.
        ValueError: a tensor has no axis, is empty, or differs in shape or device; free_nats is negative or not finite.

    Source: Hafner et al., "Learning Latent Dynamics for Planning from Pixels", 2019, eq. 3.

    >>> zero, one = torch.zeros(3), torch.ones(3)
    >>> balanced_kl_gaussian(zero, one, one, one)
    (tensor(1.5000), tensor(1.5000))
    """
    return _gaussian(*_prepare_gaussian(post_mean, post_std, prior_mean, prior_std, free_nats))[:2]


def categorical_kl(p_logits: Tensor, q_logits: Tensor, unimix: float = 0.0) -> Tensor:
    """KL(p ‖ q) in plain PyTorch: (..., S, C) to (...), after `unimix` of both."""
    log_p, log_q = _log_probs(p_logits, unimix), _log_probs(q_logits, unimix)
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def _log_probs(logits, unimix):
    if not unimix:
        return torch.log_softmax(logits, -1)
    return torch.log((1 - unimix) * torch.softmax(logits, -1) + unimix / logits.shape[-1])


def gaussian_kl(p_mean: Tensor, p_std: Tensor, q_mean: Tensor, q_std: Tensor) -> Tensor:
    """KL(p ‖ q) in plain PyTorch: (..., S) to (...)."""
    ratio = (p_std / q_std).square()
    distance = ((p_mean - q_mean) / q_std).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def _prepare_categorical(
    post_logits: Tensor, prior_logits: Tensor, free_nats: float = 1.0, unimix: float = 0.01
) -> tuple:
    """The checked arguments of the schema."""
    post, prior = require_alike(post_logits=post_logits, prior_logits=prior_logits)
    if post.dim() < 2:
        raise ValueError(f"post_logits: expected shape (..., S, C), got {tuple(post.shape)}")
    if not isinstance(unimix, (float, int)):
        raise TypeError(f"unimix: expected a number, got {type(unimix).__name__}")
    if not 0.0 <= unimix <= 1.0:  # also catches NaN
        raise ValueError(f"unimix: expected a number in [0, 1], got {unimix}")
    return post, prior, _checked_free_nats(free_nats), float(unimix)


def _prepare_gaussian(
    post_mean: Tensor, post_std: Tensor, prior_mean: Tensor, prior_std: Tensor, free_nats: float = 1.0
) -> tuple:
    """The checked arguments of the schema."""
    tensors = require_alike(post_mean=post_mean, post_std=post_std, prior_mean=prior_mean, prior_std=prior_std)
    return *tensors, _checked_free_nats(free_nats)


def _checked_free_nats(free_nats):
    if not isinstance(free_nats, (float, int)):
        raise TypeError(f"free_nats: expected a number, got {type(free_nats).__name__}")
    if not 0.0 <= free_nats < math.inf:
        raise ValueError(f"free_nats: expected a finite number that is not negative, got {free_nats}")
    return float(free_nats)


def _categorical_reference(post, prior, free_nats, unimix):
    if post.dtype in HALF:
        post, prior = post.float(), prior.float()
    dynamics = categorical_kl(post.detach(), prior, unimix)
    representation = categorical_kl(post, prior.detach(), unimix)
    return _clipped(dynamics, free_nats), _clipped(representation, free_nats)


def _gaussian_reference(post_mean, post_std, prior_mean, prior_std, free_nats):
    post, prior = (post_mean, post_std), (prior_mean, prior_std)
    if post_mean.dtype in HALF:
        post, prior = [x.float() for x in post], [x.float() for x in prior]
    dynamics = gaussian_kl(*[x.detach() for x in post], *prior)
    representation = gaussian_kl(*post, *[x.detach() for x in prior])
    return _clipped(dynamics, free_nats), _clipped(representation, free_nats)


def _clipped(kl, free_nats):
    return kl.clamp(min=free_nats) if free_nats else kl


# Both ops are the same but for their tensors and the axes of an event, (S, C) or (S,). The third output of the schema
# is the KL before free nats, by which the backward knows where a gradient flows.
def _op(name, event_axes, prepare, reference, inputs):
    grads = ", ".join(["Tensor"] * inputs.count("Tensor"))
    return Op(
        name,
        prepare=prepare,
        reference=reference,
        schema=f"({inputs}) -> (Tensor, Tensor, Tensor)",
        backward_schema=f"(Tensor grad_dynamics, Tensor grad_representation, Tensor kl, {inputs}) -> ({grads})",
        fake=partial(_fake, event_axes),
        backward_fake=_fake_backward,
        save=_save,
        backward=_backward,
        backends=(
            Backend(
                "cpu",
                partial(_cpu_forward, f"{name}_forward", event_axes),
                partial(_cpu_backward, f"{name}_backward", event_axes),
                _cpu_refuse,
                partial(_cpu_plan, event_axes),
            ),
            Backend(
                "triton",
                partial(_triton_forward, event_axes),
                partial(_triton_backward, event_axes),
                partial(_triton_refuse, event_axes),
                partial(_triton_plan, event_axes),
            ),
        ),
    )


def _tensors_and_numbers(args):
    count = sum(isinstance(x, Tensor) for x in args)
    return args[:count], args[count:]


def _fake(event_axes, x, *others):
    """Empty dynamics, representation and KL."""
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    return tuple([x.new_empty(x.shape[: x.dim() - event_axes], dtype=dtype) for _ in range(3)])


def _fake_backward(grad_dynamics, grad_representation, kl, *args):
    return tuple([torch.empty_like(x) for x in _tensors_and_numbers(args)[0]])


def _save(ctx, inputs, output):
    tensors, ctx.numbers = _tensors_and_numbers(inputs)
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_dynamics, grad_representation, grad_kl):
    kl, *tensors = ctx.saved_tensors
    nothing = kl.new_zeros(()).expand(kl.shape)
    grads = ctx.run_backward(
        nothing if grad_dynamics is None else grad_dynamics,
        nothing if grad_representation is None else grad_representation,
        kl,
        *tensors,
        *ctx.numbers,
    )
    # A half that is not in the loss gives no gradient, as in the reference; zeros would move an optimizer's averages.
    half = len(tensors) // 2
    post = [None] * half if grad_representation is None else grads[:half]
    prior = [None] * half if grad_dynamics is None else grads[half:]
    return *post, *prior, *[None] * len(ctx.numbers)


def _has_dense_rows(x, event_axes):
    return x.stride(-1) == 1 and (event_axes == 1 or x.shape[-2] == 1 or x.stride(-2) == x.shape[-1])


def _dense_rows(x, event_axes):
    return x if _has_dense_rows(x, event_axes) else x.contiguous()


def _cpu_forward(function, event_axes, *args):
    results = _fake(event_axes, *args)
    _call_extension(function, event_axes, results, args, ())
    return results


def _cpu_backward(function, event_axes, grad_dynamics, grad_representation, kl, *args):
    per_row = grad_dynamics, grad_representation, kl
    grads = _fake_backward(*per_row, *args)
    _call_extension(function, event_axes, per_row, args, grads)
    return grads


def _call_extension(function, event_axes, per_row, args, grads):
    """Fills `grads` (..., event) from the three tensors `per_row` (...), or those when there are none."""
    inputs, (free_nats, *unimix) = _tensors_and_numbers(args)
    dense_inputs, dense_grads = ([_dense_rows(x, event_axes) for x in group] for group in (inputs, grads))
    getattr(backend.extension, function)(
        (*per_row[0].shape, math.prod(inputs[0].shape[-event_axes:])),
        inputs[0].shape[-1],
        *(unimix or [0.0]),
        free_nats or -math.inf,  # 0 is no clip
        backend.cpu_threads(inputs[0]),
        tuple([(x.data_ptr(), x.stride()) for x in (*per_row, *dense_inputs, *dense_grads)]),
    )
    for grad, dense in zip(grads, dense_grads, strict=True):
        if grad is not dense:
            grad.copy_(dense)


def _cpu_refuse(x, *others):
    return backend.refuse_cpu(x, (torch.float32,))


def _cpu_plan(event_axes, *args):
    inputs, _ = _tensors_and_numbers(args)
    copies = "" if all(_has_dense_rows(x, event_axes) for x in inputs) else ", after a copy since rows are not dense"
    threads, lanes = backend.cpu_threads(inputs[0]), ("rows", "variables")[event_axes - 1]
    return f"C++, {threads} thread{'s' * (threads > 1)}, SIMD over {lanes}{copies}"


_MOST_CLASSES_ON_TRITON = 1 << 12  # those of a variable must fit into the registers of one program


def _triton_forward(event_axes, *args):
    results = _fake(event_axes, *args)
    backend.triton_kernels("balanced_kl").forward(event_axes, results, *_tensors_and_numbers(args))
    return results


def _triton_backward(event_axes, grad_dynamics, grad_representation, kl, *args):
    per_row, (inputs, numbers) = (grad_dynamics, grad_representation, kl), _tensors_and_numbers(args)
    grads = _fake_backward(*per_row, *args)
    backend.triton_kernels("balanced_kl").backward(event_axes, per_row, inputs, grads, numbers)
    return grads


def _triton_refuse(event_axes, x, *others):
    if event_axes == 2 and x.shape[-1] > _MOST_CLASSES_ON_TRITON:
        return f"it takes at most {_MOST_CLASSES_ON_TRITON} classes; the logits are {tuple(x.shape)}"
    return backend.refuse_triton(x, (torch.float32, *HALF))


def _triton_plan(event_axes, x, *others):
    rows = math.prod(x.shape[: x.dim() - event_axes])
    return str(backend.triton_kernels("balanced_kl").plan(rows, *x.shape[-event_axes:]))


_categorical = _op(
    "balanced_kl",
    2,
    _prepare_categorical,
    _categorical_reference,
    "Tensor post, Tensor prior, float free_nats, float unimix",
)
_gaussian = _op(
    "balanced_kl_gaussian",
    1,
    _prepare_gaussian,
    _gaussian_reference,
    "Tensor post_mean, Tensor post_std, Tensor prior_mean, Tensor prior_std, float free_nats",
)
