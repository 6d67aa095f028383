"""Agreement of the sources: which tensors a target has, and what each of them is made of.

Every disagreement is found before anything is written, and all of them are told together.
"""

from __future__ import annotations

from collections import defaultdict
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.interfaces import SHARES_LIMIT
from mergeflow.plan.rules import as_the_web_ui_names
from mergeflow.plan.sources import AGREE, PLAIN, POSITION_IDS, WHOLE, Case, Findings, Models, Wanted, same_shape
from mergeflow.plan.trees import STANDS_ALONE, TreePart
from mergeflow.tensors import OUTPUT_DTYPES, Dtype
from mergeflow.text import shown, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mergeflow.recipe.architecture import Architecture, KeySpec
    from mergeflow.recipe.request import Part, Policies, Target
    from mergeflow.tensors import Checkpoint


class _Settled(NamedTuple):
    """One part of a target."""

    wanted: tuple[Wanted, ...]
    asked: frozenset[str]
    """The keys that it should have."""
    findings: Findings


class Agreement:
    """Settles the tensors of one target after the other, over the same checkpoints."""

    def __init__(
        self, checkpoints: Mapping[str, tuple[int, Checkpoint]], architecture: Architecture, policies: Policies
    ) -> None:
        self._indices = {id: index for id, (index, _) in checkpoints.items()}
        self._headers = {id: checkpoint.header.tensors for id, (_, checkpoint) in checkpoints.items()}
        if policies.keys == "webui":
            self._headers = {id: as_the_web_ui_names(header) for id, header in self._headers.items()}
        self.architecture = architecture
        self.policies = policies
        self._reduced: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._settled: dict[tuple[object, ...], _Settled] = {}
        self._nowhere: dict[str, list[str]] = {}
        self._at_home: set[str] = set()

    def settle(self, target: Target) -> tuple[list[Wanted], Findings]:
        """Every tensor of `target`, and what was found on the way. Only headers are looked at."""
        findings = Findings()
        wanted: list[Wanted] = []
        asked: set[str] = set()
        for part in target.parts:
            made = self._part(target, part)
            wanted += made.wanted
            asked |= made.asked
            findings.add(made.findings)
        self._surplus(target, asked, findings)
        return wanted, findings

    def _part(self, target: Target, part: Part) -> _Settled:
        """One part of a target; those of a series have most parts in common, and each is settled once."""
        shares = tuple(part.shares.items())
        key = (part.component, shares, part.method, part.tree, part.rules, target.dtype, target.keys_from, target.base)
        if key not in self._settled:
            findings = Findings()
            tensors = self._means(target, part, findings)
            if part.tree is not None:
                tensors = TreePart(self, target, part, part.tree, findings).settle()
            every = list(tensors)
            findings.close()
            made = tuple(tensor for _, tensor in every if tensor is not None)
            self._settled[key] = _Settled(made, frozenset(name for name, _ in every), findings)
        return self._settled[key]

    def models(self, ids: Sequence[str], shares: Sequence[int] = ()) -> Models:
        """The models of a list, with equal shares unless told otherwise."""
        return Models(
            ids=tuple(ids),
            sources=tuple(self._indices[id] for id in ids),
            headers=tuple(self._headers[id] for id in ids),
            shares=tuple(shares) or (1,) * len(ids),
        )

    def keys(self, target: Target, part: Part) -> Iterable[tuple[str, KeySpec]]:
        """The keys that this part of the output should have, whether or not anyone has them."""
        component = self.architecture.components[part.component]
        if component.open:
            chosen = next(iter(part.shares)) if target.keys_from is None else target.keys_from
            keys = dict.fromkeys((*self._headers[chosen], *component.keys))
            return [(key, component.keys.get(key, PLAIN)) for key in keys]
        if target.keys_from is None:
            return component.keys.items()
        # Markers are looked at whatever the keys are: what they tell apart must never be averaged.
        given = self._headers[target.keys_from]
        return [(key, spec) for key, spec in component.keys.items() if spec.marker or key in given]

    def present(
        self, case: Case, models: Models, target: Target, findings: Findings, *, tree: bool = False
    ) -> Models | None:
        """What is merged, by a tree or as a mean, although some of `models` lack it; None if the output will too."""
        has = [case.key in header for header in models.headers]
        holders, others = models.where(has), models.where([not there for there in has])
        if case.spec.marker:
            if holders.ids:
                findings.problems.append(
                    f"{case.component}: the marker '{shown(case.key)}' is in {some(list(holders.ids))} and not in "
                    f"{some(list(others.ids))}: models that predict v and models that predict epsilon must never "
                    "be averaged; leave one kind out of the list"
                )
            return None
        if case.spec.optional and not holders.ids:
            return None
        if self.policies.missing == "base" and target.base is not None and not case.spec.optional:
            return self._completed(case, holders, others, target.base, findings)
        if not holders.ids:
            remedy = "list one that does, or choose the keys of the output by keys_from or arch"
            findings.lacking(others, case, f"no listed model has them; {remedy}", fatal=True)
            return None
        if case.spec.optional or self.policies.missing == "skip":
            findings.lacking(others, case, STANDS_ALONE if tree else "the others have its share", fatal=False)
            return holders
        how = "trees of those that have it" if tree else "mean of those that have it"
        remedy = f"leave it out of the list, or choose keys.missing=skip ({how}) or "
        findings.lacking(others, case, f"{remedy}keys.missing=base", fatal=True)
        return None

    def copied(self, case: Case, models: Models) -> Wanted | None:
        """Tensors that are no numbers to merge, copied; None if they are."""
        infos = tuple([header[case.key] for header in models.headers])
        spec, sources, shares = case.spec, models.sources, models.shares
        fixed = self.policies.position_ids == "fix" and case.key.endswith(POSITION_IDS)
        if not (spec.marker or spec.integer or fixed) and all([info.dtype.is_float for info in infos]):
            return None
        if self.policies.integers == "first" and not spec.marker:
            sources, infos, shares = sources[:1], infos[:1], shares[:1]
        whole = [info.dtype for info in infos if not info.dtype.is_float]
        dtype = Dtype.I64 if spec.integer or fixed else (whole or [infos[0].dtype])[0]
        method = WHOLE if fixed else AGREE
        return Wanted(case.key, case.component, infos[0].shape, dtype, method, sources, infos, self._smallest(shares))

    def _means(self, target: Target, part: Part, findings: Findings) -> Iterator[tuple[str, Wanted | None]]:
        """The tensors of a part that no tree makes."""
        scale = lcm(*(share.denominator for share in part.shares.values()))
        listed = self.models(list(part.shares), [int(share * scale) for share in part.shares.values()])
        if sum(listed.shares) >= SHARES_LIMIT:
            findings.problems.append(
                f"{part.component}: the shares have the common denominator {_shown(sum(listed.shares))}, and a mean is "
                f"exact only below {SHARES_LIMIT:,}; use composites whose numbers of members have more in common"
            )
        in_all = set(listed.headers[0]).intersection(*listed.headers[1:])
        for key, spec in self.keys(target, part):
            case = Case(key, part.component, spec)
            models: Models | None = listed
            if key not in in_all:
                models = self.present(case, listed, target, findings)
            yield key, None if models is None else self._mean(case, models, target, part, findings)

    def _mean(self, case: Case, models: Models, target: Target, part: Part, findings: Findings) -> Wanted | None:
        infos = tuple([header[case.key] for header in models.headers])
        if not same_shape(case, models, infos, findings):
            return None
        if copied := self.copied(case, models):
            return copied
        dtype = OUTPUT_DTYPES[target.dtype] or infos[0].dtype
        shares = self._smallest(models.shares)
        return Wanted(case.key, case.component, infos[0].shape, dtype, part.method, models.sources, infos, shares)

    def _completed(self, case: Case, holders: Models, others: Models, base: str, findings: Findings) -> Models | None:
        header = self._headers[base]
        if case.key not in header:
            findings.lacking(others, case, f"the base {base} lacks them too; choose a base that has them", fatal=True)
            return None
        findings.lacking(others, case, f"the base {base} stands in", fatal=False)
        return holders.adding(base, self._indices[base], header, sum(others.shares))

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
            if id not in self._nowhere:
                self._nowhere[id] = self._homeless(id)
            extra = [key for key in self._nowhere[id] if key not in asked]
            if extra:
                alike[tuple(extra)].append(id)
        for keys, models in alike.items():
            text = f"{len(keys):,} surplus tensor(s) in {some(models, 12)}: {some(list(keys), 3)}"
            if self.policies.surplus == "error":
                findings.problems.append(f"{text}; leave it out of the lists, or choose keys.surplus=ignore")
            else:
                findings.notes.append(f"{text}; ignored")

    def _homeless(self, id: str) -> list[str]:
        """The keys of a model that belong nowhere. Models have most keys in common, and each is looked at once."""
        unknown = self._headers[id].keys() - self._at_home
        homeless = {key for key in unknown if self._belongs_nowhere(key)}
        self._at_home |= unknown - homeless
        return sorted(homeless)

    def _belongs_nowhere(self, key: str) -> bool:
        owner = self.architecture.component_of(key)
        return owner is None or self.architecture.components[owner].open


def _shown(number: int) -> str:
    """A number that may have thousands of digits, which Python would not even write."""
    return f"{number:,}" if number < 10**30 else f"2^{number.bit_length()}"
