"""Series and assemblies by the command line, on the demo set."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

    from tests.program import Call

STEM = "x17-AstolfoMix-x13te0x14te1"


@pytest.fixture
def demo(demo_dir: Path) -> list[str]:
    return [f"models.dir={demo_dir}", "executor=local", "target=x17"]


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


def test_text_encoders_are_swapped_put_together_and_compared(call: Call, demo: list[str], tmp_path: Path) -> None:
    swap = [*demo, "series=swap", "series.components=te0", "+selection.two=05,11=2", "series.selection=two"]
    parts = call(*swap, "series.write=component", f"out={tmp_path / 'parts'}")
    assert parts.code == 0, parts.err
    whole = call(*swap, f"out={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    names = [f"{STEM}-swap-te0-{id}.safetensors" for id in ("05", "11")]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "manifest.json",
        "series.csv",
        *names,
        "xyz.txt",
    ]
    assert (tmp_path / "whole" / "xyz.txt").read_text() == f"{','.join(names)}\n"
    with (tmp_path / "whole" / "series.csv").open() as file:
        assert [row["model_file"][:4] for row in csv.DictReader(file)] == ["_x05", "_x11"]
    base, part = (tmp_path / "parts" / name for name in (f"{STEM}.safetensors", names[0]))
    made = call(
        "job=assemble", f"base={base}", f"te0={part}", "file=a, b.safetensors", f"out={tmp_path}", "executor=local"
    )
    assert made.code == 0, made.err
    assert tensors(tmp_path / "a, b.safetensors") == tensors(tmp_path / "whole" / names[0])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {source["name"] for source in manifest["sources"]} == {base.name, part.name}


def test_the_plan_shows_every_output_of_a_series(call: Call, demo: list[str]) -> None:
    done = call(*demo, "series=leave_one_out", "series.components=te0", "job=plan")
    assert done.code == 0, done.err
    assert "15 output(s)" in done.out
    assert f"{STEM}-leave_one_out-te0-11a.safetensors" in done.out
    assert "te0   uniform of 13 models" in done.out


def test_series_and_assemblies_are_swept(call: Call, demo: list[str], tmp_path: Path) -> None:
    swap = [*demo, "series=swap", "+selection.one='05'", "series.selection=one", "series.write=component"]
    done = call("-m", *swap, "series.components=te0,te1", f"out={tmp_path / 'parts'}")
    assert done.code == 0, done.err
    parts = [tmp_path / "parts" / f"{n}" / f"{STEM}-swap-te{n}-05.safetensors" for n in (0, 1)]
    assert all(path.is_file() and (path.parent / "series.csv").is_file() for path in parts)
    base = parts[0].parent / f"{STEM}.safetensors"
    named = ["job=assemble", f"base={base}", "file=made.safetensors", "executor=local"]
    done = call("-m", *named, f"+parts.te0={parts[0]},{tmp_path / 'none'}", f"out={tmp_path / 'made'}")
    assert done.code == 1
    assert "none does not exist" in done.err
    assert (tmp_path / "made" / "0" / "made.safetensors").is_file()
    assert not (tmp_path / "made" / "1" / "made.safetensors").exists()


def test_a_series_that_cannot_be_is_bad_usage(call: Call, demo: list[str]) -> None:
    for recipe in (["recipe=x39a"], ["recipe=file", "recipe.file=nowhere.safetensors"]):
        done = call(*demo, "series=add_one", "series.components=[te0,te2]", "series.target=recorded", *recipe)
        assert done.code == 2
        assert done.err == "mergeflow: a recorded tree has no series; leave out recipe= or series=\n"
    done = call(*demo, "series=add_one", "series.components=[te0,te2]", "series.target=x11c")
    assert done.code == 2
    assert "series.components names 'te2'" in done.err
    assert "there is no target 'x11c'" in done.err
    assert "Traceback" not in done.err


def test_an_assembly_that_cannot_be_is_told_at_once(call: Call, tmp_path: Path) -> None:
    done = call("job=assemble", "base=here", "tee=there", "file=x.safetensors", f"out={tmp_path}", "executor=local")
    assert done.code == 1
    for word in ("here does not exist", "there does not exist", "names the component 'tee'"):
        assert word in done.err
    assert call("job=assemble", "base=here", "te0=there", "method=pairwise").code == 2
