"""Whether a node sees the same files and has the same libraries, before it gets any work.

A path says little on another machine: a directory may not be mounted there, may be a disk of its own, or one that is
copied on writing. So every node looks at every source, and it must find in each draft a token that was put there from
here, and put an answer there that is found from here.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mergeflow import __version__
from mergeflow.errors import FormatError, MergeflowError
from mergeflow.formats.safetensors import LENGTH_BYTES, header_digest
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Store
    from mergeflow.tensors import FileStat

AT_ONCE = 16
"""Files looked at together: what a network file system charges for them is waiting."""
TOKEN = 16
"""Bytes of a token, and of an answer."""
LIBRARIES = ("torch", "numpy", "numba", "xxhash")
"""What does the arithmetic, what compiles it, and what proves that it was written."""
NANOSECONDS = 10**9
SAME_MODELS = "models must be at the same path on all nodes, with their times if they are copies"
SHARED = "out= must be on a file system that all nodes share"


@dataclass(frozen=True)
class Source:
    """One checkpoint as it is seen from here."""

    path: str
    stat: FileStat
    digest: str
    """Of its header."""


@dataclass(frozen=True)
class Question:
    """What a node is asked."""

    store: Store
    sources: tuple[Source, ...]
    drafts: tuple[str, ...]
    """Their addresses."""
    token: bytes
    """What lies at the beginning of each."""
    slot: int
    """The place of the answer, in lengths of a token from the beginning."""
    answer: bytes
    versions: Mapping[str, str | None]


def sources_of(job: Job) -> tuple[Source, ...]:
    """The checkpoints of a job, as the plan saw them."""
    return tuple(Source(one.path, one.stat, one.header.digest) for one in job.plan.checkpoints)


def versions() -> dict[str, str | None]:
    """What has to be the same everywhere; None for what is not installed."""
    found: dict[str, str | None] = {"Python": ".".join(platform.python_version_tuple()[:2]), "mergeflow": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]  # what follows says for which processor it was built
        except PackageNotFoundError:
            found[name] = None
    return found


def problems(question: Question) -> list[str]:
    """What is wrong on this node, in words; it answers in every draft."""
    if wrong := list(_versions_differ(question.versions, versions())):
        return wrong  # what they would read is not worth reading
    with ThreadPoolExecutor(AT_ONCE) as pool:
        reasons = list(pool.map(lambda source: _differs(source, question.store), question.sources))
        drafts = list(pool.map(lambda draft: _answer(draft, question), question.drafts))
    paths = (source.path for source in question.sources)
    return [*_grouped(zip(paths, reasons, strict=True), len(reasons)), *(reason for reason in drafts if reason)]


def _versions_differ(here: Mapping[str, str | None], there: Mapping[str, str | None]) -> Iterable[str]:
    for name, wanted in here.items():
        has = there.get(name)
        if wanted is not None and has != wanted:
            said = f"has {name} {has}" if has else f"lacks {name}"
            yield f"{said}, and the run is started with {name} {wanted}; install the same version on all nodes"


def _differs(source: Source, store: Store) -> str | None:
    """How a source is not what it is on the machine that asks."""
    try:
        stat = store.stat(source.path)
        if stat.size != source.stat.size:
            return f"has {stat.size:,} bytes, not {source.stat.size:,}"
        if abs(stat.mtime_ns - source.stat.mtime_ns) >= NANOSECONDS:  # file systems keep times more or less finely
            return f"was changed at {_when(stat.mtime_ns)}, not at {_when(source.stat.mtime_ns)}"
        with closing(store.reader(source.path)) as reader:

            def read(offset: int, count: int) -> bytes:
                buffer = bytearray(count)
                reader.read_into(memoryview(buffer), offset)
                return bytes(buffer)

            return None if header_digest(read, stat.size) == source.digest else "has another header"
    except FormatError as error:
        return str(error)
    except MergeflowError as error:
        return str(error).removeprefix(source.path).strip()


def _when(nanoseconds: int) -> str:
    return f"{datetime.fromtimestamp(nanoseconds // NANOSECONDS, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _grouped(reasons: Iterable[tuple[str, str | None]], count: int) -> Iterable[str]:
    """One sentence for all that have the same against them."""
    paths: defaultdict[str, list[str]] = defaultdict(list)
    for path, reason in reasons:
        if reason is not None:
            paths[reason].append(path)
    for reason, these in paths.items():
        names = some(these, 2)
        who = names if len(these) == 1 else f"{len(these)} of {count} sources: {names}:"
        yield _with(f"{who} {reason}", SAME_MODELS)


def _answer(draft: str, question: Question) -> str | None:
    """Look for the token in a draft, and put the answer there."""
    there = bytearray(TOKEN)
    try:
        with closing(question.store.reader(draft)) as reader:
            reader.read_into(memoryview(there), 0)
        if bytes(there) != question.token:
            return _with(f"{draft} is another file there", SHARED)
        with closing(question.store.writer(draft)) as writer:
            writer.write(memoryview(question.answer), question.slot * TOKEN)
            writer.sync()
    except MergeflowError as error:
        return _with(str(error), f"{SHARED}, and that they may write to")
    return None


def _with(problem: str, remedy: str) -> str:
    return f"{problem}{' ' if problem.endswith('?') else '; '}{remedy}"


class Drafts:
    """Tokens and answers in the beginnings of drafts; what lay there is put back.

    The beginning of a draft is the header of the file that it will be, which no shard writes.
    """

    def __init__(self, store: Store, drafts: Sequence[str]) -> None:
        self._store, self._drafts = store, drafts
        self._kept: list[bytes] = []
        self.token = os.urandom(TOKEN)
        self.places = max(min((self._head(draft) for draft in drafts), default=0) // TOKEN - 1, 1)
        """How many nodes can answer at a time."""

    def begin(self) -> None:
        """Put the token into every draft; raises `StorageError`."""
        length = TOKEN * (self.places + 1)
        self._kept = [self._read(draft, 0, length) for draft in self._drafts]
        for draft in self._drafts:
            self._write(draft, self.token)

    def question(self, store: Store, sources: tuple[Source, ...], node: str, place: int) -> Question:
        """What to ask a node, the answer of which goes to one of the places."""
        answer = hashlib.sha256(self.token + node.encode()).digest()[:TOKEN]
        return Question(store, sources, tuple(self._drafts), self.token, 1 + place, answer, versions())

    def arrived(self, question: Question) -> list[str]:
        """What is wrong with the answers, as seen from here."""
        return [
            _with(f"what it writes to {draft} does not arrive", SHARED)
            for draft in self._drafts
            if self._read(draft, TOKEN * question.slot, TOKEN) != question.answer
        ]

    def end(self) -> None:
        """Put back what lay there; raises `StorageError`. Harmless after it was done."""
        kept, self._kept = self._kept, []
        for draft, head in zip(self._drafts, kept, strict=False):
            self._write(draft, head)

    def _head(self, draft: str) -> int:
        """Bytes that lie before the tensors of a draft."""
        return LENGTH_BYTES + int.from_bytes(self._read(draft, 0, LENGTH_BYTES), "little")

    def _read(self, draft: str, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        with closing(self._store.reader(draft)) as reader:
            reader.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def _write(self, draft: str, data: bytes) -> None:
        with closing(self._store.writer(draft)) as writer:
            writer.write(memoryview(data), 0)
            writer.sync()
