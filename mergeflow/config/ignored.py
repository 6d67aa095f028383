"""What is typed beside a choice that does not honour it: an option without an effect is an error."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.config import schema
from mergeflow.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class Choice(NamedTuple):
    """A choice beside which some options have no effect."""

    where: str
    """On what they have none, and why."""
    ignored: tuple[str, ...]
    """The options, with all that is below them."""
    honoured: tuple[str, ...] = ()
    """Which of them have an effect all the same; what is below these has none."""
    remedies: Mapping[str, str] = {}
    """What to do for an option, beside leaving it out."""

    def ignores(self, name: str) -> bool:
        """Whether the option called `name` has no effect."""
        return name not in self.honoured and any(f"{name}.".startswith(f"{one}.") for one in self.ignored)


def _all_but(*honoured: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(schema.Config) if field.name not in honoured)


ASSEMBLY = Choice(
    "on job=assemble, which copies tensors as they are",
    _all_but(
        "arch", "base", "executor", "experiment", "file", "job", "objective", "out", "overwrite", "parts", "resume"
    ),
)
COMPARISON = Choice(
    "on job=compare, which reads two files as they are",
    _all_but("a", "arch", "b", "experiment", "job", "out"),
)
VERIFICATION = Choice(
    "on job=verify, which is told everything by the file",
    (*_all_but("arch", "file", "job", "models", "out", "sample", "seed"), "models.composites"),
    remedies={"experiment": ", and give models= and arch="},
)
OF_VERIFICATION = ("sample", "seed")
"""What has an effect on no other job."""
REPLAY = Choice(
    "with recipe=file, whose recipe tells it",
    ignored=(
        *("dtype", "experiment", "keys", "method", "models.composites", "nonfinite", "position_ids", "selection"),
        "target",
    ),
    honoured=("target", "target.recorded.file"),
    remedies={"experiment": ", and give models= and arch="},
)


def ignored(config: schema.Config, typed: Sequence[str], choices: Mapping[str, object]) -> Iterator[ConfigError]:
    """What has no effect of the overrides that are `typed`; `choices` are the options of all groups."""
    names = [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in typed]
    choice = _choice(config)
    if config.job is not schema.Job.verify:
        yield from (
            ConfigError(f"{name}= is for job=verify, and has no effect on another job; leave it out")
            for name in dict.fromkeys(names)
            if name in OF_VERIFICATION
        )
        names = [name for name in names if name not in OF_VERIFICATION]
    if choice is None:
        yield from _recipe_of_an_experiment(config, names, choices)
        return
    for name in names:
        if choice.ignores(name):
            yield ConfigError(f"{name} has no effect {choice.where}; leave it out{choice.remedies.get(name, '')}")


def _choice(config: schema.Config) -> Choice | None:
    if config.job is schema.Job.compare:
        return COMPARISON
    if config.job is schema.Job.assemble:
        return ASSEMBLY
    if config.job is schema.Job.verify:
        return VERIFICATION
    return REPLAY if config.recipe.kind is schema.RecipeKind.file else None


def _recipe_of_an_experiment(
    config: schema.Config, names: Sequence[str], choices: Mapping[str, object]
) -> Iterator[ConfigError]:
    """A recorded tree beside an experiment that chooses targets which are not made of it."""
    experiment, recorded = choices.get("experiment"), any(target.recorded for target in config.target.values())
    if config.recipe.kind is not None and experiment and not recorded and "target" not in names:
        yield ConfigError(
            f"recipe={choices.get('recipe')} has no effect with experiment={experiment}, which chooses the targets; "
            "leave one of the two out"
        )
