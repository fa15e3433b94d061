"""A Hub on 127.0.0.1: repositories from memory, for the real huggingface_hub client to talk to.

    repository = Repository({"main": {"config.json": b"{}", "model.safetensors": weights}})
    with HubServer({"google/gemma-2b": repository}) as hub:
        subprocess.run([..., "google/gemma-2b"], env={**os.environ, **hub.environment(tmp_path / "hf")})
        assert "pytorch_model.bin" not in hub.fetched()

It answers as the Hub does, as far as that client asks when it reads:

    GET       /api/models/ID[/revision/REV]     what the repository is; its commit
    GET       /api/models/ID/tree/REV           its files
    GET HEAD  /ID/resolve/REV/FILE              a small file; for a large one (LFS) a redirect to the line below
    GET HEAD  /cdn/ID/COMMIT/FILE               the bytes, with ranges

A missing repository is 401 for strangers and 404 with a token. A gated one shows its description and its file list to
everybody and its files to the bearer of `HubServer.token`. Nothing is written, no uploads, no Xet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".onnx", ".msgpack")  # what the Hub keeps in LFS

_INFO = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = re.compile(r"/cdn/(?P<id>[^/]+(?:/[^/]+)?)/(?P<revision>[0-9a-f]{40})/(?P<file>.+)")

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Repository:
    """A model repository: for each branch or tag, its files."""

    revisions: Mapping[str, Files]
    gated: bool = False

    def commit(self, revision: str) -> str:
        """The hash of a branch, a tag or a commit. Raises KeyError where there is no such revision."""
        commits = {name: _commit(files) for name, files in self.revisions.items()}
        return revision if revision in commits.values() else commits[revision]

    def files(self, revision: str) -> Files:
        wanted = self.commit(revision)
        return next(files for files in self.revisions.values() if _commit(files) == wanted)


@dataclass(frozen=True)
class Request:
    """One request as it came in, and what was sent for it."""

    method: str
    path: str  # decoded, without the query
    file: str | None  # the repository's file, where the path is one's
    range: str | None  # the Range header
    status: int
    sent: int  # bytes of the body


@dataclass
class HubServer:
    """The server: a context manager. `requests` has every request so far, in the order of their answers."""

    repositories: Mapping[str, Repository]
    token: str = "hf_of_the_test"
    broken: bool = False  # answer 500 to everything
    ranges: bool = True  # without: send whole files whatever range is asked for
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def environment(self, home: Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """This process' environment for a child that shall see this Hub, the cache in `home`, and nothing else."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "HUB_"))}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
        ours |= {"HF_TOKEN": token} if token else {}
        return {**kept, **ours, **({"HF_HUB_OFFLINE": "1"} if offline else {})}

    def fetched(self) -> set[str]:
        """The files of which at least one byte was sent."""
        return {r.file for r in self.requests if r.file and r.method == "GET" and r.status in (200, 206)}

    def sent(self, file: str) -> int:
        """How many bytes of a file were sent, over all requests."""
        return sum(r.sent for r in self.requests if r.file == file and r.status in (200, 206))


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.server_of.broken:
            self._answer(500, {"X-Error-Message": "down for the test"})
        elif match := _TREE.fullmatch(path):
            self._described(match, self._tree)
        elif match := _INFO.fullmatch(path):
            self._described(match, self._info)
        elif match := _CDN.fullmatch(path):
            self._bytes(match)
        elif match := _FILE.fullmatch(path):
            self._file(match)
        else:
            self._answer(404)

    do_HEAD = do_GET  # noqa: N815  the same headers; _answer leaves the body out

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: `requests` is the log."""

    def _find(self, match: re.Match[str]) -> tuple[Repository, str] | None:
        """The repository and commit meant, or None after the refusal is sent."""
        asked = unquote(match["id"])
        repository = self.server_of.repositories.get(asked)
        if repository is None:
            known = self.headers.get("Authorization") == f"Bearer {self.server_of.token}"
            self._answer(404 if known else 401, {"X-Error-Code": "RepoNotFound"} if known else {})
            return None
        try:
            return repository, repository.commit(unquote(match["revision"] or "main"))
        except KeyError:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return None

    def _described(self, match: re.Match[str], describe: Any) -> None:
        if found := self._find(match):
            text = json.dumps(describe(unquote(match["id"]), *found)).encode()
            self._answer(200, {"Content-Type": "application/json"}, text)

    def _info(self, name: str, repository: Repository, commit: str) -> dict[str, Any]:
        siblings = [{"rfilename": file} for file in repository.files(commit)]
        gated = "manual" if repository.gated else False
        common = {"private": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return {"id": name, "modelId": name, "sha": commit, "gated": gated, "siblings": siblings, **common}

    def _tree(self, name: str, repository: Repository, commit: str) -> list[dict[str, Any]]:
        files = repository.files(commit)
        folders = {file.rpartition("/")[0] for file in files} - {""}
        return [
            *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)),
            *({"type": "file", "path": path, "size": len(data), **_oids(path, data)} for path, data in files.items()),
        ]

    def _file(self, match: re.Match[str]) -> None:
        found, file = self._find(match), unquote(match["file"])
        if found is None:
            return
        repository, commit = found
        known = self.headers.get("Authorization") == f"Bearer {self.server_of.token}"
        if repository.gated and not known:
            stranger = "Authorization" not in self.headers
            self._answer(401 if stranger else 403, {"X-Error-Code": "GatedRepo"}, file=file)
        elif file not in repository.files(commit):
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, file=file)
        elif file.endswith(LARGE):
            data = repository.files(commit)[file]
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{_etag(file, data)}"'}
            to = f"{self.server_of.endpoint}/cdn/{match['id']}/{commit}/{match['file']}"
            self._answer(302, {"Location": to, "X-Repo-Commit": commit, **linked}, file=file)
        else:
            self._bytes(match)

    def _bytes(self, match: re.Match[str]) -> None:
        found, file = self._find(match), unquote(match["file"])
        if found is None:
            return
        repository, commit = found
        data, asked = repository.files(commit)[file], self.headers.get("Range")
        etag = {"ETag": f'"{_etag(file, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if asked is None or not self.server_of.ranges:
            self._answer(200, etag, data, file=file)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
        if start >= len(data):
            self._answer(416, {"Content-Range": f"bytes */{len(data)}"}, file=file)
            return
        etag["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._answer(206, etag, data[start:stop], file=file)

    def _answer(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", *, file: str | None = None
    ) -> None:
        sent = body if self.command == "GET" else b""
        path, asked = unquote(urlsplit(self.path).path), self.headers.get("Range")
        self.server_of.requests.append(Request(self.command, path, file, asked, status, len(sent)))
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)


def _commit(files: Files) -> str:
    return hashlib.sha1(
        repr(sorted((name, hashlib.sha1(data).digest()) for name, data in files.items())).encode()
    ).hexdigest()


def _etag(path: str, data: bytes) -> str:
    """As on the Hub: the SHA-256 of a large file, git's blob hash of a small one."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else _blob(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oids(path: str, data: bytes) -> dict[str, Any]:
    if not path.endswith(LARGE):
        return {"oid": _blob(data)}
    return {"oid": _blob(data), "lfs": {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}}
