"""A graph of merges, as a file tells of them: which models took part, and what was made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.errors import FormatError, MergeflowError
from mergeflow.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mergeflow.recipe.tree import Node

GIVEN = "recipe.given"
"""The option by which people say what an input is."""
LETTERS = "abc"
"""What people call the inputs of a merge."""


class Merge(NamedTuple):
    """One recorded merge."""

    node: Node
    """Without inputs yet, and its `bake` is the name of a VAE's file."""
    inputs: tuple[int | None, ...] = ()
    """The numbers of the models that it merged, None where it is not known which it was."""
    problems: tuple[MergeflowError, ...] = ()
    """Why it cannot be replayed."""
    notes: tuple[str, ...] = ()
    """What was concluded about it."""
    unknown: tuple[str, ...] = ()
    """Fields of its recipe that mergeflow does not know, and that are empty."""

    def place(self, input: int) -> str:
        """How people call one of its inputs: `x02a.b`."""
        return f"{self.node.name}.{LETTERS[input]}"


class Model(NamedTuple):
    """One model that took part."""

    name: str
    """Of its file, without directory and extension; it may be missing, or that of another copy."""
    hash: str | None = None
    """SHA-256 of its file, in hex, if whoever wrote it kept to that."""
    legacy: str | None = None
    """The web UI's former hash, which several files may share."""
    merge: Merge | None = None
    tool: str | None = None
    """What merged it, if mergeflow cannot replay that."""
    given: str | None = None
    """The id of the checkpoint that it is, because somebody says so."""

    def __str__(self) -> str:
        """The model for a message."""
        name = printable(self.given or self.name)
        hash = printable(self.hash or "")[:10]
        return f"'{name}' ({hash})" if name and hash else f"'{name or hash}'"


@dataclass(frozen=True)
class Recorded:
    """Models by number, of which 0 is the file itself."""

    models: tuple[Model, ...]
    order: tuple[int, ...]
    """Those that the file leads to: what is merged before what is made of it, A first, so that the file is last."""
    problems: tuple[MergeflowError, ...] = ()
    """What is wrong whichever models there are."""


def walked(models: Sequence[Model]) -> tuple[tuple[Model, ...], tuple[int, ...]]:
    """The models, cut where a merge leads back to itself, and the order in which `Recorded` has them."""
    made = list(models)
    done: dict[int, None] = {}
    way = [(0, _inputs(made[0]))]
    above = {0}
    while way:
        number, ahead = way[-1]
        for place, below in ahead:
            if below in above:
                made[number] = _cut(made[number], place, made[below])
            elif below not in done:
                way.append((below, _inputs(made[below])))
                above.add(below)
                break
        else:
            way.pop()
            above.discard(number)
            done[number] = None
    return tuple(made), tuple(done)


def _inputs(model: Model) -> Iterator[tuple[int, int]]:
    inputs = model.merge.inputs if model.merge else ()
    return ((place, number) for place, number in enumerate(inputs) if number is not None)


def _cut(model: Model, place: int, below: Model) -> Model:
    """The merge without an input that leads back to it: nothing that was ever computed is made of itself."""
    assert model.merge is not None
    name = model.merge.node.name
    error = FormatError(
        f"'{name}' is made of itself: its input {model.merge.place(place)} is {below}, which is made of '{name}'"
    )
    inputs = tuple(None if at == place else number for at, number in enumerate(model.merge.inputs))
    return model._replace(merge=model.merge._replace(inputs=inputs, problems=(*model.merge.problems, error)))
