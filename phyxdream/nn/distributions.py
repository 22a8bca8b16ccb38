"""The distributions of the family, and the divergences between latent states.

Each has `mode` and `log_prob`, those of actors also `sample(generator)` and `entropy(generator)`, those of heads
`loss(target)`.
The last axis (classes, bins or action dimensions) is the event; everything before it is batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from phyxdream import ops
from phyxdream.nn.layers import symexp, symlog
from phyxdream.nn.rssm import State
from phyxdream.ops.balanced_kl import categorical_kl, gaussian_kl

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class TwoHotSymlog:
    """A scalar as a categorical over bins that are evenly spaced in symlog space (DreamerV3).

    Args:
        logits: (..., bins).
        bins: (bins,) positions in the scalar's own space, ascending and symmetric around 0 (`symexp_bins`).
    """

    def __init__(self, logits: Tensor, bins: Tensor):
        self.logits, self.bins = logits, bins

    @property
    def mode(self) -> Tensor:
        """(...): the expectation; exactly 0 where the logits are equal."""
        return ops.two_hot_mean(self.logits, self.bins)

    mean = mode

    def log_prob(self, target: Tensor) -> Tensor:
        """(...): log-likelihood of the target split over its two neighbouring bins; no gradient to the target."""
        return -self.loss(target)

    def loss(self, target: Tensor) -> Tensor:
        """(...): cross-entropy against the two-hot target."""
        return ops.two_hot_loss(self.logits, target.to(self.bins.dtype), self.bins)


def symexp_bins(count: int = 255, limit: float = 20.0) -> Tensor:
    """(count,) bins symexp(linspace(−limit, limit)), exactly symmetric."""
    low = symexp(torch.linspace(-limit, 0, count // 2 + 1, dtype=torch.float64))[: (count + 1) // 2]
    return torch.cat([low, -low[: count // 2].flip(0)]).float()


class Bernoulli:
    """A yes/no event from a logit (...,), the continuation head's distribution."""

    def __init__(self, logit: Tensor):
        self.logit = logit

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logit)

    @property
    def mode(self) -> Tensor:
        return (self.logit > 0).to(self.logit.dtype)

    def log_prob(self, target: Tensor) -> Tensor:
        return -self.loss(target)

    def loss(self, target: Tensor) -> Tensor:
        """(...): cross-entropy; the target may be any probability in [0, 1]."""
        return F.binary_cross_entropy_with_logits(self.logit, target.to(self.logit.dtype), reduction="none")


class Normal:
    """Independent normals over the last axis, unclipped: the bounded-normal actor and Gaussian heads."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        return (-0.5 * ((x - self.mean) / self.std).square() - self.std.log() - LOG_SQRT_2PI).sum(-1)

    def entropy(self, generator: torch.Generator | None = None) -> Tensor:
        return (self.std.log() + 0.5 + LOG_SQRT_2PI).sum(-1)

    def loss(self, target: Tensor) -> Tensor:
        return -self.log_prob(target)


class UnitNormal:
    """Scalars (...) of unit variance: rewards and values of V1 and V2."""

    def __init__(self, mean: Tensor):
        self.mean = mean

    @property
    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.loss(x) - LOG_SQRT_2PI

    def loss(self, target: Tensor) -> Tensor:
        """(...): half the squared error, which is −log p but for a constant."""
        return 0.5 * (self.mean - target).square()


class Constant:
    """A number that nothing is learned about: V1's discount where episodes do not end."""

    def __init__(self, mean: Tensor):
        self.mean = self.mode = mean

    def loss(self, target: Tensor) -> Tensor:
        return torch.zeros_like(target)


class TanhNormal:
    """tanh of independent normals over the last axis (DreamerV1's actor); entropy is estimated from one sample."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.base = Normal(mean, std)

    @property
    def mode(self) -> Tensor:
        return torch.tanh(self.base.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.tanh(self.base.sample(generator))

    def log_prob(self, x: Tensor) -> Tensor:
        # A saturated float32 action would have infinite density; stay one rounding step inside.
        limit = 1 - torch.finfo(x.dtype).eps
        raw = torch.atanh(x.clamp(-limit, limit))
        return self.base.log_prob(raw) - self._log_slope(raw).sum(-1)

    def entropy(self, generator: torch.Generator | None = None) -> Tensor:
        return self.base.entropy() + self._log_slope(self.base.sample(generator)).sum(-1)

    @staticmethod
    def _log_slope(raw: Tensor) -> Tensor:
        return 2 * (math.log(2) - raw - F.softplus(-2 * raw))


class OneHotCategorical:
    """A discrete actor: one-hot actions (..., A) with `unimix` of the uniform distribution mixed in (DreamerV3)."""

    def __init__(self, logits: Tensor, unimix: float = 0.0):
        probs = torch.softmax(logits, -1)
        self.probs = (1 - unimix) * probs + unimix / logits.shape[-1]
        self.logp = torch.log(self.probs) if unimix else torch.log_softmax(logits, -1)

    @property
    def mode(self) -> Tensor:
        return F.one_hot(self.probs.argmax(-1), self.probs.shape[-1]).to(self.probs.dtype)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One-hot sample with the straight-through gradient of the probabilities."""
        noise = torch.empty_like(self.probs).exponential_(generator=generator)
        index = (noise / self.probs.detach()).argmin(-1)
        onehot = F.one_hot(index, self.probs.shape[-1]).to(self.probs.dtype)
        return onehot + (self.probs - self.probs.detach()) if self.probs.requires_grad else onehot

    def log_prob(self, x: Tensor) -> Tensor:
        return (x * self.logp).sum(-1)

    def entropy(self, generator: torch.Generator | None = None) -> Tensor:
        return -(self.probs * self.logp).sum(-1)


class SquaredError:
    """A point prediction (..., *event) scored by the squared error summed over `event_dims` axes.

    With `symlog_space` the prediction is in symlog space, and targets are mapped there before they are compared. `l1`
    adds λ times the absolute error: small errors, of which blur is made, count for more.
    """

    def __init__(self, prediction: Tensor, event_dims: int, symlog_space: bool = False, l1: float = 0.0):
        self.prediction, self.event_dims, self.symlog_space, self.l1 = prediction, event_dims, symlog_space, l1

    @property
    def mode(self) -> Tensor:
        return symexp(self.prediction) if self.symlog_space else self.prediction

    def loss(self, target: Tensor) -> Tensor:
        error = self.prediction - (symlog(target) if self.symlog_space else target)
        cost = error.square() + self.l1 * error.abs() if self.l1 else error.square()
        return cost.flatten(-self.event_dims).sum(-1)


class SlotMixture(SquaredError):
    """Pictures (..., C, H, W) that are mixtures of K pictures, one a slot, weighted by masks that sum to 1 over slots.

    Attributes:
        prediction: (..., C, H, W), Σ_k mask_k · picture_k.
        masks: (..., K, H, W).
        pictures: (..., K, C, H, W).
    """

    def __init__(self, patches: Tensor, size: tuple[int, int], l1: float = 0.0):
        """From what a decoder of patches returns, (..., K, rows, columns, C + 1, P, P): colours, and the logits of the
        masks as the last channel. `size` (H, W) cuts off what the last row and column hold too much."""
        self._patches, self._size = patches, size
        # Patches become pictures after the sum, which has K times fewer of them.
        super().__init__(_picture(_Mix.apply(patches), size), 3, l1=l1)

    def channels(self, first: int, last: int) -> SlotMixture:
        """The mixture of some channels alone, under the same masks."""
        patches = torch.cat([self._patches[..., first:last, :, :], self._patches[..., -1:, :, :]], -3)
        return SlotMixture(patches, self._size, self.l1)

    @property
    def masks(self) -> Tensor:
        return _picture(_mask(self._patches), self._size).squeeze(-3)

    @property
    def pictures(self) -> Tensor:
        return _picture(self._patches[..., :-1, :, :], self._size)


def _mask(patches: Tensor) -> Tensor:
    return patches[..., -1:, :, :].softmax(-6)


class _Mix(torch.autograd.Function):
    """Σ_k mask_k · colour_k of patches. A slot after the other, with its gradient written in place: several times less
    traffic than products and sums over all slots, which outgrow the cache."""

    @staticmethod
    def forward(ctx, patches: Tensor) -> Tensor:
        mask, colour = _mask(patches).unbind(-6), patches[..., :-1, :, :].unbind(-6)
        mixed = mask[0] * colour[0]
        for m, c in zip(mask[1:], colour[1:], strict=True):
            mixed.addcmul_(m, c)
        ctx.save_for_backward(patches, mixed)
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        patches, mixed = ctx.saved_tensors
        out = torch.empty_like(patches)
        for m, part, into in zip(_mask(patches).unbind(-6), patches.unbind(-6), out.unbind(-6), strict=True):
            into[..., :-1, :, :] = m * grad
            into[..., -1:, :, :] = m * ((part[..., :-1, :, :] - mixed) * grad).sum(-3, keepdim=True)
        return out


def _picture(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Patches (..., rows, columns, C, P, P) as pictures (..., C, H, W)."""
    *lead, rows, columns, C, P, _ = patches.shape
    n = len(lead)
    image = patches.permute(*range(n), n + 2, n, n + 3, n + 1, n + 4).reshape(*lead, C, rows * P, columns * P)
    return image[..., : size[0], : size[1]]


# ---------------------------------------------------------------------------------------------------------------------


def kl_divergence(p: State, q: State, unimix: float = 0.0) -> Tensor:
    """KL(p ‖ q) in nats between latent states, summed over the S variables: (...).

    Categorical states are compared after `unimix`; Gaussian states use mean and std.
    """
    if p.logits is not None:
        return categorical_kl(p.logits, q.logits, unimix)
    return gaussian_kl(p.mean, p.std, q.mean, q.std)


def balanced_kl(post: State, prior: State, free_nats: float = 1.0, unimix: float = 0.0) -> tuple[Tensor, Tensor]:
    """The two halves of the KL loss with free nats, each (...), in nats.

    dynamics       = max(free, KL(sg(post) ‖ prior))   trains the prior towards the posterior
    representation = max(free, KL(post ‖ sg(prior)))   keeps the posterior predictable

    DreamerV3 clips every step; V1 and V2 clip the mean, which is `free_nats=0` here and a clamp after the mean.
    """
    if post.logits is not None:
        return ops.balanced_kl(post.logits, prior.logits, free_nats, unimix)
    return ops.balanced_kl_gaussian(post.mean, post.std, prior.mean, prior.std, free_nats)


class GaussianMixture:
    """Variables (..., S), each a mixture of K normals of its own: World Models' expectation of the next latent.

    Args:
        logits: (..., S, K) of the mixture's weights, before a softmax over K.
        mean, log_std: (..., S, K) of its normals.

    Source: Bishop, "Mixture Density Networks", 1994; Ha & Schmidhuber 2018.
    """

    def __init__(self, logits: Tensor, mean: Tensor, log_std: Tensor):
        self.logits, self.mean, self.log_std = logits, mean, log_std

    @property
    def mode(self) -> Tensor:
        """(..., S): the means of the likeliest normals."""
        return self.mean.gather(-1, self.logits.argmax(-1, keepdim=True)).squeeze(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """(...): log-likelihood of x (..., S), summed over its variables."""
        scaled = (x.unsqueeze(-1) - self.mean) * torch.exp(-self.log_std)
        normal = -0.5 * scaled.square() - self.log_std - LOG_SQRT_2PI
        return (torch.logsumexp(self.logits + normal, -1) - torch.logsumexp(self.logits, -1)).sum(-1)

    def loss(self, target: Tensor) -> Tensor:
        return -self.log_prob(target)

    def draw(self, uniform: Tensor, normal: Tensor, temperature: float = 1.0) -> Tensor:
        """A sample (..., S) made of `uniform` noise (..., S) in [0, 1), which chooses a normal, and `normal` noise
        (..., S). `temperature` τ flattens the weights, softmax(logits / τ), and widens the normals, √τ · std."""
        # Not torch.softmax, which takes ten times as long where the last axis is as short as this one.
        below = torch.exp((self.logits - self.logits.amax(-1, keepdim=True)) / temperature).cumsum(-1)
        chosen = (uniform.unsqueeze(-1) * below[..., -1:] >= below[..., :-1]).sum(-1, keepdim=True)
        mean, log_std = (x.gather(-1, chosen).squeeze(-1) for x in (self.mean, self.log_std))
        return mean + math.sqrt(temperature) * torch.exp(log_std) * normal
