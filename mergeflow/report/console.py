"""The two consoles: results go to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache

from rich.console import Console

from mergeflow.redaction import redacted
from mergeflow.text import harmless


@cache
def messages() -> Console:
    """The console on stderr. There is one, because a progress bar and the log must know of each other."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def tellable(text: str) -> str:
    """`text` without what a terminal would obey, and without secrets."""
    return harmless(redacted(text))


def show(text: str) -> None:
    """A result, in lines that other programs may read; names in it cannot do anything to a terminal."""
    try:
        sys.stdout.write(tellable(text) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head` has; Python would fail once more on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class LogHandler(logging.Handler):
    """Log records as plain lines on the console that also draws the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; its level is told where it is more than information."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        messages().print(level + tellable(self.format(record)))
