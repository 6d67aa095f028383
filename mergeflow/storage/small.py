"""Small files that lie beside outputs: read as a whole, if they are files and small."""

from __future__ import annotations

import os
import stat as kinds
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def read_small(path: str | Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` of them; raises `OSError`, or `ValueError` for any other.

    A pipe that nobody writes to, or a device that never ends, would hold up whoever reads it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not kinds.S_ISREG(found.st_mode):
            raise ValueError("it is no file")
        if found.st_size > limit:
            raise ValueError(f"it has {found.st_size:,} bytes, and {limit:,} at most are read")
        return file.read(found.st_size)
