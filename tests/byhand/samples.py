"""What the tests of the reference feed to it: bit patterns of every kind, and a way to and from torch."""

from __future__ import annotations

import numpy as np
import torch

from tests.byhand.floats import FLOATS, STORED, Array, Tensor, of_bits, tensor

TORCH = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample(dtype: str, count: int, seed: int) -> Tensor:
    """A third each of any bits at all, of those beside zero, infinity and NaN, and of values such as weights have."""
    random = np.random.default_rng([seed, list(STORED).index(dtype)])
    width = 8 * STORED[dtype].itemsize
    anything = random.integers(0, 2**width, count, dtype=np.uint64)
    if dtype in FLOATS:
        starts = np.array([0, int(_bits_of(tensor(dtype, np.inf))) - 6], np.uint64)
        edges = random.choice(starts, count) + random.integers(0, 9, count, dtype=np.uint64)
        edges ^= random.integers(0, 2, count, dtype=np.uint64) << np.uint64(width - 1)
        weights = _bits_of(tensor(dtype, random.normal(0, 0.1, count)))
    else:
        edges = random.integers(-80, 80, count).view(np.uint64)
        weights = random.integers(-(2**40), 2**40, count).view(np.uint64)
    return of_bits(dtype, np.choose(random.integers(0, 3, count), [anything, edges, weights]))


def _bits_of(value: Tensor) -> Array:
    return np.asarray(value.values).view(f"<u{STORED[value.dtype].itemsize}").astype(np.uint64)


def to_torch(value: Tensor) -> torch.Tensor:
    """The same bits."""
    dtype, shape = TORCH[value.dtype], value.values.shape
    if not value.values.size:  # which torch takes for a mistake
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.values.tobytes()), dtype=dtype).reshape(shape)


def from_torch(value: torch.Tensor) -> Tensor:
    """The same bits."""
    name = next(name for name, dtype in TORCH.items() if dtype == value.dtype)
    bits = value.contiguous().view(AS_INTEGERS[value.element_size()]).numpy()
    return of_bits(name, bits.view(f"<u{value.element_size()}"))
