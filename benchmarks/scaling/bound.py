"""How long a merge takes at least: the demand on each resource over what it has, and what nothing else goes on beside.

`demand` is also what the simulation takes from its resources, so that neither can forget what the other counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.scaling.machine import Machine
    from benchmarks.scaling.workload import Shard, Work

BEFORE, AFTER = "start", "end"
"""What resources are called in which nothing is merged yet, or any more."""


@dataclass(frozen=True)
class Demand:
    """What some shards take of each resource, in seconds in which it does nothing else."""

    server: float
    """Of the bandwidth of all storage."""
    disk: float
    """Of the bandwidth of one node's disk, or of one client."""
    network: float
    """Of the link of one node."""
    requests: float
    """Of the reads that the storage can begin."""
    node_requests: float
    """Of the reads that one node can begin."""
    waiting: float
    """Of one thread that reads and waits, with nobody in its way."""
    copying: float
    """Of one core, to copy what is read, and to call for it."""
    calling: float
    """Of the interpreter of a process, which one thread has at a time, to call for what is read."""
    merging: float
    """Of one core."""
    steering: float
    """Of the interpreter of a process, to merge."""
    writing: float
    """Of one core, to copy results."""
    flushing: float
    """Of the bandwidth with which all storage writes."""
    digest: float
    """Of the thread that hashes the output."""


def demand(shard: Shard, machine: Machine) -> Demand:
    """What one shard, or all of them, take."""
    storage, costs, node = machine.storage, machine.costs, machine.node
    calls = shard.requests * costs.read_call
    pieces = shard.pieces * costs.piece_call + shard.rows * costs.row_call
    copying = calls + shard.read / costs.copy
    return Demand(
        server=shard.read / storage.server,
        disk=shard.read / storage.disk,
        network=0.0 if storage.local else shard.read / node.network,
        requests=shard.requests / storage.requests,
        node_requests=shard.requests / storage.requests_per_node,
        waiting=max(shard.requests * storage.latency + shard.read / storage.stream + calls, copying),
        copying=copying,
        calling=calls,
        merging=pieces + shard.read / costs.arithmetic,
        steering=pieces,
        writing=shard.written / costs.write_copy,
        flushing=shard.written / storage.write,
        digest=shard.written * _digest_of_a_byte(machine),
    )


@dataclass(frozen=True)
class Bound:
    """The least time, and what it is spent on."""

    seconds: float
    resources: Mapping[str, float]
    """Seconds that each resource needs for all shards, by its name; they go on beside each other."""
    before: float
    """Seconds before the first shard."""
    after: float
    """Seconds after the last shard."""

    @property
    def bottleneck(self) -> str:
        """What takes most of the time."""
        every = {**self.resources, BEFORE: self.before, AFTER: self.after}
        return max(every, key=lambda name: every[name])


def bound(work: Work, machine: Machine) -> Bound:
    """The largest of the resources' times, and all that goes before and after it."""
    total, nodes = demand(work.total, machine), machine.nodes
    node, threads = machine.node, min(machine.threads, len(work.shards))
    workers = min(machine.workers, len(work.shards))
    busy_nodes = min(nodes, len(work.shards))
    hashed = total.digest if machine.nodes == 1 else 0.0
    computing = total.copying + total.merging + total.writing
    interpreters = busy_nodes if machine.shared_interpreter else workers
    resources = {
        "server": total.server,
        "disk": total.disk / busy_nodes,
        "network": total.network / busy_nodes,
        "requests": max(total.requests, total.node_requests / busy_nodes),
        "latency": (total.waiting + total.merging + total.writing) / threads,
        "cores": max((computing + hashed) / (busy_nodes * node.cores), total.merging / workers),
        "interpreter": (total.calling + total.steering) / interpreters,
        "driver": len(work.shards) * receipt_seconds(len(work.shards), machine),
        "digest": total.digest,
        "write": total.flushing * (1 - kept_share(work, machine)),
    }
    before, after = before_shards(work, machine), after_shards(work, machine)
    opening = opening_seconds(work, machine)
    return Bound(before + opening + max(resources.values()) + after, resources, before + opening, after)


def before_shards(work: Work, machine: Machine) -> float:
    """Seconds until the first worker has the plan: headers, planning, Ray, and the plan on its way."""
    costs, storage, models = machine.costs, machine.storage, work.models
    round_trips = storage.open + 4 * storage.latency  # stat twice, the length, the header
    headers = models * max(round_trips / costs.headers_at_once, 1 / storage.opens, costs.parse)
    seconds = headers + models * costs.plan
    if machine.ray:
        rounds = math.ceil(math.log2(machine.nodes)) if machine.nodes > 1 else 0  # who has it sends it on
        seconds += costs.startup + machine.workers / costs.actors
        seconds += models * (rounds * costs.plan_bytes / machine.node.network + costs.unpickle)
    return seconds


def opening_seconds(work: Work, machine: Machine) -> float:
    """Seconds until every process has opened every model: one after the other in each, and all before one server."""
    processes = machine.nodes if machine.shared_interpreter else machine.workers
    processes = min(processes, len(work.shards))
    return work.models * max(machine.storage.open, processes / machine.storage.opens)


def after_shards(work: Work, machine: Machine) -> float:
    """Seconds after the last digest: whether a model has changed is asked, and what is in memory is synced."""
    kept = work.total.written * kept_share(work, machine)
    return work.models * machine.storage.latency + kept / machine.storage.write


def kept_share(work: Work, machine: Machine) -> float:
    """Which part of the output lies in memory until it is synced; the rest is written while the run goes on."""
    return min(1.0, machine.nodes * machine.node.unwritten / work.total.written)


def receipt_seconds(shards: int, machine: Machine) -> float:
    """Seconds of the driver for one receipt."""
    if not machine.ray:
        return 0.0
    under_way = min(shards, machine.workers * (machine.node.reads_in_flight + 1))
    return machine.costs.receipt + under_way * machine.costs.receipt_per_reference


def _digest_of_a_byte(machine: Machine) -> float:
    """Seconds; what other nodes have written has to be fetched, a step at a time."""
    fetched = 0.0
    if machine.nodes > 1:
        slowest = min(machine.storage.stream, machine.storage.disk, machine.node.network)
        fetched = machine.storage.latency / machine.costs.digest_step + 1 / slowest
    return machine.costs.digest + fetched
