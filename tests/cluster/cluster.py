"""A Ray cluster of hosts, and merges on it that are watched."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cluster.hosts import COMMON, OWN, PROJECT, Ended, Host, Switch, children, python, wait_until

if TYPE_CHECKING:
    import signal
    import subprocess

PORT = 6379
TOKEN = "a-secret-that-all-nodes-share-a-secret-that-all-nodes-share"
MERGED = "x17-AstolfoMix-x13te0x14te1.safetensors"
WRITES = 2515
"""Of one merge: each of the tensors is one tile, and is written at once."""
PATIENCE_SECONDS = 180.0
"""For anything that ends by itself; all of it takes seconds, unless two cores have much else to do."""
OBJECT_STORE_BYTES = 80 << 20

RAY = (python(), "-m", "ray.scripts.scripts")
HEALTH = {  # a node is looked at twice a second, and is dead after three seconds of silence, instead of a minute
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
WAIT_FOR_NODE = """
import sys, time, ray
address, node, alive, seconds = sys.argv[1], sys.argv[2], sys.argv[3] == "alive", float(sys.argv[4])
ray.init(address, log_to_driver=False)
end = time.monotonic() + seconds
while alive != any(one["Alive"] for one in ray.nodes() if one["NodeManagerAddress"] == node):
    if time.monotonic() > end:
        sys.exit(f"{node} is not {sys.argv[3]} after {seconds} s: {ray.nodes()}")
    time.sleep(0.2)
"""


@dataclass
class Merge:
    """A merge that is under way."""

    process: subprocess.Popen[bytes]
    out: Path
    told: Path

    def finish(self) -> Ended:
        """Wait for its end."""
        code = self.process.wait(PATIENCE_SECONDS)
        return Ended(code, self.told.read_text(errors="replace"))

    def signal(self, number: signal.Signals) -> None:
        """Tell the program, as the terminal it was started from would."""
        os.kill(children(self.process.pid)[0], number)

    @property
    def file(self) -> Path:
        """Where the output is to be."""
        return self.out / MERGED

    def workers(self) -> set[str]:
        """The hosts that have sent receipts, by the manifest."""
        manifest: dict[str, Any] = json.loads((self.out / "manifest.json").read_text())
        return {name.partition(":")[0] for name in manifest["memory"]["peak_by_process"]} - {"driver"}


class Cluster:
    """Hosts that have joined one Ray, whose storage is slow, so that a small merge has a middle."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._switch = Switch()
        self.common = base / "common"
        self.notes = self.common / "notes"
        self.notes.mkdir(parents=True)
        self.hosts: dict[str, Host] = {}
        self._merges: list[Merge] = []

    @property
    def head(self) -> Host:
        """The host on which Ray's own book is kept, and the program runs."""
        return self.hosts["alpha"]

    @property
    def address(self) -> str:
        """Of the head, as people write it."""
        return f"{self.head.address}:{PORT}"

    def host(self, name: str, *, checkout: bool = False) -> Host:
        """A further host, on which nothing runs; the package is there only with `checkout`."""
        host = Host(self._switch, self._base, name, len(self.hosts) + 1, checkout=checkout)
        self.hosts[name] = host
        return host

    def add(self, name: str, *, checkout: bool = False, slowness: float = 0.01) -> Host:
        """A further host that has joined the cluster; each of its writes takes `slowness` seconds and more."""
        host = self.host(name, checkout=checkout)
        done = self.start_ray(host, slowness=slowness)
        assert done.code == 0, done.output
        return host

    def start_ray(self, host: Host, *, token: str = TOKEN, slowness: float = 0.01) -> Ended:
        """Type `ray start` on a host."""
        head = ("--head", f"--port={PORT}", "--include-dashboard=false")
        return host.run(
            *(*RAY, "start", "--disable-usage-stats", "--num-cpus=1", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            f"--node-ip-address={host.address}",
            *(head if host is self.head else (f"--address={self.address}",)),
            environment=environment(token) | HEALTH | self._slow(slowness),
            seconds=PATIENCE_SECONDS,
        )

    def restart_ray(self, host: Host) -> None:
        """Type `ray start` again on a host whose Ray has ended, as systemd would (`deploy/by-hand`)."""
        wait_until(lambda: not host.runs("raylet"), PATIENCE_SECONDS, f"the end of Ray on {host.name}")
        done = self.start_ray(host)
        assert done.code == 0, done.output

    def _slow(self, seconds: float) -> dict[str, str]:
        return {
            "PYTHONPATH": str(Path(__file__).parent / "slow"),
            "SLOW_NOTES": str(COMMON / "notes"),
            "SLOW_SECONDS": str(seconds),
        }

    def wait_for(self, host: Host, state: str) -> None:
        """Until Ray takes a host for `alive` or for `dead`."""
        done = self.head.run(
            *(python(), "-c", WAIT_FOR_NODE, self.address, host.address, state, str(PATIENCE_SECONDS)),
            environment=environment(),
            seconds=2 * PATIENCE_SECONDS,
        )
        assert done.code == 0, done.output

    def merge(self, name: str, *words: str, token: str = TOKEN, desk: Host | None = None) -> Merge:
        """Begin a merge, on the head unless it is at another `desk`; `name` tells its directory."""
        for notes in self.notes.iterdir():
            notes.write_bytes(b"")
        out = self.common / name
        told = self._base / f"{name}.log"
        process = (desk or self.head).start(
            *(python(), str(PROJECT / "launch.py"), f"models.dir={COMMON}/demo", "target=x17", f"out={COMMON}/{name}"),
            *("executor=cluster", f"executor.address={self.address}", "executor.reads_in_flight=1", *words),
            environment=environment(token),
            output=told,
        )
        merge = Merge(process, out, told)
        self._merges.append(merge)
        return merge

    def written(self, *hosts: str) -> int:
        """How many writes hosts have done for the last merge, all of them if none is named."""
        return sum((self.notes / name).read_bytes().count(b"\n") for name in hosts or self.hosts if self._notes(name))

    def _notes(self, name: str) -> bool:
        return (self.notes / name).exists()

    def wait_for_writes(self, merge: Merge, count: int, *hosts: str) -> None:
        """Until so many writes are done, by these hosts or by all; ends at once if the merge does."""
        wait_until(
            lambda: self.written(*hosts) >= count or merge.process.poll() is not None,
            PATIENCE_SECONDS,
            f"{count} writes by {', '.join(hosts) or 'any host'}",
        )
        assert merge.process.poll() is None, merge.told.read_text(errors="replace")

    def hold(self) -> None:
        """Let nobody write."""
        (self.notes / "hold").touch()

    def release(self) -> None:
        """Let all write again."""
        (self.notes / "hold").unlink()

    def end(self) -> None:
        """Have the power of all hosts fail."""
        for host in self.hosts.values():
            host.end()
        self._switch.end()
        for merge in self._merges:
            merge.process.wait(PATIENCE_SECONDS)


def environment(token: str = TOKEN) -> dict[str, str]:
    """What every process of a host finds in its environment."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(OWN),
        "RAY_TMPDIR": str(OWN),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
