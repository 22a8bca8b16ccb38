"""Behaviour learned in imagination: actor, critic, their losses, and the return normaliser (DreamerV3).

The losses are plain functions of tensors, time-major, so that each can be read and tested alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phyxdream import distributed, ops
from phyxdream.nn.heads import Actor, TwoHotHead


class ReturnNormalizer(nn.Module):
    """Moving 5th and 95th percentiles of the returns; advantages are divided by their distance, at least 1."""

    def __init__(self, rate: float = 0.01, low: float = 0.05, high: float = 0.95, limit: float = 1.0):
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("quantiles", torch.tensor([low, high]), persistent=False)
        self.register_buffer("percentiles", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, returns: Tensor) -> Tensor:
        """Take in returns of any shape, of all processes that learn together; the current scale, 0-d."""
        found = torch.quantile(distributed.gather(returns).flatten(), self.quantiles.to(returns.dtype))
        self.percentiles.lerp_(found.float(), self.rate)
        self.weight.lerp_(torch.ones_like(self.weight), self.rate)
        return self.scale

    @property
    def scale(self) -> Tensor:
        # Dividing by the weight removes the bias towards the zeros the average started from.
        low, high = self.percentiles / self.weight.clamp(min=self.rate)
        return (high - low).clamp(min=self.limit)


@dataclass
class Losses:
    """Per-element losses, already weighted, and 0-d metrics."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


def imagination_loss(
    actor: Actor,
    critic: TwoHotHead,
    slow_critic: TwoHotHead,
    normalizer: ReturnNormalizer,
    feature: Tensor,
    action: Tensor,
    reward: Tensor,
    cont: Tensor,
    td_lambda: float,
    entropy_coeff: float,
    slow_coeff: float,
    generator: torch.Generator | None = None,
) -> tuple[Losses, Tensor]:
    """Actor and critic losses on imagined trajectories, and their λ-returns (H, N).

    Args:
        feature: (H+1, N, F) without gradient; the start is `feature[0]`.
        action: (H, N, A), `action[t]` was taken at `feature[t]`.
        reward, cont: (H+1, N) predicted at each state; `cont` is discount times the chance to go on.
        td_lambda, entropy_coeff, slow_coeff: λ, weight of the entropy, weight of the slow-critic regulariser.
        generator: draws where an entropy is an estimate.

    The actor follows REINFORCE for discrete and continuous actions alike.
    """
    value = critic(feature)
    baseline = value.mode.detach()
    returns = ops.lambda_return(reward[1:], baseline[1:], cont[1:], td_lambda)
    # How likely the trajectory still runs when it gets to a state: later states of a finished episode count less.
    weight = torch.cumprod(cont, 0).detach()[:-1]
    scale = normalizer(returns)
    advantage = (returns - baseline[:-1]) / scale
    policy = actor(feature[:-1])
    entropy = policy.entropy(generator)
    with torch.no_grad():
        slow_value = slow_critic(feature).mode
    # The last state has no return of its own; it only bootstraps.
    value_loss = value.loss(torch.cat([returns, baseline[-1:]])) + slow_coeff * value.loss(slow_value)
    losses = {
        "actor": -weight * (policy.log_prob(action) * advantage + entropy_coeff * entropy),
        "critic": weight * value_loss[:-1],
    }
    metrics = {
        "imagined_return": returns.mean(),
        "imagined_reward": reward[1:].mean(),
        "return_scale": scale,
        "value": baseline.mean(),
        "entropy": entropy.detach().mean(),
        "advantage_magnitude": advantage.abs().mean(),
    }
    return Losses(losses, metrics), returns


def replay_critic_loss(
    critic: TwoHotHead,
    slow_critic: TwoHotHead,
    feature: Tensor,
    reward: Tensor,
    is_last: Tensor,
    is_terminal: Tensor,
    bootstrap: Tensor,
    discount: float,
    td_lambda: float,
    slow_coeff: float,
) -> Tensor:
    """Critic loss (T−1, B) on replayed trajectories, bootstrapped from imagined returns.

    Args:
        feature: (T, B, F) posterior features, with their graph: this loss also shapes the representation.
        reward, is_last, is_terminal: (T, B) as replayed.
        bootstrap: (T, B) λ-return imagined from each replayed state.

    λ is zero where an episode ends, so that no return crosses into the next one.
    """
    value = critic(feature)
    live = discount * (~is_terminal[1:]).to(feature.dtype)
    lambda_ = td_lambda * (~is_last[1:]).to(feature.dtype)
    returns = ops.lambda_return(reward[1:], bootstrap[1:], live, lambda_)
    with torch.no_grad():
        slow_value = slow_critic(feature).mode
    padded = torch.cat([returns, torch.zeros_like(returns[:1])])
    loss = value.loss(padded) + slow_coeff * value.loss(slow_value)
    return (~is_last[:-1]).to(loss.dtype) * loss[:-1]


@torch.no_grad()
def update_slow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow ← (1 − rate)·slow + rate·fast, for every parameter."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)
