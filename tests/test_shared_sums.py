"""Targets that share their lists are added together, and each file is what it is alone: byte for byte, and in errors.

Every target leaves another entry out of one list, so that nearly all that they add is in common.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.errors import UnmergeableValues
from mergeflow.execute import arithmetic
from mergeflow.execute.local import LocalExecutor
from mergeflow.execute.ray import RayExecutor, RayOptions
from mergeflow.merge import open_plan
from mergeflow.methods.uniform import Uniform
from mergeflow.plan.tiles import PIECE, SCRATCH
from mergeflow.recipe.request import Budget, Policies, TargetRequest
from tests.models import merge, request, write_models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from pathlib import Path
    from typing import Any

    from torch import Tensor

    from mergeflow.interfaces import Executor
    from mergeflow.merge import Result
    from mergeflow.plan.plan import Strip
    from mergeflow.recipe.request import Nonfinite, Request

MIB = 1 << 20
ONE = Budget(workers=1, reads_in_flight=1, memory=64 * MIB)
TWO = Budget(workers=2, reads_in_flight=2, memory=128 * MIB)
TIGHT = Budget(workers=1, reads_in_flight=1, memory=SCRATCH + 5 * MIB)

ELEMENTS = PIECE + 7000
ENTRIES = ("1", "2", "3", "4", "5", "6a")
COMPOSITES = {"6a": ("6", "7")}
LISTS = {f"not-{left}": [entry for entry in ENTRIES if entry != left] for left in ENTRIES}
DTYPES = ("fp16", "fp16", "fp16", "bf16", "fp32", "keep")
SERIES = [
    TargetRequest(name, f"{name}.safetensors", dtype, name) for name, dtype in zip(LISTS, DTYPES, strict=True)
] + [TargetRequest("all", "all.safetensors", "fp32", "whole")]
BY_NAME = {target.name: target for target in SERIES}


def collection() -> dict[str, dict[str, Tensor]]:
    """Seven models with a tensor of every kind: sums of one word, of two, and such as are made alone."""
    mixed = (torch.float16, torch.bfloat16, torch.float32)
    models = {}
    for number in range(1, 8):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(ELEMENTS, generator=generator) * 0.05
        decades = 10.0 ** -(8 * torch.rand(ELEMENTS, generator=generator))
        models[str(number)] = {
            "big": noise.half(),
            "small": noise[:100].half() * 0.125,
            "bf16": noise[:3000].bfloat16(),
            "fp32": noise[:3000].clamp(min=-1.0, max=1.0),
            "wide": noise[:3000] * decades[:3000],
            "wider": noise[:3000] * decades[:3000] ** 4,
            "fp64": noise[:500].double() + 2.0**-50,
            "fp8": noise[:500].to(torch.float8_e4m3fn),
            "mixed": noise[:2000].to(mixed[number % 3]),
            "zeros": torch.zeros(70) * (-1) ** number,
            "cancels": torch.full((70,), 0.3 * (-1) ** number).half(),
            "scalar": noise[0].half(),
            "empty": torch.zeros(0, 3).half(),
            "ids": torch.arange(77),
        }
    return models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("series"), collection())


def asked(
    models: Path,
    out: Path,
    targets: Sequence[TargetRequest] = SERIES,
    budget: Budget = ONE,
    nonfinite: Nonfinite = "error",
) -> Request:
    return request(
        models,
        out,
        selections={**LISTS, "whole": list(ENTRIES)},
        composites=COMPOSITES,
        targets=targets,
        policies=Policies(nonfinite=nonfinite),
        budget=budget,
    )


def files(out: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (out / f"{name}.safetensors").read_bytes() for name in names}


def each_alone(models: Path, out: Path, nonfinite: Nonfinite = "error") -> dict[str, Result | str]:
    """What comes of every target in a run of its own, or why nothing does."""
    made: dict[str, Result | str] = {}
    for name, target in BY_NAME.items():
        try:
            made[name] = merge(asked(models, out, [target], nonfinite=nonfinite))
        except UnmergeableValues as error:
            made[name] = str(error)
    return made


@pytest.fixture(scope="module")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The files of the series, each made in a run of its own."""
    out = tmp_path_factory.mktemp("alone")
    each_alone(models, out)
    return files(out, list(BY_NAME))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """How many means of every tensor were made together, in any of its tiles."""
    made: dict[str, set[int]] = defaultdict(set)
    at_once = arithmetic._make_at_once

    def noted(strip: Strip, *given: Any) -> AbstractSet[int]:
        done = at_once(strip, *given)
        made[strip.key].add(len(done))
        return done

    monkeypatch.setattr(arithmetic, "_make_at_once", noted)
    return made


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [ONE, TWO, TIGHT], ids=["one-worker", "two-workers", "tight"])
def test_targets_together_are_what_each_is_alone(
    models: Path, reference: Mapping[str, bytes], tmp_path: Path, budget: Budget
) -> None:
    plan = open_plan(asked(models, tmp_path, budget=budget))
    assert all(strip.sums for strip in plan.strips if strip.key != "ids")
    merge(asked(models, tmp_path, budget=budget), LocalExecutor(budget))
    assert files(tmp_path, list(BY_NAME)) == reference


@pytest.mark.usefixtures("ray")
def test_actors_make_the_same_of_them(models: Path, reference: Mapping[str, bytes], tmp_path: Path) -> None:
    merge(asked(models, tmp_path, budget=TWO), RayExecutor(TWO, RayOptions()))
    assert files(tmp_path, list(BY_NAME)) == reference


@pytest.mark.parametrize("names", [("not-1", "not-4"), ("not-6a", "all"), ("not-2", "not-3", "not-5", "not-6a")])
def test_it_does_not_matter_which_targets_are_together(
    models: Path, reference: Mapping[str, bytes], tmp_path: Path, names: Sequence[str]
) -> None:
    merge(asked(models, tmp_path, [BY_NAME[name] for name in reversed(names)]))
    assert files(tmp_path, names) == {name: reference[name] for name in names}


def test_means_are_made_together_wherever_their_bits_are_certain(
    models: Path, tmp_path: Path, shared: Mapping[str, set[int]]
) -> None:
    merge(asked(models, tmp_path))
    # Products of fp64 may round, results in fp8 (of the target that keeps dtypes) have no place in machine code, and
    # "wider" needs more than two words.
    fewer = {"fp64": {1}, "fp8": {len(SERIES) - 1}, "wider": {0}, "ids": {0}}
    assert shared == {key: fewer.get(key, {len(SERIES)}) for key in collection()["1"] if key != "empty"}


def test_what_is_made_together_is_not_made_alone_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("this mean is there already")

    monkeypatch.setattr(Uniform, "merge", refuse)
    models = {id: {"big": tensors["big"]} for id, tensors in collection().items()}
    merge(asked(write_models(tmp_path / "models", models), tmp_path / "out"))


# --- what is not finite ---------------------------------------------------------------------------------------------


def with_nan(directory: Path, bad: str) -> Path:
    """The same models, of which one has a few values that are not finite, in one piece of one tensor and in another."""
    models = collection()
    models[bad]["big"][[5, PIECE + 3]] = torch.tensor([math.nan, math.inf]).half()
    models[bad]["wide"][7] = -math.inf
    models["2"]["wide"][7] = math.inf
    return write_models(directory, models)


@pytest.mark.parametrize("bad", ["1", "4", "7"])
@pytest.mark.parametrize("policy", ["skip", "propagate"])
@pytest.mark.parametrize("budget", [ONE, TWO], ids=["one-worker", "two-workers"])
def test_what_is_tolerated_is_tolerated_together_as_alone(
    tmp_path: Path, bad: str, policy: Nonfinite, budget: Budget
) -> None:
    models = with_nan(tmp_path / "models", bad)
    alone = each_alone(models, tmp_path / "alone", policy)
    result = merge(asked(models, tmp_path / "together", budget=budget, nonfinite=policy), LocalExecutor(budget))
    assert files(tmp_path / "together", list(BY_NAME)) == files(tmp_path / "alone", list(BY_NAME))
    counted: dict[tuple[str, str], int] = {}
    for one in alone.values():
        assert not isinstance(one, str)
        counted |= one.tolerated
    assert result.tolerated == counted


@pytest.mark.parametrize(("bad", "without"), [("1", "not-1"), ("4", "not-4"), ("7", "not-6a")])
def test_a_nan_ends_the_run_with_what_the_first_target_says_that_has_it(tmp_path: Path, bad: str, without: str) -> None:
    models = collection()
    models[bad]["big"][[5, PIECE + 3]] = math.nan
    directory = write_models(tmp_path / "models", models)
    alone = each_alone(directory, tmp_path / "alone")
    failed = [result for result in alone.values() if isinstance(result, str)]
    assert {name for name, result in alone.items() if not isinstance(result, str)} == {without}
    with pytest.raises(UnmergeableValues) as caught:
        merge(asked(directory, tmp_path / "together"))
    assert str(caught.value) == failed[0]
    assert list((tmp_path / "together").glob("*")) == []


def test_a_nan_in_a_model_that_no_target_selects_does_no_harm(
    tmp_path: Path, models: Path, shared: Mapping[str, set[int]]
) -> None:
    broken = collection()
    broken["3"]["big"][9] = math.nan
    directory = write_models(tmp_path / "models", broken)
    # Both need the header of model 3, whose keys they take, and none of its values.
    kept = [
        TargetRequest(name, f"{name}.safetensors", dtype, "not-3", keys_from="3")
        for name, dtype in (("one", "fp16"), ("other", "fp32"))
    ]
    merge(asked(directory, tmp_path / "out", kept))
    assert shared["big"] == {2}
    merge(asked(models, tmp_path / "whole", [BY_NAME["not-3"]]))


def test_what_overflows_is_told_of_the_target_that_it_overflows(tmp_path: Path) -> None:
    models = {str(number): {"w": torch.full((50,), 70_000.0 if number == 3 else 60_000.0)} for number in range(1, 8)}
    for number in (1, 2, 4):
        models[str(number)]["w"][40] = 66_000.0
    models["5"]["w"][40] = 64_000.0
    models["3"]["w"][40] = 65_000.0
    models["6"]["w"][40] = models["7"]["w"][40] = 65_600.0
    directory = write_models(tmp_path / "models", models)
    narrow = [TargetRequest(name, f"{name}.safetensors", "fp16", name) for name in LISTS]
    outcomes = []
    for target in narrow:
        try:
            merge(asked(directory, tmp_path / "alone", [target]))
            outcomes.append("")
        except UnmergeableValues as error:
            outcomes.append(str(error))
    failing = [text for text in outcomes if text]
    assert 0 < len(failing) < len(outcomes)
    assert all("'w' overflows F16: the value of element 40" in text for text in failing)
    with pytest.raises(UnmergeableValues) as caught:
        merge(asked(directory, tmp_path / "together", narrow))
    assert str(caught.value) == failing[0]


# --- executors ------------------------------------------------------------------------------------------------------


def test_runs_in_a_row_and_other_executors_keep_nothing_of_each_other(
    models: Path, reference: Mapping[str, bytes], tmp_path: Path
) -> None:
    executor: Executor = LocalExecutor(TWO)
    for turn, names in enumerate((list(BY_NAME), ["not-1", "not-2"], ["all"], list(BY_NAME))):
        out = tmp_path / str(turn)
        merge(asked(models, out, [BY_NAME[name] for name in names], TWO), executor)
        assert files(out, names) == {name: reference[name] for name in names}
