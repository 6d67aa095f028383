"""The two consoles: results go to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache

from rich.console import Console


@cache
def messages() -> Console:
    """The console on stderr. There is one, because a progress bar and the log must know of each other."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show(text: str) -> None:
    """A result, as it is: it may be piped into something that reads lines."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head` has; Python would fail once more on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class LogHandler(logging.Handler):
    """Log records as plain lines on the console that also draws the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; its level is told where it is more than information."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        messages().print(level + self.format(record), markup=False)
