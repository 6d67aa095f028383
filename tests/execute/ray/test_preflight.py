"""What a node is asked before it gets work, without a cluster."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from mergeflow.execute.ray import preflight
from mergeflow.execute.ray.preflight import TOKEN, Drafts, Question, problems, sources_of
from mergeflow.execute.shard import Job
from mergeflow.merge import open_plan
from mergeflow.storage.files import LocalFile
from mergeflow.storage.local import LocalStore
from tests.models import request, write_models

STORE = LocalStore(read_back=True)
HEAD = 1000


class Asked:
    """A node, and what it is asked about three models and a draft."""

    def __init__(self, directory: Path) -> None:
        self.models = write_models(directory / "models", {id: {"k": torch.ones(50)} for id in ("1", "2", "3")})
        plan = open_plan(request(self.models, directory / "out"))
        assert not plan.problems
        self.draft = STORE.draft(str(directory / "out" / "x"), 5000)
        Path(self.draft.address).write_bytes(HEAD.to_bytes(8, "little") + os.urandom(5000 - 8))
        self.was = Path(self.draft.address).read_bytes()
        self.drafts = Drafts(STORE, [self.draft.address])
        self._sources = sources_of(Job(plan.for_workers(), STORE, (self.draft.address,)))

    def question(self, node: str = "n1", place: int = 0) -> Question:
        return self.drafts.question(STORE, self._sources, node, place)

    def answers(self) -> list[str]:
        """What is wrong, seen from there and then from here."""
        self.drafts.begin()
        question = self.question()
        return problems(question) or self.drafts.arrived(question)


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def test_a_node_that_sees_the_same_has_no_problem_and_the_draft_is_as_it_was(asked: Asked) -> None:
    assert asked.answers() == []
    assert Path(asked.draft.address).read_bytes() != asked.was
    asked.drafts.end()
    assert Path(asked.draft.address).read_bytes() == asked.was
    asked.drafts.end()
    assert Path(asked.draft.address).read_bytes() == asked.was


def test_only_the_header_of_a_draft_is_touched_by_as_many_nodes_as_can_answer(asked: Asked) -> None:
    assert asked.drafts.places == (8 + HEAD) // TOKEN - 1
    asked.drafts.begin()
    for place in range(asked.drafts.places):
        question = asked.question(f"n{place}", place)
        assert problems(question) == []
        assert asked.drafts.arrived(question) == []
    assert Path(asked.draft.address).read_bytes()[8 + HEAD :] == asked.was[8 + HEAD :]
    asked.drafts.end()
    assert Path(asked.draft.address).read_bytes() == asked.was


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def older(path: Path) -> None:
    os.utime(path, (0, 0))


def other(path: Path) -> None:
    there = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"k"', b'"j"'))
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "does not exist"),
        (longer, "has 273 bytes, not 272"),
        (older, "was changed at 1970-01-01 00:00:00 UTC, not at 20"),
        (other, "has another header"),
    ],
    ids=["missing", "size", "time", "header"],
)
def test_a_source_that_differs_is_told_with_how(change: object, reason: str, asked: Asked) -> None:
    assert callable(change)
    path = asked.models / "2.safetensors"
    size = path.stat().st_size
    change(path)
    (told,) = asked.answers()
    assert told.startswith(f"{path} {reason.replace('273', str(size + 1)).replace('272', str(size))}")
    assert told.endswith("; models must be at the same path on all nodes, with their times if they are copies")


def test_sources_that_have_the_same_against_them_are_told_in_one_sentence(asked: Asked) -> None:
    for path in asked.models.iterdir():
        path.unlink()
    (told,) = asked.answers()
    first = asked.models / "1.safetensors"
    assert told.startswith(f"3 of 3 sources: {first}, {first.with_name('2.safetensors')} and 1 more: does not exist")


def test_a_draft_of_the_same_name_on_another_disk_is_found_out(asked: Asked) -> None:
    asked.drafts.begin()
    question = dataclasses.replace(asked.question(), token=bytes(TOKEN))
    assert problems(question) == [
        f"{asked.draft.address} is another file there; out= must be on a file system that all nodes share"
    ]


def test_a_draft_that_is_not_there_is_told(asked: Asked) -> None:
    asked.drafts.begin()
    question = asked.question()
    asked.draft.discard()
    (told,) = problems(question)
    assert told.startswith(f"{asked.draft.address} does not exist")
    assert told.endswith("out= must be on a file system that all nodes share, and that they may write to")


class Copying(LocalStore):
    """A file system that shows what others have, and keeps what is written to itself."""

    def writer(self, address: str) -> LocalFile:
        Path(f"{address}.copy").write_bytes(Path(address).read_bytes())
        return LocalFile(f"{address}.copy", os.O_WRONLY)


def test_what_a_node_writes_must_arrive(asked: Asked) -> None:
    asked.drafts.begin()
    question = dataclasses.replace(asked.question(), store=Copying(read_back=True))
    assert problems(question) == []
    assert asked.drafts.arrived(question) == [
        f"what it writes to {asked.draft.address} does not arrive; out= must be on a file system that all nodes share"
    ]


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"torch": None}, "lacks torch, and the run is started with torch "),
        ({"numba": "0.1"}, "has numba 0.1, and the run is started with numba "),
        ({"Python": "3.9", "xxhash": None}, "has Python 3.9, and the run is started with Python "),
    ],
    ids=["missing", "another", "two"],
)
def test_libraries_that_differ_are_told_by_name_and_nothing_is_read_then(
    there: dict[str, str | None], told: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = asked.question()
    asked.draft.discard()
    has = preflight.versions() | there
    monkeypatch.setattr(preflight, "versions", lambda: has)
    found = problems(question)
    assert len(found) == len(there)
    assert found[0].startswith(told)
    assert found[0].endswith("; install the same version on all nodes")
