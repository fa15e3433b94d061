"""Axolotl's YAML: the plugin, which holds the whole mask, or `unfrozen_parameters`, which knows ranges of rows only.

Axolotl's rules (its utils/freeze.py): an entry is a regular expression, matched from the start of a parameter's name,
in which dots are literal unless a + follows, and it may end in [start:stop], a range of the first dimension. Ranges of
entries that match one tensor are added up. What no entry matches is frozen. A column of down cannot be said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ckptgrow.dialects.patterns import patterns, spelled
from ckptgrow.dialects.subject import Subject, Trained, commented, head, quoted, roles

PLUGIN = "ckptgrow.training.axolotl.CkptgrowPlugin"
_MECHANISM = """
Ranges zero the gradient and nothing else: they hold only with weight decay 0, a fresh optimizer that is exact at zero
gradient (not ASGD, not 8-bit on CPU), and without FSDP or ZeRO-3, where their hooks are lost or see an empty tensor.
gradient_checkpointing_kwargs: {use_reentrant: true} is refused beside them. The plugin"""
_SPLIT = """ splits the tensors instead: no
decay and no optimizer sees the frozen part.
"""
_MASK = """ puts the frozen
elements back after each step instead.
"""


def _mechanism(subject: Subject) -> str:
    return _MECHANISM + (_MASK if any(one.stacked for one in subject.trained) else _SPLIT)


def as_axolotl(subject: Subject) -> str:
    """Lines for Axolotl's configuration file."""
    return "\n".join([*_lines(subject), ""])


def entries(subject: Subject) -> tuple[str, ...]:
    """`unfrozen_parameters` for every tensor whose trainable part is rows, or all of it."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for one in subject.trained:
        if is_rows(one):
            alike[("",) if one.whole else tuple(spelled(one.rows or ()))].append(one.name)
    found = []
    for spans, names in alike.items():
        others = set(subject.names) - set(names)
        found += [f"^{regex}${span}" for regex in patterns(names, others, dot=".") for span in spans]
    return tuple(found)


def is_rows(one: Trained) -> bool:
    """Whether Axolotl's ranges can say it."""
    return one.whole or one.rows is not None


def _lines(subject: Subject) -> Iterator[str]:
    columns = tuple(one for one in subject.trained if not is_rows(one))
    yield from head(subject, "ckptgrow mask for Axolotl.")
    yield f"base_model: {quoted(subject.model)}"
    if subject.revision:
        yield f"revision_of_model: {quoted(subject.revision)}"
    yield ""
    if columns:
        yield from _plugin_first(subject, columns)
    else:
        yield from _ranges_first(subject)


def _plugin_first(subject: Subject, columns: tuple[Trained, ...]) -> Iterator[str]:
    yield from commented(
        "EXACT: the plugin alone holds the whole mask, rows, columns and biases, whatever the weight decay. Leave"
        "\nunfrozen_parameters out, and `pip install ckptgrow` where Axolotl runs."
    )
    yield from _plugin(subject)
    yield ""
    rows = tuple(one for one in subject.trained if is_rows(one))
    lost = sum(one.frozen for one in columns)
    kinds = "columns and parts of stacks" if any(one.stacked for one in columns) else "columns"
    if not rows:
        yield from commented(
            f"Without the plugin: nothing. All that trains are {kinds} ({roles(columns)}), and Axolotl's ranges are"
            " rows.\nNaming the tensors whole would train their"
            f" {lost:,} frozen elements too."
        )
        return
    yield from commented(
        f"NOT EXACT, without the plugin: these ranges hold {roles(rows)}.\nThey cannot say {kinds} ({roles(columns)}):"
        f" left out as here, these stay frozen and learn nothing;\nnamed whole, their {lost:,} frozen elements train"
        f" too, which `ckptgrow audit` reports.\n{_mechanism(subject).strip()}\n\nunfrozen_parameters:\n"
        + "\n".join(f"  - {quoted(entry)}" for entry in entries(subject))
        + "\nweight_decay: 0.0"
    )


def _ranges_first(subject: Subject) -> Iterator[str]:
    partly = any(not one.whole for one in subject.trained)
    yield from commented(
        f"Axolotl's own syntax says all of it: {roles(subject.trained)}." + (_mechanism(subject) if partly else "")
    )
    yield "unfrozen_parameters:"
    yield from (f"  - {quoted(entry)}" for entry in entries(subject))
    yield from ("weight_decay: 0.0",) if partly else ()
    yield ""
    yield from commented(
        "EXACT whatever the weight decay and the optimizer: the plugin, in place of the lines above.\n"
        + "\n".join(_plugin(subject))
    )


def _plugin(subject: Subject) -> Iterator[str]:
    yield "plugins:"
    yield f"  - {PLUGIN}"
    yield f"ckptgrow_manifest: {quoted(str(subject.folder))}"
    if any(one.stacked for one in subject.trained):
        yield "ckptgrow_how: mask"
