"""rssm_imagine on CPU, under a policy and under given actions, C++ against the reference, with all of torch's threads.

    pytest bench/bench_rssm_imagine.py --benchmark-only -s

1024 sequences of 15 steps, and actors of three layers. `no gradient` is what behaviour learning by REINFORCE does;
`dynamics gradient` is the backward through model and samples to the actor's weights and the start, the model frozen;
`open loop` is the model under given actions, no gradient. GFLOP/s counts the matrix products that remain when one-hot z
picks rows (of the model's weights one forward and one back, of the actor's one more), over the peak that one measured
product with weights in the cache reaches here.
"""

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from phyxdream import nn, ops
from phyxdream.nn.layers import head_weights
from phyxdream.ops.rssm_cpu import product

SMALL = dict(deter_size=200, hidden_size=200)
GAUSSIAN = dict(cell="gru", stoch_size=30, classes=0, **SMALL)
V1_ACTOR = dict(units=400, dist="tanh_normal", act="elu", norm="none")
SIZES = {
    "V1: gru 200, 30 Gaussians, actor 400": (GAUSSIAN, V1_ACTOR),
    "layernorm_gru 200, 32×32, actor 400": (SMALL, dict(units=400, dist="categorical")),
    "layernorm_gru 512, 32×32, actor 512": ({}, dict(units=512, dist="categorical")),
    "12M: block_gru 2048, 32×16, actor 256": (
        dict(cell="block_gru", deter_size=2048, classes=16, hidden_size=256),
        dict(units=256, dist="bounded_normal"),
    ),
}
WORK = ("no gradient", "dynamics gradient", "open loop")
H, B, ACTION, LAYERS = 15, 1024, 6, 3
medians = {}


def model_and_actor(size):
    torch.manual_seed(0)
    model_sizes, actor_sizes = SIZES[size]
    model = nn.RSSM(embed_size=1, action_size=ACTION, **model_sizes).requires_grad_(False)
    return model, nn.Actor(model.feature_size, ACTION, layers=LAYERS, **actor_sizes)


def multiplications(work, size):
    """Per step and sequence, in products with a matrix."""
    model, actor = model_and_actor(size)
    left_out = ("posterior", *(("cell.in_stoch.0.", "cell.in_stoch.") if model.classes else ()))
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(left_out))
    policy = sum(p.numel() for p in actor.parameters() if p.dim() > 1)
    if model.classes:
        policy -= actor.mlp[0][0].out_features * model.stoch_size * model.classes
    return {"no gradient": weights + policy, "dynamics gradient": 2 * weights + 3 * policy, "open loop": weights}[work]


def call(work, size):
    model, actor = model_and_actor(size)
    deter = torch.randn(B, model.deter_size).tanh()
    stoch = torch.randn(B, model.stoch_size)
    if model.classes:
        stoch = F.one_hot(torch.randint(model.classes, (B, model.stoch_size)), model.classes).float()
    start, noise = nn.State(deter, stoch), model.draw_noise(H, B)
    if work == "open loop":
        action = torch.randn(H, B, ACTION)
        return torch.no_grad()(lambda: model.imagine(action, start, noise))
    action_noise = actor.draw_noise(H, B)
    weights = model.cell.weights(), head_weights(*model.prior), head_weights(actor.mlp, actor.out)
    options = dict(dist=actor.dist, **model.cell.options._asdict(), policy_act=actor.act)

    def forward():
        return ops.rssm_imagine_policy(action_noise, start.deter, start.stoch, noise, *weights, **options)

    if work == "no gradient":
        return torch.no_grad()(forward)
    deter.requires_grad_()
    stoch.requires_grad_()
    grads = None

    def forward_backward():
        nonlocal grads
        outputs = forward()
        grads = grads or [torch.randn(x.shape) for x in outputs]
        actor.zero_grad()
        deter.grad = stoch.grad = None
        torch.autograd.backward(outputs, grads)

    return forward_backward


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("work", WORK)
def test_rssm_imagine(benchmark, work, size, backend):
    benchmark.group = f"rssm_imagine {work} {size}"
    with ops.use_backend(backend):
        rounds = 7 if backend == "cpu" else 3
        benchmark.pedantic(call(work, size), rounds=rounds, iterations=1, warmup_rounds=1)
    medians[work, size, backend] = statistics.median(benchmark.stats.stats.data)


def peak():
    """The best of many products, in FLOP/s."""
    a, b, out = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        product(a, b, out)
        times.append(time.perf_counter() - start)
    return 2 * 512**3 / min(times)


def test_report(benchmark):
    benchmark.pedantic(lambda: None)  # so that --benchmark-only keeps it
    best = peak()
    print(f"\npeak {best / 1e9:.0f} GFLOP/s")
    for work, size in [(work, size) for work in WORK for size in SIZES if (work, size, "cpu") in medians]:
        reference, fast = (medians[work, size, name] for name in ("reference", "cpu"))
        rate = 2 * H * B * multiplications(work, size) / fast
        print(
            f"rssm_imagine {work:17} {size:38} reference {reference * 1e3:7.1f} ms, cpu {fast * 1e3:6.1f} ms: "
            f"{reference / fast:4.1f}x, {rate / 1e9:5.0f} GFLOP/s, {rate / best:4.0%} of peak"
        )
