"""Series from end to end: each output is what it is alone, and all of them together read every byte once."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, get_args

import pytest
from safetensors.torch import load_file

from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.recipe.modelset import model_set
from mergeflow.recipe.request import (
    Budget,
    ModelSource,
    PartRequest,
    SeriesKind,
    SeriesRequest,
    SeriesWrite,
    TargetRequest,
)
from mergeflow.recipe.series import expanded
from mergeflow.recipe.tree import Rules
from mergeflow.report.series import COLUMNS, plot_names, series_table, write_series
from mergeflow.storage.local import LocalStore
from tests.fakes import CountingStore, overlaps
from tests.models import TOY, TOY_COMPOSITES, merge, request, toy_models, write_models

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.merge import Result
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.request import Request

LISTS = {"narrow": "10,8,9,3", "text": "2,10,3,7,6a=5", "lone": "9"}
BASE = TargetRequest(
    "base",
    "base.safetensors",
    components={
        "text": PartRequest(selection="text"),
        "vae": PartRequest(model="4"),
        "net": PartRequest(selection="narrow"),
    },
)
OTHER = TargetRequest("other", "other.safetensors", dtype="keep", selection="narrow")
TWO = Budget(workers=2, reads_in_flight=2, memory=1 << 28)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), toy_models())


def asked(models: Path, out: Path, series: SeriesRequest, method: str = "uniform") -> Request:
    plain = request(
        models, out, arch=TOY, selections=LISTS, targets=[BASE, OTHER], composites=TOY_COMPOSITES, budget=TWO
    )
    return replace(plain, series=series, method=method, rules=Rules("float32"))  # the web UI has no fp8


def parsed_by_the_web_ui(line: str) -> list[str]:
    """`csv_string_to_list_strip` of the web UI's script of the X/Y/Z plot."""
    return list(map(str.strip, chain.from_iterable(csv.reader(io.StringIO(line), skipinitialspace=True))))


@pytest.mark.parametrize("method", ["uniform", "pairwise"])
@pytest.mark.parametrize("write", get_args(SeriesWrite))
@pytest.mark.parametrize("kind", get_args(SeriesKind))
def test_every_output_of_a_series_is_the_file_that_it_is_alone(
    models: Path, tmp_path: Path, kind: SeriesKind, write: SeriesWrite, method: str
) -> None:
    wanted = asked(models, tmp_path / "series", SeriesRequest(kind, ("text",), target="base", write=write), method)
    merge(wanted)
    names = [str(path) for path in models.iterdir()]
    plain = expanded(wanted, model_set(names, wanted.models.pattern, TOY_COMPOSITES, {}, ""))
    files = sorted(path.name for path in (tmp_path / "series").iterdir())
    assert files == sorted(target.file for target in plain.targets)
    assert len(files) >= 5
    for target in plain.targets:
        alone = replace(plain, series=None, targets=(replace(target, member=None),), out=str(tmp_path / "alone"))
        (output,) = merge(alone).plan.outputs
        assert (tmp_path / "series" / target.file).read_bytes() == (
            tmp_path / "alone" / output.target.file
        ).read_bytes()


def test_a_component_has_what_varies_and_nothing_else(models: Path, tmp_path: Path) -> None:
    series = SeriesRequest("swap", ("text",), selection="narrow", target="base", write="component")
    merge(asked(models, tmp_path / "parts", series))
    merge(asked(models, tmp_path / "whole", replace(series, write="file")))
    for id in ("3", "8", "9", "10"):
        part = load_file(tmp_path / "parts" / f"base-swap-text-{id}.safetensors")
        whole = load_file(tmp_path / "whole" / f"base-swap-text-{id}.safetensors")
        assert part.keys() == {key for key in whole if key.startswith("text.")}
        assert all(part[key].equal(whole[key]) for key in part)


def test_the_table_says_what_each_output_is(models: Path, tmp_path: Path) -> None:
    result = merge(asked(models, tmp_path, SeriesRequest("leave_one_out", ("text", "net"), target="base")))
    rows = list(csv.DictReader(io.StringIO(series_table(result))))
    digests = {output.target.file: digest for output, digest in zip(result.plan.outputs, result.digests, strict=True)}
    assert tuple(rows[0]) == COLUMNS
    assert {row["file"]: row["tensors_sha256"] for row in rows}.items() < digests.items()
    assert [(row["model"], row["change"], row["models"]) for row in rows] == [
        ("", "the base", "5 4"),
        ("2", "text and net without 2", "4 4"),
        ("10", "text and net without 10", "4 3"),
        ("3", "text and net without 3", "4 3"),
        ("7", "text and net without 7", "4 4"),
        ("6a", "text and net without 6a", "4 4"),
        ("8", "text and net without 8", "5 3"),
        ("9", "text and net without 9", "5 3"),
    ]
    assert rows[5]["model_file"] == "6.safetensors + 7.safetensors + 8.safetensors"
    assert {(row["series"], row["components"]) for row in rows} == {("leave_one_out", "text net")}


def test_the_web_ui_reads_the_names_that_were_written(models: Path, tmp_path: Path) -> None:
    ids = {'say "a, b"': "1", "plain": "2", " é, ü ": "3", "#+@(x)": "4"}
    source = ModelSource(files={id: str(models / f"{name}.safetensors") for id, name in ids.items()})
    targets = [TargetRequest("base", "one, two.safetensors", selection="all")]
    series = SeriesRequest("leave_one_out", ("text",))
    result = merge(replace(request(source, tmp_path, arch=TOY, targets=targets), series=series))
    assert [path.name for path in write_series(result, str(tmp_path))] == ["series.csv", "xyz.txt"]
    (line,) = (tmp_path / "xyz.txt").read_text("utf-8").splitlines()
    names = parsed_by_the_web_ui(line)
    assert names == [output.target.file for output in result.plan.outputs]
    assert all((tmp_path / name).is_file() for name in names)
    assert names[0] == "one, two.safetensors"


def test_components_are_nothing_that_the_web_ui_could_load(models: Path, tmp_path: Path) -> None:
    result = merge(asked(models, tmp_path, SeriesRequest("swap", ("text",), target="base", write="component")))
    assert plot_names(result) == ""
    assert [path.name for path in write_series(result, str(tmp_path))] == ["series.csv"]


def test_a_run_without_a_series_leaves_no_tables(models: Path, tmp_path: Path) -> None:
    plain = replace(asked(models, tmp_path, SeriesRequest("swap", ("text",))), series=None)
    assert write_series(merge(plain), str(tmp_path)) == []
    assert not (tmp_path / "series.csv").exists()


# 44 models


def demo_request(demo: Path, out: Path, sdxl: Architecture, series: SeriesRequest) -> Request:
    targets = [
        TargetRequest(
            "base",
            "base.safetensors",
            components={
                "te0": PartRequest(selection="te0"),
                "te1": PartRequest(model="25"),
                "vae": PartRequest(model="25"),
                "unet": PartRequest(model="25"),
            },
        )
    ]
    return replace(
        request(
            ModelSource(str(demo), "_x{id}-*.safetensors"),
            out,
            arch=sdxl,
            selections={"te0": "05,11,17,20,22=5"},
            targets=targets,
            budget=TWO,
        ),
        series=series,
    )


def counted(wanted: Request) -> tuple[Result, CountingStore]:
    store = CountingStore(LocalStore())
    plan = open_plan(wanted, store)
    store.forget()
    return run(plan, LocalExecutor(wanted.budget), store), store


def test_a_series_of_44_reads_every_byte_once(demo_dir: Path, tmp_path: Path, sdxl: Architecture) -> None:
    series = SeriesRequest("swap", ("te0",), selection="all", write="component", with_base=False)
    result, store = counted(demo_request(demo_dir, tmp_path, sdxl, series))
    assert len(result.plan.outputs) == len(result.plan.checkpoints) == 44
    sizes = []
    for checkpoint in result.plan.checkpoints:
        reads = store.reads(checkpoint.path)
        assert overlaps(reads) == []
        sizes.append(sum(end - begin for begin, end in reads))
    assert sum(sizes) == result.plan.bytes_read == sum(receipt.bytes_read for receipt in result.receipts)
    assert max(path.stat().st_size for path in tmp_path.iterdir()) * 10 < min(
        path.stat().st_size for path in demo_dir.glob("_x25*")
    )


def test_39_additions_read_what_one_mean_of_all_would(demo_dir: Path, tmp_path: Path, sdxl: Architecture) -> None:
    series = SeriesRequest("add_one", ("te0",), write="component", with_base=False)
    result, store = counted(demo_request(demo_dir, tmp_path, sdxl, series))
    assert len(result.plan.outputs) == 39
    assert all(overlaps(store.reads(checkpoint.path)) == [] for checkpoint in result.plan.checkpoints)
    assert sum(len(strip.sums) for strip in result.plan.strips) > 150, "sums are shared"
