"""The methods alone, in memory: what `benchmarks.arithmetic` measures, as a section of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import arithmetic
from benchmarks.figures import Figure
from benchmarks.place import machine
from benchmarks.section import Section, settings_of
from benchmarks.tables import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.tables import Cell


def measure(wanted: Options, place: Path) -> Section:
    """A table of what `benchmarks.arithmetic` measures, row by row."""
    rows = arithmetic.measure(wanted.rounds)
    told = {"rounds": settings_of(wanted)["rounds"]}
    return Section("arithmetic", (table(rows),), told, machine(place))


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each; columns in the order in which they first come."""
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(columns, tuple(tuple(_cell(row.get(name)) for name in columns) for row in rows))


def _cell(value: Any) -> Cell:
    """A word, a count or a figure as it is; a bare number, or a map of median, low and high, becomes a figure."""
    if value is None or isinstance(value, str | int | Figure):
        return value
    if isinstance(value, float):
        return Figure(value, value, value, "")
    return Figure(**{"unit": "", "rounds": 2, **value})
