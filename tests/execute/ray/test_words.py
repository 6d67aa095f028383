"""What Ray reports, in plain words. The texts are those of Ray 2.60."""

from __future__ import annotations

import pytest

from mergeflow.execute.ray.actor import Pulse
from mergeflow.execute.ray.words import first_lines, reason

LAST = Pulse(7, 100, 16 * 10**9, 10**9)
ROOM = " (its node has 16.00 GB, of which 1.00 GB were available a moment before)"
LOWER = "lower executor.memory or executor.workers"

KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: ShardActor\n\tpid: 24577\nThe actor is "
    "dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
MEMORY = "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.3) was 15.3GB / 16GB"
NODE = (
    "The actor died unexpectedly before finishing this task.\nThe actor died because its node has died. Node Id: "
    "10fac4ef\n\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
)
UNAVAILABLE = "The actor a4803e64 is unavailable: The actor is temporarily unavailable: RpcError"
BY_US = (
    "The actor died unexpectedly before finishing this task.\nThe actor is dead because it was killed by `ray.kill`."
)


@pytest.mark.parametrize(
    ("said", "text", "certain"),
    [
        (
            KILLED,
            f"its process ended without a word{ROOM}; the kernel ends processes like that when memory is short",
            True,
        ),
        (MEMORY, f"it was killed for memory{ROOM}; {LOWER}", True),
        (NODE, "its node was lost", False),
        (UNAVAILABLE, "it cannot be reached any more", False),
        (BY_US, "it was killed", True),
        ("something\nelse", "something else", False),
        ("", "RuntimeError", False),
    ],
    ids=["killed", "memory", "node", "unavailable", "by us", "unknown", "nothing"],
)
def test_why_an_actor_is_gone_is_said_in_a_sentence(said: str, text: str, certain: bool) -> None:
    found = reason(RuntimeError(said), LAST)
    assert found.text.startswith(text)
    assert found.certain is certain


def test_without_an_answer_nothing_is_said_of_memory() -> None:
    assert reason(RuntimeError(MEMORY), None).text == f"it was killed for memory; {LOWER}"


def test_of_a_traceback_the_last_line_is_told_and_of_much_the_beginning() -> None:
    assert (
        first_lines("Traceback (most recent call last):\n  File\n\x1b[36mValueError: no\x1b[0m\n") == "ValueError: no"
    )
    assert first_lines("x" * 1000) == "x" * 300 + "..."
