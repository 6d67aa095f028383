"""The SHA-256 of an output's tensors, taken while the run goes on.

A thread follows the part of each draft that is complete and reads it back from the page cache, so that the digest
is that of the bytes in the file, and is there almost as soon as the last of them.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.execute.coverage import Coverage
    from mergeflow.interfaces import Store
    from mergeflow.plan.plan import Output

STEP = 1 << 20
"""Bytes hashed at a time."""
LENGTH = 8
"""Bytes in which a safetensors file tells how long its header is."""


def digest_of_tensors(path: str, store: Store) -> str:
    """SHA-256 in hex of all that comes after the header of a safetensors file; raises `StorageError`."""
    digest = hashlib.sha256()
    size = store.stat(path).size
    buffer = memoryview(bytearray(STEP))
    with closing(store.reader(path)) as reader:
        reader.read_into(buffer[:LENGTH], 0)
        position = LENGTH + int.from_bytes(buffer[:LENGTH], "little")
        while position < size:
            view = buffer[: min(STEP, size - position)]
            reader.read_into(view, position)
            digest.update(view)
            position += len(view)
    return digest.hexdigest()


class TrailingDigest:
    """Digests of all outputs, growing behind a `Coverage`."""

    def __init__(self, store: Store, drafts: Sequence[str], outputs: Sequence[Output], coverage: Coverage) -> None:
        self._outputs, self._coverage = outputs, coverage
        self._hashes = [hashlib.sha256() for _ in outputs]
        self._wake = threading.Event()
        self._abandoned: set[int] = set()
        self._stopped = False
        self._error: Exception | None = None
        with ExitStack() as opened:  # now, while all drafts are there: one may be given up at any time
            self._readers = [opened.enter_context(closing(store.reader(draft))) for draft in drafts]
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """More bytes may be complete."""
        self._wake.set()

    def abandon(self, output: int) -> None:
        """An output will not be completed; its digest means nothing."""
        self._abandoned.add(output)
        self._wake.set()

    def result(self) -> list[str]:
        """The digests in hex; every output must be complete or abandoned. Raises what reading them back met."""
        self.advance()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return [digest.hexdigest() for digest in self._hashes]

    def stop(self) -> None:
        """Give up. Harmless after `result`."""
        self._stopped = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._opened:
                self._follow()
        except Exception as error:  # whatever it is, it belongs to who asks for the result
            self._error = error

    def _follow(self) -> None:
        buffer = memoryview(bytearray(STEP))
        positions = [output.data[0] for output in self._outputs]
        ends = [output.data[1] for output in self._outputs]
        while not self._stopped:
            self._wake.clear()
            for index, reader in enumerate(self._readers):
                if index in self._abandoned:
                    positions[index] = ends[index]
                    continue
                complete = self._coverage.watermark(index)
                while positions[index] < complete and not self._stopped:
                    view = buffer[: min(STEP, complete - positions[index])]
                    reader.read_into(view, positions[index])
                    self._hashes[index].update(view)
                    positions[index] += len(view)
            if positions == ends:
                break
            self._wake.wait()
