"""Every refusal: exit status 2, one message that says what to do, no traceback, nothing left on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from click.testing import CliRunner

import ckptgrow
from ckptgrow.cli import main
from ckptgrow.errors import RequestError
from ckptgrow.layout import INDEX

UP = "model.layers.0.mlp.up_proj.weight"
SHARD = "model-00001-of-00002.safetensors"


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command line, in this process."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(base: Path, out: Path, *options: object) -> str:
    """Run expand, demand a refusal that leaves everything as it was, and return the message."""
    before = sorted(out.parent.rglob("*"))
    code, said, message = run("expand", base, out, *options)
    assert (code, said) == (2, "")
    assert message.startswith("Error: ")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    assert sorted(out.parent.rglob("*")) == before
    return message


def set_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown model_type": (
        lambda b: checkpoints.edit_config(b, model_type="nonesuch"),
        "unknown model_type 'nonesuch'",
    ),
    "no model_type": (lambda b: checkpoints.edit_config(b, model_type=None), "no model_type"),
    "state space": (lambda b: checkpoints.edit_config(b, model_type="mamba"), "it has no MLP"),
    "fixed width": (lambda b: checkpoints.edit_config(b, model_type="bloom"), "no config key can say the new width"),
    "quantised": (
        lambda b: checkpoints.edit_config(b, quantization_config={"quant_method": "gptq"}),
        "quantised (gptq)",
    ),
    "hidden size": (lambda b: checkpoints.edit_config(b, hidden_size=9), "hidden size 8, but config.json says 9"),
    "missing tensor": (lambda b: checkpoints.edit(b, lambda t: t.pop(UP)), f"{UP}: it is missing"),
    "missing layer": (
        lambda b: checkpoints.edit(b, lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp" in n]),
        "model.layers.1.mlp.gate_proj.weight: it is missing, but num_hidden_layers is 2",
    ),
    "undeclared tensor": (
        lambda b: checkpoints.edit(b, lambda t: t.update({UP + "_extra": torch.ones(1)})),
        f"{UP}_extra: model_type 'gemma3_text' declares no such tensor",
    ),
    "a quantised layer's tensor": (
        lambda b: checkpoints.edit(b, lambda t: t.update({UP + "_scale": torch.ones(1)})),
        f"{UP}_scale: a tensor of a quantised layer",
    ),
    "bias in one layer": (
        lambda b: checkpoints.edit(b, lambda t: t.update({UP.replace("weight", "bias"): torch.ones(12)})),
        "model.layers.1.mlp.up_proj.bias: it is missing, but other layers have it",
    ),
    "contradicting shapes": (
        lambda b: checkpoints.edit(b, lambda t: t.update({UP: t[UP][:11].clone()})),
        f"{UP}: shape [11, 8]",
    ),
    "integer weights": (
        lambda b: checkpoints.edit(b, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        f"{UP}: I8 weights",
    ),
    "no config": (lambda b: (b / "config.json").unlink(), "config.json: there is no such file"),
    "config not JSON": (lambda b: (b / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config a list": (lambda b: (b / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "index not JSON": (lambda b: (b / INDEX).write_text("nonsense"), f"{INDEX}: not valid JSON"),
    "index without map": (lambda b: (b / INDEX).write_text("{}"), f"{INDEX}: it has no weight_map"),
    "index leads out": (
        lambda b: set_index(b, lambda m: m.update({UP: "../elsewhere.safetensors"})),
        f"{INDEX}: {UP}: '../elsewhere.safetensors' is not the plain name",
    ),
    "index leads to root": (
        lambda b: set_index(b, lambda m: m.update({UP: "/etc/a.safetensors"})),
        "is not the plain name",
    ),
    "index names a pickle": (lambda b: set_index(b, lambda m: m.update({UP: "a.bin"})), "is not the plain name"),
    "index names nothing": (
        lambda b: set_index(b, lambda m: m.update({"ghost": SHARD})),
        f"ghost: the index says {SHARD}, but no shard holds it",
    ),
    "index forgets": (lambda b: set_index(b, lambda m: m.pop(UP)), f"{UP}: the index does not name it, but it is in"),
    "shard missing": (lambda b: (b / SHARD).unlink(), f"{SHARD}: the index names it, but it is not here"),
    "shard cut short": (lambda b: os.truncate(b / SHARD, 900), f"{SHARD}: the tensors end at"),
    "shard empty": (lambda b: (b / SHARD).write_bytes(b""), f"{SHARD}: not a safetensors file"),
    "shard a pickle": (lambda b: (b / SHARD).write_bytes(b"\x80\x04" * 99), f"{SHARD}: not a safetensors file"),
    "header nonsense": (
        lambda b: overwrite(b / SHARD, 8, b"{{{"),
        f"{SHARD}: the safetensors header is not valid JSON",
    ),
    "no weights": (lambda b: [f.unlink() for f in b.glob("model*")], "neither model.safetensors nor"),
    "two sets of weights": (lambda b: shutil.copy(b / SHARD, b / "model.safetensors"), "remove the stale one"),
    "stale manifest": (
        lambda b: (
            (b / "ckptgrow.json").write_text("{}"),
            checkpoints.edit_config(b, ckptgrow={"manifest": "sha256:0"}),
        ),
        "ckptgrow.json: its digest is not the one in config.json",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_source_is_refused(base: Path, tmp_path: Path, fault: str) -> None:
    """Each way in which a checkpoint cannot be grown, named by file and tensor."""
    change, message = BROKEN[fault]
    change(base)
    assert message in refused(base, tmp_path / "out")
    code, _, _ = run("expand", base, tmp_path / "out", "--plan")
    assert code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--factor", 1], "--factor 1 does not grow anything"),
        (["--factor", 2, "--width", 24], "exclude each other"),
        (["--width", 12], "not above the present width 12"),
        (["--width", 5, "--multiple-of", 4], "not above the present width 12"),
        (["--multiple-of", 0], "--multiple-of 0"),
        (["--seed", -1], "--seed -1"),
        (["--factor", 99999999999999], "more than 1,024 copies"),
        (["--width", 99999999999999, "--plan"], "more than 1,024 copies"),
    ],
)
def test_options_that_make_no_sense(base: Path, tmp_path: Path, options: list[object], message: str) -> None:
    """Options that contradict each other or the checkpoint."""
    assert message in refused(base, tmp_path / "out", *options)


@pytest.mark.parametrize(
    "options", [{"factor": 2.5}, {"factor": "3"}, {"width": 30.0}, {"seed": 1.5}, {"factor": True}]
)
def test_python_options_of_another_type(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The library refuses with its own error what the command line cannot even say."""
    with pytest.raises(RequestError, match="not a whole number"):
        ckptgrow.expand(base, tmp_path / "out", **options)


def test_odd_outs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` and `..` and roundabout paths are resolved before anything is made."""
    monkeypatch.chdir(base)
    for out in (".", "..", "../base/."):
        for options in ([], ["--force"]):
            code, _, message = run("expand", base, out, *options)
            assert (code, message.count("\n")) == (2, 1)
    monkeypatch.chdir(tmp_path)
    assert run("expand", "base", "nowhere/../out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    monkeypatch.chdir(tmp_path / "out")
    assert run("expand", base, ".", "--force", "--factor", 3)[0] == 0


def test_a_name_that_is_not_utf8(base: Path, tmp_path: Path) -> None:
    """A folder may be called anything."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    base.rename(odd)
    ckptgrow.expand(odd, tmp_path / "out")
    assert ckptgrow.verify(odd, tmp_path / "out").exit_code == 0


def test_a_bug_is_exit_status_2(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 means that the answer is no: what nobody foresaw must not look like it, and keeps its trace."""
    from ckptgrow import operations

    monkeypatch.setattr(operations, "expand", lambda *a, **k: 1 / 0)
    code, _, message = run("expand", base, tmp_path / "out")
    assert code == 2
    assert "ZeroDivisionError" in message
    assert message.endswith("please report it with the lines above.\n")


def test_options_that_click_refuses(base: Path, tmp_path: Path) -> None:
    """Unknown words are usage errors, exit status 2 too."""
    for options in (["--policy", "all"], ["--shares", "third"], ["--factor", "two"], ["--nonsense"]):
        assert run("expand", base, tmp_path / "out", *options)[0] == 2
    assert not (tmp_path / "out").exists()


def test_an_existing_out(base: Path, tmp_path: Path) -> None:
    """A folder that is there is not touched without --force; a file or a link not even with it."""
    (tmp_path / "out").mkdir()
    assert "out: it exists" in refused(base, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    assert "is not a folder" in refused(base, tmp_path / "file", "--force")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert "is not a folder" in refused(base, tmp_path / "link", "--force")


def test_out_and_source_overlap(base: Path, tmp_path: Path) -> None:
    """OUT equal to, inside or around SRC, by whatever path, with --force too."""
    (tmp_path / "alias").symlink_to(base)
    for out in (base, base / "sub", tmp_path / "alias", tmp_path / "alias/sub", base / "../base"):
        for options in ([], ["--force"]):
            assert "it is inside the source" in refused(base, out, *options)
    assert "it holds the source" in refused(base, tmp_path, "--force")


def test_force_replaces_checkpoints_only(base: Path, tmp_path: Path) -> None:
    """--force on a folder of something else is refused."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    assert "holds no checkpoint" in refused(base, tmp_path / "thesis", "--force")
    (tmp_path / "thesis/config.json").write_text("{}")
    assert "holds no checkpoint" in refused(base, tmp_path / "thesis", "--force")


def test_too_little_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is refused before the first byte."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "1,000 are free on that disk" in refused(base, tmp_path / "out")


def test_a_folder_in_the_way(base: Path, tmp_path: Path) -> None:
    """OUT.partial that ckptgrow did not make is not removed."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("mine")
    assert "not a leftover of ckptgrow" in refused(base, tmp_path / "out")


def test_no_such_source(tmp_path: Path) -> None:
    """Neither a folder nor a Hub id, for each command."""
    missing = tmp_path / "missing"
    for arguments in (["inspect", missing], ["expand", missing, tmp_path / "out"], ["verify", missing, missing]):
        code, said, message = run(*arguments)
        assert (code, said, message.count("\n")) == (2, "", 1)
        assert "no such folder" in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_as_source(base: Path, tmp_path: Path) -> None:
    """A file is answered with the folder to give."""
    assert "is a file, not a checkpoint" in refused(base / SHARD, tmp_path / "out")


def test_an_unwritable_place(base: Path, tmp_path: Path) -> None:
    """The system's own refusals are one message too."""
    (tmp_path / "file").write_text("")
    code, _, message = run("expand", base, tmp_path / "file" / "out")
    assert code == 2
    assert message.count("\n") == 1
    assert "file" in message


def test_a_disk_that_fails(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while writing removes what was written."""
    from ckptgrow import execute

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "model-00002-of-00002.safetensors.tmp")

    monkeypatch.setattr(execute, "_write_all", fail)
    assert "No space left on device" in refused(base, tmp_path / "out")
    code, _, _ = run("expand", base, tmp_path / "new/parent/out")
    assert code == 2
    assert not (tmp_path / "new").exists()


def test_verify_refuses_what_it_cannot_read(base: Path, tmp_path: Path) -> None:
    """A folder that is no checkpoint, or a family it does not know: cannot tell, exit status 2."""
    (tmp_path / "empty").mkdir()
    assert run("verify", base, tmp_path / "empty")[0] == 2
    checkpoints.edit_config(base, model_type="nonesuch")
    code, _, message = run("verify", base, base)
    assert (code, message.count("\n")) == (2, 1)
