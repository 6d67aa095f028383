"""How long a merge takes beside the floor of the same round, on threads and on Ray, cold and from the page cache."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import disk
from benchmarks.figures import figure, interleaved, ratio
from benchmarks.floor import Floor, floor, warm_scale, ways
from benchmarks.place import emptied, machine
from benchmarks.program import Ran, merge
from benchmarks.section import Picture, Section, bars, settings_of
from benchmarks.synthetic import sdxl_models
from benchmarks.tables import Table
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.tables import Cell

EXECUTORS = ("local", "ray")
FLOOR = "floor"


class Setting(NamedTuple):
    """Where a merge is done, and by how many."""

    executor: str
    workers: int

    def __str__(self) -> str:
        who = "worker" if self.executor == "local" else "actor"
        return f"{self.executor}, {self.workers} {who}{'s' if self.workers > 1 else ''}"

    @property
    def arguments(self) -> list[str]:
        """For the command line."""
        return [f"executor={self.executor}", f"executor.workers={self.workers}"]


class State(NamedTuple):
    """What was measured with the cache in one state."""

    name: str
    size: int
    """Bytes of one model."""
    floors: list[Floor]
    runs: dict[Setting, list[Ran]]


def measure(wanted: Options, place: Path) -> Section:
    """Merge all models into one, cold and warm, with as many workers as cores; and, warm, with one and with two."""
    cores = os.cpu_count() or 1
    usual = [Setting(executor, cores) for executor in EXECUTORS]
    fewer = [Setting(executor, workers) for executor in EXECUTORS for workers in (1, 2) if workers != cores]
    cold = _state(wanted, place, wanted.scale, usual, cold=True)
    warm = _state(wanted, place, warm_scale(wanted), usual + fewer, cold=False)
    tables = (_table(wanted, cold, usual), _table(wanted, warm, [*usual, *fewer]), _scaling(warm, cores))
    return Section("merge", tables, settings_of(wanted), machine(place), (_picture([cold, warm], usual),))


def _state(wanted: Options, place: Path, scale: float, settings: Sequence[Setting], cold: bool) -> State:
    out = place / "out"
    paths, like = sdxl_models(place, wanted.models, scale)
    found = ways(paths[0], out, like.size)
    name = disk.drop(paths) if cold else "warm: from the page cache"
    if not cold:
        disk.warm(paths)

    def run(setting: Setting) -> Ran:
        if cold:
            disk.drop(paths)
        arguments = ["target=single", f"executor.memory={wanted.memory}", *setting.arguments]
        return merge(paths[0].parent, emptied(out), arguments)

    acts: dict[Setting | str, Callable[[], Ran | Floor]] = {setting: partial(run, setting) for setting in settings}
    acts[FLOOR] = partial(floor, paths, out, like.size, found, cold)
    took = interleaved(acts, wanted.rounds)
    emptied(out)
    floors = [one for one in took[FLOOR] if isinstance(one, Floor)]
    return State(name, like.size, floors, {s: [one for one in took[s] if isinstance(one, Ran)] for s in settings})


def _table(wanted: Options, state: State, settings: Sequence[Setting]) -> Table:
    floors = [one.seconds for one in state.floors]
    rows: list[tuple[Cell, ...]] = [
        ("merely read", figure([one.read for one in state.floors]), None, None, None),
        ("merely written and synced", figure([one.write for one in state.floors]), None, None, None),
        ("both: the floor", figure(floors), None, None, None),
    ]
    for setting in settings:
        ran = state.runs[setting]
        seconds = [one.seconds for one in ran]
        rows.append(
            (
                str(setting),
                figure(seconds),
                ratio(seconds, floors),
                figure([one.wall for one in ran]),
                figure([one.startup for one in ran]),
            )
        )
    title = f"{state.name}; {wanted.models} models of {si_bytes(state.size)}"
    title = title[0].upper() + title[1:]
    note = "The seconds of a merge are from its workers being ready to the last byte synced; the rest is its start."
    return Table(("", "seconds", "to the floor", "whole process", "start and end"), tuple(rows), title, note)


def _scaling(state: State, cores: int) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for executor in EXECUTORS:
        one, two = (state.runs[Setting(executor, workers)] for workers in (1, 2))
        gained = ratio([ran.seconds for ran in one], [ran.seconds for ran in two])
        rows.append((executor, gained))
    note = f"Warm, seconds of one over seconds of two, round by round; the machine has {cores} cores."
    return Table(("executor", "how much faster two workers are than one"), tuple(rows), "Two workers", note)


def _picture(states: Sequence[State], settings: Sequence[Setting]) -> Picture:
    ticks = tuple(state.name.partition(":")[0] for state in states)
    series = [bars("floor", [figure([one.seconds for one in state.floors]) for state in states])]
    for setting in settings:
        series.append(bars(str(setting), [figure([one.seconds for one in state.runs[setting]]) for state in states]))
    return Picture("merge", "One merge and the bare storage", "", "seconds", tuple(series), ticks)
