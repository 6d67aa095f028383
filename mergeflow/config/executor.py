"""Where the work is done, in plain values: how much of this machine, or of a cluster."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from typing import TYPE_CHECKING

from mergeflow.config import schema
from mergeflow.errors import ConfigError, MergeflowError, raise_all
from mergeflow.execute.ray import EMBEDDED, RayOptions
from mergeflow.plan.tiles import SCRATCH
from mergeflow.recipe.request import Budget

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
USEFUL_BLOCK = 16 << 20
"""Bytes; with smaller blocks more workers would read in smaller pieces, and no faster."""
USEFUL_BLOCK_OF_A_CLUSTER = 64 << 20
"""The same where files come over a network, on which short reads cost more."""
USUAL_READS = 4
"""Reads that a worker keeps under way where nobody says otherwise."""
SMALLEST_BLOCK = 64 << 10
LEAST_PATIENCE = 30.0
"""Seconds: reads that failed are repeated for 20 (`execute.patience`)."""
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_RAYS_OWN = {"cpu": "CPU", "gpu": "GPU", "memory": "memory"}
"""Resources that every Ray knows, however they are written."""


def to_budget(executor: schema.Executor) -> Budget:
    """How many workers, reads and bytes; raises `ConfigError`, also for what `to_ray_options` would."""
    problems: list[MergeflowError] = list(_problems(executor))
    memory, block, reads = 0, Budget.block, USUAL_READS
    try:
        memory = to_bytes(executor.memory)
    except ConfigError as error:
        problems.append(error)
    if executor.block != schema.AUTO:
        try:
            block = to_bytes(str(executor.block), "executor.block", "4MiB, 16MiB or auto")
            if block < SMALLEST_BLOCK:
                problems.append(ConfigError(f"executor.block={executor.block} must be at least 64KiB"))
        except ConfigError as error:
            problems.append(error)
    if executor.reads_in_flight != schema.AUTO:
        if isinstance(executor.reads_in_flight, int) and not isinstance(executor.reads_in_flight, bool):
            reads = executor.reads_in_flight
        else:
            problems.append(
                ConfigError(f"executor.reads_in_flight={executor.reads_in_flight} is not a number; write 4 or auto")
            )
    workers = _as_many_as_help(executor, reads, memory) if executor.workers is None else executor.workers
    for name, value in (("workers", workers), ("reads_in_flight", reads)):
        if value < 1:
            problems.append(ConfigError(f"executor.{name}={value} must be at least 1"))
    raise_all(problems)
    auto = tuple(name for name in ("reads_in_flight", "block") if vars(executor)[name] == schema.AUTO)
    return Budget(workers, reads, memory, block, executor.io.value, auto)


def to_ray_options(executor: schema.Executor) -> RayOptions:
    """Where the actors live, and how long they are waited for; raises `ConfigError`."""
    raise_all(_problems(executor))
    return RayOptions(
        address=executor.address or EMBEDDED,
        resources=dict(_resource(name, value) for name, value in executor.resources.items()),
        placement=executor.placement.value if executor.placement else RayOptions.placement,
        patience=RayOptions.patience if executor.patience is None else executor.patience,
        workers=executor.workers,
    )


def to_bytes(text: str, name: str = "executor.memory", such: str = "512MiB, 4GiB or 2GB") -> int:
    """A size as people write it.

    >>> to_bytes("1GiB"), to_bytes("512 MiB"), to_bytes("2.5GB"), to_bytes("1000")
    (1073741824, 536870912, 2500000000, 1000)
    """
    match = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConfigError(f"{name}={text} is not a size; write {such}")
    return int(Fraction(match[1]) * units[match[2].lower()])


def _on_a_cluster(executor: schema.Executor) -> bool:
    return executor.kind is schema.ExecutorKind.ray and executor.address not in (None, EMBEDDED)


def _as_many_as_help(executor: schema.Executor, reads: int, memory: int) -> int:
    """As many workers as `memory` has useful blocks for, and here no more than there are cores."""
    cluster = _on_a_cluster(executor)
    each = max(reads, 1) * (SCRATCH + (USEFUL_BLOCK_OF_A_CLUSTER if cluster else USEFUL_BLOCK))
    most = memory // each if cluster else min(len(os.sched_getaffinity(0)), memory // each)
    return max(most, 1)


def _problems(executor: schema.Executor) -> Iterator[ConfigError]:
    """What is wrong with the options of Ray, and which of them would have no effect."""
    for name in ("address", "resources", "placement", "patience"):
        value = vars(executor)[name]
        if value is None or value == {}:
            continue
        said = f"executor.{name}={value.value if isinstance(value, schema.Placement) else value}"
        if executor.kind is schema.ExecutorKind.local:
            yield ConfigError(f"{said} is for Ray, but executor.kind is local; use executor=ray")
        elif name in ("resources", "placement") and not _on_a_cluster(executor):
            yield ConfigError(
                f"{said} is for a running cluster, and without effect on a Ray of this run's own; use executor=cluster"
            )
    for name, value in executor.resources.items():
        try:
            _resource(name, value)
        except ConfigError as error:
            yield error
    if executor.patience is not None and not executor.patience >= LEAST_PATIENCE:
        yield ConfigError(f"executor.patience={executor.patience:g} must be at least {LEAST_PATIENCE:g} seconds")


def _resource(name: str, value: object) -> tuple[str, float]:
    """One of `executor.resources`: what Ray calls it, and how much; raises `ConfigError`."""
    own = _RAYS_OWN.get(name.lower(), name)
    if own == "memory":
        return own, float(to_bytes(str(value), "executor.resources.memory", "2GiB or 500MB"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigError(f"executor.resources.{name}={value} is not an amount; write a number such as 1 or 0.5")
    return own, float(value)
