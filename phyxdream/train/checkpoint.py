"""Checkpoints that survive kill -9 and full disks: safetensors and JSON, checksums, one atomic rename.

A checkpoint is a directory `checkpoints/step-000012345/` with `<group>.safetensors` for every group of tensors,
`state.json`, the directory `replay` when a replay was given, and `manifest.json` (format, sizes, checksums). It is
written beside under a temporary name, synced, and renamed when complete, so a directory named `step-*` is always a
whole checkpoint.

Several processes that learn together write into the same directory: process 0 as above, process r what it has of its
own as `<group>-r.safetensors` and `replay-r`. Process 0 completes it when all of them are done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from phyxdream import distributed
from phyxdream.errors import CheckpointError
from phyxdream.train.run import Run

FORMAT = "phyxdream-checkpoint"
VERSION = 2
_REPLAY = "replay"
_TEMPORARY = ".tmp-"
# A second checkpoint of one step gets a revision: replacing a directory is not atomic, adding one is.
_NAME = re.compile(r"step-(\d{9,})(?:\.(\d+))?")
_GROUP = re.compile(r"[A-Za-z0-9_]+")
_TENSORS = re.compile(r"([A-Za-z0-9_]+)(?:-(\d+))?\.safetensors")
_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip


class Savable(Protocol):
    """What `save` asks of a replay: to write itself to a directory, synced, that checks itself when read."""

    def save(self, path: str) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read by `load`.

    Attributes:
        path: its directory.
        step: environment steps at which it was taken.
        tensors: groups of tensors by name, on the CPU.
        state: the JSON state.
        replay_path: where the replay lies, for `Replay.load`; None when none was saved.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    replay_path: Path | None


def save(
    run: Run,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: dict[str, Any],
    replay: Savable | None = None,
    *,
    keep: int = 1,
) -> Path:
    """Write a checkpoint of `run` and return its directory, then remove all but the newest `keep`.

    The checkpoints before it stay until the new one is complete on disk, so there must be room for both. Checkpoints
    of later steps belong to a history this run has left, and are removed too.

    Called by all processes that learn together, each with what it has of its own; process 0 also gives what they have
    in common.

    Args:
        run: the run to save into.
        step: environment steps so far.
        tensors: groups such as "model" and "optimizer", each a flat dict of dense tensors of any shape and layout;
            tensors that share memory are written as if they did not.
        state: counters and the like; process 0's is saved. JSON types with string keys; tuples come back as lists.
        replay: written with its own `save(path)`.
        keep: how many checkpoints to leave, at least 1.

    Raises:
        ValueError, TypeError: an argument cannot be saved; nothing was touched.
        CheckpointError: writing failed (full disk, file size limit, ...); the earlier checkpoints are untouched.
    """
    _check_arguments(step, tensors, state, keep)
    draft = _Draft(run, step, distributed.on_first(lambda: _next_name(run, step)))
    try:
        distributed.on_first(draft.begin)
        parts = distributed.gather_objects(distributed.together(lambda: draft.write(tensors, state, replay)))
        files = {name: entry for part in parts for name, entry in part.items()}
        distributed.on_first(lambda: draft.complete(files, replay is not None))
    except BaseException:  # also Ctrl-C, or a bug: the half-written checkpoint is gone either way
        if distributed.is_first():
            shutil.rmtree(draft.temporary, ignore_errors=True)
        raise
    distributed.on_first(lambda: _remove_old(run, draft.path, keep))
    return draft.path


class _Draft:
    """A checkpoint while it is being written: begun and completed by process 0, written by each."""

    def __init__(self, run: Run, step: int, name: str):
        self.run, self.step = run, step
        self.path, self.temporary = run.checkpoints / name, run.checkpoints / f"{_TEMPORARY}{name}"

    def begin(self) -> None:
        with self._naming("the directory"):
            self.run.checkpoints.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.run.checkpoints)
            self.temporary.mkdir()

    def write(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict[str, Any], replay: Savable | None
    ) -> dict[str, dict[str, Any]]:
        """Write what this process has; returns its files as the manifest describes them."""
        rank, files = distributed.rank(), {}
        for group, members in tensors.items():
            name = f"{_own(group, rank)}.safetensors"
            with self._naming(name):
                save_file(_separate(members), str(self.temporary / name))
                files[name] = _sync(self.temporary / name)
        if rank == 0:
            with self._naming("state.json"):
                (self.temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
                files["state.json"] = _sync(self.temporary / "state.json")
        if replay is not None:
            name = _own(_REPLAY, rank)
            with self._naming(name):
                replay.save(str(self.temporary / name))
        return files

    def complete(self, files: dict[str, dict[str, Any]], replay: bool) -> None:
        manifest = {"format": FORMAT, "version": VERSION, "step": self.step, "files": files, "replay": replay,
                    "world_size": distributed.world_size()}  # fmt: skip
        manifest["checksum"] = _digest(manifest)
        with self._naming("manifest.json"):
            (self.temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _sync(self.temporary / "manifest.json", checksum=False)
            _sync_directory(self.temporary)
        with self._naming("the directory"):
            os.rename(self.temporary, self.path)
            _sync_directory(self.run.checkpoints)

    @contextlib.contextmanager
    def _naming(self, writing: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError, ValueError) as e:
            raise CheckpointError(_failure(self.run, self.step, writing, e)) from e


def available(run: Run) -> list[Path]:
    """The complete checkpoints of `run`, oldest step first."""
    if not run.checkpoints.is_dir():
        return []
    found = [(match, path) for path in run.checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(((int(m[1]), int(m[2] or 0)), path) for m, path in found)]


def latest(run: Run) -> Path | None:
    """The newest complete checkpoint of `run`, or None when there is none yet."""
    return (available(run) or [None])[-1]


def load(path: str | os.PathLike[str], rank: int = 0) -> Checkpoint:
    """Read and verify a checkpoint directory. The replay is not read: give `replay_path` to `Replay.load`.

    Args:
        path: the directory.
        rank: the process whose own groups and replay to read, of several that wrote it.

    Raises:
        CheckpointError: it is missing, truncated, altered, foreign, or of a newer format; the message names the file,
            what was found and what was expected.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    tensors = {}
    for group, name in _groups(manifest["files"], rank).items():
        _verify(path / name, manifest["files"][name])
        try:
            tensors[group] = load_file(str(path / name))
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{path / name} is damaged: expected a safetensors file, but {e}") from e
    _verify(path / "state.json", manifest["files"]["state.json"])
    replay_path = path / _own(_REPLAY, rank) if manifest.get("replay") else None
    if replay_path and not replay_path.is_dir():
        raise CheckpointError(f"{replay_path} is missing: expected the directory of a replay")
    state = _read_object(path / "state.json")
    return Checkpoint(path, manifest["step"], tensors, state, replay_path)


def world_size(path: str | os.PathLike[str]) -> int:
    """How many processes wrote a checkpoint; raises `CheckpointError` when its manifest cannot be read."""
    return _read_manifest(Path(path)).get("world_size", 1)


def load_latest(run: Run) -> Checkpoint:
    """Read the newest checkpoint of `run`, which may still be training.

    Raises:
        CheckpointError: there is none yet, or what `load` raises.
    """
    for last_try in (False, True):
        newest = latest(run)
        if newest is None:
            raise CheckpointError(f"{run.path}: no checkpoint was written yet")
        try:
            return load(newest)
        except CheckpointError:
            if last_try or newest.exists():
                raise  # damaged; otherwise training has just replaced it
    raise AssertionError("unreachable")


def _check_arguments(
    step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict[str, Any], keep: int
) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an int >= 0, got {step!r}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep!r}")
    for group, members in tensors.items():
        if not isinstance(group, str) or not _GROUP.fullmatch(group):
            raise ValueError(f"tensors: group names are made of letters, digits and '_', got {group!r}")
        for key, tensor in members.items():
            where = f"tensors[{group!r}][{key!r}]"
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected a str key, got {type(key).__name__}")
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
            if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
                raise TypeError(
                    f"{where}: expected a dense tensor with data and a bool, int or float dtype, "
                    f"got {tensor.dtype}, {tensor.layout}, on {tensor.device}"
                )
    if not isinstance(state, dict):
        raise TypeError(f"state: expected a dict, got {type(state).__name__}")
    _check_json(state, "state")


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: JSON keys are str, got {key!r} ({type(key).__name__})")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(f"{where}: expected a JSON type, got {type(value).__name__}")


def _own(name: str, rank: int) -> str:
    """What process `rank` calls its `name`."""
    return f"{name}-{rank}" if rank else name


def _groups(files: Mapping[str, Any], rank: int) -> dict[str, str]:
    """The file of every group as process `rank` reads them: its own where it has one, else that of process 0."""
    found = {m[1]: name for name in files if (m := _TENSORS.fullmatch(name)) and not m[2]}
    own = {m[1]: name for name in files if (m := _TENSORS.fullmatch(name)) and m[2] == str(rank)}
    return found | own


def _separate(members: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors of which no two share a storage; copies only where needed."""
    seen: set[int] = set()
    result = {}
    for key, tensor in members.items():
        tensor = tensor.detach().cpu().resolve_neg().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _next_name(run: Run, step: int) -> str:
    name = f"step-{step:09d}"
    revisions = [int(m[2] or 0) for p in available(run) if (m := _NAME.fullmatch(p.name)) and int(m[1]) == step]
    return f"{name}.{max(revisions) + 1}" if revisions else name


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _remove_old(run: Run, newest: Path, keep: int) -> None:
    paths = available(run)
    position = paths.index(newest)
    for path in paths[: max(0, position + 1 - keep)] + paths[position + 1 :]:
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
        # What cannot be removed now is a leftover for the next save; the new checkpoint is safe.
        with contextlib.suppress(OSError):
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _sync(path: Path, *, checksum: bool = True) -> dict[str, Any]:
    """Force a file to disk and describe it for the manifest."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    return {"size": size, "sha256": _sha256(path)} if checksum else {"size": size}


def _sync_directory(path: Path) -> None:
    # Not every system lets a directory be synced (EINVAL on some network mounts, EACCES on Windows).
    with contextlib.suppress(PermissionError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        finally:
            os.close(fd)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: expected JSON, but {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: expected a directory such as checkpoints/step-000012345")
    file = path / "manifest.json"
    if not file.is_file():
        raise CheckpointError(f"{path} is not a phyxdream checkpoint: it has no manifest.json")
    manifest = _read_object(file)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f'{file} is not of a phyxdream checkpoint: expected "format": "{FORMAT}", got {manifest.get("format")!r}'
        )
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{file} has checkpoint format {version!r}, this phyxdream reads up to {VERSION}: upgrade phyxdream"
        )
    if manifest.pop("checksum", None) != _digest(manifest):
        raise CheckpointError(f"{file} is damaged: its content does not match its checksum")
    return manifest


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: expected a file of {entry['size']:,} bytes")
    size = path.stat().st_size
    if size != entry["size"]:
        what = "truncated" if size < entry["size"] else "altered"
        raise CheckpointError(f"{path} is {what}: expected {entry['size']:,} bytes, got {size:,}")
    if "sha256" in entry and _sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its content does not match the checksum in manifest.json")


def _failure(run: Run, step: int, writing: str, error: BaseException) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    try:
        free = f" ({shutil.disk_usage(run.path).free / 1e6:,.1f} MB free)"
    except OSError:
        free = ""
    safe = latest(run)
    kept = f"the checkpoint {safe} is untouched" if safe else "the run has no earlier checkpoint"
    return (
        f"could not write the checkpoint of step {step:,} to {run.checkpoints}: {writing}: {reason}{free}; "
        f"the unfinished files were removed, and {kept}"
    )
