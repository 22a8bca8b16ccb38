"""Two processes on the loopback interface learn as one with the joined batch; a run of theirs is one run, which stops,
resumes and survives like any other. This file is also what those processes execute."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phyxdream import distributed
from phyxdream.agents import DreamerAgent, DreamerConfig, preset
from phyxdream.agents.actor_critic import ReturnNormalizer
from phyxdream.cli import main
from phyxdream.errors import CheckpointError, ConfigError
from phyxdream.nn.heads import Actor
from phyxdream.nn.rssm import RSSM
from phyxdream.train import checkpoint, loop
from phyxdream.train.run import Run

WORLD, BATCH, LENGTH, UPDATES = 2, 3, 6, 3
SMALL = dict(size="1m", deter_size=16, hidden_size=8, stoch_size=4, units=8, depth=2, batch_size=BATCH,
             batch_length=LENGTH, replay_capacity=1_000, imagine_horizon=4, learning_rate=1e-3, warmup=0,
             return_norm_rate=0.5, num_envs=2, device="cpu")  # fmt: skip
# A small ε beside gradients that are all but zero would make much of how they are rounded.
_OF_V1 = dict(env="gym:Pendulum-v1", classes=0, embed_size=8, hidden_size=8, depth=2, free_nats=0.01, adam_eps=1e-3,
              grad_clip=1.0)  # fmt: skip
_OF_V2 = {**_OF_V1, "env": "gym:CartPole-v1", "classes": 4}
_CROPPED = dict(pixels=None, image_size=None, crop_pixels=0, overshooting=2)
KINDS = {
    "discrete": dict(name="dreamer_v3", env="gym:CartPole-v1", classes=4),
    "continuous": dict(name="dreamer_v3", env="gym:Pendulum-v1", classes=0, replay_context=0),
    "dreamer_v1": dict(name="dreamer_v1", **_OF_V1),
    "contrastive": dict(name="dreamer_v1", representation="contrastive", **_OF_V1),
    "dreamer_v2": dict(name="dreamer_v2", continue_coeff=1.0, **_OF_V2),
    "daydreamer": dict(name="daydreamer", parallel=False, **_OF_V2),
    "planet": dict(name="planet", overshooting=2, **_OF_V1),
    "dreaming": dict(name="dreaming", **_CROPPED, **_OF_V1),
    "dreaming_v2": dict(name="dreaming_v2", **_CROPPED, **_OF_V2),
}
TRAIN = ["dreamer_v3", *(f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()),
         "--env=gym:CartPole-v1", "--classes=4", "--prefill=64", "--train-ratio=8", "--total-steps=300",
         "--log-every=50", "--eval-every=150", "--eval-episodes=2", "--quiet"]  # fmt: skip


# -- What one process does, and both ----------------------------------------------------------------------------------


def make(name: str, **options) -> DreamerAgent:
    return DreamerAgent(preset(name, **SMALL | options))


def learn(agent: DreamerAgent, columns: slice) -> dict[str, dict[str, torch.Tensor]]:
    """The first gradients, the last weights and metrics of a few updates on these columns of random joint batches."""
    g = torch.Generator().manual_seed(1)
    shape, classes = (LENGTH + agent.config.replay_context, WORLD * BATCH), max(1, agent.config.classes)
    for update in range(UPDATES):
        batch = {}
        for name, (own, dtype) in (agent.replay_spec | agent.latent_spec).items():
            if dtype == "bool":
                batch[name] = torch.rand(*shape, generator=g) < 0.1
            elif dtype in ("float32", "bfloat16"):
                batch[name] = torch.randn(*shape, *own, generator=g).to(getattr(torch, dtype))
            else:
                values = agent.action_size if name == "action" else classes
                batch[name] = torch.randint(0, values, (*shape, *own), generator=g).to(getattr(torch, dtype))
        metrics = agent.update({name: x[:, columns] for name, x in batch.items()}).metrics
        if update == 0:
            gradients = {n: p.grad.clone() for n, p in agent.model.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "weights": agent.model.state_dict(), "metrics": metrics}


def noise(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + rank)


def returns(rank: int, update: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * update + rank)) * 10 + rank


def normalized(rank: int | None) -> dict[str, torch.Tensor]:
    """A normaliser's state after a few returns of one process, or (None) of all."""
    normalizer = ReturnNormalizer(0.3)
    for update in range(UPDATES):
        every = [returns(r, update) for r in range(WORLD)]
        normalizer(torch.cat(every) if rank is None else every[rank])
    return normalizer.state_dict()


def work(out: Path) -> None:
    """One of two processes that do the above, and what they exchange."""
    distributed.join(torch.device("cpu"))
    rank, found = distributed.rank(), {"normalized": {}}
    for kind, options in KINDS.items():
        agent = make(**options)
        agent.generators["learn"] = noise(rank)
        found[kind] = learn(agent, slice(rank * BATCH, (rank + 1) * BATCH))
    found["normalized"] = normalized(rank)
    found["mean"] = distributed.mean(torch.tensor([1.0, 10.0]) * rank)
    found["gathered"] = distributed.gather(torch.arange(6).reshape(2, 3).T + rank)
    own = (torch.arange(6.0).reshape(3, 2) + 10 * rank).requires_grad_()
    joined = distributed.joined(own)
    weight = torch.arange(12.0).reshape(3, 4) * (rank + 1)  # each process's loss reads all of it
    found["joined"] = joined.detach(), torch.autograd.grad((joined * weight).sum(), own)[0]
    found["objects"] = distributed.gather_objects({"rank": rank})
    found["first"] = distributed.on_first(lambda: f"of {distributed.rank()}")
    found["taken"] = torch.arange(6.0).reshape(2, 3).T + rank
    distributed.take_from_first([found["taken"]])
    found["seed"] = distributed.own_seed(7)

    def fail(at: int) -> None:
        if rank == at:
            raise ConfigError(f"{at} cannot")

    found["errors"] = []
    for call in (lambda: distributed.together(lambda: fail(1)), lambda: distributed.on_first(lambda: fail(0))):
        with pytest.raises(ConfigError) as error:
            call()
        found["errors"].append(str(error.value))
    with pytest.raises(ConfigError) as error:
        make(**KINDS["discrete"], seed=rank).train()
    found["errors"].append(str(error.value))
    torch.save(found, out / f"{rank}.pt")


def train(*arguments: str, stop: tuple[int, int, int] | None = None) -> int:
    """The command line; `stop` is a process, a number of updates, and the signal it then gets."""
    step = loop.Session.step

    def step_then_signal(self):
        step(self)
        if self.counters.updates >= stop[1]:
            os.kill(os.getpid(), stop[2])

    if stop and distributed.rank() == stop[0]:
        loop.Session.step = step_then_signal
    try:
        return main(["train", *arguments])
    finally:
        loop.Session.step = step


def run_all() -> None:
    """One of two processes: starting them takes longer than what they do."""
    work(Path())
    stopped = train(*TRAIN, "--logdir=stopped", stop=(1, 17, signal.SIGTERM))
    if distributed.is_first():
        shutil.copytree("stopped", "copy")
    resumed = train("--resume", "--logdir=stopped", "--quiet")
    Path(f"codes-{distributed.rank()}.json").write_text(json.dumps([stopped, resumed]))
    sys.exit(train(*TRAIN, "--checkpoint-every=0", "--logdir=killed", stop=(1, 5, signal.SIGKILL)))


if __name__ == "__main__":
    run_all()


# -- The tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worked(tmp_path_factory) -> tuple[Path, list[str]]:
    """`run_all` in two processes that know of each other as torchrun would tell them: where, and what they printed."""
    out = tmp_path_factory.mktemp("worked")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, __file__], env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, cwd=out,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(WORLD)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL], "\n".join(outputs)
    return out, outputs


@pytest.fixture(scope="module")
def learned(worked) -> list[dict]:
    return [torch.load(worked[0] / f"{rank}.pt") for rank in range(WORLD)]


def metrics(logdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_as_one_with_the_joined_batch(learned, kind, monkeypatch):
    for module in (RSSM, Actor):

        def draw_both(self, steps, count, generator, draw=module.draw_noise):
            # (steps, count) are those of both: sequences, or each state of each sequence, (T·2B)
            parts = [draw(self, steps, count // WORLD, generator=g).unflatten(1, (-1, BATCH)) for g in generator]
            return torch.cat(parts, 2).flatten(1, 2)

        monkeypatch.setattr(module, "draw_noise", draw_both)
    agent = make(**KINDS[kind], batch_size=WORLD * BATCH)
    agent.generators["learn"] = [noise(rank) for rank in range(WORLD)]
    alone = learn(agent, slice(None))
    for what in ("gradients", "weights", "metrics"):
        one, two = (found[kind][what] for found in learned)
        assert one.keys() == two.keys() == alone[what].keys()
        if what != "metrics":  # those are averaged when they are logged
            assert all(torch.equal(one[name], two[name]) for name in one)
        for name, expected in alone[what].items():
            expected, value = expected.double(), one[name].double()
            if what == "metrics":
                value = (value + two[name]) / 2
            # A bias that started at zero may have been moved to and fro: it is compared with what an update moves.
            least = 1e-6 if what != "weights" else SMALL["learning_rate"] * expected.numel() ** 0.5
            error = (value - expected).norm() / expected.norm().clamp(min=least)
            assert error < 1e-5, (what, name, error)


def test_percentiles_are_those_of_all_returns(learned):
    alone = normalized(None)
    for found in learned:
        for name, expected in alone.items():
            torch.testing.assert_close(found["normalized"][name], expected, rtol=1e-6, atol=0)


def test_what_processes_exchange(learned):
    for rank, found in enumerate(learned):
        assert found["mean"].tolist() == [0.5, 5.0]
        assert torch.equal(found["gathered"], torch.arange(6).reshape(2, 3).T + torch.arange(2).reshape(2, 1, 1))
        joined, grad = found["joined"]
        assert joined.tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15]]
        assert torch.equal(grad, torch.arange(12.0).reshape(3, 4)[:, 2 * rank : 2 * rank + 2] * (1 + 2))
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["first"] == "of 0"
        assert torch.equal(found["taken"], torch.arange(6.0).reshape(2, 3).T)
        assert (found["seed"] == 7) == (rank == 0)
        assert found["errors"][:2] == ["1 cannot", "0 cannot"]
        assert "seed: expected the same in all processes" in found["errors"][2]


def test_alone_everything_is_the_identity():
    x = torch.ones(2, requires_grad=True)
    assert (distributed.world_size(), distributed.rank(), distributed.own_seed(3)) == (1, 0, 3)
    assert torch.equal(distributed.mean(x), x) and distributed.gather(x).shape == (1, 2)
    assert distributed.joined(x) is x
    assert distributed.gather_objects(x)[0] is x and distributed.on_first(lambda: 3) == 3
    distributed.join(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError, match="no"):
        distributed.together(lambda: (_ for _ in ()).throw(ConfigError("no")))


def test_a_group_that_cannot_be_joined_says_how_to_start_one(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR.*start them with torchrun"):
        distributed.join(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE: expected a number as torchrun sets it, got 'two'"):
        distributed.world_size()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run from beginning to end, by torchrun and the command line, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]  # fmt: skip
    done = subprocess.run([*launcher, "-m", "phyxdream", "train", *TRAIN, "--logdir=run"], text=True, cwd=folder,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder / "run", done.stdout


def test_torchrun_makes_one_run(whole):
    path, output = whole
    assert output.count("evaluation return:") == output.count("report:") == 1
    assert (path / "report.html").stat().st_size > 0
    run, rows = Run.open(path), metrics(path)
    assert run.versions()[-1]["processes"] == 2 and len(run.evaluations()) == 3
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and 300 <= steps[-1] < 300 + WORLD * SMALL["num_envs"]
    assert rows[-1]["updates"] == int((steps[-1] - 64) * 8 / (WORLD * BATCH * LENGTH))
    found = [checkpoint.load(checkpoint.latest(run), rank) for rank in range(WORLD)]
    replays = [loop.Replay.load(f.replay_path) for f in found]
    stored = [replay.total_added for replay in replays]
    assert stored[0] == stored[1] and sum(stored) >= steps[-1]  # the first step of an episode takes no action
    first, second = ({**f.tensors["generators"], **f.tensors["acting"]} for f in found)
    assert not any(torch.equal(first[name], second[name]) for name in ("learn", "act", "state/deter"))
    firsts = [replay.read(0, 0, 1, ["state"])["state"] for replay in replays]
    assert not torch.equal(*firsts)


def test_stopped_and_resumed_equals_never_stopped(whole, worked):
    folder, outputs = worked
    for rank in range(WORLD):
        codes = json.loads((folder / f"codes-{rank}.json").read_text())
        assert codes == [128 + signal.SIGTERM, 0], "\n".join(outputs)
    assert len(metrics(folder / "copy")) < len(metrics(whole[0]))
    assert metrics(folder / "stopped") == metrics(whole[0])
    ours, theirs = (checkpoint.load_latest(Run.open(p)).tensors["model"] for p in (folder / "stopped", whole[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_number_of_processes_cannot_resume(worked):
    config = DreamerConfig.from_dict(Run.open(worked[0] / "copy").config)
    config.logdir = str(worked[0] / "copy")
    with pytest.raises(CheckpointError, match=r"written by 2 processes.*1 process cannot go on.*start 2 processes"):
        DreamerAgent(config).train(resume=True, quiet=True)


def test_a_process_that_dies_leaves_the_last_checkpoint_whole(worked):
    folder, outputs = worked
    assert "process 0 lost the others" in outputs[0] and "Traceback" not in outputs[0]
    newest = checkpoint.latest(Run.open(folder / "killed"))
    for rank in range(WORLD):
        loop.Replay.load(checkpoint.load(newest, rank).replay_path)
