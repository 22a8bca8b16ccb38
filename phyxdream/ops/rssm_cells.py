"""The recurrent cells and latents of an RSSM in plain PyTorch: their weights, their shapes, one step of each.

The scans (`rssm_observe`, `rssm_imagine`) and the modules (`phyxdream.nn.rssm`) are made of these functions; they are
the definition of correct for every faster implementation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream.ops.rms_norm_silu import rms_norm_silu

ACTIVATIONS = {"silu": F.silu, "elu": F.elu, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


class Sizes(NamedTuple):
    """What the shapes of the weights are made of: Z is S·C, or S for Gaussian latents; U is the width of a layer."""

    E: int
    A: int
    D: int
    Z: int


# A norm after a layer is named by its tensors: gain and shift (LayerNorm), gain alone (RMS norm), or neither.


class GRUWeights(NamedTuple):
    """x = act(norm(W [z, a])); h' = GRUCell(x, h) (PlaNet, DreamerV1). Gates in the order of `torch.nn.GRUCell`."""

    in_stoch: Tensor  # (U, Z)
    in_action: Tensor  # (U, A)
    in_bias: Tensor | None  # (U,)
    in_gain: Tensor | None  # (U,)
    in_shift: Tensor | None  # (U,)
    input_gates: Tensor  # (3D, U)
    hidden_gates: Tensor  # (3D, D)
    input_bias: Tensor  # (3D,)
    hidden_bias: Tensor  # (3D,)

    def shapes(self, s: Sizes) -> dict[str, tuple[int, ...]]:
        U = _rows(self.in_stoch)
        return dict(
            **_input_shapes(U, s),
            input_gates=(3 * s.D, U),
            hidden_gates=(3 * s.D, s.D),
            input_bias=(3 * s.D,),
            hidden_bias=(3 * s.D,),
        )


class LayerNormGRUWeights(NamedTuple):
    """x = act(norm(W [z, a])); [r, c, u] = LN(G [x, h] + b); h' = u·tanh(r·c) + (1−u)·h, u biased by −1 (DreamerV2,
    which has no b; others do)."""

    in_stoch: Tensor  # (U, Z)
    in_action: Tensor  # (U, A)
    in_bias: Tensor | None  # (U,)
    in_gain: Tensor | None  # (U,)
    in_shift: Tensor | None  # (U,)
    gates: Tensor  # (3D, U + D)
    gates_gain: Tensor  # (3D,)
    gates_shift: Tensor  # (3D,)
    gates_bias: Tensor | None = None  # (3D,), added before the norm

    def shapes(self, s: Sizes) -> dict[str, tuple[int, ...]]:
        U = _rows(self.in_stoch)
        gates = dict.fromkeys(("gates_gain", "gates_shift", "gates_bias"), (3 * s.D,))
        return dict(**_input_shapes(U, s), gates=(3 * s.D, U + s.D), **gates)


class BlockGRUWeights(NamedTuple):
    """Dense layers on h, z and a/max(1, |a|); per block [h_b, x] → hidden → gates, block-diagonal (current DreamerV3).

    The first block layer is a block-diagonal map of h plus a full map of what all blocks share. The gates of a block
    come from its own weights: its 3D/G columns are reset, candidate and update of that block.
    """

    in_deter: Tensor  # (U, D)
    in_deter_bias: Tensor | None  # (U,)
    in_deter_gain: Tensor | None
    in_deter_shift: Tensor | None
    in_stoch: Tensor  # (U, Z)
    in_stoch_bias: Tensor | None
    in_stoch_gain: Tensor | None
    in_stoch_shift: Tensor | None
    in_action: Tensor  # (U, A)
    in_action_bias: Tensor | None
    in_action_gain: Tensor | None
    in_action_shift: Tensor | None
    mix_deter: Tensor  # (G, D/G, D/G), inputs first
    mix_inputs: Tensor  # (D, 3U)
    mix_bias: Tensor | None  # (D,)
    mix_gain: Tensor | None
    mix_shift: Tensor | None
    gates: Tensor  # (G, D/G, 3D/G), inputs first
    gates_bias: Tensor  # (3D,)

    def shapes(self, s: Sizes) -> dict[str, tuple[int, ...]]:
        U, G = _rows(self.in_deter), _rows(self.mix_deter)
        inputs = dict(in_deter=s.D, in_stoch=s.Z, in_action=s.A)
        layers = {name: (U, size) for name, size in inputs.items()}
        layers |= {f"{name}_{part}": (U,) for name in inputs for part in ("bias", "gain", "shift")}
        block = s.D // G
        return dict(
            **layers,
            mix_deter=(G, block, block),
            mix_inputs=(s.D, 3 * U),
            mix_bias=(s.D,),
            mix_gain=(s.D,),
            mix_shift=(s.D,),
            gates=(G, block, 3 * block),
            gates_bias=(3 * s.D,),
        )


class PosteriorWeights(NamedTuple):
    """statistics = W₂ act(norm(W₁ [h, e] + b₁)) + b₂; U may differ from the cell's."""

    in_weight: Tensor  # (U, D + E)
    in_bias: Tensor | None  # (U,)
    in_gain: Tensor | None
    in_shift: Tensor | None
    out_weight: Tensor  # (Z, U) categorical, (2S, U) Gaussian: means, then raw deviations
    out_bias: Tensor  # (Z,) or (2S,)

    def shapes(self, s: Sizes, statistics: int) -> dict[str, tuple[int, ...]]:
        U = _rows(self.in_weight)
        return dict(
            in_weight=(U, s.D + s.E),
            in_bias=(U,),
            in_gain=(U,),
            in_shift=(U,),
            out_weight=(statistics, U),
            out_bias=(statistics,),
        )


class LayerWeights(NamedTuple):
    """act(norm(W x + b))."""

    weight: Tensor  # (U, inputs)
    bias: Tensor | None  # (U,)
    gain: Tensor | None  # (U,)
    shift: Tensor | None  # (U,)


class HeadWeights(NamedTuple):
    """Layers and what they end in: the prior's statistics (Z or 2S) from h, or a policy's (A or 2A) from [h, z]."""

    layers: tuple[LayerWeights, ...]  # at least one
    out_weight: Tensor  # (statistics, U)
    out_bias: Tensor  # (statistics,)


CellWeights = GRUWeights | LayerNormGRUWeights | BlockGRUWeights
CELLS = {"gru": GRUWeights, "layernorm_gru": LayerNormGRUWeights, "block_gru": BlockGRUWeights}
DEFAULT_ACT = {"gru": "elu", "layernorm_gru": "silu", "block_gru": "silu"}


class Options(NamedTuple):
    """The numbers and names beside the tensors of a scan."""

    act: str
    unimix: float
    min_std: float
    rms_eps: float
    layer_eps: float
    gumbel: bool = False
    cumulative: bool = False  # that of the noise, not an option of the ops: one number for all classes of a variable

    @property
    def keywords(self) -> dict[str, Any]:
        """As the ops take them."""
        named = self._asdict()
        del named["cumulative"]
        return named


def _rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() else 0


def _input_shapes(U: int, s: Sizes) -> dict[str, tuple[int, ...]]:
    return dict(in_stoch=(U, s.Z), in_action=(U, s.A), in_bias=(U,), in_gain=(U,), in_shift=(U,))


def norm_act(x: Tensor, gain: Tensor | None, shift: Tensor | None, options: Options) -> Tensor:
    """The norm that `gain` and `shift` name, over the last axis, and the activation."""
    if gain is not None and shift is None and options.act == "silu":
        return rms_norm_silu(x, gain, options.rms_eps)
    if gain is not None:
        x = (
            F.rms_norm(x, gain.shape, gain, options.rms_eps)
            if shift is None
            else F.layer_norm(x, gain.shape, gain, shift, options.layer_eps)
        )
    return ACTIVATIONS[options.act](x)


def block_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., I) by a block-diagonal matrix (G, I/G, O/G) to (..., O)."""
    blocks, size, _ = weight.shape
    flat = x.reshape(-1, blocks, size).transpose(0, 1)  # (G, N, I/G)
    y = torch.bmm(flat, weight).transpose(0, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def clip_action(action: Tensor) -> Tensor:
    """a / max(1, |a|), whose divisor gets no gradient."""
    return action / action.detach().abs().clamp(min=1)


def clipped(w: CellWeights, action: Tensor) -> Tensor:
    """The action as its layer reads it: that of a block GRU clips it."""
    return clip_action(action) if isinstance(w, BlockGRUWeights) else action


def embed_action(w: CellWeights, action: Tensor, options: Options) -> Tensor:
    """All of a step that depends on the action alone, as its layer reads it (`clipped`): (..., A) to (..., U)."""
    if isinstance(w, BlockGRUWeights):
        layer = F.linear(action, w.in_action, w.in_action_bias)
        return norm_act(layer, w.in_action_gain, w.in_action_shift, options)
    return F.linear(action, w.in_action, w.in_bias)


def step(w: CellWeights, deter: Tensor, stoch: Tensor, embedded_action: Tensor, options: Options) -> Tensor:
    """The next h (..., D) from h (..., D), flattened z (..., Z) and what `embed_action` returned."""
    if isinstance(w, BlockGRUWeights):
        from_deter = F.linear(deter, w.in_deter, w.in_deter_bias)
        from_stoch = F.linear(stoch, w.in_stoch, w.in_stoch_bias)
        from_deter = norm_act(from_deter, w.in_deter_gain, w.in_deter_shift, options)
        from_stoch = norm_act(from_stoch, w.in_stoch_gain, w.in_stoch_shift, options)
        inputs = torch.cat([from_deter, from_stoch, embedded_action], -1)
        mixed = block_linear(deter, w.mix_deter, None) + F.linear(inputs, w.mix_inputs, w.mix_bias)
        x = norm_act(mixed, w.mix_gain, w.mix_shift, options)
        # Gates are split inside each block, so the three gates of one block come from the same weights.
        gates = block_linear(x, w.gates, w.gates_bias).unflatten(-1, (w.gates.shape[0], 3, -1))  # (..., G, 3, D/G)
        return gru_update(deter, *(gate.flatten(-2) for gate in gates.unbind(-2)))
    x = norm_act(F.linear(stoch, w.in_stoch) + embedded_action, w.in_gain, w.in_shift, options)
    if isinstance(w, GRUWeights):
        return torch.gru_cell(x, deter, w.input_gates, w.hidden_gates, w.input_bias, w.hidden_bias)
    gates = F.linear(torch.cat([x, deter], -1), w.gates, w.gates_bias)
    gates = F.layer_norm(gates, w.gates_gain.shape, w.gates_gain, w.gates_shift, options.layer_eps)
    return gru_update(deter, *gates.chunk(3, -1))


def head(w: HeadWeights, x: Tensor, options: Options) -> Tensor:
    """The statistics (..., n) that layers end in, from what the first one reads, (..., inputs)."""
    for layer in w.layers:
        x = norm_act(F.linear(x, layer.weight, layer.bias), layer.gain, layer.shift, options)
    return F.linear(x, w.out_weight, w.out_bias)


def gru_update(deter: Tensor, reset: Tensor, candidate: Tensor, update: Tensor) -> Tensor:
    """h' = u·tanh(σ(r)·c) + (1 − u)·h with u = σ(update − 1); all (..., D)."""
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    return torch.lerp(deter, candidate, torch.sigmoid(update - 1))


def class_probabilities(logits: Tensor, unimix: float) -> Tensor:
    """(1 − unimix)·softmax(logits) + unimix / C over the last axis."""
    p = torch.softmax(logits, -1)
    return torch.lerp(p, torch.full((), 1 / p.shape[-1], dtype=p.dtype, device=p.device), unimix)


def arrival_times(noise: Tensor) -> Tensor:
    """Uniform noise as exponential times: argmin(time / p) is the Gumbel-max sample, one log cheaper."""
    return noise.log().neg_().clamp_min_(torch.finfo(noise.dtype).tiny)


def draw_class(p: Tensor, time: Tensor, gumbel: bool = False) -> Tensor:
    """The one-hot sample (..., S, C) of the class that arrives first, argmin(time / p), with a gradient: that of p, or
    with `gumbel` that of the Gumbel-softmax at temperature 1 that this very noise makes, softmax(log p − log time)."""
    index = (time / p.detach()).argmin(-1, keepdim=True)
    if gumbel:
        ratio = p / time
        p = ratio / ratio.sum(-1, keepdim=True)
    return straight_through(p, index)


def draw_latent(p: Tensor, noise: Tensor, options: Options) -> Tensor:
    """The sample of categorical latents with probabilities p (..., S, C): of `arrival_times` by `draw_class`, or where
    the cumulative probabilities pass the noise, which is the same for all classes."""
    if not options.cumulative:
        return draw_class(p, noise, options.gumbel)
    index = (noise > p.detach().cumsum(-1)).sum(-1, keepdim=True)
    return straight_through(p, index.clamp_max(p.shape[-1] - 1))


def latent_noise(noise: Tensor, categorical: bool, options: Options) -> Tensor:
    """Noise as `draw_latent` takes it."""
    return arrival_times(noise) if categorical and not options.cumulative else noise


def straight_through(p: Tensor, index: Tensor) -> Tensor:
    """The one-hot of `index` (..., S, 1) with the gradient of `p` (..., S, C)."""
    onehot = torch.zeros_like(p).scatter_(-1, index, 1.0)
    return onehot + (p - p.detach()) if p.requires_grad else onehot


def deviation(raw: Tensor, min_std: float) -> Tensor:
    """The standard deviation of a Gaussian latent from the raw output of its layer."""
    return F.softplus(raw) + min_std


POLICIES = ("categorical", "bounded_normal", "tanh_normal")


def action_moments(statistics: Tensor, dist: str, min_std: float = 0.1, max_std: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (..., A) of a normal policy, or of what a tanh squashes, from (..., 2A).

    bounded_normal: tanh(m), and a standard deviation in [min_std, max_std] (DreamerV3). tanh_normal: 5·tanh(m/5), and
    softplus(s + softplus⁻¹(5)) + 1e-4 (DreamerV1).
    """
    mean, raw = statistics.chunk(2, -1)
    if dist == "bounded_normal":
        return torch.tanh(mean), (max_std - min_std) * torch.sigmoid(raw + 2) + min_std
    return 5 * torch.tanh(mean / 5), F.softplus(raw + math.log(math.expm1(5))) + 1e-4
