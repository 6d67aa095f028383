"""Many files merged by hand: pair by pair, every intermediate file written, read again, and deleted."""

from __future__ import annotations

import itertools
import shutil
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from tests.byhand.files import read, write
from tests.byhand.floats import rounded
from tests.byhand.formulas import comfyui, float32, float64
from tests.byhand.webui import FORMAT, VAE, PositionIds, bake, counted, is_merged, merge_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.byhand.floats import Tensor

    Merge = Callable[..., Path]

Bake: TypeAlias = Literal["every", "none", "top", "below"]
"""Which merges bake the VAE in: every one, none, only the last one, or all but the last one."""
Arithmetic: TypeAlias = Literal["float32", "float64", "comfyui"]

UNROUNDED = {"float32": float32, "float64": float64, "comfyui": comfyui}


class Pair(NamedTuple):
    """One merge: `(1 - multiplier) a + multiplier b`, where both are leaves, by their index, or merges."""

    a: Tree
    b: Tree
    multiplier: float


Tree: TypeAlias = "int | Pair"


def leaves(tree: Tree) -> list[int]:
    """The leaves, from left to right."""
    return [tree] if isinstance(tree, int) else leaves(tree.a) + leaves(tree.b)


def pair(a: Tree, b: Tree) -> Pair:
    """Two trees, every leaf of which shall weigh the same."""
    ours, theirs = len(leaves(a)), len(leaves(b))
    return Pair(a, b, theirs / (ours + theirs))


def balanced(count: int) -> Tree:
    """Neighbours are paired level by level; what is left over waits at the end of the next level."""
    level: list[Tree] = list(range(count))
    while len(level) > 1:
        left_over = level[len(level) // 2 * 2 :]
        level = [*(pair(a, b) for a, b in zip(level[::2], level[1::2], strict=False)), *left_over]
    return level[0]


def chain(count: int) -> Tree:
    """A running mean: the k-th leaf joins what there is at 1 / k."""
    tree: Tree = 0
    for leaf in range(1, count):
        tree = Pair(tree, leaf, 1 / (leaf + 1))
    return tree


def merge_tree(
    paths: Sequence[Path],
    tree: Tree,
    workdir: Path,
    out: Path,
    *,
    merge: Merge = merge_files,
    bake_vae: Path | None = None,
    bake: Bake = "every",
    **options: Any,
) -> Path:
    """Merge leaf files as the tree says by real files in `workdir`; a tree of one leaf is a copy of its file.

    `merge` is `merge_files` or `merge_files_supermerger`, and the options are those that it takes.
    """
    if isinstance(tree, int):
        shutil.copyfile(paths[tree], out)
        return out
    numbers = itertools.count(1)

    def made(tree: Tree) -> Path:
        if isinstance(tree, int):
            return paths[tree]
        target = workdir / f"node-{next(numbers)}.safetensors"
        return merged(tree, target, bake_vae if bake in ("every", "below") else None)

    def merged(node: Pair, target: Path, vae: Path | None) -> Path:
        a, b = made(node.a), made(node.b)
        merge(a, b, target, multiplier=node.multiplier, bake_vae=vae, **options)
        for path, below in ((a, node.a), (b, node.b)):
            if isinstance(below, Pair):
                path.unlink()
        return target

    return merged(tree, out, bake_vae if bake in ("every", "top") else None)


def merge_tree_unrounded(
    paths: Sequence[Path],
    tree: Tree,
    out: Path,
    *,
    arithmetic: Arithmetic,
    dtype: str = "F16",
    bake_vae: Path | None = None,
    position_ids: PositionIds = "webui",
    merged_key: Callable[[str], bool] | None = None,
) -> Path:
    """Merge leaf files as the tree says without a rounding between the merges: what was merged is rounded once.

    A VAE is baked into the result alone, since what was baked further down would be replaced. `merged_key` says which
    keys that A and B have are merged, if not those of the tool whose arithmetic it is.
    """
    rule = merged_key or (is_merged_by_comfyui if arithmetic == "comfyui" else is_merged)
    formula = UNROUNDED[arithmetic]
    if isinstance(tree, int):
        shutil.copyfile(paths[tree], out)
        return out

    def made(tree: Tree) -> tuple[dict[str, Tensor], set[str]]:
        """The tensors, and which of them were computed."""
        if isinstance(tree, int):
            return read(paths[tree]).tensors, set()
        (a, computed), (b, _) = made(tree.a), made(tree.b)
        both = {key for key in a if key in b and rule(key)}
        return a | {key: formula(a[key], b[key], tree.multiplier) for key in both}, computed | both

    tensors, computed = made(tree)
    tensors |= {key: rounded(tensors[key].values, dtype) for key in computed}
    return write(out, counted(bake(tensors, bake_vae, save_half=dtype == "F16"), position_ids), FORMAT)


def is_merged_by_comfyui(key: str) -> bool:
    """Whether the merge nodes of a graph merge it: UNet and text encoders, each without its fixed parts."""
    return is_merged(key) and not key.startswith(VAE) and not key.endswith((".position_ids", ".logit_scale"))
