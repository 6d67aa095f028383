"""A Hydra launcher for sweeps: every job is composed by itself, and all are merged in as few passes as they allow.

Hydra calls a launcher with the overrides of all jobs of a batch. Each is opened as Hydra would run it, with a directory
and `.hydra/` of its own, but what it composes is only collected; then all are done together; then each is closed, with
its own result and callbacks.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks  # the only private import: jobs are opened without calling back
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from mergeflow.config.schema import ObjectiveKind
from mergeflow.config.sweep import SweepJob, do_together
from mergeflow.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hydra.types import TaskFunction

    from mergeflow.objective import Score


HYDRA_FILES = ".hydra"
"""Where in its directory a job keeps what it was composed of; a run without -m leaves nothing but its outputs."""
BASIC = "basic"
OPTIMISERS = ("optuna", "nevergrad", "ax")
"""The groups of sweepers that cannot do without a number."""


class SharedScanLauncher(Launcher):
    """`hydra/launcher=shared_scan`, the launcher of `-m` unless another is chosen."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands to launchers."""
        self._context = hydra_context
        self._task = task_function
        self._config = config
        self._directories: dict[str, int] = {}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do the jobs of one batch together; what fails is in its own `JobReturn`."""
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        opened = [self._open(initial_job_idx + k, overrides) for k, overrides in enumerate(job_overrides)]
        configure_log(self._config.hydra.job_logging, self._config.hydra.verbose)
        jobs = [job for job, _ in opened]
        for job in jobs:
            self._has_its_own_directory(job)
        for job in jobs:
            with _as_hydra_has_it(job):
                self._context.callbacks.on_job_start(config=job.hydra, task_function=self._task)
        results = do_together(jobs)
        for (job, done), result in zip(opened, results, strict=True):
            self._close(job, done, result)
        return [done for _, done in opened]

    def _open(self, number: int, overrides: Sequence[str]) -> tuple[SweepJob, JobReturn]:
        """Compose one job and make its directory."""
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = number
            config.hydra.job.id = str(number)
            config.hydra.output_subdir = config.hydra.output_subdir or HYDRA_FILES
        _refuse(config)
        collected: list[DictConfig] = []

        def collect(composed: DictConfig) -> None:
            OmegaConf.resolve(composed)  # ${hydra:...} means something only as long as this job is open
            collected.append(composed)

        done = run_job(
            hydra_context=HydraContext(config_loader=self._context.config_loader, callbacks=Callbacks()),
            task_function=collect,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            configure_logging=False,
        )
        _ = done.return_value  # raises what composing has met
        return SweepJob(number, collected[0], config, str(config.hydra.runtime.output_dir)), done

    def _has_its_own_directory(self, job: SweepJob) -> None:
        other = self._directories.setdefault(os.path.realpath(job.out), job.number)
        if other != job.number:
            raise ConfigError(
                f"jobs {other} and {job.number} would both write to {job.out}; give each a directory of its own, as "
                "hydra.sweep.subdir='${hydra.job.num}' does"
            )

    def _close(self, job: SweepJob, done: JobReturn, result: Score | Exception) -> None:
        failed = isinstance(result, Exception)
        done.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
        done.return_value = result
        with _as_hydra_has_it(job):
            self._context.callbacks.on_job_end(config=job.hydra, job_return=done)
        if failed and self._config.hydra.runtime.choices.get("hydra/sweeper") == BASIC:
            # It would raise, and so do no further batch. That the job has failed was said, and is in the exit code.
            done.status, done.return_value = JobStatus.COMPLETED, None


@contextmanager
def _as_hydra_has_it(job: SweepJob) -> Iterator[None]:
    """`HydraConfig` is that of `job`, as callbacks expect it."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(job.hydra)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _refuse(config: Any) -> None:
    """What a sweeper could not do without, and what only a process of its own could give to a job."""
    sweeper = str(config.hydra.runtime.choices.get("hydra/sweeper"))
    if sweeper in OPTIMISERS and config.objective.kind is ObjectiveKind.none:
        raise ConfigError(f"hydra/sweeper={sweeper} asks for a number; choose objective=command or objective=python")
    if config.hydra.job.chdir:
        raise ConfigError("hydra.job.chdir=true needs a process for each job; use hydra/launcher=basic")
    if config.hydra.job.env_set:
        raise ConfigError("hydra.job.env_set needs a process for each job; use hydra/launcher=basic")
