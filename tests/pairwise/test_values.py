"""Values that are not finite, sums that are too large, and whole numbers that differ: told, or as by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mergeflow.errors import ConfigError, MergeflowError, UnmergeableValues
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.recipe.recorded import Merge
from mergeflow.recipe.request import Policies
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from tests.byhand.files import write
from tests.byhand.floats import FLOATS, as_float64, tensor
from tests.byhand.samples import sample
from tests.byhand.tree import balanced
from tests.pairwise.checkpoints import IDS, UNET, name
from tests.pairwise.sides import RECORDED, asked, assert_same, by_engine, by_hand, by_hand_as_recorded

if TYPE_CHECKING:
    from pathlib import Path

W = f"{UNET}w.weight"
PROPAGATE = Policies(keys="webui", nonfinite="propagate")


def models(directory: Path, *rows: list[float], dtype: str = "F16", key: str = W) -> list[Path]:
    """One model with one tensor for every row."""
    directory.mkdir(parents=True, exist_ok=True)
    return [
        write(directory / f"{name(index)}.safetensors", {key: tensor(dtype, row)}) for index, row in enumerate(rows)
    ]


def refusal(directory: Path, **changes: Any) -> str:
    with pytest.raises(MergeflowError) as caught:
        by_engine(directory, directory / "out", "all", **changes)
    assert isinstance(caught.value, UnmergeableValues)
    assert not list((directory / "out").glob("*.safetensors"))
    return str(caught.value)


# --- NaN and infinity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("broken", [0, 3, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_model_with_what_is_not_finite_is_named(tmp_path: Path, broken: int, value: float, dtype: str) -> None:
    rows = [[1.0, 2.0, 3.0] for _ in range(5)]
    rows[broken][1] = value
    models(tmp_path, *rows, dtype=dtype)
    what = "1 NaN" if np.isnan(value) else "1 infinite"
    assert f"'{W}': model {name(broken)} has {what} value(s) from element 1 on" in refusal(tmp_path)


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in FLOATS), ("F16", "F32", "BF16")], ids=" ".join)
@pytest.mark.parametrize("scalars", ["opmath", "half"])
def test_what_is_not_finite_travels_as_by_hand(tmp_path: Path, scalars: Any, dtypes: tuple[str, ...]) -> None:
    paths = []
    for index in range(6):
        value = sample(dtypes[index % len(dtypes)], 2000, index)
        large = np.isfinite(as_float64(value)) & (abs(as_float64(value)) > 1e4)
        value.values[large] = 0  # so that no sum overflows, which is an error whatever the policy
        paths.append(write(tmp_path / f"{name(index)}.safetensors", {W: value}))
    found = by_engine(tmp_path, tmp_path / "out", "all", policies=PROPAGATE, rules=Rules(scalars=scalars))
    expected = by_hand(paths, balanced(6), tmp_path / "work", scalars=scalars)
    assert_same(found, expected)
    values = as_float64(found[W])
    assert np.isnan(values).any()
    assert np.isinf(values).any()
    assert np.isfinite(values).any()


def test_differences_of_infinities_travel_as_by_hand(tmp_path: Path) -> None:
    inf, nan = np.inf, np.nan
    models(tmp_path, [1, inf, 1, 1, inf, 0], [inf, 1, inf, nan, -inf, -0.0], [1, 1, inf, 1, 1, 0])
    merges = {"n": Merge(("00", "01", "02"), 0.5, "add_difference")}
    wanted = asked(tmp_path, tmp_path / "out", "all", targets=(RECORDED,), recorded=merges, policies=PROPAGATE)
    result = run(open_plan(wanted), LocalExecutor(wanted.budget))
    assert result.tolerated == {("00", W): 2, ("01", W): 4, ("02", W): 1}
    found = by_engine(tmp_path, tmp_path / "out", "all", targets=(RECORDED,), recorded=merges, policies=PROPAGATE)
    assert_same(found, by_hand_as_recorded(tmp_path, tmp_path / "work", merges))


def test_what_is_not_finite_in_what_a_alone_has_is_refused_too(tmp_path: Path) -> None:
    models(tmp_path, [1.0, np.nan], key=f"{UNET}only.weight")
    write(tmp_path / "b.safetensors", {W: tensor("F16", [1.0])})
    assert "model 00 has 1 NaN" in refusal(tmp_path)


def test_a_tree_skips_nothing(tmp_path: Path) -> None:
    models(tmp_path, [1.0], [2.0])
    with pytest.raises(ConfigError, match="nonfinite=skip has no meaning for a tree"):
        open_plan(asked(tmp_path, tmp_path / "out", "all", policies=Policies(keys="webui", nonfinite="skip")))


# --- overflow -------------------------------------------------------------------------------------------------------

HELPS = (
    "choose method.arithmetic=float64, or method.save_half=false where the models are wider than F16, and dtype=bf16 "
    "or dtype=fp32"
)


@pytest.mark.parametrize("policies", [Policies(keys="webui"), PROPAGATE], ids=["error", "propagate"])
def test_a_tree_that_overflows_within_says_so_and_what_helps(tmp_path: Path, policies: Policies) -> None:
    models(tmp_path, [1.0, 90000.0], [2.0, 70000.0], [3.0, 70000.0], [4.0, 70000.0], dtype="F32")
    for dtype in ("keep", "fp16"):
        assert refusal(tmp_path, dtype=dtype, policies=policies) == (
            f"'{W}' overflows F16 within its tree: element 1 would come to 75000, but a merge on the way makes more "
            f"of it than the 65,504 that F16 holds; {HELPS}"
        )
    assert HELPS.removesuffix(", and dtype=bf16 or dtype=fp32") in refusal(tmp_path, dtype="fp32", policies=policies)


def test_an_inner_merge_may_overflow_although_the_result_would_fit(tmp_path: Path) -> None:
    paths = models(tmp_path, [90000.0], [70000.0], [-3.0], [-4.0], dtype="F32")
    assert refusal(tmp_path).endswith("method.save_half=false where the models are wider than F16")
    found = by_engine(tmp_path, tmp_path / "out", "all", rules=Rules("float64"))
    assert found[W].values.tolist() == [np.float16(39998.25)]
    found = by_engine(tmp_path, tmp_path / "out", "all", tree=TreeOptions(save_half=False), dtype="fp16")
    full = by_hand(paths, balanced(4), tmp_path / "work", save_half=False)[W].values
    assert found[W].values.tolist() == full.astype("f2").tolist()


def test_what_helps_does_help(tmp_path: Path) -> None:
    paths = models(tmp_path, [1.0, 90000.0], [2.0, 70000.0], [3.0, 70000.0], [4.0, 70000.0], dtype="F32")
    full = by_hand(paths, balanced(4), tmp_path / "work", save_half=False)
    for changes in ({"rules": Rules("float64")}, {"tree": TreeOptions(save_half=False)}):
        assert_same(by_engine(tmp_path, tmp_path / "out", "all", dtype="fp32", **changes), full)
        assert by_engine(tmp_path, tmp_path / "out", "all", dtype="bf16", **changes)[W].dtype == "BF16"


def test_a_top_that_overflows_only_the_output_is_told_as_ever(tmp_path: Path) -> None:
    models(tmp_path, [90000.0], [70000.0], dtype="F32")
    told = "overflows F16: the value of element 0 is 80000, and F16 holds up to 65,504; choose dtype=bf16 or dtype=fp32"
    assert told in refusal(tmp_path, rules=Rules("float64"), dtype="fp16")
    assert told in refusal(tmp_path, tree=TreeOptions(save_half=False), dtype="fp16")


def test_bf16_overflows_within_as_well(tmp_path: Path) -> None:
    models(tmp_path, [3e38], [3e38], [-3e38], dtype="BF16")
    merges = {"a": Merge(("00", "01", "02"), 1.0, "add_difference"), "n": Merge(("00", "a"), 0.0)}
    told = refusal(tmp_path, targets=(RECORDED,), recorded=merges)
    assert "overflows BF16 within its tree: element 0 would come to 3" in told
    assert "wider than BF16" in told


def test_a_difference_of_fp16_overflows_even_where_nothing_is_halved(tmp_path: Path) -> None:
    models(tmp_path, [0.0], [60000.0], [-60000.0])
    merges = {"n": Merge(("00", "01", "02"), 0.5, "add_difference", save_half=False)}
    wanted: dict[str, Any] = {"targets": (RECORDED,), "recorded": merges}
    assert "overflows F16 within its tree: element 0 would come to 60000" in refusal(tmp_path, **wanted)
    found = by_engine(tmp_path, tmp_path / "out", "all", rules=Rules("float64"), **wanted)
    assert found[W].values.tolist() == [np.float16(60000)]


# --- position ids ---------------------------------------------------------------------------------------------------


def test_position_ids_that_are_fixed_must_agree(tmp_path: Path) -> None:
    models(tmp_path, [0.0, 1.0, 2.0], [0.0, 1.0, 3.0], key=IDS)
    fix = Policies(keys="webui", position_ids="fix")
    assert "element 2 is 3 in model 01, but 2 in model 00" in refusal(tmp_path, policies=fix)


@pytest.mark.parametrize("key", [W, IDS])
def test_a_shape_that_differs_is_told_once(tmp_path: Path, key: str) -> None:
    models(tmp_path, [1.0, 2.0], [1.0, 2.0], [1.0], key=key)
    fix = Policies(keys="webui", position_ids="fix")
    (problem,) = open_plan(asked(tmp_path, tmp_path / "out", "all", policies=fix)).problems
    assert f"model 02 has 1 tensor(s) of another shape than most: '{key}' is [1], not [2]" in str(problem)
