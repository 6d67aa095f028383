"""What further targets cost: 1 to 16 outputs of different lists of the same models, made in one pass.

    python -m benchmarks.targets --models 20 --scale 0.25

The first list has all models, so that every pass reads the same; each of the others is a random choice of eight models
or more. All is measured with the models in the page cache: where the storage is the limit, further targets cost
what writing them costs. Beside the pass stand its outputs merely written and synced, and as many runs of one target.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import disk
from benchmarks.figures import figure, interleaved, ratio
from benchmarks.options import options, parser
from benchmarks.place import emptied, machine, need, work_dir
from benchmarks.program import merge
from benchmarks.section import Picture, Section, line, settings_of
from benchmarks.synthetic import sdxl_models
from benchmarks.tables import Table, markdown
from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.tables import Cell

TARGETS = (1, 2, 4, 8, 16)
APART_UP_TO = 4
"""Targets; more runs of one each would only take longer."""
FEWEST = 8
"""Models of a list."""
LEAST_MODELS = 10
"""With fewer there are not as many lists as targets."""
ONE_RUN, SWEEP, APART, WRITTEN = "one run", "sweep", "a run each", "bytes written"


def lists(count: int, targets: int, seed: int = 1) -> list[list[str]]:
    """Ids for so many targets, all different: all models, then random choices of `FEWEST` of them or more, in order."""
    ids = [f"{number:02}" for number in range(1, count + 1)]
    chosen = random.Random(seed)
    made = [ids]
    while len(made) < targets:
        some = sorted(chosen.sample(ids, chosen.randint(FEWEST, count - 1)), key=int)
        if some not in made:
            made.append(some)
    return made


def one_run(selections: Sequence[Sequence[str]]) -> list[str]:
    """The arguments of one run whose targets are these lists."""
    named = [f'+selection.list{number}="{",".join(ids)}"' for number, ids in enumerate(selections)]
    wanted = ", ".join(
        f"t{number}: {{file: t{number}.safetensors, selection: list{number}}}" for number in range(len(selections))
    )
    return [*named, "target=[]", f"+target={{{wanted}}}"]


def sweep(selections: Sequence[Sequence[str]]) -> list[str]:
    """The arguments of a sweep over these lists."""
    return ["-m", "selection.models=" + ",".join(f"'{','.join(ids)}'" for ids in selections), "target=single"]


def measure(wanted: Options, place: Path, executor: str = "local", most: int = max(TARGETS)) -> Section:
    """Measure passes with up to `most` targets."""
    if wanted.models < LEAST_MODELS:
        raise ConfigError(
            f"{wanted.models} models are too few for lists of {FEWEST} or more that all differ; choose {LEAST_MODELS} "
            "with --models, or more (as one case of many, targets takes four times as many as --models says)"
        )
    counts = [count for count in TARGETS if count <= most]
    paths, like = sdxl_models(place, wanted.models, wanted.scale)
    out = place / "out"
    need(place, max(counts) * like.size, f"{max(counts)} outputs")
    selections = lists(wanted.models, max(counts))
    common = [f"executor={executor}", f"executor.memory={wanted.memory}"]
    way = disk.best_write(emptied(out), like.size)

    def run(arguments: Sequence[str], manifest: str = "manifest.json") -> tuple[float, float]:
        ran = merge(paths[0].parent, emptied(out), [*arguments, *common], manifest)
        return ran.seconds, ran.wall

    def apart(count: int) -> tuple[float, float]:
        every = [run(one_run([ids])) for ids in selections[:count]]
        return sum(seconds for seconds, _ in every), sum(wall for _, wall in every)

    def written(count: int) -> tuple[float, float]:
        emptied(out)
        seconds = disk.write([out / str(number) for number in range(count)], like.size, way)
        return seconds, seconds

    acts: dict[tuple[str, int], Callable[[], tuple[float, float]]] = {}
    for count in counts:
        acts[ONE_RUN, count] = partial(run, one_run(selections[:count]))
        acts[SWEEP, count] = partial(run, sweep(selections[:count]), "0/manifest.json")
        acts[WRITTEN, count] = partial(written, count)
        if count <= APART_UP_TO:
            acts[APART, count] = partial(apart, count)
    disk.warm(paths)
    took = interleaved(acts, wanted.rounds)
    emptied(out)
    seconds = {key: [one for one, _ in every] for key, every in took.items()}
    walls = {key: [wall for _, wall in every] for key, every in took.items()}
    notes = (
        "Seconds are those of manifest.json: from the workers being ready to the last byte synced; `rows` counts the "
        f"models of all lists together. An output has {si_bytes(like.size)}; its bytes are written in the fastest of "
        f"several ways: {way}."
    )
    tables = (_seconds(seconds, selections, counts, executor, notes), _walls(walls, counts))
    told = settings_of(wanted) | {"executor": executor}
    return Section("targets", tables, told, machine(place), (_picture(seconds, counts),))


def _seconds(
    took: dict[tuple[str, int], list[float]],
    selections: Sequence[Sequence[str]],
    counts: Sequence[int],
    executor: str,
    note: str,
) -> Table:
    one = took[ONE_RUN, 1]
    rows: list[tuple[Cell, ...]] = []
    for count in counts:
        apart = took.get((APART, count))
        rows.append(
            (
                count,
                sum(map(len, selections[:count])),
                figure(took[ONE_RUN, count]),
                ratio(took[ONE_RUN, count], one) if count > 1 else None,
                figure(took[SWEEP, count]),
                ratio(took[SWEEP, count], one),
                figure(apart) if apart else None,
                ratio(apart, one) if apart else None,
                figure(took[WRITTEN, count]),
                ratio(took[WRITTEN, count], one),
            )
        )
    columns = ("targets", "rows", ONE_RUN, "to 1", SWEEP, "to 1", APART, "to 1", WRITTEN, "to 1")
    return Table(columns, tuple(rows), f"The pass alone, executor={executor}", note)


def _walls(took: dict[tuple[str, int], list[float]], counts: Sequence[int]) -> Table:
    rows = []
    for count in counts:
        apart = took.get((APART, count))
        rows.append((count, figure(took[ONE_RUN, count]), figure(took[SWEEP, count]), figure(apart) if apart else None))
    return Table(("targets", ONE_RUN, SWEEP, APART), tuple(rows), "Whole processes, with their start")


def _picture(took: dict[tuple[str, int], list[float]], counts: Sequence[int]) -> Picture:
    lines = []
    for name in (ONE_RUN, SWEEP, APART, WRITTEN):
        x = [count for count in counts if (name, count) in took]
        lines.append(line(name, x, [ratio(took[name, count], took[ONE_RUN, 1]) for count in x]))
    return Picture("targets", "Several targets from one reading", "targets", "times one target", tuple(lines))


def main() -> None:
    """Measure and print."""
    wanted = parser(str(__doc__).partition("\n")[0], models=20, scale=0.25, rounds=3)
    wanted.add_argument("--executor", choices=("local", "ray"), default="local")
    wanted.add_argument(
        "--targets", type=int, choices=TARGETS, default=max(TARGETS), help="at most so many (%(default)s)"
    )
    parsed = wanted.parse_args()
    with work_dir(parsed.dir, parsed.keep) as place:
        try:
            section = measure(options(parsed), place, parsed.executor, parsed.targets)
        except MergeflowError as error:
            sys.exit(f"benchmarks: {error}")
    sys.stdout.write("\n\n".join(markdown(table) for table in section.tables) + "\n")


if __name__ == "__main__":
    main()
