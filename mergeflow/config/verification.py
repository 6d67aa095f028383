"""The verification that is typed, in plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeflow.config.convert import to_architecture, to_source
from mergeflow.config.paths import absolute
from mergeflow.errors import ConfigError, MergeflowError, raise_all
from mergeflow.recipe.verification import VerificationRequest

if TYPE_CHECKING:
    from mergeflow.config import schema

ALL = "all"


def to_verification(config: schema.Config) -> VerificationRequest:
    """What is asked for, in absolute paths; raises `ConfigError` for what was left unsaid."""
    problems: list[MergeflowError] = []
    if not config.file:
        problems.append(ConfigError("job=verify needs an output to look at: give file=FILE"))
    if not config.out:
        problems.append(ConfigError("out is empty; give out=DIR"))
    if not config.models.dir and not config.models.files:
        problems.append(ConfigError("there are no models: give models.dir=DIR, or models.files"))
    if not config.models.demo and config.models.count != type(config.models).count:
        problems.append(ConfigError("models.count is the size of the demo set; with other models it has no effect"))
    if not _is_a_sample(config.sample):
        problems.append(ConfigError(f"sample={config.sample} is no number of tiles; write 1000, or all"))
    raise_all(problems)
    return VerificationRequest(
        path=absolute(config.file or ""),
        models=to_source(config.models),
        architecture=to_architecture(config.arch),
        out=absolute(config.out),
        sample=None if config.sample == ALL else config.sample,
        seed=config.seed,
    )


def _is_a_sample(value: Any) -> bool:
    return value == ALL or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
