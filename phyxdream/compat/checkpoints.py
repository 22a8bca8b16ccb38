"""Agents of other code bases from their checkpoints: `load_dreamerv3_torch`, `load_r2dreamer`.

The RSSM becomes an `nn.RSSM` with its fused scans; vector nets, most heads and the actor become those of `nn`. Nets for
pictures, and heads that `nn` has no kind for, are rebuilt here. So the same observations, actions and noise give the
same features, predictions and policy. Sizes are read off the tensors.

What is moved on the way: both put z before h in a feature, here h comes first; the layer on [z, a] is two maps here;
the first block layer of a block GRU is split into what one block and what all blocks read.

Sources of names, shapes and equations: github.com/NM512/dreamerv3-torch (networks.py, models.py, tools.py) and
github.com/NM512/r2dreamer (networks.py, rssm.py, distributions.py, dreamer.py).
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phyxdream.agents.actor_critic import ReturnNormalizer
from phyxdream.agents.config import DreamerConfig
from phyxdream.agents.dreamer import DreamerAgent
from phyxdream.agents.dreamer_v3 import DreamerV3
from phyxdream.agents.world_model import WorldModel
from phyxdream.errors import CheckpointError
from phyxdream.nn.distributions import Bernoulli, TwoHotSymlog
from phyxdream.nn.heads import Actor, BernoulliHead, TwoHotHead
from phyxdream.nn.layers import MLP, BlockLinear, Dense, linear, norm_act, symexp, symlog
from phyxdream.nn.rssm import RSSM
from phyxdream.nn.vision import ChannelNormAct, Decoder, Encoder, Shapes

Source = str | os.PathLike[str] | Mapping


def load_dreamerv3_torch(
    source: Source,
    config: DreamerConfig | None = None,
    *,
    shapes: Shapes | None = None,
    stoch_size: int = 32,
    act: str = "silu",
    unimix: float = 0.01,
    cnn_sigmoid: bool = False,
) -> DreamerAgent:
    """The agent of a NM512/dreamerv3-torch checkpoint: world model, actor, critic, slow critic, return percentiles.

    Args:
        source: path of its `latest.pt`, or what that holds, or its "agent_state_dict" alone; compiled or not.
        config: task, run, losses and optimiser of the agent; what it says of the RSSM, activation and norm is replaced
            by what the checkpoint has. None: the defaults with discount 0.997 and dynamics_coeff 0.5, which are theirs.
        shapes: the observations its encoder reads, by name, in the order of its observation space: pictures (C, H, W)
            and vectors (N,). None: a square picture called "image", and vectors as its decoder names them.
        stoch_size: number S of latent variables, their `dyn_stoch`; the tensors show S times the classes alone.
        act: activation of all nets.
        unimix: share of the uniform distribution in latents and in discrete policies.
        cnn_sigmoid: whether decoded pictures end in a sigmoid.

    Returns:
        An agent with float32 weights on `config.device`, to act, predict and learn on with. Its pictures are (C, H, W)
        where theirs are (H, W, C), and its `cont` is, as everywhere here, their chance to go on times the discount. Its
        nets are not all of kinds that `config` knows, so a run of it is read back by importing `source` again and then
        `DreamerAgent.load`.

    What no tensor shows is taken as there by default: `dyn_rec_depth` 1, `symlog_inputs`, a policy that is "onehot", or
    "normal" with learned deviations in [0.1, 1]; rewards and values by "symlog_disc", vectors by "symlog_mse". They
    clip a sampled action to [-1, 1] before their RSSM reads it; here the environment does, so imagination goes on from
    the action as it was drawn. Learning goes on with the losses of `DreamerV3`, such as REINFORCE in place of gradients
    through the dynamics, and a fresh optimiser.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, left over or of a shape that does not fit, as
            with Gaussian latents; the message names it. Nothing is loaded then.
        ConfigError: for `act`, `unimix` or a value of `config`; EnvError: for a reserved name of an observation.
    """
    w = _Weights(source, "dreamerv3-torch", ("_task_behavior._world_model.", "_expl_behavior."))
    config = config or DreamerConfig(discount=0.997, dynamics_coeff=0.5)
    return _DreamerV3Torch(w, stoch_size, act, unimix, cnn_sigmoid).agent(config, shapes)


def load_r2dreamer(
    source: Source,
    config: DreamerConfig | None = None,
    *,
    shapes: Shapes | None = None,
    stoch_size: int = 32,
    act: str = "silu",
    unimix: float = 0.01,
) -> DreamerAgent:
    """The agent of a NM512/r2dreamer checkpoint: world model, actor, critic, slow critic, return percentiles.

    Only its representation loss "dreamer" has a decoder. Agents of the other losses come without one, and without the
    projectors and prototypes of their loss: features, imagination and policy are the same, but further learning would
    shape the representation by rewards and continuation alone.

    Args:
        source: path of its `latest.pt`, or what that holds, or its "agent_state_dict" alone.
        config: task, run, losses and optimiser of the agent; what it says of the RSSM, activation and norm is replaced
            by what the checkpoint has. None: the defaults, which are theirs.
        shapes: the observations its encoder reads, by name, in the order of its observation space: pictures (C, H, W)
            and vectors (N,). None: a square picture called "image"; the tensors do not show what vectors are made of.
        stoch_size: number S of latent variables, their `stoch`; the tensors show S times the classes alone.
        act: activation of all nets.
        unimix: share of the uniform distribution in latents and in discrete policies.

    Returns:
        As `load_dreamerv3_torch`.

    What no tensor shows is taken as there by default: `symlog_inputs` of the encoder, a policy that is "onehot" or
    "bounded_normal" with deviations in [0.1, 1]; rewards and values by "symexp_twohot", vectors by "symlog_mse". A
    "multi_onehot" policy looks like a "onehot" one.

    Raises:
        As `load_dreamerv3_torch`.
    """
    learned_otherwise = ("prj.", "_prototypes", "obs_proj.", "feat_proj.", "_ema_encoder.", "_ema_obs_proj.")
    w = _Weights(source, "r2dreamer", ("_frozen_", *learned_otherwise))
    return _R2Dreamer(w, stoch_size, act, unimix).agent(config or DreamerConfig(), shapes)


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


class _Weights:
    """A foreign state dict. Every tensor is read once and with the shape that it must have; `done` finds the others."""

    def __init__(self, source: Source, whose: str, ignored: tuple[str, ...]):
        self.whose = whose
        found = {name.replace("_orig_mod.", ""): x for name, x in self._state_dict(source).items()}
        self.tensors = {name: x for name, x in found.items() if not name.startswith(ignored)}
        self._unread = set(self.tensors)

    def _state_dict(self, source: Source) -> Mapping[str, Tensor]:
        if not isinstance(source, Mapping):
            try:
                source = torch.load(source, map_location="cpu", weights_only=True)
            except Exception as e:  # the unpickler raises whatever a foreign file leads it to
                reason = str(e).strip().partition("\n")[0]
                raise CheckpointError(f"{os.fspath(source)}: expected a {self.whose} checkpoint, but {reason}") from e
        found = source.get("agent_state_dict", source) if isinstance(source, Mapping) else source
        if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
            raise CheckpointError(f"{self.whose} checkpoint: expected tensors by name under 'agent_state_dict', got "
                                  f"{type(found).__name__}")  # fmt: skip
        return found

    def error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.whose} checkpoint: {name}: {what}")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, dims: int = 2) -> tuple[int, ...]:
        """The shape of a tensor that must have `dims` axes."""
        if name not in self.tensors:
            raise self.error(name, f"it is missing, expected a tensor of {dims} axes")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims:
            raise self.error(name, f"expected a tensor of {dims} axes, got shape {shape}")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor, which must have this shape."""
        if name not in self.tensors:
            raise self.error(name, f"it is missing, expected shape {shape}")
        if self.tensors[name].shape != shape:
            raise self.error(name, f"expected shape {shape}, got {tuple(self.tensors[name].shape)}")
        self._unread.discard(name)
        return self.tensors[name]

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Set the module's own parameters from those of the same names after `prefix`."""
        for name, parameter in module.named_parameters(recurse=False):
            parameter.copy_(self.take(f"{prefix}.{name}", *parameter.shape))

    def count(self, name: Callable[[int], str]) -> int:
        """How many of name(0), name(1), ... there are."""
        return next(i for i in itertools.count() if name(i) not in self)

    def between(self, prefix: str, suffix: str) -> list[str]:
        """What stands between, in all names that start and end so, in their order."""
        return [n[len(prefix) : -len(suffix)] for n in self.tensors if n.startswith(prefix) and n.endswith(suffix)]

    def done(self) -> None:
        """Raise `CheckpointError` if a tensor was not read: it belongs to a model of another kind."""
        for name in self.tensors:
            if name in self._unread:
                raise self.error(name, f"nothing here corresponds to it, of shape {tuple(self.tensors[name].shape)}")


class _Importer:
    """What the two code bases have in common: the order of the parts, observations, heads. A stem is what the names of
    an MLP's layers begin with."""

    cell: str
    norm: str  # of all nets
    blocks: int | None = None
    strided: bool  # a convolution of the encoder halves the picture itself
    heads: ClassVar[Mapping[str, tuple[str, str]]]  # stem, and the layer that follows
    two_hot_head: type[TwoHotHead]
    percentiles: str

    # Sizes that `rssm` reads: deter, hidden, stoch · classes, classes, action.
    D: int
    U: int
    Z: int
    classes: int
    A: int

    def __init__(self, weights: _Weights, stoch_size: int, act: str, unimix: float):
        self.w, self.stoch, self.act, self.unimix = weights, stoch_size, act, unimix

    @torch.no_grad()
    def agent(self, config: DreamerConfig, shapes: Shapes | None) -> DreamerAgent:
        """All parts; what is wrong with the checkpoint is found before there is an agent."""
        with torch.random.fork_rng(devices=[]):  # the initial values, all of which are replaced
            rssm = self.rssm()
            config = replace(
                config, cell=self.cell, deter_size=self.D, hidden_size=self.U, stoch_size=self.stoch,
                classes=self.classes, blocks=self.blocks or config.blocks, unimix=self.unimix,
                initial="zeros" if rssm.initial_deter is None else "learned", embed_size=None, act=self.act,
                norm=self.norm, actor_dist=None, slot_mode=None,
            ).resolve()  # fmt: skip
            images, vectors = self.observations(shapes, rssm.embed_size)
            encoder = ForeignEncoder(images, self.image_encoder(images), vectors, self.vector_encoder(vectors))
            decoder = self.decoder(images, vectors)
            decoder.l1 = config.l1_coeff
            reward, critic = self.two_hot("reward"), self.two_hot("critic")
            has_slow = f"{self.heads['slow_critic'][1]}.weight" in self.w
            slow_critic = self.two_hot("slow_critic") if has_slow else copy.deepcopy(critic)
            cont = self.head("continue", lambda *sizes: DiscountedHead(config.discount, *sizes))
            actor = self.actor()
        percentiles = self.w.take(self.percentiles, 2) if self.percentiles in self.w else torch.zeros(2)
        self.w.done()
        world_model = ForeignWorldModel(config, [*images, *vectors], encoder, rssm, decoder, reward, cont)
        model = ForeignDreamer(world_model, actor, critic, slow_critic, percentiles)
        return ForeignAgent(model, images, vectors)

    # -- What differs.

    @property
    def vector_encoder_stem(self) -> str:
        raise NotImplementedError

    def conv(self, i: int) -> tuple[str, str]:
        """Names of the encoder's i-th convolution and of the norm after it."""
        raise NotImplementedError

    def rssm(self) -> RSSM:
        """The RSSM; sets the sizes."""
        raise NotImplementedError

    def decoder(self, images: Shapes, vectors: Shapes) -> ForeignDecoder:
        """What predicts observations: all, some or none of them."""
        raise NotImplementedError

    def action_layer(self, units: int) -> tuple[Tensor, Tensor]:
        """Weight (n, units) and bias (n,) of the layer that the actor ends in: n is A for one-hot actions, else 2A."""
        raise NotImplementedError

    def vector_names(self) -> Shapes:
        """The vectors among the observations, as far as tensors name them."""
        return {}

    # -- The latent state.

    def set_latents(self, name: str) -> None:
        """Z and the classes, from the layer `name` that ends in logits."""
        self.Z = self.w.shape(f"{name}.weight")[0]
        self.classes = self.Z // max(self.stoch, 1)
        if self.classes < 2 or self.classes * self.stoch != self.Z:
            raise self.w.error(
                f"{name}.weight",
                f"its {self.Z} rows are not stoch_size = {self.stoch} variables of two or more classes",
            )

    def deter_first(self, weight: Tensor) -> Tensor:
        """The weight (n, Z + D) of a layer on features, its columns in our order."""
        return torch.cat([weight[:, self.Z :], weight[:, : self.Z]], 1)

    # -- Observations.

    @property
    def stages(self) -> int:
        """How many convolutions the encoder has."""
        return self.w.count(lambda i: f"{self.conv(i)[0]}.weight")

    def observations(self, shapes: Shapes | None, embed: int) -> tuple[Shapes, Shapes]:
        """The pictures (C, H, W) and the vectors (N,) that the encoder reads, in its order."""
        w, stages = self.w, self.stages
        mlp, conv = f"{self.vector_encoder_stem}_linear0.weight", f"{self.conv(stages - 1)[0]}.weight"
        units, numbers = w.shape(mlp) if mlp in w else (0, 0)
        channels = w.shape(f"{self.conv(0)[0]}.weight", 4)[1] if stages else 0
        area, rest = divmod(embed - units, w.shape(conv, 4)[0] if stages else 1)
        if rest or area < 0 or bool(area) != bool(stages):
            raise w.error(conv if stages else mlp, f"it does not go with the {embed} features that the RSSM reads")
        if shapes is None:
            side = math.isqrt(area)
            images = {"image": (channels, side << stages, side << stages)} if stages else {}
            vectors = dict(self.vector_names()) if numbers else {}
            if side**2 != area:
                raise w.error(conv, f"its picture of {area} pixels is not square: give shapes")
            if sum(size for (size,) in vectors.values()) != numbers:
                raise w.error(mlp, f"it reads {numbers} numbers, which the tensors do not name: give shapes")
            return images, vectors
        images = {name: tuple(shape) for name, shape in shapes.items() if len(shape) == 3}
        vectors = {name: tuple(shape) for name, shape in shapes.items() if len(shape) == 1}
        sides = {shape[1:] for shape in images.values()}
        if (
            len(images) + len(vectors) < len(shapes)
            or sum(size for (size,) in vectors.values()) != numbers
            or sum(shape[0] for shape in images.values()) != channels
            or len(sides) > 1
            or any((height >> stages) * (width >> stages) != area for height, width in sides)
        ):
            expected = f"vectors (N,) of {numbers} numbers in all"
            if stages:
                expected = f"pictures (C, H, W) of one size and {channels} channels in all that {stages} halvings " \
                           f"leave with {area} pixels, and {expected}"  # fmt: skip
            raise CheckpointError(f"shapes: the {w.whose} checkpoint needs {expected}; got {dict(shapes)}")
        return images, vectors

    def image_encoder(self, images: Shapes) -> ConvEncoder | None:
        if not images:
            return None
        weights = [self.w.shape(f"{self.conv(i)[0]}.weight", 4) for i in range(self.stages)]
        net = ConvEncoder([weights[0][1], *(s[0] for s in weights)], weights[0][2], self.strided, self.act, self.norm)
        for i, stage in enumerate(net.stages):
            conv, norm = self.conv(i)
            self.w.fill(stage[0], conv)
            self.w.fill(stage[-1].norm, norm)
        return net

    def vector_encoder(self, vectors: Shapes) -> MLP | None:
        return self.mlp(self.vector_encoder_stem, sum(n for (n,) in vectors.values())) if vectors else None

    # -- Heads.

    def mlp(self, stem: str, inputs: int) -> MLP:
        w = self.w
        mlp = MLP(
            inputs,
            w.shape(f"{stem}_linear0.weight")[0],
            w.count(lambda i: f"{stem}_linear{i}.weight"),
            self.act,
            self.norm,
        )
        for i, (layer, norm, _) in enumerate(mlp):
            w.fill(layer, f"{stem}_linear{i}")
            w.fill(norm, f"{stem}_norm{i}")
        return mlp

    def feature_mlp(self, stem: str) -> MLP:
        """An MLP that reads features."""
        mlp = self.mlp(stem, self.Z + self.D)
        first = mlp[0][0].weight
        first.copy_(self.deter_first(first))
        return mlp

    def head(self, name: str, make: Callable[[int, int, int, str, str], nn.Module]) -> nn.Module:
        """A head that ends in one layer; `make` gets its inputs, units, layers, activation and norm."""
        stem, out = self.heads[name]
        mlp = self.feature_mlp(stem)
        head = make(self.Z + self.D, mlp.out_size, len(mlp), self.act, self.norm)
        head.mlp = mlp
        self.w.fill(head.out, out)
        return head

    def two_hot(self, name: str) -> TwoHotHead:
        out = f"{self.heads[name][1]}.weight"
        bins = self.w.shape(out)[0]
        if bins < 2:
            raise self.w.error(out, f"expected logits of two or more bins, got {bins}")
        return self.head(name, lambda *sizes: self.two_hot_head(*sizes, bins))

    def actor(self) -> Actor:
        mlp = self.feature_mlp(self.heads["actor"][0])
        weight, bias = self.action_layer(mlp.out_size)
        dist = "categorical" if len(bias) == self.A else "bounded_normal"
        actor = Actor(self.Z + self.D, self.A, mlp.out_size, len(mlp), dist, self.act, self.norm, self.unimix)
        actor.mlp = mlp
        actor.out.weight.copy_(weight)
        actor.out.bias.copy_(bias)
        return actor


class _DreamerV3Torch(_Importer):
    cell, norm, strided = "layernorm_gru", "layer", True
    vector_encoder_stem = "_wm.encoder._mlp.layers.Encoder"
    heads: ClassVar = {
        "reward": ("_wm.heads.reward.layers.Reward", "_wm.heads.reward.mean_layer"),
        "continue": ("_wm.heads.cont.layers.Cont", "_wm.heads.cont.mean_layer"),
        "actor": ("_task_behavior.actor.layers.Actor", "_task_behavior.actor.mean_layer"),
        "critic": ("_task_behavior.value.layers.Value", "_task_behavior.value.mean_layer"),
        "slow_critic": ("_task_behavior._slow_value.layers.Value", "_task_behavior._slow_value.mean_layer"),
    }
    percentiles = "_task_behavior.ema_vals"

    def __init__(self, weights: _Weights, stoch_size: int, act: str, unimix: float, cnn_sigmoid: bool):
        super().__init__(weights, stoch_size, act, unimix)
        self.cnn_sigmoid = cnn_sigmoid
        self.two_hot_head = SymlogTwoHotHead

    def conv(self, i: int) -> tuple[str, str]:
        return f"_wm.encoder._cnn.layers.{3 * i}", f"_wm.encoder._cnn.layers.{3 * i + 1}.norm"

    def rssm(self) -> RSSM:
        w, at = self.w, "_wm.dynamics."
        self.D = w.shape(f"{at}_img_out_layers.0.weight")[1]
        self.U, inputs = w.shape(f"{at}_img_in_layers.0.weight")
        self.A = w.shape(f"{self.heads['actor'][1]}.weight")[0]
        rows = w.shape(f"{at}_imgs_stat_layer.weight")[0]
        if 2 * (inputs - self.A) == rows:
            raise w.error(
                f"{at}_imgs_stat_layer.weight",
                f"its {rows} rows are means and deviations of {rows // 2} Gaussian latents, expected categorical ones",
            )
        self.set_latents(f"{at}_imgs_stat_layer")
        embed = w.shape(f"{at}_obs_out_layers.0.weight")[1] - self.D
        rssm = RSSM(
            embed, self.A, self.D, self.stoch, self.classes, self.U, self.cell, unimix=self.unimix,
            initial="learned" if f"{at}W" in w else "zeros", act=self.act,
        )  # fmt: skip
        both = w.take(f"{at}_img_in_layers.0.weight", self.U, self.Z + self.A)
        rssm.cell.in_stoch.weight.copy_(both[:, : self.Z])
        rssm.cell.in_action.weight.copy_(both[:, self.Z :])
        w.fill(rssm.cell.norm, f"{at}_img_in_layers.1")
        w.fill(rssm.cell.gates, f"{at}_cell.layers.GRU_linear")
        w.fill(rssm.cell.gates_norm, f"{at}_cell.layers.GRU_norm")
        for dense, name in ((rssm.prior[0][0], "_img_out_layers"), (rssm.posterior_in, "_obs_out_layers")):
            w.fill(dense[0], f"{at}{name}.0")
            w.fill(dense[1], f"{at}{name}.1")
        w.fill(rssm.prior[1], f"{at}_imgs_stat_layer")
        w.fill(rssm.posterior_out, f"{at}_obs_stat_layer")
        if rssm.initial_deter is not None:
            rssm.initial_deter.copy_(w.take(f"{at}W", 1, self.D)[0])
        return rssm

    def vector_names(self) -> Shapes:
        at = "_wm.heads.decoder._mlp.mean_layer."
        return {name: self.w.shape(f"{at}{name}.weight")[:1] for name in self.w.between(at, ".weight")}

    def decoder(self, images: Shapes, vectors: Shapes) -> ForeignDecoder:
        w, at = self.w, "_wm.heads.decoder._mlp."
        decoded, vector_net = self.vector_names(), None
        for name, shape in decoded.items():
            if vectors.get(name) != shape:
                raise w.error(
                    f"{at}mean_layer.{name}.weight",
                    f"it predicts an observation of shape {shape}, the encoder reads the vectors {dict(vectors)}",
                )
        if decoded:
            mlp = self.feature_mlp(f"{at}layers.Decoder")
            out = linear(mlp.out_size, sum(n for (n,) in decoded.values()))
            rows = out.weight.split([n for (n,) in decoded.values()])
            for name, weight, bias in zip(decoded, rows, out.bias.split([len(r) for r in rows]), strict=True):
                weight.copy_(w.take(f"{at}mean_layer.{name}.weight", *weight.shape))
                bias.copy_(w.take(f"{at}mean_layer.{name}.bias", *bias.shape))
            vector_net = nn.Sequential(mlp, out)
        return ForeignDecoder(images, self.image_decoder(images), decoded, vector_net)

    def image_decoder(self, images: Shapes) -> TransposedDecoder | None:
        if not images:
            return None
        w, at = self.w, "_wm.heads.decoder._cnn."
        stages = w.count(lambda i: f"{at}layers.{3 * i}.weight")
        weights = [w.shape(f"{at}layers.{3 * i}.weight", 4) for i in range(max(stages, 1))]
        channels = [weights[0][0], *(s[1] for s in weights)]
        rows = w.shape(f"{at}_linear_layer.weight")[0]
        shape, smallest = _stacked(images), math.isqrt(rows // channels[0])
        if smallest**2 * channels[0] != rows or shape != (channels[-1], smallest << stages, smallest << stages):
            raise w.error(f"{at}_linear_layer.weight", f"its {rows} rows and {stages} layers of channels {channels} do "
                                                       f"not make the encoder's pictures of shape {shape}")  # fmt: skip
        net = TransposedDecoder(
            self.D + self.Z, smallest, channels, weights[0][2], self.cnn_sigmoid, self.act, self.norm
        )
        w.fill(net.inp, f"{at}_linear_layer")
        net.inp.weight.copy_(self.deter_first(net.inp.weight))
        for i, stage in enumerate(net.stages):
            w.fill(stage[0], f"{at}layers.{3 * i}")
            if i < stages - 1:
                w.fill(stage[1].norm, f"{at}layers.{3 * i + 1}.norm")
        return net

    def action_layer(self, units: int) -> tuple[Tensor, Tensor]:
        w, at = self.w, "_task_behavior.actor."
        parts = [p for p in ("mean_layer", "std_layer") if p == "mean_layer" or f"{at}{p}.weight" in w]
        weights = [w.take(f"{at}{part}.weight", self.A, units) for part in parts]
        return torch.cat(weights), torch.cat([w.take(f"{at}{part}.bias", self.A) for part in parts])


class _R2Dreamer(_Importer):
    cell, norm, strided = "block_gru", "rms", False
    heads: ClassVar = {
        "reward": ("reward.mlp.layers.reward", "reward.last"),
        "continue": ("cont.mlp.layers.cont", "cont.last"),
        "actor": ("actor.mlp.layers.actor", "actor.last"),
        "critic": ("value.mlp.layers.value", "value.last"),
        "slow_critic": ("_slow_value.mlp.layers.value", "_slow_value.last"),
    }
    percentiles = "return_ema.ema_vals"
    two_hot_head = TwoHotHead

    @property
    def vector_encoder_stem(self) -> str:
        return f"encoder.encoders.{1 if self.stages else 0}.layers.mlp_encoder"

    def conv(self, i: int) -> tuple[str, str]:
        return f"encoder.encoders.0.layers.{4 * i}", f"encoder.encoders.0.layers.{4 * i + 2}"

    def rssm(self) -> RSSM:
        w, at = self.w, "rssm._deter_net."
        self.U, self.D = w.shape(f"{at}_dyn_in0.0.weight")
        self.A = w.shape(f"{at}_dyn_in2.0.weight")[1]
        self.set_latents("rssm._img_net.img_net_logit")
        G = self.blocks = w.shape(f"{at}_dyn_gru.weight", 3)[2]
        if self.D % G:
            raise w.error(f"{at}_dyn_gru.weight", f"its {G} blocks do not divide the {self.D} deterministic features")
        embed = w.shape("rssm._obs_net.obs_net_0.weight")[1] - self.D
        layers = w.count(lambda i: f"rssm._img_net.img_net_{i}.weight")
        if not layers:
            raise w.error("rssm._img_net.img_net_0.weight", "it is missing")
        rssm = RSSM(
            embed, self.A, self.D, self.stoch, self.classes, self.U, self.cell, G, self.unimix, act=self.act,
            prior_layers=layers,
        )  # fmt: skip
        cell, size = rssm.cell, self.D // G
        for i, dense in enumerate((cell.in_deter, cell.in_stoch, cell.in_action)):
            w.fill(dense[0], f"{at}_dyn_in{i}.0")
            w.fill(dense[1], f"{at}_dyn_in{i}.1")
        mix = w.take(f"{at}_dyn_hid.dyn_hid_0.weight", size, size + 3 * self.U, G)  # outputs, inputs, blocks
        cell.mix_deter.weight.copy_(mix[:, :size].permute(2, 1, 0))
        cell.mix_inputs.weight.copy_(mix[:, size:].permute(2, 0, 1).flatten(0, 1))
        cell.mix_inputs.bias.copy_(w.take(f"{at}_dyn_hid.dyn_hid_0.bias", self.D))
        w.fill(cell.norm, f"{at}_dyn_hid.norm_0")
        self.fill_blocks(cell.gates, f"{at}_dyn_gru")
        w.fill(rssm.posterior_in[0], "rssm._obs_net.obs_net_0")
        w.fill(rssm.posterior_in[1], "rssm._obs_net.obs_net_n_0")
        w.fill(rssm.posterior_out, "rssm._obs_net.obs_net_logit")
        for i, (layer, norm, _) in enumerate(rssm.prior[0]):
            w.fill(layer, f"rssm._img_net.img_net_{i}")
            w.fill(norm, f"rssm._img_net.img_net_n_{i}")
        w.fill(rssm.prior[1], "rssm._img_net.img_net_logit")
        return rssm

    def fill_blocks(self, layer: BlockLinear, name: str) -> None:
        """A block-diagonal layer, stored there as (outputs, inputs, blocks)."""
        blocks, inputs, outputs = layer.weight.shape
        layer.weight.copy_(self.w.take(f"{name}.weight", outputs, inputs, blocks).permute(2, 1, 0))
        layer.bias.copy_(self.w.take(f"{name}.bias", blocks * outputs))

    def decoder(self, images: Shapes, vectors: Shapes) -> ForeignDecoder:
        w, mlp, last = self.w, "decoder._mlp.mlp.layers.mlp_decoder", "decoder._mlp.last"
        images = images if "decoder._cnn.sp0.weight" in w else {}
        vectors, vector_net = (vectors, None) if f"{last}.weight" in w else ({}, None)
        if vectors:
            body = self.feature_mlp(mlp)
            vector_net = nn.Sequential(body, linear(body.out_size, sum(n for (n,) in vectors.values())))
            w.fill(vector_net[1], last)
        return ForeignDecoder(images, self.image_decoder(images), vectors, vector_net)

    def image_decoder(self, images: Shapes) -> SpatialDecoder | None:
        if not images:
            return None
        w, at = self.w, "decoder._cnn."
        stages = w.count(lambda i: f"{at}layers.{4 * i + 1}.weight")
        weights = [w.shape(f"{at}layers.{4 * i + 1}.weight", 4) for i in range(max(stages, 1))]
        channels = [weights[0][1], *(s[0] for s in weights)]
        (rows, units), blocks = w.shape(f"{at}sp2.weight"), w.shape(f"{at}sp0.weight", 3)[2]
        shape = _, H, W = _stacked(images)
        smallest = H >> stages, W >> stages
        made = channels[-1], smallest[0] << stages, smallest[1] << stages
        if made != shape or rows != math.prod(smallest) * channels[0] or channels[0] % blocks or self.D % blocks:
            raise w.error(
                f"{at}sp2.weight",
                f"its {rows} rows, in {blocks} blocks, and {stages} layers of channels {channels} do not make the "
                f"encoder's pictures of shape {shape}",
            )
        net = SpatialDecoder(self.D, self.Z, smallest, channels, blocks, units, weights[0][2], self.act, self.norm)
        self.fill_blocks(net.from_deter, f"{at}sp0")
        w.fill(net.from_stoch[0][0], f"{at}sp1.0")
        w.fill(net.from_stoch[0][1], f"{at}sp1.1")
        w.fill(net.from_stoch[1], f"{at}sp2")
        w.fill(net.norm, f"{at}sp_norm.0")
        for i, stage in enumerate(net.stages):
            w.fill(stage[1], f"{at}layers.{4 * i + 1}")
            if i < stages - 1:
                w.fill(stage[2].norm, f"{at}layers.{4 * i + 2}")
        return net

    def action_layer(self, units: int) -> tuple[Tensor, Tensor]:
        rows = self.w.shape("actor.last.weight")[0]
        if rows not in (self.A, 2 * self.A):
            raise self.w.error("actor.last.weight", f"expected {self.A} rows for one-hot actions or {2 * self.A} for "
                                                    f"continuous ones, got {rows}")  # fmt: skip
        return self.w.take("actor.last.weight", rows, units), self.w.take("actor.last.bias", rows)


def _stacked(images: Shapes) -> tuple[int, int, int]:
    """The shape of pictures of one size, stacked over channels."""
    height, width = next(iter(images.values()))[1:]
    return sum(shape[0] for shape in images.values()), height, width


# ---------------------------------------------------------------------------------------------------------------------
# Nets that `phyxdream.nn` has no kind for.


class SameConv(nn.Conv2d):
    """A convolution with the padding that TensorFlow calls "SAME": ceil(side / stride) outputs, and where the padding
    is odd, the one more after the picture."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for side, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class ConvEncoder(nn.Module):
    """Pictures (N, C, H, W) in [0, 1] to (N, features): centred, halved by every stage, flattened as (C, H, W).

    Args:
        channels: of the picture and after each stage.
        kernel: side of all convolutions.
        strided: they have stride 2 and no bias; else stride 1, and a maximum over 2x2 after them.
        act, norm: after each stage.
    """

    def __init__(self, channels: Sequence[int], kernel: int, strided: bool, act: str, norm: str):
        super().__init__()
        self.stages = nn.Sequential()
        for inputs, outputs in itertools.pairwise(channels):
            halve = [SameConv(inputs, outputs, kernel, 2, bias=False)] if strided else [
                SameConv(inputs, outputs, kernel), nn.MaxPool2d(2)]  # fmt: skip
            self.stages.append(nn.Sequential(*halve, ChannelNormAct(norm, outputs, act)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.stages[0][0].weight.dtype) - 0.5
        return self.stages(x.contiguous(memory_format=torch.channels_last)).flatten(1)


class TransposedDecoder(nn.Module):
    """Features (N, F) to pictures (N, C, H, W) by transposed convolutions (dreamerv3-torch).

    Args:
        inputs: F.
        smallest: side of the picture that the first layer makes.
        channels: of that picture and after each stage, which doubles it.
        kernel: side of all convolutions.
        sigmoid: squash the pictures; else they are shifted by one half.
        act, norm: between stages.
    """

    def __init__(
        self, inputs: int, smallest: int, channels: Sequence[int], kernel: int, sigmoid: bool, act: str, norm: str
    ):
        super().__init__()
        self.first, self.sigmoid = (smallest, smallest, channels[0]), sigmoid
        self.inp = linear(inputs, math.prod(self.first))
        self.stages = nn.Sequential()
        padding, more = divmod(kernel - 1, 2)
        for i, (now, then) in enumerate(itertools.pairwise(channels)):
            last = i == len(channels) - 2
            stage = [nn.ConvTranspose2d(now, then, kernel, 2, padding, 1 - more, bias=last)]
            self.stages.append(nn.Sequential(*stage, *([] if last else [ChannelNormAct(norm, then, act)])))

    def forward(self, feature: Tensor) -> Tensor:
        x = self.stages(self.inp(feature).unflatten(-1, self.first).permute(0, 3, 1, 2))
        return torch.sigmoid(x) if self.sigmoid else x + 0.5


class SpatialDecoder(nn.Module):
    """Features (N, D + Z) to pictures (N, C, H, W) in [0, 1]: a small picture from h, block by block of its channels,
    and one from z are added and enlarged (r2dreamer, and DreamerV3 of 2024).

    Args:
        deter, stoch: D and Z.
        smallest: height and width of the small picture.
        channels: of it and after each stage, which doubles it.
        blocks: of the layer on h.
        units: width of the hidden layer on z.
        kernel: side of all convolutions.
        act, norm: between stages.
    """

    def __init__(
        self,
        deter: int,
        stoch: int,
        smallest: tuple[int, int],
        channels: Sequence[int],
        blocks: int,
        units: int,
        kernel: int,
        act: str,
        norm: str,
    ):
        super().__init__()
        self.sizes, self.blocks, self.first = [deter, stoch], blocks, (*smallest, channels[0])
        size = math.prod(self.first)
        self.from_deter = BlockLinear(deter, size, blocks)
        self.from_stoch = nn.Sequential(Dense(stoch, units, act, norm), linear(units, size))
        self.norm, self.act = norm_act(norm, channels[0], act)
        self.stages = nn.Sequential()
        for i, (now, then) in enumerate(itertools.pairwise(channels)):
            stage = [nn.Upsample(scale_factor=2), SameConv(now, then, kernel)]
            last = i == len(channels) - 2
            self.stages.append(nn.Sequential(*stage, *([] if last else [ChannelNormAct(norm, then, act)])))

    def forward(self, feature: Tensor) -> Tensor:
        deter, stoch = feature.split(self.sizes, -1)
        height, width, _ = self.first
        spatial = self.from_deter(deter).unflatten(-1, (self.blocks, height, width, -1))
        x = spatial.permute(0, 2, 3, 1, 4).flatten(-2) + self.from_stoch(stoch).unflatten(-1, self.first)
        return torch.sigmoid(self.stages(self.act(self.norm(x)).permute(0, 3, 1, 2)))


class SymlogTwoHot(TwoHotSymlog):
    """A scalar as a categorical over bins in symlog space; its mean is taken there, too (early V3)."""

    @property
    def mode(self) -> Tensor:
        return symexp(super().mode)

    mean = mode

    def loss(self, target: Tensor) -> Tensor:
        return super().loss(symlog(target))


class SymlogTwoHotHead(TwoHotHead):
    """`TwoHotHead` that ends in `SymlogTwoHot`."""

    def __init__(self, inputs: int, units: int, layers: int, act: str, norm: str, bins: int):
        super().__init__(inputs, units, layers, act, norm, bins)
        self.bins = torch.linspace(-20, 20, bins)

    def forward(self, feature: Tensor) -> SymlogTwoHot:
        return SymlogTwoHot(self.out(self.mlp(feature)), self.bins)


class DiscountedBernoulli(Bernoulli):
    """The chance that an episode goes on, times the discount: the foreign head predicts the chance alone, while ours
    learn, and imagination reads, the product."""

    def __init__(self, logit: Tensor, discount: float):
        super().__init__(logit)
        self.discount = discount

    @property
    def mean(self) -> Tensor:
        return self.discount * super().mean

    def loss(self, target: Tensor) -> Tensor:
        """(...): cross-entropy of the chance; the target is discounted."""
        return super().loss(target / self.discount if self.discount else target)


class DiscountedHead(BernoulliHead):
    """`BernoulliHead` that ends in `DiscountedBernoulli`."""

    def __init__(self, discount: float, inputs: int, units: int, layers: int, act: str, norm: str):
        super().__init__(inputs, units, layers, act, norm)
        self.discount = discount

    def forward(self, feature: Tensor) -> DiscountedBernoulli:
        return DiscountedBernoulli(super().forward(feature).logit, self.discount)


# ---------------------------------------------------------------------------------------------------------------------
# Our classes over parts that are given instead of made from a configuration.


class ForeignEncoder(Encoder):
    """`Encoder` with the nets given: pictures are stacked, and vectors joined, in the order of the arguments."""

    def __init__(self, images: Shapes, image_net: ConvEncoder | None, vectors: Shapes, vector_net: MLP | None):
        nn.Module.__init__(self)
        self.groups, self.vectors = [list(images)] if images else [], list(vectors)
        self.image_nets = nn.ModuleList([image_net] if images else [])
        self.vector_net = vector_net


class ForeignDecoder(Decoder):
    """`Decoder` with the nets given, which may be none: then it predicts nothing."""

    def __init__(self, images: Shapes, image_net: nn.Module | None, vectors: Shapes, vector_net: nn.Module | None):
        nn.Module.__init__(self)
        self.l1 = 0.0
        self.groups = [list(images)] if images else []
        self.image_channels = [[shape[0] for shape in images.values()]] if images else []
        self.vectors = {name: size for name, (size,) in vectors.items()}
        self.image_nets = nn.ModuleList([image_net] if images else [])
        self.vector_net = vector_net


class ForeignWorldModel(WorldModel):
    """`WorldModel` with the parts given."""

    def __init__(
        self,
        config: DreamerConfig,
        names: Iterable[str],
        encoder: ForeignEncoder,
        rssm: RSSM,
        decoder: ForeignDecoder,
        reward: TwoHotHead,
        cont: DiscountedHead,
    ):
        nn.Module.__init__(self)
        self.config, self.names = config, sorted(names)
        self.encoder, self.project, self.rssm, self.decoder = encoder, nn.Identity(), rssm, decoder
        self.reward, self.cont = reward, cont


class ForeignDreamer(DreamerV3):
    """`DreamerV3` with the parts given. `percentiles` (2,) are the moving ones of the returns."""

    def __init__(
        self,
        world_model: ForeignWorldModel,
        actor: Actor,
        critic: TwoHotHead,
        slow_critic: TwoHotHead,
        percentiles: Tensor,
    ):
        nn.Module.__init__(self)
        self.config = world_model.config
        self.world_model, self.actor, self.critic = world_model, actor, critic
        self.slow_critic = slow_critic.requires_grad_(False)
        self.normalizer = ReturnNormalizer(self.config.return_norm_rate)
        if percentiles.any():
            self.normalizer.percentiles.copy_(percentiles)
            self.normalizer.weight.fill_(1.0)  # theirs are not corrected for the zeros they start from


class ForeignAgent(DreamerAgent):
    """`DreamerAgent` with the model given. Pictures are uint8, continuous actions lie in [-1, 1]."""

    def __init__(self, model: ForeignDreamer, images: Shapes, vectors: Shapes):
        box, size = gymnasium.spaces.Box, model.actor.action_size
        spaces = {name: box(0, 255, shape, np.uint8) for name, shape in images.items()}
        spaces |= {name: box(-np.inf, np.inf, shape, np.float32) for name, shape in vectors.items()}
        discrete = model.actor.dist == "categorical"
        actions = gymnasium.spaces.Discrete(size) if discrete else box(-1, 1, (size,), np.float32)
        self._given = model
        super().__init__(model.config, gymnasium.spaces.Dict(spaces), actions)

    def make_model(self) -> ForeignDreamer:
        return self._given


__all__ = ["load_dreamerv3_torch", "load_r2dreamer"]
