"""Sweeps: many alternatives in one pass, each as if it had been alone."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from mergeflow.errors import ObjectiveError
from tests.launch.test_cli import PATIENCE_SECONDS, _wait_for, command
from tests.models import write_models

if TYPE_CHECKING:
    from tests.program import Call

FILE = "merged.safetensors"
LISTS = ("1,2", "1,2,3", "4,2=2", "all but broken", "3")


def alternatives(*lists: str) -> str:
    return "selection.models=" + ",".join(f"'{one}'" for one in lists)


def files(directory: Path) -> dict[str, bytes]:
    """Every output below a directory, by its path there."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))}


def drafts(directory: Path) -> list[Path]:
    return list(directory.rglob("*.draft"))


def log_of(job: int) -> str:
    return Path("out", str(job), "mergeflow.log").read_text("utf-8")


def manifest_of(job: int) -> Any:
    return json.loads(Path("out", str(job), "manifest.json").read_text("utf-8"))


def shown(error_text: str) -> list[str]:
    return [line for line in error_text.splitlines() if line.startswith("one pass for")]


# --- as if each had been alone --------------------------------------------------------------------------------------


def test_a_sweep_makes_the_files_that_the_basic_launcher_makes(call: Call, words: list[str]) -> None:
    varied = [*words, alternatives(*LISTS), "dtype=keep,fp32"]
    assert call("-m", *varied).code == 0
    done = call("-m", *varied, "hydra/launcher=basic", "out=alone")
    assert done.code == 0, done.err
    together = files(Path("out"))
    assert together == files(Path("alone"))
    assert len(together) == 10
    assert len(set(together.values())) > len(LISTS)


def test_every_job_has_its_directory_its_config_its_log_and_its_manifest(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2", "1,3"))
    assert done.code == 0, done.err
    for job, listed in enumerate(("1,2", "1,3")):
        directory = Path("out", str(job))
        assert sorted(path.name for path in directory.iterdir()) == [
            *(".hydra", "manifest.json", FILE, "mergeflow.log"),
        ]
        assert OmegaConf.load(directory / ".hydra" / "config.yaml").selection.models == listed
        assert f"selection.models='{listed}'" in OmegaConf.load(directory / ".hydra" / "overrides.yaml")
        assert OmegaConf.load(directory / ".hydra" / "hydra.yaml").hydra.job.num == job
        assert manifest_of(job)["outputs"][0]["components"]["all"]["list"] == listed.split(",")
        assert str(directory.absolute() / FILE) in done.out


def test_a_log_has_what_is_its_jobs_own_and_what_concerns_all(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2", "1,3", "1,9"))
    assert done.code == 2
    common = shown(done.err)
    assert len(common) == 1
    for job, listed in enumerate(("1,2", "1,3", "1,9")):
        log = log_of(job)
        assert f"job {job}: " in log
        assert listed in log
        assert (common[0] in log) == (job < 2)
        assert ("'9' is not in" in log) == (job == 2)
        for other in {0, 1, 2} - {job}:
            assert f"job {other}" not in log
    assert "job 1 is done" in done.err


def test_manifest_and_summary_say_what_was_read_once(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2", "1,2,3"))
    assert done.code == 0, done.err
    size = 80_000  # of a model's tensors
    for job in range(2):
        assert manifest_of(job)["shared"] == {"jobs": 2, "bytes_read_once": 3 * size, "bytes_apart": 5 * size}
    assert done.out.count("240.00 kB once for 2 jobs, instead of 400.00 kB one after the other") == 2
    assert shown(done.err) == ["one pass for job(s) 0, 1 reads 240.00 kB, instead of 400.00 kB one after the other"]


def test_a_job_that_is_alone_shares_nothing(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2"))
    assert done.code == 0, done.err
    assert manifest_of(0)["shared"] is None
    assert "once for" not in done.out
    assert shown(done.err) == ["one pass for job(s) 0 reads 160.00 kB"]


# --- callbacks ------------------------------------------------------------------------------------------------------


class Told(Callback):
    """Writes down what Hydra tells it."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        assert HydraConfig.get().job.num == config.hydra.job.num
        self.calls.append(("start", config.hydra.job.num, config.selection.models))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        assert HydraConfig.get().runtime.output_dir == config.hydra.runtime.output_dir
        failed = job_return.status is JobStatus.FAILED
        value = job_return._return_value
        assert failed == isinstance(value, Exception)
        assert job_return.cfg is not None
        self.calls.append(("end", config.hydra.job.num, job_return.cfg.selection.models, failed))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self.calls.append(("all",))


@pytest.fixture
def told() -> list[tuple[Any, ...]]:
    Told.calls.clear()
    return Told.calls


CALLBACK = "+hydra.callbacks.told._target_=tests.launch.test_sweep.Told"


def test_callbacks_are_called_for_every_job_with_what_became_of_it(
    call: Call, words: list[str], told: list[tuple[Any, ...]]
) -> None:
    assert call("-m", *words, alternatives("1,2", "1,9", "1,3"), CALLBACK).code == 2
    assert told == [
        *(("start", 0, "1,2"), ("start", 1, "1,9"), ("start", 2, "1,3")),
        *(("end", 0, "1,2", False), ("end", 1, "1,9", True), ("end", 2, "1,3", False)),
        ("all",),
    ]


def test_a_failure_in_one_batch_does_not_keep_the_next_from_being_done(
    call: Call, words: list[str], told: list[tuple[Any, ...]]
) -> None:
    done = call("-m", *words, alternatives("1,9", "1,2", "1,3"), "hydra.sweeper.max_batch_size=2", CALLBACK)
    assert done.code == 2
    assert sorted(files(Path("out"))) == [f"1/{FILE}", f"2/{FILE}"]
    assert [kind[:2] for kind in told] == [("start", 0), ("start", 1), ("end", 0), ("end", 1), *told_last(2)]


def told_last(job: int) -> list[tuple[Any, ...]]:
    return [("start", job), ("end", job), ("all",)]


# --- what is fused --------------------------------------------------------------------------------------------------


def test_a_batch_is_a_pass_and_numbers_go_on(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2", "1,3", "1,4"), "hydra.sweeper.max_batch_size=2")
    assert done.code == 0, done.err
    assert shown(done.err) == [
        "one pass for job(s) 0, 1 reads 240.00 kB, instead of 320.00 kB one after the other",
        "one pass for job(s) 2 reads 160.00 kB",
    ]
    assert sorted(files(Path("out"))) == [f"{job}/{FILE}" for job in range(3)]


def test_jobs_that_cannot_be_fused_run_as_further_passes(call: Call, words: list[str], small: Path) -> None:
    (other := small.parent / "other").mkdir(exist_ok=True)
    write_models(other, {"1": {"x": torch.ones(5).half()}, "2": {"x": torch.zeros(5).half()}})
    done = call("-m", *words, "selection.models='1,2'", f"models.dir={small},{other}", "executor.memory=256MiB,1GiB")
    assert done.code == 0, done.err
    assert sorted(files(Path("out"))) == [f"{job}/{FILE}" for job in range(4)]
    assert len(shown(done.err)) == 4
    assert "job 1 takes another pass than job 0: it has another executor" in done.err
    assert "job 2 takes another pass than job 0: it has another models" in done.err
    assert "job 3 takes another pass than job 0: it has another models and another executor" in done.err
    assert "takes another pass" not in log_of(0)
    assert "one pass for job(s) 1" not in log_of(0)


def test_a_sweep_that_does_not_fit_the_memory_is_divided_and_says_so(call: Call, words: list[str]) -> None:
    # One block and its scratch: 2 rows and one of results fit, 5 rows and 4 of results do not.
    budget = ["executor.workers=1", "executor.reads_in_flight=1", "executor.io=buffered", "executor.memory=9009000B"]
    done = call("-m", *words, *budget, alternatives("1,2", "1,3", "3,4", "2,4"))
    assert done.code == 0, done.err
    passes = shown(done.err)
    assert len(passes) > 1
    assert all("(all at once would not fit executor.memory)" in line for line in passes)
    assert call("-m", *words, alternatives("1,2", "1,3", "3,4", "2,4"), "out=alone").code == 0
    assert files(Path("out")) == files(Path("alone"))


# --- plans and comparisons ------------------------------------------------------------------------------------------


def test_the_plan_of_a_sweep_says_what_is_read_once(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2", "1,2,3"), "job=plan")
    assert done.code == 0, done.err
    assert done.out.count("nothing forbids this plan") == 2
    assert done.out.endswith("one pass for job(s) 0, 1 reads 240.00 kB, instead of 400.00 kB one after the other\n")
    assert files(Path("out")) == {}


def test_a_plan_that_cannot_be_carried_out_is_shown_and_not_counted(call: Call, words: list[str]) -> None:
    Path("out/1").mkdir(parents=True)
    Path("out/1", FILE).write_bytes(b"something dear")
    done = call("-m", *words, alternatives("1,2", "1,2,3"), "job=plan")
    assert done.code == 1
    assert "this plan cannot be carried out" in done.out
    assert done.out.endswith("one pass for job(s) 0 reads 160.00 kB\n")


def test_comparisons_are_jobs_too(call: Call, words: list[str], small: Path) -> None:
    done = call("-m", "job=compare", "arch=any", f"a={small}/1.safetensors", f"b={small}/2.safetensors,{small}/none")
    assert done.code == 1
    assert "none does not exist" in done.err
    assert json.loads(Path("merged/0/compare.json").read_text("utf-8"))["equal"] is False
    assert not Path("merged/1/compare.json").exists()


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "code", "words_of_it"),
    [("1,9", 2, "'9' is not in"), ("1,broken", 1, "'y': model broken has 1 NaN value(s) from element 7 on")],
    ids=["an unknown id", "a NaN in a model that only it uses"],
)
def test_a_job_that_fails_fails_alone(call: Call, words: list[str], listed: str, code: int, words_of_it: str) -> None:
    done = call("-m", *words, alternatives("1,2", listed, "1,3"))
    assert done.code == code
    assert words_of_it in log_of(1)
    assert done.err.count(words_of_it) == 1
    assert "Traceback" not in done.err
    assert sorted(path.name for path in Path("out/1").iterdir()) == [".hydra", "mergeflow.log"]
    made = files(Path("out"))
    assert sorted(made) == [f"0/{FILE}", f"2/{FILE}"]
    assert call("-m", *words, alternatives("1,2", "1,3"), "out=alone").code == 0
    assert list(made.values()) == list(files(Path("alone")).values())


def test_an_output_that_exists_is_left_alone_and_the_others_are_made(call: Call, words: list[str]) -> None:
    Path("out/1").mkdir(parents=True)
    Path("out/1", FILE).write_bytes(b"something dear")
    done = call("-m", *words, alternatives("1,2", "1,3"))
    assert done.code == 1
    assert "overwrite=true" in log_of(1)
    assert Path("out/1", FILE).read_bytes() == b"something dear"
    assert list(files(Path("out"))) == [f"0/{FILE}", f"1/{FILE}"]


def test_a_draft_that_cannot_be_made_is_its_jobs_own_matter(call: Call, words: list[str]) -> None:
    Path("out/1").mkdir(parents=True)
    Path("out/1", f"{FILE}.draft").symlink_to("elsewhere")
    done = call("-m", *words, alternatives("1,2", "1,3"))
    assert done.code == 1
    assert "is a link" in log_of(1)
    assert list(files(Path("out"))) == [f"0/{FILE}"]


def test_jobs_with_one_directory_are_refused_before_anything_is_done(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2", "1,3"), "hydra.sweep.subdir=same")
    assert done.code == 2
    assert "jobs 0 and 1 would both write to" in done.err
    assert files(Path("out")) == {}
    done = call("-m", *words, alternatives("1,2", "1,3"), "hydra.sweep.subdir=same", "hydra.sweeper.max_batch_size=1")
    assert done.code == 2
    assert "jobs 0 and 1 would both write to" in done.err


@pytest.mark.parametrize("option", ["hydra.job.chdir=true", "hydra.job.env_set.A=1"])
def test_what_needs_a_process_of_its_own_is_refused(call: Call, words: list[str], option: str) -> None:
    done = call("-m", *words, alternatives("1,2", "1,3"), f"+{option}" if "env" in option else option)
    assert done.code == 2
    assert "needs a process for each job; use hydra/launcher=basic" in done.err


def test_the_basic_launcher_goes_on_after_a_failure_too(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,9", "1,2"), "hydra/launcher=basic")
    assert done.code == 2
    assert list(files(Path("out"))) == [f"1/{FILE}"]


def test_an_interrupted_pass_leaves_no_output_and_says_how_to_go_on(demo_dir: Path, tmp_path: Path) -> None:
    arguments = [f"models.dir={demo_dir}", "out=out", "executor=local", "target=x17", "selection.te0='05,11','05,17'"]
    process = subprocess.Popen(command("-m", *arguments), stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    _wait_for(lambda: len(drafts(tmp_path / "out")) == 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "interrupted; no output was written" in errors
    assert "Traceback" not in errors
    assert bool(drafts(tmp_path / "out")) == ("add resume=true to the same command line" in errors)
    assert files(tmp_path / "out") == {}


# --- objectives -----------------------------------------------------------------------------------------------------


class Scores(Callback):
    """Collects what the jobs return."""

    values: list[Any] = []  # noqa: RUF012

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        self.values.append(job_return._return_value)


SCORES = "+hydra.callbacks.scores._target_=tests.launch.test_sweep.Scores"


def first_value(path: str) -> float:
    """A score: the first value of the output."""
    return float(load_file(path)["x"][0])


@pytest.mark.parametrize("launcher", ["shared_scan", "basic"])
def test_every_job_returns_what_the_objective_says(launcher: str, call: Call, words: list[str]) -> None:
    Scores.values.clear()
    target = "objective.target=tests.launch.test_sweep.first_value"
    done = call(
        *("-m", *words, alternatives("1", "2", "3"), "objective=python", target, SCORES, f"hydra/launcher={launcher}")
    )
    assert done.code == 0, done.err
    assert Scores.values == [first_value(f"out/{job}/{FILE}") for job in range(3)]
    for job, value in enumerate(Scores.values):
        assert manifest_of(job)["objective"] == value
        assert f"the objective says {value}\n" in done.out


def test_several_targets_have_a_number_each(call: Call, words: list[str]) -> None:
    Scores.values.clear()
    two = "+target={other: {file: other.safetensors, selection: others}}"
    lists = ["+selection.others='2'", alternatives("1", "3"), two]
    done = call("-m", *words, *lists, "objective=command", "objective.command=wc -c < {file}", SCORES)
    assert done.code == 1  # there is no shell in between, and wc is given two files
    assert "wc: '<'" in done.err
    done = call("-m", *words, *lists, "out=more", "objective=command", "objective.command=stat -c %s {file}", SCORES)
    assert done.code == 0, done.err
    sizes = tuple(float(Path("more/0", name).stat().st_size) for name in (FILE, "other.safetensors"))
    assert Scores.values[2:] == [sizes, sizes]


def test_a_score_that_fails_is_its_jobs_own_matter(call: Call, words: list[str]) -> None:
    Scores.values.clear()
    Path("score").write_text('#!/bin/sh\necho "looking at $1"\ncase "$1" in */1/*) exit 3;; esac\necho 0.5\n')
    Path("score").chmod(0o755)
    command = ["objective=command", "objective.command=./score {file}"]
    done = call("-m", *words, alternatives("1,2", "1,3", "1,4"), *command, SCORES)
    assert done.code == 1
    assert [Scores.values[0], Scores.values[2]] == [0.5, 0.5]
    assert isinstance(Scores.values[1], ObjectiveError)
    assert "ended with 3" in log_of(1)
    assert "looking at" in log_of(1)
    assert "objective" not in log_of(0).replace("objective=", "").replace("objective.command=", "")
    assert len(files(Path("out"))) == 3


def test_a_score_that_cannot_be_asked_is_refused_before_anything_is_read(call: Call, words: list[str]) -> None:
    done = call("-m", *words, alternatives("1,2"), "objective=python", "objective.target=nowhere.score")
    assert done.code == 2
    assert "objective.target=nowhere.score cannot be found" in done.err
    assert files(Path("out")) == {}
    done = call(*words, "objective=command", "objective.command=./score {file}")
    assert done.code == 2
    assert "there is no program ./score that can be run" in done.err
