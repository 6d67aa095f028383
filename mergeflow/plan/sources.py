"""Settling what a target's tensors are made of: the models of a list, and what came up on the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.recipe.architecture import KeySpec
from mergeflow.text import shown, some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeflow.interfaces import Step
    from mergeflow.tensors import Dtype, TensorInfo

AGREE = "agree"
"""The method of tensors that are copied once all sources have been seen to hold the same values."""
WHOLE = "whole"
"""The same after rounding to whole numbers, which repairs what merging has bent."""
POSITION_IDS = "position_ids"
"""How the keys of tensors end that number the places of a text."""
PLAIN = KeySpec(shape=None, optional=False, integer=False, marker=False)
"""What is known of a key that no architecture describes."""


class Wanted(NamedTuple):
    """One tensor of one output, before it has an address."""

    key: str
    component: str
    shape: tuple[int, ...]
    dtype: Dtype
    method: str
    sources: tuple[int, ...]
    """Indices of the checkpoints, in the order of the target's list."""
    infos: tuple[TensorInfo, ...]
    """Where the tensor lies in each of `sources`."""
    shares: tuple[int, ...]
    """The share of each of `sources`, over the sum of all: the smallest such integers. A tree has none."""
    steps: tuple[Step, ...] = ()
    """How a tree makes it."""


class Case(NamedTuple):
    """One key of one part, while it is being settled."""

    key: str
    component: str
    spec: KeySpec


class Models(NamedTuple):
    """Models of one list, in its order. Parallel tuples, because hundreds are looked at for thousands of keys."""

    ids: tuple[str, ...]
    sources: tuple[int, ...]
    headers: tuple[Mapping[str, TensorInfo], ...]
    shares: tuple[int, ...]
    """In proportion; what they sum to does not matter."""

    def where(self, chosen: Sequence[bool]) -> Models:
        """Those that are `chosen`."""
        return Models._make(tuple(compress(column, chosen)) for column in self)

    def adding(self, id: str, source: int, header: Mapping[str, TensorInfo], share: int) -> Models:
        """The same models, of which `id` has so much more share; it comes last if it was not among them."""
        if id not in self.ids:
            return Models((*self.ids, id), (*self.sources, source), (*self.headers, header), (*self.shares, share))
        return self._replace(
            shares=tuple(old + share * (id == one) for one, old in zip(self.ids, self.shares, strict=True))
        )


class Findings:
    """What came up while a target was being settled, gathered so that it is said once, not once per key."""

    def __init__(self) -> None:
        self._lacking: dict[tuple[str, str, str, bool], list[str]] = defaultdict(list)
        self._odd_shapes: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._refused: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        self.problems: list[str] = []
        self.notes: list[str] = []

    def lacking(self, models: Models, case: Case, consequence: str, *, fatal: bool) -> None:
        """None of `models` has the key; `consequence` is what follows, or what to do if that is `fatal`."""
        for id in models.ids:
            self._lacking[id, case.component, consequence, fatal].append(case.key)

    def differs(self, model: str, case: Case, how: str) -> None:
        """`model` has a tensor of another shape than most."""
        self._odd_shapes[model, case.component].append(how)

    def refused(self, model: str, case: Case, why: str) -> None:
        """`model` stores a tensor in a way that forbids the merge."""
        self._refused[model, case.component, why].append(case.key)

    def add(self, other: Findings) -> None:
        """Take over what another has closed with."""
        self.problems += other.problems
        self.notes += other.notes

    def close(self) -> None:
        """Turn what was gathered into sentences: models that lack the same keys share one."""
        alike: dict[tuple[str, str, bool, tuple[str, ...]], list[str]] = defaultdict(list)
        for (model, component, consequence, fatal), keys in self._lacking.items():
            alike[component, consequence, fatal, tuple(keys)].append(model)
        for (component, consequence, fatal, absent), models in alike.items():
            (self.problems if fatal else self.notes).append(
                f"{component}: {len(absent):,} tensor(s) not in {some(models, 12)}: {some(list(absent), 2)}; "
                f"{consequence}"
            )
        for (model, component), differences in self._odd_shapes.items():
            self.problems.append(
                f"{component}: model {model} has {len(differences):,} tensor(s) of another shape than most: "
                f"{some(differences, 2)}; it is of another architecture; leave it out of the list"
            )
        for (model, component, why), keys in self._refused.items():
            self.problems.append(f"{component}: model {model} has {len(keys):,} tensor(s) {why}: {some(keys, 2)}")


def same_shape(case: Case, models: Models, infos: Sequence[TensorInfo], findings: Findings) -> bool:
    """Whether all have one shape; who has another is in `findings`."""
    if len({info.shape for info in infos}) == 1:
        return True
    common, _ = Counter([info.shape for info in infos]).most_common(1)[0]
    for id, info in zip(models.ids, infos, strict=True):
        if info.shape != common:
            findings.differs(id, case, f"'{shown(case.key)}' is {list(info.shape)}, not {list(common)}")
    return False
