"""Planning in latent space: the cross-entropy method (CEM) over action sequences, as PlaNet does it.

    belief     one distribution for each of H actions: N(0, 1), or uniform over discrete actions
    repeat     draw N sequences a_1..a_H from the belief, imagine the states s_1..s_H that follow each of them
               score = Σ_t (Π_{s<t} c_s) r_t      r_t reward and c_s continuation predicted at the imagined states
               refit the belief to the K sequences of the highest score
    act        mean of the first action, or the most likely one

Imagined states are samples. PlaNet draws noise of its own for every candidate. With noise common to all candidates of
an environment, drawn anew at every iteration, their scores differ by their actions alone (common random numbers), and
there is N times less of it to draw.

A reward counts as far as the episode still runs when it is earned; that of the state an episode ends in does count.
`c` has the discount in it, as everywhere here; where continuation is not learned and the discount is 1, as in PlaNet,
the score is the plain sum of rewards.

Source: Hafner et al., "Learning Latent Dynamics for Planning from Pixels", 2019, algorithm 2; google-research/planet.
PlaNet's actions are continuous; categorical beliefs are ours, the same method with the elites' frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream.agents.lambda_behaviour import state_weights
from phyxdream.nn.rssm import State


class Imagines(Protocol):
    """What a planner needs of a world model: `rssm.imagine`, its noise, and heads whose distributions have a mean."""

    rssm: nn.Module
    reward: nn.Module
    cont: nn.Module


@dataclass
class NormalBelief:
    """Independent normals over H continuous actions of B plans: mean and std (H, B, A)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def start(cls, shape: tuple[int, int, int], like: Tensor) -> NormalBelief:
        """N(0, 1)."""
        return cls(like.new_zeros(shape), like.new_ones(shape))

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """(H, B, count, A) within [−1, 1]."""
        H, B, A = self.mean.shape
        noise = torch.randn(H, B, count, A, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return (self.mean.unsqueeze(2) + self.std.unsqueeze(2) * noise).clamp_(-1, 1)

    @classmethod
    def fit(cls, elites: Tensor) -> NormalBelief:
        """Mean and std of action sequences (H, B, K, A)."""
        variance, mean = torch.var_mean(elites, 2, correction=0)
        return cls(mean, (variance + 1e-6).sqrt())

    @property
    def best(self) -> Tensor:
        """The first action (B, A)."""
        return self.mean[0]


@dataclass
class CategoricalBelief:
    """Independent categoricals over H one-hot actions of B plans: probs (H, B, A)."""

    probs: Tensor

    @classmethod
    def start(cls, shape: tuple[int, int, int], like: Tensor) -> CategoricalBelief:
        """Uniform."""
        return cls(like.new_full(shape, 1 / shape[-1]))

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """(H, B, count, A), one-hot."""
        H, B, A = self.probs.shape
        race = self.probs.new_empty(H, B, count, A).exponential_(generator=generator)
        return F.one_hot((race / self.probs.unsqueeze(2)).argmin(-1), A).to(race)

    @classmethod
    def fit(cls, elites: Tensor) -> CategoricalBelief:
        """How often action sequences (H, B, K, A) take each action; what none of them takes is not drawn again."""
        return cls(elites.mean(2))

    @property
    def best(self) -> Tensor:
        """The first action (B, A), one-hot."""
        return F.one_hot(self.probs[0].argmax(-1), self.probs.shape[-1]).to(self.probs)


Belief = NormalBelief | CategoricalBelief


@dataclass(frozen=True)
class Planner:
    """CEM for B environments at once: every iteration imagines all their candidates in one call of `rssm.imagine`.

    Args:
        action_size: A.
        discrete: whether actions are one-hot; else they lie within [−1, 1].
        horizon: number H of actions in a plan.
        candidates: plans drawn for each environment at an iteration.
        iterations: how often the belief is refitted.
        elites: of how many candidates.
        noise: of imagined states, `own` of every candidate or `common` to all of an environment.
    """

    action_size: int
    discrete: bool
    horizon: int = 12
    candidates: int = 1000
    iterations: int = 10
    elites: int = 100
    noise: str = "own"

    @torch.no_grad()
    def __call__(self, world_model: Imagines, state: State, generator: torch.Generator | None = None) -> Tensor:
        """The action (B, A) to take at states (B, ...)."""
        # The same for all iterations, without the statistics, which imagination does not read.
        starts = State(state.deter, state.stoch).map(lambda x: x.repeat_interleave(self.candidates, 0))
        belief = self.start(state)
        for _ in range(self.iterations):
            action = belief.sample(self.candidates, generator)
            noise = self.draw_noise(world_model, state, generator)
            score = self.score(world_model, starts, action.flatten(1, 2), noise)
            belief = self.refit(belief, action, score.view(-1, self.candidates))
        return belief.best

    def start(self, state: State) -> Belief:
        """What is believed of the best plans at states (B, ...) before any was tried."""
        kind = CategoricalBelief if self.discrete else NormalBelief
        return kind.start((self.horizon, state.deter.shape[0], self.action_size), state.deter)

    def draw_noise(self, world_model: Imagines, state: State, generator: torch.Generator | None) -> Tensor:
        """Noise (H, B·N, ...) of the states imagined from states (B, ...)."""
        B, draw = state.deter.shape[0], world_model.rssm.draw_noise
        if self.noise == "own":
            return draw(self.horizon, B * self.candidates, generator=generator)
        return draw(self.horizon, B, generator=generator).repeat_interleave(self.candidates, 1)

    def score(self, world_model: Imagines, state: State, action: Tensor, noise: Tensor) -> Tensor:
        """What actions (H, M, A) are expected to earn from states (M, ...): (M,)."""
        feature = world_model.rssm.imagine(action, state, noise).feature
        reward, cont = world_model.reward(feature).mean, world_model.cont(feature).mean
        return (state_weights(cont) * reward).sum(0)

    def refit(self, belief: Belief, action: Tensor, score: Tensor) -> Belief:
        """The belief after candidates (H, B, N, A) scored (B, N)."""
        index = score.topk(self.elites, sorted=False).indices
        index = index.view(1, *index.shape, 1).expand(len(action), -1, -1, action.shape[-1])
        return belief.fit(action.gather(2, index))
