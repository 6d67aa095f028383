"""Stores for tests: one that lives in memory, and two around any other: one counts, in one reads fail.

All are whole implementations of the `Store` protocol, not recordings of expected calls. Their content is shared
state, so they pickle only within their process: what comes back from a pickle there is the very same store.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

from mergeflow.errors import StorageError
from mergeflow.interfaces import Left
from mergeflow.tensors import FileStat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mergeflow.interfaces import Draft, Notes, Reader, Store, Writer

_HERE: WeakValueDictionary[int, object] = WeakValueDictionary()
"""Every fake of this process, so that a pickle can name one."""


class Extent(NamedTuple):
    """A run of bytes of one file: `begin <= byte < end`."""

    begin: int
    end: int


def merged(extents: Iterable[tuple[int, int]]) -> list[Extent]:
    """What the extents cover together, in order and joined where they touch."""
    joined: list[Extent] = []
    for begin, end in sorted(extents):
        if begin == end:
            continue
        if joined and begin <= joined[-1].end:
            joined[-1] = Extent(joined[-1].begin, max(end, joined[-1].end))
        else:
            joined.append(Extent(begin, end))
    return joined


def overlaps(extents: Iterable[tuple[int, int]]) -> list[Extent]:
    """What more than one of the extents covers."""
    twice: list[Extent] = []
    reached = 0
    for begin, end in sorted(extents):
        if begin < min(end, reached):
            twice.append(Extent(begin, min(end, reached)))
        reached = max(reached, end)
    return merged(twice)


def _pickled_here(identity: int) -> object:
    found = _HERE.get(identity)
    if found is None:
        raise StorageError("a fake store cannot cross into another process; use LocalStore there")
    return found


class _File:
    """Bytes that keep their identity while their name changes."""

    def __init__(self, data: bytes | bytearray, inode: int) -> None:
        self.data = bytearray(data)
        self.inode = inode
        self.mtime_ns = inode
        self.held = False


class MemoryStore:
    """Files in a dictionary. Drafts lie in another, by their addresses."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self._files: dict[str, _File] = {}
        self._drafts: dict[str, _File] = {}
        self._notes: dict[str, bytes] = {}
        self._clock = count(1)
        self._lock = Lock()
        _HERE[id(self)] = self
        for path, data in (files or {}).items():
            self.put(path, data)

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return _pickled_here, (id(self),)

    def put(self, path: str, data: bytes) -> None:
        """Write a file behind the store's back, as another program would: in place, if it exists."""
        with self._lock:
            file = self._files.setdefault(path, _File(b"", next(self._clock)))
            file.data[:] = data
            file.mtime_ns = next(self._clock)

    def get(self, path: str) -> bytes | None:
        """What a file holds, or None where there is none."""
        with self._lock:
            file = self._files.get(path)
            return None if file is None else bytes(file.data)

    def paths(self) -> list[str]:
        """All files, drafts excepted."""
        return sorted(self._files)

    def drafts(self) -> list[str]:
        """The addresses of all drafts."""
        return sorted(self._drafts)

    def notes(self) -> list[str]:
        """The paths of which something is noted."""
        return sorted(self._notes)

    def crash(self) -> None:
        """What a process that is killed does: nobody holds its drafts any more, and all stays as it is."""
        for file in self._drafts.values():
            file.held = False

    def stat(self, path: str) -> FileStat:
        """Size and identity of a file."""
        file = self._find(self._files, path)
        return FileStat(len(file.data), file.mtime_ns, 0, file.inode)

    def reader(self, path: str) -> MemoryFile:
        """A file or a draft, open for reading; it stays the file it was, whatever its name comes to mean."""
        where = self._drafts if path in self._drafts else self._files
        return MemoryFile(path, self._find(where, path), self._lock)

    def draft(self, path: str, size: int) -> MemoryDraft:
        """A draft of `size` zero bytes; a second for the same path is refused while the first is held."""
        address = f"{path}.draft"
        with self._lock:
            if address in self._drafts and self._drafts[address].held:
                raise StorageError(f"{address} is being written by another run")
            file = _File(bytes(size), next(self._clock))
            file.held = True
            self._drafts[address] = file
            self._notes.pop(path, None)
        return MemoryDraft(self, path, address)

    def left(self, path: str) -> Left | None:
        """What was noted of a draft."""
        with self._lock:
            file = self._drafts.get(f"{path}.draft")
            if path not in self._notes:
                return None
            return Left(self._notes[path], None if file is None else len(file.data), file is not None and file.held)

    def reopen(self, path: str, size: int) -> MemoryDraft:
        """The draft that was left, as long as it is to be; or the file, where that has its notes still."""
        address = f"{path}.draft"
        with self._lock:
            if address not in self._drafts and path in self._files and path in self._notes:
                return MemoryDraft(self, path, path, named=True)
            file = self._drafts.setdefault(address, _File(b"", next(self._clock)))
            if file.held:
                raise StorageError(f"{address} is being written by another run")
            file.held = True
            file.data[:] = file.data[:size].ljust(size, b"\0")
        return MemoryDraft(self, path, address)

    def writer(self, address: str) -> MemoryFile:
        """A draft, open for writing."""
        return MemoryFile(address, self._find(self._drafts, address), self._lock)

    def _find(self, where: dict[str, _File], path: str) -> _File:
        with self._lock:
            if path not in where:
                raise StorageError(f"{path} does not exist")
            return where[path]


class MemoryFile:
    """One file of a `MemoryStore`, open."""

    def __init__(self, path: str, file: _File, lock: Lock) -> None:
        self.path = path
        self._file = file
        self._lock = lock

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`."""
        with self._lock:
            data = self._file.data[offset : offset + len(view)]
            if len(data) < len(view):
                raise StorageError(f"{self.path} ends at byte {offset + len(data):,}, not at {offset + len(view):,}")
            view[:] = data

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`. Stricter than a disk: a draft does not grow."""
        with self._lock:
            if offset + len(view) > len(self._file.data):
                raise StorageError(f"{self.path} has {len(self._file.data):,} bytes, not {offset + len(view):,}")
            self._file.data[offset : offset + len(view)] = view

    def sync(self) -> None:
        """Nothing here outlives the process anyway."""

    def close(self) -> None:
        """Nothing to give back."""


class MemoryDraft:
    """A file that has no name yet."""

    def __init__(self, store: MemoryStore, path: str, address: str, *, named: bool = False) -> None:
        self._store = store
        self._path = path
        self.address = address
        self.notes: Notes = MemoryNotes(store, path)
        self.named = named
        self._open = not named
        self._ended = False

    def sync(self) -> None:
        """Nothing here outlives the process anyway."""
        if self._ended:
            raise StorageError(f"{self.address} was committed or discarded before")

    def commit(self) -> None:
        """Give the bytes their name."""
        self.sync()
        if self.named:
            return
        self._open, self._ended, self.named = False, True, True
        with self._store._lock:
            file = self._store._drafts.pop(self.address)
            file.mtime_ns = next(self._store._clock)
            self._store._files[self._path] = file

    def discard(self) -> None:
        """Forget the bytes, unless they were committed."""
        if self._open:
            self._open, self._ended = False, True
            with self._store._lock:
                del self._store._drafts[self.address]
                self._store._notes.pop(self._path, None)

    def keep(self) -> None:
        """Leave the bytes, unless they were committed."""
        if self._open:
            self._open, self._ended = False, True
            with self._store._lock:
                self._store._drafts[self.address].held = False


class MemoryNotes:
    """What is noted of one draft."""

    def __init__(self, store: MemoryStore, path: str) -> None:
        self._store, self._path = store, path

    def read(self) -> bytes:
        """All of it."""
        return self._store._notes.get(self._path, b"")

    def append(self, text: bytes) -> None:
        """Add something."""
        with self._store._lock:
            self._store._notes[self._path] = self.read() + text

    def rewrite(self, text: bytes) -> None:
        """Say this instead."""
        with self._store._lock:
            self._store._notes[self._path] = text

    def sync(self) -> None:
        """Nothing here outlives the process anyway."""

    def remove(self) -> None:
        """Leave none."""
        with self._store._lock:
            self._store._notes.pop(self._path, None)


class CountingStore:
    """Any store, with a record of every byte that was asked of it or given to it.

    An attempt is recorded before it is made, so a read that failed counts too.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reads: defaultdict[str, list[Extent]] = defaultdict(list)
        self._writes: defaultdict[str, list[Extent]] = defaultdict(list)
        self._lock = Lock()
        _HERE[id(self)] = self

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return _pickled_here, (id(self),)

    def reads(self, path: str) -> list[Extent]:
        """Every extent that was read of a file, sorted."""
        with self._lock:
            return sorted(self._reads.get(path, []))

    def writes(self, address: str) -> list[Extent]:
        """Every extent that was written to a draft, sorted."""
        with self._lock:
            return sorted(self._writes.get(address, []))

    def paths_read(self) -> list[str]:
        """The files of which anything was read."""
        with self._lock:
            return sorted(self._reads)

    def forget(self) -> None:
        """Start counting anew, after the headers for example."""
        with self._lock:
            self._reads.clear()
            self._writes.clear()

    def stat(self, path: str) -> FileStat:
        """As the store has it."""
        return self._store.stat(path)

    def reader(self, path: str) -> CountingReader:
        """A file, open for counted reading."""
        return CountingReader(self, path, self._store.reader(path))

    def draft(self, path: str, size: int) -> Draft:
        """As the store has it."""
        return self._store.draft(path, size)

    def left(self, path: str) -> Left | None:
        """As the store has it."""
        return self._store.left(path)

    def reopen(self, path: str, size: int) -> Draft:
        """As the store has it."""
        return self._store.reopen(path, size)

    def writer(self, address: str) -> CountingWriter:
        """A draft, open for counted writing."""
        return CountingWriter(self, address, self._store.writer(address))


class FaultyStore:
    """Any store, in which the first so many reads of one file fail."""

    def __init__(self, store: Store, path: str, error: StorageError, times: int) -> None:
        self._store, self._path, self._error, self._left = store, path, error, times
        self._lock = Lock()
        self.opened = 0
        """How often the faulty file was opened."""
        _HERE[id(self)] = self

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return _pickled_here, (id(self),)

    def stat(self, path: str) -> FileStat:
        """As the store has it."""
        return self._store.stat(path)

    def reader(self, path: str) -> Reader:
        """A file, which may be the faulty one."""
        if path != self._path:
            return self._store.reader(path)
        self.opened += 1
        return FaultyReader(self, self._store.reader(path))

    def draft(self, path: str, size: int) -> Draft:
        """As the store has it."""
        return self._store.draft(path, size)

    def left(self, path: str) -> Left | None:
        """As the store has it."""
        return self._store.left(path)

    def reopen(self, path: str, size: int) -> Draft:
        """As the store has it."""
        return self._store.reopen(path, size)

    def writer(self, address: str) -> Writer:
        """As the store has it."""
        return self._store.writer(address)


class FaultyReader:
    """A reader that fails as long as its store has faults left."""

    def __init__(self, store: FaultyStore, reader: Reader) -> None:
        self._store, self._reader = store, reader

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fail, or read."""
        with self._store._lock:
            fails, self._store._left = self._store._left > 0, self._store._left - 1
        if fails:
            view[: len(view) // 2] = bytes([255]) * (len(view) // 2)  # a read that fails may have begun
            raise self._store._error
        self._reader.read_into(view, offset)

    def close(self) -> None:
        """Close the reader below."""
        self._reader.close()


class CountingReader:
    """A reader that tells its store."""

    def __init__(self, store: CountingStore, path: str, reader: Reader) -> None:
        self._store = store
        self._path = path
        self._reader = reader

    def read_into(self, view: memoryview, offset: int) -> None:
        """Record, then read."""
        with self._store._lock:
            self._store._reads[self._path].append(Extent(offset, offset + len(view)))
        self._reader.read_into(view, offset)

    def close(self) -> None:
        """Close the reader below."""
        self._reader.close()


class CountingWriter:
    """A writer that tells its store."""

    def __init__(self, store: CountingStore, address: str, writer: Writer) -> None:
        self._store = store
        self._address = address
        self._writer = writer

    def write(self, view: memoryview, offset: int) -> None:
        """Record, then write."""
        with self._store._lock:
            self._store._writes[self._address].append(Extent(offset, offset + len(view)))
        self._writer.write(view, offset)

    def sync(self) -> None:
        """As the writer below has it."""
        self._writer.sync()

    def close(self) -> None:
        """Close the writer below."""
        self._writer.close()
