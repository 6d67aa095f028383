"""How two files differ, for people: tables that are read on 110 columns."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mergeflow.compare.ulp import BOUNDS
from mergeflow.report.comparison_json import NAME
from mergeflow.tensors import si_bytes
from mergeflow.text import LONGEST_PATH, shown, some

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.compare.result import Comparison, Difference
    from mergeflow.compare.statistics import Peak, Statistics
    from mergeflow.tensors import Checkpoint

WIDEST = 10_000
"""Columns; a path or a key that is folded cannot be copied."""
SHOWN_BOUNDS = (0, 1, 2, 4, 8, 16, 256, 65536)
"""The bins of the table: a few of those that are counted, the others added to the next."""
NONE = "-"
"""What there is nothing to say about."""


def table(comparison: Comparison) -> str:
    """A verdict, one row for each component, the distances in ULP, and what tells where the differences are."""
    parts = [_facts(comparison)]
    if comparison.total.tensors:
        parts += [_components(comparison), _distances(comparison)]
    parts += [
        part for part in (_peaks(comparison), _mismatches(comparison.total), _worst(comparison)) if part.row_count
    ]
    console = Console(width=WIDEST, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        for number, part in enumerate(parts):
            console.print(*[""] * bool(number), part, sep="\n")
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def verdict(comparison: Comparison) -> str:
    """What came out, in one sentence."""
    total, found = comparison.total, comparison.total.statistics
    if not total.tensors:
        return "nothing could be compared: no tensor is in both files with the same name and shape"
    if total.equal:
        return f"equal: {_count(total.tensors, 'tensor')} with {found.elements:,} elements, all of the same value"
    if found.differing:
        said = (
            f"{found.differing:,} of {found.elements:,} elements differ ({share_of(found.differing, found.elements)})"
        )
    else:
        said = f"all {found.elements:,} elements that were compared are equal"
    unmatched = len(total.only_a) + len(total.only_b) + len(total.shapes)
    return f"{said}; {_count(unmatched, 'tensor')} could not be compared" if unmatched else said


def _facts(comparison: Comparison) -> Table:
    rows = _plain()
    for side in (comparison.a, comparison.b):
        tensors = _count(len(side.header.tensors), "tensor")
        rows.add_row(side.id, shown(side.path, LONGEST_PATH))
        rows.add_row("", f"{si_bytes(side.stat.size)}, {tensors}: {_dtypes(side)}")
    rows.add_row("result", verdict(comparison))
    rate = comparison.bytes_read / 1e9 / max(comparison.seconds, 1e-9)
    rows.add_row("took", f"{comparison.seconds:.1f} s for {si_bytes(comparison.bytes_read)}, {rate:.2f} GB/s")
    return rows


def _dtypes(side: Checkpoint) -> str:
    counted = Counter(info.dtype.code for info in side.header.tensors.values())
    return ", ".join(f"{count:,} {code}" for code, count in counted.most_common()) or "none"


def _components(comparison: Comparison) -> Table:
    """One row of numbers for each component, and one for all."""
    made = Table(box=None, pad_edge=False)
    for name in (
        "component",
        "tensors",
        "elements",
        "differ",
        "share",
        "max |a-b|",
        "max ULP",
        "relative L2",
        "cosine",
    ):
        made.add_column(name, justify="left" if name == "component" else "right", no_wrap=True)
    for difference in _listed(comparison):
        found = difference.statistics
        made.add_row(
            difference.component,
            f"{difference.tensors:,}",
            f"{found.elements:,}",
            f"{found.differing:,}",
            share_of(found.differing, found.elements),
            _number(found.largest.size) if found.largest else "0",
            _ulp(found.furthest.size) if found.furthest else "0",
            _number(found.relative_l2) if found.elements else NONE,
            _cosine(found),
        )
    return made


def _distances(comparison: Comparison) -> Table:
    """Which share of the elements is how far apart."""
    made = Table(box=None, pad_edge=False)
    made.add_column("ULP apart", no_wrap=True)
    for low, high in zip((-1, *SHOWN_BOUNDS), SHOWN_BOUNDS, strict=False):
        made.add_column(f"{high:,}" if high - low == 1 else f"{low + 1:,}-{high:,}", justify="right", no_wrap=True)
    made.add_column("more", justify="right", no_wrap=True)
    ends = [BOUNDS.index(bound) + 1 for bound in SHOWN_BOUNDS]
    for difference in _listed(comparison):
        bins = difference.statistics.histogram
        counts = [sum(bins[begin:end]) for begin, end in zip([0, *ends], [*ends, len(bins)], strict=True)]
        elements = difference.statistics.elements
        made.add_row(difference.component, *(share_of(count, elements) if count else NONE for count in counts))
    return made


def _listed(comparison: Comparison) -> list[Difference]:
    several = len(comparison.components) > 1
    return [*comparison.components, comparison.total] if several else list(comparison.components)


def _peaks(comparison: Comparison) -> Table:
    """Where the largest differences are, and what their numbers mean."""
    rows = _plain()
    found = comparison.total.statistics
    if found.largest:
        _add_peak(rows, "max |a-b|", _number(found.largest.size), found.largest)
    if found.furthest:
        _add_peak(rows, "max ULP", _ulp(found.furthest.size), found.furthest)
        units = Counter(tensor.unit for tensor in comparison.tensors)
        names = [f"{unit.code if unit else 'whole numbers'} in {count:,}" for unit, count in units.most_common()]
        rows.add_row("ULP", f"of {', '.join(names)} tensor(s)")
    if found.nonfinite:
        rows.add_row("NaN, inf", f"{found.nonfinite:,} of those that differ: NaN or infinite in one file only")
        rows.add_row("", "(they are in no other number of this table)")
    return rows


def _add_peak(rows: Table, label: str, size: str, peak: Peak) -> None:
    rows.add_row(label, f"{size}: a has {peak.a:.9g}, b has {peak.b:.9g}")
    rows.add_row("", f"in element {peak.element:,} of {shown(peak.key)}")


def _mismatches(total: Difference) -> Table:
    """Tensors that are not in both files, or not of one kind."""
    rows = _plain()
    for label, keys in (("only in a", total.only_a), ("only in b", total.only_b)):
        _add_keys(rows, label, keys)
    shapes = [f"{shown(match.key)}: {list(match.a.shape)} and {list(match.b.shape)}" for match in total.shapes]
    _add_keys(rows, "shapes", shapes)
    if total.dtypes:
        kinds = Counter((match.a.dtype.code, match.b.dtype.code) for match in total.dtypes)
        names = [f"{a} and {b} in {count:,}" for (a, b), count in kinds.most_common()]
        rows.add_row("dtypes", f"{some(names)} tensor(s), compared by value")
    return rows


def _add_keys(rows: Table, label: str, names: Sequence[str], limit: int = 3) -> None:
    for number, name in enumerate(names[:limit]):
        rows.add_row("" if number else label, shown(name))
    if len(names) > limit:
        rows.add_row("", f"and {len(names) - limit:,} more, in {NAME}")


def _worst(comparison: Comparison) -> Table:
    """The tensors that differ most."""
    made = Table(box=None, pad_edge=False, show_header=bool(comparison.worst()))
    for name in ("rel. L2", "share", "tensors that differ most"):
        made.add_column(name, justify="left" if "tensors" in name else "right", no_wrap=True)
    for tensor in comparison.worst():
        found = tensor.statistics
        size = "NaN, inf" if found.nonfinite else _number(found.relative_l2)
        made.add_row(size, share_of(found.differing, found.elements), shown(tensor.key))
    return made


def _plain() -> Table:
    """A table of facts: what, and which."""
    made = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(2):
        made.add_column(no_wrap=True)
    return made


def share_of(count: int, of: int) -> str:
    """Per cent, for a person; neither none nor all is said of what is only nearly so."""
    if not of:
        return NONE
    if count in (0, of):
        return f"{100 * count // of} %"
    percent = 100 * count / of
    return "<0.01 %" if percent < 0.01 else ">99.99 %" if percent > 99.99 else f"{percent:.2f} %"


def _cosine(found: Statistics) -> str:
    """Seven digits, rounded down, so that 1 is said only of what is equal."""
    if found.cosine is None:
        return NONE
    return "1" if found.cosine == 1 and not found.squares_difference else f"{math.floor(found.cosine * 1e7) / 1e7:.7f}"


def _ulp(distance: float) -> str:
    return f"{distance:,}" if distance < 1e8 else f"{distance:.2e}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
