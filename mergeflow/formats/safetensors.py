"""The safetensors format: eight bytes of length, a JSON header, the tensors.

Nothing here touches a file: `parse` is given a way to read, `layout` returns bytes. The reference is the
`safetensors` library: what it refuses is refused here, and what it would write is written here, byte for byte
(with several metadata keys the library's order is random; here they are sorted). Some headers are refused that
the library lets pass, each because two readers could make two things of it; the tests list them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from reprlib import Repr
from typing import TYPE_CHECKING, Any, NoReturn

from mergeflow.collector import collector_paused
from mergeflow.errors import FormatError
from mergeflow.tensors import DTYPES, LAYOUT_ORDER, Header, Layout, TensorInfo
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mergeflow.interfaces import ReadBytes
    from mergeflow.tensors import Dtype

LENGTH_BYTES = 8
ALIGNMENT = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library (`MAX_HEADER_SIZE`)."""
MAX_COUNT = 2**63 - 1
"""No byte or element has a higher number: offsets, lengths and strides are 64-bit integers wherever they are used."""
METADATA = "__metadata__"
METADATA_FIRST = b'{"__metadata__":'
FIELDS = 3
"""An entry has a dtype, a shape and data_offsets, and nothing else."""

MAX_DIMENSIONS = 64
"""What computes with tensors has no more, and products of thousands of lengths take minutes."""

LOOKALIKES = {
    b"PK\x03\x04": "it is a zip archive, as torch.save makes them; convert it to safetensors first",
    **{
        b"\x80" + bytes([protocol]): "it is a pickle, as torch.save made them; convert it to safetensors first"
        for protocol in range(2, 6)
    },
    b"GGUF": "it is a GGUF file; it has to be the safetensors file that was made before it",
    b"version ": "it is a Git LFS pointer and not the file itself; run `git lfs pull`",
    b"{": "it is JSON; a checkpoint in several files, of which this may be the index, must be saved as one file first",
    b"<": "it is a web page; what was downloaded is an error message",
}
"""What people have under the name of a checkpoint, by its first bytes."""

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class Safetensors:
    """The one format of today. Equal headers are parsed once: collections repeat them, metadata and all."""

    name = "safetensors"

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Header] = {}
        self._tables: dict[tuple[bytes, int], tuple[int, Mapping[str, TensorInfo]]] = {}
        # Hundreds of headers repeat the same keys and shapes; one copy of each saves 150 MB at 257 of them.
        self._keys: dict[str, str] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def parse(self, read: ReadBytes, size: int) -> Header:
        """The header of a file of `size` bytes; `FormatError` says what is wrong with it."""
        raw = _read_header(read, size)
        digest = hashlib.sha256(raw).hexdigest()
        if (digest, size) not in self._known:
            with collector_paused():
                tensors, metadata = self._contents(raw, start=LENGTH_BYTES + len(raw), size=size)
            self._known[digest, size] = Header(tensors, metadata, digest)
        return self._known[digest, size]

    def layout(self, tensors: Iterable[tuple[str, Dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
        """Where the library would put every byte: by dtype (widest first), then by key."""
        ordered = sorted(tensors, key=lambda tensor: (LAYOUT_ORDER[tensor[1]], tensor[0]))
        table: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
        ends: dict[str, int] = {}
        offset = 0
        for key, dtype, shape in ordered:
            if key in ends or key == METADATA:
                _fail(f"a file cannot hold a tensor named {_show(key)}{' twice' if key in ends else ''}")
            begin, offset = offset, offset + math.prod(shape) * dtype.itemsize
            table[key] = {"dtype": dtype.code, "shape": shape, "data_offsets": (begin, offset)}
            ends[key] = offset
        head = _encode(table)
        placed: dict[str, TensorInfo] = {}
        end = len(head)
        for key, dtype, shape in ordered:
            begin, end = end, len(head) + ends[key]
            placed[key] = TensorInfo(dtype, shape, begin, end)
        return Layout(head, placed, end)

    def _contents(self, raw: bytes, start: int, size: int) -> tuple[Mapping[str, TensorInfo], dict[str, str]]:
        """The tensors and the metadata. Many files differ in these alone, and then all tensors lie so much further."""
        metadata, table = _after_metadata(raw)
        known = hashlib.sha256(table).digest(), size - start
        if metadata is not None and known in self._tables:
            there, tensors = self._tables[known]
            if by := start - there:
                tensors = {
                    key: TensorInfo(t, row, begin + by, end + by) for key, (t, row, begin, end) in tensors.items()
                }
            return tensors, metadata
        decoded, metadata = _decode(raw)
        self._tables[known] = start, (tensors := self._tensors(decoded, start, size))
        return tensors, metadata

    def _tensors(self, table: dict[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
        """Every entry checked; the loop sees millions of entries in a large plan, so it stays lean."""
        tensors: dict[str, TensorInfo] = {}
        expected = start
        in_order = True
        for key, entry in table.items():
            try:
                code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            except (KeyError, TypeError):
                _fail(f"the entry of {_show(key)} is not {{dtype, shape, data_offsets}}")
            if len(entry) != FIELDS:
                _fail(f"the entry of {_show(key)} has more than {{dtype, shape, data_offsets}}: {_show(entry)}")
            dtype = DTYPES.get(code) if type(code) is str else None
            if dtype is None:
                _fail(f"{_show(key)} has the unknown dtype {_show(code)}")
            if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
                _fail(f"{_show(key)} has a shape or data_offsets that are not lists: {_show(shape)}, {_show(offsets)}")
            if len(shape) > MAX_DIMENSIONS:
                _fail(f"{_show(key)} has {len(shape):,} dimensions, and a tensor at most {MAX_DIMENSIONS}")
            count = dtype.itemsize
            for length in shape:
                if type(length) is not int or length < 0:
                    _fail(f"{_show(key)} has the impossible shape {_show(shape)}")
                count *= length
            begin, end = offsets
            if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= MAX_COUNT:
                _fail(f"{_show(key)} has the impossible data_offsets {_show(offsets)}")
            if end - begin != count or count == 0:
                _check_count(key, dtype, shape, end - begin)
            row = tuple(shape)
            row = self._shapes.setdefault(row, row)
            begin += start
            end += start
            if begin != expected:
                in_order = False
            expected = end
            tensors[self._keys.setdefault(key, key)] = TensorInfo(dtype, row, begin, end)
        if not in_order or expected != size:
            _check_cover(tensors, start, size)
        return tensors


def header_digest(read: ReadBytes, size: int) -> str:
    """The digest that `Header` has of the header of a file of `size` bytes; raises `FormatError`."""
    return hashlib.sha256(_read_header(read, size)).hexdigest()


def _read_header(read: ReadBytes, size: int) -> bytes:
    if size == 0:
        _fail("it is empty (0 bytes)")
    if size < LENGTH_BYTES:
        _fail(f"it has {size} bytes, and a safetensors file starts with {LENGTH_BYTES} that give its header's length")
    first = read(0, LENGTH_BYTES)
    length = int.from_bytes(first, "little")
    if length == 0:
        _fail("its header is 0 bytes long; a copy or a download of it was not finished")
    if length > MAX_HEADER_BYTES:
        for magic, what in LOOKALIKES.items():
            if first.startswith(magic):
                _fail(what)
        _fail(f"it is not a safetensors file (its first 8 bytes would make the header {length:,} bytes long)")
    if length > size - LENGTH_BYTES:
        _fail(f"its header should be {length:,} bytes long, but only {size - LENGTH_BYTES:,} follow; it is truncated")
    return read(LENGTH_BYTES, length)


def _encode(table: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        _fail_surrogate(error)
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        _fail(f"its header would be {len(text):,} bytes long, and no reader accepts more than {MAX_HEADER_BYTES:,}")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _decode(raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _fail(f"its header is not UTF-8 (byte {error.start})")
    if not text.startswith("{"):
        _fail(f"its header does not start with '{{' but with {_show(text[:8])}, so it is not a safetensors file")
    try:
        table = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        _fail(f"its header is not JSON ({error})")
    except RecursionError:
        _fail("its header is not a table of tensors: it is nested too deeply")
    except ValueError:  # Python refuses to read integers of more than 4300 digits.
        _fail("its header holds a number of thousands of digits")
    metadata = table.pop(METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _fail(f"its {METADATA} is not a map of text to text: {_show(metadata)}")
    try:
        "".join([*table, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        _fail_surrogate(error)
    return table, metadata


def _after_metadata(raw: bytes) -> tuple[dict[str, str] | None, bytes]:
    """Metadata that comes first, as it usually does, and what follows; None where `_decode` must have a look."""
    try:
        if raw.startswith(METADATA_FIRST):
            text = raw.decode("utf-8")
            metadata, end = _DECODER.raw_decode(text, len(METADATA_FIRST))
            if isinstance(metadata, dict):
                "".join([*metadata, *metadata.values()]).encode()  # fails where a value is no text
                return metadata, text[end:].rstrip(" ").encode()  # padding depends on the metadata
    except (ValueError, TypeError, RecursionError, FormatError):
        pass  # whoever reads all of it says what is wrong
    return None, raw


def _check_count(key: str, dtype: Dtype, shape: list[int], held: int) -> None:
    """That `held` bytes are what a tensor needs; with a 0 in a shape the other lengths must still make sense."""
    needed, strides = dtype.itemsize, dtype.itemsize
    for length in shape:
        needed *= length
        strides *= length or 1
        if strides > MAX_COUNT:
            _fail(f"{_show(key)} has the impossible shape {_show(shape)}")
    if needed != held:
        _fail(f"{_show(key)} is {dtype.code} {_show(shape)} and needs {needed:,} bytes, but has {held:,}")


def _check_cover(tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor, as the library demands."""
    end = start
    previous = "the header"
    for info, key in sorted((info[2:], key) for key, info in tensors.items()):
        if info[0] < end:
            _fail(f"the bytes of {_show(key)} overlap those of {previous}")
        if info[0] > end:
            _fail(f"there is a gap of {info[0] - end:,} bytes before {_show(key)}")
        end, previous = info[1], _show(key)
    if end > size:
        beyond = [_show(key) for key, info in tensors.items() if info.end > size]
        _fail(f"it ends at byte {size:,}, but its tensors need {end:,}; it is truncated ({some(beyond)})")
    if end < size:
        _fail(f"it has {size - end:,} bytes after its last tensor")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        often = Counter(key for key, _ in pairs).most_common(1)
        _fail(f"its header has the key {_show(often[0][0])} twice")
    return made


def _no_constant(name: str) -> NoReturn:
    _fail(f"its header holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _show(value: object) -> str:
    """Anything for a message: short whatever its size, and printable whatever its characters."""
    return _SHORT.repr(value)


def _fail_surrogate(error: UnicodeEncodeError) -> NoReturn:
    _fail(f"its header holds half a character (U+{ord(error.object[error.start]):04X}), which UTF-8 cannot write")


def _fail(what: str) -> NoReturn:
    raise FormatError(what)
