"""`job=verify` on the command line: what it prints, its JSON, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.program import Call

FILE = "out/merged.safetensors"


@pytest.fixture
def verify(call: Call, small: Path, words: list[str]) -> list[str]:
    """What looks at a merge of three small models, which is made."""
    done = call(*words, "selection.models=1,2,3")
    assert done.code == 0, done.err
    return ["job=verify", f"file={FILE}", "models=folder", f"models.dir={small}", "arch=any", "out=seen"]


def test_a_file_that_holds_is_said_to(call: Call, verify: list[str]) -> None:
    done = call(*verify, "sample=all")
    assert done.code == 0, done.both
    assert "sources   3 of 3 have the size and the header that the recipe tells" in done.out
    assert "bytes, byte for byte as the recipe lays it out" in done.out
    assert "manifest  agrees; made with python " in done.out
    assert "2 of 2 tiles computed once more: 40,000 of 40,000 elements, in 2 of 2 tensors; all as they sh" in done.out
    assert "result    it is what its recipe makes of these sources, to the bit" in done.out
    told = json.loads(Path("seen/verify.json").read_text())
    assert told["holds"]
    assert told["sample"] == "all"
    assert told["elements"] == {"checked": 40_000, "total": 40_000}
    assert told["problems"] == []


def test_a_sample_says_that_it_is_one(call: Call, verify: list[str]) -> None:
    done = call(*verify, "sample=1", "seed=3")
    assert done.code == 0, done.both
    assert "1 of 2 tiles computed once more" in done.out
    assert "result    as far as was looked, it is what its recipe makes of these sources; sample=all" in done.out


def test_a_flipped_bit_is_told_and_the_exit_code_is_1(call: Call, verify: list[str]) -> None:
    content = bytearray(Path(FILE).read_bytes())
    content[-1] ^= 1
    Path(FILE).write_bytes(content)
    done = call(*verify, "sample=all")
    assert done.code == 1
    assert "manifest  does NOT agree" in done.out
    assert "problems (2)" in done.out
    assert "  - 'y' (all): element 19,999 is 0x" in done.out
    assert "1 of 20,000 elements that were looked at differ" in done.out
    assert "result    this file is not shown to be what its recipe makes of these sources" in done.out
    (_, problem) = json.loads(Path("seen/verify.json").read_text())["problems"]
    assert (problem["key"], problem["element"], problem["differing"]) == ("y", 19_999, 1)
    assert int(problem["expected"], 16) ^ int(problem["found"], 16) == 0x0100
    assert "Traceback" not in done.both


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["sample=some"], "sample=some is no number of tiles; write 1000, or all"),
        (["sample=0"], "sample=0 is no number of tiles; write 1000, or all"),
        (["file=null"], "job=verify needs an output to look at: give file=FILE"),
        (["dtype=fp16"], "dtype has no effect on job=verify, which is told everything by the file; leave it out"),
        (["executor=local"], "executor has no effect on job=verify, which is told everything by the file; leave it"),
        (["models.composites={a: [b]}"], "models.composites has no effect on job=verify, which"),
        (["arch=sdxl"], "was made with arch=any, not sdxl; give arch=any"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_understood_is_refused(call: Call, verify: list[str], typed: list[str], told: str) -> None:
    done = call(*verify, *typed)
    assert done.code == 2, done.both
    assert told in done.err


@pytest.mark.parametrize("job", ["merge", "plan", "compare", "assemble"])
def test_a_sample_means_nothing_to_another_job(call: Call, words: list[str], job: str) -> None:
    done = call(*words, f"job={job}", "sample=5")
    assert done.code == 2
    assert "sample= is for job=verify, and has no effect on another job; leave it out" in done.err


def test_a_sweep_looks_at_several_files_and_the_exit_code_is_the_worst(call: Call, verify: list[str]) -> None:
    Path("out/other.safetensors").write_bytes(Path(FILE).read_bytes()[:-1] + b"\0")
    done = call("-m", *verify, f"file={FILE},out/other.safetensors")
    assert done.code == 1, done.both
    assert [json.loads(Path(f"seen/{job}/verify.json").read_text())["holds"] for job in (0, 1)] == [True, False]
