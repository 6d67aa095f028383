"""Failures that were seen in other tools, one test for each, in the order of the table in which they were noted.

Every test shows the situation in which a peer lost data or time, and that it ends differently here: with the right
file, or with an error before anything is written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mergeflow.errors import FormatError, IncompatibleSources, OverBudget, StorageError, UnmergeableValues
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.plan.explain import explain
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.request import Budget, ModelSource, Policies, TargetRequest
from mergeflow.storage.local import LocalStore
from tests.conformance.executor import SlowStore
from tests.fakes import CountingStore, Extent
from tests.models import TOY, merge, merged, request, toy_model, toy_models, toy_request, write_models

if TYPE_CHECKING:
    from torch import Tensor

PROJECT = Path(__file__).parent.parent
MIB = 1 << 20


def forty_two(directory: Path, **odd: dict[str, Tensor]) -> Path:
    """Forty-two models of ones; some of them are different."""
    usual = {"w": torch.ones(6, 4).half(), "b": torch.ones(4).half()}
    return write_models(directory, {f"{index:02}": odd.get(f"m{index:02}", usual) for index in range(1, 43)})


def everything_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


# --- 1 of 42 models lacks a key, or has one NaN in it (sd-mecha: the key vanishes from the output, no message) ---


def test_a_key_that_1_of_42_models_lacks_is_an_error_or_keeps_its_place(tmp_path: Path) -> None:
    models = forty_two(tmp_path / "models", m17={"w": torch.ones(6, 4).half()})
    with pytest.raises(IncompatibleSources, match=r"not in 17: b; .*keys.missing=skip"):
        merge(request(models, tmp_path / "out"))
    assert everything_in(tmp_path / "out") == []
    merge(request(models, tmp_path / "out", policies=Policies(missing="skip")))
    assert load_file(tmp_path / "out" / "merged.safetensors")["b"].tolist() == [1, 1, 1, 1]


def test_a_nan_in_1_of_42_models_is_an_error_or_is_left_out_and_counted(tmp_path: Path) -> None:
    broken = torch.ones(6, 4).half()
    broken[2, 3] = torch.nan
    models = forty_two(tmp_path / "models", m17={"w": broken, "b": torch.ones(4).half()})
    with pytest.raises(UnmergeableValues, match=r"'w': model 17 has 1 NaN value\(s\) from element 11 on"):
        merge(request(models, tmp_path / "out"))
    assert everything_in(tmp_path / "out") == []
    result = merge(request(models, tmp_path / "out", policies=Policies(nonfinite="skip")))
    assert torch.equal(load_file(tmp_path / "out" / "merged.safetensors")["w"], torch.ones(6, 4).half())
    assert result.tolerated == {("17", "w"): 1}


# --- input file truncated (sd-mecha: zeros are merged) ---


@pytest.mark.parametrize("missing", [1, 30, 60])
def test_a_truncated_input_is_refused(tmp_path: Path, missing: int) -> None:
    models = forty_two(tmp_path / "models")
    path = models / "17.safetensors"
    os.truncate(path, path.stat().st_size - missing)
    with pytest.raises(FormatError, match=r"model 17: .*17\.safetensors cannot be used: .*truncated"):
        merge(request(models, tmp_path / "out"))
    assert everything_in(tmp_path / "out") == []


# --- the output path is also an input (sd-mecha: the output is silently wrong) ---


def test_an_output_path_that_is_also_an_input_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    models = forty_two(tmp_path / "models")
    before = (models / "17.safetensors").read_bytes()
    targets = [TargetRequest("t", "17.safetensors", selection="all")]
    with pytest.raises(StorageError, match="is model 17 itself"):
        merge(request(models, models, targets=targets, overwrite=True))
    assert (models / "17.safetensors").read_bytes() == before


# --- failure or kill half way (both: a loadable partial file under the final name) ---

HALF_WAY = """
import sys
from pathlib import Path
from mergeflow.merge import run
from tests.models import LocalExecutor, SMALLEST, open_plan, request
from tests.conformance.executor import SlowStore
place = Path(sys.argv[1])
wanted = request(place / "models", place / "out")
run(open_plan(wanted), LocalExecutor(SMALLEST), SlowStore(place / "notes"), lambda _: print("a shard", flush=True))
"""


def test_a_kill_half_way_leaves_nothing_under_the_final_name_and_the_next_run_is_whole(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    models = {id: {f"k{key}": torch.randn(300_000, generator=generator) for key in range(20)} for id in "ab"}
    write_models(tmp_path / "models", models)
    command = [sys.executable, "-c", HALF_WAY, str(tmp_path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a shard\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 < len(SlowStore(tmp_path / "notes").noted()) < 21  # the head and a tensor, but not all of them
    assert everything_in(tmp_path / "out") == ["merged.safetensors.draft", "merged.safetensors.draft.journal"]
    with pytest.raises(StorageError, match="of this very output; add resume=true"):
        merge(request(tmp_path / "models", tmp_path / "out"))
    merge(request(tmp_path / "models", tmp_path / "out", overwrite=True))
    assert everything_in(tmp_path / "out") == ["merged.safetensors"]
    made = load_file(tmp_path / "out" / "merged.safetensors")
    assert torch.equal(made["k19"], ((models["a"]["k19"].double() + models["b"]["k19"].double()) / 2).float())


# --- shape differs in one model (sd-mecha: a bare torch error; broadcastable shapes pass) ---


@pytest.mark.parametrize(
    "shape", [(6, 5), (1, 4), (6, 1), (4,), (1,), (), (24,), (6, 4, 1), (1, 6, 4), (4, 6), (0, 4)], ids=str
)
def test_a_shape_that_differs_is_an_error_also_where_it_could_be_broadcast(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    models = forty_two(tmp_path / "models", m17={"w": torch.ones(shape).half(), "b": torch.ones(4).half()})
    with pytest.raises(IncompatibleSources) as caught:
        merge(request(models, tmp_path / "out"))
    assert "model 17 has 1 tensor(s) of another shape" in str(caught.value)
    assert f"'w' is {list(shape)}, not [6, 4]" in str(caught.value)
    assert everything_in(tmp_path / "out") == []


# --- int64 `position_ids` (sd-mecha: written as fp16) ---


def test_int64_position_ids_stay_int64(tmp_path: Path) -> None:
    made = merged(tmp_path, {"1": toy_model(1), "2": toy_model(2)}, arch=TOY)
    assert made.tensors["text.position_ids"].dtype == torch.int64
    assert torch.equal(made.tensors["text.position_ids"], torch.arange(77).view(1, 77))
    assert made.tensors["net.embedding"].dtype == torch.float16


# --- three identical runs on 4 threads (sd-mecha: three different files) ---


def test_three_identical_runs_on_4_threads_make_one_file(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", toy_models())
    budget = Budget(workers=1, reads_in_flight=4, memory=256 * MIB)
    for run_number in range(3):
        merge(toy_request(models, tmp_path / str(run_number), budget))
    files = {(tmp_path / str(index) / "second.safetensors").read_bytes() for index in range(3)}
    assert len(files) == 1


# --- path contains `+` or `@` (mergekit: that input is dropped, exit 0) ---


def check_a_path_with(sign: str, place: Path) -> None:
    names = {f"1{sign}": {"w": torch.tensor([1.0])}, f"{sign}2{sign}{sign}": {"w": torch.tensor([4.0])}}
    directory = write_models(place / f"in{sign}put", names)
    files = {f"id{index}": str(directory / f"{name}.safetensors") for index, name in enumerate(names)}
    merge(request(ModelSource(files=files), place / f"out{sign}"))
    assert load_file(place / f"out{sign}" / "merged.safetensors")["w"].tolist() == [2.5]


@pytest.mark.parametrize("sign", ["+", "@", "=", ",", "#", "'", "[x]", "é", "%20", "{id}", "*"], ids=repr)
def test_a_path_with_a_sign_that_means_something_elsewhere_is_an_input_like_any(tmp_path: Path, sign: str) -> None:
    check_a_path_with(sign, tmp_path)


# --- path contains a space (mergekit: crash) ---


@pytest.mark.parametrize("space", [" ", "  ", "\t", "\n"], ids=repr)
def test_a_path_with_a_space_is_an_input_like_any_other(tmp_path: Path, space: str) -> None:
    check_a_path_with(space, tmp_path)


# --- the same file listed twice (mergekit 0.1.4: collapsed into one) ---


@pytest.mark.parametrize("how", ["one path", "link", "second name"])
def test_the_same_file_listed_twice_is_an_error(tmp_path: Path, how: str) -> None:
    models = write_models(tmp_path / "models", {id: {"w": torch.ones(2)} for id in "ab"})
    twin = models / "c.safetensors"
    if how == "link":
        twin.symlink_to(models / "a.safetensors")
    elif how == "second name":
        twin.hardlink_to(models / "a.safetensors")
    else:
        twin = models / "a.safetensors"
    files = {"a": str(models / "a.safetensors"), "b": str(models / "b.safetensors"), "c": str(twin)}
    with pytest.raises(IncompatibleSources, match=r"ids a and c are one file .*would count twice"):
        merge(request(ModelSource(files=files), tmp_path / "out"))


def test_equal_files_under_two_names_count_twice(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", {"a": {"w": torch.zeros(2)}, "b": {"w": torch.full((2,), 3.0)}})
    shutil.copy(models / "a.safetensors", models / "c.safetensors")
    merge(request(models, tmp_path / "out"))
    assert load_file(tmp_path / "out" / "merged.safetensors")["w"].tolist() == [1, 1]


# --- 42 x 2000.0 in fp16 (mergekit 0.1.4: inf) ---


def test_42_times_2000_in_fp16_is_2000(tmp_path: Path) -> None:
    row = torch.full((5, 7), 2000.0).half()
    made = merged(tmp_path, {f"{index:02}": {"w": row} for index in range(42)})
    assert torch.equal(made.tensors["w"], row)


# --- weights that sum to 0 (mergekit: NaN, silently) ---


@given(
    st.lists(st.sampled_from(range(30)), min_size=1, max_size=30, unique=True),
    st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=5, unique=True), max_size=6),
)
def test_weights_are_positive_and_sum_to_one_whatever_is_selected(listed: list[int], groups: list[list[int]]) -> None:
    composites = {f"c{index}": tuple(map(str, group)) for index, group in enumerate(groups)}
    if len(composites) > 1:
        composites["nested"] = ("c0", "c1", "3")
    models = ModelSet({str(index): f"{index}.safetensors" for index in range(30)}, composites)
    shares = models.shares([*map(str, listed), *composites])
    assert sum(shares.values()) == Fraction(1)
    assert min(shares.values()) > 0


# --- NaN in an input (mergekit: passes through, silently) ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_what_is_not_finite_never_passes_silently(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    models = {id: {"w": torch.ones(1000).to(dtype)} for id in "abc"}
    models["b"]["w"][999] = value
    with pytest.raises(UnmergeableValues, match=r"'w': model b has 1 (NaN|infinite) value\(s\) from element 999 on"):
        merged(tmp_path, models)
    assert everything_in(tmp_path / "out") == []


# --- 42 x 2515 tiny tensors (both: 1 to 6 minutes of bookkeeping before any arithmetic) ---


def test_42_models_of_2515_tiny_tensors_take_seconds(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", {"01": {f"layer.{n}": torch.full((4,), n % 7.0) for n in range(2515)}})
    for index in range(2, 43):
        shutil.copy(models / "01.safetensors", models / f"{index:02}.safetensors")
    began = time.perf_counter()
    merge(request(models, tmp_path / "out", budget=Budget(2, 2, 256 * MIB)))
    assert time.perf_counter() - began < 10
    made = load_file(tmp_path / "out" / "merged.safetensors")
    assert len(made) == 2515
    assert made["layer.2514"].tolist() == [1, 1, 1, 1]


# --- order of reads (mergekit: random tensor order in every file) ---


class Watch(CountingStore):
    """Counts, and knows in which order."""

    def in_order(self, path: str) -> list[Extent]:
        return list(self._reads[path])


def test_one_thread_reads_every_file_from_its_start_to_its_end(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = [f"{part}.{layer}" for layer in (3, 20, 100) for part in ("zeta", "alpha", "Mid")]
    models = {id: {key: torch.randn(40_000, generator=generator).half() for key in keys} for id in "abc"}
    store = Watch(LocalStore())
    wanted = request(write_models(tmp_path / "models", models), tmp_path / "out", budget=Budget(1, 1, 10 * MIB))
    plan = open_plan(wanted)
    run(plan, LocalExecutor(wanted.budget), store)
    for checkpoint in plan.checkpoints:
        reads = store.in_order(checkpoint.path)
        assert len(reads) >= len(keys)
        assert reads == sorted(reads)
        assert all(read.end == following.begin for read, following in pairwise(reads))


# --- peak memory (both: grows with N times the largest tensor, or with the output shard) ---


def embedding_file(path: Path, shape: tuple[int, int]) -> None:
    """A file as large as its header says, of which the disk holds only the header."""
    size = 2 * shape[0] * shape[1]
    table = json.dumps({"embedding": {"dtype": "F16", "shape": shape, "data_offsets": [0, size]}}).encode()
    table += b" " * (-len(table) % 8)
    path.write_bytes(struct.pack("<Q", len(table)) + table)
    os.truncate(path, 8 + len(table) + size)


def test_memory_does_not_grow_with_the_models_times_the_largest_tensor(tmp_path: Path) -> None:
    # What a plan projects is what a run takes at most: see test_memory.py, where it is measured.
    for count in (5, 42):
        (tmp_path / str(count)).mkdir()
        for index in range(count):
            embedding_file(tmp_path / str(count) / f"{index:02}.safetensors", (49408, 1280))
    budget = Budget(workers=2, reads_in_flight=4, memory=256 * MIB)
    plans = [open_plan(request(tmp_path / str(count), tmp_path / "out", budget=budget)) for count in (5, 42)]
    for plan in plans:
        assert plan.problems == ()
        assert plan.memory.projected <= budget.memory
    assert plans[1].bytes_read == 42 * 49408 * 1280 * 2 > 15 * plans[1].memory.projected


# --- memory cap option (sd-mecha: not a cap) ---


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 1 << 31), st.integers(1, 6))
def test_the_memory_cap_is_a_cap_or_an_error(
    models_of_any_size: Path, workers: int, reads: int, memory: int, count: int
) -> None:
    listed = ",".join(str(index) for index in range(count))
    wanted = request(
        models_of_any_size,
        models_of_any_size / "out",
        selections={"some": listed},
        targets=[TargetRequest("t", "t.safetensors", selection="some")],
        budget=Budget(workers, reads, memory),
    )
    plan = open_plan(wanted)
    if plan.problems:
        assert [type(problem) for problem in plan.problems] == [OverBudget]
        assert f"executor.workers={workers}" in str(plan.problems[0])
        assert memory < workers * reads * 12 * MIB
    else:
        assert plan.memory.threads == workers * reads
        assert plan.memory.projected <= memory


@pytest.fixture(scope="module")
def models_of_any_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six models, with a tensor of 126 MB and a small one of fp32."""
    directory = tmp_path_factory.mktemp("sizes")
    for index in range(6):
        embedding_file(directory / f"{index}.safetensors", (49408, 1280))
    return directory


# --- options accepted and ignored (mergekit: `--multi-gpu`, `--read-to-gpu`) ---


def test_an_option_that_cannot_be_honoured_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "launch.py"), "job=plan", "+multi_gpu=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "multi_gpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# --- source metadata, provenance (both: lost; absolute paths leak into published files) ---


def test_a_file_tells_its_sources_and_shares_and_no_path_of_the_machine(tmp_path: Path) -> None:
    made = {"sd_merge_recipe": json.dumps({"type": "webui", "primary": "x"}), "secret": "kept out"}
    models = write_models(tmp_path / "models", {"a+b": {"w": torch.ones(3)}, "c": {"w": torch.zeros(3)}}, made)
    wanted = request(
        models,
        tmp_path / "out",
        composites={"mix": ("a+b", "c")},
        selections={"listed": "c,mix"},
        targets=[TargetRequest("t", "t.safetensors", selection="listed")],
    )
    merge(wanted)
    raw = (tmp_path / "out" / "t.safetensors").read_bytes()
    assert str(tmp_path).encode() not in raw
    assert os.uname().nodename.encode() not in raw
    with safe_open(tmp_path / "out" / "t.safetensors", "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["mergeflow"])
    assert recipe["components"]["all"]["shares"] == {"c": "3/4", "a+b": "1/4"}
    assert recipe["components"]["all"]["list"] == ["c", "mix"]
    assert recipe["composites"] == {"mix": ["a+b", "c"]}
    lineage = json.loads(metadata["sd_merge_models"])
    assert {id: entry["name"] for id, entry in lineage.items()} == {"c": "c.safetensors", "a+b": "a+b.safetensors"}
    assert lineage["c"]["sd_merge_recipe"] == {"type": "webui", "primary": "x"}


def test_the_same_recipe_elsewhere_gives_the_same_file(tmp_path: Path) -> None:
    files = []
    for place in (tmp_path / "one", tmp_path / "quite" / "another place"):
        models = write_models(place / "models", toy_models())
        merge(toy_request(models, place / "out"))
        files.append((place / "out" / "first.safetensors").read_bytes())
    assert files[0] == files[1]


# --- resume, dry run, several machines (both: none) ---


def test_a_dry_run_reads_no_tensor_and_writes_nothing(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", toy_models())
    store = CountingStore(LocalStore())
    before = everything_in(tmp_path)
    page = explain(open_plan(toy_request(models, tmp_path / "out"), store))
    assert "nothing forbids this plan" in page
    assert f"first -> {tmp_path}/out/first.safetensors" in page
    assert everything_in(tmp_path) == before == ["models"]
    for path in store.paths_read():
        raw = Path(path).read_bytes()
        assert max(extent.end for extent in store.reads(path)) == 8 + int.from_bytes(raw[:8], "little")
