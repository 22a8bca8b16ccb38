"""RLlib's DreamerV3 in torch: the training pass of its `WorldModel`.

Its conventions: batch-major (B, T, ...), the action that led to step t is `actions[:, t - 1]`, and z and h of a first
step are those of `get_initial_state`. Its cell is torch's GRU in older releases, and one with a layer norm since.
Source: rllib/algorithms/dreamerv3/torch/models/world_model.py and components of github.com/ray-project/ray.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phyxdream.compat import noise, scans
from phyxdream.compat.acceleration import Accelerated
from phyxdream.compat.structure import Model, Traits, check_dtype, gru_weights, only_layer, whole_head
from phyxdream.nn.layers import symlog
from phyxdream.ops.rssm_cells import GRUWeights, LayerNormGRUWeights, PosteriorWeights, class_probabilities

UNIMIX = 0.01  # its representation layer has this number in its code


_STEPS = 4  # of a trial


class _Echo(nn.Module):
    """Stands for a predictor in a trial: gives back what it got, once or twice."""

    def forward(self, h, z, **returns):
        found = torch.cat([h, z.flatten(1)], -1)
        return (found, found) if returns else found


class WorldModel(Accelerated):
    """Its `WorldModel`: `forward_train`."""

    kind = "WorldModel of RLlib's DreamerV3"
    replaces = ("forward_train",)

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("sequence_model", "posterior_mlp", "posterior_representation_layer", "dynamics_predictor", "initial_h")
        return all(hasattr(module, name) for name in (*names, "batch_length_T", "forward_train"))

    @staticmethod
    def read(module: nn.Module) -> Model:
        traits, sequence = Traits(), module.sequence_model
        layer = module.posterior_representation_layer
        stoch, classes = layer.num_categoricals, layer.num_classes_per_categorical
        entering = traits.layer(only_layer(sequence.pre_gru_layer._net, "pre_gru_layer"))
        in_stoch, in_action = entering.weight.split([stoch * classes, entering.weight.shape[1] - stoch * classes], 1)
        unit, inputs = sequence.gru_unit, (in_stoch, in_action, *entering[1:])
        if isinstance(unit, nn.RNNBase):
            cell = GRUWeights(*inputs, *gru_weights(unit))
        else:
            cell = LayerNormGRUWeights(*inputs, *traits.gates_after_state(unit.linear, unit.layer_norm, unit.cell_size))
        seen = traits.posterior(*whole_head([module.posterior_mlp._net, layer.z_generating_layer], "posterior_mlp"))
        D = module.num_gru_units
        embed_first = torch.cat([seen.in_weight[:, -D:], seen.in_weight[:, :-D]], 1)  # it reads the embedding before h
        dynamics = module.dynamics_predictor
        prior = traits.head(
            *whole_head([dynamics.mlp._net, dynamics.representation_layer.z_generating_layer], "dynamics_predictor")
        )
        posterior = PosteriorWeights(embed_first, *seen[1:])
        return check_dtype(Model(cell, posterior, prior, traits.options(UNIMIX), stoch, classes))

    @staticmethod
    def simplify(module: nn.Module) -> None:
        module.encoder, module.symlog_obs, module.batch_length_T = nn.Identity(), False, _STEPS
        module.decoder, module.reward_predictor, module.continue_predictor = _Echo(), _Echo(), _Echo()

    @staticmethod
    def trials(module: nn.Module):
        model, B, T = WorldModel.read(module), 3, _STEPS
        E = model.posterior.in_weight.shape[1] - module.num_gru_units

        def normal(size):
            return torch.randn(B, T, size, dtype=model.like.dtype, device=model.like.device).requires_grad_()

        def call():
            first = torch.zeros(B, T, dtype=model.like.dtype, device=model.like.device)
            first[:, 0] = first[2, 2] = 1
            return normal(E), normal(model.cell.in_action.shape[1]), first

        return [("forward_train", call)]

    def forward_train(self, observations: Tensor, actions: Tensor, is_first: Tensor) -> dict:
        model = self.fitted(actions) if actions.shape[1] == self.batch_length_T else None
        if model is None:
            return super().forward_train(observations, actions, is_first)
        B, T = observations.shape[:2]
        if self.symlog_obs:
            observations = symlog(observations)
        observations = observations.reshape(B * T, *observations.shape[2:])
        embed = self.encoder(observations).view(B, T, -1)
        initial = self.get_initial_state()  # with or without an axis of one sequence
        initial = initial["h"].flatten(), initial["z"].reshape(model.latent).to(model.like.dtype)
        led = actions.roll(1, 1)  # that of step 0 is the last one, as there: only is_first keeps it out
        start = (x.expand(B, *x.shape) for x in initial)
        post_noise, _ = noise.draw(model, T, B, draws=2)
        first = is_first.transpose(0, 1) > 0
        post = scans.observe(model, embed.transpose(0, 1), led.transpose(0, 1), first, *start, post_noise, initial)
        prior = scans.prior(model, post.deter, None)

        def folded(x):
            return x.transpose(0, 1).reshape(B * T, *x.shape[2:])

        h, z = folded(post.deter), folded(post.stoch)
        rewards, reward_logits = self.reward_predictor(h=h, z=z, return_logits=True)
        continues, continue_distribution = self.continue_predictor(h=h, z=z, return_distribution=True)
        return {
            "sampled_obs_symlog_BxT": observations,
            "obs_distribution_means_BxT": self.decoder(h=h, z=z),
            "reward_logits_BxT": reward_logits,
            "rewards_BxT": rewards,
            "continue_distribution_BxT": continue_distribution,
            "continues_BxT": continues,
            "h_states_BxT": h,
            "z_posterior_states_BxT": z,
            "z_posterior_probs_BxT": folded(class_probabilities(post.logits, UNIMIX)),
            "z_prior_probs_BxT": folded(class_probabilities(prior.logits, UNIMIX)),
        }
