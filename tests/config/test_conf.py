"""Every file of `conf/` composes, converts, and says what the schema knows."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import yaml

from mergeflow.config import schema
from mergeflow.config.convert import HONOURED, known_names, to_config, to_request
from mergeflow.methods.pairwise import Pairwise
from mergeflow.methods.registry import PLAIN
from mergeflow.recipe import request as words
from mergeflow.recipe.request import Policies, TargetRequest
from mergeflow.recipe.resolve import resolve
from mergeflow.recipe.shapes import Bake, TreeOptions
from mergeflow.recipe.tree import Arithmetic, Rules, Scalars
from mergeflow.tensors import OUTPUT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.config.conftest import Compose

CONF = Path(__file__).parent.parent.parent / "conf"
OPTIONS = [file.relative_to(CONF) for file in sorted(CONF.rglob("*.yaml")) if file.parent != CONF]
GROUPS = (
    *("models", "arch", "selection", "target", "series", "method", "executor"),
    *("objective", "keys", "recipe", "experiment"),
)
PATHS = {
    "models/folder": ["models.dir=/data"],
    "models/round1": ["models.dir=/data"],
    "models/files": ["models.files={a: /one, b-2: /two}"],
    "experiment/round1": ["models.dir=/data"],
    "keys/webui": ["method=pairwise"],
    "objective/command": ["objective.command='./score {file}'"],
    "objective/python": ["objective.target=package.module.function"],
    "series/swap": ["series.components=[te0]"],
    "series/leave_one_out": ["series.components=te0"],
    "series/add_one": ["series.components=te0"],
    "recipe/file": ["recipe.file=/data/a.safetensors"],
    "recipe/webui": ["recipe.file=/data/a.json"],
}
"""What only a user can say."""


def loaded(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def values(node: object) -> Iterator[object]:
    """Everything that an object is made of, itself included."""
    yield node
    if is_dataclass(node):
        for field in fields(node):
            yield from values(getattr(node, field.name))
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from values(key)
            yield from values(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from values(value)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes_and_becomes_plain_values(option: Path, compose: Compose) -> None:
    name = str(option.with_suffix(""))
    request = to_request(to_config(compose(f"{option.parent}={option.stem}", *PATHS.get(name, []))))
    kinds = {type(value) for value in values(request)}
    foreign = {kind for kind in kinds if not kind.__module__.startswith(("builtins", "mergeflow.recipe"))}
    assert not foreign
    assert pickle.loads(pickle.dumps(request)) == request


@pytest.mark.parametrize("option", [one for one in OPTIONS if one.parent.parent.name != "hydra"], ids=str)
def test_every_option_begins_by_saying_what_it_is(option: Path) -> None:
    first, second = (CONF / option).read_text("utf-8").splitlines()[:2]
    assert (second if first == "# @package _global_" else first).startswith("# ")


def test_every_group_has_options_and_every_option_is_of_a_group() -> None:
    assert {str(option.parent) for option in OPTIONS if option.parts[0] != "hydra"} == set(GROUPS)


def test_the_defaults_name_every_group_and_the_rest_is_said_in_the_config_itself() -> None:
    config = loaded("config")
    chosen = {
        name.removeprefix("override ")
        for entry in config["defaults"]
        if isinstance(entry, dict)
        for name in entry
        if not name.startswith("override ")
    }
    said = config.keys() - {"defaults", "hydra"}
    assert chosen == set(GROUPS)
    assert said.isdisjoint(chosen)
    assert said | chosen == {field.name for field in fields(schema.Config)}


def test_the_config_says_every_option_of_its_own_with_the_value_that_the_schema_has() -> None:
    config = loaded("config")
    assert loaded("keys/strict") == {name: choice.value for name, choice in vars(schema.Keys()).items()}
    assert config["nonfinite"] == schema.Config().nonfinite.value
    assert config["job"] == schema.Config().job.value
    for name in ("overwrite", "hashes", "position_ids", "a", "b", "base", "file"):
        assert config[name] is vars(schema.Config())[name]
    assert config["parts"] == schema.Config().parts


def test_every_way_to_choose_keys_says_every_option_of_them() -> None:
    assert loaded("keys/webui")["keys"].keys() == {field.name for field in fields(schema.Keys)}


def test_the_method_says_every_option_of_a_tree_with_the_value_that_the_schema_has() -> None:
    usual = {
        name: getattr(value, "value", value) for name, value in vars(schema.Method(schema.MethodName.pairwise)).items()
    }
    assert loaded("method/pairwise") == usual


@pytest.mark.parametrize("name", ["x39a", "webui", "file"])
def test_a_recipe_says_every_option_that_it_honours(name: str) -> None:
    said = loaded(f"recipe/{name}")["recipe"]
    assert said.keys() == HONOURED[schema.RecipeKind(said["kind"])]


@pytest.mark.parametrize("name", ["swap", "leave_one_out", "add_one"])
def test_a_series_says_every_option_that_it_honours_with_the_value_that_the_schema_has(name: str) -> None:
    said = loaded(f"series/{name}")
    usual = vars(schema.Series()) | {"kind": schema.SeriesKind(name)}
    assert said == {option: getattr(usual[option], "value", usual[option]) for option in said}
    assert usual.keys() - said.keys() == (set() if name == "swap" else {"base"})


OF_CLUSTERS = {"resources", "placement"}


@pytest.mark.parametrize(
    ("name", "others"), [("local", {"address", "patience"} | OF_CLUSTERS), ("ray", OF_CLUSTERS), ("cluster", set())]
)
def test_an_executor_says_every_option_that_it_honours(name: str, others: set[str]) -> None:
    said = loaded(f"executor/{name}").keys()
    assert said == {field.name for field in fields(schema.Executor)} - others


def test_local_and_ray_have_the_same_number_of_reads_in_flight() -> None:
    same = ("workers", "reads_in_flight", "block", "io", "memory")
    local, ray = loaded("executor/local"), loaded("executor/ray")
    assert [local[name] for name in same] == [ray[name] for name in same]


def test_the_defaults_are_the_demo(compose: Compose) -> None:
    config = to_config(compose())
    request = to_request(config)
    assert config.models.demo
    assert request.models.dir == str(Path("demo").absolute())
    assert request.models.composites == {"09a": ("17", "18"), "10a": ("19", "20"), "11a": ("21", "22")}
    assert [target.file for target in request.targets] == [
        "x17-AstolfoMix-x13te0x14te1.safetensors",
        "x11c-AstolfoMix-x13te0x14te1.safetensors",
    ]
    assert (request.method, request.dtype, request.overwrite) == ("uniform", "fp16", False)
    assert (request.tree, request.rules, request.recorded) == (TreeOptions(), Rules(), None)
    assert (request.policies, request.hashes) == (Policies(), False)
    assert len(request.architecture.usual_keys) == 2515


def test_the_experiment_is_the_demo_with_models_of_ones_own(compose: Compose) -> None:
    demo = to_request(to_config(compose("models.dir=/data")))
    experiment = to_request(to_config(compose("experiment=round1", "models.dir=/data")))
    assert experiment == demo
    assert not to_config(compose("experiment=round1", "models.dir=/data")).models.demo


@pytest.mark.parametrize(("arch", "dtype"), [("sdxl", "fp16"), ("any", "keep")])
def test_outputs_have_the_dtype_of_the_architecture_unless_it_is_said(arch: str, dtype: str, compose: Compose) -> None:
    assert to_request(to_config(compose(f"arch={arch}"))).dtype == dtype
    assert to_request(to_config(compose(f"arch={arch}", "dtype=bf16"))).dtype == "bf16"


def test_a_folder_of_any_models_is_merged_whole(compose: Compose) -> None:
    words = ["models=folder", "models.dir=/data", "arch=any", "selection=all", "target=single"]
    request = to_request(to_config(compose(*words)))
    assert request.targets == (TargetRequest("single", "merged.safetensors", selection="models"),)
    (target,) = resolve(request, ["/data/b.safetensors", "/data/a.safetensors", "/data/notes.txt"]).targets
    assert target.parts[0].entries == ("a", "b")


def test_models_that_are_named_one_by_one_need_no_directory(compose: Compose) -> None:
    request = to_request(to_config(compose("models=files", "models.files={a: /one}", "models.files.b=two")))
    assert request.models.dir == ""
    assert request.models.files == {"a": "/one", "b": str(Path("two").absolute())}


def test_a_composite_can_be_given_on_the_command_line(compose: Compose) -> None:
    request = to_request(to_config(compose("models.composites={12a: ['23', '24']}")))
    assert request.models.composites["12a"] == ("23", "24")
    assert "11a" in request.models.composites


# the schema


def test_the_choices_are_those_that_the_rest_of_the_program_knows() -> None:
    assert [choice.value for choice in schema.OutputDtype] == list(OUTPUT_DTYPES)
    assert {choice.value for choice in schema.MethodName} <= {*PLAIN, Pairwise.name}


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (schema.Arithmetic, get_args(Arithmetic)),
        (schema.Scalars, get_args(Scalars)),
        (schema.Bake, get_args(Bake)),
        (schema.KeyRule, get_args(words.Keys)),
        (schema.PositionIds, get_args(words.PositionIds)),
        (schema.MethodName, (words.UNIFORM, words.PAIRWISE)),
        (schema.SeriesKind, ("none", *get_args(words.SeriesKind))),
        (schema.SeriesWrite, get_args(words.SeriesWrite)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_choices_of_trees_are_those_that_the_recipe_knows(choices: type[Enum], known: tuple[str, ...]) -> None:
    assert tuple(choice.value for choice in choices) == known


CHOICES = [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, Enum)]


@pytest.mark.parametrize("kind", [kind for kind in CHOICES if kind is not Enum], ids=lambda kind: kind.__name__)
def test_a_choice_is_typed_as_it_is_named(kind: type[Enum]) -> None:
    # Hydra reads the name, the rest of the program the value.
    assert {choice.name: choice.value for choice in kind} == {choice.name: choice.name for choice in kind}


def test_every_option_is_known_by_its_dotted_name() -> None:
    names = known_names()
    assert {"models.dir", "executor.workers", "keys.missing", "job", "arch", "arch.components"} <= set(names)
