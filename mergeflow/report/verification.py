"""What a verification has found, as a page and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow import __version__
from mergeflow.tensors import si_bytes
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.verify.result import Count, Verification

NAME = "verify.json"
MOST_TOLD = 20
"""Problems on the page; the JSON has all of them."""


def page(found: Verification) -> str:
    """What was looked at, what is wrong, and the result."""
    return "\n".join(_lines(found))


def to_json(found: Verification) -> dict[str, Any]:
    """Everything as plain data. The file is told by name: it may be published."""
    return {
        "mergeflow": __version__,
        "file": Path(found.file.path).name,
        "size": found.file.stat.size,
        "holds": found.holds,
        "made_by": found.version,
        "made_of": dict(found.made_of),
        "sample": "all" if found.sample is None else found.sample,
        "seed": found.seed,
        "sources": vars(found.sources),
        "header": {"bytes": found.header_bytes, "holds": found.header},
        "manifest": found.manifest is not None,
        "versions": dict(found.versions),
        "tensors_sha256": found.digest,
        "tiles": vars(found.tiles),
        "tensors": vars(found.tensors),
        "elements": vars(found.elements),
        "problems": [
            {name: value for name, value in vars(finding).items() if value is not None} for finding in found.findings
        ],
        "notes": list(found.notes),
        "bytes_read": found.bytes_read,
        "seconds": round(found.seconds, 3),
    }


def _lines(found: Verification) -> Iterator[str]:
    yield f"file      {found.file.path}"
    yield f"          {si_bytes(found.file.stat.size)}, made by mergeflow {found.version}"
    for component, made_of in found.made_of.items():
        yield f"          {component}: {made_of}"
    yield f"sources   {_of(found.sources)} have the size and the header that the recipe tells"
    as_laid_out = (
        "byte for byte as the recipe lays it out" if found.header else "NOT shown to be what the recipe lays out"
    )
    yield f"header    {found.header_bytes:,} bytes, {as_laid_out}"
    if found.manifest is None:
        yield "manifest  none of this file"
    else:
        agrees = not any(finding.where == "manifest" for finding in found.findings)
        yield f"manifest  {'agrees' if agrees else 'does NOT agree'}; {_versions(found)}"
    if found.digest is not None:
        yield f"          tensors' SHA-256 {found.digest}"
    wrong = len({finding.key for finding in found.findings if finding.where == "tensors"})
    yield (
        f"tensors   {_of(found.tiles)} tiles computed once more: {_of(found.elements)} elements, in "
        f"{_of(found.tensors)} tensors; {'all as they should be' if not wrong else f'{wrong:,} tensors are NOT'}"
    )
    rate = found.elements.checked / max(found.seconds, 1e-9)
    yield f"          read {si_bytes(found.bytes_read)} in {found.seconds:.1f} s, {rate:,.0f} elements/s"
    yield from _told("notes", list(found.notes))
    yield from _told("problems", [finding.text for finding in found.findings])
    yield f"result    {_result(found)}"


def _result(found: Verification) -> str:
    if not found.holds:
        return "this file is not shown to be what its recipe makes of these sources"
    if found.tiles.checked == found.tiles.total:
        return "it is what its recipe makes of these sources, to the bit"
    return "as far as was looked, it is what its recipe makes of these sources; sample=all looks at everything"


def _versions(found: Verification) -> str:
    versions = [f"{name} {version}" for name, version in found.versions.items() if version is not None]
    return f"made with {some(versions, 12)}" if versions else "it tells no versions"


def _told(title: str, texts: list[str]) -> Iterator[str]:
    if texts:
        yield f"{title} ({len(texts):,})"
        yield from (f"  - {text}" for text in texts[:MOST_TOLD])
        if len(texts) > MOST_TOLD:
            yield f"  and {len(texts) - MOST_TOLD:,} more; {NAME} has them all"


def _of(count: Count) -> str:
    return f"{count.checked:,} of {count.total:,}"
