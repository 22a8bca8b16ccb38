"""The loop as a user meets it: trains, stops, resumes; what a kill leaves; what bad environments and disks do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.errors import CheckpointError, ConfigError, EnvError
from phyxdream.train import checkpoint, loop
from phyxdream.train.run import Run

WORKER = """
import json, sys
from phyxdream.agents import DreamerAgent, DreamerConfig
from phyxdream.train.loop import Session
stop = json.loads(sys.argv[2])
if stop is not None:  # a signal at an exact step, whatever the machine's speed
    import os, signal
    step = Session.step
    def step_then_signal(self):
        step(self)
        if self.counters.updates >= stop["updates"]:
            os.kill(os.getpid(), stop["signal"])
    Session.step = step_then_signal
agent = DreamerAgent(DreamerConfig.from_dict(json.loads(sys.argv[1])))
result = agent.train(resume=sys.argv[3] == "resume", quiet=True)
sys.exit(0 if result.signal is None else 128 + result.signal)
"""


def run_worker(config: DreamerConfig, stop: dict | None = None, resume: bool = False) -> int:
    arguments = [json.dumps(config.to_dict()), json.dumps(stop), "resume" if resume else "new"]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True, timeout=240,
                          cwd=Path(config.logdir).parent)  # fmt: skip
    assert done.returncode <= 0 or done.returncode >= 128, done.stderr
    return done.returncode


def metrics(logdir) -> list[dict]:
    rows = [json.loads(line) for line in (Path(logdir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def weights(logdir) -> dict:
    return checkpoint.load(checkpoint.latest(Run.open(logdir))).tensors["model"]


def test_train_leaves_a_run_that_explains_itself(tiny):
    result = DreamerAgent(tiny).train(quiet=True)
    assert result.steps >= tiny.total_steps and result.signal is None
    assert len(result.evaluation.returns) == 3
    path = result.run.path
    for name in ("config.json", "versions.json", "metrics.jsonl", "eval.json", "report.html", "README.txt"):
        assert (path / name).stat().st_size > 0, name
    rows = metrics(path)
    assert rows[-1]["updates"] == int((result.steps - tiny.prefill) * tiny.train_ratio / 32)
    assert all(np.isfinite(row["loss/total"]) for row in rows if "loss/total" in row)
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    loaded, _ = loop.load_agent(Run.open(path))
    assert loaded.config == DreamerConfig.from_dict(json.loads((path / "config.json").read_text()))


def test_same_seed_same_run(tiny, tmp_path):
    tiny.total_steps = 200
    DreamerAgent(tiny).train(quiet=True)
    first = metrics(tiny.logdir)
    tiny.logdir = str(tmp_path / "again")
    DreamerAgent(tiny).train(quiet=True)
    assert metrics(tiny.logdir) == first
    tiny.logdir, tiny.seed = str(tmp_path / "other"), 1
    DreamerAgent(tiny).train(quiet=True)
    assert metrics(tiny.logdir) != first


@pytest.mark.parametrize(
    ("env", "number"),
    [("gym:CartPole-v1", signal.SIGTERM), ("gym:CartPole-v1", signal.SIGINT), ("envpool:Catch-v0", signal.SIGTERM)],
)
def test_stopped_and_resumed_equals_never_stopped(tiny, tmp_path, env, number):
    if env.startswith("envpool"):
        pytest.importorskip("envpool")
    tiny.env = env
    assert run_worker(tiny) == 0
    whole, final = metrics(tiny.logdir), weights(tiny.logdir)
    tiny.logdir = str(tmp_path / "stopped")
    # 37 updates is in the middle of a window of metrics
    assert run_worker(tiny, stop={"updates": 37, "signal": int(number)}) == 128 + number
    assert len(metrics(tiny.logdir)) < len(whole)
    assert run_worker(tiny, resume=True) == 0
    assert metrics(tiny.logdir) == whole
    resumed = weights(tiny.logdir)
    assert all((resumed[name] == final[name]).all() for name in final)


def test_kill_9_continues_from_the_last_checkpoint(tiny):
    tiny.checkpoint_every = 0.0  # after every step
    assert run_worker(tiny, stop={"updates": 37, "signal": int(signal.SIGKILL)}) == -signal.SIGKILL
    saved = checkpoint.latest(Run.open(tiny.logdir))
    at = checkpoint.load(saved).step
    assert 0 < at < tiny.total_steps
    tiny.checkpoint_every = 300.0
    assert run_worker(tiny, resume=True) == 0
    rows = metrics(tiny.logdir)
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] >= tiny.total_steps


def test_a_real_sigterm_to_the_command_line_saves_and_says_how_to_continue(tiny):
    tiny.total_steps = 1_000_000
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    script = "import sys; from phyxdream.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--env", tiny.env, "--num-envs", "2", "--size", "1m", "--deter-size", "16", "--units", "8",
               "--hidden-size", "8", "--batch-size", "4", "--batch-length", "8", "--total-steps", "1000000",
               "--logdir", tiny.logdir]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script, "train", "dreamer_v3", *options], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                               cwd=Path(tiny.logdir).parent)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (Path(tiny.logdir) / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "--resume" in output and "SIGTERM" in output
    assert checkpoint.latest(Run.open(tiny.logdir)) is not None


def test_resume_without_exact_environments_starts_new_episodes(tiny):
    tiny.resume_replay_seconds = 0.0
    assert run_worker(tiny, stop={"updates": 37, "signal": int(signal.SIGTERM)}) == 128 + signal.SIGTERM
    assert run_worker(tiny, resume=True) == 0
    assert metrics(tiny.logdir)[-1]["step"] >= tiny.total_steps


def test_an_existing_run_is_not_overwritten(tiny):
    tiny.total_steps = 20
    DreamerAgent(tiny).train(quiet=True)
    before = metrics(tiny.logdir)
    with pytest.raises(ConfigError, match="resume"):
        DreamerAgent(tiny).train(quiet=True)
    assert metrics(tiny.logdir) == before


def test_weights_load_from_a_run_and_from_a_checkpoint(tiny, tmp_path):
    empty = Run.create(tmp_path / "empty", tiny.to_dict())
    with pytest.raises(CheckpointError, match="no checkpoint was written yet"):
        DreamerAgent(tiny).load(empty.path)
    tiny.total_steps = 100
    run = DreamerAgent(tiny).train(quiet=True).run
    saved = weights(run.path)
    for path in (run.path, checkpoint.latest(run)):
        loaded = DreamerAgent(tiny).load(path).model.state_dict()
        assert all((loaded[name] == saved[name]).all() for name in saved)


def test_a_longer_total_resumes_a_finished_run(tiny):
    tiny.total_steps = 100
    DreamerAgent(tiny).train(quiet=True)
    tiny.total_steps = 150
    result = DreamerAgent(tiny).train(resume=True, quiet=True)
    assert result.steps >= 150


def test_checkpoint_of_another_architecture_is_refused(tiny):
    tiny.total_steps = 20
    DreamerAgent(tiny).train(quiet=True)
    tiny.deter_size = 32
    with pytest.raises(CheckpointError, match="weights do not fit"):
        DreamerAgent(tiny).train(resume=True, quiet=True)


def test_nan_reward_stops_with_the_environment_named_and_the_checkpoint_intact(tiny, monkeypatch):
    import gymnasium

    tiny.total_steps = 100
    DreamerAgent(tiny).train(quiet=True)
    saved = checkpoint.latest(Run.open(tiny.logdir))
    step = gymnasium.envs.classic_control.CartPoleEnv.step

    def broken(self, action):
        observation, _, *rest = step(self, action)
        return observation, float("nan"), *rest

    monkeypatch.setattr(gymnasium.envs.classic_control.CartPoleEnv, "step", broken)
    tiny.total_steps = 200
    tiny.resume_replay_seconds = 0.0
    with pytest.raises(EnvError, match=r"reward.*nan"):
        DreamerAgent(tiny).train(resume=True, quiet=True)
    checkpoint.load(saved)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tiny, monkeypatch):
    tiny.total_steps = 60
    DreamerAgent(tiny).train(quiet=True)
    saved = checkpoint.latest(Run.open(tiny.logdir))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    tiny.total_steps = 120
    with pytest.raises(CheckpointError, match="No space left"):
        DreamerAgent(tiny).train(resume=True, quiet=True)
    assert checkpoint.latest(Run.open(tiny.logdir)) == saved
    checkpoint.load(saved)


def test_the_loss_becoming_nan_is_said_at_once(tiny, monkeypatch):
    update = DreamerAgent.update

    def poisoned(self, batch):
        metrics = update(self, batch)
        return {**metrics, "loss/total": metrics["loss/total"] * float("nan")}

    monkeypatch.setattr(DreamerAgent, "update", poisoned)
    with pytest.raises(FloatingPointError, match="update 0"):
        DreamerAgent(tiny).train(quiet=True)
