from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.errors import StorageError
from mergeflow.storage.local import (
    LocalStore,
    exists,
    free_bytes,
    list_files,
    nearest_existing,
    writable_problem,
)
from tests.conformance.store import BODY, StoreConformance, read, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mergeflow.interfaces import Store

STORE = LocalStore()


class TestLocalStore(StoreConformance):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "files"
        self.directory.mkdir()

    @pytest.fixture
    def store(self) -> Store:
        return LocalStore()

    def put(self, path: str, data: bytes) -> None:
        file = Path(path)
        before = file.stat().st_mtime_ns if file.exists() else 0
        file.write_bytes(data)
        if file.stat().st_mtime_ns == before:  # the clock of a file system ticks every few milliseconds
            os.utime(file, ns=(before + 1, before + 1))

    def get(self, path: str) -> bytes | None:
        file = Path(path)
        return file.read_bytes() if file.exists() else None

    def traces(self) -> list[str]:
        return sorted(str(path) for path in self.directory.rglob("*"))

    def path(self, name: str) -> str:
        return str(self.directory / name)


@contextmanager
def raises(*texts: str) -> Iterator[None]:
    """A `StorageError` whose message holds all of `texts` and is one line."""
    with pytest.raises(StorageError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


# what a path may turn out to be


def test_stat_follows_links_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(BODY)
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "hard").hardlink_to(tmp_path / "model")
    stats = {STORE.stat(str(tmp_path / name)) for name in ("model", "link", "hard")}
    assert len(stats) == 1, "the same file under three names has one identity"
    assert read(STORE.reader(str(tmp_path / "link")), 0, 4) == BODY[:4]


def _directory(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to("gone.safetensors")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/null")


def _nothing(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(_directory, "is a directory, not a checkpoint file", id="directory"),
        pytest.param(_fifo, "is not a regular file", id="fifo"),
        pytest.param(_device, "is not a regular file", id="device"),
        pytest.param(_nothing, "does not exist", id="missing"),
        pytest.param(_dangling, "is a link to gone.safetensors, which does not exist", id="dangling-link"),
        pytest.param(_loop, "is a link that leads to itself", id="link-loop"),
    ],
)
def test_stat_says_why_a_path_is_no_checkpoint_file(tmp_path: Path, make: Callable[[Path], None], text: str) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with raises(str(path), text):
        STORE.stat(str(path))


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    path = str(tmp_path / "file" / "model")
    for ask in (STORE.stat, STORE.reader):
        with raises(path, "below something that is not a directory"):
            ask(path)
    with raises(path, "below something that is not a directory"):
        STORE.draft(path, 1)


def test_reading_a_directory_is_refused(tmp_path: Path) -> None:
    with raises(str(tmp_path), "is a directory"):
        read(STORE.reader(str(tmp_path)), 0, 1)


def test_a_failure_without_a_remedy_of_ours_is_told_in_the_words_of_the_system(tmp_path: Path) -> None:
    with raises("cannot be written: File name too long"):
        STORE.draft(str(tmp_path / ("x" * 250)), 1)


# permissions: root may do everything, so these run as nobody

NOBODY = 65534
CANNOT_DROP = 77


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user of the machine can reach, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def as_nobody(place: Path, code: str) -> str:
    """What `code` prints in a process without privileges whose working directory is `place`."""
    program = f"""
import os, sys
from pathlib import Path
from mergeflow.errors import StorageError
from mergeflow.storage.local import LocalStore, free_bytes, writable_problem

if os.geteuid() == 0:
    try:
        os.setgroups([])
        os.setgid({NOBODY})
        os.setuid({NOBODY})
    except OSError:
        sys.exit({CANNOT_DROP})
os.chdir({str(place)!r})
try:
{textwrap.indent(textwrap.dedent(code), "    ")}
except StorageError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode == CANNOT_DROP:
        pytest.skip("this process is root and may not become another user")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("mode", "code", "text"),
    [
        pytest.param(0o644, "LocalStore().reader('model')", "model may not be accessed", id="unreadable-file"),
        pytest.param(0o644, "LocalStore().stat('locked/model')", "locked/model may not be accessed", id="stat"),
        pytest.param(0o644, "LocalStore().reader('locked/model')", "locked/model may not be accessed", id="reader"),
        pytest.param(0o644, "LocalStore().draft('locked/o', 1)", "locked/o.draft may not be accessed", id="draft"),
        pytest.param(0o755, "LocalStore().draft('locked/o', 1)", "locked/o.draft may not be accessed", id="read-only"),
        pytest.param(0o755, "LocalStore().draft('locked/n/o', 1)", "n/o.draft may not be accessed", id="no-mkdir"),
    ],
)
def test_a_lack_of_permission_is_named_with_its_remedy(place: Path, mode: int, code: str, text: str) -> None:
    (place / "model").write_bytes(BODY)
    (place / "model").chmod(0)
    (place / "locked").mkdir(mode)
    message = as_nobody(place, code)
    assert text in message
    assert message.endswith("check its permissions")


def test_a_directory_that_may_be_written_but_not_read_still_takes_a_file(place: Path) -> None:
    (place / "drop").mkdir()
    (place / "drop").chmod(0o733)
    code = "LocalStore().draft('drop/out', 3).commit(); print(Path('drop/out').stat().st_size)"
    assert as_nobody(place, code) == "3"


def test_a_directory_that_may_not_be_written_is_a_problem(place: Path) -> None:
    assert writable_problem(str(place)) is None
    code = "print(writable_problem('below/it')); print(free_bytes('below/it') > 0)"
    assert as_nobody(place, code) == f"{place} may not be written to\nTrue"


# reading


def test_a_short_read_names_the_file_and_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(1500))
    with raises(str(path), "ends at byte 1,500", "2,400 were expected", "changed while it was being read"):
        read(STORE.reader(str(path)), 1400, 1000)


def test_short_counts_of_the_system_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_read, real_write = os.preadv, os.pwrite
    calls = {"preadv": 0, "pwrite": 0}

    def short_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls["preadv"] += 1
        return real_read(descriptor, [buffers[0][:100]], offset)

    def short_write(descriptor: int, buffer: memoryview, offset: int) -> int:
        calls["pwrite"] += 1
        return real_write(descriptor, buffer[:100], offset)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", short_write)
    draft = STORE.draft(str(tmp_path / "out"), len(BODY))
    write(STORE, draft.address, BODY, 0)
    assert read(STORE.reader(draft.address), 0, len(BODY)) == BODY
    draft.commit()
    assert calls == {"preadv": 13, "pwrite": 13}


def test_a_signal_does_not_disturb_a_read(tmp_path: Path) -> None:
    """A pipe stands in for a slow disk: the read begins, a signal comes, and only then the byte."""
    path = tmp_path / "slow"
    os.mkfifo(path)
    arrived: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: arrived.append(number))
    main = threading.get_ident()

    def feed() -> None:
        with path.open("wb") as pipe:
            time.sleep(0.1)
            signal.pthread_kill(main, signal.SIGUSR1)
            time.sleep(0.1)
            pipe.write(b"x")

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        reader = STORE.reader(str(path))
        # A pipe cannot be read at an offset; -1 asks the system to read where it stands.
        assert read(reader, -1, 1) == b"x"
        reader.close()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert arrived == [signal.SIGUSR1]


# what the system refuses


@pytest.mark.parametrize(
    ("number", "texts"),
    [
        pytest.param(errno.EFBIG, ["forbids so large a file", "out="], id="EFBIG"),
        pytest.param(errno.EROFS, ["read-only", "out="], id="EROFS"),
        pytest.param(errno.EIO, ["its device or server reports an error", "Input/output error", "dmesg"], id="EIO"),
        pytest.param(errno.EBADMSG, ["its device or server reports an error", "Bad message"], id="EBADMSG"),
        pytest.param(errno.ETIMEDOUT, ["its server does not answer", "timed out", "the network"], id="ETIMEDOUT"),
        pytest.param(errno.EAGAIN, ["its server does not answer", "temporarily unavailable"], id="EAGAIN"),
        pytest.param(errno.EHOSTDOWN, ["its server does not answer", "Host is down"], id="EHOSTDOWN"),
        pytest.param(errno.ESTALE, ["replaced or removed on its server", "Stale file handle"], id="ESTALE"),
        pytest.param(errno.ENOTCONN, ["file system or device is gone", "mount it again"], id="ENOTCONN"),
        pytest.param(errno.ENXIO, ["file system or device is gone", "mount it again"], id="ENXIO"),
        pytest.param(errno.ENODEV, ["file system or device is gone", "mount it again"], id="ENODEV"),
        pytest.param(errno.E2BIG, ["cannot be", "Argument list too long"], id="any-other"),
    ],
)
@pytest.mark.parametrize("call", ["open", "ftruncate", "pwrite", "preadv", "fsync", "replace", "close"])
def test_every_refusal_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, texts: list[str]
) -> None:
    check_refusal(tmp_path, monkeypatch, call, number, texts)


@pytest.mark.parametrize("call", ["open", "ftruncate", "pwrite", "fsync", "replace", "close"])
@pytest.mark.parametrize(
    ("number", "text"),
    [
        pytest.param(errno.ENOSPC, "the disk is full", id="ENOSPC"),
        pytest.param(errno.EDQUOT, "the disk quota is used up", id="EDQUOT"),
    ],
)
def test_where_there_is_no_room_the_figures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, text: str
) -> None:
    texts = [f"cannot be written: {text}", "free some space, or choose another out="]
    if call in ("ftruncate", "pwrite", "fsync"):  # where there is a file to ask about
        texts += ["B free there", "of this file are not yet on it)"]
    if call == "pwrite":
        texts.append("and 4 B of this file")
    check_refusal(tmp_path, monkeypatch, call, number, texts)


def check_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, texts: list[str]) -> None:
    """Have one call refuse, and look at what is told and what is left."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    def attempt() -> None:
        draft = STORE.draft(str(tmp_path / "out"), 4)
        try:
            writer = STORE.writer(draft.address)
            writer.write(memoryview(b"abcd"), 0)
            read(STORE.reader(draft.address), 0, 4)
            writer.close()
            draft.commit()
        finally:
            monkeypatch.undo()
            draft.discard()

    monkeypatch.setattr(os, call, refuse)
    with raises(str(tmp_path / "out"), *texts):
        attempt()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_takes_nothing_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = STORE.draft(str(tmp_path / "out"), 4)
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with raises(draft.address, "takes no more bytes at 1"):
        write(STORE, draft.address, b"abc", 1)


def test_a_file_beyond_the_limit_of_the_process_is_refused_when_the_draft_is_made(place: Path) -> None:
    place.chmod(0o777)
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        LocalStore().draft("out", 1001)
    """
    assert "out.draft cannot be written: this file system or a limit forbids so large a file" in as_nobody(place, code)
    assert list(place.iterdir()) == []


def test_too_many_open_files_raise_the_limit_of_the_process_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").write_bytes(BODY)
    real_open = os.open
    limits = {"soft": 256, "hard": 4096}

    def limited_open(*arguments: Any) -> int:
        if limits["soft"] < limits["hard"]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real_open(*arguments)

    def set_limit(_: int, pair: tuple[int, int]) -> None:
        limits["soft"], limits["hard"] = pair

    monkeypatch.setattr(os, "open", limited_open)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    assert read(STORE.reader(str(tmp_path / "model")), 0, 4) == BODY[:4]
    assert limits["soft"] == 4096


@pytest.mark.parametrize("hard", [256, 4096], ids=["at-the-hard-limit", "may-not-raise-it"])
def test_too_many_open_files_are_named_with_their_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def forbid(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, hard))
    monkeypatch.setattr(resource, "setrlimit", forbid)
    with raises("too many files open", "ulimit -n"):
        STORE.reader(str(tmp_path / "model"))


# drafts


def test_a_draft_lies_beside_its_file_at_full_size_in_a_directory_made_for_it(tmp_path: Path) -> None:
    draft = STORE.draft(str(tmp_path / "new" / "below" / "out.safetensors"), 1000)
    assert draft.address == str(tmp_path / "new" / "below" / "out.safetensors.draft")
    assert Path(draft.address).stat().st_size == 1000
    draft.discard()


def test_a_second_draft_of_a_path_is_refused_while_the_first_is_held(tmp_path: Path) -> None:
    path = str(tmp_path / "out")
    first = STORE.draft(path, 4)
    write(STORE, first.address, b"kept", 0)
    with raises(f"{path}.draft is being written by another run", "wait for it", "out="):
        STORE.draft(path, 9)
    first.commit()
    assert Path(path).read_bytes() == b"kept"


def test_what_an_earlier_run_left_is_replaced(tmp_path: Path) -> None:
    stale = tmp_path / "out.draft"
    stale.write_bytes(b"stale" * 100)
    draft = STORE.draft(str(tmp_path / "out"), 10)
    assert stale.read_bytes() == bytes(10)
    draft.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("end", ["commit", "discard"])
def test_a_draft_that_ends_while_another_run_opens_it_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The other run has opened the draft, and before it asks for the lock the holder renames or removes the file."""
    path = tmp_path / "out"
    first = STORE.draft(str(path), 4)
    write(STORE, first.address, b"done", 0)
    real_lock = fcntl.flock

    def late_lock(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        getattr(first, end)()
        real_lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late_lock)
    second = STORE.draft(str(path), 7)
    assert (path.read_bytes() if path.exists() else None) == (b"done" if end == "commit" else None)
    second.commit()
    assert path.read_bytes() == bytes(7)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    STORE.draft(str(tmp_path / "out"), 2).commit()
    assert (tmp_path / "out").read_bytes() == b"\0\0"


def test_a_lock_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with raises("out.draft", "device or server reports an error"):
        STORE.draft(str(tmp_path / "out"), 2)


def test_a_name_that_a_directory_has_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with raises(str(tmp_path / "out"), "is a directory", "out="):
        STORE.draft(str(tmp_path / "out"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_in_the_place_of_a_draft_does_not_lead_into_another_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(BODY)
    (tmp_path / "out.draft").symlink_to("precious")
    with raises("out.draft is a link", "remove it"):
        STORE.draft(str(tmp_path / "out"), 2)
    assert (tmp_path / "precious").read_bytes() == BODY


def test_a_finished_file_has_the_permissions_of_any_other_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(b"")
    STORE.draft(str(tmp_path / "out"), 2).commit()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_file_system_that_cannot_sync_directories_still_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _refuse_to_sync_directories(monkeypatch, number)
    STORE.draft(str(tmp_path / "out"), 2).commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_to_sync_directories(monkeypatch, errno.EIO)
    with raises("device or server reports an error"):
        STORE.draft(str(tmp_path / "out"), 2).commit()


def _refuse_to_sync_directories(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real_sync = os.fsync

    def sync(descriptor: int) -> None:
        if os.path.isdir(descriptor):  # noqa: PTH112 - a descriptor has no Path
            raise OSError(number, os.strerror(number))
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)


def test_commit_syncs_the_bytes_then_renames_then_syncs_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        acts.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        acts.append(f"{source.name} -> {target.name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    STORE.draft(str(tmp_path / "out"), 2).commit()
    assert acts == ["sync out.draft", "out.draft -> out", f"sync {tmp_path.name}"]


def test_nothing_stays_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing itself is what is counted

    (tmp_path / "model").write_bytes(BODY)
    before = descriptors()
    STORE.reader(str(tmp_path / "model")).close()
    STORE.draft(str(tmp_path / "a"), 1).commit()
    STORE.draft(str(tmp_path / "b"), 1).discard()
    held = STORE.draft(str(tmp_path / "c"), 1)
    for _ in range(3):
        with pytest.raises(StorageError):
            STORE.draft(str(tmp_path / "c"), 1)
    held.discard()
    assert descriptors() == before


# directories


def test_list_files_names_the_files_of_one_directory_in_order(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "deep").write_bytes(b"")
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "other").symlink_to("below")
    names = [".hidden", "a", "b", "gone", "link", "loop"]
    assert list_files(str(tmp_path)) == [str(tmp_path / name) for name in names]


def test_list_files_says_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with raises(str(tmp_path / "gone"), "does not exist"):
        list_files(str(tmp_path / "gone"))
    with raises(str(tmp_path / "file"), "not a directory"):
        list_files(str(tmp_path / "file"))


def test_a_name_exists_even_if_it_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "gone").symlink_to("nowhere")
    assert [exists(str(tmp_path / name)) for name in ("", "file", "gone", "none")] == [True, True, True, False]


def test_nearest_existing_climbs_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    assert nearest_existing(str(tmp_path)) == tmp_path
    assert nearest_existing(str(tmp_path / "a" / "b" / "c")) == tmp_path
    assert nearest_existing("a/b") == tmp_path
    assert nearest_existing("gone/b") == tmp_path / "gone", "a link that leads nowhere is in the way"
    assert nearest_existing("/") == Path("/")


def test_free_bytes_are_those_of_the_file_system(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    free = free_bytes(str(tmp_path / "not" / "yet"))
    assert abs(free - found.f_bavail * found.f_frsize) < 2**30
    (tmp_path / "gone").symlink_to("nowhere")
    with raises(str(tmp_path / "gone"), "does not exist"):
        free_bytes(str(tmp_path / "gone"))


def test_writable_problem_creates_nothing(tmp_path: Path) -> None:
    assert writable_problem(str(tmp_path / "a" / "b")) is None
    assert list(tmp_path.iterdir()) == []


def test_writable_problem_names_a_file_or_a_dead_link_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("file", "gone"):
        assert writable_problem(str(tmp_path / name / "below")) == f"{tmp_path / name} is not a directory"


def test_writable_problem_names_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert writable_problem(str(tmp_path)) == f"{tmp_path} may not be written to"


def test_writable_problem_names_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)

    class ReadOnly:
        f_flag = real.f_flag | os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda _: ReadOnly)
    assert writable_problem(str(tmp_path)) == f"{tmp_path} lies on a read-only file system"
