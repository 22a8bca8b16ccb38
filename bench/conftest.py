"""`pytest bench/`: every case of every suite, once per contender, under pytest-benchmark.

For looking closer: `-k`, `--benchmark-compare`, `--benchmark-histogram`, `--benchmark-json`. What lies under
bench/results/ comes from `phyxdream bench`, which lets contenders take turns.
"""

import pytest
import torch

from phyxdream.bench import suite, timing
from phyxdream.errors import MissingDependency
from phyxdream.train.memory import keep_freed_memory

# As training does. Without it, page faults on fresh tensors hide what large sizes cost, and vary from run to run.
keep_freed_memory()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser):
    parser.addoption("--compile", action="store_true", help="the reference under torch.compile too (minutes)")
    parser.addoption("--size", help="cases of this size alone, also where it only runs when asked for")


def pytest_pycollect_makeitem(collector, name, obj):
    if not isinstance(obj, suite.Suite):
        return None
    size, compile = (collector.config.getoption(option) for option in ("--size", "--compile"))
    return [
        pytest.Function.from_parent(collector, name=f"{case} {contender}", callobj=bench_of(case, contender))
        for case in obj.cases
        if (case.size == size if size else case.default)
        for contender in case.contenders(DEVICE, compile)
    ]


def bench_of(case, name):
    def bench(benchmark):
        try:
            with suite.enter(case, DEVICE, [name]) as entry:
                if name in entry.skipped:
                    pytest.skip(entry.skipped[name])
                contender, clock = entry.contenders[0], timing.clock_for(DEVICE)
                calls, rounds = timing.plan({name: timing.warm(contender, clock)}, budget=1.0, fewest=3)
                benchmark.group = f"{case}: {case.label}"
                with contender.context():
                    benchmark.pedantic(synchronized(contender.run), iterations=calls[name], rounds=rounds)
        except MissingDependency as error:
            pytest.skip(str(error))

    return bench


def synchronized(run):
    """pytest-benchmark has the host's clock alone."""
    return run if DEVICE.type == "cpu" else lambda: (run(), torch.cuda.synchronize())
