"""Runs that die: the program, killed by SIGKILL at the k-th thing that it asks of the file system.

One process has everything imported and forks for every run, which spares seconds each. In the fork, the functions of
`os` that change files are counted; at the chosen one the process ends, in the middle of what it was about to write.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PROJECT = Path(__file__).parent.parent
ACTS = ("open", "ftruncate", "pwrite", "write", "fsync", "fdatasync", "replace", "unlink")
NEVER = 0


class Death(NamedTuple):
    """How a run ended."""

    status: int
    """Its exit code; negative the signal that killed it."""
    acts: int
    """How many things it asked of the file system, if it came to its end."""
    out: str
    err: str


class Mortals:
    """Calls the program again and again, each time in a process that may die."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def run(self, directory: Path, words: Sequence[str], kill_at: int = NEVER) -> Death:
        """`python launch.py WORDS` in `directory`, until it asks the file system for the `kill_at`-th thing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"directory": str(directory), "words": list(words), "kill_at": kill_at, "log": str(self._log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        told = json.loads(line)
        out, err = (Path(f"{self._log}.{name}").read_text() for name in ("out", "err"))
        return Death(told["status"], told["acts"], out, err)


@contextmanager
def mortals(directory: Path) -> Iterator[Mortals]:
    """Somebody who can be killed; its files are in `directory`."""
    command = [sys.executable, "-m", "tests.killing"]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Mortals(process, directory / "run")
        assert process.stdin is not None
        process.stdin.close()


def serve() -> None:
    """Fork for every order on stdin, and tell on stdout how that ended."""
    for name in ("execute.local", "merge", "report.progress", "report.series", "report.summary"):
        importlib.import_module(f"mergeflow.{name}")
    from mergeflow.config.cli import main

    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _die_or_end(order, writing, main)
        os.close(writing)
        with os.fdopen(reading) as told:
            acts = told.read()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(json.dumps({"status": os.waitstatus_to_exitcode(status), "acts": int(acts or 0)}) + "\n")
        sys.stdout.flush()


def _die_or_end(order: dict[str, Any], writing: int, main: Callable[[], None]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['log']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(order["directory"])
    sys.argv = ["launch.py", *order["words"]]
    count = _count_acts(order["kill_at"])
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(str(end.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # As text, and past the functions that are counted.
        with open(writing, "w") as told:
            told.write(str(count()))
        os._exit(code)


def _count_acts(kill_at: int) -> Callable[[], int]:
    """Count what is asked of the file system from now on, and die at the `kill_at`-th; what tells the count."""
    lock = threading.Lock()
    done = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **named)
            with lock:
                done += 1
                if done == kill_at:
                    if name in ("pwrite", "write"):  # torn
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
                    elif kill_at % 2:  # just before, or just after
                        real(*arguments, **named)
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return act

    for name in ACTS:
        setattr(os, name, counted(name, getattr(os, name)))
    return lambda: done


if __name__ == "__main__":
    serve()
