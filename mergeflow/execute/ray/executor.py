"""The executor on Ray: actors that each own shards, wherever there is room for them.

Actors read their sources and write their results themselves; what travels is the plan, once, and receipts. An
embedded Ray is started for the run and ended with it; a running cluster is joined and left as it was.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING

from mergeflow.execute.ray.connect import connect
from mergeflow.execute.ray.run import Run

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mergeflow.execute.ray.options import RayOptions
    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Receipt
    from mergeflow.recipe.request import Budget

log = logging.getLogger(__name__)


class RayExecutor:
    """As many actors as workers, at most, each with its reads in flight.

    Whatever becomes of an actor or its node costs what it had under way: others do it again (`ledger`). Nodes that
    join while it runs get actors, too.
    """

    name = "ray"
    in_process = False

    def __init__(self, budget: Budget, options: RayOptions) -> None:
        self.startup_seconds = 0.0
        self._budget = budget
        self._options = options

    def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
        """Run every shard, yielding receipts as they come; see `interfaces.Executor`."""
        if not shards:
            return
        began = time.perf_counter()
        with connect(self._options.address, self._budget.workers) as connection:
            run = Run(connection, self._budget, self._options, job, shards)
            try:
                actors = run.start()
                self.startup_seconds = time.perf_counter() - began
                log.info("Ray is ready after %.1f s with %d actor(s)", self.startup_seconds, actors)
                with closing(run.receipts()) as receipts:
                    yield from receipts
            finally:
                run.end()
