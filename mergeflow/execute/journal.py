"""The journal beside a draft: what the draft is of, and which of its bytes are there, line by line.

A line says what it says or counts for nothing: each ends with a checksum of itself, so that one that was cut short, or
that a disk has garbled, is told. What a line says of the draft is believed only once the checksum of the bytes that are
there has proved it, so it does not matter which of the two reached the disk first (decision 0022).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from mergeflow.plan.identity import OutputIdentity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mergeflow.tensors import Span

FORMAT = "mergeflow-journal-1"
"""Another number where lines or identities come to mean something else: older journals are then not understood."""


MOST_BYTES = 2**63
"""No file has more."""


class Entry(NamedTuple):
    """Bytes of a draft that were written: `begin <= byte < end`."""

    begin: int
    end: int
    checksum: bytes
    """XXH3, 128 bits, of these bytes."""


@dataclass(frozen=True)
class Journal:
    """What was read of a journal."""

    identity: OutputIdentity | None
    """What the draft is of; None where that cannot be read."""
    entries: tuple[Entry, ...]
    damaged: int
    """Lines that count for nothing."""

    @property
    def claimed(self) -> int:
        """Bytes of the draft that are said to be there."""
        return sum(end - begin for begin, end in joined((one.begin, one.end) for one in self.entries))


def head(identity: OutputIdentity) -> bytes:
    """The first line."""
    told = {"head": identity.head, "work": identity.work, "sources": dict(identity.sources)}
    return _line(f"{FORMAT} {json.dumps(told, separators=(',', ':'))}")


def lines(entries: Iterable[Entry]) -> bytes:
    """A line for each entry."""
    return b"".join(_line(f"{one.begin} {one.end} {one.checksum.hex()}") for one in entries)


def parse(notes: bytes) -> Journal:
    """What a journal says, and how much of it cannot be read. Whatever the bytes, nothing is raised."""
    told = [_content(line) for line in notes.splitlines(keepends=True)]
    identity = _identity(told[0]) if told and told[0] is not None else None
    entries = [None if text is None else _entry(text) for text in told[1:]]
    good = tuple(entry for entry in entries if entry is not None)
    return Journal(identity, good, len(told) - len(good) - (identity is not None))


def entries_of(spans: Sequence[Span], checksums: Sequence[bytes]) -> Mapping[int, list[Entry]]:
    """What a receipt says, by output."""
    found: dict[int, list[Entry]] = {}
    for span, checksum in zip(spans, checksums, strict=True):
        found.setdefault(span.output, []).append(Entry(span.begin, span.end, checksum))
    return found


def joined(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What runs of bytes cover together, in order."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(extents):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif begin < end:
            found.append((begin, end))
    return found


def _line(text: str) -> bytes:
    content = text.encode()
    return content + b" " + xxhash.xxh3_64_hexdigest(content).encode() + b"\n"


def _content(line: bytes) -> str | None:
    """What a line says, without its checksum; None if it is not what was written."""
    content, _, checksum = line.rpartition(b" ")
    if checksum != xxhash.xxh3_64_hexdigest(content).encode() + b"\n":
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _identity(text: str) -> OutputIdentity | None:
    version, _, told = text.partition(" ")
    if version != FORMAT:
        return None
    try:
        found = OutputIdentity(**json.loads(told))
    except (TypeError, ValueError, RecursionError):
        return None
    sources = found.sources if isinstance(found.sources, dict) else {"": None}
    texts = all(isinstance(one, str) for one in (found.head, found.work, *sources.values()))
    return found if texts else None


def _entry(text: str) -> Entry | None:
    try:
        begin, end, checksum = text.split(" ")
        entry = Entry(int(begin), int(end), bytes.fromhex(checksum))
    except ValueError:
        return None
    return entry if 0 <= entry.begin < entry.end <= MOST_BYTES and len(entry.checksum) == 16 else None
