"""One job: from what Hydra composed to what is left behind."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from hydra.types import RunMode
from omegaconf import OmegaConf

from mergeflow.config import schema, trust
from mergeflow.config.assembly import to_assembly
from mergeflow.config.convert import to_architecture, to_config, to_objective, to_pair, to_request
from mergeflow.config.executor import to_ray_options
from mergeflow.config.ignored import ignored
from mergeflow.config.paths import absolute
from mergeflow.config.verification import to_verification
from mergeflow.config.words import misread_numbers
from mergeflow.errors import MergeflowError, raise_all
from mergeflow.execute.ray import RayExecutor
from mergeflow.objective import check, score
from mergeflow.redaction import redacted
from mergeflow.text import harmless, some

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from omegaconf import DictConfig

    from mergeflow.drafts import Kept
    from mergeflow.interfaces import Executor
    from mergeflow.merge import Result
    from mergeflow.objective import Score
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.request import Request

log = logging.getLogger(__name__)

_here = Path(__file__).resolve().parent.parent
CONF = next(place for place in (_here / "conf", _here.parent / "conf") if (place / "config.yaml").is_file())
"""Beside the package in a checkout, inside it in a wheel."""


class Outcome:
    """What became of the jobs that Hydra has called; a sweep goes on after one that failed."""

    code = 0
    """The worst exit code."""
    finished = 0
    """How many jobs have all their outputs in place."""
    begun = False
    """Whether there was a job at all; until then whatever is raised is about what was typed."""
    told: ClassVar[list[MergeflowError]] = []
    """What was said already."""
    kept: ClassVar[list[Kept]] = []
    """Drafts that were left for a later run."""

    @classmethod
    def failed(cls, error: MergeflowError) -> None:
        """A job has failed: say why, and remember."""
        cls.code = max(cls.code, error.exit_code)
        cls.told.append(error)
        say(str(error))


@dataclass(frozen=True)
class Opened:
    """A job that is planned."""

    config: schema.Config
    request: Request
    plan: Plan


def do(composed: DictConfig, hydra: Any) -> Score:
    """What `main` does for a run. Returns what the objective says of the outputs, if there is one."""
    config = read(composed, hydra)
    if config.job is schema.Job.compare:
        compare(config)
        return None
    if config.job is schema.Job.verify:
        verify(config)
        return None
    if config.job is schema.Job.assemble:
        return assemble(config)
    job = open_job(config)
    from mergeflow.merge import look

    if config.job is schema.Job.plan:
        show_plan(look(job.plan))
        return None
    if made_already(job.plan, job.request.out):
        return objective_of(config, job.plan)
    raise_all(job.plan.problems)
    tell_notes(job.plan)
    return _carried_out(config, job.plan, "merging")


def _carried_out(config: schema.Config, plan: Plan, doing: str) -> Score:
    """Do what is planned. Returns what the objective says of the outputs, if there is one."""
    from mergeflow.merge import Watch, look, run, store_of
    from mergeflow.report.progress import MergeProgress

    plan = look(plan)
    tell_pace(plan)
    executor = executor_of(config, plan)
    with MergeProgress(plan.bytes_read, doing) as progress:
        watch = Watch(progress.spare, Outcome.kept.append, lambda result: record(config, result, executor))
        result = run(plan, executor, store_of(plan, executor), progress, watch)
        Outcome.finished += 1
    return finish(config, result, executor)


def assemble(config: schema.Config) -> Score:
    """Put a checkpoint together of parts. Returns what the objective says of it, if there is one."""
    from mergeflow.merge import open_assembly

    assembly = to_assembly(config)
    plan = open_assembly(assembly)
    if (objective := to_objective(config)) is not None:
        check(objective)
    if made_already(plan, assembly.out):
        return objective_of(config, plan)
    raise_all(plan.problems)
    return _carried_out(config, plan, "copying")


def read(composed: DictConfig, hydra: Any) -> schema.Config:
    """What is asked for; raises all that is wrong with how it is written. `hydra` is Hydra's own part of the config."""
    Outcome.begun = True
    runtime = hydra.runtime
    raise_all(misread_numbers(runtime.config_sources, runtime.choices, str(hydra.job.config_name)))
    config = to_config(composed)
    if hydra.mode == RunMode.MULTIRUN:
        config.out = runtime.output_dir
    raise_all(trust.unasked(config, hydra, CONF))
    raise_all(ignored(config, hydra.overrides.task, runtime.choices))
    return config


def open_job(config: schema.Config) -> Opened:
    """Plan a merge; what forbids it is in the plan."""
    request = to_request(config)
    if (objective := to_objective(config)) is not None:
        check(objective)
    if config.models.demo:
        _make_demo(request.models.dir, config.models.count)
    from mergeflow.merge import open_plan

    return Opened(config, request, open_plan(request, progress=_hashing))


def tell_notes(plan: Plan) -> None:
    """What was tolerated or is odd, into the log."""
    for note in plan.notes:
        log.info("note: %s", note)


def tell_pace(plan: Plan) -> None:
    """How the sources are read and how long it will take, into the log, where a sample has told."""
    from mergeflow.plan.pace import estimate, in_words

    expected = estimate(plan)
    if expected is not None:
        log.info("%s", in_words(plan))
        log.info("about %.1f s: %s", expected.total, expected.in_words())


def show_plan(plan: Plan) -> None:
    """The plan as a page."""
    from mergeflow.plan.explain import explain
    from mergeflow.report.console import show

    show(explain(plan))
    if plan.problems:
        Outcome.code = max(Outcome.code, 1)


def made_already(plan: Plan, out: str) -> bool:
    """Whether a run that is to be resumed had come to its end: its outputs are there, and then that is said."""
    from mergeflow.merge import made_before, store_of, tidy
    from mergeflow.report.console import show

    store = store_of(plan)
    if not plan.resume or made_before(plan, out, store) is None:
        return False
    tidy(plan, store)
    paths = [output.path for output in plan.outputs]
    show(f"there already, and made by this very plan: {some(paths)}")
    Outcome.finished += 1
    return True


def record(config: schema.Config, result: Result, executor: Executor) -> None:
    """Leave the manifest."""
    from mergeflow.report.manifest import manifest, write_manifest

    write_manifest(manifest(result, executor.name), absolute(config.out))


def finish(config: schema.Config, result: Result, executor: Executor) -> Score:
    """Leave the tables of a series, say what was made, and ask the objective about it."""
    from mergeflow.report.console import show
    from mergeflow.report.manifest import manifest, write_manifest
    from mergeflow.report.series import write_series
    from mergeflow.report.summary import summary

    out = absolute(config.out)
    show(summary(result))
    if tables := write_series(result, out):
        show(f"written {' and '.join(map(str, tables))}")
    says = objective_of(config, result.plan)
    if says is not None:
        write_manifest(manifest(result, executor.name) | {"objective": says}, out)
    return says


def objective_of(config: schema.Config, plan: Plan) -> Score:
    """What the objective says of the outputs, if there is one."""
    from mergeflow.report.console import show

    objective = to_objective(config)
    if objective is None:
        return None
    says = score(objective, [output.path for output in plan.outputs])
    show(f"the objective says {says}")
    return says


def _hashing(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The progress of reading whole files; none is shown where all are known already."""
    from mergeflow.report.progress import MergeProgress

    return MergeProgress(total, "hashing") if total else nullcontext(lambda _: None)


def compare(config: schema.Config) -> None:
    """Tell how two checkpoints differ: a table here, JSON and a picture in `out`."""
    a, b = to_pair(config)
    from mergeflow.compare.run import compare_pair, open_pair
    from mergeflow.report.comparison import table
    from mergeflow.report.comparison_json import to_json, write_json
    from mergeflow.report.console import show
    from mergeflow.report.progress import MergeProgress

    pair = open_pair(a, b, to_architecture(config.arch))
    with MergeProgress(pair.bytes_to_read, "comparing") as progress:
        comparison = compare_pair(pair, progress=progress)
    out = absolute(config.out)
    written = [str(write_json(to_json(comparison), out))]
    if find_spec("matplotlib") is None:
        log.info("no picture was drawn; pip install 'mergeflow[plots]' draws one")
    elif comparison.total.tensors:
        from mergeflow.report.comparison_picture import draw

        written.append(f"{out}/compare.png")
        draw(comparison, written[-1])
    show(table(comparison))
    show(f"\nwritten {' and '.join(written)}")


def verify(config: schema.Config) -> None:
    """Tell whether an output is what its recipe makes of its sources: a page here, JSON in `out`."""
    asked = to_verification(config)
    from mergeflow.report.comparison_json import write_json
    from mergeflow.report.console import show
    from mergeflow.report.progress import MergeProgress
    from mergeflow.report.verification import NAME, page, to_json
    from mergeflow.verify.run import open_verification
    from mergeflow.verify.run import verify as look_at

    opened = open_verification(asked, progress=_hashing)
    with MergeProgress(opened.bytes_to_read, "verifying") as progress:
        found = look_at(opened, progress=progress)
    written = write_json(to_json(found), asked.out, NAME)
    show(page(found))
    show(f"\nwritten {written}")
    if not found.holds:
        Outcome.code = max(Outcome.code, 1)


def executor_of(config: schema.Config, plan: Plan) -> Executor:
    """Where a plan is carried out."""
    wanted = config.executor
    if wanted.kind is schema.ExecutorKind.local:
        from mergeflow.execute.local import LocalExecutor

        return LocalExecutor(plan.budget)
    return RayExecutor(plan.budget, to_ray_options(wanted))


def _make_demo(directory: str, count: int) -> None:
    from mergeflow.demo import ensure_demo

    ensure_demo(directory, _sdxl(), count=count)


@cache
def _sdxl() -> Architecture:
    """The demo models are SDXL-shaped, whatever architecture they are then looked at with."""
    sdxl = OmegaConf.merge(OmegaConf.structured(schema.Arch), OmegaConf.load(CONF / "arch" / "sdxl.yaml"))
    return to_architecture(cast("schema.Arch", OmegaConf.to_object(sdxl)))


def say(text: str) -> None:
    """Something for the person who typed, on stderr."""
    sys.stderr.write(f"mergeflow: {harmless(redacted(text))}\n")
