"""mask: the freeze mask of a grown checkpoint in a trainer's own words, or as a checkpoint of 0 and 1."""

from __future__ import annotations

from pathlib import Path

from ckptgrow.checkpoint import Checkpoint, open_checkpoint
from ckptgrow.dialects import DIALECTS, Subject
from ckptgrow.errors import RequestError
from ckptgrow.families import family_of, in_memory_name
from ckptgrow.families.declared import recalled
from ckptgrow.hub import Origin, preview
from ckptgrow.manifest import Manifest, manifest_of
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.results import Mask
from ckptgrow.stacks import held_by
from ckptgrow.staging import check_apart, check_target, write_new
from ckptgrow.stencil import write_stencil

Source = str | Path
STENCIL = "safetensors"  # the one format that is no text


def mask(
    grown: Source,
    format: str = "json",  # noqa: A002, the command line's own word
    *,
    out: Source | None = None,
    progress: Progress | None = None,
) -> Mask:
    """The freeze mask of `grown` (a folder or `org/name[@revision]`) as `json`, `names`, `axolotl`,
    `llamafactory`, `peft` or `safetensors`.

    Text stands in the result, or in the new file `out`. `safetensors` is a checkpoint in the new folder `out`, with
    the grown model's names, shapes, dtypes and files, 1.0 where an element trains and 0.0 where it is frozen. Reads
    headers only: of a Hub repository no weights are fetched. Raises CkptgrowError, and then nothing is left on disk.
    """
    _check_asked(format, out is not None)
    seen, target = preview(grown), Path(out).resolve() if out is not None else None
    checkpoint = open_checkpoint(seen.origin.folder, seen.headers)
    manifest = manifest_of(checkpoint)
    text = None if format == STENCIL else DIALECTS[format](_subject(seen.origin, checkpoint, manifest))
    if target is not None and text is not None:
        write_new(target, text)
    elif target is not None:
        check_target(target, force=False)
        check_apart(target, checkpoint.folder)
        total = sum(shard.nbytes for shard in checkpoint.shards.values())
        write_stencil(checkpoint, manifest, target, Meter(progress or silent, "writing", total))
    counts, written = manifest.counts, Path(out) if out is not None else None
    return Mask(str(grown), format, text, written, len(manifest.trainable), counts.trainable, counts.frozen)


def _check_asked(wording: str, to_disk: bool) -> None:
    if wording != STENCIL and wording not in DIALECTS:
        raise RequestError(f"unknown format {wording!r}", hint=f"One of {', '.join([*DIALECTS, STENCIL])}.")
    if wording == STENCIL and not to_disk:
        raise RequestError("a mask of safetensors is a folder, and none is given", hint="Give --out FOLDER.")


def _subject(origin: Origin, grown: Checkpoint, manifest: Manifest) -> Subject:
    family = recalled(manifest.family, manifest.declaration) or family_of(grown.config)
    held = held_by(manifest, grown.infos)
    names = dict.fromkeys(in_memory_name(family, name) for name in grown.infos if name not in held.apart)
    return Subject(origin.id, origin.revision, origin.folder, manifest, (*names, *held.stacks), held)
