"""The whole program: open, plan, run, commit.

request = Request(...)
plan = open_plan(request)        # headers are read, everything is decided
result = run(plan, executor)     # drafts, shards, receipts, commit
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergeflow.errors import MergeflowError, raise_all
from mergeflow.formats.safetensors import Safetensors
from mergeflow.inputs import Inputs, open_checkpoint, silent
from mergeflow.leftovers import look_around, made_before, tidy
from mergeflow.passes import WARNING, Result, Watch, nobody, run_together
from mergeflow.plan.assemble import make_assembly
from mergeflow.plan.fuse import fuse
from mergeflow.plan.make import make_plan
from mergeflow.plan.pace import WORTH_A_LOOK, paced
from mergeflow.storage.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergeflow.inputs import Progress
    from mergeflow.interfaces import Executor, Store
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.assembly import Assembly
    from mergeflow.recipe.request import Request

__all__ = [
    "Result",
    "Watch",
    "look",
    "made_before",
    "open_assembly",
    "open_plan",
    "run",
    "run_together",
    "store_of",
    "tidy",
]

LOCAL = LocalStore()


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
    plan = replace(plan, problems=tuple(problems), notes=inputs.notes + plan.notes)
    return _placed(plan, request.out, store, overwrite=request.overwrite, resume=request.resume)


def open_assembly(assembly: Assembly, store: Store = LOCAL) -> Plan:
    """Read the headers of the parts and decide everything; what forbids it is in `plan.problems`, all of it."""
    format = Safetensors()
    opened = [open_checkpoint(id, path, store, format) for path, id in assembly.ids.items()]
    problems = [one for one in opened if isinstance(one, MergeflowError)]
    plan = make_assembly(assembly, [one for one in opened if not isinstance(one, MergeflowError)], format)
    problems += plan.problems
    plan = replace(plan, problems=tuple(problems))
    return _placed(plan, assembly.out, store, overwrite=assembly.overwrite, resume=assembly.resume)


def _placed(plan: Plan, out: str, store: Store, *, overwrite: bool, resume: bool) -> Plan:
    """The plan, with what is wrong with the place of its outputs, and what is to be resumed there."""
    problems, left = look_around(plan, out, store, overwrite=overwrite, resume=resume)
    return replace(plan, problems=plan.problems + tuple(problems), resume=resume, left=tuple(left))


def run(
    plan: Plan,
    executor: Executor,
    store: Store = LOCAL,
    progress: Callable[[int], None] = nobody,
    watch: Watch = WARNING,
) -> Result:
    """Carry out `plan`; `progress` is told the bytes read with every receipt, `watch` what else there is to tell.

    Raises what forbids the plan, and whatever the work meets. Either every output is there under its final name,
    complete and synced, or none that this run wrote. (All are synced before the first is renamed; should the system
    refuse to rename a later one, those before it are there, and whole.) Where a later run could go on, drafts are kept.
    """
    raise_all(plan.problems)
    (outcome,) = run_together(fuse([plan]), executor, store, progress, watch)
    if isinstance(outcome, MergeflowError):
        raise outcome
    return outcome


def look(plan: Plan) -> Plan:
    """The same plan, with the figures of a sample of its reading and merging, and cut as suits these.

    At most a hundredth of what it will read is read, in half a second; nothing is where the plan is small or has
    problems, and then it is returned as it is.
    """
    if plan.bytes_read < WORTH_A_LOOK or plan.problems:
        return plan
    from mergeflow.execute.probe import probe  # which loads torch

    measured = probe(plan, store_of(plan))
    return plan if measured is None else paced(plan, measured)


def store_of(plan: Plan, executor: Executor | None = None) -> LocalStore:
    """The local store that reads as `plan` wants it, and writes as suits `executor`."""
    hashed_in_memory = executor is not None and executor.in_process  # or the digest reads back what was written
    return LocalStore(plan.budget.io, plan.memory.landing, not hashed_in_memory or plan.budget.io == "buffered")
