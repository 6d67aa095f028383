"""Recorded trees hold what no list makes: differences, mere conversions, merges and models that are used twice."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeflow.recipe.recorded import Merge
from mergeflow.recipe.tree import INPUTS, Formula, Rules
from tests.byhand.files import read, write
from tests.byhand.floats import tensor
from tests.pairwise.checkpoints import BETAS, CONV, IDS, PARTIAL, POST, SIGMAS, TOY, leaf, name, vae, write_leaves
from tests.pairwise.sides import assert_same, by_engine_as_recorded, by_hand_as_recorded

if TYPE_CHECKING:
    from pathlib import Path

LEAVES = 6
SUM: Final = "weighted_sum"
DIFFERENCE: Final = "add_difference"
NONE: Final = "no_interpolation"
FORMULAS: list[Formula] = [SUM, SUM, DIFFERENCE, NONE]


@pytest.fixture(scope="module")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six leaves, a VAE, and a whole checkpoint whose VAE can be baked in as well."""
    directory = tmp_path_factory.mktemp("leaves")
    write_leaves(directory, LEAVES)
    write(directory / "whole.safetensors", leaf(LEAVES))
    return directory


TREES: dict[str, dict[str, Merge]] = {
    "a difference": {"n": Merge(("00", "01", "03"), 0.7, DIFFERENCE)},
    "a difference that is not halved": {"n": Merge(("00", "01", "03"), 1.0, DIFFERENCE, save_half=False)},
    "a difference from what lacks a tensor": {"n": Merge(("00", "01", "02"), 0.35, DIFFERENCE)},
    "a difference of what lacks a tensor": {"n": Merge(("00", "02", "03"), -0.35, DIFFERENCE)},
    "a difference that is taken away": {"n": Merge(("04", "01", "00"), -0.3, DIFFERENCE)},
    "a difference from itself": {"n": Merge(("00", "01", "00"), 0.333, DIFFERENCE)},
    "a difference of merges": {
        "a": Merge(("00", "01")),
        "b": Merge(("04", "05"), 0.143, save_half=False),
        "c": Merge(("a", "03"), 0.2),
        "n": Merge(("a", "b", "c"), 0.0526, DIFFERENCE),
    },
    "nothing but a conversion": {"n": Merge(("01",), 0.3, NONE)},
    "nothing at all": {"n": Merge(("01",), 0.3, NONE, save_half=False)},
    "a conversion that gets a VAE": {"n": Merge(("01",), 0.3, NONE, bake="vae")},
    "a conversion on the way": {"a": Merge(("01",), 0.3, NONE), "n": Merge(("00", "a"), 0.2)},
    "a model with itself": {"n": Merge(("01", "01"), 0.3)},
    "a merge with itself": {"a": Merge(("00", "01"), 0.3, save_half=False), "n": Merge(("a", "a"), 0.333)},
    "a merge with one of its own": {"a": Merge(("00", "01"), 0.3), "n": Merge(("01", "a"), 0.2)},
    "a VAE at every node but the top": {
        "a": Merge(("00", "01"), bake="vae"),
        "b": Merge(("03", "04"), bake="vae"),
        "n": Merge(("a", "b"), 0.2),
    },
    "a VAE on the side of B": {"b": Merge(("03", "04"), bake="vae"), "n": Merge(("00", "b"), 0.2)},
    "two VAEs": {
        "a": Merge(("00", "01"), bake="vae"),
        "b": Merge(("03", "04"), save_half=False, bake="whole"),
        "n": Merge(("a", "b"), 0.4),
    },
    "a VAE of what is merged too": {"a": Merge(("00", "01"), bake="03"), "n": Merge(("a", "03"), 0.4)},
    "some saved as half and some not": {
        "a": Merge(("01", "03"), 0.3, save_half=False),
        "b": Merge(("a", "05"), 0.2),
        "n": Merge(("b", "00"), 0.333, save_half=False),
    },
}


@pytest.mark.parametrize("merges", TREES.values(), ids=TREES)
@pytest.mark.parametrize("scalars", ["opmath", "half"])
def test_a_recorded_tree(leaves: Path, tmp_path: Path, merges: dict[str, Merge], scalars: Any) -> None:
    found = by_engine_as_recorded(leaves, tmp_path, merges, rules=Rules(scalars=scalars))
    assert_same(found, by_hand_as_recorded(leaves, tmp_path, merges, scalars=scalars))


@pytest.mark.parametrize("merges", [TREES["a difference of merges"], TREES["two VAEs"]], ids=["difference", "VAEs"])
def test_a_recorded_tree_of_components_and_what_belongs_to_none(
    leaves: Path, tmp_path: Path, merges: dict[str, Merge]
) -> None:
    found = by_engine_as_recorded(leaves, tmp_path, merges, architecture=TOY)
    assert_same(found, by_hand_as_recorded(leaves, tmp_path, merges))


def test_a_conversion_halves_what_no_merge_would(leaves: Path, tmp_path: Path) -> None:
    found = by_engine_as_recorded(leaves, tmp_path, TREES["nothing but a conversion"])
    assert [found[key].dtype for key in (SIGMAS, BETAS, IDS)] == ["F16", "F64", "F16"]
    assert read(leaves / "01.safetensors").tensors[SIGMAS].dtype == "F32"


def test_where_c_lacks_a_tensor_the_difference_is_nothing(leaves: Path, tmp_path: Path) -> None:
    merges = TREES["a difference from what lacks a tensor"]
    found = by_engine_as_recorded(leaves, tmp_path, merges)[PARTIAL]
    a = read(leaves / "00.safetensors").tensors[PARTIAL]
    assert PARTIAL not in read(leaves / "02.safetensors").tensors
    assert (found.dtype, a.dtype) == ("F16", "F32")
    assert found.values.tolist() == a.values.astype("f2").tolist()


def test_a_difference_of_whole_numbers_meets_the_dtype_of_a(tmp_path: Path) -> None:
    for id, dtype, values in (("0", "F64", [0.1]), ("1", "I64", [7]), ("2", "I32", [4]), ("3", "U8", [200])):
        write(tmp_path / f"{id}.safetensors", {"model.w": tensor(dtype, values)})
    for inputs in (("0", "1", "2"), ("1", "2", "3"), ("1", "0", "3"), ("1", "3", "0")):
        merges = {"n": Merge(inputs, 0.333, DIFFERENCE)}
        found = by_engine_as_recorded(tmp_path, tmp_path / "out", merges)
        assert_same(found, by_hand_as_recorded(tmp_path, tmp_path / "work", merges))


@st.composite
def recorded(draw: st.DrawFn) -> dict[str, Merge]:
    """Up to five merges of anything that is there, of which every one is used."""
    there = [name(index) for index in range(LEAVES)]
    unused: list[str] = []
    merges: dict[str, Merge] = {}
    for number in itertools.count(1):
        formula = draw(st.sampled_from(FORMULAS))
        chosen = draw(st.permutations(unused))[: INPUTS[formula]]
        while len(chosen) < INPUTS[formula]:
            chosen.insert(draw(st.integers(0, len(chosen))), draw(st.sampled_from(there)))
        multiplier = draw(st.one_of(st.sampled_from([0.0, 0.2, 0.333, 0.5, 0.0526, 1.0]), st.floats(-0.5, 1.2)))
        if abs(multiplier) < 1e-6:
            multiplier = 0.0  # so small a number may become -0 in a dtype, which the engine takes for 0
        bake = draw(st.sampled_from([None, None, "vae", "whole", "05"]))
        merges[f"n{number}"] = Merge(tuple(chosen), multiplier, formula, draw(st.booleans()), bake)
        unused = [one for one in unused if one not in chosen] + [f"n{number}"]
        there.append(f"n{number}")
        if len(unused) == 1 and (number >= 5 or draw(st.booleans())):
            return merges
    raise AssertionError


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(merges=recorded(), scalars=st.sampled_from(["opmath", "half"]), components=st.booleans())
def test_any_recorded_tree(
    leaves: Path, tmp_path: Path, merges: dict[str, Merge], scalars: Any, components: bool
) -> None:
    changes = {"architecture": TOY} if components else {}
    found = by_engine_as_recorded(leaves, tmp_path, merges, rules=Rules(scalars=scalars), **changes)
    assert_same(found, by_hand_as_recorded(leaves, tmp_path, merges, scalars=scalars))


def test_the_vaes_differ_from_what_is_merged() -> None:
    whole, alone = leaf(LEAVES), vae()
    assert {CONV, POST} <= whole.keys()
    assert CONV.removeprefix("first_stage_model.") in alone
    assert POST.removeprefix("first_stage_model.") not in alone
