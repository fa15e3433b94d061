"""Where a checkpoint comes from: a folder as it is, or a repository on the Hugging Face Hub brought to a folder.

Owns every word spoken with the Hub, and is the only importer of huggingface_hub (inside functions, so that importing
this module costs nothing). HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE act as everywhere, through that library.
The Hub's failures become one HubError each, told apart by their types. The weights of a repository are the files its
model.safetensors.index.json names, else model.safetensors: no other weights are ever fetched.

Refuses repositories without safetensors, and file names in an index that are more than a name.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptgrow.errors import CkptgrowError, FormatError, HubError
from ckptgrow.layout import INDEX, SINGLE
from ckptgrow.tensors import LENGTH_BYTES, header_length

# What a checkpoint needs beside its weights. The patterns are huggingface_hub's: `*` also matches "/".
ALLOW: tuple[str, ...] = (
    *("*.json", "*.jinja", "*.txt"),  # config, tokenizer, generation config, index, chat templates, merges
    *("*.model", "*.tiktoken", "*.spm", "*.bpe"),  # tokenizers that are not JSON
    "*.py",  # custom code: copied for the user, never run
    *("*.md", "LICEN[CS]E*", "Licen[cs]e*", "NOTICE*", "Notice*"),  # model card and licence go with the weights
)
# Small files that the patterns above would let in and that belong to something else than this checkpoint.
IGNORE: tuple[str, ...] = (
    *("original/*", "consolidated*"),  # the same model in its maker's own format
    *("onnx/*", "openvino/*", "coreml/*"),  # the same model for other runtimes
    *("checkpoint-*/*", "runs/*"),  # what a trainer left behind
    "adapter_*",  # with an adapter_config.json beside it, a full model loads as an adapter
    *("*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json"),  # indexes of weights that stay behind
    "model.safetensors.index.*.json",  # variants: model.safetensors.index.fp16.json
)

PROBE_BYTES = 128 * 1024  # most headers fit, so that a shard costs one request; a longer header costs a second one
CONNECTIONS = 8  # as many as snapshot_download keeps

_NAME = r"\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?P<id>(?:{_NAME}/)?{_NAME})(?:@(?P<revision>\w[\w./+-]*))?", re.ASCII)
_WEIGHTS_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)  # plain, and without wildcards: it becomes a pattern


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from and where it lies."""

    folder: Path  # the given folder, or the snapshot in the Hugging Face cache
    id: str  # "org/name" on the Hub; for a folder its path as the user wrote it
    revision: str | None = None  # the resolved commit on the Hub; None for a folder

    @property
    def from_hub(self) -> bool:
        return self.revision is not None


@dataclass(frozen=True, slots=True)
class Preview:
    """A checkpoint without its weights: `headers` has what `origin.folder` lacks of them.

    For each weights file that is not in the folder: its first 8 + N bytes (length prefix and JSON header) and the
    size of the whole file. Empty for a folder, and where the cache already holds the weights: read the folder.
    """

    origin: Origin
    headers: Mapping[str, tuple[bytes, int]]


@dataclass(frozen=True, slots=True)
class _Repository:
    """A Hub id as the user asked for it."""

    asked: str
    id: str
    revision: str | None


def fetch(src: str | Path, *, progress: bool = False) -> Origin:
    """A folder as it is, or the Hub repository `org/name[@revision]` brought to the Hugging Face cache.

    With `progress`, huggingface_hub shows its bars and warnings on stderr; otherwise nothing is printed.
    """
    origin = _local(src)
    if origin is not None:
        return origin
    repository = _repository(str(src))
    with _told(repository), _volume(progress):
        origin = _snapshot(repository)
        _bring_weights(repository, origin)
    return origin


def preview(src: str | Path) -> Preview:
    """Everything but the weights, and of those only the headers: for looking without downloading gigabytes."""
    origin = _local(src)
    if origin is not None:
        return Preview(origin, {})
    repository = _repository(str(src))
    with _told(repository), _volume(progress=False):
        origin = _snapshot(repository, partly=True)
        return Preview(origin, _headers(repository, origin))


def _local(src: str | Path) -> Origin | None:
    path = Path(src)
    if str(src) and path.is_dir():
        return Origin(path, str(src))
    if path.is_file():
        raise HubError(f"{src} is a file, not a checkpoint", hint=f"Give the folder it lies in: {path.parent}.")
    return None


def _repository(asked: str) -> _Repository:
    match = _HUB_ID.fullmatch(asked)
    if match is None:
        raise _no_folder(asked)
    return _Repository(asked, match["id"], match["revision"])


def _no_folder(asked: str) -> HubError:
    return HubError(
        f"no such folder: {asked!r}", hint="Give a checkpoint folder or a Hub id: org/name or org/name@revision."
    )


def _snapshot(repository: _Repository, *, partly: bool = False) -> Origin:
    """The repository's files except weights; offline and `partly`, whatever the cache has of them."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository.id,
            revision=repository.revision,
            allow_patterns=list(ALLOW),
            ignore_patterns=list(IGNORE),
            library_name="ckptgrow",
        )
    except _utils().LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)  # huggingface_hub >= 2: IncompleteSnapshotError
        if not partly or incomplete is None:
            raise
        folder = incomplete
    return Origin(Path(folder), repository.id, Path(folder).name)


def _bring_weights(repository: _Repository, origin: Origin) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    if absent := _absent_weights(origin.folder):
        snapshot_download(origin.id, revision=origin.revision, allow_patterns=absent, library_name="ckptgrow")
    for name in _absent_weights(origin.folder):
        # snapshot_download does not say why it left a file out (not there, or not reachable); this does.
        with _told_missing(repository, name):
            hf_hub_download(origin.id, name, revision=origin.revision, library_name="ckptgrow")


def _absent_weights(folder: Path) -> list[str]:
    return [name for name in _weights(folder) if not (folder / name).exists()]


def _weights(folder: Path) -> list[str]:
    """The names of the weights files, in the index's order. They come from the repository: plain names only."""
    if not (folder / INDEX).exists():
        return [SINGLE]
    try:
        index = json.loads((folder / INDEX).read_bytes())
        names = list(dict.fromkeys(index["weight_map"].values()))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise HubError("not an index of safetensors files: it has no weight_map of names", file=INDEX) from None
    for name in names:
        if not isinstance(name, str) or not _WEIGHTS_NAME.fullmatch(name):
            raise HubError(f"names {name!r}, which is not the plain name of a safetensors file", file=INDEX)
    return names


def _headers(repository: _Repository, origin: Origin) -> dict[str, tuple[bytes, int]]:
    """The raw headers of the weights that the folder lacks, by a request or two for each."""
    names = _absent_weights(origin.folder)

    def read(name: str) -> tuple[bytes, int]:
        with _told_missing(repository, name):
            return _header(origin, name)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def _header(origin: Origin, name: str) -> tuple[bytes, int]:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(origin.id, name, revision=origin.revision)
    head, size = _range(url, 0, PROBE_BYTES)
    try:
        stop = LENGTH_BYTES + header_length(head, size)
    except FormatError as error:
        raise error.at(file=name) from None
    if stop > len(head):
        head += _range(url, len(head), stop)[0]
    if stop > len(head):
        raise HubError(f"the Hub sent {len(head):,} of the header's {stop:,} bytes", file=name)
    return head[:stop], size


def _range(url: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes [start, stop) of a remote file, fewer where it ends before, and the size of the whole file."""
    from huggingface_hub import constants

    utils = _utils()
    headers = utils.build_hf_headers(library_name="ckptgrow")
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    response = utils.http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    utils.hf_raise_for_status(response)
    if response.status_code != 206:  # a server that knows no ranges sends the whole file
        return response.content[start:stop], len(response.content)
    size = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not size.isdecimal():
        raise HubError("the Hub's answer to a range request does not tell the size of the file")
    return response.content, int(size)


def _utils() -> Any:
    """huggingface_hub.utils: every version has its errors and HTTP functions there, though not marked as exported."""
    import huggingface_hub.utils

    return huggingface_hub.utils


@contextmanager
def _volume(progress: bool) -> Iterator[None]:
    """Keep huggingface_hub's bars, log lines and Python warnings off the screen, unless they are wanted."""
    if progress:
        yield
        return
    utils = _utils()
    verbosity, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils.logging.set_verbosity_error()
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.logging.set_verbosity(verbosity)
            if bars:
                utils.enable_progress_bars()


@contextmanager
def _told_missing(repository: _Repository, name: str) -> Iterator[None]:
    """Turn a weights file that the repository does not have into a HubError."""
    try:
        yield
    except _utils().LocalEntryNotFoundError:
        raise  # an EntryNotFoundError too, but only of this machine: the Hub could not be asked
    except _utils().EntryNotFoundError:
        if name != SINGLE:
            raise HubError(f"{repository.id} has no {name}, though its index names it", file=INDEX) from None
        raise HubError(
            f"{repository.id} has neither {SINGLE} nor {INDEX}, and ckptgrow reads safetensors only",
            hint="Convert it first: load it with transformers, save_pretrained(FOLDER), and give that folder.",
        ) from None


@contextmanager
def _told(repository: _Repository) -> Iterator[None]:
    """Turn every failure of the Hub, the network or the cache into one HubError of one line."""
    utils = _utils()
    failures: tuple[type[BaseException], ...] = (
        OSError,  # the cache, a LocalEntryNotFoundError, and with requests the whole network
        *utils.HfHubHTTPError.__bases__,  # the HTTP library's own base class: which library depends on the version
        utils.HFValidationError,
        json.JSONDecodeError,  # HF_ENDPOINT leads to something that is not a Hub
        RuntimeError,  # hf_xet's transfers fail with nothing more specific
    )
    try:
        yield
    except CkptgrowError:
        raise
    except failures as error:
        raise _hub_error(repository, error) from None


def _hub_error(repository: _Repository, error: BaseException) -> HubError:
    from huggingface_hub import constants

    utils = _utils()
    if isinstance(error.__cause__, utils.HfHubHTTPError):  # "not in the cache", because the Hub answered this
        error = error.__cause__
    if isinstance(error, utils.HFValidationError):
        return _no_folder(repository.asked)
    if isinstance(error, utils.GatedRepoError):  # before its base class RepositoryNotFoundError
        return _gated(repository, constants.ENDPOINT)
    if isinstance(error, utils.RepositoryNotFoundError):
        return _no_repository(repository, constants.ENDPOINT)
    if isinstance(error, utils.RevisionNotFoundError):
        return _no_revision(repository, constants.ENDPOINT)
    return _trouble(repository, error, constants.ENDPOINT)


def _gated(repository: _Repository, endpoint: str) -> HubError:
    return HubError(
        f"{repository.id} is gated, and the Hub does not let this account in",
        hint=f"Accept its licence at {endpoint}/{repository.id}, then log in with `hf auth login` or set HF_TOKEN.",
    )


def _no_repository(repository: _Repository, endpoint: str) -> HubError:
    return HubError(
        f"{repository.asked!r} is neither a folder here nor a repository on the Hub ({endpoint})",
        hint="Check the spelling; a private repository needs `hf auth login` or HF_TOKEN.",
    )


def _no_revision(repository: _Repository, endpoint: str) -> HubError:
    return HubError(
        f"{repository.id} has no revision {repository.revision or 'main'!r} on the Hub",
        hint=f"Its branches, tags and commits are at {endpoint}/{repository.id}/commits.",
    )


def _trouble(repository: _Repository, error: BaseException, endpoint: str) -> HubError:
    """Failures that say nothing about the repository itself."""
    if isinstance(error, _utils().LocalEntryNotFoundError):  # before HfHubHTTPError, its base class before 1.0
        return _unreachable(repository, endpoint)
    if isinstance(error, _utils().HfHubHTTPError):
        return _answered(repository, error, endpoint)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, json.JSONDecodeError):
        return HubError(f"{endpoint} does not answer like a Hub ({said})", hint="Check HF_ENDPOINT.")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return HubError(f"cannot keep {repository.id} in the Hugging Face cache ({said})", hint="HF_HOME moves it.")
    if isinstance(error, RuntimeError):
        return HubError(
            f"the download of {repository.id} broke off ({said})", hint="Run it again: it goes on from there."
        )
    return _unreachable(repository, endpoint)


def _answered(repository: _Repository, error: Any, endpoint: str) -> HubError:
    from huggingface_hub import get_token

    status = getattr(error.response, "status_code", None)  # Any: the response's class depends on the HTTP library
    if status == 401 and get_token() is None:  # how a Hub tells strangers that there is nothing for them to see
        return _no_repository(repository, endpoint)
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    token = "Check HF_TOKEN, or log in again with `hf auth login`."
    return HubError(
        f"{endpoint} answered {status or 'with an error'} for {repository.id}" + (f" ({said})" if said else ""),
        hint=token if status in (401, 403) else "Try again later.",
    )


def _unreachable(repository: _Repository, endpoint: str) -> HubError:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    return HubError(
        f"{repository.asked!r} is no folder here, not completely in the Hugging Face cache, and "
        + ("HF_HUB_OFFLINE forbids to ask the Hub" if offline else f"{endpoint} cannot be reached"),
        hint="Unset HF_HUB_OFFLINE, or give a folder." if offline else "Check the network, or give a folder.",
    )
