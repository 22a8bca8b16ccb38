import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phyxdream.errors import CheckpointError
from phyxdream.train import checkpoint
from phyxdream.train.run import Run


class Replay:
    """The least that `save` asks for."""

    def __init__(self, data=b"experience", error=None):
        self.data, self.error = data, error

    def save(self, path):
        os.mkdir(path)
        (Path(path) / "data").write_bytes(self.data)
        if self.error:
            raise self.error


def experience(found):
    return (found.replay_path / "data").read_bytes()


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", {})


def small(step=1):
    return {"model": {"w": torch.full((3, 4), float(step))}, "optimizer": {"m": torch.zeros(2)}}


def names(run):
    return sorted(p.name for p in run.checkpoints.iterdir())


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).tolist() == b.view(-1).tolist()


def test_round_trip(run):
    state = {"updates": 7, "rng": [1 << 100, "PCG64"], "scale": 0.1, "none": None, "infinite": float("inf")}
    path = checkpoint.save(run, 12345, small(), state, Replay())
    assert path == run.checkpoints / "step-000012345" == checkpoint.latest(run)
    back = checkpoint.load(path)
    assert back.step == 12345 and back.state == state and back.path == path
    assert experience(back) == b"experience"
    assert sorted(back.tensors) == ["model", "optimizer"]
    assert torch.equal(back.tensors["model"]["w"], torch.ones(3, 4))


def test_every_kind_of_tensor(run):
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(base.clone())
    tensors = {
        "scalar": torch.tensor(2.5),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(5).half(),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "long": torch.tensor([-(1 << 62)]),
        "byte": torch.get_rng_state(),
        "empty": torch.zeros(0, 3),
        "also_empty": torch.zeros(0),
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "overlapping": base[1:3],
        "whole": base,
        "again": base,
        "parameter": parameter,
        "tied": parameter,
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
        "infinite": torch.tensor([float("-inf")]),
    }
    back = checkpoint.load(checkpoint.save(run, 0, {"all": tensors, "none": {}}, {})).tensors
    assert back["none"] == {}
    assert set(back["all"]) == set(tensors)
    for name, tensor in tensors.items():
        assert same(tensor.detach(), back["all"][name]), name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(sorted(checkpoint._DTYPES, key=str)),
    st.permutations(range(4)),
    st.integers(0, 2**31),
)
def test_any_shape_dtype_and_layout(run, shape, dtype, order, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    tensor = tensor.permute([i for i in order if i < len(shape)])
    back = checkpoint.load(checkpoint.save(run, 1, {"g": {"t": tensor}}, {}))
    assert same(tensor, back.tensors["g"]["t"])


def test_a_view_of_something_huge_is_written_small(run):
    path = checkpoint.save(run, 1, {"g": {"view": torch.zeros(1_000_000)[:10]}}, {})
    assert (path / "g.safetensors").stat().st_size < 1000


def test_older_checkpoints_go_and_keep_keeps(run):
    for step in (10, 20, 30):
        checkpoint.save(run, step, small(step), {}, keep=2)
    assert names(run) == ["step-000000020", "step-000000030"]
    checkpoint.save(run, 40, small(), {})
    assert names(run) == ["step-000000040"]


def test_saving_a_step_twice_keeps_the_second(run):
    for updates in (1, 2, 3):
        path = checkpoint.save(run, 10, small(), {"updates": updates})
    assert checkpoint.latest(run) == path and len(names(run)) == 1
    assert checkpoint.load(path).state == {"updates": 3}


def test_steps_beyond_nine_digits_sort_as_numbers(run):
    for step in (999_999_999, 1_000_000_000, 10_000_000_000):
        checkpoint.save(run, step, small(), {}, keep=3)
    assert [checkpoint.load(p).step for p in checkpoint.available(run)] == [999_999_999, 10**9, 10**10]


def test_checkpoints_of_an_abandoned_history_go(run):
    checkpoint.save(run, 10, small(), {}, keep=9)
    checkpoint.save(run, 99, small(), {}, keep=9)
    newest = checkpoint.save(run, 20, small(), {}, keep=9)
    assert checkpoint.latest(run) == newest
    assert names(run) == ["step-000000010", "step-000000020"]


def test_latest_of_nothing(run):
    assert checkpoint.latest(run) is None
    shutil.rmtree(run.checkpoints)
    assert checkpoint.latest(run) is None


@pytest.mark.parametrize(
    ("step", "tensors", "state", "error", "where"),
    [
        (-1, {}, {}, ValueError, "step"),
        (1.0, {}, {}, ValueError, "step"),
        (1, {"../g": {}}, {}, ValueError, "group"),
        (1, {"g": {"t": 1.0}}, {}, TypeError, r"\['g'\]\['t'\]"),
        (1, {"g": {"t": torch.zeros(1, dtype=torch.complex64)}}, {}, TypeError, "complex64"),
        (1, {"g": {"t": torch.zeros(2).to_sparse()}}, {}, TypeError, "sparse"),
        (1, {"g": {"t": torch.zeros(2, device="meta")}}, {}, TypeError, "meta"),
        (1, {}, {"a": [0, {1: 2}]}, TypeError, r"state\['a'\]\[1\]"),
        (1, {}, {"a": torch.zeros(1)}, TypeError, "Tensor"),
        (1, {}, [], TypeError, "list"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_touched(run, step, tensors, state, error, where):
    checkpoint.save(run, 5, small(), {})
    with pytest.raises(error, match=where):
        checkpoint.save(run, step, tensors, state)
    assert names(run) == ["step-000000005"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("replay: write failed"), CheckpointError("no")],
)
def test_failed_write_keeps_the_old_checkpoint(run, error):
    old = checkpoint.save(run, 5, small(), {"updates": 1})
    with pytest.raises(CheckpointError, match=r"step 1,000.*: replay: .*step-000000005 is untouched") as raised:
        checkpoint.save(run, 1000, small(), {}, Replay(error=error))
    assert (error.args[-1] if isinstance(error, OSError) else str(error)) in str(raised.value)
    assert names(run) == [old.name]
    assert checkpoint.load(checkpoint.latest(run)).state == {"updates": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), AttributeError("a bug")])
def test_interrupts_and_bugs_pass_and_leave_no_trace(run, error):
    with pytest.raises(type(error)):
        checkpoint.save(run, 1, small(), {}, Replay(error=error))
    assert names(run) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize("part", ["tensors", "state", "replay"])
def test_a_file_system_that_takes_no_more(run, part):
    import resource

    checkpoint.save(run, 5, small(), {})
    large = {
        "tensors": ({"g": {"t": torch.zeros(100_000)}}, {}, None),
        "state": ({}, {"long": "x" * 400_000}, None),
        "replay": ({}, {}, Replay(b"x" * 400_000)),
    }[part]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*step-000000005 is untouched"):
            checkpoint.save(run, 6, *large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(run) == ["step-000000005"]
    checkpoint.load(checkpoint.latest(run))


def test_first_checkpoint_failing_says_there_is_none(run):
    with pytest.raises(CheckpointError, match="no earlier checkpoint"):
        checkpoint.save(run, 1, {}, {}, Replay(error=OSError(errno.ENOSPC, "No space left on device")))


class _Killed(BaseException):
    pass


def killed_at(line, save):
    """Runs `save` up to its `line`-th line in checkpoint.py and no clean-up after it; True if it got that far."""
    killed = False
    remove = shutil.rmtree

    def trace(frame, event, argument):
        nonlocal line, killed
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            line -= 1
            if line < 0:
                killed = True
                sys.settrace(None)
                raise _Killed
        return trace

    shutil.rmtree = lambda *args, **kwargs: None if killed else remove(*args, **kwargs)
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        save()
    except _Killed:
        pass
    finally:
        sys.settrace(previous)
        shutil.rmtree = remove
    return killed


def test_killed_anywhere_in_save(run):
    line, killed = 0, True
    while killed:
        old, new = 2 * line + 1, 2 * line + 2
        checkpoint.save(run, old, small(old), {"step": old}, Replay(str(old).encode()))
        assert names(run) == [f"step-{old:09d}"]  # what the kill before left is gone
        killed = killed_at(
            line, lambda new=new: checkpoint.save(run, new, small(new), {"step": new}, Replay(str(new).encode()))
        )
        back = checkpoint.load(checkpoint.latest(run))
        assert back.step in (old, new) if killed else back.step == new
        assert back.step == back.state["step"] == int(experience(back)) == back.tensors["model"]["w"][0, 0]
        line += 2
    assert line > 100


_ENDLESS = """
import sys, torch
from pathlib import Path
from phyxdream.train import checkpoint
from phyxdream.train.run import Run
class Replay:
    def save(self, path):
        Path(path).mkdir()
        (Path(path) / "data").write_bytes(str(step).encode() * 100_000)
run = Run.create(sys.argv[1], {}, resume=True)
last = checkpoint.latest(run)
step = checkpoint.load(last).step if last else 0
while True:
    step += 1
    tensors = {"model": {"w": torch.full((100_000,), float(step))}}
    checkpoint.save(run, step, tensors, {"step": step}, Replay())
    print(step, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_sigkill_while_saving(tmp_path):
    path = Run.create(tmp_path / "run", {}).path  # and the lock is free again
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    rng = random.Random(0)
    reached = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", _ENDLESS, str(path)], stdout=subprocess.PIPE, env=environ)
        assert int(process.stdout.readline()) > reached
        time.sleep(rng.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        printed = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        back = checkpoint.load(checkpoint.latest(Run.open(path)))
        assert back.step >= max([reached, *map(int, printed)])
        assert (back.tensors["model"]["w"] == back.step).all() and back.state == {"step": back.step}
        assert experience(back) == str(back.step).encode() * 100_000
        reached = back.step
    run = Run.create(path, {}, resume=True)
    checkpoint.save(run, reached + 1, small(), {})
    assert names(run) == [f"step-{reached + 1:09d}"]


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "longer"])
def test_damaged_files_are_named(run, file, damage):
    path = checkpoint.save(run, 1, small(), {"updates": 1}, Replay())
    data = (path / file).read_bytes()
    if damage == "missing":
        (path / file).unlink()
    else:
        (path / file).write_bytes({"truncated": data[:-1], "emptied": b"", "longer": data + b"x"}[damage])
    with pytest.raises(CheckpointError, match="manifest" if file == "manifest.json" else file):
        checkpoint.load(path)


@pytest.mark.parametrize("damage", ["missing", "a file"])
def test_a_missing_replay_is_named(run, damage):
    path = checkpoint.save(run, 1, small(), {}, Replay())
    shutil.rmtree(path / "replay")
    if damage == "a file":
        (path / "replay").write_bytes(b"experience")
    with pytest.raises(CheckpointError, match=r"replay is missing"):
        checkpoint.load(path)
    assert checkpoint.load(checkpoint.save(run, 2, small(), {})).replay_path is None


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_is_found_anywhere(run, file):
    path = checkpoint.save(run, 1, small(), {"updates": 1})
    good = (path / file).read_bytes()
    for position in range(0, len(good), max(1, len(good) // 60)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (path / file).write_bytes(bad)
        if file == "manifest.json" and _equal_json(good, bad):
            continue  # white space
        with pytest.raises(CheckpointError, match=file):
            checkpoint.load(path)
    (path / file).write_bytes(good)
    checkpoint.load(path)


def _equal_json(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_foreign_and_newer_formats(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nothing")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(CheckpointError, match="not a phyxdream checkpoint"):
        checkpoint.load(foreign)
    for text, message in (
        ('{"format": "other"}', "got 'other'"),
        ("[]", "JSON object"),
        ("\0", "JSON"),
        (json.dumps({"format": checkpoint.FORMAT, "version": 3}), "up to 2: upgrade"),
    ):
        (foreign / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(foreign)


def test_nothing_is_pickled(run):
    path = checkpoint.save(run, 1, small(), {})
    for file in path.iterdir():
        assert file.suffix in (".safetensors", ".json")
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
