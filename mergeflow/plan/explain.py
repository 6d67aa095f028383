"""The plan as a page of text."""

from __future__ import annotations

import textwrap
from fractions import Fraction
from typing import TYPE_CHECKING

from mergeflow.plan.drawing import baked, draw
from mergeflow.plan.metadata import share_in_text
from mergeflow.plan.pace import estimate, in_words
from mergeflow.recipe.request import COPY, REST
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.plan.plan import Output, Plan
    from mergeflow.recipe.request import Part

WIDTH = 110
INDENT = " " * 8
LONGEST_TERM = 10_000
"""Of a fraction; what takes more digits says more as a decimal."""


def explain(plan: Plan) -> str:
    """What will be made of what, what it costs, what is odd and what forbids it."""
    lines = [f"{len(plan.outputs)} output(s) from {len(plan.checkpoints)} checkpoint(s)", ""]
    told: dict[object, str] = {}
    for output in plan.outputs:
        lines += [*_output(output, told), ""]
    lines += _cost(plan)
    for title, sentences in (("notes", list(plan.notes)), ("problems", [str(e) for e in plan.problems])):
        if sentences:
            lines += ["", f"{title} ({len(sentences)})", *(line for text in sentences for line in _item(text))]
    lines += ["", "nothing forbids this plan" if not plan.problems else "this plan cannot be carried out"]
    return "\n".join(lines)


def _output(output: Output, told: dict[object, str]) -> Iterator[str]:
    """One output; a list or a tree that several components share is told with the first, and `told` says which."""
    size = f"{si_bytes(output.layout.size)}, {len(output.layout.tensors):,} tensors"
    yield f"{output.target.name} -> {output.path} ({size})"
    dtypes = dict(output.dtypes)
    width = max(len(part.component) for part in output.target.parts) + 2
    for part in output.target.parts:
        if part.component == REST and REST not in dtypes:
            continue  # most models have nothing that belongs to no component
        written = f"written as {dtypes.get(part.component, 'nothing')}"
        if part.method == COPY:
            yield f"  {part.component:<{width}}model {part.entries[0]} as it is, {written}"
            continue
        read = part.as_read()
        models = f"{len(read.entries)} model{'' if len(read.entries) == 1 else 's'}"
        checkpoints = "" if len(read.shares) == len(read.entries) else f" ({len(read.shares)} checkpoints)"
        yield f"  {part.component:<{width}}{how(part)} of {models}{checkpoints}, {written}"
        once = part.tree or (read.entries, tuple(read.shares.items()))
        if read is not part or once not in told:
            yield from _wrapped(" ".join(read.entries))
            yield from _wrapped(shares_in_words(read))
        if once in told:
            yield f"{INDENT}{'by the tree of' if part.tree else 'the same as'} {told[once]}"
            continue
        told[once] = f"{part.component} of {output.target.name}"
        if part.tree is not None:
            yield from (INDENT + line for line in (*baked(part.tree), *draw(part.tree)))


def how(part: Part) -> str:
    """The method of a part, in a word or two."""
    if part.rules is None:
        return part.method
    before = ", fp16 scalars" if part.rules.scalars == "half" else ""
    return f"{part.method} ({part.rules.arithmetic}{before})"


def shares_in_words(part: Part) -> str:
    """`share 1/14 each, but 21 1/28, 22 3/28`: the share that an entry has, and who has another."""
    usual = Fraction(1, len(part.entries))
    others = [(id, share) for id, share in part.shares.items() if share != usual]
    others_in_words = ", ".join(f"{id} {_short(share)}" for id, share in others)
    if len(others) == len(part.shares):
        return f"share {others_in_words}"
    return f"share {usual} each" + (f", but {others_in_words}" if others else "")


def _short(share: Fraction) -> str:
    text = share_in_text(share, LONGEST_TERM)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _cost(plan: Plan) -> Iterator[str]:
    read, written = plan.bytes_read, plan.bytes_written
    yield f"read    {si_bytes(read)} of {len(plan.checkpoints)} file(s), each byte once"
    yield f"write   {si_bytes(written)} into {len(plan.outputs)} file(s)"
    if sum(plan.left):
        yield f"resume  {si_bytes(sum(plan.left))} are left of an earlier run; what proves right is not made again"
    yield f"work    {len(plan.strips):,} tensors in {plan.tiles:,} tiles, {len(plan.shards):,} shards"
    if plan.shards:
        yield from _lines(_memory(plan), "", INDENT)
    expected = estimate(plan)
    if expected is None:
        yield f"time    about {(read + written) / 1e9:,.1f} s where the storage delivers 1 GB/s, half of it at 2 GB/s"
    else:
        yield from _lines(f"time    about {expected.total:,.1f} s: {expected.in_words()}", "", INDENT)
        yield from _lines(f"        {in_words(plan)}", "", INDENT)


def _memory(plan: Plan) -> str:
    memory = plan.memory
    per_worker = plan.budget.reads_in_flight * memory.per_thread
    return (
        f"memory  {si_bytes(per_worker)} per worker, {si_bytes(memory.projected)} for {plan.budget.workers} worker(s) "
        f"with {plan.budget.reads_in_flight} block(s) each, of {si_bytes(memory.allowed)} allowed; beside it every "
        "process has Python and torch (about 0.3 GB)"
    )


def _wrapped(text: str) -> list[str]:
    return _lines(text, INDENT, INDENT)


def _item(text: str) -> list[str]:
    return _lines(text, "  - ", "    ")


def _lines(text: str, first: str, others: str) -> list[str]:
    """Lines that break at spaces only: ids and file names stay whole, to be copied."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )
