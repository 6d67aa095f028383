"""The plan: everything that will happen, as a value that can be printed, compared, tested and sent to workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.recipe.request import Budget
from mergeflow.tensors import Header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.errors import MergeflowError
    from mergeflow.interfaces import SharedSums, Step
    from mergeflow.plan.pace import Measured
    from mergeflow.recipe.request import Nonfinite, Target
    from mergeflow.tensors import Checkpoint, Dtype, Layout


class Place(NamedTuple):
    """Where a row of results goes."""

    output: int
    offset: int
    """The byte of the output at which the tensor begins."""


class Cell(NamedTuple):
    """One row of results that a strip yields. Targets that want the same row share the cell."""

    method: str
    dtype: Dtype
    rows: tuple[int, ...]
    """Which rows of the strip, in the order of the target's list."""
    shares: tuple[int, ...]
    """Numerators over their sum, one for each of `rows`; a tree has none."""
    places: tuple[Place, ...]
    steps: tuple[Step, ...] = ()
    """How a tree makes it of `rows`; empty for other methods."""


def _bytes_of(dtypes: Sequence[Dtype]) -> int:
    """Bytes that one element of each takes."""
    return sum([dtype.itemsize for dtype in dtypes])


class Strip(NamedTuple):
    """One tensor key in every source and every output that has it: what tiles are cut from."""

    key: str
    elements: int
    sources: tuple[int, ...]
    """Indices of the plan's checkpoints, one for each row of a block."""
    dtypes: tuple[Dtype, ...]
    """The dtype of each row; equal ones are adjacent."""
    offsets: tuple[int, ...]
    """The byte of the source file at which each row's tensor begins."""
    cells: tuple[Cell, ...]
    sums: tuple[SharedSums, ...] = ()
    """How cells that have rows in common are made together; cells that are in none are made alone."""

    @property
    def bytes_per_element(self) -> int:
        """Bytes that one element takes in a block: all rows, and all rows of results."""
        return _bytes_of(self.dtypes) + _bytes_of([cell.dtype for cell in self.cells])


class Tile(NamedTuple):
    """A run of consecutive elements of one strip."""

    strip: int
    start: int
    stop: int


@dataclass(frozen=True)
class Output:
    """One file that will be written."""

    target: Target
    path: str
    layout: Layout
    dtypes: tuple[tuple[str, str], ...] = ()
    """(component, what its tensors are written in) for the page that explains the plan."""

    @property
    def data(self) -> tuple[int, int]:
        """The bytes after the head: begin and end."""
        return len(self.layout.head), self.layout.size


@dataclass(frozen=True)
class Memory:
    """What the blocks will use. It depends on the tiles, not on how many or how large the models are."""

    allowed: int
    """`executor.memory`, in bytes, for all workers together."""
    threads: int
    """How many blocks there are: workers times the reads that each keeps under way."""
    block: int
    """Bytes of one block: every row of the largest tile, and its rows of results."""
    scratch: int
    """Bytes of intermediate values beside one block."""
    landing: int = 0
    """Bytes beside one block for what is read past the page cache, before it is put into its row."""
    longest_read: int = Budget.block
    """Bytes of one read of one row, at most."""
    kept: int = 0
    """Bytes beside all blocks for results that are hashed in their turn (`execute.digest`)."""

    @property
    def per_thread(self) -> int:
        """Bytes of one block with all that is beside it."""
        return self.block + self.scratch + self.landing

    @property
    def projected(self) -> int:
        """Bytes of all blocks with all that is beside them."""
        return self.threads * self.per_thread + self.kept


@dataclass(frozen=True)
class Plan:
    """What will be read, merged and written, to the byte."""

    checkpoints: tuple[Checkpoint, ...]
    outputs: tuple[Output, ...]
    strips: tuple[Strip, ...]
    shards: tuple[tuple[Tile, ...], ...]
    memory: Memory
    budget: Budget
    nonfinite: Nonfinite
    apart: bool = False
    """Whether outputs belong to several jobs, of which one that cannot be made does not keep others from it."""
    resume: bool = False
    """Whether what an earlier run has left of the outputs is taken up."""
    left: tuple[int, ...] = ()
    """Bytes of each output that an earlier run has left, by what it noted; they are proved when they are taken up."""
    measured: Measured | None = None
    """How fast a sample was read and merged, where that was tried; it changes when things happen, never what."""
    notes: tuple[str, ...] = ()
    """What was tolerated or is odd, in sentences."""
    problems: tuple[MergeflowError, ...] = field(default=())
    """Why it cannot be carried out; empty for a plan that can."""

    def for_workers(self) -> Plan:
        """The same plan without what only planning needs: headers are megabytes, and every worker would load them."""
        checkpoints = tuple(replace(one, header=Header({}, {}, one.header.digest)) for one in self.checkpoints)
        return replace(self, checkpoints=checkpoints, outputs=(), notes=())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that the run reads, each once."""
        return sum(strip.elements * _bytes_of(strip.dtypes) for strip in self.strips)

    @property
    def bytes_written(self) -> int:
        """Bytes of all outputs, heads included."""
        return sum(output.layout.size for output in self.outputs)

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return sum(len(shard) for shard in self.shards)
