"""Slots: the attention that binds each to some of the input tokens, and a transformer block among them.

The equations of `SlotAttention` are those of `phyxdream.ops.slot_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream import ops
from phyxdream.errors import ConfigError, suggest
from phyxdream.nn.layers import linear

INITIAL = ("gaussian", "learned")


class SlotAttention(nn.Module):
    """Slots that compete for the tokens of an input, as one fused op.

    Args:
        slots: number K of slots to start with; a call that brings its own may bring more or fewer.
        slot_size: size D of a slot, of queries, keys and values.
        input_size: size I of a token.
        hidden_size: width H of the MLP that follows the GRU.
        iterations: how often slots attend.
        eps: added to the attention before it is divided by its sum over the inputs.
        initial: where slots start: `gaussian`, all drawn from one learned normal distribution, so that any number of
            them may be had; or `learned`, K learned vectors.
        implicit: differentiate the last iteration alone (see `ops.slot_attention`). The initial distribution then
            learns nothing.

    The state dict has `norm_inputs`, `norm_slots`, `norm_mlp` (weight, bias), `to_q`, `to_k`, `to_v` (weight), `gru`
    (as `torch.nn.GRUCell`), `mlp.0`, `mlp.2` (weight, bias), and `initial_mean` (D,), `initial_log_std` (D,) or
    `initial_slots` (K, D).

    Raises:
        ConfigError: `initial` is unknown, or a size is not positive.

    Source: Locatello et al., "Object-Centric Learning with Slot Attention", 2020, and their code.

    >>> attention = SlotAttention(slots=3, slot_size=8, input_size=5)
    >>> slots, masks = attention(torch.randn(2, 16, 5))
    >>> slots.shape, masks.shape
    (torch.Size([2, 3, 8]), torch.Size([2, 3, 16]))
    """

    def __init__(
        self,
        slots: int = 7,
        slot_size: int = 64,
        input_size: int = 64,
        hidden_size: int = 128,
        iterations: int = 3,
        eps: float = 1e-8,
        *,
        initial: str = "gaussian",
        implicit: bool = False,
    ):
        super().__init__()
        sizes = dict(slots=slots, slot_size=slot_size, input_size=input_size, hidden_size=hidden_size)
        for name, size in {**sizes, "iterations": iterations}.items():
            if size < 1:
                raise ConfigError(f"{name}: expected at least 1, got {size}")
        if initial not in INITIAL:
            raise ConfigError(f"initial: expected one of {list(INITIAL)}, got {initial!r}{suggest(initial, INITIAL)}")
        self.slots, self.slot_size, self.iterations, self.eps = slots, slot_size, iterations, eps
        self.initial, self.implicit = initial, implicit
        self.norm_inputs, self.norm_slots, self.norm_mlp = map(nn.LayerNorm, (input_size, slot_size, slot_size))
        self.to_q = nn.Linear(slot_size, slot_size, bias=False)
        self.to_k = nn.Linear(input_size, slot_size, bias=False)
        self.to_v = nn.Linear(input_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = nn.Sequential(nn.Linear(slot_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, slot_size))
        if initial == "learned":
            self.initial_slots = nn.Parameter(torch.empty(slots, slot_size))
        else:
            self.initial_mean = nn.Parameter(torch.empty(slot_size))
            self.initial_log_std = nn.Parameter(torch.empty(slot_size))
        self._initialise()

    def _initialise(self) -> None:
        # As in the paper's code: Glorot for every matrix but the GRU's recurrent one.
        for layer in (self.to_q, self.to_k, self.to_v, self.mlp[0], self.mlp[2]):
            nn.init.xavier_uniform_(layer.weight)
        for bias in (self.mlp[0].bias, self.mlp[2].bias, self.gru.bias_ih, self.gru.bias_hh):
            nn.init.zeros_(bias)
        for gate in self.gru.weight_ih.data.chunk(3):
            nn.init.xavier_uniform_(gate)
        for gate in self.gru.weight_hh.data.chunk(3):
            gate.copy_(nn.init.orthogonal_(gate.float()))  # torch factors no half precision
        if self.initial == "learned":
            nn.init.normal_(self.initial_slots)
        else:
            for x in (self.initial_mean, self.initial_log_std):
                nn.init.xavier_uniform_(x.data.unsqueeze(0))

    @property
    def weights(self) -> ops.SlotAttentionWeights:
        """The parameters as the op takes them."""
        gru = self.gru
        return ops.SlotAttentionWeights(
            self.norm_inputs.weight, self.norm_inputs.bias, self.to_k.weight, self.to_v.weight,
            self.norm_slots.weight, self.norm_slots.bias, self.to_q.weight,
            gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh,
            self.norm_mlp.weight, self.norm_mlp.bias,
            self.mlp[0].weight, self.mlp[0].bias, self.mlp[2].weight, self.mlp[2].bias,
        )  # fmt: skip

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise (batch, K, D) for `initial_state`."""
        like = self.to_q.weight
        shape = batch, self.slots, self.slot_size
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    def initial_state(
        self, batch: int, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Slots (B, K, D) to start with: mean + std · noise, or the learned ones.

        Args:
            batch: B.
            noise: (B, K, D) standard normal, for `gaussian`; drawn when None. Its K may differ from `slots`.
            generator: draws the noise.

        Raises:
            ValueError: the noise is not (B, K, D), or the learned slots are asked for with noise.
        """
        if self.initial == "learned":
            if noise is not None:
                raise ValueError("noise: expected None, since slots start where they are learned to, got a tensor")
            return self.initial_slots.expand(batch, -1, -1)
        if noise is None:
            noise = self.draw_noise(batch, generator)
        if noise.dim() != 3 or (noise.shape[0], noise.shape[2]) != (batch, self.slot_size):
            raise ValueError(f"noise: expected shape ({batch}, K, {self.slot_size}), got {tuple(noise.shape)}")
        return self.initial_mean + self.initial_log_std.exp() * noise

    def forward(
        self,
        inputs: Tensor,
        slots: Tensor | None = None,
        *,
        slot_mask: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        iterations: int | None = None,
        return_attention: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Slots after all iterations, and what each attends to.

        Args:
            inputs: (B, N, I) tokens.
            slots: (B, K, D) where the iterations start, such as the slots of the frame before; None is
                `initial_state`.
            slot_mask: (B, K) bool, true where there is a slot.
            noise: (B, K, D) for `initial_state`.
            generator: draws the noise.
            iterations: another number than the module's, for this call.
            return_attention: without it, nothing of size N·K is written.

        Returns:
            slots (B, K, D); attention (B, K, N), which sums to 1 over slots, or None.

        Raises:
            TypeError, ValueError: as `ops.slot_attention`; or noise is given beside slots.
        """
        if slots is None:
            if not isinstance(inputs, Tensor) or inputs.dim() != 3:
                got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
                raise ValueError(f"inputs: expected a tensor (B, N, I), got {got}")
            slots = self.initial_state(inputs.shape[0], noise, generator)
        elif noise is not None:
            raise ValueError("noise: expected None beside slots, which start without it, got a tensor")
        return ops.slot_attention(
            inputs,
            slots,
            self.weights,
            iterations=self.iterations if iterations is None else iterations,
            eps=self.eps,
            layer_eps=self.norm_inputs.eps,
            slot_mask=slot_mask,
            implicit=self.implicit,
            return_attention=return_attention,
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"slots={self.slots}, iterations={self.iterations}, eps={self.eps}, initial={self.initial!r}"


class SlotTransformer(nn.Module):
    """One transformer block over slots (..., K, D), with norms before its parts. Permuting slots permutes the result.

    Args:
        size: D.
        heads: heads of the self-attention; must divide `size`.
        hidden_size: width of the MLP.

    Raises:
        ConfigError: `heads` does not divide `size`.

    Source: the predictor of Kipf et al. 2022.

    >>> SlotTransformer(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, size: int, heads: int = 4, hidden_size: int = 128):
        super().__init__()
        if heads < 1 or size % heads:
            raise ConfigError(f"heads: expected a number that divides {size}, got {heads}")
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = linear(size, 3 * size), linear(size, size)
        self.mlp = nn.Sequential(linear(size, hidden_size), nn.ReLU(), linear(hidden_size, size))

    def forward(self, slots: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(slots)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.movedim(-4, -2).unbind(-4)  # each (..., heads, K, D / heads)
        slots = slots + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return slots + self.mlp(self.norm_mlp(slots))
