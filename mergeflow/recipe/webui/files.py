"""Which checkpoint of a model set a recorded model or VAE is: by its content where that is known, else by its name."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.recipe.webui.merges import GIVEN
from mergeflow.recipe.webui.naming import comparable, numbered, numbering, stem
from mergeflow.text import printable, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.webui.merges import Model

VAE, VAES = "recipe.vae", "recipe.vaes"
"""The options by which people say whose VAE is meant by any file, and by one."""
ANY_VAE = "*"
"""The name under which `vaes` may have the model for every VAE that has no entry of its own."""


class File(NamedTuple):
    """A checkpoint that stands for a recorded model."""

    id: str
    notes: tuple[str, ...] = ()
    """What is not certain about that."""

    def noted(self, note: str) -> File:
        """The same, with one note more."""
        return self._replace(notes=(*self.notes, note))


class Files:
    """The checkpoints of a model set, by all that a recorded model may be found by."""

    def __init__(
        self, models: ModelSet, identities: Mapping[str, tuple[str | None, str | None]], recorded: Iterable[Model]
    ) -> None:
        self._models = models
        self._identities = {id: identities.get(id, (None, None)) for id in models.paths}
        self._numbering = numbering(models.paths)
        self._by_hash: dict[str, list[str]] = {}
        self._by_legacy: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for id, path in models.paths.items():
            sha256, legacy = self._identities[id]
            self._by_hash.setdefault(sha256 or "", []).append(id)
            self._by_legacy.setdefault(legacy or "", []).append(id)
            self._by_name.setdefault(comparable(stem(path)), []).append(id)
        self._claims = Counter(model.legacy for model in recorded)

    def named(self, name: str) -> list[str]:
        """The checkpoints whose file has that name, whatever its directory, extension and case."""
        return self._by_name.get(comparable(stem(name)), []) if name else []

    def find(self, model: Model) -> File | None:
        """The checkpoint that `model` is, or that has to stand for it; raises what is wrong with what is given for it.

        Also raises if several checkpoints might be meant.
        """
        if model.given is not None:
            try:
                return File(self.checkpoint(model.given))
            except MergeflowError as error:
                raise ConfigError(f"{GIVEN}: {error}") from error
        by_name = self.named(model.name)
        exact = self._by_hash.get(model.hash, []) if model.hash else []
        if exact:
            return File(next((id for id in by_name if id in exact), exact[0]))
        legacy = self._by_legacy.get(model.legacy, []) if model.legacy else []
        if len(legacy) == 1 and (legacy[0] in by_name or self._sole(model, legacy[0], by_name)):
            return File(legacy[0], self._unsure(model, legacy[0], "its legacy hash"))
        if len(by_name) > 1:
            raise ConfigError(
                f"{model} may be {some([f'{id} ({self._models.paths[id]})' for id in by_name])}: all have its name, "
                f"and none is known to have its hash; say which it is with {GIVEN}"
            )
        if by_name:
            return File(by_name[0], self._unsure(model, by_name[0], "its name"))
        id = numbered(model.name, self._numbering) if self._numbering else None
        if id is None or id not in self._models or (id := self._models.find(id)) not in self._models.paths:
            return None
        return File(id, self._unsure(model, id, "the id in its name"))

    def numbered(self, model: Model) -> bool:
        """Whether a model is called as those of this collection are."""
        return self._numbering is not None and numbered(model.name, self._numbering) is not None

    def itself(self, model: Model) -> File | None:
        """As `find`, but never another file that has only the name."""
        try:
            found = self.find(model)
        except ConfigError:
            return None
        return None if found is None or self._differs(model, found.id) else found

    def checkpoint(self, id: str) -> str:
        """The checkpoint with that id; raises what is wrong with it."""
        found = self._models.find(id)
        if found in self._models.composites:
            raise ConfigError(f"'{id}' is a composite, and only a checkpoint can stand in a recorded tree")
        return found

    def _sole(self, model: Model, id: str, by_name: list[str]) -> bool:
        """Whether a legacy hash is enough: it is 64 KiB that several models often share."""
        return not by_name and self._claims[model.legacy] == 1 and not self._differs(model, id)

    def _differs(self, model: Model, id: str) -> tuple[str, str] | None:
        """Two hashes of which one is recorded and the other is that of the file, if they tell that it is another."""
        for recorded, found in zip((model.hash, model.legacy), self._identities[id], strict=True):
            if recorded and found and len(recorded) == len(found):
                return None if recorded == found else (recorded, found)
        return None

    def _unsure(self, model: Model, id: str, by: str) -> tuple[str]:
        differs = self._differs(model, id)
        if differs is None:
            return (f"{model} is taken to be '{id}' by {by}; its content could not be confirmed",)
        recorded, found = (printable(hash)[:10] for hash in differs)
        return (f"{model} is taken to be '{id}' by {by}, which is another file: its hash is {found}, not {recorded}",)


class Vaes:
    """The checkpoints whose VAE is meant by the name of a VAE's file."""

    def __init__(self, models: ModelSet, files: Files, vaes: Mapping[str, str]) -> None:
        self._files = files
        self._ids = {comparable(stem(name)): id for name, id in vaes.items()}
        self._any = vaes.get(ANY_VAE)
        self._place = models.place or "the model set"
        self._known: dict[str, str | MergeflowError] = {}
        self._names = {comparable(stem(name)): name for name in vaes if name != ANY_VAE}

    def find(self, name: str) -> str | MergeflowError:
        """The id of a checkpoint, or why there is none."""
        if name not in self._known:
            try:
                self._known[name] = self._find(name)
            except MergeflowError as error:
                self._known[name] = error
        return self._known[name]

    def idle(self) -> list[str]:
        """Notes of what is given for VAEs that nobody asked for."""
        asked = {comparable(stem(name)) for name in self._known}
        return [f"{VAES}: no merge bakes in '{name}'" for key, name in self._names.items() if key not in asked]

    def _find(self, name: str) -> str:
        id = self._ids.get(comparable(stem(name)), self._any)
        if id is not None:
            try:
                return self._files.checkpoint(id)
            except MergeflowError as error:
                raise ConfigError(f"the VAE '{printable(name)}': {error}") from error
        named = self._files.named(name)
        if len(named) == 1:
            return named[0]
        have = f"{len(named)} files of {self._place} have" if named else f"no file of {self._place} has"
        raise ConfigError(
            f"the VAE '{printable(name)}' is baked in, and {have} that name; "
            f"say which model has it with {VAE}=ID or, for this one alone, {VAES}.{printable(name)}=ID"
        )
