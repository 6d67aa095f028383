"""The rules of the tools, step by step: what is rounded to what, and multiplied by which scalars."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.plan.rules import Role, grow
from mergeflow.plan.steps import Refused
from mergeflow.recipe.tree import Node, Rules, Tree
from mergeflow.tensors import DTYPES, Dtype

if TYPE_CHECKING:
    from mergeflow.interfaces import Step
    from mergeflow.plan.steps import Grown
    from mergeflow.recipe.tree import Arithmetic, Formula

M = 0.3
MERGED = Role(merged=True, vae=False, either=False, model=True)
KEPT = MERGED._replace(merged=False)
VAE_TENSOR = MERGED._replace(vae=True)


def fp32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def merged(
    codes: str,
    *,
    arithmetic: Arithmetic = "webui",
    multiplier: float = M,
    formula: Formula = "weighted_sum",
    half: bool = True,
    as_role: Role = MERGED,
    scalars: Any = "opmath",
    load: Dtype | None = None,
    bake: str = "",
) -> Grown | None:
    """How one merge makes a tensor that A, B and C store in these dtypes; `-` where one lacks it."""
    listed = codes.split()
    tree = Tree(
        tuple("abc"[: len(listed)]),
        (Node("n", tuple(range(len(listed))), multiplier, formula, half, (bake and "v") or None),),
    )
    leaves = [None if code == "-" else (source, DTYPES[code]) for source, code in enumerate(listed)]
    vaes = {"v": (9, DTYPES[bake])} if bake else {}
    return grow(tree, leaves, vaes, as_role, Rules(arithmetic, scalars), load)


def in_words(grown: Grown | None) -> str:
    """Steps as text: `scale a F16, scale b F16, add F16 -> F16`."""
    assert grown is not None

    def told(step: Step) -> str:
        rows = "".join(f" {'abc'[grown.sources[place]]}" for place in step.operands if place >= 0)
        return f"{step.operation}{rows} {step.dtype.code}"

    return f"{', '.join(map(told, grown.steps))} -> {grown.dtype.code}"


# --- the web UI -----------------------------------------------------------------------------------------------------

PAIRS = {
    # as section "Arithmetic on CPU, per dtype" of the notes on the web UI has them
    "F16 F16": "scale a F16, scale b F16, add F16 -> F16",
    "F32 F32": "scale a F32, scale b F32, add F16 -> F16",
    "F32 F16": "scale a F32, scale b F16, add F16 -> F16",
    "F16 F32": "scale a F16, scale b F32, add F16 -> F16",
    "BF16 BF16": "scale a BF16, scale b BF16, add BF16 -> BF16",
    "BF16 F16": "scale a BF16, scale b F16, add F16 -> F16",
    "F16 BF16": "scale a F16, scale b BF16, add F16 -> F16",
    "BF16 F32": "scale a BF16, scale b F32, add F16 -> F16",
    "F64 F16": "scale a F64, scale b F16, add F64 -> F64",
    "F16 F64": "scale a F16, scale b F64, add F64 -> F64",
    "BF16 F64": "scale a BF16, scale b F64, add F64 -> F64",
    "F32 F64": "scale a F32, scale b F64, add F64 -> F64",
    "I64 I64": "scale a F32, scale b F32, add F16 -> F16",
    "I64 F16": "scale a F32, scale b F16, add F16 -> F16",
    "F64 I32": "scale a F64, scale b F32, add F64 -> F64",
    "U8 BOOL": "scale a F32, scale b F32, add F16 -> F16",
}
"""A sum in fp32 is rounded to fp16 at once, since what is saved as half would be rounded there next."""
IN_FULL = {"F16 F16": "F16", "BF16 BF16": "BF16", "F64 F16": "F64", "F16 F64": "F64", "BF16 F64": "F64"}


@pytest.mark.parametrize(("codes", "steps"), PAIRS.items(), ids=PAIRS)
def test_a_weighted_sum_of_the_web_ui(codes: str, steps: str) -> None:
    assert in_words(merged(codes)) == steps


@pytest.mark.parametrize("codes", PAIRS)
def test_without_saving_as_half_what_is_fp32_stays_so(codes: str) -> None:
    was_half = codes == "F16 F16"
    expected = PAIRS[codes] if was_half else PAIRS[codes].replace("add F16 -> F16", "add F32 -> F32")
    assert in_words(merged(codes, half=False)) == expected


DIFFERENCES = {
    "F16 F16 F16": "subtract b c F16, scale F16, add a F16 -> F16",
    "F32 F16 F16": "subtract b c F16, scale F16, add a F16 -> F16",
    "F16 F32 F16": "subtract b c F32, scale F32, add a F16 -> F16",
    "BF16 BF16 BF16": "subtract b c BF16, scale BF16, add a BF16 -> BF16",
    "F16 BF16 F16": "subtract b c F32, scale F32, add a F16 -> F16",
    "F16 F64 F16": "subtract b c F64, scale F64, add a F64 -> F64",
    "F16 F16 -": "subtract b b F16, scale F16, add a F16 -> F16",
    "I64 I64 I64": "round a F32, subtract b c F32, scale F32, add F16 -> F16",
    "I64 F16 F16": "round a F16, subtract b c F16, scale F16, add F16 -> F16",
    "F16 I64 F16": "round b F16, subtract c F16, scale F16, add a F16 -> F16",
    "F16 - F16": " -> F16",
}


@pytest.mark.parametrize(("codes", "steps"), DIFFERENCES.items(), ids=DIFFERENCES)
def test_a_difference_of_the_web_ui(codes: str, steps: str) -> None:
    def in_any_order(text: str) -> tuple[list[str], str]:
        steps, _, dtype = text.rpartition(" -> ")
        return sorted(steps.split(", ")), dtype

    assert in_any_order(in_words(merged(codes, formula="add_difference"))) == in_any_order(steps)


@pytest.mark.parametrize(
    ("code", "half"), [("F32", "F16"), ("F16", "F16"), ("BF16", "BF16"), ("F64", "F64"), ("I64", "I64")]
)
@pytest.mark.parametrize("as_role", [MERGED, KEPT], ids=["merged", "kept"])
def test_no_interpolation_halves_fp32_whatever_the_key(code: str, half: str, as_role: Role) -> None:
    steps = "round a F16" if code == "F32" else ""
    assert in_words(merged(code, formula="no_interpolation", as_role=as_role)) == f"{steps} -> {half}"
    assert in_words(merged(code, formula="no_interpolation", as_role=as_role, half=False)) == f" -> {code}"


@pytest.mark.parametrize("code", [dtype.code for dtype in Dtype])
def test_what_is_not_merged_is_a_s_as_it_is(code: str) -> None:
    for codes, as_role in ((f"{code} F32", KEPT), (f"{code} -", MERGED)):
        grown = merged(codes, as_role=as_role)
        assert grown is not None
        assert (grown.steps, grown.sources, grown.dtype.code) == ((), (0,), code)
    assert merged(f"- {code}") is None
    either = merged(f"- {code}", as_role=MERGED._replace(either=True))
    assert either is not None
    assert (either.steps, either.sources) == ((), (1,))


@pytest.mark.parametrize(
    ("bake", "half", "steps"),
    [
        ("F32", True, "round F16 -> F16"),
        ("F32", False, " -> F32"),
        ("BF16", True, " -> BF16"),
        ("F16", True, " -> F16"),
    ],
)
def test_a_vae_that_is_baked_in_replaces_what_was_merged(bake: str, half: bool, steps: str) -> None:
    grown = merged("F16 F32", as_role=VAE_TENSOR, bake=bake, half=half)
    assert grown is not None
    assert grown.sources == (9,)
    told = ", ".join(f"{step.operation} {step.dtype.code}" for step in grown.steps)
    assert f"{told} -> {grown.dtype.code}" == steps
    assert merged("F16 F32", bake=bake) == merged("F16 F32"), "only the tensors of a VAE are replaced"
    assert merged("- F32", as_role=VAE_TENSOR, bake=bake) is None, "nothing is added"


# --- scalars --------------------------------------------------------------------------------------------------------

SCALARS = [
    # scalars, dtype, M, factors of A and B: fp16(0.8) and fp16(0.2) are told in the notes on the web UI
    ("opmath", "F16", 0.2, (fp32(0.8), fp32(0.2))),
    ("opmath", "BF16", 0.2, (fp32(0.8), fp32(0.2))),
    ("opmath", "F32", 0.2, (fp32(0.8), fp32(0.2))),
    ("opmath", "F64", 0.2, (0.8, 0.2)),
    ("opmath", "I64", 0.2, (fp32(0.8), fp32(0.2))),
    ("half", "F16", 0.2, (0.7998046875, 0.199951171875)),
    ("half", "BF16", 0.2, (0.80078125, 0.2001953125)),
    ("half", "F32", 0.2, (fp32(0.8), fp32(0.2))),
    ("half", "F64", 0.2, (0.8, 0.2)),
    ("half", "I64", 0.2, (fp32(0.8), fp32(0.2))),
    ("half", "F16", 0.5, (0.5, 0.5)),
    ("half", "F16", -0.25, (1.25, -0.25)),
    ("half", "F16", 1e6, (-float("inf"), float("inf"))),
    ("opmath", "F16", 1e300, (-float("inf"), float("inf"))),
    ("half", "BF16", 1e300, (-float("inf"), float("inf"))),
    ("half", "BF16", 1 + 2**-8 + 2**-40, (-(2**-8) - 2**-40, 1.0)),
    ("half", "BF16", 1 + 3 * 2**-8, (-3 * 2**-8, 1 + 2**-6)),
    ("opmath", "F64", 1 / 3, (1 - 1 / 3, 1 / 3)),
]


@pytest.mark.parametrize(("scalars", "code", "multiplier", "factors"), SCALARS, ids=lambda value: str(value)[:20])
def test_scalars_are_quantised_as_torch_does_it(
    scalars: Any, code: str, multiplier: float, factors: tuple[float, float]
) -> None:
    grown = merged(f"{code} {code}", multiplier=multiplier, scalars=scalars)
    assert grown is not None
    found = [step.factor for step in grown.steps if step.operation == "scale"]
    assert found[1] == factors[1]
    assert found[0] == pytest.approx(factors[0], rel=2**-9 if multiplier > 1 else 0)


@pytest.mark.parametrize("scalars", ["opmath", "half"])
def test_what_is_fp32_after_a_difference_has_its_scalar(scalars: Any) -> None:
    grown = merged("F16 F32 F16", formula="add_difference", multiplier=0.2, scalars=scalars)
    assert grown is not None
    assert [step.factor for step in grown.steps if step.operation == "scale"] == [fp32(0.2)]


# --- the other tools ------------------------------------------------------------------------------------------------

OTHERS: list[tuple[Arithmetic, str, bool, str]] = [
    ("float32", "F16 F16", True, "scale a F32, scale b F32, add F32 -> F16"),
    ("float32", "F32 F16", True, "scale a F32, scale b F32, add F32 -> F16"),
    ("float32", "F32 F16", False, "scale a F32, scale b F32, add F32 -> F32"),
    ("float32", "BF16 F32", True, "scale a F32, scale b F32, add F32 -> BF16"),
    ("float32", "F64 F16", True, "round a F32, scale F32, scale b F32, add F32 -> F64"),
    ("float32", "I64 F16", True, "scale a F32, scale b F32, add F32 -> F16"),
    ("float32", "F8_E4M3 F16", True, "scale a F32, scale b F32, add F32 -> F8_E4M3"),
    ("float64", "F16 F32", True, "scale a F64, scale b F64, add F64 -> F16"),
    ("float64", "F32 F64", True, "scale a F64, scale b F64, add F64 -> F16"),
    ("float64", "F64 F16", True, "scale a F64, scale b F64, add F64 -> F64"),
    ("comfyui", "F16 F32", True, "scale a F32, scale b F32, add F32 -> F16"),
    ("comfyui", "F32 F16", True, "scale a F32, scale b F32, add F32 -> F32"),
    ("supermerger", "F16 F32", True, "lerp a b F16 -> F16"),
    ("supermerger", "F32 F16", True, "lerp a b F16 -> F16"),
    ("supermerger", "F32 F16", False, "lerp a b F32 -> F32"),
    ("supermerger", "BF16 F32", True, "lerp a b BF16, round F16 -> F16"),
    ("supermerger", "BF16 F32", False, "lerp a b BF16 -> BF16"),
    ("supermerger", "F64 F32", True, "round a F32, lerp b F16 -> F16"),
    ("supermerger", "F64 F64", False, "round a F32, round b F32, lerp F32, round F64 -> F64"),
    ("supermerger", "I64 F16", True, " -> I64"),
]


@pytest.mark.parametrize(("arithmetic", "codes", "half", "steps"), OTHERS, ids=lambda value: str(value)[:20])
def test_other_arithmetics(arithmetic: Arithmetic, codes: str, half: bool, steps: str) -> None:
    assert in_words(merged(codes, arithmetic=arithmetic, half=half)) == steps


def test_comfyui_loads_in_the_dtype_of_the_output() -> None:
    loaded = merged("F32 F64", arithmetic="comfyui", load=Dtype.F16)
    assert in_words(loaded) == "round a F16, scale F32, round b F32, round F16, scale F32, add F32 -> F16"
    assert in_words(merged("I64 -", arithmetic="comfyui", load=Dtype.F16)) == " -> I64"
    assert loaded is not None
    ratio = 1.0 - M
    assert [step.factor for step in loaded.steps if step.operation == "scale"] == [fp32(ratio), fp32(1.0 - ratio)]


@pytest.mark.parametrize(("multiplier", "source"), [(0.0, 0), (1.0, 1), (1, 1)])
def test_supermerger_computes_nothing_at_the_ends(multiplier: float, source: int) -> None:
    grown = merged("F16 F16", arithmetic="supermerger", multiplier=multiplier)
    assert grown is not None
    assert (grown.steps, grown.sources) == ((), (source,))


# --- what cannot be merged ------------------------------------------------------------------------------------------

FP8 = [dtype.code for dtype in Dtype if dtype.is_fp8]
REFUSED = [
    *(
        (tool, codes.format(code))
        for tool in ("webui", "supermerger")
        for code in FP8
        for codes in ("{} F16", "F16 {}")
    ),
    *((tool, codes) for tool in ("webui", "float32", "float64", "comfyui") for codes in ("C64 F16", "F16 C64")),
    ("supermerger", "F16 C64"),
]


@pytest.mark.parametrize(("arithmetic", "codes"), REFUSED)
def test_what_a_tool_cannot_merge_is_refused(arithmetic: Arithmetic, codes: str) -> None:
    with pytest.raises(Refused) as caught:
        merged(codes, arithmetic=arithmetic)
    assert caught.value.dtype is not Dtype.F16
    assert codes.split()[caught.value.source] == caught.value.dtype.code


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "comfyui"])
@pytest.mark.parametrize("code", FP8)
def test_fp8_is_merged_where_everything_is_widened(arithmetic: Arithmetic, code: str) -> None:
    assert merged(f"{code} F16", arithmetic=arithmetic) is not None
