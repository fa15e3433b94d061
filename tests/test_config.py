"""config.py: one value of config.json changes and every other byte stays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAW

from ckptgrow.config import set_value
from ckptgrow.errors import CkptgrowError, FormatError

MARK = "here it stands"


@dataclass(frozen=True)
class Format:
    """One of the ways in which people write JSON."""

    indent: int | str | None
    ensure_ascii: bool
    separators: tuple[str, str] | None
    newline: str
    around: tuple[str, str]

    def dumps(self, value: Any) -> str:
        text = json.dumps(value, indent=self.indent, ensure_ascii=self.ensure_ascii, separators=self.separators)
        return self.around[0] + text.replace("\n", self.newline) + self.around[1]


formats = st.builds(
    Format,
    indent=st.sampled_from([None, 0, 2, 4, "\t"]),
    ensure_ascii=st.booleans(),
    separators=st.sampled_from([None, (",", ":"), (" , ", " : ")]),
    newline=st.sampled_from(["\n", "\r\n"]),
    around=st.sampled_from([("", ""), ("", "\n"), (" \n", "\r\n\t ")]),
)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(
    ['"', "\\", "}", "{", "a,b", MARK]
)
keys = words.filter(lambda key: "." not in key)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=8)
objects = st.dictionaries(keys, values | st.dictionaries(keys, values, max_size=3), max_size=5)


@st.composite
def places(draw: st.DrawFn, tree: dict[str, Any]) -> list[str]:
    """The keys on the way to some place in this object: one that is there, or a new one in an object that is."""
    path: list[str] = []
    node: Any = tree
    while True:
        inner: list[str] = [key for key, value in node.items() if isinstance(value, dict)]
        deeper, known = draw(st.tuples(st.booleans(), st.booleans()))
        if inner and deeper:
            path.append(draw(st.sampled_from(inner)))
            node = node[path[-1]]
        elif node and known:
            return [*path, draw(st.sampled_from(sorted(node)))]
        else:
            return [*path, draw(keys)]


def put(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """The tree with a value set, in the order that Python keeps: a new key comes last."""
    key, *rest = path
    return {**tree, key: put(tree[key], rest, value) if rest else value}


def there(tree: Any, path: list[str]) -> bool:
    key, *rest = path
    return key in tree and (there(tree[key], rest) if rest else True)


def ordered(value: Any) -> Any:
    """A value in which the order of keys counts."""
    if isinstance(value, dict):
        return [(key, ordered(inner)) for key, inner in value.items()]
    return [ordered(inner) for inner in value] if isinstance(value, list) else (type(value), value)


# ---------------------------------------------------------------- laws


@settings(LAW, max_examples=300)
@given(st.data(), objects, formats, values)
def test_the_value_is_set_and_nothing_else(data: st.DataObject, tree: dict[str, Any], form: Format, value: Any) -> None:
    """What is loaded is the object with the value set, every key in its place."""
    path = data.draw(places(tree))
    result = set_value(form.dumps(tree), ".".join(path), value)
    assert ordered(json.loads(result)) == ordered(put(tree, path, value))


@settings(LAW, max_examples=300)
@given(st.data(), objects, formats, values)
def test_every_other_byte_stays(data: st.DataObject, tree: dict[str, Any], form: Format, value: Any) -> None:
    """The text before and after a value that is replaced is what it was; a new one only adds text in one place."""
    path = data.draw(places(tree))
    text = form.dumps(tree)
    result = set_value(text, ".".join(path), value)
    if there(tree, path):
        mark = "7" * 30
        before, after = form.dumps(put(tree, path, int(mark))).split(mark)
        assert text.startswith(before)
        assert text.endswith(after)
        assert result.startswith(before)
        assert result.endswith(after)
        assert json.loads(result[len(before) : len(result) - len(after)]) == value
    else:
        same = next((i for i, (a, b) in enumerate(zip(text, result, strict=False)) if a != b), len(text))
        assert result.endswith(text[same:])


@LAW
@given(st.data(), objects, formats, leaves)
def test_setting_what_is_set_changes_nothing(
    data: st.DataObject, tree: dict[str, Any], form: Format, value: Any
) -> None:
    """The same edit twice is the same text."""
    path = ".".join(data.draw(places(tree)))
    once = set_value(form.dumps(tree), path, value)
    assert set_value(once, path, value) == once


# ---------------------------------------------------------------- goldens

GEMMA = """{
  "architectures": [
    "Gemma3ForCausalLM"
  ],
  "eps": 1e-06, "big": 1E5,
  "text_config": {
    "intermediate_size": 2048,
    "note": "na\\u00efve \\"intermediate_size\\": 1"
  },
  "intermediate_size":   2048   ,
  "last": true
}
"""


def test_a_value_is_replaced_where_it_stands() -> None:
    """Golden: numbers as they were written, escapes, odd spaces: all as before."""
    assert set_value(GEMMA, "intermediate_size", 4096) == GEMMA.replace(":   2048   ,", ":   4096   ,")
    assert set_value(GEMMA, "text_config.intermediate_size", 4096) == GEMMA.replace(": 2048,", ": 4096,")


def test_a_missing_key_is_added_last() -> None:
    """Golden: on its own line, indented like the last one."""
    assert set_value(GEMMA, "new", 1) == GEMMA.replace('"last": true', '"last": true,\n  "new": 1')
    assert set_value(GEMMA, "text_config.new", None) == GEMMA.replace('\\": 1"\n', '\\": 1",\n    "new": null\n')


def test_an_object_is_added_with_its_lines_under_its_key() -> None:
    """Golden: what the manifest's digest looks like in config.json."""
    assert set_value('{\n  "a": 1\n}\n', "ckptgrow", {"manifest": "x", "by": {}}) == (
        '{\n  "a": 1,\n  "ckptgrow": {\n    "manifest": "x",\n    "by": {}\n  }\n}\n'
    )


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("{}", "a", '{"a": 5}'),
        ('{"b":{}}', "b.a", '{"b":{"a": 5}}'),
        ('{"b":1}', "a", '{"b":1, "a": 5}'),
        ('{"a":[1,{"a":2}]}', "a", '{"a":5}'),
        ('{"b":"\\"a\\":1","a":"}"}', "a", '{"b":"\\"a\\":1","a":5}'),
        ('{"\\u0061":1}', "a", '{"\\u0061":5}'),
        ('{"a":1,"a":2}', "a", '{"a":1,"a":5}'),
        ('\n\t{ "a" : 1 }\n', "a", '\n\t{ "a" : 5 }\n'),
    ],
)
def test_small_objects(text: str, path: str, expected: str) -> None:
    """Golden: empty ones, one-line ones, keys that are escaped, doubled or only look like keys."""
    assert set_value(text, path, 5) == expected


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("path", ["no.key", "text_config.no.key", "no.no.no"])
def test_a_missing_outer_key_is_refused(path: str) -> None:
    """An object is never invented: the config is not the one that the family says."""
    with pytest.raises(FormatError, match=r"config\.json: it has no no"):
        set_value(GEMMA, path, 1)


@pytest.mark.parametrize("path", ["last.key", "architectures.0", "eps.x"])
def test_an_outer_key_that_holds_no_object_is_refused(path: str) -> None:
    """A number or a list has no keys."""
    with pytest.raises(FormatError, match="a JSON object was expected"):
        set_value(GEMMA, path, 1)


@pytest.mark.parametrize("text", ["", "[]", "3", '"{}"', "\ufeff{}"])
def test_what_is_no_object_is_refused(text: str) -> None:
    """A config is an object."""
    with pytest.raises(FormatError):
        set_value(text, "a", 1)


@pytest.mark.parametrize("text", ["{", '{"a"', '{"a":', '{"a": 1', '{"a": }', "{a: 1}", '{"a" 1}', '{"a": 1 "b": 2}'])
def test_what_is_no_json_is_refused(text: str) -> None:
    """With the one error that the command line knows, not with an index out of range."""
    with pytest.raises(CkptgrowError):
        set_value(text, "a", 1)
