"""Merge trees: two checkpoints become one, which becomes one with another, until one is left.

A tree is flat, so that a chain of hundreds needs no recursion: *places* count the leaves first and then the nodes,
and every node comes after what it merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mergeflow.recipe.architecture import Architecture

Formula = Literal["weighted_sum", "add_difference", "no_interpolation"]
Arithmetic = Literal["webui", "float32", "float64", "comfyui", "supermerger"]
Scalars = Literal["opmath", "half"]

VAE = "first_stage_model."
"""What the keys of a VAE start with in a checkpoint."""
MOST_MERGES = 1000
"""Of a tree that a file tells: what each checkpoint contributes is a fraction whose digits grow with every merge."""
INPUTS = {"weighted_sum": 2, "add_difference": 3, "no_interpolation": 1}
"""How many places each formula merges: A, B and C."""


class Node(NamedTuple):
    """One merge."""

    name: str
    inputs: tuple[int, ...]
    """The places of A, B and C, as many as the formula takes."""
    multiplier: float = 0.5
    """M of `(1 - M) A + M B` (weighted sum) or of `A + M (B - C)` (add difference)."""
    formula: Formula = "weighted_sum"
    save_half: bool = True
    """Whether what is fp32 is saved as fp16."""
    bake: str | None = None
    """The checkpoint whose VAE replaces that of the result."""


class Rules(NamedTuple):
    """Whose arithmetic a tree is computed in."""

    arithmetic: Arithmetic = "webui"
    scalars: Scalars = "opmath"
    """What torch multiplies a tensor of 16 bits by: the fp32 of M (2.1 and later), or M in the tensor's own dtype."""


@dataclass(frozen=True)
class Tree:
    """Merges of merges of checkpoints."""

    leaves: tuple[str, ...]
    """Ids of checkpoints, in the order of the list, each once; a node may stand on one that others stand on."""
    nodes: tuple[Node, ...]
    """In the order in which their names count, inputs before what is made of them; the last one is the result."""

    @property
    def top(self) -> int:
        """The place of the result; a tree without nodes is its only leaf."""
        return len(self.leaves) + len(self.nodes) - 1

    def node(self, place: int) -> Node | None:
        """The node at `place`, or None for a leaf."""
        return self.nodes[place - len(self.leaves)] if place >= len(self.leaves) else None

    def name(self, place: int) -> str:
        """What stands at `place`: the id of a checkpoint or the name of a node."""
        return self.leaves[place] if place < len(self.leaves) else self.nodes[place - len(self.leaves)].name

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """The level of every place: 0 for a leaf, else one more than the highest of what is merged."""
        found = [0] * len(self.leaves)
        for node in self.nodes:
            found.append(1 + max(found[place] for place in node.inputs))
        return tuple(found)

    @cached_property
    def baked(self) -> tuple[str, ...]:
        """The checkpoints whose VAE is baked in anywhere."""
        return tuple(dict.fromkeys(node.bake for node in self.nodes if node.bake is not None))

    def sources(self, *, baked: bool = False) -> tuple[str, ...]:
        """The checkpoints that the result is made of: all leaves; or those of its VAE, if `baked`.

        What stands below a node that bakes a VAE in has no part in that. Leaves keep their order, and come first.
        """
        reached, bakes = {self.top}, dict[str, None]()
        for place in range(self.top, len(self.leaves) - 1, -1):
            node = self.nodes[place - len(self.leaves)]
            if place in reached and baked and node.bake is not None:
                bakes[node.bake] = None
            elif place in reached:
                reached.update(node.inputs)
        found = [id for place, id in enumerate(self.leaves) if place in reached or id in bakes]
        return (*found, *(id for id in bakes if id not in found))

    def weights(self, *, baked: bool = False) -> dict[str, Fraction]:
        """What every checkpoint contributes, were nothing rounded; multipliers are taken as the decimals they show.

        If `baked`, to the VAE: what stands below a node that bakes one in has no part in it.
        """
        total = dict.fromkeys(self.leaves, Fraction(0))
        shares = [Fraction(0)] * (self.top + 1)
        shares[self.top] = Fraction(1)
        for place in range(self.top, len(self.leaves) - 1, -1):
            node = self.nodes[place - len(self.leaves)]
            if baked and node.bake is not None:
                total[node.bake] = total.get(node.bake, Fraction(0)) + shares[place]
                continue
            for below, factor in self._factors(place):
                shares[below] += shares[place] * factor
        for id, share in zip(self.leaves, shares, strict=False):
            total[id] += share
        return total

    def _factors(self, place: int) -> Iterator[tuple[int, Fraction]]:
        node = self.nodes[place - len(self.leaves)]
        m = Fraction(repr(node.multiplier))
        factors: Sequence[Fraction] = {
            "weighted_sum": (1 - m, m),
            "add_difference": (Fraction(1), m, -m),
            "no_interpolation": (Fraction(1),),
        }[node.formula]
        return iter(zip(node.inputs, factors, strict=True))


def of_vae_alone(architecture: Architecture, component: str) -> bool:
    """Whether a component has no tensor that is not a VAE's."""
    found = architecture.components.get(component)
    return found is not None and not found.open and all(key.startswith(VAE) for key in found.keys)
