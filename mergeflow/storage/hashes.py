"""What files are known by: the SHA-256 of all their bytes, and the web UI's former hash of some.

Reading a collection takes minutes, so what was computed is kept in a file, and nothing is read twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.errors import MergeflowError, StorageError, raise_all
from mergeflow.storage.small import read_small
from mergeflow.tensors import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mergeflow.interfaces import Reader, Store
    from mergeflow.tensors import FileStat

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
THREADS = 4
"""So many files are read at once: hashing leaves other threads alone, and one disk seldom gains from more."""
LEGACY_BEGIN, LEGACY_END, LEGACY_DIGITS = 0x100000, 0x110000, 8
LARGEST_CACHE = 100 << 20
"""Bytes of the file with hashes: those of 300,000 files."""
STOP_SECONDS = 1.0
"""How long an interrupted caller waits for threads that may be stuck in a read."""

_SHA256, _LEGACY = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{8}")


class HashCache:
    """Identity in a JSON file, by path, size and time of modification; any thread may use it."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock = Lock()
        self._writable = True
        self._known = dict(_read(self._path))

    def find(self, path: str, stat: FileStat) -> Identity | None:
        """What is known of a file, unless it has changed since."""
        size, mtime_ns, hashes = self._known.get(_key(path), (None, None, None))
        return hashes if (size, mtime_ns) == (stat.size, stat.mtime_ns) else None

    def keep(self, path: str, stat: FileStat, hashes: Identity) -> None:
        """Remember the hashes of a file, here and on disk."""
        with self._lock:
            self._known[_key(path)] = (stat.size, stat.mtime_ns, hashes)
            if self._writable:
                try:
                    self._write()
                except OSError as error:
                    self._writable = False
                    log.warning("hashes cannot be kept in %s (%s); the next run reads all again", self._path, error)

    def missing(self, paths: Mapping[str, str], store: Store) -> dict[str, int]:
        """How many bytes have to be read of every file that is not known, by id; not of those that cannot be read."""
        found: dict[str, int] = {}
        for id, path in paths.items():
            with suppress(StorageError):
                stat = store.stat(path)
                if self.find(path, stat) is None:
                    found[id] = stat.size
        return found

    def _write(self) -> None:
        """Replace the file as a whole, so that nobody ever reads a part of it."""
        files = {
            path: {"size": size, "mtime_ns": mtime_ns, **hashes._asdict()}
            for path, (size, mtime_ns, hashes) in sorted(self._known.items())
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(files, indent=1), encoding="ascii")
            draft.replace(self._path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def _key(path: str) -> str:
    return str(Path(path).absolute())


def _read(path: Path) -> Iterator[tuple[str, tuple[int, int, Identity]]]:
    """What a cache holds. It is no more than a convenience: what is wrong in it is read from the files again."""
    try:
        told = json.loads(read_small(path, LARGEST_CACHE))
        entries = list(told.items())
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        log.info("the hashes in %s cannot be read (%s); they are computed again", path, error)
        return
    ignored = 0
    for name, entry in entries:
        known = _entry(entry)
        if known is None:
            ignored += 1
        else:
            yield name, known
    if ignored:
        log.info("%d of %d entries in %s are damaged; they are computed again", ignored, len(entries), path)


def _entry(entry: object) -> tuple[int, int, Identity] | None:
    if not isinstance(entry, dict):
        return None
    size, mtime_ns, sha256, legacy = (entry.get(field) for field in ("size", "mtime_ns", "sha256", "legacy"))
    if not (type(size) is int and type(mtime_ns) is int and isinstance(sha256, str) and isinstance(legacy, str)):
        return None
    hex = _SHA256.fullmatch(sha256) and _LEGACY.fullmatch(legacy)
    return (size, mtime_ns, Identity(sha256, legacy)) if hex else None


def legacy_hash(path: str, store: Store) -> str:
    """The web UI's former hash: 64 KiB that start at 1 MiB, or what there is of them."""
    size = store.stat(path).size
    part = memoryview(bytearray(max(0, min(size, LEGACY_END) - LEGACY_BEGIN)))
    reader = store.reader(path)
    try:
        reader.read_into(part, LEGACY_BEGIN)
    finally:
        reader.close()
    return hashlib.sha256(part).hexdigest()[:LEGACY_DIGITS]


def identities(
    paths: Mapping[str, str],
    store: Store,
    cache: HashCache,
    progress: Callable[[int], None],
    threads: int = THREADS,
) -> dict[str, Identity]:
    """The hashes of files by the ids of their models; raises what is wrong with any of them together.

    `progress` is told of bytes that were read, by the thread that calls this. What is finished when that is
    interrupted is kept.
    """
    work = _Work(paths, store, cache)
    running = [Thread(target=work.run, name="hashing", daemon=True) for _ in range(max(1, min(threads, len(paths))))]
    try:
        for thread in running:
            thread.start()
        found = work.results(progress)
    finally:
        work.stop.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in running:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
    ordered = [found[id] for id in paths]
    raise_all(result for result in ordered if isinstance(result, MergeflowError))
    return {id: one for id, one in zip(paths, ordered, strict=True) if isinstance(one, Identity)}


class _Stopped(Exception):
    """Nobody waits for the result any more."""


class _Done(NamedTuple):
    """The end of one file."""

    id: str
    result: Identity | BaseException


class _Work:
    """Files to hash, by any number of threads, and what they tell the one that waits."""

    def __init__(self, paths: Mapping[str, str], store: Store, cache: HashCache) -> None:
        self.stop = Event()
        self._left = deque(paths.items())
        self._count = len(paths)
        self._told: SimpleQueue[int | _Done] = SimpleQueue()
        self._store = store
        self._cache = cache

    def results(self, progress: Callable[[int], None]) -> dict[str, Identity | MergeflowError]:
        """Wait for all files; what is no deliberate error is raised at once."""
        found: dict[str, Identity | MergeflowError] = {}
        while len(found) < self._count:
            told = self._told.get()
            if isinstance(told, int):
                progress(told)
            elif isinstance(told.result, (Identity, MergeflowError)):
                found[told.id] = told.result
            else:
                raise told.result
        return found

    def run(self) -> None:
        """Hash files until none is left, or nobody waits."""
        while not self.stop.is_set():
            try:
                id, path = self._left.popleft()
            except IndexError:
                return
            try:
                self._told.put(_Done(id, self._hashes(path)))
            except StorageError as error:
                self._told.put(_Done(id, StorageError(f"model {id}: {error}")))
            except BaseException as error:
                self._told.put(_Done(id, error))

    def _hashes(self, path: str) -> Identity:
        before = self._store.stat(path)
        known = self._cache.find(path, before)
        if known is not None:
            return known
        reader = self._store.reader(path)
        try:
            hashes = self._read(reader, before.size)
        finally:
            reader.close()
        if self._store.stat(path) != before:
            raise StorageError(f"{path} was changed while it was being hashed; run again when it is complete")
        self._cache.keep(path, before, hashes)
        return hashes

    def _read(self, reader: Reader, size: int) -> Identity:
        """Both hashes in one pass."""
        whole, legacy = hashlib.sha256(), hashlib.sha256()
        buffer = memoryview(bytearray(min(size, BLOCK_BYTES)))
        for offset in range(0, size, BLOCK_BYTES):
            if self.stop.is_set():
                raise _Stopped
            block = buffer[: size - offset]
            reader.read_into(block, offset)
            whole.update(block)
            legacy.update(block[max(0, LEGACY_BEGIN - offset) : max(0, LEGACY_END - offset)])
            self._told.put(len(block))
        return Identity(whole.hexdigest(), legacy.hexdigest()[:LEGACY_DIGITS])
