"""Rows that are exact linear combinations of others: found with fractions, and held against every element before use.

For a few rows, those of units with one gate (METHOD.md 5, case 5). Floats only choose where to look: which groups of
rows may be dependent, and at which elements a system of equations is best solved. It is solved in fractions there, and
what comes out counts only if it holds at all other elements too. A factor must moreover be short: float64 has to hold
its product with any weight, so that all that rounds is the one sum that is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ckptgrow.numeric import Floats, added

MOST = 8  # rows that are looked at together
LOOKED_AT = 16  # elements of each row by which a group is chosen or passed over
DOUBT = 1e-9  # singular values closer to zero than this may be zero
Factors = tuple[tuple[int, float], ...]


def short(factors: Floats, bits: int) -> NDArray[np.bool_]:
    """Which factors have so few bits that float64 holds their product with any weight."""
    mantissa = np.abs(np.frexp(factors)[0]) * 2.0**bits
    held: NDArray[np.bool_] = (np.abs(factors) == 1) | ((mantissa == np.floor(mantissa)) & (factors != 0) & (bits > 0))
    return held


def doubtful(some: Floats) -> NDArray[np.bool_]:
    """Which groups of rows may be dependent, by a few elements of each: [groups, rows, elements]."""
    if some.shape[2] < some.shape[1]:
        return np.ones(len(some), bool)
    size = np.abs(some).max(axis=2, keepdims=True)
    values = np.linalg.svd(some / np.where(size > 0, size, 1.0), compute_uv=False)
    found: NDArray[np.bool_] = values[:, -1] <= DOUBT * values[:, 0]
    return found


@dataclass(frozen=True, slots=True)
class Combinations:
    """Rows that are sums of others times factors, and those that are, but by factors that are too long."""

    made: Mapping[int, Factors]
    long: frozenset[int]


def combinations(rows: Floats, bits: int) -> Combinations:
    """Which of the rows [rows, elements] are combinations of those that are not; `bits` that a factor may have.

    The first rows are kept before the last ones, or the other way round where that makes more of them.
    """
    places = _places(rows)
    forth, back = (_combinations(rows, order, places, bits) for order in (range(len(rows)), range(len(rows))[::-1]))
    return back if len(back.made) > len(forth.made) else forth


def _places(rows: Floats) -> list[int]:
    """Elements at which the rows are as independent as they are: at each step the one least like those before it."""
    size = np.abs(rows).max(axis=1, keepdims=True)
    left, places = rows / np.where(size > 0, size, 1.0), list[int]()
    for _ in range(min(rows.shape)):
        norms = (left * left).sum(axis=0)
        best = int(norms.argmax())
        if norms[best] <= DOUBT**2:
            break
        places.append(best)
        direction = left[:, best] / np.sqrt(norms[best])
        left = left - np.outer(direction, direction @ left)
    return places


@dataclass(slots=True)
class _Basis:
    """Independent rows in echelon form: of each its pivot, its elements, and which rows it is made of."""

    pivots: list[int] = field(default_factory=list)
    rows: list[list[Fraction]] = field(default_factory=list)
    made: list[dict[int, Fraction]] = field(default_factory=list)

    def reduced(self, row: list[Fraction]) -> tuple[list[Fraction], dict[int, Fraction]]:
        """What is left of a row, and what was taken from it, by the rows that went into the basis."""
        taken: dict[int, Fraction] = {}
        for pivot, own, made in zip(self.pivots, self.rows, self.made, strict=True):
            factor = row[pivot] / own[pivot]
            if factor:
                row = [one - factor * other for one, other in zip(row, own, strict=True)]
                for index, part in made.items():
                    taken[index] = taken.get(index, Fraction(0)) + factor * part
        return row, {index: part for index, part in taken.items() if part}

    def add(self, index: int, row: list[Fraction], taken: Mapping[int, Fraction]) -> None:
        self.pivots.append(next(i for i, value in enumerate(row) if value))
        self.rows.append(row)
        self.made.append({index: Fraction(1)} | {other: -part for other, part in taken.items()})


def _combinations(rows: Floats, order: Iterable[int], places: list[int], bits: int) -> Combinations:
    basis, made, long = _Basis(), dict[int, Factors](), set[int]()
    for index in order:
        left, taken = basis.reduced([Fraction(float(value)) for value in rows[index, places]])
        if any(left):
            basis.add(index, left, taken)
            continue
        factors = {other: float(part) for other, part in taken.items()}
        exact = all(Fraction(factors[other]) == part for other, part in taken.items())
        if exact and short(np.array([*factors.values()]), bits).all() and _holds(rows, index, factors):
            made[index] = tuple(factors.items())
        elif _holds_at_length(rows, index, taken):
            long.add(index)
    return Combinations(made, frozenset(long))


def _holds(rows: Floats, index: int, factors: Mapping[int, float]) -> bool:
    """Whether the row is that sum at every element, to the bit; the products are exact."""
    if not factors:
        return False
    total, lost = added(rows[other] * factor for other, factor in factors.items())
    return bool((total == rows[index]).all() and not lost.any())


def _holds_at_length(rows: Floats, index: int, factors: Mapping[int, Fraction]) -> bool:
    """The same in fractions, for factors that floats do not hold."""
    for place, value in enumerate(rows[index]):
        if sum(part * Fraction(float(rows[other, place])) for other, part in factors.items()) != Fraction(float(value)):
            return False
    return bool(factors)
