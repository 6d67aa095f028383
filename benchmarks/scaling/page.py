"""The generated parts of docs/scaling.md: tables between markers, and pictures."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from benchmarks.scaling.machine import STORAGES, TITLES
from benchmarks.scaling.workload import ROOT
from mergeflow.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.scaling.simulate import Prediction

PAGE = ROOT / "docs" / "scaling.md"
PICTURE = ROOT / "docs" / "pictures" / "scaling.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito's, which remain distinct to the colour-blind."""
MARKS = "osD^"
RESOLUTION = 100
"""Dots per inch."""


def replaced(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with what stands between the markers of `name` replaced; raises `ConfigError` if it has no such pair."""
    begin, end = f"<!-- {name}: made by python -m benchmarks.scaling -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ConfigError(f"{PAGE.name} must have '{begin}' and '{end}' once; put them where the table belongs")
    content = "\n".join([begin, "", *lines, "", end])
    return pattern.sub(lambda _: content, text)


def update(parts: Mapping[str, Sequence[str]]) -> None:
    """Write tables into the page."""
    text = PAGE.read_text("utf-8")
    for name, lines in parts.items():
        text = replaced(text, name, lines)
    PAGE.write_text(text, "utf-8")


def draw(cells: Mapping[tuple[str, int, int], Prediction]) -> None:
    """The picture: a panel for each storage, a line for each number of models; the bound is dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, storage in zip(panels, STORAGES, strict=True):
        counts = sorted({models for name, models, _ in cells if name == storage})
        nodes = sorted({size for name, _, size in cells if name == storage})
        for models, colour, mark in zip(counts, COLOURS, MARKS, strict=True):
            found = [cells[storage, models, size] for size in nodes]
            axes.plot(nodes, [one.seconds for one in found], mark, ls="-", color=colour, label=f"{models:,} models")
            axes.plot(nodes, [one.bound.seconds for one in found], "--", color=colour, linewidth=0.8)
        axes.set_title(TITLES[storage], loc="left", fontsize=11)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(nodes, [str(size) for size in nodes])
        axes.set_yticks([60, 600, 3600, 36000, 360000], ["1 min", "10 min", "1 h", "10 h", "100 h"])
        axes.minorticks_off()
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].legend(fontsize=9)
    figure.supxlabel("nodes", fontsize=10)
    figure.supylabel("time from the command to the file; dashed: the bound", fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=RESOLUTION)
    PICTURE.write_bytes(drawn.getvalue())
