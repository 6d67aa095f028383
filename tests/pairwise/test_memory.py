"""Memory of trees: as many registers as levels, and what a run takes stays below what its plan has said.

Measured as in `tests.test_memory`: in a process of its own, in which torch is warm.
"""

from __future__ import annotations

from math import ceil, log2
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.plan.rules import grow as planned
from mergeflow.plan.rules import role
from mergeflow.plan.tiles import PIECE, SCRATCH
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.request import Budget, Policies
from mergeflow.recipe.shapes import TreeOptions, grow
from mergeflow.recipe.tree import Rules
from mergeflow.tensors import Dtype
from tests.models import write_models
from tests.pairwise.sides import asked
from tests.test_memory import BESIDE, ROOM, Measured, in_a_process, models_of, status

if TYPE_CHECKING:
    from mergeflow.recipe.request import Nonfinite, Request
    from mergeflow.recipe.tree import Arithmetic, Tree

COUNT = 256
REGISTERS = 9 * PIECE * (2 + 2 + 4 + 8)
"""What trees of so many keep between their leaves and their tops, in all four dtypes."""
BUDGET = Budget(workers=1, reads_in_flight=3, memory=3 * (SCRATCH + REGISTERS + ROOM))
MIXED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --- registers ------------------------------------------------------------------------------------------------------


def tree_of(count: int, shape: str = "balanced") -> Tree:
    ids = [str(index) for index in range(count)]
    return grow("listed", ids, ModelSet({id: id for id in ids}), TreeOptions(shape))


def registers(tree: Tree, arithmetic: Arithmetic = "webui", *dtypes: Dtype) -> int:
    """How many registers the steps of one tensor use."""
    leaves = [(index, (dtypes or (Dtype.F16,))[index % max(len(dtypes), 1)]) for index in range(len(tree.leaves))]
    rules = Rules(arithmetic)
    made = planned(tree, leaves, {}, role("model.weight", rules, strict=False), rules, None)
    assert made is not None
    return len({step.into for step in made.steps})


@pytest.mark.parametrize("arithmetic", ["webui", "float64", "supermerger"])
def test_a_balanced_tree_needs_one_register_more_than_it_has_levels(arithmetic: Arithmetic) -> None:
    for count in range(2, 301):
        assert registers(tree_of(count), arithmetic) <= ceil(log2(count)) + 1, count


def test_a_balanced_tree_of_mixed_dtypes_needs_no_more() -> None:
    for count in range(2, 301, 7):
        assert registers(tree_of(count), "webui", Dtype.F32, Dtype.F16, Dtype.BF16) <= ceil(log2(count)) + 1, count


@pytest.mark.parametrize("arithmetic", ["webui", "float64", "supermerger"])
def test_a_chain_needs_two(arithmetic: Arithmetic) -> None:
    for count in range(2, 301, 7):
        assert registers(tree_of(count, "chain"), arithmetic) <= 2, count


# --- measured -------------------------------------------------------------------------------------------------------


def wanted(models: Path, shape: str, policy: Nonfinite) -> Request:
    policies = Policies(nonfinite=policy)
    return asked(models, models / "out", "all", tree=TreeOptions(shape), policies=policies, budget=BUDGET)


def probe(models: Path, shape: str, policy: Nonfinite) -> Measured:
    """Warm up, look, merge, look again."""
    tiny = {"w": torch.full((50,), torch.nan), "v": torch.ones(9).half()}
    directory = write_models(models / "tiny", {"a": tiny, "b": tiny, "c": tiny})
    run(open_plan(wanted(directory, shape, "propagate")), LocalExecutor(BUDGET))
    plan = open_plan(wanted(models, shape, policy))
    assert not plan.problems, plan.problems
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run(plan, LocalExecutor(BUDGET))
    memory = plan.memory
    return Measured(memory.projected, status("VmHWM") - before, memory.threads * memory.block)


def measure(models: Path, shape: str = "balanced", policy: Nonfinite = "error") -> Measured:
    """Merge the models in a process of its own."""
    return in_a_process(probe, models, shape, policy)


@pytest.mark.parametrize("shape", ["balanced", "chain"])
def test_a_tree_of_256_models_takes_no_more_than_its_plan_projects(tmp_path: Path, shape: str) -> None:
    measured = measure(models_of(tmp_path, COUNT, 1 << 16, torch.float16), shape)
    assert measured.taken <= measured.projected + BESIDE
    assert measured.projected <= BUDGET.memory
    assert measured.taken > measured.blocks / 2, "so little cannot be what the run has taken"


def test_mixed_dtypes_with_nan_take_no_more_either(tmp_path: Path) -> None:
    models = models_of(tmp_path, COUNT // 2, 1 << 16, *MIXED, nans=1000)
    measured = measure(models, policy="propagate")
    assert measured.taken <= measured.projected + BESIDE
    assert measured.projected <= BUDGET.memory


def test_registers_of_every_dtype_take_no_more_either(tmp_path: Path) -> None:
    values = torch.randn(1 << 15)
    for index in range(64):
        tensors = {f"w of {dtype}": values.to(dtype) * (index + 1) for dtype in MIXED}
        write_models(tmp_path, {f"{index:02}": tensors})
    measured = measure(tmp_path)
    assert measured.taken <= measured.projected + BESIDE
