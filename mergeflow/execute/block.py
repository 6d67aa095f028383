"""The block: the memory into which one thread reads the rows of a tile, and from which it writes the results."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergeflow.plan.tiles import PAGE, PAGED, ROW_ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from mergeflow.tensors import Dtype


class Row(NamedTuple):
    """One row of a block: where its bytes lie."""

    begin: int
    end: int


class Group(NamedTuple):
    """Adjacent rows of one dtype that are evenly spaced, as a matrix `(rows, elements)` over the block's memory."""

    dtype: Dtype
    rows: range
    values: Tensor


class Block:
    """Memory for the rows of one tile, reused for every tile that a thread works on.

    It is mapped, not allocated: pages that no tile touches are never taken from the machine.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._memory)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()

    def rows(
        self, dtypes: Sequence[Dtype], elements: int, start: int = 0, offsets: Sequence[int] | None = None
    ) -> list[Row]:
        """The place of one row of `elements` for each dtype, from byte `start` on.

        Equal dtypes are evenly spaced. Where `offsets` tell at which byte of a file each row lies, long rows lie in
        their pages of memory as they do in those of the file, so that a device can move them without a copy; they are
        evenly spaced, too, if all files are laid out alike.
        """
        placed = []
        for index, dtype in enumerate(dtypes):
            if offsets is not None and elements >= PAGED and offsets[index] % dtype.itemsize == 0:
                start += (offsets[index] - start) % PAGE
            else:
                start += -start % ROW_ALIGNMENT
            end = start + elements * dtype.itemsize
            placed.append(Row(start, end))
            start = end
        return placed

    def groups(self, dtypes: Sequence[Dtype], rows: Sequence[Row]) -> Iterator[Group]:
        """The rows as matrices, one for each run of equal dtypes that are evenly spaced."""
        first = 0
        while first < len(rows):
            last = first
            stride = rows[first + 1].begin - rows[first].begin if first + 1 < len(rows) else 0
            while (
                last + 1 < len(rows)
                and dtypes[last + 1] is dtypes[first]
                and rows[last + 1].begin - rows[last].begin == stride
            ):
                last += 1
            width = dtypes[first].itemsize
            if last == first or stride % width:
                last, stride = first, -(-(rows[first].end - rows[first].begin) // width) * width
            begin = rows[first].begin
            # The last row's padding may lie beyond the memory; a view of what is there needs no padding.
            values = self._bytes[begin : rows[last].end].view(torch_dtype(dtypes[first]))
            elements = (rows[first].end - begin) // width
            yield Group(
                dtypes[first],
                range(first, last + 1),
                values.as_strided((last - first + 1, elements), (stride // width, 1)),
            )
            first = last + 1

    def row(self, dtype: Dtype, row: Row) -> Tensor:
        """One row as a 1-D tensor."""
        return self._bytes[row.begin : row.end].view(torch_dtype(dtype))


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """What torch calls it."""
    found: torch.dtype = getattr(torch, dtype.torch_name)
    return found
