"""Every deliberate error of mergeflow.

    MergeflowError                 exit code 1: the merge is impossible, or it failed
    ├── UsageError                 exit code 2: what was asked for is not a sentence
    │   ├── ConfigError            an option, a group or a value that does not exist or does not fit
    │   └── SelectionError         a list of ids that cannot be read, or whose ids do not exist
    ├── FormatError                a file is not the checkpoint that its name says
    ├── IncompatibleSources        the selected checkpoints disagree: keys, shapes, markers
    ├── OverBudget                 the memory allowed is less than the smallest block needs
    ├── UnmergeableValues          the values themselves forbid it: NaN, overflow, integers that differ
    ├── StorageError               the operating system refused: space, quota, permission, a device that fails
    │   ├── ReadFailed             a read that may succeed when it is repeated: an I/O error, a server that is silent
    │   └── SourceChanged          a source is not the file that it was when the run was planned
    ├── IncompleteOutput           receipts do not cover a draft; it is never committed
    ├── ExecutorError              a worker was lost, or the cluster cannot be reached
    │   └── HeadLost               the cluster's head answers no more
    ├── ObjectiveError             who was asked how good an output is has failed to say
    └── Problems                   several of the above, found together and shown together

Some leave the drafts of a run as good as they were: those are `resumable`, a property of the class.

The voice: what, where, the numbers, then what to do, in one or two sentences. An error holds its
message and nothing else, so that it crosses process borders unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


MOST_TOLD = 100
"""Of several errors, so many are told one by one: a file that anybody may have written can hold thousands."""


class MergeflowError(Exception):
    """The root of every error that mergeflow raises on purpose."""

    exit_code = 1
    """What the process returns when this error ends it."""
    resumable = False
    """Whether what a run has written when this ends it is worth keeping: once the cause is gone, the same plan over
    the same sources can do the rest. It says nothing about whether there are drafts, and what is in them still has to
    be checked against the disk before it counts (decision 0027)."""


class UsageError(MergeflowError):
    """What was asked for cannot be understood."""

    exit_code = 2


class ConfigError(UsageError):
    """An option, a config group or a value that does not exist or does not fit."""


class SelectionError(UsageError):
    """A list of ids that cannot be read, or that names what the model set does not have."""


class FormatError(MergeflowError):
    """A file is not what its name says."""


class IncompatibleSources(MergeflowError):
    """The selected checkpoints disagree in a way that the policies do not allow."""


class OverBudget(MergeflowError):
    """The memory that is allowed is less than the smallest block needs."""


class UnmergeableValues(MergeflowError):
    """The values forbid a right result: NaN or infinity, overflow, integers that differ."""


class StorageError(MergeflowError):
    """The operating system refused a read, a write or a rename."""

    resumable = True


class ReadFailed(StorageError):
    """A read, or a look at a file, that may succeed when it is repeated after a while."""


class SourceChanged(StorageError):
    """A source is not the file that was planned with; what is made of half the one and half the other is of neither."""

    resumable = False


class IncompleteOutput(MergeflowError):
    """Receipts do not cover a draft."""


class ExecutorError(MergeflowError):
    """A worker was lost, or a cluster cannot be reached."""

    resumable = True


class HeadLost(ExecutorError):
    """The head of a cluster answers no more; a process that has talked to it cannot end in order."""


class ObjectiveError(MergeflowError):
    """Who was asked how good an output is has failed to say."""


class Problems(MergeflowError):
    """Several errors that were found together.

    It is bad usage only if every one of them is, and a run can be resumed only after every one of them.
    """

    def __init__(self, errors: Sequence[MergeflowError]) -> None:
        self.errors = tuple(errors)
        told = [f"  - {error}" for error in self.errors[:MOST_TOLD]]
        if len(self.errors) > MOST_TOLD:
            told.append(f"  and {len(self.errors) - MOST_TOLD:,} more")
        lines = "\n".join(told)
        super().__init__(f"{len(self.errors)} problem(s):\n{lines}")
        self.exit_code = 2 if all(e.exit_code == 2 for e in self.errors) else 1
        self.resumable = all(e.resumable for e in self.errors)

    def __reduce__(self) -> tuple[type[Problems], tuple[tuple[MergeflowError, ...]]]:
        """Rebuild from the errors, not from the rendered text."""
        return Problems, (self.errors,)


def raise_all(errors: Iterable[MergeflowError]) -> None:
    """Raise what was collected: nothing, the one error itself, or all of them as `Problems`."""
    found: list[MergeflowError] = []
    for error in errors:
        found.extend(error.errors if isinstance(error, Problems) else [error])
    if len(found) == 1:
        raise found[0]
    if found:
        raise Problems(found)
