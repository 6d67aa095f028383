"""How far it is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mergeflow.report.console import messages
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 5.0


class MergeProgress:
    """Bytes read of bytes to read, by who is `doing` it. A context manager; call it with the bytes of every receipt."""

    def __init__(self, total: int, doing: str = "merging") -> None:
        self._doing = doing
        self._total = total
        self._done = 0
        self._began = self._told = time.monotonic()
        self._bar: Progress | None = None
        if messages().is_terminal:
            self._bar = Progress(
                TextColumn(doing),
                BarColumn(),
                TaskProgressColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=messages(),
                transient=True,
            )
            self._task = self._bar.add_task(doing, total=total)

    def __call__(self, count: int) -> None:
        """`count` more bytes have been read, merged and written."""
        if not self._done:
            self._began = self._told = time.monotonic()  # workers may have needed seconds to start
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._told >= LINE_EVERY_SECONDS:
            self._told = time.monotonic()
            self._line()

    def spare(self, count: int) -> None:
        """`count` bytes are not to be read after all: an earlier run has."""
        self._total -= count
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def _line(self) -> None:
        rate = self._done / max(self._told - self._began, 1e-9)
        left = (self._total - self._done) / max(rate, 1.0)
        log.info(
            "%s: %s of %s (%.0f %%), %s/s, %.0f s left",
            self._doing,
            si_bytes(self._done),
            si_bytes(self._total),
            100 * self._done / max(self._total, 1),
            si_bytes(rate),
            left,
        )

    def __enter__(self) -> MergeProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
