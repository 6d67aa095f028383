"""How the work is cut, by arithmetic that does not look at how the code does it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.config.executor import to_bytes
from mergeflow.errors import OverBudget
from mergeflow.plan.plan import Cell, Place, Strip, Tile
from mergeflow.plan.tiles import (
    KEPT,
    PAGE,
    PAGED,
    PIECE,
    ROW_ALIGNMENT,
    SCRATCH,
    SHARDS_WANTED,
    SHORTEST_ROW,
    SMALLEST_SHARD,
    TILE_GRAIN,
    cut,
    memory_for,
)
from mergeflow.recipe.request import Budget
from mergeflow.tensors import Dtype

Work = tuple[list[Strip], Budget]
MIB = 2**20
EMBEDDING = 49408 * 1280
"""Elements of the largest tensor of SDXL."""


def strip(elements: int, dtypes: list[Dtype], made: tuple[Dtype, ...] = (Dtype.F16,)) -> Strip:
    rows = tuple(range(len(dtypes)))
    cells = [Cell("uniform", dtype, rows, (1,) * len(rows), (Place(at, 0),)) for at, dtype in enumerate(made)]
    return Strip("key", elements, rows, tuple(dtypes), (0,) * len(rows), tuple(cells))


STRIPS = st.lists(
    st.builds(
        strip,
        st.integers(1, 1_200_000),
        st.one_of(
            st.lists(st.sampled_from(Dtype), min_size=1, max_size=6),
            st.builds(lambda dtype, count: [dtype] * count, st.sampled_from(Dtype), st.integers(1, 300)),
        ),
        st.lists(st.sampled_from([Dtype.F16, Dtype.F32, Dtype.I64]), min_size=1, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=5,
)


@st.composite
def accepted_work(draw: st.DrawFn) -> tuple[list[Strip], Budget]:
    """Strips, and a budget that is at least as large as the smallest rows of these need."""
    strips = draw(STRIPS)
    widened = max(sum(dtype.is_fp8 for dtype in work.dtypes) for work in strips) * PIECE * Dtype.F16.itemsize
    least = max(bytes_in_a_block(Tile(at, 0, SHORTEST_ROW), strips) for at in range(len(strips)))
    spare = draw(st.one_of(st.just(0), st.integers(0, 8 * MIB), st.integers(0, 1024 * MIB)))
    room = least + 303 * ROW_ALIGNMENT + spare  # every row may need that much to be aligned
    workers, reads = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    return strips, Budget(workers, reads, with_kept(workers * reads * (SCRATCH + widened + room)))


def with_kept(blocks: int) -> int:
    """The memory of which so many bytes are left for blocks."""
    return -(-blocks * KEPT // (KEPT - 1))


def all_tiles(shards: tuple[tuple[Tile, ...], ...]) -> list[Tile]:
    return [tile for shard in shards for tile in shard]


def bytes_in_a_block(tile: Tile, strips: list[Strip]) -> int:
    """What the rows of a tile and its rows of results take at most: each may have to lie in its pages as in a file."""
    work, elements = strips[tile.strip], tile.stop - tile.start
    dtypes = [*work.dtypes, *(cell.dtype for cell in work.cells)]
    rows = [elements * dtype.itemsize for dtype in dtypes]
    apart = PAGE if elements >= PAGED else ROW_ALIGNMENT
    return sum(-(-row // ROW_ALIGNMENT) * ROW_ALIGNMENT if elements < PAGED else row + apart - 1 for row in rows)


# what holds for any work and any budget that is accepted


@given(accepted_work())
def test_tiles_cover_every_element_of_every_strip_exactly_once_and_in_order(work: Work) -> None:
    strips, budget = work
    expected = [(at, 0) for at in range(len(strips))]
    for tile in all_tiles(cut(strips, memory_for(strips, budget))):
        assert (tile.strip, tile.start) == expected[0], "a gap, an overlap or another order"
        assert tile.start < tile.stop <= strips[tile.strip].elements
        if tile.stop == strips[tile.strip].elements:
            expected.pop(0)
        else:
            expected[0] = (tile.strip, tile.stop)
    assert not expected


@given(accepted_work())
def test_every_tile_fits_its_block_and_all_blocks_fit_the_budget(work: Work) -> None:
    strips, budget = work
    memory = memory_for(strips, budget)
    assert memory.allowed == budget.memory
    assert memory.threads == budget.workers * budget.reads_in_flight
    assert max(bytes_in_a_block(tile, strips) for tile in all_tiles(cut(strips, memory))) <= memory.block
    assert memory.projected == memory.threads * (memory.block + memory.scratch) + memory.kept <= budget.memory


@given(accepted_work())
def test_scratch_holds_one_piece_of_the_rows_that_are_widened(work: Work) -> None:
    strips, budget = work
    widened = max(sum(dtype.is_fp8 for dtype in work.dtypes) for work in strips)
    assert memory_for(strips, budget).scratch == SCRATCH + widened * PIECE * Dtype.F16.itemsize


@given(accepted_work())
def test_no_read_is_longer_than_helps_and_every_tile_but_the_first_starts_on_a_page(work: Work) -> None:
    strips, budget = work
    for tile in all_tiles(cut(strips, memory_for(strips, budget))):
        widest = max(dtype.itemsize for dtype in strips[tile.strip].dtypes)
        assert (tile.stop - tile.start) * widest <= Budget.block
        assert tile.start % TILE_GRAIN == 0


@given(accepted_work())
def test_tiles_of_a_strip_are_of_one_length_but_the_last(work: Work) -> None:
    strips, budget = work
    tiles = all_tiles(cut(strips, memory_for(strips, budget)))
    for one, following in pairwise(tiles):
        if one.strip == following.strip:
            length, rest = one.stop - one.start, following.stop - following.start
            assert length == rest or (rest < length and following.stop == strips[one.strip].elements)


@given(accepted_work())
def test_shards_are_neither_empty_nor_much_larger_than_what_may_be_repeated(work: Work) -> None:
    strips, budget = work
    memory = memory_for(strips, budget)
    shards = cut(strips, memory)
    sizes = [sum((tile.stop - tile.start) * strips[tile.strip].bytes_per_element for tile in shard) for shard in shards]
    assert min(sizes) > 0
    wanted = max(min(sum(sizes) // SHARDS_WANTED, memory.block), SMALLEST_SHARD)
    assert all(size >= wanted for size in sizes[:-1])
    assert max(sizes) < wanted + memory.block


@given(accepted_work(), st.integers(1, 64))
def test_the_same_block_makes_the_same_shards_for_any_number_of_workers(work: Work, times: int) -> None:
    strips, budget = work
    memory = memory_for(strips, budget)
    more = memory_for(strips, replace(budget, workers=budget.workers * times, memory=budget.memory * times))
    assert (more.block, more.per_thread, more.threads) == (memory.block, memory.per_thread, memory.threads * times)
    assert cut(strips, more) == cut(strips, memory)


@given(STRIPS, st.builds(Budget, st.integers(1, 16), st.integers(1, 8), st.integers(1, 256 * MIB)))
def test_a_budget_that_is_refused_is_answered_with_one_that_is_enough(strips: list[Strip], budget: Budget) -> None:
    try:
        memory_for(strips, budget)
    except OverBudget as error:
        found = re.search(r"need at least ([0-9.,]+ [kMGT]?B);", str(error))
        assert found is not None
        enough = to_bytes(found[1].replace(",", ""))
        assert enough > budget.memory
        assert memory_for(strips, replace(budget, memory=enough)).projected <= enough
        with pytest.raises(OverBudget):
            memory_for(strips, replace(budget, memory=int(enough * 0.98)))


# what holds for the work that this is made for


@pytest.mark.parametrize("models", [1, 2, 42, 257, 1000])
def test_projected_memory_keeps_to_the_budget_for_any_number_of_models(models: int) -> None:
    budget = Budget(workers=2, reads_in_flight=4, memory=1024 * MIB)
    memory = memory_for([strip(EMBEDDING, [Dtype.F16] * models)], budget)
    assert memory.projected <= budget.memory
    # With many models a tile is as long as the budget allows; with few, reads are no longer than helps.
    assert memory.projected > budget.memory * 0.9 or models < 42


@pytest.mark.parametrize("elements", [EMBEDDING, EMBEDDING * 10, EMBEDDING * 1000])
def test_projected_memory_does_not_grow_with_the_largest_tensor(elements: int) -> None:
    budget = Budget(workers=2, reads_in_flight=4, memory=1024 * MIB)
    usual = memory_for([strip(EMBEDDING, [Dtype.F16] * 32)], budget)
    larger = memory_for([strip(elements, [Dtype.F16] * 32)], budget)
    assert abs(larger.projected - usual.projected) <= usual.projected * 0.1


def test_small_work_takes_no_more_than_it_needs() -> None:
    memory = memory_for([strip(100, [Dtype.F16] * 3)], Budget(1, 1, 1024 * MIB))
    assert memory.block <= 100 * 2 * 4 + 4 * ROW_ALIGNMENT


def test_a_full_size_merge_has_enough_shards_for_many_workers() -> None:
    work = [strip(EMBEDDING, [Dtype.F16] * 42)] + [strip(1280 * 1280, [Dtype.F16] * 42)] * 1500
    shards = cut(work, memory_for(work, Budget(2, 4, 1024 * MIB)))
    assert len(shards) > 512
    assert max(len(shard) for shard in shards) < 50


def test_reads_are_as_long_as_helps_where_memory_allows() -> None:
    work = [strip(EMBEDDING, [Dtype.F32])]
    tiles = all_tiles(cut(work, memory_for(work, Budget(1, 1, 1024 * MIB))))
    # Fewer would be longer than helps; so many are about equal.
    assert len(tiles) == -(-EMBEDDING * 4 // Budget.block)


@pytest.mark.parametrize(("short", "tiles"), [(0, 1), (2, 2)])
def test_a_tensor_whose_rows_fit_a_block_but_not_their_alignment_is_cut(short: int, tiles: int) -> None:
    work = [strip(5000, [Dtype.F16] * 3)]
    room = 5000 * 4 * 2 + 4 * ROW_ALIGNMENT - short
    memory = memory_for(work, Budget(1, 1, with_kept(SCRATCH + room)))
    assert len(all_tiles(cut(work, memory))) == tiles
    assert memory.block <= room


def test_no_work_needs_no_block() -> None:
    memory = memory_for([], Budget(1, 1, 64 * MIB))
    assert memory.block == 0
    assert cut([], memory) == ()


def test_too_little_memory_is_refused_with_the_numbers_and_the_ways_out() -> None:
    with pytest.raises(OverBudget) as caught:
        memory_for([strip(EMBEDDING, [Dtype.F16] * 257)], Budget(workers=2, reads_in_flight=4, memory=1_500_000))
    needed = with_kept(8 * (SCRATCH + SHORTEST_ROW * 258 * 2 + 258 * ROW_ALIGNMENT))
    assert str(caught.value) == (
        f"executor.memory=1.50 MB is too little for 8 blocks of 257 models, which need at least "
        f"{-(-needed // 10_000) / 100:.2f} MB; raise it, or lower executor.workers=2 or executor.reads_in_flight=4"
    )


@pytest.mark.parametrize(("short", "fits"), [(0, True), (2, False)])
def test_the_smallest_budget_is_exact_to_a_byte_of_rounding(short: int, fits: bool) -> None:
    work = [strip(EMBEDDING, [Dtype.F16] * 7 + [Dtype.F32] * 2, (Dtype.F16, Dtype.F32))]
    block = SHORTEST_ROW * (7 * 2 + 2 * 4 + 2 + 4) + 11 * ROW_ALIGNMENT
    budget = Budget(3, 2, with_kept(6 * (block + SCRATCH)) - short)
    if fits:
        assert budget.memory - 1 <= memory_for(work, budget).projected <= budget.memory
    else:
        with pytest.raises(OverBudget):
            memory_for(work, budget)
