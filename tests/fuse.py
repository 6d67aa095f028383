"""A file system of user space that fails when it is told to: what the kernel makes of it are real errors.

    python -m tests.fuse MOUNTPOINT DIRECTORY FAULTS

shows the files of DIRECTORY, for reading, until it is killed, and prints a line when it is mounted. As long as the file
FAULTS says `NUMBER COUNT`, that many reads fail with that errno. It speaks the kernel's protocol by itself
(`include/uapi/linux/fuse.h`, 7.31), so that nothing needs to be installed; only root may mount it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT = (
    *(1, 2, 3, 14, 15, 17, 18, 25, 26, 27, 28, 29, 36),
)
BATCH_FORGET = 42
UNANSWERED = (FORGET, INTERRUPT, BATCH_FORGET)
HEADER = struct.Struct("<IIQQIIIHH")
ATTRIBUTES = struct.Struct("<6Q10I")
DIRECT_IO = 1
"""Every read reaches us: the kernel keeps none."""
ROOT = 1
LONGEST = 1 << 17


class Server:
    """The files of one directory, by inode."""

    def __init__(self, directory: Path, faults: Path) -> None:
        self._faults = faults
        self._paths = {path.stat().st_ino: path for path in directory.iterdir()} | {ROOT: directory}

    def answer(self, operation: int, node: int, body: bytes) -> bytes:
        """What the kernel is told; raises `OSError` for what it is to report."""
        if operation == INIT:
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, LONGEST, 0, 16, 12, LONGEST, 1, 0, 0, 0, *[0] * 7)
        if operation == LOOKUP:
            found = {path.name: inode for inode, path in self._paths.items()}.get(body.rstrip(b"\0").decode())
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "")
            return struct.pack("<QQQQII", found, 0, 0, 0, 0, 0) + self._attributes(found)
        if operation == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if operation in (OPEN, OPENDIR):
            return struct.pack("<QIi", node, DIRECT_IO, 0)
        if operation == READ:
            return self._read(node, *struct.unpack_from("<QI", body, 8))
        if operation == READDIR:
            return self._entries(*struct.unpack_from("<Q", body, 8))
        if operation == STATFS:
            return struct.pack("<5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if operation in (RELEASE, RELEASEDIR, FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "")

    def _attributes(self, node: int) -> bytes:
        found = self._paths[node].stat()
        times = [found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns]
        mode = found.st_mode if stat.S_ISREG(found.st_mode) else stat.S_IFDIR | 0o755
        return ATTRIBUTES.pack(
            *(found.st_ino, found.st_size, found.st_blocks),
            *(time // 10**9 for time in times),
            *(time % 10**9 for time in times),
            *(mode, 1, 0, 0, 0, 4096, 0),
        )

    def _read(self, node: int, offset: int, size: int) -> bytes:
        if self._faults.exists():
            number, count = map(int, self._faults.read_text().split())
            if count > 0:
                self._faults.write_text(f"{number} {count - 1}")
                raise OSError(number, "")
        with self._paths[node].open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _entries(self, offset: int) -> bytes:
        entries = b""
        for number, (inode, path) in enumerate(self._paths.items(), 1):
            if inode != ROOT and number > offset:
                name = path.name.encode()
                entry = struct.pack("<QQII", inode, number, len(name), stat.S_IFREG >> 12) + name
                entries += entry + bytes(-len(entry) % 8)
        return entries


def serve(mountpoint: str, directory: Path, faults: Path) -> None:
    """Mount, and answer until the mount is gone."""
    server = Server(directory, faults)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"faulty", mountpoint.encode(), b"fuse", 0, options.encode()) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    while True:
        try:
            request = os.read(device, LONGEST + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            raise
        _, operation, unique, node, *_ = HEADER.unpack_from(request)
        if operation in UNANSWERED:
            continue
        try:
            told, number = server.answer(operation, node, request[HEADER.size :]), 0
        except OSError as error:
            told, number = b"", error.errno or errno.EIO
        os.write(device, struct.pack("<IiQ", 16 + len(told), -number, unique) + told)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
