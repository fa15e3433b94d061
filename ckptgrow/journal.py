"""The journal of a run: a small file beside what is being written, locked as long as a process writes it.

Line 1 says what is being written, then each finished shard has a line; all are JSON. That the file is there is the
proof that the folder beside it is ours; that it is locked, that somebody is at work.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ckptgrow.errors import OutputError

if sys.platform != "win32":
    import fcntl


class Journal:
    """Opened and locked on creation. `left` is what an earlier run wrote, "" where there was none.

    Raises OutputError where another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _locked(path)
        self._file.seek(0)
        self.left = self._file.read()

    def notes(self) -> list[dict[str, Any]]:
        """The whole lines of the earlier run; none where they are damaged."""
        try:
            notes = [json.loads(line) for line in self.left.splitlines(keepends=True) if line.endswith("\n")]
        except ValueError:
            return []
        return notes if all(isinstance(note, dict) for note in notes) else []

    def begin(self) -> None:
        """Forget the earlier run."""
        self._file.truncate(0)

    def note(self, **facts: Any) -> None:
        """Write a line, flushed to disk."""
        self._file.write(json.dumps(facts) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, *, keep: bool) -> None:
        """Let others in; without `keep` the file is gone first."""
        if not keep:
            with suppress(FileNotFoundError):
                self.path.unlink()
        self._file.close()


def _locked(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise OutputError("another ckptgrow is writing there", file=str(path)) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its owner finished and removed it between our opening and locking: there is a new one, or none
