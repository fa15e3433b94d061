"""extract and apply: what training learned as a small file, and the trained checkpoint from it and the base."""

from __future__ import annotations

from pathlib import Path

from ckptgrow.card import applied_card, licence, licence_in, skill_card
from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, open_checkpoint
from ckptgrow.errors import RequestError
from ckptgrow.execute import write_shards
from ckptgrow.hub import fetch
from ckptgrow.ingredients import check_shareable, recalled
from ckptgrow.layout import INDEX, lay
from ckptgrow.lineage import Past, find_manifest, stranger
from ckptgrow.manifest import EXPAND, load_manifest, named_in
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.reference import Reference, open_reference, regrown
from ckptgrow.results import Application, Extraction
from ckptgrow.reversal import named
from ckptgrow.skills import (
    SKILL,
    TRAINED,
    applied,
    check_applied,
    check_base,
    check_extracted,
    config_of,
    from_itself,
    layout_of,
    moved,
    open_skill,
)
from ckptgrow.staging import Staging, check_apart, check_space, check_target
from ckptgrow.surgery import BASE
from ckptgrow.trained import Trained, open_trained

Source = str | Path


def extract(
    trained: Source,
    skill: Source,
    *,
    manifest: Source | None = None,
    base: Source | None = None,
    progress: Progress | None = None,
    bars: bool = False,
) -> Extraction:
    """Write what `trained` learned, the elements in the manifest's boxes and nothing else, into the new folder `skill`.

    `manifest` names the grown folder (or its ckptgrow.json) where `trained` has none. All that is outside the boxes
    must be what the growth made of the base: the base is read back from it and held against the manifest's digests,
    or where the policy leaves too little for that compared with `base` (the base, or the grown folder). What moved
    is said, and nothing written then. Raises CkptgrowError for what cannot be told, and then nothing is left on disk.
    """
    folder, target, report = Path(trained), Path(skill).resolve(), progress or silent
    check_target(target, force=False)
    check_apart(target, folder)
    found = open_trained(folder)
    path, notes = find_manifest(found, Path(manifest) if manifest is not None else None)
    past = recalled(load_manifest(path), str(path))
    check_shareable(past)
    text = past.manifest.text().encode()
    mine, said = named(past, found)
    reference, gone = from_itself(past, text, mine) if base is None else (_given(base, found, past, path, bars), ())
    gone = gone or moved(reference, found, Meter(report, "comparing", sum(i.elements for i in found.infos.values())))
    layout = layout_of(past, text, mine)
    elements = sum(output.info.elements for output in layout.shards[0].outputs)
    told = Extraction(
        str(trained),
        str(skill),
        past.manifest.base.id,
        len(past.trained),
        elements,
        layout.nbytes,
        gone,
        (*notes, *said),
    )
    if gone:
        return told
    check_space(target, layout.nbytes)
    with Staging(target, "extract") as staging:
        write_shards(layout, {TRAINED: mine}, staging, Meter(report, "writing", layout.nbytes))
        staging.put(MANIFEST, text.decode())
        staging.put(CARD, skill_card(past.manifest, elements, licence_in(past.manifest.base.card or "")))
        written = open_skill(staging.folder)
        check_extracted(layout, mine, written)
        staging.commit()
    return told


def _given(base: Source, trained: Trained, past: Past, manifest: Path, bars: bool) -> Reference:
    """What training started from, by the base or the grown folder. Raises RequestError for a folder that is neither."""
    folder = fetch(base, progress=bars).folder
    if past.manifest.operation == EXPAND:
        return open_reference(folder, trained, manifest)
    opened = open_checkpoint(folder)
    if named_in(opened.config) == past.manifest.digest:
        return open_reference(folder, trained, manifest)
    strange = stranger(opened, past.manifest.base)
    if strange:
        raise RequestError(
            ": ".join(strange), file=str(folder), hint="Give the base of the merge, or the merged folder."
        )
    return regrown(past, opened, opened, past.manifest.text().encode())


def apply(
    base: Source,
    skill: Source,
    out: Source,
    *,
    progress: Progress | None = None,
    bars: bool = False,
) -> Application:
    """Write the checkpoint that `skill` was extracted from into the new folder `out`: every tensor's bytes are its own.

    `base` must be the checkpoint that was grown, to the bit. Raises CkptgrowError for anything else, and then nothing
    is left on disk.
    """
    mine, its = fetch(base, progress=bars), fetch(skill, progress=bars)
    target, report = Path(out).resolve(), progress or silent
    check_target(target, force=False)
    for folder in (mine.folder, its.folder):
        check_apart(target, folder)
    learned, opened = open_skill(its.folder), open_checkpoint(mine.folder)
    check_base(opened, learned)
    plan = applied(learned, opened)
    plan.check({BASE: opened.infos, SKILL: learned.tensors.infos})
    layout = lay(plan, opened.headers, opened.infos, opened.index)
    check_space(target, layout.nbytes)
    with Staging(target, "apply") as staging:
        sources = {BASE: opened, SKILL: learned.tensors}
        write_shards(layout, sources, staging, Meter(report, "writing", layout.nbytes))
        for file in opened.companions()[0]:
            staging.copy(opened.folder / file, file)
        staging.put(CARD, applied_card(learned.past.manifest, licence(opened.folder / CARD)))
        if layout.index is not None:
            staging.put(INDEX, layout.index)
        staging.put(MANIFEST, learned.text.decode())
        staging.put(CONFIG, config_of(learned, opened, plan))
        written = open_checkpoint(staging.folder)
        elements = sum(info.elements for info in written.infos.values())
        check_applied(learned, opened, written, Meter(report, "comparing", elements))
        staging.commit()
    return Application(str(base), str(skill), str(out), len(plan.outputs), len(learned.past.trained))
