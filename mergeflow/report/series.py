"""What lies beside the outputs of a series: which of them is what, and their names for a web UI."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergeflow.passes import Result
    from mergeflow.plan.plan import Output
    from mergeflow.recipe.request import Member

TABLE, PLOT = "series.csv", "xyz.txt"
COLUMNS = ("file", "series", "components", "model", "model_file", "change", "models", "tensors_sha256")


def write_series(result: Result, directory: str) -> list[Path]:
    """Write what there is to say of the series that `result` has, if it has one, and say where."""
    if not any(output.target.member for output in result.plan.outputs):
        return []
    written = [_write(Path(directory) / TABLE, series_table(result))]
    if names := plot_names(result):
        written.append(_write(Path(directory) / PLOT, f"{names}\n"))
    return written


def series_table(result: Result) -> str:
    """One line for each output of the series, the base included if it was written, as CSV."""
    rows = []
    for output, digest in zip(result.plan.outputs, result.digests, strict=True):
        member = output.target.member
        if member is not None:
            rows.append((output.target.file, *_facts(output, member), digest))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()


def plot_names(result: Result) -> str:
    """The files of the series in one line, as the web UI's X/Y/Z plot splits it: with its own parser of CSV.

    There is nothing for it where outputs are single components, which it cannot load.
    """
    members = [(output.target.file, output.target.member) for output in result.plan.outputs]
    names = [file for file, member in members if member is not None and member.write == "file"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(names)
    return text.getvalue().strip()


def _facts(output: Output, member: Member) -> tuple[str, ...]:
    """What series it is of, what varies, by which model and its file, how, and how many models are merged there."""
    counts = [str(len(part.entries)) for part in output.target.parts if part.component in member.components]
    return (
        member.series,
        " ".join(member.components),
        member.id,
        " + ".join(member.files),
        member.change,
        " ".join(counts),
    )


def _write(path: Path, text: str) -> Path:
    """Put `text` there, whole or not at all."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8", errors="replace")
    draft.replace(path)
    return path
