"""What the system says when it refuses, in words that help: which file, why, the figures, and what to do.

What may pass when one waits is told apart from what will not: a read that met the former is `ReadFailed`. Of writes
nothing is, since no write that failed can be repeated and trusted (decision 0027).
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mergeflow.errors import ReadFailed, StorageError
from mergeflow.tensors import si_bytes
from mergeflow.text import LONGEST_PATH, shown

REMEDIES = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "may not be accessed; check its permissions",
    errno.EPERM: "may not be accessed; check its permissions",
    errno.EEXIST: "lies below something that is not a directory",
    errno.EISDIR: "is a directory",
    errno.ENOTDIR: "lies below something that is not a directory",
    errno.ELOOP: "is a link that leads to itself",
    errno.EFBIG: "cannot be written: this file system or a limit forbids so large a file; choose another out=",
    errno.EROFS: "cannot be written: the file system is read-only; choose another out=",
    errno.EMFILE: "cannot be opened: this process has too many files open; raise `ulimit -n`",
    errno.ENFILE: "cannot be opened: this machine has too many files open; raise `fs.file-max`",
}
NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
FAULTS = (errno.EIO, errno.EREMOTEIO, errno.ENODATA, errno.EBADMSG, errno.EILSEQ, errno.EUCLEAN)
"""A device that fails, or data on it that do not match their checksum; also a server behind a mount that gives up
(NFS with `soft`)."""
SILENCE = (
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENOLINK,
    errno.ECOMM,
)
"""A server that cannot be reached."""
GONE = (errno.ENOTCONN, errno.ESHUTDOWN, errno.ENXIO, errno.ENODEV)
"""A mount or a device that is no longer there: FUSE (sshfs, rclone) without its process, a disk pulled out."""
MAY_PASS = (*FAULTS, *SILENCE, *GONE, errno.ESTALE)


def refuse(path: str, error: OSError) -> NoReturn:
    """Raise what the system said of a path."""
    raise StorageError(f"{shown(path, LONGEST_PATH)} {_reason(path, error, 'used')}") from error


def refuse_reading(path: str, error: OSError) -> NoReturn:
    """Raise what the system said to a read, or to a look at a file."""
    kind = ReadFailed if error.errno in MAY_PASS or _mount_is_lost(path, error) else StorageError
    raise kind(f"{shown(path, LONGEST_PATH)} {_reason(path, error, 'read')}") from error


def refuse_writing(path: str, error: OSError, descriptor: int = -1) -> NoReturn:
    """Raise what the system said to a write, with what is free and still needed if `descriptor` is that of the file."""
    if error.errno in NO_ROOM:
        raise StorageError(
            f"{shown(path, LONGEST_PATH)} cannot be written: {NO_ROOM[error.errno]}{_room(descriptor)}; free some "
            "space, or choose another out="
        ) from error
    raise StorageError(f"{shown(path, LONGEST_PATH)} {_reason(path, error, 'written')}") from error


def _reason(path: str, error: OSError, done: str) -> str:
    number, said = error.errno or 0, error.strerror
    if _mount_is_lost(path, error):
        return f"does not exist, and its directory is {_emptiness(path)}; is its file system still mounted?"
    if number in FAULTS:
        return f"cannot be {done}: its device or server reports an error ({said}); see the system's log (dmesg)"
    if number in SILENCE:
        return f"cannot be {done}: its server does not answer ({said}); check the network and the mount"
    if number in GONE:
        return f"cannot be {done}: its file system or device is gone ({said}); mount it again"
    if number == errno.ESTALE:
        return f"cannot be {done}: it was replaced or removed on its server, or the server was set up anew ({said})"
    return REMEDIES.get(number, f"cannot be {done}: {said}")


def _mount_is_lost(path: str, error: OSError) -> bool:
    """Whether a file is missing because all around it is: what is left of a mount is an empty directory, or none."""
    return error.errno == errno.ENOENT and _emptiness(path) is not None


def _emptiness(path: str) -> str | None:
    """`empty` or `missing`, if the directory of a path is."""
    try:
        with os.scandir(Path(path).absolute().parent) as entries:
            return None if any(entries) else "empty"
    except FileNotFoundError:
        return "missing"
    except OSError:
        return None


def _room(descriptor: int) -> str:
    """What is free where an open file lies, and how much of it the disk does not have yet."""
    with suppress(OSError):
        around, file = os.fstatvfs(descriptor), os.fstat(descriptor)
        missing = max(file.st_size - file.st_blocks * 512, 0)
        free = around.f_bavail * around.f_frsize
        return f" ({si_bytes(free)} free there, and {si_bytes(missing)} of this file are not yet on it)"
    return ""
