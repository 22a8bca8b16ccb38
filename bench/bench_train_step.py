"""One whole DreamerV3 gradient step on pictures, and where its time goes.

`catch`: what bare `phyxdream train` learns from. `pictures`: image 64x64x3, batch 16 x 64 steps, deter 512, hidden 512,
32x32 latents, convolutions 32/64/128/256 wide: that of NM512/dreamerv3-torch's defaults (its own step took 11.4 s on
two cores of the same kind of machine). `12m` is DreamerV3's size of that name on the same batch; it takes several times
as long, so it waits to be asked for.
Every part is timed forward and backward on its own; `whole` is the step as training runs it. FLOP are those of the
products and convolutions that the reference calls, as torch counts them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from phyxdream import ops
from phyxdream.agents import DreamerConfig, DreamerV3, preset
from phyxdream.agents.actor_critic import imagination_loss
from phyxdream.bench.suite import Call, Case, Suite, Work
from phyxdream.nn.vision import as_float_image

ACTION = 6
SIZES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "tiny": ((3, 8, 8), dict(size="1m", batch_size=2, batch_length=4, imagine_horizon=2, deter_size=16, hidden_size=8,
                             stoch_size=4, classes=4, units=8, depth=4)),
    "catch": ((1, 10, 5), dict(name="catch")),
    "pictures": ((3, 64, 64), dict(batch_size=16, batch_length=64, deter_size=512, hidden_size=512, classes=32,
                                   units=512, depth=32, depth_mults=(1, 2, 4, 8))),
    "12m": ((3, 64, 64), dict(size="12m", batch_size=16, batch_length=64)),
}  # fmt: skip
"""Shape of the pictures, and options of the preset `dreamer_v3`, or the `name` of another."""
_BOTH = "forward+backward"
PARTS = {"whole": _BOTH, "encoder": _BOTH, "observe": _BOTH, "decoder_and_heads": _BOTH, "imagination": "no-grad",
         "behaviour": _BOTH, "optimiser": ""}  # fmt: skip


def config_of(size: str) -> tuple[DreamerConfig, tuple[int, int, int]]:
    shape, options = SIZES[size]
    return preset(**{"name": "dreamer_v3", **options}).resolve(), shape


class Step:
    def __init__(self, size: str, device: torch.device):
        c, shape = config_of(size)
        self.config = c
        T, B = c.batch_length, c.batch_size
        torch.manual_seed(0)
        self.model = DreamerV3(c, {"image": shape}, ACTION, discrete=True).to(device)
        self.optimizer = self.model.make_optimizer()
        self.generator = torch.Generator(device).manual_seed(0)
        batch = {
            "image": torch.randint(0, 256, (T, B, *shape), dtype=torch.uint8),
            "action": torch.nn.functional.one_hot(torch.randint(0, ACTION, (T, B)), ACTION).float(),
            "reward": torch.randn(T, B),
            **{name: torch.rand(T, B) < 0.02 for name in ("is_first", "is_last", "is_terminal")},
        }
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.world = self.model.world_model
        with torch.no_grad():
            self.embed = self.world.embed(self.batch)
            self.post, self.prior = self.world.rssm.observe(self.embed, self.batch["action"], self.batch["is_first"])
        self.start = self.post.flatten()
        self.trajectory = self.imagination()
        self.whole()  # gradients exist, so that the optimiser can be timed alone

    def whole(self):
        loss = self.model.loss(self.batch, self.generator).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.model.after_update()

    def encoder(self):
        self.world.embed(self.batch).sum().backward()

    def observe(self):
        embed = self.embed.clone().requires_grad_()
        post, prior = self.world.rssm.observe(embed, self.batch["action"], self.batch["is_first"])
        (post.feature.sum() + prior.logits.sum()).backward()

    def decoder_and_heads(self):
        feature = self.post.feature.requires_grad_()
        loss = self.world.decoder(feature)["image"].loss(as_float_image(self.batch["image"]))
        loss = loss + self.world.reward(feature).loss(self.batch["reward"])
        (loss + self.world.cont(feature).loss(torch.ones_like(self.batch["reward"]))).sum().backward()

    @torch.no_grad()
    def imagination(self):
        return self.world.rssm.imagine_policy(self.model.actor, self.start, self.config.imagine_horizon)

    def behaviour(self):
        c, m = self.config, self.model
        with torch.no_grad():
            feature = self.trajectory.state.feature
            reward, cont = self.world.reward(feature).mode, self.world.cont(feature).mean
        out, _ = imagination_loss(
            m.actor, m.critic, m.slow_critic, m.normalizer, feature, self.trajectory.action, reward, cont,
            c.td_lambda, c.entropy_coeff, c.slow_critic_coeff,
        )  # fmt: skip
        sum(loss.mean() for loss in out.losses.values()).backward()

    def optimiser(self):
        self.optimizer.step()
        self.model.after_update()


@functools.lru_cache(maxsize=1)  # the parts share one step, which takes as long to build as a part takes
def step(size: str, device: torch.device) -> Step:
    return Step(size, device)


def build(size: str, part: str, device: torch.device) -> Call:
    run = getattr(step(size, device), part)
    with ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_total_flops()
    return Call(run, work=Work(flops, "FLOP") if flops else None)


def label(size: str) -> str:
    c, (channels, height, width) = config_of(size)
    batch, latents = f"{c.batch_size}×{c.batch_length}", f"{c.stoch_size}×{c.classes}"
    return f"{height}×{width}×{channels}, batch {batch}, deter {c.deter_size}, {latents}"


SUITE = Suite(
    "update",
    "one gradient step of DreamerV3 on pictures, and its parts",
    tuple(
        # The parts differentiate inside, and change parameters and states: they run as they are.
        Case(part, size, PARTS[part],
             functools.partial(build, size, part), label(size), names=("reference", "phyxdream"),
             default=size in ("catch", "pictures"), headline=True)
        for size in SIZES
        for part in PARTS
    ),
)  # fmt: skip
