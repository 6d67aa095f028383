"""How two files differ, as a picture: how far apart the elements are, and where the differences lie."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.compare.ulp import BOUNDS
from mergeflow.errors import ConfigError
from mergeflow.report.comparison import share_of
from mergeflow.report.comparison_json import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from mergeflow.compare.result import Block, Comparison, Difference

WIDTH, PANEL, BESIDE = 13.0, 1.5, 1.6
"""Inches: the picture, the height of one component, and what titles and axes need."""
LEAST_PANELS, MOST_PANELS = 3, 8
RESOLUTION = 150
"""Dots per inch."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, which remain distinct to the colour-blind."""
MARKERS = "osD^vP*X"
SHOWN_BINS = 9
"""The least number of bins on the axis: up to 128 ULP."""
CROWDED = 14
"""From so many bins on their labels stand upright."""
DECADES = 2
"""The least height of the logarithmic axis of shares."""
ASIDE = 0.08
"""How far the points of one component lie beside those of the next, in bins, so that none hides another."""
MOST_LINEAR = 100
"""How many times as large as the smallest the largest may be on an axis that begins at 0."""
GAP = 1.0
"""Between the stages of a component, in blocks."""
TICKS = 24
"""Numbers of blocks below one panel; where there are more, some are left out."""


class Shown(NamedTuple):
    """A component that is drawn, and how."""

    difference: Difference
    blocks: Sequence[Block]
    colour: str
    marker: str


def draw(comparison: Comparison, path: str) -> None:
    """Write a PNG to `path`.

    Left: which share of each component's elements is how many ULP apart. Right: the relative L2 difference of each
    component by depth. With more than eight components, the eight that differ most are drawn. Raises `ConfigError` if
    matplotlib is not installed, `StorageError` if the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures are drawn with matplotlib; install it: pip install 'mergeflow[plots]'") from error
    shown = _shown(comparison)
    height = BESIDE + PANEL * max(len(shown), LEAST_PANELS)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    _title(figure, comparison, len(comparison.components) - len(shown))
    halves = figure.add_gridspec(1, 2, width_ratios=(1, 1.35))
    _distances(figure.add_subfigure(halves[0]).subplots(), shown)
    _depths(figure.add_subfigure(halves[1]), shown)
    _save(figure, path)


def _shown(comparison: Comparison) -> list[Shown]:
    """The components to draw, in their order."""
    some = [part for part in comparison.components if part.statistics.elements]
    worst = {part.component for part in sorted(some, key=lambda part: -part.statistics.relative_l2)[:MOST_PANELS]}
    blocks = comparison.blocks()
    kept = [part for part in some if part.component in worst]
    return [
        Shown(part, [block for block in blocks if block.component == part.component], colour, marker)
        for part, colour, marker in zip(kept, COLOURS, MARKERS, strict=False)
    ]


def _title(figure: Figure, comparison: Comparison, left_out: int) -> None:
    """Which files these are."""
    names = [Path(side.path).name.encode(errors="replace").decode() for side in (comparison.a, comparison.b)]
    more = f"\n({left_out} component(s) are not shown)" if left_out else ""
    # A name may hold a $, which is not the beginning of a formula.
    figure.suptitle(f"a: {names[0]}\nb: {names[1]}{more}", x=0.01, ha="left", fontsize=12, parse_math=False)


def _distances(axes: Axes, shown: Sequence[Shown]) -> None:
    """The histogram: a line for each component."""
    axes.set_title("How far apart elements are", loc="left", fontsize=11)
    axes.set_xlabel("distance in ULP: more than the number before, up to this one (Ki: 1,024)")
    axes.set_ylabel("share of the component's elements")
    if not shown:
        axes.text(0.5, 0.5, "nothing could be compared", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    last = max(n for part in shown for n, count in enumerate(part.difference.statistics.histogram) if count or not n)
    last = max(last, SHOWN_BINS - 1)
    lowest = 1.0
    for number, part in enumerate(shown):
        found = part.difference.statistics
        shares = [count / found.elements or math.nan for count in found.histogram[: last + 1]]
        lowest = min([lowest, *(share for share in shares if share > 0)])
        aside = ASIDE * (number - (len(shown) - 1) / 2)
        axes.plot(
            [n + aside for n in range(last + 1)],
            shares,
            color=part.colour,
            marker=part.marker,
            markersize=5,
            linewidth=1.3,
            label=part.difference.component,
        )
    axes.set_yscale("log")
    axes.set_ylim(0.8 * 10 ** min(math.floor(math.log10(lowest)), -DECADES), 1.6)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xticks(
        range(last + 1), [_bin_label(n) for n in range(last + 1)], rotation=0 if last < CROWDED else 90, fontsize=8
    )
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    legend = axes.legend(loc="best", frameon=True, framealpha=0.9, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _percent(share: float, _: object = None) -> str:
    return f"{100 * share:g} %"


def _bin_label(number: int) -> str:
    if number == len(BOUNDS):
        return "more"
    bound, letter = BOUNDS[number], ""
    for unit in ("Ki", "Mi", "Gi"):
        if bound >= 1024:
            bound, letter = bound // 1024, unit
    return f"{bound}{letter}"


def _depths(figure: SubFigure, shown: Sequence[Shown]) -> None:
    """The relative L2 difference of every block: a panel for each component, all on one scale."""
    if not shown:
        return
    figure.suptitle("Where the differences are", x=0.07, ha="left", fontsize=11)
    figure.supylabel("relative L2 difference, |a - b| / |a|", fontsize=10)
    sizes = [block.statistics.relative_l2 for part in shown for block in part.blocks]
    sizes = [size for size in sizes if 0 < size < math.inf] or [1.0]
    panels = figure.subplots(len(shown), 1, squeeze=False, sharey=True)[:, 0]
    if max(sizes) > MOST_LINEAR * min(sizes):
        panels[0].set_yscale("log")
        panels[0].set_ylim(10 ** math.floor(math.log10(min(sizes)) - 0.2), 2 * max(sizes))
    else:
        panels[0].set_ylim(0, 1.15 * max(sizes))
    for axes, part in zip(panels, shown, strict=True):
        _panel(axes, part)
    figure.supxlabel(
        "numbers are blocks, names what they are blocks of; rest: all other tensors of the component\n"
        "hollow, at the bottom: no element differs       x, at the top: NaN or infinity, or a is nothing but zeros",
        fontsize=8.5,
        color="0.35",
    )


def _panel(axes: Axes, part: Shown) -> None:
    """One component: its blocks from left to right, a gap between one stage and the next."""
    axes.set_title(_said(part.difference), loc="left", fontsize=10, color=part.colour, parse_math=False)
    bottom, top = axes.get_ylim()
    places = _places(part.blocks)
    for place, block in zip(places, part.blocks, strict=True):
        found = block.statistics
        if found.nonfinite or found.relative_l2 == math.inf:
            axes.plot(place, top, "x", color=part.colour, markersize=7, markeredgewidth=2, clip_on=False)
            continue
        size, face = max(found.relative_l2, bottom), part.colour if found.differing else "white"
        axes.vlines(place, bottom, size, color=part.colour, linewidth=1.5, alpha=0.45)
        axes.plot(
            place, size, part.marker, color=part.colour, markerfacecolor=face, markersize=5.5, clip_on=False, zorder=3
        )
    _name_blocks(axes, part.blocks, places)
    axes.grid(True, axis="y", which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize=8)


def _said(difference: Difference) -> str:
    """A component in one line."""
    found = difference.statistics
    if not found.differing:
        return f"{difference.component}: all {found.elements:,} elements are equal"
    said = f"{difference.component}: {share_of(found.differing, found.elements)} of {found.elements:,} elements differ"
    if found.nonfinite:
        said += f", {found.nonfinite:,} by NaN or infinity"
    return f"{said}, relative L2 {found.relative_l2:.2g}"


def _places(blocks: Sequence[Block]) -> list[float]:
    """Where each block stands on the axis."""
    places: list[float] = []
    for number, block in enumerate(blocks):
        new = number > 0 and block.stage != blocks[number - 1].stage
        places.append((places[-1] + 1 + GAP * new) if places else 0.0)
    return places


def _name_blocks(axes: Axes, blocks: Sequence[Block], places: Sequence[float]) -> None:
    """The numbers of the blocks as ticks, and below them the names of the stages."""
    step = math.ceil(len(blocks) / TICKS)
    ticks = [(place, block.number) for place, block in zip(places, blocks, strict=True) if block.number is not None]
    kept = [(place, number) for place, number in ticks if number % step == 0]
    axes.set_xticks([place for place, _ in kept], [str(number) for _, number in kept], fontsize=8)
    axes.set_xlim(places[0] - 1, places[-1] + 1)
    stages = dict.fromkeys(block.stage for block in blocks)
    for stage in stages:
        mine = [place for place, block in zip(places, blocks, strict=True) if block.stage == stage]
        axes.annotate(
            stage or "rest",
            (sum(mine) / len(mine), 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8.5,
            parse_math=False,
        )


def _save(figure: Figure, path: str) -> None:
    """The picture, whole or not at all."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is no reason to fail
        figure.savefig(drawn, format="png", dpi=RESOLUTION)
    write_whole(Path(path), drawn.getvalue())
