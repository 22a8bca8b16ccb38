import gc
import itertools
import threading

import numpy as np
import pytest
import torch

from phyxdream.replay import Replay
from phyxdream.replay.memory import BatchMemory

SMALL = {"a": ((3, 5), torch.float32), "b": ((7,), torch.bool), "c": ((), torch.int64), "d": ((2, 2), torch.bfloat16)}
LARGE = {"picture": ((16, 3, 512, 512), torch.uint8), "x": ((9,), torch.float64)}


@pytest.mark.parametrize("specs", [SMALL, LARGE])
def test_tensors_are_what_was_asked_for_and_do_not_overlap(specs):
    tensors = BatchMemory().tensors(specs)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == specs
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all((begin - spans[0][0]) % 64 == 0 for begin, _ in spans)
    for i, tensor in enumerate(tensors.values()):
        tensor.fill_(i % 2)
    assert [float(tensor.double().mean()) for tensor in tensors.values()] == [i % 2 for i in range(len(specs))]


@pytest.mark.parametrize("specs", [SMALL, LARGE])
@pytest.mark.parametrize("hold", ["tensor", "view", "numpy", "storage"])
def test_a_block_is_used_again_only_when_nothing_of_it_is_left(specs, hold):
    memory, name = BatchMemory(), next(iter(specs))
    tensors = memory.tensors(specs)
    address = tensors[name].data_ptr()
    kept = {
        "tensor": lambda t: t,
        "view": lambda t: t[1:].flatten(),
        "numpy": lambda t: t.numpy(),
        "storage": lambda t: t.untyped_storage(),
    }[hold](tensors[name])
    del tensors
    gc.collect()
    assert memory.tensors(specs)[name].data_ptr() != address
    del kept
    gc.collect()
    again = [memory.tensors(specs), memory.tensors(specs)]
    assert address in [tensors[name].data_ptr() for tensors in again]
    assert again[0][name].data_ptr() != again[1][name].data_ptr()


def test_few_idle_blocks_are_kept():
    memory = BatchMemory()
    held = [memory.tensors({"x": ((n,), torch.uint8)}) for n in range(1, 20)]
    del held
    gc.collect()
    memory.tensors({"x": ((100,), torch.uint8)})
    assert len(memory._blocks) <= 2


def test_a_kept_batch_is_never_overwritten_by_threads_that_sample():
    replay = Replay({"x": ((3,), "int64"), "is_first": ((), "bool")}, 1000, 1)
    for n in range(1000):
        replay.add({"x": np.full((1, 3), n), "is_first": np.zeros(1, bool)})
    failures = []

    def work():
        kept = []
        for _ in range(300):
            batch = replay.sample(4, 8)
            kept.append((batch["x"], batch["x"].clone()))
            if len(kept) > 3:
                value, copy = kept.pop(0)
                if not torch.equal(value, copy):
                    failures.append((value, copy))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_batch_outlives_its_replay():
    replay = Replay({"x": ((3, 256, 256), "uint8"), "is_first": ((), "bool")}, 64, 1)
    for n in range(64):
        replay.add({"x": np.full((1, 3, 256, 256), n, np.uint8), "is_first": np.zeros(1, bool)})
    batch = replay.sample(2, 32)
    copy = {name: value.clone() for name, value in batch.items()}
    del replay
    gc.collect()
    assert all(torch.equal(batch[name], copy[name]) for name in batch)
