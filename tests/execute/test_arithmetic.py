"""Values that must not pass unseen: what the policies make of NaN, infinity, overflow and integers, in whole merges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from mergeflow.errors import UnmergeableValues
from mergeflow.methods.exact import INTEGER_VIEW
from mergeflow.recipe.request import PartRequest, Policies, TargetRequest
from tests.methods.reference import FP16, expected_mean, number, numbers, same_bits
from tests.models import TOY, merge, merged, request, toy_model, write_models

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from mergeflow.recipe.request import Nonfinite

ELEMENTS = 40_000
"""More than are merged at a time, so that positions are counted over several pieces."""

SKIP, PROPAGATE = Policies(nonfinite="skip"), Policies(nonfinite="propagate")


def three() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {id: {"w": torch.randn(ELEMENTS, generator=generator).half()} for id in ("a", "b", "c")}


# --- NaN and infinity -----------------------------------------------------------------------------------------------


def test_a_nan_is_an_error_that_names_model_key_count_and_place(tmp_path: Path) -> None:
    models = three()
    models["b"]["w"][[33_333, 33_334, 33_339]] = torch.tensor([math.nan, math.inf, math.nan]).half()
    with pytest.raises(UnmergeableValues) as caught:
        merged(tmp_path, models)
    assert "'w': model b has 2 NaN and 1 infinite value(s) from element 33,333 on" in str(caught.value)
    assert "nonfinite=skip" in str(caught.value)
    assert "model a" not in str(caught.value)


def test_all_models_that_have_one_in_the_same_place_are_named(tmp_path: Path) -> None:
    models = three()
    models["a"]["w"][35_000] = models["c"]["w"][35_001] = -math.inf
    with pytest.raises(
        UnmergeableValues, match=r"model a has 1 infinite .* 35,000 on, model c has 1 infinite .*35,001"
    ):
        merged(tmp_path, models)


def test_a_hundred_models_with_nan_make_a_short_message(tmp_path: Path) -> None:
    models = {f"{index:03}": {"w": torch.full((5,), math.nan)} for index in range(100)}
    with pytest.raises(UnmergeableValues, match=r"and 96 more") as caught:
        merged(tmp_path, models)
    assert len(str(caught.value)) < 600


def test_a_nan_in_a_model_that_is_taken_as_it_is_is_an_error_too(tmp_path: Path) -> None:
    model = toy_model(1)
    model["vae.conv.bias"][3] = math.nan
    with pytest.raises(UnmergeableValues, match=r"'vae.conv.bias': model 1 has 1 NaN"):
        merged(tmp_path, {"1": model}, arch=TOY)


def test_a_nan_where_nobody_selects_it_does_no_harm(tmp_path: Path) -> None:
    models = three()
    models["b"]["w"][:] = math.nan
    assert merged(tmp_path, models, listed="a,c").tensors["w"].isfinite().all()


def test_skip_is_the_mean_of_what_is_finite_and_counts_the_rest(tmp_path: Path) -> None:
    models = three()
    holes = [5, 37_000, 39_999]
    models["a"]["w"][holes[:2]] = math.nan
    models["b"]["w"][holes[1:]] = math.inf
    made = merged(tmp_path, models, policies=SKIP)
    columns = list(zip(*(model["w"].tolist() for model in models.values()), strict=True))
    for element in (0, 5, 6, 36_999, 37_000, 39_998, 39_999):
        left = [value for value in columns[element] if math.isfinite(value)]
        assert number(made.tensors["w"][element]) == expected_mean(left, [1] * len(left), FP16)
    assert made.result.tolerated == {("a", "w"): 2, ("b", "w"): 2}


def test_shares_are_renewed_exactly_when_a_member_of_a_composite_is_skipped(tmp_path: Path) -> None:
    values = {"1": 1.0, "2": 2.0, "3": math.nan, "4": 5.0}
    models = write_models(tmp_path / "models", {id: {"w": torch.tensor([value])} for id, value in values.items()})
    wanted = request(
        models,
        tmp_path / "out",
        composites={"9": ("3", "4")},
        selections={"listed": "1,2,9"},
        targets=[TargetRequest("t", "t.safetensors", selection="listed")],
        policies=SKIP,
    )
    merge(wanted)
    # 1/3, 1/3, 1/6, 1/6; without the third that is 2/5, 2/5, 1/5.
    assert load_file(tmp_path / "out" / "t.safetensors")["w"].tolist() == [torch.tensor(11 / 5).item()]


def test_what_is_tolerated_counts_once_although_several_targets_use_it(tmp_path: Path) -> None:
    models = three()
    models["a"]["w"][[1, 2, 30_000]] = math.nan
    wanted = request(
        write_models(tmp_path / "models", models),
        tmp_path / "out",
        selections={"some": "a,b"},
        targets=[
            TargetRequest("one", "one.safetensors", selection="all"),
            TargetRequest("two", "two.safetensors", selection="some", dtype="fp32"),
            TargetRequest("three", "three.safetensors", selection="some"),
        ],
        policies=SKIP,
    )
    result = merge(wanted)
    assert result.tolerated == {("a", "w"): 3}
    assert sum(count for receipt in result.receipts for _, _, count in receipt.skipped) == 3


def test_propagate_lets_values_travel_as_ieee_has_it_and_counts_them(tmp_path: Path) -> None:
    models = {
        "a": {"w": torch.tensor([math.inf, math.inf, math.nan, -math.inf, 1.0, 60000.0]).half()},
        "b": {"w": torch.tensor([1.0, -math.inf, 1.0, -math.inf, 2.0, 60000.0]).half()},
    }
    made = merged(tmp_path, models, policies=PROPAGATE)
    assert [str(value) for value in numbers(made.tensors["w"])] == ["inf", "nan", "nan", "-inf", "3/2", "60000"]
    assert made.result.tolerated == {("a", "w"): 4, ("b", "w"): 2}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("listed", ["all", "a"], ids=["mean", "copy"])
def test_a_nan_has_the_same_bits_wherever_it_stands(dtype: str, listed: str, tmp_path: Path) -> None:
    models = {id: {"w": torch.full((33,), math.nan, dtype=torch.float64)} for id in "ab"}
    made = merged(tmp_path, models, policies=PROPAGATE, dtype=dtype, listed=listed).tensors["w"]
    assert same_bits(made, torch.full((33,), math.nan, dtype=made.dtype))
    assert len(set(made.view(INTEGER_VIEW[made.element_size()]).tolist())) == 1


def test_propagate_keeps_the_bits_of_a_model_that_is_taken_as_it_is(tmp_path: Path) -> None:
    model = toy_model(1)
    special = torch.tensor([0x7E01, 0xFE77 - 2**16, 0x7C00, 0x8000 - 2**16, 0x0001], dtype=torch.int16)
    model["vae.conv.bias"] = special.view(torch.float16)
    wanted = request(
        write_models(tmp_path / "models", {"1": model, "2": toy_model(2)}),
        tmp_path / "out",
        arch=TOY,
        targets=[
            TargetRequest("t", "t.safetensors", selection="all", components={"vae": PartRequest(model="1")}),
        ],
        policies=PROPAGATE,
    )
    merge(wanted)
    made = load_file(tmp_path / "out" / "t.safetensors")
    assert same_bits(made["vae.conv.bias"], model["vae.conv.bias"])
    assert same_bits(made["vae.conv.weight"], model["vae.conv.weight"])


def test_an_element_that_is_finite_nowhere_cannot_be_skipped(tmp_path: Path) -> None:
    models = three()
    for model in models.values():
        model["w"][34_567] = math.nan
    with pytest.raises(UnmergeableValues, match=r"'w': no selected model has a finite value at element 34,567"):
        merged(tmp_path, models, policies=SKIP)


# --- overflow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["error", "skip", "propagate"])
@pytest.mark.parametrize(
    ("source", "value", "dtype", "code", "remedy"),
    [
        pytest.param(torch.float32, 70_000.0, "fp16", "F16", "dtype=bf16 or dtype=fp32", id="fp16"),
        pytest.param(torch.float64, 1e300, "fp32", "F32", "no dtype of an output holds it", id="fp32"),
        pytest.param(torch.float64, 3.4e38, "bf16", "BF16", "dtype=fp32", id="bf16-but-fp32-holds-it"),
    ],
)
def test_overflow_names_the_key_and_what_would_hold_it(
    tmp_path: Path, source: torch.dtype, value: float, dtype: str, code: str, remedy: str, policy: Nonfinite
) -> None:
    row = torch.zeros(ELEMENTS, dtype=source)
    row[38_000] = value
    other = row.clone()
    if policy != "error":
        other[38_001] = math.nan  # elsewhere, so that the careful path is taken
    with pytest.raises(UnmergeableValues) as caught:
        merged(tmp_path, {"a": {"w": row}, "b": {"w": other}}, dtype=dtype, policies=Policies(nonfinite=policy))
    assert f"'w' overflows {code}: the value of element 38,000 is {row[38_000].item():g}" in str(caught.value)
    assert remedy in str(caught.value)


def test_a_mean_that_fits_is_no_overflow_although_the_sum_and_a_source_do_not(tmp_path: Path) -> None:
    models = {"a": {"w": torch.tensor([65504.0]).half()}, "b": {"w": torch.tensor([100_000.0])}}
    made = merged(tmp_path, {**models, "c": {"w": torch.tensor([3.0])}}, dtype="fp16")
    assert number(made.tensors["w"][0]) == expected_mean([65504.0, 100_000.0, 3.0], [1, 1, 1], FP16)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_that_is_kept_overflows_like_any_other(tmp_path: Path, dtype: torch.dtype) -> None:
    models = {"a": {"w": torch.tensor([1.0]).to(dtype)}, "b": {"w": torch.tensor([200_000.0])}}
    with pytest.raises(UnmergeableValues, match=r"'w' overflows F8_E\dM\d: .*100000.*dtype=bf16 or dtype=fp32"):
        merged(tmp_path, models)


def test_fp8_beyond_its_range_points_to_fp16(tmp_path: Path) -> None:
    models = {"a": {"w": torch.tensor([448.0]).to(torch.float8_e4m3fn)}, "b": {"w": torch.tensor([500.0])}}
    with pytest.raises(UnmergeableValues, match=r"'w' overflows F8_E4M3: .*474.*up to 448; choose dtype=fp16 or"):
        merged(tmp_path, models)


# --- integers -------------------------------------------------------------------------------------------------------


def with_ids(seed: int, ids: Tensor) -> dict[str, Tensor]:
    return toy_model(seed) | {"text.position_ids": ids}


IDS = torch.arange(77).view(1, 77)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32], ids=str)
def test_position_ids_in_any_dtype_count_by_value_and_are_written_as_int64(tmp_path: Path, dtype: torch.dtype) -> None:
    made = merged(tmp_path, {"1": with_ids(1, IDS.to(dtype)), "2": with_ids(2, IDS)}, arch=TOY)
    assert same_bits(made.tensors["text.position_ids"].flatten(), IDS.flatten())


def test_integers_that_disagree_are_an_error_that_names_models_and_values(tmp_path: Path) -> None:
    other = IDS.clone()
    other[0, 70] = 1_234_567
    with pytest.raises(UnmergeableValues) as caught:
        merged(tmp_path, {"1": with_ids(1, IDS), "2": with_ids(2, IDS), "3": with_ids(3, other)}, arch=TOY)
    assert "'text.position_ids' is not a tensor to average" in str(caught.value)
    assert "element 70 is 1,234,567 in model 3, but 70 in model 1" in str(caught.value)
    assert "keys.integers=first" in str(caught.value)


def test_integers_of_the_first_model_are_taken_when_that_is_chosen(tmp_path: Path) -> None:
    models = {"1": with_ids(1, IDS.half() + 1), "2": with_ids(2, IDS)}
    made = merged(tmp_path, models, arch=TOY, policies=Policies(integers="first"))
    assert same_bits(made.tensors["text.position_ids"].flatten(), IDS.flatten() + 1)


@pytest.mark.parametrize("policies", [Policies(), Policies(integers="first"), SKIP, PROPAGATE])
def test_position_ids_that_were_broken_by_averaging_are_an_error(tmp_path: Path, policies: Policies) -> None:
    broken = IDS.half()
    broken[0, 3] = 2.998
    with pytest.raises(UnmergeableValues, match=r"'text.position_ids' .* element 3 of model 1 is 2\.998") as caught:
        merged(tmp_path, {"1": with_ids(1, broken), "2": with_ids(2, IDS)}, arch=TOY, policies=policies)
    assert "keys.integers=first" not in str(caught.value)


def test_a_broken_model_that_is_not_the_first_is_the_one_that_is_named(tmp_path: Path) -> None:
    broken = IDS.half()
    broken[0, 3] = 2.998
    with pytest.raises(UnmergeableValues, match=r"element 3 is 2\.998046\d+ in model 2, but 3 in model 1"):
        merged(tmp_path, {"1": with_ids(1, IDS), "2": with_ids(2, broken)}, arch=TOY)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int8, torch.uint32, torch.bool], ids=str)
def test_integers_without_an_architecture_are_copied_in_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    row = torch.tensor([0, 1, 1, 0]).to(dtype)
    made = merged(tmp_path, {"a": {"n": row, "w": torch.ones(2)}, "b": {"n": row, "w": torch.zeros(2)}})
    assert same_bits(made.tensors["n"], row)
    assert made.tensors["w"].tolist() == [0.5, 0.5]
    with pytest.raises(UnmergeableValues, match="'n' is not a tensor to average"):
        merged(tmp_path / "differ", {"a": {"n": row}, "b": {"n": torch.tensor([0, 1, 0, 0]).to(dtype)}})


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_zero_size_and_0_dim_tensors_are_merged_like_any_other(tmp_path: Path) -> None:
    models = {
        id: {
            "empty": torch.zeros(0, 4).half(),
            "scalar": torch.tensor(float(value)).half(),
            "one": torch.tensor([[[float(value)]]]),
            "none": torch.zeros(3, 0, 2, dtype=torch.int64),
        }
        for id, value in (("a", 1), ("b", 2), ("c", 6))
    }
    made = merged(tmp_path, models).tensors
    assert {key: (value.shape, value.dtype) for key, value in made.items()} == {
        key: (value.shape, value.dtype) for key, value in models["a"].items()
    }
    assert made["scalar"].item() == 3
    assert made["one"].flatten().tolist() == [3]


def test_an_output_of_nothing_but_zero_size_tensors_is_a_file(tmp_path: Path) -> None:
    made = merged(tmp_path, {id: {"empty": torch.zeros(0, 4)} for id in ("a", "b")})
    assert made.tensors["empty"].shape == (0, 4)
    assert made.plan.shards == ()


@pytest.mark.parametrize(
    ("dtype", "becomes"),
    [("keep", torch.bfloat16), ("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_the_output_has_the_dtype_that_is_asked_for(tmp_path: Path, dtype: str, becomes: torch.dtype) -> None:
    models = {"a": {"w": torch.tensor([1.0]).bfloat16()}, "b": {"w": torch.tensor([2.0])}}
    made = merged(tmp_path, models, dtype=dtype)
    assert made.tensors["w"].dtype == becomes
    assert made.tensors["w"].item() == 1.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_keep_keeps_rare_dtypes_too(tmp_path: Path, dtype: torch.dtype) -> None:
    models = {id: {"w": torch.tensor([value, -8.0]).to(dtype)} for id, value in (("a", 1.0), ("b", 2.0))}
    made = merged(tmp_path, models)
    assert made.tensors["w"].dtype == dtype
    assert [str(value) for value in numbers(made.tensors["w"])] == ["3/2", "-8"]
