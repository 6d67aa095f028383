from __future__ import annotations

import hashlib
import random
import threading
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from mergeflow.errors import StorageError
from mergeflow.execute import digest as digests
from mergeflow.execute.coverage import Coverage
from mergeflow.execute.digest import TrailingDigest
from mergeflow.storage.local import LocalStore
from mergeflow.tensors import Span
from tests.conformance.store import write
from tests.execute.test_coverage import HEAD, outputs
from tests.fakes import CountingReader, CountingStore, merged, overlaps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


SIZES = (1000, 0, 37)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "STEP", 64)


@pytest.fixture
def store() -> Iterator[CountingStore]:
    yield CountingStore(LocalStore())
    assert "digest" not in {thread.name for thread in threading.enumerate()}, "its thread outlives it"


CONTENTS = [random.Random(size).randbytes(HEAD + size) for size in SIZES]


@pytest.fixture
def drafts(store: CountingStore, tmp_path: Path) -> Iterator[list[str]]:
    """Where three drafts are; nothing but zeros is there yet."""
    opened = [store.draft(str(tmp_path / str(index)), len(data)) for index, data in enumerate(CONTENTS)]
    yield [draft.address for draft in opened]
    for draft in opened:
        draft.discard()


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("seed", range(5))
def test_the_digest_is_that_of_the_tensors_however_they_come(
    store: CountingStore, drafts: list[str], seed: int
) -> None:
    coverage = Coverage(outputs(*SIZES))
    digest = TrailingDigest(store, drafts, outputs(*SIZES), coverage)
    spans = [
        Span(index, begin, min(begin + 90, len(data)))
        for index, data in enumerate(CONTENTS)
        for begin in range(HEAD, len(data), 90)
    ]
    random.Random(seed).shuffle(spans)
    for span in spans:
        write(store, drafts[span.output], CONTENTS[span.output][span.begin : span.end], span.begin)
        coverage.add([span])
        digest.advance()
    assert digest.result() == [hashlib.sha256(data[HEAD:]).hexdigest() for data in CONTENTS]
    digest.stop()
    for draft, size in zip(drafts, SIZES, strict=True):
        assert merged(store.reads(draft)) == ([(HEAD, HEAD + size)] if size else [])
        assert overlaps(store.reads(draft)) == []


@pytest.mark.usefixtures("small_steps")
def test_it_never_reads_what_is_not_complete(store: CountingStore, drafts: list[str]) -> None:
    coverage = Coverage(outputs(*SIZES))
    digest = TrailingDigest(store, drafts, outputs(*SIZES), coverage)
    coverage.add([Span(0, HEAD + 500, HEAD + 1000)])
    for _ in range(100):
        digest.advance()
    digest.stop()
    assert store.paths_read() == []


def test_it_stops_when_it_is_told_to(store: CountingStore, drafts: list[str]) -> None:
    digest = TrailingDigest(store, drafts, outputs(*SIZES), Coverage(outputs(*SIZES)))
    digest.stop()
    digest.stop()


@pytest.mark.parametrize("error", [StorageError("the disk is gone"), RuntimeError("the unexpected")], ids=str)
def test_what_reading_back_meets_is_raised_with_the_result(
    store: CountingStore, drafts: list[str], error: Exception
) -> None:
    class Broken(CountingReader):
        def read_into(self, view: memoryview, offset: int) -> None:
            raise error

    class Store(CountingStore):
        def reader(self, path: str) -> CountingReader:
            return Broken(self, path, super().reader(path))

    coverage = Coverage(outputs(*SIZES))
    digest = TrailingDigest(Store(store), drafts, outputs(*SIZES), coverage)
    coverage.add([Span(0, HEAD, HEAD + SIZES[0])])
    with pytest.raises(type(error), match=str(error)):
        digest.result()


def test_a_draft_that_was_given_up_is_followed_no_further(store: CountingStore, tmp_path: Path) -> None:
    opened = [store.draft(str(tmp_path / str(index)), len(data)) for index, data in enumerate(CONTENTS)]
    coverage = Coverage(outputs(*SIZES))
    digest = TrailingDigest(store, [draft.address for draft in opened], outputs(*SIZES), coverage)
    digest.abandon(0)
    opened[0].discard()
    write(store, opened[2].address, CONTENTS[2][HEAD:], HEAD)
    coverage.add([Span(2, HEAD, HEAD + SIZES[2])])
    assert digest.result()[1:] == [hashlib.sha256(data[HEAD:]).hexdigest() for data in CONTENTS[1:]]
    for draft in opened:
        draft.discard()


# --- what an earlier run has written --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("room", [0, 60, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_what_an_earlier_run_has_written_is_waited_for_by_nobody_who_keeps_it_from_being_read(
    store: CountingStore, drafts: list[str], seed: int, room: int
) -> None:
    """Shards have holes: who comes behind one waits, while the receipt that would tell of the hole is not made yet."""
    chance = random.Random(seed)
    data, wanted = CONTENTS[0], outputs(*SIZES)
    write(store, drafts[2], CONTENTS[2][HEAD:], HEAD)
    cuts = [HEAD, *sorted(chance.sample(range(HEAD + 1, len(data)), 40)), len(data)]
    spans = [Span(0, begin, end) for begin, end in pairwise(cuts)]
    there = {span for span in spans if chance.random() < 0.4}
    for span in there:
        write(store, drafts[0], data[span.begin : span.end], span.begin)
    coverage, lock, end = Coverage(wanted), threading.Lock(), threading.Event()
    resumed = [*there, Span(2, HEAD, len(CONTENTS[2]))]
    coverage.add(resumed)
    digest = TrailingDigest(store, drafts, wanted, coverage, room=room, resumed=resumed)
    shards = iter([[span for span in spans[at : at + 6] if span not in there] for at in range(0, len(spans), 6)])

    def work() -> None:
        while (shard := next_of(shards)) is not None:
            for span in shard:
                view = memoryview(bytearray(data[span.begin : span.end]))
                write(store, drafts[0], bytes(view), span.begin)
                digest.saw(0, span.begin, view, end.is_set)
            with lock:
                coverage.add(shard)
                digest.advance()

    def next_of(shards: Iterator[list[Span]]) -> list[Span] | None:
        with lock:
            return next(shards, None)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    waiting = [thread for thread in threads if thread.is_alive()]
    end.set()
    if waiting:
        digest.stop()
    assert waiting == []
    coverage.check()
    assert digest.result() == [hashlib.sha256(data[HEAD:]).hexdigest() for data in CONTENTS]
    assert merged(store.reads(drafts[0])) == merged((span.begin, span.end) for span in there), "and of the rest nothing"


def test_nobody_waits_for_what_an_earlier_run_has_written_and_cannot_be_read(
    store: CountingStore, drafts: list[str]
) -> None:
    class Broken(CountingReader):
        def read_into(self, view: memoryview, offset: int) -> None:
            raise StorageError("the disk is gone")

    class Store(CountingStore):
        def reader(self, path: str) -> CountingReader:
            return Broken(self, path, super().reader(path))

    end = threading.Event()
    coverage, hole = Coverage(outputs(*SIZES)), Span(0, HEAD, HEAD + 100)
    coverage.add([hole])
    digest = TrailingDigest(Store(store), drafts, outputs(*SIZES), coverage, resumed=[hole])
    view = memoryview(bytearray(10))
    waiting = threading.Thread(target=digest.saw, args=(0, HEAD + 100, view, end.is_set))
    waiting.start()
    waiting.join(30)
    returned = not waiting.is_alive()
    end.set()
    assert returned
    with pytest.raises(StorageError, match="the disk is gone"):
        digest.result()
