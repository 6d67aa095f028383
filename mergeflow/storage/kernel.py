"""What Linux does with the page cache and Python's `os` has no name for; where it is absent, only time is lost."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from typing import Any, NamedTuple

PAGE = mmap.PAGESIZE
CHUNK = 1 << 20
"""Bytes that are in the page cache, or not, as a whole: what one byte of a `residency` tells of."""
WINDOW = 64 * CHUNK
"""Bytes of a file that the kernel is asked about at a time."""
SYNC_FILE_RANGE_WAIT_BEFORE, SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WAIT_AFTER = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C library, or None where it has none of that name."""
    found = getattr(_libc, name, None)
    if found is not None:
        found.restype, found.argtypes = result, arguments
    return found


_map = _function(
    "mmap", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
)
_unmap = _function("munmap", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_mincore = _function("mincore", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_sync_file_range = _function(
    "sync_file_range", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_FAILED = ctypes.c_void_p(-1).value


def residency(descriptor: int) -> bytes:
    """For every MiB of an open file: 1 where most of it lies in the page cache, 0 where it does not, or nobody tells.

    The kernel tells only who may write to the file, or owns it; nothing is read, and nothing enters the cache.
    """
    found = os.fstat(descriptor)
    if _mincore is None or os.geteuid() not in (0, found.st_uid):
        return bytes(-(-found.st_size // CHUNK))
    return b"".join(
        _residency(descriptor, begin, min(WINDOW, found.st_size - begin)) for begin in range(0, found.st_size, WINDOW)
    )


def _residency(descriptor: int, begin: int, count: int) -> bytes:
    chunks = -(-count // CHUNK)
    address = _map(None, count, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, begin)
    if address == _FAILED:
        return bytes(chunks)
    try:
        pages = (ctypes.c_ubyte * -(-count // PAGE))()
        if _mincore(address, count, pages) != 0:
            return bytes(chunks)
    finally:
        _unmap(address, count)
    told, each = bytes(page & 1 for page in pages), CHUNK // PAGE
    parts = (told[first : first + each] for first in range(0, len(told), each))
    return bytes(2 * part.count(1) >= len(part) for part in parts)


def start_writeback(descriptor: int) -> None:
    """Have all that was written to a file begin its way to the disk; a later sync waits for what is left.

    What goes wrong on the way is told by that sync.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)


def write_out(descriptor: int, offset: int, count: int) -> None:
    """Have these bytes of a file written by the time this returns; what goes wrong is told by the last sync."""
    if _sync_file_range is not None:
        how = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
        _sync_file_range(descriptor, offset, count, how)


def uncache(descriptor: int) -> None:
    """Have the file's bytes read from its disk the next time.

    After a write that failed, the page cache holds what the disk does not, and takes it for written (decision 0027). So
    it does not matter whether this sync fails: what has not reached the disk is missing when it is read.
    """
    with suppress(OSError):
        os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class Pages(NamedTuple):
    """Bytes of a file that lie in their pages of memory as in those of the file."""

    head: int
    """How many there are of the first page, if it has others too."""
    middle: memoryview
    """Whole pages, one at least."""
    tail: int
    """How many there are of the last page, if it has others too."""


def in_pages(view: memoryview, offset: int) -> Pages | None:
    """The parts of `view`, which holds bytes of a file from `offset` on; None unless it lies as they do, for a page."""
    head, tail = -offset % PAGE, (offset + len(view)) % PAGE
    if (address_of(view) - offset) % PAGE or len(view) < head + PAGE + tail:
        return None
    return Pages(head, view[head : len(view) - tail], tail)


def address_of(view: memoryview) -> int:
    """Where a writable view lies in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def copy(into: int, address: int, count: int) -> None:
    """So many bytes from one address to another, without the interpreter's lock."""
    ctypes.memmove(into, address, count)
