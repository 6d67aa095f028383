"""What an output is made of, and what forbids it, told from headers alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.recipe.request import PartRequest, Policies
from mergeflow.tensors import Dtype
from tests.plan.builders import OPEN, SINGLE, USUAL, Ingredients, checkpoint, ingredients, planned, problems

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.tensors import Checkpoint

    Shape = tuple[int, ...]

IDS: dict[str, Shape] = {"text.ids": (1, 4)}
EXTRA: dict[str, Shape] = {"text.extra": (2,)}
V_PRED: dict[str, Shape] = {"v_pred": (0,)}
SKIP = Policies(missing="skip")
BASE = Policies(missing="base")


def without(*keys: str) -> dict[str, Shape]:
    return {key: shape for key, shape in USUAL.items() if key not in keys}


# keys


def test_every_key_of_the_architecture_is_made_of_every_model_in_equal_shares() -> None:
    plan = planned([checkpoint("c"), checkpoint("a"), checkpoint("b")])
    same = Ingredients(Dtype.F16, "uniform", {"c": 1, "a": 1, "b": 1})
    assert ingredients(plan) == {"text.w": same, "text.b": same, "image.w": same}
    assert plan.outputs[0].layout.tensors.keys() == {"text.w", "text.b", "image.w", "image.empty"}
    assert (problems(plan), plan.notes) == ([], ())


def test_every_component_is_made_of_its_own_list() -> None:
    models = [checkpoint("a"), checkpoint("b"), checkpoint("c", without("text.w", "text.b"))]
    wanted = replace(SINGLE, components={"text": PartRequest("text"), "image": PartRequest(model="c")})
    made = ingredients(planned(models, wanted, selections={"text": "b,a"}))
    assert made["text.w"] == Ingredients(Dtype.F16, "uniform", {"b": 1, "a": 1})
    assert made["image.w"] == Ingredients(Dtype.F16, "copy", {"c": 1})


def test_shares_are_the_smallest_integers_in_their_proportion() -> None:
    models = [checkpoint(id) for id in ("21", "22", "5")]
    plan = planned(models, selections={"models": "11a,22,5"}, composites={"11a": ("21", "22")})
    assert ingredients(plan)["text.w"].shares == {"21": 1, "22": 3, "5": 2}


def test_shares_beyond_what_can_be_divided_exactly_are_a_problem_of_the_plan() -> None:
    depth, members = 10, 7  # the common denominator is 7^10
    ids = [str(number) for number in range(members + (depth - 1) * (members - 1))]
    composites = {"c0": tuple(ids[:members])}
    for level in range(1, depth):
        first = members + (level - 1) * (members - 1)
        composites[f"c{level}"] = (f"c{level - 1}", *ids[first : first + members - 1])
    plan = planned([checkpoint(id) for id in ids], selections={"models": f"c{depth - 1}"}, composites=composites)
    assert any("the common denominator 282,475,249" in problem for problem in problems(plan))


def test_an_open_architecture_takes_the_keys_of_the_first_model() -> None:
    models = [checkpoint("a", {"x": (2,), "y": (3,)}), checkpoint("b", {"y": (3,), "x": (2,), "z": (4,)})]
    plan = planned(models, architecture=OPEN)
    assert plan.outputs[0].layout.tensors.keys() == {"x", "y"}
    assert plan.notes == ("[made] 1 surplus tensor(s) in b: z; ignored",)
    assert problems(planned(models, architecture=OPEN, selections={"models": "b,a"})) == [
        "[made] all: 1 tensor(s) not in a: z; leave it out of the list, or choose keys.missing=skip (mean of those "
        "that have it) or keys.missing=base"
    ]


def test_the_first_model_of_a_list_that_begins_with_a_composite_is_its_first_member() -> None:
    models = [checkpoint("a", {"x": (2,), "y": (3,)}), checkpoint("b", {"x": (2,)})]
    plan = planned(models, architecture=OPEN, selections={"models": "z,a"}, composites={"z": ("b", "a")})
    assert ingredients(plan) == {"x": Ingredients(Dtype.F16, "uniform", {"b": 1, "a": 3})}


@pytest.mark.parametrize("listed", ["a", "a,b"])
def test_keys_from_takes_the_keys_of_a_model_that_need_not_be_listed(listed: str) -> None:
    models = [checkpoint("a", {"x": (2,), "y": (3,)}), checkpoint("b", {"x": (2,)})]
    wanted = replace(SINGLE, keys_from="b")
    plan = planned(models, wanted, architecture=OPEN, selections={"models": listed})
    assert plan.outputs[0].layout.tensors.keys() == {"x"}
    assert ingredients(plan)["x"].shares == dict.fromkeys(listed.split(","), 1)
    assert plan.notes == ("[made] 1 surplus tensor(s) in a: y; ignored",)


def test_keys_from_a_pruned_model_leaves_out_what_it_lacks() -> None:
    models = [checkpoint("a", USUAL | EXTRA), checkpoint("b", without("image.w", "text.b") | {"odd": (1,)})]
    plan = planned(models, replace(SINGLE, keys_from="b"), selections={"models": "a"})
    assert plan.outputs[0].layout.tensors.keys() == {"text.w", "image.empty"}
    assert problems(plan) == []


# missing tensors


def test_a_missing_tensor_is_an_error_that_names_the_model_the_keys_and_the_remedies() -> None:
    plan = planned([checkpoint("a"), checkpoint("b", without("text.w", "text.b", "image.w")), checkpoint("c")])
    assert problems(plan) == [
        "[made] text: 2 tensor(s) not in b: text.w, text.b; leave it out of the list, or choose keys.missing=skip "
        "(mean of those that have it) or keys.missing=base",
        "[made] image: 1 tensor(s) not in b: image.w; leave it out of the list, or choose keys.missing=skip "
        "(mean of those that have it) or keys.missing=base",
    ]
    assert plan.outputs[0].layout.tensors.keys() == {"image.empty"}


def test_models_that_lack_the_same_tensors_are_told_together() -> None:
    models = [checkpoint("a"), checkpoint("b", without("text.w")), checkpoint("c", without("text.w", "text.b"))]
    found = problems(planned([*models, checkpoint("d", without("text.w"))]))
    assert [problem.partition(";")[0] for problem in found] == [
        "[made] text: 1 tensor(s) not in b, d: text.w",
        "[made] text: 2 tensor(s) not in c: text.w, text.b",
    ]


def test_skip_averages_those_that_have_the_tensor_and_says_so() -> None:
    models = [checkpoint("a"), checkpoint("b", without("text.w")), checkpoint("c")]
    plan = planned(models, policies=SKIP)
    assert ingredients(plan)["text.w"].shares == {"a": 1, "c": 1}
    assert ingredients(plan)["text.b"].shares == {"a": 1, "b": 1, "c": 1}
    assert problems(plan) == []
    assert plan.notes == ("[made] text: 1 tensor(s) not in b: text.w; the others have its share",)


def test_skip_renews_shares_exactly() -> None:
    models = [checkpoint("21"), checkpoint("22"), checkpoint("5", without("text.w")), checkpoint("6")]
    lists, composites = {"models": "11a,22,5,6"}, {"11a": ("21", "22")}
    made = ingredients(planned(models, policies=SKIP, selections=lists, composites=composites))
    assert made["text.b"].shares == {"21": 1, "22": 3, "5": 2, "6": 2}
    assert made["text.w"].shares == {"21": 1, "22": 3, "6": 2}  # sixths, of which there were eighths


def test_renewed_shares_are_the_smallest_integers_too() -> None:
    models = [checkpoint("a", without("text.w")), checkpoint("b", without("text.w")), checkpoint("c"), checkpoint("d")]
    lists, composites = {"models": "z,c,d"}, {"z": ("a", "b")}
    made = ingredients(planned(models, policies=SKIP, selections=lists, composites=composites))
    assert made["text.b"].shares == {"a": 1, "b": 1, "c": 2, "d": 2}
    assert made["text.w"].shares == {"c": 1, "d": 1}


def test_the_base_has_the_exact_share_of_a_composite_that_lacks_the_tensor() -> None:
    models = [checkpoint("a", without("text.w")), checkpoint("b"), checkpoint("c", without("text.w")), checkpoint("d")]
    lists, composites = {"models": "z,c,d"}, {"z": ("a", "b")}
    wanted = replace(SINGLE, base="d")
    made = ingredients(planned(models, wanted, policies=BASE, selections=lists, composites=composites))
    assert made["text.w"].shares == {"b": 1, "d": 5}  # sixths: two of its own, one of a, two of c


def test_the_base_has_the_share_of_those_that_lack_the_tensor() -> None:
    models = [checkpoint("a"), checkpoint("b", without("text.w")), checkpoint("c", without("text.w"))]
    plan = planned(
        [*models, checkpoint("base")], replace(SINGLE, base="base"), policies=BASE, selections={"models": "a,b,c"}
    )
    assert ingredients(plan)["text.w"].shares == {"a": 1, "base": 2}
    assert ingredients(plan)["text.b"].shares == {"a": 1, "b": 1, "c": 1}
    assert problems(plan) == []
    assert plan.notes == ("[made] text: 1 tensor(s) not in b, c: text.w; the base base stands in",)


def test_a_base_that_is_listed_adds_to_its_own_share_and_keeps_its_place() -> None:
    models = [checkpoint("a", without("text.w")), checkpoint("b"), checkpoint("c")]
    plan = planned(models, replace(SINGLE, base="b"), policies=BASE)
    assert list(ingredients(plan)["text.w"].shares.items()) == [("b", 2), ("c", 1)]


def test_a_base_supplies_a_tensor_that_no_listed_model_has() -> None:
    models = [checkpoint("a", without("text.w")), checkpoint("base")]
    plan = planned(models, replace(SINGLE, base="base"), policies=BASE, selections={"models": "a"})
    assert ingredients(plan)["text.w"].shares == {"base": 1}


def test_a_base_that_lacks_the_tensors_too_is_one_error() -> None:
    models = [
        checkpoint("a"),
        checkpoint("b", without("text.w", "text.b")),
        checkpoint("c", without("text.w", "text.b")),
    ]
    plan = planned(models, replace(SINGLE, base="c"), policies=BASE, selections={"models": "a,b"})
    assert problems(plan) == [
        "[made] text: 2 tensor(s) not in b: text.w, text.b; the base c lacks them too; choose a base that has them"
    ]


@pytest.mark.parametrize("policies", [Policies(), SKIP, BASE], ids=lambda policies: policies.missing)
def test_a_tensor_that_nobody_has_is_an_error_whatever_the_policy(policies: Policies) -> None:
    models = [checkpoint("a", without("text.w", "text.b")), checkpoint("b", without("text.w", "text.b"))]
    wanted = replace(SINGLE, base="b") if policies == BASE else SINGLE
    (problem,) = problems(planned(models, wanted, policies=policies))
    if policies == BASE:
        assert problem.startswith("[made] text: 2 tensor(s) not in a, b: text.w, text.b; the base b lacks them too")
    else:
        assert problem == (
            "[made] text: 2 tensor(s) not in a, b: text.w, text.b; no listed model has them; list one that does, or "
            "choose the keys of the output by keys_from or arch"
        )


def test_a_model_that_is_taken_as_it_is_must_have_the_component() -> None:
    models = [checkpoint("a"), checkpoint("pruned", without("image.w", "image.empty"))]
    wanted = replace(SINGLE, components={"image": PartRequest(model="pruned")})
    (problem,) = problems(planned(models, wanted, selections={"models": "a"}))
    assert problem.startswith("[made] image: 2 tensor(s) not in pruned: image.w, image.empty; no listed model has")


@pytest.mark.parametrize("policies", [Policies(), SKIP, BASE], ids=lambda policies: policies.missing)
def test_an_optional_tensor_is_the_mean_of_those_that_have_it_under_every_policy(policies: Policies) -> None:
    models = [checkpoint("a", USUAL | EXTRA), checkpoint("b"), checkpoint("c", USUAL | EXTRA)]
    plan = planned(models, replace(SINGLE, base="a" if policies == BASE else None), policies=policies)
    assert ingredients(plan)["text.extra"].shares == {"a": 1, "c": 1}
    assert problems(plan) == []
    assert plan.notes == ("[made] text: 1 tensor(s) not in b: text.extra; the others have its share",)


def test_an_optional_tensor_that_nobody_has_is_not_in_the_output_and_not_a_word_is_said() -> None:
    plan = planned([checkpoint("a"), checkpoint("b")])
    assert "text.extra" not in plan.outputs[0].layout.tensors
    assert plan.notes == ()


# markers


@pytest.mark.parametrize("policies", [Policies(), SKIP, BASE], ids=lambda policies: policies.missing)
@pytest.mark.parametrize("keys_from", [None, "a", "b"])
def test_a_marker_that_some_models_lack_is_an_error_whatever_the_policy(
    policies: Policies, keys_from: str | None
) -> None:
    models = [checkpoint("a"), checkpoint("b", USUAL | V_PRED), checkpoint("c")]
    wanted = replace(SINGLE, keys_from=keys_from, base="b" if policies == BASE else None)
    assert problems(planned(models, wanted, policies=policies)) == [
        "[made] image: the marker 'v_pred' is in b and not in a, c: models that predict v and models that predict "
        "epsilon must never be averaged; leave one kind out of the list"
    ]


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("policies", [Policies(), SKIP], ids=lambda policies: policies.missing)
def test_a_marker_that_some_models_lack_is_an_error_in_an_open_architecture(policies: Policies, first: str) -> None:
    models = {"a": checkpoint("a", {"x": (2,)}), "b": checkpoint("b", {"x": (2,)} | V_PRED)}
    listed = [models.pop(first), *models.values()]
    (problem,) = problems(planned(listed, architecture=OPEN, policies=policies))
    assert problem.startswith("[made] all: the marker 'v_pred' is in b and not in a: ")


def test_a_marker_that_all_models_have_is_in_the_output() -> None:
    models = [checkpoint("a", USUAL | V_PRED | {"sigma": ()}), checkpoint("b", USUAL | V_PRED | {"sigma": ()})]
    plan = planned(models, dtype="fp32")
    assert plan.outputs[0].layout.tensors["v_pred"].shape == (0,)
    assert ingredients(plan)["sigma"] == Ingredients(Dtype.F16, "agree", {"a": 1, "b": 1})
    assert problems(plan) == []


def test_a_marker_does_not_matter_where_its_component_is_not_selected() -> None:
    models = [checkpoint("a"), checkpoint("b", USUAL | V_PRED)]
    wanted = replace(SINGLE, components={"image": PartRequest(model="a")})
    plan = planned(models, wanted)
    assert problems(plan) == []
    assert "v_pred" not in plan.outputs[0].layout.tensors


def test_the_values_of_markers_must_agree_even_where_the_first_model_decides_on_integers() -> None:
    models = [checkpoint("a", USUAL | {"sigma": ()}), checkpoint("b", USUAL | {"sigma": ()})]
    plan = planned(models, policies=Policies(integers="first"))
    assert ingredients(plan)["sigma"] == Ingredients(Dtype.F16, "agree", {"a": 1, "b": 1})


# dtypes


@pytest.mark.parametrize(
    ("first", "second"),
    [(Dtype.F16, Dtype.I64), (Dtype.I64, Dtype.F16), (Dtype.F32, Dtype.I32), (Dtype.F16, Dtype.F16)],
    ids=lambda dtype: dtype.code,
)
def test_whole_numbers_are_copied_as_int64_whatever_the_models_store_them_in(first: Dtype, second: Dtype) -> None:
    models = [
        checkpoint("a", USUAL | IDS, dtypes={"text.ids": first}),
        checkpoint("b", USUAL | IDS, dtypes={"text.ids": second}),
    ]
    made = ingredients(planned(models))
    assert made["text.ids"] == Ingredients(Dtype.I64, "agree", {"a": 1, "b": 1})


@pytest.mark.parametrize("dtype", [one for one in Dtype if not one.is_float], ids=lambda dtype: dtype.code)
def test_a_tensor_that_is_not_of_floats_is_copied_and_must_agree(dtype: Dtype) -> None:
    models = [checkpoint("a", {"x": (2,)}), checkpoint("b", {"x": (2,)}, dtype)]
    assert ingredients(planned(models, architecture=OPEN, dtype="fp32")) == {
        "x": Ingredients(dtype, "agree", {"a": 1, "b": 1})
    }


def test_where_the_first_model_decides_on_integers_no_other_is_read() -> None:
    models = [
        checkpoint("a", USUAL | IDS, dtypes={"text.ids": Dtype.F16}),
        checkpoint("b", USUAL | IDS, dtypes={"text.ids": Dtype.I64}),
    ]
    made = ingredients(planned(models, policies=Policies(integers="first")))
    assert made["text.ids"] == Ingredients(Dtype.I64, "agree", {"a": 1})
    assert made["text.w"].shares == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        ("fp16", (Dtype.F16, Dtype.F16)),
        ("bf16", (Dtype.BF16, Dtype.BF16)),
        ("fp32", (Dtype.F32, Dtype.F32)),
        ("keep", (Dtype.F32, Dtype.BF16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_output_has_one_dtype_or_keeps_that_of_its_first_model_tensor_by_tensor(
    wanted: str, made: tuple[Dtype, Dtype]
) -> None:
    first = checkpoint("a", {"x": (2,), "y": (2,)}, dtypes={"x": Dtype.F32, "y": Dtype.BF16})
    plan = planned([first, checkpoint("b", {"x": (2,), "y": (2,)}, Dtype.F64)], architecture=OPEN, dtype=wanted)
    tensors = ingredients(plan)
    assert (tensors["x"].dtype, tensors["y"].dtype) == made


def test_keep_takes_the_dtype_of_the_first_model_that_has_the_tensor() -> None:
    models = [checkpoint("a", without("text.w")), checkpoint("b", dtype=Dtype.F32), checkpoint("c", dtype=Dtype.BF16)]
    assert ingredients(planned(models, policies=SKIP, dtype="keep"))["text.w"].dtype is Dtype.F32


# shapes


@pytest.mark.parametrize(
    ("other", "shown"),
    [((3, 2), "[3, 2]"), ((6,), "[6]"), ((1, 3), "[1, 3]"), ((2, 1), "[2, 1]"), ((), "[]"), ((0, 3), "[0, 3]")],
    ids=["turned", "flat", "broadcastable row", "broadcastable column", "0-dim", "zero-size"],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_shape_that_differs_is_an_error_that_names_the_model(other: Shape, shown: str, at: int) -> None:
    models = [checkpoint(id, USUAL | {"text.w": other} if place == at else USUAL) for place, id in enumerate("abc")]
    plan = planned(models)
    assert problems(plan) == [
        f"[made] text: model {'abc'[at]} has 1 tensor(s) of another shape than most: 'text.w' is {shown}, not [2, 3]; "
        "it is of another architecture; leave it out of the list"
    ]
    assert "text.w" not in plan.outputs[0].layout.tensors


def test_a_model_with_many_other_shapes_is_told_once_with_two_of_them() -> None:
    models = [checkpoint("a"), checkpoint("b", {key: (*shape, 7) for key, shape in USUAL.items()}), checkpoint("c")]
    assert problems(planned(models)) == [
        "[made] text: model b has 2 tensor(s) of another shape than most: 'text.w' is [2, 3, 7], not [2, 3], 'text.b' "
        "is [3, 7], not [3]; it is of another architecture; leave it out of the list",
        "[made] image: model b has 2 tensor(s) of another shape than most: 'image.w' is [3, 5, 7], not [3, 5], "
        "'image.empty' is [0, 5, 7], not [0, 5]; it is of another architecture; leave it out of the list",
    ]


def test_models_that_agree_on_another_shape_than_the_description_are_merged() -> None:
    models = [checkpoint(id, USUAL | {"text.w": (20, 30)}) for id in "ab"]
    plan = planned(models)
    assert problems(plan) == []
    assert plan.outputs[0].layout.tensors["text.w"].shape == (20, 30)


# surplus tensors


def test_surplus_tensors_are_told_once_for_the_models_that_have_the_same() -> None:
    odd = {"betas": (3,), "alphas": (3,)}
    models = [checkpoint("a", USUAL | odd), checkpoint("b", USUAL | {"betas": (9,)}), checkpoint("c", USUAL | odd)]
    plan = planned(models)
    assert problems(plan) == []
    assert plan.notes == (
        "[made] 2 surplus tensor(s) in a, c: alphas, betas; ignored",
        "[made] 1 surplus tensor(s) in b: betas; ignored",
    )
    assert "betas" not in plan.outputs[0].layout.tensors


def test_surplus_tensors_may_be_forbidden() -> None:
    models = [checkpoint("a"), checkpoint("b", USUAL | {f"odd.{number}": (1,) for number in range(5)})]
    assert problems(planned(models, policies=Policies(surplus="error"))) == [
        "[made] 5 surplus tensor(s) in b: odd.0, odd.1, odd.2 and 2 more; leave it out of the lists, or choose "
        "keys.surplus=ignore"
    ]


def test_a_tensor_that_has_a_problem_of_its_own_is_not_called_surplus() -> None:
    models = [
        checkpoint("a", {"x": (2,), "y": (3,)}),
        checkpoint("b", {"x": (2,)}),
        checkpoint("c", {"x": (2,), "y": (3,)}),
    ]
    plan = planned(models, architecture=OPEN)
    assert len(plan.problems) == 1
    assert plan.notes == ()


def test_tensors_of_a_component_that_is_not_selected_are_not_surplus() -> None:
    wanted = replace(SINGLE, selection=None, components={"text": PartRequest("models")})
    plan = planned([checkpoint("a", USUAL | V_PRED), checkpoint("b")], wanted, policies=Policies(surplus="error"))
    assert problems(plan) == []


# everything at once


def test_all_problems_of_all_targets_are_told_together_each_once_with_the_targets_that_it_concerns() -> None:
    models = [
        checkpoint("a"),
        checkpoint("b", without("text.w")),
        checkpoint("c", USUAL | V_PRED),
        checkpoint("d", USUAL | {"image.w": (5, 3), "odd": (1,)}),
    ]
    first = replace(SINGLE, components={"image": PartRequest("all")})
    second = replace(SINGLE, name="other", file="other.safetensors", components={"image": PartRequest("some")})
    plan = planned(models, first, second, selections={"models": "a,b", "all": "a,c,d", "some": "a,b"})
    assert [problem.partition(";")[0] for problem in problems(plan)] == [
        "[made, other] text: 1 tensor(s) not in b: text.w",
        "[made] image: the marker 'v_pred' is in c and not in a, d: models that predict v and models that predict "
        "epsilon must never be averaged",
        "[made] image: model d has 1 tensor(s) of another shape than most: 'image.w' is [5, 3], not [3, 5]",
    ]
    assert plan.notes == ("[made] 1 surplus tensor(s) in d: odd; ignored",)


@st.composite
def collections(draw: st.DrawFn) -> tuple[list[Checkpoint], Mapping[str, set[str]]]:
    """Open checkpoints that each have some of six keys, and who has which."""
    keys = "uvwxyz"
    models = [draw(st.sets(st.sampled_from(keys))) for _ in range(draw(st.integers(1, 6)))]
    made = [checkpoint(str(at), dict.fromkeys(sorted(has), (2,))) for at, has in enumerate(models)]
    return made, {key: {str(at) for at, has in enumerate(models) if key in has} for key in keys}


@given(collections(), st.sampled_from(["error", "skip"]))
def test_each_tensor_is_made_of_those_that_have_it_or_it_is_a_problem(
    case: tuple[list[Checkpoint], Mapping[str, set[str]]], missing: Any
) -> None:
    models, holders = case
    plan = planned(models, architecture=OPEN, policies=Policies(missing=missing))
    first = {key for key, who in holders.items() if "0" in who}
    complete = {key for key in first if len(holders[key]) == len(models)}
    made = ingredients(plan)
    assert made.keys() == (first if missing == "skip" else complete)
    for key, tensor in made.items():
        assert tensor.shares == dict.fromkeys(sorted(holders[key], key=int), 1)
    assert bool(plan.problems) == (missing == "error" and first != complete)
    told = re.findall(r"not in ([0-9, ]+):", " ".join([*problems(plan), *plan.notes]))
    named = {id for ids in told for id in ids.split(", ")}
    assert named == {one.id for one in models if not first <= one.header.tensors.keys()}
