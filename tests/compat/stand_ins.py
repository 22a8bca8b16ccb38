"""Small modules with the names, shapes and conventions of other codebases, written from their equations.

The real ones are not in this repository; `bench/bench_compat.py` runs against checkouts of them.
"""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

S, C, D, U, E, A = 4, 5, 24, 16, 7, 3


def mixed(logits, unimix):
    return (1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]


def multinomial(p):
    """One-hot samples by torch's own sampling, with the gradient of p."""
    index = torch.multinomial(p.detach().reshape(-1, p.shape[-1]), 1, True)
    onehot = F.one_hot(index[:, 0], p.shape[-1]).to(p.dtype).view(p.shape)
    return onehot + p - p.detach()


def cumulative(p):
    """One-hot samples by one uniform number each."""
    level = torch.rand(p.shape[:-1], dtype=p.dtype).unsqueeze(-1)
    index = (level > p.detach().cumsum(-1)).sum(-1).clamp_max(p.shape[-1] - 1)
    return F.one_hot(index, p.shape[-1]).to(p.dtype) + p - p.detach()


def gates(x, h):
    r, c, u = x.chunk(3, -1)
    u = torch.sigmoid(u - 1)
    return u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h


# ---------------------------------------------------------------------------------------------------------------------
# dreamerv3-torch


class GRUCell(nn.Module):
    def __init__(self, inputs, size, eps=1e-3):
        super().__init__()
        self._act, self._update_bias, self._size = torch.tanh, -1, size
        self.layers = nn.Sequential()
        self.layers.add_module("GRU_linear", nn.Linear(inputs + size, 3 * size, bias=False))
        self.layers.add_module("GRU_norm", nn.LayerNorm(3 * size, eps=eps))

    def forward(self, x, state):
        r, c, u = self.layers(torch.cat([x, state[0]], -1)).chunk(3, -1)
        u = torch.sigmoid(u + self._update_bias)
        h = u * self._act(torch.sigmoid(r) * c) + (1 - u) * state[0]
        return h, [h]


class DreamerV3Torch(nn.Module):
    """networks.RSSM"""

    def __init__(
        self, act=nn.SiLU, eps=1e-3, prior_eps=None, unimix=0.01, initial="learned", post_layers=1, prior_layers=1,
        discrete=C,
    ):  # fmt: skip
        super().__init__()
        self._stoch, self._discrete, self._deter, self._hidden = S, discrete, D, U
        self._rec_depth, self._unimix_ratio, self._initial, self._num_actions = 1, unimix, initial, A

        def layers(inputs, count=1, eps=eps):
            found = []
            for _ in range(count):
                found += [nn.Linear(inputs, U, bias=False), nn.LayerNorm(U, eps=eps), act()]
                inputs = U
            return nn.Sequential(*found)

        self._img_in_layers = layers(S * C + A)
        self._cell = GRUCell(U, D, eps)
        self._img_out_layers = layers(D, prior_layers, prior_eps or eps)
        self._obs_out_layers = layers(D + E, post_layers)
        self._imgs_stat_layer, self._obs_stat_layer = nn.Linear(U, S * C), nn.Linear(U, S * C)
        if initial == "learned":
            self.W = nn.Parameter(torch.zeros(1, D))

    def initial(self, batch):
        like = self._obs_stat_layer.weight
        zeros = like.new_zeros(batch, S, C)
        state = dict(logit=zeros, stoch=zeros, deter=like.new_zeros(batch, D))
        if self._initial == "learned":
            state["deter"] = torch.tanh(self.W).repeat(batch, 1)
            logit = mixed(self._stats(self._img_out_layers, self._imgs_stat_layer, state["deter"]), self._unimix_ratio)
            logit = logit.log() - logit.log().logsumexp(-1, keepdim=True)
            mode = F.one_hot(logit.argmax(-1), C)
            state["stoch"] = mode + logit - logit.detach()  # the gradient of the mode is that of the logits there
        return state

    def _stats(self, layers, out, x):
        return out(layers(x)).unflatten(-1, (S, C))

    def observe(self, embed, action, is_first, state=None):
        posts, priors = [], []
        for t in range(embed.shape[1]):
            state, prior = self.obs_step(state, action[:, t], embed[:, t], is_first[:, t])
            posts.append(state)
            priors.append(prior)
        return tuple({k: torch.stack([x[k] for x in states], 1) for k in states[0]} for states in (posts, priors))

    def imagine_with_action(self, action, state):
        states = []
        for t in range(action.shape[1]):
            state = self.img_step(state, action[:, t])
            states.append(state)
        return {k: torch.stack([x[k] for x in states], 1) for k in states[0]}

    def obs_step(self, prev_state, prev_action, embed, is_first, sample=True):
        if prev_state is None:
            is_first = torch.ones_like(is_first)
            prev_state = self.initial(len(is_first))
        start = self.initial(len(is_first))
        reset = {k: is_first.view(-1, *[1] * (x.dim() - 1)) for k, x in prev_state.items()}
        prev_state = {k: x * (1 - reset[k]) + start[k] * reset[k] for k, x in prev_state.items()}
        prior = self.img_step(prev_state, prev_action * (1 - is_first[:, None]))
        logit = self._stats(self._obs_out_layers, self._obs_stat_layer, torch.cat([prior["deter"], embed], -1))
        return {"stoch": self._sample(logit, sample), "deter": prior["deter"], "logit": logit}, prior

    def img_step(self, prev_state, prev_action, sample=True):
        x = self._img_in_layers(torch.cat([prev_state["stoch"].flatten(1), prev_action], -1))
        for _ in range(self._rec_depth):
            x, _ = self._cell(x, [prev_state["deter"]])
        logit = self._stats(self._img_out_layers, self._imgs_stat_layer, x)
        return {"stoch": self._sample(logit, sample), "deter": x, "logit": logit}

    def _sample(self, logit, sample):
        p = mixed(logit, self._unimix_ratio)
        return multinomial(p) if sample else F.one_hot(p.argmax(-1), C).to(p.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# r2dreamer


class BlockLinear(nn.Module):
    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs // blocks, inputs // blocks, blocks) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        x = x.unflatten(-1, (self.weight.shape[2], -1))
        return torch.einsum("...gi,oig->...go", x, self.weight).flatten(-2) + self.bias


class Reshape(nn.Module):
    def forward(self, x):
        return x.unflatten(-1, (S, C))


class Deter(nn.Module):
    def __init__(self, act, blocks, layers, eps):
        super().__init__()
        self.blocks = blocks
        for i, size in enumerate((D, S * C, A)):
            part = nn.Sequential(nn.Linear(size, U), nn.RMSNorm(U, eps=eps), act())
            self.add_module(f"_dyn_in{i}", part)
        self._dyn_hid, inputs = nn.Sequential(), (3 * U + D // blocks) * blocks
        for i in range(layers):
            self._dyn_hid.add_module(f"dyn_hid_{i}", BlockLinear(inputs, D, blocks))
            self._dyn_hid.add_module(f"norm_{i}", nn.RMSNorm(D, eps=eps))
            self._dyn_hid.add_module(f"act_{i}", act())
            inputs = D
        self._dyn_gru = BlockLinear(D, 3 * D, blocks)

    def forward(self, stoch, deter, action):
        action = action / action.abs().clamp(min=1).detach()
        x = torch.cat([self._dyn_in0(deter), self._dyn_in1(stoch.flatten(1)), self._dyn_in2(action)], -1)
        shared = x.unsqueeze(1).expand(-1, self.blocks, -1)
        x = torch.cat([deter.unflatten(-1, (self.blocks, -1)), shared], -1).flatten(1)
        found = self._dyn_gru(self._dyn_hid(x)).unflatten(-1, (self.blocks, 3, -1))
        return gates(found.transpose(1, 2).flatten(1), deter)


class R2Dreamer(nn.Module):
    """rssm.RSSM"""

    def __init__(self, act=nn.SiLU, eps=1e-4, unimix=0.01, dyn_layers=1, obs_layers=1, img_layers=2):
        super().__init__()
        self._stoch, self._discrete, self._deter, self._unimix_ratio = S, C, D, unimix
        self._deter_net = Deter(act, 4, dyn_layers, eps)

        def head(inputs, count):
            layers = []
            for _ in range(count):
                layers += [nn.Linear(inputs, U), nn.RMSNorm(U, eps=eps), act()]
                inputs = U
            return nn.Sequential(*layers, nn.Linear(U, S * C), Reshape())

        self._obs_net, self._img_net = head(D + E, obs_layers), head(D, img_layers)

    def initial(self, batch):
        like = self._deter_net._dyn_gru.bias
        return like.new_zeros(batch, S, C), like.new_zeros(batch, D)

    def observe(self, embed, action, initial, reset):
        found, (stoch, deter) = [], initial
        for t in range(embed.shape[1]):
            stoch, deter, logit = self.obs_step(stoch, deter, action[:, t], embed[:, t], reset[:, t])
            found.append((stoch, deter, logit))
        return tuple(torch.stack(x, 1) for x in zip(*found, strict=True))

    def obs_step(self, stoch, deter, prev_action, embed, reset):
        keep = lambda x: torch.where(reset.view(-1, *[1] * (x.dim() - 1)), 0.0, x)  # noqa: E731
        deter = self._deter_net(keep(stoch), keep(deter), keep(prev_action))
        logit = self._obs_net(torch.cat([deter, embed], -1))
        return self._sample(logit), deter, logit

    def img_step(self, stoch, deter, prev_action):
        deter = self._deter_net(stoch, deter, prev_action)
        return self.prior(deter)[0], deter

    def prior(self, deter):
        logit = self._img_net(deter)
        return self._sample(logit), logit

    def imagine_with_action(self, stoch, deter, actions):
        found = []
        for t in range(actions.shape[1]):
            stoch, deter = self.img_step(stoch, deter, actions[:, t])
            found.append((stoch, deter))
        return tuple(torch.stack(x, 1) for x in zip(*found, strict=True))

    def _sample(self, logit):
        return F.gumbel_softmax(mixed(logit, self._unimix_ratio).log(), tau=1.0, hard=True)


# ---------------------------------------------------------------------------------------------------------------------
# sheeprl


class MLP(nn.Module):
    def __init__(self, inputs, outputs, act=nn.SiLU, eps: float | None = 1e-3, bias=False, layers=1):
        super().__init__()
        found = []
        for _ in range(layers):
            found += [nn.Linear(inputs, U, bias=bias), *([nn.LayerNorm(U, eps=eps)] if eps else []), act()]
            inputs = U
        self._model = nn.Sequential(*found, *([nn.Linear(U, outputs)] if outputs else []))

    def forward(self, x):
        return self._model(x)


class LayerNormGRUCell(nn.Module):
    def __init__(self, inputs, size, eps, bias):
        super().__init__()
        self.hidden_size, self.linear = size, nn.Linear(inputs + size, 3 * size, bias=bias)
        self.layer_norm = nn.LayerNorm(3 * size, eps=eps)

    def forward(self, x, h):
        return gates(self.layer_norm(self.linear(torch.cat([h, x], -1))), h)


class Recurrent(nn.Module):
    def __init__(self, act, eps, bias, mlp_eps):
        super().__init__()
        self.recurrent_state_size = D
        self.mlp = MLP(S * C + A, None, act, mlp_eps, bias)
        self.rnn = LayerNormGRUCell(U, D, eps, bias)

    def forward(self, x, h):
        return self.rnn(self.mlp(x), h)


class SheeprlV2(nn.Module):
    """dreamer_v2.agent.RSSM"""

    defaults: ClassVar = dict(act=nn.ELU, eps=1e-5, mlp_eps=None, bias=True, unimix=0.0)

    def __init__(self, layers=1, **options):
        super().__init__()
        o = {**self.defaults, **options}
        mlp = o["act"], o["mlp_eps"], o["bias"]
        self.recurrent_model = Recurrent(o["act"], o["eps"], o["bias"], o["mlp_eps"])
        self.representation_model = MLP(D + E, S * C, *mlp, layers)
        self.transition_model = MLP(D, S * C, *mlp, layers)
        self.discrete, self._share = C, o["unimix"]

    def dynamic(self, posterior, recurrent_state, action, embedded_obs, is_first):
        start_h, start_z = self._start(recurrent_state)
        h = (1 - is_first) * recurrent_state + is_first * start_h
        z = (1 - is_first) * posterior.flatten(2) + is_first * start_z
        h = self.recurrent_model(torch.cat([z, (1 - is_first) * action], -1), h)
        prior_logits, prior = self._sampled(self.transition_model(h))
        logits, posterior = self._sampled(self.representation_model(torch.cat([h, embedded_obs], -1)))
        return h, posterior, prior, logits, prior_logits

    def _start(self, h):
        return torch.zeros_like(h), h.new_zeros(*h.shape[:2], S * C)

    def imagination(self, prior, recurrent_state, actions):
        h = self.recurrent_model(torch.cat([prior, actions], -1), recurrent_state)
        return self._sampled(self.transition_model(h))[1], h

    def _sampled(self, logits):
        logits = logits.unflatten(-1, (S, C))
        if self._share:
            eps = torch.finfo(logits.dtype).eps
            logits = mixed(logits, self._share).clamp(eps, 1 - eps).log()
        return logits.flatten(2), multinomial(logits.softmax(-1))


class SheeprlV3(SheeprlV2):
    """dreamer_v3.agent.RSSM"""

    defaults: ClassVar = dict(act=nn.SiLU, eps=1e-3, mlp_eps=1e-3, bias=False, unimix=0.01)

    def __init__(self, **options):
        super().__init__(**options)
        self.unimix = self._share
        self.initial_recurrent_state = nn.Parameter(torch.zeros(D))

    def get_initial_states(self, batch):
        h = torch.tanh(self.initial_recurrent_state).expand(*batch, -1)
        logits = self.transition_model(h).unflatten(-1, (S, C))
        return h, F.one_hot(logits.argmax(-1), C).to(h.dtype)

    def _start(self, h):
        start, z = self.get_initial_states(h.shape[:2])
        return start, z.flatten(2)


class RecurrentV1(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(S + A, D), act())
        self.rnn = nn.GRU(D, D)

    def forward(self, x, h):
        return self.rnn(self.mlp(x), h)


class SheeprlV1(nn.Module):
    """dreamer_v1.agent.RSSM"""

    def __init__(self, act=nn.ELU, min_std=0.1):
        super().__init__()
        self.recurrent_model, self.min_std = RecurrentV1(act), min_std
        self.representation_model = MLP(D + E, 2 * S, act, None, True)
        self.transition_model = MLP(D, 2 * S, act, None, True)

    def dynamic(self, posterior, recurrent_state, action, embedded_obs):
        _, h = self.recurrent_model(torch.cat([posterior, action], -1), recurrent_state)
        prior_moments, prior = self._sampled(self.transition_model(h))
        moments, posterior = self._sampled(self.representation_model(torch.cat([h, embedded_obs], -1)))
        return h, posterior, prior, moments, prior_moments

    def imagination(self, stochastic_state, recurrent_state, actions):
        _, h = self.recurrent_model(torch.cat([stochastic_state, actions], -1), recurrent_state)
        return self._sampled(self.transition_model(h))[1], h

    def _sampled(self, x):
        mean, raw = x.chunk(2, -1)
        std = F.softplus(raw) + self.min_std
        return (mean, std), torch.distributions.Normal(mean, std).rsample()


# ---------------------------------------------------------------------------------------------------------------------
# torchrl


class GainRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TorchrlBlockLinear(nn.Module):
    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, inputs // blocks, outputs // blocks) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        x = x.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...bi,bio->...bo", x, self.weight).flatten(-2) + self.bias


def _normed(inputs, outputs, eps):
    return [nn.Linear(inputs, outputs), GainRMSNorm(outputs, eps), nn.SiLU()]


class BlockGRU(nn.Module):
    def __init__(self, blocks=4, eps=1e-4):
        super().__init__()
        self.belief_dim, self.num_blocks = D, blocks
        self.belief_projection = nn.Sequential(*_normed(D, U, eps))
        self.state_projection = nn.Sequential(*_normed(S * C, U, eps))
        self.action_projection = nn.Sequential(*_normed(A, U, eps))
        linear = TorchrlBlockLinear(D + 3 * U * blocks, D, blocks)
        self.hidden_layers = nn.Sequential(linear, GainRMSNorm(D, eps), nn.SiLU())
        self.gates = TorchrlBlockLinear(D, 3 * D, blocks)

    def forward(self, state, belief, action):
        action = action / action.detach().abs().clamp_min(1)
        parts = [self.belief_projection(belief), self.state_projection(state), self.action_projection(action)]
        shared = torch.cat(parts, -1).unsqueeze(-2)
        shared = shared.expand(*shared.shape[:-2], self.num_blocks, -1)
        hidden = torch.cat([belief.unflatten(-1, (self.num_blocks, -1)), shared], -1).flatten(-2)
        found = self.gates(self.hidden_layers(hidden)).unflatten(-1, (self.num_blocks, 3, -1))
        return gates(found.transpose(-3, -2).flatten(-3), belief)


class TorchrlPrior(nn.Module):
    """RSSMPriorV3"""

    def __init__(self, recurrent_model="block_gru", unimix=0.01, eps=1e-4, draw=multinomial):
        super().__init__()
        self.draw = draw
        self.num_categoricals, self.num_classes, self.unimix, self.recurrent_model = S, C, unimix, recurrent_model
        if recurrent_model == "block_gru":
            self.rnn = BlockGRU(eps=eps)
            layers = [*_normed(D, U, eps), *_normed(U, U, eps), nn.Linear(U, S * C)]
            self.rnn_to_prior_projector = nn.Sequential(*layers)
        else:
            self.rnn = nn.GRUCell(U, D)
            self.action_state_projector = nn.Sequential(nn.Linear(S * C + A, U), nn.SiLU())
            self.rnn_to_prior_projector = nn.Sequential(nn.Linear(D, U), nn.SiLU(), nn.Linear(U, S * C))

    def forward(self, state, belief, action):
        if self.recurrent_model == "block_gru":
            belief = self.rnn(state, belief, action)
        else:
            belief = self.rnn(self.action_state_projector(torch.cat([state, action], -1)), belief)
        logits = self.rnn_to_prior_projector(belief).unflatten(-1, (S, C))
        return logits, self.draw(mixed(logits, self.unimix)).flatten(-2), belief


class TorchrlPosterior(nn.Module):
    """RSSMPosteriorV3"""

    def __init__(self, use_rms_norm=True, unimix=0.01, eps=1e-4, draw=multinomial):
        super().__init__()
        self.draw = draw
        self.num_categoricals, self.num_classes, self.unimix = S, C, unimix
        layers = _normed(D + E, U, eps) if use_rms_norm else [nn.Linear(D + E, U), nn.SiLU()]
        self.obs_rnn_to_post_projector = nn.Sequential(*layers, nn.Linear(U, S * C))

    def forward(self, belief, embedding):
        logits = self.obs_rnn_to_post_projector(torch.cat([belief, embedding], -1)).unflatten(-1, (S, C))
        return logits, self.draw(mixed(logits, self.unimix)).flatten(-2)


class Keyed(nn.Module):
    """TensorDictModule"""

    def __init__(self, module, in_keys, out_keys):
        super().__init__()
        self.module, self.in_keys, self.out_keys = module, in_keys, out_keys

    def forward(self, data):
        for key, x in zip(self.out_keys, self.module(*(data.get(k) for k in self.in_keys)), strict=True):
            data.set(key, x)


class TorchrlRollout(nn.Module):
    """RSSMRolloutV3"""

    def __init__(self, recurrent_model="block_gru", reset_key="is_init", draw=multinomial):
        super().__init__()
        next_ = [("next", k) for k in ("prior_logits", "state", "belief", "encoded_latents", "posterior_logits")]
        logits, state, belief, embed, post = next_
        prior = TorchrlPrior(recurrent_model, draw=draw)
        posterior = TorchrlPosterior(recurrent_model == "block_gru", draw=draw)
        self.rssm_prior = Keyed(prior, ["state", "belief", "action"], [logits, state, belief])
        self.rssm_posterior = Keyed(posterior, [belief, embed], [post, state])
        self.out_keys = [logits, state, belief, post]
        self.reset_key, self.action_key = reset_key, "action"

    def forward(self, data):
        found, steps = [], data.exclude(*self.out_keys).unbind(-1)
        for t, step in enumerate(steps):
            if t:
                step.set("state", found[-1].get(("next", "state")))
                step.set("belief", found[-1].get(("next", "belief")))
            reset = step.get(self.reset_key, None) if self.reset_key else None
            for key in ("state", "belief", self.action_key) if reset is not None else ():
                step.set(key, torch.where(reset, 0.0, step.get(key)))
            self.rssm_prior(step)
            self.rssm_posterior(step)
            found.append(step)
        return torch.stack(found, data.ndim - 1)


# ---------------------------------------------------------------------------------------------------------------------
# RLlib


class Net(nn.Module):
    def __init__(self, inputs, act=nn.SiLU, eps=1e-5):
        super().__init__()
        self._net = nn.Sequential(nn.Linear(inputs, U, bias=False), nn.LayerNorm(U, eps=eps), act())

    def forward(self, x):
        return self._net(x)


class Representation(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_categoricals, self.num_classes_per_categorical = S, C
        self.z_generating_layer = nn.Linear(U, S * C)

    def forward(self, x):
        p = mixed(self.z_generating_layer(x).view(-1, S, C), 0.01)
        return multinomial(p), p


class NormedGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell_size, self.linear = D, nn.Linear(U + D, 3 * D, bias=False)
        self.layer_norm = nn.LayerNorm(3 * D, eps=1e-5)

    def forward(self, x, h):
        h = gates(self.layer_norm(self.linear(torch.cat([h, x], -1))), h)
        return h, h


class Sequence(nn.Module):
    def __init__(self, normed):
        super().__init__()
        self.pre_gru_layer, self.gru_unit = Net(S * C + A), NormedGRU() if normed else nn.GRU(U, D)

    def forward(self, a, h, z):
        x = self.pre_gru_layer(torch.cat([z.flatten(1), a], -1))
        return self.gru_unit(x.unsqueeze(0), h.unsqueeze(0))[0][0]


class Dynamics(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.representation_layer = Net(D), Representation()

    def forward(self, h):
        return self.representation_layer(self.mlp(h))


class Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D + S * C, 2)

    def forward(self, h, z, **returns):
        found = self.out(torch.cat([h, z.flatten(1)], -1))
        return (found[:, 0], found) if returns else found


class RLlib(nn.Module):
    """WorldModel"""

    def __init__(self, batch_length_T=5, normed=False):
        super().__init__()
        self.batch_length_T, self.symlog_obs, self.num_gru_units = batch_length_T, True, D
        self.encoder, self.decoder = nn.Linear(6, E), Predictor()
        self.reward_predictor, self.continue_predictor = Predictor(), Predictor()
        self.posterior_mlp, self.posterior_representation_layer = Net(D + E), Representation()
        self.dynamics_predictor, self.sequence_model = Dynamics(), Sequence(normed)
        self.initial_h = nn.Parameter(torch.zeros(D))

    def get_initial_state(self):
        h = torch.tanh(self.initial_h).unsqueeze(0)
        return {"h": h, "z": F.one_hot(self.dynamics_predictor(h)[1].argmax(-1), C)}

    def forward_train(self, observations, actions, is_first):
        B, T = actions.shape[:2]
        if self.symlog_obs:
            observations = torch.sign(observations) * torch.log1p(observations.abs())
        folded = observations.flatten(0, 1)
        embed, start = self.encoder(folded).view(B, T, -1), self.get_initial_state()
        h, z = (x.expand(B, *x.shape[1:]) for x in (start["h"], start["z"]))
        found = []
        for t in range(self.batch_length_T):
            first = is_first[:, t].to(h.dtype).unsqueeze(1)
            h = h * (1 - first) + start["h"] * first
            z = z * (1 - first.unsqueeze(2)) + start["z"] * first.unsqueeze(2)
            h = self.sequence_model(actions[:, t - 1] * (1 - first), h, z)
            z, post = self.posterior_representation_layer(self.posterior_mlp(torch.cat([embed[:, t], h], -1)))
            found.append((h, z, post, self.dynamics_predictor(h)[1]))
        hs, zs, posts, priors = (torch.stack(x, 1).flatten(0, 1) for x in zip(*found, strict=True))
        rewards, logits = self.reward_predictor(hs, zs, return_logits=True)
        continues, distribution = self.continue_predictor(hs, zs, return_distribution=True)
        return {
            "sampled_obs_symlog_BxT": folded,
            "obs_distribution_means_BxT": self.decoder(hs, zs),
            "reward_logits_BxT": logits,
            "rewards_BxT": rewards,
            "continue_distribution_BxT": distribution,
            "continues_BxT": continues,
            "h_states_BxT": hs,
            "z_posterior_states_BxT": zs,
            "z_posterior_probs_BxT": posts,
            "z_prior_probs_BxT": priors,
        }


# ---------------------------------------------------------------------------------------------------------------------
# slot attention


class SlotAttention(nn.Module):
    def __init__(self, bias=True, sequence=False, split=False, dim=8, hidden=12, eps=1e-8, log="slots_logsigma"):
        super().__init__()
        self.num_slots, self.iters, self.eps, self.scale, self._log = 3, 3, eps, dim**-0.5, log
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        setattr(self, log, nn.Parameter(0.1 * torch.randn(1, 1, dim)))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.gru = nn.GRU(dim, dim) if sequence else nn.GRUCell(dim, dim)
        if split:
            self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        else:
            self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm_input, self.norm_slots, self.norm_pre_ff = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, inputs, num_slots=None):
        B, _, dim = inputs.shape
        K = num_slots or self.num_slots
        mean, std = self.slots_mu.expand(B, K, -1), getattr(self, self._log).exp().expand(B, K, -1)
        slots = mean + std * torch.randn(mean.shape, dtype=inputs.dtype)
        x = self.norm_input(inputs)
        k, v = self.to_k(x), self.to_v(x)
        for _ in range(self.iters):
            q = self.to_q(self.norm_slots(slots))
            share = (q @ k.transpose(1, 2) * self.scale).softmax(1) + self.eps
            updates = (share / share.sum(-1, keepdim=True)) @ v
            if isinstance(self.gru, nn.GRU):
                slots = self.gru(updates.reshape(1, -1, dim), slots.reshape(1, -1, dim))[0].view(slots.shape)
            else:
                slots = self.gru(updates.reshape(-1, dim), slots.reshape(-1, dim)).view(slots.shape)
            hidden = self.norm_pre_ff(slots)
            hidden = self.fc2(self.fc1(hidden).relu()) if hasattr(self, "fc1") else self.mlp(hidden)
            slots = slots + hidden
        return slots
