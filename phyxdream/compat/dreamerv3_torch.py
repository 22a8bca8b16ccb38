"""NM512/dreamerv3-torch: its RSSM and its λ-return.

Its conventions: tensors are batch-major (B, T, ...), states are dicts of stoch, deter and logit, `is_first` is float,
and without a state the first step is a reset. Source: networks.py, tools.py and models.py of
github.com/NM512/dreamerv3-torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.compat import noise, scans
from phyxdream.compat.acceleration import Accelerated
from phyxdream.compat.scans import swapped
from phyxdream.compat.structure import Misfit, Model, Traits, check_dtype, only_layer, whole_head
from phyxdream.ops.rssm_cells import LayerNormGRUWeights

State = dict[str, Tensor]


def lambda_return(
    reward: Tensor, value: Tensor, pcont: Tensor | float, bootstrap: Tensor | None, lambda_: float, axis: int
) -> tuple[Tensor, ...]:
    """`tools.lambda_return` as dreamerv3-torch calls it, by the fused op.

    Args:
        reward, value: (T, B, 1), or with `axis` its place of T.
        pcont: discount, likewise, or a number.
        bootstrap: (B, 1) value after the last step; None is 0.
        lambda_: λ in [0, 1].
        axis: of time; the original works with 0.

    Returns:
        A tuple of B tensors (T, 1), which the caller stacks on axis 1.

    Raises:
        ValueError: the shapes do not fit, or λ is outside [0, 1].
    """
    if not isinstance(pcont, Tensor):
        pcont = torch.full_like(reward, pcont)
    reward, value, pcont = (x.movedim(axis, 0) for x in (reward, value, pcont))
    bootstrap = torch.zeros_like(value[-1]) if bootstrap is None else bootstrap
    next_value = torch.cat([value[1:], bootstrap.unsqueeze(0)])
    return ops.lambda_return(reward, next_value, pcont, lambda_).unbind(1)


class RSSM(Accelerated):
    """Its `networks.RSSM` with discrete latents."""

    kind = "RSSM of dreamerv3-torch"
    replaces = ("observe", "imagine_with_action", "obs_step", "img_step")

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        parts = ("_img_in_layers", "_cell", "_img_out_layers", "_obs_out_layers", "_imgs_stat_layer", "_obs_stat_layer")
        return all(hasattr(module, name) for name in (*parts, "_unimix_ratio", "_discrete", "obs_step", "img_step"))

    @staticmethod
    def read(module: nn.Module) -> Model:
        if not module._discrete:
            raise Misfit("Gaussian latents, whose standard deviation is not softplus + min_std there")
        if module._rec_depth != 1:
            raise Misfit(f"a recurrence {module._rec_depth} deep instead of 1")
        traits, stoch, classes = Traits(), module._stoch, int(module._discrete)
        entering = traits.layer(only_layer(module._img_in_layers, "_img_in_layers"))
        in_stoch, in_action = entering.weight.split([stoch * classes, entering.weight.shape[1] - stoch * classes], 1)
        gates, *norm = module._cell.layers
        if len(norm) != 1 or not isinstance(norm[0], nn.LayerNorm):
            raise Misfit("a GRU without a layer norm on its gates")
        if module._cell._update_bias != -1 or module._cell._act is not torch.tanh:
            raise Misfit("a GRU with another update bias or activation than -1 and tanh")
        cell = LayerNormGRUWeights(
            in_stoch, in_action, *entering[1:], gates.weight, *traits.affine(norm[0]), gates.bias
        )
        posterior = traits.posterior(*whole_head([module._obs_out_layers, module._obs_stat_layer], "the posterior"))
        prior = traits.head(*whole_head([module._img_out_layers, module._imgs_stat_layer], "the prior"))
        options = traits.options(float(module._unimix_ratio))
        return check_dtype(Model(cell, posterior, prior, options, stoch, classes))

    @staticmethod
    def trials(module: nn.Module):
        B, T, like = 3, 4, module._obs_stat_layer.weight
        E = module._obs_out_layers[0].weight.shape[1] - module._deter
        A = module._img_in_layers[0].weight.shape[1] - module._stoch * module._discrete

        def inputs(*leading):
            return (torch.randn(*leading, n, dtype=like.dtype, device=like.device) for n in (E, A))

        def observed():
            embed, action = inputs(B, T)
            first = torch.zeros(B, T, dtype=like.dtype, device=like.device)
            first[1, 2] = first[2, 2] = first[0, 3] = 1
            return embed.requires_grad_(), action, first

        def state():
            found = {name: x.detach() for name, x in module.initial(B).items()}
            deter, stoch = torch.randn_like(found["deter"]), torch.randn_like(found["stoch"])
            return {**found, "deter": deter.requires_grad_(), "stoch": stoch.requires_grad_()}

        def stepped():
            embed, action = inputs(B)
            first = torch.tensor([0.0, 1.0, 0.0], dtype=like.dtype, device=like.device)
            return state(), action, embed.requires_grad_(), first

        return [
            ("observe", observed),
            ("obs_step", stepped),
            ("imagine_with_action", lambda: (next(iter(reversed(list(inputs(B, T))))).requires_grad_(), state())),
            ("img_step", lambda: (state(), next(iter(reversed(list(inputs(B))))).requires_grad_())),
        ]

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None):
        model = self.fitted(embed, action, *(state or {}).values())
        if model is None:
            return super().observe(embed, action, is_first, state)
        post, prior = self._observed(model, *map(swapped, (embed, action, is_first)), state)
        return ({k: swapped(x) for k, x in post.items()}, {k: swapped(x) for k, x in prior.items()})

    def _observed(self, model, embed, action, is_first, state):
        T, B = action.shape[:2]
        first = is_first.bool()
        if state is None:
            first = torch.cat([torch.ones_like(first[:1]), first[1:]])
            state = self.initial(B)
        initial = None
        if self._initial == "learned":
            start = self.initial(1)
            initial = start["deter"][0], start["stoch"][0]
        prior_noise, post_noise = noise.draw(model, T, B, draws=2)
        post = scans.observe(model, embed, action, first, state["deter"], state["stoch"], post_noise, initial)
        prior = scans.prior(model, post.deter, prior_noise)
        return _dict(post), _dict(prior)

    def imagine_with_action(self, action: Tensor, state: State) -> State:
        model = self.fitted(action, *state.values())
        if model is None:
            return super().imagine_with_action(action, state)
        found = self._imagined(model, swapped(action), state)
        return {k: swapped(x) for k, x in found.items()}

    def _imagined(self, model, action, state):
        (drawn,) = noise.draw(model, *action.shape[:2])
        return _dict(scans.imagine(model, action, state["deter"], state["stoch"], drawn))

    def obs_step(self, prev_state, prev_action, embed, is_first, sample=True):
        model = self.fitted(prev_action, embed, *(prev_state or {}).values()) if sample else None
        if model is None:
            return super().obs_step(prev_state, prev_action, embed, is_first, sample)
        if prev_action is None:
            prev_action = embed.new_zeros(len(is_first), self._num_actions)
        inputs = (x.unsqueeze(0) for x in (embed, prev_action, is_first))
        post, prior = self._observed(model, *inputs, prev_state)
        return ({k: x[0] for k, x in post.items()}, {k: x[0] for k, x in prior.items()})

    def img_step(self, prev_state, prev_action, sample=True):
        model = self.fitted(prev_action, *prev_state.values()) if sample else None
        if model is None:
            return super().img_step(prev_state, prev_action, sample)
        return {k: x[0] for k, x in self._imagined(model, prev_action.unsqueeze(0), prev_state).items()}


def _dict(found: scans.Sequence) -> State:
    return {"stoch": found.stoch, "deter": found.deter, "logit": found.logits}
