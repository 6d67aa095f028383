"""The parts of the cases that measure nothing, and that bare reading and writing touch every byte."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import byhand, disk, targets
from benchmarks.__main__ import CASES
from benchmarks.arithmetic_case import table
from benchmarks.figures import Figure
from benchmarks.program import ROOT, output
from benchmarks.pss import Pss, Watch, parse
from mergeflow.errors import ExecutorError

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = disk.MIB


def test_every_case_has_its_place_on_the_page() -> None:
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert [name for name in CASES if f"<!-- {name}: begin -->" not in page] == []


def test_the_first_list_has_all_models_and_the_others_differ() -> None:
    made = targets.lists(20, 16)
    assert made[0] == [f"{number:02}" for number in range(1, 21)]
    assert len({tuple(ids) for ids in made}) == 16
    assert min(map(len, made)) >= 8
    assert made[:4] == targets.lists(20, 4)
    assert len(targets.lists(targets.LEAST_MODELS, 16)) == 16


def test_a_tree_by_hand_pairs_up_level_by_level() -> None:
    steps = byhand.tree([Path(f"{name}.safetensors") for name in "abcde"], Path("out"))
    told = [(step.a.path.stem, step.b.path.stem, step.result.path.stem, step.multiplier) for step in steps]
    assert told == [
        ("a", "b", "001", 0.5),
        ("c", "d", "002", 0.5),
        ("001", "002", "003", 0.5),
        ("003", "e", "004", 0.2),
    ]


def test_a_tree_by_hand_leaves_one_file_and_tells_what_it_cost(tmp_path: Path) -> None:
    paths = [tmp_path / f"{value}.safetensors" for value in (1, 2, 3)]
    for value, path in enumerate(paths, start=1):
        save_file({"w": torch.full((64,), float(value)).half()}, path, metadata={"format": "pt"})
    size = paths[0].stat().st_size
    out = tmp_path / "out"
    out.mkdir()
    took = byhand.make(paths, out)
    (left,) = out.iterdir()
    assert load_file(left)["w"].tolist() == [2.0] * 64
    assert took[1:] == (4 * size, 2 * size, 2 * size)


@pytest.mark.parametrize(
    "way",
    [disk.Way(1, MIB), disk.Way(3, MIB), pytest.param(disk.Way(2, MIB, direct=True), id="O_DIRECT")],
    ids=str,
)
def test_what_is_written_has_its_size_and_can_be_read(
    way: disk.Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * MIB + 12345
    paths = [tmp_path / "a", tmp_path / "b"]
    try:
        assert disk.write(paths, size, way) > 0
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    assert [path.stat().st_size for path in paths] == [size, size]
    assert all(path.read_bytes().count(b"\0") < size / 100 for path in paths)
    counted: list[int] = []
    monkeypatch.setattr(os, "preadv", _counting(os.preadv, counted))
    assert disk.read(paths, way) > 0
    assert sum(counted) == 2 * size


def _counting(call: Callable[..., int], counted: list[int]) -> Callable[..., int]:
    def counting(*arguments: object) -> int:
        counted.append(call(*arguments))
        return counted[-1]

    return counting


def test_pages_of_files_are_told_apart_from_a_process_own() -> None:
    told = parse("00400000-7ffe ---p 0 00:00 0 [rollup]\nRss: 9 kB\nPss: 7 kB\nPss_Anon: 4 kB\nPss_File: 3 kB\n")
    assert told == Pss(7 * 1024, 3 * 1024)
    assert told.own == 4 * 1024


def test_the_memory_of_a_child_of_a_child_counts() -> None:
    hold = "import time; held = bytearray(64 << 20); time.sleep(0.8)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    with Watch(every=0.02) as watch:
        output([sys.executable, "-c", program], ROOT, watch.environment)
    assert 64 << 20 < watch.peak.own < 128 << 20


def test_a_program_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(ExecutorError, match=r"ended with exit code 3; it said last:\nno room"):
        output([sys.executable, "-c", "import sys; print('no room'); sys.exit(3)"], ROOT)


def test_rows_of_the_arithmetic_may_have_bare_numbers_and_medians() -> None:
    made = table(
        [{"method": "uniform", "seconds": 0.5}, {"method": "tree", "to 1": {"median": 2, "low": 1, "high": 3}}]
    )
    assert made.columns == ("method", "seconds", "to 1")
    assert made.rows == (
        ("uniform", Figure(0.5, 0.5, 0.5, ""), None),
        ("tree", None, Figure(2, 1, 3, "", 2)),
    )
