"""Every rounding of a step, judged by numpy and fractions, and by what the web UI's torch makes of the same rows."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Literal, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeflow.interfaces import Rows, Step
from mergeflow.methods import pairwise
from mergeflow.methods.pairwise import Pairwise
from mergeflow.tensors import Dtype
from tests.conformance.method import MergeConformance
from tests.methods.reference import (
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    NAN,
    FloatFormat,
    numbers,
    rows_of,
    same_bits,
)
from tests.methods.steps import TORCH, as_hex, bits, carried_out, every, f16, f32, same_values, shuffled, some_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

F16, BF16, F32, F64, I64 = Dtype.F16, Dtype.BF16, Dtype.F32, Dtype.F64, Dtype.I64
KEPT = [F16, BF16, F32, F64]
INTEGERS = [Dtype.I64, Dtype.I32, Dtype.I16, Dtype.I8, Dtype.U64, Dtype.U32, Dtype.U16, Dtype.U8, Dtype.BOOL]
Operation: TypeAlias = Literal["scale", "add", "subtract", "lerp", "round"]
UNARY: tuple[Operation, ...] = ("scale", "round")
BINARY: tuple[Operation, ...] = ("add", "subtract", "lerp")
WIDTH = 2000


def code(value: object) -> str | None:
    return value.code if isinstance(value, Dtype) else None


def merged(steps: Sequence[Step], values: Sequence[Tensor], out: Dtype | torch.dtype | None = None) -> Tensor:
    """What `Pairwise` makes of the rows."""
    dtype = TORCH[steps[-1].dtype] if out is None else TORCH[out] if isinstance(out, Dtype) else out
    made = torch.full((len(values[0]),), 77, dtype=dtype)
    Pairwise(steps).merge(Rows.of(values, [math.nan] * len(values)), [1] * len(values), made)
    return made


def agrees(steps: Sequence[Step], values: Sequence[Tensor], out: Dtype | None = None) -> bool:
    """Whether `Pairwise` makes of the rows what numpy does."""
    dtype = TORCH[out or steps[-1].dtype]
    return same_values(merged(steps, values, dtype), carried_out(steps, values, dtype))


def step(operation: Operation, dtype: Dtype, factor: float = 1.0, into: int = 0) -> Step:
    """One operation on the first row, or on the first two."""
    return Step(operation, (0,) if operation in UNARY else (0, 1), factor, dtype, into)


def weighted_sum(m: float, a: Dtype, b: Dtype, kept: Dtype, *, half: bool = False) -> list[Step]:
    """`(1 - M) A + M B` as the web UI has it; `half` for torch up to 2.0, which rounds the numbers to half first."""
    scalars = [
        factor if dtype is F64 else f16(f32(factor)) if half and dtype is F16 else f32(factor)
        for factor, dtype in ((1 - m, a), (m, b))
    ]
    return [
        Step("scale", (0,), scalars[0], a, 0),
        Step("scale", (1,), scalars[1], b, 1),
        Step("add", (-1, -2), 1.0, kept, 0),
    ]


# --- what each operation is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "factor", "dtype", "operands", "expected"),
    [
        pytest.param("scale", 0.5, F16, [(F16, "4200")], "3e00", id="half-of-3"),
        pytest.param("scale", 0.5, F16, [(F16, "0001")], "0000", id="half-of-the-smallest-is-a-tie-to-0"),
        pytest.param("scale", 0.5, F16, [(F16, "8001")], "8000", id="half-of-the-smallest-negative-is-minus-0"),
        pytest.param("scale", 0.5, F16, [(F16, "0003")], "0002", id="half-of-3-of-the-smallest-is-a-tie-to-even"),
        pytest.param("scale", 0.5, F16, [(F16, "0401")], "0200", id="half-of-a-normal-value-is-subnormal"),
        pytest.param("scale", 2.0, F16, [(F16, "7bff")], "7c00", id="twice-the-largest-is-infinite"),
        pytest.param("scale", 0.0, F16, [(F16, "8001")], "8000", id="0-times-a-negative-value-is-minus-0"),
        pytest.param("scale", -0.0, F16, [(F16, "0001")], "8000", id="minus-0-is-a-factor-of-its-own"),
        pytest.param("scale", f32(0.8), F16, [(F16, "4200")], "40cd", id="fp16-times-fp32"),
        pytest.param("scale", f16(0.8), F16, [(F16, "4200")], "40cc", id="fp16-times-fp16"),
        pytest.param("scale", 0.5, BF16, [(BF16, "0001")], "0000", id="bf16-subnormal-tie-to-0"),
        pytest.param("scale", 0.5, BF16, [(BF16, "0003")], "0002", id="bf16-subnormal-tie-to-even"),
        pytest.param("scale", 2.0, BF16, [(BF16, "ff7f")], "ff80", id="bf16-overflow"),
        pytest.param("scale", f32(0.2), BF16, [(BF16, "3f81")], "3e4e", id="bf16-times-fp32"),
        pytest.param("scale", 205 / 1024, BF16, [(BF16, "3f81")], "3e4f", id="bf16-times-bf16"),
        pytest.param("scale", 0.5, F32, [(F32, "00000003")], "00000002", id="fp32-subnormal"),
        pytest.param("scale", 0.1, F64, [(F64, "3ff0000000000000")], "3fb999999999999a", id="fp64"),
        pytest.param("scale", 0.25, F32, [(F16, "0001")], "32800000", id="fp16-kept-in-fp32-is-not-rounded"),
        pytest.param("scale", 1.0, F16, [(F64, "3ff0020000000001")], "3c01", id="fp64-to-fp16-rounds-once-up"),
        pytest.param("scale", 1.0, F16, [(F64, "3ff0020000000000")], "3c00", id="fp64-to-fp16-tie"),
        pytest.param("scale", 0.5, F32, [(I64, "0000000001000001")], "4b000000", id="int64-is-rounded-to-fp32-first"),
        pytest.param("add", 1.0, F16, [(F16, "6800"), (F16, "3c00")], "6800", id="2048-and-1-is-a-tie-to-even"),
        pytest.param("add", 1.0, F16, [(F16, "6801"), (F16, "3c00")], "6802", id="2050-and-1-is-a-tie-to-even"),
        pytest.param("add", 1.0, F16, [(F16, "7bff"), (F16, "4c00")], "7c00", id="fp16-overflow"),
        pytest.param("add", 1.0, F16, [(F16, "8000"), (F16, "8000")], "8000", id="minus-0-and-minus-0"),
        pytest.param("add", 1.0, F16, [(F16, "8000"), (F16, "0000")], "0000", id="minus-0-and-0"),
        pytest.param("add", 1.0, F16, [(F16, "7c00"), (F16, "fc00")], "nan", id="infinities-of-both-signs"),
        pytest.param("add", 1.0, F16, [(F16, "3c00"), (F32, "3a000000")], "3c00", id="fp16-and-fp32-to-fp16-tie"),
        pytest.param("add", 1.0, F16, [(F16, "3c00"), (BF16, "3a01")], "3c01", id="fp16-and-bf16-to-fp16"),
        pytest.param("add", 1.0, F32, [(F16, "3c00"), (BF16, "3380")], "3f800000", id="fp16-and-bf16-to-fp32-tie"),
        pytest.param("add", 1.0, F16, [(F32, "3f801000"), (F32, "2f800000")], "3c00", id="fp32-rounds-before-fp16"),
        pytest.param("add", 1.0, F16, [(F32, "3f801000"), (F64, "3df0000000000000")], "3c01", id="fp64-does-not"),
        pytest.param("subtract", 1.0, F16, [(F16, "3c00"), (F16, "3c00")], "0000", id="nothing-left"),
        pytest.param("subtract", 1.0, F16, [(F16, "3c00"), (F16, "8001")], "3c00", id="x-less-y"),
        pytest.param("subtract", 1.0, BF16, [(BF16, "3f80"), (F32, "3f7fffff")], "3380", id="bf16-less-fp32"),
        pytest.param("round", 1.0, F16, [(F32, "477fefff")], "7bff", id="fp32-below-the-last-tie"),
        pytest.param("round", 1.0, F16, [(F32, "477ff000")], "7c00", id="fp32-at-the-last-tie"),
        pytest.param("round", 1.0, F16, [(F32, "33000000")], "0000", id="fp32-to-subnormal-fp16-tie"),
        pytest.param("round", 1.0, F16, [(F32, "33000001")], "0001", id="fp32-to-subnormal-fp16"),
        pytest.param("round", 1.0, F16, [(F32, "7fc00000")], "nan", id="nan"),
        pytest.param("round", 1.0, BF16, [(F32, "3f808000")], "3f80", id="fp32-to-bf16-tie"),
        pytest.param("round", 1.0, BF16, [(F32, "3f808001")], "3f81", id="fp32-to-bf16"),
        pytest.param("round", 1.0, BF16, [(F32, "7f800001")], "nan", id="nan-whose-first-bits-are-0"),
        pytest.param("round", 1.0, BF16, [(F64, "3ff0100000000001")], "3f81", id="fp64-to-bf16-rounds-once"),
        pytest.param("round", 1.0, BF16, [(F64, "3790000000000000")], "0000", id="fp64-to-subnormal-bf16-tie"),
        pytest.param("round", 1.0, BF16, [(F64, "3790000000000001")], "0001", id="fp64-to-subnormal-bf16"),
        pytest.param("round", 1.0, F16, [(I64, "000000000000004c")], "54c0", id="position-id-76"),
        pytest.param("round", 1.0, F32, [(I64, "0020000000000001")], "5a000000", id="int64-beyond-fp64"),
        pytest.param("round", 1.0, F32, [(I64, "0100000100000001")], "5b800001", id="int64-rounds-once"),
        pytest.param("lerp", 0.25, F32, [(F32, "3f800000"), (F32, "40400000")], "3fc00000", id="a-quarter-of-the-way"),
        pytest.param("lerp", 0.75, F32, [(F32, "3f800000"), (F32, "40400000")], "40200000", id="from-the-other-end"),
        pytest.param("lerp", 1.0, F32, [(F32, "7f800000"), (F32, "3f800000")], "nan", id="0-times-infinity"),
        pytest.param("lerp", 0.5, F32, [(F32, "ff7fffff"), (F32, "7f7fffff")], "ff800000", id="infinite-difference"),
        pytest.param("lerp", 0.5, F16, [(F16, "3c00"), (F16, "4200")], "4000", id="of-fp16"),
        pytest.param(
            "lerp", 0.5, F64, [(F64, "3ff0000010000000"), (F32, "3f800000")], "3ff0000000000000", id="in-fp32"
        ),
    ],
)
def test_one_step(
    operation: Operation, factor: float, dtype: Dtype, operands: list[tuple[Dtype, str]], expected: str
) -> None:
    values = [bits(held, word) for held, word in operands]
    made = merged([step(operation, dtype, factor)], values)
    assert (["nan"] if made.isnan() else as_hex(made)) == [expected]
    assert agrees([step(operation, dtype, factor)], values)


FACTORS = [0.5, f16(0.8), f32(0.2), f32(0.7), -3.0, 2.0**-24]
PAIRS = [*product(KEPT, KEPT), (I64, F16), (F32, I64), (I64, I64), (F64, I64), (BF16, Dtype.U8), (Dtype.BOOL, F16)]


@pytest.mark.parametrize("kept", KEPT, ids=code)
@pytest.mark.parametrize("x", [*KEPT, *INTEGERS], ids=code)
def test_one_operand_of_any_dtype(x: Dtype, kept: Dtype) -> None:
    values = [some_of(x, WIDTH, 1)]
    assert agrees([step("round", kept)], values)
    for factor in FACTORS:
        assert agrees([step("scale", kept, factor)], values)


@pytest.mark.parametrize("kept", KEPT, ids=code)
@pytest.mark.parametrize(("x", "y"), PAIRS, ids=code)
def test_two_operands_of_any_dtypes(x: Dtype, y: Dtype, kept: Dtype) -> None:
    count = WIDTH + 30 if not x.is_float else WIDTH
    one, other = some_of(x, count, 2), some_of(y, count, 3)
    values = [one[:WIDTH], other[:WIDTH]]
    assert agrees([step("add", kept)], values)
    assert agrees([step("subtract", kept)], values)
    for factor in FACTORS[1:4]:
        assert agrees([step("lerp", kept, factor)], values)


@pytest.mark.parametrize("kept", KEPT, ids=code)
@pytest.mark.parametrize("held", KEPT, ids=code)
def test_special_values_meet_each_other(held: Dtype, kept: Dtype) -> None:
    special = some_of(held, 0, 0)
    pairs = torch.cartesian_prod(torch.arange(len(special)), torch.arange(len(special)))
    values = [special[pairs[:, 0]], special[pairs[:, 1]]]
    for operation in BINARY:
        assert agrees([step(operation, kept, 0.5 if operation == "lerp" else 1.0)], values)


@pytest.mark.parametrize("kept", KEPT, ids=code)
@pytest.mark.parametrize("out", KEPT, ids=code)
def test_the_result_is_rounded_once_more_to_the_output(kept: Dtype, out: Dtype) -> None:
    beside_ties = [1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40, 1 + 2.0**-8 + 2.0**-40, 2.0**-134 + 2.0**-170]
    values = [torch.cat([some_of(F64, WIDTH, 4), torch.tensor(beside_ties, dtype=torch.float64)])]
    assert agrees([step("round", kept)], values, out)


@pytest.mark.parametrize("kept", KEPT, ids=code)
@pytest.mark.parametrize("out", [E4M3, E5M2, E4M3FNUZ, E5M2FNUZ], ids=lambda form: form.name)
def test_an_output_of_fp8_is_rounded_to_from_what_was_kept(kept: Dtype, out: FloatFormat) -> None:
    values = [some_of(F64, WIDTH, 5)]
    values = [values[0].where(values[0].isfinite(), 464.0)]
    through = numbers(merged([step("round", kept)], values))
    made = numbers(merged([step("round", kept)], values, out.dtype))
    assert made == [rounded_to(out, value) for value in through]


def rounded_to(form: FloatFormat, value: Fraction | str) -> Fraction | str:
    """What `numbers` says of `value` in `form`."""
    if isinstance(value, Fraction):
        rounded = form.rounded(value)
        return "-0" if rounded == 0 and value < 0 and form.minus_zero else rounded
    if value == "-0":
        return value if form.minus_zero else Fraction(0)
    return NAN if form.beyond == NAN else value


# --- fused multiply-add ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-126, -103, -24, 0, 60, 127])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("whole", "part", "left"),
    [
        pytest.param(0x800001, 0xFFFFFE, 0x800001, id="less-than-half-a-last-bit"),
        pytest.param(0x8007E8, 0xFFF031, 0x8007E7, id="more-than-half-a-last-bit"),
    ],
)
def test_lerp_tells_what_fp64_takes_for_a_tie(whole: int, part: int, left: int, sign: int, exponent: int) -> None:
    """x - factor x, where the product is half a last bit of x, but for less than 2^-29 of that."""
    x, expected = (torch.tensor([sign * math.ldexp(mantissa, exponent - 23)]) for mantissa in (whole, left))
    steps = [step("lerp", F32, math.ldexp(part, -48))]
    values = [x, torch.zeros(1)]
    assert same_bits(merged(steps, values), expected)
    assert agrees(steps, values)
    assert not same_bits((x.double() - x.double() * steps[0].factor).float(), expected)


NEAR_ONE = st.integers(-4, 4).map(lambda bits: 1 + bits * 2.0**-23)
SIZES = st.integers(-148, 127)


@given(
    st.lists(st.tuples(NEAR_ONE, SIZES, NEAR_ONE, SIZES), min_size=1, max_size=20),
    NEAR_ONE,
    st.integers(-60, 1),
    st.booleans(),
)
def test_lerp_is_fused_whatever_the_sizes(
    elements: list[tuple[float, int, float, int]], mantissa: float, exponent: int, far: bool
) -> None:
    x = torch.tensor([math.ldexp(one, size) for one, size, _, _ in elements])
    y = torch.tensor([0.0 if far else -math.ldexp(other, size) for _, _, other, size in elements])
    assert agrees([step("lerp", F32, f32(math.ldexp(mantissa, exponent)))], [x, y])


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch fuses lerp only where the processor does"
)
@pytest.mark.parametrize("factor", [0.5, f32(0.2), f32(0.9), 0.25, f32(1 / 3), 0.0, 1.0, 2.0, -0.25, -0.75])
def test_lerp_is_that_of_torch(factor: float) -> None:
    count = 1 << 16
    generator = torch.Generator().manual_seed(6)
    for scale in (1.0, 1e-38, 1e37):
        x, y = (torch.randn(count, generator=generator) * scale for _ in range(2))
        assert same_values(merged([step("lerp", F32, factor)], [x, y]), torch.lerp(x, y, factor))
    x, y = every(F16).float(), shuffled(every(F16), 7).float()
    assert same_values(merged([step("lerp", F32, factor)], [x, y]), torch.lerp(x, y, factor))


# --- the web UI's weighted sum --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "a", "b", "old", "new"),
    [
        (0.2, "4200", "4200", "41ff", "4200"),
        (0.2, "4700", "4700", "46ff", "4700"),
        (0.2, "a305", "aa56", "a557", "a558"),
        (0.2, "1a29", "a05e", "11bc", "11be"),
        (0.2, "2c4a", "acae", "28fd", "28fe"),
        (0.333, "23a6", "2ad9", "271d", "271c"),
        (0.333, "98f7", "9411", "97fa", "97fb"),
        (0.333, "a916", "a96e", "a934", "a933"),
        (0.5, "0001", "0001", "0000", "0000"),
        (0.5, "224c", "29d6", "2769", "2769"),
        (0.5, "a800", "251f", "9dc2", "9dc2"),
    ],
)
def test_the_measured_vectors_of_the_web_ui(m: float, a: str, b: str, old: str, new: str) -> None:
    values = [bits(F16, a), bits(F16, b)]
    assert as_hex(merged(weighted_sum(m, F16, F16, F16, half=True), values)) == [old]
    assert as_hex(merged(weighted_sum(m, F16, F16, F16), values)) == [new]


def test_merging_a_model_with_itself_at_one_half_changes_2048_values() -> None:
    row = every(F16)
    made = merged(weighted_sum(0.5, F16, F16, F16), [row, row])
    changed = (made != row) & row.isfinite()
    assert int(changed.sum()) == 2048
    assert float(row[changed].abs().max()) < 2.0**-13


MULTIPLIERS = [0.5, 0.2, 0.333, 0.05, 0.3, 1.0, 0.0, 2.0]


@pytest.mark.parametrize("m", MULTIPLIERS)
@pytest.mark.parametrize("held", [F16, BF16], ids=code)
def test_every_16_bit_value_becomes_what_torch_makes_of_it(held: Dtype, m: float) -> None:
    a, b = every(held), shuffled(every(held), 8)
    assert same_values(merged(weighted_sum(m, held, held, held), [a, b]), (1 - m) * a + m * b)
    assert agrees(weighted_sum(m, held, held, held), [a, b])


@pytest.mark.parametrize("m", MULTIPLIERS)
@pytest.mark.parametrize(("a", "b"), [*product(KEPT, KEPT), (I64, F16), (I64, F32), (F16, I64), (I64, I64)], ids=code)
def test_any_floats_become_what_torch_makes_of_them(a: Dtype, b: Dtype, m: float) -> None:
    values = [some_of(dtype, 1 << 14, seed)[: 1 << 14] for dtype, seed in ((a, 9), (b, 10))]
    theirs = (1 - m) * values[0] + m * values[1]
    x, y = (dtype if dtype.is_float else F32 for dtype in (a, b))
    kept = next(dtype for dtype in KEPT if TORCH[dtype] == theirs.dtype)
    assert same_values(merged(weighted_sum(m, x, y, kept), values), theirs)
    if kept is F32:  # saved as half, in the same step or in one of its own
        steps = weighted_sum(m, x, y, F16)
        assert same_values(merged(steps, values), theirs.half())
        assert same_values(merged([*steps[:2], steps[2]._replace(dtype=F32)], values, F16), theirs.half())
        assert same_values(merged([*steps[:2], steps[2]._replace(dtype=F32), round_(F16)], values), theirs.half())


def round_(dtype: Dtype) -> Step:
    return Step("round", (-1,), 1.0, dtype, 0)


# --- programs -------------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], list[Dtype]]:
    """Steps that read any rows and any registers written before, and write any register, an operand's included."""
    rows = draw(st.lists(st.sampled_from([*KEPT, F16, F16, *INTEGERS]), min_size=1, max_size=6))
    written: set[int] = set()
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        operation = draw(st.sampled_from((*UNARY, *BINARY)))
        place = st.sampled_from([*range(len(rows)), *(-1 - register for register in sorted(written))])
        operands = tuple(draw(place) for _ in range(1 if operation in UNARY else 2))
        factor = draw(st.sampled_from([*FACTORS, 0.25, -0.0])) if operation in ("scale", "lerp") else 1.0
        into = draw(st.integers(0, 3))
        written.add(into)
        steps.append(step(operation, draw(st.sampled_from(KEPT)), factor, into)._replace(operands=operands))
    return steps, rows


@settings(max_examples=300)
@given(programs(), st.sampled_from(KEPT), st.integers(0, 99), st.integers(0, 30))
def test_any_program(program: tuple[list[Step], list[Dtype]], out: Dtype, seed: int, count: int) -> None:
    steps, dtypes = program
    values = [some_of(dtype, count, seed + index)[-max(count, 1) :] for index, dtype in enumerate(dtypes)]
    values = [value[: min(map(len, values))] for value in values]
    before = [value.clone() for value in values]
    assert agrees(steps, values, out)
    assert all(same_bits(value, copy) for value, copy in zip(values, before, strict=True))


@pytest.mark.parametrize("length", [0, 1, 7, 32768])
@pytest.mark.parametrize("held", [*KEPT, I64], ids=code)
def test_rows_of_any_length(held: Dtype, length: int) -> None:
    values = [some_of(held, length, seed)[:length] for seed in (11, 12)]
    scaled = held if held.is_float else F32
    assert agrees(weighted_sum(0.3, scaled, scaled, scaled), values)
    assert agrees(weighted_sum(0.3, scaled, scaled, scaled), values, F16)
    if length < 100:
        assert agrees([step("lerp", scaled, f32(0.3))], values)


@pytest.mark.parametrize("held", KEPT, ids=code)
@pytest.mark.parametrize("kept", KEPT, ids=code)
def test_a_register_may_take_what_is_made_of_it(held: Dtype, kept: Dtype) -> None:
    values = [some_of(held, WIDTH, 13), some_of(held, WIDTH, 14)]
    first = Step("round", (0,), 1.0, held, 0)
    for last in (
        Step("scale", (-1,), 0.5, kept, 0),
        Step("scale", (-1,), f32(0.7), kept, 0),
        Step("add", (-1, 1), 1.0, kept, 0),
        Step("subtract", (1, -1), 1.0, kept, 0),
        Step("add", (-1, -1), 1.0, kept, 0),
        Step("round", (-1,), 1.0, kept, 0),
        Step("lerp", (-1, 1), f32(0.3), kept, 0),
        Step("lerp", (1, -1), f32(0.8), kept, 0),
    ):
        assert agrees([first, last], values)
        assert agrees([first, last, Step("add", (-1, 0), 1.0, F32, 1)], values)


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_a_tree_cannot_skip() -> None:
    with pytest.raises(NotImplementedError, match="planning refuses it"):
        Pairwise([step("round", F16)]).skip(rows_of([torch.ones(1)]), [1], torch.ones(1))


@pytest.mark.parametrize(("operation", "factor"), [("scale", 0.2), ("lerp", 0.2), ("lerp", 0.8)])
def test_a_factor_that_would_have_to_be_rounded_is_refused(operation: Operation, factor: float) -> None:
    with pytest.raises(ValueError, match=f"the factor {factor} of a step"):
        merged([step(operation, F32, factor)], [torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize("steps", [[step("round", Dtype.F8_E5M2)], [Step("round", (-1,), 1.0, F16, 0)]])
def test_steps_that_mean_nothing_are_refused(steps: list[Step]) -> None:
    with pytest.raises(KeyError):
        Pairwise(steps)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_thread_keeps_its_registers_and_32_bytes_for_each_element() -> None:
    steps = [
        *weighted_sum(0.2, F16, F16, F16),
        Step("lerp", (-1, 2), f32(0.2), F32, 1),
        Step("add", (-2, 3), 1.0, F64, 1),
        Step("round", (-2,), 1.0, BF16, 2),
    ]
    values = [some_of(F16, WIDTH, seed) for seed in (15, 16, 17)] + [some_of(F64, WIDTH, 18)]
    length = min(map(len, values))

    def held() -> int:
        for _ in range(3):
            merged(steps, [value[:length] for value in values], F16)
        return sum(buffer.nbytes for buffer in pairwise._scratch._buffers.values())

    with ThreadPoolExecutor(1) as fresh:
        registers = {(one.into, one.dtype) for one in steps}
        assert fresh.submit(held).result() == length * (32 + sum(dtype.itemsize for _, dtype in registers))


# --- conformance ----------------------------------------------------------------------------------------------------


class TestConformance(MergeConformance):
    """A chain of three merges, of which every row has a part."""

    dtypes: tuple[Dtype, ...] = (F16, F16, F16, F16)
    m = 0.5

    def make(self) -> Pairwise:
        steps = []
        for row, held in enumerate(self.dtypes[1:], start=1):
            first = Step("scale", (0 if row == 1 else -1,), f32(1 - self.m), self.dtypes[0], 0)
            steps += [first, Step("scale", (row,), f32(self.m), held, 1), Step("add", (-1, -2), 1.0, self.dtypes[0], 0)]
        return Pairwise(steps)

    def values(self, length: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(length, generator=generator) * 0.1).to(TORCH[held]) for held in self.dtypes]


class TestConformanceOfMixedRows(TestConformance):
    dtypes = (F32, F16, BF16, F64, F16)
    m = 0.2


class TestConformanceOfLerp(TestConformance):
    out_dtype = torch.float32
    dtypes = (F32, F16, F32)

    def make(self) -> Pairwise:
        return Pairwise([step("lerp", F16, f32(0.3)), Step("lerp", (-1, 2), f32(0.6), F32, 0)])
