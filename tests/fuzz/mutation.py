"""Files and texts that somebody may have made to do harm: real ones, changed by chance and by malice.

A case is drawn from a `random.Random`, so a seed and a number say which it was.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

BELL, CLEAR = "\x07", "\x1b[2J\x1b[31m"
LINK = "[link=https://example.org][bold]x[/bold][/link]:bomb:"
NAMES: tuple[str, ...] = (
    "",
    CLEAR,
    f"\x1b]0;title{BELL}",
    "line\nmergeflow: all is well\r\n",
    LINK,
    "\u202egnp.stnemucod",
    "\x9b31m\x00\x7f",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    "__metadata__",
    "${oc.env:HOME}",
    "{0.__class__}%s%n",
    "n" * 100_000,
    "é\u0301" * 5000,
    "\U0010ffff",
    "9" * 5000,
    "0x10",
    "model.safetensors",
    "https://user:hunter2hunter2@example.org/a?token=abc",
    "null",
    "all but",
    "--,05=3",
)
"""What may stand where a name is expected."""
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**4000),
    *(0.5, -0.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")),
    *(True, False, None),
)
TOKENS: tuple[bytes, ...] = (
    *(b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 5000, b"0" * 50, b"-0", b"1E400", b"0.1e-5000"),
    *(b"[" * 2000, b'{"a":' * 2000, b"]}", b"[]", b"{}", b'""', b"null", b"true", b",", b":", b'"', b"\\"),
    *(b'"\\ud800"', b"\\udc00", b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\x1b[2J", b"\xc0\x80"),
    *(b'"__metadata__":{}', b'"__metadata__":', b'"dtype":"F16"', b'"data_offsets":[0,0]', b'"shape":[0]'),
    *(b"18446744073709551616", b"9223372036854775807", b"-9223372036854775808", b"4611686018427387904"),
    *(b"PK\x03\x04", b"\x80\x04\x95", b"cos\nsystem\n(S'true'\ntR.", b"GGUF", b"<html>"),
)
"""What is spliced into bytes."""
LENGTHS = (0, 1, 2, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**53, 2**63 - 9, 2**63 - 1, 2**63, 2**64 - 1)


def nested(rng: Random) -> Any:
    """Lists or tables within each other, near the depths at which readers give up, or beyond."""
    made: Any = []
    for _ in range(rng.choice((3, 50, 300, 900, 960, 975, 985, 990, 995))):
        made = [made] if rng.random() < 0.5 else {"a": made}
    return made


def value(rng: Random) -> Any:
    """Anything that JSON can say."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(NAMES)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return [value(rng) for _ in range(rng.randrange(4))]
    if kind == 3:
        return {rng.choice(NAMES): value(rng) for _ in range(rng.randrange(3))}
    if kind == 4:
        return nested(rng) if rng.random() < 0.2 else [rng.choice(NUMBERS)] * rng.choice((2, 65, 300))
    return rng.choice(("F16", "F8_E8M0", "bool", "webui", "mergeflow", "Weighted sum", "a" * 64))


def encoded(told: Any) -> bytes:
    """JSON as Python writes it: with NaN and halves of characters; what cannot be written is left empty."""
    try:
        return json.dumps(told).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return b"{}"


def mutated(told: Any, rng: Random, changes: int = 1) -> Any:
    """A copy of plain data with some places replaced, removed, doubled or exchanged."""
    made = json.loads(json.dumps(told))
    for _ in range(changes):
        _change(made, rng)
    return made


def _change(top: Any, rng: Random) -> None:
    """One change, at a place to which a walk by chance leads."""
    here = top
    while True:
        places: list[Any] = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not places:
            if isinstance(here, dict):
                here[rng.choice(NAMES)] = value(rng)
            else:
                here.append(value(rng))
            return
        at = rng.choice(places)
        below = here[at]
        if isinstance(below, (dict, list)) and rng.random() < 0.8:
            here = below
            continue
        action = rng.randrange(6)
        if action == 0 or (action == 3 and isinstance(here, dict)):
            del here[at]
        elif action == 1:
            other = rng.choice(places)
            here[at], here[other] = here[other], here[at]
        elif action == 2 and isinstance(here, dict):
            here[rng.choice(NAMES)] = here.pop(at)
        elif action == 3:
            here.insert(at, here[at])
        else:
            here[at] = value(rng)
        return


def damaged(data: bytes, rng: Random, changes: int = 1) -> bytes:
    """Bytes with bits turned, cut, repeated, or something spliced in."""
    made = bytearray(data)
    for _ in range(changes):
        at = rng.randrange(len(made) + 1)
        action = rng.randrange(6)
        if action == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del made[at:]
        elif action == 2:
            del made[at : at + rng.choice((1, 2, 8, 64))]
        elif action == 3:
            made[at:at] = made[at : at + rng.choice((1, 8, 64, 500))]
        else:
            token = rng.choice(TOKENS)
            made[at : at + (len(token) if action == 4 else 0)] = token
    return bytes(made)


def file_of(head: bytes, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file with that header and those tensors."""
    return (len(head) if length is None else length).to_bytes(8, "little") + head + body


def hostile_file(table: dict[str, Any], body: bytes, rng: Random) -> bytes:
    """A file that was one, with a header of these entries, until something was done to it."""
    kind = rng.randrange(8)
    if kind <= 3:
        return file_of(encoded(mutated(table, rng, rng.choice((1, 1, 2, 5)))), body)
    head = encoded(table)
    if kind == 4:
        return file_of(damaged(head, rng, rng.choice((1, 1, 3))), body)
    if kind == 5:
        return damaged(file_of(head, body), rng, rng.choice((1, 1, 3)))
    if kind == 6:
        return file_of(head, body, rng.choice((*LENGTHS, len(head) - 1, len(head) + 1, len(head) + len(body))))
    return file_of(crafted(table, rng), body)


def crafted(table: dict[str, Any], rng: Random) -> bytes:
    """Headers that chance would not find: keys twice, shapes whose product is huge, offsets that overlap, and more."""
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: b'{"k":%s,"k":%s}' % ((encoded({"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}),) * 2),
        lambda: encoded({**table, "t": {"dtype": "F16", "shape": [2**20] * 50, "data_offsets": [0, 0]}}),
        lambda: encoded(
            {**table, "t": {"dtype": "U8", "shape": [99] * rng.choice((64, 65, 20_000)), "data_offsets": [0, 0]}}
        ),
        lambda: encoded({f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(3000)}),
        lambda: encoded({key: {**one, "data_offsets": [0, 1]} for key, one in table.items() if key != "__metadata__"}),
        lambda: encoded(dict(reversed(table.items()))),
        lambda: b'{"k":' + rng.choice((b"[", b'{"a":')) * rng.choice((100, 990, 100_000)),
        lambda: b"{" + b" " * 20_000 + b"}",
        lambda: encoded({"__metadata__": {rng.choice(NAMES): rng.choice(NAMES) for _ in range(9)}, **table}),
        lambda: encoded({rng.choice(NAMES) + str(n): one for n, one in enumerate(table.values())}),
        lambda: b'{"__metadata__":{"a":"' + b"x" * 50_000 + b'"}}',
        lambda: b"[" + b"{}," * 5000 + b"{}]",
        lambda: b'{"k":[' + b"{}," * 5000 + b"{}]}",
    )
    return rng.choice(makers)()
