"""DreamerV3's optimiser: adaptive gradient clipping, then LaProp (RMS scaling before momentum)."""

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
            for p in weights:
                if not self.state[p]:
                    self.state[p]["rms"], self.state[p]["momentum"] = torch.zeros_like(p), torch.zeros_like(p)
            grads = [p.grad for p in weights]
            rms = [self.state[p]["rms"] for p in weights]
            momentum = [self.state[p]["momentum"] for p in weights]
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
