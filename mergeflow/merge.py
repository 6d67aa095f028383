"""The whole program: open, plan, run, commit.

request = Request(...)
plan = open_plan(request)        # headers are read, everything is decided
result = run(plan, executor)     # drafts, shards, receipts, commit
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeflow.errors import IncompatibleSources, MergeflowError, StorageError, raise_all
from mergeflow.execute.coverage import Coverage
from mergeflow.execute.digest import TrailingDigest, digest_of_tensors
from mergeflow.formats.safetensors import Safetensors
from mergeflow.inputs import Inputs, silent
from mergeflow.plan.make import make_plan
from mergeflow.storage.local import LocalStore, exists, free_bytes, writable_problem
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mergeflow.inputs import Progress
    from mergeflow.interfaces import Draft, Executor, Receipt, Store
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.request import Request

LOCAL = LocalStore()


@dataclass(frozen=True)
class Result:
    """What a run has made."""

    plan: Plan
    digests: tuple[str, ...]
    """SHA-256 of the tensors of each output, in hex."""
    receipts: tuple[Receipt, ...]
    seconds: float
    """From the first draft to the last byte synced, without `startup_seconds`."""
    startup_seconds: float
    """What the executor needed before its workers were ready."""

    @property
    def tolerated(self) -> dict[tuple[str, str], int]:
        """How many values that are not finite were tolerated, by (model, key)."""
        counts: dict[tuple[str, str], int] = {}
        for receipt in self.receipts:
            for model, key, count in receipt.skipped:
                counts[model, key] = counts.get((model, key), 0) + count
        return counts


def open_plan(request: Request, store: Store = LOCAL, progress: Progress = silent) -> Plan:
    """Find the models, read their headers, decide everything.

    Raises `UsageError` if the request names what does not exist. Whatever else forbids the merge (bad files,
    sources that disagree, an output that exists) is in `plan.problems`, all of it. `progress` is told what is read
    of whole files, where they have to be hashed.
    """
    format = Safetensors()
    inputs = Inputs(request, store, format, progress)
    recipe = inputs.recipe()
    checkpoints, problems = inputs.checkpoints(recipe)
    plan = make_plan(recipe, checkpoints, format, request.out)
    problems += plan.problems
    problems += _output_problems(plan, request)
    return replace(plan, problems=tuple(problems), notes=inputs.notes + plan.notes)


def run(
    plan: Plan,
    executor: Executor,
    store: Store = LOCAL,
    progress: Callable[[int], None] = lambda _: None,
) -> Result:
    """Carry out `plan`; `progress` is told the bytes read with every receipt.

    Raises what forbids the plan, and whatever the work meets. Either every output is there under its final name,
    complete and synced, or none that this run wrote. (All are synced before the first is renamed; should the system
    refuse to rename a later one, those before it are there, and whole.)
    """
    from mergeflow.execute.shard import Job

    raise_all(plan.problems)
    began = time.perf_counter()
    drafts: list[Draft] = []
    digest: TrailingDigest | None = None
    try:
        for output in plan.outputs:
            drafts.append(store.draft(output.path, output.layout.size))
        addresses = tuple(draft.address for draft in drafts)
        _write_heads(plan, store, addresses)
        coverage = Coverage(plan.outputs)
        digest = TrailingDigest(store, addresses, plan.outputs, coverage)
        receipts = []
        with closing(executor.map(Job(plan.for_workers(), store, addresses), range(len(plan.shards)))) as made:
            for receipt in made:
                coverage.add(receipt.spans)
                digest.advance()
                receipts.append(receipt)
                progress(receipt.bytes_read)
        coverage.check()
        digests = digest.result()
        _unchanged(plan, store)
        _same_as_recorded(plan, digests, store)
        _commit(drafts)
    finally:
        if digest is not None:
            digest.stop()
        for draft in drafts:
            draft.discard()
    startup = executor.startup_seconds
    return Result(plan, tuple(digests), tuple(receipts), time.perf_counter() - began - startup, startup)


def _commit(drafts: Sequence[Draft]) -> None:
    """Give every draft its name. Once the first has its own, an interruption would leave some there and some not."""
    for draft in drafts:
        draft.sync()  # all are durable before any has its name
    with _uninterrupted():
        for draft in drafts:
            draft.commit()


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


def _output_problems(plan: Plan, request: Request) -> list[MergeflowError]:
    """Why the outputs could not be written where they are wanted; nothing is created to find out."""
    problems: list[MergeflowError] = []
    cause = writable_problem(request.out)
    if cause is not None:
        problems.append(StorageError(f"out={request.out} cannot be used: {cause}; choose another out="))
    free = free_bytes(request.out)
    if free < plan.bytes_written:
        problems.append(
            StorageError(
                f"out={request.out} has {si_bytes(free)} free, but the outputs need {si_bytes(plan.bytes_written)}; "
                "free some space or choose another out="
            )
        )
    inputs = {(c.stat.device, c.stat.inode): c for c in plan.checkpoints}
    for output in plan.outputs:
        if not exists(output.path):
            continue
        try:
            there = LOCAL.stat(output.path)
        except StorageError as error:
            problems.append(error)
            continue
        source = inputs.get((there.device, there.inode))
        if source is not None:
            problems.append(
                StorageError(f"{output.path} is model {source.id} itself ({source.path}); choose another out= or file")
            )
        elif not request.overwrite:
            problems.append(StorageError(f"{output.path} exists; choose another out=, or overwrite=true"))
    return problems


def _write_heads(plan: Plan, store: Store, addresses: Sequence[str]) -> None:
    for output, address in zip(plan.outputs, addresses, strict=True):
        writer = store.writer(address)
        try:
            writer.write(memoryview(output.layout.head), 0)
        finally:
            writer.close()


def _unchanged(plan: Plan, store: Store) -> None:
    """A source that was written to while it was read has spoiled the result."""
    changed = [
        StorageError(f"model {checkpoint.id}: {checkpoint.path} was changed while it was being read; merge again")
        for checkpoint in plan.checkpoints
        if store.stat(checkpoint.path) != checkpoint.stat
    ]
    raise_all(changed)


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
