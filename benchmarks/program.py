"""Mergeflow as people run it: `launch.py` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergeflow.errors import ExecutorError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
SAID_LAST = 2000
"""Characters of what a failed program printed."""


class Ran(NamedTuple):
    """One run of a program that ended well."""

    wall: float
    """Seconds from the start of the process to its end."""
    manifest: dict[str, Any]
    """What it left behind; empty if it left none."""

    @property
    def seconds(self) -> float:
        """From the workers being ready to the last byte synced."""
        return float(self.manifest["seconds"])

    @property
    def startup(self) -> float:
        """Everything else: Python, torch, the plan, the workers, and their end."""
        return self.wall - self.seconds


def timed(command: Sequence[str], cwd: Path) -> float:
    """Seconds that a command takes; raises `ExecutorError` with what it said last if it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    wall = time.perf_counter() - began
    if done.returncode:
        said = done.stdout[-SAID_LAST:].strip()
        raise ExecutorError(f"`{' '.join(command)}` ended with exit code {done.returncode}; it said last:\n{said}")
    return wall


def command(arguments: Sequence[str]) -> list[str]:
    """What starts mergeflow with these arguments."""
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


def merge(models: Path, out: Path, arguments: Sequence[str], manifest: str = "manifest.json") -> Ran:
    """Merge files of `models` into `out`; the manifest is that of the only job, or of the first one of a sweep."""
    every = [*arguments, "models=folder", f"models.dir={models}", f"out={out}", "selection=all"]
    wall = timed(command(every), models)
    left = out / manifest
    return Ran(wall, json.loads(left.read_text("utf-8")) if left.exists() else {})
