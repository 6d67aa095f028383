"""The assembly that is typed, in plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.config.convert import to_architecture
from mergeflow.config.executor import to_budget
from mergeflow.config.paths import absolute
from mergeflow.errors import ConfigError, MergeflowError, raise_all
from mergeflow.recipe.assembly import Assembly

if TYPE_CHECKING:
    from mergeflow.config import schema


def to_assembly(config: schema.Config) -> Assembly:
    """What is asked for, in absolute paths; raises `ConfigError` for what was left unsaid."""
    problems: list[MergeflowError] = []
    if not config.base:
        problems.append(ConfigError("job=assemble needs a base: give base=FILE, and te0=FILE and so on"))
    if not config.file:
        problems.append(ConfigError("file is not set; give file=NAME.safetensors, which the result is called"))
    if not config.out:
        problems.append(ConfigError("out is empty; give out=DIR"))
    problems += [ConfigError(f"{name}= names no file") for name, path in config.parts.items() if not path]
    try:
        budget = to_budget(config.executor)
    except MergeflowError as error:
        problems.append(error)
    raise_all(problems)
    return Assembly(
        base=absolute(config.base or ""),
        parts={name: absolute(path) for name, path in config.parts.items()},
        architecture=to_architecture(config.arch),
        file=config.file or "",
        out=absolute(config.out),
        budget=budget,
        overwrite=config.overwrite,
        resume=config.resume,
    )
