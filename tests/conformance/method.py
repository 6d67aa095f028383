"""What every `Method` must keep: subclass `MethodConformance`, say which method and which rows, and run it.

A method that planning never asks to skip values, because it could not, keeps `MergeConformance` only.

What a method computes is for its own tests. This is what every user of a method relies on: that it is a pure function
of its rows, element by element, from any number of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.methods.registry import method_of
from tests.methods.reference import rows_of, same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeflow.interfaces import Method

LENGTHS = [1, 2, 7, 64, 1025, 16384, 16411]
THREADS = 8


class MergeConformance(ABC):
    """The contract of `Method.merge`, for element scope."""

    out_dtype = torch.float16

    @abstractmethod
    def make(self) -> Method:
        """The method under test, new."""

    @abstractmethod
    def values(self, length: int, seed: int) -> list[Tensor]:
        """Rows that this method can merge, finite if they are floats."""

    def shares(self, values: Sequence[Tensor]) -> list[int]:
        """A share for each row."""
        return [1 + index % 3 for index in range(len(values))]

    def merged(self, method: Method, values: Sequence[Tensor]) -> Tensor:
        """What the method makes of the rows."""
        out = torch.full((len(values[0]),), 77, dtype=self.out_dtype)
        method.merge(rows_of(values), self.shares(values), out)
        return out

    def test_it_tells_whether_it_takes_any_dtype(self) -> None:
        assert isinstance(self.make().takes_any_dtype, bool)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_it_fills_a_row_of_any_length_to_its_end(self, length: int) -> None:
        values = self.values(length, seed=1)
        longer = [torch.cat([value, value[:1], value[:1]]) for value in values]
        assert same_bits(self.merged(self.make(), longer)[:length], self.merged(self.make(), values))

    @pytest.mark.parametrize("length", LENGTHS)
    def test_it_does_not_write_into_its_rows(self, length: int) -> None:
        values = self.values(length, seed=2)
        before = [value.clone() for value in values]
        self.merged(self.make(), values)
        assert all(same_bits(value, copy) for value, copy in zip(values, before, strict=True))

    def test_every_element_is_merged_for_itself(self) -> None:
        values = self.values(1000, seed=3)
        whole = self.merged(self.make(), values)
        for start, stop in ((0, 1), (1, 2), (3, 500), (500, 1000), (999, 1000)):
            part = self.merged(self.make(), [value[start:stop] for value in values])
            assert same_bits(part, whole[start:stop])

    def test_rows_may_lie_apart_in_memory(self) -> None:
        values = self.values(501, seed=4)
        apart = [torch.stack([value, value], dim=1).flatten()[::2] for value in values]
        assert not apart[0].is_contiguous()
        assert same_bits(self.merged(self.make(), apart), self.merged(self.make(), values))

    def test_what_lay_in_the_result_before_does_not_matter(self) -> None:
        values = self.values(300, seed=5)
        out = torch.empty(300, dtype=self.out_dtype)
        expected = self.merged(self.make(), values)
        for garbage in (0, 255):
            out.view(torch.uint8).fill_(garbage)
            self.make().merge(rows_of(values), self.shares(values), out)
            assert same_bits(out, expected)

    def test_what_was_merged_before_does_not_matter(self) -> None:
        method = self.make()
        values = self.values(300, seed=6)
        expected = self.merged(self.make(), values)
        for length in (16411, 1, 300):
            self.merged(method, self.values(length, seed=7))
            assert same_bits(self.merged(method, values), expected)

    def test_threads_that_share_it_do_not_disturb_each_other(self) -> None:
        method = self.make()
        work = [self.values(2000 + seed, seed) for seed in range(THREADS)]
        expected = [self.merged(self.make(), values) for values in work]
        together = Barrier(THREADS)

        def merge_often(index: int) -> bool:
            together.wait()
            return all(same_bits(self.merged(method, work[index]), expected[index]) for _ in range(15))

        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(merge_often, range(THREADS)))


class MethodConformance(MergeConformance):
    """The contract of `Method`, for element scope."""

    def test_it_is_registered_under_its_name(self) -> None:
        method = self.make()
        assert type(method_of(method.name, ())) is type(method)

    def test_skip_is_merge_where_all_is_finite(self) -> None:
        values = self.values(4097, seed=8)
        out = torch.empty(4097, dtype=self.out_dtype)
        self.make().skip(rows_of(values), self.shares(values), out)
        assert same_bits(out, self.merged(self.make(), values))

    @pytest.mark.parametrize("length", LENGTHS)
    def test_skip_does_not_write_into_its_rows_either(self, length: int) -> None:
        values = self.values(length, seed=9)
        before = [value.clone() for value in values]
        self.make().skip(rows_of(values), self.shares(values), torch.empty(length, dtype=self.out_dtype))
        assert all(same_bits(value, copy) for value, copy in zip(values, before, strict=True))
