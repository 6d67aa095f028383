"""What there is to do: the shards of a real plan, as bytes and calls.

SDXL's tensors are planned by `mergeflow.plan`, for two models; the strips are then given N rows, and cut by the
planner's own rules. A model of another size is SDXL with every tensor longer or shorter by the same factor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from omegaconf import OmegaConf

from mergeflow.demo.catalogue import Variant
from mergeflow.demo.generate import layout_of
from mergeflow.formats.safetensors import Safetensors
from mergeflow.plan.make import make_plan
from mergeflow.plan.tiles import PIECE, cut, memory_for
from mergeflow.recipe.architecture import Architecture, architecture
from mergeflow.recipe.request import UNIFORM, Budget, ModelSource, Policies, Request, TargetRequest
from mergeflow.recipe.resolve import resolve
from mergeflow.tensors import Checkpoint, FileStat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.scaling.machine import Node
    from mergeflow.plan.plan import Plan, Strip, Tile
    from mergeflow.tensors import Layout

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Budget(workers=1, reads_in_flight=4, memory=1 << 30)
"""Where a plan is wanted and its blocks are not."""


class Shard(NamedTuple):
    """What one thread does before it sends a receipt."""

    read: float
    """Bytes."""
    written: float
    """Bytes."""
    requests: int
    """Reads."""
    pieces: int
    """How often rows are merged, a piece at a time."""
    rows: int
    """Rows of all pieces."""

    def __add__(self, other: object) -> Shard:
        """Both, one after the other."""
        if not isinstance(other, Shard):
            return NotImplemented
        return Shard(
            self.read + other.read,
            self.written + other.written,
            self.requests + other.requests,
            self.pieces + other.pieces,
            self.rows + other.rows,
        )


NOTHING = Shard(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Work:
    """One merge: N models into one output."""

    models: int
    shards: tuple[Shard, ...]
    block: int
    """Bytes of one thread's block."""

    @functools.cached_property
    def total(self) -> Shard:
        """All shards together."""
        return sum(self.shards, NOTHING)

    @property
    def request(self) -> float:
        """Bytes of a read, on average."""
        return self.total.read / self.total.requests


@functools.cache
def sdxl() -> Architecture:
    """What `arch=sdxl` is."""
    described = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "arch" / "sdxl.yaml"))
    return architecture(**cast("dict[str, Any]", described))


def plan_of(models: int, layout: Layout, arch: Architecture, budget: Budget = BUDGET) -> Plan:
    """The plan of the uniform mean of so many models, each of which has that header."""
    format = Safetensors()
    header = format.parse(lambda offset, count: layout.head[offset : offset + count], layout.size)
    checkpoints = [
        Checkpoint(str(index), f"/models/{index}.safetensors", FileStat(layout.size, 0, 0, index), header)
        for index in range(models)
    ]
    request = Request(
        models=ModelSource(files={one.id: one.path for one in checkpoints}),
        architecture=arch,
        selections={"models": "all"},
        targets=(TargetRequest("mean", "mean.safetensors", selection="models"),),
        method=UNIFORM,
        dtype=arch.dtype,
        policies=Policies(),
        budget=budget,
        out="/out",
    )
    return make_plan(resolve(request, []), checkpoints, format, "/out")


@functools.cache
def _template() -> tuple[tuple[Strip, ...], int]:
    """The strips of two models, and the bytes of one."""
    layout = layout_of(sdxl(), Variant(1))
    return plan_of(2, layout, sdxl()).strips, layout.size


@functools.lru_cache(maxsize=64)
def work(models: int, model_bytes: float, workers: int, reads_in_flight: int, memory: int) -> Work:
    """The shards of a merge by workers of one node, which share `memory` bytes; raises `OverBudget` if too little.

    Other nodes with as much memory each have the same blocks, so the shards do not depend on how many there are.
    """
    template, size = _template()
    strips = [_widened(strip, models, model_bytes / size) for strip in template]
    memories = memory_for(strips, Budget(workers, reads_in_flight, memory))
    shards = cut(strips, memories)
    return Work(models, _shards(strips, shards), memories.block)


def work_of(models: int, model_bytes: float, node: Node) -> Work:
    """The shards of a merge by nodes like that one."""
    return work(models, model_bytes, node.workers, node.reads_in_flight, int(node.memory))


def work_of_plan(plan: Plan) -> Work:
    """The shards of a plan that there is."""
    return Work(len(plan.checkpoints), _shards(plan.strips, plan.shards), plan.memory.block)


def _widened(strip: Strip, models: int, factor: float) -> Strip:
    """The same tensor of so many models, longer by `factor`."""
    rows = tuple(range(models))
    (cell,) = strip.cells
    return strip._replace(
        elements=max(1, round(strip.elements * factor)),
        sources=rows,
        dtypes=strip.dtypes[:1] * models,
        offsets=strip.offsets[:1] * models,
        cells=(cell._replace(rows=rows, shares=(1,) * models),),
    )


def _shards(strips: Sequence[Strip], shards: Sequence[Sequence[Tile]]) -> tuple[Shard, ...]:
    """What each shard costs; the widths of a strip are added up once, for it has thousands of rows."""
    written = [sum(cell.dtype.itemsize for cell in strip.cells) for strip in strips]
    read = [strip.bytes_per_element - out for strip, out in zip(strips, written, strict=True)]
    found = []
    for tiles in shards:
        shard = NOTHING
        for tile in tiles:
            elements, rows = tile.stop - tile.start, len(strips[tile.strip].sources)
            pieces = -(-elements // PIECE)
            shard += Shard(elements * read[tile.strip], elements * written[tile.strip], rows, pieces, pieces * rows)
        found.append(shard)
    return tuple(found)
