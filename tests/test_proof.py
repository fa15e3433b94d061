"""proof.py: accepts what keeps the function and refuses every way of losing it, with the tensor's name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAW, Tiny, growths, same_function, tinies, tiny

from ckptgrow.errors import PlanError
from ckptgrow.plan import Edit, Output, Part, Plan, Share, Term, unchanged
from ckptgrow.proof import Run, adds_to_one, picks, prove, prove_marks
from ckptgrow.surgery import Growth, expand

MLP = "model.layers.0.mlp."
GATE, UP, DOWN = (f"{MLP}{name}_proj.weight" for name in ("gate", "up", "down"))
FUSED = MLP + "gate_up_proj.weight"
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[Output], Output]


def grown(model_type: str = "llama", **growth: Any) -> Plan:
    base = tiny(model_type)
    return expand(base.infos, base.architecture, Growth(**growth))


def changed(plan: Plan, name: str, change: Change) -> Plan:
    """The Plan with one output changed."""
    assert any(output.name == name for output in plan.outputs)
    return replace(plan, outputs=tuple(change(o) if o.name == name else o for o in plan.outputs))


def proved(plan: Plan, base: Tiny) -> int:
    return prove(plan, base.infos, base.architecture)


def refused(plan: Plan, model_type: str = "llama") -> PlanError:
    assert not same_function(plan, tiny(model_type))
    with pytest.raises(PlanError) as caught:
        proved(plan, tiny(model_type))
    return caught.value


def parts(change: Callable[[list[Part]], Any]) -> Change:
    """Change the list of parts of an output."""

    def applied(output: Output) -> Output:
        those = list(output.parts)
        change(those)
        return replace(output, parts=tuple(those))

    return applied


def terms(which: int, **changes: Any) -> Change:
    """Change the one term of a part."""

    def change(those: list[Part]) -> None:
        those[which] = replace(those[which], terms=(replace(those[which].terms[0], **changes),))

    return parts(change)


def widths(output: Output, width: int) -> Output:
    return replace(output, shape=tuple(width if i == output.axis else n for i, n in enumerate(output.shape)))


# ---------------------------------------------------------------- good plans


@pytest.mark.parametrize("growth", [{}, {"factor": 5}, {"width": 6}, {"width": 11}, {"shares": "random", "seed": 3}])
@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3", "gpt_neo", "gemma3"])
def test_a_growth_is_proved(model_type: str, growth: dict[str, Any]) -> None:
    """All units of all layers."""
    assert proved(grown(model_type, **growth), tiny(model_type)) == 8


def test_no_growth_at_all_is_proved() -> None:
    """The identity Plan keeps the function."""
    assert proved(Plan(tuple(map(unchanged, tiny().infos.values()))), tiny()) == 8


def test_the_whole_weight_to_one_copy_and_zeros_to_the_other_is_proved() -> None:
    """Shares are not the only way: filling up with zero columns is exact too (METHOD.md 7)."""
    plan = changed(grown(), DOWN, parts(lambda p: p.__setitem__(1, Part(4, (), True))))
    plan = changed(plan, DOWN, terms(0, share=None))
    assert same_function(plan, tiny())
    assert proved(plan, tiny()) == 8


def test_picks_are_runs_of_base_units() -> None:
    """Neighbours that go on where the last ended are one run; picked ones are runs of one."""
    infos = tiny().infos
    gate = {o.name: o for o in grown(width=11).outputs}[GATE]
    assert picks(gate, infos) == (Run(0, 4, 0), Run(4, 8, 0), Run(8, 11, 0))
    picked = Term("base", GATE, (3, 2, 0, 1))
    shuffled = widths(replace(gate, parts=(Part(4, (Term("base", GATE, range(4)),)), Part(4, (picked,), True))), 8)
    assert picks(shuffled, infos) == (Run(0, 4, 0), Run(4, 5, 3), Run(5, 6, 2), Run(6, 8, 0))


# ---------------------------------------------------------------- one fault each

FAULTS: dict[str, tuple[dict[str, Any], str, Change, str]] = {
    "a forgotten share": ({}, DOWN, terms(0, share=None), "do not add up"),
    "the same share twice": ({}, DOWN, terms(1, share=Share(0, 2)), "do not add up"),
    "a share of another whole": ({}, DOWN, terms(1, share=Share(1, 3)), "do not add up"),
    "a share by another rule": ({}, DOWN, terms(1, share=Share(1, 2, "random")), "do not add up"),
    "a share of a share": ({}, DOWN, terms(1, share=Share(1, 2, of=Share(1, 2))), "do not add up"),
    "a share with another seed": (
        {"shares": "random", "seed": 5},
        DOWN,
        terms(1, share=Share(1, 2, "random", 6)),
        "do not add up",
    ),
    "half of everything": ({}, DOWN, terms(0, scale=0.5, share=None), "do not add up"),
    "a scale on a share": ({}, DOWN, terms(1, scale=0.5), "do not add up"),
    "a scale of minus one": ({}, DOWN, terms(0, scale=-1.0), "do not add up"),
    "ones for a part": ({}, DOWN, parts(lambda p: p.__setitem__(1, Part(4, (), True, 1.0))), "are no shares"),
    "zeros for a part": ({}, DOWN, parts(lambda p: p.__setitem__(1, Part(4, (), True))), "do not add up"),
    "a share too many": (
        {},
        DOWN,
        parts(lambda p: p.__setitem__(1, replace(p[1], terms=p[1].terms * 2))),
        "a sum of shares may be rounded",
    ),
    "columns of other units": (
        {},
        DOWN,
        terms(1, units=(1, 0, 2, 3)),
        "has the rows of unit 0 and a share of column 1",
    ),
    "columns one too far": ({"width": 6}, DOWN, terms(2, units=range(1, 3)), "rows of unit 0 and a share of column 1"),
    "columns in another order": (
        {"width": 6},
        DOWN,
        parts(lambda p: p.insert(0, p.pop(1))),
        "rows of unit 0 and a share of column 2",
    ),
    "columns of another layer": ({}, DOWN, terms(1, name=DOWN.replace("0", "1")), ""),
    "columns of another layer everywhere": (
        {},
        DOWN,
        lambda o: terms(0, name=DOWN.replace("0", "1"))(terms(1, name=DOWN.replace("0", "1"))(o)),
        "",
    ),
    "a column short": ({}, DOWN, parts(lambda p: p.pop()), "do not fill"),
    "down grown less than gate and up": (
        {"factor": 2},
        DOWN,
        lambda o: replace(widths(o, 4), parts=(Part(4, (Term("base", DOWN, range(4)),)),)),
        "",
    ),
    "down grown more than gate and up": (
        {"factor": 2},
        DOWN,
        lambda o: replace(widths(o, 12), parts=(*o.parts, Part(4, (Term("base", DOWN, range(4)),), True))),
        "",
    ),
    "rows of zeros": ({}, GATE, parts(lambda p: p.__setitem__(1, Part(4, (), True))), "must be a copy"),
    "rows scaled": ({}, UP, terms(1, scale=0.5), "must be a copy"),
    "rows shared out": ({}, UP, terms(1, share=Share(0, 2)), "must be a copy"),
    "rows of another tensor": ({}, UP, terms(1, name=GATE), "must be a copy"),
    "rows of another layer": ({}, GATE, terms(0, name=GATE.replace("0", "1")), "must be a copy"),
    "rows twice": ({}, GATE, parts(lambda p: p.__setitem__(1, replace(p[1], terms=p[1].terms * 2))), "must be a copy"),
    "an MLP that is no longer one": ({}, GATE, lambda o: unchanged(tiny().infos[GATE]), ""),
    "down left as it was": ({}, DOWN, lambda o: unchanged(tiny().infos[DOWN]), ""),
    "an attention weight scaled": ({}, ATTENTION, terms(0, scale=2.0), "no MLP, and yet it would change"),
    "an attention weight permuted": ({}, ATTENTION, terms(0, units=(1, 0, 2)), "no MLP, and yet it would change"),
    "a norm of zeros": ({}, "model.norm.weight", parts(lambda p: p.__setitem__(0, Part(3))), "it would change"),
}


@pytest.mark.parametrize(("growth", "name", "change", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_refused_by_the_name_of_its_tensor(
    growth: dict[str, Any], name: str, change: Change, says: str
) -> None:
    """One thing wrong in an otherwise good Plan: it does lose the function, and the proof says where."""
    error = refused(changed(grown(**growth), name, change))
    assert error.tensor == name
    assert says in error.problem


@pytest.mark.parametrize("name", [GATE, UP])
def test_gate_and_up_that_copy_different_units_are_refused(name: str) -> None:
    """One of them is shifted by a unit: whichever it is, both names are in the message."""
    for units in (range(1, 3), (1, 0)):
        error = refused(changed(grown(width=6), name, terms(1, units=units)))
        assert GATE in str(error)
        assert UP in str(error)


@pytest.mark.parametrize("name", [GATE, UP, DOWN])
def test_units_shifted_in_the_old_part_are_refused(name: str) -> None:
    """The first units count as much as the new ones."""
    assert name in str(refused(changed(grown(), name, terms(0, units=(1, 2, 3, 0)))))


def test_a_bias_that_copies_other_units_is_refused() -> None:
    """Biases belong to the same units as their rows."""
    bias = MLP + "fc1.bias"
    assert bias in str(refused(changed(grown("phi"), bias, terms(1, units=(1, 0, 3, 2))), "phi"))


@pytest.mark.parametrize("which", range(4))
def test_lanes_that_disagree_are_refused(which: int) -> None:
    """The halves of a fused gate_up must copy the same units."""
    plan = grown("phi3")
    fused = next(o for o in plan.outputs if o.name == FUSED)
    units = fused.parts[which].terms[0].units
    error = refused(changed(plan, FUSED, terms(which, units=(*units[1:], units[0]))), "phi3")
    assert (error.tensor, error.problem) == (FUSED, "its lanes copy different units")


def test_lanes_that_change_places_are_refused() -> None:
    """Gate rows in up's half and up rows in gate's."""
    assert refused(changed(grown("phi3"), FUSED, parts(list.reverse)), "phi3").tensor == FUSED


@pytest.mark.parametrize("name", [ATTENTION, GATE, DOWN, "model.norm.weight"])
def test_a_lost_tensor_is_refused(name: str) -> None:
    """Exactly the tensors of the base."""
    plan = grown()
    error = refused(replace(plan, outputs=tuple(o for o in plan.outputs if o.name != name)))
    assert (error.tensor, error.problem) == (name, "the Plan loses it")


@pytest.mark.parametrize("member", [True, False], ids=["in an MLP", "in none"])
def test_a_tensor_too_many_is_refused(member: bool) -> None:
    """No tensor appears that the base does not have, be it called part of an MLP or not."""
    plan = grown()
    gate = next(o for o in plan.outputs if o.name == GATE)
    extra = replace(gate, name="model.layers.0.mlp.more.weight", member=gate.member if member else None)
    error = refused(replace(plan, outputs=(*plan.outputs, extra)))
    assert error.tensor == extra.name


@pytest.mark.parametrize("name", [GATE, UP, DOWN])
def test_a_grown_tensor_must_be_part_of_its_mlp(name: str) -> None:
    """A Plan that does not say what a grown tensor is in its MLP cannot be proved."""
    with pytest.raises(PlanError) as caught:
        proved(changed(grown(), name, lambda o: replace(o, member=None)), tiny())
    assert caught.value.tensor == name


def test_a_block_with_two_downs_is_refused() -> None:
    """Two layers that were taken for one block."""
    plan = grown()
    first, second = (DOWN, DOWN.replace("0", "1"))
    member = next(o for o in plan.outputs if o.name == first).member
    with pytest.raises(PlanError):
        proved(changed(plan, second, lambda o: replace(o, member=member)), tiny())


@pytest.mark.parametrize("name", [GATE, DOWN, ATTENTION])
@pytest.mark.parametrize("dtype", ["F16", "I16", "F8_E4M3"])
def test_a_narrower_dtype_is_refused(name: str, dtype: str) -> None:
    """A Plan whose result is rounded or reinterpreted when it is written does not keep the function."""
    with pytest.raises(PlanError) as caught:
        proved(changed(grown(), name, lambda o: replace(o, dtype=dtype)), tiny())
    assert caught.value.tensor == name


def test_a_config_with_another_width_is_refused() -> None:
    """A result whose config contradicts its shapes does not load, or loads as something else."""
    plan = replace(grown(), config=(Edit("intermediate_size", 9),))
    with pytest.raises(PlanError):
        proved(plan, tiny())


# ---------------------------------------------------------------- picked units, by hand


def dealt(units: list[int], width: int) -> Plan:
    """A Plan for the first layer of `tiny()` in which new unit i is base unit units[i], picked one by one."""
    copies, seen, base = Counter(units), Counter[int](), tiny()
    share: list[Share | None] = []
    for unit in units:
        share.append(Share(seen[unit], copies[unit]) if copies[unit] > 1 else None)
        seen[unit] += 1
    groups: dict[Share | None, list[int]] = defaultdict(list)
    for i, one in enumerate(share):
        groups[one].append(i)
    down = [Part(1, (Term("base", DOWN, (unit,), share=one),)) for unit, one in zip(units, share, strict=True)]
    rows = {name: (Part(len(units), (Term("base", name, tuple(units)),)),) for name in (GATE, UP)}
    plan = expand(base.infos, base.architecture, Growth(width=width))
    return replace(
        plan,
        outputs=tuple(
            replace(widths(o, len(units)), parts=rows.get(o.name, tuple(down))) if o.name in (GATE, UP, DOWN) else o
            for o in plan.outputs
        ),
    )


@st.composite
def permuted(draw: st.DrawFn) -> list[int]:
    """Every unit of four at least once, some more often, in any order; never all of them once."""
    more = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    return draw(st.permutations([0, 1, 2, 3, *more]))


@LAW
@given(permuted())
def test_permuted_copies_are_proved(units: list[int]) -> None:
    """Units as tuples of indices, not ranges: any copies in any order, if the shares are right."""
    plan = dealt(units, len(units))
    assert same_function(plan, tiny())
    assert proved(plan, tiny()) == 8


@LAW
@given(permuted(), st.data())
def test_permuted_copies_with_two_columns_swapped_are_refused(units: list[int], data: st.DataObject) -> None:
    """Two columns of different units have changed places."""
    one = data.draw(st.integers(0, len(units) - 1))
    other = data.draw(st.sampled_from([i for i, unit in enumerate(units) if unit != units[one]]))

    def swap(those: list[Part]) -> None:
        those[one], those[other] = those[other], those[one]

    error = refused(changed(dealt(units, len(units)), DOWN, parts(swap)))
    assert error.tensor == DOWN
    assert "and a share of column" in error.problem


@LAW
@given(permuted(), st.data())
def test_permuted_copies_with_a_unit_lost_are_refused(units: list[int], data: st.DataObject) -> None:
    """Shares that miss each other because one copy is of another unit."""
    place = data.draw(st.integers(0, len(units) - 1))
    wrong = list(units)
    wrong[place] = (wrong[place] + 1) % 4
    right = {o.name: o for o in dealt(units, len(units)).outputs}
    plan = dealt(wrong, len(units))
    plan = changed(plan, DOWN, lambda o: right[DOWN])
    assert refused(plan).tensor == DOWN


# ---------------------------------------------------------------- soundness


def mutated(plan: Plan, base: Tiny, data: st.DataObject) -> Plan:
    """The Plan with one thing changed at random in one tensor of its first MLP."""
    names = sorted(base.architecture.mlps[0].tensors)
    name = data.draw(st.sampled_from(names))
    output = next(o for o in plan.outputs if o.name == name)
    which = data.draw(st.integers(0, len(output.parts) - 1))
    those = list(output.parts)
    act = data.draw(
        st.sampled_from(["units", "name", "share", "scale", "zero", "drop", "repeat", "add", "lose", "swap"])
    )
    term = those[which].terms[0]
    if act == "units":
        top = base.infos[output.name].shape[output.axis] - 1
        picked = data.draw(st.lists(st.integers(0, top), min_size=len(term.units), max_size=len(term.units)))
        those[which] = replace(those[which], terms=(replace(term, units=tuple(picked)),))
    elif act == "name":
        alike = [n for n, i in base.infos.items() if i.shape == base.infos[output.name].shape]
        renamed = replace(term, name=data.draw(st.sampled_from(alike)))
        those[which] = replace(those[which], terms=(renamed,))
    elif act == "share":
        count = data.draw(st.integers(2, 4))
        share = data.draw(st.none() | st.builds(Share, st.integers(0, count - 1), st.just(count)))
        those[which] = replace(those[which], terms=(replace(term, share=share),))
    elif act == "scale":
        those[which] = replace(those[which], terms=(replace(term, scale=data.draw(st.sampled_from([0.5, 2.0, -1.0]))),))
    elif act == "zero":
        those[which] = replace(those[which], terms=())
    elif act == "add":
        those[which] = replace(those[which], terms=(term, *data.draw(st.sampled_from(those)).terms))
    elif act == "drop":
        del those[which]
    elif act == "repeat":
        those.insert(which, those[which])
    elif act == "lose":
        return changed(plan, output.name, lambda o: unchanged(base.infos[o.name]))
    else:
        other = data.draw(st.integers(0, len(those) - 1))
        those[which], those[other] = those[other], those[which]
    fitting = widths(replace(output, parts=tuple(those)), sum(part.size for part in those))
    return changed(plan, output.name, lambda o: fitting)


@settings(LAW, max_examples=500)
@given(st.data())
def test_whatever_is_proved_is_the_same_function_when_it_is_run(data: st.DataObject) -> None:
    """Soundness: a Plan changed at random is refused, or still right by a reading that shares no code."""
    base = data.draw(tinies)
    growth = data.draw(growths(base.architecture.width))
    plan = mutated(expand(base.infos, base.architecture, growth), base, data)
    try:
        proved(plan, base)
    except PlanError:
        return
    assert same_function(plan, base)


# ---------------------------------------------------------------- shares


def one(share: Share | None, scale: float = 1.0) -> Term:
    return Term("base", "w", range(1), scale, share)


HALF, REST = Share(0, 2), Share(1, 2)


@pytest.mark.parametrize(
    "shares",
    [
        [None],
        [HALF, REST],
        [REST, HALF],
        [HALF, *Share(0, 3, of=REST).siblings],
        [*Share(0, 2, "random", 4, HALF).siblings, *Share(0, 2, "random", 4, REST).siblings],
        [HALF, Share(0, 2, of=REST), *Share(0, 2, of=Share(1, 2, of=REST)).siblings],
    ],
    ids=["whole", "halves", "turned round", "a half in three", "both halves in two", "halves of halves of halves"],
)
def test_complete_sets_of_shares_add_to_one(shares: list[Share | None]) -> None:
    """Nested as deeply as one likes, in any order."""
    assert adds_to_one(map(one, shares))
    assert adds_to_one(map(one, reversed(shares)))


@pytest.mark.parametrize(
    "terms",
    [
        [],
        [one(None), one(None)],
        [one(None, 0.5), one(None, 0.5)],
        [one(None, 2.0)],
        [one(HALF)],
        [one(HALF), one(HALF)],
        [one(HALF), one(REST), one(REST)],
        [one(HALF), one(REST), one(None)],
        [one(HALF), one(REST), one(HALF), one(REST)],
        [one(HALF), one(Share(1, 2, "random"))],
        [one(Share(0, 2, "random", 1)), one(Share(1, 2, "random", 2))],
        [one(HALF), one(Share(0, 2, of=REST))],
        [one(HALF), *map(one, Share(0, 2, of=HALF).siblings)],
        [*map(one, Share(0, 2, of=HALF).siblings)],
        [*map(one, Share(0, 3).siblings[:2])],
    ],
)
def test_anything_else_does_not(terms: list[Term]) -> None:
    """Scales, doubles, gaps, strangers, and shares of the wrong half."""
    assert not adds_to_one(terms)


@st.composite
def split(draw: st.DrawFn) -> list[Share | None]:
    """A whole, split again and again at random."""
    leaves: list[Share | None] = [None]
    for _ in range(draw(st.integers(0, 5))):
        of = leaves.pop(draw(st.integers(0, len(leaves) - 1)))
        first = draw(st.sampled_from([Share(0, 2), Share(0, 3), Share(0, 2, "random", 1), Share(0, 4, "random", 2)]))
        leaves += replace(first, of=of).siblings
    return leaves


@LAW
@given(split(), st.data())
def test_a_whole_split_at_random_adds_to_one(leaves: list[Share | None], data: st.DataObject) -> None:
    """Every tree of shares does; with a leaf lost or doubled it does not."""
    assert adds_to_one(map(one, data.draw(st.permutations(leaves))))
    leaf = data.draw(st.sampled_from(leaves))
    assert not adds_to_one(map(one, [*leaves, leaf]))
    leaves.remove(leaf)
    assert not adds_to_one(map(one, leaves))


# ---------------------------------------------------------------- the marks that the freeze mask is read from


def test_the_marks_of_each_growth_are_right() -> None:
    """In every lane exactly the places behind the old width are marked as grown."""
    for model_type in ("llama", "phi3", "phi"):
        base = tiny(model_type)
        prove_marks(expand(base.infos, base.architecture, Growth(width=11)), base.architecture)


def test_a_lost_mark_is_refused() -> None:
    """A new unit that is not marked would be frozen, an old one that is would train."""
    for mark in (lambda those: _mark(those, 1, False), lambda those: _mark(those, 0, True)):
        plan = changed(grown(), DOWN, parts(mark))
        assert proved(plan, tiny()) == 8
        with pytest.raises(PlanError, match="marked as grown") as caught:
            prove_marks(plan, tiny().architecture)
        assert caught.value.tensor == DOWN


def _mark(those: list[Part], place: int, value: bool) -> None:
    those[place] = replace(those[place], grown=value)
