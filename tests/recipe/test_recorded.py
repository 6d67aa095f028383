"""Recorded trees: what a config may write, what it must not, and which tree comes of it."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.config import schema
from mergeflow.config.convert import to_config
from mergeflow.errors import MergeflowError
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.recorded import Merge, read_merges, recorded_tree
from mergeflow.recipe.tree import Node, Tree

if TYPE_CHECKING:
    from collections.abc import Callable

CONF = Path(__file__).parent.parent.parent / "conf"
MODELS = ModelSet(
    {id: f"/m/{id}.safetensors" for id in ("01", "02", "03", "04", "25")}, {"11a": ("01", "02")}, "/models"
)


def tree(nodes: dict[str, Any], vae: str | None = None) -> Tree:
    return recorded_tree(read_merges(nodes, vae), MODELS)


def problems(call: Callable[[], object]) -> list[str]:
    with pytest.raises(MergeflowError) as caught:
        call()
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


# what is written


@pytest.mark.parametrize(
    ("written", "merge"),
    [
        (["x", "02"], Merge(("x", "02"))),
        (("x", "02"), Merge(("x", "02"))),
        ([1, 2], Merge(("1", "2"))),
        (["x", "02", 0.3], Merge(("x", "02"), 0.3)),
        (["x", "02", 1], Merge(("x", "02"), 1.0)),
        (["x", "02", -0.5], Merge(("x", "02"), -0.5)),
        ({"a": "x", "b": "02"}, Merge(("x", "02"))),
        ({"b": "02", "a": "x", "multiplier": 2}, Merge(("x", "02"), 2.0)),
        ({"a": "x", "b": "02", "save_half": False, "bake": 25}, Merge(("x", "02"), save_half=False, bake="25")),
        (
            {"a": "x", "b": "02", "c": "03", "formula": "add_difference", "multiplier": 0.7},
            Merge(("x", "02", "03"), 0.7, "add_difference"),
        ),
        ({"a": "x", "formula": "no_interpolation"}, Merge(("x",), formula="no_interpolation")),
    ],
    ids=[
        "a pair",
        "a tuple",
        "ids that YAML reads as numbers",
        "a pair and M",
        "a whole M",
        "a negative M",
        "a mapping",
        "B before A",
        "everything else",
        "add difference",
        "no interpolation",
    ],
)
def test_a_merge_is_written_in_three_forms(written: Any, merge: Merge) -> None:
    assert read_merges({"n": written}, None) == {"n": merge}
    (multiplier,) = {type(one.multiplier) for one in read_merges({"n": written}, None).values()}
    assert multiplier is float


def test_the_vae_is_baked_in_at_every_node_that_does_not_say_otherwise() -> None:
    merges = read_merges(
        {
            "x": ["01", "02"],
            "y": {"a": "x", "b": "03"},
            "z": {"a": "y", "b": "04", "bake": "01"},
            "top": {"a": "z", "b": "04", "bake": None},
        },
        "25",
    )
    assert [merge.bake for merge in merges.values()] == ["25", "25", "01", None]


ODD = {
    "text": ("01,02", "is neither [A, B], [A, B, M] nor a mapping of a, b, c, multiplier, formula, save_half, bake"),
    "nothing": (None, "is neither [A, B], [A, B, M] nor a mapping of a, b, c, multiplier, formula, save_half, bake"),
    "one": (["01"], "is neither [A, B], [A, B, M] nor a mapping of a, b, c, multiplier, formula, save_half, bake"),
    "four": (["1", "2", "3", "4"], "is neither [A, B], [A, B, M] nor a mapping of a, b, c, multiplier, formula, "),
    "typo": ({"a": "01", "b": "02", "multipler": 1}, "has multipler; a merge has a, b, c, multiplier, formula, "),
    "number": ({1: "01", "b": "02"}, "has 1; a merge has a, b, c, multiplier, formula, save_half, bake"),
    "formula": (
        {"a": "01", "b": "02", "formula": "sum"},
        "has the formula 'sum'; choose weighted_sum, add_difference, no_interpolation",
    ),
    "formulas": ({"a": "01", "b": "02", "formula": ["weighted_sum"]}, "has the formula ['weighted_sum']; choose "),
    "no b": ({"a": "01"}, ": weighted_sum takes a, b, and this has a"),
    "empty": ({}, ": weighted_sum takes a, b, and this has nothing"),
    "surplus c": ({"a": "01", "b": "02", "c": "03"}, ": weighted_sum takes a, b, and this has a, b, c"),
    "no c": (
        {"a": "01", "b": "02", "formula": "add_difference"},
        ": add_difference takes a, b, c, and this has a, b, formula",
    ),
    "surplus b": (
        {"a": "01", "b": "02", "formula": "no_interpolation"},
        ": no_interpolation takes a, and this has a, b, formula",
    ),
    "third id": (["01", "02", "03"], "has the multiplier '03', which is no number to multiply by"),
    "bool": (["01", "02", True], "has the multiplier True, which is no number to multiply by"),
    "nan": (["01", "02", math.nan], "has the multiplier nan, which is no number to multiply by"),
    "infinity": (["01", "02", math.inf], "has the multiplier inf, which is no number to multiply by"),
    "too large": (
        ["01", "02", 10**400],
        "has the multiplier 1000000000...00000000000, which is no number to multiply by",
    ),
    "no multiplier": ({"a": "01", "b": "02", "multiplier": None}, "has the multiplier None, which is no number to "),
    "half": ({"a": "01", "b": "02", "save_half": "yes"}, "has save_half 'yes'; write true or false"),
    "nested": ([["01", "02"], "03"], "has ['01', '02'] as a, where a model or another merge is named"),
    "no a": ([None, "03"], "has None as a, where a model or another merge is named"),
    "bool b": (["01", False], "has False as b, where a model or another merge is named"),
    "bake": ({"a": "01", "b": "02", "bake": True}, "has True as bake, where a model or another merge is named"),
}


@pytest.mark.parametrize(("written", "told"), ODD.values(), ids=ODD.keys())
def test_what_is_no_merge_is_refused(written: Any, told: str) -> None:
    (problem,) = problems(lambda: read_merges({"n": written}, None))
    assert problem.startswith(f"recipe.nodes.n{told}" if told.startswith(":") else f"recipe.nodes.n {told}")


def test_all_that_is_odd_is_told_together() -> None:
    found = problems(lambda: read_merges({name: written for name, (written, _) in ODD.items()} | {"x": [1, 2]}, None))
    assert len(found) == len(ODD)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["01", "x"]),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b", "c", "multiplier", "formula", "bake", "save_half", "?"]), below)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["x", "y", "z"]), JSON, max_size=3), st.sampled_from([None, "25", "x"]))
def test_whatever_is_written_gives_a_tree_or_is_refused(nodes: dict[str, Any], vae: str | None) -> None:
    try:
        made = tree(nodes, vae)
    except MergeflowError:
        return
    assert len(made.nodes) == len(nodes)


# the tree


def test_leaves_come_as_a_before_b_leads_to_them_and_nodes_level_by_level() -> None:
    made = tree({"top": ["z", "y"], "y": ["04", "01"], "z": ["x", "25"], "x": ["3", "002"]})
    assert made.leaves == ("03", "02", "25", "04", "01")
    assert made.nodes == (Node("y", (3, 4)), Node("x", (0, 1)), Node("z", (6, 2)), Node("top", (7, 5)))
    assert made.levels == (0, 0, 0, 0, 0, 1, 1, 2, 3)


def test_nodes_of_one_level_keep_the_order_in_which_they_are_written() -> None:
    nodes = {"c": ["01", "02"], "a": ["03", "04"], "top": ["a", "b"], "b": ["c", "c"]}
    assert [node.name for node in tree(nodes).nodes] == ["c", "a", "b", "top"]


def test_a_node_and_a_model_may_be_used_more_than_once() -> None:
    made = tree({"x": ["01", "02"], "y": ["x", "01"], "top": {"a": "x", "b": "y", "multiplier": 0.25}})
    assert made.leaves == ("01", "02")
    assert made.nodes == (Node("x", (0, 1)), Node("y", (2, 0)), Node("top", (2, 3), 0.25))
    assert made.weights() == {"01": Fraction(9, 16), "02": Fraction(7, 16)}


def test_every_formula_keeps_its_inputs_in_order() -> None:
    made = tree(
        {
            "x": {"a": "02", "b": "01", "c": "03", "formula": "add_difference", "multiplier": 0.5},
            "y": {"a": "x", "formula": "no_interpolation", "bake": "25", "save_half": False},
        }
    )
    assert made == Tree(
        ("02", "01", "03"),
        (Node("x", (0, 1, 2), 0.5, "add_difference"), Node("y", (3,), 0.5, "no_interpolation", False, "25")),
    )
    assert made.weights() == {"02": Fraction(1), "01": Fraction(1, 2), "03": Fraction(-1, 2)}
    assert made.baked == ("25",)


def test_the_vae_may_be_a_leaf_too_and_is_spelled_as_the_model_set_has_it() -> None:
    made = tree({"x": ["25", "01"]}, "025")
    assert made == Tree(("25", "01"), (Node("x", (0, 1), bake="25"),))


def test_a_merge_that_is_called_as_a_model_is_the_merge_but_where_a_vae_is_taken() -> None:
    made = tree({"25": ["01", "02"], "top": {"a": "25", "b": "03", "bake": "25"}})
    assert made == Tree(("01", "02", "03"), (Node("25", (0, 1)), Node("top", (3, 2), bake="25")))


def test_a_chain_of_thousands_needs_no_recursion() -> None:
    nodes = {"n0": ["01", "02"]} | {f"n{i}": [f"n{i - 1}", "03", 0.5] for i in range(1, 2000)}
    assert tree(nodes).levels[-1] == 2000


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ({}, ["recipe.nodes is empty; give the merges of the tree"]),
        (
            {"x": ["01", "02"], "y": ["03", "04"], "z": ["x", "25"]},
            ["recipe.nodes has 2 results, y, z; a tree has one"],
        ),
        ({"x": ["x", "02"]}, ["recipe.nodes goes round in a circle: x; a merge is made of others"]),
        (
            {"x": ["z", "01"], "under": ["01", "02"], "y": ["x", "under"], "z": ["y", "03"], "top": ["z", "04"]},
            ["recipe.nodes goes round in a circle: x, y, z; a merge is made of others"],
        ),
        (
            {"x01a": ["01", "02"], "top": ["x1a", "99"]},
            [
                "recipe.nodes.top: 'x1a' is neither a merge of the recipe nor in /models; did you mean 'x01a'?",
                "recipe.nodes.top: '99' is neither a merge of the recipe nor in /models",
                "recipe.nodes has 2 results, x01a, top; a tree has one",
            ],
        ),
        ({"x": ["11a", "03"]}, ["recipe.nodes.x: '11a' is a composite of 01, 02; name one model"]),
        ({"x": {"a": "01", "b": "02", "bake": "11a"}}, ["recipe.nodes.x: '11a' is a composite of 01, 02; name one "]),
        (
            {"x": ["01", "02"], "y": {"a": "x", "b": "02", "bake": "x"}},
            ["recipe.nodes.y: 'x' is a merge, and only the VAE of a model is baked in"],
        ),
        (
            {f"x{at}": [str(at), "02"] for at in range(90, 95)} | {"y": ["x90", "90"]},
            [
                "recipe.nodes names 5 models that are not in /models: 90, 91, 92, 93, 94; add them, or set models.dir",
                "recipe.nodes has 5 results, x91, x92, x93, x94 and 1 more; a tree has one",
            ],
        ),
        (
            {"x": ["98", "02"], "y": {"a": "x", "b": "02", "bake": "99"}},
            [
                "recipe.nodes.x: '98' is neither a merge of the recipe nor in /models",
                "recipe.nodes.y: '99' is neither a merge of the recipe nor in /models",
            ],
        ),
    ],
    ids=[
        "empty",
        "two results",
        "made of itself",
        "a circle",
        "unknown inputs",
        "a composite",
        "a composite as VAE",
        "a merge as VAE",
        "another folder",
        "several",
    ],
)
def test_what_is_no_tree_is_refused_with_all_that_is_wrong(nodes: dict[str, Any], told: list[str]) -> None:
    found = problems(lambda: tree(nodes))
    assert len(found) == len(told)
    assert all(problem.startswith(words) for problem, words in zip(found, told, strict=True))


# x39a


@pytest.fixture(scope="module")
def x39a() -> Tree:
    """The tree of `conf/recipe/x39a.yaml` over models 01 to 44."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        recipe = to_config(compose("config", ["recipe=x39a"])).recipe
    models = ModelSet({f"{number:02}": f"/m/{number:02}.safetensors" for number in range(1, 45)})
    return recorded_tree(read_merges(recipe.nodes, recipe.vae), models)


def test_x39a_is_made_of_forty_models_by_thirty_nine_merges_in_six_levels(x39a: Tree) -> None:
    assert (len(x39a.leaves), len(x39a.nodes), x39a.levels[-1]) == (40, 39, 6)
    assert [node.name for node in x39a.nodes] == [f"x{number:02}a" for number in range(1, 40)]
    assert sorted(x39a.leaves) == [f"{n:02}" for n in range(1, 43) if n not in (4, 35)]
    assert x39a.leaves[:6] == ("01", "02", "03", "41", "05", "06")


def test_every_model_has_a_fortieth_of_x39a(x39a: Tree) -> None:
    assert set(x39a.weights().values()) == {Fraction(1, 40)}
    assert [(node.name, node.multiplier) for node in x39a.nodes if node.multiplier != 0.5] == [("x39a", 0.2)]


def test_the_vae_of_25_is_baked_into_x39a_everywhere_but_at_the_top(x39a: Tree) -> None:
    assert [node.bake for node in x39a.nodes] == ["25"] * 38 + [None]
    assert all(node.save_half and node.formula == "weighted_sum" for node in x39a.nodes)
    assert {id: weight for id, weight in x39a.weights(baked=True).items() if weight} == {"25": Fraction(1)}
