"""Files that are read once: the same bytes whichever way they come, and a page cache that is as it was before."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergeflow.errors import StorageError
from mergeflow.storage import kernel
from mergeflow.storage.files import WRITEBACK
from mergeflow.storage.kernel import CHUNK, PAGE, residency
from mergeflow.storage.local import LocalStore
from mergeflow.storage.sources import SourceFile
from tests.conformance.store import BODY, read
from tests.storage.test_local import TestLocalStore as LocalStoreConformance

if TYPE_CHECKING:
    from mergeflow.interfaces import Io, Store

SIZE = 3 * CHUNK + 1234
CONTENT = Random(1).randbytes(SIZE)
LANDING = 4 * PAGE
"""So little that most reads take several."""


class TestReadingOnce(LocalStoreConformance):
    @pytest.fixture(params=["auto", "buffered", "direct"])
    def store(self, request: pytest.FixtureRequest) -> Store:
        probe = Path(self.path("probe"))
        probe.write_bytes(BODY)
        refused = not SourceFile(str(probe), "auto", LANDING).direct
        probe.unlink()
        if refused and request.param == "direct":
            pytest.skip("this file system refuses O_DIRECT")
        return LocalStore(request.param, LANDING)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("once") / "model"
    path.write_bytes(CONTENT)
    return path


def forget(path: Path) -> None:
    """Let nothing of a file be in the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> float:
    """The part of a file that is in the page cache."""
    with path.open("rb") as file:
        told = residency(file.fileno())
    return told.count(1) / len(told)


@pytest.fixture
def past_the_cache(content: Path) -> Path:
    forget(content)
    with closing(SourceFile(str(content), "auto", LANDING)) as file:
        if not file.direct or cached(content):
            pytest.skip("this file system has no way past the page cache")
    return content


@pytest.mark.parametrize("io", ["auto", "buffered"])
@given(begin=st.integers(0, SIZE), count=st.integers(0, 5 * PAGE), at=st.integers(0, 600))
@example(begin=0, count=SIZE, at=8)
@example(begin=SIZE, count=0, at=0)
@example(begin=SIZE - 1, count=1, at=1)
def test_any_bytes_arrive_at_any_address(content: Path, io: Io, begin: int, count: int, at: int) -> None:
    count = min(count, SIZE - begin)
    forget(content)
    room = bytearray(b"\xff" * (at + count + 1))
    with closing(SourceFile(str(content), io, LANDING)) as file:
        file.read_into(memoryview(room)[at : at + count], begin)
    assert bytes(room) == b"\xff" * at + CONTENT[begin : begin + count] + b"\xff"


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_what_was_not_in_the_page_cache_is_not_there_afterwards(past_the_cache: Path, io: Io) -> None:
    with closing(SourceFile(str(past_the_cache), io, LANDING)) as file:
        assert file.resident == 0
        assert read(file, 0, SIZE) == CONTENT
    assert cached(past_the_cache) == 0


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_what_was_in_the_page_cache_stays_there_and_is_taken_from_it(
    past_the_cache: Path, io: Io, monkeypatch: pytest.MonkeyPatch
) -> None:
    past_the_cache.read_bytes()
    with closing(SourceFile(str(past_the_cache), io, LANDING)) as file:
        assert file.resident == 1
        monkeypatch.setattr(SourceFile, "_read_past_the_cache", None)
        assert read(file, 0, SIZE) == CONTENT
    assert cached(past_the_cache) == 1


def test_asked_for_by_name_the_page_cache_is_passed_whatever_it_holds(past_the_cache: Path) -> None:
    past_the_cache.read_bytes()
    flags = descriptors_of_reads(lambda: read(SourceFile(str(past_the_cache), "direct", LANDING), 5, CHUNK))
    assert flags
    assert all(flag & os.O_DIRECT for flag in flags)


def descriptors_of_reads(act: Any) -> list[int]:
    """The flags of the descriptors that `act` reads from."""
    import fcntl

    flags: list[int] = []
    real = os.preadv

    def note(descriptor: int, views: list[memoryview], offset: int) -> int:
        flags.append(fcntl.fcntl(descriptor, fcntl.F_GETFL))
        return real(descriptor, views, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", note)
        act()
    return flags


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)


def refuse_at_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    real = os.preadv

    def refuse(descriptor: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", refuse)


@pytest.mark.parametrize("refuse", [refuse_at_open, refuse_at_reading])
def test_a_file_system_that_refuses_is_read_through_the_cache(
    content: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(content)
    refuse(monkeypatch)
    with closing(SourceFile(str(content), "auto", LANDING)) as file:
        assert read(file, 77, 2 * CHUNK) == CONTENT[77 : 77 + 2 * CHUNK]


@pytest.mark.parametrize("refuse", [refuse_at_open, refuse_at_reading])
def test_a_file_system_that_refuses_is_an_error_where_direct_was_asked_for(
    content: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    with pytest.raises(StorageError, match=r"model cannot be read with executor\.io=direct: .* choose executor\.io="):
        read(SourceFile(str(content), "direct", LANDING), 0, CHUNK)


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_file_that_has_become_shorter_is_an_error_that_says_where(tmp_path: Path, io: Io) -> None:
    path = tmp_path / "short"
    path.write_bytes(CONTENT[: 2 * PAGE + 10])
    forget(path)
    with closing(SourceFile(str(path), io, LANDING)) as file, pytest.raises(StorageError, match="short ends at byte 8"):
        read(file, PAGE, 2 * PAGE)


def test_what_is_written_is_sent_to_the_disk_long_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(kernel, "start_writeback", sent.append)
    store = LocalStore()
    draft = store.draft(str(tmp_path / "out"), 4 * WRITEBACK)
    writer = store.writer(draft.address)
    part = memoryview(bytes(WRITEBACK // 2))
    for offset in range(0, 4 * WRITEBACK, len(part)):
        writer.write(part, offset)
    writer.close()
    draft.discard()
    assert len(sent) == 4
