"""The notes beside a draft: a file to which is appended, or that is replaced."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from mergeflow.storage.files import open_file
from mergeflow.storage.refusals import refuse_reading, refuse_writing

if TYPE_CHECKING:
    from mergeflow.interfaces import Notes

NOTES_SUFFIX = ".journal"
"""Behind the name of the draft."""
NEW_SUFFIX = ".new"
"""Behind the name of notes that are to replace others; who writes them has the draft's lock."""


class LocalNotes:
    """`NAME.draft.journal`, which appears with the first word. One thread writes, any other may sync meanwhile."""

    def __init__(self, draft: str) -> None:
        self.path = draft + NOTES_SUFFIX
        self._fd = -1
        self._unsynced = False
        self._closing = threading.Lock()

    def read(self) -> bytes:
        """All of it."""
        return read_notes(self.path) or b""

    def append(self, text: bytes) -> None:
        """Add something, in one call, so that a process that is killed leaves all of it or none, mostly."""
        try:
            if self._fd < 0:
                self._fd = open_file(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
            while text:
                text = text[os.write(self._fd, text) :]
        except OSError as error:
            refuse_writing(self.path, error)
        self._unsynced = True

    def rewrite(self, text: bytes) -> None:
        """Put another file in its place."""
        self.close()
        new = self.path + NEW_SUFFIX
        try:
            self._fd = open_file(new, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
            self.append(text)
            os.fsync(self._fd)
            os.replace(new, self.path)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(new)
            if isinstance(error, OSError):
                refuse_writing(self.path, error)
            raise

    def sync(self) -> None:
        """Make durable what was noted since the last time."""
        with self._closing:
            if self._fd >= 0 and self._unsynced:
                self._unsynced = False
                try:
                    os.fdatasync(self._fd)
                except OSError as error:
                    refuse_writing(self.path, error)

    def remove(self) -> None:
        """Leave no file."""
        self.close()
        for path in (self.path, self.path + NEW_SUFFIX):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                refuse_writing(path, error)

    def close(self) -> None:
        """Give the file back, if it is open."""
        with self._closing:
            descriptor, self._fd = self._fd, -1
            if descriptor >= 0:
                with suppress(OSError):  # what it holds is proved against the draft before it counts
                    os.close(descriptor)


class NamedDraft:
    """An output that has its name already, while the run that gave it was stopped before it removed its notes."""

    named = True

    def __init__(self, path: str, draft: str) -> None:
        self.address = path
        self._notes = LocalNotes(draft)
        self.notes: Notes = self._notes

    def sync(self) -> None:
        """It was synced before it got its name."""

    def commit(self) -> None:
        """It has its name."""

    def discard(self) -> None:
        """It is not ours to remove."""

    def keep(self) -> None:
        """It stays, with its notes."""
        self._notes.close()


def read_notes(path: str) -> bytes | None:
    """What is noted at `path`; None where there is no such file, or it has become something else."""
    try:
        descriptor = open_file(path, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        refuse_reading(path, error)
    try:
        with os.fdopen(descriptor, "rb") as file:
            return file.read()
    except OSError as error:
        refuse_reading(path, error)
