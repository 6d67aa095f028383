"""What a case has found out: tables, and how they are drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.tables import Table, plain, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.figures import Figure
    from benchmarks.options import Options

NOT_TOLD = ("dir", "keep", "peers", "small")
"""Options that no figure depends on."""


@dataclass(frozen=True)
class Series:
    """One line or one row of bars of a picture: values by x, each with what it ranged over."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Picture:
    """A picture of figures, as lines where x is a number."""

    name: str
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    ticks: tuple[str, ...] = ()
    """Words at x = 0, 1, 2 and so on: bars then, not lines."""
    logarithmic: bool = False
    """Whether the horizontal axis is."""


@dataclass(frozen=True)
class Section:
    """A case's part of the page."""

    case: str
    tables: tuple[Table, ...]
    settings: dict[str, Any]
    machine: dict[str, str]
    pictures: tuple[Picture, ...] = ()


def bars(label: str, figures: Sequence[Figure]) -> Series:
    """A row of bars."""
    return line(label, range(len(figures)), figures)


def line(label: str, x: Iterable[float], figures: Sequence[Figure]) -> Series:
    """A line through medians, with their spread."""
    places = tuple(map(float, x))
    return Series(
        label,
        places,
        tuple(one.median for one in figures),
        tuple(one.low for one in figures),
        tuple(one.high for one in figures),
    )


def settings_of(options: Options) -> dict[str, Any]:
    """What the figures depend on, of what was asked for."""
    return {name: value for name, value in asdict(options).items() if name not in NOT_TOLD}


def to_json(section: Section) -> dict[str, Any]:
    """The section as data; `of_json` is its inverse."""
    return asdict(section) | {"tables": [plain(table) for table in section.tables]}


def of_json(data: dict[str, Any]) -> Section:
    """The section that `to_json` made data of."""
    tables = tuple(table_of(table) for table in data["tables"])
    return Section(**data | {"tables": tables, "pictures": tuple(map(_picture_of, data["pictures"]))})


def _picture_of(data: dict[str, Any]) -> Picture:
    series = tuple(
        Series(line["label"], *(tuple(line[name]) for name in ("x", "y", "low", "high"))) for line in data["series"]
    )
    return Picture(**data | {"ticks": tuple(data["ticks"]), "series": series})
