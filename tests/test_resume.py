"""A run goes on where another has ended, however that one worked, and the file is the same; or it says why not."""

from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from mergeflow.drafts import Kept, hint
from mergeflow.errors import MergeflowError, StorageError, UnmergeableValues
from mergeflow.execute.journal import parse
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import Watch, open_plan, run, run_together, store_of
from mergeflow.passes import Result
from mergeflow.plan import tiles
from mergeflow.plan.fuse import fuse
from mergeflow.recipe.request import Budget, Policies, TargetRequest
from mergeflow.report.manifest import manifest
from mergeflow.storage.local import LocalStore
from tests.fakes import CountingStore, Extent, MemoryStore, overlaps
from tests.models import merge, request, toy_models, toy_request, write_models

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Receipt
    from mergeflow.plan.plan import Plan
    from mergeflow.recipe.request import Request

IDS = ("1", "2", "3")
KEYS = [f"k{number:02}" for number in range(12)]
ELEMENTS = 100_000
SMALL = Budget(workers=1, reads_in_flight=1, memory=1 << 28, block=64 << 10)
"""Rows so short that each tensor is several tiles."""
LARGE = Budget(workers=2, reads_in_flight=2, memory=1 << 29)
SUFFIXES = ("", ".journal")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(1)
    return write_models(
        tmp_path_factory.mktemp("models"),
        {id: {key: torch.randn(ELEMENTS, generator=generator).half() for key in KEYS} for id in IDS},
    )


def wanted(models: Path, out: Path, listed: Sequence[str] = ("1,2,3", "1,3"), budget: Budget = SMALL) -> Request:
    """A target for each list."""
    targets = [TargetRequest(f"t{i}", f"t{i}.safetensors", selection=f"s{i}") for i in range(len(listed))]
    selections = {f"s{i}": one for i, one in enumerate(listed)}
    return request(models, out, targets=targets, selections=selections, budget=budget)


def stopped(plan: Plan, after: int, store: LocalStore | None = None) -> list[Kept]:
    """Interrupt a run after so many receipts; what it kept."""
    left = after
    kept: list[Kept] = []

    def progress(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, LocalExecutor(plan.budget), store or LocalStore(), progress, Watch(kept=kept.append))
    return kept


def going_on(asked: Request) -> Request:
    return dataclasses.replace(asked, resume=True)


def outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


# --- the same file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(SMALL, SMALL), (SMALL, LARGE), (LARGE, SMALL)])
@pytest.mark.parametrize("receipts", [1, 3, 5])
def test_a_resumed_run_makes_the_same_files_and_reads_no_more_than_is_left(
    before: Budget, after: Budget, receipts: int, models: Path, tmp_path: Path
) -> None:
    merge(wanted(models, tmp_path / "whole"))
    first = open_plan(wanted(models, tmp_path / "out", budget=before))
    assert len(first.shards) > receipts
    kept = stopped(first, receipts)
    assert sum(one.done for one in kept) > 0
    store = CountingStore(LocalStore())
    spared: list[int] = []
    plan = open_plan(going_on(wanted(models, tmp_path / "out", budget=after)), store)
    assert sum(plan.left) == sum(one.done for one in kept)
    store.forget()
    result = run(plan, LocalExecutor(after), store, watch=Watch(spared=spared.append))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert 0 < result.resumed <= sum(one.done for one in kept)
    told = manifest(result, "local")
    assert told["resumed"] == result.resumed
    assert told["bytes_read"] == plan.bytes_read - spared[0] < plan.bytes_read
    for id in IDS:
        assert overlaps(store.reads(str(models / f"{id}.safetensors"))) == []
    read = sum(extent.end - extent.begin for id in IDS for extent in store.reads(str(models / f"{id}.safetensors")))
    assert read == told["bytes_read"]


@pytest.mark.parametrize("seed", range(3))
def test_nobody_waits_forever_where_much_is_there_already_and_nothing_can_be_put_by(
    seed: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards have holes, and whoever comes behind one waits for the digest, while its receipt is not made yet."""
    merge(wanted(models, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(tiles, "SMALLEST_SHARD", 64 << 10)
        first = open_plan(wanted(models, tmp_path / "out"))
    stopped(first, len(first.shards))
    chance = random.Random(seed)
    for name in ("t0", "t1"):
        journal = journal_of(tmp_path / "out" / f"{name}.safetensors.draft")
        head, *lines = journal.read_bytes().splitlines(keepends=True)
        assert len(lines) > 3 * len(KEYS)
        journal.write_bytes(head + b"".join(line for line in lines if chance.random() < 0.7))
    monkeypatch.setattr(tiles, "KEPT", 1 << 60)
    plan = open_plan(going_on(wanted(models, tmp_path / "out", budget=LARGE)))
    assert plan.memory.kept == 0
    assert 1 < len(plan.shards) < len(first.shards) / 2
    results: list[Result] = []
    store = store_of(plan, LocalExecutor(LARGE))
    work = threading.Thread(target=lambda: results.append(run(plan, LocalExecutor(LARGE), store)), daemon=True)
    work.start()
    work.join(60)
    assert not work.is_alive()
    assert results[0].resumed > 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_all_dtypes_and_integers_are_gone_on_with(tmp_path: Path) -> None:
    directory = write_models(tmp_path / "models", toy_models())
    budget = dataclasses.replace(SMALL, block=64 << 10)
    merge(toy_request(directory, tmp_path / "whole", budget))
    stopped(open_plan(toy_request(directory, tmp_path / "out", budget)), 1)
    merge(going_on(toy_request(directory, tmp_path / "out", LARGE)))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_it_can_be_interrupted_again_and_again(models: Path, tmp_path: Path) -> None:
    merge(wanted(models, tmp_path / "whole"))
    asked = wanted(models, tmp_path / "out")
    done = [0]
    stopped(open_plan(asked), 1)
    while (plan := open_plan(going_on(asked))).bytes_written - sum(plan.left) > 3_000_000:
        kept = stopped(plan, 1)
        assert all(one.resuming for one in kept)
        assert "type the same command line again" in hint(kept)
        done.append(sum(one.done for one in kept))
    assert len(done) > 1
    assert done == sorted(set(done)), "each time there is more"
    merge(going_on(asked))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_nothing_is_read_of_models_where_all_was_written(models: Path, tmp_path: Path) -> None:
    merge(wanted(models, tmp_path / "whole"))
    asked = wanted(models, tmp_path / "out")
    plan = open_plan(asked)
    stopped(plan, len(plan.shards))
    store = CountingStore(LocalStore())
    plan = open_plan(going_on(asked), store)
    store.forget()

    class Unwanted(LocalExecutor):
        def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
            raise AssertionError("there is nothing to do")

    result = run(plan, Unwanted(SMALL), store)
    assert not [path for path in store.paths_read() if path.startswith(str(models))]
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert result.resumed == sum(output.data[1] - output.data[0] for output in plan.outputs)


def test_an_output_that_is_whole_is_not_written_to_while_another_is_made(models: Path, tmp_path: Path) -> None:
    merge(wanted(models, tmp_path / "whole"))
    asked = wanted(models, tmp_path / "out")
    plan = open_plan(asked)
    stopped(plan, len(plan.shards))
    for end in SUFFIXES:
        (tmp_path / "out" / f"t1.safetensors.draft{end}").unlink()
    store = CountingStore(LocalStore())
    run(open_plan(going_on(asked), store), LocalExecutor(SMALL), store)
    head = len(plan.outputs[0].layout.head)
    assert store.writes(f"{plan.outputs[0].path}.draft") == [Extent(0, head)]
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_any_store_can_be_resumed_after_a_crash(models: Path, tmp_path: Path) -> None:
    files = {str(path): path.read_bytes() for path in models.iterdir()}
    store = MemoryStore(files)
    asked = wanted(models, tmp_path / "never")
    with pytest.raises(KeyboardInterrupt):
        run(open_plan(asked, store), LocalExecutor(SMALL), store, _raise)
    store.crash()
    run(open_plan(going_on(asked), store), LocalExecutor(SMALL), store)
    merge(wanted(models, tmp_path / "whole"))
    for name, content in outputs(tmp_path / "whole").items():
        assert store.get(str(tmp_path / "never" / name)) == content
    assert store.drafts() == store.notes() == []


def _raise(_: int) -> None:
    raise KeyboardInterrupt


# --- nothing is believed --------------------------------------------------------------------------------------------


def flip(draft: Path) -> None:
    first = parse(journal_of(draft).read_bytes()).entries[0]
    with draft.open("r+b") as file:
        file.seek(first.begin + 5)
        byte = file.read(1)[0]
        file.seek(first.begin + 5)
        file.write(bytes([byte ^ 1]))


def zero(draft: Path) -> None:
    """As after a power cut: the journal was durable, the data was not."""
    draft.write_bytes(bytes(draft.stat().st_size))


def shorten(draft: Path) -> None:
    with draft.open("r+b") as file:
        file.truncate(draft.stat().st_size // 2)


def lengthen(draft: Path) -> None:
    with draft.open("ab") as file:
        file.write(b"more")


def tear(draft: Path) -> None:
    journal = journal_of(draft)
    journal.write_bytes(journal.read_bytes()[:-9])


def garble(draft: Path) -> None:
    journal = journal_of(draft)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"nonsense\n" + b"".join(lines[1:]))


def journal_of(draft: Path) -> Path:
    return draft.with_name(f"{draft.name}.journal")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        pytest.param(flip, "1 run(s) of bytes are not what was written", id="a-bit-flipped"),
        pytest.param(zero, "run(s) of bytes are not what was written", id="zeros"),
        pytest.param(shorten, "bytes, not ", id="cut-short"),
        pytest.param(lengthen, "bytes, not ", id="too-long"),
        pytest.param(Path.unlink, "", id="draft-removed"),
        pytest.param(tear, "1 line(s) of its journal are torn", id="journal-torn"),
        pytest.param(garble, "1 line(s) of its journal are torn", id="journal-garbled"),
        pytest.param(lambda draft: journal_of(draft).write_bytes(b""), "", id="journal-empty"),
        pytest.param(lambda draft: journal_of(draft).unlink(), "", id="journal-removed"),
    ],
)
def test_what_is_not_what_was_written_is_made_again_and_that_is_told(
    spoil: Callable[[Path], None], told: str, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge(wanted(models, tmp_path / "whole"))
    asked = wanted(models, tmp_path / "out")
    stopped(open_plan(asked), 4)
    spoil(tmp_path / "out" / "t0.safetensors.draft")
    caplog.set_level("INFO")
    merge(going_on(asked))
    assert told in caplog.text
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(asked: Request) -> str:
    with pytest.raises(MergeflowError) as caught:
        merge(asked)
    return str(caught.value)


def test_a_draft_of_another_plan_is_refused_and_the_model_that_changed_is_named(models: Path, tmp_path: Path) -> None:
    mine = write_models(tmp_path / "models", {id: load_file(models / f"{id}.safetensors") for id in IDS})
    asked = wanted(mine, tmp_path / "out", ["1,2,3"])
    stopped(open_plan(asked), 2)
    before = outputs(tmp_path / "out")
    others = going_on(wanted(mine, tmp_path / "out", ["1,2"]))
    assert "made of 3 other models than the 2 of this plan; give what was given then" in refused(others)
    policy = dataclasses.replace(asked, resume=True, policies=Policies(nonfinite="skip"))
    assert "of another plan" in refused(policy)
    (mine / "2.safetensors").touch()
    told = refused(going_on(asked))
    assert "model 2 has changed since" in told
    assert "leave out resume=true and give overwrite=true" in told
    assert outputs(tmp_path / "out") == before, "and nothing was lost"


def test_a_journal_whose_first_line_is_damaged_is_refused(models: Path, tmp_path: Path) -> None:
    asked = wanted(models, tmp_path / "out", ["1,2,3"])
    stopped(open_plan(asked), 2)
    journal = tmp_path / "out" / "t0.safetensors.draft.journal"
    journal.write_bytes(b"x" + journal.read_bytes())
    assert "its journal begins with a damaged line or is of another version" in refused(going_on(asked))


def test_a_draft_that_has_something_is_not_replaced_unless_that_is_asked_for(models: Path, tmp_path: Path) -> None:
    asked = wanted(models, tmp_path / "out", ["1,2,3"])
    stopped(open_plan(asked), 2)
    told = refused(asked)
    assert "of this very output; add resume=true to go on, or overwrite=true to begin afresh" in told
    told = refused(wanted(models, tmp_path / "out", ["1,2"]))
    assert "of another plan: it is made of 3 other models than the 2 of this plan; choose another out=" in told
    merge(dataclasses.replace(wanted(models, tmp_path / "out", ["1,2"]), overwrite=True))
    merge(wanted(models, tmp_path / "whole", ["1,2"]))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_draft_that_a_run_is_at_work_on_is_left_to_it(models: Path, tmp_path: Path) -> None:
    asked = wanted(models, tmp_path / "out", ["1,2,3"])
    told: list[str] = []

    def meddle(_: int) -> None:
        for other in (asked, going_on(asked), dataclasses.replace(asked, overwrite=True)):
            told.append(refused(other))

    run(open_plan(asked), LocalExecutor(SMALL), progress=meddle)
    assert told
    assert all("is being written by another run" in one for one in told)


def test_with_nothing_left_a_run_begins(models: Path, tmp_path: Path) -> None:
    result = merge(going_on(wanted(models, tmp_path / "out")))
    assert result.resumed == 0
    merge(wanted(models, tmp_path / "whole"))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_what_resuming_cannot_help_leaves_no_draft(models: Path, tmp_path: Path) -> None:
    mine = write_models(tmp_path / "models", {id: load_file(models / f"{id}.safetensors") for id in IDS})
    asked = wanted(mine, tmp_path / "out", ["1,2,3"])
    stopped(open_plan(asked), 2)
    tensors = load_file(mine / "2.safetensors")
    tensors["k11"][-1] = torch.nan
    write_models(mine, {"2": tensors})
    again = dataclasses.replace(asked, overwrite=True)
    with pytest.raises(UnmergeableValues):
        merge(again)
    assert outputs(tmp_path / "out") == {}


def test_an_interruption_before_anything_was_noted_leaves_nothing(models: Path, tmp_path: Path) -> None:
    class Never(LocalExecutor):
        def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(open_plan(wanted(models, tmp_path / "out")), Never(SMALL))
    assert outputs(tmp_path / "out") == {}


def test_a_draft_that_was_taken_up_is_kept_by_an_interruption_before_anything_more_was_noted(
    models: Path, tmp_path: Path
) -> None:
    class Never(LocalExecutor):
        def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
            raise KeyboardInterrupt

    asked = wanted(models, tmp_path / "out")
    stopped(open_plan(asked), 2)
    names = set(outputs(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        run(open_plan(going_on(asked)), Never(SMALL))
    assert set(outputs(tmp_path / "out")) == names


def test_a_journal_that_cannot_be_written_does_not_end_the_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the journal is full")

    monkeypatch.setattr("mergeflow.storage.notes.LocalNotes.append", refuse)
    merge(wanted(models, tmp_path / "out", ["1,2,3"]))
    assert caplog.text.count("the journal is full; the run goes on, but") == 1
    assert list(outputs(tmp_path / "out")) == ["t0.safetensors"]


def test_what_was_tolerated_is_told_by_the_run_that_ends(models: Path, tmp_path: Path) -> None:
    mine = write_models(tmp_path / "models", {id: load_file(models / f"{id}.safetensors") for id in IDS})
    tensors = load_file(mine / "2.safetensors")
    for key in ("k00", "k11"):
        tensors[key][:3] = torch.inf
    write_models(mine, {"2": tensors})
    asked = dataclasses.replace(wanted(mine, tmp_path / "out"), policies=Policies(nonfinite="skip"))
    stopped(open_plan(asked), 5)
    result = merge(going_on(asked))
    assert result.resumed > 0
    assert result.tolerated == {("2", "k00"): 3, ("2", "k11"): 3}


# --- jobs that share a pass -----------------------------------------------------------------------------------------


def test_the_jobs_of_a_pass_are_resumed_together_or_alone(models: Path, tmp_path: Path) -> None:
    lists = ("1,2", "1,3", "2,3")

    def asked(listed: str, place: str = "out") -> Request:
        return wanted(models, tmp_path / place / listed, [listed])

    for listed in lists:
        merge(asked(listed, "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_together(
            fuse([open_plan(asked(listed)) for listed in lists[:2]]), LocalExecutor(SMALL), LocalStore(), _raise
        )
    merge(going_on(asked(lists[0])))
    plans = [open_plan(going_on(asked(listed))) for listed in lists[1:]]
    results = run_together(fuse(plans), LocalExecutor(SMALL), LocalStore())
    assert all(isinstance(one, Result) for one in results)
    for listed in lists:
        assert outputs(tmp_path / "out" / listed) == outputs(tmp_path / "whole" / listed)


def test_several_hints_are_one() -> None:
    kept = [Kept(f"out/{number}.draft", 10**9, 7 * 10**9, False) for number in range(6)]
    assert hint(kept) == (
        "6 drafts were kept (out/0.draft, out/1.draft, out/2.draft, out/3.draft and 2 more), 6.00 GB of 42.00 GB are "
        "done; to go on, add resume=true to the same command line"
    )
