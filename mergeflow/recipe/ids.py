"""Model ids as people write them: `05`, `5` and `"05"` are one id, and 9 comes before 10."""

from __future__ import annotations

import difflib
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LEADING_ZEROS = re.compile(r"^0+(?=[0-9])")
_DIGITS = re.compile(r"([0-9]+)")


def normal(id: str) -> str:
    """The form in which ids are compared. Some systems store an accent apart from its letter; here they are one.

    >>> normal("05"), normal(" 5 "), normal("09a"), normal("0")
    ('5', '5', '9a', '0')
    """
    return _LEADING_ZEROS.sub("", unicodedata.normalize("NFC", id.strip()))


def natural(id: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that reads digits as numbers, the same on every machine and in every locale.

    >>> sorted(["10", "9a", "9", "x2", "x10"], key=natural)
    ['9', '9a', '10', 'x2', 'x10']
    """
    parts = (part for part in _DIGITS.split(id) if part)
    return tuple((0, int(part), "") if _DIGITS.fullmatch(part) else (1, 0, part) for part in parts)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for an error message, or nothing when no name is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
