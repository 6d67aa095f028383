"""Two whole files merged into a third, key by key, as the webui's tab and its extension supermerger do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from tests.byhand.files import read, write
from tests.byhand.floats import Tensor, converted
from tests.byhand.formulas import add_difference, supermerger, to_half, weighted_sum

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.byhand.floats import Scalars

    Tensors = Mapping[str, Tensor]
    Formula = Callable[[Tensor, Tensor], Tensor]

Interpolation: TypeAlias = Literal["Weighted sum", "Add difference", "No interpolation"]
PositionIds: TypeAlias = Literal["webui", "fix"]
"""Whether position ids are merged like any other tensor, or are int64 counting from 0 in every result."""

SKIPPED = "cond_stage_model.transformer.text_model.embeddings.position_ids"
"""The one key of a checkpoint that the webui does not merge; it names that of SD 1, not those of SDXL."""
VAE = "first_stage_model."
FORMAT = {"format": "pt"}


def is_merged(key: str) -> bool:
    """Whether the webui merges what is called so, if A and B have it."""
    return "model" in key and key != SKIPPED


def is_merged_by_supermerger(key: str) -> bool:
    """Whether supermerger merges what is called so, if A and B have it."""
    return "model" in key and ("weight" in key or "bias" in key)


def merge_files(
    a_path: Path,
    b_path: Path,
    out_path: Path,
    *,
    multiplier: float,
    c_path: Path | None = None,
    interp: Interpolation = "Weighted sum",
    scalars: Scalars = "opmath",
    save_half: bool = True,
    bake_vae: Path | None = None,
    position_ids: PositionIds = "webui",
) -> Path:
    """The webui's checkpoint merger: the keys of A, and of them those of B as well by the formula."""
    a, b = read(a_path).tensors, read(b_path).tensors
    if interp == "No interpolation":
        merged = bake({key: to_half(value, save_half) for key, value in a.items()}, bake_vae, save_half)
    else:
        formula = _formula(interp, c_path, b, multiplier, scalars)
        merged = _merged(a, b, is_merged, lambda *of: to_half(formula(*of), save_half))
        merged = bake(merged, bake_vae, save_half)
    return write(out_path, counted(merged, position_ids), FORMAT)


def _merged(
    a: Tensors, b: Tensors, merges: Callable[[str], bool], formula: Callable[[str, Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The tensors of A; what is merged by its name, and is in B too, by the formula of the name, A's and B's."""
    return {key: formula(key, mine, b[key]) if merges(key) and key in b else mine for key, mine in a.items()}


def _formula(
    interp: Interpolation, c_path: Path | None, b: Tensors, multiplier: float, scalars: Scalars
) -> Callable[[str, Tensor, Tensor], Tensor]:
    if interp == "Weighted sum":
        return lambda key, mine, other: weighted_sum(mine, other, multiplier, scalars)
    if c_path is None:
        raise ValueError("a difference needs a third file")
    c = read(c_path).tensors
    return lambda key, mine, other: add_difference(mine, other, c.get(key), multiplier, scalars)


def merge_files_supermerger(
    a_path: Path,
    b_path: Path,
    out_path: Path,
    *,
    multiplier: float,
    calc: Literal["lerp", "old"] = "lerp",
    scalars: Scalars = "opmath",
    save_half: bool = True,
    bake_vae: Path | None = None,
    position_ids: PositionIds = "webui",
) -> Path:
    """Supermerger's "weight sum" at an alpha of `multiplier`: fewer keys are merged, and those of B alone are added."""
    a, b = read(a_path).tensors, read(b_path).tensors
    merged = _merged(
        a, b, is_merged_by_supermerger, lambda _, mine, other: _supermerged(mine, other, multiplier, calc, scalars)
    )
    merged |= {key: value for key, value in b.items() if key not in a and is_merged(key)}
    merged = bake(merged, bake_vae, save_half=False)
    if save_half:
        merged = {key: _halved(value) if "model" in key else value for key, value in merged.items()}
    return write(out_path, counted(merged, position_ids), FORMAT)


def _supermerged(a: Tensor, b: Tensor, alpha: float, calc: str, scalars: Scalars) -> Tensor:
    """At 0 and 1 nothing is computed by either way of calculating."""
    return supermerger(a, b, alpha) if calc == "lerp" or alpha in (0, 1) else weighted_sum(a, b, alpha, scalars)


def _halved(value: Tensor) -> Tensor:
    """What supermerger saves as float16: all other floats, where the webui would leave bf16 and fp64 alone."""
    return converted(value, "F16") if value.dtype in ("F32", "F64", "BF16") else value


def bake(tensors: Tensors, bake_vae: Path | None, save_half: bool) -> dict[str, Tensor]:
    """The tensors, those of the VAE replaced by what the file has of them: a VAE, or a whole checkpoint with one."""
    if bake_vae is None:
        return dict(tensors)
    found = read(bake_vae).tensors
    if any(key.startswith(VAE) for key in found):
        found = {key.removeprefix(VAE): value for key, value in found.items() if key.startswith(VAE)}
    replaced = dict(tensors)
    for key, value in found.items():
        if key.startswith("loss") or key in ("model_ema.decay", "model_ema.num_updates") or VAE + key not in tensors:
            continue
        if value.values.shape != tensors[VAE + key].values.shape:
            raise ValueError(f"{VAE + key}: shape {value.values.shape} is baked into {tensors[VAE + key].values.shape}")
        replaced[VAE + key] = to_half(value, save_half)
    return replaced


def counted(tensors: Tensors, position_ids: PositionIds) -> dict[str, Tensor]:
    """The tensors, position ids put right if they are to be fixed."""
    if position_ids == "webui":
        return dict(tensors)
    return {
        key: Tensor("I64", np.arange(value.values.size, dtype=np.int64).reshape(value.values.shape))
        if key.endswith("position_ids")
        else value
        for key, value in tensors.items()
    }
