"""What is typed, made readable for Hydra, and what Hydra says, made readable for people."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from mergeflow.config import schema
from mergeflow.config.convert import known_names
from mergeflow.errors import ConfigError
from mergeflow.recipe.ids import nearest, normal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hydra.conf import ConfigSourceInfo

_TEXTS = re.compile(
    r"(?P<name>\+{0,2}(?:out|a|b|base|file|series\.(?:base|selection|target)|objective\.(?:command|target)"
    r"|recipe\.(?:file|name)|models\.(?:dir|pattern|files\.[^=]+)|selection\.[^=.]+|target\.[^=.]+\.file))=(?P<value>.+)",
    re.DOTALL,
)
"""Options whose values are text as it stands: paths and names of files, and lists of ids."""
_ALWAYS_TEXT = "objective.command="
_PART = re.compile(
    r"(?P<above>target\.[^=.]+\.components)\.(?P<name>[^=.]+)\.(?P<field>model|selection)=(?P<value>(?!null$).+)"
)
_NUMBERED = re.compile(
    r"\+{0,2}(?P<above>models\.(?:files|composites)|selection|method\.multipliers)\.(?P<name>\d[^=.]*)=(?P<value>.+)"
)
_DOTTED = re.compile(r"\+{0,2}(?P<above>recipe\.(?:vaes|given))\.(?P<name>[^=]+)=(?P<value>.+)")
"""Options whose names have dots of their own: file names, and places in a tree such as `x39a.b`."""
_COMPONENT = re.compile(r"(?:parts\.)?(?P<name>[A-Za-z_]\w*)=(?P<value>.+)", re.DOTALL)
_NOT_TEXT = re.compile(r"""['"].*|\$\{.*|\[.*\]|null|\?\?\?""", re.DOTALL)
"""Values that are quoted already, refer to another option, are lists or nothing."""
_FILES = re.compile(r"path=file://(.*)")
_UNKNOWN_KEY = re.compile(
    r"(?:Could not override|Key) '([^']+)'(?: is not in struct| not in |\. No match in the defaults)"
)
_NULL_GROUP = re.compile(r"Config group override must be a string or a list\. Got NoneType")
_SAYINGS = (
    (re.compile(r"field '(.+)' is not Optional"), r"\1 cannot be null"),
    (
        re.compile(r"(?:Key|Value) (\S+) \(\w+\) is incompatible with (?:type hint 'str'|\(str\))"),
        r"\1 is a number to YAML; write it in quotes",
    ),
    (
        re.compile(r"Invalid type assigned: dict is not a subclass of .*"),
        "what is new is added as a whole, in braces, as in '+target={NAME: {file: ..., selection: ...}}'",
    ),
    (
        re.compile(r"invalid literal for int\(\) with base 10: '(.+)'"),
        r"there is no '\1' in a list; write the list as a whole, as in NAME=[A,B,0.3]",
    ),
    (re.compile(r"list index out of range"), "the list ends before; write it as a whole, as in NAME=[A,B,0.3]"),
    (
        re.compile(r"Ambiguous value for argument ('.*')"),
        r"\1 has several values; write [a,b] for a list, quotes around a text, or -m to run once for each",
    ),
)
"""What Hydra and OmegaConf say in their own terms, and what it means here."""


def quote_texts(arguments: Sequence[str]) -> list[str]:
    """Paths and lists as people type them: Hydra would take the commas of `selection.te0=05,11=2` for a sweep.

    It would read `1_0` as ten, too, and not read `models.pattern=_x{id}.safetensors` or `models.files.05=a` at all.
    With `-m` commas do separate alternatives, and nothing is changed but what has braces and no alternatives.
    """
    if {"-m", "--multirun"} & set(arguments):
        return [_quoted(argument) if argument.startswith(_ALWAYS_TEXT) else argument for argument in arguments]
    if "job=assemble" in arguments:
        arguments = [_as_part(argument) for argument in arguments]
    return [_in_braces(argument) or _quoted(argument) for argument in arguments]


def _as_part(argument: str) -> str:
    """`te0=FILE` beside `job=assemble`, as the config has it: components are not options, they are the arch's own."""
    part = _COMPONENT.fullmatch(argument)
    if part is None or part["name"] in known_names():
        return argument
    return f"++parts={{{part['name']}: {_text(part['value'])}}}"


def _quoted(argument: str) -> str:
    match = _TEXTS.fullmatch(argument)
    return argument if match is None else f"{match['name']}={_text(match['value'])}"


def _text(value: str) -> str:
    """`value` in quotes, if it is a text that has none."""
    if _NOT_TEXT.fullmatch(value):
        return value
    # Only backslashes before a quote have a meaning to Hydra, and the last ones stand before the closing quote.
    escaped = re.sub(r'(\\*)("|\Z)', lambda run: run[1] * 2 + (run[2] and '\\"'), value)
    return f'"{escaped}"'


def _in_braces(argument: str) -> str | None:
    """What Hydra takes only in braces: components that a target does not name yet, names with digits first or dots."""
    if part := _PART.fullmatch(argument):
        other = {"model": "selection", "selection": "model"}[part["field"]]  # which this one replaces
        return f"++{part['above']}={{{part['name']}: {{{part['field']}: {_text(part['value'])}, {other}: null}}}}"
    if entry := _NUMBERED.fullmatch(argument):
        name = entry["name"] if not entry["name"].isdigit() else f"0{entry['name']}"  # 05 is text to Hydra, 5 is not
        return f"++{entry['above']}={{{name}: {_text(entry['value'])}}}"
    if entry := _DOTTED.fullmatch(argument):
        name = re.sub(r"([\\()\[\]{}:,])", r"\\\1", entry["name"])
        return f"++{entry['above']}={{{name}: {_text(entry['value'])}}}"
    return None


def in_plain_words(error: Exception, typed: Sequence[str] = ()) -> ConfigError:
    """One or two sentences for what Hydra, OmegaConf or YAML refused, with the nearest name that exists.

    `typed` are the arguments, for where the error does not say which of them it is about.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return ConfigError(_no_such_option(error, error.missing_cfg_file))
    if isinstance(error, OverrideParseException):
        return ConfigError(_not_read(error.override))
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return ConfigError(f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}")
    deepest: BaseException = error
    while isinstance(deepest, HydraException) and (below := deepest.__cause__ or deepest.__context__):
        deepest = below
    reason = _first_line(deepest)
    unknown = _UNKNOWN_KEY.match(reason)
    key = str(getattr(deepest, "full_key", None) or (unknown[1] if unknown else ""))
    if _NULL_GROUP.match(reason):
        return ConfigError(_null_group(typed))
    if unknown:
        return ConfigError(_unknown_key(key, getattr(deepest, "parent_node", None)))
    for pattern, meaning in _SAYINGS:
        reason = pattern.sub(meaning, reason)
    return ConfigError(f"{key}: {reason}" if key and key not in reason else reason)


def _no_such_option(error: MissingConfigException, missing: str) -> str:
    group, _, option = missing.rpartition("/")
    searched = [Path(place) / group for place in _FILES.findall(str(error))]
    options = error.options or sorted({file.stem for place in searched for file in place.glob("*.yaml")})
    return f"{group or 'config'} has no option '{option}'{nearest(option, options)} (there is {', '.join(options)})"


def _not_read(override: str) -> str:
    name, equals, value = override.partition("=")
    if not equals:
        return f"'{override}' is not NAME=VALUE; see --help"
    if value.startswith(("[", "{")):
        return f"'{override}' cannot be read; check its brackets, quotes and commas"
    return f"'{override}' cannot be read; if its value is a text, put quotes around it: '{name}=\"{value}\"'"


def _null_group(typed: Iterable[str]) -> str:
    """What to say where `GROUP=null` is typed; some options may be null, but no group."""
    optional = {field.name for field in fields(schema.Config) if str(field.type).endswith("None")}
    null = [one.removesuffix("=null").lstrip("+") for one in typed if one.endswith("=null")]
    groups = [name for name in null if "." not in name and name not in optional]
    where = " and ".join(f"{name}=" for name in groups) or "a group"
    return f"null is no option of {where}; leave it out, or choose one that --help shows"


def _unknown_key(key: str, parent: object) -> str:
    """What to say of an option that does not exist; `parent` is where it would be."""
    above, _, name = key.rpartition(".")
    names = [known for known in known_names() if known.count(".") == key.count(".")]
    adding = ""
    if isinstance(parent, DictConfig):
        names = [f"{above}.{other!s}" if above else str(other) for other in parent]
        if OmegaConf.get_type(parent) is dict:
            adding = f"; +{key}=... adds it" if above == "selection" else f"; '+{above}={{{name}: ...}}' adds it"
    return f"there is no option '{key}' (--cfg job shows all{adding}){nearest(key, names)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def misread_numbers(
    sources: Iterable[ConfigSourceInfo], choices: Mapping[str, object], primary: str = "config"
) -> Iterator[ConfigError]:
    """Numbers in the chosen config files that YAML does not read as they are written.

    An id written as 010 would silently become 8, and the wrong model would be merged. Multipliers are no ids: 0.50 is
    what it says.
    """
    roots = [Path(source.path) for source in sources if source.schema == "file"]
    names = [primary, *(f"{group}/{one}" for group, choice in choices.items() for one in _each(choice))]
    for name in names:  # it grows while it is walked
        files = [file for root in roots if (file := root / f"{name}.yaml").is_file()]
        for file in files[:1]:
            document = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            yield from _misread(file, document)
            names += [other for other in _included(name, document) if other not in names]


def _included(name: str, document: yaml.Node | None) -> Iterator[str]:
    """The configs without a group of their own that the defaults list of config `name` includes."""
    for key, value in document.value if isinstance(document, yaml.MappingNode) else []:
        for item in value.value if key.value == "defaults" and isinstance(value, yaml.SequenceNode) else []:
            if isinstance(item, yaml.ScalarNode) and item.value != "_self_":
                other = item.value.partition("@")[0]
                yield other.removeprefix("/") if other.startswith("/") else f"{name.rpartition('/')[0]}/{other}"


def _misread(file: Path, document: yaml.Node | None) -> Iterator[ConfigError]:
    nodes: list[tuple[yaml.Node | None, tuple[str | int, ...]]] = [(document, ())]
    while nodes:
        node, way = nodes.pop(0)
        if isinstance(node, yaml.MappingNode):
            pairs = [((key, ()), (value, (*way, str(key.value)))) for key, value in node.value]
            nodes = [part for pair in pairs for part in pair] + nodes
        elif isinstance(node, yaml.SequenceNode):
            nodes = [(one, (*way, number)) for number, one in enumerate(node.value)] + nodes
        elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
            read = yaml.safe_load(node.value)
            what, remedy = "id", f'write "{node.value}" in quotes'
            right = str(read) == normal(node.value)
            if _is_multiplier(way):
                what, remedy = "number", "write it in decimal digits"
                right = read == _decimal(node.value)
            if not right:
                yield ConfigError(
                    f"{file.name}, line {node.start_mark.line + 1}: YAML does not read {node.value} as the {what} "
                    f"that it looks like, but as {read}; {remedy}"
                )


def _is_multiplier(way: tuple[str | int, ...]) -> bool:
    """Whether these keys lead to a number to multiply by: `multipliers: {NODE: M}`, `nodes: {NODE: [A, B, M]}`."""
    match way:
        case (*_, "multipliers", str()) | (*_, "nodes", str(), 2 | "multiplier"):
            return True
    return False


def _decimal(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _each(choice: object) -> list[object]:
    return list(choice) if isinstance(choice, list | tuple) else [choice]
