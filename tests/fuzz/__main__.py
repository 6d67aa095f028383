"""`make fuzz`, or `python -m tests.fuzz --cases 20000 --seed 1`: hostile cases, counted.

Case number N of seed S is always the same one: `--only S:N` does it alone. With `--atheris`, bytes are chosen by
libFuzzer, led by what of the readers they reach, instead of by chance alone (pip install 'mergeflow[fuzz]').
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from random import Random

from tests.fuzz.corpus import corpus
from tests.fuzz.coverage import led
from tests.fuzz.guards import held
from tests.fuzz.targets import Targets

IN_MEMORY = "/dev/shm"
"""Where nothing waits for a disk, as every hash that is kept and every merge would."""
WEIGHED = 5
"""The memory of one case in so many is measured, which makes it several times slower; of merges it is elsewhere."""


def main() -> int:
    """Do the cases, and tell what came of them; 1 if any was not held."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="SEED:NUMBER of one case")
    parser.add_argument("--target", help="cases of this target alone")
    parser.add_argument("--atheris", type=int, default=0, metavar="RUNS", help="more cases, led by coverage")
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if Path(IN_MEMORY).is_dir() else None) as place:
        targets = Targets(corpus(Path(place) / "corpus"), Path(place))
        if typed.only:
            seed, number = map(int, typed.only.split(":"))
            name, outcome = one(targets, seed, number, typed.target)
            print(f"{name}: {outcome}")  # noqa: T201 - it is what was asked for
            return 0
        failed = by_chance(targets, typed.seed, typed.cases, typed.target)
        if typed.atheris and find_spec("atheris") is None:
            tell("atheris is not installed, so no cases were led by coverage; pip install 'mergeflow[fuzz]'")
        elif typed.atheris and not failed:
            failed = led(typed.atheris, typed.seed, targets.corpus, Path(place))
    return 1 if failed else 0


def by_chance(targets: Targets, seed: int, cases: int, target: str | None = None) -> int:
    """So many cases; prints what came of them, and how many were not held."""
    began = time.monotonic()
    outcomes: dict[str, Counter[str]] = {}
    failed = 0
    for number in range(cases):
        try:
            name, outcome = one(targets, seed, number, target)
        except Exception as error:
            failed += 1
            name, outcome = getattr(error, "target", "?"), f"NOT HELD: {type(error).__name__}"
            tell(f"{name}, --only {seed}:{number}: {type(error).__name__}: {str(error)[:500]!a}")
        outcomes.setdefault(name, Counter())[outcome] += 1
    for name, found in sorted(outcomes.items()):
        tell(f"{name:<12} {found.total():>7,}  {', '.join(f'{count:,} {what}' for what, count in found.most_common())}")
    tell(f"{cases:,} cases of seed {seed} in {time.monotonic() - began:.0f} s, {failed:,} of them not held")
    return failed


def one(targets: Targets, seed: int, number: int, target: str | None = None) -> tuple[str, str]:
    """Case `number` of `seed`: its target, and what came of it. Raises what no case may raise."""
    rng = Random(f"{seed}:{number}")
    names = [target] if target else list(targets.all)
    name = rng.choices(names, [targets.all[name][1] for name in names])[0]
    try:
        case = targets.all[name][0](rng)
        return name, held(case.act, case.size, memory=number % WEIGHED == 0 and name != "merge")
    except BaseException as error:
        error.target = name  # type: ignore[attr-defined]  # for who tells of it
        raise


def tell(text: str) -> None:
    """A line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
