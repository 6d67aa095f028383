"""Cases of what lies beside outputs: manifests, and journals of runs that came to no end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mergeflow.execute.journal import FORMAT, Entry, _line, head, lines, parse
from mergeflow.execute.takeover import usable
from mergeflow.leftovers import made_before
from mergeflow.merge import open_plan
from mergeflow.plan.identity import OutputIdentity
from mergeflow.recipe.request import ModelSource, TargetRequest
from mergeflow.recipe.verification import VerificationRequest
from mergeflow.verify.run import open_verification, verify
from tests.fuzz.guards import Case, said
from tests.fuzz.mutation import NUMBERS, damaged, encoded, mutated
from tests.models import ANY, request

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from mergeflow.interfaces import Store
    from tests.fuzz.corpus import Corpus


def manifest(corpus: Corpus, place: Path, store: Store, rng: Random) -> Case:
    """The manifest beside a file that is verified, or the recipe in that file; then the same merge once more."""
    there = place / "verified"
    there.mkdir(exist_ok=True)
    file, beside = there / "merged.safetensors", there / "manifest.json"
    told = (corpus.made / "manifest.json").read_bytes()
    file.write_bytes((corpus.made / file.name).read_bytes())
    changed = encoded(mutated(json.loads(told), rng, rng.choice((1, 1, 2, 5))))
    beside.write_bytes(damaged(told, rng) if rng.random() < 0.3 else changed)
    asked = VerificationRequest(str(file), ModelSource(str(corpus.models)), ANY, str(there), 2)
    target = [TargetRequest("merged", "merged.safetensors", selection="listed")]
    again = request(corpus.models, there, targets=target, selections={"listed": "01,02"})

    def act() -> None:
        for finding in verify(open_verification(asked, store), store, threads=1).findings:
            said(finding.text)
        made_before(open_plan(again, store), str(there), store)

    return Case(act, len(told) + file.stat().st_size)


def journal(rng: Random) -> Case:
    """The journal beside a draft, with lines whose checksums are right."""
    identity = OutputIdentity("a" * 32, "b" * 32, {"01": "c" * 32, "02": "d" * 32})
    whole = head(identity) + lines([Entry(0, 100, bytes(16)), Entry(100, 200, bytes(16))])
    told = mutated({"head": "a" * 32, "work": "b" * 32, "sources": {"01": "c" * 32}}, rng, rng.choice((1, 2)))
    numbers = [str(rng.choice((*NUMBERS, "x", 5))) for _ in range(2)]
    first = _line(f"{FORMAT} {encoded(told).decode('utf-8', 'replace')}")
    data = rng.choice((damaged(whole, rng, 2), first + _line(f"{' '.join(numbers)} {'00' * 16}"), first + whole))

    def act() -> None:
        notes = parse(data)
        if notes.identity is not None:
            said(identity.differs(notes.identity) or "the same")
        usable(data, identity, "draft")

    return Case(act, len(data))
