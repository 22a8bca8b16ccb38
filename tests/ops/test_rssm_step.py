"""Single steps: the scans with one step, and weights that C++ reads where they lie."""

import itertools

import pytest
import torch

from phyxdream import nn, ops
from phyxdream.nn.layers import affine, head_weights
from phyxdream.ops.backend import extension
from phyxdream.ops.rssm_cells import CELLS, PosteriorWeights

needs_extension = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")
cpu = pytest.param("cpu", marks=needs_extension)

CLASSES = {"categorical": 5, "gaussian": 0}
KINDS = list(itertools.product(CELLS, CLASSES))


class Case:
    """Arguments of one call of either op, all tensors leaves that want a gradient but is_first and noise."""

    def __init__(self, prior=False, cell="layernorm_gru", latent="categorical", B=3, E=21, A=2, D=24, hidden=19, T=1):
        torch.manual_seed(0)
        self.prior = prior
        self.model = nn.RSSM(E, A, D, 3, CLASSES[latent], hidden, cell, blocks=2)
        for p in self.model.parameters():
            p.data += 0.1 * torch.randn_like(p)  # biases and shifts that are not 0
        self.noise = self.model.draw_noise(T, B)
        self.is_first = torch.rand(T, B) < 0.3
        stoch = self.noise.shape[2:]
        self.tensors = dict(action=2 * torch.randn(T, B, A), deter=torch.randn(B, D), stoch=torch.randn(B, *stoch))
        if not prior:
            self.tensors |= dict(
                embed=torch.randn(T, B, E), initial_deter=torch.randn(D), initial_stoch=torch.randn(stoch)
            )
        for x in self.tensors.values():
            x.requires_grad_()

    def call(self, function, t=None, state=None, **changed):
        """The scan, or the step t of it from a state."""
        x, model = {**self.tensors, **changed}, self.model
        action, is_first, noise = (y if t is None else y[t] for y in (x["action"], self.is_first, self.noise))
        deter, stoch = state or (x["deter"], x["stoch"])
        cell = model.cell.weights()
        if self.prior:
            return function(action, deter, stoch, noise, cell, head_weights(*model.prior), unimix=0.1)
        layer, norm, _ = model.posterior_in
        out = model.posterior_out
        posterior = PosteriorWeights(layer.weight, layer.bias, *affine(norm), out.weight, out.bias)
        embed = x["embed"] if t is None else x["embed"][t]
        return function(
            embed, action, is_first, deter, stoch, noise, cell, posterior, initial_deter=x["initial_deter"],
            initial_stoch=x["initial_stoch"], unimix=0.1,
        )  # fmt: skip

    def scan(self):
        return self.call(ops.rssm_imagine if self.prior else ops.rssm_observe)

    def step(self, t=0, state=None, **changed):
        return self.call(ops.rssm_imagine_step if self.prior else ops.rssm_step, t, state, **changed)

    def gradients(self, outputs):
        """Of everything that has one, by name, under the same gradients of the outputs every time."""
        leaves = {**self.tensors, **dict(self.model.named_parameters())}
        generator = torch.Generator().manual_seed(9)
        grads = [torch.randn(x.shape, generator=generator) for x in outputs]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        return {name: x for name, x in zip(leaves, found, strict=True) if x is not None}


def assert_same(found, expected, tolerance=1e-5):
    """By the norm of the difference over the norm."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert_same(found.values(), expected.values())


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("prior", [False, True], ids=["posterior", "prior"])
@pytest.mark.parametrize(("cell", "latent"), KINDS)
def test_is_the_scan_of_one_step(prior, cell, latent, backend):
    case = Case(prior, cell, latent)
    with ops.use_backend(backend):
        step, scan = case.step(), case.scan()
        assert len(step) == len(scan)
        assert all(torch.equal(a, b[0]) for a, b in zip(step, scan, strict=True))
        assert_same_gradients(case.gradients(step), case.gradients([x[0] for x in scan]))


@needs_extension
@pytest.mark.parametrize("prior", [False, True], ids=["posterior", "prior"])
@pytest.mark.parametrize(("cell", "latent"), KINDS)
@pytest.mark.parametrize(
    "B", [1, 8, 13, 16, 17, 40, 50]
)  # half a group, a group, more; from 50 on, weights are laid out
def test_cpu_equals_the_reference(prior, cell, latent, B):
    case = Case(prior, cell, latent, B)
    results = []
    for backend in ("cpu", "reference"):
        with ops.use_backend(backend):
            outputs = case.step()
            results.append((outputs, case.gradients(outputs)))
            with torch.no_grad():
                assert_same(case.step(), outputs, 1e-6)
    assert_same(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1])


@needs_extension
@pytest.mark.parametrize("prior", [False, True], ids=["posterior", "prior"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [1, 16, 70])
def test_cpu_at_other_widths(prior, cell, hidden):
    case = Case(prior, cell, B=2, E=5, A=1, D=2 * hidden, hidden=hidden)
    with ops.use_backend("cpu"):
        found = case.step()
    with ops.use_backend("reference"):
        assert_same(found, case.step())


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("prior", [False, True], ids=["posterior", "prior"])
def test_a_loop_of_steps_is_the_scan(prior, backend):
    case = Case(prior, T=5)
    with ops.use_backend(backend):
        scan, states = case.scan(), []
        for t in range(5):
            states.append(case.step(t, states[-1][:2] if states else None))
        loop = [torch.stack(x) for x in zip(*states, strict=True)]
        assert torch.equal(loop[1].detach().round(), scan[1].detach().round())  # the same classes
        assert_same(loop, scan)
        assert_same_gradients(case.gradients(loop), case.gradients(scan))


@pytest.mark.parametrize("backend", ["reference", cpu])
@pytest.mark.parametrize("prior", [False, True], ids=["posterior", "prior"])
def test_strides_of_inputs_and_weights_do_not_matter(prior, backend):
    case = Case(prior)
    with ops.use_backend(backend):
        expected = case.step()
        strided = {
            name: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
            for name, x in case.tensors.items()
            if x.dim() > 1
        }
        assert not strided["deter"].is_contiguous()
        for p in case.model.parameters():
            if p.dim() > 1:
                p.data = p.data.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert_same(case.step(**strided), expected, 1e-6)


@needs_extension
@pytest.mark.parametrize("B", [8, 20])
def test_the_number_of_threads_changes_no_bit(B):
    case = Case(cell="block_gru", B=B, E=300, D=256, hidden=150)  # large enough for threads
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with ops.use_backend("cpu"):
                outputs = case.step()
                results.append([*outputs, *case.gradients(outputs).values()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(embed=lambda x: x[0]), ValueError, r"embed: expected shape \(3, E\), got \(21,\)"),
        (dict(embed=lambda x: x[1:]), ValueError, r"embed: expected shape \(3, E\), got \(2, 21\)"),
        (dict(action=lambda x: x[None]), ValueError, r"action: expected shape \(3, A\), got \(1, 3, 2\)"),
        (dict(is_first=lambda x: x[None]), ValueError, r"is_first: expected shape \(3,\), got \(1, 3\)"),
        (dict(is_first=lambda x: x.float()), TypeError, r"is_first: expected torch.bool, got torch.float32"),
        (dict(deter=lambda x: x[:2]), ValueError, r"deter: expected shape \(3, 24\), got \(2, 24\)"),
        (
            dict(noise=lambda x: x[None]),
            ValueError,
            r"noise: expected shape .* or \(B, S\), got \(1, 3, 3, 5\)",
        ),
        (dict(noise=lambda x: x.numpy()), TypeError, r"noise: expected a tensor, got ndarray"),
        (dict(unmix=lambda x: 0.1), TypeError, r"unexpected keyword argument 'unmix'"),
    ],
)
def test_errors(change, error, message):
    ((name, f),) = change.items()

    def function(*args, **options):
        names = ("embed", "action", "is_first", "deter", "stoch", "noise")
        named = {**dict(zip(names, args, strict=False)), **options}
        named[name] = f(named.get(name))
        return ops.rssm_step(*(named.pop(x) for x in names), *args[6:], **named)

    with pytest.raises(error, match=message):
        Case().call(function, 0)
