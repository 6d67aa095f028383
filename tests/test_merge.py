"""The whole program, from a request to files: either every output is there, right and complete, or none is."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from mergeflow import leftovers
from mergeflow.errors import (
    FormatError,
    IncompatibleSources,
    IncompleteOutput,
    MergeflowError,
    OverBudget,
    Problems,
    SourceChanged,
    StorageError,
    UnmergeableValues,
)
from mergeflow.execute import watch
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.recipe.request import Budget, ModelSource, Policies, TargetRequest
from mergeflow.storage.files import LocalFile
from mergeflow.storage.local import LocalDraft, LocalStore
from tests.fakes import CountingStore, MemoryStore
from tests.models import SMALLEST, merge, request, toy_models, toy_request, write_models

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Receipt
    from mergeflow.recipe.request import Request
    from mergeflow.tensors import FileStat

ELEMENTS = 400_000
KEPT = [f"{name}.safetensors.draft{end}" for name in ("one", "other") for end in ("", ".journal")]
"""What a run of two targets leaves that can be gone on with."""
PROJECT = Path(__file__).parent.parent


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three models of three tensors; enough for several shards."""
    generator = torch.Generator().manual_seed(1)
    return write_models(
        tmp_path / "models",
        {id: {key: torch.randn(ELEMENTS, generator=generator).half() for key in "xyz"} for id in ("1", "2", "3")},
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def names(directory: Path) -> list[str]:
    """Everything that lies in a directory; nothing if there is none."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def two(models: Path, out: Path, *, overwrite: bool = False, policies: Policies | None = None) -> Request:
    """Two targets of the same models."""
    targets = [TargetRequest(name, f"{name}.safetensors", selection="all") for name in ("one", "other")]
    return request(models, out, targets=targets, overwrite=overwrite, policies=policies)


def break_last_value(models: Path) -> None:
    tensors = load_file(models / "2.safetensors")
    tensors["z"][-1] = torch.nan
    write_models(models, {"2": tensors})


# --- what a run gives -----------------------------------------------------------------------------------------------


def test_a_result_tells_digests_receipts_progress_and_time(tmp_path: Path, out: Path) -> None:
    wanted = toy_request(write_models(tmp_path / "models", toy_models()), out)
    told: list[int] = []
    plan = open_plan(wanted)
    result = run(plan, LocalExecutor(wanted.budget), progress=told.append)
    assert sum(told) == plan.bytes_read > 0
    assert len(told) == len(result.receipts) == len(plan.shards)
    assert result.seconds > 0
    assert result.startup_seconds == 0
    assert names(out) == ["first.safetensors", "second.safetensors"]
    for output, digest in zip(plan.outputs, result.digests, strict=True):
        raw = Path(output.path).read_bytes()
        assert len(raw) == output.layout.size
        assert digest == hashlib.sha256(raw[len(output.layout.head) :]).hexdigest()


def test_nothing_is_made_to_find_out_what_is_wrong(models: Path, out: Path) -> None:
    plan = open_plan(request(models, out))
    assert plan.problems == ()
    assert not out.exists()


def test_any_store_will_do(models: Path, out: Path) -> None:
    files = {path.stem: str(path) for path in sorted(models.iterdir())}
    on_disk = open_plan(request(models, out))
    run(on_disk, LocalExecutor(SMALLEST))
    store = MemoryStore({path: Path(path).read_bytes() for path in files.values()})
    there = dataclasses.replace(request(models, out, overwrite=True), models=ModelSource(files=files))
    run(open_plan(there, store), LocalExecutor(SMALLEST), store)
    assert store.get(on_disk.outputs[0].path) == Path(on_disk.outputs[0].path).read_bytes()
    assert store.drafts() == []


def test_an_interruption_between_the_renames_comes_too_late(models: Path, out: Path) -> None:
    class Interrupted(LocalDraft):
        def commit(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().commit()

    class Store(LocalStore):
        def draft(self, path: str, size: int) -> LocalDraft:
            return Interrupted(Path(path), size)

    run(open_plan(two(models, out)), LocalExecutor(SMALLEST), Store())
    assert names(out) == ["one.safetensors", "other.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# --- failure half way -----------------------------------------------------------------------------------------------


def test_a_failure_half_way_leaves_no_file_under_any_name(models: Path, out: Path) -> None:
    break_last_value(models)
    seen: list[list[str]] = []
    wanted = two(models, out)
    with pytest.raises(UnmergeableValues, match=r"'z': model 2 has 1 NaN"):
        run(open_plan(wanted), LocalExecutor(SMALLEST), progress=lambda _: seen.append(names(out)))
    assert seen[0] == KEPT
    assert names(out) == []


def test_a_failure_half_way_leaves_what_was_to_be_overwritten(models: Path, out: Path) -> None:
    merge(two(models, out))
    before = {name: (out / name).read_bytes() for name in names(out)}
    assert before.keys() == {"one.safetensors", "other.safetensors"}
    break_last_value(models)
    with pytest.raises(UnmergeableValues):
        merge(two(models, out, overwrite=True))
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_an_existing_output_is_replaced_when_that_is_asked_for(models: Path, out: Path) -> None:
    merge(two(models, out))
    before = (out / "one.safetensors").read_bytes()
    write_models(models, {"2": {key: torch.ones(ELEMENTS).half() for key in "xyz"}})
    merge(two(models, out, overwrite=True))
    assert (out / "one.safetensors").read_bytes() != before
    assert names(out) == ["one.safetensors", "other.safetensors"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interruption_leaves_drafts_to_resume_and_nobody_at_work(
    models: Path, out: Path, interruption: type[BaseException]
) -> None:
    def interrupt(_: int) -> None:
        raise interruption

    wanted = two(models, out)
    plan = open_plan(wanted)
    assert len(plan.shards) > 2
    store = Counting()
    with pytest.raises(interruption):
        run(plan, LocalExecutor(Budget(1, 2, SMALLEST.memory)), store, interrupt)
    assert names(out) == KEPT
    assert store.open == 0, "whoever still works has files open"


class Counting(LocalStore):
    """Local files, counted while they are open."""

    def __init__(self) -> None:
        self.open = 0

    def reader(self, path: str) -> LocalFile:
        return CountedFile(self, path, os.O_RDONLY)

    def writer(self, address: str) -> LocalFile:
        return CountedFile(self, address, os.O_WRONLY)


class CountedFile(LocalFile):
    def __init__(self, store: Counting, path: str, flags: int) -> None:
        super().__init__(path, flags)
        self._store = store
        store.open += 1

    def close(self) -> None:
        super().close()
        self._store.open -= 1


@pytest.mark.parametrize(
    ("shards", "complaint"),
    [
        pytest.param(lambda all: all[:-1], "written without a gap up to byte", id="one-left-out"),
        pytest.param(lambda all: [], "written without a gap up to byte", id="none"),
        pytest.param(lambda all: [*all, all[0]], "was written twice", id="one-twice"),
    ],
)
def test_an_executor_that_does_not_do_its_work_makes_no_file(
    models: Path, out: Path, shards: object, complaint: str
) -> None:
    class Careless(LocalExecutor):
        def map(self, job: Job, all: Sequence[int]) -> Generator[Receipt, None, None]:
            return super().map(job, shards(list(all)))  # type: ignore[operator]

    plan = open_plan(two(models, out))
    with pytest.raises(IncompleteOutput, match=complaint):
        run(plan, Careless(SMALLEST))
    assert names(out) == []


class LostDisk(LocalStore):
    """A disk that is lost when the second draft is made durable."""

    def draft(self, path: str, size: int) -> LocalDraft:
        return LostDraft(Path(path), size) if "other" in path else LocalDraft(Path(path), size)


class LostDraft(LocalDraft):
    def sync(self) -> None:
        raise StorageError("the device reports an I/O error")


def test_no_output_gets_its_name_before_all_are_durable(models: Path, out: Path) -> None:
    with pytest.raises(StorageError, match="I/O error"):
        merge(two(models, out), store=LostDisk())
    assert names(out) == KEPT


class LostName(LocalDraft):
    def commit(self) -> None:
        raise StorageError("may not be renamed")


def test_what_has_its_name_when_a_later_rename_fails_is_whole(models: Path, out: Path, tmp_path: Path) -> None:
    class Refusing(LocalStore):
        def draft(self, path: str, size: int) -> LocalDraft:
            return LostName(Path(path), size) if "other" in path else LocalDraft(Path(path), size)

    with pytest.raises(StorageError, match="may not be renamed"):
        merge(two(models, out), store=Refusing())
    assert names(out) == ["one.safetensors", "one.safetensors.draft.journal", *KEPT[2:]]
    merge(two(models, tmp_path / "whole"))
    assert (out / "one.safetensors").read_bytes() == (tmp_path / "whole" / "one.safetensors").read_bytes()


# --- sources that change --------------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\1\1")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            touch, r"model 3: .* changed .*: it has as many bytes as before, but was written to", id="touched"
        ),
        pytest.param(rewrite, r"model 3: .* changed .*: it has as many bytes as before, but was", id="rewritten"),
        pytest.param(replace, r"model 3: .* changed .*: another file has its name; merge again", id="replaced"),
        pytest.param(append, r"model 3: .* changed .*: it has 2,400,218 bytes, not 2,400,216; merge", id="appended-to"),
        pytest.param(cut, r"model 3: .* changed .*: it has 1,200,108 bytes, not 2,400,216; merge again", id="cut"),
    ],
)
def test_a_source_that_changes_while_it_is_read_spoils_the_run(
    models: Path, out: Path, change: object, complaint: str
) -> None:
    victim = models / "3.safetensors"
    changed: list[bool] = []

    def meddle(_: int) -> None:
        if not changed:
            changed.append(True)
            change(victim)  # type: ignore[operator]

    plan = open_plan(two(models, out))
    with pytest.raises(StorageError, match=complaint) as caught:
        run(plan, LocalExecutor(SMALLEST), progress=meddle)
    assert names(out) == []
    assert not caught.value.resumable


def test_a_source_that_goes_away_while_it_is_read_may_come_back(models: Path, out: Path) -> None:
    victim, aside = models / "3.safetensors", models.parent / "aside"
    wanted = two(models, out)

    def take_away(_: int) -> None:
        if victim.exists():
            victim.rename(aside)

    gone = r"model 3 could be read when the run began, but now .*3\.safetensors does not exist; put it back as it was"
    with pytest.raises(StorageError, match=gone):
        run(open_plan(wanted), LocalExecutor(SMALLEST), progress=take_away)
    assert names(out) == KEPT
    aside.rename(victim)
    merge(dataclasses.replace(wanted, resume=True))
    assert names(out) == ["one.safetensors", "other.safetensors"]


def test_a_source_that_changes_between_plan_and_run_is_noticed_before_anything_is_read(models: Path, out: Path) -> None:
    plan = open_plan(two(models, out))
    replace(models / "1.safetensors")
    store = CountingStore(LocalStore())
    with pytest.raises(SourceChanged, match=r"model 1: .* was changed"):
        run(plan, LocalExecutor(SMALLEST), store)
    assert names(out) == []
    assert not [path for path in store.paths_read() if path.startswith(str(models))]


def test_a_source_that_changes_ends_the_run_soon_and_not_only_at_its_end(
    models: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    monkeypatch.setattr(watch, "SHARE", float("inf"))
    plan = open_plan(two(models, out))
    done: list[int] = []

    def meddle(read: int) -> None:
        done.append(read)
        if len(done) == 1:
            touch(models / "3.safetensors")

    with pytest.raises(SourceChanged, match="model 3"):
        run(plan, LocalExecutor(SMALLEST), progress=meddle)
    assert len(done) == 1 < len(plan.shards) - 1


def test_sources_are_looked_at_now_and_then(models: Path, out: Path) -> None:
    class Looked(LocalStore):
        def stat(self, path: str) -> FileStat:
            looks.append(path)
            return super().stat(path)

    looks: list[str] = []
    plan = open_plan(two(models, out))
    run(plan, LocalExecutor(SMALLEST), Looked())
    assert len(looks) == 2 * 3, "before and after, and no more than every few seconds meanwhile"


# --- where outputs may lie ------------------------------------------------------------------------------------------


def under_own_name(models: Path) -> tuple[Path, str]:
    return models, "2.safetensors"


def through_a_link(models: Path) -> tuple[Path, str]:
    (models.parent / "out").mkdir()
    (models.parent / "out" / "merged.safetensors").symlink_to(models / "2.safetensors")
    return models.parent / "out", "merged.safetensors"


def as_a_second_name(models: Path) -> tuple[Path, str]:
    (models.parent / "out").mkdir()
    (models.parent / "out" / "merged.safetensors").hardlink_to(models / "2.safetensors")
    return models.parent / "out", "merged.safetensors"


def below_a_linked_directory(models: Path) -> tuple[Path, str]:
    (models.parent / "out").symlink_to(models)
    return models.parent / "out", "2.safetensors"


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("place", [under_own_name, through_a_link, as_a_second_name, below_a_linked_directory])
def test_an_output_that_is_an_input_is_refused(models: Path, place: object, overwrite: bool) -> None:
    before = (models / "2.safetensors").read_bytes()
    directory, file = place(models)  # type: ignore[operator]
    wanted = request(models, directory, targets=[TargetRequest("t", file, selection="all")], overwrite=overwrite)
    with pytest.raises(StorageError, match=r"is model 2 itself .*; choose another out= or file"):
        merge(wanted)
    assert (models / "2.safetensors").read_bytes() == before
    assert not [name for name in names(directory) if name.endswith(".draft")]


def test_an_output_may_replace_a_model_that_is_not_selected_only_if_it_is_told_to(models: Path) -> None:
    wanted = request(
        models,
        models,
        selections={"some": "1,3"},
        targets=[TargetRequest("t", "2.safetensors", selection="some")],
    )
    with pytest.raises(StorageError, match=r"2\.safetensors exists; .*overwrite=true"):
        merge(wanted)
    merge(dataclasses.replace(wanted, overwrite=True))
    assert load_file(models / "2.safetensors").keys() == {"x", "y", "z"}


@pytest.mark.parametrize("kind", ["file", "dangling link", "directory"])
def test_an_output_that_exists_is_refused(models: Path, out: Path, kind: str) -> None:
    out.mkdir()
    path = out / "merged.safetensors"
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(out / "nowhere")
    with pytest.raises(StorageError, match=r"merged\.safetensors (exists|is a directory|is a link)"):
        merge(request(models, out))
    assert names(out) == ["merged.safetensors"]
    assert kind != "file" or path.read_bytes() == b"precious"


def test_a_directory_that_cannot_be_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"out=.*file/below cannot be used: .*file is not a directory"):
        merge(request(models, tmp_path / "file" / "below"))


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from tests.models import request, open_plan, torch, write_models
place = Path(sys.argv[1])
models = write_models(place / "models", {id: {"w": torch.ones(3)} for id in "ab"})
for path in models.iterdir():
    path.chmod(0o644)
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for out in ("locked", "locked/below", "free"):
    print(*(str(problem) for problem in open_plan(request(models, place / out)).problems))
"""


def test_a_directory_that_may_not_be_written_to_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        for directory, mode in (("locked", 0o555), ("free", 0o777)):
            (place / directory).mkdir()
            (place / directory).chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, name], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        locked, below, free = done.stdout.split("\n")[:3]
    assert f"out={name}/locked cannot be used: {name}/locked may not be written to; choose another out=" in locked
    assert f"out={name}/locked/below cannot be used: {name}/locked may not be written to" in below
    assert free == ""


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where the machine lets us have one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_too_little_space_is_told_before_anything_is_written(models: Path, tiny_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"has 1\.05 MB free, but the outputs need 2\.40 MB; free some space"):
        merge(request(models, tiny_disk / "below"))
    assert names(tiny_disk) == []


def test_a_disk_that_fills_up_during_the_run_leaves_no_output(models: Path, tiny_disk: Path) -> None:
    wanted = request(models, tiny_disk)
    plan = dataclasses.replace(open_plan(wanted), problems=())
    with pytest.raises(StorageError, match=r"the disk is full \(.*\); free some space, or choose another out="):
        run(plan, LocalExecutor(SMALLEST))
    assert {name for name in names(tiny_disk) if ".draft" not in name} == set()


def test_what_is_free_is_compared_with_all_outputs_together(
    models: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = open_plan(two(models, out))
    needed = sum(output.layout.size for output in plan.outputs)
    monkeypatch.setattr(leftovers, "free_bytes", lambda _: needed)
    assert open_plan(two(models, out)).problems == ()
    monkeypatch.setattr(leftovers, "free_bytes", lambda _: needed - 1)
    (problem,) = open_plan(two(models, out)).problems
    assert "the outputs need 4.80 MB" in str(problem)


# --- all problems together ------------------------------------------------------------------------------------------


def test_all_problems_are_told_together_and_nothing_is_written(models: Path, out: Path) -> None:
    tensors = load_file(models / "1.safetensors")
    write_models(models, {"4": {**tensors, "x": torch.ones(5).half()}, "5": {key: tensors[key] for key in "xz"}})
    raw = (models / "1.safetensors").read_bytes()
    (models / "6.safetensors").write_bytes(raw[:-10])
    (models / "7.safetensors").write_bytes(b"")
    (models / "8.safetensors").symlink_to("nowhere")
    (models / "9.safetensors").hardlink_to(models / "1.safetensors")
    out.mkdir()
    (out / "good.safetensors").write_bytes(b"precious")
    wanted = request(
        models,
        out,
        selections={"good": "1,2,3,4,5,9", "bad": "6,7,8"},
        targets=[TargetRequest(name, f"{name}.safetensors", selection=name) for name in ("good", "bad")],
    )
    with pytest.raises(Problems) as caught:
        merge(wanted)
    told: defaultdict[type[MergeflowError], list[str]] = defaultdict(list)
    for error in caught.value.errors:
        told[type(error)].append(str(error))
    assert ["model 6" in text or "model 7" in text for text in told[FormatError]] == [True, True]
    assert any("model 8" in text and "which does not exist" in text for text in told[StorageError])
    assert any("good.safetensors exists" in text for text in told[StorageError])
    assert any("ids 1 and 9 are one file" in text for text in told[IncompatibleSources])
    assert any("not in 5: y" in text for text in told[IncompatibleSources])
    assert any("model 4 has 1 tensor(s) of another shape" in text for text in told[IncompatibleSources])
    assert names(out) == ["good.safetensors"]
    assert (out / "good.safetensors").read_bytes() == b"precious"


def test_a_plan_with_problems_is_not_run(models: Path, out: Path) -> None:
    plan = open_plan(request(models, out, budget=Budget(1, 1, 1000)))
    with pytest.raises(OverBudget):
        run(plan, LocalExecutor(SMALLEST))
    assert not out.exists()


def test_models_may_be_named_one_by_one(models: Path, out: Path) -> None:
    source = ModelSource(files={"a": str(models / "1.safetensors"), "b": str(models / "3.safetensors")})
    merge(request(source, out))
    one, other = (load_file(models / f"{id}.safetensors")["x"].float() for id in ("1", "3"))
    assert torch.equal(load_file(out / "merged.safetensors")["x"], ((one + other) / 2).half())


def test_a_plan_is_the_same_whenever_it_is_made(models: Path, out: Path) -> None:
    assert open_plan(two(models, out)) == open_plan(two(models, out))
