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

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.recipe.webui.naming import mentioned, vocabulary

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    Inputs = tuple[int | None, ...]
    """What a merge was made of: the number of a model, None where no hash is recorded, `UNLISTED` where a hash is
    recorded that no entry has. Empty for a model that is no merge."""
    Lineage = Inputs | frozenset[int]
    """Inputs, or what is mentioned by the recipe of another tool, which may have listed any models."""
    Text = tuple[str, bool]
    """A name that a merge was given, and whether it was the web UI that gave it."""
    Place = tuple[int, int]
    """A merge, and which of its inputs: 0 is A."""

UNLISTED = -1

MAX_ORDERED = 2048
"""The order of more entries than this is not explained: the time that takes grows with their square."""
MAX_NAMED = 1000
"""The names of so many merges are read."""
ROUNDS = 4
"""What one gap turns out to be may settle others, so they are looked at again, so many times at most."""
MAX_LISTED = 100
"""So many candidates are told at most."""


class Choice(NamedTuple):
    """What a gap may be, as the order of the entries has it."""

    new: tuple[int, ...]
    """Models that the walk would meet here for the first time."""
    before: int
    """Models that it has met before and may meet again, as bits."""


class Settled(NamedTuple):
    """Every gap, filled or in doubt."""

    filled: dict[Place, int]
    doubts: dict[Place, Doubt]
    explained: bool
    """Whether the order of the entries was understood; otherwise there were only the names."""


class Doubt(NamedTuple):
    """Why a gap stays open."""

    order: tuple[int, ...]
    """What the order of the entries allows."""
    names: tuple[int, ...]
    """What the names say."""


def settled(
    merges: Sequence[Lineage], texts: Mapping[int, Sequence[Text]], names: Mapping[int, str], ordered: bool
) -> Settled:
    """Fill the gaps.

    `texts` are the names that merges were given, and `names` those of all models; `ordered` says whether the order
    of the entries means anything.
    """
    known = list(merges)
    gaps = [(merge, place) for merge, inputs in enumerate(known) for place in _gaps(inputs)]
    said = _said(known, gaps, texts, names)
    referred = {below for lineage in known for below in _inputs(lineage)}
    choices = explained(known, referred) if ordered and gaps else None
    understood = choices is not None
    filled: dict[Place, int] = {}
    doubts: dict[Place, Doubt] = {}
    for _ in range(ROUNDS):
        open_gaps = {gap: (choices or {}).get(gap) for gap in gaps if gap not in filled}
        verdicts = {gap: _judged(choice, said.get(gap, ())) for gap, choice in open_gaps.items()}
        doubts = {gap: verdict for gap, verdict in verdicts.items() if isinstance(verdict, Doubt)}
        fresh = {gap: verdict for gap, verdict in verdicts.items() if isinstance(verdict, int)}
        again = explained(_with(known, fresh), referred) if fresh and choices is not None else None
        if choices is not None and again is None:
            # What fits alone need not fit together; then only what the order demands is certain.
            for gap, number in list(fresh.items()):
                if _judged(open_gaps[gap], ()) != number:
                    doubts[gap] = Doubt((), (fresh.pop(gap),))
        filled |= fresh
        known = _with(known, fresh)
        choices = again
        if choices is None:
            break
    return Settled(filled, doubts, understood)


def _gaps(lineage: Lineage) -> list[int]:
    return [place for place, number in enumerate(_inputs(lineage)) if number is None]


def _inputs(lineage: Lineage) -> Inputs:
    return lineage if isinstance(lineage, tuple) else ()


def _with(merges: Sequence[Lineage], filled: Mapping[Place, int]) -> list[Lineage]:
    made = list(merges)
    for (merge, place), number in filled.items():
        inputs = _inputs(made[merge])
        made[merge] = (*inputs[:place], number, *inputs[place + 1 :])
    return made


def _judged(choice: Choice | None, names: Sequence[int]) -> int | Doubt:
    """The one model on which the order and the names agree."""
    if choice is None:
        return names[0] if len(names) == 1 else Doubt((), tuple(names))
    if names:
        allowed = tuple(number for number in names if number in choice.new or choice.before >> number & 1)
        return allowed[0] if len(allowed) == 1 else Doubt(choice.new, allowed or tuple(names))
    allowed = (*choice.new, *islice(_bits(choice.before), MAX_LISTED))
    return allowed[0] if len(allowed) == 1 else Doubt(allowed, ())


# --- names ---------------------------------------------------------------------------------------------------------


def _said(
    merges: Sequence[Lineage], gaps: Sequence[Place], texts: Mapping[int, Sequence[Text]], names: Mapping[int, str]
) -> dict[Place, Sequence[int]]:
    """What the names say of every gap of which they say anything."""
    known = vocabulary(names) if gaps else {}
    found: dict[Place, Sequence[int]] = {}
    for merge in list(dict.fromkeys(merge for merge, _ in gaps))[:MAX_NAMED]:
        inputs = _inputs(merges[merge])
        for text, default in texts.get(merge, ()):
            words = _aligned(inputs, mentioned(text, len(inputs), known, merge, default))
            if words:
                found.update({(merge, place): word for place, word in enumerate(words) if word})
                break
    return found


def _aligned(inputs: Inputs, words: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What the names say of every input: the word in its place, or any if those that are known stand elsewhere."""
    if not words:
        return []
    spoken = tuple(dict.fromkeys(number for word in words for number in word))
    sure = all(number in words[place] or number not in spoken for place, number in enumerate(inputs))
    return words if sure else [spoken] * len(inputs)


# --- order ---------------------------------------------------------------------------------------------------------


def explained(merges: Sequence[Lineage], referred: Container[int | None]) -> dict[Place, Choice] | None:
    """For every gap that the order of the entries tells of, what it may be; None if nothing explains the order.

    `referred` are the models that some merge records.

    A walk that has met the first q models stands before number q, whatever came before. So it is enough to know for
    every model before which numbers the walk may stand when it is through with it: a set of numbers, kept as bits.
    """
    count = len(merges)
    if count > MAX_ORDERED:
        return None
    # While the walk has only gone from a merge to its A, nothing that it has met can be met again.
    spine = next((number for number, lineage in enumerate(merges) if not _inputs(lineage)), count)
    ends = [0] * count
    for number in reversed(range(count)):
        lineage = merges[number]
        if isinstance(lineage, frozenset):
            ends[number] = _any(number, lineage, referred, ends)
        else:
            ends[number] = _layers(number, lineage, ends, number >= spine)[-1]
    if not ends[0] >> count & 1:
        return None
    wanted = [0] * count
    wanted[0] = 1 << count
    choices: dict[Place, Choice] = {}
    for number, lineage in enumerate(merges):
        if wanted[number] and isinstance(lineage, frozenset):
            _back_any(number, lineage, referred, ends, wanted)
        elif wanted[number]:
            layers = _layers(number, _inputs(lineage), ends, number >= spine)
            for place, new, met in _back(number, _inputs(lineage), layers, ends, wanted, number >= spine):
                choices[number, place] = Choice(new, met & ~_open(number, ends, wanted))
    return choices


def _any(number: int, mentioned: frozenset[int], referred: Container[int | None], ends: Sequence[int]) -> int:
    """Where the walk may stand after what another tool listed: models that it mentions or that nothing else refers to.

    Were it free to list anything, it would explain any order.
    """
    stands = 1 << (number + 1)
    for q in range(number + 1, len(ends)):
        if stands >> q & 1 and (q in mentioned or q not in referred):
            stands |= ends[q]
    return stands


def _back_any(
    number: int, mentioned: frozenset[int], referred: Container[int | None], ends: Sequence[int], wanted: list[int]
) -> None:
    """Tell the models that another tool listed where the walk is wanted after them."""
    goal = ends[number] & wanted[number]
    for q in reversed(range(number + 1, len(ends))):
        if ends[number] >> q & 1 and (q in mentioned or q not in referred) and ends[q] & goal:
            wanted[q] |= ends[q] & goal
            goal |= 1 << q


def _layers(number: int, inputs: Inputs, ends: Sequence[int], again: bool) -> list[int]:
    """Where the walk may stand after `number` itself, after its A, after its B and after its C."""
    layers = [1 << (number + 1)]
    for place, given in enumerate(inputs):
        stands = layers[-1]
        after = 0
        for q in _bits(stands):
            if _may_stay(q, given, place > 0 or again):
                after |= 1 << q
            if q < len(ends) and _may_begin(q, given):
                after |= ends[q]
        layers.append(after)
    return layers


def _back(
    number: int, inputs: Inputs, layers: list[int], ends: Sequence[int], wanted: list[int], again: bool
) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Every gap: the place, what is new there, and what was met before, as bits, if it may be one of these.

    Only what leads to where the walk is `wanted` counts; where it is wanted after each input is added to that.
    """
    goal = layers[-1] & wanted[number]
    for place in reversed(range(len(inputs))):
        given, viable, met = inputs[place], 0, 0
        new: list[int] = []
        for q in _bits(layers[place]):
            if goal >> q & 1 and _may_stay(q, given, place > 0 or again):
                viable |= 1 << q
                met = (1 << q) - 1
            if q < len(ends) and _may_begin(q, given) and ends[q] & goal:
                viable |= 1 << q
                wanted[q] |= ends[q] & goal
                new.append(q)
        if given is None:
            yield place, tuple(new), met
        goal = viable


def _open(number: int, ends: Sequence[int], wanted: Sequence[int]) -> int:
    """Merge `number` and what is made of it, as bits: models that the walk is surely not through with at `number`."""
    lasting = ((m, ends[m] & wanted[m]) for m in range(number + 1))
    return sum(1 << m for m, stands in lasting if stands and not stands & ((2 << number) - 1))


def _may_begin(q: int, given: int | None) -> bool:
    """Whether an input may be number q, met now for the first time."""
    return given is None or given in (q, UNLISTED)


def _may_stay(q: int, given: int | None, again: bool) -> bool:
    """Whether an input may be one that was met before the walk stood before number q, so that it stays there."""
    return again if given is None else given < q  # what is not listed may have no entry at all


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
