from __future__ import annotations

from functools import partial

import pytest

from benchmarks.figures import Figure, figure, interleaved, ratio


def test_a_figure_is_a_median_with_what_it_ranged_over() -> None:
    assert figure([5.0, 1.0, 2.0, 4.0]) == Figure(3.0, 1.0, 5.0, "s", 4)


def test_a_ratio_is_taken_within_each_round() -> None:
    assert ratio([2.0, 20.0, 3.0], [1.0, 10.0, 2.0]) == Figure(2.0, 1.5, 2.0, "x", 3)


def test_a_ratio_needs_as_many_rounds_of_both() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_every_round_measures_everything_and_begins_with_another() -> None:
    order: list[str] = []

    def act(name: str) -> int:
        order.append(name)
        return len(order)

    gave = interleaved({name: partial(act, name) for name in "abc"}, 3)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert gave == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
