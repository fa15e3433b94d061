"""expand as a whole: all or nothing under kills, --force, --resume, copies of other files, config edits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest

import ckptgrow
from ckptgrow import execute, staging
from ckptgrow.errors import OutputError

MOMENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile", "test.write"}


def killed_at(moment: int, base: Path, out: Path, **options: Any) -> bool:
    """Run expand in a child process that is killed when it does its `moment`-th thing to the disk; False: it ended."""
    child = os.fork()
    if child == 0:
        die_at(moment)
        ckptgrow.expand(base, out, **options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def die_at(moment: int) -> None:
    """SIGKILL this process at its `moment`-th write, open, rename, mkdir, removal, ..."""
    count = 0

    def watch(event: str, arguments: Any) -> None:
        nonlocal count
        if event not in MOMENTS:  # the kill below is an event too
            return
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    written, swapped = execute._write_all, staging._exchange
    execute._write_all = lambda *a: (written(*a), sys.audit("test.write"))[0]
    staging._exchange = lambda *a: (sys.audit("test.write"), swapped(*a), sys.audit("test.write"))[1]
    sys.addaudithook(watch)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("resume", [False, True])
def test_a_kill_at_any_moment_leaves_out_absent(base: Path, tmp_path: Path, resume: bool) -> None:
    """Killed at each thing it does to the disk: OUT is absent or complete, and the next run makes it complete."""
    expected = checkpoints.snapshot(ckptgrow.expand(base, tmp_path / "expected").folder)
    source, out = checkpoints.snapshot(base), tmp_path / "out"
    moment = 1
    while killed_at(moment, base, out):
        assert not out.exists() or checkpoints.snapshot(out) == expected
        if not out.exists():
            ckptgrow.expand(base, out, resume=resume)
        assert checkpoints.snapshot(out) == expected
        assert checkpoints.snapshot(base) == source
        if (tmp_path / "out.partial.journal").exists():  # killed after OUT was complete: the next run takes it away
            ckptgrow.expand(base, out, force=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expected", "out"]
        shutil.rmtree(out)
        moment += 1
    assert moment > 40


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the exchange of two folders in one step is Linux's")
def test_a_kill_with_force_leaves_the_old_or_the_new(base: Path, tmp_path: Path) -> None:
    """With --force OUT is there at every moment: the old one whole until the new one is."""
    out = tmp_path / "out"
    new = checkpoints.snapshot(ckptgrow.expand(base, tmp_path / "new").folder)
    old = checkpoints.snapshot(ckptgrow.expand(base, tmp_path / "old", factor=3).folder)
    moment, kept = 1, 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(staging.partial(out), ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        if not killed_at(moment, base, out, force=True):
            break
        found = checkpoints.snapshot(out)
        assert found in (old, new)
        kept += found == old
        moment += 1
    assert checkpoints.snapshot(out) == new
    assert kept > 40


def test_force_without_the_exchange(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot exchange two names, two renames do it, and nothing is left beside OUT."""
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    ckptgrow.expand(base, tmp_path / "out", factor=3)
    ckptgrow.expand(base, tmp_path / "out", force=True)
    assert ckptgrow.inspect(tmp_path / "out").blocks[0].width == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_force_without_the_exchange_undoes_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second of the two renames fails, the old OUT is put back; a left one is never overwritten."""
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    out, honest = tmp_path / "out", Path.rename
    ckptgrow.expand(base, out, factor=3)
    old = checkpoints.snapshot(out)

    def fail(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(5, "Input/output error")
        return honest(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        ckptgrow.expand(base, out, force=True)
    assert checkpoints.snapshot(out) == old
    (tmp_path / "out.partial.old").mkdir()
    with pytest.raises(OutputError, match="an earlier run left it"):
        ckptgrow.expand(base, out, force=True)
    assert checkpoints.snapshot(out) == old


def test_nothing_of_ours_is_taken_for_a_leftover(base: Path, tmp_path: Path) -> None:
    """A finished checkpoint named OUT.partial, a link of that name, the source itself: none is ever cleared."""
    kept = checkpoints.snapshot(ckptgrow.expand(base, tmp_path / "m.partial").folder)
    with pytest.raises(OutputError, match="inside the source"):
        ckptgrow.expand(tmp_path / "m.partial", tmp_path / "m")
    with pytest.raises(OutputError, match="not a leftover"):
        ckptgrow.expand(base, tmp_path / "m")
    (tmp_path / "s.partial").symlink_to(tmp_path / "m.partial")
    with pytest.raises(OutputError, match="not a leftover"):
        ckptgrow.expand(base, tmp_path / "s")
    (tmp_path / "s.partial.journal").write_text('{"writing": "something"}\n')  # of a killed run, the link came later
    with pytest.raises(OutputError, match="not a leftover"):
        ckptgrow.expand(base, tmp_path / "s")
    (tmp_path / "s.partial.journal").unlink()
    assert checkpoints.snapshot(tmp_path / "m.partial") == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m.partial", "s.partial"]


def test_a_slow_commit_keeps_its_lock(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the finished folder is being flushed and renamed, another run on the same OUT is refused."""
    flushed = staging._sync

    def meanwhile(path: Path) -> None:
        if path.name == "out.partial":
            with pytest.raises(OutputError, match="another ckptgrow"):
                ckptgrow.expand(base, tmp_path / "out", factor=3)
        flushed(path)

    monkeypatch.setattr(staging, "_sync", meanwhile)
    ckptgrow.expand(base, tmp_path / "out")
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("damage", ["\0\0\0\n", "[1]\n", "{}\n", "half a li"])
def test_a_damaged_journal_cannot_be_resumed(base: Path, tmp_path: Path, damage: str) -> None:
    """After a power cut the journal may be anything: refused with --resume, begun anew without."""
    half_done(base, tmp_path / "out")
    (tmp_path / "out.partial.journal").write_text(damage)
    with pytest.raises(OutputError, match="cannot be resumed"):
        ckptgrow.expand(base, tmp_path / "out", resume=True)
    ckptgrow.expand(base, tmp_path / "out")
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


def test_resume_keeps_the_finished_shards(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run writes only what is missing, and counts what the first run counted."""
    out = tmp_path / "out"
    expected = checkpoints.snapshot(ckptgrow.expand(base, tmp_path / "expected").folder)
    half_done(base, out)
    written: list[str] = []
    honest = execute._write_shard
    monkeypatch.setattr(
        execute,
        "_write_shard",
        lambda folder, shard, *rest: (written.append(shard.file), honest(folder, shard, *rest))[1],
    )
    ckptgrow.expand(base, out, resume=True)
    assert written == ["model-00002-of-00002.safetensors"]
    assert checkpoints.snapshot(out) == expected


def half_done(base: Path, out: Path) -> None:
    """A run, one shard after the other, that was killed after the first."""
    child = os.fork()
    if child == 0:
        os.cpu_count = lambda: 1  # type: ignore[assignment]
        recorded = staging.Staging.record
        staging.Staging.record = lambda *a: (recorded(*a), os.kill(os.getpid(), signal.SIGKILL))[0]  # type: ignore[method-assign]
        ckptgrow.expand(base, out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert sorted(path.name for path in staging.partial(out).glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors"
    ]


def test_resume_refuses_another_growth(base: Path, tmp_path: Path) -> None:
    """Other options or a changed source: the finished shards would not fit."""
    half_done(base, tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be resumed"):
        ckptgrow.expand(base, tmp_path / "out", factor=3, resume=True)
    os.utime(base / "model-00001-of-00002.safetensors", (1, 1))
    with pytest.raises(OutputError, match="cannot be resumed"):
        ckptgrow.expand(base, tmp_path / "out", resume=True)
    ckptgrow.expand(base, tmp_path / "out")


def test_resume_without_anything_to_resume(base: Path, tmp_path: Path) -> None:
    """--resume on a fresh OUT is an ordinary run."""
    ckptgrow.expand(base, tmp_path / "out", resume=True)
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


def test_two_runs_do_not_meet(base: Path, tmp_path: Path) -> None:
    """While one process writes OUT, another is refused and does not disturb it."""
    out = tmp_path / "out"
    with staging.Staging(out, "first"):
        with pytest.raises(OutputError, match="another ckptgrow is writing there"):
            ckptgrow.expand(base, out)
        assert staging.partial(out).exists()
    assert not staging.partial(out).exists()


def test_an_out_that_appears_meanwhile_stays(base: Path, tmp_path: Path) -> None:
    """Another program made OUT while we were writing: without --force it is not replaced."""
    out = tmp_path / "out"

    def appear(stage: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match="it appeared while"):
        ckptgrow.expand(base, out, progress=appear)
    assert checkpoints.snapshot(out) == {"mine.txt": b"mine"}
    assert not staging.partial(out).exists()


def test_an_interrupt_leaves_nothing(base: Path, tmp_path: Path) -> None:
    """Ctrl-C while shards are written: nothing is left, parents that were made for OUT included."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckptgrow.expand(base, tmp_path / "new/out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_progress_reaches_its_total(base: Path, tmp_path: Path) -> None:
    """Each stage's bytes grow to exactly what was announced."""
    seen: dict[str, list[tuple[int, int]]] = {}
    ckptgrow.expand(base, tmp_path / "out", progress=lambda stage, *step: seen.setdefault(stage, []).append(step))
    ckptgrow.verify(
        base, tmp_path / "out", progress=lambda stage, *step: seen.setdefault(stage + " again", []).append(step)
    )
    assert list(seen) == ["writing", "comparing", "proving", "comparing again", "proving again", "probing again"]
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1]


def test_config_changes_by_its_keys_only(tmp_path: Path) -> None:
    """Order, number formats, escapes and white space stay; the diff is the width and the key ckptgrow."""
    base = checkpoints.make(tmp_path / "base")
    text = (
        (base / "config.json")
        .read_text()
        .replace("1e-06", "1E-6")
        .replace('"vocab_size"', '"na\\u00efve": "é",\n  "vocab_size"')
    )
    (base / "config.json").write_text(text)
    ckptgrow.expand(base, tmp_path / "out")
    made = (tmp_path / "out/config.json").read_text().splitlines()
    differing = [line for line in text.splitlines() if line not in made]
    assert differing == ['  "intermediate_size": 12,', '  "vocab_size": 16']
    assert json.loads("\n".join(made))["intermediate_size"] == 24


@pytest.mark.parametrize("value", [None, "absent"])
def test_a_width_that_the_config_does_not_say(tmp_path: Path, value: str | None) -> None:
    """Widths come from shapes: where the key is null or absent, the new width is written explicitly."""
    base = checkpoints.make(tmp_path / "base", "gpt_neo")
    config = json.loads((base / "config.json").read_text())
    config["intermediate_size"] = None
    if value == "absent":
        del config["intermediate_size"]
    (base / "config.json").write_text(json.dumps(config))
    ckptgrow.expand(base, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 24
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


def test_nested_config(tmp_path: Path) -> None:
    """gemma3 keeps the width in text_config; its vision tower is not touched."""
    base = checkpoints.make(tmp_path / "base", "gemma3", prefix="language_model.model.")
    tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    checkpoints.edit(base, lambda t: t.update({tower: t["language_model.model.norm.weight"].repeat(12, 1)}))
    ckptgrow.expand(base, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["text_config"]["intermediate_size"], "intermediate_size" in config) == (24, False)
    assert config["ckptgrow"]["base_width"] == {"text_config.intermediate_size": 12}
    assert checkpoints.load(tmp_path / "out")[tower].shape == (12, 8)
    manifest = json.loads((tmp_path / "out/ckptgrow.json").read_text())
    disk = "language_model.model.layers.0.mlp.down_proj.weight"
    assert manifest["in_memory_names"][disk] == "model.language_model.layers.0.mlp.down_proj.weight"


def test_other_files(base: Path, tmp_path: Path) -> None:
    """Tokenizers, templates and code come along, in folders too; other weights and training state stay behind."""
    for file in ("modeling_x.py", "chat_template.jinja", "sub/vocab.txt", "tokenizer.model", "LICENSE"):
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text(file)
    stale = (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "model.gguf",
        "consolidated.safetensors",
    )
    for file in (*stale, "trainer_state.json", "original/params.json", ".hidden", "training_args.bin"):
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text(file)
    done = ckptgrow.expand(base, tmp_path / "out")
    made = checkpoints.snapshot(tmp_path / "out")
    kept = {"modeling_x.py", "chat_template.jinja", "sub/vocab.txt", "tokenizer.model", "LICENSE"}
    own = {"README.md", "ckptgrow.json", "config.json", "model.safetensors.index.json"}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert made.keys() == kept | own | shards | {"tokenizer.json", "generation_config.json"}
    assert set(done.proposal.files_left_out) == {
        *stale,
        "trainer_state.json",
        "original/params.json",
        "training_args.bin",
    }


def test_a_snapshot_full_of_links(base: Path, tmp_path: Path) -> None:
    """A folder of the Hub cache holds links to blobs: OUT holds files."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    base.rename(blobs)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    ckptgrow.expand(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert ckptgrow.verify(snapshot, tmp_path / "out").exit_code == 0


def test_one_file_without_index(tmp_path: Path) -> None:
    """A single model.safetensors stays one; no index appears."""
    base = checkpoints.make(tmp_path / "base", shards=1)
    ckptgrow.expand(base, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


def test_plan_tells_what_happens(base: Path, tmp_path: Path) -> None:
    """The proposal's figures are those of the folder that is then written; planning writes nothing."""
    (base / "pytorch_model.bin").write_text("stale")
    what = ckptgrow.plan_expand(base, tmp_path / "out", factor=3, policy="down")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    ckptgrow.expand(base, tmp_path / "out", factor=3, policy="down")
    tensors = checkpoints.load(tmp_path / "out")
    assert what.parameters_after == sum(t.numel() for t in tensors.values())
    assert what.parameters_before == sum(t.numel() for t in checkpoints.load(base).values())
    assert what.trainable == 2 * 24 * 8
    assert what.trainable_share_of_base == round(what.trainable / what.parameters_before, 6)
    assert what.files_copied == ("generation_config.json", "tokenizer.json")
    assert what.files_left_out == ("pytorch_model.bin",)
    assert [(b.old_width, b.new_width) for b in what.blocks] == [(12, 36)] * 2
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert abs(what.bytes_to_write - written) < 16_000
