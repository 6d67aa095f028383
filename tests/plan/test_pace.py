"""What is chosen for storage of a known kind, and how long that takes, by formulas written down here again."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from mergeflow.errors import OverBudget
from mergeflow.plan.pace import Estimate, Measured, alike, estimate, in_words, paced, recut, samples
from mergeflow.recipe.request import Budget
from tests.plan.builders import OPEN, checkpoint, planned

if TYPE_CHECKING:
    from typing import Any

    from mergeflow.plan.plan import Plan

MIB = 1 << 20
AUTO = Budget(2, 4, 1 << 30, io="auto", auto=("reads_in_flight", "block"))
FLASH = Measured(0.1e-3, 1.5e9, 8, 3e9, 1.4e9, 0.2e-9, 0.4e-9, 0.5e-9, 0.0, True, 26_000_000, 0.1)
DISK = replace(FLASH, latency=8e-3, stream=2e8, together=0.9e8, alone=0.8e8)
NETWORK = replace(FLASH, latency=20e-3, stream=1e8, at_once=32, together=1e9, alone=3.4e7)


def plan_of(models: int = 5, budget: Budget = AUTO, **changes: Any) -> Plan:
    shapes = {"a": (8192, 4096), "b": (4096, 4096), "small": (1280,)}
    checkpoints = [checkpoint(f"{number:03}", shapes) for number in range(models)]
    return planned(checkpoints, architecture=OPEN, dtype="keep", budget=budget, **changes)


def test_what_is_usual_stays_where_nothing_is_much_faster() -> None:
    plan = plan_of()
    assert paced(plan, FLASH) == replace(plan, measured=FLASH)


def test_a_disk_with_a_head_gets_long_reads() -> None:
    plan = paced(plan_of(), DISK)
    assert plan.memory.longest_read >= 16 * MIB
    assert max(tile.stop - tile.start for shard in plan.shards for tile in shard) * 2 >= 15 * MIB
    assert DISK.rate(plan.memory.threads, 16 * MIB) > 1.15 * DISK.rate(8, 4 * MIB)


def test_a_network_file_system_gets_many_reads() -> None:
    plan = paced(plan_of(), NETWORK)
    assert plan.budget.reads_in_flight >= 16
    assert plan.memory.threads == 2 * plan.budget.reads_in_flight


@pytest.mark.parametrize("seen", [FLASH, DISK, NETWORK], ids=["flash", "disk", "network"])
@pytest.mark.parametrize("models", [2, 42, 257])
def test_whatever_is_chosen_keeps_to_the_memory(seen: Measured, models: int) -> None:
    plan = paced(plan_of(models), seen)
    assert plan.memory.projected <= AUTO.memory
    assert plan.memory.landing >= 2 * 4096


@pytest.mark.parametrize(
    ("auto", "kept"), [((), ("reads_in_flight", "block")), (("block",), ("reads_in_flight",))], ids=["both", "one"]
)
@pytest.mark.parametrize("seen", [DISK, NETWORK], ids=["disk", "network"])
def test_what_was_asked_for_is_kept(seen: Measured, auto: tuple[str, ...], kept: tuple[str, ...]) -> None:
    plan = paced(plan_of(budget=replace(AUTO, auto=auto)), seen)
    assert all(getattr(plan.budget, name) == getattr(AUTO, name) for name in kept)


def test_a_pace_moves_no_byte() -> None:
    plan = plan_of()
    fast = paced(plan, NETWORK)
    assert (fast.outputs, fast.strips, fast.checkpoints) == (plan.outputs, plan.strips, plan.checkpoints)
    assert (fast.bytes_read, fast.bytes_written) == (plan.bytes_read, plan.bytes_written)


def test_a_part_of_a_pass_has_the_pace_of_the_whole() -> None:
    whole = paced(plan_of(), DISK)
    part = alike(plan_of(2), whole)
    assert (part.budget, part.measured) == (whole.budget, DISK)


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(OverBudget):
        recut(plan_of(), replace(AUTO, memory=1000))


def test_a_run_takes_as_long_as_the_slower_of_storage_and_cores_and_a_fifth_of_the_other() -> None:
    plan = replace(plan_of(), measured=FLASH)
    found = estimate(plan)
    assert found is not None
    read, written = plan.bytes_read, plan.bytes_written
    row = max(tile.stop - tile.start for shard in plan.shards for tile in shard) * 2
    rate = row / (0.1e-3 + row / 1.5e9) * 3e9 / 1.4e9
    assert found.reading == pytest.approx(read / rate, rel=1e-3)
    assert found.writing == pytest.approx(written / rate, rel=1e-3)
    assert found.working == pytest.approx(read * 0.4e-9 + (read * 0.2e-9 + written * 1.5e-9) / 2)
    assert Estimate(3.0, 2.0, 4.0).total == pytest.approx(5.0 + 0.2 * 4.0)
    assert Estimate(1.0, 1.0, 4.0).total == pytest.approx(4.0 + 0.2 * 2.0)


def test_nothing_is_estimated_without_a_sample() -> None:
    assert estimate(plan_of()) is None
    assert in_words(plan_of()) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resident": 0.0}, "past the page cache: a read"),
        ({"resident": 0.5}, "past the page cache but for the 50 % that lie in it: a read"),
        ({"direct": False}, "through the page cache, which cannot be passed: a read"),
    ],
    ids=["cold", "half", "refused"],
)
def test_it_says_how_rows_are_read_and_why(changes: dict[str, Any], says: str) -> None:
    told = in_words(replace(plan_of(), measured=replace(FLASH, **changes)))
    assert told.startswith("4 read(s) in flight for each of 2 worker(s), of up to 4.19 MB, ")
    assert says in told
    assert told.endswith(
        "a read alone waits 0.1 ms and then gets 1.50 GB/s, 8 at once get 3.00 GB/s (a sample of 26.00 MB in 0.10 s)"
    )


def test_samples_lie_in_what_the_plan_reads_and_are_of_every_source() -> None:
    plan = plan_of()
    taken = list(islice(samples(plan), 200))
    assert {one.source for one in taken} == set(range(5))
    allowed = [
        (source, offset, offset + strip.elements * 2)
        for strip in plan.strips
        for source, offset in zip(strip.sources, strip.offsets, strict=True)
    ]
    for one in taken:
        assert any(
            source == one.source and begin <= one.offset and one.offset + one.length <= end
            for source, begin, end in allowed
        )
    assert len({one.offset for one in taken}) > 20
