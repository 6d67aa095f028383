from __future__ import annotations

import json
import pickle
from random import Random

import pytest
import safetensors.torch
import torch

from mergeflow.tensors import DTYPES, LAYOUT_ORDER, OUTPUT_DTYPES, Dtype, TensorInfo, si_bytes
from mergeflow.text import some


def torch_dtype(dtype: Dtype) -> torch.dtype:
    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)
    return found


def written_by_the_library(keys: dict[str, Dtype]) -> dict[str, str]:
    """The dtype of every tensor as the library writes it, in the order in which it lays them out."""
    data = safetensors.torch.save({key: torch.zeros(1, dtype=torch_dtype(dtype)) for key, dtype in keys.items()})
    return {key: entry["dtype"] for key, entry in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).items()}


@pytest.mark.parametrize("seed", range(3))
def test_the_layout_order_is_that_of_the_library(seed: int) -> None:
    names = [f"{number:02}" for number in range(len(Dtype))]
    Random(seed).shuffle(names)
    keys = dict(zip(names, Dtype, strict=True))
    assert list(written_by_the_library(keys)) == sorted(keys, key=lambda key: LAYOUT_ORDER[keys[key]])


def test_the_codes_are_those_of_the_library() -> None:
    assert written_by_the_library({dtype.name: dtype for dtype in Dtype}) == {d.name: d.code for d in Dtype}


@pytest.mark.parametrize("dtype", Dtype)
def test_what_a_dtype_says_of_itself_is_what_torch_says(dtype: Dtype) -> None:
    actual = torch_dtype(dtype)
    assert dtype.itemsize == actual.itemsize
    assert dtype.is_float == actual.is_floating_point
    assert dtype.is_fp8 == (actual.is_floating_point and actual.itemsize == 1)


@pytest.mark.parametrize("dtype", Dtype)
def test_a_dtype_is_found_by_its_code_and_survives_a_pickle(dtype: Dtype) -> None:
    assert DTYPES[dtype.code] is dtype
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert {dtype: 1}[DTYPES[dtype.code]] == 1


def test_output_dtypes_can_hold_a_mean() -> None:
    assert all(dtype is None or (dtype.is_float and not dtype.is_fp8) for dtype in OUTPUT_DTYPES.values())


@pytest.mark.parametrize(
    ("shape", "elements"),
    [((), 1), ((7,), 7), ((3, 4, 5), 60), ((3, 0, 5), 0)],
    ids=["0-dim", "vector", "block", "zero-size"],
)
def test_elements_are_the_product_of_the_shape(shape: tuple[int, ...], elements: int) -> None:
    assert TensorInfo(Dtype.F16, shape, 0, 0).elements == elements


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1536, "1.54 kB"),
        (12_345_678, "12.35 MB"),
        (6_938_040_682, "6.94 GB"),
        (999_000_000_000, "999.00 GB"),
        (1_783_000_000_000, "1.78 TB"),
        (5_000_000_000_000_000, "5,000.00 TB"),
        (-2500, "-2.50 kB"),
        (0.4, "0 B"),
    ],
)
def test_bytes_are_told_to_a_person(count: float, text: str) -> None:
    assert si_bytes(count) == text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b", "c", "d"], "a, b, c, d"),
        (["a", "b", "c", "d", "e"], "a, b, c, d and 1 more"),
        ([str(number) for number in range(2515)], "0, 1, 2, 3 and 2,511 more"),
    ],
    ids=["none", "one", "four", "five", "many"],
)
def test_names_for_a_message_are_few(names: list[str], text: str) -> None:
    assert some(names) == text


def test_how_many_names_are_few_can_be_said() -> None:
    assert some(["a", "b", "c"], limit=1) == "a and 2 more"
