"""Where a benchmark works: a directory of its own, room for what it writes, and the machine that it runs on."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.disk import memory_bytes
from mergeflow.errors import StorageError
from mergeflow.storage.local import free_bytes
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

MARGIN = 1 << 30
"""Bytes that are left free whatever is written."""
LIBRARIES = ("mergeflow", "torch", "safetensors", "ray", "numpy")


@contextmanager
def work_dir(parent: str | None, keep: bool) -> Iterator[Path]:
    """A directory to work in: below `parent`, or a temporary one; with `keep` it outlives the benchmark.

    What is kept is always called the same, so that a later run finds the files that it would make.
    """
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
    if keep:
        place = Path(parent or tempfile.gettempdir()) / "mergeflow-benchmarks"
        place.mkdir(exist_ok=True)
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="mergeflow-benchmarks-", dir=parent) as name:
        yield Path(name)


def need(place: Path, size: int, what: str) -> None:
    """Refuse to begin what would fill the disk; raises `StorageError`."""
    free = free_bytes(str(place))
    if free < size + MARGIN:
        raise StorageError(
            f"{place} has {si_bytes(free)} free, but {what} need {si_bytes(size)} and {si_bytes(MARGIN)} beside them; "
            "name another --dir, fewer --models or a smaller --scale"
        )


def emptied(directory: Path) -> Path:
    """`directory`, there and with nothing in it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def machine(place: Path) -> dict[str, str]:
    """What the figures depend on, without a name or a path of this machine."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": si_bytes(memory_bytes()),
        "file system": _file_system(place),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    } | {name: _version(name) for name in LIBRARIES}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(place: Path) -> str:
    """The type of the file system that `place` lies on: that of the longest mount point above it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(len(fields[1]), fields[2]) for fields in mounts if place.resolve().is_relative_to(fields[1])]
    return max(above)[1] if above else "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
