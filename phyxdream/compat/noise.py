"""Noise from torch's own generator, drawn as the sampling of other codebases draws it: same seed, same samples.

`torch.multinomial` with one draw, which `Categorical.sample` ends in, takes argmax(p / e) with e ~ Exp(1); so does
`F.gumbel_softmax`, which draws the same e. Our ops take uniform noise u and race −log u against p: with u = exp(−e) it
is the same race.
"""

from __future__ import annotations

from torch import Tensor

from phyxdream.compat.structure import Model


def draw(model: Model, steps: int, rows: int, draws: int = 1) -> list[Tensor]:
    """`draws` noises, each (steps, rows, S, C) or (steps, rows, S), in the order of a loop that draws them all in a
    step before the next."""
    noise = model.like.new_empty(steps, draws, rows, *model.noise)
    for step in noise:
        for one in step:
            if model.cumulative:
                one.uniform_()
            elif model.classes:
                one.exponential_()
            else:
                one.normal_()
    if model.classes and not model.cumulative:
        noise.neg_().exp_()
    return list(noise.unbind(1))
