"""Who may write a draft where the file system has no locks: a file that names its holder.

On the holder's own machine it can be seen whether its process is there. From another one, or from another container, it
is believed to be there as long as it touches the file now and then, by the clock of the file system, which all see.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergeflow.errors import StorageError
from mergeflow.storage.files import open_file
from mergeflow.storage.refusals import refuse_writing

LOCK_SUFFIX = ".lock"
"""Behind the name of the draft."""
RENEWED_EVERY = 15.0
STALE_AFTER = 120.0
"""Seconds without a sign of life from another machine. Longer than any pause that a healthy one makes."""


class LockFile:
    """`NAME.draft.lock`, which this process holds and renews until it is released."""

    def __init__(self, draft: str) -> None:
        """Take it; raises `StorageError` if another run has it.

        `overtaken` then tells whose lock was taken over because its run is gone; empty if there was none.
        """
        self.path = draft + LOCK_SUFFIX
        self.overtaken = ""
        self._draft = draft
        self._mine = json.dumps(_holder())
        while not self._created():
            self._overtake()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._renewing.start()

    def release(self) -> None:
        """Give it back."""
        self._ended.set()
        self._renewing.join()
        with suppress(OSError):
            if _read(self.path) == self._mine:
                os.unlink(self.path)

    def _created(self) -> bool:
        try:
            descriptor = open_file(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        except OSError as error:
            refuse_writing(self.path, error)
        with os.fdopen(descriptor, "w") as file:
            file.write(self._mine)
        return True

    def _overtake(self) -> None:
        """Put a stale lock away; raises `StorageError` if it is not stale."""
        found = _read(self.path)
        if found is None:
            return
        holder = _parsed(found)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
        if not _is_stale(self.path, holder):
            raise StorageError(
                f"{self._draft} is being written by another run ({who}); wait for it, choose another out=, or remove "
                f"{self.path} if you know that it is gone"
            )
        # Of several runs that find it stale, one moves it; who moves a fresh one by that, puts it back.
        aside = f"{self.path}.{socket.gethostname()}.{os.getpid()}"
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        except OSError as error:
            refuse_writing(self.path, error)
        if _read(aside) != found:
            with suppress(OSError):
                os.link(aside, self.path)
        else:
            self.overtaken = who
        with suppress(OSError):
            os.unlink(aside)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with suppress(OSError):  # a server that is away for a while is not the end of a run
                os.utime(self.path)


def is_locked(draft: str) -> bool:
    """Whether a run that may be alive has the lock file of a draft."""
    path = draft + LOCK_SUFFIX
    found = _read(path)
    return found is not None and not _is_stale(path, _parsed(found))


def _is_stale(path: str, holder: dict[str, Any]) -> bool:
    place, pid = _place(), holder.get("pid")
    if place and holder.get("place") == place and isinstance(pid, int):
        return _started(pid) != holder.get("started")
    with suppress(OSError):
        return _now(path) - os.stat(path).st_mtime > STALE_AFTER
    return False


def _now(path: str) -> float:
    """The time by the clock that stamps files beside `path`."""
    probe = Path(f"{path}.{socket.gethostname()}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _holder() -> dict[str, Any]:
    """This process, as a lock names it."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "place": _place(), "pid": pid, "started": _started(pid)}


def _place() -> str:
    """Where the number of a process means the same: this boot of this machine, within one container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process of this machine was started, in ticks since the machine was; None if there is none."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = told.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _parsed(text: str) -> dict[str, Any]:
    """Who holds it; empty where it was killed before it could say so."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
