"""torchrl's buffer interface over our replay: against a plain model, and against torchrl where it is installed."""

from __future__ import annotations

import pickle
import re
import sys

import numpy as np
import pytest
import torch

from phyxdream.compat.torchrl_replay import TorchrlReplay, TorchrlTensorDictReplay
from phyxdream.errors import CheckpointError, MissingDependency
from phyxdream.replay import Replay

NEXT_DONE, TRAJECTORY = ("next", "done"), ("collector", "traj_ids")
KEYS = {
    "pixels": ((3, 4, 4), torch.uint8),
    "action": ((2,), torch.float32),
    "hidden": ((3,), torch.bfloat16),
    "is_init": ((1,), torch.bool),
    ("next", "pixels"): ((4, 4, 3), torch.uint8),
    ("next", "reward"): ((1,), torch.float32),
    ("next", "value"): ((), torch.float64),
    ("next", "terminated"): ((1,), torch.bool),
    NEXT_DONE: ((1,), torch.bool),
    TRAJECTORY: ((), torch.int64),
    "code": ((), torch.int64),
}


def test_without_tensordict(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensordict", None)
    with pytest.raises(MissingDependency, match="pip install tensordict"):
        TorchrlReplay(10, slice_len=2)


@pytest.fixture
def TensorDict():
    return pytest.importorskip("tensordict").TensorDict


class Source:
    """Environments whose episodes end at random; every row has its own `code`."""

    def __init__(self, TensorDict, envs, seed=0, end=0.15):
        self.TensorDict, self.envs, self.end = TensorDict, envs, end
        self.rng = np.random.default_rng(seed)
        self.trajectory, self.trajectories, self.code = list(range(envs)), envs, 0
        self.init = [True] * envs
        self.history = [[] for _ in range(envs)]  # dicts

    def rows(self, steps):
        """(envs, steps)."""
        size = (self.envs, steps)
        data = {}
        for key, (shape, dtype) in KEYS.items():
            drawn = torch.from_numpy(self.rng.integers(0, 256, (*size, *shape)))
            data[key] = (
                drawn > 127 if dtype == torch.bool else drawn.to(dtype) / 7 if dtype.is_floating_point else drawn
            )
            data[key] = data[key].to(dtype)
        data["next", "reward"][torch.from_numpy(self.rng.random((*size, 1)) < 0.1)] = torch.nan
        data[NEXT_DONE] = torch.from_numpy(self.rng.random((*size, 1)) < self.end)
        for env in range(self.envs):
            for t in range(steps):
                data["code"][env, t], self.code = self.code, self.code + 1
                data[TRAJECTORY][env, t], data["is_init"][env, t] = self.trajectory[env], self.init[env]
                self.init[env] = bool(data[NEXT_DONE][env, t])
                if self.init[env]:
                    self.trajectory[env], self.trajectories = self.trajectories, self.trajectories + 1
                self.history[env].append({key: value[env, t] for key, value in data.items()})
        return self.TensorDict(data, batch_size=size)

    def kept(self, rows_of_an_env):
        return [env[-rows_of_an_env:] for env in self.history]


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def check(batch, kept, length, *, own=True):
    """Every slice was stored in one piece and lies in one trajectory; returns where they begin."""
    place = {int(row["code"]): (e, i) for e, env in enumerate(kept) for i, row in enumerate(env)}
    keys = {k for k in batch.keys(True, True) if isinstance(k, str) or len(k) > 1}
    assert keys >= set(KEYS) and (not own or keys == set(KEYS))
    changed = () if own else ("is_init", NEXT_DONE)
    starts = []
    for piece in batch.reshape(-1, length):
        assert len(piece[TRAJECTORY].unique()) == 1
        env, first = place[int(piece["code"][0])]
        starts.append((env, first))
        for t in range(length):
            row = kept[env][first + t]
            assert all(same(piece[key][t], row[key]) for key in KEYS if key not in changed)
    return starts


def valid_starts(kept, length):
    return {
        (env, i)
        for env, rows in enumerate(kept)
        for i in range(len(rows) - length + 1)
        if len({int(row[TRAJECTORY]) for row in rows[i : i + length]}) == 1
    }


@pytest.mark.parametrize("traj_key", [TRAJECTORY, None, "absent"])
@pytest.mark.parametrize("envs", [1, 3])
def test_slices_are_what_was_added(TensorDict, envs, traj_key):
    source = Source(TensorDict, envs)
    rb = TorchrlReplay(20 * envs, slice_len=3, batch_size=12, num_envs=envs, traj_key=traj_key)
    for _ in range(25):
        data = source.rows(int(source.rng.integers(1, 5)))
        index = rb.extend(data if envs > 1 else data[0])
        assert index.dtype == torch.int64 and index.shape == (data.numel(),)
        one = source.rows(1)[:, 0]
        rb.add(one if envs > 1 else one[0])
        kept = source.kept(20)
        assert len(rb) == sum(map(len, kept)) and rb.write_count == sum(map(len, source.history))
        starts = valid_starts(kept, 3)
        if not starts:
            with pytest.raises(ValueError, match="slice_len: no stored trajectory has 3 rows"):
                rb.sample()
            continue
        batch, info = rb.sample(6, return_info=True)
        assert batch.batch_size == (6,) and rb.sample().batch_size == (12,)
        assert set(check(batch, kept, 3)) <= starts
        number = info["index"].reshape(2, 3)
        assert (number.diff() == 1).all()
    many = rb.sample(3 * 4000)
    assert set(check(many, source.kept(20), 3)) == valid_starts(source.kept(20), 3)


def test_index_is_the_rows_own(TensorDict):
    source = Source(TensorDict, 2)
    rb = TorchrlReplay(20, slice_len=1, batch_size=50, num_envs=2)
    codes = {}
    for _ in range(4):
        data = source.rows(3)
        codes |= dict(zip(rb.extend(data).tolist(), data["code"].flatten().tolist(), strict=True))
        data = source.rows(1)[:, 0]
        codes |= dict(zip(rb.add(data).tolist(), data["code"].tolist(), strict=True))
        batch, info = rb.sample(return_info=True)
        assert [codes[i] for i in info["index"].tolist()] == batch["code"].tolist()
    single = TorchrlReplay(20, slice_len=1)
    assert single.add(Source(TensorDict, 1).rows(1)[0, 0]) == 0


def test_every_slice_is_equally_likely(TensorDict):
    source = Source(TensorDict, 2)
    rb = TorchrlReplay(40, slice_len=4, num_envs=2)
    for _ in range(10):
        rb.extend(source.rows(3))
    starts = check(rb.sample(4 * 3000), source.kept(20), 4)
    valid = valid_starts(source.kept(20), 4)
    counts = np.array([starts.count(start) for start in valid])
    expected = len(starts) / len(valid)
    # chi-square: mean k, variance 2k
    k = len(valid) - 1
    assert k > 8 and ((counts - expected) ** 2 / expected).sum() < k + 4 * (2 * k) ** 0.5


def test_information_takes_its_place_in_the_batch(TensorDict):
    source = Source(TensorDict, 1)
    rb = TorchrlTensorDictReplay(
        50, slice_len=3, batch_size=30, transform=lambda batch: batch.set("seen", batch["index"])
    )
    rb.extend(source.rows(60)[0])
    batch, info = rb.sample(return_info=True)
    check(batch, source.kept(50), 3, own=False)
    assert torch.equal(batch["seen"], batch["index"])
    assert torch.equal(batch["index"][:, 0], info["index"])
    for key in (("next", "truncated"), NEXT_DONE, ("next", "terminated"), "is_init"):
        assert torch.equal(batch[key], info[key])
    pieces = batch.reshape(10, 3)
    assert pieces["next", "truncated"][:, -1].all() and not pieces["next", "truncated"][:, :-1].any()
    assert pieces[NEXT_DONE][:, -1].all() and pieces["is_init"][:, 0].all()
    rb.update_tensordict_priority(batch)


def test_rows_without_next_done(TensorDict):
    """The DreamerV3 loop keeps these keys only."""
    source = Source(TensorDict, 1)
    keys = ("action", "is_init", ("next", "pixels"), ("next", "reward"), ("next", "terminated"), TRAJECTORY)
    rb = TorchrlReplay(50, slice_len=3, batch_size=30)
    rb.extend(source.rows(60).select(*keys).reshape(-1))
    batch, info = rb.sample(return_info=True)
    assert set(batch.keys(True, True)) == set(keys)
    assert torch.equal(info[NEXT_DONE], info["next", "truncated"])


@pytest.mark.parametrize("way", ["pickle", "state_dict", "dumps"])
def test_it_goes_on_after_loading(TensorDict, tmp_path, way):
    source = Source(TensorDict, 2)
    rb = TorchrlReplay(30, slice_len=2, batch_size=8, num_envs=2)
    rb.extend(source.rows(7))
    for i in range(3):
        other = TorchrlReplay(30, slice_len=2, batch_size=8, num_envs=2, seed=5)
        if way == "pickle":
            other = pickle.loads(pickle.dumps(rb))
        elif way == "state_dict":
            torch.save(rb.state_dict(), tmp_path / "state")
            other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        else:
            rb.dumps(tmp_path / str(i))
            other.loads(tmp_path / str(i))
        data = source.rows(5)
        assert torch.equal(rb.extend(data), other.extend(data)) and rb.write_count == other.write_count
        batch = other.sample()
        check(batch, source.kept(15), 2)
        assert torch.equal(rb.sample()["code"], batch["code"])
        rb = other


def test_emptied_it_takes_other_rows(TensorDict):
    rb = TorchrlReplay(30, slice_len=2, batch_size=8)
    rb.load_state_dict(rb.state_dict())
    rb.extend(Source(TensorDict, 1).rows(9)[0])
    rb.empty()
    assert len(rb) == rb.write_count == 0
    with pytest.raises(ValueError, match="slice_len: no stored"):
        rb.sample()
    rb.extend(TensorDict({"x": torch.zeros(5), NEXT_DONE: torch.zeros(5, dtype=torch.bool)}, [5]))
    assert set(rb.sample().keys(True, True)) == {"x", NEXT_DONE}
    _, info = rb.sample(return_info=True)
    assert info[NEXT_DONE].shape == (8,)


def test_other_snapshots_are_refused(TensorDict, tmp_path):
    source = Source(TensorDict, 2)
    rb = TorchrlReplay(30, slice_len=2, batch_size=8, num_envs=2)
    with pytest.raises(CheckpointError, match="nothing has been added yet"):
        rb.dumps(tmp_path / "empty")
    rb.extend(source.rows(7))
    other = TorchrlReplay(30, slice_len=2, batch_size=8, num_envs=1)
    other.extend(source.rows(7)[0])
    with pytest.raises(CheckpointError, match="got 1 envs with 30 rows each, expected 2 with 15"):
        rb.load_state_dict(other.state_dict())
    plain = Replay({"is_first": ((), "bool"), "x": ((), "float32")}, 30, 2)
    plain.save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="a replay with the keys is_first, x"):
        rb.loads(tmp_path / "plain")
    with pytest.raises(ValueError, match="state_dict: got"):
        rb.load_state_dict({})
    check(rb.sample(), source.kept(15), 2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (dict(max_size=0, slice_len=1), "max_size: got 0"),
        (dict(max_size=5, slice_len=1, num_envs=2), "max_size: got 5, expected a multiple of num_envs, which is 2"),
        (dict(max_size=5, slice_len=True), "slice_len: got True"),
        (dict(max_size=5, slice_len=2, batch_size=5), "batch_size: got 5, expected a multiple of slice_len, 2"),
        (dict(max_size=5, slice_len=2, seed=-1), "seed: got -1"),
        (dict(max_size=5, slice_len=2, traj_key=()), "traj_key: got the key ()"),
        (dict(max_size=5, slice_len=2, transform=3), "transform: got 3"),
    ],
)
def test_bad_constructor_arguments(TensorDict, arguments, error):
    with pytest.raises((ValueError, TypeError), match=re.escape(error)):
        TorchrlReplay(**arguments)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.to_dict(), "data: got dict, expected a TensorDict"),
        (lambda d: d[0], "data: got batch size (3,), expected (2, steps) with num_envs=2"),
        (lambda d: d[:1], "data: got batch size (1, 3), expected (2, steps) with num_envs=2"),
        (lambda d: d.exclude("action"), "data: no 'action'; expected the keys "),
        (lambda d: d.set("actoin", d["action"]), "data: unknown key 'actoin'; did you mean 'action'?"),
        (lambda d: d.set("a/b", d["action"]), "data: got the key 'a/b', expected a string without '/'"),
        (lambda d: d.set("action", d["action"][..., :1]), "data: 'action' has shape (1,) of one row, expected (2,)"),
        (lambda d: d.set("action", d["action"].double()), "data: 'action' has dtype torch.float64, expected torch.flo"),
    ],
)
def test_bad_rows_change_nothing(TensorDict, change, error):
    source = Source(TensorDict, 2)
    rb = TorchrlReplay(30, slice_len=2, batch_size=8, num_envs=2)
    rb.extend(source.rows(4))
    kept = source.kept(15)
    kept = [list(env) for env in kept]
    with pytest.raises((ValueError, TypeError), match=re.escape(error)):
        rb.extend(change(source.rows(3)))
    assert len(rb) == 8
    check(rb.sample(), kept, 2) if valid_starts(kept, 2) else None


def test_bad_first_rows_and_batches(TensorDict):
    rb = TorchrlReplay(30, slice_len=2)
    with pytest.raises(ValueError, match="traj_key: data has neither, expected 'collector/traj_ids' or 'next/done'"):
        rb.extend(TensorDict({"x": torch.zeros(5)}, [5]))
    with pytest.raises(ValueError, match="data: got no keys"):
        rb.extend(TensorDict({}, [5]))
    with pytest.raises(TypeError, match="data: the key 'x' has dtype complex128"):
        rb.extend(TensorDict({"x": torch.zeros(5, dtype=torch.complex128), NEXT_DONE: torch.zeros(5).bool()}, [5]))
    rb.extend(Source(TensorDict, 1).rows(9)[0])
    with pytest.raises(ValueError, match="batch_size: got None"):
        rb.sample()
    with pytest.raises(ValueError, match="batch_size: got 3, expected a multiple of slice_len, 2"):
        rb.sample(3)
    with pytest.raises(NotImplementedError, match="one process"):
        rb.share()
    assert not rb.shared and rb.batch_size is None and "9 of 30 rows" in repr(rb)


# ------------------------------------------------------------------------------------------------------ against torchrl


@pytest.mark.parametrize("tensordict", [False, True])
def test_batches_have_torchrls_form(TensorDict, tensordict):
    data = pytest.importorskip("torchrl.data")
    source = Source(TensorDict, 1)
    rows = source.rows(70)[0]
    kind = data.TensorDictReplayBuffer if tensordict else data.ReplayBuffer
    sampler = data.SliceSampler(slice_len=3, traj_key=TRAJECTORY)
    real = kind(storage=data.LazyTensorStorage(50), sampler=sampler, batch_size=600)
    ours = (TorchrlTensorDictReplay if tensordict else TorchrlReplay)(50, slice_len=3, batch_size=600)
    for part in rows.split(14):
        index = real.extend(part.clone())
        assert ours.extend(part).shape == index.shape
    assert (len(real), real.write_count, real.batch_size) == (len(ours), ours.write_count, ours.batch_size)
    (theirs, their_info), (mine, my_info) = (rb.sample(return_info=True) for rb in (real, ours))
    form = lambda td: {k: (v.shape, v.dtype) for k, v in td.items(True, True)}  # noqa: E731
    assert form(mine) == form(theirs) and mine.batch_size == theirs.batch_size
    assert set(my_info) == set(their_info)
    many = (check(rb.sample(3 * 3000), source.kept(50), 3, own=not tensordict) for rb in (real, ours))
    assert set(next(many)) == set(next(many))
    for td, info in ((theirs, their_info), (mine, my_info)):
        place = {int(row["code"]): row for row in source.kept(50)[0]}
        stored = [place[int(code)] for code in td["code"]]
        cut = torch.arange(600)[:, None] % 3 == 2
        assert torch.equal(info["next", "truncated"], cut)
        assert torch.equal(info[NEXT_DONE], torch.stack([row[NEXT_DONE] for row in stored]) | cut)
        assert torch.equal(info["next", "terminated"], torch.stack([row["next", "terminated"] for row in stored]))
        begins = torch.arange(600)[:, None] % 3 == 0
        assert torch.equal(info["is_init"], torch.stack([row["is_init"] for row in stored]) | begins)


@pytest.mark.parametrize("envs", [1, 2])
def test_a_collector_fills_it(TensorDict, envs):
    collectors = pytest.importorskip("torchrl.collectors")
    from torchrl.envs import GymEnv, InitTracker, SerialEnv, TransformedEnv
    from torchrl.modules import RandomPolicy

    def make():
        return TransformedEnv(GymEnv("CartPole-v1"), InitTracker())

    rb = TorchrlTensorDictReplay(400, slice_len=4, batch_size=40, num_envs=envs)
    env = make() if envs == 1 else SerialEnv(envs, make)
    policy = RandomPolicy(env.action_spec)
    collector = collectors.Collector(env, policy, frames_per_batch=50, total_frames=300, replay_buffer=rb)
    for data in collector:
        assert data is None
    collector.shutdown()
    assert len(rb) == rb.write_count == 300
    batch = rb.sample().reshape(-1, 4)
    assert (batch[TRAJECTORY] == batch[TRAJECTORY][:, :1]).all()
    assert torch.equal(batch["next", "observation"][:, :-1], batch["observation"][:, 1:])


def test_the_trainers_hook_uses_it(TensorDict):
    trainers = pytest.importorskip("torchrl.trainers")
    source = Source(TensorDict, 1)
    rb = TorchrlTensorDictReplay(60, slice_len=3)
    hook = trainers.ReplayBufferTrainer(rb, batch_size=30, flatten_tensordicts=True)
    for _ in range(3):
        hook.extend(source.rows(10))
    batch = hook.sample(None)
    hook.update_priority(batch)
    check(batch, source.kept(60), 3, own=False)
    other = trainers.ReplayBufferTrainer(TorchrlTensorDictReplay(60, slice_len=3), batch_size=30)
    other.load_state_dict(hook.state_dict())
    assert torch.equal(other.sample(None)["code"], hook.sample(None)["code"])
