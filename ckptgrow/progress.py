"""How far a verb has come: bytes (or elements) counted on any thread, told to whoever asked. Draws nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # stage, done, in all; called from any thread


class Meter:
    """Adds up what threads report of one stage and passes the sum on."""

    def __init__(self, report: Progress, stage: str, total: int) -> None:
        self._report, self._stage, self._total = report, stage, total
        self._done, self._turn = 0, threading.Lock()

    def __call__(self, step: int) -> None:
        with self._turn:
            self._done += step
            self._report(self._stage, self._done, self._total)


def uncounted(step: int) -> None:
    """Steps of something that is no stage of its own."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a verb that nobody watches."""
