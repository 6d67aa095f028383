"""Hosts that are none: namespaces of this machine, joined by a bridge.

Each has its own network, name, processes, `/dev/shm` and temporary directory, and all have one common directory. The
kernel ends all processes of a host when the first of them is killed, as when the power fails, and removes its network;
the first dies with whoever has made it. So nothing is left behind, however a test ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PROJECT = Path(__file__).resolve().parents[2]
PLACE = Path("/media")
"""An empty directory that every Linux has: where hosts see what is theirs. Paths below it are short, as Ray needs."""
COMMON, OWN = PLACE / "common", PLACE / "own"
NETWORK = "10.77.0"
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
COMMAND_SECONDS = 60.0


class Ended(NamedTuple):
    """What came of a command."""

    code: int
    output: str


def missing() -> str | None:
    """Why there can be no hosts here, and what to do about it; None if there can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} is missing; on Debian and Ubuntu: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "hosts are made of network namespaces, which only root may make; run it as root, or in a container"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--ipc", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    if tried.returncode:
        return f"this machine lets nobody make namespaces ({tried.stderr.strip()}); a container needs --privileged"
    return None


class Namespaces:
    """A process that holds namespaces open, and commands within them."""

    def __init__(self, kinds: Sequence[str], script: str) -> None:
        self._kinds = [f"--{kind}" for kind in kinds]
        words = ["unshare", *self._kinds, "--fork", "--kill-child", *(["--mount-proc"] if "pid" in kinds else [])]
        # Its children's ends concern nobody, also of those that it inherits: so the kernel clears them away.
        first = f"set -e; {script}; trap '' CHLD; echo ready; exec sleep infinity"
        self._holder = subprocess.Popen(
            [*words, "sh", "-c", first], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_mortal
        )
        assert self._holder.stdout is not None
        told = self._holder.stdout.readline()
        if told != "ready\n":
            self._holder.kill()
            raise RuntimeError(f"no namespaces: {told}{self._holder.stdout.read()}")
        self.first = children(self._holder.pid)[0]

    def words(self, command: Sequence[str]) -> list[str]:
        """A command line that runs `command` within."""
        return ["nsenter", "--target", str(self.first), *self._kinds, "--", *command]

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, seconds: float = COMMAND_SECONDS
    ) -> Ended:
        """Run a command to its end; raises `subprocess.TimeoutExpired`."""
        with tempfile.TemporaryFile() as output:  # a pipe would stay open for as long as daemons hold its other end
            done = subprocess.run(
                self.words(command),
                env=None if environment is None else dict(environment),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
                timeout=seconds,
            )
            output.seek(0)
            return Ended(done.returncode, output.read().decode(errors="replace"))

    def must(self, *command: str) -> None:
        """Run a command that cannot fail."""
        done = self.run(*command)
        assert done.code == 0, f"{' '.join(command)}: {done.output}"

    def end(self) -> None:
        """Kill the first process, and with it all others."""
        with suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self._holder.wait(COMMAND_SECONDS)
        assert self._holder.stdout is not None
        self._holder.stdout.close()


class Switch(Namespaces):
    """What cables lead to."""

    def __init__(self) -> None:
        super().__init__(["net"], "ip link add bridge type bridge; ip link set bridge up; ip link set lo up")


class Host(Namespaces):
    """A machine with an address, a name and a cable; with `checkout=False` the package is not installed on it."""

    def __init__(self, switch: Switch, base: Path, name: str, number: int, *, checkout: bool) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self.own = base / name
        self.own.mkdir()
        self._switch = switch
        hidden = "" if checkout else f"mount -t tmpfs tmpfs '{PROJECT}/mergeflow'; "
        super().__init__(
            ["net", "uts", "pid", "mount", "ipc"],
            f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs {PLACE}; {hidden}"
            f"mkdir {COMMON} {OWN}; mount --bind '{base}/common' {COMMON}; mount --bind '{self.own}' {OWN}",
        )
        self.is_up = True
        switch.must(
            "ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "cable", "netns", str(self.first)
        )
        switch.must("ip", "link", "set", f"to-{name}", "master", "bridge", "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{self.address}/24", "dev", "cable"),
            ("link", "set", "cable", "up"),
            ("route", "add", "default", "dev", "cable"),  # by which programs tell their own address
        ):
            self.must("ip", *words)

    def cut(self) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        self._switch.must("ip", "link", "set", f"to-{self.name}", "down")

    def join(self) -> None:
        """Plug the cable in again."""
        self._switch.must("ip", "link", "set", f"to-{self.name}", "up")

    def start(self, *command: str, environment: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
        """Begin a command whose output goes to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                self.words(command), env=dict(environment), cwd="/", stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def runs(self, program: str) -> bool:
        """Whether a process of that name is alive on this host."""
        here = Path(f"/proc/{self.first}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                name = (process / "comm").read_text().strip()
                if (name, state != "Z") == (program, True) and (process / "ns" / "pid").readlink() == here:
                    return True
        return False

    def end(self) -> None:
        """Have the power fail."""
        if self.is_up:
            self.is_up = False
            super().end()


def children(process: int) -> list[int]:
    """The processes that `process` has begun and that are alive."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Look ten times a second; raises `TimeoutError` that says what was waited for."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.1)


def _mortal() -> None:
    """Die with the process that has begun this one."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def python() -> str:
    """The interpreter of the tests, which all hosts see at the same path."""
    return sys.executable
