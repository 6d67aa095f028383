"""What may be typed. A name that is not here, or a value of another type, ends the run before it begins.

The values live in `conf/`; these classes say which there are and of what type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from mergeflow.config.choices import (
    Arithmetic,
    Bake,
    ExecutorKind,
    Integers,
    IoKind,
    Job,
    KeyRule,
    MethodName,
    Missing,
    Nonfinite,
    ObjectiveKind,
    OutputDtype,
    Placement,
    PositionIds,
    RecipeKind,
    Scalars,
    SeriesKind,
    SeriesWrite,
    Surplus,
)

__all__ = [  # the choices too, so that all that may be typed is in one place
    "LAUNCHER",
    "SCHEMA",
    "Arch",
    "Arithmetic",
    "Bake",
    "Component",
    "Config",
    "Executor",
    "ExecutorKind",
    "Integers",
    "IoKind",
    "Job",
    "KeyRule",
    "Keys",
    "Method",
    "MethodName",
    "Missing",
    "Models",
    "Nonfinite",
    "Objective",
    "ObjectiveKind",
    "OutputDtype",
    "Part",
    "Placement",
    "PositionIds",
    "Recipe",
    "RecipeKind",
    "Scalars",
    "Series",
    "SeriesKind",
    "SeriesWrite",
    "SharedScan",
    "Surplus",
    "Target",
    "register",
]

SCHEMA = "schema"
AUTO = "auto"
LAUNCHER = "shared_scan"


@dataclass
class Models:
    """The model set."""

    dir: str | None = MISSING
    pattern: str = "{id}.safetensors"
    files: dict[str, str] = field(default_factory=dict)
    composites: dict[str, list[str]] = field(default_factory=dict)
    demo: bool = False
    """Whether the demo set is to be made in `dir` when it is not there."""
    count: int = 44
    """How many models the demo set has."""


@dataclass
class Component:
    """One component of an architecture; see `recipe.architecture.architecture`."""

    prefix: str = ""
    tensors: dict[str, list[int] | None] = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)
    integers: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    markers: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Arch:
    """Which keys belong to which component."""

    name: str = MISSING
    dtype: OutputDtype = MISSING
    metadata: dict[str, str] = field(default_factory=dict)
    components: dict[str, Component] = field(default_factory=dict)


@dataclass
class Part:
    """What one component of a target is made of."""

    selection: str | None = None
    model: str | None = None


@dataclass
class Target:
    """One wanted output."""

    file: str = MISSING
    """A name; empty for that of the recorded file, where a recipe is replayed."""
    dtype: OutputDtype | None = None
    selection: str | None = None
    components: dict[str, Part] = field(default_factory=dict)
    keys_from: str | None = None
    base: str | None = None
    recorded: bool = False
    """Whether the tree of `recipe` makes all of it."""


@dataclass
class Recipe:
    """A recorded tree."""

    kind: RecipeKind | None = None
    name: str = ""
    """What the output is called."""
    file: str | None = None
    """The merged file, or the metadata of one as JSON."""
    check: bool = True
    """Whether the sources must be shown to be the same."""
    nodes: dict[str, Any] = field(default_factory=dict)
    """Merges by name: `[A, B]`, `[A, B, M]` or a mapping; see `recipe.recorded.read_merges`."""
    vae: str | None = None
    """The model whose VAE is baked in: at every node that does not say otherwise, or where the file tells of any."""
    vaes: dict[str, str] = field(default_factory=dict)
    """Models by the file name of the VAE that the web UI baked in."""
    given: dict[str, str] = field(default_factory=dict)
    """Models that the file does not tell, by `NODE.a`, `NODE.b` or `NODE.c`."""


@dataclass
class Method:
    """How one value is made of N."""

    name: MethodName = MISSING
    shape: Any = "balanced"
    """`balanced`, `chain`, a nested list of ids, or one of these by the name of a selection."""
    arithmetic: Arithmetic = Arithmetic.webui
    scalars: Scalars = Scalars.opmath
    save_half: bool = True
    multipliers: dict[str, float] = field(default_factory=dict)
    """By the name of a node, or by level."""
    bake: Bake = Bake.none
    vae: str | None = None


@dataclass
class Executor:
    """Where and when the work is done."""

    kind: ExecutorKind = MISSING
    workers: int | None = None
    """Actors, or as many times `reads_in_flight` threads. Null is the cores of this machine, and on a cluster as many
    as its nodes have room for."""
    reads_in_flight: Any = AUTO
    """A number, or `auto`."""
    block: Any = AUTO
    """Of one read of one row, at most: a size, or `auto`."""
    io: IoKind = IoKind.auto
    memory: str = "1GiB"
    """What the blocks of all workers may use together."""
    address: str | None = None
    """Of Ray: `local`, `auto` or `host:port`."""
    resources: dict[str, Any] = field(default_factory=dict)
    """What one actor takes of a node of a cluster: `CPU`, `GPU`, `memory`, and any that nodes were started with."""
    placement: Placement | None = None
    """On which nodes of a cluster actors are."""
    patience: float | None = None
    """Seconds that an actor may get on with nothing before it is given up."""


@dataclass
class Keys:
    """Which keys an output has, and what happens where those of the models differ."""

    rule: KeyRule = KeyRule.strict
    missing: Missing = Missing.error
    surplus: Surplus = Surplus.ignore
    integers: Integers = Integers.error


@dataclass
class Objective:
    """A number for each output, which a sweep can optimise."""

    kind: ObjectiveKind = ObjectiveKind.none
    command: str | None = None
    """A command line with `{file}`; its last line is the number."""
    target: str | None = None
    """`package.module.function`, called with the path."""


@dataclass
class Series:
    """Many variations of one target."""

    kind: SeriesKind = SeriesKind.none
    components: Any = field(default_factory=list)
    """A list of names; or one name."""
    selection: str | None = None
    target: str | None = None
    base: str | None = None
    write: SeriesWrite = SeriesWrite.file
    with_base: bool | None = None


@dataclass
class Config:
    """Everything that may be typed."""

    models: Models = field(default_factory=Models)
    arch: Arch = field(default_factory=Arch)
    selection: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Target] = field(default_factory=dict)
    method: Method = field(default_factory=Method)
    executor: Executor = field(default_factory=Executor)
    recipe: Recipe = field(default_factory=Recipe)
    experiment: Any = None
    job: Job = Job.merge
    a: str | None = None
    b: str | None = None
    base: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    """Files by component, for `job=assemble`; `te0=FILE` is short for `parts.te0=FILE` there."""
    file: str | None = None
    sample: Any = 1000
    """Of `job=verify`: how many tiles, or `all`."""
    seed: int = 0
    """Which tiles these are."""
    out: str = MISSING
    overwrite: bool = False
    resume: bool = False
    dtype: OutputDtype | None = None
    keys: Keys = field(default_factory=Keys)
    position_ids: PositionIds | None = None
    nonfinite: Nonfinite = Nonfinite.error
    hashes: bool = False
    objective: Objective = field(default_factory=Objective)
    series: Series = field(default_factory=Series)


@dataclass
class SharedScan:
    """What Hydra makes the launcher of sweeps of."""

    _target_: str = "hydra_plugins.mergeflow_shared_scan.launcher.SharedScanLauncher"


def register() -> None:
    """Tell Hydra of the schema, which `conf/config.yaml` names first in its defaults, and of the launcher."""
    node = OmegaConf.structured(Config)
    names = (node.models.files, node.models.composites, node.method.multipliers, node.parts, node.executor.resources)
    for ids in (*names, node.recipe.nodes, node.recipe.vaes, node.recipe.given):
        OmegaConf.set_struct(ids, False)  # the user's own names: they are not added, they are given
    ConfigStore.instance().store(name=SCHEMA, node=node)
    ConfigStore.instance().store(group="hydra/launcher", name=LAUNCHER, node=SharedScan)
