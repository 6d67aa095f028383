"""Everything that is read before a plan can be made: names, headers, recorded recipes and, if asked for, hashes."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mergeflow.errors import ConfigError, FormatError, MergeflowError, StorageError
from mergeflow.execute.watch import a_model
from mergeflow.recipe.modelset import model_set
from mergeflow.recipe.recorded import recorded_tree
from mergeflow.recipe.replay import Replay, changed
from mergeflow.recipe.request import RecordedFile
from mergeflow.recipe.resolve import resolve
from mergeflow.recipe.webui import matched, recorded
from mergeflow.storage.hashes import HashCache, identities
from mergeflow.storage.local import list_files
from mergeflow.tensors import Checkpoint
from mergeflow.text import LONGEST_PATH, printable, shown, some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from mergeflow.interfaces import Format, ReadBytes, Store
    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.request import Recipe, Request
    from mergeflow.recipe.tree import Tree
    from mergeflow.tensors import Identity

HEADERS_AT_ONCE = 8
"""Headers are small and far apart: what a network file system charges for them is waiting, so they wait together."""
LARGEST_METADATA = 100 << 20
"""Bytes of a .json file; a header is not larger either."""
HASHES = "hashes.json"
"""Beside the outputs: reading whole files takes minutes, and nobody should wait for the same ones twice."""

_PART = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.safetensors$")
"""How the files of a checkpoint that was cut in several are called."""

Progress: TypeAlias = "Callable[[int], AbstractContextManager[Callable[[int], None]]]"
"""Given so many bytes to read, who is told of the bytes read."""


def silent(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """No progress is shown."""
    return nullcontext(lambda _: None)


def open_checkpoint(
    id: str, path: str, store: Store, format: Format, called: Callable[[str], str] = a_model
) -> Checkpoint | MergeflowError:
    """The checkpoint with its header, or why there is none; messages say what `called` makes of the id."""
    try:
        stat = store.stat(path)
        if part := _PART.search(path):
            raise FormatError(
                f"it is part {int(part[1])} of a checkpoint in {int(part[2])} files, and mergeflow reads checkpoints "
                "in one; save it as one file first"
            )
        with _reading(path, store) as read:
            return Checkpoint(id, path, stat, format.parse(read, stat.size))
    except FormatError as error:
        return FormatError(f"{shown(called(id))}: {shown(path, LONGEST_PATH)} cannot be used: {error}")
    except MergeflowError as error:
        return StorageError(f"{shown(called(id))}: {error}")


@contextmanager
def _reading(path: str, store: Store) -> Iterator[ReadBytes]:
    """What reads `count` bytes from `offset` of a file that is open meanwhile; raises `StorageError`."""
    reader = store.reader(path)

    def read(offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        reader.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    try:
        yield read
    finally:
        reader.close()


class Inputs:
    """What one request reads before it is planned."""

    def __init__(self, request: Request, store: Store, format: Format, progress: Progress = silent) -> None:
        self._request = request
        self._store = store
        self._format = format
        self._progress = progress
        self._notes: tuple[str, ...] = ()
        self._replay: Replay | None = None

    def recipe(self) -> Recipe:
        """The recipe; raises `UsageError` if the request names what does not exist."""
        request, source = self._request, self._request.models
        if request.series is not None and request.recorded is not None:
            raise ConfigError("a recorded tree has no series; leave out recipe= or series=")
        names = self._files()
        if request.recorded is None:
            return resolve(request, names)
        if not isinstance(request.recorded, RecordedFile):
            merges = request.recorded
            return resolve(request, names, lambda models: recorded_tree(merges, models))
        metadata = self._metadata(request.recorded)
        if request.recorded.tool == "mergeflow":
            models = model_set(names, source.pattern, source.composites, source.files, source.place)
            self._replay = Replay(metadata, request.recorded.path, models, request.recorded)
            return self._replay.recipe(request)
        return resolve(request, names, lambda models: self._web_ui_tree(metadata, models))

    def checkpoints(self, recipe: Recipe) -> tuple[list[Checkpoint], list[MergeflowError]]:
        """The checkpoints whose headers can be read, and what is wrong with the others or with all."""
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            opened = list(pool.map(lambda id: self._open(id, recipe.models.paths[id]), recipe.checkpoints()))
        found = [one for one in opened if isinstance(one, Checkpoint)]
        problems = [error for error in opened if isinstance(error, MergeflowError)]
        if self._request.hashes or (self._replay is not None and self._replay.hashed):
            try:
                known = self._identities({one.id: one.path for one in found})
                found = [replace(one, identity=known[one.id]) for one in found]
            except MergeflowError as error:
                problems.append(error)
        if self._replay is not None and isinstance(self._request.recorded, RecordedFile):
            if self._request.recorded.verified:
                names = self._replay.names()
                found = [replace(one, called=names[one.id]) for one in found]
            differences = self._replay.differences(found)
            if self._request.recorded.check:
                problems += changed(differences)
            else:
                self._notes += tuple(differences)
        return found, problems

    @property
    def notes(self) -> tuple[str, ...]:
        """What was odd, in sentences."""
        return self._notes

    def _files(self) -> list[str]:
        directory = self._request.models.dir
        try:
            return list_files(directory) if directory else []
        except StorageError as error:
            raise StorageError(f"models.dir: {error}") from error

    def _open(self, id: str, path: str) -> Checkpoint | MergeflowError:
        return open_checkpoint(id, path, self._store, self._format)

    def _metadata(self, file: RecordedFile) -> Mapping[str, str]:
        """The metadata of a merged file, or what somebody has saved of it as JSON."""
        path = file.path
        try:
            size = self._store.stat(path).size
            with _reading(path, self._store) as read:
                return _saved(read, size) if path.endswith(".json") else self._format.parse(read, size).metadata
        except FormatError as error:
            raise FormatError(f"{file.option}={path} cannot be used: {error}") from error
        except StorageError as error:
            raise StorageError(f"{file.option}: {error}") from error

    def _web_ui_tree(self, metadata: Mapping[str, str], models: ModelSet) -> Tree:
        request = self._request
        assert isinstance(request.recorded, RecordedFile)
        name = Path(request.recorded.path).stem
        told = recorded(metadata, name, request.recorded.given)
        known = self._identities(models.paths) if request.recorded.check else {}
        tree, notes = matched(told, models, known, request.recorded.vaes)
        self._notes += tuple(notes)
        return tree

    def _identities(self, paths: Mapping[str, str]) -> dict[str, Identity]:
        cache = HashCache(f"{self._request.out}/{HASHES}")
        missing = cache.missing(paths, self._store)
        with self._progress(sum(missing.values())) as progress:
            return identities(paths, self._store, cache, progress)


def _saved(read: ReadBytes, size: int) -> dict[str, str]:
    """What a .json file of `size` bytes holds: metadata as it is in a header, or the header itself."""
    if size > LARGEST_METADATA:
        raise FormatError(f"it has {size:,} bytes, and metadata at most {LARGEST_METADATA:,}")
    try:
        told = json.loads(read(0, size))
        if isinstance(told, dict) and isinstance(told.get("__metadata__"), dict):
            told = told["__metadata__"]
        if not isinstance(told, dict):
            raise FormatError("it is JSON, but no table of metadata")
        if isinstance(told.get("outputs"), list):
            raise FormatError(_a_manifest(told["outputs"]))
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    except (ValueError, RecursionError) as error:
        raise FormatError(f"it is not JSON ({error})") from error


def _a_manifest(outputs: Sequence[object]) -> str:
    """What is wrong with a manifest where metadata is expected, and what to give instead."""
    files = [printable(str(one["file"])) for one in outputs if isinstance(one, dict) and "file" in one]
    return f"it is the manifest of a run, which has no recipe; give one of the files beside it: {some(files) or 'none'}"
