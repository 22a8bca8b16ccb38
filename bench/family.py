"""The table of the family in README.md and docs/results/README.md, from runs: `python -m phyxdream.bench.family`.

docs/results/family holds what counts of every run, in a directory `NAME-seedN` that `phyxdream compare` reads: its
configuration, metrics, evaluations and versions. `--add NAME RUN...` puts them there, and measures what can be had in
the same environment without learning: by actions drawn at random, and by no action at all. Between
`<!-- family BLOCK -->` and `<!-- end family -->` everything is replaced by what they give: tables, and the commands
that made them. `--check` writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from phyxdream.agents.config import DreamerConfig, preset
from phyxdream.bench.pages import fill, rewrite
from phyxdream.bench.results import ResultsError
from phyxdream.bench.table import markdown
from phyxdream.errors import ConfigError, PhyxdreamError
from phyxdream.train.compare import Member, curves_figure, group, read_member
from phyxdream.train.driver import Driver
from phyxdream.train.evaluate import run_episodes
from phyxdream.train.report import count, figure_png, write_files
from phyxdream.train.run import Run, write_json

FOLDER = Path("docs/results/family")
_DIRECTORY = re.compile(r"(.+)-seed(\d+)")
# What makes two runs meet the same environment, whatever learns in it.
_TASK = ("env", "action_repeat", "time_limit", "pixels", "image_size", "camera", "env_options")
_START = ("started", "phyxdream", "python", "torch", "numpy", "gymnasium", "envpool", "platform", "cpu", "cores",
          "threads", "processes", "gpu", "cuda")  # fmt: skip
_UNLEARNED, _EPISODES, _SEED = "unlearned.json", 100, 3_000_000
# Say where a run is written or how it is watched: they are no part of the command that makes it again.
_NOT_COMMAND = ("seed", "logdir", "log_every", "checkpoint_every")

FAMILY = {
    "world_models": ("a VAE, an MDN-LSTM, and a linear controller evolved in dreams",
                     "[Ha & Schmidhuber 2018](https://arxiv.org/abs/1803.10122)"),
    "planet": ("Gaussian RSSM; no policy: actions are planned in the latent space",
               "[Hafner et al. 2019](https://arxiv.org/abs/1811.04551)"),
    "dreamer_v1": ("an actor that learns in imagination, by gradients through the model",
                   "[Hafner et al. 2020](https://arxiv.org/abs/1912.01603)"),
    "dreaming": ("V1 that tells pictures apart instead of painting them",
                 "[Okada & Taniguchi 2021](https://arxiv.org/abs/2007.14535)"),
    "dreamer_v2": ("categorical latents, KL balancing, REINFORCE or gradients through the model",
                   "[Hafner et al. 2021](https://arxiv.org/abs/2010.02193)"),
    "dreamer_v2_atari": ("V2 as on Atari: REINFORCE for discrete actions, episodes that end, rewards through tanh",
                         "[Hafner et al. 2021](https://arxiv.org/abs/2010.02193)"),
    "dreaming_v2": ("Dreaming with V2's categorical latents",
                    "[Okada & Taniguchi 2022](https://arxiv.org/abs/2203.00494)"),
    "daydreamer": ("V2 on robots: acting and learning in parallel, all sensors fused",
                   "[Wu et al. 2022](https://arxiv.org/abs/2206.14176)"),
    "dreamer_v3": ("block GRU, symlog two-hot, normalised returns: one setting for all tasks",
                   "[Hafner et al. 2023](https://arxiv.org/abs/2301.04104)"),
    "phyxdream": ("V3 whose latent state holds slots: entities instead of pixels",
                  "ours, with [slot attention](https://arxiv.org/abs/2006.15055)"),
    "phyxdream-planner": ("the same, planning instead of actor and critic", "ours"),
}  # fmt: skip
"""What the README's table has, in its order: what each is, and where it comes from."""


@dataclass
class Method:
    """The runs called `name`, by seed, and what their environment pays without learning: "mean" and "std" of "random"
    and of "still"."""

    name: str
    members: list[Member]
    unlearned: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return self.members[0].options

    @property
    def arguments(self) -> list[str]:
        """What follows `phyxdream train`, but for the seed."""
        return arguments(DreamerConfig.from_dict(self.options))


def read(folder: Path) -> list[Method]:
    """The methods in `folder`, by the order of `FAMILY`.

    Raises:
        ResultsError: a directory is damaged, the runs of a method differ in more than the seed, or nothing is known of
            its environment without learning.
    """
    found: dict[str, list[Member]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            match = _DIRECTORY.fullmatch(path.name)
            if not match:
                raise ResultsError(f"{path}: expected a name like dreamer_v1-seed0")
            found.setdefault(match[1], []).append(_member(path, int(match[2])))
    baselines = _baselines(folder)
    methods = []
    for name, members in found.items():
        if len(group(members)) > 1:
            raise ResultsError(f"{folder}/{name}-seed*: the runs differ in more than their seed")
        unlearned = next((row for row in baselines if row["task"] == _task(members[0].options)), None)
        if unlearned is None:
            raise ResultsError(f"{folder / _UNLEARNED}: nothing about {_task(members[0].options)}")
        methods.append(Method(name, sorted(members, key=lambda m: m.options["seed"]), unlearned))
    order = list(FAMILY)

    def place(method: Method) -> tuple:
        """Variants of a preset follow it."""
        name = method.name if method.name in FAMILY else method.options["preset"]
        return order.index(name) if name in FAMILY else len(order), method.name not in FAMILY, method.name

    return sorted(methods, key=place)


def _member(path: Path, seed: int) -> Member:
    member = read_member(path)
    if member.options["seed"] != seed:
        raise ResultsError(f"{path}: its configuration has seed {member.options['seed']}")
    if not member.finished or member.final is None:
        raise ResultsError(f"{path}: expected a run that is finished and evaluated")
    return member


def add(folder: Path, name: str, runs: Iterable[Path]) -> list[Path]:
    """Take what counts of finished runs into `folder`; returns where they are there.

    Raises:
        ConfigError: a directory is not a run, or has options that are not known; ResultsError: a run is not finished.
            Nothing was written for it.
    """
    written = []
    for path in runs:
        run = Run.open(path)
        seed = run.config["seed"]
        _member(run.path, seed)
        baselines, task = _baselines(folder), _task(run.config)
        target = folder / f"{name}-seed{seed}"
        target.mkdir(parents=True, exist_ok=True)
        versions = json.loads((run.path / "versions.json").read_text(encoding="utf-8"))
        versions["starts"] = [{k: start[k] for k in _START if k in start} for start in versions["starts"]]
        write_files(target, {
            "config.json": _json({**run.config, "logdir": None}),
            "versions.json": _json(versions),
            "eval.json": run.evaluation.read_bytes(),
            "metrics.jsonl": run.metrics.read_bytes(),
        })  # fmt: skip
        if all(row["task"] != task for row in baselines):
            row = {"task": task, "episodes": _EPISODES, "seed": _SEED}
            for policy in ("random", "still"):
                returns = unlearned_returns(DreamerConfig.from_dict(run.config), policy)
                row[policy] = {"mean": float(np.mean(returns)), "std": float(np.std(returns))}
            write_json(folder / _UNLEARNED, [*baselines, row])
        written.append(target)
    return written


def unlearned_returns(config: DreamerConfig, policy: str, episodes: int = _EPISODES, seed: int = _SEED) -> list[float]:
    """Returns of `episodes` episodes; `policy` "random" draws every action uniformly,
    "still" takes zeros, of discrete actions the first."""
    rng = np.random.default_rng(seed)

    def act(driver: Driver) -> np.ndarray:
        count, space = driver.env.num_envs, driver.env.single_action_space
        if policy == "still":
            return np.zeros((count, *space.shape), space.dtype)
        if driver.discrete:
            return rng.integers(space.n, size=count)
        return rng.uniform(-1, 1, (count, *space.shape)).astype(np.float32)

    return run_episodes(config, episodes, seed, act).returns


def _baselines(folder: Path) -> list[dict[str, Any]]:
    path = folder / _UNLEARNED
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _task(options: Mapping[str, Any]) -> dict[str, Any]:
    config = DreamerConfig.from_dict(dict(options))
    return {name: config.env_id if name == "env" else _plain(getattr(config, name)) for name in _TASK}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Commands.


def arguments(config: DreamerConfig) -> list[str]:
    """The preset and the options that give this configuration again, but for its seed and directory."""
    wanted, base = _comparable(config), preset(config.preset).to_dict()
    given = {name: value for name, value in config.to_dict().items()
             if name not in (*_NOT_COMMAND, "preset") and value != base[name]}  # fmt: skip
    # Many options are what others imply, such as a size: what changes nothing is left out.
    for name in list(given):
        without = {k: v for k, v in given.items() if k != name}
        with contextlib.suppress(ConfigError):  # others may not go without it
            if _comparable(preset(config.preset, **without)) == wanted:
                given = without
    words = [config.preset]
    for name in (f.name for f in fields(DreamerConfig) if f.name in given):
        words += _words(name, given[name])
    return words


def _words(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    optional = "None" in next(str(f.type) for f in fields(DreamerConfig) if f.name == name)
    if isinstance(value, bool) and not optional:
        return [f"--{option}" if value else f"--no-{option}"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{option}", *(f"{v:g}" if isinstance(v, float) and float(f"{v:g}") == v else str(v) for v in values)]


def _comparable(config: DreamerConfig) -> dict[str, Any]:
    found = config.resolve().to_dict()
    return {name: _plain(value) for name, value in found.items() if name not in _NOT_COMMAND}


# ---------------------------------------------------------------------------------------------------------------------
# Pages.


def _family(methods: list[Method]) -> str:
    """The README's table: a line a preset."""
    lines = []
    for method in methods:
        if method.name in FAMILY:
            what, source = FAMILY[method.name]
            lines.append([f"`{method.name}`", what, source, *_result(method)])
    return markdown(["agent", "what it is", "paper", *_HEAD], lines, [False] * 4 + [True] * 5)


def _results(methods: list[Method]) -> str:
    """All methods, and the commands that make them."""
    lines = [[f"`{method.name}`", *_result(method)] for method in methods]
    table = markdown(["run", *_HEAD], lines, [False] * 2 + [True] * 5)
    pictures = "\n".join(
        f"![{env}: return during training, mean over seeds]({FOLDER.name}/{_picture(env)})\n" for env in _envs(methods)
    )
    commands = "\n".join(f"    phyxdream train {shlex.join(method.arguments)}" for method in methods)
    return f"{table}\n{pictures}\nWith `--seed N`:\n\n{commands}\n"


_HEAD = ("task", "env steps", "minutes", "random", "no action", "return, by seed")


def _result(method: Method) -> list[str]:
    members = method.members
    minutes = [m.seconds / 60 for m in members]
    low, high = f"{min(minutes):.1f}", f"{max(minutes):.1f}"
    return [
        members[0].env.split(":", 1)[1],
        count(max(m.step for m in members)),
        low if low == high else f"{low} to {high}",
        *(_mean_std(method.unlearned[policy]) for policy in ("random", "still")),
        ", ".join(_mean_std(m.final) for m in members),
    ]


def _mean_std(found: Mapping[str, float]) -> str:
    digits = 0 if abs(found["mean"]) >= 10 else 2
    return f"{found['mean']:.{digits}f} ± {found['std']:.{digits}f}".replace("-", "−")


BLOCKS = {"table": _family, "results": _results}
"""What can stand between markers."""


def update(text: str, methods: list[Method]) -> str:
    """`text` with every marked block made anew; `ResultsError` for a block that is not in `BLOCKS`."""
    return fill(text, "family", BLOCKS, methods)


def _envs(methods: list[Method]) -> list[str]:
    return list(dict.fromkeys(method.members[0].env for method in methods))


def _picture(env: str) -> str:
    return re.sub(r"[^\w.-]+", "-", env.split(":", 1)[1]) + ".png"


def write_pictures(folder: Path, methods: list[Method]) -> list[Path]:
    """Learning curves of all methods, a PNG for each environment."""
    groups = group([member for method in methods for member in method.members])
    names = {id(member): method.name for method in methods for member in method.members}
    for g in groups:
        g.label = names[id(g.members[0])]
    files = {}
    for env in _envs(methods):
        here = [g for g in groups if g.env == env]
        files[_picture(env)] = figure_png(curves_figure(here, groups), dpi=110)
    write_files(folder, files)
    return [folder / name for name in files]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phyxdream.bench.family", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="with --add: finished run directories that differ in seed")
    parser.add_argument("--add", metavar="NAME", help="put these runs into the folder under this name")
    pages = [Path("README.md"), Path("docs/results/README.md")]
    parser.add_argument("--pages", nargs="*", type=Path, default=pages)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the runs that count")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from the runs")
    options = parser.parse_args(argv)
    if bool(options.runs) != bool(options.add):
        parser.error("expected --add NAME together with run directories")
    try:
        if options.add:
            for path in add(options.folder, options.add, options.runs):
                print(f"{path}: written")
        methods = read(options.folder)
        if not options.check:
            for path in write_pictures(options.folder, methods):
                print(f"{path}: written")
        return rewrite(options.pages, lambda text: update(text, methods), options.check)
    except (OSError, PhyxdreamError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
