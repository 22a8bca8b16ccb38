"""A run directory that explains itself: configuration, versions, metrics, checkpoints, evaluations and report."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import weakref
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from phyxdream.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: runs are not guarded against a second writer there.
    fcntl = None

FORMAT = "phyxdream-run"
VERSION = 1
_PACKAGES = ("torch", "numpy", "gymnasium", "envpool", "triton", "safetensors", "dm_control", "mujoco", "cma")
_README = """\
This is a training run of phyxdream {version}, started {started}.

config.json holds the resolved configuration, versions.json the software, hardware, git revision and command line of
every start; metrics.jsonl has one JSON object per logged step (tensorboard/ has the same scalars), checkpoints/ the
newest complete checkpoint, journal/ what a parallel run has taken in since, eval.json the evaluations, open_loop.json
how far the model sees if that was asked for, report.html the report (self-contained, open it in any browser).

From inside this directory:

    phyxdream train --resume --logdir .    continue from the last checkpoint
    phyxdream eval . --open-loop           evaluate the trained agent, and how far its model sees
    phyxdream report .                     write report.html anew
"""


class Run:
    """One training run on disk. Made by `Run.create` (to train) or `Run.open` (to read).

    Attributes:
        path: the run directory (absolute).
        config: the resolved configuration, a JSON-able dict.
        metrics, tensorboard, checkpoints, evaluation, report: where these parts lie; they may not exist yet.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.evaluation = path / "eval.json"
        self.report = path / "report.html"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], *, resume: bool = False) -> Run:
        """Start a run in a new or empty directory, or with `resume` start an existing one again.

        Every start is appended to versions.json. On resume `config` becomes the run's configuration, and what
        differs from the stored one is noted with the start. The run is locked until this process ends or drops
        the `Run`, so that two processes never train into one directory.

        Args:
            path: the run directory.
            config: the resolved configuration; must survive JSON.
            resume: continue the run that lies at `path`.

        Raises:
            ConfigError: the directory is a run already and `resume` is False; it is no run and `resume` is True; it
                holds foreign files; another process trains in it; it cannot be written; or `config` is not JSON-able.
        """
        path = Path(path).expanduser().absolute()
        config = _jsonable(config)
        if resume:
            run = cls.open(path)
            run._lock()
        else:
            _require_empty(path)
            run = cls(path, config)
        start = environment()
        try:
            if resume:
                start["config_changes"] = _changes(run.config, config)
                run.config = config
                history = run.versions()
            else:
                run.checkpoints.mkdir(parents=True, exist_ok=True)
                run._lock()
                history = []
                readme = _README.format(
                    version=start["phyxdream"], started=start["started"], path=shlex.quote(str(path))
                )
                _replace(path / "README.txt", readme)
            write_json(path / "config.json", config)
            # Last, because it is what makes the directory a run.
            write_json(path / "versions.json", {"format": FORMAT, "version": VERSION, "starts": [*history, start]})
        except OSError as e:
            raise ConfigError(f"cannot write the run directory {path}: {e.strerror or e}; try another --logdir") from e
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run that lies at `path`, to read; nothing is changed.

        Raises:
            ConfigError: there is no such directory, it is not a run, or a newer phyxdream wrote it.
        """
        path = Path(path).expanduser().absolute()
        if not path.is_dir():
            raise ConfigError(f"no run at {path}: there is no such directory")
        if not (path / "versions.json").is_file():
            raise ConfigError(f"{path} is not a phyxdream run: it has no versions.json")
        versions = _read_json(path / "versions.json")
        if not isinstance(versions, dict) or versions.get("format") != FORMAT:
            raise ConfigError(f'{path} is not a phyxdream run: its versions.json lacks "format": "{FORMAT}"')
        if not isinstance(versions.get("version"), int) or versions["version"] > VERSION:
            raise ConfigError(
                f"{path} was written by a newer phyxdream (run format {versions.get('version')!r}; "
                f"this one reads up to {VERSION}): upgrade phyxdream"
            )
        config = _read_json(path / "config.json")
        if not isinstance(config, dict):
            raise ConfigError(f"{path / 'config.json'} is damaged: expected a JSON object, got {type(config).__name__}")
        return cls(path, config)

    def versions(self) -> list[dict[str, Any]]:
        """What `environment` found at each start of this run, first start first."""
        starts = _read_json(self.path / "versions.json").get("starts")
        return starts if isinstance(starts, list) else []

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of eval.json in the order they were added; empty when nothing was evaluated."""
        if not self.evaluation.exists():
            return []
        rows = _read_json(self.evaluation)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{self.evaluation} is damaged: expected a JSON array of objects")
        return rows

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append one evaluation to eval.json.

        Args:
            row: JSON-able; the report shows "step", "returns" (list of float, one per episode) or else "mean", "std",
                "min", "max" and "episodes", "time" (training seconds), "seed", and "explore" where it is not of the
                greedy policy.
        """
        write_json(self.evaluation, [*self.evaluations(), _jsonable(row)])

    def drop_evaluations_after(self, step: int) -> None:
        """Forget evaluations of a history that a resumed run has left: those with a "step" above `step`."""
        rows = self.evaluations()
        kept = [row for row in rows if row.get("step", 0) <= step]
        if len(kept) < len(rows):
            write_json(self.evaluation, kept)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise ConfigError(f"cannot write the run directory {self.path}: {e.strerror}; try another --logdir") from e
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            raise ConfigError(f"another process is training in {self.path}; stop it or use another --logdir") from None
        except OSError:
            os.close(fd)  # A file system without locks; the guard is a courtesy.
            return
        weakref.finalize(self, os.close, fd)


def environment() -> dict[str, Any]:
    """What this process runs on: versions, hardware, git revisions, command line and the current time."""
    import torch

    from phyxdream import __version__, distributed

    cuda = torch.cuda.is_available()
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "cwd": os.getcwd(),
        "phyxdream": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "git": {"phyxdream": _git(Path(__file__).parent, tracked=Path(__file__).name), "cwd": _git(Path.cwd())},
    }


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: a reader or a crash sees the old text or the new, never a part."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the run lacks {path}") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is damaged: expected JSON, but {e}") from e


def _jsonable(value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(value), default=_plain))
    except (TypeError, ValueError) as e:
        raise ConfigError(f"expected a JSON-able mapping: {e}") from e


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be stored as JSON")


def _require_empty(path: Path) -> None:
    if path.is_file():
        raise ConfigError(f"{path} is a file; --logdir must name a directory")
    if not path.is_dir():
        return
    if (path / "versions.json").exists():
        raise ConfigError(f"{path} already holds a run: continue it with --resume or choose another --logdir")
    # A start that was killed leaves these and no versions.json: nothing in them is worth keeping.
    unfinished = {"README.txt", "config.json", "checkpoints", ".lock"}
    foreign = [p.name for p in path.iterdir() if p.name not in unfinished and not p.name.endswith(".tmp")]
    if (path / "checkpoints").is_dir():
        foreign += [f"checkpoints/{p.name}" for p in (path / "checkpoints").iterdir()]
    if foreign:
        raise ConfigError(
            f"{path} is not empty and not a phyxdream run (it holds {sorted(foreign)[0]!r}): choose another --logdir"
        )


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    keys = sorted({*old, *new})
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path, tracked: str | None = None) -> dict[str, Any] | None:
    """Revision of the checkout around `folder`, or None without one (or when it does not track file `tracked`)."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
        return done.stdout.strip()

    try:
        if tracked is not None:
            git("ls-files", "--error-unmatch", tracked)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
