"""Runs in which reads fail: what passes costs nothing but a pause, what stays is told, and no fault makes a wrong file.

Faults that the system itself makes are in `tests/storage/test_real_faults.py`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.errors import MergeflowError, ReadFailed, SourceChanged, StorageError
from mergeflow.execute import patience
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import Result, open_plan, run, run_together
from mergeflow.plan.fuse import fuse
from mergeflow.recipe.request import Budget
from mergeflow.report.manifest import manifest
from mergeflow.storage.local import LocalStore
from tests.fakes import FaultyStore
from tests.models import request, write_models

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.plan.plan import Plan
    from mergeflow.tensors import FileStat

ELEMENTS = 400_000
BUDGET = Budget(workers=2, reads_in_flight=2, memory=1 << 28)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    return write_models(
        tmp_path / "models",
        {id: {key: torch.randn(ELEMENTS, generator=generator).half() for key in "xyz"} for id in ("1", "2", "3")},
    )


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.01, 0.01, 0.01))


def plan_of(models: Path, out: Path, listed: str = "all") -> Plan:
    plan = open_plan(request(models, out, budget=BUDGET, selections={"all": listed}))
    assert plan.problems == ()
    return plan


def faulty(models: Path, times: int, error: StorageError | None = None) -> FaultyStore:
    path = str(models / "2.safetensors")
    return FaultyStore(LocalStore(), path, error or ReadFailed(f"{path} cannot be read"), times)


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.usefixtures("impatient")
def test_reads_that_fail_and_then_succeed_make_the_same_file_and_are_told_of(
    models: Path, tmp_path: Path, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    run(plan_of(models, tmp_path / "expected"), LocalExecutor(BUDGET))
    store = faulty(models, times)
    with caplog.at_level(logging.WARNING):
        result = run(plan_of(models, tmp_path / "out"), LocalExecutor(BUDGET), store)
    expected = tmp_path / "expected" / "merged.safetensors"
    assert (tmp_path / "out" / "merged.safetensors").read_bytes() == expected.read_bytes()
    (told,) = manifest(result, "local")["repeated_reads"]
    assert told["model"] == "2"
    assert 1 <= told["reads"] <= times
    (warning,) = [record.getMessage() for record in caplog.records if "failed and succeeded" in record.getMessage()]
    assert warning.startswith("model 2: ")


@pytest.mark.usefixtures("impatient")
def test_a_run_without_a_fault_repeats_nothing(models: Path, tmp_path: Path) -> None:
    result = run(plan_of(models, tmp_path / "out"), LocalExecutor(BUDGET))
    assert manifest(result, "local")["repeated_reads"] == []


@pytest.mark.usefixtures("impatient")
def test_a_read_that_goes_on_failing_ends_the_run_and_names_the_file(models: Path, tmp_path: Path) -> None:
    store = faulty(models, 10**9)
    with pytest.raises(ReadFailed, match=r"2\.safetensors cannot be read") as caught:
        run(plan_of(models, tmp_path / "out"), LocalExecutor(BUDGET), store)
    assert caught.value.resumable
    assert not (tmp_path / "out" / "merged.safetensors").exists()


@pytest.mark.usefixtures("impatient")
def test_a_file_is_opened_anew_only_if_reading_it_once_more_does_not_help(models: Path, tmp_path: Path) -> None:
    store = faulty(models, 1)
    run(plan_of(models, tmp_path / "once"), LocalExecutor(BUDGET), store)
    assert store.opened == 1
    one = Budget(workers=1, reads_in_flight=1, memory=1 << 28)
    store = faulty(models, 3)
    run(plan_of(models, tmp_path / "often"), LocalExecutor(one), store)
    assert store.opened == 3


@pytest.mark.usefixtures("impatient")
def test_a_file_that_is_opened_anew_must_be_the_one_that_was_planned_with(models: Path, tmp_path: Path) -> None:
    class Replaced(FaultyStore):
        def stat(self, path: str) -> FileStat:
            found = super().stat(path)
            return found._replace(inode=found.inode + 1) if path == self._path and self._left < 10**9 else found

    path = str(models / "2.safetensors")
    store = Replaced(LocalStore(), path, ReadFailed(f"{path} is stale"), 10**9)
    with pytest.raises(SourceChanged, match=r"model 2: .* changed .* another file has its name"):
        run(plan_of(models, tmp_path / "out"), LocalExecutor(BUDGET), store)


def test_what_cannot_pass_is_told_at_once(models: Path, tmp_path: Path) -> None:
    store = faulty(models, 10**9, StorageError("may not be accessed"))
    began = time.monotonic()
    with pytest.raises(StorageError, match="may not be accessed"):
        run(plan_of(models, tmp_path / "out"), LocalExecutor(BUDGET), store)
    assert time.monotonic() - began < sum(patience.PAUSES) / 2


@pytest.mark.usefixtures("impatient")
def test_a_source_that_fails_for_good_fails_only_the_jobs_that_need_it(models: Path, tmp_path: Path) -> None:
    one = Budget(workers=1, reads_in_flight=1, memory=1 << 28)
    store = faulty(models, 10**9)
    plans = [plan_of(models, tmp_path / "out" / listed, listed) for listed in ("1,2", "1,3")]
    failed, good = run_together(fuse(plans), LocalExecutor(one), store)
    assert isinstance(failed, ReadFailed)
    assert isinstance(good, Result)
    assert store.opened == len(patience.PAUSES), "no other row is waited for"


@pytest.mark.usefixtures("impatient")
def test_a_pass_ends_when_no_job_is_left(models: Path, tmp_path: Path) -> None:
    plans = [plan_of(models, tmp_path / "out" / listed, listed) for listed in ("1,2", "2,3")]
    done: list[int] = []
    results = run_together(fuse(plans), LocalExecutor(BUDGET), faulty(models, 10**9), done.append)
    assert all(isinstance(one, MergeflowError) for one in results)
    assert len(done) < len(fuse(plans).plan.shards)


def test_ctrl_c_is_heard_while_a_read_waits_to_be_repeated(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread is in a pause of minutes when the interruption comes."""
    monkeypatch.setattr(patience, "PAUSES", (600.0,))
    store = faulty(models, 10**9)
    plan = plan_of(models, tmp_path / "out")
    pressed: list[float] = []
    slept = threading.Event()
    sleep = time.sleep

    def sleeping(seconds: float) -> None:
        slept.set()
        sleep(seconds)

    def press() -> None:
        slept.wait(30)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(time, "sleep", sleeping)
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(plan, LocalExecutor(BUDGET), store)
    assert time.monotonic() - pressed[0] < 3
    thread.join()
    assert list((tmp_path / "out").iterdir()) == []
