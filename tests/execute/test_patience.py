"""What is repeated, how often, and that it never keeps anybody who wants to stop."""

from __future__ import annotations

import threading
import time

import pytest

from mergeflow.errors import ReadFailed, SourceChanged
from mergeflow.execute import patience
from mergeflow.execute.patience import patiently, repeat


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, without having been slept, by a clock that knows of it."""
    slept: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


class Failing:
    """What fails so many times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.done = times, error, 0

    def __call__(self) -> str:
        self.done += 1
        if self.done <= self.times:
            raise self.error
        return "read"


def test_what_succeeds_is_done_once_and_without_a_pause(pauses: list[float]) -> None:
    act = Failing(0, ReadFailed("not now"))
    assert patiently(act) == "read"
    assert (act.done, pauses) == (1, [])


@pytest.mark.parametrize("times", range(1, len(patience.PAUSES) + 1))
def test_what_fails_a_few_times_succeeds_after_longer_and_longer_pauses(times: int, pauses: list[float]) -> None:
    act = Failing(times, ReadFailed("not now"))
    assert patiently(act) == "read"
    assert act.done == times + 1
    assert sum(pauses) == pytest.approx(sum(patience.PAUSES[:times]))


def test_pauses_grow_and_come_to_less_than_a_minute() -> None:
    assert list(patience.PAUSES) == sorted(patience.PAUSES)
    assert sum(patience.PAUSES) < 60


def test_what_goes_on_failing_is_an_error_in_the_end(pauses: list[float]) -> None:
    act = Failing(100, ReadFailed("not now"))
    with pytest.raises(ReadFailed, match="not now"):
        patiently(act)
    assert act.done == 1 + len(patience.PAUSES)
    assert sum(pauses) == pytest.approx(sum(patience.PAUSES))


def test_what_cannot_pass_is_not_repeated(pauses: list[float]) -> None:
    act = Failing(100, SourceChanged("another file"))
    with pytest.raises(SourceChanged):
        patiently(act)
    assert (act.done, pauses) == (1, [])


def test_each_repetition_knows_how_many_there_were_before(pauses: list[float]) -> None:
    before: list[int] = []

    def act(number: int) -> None:
        before.append(number)
        raise ReadFailed("again")

    with pytest.raises(ReadFailed, match="again"):
        repeat(act, ReadFailed("first"))
    assert before == list(range(len(patience.PAUSES)))


def test_whoever_is_told_to_stop_does_not_finish_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.0, 600.0))
    stopped, waiting = threading.Event(), threading.Event()
    act = Failing(100, ReadFailed("not now"))

    def asked() -> bool:
        if act.done == 2:
            waiting.set()
        return stopped.is_set()

    def wait() -> None:
        with pytest.raises(ReadFailed):
            patiently(act, asked)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert waiting.wait(30)
    began = time.monotonic()
    stopped.set()
    thread.join(30)
    assert not thread.is_alive()
    assert time.monotonic() - began < 3
    assert act.done == 2
