"""Tiles, shards and memory: how the work is cut so that it fits the budget and can be shared out.

A tile is as long as its block allows: with more models the rows get shorter, never the memory larger. How the work
is cut depends on the strips and on the size of a block, and on nothing else; what is written does not even on these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.errors import OverBudget
from mergeflow.interfaces import SHARED_WORDS
from mergeflow.plan.plan import Memory, Tile
from mergeflow.tensors import Dtype, si_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.plan.plan import Strip
    from mergeflow.recipe.request import Budget

ROW_ALIGNMENT = 64
"""Bytes; rows of a block start on cache lines, so that vector loads are aligned."""
PAGE = 4096
"""Bytes; what is read or written past the page cache begins and ends at multiples of it."""
PAGED = 1 << 15
"""Elements; rows that are not shorter lie in their pages of memory as in those of their file, see `execute.block`."""
LANDING = 256 << 10
"""Bytes that a thread has for what comes past the page cache and does not lie in its pages as its row does."""
KEPT = 16
"""One part of so many of the memory is for results that wait until those that come before them are hashed."""
SHORTEST_ROW = 4096
"""Elements; below this a merge is all bookkeeping, so a budget that asks for less is refused."""
TILE_GRAIN = 4096
"""Elements; tiles end at multiples, so that most reads start on a page of a file whose tensors do."""
PIECE = 32768
"""Elements merged at a time: few enough for a core's caches, and so many that threads seldom wait for the GIL."""
SCRATCH = 8 << 20
"""Bytes of intermediate values beside a block: the sums of one piece in fp64 and the census of a few rows."""
SPARE = 4 * 8
"""Bytes for each element that a step computes with beside its registers: four values of fp64."""
SMALLEST_SHARD = 1 << 20
"""Bytes read and written; no shard needs to have more than a block: it is what is repeated when a worker fails, and
what others wait for whose results come next in the file (`execute.digest`)."""
SHARDS_WANTED = 128
"""Enough for any number of workers to finish together."""


def memory_for(strips: Sequence[Strip], budget: Budget) -> Memory:
    """How large blocks are, and what all of them use; raises `OverBudget` if the smallest would not fit."""
    threads = budget.workers * budget.reads_in_flight
    scratch = SCRATCH + max((_widened(strip) for strip in strips), default=0) + _registers(strips)
    landing = 0 if budget.io in (None, "buffered") else LANDING
    written = sum(strip.elements * cell.dtype.itemsize * len(cell.places) for strip in strips for cell in strip.cells)
    room = (budget.memory - budget.memory // KEPT) // threads - scratch - landing
    least = max((_block(strip, min(strip.elements, SHORTEST_ROW)) for strip in strips), default=0)
    if room < least:
        raise OverBudget(
            f"executor.memory={si_bytes(budget.memory)} is too little for {threads} blocks of "
            f"{max((len(strip.sources) for strip in strips), default=0)} models, which need at least "
            f"{_rounded_up(-(-threads * (least + scratch + landing) * KEPT // (KEPT - 1)))}; raise it, or lower "
            f"executor.workers={budget.workers} or executor.reads_in_flight={budget.reads_in_flight}"
        )
    block = max((_block(strip, _tile_length(strip, room, budget.block)) for strip in strips), default=0)
    return Memory(budget.memory, threads, block, scratch, landing, budget.block, min(budget.memory // KEPT, written))


def cut(strips: Sequence[Strip], memory: Memory) -> tuple[tuple[Tile, ...], ...]:
    """Shards of consecutive tiles that cover every element of every strip exactly once."""
    total = sum(strip.elements * strip.bytes_per_element for strip in strips)
    wanted = max(min(total // SHARDS_WANTED, memory.block), SMALLEST_SHARD)
    shards: list[tuple[Tile, ...]] = []
    tiles: list[Tile] = []
    size = 0
    for index, strip in enumerate(strips):
        width = strip.bytes_per_element
        length = _tile_length(strip, memory.block, memory.longest_read)
        for start in range(0, strip.elements, length):
            stop = min(start + length, strip.elements)
            tiles.append(Tile(index, start, stop))
            size += (stop - start) * width
            if size >= wanted:
                shards.append(tuple(tiles))
                tiles, size = [], 0
    if tiles:
        shards.append(tuple(tiles))
    return tuple(shards)


def _tile_length(strip: Strip, room: int, longest_read: int) -> int:
    """Elements of this strip's tiles when a block may have `room` bytes, which are enough for the shortest row."""
    widest = max([dtype.itemsize for dtype in set(strip.dtypes)])
    most = min(strip.elements, longest_read // widest)
    longest = (room - _slack(strip, PAGED)) // strip.bytes_per_element
    if longest < PAGED <= most:
        longest = min((room - _slack(strip, 0)) // strip.bytes_per_element, PAGED - 1)
    elif most < PAGED:
        longest = (room - _slack(strip, 0)) // strip.bytes_per_element
    longest = min(longest, most)
    if strip.elements <= longest:
        return strip.elements
    tiles = -(-strip.elements // longest)
    even = -(-strip.elements // tiles)
    return min(-(-even // TILE_GRAIN), longest // TILE_GRAIN) * TILE_GRAIN


def _block(strip: Strip, length: int) -> int:
    """Bytes of a block for tiles of `length` elements."""
    return length * strip.bytes_per_element + _slack(strip, length)


def _slack(strip: Strip, length: int) -> int:
    """Bytes between the rows of a block for tiles of `length` elements, at most."""
    rows = len(strip.sources) + len(strip.cells)
    return rows * (PAGE if length >= PAGED else ROW_ALIGNMENT)


def _rounded_up(count: int) -> str:
    """`count` bytes, 1 kB or more, for a person who will type them: what is shown is never too little."""
    shown = 10 ** ((len(str(count)) - 1) // 3 * 3 - 2)
    return si_bytes(count + -count % shown)


def _widened(strip: Strip) -> int:
    """Bytes of one piece of the fp8 rows, which are widened to fp16 before they are merged."""
    return 2 * PIECE * sum([dtype.is_fp8 for dtype in strip.dtypes])


def _registers(strips: Sequence[Strip]) -> int:
    """Bytes of one piece of all that trees and shared sums keep on their way: a thread keeps it for them all."""
    shared = max((sums.registers for strip in strips for sums in strip.sums), default=0)
    programs = {cell.steps for strip in strips for cell in strip.cells if cell.steps}
    kept = {(step.into, step.dtype) for steps in programs for step in steps}
    for_trees = sum(dtype.itemsize for _, dtype in kept) + SPARE if kept else 0
    return PIECE * (for_trees + shared * SHARED_WORDS * Dtype.F64.itemsize)
