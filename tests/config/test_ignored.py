"""What is typed beside a choice that does not honour it is refused, and nothing else is."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import pytest

from mergeflow.config import schema
from mergeflow.config.convert import to_config
from mergeflow.config.ignored import ASSEMBLY, COMPARISON, OF_VERIFICATION, REPLAY, VERIFICATION, Choice, ignored

if TYPE_CHECKING:
    from tests.config.conftest import Compose

COMPARE = schema.Config(job=schema.Job.compare)
ASSEMBLE = schema.Config(job=schema.Job.assemble)
VERIFY = schema.Config(job=schema.Job.verify)
AGAIN = schema.Config(recipe=schema.Recipe(kind=schema.RecipeKind.file))


def refused(config: schema.Config, *typed: str) -> list[str]:
    return [str(error) for error in ignored(config, typed, {})]


@pytest.mark.parametrize(
    "typed",
    [
        "dtype=fp16",
        "keys=strict",
        "keys.missing=skip",
        "++keys.missing=skip",
        "method=uniform",
        "method.multipliers.te0-13=0.3",
        "++method.multipliers={11a: 0.3}",
        "models.composites={}",
        "++models.composites.11a=[1,2]",
        "nonfinite=skip",
        "position_ids=fix",
        "selection=all",
        "~selection.te0",
        "+selection.mine=all",
        "target.recorded.dtype=fp16",
        "target.recorded.keys_from=05",
    ],
)
def test_what_a_replay_would_ignore_is_refused(typed: str) -> None:
    name = typed.lstrip("+~").partition("=")[0]
    assert refused(AGAIN, typed) == [f"{name} has no effect with recipe=file, whose recipe tells it; leave it out"]


def test_an_experiment_beside_a_replay_is_refused() -> None:
    assert refused(AGAIN, "experiment=round1") == [
        "experiment has no effect with recipe=file, whose recipe tells it; leave it out, and give models= and arch="
    ]


@pytest.mark.parametrize(
    "typed",
    [
        "recipe=file",
        "recipe.file=/x",
        "recipe.check=false",
        "recipe.name=a.safetensors",
        "target=recorded",
        "target.recorded.file=a.safetensors",
        "models=folder",
        "models.dir=/x",
        "arch=any",
        "out=/x",
        "overwrite=true",
        "hashes=true",
        "executor.workers=2",
        "job=plan",
    ],
)
def test_what_a_replay_honours_may_be_typed(typed: str) -> None:
    assert refused(AGAIN, typed) == []


@pytest.mark.parametrize(
    "typed",
    ["target=x17", "dtype=fp16", "executor=local", "++keys.missing=skip", "overwrite=true", "objective=command"],
)
def test_what_a_comparison_would_ignore_is_refused(typed: str) -> None:
    name = typed.lstrip("+~").partition("=")[0]
    why = "which reads two files as they are"
    assert refused(COMPARE, "job=compare", typed, "a=x", "arch=any", "b=y", "out=z") == [
        f"{name} has no effect on job=compare, {why}; leave it out"
    ]


def test_what_an_assembly_would_ignore_is_refused() -> None:
    typed = ["job=assemble", "base=a", "++parts={te0: b}", "out=c", "arch=sdxl", "dtype=fp16", "+selection.a=all"]
    why = "which copies tensors as they are"
    assert refused(ASSEMBLE, *typed) == [
        f"{name} has no effect on job=assemble, {why}; leave it out" for name in ("dtype", "selection.a")
    ]


def test_a_merge_ignores_nothing_that_is_typed() -> None:
    typed = (field.name for field in fields(schema.Config) if field.name not in OF_VERIFICATION)
    assert refused(schema.Config(), *(f"{name}=x" for name in typed)) == []


def test_a_sample_is_of_a_verification_alone() -> None:
    assert refused(schema.Config(), "sample=5", "seed=1") == [
        f"{name}= is for job=verify, and has no effect on another job; leave it out" for name in OF_VERIFICATION
    ]


def test_what_a_verification_honours_may_be_typed() -> None:
    typed = ["job=verify", "file=x", "models=folder", "models.dir=/x", "arch=any", "sample=all", "seed=2", "out=/x"]
    assert refused(VERIFY, *typed) == []


@pytest.mark.parametrize("name", ["dtype", "executor", "method", "overwrite", "recipe.file", "models.composites"])
def test_what_a_verification_would_ignore_is_refused(name: str) -> None:
    assert refused(VERIFY, "job=verify", f"{name}=x") == [
        f"{name} has no effect on job=verify, which is told everything by the file; leave it out"
    ]


@pytest.mark.parametrize(
    "choice",
    [ASSEMBLY, COMPARISON, REPLAY, VERIFICATION],
    ids=["assembly", "comparison", "replay", "verification"],
)
def test_what_has_no_effect_are_options_that_exist(choice: Choice) -> None:
    known = {field.name for field in fields(schema.Config)}
    assert {name.partition(".")[0] for name in (*choice.ignored, *choice.honoured)} <= known


# a recorded tree beside an experiment


def told(compose: Compose, *typed: str) -> list[str]:
    return [str(error) for error in ignored(to_config(compose(*typed)), typed, CHOSEN)]


CHOSEN = {"experiment": "round1", "recipe": "x39a"}


def test_an_experiment_that_chooses_other_targets_than_a_recipe_is_one_mistake(compose: Compose) -> None:
    assert told(compose, "experiment=round1", "models.dir=/x", "recipe=x39a") == [
        "recipe=x39a has no effect with experiment=round1, which chooses the targets; leave one of the two out"
    ]


@pytest.mark.parametrize("target", ["recorded", "x17"])
def test_targets_that_are_typed_are_not_those_of_the_experiment(target: str, compose: Compose) -> None:
    assert told(compose, "experiment=round1", "models.dir=/x", "recipe=x39a", f"target={target}") == []
