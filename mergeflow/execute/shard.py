"""One thread's work: for each tile of a shard, read its rows, merge them for every target, write the results.

Nothing here knows how many threads or machines there are. A shard may be done twice: it writes the same bytes to
the same places.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mergeflow.errors import MergeflowError, ReadFailed, SourceChanged, StorageError
from mergeflow.execute.arithmetic import Arithmetic
from mergeflow.execute.block import Block
from mergeflow.execute.patience import repeat
from mergeflow.execute.watch import change
from mergeflow.execute.written import Written
from mergeflow.interfaces import Receipt
from mergeflow.plan.tiles import PAGE
from mergeflow.tensors import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from mergeflow.execute.block import Row
    from mergeflow.interfaces import Reader, Store, Writer
    from mergeflow.plan.plan import Plan, Strip, Tile


class Witness(Protocol):
    """Who wants to see every byte of every output, in the order of the file."""

    def saw(self, output: int, begin: int, view: memoryview, stopped: Callable[[], bool]) -> None:
        """Take in what was written at `begin`; it may wait for what lies before, until `stopped`."""
        ...


@dataclass(frozen=True)
class Job:
    """What every worker is told once."""

    plan: Plan
    store: Store
    drafts: tuple[str, ...]
    """Where each of the plan's outputs is being written."""
    witness: Witness | None = None
    """Who is shown what was written, where the workers are threads of this process."""


class Stopped(Exception):
    """The run is being given up."""


class OpenFiles:
    """The sources and drafts of a job, each opened once per process and shared by its threads."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.store = job.store
        self._lock = threading.Lock()
        self._readers: dict[int, Reader] = {}
        self._writers: dict[int, Writer] = {}
        self._given_up: list[Reader] = []
        self.lost: set[int] = set()
        """Sources that have failed in spite of all patience: nobody is to wait for each of their rows."""

    def reader(self, source: int) -> Reader:
        """The checkpoint with that index."""
        reader = self._readers.get(source)
        if reader is None:
            with self._lock:
                reader = self._readers.get(source)
                if reader is None:
                    reader = self._job.store.reader(self._job.plan.checkpoints[source].path)
                    self._readers[source] = reader
        return reader

    def reopen(self, source: int, failed: Reader) -> Reader:
        """The checkpoint anew, unless another thread has replaced what `failed`; raises `SourceChanged`.

        Others may be reading from the one that failed, so it is closed with all the others.
        """
        with self._lock:
            if self._readers[source] is failed:
                checkpoint = self._job.plan.checkpoints[source]
                if (changed := change(checkpoint, self.store.stat(checkpoint.path))) is not None:
                    raise changed
                self._readers[source] = self.store.reader(checkpoint.path)
                self._given_up.append(failed)
            return self._readers[source]

    def writer(self, output: int) -> Writer:
        """The draft of the output with that index."""
        writer = self._writers.get(output)
        if writer is None:
            with self._lock:
                writer = self._writers.get(output)
                if writer is None:
                    writer = self._writers[output] = self._job.store.writer(self._job.drafts[output])
        return writer

    def close(self) -> None:
        """Give all files back. What the last writes of a draft met is told by its `commit`."""
        files: list[Reader | Writer] = [*self._readers.values(), *self._given_up, *self._writers.values()]
        for file in files:
            with suppress(MergeflowError, OSError):
                file.close()
        self._readers, self._writers, self._given_up = {}, {}, []


class ShardWorker:
    """One block of memory and the loop that fills it; it merges when it has its `turn`."""

    def __init__(
        self,
        job: Job,
        files: OpenFiles,
        stopped: Callable[[], bool] = lambda: False,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self._plan = job.plan
        self._witness = job.witness
        self._files = files
        self._stopped = stopped
        self._turn = turn or nullcontext()
        self._block = Block(job.plan.memory.block)
        self._arithmetic = Arithmetic(job.plan)
        self._repeated: Counter[str] = Counter()

    def run(self, shard: int) -> Receipt:
        """Merge and write every tile of `shard`; raises `UnmergeableValues` or `StorageError`."""
        written = Written()
        tolerated: Counter[tuple[int, str]] = Counter()
        failed: dict[int, MergeflowError] = {}
        bytes_read = 0
        for tile in self._plan.shards[shard]:
            bytes_read += self._tile(tile, written, tolerated, failed)
        checkpoints = self._plan.checkpoints
        repeated, self._repeated = self._repeated, Counter()
        spans, checksums = written.told()
        return Receipt(
            shard=shard,
            spans=spans,
            checksums=checksums,
            bytes_read=bytes_read,
            skipped=tuple((checkpoints[source].id, key, count) for (source, key), count in tolerated.items()),
            repeated=tuple(repeated.items()),
            failed=tuple(failed.items()),
            worker=f"{socket.gethostname()}:{os.getpid()}",
            peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _tile(
        self, tile: Tile, written: Written, tolerated: Counter[tuple[int, str]], failed: dict[int, MergeflowError]
    ) -> int:
        strip = self._plan.strips[tile.strip]
        rows, results = self._places(tile)
        impossible = self._read(strip, tile, rows)
        with self._turn:
            self._merge(tile, rows, results, tolerated, impossible)
        for index, (cell, row) in enumerate(zip(strip.cells, results, strict=True)):
            for place in cell.places:
                if index in impossible:
                    failed.setdefault(place.output, impossible[index])
                elif place.output not in failed:
                    begin = place.offset + tile.start * cell.dtype.itemsize
                    self._write(Span(place.output, begin, begin + row.end - row.begin), row, written, failed)
        return sum(row.end - row.begin for row in rows)

    def _places(self, tile: Tile) -> tuple[list[Row], list[Row]]:
        """Where the rows of a tile lie in the block, and behind them its rows of results.

        They lie in their pages as in their files; but rows of a tree, whose pieces are looked at together, evenly.
        """
        strip, elements = self._plan.strips[tile.strip], tile.stop - tile.start
        offsets = _positions(strip, tile)
        even = any(cell.steps for cell in strip.cells) and len({offset % PAGE for offset in offsets}) > 1
        rows = self._block.rows(strip.dtypes, elements, 0, None if even else offsets)
        dtypes = [cell.dtype for cell in strip.cells]
        places = [cell.places[0].offset + tile.start * cell.dtype.itemsize for cell in strip.cells]
        return rows, self._block.rows(dtypes, elements, rows[-1].end, places)

    def read(self, tile: Tile) -> int:
        """Fill the rows of a tile, and return their bytes; raises `StorageError`."""
        rows, _ = self._places(tile)
        self._read(self._plan.strips[tile.strip], tile, rows)
        return sum(row.end - row.begin for row in rows)

    def take_rows(self, other: ShardWorker, tile: Tile) -> None:
        """Have the rows of a tile that another worker has read."""
        end = self._places(tile)[0][-1].end
        self._block.view[:end] = other._block.view[:end]

    def merge(self, tile: Tile) -> None:
        """Make the results of a tile whose rows are there; raises `UnmergeableValues`."""
        rows, results = self._places(tile)
        self._merge(tile, rows, results, Counter(), {})

    def _merge(
        self,
        tile: Tile,
        rows: Sequence[Row],
        results: Sequence[Row],
        tolerated: Counter[tuple[int, str]],
        impossible: dict[int, MergeflowError],
    ) -> None:
        strip = self._plan.strips[tile.strip]
        self._arithmetic.merge(strip, tile, self._block, rows, results, tolerated, impossible)

    def _write(self, span: Span, row: Row, written: Written, failed: dict[int, MergeflowError]) -> None:
        """Put a row of results where it belongs; the draft may be gone if its job was given up, and others go on."""
        view = self._block.view[row.begin : row.end]
        try:
            self._files.writer(span.output).write(view, span.begin)
        except MergeflowError as error:
            if not self._plan.apart:
                raise
            failed[span.output] = error
            return
        written.add(span, view)
        if self._witness is not None:
            self._witness.saw(span.output, span.begin, view, self._stopped)

    def _read(self, strip: Strip, tile: Tile, rows: Sequence[Row]) -> dict[int, MergeflowError]:
        """Fill the rows of a tile; the cells that cannot be made because a row cannot be read, where others may be."""
        impossible: dict[int, MergeflowError] = {}
        positions = _positions(strip, tile)
        for number, (source, position, row) in enumerate(zip(strip.sources, positions, rows, strict=True)):
            if self._stopped():
                raise Stopped
            try:
                self._files.reader(source).read_into(self._block.view[row.begin : row.end], position)
            except MergeflowError as error:
                lasting = self._read_again(source, row, position, error)
                if lasting is None:
                    continue
                if not self._plan.apart:
                    raise lasting from lasting.__cause__
                cells = (index for index, cell in enumerate(strip.cells) if number in cell.rows)
                impossible |= {index: lasting for index in cells if index not in impossible}
        return impossible

    def _read_again(self, source: int, row: Row, position: int, error: MergeflowError) -> MergeflowError | None:
        """Fill a row whose reading met `error`, if that may pass; otherwise what is to be said of it."""
        files, checkpoint = self._files, self._plan.checkpoints[source]
        view = self._block.view[row.begin : row.end]

        def act(before: int) -> None:
            reader = files.reader(source)
            # The same descriptor first: only a mount that was lost needs another.
            (files.reopen(source, reader) if before else reader).read_into(view, position)

        try:
            if not isinstance(error, ReadFailed) or source in files.lost:
                raise error
            repeat(act, error, self._stopped)
        except MergeflowError as lasting:
            if self._stopped():
                raise Stopped from lasting
            files.lost.add(source)
            if isinstance(lasting, SourceChanged):  # which is told best by what became of the file
                with suppress(StorageError):
                    return change(checkpoint, files.store.stat(checkpoint.path)) or lasting
            return lasting
        self._repeated[checkpoint.id] += 1
        return None


def _positions(strip: Strip, tile: Tile) -> list[int]:
    """The byte of its file at which each row of a tile begins."""
    return [begin + tile.start * dtype.itemsize for begin, dtype in zip(strip.offsets, strip.dtypes, strict=True)]
