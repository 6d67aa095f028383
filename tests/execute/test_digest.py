from __future__ import annotations

import hashlib
import random
import threading
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
