"""The page that figures are put into: its tables between markers, its pictures beside it, and all as data.

What one case has found replaces what stood between its markers; everything else on the page stays as it is.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.section import to_json
from benchmarks.tables import markdown, put

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.section import Picture, Section

PAGE, DATA, PICTURES = "performance.md", "performance", "pictures"
WIDTH, HEIGHT, DOTS = 8.0, 4.2, 110
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which remain distinct to the colour-blind."""


def publish(section: Section, docs: Path) -> list[Path]:
    """Put a section into the page below `docs`; returns what was written."""
    data = docs / DATA / f"{section.case}.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(to_json(section), indent=1, ensure_ascii=False) + "\n", "utf-8")
    written = [data]
    for picture in section.pictures:
        path = docs / PICTURES / f"performance-{picture.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(picture, path)
        written.append(path)
    page = docs / PAGE
    page.write_text(put(page.read_text("utf-8"), section.case, content(section)), "utf-8")
    return [*written, page]


def content(section: Section) -> str:
    """What stands between the markers of a section."""
    settings = ", ".join(f"{name} {value}" for name, value in section.settings.items())
    machine = ", ".join(f"{name} {value}" for name, value in section.machine.items())
    pictures = [f"![{one.title}]({PICTURES}/performance-{one.name}.png)" for one in section.pictures]
    told = f"*Measured with {settings}; on {machine}.*"
    return "\n\n".join([*map(markdown, section.tables), *pictures, told])


def draw(picture: Picture, path: Path) -> None:
    """Draw lines where x is a number, bars where it is a word."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DOTS, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(len(picture.series), 1)
    for number, series in enumerate(picture.series):
        colour = COLOURS[number % len(COLOURS)]
        spread = [
            [middle - low for middle, low in zip(series.y, series.low, strict=True)],
            [high - middle for middle, high in zip(series.y, series.high, strict=True)],
        ]
        if picture.ticks:
            x = [place + (number - (len(picture.series) - 1) / 2) * width for place in series.x]
            axes.bar(x, series.y, width, yerr=spread, label=series.label, color=colour, capsize=3)
        else:
            axes.errorbar(series.x, series.y, spread, label=series.label, color=colour, marker="o", capsize=3)
    if picture.ticks:
        axes.set_xticks(range(len(picture.ticks)), picture.ticks)
    elif picture.logarithmic:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set(title=picture.title, xlabel=picture.x, ylabel=picture.y)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    # What matplotlib would write of itself changes with every version of it.
    figure.savefig(path, metadata={"Software": None}, pil_kwargs={"optimize": True})
