"""Measure, and put the figures into docs/performance.md.

    python -m benchmarks floor merge --models 5 --scale 1

Every case can be named; `all` is what `make bench` measures. Where many models matter, in targets and byhand, there
are four times as many, of a quarter of the width.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.options import many_small, options, parser
from benchmarks.page import publish
from benchmarks.place import work_dir
from benchmarks.program import ROOT
from benchmarks.tables import markdown
from mergeflow.errors import MergeflowError

if TYPE_CHECKING:
    from benchmarks.options import Options
    from benchmarks.section import Section


class Case(NamedTuple):
    """Something that can be measured."""

    module: str
    says: str
    many: bool = False
    """Whether it takes many models of a smaller size instead of a few large ones."""


CASES = {
    "floor": Case("floor", "the bytes merely read, and merely written, in the fastest ways"),
    "merge": Case("merging", "a merge on threads and on Ray, cold and warm, beside the floor"),
    "targets": Case("targets", "1 to 16 targets in one pass, and in a sweep", many=True),
    "arithmetic": Case("arithmetic_case", "the methods alone, in memory"),
    "bookkeeping": Case("bookkeeping", "many models of 2,515 tiny tensors"),
    "memory": Case("memory", "the peak of all processes, for many models and for large tensors"),
    "byhand": Case("byhand", "the tree of pairwise merges with real intermediate files", many=True),
    "peers": Case("peers", "sd-mecha and mergekit on the same files; needs --peers"),
}
ALL = "all"


def main() -> int:
    """Measure the cases that were named, one after the other; returns the exit code."""
    wanted = parser(str(__doc__).partition("\n")[0])
    wanted.prog = "python -m benchmarks"
    wanted.formatter_class = argparse.RawDescriptionHelpFormatter
    wanted.epilog = "cases:\n" + "\n".join(f"  {name:<12} {case.says}" for name, case in CASES.items())
    wanted.add_argument("cases", nargs="*", metavar="CASE", default=[ALL], help=f"what to measure ({ALL})")
    wanted.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is; `docs` unless given")
    wanted.add_argument("--print", action="store_true", help="print the tables, and leave the page as it is")
    parsed = wanted.parse_args()
    chosen = options(parsed)
    unknown = [name for name in parsed.cases if name not in CASES and name != ALL]
    if unknown:
        wanted.error(f"there is no case '{unknown[0]}'; choose from {', '.join(CASES)}, {ALL}")
    if not parsed.print and find_spec("matplotlib") is None:
        wanted.error("pictures need matplotlib; pip install 'mergeflow[plots]', or add --print")
    names = [name for name in CASES if (name != "peers" or chosen.peers)] if ALL in parsed.cases else parsed.cases
    failed = [name for name in names if not _measured(name, chosen, parsed)]
    if failed:
        _say(f"{len(failed)} of {len(names)} cases failed: {', '.join(failed)}")
    return int(bool(failed))


def _measured(name: str, chosen: Options, parsed: argparse.Namespace) -> bool:
    """Measure one case and publish it; says why where that cannot be done."""
    _say(f"{name}: {CASES[name].says}")
    began = time.perf_counter()
    try:
        with work_dir(chosen.dir, chosen.keep) as place:
            suited = many_small(chosen) if CASES[name].many else chosen
            section: Section | None = import_module(f"benchmarks.{CASES[name].module}").measure(suited, place)
        if section is None:
            return True
        for table in section.tables:
            sys.stdout.write(markdown(table) + "\n\n")
        sys.stdout.flush()
        if not parsed.print:
            for path in publish(section, parsed.docs):
                _say(f"written {path}")
    except MergeflowError as error:
        _say(f"{name}: {error}")
        return False
    _say(f"{name} took {time.perf_counter() - began:.0f} s")
    return True


def _say(text: str) -> None:
    sys.stderr.write(f"benchmarks: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
