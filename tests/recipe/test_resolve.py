from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.config import schema
from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.recipe import request as module
from mergeflow.recipe.architecture import Architecture, architecture
from mergeflow.recipe.request import (
    Budget,
    ModelSource,
    Part,
    PartRequest,
    Policies,
    Recipe,
    Request,
    Target,
    TargetRequest,
)
from mergeflow.recipe.resolve import resolve
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Node, Tree

CONF = Path(__file__).parent.parent.parent / "conf"
TOY = architecture("toy", "fp16", {}, {name: {"tensors": {f"{name}.w": [2]}} for name in ("text", "image", "vae")})
FILES = {id: f"/m/{id}.safetensors" for id in ("01", "02", "03", "10", "21", "22")}
SOURCE = ModelSource(files=FILES, composites={"11a": ("21", "22"), "z": ("01", "99"), "y": ("y", "01")})
SELECTIONS = {"some": "01,02,10=3", "other": ["03", "11a"], "broken": "01,98"}
WANTED = TargetRequest("made", "made.safetensors", selection="some")


def asked(*targets: TargetRequest, **changes: Any) -> Request:
    plain = Request(
        models=SOURCE,
        architecture=TOY,
        selections=SELECTIONS,
        targets=targets,
        method="uniform",
        dtype="fp16",
        policies=Policies(),
        budget=Budget(1, 1, 2**30),
        out="/out",
    )
    return replace(plain, **changes)


def target(wanted: TargetRequest, **changes: Any) -> Target:
    (made,) = resolve(asked(wanted, **changes), []).targets
    return made


def problems(*targets: TargetRequest, **changes: Any) -> list[str]:
    with pytest.raises(MergeflowError) as caught:
        resolve(asked(*targets, **changes), [])
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


# Round 1


LISTS = """
te0:--,--,05,--,11,--,--,17,20,11a,22,23,24,25,26,27,32,--,36,--,--,41,--=14
te1:01,02,05,06,--,12,14,17,20,11a,22,--,24,25,26,27,32,33,36,37,38,41,42=21
unet:01,02,06,07,09,10,11,12,13,15,16,17,20,21,22,23,25,26,27,28,30,31,32,33,34,--,37,38,39,40,42,43,44=32
nsfw:01,--,06,07,--,--,11,12,13,15,--,--,20,21,22,23,--,--,27,--,--,31,--,--,--,36,--,--,--,40,--,43,--=16
"""
FIRST_PASS = """
te0:--,--,03,05,--,10,11,--,--,16,17,09a,10a,20,11a,22,23,24,25,26,27,32,--,36,--,--,41,--=19
te1:01,02,03,05,06,10,--,12,14,16,17,09a,10a,20,11a,22,--,24,25,26,27,32,33,36,37,38,41,42=26
te2:01,--,03,05,06,10,--,--,--,16,17,09a,10a,20,11a,22,--,24,25,--,27,32,33,36,37,38,41,--=21
"""


def conf(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((CONF / f"{name}.yaml").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def round1(sdxl: Architecture, selections: str = "round1", *targets: TargetRequest) -> Recipe:
    models = conf("models/round1")
    source = ModelSource("/m", models["pattern"], {}, {id: tuple(of) for id, of in models["composites"].items()})
    names = [f"/m/_x{number:02}-some name.safetensors" for number in range(44, 0, -1)]
    wanted = targets or [from_conf(name) for name in ("x17", "x11c")]
    lists = conf(f"selection/{selections}")
    return resolve(asked(*wanted, models=source, architecture=sdxl, selections=lists), names)


def from_conf(name: str) -> TargetRequest:
    described = conf(f"target/{name}")[name]
    parts = {component: PartRequest(**part) for component, part in described["components"].items()}
    return TargetRequest(name, described["file"], components=parts)


@pytest.mark.parametrize(
    ("file", "lists"), [("round1", LISTS), ("round1_first", FIRST_PASS)], ids=["lists", "first pass"]
)
def test_the_lists_of_round_1_are_kept_as_they_were_written(file: str, lists: str) -> None:
    assert conf(f"selection/{file}") == dict(line.split(":", 1) for line in lists.split())


@pytest.mark.parametrize(
    ("component", "x17", "x11c"), [("te0", 14, 14), ("te1", 21, 21), ("unet", 32, 16), ("vae", 1, 1)]
)
def test_round_1_has_as_many_entries_as_its_writer_counted(
    sdxl: Architecture, component: str, x17: int, x11c: int
) -> None:
    counts = {made.name: {part.component: len(part.entries) for part in made.parts} for made in round1(sdxl).targets}
    assert (counts["x17"][component], counts["x11c"][component]) == (x17, x11c)


def test_round_1_divides_the_share_of_a_composite_exactly(sdxl: Architecture) -> None:
    x17, _ = round1(sdxl).targets
    shares = {part.component: part.shares for part in x17.parts}
    assert shares["te0"]["22"] == Fraction(3, 28)
    assert shares["te0"]["21"] == Fraction(1, 28)
    assert {share for id, share in shares["te0"].items() if id not in ("21", "22")} == {Fraction(1, 14)}
    assert shares["te1"]["22"] == Fraction(3, 42)
    assert shares["te1"]["21"] == Fraction(1, 42)
    assert set(shares["unet"].values()) == {Fraction(1, 32)}
    assert shares["vae"] == {"25": 1}


@pytest.mark.parametrize(("name", "count"), [("te0", 19), ("te1", 26), ("te2", 21)])
def test_the_first_pass_has_as_many_entries_as_its_writer_counted(sdxl: Architecture, name: str, count: int) -> None:
    wanted = TargetRequest("first", "first.safetensors", components={"te0": PartRequest(name)})
    (part,) = round1(sdxl, "round1_first", wanted).targets[0].parts
    assert len(part.entries) == count
    # Three of the entries are composites: each brings one checkpoint that is not listed, and one that is.
    assert part.shares.keys() - set(part.entries) == {"18", "19", "21"}
    assert part.shares["17"] == Fraction(3, 2 * count)


def test_round_1_needs_the_headers_of_all_that_it_names_and_of_no_other(sdxl: Architecture) -> None:
    unused = {"03", "04", "08", "18", "19", "29", "35"}
    needed = round1(sdxl).checkpoints()
    assert set(needed) == {f"{number:02}" for number in range(1, 45)} - unused
    assert len(needed) == len(set(needed))


# targets


def test_a_target_has_the_components_of_the_architecture_in_its_order() -> None:
    wanted = replace(WANTED, components={"vae": PartRequest(model="3"), "text": PartRequest("other")})
    thirds = {"01": Fraction(1, 3), "02": Fraction(1, 3), "10": Fraction(1, 3)}
    assert target(wanted).parts == (
        Part("text", ("03", "11a"), {"03": Fraction(1, 2), "21": Fraction(1, 4), "22": Fraction(1, 4)}, "uniform"),
        Part("image", ("01", "02", "10"), thirds, "uniform"),
        Part("vae", ("03",), {"03": Fraction(1)}, "copy"),
    )


def test_a_component_that_no_list_is_given_for_is_left_out() -> None:
    wanted = TargetRequest("made", "made.safetensors", components={"image": PartRequest("some")})
    assert [part.component for part in target(wanted).parts] == ["image"]


def test_one_model_that_is_a_composite_is_merged_and_not_copied() -> None:
    wanted = TargetRequest("made", "made.safetensors", components={"image": PartRequest(model="11a")})
    (part,) = target(wanted).parts
    assert part == Part("image", ("11a",), {"21": Fraction(1, 2), "22": Fraction(1, 2)}, "uniform")


@pytest.mark.parametrize(("own", "made"), [(None, "bf16"), ("keep", "keep"), ("fp32", "fp32")])
def test_a_target_may_have_a_dtype_of_its_own(own: str | None, made: str) -> None:
    assert target(replace(WANTED, dtype=own), dtype="bf16").dtype == made


def test_the_checkpoints_of_a_target_are_each_named_once_with_those_it_leans_on_last() -> None:
    wanted = replace(WANTED, components={"text": PartRequest("other")}, keys_from="22", base="3")
    made = target(wanted, policies=Policies(missing="base"))
    assert made.checkpoints() == ("03", "21", "22", "01", "02", "10")
    assert (made.keys_from, made.base) == ("22", "03")


def test_a_recipe_holds_what_was_asked_for() -> None:
    policies, budget = Policies("skip", "error", "first", "propagate"), Budget(3, 2, 10**9)
    made = resolve(asked(WANTED, policies=policies, budget=budget), [])
    assert (made.architecture, made.policies, made.budget) == (TOY, policies, budget)
    assert made.checkpoints() == ("01", "02", "10")


@given(st.permutations(["some", "other", "all", "all but 11a"]), st.integers(1, 4))
def test_the_checkpoints_of_a_recipe_are_those_of_all_targets_each_once(lists: list[str], count: int) -> None:
    wanted = [TargetRequest(name, f"{name}.safetensors", selection=name) for name in lists[:count]]
    made = resolve(asked(*wanted, selections={**SELECTIONS, "all": "all", "all but 11a": "all but 11a"}), [])
    assert set(made.checkpoints()) == {id for target in made.targets for id in target.checkpoints()}
    assert len(set(made.checkpoints())) == len(made.checkpoints())


# what is refused


@pytest.mark.parametrize(
    ("wanted", "changes", "problem"),
    [
        (
            replace(WANTED, components={"imag": PartRequest("some")}),
            {},
            "target 'made' names the component 'imag', which arch 'toy' does not have; did you mean 'image'? "
            "(it has text, image, vae)",
        ),
        (
            replace(WANTED, dtype="fp8"),
            {},
            "target 'made' has dtype 'fp8'; choose one of keep, fp16, bf16, fp32",
        ),
        (
            replace(WANTED, file="made.ckpt"),
            {},
            "target 'made' has file 'made.ckpt'; give a name ending in .safetensors, and out=DIR",
        ),
        (
            replace(WANTED, file="../made.safetensors"),
            {},
            "target 'made' has file '../made.safetensors'; give a name ending in .safetensors, and out=DIR",
        ),
        (
            WANTED,
            {"policies": Policies(missing="base")},
            "keys.missing=base needs target.made.base=ID, the model to take them from",
        ),
        (
            replace(WANTED, base="01"),
            {},
            "target 'made' has a base, which only keys.missing=base uses; leave one or add the other",
        ),
        (
            replace(WANTED, keys_from="5"),
            {},
            "target 'made', keys_from: '5' is not in models.files",
        ),
        (
            replace(WANTED, keys_from="11a"),
            {},
            "target 'made', keys_from: '11a' is a composite of 21, 22; name one model",
        ),
        (
            replace(WANTED, base="11a"),
            {"policies": Policies(missing="base")},
            "target 'made', base: '11a' is a composite of 21, 22; name one model",
        ),
        (
            TargetRequest("made", "made.safetensors"),
            {},
            "target 'made' has no components; give it selection=NAME or components.NAME.selection=NAME",
        ),
        (
            replace(WANTED, components={"vae": PartRequest()}),
            {},
            "target 'made', vae: give either selection=NAME or model=ID",
        ),
        (
            replace(WANTED, components={"vae": PartRequest("some", "01")}),
            {},
            "target 'made', vae: give either selection=NAME or model=ID",
        ),
        (
            replace(WANTED, components={"vae": PartRequest(model="5")}),
            {},
            "target 'made', vae: '5' is not in models.files",
        ),
        (
            replace(WANTED, components={"vae": PartRequest(model="z")}),
            {},
            "target 'made', vae: composite 'z' has the member '99', which is not in models.files",
        ),
        (
            replace(WANTED, components={"vae": PartRequest(model="y")}),
            {},
            "target 'made', vae: composite 'y' contains itself: y > y",
        ),
        (
            replace(WANTED, components={"vae": PartRequest("sme")}),
            {},
            "target 'made', vae: there is no selection 'sme'; did you mean 'some'? (there is some, other, broken); "
            "choose another group with selection=, or add +selection.sme=...",
        ),
        (
            TargetRequest("made", "made.safetensors", components={"vae": PartRequest("some")}),
            {"selections": {}},
            "target 'made', vae: there is no selection 'some' (there is none); choose another group with selection=, "
            "or add +selection.some=...",
        ),
        (
            replace(WANTED, selection="broken"),
            {},
            "selection 'broken': '98' is not in models.files; the list is: 01,98",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_a_target_that_cannot_be_meant_is_refused(wanted: TargetRequest, changes: dict[str, Any], problem: str) -> None:
    assert problems(wanted, **changes) == [problem]


def test_no_target_is_refused() -> None:
    assert problems() == ["no target is asked for; name one, as in target=single or target=[x17,x11c]"]


def test_two_targets_of_one_file_are_refused() -> None:
    assert problems(WANTED, replace(WANTED, name="other"), replace(WANTED, name="third", file="c.safetensors")) == [
        "targets made and other would both write made.safetensors; give each its own file"
    ]


def test_all_problems_of_all_targets_are_raised_together_and_each_once() -> None:
    found = problems(
        replace(WANTED, selection="broken", dtype="fp8"),
        replace(WANTED, name="b", file="b.ckpt", selection="broken", keys_from="5"),
    )
    assert found == [
        "target 'made' has dtype 'fp8'; choose one of keep, fp16, bf16, fp32",
        "selection 'broken': '98' is not in models.files; the list is: 01,98",
        "target 'b' has file 'b.ckpt'; give a name ending in .safetensors, and out=DIR",
        "target 'b', keys_from: '5' is not in models.files",
    ]


def test_an_absent_member_of_a_composite_in_a_list_is_refused() -> None:
    assert problems(WANTED, selections={"some": "02,z"}) == [
        "selection 'some': composite 'z' has the member '99', which is not in models.files"
    ]


# what the rest of the program says of the same choices


@pytest.mark.parametrize("name", ["Missing", "Surplus", "Integers", "Nonfinite"])
def test_the_policies_are_those_that_may_be_typed(name: str) -> None:
    assert list(get_args(getattr(module, name))) == [choice.value for choice in getattr(schema, name)]


# recorded trees


TREE = Tree(("01", "02"), (Node("n", (0, 1), 0.2),))
RECORDED = TargetRequest("recorded", "recorded.safetensors", recorded=True)
OPTIONS = {
    "shape": TreeOptions("chain"),
    "save_half": TreeOptions(save_half=False),
    "bake": TreeOptions(bake="top", vae="03"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_trees_are_refused_where_a_recorded_tree_makes_everything(name: str) -> None:
    request = asked(RECORDED, method="pairwise", tree=OPTIONS[name])
    with pytest.raises(ConfigError) as caught:
        resolve(request, [], lambda _: TREE)
    assert str(caught.value) == f"method.{name} has no effect on a recorded tree, which tells it; leave it out"


@pytest.mark.parametrize("name", ["shape", "save_half"])
def test_options_of_trees_are_for_the_lists_beside_a_recorded_tree(name: str) -> None:
    request = asked(RECORDED, WANTED, method="pairwise", tree=OPTIONS[name])
    recorded, listed = resolve(request, [], lambda _: TREE).targets
    assert {part.tree for part in recorded.parts} == {TREE}
    for part in listed.parts:
        assert part.tree is not None
        assert any(not node.save_half for node in part.tree.nodes) == (name == "save_half")
        assert (part.tree.levels[-1] == len(part.tree.nodes)) == (name == "shape" or len(part.tree.nodes) < 3)
