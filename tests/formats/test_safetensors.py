"""The format against the library that defines it.

Whatever both can read they must read alike; where this reader is stricter, the case says so and why.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mergeflow.errors import FormatError
from mergeflow.formats import safetensors as module
from mergeflow.formats.safetensors import Safetensors
from mergeflow.tensors import Dtype, Header, TensorInfo
from tests.conformance.format import METADATA, SMALL, TABLES, TEXT, Bytes, FormatConformance, Table, file_of, parse

if TYPE_CHECKING:
    from pathlib import Path

    from mergeflow.interfaces import Format


class TestSafetensors(FormatConformance):
    def make(self) -> Format:
        return Safetensors()


def saved(table: Table, metadata: dict[str, str]) -> bytes:
    """The file that the library makes, every tensor zero."""
    tensors = {key: torch.zeros(shape, dtype=getattr(torch, dtype.torch_name)) for key, dtype, shape in table}
    return safetensors.torch.save(tensors, metadata or None)


def library_reads(data: bytes, path: Path) -> str:
    """The first thing that the library says against a file: nothing, if it loads it and can list it."""
    path.write_bytes(data)
    try:
        with safetensors.safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                opened.get_tensor(key)
        safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError) as error:
        return repr(error)
    return ""


# writing


@given(TABLES, st.dictionaries(TEXT, TEXT, max_size=1))
@example(
    [('a"\\\b\f\n\r\t\x01\x1f\x7f\x80/ü\u2028\ue000\ufffd\U0001f600', Dtype.F16, (2,))], {"ключ": "\x00\U0010ffff"}
)
@example([(code, dtype, (3, 1)) for code, dtype in zip("rqponmlkjihgfedcba", Dtype, strict=True)], {"format": "pt"})
@example([("\ufffd", Dtype.F16, (1,)), ("\U00010000", Dtype.F16, (1,)), ("z", Dtype.F16, (0,))], {})
def test_a_file_is_laid_out_byte_for_byte_as_the_library_saves_it(table: Table, metadata: dict[str, str]) -> None:
    assert file_of(Safetensors().layout(table, metadata)) == saved(table, metadata)


@given(TABLES, METADATA)
def test_what_the_library_saves_is_read(table: Table, metadata: dict[str, str]) -> None:
    header = parse(Safetensors(), saved(table, metadata))
    assert {(key, info.dtype, info.shape) for key, info in header.tensors.items()} == set(table)
    assert header.metadata == metadata


def test_several_metadata_keys_are_sorted_and_the_library_loads_them(tmp_path: Path) -> None:
    metadata = {key: key.upper() for key in ("zeta", "alpha", "mergeflow", "format", "Ünder")}
    layout = Safetensors().layout(SMALL, metadata)
    path = tmp_path / "file.safetensors"
    path.write_bytes(file_of(layout))
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == metadata
    written = json.loads(layout.head[8:])["__metadata__"]
    assert list(written) == ["alpha", "format", "mergeflow", "zeta", "Ünder"]


def test_tensors_lie_where_the_library_finds_them(tmp_path: Path) -> None:
    layout = Safetensors().layout(SMALL, {})
    data = bytearray(file_of(layout))
    for number, info in enumerate(layout.tensors.values()):
        data[info.begin : info.end] = bytes([number + 1]) * (info.end - info.begin)
    for number, (key, info) in enumerate(layout.tensors.items()):
        tensor = safetensors.torch.load(bytes(data))[key]
        assert tuple(tensor.shape) == info.shape
        assert set(tensor.contiguous().view(-1).view(torch.uint8).tolist()) <= {number + 1}


def test_a_tensor_cannot_have_the_name_of_the_metadata() -> None:
    with pytest.raises(FormatError, match="'__metadata__'"):
        Safetensors().layout([("__metadata__", Dtype.F16, (1,))], {})


def test_a_header_that_no_reader_would_accept_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MAX_HEADER_BYTES == 100_000_000, "the limit of the library, which the malformed files below check"
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(FormatError, match=r"1,032 bytes long, and no reader accepts more than 1,000"):
        Safetensors().layout([], {"recipe": "x" * 1000})


# reading


def header(table: object, length: int | None = None) -> bytes:
    """The head of a file: JSON of any object, or text as it stands."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(begin: int, end: int, **fields: Any) -> dict[str, Any]:
    """An fp16 tensor at these bytes, with some fields changed."""
    return {"dtype": "F16", "shape": [(end - begin) // 2], "data_offsets": [begin, end], **fields}


def one(**fields: Any) -> bytes:
    """A file with one fp16 tensor of four bytes, 'key', with some fields changed."""
    return header({"key": entry(0, 4, **fields)}) + bytes(4)


def test_a_valid_file_of_the_builders_is_read(tmp_path: Path) -> None:
    data = one()
    assert parse(Safetensors(), data).tensors == {"key": TensorInfo(Dtype.F16, (2,), len(data) - 4, len(data))}
    assert library_reads(data, tmp_path / "file") == ""


@dataclass(frozen=True)
class Malformed:
    """A file that must be refused."""

    id: str
    data: bytes
    texts: tuple[str, ...]
    """What the message must name."""
    library_accepts: str = ""
    """Why it is refused here, if the library lets it pass."""


ENTRY = b'{"dtype":"F16","shape":[2],"data_offsets":[0,4]}'
DUPLICATE = "of two values only the last would be seen; the format's own text forbids it"
SERDE = "an accident of the library's JSON reader; no other reader understands it"

MALFORMED = [
    # the length
    Malformed("empty", b"", ("0 bytes",)),
    Malformed("seven-bytes", bytes(7), ("7 bytes",)),
    Malformed("only-zeros", bytes(4096), ("0 bytes long", "not finished")),
    Malformed("length-beyond-the-file", header(b"{}", length=100), ("100 bytes", "only 2", "truncated")),
    Malformed("length-one-beyond-the-file", header(b"{}", length=3), ("3 bytes", "only 2")),
    Malformed("length-over-the-limit", header(b"{}", length=100_000_001), ("100,000,001", "not a safetensors file")),
    Malformed("length-of-64-bits", header(b"{}", length=2**64 - 1), ("18,446,744,073,709,551,615",)),
    Malformed("a-zip-of-torch", b"PK\x03\x04\0\0\x08\x08" + bytes(100), ("zip archive", "torch.save", "convert it")),
    Malformed("a-pickle", b"\x80\x02}q\0X\x01\0\0\0" + bytes(100), ("pickle", "torch.save", "convert it")),
    Malformed("a-gguf", b"GGUF\3\0\0\0" + bytes(100), ("GGUF",)),
    Malformed("an-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS pointer", "git lfs pull")),
    Malformed("a-web-page", b"<!DOCTYPE html><html>", ("web page",)),
    # the text
    Malformed("not-json", header(b"{'key':1}"), ("not JSON", "column 2")),
    Malformed("cut-json", header(b'{"key":'), ("not JSON", "column 8")),
    Malformed("text-after-json", header(b'{"key":' + ENTRY + b"}x") + bytes(4), ("not JSON", "Extra data")),
    Malformed("zeros-after-json", header(b'{"key":' + ENTRY + b"}\0\0") + bytes(4), ("not JSON", "Extra data")),
    Malformed("control-character", header(b'{"a\nb":' + ENTRY + b"}") + bytes(4), ("not JSON", "control character")),
    Malformed("not-utf8", header(b'{"\xff":1}'), ("not UTF-8", "byte 2")),
    Malformed("utf8-of-half-a-character", header(b'{"\xed\xa0\x80":1}'), ("not UTF-8", "byte 2")),
    Malformed("escape-of-half-a-character", header(b'{"\\ud83d":' + ENTRY + b"}") + bytes(4), ("U+D83D",)),
    Malformed("half-a-character-in-metadata", header(b'{"__metadata__":{"k":"\\udc00"}}'), ("U+DC00",)),
    Malformed("a-list", header([]), ("does not start with '{'", "'[]'")),
    Malformed("a-number", header(b"12345678"), ("does not start with '{'", "'12345678'")),
    Malformed("byte-order-mark", header(b"\xef\xbb\xbf{}"), ("does not start with '{'", "ufeff")),
    Malformed("leading-space", header(b" {}"), ("does not start with '{'",), "the format's own text demands it"),
    Malformed("nan", header(b'{"key":NaN}'), ("NaN", "not JSON")),
    Malformed("infinity", header(b'{"key":-Infinity}'), ("-Infinity", "not JSON")),
    Malformed("nested-deeply", header(b'{"key":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ("nested too deeply",)),
    Malformed("nested-objects", header(b'{"k":' * 100_000 + b"1" + b"}" * 100_000), ("nested too deeply",)),
    Malformed("digits", header(b'{"key":' + ENTRY.replace(b"2", b"9" * 5000) + b"}"), ("thousands of digits",)),
    # keys
    Malformed(
        "key-twice", header(b'{"key":' + ENTRY + b',"key":' + ENTRY + b"}") + bytes(4), ("'key' twice",), DUPLICATE
    ),
    Malformed("field-twice", header(b'{"key":{"dtype":"F16",' + ENTRY[1:] + b"}") + bytes(4), ("'dtype' twice",)),
    Malformed("metadata-twice", header(b'{"__metadata__":{},"__metadata__":{}}'), ("'__metadata__' twice",)),
    Malformed("metadata-key-twice", header(b'{"__metadata__":{"k":"1","k":"2"}}'), ("'k' twice",), DUPLICATE),
    Malformed("unprintable-key", header({"\x1b[2J\n": 1}), ("'\\x1b[2J\\n'",)),
    # entries
    Malformed("entry-a-number", header({"key": 1}), ("'key'", "dtype, shape, data_offsets")),
    Malformed("entry-null", header({"key": None}), ("'key'", "dtype, shape, data_offsets")),
    Malformed("entry-text", header({"key": "F16"}), ("'key'", "dtype, shape, data_offsets")),
    Malformed("entry-a-list", header({"key": ["F16", [2], [0, 4]]}) + bytes(4), ("'key'",), SERDE),
    Malformed(
        "extra-field", one(strides=[1]), ("'key'", "'strides'"), "a field that is ignored may change what is meant"
    ),
    *(
        Malformed(
            f"missing-{field}",
            header({"key": {k: v for k, v in entry(0, 4).items() if k != field}}) + bytes(4),
            ("'key'",),
        )
        for field in entry(0, 4)
    ),
    # metadata
    Malformed("metadata-a-number", header({"__metadata__": {"k": 1}}), ("__metadata__", "{'k': 1}")),
    Malformed("metadata-nested", header({"__metadata__": {"k": {}}}), ("__metadata__", "{'k': {}}")),
    Malformed("metadata-a-list", header({"__metadata__": ["k"]}), ("__metadata__", "['k']")),
    Malformed(
        "metadata-null", header({"__metadata__": None}), ("__metadata__", "None"), "the format's own text demands a map"
    ),
    # dtypes
    Malformed("dtype-unknown", one(dtype="F17"), ("'key'", "'F17'")),
    Malformed("dtype-lower-case", one(dtype="f16"), ("'key'", "'f16'")),
    Malformed("dtype-of-four-bits", one(dtype="F4", shape=[8]), ("'key'", "'F4'")),
    Malformed("dtype-of-scales", one(dtype="F8_E8M0", shape=[4]), ("'key'", "'F8_E8M0'")),
    Malformed("dtype-a-number", one(dtype=16), ("'key'", "dtype 16")),
    Malformed("dtype-null", one(dtype=None), ("'key'", "dtype None")),
    Malformed("dtype-a-list", one(dtype=["F16"]), ("'key'", "['F16']")),
    Malformed("dtype-an-object", one(dtype={"F16": None}), ("'key'", "{'F16': None}"), SERDE),
    # shapes
    Malformed("shape-too-small", one(shape=[1]), ("'key'", "F16 [1]", "2 bytes", "has 4")),
    Malformed("shape-too-large", one(shape=[3, 1]), ("'key'", "F16 [3, 1]", "6 bytes", "has 4")),
    Malformed("shape-0-dim", one(shape=[]), ("'key'", "F16 []", "2 bytes", "has 4")),
    Malformed("shape-empty-with-bytes", one(shape=[0]), ("'key'", "0 bytes", "has 4")),
    Malformed("shape-a-number", one(shape=2), ("'key'", "shape", "2")),
    Malformed("shape-null", one(shape=None), ("'key'", "None")),
    Malformed("shape-an-object", one(shape={}), ("'key'", "{}")),
    Malformed("shape-negative", one(shape=[-2]), ("'key'", "[-2]")),
    Malformed("shape-negative-twice", one(shape=[-2, -1]), ("'key'", "[-2, -1]")),
    Malformed("shape-float", one(shape=[2.0]), ("'key'", "[2.0]")),
    Malformed(
        "shape-infinite", header(b'{"key":' + ENTRY.replace(b"[2]", b"[1e999]") + b"}") + bytes(4), ("'key'", "[inf]")
    ),
    Malformed("shape-bool", one(shape=[2, True]), ("'key'", "[2, True]")),
    Malformed("shape-text", one(shape=["2"]), ("'key'", "['2']")),
    Malformed("shape-nested", one(shape=[[2]]), ("'key'", "[[2]]")),
    Malformed("shape-overflow", one(shape=[2**62, 2**62]), ("'key'", "impossible shape", "4611686018427387904")),
    Malformed("shape-overflow-to-0", one(shape=[2**32, 2**32], data_offsets=[0, 0]), ("'key'", "impossible shape")),
    Malformed("shape-overflow-by-the-dtype", one(shape=[2**62 + 1]), ("'key'", "impossible shape")),
    Malformed(
        "shape-overflow-before-0", one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), ("'key'", "impossible shape")
    ),
    Malformed(
        "shape-overflow-after-0", one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), ("'key'", "impossible shape")
    ),
    Malformed("shape-of-65-bits", one(shape=[2**64]), ("'key'", "impossible shape")),
    Malformed("shape-of-many-digits", one(shape=[10**4000, 10**4000]), ("'key'", "impossible shape")),
    # offsets
    Malformed("offsets-missing-one", one(data_offsets=[0]), ("'key'", "[0]")),
    Malformed("offsets-three", one(data_offsets=[0, 2, 4]), ("'key'", "[0, 2, 4]")),
    Malformed("offsets-a-number", one(data_offsets=4), ("'key'", "data_offsets", "4")),
    Malformed("offsets-text", one(data_offsets=["0", "4"]), ("'key'", "['0', '4']")),
    Malformed("offsets-an-object", one(data_offsets={"0": 0, "1": 4}), ("'key'", "data_offsets")),
    Malformed("offsets-float", one(data_offsets=[0.0, 4.0]), ("'key'", "[0.0, 4.0]")),
    Malformed("offsets-bool", one(data_offsets=[False, 4]), ("'key'", "[False, 4]")),
    Malformed("offsets-null", one(data_offsets=[None, 4]), ("'key'", "[None, 4]")),
    Malformed("offsets-negative", one(data_offsets=[-4, 0]), ("'key'", "[-4, 0]")),
    Malformed("offsets-out-of-order", one(data_offsets=[4, 0]), ("'key'", "[4, 0]")),
    Malformed("offsets-of-65-bits", one(data_offsets=[2**64, 2**64 + 4]), ("'key'", "18446744073709551620")),
    Malformed("offsets-of-many-digits", one(data_offsets=[10**4299, 10**4299 + 4]), ("'key'", "data_offsets")),
    # cover
    Malformed("overlap", header({"a": entry(0, 4), "b": entry(2, 6)}) + bytes(6), ("'b'", "overlap", "'a'")),
    Malformed("overlap-all", header({"a": entry(0, 4), "b": entry(0, 4)}) + bytes(4), ("'b'", "overlap", "'a'")),
    Malformed("overlap-by-an-empty-one", header({"a": entry(0, 4), "b": entry(2, 2)}) + bytes(4), ("'b'", "overlap")),
    Malformed("gap-at-the-start", header({"a": entry(2, 4)}) + bytes(4), ("gap of 2 bytes", "'a'")),
    Malformed("gap-between", header({"b": entry(10, 12), "a": entry(0, 4)}) + bytes(12), ("gap of 6 bytes", "'b'")),
    Malformed("out-of-range", header({"a": entry(0, 4), "b": entry(4, 8)}) + bytes(4), ("truncated", "'b'")),
    Malformed("far-out-of-range", one(shape=[2**61], data_offsets=[0, 2**62]), ("truncated", "4,611,686,018,427,38")),
    Malformed("truncated", one()[:-1], ("ends at byte", "truncated", "'key'")),
    Malformed("too-long", one() + bytes(1000), ("1,000 bytes after its last tensor",)),
    Malformed("bytes-without-tensors", header(b"{}") + b"x", ("1 bytes after",)),
]


@pytest.mark.parametrize("case", MALFORMED, ids=[case.id for case in MALFORMED])
def test_a_malformed_file_is_refused_with_its_reason(case: Malformed, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        parse(Safetensors(), case.data)
    message = str(caught.value)
    for text in case.texts:
        assert text in message
    assert message.isprintable()
    assert len(message) < 500
    assert bool(library_reads(case.data, tmp_path / "file")) != bool(case.library_accepts)


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
def test_a_refusal_leaves_the_garbage_collector_as_it_was(enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(FormatError):
            parse(Safetensors(), one(shape=[3]))
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


LENIENT = [
    pytest.param({"b": entry(0, 4), "a": entry(4, 6)}, 6, id="tensors-in-any-order"),
    pytest.param({"b": entry(4, 6), "a": entry(0, 4)}, 6, id="entries-in-any-order"),
    pytest.param({"a": entry(0, 4), "__metadata__": {"k": "v"}}, 4, id="metadata-last"),
    pytest.param({"z": entry(0, 0), "a": entry(0, 4), "y": entry(4, 4)}, 4, id="empty-tensors-at-the-edges"),
    pytest.param({"b": entry(2, 6), "m": entry(2, 2), "a": entry(0, 2)}, 6, id="empty-tensor-between"),
    pytest.param({"a": entry(0, 1, dtype="U8", shape=[]), "b": entry(1, 5)}, 5, id="not-aligned"),
    pytest.param({"a": entry(0, 0, shape=[0, 2**61])}, 0, id="large-lengths-beside-a-0"),
    pytest.param({"a": entry(0, 4, shape=[1] * 12 + [2])}, 4, id="many-dimensions"),
    pytest.param({"a\x00\x7f😀\u2028": entry(0, 4)}, 4, id="escaped-keys"),
    pytest.param({}, 0, id="no-tensors"),
    pytest.param({"__metadata__": {"true": "false", "": "null"}}, 0, id="metadata-alone"),
]


@pytest.mark.parametrize(("table", "size"), LENIENT)
@pytest.mark.parametrize("pad", [b"", b" \t\n   ", b" " * 8], ids=["bare", "whitespace", "padded"])
def test_what_is_unusual_but_allowed_is_read_as_the_library_reads_it(
    table: dict[str, Any], size: int, pad: bytes, tmp_path: Path
) -> None:
    head = header(json.dumps(table, indent=1).encode() + pad)
    path = tmp_path / "file"
    assert library_reads(head + bytes(size), path) == ""
    found = parse(Safetensors(), head + bytes(size))
    with safetensors.safe_open(path, "pt") as opened:
        assert found.metadata == (opened.metadata() or {})
        assert found.tensors.keys() == set(opened.keys())
        for key, info in found.tensors.items():
            assert list(info.shape) == opened.get_slice(key).get_shape()
            assert info.dtype.code == opened.get_slice(key).get_dtype()
            assert [info.begin - len(head), info.end - len(head)] == table[key]["data_offsets"]


def test_minus_zero_is_a_zero_though_the_library_takes_it_for_a_float(tmp_path: Path) -> None:
    data = header(b'{"key":' + ENTRY.replace(b"[0,", b"[-0,") + b"}") + bytes(4)
    assert parse(Safetensors(), data) == parse(Safetensors(), data)
    assert "floating point `-0.0`" in library_reads(data, tmp_path / "file")


def test_headers_share_what_they_repeat() -> None:
    format = Safetensors()
    first, second = (parse(format, file_of(format.layout(SMALL, {"title": title}))) for title in "ab")
    assert all(a is b for a, b in zip(first.tensors, second.tensors, strict=True))
    assert all(first.tensors[key].shape is second.tensors[key].shape for key in first.tensors)


def test_an_equal_header_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    format = Safetensors()
    data = file_of(format.layout(SMALL, {}))
    known = parse(format, data)
    monkeypatch.delattr(module, "_decode")
    assert parse(format, data) is known


@pytest.mark.parametrize("title", ["other", "a longer title", "ü", ""])
def test_a_file_that_differs_in_its_metadata_alone_is_not_decoded_again(
    title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = Safetensors()
    parse(format, file_of(format.layout(SMALL, {"title": "first"})))
    data = file_of(format.layout(SMALL, {"title": title}))
    alone = parse(Safetensors(), data)
    monkeypatch.delattr(module, "_decode")
    assert parse(format, data) == alone


@pytest.mark.parametrize(
    "metadata",
    [b'{"k":"1","k":"2"}', b'{"k":1}', b'{"k":"\\ud800"}', b'{"k":NaN}', b'["k"]', b'{"k":"\xff"}', b"[" * 100_000],
    ids=["key-twice", "number", "half-a-character", "not-a-number", "list", "no-utf-8", "nested-deeply"],
)
def test_metadata_is_refused_as_ever_where_the_tensors_are_known(metadata: bytes) -> None:
    format = Safetensors()
    table = b',"key":' + ENTRY + b"}"
    assert parse(format, header(b'{"__metadata__":{"k":"1"}' + table) + bytes(4)).tensors
    assert isinstance(outcome(format, header(b'{"__metadata__":' + metadata + table) + bytes(4)), str)


# anything at all


def outcome(format: Format, data: bytes) -> Header | str:
    """What is read of a file, or why it is refused."""
    try:
        return parse(format, data)
    except FormatError as error:
        return str(error)


def reads_no_more_than_the_library(data: bytes) -> None:
    """Parse or refuse, never accept what the library refuses, and see in it what the library sees."""
    found = outcome(Safetensors(), data)
    experienced = Safetensors()
    parse(experienced, VALID)
    assert outcome(experienced, data) == found, "what was read before makes a difference"
    if isinstance(found, str):
        return
    if b"-0" not in data:  # see the test on minus zero
        assert {key: list(info.shape) for key, info in found.tensors.items()} == deserialized(data)


def deserialized(data: bytes) -> dict[str, list[int]]:
    """The shape of every tensor, as the library has it."""
    deserialize: Any = safetensors.deserialize
    return {key: value["shape"] for key, value in deserialize(data)}


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    reads_no_more_than_the_library(data)


@given(st.binary(max_size=100))
def test_any_header_bytes_are_read_or_refused(text: bytes) -> None:
    reads_no_more_than_the_library(header(text))
    reads_no_more_than_the_library(header(b'{"' + text))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 2, 4, 2**31, 2**63, 2**64, -1])
    | st.floats()
    | st.sampled_from(["F16", "U8", "F4", "__metadata__", "dtype", "shape", "data_offsets"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "key"]) | st.text(max_size=3), inner, max_size=4
        )
    ),
    max_leaves=12,
)
"""Values that a header could hold, likely and unlikely."""

ENTRIES = st.fixed_dictionaries(
    {"dtype": JSON | st.just("U8"), "shape": JSON | st.just([2]), "data_offsets": JSON | st.just([0, 2])},
    optional={"extra": JSON},
)


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=3), st.integers(0, 4))
def test_any_json_is_read_or_refused(table: dict[str, object], size: int) -> None:
    reads_no_more_than_the_library(header(table) + bytes(size))


VALID = file_of(Safetensors().layout(SMALL, {"format": "pt", "title": 'ü "x": {1,2}'}))
HEAD = len(Safetensors().layout(SMALL, {"format": "pt", "title": 'ü "x": {1,2}'}).head)
PLACES = st.integers(0, HEAD - 1)
TOKENS = st.binary(min_size=1, max_size=4) | st.sampled_from(
    [
        b"-",
        b"9" * 30,
        b"1e9",
        b"null",
        b"true",
        b"NaN",
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b",",
        b":",
        b"\\",
        b"\\ud800",
        b" ",
    ]
)


@given(PLACES, st.integers(1, 255))
def test_a_flipped_byte_in_the_head_is_read_or_refused(place: int, bits: int) -> None:
    data = bytearray(VALID)
    data[place] ^= bits
    reads_no_more_than_the_library(bytes(data))


@given(PLACES, st.integers(0, 60), TOKENS | st.just(b""), st.booleans())
def test_a_cut_or_a_patch_in_the_head_is_read_or_refused(place: int, count: int, patch: bytes, mend: bool) -> None:
    data = VALID[:place] + patch + VALID[place + count :]
    if mend and len(data) >= 8:  # so that the length is right again and the JSON is reached
        text = VALID[8 : max(place, 8)] + patch + VALID[max(place, 8) + count : HEAD]
        data = header(text) + VALID[HEAD:]
    reads_no_more_than_the_library(data)


@given(st.lists(st.tuples(PLACES, st.integers(0, 3), TOKENS), min_size=1, max_size=3))
def test_several_patches_are_read_or_refused(patches: list[tuple[int, int, bytes]]) -> None:
    text = VALID[8:HEAD]
    for place, count, patch in patches:
        text = text[:place] + patch + text[place + count :]
    reads_no_more_than_the_library(header(text) + VALID[HEAD:])


def test_a_read_beyond_the_file_is_never_asked_for() -> None:
    for size in range(len(VALID)):
        file = Bytes(VALID[:size])
        with pytest.raises(FormatError):
            Safetensors().parse(file.read, size)
