"""From a finished file to the same file: its own metadata are enough, and what has changed since is noticed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergeflow.errors import FormatError, IncompatibleSources, MergeflowError, StorageError
from mergeflow.execute.local import LocalExecutor
from mergeflow.inputs import LARGEST_METADATA
from mergeflow.merge import open_plan, run
from mergeflow.recipe.recorded import read_merges
from mergeflow.recipe.request import Budget, PartRequest, Policies, RecordedFile, TargetRequest
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from mergeflow.report.manifest import manifest, write_manifest
from tests.models import (
    ANY,
    SMALLEST,
    TOY,
    TOY_COMPOSITES,
    TOY_SELECTIONS,
    merge,
    request,
    toy_models,
    toy_targets,
    write_models,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.recipe.request import Request

VAE = "first_stage_model.decoder.weight"
REPLAYED = TargetRequest("recorded", "", recorded=True)


def small_models() -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoints with what the web UI's rules tell apart: a UNet, a VAE, position_ids, and what is never merged."""
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
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("toys"), toy_models())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("small"), small_models())


def replay(file: Path, models: Path, out: Path, *, check: bool = True, **changes: Any) -> Request:
    """A request for what `file` says of itself, with nothing else that the file was asked for with."""
    asked = request(models, out, targets=[REPLAYED], arch=changes.pop("arch", ANY))
    return replace(asked, recorded=RecordedFile(str(file), "mergeflow", check), **changes)


def toy(models: Path, out: Path, name: str = "first", **changes: Any) -> Request:
    targets = [target for target in toy_targets() if target.name == name]
    asked = request(
        models, out, arch=TOY, selections=TOY_SELECTIONS, targets=targets, composites=TOY_COMPOSITES, **changes
    )
    return asked


def tree(models: Path, out: Path, **changes: Any) -> Request:
    """A tree of all small models."""
    asked = replace(request(models, out, dtype="keep"), method="pairwise", policies=Policies(keys="webui"))
    return replace(asked, **changes)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def problems(wanted: Request) -> list[str]:
    return [str(problem) for problem in open_plan(wanted).problems]


# --- the same file --------------------------------------------------------------------------------------------------

LENIENT = Policies(missing="skip", integers="first", nonfinite="skip", position_ids="fix")
RECORDED = TargetRequest("recorded", "merged.safetensors", recorded=True)
NODES = {"x": ["1", "2"], "y": {"a": "x", "b": "3", "bake": "4", "multiplier": 0.3}, "top": ["x", "y", 0.2]}


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("policies", [Policies(), LENIENT], ids=["strict", "lenient"])
def test_a_mean_is_made_again_byte_for_byte(name: str, policies: Policies, toys: Path, tmp_path: Path) -> None:
    merge(toy(toys, tmp_path, name, policies=policies))
    made = tmp_path / f"{name}.safetensors"
    merge(replay(made, toys, tmp_path / "again", arch=TOY))
    assert (tmp_path / "again" / made.name).read_bytes() == made.read_bytes()


def test_keys_of_one_model_and_a_base_are_taken_again(toys: Path, tmp_path: Path) -> None:
    (target,) = (target for target in toy_targets() if target.name == "first")
    target = replace(target, components={"text": PartRequest("text")}, base="3", keys_from="2", dtype="bf16")
    wanted = replace(toy(toys, tmp_path, policies=Policies(missing="base")), targets=(target,))
    merge(wanted)
    merge(replay(tmp_path / "first.safetensors", toys, tmp_path / "again", arch=TOY))
    assert (tmp_path / "again" / "first.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()


TREES: dict[str, dict[str, Any]] = {
    "the web UI's rules": {},
    "with a VAE": {"tree": TreeOptions("chain", {"all-1": 0.3}, True, "every", "4")},
    "in torch 2.0": {"rules": Rules("webui", "half"), "tree": TreeOptions(save_half=False), "dtype": "fp16"},
    "strict keys": {"policies": Policies(), "rules": Rules("float64")},
    "recorded": {"recorded": read_merges(NODES, None), "targets": (RECORDED,)},
    "a recorded mean": {
        "recorded": read_merges(NODES, None),
        "targets": (RECORDED,),
        "method": "uniform",
        "policies": Policies(),
    },
}


@pytest.mark.parametrize("changes", TREES.values(), ids=TREES.keys())
def test_a_tree_is_made_again_byte_for_byte(changes: dict[str, Any], small: Path, tmp_path: Path) -> None:
    merge(tree(small, tmp_path, **changes))
    made = tmp_path / "merged.safetensors"
    merge(replay(made, small, tmp_path / "again"))
    assert (tmp_path / "again" / made.name).read_bytes() == made.read_bytes()
    again = replay(tmp_path / "again" / made.name, small, tmp_path / "once-more", budget=Budget(2, 2, 1 << 28))
    merge(again)
    assert (tmp_path / "once-more" / made.name).read_bytes() == made.read_bytes()


def test_models_that_have_moved_and_have_other_ids_make_the_same_tensors(small: Path, tmp_path: Path) -> None:
    merge(tree(small, tmp_path))
    shutil.copytree(small, tmp_path / "moved")
    moved = replay(tmp_path / "merged.safetensors", tmp_path / "moved", tmp_path / "again")
    source = replace(moved.models, pattern="{id}afetensors")
    merge(replace(moved, models=source))
    one, other = (load_file(tmp_path / place / "merged.safetensors") for place in (".", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_the_file_itself_may_be_replaced_by_what_it_tells(small: Path, tmp_path: Path) -> None:
    merge(tree(small, tmp_path))
    made = tmp_path / "merged.safetensors"
    before = made.read_bytes()
    assert "exists; choose another out=, or overwrite=true" in problems(replay(made, small, tmp_path))[0]
    merge(replay(made, small, tmp_path, overwrite=True))
    assert made.read_bytes() == before


# --- what has changed since -----------------------------------------------------------------------------------------


@pytest.fixture
def changed(small: Path, tmp_path: Path) -> Path:
    """A merged file, one of whose sources has another value since, under the same header."""
    models = tmp_path / "models"
    shutil.copytree(small, models)
    merge(tree(models, tmp_path))
    with (models / "3.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\1\2")
    return tmp_path / "merged.safetensors"


def test_a_source_with_other_values_is_noticed_before_anything_gets_its_name(changed: Path, tmp_path: Path) -> None:
    wanted = replay(changed, tmp_path / "models", tmp_path / "again")
    plan = open_plan(wanted)
    assert plan.problems == ()
    with pytest.raises(IncompatibleSources) as caught:
        run(plan, LocalExecutor(SMALLEST))
    told = str(caught.value)
    assert f"the tensors of merged.safetensors are not those of {changed}, whose recipe this is" in told
    assert told.endswith("choose recipe.check=false to have what is made now")
    assert names(tmp_path / "again") == []


def test_where_whole_files_were_hashed_a_source_with_other_values_is_refused_before_the_run(
    small: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(small, models)
    merge(tree(models, tmp_path, hashes=True))
    made = tmp_path / "merged.safetensors"
    merge(replay(made, models, tmp_path / "again"))
    assert (tmp_path / "again" / made.name).read_bytes() == made.read_bytes()
    with (models / "3.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\1\2")
    (problem,) = problems(replay(made, models, tmp_path / "once-more"))
    assert f"model 3 (3.safetensors) is not the file that {made} was made of: its sha256 is " in problem


def test_what_the_changed_sources_make_is_made_if_that_is_wanted(changed: Path, tmp_path: Path) -> None:
    merge(replay(changed, tmp_path / "models", tmp_path / "again", check=False))
    merge(tree(tmp_path / "models", tmp_path / "anew"))
    again = (tmp_path / "again" / "merged.safetensors").read_bytes()
    assert again == (tmp_path / "anew" / "merged.safetensors").read_bytes() != changed.read_bytes()


def test_a_file_whose_own_tensors_were_changed_is_not_what_its_recipe_makes(small: Path, tmp_path: Path) -> None:
    merge(tree(small, tmp_path))
    with (tmp_path / "merged.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\1\2")
    with pytest.raises(IncompatibleSources, match="whose recipe this is"):
        merge(replay(tmp_path / "merged.safetensors", small, tmp_path / "again"))
    assert names(tmp_path / "again") == []


def test_a_source_that_is_another_file_is_refused_before_anything_is_read(changed: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    before = (models / "2.safetensors").stat().st_size
    save_file(load_file(models / "2.safetensors"), models / "2.safetensors", {"more": "metadata"})
    now = (models / "2.safetensors").stat().st_size
    (problem,) = problems(replay(changed, models, tmp_path / "again"))
    assert problem == (
        f"model 2 (2.safetensors) is not the file that {changed} was made of: its size is {now:,}, not {before:,}; "
        "find the file of then, or choose recipe.check=false to merge what is there now"
    )
    plan = open_plan(replay(changed, models, tmp_path / "again", check=False))
    assert plan.problems == ()
    assert [note for note in plan.notes if "is not the file that" in note]


def test_all_that_have_changed_or_are_missing_are_told_together(changed: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for id in "23":
        save_file(load_file(models / f"{id}.safetensors"), models / f"{id}.safetensors", {"more": "metadata"})
    assert [problem[:7] for problem in problems(replay(changed, models, tmp_path / "again"))] == ["model 2", "model 3"]
    for id in "34":
        (models / f"{id}.safetensors").unlink()
    with pytest.raises(MergeflowError, match=r"2 of its 4 models are not in .*: 3 \(3\.safetensors\), 4 \(4\.safete"):
        open_plan(replay(changed, models, tmp_path / "again"))


# --- metadata alone -------------------------------------------------------------------------------------------------


def as_header(metadata: dict[str, str]) -> object:
    return {"__metadata__": metadata, "w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}


def as_table(metadata: dict[str, str]) -> object:
    return metadata


def as_nested_json(metadata: dict[str, str]) -> object:
    return {"mergeflow": json.loads(metadata["mergeflow"])}


@pytest.mark.parametrize("form", [as_header, as_table, as_nested_json])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_metadata_that_somebody_saved_are_enough(form: Any, encoding: str, small: Path, tmp_path: Path) -> None:
    merge(tree(small, tmp_path))
    made = tmp_path / "merged.safetensors"
    with safe_open(made, framework="pt") as file:
        text = json.dumps(form(file.metadata()))
    (tmp_path / "saved.json").write_text(text, encoding)
    merge(replay(tmp_path / "saved.json", small, tmp_path / "again"))
    assert (tmp_path / "again" / made.name).read_bytes() == made.read_bytes()


NOT_METADATA = {
    "empty": (b"", FormatError, "cannot be used: it is not JSON (Expecting value: line 1 column 1 (char 0))"),
    "no JSON": (b"{mergeflow", FormatError, "cannot be used: it is not JSON (Expecting property name enclosed in "),
    "no text": (b'{"a": "\xff"}', FormatError, "cannot be used: it is not JSON ('utf-8' codec can't decode byte 0xff"),
    "a list": (b"[1]", FormatError, "cannot be used: it is JSON, but no table of metadata"),
    "too deep": (b"[" * 100_000, FormatError, "cannot be used: it is not JSON ("),
    "another's": (b'{"a": {"b": 1}}', MergeflowError, "has no recipe of mergeflow in its metadata"),
    "a web UI's": (b'{"sd_merge_recipe": {}}', MergeflowError, "(it has one of a web UI: use recipe=webui)"),
}


@pytest.mark.parametrize(("content", "kind", "told"), NOT_METADATA.values(), ids=NOT_METADATA.keys())
def test_a_json_file_that_holds_no_metadata_is_refused(
    content: bytes, kind: type[MergeflowError], told: str, small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "saved.json"
    path.write_bytes(content)
    with pytest.raises(kind) as caught:
        open_plan(replay(path, small, tmp_path / "again"))
    assert str(caught.value).startswith(f"recipe.file={path}")
    assert told in str(caught.value)


@pytest.mark.parametrize("tool", ["mergeflow", "webui"])
def test_the_manifest_is_no_recipe_and_says_which_file_has_one(tool: Any, small: Path, tmp_path: Path) -> None:
    path = write_manifest(manifest(merge(tree(small, tmp_path)), "local"), str(tmp_path))
    wanted = replay(path, small, tmp_path / "again")
    assert isinstance(wanted.recorded, RecordedFile)
    with pytest.raises(FormatError) as caught:
        open_plan(replace(wanted, recorded=replace(wanted.recorded, tool=tool)))
    assert str(caught.value) == (
        f"recipe.file={path} cannot be used: it is the manifest of a run, which has no recipe; give one of the files "
        "beside it: merged.safetensors"
    )


def test_a_json_file_that_is_larger_than_any_metadata_is_not_read(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_METADATA + 1)
    with pytest.raises(FormatError, match=r"it has 104,857,601 bytes, and metadata at most 104,857,600"):
        open_plan(replay(path, small, tmp_path / "again"))


@pytest.mark.parametrize("name", ["saved.json", "merged.safetensors"])
def test_a_file_that_is_not_there_is_told(name: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"^recipe\.file: .*{name} does not exist, and its directory is empty"):
        open_plan(replay(tmp_path / name, small, tmp_path / "again"))
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match=rf"^recipe\.file: .*{name} is a directory, not a checkpoint file$"):
        open_plan(replay(tmp_path / name, small, tmp_path / "again"))


def test_a_file_that_is_no_checkpoint_is_told(small: Path, tmp_path: Path) -> None:
    (tmp_path / "merged.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(FormatError, match=r"^recipe\.file=.*merged\.safetensors cannot be used: "):
        open_plan(replay(tmp_path / "merged.safetensors", small, tmp_path / "again"))
