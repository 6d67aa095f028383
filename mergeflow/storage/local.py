"""Files on this machine, or on a file system that every machine of a cluster has mounted.

Reads and writes are positioned, so that one open file serves any number of threads. A draft lies beside its
final name, because only within one file system is a rename atomic.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat as kinds
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergeflow.errors import StorageError
from mergeflow.interfaces import Left
from mergeflow.storage import kernel
from mergeflow.storage.drafts import DraftFile
from mergeflow.storage.files import LocalFile, open_file
from mergeflow.storage.locks import LockFile, is_locked
from mergeflow.storage.notes import NOTES_SUFFIX, LocalNotes, NamedDraft, read_notes
from mergeflow.storage.refusals import refuse, refuse_reading, refuse_writing
from mergeflow.storage.sources import ReadBack, SourceFile
from mergeflow.tensors import FileStat

if TYPE_CHECKING:
    from mergeflow.interfaces import Io, Notes

log = logging.getLogger(__name__)

DRAFT_SUFFIX = ".draft"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What a file system without locks answers: NFS without a lock daemon, Lustre mounted without `flock`."""
NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""What a file system answers that cannot sync a directory, or a directory that may be written but not read."""


@dataclass(frozen=True)
class LocalStore:
    """Plain files, opened by path."""

    io: Io | None = None
    """How files that are read once are read (`storage.sources`); None where they may be read again. Drafts are
    always read through the page cache, in which their bytes are."""
    landing: int = 0
    """Bytes that each thread may use for reading past the page cache."""
    read_back: bool = True
    """Whether drafts are read back, and so written through the page cache; otherwise past it, where that can be."""

    def stat(self, path: str) -> FileStat:
        """What identifies the regular file behind `path`, through links."""
        try:
            found = os.stat(path)
        except OSError as error:
            if os.path.islink(path) and error.errno == errno.ENOENT:
                raise StorageError(f"{path} is a link to {os.readlink(path)}, which does not exist") from error
            refuse_reading(path, error)
        if kinds.S_ISDIR(found.st_mode):
            raise StorageError(f"{path} is a directory, not a checkpoint file")
        if not kinds.S_ISREG(found.st_mode):
            raise StorageError(f"{path} is not a regular file")
        return FileStat(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)

    def reader(self, path: str) -> LocalFile:
        """The file, open for reading; raises `StorageError`, also where it cannot be read as `io` says."""
        if self.io is not None:
            return ReadBack(path) if path.endswith(DRAFT_SUFFIX) else SourceFile(path, self.io, self.landing)
        return LocalFile(path, os.O_RDONLY)

    def draft(self, path: str, size: int) -> LocalDraft:
        """A new draft of `path`, at its full size; what an earlier run left is replaced."""
        return LocalDraft(Path(path), size)

    def left(self, path: str) -> Left | None:
        """What an earlier run has noted of the draft of `path`; None where it noted nothing."""
        draft = path + DRAFT_SUFFIX
        notes = read_notes(draft + NOTES_SUFFIX)
        size = os.stat(draft).st_size if os.path.isfile(draft) else None
        return Left(notes, size, is_held(draft)) if notes else None

    def reopen(self, path: str, size: int) -> LocalDraft | NamedDraft:
        """The draft of `path` as it is on the disk, or the file itself if it has its name already."""
        named = not exists(path + DRAFT_SUFFIX) and exists(path) and exists(path + DRAFT_SUFFIX + NOTES_SUFFIX)
        return NamedDraft(path, path + DRAFT_SUFFIX) if named else LocalDraft(Path(path), size, anew=False)

    def writer(self, address: str) -> LocalFile:
        """The draft at `address`, open for writing."""
        return LocalFile(address, os.O_WRONLY) if self.read_back else DraftFile(address)


class LocalDraft:
    """`NAME.draft` beside `NAME`, locked for as long as this process holds it.

    What an earlier run has left is replaced by another file, unless it is not to be made `anew`: workers of that run
    that have not noticed its end yet may still write to what they have open.
    """

    named = False

    def __init__(self, path: Path, size: int, *, anew: bool = True) -> None:
        self._path = path
        self._draft = path.with_name(path.name + DRAFT_SUFFIX)
        self.address = str(self._draft)
        self._notes = LocalNotes(self.address)
        self.notes: Notes = self._notes
        self._lock_file: LockFile | None = None
        if os.path.isdir(path):
            raise StorageError(f"{path} is a directory, so no file can get its name; choose another out=")
        if os.path.islink(self._draft):
            raise StorageError(f"{self.address} is a link, and writing would change what it leads to; remove it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._locked(anew)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                refuse_writing(self.address, error)
            raise
        self._open = True
        self._doubtful = 0
        try:
            if anew:
                self.notes.remove()
            else:
                kernel.uncache(self._fd)
            os.ftruncate(self._fd, size)
        except OSError as error:
            try:
                refuse_writing(self.address, error, self._fd)
            finally:
                self._give_up(anew)

    def _locked(self, anew: bool) -> int:
        """A descriptor of the draft that nobody else holds, and that is empty if it is to be made `anew`."""
        while True:
            descriptor = open_file(self.address, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            try:
                self._lock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            # Its holder may have renamed or removed the file between our open and our lock.
            with suppress(FileNotFoundError):
                opened = os.fstat(descriptor)
                if os.path.samestat(opened, os.stat(self.address)):
                    if not (anew and opened.st_size):
                        return descriptor
                    self.notes.remove()  # first: they must never stand beside another draft than theirs
                    os.unlink(self.address)
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"{self.address} is being written by another run; wait for it, or choose another out="
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if self._lock_file is None:
                self._lock_file = LockFile(self.address)
                if self._lock_file.overtaken:
                    log.warning("%s: took over the lock of %s, which is gone", self.address, self._lock_file.overtaken)

    def sync(self) -> None:
        """Make durable what was written."""
        if not self._open:
            raise StorageError(f"{self.address} was committed or discarded before; there is nothing to sync")
        try:
            if self._doubtful:
                raise OSError(self._doubtful, os.strerror(self._doubtful))
            os.fsync(self._fd)
        except OSError as error:
            # A second sync would succeed: the kernel tells a failure once, and takes what it could not write for
            # written (decision 0027).
            self._doubtful = error.errno or errno.EIO
            refuse_writing(self.address, error, self._fd)

    def commit(self) -> None:
        """Sync the bytes, rename the draft to its final name, sync the directory."""
        self.sync()
        try:
            os.replace(self._draft, self._path)
            _sync_directory(self._path.parent)
        except OSError as error:
            refuse_writing(self.address, error, self._fd)
        self.named = True
        self._close()

    def discard(self) -> None:
        """Remove the draft and its notes, unless it was committed."""
        self._give_up(remove=True)

    def keep(self) -> None:
        """Leave the draft and its notes, unless it was committed."""
        self._give_up(remove=False)

    def _give_up(self, remove: bool) -> None:
        if self._open:
            with suppress(OSError, StorageError):
                if remove:
                    self.notes.remove()
                    self._draft.unlink()
            self._close()

    def _close(self) -> None:
        self._open = False
        self._notes.close()
        os.close(self._fd)
        self._release()

    def _release(self) -> None:
        if self._lock_file is not None:
            self._lock_file.release()
            self._lock_file = None


def is_held(draft: str) -> bool:
    """Whether another run is at work on a draft, as far as the file system tells."""
    try:
        descriptor = open_file(draft, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return is_locked(draft)
    finally:
        os.close(descriptor)
    return False


def _sync_directory(directory: Path) -> None:
    """Make a rename durable, where the file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise


def list_files(directory: str) -> list[str]:
    """The paths of all files in `directory`, not below it, links to files included; raises `StorageError`."""
    try:
        with os.scandir(directory) as entries:
            # `entry.is_dir` would raise on a link that leads to itself, and hide all the others.
            return sorted(entry.path for entry in entries if not os.path.isdir(entry.path))
    except OSError as error:
        refuse(directory, error)


def free_bytes(directory: str) -> int:
    """Bytes that may still be written below `directory`, or below its nearest parent that exists."""
    place = nearest_existing(directory)
    try:
        found = os.statvfs(place)
    except OSError as error:
        refuse(str(place), error)
    return found.f_bavail * found.f_frsize


def writable_problem(directory: str) -> str | None:
    """Why nothing can be written below `directory`, or None; nothing is created to find out."""
    place = nearest_existing(directory)
    if not os.path.isdir(place):
        return f"{place} is not a directory"
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} lies on a read-only file system"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} may not be written to"
    return None


def exists(path: str) -> bool:
    """Whether anything has that name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def nearest_existing(directory: str) -> Path:
    """`directory`, or the closest of its parents that exists."""
    place = Path(directory).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place
