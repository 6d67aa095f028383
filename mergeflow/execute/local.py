"""The executor that needs nothing: threads in this process. torch and positioned reads release the GIL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from mergeflow.execute.shard import OpenFiles, ShardWorker

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from mergeflow.execute.shard import Job
    from mergeflow.interfaces import Receipt
    from mergeflow.recipe.request import Budget


class Threads(Protocol):
    """What threads share while they work."""

    stopped: threading.Event
    """Set when the work is given up, or done."""

    def close(self) -> None:
        """Give the files back, once no thread works any more."""
        ...


@contextmanager
def at_work(crew: Threads, threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """So many threads for a crew; whatever ends it, they are stopped and have ended before its files are closed.

    They share the cores: a team of torch's own for each would be in the way, so there is none meanwhile.
    """
    teams = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        crew.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        crew.close()
        torch.set_num_threads(teams)


class Crew:
    """The threads of one process that work on a job: each has a block of its own, all share the open files.

    As many as there are `workers` merge at a time, while the others read and write: more would only take the
    interpreter from each other, between one call to torch and the next.
    """

    def __init__(self, job: Job, workers: int) -> None:
        self.stopped = threading.Event()
        self._job = job
        self._files = OpenFiles(job)
        self._local = threading.local()
        self._turns = threading.Semaphore(workers)

    def run(self, shard: int) -> Receipt:
        """Do one shard in the calling thread."""
        worker: ShardWorker | None = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = ShardWorker(self._job, self._files, self.stopped.is_set, self._turns)
        return worker.run(shard)

    def close(self) -> None:
        """Give the files back, once no thread works any more."""
        self._files.close()


class LocalExecutor:
    """As many threads as workers times reads in flight."""

    name = "local"
    in_process = True
    startup_seconds = 0.0

    def __init__(self, budget: Budget) -> None:
        self._workers = budget.workers
        self._threads = budget.workers * budget.reads_in_flight

    def map(self, job: Job, shards: Sequence[int]) -> Generator[Receipt, None, None]:
        """Run every shard, yielding receipts as they come; see `interfaces.Executor`."""
        crew = Crew(job, self._workers)
        with at_work(crew, self._threads, "mergeflow") as pool:
            for done in as_completed([pool.submit(crew.run, shard) for shard in shards]):
                yield done.result()
