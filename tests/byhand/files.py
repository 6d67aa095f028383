"""Safetensors files, read and written without the library: a header of JSON, then bytes."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.byhand.floats import STORED, Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ALIGNED = 8
"""The header is filled up with spaces to a multiple of this many bytes."""


class File(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read(path: Path) -> File:
    """All of a file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    return File({key: _tensor(raw, start, entry) for key, entry in header.items()}, metadata)


def _tensor(raw: bytes, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    stored, count = STORED[dtype], math.prod(shape)
    if end - begin != count * stored.itemsize:
        raise ValueError(f"{end - begin} bytes are no {count} elements of {dtype}")
    values = np.frombuffer(raw, stored, count, start + begin) if count else np.empty(0, stored)
    return Tensor(dtype, values.reshape(shape))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A file with these tensors, those of the widest elements first, so that all of them lie aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data: list[bytes] = []
    place = 0
    for key in sorted(tensors, key=lambda key: (-STORED[tensors[key].dtype].itemsize, key)):
        dtype, values = tensors[key]
        if values.dtype != STORED[dtype]:
            raise ValueError(f"{key} is kept as {values.dtype}, which is not how {dtype} is stored")
        data.append(values.tobytes())
        header[key] = {"dtype": dtype, "shape": values.shape, "data_offsets": (place, place + len(data[-1]))}
        place += len(data[-1])
    described = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    described += b" " * (-len(described) % ALIGNED)
    path.write_bytes(b"".join([len(described).to_bytes(8, "little"), described, *data]))
    return path
