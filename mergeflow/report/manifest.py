"""`manifest.json`: what a run read and wrote, beside what it wrote."""

from __future__ import annotations

import json
import os
import platform
import resource
from collections import Counter
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow import __version__
from mergeflow.plan.pace import estimate, in_words
from mergeflow.redaction import redacted_data

if TYPE_CHECKING:
    from mergeflow.merge import Result
    from mergeflow.plan.plan import Output
    from mergeflow.tensors import Checkpoint

NAME = "manifest.json"
LIBRARIES = ("torch", "safetensors", "ray", "hydra-core")


def manifest(result: Result, executor: str) -> dict[str, Any]:
    """Everything about a run as plain data. Files are told by name: a manifest may be published."""
    plan, whole = result.plan, result.whole
    return {
        "mergeflow": __version__,
        "outputs": [_output(output, digest) for output, digest in zip(plan.outputs, result.digests, strict=True)],
        "sources": [source_facts(checkpoint) for checkpoint in plan.checkpoints],
        "bytes_read": sum(receipt.bytes_read for receipt in result.receipts),
        "shared": _shared(result),
        "bytes_written": plan.bytes_written - result.resumed,
        "resumed": result.resumed,
        "seconds": round(result.seconds, 3),
        "estimate": _estimate(result),
        "startup_seconds": round(result.startup_seconds, 3),
        "bytes_per_second": round(result.moved / result.seconds),
        "memory": {
            "allowed": whole.memory.allowed,
            "projected": whole.memory.projected,
            "peak_by_process": peaks(result),
        },
        "executor": {
            "name": executor,
            "workers": plan.budget.workers,
            "reads_in_flight": whole.budget.reads_in_flight,
            "block": whole.memory.longest_read,
            "io": whole.budget.io,
            "tiles": whole.tiles,
            "shards": len(whole.shards),
        },
        "notes": list(plan.notes),
        "nonfinite": [
            {"model": model, "key": key, "values": count} for (model, key), count in sorted(result.tolerated.items())
        ],
        "repeated_reads": _repeated(result),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
    }


def source_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a source is known by."""
    return {
        "id": checkpoint.id,
        "name": Path(checkpoint.path).name,
        "size": checkpoint.stat.size,
        "mtime_ns": checkpoint.stat.mtime_ns,
        "header_sha256": checkpoint.header.digest,
    }


def output_facts(output: Output) -> dict[str, Any]:
    """What is known of an output before it is made."""
    return {
        "target": output.target.name,
        "file": Path(output.path).name,
        "size": output.layout.size,
        "tensors": len(output.layout.tensors),
    }


def write_manifest(content: dict[str, Any], directory: str) -> Path:
    """Put `content` into `directory`, whole or not at all."""
    path = Path(directory) / NAME
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(redacted_data(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def peaks(result: Result) -> dict[str, int]:
    """The most memory, in bytes, that each process of the run has had; this one is called `driver`."""
    found = {"driver": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    here = f":{os.getpid()}"
    for receipt in result.receipts:
        if not receipt.worker.endswith(here):
            found[receipt.worker] = max(found.get(receipt.worker, 0), receipt.peak_rss)
    return found


def _output(output: Output, digest: str) -> dict[str, Any]:
    dtypes = dict(output.dtypes)
    return output_facts(output) | {
        "tensors_sha256": digest,
        "components": {
            part.component: {
                "method": part.method,
                "dtype": dtypes.get(part.component),
                "list": list(part.entries),
                "shares": {id: str(share) for id, share in part.shares.items()},
            }
            for part in output.target.parts
        },
    }


def _estimate(result: Result) -> dict[str, Any] | None:
    """What a sample said before the run: how long it would take, how rows are read, and the figures behind that."""
    whole = result.whole
    expected = estimate(whole)
    if expected is None or whole.measured is None:
        return None
    return {"seconds": round(expected.total, 3)} | {"why": in_words(whole), "sample": asdict(whole.measured)}


def _repeated(result: Result) -> list[dict[str, Any]]:
    """Reads that failed before they succeeded, by model: the sign of a disk, a server or a network that is failing."""
    counts: Counter[str] = Counter()
    for receipt in result.receipts:
        counts.update(dict(receipt.repeated))
    ids = [checkpoint.id for checkpoint in result.plan.checkpoints]
    return [{"model": id, "reads": counts[id]} for id in ids if id in counts]


def _shared(result: Result) -> dict[str, int] | None:
    """What a pass for several jobs has read, and what they would have read one after the other."""
    shared = result.shared
    if shared is None:
        return None
    return {"jobs": len(shared.jobs), "bytes_read_once": shared.plan.bytes_read, "bytes_apart": shared.bytes_apart}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
