"""Time as a process lives it."""

from __future__ import annotations

import time

LONGEST_STEP = 2.0


class Awake:
    """A clock that nearly stands still while its process does.

    A process that is stopped, or whose machine is, hears nothing from others meanwhile, and must not take that for
    their silence. Whoever asks often sees the time that passes; of a longer pause `LONGEST_STEP` seconds count.
    """

    def __init__(self) -> None:
        self._seen = time.monotonic()
        self._time = 0.0
        self._missed = 0.0

    def now(self) -> float:
        """Seconds."""
        seen = time.monotonic()
        step, self._seen = seen - self._seen, seen
        self._time += min(step, LONGEST_STEP)
        self._missed += max(step - LONGEST_STEP, 0.0)
        return self._time

    def missed(self) -> float:
        """Seconds that did not count, since this was asked before."""
        missed, self._missed = self._missed, 0.0
        return missed
