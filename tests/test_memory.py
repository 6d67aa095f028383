"""Memory is projected, then held: what a run takes from the machine stays below what its plan has said.

Measured in a process of its own, in which torch is warm: the highest resident set of the run, less what was resident
before. It counts everything: blocks, scratch, receipts, threads, what allocators keep. Such a process is forked from
one that has loaded torch and done nothing else, since to load it anew takes longer than most of the runs.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run, store_of
from mergeflow.plan.tiles import SCRATCH
from mergeflow.recipe.request import Budget, Policies, TargetRequest
from tests.models import request, write_models

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from mergeflow.recipe.request import Nonfinite

MIB = 1 << 20
ROOM = 6 * MIB
"""What a block may take: little enough that every tensor here is cut into tiles."""
BUDGET = Budget(workers=1, reads_in_flight=3, memory=3 * (SCRATCH + ROOM), io="auto")
BESIDE = 4 * MIB
"""What the plan does not count: the buffer of the digest (1 MiB), stacks of threads, receipts, pages of code."""
PATIENCE_SECONDS = 120
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, "tests.pairwise.test_memory"])


class Measured(NamedTuple):
    """What a process says of its run."""

    projected: int
    taken: int
    blocks: int


def measure(models: Path, policy: Nonfinite = "error", series: int = 0) -> Measured:
    """Merge the models in a process of its own: all of them, or all but one in each target of a series."""
    return in_a_process(probe, models, policy, series)


def in_a_process(probe: Callable[..., Measured], *arguments: object) -> Measured:
    """What `probe` says in a process in which nothing else was done."""
    here, there = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=tell, args=(there, probe, arguments))
    with here:
        process.start()
        there.close()
        assert here.poll(PATIENCE_SECONDS)
        told = here.recv()
    process.join(PATIENCE_SECONDS)
    process.close()
    assert isinstance(told, Measured), told
    return told


def tell(there: Connection, probe: Callable[..., Measured], arguments: tuple[object, ...]) -> None:
    """In that process: say what was measured, or what went wrong."""
    try:
        there.send(probe(*arguments))
    except BaseException:
        there.send(traceback.format_exc())


def probe(models: Path, policy: Nonfinite, series: int) -> Measured:
    """Warm up, look, merge, look again."""
    model = {"w": torch.full((50,), torch.nan), "v": torch.ones(9).half()}
    tiny = write_models(models / "tiny", {"a": model, "b": model})
    warm(tiny, Policies(nonfinite="propagate"))
    wanted = request(models, models / "out", policies=Policies(nonfinite=policy), budget=BUDGET)
    if series:
        lists = {f"without-{index}": f"all but {index:03}" for index in range(series)}
        targets = tuple(TargetRequest(name, f"{name}.safetensors", selection=name) for name in lists)
        wanted = replace(wanted, selections=lists, targets=targets)
    plan = open_plan(wanted)
    assert not plan.problems, plan.problems
    assert bool(plan.strips[0].sums) == bool(series)
    forget(models)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run(plan, LocalExecutor(BUDGET), store_of(plan))
    memory = plan.memory
    return Measured(memory.projected, status("VmHWM") - before, memory.threads * memory.block)


def forget(models: Path) -> None:
    """Let no file be in the page cache, so that all is read past it, which takes the most memory."""
    for path in models.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(models: Path, policies: Policies) -> None:
    wanted = request(models, models / "out", policies=policies, budget=BUDGET)
    run(open_plan(wanted), LocalExecutor(BUDGET))


def status(field: str) -> int:
    """Bytes, from what the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def models_of(directory: Path, count: int, elements: int, *dtypes: torch.dtype, nans: int = 0, spread: int = 0) -> Path:
    """So many models with one tensor each; every `nans`-th value is NaN, magnitudes differ by up to 10^`spread`."""
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(elements + count, generator=generator)
    for index in range(count):
        row = noise[index : index + elements].to(dtypes[index % len(dtypes)])
        if spread:
            row *= 10.0 ** torch.randint(-spread // 2, spread // 2, (elements,), generator=generator).double()
        if nans:
            row[index::nans] = torch.nan
        write_models(directory, {f"{index:03}": {"w": row}})
    return directory


FEW, LARGE = 1 << 19, 1 << 23
"""Elements: 1 MiB and 16 MiB in fp16. A tile of five models is at most 1.2 MiB long, one of a hundred 60 kB."""


@pytest.mark.parametrize(
    ("count", "elements"),
    [
        pytest.param(5, FEW, id="5-models"),
        pytest.param(5, LARGE, id="5-models-with-a-large-tensor"),
        pytest.param(100, FEW, id="100-models"),
    ],
)
def test_a_run_takes_no_more_than_its_plan_projects(tmp_path: Path, count: int, elements: int) -> None:
    measured = measure(models_of(tmp_path, count, elements, torch.float16))
    assert measured.taken <= measured.projected + BESIDE
    assert measured.projected <= BUDGET.memory
    assert measured.taken > measured.blocks / 2, "so little cannot be what the run has taken"


@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_models_full_of_nan_in_mixed_dtypes_take_no_more_either(tmp_path: Path, policy: Nonfinite) -> None:
    mixed = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    measured = measure(models_of(tmp_path, 80, 1 << 17, *mixed, nans=1000), policy)
    assert measured.taken <= measured.projected + BESIDE
    assert measured.projected <= BUDGET.memory


def test_sums_in_as_many_words_as_there_are_take_no_more_either(tmp_path: Path) -> None:
    measured = measure(models_of(tmp_path, 20, 1 << 19, torch.float64, spread=200))
    assert measured.taken <= measured.projected + BESIDE
    assert measured.projected <= BUDGET.memory


def test_fp8_that_is_widened_takes_no_more_either(tmp_path: Path) -> None:
    models_of(tmp_path, 60, 1 << 19, torch.float32)
    for path in tmp_path.iterdir():
        write_models(tmp_path, {path.stem: {"w": load_file(path)["w"].to(torch.float8_e4m3fn)}})
    measured = measure(tmp_path)
    assert measured.taken <= measured.projected + BESIDE
    assert measured.projected <= BUDGET.memory


@pytest.mark.parametrize(
    ("dtype", "spread"),
    [
        pytest.param(torch.float16, 0, id="one-word"),
        pytest.param(torch.bfloat16, 12, id="two-words"),
        pytest.param(torch.bfloat16, 60, id="alone"),
    ],
)
def test_sums_that_targets_share_take_no_more_either(tmp_path: Path, dtype: torch.dtype, spread: int) -> None:
    measured = measure(models_of(tmp_path, 12, 1 << 19, dtype, spread=spread), series=12)
    assert measured.taken <= measured.projected + BESIDE
    assert measured.projected <= BUDGET.memory
    assert measured.taken > measured.blocks / 2, "so little cannot be what the run has taken"


def test_what_is_projected_does_not_depend_on_how_many_or_how_large_the_models_are(tmp_path: Path) -> None:
    def projected(count: int, elements: int) -> int:
        directory = models_of(tmp_path / f"{count}-{elements}", count, elements, torch.float16)
        plan = open_plan(request(directory, tmp_path / "out", budget=BUDGET))
        assert plan.tiles > 1
        return plan.memory.projected

    known = [projected(5, FEW * 4), projected(5, FEW * 8), projected(50, FEW)]
    # All fill the budget but for some kB of every row, since a tile ends at a multiple of 4,096 elements.
    assert max(known) <= BUDGET.memory
    assert min(known) > 0.9 * BUDGET.memory
