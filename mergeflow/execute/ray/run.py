"""One run on a cluster: a loop that gives shards to actors, listens to them, and makes new ones where some are lost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mergeflow.errors import ExecutorError, HeadLost, MergeflowError
from mergeflow.execute.ray.clock import Awake
from mergeflow.execute.ray.ledger import ATTEMPTS, Among, Ledger, Loss
from mergeflow.execute.ray.nodes import Watch
from mergeflow.execute.ray.staff import Staff
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mergeflow.execute.ray.connect import Connection
    from mergeflow.execute.ray.options import RayOptions
    from mergeflow.execute.ray.staff import Actor
    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Receipt
    from mergeflow.recipe.request import Budget

log = logging.getLogger(__name__)

TURN_SECONDS = 0.5
"""How long to wait for an answer before looking at everything else."""
HEAD_SECONDS = 10.0
"""How long the head of a cluster may be silent; 15 seconds after the last word Ray itself stands still."""
STOPS_WITHIN_SECONDS = 0.5
"""How long the last tiles may take once the run is given up; after that their processes are killed over them."""


class Run:
    """The shards of one job, and the actors that do them."""

    def __init__(
        self, connection: Connection, budget: Budget, options: RayOptions, job: Job, shards: Sequence[int]
    ) -> None:
        self._connection = connection
        self._ray = connection.ray
        self._job = job
        self._clock = Awake()
        self._ledger = Ledger(shards, budget.reads_in_flight)
        self._watch = Watch(connection.ray)
        self._staff = Staff(connection, budget, options, job, self._watch, self._ledger.holds, self._clock)
        self._answers, self._heard = 0, self._clock.now()
        self._calls: dict[Any, tuple[Actor, int]] = {}
        """What each shard that is under way will be told by."""

    def start(self) -> int:
        """Have the first actors ready; how many."""
        while not self._staff.settled:
            self._listen_to_the_head()
            self._staff.turn(self._ledger.left)
            self._lay_off()
            self._staff.listen([], TURN_SECONDS)
        return len(self._staff.ready)

    def receipts(self) -> Generator[Receipt, None, None]:
        """Every shard once, by whoever does it first."""
        while self._ledger.left:
            self._listen_to_the_head()
            self._staff.turn(self._ledger.left)
            self._lay_off()
            self._hand_out()
            for call in self._staff.listen(list(self._calls), TURN_SECONDS):
                if (receipt := self._hear(call)) is not None:
                    yield receipt
        self._stop(wait=True)

    def end(self) -> None:
        """Whatever has happened, nobody works any more."""
        try:
            if self._connection.lost:
                self._staff.put_back()
            else:
                self._stop(wait=False)
                self._staff.end()
        finally:
            self._watch.stop()

    def _hand_out(self) -> None:
        now = self._clock.now()
        ready = self._staff.ready
        among = Among(len(ready), len({actor.node.id for actor in ready}))
        for actor in ready:
            while (shard := self._ledger.take(actor.id, actor.node.id, among, now)) is not None:
                self._calls[actor.handle.run.remote(shard)] = actor, shard

    def _hear(self, call: Any) -> Receipt | None:
        """The receipt of a shard, unless somebody else has done it before; an actor that is gone loses its shards."""
        if call not in self._calls:
            return None  # its actor was lost a moment ago
        actor, shard = self._calls.pop(call)
        try:
            receipt: Receipt | None = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, MergeflowError) else ExecutorError(f"a worker failed: {error}") from error
        except self._ray.exceptions.RayError as error:
            self._staff.lose(actor, error)
            return None
        if receipt is None:
            self._staff.lose(actor, None)
            return None
        return receipt if self._ledger.done(actor.id, shard, self._clock.now()) else None

    def _lay_off(self) -> None:
        """Take their shards from the actors that were lost; raises `ExecutorError` for one that was lost too often."""
        for actor, why, blame in self._staff.take_lost():
            self._calls = {call: held for call, held in self._calls.items() if held[0] is not actor}
            log.warning("lost %s: %s; %d shard(s) go to others", actor.where, why, self._ledger.holds(actor.id))
            hopeless = self._ledger.lost(actor.id, Loss(actor.node.id, actor.where, why) if blame else None)
            if hopeless:
                raise ExecutorError(self._given_up(hopeless[0]))

    def _given_up(self, shard: int) -> str:
        tiles = self._job.plan.shards[shard]
        keys = list(dict.fromkeys(self._job.plan.strips[tile.strip].key for tile in tiles))
        losses = self._ledger.losses(shard)
        told = "; ".join(f"{loss.where}: {loss.why}" for loss in losses)
        return (
            f"shard {shard} (tensors {some(keys)}) was begun {ATTEMPTS} times, and each time its actor was lost: {told}"
        )

    def _listen_to_the_head(self) -> None:
        """Raise `HeadLost` if the head has been silent for long: without it nothing can be known of the others."""
        now = self._clock.now()
        if self._watch.answers != self._answers:
            self._answers, self._heard = self._watch.answers, now
        elif now - self._heard > HEAD_SECONDS:
            self._connection.lost = True
            raise HeadLost(
                f"the head of the Ray cluster at {self._watch.head} has not answered for {HEAD_SECONDS:g} s; see "
                "whether its machine runs, start the cluster again, and then the run"
            )

    def _stop(self, wait: bool) -> None:
        """Have all shards end that are under way; whoever does not end them is killed."""
        calls, self._calls = self._calls, {}
        self._staff.stop()
        if calls:
            _, left = self._ray.wait(list(calls), num_returns=len(calls), timeout=STOPS_WITHIN_SECONDS)
            for call in left:
                self._staff.give_up(calls[call][0])
        if wait:
            self._staff.outlive()
