"""Time as a process lives it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mergeflow.execute.ray.clock import LONGEST_STEP, Awake

if TYPE_CHECKING:
    import pytest


def test_what_a_process_sleeps_through_hardly_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Awake()
    now += 0.5
    assert clock.now() == 0.5
    now += 3600.0
    assert clock.now() == 0.5 + LONGEST_STEP
    assert clock.missed() == 3600.0 - LONGEST_STEP
    assert clock.missed() == 0.0
    now += 1.0
    assert clock.now() == 1.5 + LONGEST_STEP
    assert clock.missed() == 0.0
