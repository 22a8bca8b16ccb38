"""danijar's DreamerV1 and V2: their λ-return, and our `nn.RSSM` behind the calls of their RSSMs, in torch.

Their conventions: batch-major (B, T, ...), states are dicts of stoch and deter with mean and std or logit, features are
[stoch, deter]. V1 knows no resets; V2 has `is_first`, and an ensemble of priors of which this has one. Source:
models.py and tools.py of github.com/danijar/dreamer, common/nets.py and common/other.py of
github.com/danijar/dreamerv2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phyxdream import ops
from phyxdream.nn import RSSM, State

Dict = dict[str, Tensor]


def lambda_return(
    reward: Tensor, value: Tensor, pcont: Tensor | float, bootstrap: Tensor | None, lambda_: float, axis: int
) -> Tensor:
    """`tools.lambda_return` of V1 and `common.lambda_return` of V2, by the fused op.

    Args:
        reward, value: with T at `axis`: `value` is that of the states that rewards came from.
        pcont: discount, likewise, or a number.
        bootstrap: value after the last step, without the axis of time; None is 0.
        lambda_: λ in [0, 1].
        axis: of time.

    Returns:
        Of the shape of `reward`.

    Raises:
        ValueError: the shapes do not fit, or λ is outside [0, 1].

    >>> lambda_return(torch.ones(3, 1), torch.zeros(3, 1), 0.5, None, 1.0, axis=0).flatten()
    tensor([1.7500, 1.5000, 1.0000])
    """
    if not isinstance(pcont, Tensor):
        pcont = torch.full_like(reward, pcont)
    reward, value, pcont = (x.movedim(axis, 0) for x in (reward, value, pcont))
    bootstrap = torch.zeros_like(value[-1]) if bootstrap is None else bootstrap
    next_value = torch.cat([value[1:], bootstrap.unsqueeze(0)])
    return ops.lambda_return(reward, next_value, pcont, lambda_).movedim(0, axis)


class _Calls(nn.Module):
    """What the calls of V1 and V2 share. The state dict is that of `rssm`, under the same prefix."""

    def __init__(self, rssm: RSSM):
        super().__init__()
        self.rssm = rssm

    def initial(self, batch_size: int) -> Dict:
        """The state (B, ...) before the first observation."""
        return _dict(self.rssm.initial(batch_size))

    def get_feat(self, state: Dict) -> Tensor:
        """(..., F): stoch, flattened, and deter."""
        return torch.cat([state["stoch"].reshape(*state["deter"].shape[:-1], -1), state["deter"]], -1)

    def imagine(self, action: Tensor, state: Dict | None = None) -> Dict:
        """Prior states (B, T, ...) that follow `state` (B, ...) under `action` (B, T, A)."""
        start = self.initial(len(action)) if state is None else state
        found = self.rssm.imagine(action.transpose(0, 1), _state(start))
        return _dict(found.map(lambda x: x.transpose(0, 1)))

    def img_step(self, prev_state: Dict, prev_action: Tensor) -> Dict:
        """The prior state (B, ...) after one action (B, A)."""
        return {k: x[:, 0] for k, x in self.imagine(prev_action.unsqueeze(1), prev_state).items()}

    def _observe(self, embed, action, is_first, state):
        start = None if state is None else _state(state)
        post = self.rssm.filter(embed.transpose(0, 1), action.transpose(0, 1), is_first.transpose(0, 1), start)
        prior = self.rssm.sample_prior(post.deter)
        return tuple(_dict(x.map(lambda y: y.transpose(0, 1))) for x in (post, prior))


class RSSMV1(_Calls):
    """An `nn.RSSM` with the calls of DreamerV1's `models.RSSM`.

    Args:
        rssm: of Gaussian latents and the cell `gru` to be its model: `RSSM(embed_size, action_size, deter_size=200,
            stoch_size=30, classes=0, hidden_size=200, cell="gru")`.

    >>> calls = RSSMV1(RSSM(8, 2, deter_size=16, stoch_size=4, classes=0, hidden_size=16, cell="gru"))
    >>> post, prior = calls.observe(torch.zeros(3, 5, 8), torch.zeros(3, 5, 2))
    >>> calls.get_feat(post).shape, sorted(prior)
    (torch.Size([3, 5, 20]), ['deter', 'mean', 'std', 'stoch'])
    """

    def observe(self, embed: Tensor, action: Tensor, state: Dict | None = None) -> tuple[Dict, Dict]:
        """Posterior and prior states (B, T, ...) of `embed` (B, T, E) and the actions (B, T, A) that led there."""
        first = torch.zeros(action.shape[:2], dtype=torch.bool, device=action.device)
        return self._observe(embed, action, first, state)

    def obs_step(self, prev_state: Dict, prev_action: Tensor, embed: Tensor) -> tuple[Dict, Dict]:
        """The same of one step, without the axis of time."""
        found = self.observe(embed.unsqueeze(1), prev_action.unsqueeze(1), prev_state)
        return tuple({k: x[:, 0] for k, x in one.items()} for one in found)


class RSSMV2(_Calls):
    """An `nn.RSSM` with the calls of DreamerV2's `common.EnsembleRSSM`, of an ensemble of one.

    Args:
        rssm: of the cell `layernorm_gru`, unimix 0, act `elu` and norm `none` to be its model.

    >>> rssm = RSSM(8, 2, deter_size=16, stoch_size=4, classes=4, hidden_size=16, unimix=0.0, act="elu", norm="none")
    >>> calls = RSSMV2(rssm)
    >>> post, prior = calls.observe(torch.zeros(3, 5, 8), torch.zeros(3, 5, 2), torch.zeros(3, 5))
    >>> calls.get_feat(post).shape, sorted(prior)
    (torch.Size([3, 5, 32]), ['deter', 'logit', 'stoch'])
    """

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, state: Dict | None = None) -> tuple[Dict, Dict]:
        """Posterior and prior states (B, T, ...) of `embed` (B, T, E) and the actions (B, T, A) that led there;
        `is_first` (B, T), of any dtype, resets state and action before the step."""
        return self._observe(embed, action, is_first > 0, state)

    def obs_step(self, prev_state: Dict, prev_action: Tensor, embed: Tensor, is_first: Tensor) -> tuple[Dict, Dict]:
        """The same of one step, without the axis of time."""
        inputs = (x.unsqueeze(1) for x in (embed, prev_action, is_first))
        return tuple({k: x[:, 0] for k, x in one.items()} for one in self.observe(*inputs, prev_state))


def _dict(state: State) -> Dict:
    if state.logits is not None:
        return {"logit": state.logits, "stoch": state.stoch, "deter": state.deter}
    return {"mean": state.mean, "std": state.std, "stoch": state.stoch, "deter": state.deter}


def _state(state: Dict) -> State:
    return State(state["deter"], state["stoch"], state.get("logit"), state.get("mean"), state.get("std"))
