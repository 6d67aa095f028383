"""The seams, on one page: what may be replaced, and what a replacement must keep.

Each has a conformance suite in `tests/conformance/`; an implementation that passes it may stand in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from torch import Tensor

    from mergeflow.errors import MergeflowError
    from mergeflow.execute.shard import Job
    from mergeflow.tensors import Dtype, FileStat, Header, Layout, Span

    ReadBytes = Callable[[int, int], bytes]
    """`read(offset, count)`: so many bytes of one file, all of which lie inside it."""


Io: TypeAlias = Literal["auto", "buffered", "direct"]
"""How sources are read: through the page cache, past it, or each byte in the way that suits it."""
SHARES_LIMIT = 1 << 26
"""What the shares of one mean add up to less than, as integers: a quotient is exact only below (`methods.exact`)."""
SHARED_WORDS = 2
"""How many values of fp64 a register of `SharedSums` has for each element (`methods.compiled`)."""


class Rows:
    """The same elements of several sources: what a method merges into one row.

    Args:
        matrices: The rows, one after the other, as matrices `(rows, elements)` of one dtype each, that of the sources
            (fp8 arrives widened to fp16, exactly).
        peaks: The largest magnitude in each row; not finite where the row holds a NaN or an infinity.
    """

    def __init__(self, matrices: Sequence[Tensor], peaks: Sequence[float]) -> None:
        self.matrices, self.peaks = matrices, peaks

    @classmethod
    def of(cls, values: Sequence[Tensor], peaks: Sequence[float]) -> Rows:
        """The same for rows that each lie somewhere else."""
        return cls([value[None] for value in values], peaks)

    @cached_property
    def values(self) -> Sequence[Tensor]:
        """1-D tensors of equal length, one for each row."""
        return [row for matrix in self.matrices for row in matrix.unbind(0)]

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, without a copy; neighbours stay in one matrix."""
        runs = _runs(tuple(indices), tuple(matrix.shape[0] for matrix in self.matrices))
        matrices = [self.matrices[index][first:last] for index, first, last in runs]
        return Rows(matrices, [self.peaks[index] for index in indices])


@lru_cache(maxsize=1024)  # the same for every piece of a tensor, and mostly for every tensor
def _runs(indices: tuple[int, ...], heights: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(matrix, first row, last row + 1) of the longest runs that are these rows of matrices with so many rows."""
    places = [(matrix, row) for matrix, height in enumerate(heights) for row in range(height)]
    runs: list[tuple[int, int, int]] = []
    for matrix, row in map(places.__getitem__, indices):
        if runs and runs[-1][0] == matrix and runs[-1][2] == row:
            runs[-1] = (matrix, runs[-1][1], row + 1)
        else:
            runs.append((matrix, row, row + 1))
    return tuple(runs)


class Step(NamedTuple):
    """One operation of a merge tree on one tensor, with every rounding spelled out.

    It is computed in fp64 if an operand or `dtype` is fp64 and in fp32 otherwise, operands widened first (integers
    are rounded to it), the result rounded to it once, and then once more to `dtype`. All rounding is half to even,
    subnormal values are kept, and what is too large becomes infinite.

        scale     x * factor
        add       x + y
        subtract  x - y
        lerp      x + factor (y - x) by fused multiply-add, in fp32 only: with d = y - x rounded,
                  fma(factor, d, x) where |factor| < 0.5, else fma(factor - 1, d, y)
        round     x
    """

    operation: Literal["scale", "add", "subtract", "lerp", "round"]
    operands: tuple[int, ...]
    """x, or x and y: row n as n, register n as -1 - n."""
    factor: float
    """Exact in what is computed in; 1.0 where the operation has none."""
    dtype: Dtype
    """What the result is kept in."""
    into: int
    """The register that takes the result; it may be that of an operand."""


class SumStep(NamedTuple):
    """One sum of rows, made of another by adding more or less of some rows."""

    base: int
    """The register that holds the other sum; -1 where there is none, and it is made of nothing."""
    rows: tuple[int, ...]
    shares: tuple[int, ...]
    """How much more it has of each of `rows`; negative where it has less."""
    into: int
    """The register that takes it; it may be `base`."""
    cells: tuple[int, ...]
    """The results that are means of this sum, by their index."""
    divisors: tuple[int, ...]
    """What it is divided by for each of `cells`."""


class SharedSums(NamedTuple):
    """The sums of several results, in an order in which what they have in common is added once."""

    steps: tuple[SumStep, ...]
    rows: tuple[int, ...]
    """Every row that a sum has."""
    most: tuple[int, ...]
    """The largest share of each of `rows` in any sum."""
    registers: int
    """How many sums are kept at a time."""

    @property
    def cells(self) -> tuple[int, ...]:
        """The results that are means of these sums."""
        return tuple(cell for step in self.steps for cell in step.cells)


class RowsDiffer(Exception):
    """Rows that a method demands to be equal are not."""

    def __init__(self, row: int, element: int, value: float, expected: float) -> None:
        super().__init__(row, element, value, expected)
        self.row, self.element, self.value, self.expected = row, element, value, expected


class Method(Protocol):
    """How one value is made of N: a pure function of rows. It never writes into its input."""

    name: str
    takes_any_dtype: bool
    """Whether rows may be of any dtype and hold any bits. Otherwise they are floats, and finite unless tolerated."""

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the merge of `rows`, whose shares are `share / sum(shares)`, into `out` (same length).

        NaN and infinity travel as IEEE 754 arithmetic has it; a value that `out.dtype` cannot hold
        becomes infinite or NaN, and the caller reports it. Raises `RowsDiffer` if it demands equal rows.
        """
        ...

    def skip(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """As `merge`, over the finite values of every element only, with shares renewed; NaN where there is none."""
        ...


class Format(Protocol):
    """Bytes to layout and back. It does no I/O of its own."""

    name: str

    def parse(self, read: ReadBytes, size: int) -> Header:
        """The header of a file of `size` bytes; raises `FormatError`, whose message does not name the file."""
        ...

    def layout(self, tensors: Iterable[tuple[str, Dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
        """Where every byte of a new file will lie."""
        ...


class Reader(Protocol):
    """One file, open for positioned reads from any thread."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`; raises `StorageError` if the file ends or fails before."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


class Writer(Protocol):
    """One draft, open for positioned writes from any thread."""

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`; raises `StorageError`."""
        ...

    def sync(self) -> None:
        """Make durable, and visible to other machines, what was written through it; raises `StorageError`."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


class Notes(Protocol):
    """What a run notes beside a draft, for one that takes it up. It is there with the first word, and no earlier."""

    def read(self) -> bytes:
        """All of it; empty where nothing was noted."""
        ...

    def append(self, text: bytes) -> None:
        """Add something; raises `StorageError`. What was added when the process ends is there, torn at worst."""
        ...

    def rewrite(self, text: bytes) -> None:
        """Say this instead, or still the same if it is interrupted; raises `StorageError`."""
        ...

    def sync(self) -> None:
        """Make durable what was noted, from any thread; raises `StorageError`."""
        ...

    def remove(self) -> None:
        """Leave none. Harmless where there are none."""
        ...


class Left(NamedTuple):
    """What an earlier run has left of an output."""

    notes: bytes
    """What it noted."""
    size: int | None
    """Bytes of the draft; None where there is none: then the output has its name already, if it is anywhere."""
    held: bool
    """Whether that run is still at work on it, or another one is."""


class Draft(Protocol):
    """An output being written. It becomes a file only by `commit`."""

    address: str
    """Where workers open it with `Store.writer`, and what has been written is read back with `Store.reader`."""
    notes: Notes
    """They stay when the draft gets its name, until they are removed."""
    named: bool
    """Whether it has its final name already; then nothing may be written to it."""

    def sync(self) -> None:
        """Make durable what was written; raises `StorageError`."""
        ...

    def commit(self) -> None:
        """Sync, then give the bytes their final name, atomically; raises `StorageError`."""
        ...

    def discard(self) -> None:
        """Leave nothing behind, notes included. Harmless after `commit`, and then nothing is removed."""
        ...

    def keep(self) -> None:
        """Give the draft up, and leave it with its notes to a later run. Harmless after `commit`."""
        ...


class Store(Protocol):
    """Bytes at a path. It is sent to workers, so it pickles."""

    def stat(self, path: str) -> FileStat:
        """What identifies the file behind `path`, through links; raises `StorageError`."""
        ...

    def reader(self, path: str) -> Reader:
        """Open a file, or a draft by its address, for reading; raises `StorageError`."""
        ...

    def draft(self, path: str, size: int) -> Draft:
        """Begin a file of `size` bytes that will be called `path`; raises `StorageError`."""
        ...

    def left(self, path: str) -> Left | None:
        """What an earlier run has noted of the draft of `path`, without touching it; None where it noted nothing."""
        ...

    def reopen(self, path: str, size: int) -> Draft:
        """The draft of `path` that an earlier run has left, with its bytes and notes; raises `StorageError`.

        It has `size` bytes afterwards; those that were not there are zero. Where that run was stopped between giving
        the output its name and removing its notes, the file itself, which is `named`.
        """
        ...

    def writer(self, address: str) -> Writer:
        """Open a draft for writing; raises `StorageError`."""
        ...


@dataclass(frozen=True)
class Receipt:
    """The proof that one shard was written."""

    shard: int
    spans: tuple[Span, ...]
    bytes_read: int
    skipped: tuple[tuple[str, str, int], ...] = ()
    """(model, key, count) of values that are not finite and were tolerated by policy."""
    repeated: tuple[tuple[str, int], ...] = ()
    """(model, count) of reads that failed first and succeeded when they were repeated."""
    checksums: tuple[bytes, ...] = ()
    """XXH3, 128 bits, of the bytes of each of `spans`; none where nothing is to be noted of them."""
    failed: tuple[tuple[int, MergeflowError], ...] = ()
    """(output, why) of outputs that cannot be made, where those of other jobs go on without them."""
    worker: str = ""
    """Which process did it."""
    peak_rss: int = 0
    """Bytes: the most memory that process has had so far."""


class Executor(Protocol):
    """Where and when: any number of workers, in this process or elsewhere. It never changes what."""

    name: str
    in_process: bool
    """Whether its workers are threads of this process, which see the same memory."""
    startup_seconds: float
    """What the last `map` spent before its workers were ready."""

    def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
        """Run `execute.shard.ShardWorker(job).run(shard)` for every shard, yielding receipts as they come.

        The first error ends it: no further shard is begun, and when it has raised no worker
        writes any more. The same holds when it is closed early.
        """
        ...
