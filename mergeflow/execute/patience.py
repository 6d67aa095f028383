"""Reads that failed, once more: what fails in one moment of hours need not cost the hours.

Only reads, and looks at files. A write or a sync that failed is never repeated: see decision 0027.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from mergeflow.errors import ReadFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    T = TypeVar("T")

PAUSES = (0.25, 1.0, 4.0, 15.0)
"""Seconds before each repetition. A disk has tried for itself before it reports an error, and a server that was
restarted, or a mount that is made again, is back within seconds or not soon."""
SLICE = 0.1
"""Seconds within which a pause ends once the run is being given up."""


def repeat(act: Callable[[int], T], error: ReadFailed, stopped: Callable[[], bool] = lambda: False) -> T:
    """What `act`, which has met `error`, returns when it is done again, after longer and longer pauses.

    It is told how often it was repeated before. Raises the last `ReadFailed` when there have been as many pauses as
    there are, or at once when the run is `stopped`; any other error as it comes.
    """
    for number, seconds in enumerate(PAUSES):
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if stopped():
                raise error
            time.sleep(min(left, SLICE))
        if stopped():
            raise error
        try:
            return act(number)
        except ReadFailed as again:
            error = again
    raise error


def patiently(act: Callable[[], T], stopped: Callable[[], bool] = lambda: False) -> T:
    """What `act` returns, repeated as `repeat` does where it raises `ReadFailed`."""
    try:
        return act()
    except ReadFailed as error:
        return repeat(lambda _: act(), error, stopped)
