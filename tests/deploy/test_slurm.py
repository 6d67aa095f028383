"""The sbatch script, run where there is no Slurm: `srun`, `scontrol` and what the script calls are stood in for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "merge.sbatch"
PATIENCE_SECONDS = 60.0

SCONTROL = """#!/bin/sh
printf 'n1\\nn2\\nn3\\n'
"""
GETENT = """#!/bin/sh
echo '127.0.0.1 STREAM n1'
"""
LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"
SRUN = """#!/bin/bash
ended() { echo "$1 ended" >> "$NOTES"; kill "$child"; exit 0; }
case "$*" in
*--head*) trap 'ended head' TERM; "$REAL" -c "$LISTEN" "$PORT" & child=$! ;;
*--address*) trap 'ended nodes' TERM; sleep 60 & child=$! ;;
esac
echo "srun $*" >> "$NOTES"
[ -z "$child" ] || wait
"""
PYTHON = """#!/bin/bash
case "$1" in
*launch.py)
    shift
    echo "merge $*" >> "$NOTES"
    [ "$RAY_AUTH_MODE" = token ] && [ "${#RAY_AUTH_TOKEN}" = 64 ] && echo "token" >> "$NOTES"
    trap 'sleep 0.2; echo "merge stopped" >> "$NOTES"; exit 130' TERM
    until grep -q -e --address "$NOTES"; do sleep 0.05; done
    for _ in $(seq "$TICKS"); do sleep 0.1; done
    exit "$CODE" ;;
*) exec "$REAL" "$@" ;;
esac
"""


class Batch:
    """A batch job of three nodes."""

    def __init__(self, place: Path) -> None:
        self.notes = place / "notes"
        self.notes.touch()
        self.checkout = place / "checkout"
        self.programs = programs = self.checkout / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name, text in (("scontrol", SCONTROL), ("getent", GETENT), ("srun", SRUN), ("python", PYTHON)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._jobs: list[subprocess.Popen[str]] = []
        self.job = next(number for number in range(os.getpid() % 5000, 10000) if _is_free(20000 + number))

    def start(self, *words: str, code: int = 0, ticks: int = 0, patience: int = 60) -> subprocess.Popen[str]:
        """Begin it; the merge takes so many tenths of a second, and ends with `code`.

        `patience` is how many seconds the head is waited for.
        """
        environment = {
            "PATH": os.environ["PATH"],
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_SUBMIT_DIR": str(self.checkout),
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_JOB_ID": str(self.job),
            "MERGEFLOW_HEAD_SECONDS": str(patience),
            "NOTES": str(self.notes),
            "LISTEN": LISTEN,
            "REAL": sys.executable,
            "PORT": str(20000 + self.job),
            "CODE": str(code),
            "TICKS": str(ticks),
        }
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._jobs.append(job)
        return job

    def end(self) -> None:
        """Leave nothing behind, however a test ends."""
        for job in self._jobs:
            if job.poll() is None:
                job.kill()
                job.communicate()

    def noted(self) -> list[str]:
        """What has been called, and what became of it."""
        return self.notes.read_text().splitlines()

    def wait_for(self, note: str) -> None:
        """Until something has been noted."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not any(line.startswith(note) for line in self.noted()):
            assert time.monotonic() < end, self.noted()
            time.sleep(0.02)


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    opened = Batch(tmp_path)
    yield opened
    opened.end()


@pytest.mark.parametrize("code", [0, 1], ids=["done", "failed"])
def test_a_job_starts_a_cluster_merges_and_ends_as_the_merge_does(batch: Batch, code: int) -> None:
    job = batch.start("experiment=round1", "selection.te0=05,11,17=3", code=code)
    told, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == code, told
    noted = batch.noted()
    address = f"127.0.0.1:{20000 + batch.job}"
    head, nodes = (next(line for line in noted if word in line) for word in ("--head", "--address"))
    assert head.startswith("srun --nodes=1 --ntasks=1 --cpus-per-task=8 --nodelist=n1 ray start --head --block")
    assert nodes.startswith(
        f"srun --nodes=2 --ntasks=2 --cpus-per-task=8 --exclude=n1 ray start --block --address={address} "
    )
    words = f"executor=cluster executor.address={address} resume=true experiment=round1 selection.te0=05,11,17=3"
    assert f"merge {words}" in noted
    assert "token" in noted
    assert set(noted[-3:-1]) == {"head ended", "nodes ended"}
    assert noted[-1] == f"srun --nodes=3 --ntasks=3 rm -rf /tmp/ray-{batch.job}"


def test_the_signal_before_the_time_limit_stops_the_merge_and_then_the_cluster(batch: Batch) -> None:
    job = batch.start("experiment=round1", ticks=600)
    batch.wait_for("merge ")
    job.send_signal(signal.SIGTERM)
    told, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 130, told
    noted = batch.noted()
    assert noted.index("merge stopped") < noted.index("head ended")
    assert noted[-1].endswith(f"rm -rf /tmp/ray-{batch.job}")


def test_a_head_that_does_not_answer_ends_the_job(batch: Batch) -> None:
    (batch.programs / "srun").write_text('#!/bin/sh\necho "srun $*" >> "$NOTES"\n')
    job = batch.start("experiment=round1", patience=1)
    told, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 1
    assert f"Ray's head at 127.0.0.1:{20000 + batch.job} does not answer" in told
    assert not any(line.startswith("merge") for line in batch.noted())
