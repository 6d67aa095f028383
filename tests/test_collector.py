"""A pause of the garbage collector ends as it began."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from mergeflow.collector import collector_paused

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
def test_it_is_off_during_a_pause_and_afterwards_as_before(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), collector_paused():
        raise ZeroDivisionError
    assert gc.isenabled()
