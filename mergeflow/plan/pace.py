"""How fast it will go: from what a sample has shown to how rows are read, and how long the run will take.

Taking the sample is an act (`execute.probe`); its result is a value, and all that is decided by it is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.errors import OverBudget
from mergeflow.plan.tiles import cut, memory_for
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.plan.plan import Memory, Plan
    from mergeflow.recipe.request import Budget

MIB = 1 << 20
WORTH_A_LOOK = 2_000_000_000
"""Bytes read; a smaller run is over before a sample of it would help."""
READS = (4, 2, 1, 8, 16, 32, 64)
"""How many reads a worker may keep under way; what is usual comes first, and the next two need less memory."""
BLOCKS = (4 * MIB, 16 * MIB, 64 * MIB)
SLOW = 2e-3
"""Seconds; what answers sooner is served well by what is usual, and a busy machine makes it look worse than it is."""
WORTH = 1.15
"""So many times as fast as what is usual has to be what is chosen instead: a sample says no more."""
SERIAL = 1.5
"""Where several reads at once are less than so many times as fast as one alone, they only wait for each other."""
STILL_GROWING = 0.6
"""Of the ideal: where so many reads at once gain that much, more of them gain more."""
CACHED = 0.5
"""Where more of a sample lay in the page cache, nobody waits for a read, and more threads than cores are in the way."""
FEWEST = 3
"""Threads; with fewer the storage waits while they merge and write."""
WRITING = 1.0e-9
"""Seconds of a core for each byte that is put into the page cache and sent to the disk."""
UNHIDDEN = 0.2
"""The part of the lesser of waiting and working that does not happen at the same time as the other."""


@dataclass(frozen=True)
class Measured:
    """What a sample of a run has shown."""

    latency: float
    """Seconds before a read that is alone gets its first byte."""
    stream: float
    """Bytes per second that such a read then gets."""
    at_once: int
    """How many reads were then done at once."""
    together: float
    """Bytes per second of all these."""
    alone: float
    """Bytes per second of reads of the same length, one after the other."""
    reading: float
    """Seconds of a core for each byte that is read."""
    merging: float
    """Seconds for each byte that all workers merge together; 0 where it was not tried."""
    hashing: float
    """Seconds of a core for each byte of an output that is hashed."""
    resident: float | None
    """The part of the sampled files that lay in the page cache, where that is known."""
    direct: bool | None
    """Whether what does not lie there is read past it, where that is known."""
    bytes_read: int
    """What the sample itself has read."""
    seconds: float
    """How long it took."""

    @property
    def serial(self) -> bool:
        """Whether reads only wait for each other, as on a disk with a head."""
        return self.together < SERIAL * self.alone

    def rate(self, threads: int, read: int) -> float:
        """Bytes per second of so many threads that each do one read after the other, of so many bytes."""
        alone = read / (self.latency + read / self.stream)
        if self.serial:
            return alone
        gain = self.together / self.alone
        if gain > STILL_GROWING * self.at_once:
            return alone * threads * gain / self.at_once
        return alone * min(threads, gain)


class Estimate(NamedTuple):
    """Seconds that a run will take."""

    reading: float
    writing: float
    working: float
    """What all cores that take part need for reading, merging, hashing and writing."""

    @property
    def total(self) -> float:
        """All of it: waiting for the storage and working overlap, but for the first and the last of it."""
        waiting = self.reading + self.writing
        return max(waiting, self.working) + UNHIDDEN * min(waiting, self.working)

    def in_words(self) -> str:
        """What it is made of."""
        return f"{self.reading:.1f} s of reading, {self.writing:.1f} s of writing, {self.working:.1f} s of work beside"


class Sample(NamedTuple):
    """Bytes that the plan needs, and that may be read to see how fast that goes."""

    source: int
    offset: int
    length: int


def samples(plan: Plan) -> Iterator[Sample]:
    """Long rows of tiles from all over the plan, of one source after the other; for ever, if there are any."""
    tiles = [tile for shard in plan.shards for tile in shard]
    longest = max((tile.stop - tile.start for tile in tiles), default=0)
    long = [tile for tile in tiles if 2 * (tile.stop - tile.start) >= longest]
    number = 0
    while long:
        # The golden ratio visits every part of a plan early, and seldom the same place twice.
        tile = long[int(number * 0.6180339887 % 1 * len(long))]
        strip = plan.strips[tile.strip]
        row = number % len(strip.sources)
        width = strip.dtypes[row].itemsize
        yield Sample(strip.sources[row], strip.offsets[row] + tile.start * width, (tile.stop - tile.start) * width)
        number += 1


def paced(plan: Plan, measured: Measured) -> Plan:
    """The same plan, cut as suits storage that was `measured`; the outputs are the same, byte for byte."""
    usual = replace(plan, measured=measured)
    if not plan.shards or not plan.budget.auto:
        return usual
    if measured.resident is not None and measured.resident > CACHED and "reads_in_flight" in plan.budget.auto:
        return recut(usual, replace(plan.budget, reads_in_flight=1))
    if measured.latency < SLOW:
        return usual
    best, speed = plan.budget, WORTH * measured.rate(plan.memory.threads, _row(plan, plan.memory))
    for budget in _alternatives(plan.budget):
        try:
            memory = memory_for(plan.strips, budget)
        except OverBudget:
            continue
        rate = measured.rate(memory.threads, _row(plan, memory))
        if memory.threads >= FEWEST and rate > speed:
            best, speed = budget, rate * WORTH
    return recut(usual, best)


def alike(plan: Plan, whole: Plan) -> Plan:
    """`plan`, with the pace of the pass of which it is a part."""
    return recut(replace(plan, measured=whole.measured), whole.budget)


def recut(plan: Plan, budget: Budget) -> Plan:
    """The same plan within another budget; raises `OverBudget`."""
    if budget == plan.budget:
        return plan
    memory = memory_for(plan.strips, budget)
    return replace(plan, budget=budget, memory=memory, shards=cut(plan.strips, memory))


def estimate(plan: Plan) -> Estimate | None:
    """How long the plan will take on the storage that was measured for it; None where none was."""
    seen = plan.measured
    if seen is None or not plan.shards:
        return None
    read, written = plan.bytes_read, plan.bytes_written
    beside = (read * seen.reading + written * (WRITING + seen.hashing)) / plan.budget.workers
    rate = seen.rate(plan.memory.threads, _row(plan, plan.memory))
    # What lies in the page cache says nothing of the disk that is written to; it is hidden behind the work then.
    writing = 0.0 if seen.resident is not None and seen.resident > CACHED else written / rate
    return Estimate(
        read / seen.rate(plan.memory.threads, _row(plan, plan.memory)), writing, read * seen.merging + beside
    )


def in_words(plan: Plan) -> str:
    """How rows are read, and why; empty where nothing was measured."""
    seen, budget = plan.measured, plan.budget
    if seen is None:
        return ""
    how = {None: "as the storage has it", "buffered": "through the page cache", "direct": "past the page cache"}
    way = how.get(budget.io, "past the page cache" if seen.direct else "through the page cache, which cannot be passed")
    if budget.io == "auto" and seen.resident:
        way += f" but for the {100 * seen.resident:.0f} % that lie in it"
    return (
        f"{budget.reads_in_flight} read(s) in flight for each of {budget.workers} worker(s), of up to "
        f"{si_bytes(_row(plan, plan.memory))}, {way}: a read alone waits {1000 * seen.latency:.1f} ms and then gets "
        f"{si_bytes(seen.stream)}/s, {seen.at_once} at once get {si_bytes(seen.together)}/s (a sample of "
        f"{si_bytes(seen.bytes_read)} in {seen.seconds:.2f} s)"
    )


def _alternatives(budget: Budget) -> Iterator[Budget]:
    reads = READS if "reads_in_flight" in budget.auto else (budget.reads_in_flight,)
    blocks = BLOCKS if "block" in budget.auto else (budget.block,)
    for block, many in product(blocks, reads):
        yield replace(budget, reads_in_flight=many, block=block)


def _row(plan: Plan, memory: Memory) -> int:
    """Bytes of the rows that most of the plan's bytes are read in."""
    widest = max(plan.strips, key=lambda strip: strip.bytes_per_element)
    longest = max(strip.elements for strip in plan.strips) * widest.dtypes[0].itemsize
    return max(
        min(memory.block * widest.dtypes[0].itemsize // widest.bytes_per_element, memory.longest_read, longest), 1
    )
