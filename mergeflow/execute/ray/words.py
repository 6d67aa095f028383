"""What Ray reports, in a few plain words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from mergeflow.execute.ray.actor import Pulse

MEMORY = ("OutOfMemory", "low on memory")
LONGEST = 300
"""Characters of what Ray says that are passed on."""


class Reason(NamedTuple):
    """Why an actor is gone."""

    text: str
    certain: bool
    """Whether its process has ended for certain; nobody can look at a node that does not answer."""


def reason(error: Exception, last: Pulse | None) -> Reason:
    """Why an actor is gone by what Ray raised, and by the `last` answer that it gave."""
    said = str(error)
    if any(word in said for word in MEMORY):
        return Reason(f"it was killed for memory{_room(last)}; lower executor.memory or executor.workers", True)
    if "node has died" in said or "NodeDied" in type(error).__name__:
        return Reason("its node was lost", False)
    if "unavailable" in said.lower() or "Unavailable" in type(error).__name__:
        return Reason("it cannot be reached any more", False)
    if "killed by `ray.kill`" in said:
        return Reason("it was killed", True)
    if "unexpectedly" in said:
        return Reason(
            f"its process ended without a word{_room(last)}; the kernel ends processes like that when memory is "
            "short: then lower executor.memory or executor.workers",
            True,
        )
    return Reason(first_lines(said) or type(error).__name__, False)


def first_lines(said: str) -> str:
    """What Ray said, on one line and not too long; of a traceback its last line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in said.splitlines()]
    lines = [line for line in lines if line]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    text = " ".join(lines)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _room(last: Pulse | None) -> str:
    if last is None:
        return ""
    return (
        f" (its node has {si_bytes(last.memory)}, of which {si_bytes(last.available)} were available a moment before)"
    )
