from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mergeflow.errors import MergeflowError
from mergeflow.recipe.architecture import architecture
from mergeflow.recipe.recorded import Merge
from mergeflow.recipe.request import (
    Budget,
    Member,
    ModelSource,
    PartRequest,
    Policies,
    Request,
    SeriesRequest,
    Target,
    TargetRequest,
)
from mergeflow.recipe.resolve import resolve
from mergeflow.recipe.shapes import TreeOptions

TOY = architecture("toy", "fp16", {}, {name: {"tensors": {f"{name}.w": [2]}} for name in ("te0", "te1", "unet")})
FILES = {id: f"/m/_x{id}-some name.safetensors" for id in ("01", "02", "03", "21", "22")}
SOURCE = ModelSource(files=FILES, composites={"11a": ("21", "22")})
SELECTIONS = {"first": "01,02,11a=3", "second": ["02", "03"], "tried": "03,22", "lonely": "01", "broken": "01,98"}
BASE = TargetRequest(
    "base",
    "the base.safetensors",
    components={
        "te0": PartRequest(selection="first"),
        "te1": PartRequest(selection="second"),
        "unet": PartRequest(model="03"),
    },
)
OTHER = TargetRequest("other", "other.safetensors", selection="second")
SWAP = SeriesRequest("swap", ("te0",))
LEAVE = SeriesRequest("leave_one_out", ("te0",))
ADD = SeriesRequest("add_one", ("te0",))


def asked(series: SeriesRequest | None, *targets: TargetRequest, **changes: Any) -> Request:
    plain = Request(
        models=SOURCE,
        architecture=TOY,
        selections=SELECTIONS,
        targets=targets or (BASE,),
        method="uniform",
        dtype="fp16",
        policies=Policies(),
        budget=Budget(1, 1, 2**30),
        out="/out",
        series=series,
    )
    return replace(plain, **changes)


def made(series: SeriesRequest, *targets: TargetRequest, **changes: Any) -> dict[str, Target]:
    """The targets of a series, by the model that each is for; the base's id is empty, and others have a dash."""
    resolved = resolve(asked(series, *targets, **changes), []).targets
    return {"-" if one.member is None else one.member.id: one for one in resolved}


def lists(target: Target) -> dict[str, tuple[str, ...]]:
    return {part.component: part.entries for part in target.parts}


def problems(series: SeriesRequest, *targets: TargetRequest, **changes: Any) -> list[str]:
    with pytest.raises(MergeflowError) as caught:
        resolve(asked(series, *targets, **changes), [])
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


# swap


def test_a_swap_takes_a_component_of_each_model_of_the_list_and_leaves_the_rest() -> None:
    series = made(SWAP)
    assert list(series) == ["01", "02", "11a"]
    assert lists(series["01"]) == {"te0": ("01",), "te1": ("02", "03"), "unet": ("03",)}
    assert [part.method for part in series["01"].parts] == ["copy", "uniform", "copy"]
    assert series["01"].file == "the base-swap-te0-01.safetensors"
    assert series["01"].name == "base-swap-te0-01"


def test_a_composite_in_the_list_is_tried_as_the_one_entry_that_it_is() -> None:
    composite = made(SWAP)["11a"]
    assert composite.parts[0].method == "uniform"
    assert set(composite.parts[0].shares) == {"21", "22"}
    assert composite.member == Member(
        "swap",
        ("te0",),
        "file",
        "11a",
        ("_x21-some name.safetensors", "_x22-some name.safetensors"),
        "te0 of 11a",
    )


@pytest.mark.parametrize(("selection", "ids"), [("tried", ["03", "22"]), ("all", list(FILES))])
def test_a_swap_tries_the_models_of_another_list(selection: str, ids: list[str]) -> None:
    assert list(made(replace(SWAP, selection=selection))) == ids


def test_a_swap_of_both_encoders_tries_the_models_of_both_lists() -> None:
    series = made(replace(SWAP, components=("te0", "te1")))
    assert list(series) == ["01", "02", "11a", "03"]
    assert lists(series["03"]) == {"te0": ("03",), "te1": ("03",), "unet": ("03",)}
    assert series["03"].file == "the base-swap-te0-te1-03.safetensors"


def test_a_component_that_is_one_model_is_swapped_for_those_of_a_list() -> None:
    series = made(SeriesRequest("swap", ("unet",), selection="tried"))
    assert [lists(target)["unet"] for target in series.values()] == [("03",), ("22",)]


def test_a_model_is_a_base_too() -> None:
    series = made(replace(SWAP, base="2", selection="tried"), OTHER)
    assert list(series) == ["-", "03", "22"]
    assert lists(series["22"]) == {"te0": ("22",), "te1": ("02",), "unet": ("02",)}
    assert series["22"].file == "_x02-some name-swap-te0-22.safetensors"


def test_with_a_model_as_base_no_target_is_needed() -> None:
    request = replace(asked(replace(SWAP, base="02", selection="tried")), targets=())
    assert len(resolve(request, []).targets) == 2


def test_any_file_is_a_base_too() -> None:
    series = made(replace(SWAP, base="/elsewhere/found.safetensors", selection="all"), OTHER)
    assert list(series) == ["-", *FILES]
    assert lists(series["22"]) == {"te0": ("22",), "te1": ("found",), "unet": ("found",)}
    assert series["22"].file == "found-swap-te0-22.safetensors"


def test_a_base_that_is_one_of_the_models_may_be_named_by_its_file_and_is_not_tried() -> None:
    series = made(replace(SWAP, base=FILES["02"], selection="all"), OTHER)
    assert list(series) == ["-", "01", "03", "21", "22"]
    assert lists(series["22"])["te1"] == ("02",)


# leave one out, add one


def test_each_member_of_the_list_is_left_out_in_turn() -> None:
    series = made(LEAVE)
    assert list(series) == ["", "01", "02", "11a"]
    assert [lists(target)["te0"] for target in series.values()] == [
        ("01", "02", "11a"),
        ("02", "11a"),
        ("01", "11a"),
        ("01", "02"),
    ]
    assert {lists(target)["te1"] for target in series.values()} == {("02", "03")}


def test_every_other_model_is_added_in_turn() -> None:
    series = made(ADD)
    assert list(series) == ["", "03"]  # what 11a is made of is in the list already
    assert lists(series["03"])["te0"] == ("01", "02", "11a", "03")


def test_two_lists_lose_a_model_together_if_both_have_it() -> None:
    series = made(replace(LEAVE, components=("te0", "te1")))
    assert list(series) == ["", "01", "02", "11a", "03"]
    assert lists(series["02"]) == {"te0": ("01", "11a"), "te1": ("03",), "unet": ("03",)}
    assert lists(series["01"]) == {"te0": ("02", "11a"), "te1": ("02", "03"), "unet": ("03",)}


def test_two_lists_gain_a_model_if_either_lacks_it() -> None:
    series = made(replace(ADD, components=("te0", "te1")))
    assert list(series) == ["", "01", "03", "21", "22"]
    assert lists(series["03"]) == {"te0": ("01", "02", "11a", "03"), "te1": ("02", "03"), "unet": ("03",)}


def test_a_list_limits_who_is_left_out_or_added() -> None:
    assert list(made(replace(LEAVE, components=("te1",), selection="tried"))) == ["", "03"]
    assert list(made(replace(ADD, components=("te1",), selection="tried"))) == ["", "22"]


def test_the_list_for_all_components_varies_in_one() -> None:
    series = made(LEAVE, OTHER)
    assert lists(series["02"]) == {"te0": ("03",), "te1": ("02", "03"), "unet": ("02", "03")}


# what is written


@pytest.mark.parametrize(
    ("series", "written"),
    [
        (SWAP, False),
        (replace(SWAP, with_base=True), True),
        (replace(SWAP, write="component"), True),
        (replace(SWAP, write="component", with_base=False), False),
        (LEAVE, True),
        (replace(LEAVE, with_base=False), False),
        (ADD, True),
    ],
)
def test_the_base_is_written_where_it_is_of_use(series: SeriesRequest, written: bool) -> None:
    assert ("" in made(series)) is written


def test_only_what_varies_is_written_on_request() -> None:
    series = made(SeriesRequest("leave_one_out", ("te0",), write="component"), OTHER)
    assert list(lists(series["03"])) == ["te0"]
    assert list(lists(series[""])) == ["te0", "te1", "unet"]


def test_other_targets_of_the_run_are_made_as_ever() -> None:
    series = made(replace(SWAP, target="base"), OTHER, BASE)
    assert list(series) == ["-", "01", "02", "11a"]
    assert series["-"] == resolve(asked(None, OTHER), []).targets[0]


def test_file_names_have_nothing_that_a_file_system_refuses() -> None:
    source = ModelSource(files={"a/b": "/m/1", 'c:"d': "/m/2", "é, ü": "/m/3"})
    series = made(SWAP, OTHER, models=source, selections={"second": ["a/b", 'c:"d', "é, ü"]})
    assert [target.file.rpartition("-te0-")[2] for target in series.values()] == [
        "a_b.safetensors",
        "c__d.safetensors",
        "é, ü.safetensors",
    ]


def test_trees_are_made_of_each_list() -> None:
    series = made(LEAVE, method="pairwise")
    trees = [target.parts[0].tree for target in series.values()]
    assert [tree and tree.leaves for tree in trees[:2]] == [("01", "02", "21", "22"), ("02", "21", "22")]
    assert [tree and tree.name(tree.top).startswith("first-without-01") for tree in trees[:2]] == [False, True]


# what cannot be


def test_all_that_is_wrong_is_told_at_once() -> None:
    series = SeriesRequest("add_one", ("te0", "te3", "te0"), selection="tryed", target="base", base="02")
    told = problems(series, replace(BASE, dtype="fp12"))
    assert [message.partition(";")[0] for message in told] == [
        "series.components names 'te0' twice",
        "series.components names 'te3', which arch 'toy' does not have",
        "series.base is one model, and series=add_one varies a list",
        "series.base and series.target are both the base of the series",
        "series.selection: there is no selection 'tryed'",
        "target 'base' has dtype 'fp12'",
    ]


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (SeriesRequest("swap", ()), "series.components is empty; say what varies, as in series.components=[te0]"),
        (
            replace(SWAP, target="bass"),
            "series.target: there is no target 'bass'; did you mean 'base'? (there is base)",
        ),
        (
            replace(SWAP, base="/elsewhere/2.safetensors", selection="tried"),
            "series.base: /elsewhere/2.safetensors would have the id of another model, '2'; rename one of the files",
        ),
        (replace(SWAP, base="99", selection="tried"), "series.base: '99' is not in models.files"),
        (
            replace(SWAP, base="11a", selection="tried"),
            "series.base: '11a' is a composite; name one model, or use series.target",
        ),
        (replace(SWAP, base="02"), "series.base has no lists; say which models are tried: series.selection=NAME"),
        (
            replace(SWAP, base="02", selection="tried", with_base=True),
            "series.with_base has no effect with series.base, whose file is there already; leave it",
        ),
        (
            SeriesRequest("swap", ("unet",)),
            "series=swap of unet has nothing to vary: target 'base' has no list of them; say which models are tried: "
            "series.selection=NAME",
        ),
        (
            SeriesRequest("leave_one_out", ("unet",)),
            "target 'base', unet is one model, and series=leave_one_out varies a list",
        ),
        (
            replace(LEAVE, selection="tried"),
            "series=leave_one_out of te0 has nothing to vary: series.selection=tried has none of the models that are "
            "in the list",
        ),
        (
            replace(ADD, selection="first"),
            "series=add_one of te0 has nothing to vary: every model is in the list already",
        ),
    ],
)
def test_a_series_that_cannot_be_says_why(series: SeriesRequest, message: str) -> None:
    assert problems(series) == [message]


def test_the_base_must_be_clear() -> None:
    (told,) = problems(SWAP, BASE, OTHER)
    assert told == "the run has 2 targets; say which one varies: series.target=NAME"


def test_what_the_base_is_made_without_cannot_vary() -> None:
    thin = TargetRequest("thin", "thin.safetensors", components={"unet": PartRequest(selection="first")})
    (told,) = problems(SWAP, thin)
    assert told == "target 'thin' is made without te0, so nothing of it can vary; leave it out of series.components"


def test_nothing_is_left_of_a_list_of_one() -> None:
    lonely = TargetRequest("lonely", "lonely.safetensors", selection="lonely")
    (told,) = problems(LEAVE, lonely)
    assert told == "target 'lonely', te0 is of one model alone, and nothing is left without it"


def test_a_list_that_cannot_be_read_is_told_once() -> None:
    (told,) = problems(LEAVE, TargetRequest("base", "b.safetensors", selection="broken"))
    assert "'98' is not in models.files" in told


def test_models_whose_outputs_would_be_one_file_are_told() -> None:
    source = ModelSource(files={"a/b": "/m/1", "a:b": "/m/2"})
    (told,) = problems(SWAP, OTHER, models=source, selections={"second": ["a/b", "a:b"]})
    assert told == "models a/b and a:b would both be tried in other-swap-te0-a_b.safetensors; give one another id"


def test_a_recorded_tree_does_not_vary() -> None:
    recorded = TargetRequest("recorded", "r.safetensors", recorded=True)
    told = problems(SWAP, recorded, recorded={"x": Merge(("01", "02"))})
    assert "target 'recorded' is made of a recorded tree, which has no series; vary another target" in told


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (TreeOptions(multipliers={"first-1": 0.3}), "method.multipliers tells nodes of one tree (first-1)"),
        (TreeOptions(shape={"first": "chain"}), "method.shape tells the nodes of one tree"),
    ],
)
def test_what_tells_the_nodes_of_one_tree_does_not_fit_a_series_of_trees(options: TreeOptions, word: str) -> None:
    assert any(word in message for message in problems(LEAVE, method="pairwise", tree=options))


def test_a_list_may_not_have_the_name_that_the_series_needs() -> None:
    selections = {**SELECTIONS, "first-without-02": "01"}
    (told,) = problems(LEAVE, selections=selections)
    assert told == "selection 'first-without-02' has the name that a list of the series needs; give it another"
