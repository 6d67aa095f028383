"""From what Hydra composed to plain frozen objects. Below this nobody sees a `DictConfig`."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from omegaconf import OmegaConf

from mergeflow.config import schema
from mergeflow.config.executor import to_budget
from mergeflow.config.paths import absolute
from mergeflow.config.series import series_problems, to_series
from mergeflow.errors import ConfigError, MergeflowError, raise_all
from mergeflow.objective import Objective
from mergeflow.recipe.architecture import Architecture, architecture
from mergeflow.recipe.recorded import read_merges
from mergeflow.recipe.request import ModelSource, PartRequest, Policies, RecordedFile, Request, TargetRequest
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from omegaconf import DictConfig

    from mergeflow.recipe.request import Recorded
    from mergeflow.recipe.selection import Written

HONOURED: Mapping[schema.RecipeKind | None, set[str]] = {
    None: {"kind"},
    schema.RecipeKind.nodes: {"kind", "name", "nodes", "vae"},
    schema.RecipeKind.webui: {"kind", "name", "file", "check", "vae", "vaes", "given"},
    schema.RecipeKind.file: {"kind", "name", "file", "check"},
}
"""Which options of `recipe` have an effect, by its kind."""


def to_config(composed: DictConfig) -> schema.Config:
    """The composed config as the schema's objects; raises `ConfigError` for what was left unsaid."""
    missing = sorted(OmegaConf.missing_keys(composed))
    raise_all(ConfigError(f"{key} is not set; give {key}=...") for key in missing)
    config = cast("schema.Config", OmegaConf.to_object(composed))
    raise_all(
        ConfigError(f"there is no option '{name}'; an added option would have no effect") for name in _added(config)
    )
    if config.experiment is not None:
        raise ConfigError("the experiment would have no effect; its file must begin with '# @package _global_'")
    return config


def to_request(config: schema.Config) -> Request:
    """What is asked for, in plain values; all that is wrong is raised together."""
    problems: list[MergeflowError] = []
    try:
        budget = to_budget(config.executor)
    except MergeflowError as error:
        problems.append(error)
    try:
        built = to_architecture(config.arch)
    except MergeflowError as error:
        problems.append(error)
    recorded = None
    try:
        recorded = to_recorded(config.recipe)
    except MergeflowError as error:
        problems.append(error)
    if not config.models.dir and not config.models.files:
        problems.append(ConfigError("there are no models: give models.dir=DIR, or models.files"))
    if not config.models.demo and config.models.count != schema.Models.count:
        problems.append(ConfigError("models.count is the size of the demo set; with other models it has no effect"))
    problems += _without_effect(config.method)
    problems += _recipe_problems(config)
    problems += series_problems(config.series)
    if config.a or config.b:
        problems.append(ConfigError("a= and b= are for job=compare, and have no effect on another job"))
    if config.base or config.parts or config.file:
        problems.append(ConfigError("base=, parts= and file= have no effect here; they are for assemble and verify"))
    if not config.out:
        problems.append(ConfigError("out is empty; give out=DIR"))
    raise_all(problems)
    return Request(
        models=to_source(config.models),
        architecture=built,
        selections={name: _plain(name, written) for name, written in config.selection.items()},
        targets=tuple(_target(name, target) for name, target in config.target.items()),
        method=config.method.name.value,
        dtype=(config.dtype or config.arch.dtype).value,
        policies=Policies(
            missing=config.keys.missing.value,
            surplus=config.keys.surplus.value,
            integers=config.keys.integers.value,
            nonfinite=config.nonfinite.value,
            keys=config.keys.rule.value,
            position_ids=config.position_ids.value if config.position_ids else None,
        ),
        budget=budget,
        out=absolute(config.out),
        overwrite=config.overwrite,
        resume=config.resume,
        tree=to_tree_options(config.method),
        rules=Rules(config.method.arithmetic.value, config.method.scalars.value),
        recorded=recorded,
        hashes=config.hashes,
        series=to_series(config.series),
    )


def to_objective(config: schema.Config) -> Objective | None:
    """Who says how good an output is; raises `ConfigError`."""
    wanted = config.objective
    if wanted.kind is schema.ObjectiveKind.none:
        if wanted.command or wanted.target:
            raise ConfigError("objective.command and objective.target need objective=command or objective=python")
        return None
    name = "command" if wanted.kind is schema.ObjectiveKind.command else "target"
    value, other = (wanted.command, wanted.target) if name == "command" else (wanted.target, wanted.command)
    if not value or other:
        raise ConfigError(f"objective={wanted.kind.value} needs objective.{name}=..., and nothing else")
    return Objective(**{name: value})


def to_pair(config: schema.Config) -> tuple[str, str]:
    """The two files to compare, in absolute paths; raises `ConfigError`."""
    if not config.a or not config.b:
        raise ConfigError("job=compare needs two files: give a=FILE b=FILE")
    if not config.out:
        raise ConfigError("out is empty; give out=DIR")
    return absolute(config.a), absolute(config.b)


def to_recorded(recipe: schema.Recipe) -> Recorded | None:
    """The recorded tree, or where it is told; None if there is none. Raises `ConfigError`."""
    if recipe.kind is None:
        return None
    if recipe.kind is schema.RecipeKind.nodes:
        return read_merges(recipe.nodes, recipe.vae)
    if not recipe.file:
        raise ConfigError("recipe.file is not set; give recipe.file=PATH, a merged file or its metadata as .json")
    vaes = recipe.vaes | ({"*": recipe.vae} if recipe.vae else {})
    tool: Literal["webui", "mergeflow"] = "webui" if recipe.kind is schema.RecipeKind.webui else "mergeflow"
    return RecordedFile(absolute(recipe.file), tool, recipe.check, vaes, recipe.given)


def to_tree_options(method: schema.Method) -> TreeOptions:
    """How lists become trees."""
    return TreeOptions(method.shape, method.multipliers, method.save_half, method.bake.value, method.vae)


def _without_effect(method: schema.Method) -> Iterator[ConfigError]:
    """Options of trees where no tree is made."""
    if method.name is schema.MethodName.pairwise:
        return
    for name, value in vars(schema.Method()).items():
        if name != "name" and vars(method)[name] != value:
            yield ConfigError(f"method.{name} has no effect with method={method.name.value}; it is for pairwise")


def _recipe_problems(config: schema.Config) -> Iterator[ConfigError]:
    """Options of a recorded tree that this one does not honour, and a name that nobody has given."""
    kind = config.recipe.kind
    for name, value in vars(schema.Recipe()).items():
        if name not in HONOURED[kind] and vars(config.recipe)[name] != value:
            there_is = (
                f"where recipe.kind is {kind.value}"
                if kind
                else "without a recorded tree; give recipe=x39a, webui or file"
            )
            yield ConfigError(f"recipe.{name} has no effect {there_is}")
    if kind in (schema.RecipeKind.nodes, schema.RecipeKind.webui) and any(
        target.recorded and not target.file for target in config.target.values()
    ):
        yield ConfigError("recipe.name is not set; give recipe.name=NAME.safetensors, which the output is called")


def to_architecture(arch: schema.Arch) -> Architecture:
    """Which keys belong to which component; raises `ConfigError`."""
    components = {name: vars(component) for name, component in arch.components.items()}
    return architecture(arch.name, arch.dtype.value, arch.metadata, components)


def to_source(models: schema.Models) -> ModelSource:
    """Where the models are, in absolute paths: actors have another working directory."""
    return ModelSource(
        dir=absolute(models.dir) if models.dir else "",
        pattern=models.pattern,
        files={id: absolute(path) for id, path in models.files.items()},
        composites={id: tuple(members) for id, members in models.composites.items()},
    )


def _target(name: str, target: schema.Target) -> TargetRequest:
    return TargetRequest(
        name=name,
        file=target.file,
        dtype=target.dtype.value if target.dtype else None,
        selection=target.selection,
        components={label: PartRequest(part.selection, part.model) for label, part in target.components.items()},
        keys_from=target.keys_from,
        base=target.base,
        recorded=target.recorded,
    )


def _plain(name: str, written: Any) -> Written:
    if isinstance(written, str):
        return written
    if isinstance(written, dict) and all(isinstance(on, bool) for on in written.values()):
        return {str(id): on for id, on in written.items()}
    if isinstance(written, bool) or not isinstance(written, int | list):
        raise ConfigError(f"selection.{name} is {written!r}; write a text such as '05,11', a list, or {{id: true}}")
    return [written] if isinstance(written, int) else cast("list[object]", written)


def _added(node: object, prefix: str = "") -> Iterator[str]:
    """What `+name=value` has put where the schema has no such name."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _added(value, f"{prefix}{name}.")
    elif is_dataclass(node):
        known = {field.name for field in fields(node)}
        for name, value in vars(node).items():
            if name not in known:
                yield prefix + name
            else:
                yield from _added(value, f"{prefix}{name}.")


def known_names(node: object = None, prefix: str = "") -> list[str]:
    """Every dotted name that the schema knows, for suggestions."""
    names: list[str] = []
    for name, value in vars(schema.Config() if node is None else node).items():
        names.append(prefix + name)
        if is_dataclass(value):
            names += known_names(value, f"{prefix}{name}.")
    return names
