"""A finished file that is to be looked at: whether it is what its recipe makes of its sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.request import ModelSource


@dataclass(frozen=True)
class VerificationRequest:
    """What is to be verified, and how far."""

    path: str
    """The file; absolute."""
    models: ModelSource
    """Where its sources are."""
    architecture: Architecture
    out: str
    """Where hashes of whole files are kept."""
    sample: int | None = 1000
    """How many tiles; None for all."""
    seed: int = 0
    """Which tiles these are."""
