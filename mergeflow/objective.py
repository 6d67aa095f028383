"""What somebody thinks of an output, as a number: a sweeper that optimises asks for it."""

from __future__ import annotations

import importlib
import math
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mergeflow.errors import ConfigError, ObjectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Score: TypeAlias = "float | tuple[float, ...] | None"
"""One number for each output; a number alone where there is one output."""
FILE = "{file}"
SHOWN_LINES = 20


@dataclass(frozen=True)
class Objective:
    """Who is asked: a program, or a function."""

    command: str | None = None
    """A command line, in which `{file}` stands for the path; the last line that it prints is the number."""
    target: str | None = None
    """`package.module.function`, which is called with the path and returns the number."""


def check(objective: Objective) -> None:
    """Raise `ConfigError` if nobody could be asked: better now than after the merge."""
    if objective.command is None:
        _function(str(objective.target))
        return
    try:
        words = shlex.split(objective.command)
    except ValueError as error:
        raise ConfigError(f"objective.command={objective.command} cannot be read: {error}") from error
    if FILE not in objective.command:
        raise ConfigError(f"objective.command={objective.command} does not say which file; write {FILE} where it goes")
    if shutil.which(words[0]) is None:
        raise ConfigError(f"objective.command={objective.command}: there is no program {words[0]} that can be run")


def score(objective: Objective, paths: Sequence[str]) -> Score:
    """What `objective` says of each file; raises `ObjectiveError` with what the program printed."""
    found = tuple(
        _of_command(objective.command, path) if objective.command else _of_function(objective, path) for path in paths
    )
    return found[0] if len(found) == 1 else found


def _of_command(command: str, path: str) -> float:
    words = [word.replace(FILE, path) for word in shlex.split(command)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ObjectiveError(f"objective.command cannot be run: {words[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise ObjectiveError(f"objective.command ended with {done.returncode} for {path}; it printed:\n{_shown(done)}")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    try:
        return _number(lines[-1] if lines else "nothing")
    except ValueError:
        raise ObjectiveError(
            f"objective.command must end with a line that is a number, for {path}; it printed:\n{_shown(done)}"
        ) from None


def _of_function(objective: Objective, path: str) -> float:
    name = str(objective.target)
    try:
        return _number(_function(name)(path))
    except Exception as error:
        raise ObjectiveError(f"objective.target={name} failed for {path}: {type(error).__name__}: {error}") from error


def _function(name: str) -> Callable[[str], object]:
    """What is called `name`; modules in the working directory are found as well, last."""
    here = str(Path.cwd())
    module, _, function = name.rpartition(".")
    sys.path.append(here)
    try:
        found: Callable[[str], object] = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(f"objective.target={name} cannot be found ({error}); give package.module.function") from error
    finally:
        sys.path.remove(here)
    return found


def _number(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]  # what cannot be one raises, which is what is asked
    if math.isnan(number):
        raise ValueError("it is NaN")
    return number


def _shown(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of what a program printed, its errors last."""
    lines = (done.stdout + done.stderr).splitlines()[-SHOWN_LINES:]
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"
