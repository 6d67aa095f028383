"""The manifest beside a file, which anybody may have changed, or whose run was another one."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeflow.errors import StorageError
from mergeflow.recipe.reading import short
from mergeflow.tensors import si_bytes
from mergeflow.verify.result import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.interfaces import Store
    from mergeflow.tensors import Checkpoint, FileStat

NAME = "manifest.json"
LARGEST = 256 << 20
"""Bytes; that of 257 models has less than one MB."""
THERE_IS_NONE = "there is no manifest.json beside the file, so its tensors' SHA-256 is not known"


@dataclass
class Manifest:
    """What the manifest beside a file says of it."""

    path: str
    output: Mapping[str, Any] | None = None
    """Its entry for the file; None where it has none."""
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Its entries for sources, by id."""
    version: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Why it cannot be read."""
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str | None:
        """The SHA-256 of the tensors, where it says that."""
        return None if self.output is None else str(self.output.get("tensors_sha256"))


def read_manifest(file: Checkpoint, called: str, store: Store) -> Manifest:
    """The manifest beside `file`, which was called `called` when it was made."""
    directory, _, name = file.path.rpartition("/")
    manifest = Manifest(f"{directory}/{NAME}")
    try:
        told = json.loads(_content(manifest.path, store))
        outputs, sources = told["outputs"], told["sources"]
        entries = {str(one["file"]): one for one in outputs}
        manifest.sources = {str(one["id"]): one for one in sources}
        manifest.version = str(told.get("mergeflow"))
        manifest.versions = {str(name): version for name, version in dict(told.get("versions", {})).items()}
    except FileNotFoundError:
        manifest.notes.append(THERE_IS_NONE)
        return manifest
    except (StorageError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        manifest.problems.append(f"{manifest.path} is not as mergeflow writes it ({short(error)})")
        return manifest
    renamed = name != called and _there(f"{directory}/{called}", store)
    if called not in entries or renamed:
        what = f"of another '{short(called)}'" if renamed else "of another run"
        manifest.notes.append(f"{NAME} beside the file is {what}, so the tensors' SHA-256 is not known")
        manifest.sources, manifest.versions = {}, {}
        return manifest
    manifest.output = entries[called]
    return manifest


def differences(manifest: Manifest, file: Checkpoint, recipe: Mapping[str, Any], digest: str | None) -> list[Finding]:
    """Where `manifest` says other things than the file, its `recipe` (what is in its metadata) and its `digest`."""
    told = list(manifest.problems)
    if manifest.output is not None:
        told += _of_output(manifest, file, recipe, digest)
        told += _of_sources(manifest, recipe.get("sources", {}))
    return [Finding("manifest", text) for text in told]


def written_since(manifest: Manifest, stats: Mapping[str, FileStat]) -> list[str]:
    """The sources whose time of change is another one than then."""
    then = {id: one.get("mtime_ns") for id, one in manifest.sources.items()}
    return [id for id, stat in stats.items() if id in then and then[id] != stat.mtime_ns]


def _of_output(manifest: Manifest, file: Checkpoint, recipe: Mapping[str, Any], digest: str | None) -> list[str]:
    entry = manifest.output or {}
    told = []
    for what, says, does in (
        ("size", entry.get("size"), file.stat.size),
        ("number of tensors", entry.get("tensors"), len(file.header.tensors)),
    ):
        if says != does:
            told.append(f"by the manifest the file's {what} is {short(says)}, and it is {does:,}")
    if digest is not None and entry.get("tensors_sha256") != digest:
        told.append(
            f"by the manifest the SHA-256 of the tensors is {short(entry.get('tensors_sha256'))}, and it is "
            f"{short(digest)}: of the tensors or of the manifest something was changed after the merge"
        )
    if manifest.version != recipe.get("mergeflow"):
        version = short(recipe.get("mergeflow"))
        told.append(f"by the manifest mergeflow {short(manifest.version)} made the file, by its metadata {version}")
    components = entry.get("components")
    for name, part in dict(recipe.get("components", {})).items():
        says = components.get(name) if isinstance(components, dict) else None
        for what in ("method", "list"):
            if not isinstance(says, dict) or says.get(what) != part.get(what):
                shown = says.get(what) if isinstance(says, dict) else None
                told.append(
                    f"by the manifest the {what} of {name} is {short(shown)}, by the metadata {short(part.get(what))}"
                )
    return told


def _of_sources(manifest: Manifest, sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    told = []
    for id, source in sources.items():
        entry = manifest.sources.get(id)
        if entry is None:
            told.append(f"the manifest does not have model {short(id)}")
            continue
        for what, name in (("name", "name"), ("size", "size"), ("header_sha256", "header")):
            if entry.get(what) != source.get(name):
                told.append(
                    f"by the manifest the {name} of model {short(id)} is {short(entry.get(what))}, by the metadata "
                    f"{short(source.get(name))}"
                )
    return told


def _content(path: str, store: Store) -> bytes:
    if not _there(path, store):
        raise FileNotFoundError
    size = store.stat(path).size
    if size > LARGEST:
        raise ValueError(f"it has {si_bytes(size)}")
    content = bytearray(size)
    with closing(store.reader(path)) as reader:
        reader.read_into(memoryview(content), 0)
    return bytes(content)


def _there(path: str, store: Store) -> bool:
    try:
        store.stat(path)
    except StorageError:
        return False
    return True
