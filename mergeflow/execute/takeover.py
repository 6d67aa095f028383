"""What an earlier run has left of an output: whether it is of the same, and which of its bytes prove right."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import xxhash

from mergeflow.errors import StorageError
from mergeflow.execute.journal import joined, parse
from mergeflow.execute.patience import patiently
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.execute.journal import Entry
    from mergeflow.interfaces import Reader, Store
    from mergeflow.plan.identity import OutputIdentity
    from mergeflow.plan.plan import Output

STEP = 4 << 20
"""Bytes read at a time."""
READS_AT_ONCE = 4
AFRESH = "to begin afresh, leave out resume=true and give overwrite=true"


def usable(notes: bytes, identity: OutputIdentity, draft: str) -> tuple[Entry, ...]:
    """What may be gone on with, if it proves right; raises `StorageError` if the notes are of another output.

    Lines that were cut short or garbled are left out: what they told of is made again.
    """
    journal = parse(notes)
    if journal.identity is None:
        if not journal.entries:
            return ()  # stopped before it had noted anything
        raise StorageError(
            f"{draft} cannot be resumed: its journal begins with a damaged line or is of another version, so nobody "
            f"can tell what its {si_bytes(journal.claimed)} are of; {AFRESH}"
        )
    if why := identity.differs(journal.identity):
        raise StorageError(
            f"{draft} cannot be resumed: {si_bytes(journal.claimed)} of it are there, but of another plan: {why}; give "
            f"what was given then, or {AFRESH}"
        )
    return journal.entries


def proved(entries: Sequence[Entry], output: Output, address: str, store: Store) -> tuple[Entry, ...]:
    """Those entries whose bytes are in the draft as they were written; raises `StorageError` if it cannot be read."""
    begin, end = output.data
    sane = [entry for entry in entries if begin <= entry.begin and entry.end <= end]
    buffers = threading.local()
    with closing(store.reader(address)) as reader, ThreadPoolExecutor(READS_AT_ONCE) as pool:
        right = pool.map(lambda entry: _is_there(entry, reader, buffers), sane)
        try:
            return tuple(entry for entry, there in zip(sane, right, strict=True) if there)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def has_head(output: Output, address: str, store: Store) -> bool:
    """Whether a file begins as the output does, and has its size; raises `StorageError`."""
    head = output.layout.head
    found = bytearray(len(head))
    if store.stat(address).size != output.layout.size:
        return False
    with closing(store.reader(address)) as reader:
        reader.read_into(memoryview(found), 0)
    return found == head


def extents(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """The bytes that entries tell of, in runs that do not touch."""
    return joined((entry.begin, entry.end) for entry in entries)


def _is_there(entry: Entry, reader: Reader, buffers: threading.local) -> bool:
    if not hasattr(buffers, "view"):
        buffers.view = memoryview(bytearray(STEP))
    digest = xxhash.xxh3_128()
    for position in range(entry.begin, entry.end, STEP):
        view = buffers.view[: min(STEP, entry.end - position)]
        patiently(partial(reader.read_into, view, position))
        digest.update(view)
    return digest.digest() == entry.checksum
