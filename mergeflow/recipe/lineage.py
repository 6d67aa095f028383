"""Which models a web UI merged where it recorded no hash.

The hashes of a recipe are read before the models are hashed, so a model that was new is recorded as null. Two things
still tell which it was:

- *Order.* `sd_merge_models` is filled with A, then with all that A's own metadata lists, then with B, and so on; a
  model that is met again keeps its first place. So the entries stand in the order in which a walk through the merges
  first meets them, and `explained` asks which fillings of the gaps make that walk meet every entry just there.
- *Names.* Who names a merge often names what went into it (`x02a-_x03_x41`), and so does the web UI when nobody does.

Models are numbers here: 0 is the file itself, and the others are numbered in the order of the entries.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Inputs = tuple["int | None", ...]
"""What a merge was made of: the number of a model, None where no hash is recorded, `UNLISTED` where a hash is
recorded that no entry has."""
Place = tuple[int, int]
"""A merge, and which of its inputs: 0 is A."""

UNLISTED = -1

MAX_ORDERED = 4096
"""More entries than this are not explained: the time that takes grows with their square."""
MAX_NAMED = 1000
"""The names of so many merges are read."""
ROUNDS = 16
"""What one gap turns out to be may settle others, so the gaps are looked at again, so many times at most."""
MAX_NAME = 255
"""What a file system allows a name to have; a longer one was never a file's."""
MAX_CUTS = 64

_LETTER = r"[^\W\d_]"
_ID = re.compile(rf"_?{_LETTER}+\d+{_LETTER}?(?=_?{_LETTER}+\d|\W|_|$)")
"""How collections are numbered: `_x41`, `x27a`. `x27ax28a` is two of them."""
_OWN_ID = re.compile(rf"(_?{_LETTER}+\d+{_LETTER}?)(?![^\W_]|_?{_LETTER}+\d)")
_EXTENSION = re.compile(r"\.(safetensors|ckpt|pt|pth|bin)$", re.IGNORECASE)


class Choice(NamedTuple):
    """What a gap may be, as the order of the entries has it."""

    new: tuple[int, ...]
    """Models that the walk would meet here for the first time."""
    before: range
    """Models that it has met before, any of which it may meet again; empty if it cannot be one of them."""

    def among(self, names: Sequence[int]) -> tuple[int, ...]:
        """Those of `names` that the order allows."""
        return tuple(number for number in names if number in self.new or number in self.before)


class Doubt(NamedTuple):
    """Why a gap stays open."""

    order: tuple[int, ...]
    """What the order of the entries allows, as far as it can be listed."""
    names: tuple[int, ...]
    """What the names say."""


# --- names ---------------------------------------------------------------------------------------------------------


def stem(name: str) -> str:
    """A file name without directory and extension; Windows' separators may have been doubled on the way.

    >>> stem("sdxl\\\\\\\\_x41-some_v1.5.safetensors"), stem("model_v1.5")
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
        if 0 < len(name) <= MAX_NAME and not name.isdecimal():  # the multiplier in a name is no model
            word = comparable(name)
            for spelling in {word, own_id(word)} - {None}:
                found.setdefault(str(spelling), {})[number] = None
    return {word: tuple(numbers) for word, numbers in found.items()}


def mentioned(text: str, known: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
    """The models that `text` names, in order, the longest name first; an id that no model has is named in vain.

    What is merged into is named first, before a dash, and may have been renamed since: it is left out.
    """
    text = comparable(text)
    if len(text) > MAX_NAME:
        return []
    ids = {match.start(): match.end() for match in _ID.finditer(text)}
    cuts = _cuts(text, ids)
    found: list[tuple[int, ...]] = []
    reached = 0
    if 0 in ids and text[ids[0] : ids[0] + 1] == "-":
        reached = ids[0]
    for start in cuts:
        if start < reached:
            continue
        ends = [end for end in reversed(cuts) if end > start]
        end = next((end for end in ends if _meaning(text[start:end], known)), ids.get(start))
        if end is not None:
            found.append(_meaning(text[start:end], known))
            reached = end
    return found


def _cuts(text: str, ids: Mapping[int, int]) -> list[int]:
    """Where a name may begin or end: not inside a word, unless several ids were written without a space."""
    edges = {0, len(text), *ids, *ids.values()}
    words = {i for i in range(1, len(text)) if not (text[i - 1].isalnum() and text[i].isalnum())}
    return sorted(edges | words if len(edges | words) <= MAX_CUTS else edges)


def _meaning(word: str, known: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """An underscore before an id is easily left out."""
    return tuple(known.get(word) or known.get(f"_{word}") or ())


def named(inputs: Inputs, merge: int, texts: Sequence[str], known: Mapping[str, Sequence[int]]) -> list[Sequence[int]]:
    """What the names that a merge was given say of each of its inputs."""
    for text in texts:
        words = [tuple(number for number in word if number != merge) for word in mentioned(text, known)]
        words = words[-len(inputs) :]
        if len(words) < len(inputs):
            continue
        sure = [(place, number) for place, number in enumerate(inputs) if number is not None and number > 0]
        if all(number in words[place] or not any(number in word for word in words) for place, number in sure):
            return list(words)
        # The known ones are named in another order: the others may be any that is left.
        left = [word for word in words if not any(number in word for _, number in sure)]
        return [tuple(dict.fromkeys(number for word in left for number in word))] * len(inputs)
    return [()] * len(inputs)


# --- order ---------------------------------------------------------------------------------------------------------


def explained(merges: Sequence[Inputs | None], tolerant: bool = False) -> dict[Place, Choice] | None:
    """For every gap that the order of the entries tells of, what it may be; None if nothing explains the order.

    `merges` holds () for a model that is none, and None for one whose own metadata may list anything. With
    `tolerant`, so may that of every model that is no merge.

    A walk that has met the first q models stands before number q, whatever came before: so it is enough to know for
    every model at which numbers the walk may stand once it is through with it (sets of numbers, as bits).
    """
    count = len(merges)
    if count > MAX_ORDERED:
        return None
    spine = next((number for number, inputs in enumerate(merges) if not inputs), count)
    ends = [0] * count
    for number in reversed(range(count)):
        ends[number] = _layers(number, merges[number], ends, spine, tolerant)[-1]
    if not ends[0] >> count & 1:
        return None
    needed = [0] * count
    needed[0] = 1 << count
    choices: dict[Place, Choice] = {}
    for number, inputs in enumerate(merges):
        if needed[number] and inputs:
            layers = _layers(number, inputs, ends, spine, tolerant)
            first = number + 1 if number < spine else 1
            for place, choice in _back(inputs, layers, ends, needed, number, _may_repeat(number, spine, inputs), first):
                choices[number, place] = choice
    return choices


def _may_repeat(number: int, spine: int, inputs: Inputs) -> bool:
    """Whether the first input can have been met before: not while all that were met are still being walked."""
    return number >= spine or inputs[0] == UNLISTED


def _layers(number: int, inputs: Inputs | None, ends: Sequence[int], spine: int, tolerant: bool) -> list[int]:
    """Where the walk may stand after `number` itself, after its A, after its B, and after its C."""
    count = len(ends)
    after = 1 << (number + 1)
    if inputs is None or (tolerant and not inputs):
        return [(1 << (count + 1)) - after]
    layers = [after]
    for place, given in enumerate(inputs):
        stands = layers[-1]
        if given is not None and given != UNLISTED:
            ahead = stands >> (given + 1) << (given + 1)
            layers.append(ahead | (ends[given] if stands >> given & 1 else 0))
            continue
        reached = stands if place or _may_repeat(number, spine, inputs) else 0
        for q in _bits(stands & ~(1 << count)):
            reached |= ends[q]
        layers.append(reached)
    return layers


def _back(
    inputs: Inputs, layers: list[int], ends: Sequence[int], needed: list[int], number: int, repeat: bool, first: int
) -> Iterator[tuple[int, Choice]]:
    """What each gap of one merge may be if the walk is to come out where it is `needed`; tells that of the inputs."""
    wanted = layers[-1] & needed[number]
    for place in reversed(range(len(inputs))):
        given, viable, new, met = inputs[place], 0, [], 0
        for q in _bits(layers[place]):
            stays = wanted >> q & 1 and (given is None or given == UNLISTED or q > given)
            if stays and (place or repeat):
                viable |= 1 << q
                met = q
            if q < len(ends) and (given is None or given in (q, UNLISTED)) and ends[q] & wanted:
                viable |= 1 << q
                needed[q] |= ends[q] & wanted
                new.append(q)
        if given is None:
            yield place, Choice(tuple(new), range(first, met))
        wanted = viable


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


# --- both ----------------------------------------------------------------------------------------------------------


def settled(
    merges: Sequence[Inputs | None], texts: Mapping[int, Sequence[str]], names: Mapping[int, str], ordered: bool
) -> tuple[dict[Place, int], dict[Place, Doubt]]:
    """Every gap, filled or in doubt.

    `texts` are the names that merges were given, `names` those of all models, and `ordered` says whether the order
    of the entries means anything.
    """
    known = list(merges)
    gaps = [
        (merge, place)
        for merge, inputs in enumerate(known)
        for place, number in enumerate(inputs or ())
        if number is None
    ]
    if not gaps:
        return {}, {}
    words = vocabulary(names)
    said = {merge: named(known[merge] or (), merge, texts[merge], words) for merge in _first(gaps, MAX_NAMED)}
    tolerant = False
    choices = explained(known) if ordered else None
    if choices is None and ordered:
        tolerant = True
        choices = explained(known, tolerant)
    filled: dict[Place, int] = {}
    doubts: dict[Place, Doubt] = {}
    for _ in range(ROUNDS):
        fresh: dict[Place, int] = {}
        for gap in [gap for gap in gaps if gap not in filled]:
            merge, place = gap
            verdict = _judged(merge, (choices or {}).get(gap), said[merge][place] if merge in said else ())
            if isinstance(verdict, Doubt):
                doubts[gap] = verdict
            else:
                fresh[gap] = verdict
        again = explained(_with(known, fresh), tolerant) if fresh and choices is not None else None
        if again is None and choices is not None:
            # What fits alone need not fit together; then only what the order demands is certain.
            for gap in [gap for gap in fresh if choices.get(gap, Choice((), range(0))).new != (fresh[gap],)]:
                doubts[gap] = Doubt((), (fresh.pop(gap),))
        known = _with(known, fresh)
        filled |= fresh
        if again is None:
            break
        choices = again
    return filled, {gap: doubts[gap] for gap in gaps if gap not in filled}


def _judged(merge: int, choice: Choice | None, names: Sequence[int]) -> int | Doubt:
    """The one model on which the order and the names agree."""
    if choice is None:
        return names[0] if len(names) == 1 else Doubt((), tuple(names))
    allowed = choice.among(names)
    if names:
        return allowed[0] if len(allowed) == 1 else Doubt(choice.new, allowed or tuple(names))
    before = [number for number in choice.before if number != merge] if len(choice.before) <= 2 else choice.before
    if len(choice.new) + len(before) == 1:
        return choice.new[0] if choice.new else before[0]
    return Doubt((*choice.new, *before), ())


def _with(merges: Sequence[Inputs | None], filled: Mapping[Place, int]) -> list[Inputs | None]:
    made = list(merges)
    for (merge, place), number in filled.items():
        inputs = list(made[merge] or ())
        inputs[place] = number
        made[merge] = tuple(inputs)
    return made


def _first(gaps: Sequence[Place], limit: int) -> list[int]:
    return list(dict.fromkeys(merge for merge, _ in gaps))[:limit]
