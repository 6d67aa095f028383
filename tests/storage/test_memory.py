from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest

from mergeflow.errors import StorageError
from tests.conformance.store import BODY, StoreConformance, read, write
from tests.fakes import CountingStore, Extent, MemoryStore, merged, overlaps

if TYPE_CHECKING:
    from mergeflow.interfaces import Store


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        self.memory = MemoryStore()
        return self.memory

    def put(self, path: str, data: bytes) -> None:
        self.memory.put(path, data)

    def get(self, path: str) -> bytes | None:
        return self.memory.get(path)

    def traces(self) -> list[str]:
        return self.memory.paths() + self.memory.drafts() + self.memory.notes()


class TestCountingStore(TestMemoryStore):
    """A store that is counted is still a store."""

    @pytest.fixture
    def store(self) -> Store:
        self.memory = MemoryStore()
        return CountingStore(self.memory)


def test_a_memory_store_refuses_a_second_draft_of_a_path() -> None:
    store = MemoryStore()
    held = store.draft("out", 1)
    with pytest.raises(StorageError, match="another run"):
        store.draft("out", 1)
    held.discard()
    store.draft("out", 1).commit()


def test_a_memory_draft_does_not_grow() -> None:
    store = MemoryStore()
    draft = store.draft("out", 4)
    with pytest.raises(StorageError, match="has 4 bytes, not 5"):
        write(store, draft.address, b"ab", 3)


def test_a_fake_store_says_that_it_cannot_cross_processes() -> None:
    store = MemoryStore()
    pickled = pickle.dumps(store)
    del store
    with pytest.raises(StorageError, match="cannot cross"):
        pickle.loads(pickled)


def test_counting_records_every_read_and_write_where_it_was_made() -> None:
    store = CountingStore(MemoryStore({"a": BODY, "b": BODY}))
    a, b = store.reader("a"), store.reader("b")
    read(a, 100, 20)
    read(a, 0, 8)
    read(b, 3, 1)
    with pytest.raises(StorageError):
        read(b, 1280, 1)
    draft = store.draft("out", 10)
    write(store, draft.address, b"12", 8)
    write(store, draft.address, b"345", 0)
    assert store.reads("a") == [Extent(0, 8), Extent(100, 120)]
    assert store.reads("b") == [Extent(3, 4), Extent(1280, 1281)]
    assert store.reads("never") == []
    assert store.writes(draft.address) == [Extent(0, 3), Extent(8, 10)]
    assert store.paths_read() == ["a", "b"]
    store.forget()
    assert store.paths_read() == []
    assert store.writes(draft.address) == []


@pytest.mark.parametrize(
    ("extents", "union", "twice"),
    [
        pytest.param([], [], [], id="none"),
        pytest.param([(3, 3), (0, 0)], [], [], id="empty-ones"),
        pytest.param([(5, 9), (0, 5)], [(0, 9)], [], id="touching"),
        pytest.param([(0, 2), (3, 4)], [(0, 2), (3, 4)], [], id="apart"),
        pytest.param([(0, 5), (3, 8)], [(0, 8)], [(3, 5)], id="overlapping"),
        pytest.param([(0, 9), (2, 3), (3, 4), (8, 12)], [(0, 12)], [(2, 4), (8, 9)], id="nested"),
        pytest.param([(1, 2), (1, 2), (1, 2)], [(1, 2)], [(1, 2)], id="equal"),
        pytest.param([(0, 9), (2, 3), (5, 7)], [(0, 9)], [(2, 3), (5, 7)], id="two-in-one"),
    ],
)
def test_merged_and_overlaps_tell_what_is_covered(
    extents: list[tuple[int, int]], union: list[tuple[int, int]], twice: list[tuple[int, int]]
) -> None:
    assert merged(extents) == union
    assert overlaps(extents) == twice
