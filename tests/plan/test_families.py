"""Which sums are made of which: judged by whole numbers, and by counting what is added."""

from __future__ import annotations

import pickle
import time
from fractions import Fraction
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.interfaces import SHARED_WORDS, SHARES_LIMIT
from mergeflow.plan.families import LARGEST_SCALE, Families, shared_sums
from mergeflow.plan.plan import Cell, Place, Strip
from mergeflow.plan.tiles import PIECE, SCRATCH, memory_for
from mergeflow.recipe.request import COPY, UNIFORM, Budget, TargetRequest
from mergeflow.tensors import Dtype
from tests.plan.builders import checkpoint, planned

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mergeflow.interfaces import SharedSums


def mean_of(rows: Iterable[int], shares: Iterable[int] = (), dtype: Dtype = Dtype.F16) -> Cell:
    listed = tuple(rows)
    return Cell(UNIFORM, dtype, listed, tuple(shares) or (1,) * len(listed), (Place(0, 0),))


def without_each(count: int) -> list[Cell]:
    """The means of so many rows that leave out one each."""
    return [mean_of(row for row in range(count) if row != left) for left in range(count)]


def with_each(base: int, count: int) -> list[Cell]:
    """The means of so many rows and one more each."""
    return [mean_of([*range(base), base + one]) for one in range(count)]


def up_to_each(count: int) -> list[Cell]:
    """The means of the first one, two, three rows."""
    return [mean_of(range(row + 1)) for row in range(count)]


def additions(sums: Sequence[SharedSums]) -> int:
    return sum(len(step.rows) for family in sums for step in family.steps)


def alone(cells: Sequence[Cell]) -> int:
    return sum(len(cell.rows) for cell in cells)


@st.composite
def lists(draw: st.DrawFn) -> list[Cell]:
    """Any lists of up to twelve rows: shares as composites make them, and some lists twice."""
    made = []
    count = draw(st.integers(1, 12))
    for _ in range(draw(st.integers(0, 14))):
        rows = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
        shares = draw(st.one_of(st.just([1]), st.just([2, 1]), st.lists(st.integers(1, 6), min_size=1, max_size=4)))
        dtype = draw(st.sampled_from([Dtype.F16, Dtype.F32]))
        made.append(mean_of(rows, [shares[index % len(shares)] for index in range(len(rows))], dtype))
        if draw(st.integers(0, 4)) == 0:
            made.append(draw(st.sampled_from(made))._replace(dtype=Dtype.BF16))
    return made


RELATED = st.one_of(
    st.integers(4, 14).map(without_each),
    st.builds(with_each, st.integers(2, 9), st.integers(2, 6)),
    st.integers(3, 12).map(up_to_each),
)
"""Lists that have much in common."""


def check(cells: Sequence[Cell]) -> tuple[SharedSums, ...]:
    """Carry the steps out with vectors of shares, and see that everything said of them is so."""
    sums = shared_sums(cells)
    made: list[int] = []
    for family in sums:
        most = dict(zip(family.rows, family.most, strict=True))
        held: dict[int, dict[int, int]] = {}
        holds: dict[int, int] = {}
        uses = [2 if step.cells else 0 for step in family.steps]
        for number, step in enumerate(family.steps):
            assert step.base == -1 or step.base in held, "a sum is made of one that is not there"
            assert step.rows, "a step must add something"
            total = dict(held.get(step.base, {}))
            for row, share in zip(step.rows, step.shares, strict=True):
                total[row] = total.get(row, 0) + share
                assert share != 0
                assert 0 <= total[row] <= most[row], "the bound of the sum would not hold"
            if step.base >= 0:
                uses[holds[step.base]] += 1
            held[step.into], holds[step.into] = total, number
            for index, divisor in zip(step.cells, step.divisors, strict=True):
                cell = cells[index]
                told = {row: Fraction(share, divisor) for row, share in total.items() if share}
                parts = dict(zip(cell.rows, (Fraction(share, sum(cell.shares)) for share in cell.shares), strict=True))
                assert told == parts
                assert divisor < SHARES_LIMIT
                made.append(index)
        assert set(held) == set(range(family.registers))
        assert min(uses) >= 2, "a sum is made that nobody wants and nothing or only one other is made of"
        assert len([index for step in family.steps for index in step.cells]) >= 2
        indices = [index for step in family.steps for index in step.cells]
        assert additions([family]) <= 0.75 * alone([cells[index] for index in indices])
    assert len(made) == len(set(made)), "a mean is made twice"
    return sums


@given(st.one_of(lists(), RELATED, st.builds(lambda one, other: one + other, RELATED, lists())))
def test_every_mean_is_that_of_its_own_list(cells: list[Cell]) -> None:
    check(cells)


@pytest.mark.parametrize("seed", [40, 219, 446, 523, 698, 894, 996, *range(20)])
def test_what_is_put_between_sums_may_be_there_already(seed: int) -> None:
    # With the first of these seeds it is, somewhere else in the tree.
    random = Random(seed)
    count, targets = random.randint(3, 10), random.randint(3, 20)
    lists = [[row for row in range(count) if random.random() < 0.5] or [0] for _ in range(targets)]
    check([mean_of(rows, [random.randint(1, 3) for _ in rows]) for rows in lists])


@given(RELATED)
def test_lists_that_have_much_in_common_are_made_together_whatever_else_there_is(cells: list[Cell]) -> None:
    apart = [mean_of(row + 100 for row in cell.rows) for cell in cells]
    once, twice = additions(check(cells)), additions(check(cells + apart))
    assert 0 < once <= alone(cells) * 0.75
    assert once <= twice <= 2 * once


@given(lists())
def test_what_is_no_uniform_mean_is_no_part_of_it(cells: list[Cell]) -> None:
    copies = [cell._replace(method=COPY) for cell in cells]
    assert shared_sums(copies) == ()
    apart = [index for family in shared_sums([*copies, *cells]) for step in family.steps for index in step.cells]
    assert all(index >= len(copies) for index in apart)


# what it costs


@pytest.mark.parametrize("count", [4, 14, 44, 257])
def test_leaving_out_one_each_costs_about_two_sums_of_all(count: int) -> None:
    cells = without_each(count)
    (family,) = check(cells)
    assert additions([family]) <= 2 * count
    assert (family.registers, len(family.steps)) == (2, count + 1)


@pytest.mark.parametrize("targets", [2, 3, 7])
def test_leaving_out_some_of_many_costs_one_sum_and_a_row_each(targets: int) -> None:
    assert additions(check(without_each(44)[:targets])) <= 44 + targets


def test_adding_one_each_costs_one_sum_and_a_row_each() -> None:
    (family,) = check(with_each(30, 12))
    assert additions([family]) == 42
    assert family.registers == 2


def test_adding_one_after_the_other_costs_one_sum_and_one_register() -> None:
    (family,) = check(up_to_each(40))
    assert additions([family]) == 40
    assert family.registers == 1


def test_the_same_list_in_two_dtypes_is_added_once() -> None:
    (family,) = check([mean_of(range(20)), mean_of(range(20), dtype=Dtype.F32), mean_of(reversed(range(20)))])
    assert additions([family]) == 20
    assert [(step.cells, step.divisors) for step in family.steps] == [((0, 1, 2), (20, 20, 20))]


def test_what_two_lists_share_is_added_first() -> None:
    (family,) = check([mean_of(range(30)), mean_of(range(10, 40))])
    assert additions([family]) == 40
    both, *others = sorted(family.steps, key=lambda step: step.base)
    assert set(both.rows) == set(range(10, 30))
    assert both.cells == ()
    assert [len(step.rows) for step in others] == [10, 10]


def test_lists_without_a_common_row_are_merged_alone() -> None:
    assert shared_sums([mean_of(range(10)), mean_of(range(10, 20)), mean_of(range(20, 25))]) == ()


def test_lists_that_share_little_are_merged_alone() -> None:
    assert shared_sums([mean_of(range(10)), mean_of(range(8, 18))]) == ()


def test_one_list_is_merged_alone() -> None:
    assert shared_sums([mean_of(range(10)), mean_of(range(3))._replace(method=COPY)]) == ()
    assert shared_sums([]) == ()


def test_two_groups_of_lists_are_two_families() -> None:
    apart = [mean_of(row + 20 for row in cell.rows) for cell in without_each(9)]
    families = check(without_each(12) + apart)
    assert [sorted(index for step in family.steps for index in step.cells) for family in families] == [
        [*range(12)],
        [*range(12, 21)],
    ]
    assert [family.rows for family in families] == [tuple(range(12)), tuple(range(20, 29))]


def test_lists_without_their_composite_are_made_of_those_with_it() -> None:
    # Beside a composite of two, every other model has two shares: half of its sum is that of the list without it.
    others = range(2, 20)
    with_it = [mean_of([0, 1, *(row for row in others if row != left)], [1, 1, *[2] * 17]) for left in others]
    without_it = [mean_of(row for row in others if row != left) for left in others]
    (family,) = check(with_it + without_it)
    assert additions([family]) <= 20 + 2 + 2 * 18 + 2
    assert set(family.most) == {1, 2}


def test_shares_are_multiplied_only_as_far_as_sums_can_take() -> None:
    for usual in (LARGEST_SCALE + 1, SHARES_LIMIT // 20):
        check([mean_of(range(9)), mean_of(range(10), [usual] * 9 + [1]), mean_of(range(8))])
    large = SHARES_LIMIT // 20
    (family,) = check([mean_of(range(10), [large] * 10), mean_of(range(11), [large] * 11)])
    assert additions([family]) == 11


@given(st.lists(st.lists(st.integers(0, 39), min_size=20, max_size=40, unique=True), min_size=30, max_size=30))
def test_registers_stay_few_for_any_lists(listed: list[list[int]]) -> None:
    for family in check([mean_of(sorted(rows)) for rows in listed]):
        assert family.registers <= 6


# planning


def leaving_out(count: int, targets: int) -> tuple[dict[str, list[str]], list[TargetRequest]]:
    ids = [str(number) for number in range(count)]
    selections = {f"not-{id}": [one for one in ids if one != id] for id in ids[:targets]}
    return selections, [TargetRequest(name, f"{name}.safetensors", selection=name) for name in selections]


def test_strips_with_the_same_cells_share_one_schedule() -> None:
    models = [checkpoint(str(number)) for number in range(8)]
    selections, targets = leaving_out(8, 8)
    plan = planned(models, *targets, selections=selections)
    assert len({id(strip.sums) for strip in plan.strips}) == 1
    assert additions(plan.strips[0].sums) == 16 - 1
    assert plan == planned(models, *targets, selections=selections)
    loaded = pickle.loads(pickle.dumps(plan.for_workers()))
    assert loaded.strips == plan.strips
    assert len({id(strip.sums) for strip in loaded.strips}) == 1


def test_a_family_is_looked_up_by_what_its_cells_are() -> None:
    families = Families()
    for count in (5, 6, 5, 7):
        assert families.of(without_each(count)) == shared_sums(without_each(count))
    cells = without_each(9)
    assert families.of(cells) is families.of([cell._replace(places=()) for cell in cells])


def test_targets_that_share_nothing_have_no_schedule() -> None:
    models = [checkpoint(str(number)) for number in range(4)]
    targets = [TargetRequest(name, f"{name}.safetensors", selection=name) for name in "ab"]
    plan = planned(models, *targets, selections={"a": ["0", "1"], "b": ["2", "3"]})
    assert {strip.sums for strip in plan.strips} == {()}


@pytest.mark.parametrize(("cells", "registers"), [(without_each(6), 2), (up_to_each(6), 1), ([mean_of(range(6))], 0)])
def test_what_registers_take_is_projected(cells: list[Cell], registers: int) -> None:
    strip = Strip("key", 100_000, tuple(range(6)), (Dtype.F16,) * 6, (0,) * 6, tuple(cells))
    budget = Budget(workers=2, reads_in_flight=2, memory=2**30)
    memory = memory_for([strip, strip._replace(sums=shared_sums(cells))], budget)
    assert memory.scratch == SCRATCH + registers * PIECE * SHARED_WORDS * 8
    assert memory.projected <= budget.memory


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(without_each(257), id="leaving-out-one-each"),
        pytest.param(without_each(300)[:257], id="leaving-out-some"),
        pytest.param([mean_of(row for row in range(257) if row * seed % 7 < 4) for seed in range(1, 258)], id="odd"),
        pytest.param([mean_of(range(first, first + 60)) for first in range(257)], id="a-window-that-moves"),
    ],
)
def test_hundreds_of_targets_are_planned_in_seconds(cells: list[Cell]) -> None:
    began = time.process_time()
    families = Families()
    found = {id(families.of(cells)) for _ in range(2515)}
    seconds = time.process_time() - began
    assert len(found) == 1
    # It takes a quarter of a second; a machine that is busy elsewhere gets more time.
    assert seconds < 3, f"it took {seconds:.1f} s"


def test_chains_of_a_thousand_are_no_trouble() -> None:
    (family,) = shared_sums(up_to_each(1100))
    assert (additions([family]), family.registers) == (1100, 1)


def test_cells_whose_dtypes_alone_differ_have_one_schedule() -> None:
    cells = without_each(6)
    assert shared_sums([cell._replace(dtype=Dtype.F32) for cell in cells]) == shared_sums(cells)
