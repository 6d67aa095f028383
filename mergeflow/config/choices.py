"""What may be chosen where there is a choice; Hydra reads the names."""

from __future__ import annotations

from enum import Enum


class Job(Enum):
    """What to do: merge; show the plan and stop; compare two checkpoints; put one together; verify an output."""

    merge = "merge"
    plan = "plan"
    compare = "compare"
    assemble = "assemble"
    verify = "verify"


class RecipeKind(Enum):
    """Where a recorded tree is told: in the config, or in a file that a tool has merged."""

    nodes = "nodes"
    webui = "webui"
    file = "file"


class MethodName(Enum):
    """How one value is made of N."""

    uniform = "uniform"
    pairwise = "pairwise"


class Arithmetic(Enum):
    """Whose arithmetic a tree is computed in."""

    webui = "webui"
    float32 = "float32"
    float64 = "float64"
    comfyui = "comfyui"
    supermerger = "supermerger"


class Scalars(Enum):
    """What a tensor of 16 bits is multiplied by."""

    opmath = "opmath"
    half = "half"


class Bake(Enum):
    """At which nodes of a tree a VAE is baked in."""

    none = "none"
    every = "every"
    top = "top"


class KeyRule(Enum):
    """Whose keys an output has."""

    strict = "strict"
    webui = "webui"


class PositionIds(Enum):
    """How position_ids are written."""

    webui = "webui"
    fix = "fix"


class ObjectiveKind(Enum):
    """Who says how good an output is."""

    none = "none"
    command = "command"
    python = "python"


class OutputDtype(Enum):
    """What an output is written in."""

    keep = "keep"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Missing(Enum):
    """What happens when a model lacks a tensor."""

    error = "error"
    skip = "skip"
    base = "base"


class Surplus(Enum):
    """What happens when a model has a tensor that the output does not."""

    ignore = "ignore"
    error = "error"


class Integers(Enum):
    """What happens when tensors of integers differ."""

    error = "error"
    first = "first"


class Nonfinite(Enum):
    """What happens to NaN and infinity in a source."""

    error = "error"
    skip = "skip"
    propagate = "propagate"


class ExecutorKind(Enum):
    """Where the work is done."""

    local = "local"
    ray = "ray"


class Placement(Enum):
    """On which nodes of a cluster the actors are: on as many as there are, on few, or each on one of its own."""

    spread = "spread"
    pack = "pack"
    strict_spread = "strict_spread"


class IoKind(Enum):
    """How sources are read."""

    auto = "auto"
    buffered = "buffered"
    direct = "direct"


class SeriesKind(Enum):
    """How the outputs of a series differ."""

    none = "none"
    swap = "swap"
    leave_one_out = "leave_one_out"
    add_one = "add_one"


class SeriesWrite(Enum):
    """What of each output is written."""

    file = "file"
    component = "component"
