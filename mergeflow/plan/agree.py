"""Agreement of the sources: which tensors a target has, and what each of them is made of.

Every disagreement is found before anything is written, and all of them are told together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import compress
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.interfaces import SHARES_LIMIT
from mergeflow.recipe.architecture import KeySpec
from mergeflow.tensors import OUTPUT_DTYPES, Dtype, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.request import Part, Policies, Target
    from mergeflow.tensors import Checkpoint, TensorInfo

PLAIN = KeySpec(shape=None, optional=False, integer=False, marker=False)
"""What is known of a key that no architecture describes."""

AGREE = "agree"
"""The method of tensors that are copied once all sources have been seen to hold the same values."""


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
    """The share of each of `sources`, over the sum of all: the smallest such integers."""


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
        self.problems: list[str] = []
        self.notes: list[str] = []

    def lacking(self, models: Models, case: Case, consequence: str, *, fatal: bool) -> None:
        """None of `models` has the key; `consequence` is what follows, or what to do if that is `fatal`."""
        for id in models.ids:
            self._lacking[id, case.component, consequence, fatal].append(case.key)

    def differs(self, model: str, case: Case, how: str) -> None:
        """`model` has a tensor of another shape than most."""
        self._odd_shapes[model, case.component].append(how)

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


class Agreement:
    """Settles the tensors of one target after the other, over the same checkpoints."""

    def __init__(
        self, checkpoints: Mapping[str, tuple[int, Checkpoint]], architecture: Architecture, policies: Policies
    ) -> None:
        self._checkpoints = checkpoints
        self._architecture = architecture
        self._policies = policies
        self._reduced: dict[tuple[int, ...], tuple[int, ...]] = {}

    def settle(self, target: Target) -> tuple[list[Wanted], Findings]:
        """Every tensor of `target`, and what was found on the way. Only headers are looked at."""
        findings = Findings()
        wanted: list[Wanted] = []
        asked: set[str] = set()
        for part in target.parts:
            listed = self._models(part)
            if sum(listed.shares) >= SHARES_LIMIT:
                findings.problems.append(
                    f"{part.component}: the shares have the common denominator {sum(listed.shares):,}, and a mean is "
                    f"exact only below {SHARES_LIMIT:,}; use composites whose numbers of members have more in common"
                )
            for key, spec in self._keys(target, part):
                asked.add(key)
                case = Case(key, part.component, spec)
                models: Models | None = listed
                if not all(key in header for header in listed.headers):
                    models = self._present(case, listed, target, findings)
                if models is None:
                    continue
                infos = tuple([header[key] for header in models.headers])
                if _same_shape(case, models, infos, findings):
                    wanted.append(self._wanted(case, models, infos, target, part))
        self._surplus(target, asked, findings)
        findings.close()
        return wanted, findings

    def _models(self, part: Part) -> Models:
        indexed = [self._checkpoints[id] for id in part.shares]
        scale = lcm(*(share.denominator for share in part.shares.values()))
        return Models(
            ids=tuple(part.shares),
            sources=tuple(index for index, _ in indexed),
            headers=tuple(checkpoint.header.tensors for _, checkpoint in indexed),
            shares=tuple(int(share * scale) for share in part.shares.values()),
        )

    def _keys(self, target: Target, part: Part) -> Iterable[tuple[str, KeySpec]]:
        """The keys that this part of the output should have, whether or not anyone has them."""
        component = self._architecture.components[part.component]
        if component.open:
            chosen = next(iter(part.shares)) if target.keys_from is None else target.keys_from
            keys = dict.fromkeys((*self._header(chosen), *component.keys))
            return [(key, component.keys.get(key, PLAIN)) for key in keys]
        if target.keys_from is None:
            return component.keys.items()
        # Markers are looked at whatever the keys are: what they tell apart must never be averaged.
        given = self._header(target.keys_from)
        return [(key, spec) for key, spec in component.keys.items() if spec.marker or key in given]

    def _present(self, case: Case, models: Models, target: Target, findings: Findings) -> Models | None:
        """What is averaged although some of `models` lack the tensor; None if the output will not have it."""
        has = [case.key in header for header in models.headers]
        holders, others = models.where(has), models.where([not there for there in has])
        if case.spec.marker:
            if holders.ids:
                findings.problems.append(
                    f"{case.component}: the marker '{case.key}' is in {some(list(holders.ids))} and not in "
                    f"{some(list(others.ids))}: models that predict v and models that predict epsilon must never "
                    "be averaged; leave one kind out of the list"
                )
            return None
        if case.spec.optional and not holders.ids:
            return None
        if self._policies.missing == "base" and target.base is not None and not case.spec.optional:
            return self._completed(case, holders, others, target.base, findings)
        if not holders.ids:
            remedy = "list one that does, or choose the keys of the output by keys_from or arch"
            findings.lacking(others, case, f"no listed model has them; {remedy}", fatal=True)
            return None
        if case.spec.optional or self._policies.missing == "skip":
            findings.lacking(others, case, "the others have its share", fatal=False)
            return holders
        remedy = "leave it out of the list, or choose keys.missing=skip (mean of those that have it) or "
        findings.lacking(others, case, f"{remedy}keys.missing=base", fatal=True)
        return None

    def _completed(self, case: Case, holders: Models, others: Models, base: str, findings: Findings) -> Models | None:
        index, checkpoint = self._checkpoints[base]
        header = checkpoint.header.tensors
        if case.key not in header:
            findings.lacking(others, case, f"the base {base} lacks them too; choose a base that has them", fatal=True)
            return None
        findings.lacking(others, case, f"the base {base} stands in", fatal=False)
        return holders.adding(base, index, header, sum(others.shares))

    def _wanted(self, case: Case, models: Models, infos: tuple[TensorInfo, ...], target: Target, part: Part) -> Wanted:
        spec, sources, shares = case.spec, models.sources, models.shares
        if not (spec.marker or spec.integer) and all([info.dtype.is_float for info in infos]):
            method, dtype = part.method, OUTPUT_DTYPES[target.dtype] or infos[0].dtype
        else:
            if self._policies.integers == "first" and not spec.marker:
                sources, infos, shares = sources[:1], infos[:1], shares[:1]
            whole = [info.dtype for info in infos if not info.dtype.is_float]
            method, dtype = AGREE, Dtype.I64 if spec.integer else (whole or [infos[0].dtype])[0]
        return Wanted(case.key, case.component, infos[0].shape, dtype, method, sources, infos, self._smallest(shares))

    def _smallest(self, shares: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest integers in the proportion of `shares`; equal ones are one tuple."""
        if shares not in self._reduced:
            common = gcd(*shares)
            self._reduced[shares] = tuple(share // common for share in shares)
        return self._reduced[shares]

    def _surplus(self, target: Target, asked: set[str], findings: Findings) -> None:
        """Keys that belong to no component, or that an open component leaves out of the output."""
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for id in dict.fromkeys(id for part in target.parts for id in part.shares):
            extra = sorted(key for key in self._header(id).keys() - asked if self._belongs_nowhere(key))
            if extra:
                alike[tuple(extra)].append(id)
        for keys, models in alike.items():
            text = f"{len(keys):,} surplus tensor(s) in {some(models, 12)}: {some(list(keys), 3)}"
            if self._policies.surplus == "error":
                findings.problems.append(f"{text}; leave it out of the lists, or choose keys.surplus=ignore")
            else:
                findings.notes.append(f"{text}; ignored")

    def _belongs_nowhere(self, key: str) -> bool:
        owner = self._architecture.component_of(key)
        return owner is None or self._architecture.components[owner].open

    def _header(self, id: str) -> Mapping[str, TensorInfo]:
        return self._checkpoints[id][1].header.tensors


def _same_shape(case: Case, models: Models, infos: Sequence[TensorInfo], findings: Findings) -> bool:
    if len({info.shape for info in infos}) == 1:
        return True
    common, _ = Counter([info.shape for info in infos]).most_common(1)[0]
    for id, info in zip(models.ids, infos, strict=True):
        if info.shape != common:
            findings.differs(id, case, f"'{case.key}' is {list(info.shape)}, not {list(common)}")
    return False
