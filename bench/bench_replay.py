"""The replay beside a memcpy of the same slices, NumPy, cpprb, torchrl, sheeprl and DreamerV3's way, in one run.

    python -m phyxdream.bench.bench_replay [--steps 100000] [--rounds 15] [--save NAME]
    phyxdream bench replay                             (the replay beside memcpy and NumPy, small)

A batch is 16 sequences of 64 steps of a 64×64×3 uint8 image, 6 float32 actions, a reward and is_first: 12.6 MB. All
hold the same steps of 8 environments in a full buffer (12 GB in all at the default), and one batch of each is checked:
shapes, types, and steps that follow one another. Rounds are interleaved; figures are medians, ratios are medians of
the ratio within a round. cpprb, torchrl and sheeprl are optional. The process keeps the memory it frees, as training
does, which helps all who return new arrays. Any other load upsets torch's threads, and with them torchrl, most.

"DreamerV3's way" and "sheeprl's way up to 0.5" are our own imitations of how these touch memory. The first keeps chunks
of 1024 steps per environment and a dict of all sequences, and assembles a batch piece by piece, without the locks,
timers and ids of the original; the second lists all valid starts of a full buffer anew for every sample.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import importlib.util
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phyxdream.bench.results import FOLDER, machine
from phyxdream.bench.suite import Case, Rivals, Suite, Work
from phyxdream.errors import MissingDependency
from phyxdream.replay import Replay
from phyxdream.train.memory import keep_freed_memory

BATCH, LENGTH, ENVS, EPISODE = 16, 64, 8, 500
REST = {"action": ((6,), "float32"), "reward": ((), "float32"), "is_first": ((), "bool")}
IMAGE = {"image": ((3, 64, 64), "uint8"), **REST}
CATCH = {"image": ((10, 5), "float32"), **REST}
LATENTS = {"deter": ((2048,), "float32")}
# DreamerV3's own replay, 8 KB latents written back, on two cores of an AMD EPYC virtual machine on which the floor
# made 1770 batches/s: 344-354 batches/s.
DREAMER_WRITE_BACK, DREAMER_FLOOR = 349, 1770
FLOOR, OLD_SHEEPRL, DREAMER = (
    "memcpy per sequence (floor)",
    "sheeprl's way up to 0.5 (imitated)",
    "DreamerV3's way (imitated)",
)
Task = Callable[[], Any]

FLOOR_SOURCE = r"""
#include <cstring>
#include <thread>
// One memcpy per sequence and key between columns (step, item) and arrays (sequence, length, item), used in turn.
extern "C" void slices(size_t keys, char** columns, char** arrays, const size_t* items, size_t sequences,
                       const size_t* starts, size_t batch, size_t length, bool back, bool two_threads) {
  auto part = [=](size_t begin, size_t end) {
    for (size_t k = 0; k < keys; ++k)
      for (size_t b = begin; b < end; ++b) {
        char *stored = columns[k] + starts[b] * items[k], *array = arrays[k] + b % sequences * length * items[k];
        std::memcpy(back ? stored : array, back ? array : stored, length * items[k]);
      }
  };
  if (!two_threads) return part(0, batch);
  std::thread other(part, batch / 2, batch);
  part(0, batch / 2);
  other.join();
}
"""


@functools.cache
def native_slices() -> Any:
    compiler = shutil.which("c++")
    if not compiler:
        raise MissingDependency("the floor needs a C++ compiler called c++")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "floor.cpp").write_text(FLOOR_SOURCE)
        command = [compiler, "-O3", "-std=c++17", "-pthread", "-shared", "-fPIC", "floor.cpp", "-o", "floor.so"]
        subprocess.run(command, cwd=folder, check=True)
        function = ctypes.CDLL(f"{folder}/floor.so").slices
    pointer, size, flag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool
    function.argtypes = [size, pointer, pointer, pointer, size, pointer, size, size, flag, flag]
    function.restype = None
    return function


def slices(columns: list[np.ndarray], arrays: list[np.ndarray], back: bool = False, threads: int = 1) -> Callable:
    """The floor between (env, row, ...) columns and (sequence, length, ...) arrays, for starts env * rows + row."""
    function, kind = native_slices(), ctypes.c_size_t * len(columns)
    stored, used = (kind(*(a.ctypes.data for a in group)) for group in (columns, arrays))
    items = kind(*(column[0, 0].nbytes for column in columns))

    def run(starts: np.ndarray) -> None:
        (sequences, length), keys = arrays[0].shape[:2], len(columns)
        function(keys, stored, used, items, sequences, starts.ctypes.data, len(starts), length, back, threads == 2)

    return run


@functools.cache
def peer(name: str) -> Any:
    """The module, or None with a line about it."""
    try:
        if name.startswith("sheeprl") and (found := importlib.util.find_spec("sheeprl")):
            # Its __init__ imports every algorithm, and with them far more packages than the buffers need.
            package = sys.modules["sheeprl"] = types.ModuleType("sheeprl")
            package.__path__ = list(found.submodule_search_locations)
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is left out: {error}")


# ---- Who takes part. `fill` takes (time, env, ...) arrays, `adder` such arrays of one step, to put in again and again.


class Ours:
    name, time_major = "phyxdream", True

    def __init__(self, spec: dict, rows: int, latents: dict | None = None) -> None:
        self.keys = [*spec, *(latents or ())]
        self.replay = Replay(spec, capacity=rows * ENVS, num_envs=ENVS, seed=0, latents=latents)

    def fill(self, block: dict) -> None:
        for t in range(len(block["reward"])):
            self.replay.add({key: block[key][t] for key in self.keys})

    def adder(self, block: dict) -> Task:
        return functools.partial(self.replay.add, {key: block[key][0] for key in self.keys})

    def sample(self) -> dict:
        return self.replay.sample(BATCH, LENGTH)


class Cpprb:
    """Rows (time, env) in one buffer; the indices of the sequences are computed here, cpprb gathers them."""

    module, time_major = "cpprb", False

    def __init__(self, spec: dict, rows: int) -> None:
        self.name, self.rows, self.rng = f"cpprb {version('cpprb')}", rows, np.random.default_rng(0)
        columns = {key: {"shape": shape or 1, "dtype": np.dtype(dtype)} for key, (shape, dtype) in spec.items()}
        self.buffer = peer("cpprb").ReplayBuffer(rows * ENVS, columns)

    def fill(self, block: dict) -> None:
        self.adder(block)()

    def adder(self, block: dict) -> Task:
        return functools.partial(self.buffer.add, **{k: v.reshape(-1, *v.shape[2:]) for k, v in block.items()})

    def sample(self) -> dict:
        first = self.buffer.get_next_index() // ENVS + self.rng.integers(self.rows - LENGTH + 1, size=BATCH)
        rows = (first[:, None] + np.arange(LENGTH)) % self.rows
        return self.buffer._encode_sample((rows * ENVS + self.rng.integers(ENVS, size=(BATCH, 1))).ravel())


class Torchrl:
    """Storage (time, env), ends of episodes by an end key, nothing written into the samples."""

    module, time_major, cached = "torchrl.data", False, False

    def __init__(self, spec: dict, rows: int) -> None:
        data = peer(self.module)
        logging.getLogger("torchrl").setLevel(logging.WARNING)
        self.name = f"torchrl {version('torchrl')}" + (", ends cached" if self.cached else "")
        options = {"end_key": "done", "init_key": None, "truncated_key": None, "cache_values": self.cached}
        sampler = data.SliceSampler(slice_len=LENGTH, strict_length=True, **options)
        storage = data.LazyTensorStorage(rows * ENVS, ndim=2)
        self.buffer = data.ReplayBuffer(storage=storage, sampler=sampler, batch_size=BATCH * LENGTH, dim_extend=0)

    def fill(self, block: dict) -> None:
        self.adder(block)()

    def adder(self, block: dict) -> Task:
        done = block["reward"] % EPISODE == EPISODE - 1
        tensors = {key: torch.from_numpy(value) for key, value in {**block, "done": done}.items()}
        return functools.partial(self.buffer.extend, peer("tensordict").TensorDict(tensors, block["reward"].shape))

    def sample(self) -> dict:
        return self.buffer.sample()


class TorchrlCached(Torchrl):
    """The ends are found once, which holds until the next `extend`: for data that stay as they are."""

    cached = True


class Sheeprl:
    module, time_major = "sheeprl.data.buffers", True

    def __init__(self, spec: dict, rows: int) -> None:
        buffers, self.name = peer(self.module), f"sheeprl {version('sheeprl')}"
        self.buffer = buffers.EnvIndependentReplayBuffer(rows, ENVS, buffer_cls=buffers.SequentialReplayBuffer, seed=0)

    def fill(self, block: dict) -> None:
        self.buffer.add(block)

    def adder(self, block: dict) -> Task:
        return functools.partial(self.buffer.add, block)

    def sample(self) -> dict:
        return self.buffer.sample_tensors(BATCH, sequence_length=LENGTH, from_numpy=True)


def peers(spec: dict, rows: int, without: type | None = None) -> list:
    kinds = [kind for kind in (Cpprb, Torchrl, TorchrlCached, Sheeprl) if kind is not without]
    return [kind(spec, rows) for kind in kinds if peer(kind.module)]


class Columns:
    """Plain (env, time, ...) arrays, oldest step first: what the floor, NumPy and the imitations read."""

    def __init__(self, spec: dict, rows: int) -> None:
        self.rows, self.rng = rows, np.random.default_rng(0)
        self.data = {key: np.ones((ENVS, rows, *shape), dtype) for key, (shape, dtype) in spec.items()}
        self.outputs = {key: np.ones((BATCH, LENGTH, *shape), dtype) for key, (shape, dtype) in spec.items()}

    def fill(self, block: dict) -> None:
        row = block["reward"][:, 0].astype(int) - self.rows // 4  # the others have overwritten the oldest quarter
        for key, column in self.data.items():
            column[:, row[row >= 0]] = block[key][row >= 0].swapaxes(0, 1)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rng.integers(ENVS, size=BATCH), self.rng.integers(self.rows - LENGTH + 1, size=BATCH)

    def floor(self, keys: dict, written: dict | None = None, threads: int = 1) -> Task:
        copies = [slices([self.data[k] for k in keys], [self.outputs[k] for k in keys], threads=threads)]
        if written:
            copies.append(slices([self.data[k] for k in written], list(written.values()), back=True))

        def run() -> dict:
            env, start = self.draw()
            starts = env * self.rows + start
            for copy in copies:
                copy(starts)
            return self.outputs

        return run

    def slice_loop(self) -> dict:
        for b, (env, start) in enumerate(zip(*self.draw(), strict=True)):
            for key, column in self.data.items():
                self.outputs[key][b] = column[env, start : start + LENGTH]
        return self.outputs

    def fancy_index(self) -> dict:
        env, start = self.draw()
        return {key: column[env[:, None], start[:, None] + np.arange(LENGTH)] for key, column in self.data.items()}

    def old_sheeprl(self) -> dict:
        """Each environment gives its share of the batch, of starts listed anew; the shares are concatenated."""
        parts = []
        for env, share in enumerate(np.bincount(self.rng.integers(ENVS, size=BATCH), minlength=ENVS)):
            if share:
                valid = np.array(list(range(self.rows - LENGTH + 1)), np.intp)
                start = valid[self.rng.integers(len(valid), size=share)]
                index = (start[:, None] + np.arange(LENGTH)).ravel()
                taken = {key: np.take(column[env], index, axis=0) for key, column in self.data.items()}
                parts.append({k: v.reshape(share, LENGTH, *v.shape[1:]).swapaxes(0, 1) for k, v in taken.items()})
        return {k: torch.from_numpy(np.concatenate([part[k] for part in parts], axis=1)) for k in self.data}


class Chunks:
    """DreamerV3's way; see the module's docstring. The chunks are cut from `Columns`."""

    size = 1024

    def __init__(self, columns: Columns) -> None:
        self.rng, per_env = columns.rng, -(-columns.rows // self.size)
        cuts = [(env, chunk * self.size) for env in range(ENVS) for chunk in range(per_env)]
        self.chunks = [{k: v[env, at : at + self.size] for k, v in columns.data.items()} for env, at in cuts]
        starts = [divmod(row, self.size) for row in range(columns.rows - LENGTH + 1)]
        self.items = dict(enumerate((env * per_env + chunk, at) for env in range(ENVS) for chunk, at in starts))

    def pieces(self, chunk: int, offset: int):
        """One sequence: (chunk, slice there, slice in the sequence) for every chunk it lies in."""
        done = 0
        while done < LENGTH:
            count = min(LENGTH - done, len(self.chunks[chunk]["reward"]) - offset)
            yield self.chunks[chunk], slice(offset, offset + count), slice(done, done + count)
            chunk, offset, done = chunk + 1, 0, done + count

    def sample(self) -> dict:
        places = [self.items[item] for item in self.rng.integers(len(self.items), size=BATCH).tolist()]
        batch = {k: np.empty((BATCH, LENGTH, *v.shape[1:]), v.dtype) for k, v in self.chunks[0].items()}
        for b, place in enumerate(places):
            for chunk, there, here in self.pieces(*place):
                for key, column in chunk.items():
                    batch[key][b, here] = column[there]
        return {**batch, "places": places}

    def update(self, places: list, written: dict) -> None:
        for b, place in enumerate(places):
            for chunk, there, here in self.pieces(*place):
                for key, value in written.items():
                    chunk[key][there] = value[b, here]


# ---- The same steps for all, and the check that they come back.


def fill(spec: dict, rows: int, stores: list) -> None:
    """Full, and a quarter over. The reward counts the steps, action[0] is the env, the image begins with the step."""
    rng, total = np.random.default_rng(0), rows + rows // 4
    block = {k: rng.integers(0, 2, (128, ENVS, *s), np.uint8).astype(dtype) for k, (s, dtype) in spec.items()}
    block["action"][..., 0] = np.arange(ENVS)
    for first in range(0, total, 128):
        step = np.arange(first, min(first + 128, total))
        block = {key: value[: len(step)] for key, value in block.items()}
        block["reward"][:] = step[:, None]
        block["is_first"][:] = (step % EPISODE == 0)[:, None]
        block["image"].reshape(len(step), ENVS, -1)[..., 0] = (step % 256)[:, None]
        for store in stores:
            store.fill(block)


def check(name: str, spec: dict, batch: dict, time_major: bool) -> None:
    """Shapes and types are right, and every sequence is a contiguous piece of one environment."""
    lead, arrays = ((LENGTH, BATCH) if time_major else (BATCH, LENGTH)), {}
    for key, (shape, dtype) in spec.items():
        assert str(batch[key].dtype).removeprefix("torch.") == dtype, f"{name}: {key} is {batch[key].dtype}"
        value = np.asarray(batch[key]).reshape(*lead, *shape)
        arrays[key] = value if time_major else value.swapaxes(0, 1)
    step, env, image = arrays["reward"], arrays["action"][..., 0], arrays["image"].reshape(LENGTH, BATCH, -1)
    assert (np.diff(step, axis=0) == 1).all() and (env == env[0]).all(), f"{name}: not contiguous"
    assert (image[..., 0] == step % 256).all() and (arrays["is_first"] == (step % EPISODE == 0)).all(), name
    assert len(np.unique(step[0])) > 1, f"{name}: one sequence again and again"


# ---- Measuring.


def measure(tasks: dict[str, Task], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds per call of every task, one figure a round, the tasks taking turns there and back."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds):
        for name in list(tasks)[:: -1 if i % 2 else 1]:
            task = tasks[name]
            time.sleep(0.003)  # the threads of the one before come to rest,
            for _ in range(4):
                task()  # and what a loader has prefetched meanwhile is used up
            begin = time.perf_counter()
            for _ in range(calls):
                task()
            seconds[name].append((time.perf_counter() - begin) / calls)
    return seconds


def ratio(seconds: dict[str, list[float]], slower: str, faster: str) -> float:
    return statistics.median(s / f for s, f in zip(seconds[slower], seconds[faster], strict=True))


def size_of(spec: dict) -> int:
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spec.values())


class Report:
    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.rows: list[dict] = []
        self.ratios: dict[str, float] = {}
        self.fills: dict[str, dict] = {}

    def table(self, group: str, seconds: dict, unit: str, per_call: int, size: float, floor: str = "") -> None:
        """`per_call` of `unit` and `size` bytes go through a call."""
        print(f"\n{group}\n{'':36}{'median ' + unit:>18}{'best':>12}{'ms a call':>11}{'GB/s':>7}{'of floor':>10}")
        for name, values in seconds.items():
            median, (low, _, high) = statistics.median(values), statistics.quantiles(values, n=4)
            row = {"group": group, "name": name, "median_seconds": median, "iqr_seconds": high - low}
            row |= {"rounds": len(values), "unit": unit, "per_second": per_call / median}
            figures = f"{per_call / median:>18,.0f}{per_call / min(values):>12,.0f}{median * 1e3:>11.4f}"
            figures += f"{size / median / 1e9:>7.1f}"
            if floor:
                row["of_floor"] = ratio(seconds, floor, name)
                figures += f"{row['of_floor']:>10.2f}"
            self.rows.append(row)
            print(f"{name:36}{figures}", flush=True)

    def save(self, name: str) -> None:
        result = {"machine": machine() | {"load before": self.load}, "benchmarks": self.rows}
        result |= {"ratios": self.ratios, "fill": self.fills}
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.plot(FOLDER / f"{name}.png")

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots(1, len(self.fills), sharey=True)
        for ax, (label, fill) in zip(axes, self.fills.items(), strict=True):
            for name, points in fill["milliseconds"].items():
                style = {"color": "black", "linewidth": 2.5, "zorder": 3} if name == Ours.name else {"linewidth": 1.3}
                dashes = "--" if "cached" in name else "-"
                ax.plot(fill["steps"], points, dashes, marker="o", markersize=4, label=name, **style)
            ax.set(xscale="log", yscale="log", title=label, xlabel="steps in the full buffer")
            ax.grid(alpha=0.3, which="both", linewidth=0.5)
        axes[0].set_ylabel(f"milliseconds per batch of {BATCH}×{LENGTH}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        figure.savefig(path, dpi=130)


def bench_sample(report: Report, rows: int, rounds: int) -> None:
    ours, columns, others = Ours(IMAGE, rows), Columns(IMAGE, rows), peers(IMAGE, rows)
    fill(IMAGE, rows, [ours, columns, *others])
    mine, ahead = "phyxdream sample, new tensors", "phyxdream loader, prefetch 2"
    loaders = {
        "phyxdream loader, prefetch 0": ours.replay.loader(BATCH, LENGTH, prefetch=0),
        ahead: ours.replay.loader(BATCH, LENGTH, prefetch=2, threads=1),
        "phyxdream loader, prefetch 2, 2 thr.": ours.replay.loader(BATCH, LENGTH, prefetch=2, threads=2),
    }
    tasks: dict[str, Task] = {FLOOR: columns.floor(IMAGE), "memcpy, 2 threads": columns.floor(IMAGE, threads=2)}
    tasks |= {name: functools.partial(next, loader) for name, loader in loaders.items()} | {mine: ours.sample}
    tasks |= {"NumPy slice loop, reused arrays": columns.slice_loop, "NumPy fancy index": columns.fancy_index}
    tasks |= {DREAMER: Chunks(columns).sample, OLD_SHEEPRL: columns.old_sheeprl} | {p.name: p.sample for p in others}
    time_major = {*loaders, mine, OLD_SHEEPRL, *(p.name for p in others if p.time_major)}
    for name, task in tasks.items():
        check(name, IMAGE, task(), name in time_major)
    for name, loader in loaders.items():
        places = {next(loader)["image"].data_ptr() for _ in range(12)}
        assert len(places) <= 3, f"{name}: batches lie in {len(places)} places, so they are copied once more"
    seconds = measure(tasks, rounds, calls=20)
    group = f"sample: {BATCH}x{LENGTH} of 64x64x3 from {rows * ENVS:,} steps"
    report.table(group, seconds, "batches/s", 1, BATCH * LENGTH * size_of(IMAGE), FLOOR)
    for name in (mine, *loaders):
        report.ratios[f"{name}: share of the floor's speed"] = ratio(seconds, FLOOR, name)
    for name in (mine, ahead):
        for other in (DREAMER, OLD_SHEEPRL, *(p.name for p in others)):
            report.ratios[f"{name}: times {other}"] = ratio(seconds, other, name)
    for loader in loaders.values():
        loader.close()
    for threads in sorted({1, torch.get_num_threads()}, reverse=True):
        bench_hiding(report, ours.replay, threads, rounds)


def bench_hiding(report: Report, replay: Replay, threads: int, rounds: int) -> None:
    """A train step of 0.1 s of matrix products, with and without sampling."""
    default = torch.get_num_threads()
    torch.set_num_threads(threads)
    matrix, waits = torch.randn(512, 512), []
    products = round(0.1 / min(measure({"": lambda: matrix @ matrix}, 10, calls=10)[""]))

    def train() -> None:
        for _ in range(products):
            matrix @ matrix

    def sample() -> None:
        replay.sample(BATCH, LENGTH)

    with replay.loader(BATCH, LENGTH, prefetch=2, threads=1) as loader:

        def load() -> None:
            begin = time.perf_counter()
            next(loader)
            waits.append(time.perf_counter() - begin)

        tasks = {"train step": train, "train step + sample": lambda: (sample(), train())}
        tasks |= {"train step + loader": lambda: (load(), train()), "sample": sample}
        seconds = measure(tasks, rounds, calls=4)
    slower = ratio(seconds, "train step + loader", "train step") - 1
    report.ratios[f"loader: share added to a train step on {threads} torch thread(s)"] = slower
    seconds["next(loader), between train steps"] = waits
    size = BATCH * LENGTH * size_of(IMAGE)
    report.table(f"hiding behind a train step on {threads} torch thread(s)", seconds, "calls/s", 1, size)
    torch.set_num_threads(default)


def bench_write_back(report: Report, rows: int, rounds: int) -> None:
    spec, (width,) = IMAGE | LATENTS, LATENTS["deter"][0]
    ours, columns = Ours(IMAGE, rows, LATENTS), Columns(spec, rows)
    fill(spec, rows, [ours, columns])
    chunks, deter = Chunks(columns), torch.full((LENGTH, BATCH, width), 2.0)
    written = {"deter": np.full((BATCH, LENGTH, width), 2, np.float32)}

    def with_update(take: Task) -> Task:
        def run() -> dict:
            batch = take()
            assert ours.replay.update(batch["step_id"], deter=deter) == BATCH * LENGTH
            return batch

        return run

    def imitated() -> dict:
        batch = chunks.sample()
        chunks.update(batch["places"], written)
        return batch

    plain = "memcpy per sequence, no latents"
    with ours.replay.loader(BATCH, LENGTH, prefetch=0) as own, ours.replay.loader(BATCH, LENGTH, prefetch=2) as ahead:
        mine = {
            "phyxdream sample + update": with_update(ours.sample),
            "phyxdream loader, prefetch 0 + update": with_update(functools.partial(next, own)),
            "phyxdream loader, prefetch 2 + update": with_update(functools.partial(next, ahead)),
        }
        tasks = {FLOOR: columns.floor(spec, written), plain: columns.floor(IMAGE)} | mine | {DREAMER: imitated}
        for name, task in tasks.items():
            check(name, IMAGE, task(), name in mine)
        seconds = measure(tasks, rounds, calls=20)
    assert (ours.sample()["deter"] == 2).any() and (chunks.sample()["deter"] == 2).any(), "nothing was written back"
    group = f"sample and write 8 KB a step back, {rows * ENVS:,} steps"
    report.table(group, seconds, "batches/s", 1, BATCH * LENGTH * (size_of(spec) + size_of(LATENTS)), FLOOR)
    scale = DREAMER_FLOOR / DREAMER_WRITE_BACK
    for name in mine:
        report.ratios[f"{name}: times {DREAMER}"] = ratio(seconds, DREAMER, name)
        report.ratios[f"{name}: times DreamerV3's own, scaled by the floor"] = ratio(seconds, plain, name) * scale


def bench_add(report: Report, label: str, spec: dict, rows: int, rounds: int) -> None:
    """Adding into a full buffer, where no page is new; each gets the step in its own container, made beforehand."""
    stores, columns, calls = [Ours(spec, rows), *peers(spec, rows, without=TorchrlCached)], Columns(spec, rows), 200
    fill(spec, rows, stores)
    block = {key: np.ones((1, ENVS, *shape), dtype) for key, (shape, dtype) in spec.items()}
    copy = slices(list(columns.data.values()), [value.swapaxes(0, 1) for value in block.values()], back=True)
    env_starts, ring, head = (
        np.arange(ENVS) * rows,
        {k: np.ones((rows, *v.shape[1:]), v.dtype) for k, v in block.items()},
        0,
    )

    def memcpy() -> None:
        nonlocal head
        copy(((np.arange(head, head + calls) % rows)[:, None] + env_starts).ravel())
        head += calls

    def numpy_add() -> None:
        nonlocal head
        for key, value in block.items():
            ring[key][head % rows] = value[0]
        head += 1

    def repeated(add: Task) -> Task:
        def run() -> None:
            for _ in range(calls):
                add()

        return run

    floor = "memcpy per env and key (floor)"
    adders = {"NumPy ring": numpy_add} | {store.name: store.adder(block) for store in stores}
    tasks = {floor: memcpy} | {name: repeated(add) for name, add in adders.items()}
    seconds = measure(tasks, rounds, calls=2)
    report.table(
        f"add: {label}, {ENVS} envs a call", seconds, "steps/s", calls * ENVS, calls * ENVS * size_of(spec), floor
    )
    report.ratios[f"add {label}: share of the floor's speed"] = ratio(seconds, floor, Ours.name)


def bench_fill(report: Report, label: str, spec: dict, largest: int, rounds: int) -> None:
    sizes = [size for e in (3, 4, 5) for size in (10**e, 3 * 10**e) if size < largest] + [largest]
    lines: dict[str, list[float]] = {}
    for steps in sizes:
        rows = steps // ENVS
        stores, columns = [Ours(spec, rows), *peers(spec, rows, without=Cpprb)], Columns(spec, rows)
        fill(spec, rows, [*stores, columns])
        tasks = {store.name: store.sample for store in stores} | {OLD_SHEEPRL: columns.old_sheeprl}
        for name, values in measure(tasks, rounds, calls=10).items():
            lines.setdefault(name, []).append(statistics.median(values) * 1e3)
    report.fills[label] = {"steps": sizes, "milliseconds": lines}
    print(f"\nms a batch by steps stored, {label}\n{'':36}" + "".join(f"{size:>11,}" for size in sizes))
    for name, points in lines.items():
        print(f"{name:36}" + "".join(f"{point:>11.3f}" for point in points), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of images in the buffer")
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument("--save", metavar="NAME", help=f"write {FOLDER}/NAME.json and NAME.png")
    arguments = parser.parse_args()
    keep_freed_memory()
    rows, rounds, report = arguments.steps // ENVS, arguments.rounds, Report()
    print(f"load before the start: {report.load:.2f} (torch's threads want a machine of their own)")
    bench_sample(report, rows, rounds)
    bench_write_back(report, rows, rounds)
    bench_add(report, "10×5 float32 (Catch)", CATCH, rows, rounds)
    bench_add(report, "64×64×3 uint8", IMAGE, min(rows, 2000), rounds)
    bench_fill(report, "10×5 float32 (Catch)", CATCH, 10 * arguments.steps, rounds)
    bench_fill(report, "64×64×3 uint8", IMAGE, arguments.steps, rounds)
    print()
    for name, value in report.ratios.items():
        print(f"{name:84}{value:>8.3f}")
    if arguments.save:
        report.save(arguments.save)


# ---- Small, for `phyxdream bench`.

# What a step holds, in words and as a spec, and how many steps an environment holds. Bytes are those read and written.
SMALL = {"tiny": ("10×5 float32", CATCH, 200), "pictures": ("64×64×3 uint8", IMAGE, 1000)}


def build(size: str, what: str, device: torch.device) -> Rivals:
    _, spec, rows = SMALL[size]
    ours, columns = Ours(spec, rows, LATENTS), Columns(spec | LATENTS, rows)
    fill(spec | LATENTS, rows, [ours, columns])
    batch = BATCH * LENGTH
    if what == "update":
        step_id, deter = ours.sample()["step_id"], torch.ones(LENGTH, BATCH, *LATENTS["deter"][0])
        runs = {"phyxdream": lambda: ours.replay.update(step_id, deter=deter)}
        return Rivals(runs, Work(2 * batch * size_of(LATENTS), "B"))
    if what == "add":
        step = {key: np.zeros((ENVS, *shape), dtype) for key, (shape, dtype) in spec.items()}
        return Rivals({"phyxdream": lambda: ours.replay.add(step)}, Work(2 * ENVS * size_of(spec), "B"))
    loader = ours.replay.loader(BATCH, LENGTH, prefetch=0)
    runs: dict[str, Task | str] = {"numpy": columns.slice_loop, "sample": ours.sample}
    runs["loader"] = functools.partial(next, loader)
    try:
        runs["memcpy"] = columns.floor(spec | LATENTS)
    except MissingDependency as error:
        runs["memcpy"] = str(error)
    return Rivals(runs, Work(2 * batch * size_of(spec | LATENTS), "B"), loader.close)


SUITE = Suite(
    "replay",
    f"the replay, batches of {BATCH}×{LENGTH} steps with 8 KB of latents",
    tuple(
        Case(what, size, "", functools.partial(build, size, what), f"{label} and latents, {rows * ENVS:,} steps",
             names=("memcpy", "numpy", "sample", "loader") if what == "sample" else ("phyxdream",),
             default=size != "tiny")
        for size, (label, _, rows) in SMALL.items()
        for what in ("sample", "update", "add")
    ),
)  # fmt: skip


if __name__ == "__main__":
    main()
