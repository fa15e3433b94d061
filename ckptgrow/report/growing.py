"""How inspect, expand and verify read in a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from ckptgrow.equivalence import Answer
from ckptgrow.layers import named
from ckptgrow.report.lines import row, size, widths
from ckptgrow.results import Declaration, Expansion, Inspection, Proposal, Verification

_VERDICTS = {0: "the same function", 1: "NOT the same function", 2: "cannot tell"}


def inspection(seen: Inspection) -> str:
    """What `ckptgrow inspect` prints."""
    return "\n".join(_inspection(seen))


def proposal(what: Proposal) -> str:
    """What `ckptgrow expand --plan` prints."""
    return "\n".join(_proposal(what))


def expansion(done: Expansion) -> str:
    """What `ckptgrow expand` prints at its end."""
    return "\n".join(_expansion(done))


def verification(result: Verification) -> str:
    """What `ckptgrow verify` prints: a line for each answer, its findings below, the verdict last."""
    lines = [*answers(result.answers)]
    skipped = [answer.name for answer in result.answers if answer.verdict == "not run"]
    how = f" (proved on the weights, {' and '.join(skipped)} not run)" if skipped and result.same else ""
    return "\n".join([*lines, f"{result.grown}: {_VERDICTS[result.exit_code]}{how}"])


def declared(guess: Declaration) -> str:
    """The declaration as the file that `--family` takes."""
    return json.dumps(guess.declaration, indent=2)


def declaration(guess: Declaration) -> str:
    """What `ckptgrow inspect --propose` says beside the declaration: what it was guessed from, and whether it holds."""
    lines = [row("guess", note) for note in guess.notes]
    held = f"not yet: {guess.problem}" if guess.problem else "yes: every tensor it names is there and fits"
    return "\n".join([*lines, row("holds", held), "Read it before you use it: expand --family FILE."])


def _inspection(seen: Inspection) -> Iterator[str]:
    yield row("source", f"{seen.source}" + (f" @ {seen.revision}" if seen.revision else ""))
    kind = "" if seen.gated is None else ", gated MLPs" if seen.gated else ", MLPs without gate"
    yield row("model_type", f"{seen.model_type}{kind}")
    yield from widths((block.name, block.layer, f"{block.width:,} units x {block.hidden:,}") for block in seen.blocks)
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in seen.dtypes.items())
    yield row("parameters", f"{seen.parameters:,} ({dtypes})")
    yield row("bytes", f"{size(seen.bytes)} in {seen.shards} shard{'s' if seen.shards != 1 else ''}")
    for name, owner in seen.ties.items():
        yield row("tied", f"{name} is {owner}")
    if seen.grown_before:
        yield row("history", f"grown {seen.grown_before} time{'s' if seen.grown_before > 1 else ''} before")
    if seen.norm_after:
        yield row(
            "note", "a norm follows each MLP: outputs cannot see the scale of down, so trust verify's second line"
        )
    if seen.growable:
        yield row("can grow", f"the {len(seen.blocks)} MLPs above, to any larger width")
    else:
        yield row("cannot grow", f"{seen.reason}")


def _proposal(what: Proposal) -> Iterator[str]:
    yield row("grow", f"{what.source} ({what.family}) -> {what.out}")
    yield from _grown_blocks(what)
    yield from _recast(what)
    more = what.parameters_after / what.parameters_before - 1
    yield row("parameters", f"{what.parameters_before:,} -> {what.parameters_after:,} (+{more:.1%})")
    yield row("policy", f"{what.policy}: {what.policy_about}")
    yield row("trainable", f"{what.trainable:,} parameters, {what.trainable_share_of_base:.1%} of the base")
    yield from _shared_out(what)
    yield row("writes", f"{size(what.bytes_to_write)}, {size(what.bytes_free)} free on that disk")
    yield row("shards", f"{what.shards_rewritten} rewritten, {what.shards_copied} copied as they are")
    if what.files_copied:
        yield row("copies", ", ".join(what.files_copied))
    if what.files_left_out:
        yield row("leaves out", ", ".join(what.files_left_out))


def _expansion(done: Expansion) -> Iterator[str]:
    what = done.proposal
    yield from _grown_blocks(what)
    yield from _recast(what)
    yield row("parameters", f"{what.parameters_before:,} -> {what.parameters_after:,}")
    yield row("trainable", f"{what.trainable:,} ({what.trainable_share_of_base:.1%} of the base), policy {what.policy}")
    yield from _shared_out(what)
    if done.manifest.inexact_halves:
        count = done.manifest.inexact_halves
        yield row(
            "note", f"{count:,} shared weights have no exact half in their dtype; their shares still add up exactly"
        )
    if what.files_left_out:
        yield row("left out", ", ".join(what.files_left_out))
    if done.verification:
        yield from answers(done.verification.answers)
    yield f"wrote {done.folder}" + ("" if done.verification else " (not verified)")


def _grown_blocks(what: Proposal) -> Iterator[str]:
    kind, rows = {False: "units", True: "units, filled with zero columns"}, []
    for b in what.blocks:
        some = f" in {named(b.experts, 'expert')}, the others" if b.experts else ""
        told = f"{b.old_width:,} -> {b.new_width:,} " + (
            f"units{some} filled with zero columns" if some else kind[b.filled]
        )
        rows.append((b.block, b.layer, told))
    yield from widths(rows)


def _recast(what: Proposal) -> Iterator[str]:
    if what.recast:
        yield row("config", f"model_type {what.recast} in place of {what.family}: a width for each layer, see the card")


def _shared_out(what: Proposal) -> Iterator[str]:
    for sentence in what.shares:
        yield row("shares", sentence)
    if what.parameters_filled:
        others = [named(what.layers_filled)] if what.layers_filled else []
        others += [f"all but {named(what.experts_grown, 'expert')}"] if what.experts_grown else []
        yield row(
            "filling",
            f"{what.parameters_filled:,} parameters, {size(what.bytes_filled)}: of {' and of '.join(others)}, which"
            " only become as wide as those that grow; it never trains and can be dropped again",
        )


def answers(given: Iterable[Answer]) -> Iterator[str]:
    """A line for each answer, its findings below."""
    for answer in given:
        yield row(answer.name, f"{answer.verdict}: {answer.figure}")
        yield from (f"  {finding.tensor}: {finding.problem}" for finding in answer.findings)
