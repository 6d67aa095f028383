"""The actors of a run: where they are put, how they are, and who is gone."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from mergeflow.execute.ray.actor import CONTROL, LEASE_SECONDS, ShardActor
from mergeflow.execute.ray.places import Places
from mergeflow.execute.ray.words import Reason, first_lines, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mergeflow.execute.ray.actor import Pulse
    from mergeflow.execute.ray.clock import Awake
    from mergeflow.execute.ray.connect import Connection
    from mergeflow.execute.ray.nodes import Node, Watch
    from mergeflow.execute.ray.options import RayOptions
    from mergeflow.execute.shard import Job
    from mergeflow.recipe.request import Budget

log = logging.getLogger(__name__)

TURN_SECONDS = 1.0
"""How often actors are asked how far they are, and nodes are looked at."""
SETTLE_SECONDS = 10.0
"""How long those that are ready wait for the others before the first shards."""


@dataclass(eq=False)
class Actor:
    """A process of a node, as far as it is known here."""

    id: str
    node: Node
    handle: Any
    begun: float
    pid: int = 0
    """0 until it is ready."""
    alive: float = 0.0
    """When it was last heard to get on, or to have nothing to do."""
    until: float = 0.0
    """When it has ended by itself, should no further question reach it."""
    last: Pulse | None = None
    asked: int = 0
    asking: bool = False
    answered: dict[int, float] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Node and process, for a person."""
        return f"the actor on {self.node.name}" + (f", process {self.pid}" if self.pid else "")


class Lost(NamedTuple):
    """An actor that is gone."""

    actor: Actor
    why: str
    blame: bool
    """Whether its shards may be what it was lost by."""


class Staff:
    """As many actors as are wanted and have room, on nodes that see what is seen here."""

    def __init__(
        self,
        connection: Connection,
        budget: Budget,
        options: RayOptions,
        job: Job,
        watch: Watch,
        holds: Callable[[str], int],
        clock: Awake,
    ) -> None:
        self._ray = connection.ray
        self._budget, self._options, self._watch, self._holds = budget, options, watch, holds
        self._clock = clock
        self._places = Places(connection, options, job, watch, clock)
        self._checks = self._places.checks
        self._lease = min(LEASE_SECONDS, options.patience)
        self._plan = self._ray.put(job)
        self._actors: list[Actor] = []
        self._lost: list[Lost] = []
        self._calls: dict[Any, tuple[Actor, int]] = {}
        """Questions under way; number 0 is to begin."""
        self._numbers = count(1)
        self._turned = clock.now()
        self._worked = False
        self._forgiven = 0.0
        self._outlive = 0.0

    @property
    def ready(self) -> list[Actor]:
        """Those that can be given shards."""
        return [actor for actor in self._actors if actor.pid]

    @property
    def settled(self) -> bool:
        """Whether the first are ready, and no more are coming soon."""
        coming = len(self.ready) < len(self._actors) or self._checks.busy
        return bool(self.ready) and (not coming or self._clock.now() - self.ready[0].begun > SETTLE_SECONDS)

    def turn(self, left: int) -> None:
        """Ask all how they are, give up those who get on with nothing, and have as many as `left` shards keep busy.

        Raises `ExecutorError` where there is no room for any, and what is wrong with the first nodes.
        """
        now = self._clock.now()
        if now - self._turned < TURN_SECONDS and self._worked:
            return
        self._turned = now
        if self._clock.missed() > self._lease / 2:  # actors may have ended because nobody asked them
            self._forgiven = now + self._lease
        for actor in list(self._actors):
            if now - actor.alive > (self._options.patience if actor.pid else self._places.seconds):
                self._give_up(actor)
            elif actor.pid and not actor.asking:
                self._ask(actor)
        there = Counter(actor.node.id for actor in self._actors)
        coming = Counter(actor.node.id for actor in self._actors if not actor.last)
        for node in self._places.next(min(self._budget.workers, left) - len(self._actors), there, coming):
            self._start(node, now)

    def listen(self, others: Sequence[Any], seconds: float) -> list[Any]:
        """Wait for answers for so long; those to `others` are returned."""
        calls = [*others, *self._calls, *self._checks.calls]
        if not calls:
            time.sleep(seconds)
            return []
        if not self._ray.wait(calls, num_returns=1, timeout=seconds)[0]:
            return []
        done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in done:
            if call in self._calls:
                self._hear(call)
            elif call in self._checks.calls:
                self._checks.hear(call)
        mine = set(others)
        return [call for call in done if call in mine]

    def lose(self, actor: Actor, error: Exception | None) -> None:
        """An actor is gone by what a call of it raised, or by itself."""
        stopped = Reason("it was told to stop", certain=True)
        self._lose(actor, stopped if error is None else reason(error, actor.last), error is not None)

    def give_up(self, actor: Actor) -> None:
        """An actor does not do what it is told."""
        self._lose(actor, Reason("it did not stop", certain=False), blame=False)

    def take_lost(self) -> list[Lost]:
        """Who was lost since this was asked before."""
        lost, self._lost = self._lost, []
        return lost

    def stop(self) -> None:
        """Tell all to begin nothing more."""
        for actor in self.ready:
            with suppress(self._ray.exceptions.RayError):
                actor.handle.stop.options(concurrency_group=CONTROL).remote()

    def outlive(self) -> None:
        """Wait until those have ended by themselves that could not be killed for certain."""
        if (left := self._outlive - time.monotonic()) > 0:
            log.info("waiting %.0f s, after which no actor that was lost can write any more", left)
            time.sleep(left)

    def end(self) -> None:
        """Nobody works any more."""
        self._checks.end()
        for actor in self._actors:
            self._kill(actor)
        self._actors = []

    def put_back(self) -> None:
        """Leave the drafts as they were before nodes were asked about them."""
        self._checks.end()

    def _start(self, node: Node, now: float) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        custom = {name: amount for name, amount in self._places.need.items() if name not in own}
        maker = self._ray.remote(concurrency_groups={CONTROL: 1}, max_restarts=0, max_task_retries=0)(ShardActor)
        handle = maker.options(
            **{own[name]: amount for name, amount in self._places.need.items() if name in own},
            resources=custom or None,
            max_concurrency=self._budget.reads_in_flight,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote()
        log.debug("starting an actor on %s", node.name)
        actor = Actor(f"{next(self._numbers)}", node, handle, now, alive=now)
        self._actors.append(actor)
        durable = node.id != self._watch.here  # the page cache of this machine is seen by its own commit
        self._calls[handle.begin.remote(self._plan, self._lease, durable)] = actor, 0

    def _ask(self, actor: Actor) -> None:
        acknowledged = max(actor.answered)
        actor.asked += 1
        actor.asking = True
        actor.until = actor.answered[acknowledged] + self._lease
        actor.answered = {acknowledged: actor.answered[acknowledged]}
        call = actor.handle.pulse.options(concurrency_group=CONTROL).remote(actor.asked, acknowledged)
        self._calls[call] = actor, actor.asked

    def _hear(self, call: Any) -> None:
        """The answer to a question."""
        actor, number = self._calls.pop(call)
        try:
            told = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            self._not_started(actor, first_lines(str(error)))
            return
        except self._ray.exceptions.RayError as error:
            if actor.pid:
                self.lose(actor, error)
            else:
                self._not_started(actor, reason(error, None).text)
            return
        now, actor.answered[number] = self._clock.now(), time.monotonic()
        if number == 0:
            actor.pid, self._worked, actor.alive = told, True, now
            actor.until = actor.answered[0] + self._lease
            self._places.started(actor.node)
            log.debug("%s is ready", actor.where)
            return
        actor.asking = False
        if actor.last is None or told.acts != actor.last.acts or not self._holds(actor.id):
            actor.alive = now
        actor.last = told

    def _not_started(self, actor: Actor, why: str) -> None:
        if actor not in self._actors:
            return
        self._places.failed(actor.node)
        log.warning("an actor did not start on %s: %s", actor.node.name, why)
        self._lose(actor, Reason(why, certain=True), blame=False)

    def _give_up(self, actor: Actor) -> None:
        if actor.pid:
            patience = f"{self._options.patience:g} s (executor.patience)"
            self._lose(actor, Reason(f"it got on with nothing for {patience}", certain=False), blame=True)
        else:
            self._not_started(actor, f"it was not ready within {self._places.seconds:g} s")

    def _lose(self, actor: Actor, why: Reason, blame: bool) -> None:
        if actor not in self._actors:
            return
        self._actors.remove(actor)
        self._calls = {call: asked for call, asked in self._calls.items() if asked[0] is not actor}
        killed = self._kill(actor)
        if actor.pid and not why.certain and not killed:
            self._outlive = max(self._outlive, actor.until)
        if actor.pid:
            self._lost.append(Lost(actor, why.text, blame and self._clock.now() >= self._forgiven))

    def _kill(self, actor: Actor) -> bool:
        """End an actor; whether that is certain."""
        with suppress(self._ray.exceptions.RayError, ValueError):  # what is gone already needs no end
            self._ray.kill(actor.handle)
        if not actor.pid or actor.node.id != self._watch.here:
            return False
        with suppress(ProcessLookupError, PermissionError):
            os.kill(actor.pid, signal.SIGKILL)  # it may be stopped, and then hears nothing else
            return True
        return False
