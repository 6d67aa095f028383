"""The verification of one output: its plan is made once more from its own metadata, and then it is looked at.

opened = open_verification(asked)      # headers and the manifest are read; what cannot be verified is refused
verification = verify(opened)          # tiles are read and computed: opened.bytes_to_read
"""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeflow.errors import ConfigError, FormatError, MergeflowError, UsageError
from mergeflow.execute.digest import LENGTH, digest_of_tensors
from mergeflow.execute.watch import refuse_changed
from mergeflow.formats.safetensors import METADATA, Safetensors
from mergeflow.inputs import Inputs, open_checkpoint, silent
from mergeflow.plan.make import make_plan
from mergeflow.recipe.reading import KEY, Unreadable, mapping, short, told_by
from mergeflow.recipe.request import REST, Budget, Policies, RecordedFile, Request, TargetRequest
from mergeflow.storage.local import LocalStore
from mergeflow.verify import header, manifest
from mergeflow.verify.result import Count, Finding, Verification
from mergeflow.verify.sample import draw
from mergeflow.verify.tiles import Files, Tensor, look, size_of, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mergeflow.inputs import Progress
    from mergeflow.interfaces import Store
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.request import Recipe
    from mergeflow.recipe.verification import VerificationRequest
    from mergeflow.tensors import Checkpoint
    from mergeflow.verify.manifest import Manifest
    from mergeflow.verify.sample import Drawn

LOCAL = LocalStore()
MOST_THREADS = 8
"""Beyond, they only take the interpreter from each other."""
ENOUGH = Budget(workers=1, reads_in_flight=1, memory=1 << 50)
"""Nothing is merged, so no plan is too large."""
SECOND_COPY = "sd_merge_recipe"


@dataclass(frozen=True)
class Opened:
    """A file whose recipe is understood, and what is known of it from headers and the manifest."""

    asked: VerificationRequest
    file: Checkpoint
    told: Mapping[str, Any]
    """The recipe, as the metadata have it."""
    plan: Plan
    changed: tuple[str, ...]
    """Sources whose size or header is another one now, in sentences."""
    manifest: Manifest
    tensors: tuple[Tensor, ...]
    drawn: tuple[Drawn, ...]
    findings: tuple[Finding, ...] = field(repr=False)
    header_bytes: int

    @property
    def bytes_to_read(self) -> int:
        """Of the tiles in all files, and of the whole file where its digest can be compared with another."""
        tiles = sum(size_of(self.tensors[tile.tensor], tile) for tile in self.drawn)
        return tiles + (0 if self.manifest.digest is None else self.file.stat.size - self.header_bytes)


def open_verification(asked: VerificationRequest, store: Store = LOCAL, progress: Progress = silent) -> Opened:
    """Read headers and the manifest, and make the plan once more.

    Raises `ConfigError` for a file that has no recipe, `SelectionError` for models that are not there, and
    `StorageError` or `FormatError` for a file that cannot be read. What does not agree is in `findings`.
    """
    format = Safetensors()
    file = open_checkpoint("file", asked.path, store, format, called=str)
    if isinstance(file, MergeflowError):
        raise file
    told = _recipe_in(file)
    inputs = Inputs(_request(asked), store, format, progress)
    try:
        recipe = inputs.recipe()
    except UsageError as error:
        raise _damaged(file, told, error) or error from error
    checkpoints, unread = inputs.checkpoints(recipe)
    plan = make_plan(recipe, checkpoints, format, asked.out)
    findings = [Finding("sources", str(problem)) for problem in unread]
    findings += [Finding("sources", text) for text in inputs.notes]
    findings += [Finding("plan", f"its recipe cannot be carried out: {problem}") for problem in plan.problems]
    head = _head(file, store)
    if plan.outputs:
        layout = plan.outputs[0].layout
        metadata = None if inputs.notes else json.loads(layout.head[LENGTH:])[METADATA]
        findings += header.differences(head, file.header, layout, metadata)
    tensors = tuple(tensors_of(plan, file, _component_of(recipe)))
    drawn = draw([tensor.candidate for tensor in tensors], asked.sample, asked.seed)
    beside = manifest.read_manifest(file, str(told.get("file")), store)
    return Opened(
        asked, file, told, plan, tuple(inputs.notes), beside, tensors, tuple(drawn), tuple(findings), len(head)
    )


def verify(
    opened: Opened,
    store: Store = LOCAL,
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> Verification:
    """Read the tiles that were drawn and compute them once more; `progress` is told the bytes read as they come.

    So many `threads` do that, by default one for each core up to `MOST_THREADS`; each needs what the rows of a tile
    take and a few MiB. Their number does not change the result. Raises `StorageError` if a file cannot be read, or was
    changed meanwhile.
    """
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS) if threads is None else threads
    began = time.perf_counter()
    digest = None
    if opened.manifest.digest is not None:
        digest = digest_of_tensors(opened.file.path, store, progress)
    with closing(Files(opened.plan, opened.file, store)) as files:
        odd = look(opened.plan, files, opened.tensors, opened.drawn, threads, progress)
    refuse_changed([opened.file], store, "verify", called=lambda _: "the file")
    refuse_changed(opened.plan.checkpoints, store, "verify")
    told = manifest.differences(opened.manifest, opened.file, opened.told, digest)
    return _result(opened, [*opened.findings, *told, *odd], digest, bool(odd), time.perf_counter() - began)


def _result(opened: Opened, findings: list[Finding], digest: str | None, odd: bool, seconds: float) -> Verification:
    tensors, drawn, plan, beside = opened.tensors, opened.drawn, opened.plan, opened.manifest
    recorded = len(opened.told["sources"])
    looked_at = {tile.tensor for tile in drawn}
    return Verification(
        file=opened.file,
        version=str(opened.told.get("mergeflow")),
        made_of=_made_of(plan),
        sample=opened.asked.sample,
        seed=opened.asked.seed,
        sources=Count(len(plan.checkpoints) - len(opened.changed), recorded),
        header_bytes=opened.header_bytes,
        header=bool(plan.outputs) and not any(finding.where in ("header", "sources") for finding in findings),
        manifest=None if beside.output is None else beside.path,
        versions=beside.versions,
        digest=digest,
        tiles=Count(len(drawn), sum(tensor.candidate.tiles for tensor in tensors)),
        tensors=Count(len(looked_at), len(tensors)),
        elements=Count(sum(tile.stop - tile.start for tile in drawn), sum(one.strip.elements for one in tensors)),
        bytes_read=opened.bytes_to_read,
        seconds=seconds,
        findings=tuple(findings),
        notes=(*beside.notes, *(_who_has_changed(opened, digest) if odd else ())),
    )


def _recipe_in(file: Checkpoint) -> Mapping[str, Any]:
    """The recipe in the metadata of a file; raises `ConfigError` where there is none to verify it by."""
    metadata = file.header.metadata
    if KEY not in metadata:
        other = ", only one of a web UI" if SECOND_COPY in metadata else ""
        raise ConfigError(
            f"file={file.path} has no recipe of mergeflow in its metadata{other}, so there is nothing to verify it by; "
            "job=compare compares it with another file"
        )
    try:
        told = told_by(metadata, file.path, "file")
    except ConfigError as error:
        raise _damaged(file, None, error) or error from error
    if "assembled" in told and "components" not in told:
        parts = told["assembled"] if isinstance(told["assembled"], dict) else {}
        names = [short(told.get("base")), *(f"{short(name)} of {short(part)}" for name, part in parts.items())]
        raise ConfigError(
            f"file={file.path} was put together by job=assemble, of {', '.join(names)}: its metadata have no recipe; "
            "verify these files instead"
        )
    return told


def _damaged(file: Checkpoint, told: Mapping[str, Any] | None, error: MergeflowError) -> FormatError | None:
    """What to say where a recipe cannot be understood and its second copy says something else."""
    try:
        copy = dict(mapping(json.loads(file.header.metadata[SECOND_COPY])))
        del copy["type"], copy["custom_name"]
    except (KeyError, ValueError, RecursionError, Unreadable):
        return None  # the copy is no better
    if copy == told:
        return None
    return FormatError(
        f"file={file.path} has its recipe twice in its metadata, and the two are not the same: it was damaged, or "
        f"edited, after it was made ({error})"
    )


def _request(asked: VerificationRequest) -> Request:
    """The request for what the file was made of; whatever the recipe tells is not asked for."""
    return Request(
        models=asked.models,
        architecture=asked.architecture,
        selections={},
        targets=(TargetRequest("recorded", "", recorded=True),),
        method="uniform",
        dtype="keep",
        policies=Policies(),
        budget=ENOUGH,
        out=asked.out,
        recorded=RecordedFile(asked.path, "mergeflow", check=False, verified=True),
    )


def _head(file: Checkpoint, store: Store) -> bytes:
    """The first bytes of the file, up to the first tensor."""
    begin = min((info.begin for info in file.header.tensors.values()), default=file.stat.size)
    head = bytearray(begin)
    with closing(store.reader(file.path)) as reader:
        reader.read_into(memoryview(head), 0)
    return bytes(head)


def _component_of(recipe: Recipe) -> Callable[[str], str]:
    return lambda key: recipe.architecture.component_of(key) or REST


def _made_of(plan: Plan) -> dict[str, str]:
    """What each component is made of, in words."""
    parts = plan.outputs[0].target.parts if plan.outputs else ()
    return {
        part.component: f"model {part.entries[0]} as it is"
        if part.method == "copy"
        else f"{part.method} of {len(part.shares)} model(s)"
        for part in parts
    }


def _who_has_changed(opened: Opened, digest: str | None) -> list[str]:
    """Whether it is the file or a source that is not what it was, as far as the manifest tells."""
    if digest is None or digest != opened.manifest.digest:
        return []
    stats = {one.id: one.stat for one in opened.plan.checkpoints}
    written = manifest.written_since(opened.manifest, stats)
    who = f"; written to since: model(s) {', '.join(written)}" if written else ""
    return [f"the tensors are still those that the merge wrote, by the manifest, so that a source has changed{who}"]
