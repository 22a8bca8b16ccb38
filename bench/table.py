"""The tables of README.md, docs/ and bench/results/, from the results files: `python -m phyxdream.bench.table`.

Between `<!-- bench NAME -->` and `<!-- end bench -->` everything is replaced by what the files give; nothing there is
written by hand. Of every case the newest file counts, of each machine on its own. `--check` only says whether the files
and the pages agree.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phyxdream.bench import SUITES, load_suite, results
from phyxdream.bench.pages import fill, rewrite
from phyxdream.bench.results import ResultsError, bytes_text, machine_name, ratio_text, seconds_text, share_text

Rows = list[dict[str, Any]]


@dataclass
class Files:
    """Results files by kind: of suites, of the replay beside others, of codebases before and after `accelerate`."""

    timings: list[dict[str, Any]] = field(default_factory=list)
    replays: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)


def update(text: str, folder: Path) -> str:
    """`text` with every marked block made anew from the results files in `folder`.

    Raises:
        ResultsError: a file is damaged, or a block has a name that is not in `BLOCKS`.
    """
    files = {path: results.read(path) for path in sorted(folder.glob("*.json"))}
    found = Files()
    for path, result in files.items():
        kind = result if isinstance(result, dict) else {}
        if "fill" in kind:
            found.replays.append(result)
        elif "peers" in kind:
            found.peers.append(result)
        else:
            found.timings.append(results.check(result, str(path)))

    return fill(text, "bench", BLOCKS, found)


def _newest(timings: list[dict[str, Any]]) -> dict[str, tuple[list[dict[str, Any]], Rows]]:
    """By machine: the machines' entries that count, newest first, and the newest rows of every case by suite."""
    found: dict[str, dict[tuple, tuple[dict[str, Any], Rows]]] = {}
    for result in sorted(timings, key=lambda result: result["machine"]["started"]):
        cases = found.setdefault(machine_name(result["machine"]), {})
        for key, rows in results.cases(result["benchmarks"]).items():
            cases.pop(key, None)  # of cases that a suite no longer has, the newest file has the order
            cases[key] = (result["machine"], rows)
    by_machine = {}
    for name, cases in found.items():
        machines: list[dict[str, Any]] = []
        for machine, _ in cases.values():
            if machine not in machines:
                machines.append(machine)
        machines.sort(key=lambda machine: machine["started"], reverse=True)
        keys = sorted(cases, key=_place)
        by_machine[name] = (machines, [row for key in keys for row in cases[key][1]])
    return by_machine


def _place(key: tuple[str, str, str, str]) -> tuple[int, int]:
    """Where a case stands: suites in their order, each in the order of its own cases."""
    suite, *case = key
    if suite not in SUITES:
        return len(SUITES), 0
    own = [[c.op, c.direction, c.size] for c in load_suite(suite).cases]
    return list(SUITES).index(suite), own.index(case) if case in own else len(own)


def _timings(timings: list[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> str:
    parts = []
    for name, (machines, rows) in _newest(timings).items():
        rows = [row for row in rows if wanted(row)]
        if rows:
            parts += [_case_table(rows), f"{_measured(name, machines)}\n"]
    return "\n".join(parts).rstrip("\n") + "\n" if parts else "Nothing has been measured yet.\n"


def _measured(name: str, machines: list[dict[str, Any]]) -> str:
    dates = sorted({machine["started"][:10] for machine in machines})
    versions = sorted({machine["torch"].split("+")[0] for machine in machines if machine.get("torch")})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    noisy = any(machine.get("warnings") for machine in machines)
    return f"*{name}, torch {', '.join(versions)}, {when}{', on a machine that was not quiet' * noisy}.*"


def _case_table(rows: Rows) -> str:
    """A line a case; a column a backend that any case has, and what else is known of the fastest."""
    cases = list(results.cases(rows).values())
    found = {row["backend"] for row in rows}
    known = ("reference", "compile", "cuda_graph", "cpu", "triton", "triton_graph", "phyxdream", "phyxdream_graph")
    backends = [name for name in known if name in found] + sorted(found.difference(known))
    columns: dict[str, Callable[[dict[str, dict]], str]] = {
        "what": lambda case: _what(_last(case)),
        "size": lambda case: _last(case)["label"],
    }
    for name in backends:
        columns[results.BACKENDS.get(name, name)] = lambda case, name=name: _time(case.get(name))
    columns |= {
        "ratio": _ratio,
        "of peak": lambda case: share_text(_last(case).get("of_peak")),
        "memory": _memory,
    }
    lines = [[cell({row["backend"]: row for row in case}) for cell in columns.values()] for case in cases]
    shown = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    names = list(columns)
    right = [i > 1 for i in shown]
    return markdown([names[i] for i in shown], ([line[i] for i in shown] for line in lines), right)


def _last(case: dict[str, dict]) -> dict[str, Any]:
    """The row of our own implementation: contenders are timed in the order of the case, ours last."""
    return list(case.values())[-1]


def _what(row: dict[str, Any]) -> str:
    if row["suite"] == "update":
        return {"whole": "**whole gradient step**"}.get(row["op"], row["op"].replace("_", " "))
    name = f"`ops.{row['op']}`" if re.fullmatch(r"[a-z_]+", row["op"]) and row["op"] not in _NO_OPS else row["op"]
    return f"{name} {row['direction']}".strip()


_NO_OPS = ("sample", "update", "add", "step")


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    setup = row.get("setup_seconds")
    return seconds_text(row["median_seconds"]) + (f" (after {seconds_text(setup)})" if setup else "")


def _ratio(case: dict[str, dict]) -> str:
    """Against the first backend of the case: as measured within rounds, or of the medians in files that lack it."""
    first, last = next(iter(case.values())), _last(case)
    if first is last:
        return ""
    return ratio_text(last.get("ratio") or first["median_seconds"] / last["median_seconds"])


def _memory(case: dict[str, dict]) -> str:
    values = [row.get("memory_bytes") for row in (next(iter(case.values())), _last(case))]
    if values[1] is None:
        return ""
    return bytes_text(values[1]) if len(case) == 1 or values[0] is None else " → ".join(map(bytes_text, values))


def markdown(head: list[str], lines: Iterable[list[str]], right: list[bool]) -> str:
    rule = ["---:" if r else "---" for r in right]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


# ---------------------------------------------------------------------------------------------------------------------
# The replay beside other replays: files of bench_replay.py, which have a group and a name for each row.

_SHOWN = {
    "phyxdream loader, prefetch 0": "`Replay.loader`, made when asked for",
    "phyxdream sample, new tensors": "`Replay.sample`, new tensors",
    "memcpy per sequence (floor)": "one memcpy per sequence, one thread",
    "NumPy slice loop, reused arrays": "NumPy slice loop into reused arrays",
    "cpprb": None,
    "sheeprl": None,
    "torchrl": None,
}


def _replay(comparisons: list[dict[str, Any]]) -> str:
    if not comparisons:
        return "Nothing has been measured yet.\n"
    result = max(comparisons, key=lambda result: result["machine"]["started"])
    rows = result["benchmarks"]
    sampled = [row for row in rows if row["group"].startswith("sample: ")]
    lines = []
    for name, label in _SHOWN.items():
        # The fastest of a library's ways; a whole name, or the name of a library and its version.
        found = [row for row in sampled if row["name"] == name or (label is None and _library(row["name"]) == name)]
        if found:
            best = max(found, key=lambda row: row["per_second"])
            lines.append([label or best["name"], f"{best['per_second']:,.0f}", f"{best['of_floor']:.2f}"])
    table = markdown([sampled[0]["group"].replace("sample: ", "replay, ").replace("64x64x3", "64×64×3").replace(
        "16x64", "16 × 64"), "batches/s", "of memcpy"], lines, [False, True, True])  # fmt: skip

    def per_second(group: str, name: str) -> dict[str, Any]:
        return next(row for row in rows if row["group"].startswith(group) and row["name"] == name)

    back = per_second("sample and write", "phyxdream loader, prefetch 0 + update")
    floor = per_second("sample and write", "memcpy per sequence (floor)")
    small, pictures = per_second("add: 10×5", "phyxdream"), per_second("add: 64×64×3", "phyxdream")
    grown = [
        f"{label} takes {ours[0]:.2f} ms with {fill['steps'][0]:,} steps stored, {ours[-1]:.2f} ms with "
        f"{fill['steps'][-1]:,}"
        for label, fill in result["fill"].items()
        for ours in [fill["milliseconds"]["phyxdream"]]
    ]
    words = (
        f"With 8 KB of latents a step sampled and written back: {back['per_second']:,.0f} batches/s, beside "
        f"{floor['per_second']:,.0f} for bare memcpy of the same bytes. `add` takes {small['per_second'] / 1e6:.1f} "
        f"million small steps a second, pictures at {pictures['of_floor']:.2f} of memcpy. A batch of "
        f"{'; of '.join(grown)}."
    )
    machine = result["machine"]
    return f"{table}\n{textwrap.fill(words, 120)}\n\n{_measured(machine_name(machine), [machine])}\n"


def _library(name: str) -> str:
    return name.split(" ")[0] if re.search(r" \d+\.\d", name) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Other codebases: files of peers.py.


def _peers(files: list[dict[str, Any]]) -> str:
    if not files:
        return "Nothing has been measured yet.\n"
    result = max(files, key=lambda result: result["machine"]["started"])
    lines = [
        [
            f"{row['codebase']} {row['revision']}", row["what"], seconds_text(row["theirs"]), seconds_text(row["ours"]),
            ratio_text(row["ratio"]), "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in result["peers"]
    ]  # fmt: skip
    head = ["codebase", "what", "before", "after", "ratio", "differs by"]
    machine = result["machine"]
    table = markdown(head, lines, [False, False, True, True, True, True])
    return f"{table}\n{_measured(machine_name(machine), [machine])}\n"


BLOCKS: dict[str, Callable[[Files], str]] = {
    "ops": lambda files: _timings(files.timings, lambda row: row.get("headline", False) and row["suite"] != "update"),
    "update": lambda files: _timings(files.timings, lambda row: row["suite"] == "update"),
    "all": lambda files: _timings(files.timings, lambda row: True),
    "replay": lambda files: _replay(files.replays),
    "peers": lambda files: _peers(files.peers),
}
"""What can stand between markers."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phyxdream.bench.table", description=__doc__.split("\n\n")[0])
    pages = [Path("README.md"), Path("docs/use-in-your-dreamer.md"), results.FOLDER / "README.md"]
    parser.add_argument("pages", nargs="*", type=Path, default=pages)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from the files")
    options = parser.parse_args(argv)
    try:
        return rewrite(options.pages, lambda text: update(text, options.results), options.check)
    except (OSError, ResultsError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
