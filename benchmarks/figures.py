"""Figures: what is measured several times, in rounds, and told as a median with its spread."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    Key = TypeVar("Key", bound=Hashable)
    Value = TypeVar("Value")


class Figure(NamedTuple):
    """One measured figure."""

    median: float
    low: float
    high: float
    unit: str
    """`s`, `B`, `B/s`, or `x` for a ratio."""
    rounds: int = 1


def figure(values: Sequence[float], unit: str = "s") -> Figure:
    """The median of what several rounds gave, and its spread.

    >>> figure([3.0, 1.0, 2.0])
    Figure(median=2.0, low=1.0, high=3.0, unit='s', rounds=3)
    """
    return Figure(statistics.median(values), min(values), max(values), unit, len(values))


def ratio(over: Sequence[float], under: Sequence[float]) -> Figure:
    """How much one is of the other, round by round: what slows a whole round down cancels out.

    >>> ratio([2.0, 6.0], [1.0, 2.0])
    Figure(median=2.5, low=2.0, high=3.0, unit='x', rounds=2)
    """
    return figure([one / other for one, other in zip(over, under, strict=True)], "x")


def interleaved(acts: Mapping[Key, Callable[[], Value]], rounds: int) -> dict[Key, list[Value]]:
    """What each act gave in every round.

    Each round begins with another act, so that none always comes after the same one.
    """
    order = list(acts)
    gave: dict[Key, list[Value]] = {key: [] for key in order}
    for number in range(rounds):
        start = number % len(order)
        for key in order[start:] + order[:start]:
            gave[key].append(acts[key]())
    return gave
