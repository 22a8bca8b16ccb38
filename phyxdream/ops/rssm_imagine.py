"""The imagine scan of an RSSM: H steps of cell, prior and sample, under given actions or under a policy.

    a_t = action_t, or a_t ~ π(h_{t-1}, z_{t-1}), drawn by the given noise
    h_t = cell(h_{t-1}, z_{t-1}, a_t)         statistics_t = prior(h_t)
    z_t ~ p(statistics_t), drawn by the given noise

The equations of the cells and policies are in phyxdream/ops/rssm_cells.py. C++ in csrc/rssm_scan.cpp, called by
phyxdream/ops/rssm_imagine_cpu.py; Triton in kernels/rssm_scan.py, called by phyxdream/ops/rssm_imagine_triton.py.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from phyxdream.ops import rssm_cells, rssm_cpu, rssm_imagine_cpu, rssm_imagine_triton, rssm_triton
from phyxdream.ops.backend import Backend, Op
from phyxdream.ops.rssm_cells import CELLS, POLICIES, CellWeights, HeadWeights, LayerWeights, Options, Sizes
from phyxdream.ops.rssm_contract import (
    alike,
    cell_name,
    check_act,
    check_cell,
    check_flag,
    check_head,
    check_numbers,
    check_shape,
    check_tensors,
    in_float32,
    named_weights,
    per_class,
)
from phyxdream.ops.rssm_imagine_cpu import PolicyOptions


def rssm_imagine(
    action: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    cell: CellWeights,
    prior: HeadWeights,
    *,
    act: str | None = None,
    unimix: float = 0.01,
    min_std: float = 0.1,
    rms_eps: float = 1e-4,
    layer_eps: float = 1e-3,
    gumbel: bool = False,
) -> tuple[Tensor, ...]:
    """Prior states that follow a state under given actions, differentiable once in every tensor but `noise`.

    Latents are categorical where `stoch` is (B, S, C) and Gaussian where it is (B, S). Categorical samples are
    one-hot with the straight-through gradient of p = (1 - unimix) softmax(logits) + unimix / C; Gaussian ones are
    mean + std · noise with std = softplus(raw) + min_std.

    Args:
        action: (H, B, A) float32, float64, bfloat16 or float16, any strides; `action[t]` leads to state t of the
            result. All tensors share its dtype.
        deter: (B, D) state before the first step.
        stoch: (B, S, C) or (B, S).
        noise: (H, B, S, C) or (H, B, S), as for `rssm_observe`.
        cell: `GRUWeights`, `LayerNormGRUWeights` or `BlockGRUWeights`; which one says which cell it is.
        prior: `HeadWeights` from h to the statistics of z.
        act: activation of all layers, `silu`, `elu`, `relu`, `gelu` or `tanh`; None is the cell's own: `elu` for a
            GRU, else `silu`.
        unimix: share in [0, 1) of the uniform distribution in categorical latents.
        min_std: what is added to the standard deviation of Gaussian latents.
        rms_eps, layer_eps: added to the mean square or variance by the two kinds of norm.
        gumbel: as for `rssm_observe`.

    Returns:
        deter (H, B, D), stoch (H, B, S, C) and logits (H, B, S, C) before unimix; or deter, stoch (H, B, S), mean and
        std (H, B, S). The state before the first step is not among them.

    Half precision is computed in float32, state included, and rounded once; but Triton's products have half-precision
    factors. Inside autocast, all tensors become float32, and on CUDA of the region's dtype.

    Raises:
        TypeError: an argument is of another type, or the dtypes differ.
        ValueError: a shape does not fit, the devices differ, a tensor is empty, or an option is out of range.

    Source: Hafner et al., "Dream to Control", 2020; as `rssm_observe` for the cells and latents.

    >>> from phyxdream.ops import GRUWeights, HeadWeights, LayerWeights
    >>> H, B, A, D, S, C, U = 5, 2, 1, 4, 2, 3, 6
    >>> cell = GRUWeights(torch.randn(U, S * C), torch.randn(U, A), torch.zeros(U), None, None,
    ...                   torch.randn(3 * D, U), torch.randn(3 * D, D), torch.zeros(3 * D), torch.zeros(3 * D))
    >>> prior = HeadWeights((LayerWeights(torch.randn(U, D), torch.zeros(U), None, None),),
    ...                     torch.randn(S * C, U), torch.zeros(S * C))
    >>> deter, stoch, logits = rssm_imagine(
    ...     torch.randn(H, B, A), torch.zeros(B, D), torch.zeros(B, S, C), torch.rand(H, B, S, C), cell, prior)
    >>> deter.shape, stoch.shape, stoch.sum(-1).unique()
    (torch.Size([5, 2, 4]), torch.Size([5, 2, 2, 3]), tensor([1.]))
    """
    args = _prepare(
        action, deter, stoch, noise, cell, prior, act=act, unimix=unimix, min_std=min_std, rms_eps=rms_eps,
        layer_eps=layer_eps, gumbel=gumbel,
    )  # fmt: skip
    return _results(_open_loop(*args), noise, min_std)


def rssm_imagine_policy(
    action_noise: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    cell: CellWeights,
    prior: HeadWeights,
    policy: HeadWeights,
    *,
    dist: str,
    act: str | None = None,
    unimix: float = 0.01,
    min_std: float = 0.1,
    rms_eps: float = 1e-4,
    layer_eps: float = 1e-3,
    gumbel: bool = False,
    policy_act: str | None = None,
    policy_unimix: float = 0.01,
    policy_min_std: float = 0.1,
    policy_max_std: float = 1.0,
    detach_feature: bool = False,
    clip_action: bool = False,
) -> tuple[Tensor, ...]:
    """Prior states that follow a state under a policy that acts on each of them, differentiable once in every tensor
    but the two kinds of noise: through the dynamics, the actions and the samples.

    Args:
        action_noise: (H, B, A), uniform in [0, 1) for a categorical policy, else standard normal; dtypes as `noise`.
        policy: `HeadWeights` from [h, z], (D + S·C) or (D + S), to the statistics of the action: A logits, or A means
            and A raw deviations.
        dist: `categorical` (one-hot actions, straight-through gradient), `bounded_normal` or `tanh_normal`; see
            `rssm_cells.action_moments`.
        policy_act: activation of the policy's layers; None is that of all others.
        policy_unimix: share in [0, 1) of the uniform distribution in categorical actions.
        policy_min_std, policy_max_std: bounds of the standard deviation of `bounded_normal`.
        detach_feature: the policy reads [h, z] as constants, so that gradients pass from an action to the state it led
            to, and not through what later actions make of that state: what DreamerV1, V2 and most of their ports do.
        clip_action: the cell reads a / max(1, |a|), divided by a constant, as the environment would take the action: of
            `bounded_normal`, samples may lie beyond ±1. Of a block GRU it is the case anyway.

    All other arguments are those of `rssm_imagine`.

    Returns:
        What `rssm_imagine` returns, and the actions (H, B, A), not clipped: `action[t]` was drawn at the state before
        state t.

    Raises:
        As `rssm_imagine`.

    Source: Hafner et al., "Dream to Control", 2020 (`tanh_normal`); danijar/dreamerv3 (`bounded_normal`, unimix).

    >>> from phyxdream.ops import GRUWeights, HeadWeights, LayerWeights
    >>> H, B, A, D, S, C, U = 5, 2, 3, 4, 2, 3, 6
    >>> cell = GRUWeights(torch.randn(U, S * C), torch.randn(U, A), torch.zeros(U), None, None,
    ...                   torch.randn(3 * D, U), torch.randn(3 * D, D), torch.zeros(3 * D), torch.zeros(3 * D))
    >>> layer = lambda inputs: LayerWeights(torch.randn(U, inputs), torch.zeros(U), None, None)
    >>> prior = HeadWeights((layer(D),), torch.randn(S * C, U), torch.zeros(S * C))
    >>> policy = HeadWeights((layer(D + S * C),), torch.randn(A, U), torch.zeros(A))
    >>> deter, stoch, logits, action = rssm_imagine_policy(
    ...     torch.rand(H, B, A), torch.zeros(B, D), torch.zeros(B, S, C), torch.rand(H, B, S, C), cell, prior, policy,
    ...     dist="categorical")
    >>> action.shape, action.sum(-1).unique()
    (torch.Size([5, 2, 3]), tensor([1.]))
    """
    args = _prepare(
        action_noise, deter, stoch, noise, cell, prior, policy, dist=dist, act=act, unimix=unimix, min_std=min_std,
        rms_eps=rms_eps, layer_eps=layer_eps, gumbel=gumbel, policy_act=policy_act, policy_unimix=policy_unimix,
        policy_min_std=policy_min_std, policy_max_std=policy_max_std, detach_feature=detach_feature,
        clip_action=clip_action,
    )  # fmt: skip
    output = _closed_loop(*args)
    return *_results(output, noise, min_std), output[3]


def _results(output, noise, min_std):
    deter, stoch, statistics = output[:3]
    if stoch.dim() == 4:
        return deter, stoch, statistics.unflatten(-1, stoch.shape[2:])
    mean, raw = statistics.chunk(2, -1)
    return deter, stoch, mean, rssm_cells.deviation(raw, min_std)


# Arguments of both schemas: four tensors, the first of them the actions or their noise; the weights of cell, prior and
# policy in the order of their fields, and for each field a 1, or a 0 where it is None (torch follows no list with None
# in it); the name of the cell, how many layers prior and policy have, the options; and whether a backward may follow,
# which needs the tape.
_TENSORS = 4
_INPUTS = ", ".join(
    ["Tensor action", "Tensor deter", "Tensor stoch", "Tensor noise", "Tensor[] weights", "str given"]
    + ["str cell", "int prior_layers", "int policy_layers", "str dist", "str act", "str policy_act"]
    + [f"float {name}" for name in ("unimix", "min_std", "rms_eps", "layer_eps")]
    + [f"float {name}" for name in ("policy_unimix", "policy_min_std", "policy_max_std")]
    + [f"bool {name}" for name in ("detach_feature", "clip_action", "gumbel", "cumulative", "keep_tape")]
)
# Beside the results, what the backward needs: the tape (floats, laid out by whoever wrote it) and the sampled classes.
_OUTPUTS = ("deter_out", "stoch_out", "statistics", "action_out", "tape", "index")
_SCHEMA = f"({_INPUTS}) -> ({', '.join(f'Tensor {name}' for name in _OUTPUTS)})"
_RESULTS = 4
_BACKWARD_SCHEMA = (
    f"({', '.join(f'Tensor? grad_{name}' for name in _OUTPUTS[:_RESULTS])}, bool[] wanted, "
    f"{', '.join(f'Tensor {name}' for name in _OUTPUTS)}, {_INPUTS}) -> Tensor[]"
)


def _prepare(
    action, deter, stoch, noise, cell, prior, policy=None, *, dist="", act=None, unimix=0.01, min_std=0.1, rms_eps=1e-4,
    layer_eps=1e-3, gumbel=False, policy_act=None, policy_unimix=0.01, policy_min_std=0.1, policy_max_std=1.0,
    detach_feature=False, clip_action=False,
) -> tuple:  # fmt: skip
    """The checked arguments of the schema; `action` is its noise if there is a policy."""
    closed = bool(dist) or policy is not None
    first = "action_noise" if closed else "action"
    tensors = {first: action, "deter": deter, "stoch": stoch, "noise": noise}
    check_tensors(tensors)
    name = cell_name(cell)
    if noise.dim() not in (3, 4):
        raise ValueError(f"noise: expected shape (H, B, S, C) or (H, B, S), got {tuple(noise.shape)}")
    noise, cumulative = per_class(noise, stoch)
    tensors["noise"] = noise
    H, B, *latent = noise.shape
    if action.dim() != 3 or action.shape[:2] != (H, B):
        raise ValueError(f"{first}: expected shape ({H}, {B}, A), got {tuple(action.shape)}")
    if deter.dim() != 2 or deter.shape[0] != B:
        raise ValueError(f"deter: expected shape ({B}, D), got {tuple(deter.shape)}")
    check_shape("stoch", stoch, (B, *latent))
    A, D, Z = action.shape[2], deter.shape[1], math.prod(latent)
    if 0 in (H, B, A, D, Z):
        sizes = dict(H=H, B=B, A=A, D=D, latent=tuple(latent))
        raise ValueError(f"{first}, deter, noise: expected no empty axis, got {sizes}")
    check_cell(cell, Sizes(0, A, D, Z))
    check_head("prior", prior, D, Z if len(latent) == 2 else 2 * Z)
    heads = {"prior": prior}
    if closed:
        if dist not in POLICIES:
            raise ValueError(f"dist: expected one of {list(POLICIES)}, got {dist!r}")
        check_head("policy", policy, D + Z, A if dist == "categorical" else 2 * A)
        heads["policy"] = policy
    layers = [len(head.layers) for head in heads.values()]
    named = {**tensors, **named_weights("cell", cell)}
    for owner, head in heads.items():
        for i, layer in enumerate(head.layers):
            named |= named_weights(f"{owner}.layers[{i}]", layer)
        named |= {f"{owner}.out_weight": head.out_weight, f"{owner}.out_bias": head.out_bias}
    flat = alike(named, half=True)
    act = rssm_cells.DEFAULT_ACT[name] if act is None else act
    policy_act = act if policy_act is None else policy_act
    check_act("act", act)
    check_act("policy_act", policy_act)
    numbers = dict(
        unimix=unimix, min_std=min_std, rms_eps=rms_eps, layer_eps=layer_eps, policy_unimix=policy_unimix,
        policy_min_std=policy_min_std, policy_max_std=policy_max_std,
    )  # fmt: skip
    check_numbers(numbers)
    check_flag("gumbel", gumbel)
    check_flag("detach_feature", detach_feature)
    check_flag("clip_action", clip_action)
    if gumbel and cumulative:
        raise ValueError(f"noise: gumbel needs it for every class, {tuple(noise.shape)}, got {tuple(noise.shape[:3])}")
    keep_tape = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat)
    counts = (layers[0], layers[1] if closed else 0)
    weights = [x for x in flat[_TENSORS:] if x is not None]
    given = "".join("01"[x is not None] for x in flat[_TENSORS:])
    flags = (detach_feature, clip_action or name == "block_gru", gumbel, cumulative, keep_tape)
    options = (name, *counts, dist, act, policy_act, *map(float, numbers.values()), *flags)
    return *flat[:_TENSORS], weights, given, *options


def _split(args) -> tuple[CellWeights, HeadWeights, HeadWeights | None, Options, PolicyOptions | None]:
    """What follows the four tensors of the schema, as it was given."""
    weights, given, name, prior_layers, policy_layers, dist, act, policy_act, *numbers = args
    *numbers, detach_feature, clip_action, gumbel, cumulative, _ = numbers
    rest = iter(weights)
    weights = [next(rest) if x == "1" else None for x in given]
    kind = CELLS[name]
    cell, weights = kind(*weights[: len(kind._fields)]), weights[len(kind._fields) :]
    heads = []
    for count in (prior_layers, policy_layers):
        layers = tuple(LayerWeights(*weights[4 * i : 4 * i + 4]) for i in range(count))
        heads.append(HeadWeights(layers, *weights[4 * count : 4 * count + 2]))
        weights = weights[4 * count + 2 :]
        if not policy_layers:
            return cell, heads[0], None, Options(act, *numbers[:4], gumbel, cumulative), None
    policy_options = PolicyOptions(dist, policy_act, *numbers[4:], detach_feature, clip_action)
    return cell, *heads, Options(act, *numbers[:4], gumbel, cumulative), policy_options


def _reference(*args):
    return in_float32(_scan, args)


def _scan(action, deter, stoch, noise, *rest):
    cell, prior, policy, options, policy_options = _split(rest)
    H, latent = noise.shape[0], noise.shape[2:]
    categorical = len(latent) == 2
    race = rssm_cells.latent_noise(noise, categorical, options)
    if policy is None:
        embedded = rssm_cells.embed_action(cell, rssm_cells.clipped(cell, action), options)
    else:
        draw = rssm_cells.arrival_times(action) if policy_options.dist == "categorical" else action
    stoch = stoch.flatten(1)
    steps = []
    for t in range(H):
        if policy is None:
            drawn, embedded_action = (), embedded[t]
        else:
            feature = torch.cat([deter, stoch], -1)
            if policy_options.detach_feature:
                feature = feature.detach()
            statistics = rssm_cells.head(policy, feature, options._replace(act=policy_options.act))
            drawn = (_draw_action(statistics, draw[t], policy_options),)
            embedded_action = rssm_cells.embed_action(cell, policy_options.taken(drawn[0]), options)
        deter = rssm_cells.step(cell, deter, stoch, embedded_action, options)
        statistics = rssm_cells.head(prior, deter, options)
        if categorical:
            p = rssm_cells.class_probabilities(statistics.unflatten(-1, latent), options.unimix)
            stoch = rssm_cells.draw_latent(p, race[t], options).flatten(1)
        else:
            mean, raw = statistics.chunk(2, -1)
            stoch = mean + rssm_cells.deviation(raw, options.min_std) * race[t]
        steps.append((deter, stoch.unflatten(-1, latent), statistics, *drawn))
    return tuple(torch.stack(x) for x in zip(*steps, strict=True))


def _draw_action(statistics, noise, options):
    if options.dist == "categorical":
        p = rssm_cells.class_probabilities(statistics, options.unimix)
        return rssm_cells.draw_class(p, noise)
    mean, std = rssm_cells.action_moments(statistics, options.dist, options.min_std, options.max_std)
    action = mean + std * noise
    return torch.tanh(action) if options.dist == "tanh_normal" else action


def _fake(*args):
    action, deter, _, noise, *rest = args
    keep_tape = rest[-1]
    if not keep_tape:
        return _outputs(0, *args)
    if deter.is_cuda:
        return _outputs(_model(*args).tape_size, *args)
    cell, prior, policy, _, policy_options = _split(rest)
    H, B, *latent = noise.shape
    A, D = action.shape[2], deter.shape[1]
    return _outputs(rssm_imagine_cpu.tape_size(cell, prior, policy, policy_options, H, B, A, D, latent), *args)


def _outputs(tape_size, action, deter, stoch, noise, *rest):
    _, prior, policy, *_ = _split(rest)
    H, B, *latent = noise.shape
    A, D = action.shape[2], deter.shape[1]
    return (
        deter.new_empty(H, B, D),
        deter.new_empty(H, B, *latent),
        deter.new_empty(H, B, prior.out_weight.shape[0]),
        deter.new_empty(0 if policy is None else (H, B, A)),
        deter.new_empty(tape_size, dtype=torch.float32),
        deter.new_empty((H, B, latent[0]) if len(latent) == 2 else 0, dtype=torch.int32),
    )


def _fake_backward(*args):
    wanted, inputs = args[_RESULTS], args[_RESULTS + 1 + len(_OUTPUTS) :]
    flat = [*inputs[:_TENSORS], *inputs[_TENSORS]]
    return [x.new_empty(x.shape if wants else 0) for x, wants in zip(flat, wanted, strict=True)]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the tape has none, and a loss may leave out a result
    *tensors, weights = inputs[: _TENSORS + 1]
    ctx.rest = inputs[_TENSORS + 1 :]
    closed = ctx.rest[3] > 0
    ctx.mark_non_differentiable(*output[_RESULTS if closed else _RESULTS - 1 :])
    ctx.noise = (0, 3) if closed else (3,)  # they have no gradient
    ctx.save_for_backward(*output, *tensors, *weights)


def _backward(ctx, *grads):
    count = len(_OUTPUTS)
    outputs, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    needs = [y for x in ctx.needs_input_grad for y in (x if isinstance(x, list) else (x,))]
    wanted = [needs[i] and i not in ctx.noise for i in range(len(tensors))]
    inputs = [*tensors[:_TENSORS], list(tensors[_TENSORS:]), *ctx.rest]
    found = ctx.run_backward(*grads[:_RESULTS], wanted, *outputs, *inputs)
    found = [grad if wants else None for grad, wants in zip(found, wanted, strict=True)]
    return *found[:_TENSORS], found[_TENSORS:], *[None] * len(ctx.rest)


def _cpu_forward(*args):
    return rssm_imagine_cpu.forward(_fake(*args), args[:_TENSORS], *_split(args[_TENSORS:]))


def _backward_of(implementation, *args):
    grads, wanted, outputs = args[:_RESULTS], args[_RESULTS], args[_RESULTS + 1 : _RESULTS + 1 + len(_OUTPUTS)]
    inputs = args[_RESULTS + 1 + len(_OUTPUTS) :]
    tensors, rest = inputs[:_TENSORS], inputs[_TENSORS:]
    wanted_weights = _split([wanted[_TENSORS:], *rest[1:]])[:3]
    found = implementation.backward(grads, outputs, tensors, *_split(rest), wanted[:_TENSORS], wanted_weights)
    given = [True] * _TENSORS + [x == "1" for x in rest[1]]
    empty = outputs[0].new_empty(0)
    return [empty if x is None else x for x, present in zip(found, given, strict=True) if present]


_cpu_backward, _triton_backward = (partial(_backward_of, x) for x in (rssm_imagine_cpu, rssm_imagine_triton))


def _cpu_refuse(*args):
    return rssm_cpu.refuse(args[1], *args[_TENSORS + 6 : _TENSORS + 8])


def _cpu_slower(*args):
    return rssm_cpu.slower(*args[0].shape[:2], args[_TENSORS])


def _cpu_plan(*args):
    return rssm_cpu.plan(args[0].shape[1], rssm_cpu.threads(args[0].shape[1], args[_TENSORS]))


def _triton_forward(*args):
    keep_tape = args[-1]
    outputs = _outputs(_model(*args).tape_size if keep_tape else 0, *args)
    return rssm_imagine_triton.forward(outputs, args[:_TENSORS], *_split(args[_TENSORS:]), keep_tape)


def _triton_refuse(*args):
    *_, options, policy_options = _split(args[_TENSORS:])
    return rssm_imagine_triton.refuse(args[:_TENSORS], options, policy_options)


def _triton_plan(*args):
    return rssm_triton.plan(_model(*args), args[1])


def _model(*args):
    return rssm_imagine_triton.model_of(args[:_TENSORS], *_split(args[_TENSORS:]), args[-1])


def _make(name):
    return Op(
        name,
        prepare=_prepare,
        reference=_reference,
        schema=_SCHEMA,
        backward_schema=_BACKWARD_SCHEMA,
        fake=_fake,
        backward_fake=_fake_backward,
        save=_save,
        backward=_backward,
        backends=(
            Backend("cpu", _cpu_forward, _cpu_backward, _cpu_refuse, _cpu_plan, _cpu_slower),
            Backend("triton", _triton_forward, _triton_backward, _triton_refuse, _triton_plan),
        ),
    )


_open_loop, _closed_loop = _make("rssm_imagine"), _make("rssm_imagine_policy")
