"""The nodes of a cluster, as far as actors want something of them."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import ModuleType

    from mergeflow.execute.ray.options import Placement

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 3.0
"""How long the head may take to accept a connection."""
HIDDEN = ("node:", "object_store_memory", "accelerator_type:")
"""Resources that nobody asks for."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster that is alive."""

    id: str
    name: str
    """For a person: its name and address, and the beginning of its id."""
    total: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)


def fits(need: Mapping[str, float], there: Mapping[str, float], times: int = 1) -> bool:
    """Whether `there` are resources for so many actors."""
    return all(there.get(name, 0.0) + 1e-6 >= amount * times for name, amount in need.items())


def choose(
    nodes: Sequence[Node],
    need: Mapping[str, float],
    placement: Placement,
    actors: Mapping[str, int],
    coming: Mapping[str, int],
) -> Node | None:
    """The node for one more actor, or None where there is no room.

    `actors` are by node those that there are, and `coming` those of them whose resources may not be taken yet.
    """
    able = [node for node in nodes if fits(need, node.free, coming.get(node.id, 0) + 1)]
    if placement == "strict_spread":
        able = [node for node in able if not actors.get(node.id)]
    if not able:
        return None
    few = sorted(able, key=lambda node: (actors.get(node.id, 0), node.id))
    return few[-1] if placement == "pack" else few[0]


def in_words(resources: Mapping[str, float]) -> str:
    """Resources for a person: `CPU 4, fast_disk 1, memory 8.00 GB`."""
    shown = [
        f"{name} {si_bytes(amount) if name == 'memory' else f'{amount:g}'}"
        for name, amount in sorted(resources.items())
        if not name.startswith(HIDDEN)
    ]
    return ", ".join(shown) or "nothing"


def listed(nodes: Iterable[Node]) -> str:
    """What each node has, for a message."""
    return "; ".join(f"{node.name} has {in_words(node.total)}" for node in nodes) or "no node at all"


class Watch:
    """A thread that looks at the cluster every second, so that nobody else has to wait when its head is gone.

    Ray itself waits for a head that does not answer, for a minute and with Python's lock, and then ends the process.
    """

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        self.head = str(ray.get_runtime_context().gcs_address)
        self.here = str(ray.get_runtime_context().get_node_id())
        self.nodes: list[Node] = []
        self.answers = 0
        """How often the head has answered."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mergeflow-nodes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A look that waits for a head which is gone is left behind."""
        self._stopped.set()
        self._thread.join(0.2)

    def _run(self) -> None:
        host, _, port = self.head.rpartition(":")
        while not self._stopped.is_set():
            with suppress(Exception):  # whatever it is, it is no answer
                socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
                if not self._stopped.is_set():
                    self.nodes = nodes_of(self._ray)
                    self.answers += 1
            self._stopped.wait(LOOK_SECONDS)


def nodes_of(ray: ModuleType) -> list[Node]:
    """The nodes that are alive, with what is free on them as far as the head has heard."""
    from ray._private import state  # what is free on each node has no public name

    tell: Any = state.available_resources_per_node
    free: dict[str, Any] = tell()
    return [
        Node(node["NodeID"], _name(node), node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _name(node: Mapping[str, Any]) -> str:
    address, host = node["NodeManagerAddress"], node["NodeManagerHostname"]
    given = node.get("NodeName") or address
    return f"{host if given == address else given} ({address}, {node['NodeID'][:8]})"


def memory_of_this_node() -> tuple[int, int]:
    """Bytes of memory that this machine has, and those that are available."""
    page, found = os.sysconf("SC_PAGE_SIZE"), {}
    with suppress(OSError, ValueError), open("/proc/meminfo") as file:  # noqa: PTH123
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    return (
        found.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * page),
        found.get("MemAvailable", os.sysconf("SC_AVPHYS_PAGES") * page),
    )
