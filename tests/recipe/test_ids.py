from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.recipe.ids import natural, nearest, normal

if TYPE_CHECKING:
    from random import Random

IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5", "5"),
        ("05", "5"),
        ("005", "5"),
        (" 05 ", "5"),
        ("09a", "9a"),
        ("0", "0"),
        ("000", "0"),
        ("0a", "0a"),
        ("a05", "a05"),
        ("x-007", "x-007"),
        ("1.0", "1.0"),
        ("", ""),
        (unicodedata.normalize("NFD", "café"), "café"),
        ("\u0660\u0665", "\u0660\u0665"),
    ],
    ids=repr,
)
def test_an_id_is_compared_without_spaces_and_leading_zeros(written: str, meant: str) -> None:
    assert normal(written) == meant


@given(IDS)
def test_the_form_for_comparison_is_final(id: str) -> None:
    assert normal(normal(id)) == normal(id)


@given(st.integers(0, 10**9), st.integers(0, 5))
def test_zeros_before_a_number_make_no_other_id(number: int, zeros: int) -> None:
    assert normal("0" * zeros + str(number)) == str(number)


@pytest.mark.parametrize(
    "ordered",
    [
        ["9", "9a", "10", "10a", "11"],
        ["step-9", "step-10", "step-100"],
        ["1.2", "1.10", "2"],
        ["7", "a", "b1", "b02", "b10"],
        ["", "0", "a"],
    ],
    ids=", ".join,
)
def test_digits_are_ordered_as_numbers_and_come_before_letters(ordered: list[str]) -> None:
    assert sorted(reversed(ordered), key=natural) == ordered


@given(st.lists(IDS), st.randoms())
def test_any_ids_have_one_order_whatever_the_order_they_come_in(ids: list[str], random: Random) -> None:
    shuffled = list(ids)
    random.shuffle(shuffled)
    assert [natural(id) for id in sorted(shuffled, key=natural)] == [natural(id) for id in sorted(ids, key=natural)]


@given(st.lists(st.integers(0, 10**6)))
def test_numbers_are_ordered_as_numbers(numbers: list[int]) -> None:
    assert sorted(map(str, numbers), key=natural) == list(map(str, sorted(numbers)))


def test_the_nearest_name_is_suggested() -> None:
    assert nearest("unifrom", ["uniform", "pairwise"]) == "; did you mean 'uniform'?"


@pytest.mark.parametrize("names", [[], ["uniform", "pairwise"]], ids=["no names", "none like it"])
def test_no_name_is_suggested_where_none_is_near(names: list[str]) -> None:
    assert nearest("42", names) == ""
