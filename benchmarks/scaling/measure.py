"""What the software and this machine cost, one thing at a time: the figures that a prediction starts from.

What a core does is told in its own seconds, the median of several tries while all cores do the same: cores share
memory, and may share more. What waits for a disk or for Ray is told in seconds of the clock.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import pickle
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy
import torch

from benchmarks.scaling.workload import plan_of, sdxl
from mergeflow.demo.catalogue import Variant
from mergeflow.demo.generate import layout_of
from mergeflow.execute.arithmetic import Arithmetic
from mergeflow.execute.block import Block
from mergeflow.execute.digest import STEP
from mergeflow.formats.safetensors import Safetensors
from mergeflow.plan.plan import Cell, Memory, Place, Plan, Strip, Tile
from mergeflow.plan.tiles import PIECE
from mergeflow.recipe.request import UNIFORM, Budget
from mergeflow.storage.local import LocalStore
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

ROUNDS = 5
SPREAD = 0.03
"""The standard deviation of the values that are merged."""
SHAPES = ((2, 1024), (256, 1024), (32, 1 << 21))
"""Rows and elements of tiles: two are all bookkeeping, one is of the longest rows, which no cache holds."""
LONGEST_READ = 4 << 20
"""Bytes of one read or write."""
BUFFER = 64 << 20
"""Bytes; blocks are so large that no cache holds what is read or written."""
SMALL_READ, SMALL_READS = 512, 20_000
"""Bytes and number of reads that are all bookkeeping."""
PLANNED = (32, 160)
"""Models of two plans; what one more model costs is the difference."""
IDLE_CALLS, RECEIPTS = 5_000, 200


def core_seconds(act: Callable[[], object], rounds: int = ROUNDS) -> float:
    """What `act` takes of the core of the thread that calls it, once it has been done before."""
    act()
    took = []
    for _ in range(rounds):
        began = time.thread_time()
        act()
        took.append(time.thread_time() - began)
    return statistics.median(took)


def on_all_cores(act: Callable[[int], float]) -> float:
    """The mean of what `act`, given the number of a core, says on each."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        return statistics.mean(pool.map(act, range(cores)))


def copy_rate(files: Sequence[Path]) -> float:
    """Bytes per second of one core that reads from the page cache, while all cores do."""
    size = min(BUFFER, *(file.stat().st_size for file in files))

    def read(number: int) -> float:
        view = memoryview(bytearray(size))
        with closing(LocalStore().reader(str(files[number % len(files)]))) as reader:

            def once() -> None:
                for offset in range(0, size, LONGEST_READ):
                    reader.read_into(view[offset : offset + LONGEST_READ], offset)

            return core_seconds(once)

    return size / on_all_cores(read)


def read_call(file: Path) -> float:
    """Seconds that a read costs beside its bytes."""
    view = memoryview(bytearray(SMALL_READ))
    with closing(LocalStore().reader(str(file))) as reader:

        def reads() -> None:
            for number in range(SMALL_READS):
                reader.read_into(view, number * SMALL_READ)

        return core_seconds(reads) / SMALL_READS


def write_rates(directory: Path, size: int) -> tuple[float, float]:
    """Bytes per second of one core into the page cache, and of the storage from there to its end."""
    synced: list[float] = []

    def write(number: int) -> float:
        view = memoryview(bytearray(BUFFER))
        copied = []
        for _ in range(3):
            draft = LocalStore().draft(str(directory / f"written-{number}"), size)
            with closing(LocalStore().writer(draft.address)) as writer:
                began = time.thread_time()
                for offset in range(0, size, LONGEST_READ):
                    at = offset % BUFFER
                    writer.write(view[at : at + min(LONGEST_READ, size - offset)], offset)
                copied.append(time.thread_time() - began)
                began = time.perf_counter()
                draft.sync()
                synced.append(time.perf_counter() - began)
            draft.discard()
        return statistics.median(copied)

    return size / on_all_cores(write), size / statistics.median(synced)


def digest_seconds(file: Path) -> float:
    """Seconds to read a byte back and hash it."""
    size = min(file.stat().st_size // STEP, 128) * STEP

    def digest(_: int) -> float:
        view = memoryview(bytearray(STEP))
        with closing(LocalStore().reader(str(file))) as reader:

            def once() -> None:
                hashed = hashlib.sha256()
                for offset in range(0, size, STEP):
                    reader.read_into(view, offset)
                    hashed.update(view)

            return core_seconds(once)

    return on_all_cores(digest) / size


def merging() -> dict[str, float]:
    """`arithmetic`, `row_call` and `piece_call` of a core that merges rows of fp16, not from a cache.

    A piece takes piece_call + rows * row_call + bytes / arithmetic: three tiles of different shapes tell them apart.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every executor has it
    try:
        took = [on_all_cores(functools.partial(_merge_seconds, *shape)) for shape in SHAPES]
    finally:
        torch.set_num_threads(threads)
    matrix = []
    for rows, elements in SHAPES:
        pieces = -(-elements // PIECE)
        matrix.append([pieces, pieces * rows, 2.0 * elements * rows])
    piece, row, byte = (max(float(value), 1e-12) for value in numpy.linalg.solve(matrix, took))
    return {"arithmetic": 1 / byte, "row_call": row, "piece_call": piece}


def _merge_seconds(rows: int, elements: int, _: int) -> float:
    """Seconds to merge one tile."""
    dtypes = (Dtype.F16,) * rows
    cell = Cell(UNIFORM, Dtype.F16, tuple(range(rows)), (1,) * rows, (Place(0, 0),))
    strip = Strip("weight", elements, tuple(range(rows)), dtypes, (0,) * rows, (cell,))
    block = Block((rows + 1) * (elements * 2 + 64))
    places = block.rows([*dtypes, Dtype.F16], elements)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(elements, generator=generator) * SPREAD
    (group,) = block.groups(dtypes, places[:rows])
    for number, row in enumerate(group.values):
        row.copy_(values.roll(number))
    arithmetic = Arithmetic(Plan((), (), (strip,), (), Memory(0, 0, 0, 0), Budget(1, 1, 0), "error"))
    tile = Tile(0, 0, elements)
    return core_seconds(lambda: arithmetic.merge(strip, tile, block, places[:rows], places[rows:], Counter()))


def planning() -> dict[str, float]:
    """`parse`, `plan`, `plan_bytes` and `unpickle` of one model of SDXL."""
    layouts = [layout_of(sdxl(), Variant(1, metadata={"number": str(number)})) for number in range(8)]
    format = Safetensors()
    began = time.thread_time()
    for layout in layouts:
        format.parse(functools.partial(_bytes_of, layout.head), layout.size)
    parsed = (time.thread_time() - began) / len(layouts)
    few, many = (_planned(models) for models in PLANNED)
    models = PLANNED[1] - PLANNED[0]
    plan, size, unpickled = (max(more - less, 0.0) / models for less, more in zip(few, many, strict=True))
    return {"parse": parsed, "plan": plan, "plan_bytes": size, "unpickle": unpickled}


def _bytes_of(head: bytes, offset: int, count: int) -> bytes:
    return head[offset : offset + count]


def _planned(models: int) -> tuple[float, float, float]:
    """Seconds to plan, bytes of the plan as it is sent, seconds to load it."""
    layout = layout_of(sdxl(), Variant(1))
    seconds = core_seconds(lambda: plan_of(models, layout, sdxl()), rounds=3)
    sent = pickle.dumps(plan_of(models, layout, sdxl()).for_workers(), protocol=5)
    return seconds, len(sent), core_seconds(lambda: pickle.loads(sent))


def receipts() -> dict[str, float]:
    """`startup`, and `receipt` and `receipt_per_reference`: what a call costs a driver that waits for many."""
    ray: Any = importlib.import_module("ray")

    class Idle:
        def __init__(self) -> None:
            self.ends = False

        def answer(self, number: int) -> int:
            return number

        def wait(self) -> None:
            while not self.ends:
                time.sleep(0.01)

        def end(self) -> None:
            self.ends = True

    began = time.perf_counter()
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR
    )
    try:
        maker = ray.remote(concurrency_groups={"control": 1})(Idle)
        quick, busy = maker.remote(), maker.remote()
        ray.get(quick.answer.remote(0))
        startup = time.perf_counter() - began
        alone = _receipt(ray, quick, {})
        waiting = {busy.wait.remote(): 0 for _ in range(IDLE_CALLS)}
        crowded = _receipt(ray, quick, waiting)
        ray.kill(busy)
    finally:
        ray.shutdown()
    per_reference = max(crowded - alone, 0.0) / IDLE_CALLS
    return {"startup": startup, "receipt": alone, "receipt_per_reference": per_reference}


def _receipt(ray: Any, actor: Any, under_way: dict[Any, int]) -> float:
    """Seconds from one call to the next where `under_way` are waited for too."""
    took = []
    for number in range(RECEIPTS):
        began = time.perf_counter()
        under_way[actor.answer.remote(number)] = 0
        done, _ = ray.wait(list(under_way), num_returns=1)
        for reference in done:
            del under_way[reference]
            ray.get(reference)
        took.append(time.perf_counter() - began)
    return statistics.median(took)
