"""Checkpoints to measure with: the keys and shapes of SDXL, or any others, with values that are quickly made.

All models lie in one place as `01.safetensors`, `02.safetensors` and so on. Their float values are a common block and
a block of each model's own, repeated to the end of the file: finite, about as large as weights are, and different in
every model. Whole numbers are 0, 1, 2 and so on in every tensor, so that all models agree.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import OmegaConf

from benchmarks.place import need
from mergeflow.demo.catalogue import Variant
from mergeflow.demo.generate import layout_of
from mergeflow.errors import ConfigError
from mergeflow.execute.block import torch_dtype
from mergeflow.formats.safetensors import Safetensors
from mergeflow.recipe.architecture import architecture
from mergeflow.tensors import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mergeflow.tensors import Dtype, TensorInfo

ROOT = Path(__file__).resolve().parent.parent
METADATA = {"format": "pt"}
SPREAD, OWN = 0.03, 0.2
"""The standard deviation of the values, and how much of it is the model's own."""
BLOCK = 1 << 20
"""Elements of what is repeated; a few more follow, so that tensors of equal shape differ."""
REST = 4093
WIDEST_DIVISOR = 32


def sdxl(scale: float) -> Layout:
    """An SDXL checkpoint of fp16 with every layer's width multiplied by `scale`: a power of two from 1/32 to 1.

    6.94 GB at 1; a quarter of that at 0.5, and so on.
    """
    divisor = round(1 / scale) if scale > 0 else 0
    if divisor * scale != 1 or divisor > WIDEST_DIVISOR or divisor & (divisor - 1):
        raise ConfigError(f"--scale {scale:g} is not 1, 0.5, 0.25, 0.125, 0.0625 or 0.03125")
    described = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "arch" / "sdxl.yaml")))
    return layout_of(architecture(**described).scaled(divisor), Variant(1, metadata=METADATA))


def sdxl_models(place: Path, count: int, scale: float) -> tuple[list[Path], Layout]:
    """So many SDXL checkpoints in a directory of `place` that holds nothing else; see `sdxl` and `models`."""
    like = sdxl(scale)
    return models(place / f"sdxl-{count}x{scale:g}", count, like), like


def layout(tensors: Sequence[tuple[str, Dtype, tuple[int, ...]]], title: str = "") -> Layout:
    """A checkpoint of these tensors: key, dtype and shape; its metadata has the title."""
    return Safetensors().layout(tensors, METADATA | ({"title": title} if title else {}))


def models(
    directory: Path, count: int, like: Layout | Callable[[int], Layout], filled: int | None = None
) -> list[Path]:
    """So many checkpoints of one layout, or each of its own, in `directory`; those that are there are left alone.

    With `filled`, only so many bytes of every dtype are written, and what follows is a hole that reads as zeros: a
    model that takes no room. Raises `StorageError` if the others would not fit.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{number:02}.safetensors" for number in range(1, count + 1)]
    layouts = [like if isinstance(like, Layout) else like(number) for number in range(1, count + 1)]
    every = enumerate(zip(paths, layouts, strict=True), start=1)
    missing = [(number, path, its) for number, (path, its) in every if not _is_there(path, its)]
    sizes = [its.size if filled is None else min(its.size, filled + len(its.head)) for _, _, its in missing]
    need(directory, sum(sizes), f"{len(missing)} synthetic models")
    for number, path, its in missing:
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            file.truncate(its.size)
            for offset, data in _content(its, number, filled):
                file.seek(offset)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    return paths


def _is_there(path: Path, like: Layout) -> bool:
    if not path.exists() or path.stat().st_size != like.size:
        return False
    with path.open("rb") as file:
        return file.read(len(like.head)) == like.head


def _content(like: Layout, number: int, filled: int | None) -> Iterator[tuple[int, memoryview]]:
    """The bytes of model `number`, each piece with the offset that it belongs to."""
    yield 0, memoryview(like.head)
    for dtype, infos in groupby(like.tensors.values(), key=lambda info: info.dtype):
        together = list(infos)
        if not dtype.is_float:
            yield from _counted(together)
            continue
        begin, end = together[0].begin, together[-1].end
        if filled is not None:
            end = min(end, begin + filled)
        block = _block(number, dtype)
        for offset in range(begin, end, len(block)):
            yield offset, block[: end - offset]


def _counted(infos: Sequence[TensorInfo]) -> Iterator[tuple[int, memoryview]]:
    for info in infos:
        yield info.begin, _bytes(torch.arange(info.elements, dtype=torch_dtype(info.dtype)))


def _block(number: int, dtype: Dtype) -> memoryview:
    common = torch.randn(BLOCK + REST, generator=torch.Generator().manual_seed(0))
    own = torch.randn(BLOCK + REST, generator=torch.Generator().manual_seed(number))
    return _bytes(((common + OWN * own) * SPREAD).to(torch_dtype(dtype)))


def _bytes(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data.cast("B")
