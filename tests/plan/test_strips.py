"""Strips joined: rows that several need are there once, and so is whatever many strips have in common."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from mergeflow.plan.plan import Cell, Place, Strip
from mergeflow.plan.strips import joined
from mergeflow.recipe.request import TargetRequest
from mergeflow.tensors import Dtype
from tests.plan.builders import OPEN, checkpoint, planned

if TYPE_CHECKING:
    from mergeflow.plan.plan import Plan

DTYPES = (Dtype.F32, Dtype.BF16, Dtype.F16)
SOURCES = tuple(range(5))


def stored(key: str, source: int) -> tuple[Dtype, int]:
    """What a tensor is stored as, and where."""
    return DTYPES[(source + len(key)) % len(DTYPES)], 1000 * source + len(key)


def wanted(key: str, sources: tuple[int, ...], place: Place) -> Strip:
    """The mean of some sources, as one output has it."""
    dtypes, offsets = zip(*(stored(key, source) for source in sources), strict=True)
    cell = Cell("uniform", Dtype.F16, tuple(range(len(sources))), (1,) * len(sources), (place,))
    return Strip(key, 8, sources, dtypes, offsets, (cell,))


KEYS = st.sampled_from(["a", "bb"])
LISTS = st.lists(st.sampled_from(SOURCES), min_size=1, unique=True).map(tuple)
PARTS = st.lists(st.tuples(KEYS, LISTS), min_size=1, max_size=12).map(
    lambda drawn: [wanted(key, sources, Place(number, 0)) for number, (key, sources) in enumerate(drawn)]
)


@given(PARTS)
def test_every_row_is_there_once_and_says_where_it_lies(parts: list[Strip]) -> None:
    strips = joined(parts)
    assert [strip.key for strip in strips] == sorted({part.key for part in parts})
    for strip in strips:
        needed = {source for part in parts if part.key == strip.key for source in part.sources}
        assert sorted(strip.sources) == sorted(needed)
        rows = zip(strip.sources, strip.dtypes, strip.offsets, strict=True)
        assert all((dtype, offset) == stored(strip.key, source) for source, dtype, offset in rows)
        assert len(list(itertools.groupby(strip.dtypes))) == len(set(strip.dtypes))


@given(PARTS)
def test_each_output_gets_the_mean_of_its_own_list(parts: list[Strip]) -> None:
    found = {
        (strip.key, place): tuple(strip.sources[row] for row in cell.rows)
        for strip in joined(parts)
        for cell in strip.cells
        for place in cell.places
    }
    assert found == {(part.key, part.cells[0].places[0]): part.sources for part in parts}


@given(PARTS)
def test_what_is_joined_already_stays_as_it_is(parts: list[Strip]) -> None:
    strips = joined(parts)
    assert joined(strips) == strips


def plan_of_two() -> Plan:
    """Two means, of three models and of two, over three keys."""
    models = [checkpoint(id, {"a": (2, 3), "b": (6,), "c": (7,)}) for id in "123"]
    targets = [TargetRequest(name, f"{name}.safetensors", selection=name) for name in ("all", "some")]
    return planned(models, *targets, architecture=OPEN, selections={"all": "1,2,3", "some": "3,1"})


def test_tuples_that_are_equal_are_one_so_that_a_plan_pickles_them_once() -> None:
    first, *others = plan_of_two().strips
    for strip in others:
        assert strip.sources is first.sources
        assert strip.dtypes is first.dtypes
        assert strip.sums is first.sums
        for cell, its in zip(strip.cells, first.cells, strict=True):
            assert (cell.rows is its.rows, cell.shares is its.shares, cell.steps is its.steps) == (True, True, True)


def test_a_tensor_of_another_shape_and_as_many_elements_is_a_cell_of_the_same_strip() -> None:
    models = [checkpoint("1", {"a": (2, 3)}), checkpoint("2", {"a": (6,)})]
    targets = [TargetRequest(name, f"{name}.safetensors", selection=name) for name in ("flat", "square")]
    plan = planned(models, *targets, architecture=OPEN, selections={"square": "1", "flat": "2"})
    assert plan.problems == ()
    (strip,) = plan.strips
    assert (strip.sources, [cell.rows for cell in strip.cells]) == ((0, 1), [(0,), (1,)])
    assert [output.layout.tensors["a"].shape for output in plan.outputs] == [(6,), (2, 3)]
