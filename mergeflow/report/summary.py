"""What was made, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mergeflow.recipe.request import COPY
from mergeflow.report.manifest import peaks
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from mergeflow.merge import Result
    from mergeflow.plan.plan import Output

WIDEST = 10_000
"""Columns; a path or a digest that is folded cannot be copied."""


def summary(result: Result) -> str:
    """A table with one row for each fact of each target, and the run's own facts below."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for output, digest in zip(result.plan.outputs, result.digests, strict=True):
        table.add_row(output.target.name, output.path)
        table.add_row("", f"{si_bytes(output.layout.size)}, tensors' SHA-256 {digest}")
        table.add_row("", _parts(output))
    plan = result.plan
    processes = peaks(result)
    read = plan.bytes_read if result.shared else sum(receipt.bytes_read for receipt in result.receipts)
    table.add_row("read", f"{si_bytes(read)} of {len(plan.checkpoints)} files, each byte once")
    if result.shared is not None:
        once, apart = result.shared.plan.bytes_read, result.shared.bytes_apart
        jobs = len(result.shared.jobs)
        table.add_row("", f"{si_bytes(once)} once for {jobs} jobs, instead of {si_bytes(apart)} one after the other")
    taken = f"; {si_bytes(result.resumed)} were there already" if result.resumed else ""
    table.add_row("wrote", f"{si_bytes(plan.bytes_written - result.resumed)}{taken}")
    startup = f", after {result.startup_seconds:.1f} s until workers were ready" if result.startup_seconds else ""
    table.add_row("took", f"{result.seconds:.1f} s, {result.moved / 1e9 / result.seconds:.2f} GB/s{startup}")
    table.add_row("memory", f"{si_bytes(sum(processes.values()))} at the peak of {len(processes)} process(es)")
    if plan.notes:
        table.add_row("notes", f"{len(plan.notes)}, in the manifest and in job=plan")
    if result.tolerated:
        values = sum(result.tolerated.values())
        table.add_row(
            "", f"{values:,} value(s) were not finite, in {len(result.tolerated)} tensor(s); see the manifest"
        )
    console = Console(width=WIDEST, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _parts(output: Output) -> str:
    made = []
    for part in output.target.parts:
        if part.component not in dict(output.dtypes):
            continue
        entries = part.as_read().entries
        what = f"model {entries[0]}" if part.method == COPY else f"{part.method} of {len(entries)}"
        made.append(f"{part.component}: {what}")
    return ", ".join(made)
