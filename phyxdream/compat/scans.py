"""The scans that all adapters are made of: one call of an op, on a model that was read from a foreign module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phyxdream import ops
from phyxdream.compat.structure import Model
from phyxdream.ops import rssm_cells


@dataclass
class Sequence:
    """States (T, B, ...): deter, stoch and raw logits, or mean and std."""

    deter: Tensor
    stoch: Tensor
    logits: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None


def observe(
    model: Model,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    initial: tuple[Tensor, Tensor] | None = None,
) -> Sequence:
    """Posterior states (T, B, ...) of time-major inputs; `initial` is (D,) and (S, C) or (S,), where resets lead."""
    reset = {} if initial is None else dict(initial_deter=initial[0], initial_stoch=initial[1])
    found = ops.rssm_observe(
        embed, action, is_first, deter, stoch.reshape(-1, *model.latent), noise, model.cell, model.posterior,
        **reset, **model.options.keywords,
    )  # fmt: skip
    return _sequence(model, found)


def imagine(model: Model, action: Tensor, deter: Tensor, stoch: Tensor, noise: Tensor) -> Sequence:
    """Prior states (H, B, ...) that follow a state under actions (H, B, A)."""
    options = model.options
    if model.prior_unimix is not None:
        options = options._replace(unimix=model.prior_unimix)
    found = ops.rssm_imagine(
        action, deter, stoch.reshape(-1, *model.latent), noise, model.cell, model.prior, **options.keywords
    )
    return _sequence(model, found)


def prior(model: Model, deter: Tensor, noise: Tensor | None) -> Sequence:
    """What the prior says at states (T, B, D): statistics, and samples where there is noise."""
    statistics = rssm_cells.head(model.prior, deter, model.options)
    unimix = model.options.unimix if model.prior_unimix is None else model.prior_unimix
    if model.classes:
        logits = statistics.unflatten(-1, model.latent)
        stoch = None
        if noise is not None:
            p = rssm_cells.class_probabilities(logits, unimix)
            options = model.options._replace(cumulative=model.cumulative)
            noise = noise.unsqueeze(-1) if model.cumulative else rssm_cells.arrival_times(noise)
            stoch = rssm_cells.draw_latent(p, noise, options)
        return Sequence(deter, stoch, logits)
    mean, raw = statistics.chunk(2, -1)
    std = rssm_cells.deviation(raw, model.options.min_std)
    return Sequence(deter, None if noise is None else mean + std * noise, mean=mean, std=std)


def _sequence(model, found):
    if model.classes:
        return Sequence(*found)
    deter, stoch, mean, std = found
    return Sequence(deter, stoch, mean=mean, std=std)


def swapped(x: Tensor) -> Tensor:
    """(B, T, ...) as (T, B, ...), or back."""
    return x.transpose(0, 1)


def mixed_logits(logits: Tensor, unimix: float) -> Tensor:
    """Logarithms of the class probabilities after unimix; the logits themselves without it."""
    if not unimix:
        return logits
    eps = torch.finfo(logits.dtype).eps
    return rssm_cells.class_probabilities(logits, unimix).clamp(eps, 1 - eps).log()
