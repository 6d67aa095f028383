"""Slow storage: Python imports this at its start where it finds it, and every write of a draft takes its time.

So a small merge has a middle, on a machine of two cores too, and nothing of it is in the product. Each write is noted
in a file of its host; while there is a file `hold`, nobody writes.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

_directory = Path(os.environ["SLOW_NOTES"])
_seconds = float(os.environ["SLOW_SECONDS"])
_notes = os.open(_directory / socket.gethostname(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
_hold = _directory / "hold"
_write = os.pwrite


def _slow_write(descriptor: int, data: Any, offset: int) -> int:
    time.sleep(_seconds)
    while _hold.exists():
        time.sleep(0.05)
    count = _write(descriptor, data, offset)
    os.write(_notes, b"%d\n" % offset)
    return count


os.pwrite = _slow_write
