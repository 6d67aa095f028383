"""Storage that takes its time: files of zeros whose reads last as long as they would on a disk, or far away."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from mergeflow.errors import StorageError

if TYPE_CHECKING:
    from mergeflow.interfaces import Draft, Left, Writer
    from mergeflow.tensors import FileStat


@dataclass(frozen=True)
class Device:
    """How long reads take."""

    latency: float
    """Seconds before the first byte of each."""
    stream: float
    """Bytes per second after that."""
    at_once: int
    """How many are served at the same time; all others wait."""

    def seconds(self, count: int) -> float:
        """What a read of so many bytes takes when nothing else is read."""
        return self.latency + count / self.stream


DISK = Device(latency=8e-3, stream=200e6, at_once=1)
"""With a head that has to seek."""
NETWORK = Device(latency=20e-3, stream=100e6, at_once=1000)
"""Far away, and wide."""
FLASH = Device(latency=0.1e-3, stream=1.5e9, at_once=2)


class SimulatedStore:
    """Files of any name and length, full of zeros, on a device; each read takes its time on the real clock."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._served = threading.Semaphore(device.at_once)
        self._lock = threading.Lock()
        self.reads: list[tuple[str, int, int]] = []
        """(path, begin, end) of every read."""

    def stat(self, path: str) -> FileStat:
        """There are no real files to identify."""
        _unsupported(path)

    def reader(self, path: str) -> SimulatedReader:
        """A file that is read slowly."""
        return SimulatedReader(self, path)

    def draft(self, path: str, size: int) -> Draft:
        """Nothing is written here."""
        _unsupported(path)

    def left(self, path: str) -> Left | None:
        """Nothing was ever left here."""
        return None

    def reopen(self, path: str, size: int) -> Draft:
        """Nothing is written here."""
        _unsupported(path)

    def writer(self, address: str) -> Writer:
        """Nothing is written here."""
        _unsupported(address)

    def serve(self, path: str, view: memoryview, offset: int) -> None:
        """Wait for one's turn, and then as long as the read takes."""
        with self._lock:
            self.reads.append((path, offset, offset + len(view)))
        with self._served:
            time.sleep(self._device.seconds(len(view)))
        view[:] = bytes(len(view))


class SimulatedReader:
    """One file of a `SimulatedStore`, open."""

    def __init__(self, store: SimulatedStore, path: str) -> None:
        self._store, self._path = store, path

    def read_into(self, view: memoryview, offset: int) -> None:
        """Take one's time, and fill `view` with zeros."""
        self._store.serve(self._path, view, offset)

    def close(self) -> None:
        """Nothing to give back."""


def _unsupported(path: str) -> NoReturn:
    raise StorageError(f"{path} is simulated, and can only be read")
