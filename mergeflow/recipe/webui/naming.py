"""What the names of merged files say: which models they name, and which file a recorded name means."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_NAME = 255
"""What a file system allows a name to have; a longer one was never a file's."""
MAX_CUTS = 64
"""A name where others may begin and end in more places is read for its ids only; with so many ids, not at all."""

_LETTER = r"[^\W\d_]"
_ID = re.compile(rf"_?{_LETTER}+\d+{_LETTER}?(?=_?{_LETTER}+\d|\W|_|$)")
"""How collections are numbered: `_x41`, `x27a`. `x27ax28a` is two of them."""
_OWN_ID = re.compile(rf"(_?{_LETTER}+\d+{_LETTER}?)(?![^\W_]|_?{_LETTER}+\d)")
_MULTIPLIER = re.compile(r"(?<![^\W_])\d+(\.\d+)?(?=\()")
"""As the web UI puts it before a name: `0.5(first) + 0.5(second)`."""
_EXTENSION = re.compile(r"\.(safetensors|ckpt|pt|pth|bin)$", re.IGNORECASE)


def stem(name: str) -> str:
    r"""A file name without directory and extension; Windows' separators may have been doubled on the way.

    >>> stem("sdxl\\\\_x41-some_v1.5.safetensors"), stem("sdxl/model_v1.5")
    ('_x41-some_v1.5', 'model_v1.5')
    """
    return _EXTENSION.sub("", re.split(r"[\\/]", name.rstrip("\\/"))[-1])


def comparable(text: str) -> str:
    """The form in which names are compared: some systems ignore case, and some store accents apart."""
    return unicodedata.normalize("NFC", text).casefold()


def own_id(name: str) -> str | None:
    """The id that a name begins with.

    >>> own_id("_x41-deep_v1"), own_id("x38a-x36ax37a"), own_id("x36ax37a"), own_id("sd_xl_base")
    ('_x41', 'x38a', None, None)
    """
    match = _OWN_ID.match(name)
    return match[1] if match else None


def vocabulary(names: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    """The models that a word may mean, by their whole names and by the ids that these begin with."""
    found: dict[str, dict[int, None]] = {}
    for number, name in names.items():
        word = comparable(name)
        if 0 < len(word) <= MAX_NAME and not word.isdecimal():  # the multiplier in a name is no model
            for spelling in (word, own_id(word) or word):
                found.setdefault(spelling, {})[number] = None
    return {word: tuple(numbers) for word, numbers in found.items()}


def mentioned(
    text: str, count: int, known: Mapping[str, Sequence[int]], but: int = 0, default: bool = False
) -> list[tuple[int, ...]]:
    """The models that each of the `count` names in the name of merge `but` may mean; empty if it names others too.

    Of two names the longer is meant, and an id that no model has means (). Nothing is said by a text that has other
    words, or an id that goes on with a dash: they may belong to a name that is no longer known. The `default` name is
    the web UI's; one that a person gave may begin with the id of the result.

    >>> mentioned("x02a-_x03_x41", 2, {"_x03": [5], "_x41": [7], "x02a": [9]}, but=9)
    [(5,), (7,)]
    >>> mentioned("0.7(mix) + 0.3(juggernaut)", 2, {"mix": [5], "juggernaut": [6]}, default=True)
    [(5,), (6,)]
    >>> mentioned("0.7(mix) + 0.3(new mix)", 2, {"mix": [5]}, default=True)
    []
    """
    text = comparable(text)
    if len(text) > MAX_NAME:
        return []
    ids = {match.start(): match.end() for match in _ID.finditer(text)}
    cuts = _cuts(text, ids)
    found: dict[int, tuple[int, ...]] = {}
    rest = ""
    reached = 0
    for start in cuts:
        if start >= reached:
            ends = [end for end in reversed(cuts) if end > start and (default or end - start < len(text))]
            meant = ((end, _meaning(text[start:end], known, but)) for end in ends)
            end, word = next(((end, word) for end, word in meant if word), (ids.get(start, start), ()))
            if end > start:
                found[start] = word
                goes_on = start in ids and end == ids[start] and text[end : end + 1] == "-" and (default or start > 0)
                rest += text[reached : end if goes_on else start] + "("
                reached = end
    rest += text[reached:]
    if any(letter.isalnum() for letter in (_MULTIPLIER.sub("", rest) if default else rest)):
        return []
    if len(found) == count + 1 and 0 in ids and not default:
        found.pop(0, None)
    return list(found.values()) if len(found) == count else []


def _cuts(text: str, ids: Mapping[int, int]) -> list[int]:
    """Where a name may begin or end: not inside a word, unless several ids were written without a space."""
    edges = {0, len(text), *ids, *ids.values()}
    words = {i for i in range(1, len(text)) if not (text[i - 1].isalnum() and text[i].isalnum())}
    return sorted(edges | words if len(edges | words) <= MAX_CUTS else edges if len(edges) <= MAX_CUTS else ())


def _meaning(word: str, known: Mapping[str, Sequence[int]], but: int) -> tuple[int, ...]:
    """An underscore before an id is easily left out, and is as easily put between two names."""
    spelled = known.get(word) or known.get(f"_{word}") or known.get(word.removeprefix("_")) or ()
    return tuple(number for number in spelled if number != but)


def numbering(paths: Mapping[str, str]) -> tuple[str, str] | None:
    """What stands before and after the id in the file names of a collection, if most of them agree.

    >>> numbering({"01": "/m/_x01-amber.safetensors", "02": "/m/_x02-quiet orchard.safetensors"})
    ('_x', '-')
    """
    forms: Counter[tuple[str, str]] = Counter()
    for id, path in paths.items():
        name, id = comparable(stem(path)), comparable(id)
        starts = [start for start in range(len(name)) if id and name.startswith(id, start)]
        forms.update({(name[:start], name[start + len(id) :][:1]) for start in starts})
    best = max(forms.items(), key=lambda item: (item[1], item[0]), default=None)
    if best is None or best[1] < 2 or 2 * best[1] <= len(paths):
        return None
    after = best[0][1]
    return best[0] if after and not after.isalnum() else None


def numbered(name: str, form: tuple[str, str]) -> str | None:
    """The id in a name of that form.

    >>> numbered("_x05-other_v3", ("_x", "-")), numbered("x05a-_x09_x10", ("_x", "-"))
    ('05', None)
    """
    before, after = form
    name = comparable(name)
    return name[len(before) :].partition(after)[0] or None if name.startswith(before) and after in name else None
