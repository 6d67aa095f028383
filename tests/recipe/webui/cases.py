"""What the tests of recorded merges share: model sets of what a `WebUI` knows, and trees that are read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.errors import MergeflowError
from mergeflow.recipe.modelset import ModelSet
from mergeflow.recipe.webui import matched, recorded
from mergeflow.recipe.webui.naming import own_id
from mergeflow.tensors import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mergeflow.recipe.tree import Tree
    from tests.recipe.webui.simulator import Checkpoint, WebUI

VAE = "sd_xl_base_1.0.vae.safetensors"


def leaf(ui: WebUI, id: str, *, hashed: bool = True, folder: str = "sdxl\\") -> Checkpoint:
    return ui.add(f"{folder}_x{id}-name{id}.safetensors", hashed=hashed)


def collection(checkpoints: Iterable[Checkpoint]) -> tuple[ModelSet, dict[str, Identity]]:
    """A model set of these files under the names that they have now, and what they are known by."""
    paths: dict[str, str] = {}
    identities: dict[str, Identity] = {}
    for checkpoint in checkpoints:
        id = (own_id(checkpoint.stem) or checkpoint.stem).removeprefix("_x")
        paths[id] = f"/m/{checkpoint.stem}.safetensors"
        identities[id] = Identity(checkpoint.file.sha256, checkpoint.file.legacy)
    return ModelSet(paths, place="/m"), identities


def rebuilt(
    file: Checkpoint,
    leaves: Iterable[Checkpoint],
    *,
    name: str = "merged",
    given: Mapping[str, str] | None = None,
    vaes: Mapping[str, str] | None = None,
    hashed: bool = True,
) -> tuple[Tree, list[str]]:
    """The tree of a merged file over these leaves, which are known by content if `hashed`, else by name."""
    models, identities = collection(leaves)
    return matched(recorded(file.file.metadata, name, given), models, identities if hashed else {}, vaes or {})


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(MergeflowError) as caught:
        act()
    return str(caught.value)


def changed(checkpoint: Checkpoint, key: str = "sd_merge_recipe", /, **fields: Any) -> dict[str, str]:
    """The metadata of a file with some fields of its recipe, or some entries, replaced."""
    metadata = dict(checkpoint.file.metadata)
    metadata[key] = json.dumps(json.loads(metadata[key]) | fields)
    return metadata
