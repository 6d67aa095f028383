"""Options of trees and of recorded trees: what is typed is what is asked for, and what would be ignored is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.config.convert import to_config, to_pair, to_request
from mergeflow.config.words import quote_texts
from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.recipe.recorded import Merge
from mergeflow.recipe.request import Policies, RecordedFile
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from tests.config.test_words import written

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.recipe.request import Request
    from tests.config.conftest import Compose


def typed_as(compose: Compose, *typed: str, own: Path | None = None) -> Request:
    """The request for what somebody has typed into a shell."""
    return to_request(to_config(compose(*quote_texts(typed), own=own)))


def refused(compose: Compose, *typed: str) -> list[str]:
    composed = to_config(compose(*quote_texts(typed)))
    with pytest.raises(MergeflowError) as caught:
        to_request(composed)
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


# methods


TREES: dict[str, tuple[list[str], TreeOptions, Rules]] = {
    "as it is": ([], TreeOptions(), Rules()),
    "a chain": (["method.shape=chain"], TreeOptions("chain"), Rules()),
    "a nested list": (["method.shape=[[05,11a],7]"], TreeOptions([["05", "11a"], 7]), Rules()),
    "shapes by list": (
        ["method.shape={te0: chain, unet: [1,[02,03]]}"],
        TreeOptions({"te0": "chain", "unet": [1, ["02", "03"]]}),
        Rules(),
    ),
    "a multiplier": (["method.multipliers.te0-13=0.4286"], TreeOptions(multipliers={"te0-13": 0.4286}), Rules()),
    "a multiplier of a level": (
        ["method.multipliers={level1: 0.5}"],
        TreeOptions(multipliers={"level1": 0.5}),
        Rules(),
    ),
    "a multiplier of a composite": (["method.multipliers.11a=0.3"], TreeOptions(multipliers={"11a": 0.3}), Rules()),
    "multipliers": (
        ["method.multipliers.11a=1", "method.multipliers.level2=1e-3", "method.multipliers={te0-1: 2}"],
        TreeOptions(multipliers={"11a": 1.0, "level2": 1e-3, "te0-1": 2.0}),
        Rules(),
    ),
    "the rest": (
        ["method.save_half=false", "method.bake=top", "method.vae=025", "method.arithmetic=comfyui"],
        TreeOptions(save_half=False, bake="top", vae="025"),
        Rules("comfyui"),
    ),
    "torch 2.0": (["method=pairwise_torch20"], TreeOptions(), Rules("webui", "half")),
}


@pytest.mark.parametrize(("typed", "tree", "rules"), TREES.values(), ids=TREES.keys())
def test_a_tree_is_what_was_typed(typed: list[str], tree: TreeOptions, rules: Rules, compose: Compose) -> None:
    request = typed_as(compose, "method=pairwise", *typed)
    assert (request.method, request.tree, request.rules) == ("pairwise", tree, rules)
    assert all(isinstance(value, float) for value in request.tree.multipliers.values())


@pytest.mark.parametrize("number", ["0.50", "1e-3", "0.20", "1.0e-3", "1"])
def test_a_multiplier_is_the_same_wherever_it_is_written(number: str, compose: Compose, tmp_path: Path) -> None:
    files = {"method/own": f"defaults: [pairwise, _self_]\nmultipliers:\n  level1: {number}\n"}
    files["recipe/own"] = f"kind: nodes\nnodes:\n  x: [01, 02, {number}]\n  y: {{a: x, b: 03, multiplier: {number}}}\n"
    own = written(tmp_path, files)
    request = typed_as(compose, "method=own", "recipe=own", own=own)
    assert request.tree.multipliers == {"level1": float(number)}
    assert isinstance(request.recorded, dict)
    assert [merge.multiplier for merge in request.recorded.values()] == [float(number)] * 2
    typed = typed_as(compose, "method=pairwise", f"method.multipliers.level1={number}")
    assert typed.tree.multipliers == {"level1": float(number)}


@pytest.mark.parametrize(
    "option",
    ["shape=chain", "arithmetic=float32", "scalars=half", "save_half=false", "bake=every", "vae=25", "multipliers.a=1"],
)
def test_what_makes_trees_is_refused_where_none_is_made(option: str, compose: Compose) -> None:
    name = option.partition("=")[0].partition(".")[0]
    assert refused(compose, f"++method.{option}") == [
        f"method.{name} has no effect with method=uniform; it is for pairwise"
    ]


# keys


def test_the_keys_of_the_web_ui_leave_every_dtype_as_it_is_unless_another_is_typed(compose: Compose) -> None:
    request = typed_as(compose, "method=pairwise", "keys=webui")
    assert (request.policies.keys, request.dtype) == ("webui", "keep")
    for typed in (["keys=webui", "dtype=fp16"], ["dtype=fp16", "keys=webui"]):
        assert typed_as(compose, "method=pairwise", *typed).dtype == "fp16"
    assert typed_as(compose, "method=pairwise").dtype == "fp16"


def test_an_experiment_may_have_the_last_word_on_the_dtype(compose: Compose, tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /method: pairwise\n  - override /keys: webui\ndtype: bf16\n"
    request = typed_as(compose, "experiment=own", own=written(tmp_path, {"experiment/own": text}))
    assert (request.policies.keys, request.method, request.dtype) == ("webui", "pairwise", "bf16")


@pytest.mark.parametrize(
    ("typed", "policies"),
    [
        (["keys=webui"], Policies(keys="webui")),
        (
            ["keys=webui", "keys.surplus=error", "keys.integers=first"],
            Policies("error", "error", "first", keys="webui"),
        ),
        (["position_ids=fix"], Policies(position_ids="fix")),
        (["position_ids=webui", "keys=webui"], Policies(keys="webui", position_ids="webui")),
        (["keys=webui", "keys.rule=strict"], Policies()),
    ],
    ids=["webui", "with others", "fixed", "merged", "rule"],
)
def test_policies_of_keys_are_what_was_typed(typed: list[str], policies: Policies, compose: Compose) -> None:
    assert typed_as(compose, "method=pairwise", *typed).policies == policies


# recorded trees


def test_x39a_is_a_tree_of_the_web_ui_in_torch_2_0(compose: Compose) -> None:
    request = typed_as(compose, "recipe=x39a")
    (target,) = request.targets
    assert (target.name, target.file, target.recorded, target.selection) == ("recorded", "x39a.safetensors", True, None)
    assert (request.method, request.rules, request.dtype) == ("pairwise", Rules("webui", "half"), "keep")
    assert request.policies == Policies(keys="webui")
    assert isinstance(request.recorded, dict)
    assert len(request.recorded) == 39
    assert request.recorded["x02a"] == Merge(("03", "41"), bake="25")
    assert request.recorded["x39a"] == Merge(("x38a", "x35a"), 0.2)


def test_what_is_typed_wins_over_what_a_recipe_chooses(compose: Compose) -> None:
    typed = ["recipe=x39a", "method=pairwise", "keys=strict", "recipe.name=my x39a.safetensors", "recipe.vae=null"]
    request = typed_as(compose, *typed, "recipe.nodes.x39a.multiplier=0.25", "recipe.nodes.x01a=[02,1]")
    assert (request.rules, request.policies, request.dtype) == (Rules(), Policies(), "fp16")
    assert request.targets[0].file == "my x39a.safetensors"
    assert isinstance(request.recorded, dict)
    assert (request.recorded["x01a"], request.recorded["x39a"].multiplier) == (Merge(("02", "1")), 0.25)


@pytest.mark.parametrize(
    ("typed", "file"),
    [
        (["recipe=file", "recipe.file=~/a (1).safetensors"], RecordedFile("{home}/a (1).safetensors", "mergeflow")),
        (
            ["recipe=file", "recipe.file=a,b.json", "recipe.check=false"],
            RecordedFile("{cwd}/a,b.json", "mergeflow", False),
        ),
        (["recipe=webui", "recipe.file=/x"], RecordedFile("/x", "webui")),
        (["recipe=webui", "recipe.file=/x", "recipe.vae=25"], RecordedFile("/x", "webui", vaes={"*": "25"})),
        (
            [
                "recipe=webui",
                "recipe.file=/x",
                "recipe.vaes.sdxl_vae (fixed).safetensors=025",
                "recipe.vaes.other.pt=1",
                "recipe.given.x39a.b=35",
                "recipe.given.x38a.a=x 1",
            ],
            RecordedFile(
                "/x",
                "webui",
                vaes={"sdxl_vae (fixed).safetensors": "025", "other.pt": "1"},
                given={"x39a.b": "35", "x38a.a": "x 1"},
            ),
        ),
    ],
    ids=["a file", "its metadata", "a web UI's", "any VAE", "VAEs and models by name"],
)
def test_a_recorded_file_is_what_was_typed(
    typed: list[str], file: RecordedFile, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = typed_as(compose, *typed).recorded
    assert isinstance(found, RecordedFile)
    path = file.path.format(home=tmp_path / "home", cwd=tmp_path)
    assert vars(found) == vars(file) | {"path": path}


def test_a_replayed_file_is_called_as_it_was_unless_it_is_named(compose: Compose) -> None:
    assert typed_as(compose, "recipe=file", "recipe.file=/x").targets[0].file == ""
    for name in ("recipe.name", "target.recorded.file"):
        request = typed_as(compose, "recipe=file", "recipe.file=/x", f"{name}=a b.safetensors")
        assert request.targets[0].file == "a b.safetensors"


@pytest.mark.parametrize("recipe", ["file", "webui"])
def test_a_recorded_file_must_be_named(recipe: str, compose: Compose) -> None:
    told = "recipe.file is not set; give recipe.file=PATH, a merged file or its metadata as .json"
    assert refused(compose, f"recipe={recipe}") == [told]
    assert refused(compose, f"recipe={recipe}", "recipe.file=") == [told]


WITHOUT_EFFECT = {
    "recipe.name=a": ["recipe.name has no effect without a recorded tree; give recipe=x39a, webui or file"],
    "recipe.vae=25": ["recipe.vae has no effect without a recorded tree; give recipe=x39a, webui or file"],
    "recipe.file=a": ["recipe.file has no effect without a recorded tree; give recipe=x39a, webui or file"],
    "recipe=x39a recipe.file=a": ["recipe.file has no effect where recipe.kind is nodes"],
    "recipe=x39a recipe.check=false": ["recipe.check has no effect where recipe.kind is nodes"],
    "recipe=file recipe.file=a recipe.vae=25": ["recipe.vae has no effect where recipe.kind is file"],
    "recipe=file recipe.file=a recipe.given.x.a=25": ["recipe.given has no effect where recipe.kind is file"],
    "recipe=webui recipe.file=a recipe.nodes.x=[1,2]": ["recipe.nodes has no effect where recipe.kind is webui"],
    "a=x": ["a= and b= are for job=compare, and have no effect on another job"],
    "b=x job=plan": ["a= and b= are for job=compare, and have no effect on another job"],
}


@pytest.mark.parametrize(("typed", "told"), WITHOUT_EFFECT.items(), ids=WITHOUT_EFFECT.keys())
def test_what_would_have_no_effect_is_refused(typed: str, told: list[str], compose: Compose) -> None:
    assert refused(compose, *typed.split()) == told


def test_a_recipe_of_ones_own_says_what_its_output_is_called(compose: Compose, tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "recipe/own": "# @package _global_\ndefaults:\n  - override /target: recorded\n  - override /method: pairwise\n"
        "recipe:\n  kind: nodes\n  nodes:\n    x: [01, '02']\n"
    }
    own = written(tmp_path, files)
    with pytest.raises(ConfigError) as caught:
        typed_as(compose, "recipe=own", own=own)
    assert str(caught.value) == "recipe.name is not set; give recipe.name=NAME.safetensors, which the output is called"
    for name in ("recipe.name", "target.recorded.file"):
        request = typed_as(compose, "recipe=own", f"{name}=x.safetensors", own=own)
        assert (request.targets[0].file, request.recorded) == ("x.safetensors", {"x": Merge(("1", "02"))})


def test_all_that_is_wrong_with_a_tree_is_said_at_once(compose: Compose) -> None:
    typed = ["recipe=x39a", "recipe.nodes.x01a=[01]", "recipe.nodes.x39a.multiplier=x", "recipe.check=false", "a=x"]
    problems = refused(compose, *typed, "method=uniform", "method.vae=25", "recipe.name=")
    words = ("nodes.x01a", "nodes.x39a", "recipe.check", "a= and b=", "method.vae", "recipe.name")
    assert len(problems) == len(words)
    assert all(any(word in problem for problem in problems) for word in words)


# two files to compare


def test_two_files_are_compared_from_any_working_directory(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = to_config(compose(*quote_texts(["job=compare", "a=one (1).safetensors", "b=/other,2.safetensors"])))
    assert to_pair(config) == (f"{tmp_path}/one (1).safetensors", "/other,2.safetensors")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], "job=compare needs two files: give a=FILE b=FILE"),
        (["a=x"], "job=compare needs two files: give a=FILE b=FILE"),
        (["b=x"], "job=compare needs two files: give a=FILE b=FILE"),
        (["a=x", "b=x", "out="], "out is empty; give out=DIR"),
    ],
)
def test_a_comparison_of_less_than_two_files_is_refused(typed: list[str], told: str, compose: Compose) -> None:
    with pytest.raises(ConfigError) as caught:
        to_pair(to_config(compose("job=compare", *quote_texts(typed))))
    assert str(caught.value) == told
