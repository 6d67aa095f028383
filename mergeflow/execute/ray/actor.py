"""What runs on the nodes: a process that works on shards, tells how far it is, and ends when nobody asks any more."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.execute.ray.nodes import memory_of_this_node

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mergeflow.execute.local import Crew
    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Draft, Left, Reader, Receipt, Store, Writer
    from mergeflow.tensors import FileStat

CONTROL = "control"
"""The threads of an actor that are never busy with shards."""
LEASE_SECONDS = 30.0
"""How long an actor works on without being asked how far it is."""


class Pulse(NamedTuple):
    """An actor's answer to how far it is."""

    number: int
    """Of the question."""
    acts: int
    """How many reads and writes it has finished."""
    memory: int
    """Bytes of its node."""
    available: int
    """Bytes of these that are free, or can be made so."""


class Lease:
    """How long an actor may go on: from its last answer of which it knows that it has arrived.

    So whoever asks knows, too: an actor that answers no more has ended `seconds` after the last answer, even where a
    network that was cut keeps it from being killed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._answered = {0: time.monotonic()}
        self._ends = self._answered[0] + seconds

    def answer(self, number: int, acknowledged: int) -> None:
        """Note an answer, and that an earlier one has arrived."""
        self._answered[number] = time.monotonic()
        if acknowledged in self._answered:
            self._ends = self._answered[acknowledged] + self._seconds
            self._answered = {one: when for one, when in self._answered.items() if one >= acknowledged}

    def left(self) -> float:
        """Seconds until it ends."""
        return self._ends - time.monotonic()


class ShardActor:
    """A process of a cluster that works on shards, several at a time."""

    _store: CountingStore
    _lease: Lease
    _durable: bool
    _drafts: tuple[str, ...]

    def __init__(self) -> None:
        self._crew: Crew | None = None

    def begin(self, job: Job, lease: float, durable: bool) -> int:
        """Make ready, and return the process's id. `durable` is whether receipts wait for what they prove to be synced.

        The page cache of another machine is not that of the one which commits.
        """
        from mergeflow.execute.local import Crew  # which loads torch

        self._store, self._lease, self._durable = CountingStore(job.store), Lease(lease), durable
        self._crew, self._drafts = Crew(replace(job, store=self._store), workers=1), job.drafts
        threading.Thread(target=self._end_with, args=(self._lease,), name="lease", daemon=True).start()
        return os.getpid()

    def run(self, shard: int) -> Receipt | None:
        """Do one shard; None if the actor was told to stop."""
        from mergeflow.execute.shard import Stopped

        assert self._crew is not None, "it has begun"
        with suppress(Stopped):
            receipt = self._crew.run(shard)
            if self._durable:
                self._store.sync({self._drafts[span.output] for span in receipt.spans})
            return receipt
        return None

    def pulse(self, number: int, acknowledged: int) -> Pulse:
        """How far it is; `acknowledged` is the last answer that has arrived."""
        self._lease.answer(number, acknowledged)
        return Pulse(number, self._store.acts, *memory_of_this_node())

    def stop(self) -> None:
        """Let what is under way come to its end, and begin nothing more."""
        if self._crew is not None:
            self._crew.stopped.set()

    @staticmethod
    def _end_with(lease: Lease) -> None:
        while (left := lease.left()) > 0:
            time.sleep(min(left, 1.0))
        os._exit(1)  # at once, over whatever it writes: somebody else may have its shards by now


class CountingStore:
    """A store that counts what is read and written by it, as a sign of life, and can sync all its drafts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writers: dict[str, Writer] = {}
        self.acts = 0

    def stat(self, path: str) -> FileStat:
        """As the store has it."""
        return self._store.stat(path)

    def draft(self, path: str, size: int) -> Draft:
        """As the store has it."""
        return self._store.draft(path, size)

    def left(self, path: str) -> Left | None:
        """As the store has it."""
        return self._store.left(path)

    def reopen(self, path: str, size: int) -> Draft:
        """As the store has it."""
        return self._store.reopen(path, size)

    def reader(self, path: str) -> Reader:
        """A file whose reads count."""
        return _CountingReader(self, self._store.reader(path))

    def writer(self, address: str) -> Writer:
        """A draft whose writes count."""
        writer = self._writers[address] = self._store.writer(address)
        return _CountingWriter(self, writer)

    def sync(self, addresses: Iterable[str]) -> None:
        """Make durable what was written to these drafts; raises `StorageError`."""
        for address in addresses:
            self._writers[address].sync()
            self.acts += 1


class _CountingReader:
    def __init__(self, store: CountingStore, reader: Reader) -> None:
        self._store, self._reader = store, reader

    def read_into(self, view: memoryview, offset: int) -> None:
        self._reader.read_into(view, offset)
        self._store.acts += 1

    def close(self) -> None:
        self._reader.close()


class _CountingWriter:
    def __init__(self, store: CountingStore, writer: Writer) -> None:
        self._store, self._writer = store, writer

    def write(self, view: memoryview, offset: int) -> None:
        self._writer.write(view, offset)
        self._store.acts += 1

    def sync(self) -> None:
        self._writer.sync()

    def close(self) -> None:
        self._writer.close()
