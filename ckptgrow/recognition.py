"""Tensors that nothing trained, known again by their bytes where nobody knows the names they came back under.

transformers renames more than MLPs between disk and memory, model by model. A tensor that was frozen whole has the
elements it had, so no table of names is needed: equal elements are that tensor, or one that cannot be told from it. A
tensor that moved is not found here, and stays missing.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from ckptgrow.checkpoint import Tensors
from ckptgrow.errors import CkptgrowError
from ckptgrow.numeric import FLOATS, decode, encode

_BLOCK = 1 << 18  # elements


@runtime_checkable
class Digested(Protocol):
    """Tensors whose digests are to be had without their elements."""

    def digest(self, name: str) -> str: ...


def recognised(own: Tensors, missing: Iterable[str], trained: Tensors, strangers: Iterable[str]) -> dict[str, str]:
    """Missing tensor -> stranger with the same shape and, in the own dtype, the same elements."""
    waiting: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in missing:
        waiting[own.infos[name].shape].append(name)
    digests: dict[str, str | None] = {}
    found: dict[str, str] = {}
    for stranger in strangers:
        names = waiting.get(trained.infos[stranger].shape, [])
        seen: dict[str, str | None] = {}
        for name in names:
            dtype = own.infos[name].dtype
            if name not in digests:
                digests[name] = own.digest(name) if isinstance(own, Digested) else _digest(own, name, dtype)
            if dtype not in seen:
                seen[dtype] = _digest(trained, stranger, dtype)
            if seen[dtype] is not None and seen[dtype] == digests[name]:
                found[name] = stranger
                names.remove(name)
                break
    return found


def _digest(tensors: Tensors, name: str, dtype: str) -> str | None:
    """The digest of a tensor's bytes in that dtype; None where it has no such bytes."""
    its = tensors.infos[name].dtype
    if its != dtype and not {its, dtype} <= FLOATS.keys():
        return None
    told, bits = hashlib.sha256(), tensors.bits(name).reshape(-1)
    for start in range(0, len(bits), _BLOCK):
        block = np.ascontiguousarray(bits[start : start + _BLOCK])
        try:
            told.update((block if its == dtype else encode(decode(block, its), dtype)).data)
        except CkptgrowError:  # a value that the dtype does not hold
            return None
    return "sha256:" + told.hexdigest()
