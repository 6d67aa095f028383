"""What a config may not do by itself: run code.

A config can come with a downloaded model. It says what is merged and where outputs go, and that is looked at with
job=plan; but programs, functions, classes, clusters and variables of the environment count only where they are typed,
come with mergeflow, or are in the list that the user keeps in the environment.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.instantiate import _instantiate2
from hydra._internal.logging_config import HydraDictConfigurator
from hydra.core.plugins import Plugins

from mergeflow.errors import ConfigError
from mergeflow.redaction import redacted
from mergeflow.text import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TARGETS = "MERGEFLOW_TARGETS"
"""The variable with the user's list: full names, or beginnings that end with a dot, with commas between them."""
KNOWN_TARGETS = re.compile(r"optuna\.samplers\.[A-Z]\w*")
"""What the sweeper for Optuna is told by name; beside the plugins that are installed."""
KNOWN_LOGGING = re.compile(
    r"mergeflow\.report\.console\.LogHandler|logging\.(StreamHandler|NullHandler|Formatter)|sys\.std(out|err)"
)
"""What a log is made of; a handler for files would write any file."""
HARMLESS_ADDRESSES = (None, "local", "auto")
"""A Ray of one's own, and the one that runs on this machine."""
SHIPPED_FUNCTIONS = ("mergeflow.demo.score.distance",)


def guard() -> None:
    """From now on Hydra makes nothing that is not known: callbacks, samplers, handlers of logs."""
    if not hasattr(_instantiate2._resolve_target, "guarded"):
        _instantiate2._resolve_target = _guarded(_instantiate2._resolve_target)
        HydraDictConfigurator.resolve = _guarded_logging(HydraDictConfigurator.resolve)  # type: ignore[method-assign]


def unasked(config: Any, hydra: Any, conf: Path) -> Iterator[ConfigError]:
    """What configs other than mergeflow's own, in `conf`, ask for that only a person may; the rest is theirs to say."""
    foreign = [
        source.path
        for source in hydra.runtime.config_sources
        if source.schema == "file" and Path(source.path).resolve() != conf.resolve()
    ]
    if not foreign:
        return
    asked = {
        "objective.command": config.objective.command,
        "objective.target": config.objective.target if config.objective.target not in SHIPPED_FUNCTIONS else None,
        "executor.address": config.executor.address if config.executor.address not in HARMLESS_ADDRESSES else None,
        "hydra.job.env_set": dict(hydra.job.env_set) or None,
    }
    for name, value in asked.items():
        if value is not None and not _typed(name):
            yield ConfigError(
                f"{name} is set by a config in {shown(' or '.join(foreign))}, and what runs code must be typed: "
                f"if you trust it, add {name}=... to the command"
            )


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise where Hydra would write a secret of the command into a file: in a sweep, and where it is asked to."""
    kept = {"-m", "--multirun"} & set(arguments) or any("hydra.output_subdir=" in one for one in arguments)
    if kept and (found := [redacted(one) for one in arguments if redacted(one) != one]):
        raise ConfigError(
            f"{shown(found[0])} holds a secret, and Hydra keeps in files what a sweep was told; put it into a variable "
            "of the environment and write '${oc.env:NAME}' in its place"
        )


def refusal_within(error: BaseException) -> ConfigError | None:
    """The refusal that `error` came of, if it did: logging says only which handler it could not make."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _typed(name: str) -> bool:
    """Whether an option, or what it is part of, stands in the command itself."""
    typed = [argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:] if "=" in argument]
    return any(name == one or name.startswith(f"{one}.") or one.startswith(f"{name}.") for one in typed if "." in one)


def _is_plugin(name: str) -> bool:
    """Whether it is a sweeper or a launcher of Hydra's, of mergeflow's or of a package that the user has installed."""
    return name in Plugins.instance().class_name_to_class


def _asked(name: str) -> bool:
    """Whether the user's list has it, or the command itself names it."""
    typed = [argument.partition("=")[2] for argument in sys.argv[1:]]
    if any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", value) for value in typed):
        return True
    listed = [one.strip() for one in os.environ.get(TARGETS, "").split(",") if one.strip()]
    return any(name == one or (one.endswith(".") and name.startswith(one)) for one in listed)


def _guarded(resolve: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(target: Any, full_key: str) -> Any:
        if isinstance(target, str) and not (KNOWN_TARGETS.fullmatch(target) or _is_plugin(target) or _asked(target)):
            raise ConfigError(_refusal(target))
        return resolve(target, full_key)

    guarded.guarded = True  # type: ignore[attr-defined]  # it is put in place once
    return guarded


def _guarded_logging(resolve: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: Any, name: str) -> Any:
        if not (KNOWN_LOGGING.fullmatch(name) or _asked(name)):
            raise ConfigError(_refusal(name))
        return resolve(self, name)

    return guarded


def _refusal(name: str) -> str:
    return (
        f"a config wants Python's {shown(name)} to be called, which is not part of mergeflow; if you trust it, add it "
        f"to the list in {TARGETS}: {TARGETS}={shown(name)}"
    )
