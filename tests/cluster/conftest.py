"""Hosts for the tests of this directory: a head and a node, which all tests share, and what they merge."""

from __future__ import annotations

import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mergeflow.demo import ensure_demo
from tests.cluster.cluster import MERGED, Cluster
from tests.cluster.hosts import missing
from tests.program import call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.recipe.architecture import Architecture

collect_ignore = ["slow"]  # which is imported by the processes of the hosts, and by nobody else


@pytest.fixture(scope="session")
def cluster(sdxl: Architecture) -> Iterator[Cluster]:
    """`alpha`, which is the head, and `beta`; with the demo set in the common directory."""
    why = missing()
    if why is not None:
        pytest.exit(f"make cluster-test: {why}", returncode=1)
    base = Path(tempfile.mkdtemp(prefix="mergeflow-"))
    terminate = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=1))  # cleans up, too
    cluster = Cluster(base)
    try:
        ensure_demo(cluster.common / "demo", sdxl)
        cluster.add("alpha", checkout=True)
        cluster.add("beta")
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(base)
        signal.signal(signal.SIGTERM, terminate)


@pytest.fixture(scope="session")
def wanted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that must come of every merge: as threads of one process make it."""
    out = tmp_path_factory.mktemp("local")
    done = call(f"models.dir={cluster.common / 'demo'}", "target=x17", "executor=local", f"out={out}")
    assert done.code == 0, done.both
    return (out / MERGED).read_bytes()
