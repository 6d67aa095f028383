from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from mergeflow.errors import ExecutorError
from mergeflow.execute.ray import RayExecutor, RayOptions
from mergeflow.recipe.request import Budget
from tests.conformance.executor import TENSORS, ExecutorConformance, SlowStore

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("ray")


class TestOneActor(ExecutorConformance):
    budget = Budget(workers=1, reads_in_flight=1, memory=1 << 28)

    def make(self, budget: Budget) -> RayExecutor:
        return RayExecutor(budget, RayOptions())


class TestTwoActors(ExecutorConformance):
    def make(self, budget: Budget) -> RayExecutor:
        return RayExecutor(budget, RayOptions())

    def test_actors_are_processes_of_their_own_and_both_work(self, models: Path) -> None:
        store = SlowStore(models / "notes")
        executor = self.make(self.budget)
        list(executor.map(self.job(models, "whole", store), range(TENSORS)))
        workers = {note.process for note in store.noted()}
        assert len(workers) == 2
        assert os.getpid() not in workers
        assert executor.startup_seconds > 0

    def test_a_worker_that_dies_is_told_in_a_sentence(self, models: Path) -> None:
        deadly = SlowStore(models / "notes", deadly=str(models / "whole" / "3.safetensors"))
        with pytest.raises(ExecutorError, match=r"a worker process died .*lower executor.memory") as caught:
            list(self.receipts(self.job(models, "whole", deadly), range(TENSORS)))
        assert "\n" not in str(caught.value)
