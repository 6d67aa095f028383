"""The tensors of a part that a merge tree makes: who has them, who is needed, and by which steps."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from mergeflow.plan import rules
from mergeflow.plan.sources import AGREE, PLAIN, POSITION_IDS, Case, Models, Wanted, same_shape
from mergeflow.plan.steps import Grown, Refused
from mergeflow.recipe.request import COPY, PAIRWISE, REST
from mergeflow.recipe.tree import VAE, Rules
from mergeflow.tensors import OUTPUT_DTYPES
from mergeflow.text import shown, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mergeflow.plan.agree import Agreement
    from mergeflow.plan.rules import Role
    from mergeflow.plan.sources import Findings
    from mergeflow.recipe.architecture import KeySpec
    from mergeflow.recipe.request import Part, Target
    from mergeflow.recipe.tree import Tree
    from mergeflow.tensors import Dtype, TensorInfo

STANDS_ALONE = "what it would be merged with stands alone"
A_DECIDES = "where that is A, the merge is without them; where it is B, they are A's, as in the web UI"

Rows = dict[str, tuple[int, "TensorInfo"]]
"""(source, where the tensor lies there) of those who have a tensor, by id."""


class TreePart:
    """One component of one target, made by a tree."""

    def __init__(self, agreement: Agreement, target: Target, part: Part, tree: Tree, findings: Findings) -> None:
        self._agreement = agreement
        self._target = target
        self._part = part
        self._tree = tree
        self._findings = findings
        self._rules = part.rules or Rules()
        self._strict = agreement.policies.keys == "strict"
        self._alone = STANDS_ALONE if self._rules.arithmetic == "supermerger" else A_DECIDES
        self._leaves = agreement.models(tree.leaves)
        self._vaes = agreement.models(tree.baked)
        self._needed: dict[frozenset[str], list[bool]] = {}
        self._grown: dict[object, Grown | None] = {}

    def settle(self) -> Iterator[tuple[str, Wanted | None]]:
        """Every key that the part should have, with what it is made of, or None if the output does without."""
        for key, spec in self._keys():
            case = Case(key, self._part.component, spec)
            yield key, self._settled(case, rules.role(key, self._rules, strict=self._strict))

    def _keys(self) -> Iterable[tuple[str, KeySpec]]:
        if self._strict:
            return self._agreement.keys(self._target, self._part)
        architecture, name = self._agreement.architecture, self._part.component
        component = architecture.components.get(name)
        known = component.keys if component is not None else {}
        owner = None if name == REST else name
        every = dict.fromkeys(key for header in self._followed() for key in header)
        found = [key for key in every if architecture.component_of(key) == owner]
        if name != REST:  # what belongs to no component is told as surplus
            self._note_dropped({key for key in known if not known[key].marker}.difference(found))
        return [(key, known.get(key, PLAIN)) for key in found]

    def _note_dropped(self, lacking: set[str]) -> None:
        """Tell of tensors that models have, and the result has not, because A decides."""
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for id, header in zip(self._leaves.ids, self._leaves.headers, strict=True):
            if only_there := sorted(lacking.intersection(header)):
                alike[tuple(only_there)].append(id)
        for keys, models in alike.items():
            self._findings.notes.append(
                f"{self._part.component}: {len(keys):,} tensor(s) of {some(models, 12)} are dropped, because the first "
                f"model, {self._leaves.ids[self._first()]}, does not have them, as in the web UI: {some(list(keys), 2)}"
            )

    def _followed(self) -> Sequence[Mapping[str, TensorInfo]]:
        """The headers whose keys the result has: that of A's A's A; supermerger adds what only B has."""
        if self._rules.arithmetic == "supermerger":
            return self._leaves.headers
        return [self._leaves.headers[self._first()]]

    def _first(self) -> int:
        """The place of A's A's A."""
        place = self._tree.top
        while (node := self._tree.node(place)) is not None:
            place = node.inputs[0]
        return place

    def _settled(self, case: Case, role: Role) -> Wanted | None:
        vaes = self._baked(case) if role.vae else {}
        listed = self._leaves.where(self._reached(frozenset(vaes)))
        models: Models | None = listed
        has = [case.key in header for header in listed.headers]
        if not all(has):
            models = self._present(case, listed, has)
        if models is None:
            return None
        rows: Rows = {
            id: (source, header[case.key])
            for id, source, header in zip(models.ids, models.sources, models.headers, strict=True)
        }
        if models.ids and self._is_copied(case) and (copied := self._agreement.copied(case, models)) is not None:
            shapes_agree = same_shape(case, models, [info for _, info in rows.values()], self._findings)
            return copied if shapes_agree else None
        return self._made(case, role, self._replaced(case, vaes) | rows, vaes)

    def _baked(self, case: Case) -> Rows:
        """The VAEs that have this key, under its own name or without the prefix of a checkpoint."""
        found: Rows = {}
        name = case.key.removeprefix(VAE)
        if name.startswith("loss") or name in rules.NEVER_BAKED:
            return found
        for id, source, header in zip(self._vaes.ids, self._vaes.sources, self._vaes.headers, strict=True):
            info = header.get(case.key) or header.get(name)
            if info is not None:
                found[id] = (source, info)
        return found

    def _replaced(self, case: Case, vaes: Rows) -> Rows:
        """The leaves below the VAEs: a VAE replaces only what is there, so whether there is anything must be known.

        They are not read. Where the architecture says which keys there are, each counts as having them.
        """
        if not vaes:
            return {}
        any_vae = next(iter(vaes.values())) if self._strict else None
        below = self._leaves.where([not reached for reached in self._reached(frozenset(vaes))])
        found = {}
        for id, source, header in zip(below.ids, below.sources, below.headers, strict=True):
            row = (source, header[case.key]) if case.key in header else any_vae
            if row is not None:
                found[id] = row
        return found

    def _reached(self, baked: frozenset[str]) -> list[bool]:
        """Which leaves have a part in the result where the VAEs in `baked` replace what was merged."""
        if baked not in self._needed:
            count = len(self._tree.leaves)
            reached = [False] * (self._tree.top + 1)
            reached[self._tree.top] = True
            for place in range(self._tree.top, count - 1, -1):
                node = self._tree.nodes[place - count]
                if reached[place] and node.bake not in baked:
                    for below in node.inputs:
                        reached[below] = True
            self._needed[baked] = reached[:count]
        return self._needed[baked]

    def _present(self, case: Case, listed: Models, has: Sequence[bool]) -> Models | None:
        if self._strict:
            return self._agreement.present(case, listed, self._target, self._findings, tree=True)
        others = listed.where([not there for there in has])
        if case.spec.marker:
            self._findings.notes.append(
                f"{case.component}: the marker '{shown(case.key)}' is not in {some(list(others.ids), 12)}, and web UIs "
                "merge models that predict v with models that predict epsilon without a word; the result is neither"
            )
        else:
            self._findings.lacking(others, case, self._alone, fatal=False)
        return listed.where(has)

    def _is_copied(self, case: Case) -> bool:
        """Whether whole numbers are copied, as where a mean is made; web UIs merge even position_ids."""
        policies = self._agreement.policies
        if not case.key.endswith(POSITION_IDS):
            return self._strict
        if policies.position_ids is not None:
            return policies.position_ids == "fix"
        return self._strict or self._rules.arithmetic in ("float32", "float64", "comfyui")

    def _made(self, case: Case, role: Role, rows: Rows, vaes: Rows) -> Wanted | None:
        leaves = tuple(self._row(id, rows) for id in self._tree.leaves)
        baked = {id: (source, info.dtype) for id, (source, info) in vaes.items()}
        signature = (leaves, tuple(baked.items()), role)
        if signature not in self._grown:
            load = OUTPUT_DTYPES[self._target.dtype]
            try:
                self._grown[signature] = rules.grow(self._tree, leaves, baked, role, self._rules, load)
            except Refused as error:
                self._refuse(case, error, rows, vaes)
                return None
        grown = self._grown[signature]
        return None if grown is None else self._wanted(case, grown, rows, vaes)

    def _row(self, id: str, rows: Rows) -> tuple[int, Dtype] | None:
        """What stands at the leaf `id`; in its place the base, where that may stand in."""
        found = rows.get(id)
        if found is None and self._strict and self._agreement.policies.missing == "base":
            found = rows.get(self._target.base or "")
        return None if found is None else (found[0], found[1].dtype)

    def _wanted(self, case: Case, grown: Grown, rows: Rows, vaes: Rows) -> Wanted | None:
        by_source = {source: (id, info) for id, (source, info) in (*rows.items(), *vaes.items())}
        used = [by_source[source] for source in grown.sources]
        infos = tuple([info for _, info in used])
        if not same_shape(case, self._agreement.models([id for id, _ in used]), infos, self._findings):
            return None
        dtype = grown.dtype
        if dtype.is_float:
            dtype = OUTPUT_DTYPES[self._target.dtype] or dtype
        method, shares = (PAIRWISE, ()) if grown.steps else (COPY if dtype.is_float else AGREE, (1,))
        return Wanted(
            case.key, case.component, infos[0].shape, dtype, method, grown.sources, infos, shares, grown.steps
        )

    def _refuse(self, case: Case, error: Refused, rows: Rows, vaes: Rows) -> None:
        id = next(id for id, (source, _) in (*rows.items(), *vaes.items()) if source == error.source)
        tool = {"webui": "the web UI"}.get(self._rules.arithmetic, self._rules.arithmetic)
        why = f"in {error.dtype.code}, which {tool} cannot merge; choose method.arithmetic=float32, or leave it out"
        self._findings.refused(id, case, why)
