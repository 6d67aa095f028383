"""Which tensor keys belong to which component: an architecture, built from a short description of it.

A description names keys by patterns, because SDXL has 2,515 of them and a hundred will do:
`{a,b}` and `{0..11}` stand for each in turn, nested if need be, as in a shell. Where keys that are already known are
picked out of a component (`optional`, `integers`), `*` stands for any text. A component whose only tensor
is `*` is open: it takes every key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from mergeflow.errors import ConfigError, raise_all
from mergeflow.tensors import OUTPUT_DTYPES
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

ANY = "*"
WIDTH = 32
"""What a dimension must be divisible by to be scaled: layer widths are, kernel sizes and counts of tokens are not."""

_RANGE = re.compile(r"(0|[1-9]\d*)\.\.(0|[1-9]\d*)")


@dataclass(frozen=True)
class KeySpec:
    """What is known of one tensor before any file is read."""

    shape: tuple[int, ...] | None
    """None where any shape will do."""
    optional: bool = False
    """Whether a checkpoint may lack it."""
    integer: bool = False
    """Whether it holds whole numbers, which are copied when all sources agree by value and never averaged."""
    marker: bool = False
    """Whether its presence says what kind of model this is; all sources must have it, or none."""


@dataclass(frozen=True)
class Component:
    """A part of a model that is selected as a whole."""

    name: str
    keys: Mapping[str, KeySpec] = field(repr=False)
    open: bool = False
    """Whether it takes every key; `keys` holds its markers then."""


@dataclass(frozen=True)
class Architecture:
    """The components of a kind of model; every key belongs to one of them, or to none."""

    name: str
    dtype: str
    """A key of `OUTPUT_DTYPES`: what an output is written in, unless it is asked otherwise."""
    metadata: Mapping[str, str]
    """What the header of every output says."""
    components: Mapping[str, Component]

    @cached_property
    def usual_keys(self) -> Mapping[str, KeySpec]:
        """Every key but the markers: what a complete checkpoint of this kind has."""
        every = (item for component in self.components.values() for item in component.keys.items())
        return {key: spec for key, spec in every if not spec.marker}

    def component_of(self, key: str) -> str | None:
        """The name of the component that `key` belongs to, or None for a surplus key."""
        return self._owners.get(key, self._open)

    def scaled(self, divisor: int) -> Architecture:
        """The same architecture with every layer's width divided by `divisor`: a small model with all the keys.

        The divisor is a power of two up to 32, so that every width stays a whole number.
        """
        if divisor not in (1, 2, 4, 8, 16, 32):
            raise ConfigError(f"an architecture can be divided by 1, 2, 4, 8, 16 or 32, not by {divisor}")
        shrunk = {
            component.name: replace(
                component,
                keys={key: replace(spec, shape=scaled(spec.shape, divisor)) for key, spec in component.keys.items()},
            )
            for component in self.components.values()
        }
        return replace(self, components=shrunk)

    @cached_property
    def _owners(self) -> Mapping[str, str]:
        return {key: component.name for component in self.components.values() for key in component.keys}

    @cached_property
    def _open(self) -> str | None:
        return next((component.name for component in self.components.values() if component.open), None)


def scaled(shape: tuple[int, ...] | None, divisor: int) -> tuple[int, ...] | None:
    """`shape` with every dimension that is a width divided: `scaled((1280, 77), 32) == (40, 77)`."""
    return shape and tuple(size if size % WIDTH else size // divisor for size in shape)


def architecture(
    name: str, dtype: str, metadata: Mapping[str, str], components: Mapping[str, Mapping[str, Any]]
) -> Architecture:
    """Build an architecture from plain mappings and lists, as `conf/arch/` has them.

    Each component has some of `prefix` (what every name below starts with, markers excepted), `tensors` (pattern to
    shape, null for any), `layers` (pattern to the shape of a weight, which has a bias as long as its first dimension),
    `integers` and `optional` (patterns of those keys that are) and `markers` (name to shape).
    All that is wrong is raised together.
    """
    problems: list[ConfigError] = []
    built = {}
    for label, description in components.items():
        builder = _Builder(f"arch '{name}', component '{label}'", problems)
        built[label] = builder.build(label, **description)
    problems += _contradictions(name, dtype, built)
    raise_all(problems)
    return Architecture(name, dtype, dict(metadata), built)


def _contradictions(name: str, dtype: str, components: Mapping[str, Component]) -> Iterator[ConfigError]:
    """What is wrong with the whole, though every part may be right."""
    if dtype not in OUTPUT_DTYPES:
        yield ConfigError(f"arch '{name}' has the unknown dtype '{dtype}'; use one of {', '.join(OUTPUT_DTYPES)}")
    if not components:
        yield ConfigError(f"arch '{name}' has no component; describe at least one")
    wide = [component.name for component in components.values() if component.open]
    if wide and len(components) > 1:
        yield ConfigError(
            f"arch '{name}': component '{wide[0]}' takes every key ('{ANY}'), which leaves none for the other "
            f"{len(components) - 1}; make it the only one, or name its keys"
        )
    first: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for component in components.values():
        for key in component.keys:
            owner = first.setdefault(key, component.name)
            if owner != component.name:
                shared.setdefault((owner, component.name), []).append(key)
    for (one, other), keys in shared.items():
        yield ConfigError(f"arch '{name}': '{one}' and '{other}' both have {some(keys)}; give each key to one of them")


@dataclass
class _Builder:
    """One component while it is being built."""

    where: str
    problems: list[ConfigError]
    keys: dict[str, KeySpec] = field(default_factory=dict)

    def build(
        self,
        name: str,
        prefix: str = "",
        tensors: Mapping[str, Sequence[int] | None] | None = None,
        layers: Mapping[str, Sequence[int]] | None = None,
        integers: Sequence[str] = (),
        optional: Sequence[str] = (),
        markers: Mapping[str, Sequence[int]] | None = None,
    ) -> Component:
        tensors, layers, markers = tensors or {}, layers or {}, markers or {}
        is_open = ANY in tensors
        if is_open and (len(tensors) > 1 or prefix or layers):
            self._problem(f"'{ANY}' takes every key, so nothing but markers may stand beside it")
        if not (tensors or layers):
            self._problem(f"it has neither tensors nor layers; name some, or give it '{ANY}'")
        for pattern, shape in tensors.items():
            if pattern != ANY:
                self._add(prefix + pattern, shape)
        for pattern, shape in layers.items():
            self._add(f"{prefix}{pattern}.weight", shape)
            self._add(f"{prefix}{pattern}.bias", shape[:1])
        for key in self._picked(prefix, integers, "integers"):
            self.keys[key] = replace(self.keys[key], integer=True)
        for key in self._picked(prefix, optional, "optional"):
            self.keys[key] = replace(self.keys[key], optional=True)
        for key, shape in markers.items():
            self._add(key, shape, optional=True, marker=True)
        return Component(name, self.keys, is_open)

    def _add(self, pattern: str, shape: Sequence[int] | None, **traits: bool) -> None:
        if ANY in pattern:
            self._problem(f"'{pattern}' says '{ANY}', which only an open component may, as its whole name")
        if shape is not None and any(size < 0 for size in shape):
            self._problem(f"'{pattern}' has the impossible shape {list(shape)}")
        keys = self._expanded(pattern)
        twice = [key for key in keys if key in self.keys] or sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            self._problem(f"'{pattern}' describes {some(twice)} once more; describe every tensor once")
        self.keys.update(dict.fromkeys(keys, KeySpec(None if shape is None else tuple(shape), **traits)))

    def _picked(self, prefix: str, patterns: Iterable[str], trait: str) -> Iterator[str]:
        for pattern in patterns:
            for name in self._expanded(prefix + pattern):
                wanted = re.compile(".*".join(map(re.escape, name.split(ANY))))
                found = [key for key in self.keys if wanted.fullmatch(key)]
                if not found:
                    self._problem(f"'{name}' in {trait} matches none of its {len(self.keys):,} tensors; check the name")
                yield from found

    def _expanded(self, pattern: str) -> list[str]:
        try:
            return expand(pattern)
        except ConfigError as error:
            self._problem(str(error))
            return []

    def _problem(self, what: str) -> None:
        self.problems.append(ConfigError(f"{self.where}: {what}"))


def expand(pattern: str) -> list[str]:
    """Every text that `pattern` stands for, in order.

    >>> expand("layer.{0..2}.{weight,bias}")  # doctest: +ELLIPSIS
    ['layer.0.weight', 'layer.0.bias', 'layer.1.weight', ..., 'layer.2.bias']
    """
    parts: list[list[str]] = []
    rest = pattern
    while rest:
        head, brace, tail = rest.partition("{")
        if "}" in head:
            raise ConfigError(f"the pattern '{pattern}' closes a brace that it never opened")
        parts.append([head])
        rest = ""
        if brace:
            end = _closing(pattern, tail)
            parts.append(_alternatives(pattern, tail[:end]))
            rest = tail[end + 1 :]
    return ["".join(chosen) for chosen in product(*parts)]


def _closing(pattern: str, text: str) -> int:
    """Where the brace closes that was opened just before `text`."""
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return position
    raise ConfigError(f"the pattern '{pattern}' opens a brace that it never closes")


def _alternatives(pattern: str, body: str) -> list[str]:
    """What the inside of one pair of braces stands for."""
    if found := _RANGE.fullmatch(body):
        low, high = int(found[1]), int(found[2])
        if low >= high:
            raise ConfigError(f"the pattern '{pattern}' has the range {{{body}}}, which does not rise")
        return [str(number) for number in range(low, high + 1)]
    options = [""]
    depth = 0
    for letter in body:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            options.append("")
        else:
            options[-1] += letter
    if len(options) < 2 or any(not option or (".." in option and "{" not in option) for option in options):
        raise ConfigError(f"the pattern '{pattern}' has {{{body}}}, which is neither {{a,b}} nor {{0..9}}")
    return [text for option in options for text in expand(option)]
