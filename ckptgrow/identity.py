"""What a manifest keeps of the base, so that it can be recognised to the bit, and written again from a growth.

Its texts are kept as they stand (config, index, shard headers, README.md); of its weights and other files the digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ckptgrow.checkpoint import CARD, Checkpoint, digest_of
from ckptgrow.layout import INDEX
from ckptgrow.tensors import LENGTH_BYTES


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint that was grown: its Hub id (or folder name), revision, and all that its small files say.

    `shards`: for each file its size, header (text and digest) and the digest of each tensor's bytes. `index` and `card`
    are the texts of its index and README.md, None where there was none; `files` are the digests of the other files that
    were copied. With them the base can be written again.
    """

    id: str
    revision: str | None
    config: str
    shards: Mapping[str, Mapping[str, Any]]
    index: str | None = None
    card: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each tensor's bytes."""
        return {name: digest for shard in self.shards.values() for name, digest in shard.get("tensors", {}).items()}


def identify(base: Checkpoint, name: str, revision: str | None) -> Base:
    """What the manifest keeps of the base, so that it can be recognised and written again. Reads all its bytes."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        digests = dict(zip(base.infos, pool.map(base.digest, base.infos), strict=True))
    shards = {
        file: {
            "bytes": shard.nbytes,
            "header": shard.digest,
            "text": base.head(file)[LENGTH_BYTES:].decode(),
            "tensors": {info.name: digests[info.name] for info in shard.header.tensors},
        }
        for file, shard in base.shards.items()
    }
    files = {file: digest_of((base.folder / file).read_bytes()) for file in base.companions()[0]}
    return Base(name, revision, base.config_text, shards, base.text(INDEX), base.text(CARD), files)
