"""The recurrent state-space model: deterministic state h (deter), stochastic state z (stoch), prior and posterior.

    h_t      = cell(h_{t-1}, z_{t-1}, a_t)          a_t is the action that led to the observation o_t
    prior    : z_t ~ p(z | h_t)
    posterior: z_t ~ q(z | h_t, e_t)                e_t = encoder(o_t)

Sources: PlaNet (Hafner et al. 2019) and DreamerV1 for `gru` with Gaussian latents, DreamerV2 for `layernorm_gru` with
categorical latents, DreamerV3 (2024 code) for `block_gru`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.errors import ConfigError, suggest
from phyxdream.nn.layers import (
    LAYER_EPS,
    MLP,
    RMS_EPS,
    BlockLinear,
    Dense,
    affine,
    head_weights,
    linear,
    norm,
    norm_act,
)
from phyxdream.ops import rssm_cells

if TYPE_CHECKING:
    from phyxdream.nn.heads import Actor


@dataclass
class State:
    """A model state, or a sequence of them: every tensor shares the leading axes, (B, ...) or (T, B, ...).

    deter (..., D); stoch (..., S, C) categorical or (..., S) Gaussian; logits (..., S, C) are the raw outputs before
    unimix, or mean and std (..., S). With an RSSM for each slot, K stands before all of their sizes. `slots`
    (..., K, D) is what a slot encoder hands on to the next frame; no RSSM reads it.
    """

    deter: Tensor
    stoch: Tensor
    logits: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    slots: Tensor | None = None

    @property
    def feature(self) -> Tensor:
        """(..., F): deter and flattened stoch, what every head reads; (..., K, F) with an RSSM for each slot."""
        return torch.cat([self.deter, self.stoch.reshape(*self.deter.shape[:-1], -1)], -1)

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """The state with `f` applied to each tensor."""
        tensors = {k.name: getattr(self, k.name) for k in fields(self)}
        return State(**{k: None if v is None else f(v) for k, v in tensors.items()})

    def __getitem__(self, index) -> State:
        return self.map(lambda x: x[index])

    def detach(self) -> State:
        """The same values, cut from the graph."""
        return self.map(torch.Tensor.detach)

    def flatten(self) -> State:
        """(T, B, ...) to (T·B, ...): every posterior state becomes a start for imagination."""
        return self.map(lambda x: x.flatten(0, 1))

    @staticmethod
    def stack(states: list[State]) -> State:
        """T states (B, ...) become one (T, B, ...)."""
        columns = {f.name: [getattr(s, f.name) for s in states] for f in fields(State)}
        return State(**{k: None if v[0] is None else torch.stack(v) for k, v in columns.items()})

    @staticmethod
    def cat(states: list[State]) -> State:
        """Join sequences along time."""
        columns = {f.name: [getattr(s, f.name) for s in states] for f in fields(State)}
        return State(**{k: None if v[0] is None else torch.cat(v) for k, v in columns.items()})


@dataclass
class Trajectory:
    """What imagination returns: `state` (H+1, B, ...) with the start first, `action` (H, B, A) between the states."""

    state: State
    action: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Cells: parameters under the names of the state dict. Their equations are those of `phyxdream.ops.rssm_cells`.


class Cell(nn.Module):
    """What all cells share. `embed_action` is all that does not depend on the recurrent state, so a scan calls it once
    for all T."""

    options: rssm_cells.Options

    def weights(self) -> rssm_cells.CellWeights:
        """The parameters as the ops take them."""
        raise NotImplementedError

    def embed_action(self, action: Tensor) -> Tensor:
        weights = self.weights()
        return rssm_cells.embed_action(weights, rssm_cells.clipped(weights, action), self.options)

    def forward(self, deter: Tensor, stoch: Tensor, embedded_action: Tensor) -> Tensor:
        return rssm_cells.step(self.weights(), deter, stoch, embedded_action, self.options)


class GRU(Cell):
    """x = act(W [z, a]); h' = GRUCell(x, h) (PlaNet, DreamerV1)."""

    def __init__(self, deter: int, stoch: int, action: int, hidden: int, blocks: int, act: str, norm_: str):
        super().__init__()
        self.in_stoch, self.in_action = _split_linear(stoch, action, hidden, bias=True)
        self.norm, _ = norm_act(norm_, hidden, act)
        self.gru = nn.GRUCell(hidden, deter)

    def weights(self) -> rssm_cells.GRUWeights:
        gru = self.gru
        return rssm_cells.GRUWeights(
            self.in_stoch.weight, self.in_action.weight, self.in_action.bias, *affine(self.norm),
            gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh,
        )  # fmt: skip


class LayerNormGRU(Cell):
    """x = act(norm(W [z, a])); [r, c, u] = LN(W [x, h]); h' = u·tanh(r·c) + (1−u)·h, u biased by −1 (DreamerV2)."""

    def __init__(self, deter: int, stoch: int, action: int, hidden: int, blocks: int, act: str, norm_: str):
        super().__init__()
        self.in_stoch, self.in_action = _split_linear(stoch, action, hidden, bias=norm_ != "layer")
        self.norm, _ = norm_act(norm_, hidden, act)
        self.gates = linear(hidden + deter, 3 * deter, bias=False)
        self.gates_norm = norm("layer", 3 * deter)

    def weights(self) -> rssm_cells.LayerNormGRUWeights:
        return rssm_cells.LayerNormGRUWeights(
            self.in_stoch.weight, self.in_action.weight, self.in_action.bias, *affine(self.norm),
            self.gates.weight, *affine(self.gates_norm),
        )  # fmt: skip


class BlockGRU(Cell):
    """Dense blocks on h, z and a; then per block [h_b, x] → hidden → gates, all block-diagonal (current DreamerV3).

    The first block layer is written as a block-diagonal map of h plus a full map of the shared inputs x: the same
    weights, without repeating x for every block.
    """

    def __init__(self, deter: int, stoch: int, action: int, hidden: int, blocks: int, act: str, norm_: str):
        super().__init__()
        self.in_deter = Dense(deter, hidden, act, norm_)
        self.in_stoch = Dense(stoch, hidden, act, norm_)
        self.in_action = Dense(action, hidden, act, norm_)
        fan_in = deter + blocks * 3 * hidden  # of the one block-diagonal map these two are
        self.mix_deter = BlockLinear(deter, deter, blocks, bias=False, fan_in=fan_in)
        self.mix_inputs = linear(3 * hidden, deter, scale=(3 * hidden / fan_in) ** 0.5)
        self.norm, _ = norm_act(norm_, deter, act)
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def weights(self) -> rssm_cells.BlockGRUWeights:
        inputs = (self.in_deter, self.in_stoch, self.in_action)
        return rssm_cells.BlockGRUWeights(
            *(x for dense in inputs for x in (dense[0].weight, dense[0].bias, *affine(dense[1]))),
            self.mix_deter.weight, self.mix_inputs.weight, self.mix_inputs.bias, *affine(self.norm),
            self.gates.weight, self.gates.bias,
        )  # fmt: skip


def _split_linear(stoch: int, action: int, hidden: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """W [z, a] as two maps, so that the action's half can leave the loop; initialised as the one map they are."""
    total = stoch + action
    return (
        linear(stoch, hidden, bias=False, scale=(stoch / total) ** 0.5),
        linear(action, hidden, bias=bias, scale=(action / total) ** 0.5),
    )


@dataclass(frozen=True)
class _CellDefaults:
    module: type[nn.Module]
    act: str
    norm: str
    prior_layers: int


CELLS = {
    "gru": _CellDefaults(GRU, "elu", "none", 1),
    "layernorm_gru": _CellDefaults(LayerNormGRU, "silu", "layer", 1),
    "block_gru": _CellDefaults(BlockGRU, "silu", "rms", 2),
}


class RSSM(nn.Module):
    """Recurrent state-space model with three cells and two kinds of latents.

    Args:
        embed_size: size E of the encoder's embedding.
        action_size: size A of the action (one-hot for discrete actions).
        deter_size: size D of the deterministic state.
        stoch_size: number S of stochastic variables.
        classes: classes C per categorical variable; 0 makes the latents Gaussian.
        hidden_size: width U of the layers around the state.
        cell: `gru` (PlaNet, V1), `layernorm_gru` (V2, early V3) or `block_gru` (V3).
        blocks: block-diagonal blocks of `block_gru`; must divide `deter_size`.
        unimix: share of the uniform distribution mixed into categorical latents, in [0, 1).
        initial: `zeros`, or `learned`: h = tanh(w), z = mode of the prior at h (early V3).
        act, norm, prior_layers: None takes the cell's own (see `CELLS`).
        min_std: smallest standard deviation of Gaussian latents.

    Raises:
        ConfigError: for an unknown cell, initial, act or norm, or a size out of range.

    >>> rssm = RSSM(embed_size=8, action_size=2, deter_size=16, stoch_size=4, classes=4, hidden_size=16)
    >>> post, prior = rssm.observe(torch.zeros(5, 3, 8), torch.zeros(5, 3, 2), torch.zeros(5, 3, dtype=torch.bool))
    >>> post.feature.shape
    torch.Size([5, 3, 32])
    """

    def __init__(
        self,
        embed_size: int,
        action_size: int,
        deter_size: int = 512,
        stoch_size: int = 32,
        classes: int = 32,
        hidden_size: int = 512,
        cell: str = "layernorm_gru",
        blocks: int = 8,
        unimix: float = 0.01,
        initial: str = "zeros",
        act: str | None = None,
        norm: str | None = None,
        prior_layers: int | None = None,
        min_std: float = 0.1,
    ):
        super().__init__()
        if cell not in CELLS:
            raise ConfigError(f"cell: expected one of {sorted(CELLS)}, got {cell!r}{suggest(cell, CELLS)}")
        if initial not in ("zeros", "learned"):
            raise ConfigError(f"initial: expected 'zeros' or 'learned', got {initial!r}")
        if not 0 <= unimix < 1:
            raise ConfigError(f"unimix: expected a number in [0, 1), got {unimix}")
        sizes = dict(
            embed_size=embed_size,
            action_size=action_size,
            deter_size=deter_size,
            stoch_size=stoch_size,
            hidden_size=hidden_size,
        )
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name}: expected a positive integer, got {size}")
        if classes < 0 or classes == 1:
            raise ConfigError(f"classes: expected 0 (Gaussian latents) or at least 2, got {classes}")
        self.embed_size, self.action_size, self.deter_size = embed_size, action_size, deter_size
        self.stoch_size, self.classes, self.unimix, self.min_std = stoch_size, classes, unimix, min_std
        default = CELLS[cell]
        act, norm = act or default.act, norm or default.norm
        flat = stoch_size * (classes or 1)
        statistics = stoch_size * (classes or 2)
        self.feature_size = deter_size + flat
        self.cell = default.module(deter_size, flat, action_size, hidden_size, blocks, act, norm)
        self.cell.options = rssm_cells.Options(act, unimix, min_std, RMS_EPS, LAYER_EPS)
        self.prior = nn.Sequential(
            MLP(deter_size, hidden_size, prior_layers or default.prior_layers, act, norm),
            linear(hidden_size, statistics),
        )
        self.posterior_in = Dense(deter_size + embed_size, hidden_size, act, norm)
        self.posterior_out = linear(hidden_size, statistics)
        self.initial_deter = nn.Parameter(torch.zeros(deter_size)) if initial == "learned" else None

    # -----------------------------------------------------------------------------------------------------------------
    # One step, and what it is made of.

    def initial(self, batch: int) -> State:
        """The state (B, ...) before the first observation; its statistics are those of the prior there."""
        like = self.posterior_out.weight
        if self.initial_deter is None:
            stoch = (self.stoch_size, self.classes) if self.classes else (self.stoch_size,)
            zeros = State(like.new_zeros(batch, self.deter_size), like.new_zeros(batch, *stoch))
            if self.classes:
                return replace(zeros, logits=torch.zeros_like(zeros.stoch))
            return replace(zeros, mean=torch.zeros_like(zeros.stoch), std=torch.ones_like(zeros.stoch))
        deter = torch.tanh(self.initial_deter).expand(batch, -1)
        return self._mode(deter, self.prior(deter))

    def draw_noise(self, *leading: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise for `leading` steps: uniform (..., S, C) for categorical latents, standard normal (..., S) else."""
        like = self.posterior_out.weight
        if self.classes:
            shape = (*leading, self.stoch_size, self.classes)
            return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
        return torch.randn((*leading, self.stoch_size), generator=generator, device=like.device, dtype=like.dtype)

    def probs(self, logits: Tensor) -> Tensor:
        """Class probabilities (..., S, C): (1 − unimix)·softmax(logits) + unimix / C."""
        return rssm_cells.class_probabilities(logits, self.unimix)

    def _race(self, noise: Tensor) -> Tensor:
        return rssm_cells.arrival_times(noise) if self.classes else noise

    def _distribution(self, statistics: Tensor) -> dict[str, Tensor]:
        """The fields of a `State` that describe its distribution, from raw outputs (..., S·C) or (..., 2S)."""
        if self.classes:
            return dict(logits=statistics.unflatten(-1, (self.stoch_size, self.classes)))
        mean, raw = statistics.chunk(2, -1)
        return dict(mean=mean, std=rssm_cells.deviation(raw, self.min_std))

    def _sample(self, deter: Tensor, statistics: Tensor, race: Tensor) -> State:
        """The state at `deter` with z drawn from its distribution, reparameterised by the noise."""
        distribution = self._distribution(statistics)
        if self.classes:
            p = self.probs(distribution["logits"])
            stoch = rssm_cells.draw_class(p, race)
        else:
            stoch = distribution["mean"] + distribution["std"] * race
        return State(deter, stoch, **distribution)

    def _mode(self, deter: Tensor, statistics: Tensor) -> State:
        distribution = self._distribution(statistics)
        if self.classes:
            p = self.probs(distribution["logits"])
            stoch = rssm_cells.straight_through(p, p.argmax(-1, keepdim=True))
        else:
            stoch = distribution["mean"]
        return State(deter, stoch, **distribution)

    # -----------------------------------------------------------------------------------------------------------------
    # Scans.

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        state: State | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[State, State]:
        """Filter a sequence: posterior and prior states for every step.

        Args:
            embed: (T, B, E) embeddings of the observations.
            action: (T, B, A); `action[t]` led to observation t.
            is_first: (T, B) bool; where true the state and the action are reset before the step.
            state: state (B, ...) before the first step; None is the initial state.
            noise: what `draw_noise(T, B)` returns; None draws it from `generator`.

        Returns:
            (post, prior), each a `State` of (T, B, ...). `prior` carries the prior's own statistics and, as its
            stoch, the posterior sample that the model went on with.

        Raises:
            ValueError: for a shape that does not fit, TypeError for what is no tensor, naming the argument.
        """
        post = self.filter(embed, action, is_first, state, noise, generator)
        return post, self.prior_at(post)

    def prior_at(self, post: State) -> State:
        """What was expected at posterior states: the prior's statistics there, beside the posterior's sample."""
        return State(post.deter, post.stoch, **self._distribution(self.prior(post.deter)))

    def sample_prior(
        self, deter: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> State:
        """The prior at states `deter` (T, B, D), and a sample of it."""
        noise = self._noise(noise, *deter.shape[:2], generator)
        return self._sample(deter, self.prior(deter), self._race(noise))

    def filter(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        state: State | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> State:
        """`observe` without the priors, which acting does not need: the posterior states (T, B, ...)."""
        self._check(embed, "embed", (None, None, self.embed_size))
        T, B = embed.shape[:2]
        self._check(action, "action", (T, B, self.action_size))
        self._check(is_first, "is_first", (T, B))
        if state is not None:
            self._check_state(state, B)
        noise = self._noise(noise, T, B, generator)
        reset = {}
        if self.initial_deter is not None:  # else zeros, as without it
            start = self.initial(1)[0]
            reset = dict(initial_deter=start.deter, initial_stoch=start.stoch)
        if state is None:
            state = self.initial(B)
        layer, norm_, _ = self.posterior_in
        posterior = rssm_cells.PosteriorWeights(
            layer.weight, layer.bias, *affine(norm_), self.posterior_out.weight, self.posterior_out.bias
        )
        return self._state(
            *ops.rssm_observe(
                embed, action, is_first.bool(), state.deter, state.stoch, noise, self.cell.weights(), posterior,
                **reset, **self.cell.options.keywords,
            )
        )  # fmt: skip

    def imagine(
        self,
        action: Tensor,
        state: State,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> State:
        """Open loop: the prior states (H, B, ...) that follow `state` (B, ...) under `action` (H, B, A)."""
        self._check_state(state, None)
        self._check(action, "action", (None, state.deter.shape[0], self.action_size))
        noise = self._noise(noise, *action.shape[:2], generator)
        return self._state(
            *ops.rssm_imagine(
                action, state.deter, state.stoch, noise, self.cell.weights(), head_weights(*self.prior),
                **self.cell.options.keywords,
            )
        )  # fmt: skip

    def imagine_policy(
        self,
        policy: Actor | Callable[[Tensor], Tensor],
        state: State,
        horizon: int,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        detach_feature: bool = False,
        clip_action: bool = False,
    ) -> Trajectory:
        """Closed loop: `horizon` steps from `state` (B, ...) under a policy.

        Args:
            policy: an `nn.Actor`, whose actions are sampled inside one fused op, or anything that maps features (B, F)
                to actions (B, A), called once a step.
            state: state (B, ...) that the first action is taken in.
            horizon: number H of steps.
            noise: what `draw_noise(H, B)` returns; None draws it from `generator`.
            generator: also of an actor's noise, `Actor.draw_noise(H, B)`, drawn after that of the states.
            detach_feature: the policy reads the states as constants, as DreamerV1 and V2 have it; gradients pass
                through its actions alone.
            clip_action: the cell reads a / max(1, |a|), as `BlockGRU` does anyway; see `ops.rssm_imagine_policy`.

        Raises:
            ValueError: for a shape that does not fit or no steps, TypeError for what is no tensor.
        """
        from phyxdream.nn.heads import Actor  # it is made of distributions over states

        if horizon < 1:
            raise ValueError(f"horizon: expected at least 1 step, got {horizon}")
        self._check_state(state, None)
        B = state.deter.shape[0]
        noise = self._noise(noise, horizon, B, generator)
        if type(policy) is Actor:
            *future, action = ops.rssm_imagine_policy(
                policy.draw_noise(horizon, B, generator=generator), state.deter, state.stoch, noise,
                self.cell.weights(), head_weights(*self.prior), head_weights(policy.mlp, policy.out),
                dist=policy.dist, **self.cell.options.keywords, policy_act=policy.act, policy_unimix=policy.unimix,
                policy_min_std=policy.min_std, policy_max_std=policy.max_std, detach_feature=detach_feature,
                clip_action=clip_action,
            )  # fmt: skip
            start = replace(state, slots=None).map(lambda x: x.unsqueeze(0))
            return Trajectory(State.cat([start, self._state(*future)]), action)
        states, actions = [replace(state, slots=None)], []
        for t in range(horizon):
            feature = states[-1].feature
            actions.append(policy(feature.detach() if detach_feature else feature))
            self._check(actions[-1], "action", (B, self.action_size))
            taken = rssm_cells.clip_action(actions[-1]) if clip_action else actions[-1]
            deter = self.cell(states[-1].deter, states[-1].stoch.flatten(1), self.cell.embed_action(taken))
            states.append(self._sample(deter, self.prior(deter), self._race(noise[t])))
        return Trajectory(State.stack(states), torch.stack(actions))

    def _state(self, deter: Tensor, stoch: Tensor, *distribution: Tensor) -> State:
        """What a scan returned."""
        names = ("logits",) if self.classes else ("mean", "std")
        return State(deter, stoch, **dict(zip(names, distribution, strict=True)))

    def _noise(self, noise: Tensor | None, T: int, B: int, generator: torch.Generator | None) -> Tensor:
        if noise is None:
            return self.draw_noise(T, B, generator=generator)
        shape = (T, B, self.stoch_size, self.classes) if self.classes else (T, B, self.stoch_size)
        self._check(noise, "noise", shape)
        return noise

    def _check_state(self, state: State, B: int | None) -> None:
        self._check(state.deter, "state.deter", (B, self.deter_size))
        stoch = (self.stoch_size, self.classes) if self.classes else (self.stoch_size,)
        self._check(state.stoch, "state.stoch", (state.deter.shape[0], *stoch))

    @staticmethod
    def _check(tensor: Tensor, name: str, shape: tuple[int | None, ...]) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        fits = tensor.ndim == len(shape) and all(e in (None, g) for e, g in zip(shape, tensor.shape, strict=True))
        if not fits:
            expected = ", ".join("*" if s is None else str(s) for s in shape)
            raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")
