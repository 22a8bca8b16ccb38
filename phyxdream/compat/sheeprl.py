"""sheeprl (Eclectic-Sheep): the RSSMs and λ-returns of its DreamerV1, V2 and V3.

Its conventions: tensors are time-major (T, B, ...), a step is a call with T = 1, the action led to the observation,
`is_first` is float (T, B, 1). Its training loops call `rssm.dynamic` once a step; `observe` here is that loop, and an
accelerated `dynamic` runs it when it sees that it is called with the first slice of whole sequences.
Source: sheeprl/algos/dreamer_v1|2|3/agent.py and utils.py, sheeprl/models/models.py of
github.com/Eclectic-Sheep/sheeprl.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.compat import noise, scans
from phyxdream.compat.acceleration import Accelerated
from phyxdream.compat.structure import (
    Misfit,
    Model,
    Traits,
    check_dtype,
    gru_weights,
    layers_of,
    only_layer,
    whole_head,
)
from phyxdream.ops.rssm_cells import GRUWeights, LayerNormGRUWeights


def compute_lambda_values(rewards: Tensor, values: Tensor, continues: Tensor, lmbda: float = 0.95) -> Tensor:
    """`dreamer_v3.utils.compute_lambda_values`, by the fused op.

    Args:
        rewards, values, continues: (T, B, 1) of the steps 1 to T: all are shifted already, and γ is in `continues`.
        lmbda: λ in [0, 1].

    Returns:
        (T, B, 1).

    Raises:
        ValueError: the shapes do not fit, or λ is outside [0, 1].
    """
    return ops.lambda_return(rewards, values, continues, lmbda)


def compute_lambda_values_v2(
    rewards: Tensor,
    values: Tensor,
    continues: Tensor,
    bootstrap: Tensor | None = None,
    horizon: int = 15,
    lmbda: float = 0.95,
) -> Tensor:
    """`dreamer_v2.utils.compute_lambda_values`, by the fused op.

    Args:
        rewards, values, continues: (T, B, 1).
        bootstrap: (1, B, 1) value after the last step; None is 0.
        horizon: number of steps; at most T.
        lmbda: λ in [0, 1].

    Returns:
        (horizon, B, 1).

    Raises:
        ValueError: the shapes do not fit, `horizon` is not in 1..T, or λ is outside [0, 1].
    """
    if not 1 <= horizon <= len(rewards):
        raise ValueError(f"horizon: expected 1 to {len(rewards)}, the steps of rewards, got {horizon}")
    bootstrap = torch.zeros_like(values[-1:]) if bootstrap is None else bootstrap
    next_value = torch.cat([values[1:], bootstrap])[:horizon]
    if horizon < len(rewards):  # the original starts from the bootstrap all the same
        last = (1 - lmbda) * next_value[-1] + lmbda * bootstrap[0]
        next_value = torch.cat([next_value[:-1], last.unsqueeze(0)])
    return ops.lambda_return(rewards[:horizon], next_value, continues[:horizon], lmbda)


def compute_lambda_values_v1(
    rewards: Tensor,
    values: Tensor,
    done_mask: Tensor,
    last_values: Tensor,
    horizon: int = 15,
    lmbda: float = 0.95,
) -> Tensor:
    """`dreamer_v1.utils.compute_lambda_values`, by the fused op.

    Args:
        rewards, values, done_mask: (T, B, 1); `done_mask` is γ, or γ times the probability to go on.
        last_values: (B, 1) value of the last state.
        horizon: T; there are horizon − 1 returns.
        lmbda: λ in [0, 1].

    Returns:
        (horizon − 1, B, 1).

    Raises:
        ValueError: the shapes do not fit, `horizon` is not in 2..T, or λ is outside [0, 1].
    """
    if not 2 <= horizon <= len(rewards):
        raise ValueError(f"horizon: expected 2 to {len(rewards)}, the steps of rewards, got {horizon}")
    steps = horizon - 1
    next_value = torch.cat([values[1:steps], last_values.unsqueeze(0)])
    return ops.lambda_return(rewards[:steps], next_value, done_mask[:steps], lmbda)


def observe(
    rssm: nn.Module,
    embedded_obs: Tensor,
    actions: Tensor,
    is_first: Tensor | None = None,
    posterior: Tensor | None = None,
    recurrent_state: Tensor | None = None,
) -> tuple:
    """What a loop over `rssm.dynamic` gives, by one fused scan; `rssm` need not be accelerated.

    Args:
        rssm: an RSSM of sheeprl's DreamerV1, V2 or V3.
        embedded_obs: (T, B, E).
        actions: (T, B, A) that led to the observations.
        is_first: (T, B, 1) float; None for V1, which has no resets.
        posterior: (1, B, S, C) or (1, B, S) state before the first step; None is zeros, as in its training loops.
        recurrent_state: (1, B, D) likewise.

    Returns:
        What `dynamic` returns, all steps of it stacked on axis 0: recurrent states (T, B, D), posteriors and priors
        (T, B, S, C), and their logits (T, B, S·C); of V1 (T, B, S), and pairs of mean and standard deviation.

    Raises:
        ValueError: `rssm` is none of these, or not one that the ops compute; the message says what is different.
    """
    kind = type(rssm) if isinstance(rssm, _RSSM) else next((k for k in KINDS if k.recognises(rssm)), None)
    if kind is None:
        raise ValueError(f"rssm: expected an RSSM of sheeprl's DreamerV1, V2 or V3, got {type(rssm).__name__}")
    try:
        model = kind.read(rssm)
    except Misfit as reason:
        raise ValueError(f"rssm: expected one that the fused ops compute, got {reason}") from None
    B = actions.shape[1]
    if recurrent_state is None:
        recurrent_state = actions.new_zeros(1, B, _deter_size(model))
    if posterior is None:
        posterior = actions.new_zeros(1, B, *model.latent)
    return kind.steps(rssm, model, posterior, recurrent_state, actions, embedded_obs, is_first)


def _deter_size(model):
    return model.prior.layers[0].weight.shape[1]


def _own(module: nn.Module) -> nn.Module:
    """The module inside a wrapper of Lightning's Fabric, if it does no more than pass calls on."""
    inner = getattr(module, "_original_module", None)
    if inner is None:
        return module
    if module._forward_module is not inner:
        raise Misfit(f"{type(module._forward_module).__name__} around a part, which must see every call of it")
    return inner


def _parts(module: nn.Module):
    return (_own(x) for x in (module.recurrent_model, module.representation_model, module.transition_model))


_STEPS = 4  # of a trial


def dynamic(rssm: nn.Module, posterior: Tensor, recurrent_state: Tensor, *inputs: Tensor) -> list[tuple]:
    """A loop like those of its training; `inputs` (T, B, ...) are what `rssm.dynamic` takes slices of."""
    found = []
    for t in range(len(inputs[0])):
        found.append(rssm.dynamic(posterior, recurrent_state, *(x[t : t + 1] for x in inputs)))
        recurrent_state, posterior = found[-1][:2]
    return found


class _Ahead:
    """A scan whose steps are handed out one by one, as long as the calls are those that it foresaw."""

    def __init__(self, wholes: list[tuple[Tensor, int]], outputs: tuple):
        self.wholes, self.step = wholes, 0
        self.steps = list(zip(*map(_split, outputs), strict=True))

    def next(self) -> tuple:
        self.step += 1
        return self.steps[self.step - 1]

    def foresaw(self, posterior: Tensor, recurrent_state: Tensor, inputs: list[Tensor]) -> bool:
        """Whether this call goes on from what the last one returned, with the next slices of the same sequences."""
        last = self.steps[self.step - 1]
        if self.step == len(self.steps) or recurrent_state is not last[0] or posterior is not last[1]:
            return False
        return all(
            x._base is base and base._version == version and _slice_of(x) == self.step
            for x, (base, version) in zip(inputs, self.wholes, strict=True)
        )


_AHEAD: weakref.WeakKeyDictionary[nn.Module, _Ahead] = weakref.WeakKeyDictionary()  # graphs: not for copies of a module


def _split(x):
    return list(zip(*map(_split, x), strict=True)) if isinstance(x, tuple) else x.split(1)


def _slice_of(x: Tensor) -> int | None:
    """Which step x (1, B, ...) is of a dense sequence that it is a view of."""
    base = x._base
    if base is None or not (base.is_contiguous() and x.is_contiguous()) or base.numel() % x.numel():
        return None
    start = x.storage_offset() - base.storage_offset()
    return None if start % x.numel() else start // x.numel()


class _RSSM(Accelerated):
    replaces = ("dynamic", "imagination")
    remark = "dynamic computes all steps of a training loop at its first one, or leaves a single step to the original"
    resets = True

    @staticmethod
    def steps(module, model, posterior, recurrent_state, action, embedded_obs, is_first) -> tuple:
        """All steps of `dynamic`."""
        T, B = action.shape[:2]
        prior_noise, post_noise = noise.draw(model, T, B, draws=2)
        first = torch.zeros(T, B, dtype=torch.bool, device=action.device) if is_first is None else is_first[..., 0] > 0
        initial = None
        if hasattr(module, "get_initial_states"):
            start = module.get_initial_states((1, 1))
            initial = start[0][0, 0], start[1][0, 0].reshape(model.latent)
        post = scans.observe(model, embedded_obs, action, first, recurrent_state[0], posterior[0], post_noise, initial)
        prior = scans.prior(model, post.deter, prior_noise)
        if not model.classes:
            return post.deter, post.stoch, prior.stoch, (post.mean, post.std), (prior.mean, prior.std)
        logits = (scans.mixed_logits(x.logits, model.options.unimix).flatten(2) for x in (post, prior))
        return post.deter, post.stoch, prior.stoch, *logits

    def dynamic(self, posterior, recurrent_state, action, embedded_obs, *is_first):
        inputs = [action, embedded_obs, *is_first]
        ahead = _AHEAD.pop(self, None)
        if ahead is None or not ahead.foresaw(posterior, recurrent_state, inputs):
            ahead = self._look_ahead(posterior, recurrent_state, inputs)
        if ahead is None:
            return super().dynamic(posterior, recurrent_state, action, embedded_obs, *is_first)
        found = ahead.next()
        if ahead.step < len(ahead.steps):
            _AHEAD[self] = ahead
        return found

    def _look_ahead(self, posterior, recurrent_state, inputs):
        """The scan of a loop that starts here, or None where it is not to be seen that one does."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if any(len(x) != 1 or _slice_of(x) != 0 for x in inputs):
            return None
        wholes = [x._base.reshape(-1, *x.shape[1:]) for x in inputs]
        if len(wholes[0]) == 1 or len({len(x) for x in wholes}) > 1:
            return None
        model = self.fitted(posterior, recurrent_state, *inputs)
        if model is None:
            return None
        is_first = wholes[2] if len(wholes) > 2 else None
        found = self.steps(self, model, posterior, recurrent_state, *wholes[:2], is_first)
        return _Ahead([(x._base, x._base._version) for x in inputs], found)

    def imagination(self, prior, recurrent_state, actions):
        model = self.fitted(prior, recurrent_state, actions)
        if model is None or len(actions) != 1:
            return super().imagination(prior, recurrent_state, actions)
        (drawn,) = noise.draw(model, *actions.shape[:2])
        found = scans.imagine(model, actions, recurrent_state[0], prior[0], drawn)
        return found.stoch, found.deter

    @classmethod
    def trials(cls, module: nn.Module):
        model, B = cls.read(module), 3
        like, D = model.like, _deter_size(model)
        E = model.posterior.in_weight.shape[1] - D
        A = model.cell.in_action.shape[1]

        def normal(*shape, T=1):
            return torch.randn(T, B, *shape, dtype=like.dtype, device=like.device).requires_grad_()

        def loop():
            first = torch.zeros(_STEPS, B, 1, dtype=like.dtype, device=like.device)
            first[0, 1] = first[2, 2] = 1
            inputs = normal(A, T=_STEPS), normal(E, T=_STEPS), *[first] * cls.resets
            return normal(*model.latent), normal(D), *inputs

        flat = model.stoch * (model.classes or 1)
        return [(dynamic, loop), ("imagination", lambda: (normal(flat), normal(D), normal(A)))]


def _layer_norm_gru(traits: Traits, recurrent: nn.Module, flat: int) -> LayerNormGRUWeights:
    entering = traits.layer(only_layer(recurrent.mlp._model, "recurrent_model.mlp"))
    rnn = recurrent.rnn
    in_stoch, in_action = entering.weight.split([flat, entering.weight.shape[1] - flat], 1)
    gates = traits.gates_after_state(rnn.linear, rnn.layer_norm, rnn.hidden_size)
    return LayerNormGRUWeights(in_stoch, in_action, *entering[1:], *gates)


def _named(module: nn.Module, recurrent: str) -> bool:
    names = ("recurrent_model", "representation_model", "transition_model", "dynamic", "imagination")
    if not all(hasattr(module, name) for name in names):
        return False
    rnn = getattr(getattr(module, "recurrent_model", None), "rnn", None)
    return type(rnn).__name__ == recurrent


class _Categorical(_RSSM):
    """What V2 and V3 share."""

    @classmethod
    def read(cls, module: nn.Module) -> Model:
        traits, unimix = Traits(), float(getattr(module, "unimix", 0.0))
        recurrent, representation, transition = _parts(module)
        layers, _ = layers_of(representation._model, "representation_model")
        if layers and layers[0].linear.weight.shape[1] <= recurrent.rnn.hidden_size:
            raise Misfit("a posterior that does not read the recurrent state")
        posterior = traits.posterior(*whole_head(representation._model, "representation_model"))
        prior = traits.head(*whole_head(transition._model, "transition_model"))
        classes = int(module.discrete)
        flat = prior.out_weight.shape[0]
        cell = _layer_norm_gru(traits, recurrent, flat)
        return check_dtype(Model(cell, posterior, prior, traits.options(unimix), flat // classes, classes))


class RSSMV3(_Categorical):
    """`dreamer_v3.agent.RSSM`."""

    kind = "RSSM of sheeprl's DreamerV3"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return _named(module, "LayerNormGRUCell") and hasattr(module, "get_initial_states")

    @classmethod
    def read(cls, module: nn.Module) -> Model:
        if "Decoupled" in type(module).__name__:
            raise Misfit("a posterior that does not read the recurrent state")
        return super().read(module)


class RSSMV2(_Categorical):
    """`dreamer_v2.agent.RSSM`."""

    kind = "RSSM of sheeprl's DreamerV2"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return _named(module, "LayerNormGRUCell") and not hasattr(module, "get_initial_states")


class RSSMV1(_RSSM):
    """`dreamer_v1.agent.RSSM`."""

    kind = "RSSM of sheeprl's DreamerV1"
    resets = False

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return _named(module, "GRU") and hasattr(module, "min_std")

    @classmethod
    def read(cls, module: nn.Module) -> Model:
        traits = Traits()
        recurrent, representation, transition = _parts(module)
        posterior = traits.posterior(*whole_head(representation._model, "representation_model"))
        prior = traits.head(*whole_head(transition._model, "transition_model"))
        stoch = prior.out_weight.shape[0] // 2
        entering = traits.layer(only_layer(recurrent.mlp, "recurrent_model.mlp"))
        in_stoch, in_action = entering.weight.split([stoch, entering.weight.shape[1] - stoch], 1)
        cell = GRUWeights(in_stoch, in_action, *entering[1:], *gru_weights(recurrent.rnn))
        options = traits.options(0.0, min_std=float(module.min_std))
        return check_dtype(Model(cell, posterior, prior, options, stoch, 0))


KINDS = (RSSMV3, RSSMV2, RSSMV1)
