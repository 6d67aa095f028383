from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread, Timer
from typing import TYPE_CHECKING

import pytest

from mergeflow.errors import Problems, StorageError
from mergeflow.storage.hashes import BLOCK_BYTES, HashCache, identities, legacy_hash
from mergeflow.storage.local import LocalStore
from mergeflow.tensors import Identity
from tests.fakes import CountingReader, CountingStore, Extent, MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mergeflow.interfaces import Reader, Store

MIB = 1 << 20
REGION = slice(0x100000, 0x110000)


def content(seed: int, size: int) -> bytes:
    return (hashlib.sha256(str(seed).encode()).digest() * (size // 32 + 1))[:size]


def expected(data: bytes) -> Identity:
    return Identity(hashlib.sha256(data).hexdigest(), hashlib.sha256(data[REGION]).hexdigest()[:8])


def silent(count: int) -> None:
    """Nobody is told."""


class Hooked(CountingStore):
    """A store in which something happens before every read."""

    def __init__(self, store: Store, hook: Callable[[str, int], object]) -> None:
        super().__init__(store)
        self._hook = hook

    def reader(self, path: str) -> HookedReader:
        return HookedReader(self, path, self._store.reader(path), self._hook)


class HookedReader(CountingReader):
    def __init__(self, store: CountingStore, path: str, reader: Reader, hook: Callable[[str, int], object]) -> None:
        super().__init__(store, path, reader)
        self._hook = hook

    def read_into(self, view: memoryview, offset: int) -> None:
        self._hook(self._path, offset)
        super().read_into(view, offset)


@pytest.fixture
def cache_path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "hashes.json"


def written(directory: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """Files of these sizes, by their ids."""
    for seed, (id, size) in enumerate(sizes.items()):
        (directory / f"{id}.safetensors").write_bytes(content(seed, size))
    return {id: str(directory / f"{id}.safetensors") for id in sizes}


# what is computed


AROUND_THE_REGION = [MIB - 1, MIB, MIB + 1, MIB + 65535, MIB + 65536, MIB + 65537]


@pytest.mark.parametrize("size", [0, 1, *AROUND_THE_REGION, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES - 7])
def test_both_hashes_come_of_one_pass(tmp_path: Path, cache_path: Path, size: int) -> None:
    paths = written(tmp_path, {"a": size})
    store = CountingStore(LocalStore())
    told: list[int] = []
    found = identities(paths, store, HashCache(str(cache_path)), told.append)
    assert found == {"a": expected(Path(paths["a"]).read_bytes())}
    reads = store.reads(paths["a"])
    assert [extent.begin for extent in reads] == list(range(0, size, BLOCK_BYTES))
    assert sum(told) == size
    assert legacy_hash(paths["a"], LocalStore()) == found["a"].legacy


def test_the_legacy_hash_is_that_of_64_kib_behind_the_first_mib(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"\0" * MIB + b"\1" * 65536 + b"\0" * 100)
    store = CountingStore(LocalStore())
    assert legacy_hash(str(path), store) == hashlib.sha256(b"\1" * 65536).hexdigest()[:8]
    assert store.reads(str(path)) == [Extent(MIB, MIB + 65536)]


def test_the_legacy_hash_of_a_short_file_is_that_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"short")
    assert legacy_hash(str(path), LocalStore()) == hashlib.sha256().hexdigest()[:8] == "e3b0c442"


@pytest.mark.parametrize("threads", [1, 2, 7, 50])
def test_any_number_of_threads_finds_the_same_in_the_order_of_the_ids(
    tmp_path: Path, cache_path: Path, threads: int
) -> None:
    paths = written(tmp_path, {f"{number}": 100_000 * (20 - number) for number in range(20)})
    told: list[int] = []
    found = identities(paths, LocalStore(), HashCache(str(cache_path)), told.append, threads=threads)
    assert found == {id: expected(Path(path).read_bytes()) for id, path in paths.items()}
    assert list(found) == list(paths)
    assert sum(told) == sum(Path(path).stat().st_size for path in paths.values())


def test_nothing_is_asked_of_no_files(cache_path: Path) -> None:
    assert identities({}, LocalStore(), HashCache(str(cache_path)), silent) == {}
    assert not cache_path.exists()


def test_progress_is_told_by_the_thread_that_waits(tmp_path: Path, cache_path: Path) -> None:
    tellers = set[int]()
    identities(
        written(tmp_path, {"a": 10, "b": 20}),
        LocalStore(),
        HashCache(str(cache_path)),
        lambda count: tellers.add(threading.get_ident()),
    )
    assert tellers == {threading.get_ident()}


# what is kept


def test_what_is_known_is_not_read_again(tmp_path: Path, cache_path: Path) -> None:
    paths = written(tmp_path, {"a": 2 * MIB, "b": 5})
    first = identities(paths, LocalStore(), HashCache(str(cache_path)), silent)
    store = CountingStore(LocalStore())
    told: list[int] = []
    again = HashCache(str(cache_path))
    assert again.missing(paths, store) == {}
    assert identities(paths, store, again, told.append) == first
    assert store.paths_read() == []
    assert told == []
    assert [path.name for path in cache_path.parent.iterdir()] == ["hashes.json"]


def test_what_is_missing_is_told_in_bytes(tmp_path: Path, cache_path: Path) -> None:
    paths = written(tmp_path, {"a": 7, "b": 5, "c": 3})
    cache = HashCache(str(cache_path))
    identities({"a": paths["a"]}, LocalStore(), cache, silent)
    assert cache.missing(paths | {"d": str(tmp_path / "gone")}, LocalStore()) == {"b": 5, "c": 3}


@pytest.mark.parametrize("change", ["content", "size", "time"])
def test_a_file_that_changed_is_read_again(tmp_path: Path, cache_path: Path, change: str) -> None:
    paths = written(tmp_path, {"a": 100})
    path = Path(paths["a"])
    identities(paths, LocalStore(), HashCache(str(cache_path)), silent)
    before = path.stat()
    path.write_bytes(b"x" * (101 if change == "size" else 100))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change != "size")))
    found = identities(paths, LocalStore(), HashCache(str(cache_path)), silent)
    assert found == {"a": expected(path.read_bytes())}


def test_a_relative_path_is_the_same_file_only_in_the_same_directory(
    tmp_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_bytes(name.encode())
        os.utime(tmp_path / name / "model", ns=(1, 1))
        monkeypatch.chdir(tmp_path / name)
        found.append(identities({"a": "model"}, LocalStore(), HashCache(str(cache_path)), silent)["a"])
    assert found == [expected(b"one"), expected(b"two")]


DAMAGED = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"[1]",
    b"null",
    b"1" * 5000,
    b'{"PATH": 3}',
    b'{"PATH": {"size": 100}}',
    b'{"PATH": {"size": true, "mtime_ns": 1, "sha256": "a", "legacy": "b"}}',
    b'{"PATH": {"size": 100, "mtime_ns": MTIME, "sha256": "zz", "legacy": "00000000"}}',
    b'{"PATH": {"size": 100, "mtime_ns": MTIME, "sha256": null, "legacy": null}}',
    b'{"PATH": {"size": 100, "mtime_ns": NaN, "sha256": "", "legacy": ""}}',
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=[str(number) for number in range(len(DAMAGED))])
def test_a_damaged_cache_is_made_anew_and_said_so(
    tmp_path: Path, cache_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    paths = written(tmp_path, {"a": 100})
    mtime = str(Path(paths["a"]).stat().st_mtime_ns)
    cache_path.parent.mkdir()
    cache_path.write_bytes(damaged.replace(b"PATH", paths["a"].encode()).replace(b"MTIME", mtime.encode()))
    with caplog.at_level(logging.INFO, "mergeflow"):
        found = identities(paths, LocalStore(), HashCache(str(cache_path)), silent)
    assert found == {"a": expected(Path(paths["a"]).read_bytes())}
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "computed again" in caplog.text
    assert HashCache(str(cache_path)).missing(paths, LocalStore()) == {}


def test_what_is_whole_in_a_damaged_cache_is_used(tmp_path: Path, cache_path: Path) -> None:
    paths = written(tmp_path, {"a": 100, "b": 100})
    identities(paths, LocalStore(), HashCache(str(cache_path)), silent)
    told = json.loads(cache_path.read_bytes())
    told[paths["b"]]["sha256"] = 5
    cache_path.write_text(json.dumps(told))
    assert HashCache(str(cache_path)).missing(paths, LocalStore()) == {"b": 100}


def test_no_cache_is_nothing_to_speak_of(cache_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mergeflow"):
        HashCache(str(cache_path))
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = written(tmp_path, {"a": 5, "b": 6})
    (tmp_path / "file").write_bytes(b"")
    found = identities(paths, LocalStore(), HashCache(str(tmp_path / "file" / "hashes.json")), silent)
    assert found["a"] == expected(Path(paths["a"]).read_bytes())
    assert caplog.text.count("hashes cannot be kept") == 1


def test_a_name_that_is_no_text_is_kept(tmp_path: Path, cache_path: Path) -> None:
    path = tmp_path / os.fsdecode(b'caf\xe9 \n"x".safetensors')
    path.write_bytes(b"abc")
    identities({"a": str(path)}, LocalStore(), HashCache(str(cache_path)), silent)
    assert HashCache(str(cache_path)).missing({"a": str(path)}, LocalStore()) == {}


def test_many_threads_may_keep_hashes_while_others_read_the_file(tmp_path: Path, cache_path: Path) -> None:
    paths = written(tmp_path, {f"{number}": number for number in range(40)})
    cache = HashCache(str(cache_path))
    torn: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            with suppress(FileNotFoundError):
                try:
                    json.loads(cache_path.read_bytes())
                except ValueError as error:
                    torn.append(str(error))

    watcher = Thread(target=watch)
    watcher.start()
    try:
        identities(paths, LocalStore(), cache, silent, threads=8)
    finally:
        ended.set()
        watcher.join()
    assert torn == []
    assert len(json.loads(cache_path.read_bytes())) == 40


# what goes wrong


def test_what_is_wrong_with_any_file_is_raised_together(tmp_path: Path, cache_path: Path) -> None:
    paths = written(tmp_path, {"a": 5, "b": 6}) | {"c": str(tmp_path / "gone"), "d": str(tmp_path)}
    cache = HashCache(str(cache_path))
    with pytest.raises(Problems) as caught:
        identities(paths, LocalStore(), cache, silent)
    assert [str(error) for error in caught.value.errors] == [
        f"model c: {tmp_path / 'gone'} does not exist",
        f"model d: {tmp_path} is a directory, not a checkpoint file",
    ]
    assert all(type(error) is StorageError for error in caught.value.errors)
    assert cache.missing(paths, LocalStore()) == {}  # the others are done


@pytest.mark.parametrize("offset", [0, BLOCK_BYTES, 2 * BLOCK_BYTES])
def test_a_file_that_changes_while_it_is_read_is_an_error_and_not_kept(cache_path: Path, offset: int) -> None:
    memory = MemoryStore({"/m/a": bytes(3 * BLOCK_BYTES)})

    def change(path: str, at: int) -> None:
        if at == offset:
            memory.put(path, b"\1" * 3 * BLOCK_BYTES)

    cache = HashCache(str(cache_path))
    with pytest.raises(StorageError, match=r"^model a: /m/a was changed while it was being hashed; run again when"):
        identities({"a": "/m/a"}, Hooked(memory, change), cache, silent)
    assert cache.missing({"a": "/m/a"}, memory) == {"a": 3 * BLOCK_BYTES}
    assert identities({"a": "/m/a"}, memory, cache, silent) == {"a": expected(b"\1" * 3 * BLOCK_BYTES)}


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path, cache_path: Path) -> None:
    paths = written(tmp_path, {"a": 2 * BLOCK_BYTES})
    store = Hooked(LocalStore(), lambda path, _: os.truncate(path, BLOCK_BYTES))
    with pytest.raises(StorageError, match=f"^model a: .* ends at byte {BLOCK_BYTES:,}, but"):
        identities(paths, store, HashCache(str(cache_path)), silent)


def test_what_is_not_foreseen_is_raised_as_it_is(tmp_path: Path, cache_path: Path) -> None:
    store = Hooked(LocalStore(), lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        identities(written(tmp_path, {"a": 1}), store, HashCache(str(cache_path)), silent)


# interruptions


def hashing() -> list[Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hashing")]


def test_ctrl_c_ends_it_at_once_and_what_is_done_is_kept(tmp_path: Path, cache_path: Path) -> None:
    paths = written(tmp_path, {"small": 5, "a": BLOCK_BYTES, "b": BLOCK_BYTES, "c": BLOCK_BYTES})
    for id in "abc":
        os.truncate(paths[id], 1 << 40)  # with nothing in it, and hours to read
    cache = HashCache(str(cache_path))
    pressed = Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    pressed.start()
    with pytest.raises(KeyboardInterrupt):
        identities(paths, LocalStore(), cache, silent, threads=2)
    assert time.monotonic() - began < 20
    assert hashing() == []
    assert "small" not in HashCache(str(cache_path)).missing(paths, LocalStore())


def test_ctrl_c_does_not_wait_for_a_read_that_hangs(tmp_path: Path, cache_path: Path) -> None:
    released = threading.Event()
    pressed = Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    pressed.start()
    store = Hooked(LocalStore(), lambda *_: released.wait(60))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        identities(written(tmp_path, {"a": 5, "b": 5}), store, HashCache(str(cache_path)), silent)
    assert time.monotonic() - began < 30
    stuck = hashing()
    assert stuck
    assert all(thread.daemon for thread in stuck)  # so that the process can end
    released.set()
    for thread in stuck:
        thread.join(60)


def test_an_error_of_who_is_told_ends_it(tmp_path: Path, cache_path: Path) -> None:
    def refuse(count: int) -> None:
        raise ZeroDivisionError

    paths = written(tmp_path, {"a": 5})
    os.truncate(paths["a"], 1 << 40)
    with pytest.raises(ZeroDivisionError):
        identities(paths, LocalStore(), HashCache(str(cache_path)), refuse)
    assert hashing() == []
