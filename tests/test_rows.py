from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.interfaces import Rows


def numbered(heights: list[int]) -> Rows:
    """Rows that each hold their number, in matrices of so many rows."""
    count = sum(heights)
    ends = list(itertools.accumulate(heights))
    whole = torch.arange(count)[:, None].expand(count, 3).clone()
    matrices = [whole[end - height : end] for height, end in zip(heights, ends, strict=True)]
    return Rows(matrices, [float(row) for row in range(count)])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(numbered), st.data())
def test_rows_that_are_taken_are_those_asked_for_with_what_is_known_of_them(rows: Rows, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(rows.peaks) - 1), min_size=1, max_size=12))
    taken = rows.take(indices)
    assert [value.tolist() for value in taken.values] == [[index] * 3 for index in indices]
    assert taken.peaks == indices


def test_neighbours_stay_in_one_matrix_and_nothing_is_copied() -> None:
    rows = numbered([5, 2])
    taken = rows.take([0, 1, 3, 4, 5, 6, 2])
    assert [matrix[:, 0].tolist() for matrix in taken.matrices] == [[0, 1], [3, 4], [5, 6], [2]]
    taken.values[0].fill_(77)
    assert rows.values[0].tolist() == [77] * 3
