"""What every `Executor` must keep: subclass `ExecutorConformance`, say which executor, and run it.

The stores that are used here go into other processes, so they are files, and what they tell is a file too.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from abc import ABC, abstractmethod
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from mergeflow.errors import StorageError, UnmergeableValues
from mergeflow.execute.coverage import Coverage
from mergeflow.execute.shard import Job, OpenFiles, ShardWorker
from mergeflow.merge import open_plan
from mergeflow.recipe.request import Budget
from mergeflow.storage.files import LocalFile
from mergeflow.storage.local import LocalDraft, LocalStore
from tests.models import request, write_models

if TYPE_CHECKING:
    from collections.abc import Generator

    from mergeflow.interfaces import Draft, Executor, Left, Receipt
    from mergeflow.plan.plan import Plan
    from mergeflow.tensors import FileStat

TENSORS, ELEMENTS = 40, 300
WRITE_SECONDS = 0.03
"""How long a write takes where it matters who is still writing."""


class Note(NamedTuple):
    """One write that was done."""

    moment: float
    """By the clock that all processes of a machine share."""
    process: int


@dataclass(frozen=True)
class SlowStore:
    """Local files that are written slowly and with a note of when; one of them may not be readable, or kill."""

    notes: Path
    unreadable: str = ""
    deadly: str = ""
    host: int = dataclasses.field(default_factory=os.getpid)
    """The process of the test, which is spared."""

    def stat(self, path: str) -> FileStat:
        """As on disk."""
        return LocalStore().stat(path)

    def reader(self, path: str) -> LocalFile:
        """A file, unless it is the one that is not readable; the deadly one ends the process that opens it."""
        if path == self.deadly and os.getpid() != self.host:
            os.kill(os.getpid(), signal.SIGKILL)
        if path == self.unreadable:
            raise StorageError(f"{path} may not be accessed; check its permissions")
        return LocalFile(path, os.O_RDONLY)

    def draft(self, path: str, size: int) -> LocalDraft:
        """As on disk."""
        return LocalStore().draft(path, size)

    def left(self, path: str) -> Left | None:
        """As on disk."""
        return LocalStore().left(path)

    def reopen(self, path: str, size: int) -> Draft:
        """As on disk."""
        return LocalStore().reopen(path, size)

    def writer(self, address: str) -> SlowFile:
        """A draft whose writes are noted."""
        return SlowFile(address, self.notes)

    def noted(self) -> list[Note]:
        """Every write so far, in the order in which they ended."""
        with suppress(FileNotFoundError):
            lines = [line.split() for line in self.notes.read_text().splitlines()]
            return sorted(Note(float(moment), int(process)) for moment, process in lines)
        return []


class SlowFile(LocalFile):
    """A draft that takes its time."""

    def __init__(self, path: str, notes: Path) -> None:
        super().__init__(path, os.O_WRONLY)
        self._notes = notes

    def write(self, view: memoryview, offset: int) -> None:
        """Wait, write, and note it in one piece, as appending to a file is."""
        time.sleep(WRITE_SECONDS)
        super().write(view, offset)
        with self._notes.open("a") as file:
            file.write(f"{time.monotonic()!r} {os.getpid()}\n")


class ExecutorConformance(ABC):
    """The contract of `Executor`."""

    budget = Budget(workers=2, reads_in_flight=2, memory=1 << 28)

    @abstractmethod
    def make(self, budget: Budget) -> Executor:
        """The executor under test, new."""

    @pytest.fixture
    def models(self, tmp_path: Path) -> Path:
        """Three models of many small tensors; in the second of them, `broken` is not a number."""
        generator = torch.Generator().manual_seed(0)
        models = {
            id: {f"k{index:02}": torch.randn(ELEMENTS, generator=generator).half() for index in range(TENSORS)}
            for id in ("1", "2", "3")
        }
        write_models(tmp_path / "whole", models)
        models["2"]["k20"][7] = torch.nan
        return write_models(tmp_path / "broken", models).parent

    def job(self, models: Path, name: str, store: SlowStore) -> Job:
        """A job of as many shards as tensors, with its draft open."""
        plan = open_plan(request(models / name, models / "out", budget=self.budget))
        assert not plan.problems
        plan = dataclasses.replace(plan, shards=tuple((tile,) for shard in plan.shards for tile in shard))
        draft = store.draft(plan.outputs[0].path, plan.outputs[0].layout.size)
        return Job(plan, store, (draft.address,))

    def receipts(self, job: Job, shards: range | list[int]) -> Generator[Receipt, None, None]:
        return self.make(self.budget).map(job, shards)

    def test_every_shard_is_done_once_and_every_byte_is_what_one_worker_alone_would_write(self, models: Path) -> None:
        store = SlowStore(models / "notes")
        job = self.job(models, "whole", store)
        receipts = list(self.receipts(job, range(TENSORS)))
        assert sorted(receipt.shard for receipt in receipts) == list(range(TENSORS))
        covered = Coverage(job.plan.outputs)
        for receipt in receipts:
            covered.add(receipt.spans)
        covered.check()
        assert sum(receipt.bytes_read for receipt in receipts) == job.plan.bytes_read
        assert all(receipt.peak_rss > 0 for receipt in receipts)
        assert len(store.noted()) == TENSORS
        assert {receipt.worker.rpartition(":")[2] for receipt in receipts} == {
            str(note.process) for note in store.noted()
        }
        assert Path(job.drafts[0]).read_bytes() == written_by_one(job.plan, models / "alone")

    def test_only_the_shards_that_are_asked_for_are_done(self, models: Path) -> None:
        store = SlowStore(models / "notes")
        job = self.job(models, "whole", store)
        receipts = list(self.receipts(job, [30, 2, 17]))
        assert sorted(receipt.shard for receipt in receipts) == [2, 17, 30]
        assert len(store.noted()) == 3

    def test_the_first_error_ends_it_and_nobody_writes_any_more(self, models: Path) -> None:
        store = SlowStore(models / "notes")
        job = self.job(models, "broken", store)
        with pytest.raises(UnmergeableValues, match=r"'k20': model 2 has 1 NaN value\(s\) from element 7 on") as caught:
            list(self.receipts(job, range(TENSORS)))
        assert type(caught.value) is UnmergeableValues
        self.check_that_writing_has_ended(store)

    def test_closing_it_early_ends_it_and_nobody_writes_any_more(self, models: Path) -> None:
        store = SlowStore(models / "notes")
        with closing(self.receipts(self.job(models, "whole", store), range(TENSORS))) as receipts:
            next(receipts)
        self.check_that_writing_has_ended(store)

    def check_that_writing_has_ended(self, store: SlowStore) -> None:
        """No write ended after now, and not all were done."""
        now = time.monotonic()
        time.sleep(10 * WRITE_SECONDS)
        notes = store.noted()
        assert notes
        assert len(notes) < TENSORS
        assert notes[-1].moment < now

    def test_what_storage_refuses_arrives_as_it_was_raised(self, models: Path) -> None:
        source = str(models / "whole" / "3.safetensors")
        job = self.job(models, "whole", SlowStore(models / "notes", unreadable=source))
        with pytest.raises(StorageError) as caught:
            list(self.receipts(job, range(TENSORS)))
        assert type(caught.value) is StorageError
        assert str(caught.value) == f"{source} may not be accessed; check its permissions"


def written_by_one(plan: Plan, directory: Path) -> bytes:
    """The draft that one worker in this thread writes, shard by shard."""
    output = plan.outputs[0]
    store = LocalStore()
    draft = store.draft(str(directory / "draft"), output.layout.size)
    job = Job(plan, store, (draft.address,))
    files = OpenFiles(job)
    worker = ShardWorker(job, files)
    for shard in range(len(plan.shards)):
        worker.run(shard)
    files.close()
    return Path(draft.address).read_bytes()
