"""How long the recorded tree x39a takes beside the exact mean of its 40 models: `python -m benchmarks.tree`.

Both are made of the demo set, one after the other and so for several rounds; the seconds are those of the manifests,
from the first draft to the last byte synced.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import figure, interleaved, ratio
from benchmarks.program import ROOT, command, output
from benchmarks.tables import Table, markdown

if TYPE_CHECKING:
    from benchmarks.tables import Cell

KINDS = {
    "tree": ["recipe=x39a"],
    "mean": ["recipe=x39a", "method=uniform", "keys=strict", "dtype=fp16"],
}


def seconds(kind: str, models: str, out: str) -> float:
    """One run, in a process of its own."""
    common = [f"models.dir={models}", f"out={out}", "executor=local", "overwrite=true"]
    output(command([*common, *KINDS[kind]]), ROOT)
    return float(json.loads((Path(out) / "manifest.json").read_text())["seconds"])


def main() -> None:
    """Print the medians and what one is of the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, default=ROOT / "demo", help="the demo set, which is made if it is missing"
    )
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        acts = {kind: partial(seconds, kind, str(wanted.models.resolve()), out) for kind in KINDS}
        took = interleaved(acts, wanted.rounds)
    rows: list[tuple[Cell, ...]] = [(kind, figure(every)) for kind, every in took.items()]
    rows.append(("tree to mean", ratio(took["tree"], took["mean"])))
    sys.stdout.write(markdown(Table(("", "takes"), tuple(rows))) + "\n")


if __name__ == "__main__":
    main()
