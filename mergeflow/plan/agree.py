"""Agreement of the sources: which tensors a target has, and what each of them is made of.

Every disagreement is found before anything is written, and all of them are told together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.recipe.architecture import KeySpec
from mergeflow.tensors import OUTPUT_DTYPES, Dtype, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
    sources: tuple[tuple[int, TensorInfo], ...]
    """(index of the checkpoint, where its tensor lies), in the order of the target's list."""
    shares: tuple[int, ...]


class Findings:
    """What came up while a target was being settled, gathered so that it is said once, not once per key."""

    def __init__(self) -> None:
        self._lacking: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        self._odd_shapes: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.problems: list[str] = []
        self.notes: list[str] = []

    def lacks(self, model: str, case: Case, consequence: str) -> None:
        """`model` has no such key; `consequence` is what follows, or empty if that is an error."""
        self._lacking[model, case.component, consequence].append(case.key)

    def differs(self, model: str, case: Case, how: str) -> None:
        """`model` has a tensor of another shape than most."""
        self._odd_shapes[model, case.component].append(how)

    def close(self) -> None:
        """Turn what was gathered into sentences: models that lack the same keys share one."""
        alike: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
        for (model, component, consequence), keys in self._lacking.items():
            alike[component, consequence, tuple(keys)].append(model)
        for (component, consequence, absent), models in alike.items():
            missing = f"{component}: {len(absent):,} tensor(s) not in {some(models, 12)}: {some(list(absent), 2)}"
            if consequence:
                self.notes.append(f"{missing}; {consequence}")
            else:
                self.problems.append(
                    f"{missing}; leave it out of the list, or choose keys.missing=skip (mean of those that have it) "
                    "or keys.missing=base"
                )
        for (model, component), differences in self._odd_shapes.items():
            self.problems.append(
                f"{component}: model {model} has {len(differences):,} tensor(s) of another shape than most: "
                f"{some(differences, 2)}; it is of another architecture; leave it out of the list"
            )


@dataclass
class Case:
    """One key of one part: who has it, and who has not."""

    key: str
    component: str
    spec: KeySpec
    held: dict[str, tuple[TensorInfo, Fraction]]
    """By model, in the order of the list: its tensor and its share."""
    lacking: dict[str, Fraction]


class Agreement:
    """Settles the tensors of one target after the other, over the same checkpoints."""

    def __init__(
        self, checkpoints: Mapping[str, tuple[int, Checkpoint]], architecture: Architecture, policies: Policies
    ) -> None:
        self._checkpoints = checkpoints
        self._architecture = architecture
        self._policies = policies
        self._numerators: dict[tuple[Fraction, ...], tuple[int, ...]] = {}

    def settle(self, target: Target) -> tuple[list[Wanted], Findings]:
        """Every tensor of `target`, and what was found on the way. Only headers are looked at."""
        findings = Findings()
        wanted: list[Wanted] = []
        for part in target.parts:
            headers = [(id, self._header(id), share) for id, share in part.shares.items()]
            for key, spec in self._keys(target, part):
                case = Case(key, part.component, spec, {}, {})
                for id, header, share in headers:
                    info = header.get(key)
                    if info is None:
                        case.lacking[id] = share
                    else:
                        case.held[id] = (info, share)
                if self._present(case, target, findings) and _same_shape(case, findings):
                    wanted.append(self._wanted(case, target, part))
        self._surplus(target, {tensor.key for tensor in wanted}, findings)
        findings.close()
        return wanted, findings

    def _keys(self, target: Target, part: Part) -> Iterable[tuple[str, KeySpec]]:
        """The keys that this part of the output should have, whether or not anyone has them."""
        component = self._architecture.components[part.component]
        if target.keys_from is not None:
            given: Iterable[str] = self._header(target.keys_from)
        else:
            given = self._header(next(iter(part.shares))) if component.open else component.keys
        if component.open:
            return [(key, PLAIN) for key in given]
        return [(key, component.keys[key]) for key in given if key in component.keys]

    def _present(self, case: Case, target: Target, findings: Findings) -> bool:
        """Whether the output has such a tensor although some models may lack it; a base completes `case`."""
        if not case.lacking:
            return True
        if case.spec.marker:
            if case.held:
                findings.problems.append(
                    f"{case.component}: the marker '{case.key}' is in {some(list(case.held))} and not in "
                    f"{some(list(case.lacking))}: models that predict v and models that predict epsilon must never "
                    "be averaged; leave one kind out of the list"
                )
            return False
        if case.spec.optional and not case.held:
            return False
        if self._policies.missing == "base" and target.base is not None and not case.spec.optional:
            return self._complete(case, target.base, findings)
        tolerated = bool(case.held) and (case.spec.optional or self._policies.missing == "skip")
        for id in case.lacking:
            findings.lacks(id, case, "the others have its share" if tolerated else "")
        return tolerated

    def _complete(self, case: Case, base: str, findings: Findings) -> bool:
        info = self._header(base).get(case.key)
        if info is None:
            findings.problems.append(f"{case.component}: '{case.key}' is missing, and the base {base} lacks it too")
            return False
        _, share = case.held.get(base, (info, Fraction(0)))
        case.held[base] = (info, share + sum(case.lacking.values()))
        for id in case.lacking:
            findings.lacks(id, case, f"the base {base} stands in")
        return True

    def _wanted(self, case: Case, target: Target, part: Part) -> Wanted:
        infos = [info for info, _ in case.held.values()]
        if case.spec.marker or case.spec.integer or not all(info.dtype.is_float for info in infos):
            others = [info.dtype for info in infos if not info.dtype.is_float]
            method, dtype = AGREE, Dtype.I64 if case.spec.integer else (others or [infos[0].dtype])[0]
        else:
            method, dtype = part.method, OUTPUT_DTYPES[target.dtype] or infos[0].dtype
        sources = tuple((self._checkpoints[id][0], info) for id, (info, _) in case.held.items())
        shares = self._integers(tuple(share for _, share in case.held.values()))
        return Wanted(case.key, case.component, infos[0].shape, dtype, method, sources, shares)

    def _integers(self, shares: tuple[Fraction, ...]) -> tuple[int, ...]:
        """The smallest integers in the proportion of `shares`, which renews them where some models are absent."""
        made = self._numerators.get(shares)
        if made is None:
            scale = lcm(*(share.denominator for share in shares))
            numbers = [int(share * scale) for share in shares]
            made = self._numerators[shares] = tuple(number // gcd(*numbers) for number in numbers)
        return made

    def _surplus(self, target: Target, known: set[str], findings: Findings) -> None:
        """Keys that belong to no component, or that an open component leaves out of the output."""
        by_header: dict[str, list[str]] = {}
        for id in dict.fromkeys(id for part in target.parts for id in part.shares):
            header = self._checkpoints[id][1].header
            extra = by_header.get(header.digest)
            if extra is None:
                extra = sorted(key for key in header.tensors.keys() - known if self._belongs_nowhere(key))
                by_header[header.digest] = extra
            if extra:
                text = f"model {id} has {len(extra):,} surplus tensor(s): {some(extra, 3)}"
                if self._policies.surplus == "error":
                    findings.problems.append(f"{text}; leave it out of the lists, or choose keys.surplus=ignore")
                else:
                    findings.notes.append(f"{text}; ignored")

    def _belongs_nowhere(self, key: str) -> bool:
        owner = self._architecture.component_of(key)
        return owner is None or self._architecture.components[owner].open

    def _header(self, id: str) -> Mapping[str, TensorInfo]:
        return self._checkpoints[id][1].header.tensors


def _same_shape(case: Case, findings: Findings) -> bool:
    shapes = {id: info.shape for id, (info, _) in case.held.items()}
    first = next(iter(shapes.values()))
    if all(shape == first for shape in shapes.values()):
        return True
    common, _ = Counter(shapes.values()).most_common(1)[0]
    for id, shape in shapes.items():
        if shape != common:
            findings.differs(id, case, f"'{case.key}' is {list(shape)}, not {list(common)}")
    return False
