from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import IncompleteOutput
from mergeflow.execute.coverage import Coverage
from mergeflow.plan.plan import Output
from mergeflow.recipe.request import Target
from mergeflow.tensors import Layout, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = 10


def outputs(*sizes: int) -> list[Output]:
    """Outputs of so many bytes of tensors, behind a head of ten."""
    return [
        Output(Target(f"t{index}", "f", "fp16", (), None, None), f"out/{index}", Layout(bytes(HEAD), {}, HEAD + size))
        for index, size in enumerate(sizes)
    ]


def covered(size: int, spans: Sequence[tuple[int, int]]) -> Coverage:
    coverage = Coverage(outputs(size))
    coverage.add(Span(0, HEAD + begin, HEAD + end) for begin, end in spans)
    return coverage


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A size, and spans that cover it, in any order."""
    size = draw(st.integers(1, 200))
    cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=20))})
    return size, draw(st.permutations(list(pairwise(cuts))))


@given(partitions())
def test_a_partition_in_any_order_is_complete(partition: tuple[int, list[tuple[int, int]]]) -> None:
    size, spans = partition
    coverage = covered(size, spans)
    coverage.check()
    assert coverage.watermark(0) == HEAD + size


@given(partitions(), st.data())
def test_a_partition_without_one_of_its_spans_is_not(
    partition: tuple[int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    size, spans = partition
    lost = data.draw(st.sampled_from(spans))
    coverage = covered(size, [span for span in spans if span != lost])
    assert coverage.watermark(0) == HEAD + lost[0]
    with pytest.raises(IncompleteOutput, match=rf"out/0: .*up to byte {HEAD + lost[0]:,} of {HEAD + size:,}"):
        coverage.check()


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param([(0, 50), (0, 50), (50, 100)], id="a-span-twice"),
        pytest.param([(50, 100), (50, 100), (0, 50)], id="a-span-twice-ahead"),
        pytest.param([(0, 60), (50, 100)], id="overlapping-behind"),
        pytest.param([(50, 100), (0, 60)], id="overlapping-ahead"),
        pytest.param([(20, 40), (30, 50), (0, 20), (50, 100)], id="overlapping-each-other-ahead"),
        pytest.param([(0, 100), (40, 50)], id="inside-what-is-there"),
        pytest.param([(0, 120)], id="beyond-the-end"),
        pytest.param([(0, 100), (100, 120)], id="after-the-end"),
        pytest.param([(-5, 0), (0, 100)], id="in-the-head"),
    ],
)
def test_what_is_written_twice_or_out_of_place_is_never_complete(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(IncompleteOutput, match="out/0"):
        covered(100, spans).check()


def test_outputs_are_told_apart() -> None:
    coverage = Coverage(outputs(20, 30))
    coverage.add([Span(1, HEAD, HEAD + 30), Span(0, HEAD, HEAD + 5)])
    assert (coverage.watermark(0), coverage.watermark(1)) == (HEAD + 5, HEAD + 30)
    with pytest.raises(IncompleteOutput, match="out/0"):
        coverage.check()
    coverage.add([Span(0, HEAD + 5, HEAD + 20)])
    coverage.check()


def test_outputs_without_bytes_are_complete() -> None:
    Coverage(outputs(0, 0)).check()
