"""A draft whose bytes nobody reads back: written past the page cache, where whole pages of it lie so in memory.

Through the page cache, every byte is copied once more, and where memory is scarce, or a virtual machine has given its
own back, a page for it costs more than to fill it; it drives out what others keep there, too. Bytes that share a page
with those of another row are written through the cache all the same, because a device writes whole pages only.
"""

from __future__ import annotations

import os

from mergeflow.storage.files import LocalFile, open_file
from mergeflow.storage.kernel import PAGE, in_pages
from mergeflow.storage.refusals import refuse_writing
from mergeflow.storage.sources import REFUSALS, SMALL


class DraftFile(LocalFile):
    """One draft, open for writing."""

    def __init__(self, path: str) -> None:
        super().__init__(path, os.O_WRONLY)
        try:
            self._direct = open_file(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno not in REFUSALS:
                refuse_writing(path, error)
            self._direct = -1

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`."""
        may_be = self._direct >= 0 and len(view) >= SMALL and not view.readonly
        parts = in_pages(view, offset) if may_be else None
        written = self._write_pages(parts.middle, offset + parts.head) if parts else 0
        if parts is None or not written:
            super().write(view, offset)
            return
        done = parts.head + written
        if parts.head:
            super().write(view[: parts.head], offset)
        if done < len(view):
            super().write(view[done:], offset + done)

    def _write_pages(self, pages: memoryview, offset: int) -> int:
        """Write whole pages, and tell how many bytes were; what was not may still go through the cache."""
        done = 0
        while done < len(pages):
            try:
                count = os.pwrite(self._direct, pages[done:], offset + done)
            except OSError as error:
                if error.errno not in REFUSALS:
                    refuse_writing(self.path, error, self._fd)  # never repeated: see `LocalFile`
                count = 0
            done += count - count % PAGE
            if count % PAGE or not count:
                break
        return done

    def close(self) -> None:
        """Close both descriptors, once."""
        descriptor, self._direct = self._direct, -1
        if descriptor >= 0:
            os.close(descriptor)
        super().close()
