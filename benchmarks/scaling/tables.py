"""Predictions as text: the tables of docs/scaling.md, one machine in detail, and what would make it faster."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.scaling.bound import bound
from benchmarks.scaling.machine import STORAGES, TITLES, scenario
from benchmarks.scaling.simulate import simulate
from benchmarks.scaling.workload import work_of
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.scaling.check import Check
    from benchmarks.scaling.machine import Machine
    from benchmarks.scaling.simulate import Prediction

MODELS = (42, 257, 1000, 10_000)
NODES = (1, 2, 8, 32, 256)
MODEL_BYTES = 6.94e9
AIM = 0.25
"""By how much a prediction may be off."""
HELPS = 1.05
"""A purchase that makes a run faster by less is not named."""

Cells = dict[tuple[str, int, int], "Prediction"]
"""Predictions by storage, models and nodes."""


class Change(NamedTuple):
    """One thing that could be bought, and how many times as fast the merge then is."""

    what: str
    factor: float


def predictions(models: Sequence[int] = MODELS, nodes: Sequence[int] = NODES) -> Cells:
    """Every cell of the tables."""
    return {
        (storage, count, size): simulate(
            work_of(count, MODEL_BYTES, scenario(storage, size).node), scenario(storage, size)
        )
        for storage in STORAGES
        for count in models
        for size in nodes
    }


def table(storage: str, cells: Mapping[tuple[str, int, int], Prediction]) -> list[str]:
    """One storage as Markdown: time, in brackets the bound, and the bottleneck."""
    models = sorted({count for name, count, _ in cells if name == storage})
    nodes = sorted({size for name, _, size in cells if name == storage})
    lines = [
        f"| {TITLES[storage]} | " + " | ".join(f"{size} node{'s' * (size > 1)}" for size in nodes) + " |",
        "|---" * (len(nodes) + 1) + "|",
    ]
    for count in models:
        shown = [f"{count:,} models, {si_bytes(count * MODEL_BYTES)}"]
        for size in nodes:
            cell = cells[storage, count, size]
            shown.append(f"{duration(cell.seconds)} ({duration(cell.bound.seconds)}) {cell.bottleneck}")
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def detail(models: int, model_bytes: float, machine: Machine) -> list[str]:
    """One prediction, what each resource needs, and what would help."""
    work = work_of(models, model_bytes, machine.node)
    found = simulate(work, machine)
    least = found.bound
    lines = [
        f"{models:,} models of {si_bytes(model_bytes)} on {machine.nodes} node(s) with {machine.workers:,} worker(s)",
        f"reads    {work.total.requests:,} of {si_bytes(work.request)} on average, in {len(work.shards):,} shards",
        f"takes    {duration(found.seconds)}, and {duration(least.seconds)} at least; bottleneck: {found.bottleneck}",
        f"start    {duration(least.before)} until the first tensor is read; end {duration(least.after)}",
    ]
    busiest = sorted(least.resources.items(), key=lambda item: -item[1])
    lines += [f"  {name:<12}{duration(seconds):>10}" for name, seconds in busiest if seconds >= 0.01 * least.seconds]
    helping = [f"  {change.what:<34}{change.factor:>6.2f}x" for change in what_helps(models, model_bytes, machine)]
    return [*lines, "what would help:", *(helping or [f"  nothing by itself, by {HELPS - 1:.0%} or more"])]


def what_helps(models: int, model_bytes: float, machine: Machine) -> list[Change]:
    """Single changes that make the merge faster, the best first."""
    now = simulate(work_of(models, model_bytes, machine.node), machine).seconds
    changes = []
    for what, changed in _purchases(machine):
        then = simulate(work_of(models, model_bytes, changed.node), changed).seconds
        changes.append(Change(what, now / then))
    return sorted((one for one in changes if one.factor >= HELPS), key=lambda one: -one.factor)


def _purchases(machine: Machine) -> Iterator[tuple[str, Machine]]:
    storage, node = machine.storage, machine.node
    if machine.ray:
        yield "twice the nodes", replace(machine, nodes=2 * machine.nodes)
    for what, name, factor in (
        ("twice the bandwidth of the storage", "server", 2.0),
        ("twice the disks of every node", "disk", 2.0),
        ("half the latency", "latency", 0.5),
        ("twice the reads per second", "requests", 2.0),
        ("twice the write bandwidth", "write", 2.0),
    ):
        yield what, replace(machine, storage=replace(storage, **{name: factor * getattr(storage, name)}))
    yield "twice the network of every node", replace(machine, node=replace(node, network=2 * node.network))
    more = replace(node, cores=2 * node.cores, workers=2 * node.workers, memory=2 * node.memory)
    yield "twice the cores, workers and memory", replace(machine, node=more)
    yield "four times executor.memory", replace(machine, node=replace(node, memory=4 * node.memory))
    deep = replace(node, reads_in_flight=4 * node.reads_in_flight, memory=4 * node.memory)
    yield "four times reads in flight and memory", replace(machine, node=deep)


def purchases_table() -> list[str]:
    """What helps most in the usual situations, as Markdown."""
    lines = ["| where | bottleneck | what helps most |", "|---|---|---|"]
    for storage, models, nodes in (
        ("nfs", 42, 2),
        ("nfs", 10_000, 2),
        ("local", 257, 1),
        ("local", 10_000, 8),
        ("parallel", 1000, 8),
        ("parallel", 10_000, 32),
        ("object", 42, 8),
        ("object", 1000, 8),
    ):
        machine = scenario(storage, nodes)
        found = simulate(work_of(models, MODEL_BYTES, machine.node), machine)
        best = ", ".join(f"{one.what} {one.factor:.1f}x" for one in what_helps(models, MODEL_BYTES, machine)[:3])
        where = f"{models:,} models, {nodes} node{'s' * (nodes > 1)}, {storage}"
        lines.append(f"| {where} | {found.bottleneck} | {best or 'nothing by itself'} |")
    return lines


def rows_table() -> list[str]:
    """How long reads are, by models and memory, as Markdown."""
    memories = (1, 4)
    head = " | ".join(f"{gib} GiB for each worker: read; at least" for gib in memories)
    lines = [f"| models | {head} |", "|---" * (len(memories) + 1) + "|"]
    for models in MODELS:
        node = scenario("nfs", 1).node
        sizes = []
        for gib in memories:
            work = work_of(models, MODEL_BYTES, replace(node, memory=gib * node.workers * (1 << 30)))
            least = bound(work, scenario("nfs", 1)).resources["latency"]
            sizes.append(f"{si_bytes(work.request)}; {duration(least)}")
        lines.append(f"| {models:,} | " + " | ".join(sizes) + " |")
    return lines


def check_table(checks: Sequence[Check], machine: Machine, load: float) -> list[str]:
    """Predicted and measured, as Markdown; `load` is how many threads wanted a core on average."""
    costs, storage = machine.costs, machine.storage
    lines = [
        f"{machine.node.cores} cores, {machine.node.workers} worker(s); a core copies {costs.copy / 1e9:.1f} GB/s in "
        f"and {costs.write_copy / 1e9:.1f} GB/s out, merges {costs.arithmetic / 1e9:.1f} GB/s plus "
        f"{costs.piece_call * 1e6:.0f} us for each piece and {costs.row_call * 1e6:.1f} us for each of its rows, and "
        f"hashes {1 / costs.digest / 1e9:.1f} GB/s; the disk takes {storage.write / 1e9:.1f} GB/s.",
        "",
        "| models | read and written | bound | predicted | measured | ratio | predicted / measured core seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in checks:
        cores = one.predicted_cores / one.measured_cores
        lines.append(
            f"| {one.models} | {si_bytes(one.bytes)} | {one.bound:.2f} s | {one.predicted:.2f} s "
            f"| {one.measured:.2f} s | {one.predicted / one.measured:.2f} "
            f"| {one.predicted_cores:.2f} / {one.measured_cores:.2f} = {cores:.2f} |"
        )
    clock = max(abs(one.predicted / one.measured - 1) for one in checks)
    cores = max(abs(one.predicted_cores / one.measured_cores - 1) for one in checks)
    return [
        *lines,
        "",
        f"By the clock the prediction is off by up to {clock:.0%}, {_met(clock)}; in core seconds by {cores:.0%}, "
        f"{_met(cores)}. The load average was {load:.1f}, of which the run itself makes up to {machine.threads + 1}.",
    ]


def _met(off: float) -> str:
    return f"which {'meets' if off <= AIM else 'misses'} the aim of {AIM:.0%}"


def duration(seconds: float) -> str:
    """Seconds for a person: `duration(5400) == '90 min'`."""
    for size, unit, most in ((1, "s", 120), (60, "min", 120), (3600, "h", 48)):
        if seconds < size * most:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"
