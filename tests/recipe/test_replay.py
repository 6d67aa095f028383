"""Replaying: a recipe that is written into metadata and read back is the same recipe, and nothing else is taken."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeflow.errors import ConfigError, IncompatibleSources, MergeflowError
from mergeflow.formats.safetensors import Safetensors
from mergeflow.plan.make import make_plan
from mergeflow.plan.metadata import describe
from mergeflow.recipe.architecture import architecture
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.recorded import read_merges, recorded_tree
from mergeflow.recipe.replay import Replay, changed
from mergeflow.recipe.request import (
    Budget,
    ModelSource,
    PartRequest,
    Policies,
    RecordedFile,
    Request,
    TargetRequest,
)
from mergeflow.recipe.resolve import resolve
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from mergeflow.tensors import Identity
from tests.plan.builders import OPEN, TOY, USUAL, checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mergeflow.recipe.request import Recipe
    from mergeflow.tensors import Checkpoint

IDS = ("01", "02", "03", "04", "05", "25")
ARCH = replace(
    TOY,
    components={
        **TOY.components,
        **architecture("vae", "fp16", {}, {"vae": {"tensors": {"first_stage_model.w": [2]}}}).components,
    },
)
"""The toy with a VAE, so that there is something to bake in."""
SHAPES = USUAL | {"first_stage_model.w": (2,)}
MODELS = [checkpoint(id, SHAPES, path=f"/models/_x{id}-größe {id}.safetensors") for id in IDS]
COMPOSITES = {"6a": ("4", "05"), "6b": ("06a", "1"), "unused": ("02", "03")}
PATH = "/out/made.safetensors"
WANTED = TargetRequest("made", "made.safetensors", selection="models")
REPLAYED = TargetRequest("recorded", "", recorded=True)
RECORDED = TargetRequest("recorded", "made.safetensors", recorded=True)
WEB_UI = Policies(keys="webui")
CHAIN = {"n0": ["01", "02", 1 / 3]} | {f"n{i}": [f"n{i - 1}", IDS[i % 6], 1 / 3 + i / 1000] for i in range(1, 300)}


def request(target: TargetRequest, checkpoints: Iterable[Checkpoint] = MODELS, **changes: Any) -> Request:
    asked: dict[str, Any] = {
        "models": ModelSource(files={one.id: one.path for one in checkpoints}, composites=COMPOSITES),
        "architecture": ARCH,
        "selections": {"models": "02,01,03", "other": "04,6b,03,6a", "single": "05", "pair": "6a"},
        "targets": (target,),
        "method": "uniform",
        "dtype": "fp16",
        "policies": Policies(),
        "budget": Budget(1, 1, 2**30),
        "out": "/out",
    }
    return Request(**asked | changes)


def resolved(target: TargetRequest, *, nodes: Mapping[str, object] | None = None, **changes: Any) -> Recipe:
    asked = request(target, **changes)
    if nodes is None:
        return resolve(asked, [])
    merges = read_merges(nodes, changes.pop("vae", None))
    return resolve(asked, [], lambda models: recorded_tree(merges, models))


def metadata(recipe: Recipe, checkpoints: Sequence[Checkpoint] = MODELS) -> Mapping[str, str]:
    """What the header of the first output says."""
    by_id = {one.id: one for one in checkpoints}
    plan = make_plan(recipe, [by_id[id] for id in recipe.checkpoints()], Safetensors(), "/out")
    assert plan.problems == ()
    head = plan.outputs[0].layout.head
    return (
        Safetensors().parse(lambda offset, count: head[offset : offset + count], plan.outputs[0].layout.size).metadata
    )


def model_set(checkpoints: Iterable[Checkpoint] = MODELS) -> ModelSet:
    return ModelSet({one.id: one.path for one in checkpoints}, {}, "/models")


def replayed(
    said: Mapping[str, str], checkpoints: Sequence[Checkpoint] = MODELS, path: str = PATH, **changes: Any
) -> Recipe:
    file = RecordedFile(path, "mergeflow", changes.pop("check", True))
    asked = request(changes.pop("target", REPLAYED), checkpoints, recorded=file, **changes)
    return Replay(said, path, model_set(checkpoints)).recipe(asked)


def said_of(told: object) -> dict[str, str]:
    return {"mergeflow": json.dumps(told)}


# there and back


CASES: dict[str, Recipe] = {
    "uniform": resolved(WANTED),
    "composites": resolved(replace(WANTED, selection="other")),
    "copied parts": resolved(replace(WANTED, components={"image": PartRequest(model="25")})),
    "several lists": resolved(replace(WANTED, components={"text": PartRequest("other"), "image": PartRequest("pair")})),
    "keys of another": resolved(replace(WANTED, keys_from="25", dtype="bf16")),
    "a base": resolved(replace(WANTED, base="5"), policies=Policies(missing="base", nonfinite="skip")),
    "policies": resolved(WANTED, policies=Policies("skip", "error", "first", "propagate", position_ids="fix")),
    "one component": resolved(TargetRequest("made", "x.safetensors", components={"text": PartRequest("single")})),
    "an open architecture": resolved(WANTED, architecture=OPEN, dtype="keep"),
    "pairs": resolved(WANTED, method="pairwise"),
    "a chain": resolved(replace(WANTED, selection="other"), method="pairwise", tree=TreeOptions("chain")),
    "a nested list": resolved(WANTED, method="pairwise", tree=TreeOptions([["01", "02"], "3"])),
    "one model": resolved(replace(WANTED, selection="single"), method="pairwise"),
    "one composite": resolved(replace(WANTED, components={"text": PartRequest(model="6a")}), method="pairwise"),
    "options": resolved(
        replace(WANTED, components={"text": PartRequest("other")}),
        method="pairwise",
        tree=TreeOptions({"other": "chain"}, {"models-1": 0.3, "level2": 1e-3}, False, "every", "25"),
        rules=Rules("comfyui"),
    ),
    "web UI": resolved(WANTED, method="pairwise", dtype="keep", policies=WEB_UI, rules=Rules("webui", "half")),
    "merged position_ids": resolved(WANTED, method="pairwise", policies=Policies(position_ids="webui")),
    "recorded": resolved(
        RECORDED,
        method="pairwise",
        policies=WEB_UI,
        nodes={"x": ["03", "05"], "y": {"a": "x", "b": "01", "bake": "25"}, "top": ["x", "y", 0.2]},
    ),
    "add difference": resolved(
        RECORDED,
        method="pairwise",
        nodes={"x": {"a": "03", "b": "05", "c": "01", "formula": "add_difference", "multiplier": 0.7}},
    ),
    "recorded as a mean": resolved(RECORDED, nodes={"x": ["03", "05"], "y": ["x", "01", 0.3]}),
    "recorded beside a list": resolved(
        replace(RECORDED, components={"text": PartRequest("models")}), method="pairwise", nodes={"x": ["03", "05"]}
    ),
    "shares of thousands of digits": resolved(RECORDED, method="pairwise", nodes=CHAIN),
}


@pytest.mark.parametrize("recipe", CASES.values(), ids=CASES.keys())
def test_what_is_told_is_what_is_read(recipe: Recipe) -> None:
    said = metadata(recipe)
    again = replayed(said, architecture=recipe.architecture)
    (target,) = recipe.targets
    assert again.targets == (replace(target, name="recorded", same_as=PATH),)
    assert again.policies == recipe.policies
    assert again.checkpoints() == recipe.checkpoints()
    assert metadata(again) == said


@given(
    lists=st.fixed_dictionaries(
        {name: st.lists(st.sampled_from([*IDS, "6a", "6b"]), min_size=1, unique=True) for name in ("models", "other")}
    ),
    method=st.sampled_from(["uniform", "pairwise"]),
    tree=st.builds(
        TreeOptions,
        shape=st.sampled_from(["balanced", "chain"]),
        save_half=st.booleans(),
        bake=st.just("top"),
        vae=st.sampled_from(IDS),
    )
    | st.just(TreeOptions()),
    dtype=st.sampled_from(["keep", "fp16", "bf16", "fp32"]),
)
@settings(max_examples=40, deadline=None)
def test_any_recipe_comes_back_as_it_was(
    lists: dict[str, list[str]], method: str, tree: TreeOptions, dtype: str
) -> None:
    parts = {"image": PartRequest("other")}
    tree = tree if method == "pairwise" else TreeOptions()
    recipe = resolved(replace(WANTED, components=parts), selections=lists, method=method, tree=tree, dtype=dtype)
    again = replayed(metadata(recipe))
    assert again.targets == (replace(recipe.targets[0], name="recorded", same_as=PATH),)
    assert describe(again.targets[0], again) == describe(recipe.targets[0], recipe)


def test_an_output_may_get_another_name_and_keeps_its_own_otherwise() -> None:
    said = metadata(CASES["pairs"])
    assert replayed(said).targets[0].file == "made.safetensors"
    assert replayed(said, target=replace(REPLAYED, file="again.safetensors")).targets[0].file == "again.safetensors"


@pytest.mark.parametrize(
    ("path", "check", "same_as"),
    [("/x/a.safetensors", True, "/x/a.safetensors"), ("/x/a.safetensors", False, None), ("/x/a.json", True, None)],
    ids=["checked", "unchecked", "metadata alone"],
)
def test_the_tensors_must_be_those_of_the_file_if_there_are_any_and_that_is_wanted(
    path: str, check: bool, same_as: str | None
) -> None:
    assert replayed(metadata(CASES["uniform"]), path=path, check=check).targets[0].same_as == same_as


# where the models are now


def test_a_model_is_found_by_the_name_of_its_file_whatever_its_id_is_now() -> None:
    recipe = CASES["composites"]
    moved = [replace(one, id=f"new-{one.id}", path=one.path.replace("/models", "/mnt")) for one in MODELS]
    again = replayed(metadata(recipe), moved)
    assert again.checkpoints() == tuple(f"new-{id}" for id in recipe.checkpoints())
    assert again.targets[0].parts[0].entries == ("new-04", "6b", "new-03", "6a")
    assert again.models.composites == {"6b": ("06a", "new-01"), "6a": ("new-04", "new-05")}
    assert Replay(metadata(recipe), PATH, model_set(moved)).differences(moved[:1]) == []


def test_ids_that_have_changed_places_are_told_apart_by_the_names_of_the_files() -> None:
    one, other = MODELS[0], MODELS[1]
    swapped = [replace(one, id=other.id), replace(other, id=one.id), *MODELS[2:]]
    assert replayed(metadata(CASES["pairs"]), swapped).checkpoints() == ("01", "02", "03")
    assert CASES["pairs"].checkpoints() == ("02", "01", "03")


def test_a_model_whose_file_has_another_name_is_found_by_its_id() -> None:
    renamed = [replace(one, id=one.id.lstrip("0"), path=f"/models/renamed-{one.id}.safetensors") for one in MODELS]
    assert replayed(metadata(CASES["uniform"]), renamed).checkpoints() == ("2", "1", "3")


def test_files_of_one_name_in_several_directories_are_told_apart_by_their_ids() -> None:
    models = [checkpoint(id, SHAPES, path=f"/hub/{id}/model.safetensors") for id in IDS]
    said = metadata(resolved(WANTED, checkpoints=models), models)
    assert replayed(said, models).checkpoints() == ("02", "01", "03")


def test_two_models_never_become_one_file() -> None:
    only = checkpoint("01", path=MODELS[1].path)
    with pytest.raises(MergeflowError, match=r"2 of its 3 models are not in /models: 01 .*01\.safetensors\), 03"):
        replayed(metadata(CASES["uniform"]), [only, checkpoint("9")])


def test_all_models_that_are_missing_are_told_at_once() -> None:
    with pytest.raises(MergeflowError) as caught:
        replayed(metadata(CASES["uniform"]), [MODELS[1], MODELS[5]])
    assert str(caught.value) == (
        f"recipe.file={PATH}: 2 of its 3 models are not in /models: 01 (_x01-größe 01.safetensors), 03 (_x03-größe "
        "03.safetensors); add them, or set models.dir"
    )
    assert caught.value.exit_code == 2


HASHED = [replace(one, identity=Identity(one.id * 32)) for one in MODELS]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"id": "01"}, None),
        (
            {"stat": MODELS[0].stat._replace(size=9_999, mtime_ns=7, inode=8)},
            f"its size is 9,999, not {MODELS[0].stat.size}",
        ),
        (
            {"header": replace(MODELS[0].header, digest="0123456789abcdef" * 4)},
            "its header is 0123456789abcdef01234...,",
        ),
        ({"identity": Identity("ab" * 32)}, "its sha256 is ababababababababababa..., not 010101010101010101010..."),
        ({"identity": Identity()}, None),
    ],
    ids=["the same", "size", "header", "hash", "not hashed now"],
)
def test_a_source_that_is_not_what_it_was_is_told_with_what_differs(now: dict[str, Any], told: str | None) -> None:
    replay = Replay(metadata(resolved(WANTED), HASHED), PATH, model_set())
    assert replay.hashed
    found = replay.differences([replace(HASHED[0], **now), *HASHED[1:3]])
    if told is None:
        assert found == []
    else:
        (sentence,) = found
        assert f"model 01 (_x01-größe 01.safetensors) is not the file that {PATH} was made of: {told}" in sentence
        (problem,) = changed(found)
        assert isinstance(problem, IncompatibleSources)
        assert str(problem).endswith("; find the file of then, or choose recipe.check=false to merge what is there now")


def test_a_recipe_whose_sources_were_not_hashed_knows_no_hashes() -> None:
    replay = Replay(metadata(CASES["uniform"]), PATH, model_set())
    assert not replay.hashed
    assert replay.differences(HASHED[:3]) == []


# what cannot be replayed


def refused(said: Mapping[str, str], **changes: Any) -> list[str]:
    with pytest.raises(MergeflowError) as caught:
        replayed(said, **changes)
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "has no recipe of mergeflow in its metadata"),
        ({"sd_merge_recipe": "{}"}, "in its metadata (it has one of a web UI: use recipe=webui)"),
        ({"mergeflow": "0.1.0"}, ": its recipe is not as mergeflow writes it (Extra data: line 1 column 4 (char 3))"),
        ({"mergeflow": "[]"}, ": its recipe is not as mergeflow writes it ([] is no table)"),
        ({"mergeflow": "{}"}, ": its recipe is not as mergeflow writes it (it has no 'sources')"),
        ({"mergeflow": "[" * 100_000}, ": its recipe is not as mergeflow writes it ("),
    ],
    ids=["none", "a web UI's", "a manifest's", "a list", "an empty one", "nested too deeply"],
)
def test_what_is_no_recipe_is_refused(said: dict[str, str], told: str) -> None:
    (problem,) = refused(said)
    assert problem.startswith(f"recipe.file={PATH}")
    assert told in problem


def test_another_architecture_is_refused_with_that_which_it_was() -> None:
    assert refused(metadata(CASES["uniform"]), architecture=OPEN) == [
        f"{PATH} was made with arch=toy, not any; give arch=toy"
    ]


def test_the_rest_is_a_component_of_trees_with_the_keys_of_the_web_ui_alone() -> None:
    for case, kept in (("web UI", True), ("pairs", False), ("uniform", False)):
        told = json.loads(metadata(CASES[case])["mergeflow"])
        told["components"]["rest"] = told["components"]["text"]
        if kept:
            assert replayed(said_of(told)).targets[0].parts[-1].component == "rest"
        else:
            assert "made.safetensors has rest, which arch 'toy' does not have" in refused(said_of(told))[0]


def test_components_that_the_architecture_no_longer_has_are_refused() -> None:
    less = replace(ARCH, components={name: ARCH.components[name] for name in ("text", "vae")})
    assert refused(metadata(CASES["uniform"]), architecture=less) == [
        f"{PATH} has image, which arch 'toy' does not have; choose the arch= that it was made with"
    ]


@pytest.mark.parametrize(
    "targets",
    [(), (REPLAYED, replace(REPLAYED, name="b")), (WANTED,)],
    ids=["none", "two", "one that is not recorded"],
)
def test_a_recipe_makes_one_output(targets: tuple[TargetRequest, ...]) -> None:
    assert refused(metadata(CASES["uniform"]), targets=targets) == [
        "recipe=file makes one output; give target=recorded and no other"
    ]


@pytest.mark.parametrize("name", ["../made.safetensors", "made.ckpt", "", "a\0.safetensors", "\ud800.safetensors"])
def test_an_output_is_not_called_what_no_output_may_be_called(name: str) -> None:
    told = json.loads(metadata(CASES["uniform"])["mergeflow"])
    (problem,) = refused(said_of(told | {"file": name}))
    assert "the output cannot be called" in problem
    assert problem.endswith("; give recipe.name=NAME.safetensors")
    assert problem.isprintable()


RICH = json.loads(metadata(CASES["options"], HASHED)["mergeflow"])
MEAN = json.loads(metadata(CASES["composites"])["mergeflow"])


def put(told: Any, way: str, value: object) -> Any:
    """`told` with another value where `way` leads."""
    told = deepcopy(told)
    place = told
    *above, last = way.split("/")
    for step in above:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return told


TOP = "trees/other-3"
HOSTILE = {
    "an input that comes later": put(RICH, f"{TOP}/nodes/0/1", [0, 7]),
    "an input before the first": put(RICH, f"{TOP}/nodes/0/1", [0, -1]),
    "an input that is no whole number": put(RICH, f"{TOP}/nodes/0/1", [0.0, 1.0]),
    "an input that is true": put(RICH, f"{TOP}/nodes/0/1", [True, False]),
    "too many inputs": put(RICH, f"{TOP}/nodes/0/1", [0, 1, 2]),
    "inputs that are text": put(RICH, f"{TOP}/nodes/0/1", "01"),
    "a node of five": put(RICH, f"{TOP}/nodes/0", ["n", [0, 1], 0.5, "weighted_sum", True]),
    "a multiplier that is none": put(RICH, f"{TOP}/nodes/0/2", "0.5"),
    "a multiplier without end": put(RICH, f"{TOP}/nodes/0/2", float("inf")),
    "a multiplier beyond all numbers": put(RICH, f"{TOP}/nodes/0/2", 10**400),
    "a formula that is none": put(RICH, f"{TOP}/nodes/0/3", ["weighted_sum"]),
    "half that is text": put(RICH, f"{TOP}/nodes/0/4", "false"),
    "a VAE that is no source": put(RICH, f"{TOP}/nodes/0/5", "99"),
    "a leaf that is no source": put(RICH, f"{TOP}/leaves/0", "99"),
    "a leaf twice": put(RICH, f"{TOP}/leaves", ["04", "04", "01", "03"]),
    "no leaves": put(RICH, TOP, {"leaves": [], "nodes": []}),
    "a tree of others": put(RICH, "components/image/tree", "other-3"),
    "a tree that is not there": put(RICH, "components/image/tree", "x"),
    "an arithmetic that is none": put(RICH, "components/image/arithmetic", "magic"),
    "a method that is none": put(RICH, "components/image/method", "agree"),
    "a list of others": put(MEAN, "components/text/list", ["04", "6b", "6a"]),
    "a list of strangers": put(MEAN, "components/text/list", ["04", "\x1b[2J"]),
    "a list that is text": put(MEAN, "components/text/list", "04"),
    "shares that are too much": put(MEAN, "components/text/shares/04", "1/2"),
    "shares that are less than nothing": put(
        MEAN, "components/text", {"method": "uniform", "list": ["04", "03"], "shares": {"04": "3/2", "03": "-1/2"}}
    ),
    "a copy of two": put(MEAN, "components/text/method", "copy"),
    "a share without end": put(MEAN, "components/text/shares/04", "1e999999999"),
    "a share of nothing": put(MEAN, "components/text/shares/04", "1/0"),
    "a composite of itself": put(MEAN, "composites/6a", ["6a"]),
    "a composite of nothing": put(MEAN, "composites/6a", []),
    "composites without end": put(MEAN, "composites", {str(n): [str(n + 1)] for n in range(100, 2000)}),
    "a size that is none": put(MEAN, "sources/04/size", float("nan")),
    "a size without end": put(MEAN, "sources/04/size", float("inf")),
    "a policy that is none": put(MEAN, "keys/missing", "guess"),
    "keys from nowhere": put(MEAN, "keys/from", "99"),
    "a base that is a list": put(MEAN, "keys/base", ["04"]),
    "a dtype that is none": put(MEAN, "dtype", "fp8"),
    "nothing to make": put(MEAN, "components", {}),
}


@pytest.mark.parametrize("told", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_recipe_that_mergeflow_cannot_have_written_is_refused_in_one_sentence(told: object) -> None:
    (problem,) = refused(said_of(told))
    assert problem.isprintable()
    assert len(problem) < 250


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["01", "6a", "1/2"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=3), below, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A recipe of ours in which something was replaced, or left out."""
    told = deepcopy(draw(st.sampled_from([RICH, MEAN])))
    for _ in range(draw(st.integers(1, 3))):
        place = told
        while True:
            steps = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not steps:
                break
            step = draw(st.sampled_from(steps))
            if isinstance(place[step], dict | list) and draw(st.booleans()):
                place = place[step]
                continue
            if draw(st.booleans()):
                place[step] = draw(JSON)
            else:
                del place[step]
            break
    return told


@given(mutated() | JSON)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_file_says_is_planned_or_refused(told: Any) -> None:
    by_id = {one.id: one for one in MODELS}
    try:
        recipe = replayed(said_of(told))
        make_plan(recipe, [by_id[id] for id in recipe.checkpoints()], Safetensors(), "/out")
        Replay(said_of(told), PATH, model_set()).differences([by_id[id] for id in recipe.checkpoints()])
    except MergeflowError as error:
        said = str(error)
    else:
        said = "planned"
    assert said


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_whatever_text_stands_for_a_recipe_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="its recipe is not as mergeflow writes it"):
        Replay({"mergeflow": text}, PATH, model_set())


def test_the_checkpoints_of_these_tests_are_whole() -> None:
    assert all(one.header.tensors.keys() == SHAPES.keys() for one in MODELS)
