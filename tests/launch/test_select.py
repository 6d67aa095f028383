"""Which models to take, found by a score: the example in `conf/`, on the first text encoder of the demo set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergeflow.demo.score import BEST, distance
from tests.launch.test_sweep import files, manifest_of, shown

if TYPE_CHECKING:
    from tests.program import Call

TRIED = ("4", "7", "8", "11")


def chosen(job: int) -> tuple[str, ...]:
    """The models that a job has merged."""
    return tuple(manifest_of(job)["outputs"][0]["components"]["te0"]["list"])


def test_trying_all_combinations_in_one_pass_finds_the_best(call: Call, select: list[str]) -> None:
    done = call(*select)
    assert done.code == 0, done.err
    assert len(shown(done.err)) == 1
    jobs = range(2 ** len(TRIED))
    assert len({chosen(job) for job in jobs}) == len(files(Path("out"))) == len(jobs)
    assert all(chosen(job)[0] == "02" for job in jobs)
    scores = {chosen(job): manifest_of(job)["objective"] for job in jobs}
    assert scores[chosen(3)] == distance("out/3/merged.safetensors")
    best, second = sorted(scores, key=scores.__getitem__)[:2]
    assert best == BEST
    assert scores[best] < 0.1 * scores[second]
