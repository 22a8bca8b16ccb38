"""rssm_observe on CPU, forward and backward, C++ against the reference, with all of torch's threads.

    pytest bench/bench_rssm_observe.py --benchmark-only -s

16 sequences of 64 steps. GFLOP/s counts the matrix products that remain when one-hot z picks rows (three per weight:
forward, and the gradients of its two factors), over the peak that one measured product of 16 rows with weights in the
cache reaches here; what is missing from 100 % is weights streamed from beyond it, norms, gates and samples, laying out
weights for each call, and the rows written for the gradients of the weights.
"""

import statistics
import time

import pytest
import torch

from phyxdream import nn, ops
from phyxdream.ops import rssm_observe_cpu

SMALL = dict(deter_size=200, hidden_size=200)
SIZES = {
    "V1: gru 200, 30 Gaussians, embed 1024": dict(embed_size=1024, cell="gru", stoch_size=30, classes=0, **SMALL),
    "layernorm_gru 200, 32×32, embed 1024": dict(embed_size=1024, **SMALL),
    "layernorm_gru 512, 32×32, embed 1024": dict(embed_size=1024),
    "layernorm_gru 512, 32×32, embed 4096": dict(embed_size=4096),
    "12M: block_gru 2048, 32×16, embed 1024": dict(
        embed_size=1024, cell="block_gru", deter_size=2048, classes=16, hidden_size=256
    ),
}
T, B, ACTION = 64, 16, 6
medians = {}


def model_and_inputs(size):
    torch.manual_seed(0)
    model = nn.RSSM(action_size=ACTION, **SIZES[size])
    embed = torch.randn(T, B, SIZES[size]["embed_size"], requires_grad=True)
    is_first = torch.zeros(T, B, dtype=torch.bool)
    is_first[0] = True
    return model, (embed, torch.randn(T, B, ACTION), is_first, None, model.draw_noise(T, B))


def multiplications(model):
    """Per step and sequence, in products with a matrix: of the weights but the prior's and one-hot z's."""
    left_out = ("prior.", "cell.in_stoch.0.", "cell.in_stoch.") if model.classes else ("prior.",)
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(left_out))


def work(direction, size):
    model, inputs = model_and_inputs(size)
    if direction == "forward":
        return lambda: model.filter(*inputs)
    grads = None

    def forward_backward():
        nonlocal grads
        post = model.filter(*inputs)
        outputs = [post.deter, post.stoch] + ([post.logits] if model.classes else [post.mean, post.std])
        grads = grads or [torch.randn(x.shape) for x in outputs]
        model.zero_grad()
        inputs[0].grad = None
        torch.autograd.backward(outputs, grads)

    return forward_backward


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_rssm_observe(benchmark, direction, size, backend):
    benchmark.group = f"rssm_observe {direction} {size}"
    with ops.use_backend(backend):
        rounds = 15 if backend == "cpu" else 7
        benchmark.pedantic(work(direction, size), rounds=rounds, iterations=1, warmup_rounds=2)
    medians[direction, size, backend] = statistics.median(benchmark.stats.stats.data)


def peak():
    """The best of many products, in FLOP/s."""
    a, b, out = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        rssm_observe_cpu.product(a, b, out)
        times.append(time.perf_counter() - start)
    return 2 * 512**3 / min(times)


def test_report(benchmark):
    benchmark.pedantic(lambda: None)  # so that --benchmark-only keeps it
    best = peak()
    print(f"\npeak {best / 1e9:.0f} GFLOP/s")
    for direction, products in (("forward", 1), ("forward+backward", 3)):
        for size in SIZES:
            reference, fast = (medians[direction, size, name] for name in ("reference", "cpu"))
            rate = 2 * products * T * B * multiplications(model_and_inputs(size)[0]) / fast
            print(
                f"rssm_observe {direction:16} {size:40} reference {reference * 1e3:7.1f} ms, cpu {fast * 1e3:6.1f} ms: "
                f"{reference / fast:4.1f}x, {rate / 1e9:5.0f} GFLOP/s, {rate / best:4.0%} of peak"
            )
