"""What came in since the last checkpoint, on disk: rows that a learner has taken survive its kill -9.

A journal is a folder of numbered files, each a sequence of records: length and checksum (`<QI`), then the message.
Every checkpoint begins a new file and remembers its number; files before it are removed once the checkpoint is
complete. So whatever the moment of a kill, the files from the newest checkpoint's number on hold what it lacks.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from phyxdream.errors import CheckpointError

_HEAD = struct.Struct("<QI")


def _checksum(message: bytes) -> int:
    """Not 0 for an empty message: zeros, which a power cut may leave at a file's end, are no records."""
    return zlib.crc32(message, 1)


class Journal:
    """An append-only journal of byte strings in the folder `path`, which is made if need be.

    Records are handed to the system, which writes them even if this process is killed; they are not synced one by one,
    so a power cut may lose the last of them.

    Args:
        path: the folder.
        after: files get higher numbers than this, even if there are none any more.

    Raises:
        CheckpointError: the folder or a file cannot be written or read.
    """

    def __init__(self, path: Path, after: int = 0):
        self.path = path
        self._file: int | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._number = max([after, *(number for number, _ in self._files())])
        except OSError as e:
            raise self._error("write", e) from e

    def turn(self) -> int:
        """Begin a new file; returns its number."""
        self.close()
        self._number += 1
        try:
            self._file = os.open(self._name(self._number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as e:
            raise self._error("write", e) from e
        return self._number

    def append(self, message: bytes) -> None:
        """Add a record; one that could not be written whole leaves nothing behind."""
        if self._file is None:
            self.turn()
        end = os.fstat(self._file).st_size
        rest = memoryview(_HEAD.pack(len(message), _checksum(message)) + message)
        try:
            while rest:  # a disk that fills up takes a part first and then raises the reason
                rest = rest[os.write(self._file, rest) :]
        except OSError as e:
            os.ftruncate(self._file, end)
            raise self._error("write", e) from e

    def read(self, first: int = 0) -> Iterator[bytes]:
        """The records of the files from number `first` on. A file ends at the first record that is not whole: there
        its writer was killed."""
        for number, path in self._files():
            if number < first:
                continue
            try:
                with open(path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    while len(head := file.read(_HEAD.size)) == _HEAD.size:
                        length, checksum = _HEAD.unpack(head)
                        if length > size - file.tell():
                            break
                        message = file.read(length)
                        if _checksum(message) != checksum:
                            break
                        yield message
            except OSError as e:
                raise self._error("read", e) from e

    def drop_before(self, number: int) -> None:
        """Remove the files before this one."""
        for earlier, path in self._files():
            if earlier < number:
                with contextlib.suppress(OSError):  # the next checkpoint tries again
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the file at hand; the next record begins another."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _name(self, number: int) -> Path:
        return self.path / f"{number:06d}.rows"

    def _files(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem), path) for path in self.path.glob("*.rows") if path.stem.isdecimal())

    def _error(self, verb: str, e: OSError) -> CheckpointError:
        return CheckpointError(f"could not {verb} the journal {self.path}: {e.strerror or e}; checkpoints are "
                               "untouched")  # fmt: skip
