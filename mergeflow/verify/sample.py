"""Which tiles are computed once more: every kind of tensor first, then every tensor, then any tile alike.

What is drawn follows from the seed, the keys and the sizes alone, by SHA-256, so that it is the same on any machine.
"""

from __future__ import annotations

from bisect import bisect_right
from hashlib import sha256
from itertools import accumulate, count
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

TILE = 32_768
"""Elements of a tile, at most: what is computed for them fits a core's cache."""
TILE_BYTES = 32 << 20
"""Bytes of all rows of a tile, at most, unless there are so many that they are more at `SHORTEST`."""
SHORTEST = 1024

Share: TypeAlias = "int | None"
"""How many tiles; None for all."""


class Drawn(NamedTuple):
    """A run of elements of one tensor."""

    tensor: int
    start: int
    stop: int


class Candidate(NamedTuple):
    """A tensor that tiles may be drawn of."""

    key: str
    kind: object
    """What it has in common with others: whoever is of one kind is made in one way."""
    elements: int
    bytes_per_element: int
    """Of all rows and of the result."""

    @property
    def length(self) -> int:
        """Elements of each of its tiles; the last may be shorter."""
        return min(TILE, max(TILE_BYTES // self.bytes_per_element, SHORTEST))

    @property
    def tiles(self) -> int:
        """How many there are."""
        return -(-self.elements // self.length)


def draw(tensors: Sequence[Candidate], wanted: Share, seed: int) -> list[Drawn]:
    """As many tiles as are `wanted`, or all that there are, in the order of the tensors; none is drawn twice."""
    total = sum(tensor.tiles for tensor in tensors)
    if wanted is None or wanted >= total:
        chosen = [(index, tile) for index, tensor in enumerate(tensors) for tile in range(tensor.tiles)]
    else:
        chosen = sorted(_chosen(tensors, wanted, total, seed))
    return [_drawn(index, tensors[index], tile) for index, tile in chosen]


def _drawn(index: int, tensor: Candidate, tile: int) -> Drawn:
    start = tile * tensor.length
    return Drawn(index, start, min(start + tensor.length, tensor.elements))


def _chosen(tensors: Sequence[Candidate], wanted: int, total: int, seed: int) -> set[tuple[int, int]]:
    """(tensor, tile) of so many tiles, which are not all."""
    order = sorted(
        (index for index, one in enumerate(tensors) if one.tiles), key=lambda at: _rank(seed, tensors[at].key)
    )
    first_of_kind: dict[object, int] = {}
    for index in order:
        first_of_kind.setdefault(tensors[index].kind, index)
    every_kind = list(first_of_kind.values())
    every_tensor = dict.fromkeys([*every_kind, *order])
    chosen = {(at, _rank(seed, tensors[at].key, "tile") % tensors[at].tiles) for at in [*every_tensor][:wanted]}
    ends = list(accumulate(tensor.tiles for tensor in tensors))
    for number in count():
        if len(chosen) == wanted:
            return chosen
        at = _rank(seed, "any", number) % total
        index = bisect_right(ends, at)
        tile = at - (ends[index] - tensors[index].tiles)
        while (index, tile) in chosen:  # the next that is not; only where nearly all are wanted are there many such
            index, tile = _next(tensors, index, tile)
        chosen.add((index, tile))
    raise AssertionError("numbers do not end")


def _next(tensors: Sequence[Candidate], index: int, tile: int) -> tuple[int, int]:
    tile += 1
    while tile >= tensors[index].tiles:
        index, tile = (index + 1) % len(tensors), 0
    return index, tile


def _rank(*of: object) -> int:
    return int.from_bytes(sha256("\0".join(map(str, of)).encode("utf-8", "backslashreplace")).digest()[:8], "big")
