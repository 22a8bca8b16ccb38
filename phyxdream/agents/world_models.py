"""World Models: what is seen, what is expected, and a small controller that is evolved in dreams.

    V  vision      VAE of every observation, squared error + KL(q(z) ‖ N(0, 1)); Adam
    M  memory      MDN-LSTM over [z, a]: mixtures of normals for the next z, reward, termination, on z of which V learns
                   nothing; (−log p(z) + squared error + cross-entropy) / (dimensions of z + 2); RMSprop
    C  controller  a linear map of [z, h], continuous actions through tanh, discrete ones the best score; CMA-ES, whose
                   fitness is what dreams pay: Σ_t P(the episode goes on until t) · reward_t
    dreams         all controllers of a generation at once, from the same replayed situations with the same noise
    data           random actions until there was a generation, then the distribution's mean with exploration noise

The paper trains V, M and C one after the other and, for harder tasks, again on what the last controller sees. Here all
three are trained along the way: V and M at every update, C by a generation every few of them.

Source: Ha & Schmidhuber, "World Models", 2018; ctallec/world-models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream import distributed
from phyxdream.agents.cma_es import CMAES
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.learner import Learner
from phyxdream.agents.optimizer import ClippedAdam
from phyxdream.agents.world_model import Batch, WorldModel, WorldModelOutput
from phyxdream.nn.heads import BernoulliHead, ScalarHead
from phyxdream.nn.layers import linear
from phyxdream.nn.mdn_lstm import MDNLSTM
from phyxdream.nn.rssm import State
from phyxdream.nn.vision import Decoder, Encoder


class Part(nn.Module):
    """A module that reads a part of the feature [h, c, z] alone."""

    def __init__(self, module: nn.Module, part: slice):
        super().__init__()
        self.module, self.part = module, part

    def forward(self, feature: Tensor):
        return self.module(feature[..., self.part])


class VisionAndMemory(WorldModel):
    """V and M as a `WorldModel`: embeddings are the mean and the log-deviation of q(z), the `rssm` is an `MDNLSTM`,
    whose states have h and c in deter and z in stoch, and losses have the names of what they are nearest to.

    What is filtered, to act and to show, takes the mean of q(z); M is trained on samples, so that it knows how sure V
    is.
    """

    def make_encoder(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, nn.Module, int]:
        encoder = Encoder(shapes, layers=self.config.encoder_layers, **self.vision)
        size = 2 * self.config.stoch_size
        return encoder, linear(encoder.out_size, size), size

    def make_rssm(self, embed_size: int, action_size: int) -> MDNLSTM:
        c = self.config
        return MDNLSTM(c.stoch_size, action_size, c.deter_size, c.mixtures)

    def make_decoder(self, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """z to a distribution per observation."""
        c = self.config
        decoder = Decoder(c.stoch_size, shapes, layers=c.decoder_layers, l1=c.l1_coeff, **self.vision)
        return Part(decoder, slice(-c.stoch_size, None))

    def make_head(self, make: Callable[[int], nn.Module]) -> nn.Module:
        """A head that reads h."""
        H = self.config.deter_size
        return Part(make(H), slice(H))

    def make_reward(self) -> nn.Module:
        return self.make_head(lambda size: ScalarHead(size, units=0, layers=0))

    def make_cont(self) -> nn.Module:
        """h to the chance to go on."""
        return self.make_head(lambda size: BernoulliHead(size, units=0, layers=0))

    @property
    def latent_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return super().latent_spec | {"deter": ((2 * self.config.deter_size,), "bfloat16")}

    def filter(self, batch: Batch, state: State | None = None, generator: torch.Generator | None = None) -> State:
        mean, _ = self.embed(batch).chunk(2, -1)
        return self.rssm.filter(mean, batch["action"], batch["is_first"], state)

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None, state: State | None = None
    ) -> WorldModelOutput:
        """As `WorldModel.loss`. Nothing was there to expect a first step from, so M is not asked for it."""
        mean, log_std = self.embed(batch).chunk(2, -1)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        given = z.detach()
        deter = self.rssm.filter(given, batch["action"], batch["is_first"], state).deter
        post = State(deter, z)
        feature, asked = post.feature, (~batch["is_first"]).to(z.dtype)
        decoded = self.decoder(feature)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)
        losses = {
            "representation": kl.clamp(min=self.config.free_nats),
            "dynamics": asked * self.rssm.expect(self.rssm.hidden(deter)).loss(given),
            "reward": asked * (self.reward(feature).mean - batch["reward"]).square(),
            "continue": asked * self.cont(feature).loss(~batch["is_terminal"]),
            **{name: decoded[name].loss(self.target(batch[name])) for name in self.names},
        }
        return WorldModelOutput(losses, post, {"kl": kl.detach().mean()})

    def loss_coeff(self, name: str) -> float:
        c = self.config
        return {
            "representation": c.kl_loss_coeff * c.representation_coeff,
            "dynamics": c.dynamics_coeff / (c.stoch_size + 2),
            "reward": c.reward_coeff / (c.stoch_size + 2),
            "continue": c.continue_coeff / (c.stoch_size + 2),
        }.get(name, c.reconstruction_coeff)


class Controller(nn.Module):
    """Features [h, c, z] to actions, linear in [z, h], with weights that CMA-ES looks for.

    Args:
        hidden_size: H. stoch_size: S. action_size: A.
        discrete: actions are one-hot, at the highest score; else tanh of the scores.
        search: builds a `CMAES` for a number of weights.

    The weights (n,) = (A · (S + H + 1),) are rows [z, h, bias], one for each dimension of the action.
    """

    def __init__(
        self, hidden_size: int, stoch_size: int, action_size: int, discrete: bool, search: Callable[[int], CMAES]
    ):
        super().__init__()
        self.hidden_size, self.stoch_size, self.action_size = hidden_size, stoch_size, action_size
        self.discrete = discrete
        self.search = search(action_size * (stoch_size + hidden_size + 1))

    def act(self, weights: Tensor, feature: Tensor) -> Tensor:
        """Actions (P, N, A) of P controllers with weights (P, n) at features (P, N, F), each at its own."""
        inputs = torch.cat([feature[..., -self.stoch_size :], feature[..., : self.hidden_size]], -1)
        weights = weights.to(inputs).unflatten(-1, (self.action_size, -1))
        scores = torch.baddbmm(weights[:, None, :, -1], inputs, weights[..., :-1].mT)
        if self.discrete:
            return F.one_hot(scores.argmax(-1), self.action_size).to(scores)
        return torch.tanh(scores)

    def forward(self, feature: Tensor) -> Tensor:
        """The action (..., A) of the best controller so far, the mean of the search, at features (..., F)."""
        flat = feature.reshape(1, -1, feature.shape[-1])
        return self.act(self.search.mean[None], flat).view(*feature.shape[:-1], -1)


class WorldModels(Learner):
    """The learned parts of the agent and what they are trained on; the arguments are those of `Learner`."""

    recordable = False  # CMA-ES is on the host

    def __init__(self, config: DreamerConfig, shapes: Mapping[str, tuple[int, ...]], action_size: int, discrete: bool):
        super().__init__(config, shapes, action_size, discrete)
        c = config
        search = partial(CMAES, population=c.population, sigma=c.cma_sigma, seed=c.seed)
        self.actor = Controller(c.deter_size, c.stoch_size, action_size, discrete, search)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("next_generation", torch.tensor(c.evolve_after))
        self.register_buffer("dreamt", torch.zeros(2))  # mean and highest fitness of the last generation

    def make_world_model(self, shapes: Mapping[str, tuple[int, ...]], action_size: int) -> VisionAndMemory:
        return VisionAndMemory(self.config, shapes, action_size)

    def make_optimizer(self) -> ClippedAdam:
        c, v = self.config, self.world_model
        vision, memory = (v.encoder, v.project, v.decoder), (v.rssm, v.reward, v.cont)
        groups = [
            dict(params=[p for part in parts for p in part.parameters()], betas=betas)
            # RMSprop is Adam without momentum, but for the correction of the bias in the first updates.
            for parts, betas in ((vision, (c.beta1, c.beta2)), (memory, (0.0, 0.9)))
        ]
        return ClippedAdam(groups, lr=c.learning_rate, clip=c.grad_clip, eps=c.adam_eps, decay=c.weight_decay)

    def act(self, post: State, generator: torch.Generator | None, explore: bool) -> Tensor:
        if explore and self.actor.search.generation == 0:
            return self.random_action(post, generator)
        action = self.actor(post.feature)
        return self.add_noise(action, generator) if explore else action

    def behaviour(
        self, post: State, batch: Batch, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A generation of controllers where one is due; no losses."""
        search, last = self.actor.search, slice(-len(post.deter), None)
        starts = self.starts(batch["is_first"])[last] & ~batch["is_terminal"][last]
        # Several processes evolve one population: each waits until all have something to dream of.
        if self.updates >= self.next_generation and distributed.mean(starts.any().float()) == 1:
            self.next_generation.copy_(self.updates + self.config.evolve_every)
            chosen = torch.multinomial(
                starts.flatten().float(), self.config.dreams, replacement=True, generator=generator
            )
            start = post.detach().flatten()[chosen]

            def judge(controllers: Tensor) -> Tensor:
                returns = self.dream(controllers.to(start.deter), start, generator)
                return distributed.mean(returns.mean(-1)).cpu()

            fitness = search.evolve(judge)
            self.dreamt.copy_(torch.stack([fitness.mean(), fitness.max()]))
        metrics = {"dream_return": self.dreamt[0], "best_dream_return": self.dreamt[1],
                   "generation": search.generation.float(), "cma_sigma": search.sigma.float()}  # fmt: skip
        return {}, {name: value.clone() for name, value in metrics.items()}

    def starts(self, is_first: Tensor) -> Tensor:
        """Which steps (T, B) of a batch dreams may start at."""
        if self.config.dream_start == "anywhere":
            return torch.ones_like(is_first)
        found = is_first.clone()
        found[0] = False  # where a sequence was cut out of its episode it says is_first too
        return found

    @torch.no_grad()
    def dream(self, controllers: Tensor, start: State, generator: torch.Generator | None = None) -> Tensor:
        """What dreams pay: (P, N) for controllers with weights (P, n) that all start at states (N, ...) and dream with
        the same noise: what differs between them is what they do."""
        c, model = self.config, self.world_model
        P, N = len(controllers), len(start.deter)
        uniform, normal = model.rssm.draw_noise(c.imagine_horizon, N, generator=generator)
        state = start.map(lambda x: x.repeat(P, 1))
        total, weight = start.deter.new_zeros(P * N), start.deter.new_ones(P * N)
        for noise in zip(uniform.repeat(1, P, 1), normal.repeat(1, P, 1), strict=True):
            action = self.actor.act(controllers, state.feature.view(P, N, -1)).flatten(0, 1)
            state = model.rssm.step(state, action, noise, c.dream_temperature)
            feature = state.feature
            total += weight * model.reward(feature).mean
            weight *= c.discount * model.cont(feature).mean
        return total.view(P, N)

    def after_update(self) -> None:
        """What follows each optimiser step: it is counted."""
        self.updates += 1
