"""The safetensors format: eight bytes of length, a JSON header, the tensors.

Nothing here touches a file: `parse` is given a way to read, `layout` returns bytes. The reference is the
`safetensors` library: what it refuses is refused here, and what it would write is written here, byte for byte
(with several metadata keys the library's order is random; here they are sorted).
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NoReturn

from mergeflow.errors import FormatError
from mergeflow.tensors import DTYPES, LAYOUT_ORDER, Header, Layout, TensorInfo, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mergeflow.interfaces import ReadBytes
    from mergeflow.tensors import Dtype

LENGTH_BYTES = 8
ALIGNMENT = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library (`MAX_HEADER_SIZE`)."""
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}


class Safetensors:
    """The one format of today. Equal headers are parsed once: collections repeat them, metadata and all."""

    name = "safetensors"

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Header] = {}

    def parse(self, read: ReadBytes, size: int) -> Header:
        """The header of a file of `size` bytes; `FormatError` says what is wrong with it."""
        raw = _read_header(read, size)
        digest = hashlib.sha256(raw).hexdigest()
        if (digest, size) not in self._known:
            table, metadata = _decode(raw)
            tensors = _tensors(table, start=LENGTH_BYTES + len(raw), size=size)
            self._known[digest, size] = Header(tensors, metadata, digest)
        return self._known[digest, size]

    def layout(self, tensors: Iterable[tuple[str, Dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
        """Where the library would put every byte: by dtype (widest first), then by key."""
        ordered = sorted(tensors, key=lambda tensor: (LAYOUT_ORDER[tensor[1]], tensor[0]))
        table: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
        placed: dict[str, TensorInfo] = {}
        offset = 0
        for key, dtype, shape in ordered:
            info = TensorInfo(dtype, shape, offset, offset)
            info = info._replace(end=offset + info.elements * dtype.itemsize)
            placed[key] = info
            table[key] = {"dtype": dtype.code, "shape": shape, "data_offsets": (info.begin, info.end)}
            offset = info.end
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        head = len(text).to_bytes(LENGTH_BYTES, "little") + text
        moved = {
            key: info._replace(begin=info.begin + len(head), end=info.end + len(head)) for key, info in placed.items()
        }
        return Layout(head, moved, len(head) + offset)


def _read_header(read: ReadBytes, size: int) -> bytes:
    if size == 0:
        _fail("it is empty (0 bytes)")
    if size < LENGTH_BYTES:
        _fail(f"it has {size} bytes, and a safetensors file starts with {LENGTH_BYTES} that give its header's length")
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        _fail(f"it is not a safetensors file (its first 8 bytes would make the header {length:,} bytes long)")
    if length > size - LENGTH_BYTES:
        _fail(f"its header should be {length:,} bytes long, but only {size - LENGTH_BYTES:,} follow; it is truncated")
    return read(LENGTH_BYTES, length)


def _decode(raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _fail(f"its header is not UTF-8 (byte {error.start})")
    if not text.startswith("{"):
        _fail("its header does not start with '{', so it is not a safetensors file")
    try:
        table = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _fail(f"its header is not JSON ({error})")
    metadata = table.pop(METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _fail(f"its {METADATA} is not a map of text to text")
    return table, metadata


def _tensors(table: dict[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
    """Every entry checked; the loop sees millions of entries in a large plan, so it stays lean."""
    tensors: dict[str, TensorInfo] = {}
    for key, entry in table.items():
        if type(entry) is not dict or entry.keys() != FIELDS:
            _fail(f"the entry of '{key}' is not {{dtype, shape, data_offsets}}")
        dtype, shape, offsets = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            _fail(f"'{key}' has the unknown dtype {entry['dtype']!r}")
        if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
            _fail(f"'{key}' has a shape or data_offsets that are not lists")
        count = dtype.itemsize
        for length in shape:
            if type(length) is not int or length < 0:
                _fail(f"'{key}' has the impossible shape {shape}")
            count *= length
        begin, end = offsets
        if type(begin) is not int or type(end) is not int or begin < 0:
            _fail(f"'{key}' has the impossible data_offsets {offsets}")
        if end < begin:
            _fail(f"the data_offsets of '{key}' are out of order: {offsets}")
        if end - begin != count:
            _fail(f"'{key}' is {dtype.code} {shape} and needs {count:,} bytes, but has {end - begin:,}")
        tensors[key] = TensorInfo(dtype, tuple(shape), start + begin, start + end)
    _check_cover(tensors, start, size)
    return tensors


def _check_cover(tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor, as the library demands."""
    end = start
    previous = "the header"
    for info, key in sorted((info[2:], key) for key, info in tensors.items()):
        if info[0] < end:
            _fail(f"the bytes of '{key}' overlap those of {previous}")
        if info[0] > end:
            _fail(f"there is a gap of {info[0] - end:,} bytes before '{key}'")
        end, previous = info[1], f"'{key}'"
    if end > size:
        beyond = [key for key, info in tensors.items() if info.end > size]
        _fail(f"it ends at byte {size:,}, but its tensors need {end:,}; it is truncated ({some(beyond)})")
    if end < size:
        _fail(f"it has {size - end:,} bytes after its last tensor")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        _fail(f"its header has the key '{next(key for key in keys if keys.count(key) > 1)}' twice")
    return made


def _no_constant(name: str) -> NoReturn:
    _fail(f"its header holds {name}, which is not JSON")


def _fail(what: str) -> NoReturn:
    raise FormatError(what)
