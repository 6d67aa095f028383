from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mergeflow
from mergeflow.recipe.request import Budget, PartRequest, Policies
from mergeflow.tensors import Identity
from tests.plan.builders import OPEN, SINGLE, USUAL, checkpoint, planned, problems

ROOT = Path(__file__).parent.parent.parent

MODELS = [checkpoint(id, path=f"/home/someone/models/_x{id}-größe {id}.safetensors") for id in ("01", "02", "21", "22")]
ASKED: dict[str, Any] = {"selections": {"models": "02,11a,1"}, "composites": {"11a": ("21", "22"), "unused": ("01",)}}


def metadata(*args: Any, **changes: Any) -> dict[str, str]:
    """What the header of the first output says, read back from its bytes."""
    plan = planned(*args, **changes)
    head = plan.outputs[0].layout.head
    length = int.from_bytes(head[:8], "little")
    said = json.loads(head[8 : 8 + length])["__metadata__"]
    assert isinstance(said, dict)
    return said


# what it says


def test_an_output_says_what_model_it_is() -> None:
    said = metadata(MODELS, **ASKED)
    assert {key: value for key, value in said.items() if "merge" not in key or key.startswith("modelspec")} == {
        "format": "pt",
        "modelspec.architecture": "toy-v1",
        "modelspec.title": "made",
        "modelspec.merged_from": "_x02-größe 02, _x21-größe 21, _x22-größe 22, _x01-größe 01",
        "modelspec.prediction_type": "epsilon",
    }


def test_an_output_holds_its_whole_recipe() -> None:
    wanted = replace(SINGLE, components={"image": PartRequest(model="22")}, keys_from="21", dtype="bf16")
    said = metadata(MODELS, wanted, **ASKED, policies=Policies("skip", "ignore", "first", "propagate"))
    assert json.loads(said["mergeflow"]) == {
        "mergeflow": mergeflow.__version__,
        "file": "made.safetensors",
        "architecture": "toy",
        "dtype": "bf16",
        "keys": {
            "rule": "strict",
            "missing": "skip",
            "surplus": "ignore",
            "integers": "first",
            "from": "21",
            "base": None,
        },
        "position_ids": None,
        "nonfinite": "propagate",
        "components": {
            "text": {
                "method": "uniform",
                "list": ["02", "11a", "01"],
                "shares": {"02": "1/3", "21": "1/6", "22": "1/6", "01": "1/3"},
            },
            "image": {"method": "copy", "list": ["22"], "shares": {"22": "1"}},
        },
        "composites": {"11a": ["21", "22"]},
        "trees": {},
        "sources": {
            one.id: {"name": one.path.rpartition("/")[2], "size": one.stat.size, "header": one.header.digest}
            for one in MODELS
        },
    }


def test_a_tree_is_told_node_by_node() -> None:
    said = json.loads(metadata(MODELS, **ASKED, method="pairwise")["mergeflow"])
    assert said["trees"] == {
        "models-2": {
            "leaves": ["02", "21", "22", "01"],
            "nodes": [
                ["11a", [1, 2], 0.5, "weighted_sum", True, None],
                ["models-1", [0, 4], 0.5, "weighted_sum", True, None],
                ["models-2", [5, 3], 1 / 3, "weighted_sum", True, None],
            ],
        }
    }
    assert {"tree": "models-2", "arithmetic": "webui", "scalars": "opmath"}.items() <= said["components"][
        "text"
    ].items()


def test_models_are_keyed_by_their_hash_where_it_is_known() -> None:
    hashed = [replace(one, identity=Identity(one.id * 32, "0123abcd")) for one in MODELS]
    said = metadata(hashed, **ASKED)
    lineage = json.loads(said["sd_merge_models"])
    assert list(lineage) == [id * 32 for id in ("02", "21", "22", "01")]
    assert {model["legacy_hash"] for model in lineage.values()} == {"0123abcd"}
    assert json.loads(said["mergeflow"])["sources"]["21"]["sha256"] == "21" * 32


def test_the_recipe_is_json_that_no_web_ui_takes_for_a_dict() -> None:
    # A web UI parses every value that starts with a brace, and then cannot save it as text again.
    assert re.match(r"[^{]", metadata(MODELS)["mergeflow"])


def test_the_recipe_and_the_models_are_where_web_uis_look_for_them() -> None:
    said = metadata(MODELS, **ASKED)
    made = json.loads(said["sd_merge_recipe"])
    assert (made.pop("type"), made.pop("custom_name")) == ("mergeflow", "made")
    assert made == json.loads(said["mergeflow"])
    assert json.loads(said["sd_merge_models"]) == {
        id: {"name": f"_x{id}-größe {id}.safetensors", "legacy_hash": None, "sd_merge_recipe": None}
        for id in ("02", "21", "22", "01")
    }


def test_composites_of_composites_are_told_to_the_last() -> None:
    composites = {"z": ("y", "01"), "y": ("21", "22"), "x": ("01", "02")}
    said = metadata(MODELS, selections={"models": "z,02"}, composites=composites)
    assert json.loads(said["mergeflow"])["composites"] == {"z": ["y", "01"], "y": ["21", "22"]}


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ('{"type":"webui","multiplier":0.5}', {"type": "webui", "multiplier": 0.5}),
        ("[1, null]", [1, None]),
        ("not JSON", None),
        ('{"multiplier": NaN}', None),
        ('{"multiplier": 1e999}', None),
        ("[" * 100_000, None),
        ("1" * 5000, None),
        ('"\\ud800"', "?"),
    ],
    ids=[
        "a recipe",
        "other JSON",
        "no JSON",
        "NaN",
        "infinity",
        "nested too deeply",
        "too many digits",
        "half a character",
    ],
)
def test_the_recipe_of_a_source_is_handed_on_if_it_is_one(recorded: str, told: Any) -> None:
    said = metadata([checkpoint("a", metadata={"sd_merge_recipe": recorded})])
    assert json.loads(said["sd_merge_models"])["a"]["sd_merge_recipe"] == told


def test_an_architecture_that_has_no_metadata_gets_no_modelspec() -> None:
    said = metadata([checkpoint("a", {"x": (2,)})], architecture=OPEN)
    assert said.keys() == {"format", "sd_merge_recipe", "sd_merge_models", "mergeflow"}


@pytest.mark.parametrize(("marked", "kind"), [(True, "v"), (False, "epsilon")])
def test_the_prediction_type_is_that_of_the_marker_in_the_output(marked: bool, kind: str) -> None:
    shapes = USUAL | ({"v_pred": (0,)} if marked else {})
    models = [checkpoint("a", shapes), checkpoint("b", shapes), checkpoint("other", USUAL | {"v_pred": (0,)})]
    said = metadata(models, selections={"models": "a,b"})
    assert said["modelspec.prediction_type"] == kind


def test_the_prediction_type_is_not_that_of_a_model_that_only_lends_its_text_encoder() -> None:
    models = [checkpoint("a"), checkpoint("b", USUAL | {"v_pred": (0,)})]
    wanted = replace(SINGLE, components={"image": PartRequest(model="a")})
    assert metadata(models, wanted)["modelspec.prediction_type"] == "epsilon"


def test_a_file_name_that_is_not_text_does_not_keep_the_output_from_being_written() -> None:
    plan = planned([checkpoint("\udce9", path="/models/caf\udce9.safetensors")])
    assert problems(plan) == []
    assert b'"modelspec.merged_from":"caf?"' in plan.outputs[0].layout.head


# what it does not say


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": Budget(7, 3, 2**31)},
        {"overwrite": True},
        {"out": "/elsewhere"},
        {"composites": {**ASKED["composites"], "another": ("02",)}},
    ],
    ids=["budget", "overwrite", "out", "a composite that no list selects"],
)
def test_what_does_not_change_the_tensors_does_not_change_the_header(changes: dict[str, Any]) -> None:
    assert metadata(MODELS, **(ASKED | changes)) == metadata(MODELS, **ASKED)


def test_where_the_models_lie_is_not_told() -> None:
    here = planned(MODELS, **ASKED).outputs[0].layout
    moved = [replace(one, path=one.path.replace("/home/someone", "/mnt")) for one in MODELS]
    assert planned(moved, **ASKED).outputs[0].layout == here
    assert b"/home" not in here.head
    assert b"/out" not in here.head


def test_another_target_beside_it_is_not_told() -> None:
    beside = replace(SINGLE, name="other", file="other.safetensors", dtype="fp32")
    assert metadata(MODELS, SINGLE, beside, **ASKED) == metadata(MODELS, SINGLE, **ASKED)


@pytest.mark.parametrize(
    "changes",
    [
        {"selections": {"models": "02,1,11a"}},
        {"selections": {"models": "02,11a"}},
        {"policies": Policies(nonfinite="skip")},
        {"dtype": "fp32"},
    ],
    ids=["order", "selection", "policy", "dtype"],
)
def test_what_may_change_the_tensors_changes_the_header(changes: dict[str, Any]) -> None:
    assert metadata(MODELS, **(ASKED | changes))["mergeflow"] != metadata(MODELS, **ASKED)["mergeflow"]


def test_the_same_recipe_gives_the_same_bytes_in_any_process_at_any_time() -> None:
    script = (
        "from tests.plan.builders import *\n"
        "from tests.plan.test_metadata import ASKED, MODELS\n"
        "import hashlib, pickle\n"
        "plan = planned(MODELS, **ASKED)\n"
        "print(hashlib.sha256(plan.outputs[0].layout.head).hexdigest(), [s.key for s in plan.strips], plan.notes)\n"
    )
    said = set()
    for seed, zone in (("0", "UTC"), ("1", "Asia/Tokyo"), ("4294967295", "UTC")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        said.add(done.stdout)
    assert len(said) == 1
