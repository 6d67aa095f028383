"""What happens to a run when its actors and nodes do not stay what they were, on a cluster of this machine."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import time
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeflow.errors import ExecutorError, MergeflowError
from mergeflow.execute.coverage import Coverage
from mergeflow.execute.ray import RayExecutor, RayOptions, places
from mergeflow.execute.shard import Job
from mergeflow.merge import open_plan
from mergeflow.recipe.request import Budget
from tests.conformance.executor import written_by_one
from tests.execute.ray.gated import BLIND, GatedStore
from tests.models import request, write_models

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from ray.cluster_utils import Cluster

    from mergeflow.interfaces import Receipt

TENSORS, ELEMENTS = 40, 300
TWO = Budget(workers=2, reads_in_flight=2, memory=1 << 28)
KILLS = 2
"""In one run: a shard that meets three is given up, as it should."""
FAR = RayOptions(resources={"far": 1}, patience=8)
"""Only on nodes that a test has added."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    return write_models(
        tmp_path_factory.mktemp("models"),
        {
            id: {f"k{index:02}": torch.randn(ELEMENTS, generator=generator).half() for index in range(TENSORS)}
            for id in ("1", "2", "3")
        },
    )


@pytest.fixture
def add(ray: Cluster) -> Iterator[Callable[..., Any]]:
    """Add a node that holds one actor which asks for `far`; all are taken away in the end."""
    added: list[Any] = []

    def add(**options: Any) -> Any:
        node = ray.add_node(num_cpus=1, resources={"far": 1}, object_store_memory=80 << 20, **options)
        added.append(node)
        return node

    yield add
    for node in added:
        if node in ray.worker_nodes:
            ray.remove_node(node, allow_graceful=False)


class Merge:
    """One run of the engine, a shard for each tensor, with what comes of it."""

    def __init__(self, models: Path, directory: Path, options: RayOptions = FAR, **gate: Any) -> None:
        plan = open_plan(request(models, directory / "out", budget=TWO))
        assert not plan.problems
        self.plan = dataclasses.replace(plan, shards=tuple((tile,) for shard in plan.shards for tile in shard))
        (directory / "notes").mkdir()
        self.store = GatedStore(directory / "notes", **gate)
        self._directory = directory
        output = plan.outputs[0]
        self._draft = self.store.draft(output.path, output.layout.size)
        Path(self._draft.address).write_bytes(output.layout.head + bytes(output.layout.size - len(output.layout.head)))
        self._executor = RayExecutor(TWO, options)
        self.receipts: list[Receipt] = []
        self._error: BaseException | None = None
        self._thread = Thread(target=self._collect)

    def _collect(self) -> None:
        try:
            for receipt in self.run():
                self.receipts.append(receipt)
        except MergeflowError as error:
            self._error = error

    def run(self) -> Generator[Receipt, None, None]:
        return self._executor.map(Job(self.plan.for_workers(), self.store, (self._draft.address,)), range(TENSORS))

    def start(self) -> Merge:
        """Run it beside the test."""
        self._thread.start()
        return self

    def end(self) -> Merge:
        """Let it come to its end, and raise what it raised."""
        self.store.open_gate()
        self._thread.join(120)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self

    def check(self) -> None:
        """Every shard once, and the bytes that one worker alone writes."""
        assert sorted(receipt.shard for receipt in self.receipts) == list(range(TENSORS))
        covered = Coverage(self.plan.outputs)
        for receipt in self.receipts:
            covered.add(receipt.spans)
        covered.check()
        head = self.plan.outputs[0].layout.head
        written = Path(self._draft.address).read_bytes()
        assert written[: len(head)] == head
        assert written[len(head) :] == written_by_one(self.plan, self._directory / "alone")[len(head) :]


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it should be so within {seconds:g} s"
        time.sleep(0.02)


def test_a_node_that_dies_costs_what_it_had_under_way(
    add: Callable[..., Any], ray: Cluster, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add()
    lost = add()
    merge = Merge(models, tmp_path, free=2).start()
    working = merge.store.wait_for_processes(2)
    ray.remove_node(lost, allow_graceful=False)
    wait_for(lambda: any(not alive(process) for process in working))
    merge.end().check()
    assert re.search(r"lost the actor on \S+ \(.*?\), process \d+: its node was lost; \d shard\(s\) go to", caplog.text)


def test_a_process_that_stands_still_is_killed_and_others_do_its_shards(
    add: Callable[..., Any], models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add()
    add()
    merge = Merge(models, tmp_path, free=2).start()
    still, *_ = merge.store.wait_for_processes(2)
    os.kill(still, signal.SIGSTOP)
    merge.end().check()
    assert f"process {still}: it got on with nothing for 8 s (executor.patience); " in caplog.text
    wait_for(lambda: not alive(still))


def test_a_node_that_joins_gets_an_actor(add: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    add()
    merge = Merge(models, tmp_path).start()
    merge.store.wait_for_processes(1)
    add()
    merge.store.wait_for_processes(2)
    merge.end().check()


def test_a_node_that_joins_and_sees_other_files_is_left_out_with_a_warning(
    add: Callable[..., Any], models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add()
    merge = Merge(models, tmp_path, free=2).start()
    merge.store.wait_for_processes(1)
    (tmp_path / "notes" / "other").write_bytes(bytes(100))
    add(env_vars={BLIND: "drafts"})
    wait_for(lambda: "gets no work" in caplog.text)
    merge.end().check()
    assert len({receipt.worker for receipt in merge.receipts}) == 1
    assert "is another file there; out= must be on a file system that all nodes share" in caplog.text


def test_all_that_is_wrong_with_the_nodes_is_told_before_anything_is_read(
    add: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    add(env_vars={BLIND: "sources"}, node_name="left")
    add(env_vars={BLIND: "drafts"}, node_name="right")
    merge = Merge(models, tmp_path)
    with pytest.raises(MergeflowError) as caught:
        list(merge.run())
    told = str(caught.value)
    size = (models / "1.safetensors").stat().st_size
    assert "2 problem(s):\n  - node " in told
    assert re.search(
        rf"node left \(.*?\): 3 of 3 sources: {models}/1.safetensors, .* and 1 more: has {size + 1:,} bytes, not "
        rf"{size:,}; models must be at the same path on all nodes",
        told,
    )
    assert re.search(r"node right \(.*?\): /\S+/other does not exist.* out= must be on a file system that all", told)
    head = merge.plan.outputs[0].layout.head
    assert Path(merge._draft.address).read_bytes()[: len(head)] == head


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 11))])
@pytest.mark.usefixtures("ray")
def test_actors_that_are_killed_at_any_moment_change_no_byte(seed: int, models: Path, tmp_path: Path) -> None:
    merge = Merge(models, tmp_path, RayOptions(patience=20), free=1000, seconds=0.05)
    at = random.Random(seed).sample(range(1, TENSORS - 1), KILLS)
    killed: set[str] = set()
    with closing(merge.run()) as receipts:
        for receipt in receipts:
            merge.receipts.append(receipt)
            if len(merge.receipts) in at:
                killed.add(receipt.worker)
                with suppress(ProcessLookupError):
                    os.kill(int(receipt.worker.rpartition(":")[2]), signal.SIGKILL)
    merge.check()
    assert killed  # one that was killed may have receipts under way, and is then not killed again


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            RayOptions(resources={"fast_disk": 2}),
            r"an actor takes CPU 1, fast_disk 2, and no node has so much: \S+ \(.*?\) has CPU 4, memory [\d.]+ GB; add "
            r"such a node, or change executor.resources",
        ),
        (
            RayOptions(placement="strict_spread", workers=3),
            r"executor.placement=strict_spread with executor.workers=3 asks for 3 nodes with CPU 1 each, and the "
            r"cluster has 1: .* has CPU 4.*; lower executor.workers, or choose executor.placement=spread",
        ),
    ],
    ids=["a resource that no node has", "more nodes than there are"],
)
def test_what_the_cluster_cannot_give_is_told_with_numbers(
    options: RayOptions, told: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "ROOM_SECONDS", 0.5)
    with pytest.raises(ExecutorError, match=told):
        list(Merge(models, tmp_path, options).run())
