"""Sweeps that optimise: Optuna asks, and every generation of its trials is one pass."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.launch.test_select import TRIED, chosen
from tests.launch.test_sweep import alternatives, files, manifest_of, shown

if TYPE_CHECKING:
    from tests.program import Call

pytestmark = [
    pytest.mark.skipif(find_spec("optuna") is None, reason="the extra [optuna] is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Optuna 2.10, which Hydra 1.3 needs, is older than what it stands on
]


@pytest.fixture(autouse=True)
def without_a_stream_of_its_own() -> None:
    """Optuna keeps the stderr that was there when it was imported, which is that of an earlier test."""
    from optuna.logging import disable_default_handler

    disable_default_handler()


def test_optuna_makes_a_pass_for_every_generation_and_finds_what_is_not_worse_than_its_first(
    call: Call, select: list[str]
) -> None:
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=4"]
    done = call(*select, *sweeper, "hydra.sweeper.sampler.seed=1")
    assert done.code == 0, done.err
    assert [line.split(" reads")[0] for line in shown(done.err)] == [
        "one pass for job(s) 0, 1, 2, 3",
        "one pass for job(s) 4, 5, 6, 7",
    ]
    scores = [manifest_of(job)["objective"] for job in range(8)]
    found: dict[str, Any] = yaml.safe_load(Path("out/optimization_results.yaml").read_text("utf-8"))
    assert found["best_value"] == min(scores) <= sorted(scores[:4])[1]
    on = {name.rpartition(".")[2] for name, value in found["best_params"].items() if value}
    assert chosen(scores.index(min(scores))) == ("02", *(f"{int(id):02}" for id in TRIED if id in on))


def test_optuna_sees_that_a_job_has_failed(call: Call, words: list[str]) -> None:
    objective = ["objective=python", "objective.target=tests.launch.test_sweep.first_value"]
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"]
    for launcher in ("shared_scan", "basic"):
        words_too = [*sweeper, *objective, f"hydra/launcher={launcher}", f"out={launcher}"]
        done = call("-m", *words, *words_too, alternatives("1,9", "9,1"))
        assert done.code == 2
        assert "'9' is not in" in done.err
        assert "Traceback" not in done.err
        assert not Path(launcher, "optimization_results.yaml").exists()


def test_a_sweeper_that_optimises_needs_a_number(call: Call, words: list[str]) -> None:
    done = call("-m", *words, "hydra/sweeper=optuna", alternatives("1,2", "1,3"))
    assert done.code == 2
    assert "hydra/sweeper=optuna asks for a number; choose objective=command or objective=python" in done.err
    assert files(Path("out")) == {}
