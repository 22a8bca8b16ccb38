"""torchrl: its DreamerV3 rollout (`RSSMRolloutV3`), prior and λ-target.

Its conventions: TensorDicts with batch axes first and time last, keys "state" (flattened z), "belief" (h) and "next";
`is_init` marks the first step of an episode. Source: torchrl/modules/models/dreamer_v3.py and
torchrl/objectives/dreamer_v3.py of github.com/pytorch/rl.
"""

from __future__ import annotations

from typing import Any

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
from phyxdream.ops.rssm_cells import BlockGRUWeights, GRUWeights


def lambda_target(
    reward: Tensor, value: Tensor, continuation: Tensor, gamma: float | Tensor = 0.997, lmbda: float | Tensor = 0.95
) -> Tensor:
    """`DreamerV3ActorLoss.lambda_target` with a continuation, by the fused op.

    Args:
        reward: (*B, T, 1) of the steps that follow.
        value: (*B, T, 1) of the states that they lead to.
        continuation: (*B, T, 1) probability that the episode goes on.
        gamma, lmbda: discount and λ, numbers or tensors of one element; `loss.value_estimator` has them there.

    Returns:
        (*B, T, 1).

    Raises:
        ValueError: the shapes do not fit, or λ is outside [0, 1].
    """
    lmbda = float(lmbda) if isinstance(lmbda, Tensor) and lmbda.device.type == "cpu" else lmbda
    reward, value, continuation = (x.movedim(-2, 0) for x in (reward, value, continuation))
    return ops.lambda_return(reward, value, gamma * continuation, lmbda).movedim(0, -2)


def _model(prior: nn.Module, posterior: nn.Module | None, cumulative: bool) -> Model:
    """Of an RSSMPriorV3 and an RSSMPosteriorV3."""
    traits, flat = Traits(), prior.num_categoricals * prior.num_classes
    head = traits.head(*whole_head(prior.rnn_to_prior_projector, "rnn_to_prior_projector"))
    if prior.recurrent_model == "block_gru":
        rnn = prior.rnn
        inputs = [
            traits.layer(only_layer([getattr(rnn, name)], name))
            for name in ("belief_projection", "state_projection", "action_projection")
        ]
        layers, out = layers_of(rnn.hidden_layers, "hidden_layers")
        if len(layers) != 1 or out is not None:
            raise Misfit(f"{len(layers)} block layers before the gates instead of 1")
        (mix,) = map(traits.layer, layers)
        size = rnn.belief_dim // rnn.num_blocks
        of_deter, shared = mix.weight.split([size, mix.weight.shape[1] - size], 1)  # (blocks, inputs, outputs)
        cell: Any = BlockGRUWeights(
            *(x for layer in inputs for x in layer),
            of_deter,
            shared.transpose(1, 2).flatten(0, 1),
            *mix[1:],
            rnn.gates.weight,
            rnn.gates.bias,
        )
    else:
        entering = traits.layer(only_layer(prior.action_state_projector, "action_state_projector"))
        in_stoch, in_action = entering.weight.split([flat, entering.weight.shape[1] - flat], 1)
        cell = GRUWeights(in_stoch, in_action, *entering[1:], *gru_weights(prior.rnn))
    seen = None
    if posterior is not None:
        if (posterior.num_categoricals, posterior.num_classes) != (prior.num_categoricals, prior.num_classes):
            raise Misfit("a posterior with other latents than the prior")
        seen = traits.posterior(*whole_head(posterior.obs_rnn_to_post_projector, "obs_rnn_to_post_projector"))
    options = traits.options(float((posterior or prior).unimix))
    sizes = prior.num_categoricals, prior.num_classes
    unimix = float(prior.unimix)
    return check_dtype(Model(cell, seen, head, options, *sizes, prior_unimix=unimix, cumulative=cumulative))


def _is_prior(module: Any) -> bool:
    names = ("rnn_to_prior_projector", "recurrent_model", "num_categoricals", "num_classes", "unimix", "rnn")
    own = getattr(module, "_modules", {})  # a TensorDictModule around it has all of its names
    return "rnn" in own and all(hasattr(module, name) for name in names)


class PriorV3(Accelerated):
    """`RSSMPriorV3`: one step of imagination."""

    kind = "RSSMPriorV3 of torchrl"
    replaces = ("forward",)
    cumulative = False  # how classes are drawn: by torch's own sampling, or, since 2026, by one uniform number

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return _is_prior(module)

    @classmethod
    def read(cls, module: nn.Module) -> Model:
        return _model(module, None, cls.cumulative)

    @classmethod
    def trials(cls, module: nn.Module):
        model, B = cls.read(module), 3
        D, A = model.prior.layers[0].weight.shape[1], model.cell.in_action.shape[1]

        def normal(size):
            return torch.randn(B, size, dtype=model.like.dtype, device=model.like.device).requires_grad_()

        return [("forward", lambda: (normal(model.stoch * model.classes), normal(D), 2 * normal(A)))]

    def forward(self, state: Tensor, belief: Tensor, action: Tensor):
        model = self.fitted(state, belief, action) if belief is not None else None
        if model is None or state.dim() < 2:
            return super().forward(state, belief, action)
        batch = state.shape[:-1]
        state, belief, action = (x.reshape(-1, x.shape[-1]) for x in (state, belief, action))
        (drawn,) = noise.draw(model, 1, len(state))
        found = scans.imagine(model, action.unsqueeze(0), belief, state, drawn)
        return (
            found.logits[0].reshape(*batch, *model.latent),
            found.stoch[0].reshape(*batch, -1),
            found.deter[0].reshape(*batch, -1),
        )


class RolloutV3(Accelerated):
    """`RSSMRolloutV3`: filtering of a sequence."""

    kind = "RSSMRolloutV3 of torchrl"
    replaces = ("forward",)
    cumulative = False  # as for `PriorV3`

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("rssm_prior", "rssm_posterior", "reset_key", "action_key")
        return all(hasattr(module, name) for name in names)

    @classmethod
    def read(cls, module: nn.Module) -> Model:
        prior, posterior = (getattr(x, "module", None) for x in (module.rssm_prior, module.rssm_posterior))
        if not _is_prior(prior) or not hasattr(posterior, "obs_rnn_to_post_projector"):
            raise Misfit("a prior or posterior that is no RSSMPriorV3 or RSSMPosteriorV3")
        _, state, belief = _keys(module.rssm_prior.out_keys)
        embed_belief, _ = _keys(module.rssm_posterior.in_keys)
        seen = _keys(module.rssm_posterior.out_keys)[1]
        standard = ("next", "state"), ("next", "belief")
        if (state, belief) != standard or (embed_belief, seen) != (standard[1], standard[0]):
            raise Misfit("other keys of state and belief than its own loop reads")
        if _keys(module.rssm_prior.in_keys)[:2] != ["state", "belief"]:
            raise Misfit("a prior that does not read state, belief and an action")
        return _model(prior, posterior, cls.cumulative)

    @classmethod
    def trials(cls, module: nn.Module):
        from tensordict import TensorDict

        model, B, T = cls.read(module), 3, 4
        D, A = model.prior.layers[0].weight.shape[1], model.cell.in_action.shape[1]
        E = model.posterior.in_weight.shape[1] - D

        def call():
            normal = lambda n: torch.randn(B, T, n, dtype=model.like.dtype, device=model.like.device)  # noqa: E731
            first = torch.zeros(B, T, 1, dtype=torch.bool, device=model.like.device)
            first[1, 0] = first[2, 2] = True
            given = TensorDict({}, [B, T])
            given.set("state", normal(model.stoch * model.classes))
            given.set("belief", normal(D))
            given.set(module.action_key, 2 * normal(A))
            given.set(_keys(module.rssm_posterior.in_keys)[1], normal(E).requires_grad_())
            if module.reset_key is not None:
                given.set(module.reset_key, first)
            return (given,)

        return [("forward", call)]

    def forward(self, tensordict):
        model = self.fitted()
        action, embed = tensordict.get(self.action_key), tensordict.get(_keys(self.rssm_posterior.in_keys)[1])
        state, belief = tensordict.get("state")[..., 0, :], tensordict.get("belief")[..., 0, :]
        if model is None or self.fitted(action, embed, state, belief) is None:
            return super().forward(tensordict)
        *batch, T = tensordict.shape

        def major(x):
            return x.reshape(-1, *x.shape[len(batch) :]).transpose(0, 1)  # (T, B, ...)

        def back(x):
            return x.transpose(0, 1).reshape(*batch, *x.shape[:1], *x.shape[2:])

        actions, embeds = major(action), major(embed)
        B = actions.shape[1]
        reset = None if self.reset_key is None else tensordict.get(self.reset_key, None)
        first = torch.zeros(T, B, dtype=torch.bool, device=actions.device)
        if reset is not None:
            first = major(reset).reshape(T, B)
        deter, stoch = belief.reshape(B, -1), state.reshape(B, -1)
        prior_noise, post_noise = noise.draw(model, T, B, draws=2)
        post = scans.observe(model, embeds, actions, first, deter, stoch, post_noise)
        prior = scans.prior(model, post.deter, None)
        del prior_noise  # the posterior's sample goes where the prior's went

        out = tensordict.exclude(*self.out_keys)
        flat = post.stoch.flatten(2)
        reading = {
            "state": torch.cat([stoch.unsqueeze(0), flat[:-1]]),
            "belief": torch.cat([deter.unsqueeze(0), post.deter[:-1]]),
        }
        if reset is not None:
            reading[self.action_key] = actions
            reading = {key: torch.where(first.unsqueeze(-1), 0.0, x) for key, x in reading.items()}
        logits_key, state_key, belief_key = _keys(self.rssm_prior.out_keys)
        reading |= {logits_key: prior.logits, belief_key: post.deter}
        reading |= {_keys(self.rssm_posterior.out_keys)[0]: post.logits, state_key: flat}
        for key, x in reading.items():
            out.set(key, back(x))
        return out


class PriorV3Cumulative(PriorV3):
    """`PriorV3` of later releases."""

    cumulative = True


class RolloutV3Cumulative(RolloutV3):
    """`RolloutV3` of later releases."""

    cumulative = True


def _keys(keys) -> list:
    """Keys as strings or tuples of them."""
    return [key[0] if isinstance(key, tuple) and len(key) == 1 else key for key in keys]
