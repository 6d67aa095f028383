"""Tiles read and computed once more, by several threads, and what differs, tensor by tensor."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergeflow.execute.patience import patiently
from mergeflow.verify.floats import FLOATS, UNSIGNED, is_nan, negative
from mergeflow.verify.reference import expected, number_of
from mergeflow.verify.result import Finding
from mergeflow.verify.sample import Candidate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from fractions import Fraction

    from mergeflow.interfaces import Reader, Store
    from mergeflow.plan.plan import Cell, Plan, Strip
    from mergeflow.tensors import Checkpoint, Dtype
    from mergeflow.verify.floats import Array
    from mergeflow.verify.sample import Drawn

BATCH = 8 << 20
"""Bytes that a thread reads before it reports: small tensors are not worth a report each."""
SHOWN_DIGITS = {8: 17}
"""Decimal digits that tell a value from its neighbours, by its bytes; 9 for narrower ones."""


class Tensor(NamedTuple):
    """One tensor of the file, and how it was made."""

    strip: Strip
    cell: Cell
    begin: int
    """Its first byte in the file."""
    component: str

    @property
    def candidate(self) -> Candidate:
        """The same for who draws a sample."""
        strip, cell = self.strip, self.cell
        dtypes = [strip.dtypes[row] for row in cell.rows]
        kind = (self.component, cell.method, cell.dtype, frozenset(dtypes))
        size = sum(dtype.itemsize for dtype in dtypes) + cell.dtype.itemsize
        return Candidate(strip.key, kind, strip.elements, size)

    @property
    def where(self) -> str:
        """What it is called in messages."""
        return f"'{self.strip.key}' ({self.component})"


@dataclass
class Odd:
    """What is wrong with one tensor."""

    first: int = -1
    expected: int = 0
    found: int = 0
    differing: int = 0
    checked: int = 0
    impossible: dict[tuple[str, int | None], int] = field(default_factory=dict)
    """Why there can be no such tensor, and the first element of which that is known."""

    def add(self, other: Odd) -> None:
        """Take over what another tile of the same tensor shows."""
        if other.differing and (not self.differing or other.first < self.first):
            self.first, self.expected, self.found = other.first, other.expected, other.found
        self.differing += other.differing
        self.checked += other.checked
        for why, at in other.impossible.items():
            self.impossible[why] = min(at, self.impossible.get(why, at))


class Files:
    """The sources of a plan and the file that is verified, each opened once."""

    def __init__(self, plan: Plan, file: Checkpoint, store: Store) -> None:
        self._plan, self._file, self._store = plan, file, store
        self.stopped = threading.Event()
        """Set when the work is given up, or done."""
        self._lock = threading.Lock()
        self._opened = ExitStack()
        self._readers: dict[int, Reader] = {}

    def row(self, source: int | None, dtype: Dtype, begin: int, elements: int) -> Array:
        """The bits of so many elements of a source, or of the file itself for None; raises `StorageError`."""
        room = np.empty(elements, dtype=UNSIGNED[dtype.itemsize])
        reader = self._reader(-1 if source is None else source)
        patiently(lambda: reader.read_into(room.view(np.uint8).data, begin), self.stopped.is_set)
        return room

    def close(self) -> None:
        """Give all of them back."""
        self._opened.close()

    def _reader(self, source: int) -> Reader:
        with self._lock:
            if source not in self._readers:
                path = self._file.path if source < 0 else self._plan.checkpoints[source].path
                self._readers[source] = self._opened.enter_context(closing(self._store.reader(path)))
            return self._readers[source]


def tensors_of(plan: Plan, file: Checkpoint, component_of: Callable[[str], str]) -> list[Tensor]:
    """The tensors that both `plan` and `file` have in one form, in the order in which they lie in the file."""
    found = []
    for strip in plan.strips:
        for cell in strip.cells:
            info = file.header.tensors.get(strip.key)
            if info is not None and info.dtype is cell.dtype and info.elements == strip.elements:
                found.append(Tensor(strip, cell, info.begin, component_of(strip.key)))
    return sorted(found, key=lambda tensor: tensor.begin)


def size_of(tensor: Tensor, tile: Drawn) -> int:
    """Bytes that are read for a tile."""
    return (tile.stop - tile.start) * tensor.candidate.bytes_per_element


def look(
    plan: Plan,
    files: Files,
    tensors: Sequence[Tensor],
    drawn: Sequence[Drawn],
    threads: int,
    progress: Callable[[int], None],
) -> list[Finding]:
    """What is wrong in the tiles that are `drawn`; `progress` is told the bytes that were read for them."""
    odd: defaultdict[int, Odd] = defaultdict(Odd)

    def work(batch: Sequence[Drawn]) -> list[tuple[int, Odd]]:
        return [
            (tile.tensor, _look(plan, files, tensors[tile.tensor], tile))
            for tile in batch
            if not files.stopped.is_set()
        ]

    batches = list(_batches(tensors, drawn))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        futures = {pool.submit(work, batch): size for batch, size in batches}
        for done in as_completed(futures):
            for index, one in done.result():
                odd[index].add(one)
            progress(futures[done])
    finally:
        files.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return [finding for index in sorted(odd) for finding in _findings(plan, tensors[index], odd[index])]


def _batches(tensors: Sequence[Tensor], drawn: Sequence[Drawn]) -> Iterator[tuple[list[Drawn], int]]:
    batch: list[Drawn] = []
    size = 0
    sizes = [tensor.candidate.bytes_per_element for tensor in tensors]
    for tile in drawn:
        batch.append(tile)
        size += (tile.stop - tile.start) * sizes[tile.tensor]
        if size >= BATCH:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _look(plan: Plan, files: Files, tensor: Tensor, tile: Drawn) -> Odd:
    strip, cell, count = tensor.strip, tensor.cell, tile.stop - tile.start
    rows = []
    for row in cell.rows:
        dtype = strip.dtypes[row]
        begin = strip.offsets[row] + tile.start * dtype.itemsize
        rows.append((dtype, files.row(strip.sources[row], dtype, begin, count)))
    wanted = expected(cell, rows, plan.nonfinite)
    impossible: dict[tuple[str, int | None], int] = {}
    for first, why, place in wanted.impossible:
        source = None if place is None else strip.sources[cell.rows[place]]
        impossible.setdefault((why, source), tile.start + first)
    if impossible:
        return Odd(checked=count, impossible=impossible)
    found = files.row(None, cell.dtype, tensor.begin + tile.start * cell.dtype.itemsize, count)
    differ = wanted.differing(found)
    if not differ.any():
        return Odd(checked=count)
    at = int(np.argmax(differ))
    return Odd(tile.start + at, int(wanted.bits[at]), int(found[at]), int(np.count_nonzero(differ)), count)


def _findings(plan: Plan, tensor: Tensor, odd: Odd) -> Iterator[Finding]:
    key, dtype = tensor.strip.key, tensor.cell.dtype
    for (why, source), at in odd.impossible.items():
        who = "" if source is None else f"model {plan.checkpoints[source].id} "
        yield Finding(
            "tensors",
            f"{tensor.where}: {who}{why} (element {at:,}), so that no merge of the sources as they are has made it",
            key,
            at,
        )
    if odd.differing:
        yield Finding(
            "tensors",
            f"{tensor.where}: element {odd.first:,} is {shown(odd.found, dtype)}, and should be "
            f"{shown(odd.expected, dtype)}; {odd.differing:,} of {odd.checked:,} elements that were looked at differ",
            key,
            odd.first,
            as_hex(odd.expected, dtype),
            as_hex(odd.found, dtype),
            odd.differing,
        )


def as_hex(bits: int, dtype: Dtype) -> str:
    """The bits of one element."""
    return f"0x{bits:0{2 * dtype.itemsize}x}"


def shown(bits: int, dtype: Dtype) -> str:
    """One element in hex and as a number."""
    return f"{as_hex(bits, dtype)} ({_number(bits, dtype)})"


def _number(bits: int, dtype: Dtype) -> str:
    value = number_of(bits, dtype)
    if value is None:
        if dtype not in FLOATS:
            return "not finite"
        raw = np.array([bits], dtype=UNSIGNED[dtype.itemsize])
        sign = "-" if negative(raw, FLOATS[dtype])[0] else ""
        return "NaN" if is_nan(raw, FLOATS[dtype])[0] else f"{sign}infinity"
    if not dtype.is_float and value[1] == 0:
        return f"{int(value[0]):,}" if value[0].denominator == 1 else _digits(value[0], dtype)
    if value[1] != 0:
        return f"{_digits(value[0], dtype)} {float(value[1]):+.9g}i"
    raw = np.array([bits], dtype=UNSIGNED[dtype.itemsize])
    return "-0" if value[0] == 0 and negative(raw, FLOATS[dtype])[0] else _digits(value[0], dtype)


def _digits(value: Fraction, dtype: Dtype) -> str:
    return f"{float(value):.{SHOWN_DIGITS.get(dtype.itemsize, 9)}g}"
