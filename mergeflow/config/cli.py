"""The command line: `python launch.py`, or `mergeflow`, which is the same program."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mergeflow.config import schema
from mergeflow.config.convert import absolute, to_architecture, to_config, to_pair, to_request
from mergeflow.config.words import ignored_by_a_replay, in_plain_words, misread_numbers, quote_texts
from mergeflow.errors import MergeflowError, raise_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from omegaconf import DictConfig

    from mergeflow.interfaces import Executor
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.request import Request

log = logging.getLogger(__name__)

INTERRUPTED = 130
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


def main() -> None:
    """Compose what is typed, do it, and exit: 0 done, 1 impossible or failed, 2 bad usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    sys.argv[1:] = quote_texts(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through; what they mean is said here
    signal.signal(signal.SIGTERM, _interrupt)
    schema.register()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_job)()
    except KeyboardInterrupt:
        there = f"the outputs of {Outcome.finished} finished job(s) are there, and no other" if Outcome.finished else ""
        _fail(f"interrupted; {there or 'no output was written'}", INTERRUPTED)
    except MergeflowError as error:
        _fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(str(in_plain_words(error)), 2)
    except Exception as error:
        if Outcome.begun:
            raise
        _fail(str(in_plain_words(error)), 2)
    sys.exit(Outcome.code)


def _job(composed: DictConfig) -> None:
    """One job: what `main` does for a run, and a sweep for each of its alternatives."""
    Outcome.begun = True
    try:
        _do(composed)
    except MergeflowError as error:
        Outcome.code = max(Outcome.code, error.exit_code)
        _say(str(error))


def _do(composed: DictConfig) -> None:
    runtime = HydraConfig.get()
    sources, choices = runtime.runtime.config_sources, runtime.runtime.choices
    raise_all(misread_numbers(sources, choices, str(runtime.job.config_name)))
    config = to_config(composed)
    if runtime.mode == RunMode.MULTIRUN:
        config.out = runtime.runtime.output_dir
    if config.job is schema.Job.compare:
        _compare(config)
        return
    if config.recipe.kind is schema.RecipeKind.file:
        raise_all(ignored_by_a_replay(runtime.overrides.task))
    request = to_request(config)
    if config.models.demo:
        _make_demo(request.models.dir)
    from mergeflow.merge import open_plan

    plan = open_plan(request, progress=_hashing)
    if config.job is schema.Job.plan:
        _show(plan)
        return
    raise_all(plan.problems)
    for note in plan.notes:
        log.info("note: %s", note)
    _merge(plan, _executor(config.executor, request), request.out)


def _show(plan: Plan) -> None:
    from mergeflow.plan.explain import explain
    from mergeflow.report.console import show

    show(explain(plan))
    if plan.problems:
        Outcome.code = max(Outcome.code, 1)


def _merge(plan: Plan, executor: Executor, out: str) -> None:
    from mergeflow.merge import run
    from mergeflow.report.console import show
    from mergeflow.report.manifest import manifest, write_manifest
    from mergeflow.report.progress import MergeProgress
    from mergeflow.report.summary import summary

    with MergeProgress(plan.bytes_read) as progress:
        result = run(plan, executor, progress=progress)
        Outcome.finished += 1
    write_manifest(manifest(result, executor.name), out)
    show(summary(result))


def _hashing(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The progress of reading whole files; none is shown where all are known already."""
    from mergeflow.report.progress import MergeProgress

    return MergeProgress(total, "hashing") if total else nullcontext(lambda _: None)


def _compare(config: schema.Config) -> None:
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


def _executor(wanted: schema.Executor, request: Request) -> Executor:
    if wanted.kind is schema.ExecutorKind.local:
        from mergeflow.execute.local import LocalExecutor

        return LocalExecutor(request.budget)
    from mergeflow.execute.ray import EMBEDDED, RayExecutor, RayOptions

    return RayExecutor(request.budget, RayOptions(wanted.address or EMBEDDED))


def _make_demo(directory: str) -> None:
    """The demo models are SDXL-shaped, whatever architecture they are then looked at with."""
    from mergeflow.demo import ensure_demo

    sdxl = OmegaConf.merge(OmegaConf.structured(schema.Arch), OmegaConf.load(CONF / "arch" / "sdxl.yaml"))
    ensure_demo(directory, to_architecture(cast("schema.Arch", OmegaConf.to_object(sdxl))))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    sys.stderr.write(f"mergeflow: {text}\n")


def _fail(text: str, code: int) -> None:
    _say(text)
    sys.exit(code)
