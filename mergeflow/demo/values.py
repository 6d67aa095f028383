"""Numbers that are the same on every machine: a value is a function of where it stands, and of nothing before it.

Every element has a counter, made of the seed, its tensor's key and its index. Splitmix64 (Steele, Lea and Flood,
2014) turns the counter into 64 random bits, whose four 16-bit fields are added up to what is nearly normal; a
fine-tune adds a smaller draw of its own. All of that is integer arithmetic, and the one step that rounds is the last,
to the dtype of the file. A library's generator would be shorter, but its next version may draw other numbers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Words: TypeAlias = npt.NDArray[np.uint64]

TILE = 1 << 16
"""Elements that are made at once: few enough for a cache, and enough for threads not to queue for the interpreter."""

BASE = 16
"""The weight of the base in a value, where the difference of an ordinary fine-tune has 1."""
EXACT_REACH = 48
"""The greatest weight of a difference with which every sum is less than 2**24, so that fp32 holds it exactly."""

NUMPY_DTYPES: Mapping[Dtype, np.dtype[Any]] = {
    Dtype.F16: np.dtype("<f2"),
    Dtype.F32: np.dtype("<f4"),
    Dtype.I64: np.dtype("<i8"),
}
"""The dtypes that can be made, as they lie in a file."""

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)
_EVEN_FIELDS = np.uint64(0x0000_FFFF_0000_FFFF)
_FIELD_BITS = np.uint64(16)
_BOTH_HALVES = np.uint64(0x0000_0001_0000_0001)
_HALF_BITS = np.uint64(32)
_FIELDS_MEAN = 2 * 0xFFFF


class Slot(NamedTuple):
    """One tensor in a run of tensors that share a dtype."""

    key: str
    elements: int
    centre: float
    scale: float
    """A power of two: what one unit of the integer draw is worth."""
    reach: int
    """The weight of the fine-tune's difference; 0 leaves the base as it is."""
    counts: bool
    """Whether it holds 0, 1, 2 ... instead."""


def tiles(slots: Sequence[Slot], dtype: Dtype, tune: int, seed: int) -> Iterator[memoryview]:
    """The bytes of consecutive tensors, a tile at a time; tiles do not care where one tensor ends."""
    run = _Run(slots, tune, seed)
    for begin in range(0, run.total, TILE):
        values = run.tile(begin, min(begin + TILE, run.total))
        made = values.astype(NUMPY_DTYPES[dtype])
        for first, last in run.counting:
            low, high = max(first, begin), min(last, begin + len(made))
            if low < high:
                made[low - begin : high - begin] = np.arange(low - first, high - first)
        yield made.data.cast("B")


class _Run:
    """Consecutive tensors as arrays with one entry for each, and what a tile needs to be worked out in."""

    def __init__(self, slots: Sequence[Slot], tune: int, seed: int) -> None:
        elements = np.array([slot.elements for slot in slots], np.int64)
        self._ends = np.cumsum(elements)
        self._begins = self._ends - elements
        self.total = int(self._ends[-1])
        self.counting = [
            (int(begin), int(end))
            for slot, begin, end in zip(slots, self._begins, self._ends, strict=True)
            if slot.counts
        ]
        starts = np.array([_word(f"{seed} {slot.key}") for slot in slots], np.uint64)
        self._origins = starts - self._begins.astype(np.uint64) * np.uint64(_GAMMA)
        self._reaches = np.array([slot.reach for slot in slots], np.uint64)
        self._scales = np.array([slot.scale for slot in slots], np.float32)
        means = [_FIELDS_MEAN * (BASE + slot.reach) * slot.scale for slot in slots]
        self._shifts = np.array([slot.centre - mean for slot, mean in zip(slots, means, strict=True)], np.float32)
        self._ramp = np.arange(TILE, dtype=np.uint64) * np.uint64(_GAMMA)
        self._tune = np.uint64(_word(f"{seed} fine-tune {tune}"))
        self._words, self._spare = np.empty((2, 2, TILE), np.uint64)
        self._values = np.empty(TILE, np.float32)

    def tile(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        """The elements `begin <= element < end` of the run; the array is used again by the next call."""
        count = end - begin
        first = int(np.searchsorted(self._ends, begin, side="right"))
        here = slice(first, int(np.searchsorted(self._ends, end, side="left")) + 1)
        lengths = np.minimum(self._ends[here], end) - np.maximum(self._begins[here], begin)
        # One row for the base and one for the difference, so that every step is one call for both.
        words, spare, values = self._words[:, :count], self._spare[:, :count], self._values[:count]
        base, difference = words
        origins = self._origins[here] + np.uint64(begin * _GAMMA & _WORD)
        np.add(_each(origins, lengths), self._ramp[:count], out=base)
        np.add(base, self._tune, out=difference)
        _draw(words, spare)
        np.multiply(base, np.uint64(BASE), out=base)
        np.multiply(difference, _each(self._reaches[here], lengths), out=difference)
        np.add(base, difference, out=base)
        np.multiply(base, _BOTH_HALVES, out=base)
        np.right_shift(base, _HALF_BITS, out=base)
        # Signed, because processors convert signed integers faster; the sums are far below 2**63.
        np.copyto(values, base.view(np.int64), casting="same_kind")
        np.multiply(values, _each(self._scales[here], lengths), out=values)
        np.add(values, _each(self._shifts[here], lengths), out=values)
        return values


def _draw(counters: Words, spare: Words) -> None:
    """Turn counters into random words, and add each word's fields in pairs: two sums, one in each half of the word."""
    for shift, multiplier in _MULTIPLIERS:
        np.right_shift(counters, shift, out=spare)
        np.bitwise_xor(counters, spare, out=counters)
        np.multiply(counters, multiplier, out=counters)
    np.right_shift(counters, _LAST_SHIFT, out=spare)
    np.bitwise_xor(counters, spare, out=counters)
    np.right_shift(counters, _FIELD_BITS, out=spare)
    np.bitwise_and(spare, _EVEN_FIELDS, out=spare)
    np.bitwise_and(counters, _EVEN_FIELDS, out=counters)
    np.add(counters, spare, out=counters)


def _each(values: npt.NDArray[np.generic], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.generic]:
    """One value for every element; a single one is left to broadcasting."""
    return values if len(values) == 1 else np.repeat(values, lengths)


@lru_cache(maxsize=1 << 14)
def _word(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
