"""A merge, event by event: threads take shards, read, merge and write them, and get in each other's way.

A resource serves in the order in which it is asked, and a read is several requests to it, one after the other, so that
threads have equal parts of it. The same arguments give the same result.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from benchmarks.scaling.bound import (
    after_shards,
    before_shards,
    bound,
    demand,
    kept_share,
    opening_seconds,
    receipt_seconds,
)
from benchmarks.scaling.workload import NOTHING

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from benchmarks.scaling.bound import Bound, Demand
    from benchmarks.scaling.machine import Machine
    from benchmarks.scaling.workload import Shard, Work

    Process = Generator[float, float, None]
    """Yields when it goes on, and is then told that time."""

SHARDS_OF_A_THREAD = 64
"""Where each thread has more, several are simulated as one: what the end of a run costs is still right to 1/64."""
PARTS = 4
"""In how many parts a thread asks for what it reads."""


@dataclass(frozen=True)
class Prediction:
    """How long a merge takes."""

    seconds: float
    """From the command until the file is there."""
    run: float
    """Seconds of that between the first draft and the last byte synced, as a manifest counts them."""
    bound: Bound

    @property
    def bottleneck(self) -> str:
        """What takes most of the time; `shards` where there are too few of them for all threads to be busy."""
        if self.seconds > 1.3 * self.bound.seconds:
            return "shards"
        return self.bound.bottleneck


class Calendar:
    """A resource that does one thing after the other."""

    def __init__(self) -> None:
        self.free = 0.0

    def take(self, now: float, seconds: float) -> float:
        """When `seconds` of it have been had, if they are asked for `now`."""
        self.free = max(self.free, now) + seconds
        return self.free


class Cores:
    """Several of them; each does one thing after the other."""

    def __init__(self, cores: int) -> None:
        self._free = [0.0] * cores

    def take(self, now: float, seconds: float) -> float:
        """When whichever core is free first has worked so long."""
        done = max(self._free[0], now) + seconds
        heapq.heapreplace(self._free, done)
        return done


class _Node:
    def __init__(self, machine: Machine) -> None:
        self.disk, self.network, self.requests = Calendar(), Calendar(), Calendar()
        self.cores = Cores(machine.node.cores)
        self.interpreter = Calendar()


class _Worker:
    def __init__(self, node: _Node, *, shared_interpreter: bool) -> None:
        self.node = node
        self.turn = Calendar()
        self.interpreter = node.interpreter if shared_interpreter else Calendar()
        self.waiting: deque[tuple[int, float]] = deque()
        """Shards that it was sent, and when."""


def simulate(work: Work, machine: Machine) -> Prediction:
    """How long it takes; never less than `bound` says."""
    least = bound(work, machine)
    run = _Run(work, machine)
    merged = run.end()
    after = after_shards(work, machine)
    ready = before_shards(work, machine)
    return Prediction(ready + merged + after, merged + after, least)


class _Run:
    """From the first shard to the last digest; time begins when the workers have the plan."""

    def __init__(self, work: Work, machine: Machine) -> None:
        self._machine = machine
        self._shards = [demand(shard, machine) for shard in _joined(work.shards, machine.threads)]
        self._per_receipt = receipt_seconds(len(work.shards), machine) * len(work.shards) / len(self._shards)
        self._server, self._requests, self._driver = Calendar(), Calendar(), Calendar()
        self._digest, self._digested, self._done = Calendar(), 0, [False] * len(self._shards)
        nodes = [_Node(machine) for _ in range(machine.nodes)]
        self._first = nodes[0]
        # As Ray spreads them: the first worker of every node, then the second.
        self._workers = [
            _Worker(node, shared_interpreter=machine.shared_interpreter)
            for _ in range(machine.node.workers)
            for node in nodes
        ]
        self._left = iter(range(len(self._shards)))
        self._write, self._written_meanwhile = Calendar(), 1 - kept_share(work, machine)
        self._opened = opening_seconds(work, machine)

    def end(self) -> float:
        """When all is merged and hashed."""
        flight = self._machine.node.reads_in_flight
        for _ in range(flight + 1):
            for worker in self._workers:
                self._send(worker, 0.0)
        last = max(_processed(self._thread(worker) for _ in range(flight) for worker in self._workers))
        return max(last, self._digest.free, self._driver.free, self._write.free)

    def _send(self, worker: _Worker, now: float) -> None:
        """The driver notes a receipt, and gives its worker another shard if there is one."""
        shard = next(self._left, None)
        if shard is not None:
            worker.waiting.append((shard, now))

    def _thread(self, worker: _Worker) -> Process:
        """One thread of a worker, until nothing is left for it."""
        now = yield self._opened
        while worker.waiting:
            shard, sent = worker.waiting.popleft()
            if sent > now:
                now = yield sent
            wanted = self._shards[shard]
            for _ in range(PARTS):
                now = yield self._read(worker, wanted, now)
            now = yield self._merge(worker, wanted, now)
            now = yield worker.node.cores.take(now, wanted.writing)
            self._finish(shard, now)
            self._send(worker, self._driver.take(now, self._per_receipt))

    def _read(self, worker: _Worker, wanted: Demand, now: float) -> float:
        """When one part of it is there: whichever of all that it passes through is the last to be done with it."""
        node = worker.node
        return max(
            now + wanted.waiting / PARTS,
            self._server.take(now, wanted.server / PARTS),
            self._requests.take(now, wanted.requests / PARTS),
            node.disk.take(now, wanted.disk / PARTS),
            node.network.take(now, wanted.network / PARTS),
            node.requests.take(now, wanted.node_requests / PARTS),
            node.cores.take(now, wanted.copying / PARTS),
            worker.interpreter.take(now, wanted.calling / PARTS),
        )

    def _merge(self, worker: _Worker, wanted: Demand, now: float) -> float:
        """When it is merged: its worker merges one at a time, on one core."""
        return max(
            worker.turn.take(now, wanted.merging),
            worker.node.cores.take(now, wanted.merging),
            worker.interpreter.take(now, wanted.steering),
        )

    def _finish(self, shard: int, now: float) -> None:
        """Its results are written; what is complete from the first byte on is hashed."""
        self._write.take(now, self._shards[shard].flushing * self._written_meanwhile)
        self._done[shard] = True
        while self._digested < len(self._done) and self._done[self._digested]:
            seconds = self._shards[self._digested].digest
            hashed = self._digest.take(now, seconds)
            if self._machine.nodes == 1:  # whose cores are known to be busy; of many, one is free for it
                self._digest.free = max(hashed, self._first.cores.take(now, seconds))
            self._digested += 1


def _joined(shards: Sequence[Shard], threads: int) -> list[Shard]:
    """Several consecutive shards as one where each thread has many."""
    together = max(1, len(shards) // (threads * SHARDS_OF_A_THREAD))
    return [sum(shards[first : first + together], NOTHING) for first in range(0, len(shards), together)]


def _processed(processes: Iterable[Process]) -> Iterator[float]:
    """Let them all go on in the order of their times; when each of them ended."""
    numbers = count()  # of two at the same time, the one that came first goes first
    queue = [(next(process), next(numbers), process) for process in processes]
    heapq.heapify(queue)
    while queue:
        now, _, process = queue[0]
        try:
            heapq.heapreplace(queue, (process.send(now), next(numbers), process))
        except StopIteration:
            heapq.heappop(queue)
            yield now
