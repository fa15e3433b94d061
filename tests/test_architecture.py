"""The house rules that a machine can hold: who imports whom, what stays lazy, how long things may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import ckptgrow

PACKAGE = Path(ckptgrow.__file__).parent


def room_of(path: Path) -> str:
    """The dotted name of a module within the package; a folder's __init__ is the folder."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


SOURCES = {room_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}

# DESIGN.md's order: each module imports only those before it.
PURE = ["errors", "version", "tensors", "layers", "plan", "policy", "regions"]
PURE += [
    f"families.{room}" for room in ("form", "templates", "decoders", "mixtures", "encoders", "multimodal", "table")
]
PURE += ["families.declared", "families.propose", "families.found", "families.storage", "families.agree"]
PURE += ["families.locate", "families.recast", "families.spelling", "families"]
PURE += ["surgery", "layout", "proof", "config"]
ORDER = [
    *PURE,
    "progress",
    "checkpoint",
    "numeric",
    "journal",
    "staging",
    "execute",
    "units",
    "configs",
    "equivalence",
    "regrouped",
    "identity",
    "manifest",
    "marks",
    "sums",
    "combining",
    "joining",
    "redundancy",
    "folding",
    "narrowing",
    "trained",
    "matching",
    "unwrapped",
    "recognition",
    "respelled",
    "lineage",
    "stacks",
    "reference",
    "traces",
    "drift",
    "repair",
    "ranking",
    "plot",
    "inversion",
    "merging",
    "ingredients",
    "reversal",
    "skills",
    "weighed",
    "mixture",
    "hub",
    "training.cut",
    "training.resolve",
    "training.masters",
    "training.handle",
    "training.sharded",
    "training.split",
    "training.mask",
    "training",
    "training.transformers",
    "training.lightning",
    "training.peft",
    "stencil",
    "dialects.patterns",
    "dialects.subject",
    "dialects.plain",
    "dialects.axolotl",
    "dialects.llamafactory",
    "dialects.peft",
    "dialects",
    "probe",
    "merged",
    "logits",
    "card",
    "results",
    "lossy",
    "operations.declaring",
    "operations.growing",
    "operations.auditing",
    "operations.masking",
    "operations.folding",
    "operations.ranking",
    "operations.reverting",
    "operations.skills",
    "operations.merging",
    "operations",
    "report.lines",
    "report.growing",
    "report.auditing",
    "report.masking",
    "report.folding",
    "report.ranking",
    "report.reverting",
    "report.skills",
    "report",
    "training.finished",
    "training.axolotl",
    "training.llamafactory",
    "cli.group",
    "cli.growing",
    "cli.auditing",
    "cli.masking",
    "cli.folding",
    "cli.ranking",
    "cli.reverting",
    "cli.skills",
    "cli",
]
ENTRANCES = ["__init__", "__main__"]

# What a module without files, clock and torch may need.
HARMLESS = {
    "__future__",
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "fractions",
    "functools",
    "itertools",
    "json",
    "math",
}
HARMLESS |= {"fractions", "re", "typing", "ckptgrow"}

# What makes the result: the verifier must not call what it checks.
MAKERS = {"plan", "policy", "surgery", "layout", "proof", "staging", "execute", "operations"}
MAKERS |= {"sums", "combining", "joining", "redundancy", "folding", "narrowing", "lossy"}


def imports(source: str, everywhere: bool = True) -> Iterator[str]:
    """The dotted names that a module imports: all of them, or only those that run when it is imported."""
    tree = ast.parse(source)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for n in ast.walk(f)}
    inside |= {id(n) for t in ast.walk(tree) if isinstance(t, ast.If) and _is_for_types(t) for n in ast.walk(t)}
    for node in ast.walk(tree):
        if not everywhere and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _is_for_types(test: ast.If) -> bool:
    return ast.unparse(test.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def rooms(source: str, known: Collection[str] = SOURCES) -> set[str]:
    """The modules of this package that a module imports, in functions too."""
    names = (name.removeprefix("ckptgrow.") for name in imports(source) if name.startswith("ckptgrow."))
    return {max((room for room in known if f"{name}.".startswith(f"{room}.")), key=len, default=name) for name in names}


def upward(order: list[str], sources: dict[str, str]) -> list[str]:
    """Each import of a module that does not come before the importer."""
    place = {name: i for i, name in enumerate(order)}
    return [
        f"{module} imports {room}"
        for module, source in sources.items()
        for room in sorted(rooms(source, sources) & set(sources))
        if place[room] >= place[module]
    ]


def too_long(sources: dict[str, str], lines_a_file: int, lines_a_function: int) -> list[str]:
    """Files and functions of too many lines."""
    found = [name for name, source in sources.items() if len(source.splitlines()) > lines_a_file]
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, FUNCTIONS) and (node.end_lineno or 0) - node.lineno + 1 > lines_a_function:
                found.append(f"{name}.{getattr(node, 'name', 'lambda')}")
    return found


# ---------------------------------------------------------------- who imports whom


def test_every_module_has_its_place() -> None:
    """A new module is put into the order, here and in the design note."""
    assert sorted(SOURCES) == sorted([*ORDER, *ENTRANCES])


def test_modules_import_only_those_above_them() -> None:
    """The dependency order of DESIGN.md."""
    assert upward([*ORDER, *ENTRANCES], SOURCES) == []


def test_pure_modules_touch_no_world() -> None:
    """No file, no clock, no numpy and no torch before checkpoint.py."""
    for module in PURE:
        assert {name.split(".")[0] for name in imports(SOURCES[module])} <= HARMLESS, module
        assert rooms(SOURCES[module]) <= set(PURE), module
        assert not {"open", "print", "input"} & _called(SOURCES[module]), module


def _called(source: str) -> set[str]:
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {func.id for func in calls if isinstance(func, ast.Name)}


@pytest.mark.parametrize("module", ["equivalence", "regrouped", "probe", "logits", "traces", "drift"])
def test_the_verifier_knows_nothing_of_what_it_checks(module: str) -> None:
    """Verification is independent: it calls no code that made the result."""
    assert not rooms(SOURCES[module]) & MAKERS


def test_only_hub_imports_huggingface_hub_and_only_in_functions() -> None:
    """Nothing is fetched, and nothing slow imported, unless a command needs the Hub."""
    users = [m for m, source in SOURCES.items() if any(n.split(".")[0] == "huggingface_hub" for n in imports(source))]
    assert users == ["hub"]
    assert not any(n.startswith("huggingface_hub") for n in imports(SOURCES["hub"], everywhere=False))


def test_only_the_command_line_prints() -> None:
    """A quiet library: no print, no click and no tqdm below cli; adapters say their counts within a trainer's run."""
    speaking = {"training.transformers", "training.lightning", "training.finished"}
    for module, source in SOURCES.items():
        assert module.startswith("cli") or module in speaking or "print" not in _called(source), module
        assert module.startswith("cli") or not {n.split(".")[0] for n in imports(source)} & {
            "click",
            "tqdm",
            "logging",
        }, module


HEAVY = ("torch", "transformers", "huggingface_hub", "safetensors")


@pytest.mark.parametrize(
    "act",
    [
        "import ckptgrow.cli",
        "from ckptgrow.cli import main; main(['--help'], standalone_mode=False)",
        "from ckptgrow.cli import main; main(['expand', '--help'], standalone_mode=False)",
    ],
)
def test_the_command_line_starts_without_torch(act: str) -> None:
    """Help and start-up wait for nothing that takes a second to import."""
    report = f"import sys; {act}; print(*(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


# ---------------------------------------------------------------- how long, and called what


def test_no_file_and_no_function_is_too_long() -> None:
    """400 lines a file, 50 lines a function."""
    assert too_long(SOURCES, 400, 50) == []


def test_every_name_of_the_package_is_there() -> None:
    """They are looked up when first used, so nothing else would notice one that is nowhere."""
    assert [name for name in ckptgrow.__all__ if not hasattr(ckptgrow, name)] == []


def test_no_module_is_called_after_nothing() -> None:
    """A module is named by what it owns."""
    assert not {"utils", "util", "helpers", "common", "misc", "core"} & SOURCES.keys()
    assert not [name for name in SOURCES if name.endswith(("manager", "handler"))]


def test_every_module_says_what_it_owns() -> None:
    """A docstring at the head of each file, and errors of the kinds that the command line turns into messages."""
    for module, source in SOURCES.items():
        tree = ast.parse(source)
        assert ast.get_docstring(tree), module
        raised = {ast.unparse(n.exc).split("(")[0] for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc}
        assert not {"Exception", "ValueError", "RuntimeError"} & raised, module


# ---------------------------------------------------------------- the checkers can fail


def test_an_import_that_goes_up_is_found() -> None:
    """At the top, in a function, of a name or of the module, in a cycle."""
    good = {"a": "import os", "b": "from ckptgrow.a import x", "c": "from ckptgrow import a, b"}
    assert upward(["a", "b", "c"], good) == []
    for bad in (
        "from ckptgrow.c import x",
        "def f():\n    from ckptgrow import c",
        "import ckptgrow.c",
        "import ckptgrow.b",
    ):
        assert upward(["a", "b", "c"], good | {"b": bad}) == [f"b imports {bad[-1] if bad[-1] in 'bc' else 'c'}"]


def test_an_import_in_a_function_is_told_from_one_outside() -> None:
    """Only the second runs when the module is imported."""
    source = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    from c import d\n"
    assert set(imports(source)) == {"a", "b", "c.d"}
    assert set(imports(source, everywhere=False)) == {"a"}


def test_a_long_file_and_a_long_function_are_found() -> None:
    """To the line."""
    body = "    pass\n"
    sources = {"a": "def f():\n" + body * 3, "b": "def g():\n" + body * 4, "c": "x = 1\n" * 6}
    assert too_long(sources, 5, 4) == ["c", "b.g"]
