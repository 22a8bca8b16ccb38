"""sheeprl's buffer interface over our replay: against a plain model, and against sheeprl where it is installed."""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
import shutil
import sys
import types
from importlib import import_module

import numpy as np
import pytest
import torch


def find_sheeprl():
    """sheeprl's buffers and checkpoint callback, or None. Its package imports all of its algorithms: these two will do
    where something that those need is missing."""
    if importlib.util.find_spec("sheeprl") is None:
        return None
    try:
        import_module("sheeprl")
    except Exception:
        spec = importlib.util.find_spec("sheeprl")
        package = types.ModuleType("sheeprl")
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules["sheeprl"] = package
    try:
        return import_module("sheeprl.data.buffers"), import_module("sheeprl.utils.callback")
    except ImportError:
        return None


SHEEPRL = find_sheeprl()  # before our module, which asks for it when it is imported
needs_sheeprl = pytest.mark.skipif(SHEEPRL is None, reason="sheeprl is not installed")

from phyxdream.compat.sheeprl_replay import SheeprlReplay  # noqa: E402

KEYS = {
    "rgb": ((3, 4, 4), np.uint8),
    "hwc": ((4, 4, 3), np.uint8),
    "state": ((5,), np.float32),
    "actions": ((2,), np.float32),
    "rewards": ((1,), np.float64),
    "terminated": ((1,), np.float64),
    "truncated": ((1,), np.float64),
    "is_first": ((1,), np.float64),
    "is_last": ((1,), np.bool_),
    "reward": ((), np.float32),
    "count": ((1,), np.int64),
}


def make_rows(rng, steps, envs):
    rows = {}
    for key, (shape, dtype) in KEYS.items():
        size = (steps, envs, *shape)
        rows[key] = rng.integers(0, 256, size).astype(dtype) if dtype is np.uint8 else rng.normal(size=size)
        rows[key] = (rows[key] > 0) if dtype is np.bool_ else rows[key].astype(dtype)
    rows["count"] = rng.integers(-(2**62), 2**62, (steps, envs, 1))  # tells rows apart
    rows["rewards"][rng.random((steps, envs, 1)) < 0.1] = np.nan
    rows["reward"][rng.random((steps, envs)) < 0.1] = np.inf
    return rows


class Model:
    """The latest rows of every environment, as lists of dicts."""

    def __init__(self, buffer_size, n_envs):
        self.buffer_size, self.envs = buffer_size, [[] for _ in range(n_envs)]

    def add(self, rows, indices=None):
        for column, env in enumerate(range(len(self.envs)) if indices is None else indices):
            for t in range(len(rows["count"])):
                self.envs[env].append({key: value[t, column].copy() for key, value in rows.items()})
            del self.envs[env][: -self.buffer_size]

    def place(self):
        return {int(row["count"][0]): (e, i) for e, env in enumerate(self.envs) for i, row in enumerate(env)}

    def check(self, batch, n_samples, length, batch_size):
        """Every sequence of the batch was added in one piece, bit for bit; returns where they begin."""
        place, starts = self.place(), []
        assert set(batch) == set(KEYS)
        for key, (shape, dtype) in KEYS.items():
            assert batch[key].shape == (n_samples, length, batch_size, *shape)
            assert batch[key].dtype == dtype
        for n in range(n_samples):
            for b in range(batch_size):
                env, first = place[int(batch["count"][n, 0, b, 0])]
                starts.append((env, first))
                for t in range(length):
                    row = self.envs[env][first + t]
                    assert all(np.array_equal(batch[k][n, t, b], row[k], equal_nan=k[:6] == "reward") for k in KEYS)
        return starts


def random_adds(rng, steps=40, envs=3, most=4):
    """Rows of some environments each, in any order."""
    yield make_rows(rng, 1, envs), None
    for _ in range(steps):
        indices = rng.permutation(envs)[: rng.integers(1, envs + 1)].tolist()
        if rng.random() < 0.3:
            yield make_rows(rng, int(rng.integers(0, most)), envs), None
        else:
            yield make_rows(rng, int(rng.integers(1, most)), len(indices)), indices


@pytest.mark.parametrize("seed", range(5))
def test_sequences_are_what_was_added(seed):
    rng = np.random.default_rng(seed)
    buffer_size = int(rng.integers(3, 25))
    rb, model = SheeprlReplay(buffer_size, 3, seed=seed), Model(buffer_size, 3)
    for rows, indices in random_adds(rng):
        rb.add(rows, indices, validate_args=bool(rng.integers(2)))
        model.add(rows, indices)
        longest = max(map(len, model.envs))
        length, n, b = (int(rng.integers(1, high + 1)) for high in (longest, 3, 4))
        model.check(rb.sample(b, sequence_length=length, n_samples=n), n, length, b)
        assert rb.full == tuple(len(env) == buffer_size for env in model.envs)
        assert rb.empty == tuple(not env for env in model.envs)
        with pytest.raises(ValueError, match="sequence_length: got"):
            rb.sample(1, sequence_length=longest + 1)
    assert any(rb.full) and len(rb) == rb.buffer_size == buffer_size and rb.n_envs == 3


def test_tensors_are_the_arrays():
    rows = make_rows(np.random.default_rng(0), 30, 2)
    first, second = SheeprlReplay(20, 2, seed=3), SheeprlReplay(20, 2, seed=3)
    first.add(rows), second.add(rows)
    arrays = first.sample(4, sequence_length=5, n_samples=2)
    tensors = second.sample_tensors(4, sequence_length=5, n_samples=2, dtype=None, device="cpu", from_numpy=True)
    for key, value in tensors.items():
        assert np.array_equal(value.numpy(), arrays[key], equal_nan=value.is_floating_point())
    floats = second.sample_tensors(4, sequence_length=5, dtype=torch.float32)
    assert {value.dtype for value in floats.values()} == {torch.float32}
    before = floats["state"].clone()
    second.add(make_rows(np.random.default_rng(1), 20, 2))
    assert torch.equal(floats["state"], before)


def test_every_start_is_equally_likely():
    rb, model = SheeprlReplay(10, 2, seed=1), Model(10, 2)
    rng = np.random.default_rng(0)
    for rows, indices in ((make_rows(rng, 13, 2), None), (make_rows(rng, 4, 1), [1])):
        rb.add(rows, indices), model.add(rows, indices)
    starts = model.check(rb.sample(600, sequence_length=4, n_samples=4), 4, 4, 600)
    counts = np.unique([env * 10 + first for env, first in starts], return_counts=True)[1]
    assert len(counts) == 14
    expected = 2400 / 14
    assert ((counts - expected) ** 2 / expected).sum() < 34.5  # chi-square with 13 degrees, p = 0.001


def test_later_dtypes_are_cast_as_an_assignment_would():
    rb = SheeprlReplay(4)
    rb.add({"flag": np.zeros((1, 1, 1)), "byte": np.zeros((1, 1), np.uint8)})
    rb.add({"flag": np.ones((1, 1, 1), bool), "byte": np.full((1, 1), 7.9)})
    assert rb.buffer[0]["flag"][1] == np.array([[1.0]]) and rb.buffer[0]["flag"][1].dtype == np.float64
    assert rb.buffer[0]["byte"][1] == 7 and rb.buffer[0]["byte"][1].dtype == np.uint8


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex64, torch.float16, torch.int16, torch.uint16, torch.bool]
)
def test_dtypes_keep_their_bits(dtype):
    bits = np.random.default_rng(0).integers(0, 256, (6, 1, 2 * dtype.itemsize), np.uint8)
    if dtype == torch.bool:
        bits &= 1
    values = bits.view(torch.empty(0, dtype=dtype).numpy().dtype)
    rb = SheeprlReplay(6)
    rb.add({"x": values})
    got = rb.sample_tensors(1, sequence_length=6)["x"]
    assert got.dtype == dtype and got.shape == (1, 6, 1, 2)
    assert got[0].numpy().tobytes() == values.tobytes()


def test_latest_row_can_be_read_and_overwritten():
    rng = np.random.default_rng(0)
    rb, model = SheeprlReplay(5, 2), Model(5, 2)
    for rows in (make_rows(rng, 3, 2), make_rows(rng, 4, 2)):
        rb.add(rows), model.add(rows)
    one = rb.buffer[1]
    assert one._pos == 7 % 5 and one.buffer_size == 5 and one.full and not one.empty
    for back in range(1, 6):
        row = (one._pos - back) % 5
        for key in KEYS:
            assert np.array_equal(one[key][row], model.envs[1][-back][key][None], equal_nan=True)
            assert np.array_equal(one[key][row, :], one[key][row], equal_nan=True)
    last = (one._pos - 1) % 5
    kept = one["truncated"][last, :].copy()
    one["truncated"][last, :] = 1
    one["terminated"][last] = np.full_like(one["terminated"][last], 7)
    one["reward"][last] = 5
    model.envs[1][-1]["reward"] = np.float32(5)
    model.envs[1][-1]["truncated"][:], model.envs[1][-1]["terminated"][:] = 1, 7
    model.check(rb.sample(30, sequence_length=5), 1, 5, 30)
    one["truncated"][last, :] = kept
    assert np.array_equal(one["truncated"][last], kept)
    with pytest.raises(KeyError, match="done"):
        one["done"]
    with pytest.raises(IndexError, match="row: got 5"):
        one["count"][5]
    with pytest.raises(TypeError, match="row: got"):
        one["count"][:]
    with pytest.raises(IndexError, match="row: got 3"):
        short = SheeprlReplay(5)
        short.add(make_rows(rng, 3, 1))
        short.buffer[0]["count"][3]


@pytest.mark.parametrize("memmap", [False, True])
def test_pickled_it_goes_on(tmp_path, memmap):
    rng = np.random.default_rng(0)
    rb, model = SheeprlReplay(9, 2, memmap=memmap, memmap_dir=tmp_path / "a" / "b"), Model(9, 2)
    assert rb.is_memmap == (memmap, memmap)
    assert pickle.loads(pickle.dumps(rb)).empty == (True, True)
    rows = make_rows(rng, 5, 2)
    rb.add(rows), model.add(rows)
    for _ in range(3):
        file = io.BytesIO()
        torch.save({"rb": rb}, file)
        assert not list(tmp_path.rglob("replay*"))  # nothing is left behind
        if memmap:
            shutil.rmtree(tmp_path / "a")  # as on another machine
        file.seek(0)
        other = torch.load(file, weights_only=False)["rb"]
        rows = make_rows(rng, 3, 1)
        for buffer in (rb, other):
            buffer.add(rows, [1])
        model.add(rows, [1])
        assert [b._pos for b in other.buffer] == [b._pos for b in rb.buffer] and other.full == rb.full
        batches = [buffer.sample(6, sequence_length=4) for buffer in (rb, other)]
        model.check(batches[1], 1, 4, 6)
        assert np.array_equal(batches[0]["count"], batches[1]["count"])
        rb = other


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (dict(buffer_size=0), "buffer_size: got 0"),
        (dict(buffer_size=1.5), "buffer_size: got 1.5"),
        (dict(buffer_size=4, n_envs=0), "n_envs: got 0"),
        (dict(buffer_size=4, seed=-1), "seed: got -1"),
        (dict(buffer_size=4, memmap=True), "memmap_dir: got None"),
        (dict(buffer_size=4, buffer_cls=dict), "buffer_cls: got <class 'dict'>"),
    ],
)
def test_bad_constructor_arguments(arguments, error):
    with pytest.raises((ValueError, TypeError), match=re.escape(error)):
        SheeprlReplay(**arguments)


def step(**changes):
    return {"x": np.zeros((1, 2, 3), np.float32), "y": np.zeros((1, 2, 1))} | changes


@pytest.mark.parametrize(
    ("data", "indices", "error"),
    [
        ([1], None, "data: got list"),
        ({}, None, "data: got no keys"),
        ({3: np.zeros((1, 2))}, None, "data: got the keys [3], expected strings"),
        (step(y=np.zeros(2)), None, "data: 'y' has shape (2,), expected (1, 2, ...)"),
        (step(y=np.zeros((2, 2, 1))), None, "data: 'y' has shape (2, 2, 1), expected (1, 2, ...)"),
        (step(y=np.zeros((1, 2))), None, "data: 'y' has shape (1, 2), expected (1, 2, 1)"),
        (step(z=np.zeros((1, 2, 1))), None, "data: unknown key 'z'"),
        ({"x": np.zeros((1, 2, 3))}, None, "data: no 'y'; expected the keys x, y"),
        (step(y=np.full((1, 2, 1), "a")), None, "data: 'y' has dtype <U1, expected float64"),
        (step(), [0], "indices: got [0], expected 2 integers"),
        (step(), [0, 3], "indices: got [0, 3], expected environments from 0 to 2"),
        (step(), [0, -1], "indices: got [0, -1], expected environments from 0 to 2"),
        (step(), [1, 1], "indices: got [1, 1], expected each environment at most once"),
        (step(), [0.5, 1], "indices: got [0.5, 1]"),
        (step(), None, "indices: got None, which is 3 environments, expected 2"),
    ],
)
def test_bad_rows_change_nothing(data, indices, error):
    rb = SheeprlReplay(4, 3)
    rb.add(step(), [0, 2])
    with pytest.raises((ValueError, TypeError), match=re.escape(error)):
        rb.add(data, [0, 1] if indices is None and "indices" not in error else indices)
    assert [env._pos for env in rb.buffer] == [1, 0, 1]


def test_a_first_row_that_cannot_be_stored_fixes_nothing():
    rb = SheeprlReplay(4)
    with pytest.raises(TypeError, match="'x' has dtype complex128"):
        rb.add({"x": np.zeros((1, 1), np.complex128)})
    rb.add({"y": np.zeros((1, 1))})
    assert set(rb.sample(1)) == {"y"}


def test_bad_samples():
    rb = SheeprlReplay(4, 2)
    with pytest.raises(ValueError, match="sequence_length: got 1, expected at most 0"):
        rb.sample(1)
    rb.add(make_rows(np.random.default_rng(0), 3, 1), [0])
    with pytest.raises(ValueError, match="sequence_length: got 4, expected at most 3"):
        rb.sample_tensors(1, sequence_length=4)
    for arguments in (dict(batch_size=0), dict(batch_size=1, n_samples=0), dict(batch_size=1, sequence_length=0)):
        with pytest.raises(ValueError, match=f"{list(arguments)[-1]}: got 0"):
            rb.sample_tensors(**arguments)
    assert set(rb.sample(5)) == set(KEYS)


# ------------------------------------------------------------------------------------------------------ against sheeprl


def both(buffer_size, n_envs):
    real = SHEEPRL[0].EnvIndependentReplayBuffer(buffer_size, n_envs, buffer_cls=SHEEPRL[0].SequentialReplayBuffer)
    ours = SheeprlReplay(buffer_size, n_envs, obs_keys=("rgb",), buffer_cls=SHEEPRL[0].SequentialReplayBuffer)
    return real, ours


def stored_rows(real):
    """sheeprl's rows of every environment, the oldest first."""
    for ring in real.buffer:
        size = ring.buffer_size if ring.full else ring._pos
        order = [(ring._pos - size + i) % ring.buffer_size for i in range(size)]
        yield {key: ring[key][order, 0] for key in ring.buffer} if size else {"count": np.empty((0, 1))}


def check_same(real, ours, rng):
    """The same rows at the same places, and batches of the same form, ours of sequences that sheeprl could draw."""
    for theirs, mine in zip(real.buffer, ours.buffer, strict=True):
        assert (theirs._pos, theirs.full, theirs.empty) == (mine._pos, mine.full, mine.empty)
    rows = list(stored_rows(real))
    length = min(len(env["count"]) for env in rows)
    if length == 0:
        return
    arguments = dict(batch_size=int(rng.integers(1, 5)), sequence_length=int(rng.integers(1, length + 1)), n_samples=2)
    theirs, mine = (rb.sample_tensors(**arguments, dtype=None, from_numpy=True) for rb in (real, ours))
    assert {k: (v.shape, v.dtype) for k, v in theirs.items()} == {k: (v.shape, v.dtype) for k, v in mine.items()}
    length = arguments["sequence_length"]
    for n in range(2):
        for b in range(arguments["batch_size"]):
            first = mine["count"][n, 0, b].numpy()
            ((env, at),) = [(e, i) for e, r in enumerate(rows) for i in np.nonzero((r["count"] == first).all(-1))[0]]
            for key, value in mine.items():
                assert np.array_equal(value[n, :, b].numpy(), rows[env][key][at : at + length], equal_nan=True)


@needs_sheeprl
@pytest.mark.parametrize("seed", range(4))
def test_random_adds_against_sheeprl(seed):
    rng = np.random.default_rng(seed)
    real, ours = both(int(rng.integers(4, 20)), 3)
    for rows, indices in random_adds(rng, most=3):
        if len(rows["count"]):  # sheeprl takes none for a full round
            real.add(rows, indices)
            ours.add(rows, indices)
            check_same(real, ours, rng)
    assert all(real.full) and ours.full == real.full and len(ours) == len(real)


@needs_sheeprl
def test_what_the_dreamer_v3_loop_does_against_sheeprl():
    rng = np.random.default_rng(0)
    envs = 3
    real, ours = both(16, envs)
    names = ("terminated", "truncated", "rewards")
    row = {key: np.zeros((1, envs, 1)) for key in names} | {"is_first": np.ones((1, envs, 1))}
    for _ in range(60):
        row["rgb"] = rng.integers(0, 256, (1, envs, 3, 4, 4), np.uint8)
        row["actions"] = rng.normal(size=(1, envs, 2)).astype(np.float32)
        row["count"] = rng.integers(0, 2**62, (1, envs, 1))
        for rb in (real, ours):
            rb.add(row, validate_args=False)
        row |= {"is_first": np.zeros((1, envs, 1)), "rewards": rng.normal(size=(1, envs, 1))}
        for key in names[:2]:
            row[key] = rng.random((1, envs, 1)) < 0.1
        if broken := np.nonzero(rng.random(envs) < 0.05)[0].tolist():  # environments that had to be made again
            for rb in (real, ours):
                for env in broken:
                    last = (rb.buffer[env]._pos - 1) % rb.buffer[env].buffer_size
                    for key, like in (("terminated", np.zeros_like), ("truncated", np.ones_like)):
                        rb.buffer[env][key][last] = like(rb.buffer[env][key][last])
        if over := np.nonzero((row["terminated"] | row["truncated"])[0, :, 0])[0].tolist():
            end = {key: row[key][:, over] for key in (*names, "rgb")}
            end["actions"] = np.zeros((1, len(over), 2))
            end["is_first"] = np.zeros((1, len(over), 1), bool)
            end["count"] = rng.integers(0, 2**62, (1, len(over), 1))
            for rb in (real, ours):
                rb.add(end, over, validate_args=False)
            for key in names:
                row[key][:, over] = 0
            row["is_first"][:, over] = 1
        check_same(real, ours, rng)


class Fabric:
    """What the checkpoint callback asks of lightning's Fabric."""

    world_size, global_rank, is_global_zero = 1, 0, True

    def save(self, path, state):
        torch.save(state, path)


@needs_sheeprl
def test_checkpoint_callback(tmp_path):
    rng = np.random.default_rng(0)
    real, ours = both(6, 2)
    for _ in range(8):
        rows = make_rows(rng, 1, 2)
        real.add(rows), ours.add(rows)
    saved = []
    for name, rb in (("real", real), ("ours", ours)):
        path = tmp_path / f"{name}.ckpt"
        SHEEPRL[1].CheckpointCallback().on_checkpoint_coupled(Fabric(), str(path), {"iter_num": 3}, replay_buffer=rb)
        state = torch.load(path, weights_only=False)
        assert isinstance(state["rb"], SHEEPRL[0].EnvIndependentReplayBuffer) and state["iter_num"] == 3
        saved.append(state["rb"])
    check_same(real, ours, rng)  # what was marked for the checkpoint is as it was
    check_same(*saved, rng)
    for env in saved[1].buffer:
        assert env["truncated"][(env._pos - 1) % 6] == 1
    rows = make_rows(rng, 3, 2)
    for rb in saved:
        rb.add(rows)
    check_same(*saved, rng)
