"""The outputs of one job on their way: begun or taken up, noted as they grow, and then named, kept or thrown away."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeflow.errors import IncompatibleSources, MergeflowError, StorageError, raise_all
from mergeflow.execute.digest import digest_of_tensors
from mergeflow.execute.journal import Entry, head, lines, parse
from mergeflow.execute.takeover import AFRESH, extents, has_head, proved, usable
from mergeflow.plan.identity import identities
from mergeflow.tensors import si_bytes
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mergeflow.interfaces import Draft, Store
    from mergeflow.plan.identity import OutputIdentity
    from mergeflow.plan.plan import Output, Plan

log = logging.getLogger(__name__)

SYNCED_EVERY = 30.0
"""Seconds of work that a power cut may cost; the kernel sends what is written to the disk about as often."""


@dataclass(frozen=True)
class Kept:
    """A draft that was left for a later run to take up."""

    address: str
    done: int
    """Bytes that are noted as written."""
    size: int
    resuming: bool
    """Whether this run had taken it up itself."""

    @property
    def to_go_on(self) -> str:
        """What to type."""
        return "type the same command line again" if self.resuming else "add resume=true to the same command line"

    def __str__(self) -> str:
        done = f"{si_bytes(self.done)} of {si_bytes(self.size)} are done"
        return f"{self.address} was kept, {done}; to go on, {self.to_go_on}"


def hint(kept: Sequence[Kept]) -> str:
    """What to type to go on; `kept` has at least one draft."""
    if len(kept) == 1:
        return str(kept[0])
    done, size = sum(one.done for one in kept), sum(one.size for one in kept)
    return (
        f"{len(kept)} drafts were kept ({some([one.address for one in kept])}), {si_bytes(done)} of {si_bytes(size)} "
        f"are done; to go on, {kept[0].to_go_on}"
    )


class Growing:
    """One draft, with what is noted of it."""

    def __init__(self, output: Output, draft: Draft, identity: OutputIdentity, there: tuple[Entry, ...]) -> None:
        self.output, self.draft = output, draft
        self.extents = extents(there)
        """What of it an earlier run has made, in runs of bytes that do not touch."""
        self.noted = sum(entry.end - entry.begin for entry in there)
        """Bytes that its notes tell of."""
        self._head = head(identity)
        self._noting = True

    def note(self, entries: Sequence[Entry]) -> None:
        """Tell a later run of what was written; where that fails, the run goes on, and could be resumed from here."""
        if not self._noting:
            return
        begun = b"" if self.noted else self._head
        try:
            self.draft.notes.append(begun + lines(entries))
        except StorageError as error:
            self._noting = False
            log.warning("%s; the run goes on, but what it does from now on could not be resumed", error)
        else:
            self.noted += sum(entry.end - entry.begin for entry in entries)

    def leave(self, resuming: bool) -> Kept | None:
        """Keep it if that is worth it, or throw it away."""
        if not self.noted or self.draft.named:
            (self.draft.keep if self.draft.named else self.draft.discard)()
            return None
        self.draft.keep()
        return Kept(self.draft.address, self.noted, self.output.layout.size, resuming)


class Drafts:
    """All outputs of a job."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.growing: list[Growing] = []
        self.kept: list[Kept] = []
        """What was left for a later run."""
        self.error: MergeflowError | None = None
        self._store = store
        self._ended = False

    def begin(self) -> bool:
        """Open the drafts and write their heads; False if that failed."""
        try:
            for output, identity in zip(self.plan.outputs, identities(self.plan), strict=True):
                if (taken_up := self._taken_up(output, identity)) is not None:
                    self.growing.append(taken_up)
                    continue
                with _interruptions_held():  # or what has just been made would be nobody's to remove
                    self.growing.append(self._begun(output, identity))
            for one in self.growing:
                if not one.draft.named:
                    with closing(self._store.writer(one.draft.address)) as writer:
                        writer.write(memoryview(one.output.layout.head), 0)
        except MergeflowError as error:
            self.fail(error)
        return self.error is None

    def _begun(self, output: Output, identity: OutputIdentity) -> Growing:
        return Growing(output, self._store.draft(output.path, output.layout.size), identity, ())

    def _taken_up(self, output: Output, identity: OutputIdentity) -> Growing | None:
        """What an earlier run has left of an output; None where it is to be begun."""
        left = self._store.left(output.path) if self.plan.resume else None
        if left is None:
            return None
        draft = self._store.reopen(output.path, output.layout.size)
        there: tuple[Entry, ...] = ()
        try:
            notes = draft.notes.read()
            entries = usable(notes, identity, draft.address)
            there = proved(entries, output, draft.address, self._store)
            if draft.named and not (self._whole(output, there) and has_head(output, draft.address, self._store)):
                raise StorageError(f"{output.path} exists, and is not what its journal says; {AFRESH}")
            if there and not draft.named:
                draft.notes.rewrite(head(identity) + lines(there))  # what is torn or wrong must not stay among it
        except BaseException:
            draft.keep()
            raise
        _tell(draft.address, left.size, parse(notes).damaged, len(entries) - len(there), there, output)
        if there:
            return Growing(output, draft, identity, there)
        draft.discard()  # nothing of it can be used, so it is not worth more than a new one
        return None

    @staticmethod
    def _whole(output: Output, there: Sequence[Entry]) -> bool:
        begin, end = output.data
        return extents(there) == ([(begin, end)] if begin < end else [])

    def note(self, index: int, entries: Sequence[Entry]) -> None:
        """Bytes of the output with that index were written."""
        if self.error is None:
            self.growing[index].note(entries)

    def fail(self, error: MergeflowError) -> None:
        """Give the job up; the first reason counts. What is worth it is kept, if the job can be resumed after it."""
        self.error = self.error or error
        self.end(keep=error.resumable)

    def settle(self, digests: Sequence[str], wrong: Sequence[MergeflowError]) -> None:
        """Check that the outputs are what they should be, and make them durable; `wrong` is with the sources."""
        try:
            raise_all(wrong)
            _same_as_recorded(self.plan, digests, self._store)
            for one in self.growing:
                one.draft.sync()
                one.draft.notes.sync()
        except MergeflowError as error:
            self.fail(error)

    def commit(self) -> bool:
        """Give the outputs their names; False if that failed. Notes stay, should a later name be refused."""
        try:
            for one in self.growing:
                one.draft.commit()
        except MergeflowError as error:
            self.fail(error)
        return self.error is None

    def forget(self) -> None:
        """Remove the notes of outputs that have their names."""
        for one in self.growing:
            with suppress(StorageError):  # whoever makes the same output again finds that it is there
                one.draft.notes.remove()

    def end(self, keep: bool) -> None:
        """Leave no draft, or those that a later run can take up. Harmless after a commit."""
        if self._ended:
            return
        self._ended = True
        for one in self.growing:
            if keep:
                kept = one.leave(self.plan.resume)
                self.kept += [] if kept is None else [kept]
            else:
                one.draft.discard()


class Syncing:
    """A thread that makes notes durable now and then, so that nobody who works waits for the disk."""

    def __init__(self, growing: Iterable[Growing]) -> None:
        self._growing = tuple(growing)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notes", daemon=True)

    def __enter__(self) -> Syncing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SYNCED_EVERY):
            for one in self._growing:
                with suppress(StorageError):  # a disk that fails is told by what is written to it
                    one.draft.notes.sync()


def _tell(address: str, size: int | None, damaged: int, wrong: int, there: Sequence[Entry], output: Output) -> None:
    """What became of what was left, into the log."""
    whole, found = output.layout.size, sum(entry.end - entry.begin for entry in there)
    log.info("%s: %s of %s are there and right", address, si_bytes(found), si_bytes(whole))
    if size is not None and size != whole:
        log.warning("%s had %d bytes, not %d; what is missing is made again", address, size, whole)
    if damaged:
        log.warning("%s: %d line(s) of its journal are torn or damaged; they count for nothing", address, damaged)
    if wrong:
        log.warning("%s: %d run(s) of bytes are not what was written; they are made again", address, wrong)


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


@contextmanager
def _interruptions_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM are heard when this has ended; only the main thread can be interrupted by them at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
