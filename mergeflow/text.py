r"""Text from files that anybody may have written, for people: short, on one line, and without power over a terminal.

Names of tensors, models and files, and whatever metadata says, are shown by `shown` or `printable` where a sentence is
made. `harmless` is for whole sentences, where they leave the program: what was overlooked before does no harm there.
"""

from __future__ import annotations

import re
from reprlib import Repr

LONGEST_NAME = 400
"""Characters of a name that are shown: more than any tensor has, and than a person reads."""
LONGEST_PATH = 5000
"""Of a path: as long as the system has any, because a person may want to copy it."""
_UNSHOWN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""Control characters, what terminals obey, what reorders a line, and what is no character."""
_SHORT = Repr()
_HARMFUL = re.compile(f"[{_UNSHOWN}]")
_HARMFUL_IN_NAMES = re.compile(f"[\t\n{_UNSHOWN}]")


def harmless(text: str) -> str:
    r"""`text`, with what a terminal would obey written out; line breaks and tabs stay.

    >>> harmless("a\x1b[2Jb\nc")
    'a\\x1b[2Jb\nc'
    """
    return _HARMFUL.sub(_written_out, text)


def shown(name: str, limit: int = LONGEST_NAME) -> str:
    r"""A name as it may stand in a sentence: one line, at most `limit` characters, otherwise as it is.

    >>> shown("key"), shown("a\nb\x1b"), shown("abcdefgh", 6)
    ('key', 'a\\nb\\x1b', 'abc...')
    """
    made = _HARMFUL_IN_NAMES.sub(_written_out, name[: limit + 1])
    return made if len(made) <= limit else f"{made[: limit - 3]}..."


def printable(text: str, limit: int = 80) -> str:
    r"""A name as metadata tells it: whoever wrote the metadata may have put anything into it.

    >>> printable("a\x1b[2Jb"), printable("abcdefgh", 6)
    ('a?[2Jb', 'abc...')
    """
    made = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return made if len(made) <= limit else f"{made[: limit - 3]}..."


def short(value: object, limit: int = 60) -> str:
    r"""Any value of a config, as Python writes it, in a few characters.

    >>> short([1, 2]), short("a" * 100, 9)
    ('[1, 2]', "'aa...aa'")
    """
    _SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = limit
    try:
        return shown(_SHORT.repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"


def some(names: list[str], limit: int = 4) -> str:
    """Names for a message: the first few, and how many more."""
    told = ", ".join(map(shown, names[:limit]))
    return told if len(names) <= limit else f"{told} and {len(names) - limit:,} more"


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
