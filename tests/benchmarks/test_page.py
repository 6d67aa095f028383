from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.figures import Figure
from benchmarks.page import publish
from benchmarks.section import Picture, Section, bars, line
from benchmarks.tables import Table

if TYPE_CHECKING:
    from pathlib import Path

ONE, TWO = Figure(1.0, 0.5, 2.0, "s", 3), Figure(3.0, 2.5, 3.5, "s", 3)


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(Picture("a", "Title", "", "s", (bars("b", [ONE, TWO]),), ("cold", "warm")), id="bars"),
        pytest.param(Picture("a", "Title", "n", "s", (line("b", [1, 16], [ONE, TWO]),), (), True), id="lines"),
    ],
)
def test_a_section_is_put_into_the_page_with_its_picture_and_its_data(picture: Picture, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("above\n<!-- floor: begin -->\nold\n<!-- floor: end -->\nbelow\n", "utf-8")
    table = Table(("", "seconds"), (("read", ONE),))
    publish(Section("floor", (table,), {"models": 5}, {"memory": "1 GB"}, (picture,)), tmp_path)
    lines = page.read_text("utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert "| read | 1.00 s (0.50 to 2.00) |" in lines
    assert "![Title](pictures/performance-a.png)" in lines
    assert (tmp_path / "pictures" / "performance-a.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "performance" / "floor.json").read_text())["settings"] == {"models": 5}
