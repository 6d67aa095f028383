from __future__ import annotations

import unicodedata
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import ConfigError, MergeflowError, SelectionError
from mergeflow.recipe.ids import normal
from mergeflow.recipe.modelset import ModelSet, model_set

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random

COLLECTION = [
    "_x01-amber.safetensors",
    "_x04-quiet orchard.safetensors",
    "_x09-a-dash.safetensors",
    "_x10-plus+and@at.safetensors",
    "_x10a-brackets [half] (2).safetensors",
    "_x33-café.safetensors",
    "_x44-two\nlines.safetensors",
]
"""Files as they are named in the wild, in the order of their ids."""


def found(
    names: Sequence[str],
    pattern: str = "_x{id}-*.safetensors",
    composites: Mapping[str, Sequence[str]] | None = None,
    files: Mapping[str, str] | None = None,
) -> ModelSet:
    return model_set([f"/m/{name}" for name in names], pattern, composites or {}, files or {}, "/m")


def refusal(*names: str, composites: Mapping[str, Sequence[str]], files: Mapping[str, str] | None = None) -> str:
    with pytest.raises(MergeflowError) as caught:
        found(names, composites=composites, files=files)
    return str(caught.value)


# which file an id stands for


@given(st.permutations(COLLECTION))
def test_the_order_in_which_a_directory_lists_its_files_has_no_meaning(names: list[str]) -> None:
    models = found(names)
    assert list(models.paths.items()) == [(name[2:].partition("-")[0], f"/m/{name}") for name in COLLECTION]
    assert models == found(COLLECTION)


@pytest.mark.parametrize(
    ("pattern", "name", "id"),
    [
        ("{id}.safetensors", "step-000100.safetensors", "step-000100"),
        ("{id}.safetensors", "epoch=3-step=7.safetensors", "epoch=3-step=7"),
        ("_x{id}-*.safetensors", "_x05-one-two-_x06-three.safetensors", "05"),
        ("*_{id}.safetensors", "a_b_7.safetensors", "7"),
        ("model ({id}).safetensors", "model (12).safetensors", "12"),
        ("[{id}]+*.safetensors", "[ü]+v.1.safetensors", "ü"),
        ("{id}.safetensors", "a\nb.safetensors", "a\nb"),
    ],
    ids=repr,
)
def test_an_id_is_what_stands_in_its_place(pattern: str, name: str, id: str) -> None:
    assert found([name], pattern).paths == {id: f"/m/{name}"}


@pytest.mark.parametrize(
    "name",
    [
        "x01-a.safetensors",
        "_x-a.safetensors",
        "_x01.safetensors",
        "_x01-a.ckpt",
        "my_x01-a.safetensors",
        "_x01-aXsafetensors",
    ],
)
def test_a_name_that_does_not_match_is_no_model(name: str) -> None:
    assert list(found([*COLLECTION, name]).paths) == ["01", "04", "09", "10", "10a", "33", "44"]


def test_only_the_name_of_a_file_is_matched_not_its_directory() -> None:
    models = model_set(["/a/_x02-b/_x01-a.safetensors"], "_x{id}-*.safetensors", {}, {}, "/a")
    assert list(models.paths) == ["01"]


def test_files_that_are_named_one_by_one_join_those_of_a_directory_in_natural_order() -> None:
    models = found(["_x10-a.safetensors"], files={"9": "/elsewhere/nine", "b": "/elsewhere/b"})
    assert models.paths == {"9": "/elsewhere/nine", "10": "/m/_x10-a.safetensors", "b": "/elsewhere/b"}
    assert list(models.paths) == ["9", "10", "b"]


@pytest.mark.parametrize("id", ["05", "5", "005", " 5"], ids=repr)
def test_an_id_is_found_however_it_is_spelled(id: str) -> None:
    models = found(["_x05-a.safetensors"], composites={"09a": ["05"]})
    assert models.find(id) == "05"
    assert id in models
    assert models.find("9a") == "09a"


def test_an_id_with_an_accent_is_found_whichever_way_a_system_stores_it() -> None:
    models = found([unicodedata.normalize("NFD", "_xé-a.safetensors")])
    assert normal(models.find("é")) == "é"


def test_an_unknown_id_is_refused_with_the_nearest_one() -> None:
    models = found(["_xstep100-a.safetensors", "_xother-a.safetensors"])
    assert "step10" not in models
    with pytest.raises(SelectionError, match=r"^'step10' is not in /m; did you mean 'step100'\?$"):
        models.find("step10")


# what is wrong with a set


def test_two_files_of_one_id_are_refused() -> None:
    problem = refusal("_x05-a.safetensors", "_x5-b.safetensors", composites={})
    assert problem == ("id '5' has 2 files: /m/_x05-a.safetensors, /m/_x5-b.safetensors; rename or remove all but one")


def test_a_file_beside_the_directory_does_not_replace_one_in_it() -> None:
    problem = refusal("_x05-a.safetensors", composites={}, files={"5": "/elsewhere/five"})
    assert "id '5' has 2 files" in problem


@pytest.mark.parametrize("pattern", ["*.safetensors", "{id}-{id}.safetensors", "", "id.safetensors"])
def test_a_pattern_has_one_place_for_the_id(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"must contain {id} once, as in '_x{id}-\*\.safetensors'"):
        found(COLLECTION, pattern)


def test_a_directory_without_a_file_that_matches_is_shown_with_one_that_does_not() -> None:
    with pytest.raises(ConfigError) as caught:
        found(["b.ckpt", "a.ckpt"])
    assert str(caught.value) == (
        "no models in /m: none of its 2 files matches '_x{id}-*.safetensors' ('a.ckpt' is one of them); "
        ".ckpt, .pt and .bin files can run code when they are loaded, so convert them to safetensors first; "
        "set models.dir or models.pattern"
    )


def test_an_empty_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^no models in /m: it holds no files; "):
        found([])


@pytest.mark.parametrize(
    ("composites", "problem"),
    [
        ({"1": ["02"]}, "'1' is both a file and a composite; rename the composite"),
        ({"z": []}, "composite 'z' has no members"),
        ({"z": ["01", "1"]}, "composite 'z' names a member twice: 01, 1"),
        ({"9a": ["01"], "09a": ["02"]}, "composites '9a' and '09a' have the same id; rename one"),
    ],
    ids=["also a file", "no members", "member twice", "same id"],
)
def test_a_composite_that_cannot_be_meant_is_refused(composites: Mapping[str, Sequence[str]], problem: str) -> None:
    assert refusal("_x01-a.safetensors", "_x02-b.safetensors", composites=composites) == problem


def test_all_problems_of_a_set_are_raised_together() -> None:
    problem = refusal("_x01-a.safetensors", "_x1-b.safetensors", composites={"z": [], "y": ["3", "3"]})
    assert problem.startswith("3 problem(s):")
    assert "id '1' has 2 files" in problem
    assert "composite 'z' has no members" in problem
    assert "composite 'y' names a member twice" in problem


# shares


def test_entries_have_equal_shares_and_members_divide_that_of_their_composite() -> None:
    models = ModelSet({id: id for id in ("17", "18", "19")}, {"09a": ("17", "18")})
    assert models.shares(["19", "9a"]) == {"19": Fraction(1, 2), "17": Fraction(1, 4), "18": Fraction(1, 4)}


def test_a_checkpoint_beside_its_composite_has_the_sum_of_both_shares() -> None:
    models = ModelSet({"21": "", "22": ""}, {"11a": ("21", "22")})
    assert models.shares(["11a", "22"]) == {"21": Fraction(1, 4), "22": Fraction(3, 4)}


def test_a_composite_may_have_composites_as_members() -> None:
    models = ModelSet({id: "" for id in "abc"}, {"ab": ("a", "b"), "abc": ("ab", "c")})
    assert models.shares(["abc"]) == {"a": Fraction(1, 4), "b": Fraction(1, 4), "c": Fraction(1, 2)}
    assert models.members("abc") == ("a", "b", "c")
    assert models.members("a") == ("a",)


def test_shares_are_in_the_order_in_which_checkpoints_are_reached() -> None:
    models = ModelSet({id: "" for id in "abcd"}, {"z": ("c", "a")})
    assert list(models.shares(["d", "z", "b", "a"])) == ["d", "c", "a", "b"]


@pytest.mark.parametrize(
    ("composites", "way"),
    [
        ({"z": ("z",)}, "composite 'z' contains itself: z > z"),
        ({"z": ("y", "a"), "y": ("x",), "x": ("z",)}, "composite 'z' contains itself: z > y > x > z"),
        ({"z": ("y",), "y": ("0x", "y")}, "composite 'y' contains itself: z > y > y"),
    ],
    ids=["directly", "by two others", "not the first"],
)
def test_a_composite_that_contains_itself_is_refused(composites: Mapping[str, tuple[str, ...]], way: str) -> None:
    models = ModelSet({"a": "", "0x": ""}, composites)
    with pytest.raises(ConfigError) as caught:
        models.shares(["z"])
    assert str(caught.value) == way


def test_a_member_that_the_collection_lacks_matters_only_to_who_selects_the_composite() -> None:
    models = found(COLLECTION, composites={"09a": ["01", "18"]})
    assert models.shares(["01"]) == {"01": 1}
    with pytest.raises(SelectionError, match=r"^composite '09a' has the member '18', which is not in /m$"):
        models.shares(["01", "09a"])


@st.composite
def nested_sets(draw: st.DrawFn) -> tuple[ModelSet, list[str]]:
    """A set whose composites may hold any that were made before, and some of its ids."""
    known = [str(number) for number in range(draw(st.integers(1, 8)))]
    paths = {id: f"/m/{id}" for id in known}
    composites = {}
    for number in range(draw(st.integers(0, 6))):
        composites[f"c{number}"] = tuple(draw(st.lists(st.sampled_from(known), min_size=1, max_size=4, unique=True)))
        known.append(f"c{number}")
    return ModelSet(paths, composites), draw(st.lists(st.sampled_from(known), min_size=1, max_size=12))


@given(nested_sets())
def test_shares_sum_to_exactly_one(case: tuple[ModelSet, list[str]]) -> None:
    models, entries = case
    shares = models.shares(entries)
    assert sum(shares.values()) == 1
    assert all(share > 0 for share in shares.values())
    assert shares.keys() <= models.paths.keys()


@given(nested_sets(), st.randoms())
def test_the_order_of_the_entries_does_not_change_a_share(case: tuple[ModelSet, list[str]], random: Random) -> None:
    models, entries = case
    shuffled = random.sample(entries, len(entries))
    assert models.shares(shuffled) == models.shares(entries)


@given(nested_sets())
def test_the_share_of_a_list_is_the_mean_of_the_shares_of_its_entries(case: tuple[ModelSet, list[str]]) -> None:
    models, entries = case
    alone = [models.shares([entry]) for entry in entries]
    for id, share in models.shares(entries).items():
        assert share == sum(shares.get(id, Fraction(0)) for shares in alone) / len(entries)
