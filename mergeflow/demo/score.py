"""A toy score for sweeps that optimise: how far an output is from the merge that is known to be the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from mergeflow.demo.catalogue import DEMO_MODELS, SEED
from mergeflow.demo.generate import character
from mergeflow.demo.values import NUMPY_DTYPES, Slot, tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
BEST = ("02", "07", "11")
"""Whose mean is at the least distance; in earnest nobody knows."""


def distance(path: str) -> float:
    """The distance, a root mean square, between the first text encoder's tokens in `path` and those of the best merge.

    With fp16 it is not quite zero for the best, which is rounded.
    """
    with safe_open(path, framework="numpy") as file:
        merged = file.get_tensor(KEY)
    best = np.mean([_tokens(id, merged.shape) for id in BEST], axis=0)
    return float(np.sqrt(np.mean((merged - best) ** 2)))


def _tokens(id: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The tensor of a demo model, made anew: a score needs no folder of models."""
    variant = next(model.variant for model in DEMO_MODELS if model.id == id)
    centre, scale = character(KEY, shape)
    slot = Slot(KEY, int(np.prod(shape)), centre, scale, variant.reach, counts=False)
    made = b"".join(tiles([slot], variant.dtype, variant.tune, SEED))
    values: NDArray[Any] = np.frombuffer(made, NUMPY_DTYPES[variant.dtype])
    return values.astype(np.float64).reshape(shape)
