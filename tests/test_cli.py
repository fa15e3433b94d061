"""The command line: text and JSON, exit codes, quiet, nothing imported that is not needed, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from click.testing import CliRunner
from hub_server import HubServer, Repository

from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.cli import main


def run(*arguments: object, code: int = 0) -> str:
    """stdout of the command line, run in this process; the exit status is checked."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """python -m ckptgrow in a process of its own."""
    command = [sys.executable, "-m", "ckptgrow", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_inspect(base: Path) -> None:
    """Family, MLPs, widths, dtypes, parameters, bytes, and whether it can grow; as JSON the same."""
    text = run("inspect", base)
    assert "gemma3_text, gated MLPs" in text
    assert "model.layers.0-1.mlp: 12 units x 8" in text
    assert "can grow" in text
    seen = json.loads(run("inspect", base, "--json"))
    assert (seen["model_type"], seen["growable"], seen["reason"]) == ("gemma3_text", True, None)
    assert [block["width"] for block in seen["blocks"]] == [12, 12]
    tensors = checkpoints.load(base).values()
    assert seen["parameters"] == sum(t.numel() for t in tensors)
    assert seen["bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    assert seen["dtypes"] == {"BF16": seen["parameters"]}
    assert seen["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_inspect_of_what_cannot_grow(base: Path) -> None:
    """inspect answers for any readable checkpoint: what it is, and why it cannot grow."""
    checkpoints.edit_config(base, model_type="mamba")
    assert "cannot grow model_type 'mamba' cannot be grown: it has no MLP" in run("inspect", base)
    seen = json.loads(run("inspect", base, "--json"))
    assert (seen["growable"], seen["blocks"]) == (False, [])


def test_plan(base: Path, tmp_path: Path) -> None:
    """--plan prints each figure and writes nothing; with --json the whole Plan, part by part."""
    text = run("expand", base, tmp_path / "out", "--plan", "--width", 20)
    for words in ("12 -> 20 units", "trainable", "% of the base", "free on that disk", "tokenizer.json", "2 rewritten"):
        assert words in text
    what = json.loads(run("expand", base, tmp_path / "out", "--plan", "--json"))
    assert len(what["plan"]["outputs"]) == len(checkpoints.load(base))
    down = next(o for o in what["plan"]["outputs"] if o["name"] == "model.layers.0.mlp.down_proj.weight")
    assert (down["shape"], down["axis"], len(down["parts"])) == ([8, 24], 1, 2)
    assert down["parts"][1]["terms"][0]["share"] == {"index": 1, "count": 2, "rule": "even"}
    assert what["plan"]["config"] == {"intermediate_size": 24}
    assert not (tmp_path / "out").exists()


def test_expand_and_verify(base: Path, tmp_path: Path) -> None:
    """The two commands of the first screen, in text, in JSON, and quietly."""
    text = run("expand", base, tmp_path / "out")
    assert "largest error 0.0" in text
    assert text.endswith(f"wrote {tmp_path / 'out'}\n")
    assert run("verify", base, tmp_path / "out").endswith("out: the same function\n")
    done = json.loads(run("expand", base, tmp_path / "json", "--json"))
    assert done["verification"]["same"] is True
    assert done["trainable"] == 2 * 3 * 12 * 8
    result = json.loads(run("verify", base, tmp_path / "json", "--json"))
    assert [answer["verdict"] for answer in result["answers"]] == ["yes", "yes", "yes"]
    assert run("expand", base, tmp_path / "quiet", "-q") == ""
    assert run("verify", base, tmp_path / "quiet", "-q") == ""


def test_not_verified_is_said(base: Path, tmp_path: Path) -> None:
    """--no-verify is named in the output."""
    assert "(not verified)" in run("expand", base, tmp_path / "out", "--no-verify")


def test_verify_says_no(base: Path, tmp_path: Path) -> None:
    """Exit status 1, the finding below its line, in JSON too."""
    run("expand", base, tmp_path / "out")
    checkpoints.edit(tmp_path / "out", lambda t: t["model.norm.weight"].mul_(2))
    text = run("verify", base, tmp_path / "out", code=1)
    assert "\n  model.norm.weight: " in text
    assert text.endswith("out: NOT the same function\n")
    assert json.loads(run("verify", base, tmp_path / "out", "--json", code=1))["same"] is False
    run("verify", base, tmp_path / "out", "-q", code=1)


def test_auto_says_what_it_chose(base: Path, tmp_path: Path) -> None:
    """Random exactly where two trainable copies would stay equal; half of it kept with g-freeze; mixed widths."""
    plan = ("expand", base, tmp_path / "out", "--plan")
    assert "even: 12 units come in 2 copies (auto: no two trainable copies are equal)" in run(*plan)
    assert "random: 12 units come in 2 copies (auto: two trainable copies would" in run(*plan, "--policy", "g-train")
    assert "random: 12 units come in 3 copies, the original keeps one half" in run(*plan, "--factor", 3)
    mixed = run(*plan, "--width", 30)
    assert "random: 6 units come in 3 copies" in mixed
    assert "even: 6 units come in 2 copies" in mixed
    assert "the other 4 units are not copied" in run(*plan, "--width", 20)


def test_errors_go_to_stderr(tmp_path: Path) -> None:
    """In a real process: one line on stderr, nothing on stdout, exit status 2, no traceback."""
    done = shell("expand", tmp_path / "missing", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect", "BASE"], ["expand", "BASE", "OUT", "--plan"], ["expand", "BASE", "OUT"]]
)
def test_torch_is_not_imported(base: Path, tmp_path: Path, arguments: list[str]) -> None:
    """Neither to look, nor to plan, nor to grow."""
    places = {"BASE": str(base), "OUT": str(tmp_path / "out")}
    arguments = [places.get(argument, argument) for argument in arguments]
    code = f"import sys; from ckptgrow.cli import main\ntry: main({arguments!r})\nfinally: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'ckptgrow.cli'" in done.stdout
    assert "'torch'" not in done.stdout
    assert "'huggingface_hub'" not in done.stdout


def test_bars_only_for_a_terminal(base: Path, tmp_path: Path) -> None:
    """In a pipe nothing but the result; on a terminal a bar with bytes and rate on stderr."""
    done = shell("expand", base, tmp_path / "piped")
    assert done.stderr == ""
    seen = on_terminal("expand", base, tmp_path / "terminal")
    assert "writing" in seen
    assert "B/s" in seen
    assert "writing" not in on_terminal("expand", base, tmp_path / "quiet", "-q")


def on_terminal(*arguments: object) -> str:
    """What a terminal on stderr gets to see."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "ckptgrow", *(str(argument) for argument in arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower) as process:
        os.close(follower)
        seen = b""
        try:
            while data := os.read(leader, 1 << 16):
                seen += data
        except OSError:  # the terminal's other end is closed
            pass
        assert process.wait() == 0
    os.close(leader)
    return seen.decode()


def repository(folder: Path, **changes: bytes) -> dict[str, bytes]:
    return checkpoints.snapshot(folder) | changes


def test_the_headline(tmp_path: Path) -> None:
    """ckptgrow expand google/gemma-2b out/: shards from a Hub, without .bin, GGUF and original/, then verify."""
    base = checkpoints.make(tmp_path / "gemma", "gemma")
    card = b"---\nlicense: gemma\n---\n# Gemma\n"
    extra = {"pytorch_model.bin": b"pickle", "gemma-2b.gguf": b"gguf", "original/weights.pth": b"x", "README.md": card}
    other = checkpoints.make(tmp_path / "other", "gemma", seed=1)
    hub_repository = Repository({"main": repository(base, **extra), "v2": repository(other)})
    with HubServer({"google/gemma-2b": hub_repository}) as hub:
        env = hub.environment(tmp_path / "hf")
        planned = shell("expand", "google/gemma-2b", tmp_path / "out/", "--plan", **env)
        assert "12 -> 24 units" in planned.stdout, planned.stderr
        assert not any(file.endswith(".safetensors") and hub.sent(file) > 128 * 1024 for file in hub.fetched())
        done = shell("expand", "google/gemma-2b", f"{tmp_path}/out/", **env)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert shell("verify", "google/gemma-2b", tmp_path / "out", **env).returncode == 0
        assert not {"pytorch_model.bin", "gemma-2b.gguf", "original/weights.pth"} & set(hub.fetched())
        manifest = json.loads((tmp_path / "out/ckptgrow.json").read_text())
        assert (manifest["base"]["id"], manifest["base"]["revision"]) == (
            "google/gemma-2b",
            hub_repository.commit("main"),
        )
        readme = (tmp_path / "out/README.md").read_text()
        assert "base_model: google/gemma-2b\n" in readme
        assert "license: gemma\n" in readme
        revised = shell("expand", "google/gemma-2b@v2", tmp_path / "two", **env)
        assert revised.returncode == 0, revised.stderr
        assert shell("verify", other, tmp_path / "two").returncode == 0
        assert shell("verify", base, tmp_path / "two").returncode == 1


@pytest.mark.parametrize("source", ["meta/gated", "nobody/nothing", "google/gemma-2b@v9", "mamba/mamba"])
def test_what_the_hub_refuses(tmp_path: Path, source: str) -> None:
    """Gated, missing, no such revision, and an architecture that cannot grow: one message, before any download."""
    base = repository(checkpoints.make(tmp_path / "gemma", "gemma"))
    mamba = base | {"config.json": b'{"model_type": "mamba"}'}
    repositories = {
        "meta/gated": Repository({"main": base}, gated=True),
        "google/gemma-2b": Repository({"main": base}),
        "mamba/mamba": Repository({"main": mamba}),
    }
    with HubServer(repositories) as hub:
        done = shell("expand", source, tmp_path / "out", **hub.environment(tmp_path / "hf"))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("Error: ")
        assert not (tmp_path / "out").exists()


def test_a_token_opens_the_gate(tmp_path: Path) -> None:
    """HF_TOKEN works as everywhere."""
    base = repository(checkpoints.make(tmp_path / "gemma", "gemma"))
    with HubServer({"meta/gated": Repository({"main": base}, gated=True)}) as hub:
        done = shell("expand", "meta/gated", tmp_path / "out", **hub.environment(tmp_path / "hf", token=hub.token))
        assert done.returncode == 0, done.stderr


MEASURED = """
import sys, threading, time
from ckptgrow.cli import main
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak, over = [0], threading.Event()
def watch():
    while not over.is_set():
        peak[0] = max(peak[0], anonymous()); time.sleep(0.01)
watcher = threading.Thread(target=watch); watcher.start()
try: main(sys.argv[1:])
finally: over.set(); watcher.join(); print("peak", peak[0] // 1024, file=sys.stderr)
"""


def anonymous_peak(*arguments: Any) -> int:
    """The largest anonymous memory (MiB) of a run of the command line, which must succeed."""
    command = [sys.executable, "-c", MEASURED, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("options", [[], ["--shares", "random"]])
def test_memory_is_bounded(tmp_path: Path, options: list[str]) -> None:
    """Growing 200 MB, largest tensor 100 MB, takes no more anonymous memory than blocks need: under 300 MB."""
    base = sparse(tmp_path / "base", hidden=1024, width=16 * 1024, layers=1, vocabulary=50_000)
    assert anonymous_peak("expand", base, tmp_path / "out", *options) < 300
    assert anonymous_peak("verify", base, tmp_path / "out") < 500  # torch, for the probe, is most of it


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("options", [[], ["--shares", "random", "--factor", "3"]], ids=["even", "random"])
def test_memory_is_bounded_for_gigabytes(tmp_path: Path, options: list[str]) -> None:
    """Growing 4 GB, largest tensor over 1 GB: under 300 MB of anonymous memory, verification included."""
    base = sparse(tmp_path / "base", hidden=4096, width=131_072 + 4096, layers=1, vocabulary=90_000)
    infos = open_checkpoint(base).infos.values()
    assert sum(info.nbytes for info in infos) > 4e9
    assert max(info.nbytes for info in infos) > 1.07e9
    assert anonymous_peak("expand", base, tmp_path / "out", *options) < 300


def sparse(folder: Path, hidden: int, width: int, layers: int, vocabulary: int) -> Path:
    """A checkpoint of any size in a moment: a header and holes, with distinct numbers at the start of each row."""
    import numpy as np

    from ckptgrow.tensors import TensorInfo, arrange

    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp."
        shapes |= {block + f"{role}_proj.weight": (width, hidden) for role in ("gate", "up")}
        shapes[block + "down_proj.weight"] = (hidden, width)
    header = arrange((TensorInfo(name, "BF16", shape) for name, shape in shapes.items()), {"format": "pt"})
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": width})
    )
    with (folder / "model.safetensors").open("wb") as file:
        head = header.to_bytes()
        file.write(head)
        file.truncate(len(head) + header.body_bytes)
    for info in header.tensors:
        data = np.memmap(folder / "model.safetensors", "<u2", "r+", len(head) + info.start, info.shape)
        data[:, 0] = np.arange(info.shape[0]) % 512 + 0x3C00
        data[:, 1] = np.arange(info.shape[0]) // 512 + 0x3C00
        data.flush()
    return folder
