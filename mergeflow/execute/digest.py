"""The SHA-256 of an output's tensors, taken while the run goes on.

A thread follows the part of each draft that is complete and reads it back from the page cache, so that the digest
is that of the bytes in the file, and is there almost as soon as the last of them.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

from mergeflow.errors import MergeflowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.execute.coverage import Coverage
    from mergeflow.interfaces import Store
    from mergeflow.plan.plan import Output

STEP = 4 << 20
"""Bytes hashed at a time."""


class TrailingDigest:
    """Digests of all outputs, growing behind a `Coverage`."""

    def __init__(self, store: Store, drafts: Sequence[str], outputs: Sequence[Output], coverage: Coverage) -> None:
        self._store, self._drafts, self._outputs, self._coverage = store, drafts, outputs, coverage
        self._hashes = [hashlib.sha256() for _ in outputs]
        self._wake = threading.Condition()
        self._stopped = False
        self._error: MergeflowError | None = None
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """More bytes may be complete."""
        with self._wake:
            self._wake.notify()

    def result(self) -> list[str]:
        """The digests in hex, once every output is complete; raises what reading them back met."""
        self.advance()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return [digest.hexdigest() for digest in self._hashes]

    def stop(self) -> None:
        """Give up."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            readers = [self._store.reader(draft) for draft in self._drafts]
            buffer = memoryview(bytearray(STEP))
            positions = [output.data[0] for output in self._outputs]
            while not self._stopped:
                target = [self._coverage.watermark(index) for index in range(len(positions))]
                for index, reader in enumerate(readers):
                    while positions[index] < target[index] and not self._stopped:
                        view = buffer[: min(STEP, target[index] - positions[index])]
                        reader.read_into(view, positions[index])
                        self._hashes[index].update(view)
                        positions[index] += len(view)
                if all(at == output.layout.size for at, output in zip(positions, self._outputs, strict=True)):
                    break
                with self._wake:
                    self._wake.wait(timeout=0.5)
            for reader in readers:
                reader.close()
        except MergeflowError as error:
            self._error = error
