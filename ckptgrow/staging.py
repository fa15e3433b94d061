"""All or nothing: a result is built in OUT.partial beside OUT and becomes OUT by one rename.

    OUT.partial/
      .ckptgrow-journal       line 1: what is being written; then one line for each finished shard. Locked while
                              a process writes.
      model-...safetensors    finished: written as NAME.tmp, flushed to disk, renamed

An error or an interrupt removes OUT.partial. A killed process leaves it, and OUT as it was; the next run starts anew
or, with `resume`, goes on from the finished shards.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ckptgrow.checkpoint import CONFIG, MANIFEST
from ckptgrow.errors import OutputError

if sys.platform != "win32":
    import fcntl

JOURNAL = ".ckptgrow-journal"


def check_target(out: Path, *, force: bool) -> None:
    """Refuse an OUT that exists, or with `force` one that is not a checkpoint folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError("it exists and is not a folder", file=str(out))
    if not out.exists():
        return
    if not force:
        raise OutputError("it exists", file=str(out), hint="Give a new folder, or --force to replace it.")
    if any(out.iterdir()) and not (out / CONFIG).is_file():
        raise OutputError("it holds no checkpoint, so --force does not replace it", file=str(out))


def check_apart(out: Path, source: Path) -> None:
    """Refuse an OUT that is the source, lies inside it, or holds it."""
    target, origin = out.resolve(), source.resolve()
    if target == origin or origin in target.parents:
        raise OutputError(f"it is inside the source {source}", file=str(out), hint="Give a folder outside it.")
    if target in origin.parents:
        raise OutputError(f"it holds the source {source}", file=str(out), hint="Give a folder beside it.")


def free_bytes(out: Path) -> int:
    """Free space on the disk where OUT will lie."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(out: Path, needed: int) -> None:
    """Refuse before the first byte what the disk cannot hold; leftovers of a killed run are reused or removed."""
    left = partial(out)
    there = sum(path.stat().st_blocks * 512 for path in left.rglob("*") if path.is_file()) if left.is_dir() else 0
    free = free_bytes(out) + there
    if needed > free:
        raise OutputError(f"{needed:,} bytes are to be written and {free:,} are free on that disk", file=str(out))


def partial(out: Path) -> Path:
    """The folder in which OUT is built."""
    return out.with_name(out.name + ".partial")


class Staging:
    """OUT while it is being made; use as a context manager and call `commit` at the end.

    `identity` names what is being written: only a run with the same identity may resume it.
    """

    def __init__(self, out: Path, identity: str, *, force: bool = False, resume: bool = False) -> None:
        self.out, self.identity, self.force, self.resume = out, identity, force, resume
        self.folder = partial(out)
        self.finished: dict[str, dict[str, Any]] = {}
        self._made: list[Path] = []
        self._journal: TextIO | None = None

    def __enter__(self) -> Staging:
        try:
            self._make_parents()
            self._open()
        except BaseException:
            self._close()
            self._drop_parents()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._journal is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._close()
            self._drop_parents()

    def record(self, file: str, facts: dict[str, Any]) -> None:
        """Note a shard as finished. Called by one thread at a time."""
        self.finished[file] = facts
        self._note({"file": file, **facts})

    def put(self, name: str, text: str) -> None:
        """Write a small file, flushed to disk."""
        with (self.folder / name).open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def copy(self, source: Path, name: str) -> None:
        """Copy a file's bytes to a place in the folder; a link becomes what it points to."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def commit(self) -> None:
        """Make the folder OUT; with `force` an old OUT stays whole until it is replaced, and then goes.

        Without it an OUT that appeared in the meantime makes the rename fail, and stays.
        """
        (self.folder / JOURNAL).unlink()
        _sync(self.folder)
        if self.force and self.out.exists():
            _swap(self.folder, self.out)
        else:
            self.folder.rename(self.out)
        _sync(self.out.parent)
        self._close()

    def _make_parents(self) -> None:
        parent = self.out.absolute().parent
        while not parent.exists():
            self._made.append(parent)
            parent = parent.parent
        self.out.absolute().parent.mkdir(parents=True, exist_ok=True)

    def _drop_parents(self) -> None:
        for parent in self._made:
            with suppress(OSError):
                parent.rmdir()

    def _open(self) -> None:
        if self.folder.exists() and not _is_ours(self.folder):
            raise OutputError("it is in the way and not a leftover of ckptgrow: remove it", file=str(self.folder))
        self.folder.mkdir(exist_ok=True)
        self._journal = (self.folder / JOURNAL).open("a+", encoding="utf-8")
        try:
            _lock(self._journal)
        except OSError:
            self._close()
            raise OutputError("another ckptgrow is writing it", file=str(self.folder)) from None
        self._journal.seek(0)
        lines = self._journal.read().splitlines(keepends=True)
        if self.resume and lines:
            self._take_over([json.loads(line) for line in lines if line.endswith("\n")])
        else:
            self._clear(keep=())
            self._journal.truncate(0)
            self._note({"writing": self.identity})

    def _take_over(self, notes: list[dict[str, Any]]) -> None:
        if not notes or notes[0].get("writing") != self.identity:
            self._close()
            raise OutputError(
                "it was begun with another source, other options or another version, so it cannot be resumed",
                file=str(self.folder),
                hint="Run again without --resume to start anew.",
            )
        self.finished = {note.pop("file"): note for note in notes[1:] if (self.folder / note["file"]).is_file()}
        self._clear(keep=self.finished)

    def _clear(self, keep: Any) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != JOURNAL and path.name not in keep:
                path.unlink()

    def _note(self, facts: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(facts) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _is_ours(folder: Path) -> bool:
    """A folder of a killed run: its journal is there, or it was complete, or it had only just been made."""
    return folder.is_dir() and (
        (folder / JOURNAL).exists() or (folder / MANIFEST).exists() or not any(folder.iterdir())
    )


def _lock(file: TextIO) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(new: Path, old: Path) -> None:
    """Put `new` in the place of `old` and remove `old`: in one step where the system can exchange two names."""
    if _exchange(new, old):
        shutil.rmtree(new)
        return
    aside = old.with_name(old.name + ".old")
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically (Linux renameat2); False where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return call is not None and call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0
