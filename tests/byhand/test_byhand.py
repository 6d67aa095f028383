"""The reference computes what was measured of the tools, and rounds as fractions say."""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.byhand.floats import (
    Scalars,
    Tensor,
    as_float32,
    as_float64,
    bits,
    fused_multiply_add,
    of_bits,
    quantised,
    rounded,
    same,
    tensor,
)
from tests.byhand.formulas import add_difference, comfyui, float32, scaled, supermerger, to_half, weighted_sum
from tests.byhand.samples import sample

HALF: Scalars = "half"
OPMATH: Scalars = "opmath"
REFERENCE = ("floats", "files", "formulas", "webui", "tree")


@pytest.mark.parametrize("module", REFERENCE)
def test_the_reference_uses_neither_what_it_judges_nor_torch(module: str) -> None:
    parsed = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(parsed) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(parsed) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {"mergeflow", "torch", "safetensors"}
    assert all(name.startswith("tests.byhand.") for name in imported if name.startswith("tests"))


MEASURED = [
    (0.2, 0x4200, 0x4200, 0x41FF, 0x4200),
    (0.2, 0x4700, 0x4700, 0x46FF, 0x4700),
    (0.2, 0xA305, 0xAA56, 0xA557, 0xA558),
    (0.2, 0x1A29, 0xA05E, 0x11BC, 0x11BE),
    (0.2, 0x2C4A, 0xACAE, 0x28FD, 0x28FE),
    (0.333, 0x23A6, 0x2AD9, 0x271D, 0x271C),
    (0.333, 0x98F7, 0x9411, 0x97FA, 0x97FB),
    (0.333, 0xA916, 0xA96E, 0xA934, 0xA933),
    (0.5, 0x0001, 0x0001, 0x0000, 0x0000),
    (0.5, 0x224C, 0x29D6, 0x2769, 0x2769),
    (0.5, 0xA800, 0x251F, 0x9DC2, 0x9DC2),
]


@pytest.mark.parametrize(
    ("m", "a", "b", "old", "new"), MEASURED, ids=[f"{m}-{a:04x}-{b:04x}" for m, a, b, _, _ in MEASURED]
)
def test_measured_values_are_met(m: float, a: int, b: int, old: int, new: int) -> None:
    one, other = of_bits("F16", [a]), of_bits("F16", [b])
    assert bits(weighted_sum(one, other, m, HALF))[0] == old
    assert bits(weighted_sum(one, other, m, OPMATH))[0] == new


def test_merging_a_model_with_itself_changes_2048_values() -> None:
    every = of_bits("F16", np.arange(2**16, dtype=np.uint16))
    finite = of_bits("F16", bits(every)[np.isfinite(every.values)])
    merged = weighted_sum(finite, finite, 0.5, OPMATH)
    changed = finite.values[bits(merged) != bits(finite)]
    assert finite.values.size == 63488
    assert changed.size == 2048
    assert np.all(np.abs(changed.astype(np.float64)) < 2**-13)
    assert np.all(changed.view(np.uint16) % 2 == 1)
    assert same(merged, weighted_sum(finite, finite, 0.5, HALF))


def test_at_one_half_normal_values_are_rounded_once_and_by_either_rule() -> None:
    a, b = (of_bits("F16", np.random.default_rng(seed).integers(0, 2**16, 200_000)) for seed in (1, 2))
    merged = weighted_sum(a, b, 0.5, OPMATH)
    large = (np.abs(a.values) >= 2**-13) & (np.abs(b.values) >= 2**-13)
    once = rounded((as_float64(a)[large] + as_float64(b)[large]) / 2, "F16")
    assert np.count_nonzero(large) > 100_000
    assert same(Tensor("F16", merged.values[large]), once)
    assert same(merged, weighted_sum(a, b, 0.5, HALF))


def test_the_old_rule_shrinks_a_model() -> None:
    assert quantised(0.8, "F16", HALF) == 0.7998046875
    assert quantised(0.2, "F16", HALF) == 0.199951171875
    assert quantised(0.8, "F16", HALF) + quantised(0.2, "F16", HALF) == 0.999755859375
    assert quantised(0.2, "BF16", HALF) == 0.2001953125
    for dtype in ("F16", "BF16", "F32", "I64"):
        assert quantised(0.2, dtype, OPMATH) == np.float32(0.2)
    assert quantised(0.2, "F32", HALF) == np.float32(0.2)
    assert quantised(0.2, "F64", HALF) == 0.2
    assert quantised(1 + 2**-11 + 2**-40, "F16", HALF) == 1, "by way of fp32"


IDS = [
    (0.2, "F16", "F16", HALF, 18, 18),
    (0.2, "F16", "I64", HALF, 18, 18),
    (0.333, "F16", "I64", HALF, 5, 5),
    (0.05, "F16", "F16", HALF, 22, 0),
    (0.2, "I64", "I64", HALF, 0, 0),
    (0.5, "F16", "I64", HALF, 0, 0),
    (0.25, "F16", "F16", HALF, 0, 0),
    *((m, a, b, OPMATH, 0, 0) for m in (0.2, 0.333, 0.05, 0.0526) for a in ("F16", "I64") for b in ("F16", "I64")),
]


@pytest.mark.parametrize(("m", "a", "b", "scalars", "off", "truncated"), IDS)
def test_position_ids_suffer_as_measured(m: float, a: str, b: str, scalars: Scalars, off: int, truncated: int) -> None:
    ids = np.arange(77).reshape(1, 77)
    merged = to_half(weighted_sum(tensor(a, ids), tensor(b, ids), m, scalars))
    assert merged.dtype == "F16"
    assert np.count_nonzero(merged.values != ids) == off
    assert np.count_nonzero(merged.values.astype(np.int64) != ids) == truncated


def test_id_3_becomes_a_little_less() -> None:
    three = tensor("F16", [3])
    assert weighted_sum(three, three, 0.2, HALF).values[0] == 2.998046875


PROMOTIONS = [
    ("F16", "F16", "F16"),
    ("BF16", "BF16", "BF16"),
    ("BF16", "F16", "F32"),
    ("F16", "F32", "F32"),
    ("F32", "BF16", "F32"),
    ("F64", "F16", "F64"),
    ("BF16", "F64", "F64"),
    ("I64", "I64", "F32"),
    ("I64", "F16", "F32"),
    ("F64", "I64", "F64"),
]


@pytest.mark.parametrize(("a", "b", "result"), PROMOTIONS)
def test_a_sum_has_the_wider_dtype(a: str, b: str, result: str) -> None:
    assert weighted_sum(tensor(a, [1]), tensor(b, [2]), 0.25, OPMATH).dtype == result


def test_integers_give_way_to_floats_in_a_difference_but_not_to_one_another() -> None:
    one, whole = tensor("F16", [1.5]), tensor("I64", [4])
    assert add_difference(one, one, whole, 0.5, OPMATH).dtype == "F16"
    assert same(add_difference(whole, one, whole, 1.0, OPMATH), tensor("F16", [1.5]))
    assert same(add_difference(whole, whole, tensor("I32", [1]), 0.5, OPMATH), tensor("F32", [5.5]))
    assert same(add_difference(one, one, None, 0.5, OPMATH), one)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match="arithmetic"):
        weighted_sum(of_bits(dtype, [1]), of_bits(dtype, [1]), 0.5, OPMATH)


def test_comfyui_subtracts_its_ratio_from_1_twice() -> None:
    zero, one = tensor("F32", [0]), tensor("F32", [1])
    assert comfyui(zero, one, 1e-10).values[0] == np.float32(1 - (1 - 1e-10)) != float32(zero, one, 1e-10).values[0]


def test_supermerger_takes_a_or_b_where_nothing_is_left_to_compute() -> None:
    a, b = tensor("F16", [1]), tensor("BF16", [np.inf])
    assert supermerger(a, b, 0) is a
    assert supermerger(a, b, 1) is b
    assert supermerger(a, tensor("F32", [2]), 0.25).dtype == "F16"


STEPS = {"F16": 10, "BF16": 7, "F32": 23}
LARGEST = {"F16": 16, "BF16": 128, "F32": 128}
DOUBLES = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.floats(-1, 1), st.floats(-70000, 70000))


def number(value: Tensor) -> Fraction:
    """What one value is, where an infinity counts as the power of two that it stands for."""
    found = float(as_float64(value))
    return Fraction(found) if np.isfinite(found) else Fraction(2) ** LARGEST[value.dtype] * (1 if found > 0 else -1)


def assert_nearest(exact: Fraction, found: Tensor) -> None:
    """No neighbour is nearer, and one just as near has an odd last bit."""
    pattern = int(found.values.view(f"<u{found.values.itemsize}"))
    magnitude = pattern % 2 ** (8 * found.values.itemsize - 1)
    infinite = magnitude >> STEPS[found.dtype] == 2 ** (8 * found.values.itemsize - 1 - STEPS[found.dtype]) - 1
    distance = abs(number(found) - exact)
    for neighbour in ([magnitude - 1] if magnitude else []) + ([] if infinite else [magnitude + 1]):
        other = abs(abs(number(of_bits(found.dtype, neighbour))) - abs(exact))
        assert distance < other or (distance == other and magnitude % 2 == 0)
    assert exact == 0 or (exact < 0) == (pattern > magnitude), "the sign is kept"


@pytest.mark.parametrize("dtype", STEPS)
@given(st.data())
def test_rounding_finds_the_nearest_value_at_once(dtype: str, data: st.DataObject) -> None:
    value = data.draw(DOUBLES)
    found = rounded(np.asarray(value), dtype)
    if abs(value) < 2.0 ** LARGEST[dtype]:
        assert_nearest(Fraction(value), found)
    else:
        assert np.isinf(as_float64(found))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_middle_between_two_values_is_rounded_to_the_even_one(dtype: str) -> None:
    infinity = int(bits(tensor(dtype, np.inf)))
    pattern = np.arange(infinity)
    values = as_float64(of_bits(dtype, pattern))
    step = 2.0 ** (LARGEST[dtype] - 1 - STEPS[dtype])
    above = np.append(values[1:], values[-1] + step)
    middle = (values + above) / 2
    assert same(rounded(values, dtype), of_bits(dtype, pattern))
    assert same(rounded(middle, dtype), of_bits(dtype, pattern + pattern % 2))
    assert same(rounded(np.nextafter(middle, 0), dtype), of_bits(dtype, pattern))
    assert same(rounded(np.nextafter(middle, np.inf), dtype), of_bits(dtype, pattern + 1))
    assert same(rounded(-middle, dtype), of_bits(dtype, (pattern + pattern % 2) | 0x8000))


def test_fp64_becomes_fp16_by_a_single_rounding() -> None:
    assert rounded(np.array([1 + 2**-11 + 2**-40]), "F16").values[0] == 1 + 2**-10
    assert rounded(np.array([1 + 2**-11 + 2**-40], np.float32), "F16").values[0] == 1


SINGLES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.integers(0, 2**24).map(lambda whole: whole * 2.0**-149),
)


def fused(factor: float, x: float, y: float) -> Tensor:
    return Tensor("F32", fused_multiply_add(np.float32(factor), np.array(x, np.float32), np.array(y, np.float32)))


@given(SINGLES, SINGLES, SINGLES)
def test_a_fused_multiply_add_rounds_once(factor: float, x: float, y: float) -> None:
    exact = Fraction(factor) * Fraction(x) + Fraction(y)
    found = fused(factor, x, y)
    if abs(exact) < 2**128:
        assert_nearest(exact, found)
    else:
        assert np.isinf(found.values)


BIT = 2.0**-23
BESIDE_TIES = {
    "on a tie, even below": (2**-12, 2**-12, 1, 1, True),
    "on a tie, even above": (2**-12, 2**-12, 1 + BIT, 1 + 2 * BIT, True),
    "more than a tie, and fp64 sees it": (1 + 2**-20, 2**-24, 1, 1 + BIT, True),
    "more than a tie, and fp64 loses it": (8392705 * BIT, 8384513 * BIT * 2**-24, 1, 1 + BIT, False),  # 2^46 + 1
    "less than a tie, and fp64 loses it": (1 + 2**-16, (1 - 2**-16) * 2**-24, 1 + BIT, 1 + BIT, False),
    "half of what is subnormal": (0.5, 2**-149, 0, 0, True),
    "half of what is subnormal, and more": (0.5, 2**-149, 2**-149, 2**-148, True),
    "nothing is left": (3, 2, -6, 0, True),
}


@pytest.mark.parametrize(("factor", "x", "y", "result", "easy"), BESIDE_TIES.values(), ids=BESIDE_TIES)
def test_a_fused_multiply_add_knows_what_lies_beside_a_tie(
    factor: float, x: float, y: float, result: float, easy: bool
) -> None:
    assert (np.float32(np.float64(factor) * np.float64(x) + np.float64(y)) == result) == easy
    assert fused(factor, x, y).values == result
    assert fused(-factor, x, -y).values == -result


def test_nan_and_infinity_go_where_they_should() -> None:
    with np.errstate(all="ignore"):
        for dtype in ("F16", "BF16", "F32", "F64"):
            value = sample(dtype, 999, 3)
            assert same(scaled(value, 1.0, OPMATH), value)
            assert np.array_equal(np.isnan(as_float32(value)), np.isnan(as_float64(value)))
            gone = as_float64(weighted_sum(value, tensor(dtype, np.zeros(999)), 1.0, OPMATH))
            assert np.array_equal(np.isnan(gone), ~np.isfinite(as_float64(value))), "0 times infinity is not a number"
