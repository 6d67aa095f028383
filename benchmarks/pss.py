"""The memory of a program and of every process that it starts, sampled while it runs.

What is counted is the proportional set size (PSS): pages that several processes share are divided among them, so that
the sum over all processes is what the machine has less. Processes are told by a word in their environment, which they
inherit: those of Ray outlive the parents that they had.
"""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

MARK = "MERGEFLOW_BENCHMARK"
EVERY_SECONDS = 0.1
PROC = Path("/proc")


class Pss(NamedTuple):
    """Bytes of memory."""

    total: int = 0
    files: int = 0
    """Of them pages of files, such as libraries: the system can drop and read them again."""

    @property
    def own(self) -> int:
        """Bytes that are no pages of files."""
        return self.total - self.files

    def plus(self, other: Pss) -> Pss:
        """The memory of both."""
        return Pss(self.total + other.total, self.files + other.files)


def parse(rollup: str) -> Pss:
    r"""What `/proc/PID/smaps_rollup` says.

    >>> parse("Rss: 900 kB\nPss: 700 kB\nPss_Dirty: 5 kB\nPss_Anon: 400 kB\nPss_File: 300 kB\n")
    Pss(total=716800, files=307200)
    """
    lines = (line.split() for line in rollup.splitlines())
    told = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}
    return Pss(told.get("Pss", 0), told.get("Pss_File", 0))


class Watch:
    """Samples the processes that are started with `environment`, for as long as the context lasts."""

    def __init__(self, every: float = EVERY_SECONDS) -> None:
        word = uuid.uuid4().hex
        self.environment = {**os.environ, MARK: word}
        self.peak = Pss()
        """The sample with the largest total."""
        self.samples = 0
        self._mark = f"{MARK}={word}".encode()
        self._every = every
        self._others: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        # Whoever runs already is none of ours; asking all of them each time would cost what is measured.
        self._others = set(_pids())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ours: set[int] = set()
        while not self._ended.wait(self._every):
            there = set(_pids())
            ours &= there
            self._others &= there
            # Asked again each time: a process has the environment of its parent until it becomes another program.
            ours |= {pid for pid in there - ours - self._others if self._is_ours(pid)}
            now = Pss()
            for pid in ours:
                now = now.plus(_pss(pid))
            self.samples += 1
            self.peak = max(self.peak, now)

    def _is_ours(self, pid: int) -> bool:
        try:
            return self._mark in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:  # it is gone, or somebody else's
            return False


def _pids() -> list[int]:
    return [int(name) for name in (path.name for path in PROC.iterdir()) if name.isdigit()]


def _pss(pid: int) -> Pss:
    try:
        return parse((PROC / str(pid) / "smaps_rollup").read_text())
    except OSError:  # it has ended meanwhile
        return Pss()
