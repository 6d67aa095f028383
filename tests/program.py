"""The program called within the test's own process, where torch is there already: in a new one that takes seconds.

What it changes in the process is undone after each call: logging, SIGTERM, the environment, Hydra's own state.
"""

from __future__ import annotations

import io
import logging
import os
import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, NamedTuple, Protocol
from unittest import mock

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from mergeflow.config.cli import main
from mergeflow.config.jobs import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator


class Done(NamedTuple):
    """What came of a call."""

    code: int
    out: str
    err: str
    both: str
    """Both streams, in the order in which they were written."""


class Call(Protocol):
    """Call the program with these arguments."""

    def __call__(self, *arguments: str) -> Done: ...


def call(*arguments: str) -> Done:
    """What `python launch.py` does with these arguments, in the working directory."""
    both = io.StringIO()
    out, err = _Stream(both), _Stream(both)
    with _as_it_was(), redirect_stdout(out), redirect_stderr(err), mock.patch("sys.argv", ["launch.py", *arguments]):
        Outcome.code, Outcome.finished, Outcome.begun, Outcome.told, Outcome.kept = 0, 0, False, [], []
        with pytest.raises(SystemExit) as end:
            main()
        GlobalHydra.instance().clear()
        assert not Outcome.begun or HydraConfig.instance().cfg is None, "whoever has run a job leaves no config behind"
    return Done(int(str(end.value.code)), out.getvalue(), err.getvalue(), both.getvalue())


class _Stream(io.StringIO):
    """One of two streams that also write to a common one."""

    def __init__(self, both: io.StringIO) -> None:
        super().__init__()
        self._both = both

    def write(self, text: str) -> int:
        self._both.write(text)
        return super().write(text)


@contextmanager
def _as_it_was() -> Iterator[None]:
    root, terminated = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    full_errors = os.environ.get("HYDRA_FULL_ERROR")
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        signal.signal(signal.SIGTERM, terminated)
        root.handlers[:], root.level = handlers, level
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full_errors is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_errors
