"""Which nodes have shown that they see what is seen here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mergeflow.errors import ExecutorError, MergeflowError, raise_all
from mergeflow.execute.ray.preflight import Drafts, Question, problems, sources_of
from mergeflow.execute.ray.words import first_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.execute.ray.connect import Connection
    from mergeflow.execute.ray.nodes import Node, Watch
    from mergeflow.execute.shard import Job

log = logging.getLogger(__name__)


class Checks:
    """Nodes are asked before they get an actor: the first all together, whose problems end the run, others later."""

    def __init__(self, connection: Connection, job: Job, watch: Watch) -> None:
        self._ray, self._job, self._watch = connection.ray, job, watch
        self._sources = sources_of(job)
        written = {place.output for strip in job.plan.strips for cell in strip.cells for place in cell.places}
        self._addresses = [job.drafts[output] for output in sorted(written)]  # what is done already is let alone
        # Who runs here without having joined anything has the files and the libraries of this process.
        self._exempt = {watch.here} if connection.embedded or not connection.ours else set()
        self._passed: set[str] = set()
        self.refused: set[str] = set()
        """The nodes that are left out."""
        self.calls: dict[Any, tuple[Node, Question]] = {}
        self._began = 0.0
        self.first = True
        """Whether nothing has been found in order yet."""
        self._found: list[MergeflowError] = []
        self._drafts: Drafts | None = None

    @property
    def busy(self) -> bool:
        """Whether nodes are being asked."""
        return bool(self.calls)

    def passed(self, node: Node) -> bool:
        """Whether a node may work."""
        return node.id in self._exempt or node.id in self._passed

    def begin(self, nodes: Sequence[Node], now: float) -> None:
        """Ask nodes, as many as can answer at a time; raises `StorageError`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._drafts = Drafts(self._job.store, self._addresses)
        self._drafts.begin()
        self._began = now
        ask = self._ray.remote(num_cpus=0, max_retries=0)(problems)
        for place, node in enumerate(nodes[: self._drafts.places]):
            question = self._drafts.question(self._job.store, self._sources, node.id, place)
            there = ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            self.calls[there.remote(question)] = node, question

    def hear(self, call: Any) -> None:
        """What a node has answered."""
        node, question = self.calls.pop(call)
        try:
            wrong: list[str] = self._ray.get(call)
            assert self._drafts is not None, "it was asked about the drafts"
            wrong = wrong or self._drafts.arrived(question)
        except self._ray.exceptions.RayError as error:
            if self._is_gone(node, error):
                return
            wrong = [f"it cannot be asked: {first_lines(str(error))}"]
        finally:
            if not self.calls:
                self.end()
        self._note(node, wrong)

    def turn(self, now: float, patience: float) -> None:
        """Wait no longer for nodes that have not answered for so long: a file system may never do."""
        if now - self._began > patience:
            for call, (node, _) in list(self.calls.items()):
                self._ray.cancel(call, force=True)
                del self.calls[call]
                self._note(node, [f"it has not answered for {patience:g} s; look whether its file systems do"])
            self.end()

    def settle(self) -> None:
        """All of the first have been asked; raises `ExecutorError`, or `Problems`, with all that is wrong with any."""
        self.first = False
        raise_all(self._found)

    def end(self) -> None:
        """Leave the drafts as they were; raises `StorageError`."""
        drafts, self._drafts = self._drafts, None
        if drafts is not None:
            drafts.end()

    def _note(self, node: Node, wrong: Sequence[str]) -> None:
        if not wrong:
            self._passed.add(node.id)
            return
        self.refused.add(node.id)
        if self.first:
            self._found += [ExecutorError(f"node {node.name}: {one}") for one in wrong]
        else:
            log.warning("node %s gets no work: %s", node.name, "; ".join(wrong))

    def _is_gone(self, node: Node, error: Exception) -> bool:
        gone = (self._ray.exceptions.TaskUnschedulableError, self._ray.exceptions.NodeDiedError)
        return isinstance(error, gone) or all(other.id != node.id for other in self._watch.nodes)
