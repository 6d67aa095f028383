"""The jobs of a sweep, done together: each is planned by itself, and all that can be are read for in one pass.

Who cannot share a pass has one of its own, and the log says why. What befalls one job is its own matter.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import filter_overrides

from mergeflow.config import schema
from mergeflow.config.jobs import (
    Opened,
    Outcome,
    assemble,
    compare,
    executor_of,
    finish,
    made_already,
    objective_of,
    open_job,
    read,
    record,
    show_plan,
    tell_notes,
    tell_pace,
    verify,
)
from mergeflow.errors import MergeflowError, raise_all
from mergeflow.redaction import redacted
from mergeflow.tensors import si_bytes
from mergeflow.text import harmless

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from omegaconf import DictConfig

    from mergeflow.objective import Score
    from mergeflow.plan.fuse import Fused

log = logging.getLogger(__name__)

LOG = "mergeflow.log"
"""In the directory of every job."""
_current: ContextVar[tuple[int, ...] | None] = ContextVar("jobs", default=None)
"""Whose work is being done; None for what concerns all."""


@dataclass(frozen=True)
class SweepJob:
    """One alternative of a sweep."""

    number: int
    composed: DictConfig
    """Its config, with every interpolation resolved."""
    hydra: DictConfig
    """Its config with Hydra's own part."""
    out: str
    """Its directory."""


def do_together(jobs: Sequence[SweepJob]) -> list[Score | Exception]:
    """What became of each of `jobs`: what its objective says, or why it failed."""
    with _logs(jobs):
        return _Sweep(jobs).run()


class _Sweep:
    """One batch of jobs."""

    def __init__(self, jobs: Sequence[SweepJob]) -> None:
        self._jobs = jobs
        self._outcomes: dict[int, Score | Exception] = {}

    def run(self) -> list[Score | Exception]:
        opened = {job.number: one for job in self._jobs if (one := self._opened(job)) is not None}
        for group in _groups(opened):
            self._merge(group)
        return [self._outcomes.get(job.number) for job in self._jobs]

    def _opened(self, job: SweepJob) -> Opened | None:
        """A job that is to be merged or planned; None for one that is done or cannot be."""
        try:
            with _work_of(job.number):
                typed = " ".join(filter_overrides(job.hydra.hydra.overrides.task))
                log.info("job %d: %s", job.number, typed or "as it is")
                config = read(job.composed, job.hydra.hydra)
                if config.job is schema.Job.compare:
                    compare(config)
                    return None
                if config.job is schema.Job.verify:
                    verify(config)
                    return None
                if config.job is schema.Job.assemble:
                    self._outcomes[job.number] = assemble(config)
                    return None
                opened = open_job(config)
                if config.job is schema.Job.plan:
                    show_plan(opened.plan)
                elif made_already(opened.plan, opened.request.out):
                    self._outcomes[job.number] = objective_of(config, opened.plan)
                    return None
                raise_all(() if config.job is schema.Job.plan else opened.plan.problems)
                tell_notes(opened.plan)
                return None if opened.plan.problems else opened
        except MergeflowError as error:
            self._failed(job.number, error)
            return None

    def _merge(self, group: dict[int, Opened]) -> None:
        from mergeflow.plan.fuse import in_passes

        numbers = list(group)
        passes = in_passes([job.plan for job in group.values()])
        for fused in passes:
            mine, numbers = numbers[: len(fused.alone)], numbers[len(fused.alone) :]
            only_planned = group[mine[0]].config.job is schema.Job.plan
            with _work_of(*mine):
                _announce(fused, mine, divided=len(passes) > 1, as_result=only_planned)
                if not only_planned:
                    self._pass({number: group[number] for number in mine}, fused)

    def _pass(self, jobs: dict[int, Opened], fused: Fused) -> None:
        from mergeflow.merge import Result, Watch, look, run_together, store_of
        from mergeflow.plan.pace import alike
        from mergeflow.report.progress import MergeProgress

        plan = look(fused.plan)
        tell_pace(plan)
        executor = executor_of(next(iter(jobs.values())).config, plan)
        try:
            paced = replace(fused, plan=plan, alone=tuple(alike(one, plan) for one in fused.alone))
            config_of = {id(one): job.config for one, job in zip(paced.alone, jobs.values(), strict=True)}

            def made(result: Result) -> None:
                record(config_of[id(result.plan)], result, executor)

            with MergeProgress(plan.bytes_read) as progress:
                watch = Watch(progress.spare, Outcome.kept.append, made)
                results = run_together(paced, executor, store_of(plan, executor), progress, watch)
        except MergeflowError as error:  # it concerns the pass, and so all of its jobs
            for number in jobs:
                self._failed(number, error)
            return
        for (number, job), result in zip(jobs.items(), results, strict=True):
            if isinstance(result, MergeflowError):
                self._failed(number, result)
                continue
            Outcome.finished += 1
            try:
                with _work_of(number):
                    log.info("job %d is done: %s", number, job.request.out)
                    self._outcomes[number] = finish(job.config, result, executor)
            except MergeflowError as error:
                self._failed(number, error)

    def _failed(self, number: int, error: MergeflowError) -> None:
        self._outcomes[number] = error
        with _work_of(number):
            log.error("job %d has failed: %s", number, error)
        Outcome.code = max(Outcome.code, error.exit_code)
        Outcome.told.append(error)


def _groups(opened: dict[int, Opened]) -> Iterator[dict[int, Opened]]:
    """Jobs that can share a pass, in the order of their first ones."""
    left = dict(opened)
    while left:
        first = next(iter(left.values()))
        group = {number: job for number, job in left.items() if not _apart(first, job)}
        yield group
        left = {number: job for number, job in left.items() if number not in group}
        for number, job in left.items():
            with _work_of(number):
                log.info("job %d takes another pass than job %d: %s", number, next(iter(group)), _apart(first, job))


def _apart(one: Opened, other: Opened) -> str:
    """Why two jobs cannot share a pass; empty if they can."""
    reasons = {
        "job": (one.config.job, other.config.job),
        "models": (one.request.models, other.request.models),
        "executor": (one.config.executor, other.config.executor),
        "nonfinite": (one.plan.nonfinite, other.plan.nonfinite),
    }
    others = [name for name, (mine, its) in reasons.items() if mine != its]
    return f"it has another {' and another '.join(others)}" if others else ""


def _announce(fused: Fused, numbers: Sequence[int], *, divided: bool, as_result: bool) -> None:
    """What a pass is for, and what it spares: that is the result where nothing but the plan is wanted."""
    from mergeflow.report.console import show

    names = ", ".join(map(str, numbers))
    why = " (all at once would not fit executor.memory)" if divided else ""
    once, apart = fused.plan.bytes_read, fused.bytes_apart
    spared = f", instead of {si_bytes(apart)} one after the other" if len(numbers) > 1 else ""
    told = f"one pass for job(s) {names}{why} reads {si_bytes(once)}{spared}"
    if as_result:
        show(told)
    else:
        log.info(told)


@contextmanager
def _work_of(*numbers: int) -> Iterator[None]:
    token = _current.set(numbers)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def _logs(jobs: Sequence[SweepJob]) -> Iterator[None]:
    """Every job has a log of what is its own and of what concerns all."""
    root = logging.getLogger()
    handlers = []
    for job in jobs:
        handler = logging.FileHandler(Path(job.out) / LOG, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
        handler.addFilter(_of(job.number))
        root.addHandler(handler)
        handlers.append(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(redacted(super().format(record)))


def _of(number: int) -> logging.Filter:
    class Of(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            current = _current.get()
            return current is None or number in current

    return Of()
