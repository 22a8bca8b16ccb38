"""The observe scan: its backward by hand against autograd, and C++ against the reference.

What the reference itself must do (resets, samples, carry) is in tests/nn/test_rssm.py.
"""

import importlib
import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

from phyxdream import ops
from phyxdream.ops import rssm_cells
from phyxdream.ops.backend import BackendError, extension
from phyxdream.ops.rssm_cells import CELLS, PosteriorWeights, Sizes
from phyxdream.ops.rssm_contract import NEEDED

op = importlib.import_module("phyxdream.ops.rssm_observe")  # the package has the function under this name

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)

LATENTS = {"categorical": (3, 4), "gaussian": (5,)}
KINDS = list(itertools.product(CELLS, LATENTS))
NORMS = {"none": (False, False), "rms": (True, False), "layer": (True, True)}
OWN_NORM = {"gru": "none", "layernorm_gru": "layer", "block_gru": "rms"}


class Case:
    """Arguments of one call: tensors and weights by name, so that tests can change or differentiate any of them."""

    def __init__(
        self, kind="layernorm_gru", latent=(3, 4), T=4, B=3, E=5, A=2, D=8, U=6, V=7, blocks=2, norm=None,
        dtype=torch.float64, seed=0, resets=0.3,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=g, dtype=dtype)
        self.latent, self.kind = latent, CELLS[kind]
        Z = 1
        for n in latent:
            Z *= n
        statistics = Z if len(latent) == 2 else 2 * Z
        self.noise = (torch.rand if len(latent) == 2 else torch.randn)(T, B, *latent, generator=g, dtype=dtype)
        self.is_first = torch.rand(T, B, generator=g) < resets
        self.tensors = dict(
            embed=normal(T, B, E), action=2 * normal(T, B, A), deter=normal(B, D), stoch=normal(B, *latent),
            initial_deter=normal(D), initial_stoch=normal(*latent),
        )  # fmt: skip
        norms = NORMS[norm or OWN_NORM[kind]]
        fields = {name: torch.empty(0) for name in self.kind._fields}
        first = "in_deter" if kind == "block_gru" else "in_stoch"
        fields[first] = torch.empty(U, 0)
        if kind == "block_gru":
            fields["mix_deter"] = torch.empty(blocks, 0, 0)
        shapes = self.kind(**fields).shapes(Sizes(E, A, D, Z))
        self.cell = self._draw(shapes, norms, normal)
        posterior = PosteriorWeights(torch.empty(V, 0), *[None] * 5).shapes(Sizes(E, A, D, Z), statistics)
        self.posterior = self._draw(posterior, norms, normal)

    @staticmethod
    def _draw(shapes, norms, normal):
        drawn = {}
        for name, shape in shapes.items():
            fan_in = shape[-1] if len(shape) == 2 else shape[-2] if len(shape) == 3 else 4
            drawn[name] = normal(shape) / fan_in**0.5
            if name.endswith("_gain"):
                drawn[name] = None if not norms[0] and "gates" not in name else drawn[name] + 1
            elif name.endswith("_shift") and not norms[1] and "gates" not in name:
                drawn[name] = None
        return drawn

    @property
    def inputs(self):
        """Everything that has a gradient, by name."""
        weights = {f"{owner}.{k}": x for owner in ("cell", "posterior") for k, x in getattr(self, owner).items()}
        return {k: x for k, x in {**self.tensors, **weights}.items() if x is not None}

    def arguments(self, inputs=None, **options):
        inputs = {**self.inputs, **(inputs or {})}
        cell = self.kind(**{k: inputs.get(f"cell.{k}") for k in self.cell})
        posterior = PosteriorWeights(**{k: inputs.get(f"posterior.{k}") for k in self.posterior})
        embed, action, deter, stoch, initial_deter, initial_stoch = (inputs[k] for k in self.tensors)
        return (embed, action, self.is_first, deter, stoch, self.noise, cell, posterior), dict(
            initial_deter=initial_deter, initial_stoch=initial_stoch, **options
        )

    def call(self, inputs=None, **options):
        args, keywords = self.arguments(inputs, **options)
        return ops.rssm_observe(*args, **keywords)

    def to(self, *args):
        """Of another dtype (but the noise) or on another device."""
        for group in (self.tensors, self.cell, self.posterior):
            group.update({k: None if x is None else x.to(*args) for k, x in group.items()})
        device = self.tensors["embed"].device
        self.noise, self.is_first = self.noise.to(device), self.is_first.to(device)
        return self

    def run(self, backend, wanted=None, **options):
        """Results, and the gradients of the wanted inputs (or all) under fixed gradients of the results, by name."""
        leaves = {k: x.detach().requires_grad_(wanted is None or k in wanted) for k, x in self.inputs.items()}
        with ops.use_backend(backend):
            outputs = self.call(leaves, **options)
        g = torch.Generator().manual_seed(99)
        grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in outputs]
        leaves = {k: x for k, x in leaves.items() if x.requires_grad}
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        names = ["deter", "stoch", "logits"] if len(outputs) == 3 else ["deter", "stoch", "mean", "std"]
        results = {k: x.detach() for k, x in zip(names, outputs, strict=True)}
        return results | {f"grad of {k}": x for k, x in zip(leaves, found, strict=True)}


def assert_same(actual, expected, tolerance=1e-5):
    """By the norm of the difference over the norm: what is summed over thousands of terms has no better scale."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        scale = value.norm().item() or 1.0
        assert (actual[name] - value).norm().item() <= tolerance * scale, name


# ---------------------------------------------------------------------------------------------------------------------
# The backward by hand, in plain PyTorch: the formulas that the fast implementations follow.


def norm_forward(x, gain, shift, rms_eps, layer_eps):
    """u and what its backward needs: normalised x and 1/σ."""
    if gain is None:
        return x, (None, None)
    centred = x - x.mean(-1, keepdim=True) if shift is not None else x
    inverse = (centred.square().mean(-1, keepdim=True) + (rms_eps if shift is None else layer_eps)).rsqrt()
    n = centred * inverse
    return n * gain + (0 if shift is None else shift), (n, inverse)


def norm_backward(grad, saved, gain, shift, sums):
    """The gradient of x; those of gain and shift are added to `sums`."""
    n, inverse = saved
    if gain is None:
        return grad
    sums[0].append((grad * n).sum(0))
    sums[1].append(grad.sum(0))
    d = grad * gain
    mean = d.mean(-1, keepdim=True) if shift is not None else 0
    return inverse * (d - mean - n * (d * n).mean(-1, keepdim=True))


def act_slope(name, u):
    if name == "silu":
        s = torch.sigmoid(u)
        return u * s, s * (1 + u * (1 - s))
    return F.elu(u), torch.where(u > 0, 1.0, u.exp())  # ELU


def manual(case, grads, unimix=0.01, min_std=0.1, rms_eps=1e-4, layer_eps=1e-3, gumbel=False):
    """Results and gradients without autograd: everything that recurs step by step, weights' gradients at the end."""
    x, c, p, latent = case.tensors, case.cell, case.posterior, case.latent
    T, D, categorical = len(case.is_first), x["deter"].shape[1], len(latent) == 2
    kind = {v: k for k, v in CELLS.items()}[case.kind]
    act = rssm_cells.DEFAULT_ACT[kind]
    block = kind == "block_gru"
    parts = ("in_deter", "in_stoch", "in_action") if block else ("in",)
    first = case.is_first.unsqueeze(-1)
    action = torch.where(first, 0.0, x["action"])
    scale = (~first).to(action.dtype) / (action.abs().clamp(min=1) if block else 1)
    action = x["action"] * scale
    start_h, start_z = x["initial_deter"], x["initial_stoch"].flatten()
    blocked = partial(rssm_cells.block_linear, bias=None)
    h, z = x["deter"], x["stoch"].flatten(1)
    steps, results = [], []
    for t in range(T):
        k = {"h": torch.where(first[t], start_h, h), "z": torch.where(first[t], start_z, z), "a": action[t]}
        h = k["h"]
        if block:
            sources = {"in_deter": h, "in_stoch": k["z"], "in_action": k["a"]}
            entering = {q: F.linear(sources[q], c[q], c[f"{q}_bias"]) for q in parts}
        else:
            entering = {"in": F.linear(k["z"], c["in_stoch"]) + F.linear(k["a"], c["in_action"], c["in_bias"])}
        for q in parts:
            u, k[q] = norm_forward(entering[q], c[f"{q}_gain"], c[f"{q}_shift"], rms_eps, layer_eps)
            k[f"{q}_out"], k[f"{q}_slope"] = act_slope(act, u)
        v = torch.cat([k[f"{q}_out"] for q in parts], -1)
        k["x"] = v
        if kind == "gru":
            i = F.linear(v, c["input_gates"], c["input_bias"]).chunk(3, -1)
            j = F.linear(h, c["hidden_gates"], c["hidden_bias"]).chunk(3, -1)
            r, u, k["hn"] = torch.sigmoid(i[0] + j[0]), torch.sigmoid(i[1] + j[1]), j[2]
            n = torch.tanh(i[2] + r * j[2])
            k["gates"] = (r, u, n)
            h = n + u * (h - n)
        else:
            if block:
                mixed = blocked(h, c["mix_deter"]) + F.linear(v, c["mix_inputs"], c["mix_bias"])
                u, k["mix"] = norm_forward(mixed, c["mix_gain"], c["mix_shift"], rms_eps, layer_eps)
                k["m"], k["mix_slope"] = act_slope(act, u)
                gates = rssm_cells.block_linear(k["m"], c["gates"], c["gates_bias"])
                gates = gates.unflatten(-1, (c["gates"].shape[0], 3, -1)).transpose(-3, -2).flatten(-3)
            else:
                gates = F.linear(torch.cat([v, h], -1), c["gates"], c["gates_bias"])
                gates, k["gates_norm"] = norm_forward(gates, c["gates_gain"], c["gates_shift"], rms_eps, layer_eps)
            r, c0, u = gates.chunk(3, -1)
            r, u = torch.sigmoid(r), torch.sigmoid(u - 1)
            k["gates"] = (r, c0, torch.tanh(r * c0), u)
            h = h + u * (k["gates"][2] - h)
        u = F.linear(torch.cat([h, x["embed"][t]], -1), p["in_weight"], p["in_bias"])
        u, k["post"] = norm_forward(u, p["in_gain"], p["in_shift"], rms_eps, layer_eps)
        k["y"], k["post_slope"] = act_slope(act, u)
        s = F.linear(k["y"], p["out_weight"], p["out_bias"])
        if categorical:
            k["soft"] = s.unflatten(-1, latent).softmax(-1)
            share = (1 - unimix) * k["soft"] + unimix / latent[1]
            k["relaxed"] = (share.log() - (-case.noise[t].log()).log()).softmax(-1)
            index = k["relaxed"].argmax(-1)
            z = F.one_hot(index, latent[1]).to(share.dtype).flatten(1)
            results.append((h, z.unflatten(-1, latent), s.unflatten(-1, latent)))
        else:
            mean, k["raw"] = s.chunk(2, -1)
            std = F.softplus(k["raw"]) + min_std
            z = mean + std * case.noise[t]
            results.append((h, z, mean, std))
        k["h_out"] = h
        steps.append(k)

    # Backward. `found` lists, per weight, what each step adds: pairs whose product is its gradient, or sums.
    pairs, sums = {}, {}
    affine = {q: ([], []) for q in (*parts, "mix", "gates", "post")}
    per_step = {"embed": [None] * T, "action": [None] * T}
    initial_h, initial_z = torch.zeros_like(start_h), torch.zeros_like(start_z)
    dh, dz = torch.zeros_like(x["deter"]), torch.zeros_like(z)

    def linear(name, grad, source, bias=None):
        pairs.setdefault(name, []).append((grad, source))
        if bias:
            sums.setdefault(bias, []).append(grad.sum(0))

    for t in reversed(range(T)):
        k = steps[t]
        dz = dz + grads[1][t].flatten(1)
        if categorical:
            d = dz.unflatten(-1, latent)
            if gumbel:
                share = (1 - unimix) * k["soft"] + unimix / latent[1]
                d = k["relaxed"] * (d - (d * k["relaxed"]).sum(-1, keepdim=True)) / share
            d = (1 - unimix) * d
            ds = (k["soft"] * (d - (d * k["soft"]).sum(-1, keepdim=True)) + grads[2][t]).flatten(1)
        else:
            draw = (dz * case.noise[t] + grads[3][t]) * torch.sigmoid(k["raw"])
            ds = torch.cat([dz + grads[2][t], draw], -1)
        linear("posterior.out_weight", ds, k["y"], "posterior.out_bias")
        dy = norm_backward(
            (ds @ p["out_weight"]) * k["post_slope"], k["post"], p["in_gain"], p["in_shift"], affine["post"]
        )
        linear("posterior.in_weight", dy, torch.cat([k["h_out"], x["embed"][t]], -1), "posterior.in_bias")
        d_in = dy @ p["in_weight"]
        per_step["embed"][t] = d_in[:, D:]
        dh = dh + grads[0][t] + d_in[:, :D]
        if kind == "gru":
            r, u, n = k["gates"]
            dn = dh * (1 - u) * (1 - n * n)
            di = torch.cat([dn * k["hn"] * r * (1 - r), dh * (k["h"] - n) * u * (1 - u), dn], -1)
            dj = torch.cat([di[:, : 2 * D], dn * r], -1)
            linear("cell.input_gates", di, k["x"], "cell.input_bias")
            linear("cell.hidden_gates", dj, k["h"], "cell.hidden_bias")
            dv, dh = di @ c["input_gates"], dh * u + dj @ c["hidden_gates"]
        else:
            r, c0, cand, u = k["gates"]
            inner = dh * u * (1 - cand * cand)
            dg = torch.cat([inner * c0 * r * (1 - r), inner * r, dh * (cand - k["h"]) * u * (1 - u)], -1)
            dh = dh * (1 - u)
            if block:
                G = c["gates"].shape[0]
                dg = dg.unflatten(-1, (3, G, -1)).transpose(-3, -2).flatten(-3)
                linear("cell.gates", dg, k["m"], "cell.gates_bias")
                dm = blocked(dg, c["gates"].transpose(1, 2)) * k["mix_slope"]
                dm = norm_backward(dm, k["mix"], c["mix_gain"], c["mix_shift"], affine["mix"])
                linear("cell.mix_inputs", dm, k["x"], "cell.mix_bias")
                linear("cell.mix_deter", dm, k["h"])
                dv, dh = dm @ c["mix_inputs"], dh + blocked(dm, c["mix_deter"].transpose(1, 2))
            else:
                dg = norm_backward(dg, k["gates_norm"], c["gates_gain"], c["gates_shift"], affine["gates"])
                linear("cell.gates", dg, torch.cat([k["x"], k["h"]], -1), "cell.gates_bias")
                d = dg @ c["gates"]
                dv, dh = d[:, :-D], dh + d[:, -D:]
        ends = {}
        for q, d in zip(parts, dv.chunk(len(parts), -1), strict=True):
            ends[q] = norm_backward(d * k[f"{q}_slope"], k[q], c[f"{q}_gain"], c[f"{q}_shift"], affine[q])
        if block:
            for q, source in (("in_deter", "h"), ("in_stoch", "z"), ("in_action", "a")):
                linear(f"cell.{q}", ends[q], k[source], f"cell.{q}_bias")
            dh = dh + ends["in_deter"] @ c["in_deter"]
        else:
            ends["in_stoch"] = ends["in_action"] = ends["in"]
            linear("cell.in_stoch", ends["in"], k["z"])
            linear("cell.in_action", ends["in"], k["a"], "cell.in_bias")
        dz = ends["in_stoch"] @ c["in_stoch"]
        per_step["action"][t] = ends["in_action"] @ c["in_action"] * scale[t]
        initial_h, initial_z = initial_h + (dh * first[t]).sum(0), initial_z + (dz * first[t]).sum(0)
        dh, dz = torch.where(first[t], 0.0, dh), torch.where(first[t], 0.0, dz)

    found = {name: torch.stack(rows) for name, rows in per_step.items()}
    found |= {"deter": dh, "stoch": dz.unflatten(-1, latent)}
    found |= {"initial_deter": initial_h, "initial_stoch": initial_z.unflatten(-1, latent)}
    for name, rows in pairs.items():
        grad, source = (torch.cat(side) for side in zip(*rows, strict=True))
        if name in ("cell.gates", "cell.mix_deter") and block:
            G = c["gates"].shape[0]
            found[name] = torch.einsum("ngi,ngo->gio", source.unflatten(-1, (G, -1)), grad.unflatten(-1, (G, -1)))
        else:
            found[name] = grad.t() @ source
    found |= {name: sum(rows) for name, rows in sums.items()}
    for q, (gains, shifts) in affine.items():
        name = "posterior.in" if q == "post" else f"cell.{q}"
        if gains:
            found |= {f"{name}_gain": sum(gains), f"{name}_shift": sum(shifts)}
    names = ["deter", "stoch", "logits"] if categorical else ["deter", "stoch", "mean", "std"]
    values = dict(zip(names, map(torch.stack, zip(*results, strict=True)), strict=True))
    return values | {f"grad of {name}": found[name] for name in case.inputs}


@pytest.mark.parametrize(("kind", "latent"), KINDS)
@pytest.mark.parametrize(("norm", "gumbel"), [(None, False), ("rms", False), ("layer", False), (None, True)])
def test_the_backward_by_hand_equals_autograd(kind, latent, norm, gumbel):
    case = Case(kind, LATENTS[latent], norm=norm)
    expected = case.run("reference", gumbel=gumbel)
    g = torch.Generator().manual_seed(99)
    count = len(expected) - len(case.inputs)
    grads = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in list(expected.values())[:count]]
    assert_same(manual(case, grads, gumbel=gumbel), expected, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The reference.


@pytest.mark.parametrize("kind", CELLS)
def test_gradcheck_of_the_reference(kind):
    """Gaussian latents, since a sampled class has no derivative; actions below 1, where block_gru's divisor is 1."""
    case = Case(kind, (2,), T=3, B=2, E=2, A=2, D=4, U=3, V=3)
    case.tensors["action"] *= 0.1
    names = list(case.inputs)

    def scan(*values):
        return case.call(dict(zip(names, values, strict=True)))

    values = [x.clone().requires_grad_() for x in case.inputs.values()]
    assert torch.autograd.gradcheck(scan, values, fast_mode=True)


def test_straight_through_gradient_crosses_steps():
    """A class drawn at the first step moves later states as its probability would."""
    case = Case(T=3, resets=0.0)
    leaves = {"posterior.out_bias": case.inputs["posterior.out_bias"].clone().requires_grad_()}
    with ops.use_backend("reference"):
        deter = case.call(leaves)[0]
    (grad,) = torch.autograd.grad(deter[1].sum(), leaves["posterior.out_bias"])
    assert grad.abs().max() > 0
    torch.testing.assert_close(grad.view(3, 4).sum(-1), torch.zeros(3, dtype=grad.dtype), rtol=0, atol=1e-12)


def test_gumbel_is_the_gradient_of_torchs_gumbel_softmax(monkeypatch):
    """Of one step, whose noise both have: the loss sees the sample alone."""
    case = Case(T=1, latent=(3, 4), resets=0.0)
    leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
    with ops.use_backend("reference"):
        _, stoch, logits = case.call(leaves, gumbel=True)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: x.copy_(-case.noise[0].log()))
    log_p = (0.99 * logits[0].softmax(-1) + 0.01 / 4).log()
    expected = F.gumbel_softmax(log_p, hard=True)
    assert torch.equal(stoch[0], expected)
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    leaf = leaves["posterior.out_bias"]
    (found,) = torch.autograd.grad((stoch[0] * weight).sum(), leaf, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# C++ against the reference.


@needs_extension
@pytest.mark.parametrize(("kind", "latent"), KINDS)
@pytest.mark.parametrize(
    ("T", "B", "resets"), [(4, 3, 0.3), (1, 1, 0.0), (1, 2, 1.0), (3, 16, 0.0), (3, 37, 0.3), (2, 17, 1.0)]
)
def test_cpu_agrees_with_the_reference(kind, latent, T, B, resets):
    case = Case(kind, LATENTS[latent], T=T, B=B, resets=resets, dtype=torch.float32)
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(D=34, U=19, V=33, latent=(3, 17), A=1, E=1),  # no size a multiple of a tile, blocks of 17
        dict(D=64, U=48, V=16, latent=(8, 32), A=20, E=40),
        dict(D=6, U=5, V=4, latent=(1, 2), A=1, E=1, blocks=3),
        dict(D=12, U=70, V=5, latent=(40,), blocks=1),
        dict(D=300, U=200, V=200, latent=(4, 24), E=700, T=3, B=5),  # enough for threads to share
    ],
    ids=str,
)
def test_cpu_agrees_at_odd_sizes(kind, sizes):
    case = Case(kind, dtype=torch.float32, **sizes)
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
@pytest.mark.parametrize(("kind", "norm"), list(itertools.product(CELLS, NORMS)))
@pytest.mark.parametrize("act", ["silu", "elu", "relu"])
def test_cpu_takes_every_norm_and_these_activations(kind, norm, act):
    case = Case(kind, norm=norm, dtype=torch.float32)
    assert_same(case.run("cpu", act=act), case.run("reference", act=act))


@needs_extension
@pytest.mark.parametrize(
    "options",
    [
        dict(unimix=0.0),
        dict(unimix=0.3),
        dict(rms_eps=0.1, layer_eps=0.2),
        dict(gumbel=True),
        dict(gumbel=True, unimix=0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["layernorm_gru", "block_gru"])
def test_cpu_takes_the_options(kind, options):
    case = Case(kind, latent=(6, 19) if "gumbel" in options else (3, 4), B=21, dtype=torch.float32)
    assert_same(case.run("cpu", **options), case.run("reference", **options))


def test_one_number_a_variable_picks_by_cumulative_probabilities():
    """As torch's own search does; the gradient is that of p."""
    case = Case(latent=(5, 7), T=3, B=200)
    case.noise = case.noise[..., 0].contiguous()
    found = case.run("reference", unimix=0.1)
    p = 0.9 * found["logits"].softmax(-1) + 0.1 / 7
    index = torch.searchsorted(p.cumsum(-1), case.noise.unsqueeze(-1)).clamp(max=6)
    assert torch.equal(found["stoch"].round(), F.one_hot(index.squeeze(-1), 7).to(p.dtype))
    shares = found["stoch"][0].round().mean(0)
    assert ((shares - p[0].mean(0)).abs() < 5 * (0.25 / 200) ** 0.5).all()


@needs_extension
@pytest.mark.parametrize(
    "sizes", [dict(), dict(latent=(6, 19), B=21), dict(latent=(1, 2), B=37), dict(T=1, B=16)], ids=str
)
@pytest.mark.parametrize("kind", CELLS)
def test_cpu_takes_one_number_a_variable(kind, sizes):
    case = Case(kind, dtype=torch.float32, **sizes)
    case.noise = case.noise[..., 0]
    case.noise[0, 0], case.noise[0, 1:2] = 0.0, 1 - 2**-24
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
def test_cpu_takes_min_std():
    case = Case("gru", (5,), dtype=torch.float32)
    assert_same(case.run("cpu", min_std=0.7), case.run("reference", min_std=0.7))


@needs_extension
def test_cpu_draws_the_same_classes_at_the_ends_of_the_noise():
    case = Case(latent=(6, 5), T=3, B=20, dtype=torch.float32)
    case.noise[case.noise < 0.3] = 0.0
    case.noise[:, :, 0] = 0.0  # no class ever arrives
    case.noise[:, :, 1, 2] = 1 - 2**-24  # arrives before all others
    found = case.run("cpu")
    assert_same(found, case.run("reference"))
    assert (found["stoch"][:, :, 0, 0] == 1).all() and (found["stoch"][:, :, 1, 2] == 1).all()
    case.noise[:, :, 0] = 0.5  # where no class arrives, a Gumbel-softmax has no shares
    found = case.run("cpu", gumbel=True)
    assert_same(found, case.run("reference", gumbel=True))
    assert all(x.isfinite().all() for x in found.values())


@needs_extension
@pytest.mark.parametrize("kind", CELLS)
def test_optional_biases_may_be_left_out(kind):
    case = Case(kind, dtype=torch.float32)
    for weights in (case.cell, case.posterior):
        for name in list(weights):
            if name.endswith("_bias") and (name not in NEEDED or name in case.kind._field_defaults):
                weights[name] = None
    assert_same(case.run("cpu"), case.run("reference"))


@needs_extension
@pytest.mark.parametrize("kind", CELLS)
def test_any_strides(kind):
    case = Case(kind, dtype=torch.float32)
    expected = case.run("cpu")

    def strided(x):
        wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)
        return wide.movedim(0, -1).contiguous().movedim(-1, 0)[..., 0] if x.dim() > 1 else wide[..., 0]

    for group in (case.tensors, case.cell, case.posterior):
        group.update({k: None if x is None else strided(x) for k, x in group.items()})
    case.noise, case.is_first = strided(case.noise), strided(case.is_first.float()).bool()
    assert not case.tensors["embed"].is_contiguous()
    assert_same(case.run("cpu"), expected, 1e-6)


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_what_lies_before_a_reset_does_not_matter(backend):
    case = Case("block_gru", dtype=torch.float32)
    case.is_first[0] = True
    expected = case.run(backend)
    case.tensors["deter"].fill_(torch.nan)
    case.tensors["stoch"].fill_(torch.nan)
    case.tensors["action"][case.is_first] = torch.nan
    assert_same(case.run(backend), expected, 0.0)


@needs_extension
@pytest.mark.parametrize(("kind", "latent"), KINDS)
def test_a_loss_may_leave_out_results(kind, latent):
    case = Case(kind, LATENTS[latent], dtype=torch.float32)
    for i in range(3):
        grads = []
        for backend in ("cpu", "reference"):
            leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
            with ops.use_backend(backend):
                result = case.call(leaves)[i]
            result.square().sum().backward()
            grads.append({k: x.grad for k, x in leaves.items() if x.grad is not None and x.grad.any()})
        assert_same(*grads)


WANTED = {
    "model": lambda name: "." in name,
    "embed": lambda name: name == "embed",
    "states": lambda name: name in ("deter", "initial_stoch"),
    "action": lambda name: name == "action",
    "stoch": lambda name: name == "stoch",
    "initial_deter": lambda name: name == "initial_deter",
    "one bias": lambda name: name == "posterior.in_bias",
    "one weight": lambda name: name == "cell.in_stoch",
    "gains": lambda name: name.endswith("gain"),
}


@needs_extension
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("kind", CELLS)
def test_only_what_is_wanted_has_a_gradient(kind, latent, wanted):
    case = Case(kind, LATENTS[latent], norm="layer", dtype=torch.float32)
    names = [name for name in case.inputs if WANTED[wanted](name)]
    expected, actual = case.run("reference", names), case.run("cpu", names)
    assert set(actual) == set(expected)
    assert_same(actual, expected)


@needs_extension
def test_what_is_not_wanted_is_not_computed():
    case = Case(dtype=torch.float32)
    leaves = {k: x.clone().requires_grad_(k == "action") for k, x in case.inputs.items()}
    args, keywords = case.arguments(leaves)
    prepared = op._prepare(*args, **keywords)
    outputs = torch.ops.phyxdream.rssm_observe(*prepared)
    wanted = [x is not None and x.requires_grad for i, x in enumerate(prepared[:-9]) if i not in (2, 5)]
    results = [x.detach() for x in outputs]
    grads = torch.ops.phyxdream.rssm_observe_backward(*results[:3], wanted, *results, *prepared)
    assert [x.numel() > 0 for x in grads] == wanted
    assert sum(wanted) == 1


@needs_extension
@pytest.mark.parametrize(("kind", "latent"), KINDS)
def test_without_gradients_the_results_are_the_same(kind, latent):
    case = Case(kind, LATENTS[latent], B=150, dtype=torch.float32)
    with ops.use_backend("cpu"):
        taped = case.call({k: x.clone().requires_grad_() for k, x in case.inputs.items()})
        for actual, expected in zip(case.call(), taped, strict=True):
            assert torch.equal(actual, expected)


@needs_extension
def test_a_tape_is_kept_where_a_backward_may_follow():
    case = Case(dtype=torch.float32)
    leaf = {"embed": case.inputs["embed"].clone().requires_grad_()}

    def tape(inputs):
        args, keywords = case.arguments(inputs)
        return torch.ops.phyxdream.rssm_observe(*op._prepare(*args, **keywords))[3]

    assert tape(leaf).numel() > 0
    assert tape({}).numel() == 0
    with torch.no_grad():
        assert tape(leaf).numel() == 0


@needs_extension
def test_the_number_of_threads_changes_no_bit():
    case = Case(D=300, U=200, V=200, latent=(4, 24), E=700, T=3, B=5, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run("cpu")
        torch.set_num_threads(3)
        assert_same(case.run("cpu"), expected, 0.0)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Triton.


def triton_run(case, shape, **options):
    kernels = importlib.import_module("phyxdream.kernels.rssm_scan")
    with mock.patch.object(kernels, "choose_shape", lambda *args: shape):
        return case.run("triton", **options)


def check_cells_in_the_interpreter():
    for kind, latent in KINDS:
        case = Case(kind, LATENTS[latent], T=2 + (kind == "gru"), dtype=torch.float32)
        assert_same(triton_run(case, "tile"), case.run("reference"))


def check_shapes_in_the_interpreter():
    """Beside one program: the phases one by one, with a program per tile, and one program that meets itself."""
    odd = dict(D=34, U=19, V=33, latent=(3, 17), A=1, E=1, T=2, dtype=torch.float32)
    small = dict(D=6, U=5, V=4, latent=(20, 2), A=1, E=1, T=2, blocks=3, dtype=torch.float32)
    for kind in CELLS:
        case = Case(kind, norm="layer", **odd)
        assert_same(triton_run(case, "split", act="relu"), case.run("reference", act="relu"))
        case = Case(kind, norm="rms", **small)
        options = dict(act="elu", unimix=0.0, rms_eps=0.1)
        assert_same(triton_run(case, "persistent", **options), case.run("reference", **options))
    case = Case("block_gru", norm="none", T=1, B=1, resets=0.0, dtype=torch.float32)
    assert_same(triton_run(case, "split"), case.run("reference"))
    case = Case("gru", (5,), norm="rms", T=2, B=17, resets=1.0, dtype=torch.float32)
    assert_same(triton_run(case, "persistent", min_std=0.7), case.run("reference", min_std=0.7))
    case = Case("layernorm_gru", T=2, dtype=torch.float32)
    for unimix in (0.01, 0.0):
        options = dict(gumbel=True, unimix=unimix)
        assert_same(triton_run(case, "split", **options), case.run("reference", **options))
    case.cell["gates_bias"], case.noise = None, case.noise[..., 0].contiguous()
    assert_same(triton_run(case, "tile"), case.run("reference"))
    case = Case("gru", norm="layer", V=530, T=1, dtype=torch.float32)  # sums of more tiles than one load takes
    assert_same(triton_run(case, "persistent"), case.run("reference"))


def check_what_else_triton_takes_in_the_interpreter():
    case = Case("block_gru", T=2, dtype=torch.float32)
    case.is_first[0] = True
    expected = case.run("reference")
    case.tensors["deter"].fill_(torch.nan)
    case.tensors["stoch"].fill_(torch.nan)
    case.tensors["action"][case.is_first] = torch.nan
    assert_same(triton_run(case, "tile"), expected)  # nothing crosses a reset
    with ops.use_backend("triton"), torch.no_grad():
        found = dict(zip(expected, case.call(), strict=False))  # without a tape
    assert_same(found, {name: expected[name] for name in found})

    for name in list(case.cell):
        if name.endswith("_bias") and name not in NEEDED:
            case.cell[name] = None
    case.tensors = {k: x.nan_to_num().movedim(0, -1).contiguous().movedim(-1, 0) for k, x in case.tensors.items()}
    assert_same(triton_run(case, "tile"), case.run("reference"))  # no biases, other strides

    for wanted in (("stoch", "cell.mix_gain", "posterior.in_weight"), ("action", "initial_deter")):
        assert_same(triton_run(case, "tile", wanted=wanted), case.run("reference", wanted))

    leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
    with ops.use_backend("triton"):
        deter, *_ = case.call(leaves)  # of a loss that leaves out results
    deter.square().sum().backward()
    grads = {k: x.grad for k, x in leaves.items()}
    leaves = {k: x.clone().requires_grad_() for k, x in case.inputs.items()}
    with ops.use_backend("reference"):
        case.call(leaves)[0].square().sum().backward()
    assert_same(grads, {k: x.grad if x.grad is not None else torch.zeros_like(x) for k, x in leaves.items()})

    # float16 rounds at 2⁻¹¹ what enters every product; the interpreter knows no bfloat16.
    case = Case("layernorm_gru", (5,), T=2, dtype=torch.float32).to(torch.float16)
    got = triton_run(case, "tile")
    assert all(x.dtype is torch.float16 for x in got.values())
    assert_same({k: x.float() for k, x in got.items()}, case.to(torch.float32).run("reference"), 5e-3)

    args, keywords = Case("gru", (2, 300), dtype=torch.float32).arguments(act="silu")
    with ops.use_backend("triton"), pytest.raises(BackendError, match="at most 256 classes"):
        ops.rssm_observe(*args, **keywords)
    args, keywords = Case(dtype=torch.float32).arguments(act="tanh")
    with ops.use_backend("triton"), pytest.raises(BackendError, match="activations silu, elu, relu, not tanh"):
        ops.rssm_observe(*args, **keywords)
    args, keywords = Case(dtype=torch.float32).arguments()
    with ops.use_backend("triton"):
        reasons = ops.explain(ops.rssm_observe, *args, **keywords).reasons
    assert "tile scan: 1 program of 32 features for each of 1 tiles of 16 sequences" in reasons["triton"]


@pytest.mark.parametrize(
    "check",
    [check_cells_in_the_interpreter, check_shapes_in_the_interpreter, check_what_else_triton_takes_in_the_interpreter],
)
def test_triton_in_the_interpreter(run_interpreted, check):
    run_interpreted(check)


# V1, then early V3, then V3's sizes 12M and 50M.
MODELS = {
    "V1": dict(kind="gru", D=200, U=200, V=200, latent=(30,)),
    "512": dict(kind="layernorm_gru", D=512, U=512, V=512, latent=(32, 32)),
    "12M": dict(kind="block_gru", D=2048, U=256, V=256, latent=(32, 16), blocks=8),
    "50M": dict(kind="block_gru", D=4096, U=512, V=512, latent=(32, 32), blocks=8),
}


def assert_compiles_and_fits(assert_launches_fit, model, dtype, direction, B=16, cumulative=False, **options):
    kernels = pytest.importorskip("phyxdream.kernels.rssm_scan")

    def call():
        case = Case(T=64, B=B, E=1024, A=6, dtype=dtype, **MODELS[model])
        if cumulative:
            case.noise = case.noise[..., 0]
        args, keywords = case.arguments(**options)
        args = (*op._prepare(*args, **keywords)[:-1], True)  # with a tape
        outputs = op._triton_forward(*args)
        if direction == "backward":
            wanted = [args[i] is not None for i in op._DIFFERENTIABLE]
            op._triton_backward(*outputs[:3], wanted, *outputs, *args)

    assert_launches_fit(call, kernels, f"{direction}_kernel")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_triton_compiles_and_fits(assert_launches_fit, direction):
    assert_compiles_and_fits(assert_launches_fit, "V1", torch.float32, direction)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("model", "B"), [("V1", 16), *itertools.product(("512", "12M", "50M"), (16, 128))]
)  # the launch for 16 sequences is persistent, that for 128 is split
def test_triton_compiles_and_fits_at_all_sizes(assert_launches_fit, model, B, dtype, direction):
    assert_compiles_and_fits(assert_launches_fit, model, dtype, direction, B)


def test_gumbel_needs_noise_of_every_class():
    case = Case()
    case.noise = case.noise[..., 0]
    with pytest.raises(ValueError, match=r"noise: gumbel needs it for every class, \(4, 3, 3, 4\), got \(4, 3, 3\)"):
        case.call(gumbel=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("model", "B"), [("512", 16), ("12M", 16), ("12M", 128)])
def test_triton_compiles_and_fits_with_other_draws(assert_launches_fit, model, B, dtype):
    assert_compiles_and_fits(assert_launches_fit, model, dtype, "backward", B, gumbel=True)
    assert_compiles_and_fits(assert_launches_fit, model, dtype, "forward", B, cumulative=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["tile", "persistent", "split"])
def test_triton_with_gumbel_on_a_gpu(shape):
    case = Case("block_gru", (12, 17), D=136, U=70, V=33, A=5, E=40, B=19, T=7, dtype=torch.float32).to("cuda")
    assert_same(triton_run(case, shape, gumbel=True), case.run("reference", gumbel=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["tile", "persistent", "split"])
@pytest.mark.parametrize(("kind", "latent"), KINDS)
def test_triton_on_a_gpu(kind, latent, shape):
    odd = dict(D=136, U=70, V=33, A=5, E=40, B=19, T=7)
    large = dict(D=512, U=256, V=320, A=6, E=128, B=16, T=16, blocks=8)
    for sizes in ({}, odd, large):
        case = Case(kind, (12, 17) if latent == "categorical" else (30,), dtype=torch.float32, **sizes).to("cuda")
        expected = case.run("reference")
        assert_same(triton_run(case, shape), expected)
        # bfloat16 rounds at 2⁻⁸, and so draws other classes now and then: only Gaussians stay near.
        if latent == "gaussian":
            got = triton_run(case.to(torch.bfloat16), shape)
            assert_same({k: x.float() for k, x in got.items()}, expected, 5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["tile", "persistent", "split"])
def test_triton_in_a_cuda_graph(shape):
    case = Case("block_gru", T=5, B=16, D=64, U=32, V=32, dtype=torch.float32).to("cuda")
    expected = case.run("reference")["deter"]
    stream = torch.cuda.Stream()
    kernels = importlib.import_module("phyxdream.kernels.rssm_scan")
    with mock.patch.object(kernels, "choose_shape", lambda *args: shape), ops.use_backend("triton"), torch.no_grad():
        with torch.cuda.stream(stream):
            case.call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            deter = case.call()[0]
    for _ in range(2):
        deter.zero_()
        graph.replay()
        assert_same({"deter": deter}, {"deter": expected})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_opcheck_and_autocast_on_a_gpu():
    case = Case(T=2, dtype=torch.float32).to("cuda")
    args, keywords = case.arguments({k: x.clone().requires_grad_() for k, x in case.inputs.items()})
    opcheck(torch.ops.phyxdream.rssm_observe.default, op._prepare(*args, **keywords))
    with torch.autocast("cuda", torch.bfloat16):
        assert all(x.dtype is torch.bfloat16 for x in case.call())


# ---------------------------------------------------------------------------------------------------------------------
# torch.library, torch.compile, autocast.


@needs_extension
@pytest.mark.parametrize(("kind", "latent"), KINDS)
def test_opcheck(kind, latent):
    case = Case(kind, LATENTS[latent], T=2, dtype=torch.float32)
    if kind == "gru" and latent == "categorical":
        case.noise = case.noise[..., 0]
    args, keywords = case.arguments({k: x.clone().requires_grad_() for k, x in case.inputs.items()})
    opcheck(torch.ops.phyxdream.rssm_observe.default, op._prepare(*args, **keywords))


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("kind", CELLS)
def test_compiles_as_one_graph(kind, backend):
    case = Case(kind, T=2, dtype=torch.float32)
    expected = case.run(backend)
    eager = case.call
    torch.compiler.reset()  # a compiled function keeps the backend it was traced with
    case.call = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_same(case.run(backend), expected, 1e-6)


@needs_extension
def test_autocast_computes_in_float32():
    case = Case(dtype=torch.float32)
    half = {"embed": case.tensors["embed"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend("cpu"):
        outputs = case.call(half)
    case.tensors["embed"] = half["embed"].float()
    assert all(x.dtype is torch.float32 for x in outputs)
    torch.testing.assert_close(outputs[0], case.run("cpu")["deter"], rtol=0, atol=0)


@pytest.mark.parametrize("latent", LATENTS)
def test_half_precision_is_rounded_once(latent):
    """And noise may be precise."""
    case = Case(latent=LATENTS[latent], dtype=torch.float32).to(torch.bfloat16)
    with ops.use_backend("reference"):
        outputs = case.call()
        expected = case.to(torch.float32).call()
    assert all(x.dtype is torch.bfloat16 for x in outputs)
    for x, y in zip(outputs[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y.bfloat16(), rtol=0, atol=0)


def test_autocast_on_cuda_computes_in_its_dtype():
    """By what enters the op; the tensors are on a GPU that need not exist."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            case = Case(dtype=torch.float32)
            for group in (case.tensors, case.cell, case.posterior):
                group |= {k: torch.empty_like(x, device="cuda") for k, x in group.items() if x is not None}
            case.noise, case.is_first = (torch.empty_like(x, device="cuda") for x in (case.noise, case.is_first))
            args, keywords = case.arguments()
            args = op._prepare(*args, **keywords)
            outputs = op._fake(*args)
    finally:
        torch.set_autocast_enabled("cuda", False)
    half = torch.get_autocast_dtype("cuda")
    tensors = dict(zip(op._TENSORS, args, strict=False))
    assert tensors.pop("noise").dtype is torch.float32 and tensors.pop("is_first").dtype is torch.bool
    assert {x.dtype for x in (*tensors.values(), *args[8:]) if isinstance(x, torch.Tensor)} == {half}
    assert [x.dtype for x in outputs] == [half, half, half, torch.float32, torch.int32]


@needs_extension
def test_a_second_derivative_is_refused():
    case = Case(dtype=torch.float32)
    embed = case.tensors["embed"].requires_grad_()
    with ops.use_backend("cpu"):
        deter = case.call()[0]
    (grad,) = torch.autograd.grad(deter.sum(), embed, create_graph=True)
    with pytest.raises(RuntimeError, match="rssm_observe is differentiable once"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Choice of backend, errors.


@needs_extension
def test_explain():
    args, keywords = Case(dtype=torch.float32).arguments()
    explanation = ops.explain(ops.rssm_observe, *args, **keywords)
    assert explanation.backend == "cpu"
    assert "1 group of 16 sequences" in explanation.reasons["cpu"]
    args, keywords = Case(T=1, dtype=torch.float32).arguments()
    explanation = ops.explain(ops.rssm_observe, *args, **keywords)
    assert explanation.backend == "reference"
    assert "slower than the reference" in explanation.reasons["cpu"]
    args, keywords = Case().arguments(act="gelu")
    assert ops.explain(ops.rssm_observe, *args, **keywords).backend == "reference"
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="activations silu, elu, relu, not gelu"):
        ops.rssm_observe(*args, **keywords)


def changed(**changes):
    return lambda case: case.tensors.update({k: f(case.tensors[k]) for k, f in changes.items()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed(embed=lambda x: x[1:]), ValueError, r"embed: expected shape \(4, 3, E\), got \(3, 3, 5\)"),
        (changed(action=lambda x: x[:, 1:]), ValueError, r"action: expected shape \(4, 3, 2\), got \(4, 2, 2\)"),
        (changed(deter=lambda x: x[0]), ValueError, r"deter: expected shapes .* and \(8,\)"),
        (changed(stoch=lambda x: x[..., 0]), ValueError, r"stoch: expected shape \(3, 3, 4\), got \(3, 3\)"),
        (changed(initial_deter=lambda x: x[1:]), ValueError, r"initial_deter: expected shape \(8,\), got \(7,\)"),
        (changed(deter=lambda x: x.float()), TypeError, r"dtype of embed, torch.float64, got deter torch.float32"),
        (changed(embed=lambda x: x.numpy()), TypeError, r"embed: expected a tensor, got ndarray"),
        (changed(action=lambda x: x.long()), TypeError, r"action: expected a floating-point tensor, got torch.int64"),
        (changed(embed=lambda x: x[..., :0]), ValueError, r"expected no empty axis, got .*'E': 0"),
        (lambda case: setattr(case, "noise", case.noise[0, 0]), ValueError, r"noise: expected shape .*got \(3, 4\)"),
        (lambda case: setattr(case, "is_first", case.is_first.int()), TypeError, r"is_first: .*bool, got torch.int32"),
        (lambda case: case.cell.update(in_action=torch.zeros(6, 3)), ValueError, r"cell.in_action: .*\(6, 2\), got"),
        (lambda case: case.cell.update(in_gain=None), ValueError, r"cell.in_gain: .*beside the shift of a LayerNorm"),
        (lambda case: case.cell.update(gates_gain=None), TypeError, r"cell.gates_gain: .*tensor, got NoneType"),
        (lambda case: case.cell.update(gates_bias=torch.zeros(8)), ValueError, r"cell.gates_bias: .*\(24,\), got"),
        (lambda case: case.posterior.update(out_bias=torch.zeros(3)), ValueError, r"posterior.out_bias: .*\(12,\)"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    case = Case()
    change(case)
    with pytest.raises(error, match=message):
        case.call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(unimix=1.0), ValueError, r"unimix: expected a number in \[0, 1\), got 1.0"),
        (dict(min_std=float("nan")), ValueError, r"min_std: .*got nan"),
        (dict(rms_eps=-1), ValueError, r"rms_eps: .*got -1"),
        (dict(layer_eps="1"), TypeError, r"layer_eps: expected a number, got str"),
        (dict(act="swish"), ValueError, r"act: expected one of .*'swish'"),
        (dict(gumbel=1), TypeError, r"gumbel: expected True or False, got int"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Case().call(**options)


def test_bad_weights():
    args, keywords = Case().arguments()
    with pytest.raises(TypeError, match=r"cell: expected one of GRUWeights, .*got dict"):
        ops.rssm_observe(*args[:6], {}, args[7], **keywords)
    with pytest.raises(TypeError, match="posterior: expected PosteriorWeights, got NoneType"):
        ops.rssm_observe(*args[:7], None, **keywords)
