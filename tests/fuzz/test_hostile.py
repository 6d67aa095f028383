"""A few hundred of the cases of `make fuzz`, always the same ones; and everything that it ever found, by name."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import ConfigError, FormatError, MergeflowError, Problems
from mergeflow.execute.journal import FORMAT, Entry, _line, head, lines
from mergeflow.execute.journal import parse as parse_journal
from mergeflow.formats.safetensors import MAX_DIMENSIONS, Safetensors
from mergeflow.inputs import open_checkpoint
from mergeflow.leftovers import made_before
from mergeflow.merge import open_plan
from mergeflow.plan.identity import OutputIdentity
from mergeflow.plan.metadata import MARGIN, _parsed, as_json
from mergeflow.recipe.modelset import DEEPEST, ModelSet
from mergeflow.recipe.recorded import read_merges
from mergeflow.recipe.replay import Replay
from mergeflow.recipe.request import TargetRequest
from mergeflow.recipe.selection import parse_selection
from mergeflow.recipe.tree import MOST_MERGES
from mergeflow.storage.hashes import HashCache
from mergeflow.storage.local import LocalStore
from mergeflow.tensors import FileStat
from tests.fuzz.__main__ import one
from tests.fuzz.corpus import Corpus, corpus
from tests.fuzz.guards import GuardedStore, Hang, Violation, held, reading, said
from tests.fuzz.mutation import file_of
from tests.fuzz.targets import Targets
from tests.models import request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CASES, SEED = 400, 0
MODELS = ModelSet({"01": "/m/1", "02": "/m/2"}, {}, "/m")
ENTRY = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def targets(small: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return Targets(small, tmp_path_factory.mktemp("cases"))


def test_hundreds_of_cases_end_well(targets: Targets) -> None:
    outcomes = [one(targets, SEED, number) for number in range(CASES)]
    assert {name for name, _ in outcomes} >= targets.all.keys() - {"merge", "full header"}
    assert {"done", "FormatError", "ConfigError"} <= {outcome for _, outcome in outcomes}, "cases are of many kinds"


# what the guards would notice


@pytest.mark.parametrize(
    ("case", "violation"),
    [
        (lambda: reading(b"abc")(1, 3), "bytes 1 to 4 of a file of 3"),
        (lambda: bytes(60 << 20) and None, "bytes of memory for a case of 10"),
        (lambda: said("a\x1b[2Jb"), "what a terminal obeys"),
        (lambda: said("a\nmergeflow: all is well"), "lines of its own"),
        (lambda: said("n" * 100_000), "100,000 characters"),
    ],
    ids=["a read outside", "memory", "an escape sequence", "a forged line", "a long message"],
)
def test_a_guard_notices(case: Callable[[], object], violation: str) -> None:
    with pytest.raises(Violation, match=violation):
        held(case, 10)


def test_a_guard_notices_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever() -> None:
        while True:
            pass

    monkeypatch.setattr("tests.fuzz.guards.SECONDS", 0.05)
    with pytest.raises(Hang):
        held(forever, 10)


def test_a_guarded_store_notices_reads_outside(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    reader = GuardedStore().reader(str(tmp_path / "file"))
    reader.read_into(memoryview(bytearray(3)), 0)
    with pytest.raises(Violation):
        reader.read_into(memoryview(bytearray(2)), 2)
    reader.close()


def test_an_unexpected_error_is_no_outcome() -> None:
    with pytest.raises(ZeroDivisionError):
        held(lambda: 1 // 0, 10)


# what was found: each of these went wrong once


def parse(table: Any) -> None:
    data = file_of(json.dumps(table).encode(), b"")
    Safetensors().parse(reading(data), len(data))


def test_a_shape_of_very_many_lengths_is_refused_before_they_are_multiplied() -> None:
    """The product of half a million lengths has half a megabyte, and each step takes as long: minutes in all."""
    began = time.process_time()
    with pytest.raises(FormatError, match=f"has 500,000 dimensions, and a tensor at most {MAX_DIMENSIONS}"):
        parse({"key": {**ENTRY, "dtype": "U8", "shape": [99] * 500_000}})
    assert time.process_time() - began < 10


def test_composites_that_name_two_others_each_are_added_up_once() -> None:
    """Forty of them lead to a million million models."""
    composites: dict[str, tuple[str, ...]] = {f"c{n}": (f"a{n + 1}", f"b{n + 1}") for n in range(40)}
    composites |= {f"{side}{n}": (f"c{n}", id) for n in range(1, 40) for side, id in (("a", "01"), ("b", "02"))}
    composites |= {"a40": ("01",), "b40": ("02",)}
    shares = ModelSet(MODELS.paths, composites).shares(["c0"])
    assert sum(shares.values()) == 1
    assert shares["01"] == shares["02"]


def test_composites_within_hundreds_of_others_are_refused_in_a_sentence() -> None:
    chain = {f"c{n}": (f"c{n + 1}",) for n in range(5000)} | {"c5000": ("01",)}
    with pytest.raises(ConfigError, match=f"lies within {DEEPEST} others"):
        ModelSet(MODELS.paths, chain).shares(["c0"])


def test_a_tree_of_very_many_merges_is_refused_before_its_fractions_are_computed(small: Corpus) -> None:
    """The digits of what each model contributes grow with every merge: with 4,000 that took minutes."""
    told = json.loads(small.ours["mergeflow"])
    node = ["n", [0, 1], 0.1234567, "weighted_sum", True, None]
    told["trees"] = {"t": {"leaves": list(told["sources"])[:2], "nodes": [node] * (MOST_MERGES + 1)}}
    models = ModelSet({id: str(small.models / f"{id}.safetensors") for id in ("01", "02", "03")}, {}, "/m")
    with pytest.raises(ConfigError, match=r"1,001 merges, and 1,000 at most"):
        Replay({"mergeflow": json.dumps(told)}, "/f", models)


def test_a_recipe_that_can_just_be_written_alone_is_left_out() -> None:
    """Within the recipe of the output it was nested too deeply, which ended in a traceback."""
    for depth in range(800, 1000):
        found = _parsed({"sd_merge_recipe": "[" * depth + "]" * depth})
        as_json({"a": {"b": {"c": [found]}}})
    assert _parsed({"sd_merge_recipe": "[[]]"}) == [[]]
    assert MARGIN > 10


def test_thousands_of_problems_are_counted() -> None:
    text = str(Problems([FormatError(f"problem {n}") for n in range(5000)]))
    assert text.splitlines()[0] == "5000 problem(s):"
    assert text.endswith("  - problem 99\n  and 4,900 more")


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a device that never ends", "a large file"])
def test_hashes_are_read_from_a_file_of_some_size_only(kind: str, tmp_path: Path) -> None:
    """A pipe that nobody writes to, or /dev/zero, had held the program up for ever."""
    path = tmp_path / "hashes.json"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
        os.close(os.open(path, os.O_RDWR))
    elif kind == "a device that never ends":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 200 << 20)
    cache = HashCache(str(path))
    assert cache.find("/m/1", FileStat(1, 1, 1, 1)) is None


@pytest.mark.parametrize(
    "told",
    [
        {"head": "a", "work": "b", "sources": ["01"]},
        {"head": "a", "work": "b", "sources": 3},
        {"head": "a", "work": "b", "sources": {"01": {}}},
        {"head": {}, "work": "b", "sources": {}},
        {"head": "a", "work": "b"},
    ],
    ids=repr,
)
def test_a_journal_of_something_else_has_no_identity(told: object) -> None:
    assert parse_journal(_line(f"{FORMAT} {json.dumps(told)}")).identity is None


def test_a_journal_that_tells_of_more_bytes_than_there_can_be_tells_nothing() -> None:
    """The message that said how many they were divided them as fractions of a kind that has no such numbers."""
    identity = OutputIdentity("a", "b", {})
    notes = parse_journal(head(identity) + lines([Entry(0, 10**400, bytes(16))]))
    assert (notes.entries, notes.damaged) == ((), 1)


@pytest.mark.parametrize("sources", [3, None, "text", {}], ids=repr)
def test_a_manifest_whose_sources_are_no_list_is_none_of_an_earlier_run(
    sources: object, small: Corpus, tmp_path: Path
) -> None:
    told = json.loads((small.made / "manifest.json").read_text())
    (tmp_path / "merged.safetensors").write_bytes((small.made / "merged.safetensors").read_bytes())
    target = [TargetRequest("merged", "merged.safetensors", selection="listed")]
    plan = open_plan(request(small.models, tmp_path, targets=target, selections={"listed": "01,02"}))
    for changes, found in (({}, True), ({"sources": sources}, False)):
        (tmp_path / "manifest.json").write_text(json.dumps({**told, **changes}))
        assert (made_before(plan, str(tmp_path), LocalStore()) is not None) == found


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", "9" * 5000, "null"], ids=["nested", "bytes", "digits", "null"])
def test_a_manifest_that_cannot_be_read_is_none(text: str, small: Corpus, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    plan = open_plan(request(small.models, tmp_path))
    assert made_before(plan, str(tmp_path), LocalStore()) is None


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (["\x1b[2J"], r"'\\x1b\[2J' is not in /m"),
        ("line\nmergeflow: all is well", r"'line\\nmergeflow: all is well' is not in /m"),
        ([[1] * 100_000], r"YAML reads \[1, 1, 1, 1, 1, 1, \.\.\.\] as neither"),
        (["n" * 100_000], r"'n+\.\.\.' is not in /m"),
        ([16**9000], "a number of thousands of digits"),
        ({"01": [[]]}, r"'01' is \[\[\]\]; write true or false"),
    ],
    ids=["an escape sequence", "a line", "a long list", "a long id", "a number without end", "a list for a switch"],
)
def test_a_selection_is_quoted_briefly_and_harmlessly(written: Any, text: str) -> None:
    with pytest.raises(MergeflowError, match=text) as caught:
        parse_selection("models", written, MODELS)
    said(str(caught.value))


def test_a_merge_in_a_config_is_quoted_briefly() -> None:
    with pytest.raises(Problems) as caught:
        read_merges({"a\x1b": {"\x1b[2J" * 9000: 1}, "b": {"a": "01", "b": "02", "formula": ["x"] * 9000}}, None)
    said(str(caught.value))


def test_an_index_is_not_followed_but_refused(tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "../../../../etc/passwd"}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    found = open_checkpoint("a", str(path), GuardedStore(), Safetensors())
    assert isinstance(found, FormatError)
    assert "it is JSON; a checkpoint in several files" in str(found)


# what is typed: a wrong list is a mistake of the person's, whatever it is


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_any_list_is_read_or_refused(written: Any) -> None:
    listed = written if isinstance(written, str | list) else [written]
    assert held(lambda: parse_selection("models", listed, MODELS), 1000, memory=False) in ("done", "SelectionError")


@given(st.dictionaries(st.text(), st.lists(st.text() | st.floats()) | st.dictionaries(st.text(), st.text())))
def test_any_tree_in_a_config_is_read_or_refused(nodes: dict[str, Any]) -> None:
    outcome = held(lambda: read_merges(nodes, None), 1000, memory=False)
    assert outcome in ("done", "ConfigError", "Problems")
