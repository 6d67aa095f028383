"""What every case is held to: an end in time, memory in proportion, no read outside a file, errors that are clear."""

from __future__ import annotations

import signal
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.errors import MergeflowError
from mergeflow.storage.local import LocalStore
from mergeflow.text import harmless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mergeflow.storage.files import LocalFile

SECONDS, WAITING = 20, 300
"""Of the processor, and by the clock: a case takes milliseconds, and a busy machine may not run it for a while."""
FREE_BYTES = 24 << 20
"""Memory that any case may use, however small its file."""
PER_BYTE = 100
"""Memory for each byte of a case beyond that: what Python makes of JSON, at worst, and copies of it."""
LONGEST = 60_000
"""Characters of a message: a hundred problems of a few names each."""


class Case(NamedTuple):
    """Something to do, and the bytes that it is about."""

    act: Callable[[], object]
    size: int


class Violation(AssertionError):
    """A guard was met."""


class Hang(Violation):
    """A case did not end."""


def held(case: Callable[[], object], size: int, *, memory: bool = True) -> str:
    """What came of a case of `size` bytes: "done", or the name of the error. Raises what no case may raise."""
    with _in_time():
        if memory:
            tracemalloc.start()
        try:
            case()
            outcome = "done"
        except MergeflowError as error:
            said(str(error))
            outcome = type(error).__name__
        finally:
            peak = tracemalloc.get_traced_memory()[1] if memory else 0
            if memory:
                tracemalloc.stop()
    if peak > FREE_BYTES + PER_BYTE * size:
        raise Violation(f"{peak:,} bytes of memory for a case of {size:,}")
    return outcome


def said(text: str) -> None:
    """Raise if a message is none that may be shown."""
    if not text.strip():
        raise Violation("an error without a word")
    if len(text) > LONGEST:
        raise Violation(f"a message of {len(text):,} characters: {text[:200]!r}")
    if harmless(text) != text:
        raise Violation(f"a message with what a terminal obeys: {text[:2000]!r}")
    forged = [line for line in text.splitlines()[1:] if not line.startswith("  ")]
    if forged:
        raise Violation(f"a message with lines of its own: {forged[0]!r}")


@contextmanager
def _in_time() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise Hang(f"no end after {SECONDS} s of the processor, or {WAITING} s")

    before = {one: signal.signal(one, late) for one in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in before.items():
            signal.signal(one, handler)


class GuardedStore(LocalStore):
    """Local files, whose every read must lie within the file."""

    def reader(self, path: str) -> LocalFile:
        """As the local store, with a look at what is asked for."""
        inner, size = super().reader(path), self.stat(path).size
        read_into = inner.read_into

        def guarded(view: memoryview, offset: int) -> None:
            if not 0 <= offset <= offset + len(view) <= size:
                raise Violation(f"bytes {offset} to {offset + len(view)} of a file of {size}")
            read_into(view, offset)

        inner.read_into = guarded  # type: ignore[method-assign]  # one open file, watched
        return inner


def reading(data: bytes) -> Callable[[int, int], bytes]:
    """What reads bytes of a file in memory, and of nothing else."""

    def read(offset: int, count: int) -> bytes:
        if not 0 <= offset <= offset + count <= len(data):
            raise Violation(f"bytes {offset} to {offset + count} of a file of {len(data)}")
        return data[offset : offset + count]

    return read
