"""The loop as a user meets it: trains, stops, resumes; what a kill leaves; what bad environments and disks do; and
what passes between agent and replay."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from phyxdream import Replay
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
    ("env", "number", "options"),
    [
        ("gym:CartPole-v1", signal.SIGTERM, {}),
        ("gym:CartPole-v1", signal.SIGINT, dict(replay_selector="curious", replay_context=3, classes=0)),
        ("envpool:Catch-v0", signal.SIGTERM, dict(replay_selector="prioritized", replay_capacity=100)),
        (
            "envpool:Catch-v0",
            signal.SIGTERM,
            dict(
                slot_mode="per_slot",
                slot_initial="gaussian",
                slots=2,
                slot_size=8,
                slot_layers=1,
                slot_message_size=8,
                total_steps=260,
            ),
        ),
    ],
)
def test_stopped_and_resumed_equals_never_stopped(tiny, tmp_path, env, number, options):
    if env.startswith("envpool"):
        pytest.importorskip("envpool")
    tiny = replace(tiny, env=env, **options)
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
        result = update(self, batch)
        result.metrics["loss/total"] *= float("nan")
        return result

    monkeypatch.setattr(DreamerAgent, "update", poisoned)
    with pytest.raises(FloatingPointError, match="update 0"):
        DreamerAgent(tiny).train(quiet=True)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_replay_is_refused(tiny, damage):
    tiny.total_steps = 20
    saved = checkpoint.latest(DreamerAgent(tiny).train(quiet=True).run)
    files = [path for path in sorted((saved / "replay").rglob("*")) if path.is_file()]
    assert files
    tiny.total_steps = 40
    for file in files:
        data = file.read_bytes()
        file.unlink()
        if damage == "truncated":
            file.write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match=f"{saved.name}/replay"):
            DreamerAgent(tiny).train(resume=True, quiet=True)
        file.write_bytes(data)
    assert DreamerAgent(tiny).train(resume=True, quiet=True).steps >= 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(units=16), "weights do not fit"),
        (dict(deter_size=32), r"its replay has latents .*\(16,\).* asks for .*\(32,\)"),
        (dict(replay_context=0), "its replay has latents"),
        (dict(replay_selector="recency"), "its replay has selector"),
        (dict(num_envs=3), "its replay has num_envs 2, this configuration asks for 3"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(tiny, options, message):
    tiny.total_steps = 20
    DreamerAgent(tiny).train(quiet=True)
    with pytest.raises(CheckpointError, match=message):
        DreamerAgent(replace(tiny, total_steps=40, **options)).train(resume=True, quiet=True)


# -- Between agent and replay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(replay_selector="uniform", replay_context=0),
        dict(replay_selector="recency", replay_context=3),
        dict(replay_selector="prioritized", classes=0),
        dict(replay_selector="curious", replay_context=0),
        dict(replay_selector="curious", replay_context=3, classes=0, replay_prefetch=2),
        dict(replay_online=False, replay_prefetch=1, initial="learned"),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_way_to_replay_trains(tiny, monkeypatch, options):
    """And the replay is told what it asked for: latents with a context, losses when they choose."""
    pytest.importorskip("envpool")
    told = {"update": 0, "prioritize": 0}
    for name, method in {"update": Replay.update, "prioritize": Replay.prioritize}.items():

        def count(self, step_id, *args, name=name, method=method, **kwargs):
            assert step_id.shape == (tiny.batch_length, tiny.batch_size)
            told[name] += 1
            return method(self, step_id, *args, **kwargs)

        monkeypatch.setattr(Replay, name, count)
    tiny = replace(tiny, env="envpool:Catch-v0", total_steps=100, **options)
    result = DreamerAgent(tiny).train(quiet=True)
    updates = metrics(result.run.path)[-1]["updates"]
    assert updates == int((result.steps - tiny.prefill) * tiny.train_ratio / 32) > 10
    assert told["update"] == (updates if tiny.replay_context else 0)
    assert told["prioritize"] == (updates if tiny.replay_selector in ("prioritized", "curious") else 0)


@pytest.fixture
def session(tiny, request):
    """A run in progress whose weights do not move, and whose updates are ours to ask for."""
    options = getattr(request, "param", {})
    tiny = replace(tiny, prefill=10**9, learning_rate=1e-30, device="cpu", **options)
    session = loop.Session(DreamerAgent(tiny))
    yield session
    session.close()


def stored(session, *names) -> dict[int, torch.Tensor]:
    """Every stored step's values, by its id."""
    batch = session.replay.sample(50 * len(session.replay), 1)
    values = torch.cat([batch[name].flatten(2).float() for name in names], -1)[0]
    stored = dict(zip(batch["step_id"][0].tolist(), values, strict=True))
    assert len(stored) == len(session.replay)
    return stored


LATENTS = pytest.mark.parametrize("session", [{}, dict(classes=0)], ids=["categorical", "gaussian"], indirect=True)


@LATENTS
def test_a_sequence_goes_on_from_the_state_that_acted(session):
    acted = {}
    for t in range(40):
        session.step()
        for i in range(2):
            acted[i << 40 | t] = session.carry.state[i]
    assert len(session.replay) == session.replay.total_added == 80
    batch = session.replay.sample(64, 9)
    rest, state = session.agent.model.world_model.replay_context(batch)
    assert torch.equal(rest["step_id"], batch["step_id"][1:])
    for b, step in enumerate(batch["step_id"][0].tolist()):
        torch.testing.assert_close(state.deter[b], acted[step].deter, rtol=2**-8, atol=0)
        torch.testing.assert_close(state.stoch[b], acted[step].stoch, rtol=2**-8, atol=0)


@LATENTS
def test_an_update_stores_its_posterior(session, monkeypatch):
    """Of exactly the steps learned from, and the next sequence goes on from there."""
    for _ in range(40):
        session.step()
    before = stored(session, "deter", "stoch")
    seen = []
    update = DreamerAgent.update

    def spy(self, batch):
        result = update(self, batch)
        seen.append((batch["step_id"].clone(), result.latents))
        return result

    monkeypatch.setattr(DreamerAgent, "update", spy)
    session.update()
    (step_id, latents), after = seen[0], stored(session, "deter", "stoch")
    written = torch.cat([latents["deter"], latents["stoch"]], -1).float()
    expected = {}
    for step, value in zip(step_id[1:].flatten().tolist(), written.flatten(0, 1), strict=True):
        expected[step] = value
    # Online sequences of one environment follow each other without overlap: no step comes twice.
    assert len(expected) == written[..., 0].numel()
    for step, value in after.items():
        assert torch.equal(value, expected.get(step, before[step]))
    assert sum(not torch.equal(after[step], before[step]) for step in expected) > len(expected) // 2


def test_latents_of_steps_that_made_room_are_dropped(session):
    while len(session.replay) < session.replay.capacity:
        session.step()
    batch = {name: value.clone() for name, value in next(session.loader).items()}
    for _ in range(session.replay.capacity // 2):
        session.step()
    before = stored(session, "deter", "stoch")
    update = session.agent.update(batch)
    assert session.replay.update(batch["step_id"][1:], **update.latents) == 0
    after = stored(session, "deter", "stoch")
    assert all(torch.equal(after[step], value) for step, value in before.items())


def test_a_checkpoint_without_a_replay_cannot_be_continued(session, tmp_path):
    path = checkpoint.save(Run.create(tmp_path / "run", {}), 1, session.agent.tensors(), {})
    with pytest.raises(CheckpointError, match="no replay"):
        session.restore(path)


def test_a_checkpoint_after_a_failed_one_is_whole(session, tmp_path, monkeypatch):
    """The files of the replay that the failed one had written are gone with it."""
    session.run = Run.create(tmp_path / "run", {})
    for _ in range(20):
        session.step()
    session.save()
    for _ in range(20):
        session.step()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digest", lambda manifest: 1 / 0)  # after the replay
        with pytest.raises(ZeroDivisionError):
            session.save()
    for _ in range(5):
        session.step()
    back = Replay.load(checkpoint.load(session.save()).replay_path)
    batch, same = session.replay.sample(30, 9), back.sample(30, 9)
    assert len(back) == len(session.replay) == 90
    assert all(torch.equal(same[name], value) for name, value in batch.items())


def test_an_episode_left_at_a_restart_ends_in_what_is_replayed(tiny, tmp_path):
    tiny = replace(tiny, prefill=10**9, resume_replay_seconds=0.0)
    first, second = loop.Session(DreamerAgent(tiny)), loop.Session(DreamerAgent(tiny))
    first.run = Run.create(tmp_path / "run", {})
    for _ in range(6):  # no pole falls that fast
        first.step()
    path = first.save()
    first.close()
    assert "new episodes" in second.restore(path)
    for _ in range(3):
        second.step()
    batch = second.replay.sample(20, 9)
    second.close()
    expected = torch.arange(9)[:, None].expand(9, 20)
    assert torch.equal(batch["is_first"], (expected == 0) | (expected == 6))
    assert torch.equal(batch["is_last"], expected == 5)
    assert not batch["is_terminal"].any()
