"""Nothing that is read is ever unpickled, and no file of pickles is taken for a checkpoint."""

from __future__ import annotations

import ast
import pickle
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.errors import ConfigError, FormatError
from mergeflow.formats.safetensors import Safetensors
from mergeflow.inputs import open_checkpoint
from mergeflow.recipe.modelset import model_set
from mergeflow.storage.local import LocalStore
from tests.models import toy_model, write_models
from tests.program import call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
SAFE_YAML = {
    "compose",
    "safe_load",
    "MarkedYAMLError",
    "SafeLoader",
    "Node",
    "MappingNode",
    "SequenceNode",
    "ScalarNode",
}
NUMBA = "numba/core/caching.py"
"""It keeps machine code in pickles of its own, beside the program or in the user's cache; no file leads there."""
unpickled: list[object] | None = None
"""What was, while somebody watches."""


def witness(event: str, arguments: tuple[object, ...]) -> None:
    if unpickled is None or event != "pickle.find_class":
        return
    if not any(frame.filename.endswith(NUMBA) for frame in traceback.extract_stack()):
        unpickled.append(arguments)


@pytest.fixture
def watched() -> Iterator[list[object]]:
    """An audit hook stays for as long as the process, so there is one."""
    global unpickled
    if not hasattr(sys, "_mergeflow_witness"):
        sys.addaudithook(witness)
        sys._mergeflow_witness = True  # type: ignore[attr-defined]
    unpickled = []
    yield unpickled
    unpickled = None


@pytest.mark.parametrize("path", sorted((ROOT / "mergeflow").rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_cannot_unpickle(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert not UNPICKLERS & {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in UNPICKLERS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            assert called not in ("torch.load", "np.load", "numpy.load", "builtins.eval", "builtins.exec")
            assert node.value.id != "yaml" or node.attr in SAFE_YAML
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")


def test_the_witness_sees_what_is_unpickled(watched: list[object]) -> None:
    pickle.loads(pickle.dumps(Path("a")))
    assert watched


def test_a_merge_on_this_machine_unpickles_nothing(
    watched: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = write_models(tmp_path / "models", {id: toy_model(seed) for seed, id in enumerate("abc")})
    words = ["models=folder", f"models.dir={models}", "arch=any", "selection=all", "target=single", "executor=local"]
    done = call(*words, "hashes=true")
    assert done.code == 0, done.err
    done = call(
        "arch=any", "executor=local", "recipe=file", "recipe.file=merged/merged.safetensors", "out=again", *words[:2]
    )
    assert done.code == 0, done.err
    assert call("job=compare", "a=merged/merged.safetensors", "b=again/merged.safetensors", "arch=any").code == 0
    assert watched == []


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]  # whatever unpickles it leaves a trace


@pytest.mark.parametrize("kind", ["torch.save", "torch.save of old", *map(str, range(2, 6))])
def test_a_pickle_is_refused_under_any_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    if kind.isdigit():
        path.write_bytes(pickle.dumps([Hostile()] * 40, protocol=int(kind)))
    else:
        torch.save({"a": Hostile()}, path, _use_new_zipfile_serialization=kind == "torch.save")
    found = open_checkpoint("a", str(path), LocalStore(), Safetensors())
    assert isinstance(found, FormatError)
    assert "convert it to safetensors first" in str(found)
    assert not Path("ran").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_folder_of_pickles_is_told_to_be_one(suffix: str) -> None:
    with pytest.raises(ConfigError, match="can run code when they are loaded, so convert them to safetensors first"):
        model_set([f"/m/a{suffix}"], "{id}.safetensors", {}, {}, "/m")


def test_a_part_of_a_checkpoint_in_several_files_is_told_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "model-00002-of-00003.safetensors"
    write_models(tmp_path, {path.stem: toy_model(1)})
    found = open_checkpoint("a", str(path), LocalStore(), Safetensors())
    assert isinstance(found, FormatError)
    assert "it is part 2 of a checkpoint in 3 files" in str(found)
