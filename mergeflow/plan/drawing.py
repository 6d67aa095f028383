"""A merge tree as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.recipe.tree import Node, Tree

DEEPEST = 12
"""Levels; what is deeper is told merge by merge, because branches would run off the page."""
HALF = 0.5


def draw(tree: Tree) -> Iterator[str]:
    """The tree from its top down, A above B; a merge of two checkpoints takes one line.

    M is told where it is not 0.5.
    """
    if not tree.nodes:
        yield tree.leaves[0]
    elif tree.levels[-1] > DEEPEST:
        yield from _merge_by_merge(tree)
    else:
        yield from _branches(tree)


def _branches(tree: Tree) -> Iterator[str]:
    drawn: set[int] = set()
    waiting = [(tree.top, "", "")]
    while waiting:
        place, first, others = waiting.pop()
        node = tree.node(place)
        if node is None:
            yield first + tree.name(place)
        elif place in drawn:
            yield f"{first}{node.name} (as above)"
        elif all(tree.node(below) is None for below in node.inputs):
            drawn.add(place)
            yield first + _equation(tree, node)
        else:
            drawn.add(place)
            yield first + node.name + _formula(node)
            *upper, last = node.inputs
            waiting.append((last, others + "└─ ", others + "   "))
            waiting += [(below, others + "├─ ", others + "│  ") for below in reversed(upper)]


def _merge_by_merge(tree: Tree) -> Iterator[str]:
    for node in tree.nodes:
        yield _equation(tree, node)


def _equation(tree: Tree, node: Node) -> str:
    a, *others = (tree.name(place) for place in node.inputs)
    if node.formula == "add_difference":
        made = f"{a} + {node.multiplier:.6g} ({' - '.join(others)})"
    else:
        made = " + ".join((a, *others)) + (
            "" if node.multiplier == HALF or not others else f" at {node.multiplier:.6g}"
        )
    return f"{node.name} = {made}"


def _formula(node: Node) -> str:
    """What a node makes of the branches below it, where that is not their mean."""
    if node.formula == "add_difference":
        return f"  A + {node.multiplier:.6g} (B - C)"
    if node.formula == "no_interpolation":
        return "  A as it is"
    return "" if node.multiplier == HALF else f"  B at {node.multiplier:.6g}"


def baked(tree: Tree) -> Iterator[str]:
    """At which nodes which VAE is baked in, in words."""
    for vae in tree.baked:
        names = [node.name for node in tree.nodes if node.bake == vae]
        others = [node.name for node in tree.nodes if node.bake != vae]
        where = some(names)
        if len(others) < len(names):
            where = "every node" + (f" but {some(others)}" if others else "")
        yield f"the VAE of {vae} is baked in at {where}"
