"""Where and when never change what: the same bytes of whole files, whoever makes them.

The models are few and small, but of every dtype, with composites, without what is optional, with integers, 0-dim and
zero-size tensors, and with one tensor that the smallest budget cuts into many tiles.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from mergeflow.execute.local import LocalExecutor
from mergeflow.execute.ray import RayExecutor, RayOptions
from mergeflow.merge import open_plan
from mergeflow.plan.tiles import KEPT, SCRATCH
from mergeflow.recipe.request import Budget
from mergeflow.storage.local import LocalStore
from tests.fakes import CountingStore, Extent, merged, overlaps
from tests.methods.reference import FP16, FloatFormat, expected_mean, numbers
from tests.models import ANY, BOTH, TOY, TOY_COMPOSITES, merge, request, toy_models, toy_request, write_models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from mergeflow.interfaces import Executor

MIB = 1 << 20
ONE = Budget(workers=1, reads_in_flight=1, memory=256 * MIB)
MANY = Budget(workers=2, reads_in_flight=3, memory=256 * MIB)
TIGHT = Budget(workers=1, reads_in_flight=1, memory=(SCRATCH + MIB // 4) * KEPT // (KEPT - 1))
"""Little more than the least that ten models need, in which a tile is 4,096 elements long."""
LOOSER = Budget(workers=1, reads_in_flight=1, memory=(SCRATCH + 2 * MIB) * KEPT // (KEPT - 1))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("toy"), toy_models())


@pytest.fixture(scope="module")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The two files as one thread makes them with room for every tensor as a whole."""
    return made(models, tmp_path_factory.mktemp("reference"), ONE)


def made(
    models: Path, out: Path, budget: Budget, names: Sequence[str] = BOTH, executor: Executor | None = None
) -> dict[str, bytes]:
    """The files of these targets, to the byte."""
    merge(toy_request(models, out, budget, names), executor)
    return {name: (out / f"{name}.safetensors").read_bytes() for name in names}


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget",
    [
        pytest.param(TIGHT, id="one-tight-thread"),
        pytest.param(LOOSER, id="one-thread-with-some-room"),
        pytest.param(Budget(1, 2, 2 * TIGHT.memory), id="two-tight-threads"),
        pytest.param(MANY, id="six-threads-256MiB"),
    ],
)
def test_memory_and_threads_change_no_byte(
    models: Path, reference: Mapping[str, bytes], tmp_path: Path, budget: Budget
) -> None:
    assert made(models, tmp_path, budget) == reference


def test_the_budgets_do_cut_the_work_differently(models: Path, tmp_path: Path) -> None:
    plans = [open_plan(toy_request(models, tmp_path, budget)) for budget in (TIGHT, LOOSER, ONE)]
    tiles = [plan.tiles for plan in plans]
    assert tiles[0] > 60
    assert tiles[0] > tiles[1] > tiles[2] == len(plans[2].strips)
    assert len(plans[0].shards) > 5


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("budget", [ONE, TIGHT, MANY], ids=["one", "tight", "many"])
def test_a_target_alone_is_the_target_beside_another(
    models: Path, reference: Mapping[str, bytes], tmp_path: Path, name: str, budget: Budget
) -> None:
    assert made(models, tmp_path, budget, [name]) == {name: reference[name]}


def test_targets_in_another_order_are_the_same(models: Path, reference: Mapping[str, bytes], tmp_path: Path) -> None:
    wanted = toy_request(models, tmp_path, MANY)
    turned = wanted.__class__(**{**vars(wanted), "targets": wanted.targets[::-1]})
    merge(turned)
    assert {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in BOTH} == reference


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    "budget",
    [
        pytest.param(Budget(1, 2, 2 * TIGHT.memory), id="one-actor"),
        pytest.param(Budget(2, 2, 64 * MIB), id="two-actors"),
    ],
)
def test_actors_change_no_byte(models: Path, reference: Mapping[str, bytes], tmp_path: Path, budget: Budget) -> None:
    assert made(models, tmp_path, budget, executor=RayExecutor(budget, RayOptions())) == reference


# --- the files are what they should be ------------------------------------------------------------------------------


def test_a_file_is_what_its_recipe_says(reference: Mapping[str, bytes], tmp_path: Path) -> None:
    models = toy_models()
    (tmp_path / "second.safetensors").write_bytes(reference["second"])
    tensors = load_file(tmp_path / "second.safetensors")
    narrow = {id: Fraction(1, 4) for id in ("10", "8", "9", "3")}
    text = {id: Fraction(1, 5) for id in ("2", "10", "3", "7")} | dict.fromkeys("68", Fraction(1, 15))
    text["7"] += Fraction(1, 15)
    assert TOY_COMPOSITES == {"6a": ("6", "7", "8")}
    assert tensors.keys() == {key for key in TOY.usual_keys if key in models["2"]}
    for key, tensor in tensors.items():
        shares = text if key.startswith("text.") else narrow
        held = {id: models[id][key] for id in shares if key in models[id]}
        if key == "text.position_ids":
            assert torch.equal(tensor, torch.arange(77).view(1, 77))
        else:
            check_mean(key, tensor, held, shares)


def check_mean(key: str, tensor: Tensor, held: Mapping[str, Tensor], shares: Mapping[str, Fraction]) -> None:
    """A few elements of a tensor, with shares renewed among those who have it."""
    out = {torch.float16: FP16, torch.float8_e5m2: FloatFormat(torch.float8_e5m2, 3, -14, Fraction(57344))}
    integers = [int(shares[id] * 60) for id in held]
    chosen = range(0, tensor.numel(), max(tensor.numel() // 50, 1))
    columns = zip(*(values.flatten()[chosen].double().tolist() for values in held.values()), strict=True)
    told = [expected_mean(column, integers, out[tensor.dtype]) for column in columns]
    assert numbers(tensor.flatten()[chosen]) == told, key


def test_a_header_is_to_the_byte_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    # With more than one key of metadata the library's own order changes from run to run, so one is left.
    models = {id: tensors | {'ünï/"code"': torch.ones(3)} for id, tensors in toy_models().items() if id in ("1", "2")}
    wanted = request(write_models(tmp_path / "models", models), tmp_path / "out", arch=ANY)
    merge(wanted)
    path = tmp_path / "out" / "merged.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert metadata["format"] == "pt"
    raw = path.read_bytes()
    written = save(tensors, {"format": "pt"})
    assert body(raw) == body(written)
    assert header(raw).pop("__metadata__") == metadata
    ours, theirs = header(raw), header(written)
    assert list(ours) == list(theirs)
    ours["__metadata__"] = theirs["__metadata__"]
    assert library_json(ours) == written[8 : 8 + int.from_bytes(written[:8], "little")]


def header(raw: bytes) -> dict[str, object]:
    made: dict[str, object] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return made


def body(raw: bytes) -> bytes:
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def library_json(table: Mapping[str, object]) -> bytes:
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


@pytest.mark.parametrize("name", BOTH)
def test_a_file_can_be_opened_by_the_library_with_its_metadata(
    reference: Mapping[str, bytes], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(reference[name])
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["mergeflow"])
        keys = set(file.keys())
    assert recipe["components"]["net"]["method"] == "uniform"
    assert {"net.embedding", "text.scale", "vae.empty"} <= keys


# --- every byte once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [ONE, TIGHT, MANY], ids=["one", "tight", "many"])
def test_every_byte_is_read_once_and_written_once_and_no_other_is_touched(
    models: Path, tmp_path: Path, budget: Budget
) -> None:
    store = CountingStore(LocalStore())
    wanted = toy_request(models, tmp_path, budget)
    plan = open_plan(wanted, store)
    for checkpoint in plan.checkpoints:
        start = min(info.begin for info in checkpoint.header.tensors.values())
        assert merged(store.reads(checkpoint.path)) == [Extent(0, start)]
    store.forget()
    result = merge(wanted, store=store)
    for checkpoint in plan.checkpoints:
        tensors = checkpoint.header.tensors
        start = min(info.begin for info in tensors.values())
        used = [tensors[key] for key in needed(checkpoint.id) if key in tensors]
        reads = [extent for extent in store.reads(checkpoint.path) if extent.begin >= start]
        assert overlaps(reads) == []
        assert merged(reads) == merged((info.begin, info.end) for info in used)
    for output in plan.outputs:
        draft = f"{output.path}.draft"
        assert overlaps(store.writes(draft)) == []
        assert merged(store.writes(draft)) == [Extent(0, output.layout.size)]
        # Threads hash in memory what they write in the order of the file; an output of another order is read back.
        assert merged(store.reads(draft)) in ([], [Extent(*output.data)])
        assert overlaps(store.reads(draft)) == []
    assert sum(receipt.bytes_read for receipt in result.receipts) == plan.bytes_read


def needed(id: str) -> set[str]:
    """The keys for which the two targets need a model, from their lists."""
    members = {"6a": TOY_COMPOSITES["6a"]}
    wide = {one for entry in ("1", "2", "3", "5", "6a", "9", "10") for one in members.get(entry, (entry,))}
    text = {one for entry in ("2", "10", "3", "7", "6a") for one in members.get(entry, (entry,))}
    narrow = {"10", "8", "9", "3"}
    users = {"text": text, "vae": narrow | {"4"}, "net": wide | narrow}
    selected = [component.keys for name, component in TOY.components.items() if id in users[name]]
    return {key for keys in selected for key in keys}


def test_nothing_is_read_of_a_model_that_no_list_names(models: Path, tmp_path: Path) -> None:
    store = CountingStore(LocalStore())
    merge(toy_request(models, tmp_path, ONE, ["second"]), store=store)
    assert {path.rpartition("/")[2] for path in store.paths_read() if ".draft" not in path} == {
        f"{id}.safetensors" for id in ("10", "2", "3", "6", "7", "8", "9")
    }


# --- again and again ------------------------------------------------------------------------------------------------


def test_three_runs_in_a_row_make_one_file(models: Path, reference: Mapping[str, bytes], tmp_path: Path) -> None:
    wanted = toy_request(models, tmp_path, MANY)
    executor = LocalExecutor(MANY)
    for run in range(3):
        merge(wanted.__class__(**{**vars(wanted), "out": str(tmp_path / str(run))}), executor)
        assert {name: (tmp_path / str(run) / f"{name}.safetensors").read_bytes() for name in BOTH} == reference
