"""Three hosts with addresses of their own, real `ray start` processes, a token, and a common directory.

Run by `make cluster-test`. What the hosts are is told in `hosts`.
"""

from __future__ import annotations

import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.cluster.cluster import WRITES
from tests.program import call

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster, Merge

pytestmark = pytest.mark.cluster

BEGUN = 50
"""Writes after which a merge has surely begun, and is far from its end."""
STOPS_WITHIN_SECONDS = 6.0
"""Twice what is promised: all hosts share the cores of one machine, which have more to do than the program's end."""


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


def test_a_node_that_joins_late_gets_work(cluster: Cluster, wanted: bytes) -> None:
    merge = cluster.merge("late", "executor.workers=null")
    cluster.wait_for_writes(merge, BEGUN)
    cluster.hold()
    late = cluster.add("late")
    cluster.release()
    succeeded(merge, wanted)
    assert "late" in merge.workers()
    assert cluster.written("late") > BEGUN
    late.end()


def test_a_node_that_loses_power_costs_what_it_had_under_way(cluster: Cluster, wanted: bytes) -> None:
    victim = cluster.add("victim")
    merge = cluster.merge("power", "executor.workers=3")
    cluster.wait_for_writes(merge, BEGUN, "victim")
    victim.end()
    done = cluster.written("victim")
    told = succeeded(merge, wanted)
    assert re.search(
        rf"lost the actor on victim \({victim.address}, \w+\), process \d+: .*; \d+ shard\(s\) go to", told
    )
    assert cluster.written("alpha", "beta") >= WRITES - done


def test_a_node_that_is_cut_off_for_long_is_given_up_and_can_join_anew(cluster: Cluster, wanted: bytes) -> None:
    island = cluster.add("island")
    merge = cluster.merge("cut", "executor.workers=null")
    cluster.wait_for_writes(merge, BEGUN, "island")
    island.cut()
    cluster.wait_for(island, "dead")
    alone = cluster.written("island")
    island.join()
    cluster.restart_ray(island)
    told = succeeded(merge, wanted)
    assert "lost the actor on island" in told
    assert cluster.written("island") > alone
    island.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_run_that_is_told_to_stop_does_so_and_leaves_the_cluster_as_it_was(
    cluster: Cluster, wanted: bytes, number: signal.Signals
) -> None:
    merge = cluster.merge(f"stopped-{number.name}", "executor.workers=2")
    cluster.wait_for_writes(merge, BEGUN)
    began = time.monotonic()
    merge.signal(number)
    code, told = merge.finish()
    took = time.monotonic() - began
    assert code == 130, told
    assert took < STOPS_WITHIN_SECONDS, told
    assert not merge.file.exists()
    succeeded(cluster.merge(f"after-{number.name}", "executor.workers=2"), wanted)


def test_the_death_of_the_head_ends_the_run_in_a_sentence_and_it_can_be_resumed_without_a_cluster(
    cluster: Cluster, wanted: bytes
) -> None:
    """The last of the tests: the cluster is gone after it."""
    desk = cluster.add("desk", checkout=True)
    merge = cluster.merge("headless", "executor.workers=3", desk=desk)
    cluster.wait_for_writes(merge, 10 * BEGUN)
    cluster.head.end()
    code, told = merge.finish()
    assert code == 1, told
    assert f"the head of the Ray cluster at {cluster.address} has not answered" in told.splitlines()[-2]
    assert "add resume=true" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert not merge.file.exists()
    assert list(merge.out.glob("*.draft"))
    words = [f"models.dir={cluster.common / 'demo'}", "target=x17", "executor=local", f"out={merge.out}"]
    done = call(*words, "resume=true")
    assert done.code == 0, done.both
    assert merge.file.read_bytes() == wanted
