"""hub.py against a Hub on this machine. The client runs in a child: huggingface_hub reads its environment on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repository

from ckptgrow import hub
from ckptgrow.errors import HubError
from ckptgrow.tensors import TensorInfo, arrange

ROOT = Path(__file__).parent.parent
ALONE = f"""
import sys, types
sys.modules["ckptgrow"] = types.ModuleType("ckptgrow")  # without its __init__, whose imports would double the time
sys.modules["ckptgrow"].__path__ = [{str(ROOT / "ckptgrow")!r}]
"""
CLIENT = (
    ALONE
    + """
import json
from ckptgrow import hub
from ckptgrow.errors import CkptgrowError
answer = {"lazy": "huggingface_hub" not in sys.modules}
try:
    verb, src, *options = sys.argv[1:]
    result = hub.preview(src) if verb == "preview" else hub.fetch(src, progress="progress" in options)
    origin = getattr(result, "origin", result)
    answer |= {"folder": str(origin.folder), "id": origin.id, "revision": origin.revision}
    answer["headers"] = {n: [h.hex(), size] for n, (h, size) in getattr(result, "headers", {}).items()}
except CkptgrowError as error:
    answer |= {"error": str(error), "kind": type(error).__name__, "bare": error.__suppress_context__}
json.dump(answer, sys.stdout)
"""
)


def shard(*names: str, elements: int = 150_000, metadata: str = "pt") -> bytes:
    """A safetensors file: one float32 vector a name."""
    header = arrange([TensorInfo(name, "F32", (elements,)) for name in names], {"format": metadata})
    return header.to_bytes() + bytes(range(256)) * (header.body_bytes // 256) + bytes(header.body_bytes % 256)


def index(*names: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


SHARDS = {f"model-0000{i}-of-00002.safetensors": shard(f"t{i}") for i in (1, 2)}
WANTED = {
    "config.json": b'{"model_type": "gemma"}',
    "generation_config.json": b'{"do_sample": true}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"\x0a\x0b",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "modeling_own.py": b"raise SystemExit('never run')",
    "README.md": b"# model",
    "LICENSE": b"as is",
    "model.safetensors.index.json": index(*SHARDS),
    **SHARDS,
}
_UNWANTED = """
pytorch_model.bin pytorch_model.bin.index.json model-q4.gguf rust_model.ot model.pt tf_model.h5 flax_model.msgpack
onnx/model.onnx onnx/config.json original/consolidated.00.pth original/params.json consolidated.safetensors
model.safetensors model.fp16.safetensors model.safetensors.index.fp16.json adapter_model.safetensors adapter_config.json
2_Dense/model.safetensors checkpoint-500/trainer_state.json picture.png training_args.bin
"""
UNWANTED = {name: b"unwanted: " + name.encode() for name in _UNWANTED.split()}  # the cache keeps equal files once
SINGLE = {"config.json": b"{}", "model.safetensors": shard("single")}
REPOSITORIES = {
    "org/full": Repository({"main": {**WANTED, **UNWANTED}}),
    "org/one": Repository(
        {"main": SINGLE, "v2": {**SINGLE, "config.json": b'{"v": 2}'}, "refs/pr/1": {**SINGLE, "x.txt": b""}}
    ),
    "gpt2": Repository({"main": SINGLE}),
    "org/gated": Repository({"main": SINGLE}, gated=True),
    "org/pickled": Repository({"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}),
    "org/long": Repository({"main": {**SINGLE, "model.safetensors": shard("t", metadata="x" * 300_000)}}),
    "org/tiny": Repository({"main": {**SINGLE, "model.safetensors": shard("t", elements=3)}}),
    "org/liar": Repository({"main": {**SINGLE, "model.safetensors": (10**12).to_bytes(8, "little") + bytes(99)}}),
    "org/holes": Repository(
        {"main": {"config.json": b"{}", "model.safetensors.index.json": index("model-9-of-9.safetensors")}}
    ),
}
HOSTILE = [
    *("../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:evil.safetensors"),
    *(".hidden.safetensors", "a\n.safetensors", "*.safetensors", "[a].safetensors", "pytorch_model.bin", "", 7),
]
NO_INDEX = [b"[]", b"{", b"", b"\xff", b'{"weight_map": 3}', b'{"weight_map": {"t": []}}']
NO_ID = [
    *("", "./org/name", "/org/name", "~/org/name", "../y", "a/b/c", "a//b", "org/na me", "-o/n", "org/.."),
    *("org/name@", "org/name@ x", "org/name@../x", "a\\b", "modèle"),
]


@dataclass
class Client:
    """Runs fetch or preview in a child and returns what it answered."""

    server: HubServer
    home: Path
    stderr: str = ""

    def __call__(
        self, verb: str, src: str, *options: str, cwd: Path | None = None, **environment: Any
    ) -> dict[str, Any]:
        extra = {k: environment.pop(k) for k in list(environment) if k.isupper()}
        env = {**self.server.environment(self.home, **environment), **extra}
        command = [sys.executable, "-W", "error", "-c", CLIENT, verb, src, *options]
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def refused(self, verb: str, src: str, **environment: Any) -> str:
        """The message of the HubError: one line, bare of tracebacks, and nothing printed."""
        answer = self(verb, src, **environment)
        assert (answer["kind"], answer["bare"], self.stderr) == ("HubError", True, "")
        assert "\n" not in answer["error"]
        return str(answer["error"])


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    with HubServer(REPOSITORIES) as server:
        yield server


@pytest.fixture
def server(running: HubServer) -> HubServer:
    running.requests.clear()
    return running


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Client:
    return Client(server, tmp_path / "hf")


def files(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    """A folder is its own origin, under the name the user gave, for fetch and preview alike."""
    origin = hub.fetch(tmp_path)
    assert origin == hub.fetch(str(tmp_path)) == hub.Origin(tmp_path, str(tmp_path), None)
    assert not origin.from_hub
    assert hub.preview(tmp_path) == hub.Preview(origin, {})


def test_a_folder_wins_over_the_hub(tmp_path: Path, client: Client) -> None:
    """`org/full` is the folder of that name where there is one, and nobody is asked."""
    (tmp_path / "org/full").mkdir(parents=True)
    answer = client("fetch", "org/full", cwd=tmp_path)
    assert (answer["folder"], answer["id"], answer["revision"]) == ("org/full", "org/full", None)
    assert client.server.requests == []


def test_a_file_is_refused_with_its_folder(tmp_path: Path) -> None:
    """A shard in place of a checkpoint: the message names the folder to give."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match=f"is a file, not a checkpoint.*{tmp_path.name}\\.$"):
        hub.fetch(tmp_path / "model.safetensors")


@pytest.mark.parametrize("src", NO_ID)
@pytest.mark.parametrize("verb", [hub.fetch, hub.preview])
def test_what_is_no_id_is_no_such_folder(src: str, verb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is not there is not looked up on the Hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=r"no such folder: .* Give a checkpoint folder or a Hub id"):
        verb(src)


def test_fetch_brings_exactly_the_wanted_files(client: Client) -> None:
    """Config, tokenizer, code, licence and the shards of the index; no other weights, and not a byte of them."""
    answer = client("fetch", "org/full")
    commit = REPOSITORIES["org/full"].commit("main")
    assert (answer["id"], answer["revision"], Path(answer["folder"]).name) == ("org/full", commit, commit)
    assert answer["folder"].startswith(str(client.home))
    assert files(answer["folder"]) == WANTED
    assert client.server.fetched() == set(WANTED)
    assert not [r for r in client.server.requests if r.file in UNWANTED]
    assert (client.stderr, answer["lazy"]) == ("", True)


def test_the_record_of_fetched_files_can_fail(client: Client) -> None:
    """The server does record an unwanted file when somebody fetches it, so its absence above means something."""
    script = "from huggingface_hub import snapshot_download; snapshot_download('org/full')"
    environment = {**os.environ, **client.server.environment(client.home)}
    subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, timeout=60)
    assert client.server.fetched() == {*WANTED, *UNWANTED}
    assert client.server.sent("pytorch_model.bin") == len(UNWANTED["pytorch_model.bin"])


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "commit"])
def test_a_revision_has_its_own_content(client: Client, revision: str) -> None:
    """A tag, a pull request or a commit after the @ brings that revision, and the origin says which commit."""
    repository = REPOSITORIES["org/one"]
    revision = repository.commit("v2") if revision == "commit" else revision
    answer = client("fetch", f"org/one@{revision}")
    assert answer["revision"] == repository.commit(revision) != repository.commit("main")
    assert files(answer["folder"]) == repository.files(revision)


def test_a_name_without_organisation_is_a_hub_id(client: Client) -> None:
    """The Hub's oldest repositories have no organisation."""
    assert files(client("fetch", "gpt2")["folder"]) == SINGLE


def test_progress_is_shown_on_request_only(client: Client) -> None:
    """huggingface_hub's bars appear on stderr with progress=True; without it there is silence."""
    client("fetch", "org/one", "progress", TQDM_POSITION="-1")
    assert "100%" in client.stderr
    client("fetch", "gpt2", TQDM_POSITION="-1")
    assert client.stderr == ""


@pytest.mark.parametrize("verb", ["fetch", "preview"])
def test_a_gated_repository_needs_a_token(client: Client, verb: str) -> None:
    """Without one, or with a stranger's, the message says where to accept the licence; HF_TOKEN opens it."""
    for token in (None, "hf_stranger"):
        message = client.refused(verb, "org/gated", token=token)
        assert "org/gated is gated" in message
        assert f"{client.server.endpoint}/org/gated, then log in with `hf auth login` or set HF_TOKEN" in message
    assert client(verb, "org/gated", token=client.server.token)["id"] == "org/gated"


@pytest.mark.parametrize(("verb", "known"), [("fetch", False), ("fetch", True), ("preview", False)])
def test_a_missing_repository_is_neither_folder_nor_repository(client: Client, verb: str, known: bool) -> None:
    """The Hub answers 401 to strangers and 404 to users: the same message for both."""
    message = client.refused(verb, "org/missing", token=client.server.token if known else None)
    assert message.startswith("'org/missing' is neither a folder here nor a repository on the Hub")
    assert "HF_TOKEN" in message


@pytest.mark.parametrize("revision", ["v3", "0" * 40])
def test_a_missing_revision_is_named(client: Client, revision: str) -> None:
    """A branch or a commit that the repository does not have."""
    assert f"org/one has no revision '{revision}'" in client.refused("fetch", f"org/one@{revision}")


@pytest.mark.parametrize("src", ["org/na..me", "org/na--me", "org/" + "n" * 100])
def test_what_the_hub_forbids_is_no_such_folder(client: Client, src: str) -> None:
    """Ids of the right shape that huggingface_hub itself rejects."""
    assert f"no such folder: '{src}'" in client.refused("fetch", src)


@pytest.mark.parametrize("verb", ["fetch", "preview"])
def test_only_pickles_is_refused_with_a_way_out(client: Client, verb: str) -> None:
    """A repository with .bin weights only: nothing of them is fetched, and the message says how to convert."""
    message = client.refused(verb, "org/pickled")
    assert "org/pickled has neither model.safetensors nor model.safetensors.index.json" in message
    assert "save_pretrained" in message
    assert client.server.fetched() <= {"config.json"}


@pytest.mark.parametrize("verb", ["fetch", "preview"])
def test_a_shard_that_the_repository_lacks_is_named(client: Client, verb: str) -> None:
    """The index names a file that is not there."""
    assert "has no model-9-of-9.safetensors, though its index names it" in client.refused(verb, "org/holes")


@pytest.mark.parametrize("verb", ["fetch", "preview"])
def test_offline_serves_what_is_cached(client: Client, verb: str) -> None:
    """HF_HUB_OFFLINE: an error before the first fetch, the same files after it, and never a request."""
    message = client.refused(verb, "org/full", offline=True)
    assert "HF_HUB_OFFLINE forbids" in message
    online = client("fetch", "org/full")
    client.server.requests.clear()
    offline = client(verb, "org/full", offline=True)
    assert (offline["folder"], offline["headers"]) == (online["folder"], {})
    assert client.server.requests == []


def test_offline_with_headers_only_is_an_error(client: Client) -> None:
    """A preview does not bring the weights: without the Hub, both verbs say that the cache is incomplete."""
    client("preview", "org/full")
    for verb in ("fetch", "preview"):
        assert "not completely in the Hugging Face cache" in client.refused(verb, "org/full", offline=True)


def test_offline_preview_takes_a_snapshot_that_others_made(client: Client) -> None:
    """Offline, config and weights in the cache are enough to look, though the model card was never fetched."""
    script = (
        "from huggingface_hub import snapshot_download as s; s('org/full', allow_patterns=['config.json', 'model*'])"
    )
    environment = {**os.environ, **client.server.environment(client.home)}
    subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, timeout=60)
    assert client("preview", "org/full", offline=True)["headers"] == {}


@pytest.mark.parametrize("verb", ["fetch", "preview"])
def test_no_network_is_told_from_no_repository(client: Client, verb: str) -> None:
    """Nobody listens at the endpoint: an error that names it, and the cached snapshot where there is one."""
    closed: dict[str, Any] = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    message = client.refused(verb, "org/one", **closed)
    assert "'org/one' is no folder here" in message
    assert "http://127.0.0.1:9 cannot be reached" in message
    client("fetch", "org/one")
    assert files(client(verb, "org/one", **closed)["folder"]) == SINGLE


def test_a_server_error_is_passed_on(tmp_path: Path) -> None:
    """The status and the Hub's own words, in one line."""
    with HubServer(REPOSITORIES, broken=True) as server:
        message = Client(server, tmp_path).refused("fetch", "org/one")
    assert f"{server.endpoint} answered 500 for org/one (down for the test)" in message


def test_a_cache_that_cannot_be_written_is_told(client: Client, tmp_path: Path) -> None:
    """HF_HOME below a file: the operating system's reason, not a traceback."""
    (tmp_path / "file").write_bytes(b"")
    client.home = tmp_path / "file"
    message = client.refused("fetch", "org/one")
    assert "cannot keep org/one in the Hugging Face cache (NotADirectoryError" in message


def test_preview_reads_headers_only(client: Client) -> None:
    """Each shard's exact header bytes and size, by one range request, and no more than the probe of its body."""
    answer = client("preview", "org/full")
    assert list(answer["headers"]) == list(SHARDS)
    for name, data in SHARDS.items():
        stop = 8 + int.from_bytes(data[:8], "little")
        assert answer["headers"][name] == [data[:stop].hex(), len(data)]
        ranges = [r.range for r in client.server.requests if r.file == name and r.status == 206]
        assert ranges == [f"bytes=0-{hub.PROBE_BYTES - 1}"]
        assert client.server.sent(name) == hub.PROBE_BYTES < len(data)
    assert files(answer["folder"]) == {name: data for name, data in WANTED.items() if name not in SHARDS}
    assert client.server.fetched() == set(WANTED)


def test_preview_of_a_long_header_takes_two_requests(client: Client) -> None:
    """A header longer than the probe is completed to the byte; a file shorter than the probe is read as it is."""
    for name, sent in (("org/long", None), ("org/tiny", None)):
        data = REPOSITORIES[name].files("main")["model.safetensors"]
        stop = 8 + int.from_bytes(data[:8], "little")
        client.server.requests.clear()
        assert client("preview", name)["headers"] == {"model.safetensors": [data[:stop].hex(), len(data)]}
        assert client.server.sent("model.safetensors") == (stop if name == "org/long" else len(data)), sent


def test_preview_bears_a_server_without_ranges(tmp_path: Path) -> None:
    """A mirror that sends whole files: the header is cut from them."""
    with HubServer(REPOSITORIES, ranges=False) as server:
        answer = Client(server, tmp_path)("preview", "org/one")
    data = SINGLE["model.safetensors"]
    stop = 8 + int.from_bytes(data[:8], "little")
    assert answer["headers"] == {"model.safetensors": [data[:stop].hex(), len(data)]}


def test_preview_after_fetch_reads_the_cache(client: Client) -> None:
    """The weights are there already: no headers are asked for."""
    client("fetch", "org/one")
    client.server.requests.clear()
    assert client("preview", "org/one")["headers"] == {}
    assert client.server.fetched() == set()


def test_preview_refuses_a_lying_length(client: Client) -> None:
    """A length prefix beyond the file, or beyond 100 MB, is refused after one request."""
    answer = client("preview", "org/liar")
    assert answer["kind"] == "FormatError"
    assert answer["error"].startswith("model.safetensors: not a safetensors file")
    assert len([r for r in client.server.requests if r.status == 206]) == 1


def test_an_index_names_plain_files_only(tmp_path: Path) -> None:
    """Names that would leave the folder, match other files, or are no safetensors: refused before any of them is asked
    for."""
    hostile = {f"org/h{i}": index("good.safetensors", name) for i, name in enumerate(HOSTILE)}
    hostile |= {f"org/b{i}": text for i, text in enumerate(NO_INDEX)}
    repositories = {
        name: Repository({"main": {"model.safetensors.index.json": text}}) for name, text in hostile.items()
    }
    script = f"""{ALONE}
import json
from ckptgrow import hub
for name in {list(hostile)}:
    verb = hub.preview if name in ("org/h0", "org/b0") else hub.fetch
    try:
        print("accepted", verb(name))
    except hub.HubError as error:
        print(json.dumps([name, str(error)]))
"""
    with HubServer(repositories) as server:
        env = {**server.environment(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=60
        )
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(said) == list(hostile)
    for name, message in said.items():
        reason = "which is not the plain name of a safetensors file" if "/h" in name else "has no weight_map of names"
        assert message.startswith("model.safetensors.index.json: "), message
        assert reason in message, (name, message)
    assert server.fetched() == {"model.safetensors.index.json"}
