"""ckptgrow.json: its schema, its content, its digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import checkpoints
import jsonschema
import pytest
from safetensors import safe_open
from strategies import LAYOUTS

import ckptgrow
from ckptgrow.checkpoint import MANIFEST, digest_of
from ckptgrow.manifest import load_manifest
from ckptgrow.policy import POLICIES
from ckptgrow.regions import Division, divided

SCHEMA = json.loads(files("ckptgrow").joinpath("manifest.schema.json").read_text())


def grown(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, checked against the schema."""
    manifest: dict[str, Any] = json.loads((folder / "ckptgrow.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    return manifest


def test_schema_is_a_schema() -> None:
    """The shipped schema is itself valid."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("family", "policy"),
    [(family, "g-freeze") for family in LAYOUTS] + [("phi3", policy) for policy in POLICIES] + [("dbrx", "up")],
)
def test_every_manifest_is_valid(tmp_path: Path, family: str, policy: str) -> None:
    """Each family and policy gives a manifest that the schema accepts and whose boxes lie in the tensors on disk."""
    base = checkpoints.make(tmp_path / "base", family)
    ckptgrow.expand(base, tmp_path / "out", policy=policy, factor=3)
    manifest = grown(tmp_path / "out")
    tensors = checkpoints.load(tmp_path / "out")
    inside = 0
    for trainable in manifest["trainable"]:
        assert trainable["shape"] == list(tensors[trainable["name"]].shape)
        for box in trainable["boxes"]:
            view = tensors[trainable["name"]][tuple(slice(*span) for span in box)]
            assert list(view.shape) == [stop - start for start, stop in box]
            inside += view.numel()
    assert inside == manifest["counts"]["trainable"]
    assert inside + manifest["counts"]["frozen"] == sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize(
    "broken", [{"policy": "all"}, {"history": [{}]}, {"schema": 2}, {"rules": []}, {"trainable": []}]
)
def test_schema_refuses(base: Path, tmp_path: Path, broken: dict[str, Any]) -> None:
    """The schema is strict: wrong values and unknown keys are refused."""
    ckptgrow.expand(base, tmp_path / "out")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(grown(tmp_path / "out") | broken)


def test_copies_name_the_base_unit(base: Path, tmp_path: Path) -> None:
    """Each new unit's gate row is that of the base unit that `copies` says, above twice the width too."""
    ckptgrow.expand(base, tmp_path / "out", width=29)
    before, after = checkpoints.load(base), checkpoints.load(tmp_path / "out")
    for block in grown(tmp_path / "out")["blocks"]:
        assert (block["old_width"], block["new_width"]) == (12, 29)
        name = block["block"] + ".gate_proj.weight"
        covered = []
        for run in block["copies"]:
            assert (after[name][slice(*run["new"])] == before[name][slice(*run["base"])]).all()
            covered += range(*run["new"])
        assert covered == list(range(12, 29))


@pytest.mark.parametrize("options", [{}, {"width": 29, "policy": "g-train"}])
def test_reading_it_gives_the_same_value(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """load_manifest is the inverse of the file's text; a folder stands for the file in it."""
    done = ckptgrow.expand(base, tmp_path / "out", **options)
    for path in (tmp_path / "out", tmp_path / "out/ckptgrow.json"):
        assert load_manifest(path).text() == done.manifest.text()
        assert load_manifest(path).trainable == done.manifest.trainable


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "history": []}', '{"schema": 9, "history": []}'])
def test_reading_something_else(tmp_path: Path, text: str) -> None:
    """What is no manifest is refused by file name."""
    (tmp_path / "ckptgrow.json").write_text(text)
    with pytest.raises(ckptgrow.FormatError, match=r"ckptgrow\.json: not"):
        load_manifest(tmp_path)
    with pytest.raises(ckptgrow.FormatError, match="cannot be read"):
        load_manifest(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "boxes",
    [
        (((0, 4), (0, 3)), ((3, 6), (0, 3))),
        (((4, 9), (0, 3)),),
        (((2, 2), (0, 3)),),
        (((5, 4), (0, 3)),),
        (((0, 8), (1, 1)),),
        (((0, 8), (0, 2)), ((2, 4), (1, 3))),
    ],
    ids=["overlap", "outside", "empty", "backwards", "empty columns", "overlap in some rows"],
)
def test_boxes_that_are_no_ranges(boxes: Any) -> None:
    """Boxes are read as ranges along one axis, or not at all."""
    assert divided((8, 3), (((4, 6), (0, 3)), ((0, 2), (0, 3)))) == Division((8, 3), 0, ((range(1), ((0, 2), (4, 6))),))
    assert divided((8, 3), (((0, 8), (0, 3)),)).whole
    with pytest.raises(ckptgrow.FormatError, match=r"not ranges along one axis|overlap"):
        divided((8, 3), boxes)


def test_digest_stands_in_the_config(base: Path, tmp_path: Path) -> None:
    """config.json carries the sha256 of ckptgrow.json and the width before."""
    done = ckptgrow.expand(base, tmp_path / "out")
    entry = json.loads((tmp_path / "out/config.json").read_text())["ckptgrow"]
    digest = "sha256:" + hashlib.sha256((tmp_path / "out/ckptgrow.json").read_bytes()).hexdigest()
    assert entry == {"manifest": digest, "base_width": {"intermediate_size": 12}}
    assert done.manifest.digest == digest


def test_base_is_identified(base: Path, tmp_path: Path) -> None:
    """The manifest has the base's texts, and of each shard size, header and digests; of its other files digests."""
    (base / "README.md").write_text("# naïve", encoding="utf-8")
    ckptgrow.expand(base, tmp_path / "out")
    recorded = grown(tmp_path / "out")["base"]
    assert recorded["index"] == (base / "model.safetensors.index.json").read_text()
    assert recorded["card"] == "# naïve"
    assert recorded["files"] == {
        file: digest((base / file).read_bytes()) for file in ("generation_config.json", "tokenizer.json")
    }
    assert recorded["config"] == (base / "config.json").read_text()
    assert (recorded["id"], recorded["revision"]) == ("base", None)
    for file, facts in recorded["shards"].items():
        data = (base / file).read_bytes()
        size = int.from_bytes(data[:8], "little")
        spans = {n: t["data_offsets"] for n, t in json.loads(data[8 : 8 + size]).items() if n != "__metadata__"}
        tensors = {name: digest(data[8 + size + a : 8 + size + b]) for name, (a, b) in spans.items()}
        told = {"header": digest(data[: 8 + size]), "text": data[8 : 8 + size].decode(), "tensors": tensors}
        assert facts == {"bytes": len(data), **told}


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_inexact_halves_are_counted(base: Path, tmp_path: Path) -> None:
    """Weights of down with an odd subnormal pattern are counted, once each, whatever the number of copies."""

    def plant(tensors: checkpoints.Tensors) -> None:
        down = tensors["model.layers.0.mlp.down_proj.weight"]
        down.view(-1)[:3] = 2.0**-133
        down.view(-1)[3:5] = 2.0**-132

    checkpoints.edit(base, plant)
    for i, options in enumerate([{"factor": 2}, {"factor": 3}, {"factor": 2, "shares": "random"}]):
        done = ckptgrow.expand(base, tmp_path / f"out{i}", **options)  # type: ignore[arg-type]
        assert done.manifest.inexact_halves == 3
        assert ckptgrow.verify(base, tmp_path / f"out{i}").exit_code == 0


def test_mask_of_a_snapshot_names_the_hub_id(base: Path, tmp_path: Path) -> None:
    """A folder in the Hub cache is recognised: the manifest has its id and commit, the card its base_model."""
    snapshot = tmp_path / "hub/models--org--name/snapshots/0123abcd"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    ckptgrow.expand(snapshot, tmp_path / "out")
    recorded = grown(tmp_path / "out")["base"]
    assert (recorded["id"], recorded["revision"]) == ("org/name", "0123abcd")
    assert "base_model: org/name" in (tmp_path / "out/README.md").read_text()


def test_growing_again_keeps_the_history(base: Path, tmp_path: Path) -> None:
    """A grown and trained checkpoint grows again: all that was there is base, each earlier manifest is kept."""
    ckptgrow.expand(base, tmp_path / "one")
    checkpoints.edit(tmp_path / "one", lambda t: t["model.layers.0.mlp.up_proj.weight"][12:].mul_(1.5))
    ckptgrow.expand(tmp_path / "one", tmp_path / "two", width=36)
    ckptgrow.expand(tmp_path / "two", tmp_path / "three", width=40)
    assert ckptgrow.verify(tmp_path / "one", tmp_path / "three").exit_code == 0
    assert ckptgrow.verify(base, tmp_path / "three").exit_code == 1
    first, last = grown(tmp_path / "one"), grown(tmp_path / "three")
    assert [past["blocks"][0]["new_width"] for past in last["history"]] == [24, 36]
    assert last["history"][0] == {key: value for key, value in first.items() if key != "history"}
    gate = next(t for t in last["trainable"] if t["role"] == "gate")
    assert gate["boxes"] == [[[36, 40], [0, 8]]]


def test_history_without_its_file(base: Path, tmp_path: Path) -> None:
    """A trainer's save_pretrained loses ckptgrow.json: the digest from config.json is kept."""
    done = ckptgrow.expand(base, tmp_path / "one")
    (tmp_path / "one/ckptgrow.json").unlink()
    ckptgrow.expand(tmp_path / "one", tmp_path / "two")
    assert grown(tmp_path / "two")["history"] == [{"manifest": done.manifest.digest}]


def test_header_digest_reads_like_safetensors(base: Path, tmp_path: Path) -> None:
    """The grown shards open with the safetensors library and hold the names and metadata of the base's."""
    ckptgrow.expand(base, tmp_path / "out")
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as mine, safe_open(tmp_path / "out" / file.name, "pt") as its:
            assert sorted(mine.keys()) == sorted(its.keys())
            assert mine.metadata() == its.metadata() == {"format": "pt"}


def test_a_manifest_is_known_by_the_text_it_was_read_from(base: Path, tmp_path: Path) -> None:
    """Another version may write the same value otherwise; config.json names the file. A changed copy is no file."""
    ckptgrow.expand(base, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    ours = load_manifest(path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    theirs = load_manifest(path)
    assert theirs == ours
    assert theirs.to_json() == ours.to_json()
    assert theirs.text() == path.read_text()
    assert theirs.digest == digest_of(path.read_bytes()) != ours.digest
    assert replace(theirs, policy="up").digest != theirs.digest
    assert replace(theirs).digest == replace(ours).digest == ours.digest
