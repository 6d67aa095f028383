"""The SHA-256 of an output's tensors, taken while the run goes on.

SHA-256 goes from the first byte to the last, and results come in any order. Where the workers are threads of this
process, each waits for its turn and hashes what it has just written, out of its own memory. What was written otherwise,
by other processes or by an earlier run, is read back by a thread that follows the part of each draft that is complete.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from mergeflow.errors import ReadFailed
from mergeflow.execute.patience import repeat
from mergeflow.storage.kernel import address_of, copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from mergeflow.execute.coverage import Coverage
    from mergeflow.interfaces import Reader, Store
    from mergeflow.plan.plan import Output, Strip
    from mergeflow.tensors import Span

STEP = 1 << 20
"""Bytes hashed at a time."""
LENGTH = 8
"""Bytes in which a safetensors file tells how long its header is."""
LOOK = 0.05
"""Seconds after which whoever waits for a turn looks whether to stop."""


def digest_of_tensors(path: str, store: Store, progress: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 in hex of all that comes after the header of a safetensors file; raises `StorageError`.

    `progress` is told the bytes read as they come.
    """
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
            progress(len(view))
    return digest.hexdigest()


def ascending(strips: Sequence[Strip], outputs: int) -> list[bool]:
    """For each output, whether its bytes come in the order of the file where strips are made one after the other."""
    reached, ascend = [-1] * outputs, [True] * outputs
    for strip in strips:
        for cell in strip.cells:
            for place in cell.places:
                ascend[place.output] &= place.offset > reached[place.output]
                reached[place.output] = place.offset
    return ascend


class TrailingDigest:
    """Digests of all outputs, growing behind a `Coverage`, or ahead of it with what `saw` is shown.

    Args:
        store: Where the drafts are.
        drafts: The address of each output.
        outputs: What is written.
        coverage: What is known to be complete.
        strips: What is shown to `saw`, in this order.
        room: Bytes that may be kept of what is shown before its turn.
        resumed: What an earlier run has written and nobody writes again. It is read back as soon as it is its turn,
            whatever receipts there are: who waits in `saw` for what comes before may hold the receipt that would tell.
    """

    def __init__(
        self,
        store: Store,
        drafts: Sequence[str],
        outputs: Sequence[Output],
        coverage: Coverage,
        strips: Sequence[Strip] = (),
        room: int = 0,
        resumed: Iterable[Span] = (),
    ) -> None:
        self._outputs, self._coverage = outputs, coverage
        self._hashes = [hashlib.sha256() for _ in outputs]
        self._positions = [output.data[0] for output in outputs]
        self._resumed: list[deque[Span]] = [deque() for _ in outputs]
        """What of each output is still to be read back, in the order of the file."""
        for span in sorted(resumed):
            self._resumed[span.output].append(span)
        self._ascend = ascending(strips, len(outputs))
        self._changed = threading.Condition()
        """Of positions, of what is complete, and of whether it goes on."""
        self._busy: set[int] = set()
        """Outputs of which some bytes are being hashed."""
        self._kept: dict[tuple[int, int], memoryview] = {}
        """What came before its turn, by output and first byte."""
        self._spare: list[Buffer] = []
        self._room = room
        self._abandoned: set[int] = set()
        self._stopped = False
        self._error: Exception | None = None
        with ExitStack() as opened:  # now, while all drafts are there: one may be given up at any time
            self._readers = [opened.enter_context(closing(store.reader(draft))) for draft in drafts]
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def saw(self, output: int, begin: int, view: memoryview, stopped: Callable[[], bool]) -> None:
        """Hash what was written at `begin`; `view` may be reused once this returns.

        What comes before its turn is put by, as far as there is room, or waits for it until `stopped`: all that lies
        before must have been taken up before. Of an output whose bytes do not come in the order of the file, nothing
        is taken in; it is read back. Nor is what was hashed already.
        """
        if not self._ascend[output]:
            return
        kept: memoryview | None = None
        with self._changed:
            while self._positions[output] != begin or output in self._busy:
                given_up = self._stopped or output in self._abandoned or stopped()
                if given_up or self._positions[output] > begin:
                    return
                if self._room >= len(view):
                    self._room -= len(view)
                    kept = self._kept_for(len(view))
                    break
                self._changed.wait(LOOK)
            else:
                self._busy.add(output)
        if kept is None:
            self._hash(output, view)
        else:
            copy(address_of(kept), address_of(view), len(view))
            with self._changed:
                self._kept[output, begin] = kept
        self._catch_up(output)

    def _kept_for(self, count: int) -> memoryview:
        """Memory for so many bytes; most rows are as long as those that were hashed."""
        spare = self._spare.pop() if self._spare else bytearray()
        whole = memoryview(spare)
        return whole[:count] if len(whole) >= count else memoryview(bytearray(count))

    def _catch_up(self, output: int) -> None:
        """Hash what was put by, as far as it has its turn."""
        while True:
            with self._changed:
                if output in self._busy:
                    return  # by who will catch up, too
                kept = self._kept.pop((output, self._positions[output]), None)
                if kept is None:
                    return
                self._busy.add(output)
            self._hash(output, kept)
            with self._changed:
                self._room += len(kept)
                self._spare.append(kept.obj)

    def advance(self) -> None:
        """More bytes may be complete."""
        with self._changed:
            self._changed.notify_all()

    def abandon(self, output: int) -> None:
        """An output will not be completed; its digest means nothing."""
        with self._changed:
            self._abandoned.add(output)
            self._changed.notify_all()

    def result(self) -> list[str]:
        """The digests in hex; every output must be complete or abandoned. Raises what reading them back met."""
        self.advance()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return [digest.hexdigest() for digest in self._hashes]

    def stop(self) -> None:
        """Give up. Harmless after `result`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._opened:
                self._follow()
        except Exception as error:  # whatever it is, it belongs to who asks for the result
            with self._changed:
                self._error, self._stopped = error, True  # or who waits in `saw` for what is not read would wait on
                self._changed.notify_all()

    def _follow(self) -> None:
        buffer = memoryview(bytearray(STEP))
        while (behind := self._behind()) is not None:
            output, count = behind
            view = buffer[:count]
            self._read(self._readers[output], view, self._positions[output])
            self._hash(output, view)
            self._catch_up(output)

    def _behind(self) -> tuple[int, int] | None:
        """Wait for bytes that are complete and not hashed: (output, how many of them next); None when all is done."""
        with self._changed:
            while not self._stopped:
                left = [index for index, output in enumerate(self._outputs) if self._is_left(index, output)]
                for index in left:
                    position = self._positions[index]
                    count = min(STEP, self._complete(index) - position)
                    if count > 0 and index not in self._busy and (index, position) not in self._kept:
                        self._busy.add(index)
                        return index, count
                if not left:
                    return None
                self._changed.wait()
        return None

    def _complete(self, index: int) -> int:
        """The byte up to which the next bytes of an output may be read back.

        Of what an earlier run has written that is its end, since what follows may have been put by in memory.
        """
        resumed, position = self._resumed[index], self._positions[index]
        while resumed and resumed[0].end <= position:
            resumed.popleft()
        if resumed and resumed[0].begin <= position:
            return resumed[0].end
        return self._coverage.watermark(index)

    def _is_left(self, index: int, output: Output) -> bool:
        return index not in self._abandoned and self._positions[index] < output.data[1]

    def _hash(self, output: int, view: memoryview) -> None:
        """Hash the next bytes of an output that is `_busy` for the caller."""
        self._hashes[output].update(view)
        with self._changed:
            self._positions[output] += len(view)
            self._busy.discard(output)
            self._changed.notify_all()

    def _read(self, reader: Reader, view: memoryview, position: int) -> None:
        try:
            reader.read_into(view, position)
        except ReadFailed as error:
            repeat(lambda _: reader.read_into(view, position), error, lambda: self._stopped)
