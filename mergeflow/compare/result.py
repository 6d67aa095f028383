"""What a comparison has found: by tensor, by block, by component and in all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.compare.statistics import Statistics, combined

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mergeflow.tensors import Checkpoint, Dtype, TensorInfo

OTHER = "other"
"""The component of what belongs to none."""
WORST = 10
"""Tensors that are told by name."""

Stage = tuple[str, ...]
"""What a key says before the number of a block: `("model", "layers")`."""


class Match(NamedTuple):
    """A tensor that both files have, with what each says of it."""

    key: str
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class KeyDifference:
    """How one tensor differs."""

    key: str
    component: str
    a: Dtype
    b: Dtype
    unit: Dtype | None
    """In whose ULP its distances are; None for integers."""
    shape: tuple[int, ...]
    integer: bool
    """Whether it holds whole numbers, such as the ids of positions, and no weights."""
    statistics: Statistics


@dataclass(frozen=True)
class Difference:
    """How one component differs, or the whole file. Keys are sorted."""

    component: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[Match, ...]
    """Tensors whose shapes differ; their values are not compared, nor read."""
    dtypes: tuple[Match, ...]
    """Tensors whose dtypes differ; they are compared by value."""
    tensors: int
    """How many tensors were compared."""
    statistics: Statistics
    """Of all of them; see `together`."""

    @property
    def equal(self) -> bool:
        """Whether both have the same tensors, with the same shapes and values."""
        return not (self.only_a or self.only_b or self.shapes or self.statistics.differing)


@dataclass(frozen=True)
class Block:
    """The tensors of one component at one depth."""

    component: str
    stage: str
    """What is numbered: `input_blocks`, `layers`; empty for all tensors of the component that are in no such place."""
    number: int | None
    statistics: Statistics
    """See `together`."""


@dataclass(frozen=True)
class Comparison:
    """All that is known of how two files differ."""

    a: Checkpoint
    b: Checkpoint
    components: tuple[Difference, ...]
    """In the order of the architecture, then what belongs to none. A component of which neither file has a tensor is
    not among them."""
    total: Difference
    """All components together."""
    tensors: tuple[KeyDifference, ...] = field(repr=False)
    """Every tensor that was compared, sorted by key."""
    bytes_read: int
    seconds: float

    def worst(self, count: int = WORST) -> list[KeyDifference]:
        """The tensors that differ most: first those with NaN or infinity in one file only, then by relative L2."""
        differing = (tensor for tensor in self.tensors if tensor.statistics.differing)
        return sorted(differing, key=lambda t: (not t.statistics.nonfinite, -t.statistics.relative_l2, t.key))[:count]

    def blocks(self) -> tuple[Block, ...]:
        """Every component by depth: its numbered blocks in order, then the rest of it in one."""
        made: list[Block] = []
        for difference in self.components:
            tensors = [tensor for tensor in self.tensors if tensor.component == difference.component]
            made += _blocks(difference.component, tensors)
        return tuple(made)


def together(tensors: Sequence[KeyDifference]) -> Statistics:
    """What is known of several tensors. Whole numbers count, but have no part in lengths and angles beside weights.

    The ids of positions in a text encoder, 0 to 76, are two hundred times as much as all its weights (as squares).
    """
    weights = [tensor.statistics for tensor in tensors if not tensor.integer]
    integers = [tensor.statistics for tensor in tensors if tensor.integer]
    return combined([*weights, *map(Statistics.counts, integers)] if weights else integers)


def _blocks(component: str, tensors: Sequence[KeyDifference]) -> list[Block]:
    stages = _stages(tensor.key for tensor in tensors)
    labels = _labels(stages)
    grouped: defaultdict[tuple[str, int], list[KeyDifference]] = defaultdict(list)
    rest: list[KeyDifference] = []
    for tensor in tensors:
        place = _place(tensor.key, stages)
        where = rest if place is None else grouped[labels[place[0]], place[1]]
        where.append(tensor)
    found = [Block(component, *place, together(grouped[place])) for place in sorted(grouped)]
    return [*found, Block(component, "", None, together(rest))] if rest else found


def _stages(keys: Iterable[str]) -> set[Stage]:
    """What numbers blocks: names that are followed by 0 and every number up to some other.

    So `input_blocks.0` to `input_blocks.8` are blocks; `embedders.1` and `time_embed.0` with `time_embed.2` are not.
    """
    numbers: defaultdict[Stage, set[int]] = defaultdict(set)
    for key in keys:
        parts = tuple(key.split("."))
        for at, part in enumerate(parts):
            if at and _is_number(part):
                numbers[parts[:at]].add(int(part))
    return {stage for stage, seen in numbers.items() if len(seen) > 1 and seen == set(range(len(seen)))}


def _place(key: str, stages: set[Stage]) -> tuple[Stage, int] | None:
    """The outermost block that a key belongs to."""
    parts = tuple(key.split("."))
    for at, part in enumerate(parts):
        if _is_number(part) and parts[:at] in stages:
            return parts[:at], int(part)
    return None


def _labels(stages: set[Stage]) -> Mapping[Stage, str]:
    """Each stage as briefly as tells it from the others: without the names that all begin with."""
    outermost = [s for s in stages if not any(s[: len(other)] == other for other in stages if len(other) < len(s))]
    shared = 0
    while outermost and all(len(stage) > shared + 1 and stage[shared] == outermost[0][shared] for stage in outermost):
        shared += 1
    return {stage: ".".join(stage[shared:]) for stage in stages}


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and str(int(part)) == part
