"""The recipe in the metadata of an output, read value by value: each is checked, for anybody can write metadata."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from mergeflow.errors import ConfigError
from mergeflow.recipe.request import Integers, Keys, Missing, Nonfinite, Policies, PositionIds, Surplus
from mergeflow.text import printable
from mergeflow.text import short as as_python

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "mergeflow"
"""Where in the metadata of a file its recipe stands."""
OPTION = "recipe.file"
"""What names a file whose recipe is read, unless something else does."""


@dataclass(frozen=True)
class Source:
    """What a recipe says of the file of one checkpoint."""

    name: str
    size: int
    header: str
    sha256: str | None


class Unreadable(Exception):
    """The text is not what mergeflow writes."""


def told_by(metadata: Mapping[str, str], path: str, option: str = OPTION) -> Mapping[str, Any]:
    """The recipe in the metadata of the file at `path`; raises `ConfigError` if there is none of mergeflow.

    `option` is what the file was named by, for messages.
    """
    text = metadata.get(KEY)
    if text is None:
        other = " (it has one of a web UI: use recipe=webui)" if "sd_merge_recipe" in metadata else ""
        raise ConfigError(f"{option}={path} has no recipe of mergeflow in its metadata{other}")
    try:
        return mapping(json.loads(text))
    except (Unreadable, ValueError, RecursionError) as error:
        raise ConfigError(not_ours(path, str(error), option)) from error


def not_ours(path: str, reason: str, option: str = OPTION) -> str:
    """What is said of a recipe that is not whole."""
    return f"{option}={path}: its recipe is not as mergeflow writes it ({reason})"


def policies_of(told: Mapping[str, Any]) -> Policies:
    """The policies that a recipe tells; raises `Unreadable`, or `KeyError` for what it lacks."""
    keys, ids = mapping(told["keys"]), told["position_ids"]
    return Policies(
        missing=one_of(keys["missing"], get_args(Missing)),
        surplus=one_of(keys["surplus"], get_args(Surplus)),
        integers=one_of(keys["integers"], get_args(Integers)),
        nonfinite=one_of(told["nonfinite"], get_args(Nonfinite)),
        keys=one_of(keys["rule"], get_args(Keys)),
        position_ids=None if ids is None else one_of(ids, get_args(PositionIds)),
    )


def source_of(told: Any) -> Source:
    """One of the sources that a recipe tells; raises as `policies_of` does."""
    told = mapping(told)
    sha256 = told.get("sha256")
    hash = None if sha256 is None else text_of(sha256)
    return Source(text_of(told["name"]), number(told["size"]), text_of(told["header"]), hash)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, which is a JSON object; raises `Unreadable`, as the following do."""
    if not isinstance(value, dict):
        raise Unreadable(f"{short(value)} is no table")
    return value


def listed(value: Any) -> list[Any]:
    """The value, which is a JSON array."""
    if not isinstance(value, list):
        raise Unreadable(f"{short(value)} is no list")
    return value


def number(value: Any, *, whole: bool = True) -> Any:
    """The value, which is a finite number."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise Unreadable(f"{short(value)} is no number that belongs here")
    return value


def text_of(value: Any) -> str:
    """The value, which is a string."""
    if not isinstance(value, str):
        raise Unreadable(f"{short(value)} is no text")
    return value


def one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    """The value, which is one of `choices`."""
    if value not in choices:
        raise Unreadable(f"{short(value)} is none of {', '.join(map(str, choices))}")
    return value


def short(value: Any) -> str:
    """Any value, as it is told in a message."""
    if isinstance(value, str):
        return printable(value, 24)
    return printable(f"{value:,}" if type(value) is int else as_python(value), 24)
