from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import SelectionError
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.selection import parse_selection

IDS = ("01", "02", "03", "05", "10", "17", "18", "21", "22", "a", "café", "step=7")
MODELS = ModelSet({id: f"/m/{id}.safetensors" for id in IDS}, {"09a": ("17", "18"), "11a": ("21", "22")}, "/m")


def parsed(written: str | list[object]) -> list[str]:
    return list(parse_selection("te0", written, MODELS))


def refusal(written: str | list[object]) -> str:
    with pytest.raises(SelectionError) as caught:
        parse_selection("te0", written, MODELS)
    return str(caught.value)


# what is understood


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ("05", ["05"]),
        ("5", ["05"]),
        ("005", ["05"]),
        ("22,05,1", ["22", "05", "01"]),
        (" 22 ,\n05 ,\t1 ", ["22", "05", "01"]),
        ("--,05,---,22,--", ["05", "22"]),
        ("05,22=2", ["05", "22"]),
        ("05,22 = 2 ", ["05", "22"]),
        ("05,--=1", ["05"]),
        ("05,09a,22=3", ["05", "09a", "22"]),
        ("9a,17", ["09a", "17"]),
        ("a,café", ["a", "café"]),
        ("cafe\u0301", ["café"]),
        ("05,step=7", ["05", "step=7"]),
        ("05,step=7=2", ["05", "step=7"]),
        ("step=7,05=2", ["step=7", "05"]),
    ],
    ids=repr,
)
def test_a_text_is_read_as_people_write_it(written: str, ids: list[str]) -> None:
    assert parsed(written) == ids


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ([5, 22], ["05", "22"]),
        (["05", 1, " 22 "], ["05", "01", "22"]),
        (["--", "05", "---"], ["05"]),
        (["05", "22=2"], ["05", "22"]),
        (["05", 22, "=2"], ["05", "22"]),
        (["step=7"], ["step=7"]),
        (["09a", 10], ["09a", "10"]),
    ],
    ids=repr,
)
def test_a_list_is_read_item_by_item(written: list[object], ids: list[str]) -> None:
    assert parsed(written) == ids


@pytest.mark.parametrize("written", ["all", "ALL", " all ", "all=12"], ids=repr)
def test_all_is_every_checkpoint_in_the_order_of_the_set_and_no_composite(written: str) -> None:
    assert parsed(written) == list(IDS)


@pytest.mark.parametrize(
    ("written", "out"),
    [
        ("all but 03,10", ["03", "10"]),
        ("all  but\n3 , --, 10=10", ["03", "10"]),
        ("All But café", ["café"]),
        ("all but 11a", ["21", "22"]),
        ("all but 9a,21", ["17", "18", "21"]),
        ("all but step=7", ["step=7"]),
    ],
    ids=repr,
)
def test_all_but_leaves_out_what_is_listed_and_the_members_of_a_composite(written: str, out: list[str]) -> None:
    assert parsed(written) == [id for id in IDS if id not in out]


@st.composite
def written_subsets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A list as somebody may write it, and the ids that it means."""
    ids = draw(st.permutations([*IDS, "09a", "11a"]))[: draw(st.integers(1, len(IDS)))]
    items = []
    for id in ids:
        items += draw(st.lists(st.sampled_from(["--", "---", " -- "]), max_size=2))
        zeros = draw(st.integers(0, 3)) if id[0].isdigit() else 0
        bare = draw(st.sampled_from([id, id.lstrip("0")]))
        items.append(draw(st.sampled_from(["", " ", "\n"])) + "0" * zeros + bare + draw(st.sampled_from(["", " "])))
    count = draw(st.sampled_from(["", f"={len(ids)}", f" = {len(ids)} "]))
    return ",".join(items) + count, ids


@given(written_subsets())
def test_any_subset_with_placeholders_zeros_spaces_and_its_count_is_read_in_order(
    case: tuple[str, list[str]],
) -> None:
    written, ids = case
    assert parsed(written) == ids


@given(written_subsets())
def test_a_list_of_the_items_of_a_text_means_the_same(case: tuple[str, list[str]]) -> None:
    written, ids = case
    assert parsed(list(written.split(","))) == ids


# what is refused


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("05,99", "'99' is not in /m; the list is: 05,99"),
        ("05,stepp=7", "'stepp' is not in /m; did you mean 'step=7'?; it says =7, but selects 1"),
        ("05,step", "'step' is not in /m; did you mean 'step=7'?; the list is: 05,step"),
        ("05,22,5", "'05' is listed 2 times; the list is: 05,22,5"),
        ("05,05,005", "'05' is listed 3 times"),
        ("05,22=3", "it says =3, but selects 2; the list is: 05,22=3"),
        ("05,--=2", "it says =2, but selects 1"),
        ("all=5", "it says =5, but selects 12"),
        ("", "it selects no model; the list is: (empty)"),
        ("   ", "it selects no model; the list is: (empty)"),
        ("--,--", "it selects no model; the list is: --,--"),
        ("=0", "it selects no model"),
        ("=3", "it says =3, but selects 0"),
        ("05,,22", "a place is empty (write -- for a model that is left out); the list is: 05,,22"),
        ("05,22,", "a place is empty"),
        ("05,22,=2", "a place is empty"),
        ("05,-,22", "'-' is not in /m"),
        ("all but 99", "'99' is not in /m"),
        ("all but", "a place is empty"),
        ("all but 03,03", "'03' is listed 2 times"),
        ("all but 03=3", "it says =3, but selects 11"),
        ("allbut 03", "'allbut 03' is not in /m"),
        ("all butter", "'all butter' is not in /m"),
        ("all,05", "'all' is not in /m"),
        (f"all but {','.join(IDS)}", "it selects no model"),
    ],
    ids=repr,
)
def test_a_text_that_cannot_be_meant_is_refused_and_shown(written: str, problem: str) -> None:
    assert refusal(written).startswith(f"selection 'te0': {problem}")
    assert refusal(written).endswith(f"; the list is: {written.strip() or '(empty)'}")


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ([], "it selects no model; the list is: (empty)"),
        (["--"], "it selects no model; the list is: --"),
        (["05", 5], "'05' is listed 2 times; the list is: 05, 5"),
        (["05", ""], "a place is empty"),
        (["05", "22=3"], "it says =3, but selects 2"),
        (["05", "=3"], "it says =3, but selects 1"),
        (["05,22"], "'05,22' is one item of a list; write its ids as items of their own; the list is: 05,22"),
        (["all"], "'all' is not in /m"),
        ([True], "YAML reads True as neither text nor a whole number; put the id into quotes"),
        ([1.5], "YAML reads 1.5 as neither text nor a whole number; put the id into quotes"),
        ([None], "YAML reads None as neither text nor a whole number; put the id into quotes"),
        ([["05"]], "YAML reads ['05'] as neither text nor a whole number; put the id into quotes"),
    ],
    ids=repr,
)
def test_a_list_that_cannot_be_meant_is_refused_and_shown(written: list[object], problem: str) -> None:
    assert refusal(written).startswith(f"selection 'te0': {problem}")
    assert "; the list is: " in refusal(written)


def test_all_that_is_wrong_with_a_text_is_said_at_once() -> None:
    assert refusal("1,99,,01,3,zz=9") == (
        "selection 'te0': a place is empty (write -- for a model that is left out); '99' is not in /m; "
        "'zz' is not in /m; '01' is listed 2 times; it says =9, but selects 3; the list is: 1,99,,01,3,zz=9"
    )


def test_all_that_is_wrong_with_a_list_is_said_at_once() -> None:
    assert refusal([False, "99", 2.5, "05", 5]) == (
        "selection 'te0': YAML reads False as neither text nor a whole number; put the id into quotes; "
        "YAML reads 2.5 as neither text nor a whole number; put the id into quotes; "
        "'99' is not in /m; '05' is listed 2 times; the list is: False, 99, 2.5, 05, 5"
    )


def test_an_id_with_a_comma_can_be_an_item_of_a_list() -> None:
    models = ModelSet({"a,b": "/m/a,b.safetensors"})
    assert parse_selection("te0", ["a,b"], models) == ("a,b",)


def test_all_but_a_composite_whose_member_is_absent_is_refused() -> None:
    models = ModelSet({"17": "/m/17"}, {"09a": ("17", "18")}, "/m")
    with pytest.raises(SelectionError) as caught:
        parse_selection("te0", "all but 09a", models)
    assert str(caught.value) == (
        "selection 'te0': composite '09a' has the member '18', which is not in /m; the list is: all but 09a"
    )


# how many are left out


@pytest.mark.parametrize(
    "written",
    ["all but 03,10=-2", "all but 3,10 = -2 ", "all but 03,--,10=-2", "03,10=-2", "--,3,10 = -2", ["03", "10", "=-2"]],
    ids=str,
)
def test_a_negative_count_is_of_what_is_left_out(written: str | list[object]) -> None:
    assert parsed(written) == [id for id in IDS if id not in ("03", "10")]


def test_a_composite_is_one_of_those_left_out() -> None:
    assert parsed("all but 11a,03=-2") == [id for id in IDS if id not in ("21", "22", "03")]


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("all but 03,10=-3", "it says =-3, but leaves out 2"),
        ("all but 03,10=-1", "it says =-1, but leaves out 2"),
        ("all but 03,10=-0", "it says =0, but selects 10"),
        ("05,22=-3", "it says =-3, but leaves out 2"),
        ("05,22=-0", "it says =0, but selects 2"),
        ("all=-2", "it says =-2, but selects 12"),
    ],
)
def test_a_negative_count_that_does_not_match_is_refused(written: str, problem: str) -> None:
    assert refusal(written) == f"selection 'te0': {problem}; the list is: {written}"


# a switch for each model


def test_in_a_mapping_each_model_is_selected_or_not() -> None:
    assert parse_selection("te0", {"22": True, "5": True, "1": False, "9a": True}, MODELS) == ("22", "05", "09a")


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({}, "it selects no model; the list is: (empty)"),
        ({"05": False}, "it selects no model; the list is: 05: false"),
        ({"05": True, "99": False}, "'99' is not in /m; the list is: 05: true, 99: false"),
        ({"05": True, "5": True}, "'05' is listed 2 times; the list is: 05: true, 5: true"),
        ({"05": "yes"}, "'05' is 'yes'; write true or false; the list is: 05: yes"),
    ],
    ids=repr,
)
def test_a_mapping_that_cannot_be_meant_is_refused_and_shown(written: dict[str, object], problem: str) -> None:
    with pytest.raises(SelectionError) as caught:
        parse_selection("te0", written, MODELS)
    assert str(caught.value) == f"selection 'te0': {problem}"


# ids of another collection


def test_many_unknown_ids_are_told_at_once_with_what_there_is() -> None:
    assert refusal("05,45,46,47,48,49") == (
        "selection 'te0': 45, 46, 47, 48 and 1 more are not in /m, which has 12 models: 01, 02, 03, 05 and 8 more; "
        "the list is: 05,45,46,47,48,49"
    )
