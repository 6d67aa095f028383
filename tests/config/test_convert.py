from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.config import schema
from mergeflow.config.convert import (
    UNITS,
    to_budget,
    to_bytes,
    to_config,
    to_objective,
    to_request,
    to_source,
)
from mergeflow.config.paths import absolute
from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.objective import Objective
from mergeflow.plan.plan import Cell, Place, Strip
from mergeflow.plan.tiles import memory_for
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.request import Budget, PartRequest, Policies, TargetRequest
from mergeflow.recipe.selection import parse_selection
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.recipe.request import Request
    from tests.config.conftest import Compose


def executor(**changes: object) -> schema.Executor:
    made = schema.Executor(kind=schema.ExecutorKind.local, workers=2)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def refused(compose: Compose, *typed: str) -> list[str]:
    """What conversion says against a config that composes."""
    composed = compose(*typed)
    with pytest.raises(MergeflowError) as caught:
        to_request(to_config(composed))
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


def converted(compose: Compose, *typed: str, own: Path | None = None) -> Request:
    return to_request(to_config(compose(*typed, own=own)))


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1000B", 1000),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1kib", 1024),
        ("512MiB", 512 * 2**20),
        ("1GiB", 2**30),
        (" 1 GiB ", 2**30),
        ("2GB", 2 * 10**9),
        ("2.5GB", 2_500_000_000),
        ("0.1GB", 100_000_000),
        ("1.5GiB", 3 * 2**29),
        ("1TiB", 2**40),
        ("9007199254740993B", 2**53 + 1),
        ("1" * 400, int("1" * 400)),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert to_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "GiB", "1GiB2", "-1GiB", "1e9", "1,5GiB", "1.GiB", ".5GiB", "1 G", "\u0661B"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_bytes(text)
    assert str(caught.value) == f"executor.memory={text} is not a size; write 512MiB, 4GiB or 2GB"


@given(st.integers(0, 10**30), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_a_whole_number_of_any_unit_is_exact(number: int, unit: str, space: str) -> None:
    assert to_bytes(f"{number}{space}{unit}") == number * UNITS[unit]


# the budget


def test_a_budget_is_what_was_asked_for() -> None:
    asked = executor(workers=3, reads_in_flight=5, memory="1MiB", block="16MiB", io=schema.IoKind.direct)
    assert to_budget(asked) == Budget(3, 5, 2**20, 2**24, "direct", ())


def test_what_is_left_to_the_storage_starts_with_what_is_usual() -> None:
    assert to_budget(executor(workers=3)) == Budget(3, 4, 2**30, 2**22, "auto", ("reads_in_flight", "block"))
    assert to_budget(executor(workers=3, block=1 << 20)).auto == ("reads_in_flight",)


def test_there_are_as_many_workers_as_this_process_may_use_cores() -> None:
    assert to_budget(executor(workers=None, memory="1TiB")).workers == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("cores", [1, 8, 32, 128, 512])
def test_there_are_never_so_many_workers_that_the_default_memory_has_no_blocks_for_them(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    budget = to_budget(schema.Executor(kind=schema.ExecutorKind.ray))
    assert 1 <= budget.workers <= cores
    assert budget.workers == cores or budget.workers >= 8
    rows = tuple(range(257))
    cell = Cell("uniform", Dtype.F16, rows, (1,) * 257, (Place(0, 0),))
    memory = memory_for([Strip("key", 10**8, rows, (Dtype.F16,) * 257, rows, (cell,))], budget)
    assert memory.projected <= budget.memory


def test_there_is_one_worker_where_memory_is_short() -> None:
    assert to_budget(executor(workers=None, memory="1MiB")).workers == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"workers": 0}, "executor.workers=0 must be at least 1"),
        ({"workers": -2}, "executor.workers=-2 must be at least 1"),
        ({"reads_in_flight": 0}, "executor.reads_in_flight=0 must be at least 1"),
        ({"reads_in_flight": "many"}, "executor.reads_in_flight=many is not a number; write 4 or auto"),
        ({"reads_in_flight": True}, "executor.reads_in_flight=True is not a number; write 4 or auto"),
        ({"block": "long"}, "executor.block=long is not a size; write 4MiB, 16MiB or auto"),
        ({"block": 1000}, "executor.block=1000 must be at least 64KiB"),
        ({"memory": "much"}, "executor.memory=much is not a size; write 512MiB, 4GiB or 2GB"),
        (
            {"address": "auto"},
            "executor.address=auto is for Ray, but executor.kind is local; use executor=ray",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_budget_that_cannot_be_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_budget(executor(**changes))
    assert str(caught.value) == problem


def test_ray_may_have_an_address() -> None:
    assert to_budget(executor(kind=schema.ExecutorKind.ray, address="auto")).workers == 2


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
