"""Several plans as one: the same outputs, and every source byte once."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import OverBudget
from mergeflow.plan.fuse import Fused, fuse, in_passes
from mergeflow.recipe.request import Budget
from mergeflow.tensors import Dtype
from tests.plan.builders import OPEN, checkpoint, ingredients, planned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.plan.plan import Plan

SHAPES = {"a": (40,), "b": (3, 5), "c": (7,)}
IDS = ("1", "2", "3", "4", "5")
MODELS = {id: checkpoint(id, SHAPES, dtypes={"b": Dtype.F32 if id in "24" else Dtype.BF16}) for id in IDS}
BYTES = {id: 2 * 47 + (4 if id in "24" else 2) * 15 for id in IDS}
LISTS = st.lists(st.lists(st.sampled_from(IDS), min_size=1, unique=True), min_size=1, max_size=6)


def alternative(ids: Sequence[str], budget: Budget | None = None) -> Plan:
    changes = {} if budget is None else {"budget": budget}
    plan = planned([MODELS[id] for id in ids], architecture=OPEN, dtype="keep", **changes)
    assert plan.problems == ()
    return plan


@given(LISTS)
def test_each_output_is_made_as_its_own_plan_has_it(lists: list[list[str]]) -> None:
    plans = [alternative(ids) for ids in lists]
    fused = fuse(plans)
    assert [list(outputs) for outputs in fused.jobs] == [[number] for number in range(len(lists))]
    for number, plan in enumerate(plans):
        assert ingredients(fused.plan, number) == ingredients(plan)
        assert fused.plan.outputs[number] == plan.outputs[0]


@given(LISTS)
def test_every_tensor_of_every_source_is_read_once(lists: list[list[str]]) -> None:
    fused = fuse([alternative(ids) for ids in lists])
    used = {id for ids in lists for id in ids}
    assert {one.id for one in fused.plan.checkpoints} == used
    assert sorted(strip.key for strip in fused.plan.strips) == ["a", "b", "c"]
    for strip in fused.plan.strips:
        assert len(set(strip.sources)) == len(strip.sources) == len(used)
    assert fused.plan.bytes_read == sum(BYTES[id] for id in used)
    assert fused.bytes_apart == sum(BYTES[id] for ids in lists for id in ids)


@given(LISTS)
def test_equal_rows_are_adjacent_and_every_tile_is_there_once(lists: list[list[str]]) -> None:
    plan = fuse([alternative(ids) for ids in lists]).plan
    for strip in plan.strips:
        changes = sum(one is not other for one, other in zip(strip.dtypes, strip.dtypes[1:], strict=False))
        assert changes == len(set(strip.dtypes)) - 1
    tiles = sorted(tile for shard in plan.shards for tile in shard)
    for index, strip in enumerate(plan.strips):
        its = [tile for tile in tiles if tile.strip == index]
        assert [tile.start for tile in its] == [0, *(tile.stop for tile in its[:-1])]
        assert its[-1].stop == strip.elements


def test_equal_alternatives_are_made_once_and_written_twice() -> None:
    fused = fuse([alternative("12"), alternative("12"), alternative("21")])
    for strip in fused.plan.strips:
        assert sorted(len(cell.places) for cell in strip.cells) == [1, 2]


def test_one_plan_is_a_pass_as_it_is() -> None:
    plan = alternative("12")
    fused = fuse([plan])
    assert fused.plan is plan
    assert not plan.apart
    assert fuse([plan, plan]).plan.apart


def with_memory(lists: Sequence[str], memory: int) -> list[Plan]:
    return [alternative(ids, Budget(1, 1, memory)) for ids in lists]


def enough_for(lists: Sequence[str]) -> int:
    """The least memory with which all of `lists` can be one pass."""
    low, high = enough_for(lists[:1]) - 1 if len(lists) > 1 else 9 << 20, 1 << 26
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            fuse(with_memory(lists, middle))
        except OverBudget:
            low = middle
        else:
            high = middle
    return high


ALTERNATIVES = ("1234", "1235", "1245", "1345", "2345")


def test_what_fits_the_memory_is_one_pass() -> None:
    memory = enough_for(ALTERNATIVES)
    plans = with_memory(ALTERNATIVES, memory)
    (fused,) = in_passes(plans)
    assert fused.alone == tuple(plans)
    assert fused.plan.memory.projected <= memory


def test_what_does_not_fit_is_divided_in_order() -> None:
    memory = enough_for(ALTERNATIVES) - 1
    plans = with_memory(ALTERNATIVES, memory)
    with pytest.raises(OverBudget):
        fuse(plans)
    passes = in_passes(plans)
    assert 1 < len(passes) < len(plans)
    assert [plan for fused in passes for plan in fused.alone] == plans
    assert all(fused.plan.memory.projected <= memory for fused in passes)


SUBSETS = ["".join(ids) for count in (4, 3, 2) for ids in combinations("12345", count)]


@pytest.mark.parametrize("fitting", [1, 2, 3, 10, len(SUBSETS) - 1])
def test_every_pass_has_as_many_as_fit(fitting: int) -> None:
    plans = with_memory(SUBSETS, enough_for(SUBSETS[:fitting]))
    passes = in_passes(plans)
    assert [plan for fused in passes for plan in fused.alone] == plans
    assert len(passes[0].alone) >= fitting
    for fused, following in pairwise(passes):
        with pytest.raises(OverBudget):
            fuse([*fused.alone, following.alone[0]])


def test_where_all_but_one_fit_there_are_two_passes() -> None:
    passes = in_passes(with_memory(ALTERNATIVES, enough_for(ALTERNATIVES) - 1))
    assert [len(fused.alone) for fused in passes] == [len(ALTERNATIVES) - 1, 1]


def test_passes_are_found_without_putting_all_plans_together_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = with_memory(SUBSETS * 8, enough_for(SUBSETS[:2]))
    tried: list[int] = []

    def counted(plans: Sequence[Plan]) -> Fused:
        tried.append(len(plans))
        return fuse(plans)

    monkeypatch.setattr("mergeflow.plan.fuse.fuse", counted)
    assert len(in_passes(plans)) > len(plans) / 10
    assert sum(tried) < 8 * len(plans)
