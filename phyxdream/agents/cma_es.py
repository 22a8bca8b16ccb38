"""CMA-ES whose whole state are buffers: `cma` (pycma) for the strategy, tensors for what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import cma


class CMAES(nn.Module):
    """Evolves a normal distribution over vectors towards high fitness, one generation at a call of `evolve`.

    Every generation is made by a `cma.CMAEvolutionStrategy` that is built from the buffers and leaves its new state in
    them. So one that was loaded from a checkpoint goes on exactly as the one that was saved: there is nothing else to
    restore, random numbers included, which depend on the seed and the number of the generation alone.

    The step size follows cumulative path length control in every dimension, the covariance is full: its memory is
    quadratic in `size`.

    Args:
        size: length n of the vectors; the first mean is zero.
        population: vectors in a generation, at least 4.
        sigma: first standard deviation.
        seed: of the samples.

    Attributes:
        mean: (n,) float64, where the distribution is centred: the estimate of the best vector.
        generation: 0-d int64, how many there were.

    Source: Hansen, "The CMA Evolution Strategy: A Tutorial", 2016; CMA-ES/pycma.

    >>> search = CMAES(3, population=8, sigma=0.5, seed=0)
    >>> for _ in range(60):
    ...     fitness = search.evolve(lambda x: -(x - 1).square().sum(-1))
    >>> torch.allclose(search.mean, torch.ones(3, dtype=torch.float64), atol=1e-3)
    True
    """

    def __init__(self, size: int, population: int = 64, sigma: float = 0.1, seed: int = 0):
        super().__init__()
        self.size, self.population, self.initial_sigma, self.seed = size, population, sigma, seed
        for name, value in self._state(self._strategy()).items():
            self.register_buffer(name, torch.tensor(value))

    def evolve(self, judge: Callable[[Tensor], Tensor]) -> Tensor:
        """One generation: `judge` takes vectors (P, n) float64 on the CPU and returns their fitness (P,), which is
        returned."""
        import cma  # takes a second

        strategy = self._strategy()
        for holder, name, own in self._places(strategy):
            value = getattr(self, own).cpu().numpy()
            setattr(holder, name, value.copy() if value.ndim else value.item())
        # What a first generation would have made.
        strategy.timer, strategy.mean_old = cma.utilities.utils.ElapsedWCTime(), strategy.mean
        vectors = np.stack(strategy.ask())
        fitness = judge(torch.from_numpy(vectors))
        strategy.tell(list(vectors), (-fitness.double()).tolist())
        for name, value in self._state(strategy).items():
            getattr(self, name).copy_(torch.as_tensor(value))
        return fitness

    def _strategy(self) -> cma.CMAEvolutionStrategy:
        """A strategy that has not begun, but draws what belongs to this generation."""
        import cma

        generation = int(self.generation) if hasattr(self, "generation") else 0
        random = np.random.default_rng((self.seed, generation))
        options = {
            "popsize": self.population,
            "randn": lambda *shape: random.standard_normal(shape),
            "seed": np.nan,  # leave NumPy's global generator alone
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,  # else another one from 300 dimensions on
            "conditioncov_alleviate": False,  # would change coordinates, which are not among the buffers
            "verbose": -9,
        }
        return cma.CMAEvolutionStrategy(np.zeros(self.size), self.initial_sigma, options)

    @staticmethod
    def _places(strategy: cma.CMAEvolutionStrategy) -> list[tuple[object, str, str]]:
        """Where a strategy keeps what changes from generation to generation: object, attribute, and our buffer."""
        sampler = strategy.sm
        return [
            (strategy, "mean", "mean"),
            (strategy, "sigma", "sigma"),
            (strategy, "pc", "path"),
            (strategy.adapt_sigma, "ps", "sigma_path"),
            (strategy, "countiter", "generation"),
            (sampler, "C", "covariance"),
            # The decomposition of C is renewed only every so often; samples are drawn from this one until then.
            (sampler, "B", "axes"),
            (sampler, "D", "lengths"),
            (sampler, "count_tell", "told"),
            (sampler, "last_update", "decomposed"),
        ]

    def _state(self, strategy: cma.CMAEvolutionStrategy) -> dict[str, np.ndarray]:
        return {own: np.asarray(getattr(holder, name)) for holder, name, own in self._places(strategy)}
