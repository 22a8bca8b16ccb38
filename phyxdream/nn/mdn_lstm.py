"""The memory of World Models: an LSTM that expects the next latent as mixtures of normals.

    h_t, c_t = LSTM([z_{t-1}, a_t], h_{t-1}, c_{t-1})       a_t is the action that led to the observation of z_t
    p(z_t | h_t) = Π_s Σ_k π_sk(h_t) N(z_ts; μ_sk(h_t), σ_sk(h_t)²)

Source: Ha & Schmidhuber, "World Models", 2018; ctallec/world-models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream.nn.distributions import GaussianMixture
from phyxdream.nn.layers import linear
from phyxdream.nn.rssm import State


class MDNLSTM(nn.Module):
    """LSTM with a mixture density head. A `State` has both h and c in its deter, (..., 2H), and z in its stoch.

    Args:
        stoch_size: size S of z.
        action_size: size A of the action (one-hot for discrete actions).
        deter_size: size H of h, and of c.
        mixtures: normals K for each dimension of z.

    >>> memory = MDNLSTM(stoch_size=4, action_size=2, deter_size=8)
    >>> z, action, is_first = torch.zeros(5, 3, 4), torch.zeros(5, 3, 2), torch.zeros(5, 3, dtype=torch.bool)
    >>> state = memory.filter(z, action, is_first)
    >>> state.deter.shape, memory.expect(memory.hidden(state.deter)).log_prob(z).shape
    (torch.Size([5, 3, 16]), torch.Size([5, 3]))
    """

    def __init__(self, stoch_size: int, action_size: int, deter_size: int = 256, mixtures: int = 5):
        super().__init__()
        self.stoch_size, self.deter_size, self.mixtures = stoch_size, deter_size, mixtures
        self.feature_size = 2 * deter_size + stoch_size
        self.lstm = nn.LSTM(stoch_size + action_size, deter_size)
        self.mixture = linear(deter_size, 3 * mixtures * stoch_size)

    def hidden(self, deter: Tensor) -> Tensor:
        """h (..., H) of [h, c] (..., 2H)."""
        return deter[..., : self.deter_size]

    def expect(self, hidden: Tensor) -> GaussianMixture:
        """What z (..., S) will be at h (..., H)."""
        return GaussianMixture(*self.mixture(hidden).unflatten(-1, (3, self.stoch_size, self.mixtures)).unbind(-3))

    def initial(self, batch: int) -> State:
        """The state (B, ...) before the first observation: zeros."""
        like = self.mixture.weight
        return State(like.new_zeros(batch, 2 * self.deter_size), like.new_zeros(batch, self.stoch_size))

    def draw_noise(self, *leading: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Noise for `leading` steps: uniform and standard normal, each (..., S)."""
        like = self.mixture.weight
        uniform, normal = (
            draw((*leading, self.stoch_size), generator=generator, device=like.device, dtype=like.dtype)
            for draw in (torch.rand, torch.randn)
        )
        return uniform, normal

    def filter(self, z: Tensor, action: Tensor, is_first: Tensor, state: State | None = None) -> State:
        """Remember a sequence: states (T, B, ...), with gradients through h.

        Args:
            z: (T, B, S) latents of the observations.
            action: (T, B, A); `action[t]` led to observation t.
            is_first: (T, B) bool; where true the state and the action are reset before the step.
            state: state (B, ...) before the first step; None is the initial state.
        """
        state = state or self.initial(z.shape[1])
        goes_on = (~is_first).to(z.dtype).unsqueeze(-1)
        inputs = torch.cat([torch.cat([state.stoch[None], z[:-1]]), action], -1) * goes_on
        h, c = (x * goes_on[0] for x in state.deter.chunk(2, -1))
        hidden = self._scan(inputs, is_first, h, c)
        return State(torch.cat([hidden, self._cells(inputs, goes_on, hidden.detach(), h, c)], -1), z)

    def _scan(self, inputs: Tensor, is_first: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """h (T, B, H) after every step, in one call of the LSTM, which knows no resets: what lies between two of them
        gets a column of its own, padded to the length of the longest."""
        T, B = is_first.shape
        begins = is_first.clone()
        begins[0] = True
        begins = begins.T.flatten()  # sequence after sequence
        column, step = begins.cumsum(0) - 1, torch.arange(B * T, device=begins.device)
        row = step - step[begins][column]
        columns, rows = int(column[-1]) + 1, int(row.max()) + 1
        padded = inputs.new_zeros(rows, columns, inputs.shape[-1])
        padded[row, column] = inputs.transpose(0, 1).flatten(0, 1)
        start = column.view(B, T)[:, 0]
        h, c = (x.new_zeros(1, columns, self.deter_size).index_copy(1, start, x[None]) for x in (h, c))
        hidden = self.lstm(padded, (h, c))[0].flatten(0, 1).index_select(0, row * columns + column)
        return hidden.view(B, T, -1).transpose(0, 1)

    @torch.no_grad()
    def _cells(self, inputs: Tensor, goes_on: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """c (T, B, H) after every step, of which the LSTM returns the last alone. With h known, all gates are one
        matrix product."""
        w = self.lstm
        before = torch.cat([h[None], hidden[:-1] * goes_on[1:]])
        gates = F.linear(inputs, w.weight_ih_l0, w.bias_ih_l0) + F.linear(before, w.weight_hh_l0, w.bias_hh_l0)
        enter, forget, new, _ = gates.chunk(4, -1)
        new, forget = torch.sigmoid(enter) * torch.tanh(new), torch.sigmoid(forget) * goes_on
        cells = []
        for f, x in zip(forget, new, strict=True):
            c = torch.addcmul(x, f, c)
            cells.append(c)
        return torch.stack(cells)

    def step(self, state: State, action: Tensor, noise: tuple[Tensor, Tensor], temperature: float = 1.0) -> State:
        """The state (B, ...) that is expected after an action (B, A), with z drawn by `noise`, each (B, S)."""
        w = self.lstm
        inputs = torch.cat([state.stoch, action], -1)
        weights = w.weight_ih_l0, w.weight_hh_l0, w.bias_ih_l0, w.bias_hh_l0
        h, c = torch.lstm_cell(inputs, state.deter.chunk(2, -1), *weights)
        return State(torch.cat([h, c], -1), self.expect(h).draw(*noise, temperature))

    def imagine(
        self,
        action: Tensor,
        state: State,
        noise: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> State:
        """States (H, B, ...) that follow `state` (B, ...) under actions (H, B, A).

        noise: what `draw_noise(H, B)` returns; None draws it from `generator`.
        """
        uniform, normal = noise or self.draw_noise(*action.shape[:2], generator=generator)
        states = []
        for a, *luck in zip(action, uniform, normal, strict=True):
            state = self.step(state, a, tuple(luck), temperature)
            states.append(state)
        return State.stack(states)
