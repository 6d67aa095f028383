"""The bare storage: files merely read, bytes merely written and synced, and what lies in the page cache.

Nothing is made of the bytes. How fast that goes depends on how it is done, so there are several ways, and the best of
them is the floor that a merge is measured against.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MIB = 1 << 20
DROP = Path("/proc/sys/vm/drop_caches")
PAGE_CACHE_AND_INODES = "3"


class Way(NamedTuple):
    """How bytes are moved."""

    threads: int
    block: int
    """Bytes of one call."""
    direct: bool = False
    """Whether the page cache is left out."""

    def __str__(self) -> str:
        how = "O_DIRECT" if self.direct else "buffered"
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}, {self.block // MIB} MiB, {how}"


READS = tuple(
    Way(threads, block * MIB, direct) for threads in (1, 2, 4, 8, 16) for block in (1, 4) for direct in (False, True)
)
WRITES = tuple(
    Way(threads, block * MIB, direct) for threads, block in ((1, 4), (4, 4), (4, 16)) for direct in (False, True)
)


def read(paths: Sequence[Path], way: Way, most: int | None = None) -> float:
    """Seconds in which every byte of the files is read once, file by file, by all threads together.

    With `most`, no more than so many bytes of each file are read, in whole blocks.
    """
    with ExitStack() as stack:
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if way.direct else 0)
        files = []
        for path in paths:
            files.append(os.open(path, flags))
            stack.callback(os.close, files[-1])
        sizes = [min(os.fstat(file).st_size, most or sys.maxsize) for file in files]
        pieces = [
            (file, offset) for file, size in zip(files, sizes, strict=True) for offset in range(0, size, way.block)
        ]
        buffers = _buffers(way)
        began = time.perf_counter()
        _by_threads(buffers, pieces, lambda file, buffer, offset: os.preadv(file, [buffer], offset))
        return time.perf_counter() - began


def write(paths: Sequence[Path], size: int, way: Way) -> float:
    """Seconds in which so many bytes are written into each new file, and all of them synced; they are left there."""
    with ExitStack() as stack:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | (os.O_DIRECT if way.direct else 0)
        buffers = _buffers(way)
        began = time.perf_counter()
        files = []
        for path in paths:
            files.append(os.open(path, flags))
            stack.callback(os.close, files[-1])
            os.ftruncate(files[-1], size)
        pieces = [(file, offset) for file in files for offset in range(0, size, way.block)]

        def put(file: int, buffer: memoryview, offset: int) -> int:
            return os.pwrite(file, buffer if way.direct else buffer[: size - offset], offset)

        _by_threads(buffers, pieces, put)
        for file in files:
            os.ftruncate(file, size)  # a direct write ends with a whole block
            os.fsync(file)
        return time.perf_counter() - began


def both(paths: Sequence[Path], out: Path, size: int, reading: Way, writing: Way) -> float:
    """Seconds in which the files are read while so many bytes are written and synced, as a merge has to.

    It is what the slower of the two takes: they begin together, but for what it takes to make their buffers.
    """
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(read, paths, reading), pool.submit(write, [out], size, writing)]
        return max(job.result() for job in jobs)


def drop(paths: Iterable[Path]) -> str:
    """Put what is cached of the files out of memory, and say how: for the whole machine, or for these files alone."""
    os.sync()
    if os.access(DROP, os.W_OK):
        DROP.write_text(PAGE_CACHE_AND_INODES)
        return "cold: the page cache was dropped"
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "cold: only these files were dropped from the page cache, since nobody but root may drop all of it"


def warm(paths: Sequence[Path]) -> None:
    """Have the files in the page cache, as far as it has room for them."""
    read(paths, Way(4, 4 * MIB))


def best_write(place: Path, size: int, repeats: int = 2) -> Way:
    """The fastest way to write and sync so many bytes into a new file of `place`."""
    took: dict[Way, float] = {}
    path = place / "written"
    for way in WRITES * repeats:
        with suppress(OSError):  # not every file system knows O_DIRECT
            took[way] = min(took.get(way, math.inf), write([path], size, way))
        path.unlink(missing_ok=True)
    return min(took, key=took.__getitem__)


def _by_threads(
    buffers: Sequence[memoryview], pieces: Iterable[tuple[int, int]], act: Callable[[int, memoryview, int], int]
) -> None:
    """A thread for each buffer, and every piece to the thread that is free."""
    waiting = deque(pieces)

    def work(buffer: memoryview) -> None:
        with suppress(IndexError):
            while True:
                file, offset = waiting.popleft()
                act(file, buffer, offset)

    with ThreadPoolExecutor(len(buffers)) as pool:
        for done in [pool.submit(work, buffer) for buffer in buffers]:
            done.result()


def _buffers(way: Way) -> list[memoryview]:
    """A buffer for each thread, on whole pages as O_DIRECT wants it, and filled: first touches are not measured."""
    buffers = [memoryview(mmap.mmap(-1, way.block)) for _ in range(way.threads)]
    for buffer in buffers:
        for offset in range(0, way.block, MIB):
            buffer[offset : offset + MIB] = _noise()
    return buffers


@lru_cache(maxsize=1)
def _noise() -> bytes:
    """Bytes that no storage can make less of."""
    return os.urandom(MIB)


def memory_bytes() -> int:
    """What the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
