"""`pytest bench/ --benchmark-only --results NAME` writes bench/results/NAME.json: medians, machine, versions, date."""

import json
from pathlib import Path

import pytest

from phyxdream.train.memory import keep_freed_memory
from phyxdream.train.run import environment

# As training does. Without it, page faults on fresh tensors hide what large sizes cost, and vary from run to run.
keep_freed_memory()


def pytest_addoption(parser):
    parser.addoption("--results", metavar="NAME", help="save medians to bench/results/NAME.json")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    name = session.config.getoption("--results")
    benchmarks = [b for b in session.config._benchmarksession.benchmarks if b.stats.rounds > 1]
    if not name or not benchmarks:
        return
    found = environment()
    kept = ("started", "phyxdream", "python", "torch", "triton", "numpy", "platform", "cpu", "cores", "threads", "gpu")
    rows = [
        {
            "group": b.group,
            "name": b.name,
            "median_seconds": b.stats.median,
            "iqr_seconds": b.stats.iqr,
            "rounds": b.stats.rounds,
            **b.extra_info,
        }
        for b in benchmarks
    ]
    path = Path(__file__).parent / "results" / f"{name}.json"
    result = {"machine": {k: found.get(k) for k in kept}, "benchmarks": rows}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
