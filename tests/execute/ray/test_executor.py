"""The contract of executors, kept by two actors. That one actor makes the same files is shown in test_parity.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mergeflow.errors import ExecutorError
from mergeflow.execute.ray import RayExecutor, RayOptions
from tests.conformance.executor import TENSORS, ExecutorConformance, SlowStore

if TYPE_CHECKING:
    from mergeflow.recipe.request import Budget

PROJECT = Path(__file__).parents[3]


@pytest.mark.usefixtures("ray")
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

    def test_a_shard_whose_actor_dies_every_time_is_named_after_the_third(self, models: Path) -> None:
        deadly = SlowStore(models / "notes", deadly=str(models / "whole" / "3.safetensors"))
        with pytest.raises(ExecutorError) as caught:
            list(self.receipts(self.job(models, "whole", deadly), range(TENSORS)))
        told = str(caught.value)
        assert re.match(r"shard \d+ \(tensors k\d\d\) was begun 3 times, and each time its actor was lost: ", told)
        assert len(re.findall(r"the actor on .*?, process \d+: its process ended without a word", told)) == 3
        assert "lower executor.memory or executor.workers" in told
        assert "\n" not in told


NOBODY_THERE = """
from mergeflow.execute.ray import RayExecutor, RayOptions
from tests.models import SMALLEST
next(RayExecutor(SMALLEST, RayOptions("127.0.0.1:1")).map(None, [0]))
"""


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOBODY_THERE], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=30
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mergeflow.errors.ExecutorError: cannot reach the Ray cluster at 127.0.0.1:1: Connection")
    assert "executor.address=local" in last
