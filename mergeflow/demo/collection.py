"""The demo model set as a directory: made when it is missing, mended when it is damaged, otherwise left alone.

An index beside the files says what each of them is. A file whose size and time of change are the recorded ones is
taken to be intact, as git does it; one that was touched or copied must have the recorded SHA-256. An index written by
another generator, or for another architecture, counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.demo.catalogue import DEMO_MODELS, MOST_MODELS, SEED, demo_models
from mergeflow.errors import StorageError
from mergeflow.storage.local import DRAFT_SUFFIX, LocalStore
from mergeflow.tensors import si_bytes
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mergeflow.demo.catalogue import DemoModel
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.tensors import Layout

    Progress = Callable[[int, int], None]
    """`progress(done, total)`, in models."""

INDEX = "demo.json"
DIVISOR = 32
"""By how much a layer is narrower than a real one: a model has 7 MB instead of 7 GB."""
VERSION = 1
"""Of the generator; raise it when a variant comes to have other bytes."""
MOST_WORKERS = 4
"""More threads than this only wait for one another: each of the short calls that make a tile needs the interpreter."""


class Entry(NamedTuple):
    """What the index says of one file."""

    size: int
    mtime_ns: int
    sha256: str


def ensure_demo(
    directory: Path | str,
    architecture: Architecture,
    *,
    count: int = len(DEMO_MODELS),
    progress: Progress | None = None,
    workers: int = 0,
) -> bool:
    """Make what is missing or damaged of the demo model set, and say whether anything was.

    Args:
        directory: Where the set lies. One that holds other files, but no demo set, is refused: it is somebody's own.
        architecture: SDXL at full size.
        count: How many models it has. A directory that holds the files of more is refused.
        progress: Told after every model; without it, a bar is drawn on stderr if that is a terminal.
        workers: How many models are made at once; 0 is as many as help.
    """
    directory = Path(directory)
    models = demo_models(count)
    stamp = _stamp(architecture, models)
    _refuse_to_join_others(directory, models)
    recorded = _read_index(directory / INDEX, stamp)
    checked = ((model.filename, _checked(directory, model.filename, recorded)) for model in models)
    intact = {name: entry for name, entry in checked if entry is not None}
    damaged = [model for model in models if model.filename not in intact]
    try:
        if damaged:
            workers = workers or min(MOST_WORKERS, os.cpu_count() or 1)
            _make(directory, architecture, damaged, intact, progress, workers, len(models))
    finally:
        if intact != recorded:
            # Without an index, models are made once more than needed; that is no reason to fail.
            with suppress(OSError):
                _write_index(directory / INDEX, stamp, intact)
    return bool(damaged)


def _refuse_to_join_others(directory: Path, models: Sequence[DemoModel]) -> None:
    """Somebody who names a folder of their own and no `models=` must not find 44 files more in it."""
    if not directory.is_dir():
        return
    ours = {model.filename for model in models}
    if (directory / INDEX).exists():
        known = {model.filename for model in (*DEMO_MODELS, *demo_models(MOST_MODELS))}
        if others := sorted(name for name in known - ours if (directory / name).exists()):
            raise StorageError(
                f"{directory} holds a demo model set of another size ({some(others, 2)} are not in one of "
                f"{len(models)}); choose another models.dir or models.count"
            )
        return
    others = sorted(path.name for path in directory.iterdir() if path.name.removesuffix(DRAFT_SUFFIX) not in ours)
    if others:
        raise StorageError(
            f"{directory} holds {some(others, 2)}, and the demo model set would be made among them; for models of your "
            "own choose models=round1, models=folder or models=files"
        )


def _make(
    directory: Path,
    architecture: Architecture,
    models: Sequence[DemoModel],
    entries: dict[str, Entry],
    progress: Progress | None,
    workers: int,
    count: int,
) -> None:
    """Make `models`, and enter each as soon as it is there."""
    # Here, because an intact set needs none of what the generator stands on.
    from mergeflow.demo.generate import layout_of, write

    small = architecture.scaled(DIVISOR)
    layouts = [layout_of(small, model.variant) for model in models]

    def make(model: DemoModel, layout: Layout) -> tuple[str, Entry]:
        path = directory / model.filename
        sha256 = write(path, layout, small, model.variant)
        stat = LocalStore().stat(str(path))
        return model.filename, Entry(stat.size, stat.mtime_ns, sha256)

    which = f"{len(models)} models" if len(models) == count else f"{len(models)} of its {count} models"
    size = si_bytes(sum(layout.size for layout in layouts))
    with (
        _shown(progress, f"Making the demo model set in {directory} ({which}, {size})") as report,
        ThreadPoolExecutor(workers) as pool,
    ):
        jobs = [pool.submit(make, model, layout) for model, layout in zip(models, layouts, strict=True)]
        try:
            for done, made in enumerate(as_completed(jobs), start=1):
                name, entry = made.result()
                entries[name] = entry
                report(done, len(models))
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _shown(progress: Progress | None, headline: str) -> Iterator[Progress]:
    """Where progress is reported to: the caller, or else one line on stderr, and a bar that goes when it is full."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    console.print(headline, markup=False, highlight=False, soft_wrap=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("models")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _checked(directory: Path, name: str, recorded: Mapping[str, Entry]) -> Entry | None:
    """The entry of a file that still is what was recorded, with its present time of change."""
    entry, path = recorded.get(name), directory / name
    if entry is None:
        return None
    try:
        stat = LocalStore().stat(str(path))
        if stat.size != entry.size:
            return None
        if stat.mtime_ns == entry.mtime_ns:
            return entry
        same = hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
    except (StorageError, OSError):
        return None
    return entry._replace(mtime_ns=stat.mtime_ns) if same else None


def _stamp(architecture: Architecture, models: Sequence[DemoModel]) -> str:
    """What every byte of the set depends on, in short."""
    keys = [(component.name, *component.keys.items()) for component in architecture.components.values()]
    return hashlib.sha256(repr((VERSION, SEED, DIVISOR, keys, tuple(models))).encode()).hexdigest()


def _read_index(path: Path, stamp: str) -> dict[str, Entry]:
    """The entries of the index, or none if there is no index of this set."""
    try:
        index = json.loads(path.read_text("utf-8"))
        return {name: Entry(**entry) for name, entry in index["models"].items()} if index["stamp"] == stamp else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, stamp: str, entries: Mapping[str, Entry]) -> None:
    models = {name: entries[name]._asdict() for name in sorted(entries)}
    text = json.dumps({"stamp": stamp, "models": models}, indent=1, ensure_ascii=False)
    unfinished = path.with_suffix(".draft")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)
