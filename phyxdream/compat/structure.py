"""Reading the layers of a foreign module: which of them are what our ops compute, and which are not.

Whatever is read here is read again at every call, from the Parameters that the module holds then; nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from phyxdream.ops.rssm_cells import CellWeights, HeadWeights, LayerWeights, Options, PosteriorWeights


class Misfit(Exception):
    """Why a module is not what our ops compute: half a sentence that says what was found."""


ACTIVATIONS = {nn.SiLU: "silu", nn.ELU: "elu", nn.ReLU: "relu", nn.GELU: "gelu", nn.Tanh: "tanh"}


@dataclass
class Layer:
    """Linear map, norm and activation; the norm may be missing."""

    linear: nn.Module
    norm: nn.Module | None
    act: str


@dataclass
class Traits:
    """What must be the same in all layers of a scan, because the ops have one number for it."""

    acts: set[str] = field(default_factory=set)
    layer_eps: set[float] = field(default_factory=set)
    rms_eps: set[float] = field(default_factory=set)

    def options(self, unimix: float, min_std: float = 0.1, gumbel: bool = False) -> Options:
        """The options of the ops; raises `Misfit` where layers differ."""
        return Options(
            _one(self.acts, "activations", "silu"),
            unimix,
            min_std,
            _one(self.rms_eps, "eps of its RMS norms", 1e-4),
            _one(self.layer_eps, "eps of its layer norms", 1e-3),
            gumbel,
        )

    def affine(self, norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
        """Gain and shift of a norm over the last axis, as the ops take them."""
        if norm is None:
            return None, None
        weight, name = getattr(norm, "weight", None), type(norm).__name__
        if isinstance(norm, nn.LayerNorm):
            if len(norm.normalized_shape) != 1:
                raise Misfit(f"a layer norm over {len(norm.normalized_shape)} axes")
            self.layer_eps.add(norm.eps)
            if weight is None:
                return torch.ones(norm.normalized_shape), torch.zeros(norm.normalized_shape)
            return weight, torch.zeros_like(weight) if norm.bias is None else norm.bias
        if name.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1:
            eps = norm.eps  # torch's own may be None
            self.rms_eps.add(torch.finfo(weight.dtype).eps if eps is None else eps)
            return weight, None
        raise Misfit(f"a norm {name}, which is neither a LayerNorm nor an RMSNorm with a gain")

    def layer(self, layer: Layer) -> LayerWeights:
        self.acts.add(layer.act)
        return LayerWeights(layer.linear.weight, layer.linear.bias, *self.affine(layer.norm))

    def head(self, layers: list[Layer], out: nn.Linear) -> HeadWeights:
        return HeadWeights(tuple(map(self.layer, layers)), out.weight, _bias_of(out))

    def gates_after_state(
        self, linear: nn.Linear, norm: nn.Module, D: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gates, gain, shift and bias of `LayerNormGRUWeights`, of a map that reads h before x."""
        if not isinstance(norm, nn.LayerNorm):
            raise Misfit("a GRU without a layer norm on its gates")
        return torch.cat([linear.weight[:, D:], linear.weight[:, :D]], 1), *self.affine(norm), linear.bias

    def posterior(self, layers: list[Layer], out: nn.Linear) -> PosteriorWeights:
        if len(layers) != 1:
            raise Misfit(f"a posterior of {len(layers)} hidden layers instead of 1")
        return PosteriorWeights(*self.layer(layers[0]), out.weight, _bias_of(out))


def _one(found: set, what: str, default):
    if len(found) > 1:
        raise Misfit(f"different {what} in its layers: {', '.join(map(str, sorted(found)))}")
    return next(iter(found), default)


def _bias_of(linear: nn.Linear) -> Tensor:
    """Of a last layer; the ops want one."""
    return linear.weight.new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias


@dataclass
class Model:
    """The weights of an RSSM as the ops take them, built from its own Parameters."""

    cell: CellWeights
    posterior: PosteriorWeights | None
    prior: HeadWeights
    options: Options
    stoch: int
    classes: int  # 0: Gaussian
    prior_unimix: float | None = None  # where it is not that of the options
    cumulative: bool = False  # whether a class is drawn by one uniform number

    @property
    def like(self) -> Tensor:
        return self.prior.out_weight

    @property
    def latent(self) -> tuple[int, ...]:
        return (self.stoch, self.classes) if self.classes else (self.stoch,)

    @property
    def noise(self) -> tuple[int, ...]:
        """Shape of the noise of one latent state."""
        return (self.stoch,) if self.cumulative else self.latent


def tensors(weights: Iterable) -> Iterator[Tensor]:
    for x in weights:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from tensors(x)


def check_dtype(model: Model) -> Model:
    """Only float32 and float64 give the same numbers as the original."""
    for x in tensors((model.cell, model.posterior or (), model.prior)):
        if x.dtype not in (torch.float32, torch.float64):
            raise Misfit(f"weights in {str(x.dtype).removeprefix('torch.')}, which the ops round elsewhere than torch")
    return model


def layers_of(modules: Iterable[nn.Module], what: str) -> tuple[list[Layer], nn.Linear | None]:
    """Linear, norm or none, activation, and so on; and the linear map that they end in, if they do.

    `what` names the part in messages. Modules without parameters after the last linear map are passed over: whoever
    uses this compares results with the original's.
    """
    layers: list[Layer] = []
    linear = norm = None
    for module in flat(modules):
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("BlockLinear"):
            if linear is not None:
                raise Misfit(f"a linear layer of {what} without an activation after it")
            linear = module
        elif type(module) in ACTIVATIONS:
            if linear is None:
                raise Misfit(f"an activation of {what} without a linear layer before it")
            if isinstance(module, nn.ELU) and module.alpha != 1:
                raise Misfit(f"an ELU with alpha {module.alpha} in {what}")
            if isinstance(module, nn.GELU) and module.approximate != "none":
                raise Misfit(f"an approximate GELU in {what}")
            layers.append(Layer(linear, norm, ACTIVATIONS[type(module)]))
            linear = norm = None
        elif "Norm" in type(module).__name__:
            if linear is None or norm is not None:
                raise Misfit(f"a norm of {what} that does not follow a linear layer")
            norm = module
        elif isinstance(module, nn.Dropout) and module.p > 0:
            raise Misfit(f"dropout in {what}")
        elif isinstance(module, (nn.Identity, nn.Dropout, nn.Flatten)):
            continue
        elif next(module.parameters(), None) is None and norm is None and (linear is not None or not layers):
            continue  # reshapes
        else:
            names = ", ".join(sorted(x.__name__ for x in ACTIVATIONS))
            raise Misfit(f"{type(module).__name__} in {what}, where the ops know {names}")
    if norm is not None:
        raise Misfit(f"a norm of {what} without an activation after it")
    return layers, linear


def flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """What `nn.Sequential`s hold, in order."""
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from flat(module)
        else:
            yield module


def only_layer(modules: Iterable[nn.Module], what: str) -> Layer:
    """The one layer of a part that has one."""
    layers, out = layers_of(modules, what)
    if len(layers) != 1 or out is not None:
        raise Misfit(f"{what} of {len(layers) + (out is not None)} layers instead of 1")
    return layers[0]


def whole_head(modules: Iterable[nn.Module], what: str) -> tuple[list[Layer], nn.Linear]:
    """Layers and the linear map that they end in."""
    layers, out = layers_of(modules, what)
    if out is None or not layers:
        raise Misfit(f"{what} that does not end in hidden layers and a linear one")
    return layers, out


def gru_weights(rnn: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gates of an `nn.GRU` of one layer, or of an `nn.GRUCell`, as `GRUWeights` has them."""
    if isinstance(rnn, nn.GRUCell):
        found = rnn.weight_ih, rnn.weight_hh, rnn.bias_ih, rnn.bias_hh
    elif isinstance(rnn, nn.GRU) and rnn.num_layers == 1 and not rnn.bidirectional and not rnn.batch_first:
        if not rnn.bias:
            raise Misfit("a GRU without biases")
        found = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0
    else:
        raise Misfit(f"a recurrent part that is no GRU of one layer: {rnn}")
    if any(x is None for x in found):
        raise Misfit("a GRU without biases")
    return found


def watched(module: nn.Module) -> str:
    """The name of a part with hooks, which would not run: the ops read weights and call no module."""
    for name, part in itertools.islice(module.named_modules(), 1, None):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return name
    return ""
