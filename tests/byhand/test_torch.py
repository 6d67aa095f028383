"""The reference says what the installed torch does, one operation after the other, on bit patterns of every kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.byhand.floats import Tensor, bits, converted, of_bits, rounded, same, tensor
from tests.byhand.formulas import add_difference, comfyui, float32, float64, supermerger, to_half, weighted_sum
from tests.byhand.samples import TORCH, from_torch, sample, to_torch

COUNT = 3001
"""More than vectors hold, and a rest."""
MULTIPLIERS = (0.5, 0.2, 0.333, 1.0, 0.0526, 2.0, -0.3)
PAIRS = list(itertools.product(TORCH, TORCH))
FLOAT_PAIRS = [(one, other) for one, other in PAIRS if "I64" not in (one, other)]
NARROW = ("F16", "BF16")


def assert_same(found: Tensor, expected: torch.Tensor) -> None:
    wanted = from_torch(expected)
    assert found.dtype == wanted.dtype
    assert found.values.shape == wanted.values.shape
    differ = np.flatnonzero(bits(found) != bits(wanted))
    assert not differ.size, (differ.size, differ[:5], bits(found).flat[differ[:5]], bits(wanted).flat[differ[:5]])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_weighted_sum_is_that_of_torch(one: str, other: str) -> None:
    a, b = sample(one, COUNT, 1), sample(other, COUNT, 2)
    for m in MULTIPLIERS:
        assert_same(weighted_sum(a, b, m, "opmath"), (1 - m) * to_torch(a) + m * to_torch(b))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_before_2_1_the_scalar_takes_the_dtype_of_a_narrow_tensor(one: str, other: str) -> None:
    def times(value: Tensor, scalar: float) -> torch.Tensor:
        if value.dtype in NARROW:
            scalar = float(torch.tensor(scalar, dtype=torch.float32).to(TORCH[value.dtype]))
        return scalar * to_torch(value)

    a, b = sample(one, COUNT, 3), sample(other, COUNT, 4)
    for m in MULTIPLIERS:
        assert_same(weighted_sum(a, b, m, "half"), times(a, 1 - m) + times(b, m))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_difference_is_that_of_torch(one: str, other: str) -> None:
    a, b = sample(one, COUNT, 5), sample(other, COUNT, 6)
    for third, m in itertools.product(TORCH, (1.0, 0.35)):
        c = sample(third, COUNT, 7)
        assert_same(add_difference(a, b, c, m, "opmath"), to_torch(a) + m * (to_torch(b) - to_torch(c)))
    assert_same(add_difference(a, b, None, 0.35, "half"), to_torch(a) + 0.35 * torch.zeros_like(to_torch(b)))


@pytest.mark.parametrize(("one", "other"), FLOAT_PAIRS)
@pytest.mark.parametrize("alpha", [0.2, 0.333, 0.4999, 0.5, 0.75, 1.5, -0.25])
def test_supermergers_sum_is_a_lerp(one: str, other: str, alpha: float) -> None:
    a, b = sample(one, 701, 8), sample(other, 701, 9)
    expected = torch.lerp(to_torch(a).float(), to_torch(b).float(), alpha).to(TORCH[one])
    assert_same(supermerger(a, b, alpha), expected)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_sums_without_a_rounding_between_are_those_of_torch(one: str, other: str) -> None:
    a, b = sample(one, COUNT, 10), sample(other, COUNT, 11)
    first, second = to_torch(a), to_torch(b)
    for m in MULTIPLIERS:
        ratio = 1.0 - m
        patched = first.float().clone()
        patched *= ratio
        patched += (1.0 - ratio) * second.float()
        assert_same(comfyui(a, b, m), patched)
        assert_same(float32(a, b, m), (1 - m) * first.float() + m * second.float())
        assert_same(float64(a, b, m), (1 - m) * first.double() + m * second.double())


@pytest.mark.parametrize(("one", "other"), [pair for pair in PAIRS if pair[1] != "I64"])
def test_conversions_are_those_of_torch(one: str, other: str) -> None:
    value = sample(one, 10 * COUNT, 12)
    assert_same(converted(value, other), to_torch(value).to(TORCH[other]))


def test_torch_rounds_fp64_to_fp16_twice_and_the_reference_can_do_it_once() -> None:
    value = tensor("F64", [1 + 2**-11 + 2**-40])
    assert_same(converted(value, "F16"), torch.tensor([1.0]).half())
    assert_same(rounded(value.values, "F16"), torch.tensor([1 + 2**-10]).half())


def test_save_as_float16_is_half_of_what_is_fp32_alone() -> None:
    for dtype in TORCH:
        value = sample(dtype, COUNT, 13)
        expected = to_torch(value)
        assert_same(to_half(value), expected.half() if dtype == "F32" else expected)
        assert same(to_half(value, enable=False), value)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (3, 1, 5), (2, 33)], ids=str)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_shapes_change_nothing(one: str, other: str, shape: tuple[int, ...]) -> None:
    a, b = (
        Tensor(dtype, sample(dtype, int(np.prod(shape)), seed).values.reshape(shape))
        for dtype, seed in ((one, 14), (other, 15))
    )
    first, second = to_torch(a), to_torch(b)
    assert_same(weighted_sum(a, b, 0.2, "opmath"), 0.8 * first + 0.2 * second)
    assert_same(add_difference(a, b, a, 0.2, "opmath"), first + 0.2 * (second - first))
    assert_same(float64(a, b, 0.2), 0.8 * first.double() + 0.2 * second.double())
    if "I64" not in (one, other):
        assert_same(supermerger(a, b, 0.2), torch.lerp(first.float(), second.float(), 0.2).to(TORCH[one]))


@given(st.sampled_from(FLOAT_PAIRS), st.floats(-3, 3), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_any_two_values_at_any_multiplier_agree(pair: tuple[str, str], m: float, one: int, other: int) -> None:
    a, b = (
        of_bits(dtype, [drawn % 2 ** (8 * to_torch(tensor(dtype, [0])).element_size())])
        for dtype, drawn in zip(pair, (one, other), strict=True)
    )
    first, second = to_torch(a), to_torch(b)
    assert_same(weighted_sum(a, b, m, "opmath"), (1 - m) * first + m * second)
    assert_same(add_difference(a, b, b, m, "opmath"), first + m * (second - second))
    if m not in (0, 1):
        assert_same(supermerger(a, b, m), torch.lerp(first.float(), second.float(), m).to(TORCH[pair[0]]))
