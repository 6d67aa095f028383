"""A sample tells one device from another, and reads no more than it may."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeflow.execute.probe import SECONDS, SHARE, probe
from mergeflow.plan.pace import Measured, paced
from tests.fakes import MemoryStore
from tests.plan.test_pace import AUTO, plan_of
from tests.simulated import DISK, FLASH, NETWORK, Device, SimulatedStore

if TYPE_CHECKING:
    from mergeflow.plan.plan import Plan

BIG = 60
"""Models; about 6 GB, none of which exists."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(BIG)


def sample(plan: Plan, device: Device) -> tuple[Measured, SimulatedStore]:
    store = SimulatedStore(device)
    measured = probe(plan, store)
    assert measured is not None
    return measured, store


@pytest.mark.parametrize("device", [DISK, NETWORK], ids=["disk", "network"])
def test_a_sample_finds_what_a_device_is_like(plan: Plan, device: Device) -> None:
    measured, _ = sample(plan, device)
    assert measured.latency == pytest.approx(device.latency, rel=0.4)
    assert measured.stream == pytest.approx(device.stream, rel=0.5)
    assert measured.serial == (device.at_once == 1)
    assert measured.merging > 0
    assert measured.seconds < 3 * SECONDS


def test_a_disk_gets_long_reads_and_a_network_many() -> None:
    small = plan_of(6)
    disk = paced(small, sample(small, DISK)[0])
    network = paced(small, sample(small, NETWORK)[0])
    assert disk.memory.longest_read > AUTO.block
    assert disk.budget.reads_in_flight <= AUTO.reads_in_flight
    assert network.budget.reads_in_flight > AUTO.reads_in_flight


@pytest.mark.parametrize("device", [DISK, NETWORK, FLASH], ids=["disk", "network", "flash"])
def test_a_sample_is_a_hundredth_at_most_and_only_of_what_is_selected(plan: Plan, device: Device) -> None:
    measured, store = sample(plan, device)
    read = sum(end - begin for _, begin, end in store.reads)
    assert read == measured.bytes_read
    assert 0 < read <= plan.bytes_read / SHARE
    wanted = {
        (plan.checkpoints[source].path, offset, offset + strip.elements * 2)
        for strip in plan.strips
        for source, offset in zip(strip.sources, strip.offsets, strict=True)
    }
    for path, begin, end in store.reads:
        assert any(path == its and first <= begin and end <= last for its, first, last in wanted)


def test_storage_that_fails_gives_no_sample(plan: Plan) -> None:
    assert probe(plan, MemoryStore()) is None
