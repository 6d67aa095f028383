"""What an output says about itself: enough to make it again, and nothing about the machine or the moment.

The same recipe gives the same bytes: no path, no time stamp, no host. All values are text, as the format demands.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from fractions import Fraction

    from mergeflow.plan.sources import Wanted
    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.request import Part, Recipe, Target
    from mergeflow.recipe.tree import Tree
    from mergeflow.tensors import Checkpoint

MARGIN = 50
"""Levels of lists and tables, and calls, that are around a source's recipe when it is written."""
V_PREDICTION = "v_pred"


def metadata(
    target: Target, recipe: Recipe, wanted: list[Wanted], checkpoints: Mapping[str, tuple[int, Checkpoint]]
) -> dict[str, str]:
    """The metadata of one output: ModelSpec, the convention of web UIs, and the whole recipe."""
    made = {"format": "pt"}
    title = target.file.removesuffix(".safetensors")
    sources = {id: checkpoints[id][1] for id in target.checkpoints()}
    names = {id: one.name for id, one in sources.items()}
    if recipe.architecture.metadata:
        made.update(recipe.architecture.metadata)
        made["modelspec.title"] = title
        made["modelspec.merged_from"] = ", ".join(names[id].removesuffix(".safetensors") for id in target.merged())
        predicts_v = any(tensor.key == V_PREDICTION for tensor in wanted)
        made["modelspec.prediction_type"] = "v" if predicts_v else "epsilon"
    described = describe(target, recipe) | {"sources": {id: _source(one) for id, one in sources.items()}}
    made["sd_merge_recipe"] = as_json({"type": "mergeflow", "custom_name": title, **described})
    lineage = {one.identity.sha256 or id: _lineage(names[id], one) for id, one in sources.items()}
    made["sd_merge_models"] = as_json(lineage)
    # A web UI that copies metadata parses every value that starts with a brace and then cannot save it again
    # (webui #10460); JSON may start with a space, and then it stays text.
    made["mergeflow"] = " " + as_json(described)
    return {key: writable(value) for key, value in made.items()}


def describe(target: Target, recipe: Recipe) -> dict[str, Any]:
    """The recipe of one target as plain data: what it is made of, by which shares and under which policies."""
    policies = recipe.policies
    return {
        "mergeflow": recipe.version,
        "file": target.file,
        "architecture": recipe.architecture.name,
        "dtype": target.dtype,
        "keys": {
            "rule": policies.keys,
            "missing": policies.missing,
            "surplus": policies.surplus,
            "integers": policies.integers,
            "from": target.keys_from,
            "base": target.base,
        },
        "position_ids": policies.position_ids,
        "nonfinite": policies.nonfinite,
        "components": {
            part.component: {
                "method": part.method,
                "list": list(part.entries),
                "shares": {id: share_in_text(share) for id, share in part.shares.items()},
                **_by_tree(part),
            }
            for part in target.parts
        },
        "trees": {_tree_name(part.tree): _tree(part.tree) for part in target.parts if part.tree is not None},
        "composites": _composites([entry for part in target.parts for entry in part.entries], recipe.models),
    }


def share_in_text(share: Fraction, longest: int = 10**18) -> str:
    """A share as a fraction, or as a decimal if that has terms from `longest` on.

    Multipliers with many decimals, one upon the other, give fractions of thousands of digits.
    """
    if max(abs(share.numerator), share.denominator) < longest:
        return str(share)
    return f"{Decimal(share.numerator) / share.denominator:.6g}"


def _by_tree(part: Part) -> dict[str, Any]:
    """What a part says of its tree."""
    if part.tree is None or part.rules is None:
        return {}
    return {"tree": _tree_name(part.tree), **part.rules._asdict()}


def _tree_name(tree: Tree) -> str:
    return tree.name(tree.top)


def _tree(tree: Tree) -> dict[str, Any]:
    """A tree as plain data: nodes as [name, places of what it merges, multiplier, formula, as half, VAE]."""
    return {"leaves": list(tree.leaves), "nodes": [list(node) for node in tree.nodes]}


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells the file of a source from another under its name, as far as it has been read."""
    told = {"name": checkpoint.name, "size": checkpoint.stat.size, "header": checkpoint.header.digest}
    sha256 = checkpoint.identity.sha256
    return told if sha256 is None else told | {"sha256": sha256}


def _composites(entries: list[str], models: ModelSet) -> dict[str, list[str]]:
    """The members of every composite that `entries` lead to, directly or through another."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        id = models.find(entry)
        if id in models.composites and id not in found:
            found[id] = list(models.composites[id])
            found |= _composites(found[id], models)
    return found


def _lineage(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """One entry of `sd_merge_models`. The web UI keys them by the hash of the file, if that is known."""
    recipe = _parsed(checkpoint.header.metadata)
    return {"name": name, "legacy_hash": checkpoint.identity.legacy, "sd_merge_recipe": recipe}


def _parsed(source: Mapping[str, str]) -> Any:
    """The recipe that a source tells of itself, or None: sources come from anywhere, and say anything."""
    try:
        found = json.loads(source.get("sd_merge_recipe", "null"))
        as_json(_within(found, MARGIN))
    except (ValueError, RecursionError):
        return None
    return found


def _within(value: object, levels: int) -> object:
    """What is nested so deeply that Python just writes it cannot be written within something else."""
    for _ in range(levels):
        value = [value]
    return value


def as_json(value: object) -> str:
    """Plain data as text, in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def writable(text: str) -> str:
    """File names need not be text; what UTF-8 cannot write becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
