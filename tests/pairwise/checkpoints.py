"""Small checkpoints with the keys and the oddities of those that people merge in web UIs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mergeflow.recipe.architecture import architecture
from tests.byhand.files import write
from tests.byhand.floats import FLOATS, STORED, Tensor, of_bits, tensor
from tests.byhand.webui import SKIPPED, VAE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Shape = tuple[int, ...]
    Tensors = dict[str, Tensor]

UNET, CLIP = "model.diffusion_model.", "conditioner.embedders."
IDS = f"{CLIP}0.transformer.text_model.embeddings.position_ids"
SCALE = f"{CLIP}1.model.logit_scale"
CONV, POST, LOSS = f"{VAE}decoder.conv.weight", f"{VAE}post.bias", f"{VAE}loss.weight"
SIGMAS, BETAS, V_PRED = "denoiser.sigmas", "betas", "v_pred"
PARTIAL = f"{UNET}partial.weight"
"""Two of three leaves have it."""
NOT_MODELS = (SIGMAS, BETAS, V_PRED)
"""Keys that the web UI does not call a model's."""
MANTISSA = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}

MIXES: Mapping[str, tuple[str, ...]] = {
    f"{UNET}half.weight": ("F16",),
    f"{UNET}brain.weight": ("BF16",),
    f"{UNET}single.weight": ("F32",),
    f"{UNET}double.weight": ("F64",),
    f"{UNET}half-single.weight": ("F16", "F32", "F16"),
    f"{UNET}half-brain.weight": ("F16", "BF16", "BF16", "F16", "F16"),
    f"{UNET}single-brain.weight": ("BF16", "F32", "BF16", "BF16", "BF16"),
    f"{UNET}single-double.weight": ("F32", "F32", "F32", "F64", "F32"),
    f"{UNET}number-half.weight": ("I32", "F16", "F16", "I64", "F16", "U8", "BOOL"),
    CONV: ("F32", "F16", "F16", "BF16", "F16", "F16", "F16"),
}
"""What the leaves store, in turn."""
ANYHOW = (f"{CLIP}0.transformer.text_model.final.weight", f"{CLIP}1.model.positional_embedding", POST)
"""Keys for which every leaf stores what chance has it store."""

TOY = architecture(
    "toy",
    "keep",
    {},
    {
        "unet": {"tensors": {key: None for key in MIXES if key.startswith(UNET)}},
        "te": {"tensors": {key: None for key in (ANYHOW[0], ANYHOW[1], SCALE, IDS)}, "integers": [IDS]},
        "vae": {"tensors": {CONV: None, POST: None}},
    },
)
"""Three components; what the leaves have beside them belongs to none."""


def numbers(dtype: str, shape: Shape, seed: int) -> Tensor:
    """Values such as weights have; among them subnormal ones, both zeros, and some a hundred times as large.

    Half of the places have the same kind for every seed, so that even large trees have subnormal sums.
    """
    random = np.random.default_rng([seed, list(STORED).index(dtype)])
    if dtype not in FLOATS:
        return tensor(dtype, random.integers(0, 2 if dtype == "BOOL" else 100, shape))
    usual = _bits(tensor(dtype, random.normal(0, 0.1, shape)))
    large = _bits(tensor(dtype, random.normal(0, 20, shape)))
    width, tiny = 8 * STORED[dtype].itemsize, MANTISSA[dtype]
    sign = random.integers(0, 2, shape, np.uint64) << np.uint64(width - 1)
    subnormal = random.integers(0, 2 ** (tiny + 1), shape, np.uint64) | sign
    kinds, fixed = (source.choice(4, shape, p=[0.7, 0.1, 0.15, 0.05]) for source in (random, np.random.default_rng(0)))
    kinds = np.where(np.arange(kinds.size).reshape(shape) % 2, kinds, fixed)
    return of_bits(dtype, np.choose(kinds, [usual, large, subnormal, sign]))


def _bits(value: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return np.asarray(value.values).view(f"<u{STORED[value.dtype].itemsize}").astype(np.uint64)


def leaf(index: int, size: int = 60) -> Tensors:
    """A checkpoint; every other of its tensors is told by the index, and most have `size` elements."""
    random = np.random.default_rng(index)
    made = {key: numbers(cycle[index % len(cycle)], (size // 6, 6), index * 100 + n) for n, (key, cycle) in _mixes()}
    for number, key in enumerate(ANYHOW):
        made[key] = numbers(FLOATS[random.integers(4)], (size,), index * 100 + 50 + number)
    made[IDS] = tensor(("I64", "F16", "I64", "F32")[index % 4], np.arange(77).reshape(1, 77))
    made[SKIPPED] = tensor("I64", np.arange(index, index + 4))
    made[SCALE] = tensor(("F16", "F32")[index % 2], 4.6 + index / 100)
    made |= {SIGMAS: numbers("F32", (7,), index), BETAS: numbers("F64", (3,), index)}
    made |= {V_PRED: tensor("F16", []), f"{UNET}empty.weight": tensor("F16", np.zeros((0, 5)))}
    made |= {f"{UNET}only-{index}.weight": numbers("F32", (5,), index), LOSS: numbers("F32", (2,), index)}
    if index % 3 != 2:
        made[PARTIAL] = numbers(("F32", "F16")[index % 2], (8,), index)
    return made


def _mixes() -> enumerate[tuple[str, tuple[str, ...]]]:
    return enumerate(MIXES.items())


def vae() -> Tensors:
    """A VAE to bake in: it lacks one tensor of theirs, and has some that are not to be baked in."""
    kept = {CONV: numbers("F32", (10, 6), 900), LOSS: numbers("F32", (2,), 901)}
    return {key.removeprefix(VAE): value for key, value in kept.items()} | {"more.bias": numbers("F16", (4,), 902)}


def name(index: int) -> str:
    return f"{index:02}"


def write_leaves(directory: Path, count: int, size: int = 60) -> list[Path]:
    """The files of so many leaves, and that of the VAE beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "vae.safetensors", vae())
    return [write(directory / f"{name(index)}.safetensors", leaf(index, size)) for index in range(count)]
