"""A sample of a run: how fast the storage gives a few of the bytes that it will read, and how fast they are merged.

It reads about a hundredth of what the run will read, for half a second at most, and only what is selected.
"""

from __future__ import annotations

import hashlib
import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch

from mergeflow.errors import MergeflowError
from mergeflow.execute.shard import Job, OpenFiles, ShardWorker
from mergeflow.plan.pace import STILL_GROWING, Measured, samples
from mergeflow.plan.tiles import PIECE
from mergeflow.storage.sources import SourceFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mergeflow.interfaces import Reader, Store
    from mergeflow.plan.pace import Sample
    from mergeflow.plan.plan import Plan

SHARE = 100
"""One byte of so many is read for the sample, at most."""
SECONDS = 0.5
"""After so long no further read is begun."""
FILES = 8
"""Of so many sources the sample is, at most."""
UNIT = 1 << 20
"""Bytes of a read of those that are done at once; one of `PARTS` of what the sample may read, where that is less."""
PARTS = 48
SMALLEST_UNIT = 16 << 10
"""Bytes; shorter reads say nothing of long ones."""
AT_ONCE, MORE_AT_ONCE = 8, 32
SINGLE = 4
"""How often a read is tried alone."""
MERGED = 4 * PIECE
"""Elements of the tile that is merged."""
MERGING_SECONDS, LEAST_MERGED = 0.15, 3
"""How long it is merged, again and again, and how often at least."""


def probe(plan: Plan, store: Store, clock: Callable[[], float] = time.perf_counter) -> Measured | None:
    """What a sample of `plan` shows, or None where it cannot be read, or has nothing that could be.

    `clock` tells seconds, as `time.perf_counter` does.
    """
    with suppress(MergeflowError), closing(OpenFiles(Job(plan.for_workers(), store, ()))) as files:
        return _Probe(plan, files, clock).measured()
    return None  # what is wrong with the storage is told by the run, which meets it too


class _Probe:
    """The readings of one sample."""

    def __init__(self, plan: Plan, files: OpenFiles, clock: Callable[[], float]) -> None:
        self._plan, self._files, self._clock = plan, files, clock
        self._samples = list(islice(samples(plan), 1000))
        shortest = min((one.length for one in self._samples), default=0)
        self._unit = min(UNIT, plan.bytes_read // SHARE // PARTS, shortest // 2)
        few = sorted({one.source for one in self._samples})[:: -(-len(plan.checkpoints) // FILES)]
        self._samples = [one for one in self._samples if one.source in few]
        self._next = 0
        self._bytes = 0

    def measured(self) -> Measured | None:
        """Reads alone, short and long; reads at once; a tile; a hash."""
        if self._unit < SMALLEST_UNIT:
            return None
        readers = {source: self._files.reader(source) for source in {one.source for one in self._samples}}
        began = self._clock()
        until = began + SECONDS
        buffer = _memory(2 * self._unit)
        short = self._alone(readers, buffer[: self._unit // 16], until)
        long = self._alone(readers, buffer, until)
        stream = (len(buffer) - self._unit // 16) / max(long - short, 1e-6)
        latency = max(short - self._unit // 16 / stream, 0.0)
        at_once, size = AT_ONCE, self._unit
        together, reading = self._together(readers, at_once, size, until)
        if together * (latency + size / stream) > STILL_GROWING * at_once * size and self._clock() < until:
            at_once, size = MORE_AT_ONCE, self._unit // 4
            together, reading = self._together(readers, at_once, size, until)
        seconds = self._clock() - began
        sources = [reader for reader in readers.values() if isinstance(reader, SourceFile)]
        return Measured(
            latency=latency,
            stream=stream,
            at_once=at_once,
            together=together,
            alone=size / (latency + size / stream),
            reading=reading,
            merging=self._merging(),
            hashing=_hashing(),
            resident=fmean(one.resident for one in sources) if sources else None,
            direct=all(one.direct for one in sources) if sources else None,
            bytes_read=self._bytes,
            seconds=seconds,
        )

    def _take(self) -> Sample:
        taken = self._samples[self._next % len(self._samples)]
        self._next += 1
        return taken

    def _read(self, reader: Reader, view: memoryview, sample: Sample) -> float:
        self._bytes += len(view)
        began = self._clock()
        reader.read_into(view, sample.offset)
        return self._clock() - began

    def _alone(self, readers: dict[int, Reader], view: memoryview, until: float) -> float:
        """Seconds that one read takes while no other is done, at best."""
        taken = []
        for _ in range(SINGLE):
            sample = self._take()
            taken.append(self._read(readers[sample.source], view, sample))
            if self._clock() >= until:
                break
        return min(taken)  # the others have met what else the machine does

    def _together(self, readers: dict[int, Reader], at_once: int, size: int, until: float) -> tuple[float, float]:
        """Bytes per second of reads at once, and the seconds of a core that each byte takes."""
        parts = [[self._take(), self._take()] for _ in range(at_once)]

        def work(part: Sequence[Sample]) -> tuple[int, float]:
            view, done, began = _memory(size), 0, time.thread_time()
            for sample in part:
                if not done or self._clock() < until:
                    self._read(readers[sample.source], view, sample)
                    done += len(view)
            return done, time.thread_time() - began

        with ThreadPoolExecutor(at_once) as pool:
            began = self._clock()
            done = list(pool.map(work, parts))
            taken = max(self._clock() - began, 1e-6)
        read = sum(count for count, _ in done)
        return read / taken, sum(busy for _, busy in done) / read

    def _merging(self) -> float:
        """Seconds for each byte that all workers merge together; 0 where the values of the sample forbid it.

        They do it at once, because they take the interpreter and the caches from each other.
        """
        plan = self._plan
        tile = max((tile for shard in plan.shards for tile in shard), key=lambda tile: tile.stop - tile.start)
        tile = tile._replace(stop=min(tile.stop, tile.start + MERGED))
        job = Job(plan.for_workers(), self._files.store, ())
        teams = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            workers = [ShardWorker(job, self._files) for _ in range(plan.budget.workers)]
            read = workers[0].read(tile)
            self._bytes += read
            for worker in workers[1:]:
                worker.take_rows(workers[0], tile)
            until = time.perf_counter() + MERGING_SECONDS

            def work(worker: ShardWorker) -> float:
                worker.merge(tile)  # the first is slower than all that follow
                taken: list[float] = []
                while len(taken) < LEAST_MERGED or time.perf_counter() < until:
                    began = time.perf_counter()
                    worker.merge(tile)
                    taken.append(time.perf_counter() - began)
                return read / median(taken)

            with ThreadPoolExecutor(len(workers)) as pool:
                return 1 / sum(pool.map(work, workers))
        except MergeflowError:
            return 0.0
        finally:
            torch.set_num_threads(teams)


def _memory(size: int) -> memoryview:
    """Memory whose pages are there already."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    return memoryview(memory)


def _hashing() -> float:
    """Seconds of a core that SHA-256 takes for a byte."""
    data = bytes(UNIT)
    began = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - began) / len(data)
