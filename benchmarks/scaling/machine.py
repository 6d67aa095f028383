"""Machines in numbers: nodes, the storage that holds the models, and what the software itself costs.

Bytes are bytes, times are seconds, rates are per second; `math.inf` stands for "no limit of its own".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

GB, GIB = 1e9, 1 << 30
TEN_GBE, TWENTY_FIVE_GBE, HUNDRED_GBE = 1.15 * GB, 2.9 * GB, 11.5 * GB
"""What TCP leaves of 1.25, 3.125 and 12.5 GB/s."""


@dataclass(frozen=True)
class Node:
    """One machine that works."""

    cores: int = 16
    workers: int = 16
    """Actors; each merges one tile at a time."""
    reads_in_flight: int = 4
    """Threads of each worker."""
    memory: float = 16 * GIB
    """Of the blocks of this node's workers together: `executor.memory` divided by the nodes."""
    network: float = TWENTY_FIVE_GBE
    """Bytes per second of its link, in each direction."""
    unwritten: float = 1 * GB
    """Bytes of results that the kernel keeps in memory until they are synced."""

    def __post_init__(self) -> None:
        _positive("node", self)


@dataclass(frozen=True)
class Storage:
    """What the models are read from, and the output is written to."""

    name: str
    latency: float
    """Seconds from asking for bytes until the first of them arrives, when nobody else asks."""
    stream: float = math.inf
    """Bytes per second of one thread, beyond its latency."""
    disk: float = math.inf
    """Bytes per second that one node gets: of its own disk, or as a client of shared storage."""
    server: float = math.inf
    """Bytes per second that all nodes get together."""
    requests: float = math.inf
    """Reads per second that all nodes get together."""
    requests_per_node: float = math.inf
    """Reads per second that one node gets."""
    open: float = 0.0
    """Seconds to open a file."""
    opens: float = math.inf
    """Files per second that all nodes open together."""
    write: float = math.inf
    """Bytes per second that all nodes write together, down to the disk."""
    local: bool = False
    """Whether every node reads a copy of its own, past the network."""

    def __post_init__(self) -> None:
        _positive("storage", self, zero=("latency", "open"))


@dataclass(frozen=True)
class Costs:
    """What mergeflow, Python and Ray cost. The defaults come from `python -m benchmarks.scaling --measure`."""

    arithmetic: float = 2.2 * GB
    """Bytes of rows that one core merges per second."""
    row_call: float = 4e-6
    """Seconds of interpreter that one row of one piece costs, however short."""
    piece_call: float = 75e-6
    """Seconds of interpreter that one piece costs beside its rows."""
    read_call: float = 0.6e-6
    """Seconds of interpreter that one read costs."""
    copy: float = 5.8 * GB
    """Bytes per second that one core copies from the page cache, which is where every read ends."""
    write_copy: float = 3.7 * GB
    """Bytes per second that one core copies into the page cache."""
    digest: float = 0.64 / GB
    """Seconds of one core for each byte of output: SHA-256."""
    parse: float = 5.8e-3
    """Seconds to parse one header, if no two are equal."""
    plan: float = 1.8e-3
    """Seconds that one model adds to a plan."""
    plan_bytes: float = 16e3
    """Bytes that one model adds to the plan that every worker is sent."""
    unpickle: float = 0.09e-3
    """Seconds in which a worker loads them."""
    headers_at_once: int = 8
    startup: float = 10.0
    """Seconds to start Python, torch and Ray, and the first actor; 8.6 were measured for Ray alone."""
    actors: float = 170.0
    """Actors that a cluster starts per second: 171 of 10,000 in a test of Ray's own (ray-project/ray#31990)."""
    receipt: float = 0.85e-3
    """Seconds of the driver for each receipt."""
    receipt_per_reference: float = 0.19e-6
    """What each call under way adds to that."""
    digest_step: float = float(1 << 20)
    """Bytes that the digest reads back at a time."""

    def __post_init__(self) -> None:
        free = ("receipt", "receipt_per_reference", "startup", "parse", "plan", "plan_bytes", "unpickle", "digest")
        _positive("costs", self, zero=(*free, "row_call", "piece_call", "read_call"))


@dataclass(frozen=True)
class Machine:
    """So many nodes before one storage."""

    nodes: int
    storage: Storage
    node: Node = field(default_factory=Node)
    costs: Costs = field(default_factory=Costs)
    shared_interpreter: bool = False
    """Whether the workers of a node are threads of one process, as with `executor=local`."""
    ray: bool = True
    """Whether Ray is started and a driver hands out the shards."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ConfigError(f"nodes={self.nodes} cannot work; there must be at least 1")
        if not self.ray and self.nodes > 1:
            raise ConfigError(f"{self.nodes} nodes need Ray; without it there is one")

    @property
    def workers(self) -> int:
        """All actors."""
        return self.nodes * self.node.workers

    @property
    def threads(self) -> int:
        """All blocks."""
        return self.workers * self.node.reads_in_flight


def _positive(what: str, values: object, zero: tuple[str, ...] = ()) -> None:
    """Refuse numbers that nothing can be divided by."""
    for name, value in vars(values).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not (value > 0 or name in zero):
            raise ConfigError(f"{what}.{name}={value} must be more than 0")
        if isinstance(value, (int, float)) and value < 0:
            raise ConfigError(f"{what}.{name}={value} must not be negative")


LOCAL = Storage(
    "local",
    latency=100e-6,
    stream=2 * GB,
    disk=6 * GB,
    requests_per_node=500_000,
    open=20e-6,
    write=1 * GB,
    local=True,
)
NFS = Storage(
    "nfs", latency=0.5e-3, stream=1 * GB, server=TEN_GBE, requests=20_000, open=1e-3, opens=5_000, write=0.5 * GB
)
PARALLEL = Storage(
    "parallel",
    latency=1e-3,
    stream=1.5 * GB,
    disk=8 * GB,
    server=40 * GB,
    requests=500_000,
    open=2e-3,
    opens=20_000,
    write=20 * GB,
)
OBJECT = Storage(
    "object",
    latency=20e-3,
    stream=0.1 * GB,
    disk=1.5 * GB,
    server=20 * GB,
    requests=250_000,
    open=20e-3,
    opens=5_000,
    write=1 * GB,
)
STORAGES: Mapping[str, Storage] = {one.name: one for one in (LOCAL, NFS, PARALLEL, OBJECT)}
"""What the tables show."""
TITLES: Mapping[str, str] = {
    "local": "Copies on every node's own NVMe",
    "nfs": "One NFS server with 10 GbE",
    "parallel": "A parallel file system",
    "object": "Object-like storage with 20 ms latency",
}
NETWORKS: Mapping[str, float] = {
    "local": TWENTY_FIVE_GBE,
    "nfs": TEN_GBE,
    "parallel": HUNDRED_GBE,
    "object": TWENTY_FIVE_GBE,
}
"""Bytes per second of a node's link where there is such a storage."""


def scenario(storage: str, nodes: int) -> Machine:
    """The machine of one cell of the tables."""
    return Machine(nodes, STORAGES[storage], Node(network=NETWORKS[storage]))
