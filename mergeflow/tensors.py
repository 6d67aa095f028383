"""Names, dtypes, shapes and spans: values that never saw a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

ONE_BYTE, TWO_BYTES, FOUR_BYTES, EIGHT_BYTES = 1, 2, 4, 8


class Dtype(Enum):
    """A dtype as safetensors writes it, with what torch calls it.

    The members stand in the order in which the safetensors library lays tensors out: a file holds all
    tensors of the first dtype, sorted by key, then those of the next (`Dtype` of safetensors 0.8, reversed).
    """

    U64 = ("U64", EIGHT_BYTES, "uint64")
    I64 = ("I64", EIGHT_BYTES, "int64")
    F64 = ("F64", EIGHT_BYTES, "float64")
    C64 = ("C64", EIGHT_BYTES, "complex64")
    F32 = ("F32", FOUR_BYTES, "float32")
    U32 = ("U32", FOUR_BYTES, "uint32")
    I32 = ("I32", FOUR_BYTES, "int32")
    BF16 = ("BF16", TWO_BYTES, "bfloat16")
    F16 = ("F16", TWO_BYTES, "float16")
    U16 = ("U16", TWO_BYTES, "uint16")
    I16 = ("I16", TWO_BYTES, "int16")
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", ONE_BYTE, "float8_e5m2fnuz")
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", ONE_BYTE, "float8_e4m3fnuz")
    F8_E4M3 = ("F8_E4M3", ONE_BYTE, "float8_e4m3fn")
    F8_E5M2 = ("F8_E5M2", ONE_BYTE, "float8_e5m2")
    I8 = ("I8", ONE_BYTE, "int8")
    U8 = ("U8", ONE_BYTE, "uint8")
    BOOL = ("BOOL", ONE_BYTE, "bool")

    def __init__(self, code: str, itemsize: int, torch_name: str) -> None:
        self.code = code
        """The name in a safetensors header."""
        self.itemsize = itemsize
        """Bytes per element."""
        self.torch_name = torch_name
        """The attribute of the torch module."""
        self.is_float = torch_name.startswith(("float", "bfloat"))
        """Whether a mean of such values is a number of the same kind."""
        self.is_fp8 = torch_name.startswith("float8")

    # Enum hashes by name through a Python call; plans look dtypes up millions of times.
    __hash__ = object.__hash__


DTYPES: Mapping[str, Dtype] = {dtype.code: dtype for dtype in Dtype}
"""Every dtype that mergeflow reads, by its name in a safetensors header."""

LAYOUT_ORDER: Mapping[Dtype, int] = {dtype: rank for rank, dtype in enumerate(Dtype)}
"""The rank of a dtype in the order in which files are laid out."""

OUTPUT_DTYPES: Mapping[str, Dtype | None] = {
    "keep": None,
    "fp16": Dtype.F16,
    "bf16": Dtype.BF16,
    "fp32": Dtype.F32,
}
"""What `dtype=` may say; `keep` is the dtype of the target's first model, tensor by tensor."""


class TensorInfo(NamedTuple):
    """Where one tensor lies in its file, and what it is."""

    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte, counted from the start of the file."""

    @property
    def elements(self) -> int:
        """How many values; 1 for a 0-dim tensor, 0 for a zero-size one."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What the head of one checkpoint file says."""

    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, str]
    digest: str
    """SHA-256 of the header's bytes, in hex."""


@dataclass(frozen=True)
class Layout:
    """A file that does not exist yet: its head, and where every tensor will lie."""

    head: bytes = field(repr=False)
    """The first bytes of the file, up to the first tensor."""
    tensors: Mapping[str, TensorInfo]
    size: int
    """Bytes of the whole file."""


class FileStat(NamedTuple):
    """What tells that a file is still the same."""

    size: int
    """Bytes."""
    mtime_ns: int
    device: int
    inode: int

    def change(self, now: FileStat) -> str | None:
        """What became of a file that was this, in words; None if it still is.

        The device does not count: a file system that is mounted again may have another number.
        """
        if now.inode != self.inode:
            return "another file has its name"
        if now.size != self.size:
            return f"it has {now.size:,} bytes, not {self.size:,}"
        if now.mtime_ns != self.mtime_ns:
            return "it has as many bytes as before, but was written to"
        return None


class Identity(NamedTuple):
    """What a file is known by among web UIs; None where nobody has read enough of it."""

    sha256: str | None = None
    """Of the whole file, in hex."""
    legacy: str | None = None
    """What they called a checkpoint by before: 8 hex digits of a small part of it."""


UNKNOWN = Identity()


@dataclass(frozen=True)
class Checkpoint:
    """One model's tensors, as its header tells them."""

    id: str
    path: str
    stat: FileStat
    header: Header
    identity: Identity = UNKNOWN
    """Known where the run was asked to hash its sources."""
    called: str = ""
    """What its file was called in the recipe that is verified; empty for as it is called."""

    @property
    def name(self) -> str:
        """The name of its file, without the directory."""
        return self.called or self.path.rpartition("/")[2]


class Span(NamedTuple):
    """A run of bytes of one output: `begin <= byte < end`."""

    output: int
    begin: int
    end: int


def si_bytes(count: float) -> str:
    """Bytes for a person: `si_bytes(6_938_040_682) == '6.94 GB'`."""
    if abs(count) < 1000:
        return f"{count:,.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if abs(count) < 999.995:  # what is printed as 1000.00 belongs to the next unit
            return f"{count:,.2f} {unit}"
    return f"{count / 1000:,.2f} TB"
