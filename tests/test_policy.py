"""policy.py: what trains, as boxes, and how the shares are dealt out."""

from __future__ import annotations

from itertools import combinations, product
from typing import get_args

import pytest
from strategies import tiny

from ckptgrow.plan import Output, Share, Term, unchanged
from ckptgrow.policy import POLICIES, Box, ShareChoice, boxes, rule_for, shares
from ckptgrow.proof import adds_to_one
from ckptgrow.surgery import Growth, expand

CHOICES: tuple[ShareChoice, ...] = get_args(ShareChoice)
EVERY = list(product(range(1, 13), POLICIES, CHOICES, (0, 9)))


# ---------------------------------------------------------------- boxes, of a width of 2 that grew to 5


def grown(role: str) -> Output:
    """The tensor of that role, hidden size 3, width 2 grown to 5 by two rounds of copies."""
    base = tiny("phi3" if role == "gate_up" else "llama", width=2, hidden=3, layers=1, bias=True)
    plan = expand(base.infos, base.architecture, Growth(width=5))
    return next(output for output in plan.outputs if output.member and output.member.role == role)


ROWS, COLUMNS = ((2, 5), (0, 3)), ((0, 3), (2, 5))
ALL = ((0, 5), (0, 3))
GOLDEN: dict[tuple[str, str], tuple[Box, ...]] = {
    ("g-freeze", "gate"): (ROWS,),
    ("g-freeze", "up"): (ROWS,),
    ("g-freeze", "down"): (COLUMNS,),
    ("g-freeze", "gate_bias"): (((2, 5),),),
    ("g-freeze", "up_bias"): (((2, 5),),),
    ("g-freeze", "gate_up"): (ROWS, ((7, 10), (0, 3))),
    ("g-train", "gate"): (ALL,),
    ("g-train", "up"): (ALL,),
    ("g-train", "down"): (),
    ("g-train", "gate_bias"): (((0, 5),),),
    ("g-train", "up_bias"): (((0, 5),),),
    ("g-train", "gate_up"): (((0, 10), (0, 3)),),
    ("down", "gate"): (),
    ("down", "up"): (),
    ("down", "down"): (COLUMNS,),
    ("down", "gate_bias"): (),
    ("down", "up_bias"): (),
    ("down", "gate_up"): (),
    ("up", "gate"): (),
    ("up", "up"): (ROWS,),
    ("up", "down"): (),
    ("up", "gate_bias"): (),
    ("up", "up_bias"): (((2, 5),),),
    ("up", "gate_up"): (((7, 10), (0, 3)),),
}


@pytest.mark.parametrize(("policy", "role"), GOLDEN)
def test_what_trains(policy: str, role: str) -> None:
    """Golden: the boxes of every role under every policy."""
    assert boxes(grown(role), POLICIES[policy]) == GOLDEN[policy, role]


def test_the_golden_boxes_leave_no_policy_out() -> None:
    """A new policy needs its line in the table."""
    assert {policy for policy, _ in GOLDEN} == set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_belongs_to_no_mlp_never_trains(policy: str) -> None:
    """Attention, embeddings, norms and the bias of down."""
    base = tiny("phi", bias=True)
    plan = expand(base.infos, base.architecture, Growth())
    outside = [output for output in plan.outputs if output.member is None]
    assert any(output.name.endswith("fc2.bias") for output in outside)
    assert all(boxes(output, POLICIES[policy]) == () for output in outside)
    assert boxes(unchanged(base.infos[base.architecture.mlps[0].down]), POLICIES[policy]) == ()


# ---------------------------------------------------------------- shares


def dealt(copies: int, policy: str, choice: ShareChoice, seed: int = 0) -> list[Share | None]:
    return list(shares(copies, POLICIES[policy], choice, seed))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_shares_of_a_unit_are_the_unit(policy: str) -> None:
    """For 1 to 12 copies, every choice and seed: one share a copy, and they add up to one."""
    for copies, _, choice, seed in (case for case in EVERY if case[1] == policy):
        result = dealt(copies, policy, choice, seed)
        assert len(result) == copies
        assert adds_to_one(Term("base", "w", range(1), share=share) for share in result)
        assert copies == 1 or not adds_to_one(Term("base", "w", range(1), share=share) for share in result[1:])


def test_a_unit_that_is_not_copied_keeps_its_bytes() -> None:
    """One copy has no share: it is the weight."""
    assert all(dealt(1, policy, choice, seed) == [None] for _, policy, choice, seed in EVERY)


FIRST_RANDOM = {"g-freeze": 3, "g-train": 2, "down": 3, "up": 3}


@pytest.mark.parametrize("policy", POLICIES)
def test_auto_is_random_exactly_where_two_trainable_copies_would_be_equal(policy: str) -> None:
    """METHOD.md 3: from 2 copies on where the original trains too, else from 3 copies on."""
    for copies in range(2, 13):
        expected = "random" if copies >= FIRST_RANDOM[policy] else "even"
        assert rule_for(copies, POLICIES[policy], "auto") == expected
        new = [share for share in dealt(copies, policy, "auto", 5)[1:] if share]
        assert {share.rule for share in new} == {expected}
        assert {share.seed for share in new} == {5 if expected == "random" else 0}


def test_no_two_trainable_copies_get_one_share_by_auto() -> None:
    """What auto is for: trainable copies differ in their share, and by more than its rounding."""
    for copies, policy in product(range(2, 13), POLICIES):
        result = dealt(copies, policy, "auto")
        trainable = result if "all" in POLICIES[policy].trains.values() else result[1:]
        for one, other in combinations(trainable, 2):
            assert one != other
            assert one is not None
            assert one.rule == "random"


@pytest.mark.parametrize("copies", range(2, 13))
def test_with_g_freeze_the_original_keeps_half(copies: int) -> None:
    """METHOD.md 2: round(W/2) stays with the original for every k, so that the growth can be undone."""
    for choice in ("auto", "even"):
        original, *new = dealt(copies, "g-freeze", choice, 3)
        assert original == Share(0, 2)
        if copies > 2:
            assert {share.of for share in new if share} == {Share(1, 2)}


@pytest.mark.parametrize("copies", range(2, 13))
def test_random_by_name_shares_out_the_original_too(copies: int) -> None:
    """Whoever asks for random gets it, from the whole weight."""
    for policy in POLICIES:
        assert dealt(copies, policy, "random", 4) == [Share(i, copies, "random", 4) for i in range(copies)]


def test_even_by_name_is_even() -> None:
    """No random share, and no seed, where even was asked for."""
    for copies, policy in product(range(2, 13), POLICIES):
        assert {(share.rule, share.seed) for share in dealt(copies, policy, "even", 6) if share} == {("even", 0)}
