"""A store whose writes wait for a word from the test, so that things happen to actors while they work."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeflow.storage.files import LocalFile
from mergeflow.storage.local import LocalDraft, LocalStore

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.interfaces import Left
    from mergeflow.storage.notes import NamedDraft
    from mergeflow.tensors import FileStat

BLIND = "MERGEFLOW_TEST_BLIND"
"""Set on nodes that see other files; its value is which."""


HEAD = 1024
"""Bytes at the beginning of a draft that are of no shard."""


@dataclass(frozen=True)
class GatedStore:
    """Local files; of each draft every process may write `free` times, and more once `open_gate` was called."""

    notes: Path
    free: int = 0
    seconds: float = 0.0
    """How long a write takes."""

    def open_gate(self) -> None:
        """Let everybody write."""
        (self.notes / "gate").touch()

    def stat(self, path: str) -> FileStat:
        """As on disk, but not on a node that is blind."""
        found = LocalStore().stat(path)
        return found._replace(size=found.size + 1) if os.environ.get(BLIND) == "sources" else found

    def reader(self, path: str) -> LocalFile:
        """As on disk; a node that is blind finds another draft."""
        if os.environ.get(BLIND) == "drafts" and path.endswith(".draft"):
            path = str(self.notes / "other")
        return LocalFile(path, os.O_RDONLY)

    def draft(self, path: str, size: int) -> LocalDraft:
        """As on disk."""
        return LocalStore().draft(path, size)

    def left(self, path: str) -> Left | None:
        """As on disk."""
        return LocalStore().left(path)

    def reopen(self, path: str, size: int) -> LocalDraft | NamedDraft:
        """As on disk."""
        return LocalStore().reopen(path, size)

    def writer(self, address: str) -> GatedFile:
        """A draft whose writes may wait; that it was opened is noted."""
        return GatedFile(address, self)

    def wait_for_processes(self, count: int, seconds: float = 60) -> set[int]:
        """The processes that have something to write, once there are so many."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = {int(path.name) for path in self.notes.glob("[0-9]*")}
            if len(found) >= count:
                return found
            time.sleep(0.02)
        raise TimeoutError(f"{count} processes should write")


class GatedFile(LocalFile):
    """A draft that waits for the gate."""

    def __init__(self, path: str, store: GatedStore) -> None:
        super().__init__(path, os.O_WRONLY)
        self._gate, self._left, self._seconds = store.notes / "gate", store.free, store.seconds
        self._note = store.notes / str(os.getpid())

    def write(self, view: memoryview, offset: int) -> None:
        """Wait, then write. The head of a draft is no shard's, and needs no gate."""
        if offset >= HEAD:
            self._note.touch()
            while self._left <= 0 and not self._gate.exists():
                time.sleep(0.01)
            self._left -= 1
            time.sleep(self._seconds)
        super().write(view, offset)
