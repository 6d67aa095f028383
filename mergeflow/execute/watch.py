"""Sources that change while they are read: noticed within seconds, and in any case before an output has its name.

The system is asked by path, by whoever shares the work out. Workers have nothing to do with it, and it is the same
for every executor.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mergeflow.errors import ReadFailed, SourceChanged, StorageError, raise_all
from mergeflow.execute.patience import patiently

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mergeflow.interfaces import Store
    from mergeflow.tensors import Checkpoint, FileStat

SECONDS = 5.0
"""Between one look at all sources and the next."""
SHARE = 0.01
"""Of the time, that looking may take at most: where a server is slow to answer, it is asked less often."""


def a_model(id: str) -> str:
    """What a source is called in messages, where it is one of a model set."""
    return f"model {id}"


def refuse_changed(
    checkpoints: Sequence[Checkpoint], store: Store, again: str, called: Callable[[str], str] = a_model
) -> None:
    """Raise if a source was written to while it was read: what came of it is of nothing that ever was.

    `again` is what to do once more; `called` makes of an id what messages call it. Raises `SourceChanged`, or another
    `StorageError` for a source that is not there.
    """
    raise_all(changes(checkpoints, _states([one.path for one in checkpoints], store), again, called))


def changes(
    checkpoints: Iterable[Checkpoint],
    now: Mapping[str, FileStat | StorageError],
    again: str = "merge",
    called: Callable[[str], str] = a_model,
) -> list[StorageError]:
    """What became of sources since they were planned with; `now` is what the system says of their paths."""
    found = [(one, change(one, now[one.path], again, called)) for one in checkpoints if one.path in now]
    return [error for _, error in found if error is not None]


def change(
    checkpoint: Checkpoint,
    now: FileStat | StorageError,
    again: str = "merge",
    called: Callable[[str], str] = a_model,
) -> StorageError | None:
    """What became of a source since it was planned with, or None if it is what it was."""
    name, path = called(checkpoint.id), checkpoint.path
    if isinstance(now, StorageError):
        return StorageError(f"{name} could be read when the run began, but now {now}; put it back as it was")
    what = checkpoint.stat.change(now)
    if what is None:
        return None
    return SourceChanged(f"{name}: {path} was changed while it was being read: {what}; {again} again")


class SourceWatch:
    """A look at the sources of several jobs, now and then."""

    def __init__(self, jobs: Sequence[Sequence[Checkpoint]], store: Store) -> None:
        self._jobs, self._store = jobs, store
        self._paths = list(dict.fromkeys(one.path for job in jobs for one in job))
        self._next = 0.0

    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._next

    def look(self) -> list[list[StorageError]]:
        """What is wrong with the sources of each job."""
        began = time.monotonic()
        now = _states(self._paths, self._store)
        ended = time.monotonic()
        self._next = ended + max(SECONDS, (ended - began) / SHARE)
        return [changes(job, now) for job in self._jobs]


def _states(paths: Iterable[str], store: Store) -> dict[str, FileStat | StorageError]:
    """What the system says of files, patiently; where one cannot be told of in the end, those after it are left out.

    What is silent is a server or a mount, rarely a file: waiting for each would take as often as long.
    """
    now: dict[str, FileStat | StorageError] = {}

    def ask() -> None:
        for path in paths:
            if isinstance(now.get(path), ReadFailed) or path not in now:
                try:
                    now[path] = store.stat(path)
                except ReadFailed as error:
                    now[path] = error
                    raise
                except StorageError as error:
                    now[path] = error

    with suppress(ReadFailed):
        patiently(ask)
    return now
