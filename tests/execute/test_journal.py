from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.execute.journal import Entry, Journal, head, joined, lines, parse
from mergeflow.execute.written import Written
from mergeflow.plan.identity import OutputIdentity
from mergeflow.tensors import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

MINE = OutputIdentity("1" * 32, "2" * 32, {"05": "3" * 32, "ünï": "4" * 32})
ENTRIES = tuple(Entry(begin, begin + 7, bytes([begin] * 16)) for begin in (10, 17, 90))
NOTES = head(MINE) + lines(ENTRIES)


def test_what_is_noted_is_what_is_read() -> None:
    assert parse(NOTES) == Journal(MINE, ENTRIES, 0)
    assert parse(NOTES).claimed == 21
    assert parse(b"") == Journal(None, (), 0)


@pytest.mark.parametrize("length", range(len(NOTES)))
def test_a_journal_that_was_cut_short_anywhere_tells_what_is_whole_in_it(length: int) -> None:
    found = parse(NOTES[:length])
    whole = NOTES[:length].count(b"\n")
    assert found.identity == (MINE if whole else None)
    assert found.entries == ENTRIES[: max(whole - 1, 0)]
    assert found.damaged == (0 if NOTES[:length].endswith(b"\n") or not length else 1)


@given(st.integers(0, len(NOTES) - 1), st.integers(0, 7))
def test_a_bit_that_flips_anywhere_spoils_the_lines_that_it_touches_and_no_other(byte: int, bit: int) -> None:
    notes = bytearray(NOTES)
    notes[byte] ^= 1 << bit
    found = parse(bytes(notes))
    line = NOTES[:byte].count(b"\n")
    assert found.damaged >= 1
    assert found.identity in (MINE, None)
    assert (found.identity is None) == (line == 0)
    assert set(found.entries) <= set(ENTRIES)
    assert len(found.entries) >= len(ENTRIES) - 2, "a newline that is lost joins two lines"


@given(st.binary(max_size=300))
def test_whatever_the_bytes_nothing_is_raised_and_nothing_is_believed(notes: bytes) -> None:
    assert parse(notes).entries == ()
    assert parse(NOTES + notes).entries == ENTRIES


@pytest.mark.parametrize("text", ["1 2", "x 2 00", "5 5 " + "00" * 16, "-3 5 " + "00" * 16, "1 2 00", "1 2 3 4"])
def test_a_line_that_says_nothing_sensible_counts_for_nothing(text: str) -> None:
    content = text.encode()
    line = content + b" " + xxhash.xxh3_64_hexdigest(content).encode() + b"\n"
    assert parse(head(MINE) + line) == Journal(MINE, (), 1)


def test_a_journal_of_another_format_is_not_understood() -> None:
    content = head(MINE).rpartition(b" ")[0].replace(b"journal-1", b"journal-2")
    other = content + b" " + xxhash.xxh3_64_hexdigest(content).encode() + b"\n"
    assert parse(other + lines(ENTRIES)).identity is None


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([], []),
        ([(3, 3)], []),
        ([(5, 8), (0, 5)], [(0, 8)]),
        ([(0, 9), (2, 4), (8, 12), (20, 21)], [(0, 12), (20, 21)]),
    ],
    ids=["none", "empty", "adjacent", "overlapping"],
)
def test_extents_are_joined(extents: Sequence[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert joined(extents) == expected


DATA = bytes(range(256)) * 4


def told(*spans: Span) -> list[tuple[Span, bytes]]:
    written = Written()
    for span in spans:
        written.add(span, memoryview(DATA)[span.begin : span.end])
    return list(zip(*written.told(), strict=True))


def summed(*spans: Span) -> list[tuple[Span, bytes]]:
    return [(span, xxhash.xxh3_128_digest(DATA[span.begin : span.end])) for span in spans]


def test_writes_that_follow_upon_each_other_are_one_span_with_the_checksum_of_it_all() -> None:
    assert told(Span(0, 3, 9), Span(1, 0, 4), Span(0, 9, 200), Span(1, 4, 5)) == summed(Span(0, 3, 200), Span(1, 0, 5))


def test_writes_that_do_not_are_spans_of_their_own_in_order() -> None:
    assert told(Span(0, 50, 60), Span(0, 10, 20), Span(0, 20, 30)) == summed(Span(0, 10, 30), Span(0, 50, 60))
    assert told() == []
