"""Where the next actors are put: on nodes that have room, and that see what is seen here."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from mergeflow.errors import ExecutorError
from mergeflow.execute.ray.checks import Checks
from mergeflow.execute.ray.nodes import choose, fits, in_words, listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.execute.ray.clock import Awake
    from mergeflow.execute.ray.connect import Connection
    from mergeflow.execute.ray.nodes import Node, Watch
    from mergeflow.execute.ray.options import RayOptions
    from mergeflow.execute.shard import Job

log = logging.getLogger(__name__)

ROOM_SECONDS = 30.0
"""How long a run waits for a node that could hold an actor at all: nodes of a new cluster come one after the other."""
START_SECONDS = 120.0
"""How long an actor may need to be ready, and a node to look at all files, whatever the patience for those that work: a
node may read torch from a network first."""
TELL_SECONDS = 30.0
STARTS = 3
"""How often an actor may fail to start on a node before that is left out."""


class Places:
    """The nodes of a cluster, by what has been seen of them."""

    def __init__(self, connection: Connection, options: RayOptions, job: Job, watch: Watch, clock: Awake) -> None:
        self.need = {"CPU": 1.0, **options.resources}
        """What an actor takes."""
        self.seconds = max(START_SECONDS, options.patience)
        """How long a start may take."""
        self.checks = Checks(connection, job, watch)
        self._options, self._watch, self._clock = options, watch, clock
        self._failed: Counter[str] = Counter()
        """By node, how often actors have failed to start."""
        self._rest: dict[str, float] = {}
        """By node, when the next may be tried."""
        self._room = self._told = clock.now()
        """When there was last a node that could hold an actor."""
        self._worked = False

    def started(self, node: Node) -> None:
        """An actor is ready on a node."""
        self._worked = True
        self._failed[node.id] = 0

    def failed(self, node: Node) -> None:
        """An actor did not start on a node; try again after a while, and not for ever."""
        self._failed[node.id] += 1
        self._rest[node.id] = self._clock.now() + 2.0 ** self._failed[node.id]

    def next(self, wanted: int, there: Counter[str], coming: Counter[str]) -> list[Node]:
        """The nodes for so many more actors, as far as there is room and nodes have been asked.

        `there` are by node the actors that there are, `coming` those of them whose resources may not be taken yet.
        Raises `ExecutorError` where there is no room for any, and what is wrong with the first nodes.
        """
        now, nodes = self._clock.now(), self._watch.nodes
        large = [node for node in nodes if fits(self.need, node.total)]
        self._check_room(nodes, large, now)
        if self.checks.busy:
            self.checks.turn(now, self.seconds)
            return []
        able = [node for node in large if node.id not in self.checks.refused and self._failed[node.id] < STARTS]
        rested = [node for node in able if self._rest.get(node.id, 0.0) <= now]
        chosen = self._choose(rested, wanted, there.copy(), coming.copy())
        unchecked = list({node.id: node for node in chosen if not self.checks.passed(node)}.values())
        if unchecked:
            self.checks.begin(unchecked, now)
        elif large:
            self.checks.settle()
        if large and not able and not there:
            raise ExecutorError(f"no node of the cluster is left that can work: {listed(nodes)}; see the log for why")
        if not chosen and not there and now - self._told > TELL_SECONDS:
            self._told = now
            free = "; ".join(f"{node.name} has {in_words(node.free)}" for node in able)
            log.warning("waiting for room: an actor takes %s, and free are: %s", in_words(self.need), free)
        return [] if self.checks.first else [node for node in chosen if self.checks.passed(node)]

    def _choose(self, able: Sequence[Node], wanted: int, there: Counter[str], coming: Counter[str]) -> list[Node]:
        chosen: list[Node] = []
        while len(chosen) < wanted:
            node = choose(able, self.need, self._options.placement, there, coming)
            if node is None:
                break
            chosen.append(node)
            there[node.id] += 1
            coming[node.id] += 1
        return chosen

    def _check_room(self, nodes: Sequence[Node], able: Sequence[Node], now: float) -> None:
        """Raise `ExecutorError` if what was asked for has not been there for long."""
        strictly = self._options.workers if self._options.placement == "strict_spread" and not self._worked else None
        if len(able) >= (strictly or 1):
            self._room = now
        if now - self._room <= (self._options.patience if self._worked else ROOM_SECONDS):
            return
        has = listed(nodes)
        if strictly and able:
            raise ExecutorError(
                f"executor.placement=strict_spread with executor.workers={strictly} asks for {strictly} nodes with "
                f"{in_words(self.need)} each, and the cluster has {len(able)}: {has}; lower executor.workers, or "
                "choose executor.placement=spread"
            )
        raise ExecutorError(
            f"an actor takes {in_words(self.need)}, and no node has so much: {has}; add such a node, or change "
            "executor.resources"
        )
