"""What a draft is of: the identity of an output, by which a later run knows whether it may go on with it.

It covers what decides the bytes, and nothing that decides where and when they are made: not the executor, the memory,
the tiles, nor which other outputs are made in the same pass.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeflow.plan.plan import Cell, Plan, Strip
    from mergeflow.tensors import Checkpoint

DIGITS = 32
"""Hex digits of a digest: 128 bits."""


@dataclass(frozen=True)
class OutputIdentity:
    """What one output is made of, in digests."""

    head: str
    """Of its head: names, shapes and places of all tensors, and the recipe in the metadata."""
    work: str
    """Of what is computed for every tensor, of which sources."""
    sources: Mapping[str, str]
    """Of every checkpoint that is read for it, by its id: size, time of change, inode and header."""

    def differs(self, before: OutputIdentity) -> str:
        """How the output of an earlier run was another one, in words; empty if it was the same."""
        if self == before:
            return ""
        changed = [id for id, digest in self.sources.items() if before.sources.get(id, digest) != digest]
        if self.sources.keys() != before.sources.keys():
            return f"it is made of {len(before.sources):,} other models than the {len(self.sources):,} of this plan"
        if changed:
            return f"model {some(changed)} has changed since (size, time of change, inode or header)"
        if self.head != before.head:
            return "its recipe, its tensors or its metadata are others"
        return "its options are others, or the order of its models is"


def identities(plan: Plan) -> tuple[OutputIdentity, ...]:
    """The identity of every output of `plan`. Pure, as the plan is."""
    told = [_source(checkpoint) for checkpoint in plan.checkpoints]
    work: list[list[bytes]] = [[] for _ in plan.outputs]
    read: list[set[int]] = [set() for _ in plan.outputs]
    describe = _Descriptions(plan, told)
    for strip in plan.strips:
        tensor = f"{strip.key}\0{strip.elements}\0".encode("utf-8", "surrogatepass")
        for cell in strip.cells:
            made, its = describe(strip, cell)
            for place in cell.places:
                work[place.output].append(tensor + b"%d\0" % place.offset + made)
                read[place.output].update(its)
    found = []
    for output, lines, sources in zip(plan.outputs, work, read, strict=True):
        lines.sort()  # strips of a pass lie in an order that other outputs have a say in
        digest = _digest([plan.nonfinite.encode(), *lines])
        ids = {plan.checkpoints[index].id: told[index] for index in sorted(sources)}
        found.append(OutputIdentity(_digest([output.layout.head]), digest, dict(sorted(ids.items()))))
    return tuple(found)


class _Descriptions:
    """What cells are made of and how, in digests; strips have most of their tuples in common, so each is made once."""

    def __init__(self, plan: Plan, told: Sequence[str]) -> None:
        self._ids = [checkpoint.id for checkpoint in plan.checkpoints]
        self._told = told
        self._known: dict[tuple[object, ...], tuple[bytes, frozenset[int]]] = {}

    def __call__(self, strip: Strip, cell: Cell) -> tuple[bytes, frozenset[int]]:
        """Its digest, and the indices of the checkpoints that it reads.

        Where a tensor lies in a source, and in which dtype, is told by the source's header.
        """
        same = id(strip.sources), id(cell.rows), id(cell.shares), id(cell.steps), cell.method, cell.dtype
        if same not in self._known:
            sources = [strip.sources[row] for row in cell.rows]
            rows = ",".join(self._told[source] for source in sources)
            steps = ";".join(
                f"{one.operation} {one.operands} {one.factor!r} {one.dtype.code} {one.into}" for one in cell.steps
            )
            text = f"{cell.method}\0{cell.dtype.code}\0{rows}\0{cell.shares}\0{steps}"
            self._known[same] = _digest([text.encode()]).encode(), frozenset(sources)
        return self._known[same]


def _source(checkpoint: Checkpoint) -> str:
    """A digest of what tells that a source is the same; its device may be another after it was mounted again."""
    stat = checkpoint.stat
    return _digest([f"{stat.size} {stat.mtime_ns} {stat.inode} {checkpoint.header.digest}".encode()])


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()[:DIGITS]
