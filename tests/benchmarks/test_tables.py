from __future__ import annotations

import json

import pytest

from benchmarks.figures import Figure
from benchmarks.section import Picture, Section, bars, line, of_json, to_json
from benchmarks.tables import Cell, Table, markdown, put, text
from mergeflow.errors import ConfigError

TABLE = Table(
    ("what", "seconds", "models"),
    (("read", Figure(1.25, 1.0, 2.0, "s", 3), 1234), ("write", None, 2)),
    "Title",
    "A note.",
)


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        pytest.param(None, "-", id="nothing"),
        pytest.param("word", "word", id="a word"),
        pytest.param(1234567, "1,234,567", id="a count"),
        pytest.param(Figure(0.0123, 0.01, 0.02, "s", 2), "12.30 ms (10.00 to 20.00)", id="milliseconds"),
        pytest.param(Figure(1.5, 1.5, 1.5, "s", 1), "1.50 s", id="one round"),
        pytest.param(Figure(250.0, 249.0, 260.0, "s", 2), "250.0 s (249.0 to 260.0)", id="minutes"),
        pytest.param(Figure(1.019, 0.9, 1.1, "x", 5), "1.02x (0.90 to 1.10)", id="a ratio"),
        pytest.param(Figure(2.5e9, 2e9, 3e9, "B/s", 5), "2.50 GB/s (2.00 GB/s to 3.00 GB/s)", id="a rate"),
        pytest.param(Figure(5e8, 5e8, 5e8, "B"), "500.00 MB", id="bytes"),
        pytest.param(Figure(1.0, 1.0, 1.0, ""), "1.00", id="a bare number"),
    ],
)
def test_a_cell_is_told_in_the_unit_that_suits_it(cell: Cell, shown: str) -> None:
    assert text(cell) == shown


def test_numbers_stand_to_the_right() -> None:
    assert markdown(TABLE).splitlines() == [
        "**Title**",
        "",
        "| what | seconds | models |",
        "|---|---:|---:|",
        "| read | 1.25 s (1.00 to 2.00) | 1,234 |",
        "| write | - | 2 |",
        "",
        "A note.",
    ]


def test_a_section_survives_as_json() -> None:
    figures = [Figure(1.0, 0.5, 2.0, "s", 3)]
    pictures = (
        Picture("one", "Title", "x", "y", (line("a", [4], figures),), (), True),
        Picture("two", "Title", "", "y", (bars("b", figures),), ("cold",)),
    )
    section = Section("floor", (TABLE,), {"models": 5}, {"memory": "1 GB"}, pictures)
    assert of_json(json.loads(json.dumps(to_json(section)))) == section


def test_what_is_put_between_markers_replaces_what_stood_there_and_nothing_else() -> None:
    page = "above\n<!-- a: begin -->\nold\n<!-- a: end -->\nbetween\n<!-- b: begin -->\nkept\n<!-- b: end -->\n"
    new = put(page, "a", r"| \1 |")
    assert new == page.replace("\nold\n", "\n\n| \\1 |\n\n")
    assert put(new, "a", r"| \1 |") == new


def test_a_page_without_the_markers_is_refused() -> None:
    with pytest.raises(ConfigError, match="<!-- c: begin -->"):
        put("no markers", "c", "table")
