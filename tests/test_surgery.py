"""surgery.py: the Plans that growing makes, and the growths that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAW, config_of, growths, infos_of, same_function, tinies, tiny

from ckptgrow.errors import RequestError
from ckptgrow.families import locate
from ckptgrow.plan import Output, Plan
from ckptgrow.proof import prove
from ckptgrow.surgery import Growth, expand, rounds
from ckptgrow.tensors import TensorInfo

DOWN = "model.layers.0.mlp.down_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def grow(model_type: str = "llama", **growth: Any) -> Plan:
    base = tiny(model_type)
    return expand(base.infos, base.architecture, Growth(**growth))


def output(plan: Plan, name: str) -> Output:
    return next(output for output in plan.outputs if output.name == name)


def told(output: Output) -> list[str]:
    """Each part in a word: which units, which share, and + where it is new."""
    return [
        f"{'+' if part.grown else ''}{term.units.start}:{term.units.stop}" + (f" {term.share}" if term.share else "")
        for part in output.parts
        for term in part.terms
        if isinstance(term.units, range)
    ]


# ---------------------------------------------------------------- goldens


def test_the_plan_of_a_doubling() -> None:
    """Golden: one layer of hidden size 3 and width 2, whole."""
    infos = {
        name: TensorInfo(name, "BF16", shape)
        for name, shape in [
            ("norm.weight", (3,)),
            ("layers.0.mlp.gate_proj.weight", (2, 3)),
            ("layers.0.mlp.up_proj.weight", (2, 3)),
            ("layers.0.mlp.down_proj.weight", (3, 2)),
        ]
    }
    plan = expand(infos, locate({"model_type": "llama"}, infos), Growth())

    def part(name: str, grown: bool, **share: Any) -> dict[str, Any]:
        return {"size": 2, "grown": grown, "terms": [{"source": "base", "name": name, "units": [0, 2]} | share]}

    def rows(role: str) -> dict[str, Any]:
        name = f"layers.0.mlp.{role}_proj.weight"
        place = {"block": "layers.0.mlp", "layer": 0, "role": role}
        return {
            "name": name,
            "dtype": "BF16",
            "shape": [4, 3],
            "axis": 0,
            "parts": [part(name, False), part(name, True)],
        } | place

    down = "layers.0.mlp.down_proj.weight"
    assert plan.to_json() == {
        "outputs": [
            {
                "name": "norm.weight",
                "dtype": "BF16",
                "shape": [3],
                "axis": 0,
                "parts": [
                    {"size": 3, "grown": False, "terms": [{"source": "base", "name": "norm.weight", "units": [0, 3]}]}
                ],
            },
            rows("gate"),
            rows("up"),
            {
                "name": down,
                "dtype": "BF16",
                "shape": [3, 4],
                "axis": 1,
                "parts": [
                    part(down, False, share={"index": 0, "count": 2, "rule": "even"}),
                    part(down, True, share={"index": 1, "count": 2, "rule": "even"}),
                ],
                "block": "layers.0.mlp",
                "layer": 0,
                "role": "down",
            },
        ],
        "config": {"intermediate_size": 4},
    }


@pytest.mark.parametrize(
    ("growth", "rows", "columns"),
    [
        (
            {"factor": 3},
            ["0:4", "+0:4", "+0:4"],
            ["0:4 even 1/2", "+0:4 random 1/2 of even 2/2", "+0:4 random 2/2 of even 2/2"],
        ),
        (
            {"factor": 3, "shares": "even", "policy": "g-train"},
            ["0:4", "+0:4", "+0:4"],
            ["0:4 even 1/3", "+0:4 even 2/3", "+0:4 even 3/3"],
        ),
        ({"width": 6}, ["0:4", "+0:2"], ["0:2 even 1/2", "2:4", "+0:2 even 2/2"]),
        ({"width": 5, "multiple_of": 7}, ["0:4", "+0:3"], ["0:3 even 1/2", "3:4", "+0:3 even 2/2"]),
        (
            {"width": 9},
            ["0:4", "+0:4", "+0:1"],
            [
                "0:1 even 1/2",
                "1:4 even 1/2",
                "+0:1 random 1/2 of even 2/2",
                "+1:4 even 2/2",
                "+0:1 random 2/2 of even 2/2",
            ],
        ),
        (
            {"width": 9, "shares": "random"},
            ["0:4", "+0:4", "+0:1"],
            ["0:1 random 1/3", "1:4 random 1/2", "+0:1 random 2/3", "+1:4 random 2/2", "+0:1 random 3/3"],
        ),
    ],
    ids=["k = 3", "k = 3, even", "below twice", "multiple of 7", "above twice", "above twice, random"],
)
def test_the_parts_of_a_growth(growth: dict[str, Any], rows: list[str], columns: list[str]) -> None:
    """Golden: which units are copied in which round, and how each column is shared out."""
    plan = grow(**growth)
    assert told(output(plan, GATE)) == rows
    assert told(output(plan, DOWN)) == columns
    prove(plan, tiny().infos, tiny().architecture)


def test_a_fused_projection_grows_half_by_half() -> None:
    """Each half of gate_up is followed by its own new units."""
    fused = output(grow("phi3", factor=2), "model.layers.0.mlp.gate_up_proj.weight")
    assert told(fused) == ["0:4", "+0:4", "4:8", "+4:8"]


def test_the_nested_width_is_edited() -> None:
    """The width goes where the family keeps it."""
    (edit,) = grow("gemma3", factor=2).config
    assert (edit.path, edit.value) == ("text_config.intermediate_size", 8)


def test_the_seed_is_in_every_random_share() -> None:
    """And in no even one, so that equal files have equal Plans."""
    assert {p.terms[0].share.seed for p in output(grow(shares="random", seed=7), DOWN).parts if p.terms[0].share} == {7}
    assert grow(seed=7) == grow(seed=8)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (4, 8, [range(4)]),
        (4, 6, [range(2)]),
        (4, 9, [range(4), range(1)]),
        (4, 12, [range(4), range(4)]),
        (4, 4, []),
    ],
)
def test_rounds(old: int, new: int, expected: list[range]) -> None:
    """All units in each round, and in the last as many as are still needed."""
    assert list(rounds(old, new)) == expected


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("growth", "new"),
    [({}, 8), ({"factor": 5}, 20), ({"width": 5}, 5), ({"factor": 2, "multiple_of": 3}, 9), ({"multiple_of": 8}, 8)],
)
def test_the_new_width(growth: dict[str, Any], new: int) -> None:
    """Twice where nothing is said, rounded up to the multiple asked for."""
    assert Growth(**growth).new_width(4) == new


@pytest.mark.parametrize(
    ("growth", "says"),
    [
        ({"factor": 2, "width": 9}, "--factor and --width exclude each other"),
        ({"factor": 1}, "--factor 1"),
        ({"factor": 0}, "--factor 0"),
        ({"factor": -2}, "--factor -2"),
        ({"multiple_of": 0}, "--multiple-of 0"),
        ({"multiple_of": -1}, "--multiple-of -1"),
        ({"policy": "h-freeze"}, "unknown policy 'h-freeze'"),
        ({"shares": "odd"}, "unknown shares 'odd'"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed 9223372036854775808"),
    ],
)
def test_options_that_cannot_be_are_refused(growth: dict[str, Any], says: str) -> None:
    """Before any checkpoint is looked at."""
    with pytest.raises(RequestError) as caught:
        Growth(**growth)
    assert says in str(caught.value)


@pytest.mark.parametrize("growth", [{"width": 4}, {"width": 3}, {"width": 0}, {"width": -1}])
def test_a_width_that_is_not_above_the_old_one_is_refused(growth: dict[str, Any]) -> None:
    """The message says what the width is now."""
    with pytest.raises(RequestError, match="not above the present width 4"):
        grow(**growth)


def test_a_width_below_the_old_one_is_refused_even_if_rounding_lifts_it() -> None:
    """--width 3 --multiple-of 64 on a width of 4 is a mistake, not a wish for 64."""
    with pytest.raises(RequestError, match="not above the present width 4"):
        grow(width=3, multiple_of=64)


# ---------------------------------------------------------------- laws


@settings(LAW, max_examples=150)
@given(st.data())
def test_every_growth_is_proved(data: st.DataObject) -> None:
    """For all families, widths, policies and shares: accepted by the proof, all units, and right when it is run."""
    base = data.draw(tinies)
    growth = data.draw(growths(base.architecture.width))
    plan = expand(base.infos, base.architecture, growth)
    units = sum(mlp.width * mlp.experts for mlp in base.architecture.mlps)
    assert prove(plan, base.infos, base.architecture) == units
    assert same_function(plan, base)


@settings(LAW, max_examples=100)
@given(st.data())
def test_every_growth_has_the_right_shapes(data: st.DataObject) -> None:
    """The width grows everywhere it is and nothing else changes; exactly the new units are marked as grown."""
    base = data.draw(tinies)
    growth = data.draw(growths(base.architecture.width))
    plan = expand(base.infos, base.architecture, growth)
    old, new = base.architecture.width, growth.new_width(base.architecture.width)
    assert [o.name for o in plan.outputs] == list(base.infos)
    beside = {group.site.under(key) for group in base.architecture.groups for key, _ in group.site.also}
    rules = {group.path: 2 if group.site.rule == "twice" else 1 for group in base.architecture.groups}
    assert {e.path: e.value for e in plan.config if e.path not in beside} == {p: new * k for p, k in rules.items()}
    slots = {name: slot for mlp in base.architecture.mlps for name, slot in mlp.tensors.items()}
    for grown in plan.outputs:
        before, slot = base.infos[grown.name], slots.get(grown.name)
        assert grown.dtype == before.dtype
        if slot is None:
            assert grown.is_copy_of(before)
            continue
        assert grown.shape[slot.axis] * old == before.shape[slot.axis] * new
        assert grown.shape[: slot.axis] + grown.shape[slot.axis + 1 :] == (
            before.shape[: slot.axis] + before.shape[slot.axis + 1 :]
        )
        span = slot.span
        behind = [(span * (lane * new + old), span * (lane + 1) * new) for lane in range(len(slot.lanes))]
        assert grown.grown() == tuple(behind)


def test_the_law_can_fail() -> None:
    """The plain reading of a Plan notices a forgotten share: it is no rubber stamp."""
    base = tiny()
    plan = grow()
    cheated = tuple(
        Output(o.name, o.dtype, o.shape, o.axis, (*o.parts[:1], *o.parts[:1]), o.member) if o.name == DOWN else o
        for o in plan.outputs
    )
    assert same_function(plan, base)
    assert not same_function(Plan(cheated), base)


def test_biases_and_untied_heads_are_carried_along() -> None:
    """Whatever is in the checkpoint is in the Plan, once."""
    infos = infos_of("phi", bias=True, tied=False)
    plan = expand(infos, locate(config_of("phi"), infos), Growth())
    assert [o.name for o in plan.outputs] == list(infos)
    assert told(output(plan, "model.layers.1.mlp.fc1.bias")) == ["0:4", "+0:4"]
    assert output(plan, "model.layers.1.mlp.fc2.bias").is_copy_of(infos["model.layers.1.mlp.fc2.bias"])
