"""plan.py: what a Plan may say, what it is refused for, and its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAW, tensor_infos, tinies

from ckptgrow.errors import PlanError
from ckptgrow.plan import Edit, Member, Output, Part, Plan, Share, Term, joined, unchanged
from ckptgrow.tensors import TensorInfo

WIDE = TensorInfo("wide", "F32", (4, 3))
SCALAR = TensorInfo("scalar", "F32", ())
SOURCES = {"base": {"wide": WIDE, "scalar": SCALAR}}


def term(*units: int, **changes: Any) -> Term:
    """So many rows of WIDE, picked one by one."""
    return replace(Term("base", "wide", units), **changes)


def rows(start: int, stop: int, **changes: Any) -> Term:
    return replace(Term("base", "wide", range(start, stop)), **changes)


def of(*parts: Part, shape: tuple[int, ...] = (6, 3), **changes: Any) -> Output:
    """An output of six rows made of rows of WIDE."""
    return replace(Output("out", "F32", shape, 0, parts), **changes)


GOOD = of(Part(4, (rows(0, 4),)), Part(2, (term(3, 0),), grown=True))


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 1), (0, 0)])
def test_a_share_that_does_not_exist_is_refused(index: int, count: int) -> None:
    """The shares of a whole are at least two, numbered from 0."""
    with pytest.raises(PlanError, match=f"share {index} of {count} does not exist"):
        Share(index, count)


def test_siblings_are_all_shares_of_one_whole() -> None:
    """Same rule, seed and parent, every index once."""
    parent = Share(1, 2)
    assert Share(2, 3, "random", 5, parent).siblings == tuple(Share(i, 3, "random", 5, parent) for i in range(3))


def test_a_share_says_what_it_is() -> None:
    """Counted from 1, innermost first."""
    assert str(Share(1, 3, "random", 7, of=Share(1, 2))) == "random 2/3 of even 2/2"


# ---------------------------------------------------------------- checking


def test_a_good_plan_is_accepted() -> None:
    """Ranges, picked units, sums, zeros, values, scalars and other axes all have their place."""
    summed = Part(2, (rows(0, 2, scale=0.5), term(2, 3, share=Share(0, 2))))
    Plan(
        (
            GOOD,
            of(summed, Part(4), name="summed"),
            of(Part(2), Part(4, fill=1.0), name="ones"),
            unchanged(SCALAR),
            Output("across", "F32", (4, 2), 1, (Part(2, (term(2, 0),)),)),
            of(Part(0, (rows(2, 2),)), shape=(0, 3), name="none"),
        )
    ).check(SOURCES)


BAD: dict[str, tuple[Output, str]] = {
    "axis beyond the shape": (replace(GOOD, axis=2), "axis 2 of shape"),
    "negative axis": (replace(GOOD, axis=-1), "axis -1 of shape"),
    "parts too short": (of(Part(4, (rows(0, 4),))), "do not fill the axis of 6"),
    "parts too long": (of(Part(7)), "do not fill the axis of 6"),
    "parts of a scalar": (Output("out", "F32", (), 0, (Part(2),)), "do not fill the axis of 1"),
    "no such source": (of(Part(6, (term(*range(6), source="skill"),))), "'skill' has no tensor wide"),
    "no such tensor": (of(Part(6, (term(*range(6), name="lost"),))), "'base' has no tensor lost"),
    "other size across": (of(Part(6, (rows(0, 6),)), shape=(6, 4)), "wide [4, 3] does not fit [6, 4]"),
    "other rank": (of(Part(6, (rows(0, 6),)), shape=(6, 3, 1)), "wide [4, 3] does not fit [6, 3, 1]"),
    "too few units": (of(Part(6, (term(0, 1),))), "2 units picked for a part of 6"),
    "too many units": (of(Part(6, (rows(0, 4), rows(0, 7)))), "4 units picked for a part of 6"),
    "range beyond the end": (of(Part(6, (rows(0, 6),))), "outside the 4 of wide"),
    "range before the start": (of(Part(6, (rows(-3, 3),))), "outside the 4 of wide"),
    "pick beyond the end": (of(Part(6, (term(0, 1, 4, 0, 0, 0),))), "outside the 4 of wide"),
    "pick before the start": (of(Part(6, (term(0, 1, -1, 0, 0, 0),))), "outside the 4 of wide"),
    "range with a step": (of(Part(2, (rows(0, 2, units=range(0, 4, 2)),)), Part(4)), "must be contiguous"),
    "range backwards": (of(Part(4, (rows(0, 2, units=range(3, -1, -1)),)), Part(2)), "must be contiguous"),
    "terms and a value": (of(Part(4, (rows(0, 4),), fill=1.0), Part(2)), "not both"),
    "part of negative size": (of(Part(-2), Part(4, (rows(0, 4),)), Part(4)), "size"),
}


@pytest.mark.parametrize(("output", "says"), BAD.values(), ids=BAD.keys())
def test_an_output_that_does_not_fit_is_refused_by_its_name(output: Output, says: str) -> None:
    """Each kind of bad plan, with the tensor named."""
    with pytest.raises(PlanError) as caught:
        Plan((unchanged(WIDE), output)).check(SOURCES)
    assert caught.value.tensor == "out"
    assert says in caught.value.problem


def test_two_outputs_of_one_name_are_refused() -> None:
    """A file cannot hold both."""
    with pytest.raises(PlanError, match="same name"):
        Plan((GOOD, GOOD)).check(SOURCES)


@LAW
@given(tinies)
def test_an_unchanged_checkpoint_is_a_good_plan(tiny: Any) -> None:
    """The identity Plan of any checkpoint fits it."""
    Plan(tuple(unchanged(info) for info in tiny.infos.values())).check({"base": tiny.infos})


# ---------------------------------------------------------------- reading an output


def test_grown_ranges_are_joined() -> None:
    """New parts that touch are one range; an empty part does not split them."""
    new = Part(1, grown=True)
    output = of(Part(1), new, new, Part(0, grown=False), new, Part(1), new, shape=(6, 3))
    assert output.grown() == ((1, 4), (5, 6))
    assert of(Part(6)).grown() == ()


@LAW
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3))))
def test_joined_ranges_cover_the_same_places(pieces: list[tuple[bool, int]]) -> None:
    """Nothing is lost or added, no range is empty, and no two touch."""
    spans, start = [], 0
    for kept, size in pieces:
        spans += [(start, start + size)] if kept else []
        start += size
    result = joined(spans)
    assert [i for a, b in result for i in range(a, b)] == [i for a, b in spans for i in range(a, b)]
    assert all(a < b for a, b in result)
    assert all(left[1] < right[0] for left, right in pairwise(result))


def test_parts_are_placed_end_to_end() -> None:
    """Each part with the place where it begins."""
    assert [start for start, _ in GOOD.placed()] == [0, 4]


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        (("gate",), [("gate", 0, 6)]),
        (("gate", "up"), [("gate", 0, 3), ("up", 3, 6)]),
        ((), []),
    ],
)
def test_lanes_are_equal_stretches(lanes: tuple[str, ...], expected: list[tuple[str, int, int]]) -> None:
    """A fused tensor has a lane a projection; an output of no block has none."""
    member = Member("mlp", 0, lanes) if lanes else None
    assert list(replace(GOOD, member=member).lanes()) == expected


@pytest.mark.parametrize(
    ("member", "role"),
    [
        (Member("mlp", 0, ("down",)), "down"),
        (Member("mlp", 0, ("gate", "up")), "gate_up"),
        (Member("mlp", 0, ("gate",), bias=True), "gate_bias"),
    ],
)
def test_roles(member: Member, role: str) -> None:
    """What a tensor is in its MLP, in a word."""
    assert member.role == role


@pytest.mark.parametrize(
    ("shape", "axis", "steps"), [((4, 6, 5), 1, (4, 5)), ((6, 3), 0, (1, 3)), ((3, 6), 1, (3, 1)), ((), 0, (1, 1))]
)
def test_steps_count_what_lies_around_the_axis(shape: tuple[int, ...], axis: int, steps: tuple[int, int]) -> None:
    """How many slices before the axis, how many elements behind each place."""
    assert Output("out", "F32", shape, axis, ()).steps == steps


@LAW
@given(tensor_infos())
def test_an_unchanged_tensor_is_a_copy(infos: list[TensorInfo]) -> None:
    """Of any shape and dtype, and of nothing but itself."""
    for info in infos:
        assert unchanged(info).is_copy_of(info)
        assert not unchanged(info).is_copy_of(replace(info, name=info.name + "x"))


@pytest.mark.parametrize(
    "change",
    [
        lambda o: replace(o, name="other"),
        lambda o: replace(o, dtype="F16"),
        lambda o: replace(o, shape=(3, 4)),
        lambda o: replace(o, parts=(Part(4),)),
        lambda o: replace(o, parts=(Part(2, (rows(0, 2),)), Part(2, (rows(2, 4),)))),
        lambda o: replace(o, parts=(Part(4, (rows(0, 4, scale=2.0),)),)),
        lambda o: replace(o, parts=(Part(4, (rows(0, 4, share=Share(0, 2)),)),)),
        lambda o: replace(o, parts=(Part(4, (rows(0, 4), rows(0, 4))),)),
        lambda o: replace(o, parts=(Part(4, (term(1, 0, 2, 3),)),)),
        lambda o: replace(o, parts=(Part(4, (rows(0, 4, name="other"),)),)),
    ],
)
def test_a_changed_tensor_is_no_copy(change: Callable[[Output], Output]) -> None:
    """Another name, dtype, shape or any other bytes."""
    assert not change(unchanged(WIDE)).is_copy_of(WIDE)


# ---------------------------------------------------------------- text

FULL = Plan(
    (
        Output(
            "mlp.down",
            "F32",
            (3, 6),
            1,
            (
                Part(4, (Term("base", "mlp.down", range(4), share=Share(0, 2)),)),
                Part(1, (Term("base", "mlp.down", (2,), 0.5, Share(1, 3, "random", 7, of=Share(1, 2))),), grown=True),
                Part(1),
            ),
            Member("mlp", 3, ("down",)),
        ),
        unchanged(SCALAR),
    ),
    (Edit("text_config.intermediate_size", 6),),
)


def test_the_json_of_a_plan() -> None:
    """Golden: everything that a Plan says, in JSON values."""
    assert FULL.to_json() == {
        "outputs": [
            {
                "name": "mlp.down",
                "dtype": "F32",
                "shape": [3, 6],
                "axis": 1,
                "parts": [
                    {
                        "size": 4,
                        "grown": False,
                        "terms": [
                            {
                                "source": "base",
                                "name": "mlp.down",
                                "units": [0, 4],
                                "share": {"index": 0, "count": 2, "rule": "even"},
                            }
                        ],
                    },
                    {
                        "size": 1,
                        "grown": True,
                        "terms": [
                            {
                                "source": "base",
                                "name": "mlp.down",
                                "units": {"picked": [2]},
                                "scale": 0.5,
                                "share": {
                                    "index": 1,
                                    "count": 3,
                                    "rule": "random",
                                    "seed": 7,
                                    "of": {"index": 0 + 1, "count": 2, "rule": "even"},
                                },
                            }
                        ],
                    },
                    {"size": 1, "grown": False, "terms": []},
                ],
                "block": "mlp",
                "layer": 3,
                "role": "down",
            },
            {
                "name": "scalar",
                "dtype": "F32",
                "shape": [],
                "axis": 0,
                "parts": [
                    {"size": 1, "grown": False, "terms": [{"source": "base", "name": "scalar", "units": [0, 1]}]}
                ],
            },
        ],
        "config": {"text_config.intermediate_size": 6},
    }
    assert json.loads(json.dumps(FULL.to_json())) == FULL.to_json()


def _output(**changes: Any) -> Plan:
    return replace(FULL, outputs=(replace(FULL.outputs[0], **changes), FULL.outputs[1]))


def _member(**changes: Any) -> Plan:
    member = FULL.outputs[0].member
    assert member
    return _output(member=replace(member, **changes))


def _part(**changes: Any) -> Plan:
    first, second, last = FULL.outputs[0].parts
    return _output(parts=(first, replace(second, **changes), last))


def _term(**changes: Any) -> Plan:
    return _part(terms=(replace(FULL.outputs[0].parts[1].terms[0], **changes),))


def _share(**changes: Any) -> Plan:
    share = FULL.outputs[0].parts[1].terms[0].share
    assert share
    return _term(share=replace(share, **changes))


@pytest.mark.parametrize(
    "other",
    [
        replace(FULL, outputs=FULL.outputs[:1]),
        replace(FULL, config=()),
        replace(FULL, config=(Edit("text_config.intermediate_size", 7),)),
        _output(name="mlp.up"),
        _output(dtype="F16"),
        _output(shape=(2, 6)),
        _output(axis=0),
        _output(parts=FULL.outputs[0].parts[:2]),
        _output(member=None),
        _member(block="other"),
        _member(layer=4),
        _member(lanes=("up",)),
        _member(bias=True),
        _part(size=2),
        _part(grown=False),
        _part(terms=()),
        _part(terms=(), fill=1.0),
        _part(terms=(), fill=0.5),
        _term(source="skill"),
        _term(name="mlp.up"),
        _term(units=range(2, 3)),
        _term(units=(3,)),
        _term(scale=0.25),
        _term(share=None),
        _share(index=0),
        _share(count=4),
        _share(rule="even"),
        _share(seed=8),
        _share(of=None),
        _share(of=Share(0, 2)),
    ],
)
def test_no_change_of_a_plan_is_lost_in_its_json(other: Plan) -> None:
    """Plans that mean something else have another text."""
    assert other != FULL
    assert json.dumps(other.to_json()) != json.dumps(FULL.to_json())
