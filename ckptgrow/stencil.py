"""The freeze mask as a checkpoint: the grown model's own names, shapes, dtypes and files; 1.0 trains, 0.0 is frozen.

What renames, fuses, stacks, transposes or shards the weights on their way into a trainer does the same to the mask.
It is a Plan of constants: no weight is read, and what is zero throughout is a hole in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ckptgrow.checkpoint import CARD, CONFIG, Checkpoint
from ckptgrow.errors import FormatError, RequestError
from ckptgrow.execute import write_shards
from ckptgrow.layout import INDEX, lay
from ckptgrow.manifest import Manifest, Trainable
from ckptgrow.numeric import FLOATS
from ckptgrow.plan import Output, Part, Plan, in_slices
from ckptgrow.regions import Spans, between
from ckptgrow.staging import Staging, check_space
from ckptgrow.tensors import TensorInfo


def stencil(grown: Checkpoint, manifest: Manifest) -> Plan:
    """The Plan of the mask. Raises RequestError where a trainable tensor's dtype has no 1.0 of its own."""
    trainable = {tensor.name: tensor for tensor in manifest.trainable}
    return Plan(tuple(_cut_out(info, trainable.get(info.name)) for info in grown.infos.values()))


def write_stencil(grown: Checkpoint, manifest: Manifest, out: Path, progress: Callable[[int], None]) -> None:
    """Write the mask into the new folder `out`, with all that `from_pretrained` needs beside it."""
    plan = stencil(grown, manifest)
    plan.check({})
    layout = lay(plan, grown.headers, grown.infos, grown.index)
    files = grown.companions()[0]
    check_space(out, layout.nbytes + sum((grown.folder / file).stat().st_size for file in files))
    with Staging(out, "mask") as staging:
        write_shards(layout, {}, staging, progress)
        for file in files:
            staging.copy(grown.folder / file, file)
        staging.put(CARD, _card(manifest))
        if layout.index is not None:
            staging.put(INDEX, layout.index)
        staging.put(CONFIG, grown.config_text)
        staging.commit()


def _cut_out(info: TensorInfo, trained: Trainable | None) -> Output:
    if trained is None:
        return Output(info.name, info.dtype, info.shape, 0, (Part(info.around(0)[1]),))
    if info.dtype not in FLOATS:
        raise RequestError(f"it trains, but {info.dtype} cannot say 1.0", tensor=info.name)
    try:
        division = trained.division()
    except FormatError as error:
        raise error.at(tensor=info.name) from None
    runs = ((rows, tuple(_holes(spans, division.extent))) for rows, spans in division.runs)
    parts = in_slices(runs, info.around(division.axis)[0])
    return Output(info.name, info.dtype, info.shape, division.axis, parts)


def _holes(spans: Spans, extent: int) -> Iterator[Part]:
    """Zeros, and ones where it trains."""
    places = [*((span, 0.0) for span in between(spans, extent)), *((span, 1.0) for span in spans)]
    for (start, stop), value in sorted(places):
        yield Part(stop - start, grown=bool(value), fill=value)


def _card(manifest: Manifest) -> str:
    return (
        f"# A freeze mask, not a model\n\nThe names, shapes, dtypes and files of `{manifest.base.id}` grown by ckptgrow"
        f" with policy `{manifest.policy}`:\n1.0 where an element trains ({manifest.counts.trainable:,} elements), 0.0"
        f" where it is frozen ({manifest.counts.frozen:,}).\nPut it through whatever the weights go through"
        " (from_pretrained, a converter, a sharder), and compare with 0.5\nafterwards. A masked gradient does not hold"
        " weights still by itself: keep weight decay at 0 on the masked tensors and\nbegin with a fresh optimizer."
        f"\n\nManifest: {manifest.digest}\n"
    )
