"""One checkpoint file, made tile by tile: any size of model in a few megabytes of memory."""

from __future__ import annotations

import hashlib
from itertools import groupby
from typing import TYPE_CHECKING

from mergeflow.demo.catalogue import SEED
from mergeflow.demo.values import Slot, tiles
from mergeflow.errors import ConfigError
from mergeflow.formats.safetensors import Safetensors
from mergeflow.storage.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from mergeflow.demo.catalogue import Variant
    from mergeflow.recipe.architecture import Architecture
    from mergeflow.tensors import Dtype, Layout

LOG_100 = 4.605
"""Where a CLIP model's `logit_scale` ends up."""


def synthesize(
    path: str | PathLike[str], architecture: Architecture, variant: Variant, *, divisor: int = 1, seed: int = SEED
) -> str:
    """Write one checkpoint of `architecture`, scaled down by `divisor`, and return its SHA-256.

    The bytes depend on the arguments and on nothing else. With `divisor=1` it is of full size.
    """
    small = architecture.scaled(divisor)
    return write(path, layout_of(small, variant), small, variant, seed)


def layout_of(architecture: Architecture, variant: Variant) -> Layout:
    """Where every byte of the checkpoint will lie."""
    tensors: list[tuple[str, Dtype, tuple[int, ...]]] = []
    for component in architecture.components.values():
        if component.name in variant.without:
            continue
        usual = variant.dtypes.get(component.name, variant.dtype)
        for key, spec in component.keys.items():
            dtype = variant.integers if spec.integer else usual
            if dtype is None or (spec.marker and key not in variant.markers):
                continue
            if spec.shape is None:
                raise ConfigError(f"arch '{architecture.name}' gives no shape for '{key}'; choose one that does")
            tensors.append((key, dtype, spec.shape))
    tensors += variant.surplus
    if not tensors:
        raise ConfigError(f"arch '{architecture.name}' names no tensors to make; choose one that does")
    return Safetensors().layout(tensors, variant.metadata)


def write(
    path: str | PathLike[str], layout: Layout, architecture: Architecture, variant: Variant, seed: int = SEED
) -> str:
    """Write the checkpoint that `layout_of` laid out, under a temporary name until it is whole; return its SHA-256."""
    store = LocalStore()
    digest = hashlib.sha256()
    draft = store.draft(str(path), layout.size)
    try:
        writer = store.writer(draft.address)
        try:
            offset = 0
            for part in _parts(layout, architecture, variant, seed):
                writer.write(part, offset)
                digest.update(part)
                offset += len(part)
        finally:
            writer.close()
        draft.commit()
    finally:
        draft.discard()
    return digest.hexdigest()


def _parts(layout: Layout, architecture: Architecture, variant: Variant, seed: int) -> Iterator[memoryview]:
    """The whole file, in order."""
    yield memoryview(layout.head)
    keys = architecture.usual_keys
    for dtype, run in groupby(layout.tensors.items(), key=lambda item: item[1].dtype):
        slots = []
        for key, info in run:
            spec = keys.get(key)
            reach = 0 if architecture.component_of(key) in variant.original else variant.reach
            centre, scale = character(key, info.shape)
            slots.append(Slot(key, info.elements, centre, scale, reach, spec is not None and spec.integer))
        yield from tiles(slots, dtype, variant.tune, seed)


def character(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and scale of a tensor's values, much as trained models have them; a scale of 2**-24 spreads by 0.04."""
    if not shape:
        return LOG_100, 2.0**-24
    if len(shape) > 1:
        return 0.0, 2.0**-24
    if key.endswith(".weight"):
        return 1.0, 2.0**-23
    return 0.0, 2.0**-26
