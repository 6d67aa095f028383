"""How long a merge takes on machines that one does not have (yet).

Without options: the tables of docs/scaling.md. With --models, --nodes or any figure of a machine: that machine, and
what would make it faster. Bytes are written as 6.9GB or 4GiB, bandwidths as bytes per second, latencies in seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scaling import check, measure, page, tables
from benchmarks.scaling.machine import STORAGES, scenario
from mergeflow.config.executor import to_bytes
from mergeflow.errors import MergeflowError

if TYPE_CHECKING:
    from benchmarks.scaling.machine import Machine

STORAGE_OPTIONS = {
    "disk": "disk_bandwidth",
    "server": "server_bandwidth",
    "stream": "thread_bandwidth",
    "write": "write_bandwidth",
    "latency": "latency",
    "requests": "requests",
    "open": "open",
    "opens": "opens",
}
"""Fields of `Storage` by the options that set them."""
NODE_OPTIONS = ("cores", "workers", "reads_in_flight", "memory", "network")


def main() -> None:
    """Print, and write what was asked for."""
    options = parser().parse_args()
    try:
        if options.measure:
            measured = {**measure.merging(), **measure.planning(), **measure.receipts()}
            lines = [f"{name:<24}{value:.3g}" for name, value in measured.items()]
        elif options.check:
            checks, here = check.check(options.directory, options.divisor, options.workers or 1, options.rounds)
            lines = tables.check_table(checks, here, os.getloadavg()[0])
            if options.update:
                page.update({"check": lines})
        elif any(value is not None for value in (options.models, options.nodes, *_changes(options).values())):
            lines = tables.detail(options.models or 42, options.bytes or tables.MODEL_BYTES, machine(options))
        else:
            lines = _everything(update=options.update)
    except MergeflowError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n".join(lines) + "\n")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--update", action="store_true", help="write tables and picture into docs/")
    made.add_argument("--measure", action="store_true", help="measure what the software costs, Ray included")
    made.add_argument("--check", action="store_true", help="predict and run a small merge on this machine")
    made.add_argument("--directory", type=Path, default=Path("/var/tmp/scaling/check"), help="of the models of --check")
    made.add_argument("--divisor", type=int, default=4, help="of the layers' widths for --check")
    made.add_argument("--rounds", type=int, default=5, help="of --check")
    made.add_argument("--models", type=int)
    made.add_argument("--bytes", type=to_bytes, help="of one model; 6.94GB unless it is given")
    made.add_argument("--nodes", type=int)
    made.add_argument("--storage", choices=STORAGES, default="nfs", help="what the figures are that are not given")
    for name in ("disk-bandwidth", "server-bandwidth", "thread-bandwidth", "write-bandwidth", "network"):
        made.add_argument(f"--{name}", type=to_bytes, metavar="BYTES")
    for name in ("latency", "requests", "open", "opens"):
        made.add_argument(f"--{name}", type=float, metavar="SECONDS" if name in ("latency", "open") else "PER_SECOND")
    for name in ("cores", "workers", "reads-in-flight"):
        made.add_argument(f"--{name}", type=int, help="of each node")
    made.add_argument("--memory", type=to_bytes, metavar="BYTES", help="of the blocks of each node")
    return made


def machine(options: argparse.Namespace) -> Machine:
    """The machine that the options tell of; as many workers as cores, and 1 GiB for each, unless they say otherwise."""
    made = scenario(options.storage, options.nodes or 1)
    asked = {name: value for name, value in _changes(options).items() if value is not None}
    storage = {field: asked[option] for field, option in STORAGE_OPTIONS.items() if option in asked}
    node = {name: asked[name] for name in NODE_OPTIONS if name in asked}
    if "cores" in node:
        node.setdefault("workers", node["cores"])
    if "workers" in node:
        node.setdefault("memory", node["workers"] << 30)
    return replace(made, storage=replace(made.storage, **storage), node=replace(made.node, **node))


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    names = (*STORAGE_OPTIONS.values(), *NODE_OPTIONS)
    return {name: getattr(options, name) for name in names}


def _everything(*, update: bool) -> list[str]:
    """The tables of the page."""
    cells = tables.predictions()
    parts = {storage: tables.table(storage, cells) for storage in STORAGES}
    parts |= {"purchases": tables.purchases_table(), "rows": tables.rows_table()}
    if update:
        page.draw(cells)
        page.update(parts)
    return [line for lines in parts.values() for line in (*lines, "")]


if __name__ == "__main__":
    main()
