"""The tree by hand: two files become one, which is saved, and so on, as it is done in a web UI.

    python -m benchmarks.byhand A.safetensors B.safetensors C.safetensors --out DIRECTORY

Every merge loads two files with torch and safetensors, computes A (1 - M) + B M in their own dtype, and saves the
result; an intermediate file is deleted once it is merged. The files pair up level by level, and M is the share of B.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors.torch import load_file, save_file

from benchmarks import disk
from benchmarks.figures import Figure, figure, interleaved, ratio
from benchmarks.place import emptied, machine, need
from benchmarks.program import ROOT, apart, merge, output
from benchmarks.section import Picture, Section, bars, settings_of
from benchmarks.synthetic import sdxl_models
from benchmarks.tables import Table
from mergeflow.errors import ExecutorError
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.options import Options
    from benchmarks.program import Ran
    from benchmarks.tables import Cell

FURTHEST = 1.0
"""ULP that mergeflow's tree may be from the files by hand; 0 is expected."""


class Node(NamedTuple):
    """A file of the tree."""

    path: Path
    models: int
    """How many it is made of."""


class Step(NamedTuple):
    """One merge by hand."""

    a: Node
    b: Node
    multiplier: float
    result: Node


class ByHand(NamedTuple):
    """What a tree by hand took."""

    seconds: float
    read: int
    """Bytes."""
    written: int
    """Bytes of all saved files."""
    largest: int
    """The most bytes that saved files had at once."""


def tree(paths: Sequence[Path], out: Path) -> list[Step]:
    """The merges, level by level, in the order in which they are made; who is left over waits for the next level."""
    nodes = [Node(path, 1) for path in paths]
    merges: list[Step] = []
    while len(nodes) > 1:
        level: list[Node] = []
        for a, b in zip(nodes[::2], nodes[1::2], strict=False):
            result = Node(out / f"{len(merges) + 1:03}.safetensors", a.models + b.models)
            merges.append(Step(a, b, b.models / result.models, result))
            level.append(result)
        nodes = level + nodes[2 * len(level) :]
    return merges


def make(paths: Sequence[Path], out: Path) -> ByHand:
    """Do it, in this process; the last file is synced."""
    began = time.perf_counter()
    read = written = largest = 0
    saved: dict[Path, int] = {}
    for step in tree(paths, out):
        read += step.a.path.stat().st_size + step.b.path.stat().st_size
        _make(step)
        saved[step.result.path] = step.result.path.stat().st_size
        written += saved[step.result.path]
        largest = max(largest, sum(saved.values()))
        for node in (step.a, step.b):
            if node.path in saved:
                del saved[node.path]
                node.path.unlink()
    for path in saved:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return ByHand(time.perf_counter() - began, read, written, largest)


def _make(step: Step) -> None:
    theta0, theta1 = load_file(step.a.path), load_file(step.b.path)
    for key, value in theta0.items():
        if value.is_floating_point():
            theta0[key] = value * (1 - step.multiplier) + theta1[key] * step.multiplier
    save_file(theta0, step.result.path, metadata={"format": "pt"})


def measure(wanted: Options, place: Path) -> Section:
    """The tree by hand, the same tree by mergeflow and the exact mean, each with a cold cache."""
    paths, like = sdxl_models(place, wanted.models, wanted.scale)
    need(place, (len(paths) // 2 + 1) * like.size, "the intermediate files by hand")
    hand, out = place / "byhand", place / "out"

    def by_hand() -> ByHand:
        emptied(hand)
        disk.drop(paths)
        command = [sys.executable, "-m", "benchmarks.byhand", *map(str, paths), "--out", str(hand)]
        return ByHand(*json.loads(output(command, ROOT)))

    def ours(method: str) -> Ran:
        disk.drop(paths)
        arguments = [f"method={method}", "target=single", "executor=local", f"executor.memory={wanted.memory}"]
        return merge(paths[0].parent, emptied(out / method), arguments)

    acts: dict[str, Callable[[], ByHand | Ran]] = {
        "by hand": by_hand,
        "pairwise": partial(ours, "pairwise"),
        "uniform": partial(ours, "uniform"),
    }
    took = interleaved(acts, wanted.rounds)
    hands = [one for one in took["by hand"] if isinstance(one, ByHand)]
    furthest = _checked(tree(paths, hand)[-1].result.path, out / "pairwise" / "merged.safetensors", place)
    emptied(hand)
    emptied(out)
    seconds = {name: [one.seconds for one in every] for name, every in took.items()}
    first = hands[0]
    rows: list[tuple[Cell, ...]] = [
        ("the tree by hand", figure(seconds["by hand"]), None, *map(_bytes, first[1:])),
        *(
            (
                f"mergeflow, method={method}",
                figure(seconds[method]),
                ratio(seconds["by hand"], seconds[method]),
                _bytes(like.size * len(paths)),
                _bytes(like.size),
                _bytes(like.size),
            )
            for method in ("pairwise", "uniform")
        ),
    ]
    columns = ("", "seconds", "times as fast as by hand", "read", "written", "most on the disk at once")
    note = (
        f"{len(paths)} models of {si_bytes(like.size)}, {len(paths) - 1} merges by hand, each round from a cold cache. "
        f"The files of the tree are {furthest:g} ULP apart at most."
    )
    names = ("by hand", "pairwise", "uniform")
    picture = Picture(
        "byhand", "The tree by hand", "", "seconds", (bars("seconds", [figure(seconds[n]) for n in names]),), names
    )
    return Section("byhand", (Table(columns, tuple(rows), note=note),), settings_of(wanted), machine(place), (picture,))


def _checked(one: Path, other: Path, place: Path) -> float:
    found = apart(one, other, place / "compared")
    if found.furthest > FURTHEST:
        raise ExecutorError(f"the tree by hand and method=pairwise are {found.furthest:g} ULP apart, not {FURTHEST:g}")
    return found.furthest


def _bytes(count: int) -> Figure:
    return Figure(count, count, count, "B")


def main() -> None:
    """Do it once, and print what it took as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="an existing directory for what is saved")
    wanted = parser.parse_args()
    sys.stdout.write(json.dumps(make(wanted.models, wanted.out)) + "\n")


if __name__ == "__main__":
    main()
