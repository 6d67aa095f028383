"""Who has which shard: the turns that a run can take, without a cluster."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.execute.ray.ledger import ATTEMPTS, SLOW_SECONDS, Among, Ledger, Loss

TWO = Among(2, 2)
ALONE = Among(1, 1)


def loss(node: str = "n1") -> Loss:
    return Loss(node, f"the actor on {node}", "it died")


def all_of(ledger: Ledger, actor: str, node: str = "n1", among: Among = TWO, now: float = 0.0) -> list[int]:
    """All that an actor may have now."""
    taken = []
    while (shard := ledger.take(actor, node, among, now)) is not None:
        taken.append(shard)
    return taken


def test_an_actor_gets_what_it_works_on_and_one_more_while_there_is_plenty() -> None:
    ledger = Ledger(range(100), reads=2)
    assert all_of(ledger, "a") == [0, 1, 2]
    assert all_of(ledger, "b") == [3, 4, 5]
    assert ledger.done("a", 1, 1.0)
    assert all_of(ledger, "a") == [6]


def test_near_the_end_nobody_has_a_shard_waiting_behind_others() -> None:
    ledger = Ledger(range(7), reads=2)
    assert all_of(ledger, "a") == [0, 1, 2]
    assert all_of(ledger, "b") == [3, 4]
    assert ledger.done("a", 0, 1.0)
    assert all_of(ledger, "a") == []
    assert all_of(ledger, "b") == []


def test_what_was_not_begun_when_its_actor_was_lost_is_no_suspect() -> None:
    ledger = Ledger(range(100), reads=2)
    all_of(ledger, "a")
    assert ledger.lost("a", loss()) == []
    assert [bool(ledger.losses(shard)) for shard in (0, 1, 2)] == [True, True, False]


def test_what_is_nobodys_fault_is_held_against_no_shard() -> None:
    ledger = Ledger(range(4), reads=4)
    all_of(ledger, "a")
    assert ledger.lost("a", None) == []
    assert sorted(all_of(ledger, "b")) == [0, 1, 2, 3]
    assert not any(ledger.losses(shard) for shard in range(4))


def test_a_suspect_is_done_alone_and_on_another_node() -> None:
    ledger = Ledger(range(20), reads=2)
    all_of(ledger, "a")
    all_of(ledger, "b", "n2")
    ledger.lost("a", loss("n1"))
    assert all_of(ledger, "c", "n1") != []  # on the node where it was lost
    assert all_of(ledger, "b", "n2") == []  # makes room
    for shard in (3, 4):
        ledger.done("b", shard, 1.0)
        assert all_of(ledger, "b", "n2") == []
    ledger.done("b", 5, 1.0)
    (alone,) = all_of(ledger, "b", "n2")
    assert ledger.losses(alone) == [loss("n1")]
    ledger.done("b", alone, 2.0)
    (other,) = all_of(ledger, "b", "n2")
    assert {alone, other} == {0, 1}


def test_where_there_is_one_node_a_suspect_is_done_there() -> None:
    ledger = Ledger(range(20), reads=2)
    all_of(ledger, "a", among=ALONE)
    ledger.lost("a", loss())
    assert all_of(ledger, "b", among=ALONE) == [1]


def test_a_suspect_that_was_lost_on_all_nodes_may_go_to_any() -> None:
    ledger = Ledger(range(1), reads=2)
    for node in ("n1", "n2"):
        assert all_of(ledger, node, node) == [0]
        assert ledger.lost(node, loss(node)) == []
    assert all_of(ledger, "a", "n1") == [0]


def test_an_idle_actor_helps_with_what_another_has_had_for_long_and_the_first_receipt_counts() -> None:
    ledger = Ledger(range(4), reads=2)
    assert all_of(ledger, "slow", now=0.0) == [0, 1]
    assert all_of(ledger, "fast", now=0.0) == [2, 3]
    for shard in (2, 3):
        assert ledger.done("fast", shard, 1.0)
    assert all_of(ledger, "fast", now=SLOW_SECONDS) == []
    assert all_of(ledger, "fast", now=SLOW_SECONDS + 0.1) == [0]
    assert all_of(ledger, "third", now=SLOW_SECONDS + 0.1) == [1]
    assert ledger.done("fast", 0, SLOW_SECONDS + 1)
    assert not ledger.done("slow", 0, SLOW_SECONDS + 2)
    assert ledger.left == 1


def test_nobody_is_helped_by_two() -> None:
    ledger = Ledger(range(1), reads=1)
    assert all_of(ledger, "a") == [0]
    assert all_of(ledger, "b", now=100.0) == [0]
    assert all_of(ledger, "c", now=1000.0) == []


def test_a_shard_that_another_has_too_is_not_given_again_when_one_of_them_is_lost() -> None:
    ledger = Ledger(range(1), reads=1)
    all_of(ledger, "a")
    all_of(ledger, "b", now=100.0)
    ledger.lost("a", loss())
    assert all_of(ledger, "c", "n3", Among(3, 3), now=101.0) == []
    assert ledger.done("b", 0, 102.0)
    assert ledger.left == 0


@pytest.mark.parametrize("reads", [1, 2, 4])
@pytest.mark.parametrize("nodes", [1, 2, 3])
@given(seed=st.integers(0, 10**6), poison=st.integers(0, 29))
def test_only_the_shard_that_kills_its_actor_is_given_up(nodes: int, reads: int, seed: int, poison: int) -> None:
    draw = random.Random(seed)
    ledger = Ledger(range(30), reads)
    actors = {f"a{index}": f"n{index % nodes}" for index in range(4)}
    held: dict[str, list[int]] = {actor: [] for actor in actors}
    new, deaths = len(actors), 0
    while True:
        for actor, node in actors.items():
            held[actor] += all_of(ledger, actor, node, Among(len(actors), nodes))
        actor = draw.choice([one for one, has in held.items() if has])
        working = held[actor][:reads]
        if poison in working and draw.random() < 0.5:
            deaths += 1
            hopeless = ledger.lost(actor, loss(actors[actor]))
            if hopeless:
                break
            del held[actor]
            actors[f"a{new}"] = actors.pop(actor)
            held[f"a{new}"] = []
            new += 1
        else:
            harmless = [shard for shard in working if shard != poison]
            if harmless:
                shard = draw.choice(harmless)
                held[actor].remove(shard)
                assert ledger.done(actor, shard, 0.0)
    assert hopeless == [poison]
    assert deaths == ATTEMPTS


@given(seed=st.integers(0, 10**6), reads=st.integers(1, 4), shards=st.integers(1, 40))
def test_whoever_is_lost_every_shard_is_done_once(seed: int, reads: int, shards: int) -> None:
    draw = random.Random(seed)
    ledger = Ledger(range(shards), reads)
    held: dict[str, list[int]] = {f"a{index}": [] for index in range(3)}
    done: list[int] = []
    new, now = 3, 0.0
    while ledger.left:
        now += draw.choice([0.1, 20.0])
        for actor in held:
            held[actor] += all_of(ledger, actor, actor, Among(3, 3), now)
            assert ledger.holds(actor) == len(held[actor])
        actor = draw.choice([one for one, has in held.items() if has])
        if draw.random() < 0.2:
            ledger.lost(actor, None)
            del held[actor]
            held[f"a{new}"] = []
            new += 1
        else:
            shard = held[actor].pop(draw.randrange(len(held[actor])))
            if ledger.done(actor, shard, now):
                done.append(shard)
    assert sorted(done) == list(range(shards))
