"""How a run on Ray ends before it is done: by its user, with its own process, or with the head of its cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.launch.test_cli import PATIENCE_SECONDS, ROOT, command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address

    from ray.cluster_utils import Cluster

SOON = 3.0
"""Seconds within which whoever interrupts a run has it ended."""

HOST = """
import os, sys
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
from ray.cluster_utils import Cluster
small = {"object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
node = cluster.add_node(num_cpus=2, **small)
print(cluster.address, node.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.readline()
cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
print("killed", flush=True)
sys.stdin.readline()
node.kill_all_processes(check_alive=False, allow_graceful=False)
"""


class Running:
    """The program, and what it has said."""

    def __init__(self, cwd: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            command(*arguments), stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
        )
        self.said = ""

    def wait_for(self, words: str) -> None:
        """Read until it says so."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if words in line:
                return
        raise AssertionError(f"it should have said {words!r}: {self.said}")

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> float:
        """Signal it as a terminal does, the whole group, and say how many seconds it took to end."""
        began = time.monotonic()
        os.killpg(self.process.pid, number)
        return self.end() - began

    def end(self) -> float:
        """Let it end, and say when it did."""
        _, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        ended = time.monotonic()
        self.said += errors
        return ended


def actors(raylet: int) -> list[int]:
    """The processes of actors that belong to a node."""
    children = ["ps", "--ppid", str(raylet), "-o", "pid=,stat=,args="]
    lines = subprocess.run(children, capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "ray::ShardActor" in line and line.split()[1][0] != "Z"]


@pytest.fixture
def raylet(ray: Cluster) -> int:
    """The process of the first node of the cluster of the tests."""
    assert ray.head_node is not None
    (found,) = ray.head_node.all_processes["raylet"]
    return int(found.process.pid)


@pytest.fixture
def words(demo_dir: Path, tmp_path: Path, ray: Cluster) -> list[str]:
    return [f"models.dir={demo_dir}", f"out={tmp_path / 'out'}", "executor=cluster", f"executor.address={ray.address}"]


def check_interrupted(running: Running, out: Path) -> None:
    assert running.process.returncode == 130, running.said
    assert "interrupted; no output was written" in running.said
    assert "Traceback" not in running.said
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_run_on_a_cluster_ends_within_seconds_although_an_actor_hangs(
    number: signal.Signals, words: list[str], raylet: int, tmp_path: Path
) -> None:
    running = Running(tmp_path, *words, "executor.workers=2")
    running.wait_for("Ray is ready")
    hung = actors(raylet)[0]
    os.kill(hung, signal.SIGSTOP)
    assert running.interrupt(number) < SOON
    check_interrupted(running, tmp_path / "out")
    _wait_for_end_of(hung)


def test_a_ray_of_a_runs_own_listens_on_loopback_only_and_ends_with_it_although_an_actor_hangs(
    demo_dir: Path, tmp_path: Path
) -> None:
    running = Running(tmp_path, f"models.dir={demo_dir}", f"out={tmp_path / 'out'}", "executor=ray")
    running.wait_for("Ray is ready")
    listed = [line.split() for line in _session(running.process.pid)]
    os.kill(next(int(pid) for pid, _, name, *_ in listed if name.startswith("ray::ShardActor")), signal.SIGSTOP)
    addresses = {address for pid, *_ in listed for address in _listening(int(pid))}
    assert addresses
    assert all(address.is_loopback for address in addresses), addresses
    running.interrupt()
    check_interrupted(running, tmp_path / "out")
    _wait_for(lambda: not _session(running.process.pid))


@pytest.mark.long
def test_a_run_that_waits_for_room_ends_within_seconds(words: list[str], tmp_path: Path) -> None:
    running = Running(tmp_path, *words, "executor.resources.nowhere=1")
    running.wait_for("joining")
    _wait_for(lambda: any((tmp_path / "out").glob("*.draft")))
    time.sleep(1)  # joined, and waiting
    assert running.interrupt() < SOON
    check_interrupted(running, tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
def test_a_run_that_is_starting_ray_ends_when_ray_hears_of_it_and_leaves_no_process(
    seconds: float, demo_dir: Path, tmp_path: Path
) -> None:
    running = Running(tmp_path, f"models.dir={demo_dir}", f"out={tmp_path / 'out'}", "executor=ray")
    running.wait_for("starting Ray")
    time.sleep(seconds)
    running.interrupt()
    check_interrupted(running, tmp_path / "out")
    _wait_for(lambda: not _session(running.process.pid))


@pytest.mark.long
@pytest.mark.parametrize("executor", ["ray", "cluster"])
def test_actors_do_not_outlive_a_run_that_was_killed(
    executor: str, words: list[str], raylet: int, tmp_path: Path
) -> None:
    where = words if executor == "cluster" else [*words[:2], "executor=ray"]
    running = Running(tmp_path, *where, "executor.workers=2")
    running.wait_for("Ray is ready")
    before = actors(raylet) if executor == "cluster" else _session(running.process.pid)
    assert before
    os.kill(running.process.pid, signal.SIGKILL)
    running.end()
    _wait_for(lambda: not (actors(raylet) if executor == "cluster" else _session(running.process.pid)))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A cluster of its own, whose first line is its address; a line to it kills its head."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.write("\n\n")
        process.stdin.close()


@pytest.mark.long
def test_a_run_whose_head_is_lost_ends_with_a_sentence_and_can_be_resumed(
    host: subprocess.Popen[str], demo_dir: Path, tmp_path: Path
) -> None:
    assert host.stdin is not None
    assert host.stdout is not None
    address, raylet = host.stdout.readline().split()
    running = Running(
        tmp_path,
        *(f"models.dir={demo_dir}", f"out={tmp_path / 'out'}", "executor=cluster", f"executor.address={address}"),
        *("executor.workers=2", "executor.patience=600"),
    )
    running.wait_for("Ray is ready")
    os.kill(actors(int(raylet))[0], signal.SIGSTOP)  # so that it cannot be done before
    host.stdin.write("\n")
    host.stdin.flush()
    assert host.stdout.readline() == "killed\n"
    began = time.monotonic()
    assert running.end() - began < 30
    assert running.process.returncode == 1, running.said
    assert re.search(rf"mergeflow: the head of the Ray cluster at {address} has not answered for 10 s; ", running.said)
    assert "Traceback" not in running.said
    _wait_for(lambda: not actors(int(raylet))[1:])


def _session(leader: int) -> list[str]:
    """The processes of the session that `leader` began, zombies aside: id, state and command."""
    listed = subprocess.run(["ps", "-s", str(leader), "-o", "pid=,stat=,args="], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if not line.split()[1].startswith("Z")]


def _listening(process: int) -> Iterator[IPv4Address | IPv6Address]:
    """The addresses at which a process listens, as Linux tells them."""
    sockets = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        sockets = {str(descriptor.readlink()) for descriptor in Path(f"/proc/{process}/fd").iterdir()}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                written = bytes.fromhex(fields[1].partition(":")[0])
                words = (written[at : at + 4][::-1] for at in range(0, len(written), 4))  # little endian
                found = ip_address(b"".join(words))
                yield (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _wait_for(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _wait_for_end_of(process: int) -> None:
    _wait_for(lambda: not Path(f"/proc/{process}").exists())
