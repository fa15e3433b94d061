"""The errors ckptgrow raises on purpose: one class a kind of trouble, one message for the user.

Deep code raises short and the boundary that knows the file or the tensor adds it once with `at`. The command line
turns any of them into that message and exit status 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class CkptgrowError(Exception):
    """Something ckptgrow refuses or cannot do: what is wrong, where, and what to do about it."""

    def __init__(
        self, problem: str, *, file: str | None = None, tensor: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(problem)
        self.problem, self.file, self.tensor, self.hint = problem, file, tensor, hint

    def at(self, *, file: str | None = None, tensor: str | None = None) -> CkptgrowError:
        """The same error, placed: a file or tensor that deeper code already named is kept."""
        self.file = self.file or file
        self.tensor = self.tensor or tensor
        return self

    def __str__(self) -> str:
        where = [part for part in (self.file, self.tensor) if part]
        message = ": ".join([*where, self.problem])
        return f"{message}. {self.hint}" if self.hint else message


class FormatError(CkptgrowError):
    """A file is not what its name says: a broken safetensors header, index, config or manifest."""


class FamilyError(CkptgrowError):
    """These MLPs cannot be grown: unknown architecture, missing or undeclared tensors, contradicting shapes."""


class RequestError(CkptgrowError):
    """The options contradict each other or the checkpoint."""


class PlanError(CkptgrowError):
    """A Plan that does not fit its sources, or does not keep the function: a bug in ckptgrow, caught before writing."""


class OutputError(CkptgrowError):
    """The result cannot be written there: it exists, overlaps the source, or the disk is too small."""


class HubError(CkptgrowError):
    """The Hub has no such repository, does not let us in, or cannot be reached."""


class FreezeError(CkptgrowError):
    """Training would not keep, or did not keep, the frozen part: a foreign manifest, a wrapper, a leak."""
