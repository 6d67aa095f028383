"""Ray, connected: one of this run's own, one that runs already, or the one that this process has joined before."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mergeflow
from mergeflow.errors import ExecutorError
from mergeflow.execute.ray.options import EMBEDDED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20
"""The least that Ray accepts with some room; nothing large goes through it, and page cache needs the memory."""
PROBE_SECONDS = 5.0


class Connection:
    """Ray, connected; a context manager that leaves it as it was found.

    Args:
        ray: The module.
        ours: Whether this run has connected it, and disconnects it.
        embedded: Whether it is a Ray of this run's own, which ends with it.
    """

    def __init__(self, ray: ModuleType, ours: bool, embedded: bool) -> None:
        self.ray, self.ours, self.embedded = ray, ours, embedded
        self.lost = False
        """Whether the head answers no more. Whoever then says goodbye to it waits for it for a minute."""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lost:
            atexit.unregister(self.ray.shutdown)
        elif self.ours:
            self.ray.shutdown()


def connect(address: str, cpus: int) -> Connection:
    """Join the Ray at `address`, or start one with so many `cpus`; raises `ExecutorError`."""
    embedded = address == EMBEDDED
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # it would upload the working directory
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if embedded:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on this machine alone, for this run
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return Connection(ray, ours=False, embedded=False)
    log.info("starting Ray" if embedded else f"joining the Ray cluster at {address}")
    _probe(address)
    options: dict[str, Any] = {"address": address}
    if embedded:
        options |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        options["runtime_env"] = {"py_modules": [str(Path(mergeflow.__file__).parent)]}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _on_loopback() if embedded else nullcontext():
            ray.init(log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "an embedded Ray" if embedded else f"the Ray cluster at {address}"
        reason = " ".join(str(error).split())
        raise ExecutorError(f"cannot reach {where}: {reason}; executor=local needs no Ray") from error
    except BaseException:
        ray.shutdown()  # interrupted half way: what has been started already must end with us
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # Ray puts its own in place, which would skip our end
    _keep_quiet()
    return Connection(ray, ours=True, embedded=embedded)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """What Ray starts meanwhile listens on 127.0.0.1 alone, as it does by itself on systems without clusters.

    An address that it is given it replaces by one that others can reach, and then it listens on all there are.
    """
    from ray._private import ray_constants

    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


def _keep_quiet() -> None:
    """Ray prints pages to stdout about every node that is lost; what a run has to say of it, it says itself."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):  # not Ray's public face, and there is none
        worker.print_to_stdstream = lambda data, **_: log.debug("Ray says: %s", data.get("lines"))


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
