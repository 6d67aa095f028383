"""Checkpoints, recipes and plans without files, in as few words as a test has to say."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from mergeflow.formats.safetensors import Safetensors
from mergeflow.plan.make import make_plan
from mergeflow.recipe.architecture import architecture
from mergeflow.recipe.request import Budget, ModelSource, Policies, Request, TargetRequest
from mergeflow.recipe.resolve import resolve
from mergeflow.tensors import Checkpoint, Dtype, FileStat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeflow.interfaces import ReadBytes
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.request import Recipe

    Shape = tuple[int, ...]

TOY = architecture(
    "toy",
    "fp16",
    {"modelspec.architecture": "toy-v1"},
    {
        "text": {
            "prefix": "text.",
            "tensors": {"w": [2, 3], "b": [3], "ids": [4], "extra": [2]},
            "integers": ["ids"],
            "optional": ["ids", "extra"],
        },
        "image": {"tensors": {"image.w": [3, 5], "image.empty": [0, 5]}, "markers": {"v_pred": [0], "sigma": []}},
    },
)
"""Two components with everything that a component can have."""

OPEN = architecture("any", "keep", {}, {"all": {"tensors": {"*": None}, "markers": {"v_pred": [0]}}})
"""One component that takes every key, and knows one marker."""

USUAL: dict[str, Shape] = {
    key: spec.shape or () for key, spec in TOY.usual_keys.items() if not (spec.optional or spec.integer)
}
"""The tensors that every toy checkpoint must have."""

SINGLE = TargetRequest("made", "made.safetensors", selection="models")
"""One output, of which every component comes from the list `models`."""


def reader(head: bytes) -> ReadBytes:
    """How a format reads the beginning of a file."""
    return lambda offset, count: head[offset : offset + count]


def checkpoint(
    id: str,
    shapes: Mapping[str, Shape] = USUAL,
    dtype: Dtype = Dtype.F16,
    *,
    dtypes: Mapping[str, Dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
    path: str = "",
) -> Checkpoint:
    """A checkpoint with tensors of these shapes, all of `dtype` but those that `dtypes` names."""
    tensors = [(key, (dtypes or {}).get(key, dtype), shape) for key, shape in shapes.items()]
    layout = Safetensors().layout(tensors, metadata or {})
    path = path or f"/models/{id}.safetensors"
    header = Safetensors().parse(reader(layout.head), layout.size)
    return Checkpoint(id, path, FileStat(layout.size, 0, 0, zlib.crc32(path.encode("utf-8", "surrogatepass"))), header)


def recipe(checkpoints: Sequence[Checkpoint], *targets: TargetRequest, **changes: Any) -> Recipe:
    """What `resolve` makes of a request for `targets` (`SINGLE` if none is given); `changes` are its other fields.

    The list `models` selects all checkpoints in the order in which they are given.
    """
    files = {one.id: one.path for one in checkpoints}
    asked: dict[str, Any] = {
        "models": ModelSource(files=files, composites=changes.pop("composites", {})),
        "architecture": TOY,
        "selections": {"models": list(files)} | changes.pop("selections", {}),
        "targets": targets or (SINGLE,),
        "method": "uniform",
        "dtype": "fp16",
        "policies": Policies(),
        "budget": Budget(workers=2, reads_in_flight=2, memory=2**30),
        "out": "/out",
    }
    return resolve(Request(**asked | changes), [])


def planned(checkpoints: Sequence[Checkpoint], *targets: TargetRequest, **changes: Any) -> Plan:
    """The plan of that recipe, made of those checkpoints that it needs."""
    made = recipe(checkpoints, *targets, **changes)
    by_id = {one.id: one for one in checkpoints}
    return make_plan(made, [by_id[id] for id in made.checkpoints()], Safetensors(), "/out")


class Ingredients(NamedTuple):
    """What one tensor of an output is made of."""

    dtype: Dtype
    method: str
    shares: dict[str, int]
    """By the id of the model, in the order of the list."""


def ingredients(plan: Plan, output: int = 0) -> dict[str, Ingredients]:
    """Every tensor of an output that has elements, by its key, as a worker finds it in the strips of `plan`."""
    found = {}
    for strip in plan.strips:
        for cell in strip.cells:
            for place in cell.places:
                if place.output == output:
                    models = [plan.checkpoints[strip.sources[row]].id for row in cell.rows]
                    shares = dict(zip(models, cell.shares, strict=True))
                    assert strip.key not in found, "a tensor is made twice"
                    found[strip.key] = Ingredients(cell.dtype, cell.method, shares)
    return found


def problems(plan: Plan) -> list[str]:
    """What forbids `plan`, as text."""
    return [str(error) for error in plan.problems]
