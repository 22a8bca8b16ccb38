"""NM512/r2dreamer: its RSSM with a block GRU, and its λ-return.

Its conventions: tensors are batch-major (B, T, ...), states are pairs (stoch, deter), samples have the gradient of the
Gumbel-softmax. Source: rssm.py, networks.py, distributions.py and dreamer.py of github.com/NM512/r2dreamer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.compat import noise, scans
from phyxdream.compat.acceleration import Accelerated
from phyxdream.compat.scans import swapped
from phyxdream.compat.structure import Misfit, Model, Traits, check_dtype, layers_of, only_layer, whole_head
from phyxdream.ops.rssm_cells import BlockGRUWeights


def lambda_return(
    last: Tensor, term: Tensor, reward: Tensor, value: Tensor, boot: Tensor, disc: float, lamb: float
) -> Tensor:
    """`Dreamer._lambda_return` of r2dreamer, which has the arguments of DreamerV3's in JAX, by the fused op.

    Args:
        last, term: (B, T, ...) whether an episode ends here, and whether by termination; any dtype.
        reward: (B, T, ...); the first is not used.
        value: likewise, not used.
        boot: (B, T, ...) values to bootstrap from; the first is not used.
        disc: discount.
        lamb: λ in [0, 1].

    Returns:
        (B, T - 1, ...) returns of steps 0 to T - 2.

    Raises:
        ValueError: the shapes do not fit, or λ is outside [0, 1].
    """
    if not 0 <= lamb <= 1:
        raise ValueError(f"lamb: expected a number in [0, 1], got {lamb}")
    # Of whole tensors, which lie densely, and only then all but the first step.
    live = term.to(reward.dtype).mul(-disc).add_(disc)
    lambda_ = last.to(reward.dtype).mul(-lamb).add_(lamb)
    returns = ops.lambda_return(*(swapped(x)[1:] for x in (reward, boot, live, lambda_)))
    return swapped(returns)


class RSSM(Accelerated):
    """Its `rssm.RSSM`."""

    kind = "RSSM of r2dreamer"
    replaces = ("observe", "imagine_with_action", "obs_step", "img_step")

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        names = ("_deter_net", "_obs_net", "_img_net", "_unimix_ratio", "_discrete", "obs_step", "img_step")
        return all(hasattr(module, name) for name in names)

    @staticmethod
    def read(module: nn.Module) -> Model:
        traits, net = Traits(), module._deter_net
        inputs = [
            traits.layer(only_layer([part], name))
            for name, part in (("_dyn_in0", net._dyn_in0), ("_dyn_in1", net._dyn_in1), ("_dyn_in2", net._dyn_in2))
        ]
        layers, out = layers_of(net._dyn_hid, "_dyn_hid")
        if len(layers) != 1 or out is not None:
            raise Misfit(f"{len(layers)} block layers before the gates instead of 1")
        (mix,) = map(traits.layer, layers)
        size = module._deter // net.blocks
        # Its block layers are (outputs, inputs, blocks); the first reads h of the block and what all blocks share.
        of_deter, shared = mix.weight.split([size, mix.weight.shape[1] - size], 1)
        cell = BlockGRUWeights(
            *(x for layer in inputs for x in layer),
            of_deter.permute(2, 1, 0),
            shared.permute(2, 0, 1).flatten(0, 1),
            *mix[1:],
            net._dyn_gru.weight.permute(2, 1, 0),
            net._dyn_gru.bias,
        )
        posterior = traits.posterior(*whole_head(module._obs_net, "the posterior"))
        prior = traits.head(*whole_head(module._img_net, "the prior"))
        options = traits.options(float(module._unimix_ratio), gumbel=True)
        return check_dtype(Model(cell, posterior, prior, options, module._stoch, module._discrete))

    @staticmethod
    def trials(module: nn.Module):
        B, T, like = 3, 4, module._deter_net._dyn_gru.weight
        E = module._obs_net[0].weight.shape[1] - module._deter
        A = module._deter_net._dyn_in2[0].weight.shape[1]

        def normal(*shape):
            return torch.randn(shape, dtype=like.dtype, device=like.device).requires_grad_()

        def state():
            return normal(B, module._stoch, module._discrete), normal(B, module._deter)

        def observed():
            reset = torch.zeros(B, T, dtype=torch.bool, device=like.device)
            reset[1, 0] = reset[2, 2] = True
            return normal(B, T, E), 2 * normal(B, T, A), state(), reset

        def stepped():
            reset = torch.tensor([False, True, False], device=like.device)
            return *state(), normal(B, A), normal(B, E), reset

        return [
            ("observe", observed),
            ("obs_step", stepped),
            ("imagine_with_action", lambda: (*state(), normal(B, T, A))),
            ("img_step", lambda: (*state(), normal(B, A))),
        ]

    def observe(self, embed: Tensor, action: Tensor, initial: tuple[Tensor, Tensor], reset: Tensor):
        model = self.fitted(embed, action, *initial)
        if model is None:
            return super().observe(embed, action, initial, reset)
        found = self._observed(model, *map(swapped, (embed, action, reset)), *initial)
        return swapped(found.stoch), swapped(found.deter), swapped(found.logits)

    def _observed(self, model, embed, action, reset, stoch, deter):
        (drawn,) = noise.draw(model, *action.shape[:2])
        return scans.observe(model, embed, action, reset.bool(), deter, stoch, drawn)

    def imagine_with_action(self, stoch: Tensor, deter: Tensor, actions: Tensor):
        model = self.fitted(stoch, deter, actions)
        if model is None:
            return super().imagine_with_action(stoch, deter, actions)
        found = self._imagined(model, swapped(actions), stoch, deter)
        return swapped(found.stoch), swapped(found.deter)

    def _imagined(self, model, action, stoch, deter):
        (drawn,) = noise.draw(model, *action.shape[:2])
        return scans.imagine(model, action, deter, stoch, drawn)

    def obs_step(self, stoch, deter, prev_action, embed, reset):
        model = self.fitted(stoch, deter, prev_action, embed)
        if model is None or reset.dim() != 1:
            return super().obs_step(stoch, deter, prev_action, embed, reset)
        inputs = (x.unsqueeze(0) for x in (embed, prev_action, reset))
        found = self._observed(model, *inputs, stoch, deter)
        return found.stoch[0], found.deter[0], found.logits[0]

    def img_step(self, stoch, deter, prev_action):
        model = self.fitted(stoch, deter, prev_action)
        if model is None:
            return super().img_step(stoch, deter, prev_action)
        found = self._imagined(model, prev_action.unsqueeze(0), stoch, deter)
        return found.stoch[0], found.deter[0]
