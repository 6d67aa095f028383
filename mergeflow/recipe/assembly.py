"""A checkpoint put together of parts: what was asked for, and what is wrong with that whatever the files hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError
from mergeflow.recipe.ids import nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.request import Budget


@dataclass(frozen=True)
class Assembly:
    """Everything that was asked for."""

    base: str
    """The file of everything that is not in a part; absolute, as the others are."""
    parts: Mapping[str, str]
    """The file of every component that is replaced, by its name."""
    architecture: Architecture
    file: str
    """What the result is called."""
    out: str
    """Its directory."""
    budget: Budget
    overwrite: bool = False
    resume: bool = False
    """Whether what an earlier run has left of the outputs is taken up."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that is read, the base first."""
        return tuple(dict.fromkeys((self.base, *self.parts.values())))

    @property
    def ids(self) -> Mapping[str, str]:
        """What every file is called in messages: its name, or its path where two have that name."""
        names = {path: path.rpartition("/")[2] for path in self.paths}
        times = Counter(names.values())
        return {path: name if times[name] == 1 else path for path, name in names.items()}

    def problems(self) -> Iterator[ConfigError]:
        """What is wrong with it."""
        known = self.architecture.components
        if not self.parts:
            example = next(iter(known), "NAME")
            yield ConfigError(f"job=assemble has nothing to put into the base; give {example}=FILE")
        for component, path in self.parts.items():
            if component not in known:
                yield ConfigError(
                    f"{component}={path} names the component '{component}', which arch '{self.architecture.name}' does "
                    f"not have{nearest(component, known)} (it has {', '.join(known)})"
                )
            elif path == self.base:
                yield ConfigError(f"{component}={path} is the base itself, so it would change nothing; leave it out")
        if "/" in self.file or not self.file.endswith(".safetensors"):
            yield ConfigError(f"file={self.file or 'nothing'}; give a name ending in .safetensors, and out=DIR")
