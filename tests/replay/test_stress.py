"""Everybody at once: nobody ever sees a sequence that was not written like that."""

import threading
import time

import numpy as np
import pytest
import torch

from phyxdream.replay import Replay

STEPS = 1_000_000  # sampled by each run


@pytest.mark.parametrize("place", ["memory", "directory"])
def test_writers_readers_write_back_and_save_at_once(coded, place, tmp_path):
    envs, rooms, failures, stop = 8, 150, [], threading.Event()
    (tmp_path / "room").mkdir()
    directory = tmp_path / "room" if place == "directory" else None
    replay = Replay(coded.spec, envs * rooms, envs, latents=coded.latents, directory=directory)
    numbers, sampled, saved, written = np.zeros(envs, np.int64), [0] * 4, [0], [0]
    coded.fill(replay, numbers, 70)

    def guarded(work, *arguments):
        def run():
            try:
                work(*arguments)
            except BaseException as error:
                failures.append(error)
                stop.set()

        return threading.Thread(target=run)

    def write(mine, seed):
        """Steps of some of the envs that are `mine`, in any order, as asynchronous environments give them."""
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            chosen = rng.permutation(mine)[: rng.integers(1, len(mine) + 1)]
            replay.add(coded.step(chosen, numbers[chosen]), chosen)
            numbers[chosen] += 1
            if numbers[mine].min() > 900_000:
                time.sleep(0.01)

    def check(batch, reader):
        coded.check(batch)
        # Latents are zeros or of one write, whole, and of their own step.
        salts = batch["deter"][..., 2].numpy().astype(np.int64)
        expected = coded.latent(batch["step_id"].numpy(), salts)
        for name, value in expected.items():
            value = torch.as_tensor(value)
            value[torch.from_numpy(salts == 0)] = 0
            assert torch.equal(batch[name], value), name
        written[0] += int((salts > 0).sum())
        sampled[reader] += batch["step_id"].numel()
        if sum(sampled) >= STEPS and saved[0] >= 3 and numbers.min() > 6 * rooms:
            stop.set()

    def read(reader):
        rng = np.random.default_rng(reader)
        while not stop.is_set():
            length = int(rng.integers(1, 65))
            check(replay.sample(1024 // length, length, online=bool(rng.integers(2))), reader)

    def load(reader, prefetch, threads):
        with replay.loader(16, 64, prefetch=prefetch, threads=threads) as loader:
            while not stop.is_set():
                check(next(loader), reader)

    def write_back():
        salt = 0
        while not stop.is_set():
            ids = replay.sample(32, 16)["step_id"]
            salt = salt % 60 + 1
            replay.update(ids, **coded.latent(ids.numpy(), salt))

    def save():
        while not stop.is_set():
            replay.save(tmp_path / "snapshot")
            loaded = Replay.load(tmp_path / "snapshot")
            coded.check(loaded.sample(16, 64))
            loaded.close()
            saved[0] += 1

    threads = [guarded(write, np.arange(envs)[i::4], i) for i in range(4)]
    threads += [guarded(read, 0), guarded(read, 1), guarded(load, 2, 2, 2), guarded(load, 3, 0, 1)]
    threads += [guarded(write_back), guarded(save)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]
    assert sum(sampled) >= STEPS and min(sampled) > 0 and saved[0] >= 3 and numbers.min() > 6 * rooms
    assert written[0] > 0
    assert replay.total_added == numbers.sum() and len(replay) == envs * rooms
    env, number = coded.check(replay.sample(100, rooms), ends=numbers)
    assert (number[-1] == numbers[env[0]] - 1).all()
