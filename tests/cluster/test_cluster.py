"""Three hosts with addresses of their own, real `ray start` processes, a token, and a common directory.

Run by `make cluster-test`. What the hosts are is told in `hosts`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.cluster.cluster import WRITES

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster, Merge

pytestmark = pytest.mark.cluster

BEGUN = 50
"""Writes after which a merge has surely begun, and is far from its end."""


def succeeded(merge: Merge, wanted: bytes) -> str:
    """What the program told; the file must be what threads of one process make."""
    code, told = merge.finish()
    assert code == 0, told
    assert merge.file.read_bytes() == wanted, told
    assert sorted(path.name for path in merge.out.glob("*.draft*")) == []
    return told


def test_all_hosts_work_on_a_merge_and_the_faster_ones_do_more(cluster: Cluster, wanted: bytes) -> None:
    cluster.add("slow", slowness=0.05)
    merge = cluster.merge("together", "executor.workers=3")
    succeeded(merge, wanted)
    assert merge.workers() == {"alpha", "beta", "slow"}
    assert cluster.written() >= WRITES
    assert 0 < cluster.written("slow") < cluster.written("beta") / 2
    cluster.hosts["slow"].end()


def test_a_node_with_another_token_is_turned_away(cluster: Cluster) -> None:
    stranger = cluster.host("stranger")
    code, told = cluster.start_ray(stranger, token="a token that nobody else has, a token that nobody else has")
    stranger.end()
    assert code != 0
    assert "Authentication token is missing or incorrect" in told


def test_a_run_with_another_token_is_told_so(cluster: Cluster) -> None:
    code, told = cluster.merge("untrusted", token="a token that nobody else has, a token that nobody else has").finish()
    assert code == 1
    assert "cannot reach the Ray cluster" in told
    assert "Traceback" not in told


def test_a_node_that_is_cut_off_for_a_moment_goes_on(cluster: Cluster, wanted: bytes) -> None:
    gamma = cluster.add("gamma")
    merge = cluster.merge("moment", "executor.workers=3")
    cluster.wait_for_writes(merge, BEGUN, "gamma")
    gamma.cut()
    time.sleep(1)  # less than Ray takes to give a node up
    gamma.join()
    before = cluster.written("gamma")
    cluster.wait_for_writes(merge, before + BEGUN, "gamma")
    succeeded(merge, wanted)
    gamma.end()
