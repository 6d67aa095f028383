"""Several jobs in one pass: every byte is read once, and each job is either complete or leaves nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from mergeflow.errors import MergeflowError, StorageError, UnmergeableValues
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import Result, open_plan, run, run_together
from mergeflow.plan.fuse import fuse
from mergeflow.recipe.request import Budget, Policies
from mergeflow.storage.local import LocalDraft, LocalStore
from tests.fakes import CountingStore, merged, overlaps
from tests.models import request, toy_models, toy_request, write_models

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Receipt, Store
    from mergeflow.plan.plan import Plan
    from mergeflow.storage.files import LocalFile

BUDGET = Budget(workers=2, reads_in_flight=2, memory=1 << 28)
ELEMENTS = 600_000
TENSOR_BYTES = 3 * ELEMENTS * 2
IDS = ("1", "2", "3", "4", "5")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five models of three tensors, in several shards; nothing writes to them."""
    generator = torch.Generator().manual_seed(1)
    made = {id: {key: torch.randn(ELEMENTS, generator=generator).half() for key in "xyz"} for id in IDS}
    return write_models(tmp_path_factory.mktemp("models"), made)


def plan_of(models: Path, out: Path, listed: str, store: Store | None = None, policies: Policies | None = None) -> Plan:
    wanted = request(models, out, selections={"all": listed}, budget=BUDGET, policies=policies)
    plan = open_plan(wanted, store or LocalStore())
    assert plan.problems == ()
    return plan


def together(
    plans: Sequence[Plan], store: Store | None = None, progress: Callable[[int], None] = lambda _: None
) -> list[Result | MergeflowError]:
    return run_together(fuse(plans), LocalExecutor(BUDGET), store or LocalStore(), progress)


def complete(results: Sequence[Result | MergeflowError]) -> list[Result]:
    assert [one for one in results if isinstance(one, MergeflowError)] == []
    return [one for one in results if isinstance(one, Result)]


def content(out: Path) -> bytes:
    return (out / "merged.safetensors").read_bytes()


def left_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def alternatives(count: int) -> list[str]:
    """That many lists, of which every two differ."""
    lists = [f"{a},{b}" for a in IDS for b in IDS if a != b]
    return (["1,2,3,4,5", "3", *lists])[:count]


# --- read once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 20])
def test_every_needed_byte_is_read_once_and_the_files_are_those_of_separate_runs(
    count: int, models: Path, tmp_path: Path
) -> None:
    store = CountingStore(LocalStore())
    lists = alternatives(count)
    plans = [plan_of(models, tmp_path / str(number), listed, store) for number, listed in enumerate(lists)]
    store.forget()
    told: list[int] = []
    results = complete(together(plans, store, told.append))
    used = {checkpoint.path: checkpoint for plan in plans for checkpoint in plan.checkpoints}
    for path, checkpoint in used.items():
        assert overlaps(store.reads(path)) == []
        assert merged(store.reads(path)) == [(checkpoint.stat.size - TENSOR_BYTES, checkpoint.stat.size)]
    assert {path for path in store.paths_read() if path.startswith(str(models))} == used.keys()
    assert sum(told) == results[0].whole.bytes_read == len(used) * TENSOR_BYTES
    for number, listed in enumerate(lists):
        alone = run(plan_of(models, tmp_path / "alone" / str(number), listed), LocalExecutor(BUDGET))
        assert content(tmp_path / str(number)) == content(tmp_path / "alone" / str(number))
        assert results[number].digests == alone.digests
    assert left_in(tmp_path) == sorted(
        f"{place}{number}/merged.safetensors" for number in range(count) for place in ("", "alone/")
    )


def test_jobs_of_several_outputs_with_composites_and_all_dtypes_are_as_if_alone(tmp_path: Path) -> None:
    directory = write_models(tmp_path / "models", toy_models())
    wanted = [("both", ("first", "second")), ("one", ("second",)), ("again", ("first", "second"))]
    plans = [open_plan(toy_request(directory, tmp_path / name, BUDGET, names)) for name, names in wanted]
    results = complete(together(plans))
    run(open_plan(toy_request(directory, tmp_path / "alone", BUDGET)), LocalExecutor(BUDGET))
    for (name, names), result in zip(wanted, results, strict=True):
        assert len(result.digests) == len(names)
        for one in names:
            path = f"{one}.safetensors"
            assert (tmp_path / name / path).read_bytes() == (tmp_path / "alone" / path).read_bytes()


def test_a_result_says_what_it_shares(models: Path, tmp_path: Path) -> None:
    plans = [plan_of(models, tmp_path / "a", "1,2"), plan_of(models, tmp_path / "b", "2,3")]
    for result in complete(together(plans)):
        assert result.shared is not None
        assert (result.whole.bytes_read, result.shared.bytes_apart) == (3 * TENSOR_BYTES, 4 * TENSOR_BYTES)
    (alone,) = complete(together([plan_of(models, tmp_path / "c", "1,2")]))
    assert alone.shared is None
    assert alone.whole is alone.plan


def test_what_is_tolerated_is_told_to_those_who_use_it(models: Path, tmp_path: Path) -> None:
    mine = write_models(tmp_path / "models", {id: load_file(models / f"{id}.safetensors") for id in IDS})
    broken = load_file(mine / "2.safetensors")
    broken["y"][:3] = torch.nan
    write_models(mine, {"2": broken})
    skip = Policies(nonfinite="skip")
    plans = [plan_of(mine, tmp_path / name, listed, policies=skip) for name, listed in {"a": "1,2", "b": "1,3"}.items()]
    using, other = complete(together(plans))
    assert using.tolerated == {("2", "y"): 3}
    assert other.tolerated == {}


# --- failing alone --------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(models: Path, tmp_path: Path) -> Path:
    """The models, of which 2 has a NaN at the very beginning."""
    tensors = {id: load_file(models / f"{id}.safetensors") for id in IDS}
    tensors["2"]["x"][0] = torch.nan
    return write_models(tmp_path / "models", tensors)


@pytest.mark.parametrize("order", [("1,2", "1,3", "3,4"), ("1,3", "1,2", "3,4"), ("1,3", "3,4", "1,2")])
def test_a_value_that_one_job_cannot_merge_fails_that_job_alone(
    order: tuple[str, ...], broken: Path, tmp_path: Path
) -> None:
    results = together([plan_of(broken, tmp_path / "out" / listed, listed) for listed in order])
    by_list = dict(zip(order, results, strict=True))
    assert isinstance(by_list["1,2"], UnmergeableValues)
    assert "'x': model 2 has 1 NaN" in str(by_list["1,2"])
    assert left_in(tmp_path / "out") == ["1,3/merged.safetensors", "3,4/merged.safetensors"]
    for listed in ("1,3", "3,4"):
        run(plan_of(broken, tmp_path / "alone" / listed, listed), LocalExecutor(BUDGET))
        assert content(tmp_path / "out" / listed) == content(tmp_path / "alone" / listed)


def test_a_job_is_given_up_before_its_draft_was_opened_by_a_worker(broken: Path, tmp_path: Path) -> None:
    """The draft is gone when a later shard would write to it, which is nobody else's matter."""

    class OneAfterTheOther:
        name = "slow"
        in_process = True
        startup_seconds = 0.0

        def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
            for shard in shards:  # with a worker of its own, as on many machines
                yield from LocalExecutor(BUDGET).map(job, [shard])

    plans = [plan_of(broken, tmp_path / "out" / listed, listed) for listed in ("1,2", "1,3")]
    assert len(plans[0].shards) > 2
    failed, good = run_together(fuse(plans), OneAfterTheOther(), LocalStore())
    assert isinstance(failed, UnmergeableValues)
    assert isinstance(good, Result)
    assert left_in(tmp_path / "out") == ["1,3/merged.safetensors"]


class Failing(LocalStore):
    """A store that refuses to do one thing for paths that hold a word."""

    def __init__(self, word: str, what: str) -> None:
        self.word, self.what = word, what

    def _refuse(self, path: str, what: str) -> None:
        if what == self.what and self.word in path:
            raise StorageError(f"{path}: no {what}")

    def draft(self, path: str, size: int) -> LocalDraft:
        self._refuse(path, "draft")
        draft = LocalDraft(Path(path), size)
        setattr(draft, "sync", self._before(draft.sync, path, "sync"))  # noqa: B010
        setattr(draft, "commit", self._before(draft.commit, path, "commit"))  # noqa: B010
        return draft

    def _before(self, act: Callable[[], None], path: str, what: str) -> Callable[[], None]:
        def acting() -> None:
            self._refuse(path, what)
            act()

        return acting

    def reader(self, path: str) -> LocalFile:
        self._refuse(path, "reader")
        return super().reader(path)

    def writer(self, address: str) -> LocalFile:
        self._refuse(address, "writer")
        return super().writer(address)


@pytest.mark.parametrize("what", ["draft", "writer", "sync", "commit"])
def test_a_storage_that_refuses_one_output_fails_that_job_alone(what: str, models: Path, tmp_path: Path) -> None:
    store = Failing("bad", what)
    plans = [plan_of(models, tmp_path / name, "1,2") for name in ("good", "bad", "fine")]
    good, bad, fine = together(plans, store)
    assert isinstance(bad, StorageError)
    assert f"no {what}" in str(bad)
    assert isinstance(good, Result)
    assert isinstance(fine, Result)
    kept = [f"bad/merged.safetensors.draft{end}" for end in ("", ".journal")] if what in ("sync", "commit") else []
    assert left_in(tmp_path) == [*kept, "fine/merged.safetensors", "good/merged.safetensors"]


def test_nothing_is_read_for_a_job_that_cannot_begin(models: Path, tmp_path: Path) -> None:
    plans = [plan_of(models, tmp_path / name, listed) for name, listed in (("a", "1,2"), ("bad", "3,4"), ("b", "2,5"))]
    store = CountingStore(Failing("bad", "draft"))
    first, failed, last = together(plans, store)
    assert isinstance(failed, StorageError)
    for result in complete([first, last]):
        assert result.shared is not None
        assert result.shared.alone == (plans[0], plans[2])
    assert {Path(path).stem for path in store.paths_read() if path.startswith(str(models))} == {"1", "2", "5"}


def test_what_was_fused_is_what_is_done(models: Path, tmp_path: Path) -> None:
    fused = fuse([plan_of(models, tmp_path / "a", "1,2"), plan_of(models, tmp_path / "b", "2,3")])
    assert all(result.shared is fused for result in complete(run_together(fused, LocalExecutor(BUDGET), LocalStore())))


def test_a_source_that_cannot_be_read_fails_those_who_need_it(models: Path, tmp_path: Path) -> None:
    plans = [plan_of(models, tmp_path / listed, listed) for listed in ("1,2", "1,3", "2,4", "3,4")]
    results = together(plans, Failing("/2.safetensors", "reader"))
    assert [isinstance(one, StorageError) for one in results] == [True, False, True, False]
    assert left_in(tmp_path) == ["1,3/merged.safetensors", "3,4/merged.safetensors"]


def test_a_source_that_was_changed_fails_those_who_need_it(models: Path, tmp_path: Path) -> None:
    mine = write_models(tmp_path / "models", {id: load_file(models / f"{id}.safetensors") for id in IDS})
    plans = [plan_of(mine, tmp_path / "out" / listed, listed) for listed in ("1,2", "1,3")]
    os.utime(mine / "2.safetensors", ns=(1, 1))
    changed, good = together(plans)
    assert isinstance(changed, StorageError)
    assert "model 2" in str(changed)
    assert isinstance(good, Result)
    assert left_in(tmp_path / "out") == ["1,3/merged.safetensors"]


def test_where_no_job_can_begin_nothing_is_read(models: Path, tmp_path: Path) -> None:
    counted = CountingStore(Failing("bad", "draft"))
    plans = [plan_of(models, tmp_path / "bad" / name, "1,2") for name in ("a", "b")]
    assert all(isinstance(one, StorageError) for one in together(plans, counted))
    assert counted.paths_read() == []


# --- interruption ---------------------------------------------------------------------------------------------------


def test_an_interruption_in_the_middle_leaves_nothing_but_drafts(models: Path, tmp_path: Path) -> None:
    plans = [plan_of(models, tmp_path / name, "1,2") for name in ("a", "b")]

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(plans, progress=interrupt)
    kept = [f"merged.safetensors.draft{end}" for end in ("", ".journal")]
    assert left_in(tmp_path) == [f"{name}/{file}" for name in ("a", "b") for file in kept]


def test_an_interruption_between_the_renames_of_two_jobs_comes_too_late(models: Path, tmp_path: Path) -> None:
    class Interrupted(LocalStore):
        def draft(self, path: str, size: int) -> LocalDraft:
            draft = LocalDraft(Path(path), size)
            commit = draft.commit

            def committing() -> None:
                os.kill(os.getpid(), signal.SIGINT)
                commit()

            setattr(draft, "commit", committing)  # noqa: B010
            return draft

    plans = [plan_of(models, tmp_path / name, "1,2") for name in ("a", "b")]
    complete(together(plans, Interrupted()))
    assert left_in(tmp_path) == ["a/merged.safetensors", "b/merged.safetensors"]
