"""Slot attention modules of the shape that most PyTorch code gives them, after lucidrains/slot-attention.

Parts: `norm_input`, `norm_slots`, `norm_pre_ff`; `to_q`, `to_k`, `to_v` with or without biases; `gru`, a cell or a GRU
of one layer; `mlp` or `fc1` and `fc2`; `slots_mu` and the logarithm of a deviation; `iters`, `eps`, `num_slots`.
Source: slot_attention/slot_attention.py of github.com/lucidrains/slot-attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.compat.acceleration import Accelerated
from phyxdream.compat.structure import Misfit, Traits, gru_weights, layers_of
from phyxdream.ops import SlotAttentionWeights

_LOG_STD = ("slots_logsigma", "slots_log_sigma")


class _Model(NamedTuple):
    weights: SlotAttentionWeights
    layer_eps: float

    @property
    def like(self) -> Tensor:
        return self.weights.to_q


class SlotAttention(Accelerated):
    """A module `forward(inputs, num_slots=None) -> slots`."""

    kind = "slot attention"
    replaces = ("forward",)

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("to_q", "to_k", "to_v", "gru", "norm_input", "norm_slots", "norm_pre_ff", "iters", "num_slots")
        own = type(module).__module__.startswith("phyxdream.nn")
        return not own and all(hasattr(module, name) for name in names)

    @staticmethod
    def read(module: nn.Module) -> _Model:
        traits = Traits()
        if not any(hasattr(module, name) for name in _LOG_STD) or not hasattr(module, "slots_mu"):
            raise Misfit("slots that do not start from slots_mu and the logarithm of a deviation")
        norms = [traits.affine(getattr(module, name)) for name in ("norm_input", "norm_slots", "norm_pre_ff")]
        if any(shift is None for _, shift in norms):
            raise Misfit("norms that are no layer norms")
        if hasattr(module, "mlp"):
            layers, last = layers_of(module.mlp.children(), "mlp")
            if len(layers) != 1 or last is None or layers[0].norm is not None or layers[0].act != "relu":
                raise Misfit("an mlp that is not linear, ReLU, linear")
            first = layers[0].linear
        else:
            first, last = module.fc1, module.fc2
        gates = gru_weights(module.gru)
        if module.to_q.bias is not None:  # moves all slots alike, which the softmax does not see: its gradient is 0
            gates = (*gates[:3], gates[3] + 0.0 * module.to_q.bias.sum())
        for name, layer in (("to_q", module.to_q), ("to_k", module.to_k), ("mlp", first), ("mlp", last)):
            if not isinstance(layer, nn.Linear):
                raise Misfit(f"{type(layer).__name__} where {name} has a linear layer")
        if first.bias is None or last.bias is None:
            raise Misfit("an mlp without biases")
        if len({x.dtype for x in module.parameters()}) > 1 or module.to_q.weight.dtype not in (
            torch.float32,
            torch.float64,
        ):
            raise Misfit(f"weights in {str(module.to_q.weight.dtype).removeprefix('torch.')}")
        weights = SlotAttentionWeights(
            *norms[0], module.to_k.weight, module.to_v.weight, *norms[1], module.to_q.weight, *gates, *norms[2],
            first.weight, first.bias, last.weight, last.bias, module.to_k.bias, module.to_v.bias,
        )  # fmt: skip
        return _Model(weights, traits.options(0.0).layer_eps)

    @staticmethod
    def trials(module: nn.Module):
        like = module.to_k.weight

        def call():
            return (torch.randn(3, 7, like.shape[1], dtype=like.dtype, device=like.device).requires_grad_(),)

        return [("forward", call)]

    def forward(self, inputs: Tensor, num_slots: int | None = None, **options):
        model = None if options or inputs.dim() != 3 else self.fitted(inputs)
        if model is None:
            return super().forward(inputs, num_slots, **options)
        count = self.num_slots if num_slots is None else num_slots
        log_std = next(getattr(self, name) for name in _LOG_STD if hasattr(self, name))
        mean, std = (x.expand(len(inputs), count, -1) for x in (self.slots_mu, log_std.exp()))
        slots = mean + std * torch.randn(mean.shape, device=inputs.device, dtype=inputs.dtype)
        found, _ = ops.slot_attention(
            inputs, slots, model.weights, iterations=self.iters, eps=float(self.eps), layer_eps=model.layer_eps,
            return_attention=False,
        )  # fmt: skip
        return found
