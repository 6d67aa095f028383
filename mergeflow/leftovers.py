"""What already lies where outputs are to go: files, and drafts of a run that came to no end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.errors import MergeflowError, StorageError
from mergeflow.execute.journal import parse
from mergeflow.execute.takeover import has_head, usable
from mergeflow.plan.identity import identities
from mergeflow.report.manifest import NAME, output_facts, source_facts
from mergeflow.storage.local import LocalStore, exists, free_bytes, writable_problem
from mergeflow.storage.small import read_small
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from mergeflow.interfaces import Left, Store
    from mergeflow.plan.identity import OutputIdentity
    from mergeflow.plan.plan import Output, Plan

LOCAL = LocalStore()
LARGEST = 256 << 20
"""Bytes of a manifest; that of 257 models has less than one MB."""


def look_around(
    plan: Plan, out: str, store: Store, *, overwrite: bool, resume: bool
) -> tuple[list[MergeflowError], list[int]]:
    """Why the outputs could not be written where they are wanted, and the bytes of each that are left to resume."""
    problems: list[MergeflowError] = []
    cause = writable_problem(out)
    if cause is not None:
        problems.append(StorageError(f"out={out} cannot be used: {cause}; choose another out="))
    told = identities(plan) if plan.outputs else ()
    left: list[int] = []
    inputs = {(c.stat.device, c.stat.inode): c for c in plan.checkpoints}
    for output, identity in zip(plan.outputs, told, strict=True):
        found = store.left(output.path)
        count, draft_problem = _of_draft(output, identity, found, overwrite=overwrite, resume=resume)
        left.append(count)
        problems += [] if draft_problem is None else [draft_problem]
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
        elif not overwrite and not (resume and found is not None and found.size is None):
            problems.append(StorageError(f"{output.path} exists; choose another out=, or overwrite=true"))
    free, wanted = free_bytes(out), plan.bytes_written - sum(left)
    if free < wanted:
        problems.append(
            StorageError(
                f"out={out} has {si_bytes(free)} free, but the outputs need {si_bytes(wanted)}; "
                "free some space or choose another out="
            )
        )
    return problems, left


def _of_draft(
    output: Output, identity: OutputIdentity, left: Left | None, *, overwrite: bool, resume: bool
) -> tuple[int, MergeflowError | None]:
    """The bytes that can be resumed of what is left of an output, and what is wrong with it."""
    if left is None:
        return 0, None
    draft = f"{output.path}.draft"
    if left.held:
        return 0, StorageError(f"{draft} is being written by another run; wait for it, or choose another out=")
    if resume:
        try:
            usable(left.notes, identity, draft)
        except StorageError as error:
            return 0, error
        return min(parse(left.notes).claimed, output.layout.size), None
    journal = parse(left.notes)
    if overwrite or left.size is None or not journal.claimed:
        return 0, None
    done = f"{draft} has {si_bytes(journal.claimed)} that a run has made which came to no end"
    if journal.identity == identity:
        size = si_bytes(output.layout.size)
        return 0, StorageError(
            f"{done}, of the {size} of this very output; add resume=true to go on, or overwrite=true to begin afresh"
        )
    why = (
        "of what nobody can tell"
        if journal.identity is None
        else f"of another plan: {identity.differs(journal.identity)}"
    )
    return 0, StorageError(f"{done}, {why}; choose another out=, or add overwrite=true to give them up")


def made_before(plan: Plan, out: str, store: Store) -> dict[str, Any] | None:
    """The manifest of the run that has made all outputs of `plan` already, of the same sources; None if none has."""
    try:
        manifest = json.loads(read_small(Path(out) / NAME, LARGEST))
        told = {one["file"]: one for one in manifest["outputs"]}
        sources = manifest["sources"]
        for output in plan.outputs:
            facts = output_facts(output)
            its = told[Path(output.path).name]
            if any(its[name] != value for name, value in facts.items()) or not has_head(output, output.path, store):
                return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StorageError):
        return None
    same = [source_facts(checkpoint) for checkpoint in plan.checkpoints]
    return manifest if plan.outputs and isinstance(sources, list) and all(one in sources for one in same) else None


def tidy(plan: Plan, store: Store) -> None:
    """Remove what a run has noted that was stopped when its outputs had their names already."""
    for output in plan.outputs:
        left = store.left(output.path)
        if left is not None and left.size is None:
            store.reopen(output.path, output.layout.size).notes.remove()
