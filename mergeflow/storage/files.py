"""One open file of this machine: positioned reads and writes, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import suppress

from mergeflow.errors import ReadFailed, SourceChanged, StorageError
from mergeflow.storage import kernel
from mergeflow.storage.refusals import refuse_reading, refuse_writing

WRITEBACK = 16 << 20
"""Bytes written after which they are sent on their way to the disk, so that the last sync has little to wait for."""
FILE_MODE = 0o666
"""What a new file allows, less the umask."""


class LocalFile:
    """One open file descriptor; the kernel keeps positioned calls of many threads apart."""

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        self._refuse = refuse_reading if flags & os.O_ACCMODE == os.O_RDONLY else refuse_writing
        self._unsent = 0
        self._writing = threading.Lock()
        try:
            self._fd = open_file(path, flags)
        except OSError as error:
            self._refuse(path, error)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                refuse_reading(self.path, error)
            if count == 0:
                raise self._end(offset + done, offset + len(view))
            done += count

    def _end(self, end: int, expected: int) -> StorageError:
        """Why nothing came from byte `end` on, where more was expected: the file is shorter now, or it was a fault."""
        try:
            size = os.fstat(self._fd).st_size
        except OSError as error:
            refuse_reading(self.path, error)
        if size >= expected:
            return ReadFailed(f"{self.path} has {size:,} bytes, but gave none at {end:,}; check its disk or server")
        return SourceChanged(
            f"{self.path} ends at byte {end:,}, but {expected:,} were expected; it was changed while it was being "
            f"read, and has {size:,} bytes now"
        )

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`.

        One thread at a time: file systems let no more into a file, and those that wait for it in the kernel spin.
        """
        with self._writing:
            self._write(view, offset)

    def _write(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:  # never repeated: what was written before may be lost as well (decision 0027)
                refuse_writing(self.path, error, self._fd)
            if count == 0:
                raise StorageError(f"{self.path} takes no more bytes at {offset + done:,}; its device gives no reason")
            done += count
        self._unsent += done
        if self._unsent >= WRITEBACK:
            self._unsent = 0
            kernel.start_writeback(self._fd)

    def sync(self) -> None:
        """Make durable what was written; a network file system sends it to its server, where other machines see it."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            refuse_writing(self.path, error, self._fd)

    def close(self) -> None:
        """Close the descriptor, once; a network file system may report only now that a write failed."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            try:
                os.close(descriptor)
            except OSError as error:
                self._refuse(self.path, error)


def open_file(path: str, flags: int) -> int:
    """A descriptor; the limit on open files is raised as far as this process may, once it is met."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
