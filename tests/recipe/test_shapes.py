"""How lists become trees: who is paired with whom, at which share, and what the merges are called."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.shapes import TreeOptions, grow, multiplier_problems
from tests.byhand.tree import Pair, balanced, chain

if TYPE_CHECKING:
    from mergeflow.recipe.tree import Tree

COMPOSITES = {"mix": ("1", "2", "3"), "outer": ("mix", "4"), "single": ("5",), "same": ("single",), "7x": ("6", "7")}
MODELS = ModelSet({str(index): f"/m/{index}" for index in range(257)}, COMPOSITES)


def grown(entries: object, shape: object = "balanced", **options: Any) -> Tree:
    """The tree over a list, or over the first so many models."""
    listed = [str(index) for index in range(entries)] if isinstance(entries, int) else str(entries).split()
    return grow("list", listed, MODELS, TreeOptions(shape, **options))


def by_name(tree: Tree) -> dict[str, tuple[str, str, float]]:
    """Every node's inputs, by name, and its multiplier."""
    return {node.name: (tree.name(node.inputs[0]), tree.name(node.inputs[1]), node.multiplier) for node in tree.nodes}


def as_pairs(tree: Tree, place: int | None = None) -> object:
    """The tree as nested pairs of leaves, which are told by their number in the list."""
    place = tree.top if place is None else place
    node = tree.node(place)
    if node is None:
        return int(tree.name(place))
    a, b = node.inputs
    return Pair(as_pairs(tree, a), as_pairs(tree, b), node.multiplier)  # type: ignore[arg-type]


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_neighbours_are_paired_level_by_level_and_who_is_left_over_waits() -> None:
    tree = grown(7)
    assert tree.leaves == ("0", "1", "2", "3", "4", "5", "6")
    assert by_name(tree) == {
        "list-1": ("0", "1", 0.5),
        "list-2": ("2", "3", 0.5),
        "list-3": ("4", "5", 0.5),
        "list-4": ("list-1", "list-2", 0.5),
        "list-5": ("list-3", "6", 1 / 3),
        "list-6": ("list-4", "list-5", 3 / 7),
    }
    assert tree.levels == (0,) * 7 + (1, 1, 1, 2, 2, 3)


def test_a_chain_is_a_running_mean() -> None:
    tree = grown(4, "chain")
    assert by_name(tree) == {
        "list-1": ("0", "1", 0.5),
        "list-2": ("list-1", "2", 1 / 3),
        "list-3": ("list-2", "3", 0.25),
    }
    assert tree.levels == (0, 0, 0, 0, 1, 2, 3)


@pytest.mark.parametrize("shape", ["balanced", "chain"])
def test_any_number_of_models_has_the_shape_that_the_reference_has(shape: str) -> None:
    for count in range(1, 131):
        assert as_pairs(grown(count, shape)) == {"balanced": balanced, "chain": chain}[shape](count)


@pytest.mark.parametrize(
    ("count", "joins"),
    [
        pytest.param(14, {"list-12": (4, 2, 1 / 3), "list-13": (8, 6, 6 / 14)}, id="te0 of x17, of 14"),
        pytest.param(21, {"list-18": (4, 1, 1 / 5), "list-20": (16, 5, 5 / 21)}, id="te1 of x17, of 21"),
        pytest.param(40, {"list-39": (32, 8, 0.2)}, id="x39a, of 40"),
        pytest.param(32, {"list-31": (16, 16, 0.5)}, id="unet of x17, of 32"),
    ],
)
def test_b_joins_at_its_share_of_the_entries(count: int, joins: dict[str, tuple[int, int, float]]) -> None:
    tree = grown(count)
    found = by_name(tree)
    for name, (ours, theirs, multiplier) in joins.items():
        a, b, joined_at = found[name]
        assert (entries(tree, a), entries(tree, b), joined_at) == (ours, theirs, multiplier)
    others = {multiplier for name, (_, _, multiplier) in found.items() if name not in joins}
    assert others == {0.5}


def entries(tree: Tree, name: str) -> int:
    """How many leaves lie below a node."""
    found = {leaf: 1 for leaf in tree.leaves}
    for node in tree.nodes:
        found[node.name] = sum(found[tree.name(place)] for place in node.inputs)
    return found[name]


def test_forty_models_make_the_tree_of_x39a() -> None:
    tree = grown(40)
    assert [sum(level == one for level in tree.levels) for one in range(7)] == [40, 20, 10, 5, 2, 1, 1]
    nodes = by_name(tree)
    assert [nodes[f"list-{number}"][:2] for number in (1, 20, 21, 30)] == [
        ("0", "1"),
        ("38", "39"),
        ("list-1", "list-2"),
        ("list-19", "list-20"),
    ]
    assert nodes["list-35"][:2] == ("list-29", "list-30"), "x35a, of the last eight"
    assert nodes["list-38"][:2] == ("list-36", "list-37"), "x38a, of the first 32"
    assert nodes["list-39"] == ("list-38", "list-35", 0.2)
    assert set(tree.weights().values()) == {Fraction(1, 40)}


def test_one_entry_is_a_tree_without_nodes() -> None:
    assert (grown(1).leaves, grown(1).nodes, grown(1, "chain").nodes) == (("0",), (), ())


@pytest.mark.parametrize("form", [list, tuple, json.dumps], ids=["lists", "tuples", "not text"])
def test_a_nested_list_says_who_is_merged_with_whom(form: Any) -> None:
    shape = [["3", [0, "04"]], [["1", "2"], "5"]]
    if form is json.dumps:
        with pytest.raises(ConfigError, match="is no shape; choose balanced, chain, or write a nested list"):
            grown(6, form(shape))
        return
    tree = grown(6, form(map(form, shape)))
    assert tree.leaves == ("3", "0", "4", "1", "2", "5")
    assert by_name(tree) == {
        "list-1": ("0", "4", 0.5),
        "list-2": ("1", "2", 0.5),
        "list-3": ("3", "list-1", 2 / 3),
        "list-4": ("list-2", "5", 1 / 3),
        "list-5": ("list-3", "list-4", 0.5),
    }


def test_every_selection_may_have_a_shape_of_its_own() -> None:
    shape = {"list": "chain", "other": [["0", "1"], "2"]}
    assert as_pairs(grown(3, shape)) == chain(3)
    assert as_pairs(grow("third", ["0", "1", "2", "3"], MODELS, TreeOptions(shape))) == balanced(4)


WRONG_SHAPES = {
    "no shape": ("comb", "method.shape=comb is no shape; choose balanced, chain, or write a nested list of ids"),
    "a number": (7, "method.shape=7 is no shape"),
    "three at once": ([["0", "1", "2"], "3"], "method.shape: ['0', '1', '2'] has 3 items; a merge takes two, [A, B]"),
    "one alone": ([["0"], "1"], "method.shape: ['0'] has 1 items; a merge takes two"),
    "many": ([["0"] * 40, "1"], "'0', '0', '0', ...] has 40 items"),
    "no id": ([["0", 1.5], "2"], "method.shape: 1.5 is neither an id nor a pair; put ids into quotes"),
    "a truth": ([["0", True], "2"], "method.shape: True is neither an id nor a pair"),
    "unknown": ([["0", "1"], "299"], "'299' is not in the model set"),
    "not listed": (
        [["0", "1"], ["2", ["3", "9"]]],
        "method.shape names '9', which selection 'list' does not have; write it for that selection alone, as "
        "method.shape={list: [...]}",
    ),
    "left out": (["0", ["1", "3"]], "method.shape leaves out 2 of selection 'list'; write it for that selection alone"),
    "twice": ([["0", "1"], [["2", "3"], "01"]], "method.shape names 1 more than once; every entry of 'list' counts"),
}


@pytest.mark.parametrize(("shape", "told"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_a_shape_that_does_not_hold_just_these_entries_is_refused(shape: object, told: str) -> None:
    with pytest.raises(MergeflowError) as caught:
        grown(4, shape)
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


# --- composites -----------------------------------------------------------------------------------------------------


def test_a_composite_is_an_entry_with_a_node_of_its_own() -> None:
    tree = grown("0 mix 4")
    assert tree.leaves == ("0", "1", "2", "3", "4")
    assert by_name(tree) == {
        "mix-1": ("1", "2", 0.5),
        "mix": ("mix-1", "3", 1 / 3),
        "list-1": ("0", "mix", 0.5),
        "list-2": ("list-1", "4", 1 / 3),
    }
    assert tree.levels[5:] == (1, 2, 3, 4)


def test_a_composite_that_several_entries_lead_to_is_merged_once() -> None:
    tree = grown("outer mix 1")
    assert tree.leaves == ("1", "2", "3", "4")
    assert by_name(tree) == {
        "mix-1": ("1", "2", 0.5),
        "mix": ("mix-1", "3", 1 / 3),
        "outer": ("mix", "4", 0.5),
        "list-1": ("outer", "mix", 0.5),
        "list-2": ("list-1", "1", 1 / 3),
    }


@pytest.mark.parametrize("entry", ["single", "same"])
def test_a_composite_of_one_member_is_that_member(entry: str) -> None:
    assert by_name(grown(f"0 {entry}")) == {"list-1": ("0", "5", 0.5)}
    assert grown(entry).nodes == ()


def test_a_composite_alone_is_the_top() -> None:
    tree = grown("mix")
    assert list(by_name(tree)) == ["mix-1", "mix"]
    assert tree.name(tree.top) == "mix"


def test_composites_are_named_in_nested_lists() -> None:
    tree = grown("mix 0 7x", [["0", "7x"], "mix"])
    assert by_name(tree)["list-2"] == ("list-1", "mix", 1 / 3)
    with pytest.raises(ConfigError, match="names '1', which selection 'list' does not have"):
        grown("mix 0", [["1", "mix"], "0"])


# --- options --------------------------------------------------------------------------------------------------------


def test_multipliers_are_told_by_node_or_by_level_and_the_node_has_the_last_word() -> None:
    told = {"level1": 0.3, "list-2": 0.1, "level2": 0, "mix": 0.9}
    multipliers = {node.name: node.multiplier for node in grown("0 4 mix 5", multipliers=told).nodes}
    assert multipliers == {"list-1": 0.3, "mix-1": 0.3, "mix": 0.9, "list-2": 0.1, "list-3": 0.5}


@pytest.mark.parametrize(
    ("bake", "baked"),
    [("none", []), ("top", ["list-3"]), ("every", ["list-1", "list-2", "mix-1", "mix", "list-3"])],
)
def test_a_vae_is_baked_in_where_it_is_wanted(bake: Any, baked: list[str]) -> None:
    tree = grown("0 1 4 mix", bake=bake, vae=None if bake == "none" else "9", save_half=False)
    assert sorted(node.name for node in tree.nodes if node.bake == "9") == sorted(baked)
    assert tree.baked == (("9",) if baked else ())
    assert not any(node.save_half for node in tree.nodes)
    assert all(node.save_half for node in grown(5).nodes)


WRONG_MULTIPLIERS = {
    "no node": (
        {"list-7": 0.5},
        ["method.multipliers names 'list-7', which is neither a node nor a level of any tree"],
    ),
    "no level": ({"level4": 0.5}, ["'level4', which is neither a node nor a level of any tree; did you mean 'level"]),
    "a leaf": ({"0": 0.5}, ["names '0', which is neither"]),
    "not a number": ({"level1": float("nan")}, ["method.multipliers.level1=nan is not a number to multiply by"]),
    "infinite": ({"list-1": float("inf")}, ["method.multipliers.list-1=inf is not a number"]),
    "both": ({"x": float("inf")}, ["names 'x'", "multipliers.x=inf"]),
    "none": ({"list-1": 0.2, "level3": -1, "mix-1": 2, "level1": 1.5}, []),
}


@pytest.mark.parametrize(("multipliers", "told"), WRONG_MULTIPLIERS.values(), ids=WRONG_MULTIPLIERS)
def test_multipliers_that_nothing_takes_are_told(multipliers: dict[str, float], told: list[str]) -> None:
    problems = [str(error) for error in multiplier_problems(multipliers, [grown(5), grown("0 mix")])]
    assert [text in problem for text, problem in zip(told, problems, strict=True)] == [True] * len(told)


@given(st.lists(st.sampled_from([*map(str, range(8)), *COMPOSITES]), min_size=1, unique=True), st.booleans())
def test_weights_are_the_shares_of_the_entries(entries: list[str], chained: bool) -> None:
    tree = grown(" ".join(entries), "chain" if chained else "balanced")
    shares = MODELS.shares(entries)
    assert {id: weight.limit_denominator(10_000) for id, weight in tree.weights().items()} == shares
    assert list(tree.leaves) == list(dict.fromkeys(shares))
    assert len({node.name for node in tree.nodes}) == len(tree.nodes)


def test_a_chain_of_hundreds_needs_no_recursion() -> None:
    assert len(grown(257, "chain").nodes) == 256
