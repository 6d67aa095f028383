"""Which tiles a sample has: the same for the same seed, of every kind first, none twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeflow.verify.sample import SHORTEST, TILE, TILE_BYTES, Candidate, Drawn, draw

TENSORS = st.lists(
    st.builds(
        Candidate,
        st.text("abcdef", min_size=1, max_size=8),
        st.sampled_from("abc"),
        st.sampled_from([1, 7, TILE, TILE + 1, 5 * TILE]),
        st.sampled_from([4, 128, 4 * TILE_BYTES // TILE]),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda tensor: tensor.key,
)


def all_tiles(tensors: list[Candidate]) -> list[Drawn]:
    return draw(tensors, None, 0)


@settings(max_examples=60)
@given(TENSORS)
def test_all_tiles_cover_every_element_once(tensors: list[Candidate]) -> None:
    for index, tensor in enumerate(tensors):
        mine = [tile for tile in all_tiles(tensors) if tile.tensor == index]
        assert [tile.start for tile in mine] == [0, *(tile.stop for tile in mine[:-1])]
        assert mine[-1].stop == tensor.elements
        assert all((tile.stop - tile.start) <= tensor.length for tile in mine)


@settings(max_examples=100)
@given(TENSORS, st.integers(1, 80), st.integers(0, 5))
def test_a_sample_has_as_many_tiles_as_asked_for_of_every_kind_and_tensor_first(
    tensors: list[Candidate], wanted: int, seed: int
) -> None:
    drawn = draw(tensors, wanted, seed)
    every = all_tiles(tensors)
    assert len(drawn) == len(set(drawn)) == min(wanted, len(every))
    assert set(drawn) <= set(every)
    assert drawn == sorted(drawn)
    kinds = {tensor.kind for tensor in tensors}
    assert len({tensors[tile.tensor].kind for tile in drawn}) == min(len(kinds), len(drawn))
    assert len({tile.tensor for tile in drawn}) == min(len(tensors), len(drawn))


TEN = [Candidate(f"key.{number}", number % 2, 40 * TILE, 64) for number in range(10)]


def test_a_sample_follows_from_its_seed_alone() -> None:
    assert draw(TEN, 50, 7) == draw(list(TEN), 50, 7)
    assert draw(TEN, 50, 7) != draw(TEN, 50, 8)
    # Written down, because it has to be the same on any machine and in any version.
    assert draw(TEN[:2], 3, 0) == EXPECTED


EXPECTED = [Drawn(0, 360_448, 393_216), Drawn(0, 1_179_648, 1_212_416), Drawn(1, 1_081_344, 1_114_112)]


@pytest.mark.parametrize(
    ("bytes_per_element", "length"),
    [(66, TILE), (2 * TILE_BYTES // TILE, TILE // 2), (TILE_BYTES, SHORTEST)],
    ids=["as long as it may be", "as many as fit", "at least so many"],
)
def test_a_tile_is_as_long_as_its_rows_allow(bytes_per_element: int, length: int) -> None:
    assert Candidate("w", "", 10 * TILE, bytes_per_element).length == length
