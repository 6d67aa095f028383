"""What a verification has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.tensors import Checkpoint

Where: TypeAlias = Literal["sources", "plan", "header", "manifest", "tensors"]
"""What a finding is about: files that are not what they were, a recipe that cannot be carried out, and so on."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    where: Where
    text: str
    """A sentence with the place and the figures."""
    key: str | None = None
    """Of the tensor, where it is about one."""
    element: int | None = None
    """The first one that differs, counted in the tensor."""
    expected: str | None = None
    """Its bits, in hex."""
    found: str | None = None
    differing: int | None = None
    """How many of the elements that were looked at differ."""


@dataclass(frozen=True)
class Count:
    """How much of something was looked at."""

    checked: int
    total: int


@dataclass(frozen=True)
class Verification:
    """What is known of one file now."""

    file: Checkpoint
    version: str
    """The mergeflow that made it, as it says."""
    made_of: Mapping[str, str]
    """What each component is made of, in words."""
    sample: int | None
    """How many tiles were to be looked at; None for all."""
    seed: int
    sources: Count
    """Those that have the size and the header that the recipe tells."""
    header_bytes: int
    header: bool
    """Whether it is, byte for byte, what the recipe lays out."""
    manifest: str | None
    """What the manifest beside the file says of it; None where there is none."""
    versions: Mapping[str, str | None]
    """Of the libraries that made it, by the manifest."""
    digest: str | None
    """SHA-256 of the tensors, where the whole file was read."""
    tiles: Count
    tensors: Count
    elements: Count
    bytes_read: int
    seconds: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether all that was looked at is as it should be."""
        return not self.findings
