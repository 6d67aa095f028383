"""The numbers of a comparison: counts, peaks, and sums that do not depend on how the work was shared out.

What a difference is. Values are compared by value: +0 equals -0, NaN equals NaN, fp8 is what it is in fp16. Where one
side is NaN or infinite and the other is not the same, the element differs; it is counted as `nonfinite` and takes part
in nothing else, because no distance to it means anything.

What is exact. All counts. Differences and sums are computed in fp64: 64-bit integers are exact against each other, and
up to 2^53 against floats. Sums are made of fixed pieces, and `math.fsum` adds these in any order to the same result;
they are infinite where the squares of fp64 values are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergeflow.compare.ulp import BINS, histogram_of, ulp_distance
from mergeflow.methods.exact import INTEGER_VIEW
from mergeflow.methods.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from mergeflow.tensors import Dtype

PIECE = 65536
"""Elements that are looked at together: few enough for a core's caches, and so many that threads seldom wait."""
_scratch = Scratch()


class Peak(NamedTuple):
    """The element that differs most, and by how much."""

    size: float
    key: str
    element: int
    """Counted in the tensor, the last dimension fastest."""
    a: float
    b: float


@dataclass(frozen=True)
class Statistics:
    """What is known of the elements of a piece, a tensor or a component; see `combined`."""

    elements: int = 0
    """How many were compared."""
    differing: int = 0
    """How many differ by value, `nonfinite` included."""
    nonfinite: int = 0
    """How many are NaN or infinite in one file and something else in the other."""
    largest: Peak | None = None
    """The largest absolute difference; the first of several, by key and element. None if there is none."""
    furthest: Peak | None = None
    """The largest distance in ULP, likewise."""
    squares_a: float = 0.0
    """The sum of a * a over the finite values; likewise below."""
    squares_b: float = 0.0
    products: float = 0.0
    """The sum of a * b."""
    squares_difference: float = 0.0
    """The sum of (a - b) * (a - b)."""
    histogram: tuple[int, ...] = (0,) * BINS
    """How many elements are how far apart: `histogram[n]` counts the distances up to `BOUNDS[n]` ULP that are in no
    bin before, and the last bin the others. Without `nonfinite` it adds up to `elements`."""

    @property
    def share(self) -> float:
        """Which part of the elements differs, 0 to 1; 0 if there are none."""
        return self.differing / max(self.elements, 1)

    @property
    def l2(self) -> float:
        """The length of a - b."""
        return math.sqrt(self.squares_difference)

    @property
    def norm(self) -> float:
        """The length of a."""
        return math.sqrt(self.squares_a)

    @property
    def relative_l2(self) -> float:
        """`l2 / norm`; infinite where a is nothing but zeros and b is not, or where the sums are infinite."""
        if self.l2 == 0:
            return 0.0
        return self.l2 / self.norm if self.l2 < math.inf and 0 < self.norm < math.inf else math.inf

    @property
    def cosine(self) -> float | None:
        """Of the angle between a and b, -1 to 1; None where one of them is nothing but zeros."""
        lengths = self.norm * math.sqrt(self.squares_b)
        if not (0 < lengths < math.inf and math.isfinite(self.products)):
            return None
        return 1.0 if self.squares_difference == 0 else max(-1.0, min(self.products / lengths, 1.0))

    def counts(self) -> Statistics:
        """The same without the sums, so that it has no part in any length or angle."""
        return replace(self, squares_a=0.0, squares_b=0.0, products=0.0, squares_difference=0.0)


def combined(parts: Iterable[Statistics]) -> Statistics:
    """What is known of all parts together. Their order decides nothing but which of equal peaks is told."""
    held = tuple(parts)
    return Statistics(
        elements=sum(part.elements for part in held),
        differing=sum(part.differing for part in held),
        nonfinite=sum(part.nonfinite for part in held),
        largest=_largest(part.largest for part in held),
        furthest=_largest(part.furthest for part in held),
        squares_a=_total(part.squares_a for part in held),
        squares_b=_total(part.squares_b for part in held),
        products=_total(part.products for part in held),
        squares_difference=_total(part.squares_difference for part in held),
        histogram=tuple(map(sum, zip((0,) * BINS, *(part.histogram for part in held), strict=True))),
    )


def measured(a: Tensor, b: Tensor, unit: Dtype | None, key: str = "", start: int = 0) -> Statistics:
    """Compare two 1-D tensors of equal length, element by element.

    `unit` is the `ulp_dtype` of their dtypes, which are real (complex numbers come as pairs). `key` and `start`, the
    number of the first element, say where peaks are. Neither tensor is written to.
    """
    pieces: list[Statistics] = []
    known = Statistics()
    for first in range(0, len(a), PIECE):
        piece = slice(first, first + PIECE)
        known = _piece(a[piece], b[piece], unit, key, start + first, known)
        pieces.append(known)
    return combined(pieces)


def _piece(a: Tensor, b: Tensor, unit: Dtype | None, key: str, start: int, known: Statistics) -> Statistics:
    """One piece. A peak is looked up only if it is higher than those of `known`, the piece before."""
    x = _scratch("a", a).copy_(a)
    same = _same_bits(a, b)
    y = x if same else _scratch("b", b).copy_(b)
    sums = _sums(x, y)
    odd: Tensor | None = None
    lost = 0
    if not all(map(math.isfinite, sums)):
        odd, lost = _set_aside(x, y)
        sums = _sums(x, y)
    if same:
        histogram = [len(a)] + [0] * (BINS - 1)
        return Statistics(len(a), 0, 0, known.largest, known.furthest, *sums, 0.0, tuple(histogram))
    distance = ulp_distance(a, b, unit)
    if odd is not None:
        distance.masked_fill_(odd, 0)
    difference = _scratch("difference", a)
    if unit is None:
        difference.copy_(distance)  # fp64 may hold neither of two integers, but it holds how little they differ
    else:
        torch.sub(x, y, out=difference)
    histogram = histogram_of(distance)
    histogram[0] -= lost
    differing = len(a) - histogram[0] if a.dtype == b.dtype else int(difference.count_nonzero()) + lost
    squares = float(torch.dot(difference, difference))
    return Statistics(
        elements=len(a),
        differing=differing,
        nonfinite=lost,
        largest=_peak(known.largest, difference.abs_(), key, start, x, y),
        furthest=_peak(known.furthest, distance, key, start, x, y),
        squares_a=sums[0],
        squares_b=sums[1],
        products=sums[2],
        squares_difference=squares,
        histogram=tuple(histogram),
    )


def _sums(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    return float(torch.dot(x, x)), float(torch.dot(y, y)), float(torch.dot(x, y))


def _set_aside(x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Make 0 of all that is not finite in either; return where that was, and how often the two were not the same."""
    odd = ~(x.isfinite() & y.isfinite())
    lost = odd & (x != y) & ~(x.isnan() & y.isnan())
    x.masked_fill_(odd, 0)
    y.masked_fill_(odd, 0)
    return odd, int(lost.count_nonzero())


def _peak(known: Peak | None, sizes: Tensor, key: str, start: int, x: Tensor, y: Tensor) -> Peak | None:
    """The first of the largest of `sizes`, unless the known one is as large."""
    size = sizes.amax().item()
    if size <= (known.size if known else 0):
        return known
    at = int(sizes.argmax())
    return Peak(size, key, start + at, float(x[at]), float(y[at]))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integers = INTEGER_VIEW[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def _largest(peaks: Iterable[Peak | None]) -> Peak | None:
    """The first of the highest."""
    return max((peak for peak in peaks if peak is not None), key=lambda peak: peak.size, default=None)


def _total(values: Iterable[float]) -> float:
    """The sum, rounded once; infinite or NaN where that is all there is to say."""
    held = tuple(values)
    try:
        return math.fsum(held)
    except (OverflowError, ValueError):  # beyond fp64, or infinities of both signs
        return sum(held)
