"""Outputs of every kind are what their recipes make; whatever is changed afterwards is found and told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergeflow.errors import ConfigError, FormatError, MergeflowError, SelectionError, StorageError
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_assembly, run
from mergeflow.plan import metadata
from mergeflow.recipe.assembly import Assembly
from mergeflow.recipe.recorded import read_merges
from mergeflow.recipe.request import ModelSource, PartRequest, Policies, TargetRequest
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from mergeflow.recipe.verification import VerificationRequest
from mergeflow.report.manifest import manifest, write_manifest
from mergeflow.verify.run import open_verification, verify
from mergeflow.verify.sample import TILE
from tests.models import (
    ANY,
    SMALLEST,
    merge,
    request,
    toy_architecture,
    toy_models,
    toy_request,
    toy_targets,
    write_models,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.merge import Result
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.request import Request
    from mergeflow.verify.result import Verification

OUT = "merged.safetensors"
VAE = "first_stage_model.decoder.weight"


def verified(
    file: Path, models: Path | ModelSource, arch: Architecture = ANY, sample: int | None = None, threads: int = 2
) -> Verification:
    source = models if isinstance(models, ModelSource) else ModelSource(str(models))
    asked = VerificationRequest(str(file), source, arch, str(file.parent), sample)
    return verify(open_verification(asked), threads=threads)


def texts(found: Verification) -> list[str]:
    return [finding.text for finding in found.findings]


def made(wanted: Request) -> Result:
    """Merge, and leave the manifest, as the command line does."""
    result = merge(wanted)
    write_manifest(manifest(result, "local"), wanted.out)
    return result


# --- what holds -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every dtype; the largest tensor is cut down, since fp64 is added up one by one."""
    models = toy_models()
    for tensors in models.values():
        tensors["net.embedding"] = tensors["net.embedding"][:9].contiguous()
    return write_models(tmp_path_factory.mktemp("toys"), models)


@pytest.fixture(scope="module")
def toy_arch() -> Architecture:
    return toy_architecture(9)


LENIENT = Policies(missing="skip", integers="first", nonfinite="skip", position_ids="fix")


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("policies", [Policies(), LENIENT], ids=["strict", "lenient"])
def test_a_mean_of_every_dtype_with_composites_and_integers_holds(
    name: str, policies: Policies, toys: Path, toy_arch: Architecture, tmp_path: Path
) -> None:
    wanted = replace(toy_request(toys, tmp_path, names=[name]), architecture=toy_arch, policies=policies)
    made(wanted)
    found = verified(tmp_path / f"{name}.safetensors", toys, toy_arch)
    assert texts(found) == []
    assert found.elements.checked == found.elements.total > 0
    assert found.header
    assert found.manifest is not None


def test_keys_of_one_model_and_a_base_hold(toys: Path, toy_arch: Architecture, tmp_path: Path) -> None:
    (target,) = (target for target in toy_targets() if target.name == "first")
    target = replace(target, components={"text": PartRequest("text")}, base="3", keys_from="2", dtype="bf16")
    wanted = replace(toy_request(toys, tmp_path), architecture=toy_arch, policies=Policies(missing="base"))
    merge(replace(wanted, targets=(target,)))
    assert texts(verified(tmp_path / "first.safetensors", toys, toy_arch)) == []


def small_models() -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoints with what the web UI's rules tell apart."""
    generator = torch.Generator().manual_seed(3)
    return {
        id: {
            "model.diffusion_model.w": torch.randn(70, 30, generator=generator).half(),
            "cond_stage_model.position_ids": torch.arange(77).view(1, 77).half(),
            VAE: torch.randn(9, generator=generator),
            "alphas_cumprod": torch.randn(5, generator=generator),
        }
        for id in ("1", "2", "3", "4")
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("small"), small_models())


def tree(models: Path, out: Path, **changes: Any) -> Request:
    """A tree of all small models."""
    asked = replace(request(models, out, dtype="keep"), method="pairwise", policies=Policies(keys="webui"))
    return replace(asked, **changes)


RECORDED = TargetRequest("recorded", OUT, recorded=True)
NODES = {"x": ["1", "2"], "y": {"a": "x", "b": "3", "bake": "4", "multiplier": 0.3}, "top": ["x", "y", 0.2]}
DIFFERENCE = {"top": {"a": "1", "b": "2", "c": "3", "formula": "add_difference", "multiplier": 0.7}}
TREES: dict[str, dict[str, Any]] = {
    "the web UI's rules": {},
    "with a VAE": {"tree": TreeOptions("chain", {"all-1": 0.3}, True, "every", "4")},
    "in torch 2.0": {"rules": Rules("webui", "half"), "tree": TreeOptions(save_half=False), "dtype": "fp16"},
    "in fp64": {"policies": Policies(), "rules": Rules("float64")},
    "in fp32 to bf16": {"policies": Policies(), "rules": Rules("float32"), "dtype": "bf16"},
    "of comfyui": {"policies": Policies(), "rules": Rules("comfyui"), "dtype": "fp16"},
    "of supermerger": {"rules": Rules("supermerger"), "tree": TreeOptions("chain", {"level1": 0.3, "level2": 0.7})},
    "recorded": {"recorded": read_merges(NODES, None), "targets": (RECORDED,)},
    "with a difference": {"recorded": read_merges(DIFFERENCE, None), "targets": (RECORDED,)},
    "as a mean": {
        "recorded": read_merges(NODES, None),
        "targets": (RECORDED,),
        "method": "uniform",
        "policies": Policies(),
    },
}


@pytest.mark.parametrize("changes", TREES.values(), ids=TREES.keys())
def test_a_tree_holds(changes: dict[str, Any], small: Path, tmp_path: Path) -> None:
    merge(tree(small, tmp_path, **changes))
    assert texts(verified(tmp_path / OUT, small)) == []


NAN, INF = float("nan"), float("inf")
SOURCE_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}


@pytest.mark.parametrize("policy", ["skip", "propagate"])
@pytest.mark.parametrize("out", ["keep", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("listed", ["all", "1"], ids=["mean", "copy"])
def test_what_is_not_finite_holds_by_every_policy(policy: Any, out: str, listed: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    broken = {
        "1": torch.tensor([NAN, INF, -INF, INF, 1.0, -0.0, 3.0]),
        "2": torch.tensor([1.0, 2.0, 3.0, -INF, NAN, 0.0, -3.0]),
        "3": torch.randn(7, generator=generator) * 0.1,
    }
    one_model = {"1": torch.randn(300, generator=generator)} if listed == "1" and policy == "skip" else broken
    models = {
        id: {name: row.to(dtype) for name, dtype in SOURCE_DTYPES.items()}
        | {"weight norm": row.repeat(9).half()}  # so many that torch converts them at once
        for id, row in one_model.items()
    }
    directory = write_models(tmp_path / "models", models)
    made(request(directory, tmp_path, selections={"all": listed}, dtype=out, policies=Policies(nonfinite=policy)))
    assert texts(verified(tmp_path / OUT, directory)) == []


def test_integers_booleans_and_complex_numbers_hold(tmp_path: Path) -> None:
    ids = torch.arange(77)
    models = {
        id: {
            "ids": ids.to(dtype),
            "flags": torch.tensor([True, False]),
            "waves": torch.tensor([1 + 2j, -3j]),
            "large": torch.tensor([2**63 - 1, -(2**63)]),
            "bytes": torch.arange(256).to(torch.uint8),
        }
        for id, dtype in (("1", torch.int64), ("2", torch.float16), ("3", torch.int32), ("4", torch.float64))
    }
    merge(request(write_models(tmp_path / "models", models), tmp_path))
    assert texts(verified(tmp_path / OUT, tmp_path / "models")) == []


def test_bent_position_ids_that_were_made_whole_hold(tmp_path: Path) -> None:
    ids = torch.arange(77).half()
    models = write_models(tmp_path / "models", {"1": {"position_ids": ids}, "2": {"position_ids": ids * 0.9995}})
    merge(request(models, tmp_path, policies=Policies(position_ids="fix")))
    assert texts(verified(tmp_path / OUT, models)) == []


# --- what is looked at ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of one tensor of many tiles, and the models below it."""
    place = tmp_path_factory.mktemp("long")
    generator = torch.Generator().manual_seed(1)
    models = {id: {"w": torch.randn(10 * TILE + 5, generator=generator).bfloat16()} for id in "123"}
    made(request(write_models(place / "models", models), place))
    return place


def flipped(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def copied(place: Path, to: Path) -> Path:
    """The merged file elsewhere, without its manifest."""
    to.mkdir(exist_ok=True)
    shutil.copy(place / OUT, to)
    return to / OUT


@pytest.mark.parametrize(("sample", "tiles"), [(1, 1), (4, 4), (11, 11), (1000, 11), (None, 11)])
def test_as_many_tiles_are_looked_at_as_asked_for(sample: int | None, tiles: int, long: Path) -> None:
    found = verified(long / OUT, long / "models", sample=sample)
    assert (found.tiles.checked, found.tiles.total) == (tiles, 11)
    assert found.holds


def test_the_first_element_is_told_with_its_bits_and_how_many_differ(long: Path, tmp_path: Path) -> None:
    file = copied(long, tmp_path)
    size = file.stat().st_size
    for element in (TILE + 3, 5 * TILE, 10 * TILE + 4):
        flipped(file, size - 2 * (10 * TILE + 5 - element), 1)
    one, many = (verified(file, long / "models", threads=threads) for threads in (1, 5))
    (finding,) = one.findings
    assert one.findings == many.findings
    assert (finding.where, finding.key, finding.element, finding.differing) == ("tensors", "w", TILE + 3, 3)
    assert finding.expected is not None
    assert finding.found == f"0x{int(finding.expected, 16) ^ 2:04x}"
    assert f"element {TILE + 3:,} is {finding.found} (" in finding.text
    assert f"and should be {finding.expected} (" in finding.text
    assert f"3 of {10 * TILE + 5:,} elements that were looked at differ" in finding.text


def test_a_sample_finds_what_lies_in_it_and_the_manifest_tells_of_the_rest(long: Path, tmp_path: Path) -> None:
    file = copied(long, tmp_path)
    flipped(file, file.stat().st_size - 1)
    found = [verified(file, long / "models", sample=count).holds for count in range(1, 12)]
    assert True in found
    assert not found[-1]
    assert found == sorted(found, reverse=True), "a larger sample has all of a smaller one"
    shutil.copy(long / "manifest.json", tmp_path)
    (told,) = texts(verified(file, long / "models", sample=1))
    assert told.startswith("by the manifest the SHA-256 of the tensors is ")


# --- a single flipped bit -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge whose every bit can be tried: a mean, a copy, a tensor of integers and one without elements."""
    place = tmp_path_factory.mktemp("little")
    generator = torch.Generator().manual_seed(1)
    models = {
        id: {
            "w": torch.randn(3, 5, generator=generator).half(),
            "b": torch.randn(4, generator=generator).bfloat16(),
            "f": torch.randn(3, generator=generator),
            "ids": torch.arange(4),
            "none": torch.zeros(0, 3),
        }
        for id in ("01", "02", "03")
    }
    merge(
        request(
            write_models(place / "models", models),
            place,
            composites={"both": ("01", "02")},
            selections={"all": "both,03"},
        )
    )
    return place


def is_found(file: Path, models: Path) -> bool:
    """Whether a verification says that something is wrong; it may refuse, but in words."""
    try:
        return not verified(file, models, threads=1).holds
    except MergeflowError:
        return True


@settings(max_examples=250)
@given(st.data())
def test_any_single_flipped_bit_is_found(little: Path, data: st.DataObject) -> None:
    content = (little / OUT).read_bytes()
    data_begins = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.one_of(st.integers(0, data_begins - 1), st.integers(data_begins, len(content) - 1)))
    file = little / "flipped" / OUT
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    flipped(file, at, data.draw(st.integers(0, 7)))
    assert is_found(file, little / "models")


@pytest.mark.long
def test_every_single_flipped_bit_is_found(little: Path, tmp_path: Path) -> None:
    content = (little / OUT).read_bytes()
    file = tmp_path / OUT
    for at in range(len(content)):
        for bit in range(8):
            file.write_bytes(content)
            flipped(file, at, bit)
            assert is_found(file, little / "models"), (at, bit)


def test_nothing_is_found_where_nothing_was_flipped(little: Path) -> None:
    assert texts(verified(little / OUT, little / "models")) == []


# --- sources that are not what they were ----------------------------------------------------------------------------


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A merge with models of the test's own, which it may change."""
    shutil.copytree(small, tmp_path / "models")
    made(request(tmp_path / "models", tmp_path))
    return tmp_path


def test_a_source_with_other_values_is_told_from_a_file_that_was_changed(own: Path) -> None:
    flipped(own / "models" / "3.safetensors", -1 + (own / "models" / "3.safetensors").stat().st_size, 3)
    found = verified(own / OUT, own / "models")
    (finding,) = found.findings
    assert finding.where == "tensors"
    assert found.notes == (
        "the tensors are still those that the merge wrote, by the manifest, so that a source has changed; written to "
        "since: model(s) 3",
    )


def test_a_source_with_another_header_is_told_and_the_rest_is_looked_at_all_the_same(own: Path) -> None:
    write_models(own / "models", {"2": small_models()["2"]}, {"note": "saved once more"})
    flipped(own / OUT, (own / OUT).stat().st_size - 1, 2)
    found = verified(own / OUT, own / "models")
    assert [finding.where for finding in found.findings] == ["sources", "manifest", "tensors"]
    assert texts(found)[0].startswith(
        f"model 2 (2.safetensors) is not the file that {own / OUT} was made of: its size is "
    )
    assert (found.sources.checked, found.sources.total) == (3, 4)
    assert not found.header


def test_a_source_that_cannot_be_read_is_told_with_everything_else(own: Path) -> None:
    (own / "models" / "2.safetensors").write_bytes(b"no checkpoint")
    told = json.loads((own / "manifest.json").read_text())
    told["outputs"][0]["size"] = 1
    (own / "manifest.json").write_text(json.dumps(told))
    found = verified(own / OUT, own / "models")
    assert [finding.where for finding in found.findings] == ["sources", "manifest"]
    assert "2.safetensors cannot be used" in texts(found)[0]
    assert not found.holds


def test_a_source_that_is_not_there_is_named(own: Path) -> None:
    (own / "models" / "2.safetensors").unlink()
    with pytest.raises(
        SelectionError, match=r"^file=.*merged.safetensors: 1 of its 4 models are not in .*: 2 \(2.safe"
    ):
        verified(own / OUT, own / "models")


def test_sources_may_have_other_names_and_ids_by_now(own: Path) -> None:
    (own / "elsewhere").mkdir()
    for path in (own / "models").iterdir():
        path.rename(own / "elsewhere" / f"now-{path.name}")
    files = {str(number): str(own / "elsewhere" / f"now-{number}.safetensors") for number in range(1, 5)}
    assert texts(verified(own / OUT, ModelSource(files=files))) == []
    other_ids = ModelSource(str(own / "elsewhere"), pattern="now-{id}afetensors")
    for path in (own / "elsewhere").iterdir():
        path.rename(path.with_name(path.name.removeprefix("now-")))
    assert texts(verified(own / OUT, replace(other_ids, pattern="{id}afetensors"))) == []


def test_a_source_that_has_become_nan_cannot_be_what_the_file_was_made_of(own: Path) -> None:
    models = small_models()
    models["4"][VAE][2] = NAN
    write_models(own / "models", {"4": models["4"]})
    found = verified(own / OUT, own / "models")
    assert texts(found) == [
        f"'{VAE}' (all): model 4 has a value that is not finite, which nonfinite=error does not allow (element 2), so "
        "that no merge of the sources as they are has made it"
    ]


def test_integers_that_differ_now_are_told(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", {id: {"ids": torch.arange(5)} for id in "12"})
    merge(request(models, tmp_path))
    write_models(models, {"2": {"ids": torch.tensor([0, 1, 2, 3, 5])}})
    (told,) = texts(verified(tmp_path / OUT, models))
    assert told.startswith("'ids' (all): model 2 has another value than the first source")
    assert "(element 4)" in told


# --- the manifest ---------------------------------------------------------------------------------------------------


def edited(place: Path, *path: Any, value: Any) -> None:
    told = json.loads((place / "manifest.json").read_text())
    *above, last = path
    node = told
    for name in above:
        node = node[name]
    node[last] = value
    (place / "manifest.json").write_text(json.dumps(told))


WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "size": (("outputs", 0, "size"), 5, "by the manifest the file's size is 5, and it is "),
    "tensors": (("outputs", 0, "tensors"), 5, "by the manifest the file's number of tensors is 5, and it is 4"),
    "digest": (("outputs", 0, "tensors_sha256"), "ab", "by the manifest the SHA-256 of the tensors is ab, and it is "),
    "method": (
        ("outputs", 0, "components", "all", "method"),
        "pairwise",
        "by the manifest the method of all is pairwise, by the metadata uniform",
    ),
    "list": (("outputs", 0, "components"), {}, "by the manifest the method of all is None, by the metadata uniform"),
    "source's size": (("sources", 1, "size"), 7, "by the manifest the size of model 2 is 7, by the metadata "),
    "source's header": (("sources", 1, "header_sha256"), "x", "by the manifest the header of model 2 is x, by the "),
    "source": (("sources",), [], "the manifest does not have model 1"),
    "version": (("mergeflow",), "9.9", "by the manifest mergeflow 9.9 made the file, by its metadata 0."),
    "no list": (("outputs",), 5, "manifest.json is not as mergeflow writes it ("),
    "odd source": (("sources",), [3], "manifest.json is not as mergeflow writes it ("),
}


@pytest.mark.parametrize(("path", "value", "told"), WRONG.values(), ids=WRONG.keys())
def test_a_manifest_that_says_something_else_is_told(path: tuple[Any, ...], value: Any, told: str, own: Path) -> None:
    edited(own, *path, value=value)
    found = verified(own / OUT, own / "models")
    assert {finding.where for finding in found.findings} == {"manifest"}
    assert told in texts(found)[0]


def test_a_manifest_that_is_no_json_is_told(own: Path) -> None:
    (own / "manifest.json").write_bytes(b"\xff{")
    assert "manifest.json is not as mergeflow writes it (" in texts(verified(own / OUT, own / "models"))[0]


def test_a_file_without_a_manifest_or_with_another_ones_holds_and_that_is_said(own: Path) -> None:
    edited(own, "outputs", 0, "file", value="other.safetensors")
    (note,) = verified(own / OUT, own / "models").notes
    assert note == "manifest.json beside the file is of another run, so the tensors' SHA-256 is not known"
    (own / "manifest.json").unlink()
    found = verified(own / OUT, own / "models")
    assert found.notes == ("there is no manifest.json beside the file, so its tensors' SHA-256 is not known",)
    assert found.holds
    assert found.digest is None


def test_a_renamed_file_holds_with_its_manifest(own: Path) -> None:
    shutil.copy(own / OUT, own / "best.safetensors")
    (note,) = verified(own / "best.safetensors", own / "models").notes
    assert note.startswith(f"manifest.json beside the file is of another '{OUT}'")
    (own / OUT).unlink()
    found = verified(own / "best.safetensors", own / "models")
    assert found.holds
    assert found.manifest is not None
    assert found.notes == ()


# --- files that are something else ----------------------------------------------------------------------------------


def test_a_file_of_another_program_is_refused(small: Path, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", {"sd_merge_recipe": "{}"})
    why = "has no recipe of mergeflow in its metadata, only one of a web UI, so there is nothing to verify it by"
    with pytest.raises(ConfigError, match=why):
        verified(tmp_path / "a.safetensors", small)


def test_what_is_no_checkpoint_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"^file: .*a.safetensors cannot be used: "):
        verified(tmp_path / "a.safetensors", small)
    with pytest.raises(StorageError, match=r"^file: .*b.safetensors does not exist"):
        verified(tmp_path / "b.safetensors", small)


def test_an_assembled_file_is_refused_and_its_parts_are_named(own: Path) -> None:
    base = str(own / OUT)
    assembly = Assembly(
        base, {"all": str(own / "models" / "1.safetensors")}, ANY, "made.safetensors", str(own), SMALLEST
    )
    run(open_assembly(assembly), LocalExecutor(SMALLEST))
    why = r"was put together by job=assemble, of merged.safetensors, all of 1.safetensors: its metadata have no recipe"
    with pytest.raises(ConfigError, match=why):
        verified(own / "made.safetensors", own / "models")


def test_metadata_whose_two_recipes_differ_are_told_as_damaged(own: Path) -> None:
    content = (own / OUT).read_bytes()
    at = content.index(b'"mergeflow":" {') + len(b'"mergeflow":" ')
    damaged = content[:at] + content[at:].replace(b"uniform", b"unifurm", 1)
    (own / OUT).write_bytes(damaged)
    with pytest.raises(FormatError, match=r"has its recipe twice in its metadata, and the two are not the same: "):
        verified(own / OUT, own / "models")


def test_a_file_of_another_version_is_laid_out_as_that_said(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "describe", as_of("0.0.9", metadata.describe))
    merge(request(small, tmp_path))
    monkeypatch.undo()
    found = verified(tmp_path / OUT, small)
    assert found.version == "0.0.9"
    assert texts(found) == []


def as_of(version: str, describe: Any) -> Any:
    return lambda target, recipe: describe(target, recipe) | {"mergeflow": version}


def test_edited_metadata_are_told_by_name_and_place(own: Path) -> None:
    content = (own / OUT).read_bytes()
    (own / OUT).write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"', 1))
    (told,) = texts(verified(own / OUT, own / "models"))
    assert told == (
        "the metadata 'format' differ from what the recipe makes of them: from character 0 on they say 'tp', and "
        "should say 'pt'"
    )
