import os
import shutil

import numpy as np
import pytest

from phyxdream.errors import ConfigError
from phyxdream.replay import Prioritized, Replay, Uniform

BIG = {"image": ((1000,), "uint8"), "is_first": ((), "bool")}


def mapped(folder):
    """Lines of this process's memory map that belong to files in `folder`."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if str(folder) in line]


@pytest.mark.parametrize("selector", [Uniform(), Prioritized()])
def test_the_same_as_in_memory(coded, wrapped, same, tmp_path, selector):
    options = {"latents": coded.latents, "selector": selector}
    disk, numbers = wrapped(directory=tmp_path, **options)
    memory, _ = wrapped(**options)
    for _ in range(3):
        for rule in ({}, {"online": True}, {"cross_episodes": False}, {"force_is_first": True}):
            a, b = disk.sample(7, 3, **rule), memory.sample(7, 3, **rule)
            assert same(a, b)
        for replay in (disk, memory):
            assert replay.update(a["step_id"], **coded.latent(a["step_id"].numpy(), 5)) == 21
        for replay in (disk, memory):
            coded.fill(replay, numbers.copy(), 1)
        numbers += 1
        assert same(disk.sample_episodes(4), memory.sample_episodes(4))
    coded.check(disk.sample(30, 6), ends=numbers)
    assert repr(disk) == repr(memory)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_the_file_has_no_name_and_goes_with_the_buffer(tmp_path):
    for folder in (tmp_path, str(tmp_path), bytes(tmp_path)):
        replay = Replay(BIG, 5000, 2, directory=folder)
        replay.add({"image": np.ones((2, 1000), np.uint8), "is_first": [True, True]})
        assert list(tmp_path.iterdir()) == []
        assert mapped(tmp_path)
        del replay
        assert not mapped(tmp_path) and list(tmp_path.iterdir()) == []


def test_the_disk_space_is_reserved_at_once(tmp_path):
    def free():
        status = os.statvfs(tmp_path)
        return status.f_bavail * status.f_frsize

    before = free()
    replay = Replay(BIG, "300MB", 2, directory=tmp_path)
    taken = before - free()
    del replay
    assert taken > 150e6  # others use the disk meanwhile
    assert free() > before - 150e6


def test_a_disk_that_is_too_small(tmp_path):
    size = shutil.disk_usage(tmp_path).free * 2
    with pytest.raises(ConfigError, match=r"directory: |capacity: ") as caught:
        Replay(BIG, size // 1001, 2, directory=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert shutil.disk_usage(tmp_path).free > size / 4


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_is_none(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises((ConfigError, OSError), match="directory: ") as caught:
        Replay(BIG, 100, 2, directory=tmp_path / name)
    assert name in str(caught.value)
    with pytest.raises(TypeError, match="directory"):
        Replay(BIG, 100, 2, directory=5)


def test_snapshots_go_from_memory_to_disk_and_back(coded, wrapped, same, tmp_path):
    for folder in ("room", "other"):
        (tmp_path / folder).mkdir()
    replay, numbers = wrapped(directory=tmp_path / "room", latents=coded.latents)
    replay.update(np.arange(40), **coded.latent(np.arange(40), 2))
    replay.save(tmp_path / "snapshot")
    memory = Replay.load(tmp_path / "snapshot")
    disk = Replay.load(tmp_path / "snapshot", directory=tmp_path / "other")
    assert mapped(tmp_path / "other")
    for _ in range(3):
        batch = replay.sample(7, 3)
        assert same(batch, memory.sample(7, 3)) and same(batch, disk.sample(7, 3))
    coded.check(batch, ends=numbers)
    with pytest.raises((ConfigError, OSError, RuntimeError), match="missing"):
        Replay.load(tmp_path / "snapshot", directory=tmp_path / "missing")
