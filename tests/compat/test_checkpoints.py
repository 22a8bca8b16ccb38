"""Agents imported from other code bases' checkpoints give the same features and predictions as there.

The stand-ins below are written from the equations, as plain functions of a state dict with the foreign names, shapes
and layouts: batch-major, pictures (H, W, C), z before h in a feature.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from phyxdream.agents import DreamerConfig
from phyxdream.compat.checkpoints import load_dreamerv3_torch, load_r2dreamer
from phyxdream.errors import CheckpointError, ConfigError, EnvError
from phyxdream.replay import Replay
from phyxdream.train.video import open_loop_video

B, T, H, A = 3, 6, 4, 2
S, C, D, U = 3, 4, 16, 10
Z = S * C
IMAGE, VECTORS = {"image": (3, 16, 16)}, {"velocity": (4,), "height": (1,)}
SHAPES = {"image": IMAGE, "vectors": VECTORS, "both": {**IMAGE, **VECTORS}}
ACTS = {"silu": F.silu, "elu": F.elu}


def symlog(x):
    return x.sign() * (1 + x.abs()).log()


def symexp(x):
    return x.sign() * (x.abs().exp() - 1)


def same_pad(x, kernel, stride):
    total = max((math.ceil(x.shape[-1] / stride) - 1) * stride + kernel - x.shape[-1], 0)
    return F.pad(x, [total // 2, total - total // 2] * 2)


def gru(h, reset, candidate, update):
    update = torch.sigmoid(update - 1)
    return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h


class StandIn:
    """What both share: random weights, dense layers, sampling by Gumbel-max with given uniform noise."""

    def __init__(self, kind, discrete=False, act="silu", unimix=0.01):
        self.shapes, self.discrete, self.act, self.unimix = SHAPES[kind], discrete, ACTS[act], unimix
        self.images = [k for k, v in self.shapes.items() if len(v) == 3]
        self.vectors = [k for k, v in self.shapes.items() if len(v) == 1]
        self.generator = torch.Generator().manual_seed(0)
        self.p = {}

    def add(self, name, *shape, norm=False):
        x = torch.randn(shape, generator=self.generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 10
        self.p[name] = x / math.sqrt(fan_in) + norm

    def add_dense(self, layer, norm, inputs, outputs, bias):
        """A layer with a bias and an RMS norm, or without one and a LayerNorm."""
        self.add(f"{layer}.weight", outputs, inputs)
        if bias:
            self.add(f"{layer}.bias", outputs)
        self.add(f"{norm}.weight", outputs, norm=True)
        if not bias:
            self.add(f"{norm}.bias", outputs)

    def add_linear(self, layer, inputs, outputs):
        self.add(f"{layer}.weight", outputs, inputs)
        self.add(f"{layer}.bias", outputs)

    def add_mlp(self, stem, inputs, units, layers, bias):
        for i in range(layers):
            self.add_dense(f"{stem}_linear{i}", f"{stem}_norm{i}", units if i else inputs, units, bias)

    def norm(self, name, x):
        w = self.p[f"{name}.weight"]
        if f"{name}.bias" in self.p:
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w + self.p[f"{name}.bias"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * w

    def pixel_norm(self, name, x):
        return self.norm(name, x.movedim(1, -1)).movedim(-1, 1)

    def linear(self, name, x):
        y = x @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def dense(self, layer, norm, x):
        return self.act(self.norm(norm, self.linear(layer, x)))

    def mlp(self, stem, x):
        i = 0
        while f"{stem}_linear{i}.weight" in self.p:
            x = self.dense(f"{stem}_linear{i}", f"{stem}_norm{i}", x)
            i += 1
        return x

    def embed(self, obs):
        parts = []
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1) - 0.5
            parts.append(self.encode_image(x.flatten(0, 1).permute(0, 3, 1, 2)).reshape(*x.shape[:2], -1))
        if self.vectors:
            parts.append(self.mlp(self.encoder_stem, symlog(torch.cat([obs[k] for k in self.vectors], -1))))
        return torch.cat(parts, -1)

    def sample(self, logits, noise):
        probs = (1 - self.unimix) * torch.softmax(logits, -1) + self.unimix / C
        return F.one_hot((probs.log() - (-noise.log()).log()).argmax(-1), C).to(logits.dtype)

    def observe(self, embed, action, is_first, noise):
        h, z = self.initial()
        start, out = (h, z), []
        for t in range(embed.shape[1]):
            first = is_first[:, t, None]
            h = torch.where(first, start[0], h)
            z = torch.where(first[..., None], start[1], z)
            h = self.step(h, z.flatten(1), torch.where(first, 0, action[:, t]))
            logits = self.posterior(torch.cat([h, embed[:, t]], -1)).unflatten(-1, (S, C))
            z = self.sample(logits, noise[:, t])
            out.append((h, z, logits, self.prior(h).unflatten(-1, (S, C))))
        return [torch.stack(x, 1) for x in zip(*out, strict=True)]

    def imagine(self, h, z, action, noise):
        out = []
        for t in range(action.shape[1]):
            h = self.step(h, z.flatten(1), action[:, t])
            logits = self.prior(h).unflatten(-1, (S, C))
            z = self.sample(logits, noise[:, t])
            out.append((h, z, logits))
        return [torch.stack(x, 1) for x in zip(*out, strict=True)]

    def policy(self, mean, std):
        """Probabilities of one-hot actions, or means and deviations."""
        if self.discrete:
            return [(1 - self.unimix) * torch.softmax(mean, -1) + self.unimix / A]
        return [torch.tanh(mean), 0.9 * torch.sigmoid(std + 2) + 0.1]

    def double(self):
        self.p = {k: v.double() for k, v in self.p.items()}


class DreamerV3Torch(StandIn):
    """NM512/dreamerv3-torch."""

    load = staticmethod(load_dreamerv3_torch)
    encoder_stem = "_wm.encoder._mlp.layers.Encoder"

    def __init__(self, kind, discrete=False, learned=True, kernel=4, **options):
        super().__init__(kind, discrete, **options)
        self.kernel = kernel
        embed = 0
        if self.images:
            for i, (inputs, outputs) in enumerate([(3, 2), (2, 4)]):
                self.add(f"_wm.encoder._cnn.layers.{3 * i}.weight", outputs, inputs, kernel, kernel)
                self.add(f"_wm.encoder._cnn.layers.{3 * i + 1}.norm.weight", outputs, norm=True)
                self.add(f"_wm.encoder._cnn.layers.{3 * i + 1}.norm.bias", outputs)
            embed += 4 * 4 * 4
        if self.vectors:
            self.add_mlp(self.encoder_stem, 5, 7, 2, False)
            embed += 7
        at = "_wm.dynamics."
        if learned:
            self.add(f"{at}W", 1, D)
        self.add_dense(f"{at}_img_in_layers.0", f"{at}_img_in_layers.1", Z + A, U, False)
        self.add_dense(f"{at}_cell.layers.GRU_linear", f"{at}_cell.layers.GRU_norm", U + D, 3 * D, False)
        self.add_dense(f"{at}_img_out_layers.0", f"{at}_img_out_layers.1", D, U, False)
        self.add_dense(f"{at}_obs_out_layers.0", f"{at}_obs_out_layers.1", D + embed, U, False)
        self.add_linear(f"{at}_imgs_stat_layer", U, Z)
        self.add_linear(f"{at}_obs_stat_layer", U, Z)
        at = "_wm.heads.decoder."
        if self.images:
            self.add_linear(f"{at}_cnn._linear_layer", Z + D, 4 * 4 * 4)
            self.add(f"{at}_cnn.layers.0.weight", 4, 2, kernel, kernel)
            self.add(f"{at}_cnn.layers.1.norm.weight", 2, norm=True)
            self.add(f"{at}_cnn.layers.1.norm.bias", 2)
            self.add(f"{at}_cnn.layers.3.weight", 2, 3, kernel, kernel)
            self.add(f"{at}_cnn.layers.3.bias", 3)
        if self.vectors:
            self.add_mlp(f"{at}_mlp.layers.Decoder", Z + D, 6, 1, False)
            for name in self.vectors:
                self.add_linear(f"{at}_mlp.mean_layer.{name}", 6, *self.shapes[name])
        for prefix, name, units, layers, outputs in [
            ("_wm.heads.reward", "Reward", 8, 2, 255),
            ("_wm.heads.cont", "Cont", 8, 1, 1),
            ("_task_behavior.actor", "Actor", 9, 2, A),
            ("_task_behavior.value", "Value", 9, 1, 255),
            ("_task_behavior._slow_value", "Value", 9, 1, 255),
        ]:
            self.add_mlp(f"{prefix}.layers.{name}", Z + D, units, layers, False)
            self.add_linear(f"{prefix}.mean_layer", units, outputs)
        if not discrete:
            self.add_linear("_task_behavior.actor.std_layer", 9, A)
        self.p["_task_behavior.ema_vals"] = torch.tensor([-2.0, 3.0])

    def state_dict(self):
        copies = {k.replace("_wm.", "_task_behavior._world_model."): v for k, v in self.p.items() if k[:4] == "_wm."}
        explorer = {k.replace("_task", "_expl"): v for k, v in self.p.items() if k.startswith("_task")}
        found = {**self.p, **copies, **explorer}
        compiled = {"_wm.": "_wm._orig_mod.", "_task_behavior.": "_task_behavior._orig_mod."}
        for old, new in compiled.items():
            found = {new + k[len(old) :] if k.startswith(old) else k: v for k, v in found.items()}
        return found

    def encode_image(self, x):
        for i in range(2):
            x = F.conv2d(same_pad(x, self.kernel, 2), self.p[f"_wm.encoder._cnn.layers.{3 * i}.weight"], stride=2)
            x = self.act(self.pixel_norm(f"_wm.encoder._cnn.layers.{3 * i + 1}.norm", x))
        return x

    def initial(self):
        if "_wm.dynamics.W" not in self.p:
            zeros = next(iter(self.p.values())).new_zeros
            return zeros(B, D), zeros(B, S, C)
        h = torch.tanh(self.p["_wm.dynamics.W"]).repeat(B, 1)
        return h, F.one_hot(self.prior(h).unflatten(-1, (S, C)).argmax(-1), C).to(h.dtype)

    def step(self, h, z, action):
        at = "_wm.dynamics."
        x = self.dense(f"{at}_img_in_layers.0", f"{at}_img_in_layers.1", torch.cat([z, action], -1))
        gates = self.linear(f"{at}_cell.layers.GRU_linear", torch.cat([x, h], -1))
        return gru(h, *self.norm(f"{at}_cell.layers.GRU_norm", gates).chunk(3, -1))

    def prior(self, h):
        at = "_wm.dynamics."
        return self.linear(f"{at}_imgs_stat_layer", self.dense(f"{at}_img_out_layers.0", f"{at}_img_out_layers.1", h))

    def posterior(self, x):
        at = "_wm.dynamics."
        return self.linear(f"{at}_obs_stat_layer", self.dense(f"{at}_obs_out_layers.0", f"{at}_obs_out_layers.1", x))

    def decode(self, z, h):
        at, feature, out = "_wm.heads.decoder.", torch.cat([z.flatten(-2), h], -1), {}
        if self.images:
            x = self.linear(f"{at}_cnn._linear_layer", feature).reshape(-1, 4, 4, 4).permute(0, 3, 1, 2)
            pad, more = {4: (1, 0), 5: (2, 1)}[self.kernel]
            x = F.conv_transpose2d(x, self.p[f"{at}_cnn.layers.0.weight"], None, 2, pad, more)
            x = self.act(self.pixel_norm(f"{at}_cnn.layers.1.norm", x))
            w, bias = self.p[f"{at}_cnn.layers.3.weight"], self.p[f"{at}_cnn.layers.3.bias"]
            x = F.conv_transpose2d(x, w, bias, 2, pad, more) + 0.5
            out["image"] = x.permute(0, 2, 3, 1).unflatten(0, feature.shape[:2])
        if self.vectors:
            x = self.mlp(f"{at}_mlp.layers.Decoder", feature)
            out |= {k: symexp(self.linear(f"{at}_mlp.mean_layer.{k}", x)) for k in self.vectors}
        return out

    def heads(self, z, h):
        feature = torch.cat([z.flatten(-2), h], -1)

        def head(prefix, name):
            return self.linear(f"{prefix}.mean_layer", self.mlp(f"{prefix}.layers.{name}", feature))

        def scalar(prefix, name):
            logits = head(prefix, name)
            return symexp((torch.softmax(logits, -1) * torch.linspace(-20, 20, 255).to(logits)).sum(-1))

        actor = self.mlp("_task_behavior.actor.layers.Actor", feature)
        std = None if self.discrete else self.linear("_task_behavior.actor.std_layer", actor)
        return dict(
            reward=scalar("_wm.heads.reward", "Reward"),
            cont=torch.sigmoid(head("_wm.heads.cont", "Cont")[..., 0]),
            value=scalar("_task_behavior.value", "Value"),
            slow_value=scalar("_task_behavior._slow_value", "Value"),
            policy=self.policy(self.linear("_task_behavior.actor.mean_layer", actor), std),
        )

    def reward_loss(self, z, h, target):
        """Two-hot over bins that are even in symlog space."""
        feature = torch.cat([z.flatten(-2), h], -1)
        logits = self.linear("_wm.heads.reward.mean_layer", self.mlp("_wm.heads.reward.layers.Reward", feature))
        return two_hot_loss(logits, symlog(target), torch.linspace(-20, 20, 255))


class R2Dreamer(StandIn):
    """NM512/r2dreamer."""

    load = staticmethod(load_r2dreamer)
    blocks = 4

    def __init__(self, kind, discrete=False, decoder=True, kernel=5, **options):
        super().__init__(kind, discrete, **options)
        self.kernel, self.decoder = kernel, decoder
        self.encoder_stem = f"encoder.encoders.{len(self.images)}.layers.mlp_encoder"
        embed, G = 0, self.blocks
        if self.images:
            for i, (inputs, outputs) in enumerate([(3, 4), (4, 8)]):
                self.add(f"encoder.encoders.0.layers.{4 * i}.weight", outputs, inputs, kernel, kernel)
                self.add(f"encoder.encoders.0.layers.{4 * i}.bias", outputs)
                self.add(f"encoder.encoders.0.layers.{4 * i + 2}.weight", outputs, norm=True)
            embed += 8 * 4 * 4
        if self.vectors:
            self.add_mlp(self.encoder_stem, 5, 7, 2, True)
            embed += 7
        at = "rssm._deter_net."
        for i, inputs in enumerate((D, Z, A)):
            self.add_dense(f"{at}_dyn_in{i}.0", f"{at}_dyn_in{i}.1", inputs, U, True)
        self.add(f"{at}_dyn_hid.dyn_hid_0.weight", D // G, D // G + 3 * U, G)
        self.add(f"{at}_dyn_hid.dyn_hid_0.bias", D)
        self.add(f"{at}_dyn_hid.norm_0.weight", D, norm=True)
        self.add(f"{at}_dyn_gru.weight", 3 * D // G, D // G, G)
        self.add(f"{at}_dyn_gru.bias", 3 * D)
        self.add_dense("rssm._obs_net.obs_net_0", "rssm._obs_net.obs_net_n_0", D + embed, U, True)
        self.add_linear("rssm._obs_net.obs_net_logit", U, Z)
        for i in range(2):
            self.add_dense(f"rssm._img_net.img_net_{i}", f"rssm._img_net.img_net_n_{i}", U if i else D, U, True)
        self.add_linear("rssm._img_net.img_net_logit", U, Z)
        at = "decoder._cnn."
        if decoder and self.images:
            self.add(f"{at}sp0.weight", 4 * 4 * 8 // 2, D // 2, 2)
            self.add(f"{at}sp0.bias", 4 * 4 * 8)
            self.add_dense(f"{at}sp1.0", f"{at}sp1.1", Z, 6, True)
            self.add_linear(f"{at}sp2", 6, 4 * 4 * 8)
            self.add(f"{at}sp_norm.0.weight", 8, norm=True)
            for i, (inputs, outputs) in enumerate([(8, 4), (4, 3)]):
                self.add(f"{at}layers.{4 * i + 1}.weight", outputs, inputs, kernel, kernel)
                self.add(f"{at}layers.{4 * i + 1}.bias", outputs)
            self.add(f"{at}layers.2.weight", 4, norm=True)
        if decoder and self.vectors:
            self.add_mlp("decoder._mlp.mlp.layers.mlp_decoder", Z + D, 6, 1, True)
            self.add_linear("decoder._mlp.last", 6, 5)
        if not decoder:
            self.add("prj.w.weight", embed, Z + D)
        for prefix, name, units, layers, outputs in [
            ("reward", "reward", 8, 1, 255),
            ("cont", "cont", 8, 1, 1),
            ("actor", "actor", 9, 2, A if discrete else 2 * A),
            ("value", "value", 9, 2, 255),
            ("_slow_value", "value", 9, 2, 255),
        ]:
            self.add_mlp(f"{prefix}.mlp.layers.{name}", Z + D, units, layers, True)
            self.add_linear(f"{prefix}.last", units, outputs)
        self.p["return_ema.ema_vals"] = torch.tensor([-2.0, 3.0])

    def state_dict(self):
        frozen = {f"_frozen_{k}": v for k, v in self.p.items() if k.split(".")[0] in ("encoder", "rssm", "actor")}
        return {**self.p, **frozen}

    def encode_image(self, x):
        at = "encoder.encoders.0.layers."
        for i in range(2):
            w, bias = self.p[f"{at}{4 * i}.weight"], self.p[f"{at}{4 * i}.bias"]
            x = F.max_pool2d(F.conv2d(same_pad(x, self.kernel, 1), w, bias), 2)
            x = self.act(self.pixel_norm(f"{at}{4 * i + 2}", x))
        return x

    def initial(self):
        zeros = next(iter(self.p.values())).new_zeros
        return zeros(B, D), zeros(B, S, C)

    def block_linear(self, name, x):
        """x (..., blocks, inputs) to (..., blocks, outputs)."""
        w = self.p[f"{name}.weight"]
        y = torch.stack([x[..., g, :] @ w[:, :, g].T for g in range(w.shape[2])], -2)
        return y + self.p[f"{name}.bias"].view(w.shape[2], -1)

    def step(self, h, z, action):
        at, G = "rssm._deter_net.", self.blocks
        action = action / action.abs().clamp(min=1)
        x = [self.dense(f"{at}_dyn_in{i}.0", f"{at}_dyn_in{i}.1", v) for i, v in enumerate((h, z, action))]
        shared = torch.cat(x, -1)[:, None].expand(-1, G, -1)
        x = self.block_linear(f"{at}_dyn_hid.dyn_hid_0", torch.cat([h.unflatten(-1, (G, -1)), shared], -1))
        x = self.act(self.norm(f"{at}_dyn_hid.norm_0", x.flatten(-2)))
        gates = self.block_linear(f"{at}_dyn_gru", x.unflatten(-1, (G, -1)))
        return gru(h, *(gate.flatten(-2) for gate in gates.chunk(3, -1)))

    def prior(self, x):
        for i in range(2):
            x = self.dense(f"rssm._img_net.img_net_{i}", f"rssm._img_net.img_net_n_{i}", x)
        return self.linear("rssm._img_net.img_net_logit", x)

    def posterior(self, x):
        x = self.dense("rssm._obs_net.obs_net_0", "rssm._obs_net.obs_net_n_0", x)
        return self.linear("rssm._obs_net.obs_net_logit", x)

    def decode(self, z, h):
        at, out = "decoder._cnn.", {}
        if not self.decoder:
            return out
        if self.images:
            spatial = self.block_linear(f"{at}sp0", h.flatten(0, 1).unflatten(-1, (2, -1))).view(-1, 2, 4, 4, 4)
            x = torch.cat([spatial[:, 0], spatial[:, 1]], -1)
            hidden = self.dense(f"{at}sp1.0", f"{at}sp1.1", z.flatten(-2).flatten(0, 1))
            x = x + self.linear(f"{at}sp2", hidden).view(-1, 4, 4, 8)
            x = self.act(self.norm(f"{at}sp_norm.0", x)).permute(0, 3, 1, 2)
            for i in range(2):
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
                w, bias = self.p[f"{at}layers.{4 * i + 1}.weight"], self.p[f"{at}layers.{4 * i + 1}.bias"]
                x = F.conv2d(same_pad(x, self.kernel, 1), w, bias)
                x = x if i else self.act(self.pixel_norm(f"{at}layers.2", x))
            out["image"] = torch.sigmoid(x).permute(0, 2, 3, 1).unflatten(0, h.shape[:2])
        if self.vectors:
            x = self.mlp("decoder._mlp.mlp.layers.mlp_decoder", torch.cat([z.flatten(-2), h], -1))
            parts = self.linear("decoder._mlp.last", x).split([self.shapes[k][0] for k in self.vectors], -1)
            out |= {k: symexp(part) for k, part in zip(self.vectors, parts, strict=True)}
        return out

    def heads(self, z, h):
        feature = torch.cat([z.flatten(-2), h], -1)

        def head(prefix, name):
            return self.linear(f"{prefix}.last", self.mlp(f"{prefix}.mlp.layers.{name}", feature))

        def scalar(prefix, name):
            logits = head(prefix, name)
            half = torch.linspace(0, 20, 128).to(logits)[1:]
            low, _, high = torch.softmax(logits, -1).split([127, 1, 127], -1)
            return ((high - low.flip(-1)) * symexp(half)).sum(-1)

        mean, std = head("actor", "actor"), None
        if not self.discrete:
            mean, std = mean.chunk(2, -1)
        return dict(
            reward=scalar("reward", "reward"),
            cont=torch.sigmoid(head("cont", "cont")[..., 0]),
            value=scalar("value", "value"),
            slow_value=scalar("_slow_value", "value"),
            policy=self.policy(mean, std),
        )

    def reward_loss(self, z, h, target):
        feature = torch.cat([z.flatten(-2), h], -1)
        logits = self.linear("reward.last", self.mlp("reward.mlp.layers.reward", feature))
        return two_hot_loss(logits, target, symexp(torch.linspace(-20, 20, 255)))


def two_hot_loss(logits, target, bins):
    above = torch.searchsorted(bins, target)
    share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
    logp = torch.log_softmax(logits, -1)
    low, high = (logp.gather(-1, i[..., None])[..., 0] for i in (above - 1, above))
    return -((1 - share) * low + share * high)


def make_inputs(shapes, dtype=torch.float32):
    """Batch-major, as the stand-ins read them; pictures in [0, 1]."""
    g = torch.Generator().manual_seed(1)
    data = {}
    for name, shape in shapes.items():
        if len(shape) == 3:
            data[name] = torch.randint(0, 256, (B, T, *shape[1:], shape[0]), generator=g).to(dtype) / 255
        else:
            data[name] = torch.randn(B, T, *shape, generator=g).to(dtype) * 5
    is_first = torch.zeros(B, T, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 3] = is_first[2, 5] = True
    rest = dict(action=(T, A), noise=(T, S, C), future=(H, A), future_noise=(H, S, C))
    rest = {k: torch.rand(B, *shape, generator=g).to(dtype) for k, shape in rest.items()}
    return data, rest | {k: rest[k] * 4 - 2 for k in ("action", "future")}, is_first


def ours(x):
    """Time-major, channels before pixels."""
    x = x.transpose(0, 1)
    return x.movedim(-1, -3) if x.ndim == 5 else x


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-3)
    assert ((found - expected).abs().max() / scale).item() < tolerance


CASES = [
    (DreamerV3Torch, dict(kind="image")),
    (DreamerV3Torch, dict(kind="image", discrete=True, learned=False, kernel=5)),
    (DreamerV3Torch, dict(kind="vectors", unimix=0.05)),
    (DreamerV3Torch, dict(kind="both", act="elu")),
    (R2Dreamer, dict(kind="image", decoder=False, discrete=True)),
    (R2Dreamer, dict(kind="image", kernel=4)),
    (R2Dreamer, dict(kind="vectors", unimix=0.05)),
    (R2Dreamer, dict(kind="both", act="elu")),
]


def load(theirs, **options):
    if theirs.vectors and isinstance(theirs, R2Dreamer):
        options.setdefault("shapes", theirs.shapes)
    act = next(name for name, f in ACTS.items() if f is theirs.act)
    return theirs.load(theirs.state_dict(), stoch_size=S, act=act, unimix=theirs.unimix, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("make, options", CASES)
def test_equal_features_and_predictions(make, options, dtype, tolerance):
    theirs = make(**options)
    agent = load(theirs)
    model = agent.model.to(dtype)
    world = model.world_model
    if dtype == torch.float64:
        theirs.double()
    data, x, is_first = make_inputs(theirs.shapes, dtype)
    with torch.no_grad():
        embed = theirs.embed(data)
        h, z, posterior, prior = theirs.observe(embed, x["action"], is_first, x["noise"])
        found = world.embed({k: ours(v) for k, v in data.items()})
        close(found, ours(embed), tolerance)
        after, before = world.rssm.observe(found, ours(x["action"]), ours(is_first), noise=ours(x["noise"]))
        close(after.deter, ours(h), tolerance)
        assert torch.equal(after.stoch, ours(z))
        close(after.logits, ours(posterior), tolerance)
        close(before.logits, ours(prior), tolerance)

        future = world.rssm.imagine(ours(x["future"]), after[-1], noise=ours(x["future_noise"]))
        h1, z1, logits = theirs.imagine(h[:, -1], z[:, -1], x["future"], x["future_noise"])
        close(future.deter, ours(h1), tolerance)
        assert torch.equal(future.stoch, ours(z1))
        close(future.logits, ours(logits), tolerance)

        decoded, expected = world.decoder(after.feature), theirs.decode(z, h)
        assert decoded.keys() == expected.keys()
        for name in expected:
            close(decoded[name].mode, ours(expected[name]), tolerance)

        heads = theirs.heads(z, h)
        # Bins are rounded to float32 in both; the mean over them is as exact as that.
        for head, name in ((world.reward, "reward"), (model.critic, "value"), (model.slow_critic, "slow_value")):
            close(head(after.feature).mode, ours(heads[name]), 1e-5)
        close(world.cont(after.feature).mean, agent.config.discount * ours(heads["cont"]), tolerance)
        policy = model.actor(after.feature)
        moments = [policy.probs] if agent.discrete else [policy.mean, policy.std]
        for moment, value in zip(moments, heads["policy"], strict=True):
            close(moment, ours(value), tolerance)


@pytest.mark.parametrize("make", [DreamerV3Torch, R2Dreamer])
def test_equal_losses_of_reward_and_continuation(make):
    theirs = make("image")
    agent = load(theirs)
    world = agent.model.world_model
    data, x, is_first = make_inputs(theirs.shapes)
    h, z, *_ = theirs.observe(theirs.embed(data), x["action"], is_first, x["noise"])
    feature = torch.cat([ours(h), ours(z).flatten(-2)], -1)
    target = torch.linspace(-30, 30, B * T).view(B, T)
    close(world.reward(feature).loss(ours(target)), ours(theirs.reward_loss(z, h, target)), 1e-5)
    chance, goes_on = theirs.heads(z, h)["cont"], (torch.arange(B * T) % 3 > 0).view(B, T).float()
    expected = F.binary_cross_entropy(chance, goes_on, reduction="none")
    close(world.cont(feature).loss(agent.config.discount * ours(goes_on)), ours(expected), 1e-5)


def test_pictures_may_end_in_a_sigmoid():
    theirs = DreamerV3Torch("image")
    plain, squashed = load(theirs), load(theirs, cnn_sigmoid=True)
    feature = torch.randn(T, B, D + Z)
    with torch.no_grad():
        shifted, found = (a.model.world_model.decoder(feature)["image"].mode for a in (plain, squashed))
    close(found, torch.sigmoid(shifted - 0.5), 1e-5)


@pytest.mark.parametrize("make", [DreamerV3Torch, R2Dreamer])
def test_from_a_file_as_from_its_content(make, tmp_path):
    theirs = make("image")
    found = theirs.state_dict()
    saved = {"agent_state_dict": found, "optims_state_dict": {"opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}}}
    torch.save(saved, tmp_path / "latest.pt")
    state = torch.get_rng_state()
    agents = [theirs.load(source, stoch_size=S) for source in (tmp_path / "latest.pt", saved, found)]
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are left alone
    first, *others = [agent.model.state_dict() for agent in agents]
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("make", [DreamerV3Torch, R2Dreamer])
def test_percentiles_and_slow_critic(make):
    theirs = make("image")
    model = load(theirs).model
    assert model.normalizer.scale.item() == pytest.approx(5.0)
    assert not any(p.requires_grad for p in model.slow_critic.parameters())
    slow = [k for k in theirs.p if "_slow_value" in k]
    for name in [*slow, next(k for k in theirs.p if k.endswith("ema_vals"))]:
        del theirs.p[name]
    model = load(theirs).model
    assert model.normalizer.scale.item() == 1.0 and not model.normalizer.weight
    fast, slow = model.critic.state_dict(), model.slow_critic.state_dict()
    assert all(torch.equal(fast[k], slow[k]) for k in fast)


@pytest.mark.parametrize("make, options", CASES)
def test_the_agent_acts_learns_and_is_saved(make, options):
    theirs = make(**options)
    config = DreamerConfig(
        num_envs=2, batch_size=B, batch_length=T, replay_context=0, imagine_horizon=3, learning_rate=1e-2, warmup=0,
        free_nats=0, l1_coeff=0.1,
    )  # fmt: skip
    agent = load(theirs, config=config)
    c = agent.config
    assert (c.deter_size, c.hidden_size, c.stoch_size, c.classes) == (D, U, S, C)
    assert agent.discrete is theirs.discrete and agent.action_size == A
    assert agent.shapes == theirs.shapes
    rng = np.random.default_rng(0)
    space = agent.observation_space
    observation = {k: np.stack([space[k].sample() for _ in range(2)]) for k in theirs.shapes}
    action, carry = agent.act(observation, np.array([True, True]))
    assert action.shape == ((2,) if agent.discrete else (2, A))
    agent.act(observation, np.array([False, True]), carry)
    data, x, is_first = make_inputs(theirs.shapes)
    batch = {k: (ours(v) * 255).byte() if v.ndim == 5 else ours(v) for k, v in data.items()}
    batch["action"] = torch.from_numpy(rng.integers(0, A, (T, B))) if agent.discrete else ours(x["action"]) / 2
    batch |= dict(is_first=ours(is_first), is_last=torch.zeros(T, B).bool(), is_terminal=torch.zeros(T, B).bool())
    batch["reward"] = torch.linspace(-3, 3, T * B).view(T, B)
    open_loop = {**batch, "action": agent.encode_action(batch["action"])}
    decoded = agent.model.world_model.open_loop(open_loop, 2)
    assert {k: v.shape for k, v in decoded.items()} == {
        k: (T, B, *shape) for k, shape in (theirs.shapes if getattr(theirs, "decoder", True) else {}).items()
    }
    model = agent.model.state_dict()
    weights = {k: v.clone() for k, v in model.items()}
    metrics = agent.update(batch).metrics
    assert all(torch.isfinite(v) for v in metrics.values())
    untouched = [k for k, v in weights.items() if torch.equal(v, model[k])]
    assert untouched == ["normalizer.weight"], "every part learns"
    again = load(theirs, config=config)
    again.load_tensors(agent.tensors())
    assert all(torch.equal(v, model[k]) for k, v in again.model.state_dict().items())


def test_no_video_without_a_decoder():
    agent = load(R2Dreamer("image", decoder=False, discrete=True))
    replay = Replay(agent.replay_spec, 40, 1, 0)
    for t in range(20):
        step = {"image": np.zeros((1, 3, 16, 16), np.uint8), "action": np.zeros(1, np.int32)}
        step |= {"reward": np.zeros(1, np.float32), "is_first": np.array([t == 0])}
        replay.add(step | {"is_last": np.array([False]), "is_terminal": np.array([False])})
    assert open_loop_video(agent, replay) is None
    replay.close()


def test_two_pictures_of_one_size_share_a_net():
    theirs = DreamerV3Torch("image")
    agent = load(theirs, shapes={"wrist": (1, 16, 16), "front": (2, 16, 16)})
    data, *_ = make_inputs(theirs.shapes)
    image = ours(data["image"])
    with torch.no_grad():
        found = agent.model.world_model.embed({"front": image[:, :, 1:], "wrist": image[:, :, :1]})
    close(found, ours(theirs.embed(data)), 1e-5)


def drop(name):
    return lambda p: p.pop(name)


def reshape(name, *shape):
    return lambda p: p.update({name: torch.zeros(shape)})


WRONG = [
    (DreamerV3Torch, "image", drop("_wm.dynamics._obs_stat_layer.bias"), r"_obs_stat_layer.bias: it is missing"),
    (DreamerV3Torch, "image", drop("_wm.dynamics._img_in_layers.1.weight"), r"_img_in_layers.1.weight: it is missing"),
    (
        DreamerV3Torch, "image", reshape("_wm.dynamics._cell.layers.GRU_norm.bias", 7),
        r"GRU_norm.bias: expected shape \(48,\), got \(7,\)",
    ),
    (DreamerV3Torch, "image", reshape("_wm.dynamics._imgs_stat_layer.weight", 2 * Z, U), "12 Gaussian latents"),
    (DreamerV3Torch, "image", reshape("_task_behavior.actor.mean_layer.weight", 3, 9), r"expected shape \(10, 15\)"),
    (DreamerV3Torch, "image", reshape("_wm.dynamics._imgs_stat_layer.weight", 4), "expected a tensor of 2 axes"),
    (DreamerV3Torch, "image", reshape("_wm.heads.reward.mean_layer.weight", 1, 8), "two or more bins, got 1"),
    (DreamerV3Torch, "image", reshape("_wm.heads.extra.weight", 3), "_wm.heads.extra.weight: nothing here"),
    (DreamerV3Torch, "image", drop("_wm.encoder._cnn.layers.3.weight"), "_cnn.layers.0.weight"),
    (DreamerV3Torch, "image", reshape("_wm.heads.decoder._cnn._linear_layer.weight", 60, Z + D), "its 60 rows"),
    (DreamerV3Torch, "vectors", reshape("_wm.heads.decoder._mlp.mean_layer.height.weight", 2, 6), "give shapes"),
    (R2Dreamer, "image", reshape("rssm._obs_net.obs_net_1.weight", U, U), "obs_net_1.weight: nothing here"),
    (R2Dreamer, "image", drop("rssm._img_net.img_net_0.weight"), "img_net_0.weight: it is missing"),
    (R2Dreamer, "image", reshape("rssm._deter_net._dyn_gru.weight", 9, 3, 5), "its 5 blocks do not divide"),
    (R2Dreamer, "image", reshape("actor.last.weight", 3, 9), "actor.last.weight: expected 2 rows"),
    (R2Dreamer, "image", reshape("decoder._cnn.sp2.weight", 100, 6), "its 100 rows"),
]  # fmt: skip


@pytest.mark.parametrize("make, kind, change, message", WRONG)
def test_what_does_not_fit_is_named(make, kind, change, message):
    theirs = make(kind)
    change(theirs.p)
    with pytest.raises(CheckpointError, match=message):
        load(theirs)


@pytest.mark.parametrize(
    "make, kind, options, error, message",
    [
        (DreamerV3Torch, "image", dict(stoch_size=5), CheckpointError, "its 12 rows are not stoch_size = 5"),
        (DreamerV3Torch, "image", dict(stoch_size=0), CheckpointError, "stoch_size = 0"),
        (DreamerV3Torch, "image", dict(act="sulu"), ConfigError, "act: expected one of"),
        (DreamerV3Torch, "image", dict(unimix=1.5), ConfigError, "unimix: expected a number"),
        (DreamerV3Torch, "image", dict(shapes={"image": (3, 64, 64)}), CheckpointError, "shapes: the dreamerv3-torch"),
        (DreamerV3Torch, "image", dict(shapes={"reward": (3, 16, 16)}), EnvError, "'reward'"),
        (DreamerV3Torch, "vectors", dict(shapes={"all": (5,)}), CheckpointError, "velocity.weight: it predicts"),
        (R2Dreamer, "vectors", {}, CheckpointError, "5 numbers, which the tensors do not name: give shapes"),
        (R2Dreamer, "vectors", dict(shapes={"all": (6,)}), CheckpointError, "shapes: the r2dreamer checkpoint needs"),
        (R2Dreamer, "image", dict(shapes={"image": (16, 16)}), CheckpointError, "shapes: the r2dreamer checkpoint"),
    ],
)
def test_wrong_arguments(make, kind, options, error, message):
    theirs = make(kind)
    with pytest.raises(error, match=message):
        theirs.load(theirs.state_dict(), **({"stoch_size": S} | options))


class Payload:
    """What a hostile pickle might hold."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"latest\.pt"):
        load_dreamerv3_torch(tmp_path / "latest.pt")
    (tmp_path / "latest.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="expected a r2dreamer checkpoint"):
        load_r2dreamer(tmp_path / "latest.pt")
    torch.save({"agent_state_dict": Payload()}, tmp_path / "latest.pt")
    with pytest.raises(CheckpointError, match=r"latest\.pt"):
        load_dreamerv3_torch(tmp_path / "latest.pt")
    with pytest.raises(CheckpointError, match="tensors by name"):
        load_dreamerv3_torch({"agent_state_dict": {"_wm": 3}})
    with pytest.raises(CheckpointError, match="it is missing"):
        load_r2dreamer(DreamerV3Torch("image").state_dict())
