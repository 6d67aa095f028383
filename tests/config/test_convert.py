from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeflow.config import schema
from mergeflow.config.convert import to_config, to_objective, to_request, to_source
from mergeflow.config.paths import absolute
from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.objective import Objective
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.request import PartRequest, Policies, TargetRequest
from mergeflow.recipe.selection import parse_selection

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.recipe.request import Request
    from tests.config.conftest import Compose


def refused(compose: Compose, *typed: str) -> list[str]:
    """What conversion says against a config that composes."""
    composed = compose(*typed)
    with pytest.raises(MergeflowError) as caught:
        to_request(to_config(composed))
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


def converted(compose: Compose, *typed: str, own: Path | None = None) -> Request:
    return to_request(to_config(compose(*typed, own=own)))


# paths


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("/data/sdxl", "/data/sdxl"),
        ("models", "{cwd}/models"),
        ("../models/./x", "{parent}/models/x"),
        ("~/models", "{home}/models"),
        ("~nobody-of-this-name/x", "{cwd}/~nobody-of-this-name/x"),
        ("a b/ü+@[1]", "{cwd}/a b/ü+@[1]"),
    ],
)
def test_a_path_is_made_absolute_without_following_links(
    typed: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, cwd = tmp_path / "home", tmp_path / "here" / "cwd"
    cwd.mkdir(parents=True)
    (cwd / "models").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(cwd)
    assert absolute(typed) == meant.format(cwd=cwd, parent=cwd.parent, home=home)


def test_models_are_where_they_are_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = to_source(schema.Models("sdxl", "{id}.x", {"a": "one", "b": "/two"}, {"c": ["a", "b"]}))
    assert source.dir == f"{tmp_path}/sdxl"
    assert source.files == {"a": f"{tmp_path}/one", "b": "/two"}
    assert source.composites == {"c": ("a", "b")}
    assert source.pattern == "{id}.x"


# from what is typed to what is asked


def test_a_target_is_what_was_typed(compose: Compose) -> None:
    typed = ["target=single", "target.single.file=a.safetensors", "target.single.dtype=fp32"]
    typed += ["target.single.keys_from=7", "target.single.base=08", "+target.single.components={vae: {model: 025}}"]
    assert converted(compose, *typed).targets == (
        TargetRequest("single", "a.safetensors", "fp32", "models", {"vae": PartRequest(model="025")}, "7", "08"),
    )


def test_policies_are_what_was_typed(compose: Compose) -> None:
    typed = ["keys.missing=skip", "keys.surplus=error", "keys.integers=first", "nonfinite=propagate"]
    assert converted(compose, *typed).policies == Policies("skip", "error", "first", "propagate")


def test_the_output_directory_is_absolute_and_may_be_overwritten(compose: Compose, tmp_path: Path) -> None:
    request = converted(compose, f"out={tmp_path}/x/../y", "overwrite=true")
    assert (request.out, request.overwrite) == (f"{tmp_path}/y", True)


IDS = ModelSet({id: id for id in ("05", "07", "08", "10", "11", "a")})


@pytest.mark.parametrize("typed", ["5", "05", "'5'", "'05'", "[5]", "[05]", "['05']", "'5=1'", "['05=1']"])
def test_an_id_is_the_same_however_it_is_typed(typed: str, compose: Compose) -> None:
    request = converted(compose, f"selection.te0={typed}")
    assert parse_selection("te0", request.selections["te0"], IDS) == ("05",)


@pytest.mark.parametrize("typed", ["[5,10,a]", "[05,010,a]", "['05','10','a']", "'5,10,a=3'", "'05, 10, a'"])
def test_a_list_is_the_same_however_it_is_typed(typed: str, compose: Compose) -> None:
    request = converted(compose, f"selection.te0={typed}")
    assert parse_selection("te0", request.selections["te0"], IDS) == ("05", "10", "a")


@pytest.mark.parametrize(
    "written",
    ["5", "05", '"05"', "[5]", "[05]", '["05"]', "\n  - 05", "5=1", "05,--", "|\n  05,\n  --\n  =1", ">\n  05,\n  --"],
    ids=repr,
)
def test_an_id_is_the_same_however_it_is_written_in_a_file(written: str, compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "selection").mkdir()
    (tmp_path / "selection" / "own.yaml").write_text(f"te0: {written}\n", "utf-8")
    request = converted(compose, "selection=own", own=tmp_path)
    assert parse_selection("te0", request.selections["te0"], IDS) == ("05",)


# who says how good an output is


def objective_of(compose: Compose, *typed: str) -> Objective | None:
    return to_objective(to_config(compose(*typed)))


def test_an_objective_is_a_program_a_function_or_nobody(compose: Compose) -> None:
    assert objective_of(compose) is None
    assert objective_of(compose, "objective=python", "objective.target=a.b") == Objective(target="a.b")
    command = "objective.command='./score {file}'"
    assert objective_of(compose, "objective=command", command) == Objective(command="./score {file}")


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (["objective.target=a.b"], "objective.command and objective.target need objective=command or objective=python"),
        (["objective=python", "objective.target=''"], "objective=python needs objective.target=..., and nothing else"),
        (
            ["objective=python", "objective.target=a.b", "objective.command=c"],
            "objective=python needs objective.target=..., and nothing else",
        ),
        (["objective=command"], "objective=command needs objective.command=..., and nothing else"),
    ],
)
def test_an_objective_that_is_not_clear_is_refused(typed: list[str], problem: str, compose: Compose) -> None:
    with pytest.raises(ConfigError) as caught:
        objective_of(compose, *typed)
    assert str(caught.value) == problem


# what is refused


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("+foo=1", "there is no option 'foo'; an added option would have no effect"),
        ("+keys.foo=1", "there is no option 'keys.foo'; an added option would have no effect"),
        (
            "+target.x17.components.te0.foo=1",
            "there is no option 'target.x17.components.te0.foo'; an added option would have no effect",
        ),
        ("models=folder", "models.dir is not set; give models.dir=..."),
        ("out=???", "out is not set; give out=..."),
        ("~method", "method.name is not set; give method.name=..."),
        ("models.dir=null", "there are no models: give models.dir=DIR, or models.files"),
        ("models.dir=", "there are no models: give models.dir=DIR, or models.files"),
        ("models=files", "there are no models: give models.dir=DIR, or models.files"),
        ("out=", "out is empty; give out=DIR"),
        ("executor.workers=0", "executor.workers=0 must be at least 1"),
        ("selection.te0=true", "selection.te0 is True; write a text such as '05,11', a list, or {id: true}"),
        ("selection.te0=1.5", "selection.te0 is 1.5; write a text such as '05,11', a list, or {id: true}"),
        ("selection.te0=null", "selection.te0 is None; write a text such as '05,11', a list, or {id: true}"),
        ("selection.te0={a: 1}", "selection.te0 is {'a': 1}; write a text such as '05,11', a list, or {id: true}"),
        (
            "+experiment.dtype=fp32",
            "the experiment would have no effect; its file must begin with '# @package _global_'",
        ),
    ],
)
def test_what_would_have_no_effect_or_no_meaning_is_refused(typed: str, problem: str, compose: Compose) -> None:
    assert refused(compose, typed) == [problem]


def test_all_that_is_wrong_is_said_at_once(compose: Compose) -> None:
    typed = ["executor.workers=0", "executor.memory=x", "models.dir=", "out=", "arch.components.te0.integers=[nope]"]
    problems = refused(compose, *typed)
    assert len(problems) == 5
    assert all(any(word in problem for problem in problems) for word in ("workers", "memory", "models", "out", "nope"))


def test_an_experiment_whose_settings_would_lie_beside_all_others_is_refused(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("dtype: fp32\n", "utf-8")
    with pytest.raises(ConfigError, match="its file must begin with '# @package _global_'"):
        converted(compose, "experiment=own", own=tmp_path)
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\ndtype: fp32\n", "utf-8")
    assert converted(compose, "experiment=own", own=tmp_path).dtype == "fp32"
