"""All or nothing: a result is built in OUT.partial beside OUT and becomes OUT by one rename.

    OUT.partial/               each shard is written as NAME.tmp, flushed to disk, renamed; index, manifest, config last
    OUT.partial.journal        what is being written and which shards are finished (journal.py)

An error or an interrupt removes both. A killed process leaves them, and OUT as it was; the next run starts anew or,
with `resume`, goes on from the finished shards. Where the system cannot exchange two names in one step (it is not
Linux, or a file system that does not know how), replacing an OUT takes two renames, and a kill between them leaves the
old one whole as OUT.partial.old.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ckptgrow.checkpoint import CONFIG, MANIFEST
from ckptgrow.errors import OutputError
from ckptgrow.journal import Journal


def check_target(out: Path, *, force: bool) -> None:
    """Refuse an OUT that exists, or with `force` one that is not a checkpoint folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError("it exists and is not a folder", file=str(out))
    if not out.exists():
        return
    if not force:
        raise OutputError("it exists", file=str(out), hint="Give a new folder, or --force to replace it.")
    weights = (out / MANIFEST).is_file() or any(out.glob("*.safetensors"))
    if any(out.iterdir()) and not ((out / CONFIG).is_file() and weights):
        raise OutputError("it holds no checkpoint, so --force does not replace it", file=str(out))


def check_apart(out: Path, source: Path) -> None:
    """Refuse an OUT that is the source, lies inside it, or holds it; and one whose OUT.partial would be the source."""
    origin = source.resolve()
    for target in (out.resolve(), partial(out).resolve()):
        if target == origin or origin in target.parents:
            raise OutputError(f"it is inside the source {source}", file=str(target), hint="Give a folder outside it.")
        if target in origin.parents:
            raise OutputError(f"it holds the source {source}", file=str(target), hint="Give a folder beside it.")


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
        self._journal: Journal | None = None

    def __enter__(self) -> Staging:
        try:
            self._make_parents()
            self._journal = Journal(self.folder.with_name(self.folder.name + ".journal"))
            self._open(self._journal)
        except BaseException:
            if self._journal is not None:
                self._journal.close(keep=bool(self._journal.left))
            self._drop_parents()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._journal is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._journal.close(keep=False)
            self._drop_parents()

    def record(self, file: str, facts: dict[str, Any]) -> None:
        """Note a shard as finished. Called by one thread at a time."""
        self.finished[file] = facts
        if self._journal is not None:
            self._journal.note(file=file, **facts)

    def put(self, name: str, text: str) -> None:
        """Write a small file, flushed to disk."""
        with (self.folder / name).open("wb") as file:
            file.write(text.encode(errors="replace"))  # a folder's name may be anything
            file.flush()
            os.fsync(file.fileno())

    def copy(self, source: Path, name: str) -> None:
        """Copy a file's bytes to a place in the folder; a link becomes what it points to."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        _sync(target)

    def commit(self) -> None:
        """Make the folder OUT; with `force` an old OUT stays whole until it is replaced, and then goes.

        Without it an OUT that appeared in the meantime stays. Raises OutputError then.
        """
        _sync(self.folder)
        if self.force and self.out.exists():
            _swap(self.folder, self.out)
        else:
            self._appear()
        _sync(self.out.parent)
        if self._journal is not None:
            self._journal.close(keep=False)
            self._journal = None

    def _appear(self) -> None:
        try:
            self.folder.rename(self.out)
        except OSError:
            if self.out.exists():
                raise OutputError("it appeared while the result was being made", file=str(self.out)) from None
            raise

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

    def _open(self, journal: Journal) -> None:
        """Take over or clear what a killed run left; a folder that none of ours left is refused."""
        if self.folder.is_symlink() or (self.folder.exists() and not journal.left):
            raise OutputError("it is in the way and not a leftover of ckptgrow: remove it", file=str(self.folder))
        if self.force and _aside(self.out).exists():
            raise OutputError("an earlier run left it: move it back, or remove it", file=str(_aside(self.out)))
        if self.resume and journal.left:
            self._take_over(journal.notes())
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        journal.begin()
        journal.note(writing=self.identity)
        self.folder.mkdir()

    def _take_over(self, notes: list[dict[str, Any]]) -> None:
        """Keep the finished shards of a run of the same identity, and nothing else of it."""
        if not notes or notes[0].get("writing") != self.identity:
            raise OutputError(
                "it was begun with another source, other options or another version, so it cannot be resumed",
                file=str(self.folder),
                hint="Run again without --resume to start anew.",
            )
        self.folder.mkdir(exist_ok=True)
        self.finished = {note.pop("file"): note for note in notes[1:] if (self.folder / note["file"]).is_file()}
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in self.finished:
                path.unlink()


def write_new(out: Path, text: str) -> None:
    """Write a new small file, whole or not at all. Raises OutputError where something is there already."""
    temporary = partial(out)
    for path in (out, temporary):
        if path.is_symlink() or path.exists():
            raise OutputError("it exists", file=str(path), hint="Give a new name, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        _sync(temporary)
        temporary.rename(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, where the system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(new: Path, old: Path) -> None:
    """Put `new` in the place of `old` and remove `old`: in one step where the system can exchange two names."""
    if _exchange(new, old):
        shutil.rmtree(new)
        return
    aside = _aside(old)
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    shutil.rmtree(aside)


def _aside(out: Path) -> Path:
    """Where an OUT that is being replaced waits, if two renames are needed."""
    return partial(out).with_name(partial(out).name + ".old")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically (Linux renameat2); False where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return call is not None and call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0
