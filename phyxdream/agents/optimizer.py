"""Optimisers: DreamerV3's LaProp after adaptive gradient clipping, and the Adam of V1 and V2 with clipped norms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class LaProp(torch.optim.Optimizer):
    """Adaptive gradient clipping (per tensor) → division by the running RMS → momentum, both bias-corrected.

        g ← g · min(1, agc·max(pmin, ‖w‖) / ‖g‖)
        v ← β2·v + (1−β2)·g²          u = g / (√(v / (1−β2^t)) + eps)
        m ← β1·m + (1−β1)·u           w ← w − lr_t · m / (1−β1^t),  lr_t = lr·min(1, t / warmup)

    Sources: Brock et al. 2021 (AGC), Ziyin et al. 2020 (LaProp), danijar/dreamerv3 for the order and constants.

    Args:
        params: parameters, all updated at the same rate.
        lr: learning rate after warm-up.
        agc: largest gradient norm as a share of the weight's norm; pmin: floor of that norm.
        betas: β1 of the momentum, β2 of the RMS.
        eps: added to the RMS.
        warmup: updates over which the rate rises linearly; 0 for none.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 4e-5,
        agc: float = 0.3,
        pmin: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        warmup: int = 1000,
    ):
        super().__init__(params, dict(lr=lr, agc=agc, pmin=pmin, betas=betas, eps=eps, warmup=warmup, step=0))

    @torch.no_grad()
    def step(self, closure=None) -> Tensor:
        """One update; returns the gradients' global norm before clipping, as a 0-d tensor."""
        if closure is not None:
            raise ValueError("closure: not supported; compute gradients before step()")
        norms = []
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            rms, momentum = _averages(self, weights)
            # What changes from update to update is a tensor: a CUDA graph of an update would keep numbers as they were.
            t = group["step"] = torch.as_tensor(group["step"], dtype=torch.float64, device=weights[0].device)
            t += 1
            beta1, beta2 = group["betas"]
            warm = (t / group["warmup"]).clamp(max=1.0) if group["warmup"] else 1.0
            rate = (-group["lr"] * warm / (1 - beta1**t)).to(weights[0].dtype)
            debias = (1 / (1 - beta2**t)).to(weights[0].dtype)

            grad_norms = torch._foreach_norm(grads)
            norms += grad_norms
            grad_norm = torch.stack(grad_norms)
            limit = group["agc"] * torch.stack(torch._foreach_norm(weights)).clamp(min=group["pmin"])
            grads = torch._foreach_mul(grads, list((limit / grad_norm.clamp(min=1e-30)).clamp(max=1.0).unbind()))

            torch._foreach_mul_(rms, beta2)
            torch._foreach_addcmul_(rms, grads, grads, value=1 - beta2)
            scale = torch._foreach_mul(rms, debias)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_div_(grads, scale)
            torch._foreach_lerp_(momentum, grads, 1 - beta1)
            torch._foreach_add_(weights, torch._foreach_mul(momentum, rate))
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


class ClippedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) for groups of weights, each with its own rate and its gradients clipped at a norm.

        g ← g · min(1, clip / ‖g‖)  over all of a group
        m ← β1·m + (1−β1)·g         v ← β2·v + (1−β2)·g²
        w ← (1 − decay)·w (matrices) − lr · m / (1−β1^t) / (√(v / (1−β2^t)) + eps)

    Sources: danijar/dreamer, danijar/dreamerv2 (clipping and decay).

    Args:
        params: groups of parameters with their `lr`.
        clip: largest norm of the gradients of a group.
        betas: β1 and β2.
        eps: added to the RMS.
        decay: share that matrices lose at each update.
    """

    def __init__(
        self,
        params: Iterable[dict],
        lr: float = 6e-4,
        clip: float = 100.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, clip=clip, betas=betas, eps=eps, decay=decay, step=0))

    @torch.no_grad()
    def step(self, closure=None) -> Tensor:
        """One update; returns the norm of all gradients before clipping, as a 0-d tensor."""
        if closure is not None:
            raise ValueError("closure: not supported; compute gradients before step()")
        norms = []
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            # As in LaProp, what changes from update to update is a tensor.
            t = group["step"] = torch.as_tensor(group["step"], dtype=torch.float64, device=group["params"][0].device)
            t += 1
            if not weights:
                continue
            grads = [p.grad for p in weights]
            rms, momentum = _averages(self, weights)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            norms.append(norm)
            grads = torch._foreach_mul(grads, (group["clip"] / norm.clamp(min=1e-30)).clamp(max=1.0))
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(momentum, grads, 1 - beta1)
            torch._foreach_mul_(rms, beta2)
            torch._foreach_addcmul_(rms, grads, grads, value=1 - beta2)
            scale = torch._foreach_mul(rms, (1 / (1 - beta2**t)).to(weights[0].dtype))
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            moves = torch._foreach_div(momentum, scale)
            if group["decay"]:
                torch._foreach_mul_([p for p in weights if p.dim() > 1], 1 - group["decay"])
            rate = (-group["lr"] / (1 - beta1**t)).to(weights[0].dtype)
            torch._foreach_add_(weights, torch._foreach_mul(moves, rate))
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _averages(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Running averages of the gradients' squares and of what moves the weights, one each a weight; 0 at first."""
    for p in weights:
        if not optimizer.state[p]:
            optimizer.state[p]["rms"], optimizer.state[p]["momentum"] = torch.zeros_like(p), torch.zeros_like(p)
    return [optimizer.state[p]["rms"] for p in weights], [optimizer.state[p]["momentum"] for p in weights]
