"""Faults that the kernel itself makes: full disks, lost mounts, devices that fail. They need root, for `mount`."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.errors import Problems, ReadFailed, SourceChanged, StorageError
from mergeflow.execute import patience, watch
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.recipe.request import Budget
from mergeflow.report.manifest import manifest
from mergeflow.storage import kernel
from mergeflow.storage.local import LocalStore
from tests.models import request, write_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.plan.plan import Plan

ELEMENTS = 400_000
BUDGET = Budget(workers=2, reads_in_flight=2, memory=1 << 28)
MIB = 1 << 20
PROJECT = Path(__file__).parent.parent.parent


class Mounts:
    """What a test has mounted, below its own directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mounted: list[Path] = []
        self._servers: list[subprocess.Popen[bytes]] = []

    def mount(self, name: str, *options: str, source: str = "tmpfs") -> Path:
        """A mount of that name; skips the test where nobody may mount this."""
        place = self._place(name)
        made = subprocess.run(["mount", *options, source, str(place)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            pytest.skip(f"this cannot be mounted here: {made.stderr.strip()}")
        self._mounted.append(place)
        return place

    def fuse(self, name: str, directory: Path, faults: Path) -> Path:
        """The files of a directory in a file system that fails as `faults` says."""
        place = self._place(name)
        command = [sys.executable, "-m", "tests.fuse", str(place), str(directory), str(faults)]
        server = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._servers.append(server)
        assert server.stdout is not None
        if server.stdout.readline() != b"mounted\n":
            assert server.stderr is not None
            pytest.skip(f"FUSE cannot be mounted here: {server.stderr.read().decode().strip()}")
        self._mounted.append(place)
        return place

    def kill(self) -> None:
        """End the process behind the last FUSE, which leaves its mount without one."""
        self._servers[-1].kill()
        self._servers[-1].communicate()

    def unmount(self, place: Path) -> None:
        """Take a mount away, from under whoever uses it."""
        subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)
        self._mounted.remove(place)

    def clear(self) -> None:
        """Leave nothing."""
        for place in reversed(self._mounted):
            subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)
        for server in self._servers:
            with suppress(ProcessLookupError):
                server.kill()
            server.communicate()

    def _place(self, name: str) -> Path:
        place = self._directory / name
        place.mkdir(exist_ok=True)
        return place


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount")
    made = Mounts(tmp_path)
    yield made
    made.clear()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.02, 0.02, 0.02))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    made = {id: {key: torch.randn(ELEMENTS, generator=generator).half() for key in "xyz"} for id in ("1", "2", "3")}
    return write_models(tmp_path / "models", made)


def plan_of(models: Path, out: Path) -> Plan:
    plan = open_plan(request(models, out, budget=BUDGET))
    assert plan.problems == ()
    return plan


def expected(models: Path, tmp_path: Path) -> bytes:
    run(plan_of(models, tmp_path / "expected"), LocalExecutor(BUDGET))
    return (tmp_path / "expected" / "merged.safetensors").read_bytes()


# --- no room --------------------------------------------------------------------------------------------------------


def test_a_disk_that_others_fill_meanwhile_ends_the_run_with_the_figures(
    models: Path, tmp_path: Path, mounts: Mounts
) -> None:
    out = mounts.mount("out", "-t", "tmpfs", "-o", "size=4m")
    plan = plan_of(models, out)
    (out / "other").write_bytes(bytes(3 * MIB))
    with pytest.raises(
        StorageError, match=r"merged\.safetensors\.draft cannot be written: the disk is full \("
    ) as told:
        run(plan, LocalExecutor(BUDGET))
    assert "MB of this file are not yet on it); free some space" in str(told.value)
    assert told.value.resumable
    assert not (out / "merged.safetensors").exists()


def test_a_limit_on_the_size_of_files_is_told_before_any_work(tmp_path: Path) -> None:
    code = f"from mergeflow.storage.local import LocalStore; LocalStore().draft({str(tmp_path / 'out')!r}, 4096)"
    command = ["prlimit", "--fsize=1000", sys.executable, "-c", code]
    if shutil.which("prlimit") is None:
        pytest.skip("there is no prlimit")
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "out.draft cannot be written: this file system or a limit forbids so large a file" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- writes that are lost -------------------------------------------------------------------------------------------


@pytest.fixture
def failing_disk(mounts: Mounts) -> Path:
    """A file system of 64 MiB on a device that has room for 6: what is more fails on its way to the device."""
    backing = mounts.mount("backing", "-t", "tmpfs", "-o", "size=6m")
    image = backing / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True, capture_output=True)
    return mounts.mount("disk", "-o", "loop,errors=continue", source=str(image))


@pytest.mark.parametrize("told_to_another_first", [False, True])
def test_a_write_that_never_reached_the_device_is_told_by_sync_and_by_every_later_one(
    failing_disk: Path, told_to_another_first: bool
) -> None:
    store = LocalStore()
    draft = store.draft(str(failing_disk / "out"), 16 * MIB)
    writer = store.writer(draft.address)
    part = memoryview(os.urandom(MIB))
    for offset in range(0, 16 * MIB, MIB):
        writer.write(part, offset)
    if told_to_another_first:
        with (failing_disk / "out.draft").open("r+b") as other:
            kernel.write_out(other.fileno(), 0, 16 * MIB)
    writer.close()
    for attempt in (draft.sync, draft.sync, draft.commit):  # the second fsync of the kernel would succeed
        with pytest.raises(StorageError, match=r"out\.draft cannot be written: .*(device or server reports|is full)"):
            attempt()
    assert not (failing_disk / "out").exists()
    draft.discard()


def test_what_the_page_cache_has_and_the_device_has_not_is_made_again(
    models: Path, tmp_path: Path, failing_disk: Path
) -> None:
    """The device has no more room than for a part, which is told by the last sync; then it gets some."""
    asked = request(models, failing_disk, budget=dataclasses.replace(BUDGET, io="buffered"))
    whole = expected(models, tmp_path)
    backing = failing_disk.parent / "backing"
    found = os.statvfs(backing)
    # Less than one request: of one for which there is room in part, a loop device says that it was written.
    (backing / "other").write_bytes(bytes(found.f_bavail * found.f_frsize - MIB // 2))
    with pytest.raises(StorageError, match=r"draft cannot be written"):
        run(open_plan(asked), LocalExecutor(BUDGET))
    (backing / "other").unlink()
    draft = failing_disk / "merged.safetensors.draft"
    assert draft.read_bytes() == whole, "all is in the page cache, as if it had been written"
    plan = open_plan(dataclasses.replace(asked, resume=True))
    assert plan.problems == ()
    result = run(plan, LocalExecutor(BUDGET))
    assert result.resumed < 3 * ELEMENTS * 2
    with (failing_disk / "merged.safetensors").open("rb") as file:
        kernel.uncache(file.fileno())
        assert file.read() == whole


# --- mounts that are lost -------------------------------------------------------------------------------------------


def test_a_mount_that_is_taken_away_from_open_sources_is_told(
    models: Path, tmp_path: Path, mounts: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are open and can be read to their ends, but their paths lead into an empty directory."""
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    there = mounts.mount("there", "-t", "tmpfs")
    for path in models.iterdir():
        shutil.copy2(path, there)
    lost: list[int] = []

    def take_away(read: int) -> None:
        if not lost:
            lost.append(read)
            mounts.unmount(there)

    with pytest.raises(StorageError, match=r"model 1 could be read .* is empty; is its file system still moun") as told:
        run(plan_of(there, tmp_path / "out"), LocalExecutor(BUDGET), progress=take_away)
    assert told.value.resumable
    assert not (tmp_path / "out" / "merged.safetensors").exists()


def test_an_output_whose_mount_is_taken_away_gets_no_name(models: Path, mounts: Mounts) -> None:
    out = mounts.mount("out", "-t", "tmpfs")
    lost: list[int] = []

    def take_away(read: int) -> None:
        if not lost:
            lost.append(read)
            mounts.unmount(out)

    with pytest.raises(StorageError, match=r"merged\.safetensors.* is its file system still mounted\?") as told:
        run(plan_of(models, out), LocalExecutor(BUDGET), progress=take_away)
    assert told.value.resumable
    assert list(out.iterdir()) == []


# --- a file system that fails ---------------------------------------------------------------------------------------


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    return tmp_path / "faults"


PASSING = [errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.EHOSTDOWN, errno.EAGAIN]


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_what_fails_and_passes_makes_the_same_file(
    models: Path, tmp_path: Path, mounts: Mounts, faults: Path, number: int
) -> None:
    there = mounts.fuse("there", models, faults)
    plan = plan_of(there, tmp_path / "out")
    faults.write_text(f"{number} 2")
    result = run(plan, LocalExecutor(BUDGET))
    assert (tmp_path / "out" / "merged.safetensors").read_bytes() == expected(models, tmp_path)
    assert sum(told["reads"] for told in manifest(result, "local")["repeated_reads"]) in (1, 2)


def test_an_interrupted_read_is_no_fault(models: Path, tmp_path: Path, mounts: Mounts, faults: Path) -> None:
    there = mounts.fuse("there", models, faults)
    plan = plan_of(there, tmp_path / "out")
    faults.write_text(f"{errno.EINTR} 20")
    result = run(plan, LocalExecutor(BUDGET))
    assert faults.read_text() == f"{errno.EINTR} 0"
    assert manifest(result, "local")["repeated_reads"] == []


@pytest.mark.parametrize(
    ("number", "text"),
    [
        pytest.param(errno.EIO, "its device or server reports an error (Input/output error)", id="EIO"),
        pytest.param(errno.ETIMEDOUT, "its server does not answer (Connection timed out)", id="ETIMEDOUT"),
        pytest.param(errno.ESTALE, "replaced or removed on its server", id="ESTALE"),
    ],
)
def test_what_goes_on_failing_is_told(
    models: Path, tmp_path: Path, mounts: Mounts, faults: Path, number: int, text: str
) -> None:
    there = mounts.fuse("there", models, faults)
    plan = plan_of(there, tmp_path / "out")
    faults.write_text(f"{number} {10**9}")
    with pytest.raises(ReadFailed) as told:
        run(plan, LocalExecutor(BUDGET))
    assert text in str(told.value)
    assert ".safetensors" in str(told.value)
    assert told.value.resumable


def test_a_mount_that_is_lost_and_made_again_costs_nothing(
    models: Path, tmp_path: Path, mounts: Mounts, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.5, 2.0, 8.0))  # it takes a moment to mount it again
    there = mounts.fuse("there", models, faults)
    lost: list[int] = []

    def lose(read: int) -> None:
        if not lost:
            lost.append(read)
            mounts.kill()
            mounts.unmount(there)
            mounts.fuse("there", models, faults)

    run(plan_of(there, tmp_path / "out"), LocalExecutor(BUDGET), progress=lose)
    assert (tmp_path / "out" / "merged.safetensors").read_bytes() == expected(models, tmp_path)


def test_a_mount_whose_process_died_is_told(models: Path, tmp_path: Path, mounts: Mounts, faults: Path) -> None:
    there = mounts.fuse("there", models, faults)
    plan = plan_of(there, tmp_path / "out")
    mounts.kill()
    with pytest.raises(StorageError, match=r"is gone \(Transport endpoint is not connected\); mount it again") as told:
        run(plan, LocalExecutor(BUDGET))
    assert told.value.resumable


def test_a_mount_that_comes_back_with_other_files_is_refused(
    models: Path, tmp_path: Path, mounts: Mounts, faults: Path
) -> None:
    there = mounts.fuse("there", models, faults)
    plan = plan_of(there, tmp_path / "out")
    mounts.kill()
    mounts.unmount(there)
    shutil.copytree(models, tmp_path / "others")
    mounts.fuse("there", tmp_path / "others", faults)
    with pytest.raises(Problems, match="another file has its name") as told:
        run(plan, LocalExecutor(BUDGET))
    assert [type(error) for error in told.value.errors] == [SourceChanged] * 3
    assert not told.value.resumable


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_storm_of_signals_changes_nothing(models: Path, tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        run(plan_of(models, tmp_path / "out"), LocalExecutor(BUDGET))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard
    assert (tmp_path / "out" / "merged.safetensors").read_bytes() == expected(models, tmp_path)
