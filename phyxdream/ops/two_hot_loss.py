"""A scalar as a categorical over bins: two-hot cross-entropy, and the mean. DreamerV3's rewards and values.

    loss = -((1 - w) ln p_b + w ln p_a),   p = softmax(logits),   w = (target - bins_b) / (bins_a - bins_b)
    mean = Σ_k p_k bins_k

b and a are the neighbours of the target. Backward is one fused pass too, from the saved inputs. C++ in
csrc/two_hot_loss.cpp, Triton in kernels/two_hot_loss.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from phyxdream.ops import backend
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.contract import FLOATING, HALF


def two_hot_loss(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Cross-entropy of a categorical over bins with a target split over its two neighbours; once differentiable.

    The target's weights are those of linear interpolation between its neighbours; outside the bins it counts as the
    first or the last. Only `logits` gets a gradient, `grad (softmax(logits) - two_hot(target))`.

    Args:
        logits: (..., K) float32, float64, bfloat16 or float16, any strides. Fastest where the last axis is contiguous;
            rows may lie anywhere.
        target: (...) in the units of `bins`, not broadcast; the dtype of `logits`, or float32 beside half precision.
        bins: (K,) positions in strictly ascending order (not checked), the dtype of `logits`, or float32 beside half
            precision. DreamerV3 has symexp(linspace(-20, 20, 255)); with bins in symlog space, pass symlog(target).

    Returns:
        (...) losses in nats, in the dtype of `logits`; for half precision, which is computed in float32 and not
        rounded again, in float32.

    On the CPU the result, gradients included, does not depend on the number of threads, to the last bit.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes do not go together.
        ValueError: target is not (...), bins is not (K,) with K > 1, or the devices differ.

    Source: Hafner et al., "Mastering Diverse Domains through World Models", 2023, eq. 8 to 10.

    >>> logits, bins = torch.zeros(2, 3), torch.tensor([-1.0, 0.0, 1.0])
    >>> logits[:, 2] = 1.0
    >>> two_hot_loss(logits, torch.tensor([0.5, 7.0]), bins)
    tensor([1.0514, 0.5514])
    """
    return _loss(*_prepare_loss(logits, target, bins))


def two_hot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """The mean of a categorical over bins; once differentiable in `logits`.

    It is summed in pairs from the centre, so that equal probabilities of opposite bins cancel exactly: where the bins
    are symmetric and the logits of a row are equal, the mean is 0, however large the outer bins are.

    Args:
        logits: (..., K) as in `two_hot_loss`.
        bins: (K,) positions in any order, as in `two_hot_loss`.

    Returns:
        (...) in the units of `bins`; float32 for half precision, otherwise in the dtype of `logits`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes do not go together.
        ValueError: bins is not (K,) with K > 1, or the devices differ.

    Source: as `two_hot_loss`; danijar/dreamerv3, `embodied/jax/outs.py`, TwoHot.pred (the order of the sum).

    >>> two_hot_mean(torch.tensor([[3.0, 3.0, 3.0], [0.0, 0.0, 200.0]]), torch.tensor([-1e6, 0.0, 1e6]))
    tensor([      0., 1000000.])
    """
    return _mean(*_prepare_mean(logits, bins))


def _prepare_loss(logits: Tensor, target: Tensor, bins: Tensor) -> tuple:
    """The checked arguments of the schema: target and bins are float32 beside half precision."""
    logits, bins = _prepare_mean(logits, bins)
    target = _beside(logits, "target", target)
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target: expected the shape of logits without its last axis, {tuple(logits.shape[:-1])}, "
            f"got {tuple(target.shape)} (no broadcast)"
        )
    return logits, target, bins


def _prepare_mean(logits: Tensor, bins: Tensor) -> tuple:
    """The checked arguments of the schema: bins are float32 beside half precision."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits: expected a floating-point tensor, got {logits.dtype}")
    bins = _beside(logits, "bins", bins)
    if bins.dim() != 1 or not logits.dim() or logits.shape[-1] != bins.shape[0] or bins.shape[0] < 2:
        raise ValueError(
            f"logits, bins: expected shapes (..., K) and (K,) with K > 1, got {tuple(logits.shape)} and "
            f"{tuple(bins.shape)}"
        )
    return logits, bins


def _beside(logits, name, x):
    """`x`, checked against `logits`, without gradient and not in half precision."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype is not logits.dtype and not (x.dtype is torch.float32 and logits.dtype in HALF):
        raise TypeError(
            f"{name}: expected the dtype of logits, {logits.dtype}, or float32 for half precision, got {x.dtype}"
        )
    if not (logits.is_cpu and x.is_cpu) and x.device != logits.device:
        raise ValueError(f"{name}: expected the device of logits, {logits.device}, got {x.device}")
    return _full(x.detach() if x.requires_grad else x)


def _full(x):
    return x.float() if x.dtype in HALF else x


def _loss_reference(logits, target, bins):
    logp = torch.log_softmax(_full(logits), -1)
    above = torch.searchsorted(bins.contiguous(), target.contiguous()).clamp(1, len(bins) - 1)
    below = above - 1
    weight = ((target - bins[below]) / (bins[above] - bins[below])).clamp(0, 1)
    logp = torch.gather(logp, -1, torch.stack([below, above], -1))
    return -((1 - weight) * logp[..., 0] + weight * logp[..., 1])


def _mean_reference(logits, bins):
    terms = torch.softmax(_full(logits), -1) * bins
    half = len(bins) // 2
    low, centre, high = terms[..., :half], terms[..., half:-half], terms[..., -half:]
    return (low.flip(-1) + high).sum(-1) + centre.sum(-1)


# Both ops are the same but for the target, which the mean has not; in its backward, the mean itself stands there.
def _op(name, prepare, reference, inputs):
    return Op(
        name,
        prepare=prepare,
        reference=reference,
        schema=f"({inputs}) -> Tensor",
        backward_schema="(Tensor grad, Tensor logits, Tensor target_or_mean, Tensor bins) -> Tensor",
        fake=_fake,
        backward_fake=_fake_backward,
        save=_save,
        backward=_backward,
        backends=(
            Backend(
                "cpu",
                partial(_cpu_forward, f"{name}_forward"),
                partial(_cpu_backward, f"{name}_backward"),
                _cpu_refuse,
                _cpu_plan,
            ),
            Backend(
                "triton",
                partial(_triton, f"{name}_forward"),
                partial(_triton, f"{name}_backward"),
                _triton_refuse,
                _triton_plan,
            ),
        ),
    )


def _fake(logits, *others):
    return others[-1].new_empty(logits.shape[:-1])  # others[-1]: bins, which are never in half precision


def _fake_backward(grad, logits, target_or_mean, bins):
    return torch.empty_like(logits)


def _save(ctx, inputs, output):
    logits, *target, bins = inputs
    ctx.save_for_backward(logits, *(target or [output]), bins)
    ctx.without_gradient = len(inputs) - 1


def _backward(ctx, grad):
    return ctx.run_backward(grad, *ctx.saved_tensors), *[None] * ctx.without_gradient


def _contiguous_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _threads(logits):
    """An exponential costs more than a read: here a thread pays sooner than by `backend.cpu_threads`."""
    return torch.get_num_threads() if logits.numel() >= 1 << 17 else 1


def _call_extension(function, logits, tensors, bins):
    bins = bins.contiguous()
    getattr(backend.extension, function)(
        logits.shape, *[(x.data_ptr(), x.stride()) for x in tensors], bins.data_ptr(), _threads(logits)
    )


def _cpu_forward(function, logits, *others):
    *target, bins = others
    y = _fake(logits, bins)
    _call_extension(function, logits, (_contiguous_rows(logits), y, *target), bins)
    return y


def _cpu_backward(function, grad, logits, target_or_mean, bins):
    grad_logits = torch.empty_like(logits)
    rows = _contiguous_rows(grad_logits)
    _call_extension(function, logits, (rows, grad, _contiguous_rows(logits), target_or_mean), bins)
    return grad_logits if rows is grad_logits else grad_logits.copy_(rows)


def _cpu_refuse(logits, *others):
    return backend.refuse_cpu(logits, (torch.float32,))


def _cpu_plan(logits, *others):
    copies = "" if logits.stride(-1) == 1 else ", after a copy since the last axis is not contiguous"
    threads = _threads(logits)
    return f"C++, {threads} thread{'s' * (threads > 1)}, SIMD over the bins{copies}"


_MOST_BINS_ON_TRITON = 1 << 14  # a row must fit into the registers of one program


def _triton(function, *args):
    return getattr(backend.triton_kernels("two_hot_loss"), function)(*args)


def _triton_refuse(logits, *others):
    if logits.numel() == 0 or logits.shape[-1] > _MOST_BINS_ON_TRITON:
        return (
            f"it takes at least one row, of at most {_MOST_BINS_ON_TRITON} bins; the logits are {tuple(logits.shape)}"
        )
    return backend.refuse_triton(logits, (torch.float32, *HALF))


def _triton_plan(logits, *others):
    size = logits.shape[-1]
    return str(backend.triton_kernels("two_hot_loss").plan(logits.numel() // size, size))


_loss = _op("two_hot_loss", _prepare_loss, _loss_reference, "Tensor logits, Tensor target, Tensor bins")
_mean = _op("two_hot_mean", _prepare_mean, _mean_reference, "Tensor logits, Tensor bins")
