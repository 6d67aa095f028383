"""The series that is typed, in plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.config import schema
from mergeflow.config.paths import absolute
from mergeflow.errors import ConfigError
from mergeflow.recipe.request import SeriesRequest
from mergeflow.recipe.series import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator


def to_series(series: schema.Series) -> SeriesRequest | None:
    """What is asked for, if `series_problems` has found nothing wrong with it."""
    if series.kind is schema.SeriesKind.none:
        return None
    return SeriesRequest(
        kind=series.kind.value,
        components=(series.components,) if isinstance(series.components, str) else tuple(series.components),
        selection=series.selection,
        target=series.target,
        base=absolute(series.base) if series.base and series.base.endswith(SUFFIX) else series.base,
        write=series.write.value,
        with_base=series.with_base,
    )


def series_problems(series: schema.Series) -> Iterator[ConfigError]:
    """Options that would have no effect, and what is no list of names."""
    if series.kind is schema.SeriesKind.none:
        for name, usual in vars(schema.Series()).items():
            if vars(series)[name] != usual:
                yield ConfigError(
                    f"series.{name} has no effect without a series; give series=swap, leave_one_out or add_one"
                )
        return
    named = [series.components] if isinstance(series.components, str) else series.components
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        yield ConfigError(f"series.components is {series.components!r}; give a list of names, as in [te0] or [te0,te1]")
