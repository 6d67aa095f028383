"""`resume=true` as it is typed, and what is said when something was left."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from tests.models import write_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.program import Call

HINT = "to go on, add resume=true to the same command line"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of several shards."""
    generator = torch.Generator().manual_seed(1)
    made = {id: {f"k{key:02}": torch.randn(60_000, generator=generator).half() for key in range(30)} for id in "123"}
    return write_models(tmp_path_factory.mktemp("models"), made)


@pytest.fixture
def words(models: Path) -> list[str]:
    where = [f"models.dir={models}", "models=folder", "arch=any", "executor=local", "out=out"]
    return [*where, "selection=all", "target=single", "executor.workers=1", "executor.reads_in_flight=1"]


@contextmanager
def full_disk(after: int, part: str = "") -> Iterator[None]:
    """A disk that is full after so many writes to paths with that part."""
    real, done = os.pwrite, 0

    def write(descriptor: int, *arguments: Any) -> int:
        nonlocal done
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115 - a descriptor has no Path
            done += 1
            if done > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, *arguments)

    with mock.patch("os.pwrite", write):
        yield


def outputs(place: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(place).rglob("*.safetensors"))}


def leftovers(place: str) -> list[str]:
    return sorted(path.name for path in Path(place).rglob("*.draft*"))


def test_a_failure_says_what_to_type_and_typing_that_goes_on(call: Call, words: list[str]) -> None:
    assert call(*words, "out=whole").code == 0
    with full_disk(after=20):
        failed = call(*words)
    assert failed.code == 1
    assert "the disk is full" in failed.err
    told = failed.err.splitlines()[-1]
    assert told.startswith(f"mergeflow: {Path.cwd()}/out/merged.safetensors.draft was kept, ")
    assert told.endswith(HINT)
    assert outputs("out") == {}

    planned = call(*words, "resume=true", "job=plan")
    assert planned.code == 0
    assert "are left of an earlier run; what proves right is not made again" in planned.out
    again = call(*words)
    assert again.code == 1
    assert "add resume=true to go on, or overwrite=true to begin afresh" in again.err
    assert call(*words, "job=plan").code == 1

    done = call(*words, "resume=true")
    assert done.code == 0
    assert "were there already" in done.out
    assert "are there and right" in done.err
    assert list(outputs("out").values()) == list(outputs("whole").values())
    assert leftovers("out") == []
    manifest = json.loads(Path("out/manifest.json").read_text())
    whole = json.loads(Path("whole/manifest.json").read_text())
    assert 0 < manifest["resumed"] < whole["bytes_written"]
    assert manifest["bytes_read"] < whole["bytes_read"]
    assert manifest["bytes_written"] + manifest["resumed"] == whole["bytes_written"]
    assert whole["resumed"] == 0


def test_what_is_there_already_is_not_made_again(call: Call, words: list[str]) -> None:
    assert call(*words, "resume=true").code == 0
    before = Path("out/merged.safetensors").stat()
    for more in ([], ["overwrite=true"], ["executor.memory=512MiB"]):
        done = call(*words, "resume=true", *more)
        assert done.code == 0, done.err
        assert "there already, and made by this very plan: " in done.out
    after = Path("out/merged.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert call(*words).code == 1


def test_what_is_there_of_another_plan_is_not_taken_for_it(call: Call, words: list[str], models: Path) -> None:
    assert call(*words).code == 0
    other = call(*words, "selection.models='1,2'", "resume=true")
    assert other.code == 1
    assert "merged.safetensors exists; choose another out=, or overwrite=true" in other.err
    Path("out/merged.safetensors").write_bytes(b"short")
    assert call(*words, "resume=true").code == 1


def test_a_run_that_goes_on_and_fails_again_says_to_type_the_same(call: Call, words: list[str]) -> None:
    with full_disk(after=20):
        call(*words)
    with full_disk(after=4):
        failed = call(*words, "resume=true")
    assert failed.code == 1
    assert failed.err.splitlines()[-1].endswith("to go on, type the same command line again")


@pytest.mark.parametrize("launcher", ["shared_scan", "basic"])
def test_a_sweep_goes_on_with_what_had_not_finished(call: Call, words: list[str], launcher: str) -> None:
    sweep = ["-m", *words, "selection.models='1,2','1,3','2,3'", f"hydra/launcher={launcher}"]
    assert call(*sweep, "out=whole").code == 0
    with full_disk(after=20, part="out/1/"):
        failed = call(*sweep)
    assert failed.code == 1
    assert failed.err.splitlines()[-1].endswith(HINT)
    assert list(outputs("out")) == ["out/0/merged.safetensors", "out/2/merged.safetensors"]
    before = Path("out/0/merged.safetensors").stat()
    done = call(*sweep, "resume=true")
    assert done.code == 0, done.err
    assert done.out.count("there already, and made by this very plan: ") == 2
    assert Path("out/0/merged.safetensors").stat() == before
    assert list(outputs("out").values()) == list(outputs("whole").values())
    assert leftovers("out") == []


def test_a_series_and_an_assembly_go_on_too(call: Call, words: list[str], models: Path) -> None:
    series = [*words, "series=leave_one_out", "series.components=all"]
    assert call(*series, "out=whole").code == 0
    with full_disk(after=40):
        assert call(*series).code == 1
    assert call(*series, "resume=true").code == 0
    assert list(outputs("out").values()) == list(outputs("whole").values())
    parts = ["job=assemble", "executor=local", "arch=any", f"base={models / '1.safetensors'}", "file=made.safetensors"]
    assemble = [*parts, f"parts.all={models / '2.safetensors'}", "out=put"]
    with full_disk(after=9):
        failed = call(*assemble)
    assert failed.code == 1, failed.err
    assert call(*assemble, "resume=true").code == 0
    assert leftovers("put") == []


def test_a_comparison_has_nothing_to_resume(call: Call) -> None:
    done = call("job=compare", "a=x", "b=y", "resume=true")
    assert done.code == 2
    assert "resume has no effect on job=compare" in done.err
