"""The executor on Ray: actors that each own shards. The only module that imports Ray, and only when it is used.

Actors read their sources and write their results themselves; what travels is the plan, once, and receipts. An
embedded Ray is started for the run and ended with it; a running cluster is joined and left as it was.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mergeflow
from mergeflow.errors import ExecutorError, MergeflowError
from mergeflow.execute.local import Crew
from mergeflow.execute.shard import Stopped

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from types import ModuleType

    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Receipt
    from mergeflow.recipe.request import Budget

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20
"""The least that Ray accepts with some room; nothing large goes through it, and page cache needs the memory."""
EMBEDDED = "local"
LOST_AFTER_SECONDS = 1.0
"""How long to wait for a receipt before looking whether anyone asked to stop."""
STOPS_WITHIN_SECONDS = 1.0
"""How long the last tiles may take once the run is given up; after that their processes are killed over them."""
PROBE_SECONDS = 5.0
CONTROL = "control"
"""The threads of an actor that are never busy with shards."""


@dataclass(frozen=True)
class RayOptions:
    """Where the actors live."""

    address: str = EMBEDDED
    """`local` for a Ray of this run's own, `auto` or `host:port` for a running cluster."""


class ShardActor:
    """A process of a cluster that works on shards, several at a time."""

    def __init__(self, job: Job) -> None:
        self._crew = Crew(job, workers=1)

    def ready(self) -> bool:
        """Whether the actor is up."""
        return True

    def run(self, shard: int) -> Receipt | None:
        """Do one shard; None if the actor was told to stop."""
        with suppress(Stopped):
            return self._crew.run(shard)
        return None

    def stop(self) -> None:
        """Let what is under way come to its end, and begin nothing more."""
        self._crew.stopped.set()


class RayExecutor:
    """As many actors as workers, spread over the nodes, each with its reads in flight."""

    name = "ray"
    in_process = False

    def __init__(self, budget: Budget, options: RayOptions) -> None:
        self.startup_seconds = 0.0
        self._budget = budget
        self._options = options

    def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
        """Run every shard, yielding receipts as they come; see `interfaces.Executor`."""
        began = time.perf_counter()
        ray, ours = self._connect()
        actors: list[Any] = []
        try:
            plan = ray.put(job)
            maker = ray.remote(concurrency_groups={CONTROL: 1})(ShardActor).options(
                num_cpus=1, max_concurrency=self._budget.reads_in_flight, scheduling_strategy="SPREAD"
            )
            actors = [maker.remote(plan) for _ in range(self._budget.workers)]
            self._wait_until_ready(ray, actors)
            self.startup_seconds = time.perf_counter() - began
            log.info("Ray is ready after %.1f s with %d actor(s)", self.startup_seconds, len(actors))
            yield from self._share_out(ray, actors, shards)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, MergeflowError) else ExecutorError(f"a worker failed: {error}") from error
        except ray.exceptions.RayActorError as error:
            raise ExecutorError(
                f"a worker process died ({_reason(error)}); if it was killed for memory, lower executor.memory or "
                "executor.workers"
            ) from error
        finally:
            if ours and self._options.address == EMBEDDED:
                ray.shutdown()  # it ends the actors too
            else:
                for actor in actors:
                    with suppress(ray.exceptions.RayError):  # what is gone already needs no end
                        ray.kill(actor)
                if ours:
                    ray.shutdown()

    def _share_out(
        self, ray: ModuleType, actors: Sequence[Any], shards: Sequence[int]
    ) -> Generator[Receipt, None, None]:
        """Each actor pulls: it has its reads in flight and one shard more, so that it never waits for the driver."""
        waiting = deque(shards)
        running: dict[Any, Any] = {}
        for _ in range(self._budget.reads_in_flight + 1):
            for actor in actors:
                if waiting:
                    running[actor.run.remote(waiting.popleft())] = actor
        try:
            while running:
                done, _ = ray.wait(list(running), num_returns=1, timeout=LOST_AFTER_SECONDS)
                for reference in done:
                    actor = running.pop(reference)
                    receipt: Receipt = ray.get(reference)
                    if waiting:
                        running[actor.run.remote(waiting.popleft())] = actor
                    yield receipt
        finally:
            if running:  # whoever is told to stop has stopped writing when its calls have returned
                for actor in actors:
                    actor.stop.options(concurrency_group=CONTROL).remote()
                ray.wait(list(running), num_returns=len(running), timeout=STOPS_WITHIN_SECONDS)

    def _wait_until_ready(self, ray: ModuleType, actors: Sequence[Any]) -> None:
        """All actors up, or a word about why they are not: a cluster without room keeps them waiting for ever."""
        waiting = [actor.ready.remote() for actor in actors]
        told = False
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=15)
            if waiting and not told:
                told = True
                free = ray.available_resources().get("CPU", 0)
                log.warning("waiting for %d of %d actors: Ray has %g free CPU(s)", len(waiting), len(actors), free)

    def _connect(self) -> tuple[ModuleType, bool]:
        """Ray, connected, and whether it was this that connected it."""
        embedded = self._options.address == EMBEDDED
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # it would upload the working directory
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        if embedded:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on this machine, for this run
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        if ray.is_initialized():
            return ray, False
        log.info("starting Ray" if embedded else f"joining the Ray cluster at {self._options.address}")
        _probe(self._options.address)
        options: dict[str, Any] = {"address": self._options.address}
        if embedded:
            options |= {
                "num_cpus": self._budget.workers,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        else:
            options["runtime_env"] = {"py_modules": [str(Path(mergeflow.__file__).parent)]}
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = "an embedded Ray" if embedded else f"the Ray cluster at {self._options.address}"
            reason = " ".join(str(error).split())
            raise ExecutorError(f"cannot reach {where}: {reason}; executor=local needs no Ray") from error
        except BaseException:
            ray.shutdown()  # interrupted half way: what has been started already must end with us
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminate)  # Ray puts its own in place, which would skip our end
        return ray, True


def _probe(address: str) -> None:
    """Whether anyone listens at `host:port`, which Ray would take minutes to find out."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), PROBE_SECONDS).close()
        except OSError as error:
            raise ExecutorError(
                f"cannot reach the Ray cluster at {address}: {error.strerror or error}; start it there with "
                f"`ray start --head --port={port}`, or choose executor.address=local"
            ) from error


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
