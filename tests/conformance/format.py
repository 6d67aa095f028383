"""What every `Format` must keep: subclass `FormatConformance`, say which format, and run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import FormatError
from mergeflow.tensors import Dtype, Header, Layout
from tests.fakes import Extent, merged, overlaps

if TYPE_CHECKING:
    from mergeflow.interfaces import Format

Table = list[tuple[str, Dtype, tuple[int, ...]]]
"""What `Format.layout` takes: key, dtype and shape of every tensor."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
"""Any text that UTF-8 can write: quotes, control characters, anything beyond the basic plane."""

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
"""Zero-size and 0-dim shapes among them."""

TABLES = st.dictionaries(TEXT.filter(lambda key: key != "__metadata__"), st.tuples(st.sampled_from(Dtype), SHAPES)).map(
    lambda table: [(key, dtype, shape) for key, (dtype, shape) in table.items()]
)

METADATA = st.dictionaries(TEXT, TEXT, max_size=4)

SMALL: Table = [
    ("b", Dtype.F16, (3, 2)),
    ("a", Dtype.F16, (5,)),
    ("scalar", Dtype.F32, ()),
    ("empty", Dtype.F32, (0, 4)),
    ("ids", Dtype.I64, (1, 7)),
]


class Bytes:
    """One file in memory, with a record of what was read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.extents: list[Extent] = []

    def read(self, offset: int, count: int) -> bytes:
        """As `ReadBytes`: whoever asks for more than there is has not looked at the size."""
        assert 0 <= offset <= offset + count <= len(self.data), "a read beyond the file"
        self.extents.append(Extent(offset, offset + count))
        return self.data[offset : offset + count]


def parse(format: Format, data: bytes) -> Header:
    """The header of a file that holds `data`."""
    return format.parse(Bytes(data).read, len(data))


def file_of(layout: Layout) -> bytes:
    """The file that a layout describes, every tensor zero."""
    return layout.head + bytes(layout.size - len(layout.head))


class FormatConformance(ABC):
    """The contract of `Format`."""

    @abstractmethod
    def make(self) -> Format:
        """The format under test, new."""

    @given(TABLES, METADATA)
    def test_what_was_laid_out_is_what_is_parsed(self, table: Table, metadata: dict[str, str]) -> None:
        layout = self.make().layout(table, metadata)
        header = parse(self.make(), file_of(layout))
        assert header.tensors == layout.tensors
        assert header.metadata == metadata
        assert {(key, info.dtype, info.shape) for key, info in header.tensors.items()} == set(table)

    @given(TABLES, METADATA)
    def test_every_byte_of_a_layout_belongs_to_the_head_or_to_one_tensor(
        self, table: Table, metadata: dict[str, str]
    ) -> None:
        layout = self.make().layout(table, metadata)
        extents = [Extent(0, len(layout.head)), *((info.begin, info.end) for info in layout.tensors.values())]
        assert merged(extents) == [Extent(0, layout.size)]
        assert overlaps(extents) == []
        for info in layout.tensors.values():
            assert info.end - info.begin == info.elements * info.dtype.itemsize

    @given(TABLES.flatmap(lambda table: st.tuples(st.just(table), st.permutations(table))), METADATA)
    def test_the_order_in_which_things_are_given_does_not_matter(
        self, tables: tuple[Table, Table], metadata: dict[str, str]
    ) -> None:
        backwards = dict(reversed(metadata.items()))
        assert self.make().layout(tables[0], metadata) == self.make().layout(iter(tables[1]), backwards)

    @given(TABLES, METADATA)
    def test_parsing_reads_the_head_and_nothing_else(self, table: Table, metadata: dict[str, str]) -> None:
        layout = self.make().layout(table, metadata)
        file = Bytes(file_of(layout))
        self.make().parse(file.read, layout.size)
        assert merged(file.extents) == [Extent(0, len(layout.head))]
        assert overlaps(file.extents) == []

    def test_one_parser_keeps_files_apart(self) -> None:
        format = self.make()
        layouts = [
            format.layout(SMALL, {"title": "one"}),
            format.layout(SMALL, {"title": "two"}),
            format.layout(SMALL[1:], {"title": "one"}),
        ]
        headers = [parse(format, file_of(layout)) for layout in [*layouts, *layouts]]
        assert headers[:3] == headers[3:]
        assert [header.tensors for header in headers[:3]] == [layout.tensors for layout in layouts]
        assert len({header.digest for header in headers}) == 3

    def test_equal_heads_have_equal_digests_whatever_follows(self) -> None:
        layout = self.make().layout(SMALL, {})
        ones = layout.head + b"\1" * (layout.size - len(layout.head))
        assert parse(self.make(), file_of(layout)).digest == parse(self.make(), ones).digest

    def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(self) -> None:
        format = self.make()
        whole = file_of(format.layout(SMALL, {"title": "cut"}))
        parse(format, whole)
        for size in range(len(whole)):
            with pytest.raises(FormatError):
                parse(format, whole[:size])

    def test_a_file_that_goes_on_is_refused(self) -> None:
        format = self.make()
        whole = file_of(format.layout(SMALL, {}))
        parse(format, whole)
        with pytest.raises(FormatError):
            parse(format, whole + b"\0")

    def test_two_tensors_of_one_name_cannot_be_laid_out(self) -> None:
        with pytest.raises(FormatError, match="'b' twice"):
            self.make().layout([*SMALL, ("b", Dtype.F32, (1,))], {})

    @pytest.mark.parametrize("place", ["key", "metadata-key", "metadata-value"])
    def test_half_a_character_cannot_be_laid_out(self, place: str) -> None:
        half = "\udc80"  # what Python makes of a byte in a file name that is not UTF-8
        key = half if place == "key" else "key"
        metadata = {"metadata-key": {half: "value"}, "metadata-value": {"name": half}}.get(place, {})
        with pytest.raises(FormatError, match=r"U\+DC80"):
            self.make().layout([(key, Dtype.F16, (1,))], metadata)
