"""Who is given the cases: every reader of something that anybody may have written."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import safetensors

from mergeflow.compare.run import compare
from mergeflow.config.executor import to_bytes
from mergeflow.errors import MergeflowError
from mergeflow.execute.local import LocalExecutor
from mergeflow.formats.safetensors import Safetensors
from mergeflow.inputs import open_checkpoint
from mergeflow.merge import open_assembly, open_plan, run
from mergeflow.plan.explain import explain
from mergeflow.recipe.assembly import Assembly
from mergeflow.recipe.modelset import ModelSet, model_set
from mergeflow.recipe.recorded import read_merges, recorded_tree
from mergeflow.recipe.request import Policies, RecordedFile, TargetRequest
from mergeflow.recipe.selection import parse_selection
from mergeflow.recipe.webui import matched, recorded
from mergeflow.report.comparison import table
from mergeflow.report.comparison_json import to_json
from mergeflow.storage.hashes import HashCache
from mergeflow.tensors import Identity
from tests.fuzz import beside
from tests.fuzz.guards import Case, GuardedStore, Violation, reading, said
from tests.fuzz.mutation import NAMES, NUMBERS, damaged, encoded, hostile_file, mutated, value
from tests.models import ANY, SMALLEST, request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    from mergeflow.recipe.request import Request
    from tests.fuzz.corpus import Corpus

RECORDED = (TargetRequest("recorded", "", recorded=True),)
IDS = ("01", "02", "03", "x1", "0a")


class Targets:
    """Makers of cases, by name."""

    def __init__(self, corpus: Corpus, place: Path) -> None:
        self.corpus = corpus
        self.store = GuardedStore()
        self._place = place
        self._file = place / "models" / "hostile.safetensors"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self.all: dict[str, tuple[Callable[[Random], Case], int]] = {
            "header": (self.header, 40),
            "full header": (self.full_header, 1),
            "checkpoint": (self.checkpoint, 12),
            "plan": (self.plan, 8),
            "web UI": (self.web_ui, 14),
            "recipe": (self.recipe, 14),
            "json": (self.saved_json, 6),
            "hashes": (self.hashes, 6),
            "compare": (self.compare, 4),
            "assemble": (self.assemble, 4),
            "merge": (self.merge, 1),
            "selection": (self.selection, 8),
            "tree": (self.nodes, 8),
            "names": (self.names, 6),
            "manifest": (lambda rng: beside.manifest(corpus, place, self.store, rng), 2),
            "journal": (beside.journal, 6),
        }
        """Each with how many cases of a hundred or so it has."""

    # headers

    def header(self, rng: Random) -> Case:
        """The header of a small file, alone; what is taken, the library takes too."""
        data = self._small(rng)
        return Case(lambda: _parsed(data), len(data))

    def full_header(self, rng: Random) -> Case:
        """The header of a file with all tensors of SDXL."""
        data = hostile_file(self.corpus.full, self.corpus.full_body, rng)
        return Case(lambda: Safetensors().parse(reading(data), len(data)), len(data))

    def checkpoint(self, rng: Random) -> Case:
        """A file on the disk."""
        data = self._write(self._small(rng))
        return Case(lambda: _opened(open_checkpoint("01", str(self._file), self.store, Safetensors())), len(data))

    def plan(self, rng: Random) -> Case:
        """A file among others, up to the page that explains what would be made."""
        data = self._write(self._small(rng))
        asked = self._request(rng.random() < 0.5, rng)
        return Case(lambda: _explained(asked, self.store), len(data))

    def merge(self, rng: Random) -> Case:
        """The same, and the merge, where nothing forbids it."""
        data = self._write(self._small(rng))
        asked = replace(self._request(rng.random() < 0.5, rng), overwrite=True)

        def act() -> None:
            run(open_plan(asked, self.store), LocalExecutor(SMALLEST), self.store)

        return Case(act, len(data))

    def compare(self, rng: Random) -> Case:
        """Two files, compared, in words and as JSON."""
        data = self._write(self._small(rng))

        def act() -> None:
            found = compare(str(self.corpus.models / "01.safetensors"), str(self._file), ANY, self.store, threads=1)
            said(table(found).replace("\n", "\n  "))
            json.dumps(to_json(found), ensure_ascii=False, allow_nan=False)

        return Case(act, len(data))

    def assemble(self, rng: Random) -> Case:
        """A part for another file."""
        data = self._write(self._small(rng))
        files = [str(self.corpus.models / "01.safetensors"), str(self._file)]
        rng.shuffle(files)
        wanted = Assembly(files[0], {"unet": files[1]}, self.corpus.sdxl, "x.safetensors", str(self._place), SMALLEST)
        return Case(lambda: said(explain(open_assembly(wanted, self.store)).replace("\n", "\n  ")), len(data))

    # metadata

    def web_ui(self, rng: Random) -> Case:
        """Metadata as web UIs write it."""
        said_of = _changed(self.corpus.webui, rng)
        paths = {id: f"/m/{id}.safetensors" for id in ("01", "02", "03")}
        known = {id: Identity(*(rng.choice((None, "a" * 64)), None)) for id in paths}

        def act() -> None:
            tree, notes = matched(recorded(said_of, "m"), ModelSet(paths, place="/m"), known, {})
            for note in notes:
                said(note)
            tree.weights()

        return Case(act, _size(said_of))

    def recipe(self, rng: Random) -> Case:
        """Metadata as mergeflow writes it, in a file that is to be made again."""
        metadata = _changed(self.corpus.ours, rng)
        head = encoded({"__metadata__": metadata, **self.corpus.table})
        data = self._write(len(head).to_bytes(8, "little") + head + self.corpus.body)
        asked = self._replay(str(self._file), rng)
        return Case(lambda: _explained(asked, self.store), len(data))

    def saved_json(self, rng: Random) -> Case:
        """The same, saved as JSON; or any JSON."""
        path = self._place / "saved.json"
        told = rng.choice((self.corpus.ours, self.corpus.webui))
        kind = rng.randrange(4)
        data = encoded(
            [_changed(told, rng), {"__metadata__": _changed(told, rng)}, value(rng), mutated(told, rng)][kind]
        )
        if rng.random() < 0.3:
            data = damaged(data, rng, 2)
        path.write_bytes(data)
        asked = self._replay(str(path), rng)
        return Case(lambda: _explained(asked, self.store), len(data))

    def hashes(self, rng: Random) -> Case:
        """The file in which hashes are kept, with or without damage."""
        path = self._place / "hashes.json"
        entry = {"size": 9, "mtime_ns": 9, "sha256": "a" * 64, "legacy": "b" * 8}
        told = mutated({"/m/01.safetensors": entry, "/m/02.safetensors": entry}, rng, 2)
        data = damaged(encoded(told), rng) if rng.random() < 0.5 else encoded(told)
        path.write_bytes(data)
        file = str(self.corpus.models / "01.safetensors")
        stat = self.store.stat(file)

        def act() -> None:
            cache = HashCache(str(path))
            if cache.find(file, stat) is not None:
                raise Violation("a hash of nothing")
            cache.keep(file, stat, Identity("c" * 64, "d" * 8))
            if HashCache(str(path)).find(file, stat) is None:
                raise Violation("a hash that was not kept")

        return Case(act, len(data))

    # what is typed, or stands in a config

    def selection(self, rng: Random) -> Case:
        """A list of ids, as a text, a list or switches."""
        models = ModelSet({"01": "/m/1", "02": "/m/2", "x1": "/m/x"}, {"0a": ("01", "02")}, "/m")
        text = "".join(
            rng.choice((*IDS, *NAMES[:12], "--", ",", "=", "-", " ", "all", "all but", "9" * 5000, "=2"))
            for _ in range(rng.randrange(9))
        )
        written: Any = rng.choice((text, [value(rng) for _ in range(3)], {text: rng.choice((True, False, 3))}))
        return Case(lambda: parse_selection("models", written, models), len(text) + _size(written))

    def nodes(self, rng: Random) -> Case:
        """A tree in a config."""
        told: dict[str, Any] = {"a": ["01", "02"], "b": ["a", "03", 0.3], "c": {"a": "b", "b": "01", "bake": "02"}}
        told = mutated(told, rng, rng.choice((1, 2, 4)))
        models = ModelSet({id: f"/m/{id}" for id in IDS}, {}, "/m")
        return Case(lambda: recorded_tree(read_merges(told, None), models).weights(), _size(told))

    def names(self, rng: Random) -> Case:
        """Files of any name in a directory, composites of any shape, sizes of any kind."""
        names = [f"/m/{rng.choice(NAMES).replace('/', '_')[:200]}.safetensors" for _ in range(rng.randrange(1, 5))]
        ids = [f"c{n}" for n in range(rng.choice((2, 5, 60)))]
        composites = {id: (rng.choice((*ids, "01", *NAMES)), rng.choice((*ids, "01"))) for id in ids}
        if rng.random() < 0.3:
            composites = {f"c{n}": (f"c{n + 1}", f"0{n + 1}") for n in range(60)}
        size = str(rng.choice((*NAMES, *NUMBERS, "1GiB", "9" * 5000 + "TB"))) if rng.random() < 0.5 else "1GiB"

        def act() -> None:
            for id in islice((models := model_set(names, "{id}.safetensors", composites, {}, "/m")).composites, 3):
                models.shares([id])
            to_bytes(size)

        return Case(act, sum(map(len, names)) + len(ids) * 100 + len(size))

    # helpers

    def _small(self, rng: Random) -> bytes:
        return hostile_file({"__metadata__": {"format": "pt"}, **self.corpus.table}, self.corpus.body, rng)

    def _write(self, data: bytes) -> bytes:
        self._file.write_bytes(data)
        return data

    def _request(self, open: bool, rng: Random) -> Request:
        files = {"01": str(self.corpus.models / "01.safetensors"), "h": str(self._file)}
        source = replace(request(self.corpus.models, self._place).models, dir="", files=files)
        policies = Policies(missing=rng.choice(("error", "skip")), integers=rng.choice(("error", "first")))
        listed = {"listed": rng.choice(("01,h", "h,01", "h"))}
        target = [TargetRequest("merged", "merged.safetensors", selection="listed")]
        out, arch = self._place / "out", ANY if open else self.corpus.sdxl
        return request(source, out, arch=arch, policies=policies, selections=listed, targets=target)

    def _replay(self, path: str, rng: Random) -> Request:
        file = RecordedFile(path, rng.choice(("mergeflow", "webui")), rng.random() < 0.5)
        method = "pairwise" if file.tool == "webui" else "uniform"
        target = replace(RECORDED[0], file="x.safetensors" if rng.random() < 0.5 or file.tool == "webui" else "")
        asked = request(self.corpus.models, self._place / "again", targets=(target,))
        return replace(asked, recorded=file, selections={}, method=method)


def _parsed(data: bytes) -> None:
    """Raise as the parser does; what it takes the library takes as well."""
    header = Safetensors().parse(reading(data), len(data))
    for info in header.tensors.values():
        if not 8 <= info.begin <= info.end <= len(data):
            raise Violation(f"a tensor at {info.begin} to {info.end} of {len(data)} bytes")
    read = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    if read.keys() != header.tensors.keys():
        raise Violation("the library finds other tensors")


def _opened(found: object) -> None:
    if isinstance(found, MergeflowError):
        raise found


def _explained(asked: Request, store: GuardedStore) -> None:
    """Plan what is asked for, and look at every sentence that would be shown."""
    plan = open_plan(asked, store)
    said(explain(plan).replace("\n", "\n  "))
    for problem in plan.problems:
        said(str(problem))
    for note in plan.notes:
        said(note)


def _changed(metadata: dict[str, str], rng: Random) -> dict[str, str]:
    """Metadata with one of its JSON texts changed within, or damaged, or with something else in its place."""
    made = dict(metadata)
    key = rng.choice([key for key, text in made.items() if text.lstrip().startswith("{")])
    kind = rng.randrange(6)
    if kind <= 3:
        made[key] = encoded(mutated(json.loads(made[key]), rng, rng.choice((1, 1, 2, 5)))).decode("utf-8", "replace")
    elif kind == 4:
        made[key] = damaged(made[key].encode(), rng).decode("utf-8", "replace")
    else:
        made[key] = encoded(value(rng)).decode("utf-8", "replace")
    return made


def _size(told: object) -> int:
    """About how many bytes say that."""
    return len(encoded(told)) if not isinstance(told, str) else len(told)
