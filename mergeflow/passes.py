"""One pass over the sources: drafts, shards, receipts, and for every job either all of its outputs or none."""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeflow.drafts import Drafts, Kept, Syncing
from mergeflow.errors import MergeflowError, Problems
from mergeflow.execute.coverage import Coverage
from mergeflow.execute.digest import TrailingDigest
from mergeflow.execute.journal import entries_of
from mergeflow.execute.watch import SourceWatch
from mergeflow.plan.fuse import fuse
from mergeflow.plan.remaining import remaining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mergeflow.interfaces import Executor, Receipt, Store
    from mergeflow.plan.fuse import Fused
    from mergeflow.plan.plan import Plan
    from mergeflow.tensors import Span

log = logging.getLogger(__name__)


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What one job has made."""

    plan: Plan
    digests: tuple[str, ...]
    """SHA-256 of the tensors of each output, in hex."""
    receipts: tuple[Receipt, ...]
    """Those of the whole pass, which other jobs may share."""
    seconds: float
    """From the first draft to the last byte synced, without `startup_seconds`."""
    startup_seconds: float
    """What the executor needed before its workers were ready."""
    shared: Fused | None = None
    """The pass, where other jobs were part of it."""
    resumed: int = 0
    """Bytes of its outputs that an earlier run had written."""
    moved: int = 0
    """Bytes that the whole pass has read and written."""

    @property
    def whole(self) -> Plan:
        """The plan of the pass."""
        return self.plan if self.shared is None else self.shared.plan

    @property
    def tolerated(self) -> dict[tuple[str, str], int]:
        """How many values that are not finite were tolerated, by (model, key), of those that this job reads."""
        counts: dict[tuple[str, str], int] = {}
        for receipt in self.receipts:
            for model, key, count in receipt.skipped:
                counts[model, key] = counts.get((model, key), 0) + count
        if not counts or self.shared is None:
            return counts
        ids = [checkpoint.id for checkpoint in self.plan.checkpoints]
        its = {(ids[source], strip.key) for strip in self.plan.strips for source in strip.sources}
        return {of: count for of, count in counts.items() if of in its}


def nobody(*_: object) -> None:
    """Is told, and does nothing."""


def warn(kept: Kept) -> None:
    """Leave a word about a draft that was kept."""
    log.warning("%s", kept)


@dataclass(frozen=True)
class Watch:
    """Who is told what of a pass, while it goes on."""

    spared: Callable[[int], None] = nobody
    """Bytes that need not be read, because an earlier run has."""
    kept: Callable[[Kept], None] = warn
    """A draft that was left for a later run."""
    made: Callable[[Result], None] = nobody
    """What a job has made, once it has its name. Should the process end before this returns, `resume` finds that."""


WARNING = Watch()
"""Nobody but the log is told."""


def run_together(
    fused: Fused,
    executor: Executor,
    store: Store,
    progress: Callable[[int], None] = nobody,
    watch: Watch = WARNING,
) -> list[Result | MergeflowError]:
    """Carry out the jobs of `fused`, whose plans have no problems, in one pass: what became of each.

    A job that cannot be made does not keep others from it: it leaves nothing, or a draft that can be resumed, and the
    others are complete and synced. Raises what concerns all of them: a worker that dies, a disk that is full.
    """
    jobs = [Drafts(plan, store) for plan in fused.alone]
    results: list[Result | None] = [None] * len(jobs)
    began = time.perf_counter()
    keep = True  # whatever ends it that is not a deliberate error
    try:
        ready = [index for index, one in enumerate(jobs) if one.begin()]
        if ready:
            if len(ready) < len(jobs):
                fused = fuse([jobs[index].plan for index in ready])  # nothing is read for those that could not begin
            made = _Pass(fused, [jobs[index] for index in ready], executor, store, progress, watch).run(began)
            for index, result in zip(ready, made, strict=True):
                results[index] = result
    except MergeflowError as error:
        keep = error.resumable
        raise
    finally:
        for one in jobs:
            one.end(keep)
            for kept in one.kept:
                watch.kept(kept)
    return [result or _why(one) for result, one in zip(results, jobs, strict=True)]


def _why(job: Drafts) -> MergeflowError:
    assert job.error is not None, "a job is finished or given up"
    return job.error


class _Pass:
    """Shards for the drafts of several jobs."""

    def __init__(
        self,
        fused: Fused,
        jobs: Sequence[Drafts],
        executor: Executor,
        store: Store,
        progress: Callable[[int], None],
        watch: Watch,
    ) -> None:
        self._fused = fused
        self._jobs = jobs
        self._executor, self._store, self._progress, self._watch = executor, store, progress, watch
        self._sources = SourceWatch([job.plan.checkpoints for job in jobs], store)
        self._repeated: set[str] = set()
        self._growing = [one for job in jobs for one in job.growing]
        self._job_of = [number for number, outputs in enumerate(fused.jobs) for _ in outputs]

    def run(self, began: float) -> list[Result | None]:
        """Do the work, and finish every job that it can be done for; None for those that it cannot."""
        plan = self._fused.plan
        left = remaining(plan, [one.extents for one in self._growing])
        self._watch.spared(left.spared)
        addresses = tuple(one.draft.address for one in self._growing)
        coverage = Coverage(plan.outputs)
        coverage.add(left.done)
        its = left.plan
        digest = TrailingDigest(
            self._store, addresses, plan.outputs, coverage, its.strips, its.memory.kept, resumed=left.done
        )
        receipts: list[Receipt] = []
        startup = 0.0
        try:
            self._look(digest)
            if not self._all_given_up() and (its.shards or not plan.shards):
                with Syncing(self._growing):
                    receipts = self._work(its, addresses, coverage, digest)
                startup = self._executor.startup_seconds
            if self._all_given_up():
                return [None] * len(self._jobs)
            for one, outputs in zip(self._jobs, self._fused.jobs, strict=True):
                if one.error is None:
                    coverage.check(outputs)
            digests = digest.result()
        finally:
            digest.stop()
        self._settle(digests)
        seconds = time.perf_counter() - began - startup
        results = [self._result(number, digests, receipts, left.done) for number in range(len(self._jobs))]
        return self._commit([replace(one, seconds=seconds, startup_seconds=startup) for one in results])

    def _work(
        self, plan: Plan, addresses: tuple[str, ...], coverage: Coverage, digest: TrailingDigest
    ) -> list[Receipt]:
        """All shards of `plan`, noted as they are done, as long as there is a job that wants them."""
        from mergeflow.execute.shard import Job  # which loads torch, and a plan needs none

        receipts: list[Receipt] = []
        job = Job(plan.for_workers(), self._store, addresses, digest if self._executor.in_process else None)
        with closing(self._executor.map(job, range(len(plan.shards)))) as made:
            for receipt in made:
                self._note(receipt, coverage, digest)
                if self._sources.due():
                    self._look(digest)
                receipts.append(receipt)
                if self._all_given_up():
                    break
                self._progress(receipt.bytes_read)
        return receipts

    def _note(self, receipt: Receipt, coverage: Coverage, digest: TrailingDigest) -> None:
        coverage.add(receipt.spans)
        if receipt.checksums and not receipt.skipped:  # what was tolerated has to be counted by the run that tells it
            for output, entries in entries_of(receipt.spans, receipt.checksums).items():
                number = self._job_of[output]
                self._jobs[number].note(output - self._fused.jobs[number].start, entries)
        for output, error in receipt.failed:
            self._give_up(self._job_of[output], error, digest)
        for model, count in receipt.repeated:
            if model not in self._repeated:  # told once; the manifest counts
                self._repeated.add(model)
                log.warning(
                    "model %s: %d read(s) failed and succeeded when repeated; its disk, server or network may be about "
                    "to fail",
                    model,
                    count,
                )
        digest.advance()

    def _give_up(self, index: int, error: MergeflowError, digest: TrailingDigest) -> None:
        for lost in self._fused.jobs[index]:
            digest.abandon(lost)
        self._jobs[index].fail(error)

    def _look(self, digest: TrailingDigest) -> None:
        """Give up the jobs whose sources have changed."""
        for index, wrong in enumerate(self._sources.look()):
            if wrong and self._jobs[index].error is None:
                self._give_up(index, wrong[0] if len(wrong) == 1 else Problems(wrong), digest)

    def _all_given_up(self) -> bool:
        return all(job.error is not None for job in self._jobs)

    def _result(self, number: int, digests: Sequence[str], receipts: Sequence[Receipt], done: Sequence[Span]) -> Result:
        its = self._fused.jobs[number]
        read = sum(receipt.bytes_read for receipt in receipts)
        return Result(
            plan=self._jobs[number].plan,
            digests=tuple(digests[output] for output in its),
            receipts=tuple(receipts),
            seconds=0.0,
            startup_seconds=0.0,
            shared=self._fused if len(self._jobs) > 1 else None,
            resumed=sum(span.end - span.begin for span in done if span.output in its),
            moved=read + sum(span.end - span.begin for receipt in receipts for span in receipt.spans),
        )

    def _settle(self, digests: Sequence[str]) -> None:
        """All that can be are made durable before any has its name: an interruption finds either all or none."""
        for one, outputs, wrong in zip(self._jobs, self._fused.jobs, self._sources.look(), strict=True):
            if one.error is None:
                one.settle([digests[output] for output in outputs], wrong)

    def _commit(self, results: Sequence[Result]) -> list[Result | None]:
        """Give them their names; what each job has made, or None."""
        with _uninterrupted():
            done = [
                result if one.error is None and one.commit() else None
                for one, result in zip(self._jobs, results, strict=True)
            ]
            for one, made in zip(self._jobs, done, strict=True):
                if made is not None:
                    self._watch.made(made)
                    one.forget()
        return done


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM are not heard within; only the main thread can be interrupted by them at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
