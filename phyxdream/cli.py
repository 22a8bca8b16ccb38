"""The command line: train, eval, report, compare, replay, slots, bench, info.

Typed options come from `DreamerConfig`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from phyxdream import __version__
from phyxdream.agents.config import PRESETS, DreamerConfig, preset
from phyxdream.errors import ConfigError, PhyxdreamError, suggest

USAGE = """usage: phyxdream COMMAND [...]

  train [PRESET] [--options]   train an agent; bare `phyxdream train` learns Catch from its pixels in minutes
  eval RUN [--options]         evaluate the trained agent of a run directory
  report RUN                   write the HTML report of a run directory
  compare RUN RUN...           learning curves of several runs with bands over seeds, and a table
  replay inspect PATH          what lies in the replay of a run, a checkpoint or a snapshot
  slots [--options]            train a slot autoencoder on scenes of sprites, scored against the true masks
  bench [SUITE...]             time the fused ops against PyTorch on this machine; a table, a JSON file, pictures
  info                         backends and environments found, versions, GPU, and why something is off

`phyxdream COMMAND --help` lists the options of a command. Presets: {presets}."""

DEFAULT_PRESET = "catch"


@dataclass
class Train:
    """Train an agent. Options override the preset's values."""

    config: tyro.conf.OmitArgPrefixes[DreamerConfig]
    resume: bool = False
    """Continue the run in --logdir (or the newest one under runs/) from its last checkpoint."""
    quiet: bool = False
    """No progress display."""


@dataclass
class Eval:
    """Evaluate the newest checkpoint of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    episodes: int = 100
    seed: int = 2_000_000
    explore: bool = False
    """Act as in training instead of taking the most likely action. Reports show such an evaluation in their
    table alone, comparisons not at all."""
    open_loop: bool = False
    """Also how far the model sees: its errors over 32 new episodes of random actions, of which it is shown the first
    steps, for as long as the shortest lasts. The same ones, whatever --seed and --episodes, for all runs with the same
    environment options (picture size, action repeat, ...), so that runs can be compared."""


@dataclass
class Report:
    """Write report.html of a run: learning curve, losses, evaluations, and what the model dreams."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""


@dataclass
class Compare:
    """Learning curves of runs with bands over seeds, and a table; a picture, a page and the numbers go to --out.

    Runs that differ only in their seed are one method. Lines are interquartile means over its runs, bands 95 %
    intervals of a stratified bootstrap.
    """

    runs: Annotated[list[Path], tyro.conf.Positional]
    """Run directories, finished or not."""
    out: Path = Path("compare")
    """Directory for compare.png (and a picture an environment), compare.html and compare.json."""
    by: list[str] = field(default_factory=list)
    """The options that make a method, such as preset or slot_mode: runs that differ in others only become one. By
    default every option that matters to learning makes one."""


@dataclass
class ReplayInspect:
    """Show what lies in a replay: counts, episodes, a histogram of returns, and what looks wrong."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory (its newest checkpoint), a checkpoint, or a snapshot that Replay.save wrote."""
    frames: Path | None = None
    """Also write a contact sheet of frames to this PNG; without pictures, plots of returns and of one episode."""


@dataclass
class Bench:
    """Time the fused ops, a gradient step, the replay and the environments on this machine, against plain PyTorch.

    Every suite runs where none is named; --sizes takes the sizes that its tables show. Contenders take turns; figures
    are medians. --quick takes half a minute, everything some ten, --compile some more for every size of a scan.
    """

    suites: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """observe, imagine, step, kl, two_hot, lambda_return, rms_norm_silu, slot_attention, update, replay, envs."""
    sizes: list[str] = field(default_factory=list)
    """Only these sizes, such as v1, 512, 12m; also those that are left out otherwise."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also the reference under torch.compile, which takes minutes to compile: how many is a column."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only the smallest size of each suite, and few rounds."""
    seconds: float = 2.0
    """Time for the rounds of one case; at least five rounds are run."""
    threads: int | None = None
    """Threads of torch and of the fused ops; by default torch's own choice."""
    device: str = "auto"
    """cpu, cuda, or auto: CUDA where there is one."""
    dtype: str = "float32"
    """Of the fused ops' tensors and weights: float32, bfloat16 or float16."""
    out: Path = Path("bench/results")
    """Directory of the results."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an error the user can act on, 2 wrong usage, 128+n signal n."""
    argv = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train, "eval": _eval, "report": _report, "compare": _compare,
        "replay": _replay, "slots": _slots, "bench": _bench, "info": _info,
    }  # fmt: skip
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(presets=", ".join(PRESETS)))
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"phyxdream {__version__}")
        return 0
    if argv[0] not in commands:
        print(f"phyxdream: unknown command {argv[0]!r}{suggest(argv[0], commands)}\n\n"
              + USAGE.format(presets=", ".join(PRESETS)), file=sys.stderr)  # fmt: skip
        return 2
    try:
        return commands[argv[0]](argv[1:])
    except (PhyxdreamError, FloatingPointError) as error:
        print(f"phyxdream {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"phyxdream {argv[0]}: interrupted", file=sys.stderr)
        return 130


def entry() -> None:
    """The console script."""
    sys.exit(main())


def _train(argv: list[str]) -> int:
    named = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if named else _option(argv, "--preset")
    if named and _option(argv, "--preset") not in (None, name):
        raise ConfigError(f"two presets were named: {name!r} and {_option(argv, '--preset')!r}")
    resuming = any(a == "--resume" or a.startswith("--resume=") for a in argv)
    if resuming:
        if name:
            raise ConfigError(f"--resume takes its configuration from the run; leave out the preset {name!r}")
        default = _stored_config(_option(argv, "--logdir") or _newest_run())
    else:
        default = preset(name or DEFAULT_PRESET)
    options = tyro.cli(Train, args=argv[1:] if named else argv, default=Train(default),
                       prog="phyxdream train [PRESET]")  # fmt: skip
    from phyxdream import distributed
    from phyxdream.agents import DreamerAgent

    result = DreamerAgent(options.config).train(resume=options.resume, quiet=options.quiet)
    if result.signal is not None:
        return 128 + result.signal
    if not distributed.is_first():
        return 0
    evaluation = result.evaluation
    print(f"evaluation return: {evaluation.mean:.3f} ± {evaluation.std:.3f} over {len(evaluation.returns)} episodes")
    print(f"report: {result.report}")
    return 0


def _eval(argv: list[str]) -> int:
    options = tyro.cli(Eval, args=argv, prog="phyxdream eval")
    from phyxdream.train.evaluate import evaluate
    from phyxdream.train.loop import load_agent
    from phyxdream.train.open_loop import open_loop_error, open_loop_table, write_open_loop
    from phyxdream.train.run import Run

    if options.episodes < 1:
        raise ConfigError(f"episodes: expected at least 1, got {options.episodes}")
    run = Run.open(options.run)
    agent, found = load_agent(run)
    result = evaluate(agent, options.episodes, options.seed, explore=options.explore)
    row = {"step": found.step, "returns": result.returns, "lengths": result.lengths, "seed": options.seed}
    run.add_evaluation(row | ({"explore": True} if options.explore else {}))
    print(f"evaluation return: {result.mean:.3f} ± {result.std:.3f} over {len(result.returns)} episodes "
          f"(step {found.step}, seed {options.seed}{', exploring' if options.explore else ''})")  # fmt: skip
    if options.open_loop:
        errors = open_loop_error(agent)
        write_open_loop(run, found.step, errors)
        Console(highlight=False).print(open_loop_table(errors))
    return 0


def _report(argv: list[str]) -> int:
    options = tyro.cli(Report, args=argv, prog="phyxdream report")
    from phyxdream.replay import Replay
    from phyxdream.train.loop import load_agent
    from phyxdream.train.report import write_report
    from phyxdream.train.report_slots import slot_panels
    from phyxdream.train.run import Run
    from phyxdream.train.video import open_loop_video

    run = Run.open(options.run)
    agent, found = load_agent(run)
    video = open_loop_video(agent, Replay.load(found.replay_path)) if found.replay_path else None
    print(f"report: {write_report(run, video=video, extra_panels=slot_panels(agent))}")
    return 0


def _compare(argv: list[str]) -> int:
    options = tyro.cli(Compare, args=argv, prog="phyxdream compare")
    if not options.runs:
        print("usage: phyxdream compare RUN RUN... [--out DIR] [--by OPTION...]", file=sys.stderr)
        return 2
    from phyxdream.train.compare import compare

    comparison = compare(options.runs, options.out, options.by)
    console = Console(highlight=False)
    for table in comparison.tables():
        console.print(table, "")
    for note in comparison.notes():
        print(f"note: {note}")
    kinds = {".png": "picture", ".json": "numbers", ".html": "page"}
    for path in comparison.files:
        print(f"{kinds[path.suffix]}: {path}")
    return 0


def _replay(argv: list[str]) -> int:
    if not argv or argv[0] != "inspect":
        if argv and argv[0] not in ("-h", "--help"):
            print(f"phyxdream replay: unknown command {argv[0]!r}{suggest(argv[0], ['inspect'])}", file=sys.stderr)
        print("usage: phyxdream replay inspect PATH [--frames FILE.png]")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    options = tyro.cli(ReplayInspect, args=argv[1:], prog="phyxdream replay inspect")
    from phyxdream.replay.inspect import check_picture_path, inspect, print_inspection, write_contact_sheet

    if options.frames:
        check_picture_path(options.frames)
    found = inspect(options.path)
    print_inspection(found, Console(highlight=False))
    if options.frames:
        write_contact_sheet(found, options.frames)
        print(f"frames: {options.frames}")
    return 0


def _slots(argv: list[str]) -> int:
    from phyxdream.train.slots import SlotsConfig, train_slots

    config = tyro.cli(SlotsConfig, args=argv, prog="phyxdream slots")
    result = train_slots(config)
    s = result.scores
    scores = ", ".join(f"{name} {s[name]:.3f}" for name in ("FG-ARI", "ARI", "mask IoU"))
    print(f"held-out scenes after {result.steps:,} steps: {scores}, {s['slots used']:.1f} of {config.slots} slots used")
    print(f"curve, pictures and weights: {result.path}")
    return 0 if result.signal is None else 128 + result.signal


def _bench(argv: list[str]) -> int:
    options = tyro.cli(Bench, args=argv, prog="phyxdream bench")
    from phyxdream.bench.command import Options, run

    run(Options(**asdict(options)))
    return 0


def _info(argv: list[str]) -> int:
    from phyxdream.train.info import collect

    if argv:
        raise ConfigError(f"info takes no options, got {argv}")
    console = Console(highlight=False)
    for title, rows in collect().items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows:
            table.add_row(name, value)
        console.print(table, "")
    return 0


def _option(argv: list[str], name: str) -> str | None:
    for i, argument in enumerate(argv):
        if argument == name and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(name + "="):
            return argument.split("=", 1)[1]
    return None


def _newest_run() -> str:
    runs = sorted(Path("runs").glob("*/versions.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ConfigError("--resume: there is no run under runs/; name one with --logdir")
    return str(runs[-1].parent)


def _stored_config(logdir: str) -> DreamerConfig:
    from phyxdream.train.run import Run

    config = DreamerConfig.from_dict(Run.open(logdir).config)
    config.logdir = logdir
    return config
