"""The floor: the same bytes merely read, and those of the output merely written and synced, as fast as it goes.

The ways are tried on one file; the best two read all files in every round.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import disk
from benchmarks.figures import Figure, figure, interleaved
from benchmarks.place import emptied, machine
from benchmarks.section import Section, settings_of
from benchmarks.synthetic import sdxl, sdxl_models
from benchmarks.tables import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.tables import Cell

FITS = 0.4
"""Of the machine's memory: so much of it may the files take that are read from the page cache."""
TRIED = 2 << 30
"""Bytes of a file on which a way is tried, at most."""
BEST = 2
"""How many ways of reading are tried again in every round."""


class Floor(NamedTuple):
    """Seconds of one round."""

    read: float
    write: float
    """Written and synced."""
    both: float
    """Read, and written and synced, at once."""

    @property
    def seconds(self) -> float:
        """The least that a merge would need: the one after the other or both at once, whichever is faster."""
        return min(self.read + self.write, self.both)


class Ways(NamedTuple):
    """The fastest ways here."""

    cold: tuple[disk.Way, ...]
    warm: tuple[disk.Way, ...]
    write: disk.Way
    tried: tuple[tuple[disk.Way, float | None, float], ...]
    """Every way of reading with its rate, cold and warm, in bytes per second; O_DIRECT is never warm."""


@lru_cache(maxsize=4)
def ways(path: Path, out: Path, size: int) -> Ways:
    """Try every way to read the beginning of one file and to write as many bytes."""
    tried = []
    tried_size = min(size, TRIED)
    for way in disk.READS:
        with suppress(OSError):  # not every file system knows O_DIRECT
            disk.drop([path])
            cold = tried_size / disk.read([path], way, tried_size)
            warm = math.nan if way.direct else tried_size / disk.read([path], way, tried_size)
            tried.append((way, warm, cold))
    cold_ways = sorted(tried, key=lambda one: -one[2])[:BEST]
    warm_ways = sorted((one for one in tried if not one[0].direct), key=lambda one: -one[1])[:BEST]
    return Ways(
        tuple(way for way, *_ in cold_ways),
        tuple(way for way, *_ in warm_ways),
        disk.best_write(emptied(out), tried_size),
        tuple((way, None if way.direct else warm, cold) for way, warm, cold in tried),
    )


def floor(paths: Sequence[Path], out: Path, size: int, found: Ways, cold: bool) -> Floor:
    """Measure the floor once: all files read, `size` bytes written."""

    def ready() -> None:
        if cold:
            disk.drop(paths)

    reads = {}
    for way in found.cold if cold else found.warm:
        ready()
        reads[way] = disk.read(paths, way)
    best = min(reads, key=reads.__getitem__)
    written = disk.write([emptied(out) / "written"], size, found.write)
    emptied(out)
    ready()
    both = disk.both(paths, out / "written", size, best, found.write)
    emptied(out)
    return Floor(reads[best], written, both)


def warm_scale(wanted: Options) -> float:
    """The largest scale, up to the one wanted, at which all models fit into the page cache beside everything else."""
    scale = wanted.scale
    while wanted.models * sdxl(scale).size > FITS * disk.memory_bytes():
        scale /= 2
    return scale


def measure(wanted: Options, place: Path) -> Section:
    """Every way to read one file, and in rounds the floor of all files."""
    tables: list[Table] = []
    rows: list[tuple[Cell, ...]] = []
    for cold, scale in ((True, wanted.scale), (False, warm_scale(wanted))):
        paths, like = sdxl_models(place, wanted.models, scale)
        found = ways(paths[0], place / "out", like.size)
        state = disk.drop(paths) if cold else "warm"
        if not cold:
            disk.warm(paths)
        act = partial(floor, paths, place / "out", like.size, found, cold)
        took = interleaved({"floor": act}, wanted.rounds)["floor"]
        total = like.size * wanted.models
        rows += [
            (state, "read", total, figure([one.read for one in took]), _rate([total / one.read for one in took])),
            (
                state,
                "write, sync",
                like.size,
                figure([one.write for one in took]),
                _rate([like.size / one.write for one in took]),
            ),
            (state, "both at once", total + like.size, figure([one.both for one in took]), None),
        ]
        if cold:
            best = ", or ".join(map(str, found.cold))
            note = f"Read: {best}. Written: {found.write}. Warm: {', or '.join(map(str, found.warm))}."
            tables.append(_ways(found, like.size))
    tables.insert(0, Table(("", "", "bytes", "seconds", "rate"), tuple(rows), "In the fastest ways", note))
    return Section("floor", tuple(tables), settings_of(wanted), machine(place))


def _rate(values: Sequence[float]) -> Figure:
    return figure(values, "B/s")


def _ways(found: Ways, size: int) -> Table:
    rows = tuple(
        (str(way), Figure(cold, cold, cold, "B/s"), None if warm is None else Figure(warm, warm, warm, "B/s"))
        for way, warm, cold in found.tried
    )
    return Table(("way", "cold", "warm"), rows, f"Every way to read {min(size, TRIED) / 1e9:.2f} GB of one file, once")
