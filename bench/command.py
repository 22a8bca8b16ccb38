"""`phyxdream bench`: runs suites, shows tables, writes a results file and a picture a suite."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from phyxdream.bench import SUITES, load_suite, results, timing
from phyxdream.bench.results import bytes_text, rate_text, ratio_text, seconds_text, share_text
from phyxdream.bench.suite import Case, Suite, complaint, enter
from phyxdream.errors import ConfigError, suggest
from phyxdream.train.memory import keep_freed_memory

OTHERS, STOLEN, SPREAD = 0.10, 0.02, 0.20  # shares of the machine's time, and IQR over median: more is not quiet
QUICK_SECONDS = 0.2
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Options:
    """What `phyxdream bench` was asked for; see `phyxdream.cli.Bench`."""

    suites: Sequence[str] = ()
    sizes: Sequence[str] = ()
    compile: bool = False
    quick: bool = False
    seconds: float = 2.0
    threads: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    out: Path = results.FOLDER


@dataclass
class Plan:
    """The cases that options choose, by suite."""

    suites: dict[Suite, list[Case]] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Options) -> Plan:
        """Raises ConfigError for an unknown suite, or a size that none of the chosen suites has."""
        for name in options.suites:
            if name not in SUITES:
                raise ConfigError(f"bench: unknown suite {name!r}{suggest(name, SUITES)} (known: {', '.join(SUITES)})")
        suites = [load_suite(name) for name in dict.fromkeys(options.suites or SUITES)]
        known = list(dict.fromkeys(size for suite in suites for size in suite.sizes()))
        for size in options.sizes:
            if size not in known:
                raise ConfigError(f"--sizes: unknown size {size!r}{suggest(size, known)} (known to the chosen suites: "
                                  f"{', '.join(known)})")  # fmt: skip
        chosen = {suite: list(cls._cases(suite, options)) for suite in suites}
        return cls({suite: cases for suite, cases in chosen.items() if cases})

    @staticmethod
    def _cases(suite: Suite, options: Options) -> Iterator[Case]:
        smallest = suite.sizes(default_only=True)[0]
        for case in suite.cases:
            if options.sizes:
                wanted = case.size in options.sizes
            else:
                wanted = case.default and (not options.quick or case.size == smallest)
            # What has contenders of its own (a training step, the replay) computes in what it computes in.
            if wanted and not (case.names and options.dtype != "float32"):
                yield case


def run(options: Options, console: Console | None = None) -> Path:
    """Run what `options` choose; returns the path of the results file.

    Raises:
        ConfigError: an option that cannot be used, before anything runs.
        ResultsError: the results cannot be written.
    """
    console = console or Console(highlight=False)
    plan, device = Plan.of(options), _device(options.device)
    if not 0 < options.seconds < float("inf"):
        raise ConfigError(f"--seconds: expected a positive number, got {options.seconds}")
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads: expected at least 1, got {options.threads}")
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {options.dtype!r}"
                          f"{suggest(options.dtype, DTYPES)}")  # fmt: skip
    if not plan.suites:
        raise ConfigError(f"--dtype: none of the chosen suites is one of {options.dtype}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {options.out} cannot be made: {error.strerror or error}") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    keep_freed_memory()  # as training does; otherwise page faults on fresh tensors hide what large sizes cost
    try:
        return _Session(options, plan, device, console).run()
    finally:
        torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: 'cuda' was asked for, but no CUDA device is available")
    return torch.device(name)


class _Session:
    """One run of the command."""

    def __init__(self, options: Options, plan: Plan, device: torch.device, console: Console):
        self.options, self.plan, self.device, self.console = options, plan, device, console
        self.budget, self.fewest = (QUICK_SECONDS, 3) if options.quick else (options.seconds, 5)
        self.dtype = getattr(torch, options.dtype)
        self.clock = timing.clock_for(device)
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        # Drawn between cases alone: a thread that draws ten times a second would be timed along.
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeElapsedColumn(), console=console, auto_refresh=False, transient=True)  # fmt: skip

    def run(self) -> Path:
        self.machine = results.machine() | {
            "device": self.device.type,
            "dtype": self.options.dtype,
            "command": shlex.join(["phyxdream", *sys.argv[1:]]),
            "memory_means": timing.MEMORY_MEANS[self.device.type],
        }
        before = _idle_load()
        self.peaks = timing.peaks(self.device, self.dtype, seconds=0.1 if self.options.quick else 0.5)
        self.machine["peak"] = dataclasses.asdict(self.peaks)
        self._head()
        meter = timing.LoadMeter()
        try:
            self._suites()
        except KeyboardInterrupt:  # what took minutes is not thrown away
            if self.rows:
                self._finish(before, meter.read())
            raise
        return self._finish(before, meter.read())

    def _suites(self) -> None:
        with self.progress:
            task = self.progress.add_task("", total=sum(map(len, self.plan.suites.values())))
            for suite, cases in self.plan.suites.items():
                for case in cases:
                    self.progress.update(task, description=str(case), refresh=True)
                    self._case(suite, case)
                    self.progress.advance(task)
                self._table(suite)

    def _head(self) -> None:
        m, p = self.machine, self.peaks
        self.console.print(
            f"{results.machine_name(m)}, {m['threads']} torch threads, torch {m['torch']}, phyxdream {m['phyxdream']}: "
            f"{p.flops / 1e9:.0f} GFLOP/s at best ({self.options.dtype} products of {p.flops_by}), "
            f"{p.bytes / 1e9:.0f} GB/s read and written by a large copy\n"
        )

    def _case(self, suite: Suite, case: Case) -> None:
        head = {"suite": suite.name, "op": case.op, "direction": case.direction, "size": case.size}
        names = case.contenders(self.device, self.options.compile)
        try:
            with enter(case, self.device, names, self.dtype) as entry:
                skipped = entry.skipped
                if entry.contenders:
                    samples = timing.measure(entry.contenders, self.budget, self.fewest, self.clock)
                    memory = {c.name: timing.peak_memory(c, self.device) for c in entry.contenders}
        except Exception as error:  # a missing package, or no memory for this size: the other cases go on
            self.skipped += [head | {"backend": name, "reason": complaint(error)} for name in names]
            return
        self.skipped += [head | {"backend": name, "reason": reason} for name, reason in skipped.items()]
        for contender in entry.contenders:
            name, sample = contender.name, samples[contender.name]
            peak = self.peaks.of(entry.work.unit) if entry.work else None
            self.rows.append(head | {
                "label": case.label,
                "backend": name,
                "median_seconds": sample.median,
                "iqr_seconds": sample.iqr,
                "rounds": len(sample.seconds),
                "calls": sample.calls,
                "ratio": timing.ratio(samples[names[0]], sample) if names[0] in samples else None,
                "work": dataclasses.asdict(entry.work) if entry.work else None,
                "of_peak": entry.work.amount / sample.median / peak if peak else None,
                "memory_bytes": memory[name],
                "setup_seconds": contender.setup_seconds,
                "headline": case.headline,
            })  # fmt: skip

    def _table(self, suite: Suite) -> None:
        rows = [row for row in self.rows if row["suite"] == suite.name]
        skipped = [row for row in self.skipped if row["suite"] == suite.name]
        if rows:
            self.console.print(suite_table(suite, rows), end="")
        for reason in dict.fromkeys(row["reason"] for row in skipped):
            those = [row for row in skipped if row["reason"] == reason]
            names = ", ".join(dict.fromkeys(row["backend"] for row in those))
            sizes = ", ".join(dict.fromkeys(f"{row['op']} {row['size']}" for row in those))
            self.console.print(f"left out: {names} of {sizes}: {reason}", style="yellow", markup=False)
        self.console.print()

    def _judge(self, before: timing.Load | None, during: timing.Load | None) -> None:
        warnings = []
        for load, when in ((before, "just before"), (during, "meanwhile")):
            if load and load.others > OTHERS:
                warnings.append(f"other processes took {load.others:.0%} of the machine {when}")
            if load and load.stolen > STOLEN:
                warnings.append(f"the hypervisor kept {load.stolen:.0%} of the machine's time {when}")
        wide = [row for row in self.rows if row["iqr_seconds"] > SPREAD * row["median_seconds"]]
        if wide:
            warnings.append(f"{len(wide)} of {len(self.rows)} times vary by over {SPREAD:.0%} between the quartiles")
        self.machine["load"] = {name: load and dataclasses.asdict(load)
                                for name, load in (("before", before), ("during", during))}  # fmt: skip
        self.machine["warnings"] = warnings
        for warning in warnings:
            self.console.print(f"not a quiet machine: {warning}", style="bold yellow")

    def _finish(self, before: timing.Load | None, during: timing.Load | None) -> Path:
        from phyxdream.bench.plots import write_plots

        self._judge(before, during)
        path = self.options.out / f"{results.file_stem(self.machine)}.json"
        result = {"machine": self.machine, "benchmarks": self.rows, "skipped": self.skipped}
        results.write(path, result)
        self.console.print(f"results: {path}", soft_wrap=True)
        for picture in write_plots(path, result):
            self.console.print(f"picture: {picture}", soft_wrap=True)
        return path


def _idle_load(seconds: float = 0.3) -> timing.Load | None:
    """What runs here while this process sleeps."""
    meter = timing.LoadMeter()
    time.sleep(seconds)
    return meter.read()


def suite_table(suite: Suite, rows: list[dict[str, Any]]) -> Text:
    """The rows of one suite: a line a case, and below it one a contender; columns that would stay empty are left out.

    rich's own tables have no cell over several columns, which a case needs on 80 of them.
    """
    first = {key: case[0]["backend"] for key, case in results.cases(rows).items()}
    columns = {
        "": lambda row: "  " + results.BACKENDS.get(row["backend"], row["backend"]),
        "median": lambda row: seconds_text(row["median_seconds"]),
        "IQR": lambda row: f"{row['iqr_seconds'] / row['median_seconds']:.0%}",
        "faster": lambda row: ratio_text(row["ratio"]) if row["ratio"] and not is_first(row) else "",
        "rate": lambda row: rate_text(row["work"], row["median_seconds"]),
        "of peak": lambda row: share_text(row["of_peak"]),
        "memory": lambda row: "" if row["memory_bytes"] is None else bytes_text(row["memory_bytes"]),
        "compiling": lambda row: seconds_text(row["setup_seconds"]) if row["setup_seconds"] else "",
    }

    def is_first(row: dict[str, Any]) -> bool:
        return first[row["suite"], row["op"], row["direction"], row["size"]] == row["backend"]

    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: texts for name, texts in cells.items() if any(texts)}
    widths = {name: max(map(len, (name, *texts))) for name, texts in cells.items()}

    def line(texts: list[str]) -> str:
        label, *figures = (
            t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths.values(), strict=True))
        )
        return "  ".join([label, *figures]).rstrip() + "\n"

    text = Text(no_wrap=True, overflow="ignore").append(f"{suite.name}: {suite.summary}\n", "bold")
    text.append(line(list(cells)), "dim")
    last = None
    for i, row in enumerate(rows):
        case = (row["op"], row["direction"], row["size"])
        if case != last:
            size = "" if row["size"] == row["label"].replace("×", "x") else f"{row['size']}: "
            text.append(f"{results.title(row)}, {size}{row['label']}\n")
        faster = row["ratio"] and row["ratio"] > 1 and not is_first(row)
        text.append(line([texts[i] for texts in cells.values()]), "green" if faster else "")
        last = case
    return text
