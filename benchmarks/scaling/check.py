"""What is predicted for this machine, beside what it does: a few models of SDXL at a fraction of their width, warm."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from benchmarks.scaling.bound import demand
from benchmarks.scaling.machine import Costs, Machine, Node, Storage
from benchmarks.scaling.measure import copy_rate, digest_seconds, merging, read_call, write_rates
from benchmarks.scaling.simulate import simulate
from benchmarks.scaling.workload import sdxl, work_of_plan
from mergeflow.demo.catalogue import Variant
from mergeflow.demo.generate import synthesize
from mergeflow.errors import ConfigError
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.recipe.request import Budget, ModelSource, Policies, Request, TargetRequest
from mergeflow.storage.local import free_bytes
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MODELS = (3, 6)
MOST_BYTES = 6e9
MEMORY = 1 << 30
READS_IN_FLIGHT = 4
FULL_BYTES = 6.94e9
MEASURED = ("arithmetic", "row_call", "piece_call", "read_call", "copy", "write_copy", "digest")
"""Costs of which every round has figures of its own."""
DIRTY_SHARE = 0.1
"""Of the memory that is free: what Linux lets lie unwritten before it begins (`vm.dirty_background_ratio`)."""


@dataclass(frozen=True)
class Check:
    """One row of what `--check` shows: medians of the rounds."""

    models: int
    bytes: int
    """Read and written."""
    predicted: float
    """Seconds."""
    bound: float
    measured: float
    predicted_cores: float
    """Seconds of all cores together, which do not depend on who else uses them."""
    measured_cores: float


def check(directory: Path, divisor: int, workers: int, rounds: int) -> tuple[list[Check], Machine]:
    """Make models below `directory`, which is removed afterwards; the rows, and this machine as it was last measured.

    What was made is read by the measurements before it is merged, so it is in the page cache. Raises `ConfigError` if
    the models would take too much, or the directory holds anything.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty, and would be removed; choose another --directory")
    size = FULL_BYTES / divisor**2 * (max(MODELS) + 3)
    if size > min(MOST_BYTES, free_bytes(str(directory))):
        raise ConfigError(
            f"{max(MODELS)} models and their outputs take {si_bytes(size)}, more than {si_bytes(MOST_BYTES)} or than "
            f"what is free in {directory}; choose a larger --divisor than {divisor}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        files = [directory / f"{number}.safetensors" for number in range(1, max(MODELS) + 1)]
        for number, file in enumerate(files, start=1):
            synthesize(file, sdxl(), Variant(number), divisor=divisor)
        return _rounds(files, divisor, workers, rounds)
    finally:
        shutil.rmtree(directory)


def _rounds(files: Sequence[Path], divisor: int, workers: int, rounds: int) -> tuple[list[Check], Machine]:
    """Runs, and between them what the prediction starts from."""
    took: dict[int, list[tuple[float, float]]] = {models: [] for models in MODELS}
    machines = []
    for _ in range(rounds):
        machines.append(this_machine(files, workers))
        for models in MODELS:
            took[models].append(_timed(_request(files[:models], divisor, workers)))
    machine = _usual(machines)
    checks = []
    for models, every in took.items():
        plan = open_plan(_request(files[:models], divisor, workers))
        work = work_of_plan(plan)
        found, wanted = simulate(work, machine), demand(work.total, machine)
        checks.append(
            Check(
                models=models,
                bytes=plan.bytes_read + plan.bytes_written,
                predicted=found.run,
                bound=found.bound.seconds - (found.seconds - found.run),
                measured=statistics.median(seconds for seconds, _ in every),
                predicted_cores=wanted.copying + wanted.merging + wanted.writing + wanted.digest,
                measured_cores=statistics.median(cores for _, cores in every),
            )
        )
    return checks, machine


def _timed(request: Request) -> tuple[float, float]:
    """Seconds of a run, and of all cores."""
    plan = open_plan(request)
    before = time.process_time()
    result = run(plan, LocalExecutor(request.budget))
    return result.seconds, time.process_time() - before


def _usual(machines: Sequence[Machine]) -> Machine:
    """The median of every figure."""
    first = machines[0]

    def medians(values: Sequence[Costs | Storage], names: Sequence[str]) -> dict[str, Any]:
        return {name: statistics.median(getattr(one, name) for one in values) for name in names}

    costs = medians([one.costs for one in machines], MEASURED)
    storage = medians([one.storage for one in machines], ("stream", "write", "open"))
    return replace(first, costs=replace(first.costs, **costs), storage=replace(first.storage, **storage))


def this_machine(files: Sequence[Path], workers: int) -> Machine:
    """This machine in numbers, with models in its page cache and results on its disk."""
    cores = len(os.sched_getaffinity(0))
    copy = copy_rate(files)
    write_copy, write = write_rates(files[0].parent, files[0].stat().st_size // cores)
    costs = Costs(
        copy=copy,
        write_copy=write_copy,
        digest=digest_seconds(files[0]),
        read_call=read_call(files[0]),
    )
    costs = replace(costs, **cast("dict[str, Any]", merging()))
    storage = Storage("page cache", latency=0.0, stream=copy, open=open_seconds(files), write=write, local=True)
    unwritten = DIRTY_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    node = Node(cores=cores, workers=workers, reads_in_flight=READS_IN_FLIGHT, memory=MEMORY, unwritten=unwritten)
    return Machine(1, storage, node, costs, shared_interpreter=True, ray=False)


def open_seconds(files: Sequence[Path]) -> float:
    """Seconds to open a file."""
    began = time.perf_counter()
    for file in files:
        os.close(os.open(file, os.O_RDONLY))
    return (time.perf_counter() - began) / len(files)


def _request(files: Sequence[Path], divisor: int, workers: int) -> Request:
    arch = sdxl().scaled(divisor)
    return Request(
        models=ModelSource(files={file.stem: str(file) for file in files}),
        architecture=arch,
        selections={"models": "all"},
        targets=(TargetRequest("mean", "mean.safetensors", selection="models"),),
        method="uniform",
        dtype=arch.dtype,
        policies=Policies(),
        budget=Budget(workers, READS_IN_FLIGHT, MEMORY),
        out=str(files[0].parent / "out"),
        overwrite=True,
    )
