"""A tree that the web UI recorded, replayed from its metadata: the whole way, on the demo set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from safetensors import safe_open

from tests.byhand.tree import balanced, merge_tree
from tests.recipe.webui.simulator import Checkpoint, File, WebUI

if TYPE_CHECKING:
    from tests.byhand.floats import Scalars
    from tests.program import Call

ROOT = Path(__file__).resolve().parents[2]
VAE = "sd_xl_base_1.0.vae.safetensors"
RENAMED = {"x16a": "x15a-_x31_x32", "x34a": "x33a-x27ax28a"}
"""Merges whose files were given other names afterwards."""


@dataclass
class OnDisk(File):
    """A checkpoint that is really there."""

    path: Path = Path()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def legacy(self) -> str:
        return hashlib.sha256(self.path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]


def by_hand(demo: Path) -> Checkpoint:
    """x39a as a person makes it of the demo set: with the merges of `conf/recipe/x39a.yaml`, in their order."""
    nodes = yaml.safe_load((ROOT / "conf" / "recipe" / "x39a.yaml").read_text())["recipe"]["nodes"]
    webui = WebUI()
    known: dict[str, Checkpoint] = {}
    for path in sorted(demo.glob("_x*.safetensors")):
        hashed = path.name[2:4] not in ("01", "41", "10")  # who had not been used before was recorded without a hash
        known[path.name[2:4]] = webui.add(path.name, OnDisk(path.name, path=path), hashed=hashed)
    for name, node in nodes.items():
        a, b, multiplier = (node["a"], node["b"], node["multiplier"]) if isinstance(node, dict) else (*node, 0.5)
        vae = "None" if name == "x39a" else VAE
        custom = RENAMED.get(name, f"{name}-{a}{b}")
        made = webui.merge(known[a], known[b], multiplier=multiplier, custom_name=custom, vae=vae)
        known[name] = webui.rename(made, f"{name}-{a}{b}.safetensors") if name in RENAMED else made
    return known["x39a"]


@pytest.fixture(scope="module")
def recorded(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "x39a.json"
    path.write_text(json.dumps(by_hand(demo_dir).file.metadata))
    return path


def test_the_metadata_of_x39a_gives_the_tensors_that_its_config_gives(
    recorded: Path, demo_dir: Path, tmp_path: Path, call: Call
) -> None:
    common = [f"models.dir={demo_dir}", f"out={tmp_path}", "executor=local"]
    known = call(*common, "recipe=x39a")
    assert known.code == 0, known.err
    replay = ["recipe=webui", f"recipe.file={recorded}", "recipe.vae=25", "method=pairwise_torch20"]
    done = call(*common, *replay)
    assert done.code == 0, done.err
    assert tensors(tmp_path / "replayed.safetensors") == tensors(tmp_path / "x39a.safetensors")
    assert json.loads((tmp_path / "hashes.json").read_text()).keys() == {
        str(path) for path in demo_dir.glob("*.safetensors")
    }


@pytest.mark.long
@pytest.mark.parametrize("scalars", ["opmath", "half"])
def test_x39a_is_what_39_merges_of_files_by_hand_make(
    demo_dir: Path, tmp_path: Path, scalars: Scalars, call: Call
) -> None:
    order = [*range(1, 4), 41, *range(5, 35), 36, 42, *range(37, 41)]
    files = {path.name[2:4]: path for path in demo_dir.glob("_x*.safetensors")}
    paths = [files[f"{number:02}"] for number in order]
    assert len(paths) == 40
    hand = tmp_path / "hand.safetensors"
    merge_tree(paths, balanced(40), tmp_path, hand, bake_vae=files["25"], bake="below", scalars=scalars)
    method = {"opmath": "pairwise", "half": "pairwise_torch20"}[scalars]
    done = call(f"models.dir={demo_dir}", f"out={tmp_path}", "recipe=x39a", f"method={method}", "executor=local")
    assert done.code == 0, done.err
    assert tensors(tmp_path / "x39a.safetensors") == tensors(hand)


def test_what_a_recorded_tree_lacks_is_told_all_at_once(
    recorded: Path, demo_dir: Path, tmp_path: Path, call: Call
) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for path in demo_dir.glob("_x[0-2]*.safetensors"):
        (some / path.name).symlink_to(path)
    models = ["models=round1", f"models.dir={some}", f"out={tmp_path}"]  # not the demo, which would be completed
    done = call(*models, "recipe=webui", f"recipe.file={recorded}", "job=plan", "executor=local")
    assert done.code == 2
    assert "Traceback" not in done.err
    for missing in ("_x30-", "_x41-", "_x38-", VAE):
        assert missing in done.err


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor."""
    with safe_open(path, framework="np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {key: (str(array.dtype), array.tobytes()) for key, array in arrays.items()}
