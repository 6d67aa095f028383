"""`compare.json`: how two files differ, for programs."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow import __version__
from mergeflow.compare.ulp import BOUNDS
from mergeflow.errors import StorageError
from mergeflow.redaction import redacted_data

if TYPE_CHECKING:
    from mergeflow.compare.result import Comparison, Difference, KeyDifference
    from mergeflow.compare.statistics import Peak, Statistics
    from mergeflow.tensors import Checkpoint

NAME = "compare.json"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything as plain data. Files are told by name: it may be published. What is not finite is None."""
    total = comparison.total
    kinds = Counter((match.a.dtype.code, match.b.dtype.code) for match in total.dtypes)
    return {
        "mergeflow": __version__,
        "a": _file(comparison.a),
        "b": _file(comparison.b),
        "equal": total.equal,
        "total": _difference(total),
        "components": {difference.component: _difference(difference) for difference in comparison.components},
        "blocks": [
            {"component": block.component, "stage": block.stage, "number": block.number, **_sizes(block.statistics)}
            for block in comparison.blocks()
        ],
        "worst": [_tensor(tensor) for tensor in comparison.worst()],
        "keys_only_in_a": list(total.only_a),
        "keys_only_in_b": list(total.only_b),
        "shapes_differ": [
            {"key": match.key, "a": list(match.a.shape), "b": list(match.b.shape)} for match in total.shapes
        ],
        "dtypes_differ": [{"a": a, "b": b, "tensors": count} for (a, b), count in kinds.most_common()],
        "histogram_bounds": list(BOUNDS),
        "bytes_read": comparison.bytes_read,
        "seconds": round(comparison.seconds, 3),
    }


def write_json(content: dict[str, Any], directory: str, name: str = NAME) -> Path:
    """Put `content` into `directory`, which is made if need be, as `name`; raises `StorageError`."""
    path = Path(directory) / name
    text = json.dumps(redacted_data(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode(errors="backslashreplace"))  # file names need not be text
    return path


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all; raises `StorageError`."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise StorageError(f"{path} cannot be written: {error.strerror}; choose another out=") from error


def _file(side: Checkpoint) -> dict[str, Any]:
    return {
        "name": Path(side.path).name,
        "size": side.stat.size,
        "tensors": len(side.header.tensors),
        "header_sha256": side.header.digest,
    }


def _difference(difference: Difference) -> dict[str, Any]:
    found = difference.statistics
    return {
        "tensors": difference.tensors,
        "only_in_a": len(difference.only_a),
        "only_in_b": len(difference.only_b),
        "other_shape": len(difference.shapes),
        "other_dtype": len(difference.dtypes),
        **_sizes(found),
        "largest": _peak(found.largest),
        "furthest_ulp": _peak(found.furthest),
        "histogram": list(found.histogram),
    }


def _tensor(tensor: KeyDifference) -> dict[str, Any]:
    found = tensor.statistics
    return {
        "key": tensor.key,
        "component": tensor.component,
        "dtypes": [tensor.a.code, tensor.b.code],
        "ulp_of": tensor.unit.code if tensor.unit else None,
        "shape": list(tensor.shape),
        **_sizes(found),
        "largest": _peak(found.largest),
        "furthest_ulp": _peak(found.furthest),
    }


def _sizes(found: Statistics) -> dict[str, Any]:
    return {
        "elements": found.elements,
        "differing": found.differing,
        "share": found.share,
        "nonfinite": found.nonfinite,
        "l2": _finite(found.l2),
        "norm_a": _finite(found.norm),
        "relative_l2": _finite(found.relative_l2),
        "cosine": found.cosine,
    }


def _peak(peak: Peak | None) -> dict[str, Any] | None:
    if peak is None:
        return None
    return {"size": _finite(peak.size), "key": peak.key, "element": peak.element, "a": peak.a, "b": peak.b}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
