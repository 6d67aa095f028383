"""A file whose bytes are wanted once: read past the page cache, or through it without driving out what others keep.

Bytes that are in the page cache when the file is opened are copied from there and stay there. All others are read
with O_DIRECT, which costs a fraction of the kernel's work and leaves the cache alone; where a file system refuses
that, they are read through the cache and dropped from it. Memory that lies in its pages as the bytes do in those of the
file is filled by the device itself; to any other, what has landed in a thread's own pages is copied.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from typing import TYPE_CHECKING

from mergeflow.errors import StorageError
from mergeflow.storage import kernel
from mergeflow.storage.files import LocalFile, open_file
from mergeflow.storage.kernel import CHUNK, PAGE, address_of, copy, in_pages, residency
from mergeflow.storage.refusals import refuse_reading

if TYPE_CHECKING:
    from mergeflow.interfaces import Io

REFUSALS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a file system says that cannot read past the page cache, or not from where we begin."""
SMALL = 64 << 10
"""Bytes; so little is copied faster than a device is told of three places."""
READ_BACK = 64 << 20
"""Bytes of a draft that may still be on their way to the disk after they were read back."""

_threads = threading.local()


class SourceFile(LocalFile):
    """One file that is read once; `landing` is how many bytes a thread may read at a time past the cache."""

    def __init__(self, path: str, io: Io, landing: int) -> None:
        super().__init__(path, os.O_RDONLY)
        self._landing = max(landing, 2 * PAGE)
        self._by_name = io == "direct"
        self._direct = -1 if io == "buffered" else self._past_the_cache()
        # Asked for by name, all is read past the cache, whatever it holds.
        self._resident = b"" if self._by_name else residency(self._fd)

    def _past_the_cache(self) -> int:
        """A descriptor that goes past the cache, or -1 where there is none."""
        try:
            return open_file(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno not in REFUSALS:
                refuse_reading(self.path, error)
            self._refused()
        return -1

    def _refused(self) -> None:
        if self._by_name:
            raise StorageError(
                f"{self.path} cannot be read with executor.io=direct: its file system refuses O_DIRECT; choose "
                "executor.io=auto or buffered"
            )

    @property
    def direct(self) -> bool:
        """Whether what is not in the page cache is read past it."""
        return self._direct >= 0

    @property
    def resident(self) -> float:
        """The part of the file that was in the page cache when it was opened, as far as the kernel tells."""
        return self._resident.count(1) / max(len(self._resident), 1)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`."""
        if self._is_resident(offset, len(view)):
            super().read_into(view, offset)
        elif self._direct >= 0:
            self._read_past_the_cache(view, offset)
        else:
            super().read_into(view, offset)
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _is_resident(self, offset: int, count: int) -> bool:
        """Whether most of these bytes were in the cache at the beginning."""
        part = self._resident[offset // CHUNK : -(-(offset + count) // CHUNK)]
        return 2 * part.count(1) > len(part)

    def _read_past_the_cache(self, view: memoryview, offset: int) -> None:
        """Have the device fill `view` where it can, but for what shares a page at either end with other bytes."""
        landing, address = _landing(self._landing)
        parts = in_pages(view, offset) if len(view) >= SMALL else None
        if parts is None:
            self._read_by_landing(view, offset, landing, address)
            return
        first, last = landing[:PAGE], landing[PAGE : 2 * PAGE]
        pages = [first, parts.middle, last] if parts.head else [parts.middle, last]
        before = PAGE - parts.head if parts.head else 0
        try:
            arrived = os.preadv(self._direct, pages if parts.tail else pages[:-1], offset - before) - before
        except OSError:
            arrived = -1  # what is wrong is found out below, if it is still wrong
        if arrived < len(view):
            self._read_by_landing(view, offset, landing, address)
            return
        view[: parts.head] = first[before : before + parts.head]
        view[len(view) - parts.tail :] = last[: parts.tail]

    def _read_by_landing(self, view: memoryview, offset: int, landing: memoryview, address: int) -> None:
        """Read the pages that hold the wanted bytes, and copy these to where they belong."""
        done = 0
        while done < len(view):
            skipped = (offset + done) % PAGE
            begin, wanted = offset + done - skipped, skipped + len(view) - done
            try:
                count = os.preadv(self._direct, [landing[: min(wanted + -wanted % PAGE, len(landing))]], begin)
            except OSError as error:
                if error.errno not in REFUSALS:
                    refuse_reading(self.path, error)
                self._refused()
                super().read_into(view[done:], offset + done)
                return
            arrived = min(count - skipped, len(view) - done)
            if arrived <= 0:
                raise self._end(offset + done, offset + len(view))
            copy(address_of(view[done:]), address + skipped, arrived)
            done += arrived

    def close(self) -> None:
        """Close both descriptors, once."""
        descriptor, self._direct = self._direct, -1
        if descriptor >= 0:
            os.close(descriptor)
        super().close()


class ReadBack(LocalFile):
    """A draft that is read once behind its writers: what has been read and is on the disk leaves the page cache.

    So an output drives out little of what others keep there, and the pages of what is written next are those that were
    just given back, which the kernel, and what runs a virtual machine, have at hand.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, os.O_RDONLY)
        self._leaving: deque[tuple[int, int]] = deque()
        self._held = 0

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`."""
        super().read_into(view, offset)
        self._leaving.append((offset, len(view)))
        self._held += len(view)
        while self._held > READ_BACK:
            self._leave()

    def _leave(self) -> None:
        offset, count = self._leaving.popleft()
        self._held -= count
        kernel.write_out(self._fd, offset, count)
        os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)


def _landing(size: int) -> tuple[memoryview, int]:
    """This thread's own memory for what comes past the cache, and its address, on a page."""
    found: tuple[memoryview, int] | None = getattr(_threads, "landing", None)
    if found is None or len(found[0]) != size:
        view = memoryview(mmap.mmap(-1, size))
        found = _threads.landing = (view, address_of(view))
    return found
