"""Strips joined: what several outputs, or several plans, want of one tensor key is read once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from mergeflow.plan.families import Families
from mergeflow.tensors import LAYOUT_ORDER

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mergeflow.plan.plan import Cell, Place, Strip
    from mergeflow.tensors import Dtype

    Value = TypeVar("Value")


def joined(parts: Iterable[Strip]) -> tuple[Strip, ...]:
    """One strip for all `parts` of equal key and elements, in the order in which files are laid out.

    A part has the rows that somebody needs, in any order, and the cells to be made of them. Of a strip, equal dtypes
    are adjacent, and equal cells are one that goes to all of their places.
    """
    alike: dict[tuple[str, int], list[Strip]] = {}
    for part in parts:
        alike.setdefault((part.key, part.elements), []).append(part)
    joiner = _Joiner()
    strips = [joiner.strip(group) for group in alike.values()]
    strips.sort(key=lambda strip: (LAYOUT_ORDER[strip.cells[0].dtype], strip.key))
    return tuple(strips)


class _Joiner:
    """Makes strips. Most have the same sources and cells, and each of these tuples is there once for all of them."""

    def __init__(self) -> None:
        self._families = Families()
        self._same: dict[object, object] = {}

    def strip(self, parts: Sequence[Strip]) -> Strip:
        """The rows that any of `parts` needs, and the cells of them all."""
        found: dict[int, tuple[Dtype, int]] = {}
        for part in parts:
            found.update(zip(part.sources, zip(part.dtypes, part.offsets, strict=True), strict=True))
        ordered = sorted(found, key=lambda source: (LAYOUT_ORDER[found[source][0]], source))
        cells = self._cells(parts, {source: row for row, source in enumerate(ordered)})
        return parts[0]._replace(
            sources=self._one(tuple(ordered)),
            dtypes=self._one(tuple([found[source][0] for source in ordered])),
            offsets=tuple([found[source][1] for source in ordered]),
            cells=cells,
            sums=self._families.of(cells),
        )

    def _cells(self, parts: Sequence[Strip], row_of: dict[int, int]) -> tuple[Cell, ...]:
        places: dict[Cell, list[Place]] = {}
        for part in parts:
            rows = [row_of[source] for source in part.sources]
            for cell in part.cells:
                moved = cell._replace(
                    rows=self._one(tuple([rows[row] for row in cell.rows])),
                    shares=self._one(cell.shares),
                    steps=self._one(cell.steps),
                    places=(),
                )
                places.setdefault(moved, []).extend(cell.places)
        return tuple([cell._replace(places=tuple(there)) for cell, there in places.items()])

    def _one(self, value: Value) -> Value:
        """`value`, or an equal one that is there already: a plan pickles each once, and families know them by it."""
        return self._same.setdefault(value, value)  # type: ignore[return-value]  # what is equal is of one type
