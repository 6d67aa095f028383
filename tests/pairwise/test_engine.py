"""Where, when, with how much memory and beside what: the tree by hand, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.execute.local import LocalExecutor
from mergeflow.execute.ray import RayExecutor, RayOptions
from mergeflow.formats.safetensors import Safetensors
from mergeflow.inputs import Inputs
from mergeflow.merge import open_plan, run
from mergeflow.plan.make import make_plan
from mergeflow.plan.tiles import PIECE
from mergeflow.recipe.request import Budget, Policies, TargetRequest
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from mergeflow.storage.local import LocalStore
from tests.byhand.files import read, write
from tests.byhand.floats import FLOATS
from tests.byhand.tree import balanced, chain
from tests.fakes import CountingStore, merged, overlaps
from tests.pairwise.checkpoints import CONV, IDS, UNET, name, numbers, write_leaves
from tests.pairwise.sides import MERGED, ONE, asked, assert_same, by_hand

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.interfaces import Executor
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.request import Request
    from tests.byhand.floats import Tensor

pytestmark = pytest.mark.long

MIB = 1 << 20
COUNT = 7
SIZE = 6 * 2200
LARGE = f"{UNET}large.weight"
LARGE_SHAPE = (3, PIECE + 1001)
"""Several pieces of several tiles, the last of both odd."""
LISTED = [name(index) for index in range(COUNT)]
LITTLE, SOME, MUCH = MIB // 2, 2 * MIB, 32 * MIB
"""Room for the tiles of a thread: shorter than a piece, longer, and as long as any tensor."""
THREADS = {
    "one thread with little room": (1, 1, LITTLE),
    "one thread with some": (1, 1, SOME),
    "one thread with much": (1, 1, MUCH),
    "two threads with little": (2, 1, LITTLE),
    "six threads with some": (3, 2, SOME),
}
CODES = ("F16", "F32", "F16", "BF16", "F16", "F16", "F64")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("leaves")
    paths = write_leaves(directory, COUNT, SIZE)
    for index, path in enumerate(paths):
        tensors = read(path).tensors | {LARGE: numbers(CODES[index], LARGE_SHAPE, index)}
        write(path, {key: value for key, value in tensors.items() if not key.startswith(CONV)})
    return paths


@pytest.fixture(scope="module")
def expected(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    return by_hand(paths, balanced(COUNT), tmp_path_factory.mktemp("work"), scalars="half")


def wanted(paths: list[Path], out: Path, budget: Budget = ONE, **changes: Any) -> Request:
    return asked(paths[0].parent, out, LISTED, **{"rules": Rules(scalars="half"), "budget": budget} | changes)


@pytest.fixture(scope="module")
def scratch(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a thread needs whatever its tiles."""
    return open_plan(wanted(paths, tmp_path_factory.mktemp("out"))).memory.scratch


def budget_of(scratch: int, workers: int, reads: int, room: int) -> Budget:
    return Budget(workers, reads, workers * reads * (scratch + room))


def made(request: Request, executor: Executor | None = None) -> bytes:
    """The file, to the byte."""
    run(open_plan(request), executor or LocalExecutor(request.budget))
    return (Path(request.out) / MERGED.file).read_bytes()


@pytest.fixture(scope="module")
def reference(paths: list[Path], expected: Mapping[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that one thread makes, whose tensors are those by hand."""
    out = tmp_path_factory.mktemp("reference")
    whole = made(wanted(paths, out))
    assert_same(read(out / MERGED.file).tensors, expected)
    return whole


@pytest.mark.parametrize("threads", THREADS.values(), ids=THREADS)
def test_memory_and_threads_change_no_byte(
    paths: list[Path], reference: bytes, tmp_path: Path, scratch: int, threads: tuple[int, int, int]
) -> None:
    assert made(wanted(paths, tmp_path, budget_of(scratch, *threads))) == reference


def test_the_budgets_do_cut_the_work_differently(paths: list[Path], tmp_path: Path, scratch: int) -> None:
    def tiles(room: int) -> list[int]:
        plan = open_plan(wanted(paths, tmp_path, budget_of(scratch, 1, 1, room)))
        (large,) = (index for index, strip in enumerate(plan.strips) if strip.key == LARGE)
        return [tile.stop - tile.start for shard in plan.shards for tile in shard if tile.strip == large]

    assert tiles(LITTLE)[0] < PIECE < tiles(SOME)[0]
    assert len(tiles(LITTLE)) > len(tiles(SOME)) > len(tiles(MUCH)) == 1
    assert tiles(MUCH)[0] % PIECE


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("room", [LITTLE, MUCH], ids=["little", "much"])
def test_actors_change_no_byte(
    paths: list[Path], reference: bytes, tmp_path: Path, scratch: int, workers: int, room: int
) -> None:
    budget = budget_of(scratch, workers, 1, room)
    assert made(wanted(paths, tmp_path, budget), RayExecutor(budget, RayOptions())) == reference


def test_three_runs_in_a_row_make_one_file(paths: list[Path], reference: bytes, tmp_path: Path, scratch: int) -> None:
    budget = budget_of(scratch, 3, 2, LITTLE)
    executor = LocalExecutor(budget)
    assert [made(wanted(paths, tmp_path, budget), executor) for _ in range(3)] == [reference] * 3


# --- beside other targets -------------------------------------------------------------------------------------------


def fused(request: Request, *others: Request) -> Plan:
    """One plan for all targets of several requests that differ in how they merge."""
    inputs = Inputs(request, LocalStore(), Safetensors())
    recipe = inputs.recipe()
    targets = [target for other in others for target in Inputs(other, LocalStore(), Safetensors()).recipe().targets]
    recipe = replace(recipe, targets=(*recipe.targets, *targets))
    checkpoints, problems = inputs.checkpoints(recipe)
    assert problems == []
    Path(request.out).mkdir()
    return make_plan(recipe, checkpoints, Safetensors(), request.out)


@pytest.fixture(scope="module")
def alike(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same leaves with what a uniform mean can be made of: what all have, but whole numbers that differ."""
    directory = tmp_path_factory.mktemp("alike")
    models = [read(path).tensors for path in paths]
    shared = {key for key in models[0] if all(key in model for model in models)}
    kept = {key for key in shared if all(model[key].dtype in FLOATS for model in models)} | {IDS}
    return [
        write(directory / path.name, {key: value for key, value in model.items() if key in kept})
        for path, model in zip(paths, models, strict=True)
    ]


@pytest.mark.parametrize("threads", [(1, 1, SOME), (3, 2, SOME)], ids=["one thread", "six"])
def test_a_tree_beside_a_uniform_mean_and_a_chain_is_the_tree_alone(
    alike: list[Path], tmp_path: Path, scratch: int, threads: tuple[int, int, int]
) -> None:
    budget = budget_of(2 * scratch, *threads)
    tree = wanted(alike, tmp_path, budget)
    mean = replace(tree, method="uniform", targets=(renamed("mean"),), policies=Policies())
    chained = replace(tree, targets=(renamed("chain"),), tree=TreeOptions("chain"), rules=Rules())
    alone = {}
    for request in (tree, mean, chained):
        run(open_plan(request), LocalExecutor(budget))
        (target,) = request.targets
        alone[target.file] = read(tmp_path / target.file).tensors
    assert_same(alone[MERGED.file], by_hand(alike, balanced(COUNT), tmp_path / "work", scalars="half"))
    assert_same(alone["chain.safetensors"], by_hand(alike, chain(COUNT), tmp_path / "work"))
    store = CountingStore(LocalStore())
    plan = fused(replace(tree, out=str(tmp_path / "fused")), mean, chained)
    run(plan, LocalExecutor(budget), store)
    for file, tensors in alone.items():
        assert_same(read(tmp_path / "fused" / file).tensors, tensors)
    for path in alike:
        assert overlaps(store.reads(str(path))) == [], "a byte is read twice"


def renamed(target: str) -> TargetRequest:
    return replace(MERGED, name=target, file=f"{target}.safetensors")


def test_every_byte_that_a_tree_needs_is_read_once(paths: list[Path], tmp_path: Path, scratch: int) -> None:
    store = CountingStore(LocalStore())
    request = wanted(paths, tmp_path, budget_of(scratch, 1, 1, LITTLE))
    plan = open_plan(request, store)
    store.forget()
    run(plan, LocalExecutor(request.budget), store)
    needed = [
        merged(
            (strip.offsets[row], strip.offsets[row] + strip.elements * strip.dtypes[row].itemsize)
            for strip in plan.strips
            for row, source in enumerate(strip.sources)
            if plan.checkpoints[source].path == str(path)
        )
        for path in paths
    ]
    assert [merged(store.reads(str(path))) for path in paths] == needed
    assert all(overlaps(store.reads(str(path))) == [] for path in paths)
    assert len(needed[1]) > 1, "what only B has is not read"
