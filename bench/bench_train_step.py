"""One whole DreamerV3 gradient step on pictures, and where its time goes.

    pytest bench/bench_train_step.py --benchmark-only

Size: image 64x64x3, batch 16 x 64 steps, deter 512, hidden 512, 32x32 latents, convolutions 32/64/128/256 wide: that of
NM512/dreamerv3-torch's defaults (its own step took 11.4 s on two cores of the same kind of machine).
Every part is timed forward and backward on its own; `whole` is the step as training runs it.
"""

import pytest
import torch

from phyxdream.agents import DreamerV3, preset
from phyxdream.agents.actor_critic import imagination_loss
from phyxdream.nn.vision import as_float_image

T, B, A, SHAPE = 64, 16, 6, (3, 64, 64)
ROUNDS = dict(rounds=5, warmup_rounds=1)


class Step:
    def __init__(self):
        self.config = preset(
            "dreamer_v3", batch_size=B, batch_length=T, deter_size=512, hidden_size=512, classes=32, units=512,
            depth=32, depth_mults=(1, 2, 4, 8),
        ).resolve()  # fmt: skip
        torch.manual_seed(0)
        self.model = DreamerV3(self.config, {"image": SHAPE}, A, discrete=True)
        self.optimizer = self.model.make_optimizer()
        self.generator = torch.Generator().manual_seed(0)
        self.batch = {
            "image": torch.randint(0, 256, (T, B, *SHAPE), dtype=torch.uint8),
            "action": torch.nn.functional.one_hot(torch.randint(0, A, (T, B)), A).float(),
            "reward": torch.randn(T, B),
            **{name: torch.rand(T, B) < 0.02 for name in ("is_first", "is_last", "is_terminal")},
        }
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
        (loss + self.world.cont(feature).loss(torch.ones(T, B))).sum().backward()

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


@pytest.fixture(scope="module")
def step():
    return Step()


@pytest.mark.parametrize(
    "part", ["whole", "encoder", "observe", "decoder_and_heads", "imagination", "behaviour", "optimiser"]
)
def test_train_step(benchmark, step, part):
    benchmark.group = "train step: 64x64x3, B16 T64, deter 512, 32x32"
    benchmark.pedantic(getattr(step, part), **ROUNDS)
