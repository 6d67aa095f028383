"""One open file of this machine: positioned reads and writes, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import suppress
from typing import NoReturn

from mergeflow.errors import StorageError
from mergeflow.storage import kernel

WRITEBACK = 16 << 20
"""Bytes written after which they are sent on their way to the disk, so that the last sync has little to wait for."""
FILE_MODE = 0o666
"""What a new file allows, less the umask."""

REMEDIES = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "may not be accessed; check its permissions",
    errno.EPERM: "may not be accessed; check its permissions",
    errno.EEXIST: "lies below something that is not a directory",
    errno.EISDIR: "is a directory",
    errno.ENOTDIR: "lies below something that is not a directory",
    errno.ELOOP: "is a link that leads to itself",
    errno.ENOSPC: "cannot be written: the disk is full; free some space or choose another out=",
    errno.EDQUOT: "cannot be written: the disk quota is used up; free some space or choose another out=",
    errno.EFBIG: "cannot be written: this file system or a limit forbids so large a file; choose another out=",
    errno.EROFS: "cannot be written: the file system is read-only; choose another out=",
    errno.EMFILE: "cannot be opened: this process has too many files open; raise `ulimit -n`",
    errno.EIO: "cannot be read or written: the device reports an I/O error",
    errno.ESTALE: "was replaced or removed on its server while it was open; run again",
}


class LocalFile:
    """One open file descriptor; the kernel keeps positioned calls of many threads apart."""

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        self._unsent = 0
        self._writing = threading.Lock()
        try:
            self._fd = open_file(path, flags)
        except OSError as error:
            refuse(path, error)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                refuse(self.path, error)
            if count == 0:
                ends_early(self.path, offset + done, offset + len(view))
            done += count

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
            except OSError as error:
                refuse(self.path, error)
            if count == 0:
                raise StorageError(f"{self.path} takes no more bytes at {offset + done:,}; its device gives no reason")
            done += count
        self._unsent += done
        if self._unsent >= WRITEBACK:
            self._unsent = 0
            kernel.start_writeback(self._fd)

    def close(self) -> None:
        """Close the descriptor, once; a network file system may report only now that a write failed."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            try:
                os.close(descriptor)
            except OSError as error:
                refuse(self.path, error)


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


def ends_early(path: str, end: int, expected: int) -> NoReturn:
    """Raise that a file has become shorter than its header says."""
    raise StorageError(
        f"{path} ends at byte {end:,}, but {expected:,} were expected; it was changed while it was being read"
    )


def refuse(path: str, error: OSError) -> NoReturn:
    """Raise what the system said, in words that help."""
    reason = REMEDIES.get(error.errno or 0, f"cannot be used: {error.strerror}")
    raise StorageError(f"{path} {reason}") from error
