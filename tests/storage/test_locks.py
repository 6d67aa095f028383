"""The lock that stands in where a file system has none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.errors import StorageError
from mergeflow.storage import locks
from mergeflow.storage.local import LocalStore
from mergeflow.storage.locks import STALE_AFTER, LockFile

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return tmp_path / "out.draft"


@pytest.fixture
def lock(draft: Path) -> Path:
    return draft.with_name("out.draft.lock")


def holder(**others: Any) -> dict[str, Any]:
    return {**locks._holder(), **others}


def a_process_that_is_gone() -> dict[str, Any]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = locks._started(process.pid)
        assert process.stdin is not None
        process.stdin.close()
    return holder(pid=process.pid, started=started)


ELSEWHERE = {"host": "elsewhere", "place": "another boot", "pid": os.getpid(), "started": 1}


def test_it_is_there_while_it_is_held_and_names_its_holder(draft: Path, lock: Path) -> None:
    held = LockFile(str(draft))
    assert json.loads(lock.read_text()) == holder()
    assert held.overtaken == ""
    held.release()
    assert list(draft.parent.iterdir()) == []


def test_a_lock_of_a_process_that_lives_is_refused_and_says_whose_it_is(draft: Path, lock: Path) -> None:
    held = LockFile(str(draft))
    with pytest.raises(StorageError, match=rf"is being written by another run \(process {os.getpid()} on .*\); wait"):
        LockFile(str(draft))
    held.release()
    LockFile(str(draft)).release()


@pytest.mark.parametrize(
    ("found", "age"),
    [
        pytest.param(a_process_that_is_gone(), 0, id="process-gone"),
        pytest.param(holder(started=1), 0, id="number-given-to-another-process"),
        pytest.param(ELSEWHERE, STALE_AFTER + 60, id="elsewhere-and-silent"),
        pytest.param({}, STALE_AFTER + 60, id="torn-and-old"),
    ],
)
def test_a_stale_lock_is_taken_over_and_that_is_told(draft: Path, lock: Path, found: Any, age: float) -> None:
    leave(lock, found, age)
    held = LockFile(str(draft))
    assert held.overtaken == f"process {found.get('pid', '?')} on {found.get('host', 'an unknown machine')}"
    assert json.loads(lock.read_text()) == holder()
    held.release()
    assert list(draft.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "age"),
    [
        pytest.param(ELSEWHERE, STALE_AFTER - 60, id="elsewhere-and-touched-lately"),
        pytest.param(holder(place="another container", pid=1), 0, id="the-same-machine-in-another-container"),
        pytest.param({}, 0, id="just-made-and-not-yet-written"),
    ],
)
def test_a_lock_that_may_be_alive_is_refused(draft: Path, lock: Path, found: Any, age: float) -> None:
    leave(lock, found, age)
    with pytest.raises(StorageError, match=r"remove .*out\.draft\.lock if you know that it is gone"):
        LockFile(str(draft))
    assert [path.name for path in draft.parent.iterdir()] == [lock.name]


def leave(lock: Path, found: dict[str, Any], age: float) -> None:
    lock.write_text(json.dumps(found) if found else "")
    then = lock.stat().st_mtime - age
    os.utime(lock, (then, then))


def test_it_is_renewed(draft: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEWED_EVERY", 0.01)
    held = LockFile(str(draft))
    os.utime(lock, (1, 1))
    while lock.stat().st_mtime < 2:
        pass
    held.release()


def test_who_was_overtaken_does_not_remove_the_lock_of_another(draft: Path, lock: Path) -> None:
    held = LockFile(str(draft))
    lock.write_text(json.dumps(ELSEWHERE))
    held.release()
    assert json.loads(lock.read_text()) == ELSEWHERE


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize("end", ["commit", "discard", "keep"])
def test_where_there_is_no_flock_a_draft_is_locked_by_it(tmp_path: Path, end: str) -> None:
    store = LocalStore()
    first = store.draft(str(tmp_path / "out"), 3)
    for again in (store.draft, store.reopen):
        with pytest.raises(StorageError, match="is being written by another run"):
            again(str(tmp_path / "out"), 3)
    first.notes.append(b"something")
    left = store.left(str(tmp_path / "out"))
    assert left is not None
    assert left.held
    getattr(first, end)()
    store.reopen(str(tmp_path / "out"), 3).discard()
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.usefixtures("without_flock")
def test_taking_over_is_told_in_the_log(tmp_path: Path, lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(lock, a_process_that_is_gone(), 0)
    LocalStore().draft(str(tmp_path / "out"), 3).discard()
    assert "took over the lock of process" in caplog.text
