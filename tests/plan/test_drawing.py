"""Trees as text, exactly as they stand on the page of a plan."""

from __future__ import annotations

from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.plan.drawing import DEEPEST, baked, draw
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.shapes import TreeOptions, grow
from mergeflow.recipe.tree import Node, Tree


def grown(entries: str, options: TreeOptions | None = None, **composites: tuple[str, ...]) -> Tree:
    """What comes of a list called `t`, of models whose ids are letters."""
    models = ModelSet({id: f"/m/{id}" for id in "abcdefghijklmnopqrstuvwxyz"}, composites)
    return grow("t", entries.split(), models, options or TreeOptions())


SUM = Node("sum", (0, 1))
DRAWINGS = {
    "one model": (grown("a"), "a"),
    "two models": (grown("a b"), "t-1 = a + b"),
    "three models": (
        grown("a b c"),
        """\
        t-2  B at 0.333333
        ├─ t-1 = a + b
        └─ c""",
    ),
    "five models": (
        grown("a b c d e"),
        """\
        t-4  B at 0.2
        ├─ t-3
        │  ├─ t-1 = a + b
        │  └─ t-2 = c + d
        └─ e""",
    ),
    "a chain": (
        grown("a b c d", TreeOptions("chain")),
        """\
        t-3  B at 0.25
        ├─ t-2  B at 0.333333
        │  ├─ t-1 = a + b
        │  └─ c
        └─ d""",
    ),
    "a nested list": (
        grown("a b c d", TreeOptions(["d", [["b", "a"], "c"]])),
        """\
        t-3  B at 0.75
        ├─ d
        └─ t-2  B at 0.333333
           ├─ t-1 = b + a
           └─ c""",
    ),
    "multipliers": (
        grown("a b c d", TreeOptions(multipliers={"t-1": 0.3, "t-3": 0.4286, "t-2": 1})),
        """\
        t-3  B at 0.4286
        ├─ t-1 = a + b at 0.3
        └─ t-2 = c + d at 1""",
    ),
    "a composite": (
        grown("a x d", x=("b", "c")),
        """\
        t-2  B at 0.333333
        ├─ t-1
        │  ├─ a
        │  └─ x = b + c
        └─ d""",
    ),
    "a composite that two others are made of": (
        grown("y z", y=("x", "c"), z=("d", "x"), x=("a", "b", "e")),
        """\
        t-1
        ├─ y
        │  ├─ x  B at 0.333333
        │  │  ├─ x-1 = a + b
        │  │  └─ e
        │  └─ c
        └─ z
           ├─ d
           └─ x (as above)""",
    ),
    "a node twice": (
        Tree(("a", "b"), (SUM, Node("twice", (2, 2)))),
        """\
        twice
        ├─ sum = a + b
        └─ sum (as above)""",
    ),
    "add difference": (
        Tree(("a", "b", "c"), (Node("n", (0, 1, 2), 0.7, "add_difference"),)),
        "n = a + 0.7 (b - c)",
    ),
    "add difference of merges": (
        Tree(("a", "b", "c"), (SUM, Node("n", (3, 1, 2), 0.5, "add_difference"))),
        """\
        n  A + 0.5 (B - C)
        ├─ sum = a + b
        ├─ b
        └─ c""",
    ),
    "no interpolation": (Tree(("a",), (Node("n", (0,), 0.3, "no_interpolation"),)), "n = a"),
    "no interpolation of a merge": (
        Tree(("a", "b"), (SUM, Node("n", (2,), 0.3, "no_interpolation"))),
        """\
        n  A as it is
        └─ sum = a + b""",
    ),
}


@pytest.mark.parametrize(("tree", "drawing"), DRAWINGS.values(), ids=DRAWINGS.keys())
def test_a_tree_is_drawn_from_its_top_down(tree: Tree, drawing: str) -> None:
    assert "\n".join(draw(tree)) == dedent(drawing)


def test_a_tree_that_is_too_deep_to_draw_is_told_merge_by_merge() -> None:
    letters = " ".join("abcdefghijklmn"[: DEEPEST + 2])
    first, second, *_, last = lines = list(draw(grown(letters, TreeOptions("chain"))))
    assert (first, second) == ("t-1 = a + b", "t-2 = t-1 + c at 0.333333")
    assert last == "t-13 = t-12 + n at 0.0714286"
    assert len(lines) == DEEPEST + 1


def test_a_tree_that_is_just_not_too_deep_is_drawn() -> None:
    letters = " ".join("abcdefghijklmn"[: DEEPEST + 1])
    lines = list(draw(grown(letters, TreeOptions("chain"))))
    assert lines[0] == "t-12  B at 0.0769231"
    assert lines[11] == "│  " * 10 + "├─ t-1 = a + b"


@given(st.integers(1, 26), st.sampled_from(["balanced", "chain"]))
def test_every_node_and_every_model_is_told_once(count: int, shape: str) -> None:
    tree = grown(" ".join("abcdefghijklmnopqrstuvwxyz"[:count]), TreeOptions(shape))
    words = " ".join(draw(tree)).replace("├─", "").replace("└─", "").replace("│", "").split()
    assert all(words.count(leaf) == 1 for leaf in tree.leaves)
    named = [word for word in words if word.startswith("t-")]
    assert set(named) == {node.name for node in tree.nodes}
    assert len(named) == len(tree.nodes) or tree.levels[-1] > DEEPEST


# VAEs


def with_vaes(*vaes: str | None) -> Tree:
    """A chain whose nodes bake these in."""
    nodes = [Node(f"n{at}", (at + 1 if at else 0, 1), bake=vae) for at, vae in enumerate(vaes)]
    return Tree(("a", "b"), tuple(nodes))


@pytest.mark.parametrize(
    ("tree", "sentences"),
    [
        (with_vaes(None, None), []),
        (with_vaes("v"), ["the VAE of v is baked in at every node"]),
        (with_vaes("v", "v", "v"), ["the VAE of v is baked in at every node"]),
        (with_vaes("v", "v", None), ["the VAE of v is baked in at every node but n2"]),
        (with_vaes("v", None), ["the VAE of v is baked in at n0"]),
        (with_vaes(None, None, "v"), ["the VAE of v is baked in at n2"]),
        (
            with_vaes(*[None] * 6, *["v"] * 6),
            ["the VAE of v is baked in at n6, n7, n8, n9 and 2 more"],
        ),
        (
            with_vaes("v", "w", "v", "v"),
            ["the VAE of v is baked in at every node but n1", "the VAE of w is baked in at n1"],
        ),
    ],
    ids=["none", "one node", "every", "not at the top", "half", "at the top", "many", "two"],
)
def test_where_vaes_are_baked_in_is_told_in_words(tree: Tree, sentences: list[str]) -> None:
    assert list(baked(tree)) == sentences
