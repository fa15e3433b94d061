"""The README is true: its commands run, its transcripts are what is printed, every command and option is in it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ckptgrow.cli import main
from ckptgrow.families import FAMILIES
from ckptgrow.policy import POLICIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRANSCRIPTS = re.findall(r"```console\n(\$ .*?)```", README, re.DOTALL)


def commands() -> dict[str, click.Command]:
    return dict(main.commands)


@pytest.mark.parametrize("name", sorted(commands()))
def test_each_command_is_documented(name: str) -> None:
    """It has a heading in the README, a help text, and each of its options stands in its section."""
    section = re.search(rf"### `ckptgrow {name} .*?(?=\n##)", README, re.DOTALL)
    assert section
    command = commands()[name]
    assert command.help
    shared = "All take `--json`"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert any(option in section[0] or option in shared or option == "--quiet" for option in parameter.opts)


def test_families_and_policies_are_documented() -> None:
    """What can grow is the table; the policies are those there are."""
    listed = re.search(r"## What can grow\n\n(.*?), in F64", README, re.DOTALL)
    assert listed
    assert re.split(r",\s+|\s+and\s+", listed[1]) == sorted(FAMILIES)
    assert re.findall(r"^\| `(\S+)` \| (?:new|all)", README, re.MULTILINE) == list(POLICIES)


def test_first_screen() -> None:
    """One sentence, then a transcript before line 30."""
    assert README.splitlines()[5].startswith("```console")


def test_quickstart() -> None:
    """The README's first command runs the example: it tells the whole story and ends well."""
    assert "examples/quickstart.py" in README
    done = subprocess.run(
        [sys.executable, ROOT / "examples/quickstart.py"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "grown: the same function" in done.stdout
    assert "broken: NOT the same function" in done.stdout
    assert done.stderr == ""


def test_second_command_runs_the_tests() -> None:
    """CI calls the README's own line."""
    assert re.search(r"^python3 -m venv \.venv .* -m pytest$", README, re.MULTILINE)
    assert "README.md" in (ROOT / ".ci/run").read_text()


@pytest.mark.real
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda text: text.splitlines()[0])
def test_transcripts(transcript: str, real_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transcript, run on the real Gemma 3 270M, prints what the README shows."""
    (tmp_path / "gemma-3-270m").symlink_to(real_gemma)
    monkeypatch.chdir(tmp_path)
    for step in re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]:
        command, _, expected = step.partition("\n")
        result = CliRunner().invoke(main, command.split()[1:])
        assert without_noise(result.stdout) == without_noise(expected)


def without_noise(text: str) -> str:
    """The relative difference of a probe depends on the machine's matrix products."""
    return re.sub(r"difference \S+", "difference", text)


@pytest.mark.real
def test_manifest_example(real_gemma: Path, tmp_path: Path) -> None:
    """The line of ckptgrow.json in the README is one of the real Gemma's."""
    CliRunner().invoke(main, ["expand", str(real_gemma), str(tmp_path / "out")])
    shown = re.search(r"```json\n(.*?)\n```", README, re.DOTALL)
    assert shown
    assert json.loads(shown[1]) in json.loads((tmp_path / "out/ckptgrow.json").read_text())["trainable"]
