"""How a list becomes a tree: pair by pair, one after the other, or as a nested list says.

Every entry of the list counts once. A composite is an entry with a node of its own, whose members are paired in turn.
Unless a multiplier is given literally, a node joins B at its share of the entries: 0.5 for two halves, 6/14 for six
entries that join eight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from mergeflow.errors import ConfigError
from mergeflow.recipe.ids import nearest
from mergeflow.recipe.tree import Node, Tree
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mergeflow.recipe.modelset import ModelSet

Bake = Literal["none", "every", "top"]

LEVEL = "level"
"""`level3` in `multipliers` means every node of the third level."""


@dataclass(frozen=True)
class TreeOptions:
    """How the trees of a run are made from its lists."""

    shape: object = "balanced"
    """`balanced`, `chain`, a nested list of ids, or one of these for every selection by its name."""
    multipliers: Mapping[str, float] = field(default_factory=dict)
    """Literal multipliers, by the name of a node or by level."""
    save_half: bool = True
    bake: Bake = "none"
    vae: str | None = None
    """The checkpoint whose VAE is baked in, as the model set spells it."""


@dataclass(frozen=True)
class _Twig:
    """A part of a tree while it grows."""

    entries: int
    """How many entries of the list it is made of."""
    level: int = 0
    id: str = ""
    """Of a checkpoint or a composite; other nodes have none."""
    series: str = ""
    """What such a node is numbered under."""
    inputs: tuple[_Twig, ...] = ()
    """A and B, or nothing for a checkpoint."""


def grow(name: str, entries: Sequence[str], models: ModelSet, options: TreeOptions) -> Tree:
    """The tree over `entries` of the selection called `name`, whose nodes it names `name-1`, `name-2` and so on.

    `entries` are spelled as the model set has them, and its composites are known to end somewhere. Raises
    `ConfigError` if a nested list does not hold just these entries.
    """
    composites: dict[str, _Twig] = {}
    twigs = {entry: _entry(entry, models, composites) for entry in entries}
    shape = options.shape.get(name, "balanced") if isinstance(options.shape, Mapping) else options.shape
    joined = _Joiner(name)
    if shape == "balanced":
        top = joined.balanced(list(twigs.values()))
    elif shape == "chain":
        top = joined.chain(list(twigs.values()))
    elif isinstance(shape, Sequence) and not isinstance(shape, str):
        top = _nested(name, shape, twigs, models, joined)
    else:
        raise ConfigError(f"method.shape={shape} is no shape; choose balanced, chain, or write a nested list of ids")
    return _flat(top, options)


class _Joiner:
    """Joins twigs to nodes of one series."""

    def __init__(self, series: str) -> None:
        self._series = series

    def pair(self, a: _Twig, b: _Twig) -> _Twig:
        return _Twig(a.entries + b.entries, 1 + max(a.level, b.level), series=self._series, inputs=(a, b))

    def balanced(self, twigs: list[_Twig]) -> _Twig:
        """Pair level by level in order; who is left over waits at the end of the next level."""
        while len(twigs) > 1:
            pairs = [self.pair(twigs[i], twigs[i + 1]) for i in range(0, len(twigs) - 1, 2)]
            twigs = pairs + twigs[len(pairs) * 2 :]
        return twigs[0]

    def chain(self, twigs: Iterable[_Twig]) -> _Twig:
        """A running mean: the first two, then one more at a time."""
        first, *others = twigs
        for other in others:
            first = self.pair(first, other)
        return first


def _entry(id: str, models: ModelSet, composites: dict[str, _Twig]) -> _Twig:
    """A checkpoint, or the node of a composite; one that several entries lead to is merged once."""
    if id not in models.composites:
        return _Twig(1, id=id)
    if id not in composites:
        members = [_entry(models.find(member), models, composites) for member in models.composites[id]]
        made = _Joiner(id).balanced(members)
        composites[id] = replace(made, entries=1, id=id if made.inputs else made.id)
    return composites[id]


def _nested(name: str, shape: Sequence[object], twigs: Mapping[str, _Twig], models: ModelSet, joined: _Joiner) -> _Twig:
    """The tree that nested pairs of ids spell out, over just the entries of the selection."""
    used: list[str] = []

    def read(item: object) -> _Twig:
        if isinstance(item, Sequence) and not isinstance(item, str):
            if len(item) != 2:
                raise ConfigError(f"method.shape: {_shown(item)} has {len(item)} items; a merge takes two, [A, B]")
            return joined.pair(read(item[0]), read(item[1]))
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise ConfigError(f"method.shape: {item!r} is neither an id nor a pair; put ids into quotes")
        id = models.find(str(item))
        used.append(id)
        if id not in twigs:
            raise ConfigError(f"method.shape names '{id}', which selection '{name}' does not have{_by_name(name)}")
        return twigs[id]

    top = read(shape)
    if left := [id for id in twigs if id not in used]:
        raise ConfigError(f"method.shape leaves out {some(left)} of selection '{name}'{_by_name(name)}")
    if twice := sorted({id for id in used if used.count(id) > 1}):
        raise ConfigError(f"method.shape names {some(twice)} more than once; every entry of '{name}' counts once")
    return top


def _by_name(name: str) -> str:
    return f"; write it for that selection alone, as method.shape={{{name}: [...]}}"


def _shown(item: Sequence[object]) -> str:
    text = str(list(item))
    return text if len(text) < 60 else f"{text[:56]}...]"


def _flat(top: _Twig, options: TreeOptions) -> Tree:
    """The twig as a tree: leaves in the order of the list, nodes level by level."""
    leaves: list[_Twig] = []
    nodes: list[_Twig] = []
    seen: set[int] = set()
    waiting = [top]
    while waiting:
        twig = waiting.pop()
        if not twig.inputs:
            leaves.append(twig)
        elif id(twig) not in seen:
            seen.add(id(twig))
            nodes.append(twig)
            waiting += reversed(twig.inputs)
    order = {id(twig): rank for rank, twig in enumerate(nodes)}
    nodes.sort(key=lambda twig: (twig.level, order[id(twig)]))
    checkpoints = {leaf: place for place, leaf in enumerate(dict.fromkeys(leaf.id for leaf in leaves))}
    places = {id(leaf): checkpoints[leaf.id] for leaf in leaves}
    places |= {id(twig): len(checkpoints) + rank for rank, twig in enumerate(nodes)}
    counts: Counter[str] = Counter()
    made = []
    for twig in nodes:
        counts[twig.series] += not twig.id
        name = twig.id or f"{twig.series}-{counts[twig.series]}"
        made.append(_node(name, twig, places, options, is_top=twig is top))
    return Tree(tuple(checkpoints), tuple(made))


def _node(name: str, twig: _Twig, places: Mapping[int, int], options: TreeOptions, *, is_top: bool) -> Node:
    a, b = twig.inputs
    literal = options.multipliers.get(name, options.multipliers.get(f"{LEVEL}{twig.level}"))
    bakes = options.bake == "every" or (options.bake == "top" and is_top)
    return Node(
        name=name,
        inputs=tuple(places[id(one)] for one in twig.inputs),
        multiplier=b.entries / (a.entries + b.entries) if literal is None else literal,
        save_half=options.save_half,
        bake=options.vae if bakes else None,
    )


def multiplier_problems(multipliers: Mapping[str, float], trees: Iterable[Tree]) -> Iterator[ConfigError]:
    """Multipliers that are no numbers, or that no node of any tree takes."""
    names: dict[str, None] = {}
    for tree in trees:
        names |= dict.fromkeys(node.name for node in tree.nodes)
        names |= dict.fromkeys(f"{LEVEL}{level}" for level in sorted(set(tree.levels)) if level)
    for name, value in multipliers.items():
        if name not in names:
            yield ConfigError(
                f"method.multipliers names '{name}', which is neither a node nor a level of any tree"
                f"{nearest(name, names)} (job=plan draws the trees with their names)"
            )
        if not math.isfinite(value):
            yield ConfigError(f"method.multipliers.{name}={value} is not a number to multiply by")
