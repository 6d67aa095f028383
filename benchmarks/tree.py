"""How long the recorded tree x39a takes beside the exact mean of its 40 models: `python -m benchmarks.tree`.

Both are made of the demo set, one after the other and so for several rounds; the seconds are those of the manifests,
from the first draft to the last byte synced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "tree": ["recipe=x39a"],
    "mean": ["recipe=x39a", "method=uniform", "keys=strict", "dtype=fp16"],
}


def seconds(kind: str, models: str, out: str) -> float:
    """One run, in a process of its own."""
    common = [f"models.dir={models}", f"out={out}", "executor=local", "overwrite=true"]
    command = [sys.executable, str(ROOT / "launch.py"), *common, *KINDS[kind]]
    subprocess.run(command, check=True, capture_output=True)
    return float(json.loads((Path(out) / "manifest.json").read_text())["seconds"])


def main() -> None:
    """Print the medians and what one is of the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="demo", help="the demo set, which is made if it is missing")
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(wanted.rounds):
            for kind in KINDS:
                took[kind].append(seconds(kind, wanted.models, out))
    for kind, every in took.items():
        print(f"{kind}  {statistics.median(every):.2f} s  ({min(every):.2f} to {max(every):.2f})")  # noqa: T201
    ratios = [tree / mean for tree, mean in zip(took["tree"], took["mean"], strict=True)]
    print(f"tree / mean  {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")  # noqa: T201


if __name__ == "__main__":
    main()
