"""What a shard has written: spans, joined where one follows upon another, with a checksum of the bytes of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from mergeflow.tensors import Span


class Written:
    """Adds up the writes of one shard; the checksum is XXH3 of 128 bits, which runs at the speed of memory."""

    def __init__(self) -> None:
        self._last: dict[int, Span] = {}
        self._sums: dict[int, xxhash.xxh3_128] = {}
        self._ended: list[tuple[Span, bytes]] = []

    def add(self, span: Span, view: memoryview) -> None:
        """`view` was written at `span`."""
        last = self._last.get(span.output)
        if last is None or last.end != span.begin:
            if last is not None:
                self._ended.append((last, self._sums[span.output].digest()))
            last, self._sums[span.output] = span, xxhash.xxh3_128()
        self._sums[span.output].update(view)
        self._last[span.output] = last._replace(end=span.end)

    def told(self) -> tuple[tuple[Span, ...], tuple[bytes, ...]]:
        """Every span and its checksum, in the order of outputs and bytes."""
        last = [(span, self._sums[output].digest()) for output, span in self._last.items()]
        both = sorted(self._ended + last)
        return tuple(span for span, _ in both), tuple(checksum for _, checksum in both)
