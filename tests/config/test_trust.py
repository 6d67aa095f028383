"""Configs that came with somebody else's models: they say what is merged, and run nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hydra.experimental.callback import Callback

from mergeflow.config.trust import TARGETS
from tests.launch.conftest import call, small, words

if TYPE_CHECKING:
    from tests.program import Call

__all__ = ["call", "small", "words"]  # fixtures

CALLBACK = "hydra: {callbacks: {x: {_target_: %s, command: 'touch ran'}}}"
HANDLER = "hydra: {job_logging: {handlers: {x: {%s}}, root: {handlers: [x]}}}"
COMMAND = 'defaults: [{override /objective: command}]\nobjective: {command: "touch ran {file}"}'
PYTHON = "defaults: [{override /objective: python}]\nobjective: {target: os.system}"
HOSTILE = {
    "a callback": (CALLBACK % "os.system", "Python's os.system to be called"),
    "a callback by way of mergeflow": (CALLBACK % "mergeflow.objective.subprocess.Popen", "subprocess.Popen to be"),
    "a callback by way of the launcher": (
        CALLBACK % "hydra_plugins.mergeflow_shared_scan.launcher.os.system",
        "launcher.os.system to be called",
    ),
    "a callback by way of a sampler": (CALLBACK % "optuna.samplers.os.system", "optuna.samplers.os.system to be"),
    "a callback of Hydra": (CALLBACK % "hydra.utils.call", "hydra.utils.call to be called"),
    "a log's factory": (HANDLER % "(): os.system, command: touch ran", "Python's os.system to be called"),
    "a log's class": (HANDLER % "class: subprocess.Popen, args: [touch, ran]", "subprocess.Popen to be called"),
    "a log's file": (HANDLER % "class: logging.FileHandler, filename: ran", "logging.FileHandler to be called"),
    "a command": (COMMAND, "objective.command is set by a config in "),
    "a function": (PYTHON, "objective.target is set by a config in "),
    "the environment": ("hydra: {job: {env_set: {PYTHONPATH: .}}}", "hydra.job.env_set is set by a config in "),
    "a cluster": ("executor: {kind: ray, address: '192.0.2.1:6379'}", "executor.address is set by a config in "),
}


@pytest.fixture(autouse=True)
def theirs(call: Call) -> Path:
    """Their directory, in the one that the program works in."""
    there = Path("theirs/experiment")
    there.mkdir(parents=True)
    return there


@pytest.mark.parametrize("sweep", [False, True], ids=["a run", "a sweep"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_of_others_runs_nothing(name: str, sweep: bool, call: Call, words: list[str], theirs: Path) -> None:
    text, told = HOSTILE[name]
    (theirs / "x.yaml").write_text(f"# @package _global_\n{text}\n")
    own = [word for word in words if word != "executor=local" or name != "a cluster"]
    own += ["hydra/launcher=basic"] * (name == "the environment")  # the other refuses it whoever asks
    done = call(*["-m"] * sweep, "-cd", "theirs", *own, "experiment=x", "selection.models='1,2'")
    assert done.code == 2, done.err
    assert told in done.err
    assert "Traceback" not in done.err
    assert not Path("ran").exists()
    assert not list(Path().rglob("*.safetensors"))


def test_a_config_of_others_may_say_what_is_merged(call: Call, words: list[str], theirs: Path) -> None:
    (theirs / "x.yaml").write_text("# @package _global_\nselection: {models: '1,2'}\n")
    done = call("-cd", "theirs", *words, "experiment=x", "job=plan")
    assert done.code == 0, done.err
    assert "uniform of 2 models" in done.out


def test_what_is_typed_is_trusted_beside_a_config_of_others(call: Call, words: list[str], theirs: Path) -> None:
    (theirs / "x.yaml").write_text("# @package _global_\nselection: {models: '1,2'}\n")
    typed = ["objective=command", "objective.command=stat -c %s {file}", "+hydra.job.env_set.MERGEFLOW_TEST=1"]
    done = call("-cd", "theirs", *words, "experiment=x", *typed)
    assert done.code == 0, done.err
    assert "the objective says" in done.out


def test_a_callback_that_is_typed_is_called(call: Call, words: list[str]) -> None:
    Witness.made.clear()
    typed = "+hydra.callbacks.x={_target_: tests.config.test_trust.Witness, command: typed}"
    done = call(*words, typed, "selection.models=1,2", "job=plan")
    assert done.code == 0, done.err
    assert Witness.made == ["typed"]


def test_what_is_in_the_users_list_is_called(
    call: Call, words: list[str], theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Witness.made.clear()
    (theirs / "x.yaml").write_text(f"# @package _global_\n{CALLBACK % 'tests.config.test_trust.Witness'}\n")
    monkeypatch.setenv(TARGETS, "other., tests.config.test_trust.Witness")
    done = call("-cd", "theirs", *words, "experiment=x", "selection.models=1,2", "job=plan")
    assert done.code == 0, done.err
    assert Witness.made == ["touch ran"]


class Witness(Callback):
    """A callback that tells that it was made."""

    made: list[str] = []  # noqa: RUF012 - of the test's own

    def __init__(self, command: str) -> None:
        self.made.append(command)


@pytest.mark.parametrize(
    "keeps", [["-m"], ["hydra.output_subdir=kept"]], ids=["a sweep", "a directory that is asked for"]
)
def test_a_secret_is_refused_where_hydra_would_keep_it(keeps: list[str], call: Call, words: list[str]) -> None:
    secret = "objective.command=curl https://me:hunter2@example.org/{file}?token=hunter2"
    done = call(*keeps, *words, "selection.models='1,2'", "objective=command", secret)
    assert done.code == 2
    assert "holds a secret" in done.err
    assert "hunter2" not in done.both
    assert not [path for path in Path().rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


def test_a_secret_of_the_environment_is_in_nothing_that_a_sweep_leaves(
    call: Call, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    Path("score").write_text("#!/bin/sh\necho said $1\n")
    Path("score").chmod(0o755)
    command = "objective.command=./score ${oc.env:HF_TOKEN} {file}"
    done = call("-m", *words, "selection.models='1,2','1,3'", "objective=command", command)
    assert done.code == 1, "it prints no number, so what it printed is told"
    assert "said ***" in done.err
    assert "hunter2" not in done.both
    left = [path for path in Path("out").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} >= {".yaml", ".log", ".json"}
    assert not [path for path in left if b"hunter2" in path.read_bytes()]


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "x.txt"])
def test_an_output_stays_in_its_directory(name: str, call: Call, words: list[str]) -> None:
    done = call(*words, "selection.models=1,2", f"target.single.file={name}")
    assert done.code == 2
    assert "safetensors" in done.err
    assert not list(Path().rglob("*.safetensors"))
