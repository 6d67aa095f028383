"""What is typed, made readable for Hydra, and what Hydra says, made readable for people."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from mergeflow.config.convert import known_names
from mergeflow.errors import ConfigError
from mergeflow.recipe.ids import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hydra.conf import ConfigSourceInfo

_SELECTION = re.compile(r"(?P<name>\+{0,2}selection\.[^=]+)=(?P<value>.*)", re.DOTALL)
_QUOTED = ("'", '"', "[", "$")
_MISREAD = re.compile(r"0[0-9_]+|.*[:_].*")
"""Plain numbers that YAML reads otherwise than people do: 010 is 8 to it, 1_0 is 10 and 12:30 is 750."""
_UNKNOWN_KEY = re.compile(
    r"(?:Could not override|Key) '([^']+)'(?: is not in struct| not in |\. No match in the defaults)"
)


def quote_selections(arguments: Sequence[str]) -> list[str]:
    """Lists as people type them: Hydra would take the commas of `selection.te0=05,11=2` for a sweep.

    With `-m` commas do separate alternatives, and nothing is changed.
    """
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    match = _SELECTION.fullmatch(argument)
    if match is None or match["value"].startswith(_QUOTED) or ("," not in match["value"] and "=" not in match["value"]):
        return argument
    escaped = match["value"].replace("\\", "\\\\").replace('"', '\\"')
    return f'{match["name"]}="{escaped}"'


def in_plain_words(error: HydraException | OmegaConfBaseException) -> ConfigError:
    """One or two sentences for what Hydra or OmegaConf refused, with the nearest name that exists."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [name for name in error.options or [] if name != "schema"]
        return ConfigError(
            f"{group or 'config'} has no option '{option}'{nearest(option, options)} (there is {', '.join(options)})"
        )
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"'{error.override}' cannot be read: {_first_line(error)}; quote what contains , = [ or a space"
        )
    deepest: BaseException = error
    while isinstance(deepest.__cause__, HydraException | OmegaConfBaseException):
        deepest = deepest.__cause__
    reason = _first_line(deepest)
    unknown = _UNKNOWN_KEY.match(reason)
    key = str(getattr(deepest, "full_key", None) or (unknown[1] if unknown else ""))
    if unknown:
        kind, parent = getattr(deepest, "object_type", None), key.rpartition(".")[0]
        if parent and is_dataclass(kind):
            names = [f"{parent}.{field.name}" for field in fields(kind)]
        else:
            names = [name for name in known_names() if name.count(".") == key.count(".")]
        return ConfigError(f"there is no option '{key}' (--cfg job shows all){nearest(key, names)}")
    return ConfigError(f"{key}: {reason}" if key and key not in reason else reason)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def misread_numbers(sources: Iterable[ConfigSourceInfo], choices: Mapping[str, object]) -> Iterator[ConfigError]:
    """Numbers in the chosen config files that YAML does not read as they are written.

    An id written as 010 would silently become 8, and the wrong model would be merged.
    """
    names = ["config", *(f"{group}/{one}" for group, choice in choices.items() for one in _each(choice))]
    for source in sources:
        root = urlparse(source.path)
        if root.scheme not in ("", "file") or source.provider in ("hydra", "schema"):
            continue
        for name in names:
            file = Path(root.path) / f"{name}.yaml"
            if file.is_file():
                yield from _misread(file)


def _misread(file: Path) -> Iterator[ConfigError]:
    nodes: list[yaml.Node | None] = [yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and _MISREAD.fullmatch(node.value):
            line = node.start_mark.line + 1
            yield ConfigError(
                f"{file.name}, line {line}: YAML does not read {node.value} as the id that it looks like; "
                f'write "{node.value}" in quotes'
            )


def _each(choice: object) -> list[object]:
    return list(choice) if isinstance(choice, list | tuple) else [choice]
