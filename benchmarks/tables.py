"""Tables of figures as Markdown and as plain data, and the sections of a page that they are put into."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeAlias

from benchmarks.figures import Figure
from mergeflow.errors import ConfigError
from mergeflow.tensors import si_bytes

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
    middle = _amount(cell.median, cell.unit)
    if cell.rounds < 2:
        return middle
    low, high = (_amount(value, cell.unit) for value in (cell.low, cell.high))
    unit = {"s": " s", "x": "x"}.get(cell.unit, "")
    return f"{middle} ({low.removesuffix(unit)} to {high.removesuffix(unit)})"


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        return si_bytes(value)
    if unit == "B/s":
        return f"{si_bytes(value)}/s"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f} {unit}" if unit == "s" else f"{value:.2f}{unit}"


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
