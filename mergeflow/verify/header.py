"""The header of a file beside the one that its recipe lays out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.recipe.reading import short
from mergeflow.text import some
from mergeflow.verify.result import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mergeflow.tensors import Header, Layout, TensorInfo


def differences(head: bytes, found: Header, wanted: Layout, metadata: Mapping[str, str] | None) -> Iterator[Finding]:
    """How the first bytes of a file, `head`, and what they say differ from what they should be.

    `metadata` is what `wanted` says; None where it cannot be known, because the sources are others now.
    """
    told = list(_of_tensors(found.tensors, wanted.tensors))
    if metadata is not None:
        told += _of_metadata(found.metadata, metadata)
        if head != wanted.head and not told:
            at = next((at for at, (one, other) in enumerate(zip(head, wanted.head, strict=False)) if one != other), -1)
            what = f"its byte {at:,} is 0x{head[at]:02x}, and should be 0x{wanted.head[at]:02x}"
            if at < 0:
                what = f"it has {len(head):,} bytes, and should have {len(wanted.head):,}"
            told.append(f"the header says what it should, but in other words: {what}")
    return (Finding("header", text) for text in told)


def _of_tensors(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo]) -> Iterator[str]:
    if lacking := [short(key) for key in wanted if key not in found]:
        yield f"the header lacks {len(lacking):,} tensor(s) that the recipe makes: {some(lacking)}"
    if surplus := [short(key) for key in found if key not in wanted]:
        yield f"the header has {len(surplus):,} tensor(s) that the recipe does not make: {some(surplus)}"
    shared = [key for key in wanted if key in found]
    for key in shared:
        one, other = found[key], wanted[key]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            yield (
                f"'{key}' is {one.dtype.code} {list(one.shape)} by the header, and should be {other.dtype.code} "
                f"{list(other.shape)}"
            )
    places = [sorted(shared, key=lambda key: table[key][2:]) for table in (found, wanted)]
    if places[0] != places[1] and not lacking and not surplus:
        yield "the header has the tensors in another order than the recipe lays them out"


def _of_metadata(found: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*found, *wanted}):
        if name not in found:
            yield f"the metadata lack '{short(name)}'"
        elif name not in wanted:
            yield f"the metadata have '{short(name)}', which mergeflow does not write"
        elif found[name] != wanted[name]:
            at = _first_difference(found[name], wanted[name])
            yield (
                f"the metadata '{name}' differ from what the recipe makes of them: from character {at:,} on they say "
                f"'{short(found[name][at : at + 24])}', and should say '{short(wanted[name][at : at + 24])}'"
            )


def _first_difference(one: str, other: str) -> int:
    shared = min(len(one), len(other))
    return next((at for at in range(shared) if one[at] != other[at]), shared)
