"""The lease: who is not asked any more ends, and whoever asks knows when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.execute.ray.actor import CountingStore, Lease
from mergeflow.storage.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 30.0


class Time:
    now = 0.0


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergeflow.execute.ray.actor.time.monotonic", lambda: Time.now)
        yield


def test_an_actor_that_is_asked_and_whose_answers_arrive_goes_on() -> None:
    Time.now = 0.0
    lease = Lease(SECONDS)
    for number in range(1, 1000):
        Time.now += 1.0
        lease.answer(number, number - 1)
        assert lease.left() == SECONDS - 1.0


def test_an_actor_whose_answers_do_not_arrive_ends() -> None:
    Time.now = 0.0
    lease = Lease(SECONDS)
    for number in range(1, 100):  # the same question again and again, or old ones that arrive late
        Time.now += 1.0
        lease.answer(number, 0)
    assert lease.left() == SECONDS - 99.0


@given(
    st.lists(
        st.tuples(st.floats(0.1, 20.0), st.floats(0.0, 50.0), st.floats(0.0, 50.0), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
def test_an_actor_has_ended_when_whoever_asks_thinks_so_however_late_words_arrive(
    rounds: list[tuple[float, float, float, bool]],
) -> None:
    """Each round: a pause, how long the question travels, how long the answer does, and whether it ever arrives."""
    Time.now = 0.0
    lease = Lease(SECONDS)
    here = 0.0
    answered = {0: 0.0}
    until = SECONDS
    for number, (pause, there, back, arrives) in enumerate(rounds, 1):
        here += pause
        acknowledged = max(answered)
        until = answered[acknowledged] + SECONDS
        Time.now = max(Time.now, here + there)
        if lease.left() <= 0:
            break
        lease.answer(number, acknowledged)
        assert Time.now + lease.left() <= until
        if not arrives:
            break  # no further question is put before it is answered
        here = Time.now + back
        answered[number] = here
    assert Time.now + lease.left() <= until


def test_a_process_whose_lease_ends_is_gone_whatever_it_does() -> None:
    program = """
import threading
from mergeflow.execute.ray.actor import Lease, ShardActor
threading.Thread(target=ShardActor._end_with, args=(Lease(0.5),), daemon=True).start()
threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], timeout=60, check=False)
    assert done.returncode == 1


def test_reads_and_writes_count_as_signs_of_life(tmp_path: Path) -> None:
    store = CountingStore(LocalStore(read_back=True))
    address = store.draft(str(tmp_path / "file"), 100).address
    writer = store.writer(address)
    writer.write(memoryview(b"x" * 10), 5)
    assert store.acts == 1
    store.reader(address).read_into(memoryview(bytearray(10)), 0)
    assert store.acts == 2
    store.sync([address])
    assert store.acts == 3
