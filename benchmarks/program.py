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
    from collections.abc import Mapping, Sequence

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


def timed(command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> float:
    """Seconds that a command takes; raises `ExecutorError` with what it said last if it fails."""
    began = time.perf_counter()
    output(command, cwd, environment)
    return time.perf_counter() - began


def output(command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints; raises `ExecutorError` with what it said last if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-SAID_LAST:].strip()
        raise ExecutorError(f"`{' '.join(command)}` ended with exit code {done.returncode}; it said last:\n{said}")
    return done.stdout


def command(arguments: Sequence[str]) -> list[str]:
    """What starts mergeflow with these arguments."""
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


def merge(
    models: Path,
    out: Path,
    arguments: Sequence[str],
    manifest: str = "manifest.json",
    environment: Mapping[str, str] | None = None,
) -> Ran:
    """Merge files of `models` into `out`; the manifest is that of the only job, or of the first one of a sweep."""
    every = [*arguments, "models=folder", f"models.dir={models}", f"out={out}", "selection=all"]
    wall = timed(command(every), models, environment)
    left = out / manifest
    return Ran(wall, json.loads(left.read_text("utf-8")) if left.exists() else {})


class Apart(NamedTuple):
    """How far two files are apart."""

    furthest: float
    """ULP of fp16, of the two values that are furthest apart."""
    share: float
    """Of the elements that differ at all."""


def apart(one: Path, other: Path, out: Path) -> Apart:
    """Compare two checkpoints; raises `ExecutorError` where one has a tensor, or a shape, that the other has not."""
    timed(command(["job=compare", f"a={one}", f"b={other}", f"out={out}"]), out.parent)
    total = json.loads((out / "compare.json").read_text("utf-8"))["total"]
    if unlike := {name: total[name] for name in ("only_in_a", "only_in_b", "other_shape", "nonfinite") if total[name]}:
        raise ExecutorError(f"{one} and {other} cannot be compared: {unlike}; their sources were not the same")
    return Apart(total["furthest_ulp"]["size"] if total["furthest_ulp"] else 0.0, total["share"])
