"""Other codebases before and after `phyxdream.accelerate`: `python -m phyxdream.bench.peers --checkouts FOLDER`.

FOLDER holds checkouts named `dreamerv3-torch`, `r2dreamer`, `sheeprl` and `torchrl` (github.com: NM512/dreamerv3-torch,
NM512/r2dreamer, Eclectic-Sheep/sheeprl, pytorch/rl); RLlib and lucidrains' slot attention are taken from what is
installed (`ray`, `slot-attention`). What is not there is left out. Each codebase runs in a process of its own: their
modules have the same names. Outputs and gradients of both sides are compared from one seed before anything is timed.

The file that is written has, under "peers", for every row: codebase, revision, what, theirs and ours in seconds
(medians of rounds that take turns), ratio, and difference, the largest relative difference by norm of outputs and
gradients.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import phyxdream
from phyxdream.bench import results
from phyxdream.bench.results import seconds_text

B, T, H, A = 16, 64, 15, 6
ROUNDS, SECONDS = 5, 0.2


@dataclasses.dataclass
class Pair:
    """The same computation on both sides; both return tensors, or (loss, leaves) whose gradients are compared."""

    what: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    exact: bool = True


def measured(pair: Pair) -> dict[str, Any]:
    """A row of the file."""
    difference = None
    if pair.exact:
        found = []
        for run in (pair.theirs, pair.ours):
            torch.manual_seed(0)
            found.append(run())
        theirs, ours = map(_flat, found)
        # What is 0 but for rounding is measured by all that is not.
        scale = 1e-3 * max(x.double().norm().item() for x in theirs)
        difference = max(_difference(x, y, scale) for x, y in zip(theirs, ours, strict=True))
    rounds = []
    for i in range(ROUNDS):
        sides = [pair.theirs, pair.ours]
        times = [_seconds(run) for run in (sides if i % 2 else reversed(sides))]
        rounds.append(times if i % 2 else times[::-1])
    theirs, ours = map(statistics.median, zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    row = dict(what=pair.what, theirs=theirs, ours=ours, ratio=ratio, difference=difference)
    print(f"  {pair.what}: {seconds_text(theirs)} -> {seconds_text(ours)}, {ratio:.1f}x, differs by {difference}")
    return row


def _seconds(run):
    calls, start = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        passed = time.perf_counter() - start
        if passed >= SECONDS:
            return passed / calls


def _flat(x):
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict) or hasattr(x, "items"):
        return [z for y in x.values() for z in _flat(y)]
    return [z for y in x for z in _flat(y)] if isinstance(x, (list, tuple)) else []


def _difference(x, y, scale):
    scale = max(scale, x.double().norm().item()) or 1.0
    return (x.double() - y.double()).norm().item() / scale


def trained(call: Callable[[nn.Module], tuple[Any, list[Tensor]]], module: nn.Module) -> Callable[[], list[Tensor]]:
    """Forward and backward of a call: its outputs, and the gradients of its inputs and of all Parameters."""

    def run():
        outputs, inputs = call(module)
        flat = [x for x in _flat(outputs) if x.requires_grad]
        total = sum((x * _weights(x)).sum() for x in flat)
        leaves = [*inputs, *(x for x in module.parameters() if x.requires_grad)]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [*(x.detach() for x in flat), *(x for x in grads if x is not None)]

    return run


_MADE: dict[tuple[int, ...], Tensor] = {}


def _weights(x):
    if x.shape not in _MADE:
        _MADE[x.shape] = torch.linspace(-1, 1, x.numel()).view(x.shape).sin()
    return _MADE[x.shape]


def returns(
    what: str, given: Sequence[Tensor], theirs: Callable[..., Tensor], ours: Callable[..., Tensor]
) -> Iterator[Pair]:
    """λ-returns of `given`, without gradients and with those of rewards and values, as behind an actor's loss."""
    leaves = [x.clone().requires_grad_() for x in given[:2]]

    def back(function):
        def run():
            found = function(*leaves, *given[2:])
            return [found.detach(), *torch.autograd.grad(found.mean(), leaves)]

        return run

    yield Pair(what, lambda: theirs(*given), lambda: ours(*given))
    yield Pair(f"{what}, forward + backward", back(theirs), back(ours))


def accelerated(module: nn.Module) -> nn.Module:
    """A copy after the one line."""
    fast = copy.deepcopy(module)
    summary = phyxdream.accelerate(fast)
    if not summary.replaced:
        raise SystemExit(f"nothing was replaced: {summary}")
    return fast


# ---------------------------------------------------------------------------------------------------------------------
# Codebases: each yields pairs; imports happen in its own process.


def dreamerv3_torch(folder: Path) -> Iterator[Pair]:
    sys.path.insert(0, str(folder))
    import models
    import networks
    import tools

    from phyxdream.compat import dreamerv3_torch as compat

    embed_size = 4096
    sizes = dict(stoch=32, deter=512, hidden=512, discrete=32, num_actions=A, embed=embed_size, device="cpu")
    rssm = networks.RSSM(**sizes)
    fast = accelerated(rssm)
    embed, action, first = torch.randn(B, T, embed_size), torch.randn(B, T, A), torch.zeros(B, T)
    first[:, 0] = first[3, 20] = 1

    def observe(m):
        leaf = embed.clone().requires_grad_()
        return m.observe(leaf, action.clone(), first), [leaf]

    yield Pair(f"RSSM.observe, forward + backward, B{B} T{T}, 512/512/32x32, embed 4096", trained(observe, rssm),
               trained(observe, fast))  # fmt: skip

    shape = H, B * T, 1
    given = *(torch.rand(shape) for _ in range(3)), torch.rand(shape[1:])
    functions = (
        lambda *x, f=f: torch.stack(f(*x, lambda_=0.95, axis=0), dim=1)
        for f in (tools.lambda_return, compat.lambda_return)
    )
    yield from returns("lambda_return and the caller's stack, 15 x 1024", given, *functions)

    config = _dreamerv3_config(folder / "configs.yaml")
    if config is None:
        return
    import gymnasium
    import numpy as np

    space = gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)})
    rng = np.random.default_rng(0)
    data = {
        "image": rng.integers(0, 255, (B, T, 64, 64, 3)).astype(np.uint8),
        "action": rng.normal(size=(B, T, A)).astype(np.float32),
        "reward": rng.normal(size=(B, T)).astype(np.float32),
        **{name: np.zeros((B, T), np.float32) for name in ("is_first", "is_terminal")},
        "discount": np.ones((B, T), np.float32),
    }
    data["is_first"][:, 0] = 1

    def step(fast, **options):
        torch.manual_seed(0)
        model = models.WorldModel(space, None, 0, config)
        behaviour = models.ImagBehavior(config, model)
        if fast:
            phyxdream.accelerate(behaviour, **options)

        def run():
            post, _, _ = model._train(dict(data))
            behaviour._train(post, lambda f, s, a: model.heads["reward"](model.dynamics.get_feat(s)).mode())

        return run

    with mock.patch("builtins.print"):
        what = "whole train step, dmc_vision, B16 T64, H15"
        pairs = (
            Pair(what, step(False), step(True), exact=False),
            Pair(f"{what}, linear=True", step(False), step(True, linear=True), exact=False),
        )
    yield from pairs


def _dreamerv3_config(path):
    try:
        from ruamel.yaml import YAML
    except ImportError:
        return None
    found = YAML(typ="safe").load(path.read_text())
    merged: dict[str, Any] = {}

    def update(into, other):
        for key, value in other.items():
            if isinstance(value, dict) and key in into:
                update(into[key], value)
            else:
                into[key] = value

    for name in ("defaults", "dmc_vision"):
        update(merged, found[name])
    return types.SimpleNamespace(**{**merged, "device": "cpu", "num_actions": A, "precision": 32})


def r2dreamer(folder: Path) -> Iterator[Pair]:
    sys.path.insert(0, str(folder))
    import dreamer
    import rssm

    from phyxdream.compat import r2dreamer as compat

    config = types.SimpleNamespace(
        stoch=32, deter=2048, hidden=256, discrete=16, act="SiLU", unimix_ratio=0.01, initial="learned", device="cpu",
        obs_layers=1, img_layers=2, dyn_layers=1, blocks=8,
    )  # fmt: skip
    module = rssm.RSSM(config, 1024, A)
    fast = accelerated(module)
    embed, action = torch.randn(B, T, 1024), torch.randn(B, T, A)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 0] = reset[3, 20] = True

    def observe(m):
        leaf = embed.clone().requires_grad_()
        return m.observe(leaf, action, m.initial(B), reset), [leaf]

    yield Pair(f"RSSM.observe 12M, forward + backward, B{B} T{T}", trained(observe, module), trained(observe, fast))

    shape = B * T, H + 1, 1
    last, term = torch.zeros(shape), torch.zeros(shape)
    reward, value = torch.rand(shape), torch.rand(shape)
    own = dreamer.Dreamer._lambda_return
    yield Pair(
        "_lambda_return, 1024 x 16",
        lambda: own(None, last, term, reward, value, value, 0.997, 0.95),
        lambda: compat.lambda_return(last, term, reward, value, value, 0.997, 0.95),
    )


def sheeprl(folder: Path) -> Iterator[Pair]:
    # Its package imports every algorithm with all of their environments; only these modules are wanted.
    for name in ("", ".algos", ".utils", *(f".algos.dreamer_v{i}" for i in (1, 2, 3))):
        package = types.ModuleType(f"sheeprl{name}")
        package.__path__ = [str(folder / f"sheeprl{name}".replace(".", "/"))]
        sys.modules[package.__name__] = package
    sys.modules["sheeprl.utils.env"] = mock.MagicMock()
    from sheeprl.algos.dreamer_v1 import agent as agent1
    from sheeprl.algos.dreamer_v1 import utils as utils1
    from sheeprl.algos.dreamer_v2 import agent as agent2
    from sheeprl.algos.dreamer_v2 import utils as utils2
    from sheeprl.algos.dreamer_v3 import agent as agent3
    from sheeprl.algos.dreamer_v3 import utils as utils3
    from sheeprl.models.models import MLP, LayerNorm

    from phyxdream.compat import sheeprl as compat

    embed_size, S = 1024, 32

    def v3(D=512, U=512):
        kw = {"eps": 1e-3}
        recurrent = agent3.RecurrentModel(S * S + A, D, U, layer_norm_kw=dict(kw))

        def head(inputs):
            return MLP(inputs, S * S, [U], activation=nn.SiLU, layer_args={"bias": False}, norm_layer=[LayerNorm],
                       norm_args=[{**kw, "normalized_shape": U}])  # fmt: skip

        return agent3.RSSM(recurrent, head(D + embed_size), head(D), {}, S, 0.01, True)

    def v2(D=600, U=600):
        recurrent = agent2.RecurrentModel(S * S + A, D, U)
        heads = (MLP(inputs, S * S, [U], activation=nn.ELU) for inputs in (D + embed_size, D))
        return agent2.RSSM(recurrent, *heads, {}, S)

    def v1(D=200, U=200, stoch=30):
        recurrent = agent1.RecurrentModel(stoch + A, D)
        heads = (MLP(inputs, 2 * stoch, [U], activation=nn.ELU) for inputs in (D + embed_size, D))
        return agent1.RSSM(recurrent, *heads, {})

    embeds, actions, first = torch.randn(T, B, embed_size), torch.randn(T, B, A), torch.zeros(T, B, 1)
    first[0] = first[20, 3] = 1

    def loop(latent, resets):
        def call(m):
            leaf = embeds.clone().requires_grad_()
            z, h = torch.zeros(1, B, *latent), torch.zeros(1, B, m.recurrent_model.rnn.hidden_size)
            found = []
            for t in range(T):
                inputs = (actions, leaf, *[first] * resets)
                found.append(m.dynamic(z, h, *(x[t : t + 1] for x in inputs)))
                h, z = found[-1][:2]
            return found, [leaf]

        return call

    for name, make, latent, resets in (("DreamerV3 S, 512/512", v3, (S, S), 1), ("DreamerV2, 600/600", v2, (S, S), 1),
                                       ("DreamerV1, 200/30", v1, (30,), 0)):  # fmt: skip
        module = make()
        call = loop(latent, resets)
        what = f"{name}: the loop over dynamic, forward + backward, B{B} T{T}"
        yield Pair(what, trained(call, module), trained(call, accelerated(module)))

    shape = H, B * T, 1
    given = [torch.rand(shape) for _ in range(3)]
    last = torch.rand(1, *shape[1:])
    for name, theirs, ours, rest in (
        ("DreamerV3 compute_lambda_values, 15 x 1024", utils3, compat.compute_lambda_values, ()),
        ("DreamerV2 compute_lambda_values, 15 x 1024", utils2, compat.compute_lambda_values_v2, (last, H)),
        ("DreamerV1 compute_lambda_values, 14 x 1024", utils1, compat.compute_lambda_values_v1, (last[0], H)),
    ):
        functions = theirs.compute_lambda_values, ours
        yield from returns(name, given, *(lambda *x, f=f, rest=rest: f(*x, *rest, lmbda=0.95) for f in functions))


def torchrl(folder: Path) -> Iterator[Pair]:
    sys.path.insert(0, str(folder))
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules.models.dreamer_v3 import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3
    from torchrl.objectives.dreamer_v3 import DreamerV3ActorLoss

    from phyxdream.compat import torchrl as compat

    D, S, C, embed_size = 2048, 32, 16, 1024
    shared = dict(hidden_dim=256, num_categoricals=S, num_classes=C, unimix=0.01)
    cell = dict(action_shape=torch.Size([A]), rnn_hidden_dim=D, action_dim=A, recurrent_model="block_gru")
    next_ = {k: ("next", k) for k in ("prior_logits", "state", "belief", "encoded_latents", "posterior_logits")}
    prior = TensorDictModule(
        RSSMPriorV3(**cell, **shared),
        in_keys=["state", "belief", "action"], out_keys=[next_[k] for k in ("prior_logits", "state", "belief")],
    )  # fmt: skip
    posterior = TensorDictModule(
        RSSMPosteriorV3(rnn_hidden_dim=D, obs_embed_dim=embed_size, use_rms_norm=True, **shared),
        in_keys=[next_["belief"], next_["encoded_latents"]], out_keys=[next_["posterior_logits"], next_["state"]],
    )  # fmt: skip
    module = RSSMRolloutV3(prior, posterior)
    embed, action = torch.randn(B, T, embed_size), torch.randn(B, T, A)
    first = torch.zeros(B, T, 1, dtype=torch.bool)
    first[:, 0] = first[3, 20] = True

    def call(m):
        leaf = embed.clone().requires_grad_()
        given = TensorDict(
            {"state": torch.zeros(B, T, S * C), "belief": torch.zeros(B, T, D), "action": action, "is_init": first,
             "next": TensorDict({"encoded_latents": leaf}, [B, T])}, [B, T],
        )  # fmt: skip
        found = m(given)
        return {k: found.get(next_[k]) for k in ("prior_logits", "state", "belief", "posterior_logits")}, [leaf]

    what = f"RSSMRolloutV3 12M, block GRU, forward + backward, B{B} T{T}"
    yield Pair(what, trained(call, module), trained(call, accelerated(module)))

    shape = B * T, H, 1
    estimator = types.SimpleNamespace(gamma=torch.tensor(0.997), lmbda=torch.tensor(0.95))
    loss = types.SimpleNamespace(value_estimator=estimator)
    yield from returns(
        "lambda_target with a continuation, 1024 x 15", [torch.rand(shape) for _ in range(3)],
        lambda *x: DreamerV3ActorLoss.lambda_target(loss, *x), lambda *x: compat.lambda_target(*x, 0.997, 0.95),
    )  # fmt: skip


def rllib(_: Path) -> Iterator[Pair]:
    import gymnasium
    import ray
    from ray.rllib.algorithms.dreamerv3.torch.models.world_model import WorldModel

    class Encoder(nn.Linear):
        output_size = (1024,)

    class Decoder(nn.Linear):
        def forward(self, h, z):
            return super().forward(torch.cat([h, z.flatten(1)], -1))

    space = gymnasium.spaces.Box(-1, 1, (64,))
    del ray
    module = WorldModel(
        model_size="S", observation_space=space, action_space=gymnasium.spaces.Discrete(A), batch_length_T=T,
        encoder=Encoder(64, 1024), decoder=Decoder(512 + 1024, 64),
    )  # fmt: skip
    observations, actions, first = torch.randn(B, T, 64), torch.randn(B, T, A), torch.zeros(B, T)
    first[:, 0] = first[3, 20] = 1

    def call(m):
        found = m.forward_train(observations, actions, first)
        return {k: x for k, x in found.items() if isinstance(x, Tensor)}, []

    what = f"WorldModel.forward_train S, linear encoder, forward + backward, B{B} T{T}"
    yield Pair(what, trained(call, module), trained(call, accelerated(module)))


def slot_attention(_: Path) -> Iterator[Pair]:
    from slot_attention import SlotAttention

    module = SlotAttention(num_slots=7, dim=64)
    inputs = torch.randn(16, 1024, 64)

    def call(m):
        leaf = inputs.clone().requires_grad_()
        return m(leaf), [leaf]

    what = "SlotAttention, 7 slots of 64, 1024 tokens, 3 iterations, batch 16, forward + backward"
    yield Pair(what, trained(call, module), trained(call, accelerated(module)))


CODEBASES: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "dreamerv3-torch": dreamerv3_torch,
    "r2dreamer": r2dreamer,
    "sheeprl": sheeprl,
    "torchrl": torchrl,
    "rllib": rllib,
    "slot-attention": slot_attention,
}
INSTALLED = {"rllib": "ray", "slot-attention": "slot-attention"}


def revision(name: str, folder: Path) -> str:
    """Of a checkout, or the version of what is installed."""
    if name in INSTALLED:
        return importlib.metadata.version(INSTALLED[name])
    stored = folder / "REVISION"  # of a checkout without its history
    if stored.exists():
        return stored.read_text().strip()[:12]
    found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:12] or "unknown"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phyxdream.bench.peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", choices=[*CODEBASES, []], help="codebases; all that are there")
    parser.add_argument("--checkouts", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        (name,) = options.names
        rows = [measured(pair) for pair in CODEBASES[name](options.checkouts / name)]
        print(json.dumps(rows))
        return 0
    machine, peers = results.machine(), []
    for name in options.names or CODEBASES:
        folder = options.checkouts / name
        if name not in INSTALLED and not folder.is_dir():
            print(f"{name}: no checkout, left out")
            continue
        print(f"{name}:", flush=True)
        command = [sys.executable, "-m", "phyxdream.bench.peers", name, "--checkouts", str(options.checkouts), "--one"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("  "):
                print(line, end="", flush=True)
        if process.wait():
            print(f"{name}: left out")
            continue
        peers += [dict(codebase=name, revision=revision(name, folder), **row) for row in json.loads(lines[-1])]
    if not peers:
        print("nothing was measured", file=sys.stderr)
        return 1
    path = options.out / f"{results.file_stem(machine)}-peers.json"
    path.write_text(json.dumps(dict(machine=machine, peers=peers), indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
