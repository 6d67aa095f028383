"""What was asked for: a `Request` in raw words, and a `Recipe` in which every name is resolved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from mergeflow import __version__
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules

if TYPE_CHECKING:
    from collections.abc import Mapping
    from fractions import Fraction

    from mergeflow.interfaces import Io
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.recorded import Merge
    from mergeflow.recipe.selection import Written
    from mergeflow.recipe.tree import Tree

Missing = Literal["error", "skip", "base"]
Surplus = Literal["ignore", "error"]
Integers = Literal["error", "first"]
Nonfinite = Literal["error", "skip", "propagate"]
Keys = Literal["strict", "webui"]
PositionIds = Literal["webui", "fix"]
SeriesKind = Literal["swap", "leave_one_out", "add_one"]
SeriesWrite = Literal["file", "component"]

UNIFORM, PAIRWISE, COPY = "uniform", "pairwise", "copy"
REST = "rest"
"""What no component of the architecture has, as a part of an output that follows the web UI's rules for keys."""


@dataclass(frozen=True)
class ModelSource:
    """Where the checkpoints of a model set come from."""

    dir: str = ""
    """A directory whose files are searched, not its subdirectories; empty for none."""
    pattern: str = "{id}.safetensors"
    files: Mapping[str, str] = field(default_factory=dict)
    """Further checkpoints by id."""
    composites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """What to call it in messages."""
        return self.dir or "models.files"


@dataclass(frozen=True)
class PartRequest:
    """What one component of a target is made of: a named selection, or one model as it is."""

    selection: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class SeriesRequest:
    """Many alternatives of one target: each differs from it by one model."""

    kind: SeriesKind
    components: tuple[str, ...]
    """What varies; everything else is that of the base."""
    selection: str | None = None
    """The models that are tried; those of the base's own lists, or with `add_one` all others, where None."""
    target: str | None = None
    """The base, where the run has several targets."""
    base: str | None = None
    """The base of a `swap`, where it is no target but one model as it is: its id, or the absolute path of a file."""
    write: SeriesWrite = "file"
    with_base: bool | None = None
    """Whether the base is written too; None for where it is of use."""


@dataclass(frozen=True)
class Member:
    """What one output of a series is in it."""

    series: SeriesKind
    components: tuple[str, ...]
    write: SeriesWrite
    id: str
    """The model that it differs by; empty for the base itself."""
    files: tuple[str, ...]
    """The names of that model's files: several where it is a composite."""
    change: str
    """How it differs, in words."""


@dataclass(frozen=True)
class TargetRequest:
    """One wanted output, in the words of its config."""

    name: str
    file: str
    dtype: str | None = None
    """One of `OUTPUT_DTYPES`; the run's default where None."""
    selection: str | None = None
    """The list for every component that `components` does not name."""
    components: Mapping[str, PartRequest] = field(default_factory=dict)
    keys_from: str | None = None
    base: str | None = None
    recorded: bool = False
    """Whether the recorded tree of the run makes all of it."""
    member: Member | None = None
    """What it is in a series, if it was made for one."""


@dataclass(frozen=True)
class Policies:
    """What happens where sources disagree. Strict by default, lenient by choice, always reported."""

    missing: Missing = "error"
    surplus: Surplus = "ignore"
    integers: Integers = "error"
    nonfinite: Nonfinite = "error"
    keys: Keys = "strict"
    """Whose keys an output has: those of the architecture, or those of A at every node of a tree."""
    position_ids: PositionIds | None = None
    """How they are written: as whole numbers, or merged like weights; None for what `keys` usually does."""


@dataclass(frozen=True)
class Budget:
    """Where the work is done: how many workers, how many reads each keeps under way, how many bytes in all."""

    workers: int
    reads_in_flight: int
    memory: int
    """Bytes that the blocks of all workers may use together."""
    block: int = 4 << 20
    """Bytes of one read of one row, at most: on most storage longer reads are no faster, and shorter ones share the
    work better."""
    io: Io | None = None
    """How sources are read; None for as the store usually reads."""
    auto: tuple[str, ...] = ()
    """Which of `reads_in_flight` and `block` may be chosen anew once it is known how fast the storage is."""


@dataclass(frozen=True)
class RecordedFile:
    """A merged file, or the metadata of one, whose recipe is to be replayed."""

    path: str
    tool: Literal["webui", "mergeflow"]
    check: bool = True
    """Whether the sources must be the same."""
    vaes: Mapping[str, str] = field(default_factory=dict)
    """Models by the file names of the VAEs that the web UI baked in; `*` stands for any."""
    given: Mapping[str, str] = field(default_factory=dict)
    """What the recipe does not tell: models by `NODE.a`, `NODE.b` or `NODE.c`."""
    verified: bool = False
    """Whether the file itself is what is looked at: models keep the ids and names that its recipe has for them."""

    @property
    def option(self) -> str:
        """What the file was named by, for messages."""
        return "file" if self.verified else "recipe.file"


Recorded: TypeAlias = "Mapping[str, Merge] | RecordedFile"
"""Merges by name, or the file to find them in."""


@dataclass(frozen=True)
class Request:
    """Everything that was asked for."""

    models: ModelSource
    architecture: Architecture
    selections: Mapping[str, Written]
    targets: tuple[TargetRequest, ...]
    method: str
    dtype: str
    policies: Policies
    budget: Budget
    out: str
    """The directory of the outputs; absolute."""
    overwrite: bool = False
    resume: bool = False
    """Whether what an earlier run has left of the outputs is taken up."""
    tree: TreeOptions = field(default_factory=TreeOptions)
    """How lists become trees, where the method is `pairwise`."""
    rules: Rules = field(default_factory=Rules)
    """Whose arithmetic such trees are computed in."""
    recorded: Recorded | None = None
    """The tree that somebody has recorded, or the file that somebody has merged, for the target that is `recorded`."""
    hashes: bool = False
    """Whether sources are read whole for their SHA-256, so that outputs can name them by it."""
    series: SeriesRequest | None = None


@dataclass(frozen=True)
class Part:
    """One component of a target, resolved."""

    component: str
    entries: tuple[str, ...]
    """What was listed, composites unopened."""
    shares: Mapping[str, Fraction]
    """The exact share of every checkpoint; they sum to one."""
    method: str
    """`copy` for one model as it is."""
    tree: Tree | None = None
    """How `pairwise` goes about it."""
    rules: Rules | None = None
    """In whose arithmetic it does."""
    only_vae: bool = False
    """Whether all its tensors are a VAE's, so that those of models are not read where another VAE is baked in."""

    def as_read(self) -> Part:
        """The same part of nothing but the checkpoints that are read for it, with what they contribute."""
        if self.tree is None or not self.only_vae:
            return self
        read, weights = self.tree.sources(baked=True), self.tree.weights(baked=True)
        if {*read} == {*self.shares}:
            return self
        return replace(self, entries=read, shares={id: weights[id] for id in read})


@dataclass(frozen=True)
class Target:
    """One wanted output, resolved."""

    name: str
    file: str
    dtype: str
    parts: tuple[Part, ...]
    keys_from: str | None
    base: str | None
    same_as: str | None = None
    """A file whose tensors it must have, because it is that file's recipe that is replayed."""
    member: Member | None = None
    """What it is in a series."""

    def merged(self) -> tuple[str, ...]:
        """Every checkpoint that has a part in it by its recipe, in the order in which they are first named."""
        named = [id for part in self.parts for id in part.shares]
        named += [id for part in self.parts if part.tree is not None for id in part.tree.baked]
        return tuple(dict.fromkeys(named))

    def checkpoints(self) -> tuple[str, ...]:
        """Every checkpoint whose header it needs, in the order in which they are first named."""
        named = list(self.merged())
        named += [id for id in (self.keys_from, self.base) if id is not None]
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class Recipe:
    """What will be made of what, with every id known to exist."""

    models: ModelSet
    architecture: Architecture
    targets: tuple[Target, ...]
    policies: Policies
    budget: Budget
    version: str = __version__
    """The mergeflow that outputs say they were made by: another one only where that is what is verified."""

    def checkpoints(self) -> tuple[str, ...]:
        """Every checkpoint that any target needs, in the order in which they are first named."""
        return tuple(dict.fromkeys(id for target in self.targets for id in target.checkpoints()))
