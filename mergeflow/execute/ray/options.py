"""Where actors live, what they take and how long they are waited for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Placement: TypeAlias = Literal["spread", "pack", "strict_spread"]
EMBEDDED = "local"
PATIENCE_SECONDS = 300.0
"""Longer than servers of network file systems take to come back, which is the longest that anybody alive is silent."""


@dataclass(frozen=True)
class RayOptions:
    """Where the actors live, and how long they are waited for."""

    address: str = EMBEDDED
    """`local` for a Ray of this run's own, `auto` or `host:port` for a running cluster."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """What one actor takes of its node, by Ray's names: `CPU`, which is 1 unless it is given, `GPU`, `memory` in bytes,
    and any that nodes were started with."""
    placement: Placement = "spread"
    """`spread` puts actors where there are fewest, `pack` where there are most, and `strict_spread` never puts two on
    one node."""
    patience: float = PATIENCE_SECONDS
    """Seconds: an actor that has got on with nothing for so long is given up, and its shards go to others."""
    workers: int | None = None
    """How many actors were asked for by number; None where that is left to what there is room for."""
