"""The benches: one `bench_<op>.py` each declares its cases once; `phyxdream bench` and `pytest bench/` run them.

    phyxdream bench                              every suite, on the terminal; JSON and pictures under bench/results/
    phyxdream bench observe --sizes 512 --compile
    pytest bench/bench_rssm_observe.py -k 512    the same cases under pytest-benchmark
    python -m phyxdream.bench.table              the README's tables from bench/results/*.json
    python -m phyxdream.bench.family             its table of the family, from the runs in docs/results/family

All timing is in `timing`, what a case is in `suite`, what a results file holds in `results`. A new suite is a file with
a `SUITE`, and a line below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phyxdream.bench.suite import Suite

SUITES = {
    "observe": "bench_rssm_observe",
    "imagine": "bench_rssm_imagine",
    "step": "bench_rssm_step",
    "kl": "bench_balanced_kl",
    "two_hot": "bench_two_hot_loss",
    "lambda_return": "bench_lambda_return",
    "rms_norm_silu": "bench_rms_norm_silu",
    "slot_attention": "bench_slot_attention",
    "update": "bench_train_step",
    "replay": "bench_replay",
    "envs": "bench_envs",
}
"""Name of a suite to the module that holds it."""


def load_suite(name: str) -> Suite:
    """The suite called `name`, one of `SUITES`.

    >>> load_suite("lambda_return").cases[0].op
    'lambda_return'
    """
    return importlib.import_module(f"phyxdream.bench.{SUITES[name]}").SUITE
