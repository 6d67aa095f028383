"""What every `Store` must keep.

Subclass `StoreConformance`, give it a fixture `store` (a new one, without files) and the three methods that go behind
its back, and run it: what the store says is checked against what is there, never against the store itself.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import TYPE_CHECKING

import pytest

from mergeflow.errors import StorageError

if TYPE_CHECKING:
    from mergeflow.interfaces import Reader, Store

BODY = bytes(range(256)) * 5
"""1,280 bytes in which no run of 256 starts twice at the same phase."""


def read(reader: Reader, offset: int, count: int) -> bytes:
    """So many bytes, through `read_into`."""
    buffer = bytearray(count)
    reader.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write(store: Store, address: str, data: bytes, offset: int) -> None:
    """Some bytes, through a writer of their own."""
    writer = store.writer(address)
    try:
        writer.write(memoryview(data), offset)
    finally:
        writer.close()


class StoreConformance(ABC):
    """The contract of `Store`, `Reader`, `Writer` and `Draft`."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Make a file, behind the store's back; one that exists is rewritten in place."""

    @abstractmethod
    def get(self, path: str) -> bytes | None:
        """What a file holds, or None where there is none, behind the store's back."""

    @abstractmethod
    def traces(self) -> list[str]:
        """Every file and draft that there is, sorted, behind the store's back."""

    def path(self, name: str) -> str:
        """A path that this store can use."""
        return name

    # stat

    def test_stat_tells_the_size(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        self.put(self.path("empty"), b"")
        assert store.stat(self.path("a")).size == len(BODY)
        assert store.stat(self.path("empty")).size == 0

    def test_stat_stays_the_same_while_the_file_does(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        before = store.stat(self.path("a"))
        assert read(store.reader(self.path("a")), 0, 10) == BODY[:10]
        assert store.stat(self.path("a")) == before

    def test_stat_tells_equal_files_apart(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        self.put(self.path("b"), BODY)
        a, b = store.stat(self.path("a")), store.stat(self.path("b"))
        assert (a.device, a.inode) != (b.device, b.inode)

    def test_stat_changes_when_a_file_is_rewritten_with_as_many_bytes(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        before = store.stat(self.path("a"))
        self.put(self.path("a"), BODY[::-1])
        assert store.stat(self.path("a")) != before

    def test_stat_changes_when_a_draft_replaces_a_file(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        before = store.stat(self.path("a"))
        draft = store.draft(self.path("a"), len(BODY))
        write(store, draft.address, BODY, 0)
        draft.commit()
        assert store.stat(self.path("a")) != before

    @pytest.mark.parametrize("ask", ["stat", "reader", "writer"])
    def test_a_file_that_does_not_exist_is_named(self, store: Store, ask: str) -> None:
        with pytest.raises(StorageError, match=r"nothing-here.*does not exist"):
            getattr(store, ask)(self.path("nothing-here"))

    # reading

    @pytest.mark.parametrize(
        ("offset", "count"),
        [(0, 1280), (0, 1), (1279, 1), (255, 258), (7, 0), (1280, 0)],
        ids=["all", "first", "last", "middle", "nothing", "nothing-at-the-end"],
    )
    def test_a_reader_fills_exactly_what_it_is_given(self, store: Store, offset: int, count: int) -> None:
        self.put(self.path("a"), BODY)
        buffer = bytearray(b"\xff" * (count + 2))
        reader = store.reader(self.path("a"))
        reader.read_into(memoryview(buffer)[1:-1], offset)
        reader.close()
        assert buffer == b"\xff" + BODY[offset : offset + count] + b"\xff"

    @pytest.mark.parametrize(
        ("offset", "count"),
        [(0, 1281), (1280, 1), (5000, 8)],
        ids=["one-too-many", "at-the-end", "far-beyond"],
    )
    def test_a_read_beyond_the_end_is_an_error_that_names_the_file(self, store: Store, offset: int, count: int) -> None:
        self.put(self.path("short-one"), BODY)
        reader = store.reader(self.path("short-one"))
        with pytest.raises(StorageError, match="short-one"):
            read(reader, offset, count)
        assert read(reader, 0, 4) == BODY[:4], "a reader must survive a failed read"
        reader.close()

    def test_one_reader_serves_many_threads(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        reader = store.reader(self.path("a"))
        asked = [(offset, count) for offset, count in product(range(0, 1200, 7), (1, 64, 80))]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda place: read(reader, *place), asked))
        reader.close()
        assert found == [BODY[offset : offset + count] for offset, count in asked]

    def test_closing_twice_is_harmless(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        draft = store.draft(self.path("b"), 1)
        for opened in (store.reader(self.path("a")), store.writer(draft.address)):
            opened.close()
            opened.close()
        draft.discard()

    # drafts

    def test_a_draft_is_not_a_file_until_commit(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 4)
        write(store, draft.address, b"abcd", 0)
        assert self.get(self.path("out")) is None
        with pytest.raises(StorageError):
            store.stat(self.path("out"))
        draft.commit()
        assert self.get(self.path("out")) == b"abcd"
        assert store.stat(self.path("out")).size == 4

    def test_a_file_stays_whole_until_a_draft_of_its_name_is_committed(self, store: Store) -> None:
        self.put(self.path("out"), b"old and longer")
        draft = store.draft(self.path("out"), 3)
        write(store, draft.address, b"new", 0)
        assert self.get(self.path("out")) == b"old and longer"
        draft.commit()
        assert self.get(self.path("out")) == b"new"

    def test_bytes_that_nobody_wrote_are_zero(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 10)
        write(store, draft.address, b"xy", 4)
        draft.commit()
        assert self.get(self.path("out")) == b"\0\0\0\0xy\0\0\0\0"

    def test_an_empty_draft_becomes_an_empty_file(self, store: Store) -> None:
        store.draft(self.path("out"), 0).commit()
        assert self.get(self.path("out")) == b""

    def test_a_later_write_wins(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 6)
        write(store, draft.address, b"aaaaaa", 0)
        write(store, draft.address, b"bb", 2)
        draft.commit()
        assert self.get(self.path("out")) == b"aabbaa"

    def test_writers_in_many_threads_each_fill_their_place(self, store: Store) -> None:
        draft = store.draft(self.path("out"), len(BODY))
        shared = store.writer(draft.address)

        def fill(begin: int) -> None:
            part = memoryview(BODY)[begin : begin + 5]
            if begin % 2:
                shared.write(part, begin)
            else:
                write(store, draft.address, bytes(part), begin)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fill, range(0, len(BODY), 5)))
        shared.close()
        draft.commit()
        assert self.get(self.path("out")) == BODY

    def test_discard_leaves_nothing(self, store: Store) -> None:
        self.put(self.path("other"), BODY)
        before = self.traces()
        draft = store.draft(self.path("out"), 10)
        write(store, draft.address, b"x", 0)
        draft.discard()
        assert self.traces() == before
        with pytest.raises(StorageError):
            store.writer(draft.address)

    def test_discard_leaves_the_file_that_was_there(self, store: Store) -> None:
        self.put(self.path("out"), b"old")
        store.draft(self.path("out"), 10).discard()
        assert self.get(self.path("out")) == b"old"

    def test_discard_is_harmless_a_second_time_and_after_commit(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 2)
        draft.commit()
        draft.discard()
        draft.discard()
        assert self.get(self.path("out")) == b"\0\0"
        draft = store.draft(self.path("more"), 2)
        draft.discard()
        draft.discard()
        assert self.get(self.path("more")) is None

    def test_commit_leaves_the_file_and_nothing_else(self, store: Store) -> None:
        store.draft(self.path("out"), 2).commit()
        assert self.traces() == [self.path("out")]

    @pytest.mark.parametrize("act", ["sync", "commit"])
    @pytest.mark.parametrize("end", ["commit", "discard"])
    def test_a_draft_that_has_ended_can_be_neither_synced_nor_committed(self, store: Store, end: str, act: str) -> None:
        draft = store.draft(self.path("out"), 2)
        getattr(draft, end)()
        before = self.traces()
        with pytest.raises(StorageError, match="committed or discarded"):
            getattr(draft, act)()
        assert self.traces() == before

    def test_a_draft_that_was_synced_is_still_a_draft(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 4)
        write(store, draft.address, b"ab", 0)
        draft.sync()
        assert self.get(self.path("out")) is None
        write(store, draft.address, b"cd", 2)
        draft.sync()
        draft.commit()
        assert self.get(self.path("out")) == b"abcd"

    def test_what_was_written_to_a_draft_can_be_read_back_at_its_address(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 4)
        reader = store.reader(draft.address)
        write(store, draft.address, b"ab", 1)
        assert read(reader, 0, 4) == b"\0ab\0"
        reader.close()
        draft.discard()

    def test_a_path_can_be_drafted_again_after_commit_or_discard(self, store: Store) -> None:
        store.draft(self.path("out"), 2).commit()
        store.draft(self.path("out"), 3).discard()
        store.draft(self.path("out"), 4).commit()
        assert self.get(self.path("out")) == bytes(4)

    def test_drafts_of_different_paths_do_not_touch(self, store: Store) -> None:
        drafts = [store.draft(self.path(name), 1) for name in "abc"]
        for draft, byte in zip(drafts, (b"1", b"2", b"3"), strict=True):
            write(store, draft.address, byte, 0)
        drafts[1].discard()
        drafts[2].commit()
        drafts[0].commit()
        assert [self.get(self.path(name)) for name in "abc"] == [b"1", None, b"3"]

    # what is left for a later run

    def test_of_what_nothing_was_noted_nothing_is_left(self, store: Store) -> None:
        assert store.left(self.path("out")) is None
        store.draft(self.path("out"), 4).keep()
        assert store.left(self.path("out")) is None

    def test_what_was_noted_and_written_is_left_and_can_be_gone_on_with(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 4)
        draft.notes.append(b"some")
        draft.notes.append(b"thing")
        write(store, draft.address, b"ab", 1)
        assert store.left(self.path("out")) == (b"something", 4, True)
        draft.keep()
        assert store.left(self.path("out")) == (b"something", 4, False)
        again = store.reopen(self.path("out"), 4)
        assert (again.address, again.named, again.notes.read()) == (draft.address, False, b"something")
        assert read(store.reader(again.address), 0, 4) == b"\0ab\0"
        write(store, again.address, b"cd", 2)
        again.commit()
        assert self.get(self.path("out")) == b"\0acd"

    @pytest.mark.parametrize("size", [0, 2, 4, 9])
    def test_a_draft_of_another_size_gets_the_right_one(self, store: Store, size: int) -> None:
        draft = store.draft(self.path("out"), 4)
        draft.notes.append(b"x")
        write(store, draft.address, b"abcd", 0)
        draft.keep()
        again = store.reopen(self.path("out"), size)
        assert read(store.reader(again.address), 0, size) == b"abcd\0\0\0\0\0"[:size]
        again.discard()

    def test_what_is_reopened_is_held(self, store: Store) -> None:
        store.draft(self.path("out"), 4).keep()
        held = store.reopen(self.path("out"), 4)
        for again in (store.reopen, store.draft):
            with pytest.raises(StorageError, match="another run"):
                again(self.path("out"), 4)
        held.discard()

    def test_where_nothing_is_left_a_draft_is_begun(self, store: Store) -> None:
        draft = store.reopen(self.path("out"), 3)
        assert (draft.named, draft.notes.read()) == (False, b"")
        assert read(store.reader(draft.address), 0, 3) == bytes(3)
        draft.discard()

    def test_a_new_draft_has_nothing_of_what_was_left(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 4)
        draft.notes.append(b"x")
        write(store, draft.address, b"abcd", 0)
        stray = store.writer(draft.address)  # of a worker that has not noticed that its run has ended
        draft.keep()
        new = store.draft(self.path("out"), 4)
        stray.write(memoryview(b"stray"[:4]), 0)
        stray.close()
        assert store.left(self.path("out")) is None
        assert read(store.reader(new.address), 0, 4) == bytes(4)
        new.discard()

    def test_discarding_removes_the_notes_too(self, store: Store) -> None:
        before = self.traces()
        draft = store.draft(self.path("out"), 4)
        draft.notes.append(b"x")
        draft.notes.rewrite(b"y")
        draft.discard()
        assert self.traces() == before
        assert store.left(self.path("out")) is None

    def test_notes_stay_when_a_draft_gets_its_name_until_they_are_removed(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 2)
        draft.notes.append(b"x")
        draft.commit()
        draft.discard()
        draft.keep()
        assert store.left(self.path("out")) == (b"x", None, False)
        named = store.reopen(self.path("out"), 2)
        assert (named.address, named.named, named.notes.read()) == (self.path("out"), True, b"x")
        named.sync()
        named.commit()
        named.keep()
        named.discard()
        assert self.get(self.path("out")) == bytes(2)
        draft.notes.remove()
        draft.notes.remove()
        assert store.left(self.path("out")) is None
        assert self.traces() == [self.path("out")]

    def test_notes_that_are_rewritten_can_be_added_to(self, store: Store) -> None:
        draft = store.draft(self.path("out"), 2)
        draft.notes.append(b"one")
        draft.notes.rewrite(b"two")
        draft.notes.append(b"three")
        draft.notes.sync()
        assert draft.notes.read() == b"twothree"
        draft.discard()

    # distribution

    def test_a_store_that_was_pickled_finds_the_same_bytes(self, store: Store) -> None:
        self.put(self.path("a"), BODY)
        draft = store.draft(self.path("out"), 3)
        copy: Store = pickle.loads(pickle.dumps(store))
        assert copy.stat(self.path("a")) == store.stat(self.path("a"))
        assert read(copy.reader(self.path("a")), 1, 3) == BODY[1:4]
        write(copy, draft.address, b"far", 0)
        draft.commit()
        assert self.get(self.path("out")) == b"far"
