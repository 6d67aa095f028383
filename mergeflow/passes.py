"""One pass over the sources: drafts, shards, receipts, and for every job either all of its outputs or none."""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeflow.errors import IncompatibleSources, MergeflowError, Problems, raise_all
from mergeflow.execute.coverage import Coverage
from mergeflow.execute.digest import TrailingDigest, digest_of_tensors
from mergeflow.execute.watch import SourceWatch
from mergeflow.plan.fuse import fuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mergeflow.interfaces import Draft, Executor, Receipt, Store
    from mergeflow.plan.fuse import Fused
    from mergeflow.plan.plan import Plan


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


def run_together(
    fused: Fused,
    executor: Executor,
    store: Store,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Result | MergeflowError]:
    """Carry out the jobs of `fused`, whose plans have no problems, in one pass: what became of each.

    A job that cannot be made does not keep others from it: it leaves nothing, and the others are complete and synced.
    Raises what concerns all of them: a worker that dies, a disk that is full.
    """
    drafts = [_Drafts(plan, store) for plan in fused.alone]
    began = time.perf_counter()
    try:
        ready = [one for one in drafts if one.begin()]
        if ready:
            if len(ready) < len(drafts):
                fused = fuse([one.plan for one in ready])  # nothing is read for those that could not begin
            _Pass(fused, ready, executor, store, progress).run(began)
    finally:
        for one in drafts:
            one.discard()
    return [one.outcome() for one in drafts]


class _Drafts:
    """The outputs of one job, on their way."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.store = store
        self.drafts: list[Draft] = []
        self.error: MergeflowError | None = None
        self.result: Result | None = None

    def begin(self) -> bool:
        """Open the drafts and write their heads; False if that failed."""
        try:
            for output in self.plan.outputs:
                self.drafts.append(self.store.draft(output.path, output.layout.size))
            for output, draft in zip(self.plan.outputs, self.drafts, strict=True):
                with closing(self.store.writer(draft.address)) as writer:
                    writer.write(memoryview(output.layout.head), 0)
        except MergeflowError as error:
            self.fail(error)
        return self.error is None

    def fail(self, error: MergeflowError) -> None:
        """Give the job up; the first reason counts."""
        self.error = self.error or error
        self.discard()

    def settle(self, digests: Sequence[str], wrong: Sequence[MergeflowError]) -> None:
        """Check that the outputs are what they should be, and make them durable; `wrong` is with the sources."""
        try:
            raise_all(wrong)
            _same_as_recorded(self.plan, digests, self.store)
            for draft in self.drafts:
                draft.sync()
        except MergeflowError as error:
            self.fail(error)

    def commit(self, result: Result) -> None:
        """Give the outputs their names."""
        try:
            for draft in self.drafts:
                draft.commit()
        except MergeflowError as error:
            self.fail(error)
        else:
            self.result = result

    def discard(self) -> None:
        """Leave no draft. Harmless after a commit."""
        for draft in self.drafts:
            draft.discard()

    def outcome(self) -> Result | MergeflowError:
        """What became of it."""
        outcome = self.result or self.error
        assert outcome is not None, "a job is finished or given up"
        return outcome


class _Pass:
    """Shards for the drafts of several jobs."""

    def __init__(
        self,
        fused: Fused,
        jobs: Sequence[_Drafts],
        executor: Executor,
        store: Store,
        progress: Callable[[int], None],
    ) -> None:
        self._fused = fused
        self._jobs = jobs
        self._executor, self._store, self._progress = executor, store, progress
        self._sources = SourceWatch([job.plan.checkpoints for job in jobs], store)
        self._repeated: set[str] = set()

    def run(self, began: float) -> None:
        """Do the work, and finish every job that it can be done for."""
        from mergeflow.execute.shard import Job  # which loads torch, and a plan needs none

        plan = self._fused.plan
        addresses = tuple(draft.address for job in self._jobs for draft in job.drafts)
        coverage = Coverage(plan.outputs)
        digest = TrailingDigest(self._store, addresses, plan.outputs, coverage, plan.strips, plan.memory.kept)
        receipts: list[Receipt] = []
        try:
            self._look(digest)
            if self._all_given_up():
                return
            job = Job(plan.for_workers(), self._store, addresses, digest if self._executor.in_process else None)
            with closing(self._executor.map(job, range(len(plan.shards)))) as made:
                for receipt in made:
                    self._note(receipt, coverage, digest)
                    if self._sources.due():
                        self._look(digest)
                    if self._all_given_up():
                        return
                    receipts.append(receipt)
                    self._progress(receipt.bytes_read)
            for one, outputs in zip(self._jobs, self._fused.jobs, strict=True):
                if one.error is None:
                    coverage.check(outputs)
            digests = digest.result()
        finally:
            digest.stop()
        self._finish([tuple(digests[output] for output in outputs) for outputs in self._fused.jobs], receipts, began)

    def _finish(self, digests: Sequence[tuple[str, ...]], receipts: Sequence[Receipt], began: float) -> None:
        """All that can be are made durable before any has its name: an interruption finds either all or none."""
        for one, its, wrong in zip(self._jobs, digests, self._sources.look(), strict=True):
            if one.error is None:
                one.settle(its, wrong)
        startup = self._executor.startup_seconds
        shared = self._fused if len(self._jobs) > 1 else None
        seconds = time.perf_counter() - began - startup
        with _uninterrupted():
            for one, its in zip(self._jobs, digests, strict=True):
                if one.error is None:
                    one.commit(Result(one.plan, its, tuple(receipts), seconds, startup, shared))

    def _note(self, receipt: Receipt, coverage: Coverage, digest: TrailingDigest) -> None:
        coverage.add(receipt.spans)
        for output, error in receipt.failed:
            index = next(index for index, outputs in enumerate(self._fused.jobs) if output in outputs)
            self._give_up(index, error, digest)
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


def _same_as_recorded(plan: Plan, digests: Sequence[str], store: Store) -> None:
    """A recipe that is replayed makes the tensors of the file it was read from, or its sources are not the same."""
    different = []
    for output, digest in zip(plan.outputs, digests, strict=True):
        path = output.target.same_as
        recorded = digest if path is None else digest_of_tensors(path, store)
        if recorded != digest:
            different.append(
                IncompatibleSources(
                    f"the tensors of {output.target.file} are not those of {path}, whose recipe this is: their "
                    f"SHA-256 is {digest[:16]}..., not {recorded[:16]}...; a source has other values than then; find "
                    "the file of then, or choose recipe.check=false to have what is made now"
                )
            )
    raise_all(different)
