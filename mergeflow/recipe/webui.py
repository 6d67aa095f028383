"""Merges of merges, read from what AUTOMATIC1111's web UI writes into the files that it merges.

Metadata is hostile until read: anybody may have written it, and other tools copy parts of it. What is wrong with one
merge is kept with that merge, because it need not matter: a model that somebody else merged is usually taken as it is.
"""

from __future__ import annotations

import json
import math
import re
from reprlib import Repr
from typing import TYPE_CHECKING, Any, NamedTuple

from mergeflow.errors import ConfigError, FormatError, MergeflowError
from mergeflow.recipe.links import linked
from mergeflow.recipe.matching import matched
from mergeflow.recipe.merges import Merge, Model, Recorded
from mergeflow.recipe.naming import MAX_NAME, printable, stem
from mergeflow.recipe.tree import INPUTS, Node

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mergeflow.recipe.tree import Formula

__all__ = ["Identity", "Recorded", "matched", "recorded"]

RECIPE, MODELS, TYPE = "sd_merge_recipe", "sd_merge_models", "webui"
NO_HASH = "null"
"""The one entry of all that was merged by a web UI which was told not to hash."""

HASHES = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
FORMULAS: Mapping[str, Formula] = {
    "Weighted sum": "weighted_sum",
    "Add difference": "add_difference",
    "No interpolation": "no_interpolation",
}
UNSUPPORTED = {
    "discard_weights": "leaves out the weights whose names match {}",
    "is_inpainting": "merges an inpainting model with another kind",
    "is_instruct_pix2pix": "merges an instruct-pix2pix model with another kind",
}
"""Fields that must be empty, and what the web UI does where they are not."""
KNOWN = {"type", "interp_method", "multiplier", "save_as_half", "bake_in_vae", *HASHES, *UNSUPPORTED}
KNOWN |= {"custom_name", "config_source"}  # a name, and whose YAML file was copied: nothing about weights

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class Identity(NamedTuple):
    """What a file is known by; None where nobody has read enough of it."""

    sha256: str | None = None
    """Of the whole file, in hex."""
    legacy: str | None = None
    """The web UI's former hash: eight hex digits, of 64 KiB that start at 1 MiB."""


def recorded(metadata: Mapping[str, str], name: str = "merged", given: Mapping[str, str] | None = None) -> Recorded:
    """The merges that the file `name` tells of.

    `given` says what an input is, by the name of its merge: `{"x02a.b": "_x41"}`, with a hash, the name of an entry
    or the id of a model. Raises `FormatError` or `ConfigError` if the file itself was not merged by the web UI. What
    is wrong with a merge is raised by `matched`, which knows whether it matters.
    """
    recipe, entries = _table(metadata, RECIPE, name), _table(metadata, MODELS, name) or {}
    if recipe is None:
        raise ConfigError(
            f"'{printable(name)}' has no {RECIPE} in its metadata, so nothing tells what it was merged of; "
            "it takes a file that the web UI merged and saved with its metadata"
        )
    if recipe.get("type") != TYPE:
        raise ConfigError(
            f"'{printable(name)}' was merged by {_tool(recipe)}, and only what the web UI merged "
            f"(type '{TYPE}') can be replayed"
        )
    rows = [(_SHA256_OF_TOP, {"name": name, RECIPE: recipe})]
    ...


def _table(metadata: Mapping[str, str], key: str, name: str) -> dict[str, Any] | None:
    """What `key` holds, or None if there is no such key."""
    if key not in metadata:
        return None
    try:
        found = json.loads(metadata[key])
    except RecursionError:
        raise FormatError(f"the {key} of '{printable(name)}' is nested too deeply to be one") from None
    except ValueError as error:
        raise FormatError(f"the {key} of '{printable(name)}' is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"the {key} of '{printable(name)}' is not a table but {_SHORT.repr(found)}")
    return found
