"""Trees as values: places, levels, and what every checkpoint contributes."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.recipe.tree import INPUTS, Formula, Node, Tree

F = Fraction
SUM: Final = "weighted_sum"
DIFFERENCE: Final = "add_difference"
NONE: Final = "no_interpolation"
FORMULAS: list[Formula] = [SUM, DIFFERENCE, NONE]
LEAF = Tree(("a",), ())
THREE = Tree(("a", "b", "c"), (Node("x", (0, 1), bake="v"), Node("y", (3, 2), 0.2)))
TOP_BAKED = Tree(THREE.leaves, (THREE.nodes[0], THREE.nodes[1]._replace(bake="w")))
SHARED = Tree(("a", "b"), (Node("x", (0, 1), 0.25), Node("y", (2, 0), 0.5), Node("z", (3, 2), 0.5)))
DIFFERENT = Tree(("a", "b", "c"), (Node("x", (0, 1, 2), 0.7, DIFFERENCE), Node("y", (3,), 0.3, NONE)))
AWAY = Tree(("a", "b"), (Node("x", (0, 1, 0), 1.5, DIFFERENCE),))


def test_places_count_the_leaves_first() -> None:
    assert THREE.top == 4
    assert [THREE.name(place) for place in range(5)] == ["a", "b", "c", "x", "y"]
    assert [THREE.node(place) for place in range(5)] == [None, None, None, *THREE.nodes]
    assert (LEAF.top, LEAF.name(0), LEAF.node(0)) == (0, "a", None)


@pytest.mark.parametrize(
    ("tree", "levels"),
    [
        pytest.param(LEAF, (0,), id="a leaf"),
        pytest.param(THREE, (0, 0, 0, 1, 2), id="a pair and one more"),
        pytest.param(SHARED, (0, 0, 1, 2, 3), id="a merge that is used twice"),
        pytest.param(DIFFERENT, (0, 0, 0, 1, 2), id="a difference"),
    ],
)
def test_a_level_is_one_more_than_the_highest_below(tree: Tree, levels: tuple[int, ...]) -> None:
    assert tree.levels == levels


WEIGHTS = {
    "a leaf": (LEAF, {"a": F(1)}),
    "a pair and one more": (THREE, {"a": F(2, 5), "b": F(2, 5), "c": F(1, 5)}),
    "a merge that is used twice": (SHARED, {"a": F(3, 8) + F(1, 4) + F(3, 16), "b": F(1, 8) + F(1, 16)}),
    "a difference": (DIFFERENT, {"a": F(1), "b": F(7, 10), "c": F(-7, 10)}),
    "a difference from what it is added to": (AWAY, {"a": F(-1, 2), "b": F(3, 2)}),
    "recorded decimals": (Tree(("a", "b"), (Node("x", (0, 1), 0.0526),)), {"a": F(9474, 10000), "b": F(526, 10000)}),
    "beyond both": (Tree(("a", "b"), (Node("x", (0, 1), -1e-3),)), {"a": F(1001, 1000), "b": F(-1, 1000)}),
    "whole": (Tree(("a", "b"), (Node("x", (0, 1), 1),)), {"a": F(0), "b": F(1)}),
}


@pytest.mark.parametrize(("tree", "weights"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_exact(tree: Tree, weights: dict[str, Fraction]) -> None:
    assert tree.weights() == weights
    assert list(tree.weights()) == list(tree.leaves)


BAKED = {
    "nowhere": (SHARED, SHARED.weights()),
    "below the top": (THREE, {"a": F(0), "b": F(0), "c": F(1, 5), "v": F(4, 5)}),
    "at the top": (TOP_BAKED, {"a": F(0), "b": F(0), "c": F(0), "v": F(0), "w": F(1)}),
    "of a leaf": (
        Tree(("a", "b"), (Node("x", (0, 1), bake="b"), Node("y", (2, 1), 0.25))),
        {"a": F(0), "b": F(1)},
    ),
    "in a difference": (
        Tree(("a", "b"), (Node("x", (0, 1), bake="v"), Node("y", (0, 2, 1), 0.5, DIFFERENCE))),
        {"a": F(1), "b": F(-1, 2), "v": F(1, 2)},
    ),
}


@pytest.mark.parametrize(("tree", "weights"), BAKED.values(), ids=BAKED)
def test_a_vae_is_made_of_what_is_baked_in(tree: Tree, weights: dict[str, Fraction]) -> None:
    assert tree.weights(baked=True) == weights


SOURCES = {
    "nowhere": (SHARED, SHARED.leaves),
    "below the top": (THREE, ("c", "v")),
    "at the top": (TOP_BAKED, ("w",)),
    "of a leaf": (BAKED["of a leaf"][0], ("b",)),
    "in a difference": (BAKED["in a difference"][0], ("a", "b", "v")),
    "of nothing but a leaf": (LEAF, LEAF.leaves),
}


@pytest.mark.parametrize(("tree", "sources"), SOURCES.values(), ids=SOURCES)
def test_a_vae_has_its_own_sources(tree: Tree, sources: tuple[str, ...]) -> None:
    assert tree.sources(baked=True) == sources
    assert tree.sources() == tree.leaves


def test_what_is_baked_in_is_named_once_and_in_order() -> None:
    assert (LEAF.baked, THREE.baked, TOP_BAKED.baked) == ((), ("v",), ("v", "w"))
    twice = Tree(("a", "b"), (Node("x", (0, 1), bake="w"), Node("y", (2, 1), bake="v"), Node("z", (3, 0), bake="w")))
    assert twice.baked == ("w", "v")


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    count = draw(st.integers(1, 5))
    nodes = []
    for number in range(draw(st.integers(0, 8))):
        formula = draw(st.sampled_from(FORMULAS))
        places = st.integers(0, count + number - 1)
        inputs = tuple(draw(places) for _ in range(INPUTS[formula]))
        nodes.append(Node(f"n{number}", inputs, draw(st.integers(-20, 20)) / 10, formula))
    return Tree(tuple("abcde"[:count]), tuple(nodes))


@given(trees())
def test_weights_are_what_the_formulas_make_of_every_leaf(tree: Tree) -> None:
    count = len(tree.leaves)
    made = [[F(place == leaf) for leaf in range(count)] for place in range(count)]
    for node in tree.nodes:
        m, inputs = F(str(node.multiplier)), [made[place] for place in node.inputs]
        factors = {SUM: (1 - m, m), DIFFERENCE: (F(1), m, -m), NONE: (F(1),)}[node.formula]
        made.append(
            [sum((f * x for f, x in zip(factors, column, strict=True)), F(0)) for column in zip(*inputs, strict=True)]
        )
    assert list(tree.weights().values()) == made[tree.top]
    assert sum(tree.weights().values()) == 1
