"""What is left of a plan where an earlier run has made a part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.plan.strips import joined
from mergeflow.plan.tiles import cut, memory_for
from mergeflow.tensors import Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mergeflow.plan.plan import Cell, Plan, Strip, Tile

    Extents = Sequence[tuple[int, int]]


class Remaining(NamedTuple):
    """The part of a plan that is still to be done, and the part that is not."""

    plan: Plan
    """The same outputs, and the shards that are left."""
    done: tuple[Span, ...]
    """What is not written again."""
    spared: int
    """Bytes of the sources that need not be read."""


def remaining(plan: Plan, there: Sequence[Extents]) -> Remaining:
    """What is left to do where, of each output, those bytes are there already: runs in order that do not touch.

    Elements that are there in all outputs that want them are done. A pass writes a tile to every output, so where one
    lacks it, it is written again to the others: with the same bytes. Outputs that are whole are left alone, though.
    """
    if not any(there):
        return Remaining(plan, (), 0)
    whole = {index for index, output in enumerate(plan.outputs) if _covers(there[index], output.data)}
    left = _without(plan, whole)
    done = [Span(index, *plan.outputs[index].data) for index in sorted(whole)]
    finished: list[Extents] = []
    for strip in left.strips:
        finished.append(_finished(strip, there))
        done += _places(strip, finished[-1])
    shards = [tuple(part for tile in shard for part in _rest(tile, finished[tile.strip])) for shard in left.shards]
    left = replace(left, shards=tuple(shard for shard in shards if shard))
    still = sum((tile.stop - tile.start) * _width(left.strips[tile.strip]) for shard in left.shards for tile in shard)
    return Remaining(left, _together(done), plan.bytes_read - still)


def _covers(extents: Extents, whole: tuple[int, int]) -> bool:
    begin, end = whole
    return begin == end or any(first <= begin and end <= last for first, last in extents)


def _without(plan: Plan, whole: set[int]) -> Plan:
    """The same plan, of which nothing goes to these outputs."""
    if not whole:
        return plan
    strips = joined(part for strip in plan.strips if (part := _part(strip, whole)) is not None)
    memory = memory_for(strips, plan.budget)
    return replace(plan, strips=strips, memory=memory, shards=cut(strips, memory))


def _part(strip: Strip, whole: set[int]) -> Strip | None:
    """The rows and cells of a strip that other outputs want."""
    kept: list[Cell] = []
    for cell in strip.cells:
        places = tuple(place for place in cell.places if place.output not in whole)
        if places:
            kept.append(cell._replace(places=places))
    if not kept:
        return None
    rows = sorted({row for cell in kept for row in cell.rows})
    number = {row: index for index, row in enumerate(rows)}
    return strip._replace(
        sources=tuple(strip.sources[row] for row in rows),
        dtypes=tuple(strip.dtypes[row] for row in rows),
        offsets=tuple(strip.offsets[row] for row in rows),
        cells=tuple(cell._replace(rows=tuple(number[row] for row in cell.rows)) for cell in kept),
        sums=(),
    )


def _finished(strip: Strip, there: Sequence[Extents]) -> Extents:
    """The runs of elements of a strip that all of its places have."""
    runs: list[tuple[int, int]] = [(0, strip.elements)]
    for cell in strip.cells:
        size = cell.dtype.itemsize
        for place in cell.places:
            its = []
            for begin, end in _within(there[place.output], place.offset, place.offset + strip.elements * size):
                first, last = -((place.offset - begin) // size), (end - place.offset) // size  # whole elements only
                if first < last:
                    its.append((first, last))
            runs = _common(runs, its)
    return runs


def _within(extents: Extents, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of `extents`, which are in order, that lie between `begin` and `end`."""
    low, high = 0, len(extents)
    while low < high:  # the first that ends behind `begin`
        middle = (low + high) // 2
        if extents[middle][1] <= begin:
            low = middle + 1
        else:
            high = middle
    for first, last in extents[low:]:
        if first >= end:
            break
        yield max(first, begin), min(last, end)


def _common(some: Extents, others: Extents) -> list[tuple[int, int]]:
    """What is in both."""
    return [pair for begin, end in some for pair in _within(others, begin, end)]


def _rest(tile: Tile, finished: Extents) -> Iterator[Tile]:
    """What of a tile is not finished."""
    start = tile.start
    for begin, end in _within(finished, tile.start, tile.stop):
        if start < begin:
            yield tile._replace(start=start, stop=begin)
        start = end
    if start < tile.stop:
        yield tile._replace(start=start)


def _places(strip: Strip, runs: Extents) -> Iterator[Span]:
    """Where these elements lie in the outputs."""
    for begin, end in runs:
        for cell in strip.cells:
            size = cell.dtype.itemsize
            for place in cell.places:
                yield Span(place.output, place.offset + begin * size, place.offset + end * size)


def _together(spans: list[Span]) -> tuple[Span, ...]:
    """The same bytes in as few spans as possible."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and (found[-1].output, found[-1].end) == (span.output, span.begin):
            found[-1] = found[-1]._replace(end=span.end)
        else:
            found.append(span)
    return tuple(found)


def _width(strip: Strip) -> int:
    """Bytes that one element takes in all sources."""
    return sum([dtype.itemsize for dtype in strip.dtypes])
