"""Replay: batches/s of `sample` and steps/s of `add`, beside a NumPy slice loop and bare memcpy in the same run.

    python bench/bench_replay.py [--steps 100000]

One batch is 16 sequences of 64 steps of a 64×64×3 uint8 image, a float32 action (6), a reward and is_first: 12.6 MB.
The rivals write into output arrays they use again and again; `sample` returns new tensors. Rounds are interleaved, so
that a noisy neighbour hits all alike; the table shows medians and the fastest round.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from phyxdream.replay import Replay

BATCH, LENGTH, ENVS = 16, 64, 8
IMAGE = {
    "image": ((3, 64, 64), "uint8"),
    "action": ((6,), "float32"),
    "reward": ((), "float32"),
    "is_first": ((), "bool"),
}
CATCH = {
    "image": ((10, 5), "float32"),
    "action": ((3,), "float32"),
    "reward": ((), "float32"),
    "is_first": ((), "bool"),
}

# `starts` are step numbers in a (steps, item) column, `out` is (batch, length, item): one memcpy per sequence.
FLOOR_SOURCE = r"""
#include <cstddef>
#include <cstring>
extern "C" void slices(const char* column, char* out, const long* starts, size_t batch, size_t length, size_t item) {
  for (size_t b = 0; b < batch; ++b)
    std::memcpy(out + b * length * item, column + starts[b] * item, length * item);
}
"""


def measure(tasks: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds per call of every task, one figure a round, the tasks taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            begin = time.perf_counter()
            for _ in range(calls):
                task()
            seconds[name].append((time.perf_counter() - begin) / calls)
    return seconds


def table(title: str, seconds: dict[str, list[float]], scale: float, unit: str, item_bytes: float) -> None:
    print(f"\n{title}\n{'':34}{'median ' + unit:>18}{'best ' + unit:>18}{'GB/s (median)':>16}")
    for name, values in seconds.items():
        median = statistics.median(values)
        figures = f"{scale / median:>18,.0f}{scale / min(values):>18,.0f}{item_bytes / median / 1e9:>16.1f}"
        print(f"{name:34}{figures}")


def random_step(spec: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One step of every env in the spec's dtypes."""
    return {name: rng.integers(0, 2, (ENVS, *shape)).astype(dtype) for name, (shape, dtype) in spec.items()}


def native_floor(folder: Path, columns: list[np.ndarray], draw: Callable[[], np.ndarray]) -> Callable[[], None] | None:
    """The same sequences by one memcpy each, compiled here; None without a C++ compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    (folder / "floor.cpp").write_text(FLOOR_SOURCE)
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "floor.cpp", "-o", "floor.so"], cwd=folder, check=True)
    slices = ctypes.CDLL(str(folder / "floor.so")).slices
    outputs = [np.empty((BATCH, LENGTH, *c.shape[1:]), c.dtype) for c in columns]

    def run() -> None:
        starts = draw()
        for column, out in zip(columns, outputs, strict=True):
            slices(
                ctypes.c_void_p(column.ctypes.data),
                ctypes.c_void_p(out.ctypes.data),
                ctypes.c_void_p(starts.ctypes.data),
                ctypes.c_size_t(BATCH),
                ctypes.c_size_t(LENGTH),
                ctypes.c_size_t(column.itemsize * int(np.prod(column.shape[1:]))),
            )

    return run


def bench_sample(steps: int) -> None:
    rng = np.random.default_rng(0)
    replay = Replay(IMAGE, capacity=steps, num_envs=ENVS, seed=0)
    step = random_step(IMAGE, rng)
    for _ in range(steps // ENVS):
        replay.add(step)
    columns = [np.ones((steps, *shape), dtype) for shape, dtype in IMAGE.values()]
    outputs = [np.empty((LENGTH, BATCH, *c.shape[1:]), c.dtype) for c in columns]

    def draw() -> np.ndarray:
        return rng.integers(0, steps - LENGTH, BATCH)

    def numpy_loop() -> None:
        for b, start in enumerate(draw()):
            for column, out in zip(columns, outputs, strict=True):
                out[:, b] = column[start : start + LENGTH]

    tasks = {
        "phyxdream, new tensors": lambda: replay.sample(BATCH, LENGTH),
        "NumPy slice loop, time-major": numpy_loop,
    }
    with tempfile.TemporaryDirectory() as folder:
        if floor := native_floor(Path(folder), columns, draw):
            tasks["memcpy per sequence, batch-major"] = floor
        batch_bytes = BATCH * LENGTH * sum(c[0].nbytes for c in columns)
        title = f"sample: {BATCH}x{LENGTH} of 64x64x3, {batch_bytes / 1e6:.1f} MB a batch, {steps:,} steps stored"
        table(title, measure(tasks, rounds=15, calls=20), 1, "batches/s", batch_bytes)


def bench_add(name: str, spec: dict, steps: int) -> None:
    """Adding into a full buffer, where no page is new any more."""
    replay = Replay(spec, capacity=steps, num_envs=ENVS)
    step = random_step(spec, np.random.default_rng(0))
    rings = {key: np.zeros((steps // ENVS, *value.shape), value.dtype) for key, value in step.items()}
    head = 0

    def numpy_ring() -> None:
        nonlocal head
        for key, value in step.items():
            rings[key][head] = value
        head = (head + 1) % (steps // ENVS)

    tasks = {"phyxdream": lambda: replay.add(step), "NumPy ring": numpy_ring}
    measure(tasks, rounds=1, calls=steps // ENVS)
    seconds = measure(tasks, rounds=15, calls=min(2000, steps // ENVS))
    table(f"add: {name}, {ENVS} envs a call", seconds, ENVS, "steps/s", sum(v.nbytes for v in step.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps in the buffer (1.2 GB twice at the default)")
    steps = parser.parse_args().steps // ENVS * ENVS
    bench_sample(steps)
    bench_add("10x5 float32 (Catch)", CATCH, steps)
    bench_add("64x64x3 uint8", IMAGE, min(steps, 16_000))


if __name__ == "__main__":
    main()
