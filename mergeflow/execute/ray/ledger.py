"""Who has which shard: a value that knows nothing of Ray, so that every turn it can take is tested without one."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTEMPTS = 3
"""How often a shard is begun by actors that are lost over it, before the run is given up."""
SLOW = 3.0
"""An actor that has had a shard for so many times as long as is usual is helped by one that has nothing to do."""
SLOW_SECONDS = 10.0
"""And for so long at least: beside what is short, everything else is slow now and then."""


class Loss(NamedTuple):
    """One actor that was lost while it worked on a shard."""

    node: str
    """The id of its node."""
    where: str
    """Which node and process, for a person."""
    why: str


class Among(NamedTuple):
    """How many actors there are, and on how many nodes."""

    actors: int
    nodes: int


class Ledger:
    """The shards of a run: waiting, held by actors, or done.

    A shard that was lost with its actor is a suspect: it may be what its actor died of. A suspect is done by an actor
    that does nothing else meanwhile, so that those which only were there are soon told from the one that did it; and
    where there are several nodes, by one of another node.
    """

    def __init__(self, shards: Sequence[int], reads: int) -> None:
        self._waiting = deque(shards)
        self._suspects: deque[int] = deque()
        self._left = set(shards)
        self._reads = reads
        self._held: dict[str, dict[int, float]] = {}
        """For each actor, since when it has what, in the order in which it begins them."""
        self._took: deque[float] = deque(maxlen=64)
        self._losses: dict[int, list[Loss]] = {}
        self._making_room: set[str] = set()
        """The actors that get nothing more until they have done all, and then a suspect."""

    @property
    def left(self) -> int:
        """How many shards are not done."""
        return len(self._left)

    def losses(self, shard: int) -> list[Loss]:
        """The actors that were lost over a shard."""
        return self._losses.get(shard, [])

    def holds(self, actor: str) -> int:
        """How many shards an actor has."""
        return len(self._held.get(actor, {}))

    def take(self, actor: str, node: str, among: Among, now: float) -> int | None:
        """The next shard for an actor on `node`; None if it should have no more now.

        It gets as many as it works on at a time, and one more so that it never waits for an answer; not near the end,
        where others would wait for it.
        """
        has = self._held.setdefault(actor, {})
        if any(shard in self._losses for shard in has):
            return None
        suspect = self._suspect(node, among)
        if suspect is None:
            self._making_room.discard(actor)
        elif actor in self._making_room or len(self._making_room) < len(self._suspects):
            self._making_room.add(actor)
            if has:
                return None
            self._making_room.discard(actor)
            self._suspects.remove(suspect)
            has[suspect] = now
            return suspect
        plenty = len(self._waiting) > among.actors * self._reads
        if len(has) >= self._reads + plenty:
            return None
        shard = self._waiting.popleft() if self._waiting else None if has else self._late(actor, now)
        if shard is not None:
            has[shard] = now
        return shard

    def _suspect(self, node: str, among: Among) -> int | None:
        """The suspect that an actor of this node may have."""
        for shard in self._suspects:
            if among.nodes < 2 or all(loss.node != node for loss in self._losses[shard]):
                return shard
        tried = {loss.node for shard in self._suspects for loss in self._losses[shard]}
        return self._suspects[0] if self._suspects and len(tried) >= among.nodes else None

    def _late(self, actor: str, now: float) -> int | None:
        """A shard that somebody else has had for long, and nobody else helps with."""
        limit = max(SLOW * median(self._took), SLOW_SECONDS) if self._took else SLOW_SECONDS
        since: dict[int, list[float]] = {}
        for held in self._held.values():
            for shard, began in held.items():
                if shard in self._left:
                    since.setdefault(shard, []).append(began)
        late = [(began[0], shard) for shard, began in since.items() if len(began) == 1 and now - began[0] > limit]
        return min(late)[1] if late else None

    def done(self, actor: str, shard: int, now: float) -> bool:
        """Note that an actor has done a shard; False if that was done already, and its receipt is to be dropped."""
        began = self._held[actor].pop(shard)
        if shard not in self._left:
            return False
        self._took.append(now - began)
        self._left.remove(shard)
        return True

    def lost(self, actor: str, loss: Loss | None) -> list[int]:
        """Take back what a lost actor had; without a `loss`, nothing is held against its shards.

        Returns those that have now been lost too often.
        """
        hopeless = []
        self._making_room.discard(actor)
        for place, shard in enumerate(self._held.pop(actor, {})):
            if shard not in self._left:
                continue
            if loss is not None and place < self._reads:  # those behind were not begun
                self._losses.setdefault(shard, []).append(loss)
                if len(self._losses[shard]) >= ATTEMPTS:
                    hopeless.append(shard)
            if not any(shard in held for held in self._held.values()):
                (self._suspects if shard in self._losses else self._waiting).appendleft(shard)
        return hopeless
