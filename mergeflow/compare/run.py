"""The comparison of two checkpoint files: open both, match their tensors, read each byte once, count.

pair = open_pair("one.safetensors", "other.safetensors", architecture)   # headers are read
comparison = compare_pair(pair)                                          # tensors are read: pair.bytes_to_read
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.compare.result import OTHER, Comparison, Difference, KeyDifference, Match, together
from mergeflow.compare.statistics import Statistics, combined, measured
from mergeflow.compare.ulp import ulp_dtype
from mergeflow.errors import ConfigError, MergeflowError, raise_all
from mergeflow.execute.block import Block
from mergeflow.execute.local import at_work
from mergeflow.execute.watch import refuse_changed
from mergeflow.formats.safetensors import Safetensors
from mergeflow.inputs import open_checkpoint
from mergeflow.storage.local import LocalStore
from mergeflow.tensors import Checkpoint, Dtype, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mergeflow.interfaces import Reader, Store
    from mergeflow.recipe.architecture import Architecture

LOCAL = LocalStore()
LONGEST_READ = 4 << 20
"""Bytes of one tensor that are read at once: longer reads do not make storage faster."""
MOST_THREADS = 8
"""Unless more are asked for: beyond, they only take the interpreter from each other."""
BATCH = 2 * LONGEST_READ
"""Bytes of both files that one thread reads before it reports: small tensors are not worth a report each."""


@dataclass(frozen=True)
class Pair:
    """Two files: what their headers say, and what of them is to be compared."""

    a: Checkpoint
    b: Checkpoint
    architecture: Architecture
    matches: tuple[Match, ...] = field(repr=False)
    """The tensors that both have in one shape, in the order in which they lie in a."""

    @property
    def bytes_to_read(self) -> int:
        """Of both files together."""
        return sum(info.end - info.begin for match in self.matches for info in (match.a, match.b))


class Tile(NamedTuple):
    """A run of elements of one tensor, in both files."""

    match: int
    """Which of the pair's matches."""
    start: int
    stop: int


def compare(
    a: str,
    b: str,
    architecture: Architecture,
    store: Store = LOCAL,
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> Comparison:
    """Compare the safetensors files at two paths: `open_pair`, then `compare_pair`."""
    return compare_pair(open_pair(a, b, architecture, store), store, progress, threads)


def open_pair(a: str, b: str, architecture: Architecture, store: Store = LOCAL) -> Pair:
    """Read both headers and match the tensors by key.

    Raises `StorageError` or `FormatError` for a file that cannot be read or is no checkpoint, `Problems` for two.
    """
    format = Safetensors()
    opened = [open_checkpoint(id, path, store, format, called=str) for id, path in (("a", a), ("b", b))]
    raise_all(problem for problem in opened if isinstance(problem, MergeflowError))
    one, other = (checkpoint for checkpoint in opened if isinstance(checkpoint, Checkpoint))
    matches = [match for match in _shared(one, other) if _real(match.a).shape == _real(match.b).shape]
    return Pair(one, other, architecture, tuple(sorted(matches, key=lambda match: match.a.begin)))


def compare_pair(
    pair: Pair,
    store: Store = LOCAL,
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> Comparison:
    """Read what both files have in common, once, and count; `progress` is told the bytes read as they come.

    So many `threads` read and count at a time, by default one for each core up to `MOST_THREADS`; each takes two times
    `LONGEST_READ` bytes and a few MiB for arithmetic. Their number does not change the result. Raises `StorageError`
    if a file cannot be read or was changed meanwhile, `ConfigError` if there are no threads.
    """
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS) if threads is None else threads
    if threads < 1:
        raise ConfigError(f"threads={threads} would compare nothing; use 1 or more")
    began = time.perf_counter()
    batches = list(_batches(pair))
    parts: dict[int, list[Statistics]] = {}
    crew = _Crew(pair, store)
    with at_work(crew, threads, "compare") as pool:
        futures = {pool.submit(crew.count, batch): number for number, batch in enumerate(batches)}
        for done in as_completed(futures):
            number = futures[done]
            parts[number] = done.result()
            progress(sum(crew.bytes_of(tile) for tile in batches[number]))
    refuse_changed((pair.a, pair.b), store, "compare", called=str)
    tensors = _by_tensor(pair, (zip(batch, parts[number], strict=True) for number, batch in enumerate(batches)))
    components, total = _by_component(pair, tensors)
    return Comparison(pair.a, pair.b, components, total, tensors, pair.bytes_to_read, time.perf_counter() - began)


class _Stopped(Exception):
    """The comparison is being given up."""


class _Crew:
    """What the threads share: both files, open. Each has memory of its own."""

    def __init__(self, pair: Pair, store: Store) -> None:
        self.stopped = threading.Event()
        self._matches = [(match.key, _real(match.a), _real(match.b)) for match in pair.matches]
        self._local = threading.local()
        self._readers: list[Reader] = []
        try:
            for checkpoint in (pair.a, pair.b):
                self._readers.append(store.reader(checkpoint.path))
        except MergeflowError:
            self.close()
            raise

    def count(self, batch: Sequence[Tile]) -> list[Statistics]:
        """What is known of each tile, in the calling thread."""
        return [self._count(tile) for tile in batch]

    def _count(self, tile: Tile) -> Statistics:
        if self.stopped.is_set():
            raise _Stopped
        block: Block | None = getattr(self._local, "block", None)
        if block is None:
            block = self._local.block = Block(2 * LONGEST_READ)
        key, *infos = self._matches[tile.match]
        dtypes = [info.dtype for info in infos]
        rows = block.rows(dtypes, tile.stop - tile.start)
        for reader, info, row in zip(self._readers, infos, rows, strict=True):
            reader.read_into(block.view[row.begin : row.end], info.begin + tile.start * info.dtype.itemsize)
        a, b = map(block.row, dtypes, rows)
        return measured(a, b, ulp_dtype(*dtypes), key, tile.start)

    def bytes_of(self, tile: Tile) -> int:
        """How much of both files it is."""
        return (tile.stop - tile.start) * sum(info.dtype.itemsize for info in self._matches[tile.match][1:])

    def close(self) -> None:
        """Give the files back, once no thread works any more."""
        for reader in self._readers:
            reader.close()


def _shared(a: Checkpoint, b: Checkpoint) -> Iterator[Match]:
    for key, info in a.header.tensors.items():
        if key in b.header.tensors:
            yield Match(key, info, b.header.tensors[key])


def _real(info: TensorInfo) -> TensorInfo:
    """Complex numbers as pairs of real ones: the same bytes, one dimension more."""
    return info._replace(dtype=Dtype.F32, shape=(*info.shape, 2)) if info.dtype is Dtype.C64 else info


def _batches(pair: Pair) -> Iterator[list[Tile]]:
    """Consecutive tiles that cover every element once. How they are cut depends on the tensors and nothing else."""
    batch: list[Tile] = []
    size = 0
    for number, match in enumerate(pair.matches):
        a, b = _real(match.a), _real(match.b)
        longest = LONGEST_READ // max(a.dtype.itemsize, b.dtype.itemsize)
        for start in range(0, a.elements, longest):
            batch.append(Tile(number, start, min(start + longest, a.elements)))
            size += (batch[-1].stop - start) * (a.dtype.itemsize + b.dtype.itemsize)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _by_tensor(pair: Pair, counted: Iterable[Iterable[tuple[Tile, Statistics]]]) -> tuple[KeyDifference, ...]:
    """The tiles of every tensor together; a tensor without elements has none."""
    found: list[list[Statistics]] = [[] for _ in pair.matches]
    for batch in counted:
        for tile, statistics in batch:
            found[tile.match].append(statistics)
    tensors = (_tensor(pair.architecture, match, parts) for match, parts in zip(pair.matches, found, strict=True))
    return tuple(sorted(tensors, key=lambda tensor: tensor.key))


def _tensor(architecture: Architecture, match: Match, parts: Sequence[Statistics]) -> KeyDifference:
    spec = architecture.usual_keys.get(match.key)
    unit = ulp_dtype(_real(match.a).dtype, _real(match.b).dtype)
    return KeyDifference(
        key=match.key,
        component=architecture.component_of(match.key) or OTHER,
        a=match.a.dtype,
        b=match.b.dtype,
        unit=unit,
        shape=match.a.shape,
        integer=unit is None or (spec is not None and spec.integer),
        statistics=combined(parts),
    )


def _by_component(pair: Pair, tensors: Sequence[KeyDifference]) -> tuple[tuple[Difference, ...], Difference]:
    """What differs in each component, and in all."""
    a, b = pair.a.header.tensors, pair.b.header.tensors
    owners = {key: pair.architecture.component_of(key) or OTHER for key in sorted(a.keys() | b.keys())}
    compared = {tensor.key: tensor for tensor in tensors}
    shared = {match.key: match for match in _shared(pair.a, pair.b)}

    def difference(name: str, keys: Sequence[str]) -> Difference:
        mine = [key for key in keys if key in compared]
        return Difference(
            component=name,
            only_a=tuple(key for key in keys if key not in b),
            only_b=tuple(key for key in keys if key not in a),
            shapes=tuple(shared[key] for key in keys if key in shared and key not in compared),
            dtypes=tuple(shared[key] for key in mine if shared[key].a.dtype is not shared[key].b.dtype),
            tensors=len(mine),
            statistics=together([compared[key] for key in mine]),
        )

    present = set(owners.values())
    components = tuple(
        difference(name, [key for key, owner in owners.items() if owner == name])
        for name in dict.fromkeys((*pair.architecture.components, OTHER))
        if name in present
    )
    return components, difference("all", list(owners))
