"""One step of an RSSM, for acting and for loops of one's own: the scans over a single step, without its axis.

    posterior: h' = cell(h, z, a)     z' ~ q(posterior(h', embed))        (`rssm_step`)
    prior:     h' = cell(h, z, a)     z' ~ p(prior(h'))                   (`rssm_imagine_step`)

The ops that run are those of phyxdream/ops/rssm_observe.py and rssm_imagine.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from phyxdream.ops.rssm_cells import CellWeights, HeadWeights, PosteriorWeights
from phyxdream.ops.rssm_contract import check_tensors
from phyxdream.ops.rssm_imagine import rssm_imagine
from phyxdream.ops.rssm_observe import rssm_observe


def rssm_step(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    cell: CellWeights,
    posterior: PosteriorWeights,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The posterior state after one observation: `rssm_observe` with T = 1, differentiable likewise.

    Args:
        embed: (B, E), of the observation; dtypes and strides as for `rssm_observe`.
        action: (B, A), which led to the observation.
        is_first: (B,) bool; where true, the state and the action are reset before the step.
        deter: (B, D) state before the step.
        stoch: (B, S, C) or (B, S).
        noise: (B, S, C) uniform in [0, 1) for categorical latents, or (B, S) standard normal for Gaussian ones.
        cell, posterior: as for `rssm_observe`.
        **options: its keyword arguments: `initial_deter`, `initial_stoch`, `act`, `unimix`, `min_std`, `rms_eps`,
            `layer_eps` and `gumbel`.

    Returns:
        deter (B, D), stoch (B, S, C) and logits (B, S, C) before unimix; or deter, stoch (B, S), mean and std (B, S).

    Raises:
        TypeError: an argument is of another type, the dtypes differ, or an option is unknown.
        ValueError: a shape does not fit, the devices differ, a tensor is empty, or an option is out of range.

    Source: as `rssm_observe`. `explain(rssm_observe, ...)` says which backend takes a single step.

    >>> import torch
    >>> from phyxdream.ops import GRUWeights, PosteriorWeights
    >>> B, E, A, D, S, C, U = 2, 3, 1, 4, 2, 3, 6
    >>> cell = GRUWeights(torch.randn(U, S * C), torch.randn(U, A), torch.zeros(U), None, None,
    ...                   torch.randn(3 * D, U), torch.randn(3 * D, D), torch.zeros(3 * D), torch.zeros(3 * D))
    >>> posterior = PosteriorWeights(torch.randn(U, D + E), torch.zeros(U), None, None,
    ...                              torch.randn(S * C, U), torch.zeros(S * C))
    >>> deter, stoch = torch.zeros(B, D), torch.zeros(B, S, C)
    >>> is_first = torch.tensor([True, True])
    >>> for t in range(3):
    ...     deter, stoch, logits = rssm_step(
    ...         torch.randn(B, E), torch.randn(B, A), is_first, deter, stoch, torch.rand(B, S, C), cell, posterior)
    ...     is_first = torch.tensor([False, False])
    >>> deter.shape, stoch.shape, stoch.sum(-1).unique()
    (torch.Size([2, 4]), torch.Size([2, 2, 3]), tensor([1.]))
    """
    embed, action, is_first, noise = _one_step(noise, embed=embed, action=action, is_first=is_first)
    outputs = rssm_observe(embed, action, is_first, deter, stoch, noise, cell, posterior, **options)
    return tuple(x[0] for x in outputs)


def rssm_imagine_step(
    action: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    cell: CellWeights,
    prior: HeadWeights,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The prior state that follows a state under one action: `rssm_imagine` with H = 1, differentiable likewise.

    Args:
        action: (B, A), which leads to the state of the result; dtypes and strides as for `rssm_imagine`.
        deter: (B, D) state before the step.
        stoch: (B, S, C) or (B, S).
        noise: (B, S, C) uniform in [0, 1) for categorical latents, or (B, S) standard normal for Gaussian ones.
        cell, prior: as for `rssm_imagine`.
        **options: its keyword arguments: `act`, `unimix`, `min_std`, `rms_eps`, `layer_eps` and
            `gumbel`.

    Returns:
        deter (B, D), stoch (B, S, C) and logits (B, S, C) before unimix; or deter, stoch (B, S), mean and std (B, S).

    Raises:
        TypeError: an argument is of another type, the dtypes differ, or an option is unknown.
        ValueError: a shape does not fit, the devices differ, a tensor is empty, or an option is out of range.

    Source: as `rssm_imagine`. `explain(rssm_imagine, ...)` says which backend takes a single step.

    >>> import torch
    >>> from phyxdream.ops import GRUWeights, HeadWeights, LayerWeights
    >>> B, A, D, S, C, U = 2, 1, 4, 2, 3, 6
    >>> cell = GRUWeights(torch.randn(U, S * C), torch.randn(U, A), torch.zeros(U), None, None,
    ...                   torch.randn(3 * D, U), torch.randn(3 * D, D), torch.zeros(3 * D), torch.zeros(3 * D))
    >>> prior = HeadWeights((LayerWeights(torch.randn(U, D), torch.zeros(U), None, None),),
    ...                     torch.randn(S * C, U), torch.zeros(S * C))
    >>> deter, stoch, logits = rssm_imagine_step(
    ...     torch.randn(B, A), torch.zeros(B, D), torch.zeros(B, S, C), torch.rand(B, S, C), cell, prior)
    >>> deter.shape, stoch.shape, stoch.sum(-1).unique()
    (torch.Size([2, 4]), torch.Size([2, 2, 3]), tensor([1.]))
    """
    action, noise = _one_step(noise, action=action)
    outputs = rssm_imagine(action, deter, stoch, noise, cell, prior, **options)
    return tuple(x[0] for x in outputs)


def _one_step(noise: Tensor, **tensors: Tensor) -> list[Tensor]:
    """The tensors of a step, the noise last, with an axis of time: their shapes are told as the caller knows them."""
    check_tensors({**tensors, "noise": noise})
    if noise.dim() not in (2, 3):
        raise ValueError(f"noise: expected shape (B, S, C) or (B, S), got {tuple(noise.shape)}")
    B = noise.shape[0]
    for name, x in tensors.items():
        axes = 1 if name == "is_first" else 2
        if x.dim() != axes or x.shape[0] != B:
            expected = f"({B},)" if axes == 1 else f"({B}, {name[0].upper()})"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    return [x.unsqueeze(0) for x in (*tensors.values(), noise)]
