from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.execute.local import LocalExecutor
from mergeflow.recipe.request import Budget
from tests.conformance.executor import TENSORS, ExecutorConformance, SlowStore

if TYPE_CHECKING:
    from pathlib import Path


class TestOneThread(ExecutorConformance):
    budget = Budget(workers=1, reads_in_flight=1, memory=1 << 28)

    def make(self, budget: Budget) -> LocalExecutor:
        return LocalExecutor(budget)

    def test_nothing_is_done_when_there_are_no_shards(self, models: Path) -> None:
        store = SlowStore(models / "notes")
        assert list(self.receipts(self.job(models, "whole", store), [])) == []
        assert store.noted() == []

    @pytest.mark.parametrize("name", ["whole", "broken"])
    def test_threads_and_files_are_given_back_however_it_ends(self, models: Path, name: str) -> None:
        job = self.job(models, name, SlowStore(models / "notes"))
        before = (open_files(), threading.active_count(), torch.get_num_threads())
        receipts = self.receipts(job, range(TENSORS))
        next(receipts)
        assert open_files() > before[0]
        with pytest.raises(Exception, match=r"k20") if name == "broken" else pytest.MonkeyPatch.context():
            list(receipts)
        assert (open_files(), threading.active_count(), torch.get_num_threads()) == before


class TestManyThreads(TestOneThread):
    budget = Budget(workers=2, reads_in_flight=4, memory=1 << 28)

    def test_all_threads_work(self, models: Path) -> None:
        names: set[str] = set()
        together = threading.Barrier(8)

        class Meeting(SlowStore):
            def writer(self, address: str) -> MeetingFile:  # type: ignore[override]
                return MeetingFile(address, names, together)

        list(self.receipts(self.job(models, "whole", Meeting(models / "notes")), range(TENSORS)))
        assert len(names) == 8


class MeetingFile:
    """A draft to which threads may write only when all of them do."""

    def __init__(self, address: str, names: set[str], together: threading.Barrier) -> None:
        self._names, self._together = names, together

    def write(self, view: memoryview, offset: int) -> None:
        self._together.wait(timeout=30)
        self._names.add(threading.current_thread().name)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (its entries are no paths)
