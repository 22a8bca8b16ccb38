"""Snapshots: a folder of segment files and an index. These tests know no file's name and no file's layout."""

import itertools
import os
import random
import shutil
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from phyxdream.errors import CheckpointError
from phyxdream.replay import Curious, Limiter, Prioritized, Recency, Replay, Uniform

SIZE, END = 32768, 600
BIG = {"image": ((SIZE,), "uint8"), "number": ((), "int64"), "is_first": ((), "bool")}
NOISE = np.random.default_rng(0).integers(0, 256, SIZE + 1000, np.uint8)


def big(envs, number):
    """A step of each of `envs` envs, of 32 KB, so that a few hundred fill several segments."""
    image = np.stack([NOISE[(number * 7 + env * 31) % 997 :][:SIZE] for env in range(envs)])
    return {"image": image, "number": np.arange(envs) * 1_000_000 + number, "is_first": np.full(envs, number % 9 == 0)}


def fill_big(replay, begin, end):
    for number in range(begin, end):
        replay.add(big(replay.num_envs, number))


def check_big(replay, end, change=0):
    """All stored steps are there as written, up to step `end` of every env; `change` of the numbers from END on."""
    rows = min(end, replay.capacity // replay.num_envs)
    assert replay.stored_steps == [range(end - rows, end)] * replay.num_envs
    for env in range(replay.num_envs):
        for first in range(end - rows, end, 100):
            count = min(100, end - first)
            written = [big(replay.num_envs, number) for number in range(first, first + count)]
            for name, value in replay.read(env, first, count).items():
                expected = np.stack([step[name][env] for step in written])
                if name == "number":
                    expected[max(0, END - first) :] += change
                np.testing.assert_array_equal(value.numpy(), expected, err_msg=name)


def files(folder):
    """{name: os.stat_result} of the files under `folder`."""
    return {path.relative_to(folder): path.stat() for path in folder.rglob("*") if path.is_file()}


def kept_and_new(before, after):
    """Bytes in files that `after` shares with `before` (by inode, unwritten since), and in the others."""
    old = {(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in before.values()}
    kept = [(stat.st_ino, stat.st_mtime_ns, stat.st_size) in old for stat in after.values()]
    sizes = np.array([stat.st_size for stat in after.values()])
    return sizes[kept].sum(), sizes[np.logical_not(kept)].sum()


def refused(path):
    """What `load` says."""
    with pytest.raises(CheckpointError) as caught:
        Replay.load(path)
    assert str(caught.value).startswith(f"cannot load the replay from {str(path)!r}: ")
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- round trip


SELECTORS = [Uniform(), {Recency(0.5): 2.0, Prioritized(): 1.0, Uniform(): 1.5}, Prioritized(0.3, 2.0), Curious(c=5.0)]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("steps", [0, 1, 4, 8, 11, 200])
def test_round_trip(coded, same, tmp_path, steps, selector):
    limiter = Limiter(50.0, min_size=2, lead=None, timeout=5.0)
    options = {"latents": coded.latents, "selector": selector, "limiter": limiter}
    replay, numbers = Replay(coded.spec, 23, 3, seed=9, **options), np.zeros(3, np.int64)
    coded.fill(replay, numbers, steps)
    if steps:
        batch = replay.sample(7, 1, online=True)
        replay.update(batch["step_id"], **coded.latent(batch["step_id"].numpy(), 3))
        if selector != Uniform():
            replay.prioritize(batch["step_id"], torch.arange(7.0)[None])
    replay.save(tmp_path / "replay")
    loaded = Replay.load(tmp_path / "replay")
    for name in ("spec", "latents", "selector", "limiter", "capacity", "num_envs", "nbytes", "num_episodes"):
        assert getattr(loaded, name) == getattr(replay, name), name
    assert (repr(loaded), loaded.total_added, loaded.total_sampled) == (
        repr(replay),
        replay.total_added,
        replay.total_sampled,
    )
    for turn in range(20):
        for buffer in (replay, loaded):
            coded.fill(buffer, numbers.copy(), 1)
        numbers += 1
        a, b = (buffer.sample(5, 1, online=turn % 2 == 0) for buffer in (replay, loaded))
        assert same(a, b)
        if selector != Uniform():
            for buffer in (replay, loaded):
                buffer.prioritize(a["step_id"], a["number"].abs() % 13)
    coded.check(loaded.sample(40, 6), ends=numbers)
    assert [path.name for path in tmp_path.iterdir()] == ["replay"] and (tmp_path / "replay").is_dir()


def test_saving_does_not_change_what_is_sampled(wrapped, same, tmp_path):
    (a, _), (b, _) = wrapped(), wrapped()
    a.save(tmp_path / "replay")
    assert same(a.sample(9, 4), b.sample(9, 4))
    a.save(str(tmp_path / "replay"))  # over the old one
    loaded = Replay.load(str(tmp_path / "replay"))
    assert same(loaded.sample(9, 4), a.sample(9, 4))


def test_only_the_filled_part_is_written(coded, tmp_path):
    replay = Replay(coded.spec, 100_000, 3)
    coded.uneven(replay, [2, 2, 2])
    replay.save(tmp_path / "replay")
    assert sum(stat.st_size for stat in files(tmp_path / "replay").values()) < 20_000


def test_a_folder_name_that_is_no_utf8(wrapped, tmp_path):
    replay, _ = wrapped()
    path = bytes(tmp_path) + b"/\xff\xe9"
    replay.save(path)
    assert len(Replay.load(path)) == len(replay)
    with pytest.raises(CheckpointError):
        Replay.load(path + b"\xff")


def test_folders_above_are_made(wrapped, tmp_path):
    replay, _ = wrapped()
    try:
        replay.save(tmp_path / "a" / "b")
    except CheckpointError as error:
        assert "a" in str(error) and list(tmp_path.iterdir()) == []
    else:
        assert len(Replay.load(tmp_path / "a" / "b")) == len(replay)


def test_a_wrapped_buffer_with_a_gap_of_lost_envs(coded, tmp_path):
    """Envs without a step, with one, and with many."""
    replay = Replay(coded.spec, 50, 5)
    coded.uneven(replay, [0, 1, 10, 37, 0])
    replay.save(tmp_path / "replay")
    loaded = Replay.load(tmp_path / "replay")
    assert len(loaded) == 21
    coded.check(loaded.sample(60, 1), ends=[0, 1, 10, 37, 0])
    coded.check(loaded.sample(60, 10), ends=[0, 1, 10, 37, 0])


# -------------------------------------------------------------------------------------------------------- incremental


@pytest.fixture
def grown(tmp_path):
    """A buffer with 39 MB in 2 envs, saved in `first`."""
    replay = Replay(BIG, 2 * 1000, 2, seed=3)
    fill_big(replay, 0, END)
    replay.save(tmp_path / "first")
    return replay


def test_nothing_new_writes_nothing_but_the_index(grown, tmp_path):
    before = files(tmp_path / "first")
    grown.save(tmp_path / "first")
    kept, new = kept_and_new(before, files(tmp_path / "first"))
    assert kept > 39e6 and new < 100_000


@pytest.mark.parametrize("again", [False, True])
def test_only_new_steps_are_written(grown, tmp_path, again):
    if again:  # what `load` read counts as written
        grown = Replay.load(tmp_path / "first")
    before, end = files(tmp_path / "first"), END
    for _ in range(3):
        fill_big(grown, end, end + 10)
        end += 10
        grown.save(tmp_path / "first")
    kept, new = kept_and_new(before, files(tmp_path / "first"))
    assert kept > 20e6 and new < 12e6
    check_big(Replay.load(tmp_path / "first"), end)


@pytest.mark.parametrize("again", [False, True])
def test_another_folder_gets_hard_links(grown, same, tmp_path, again):
    if again:
        grown = Replay.load(tmp_path / "first")
    fill_big(grown, END, END + 10)
    grown.save(tmp_path / "second")
    first, second = files(tmp_path / "first"), files(tmp_path / "second")
    kept, new = kept_and_new(first, second)
    assert kept > 20e6 and new < 12e6
    assert sum(stat.st_size for stat in second.values() if stat.st_nlink > 1) == kept
    # Either is whole without the other.
    check_big(Replay.load(tmp_path / "first"), END)
    shutil.rmtree(tmp_path / "first")
    check_big(Replay.load(tmp_path / "second"), END + 10)


def test_the_older_snapshot_is_not_touched_by_what_comes(grown, tmp_path):
    end = END
    for turn in range(6):
        fill_big(grown, end, end + 250)
        end += 250
        grown.save(tmp_path / f"turn{turn}")
    check_big(Replay.load(tmp_path / "first"), END)
    for turn in range(6):
        check_big(Replay.load(tmp_path / f"turn{turn}"), END + 250 * (turn + 1))


def test_a_folder_does_not_grow_for_ever(grown, tmp_path):
    end = END
    for _ in range(12):
        fill_big(grown, end, end + 200)
        end += 200
        grown.save(tmp_path / "first")
    check_big(Replay.load(tmp_path / "first"), end)
    assert sum(stat.st_size for stat in files(tmp_path / "first").values()) < 2 * grown.nbytes


def test_latents_written_after_a_save_are_in_the_next(coded, same, tmp_path):
    replay = Replay(coded.small_spec, 4000, 2, latents=coded.latents)
    coded.fill(replay, np.zeros(2, np.int64), 1500)
    replay.save(tmp_path / "replay")
    rng = np.random.default_rng(0)
    for turn in range(4):
        ids = rng.integers(0, 2, 5) << 40 | rng.integers(0, 1500, 5)
        replay.update(ids, **coded.latent(ids, turn + 1))
        replay.save(tmp_path / ("replay" if turn % 2 else "other"))
        loaded = Replay.load(tmp_path / ("replay" if turn % 2 else "other"))
        batch = loaded.sample(20, 1500)
        assert same(batch, replay.sample(20, 1500))
        assert (batch["deter"][..., 2] == turn + 1).any()


def test_a_moved_folder(grown, tmp_path):
    (tmp_path / "first").rename(tmp_path / "moved")
    fill_big(grown, END, END + 20)
    grown.save(tmp_path / "first")
    check_big(Replay.load(tmp_path / "first"), END + 20)
    fill_big(grown, END + 20, END + 40)
    grown.save(tmp_path / "moved")
    check_big(Replay.load(tmp_path / "moved"), END + 40)
    check_big(Replay.load(tmp_path / "first"), END + 20)


def test_a_folder_that_was_deleted_or_lost_a_file(grown, tmp_path):
    shutil.rmtree(tmp_path / "first")
    grown.save(tmp_path / "first")
    check_big(Replay.load(tmp_path / "first"), END)
    largest = max(files(tmp_path / "first").items(), key=lambda item: item[1].st_size)[0]
    (tmp_path / "first" / largest).unlink()
    grown.save(tmp_path / "first")
    check_big(Replay.load(tmp_path / "first"), END)


def test_another_buffer_over_an_existing_snapshot(grown, wrapped, same, tmp_path):
    other, _ = wrapped()
    other.save(tmp_path / "first")
    loaded = Replay.load(tmp_path / "first")
    assert repr(loaded) == repr(other) and same(loaded.sample(5, 4), other.sample(5, 4))
    assert sum(stat.st_size for stat in files(tmp_path / "first").values()) < 100_000  # the old segments are gone


def test_two_buffers_save_into_one_folder_in_turn(grown, tmp_path):
    """Twins that went different ways have segments of the same steps with different contents."""
    twin = Replay.load(tmp_path / "first")
    ends = [END, END]
    for turn in range(6):
        index = turn % 2
        replay = (grown, twin)[index]
        for _ in range(40):
            step = big(2, ends[index])
            step["number"] += index * 100_000_000
            replay.add(step)
            ends[index] += 1
        replay.save(tmp_path / "first")
        check_big(Replay.load(tmp_path / "first"), ends[index], index * 100_000_000)


def test_threads_that_save_into_one_folder(grown, tmp_path):
    failures = []

    def work():
        try:
            for _ in range(5):
                grown.save(tmp_path / "first")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    check_big(Replay.load(tmp_path / "first"), END)


def test_loading_while_another_saves(grown, tmp_path):
    """As `replay inspect` does on a running job: the files of the old snapshot may go while it is read."""
    ends, failures, stop = [END], [], threading.Event()

    def work():
        try:
            while not stop.is_set():
                fill_big(grown, ends[-1], ends[-1] + 20)
                ends.append(ends[-1] + 20)
                grown.save(tmp_path / "first")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(15):
            loaded = Replay.load(tmp_path / "first")
            assert loaded.total_added // 2 in ends
            check_big(loaded, loaded.total_added // 2)
    finally:
        stop.set()
        thread.join()
    assert not failures


# ------------------------------------------------------------------------------------------------ damaged and foreign


@pytest.fixture(scope="module")
def snapshot(wrapped, coded, tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot") / "replay"
    replay, _ = wrapped(capacity=40, latents=coded.latents, selector=Prioritized())
    replay.save(path)
    return path


@pytest.fixture
def copy(snapshot, tmp_path):
    return shutil.copytree(snapshot, tmp_path / "copy")


def named(message, file, copy):
    return str(copy / file) in message or file.name in message.removeprefix(f"cannot load the replay from {copy!r}")


def test_any_flipped_bit_is_refused(copy):
    rng = random.Random(1)
    for file, stat in files(copy).items():
        path = copy / file
        data = path.read_bytes()
        places = range(stat.st_size) if stat.st_size < 400 else [*range(64), *range(stat.st_size - 64, stat.st_size)]
        for at in {*places, *(rng.randrange(stat.st_size) for _ in range(300))}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
            assert named(refused(copy), file, copy), (file, at)
        path.write_bytes(data)
    Replay.load(copy)


def test_truncated_anywhere_is_refused(copy):
    rng = random.Random(2)
    for file, stat in files(copy).items():
        path = copy / file
        data = path.read_bytes()
        for size in {0, 1, 8, 16, stat.st_size - 1, *(rng.randrange(stat.st_size) for _ in range(150))}:
            path.write_bytes(data[:size])
            assert named(refused(copy), file, copy), (file, size)
        for more in (b"\0", bytes(5000), data):
            path.write_bytes(data + more)
            assert named(refused(copy), file, copy)
        path.write_bytes(data)
    Replay.load(copy)


def test_a_missing_file_is_refused(copy):
    for file in files(copy):
        (copy / file).rename(copy.parent / "away")
        message = refused(copy)
        assert named(message, file, copy) and ("No such file" in message or "missing" in message)
        (copy.parent / "away").rename(copy / file)
    Replay.load(copy)


def test_the_file_of_another_snapshot_is_refused(wrapped, coded, copy, tmp_path):
    """Whole, with a right checksum, but not what the index speaks of."""
    stranger, _ = wrapped(capacity=40, seed=6, latents=coded.latents, selector=Prioritized())
    stranger.save(tmp_path / "other")
    tried = 0
    for file in files(copy):
        strange = tmp_path / "other" / file
        if strange.exists():
            mine = (copy / file).read_bytes()
            (copy / file).write_bytes(strange.read_bytes())
            refused(copy)
            (copy / file).write_bytes(mine)
            tried += 1
    names = list(files(copy))
    for a, b in itertools.pairwise(names):  # files that changed places
        mine, other = (copy / a).read_bytes(), (copy / b).read_bytes()
        if mine == other:
            continue
        (copy / a).write_bytes(other)
        refused(copy)
        (copy / a).write_bytes(mine)
        tried += 1
    assert tried
    Replay.load(copy)


def test_what_is_no_snapshot_is_refused(tmp_path):
    refused(tmp_path / "missing")
    refused(tmp_path)  # an empty folder
    (tmp_path / "file").write_bytes(b"PHYXRPLY" + bytes(1000))
    refused(tmp_path / "file")
    refused(tmp_path)
    for method in (Replay(BIG, 10, 1).save, Replay.load):
        with pytest.raises(ValueError, match=r"path: got .*, expected a name without null bytes"):
            method(f"{tmp_path}/a\0b")
        with pytest.raises(TypeError):
            method(5)


def test_a_folder_with_foreign_files_is_not_written_to(wrapped, tmp_path):
    replay, _ = wrapped()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot save the replay to .*notes\.txt"):
        replay.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "notes.txt").rename(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot save the replay to .*file"):
        replay.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="inner"):
        replay.save(tmp_path / "folder")
    replay.save(tmp_path / "good")
    (tmp_path / "good" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        replay.save(tmp_path / "good")
    (tmp_path / "good" / "notes.txt").unlink()
    assert len(Replay.load(tmp_path / "good")) == len(replay)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(wrapped, tmp_path):
    replay, _ = wrapped()
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        replay.save(tmp_path / "locked")


# --------------------------------------------------------------------------------- the layout, as snapshot.cpp tells it


def xxh64(data):
    """XXH64 with seed 0, from its specification."""
    mask, p1, p2, p3 = 2**64 - 1, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

    def rotate(x, bits):
        x &= mask
        return (x << bits | x >> (64 - bits)) & mask

    def scramble(word):
        return rotate(word * p2, 31) * p1 & mask

    whole = len(data) // 32 * 32
    hash_ = p5
    if whole:
        lanes = [p1 + p2, p2, 0, -p1]
        for i in range(0, whole, 8):
            word = int.from_bytes(data[i : i + 8], "little")
            lanes[i // 8 % 4] = rotate(lanes[i // 8 % 4] + word * p2, 31) * p1 & mask
        hash_ = sum(rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
        for lane in lanes:
            hash_ = (hash_ ^ scramble(lane)) * p1 + p4
    hash_ += len(data)
    tail = data[whole:]
    while len(tail) >= 8:
        hash_ = rotate(hash_ ^ scramble(int.from_bytes(tail[:8], "little")), 27) * p1 + p4
        tail = tail[8:]
    if len(tail) >= 4:
        hash_ = rotate(hash_ ^ int.from_bytes(tail[:4], "little") * p1 & mask, 23) * p2 + p3
        tail = tail[4:]
    for byte in tail:
        hash_ = rotate(hash_ ^ byte * p5, 11) * p1
    hash_ &= mask
    hash_ = (hash_ ^ hash_ >> 33) * p2 & mask
    hash_ = (hash_ ^ hash_ >> 29) * p3 & mask
    return hash_ ^ hash_ >> 32


def signed(index, offset, value):
    """The index with one number of its header changed and its checksum made to match."""
    data = bytearray(index[:-8])
    struct.pack_into("<Q", data, offset, value)
    return bytes(data) + struct.pack("<Q", xxh64(bytes(data)))


def test_the_files_are_laid_out_as_documented(coded, tmp_path):
    assert xxh64(b"") == 0xEF46DB3751D8E999 and xxh64(b"abc") == 0x44BC2CF5AD770999  # the specification's own
    replay, numbers = Replay(coded.spec, 23, 3, seed=2), np.zeros(3, np.int64)
    coded.fill(replay, numbers, 6)
    replay.save(tmp_path / "replay")
    index = (tmp_path / "replay" / "replay.index").read_bytes()
    assert index[:8] == b"PHYXRPLY"
    version, size = struct.unpack_from("<QQ", index, 8)
    assert version == 2 and 24 + size + 8 == len(index)
    assert struct.unpack("<Q", index[-8:])[0] == xxh64(index[:-8])
    segments = {path.read_bytes() for path in (tmp_path / "replay").glob("steps-*.bin")}
    expected = set()
    for env in range(3):
        columns = [torch.as_tensor(value) for value in coded.step([env] * 6, range(6)).values()]
        raw = [c.view(torch.int16) if c.dtype == torch.bfloat16 else c for c in columns]
        expected.add(b"".join(column.numpy().tobytes() for column in raw))
    assert segments == expected
    for data in segments:
        assert struct.pack("<Q", xxh64(data)) in index and struct.pack("<Q", len(data)) in index


def test_an_index_that_lies_is_refused_or_harmless(copy):
    """Numbers written anywhere into it, under a valid checksum: never a crash, never a runaway allocation."""
    path, rng, refusals = copy / "replay.index", random.Random(3), 0
    index = path.read_bytes()
    path.write_bytes(signed(index, 24, struct.unpack_from("<Q", index, 24)[0]))
    Replay.load(copy)
    for offset in range(8, len(index) - 15):
        for value in rng.sample([0, 1, 3, 18, 41, 1000, 2**31, 2**40, 2**62, 2**63, 2**64 - 1], 2):
            path.write_bytes(signed(index, offset, value))
            try:
                loaded = Replay.load(copy)
            except CheckpointError:
                refusals += 1
            else:
                if loaded.ready(3, 1):  # its limiter may never be
                    loaded.sample(3, 1)
                loaded.save(copy.parent / "again")
    assert refusals > 500


# ------------------------------------------------------------------------------------------------- full disk and kill


DISK_FULL = """
import resource, sys
import numpy as np
from phyxdream.errors import CheckpointError
from phyxdream.replay import Replay

path, room = sys.argv[1], int(sys.argv[2])
replay = Replay({"image": ((1000,), "uint8"), "is_first": ((), "bool")}, 5000, 1)
for number in range(3000):
    replay.add({"image": np.full((1, 1000), number % 251, np.uint8), "is_first": [number == 0]})
resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
try:
    replay.save(path)
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert len(replay.sample(2, 50)["image"]) == 50
replay.save(path + "2")
if sys.argv[3:]:
    replay.save(path)
"""


def run_apart(script, path, *arguments):
    """Runs `script` in its own process, in the snapshot's folder: the current one may be an uncompiled checkout."""
    command = [sys.executable, "-c", script, path.name, *map(str, arguments)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", [0, 300, 100_000])
def test_a_full_disk_leaves_the_old_snapshot(wrapped, same, tmp_path, room):
    path = tmp_path / "replay"
    old, _ = wrapped()
    old.save(path)
    before = {name: (path / name).read_bytes() for name in files(path)}
    done = run_apart(DISK_FULL, path, room)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot save the replay to 'replay': ") and "File too large" in done.stdout
    assert {name: (path / name).read_bytes() for name in files(path)} == before  # nor anything left beside it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["replay", "replay2"]
    assert len(Replay.load(f"{path}2")) == 3000
    assert same(Replay.load(path).sample(4, 4), old.sample(4, 4))
    # The next attempt finds nothing in its way.
    done = run_apart(DISK_FULL, path, room, "again")
    assert done.returncode == 0, done.stderr
    assert len(Replay.load(path)) == 3000


def test_a_full_disk_where_there_was_nothing(tmp_path):
    done = run_apart(DISK_FULL, tmp_path / "replay", 300)
    assert done.returncode == 0 and "File too large" in done.stdout, done.stderr
    refused(tmp_path / "replay")


# The process forks before every save, so the interpreter starts only once. The child tells when it begins and ends; it
# is killed in between. Three folders take turns at random: what they share are hard links.
KILL = """
import os, pathlib, random, select, signal, sys, time
import numpy as np
from phyxdream.errors import CheckpointError
from phyxdream.replay import Replay

path, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
path.mkdir()
ENVS, ROWS, SIZE = 2, 600, 48_000
SPEC = {"image": ((SIZE,), "uint8"), "is_first": ((), "bool")}
LATENTS = {"code": ((3,), "float32")}
noise = np.random.default_rng(0).integers(0, 256, SIZE + 256, np.uint8)


def add(replay, begin, end):
    for number in range(begin, end):
        image = np.stack([noise[(number * 7 + env * 31) % 256 :][:SIZE] for env in range(ENVS)])
        replay.add({"image": image, "is_first": [number % 10 == 0] * ENVS})


def write_back(replay, end, turn):
    ids = np.array([env << 40 | number for env in range(ENVS) for number in range(max(0, end - ROWS), end, 97)])
    replay.update(ids, code=np.full((len(ids), 3), turn, np.float32))


def check(replay, end, turn):
    assert replay.total_added == ENVS * end, (replay.total_added, end)
    first = max(0, end - ROWS)
    for env in range(ENVS):
        steps = replay.read(env, first, end - first)
        for number, image in enumerate(steps["image"].numpy(), first):
            begin = (number * 7 + env * 31) % 256
            assert (image == noise[begin : begin + SIZE]).all()
        assert (steps["code"].numpy()[::97] == turn).all()


def attempt(replay, folder, wait):
    "Saves in a child that is killed after `wait` seconds; how long the save took, None if it did not end."
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(tell, b"x")
            replay.save(folder)
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.read(told, 1)
    begin = time.perf_counter()
    ended = bool(select.select([told], [], [], wait)[0])
    took = time.perf_counter() - begin
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(told)
    os.close(tell)
    return took if ended else None


random.seed(5)
replay = Replay(SPEC, ENVS * ROWS, ENVS, latents=LATENTS)
folders = dict.fromkeys(["a", "b", "c"])  # end and turn of the snapshot there
end, turn, patience = 0, 0, 1.0
old = new = none = 0
while old + new + none < kills:
    more = random.choice([40, ROWS])  # a little is new, or everything
    add(replay, end, end + more)
    end, turn = end + more, turn + 1
    write_back(replay, end, turn)
    folder = random.choice(list(folders))
    took = attempt(replay, path / folder, random.uniform(0, patience))
    patience = patience * 1.15 if took is None else (patience + took) / 2  # so that about half are killed in time
    try:
        loaded = Replay.load(path / folder)
    except CheckpointError:
        assert folders[folder] is None and took is None
        none += 1
        continue
    is_new = loaded.total_added == ENVS * end
    assert is_new or took is None
    check(loaded, *((end, turn) if is_new else folders[folder]))
    if is_new:
        folders[folder] = end, turn
    if took is None:
        old, new = old + (not is_new), new + is_new
    if is_new and random.random() < 0.7:
        replay = loaded  # which knows what is written there
for folder, state in folders.items():
    if state is not None:
        check(Replay.load(path / folder), *state)
    replay.save(path / folder)  # whatever the killed ones left there
    check(Replay.load(path / folder), end, turn)
    size = sum(file.stat().st_size for file in (path / folder).rglob("*"))
    assert size < 1.5 * replay.nbytes, size  # and it is gone
print(old, new, none)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_of_saving(tmp_path):
    done = run_apart(KILL, tmp_path / "replay", 50)
    assert done.returncode == 0, done.stderr
    old, new, none = map(int, done.stdout.split())
    assert old + new + none == 50 and old > 5
