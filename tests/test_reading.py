"""What reading and writing cost, counted rather than timed, and that no way of reading changes a byte."""

from __future__ import annotations

import os
import sys
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeflow.execute.local import LocalExecutor
from mergeflow.execute.shard import Job, OpenFiles, ShardWorker
from mergeflow.merge import open_plan, run, store_of
from mergeflow.recipe.request import Budget
from tests.fakes import CountingStore
from tests.models import request, write_models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mergeflow.interfaces import Io

MIB = 1 << 20
MODELS, LARGE, SMALL = 4, 3 << 20, 1280
"""How many models, and the elements of their tensors in fp16: two of 6 MiB and twenty of 2.5 kB."""
TENSORS = 22
BUDGET = Budget(workers=1, reads_in_flight=2, memory=256 * MIB)
TILES = 2 * 2 + 20
"""A large tensor takes two reads of up to 4 MiB."""
CALLS_PER_TILE = 170
"""Calls of Python functions and of C functions from Python; 150 now, without the arithmetic."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(1)
    shapes = {f"large{n}": LARGE for n in range(2)} | {f"small{n:02}": SMALL for n in range(20)}
    return write_models(
        tmp_path_factory.mktemp("models"),
        {
            f"{id}": {key: torch.randn(count, generator=generator).half() for key, count in shapes.items()}
            for id in range(MODELS)
        },
        {"note": "so that no tensor begins at a multiple of eight bytes of anything"},
    )


@pytest.fixture(scope="module")
def expected(models: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("expected")
    run(open_plan(request(models, out, budget=BUDGET)), LocalExecutor(BUDGET))
    return (out / "merged.safetensors").read_bytes()


@pytest.mark.parametrize("cached", [True, False], ids=["in-the-page-cache", "on-the-disk"])
@pytest.mark.parametrize("io", ["auto", "buffered"])
@pytest.mark.parametrize("block", [64 << 10, 1 << 20, 16 << 20], ids=["64KiB", "1MiB", "16MiB"])
def test_however_it_is_read_the_file_is_the_same(
    models: Path, expected: bytes, tmp_path: Path, io: Io, block: int, cached: bool
) -> None:
    for path in models.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached:
                file.read()
    budget = replace(BUDGET, io=io, block=block)
    plan = open_plan(request(models, tmp_path, budget=budget))
    run(plan, LocalExecutor(budget), store_of(plan))
    assert (tmp_path / "merged.safetensors").read_bytes() == expected


def test_each_byte_is_read_and_written_once_in_as_few_calls_as_there_are_rows(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = replace(BUDGET, io="auto")
    plan = open_plan(request(models, tmp_path, budget=budget))
    assert plan.tiles == TILES
    store = CountingStore(store_of(plan))
    calls: Counter[str] = Counter()
    for name in ("preadv", "pwrite"):
        monkeypatch.setattr(os, name, counted(getattr(os, name), calls))
    run(plan, LocalExecutor(budget), store)
    sources = [checkpoint.path for checkpoint in plan.checkpoints]
    reads = [extent for path in sources for extent in store.reads(path)]
    assert len(reads) == TILES * MODELS
    assert sum(end - begin for begin, end in reads) == plan.bytes_read
    assert calls["pwrite"] == TILES + 1, "a row of results for each tile, and the head"
    digest = -(-plan.bytes_written // MIB) + TILES  # a step ends where the output is complete so far
    assert TILES * MODELS <= calls["preadv"] <= TILES * MODELS + digest


def counted(call: Any, calls: Counter[str]) -> Any:
    lock = threading.Lock()

    def counting(*arguments: Any) -> Any:
        with lock:
            calls[call.__name__] += 1
        return call(*arguments)

    return counting


@pytest.fixture
def worker(models: Path, tmp_path: Path) -> Iterator[ShardWorker]:
    """A worker that has done all of its shards once."""
    budget = replace(BUDGET, io="auto")
    plan = open_plan(request(models, tmp_path, budget=budget))
    store = store_of(plan)
    draft = store.draft(plan.outputs[0].path, plan.outputs[0].layout.size)
    job = Job(plan, store, (draft.address,))
    files = OpenFiles(job)
    made = ShardWorker(job, files)
    teams = torch.get_num_threads()
    torch.set_num_threads(1)
    everything(made)
    yield made
    torch.set_num_threads(teams)
    files.close()
    draft.discard()


def everything(worker: ShardWorker) -> None:
    for shard in range(len(worker._plan.shards)):
        worker.run(shard)


def test_a_tile_takes_few_calls_beside_its_arithmetic(worker: ShardWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker._arithmetic, "merge", lambda *_: None)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        everything(worker)
    finally:
        sys.setprofile(None)
    assert calls / TILES < CALLS_PER_TILE


def test_nothing_as_large_as_a_row_is_allocated_once_a_worker_is_warm(worker: ShardWorker) -> None:
    tracemalloc.start()
    try:
        everything(worker)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        everything(worker)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 16 << 10


def test_torch_allocates_nothing_of_the_size_of_a_row_but_in_arithmetic(
    worker: ShardWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker._arithmetic, "merge", lambda *_: None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        everything(worker)
    assert sum(event.cpu_memory_usage for event in profile.events() or [] if event.cpu_memory_usage > 0) < 64 << 10
