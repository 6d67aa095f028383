"""Where the next actor is put."""

from __future__ import annotations

import pytest

from mergeflow.execute.ray.nodes import Node, choose, in_words, memory_of_this_node

NEED = {"CPU": 2.0, "disk": 1.0}


def node(id: str, cpus: float, disks: float = 9, free: float | None = None) -> Node:
    total = {"CPU": cpus, "disk": disks, "node:10.0.0.1": 1.0}
    return Node(id, id, total, total | {"CPU": cpus if free is None else free})


def all_of(nodes: list[Node], placement: str, times: int = 20) -> str:
    """The nodes that actors are put on, one after the other, none of which has taken its resources yet."""
    there: dict[str, int] = {}
    found = []
    for _ in range(times):
        chosen = choose(nodes, NEED, placement, there, there)  # type: ignore[arg-type]
        if chosen is None:
            break
        there[chosen.id] = there.get(chosen.id, 0) + 1
        found.append(chosen.id)
    return "".join(found)


@pytest.mark.parametrize(
    ("placement", "expected"), [("spread", "abcabcab"), ("pack", "ccbbbaaa"), ("strict_spread", "abc")]
)
def test_actors_are_spread_or_packed_until_there_is_no_room(placement: str, expected: str) -> None:
    assert all_of([node("a", 6), node("b", 7), node("c", 4)], placement) == expected


@pytest.mark.parametrize(
    "nodes",
    [[], [node("a", 1)], [node("a", 8, disks=0)], [node("a", 8, free=1.5)]],
    ids=["none", "cpu", "disk", "busy"],
)
def test_where_there_is_no_room_there_is_no_node(nodes: list[Node]) -> None:
    assert all_of(nodes, "spread") == ""


def test_resources_are_told_without_those_that_nobody_asks_for() -> None:
    assert (
        in_words({"memory": 8e9, "CPU": 4.0, "node:10.0.0.1": 1.0, "object_store_memory": 1e9})
        == "CPU 4, memory 8.00 GB"
    )
    assert in_words({}) == "nothing"


def test_the_memory_of_a_machine_is_known() -> None:
    total, available = memory_of_this_node()
    assert 0 < available <= total
