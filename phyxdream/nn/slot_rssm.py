"""A recurrent state-space model for each slot, with shared weights, whose slots tell each other what they know.

    m_t^k = message(h_{t-1}^{1..K}, z_{t-1}^{1..K})^k           self-attention over slots
    h_t^k = cell(h_{t-1}^k, z_{t-1}^k, [a_t, m_t^k])            prior and posterior as in `phyxdream.nn.rssm`

Messages enter the cell beside the action, before prior and posterior: both depend on what the other slots did. They are
made of states that a fused scan keeps inside, so every step is a call of the fused op of its own: T calls instead of
one, the posterior's product with the embedding made T times instead of once. Without messages slots are entries of a
batch, and the scan is one call.

Source: the design of an RSSM for each slot with attention before the prior is Midren/rl_sandbox's; that messages are an
input of the cell, so that the cells' own fused ops serve, is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from phyxdream.errors import ConfigError
from phyxdream.nn.layers import linear
from phyxdream.nn.rssm import RSSM, State, Trajectory
from phyxdream.nn.slots import SlotTransformer


class SlotRSSM(nn.Module):
    """`RSSM` over slots: every tensor of a state has the slots after the batch, (T, B, K, ...).

    Args:
        slots: K.
        embed_size: size E of what is known of a slot.
        action_size: A.
        message_size: size of a message; 0 for slots that know nothing of each other, in one fused scan.
        heads: of the self-attention; must divide `message_size`.
        **rssm: further arguments of `RSSM`.

    Permuting the slots of `embed`, `state` and `noise` permutes the result.

    Raises:
        ConfigError: a size is out of range.

    >>> rssm = SlotRSSM(3, embed_size=8, action_size=2, message_size=8, deter_size=16, stoch_size=4, classes=4)
    >>> is_first = torch.zeros(5, 2, dtype=torch.bool)
    >>> post, prior = rssm.observe(torch.zeros(5, 2, 3, 8), torch.zeros(5, 2, 2), is_first)
    >>> post.feature.shape
    torch.Size([5, 2, 3, 32])
    """

    def __init__(
        self, slots: int, embed_size: int, action_size: int, message_size: int = 64, heads: int = 4, **rssm: Any
    ):
        super().__init__()
        for name, value, low in (("slots", slots, 1), ("message_size", message_size, 0)):
            if value < low:
                raise ConfigError(f"{name}: expected at least {low}, got {value}")
        self.slots, self.embed_size, self.action_size = slots, embed_size, action_size
        self.each = RSSM(embed_size, action_size + message_size, **rssm)
        self.feature_size = self.each.feature_size
        self.message = None
        if message_size:
            # Bounded, as actions are.
            self.message = nn.Sequential(linear(self.feature_size, message_size),
                                         SlotTransformer(message_size, heads, 2 * message_size), nn.Tanh())  # fmt: skip

    def initial(self, batch: int) -> State:
        """The state (B, K, ...) before the first observation."""
        return self._apart(self.each.initial(batch * self.slots))

    def draw_noise(self, *leading: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise for `leading` steps of all slots: (..., K, S, C) uniform, or (..., K, S) standard normal."""
        return self.each.draw_noise(*leading, self.slots, generator=generator)

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        state: State | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[State, State]:
        """`RSSM.observe`: embed (T, B, K, E), action (T, B, A), is_first (T, B); posterior and prior (T, B, K, ...)."""
        post = self.filter(embed, action, is_first, state, noise, generator)
        return post, self.prior_at(post)

    def prior_at(self, post: State) -> State:
        """`RSSM.prior_at`."""
        return self.each.prior_at(post)

    def filter(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        state: State | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> State:
        """`observe` without the priors: the posterior states (T, B, K, ...)."""
        self.each._check(embed, "embed", (None, None, self.slots, self.embed_size))
        T, B = embed.shape[:2]
        self.each._check(action, "action", (T, B, self.action_size))
        self.each._check(is_first, "is_first", (T, B))
        embed, is_first = embed.flatten(1, 2), self._for_each(is_first.unsqueeze(-1)).squeeze(-1)
        noise = self._noise(noise, T, B, generator)
        if self.message is None:
            start = None if state is None else self._joined(state)
            return self._apart(self.each.filter(embed, self._for_each(action), is_first, start, noise))
        state, states = self.initial(B) if state is None else state, []
        for t in range(T):
            led = self._led(action[t], state)
            now = slice(t, t + 1)
            state = self._apart(self.each.filter(embed[now], led, is_first[now], self._joined(state), noise[now]))[0]
            states.append(state)
        return State.stack(states)

    def imagine(
        self,
        action: Tensor,
        state: State,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> State:
        """Open loop: the prior states (H, B, K, ...) that follow `state` (B, K, ...) under `action` (H, B, A)."""
        H, B = action.shape[0], state.deter.shape[0]
        self.each._check(action, "action", (None, B, self.action_size))
        noise = self._noise(noise, H, B, generator)
        if self.message is None:
            return self._apart(self.each.imagine(self._for_each(action), self._joined(state), noise))
        states = []
        for t in range(H):
            state = self._step(action[t], state, noise[t : t + 1])
            states.append(state)
        return State.stack(states)

    def imagine_policy(
        self,
        policy: Callable[[Tensor], Any],
        state: State,
        horizon: int,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Trajectory:
        """Closed loop: `horizon` steps from `state` (B, K, ...) under a policy, which maps features (B, K, F) to
        actions (B, A), or to a distribution of them that is sampled with `generator`."""
        if horizon < 1:
            raise ValueError(f"horizon: expected at least 1 step, got {horizon}")
        noise = self._noise(noise, horizon, state.deter.shape[0], generator)
        states, actions = [replace(state, slots=None)], []
        for t in range(horizon):
            action = policy(states[-1].feature)
            actions.append(action if isinstance(action, Tensor) else action.sample(generator))
            states.append(self._step(actions[-1], states[-1], noise[t : t + 1]))
        return Trajectory(State.stack(states), torch.stack(actions))

    # -----------------------------------------------------------------------------------------------------------------

    def _step(self, action: Tensor, state: State, noise: Tensor) -> State:
        return self._apart(self.each.imagine(self._led(action, state), self._joined(state), noise))[0]

    def _led(self, action: Tensor, state: State) -> Tensor:
        """What leads every slot to its next state, the action (B, A) and its message: (1, B·K, A + M)."""
        action = self._for_each(action)
        if self.message is not None:
            action = torch.cat([action, self.message(state.feature).flatten(0, 1)], -1)
        return action.unsqueeze(0)

    def _for_each(self, x: Tensor) -> Tensor:
        """(..., B, N) for every slot: (..., B·K, N)."""
        return x.repeat_interleave(self.slots, -2)

    def _noise(self, noise: Tensor | None, T: int, B: int, generator: torch.Generator | None) -> Tensor:
        """(T, B·K, ...)"""
        if noise is None:
            noise = self.draw_noise(T, B, generator=generator)
        classes = (self.each.classes,) if self.each.classes else ()
        self.each._check(noise, "noise", (T, B, self.slots, self.each.stoch_size, *classes))
        return noise.flatten(1, 2)

    def _joined(self, state: State) -> State:
        """(B, K, ...) as a batch, (B·K, ...)."""
        self.each._check(state.deter, "state.deter", (None, self.slots, self.each.deter_size))
        return replace(state, slots=None).map(lambda x: x.flatten(0, 1))

    def _apart(self, state: State) -> State:
        """(..., B·K, D) as (..., B, K, D)."""
        batch = state.deter.dim() - 2
        return state.map(lambda x: x.unflatten(batch, (-1, self.slots)))
