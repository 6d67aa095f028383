"""Families of means: which sum is made of which, so that rows that several of them have in common are added once.

A mean is a sum of rows, each times its share, over the sum of the shares. Two sums that differ in few rows are cheaply
made of each other: a list without one of its models is the whole list less that row. So the sums of a strip, and the
sum of nothing, are points, the rows in which two differ are the distance between them, and what is wanted is a short
tree that connects them all: a Steiner tree among vectors, for which no fast way is known (Foulds and Graham, "The
Steiner problem in phylogeny is NP-complete", 1982). A minimum spanning tree (Prim, 1957) comes within twice of it, and
gets shorter where a point is put between three others that are joined: in every row, what two of the three agree on.
Such points are the rows that two lists share, or the whole list of which others leave out one each.

A tree of sums needs few registers, because a sum is kept only until the last one is made of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import combinations
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.interfaces import SHARES_LIMIT, SharedSums, SumStep
from mergeflow.recipe.request import UNIFORM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeflow.plan.plan import Cell

    Vector = tuple[int, ...]

NOTHING = 0
"""The point that is the sum of no rows."""
WORTH_IT = 0.75
"""Of the additions that sums would take alone: with more than that, what is saved is not worth the registers."""
LARGEST_SCALE = 64
"""Shares are multiplied by no more, since every doubling takes a bit of what a sum can hold exactly."""


class Families:
    """The families of strips. Most strips have the same cells, so what was found for one is kept."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[Sequence[Cell], tuple[SharedSums, ...]]] = {}

    def of(self, cells: Sequence[Cell]) -> tuple[SharedSums, ...]:
        """As `shared_sums`. Cells are looked up by which tuples they hold, which is quick: equal ones should be one."""
        key = tuple([(id(cell.rows), id(cell.shares), cell.method) for cell in cells])
        if key not in self._found:
            self._found[key] = cells, shared_sums(cells)  # while the cells are kept, no other tuple has their ids
        return self._found[key][1]


def shared_sums(cells: Sequence[Cell]) -> tuple[SharedSums, ...]:
    """How the uniform means among `cells` are made together, as far as that is worth it; others are made alone."""
    sums = _common_scale({index: cell for index, cell in enumerate(cells) if cell.method == UNIFORM})
    if len(sums) < 2:
        return ()
    rows = sorted({row for one in sums for row in one.shares})
    wanted: dict[Vector, list[_Sum]] = defaultdict(list)
    for one in sums:
        wanted[tuple([one.shares.get(row, 0) for row in rows])].append(one)
    web = _Web(wanted)
    made = (_Rooted(web, top, list(wanted.values()), rows) for top in sorted(web.beside[NOTHING]))
    return tuple(tree.steps() for tree in made if tree.is_worth_it())


class _Sum(NamedTuple):
    """What one cell is the mean of."""

    cell: int
    shares: Mapping[int, int]
    """By row."""
    divisor: int


def _common_scale(cells: Mapping[int, Cell]) -> list[_Sum]:
    """The sums of the cells, of which each has the same share of most of its rows.

    Beside a composite of two, every other model has two shares, and elsewhere one. Twice the sum over twice the
    divisor is the same mean.
    """
    usual = {index: _usual(cell.shares) for index, cell in cells.items()}
    common = lcm(*usual.values())
    scales = {index: common // usual[index] for index in cells}
    if common > LARGEST_SCALE or any(sum(cell.shares) * scales[index] >= SHARES_LIMIT for index, cell in cells.items()):
        scales = dict.fromkeys(cells, 1)
    return [
        _Sum(
            index,
            {row: share * scales[index] for row, share in zip(cell.rows, cell.shares, strict=True)},
            sum(cell.shares) * scales[index],
        )
        for index, cell in cells.items()
    ]


def _usual(shares: Sequence[int]) -> int:
    """The commonest share; of several the largest, because what is no part of a composite has more."""
    share, _ = max(Counter(shares).items(), key=lambda item: item[::-1])
    return share


class _Web:
    """Points, each a share for every row, joined to a short tree. The first is `NOTHING`, then come those wanted.

    A point is also a set of bits, one for each pair of a row and its share, so that comparing two costs little.
    """

    def __init__(self, wanted: Sequence[Vector] | Mapping[Vector, object]) -> None:
        self._bits: dict[tuple[int, int], int] = {}
        self._index: dict[Vector, int] = {}
        self.points: list[Vector] = []
        self._masks: list[int] = []
        self.beside: list[set[int]] = []
        for point in (tuple([0] * len(next(iter(wanted)))), *wanted):
            self._add(point)
        self._wanted = len(self.points)
        columns = zip(*wanted, strict=True)
        usual = tuple([Counter(column).most_common(1)[0][0] for column in columns])
        if usual not in self._index:
            self._add(usual)  # the whole list of which others leave out one each
        self._span()
        self._shorten()
        self._prune()

    def distance(self, one: int, other: int) -> int:
        """In how many rows two points differ."""
        return (self._masks[one] ^ self._masks[other]).bit_count() // 2

    def _add(self, point: Vector) -> int:
        mask = 0
        for pair in enumerate(point):
            mask |= 1 << self._bits.setdefault(pair, len(self._bits))
        self._index[point] = len(self.points)
        self.points.append(point)
        self._masks.append(mask)
        self.beside.append(set())
        return len(self.points) - 1

    def _join(self, one: int, other: int) -> None:
        self.beside[one].add(other)
        self.beside[other].add(one)

    def _part(self, one: int, other: int) -> None:
        self.beside[one].remove(other)
        self.beside[other].remove(one)

    def _span(self) -> None:
        """Join all points to a minimum spanning tree."""
        nearest = {point: (self.distance(NOTHING, point), NOTHING) for point in range(1, len(self.points))}
        while nearest:
            point = min(nearest, key=lambda one: nearest[one][0])
            self._join(point, nearest.pop(point)[1])
            for other, (least, _) in nearest.items():
                distance = self.distance(point, other)
                if distance < least:
                    nearest[other] = distance, point

    def _shorten(self) -> None:
        """Put points between three that are joined, as long as that makes the tree shorter."""
        heap = [
            chance
            for point, beside in enumerate(self.beside)
            for one, other in combinations(sorted(beside), 2)
            for chance in self._chance(point, one, other)
        ]
        heapify(heap)
        while heap:
            _, point, one, other = heappop(heap)
            if {one, other} <= self.beside[point]:
                for chance in self._put_between(point, one, other):
                    heappush(heap, chance)

    def _chance(self, point: int, one: int, other: int) -> Iterator[tuple[int, int, int, int]]:
        """What is saved where `point` and two that are joined to it get one between them: rows in which they agree."""
        saved = (self._masks[one] & self._masks[other] & ~self._masks[point]).bit_count()
        if saved:
            yield -saved, point, one, other

    def _put_between(self, point: int, one: int, other: int) -> Iterator[tuple[int, int, int, int]]:
        """Join the three by way of what two of them agree on, row by row; what may be tried next."""
        triple = zip(self.points[point], self.points[one], self.points[other], strict=True)
        between = tuple([y if y == z else x for x, y, z in triple])
        middle = self._index[between] if between in self._index else self._add(between)
        self._part(point, one)
        self._part(point, other)
        there = self._joined_to(middle, {point, one, other})  # none of the three, if the point is new
        ends = [end for end in (point, one, other) if end != there]
        for end in ends:
            self._join(middle, end)
        for end in ends:
            for near, far in ((end, middle), (middle, end)):
                for third in self.beside[near] - {far}:
                    yield from self._chance(near, *sorted((far, third)))

    def _joined_to(self, point: int, sought: set[int]) -> int | None:
        """The only one of those `sought` that hangs together with `point`, if there is one."""
        seen, waiting = {point}, [point]
        while waiting:
            found = waiting.pop()
            if found in sought:
                return found
            waiting += self.beside[found] - seen
            seen |= self.beside[found]
        return None

    def _prune(self) -> None:
        """Remove the points that nobody wants and that join fewer than three."""
        spare = list(range(self._wanted, len(self.points)))
        while spare:
            point = spare.pop()
            ends = sorted(self.beside[point])
            if len(ends) < 3:
                for end in ends:
                    self._part(point, end)
                if len(ends) == 2:
                    self._join(*ends)
                spare += [end for end in ends if end >= self._wanted]


class _Rooted:
    """All that hangs on one point next to `NOTHING`: sums that are made of each other."""

    def __init__(self, web: _Web, top: int, wanted: Sequence[Sequence[_Sum]], rows: Sequence[int]) -> None:
        self._web = web
        self._rows = rows
        self._above = {top: NOTHING}
        self._below: dict[int, list[int]] = {}
        order = [top]
        for point in order:
            self._below[point] = sorted(web.beside[point] - {self._above[point]})
            self._above.update(dict.fromkeys(self._below[point], point))
            order += self._below[point]
        self._order = order
        self._made = {point: wanted[point - 1] if point <= len(wanted) else () for point in order}
        self._costs = {point: web.distance(point, self._above[point]) for point in order}

    def is_worth_it(self) -> bool:
        """Whether enough is saved; never for one sum."""
        alone = sum(len(one.shares) for made in self._made.values() for one in made)
        return sum(self._costs.values()) <= WORTH_IT * alone

    def steps(self) -> SharedSums:
        """The sums, each made before those that are made of it, in as few registers as that takes."""
        children = self._in_order()
        steps = []
        free: list[int] = []
        registers = 0
        waiting = [(self._order[0], -1, True)]
        while waiting:
            point, base, last = waiting.pop()
            if last and base >= 0:
                into = base
            elif free:
                into = heappop(free)
            else:
                into, registers = registers, registers + 1
            steps.append(self._step(point, base, into))
            below = children[point]
            if not below:
                heappush(free, into)
            waiting += [(child, into, child == below[-1]) for child in reversed(below)]
        most = [max(shares) for shares in zip(*(self._web.points[point] for point in self._order), strict=True)]
        used = [(row, share) for row, share in zip(self._rows, most, strict=True) if share]
        rows, shares = zip(*used, strict=True)
        return SharedSums(tuple(steps), rows, shares, registers)

    def _in_order(self) -> dict[int, list[int]]:
        """The points made of each, the one that needs most registers last: it may have that of what it is made of."""
        need: dict[int, int] = {}
        ordered: dict[int, list[int]] = {}
        for point in reversed(self._order):
            below = sorted(self._below[point], key=lambda child: (need[child], child))
            ordered[point] = below
            need[point] = max([1, *(need[child] + 1 for child in below[:-1]), *(need[child] for child in below[-1:])])
        return ordered

    def _step(self, point: int, base: int, into: int) -> SumStep:
        before, after = self._web.points[self._above[point]], self._web.points[point]
        changes = [(new - old, row) for row, old, new in zip(self._rows, before, after, strict=True) if new != old]
        changes.sort()  # rows of which there is equally much are added in one go
        made = self._made[point]
        return SumStep(
            base=base,
            rows=tuple([row for _, row in changes]),
            shares=tuple([share for share, _ in changes]),
            into=into,
            cells=tuple([one.cell for one in made]),
            divisors=tuple([one.divisor for one in made]),
        )
