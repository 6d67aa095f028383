"""Tables of figures as Markdown and as plain data, and the sections of a page that they are put into."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeAlias

from benchmarks.figures import Figure
from mergeflow.errors import ConfigError
from mergeflow.tensors import si_bytes

LEAST_SECONDS, MANY_SECONDS = 0.1, 100.0
"""Less is told in milliseconds, more without hundredths."""

Cell: TypeAlias = "str | int | Figure | None"


class Table(NamedTuple):
    """One table; a cell is a word, a count, a figure, or None where nothing was measured."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""
    """What has to be known to read it."""


def text(cell: Cell) -> str:
    """A cell for a person.

    >>> text(Figure(1.234, 1.2, 1.3, "s", 3))
    '1.23 s (1.20 to 1.30)'
    >>> text(Figure(2.5e9, 2.5e9, 2.5e9, "B/s"))
    '2.50 GB/s'
    """
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    if cell.unit in ("B", "B/s"):
        middle, low, high = (si_bytes(value) + cell.unit[1:] for value in (cell.median, cell.low, cell.high))
    else:
        factor, unit, digits = _shown(cell)
        middle, low, high = (f"{value * factor:.{digits}f}" for value in (cell.median, cell.low, cell.high))
        middle += unit
    return middle if cell.rounds < 2 else f"{middle} ({low} to {high})"


def _shown(cell: Figure) -> tuple[float, str, int]:
    """What the values of a figure are multiplied by, the unit behind them, and how many digits they have."""
    if cell.unit != "s":
        return 1, cell.unit, 2
    if cell.median < LEAST_SECONDS:
        return 1000, " ms", 2
    return 1, " s", 1 if cell.median >= MANY_SECONDS else 2


def markdown(table: Table) -> str:
    """The table as Markdown, numbers to the right."""
    rows = [[text(cell) for cell in row] for row in table.rows]
    numbers = [all(not isinstance(row[column], str) for row in table.rows) for column in range(len(table.columns))]
    lines = [f"**{table.title}**", ""] if table.title else []
    lines += [
        f"| {' | '.join(table.columns)} |",
        f"|{'|'.join('---:' if number else '---' for number in numbers)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def plain(table: Table) -> dict[str, Any]:
    """The table as data for JSON; `table_of` is its inverse."""
    rows = [[cell._asdict() if isinstance(cell, Figure) else cell for cell in row] for row in table.rows]
    return {"title": table.title, "note": table.note, "columns": list(table.columns), "rows": rows}


def table_of(data: dict[str, Any]) -> Table:
    """The table that `plain` made data of."""
    rows = tuple(tuple(Figure(**cell) if isinstance(cell, dict) else cell for cell in row) for row in data["rows"])
    return Table(tuple(data["columns"]), rows, data["title"], data["note"])


def put(page: str, name: str, content: str) -> str:
    """`page` with `content` between the two markers called `name`; raises `ConfigError` where they are not there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    found = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    if len(found.findall(page)) != 1:
        raise ConfigError(f"the page has not one pair of {begin} and {end}; add them where '{name}' belongs")
    return found.sub(lambda match: f"{match[1]}\n{content.strip()}\n\n{match[2]}", page)
