"""Storage that takes its time: a store whose reads last as long as they would on a disk with a head, or far away."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergeflow.interfaces import Draft, Reader, Store, Writer
    from mergeflow.tensors import FileStat


@dataclass(frozen=True)
class Device:
    """How long one read takes."""

    latency: float
    """Seconds before its first byte."""
    stream: float
    """Bytes per second after that."""
    at_once: int
    """How many reads are served at the same time; all others wait."""

    def seconds(self, count: int) -> float:
        """What a read of so many bytes takes when nothing else is read."""
        return self.latency + count / self.stream


# Scaled down: a tenth of the time that real ones take, so that tests are short.
DISK = Device(latency=0.8e-3, stream=2e9, at_once=1)
NETWORK = Device(latency=4e-3, stream=5e9, at_once=1000)
FLASH = Device(latency=0.05e-3, stream=1.5e9, at_once=2)


class SimulatedStore:
    """Any store, whose reads are slowed down to those of a device, by the real clock."""

    def __init__(self, store: Store, device: Device) -> None:
        self._store, self._device = store, device
        self._served = threading.Semaphore(device.at_once)
        self.longest_queue = 0
        self._asked = 0
        self._lock = threading.Lock()

    def stat(self, path: str) -> FileStat:
        """As the store has it."""
        return self._store.stat(path)

    def reader(self, path: str) -> SimulatedReader:
        """A file that is read slowly."""
        return SimulatedReader(self, self._store.reader(path))

    def draft(self, path: str, size: int) -> Draft:
        """As the store has it."""
        return self._store.draft(path, size)

    def writer(self, address: str) -> Writer:
        """As the store has it."""
        return self._store.writer(address)

    def serve(self, count: int) -> None:
        """Wait for one's turn, and then as long as the read takes."""
        with self._lock:
            self._asked += 1
            self.longest_queue = max(self.longest_queue, self._asked)
        with self._served:
            time.sleep(self._device.seconds(count))
        with self._lock:
            self._asked -= 1


class SimulatedReader:
    """A reader that waits as long as its device does."""

    def __init__(self, store: SimulatedStore, reader: Reader) -> None:
        self._store, self._reader = store, reader

    def read_into(self, view: memoryview, offset: int) -> None:
        """Wait, then read."""
        self._store.serve(len(view))
        self._reader.read_into(view, offset)

    def close(self) -> None:
        """Close the reader below."""
        self._reader.close()
