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

from mergeflow.errors import ConfigError, FormatError
from mergeflow.recipe.tree import INPUTS, Node
from mergeflow.recipe.webui.links import linked
from mergeflow.recipe.webui.merges import Merge, Model, Recorded
from mergeflow.recipe.webui.naming import MAX_NAME, stem
from mergeflow.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.recipe.tree import Formula
    from mergeflow.recipe.webui.lineage import Text
    from mergeflow.recipe.webui.links import Hashes

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

NO_VAE = (None, "", "None")

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


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
            f"(type '{TYPE}') can be replayed{'; use recipe=file' if recipe.get('type') == 'mergeflow' else ''}"
        )
    rows = [("", {"name": name, RECIPE: recipe}), *((key, entry) for key, entry in entries.items() if key != NO_HASH)]
    taken: dict[str, int] = {}
    read = [_read(key, entry if isinstance(entry, dict) else {}, taken) for key, entry in rows]
    return linked(
        [row.model for row in read],
        [row.references for row in read],
        {number: row.texts for number, row in enumerate(read)},
        ordered=NO_HASH not in entries,
        given=given or {},
    )


class _Row(NamedTuple):
    """One entry, read."""

    model: Model
    references: Hashes = ()
    texts: tuple[Text, ...] = ()


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


def _read(key: str, entry: dict[str, Any], taken: dict[str, int]) -> _Row:
    """What one entry says of its model; `taken` are the names that merges have already."""
    file, legacy, recipe = entry.get("name"), entry.get("legacy_hash"), entry.get(RECIPE)
    name = stem(file) if isinstance(file, str) else ""
    model = Model(name, _hash(key), legacy.lower() if isinstance(legacy, str) else None)
    if not recipe:
        return _Row(model, () if RECIPE in entry else frozenset())  # the web UI writes null; others write nothing
    if not isinstance(recipe, dict) or recipe.get("type") != TYPE:
        return _Row(model._replace(tool=_tool(recipe)), _mentioned(recipe))
    label = _unique(printable(name, MAX_NAME) or printable(key)[:10] or "merge", taken)
    merge, references = _merge(label, recipe)
    custom = recipe.get("custom_name")
    texts = ((custom, False), (name, False)) if custom and isinstance(custom, str) else ((name, True),)
    return _Row(model._replace(merge=merge), references, texts)


def _hash(key: str) -> str | None:
    return (key.lower() if _SHA256.fullmatch(key) else key) or None


def _tool(recipe: object) -> str:
    """What a merge was made with, for a message."""
    found = recipe.get("type") if isinstance(recipe, dict) else None
    return f"'{printable(found)}'" if found and isinstance(found, str) else "an unknown tool"


def _mentioned(recipe: object) -> frozenset[str]:
    """All in the recipe of another tool that may be the hash of a model."""
    values = recipe.values() if isinstance(recipe, dict) else ()
    return frozenset(value.lower() for value in values if isinstance(value, str))


def _unique(name: str, taken: dict[str, int]) -> str:
    made = name
    while made in taken:
        taken[name] += 1
        made = f"{name}-{taken[name]}"
    taken[made] = 1
    return made


def _merge(name: str, recipe: dict[str, Any]) -> tuple[Merge, Hashes]:
    """A merge without its inputs, and their hashes; where nobody can say how many it has, it is as another tool's."""
    method, half, vae = recipe.get("interp_method"), recipe.get("save_as_half"), recipe.get("bake_in_vae")
    formula = FORMULAS.get(method) if isinstance(method, str) else None
    multiplier = _finite(recipe.get("multiplier"))
    unknown = [field for field in recipe if field not in KNOWN]
    wrong = [does.format(_SHORT.repr(recipe[field])) for field, does in UNSUPPORTED.items() if recipe.get(field)]
    wrong += [
        f"has the unknown field {_SHORT.repr(field)}: {_SHORT.repr(recipe[field])}"
        for field in unknown
        if recipe[field]
    ]
    if formula is None:
        wrong.append(f"has the method {_SHORT.repr(method)}, which is none of {', '.join(map(repr, FORMULAS))}")
    if multiplier is None:
        wrong.append(f"has the multiplier {_SHORT.repr(recipe.get('multiplier'))}, which is no finite number")
    if not isinstance(half, bool):
        wrong.append(f"has save_as_half {_SHORT.repr(half)}, which is neither true nor false")
    if vae is not None and not isinstance(vae, str):
        wrong.append(f"bakes in {_SHORT.repr(vae)}, which is no name of a VAE")
        vae = None
    hashes = [recipe.get(field) or None for field in HASHES]
    wrong += [f"has the hash {_SHORT.repr(hash)}" for hash in hashes if hash is not None and not isinstance(hash, str)]
    used = INPUTS[formula] if formula else 0
    node = Node(name, (), multiplier or 0.0, formula or "weighted_sum", half is True, None if vae in NO_VAE else vae)
    merge = Merge(
        node,
        problems=tuple(FormatError(f"'{name}' {what}; mergeflow cannot replay that") for what in wrong),
        notes=tuple(
            f"'{name}' records more models than its method uses" for _ in filter(None, hashes[used:] if formula else ())
        ),
        unknown=tuple(printable(field) for field in unknown if not recipe[field]),
    )
    references = tuple(_hash(hash) if isinstance(hash, str) else None for hash in hashes[:used])
    return merge, references if formula else _mentioned(recipe)


def _finite(value: object) -> float | None:
    """The number that `value` is; JSON of Python may hold NaN, and integers that no float can."""
    try:
        found = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
