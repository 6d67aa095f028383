"""The other arithmetics, against the reference: nothing rounded between, as ComfyUI has it, as supermerger has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mergeflow.recipe.request import Policies
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from tests.byhand.files import read, write
from tests.byhand.floats import FLOATS, Tensor, as_float64, converted, rounded, tensor
from tests.byhand.tree import Pair, balanced, chain, merge_tree_unrounded
from tests.byhand.webui import VAE, merge_files_supermerger
from tests.pairwise.checkpoints import CONV, IDS, MIXES, PARTIAL, SCALE, SIGMAS, UNET, name, write_leaves
from tests.pairwise.sides import assert_same, by_engine, by_hand

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mergeflow.recipe.tree import Arithmetic
    from tests.byhand.tree import Tree

    Tensors = Mapping[str, Tensor]

MOST = 40
NAMES = [name(index) for index in range(MOST)]
CODES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
FIRST = Policies(keys="webui", integers="first")
"""Position ids are copied, and those of Stable Diffusion 1 differ here, so that it shows whose they are."""
BETWEEN = f"{UNET}number-half.weight"
"""Its first leaf stores whole numbers, which supermerger cannot merge."""
SHAPES: dict[str, tuple[int, object, Tree]] = {
    "1": (1, "balanced", 0),
    "2": (2, "balanced", balanced(2)),
    "7": (7, "balanced", balanced(7)),
    "14": (14, "balanced", balanced(14)),
    "40": (40, "balanced", balanced(40)),
    "chain of 9": (9, "chain", chain(9)),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_leaves(tmp_path_factory.mktemp("leaves"), MOST)


def written_as(tensors: Tensors, code: str) -> dict[str, Tensor]:
    """All floats rounded once."""
    return {key: rounded(as_float64(value), code) if value.dtype in FLOATS else value for key, value in tensors.items()}


def loaded_as(paths: list[Path], directory: Path, code: str) -> list[Path]:
    """The same files after a program has loaded them in a dtype."""
    directory.mkdir(parents=True)
    return [
        write(
            directory / path.name,
            {
                key: converted(value, code) if value.dtype in FLOATS else value
                for key, value in read(path).tensors.items()
            },
        )
        for path in paths
    ]


# --- nothing rounded between ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "shape", "tree"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("arithmetic", ["float32", "float64", "comfyui"])
def test_without_roundings_between_there_is_one_at_the_end(
    paths: list[Path], tmp_path: Path, arithmetic: Arithmetic, dtype: str, count: int, shape: object, tree: Tree
) -> None:
    baked = count % 2 == 0
    options = TreeOptions(shape, bake="top" if baked else "none", vae="vae" if baked else None)
    wanted: dict[str, Any] = {"tree": options, "rules": Rules(arithmetic), "policies": FIRST, "dtype": dtype}
    found = by_engine(paths[0].parent, tmp_path, NAMES[:count], **wanted)
    vae, sources = paths[0].parent / "vae.safetensors", paths[:count]
    if arithmetic == "comfyui":
        *sources, vae = loaded_as([*sources, vae], tmp_path / "loaded", CODES[dtype])
    made = merge_tree_unrounded(
        sources,
        tree,
        tmp_path / "by-hand.safetensors",
        arithmetic=arithmetic,  # type: ignore[arg-type]
        dtype=CODES[dtype],
        bake_vae=vae if baked else None,
    )
    expected = written_as(read(made).tensors, CODES[dtype])
    expected[IDS] = tensor("I64", np.arange(77).reshape(1, 77))
    assert_same(found, expected)


@pytest.mark.parametrize("save_half", [True, False])
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_the_dtype_that_is_kept_is_that_of_a_saved_as_half(
    paths: list[Path], tmp_path: Path, arithmetic: Arithmetic, save_half: bool
) -> None:
    options = TreeOptions(save_half=save_half)
    found = by_engine(paths[0].parent, tmp_path, NAMES[:14], tree=options, rules=Rules(arithmetic), policies=FIRST)
    first = read(paths[0]).tensors
    in_full = merge_tree_unrounded(
        paths[:14],
        balanced(14),
        tmp_path / "by-hand.safetensors",
        arithmetic=arithmetic,  # type: ignore[arg-type]
        dtype="F64",
    )
    for key in MIXES:
        own = first[key].dtype if first[key].dtype in FLOATS else "F32"
        kept = "F16" if own == "F32" and save_half else own
        assert_same({key: found[key]}, {key: rounded(as_float64(read(in_full).tensors[key]), kept)})


def test_comfyui_keeps_each_dtype_where_it_is_to_keep_them(paths: list[Path], tmp_path: Path) -> None:
    found = by_engine(paths[0].parent, tmp_path, NAMES[:7], rules=Rules("comfyui"), policies=FIRST)
    made = merge_tree_unrounded(
        paths[:7], balanced(7), tmp_path / "by-hand.safetensors", arithmetic="comfyui", dtype="F32"
    )
    first, expected = read(paths[0]).tensors, read(made).tensors
    for key in [*MIXES, SCALE, IDS, SIGMAS]:
        own = "F32" if key == BETWEEN else first[key].dtype
        wanted = rounded(as_float64(expected[key]), own) if own in FLOATS else expected[key]
        assert_same({key: found[key]}, {key: wanted})
    assert all(found[key].values.tobytes() == first[key].values.tobytes() for key in (CONV, SCALE, IDS, SIGMAS))


def test_comfyui_loads_fp64_as_torch_converts_it(tmp_path: Path) -> None:
    # Beside a tie of fp16 and nearer to it than fp32 can say: by way of fp32 it is rounded to the even neighbour.
    for index in (0, 1):
        write(tmp_path / f"{index}.safetensors", {"model.w": tensor("F64", [1 + 2**-11 + 2**-40])})
    found = by_engine(tmp_path, tmp_path / "out", "all", rules=Rules("comfyui"), dtype="fp16")
    assert found["model.w"].values.tolist() == [1.0]


# --- supermerger ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def floats(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The leaves without what supermerger cannot merge."""
    directory = tmp_path_factory.mktemp("floats")
    for path in [*paths, paths[0].parent / "vae.safetensors"]:
        tensors = read(path).tensors
        write(directory / path.name, {key: value for key, value in tensors.items() if key != BETWEEN})
    return [directory / path.name for path in paths]


@pytest.mark.parametrize(("count", "shape", "tree"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("save_half", [True, False])
@pytest.mark.parametrize("bake", ["none", "every", "top"])
def test_supermerger(
    floats: list[Path], tmp_path: Path, bake: Any, save_half: bool, count: int, shape: object, tree: Tree
) -> None:
    vae = None if bake == "none" else floats[0].parent / "vae.safetensors"
    options = TreeOptions(shape, save_half=save_half, bake=bake, vae="vae" if vae else None)
    found = by_engine(floats[0].parent, tmp_path, NAMES[:count], tree=options, rules=Rules("supermerger"))
    expected = by_hand(
        floats[:count],
        tree,
        tmp_path,
        merge=merge_files_supermerger,
        save_half=save_half,
        bake_vae=vae,
        bake="every" if bake == "none" else bake,
    )
    assert_same(found, expected)
    assert count < 4 or {PARTIAL, f"{UNET}only-3.weight"} <= found.keys()
    assert any(key.startswith(VAE) for key in found)


@pytest.mark.parametrize("save_half", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.2, 0.333, 0.4999999, 0.5, 0.50000001, 0.8, 1.35, -0.25, -0.7])
def test_supermerger_at_other_alphas(floats: list[Path], tmp_path: Path, alpha: float, save_half: bool) -> None:
    options = TreeOptions(multipliers={"level1": alpha, "level2": alpha}, save_half=save_half)
    rules = Rules("supermerger")
    found = by_engine(floats[0].parent, tmp_path, NAMES[:4], tree=options, rules=rules)
    tree = Pair(Pair(0, 1, alpha), Pair(2, 3, alpha), alpha)
    expected = by_hand(floats[:4], tree, tmp_path, merge=merge_files_supermerger, save_half=save_half)
    assert_same(found, expected)


def test_supermerger_halves_fp64_as_torch_converts_it(tmp_path: Path) -> None:
    beside = tensor("F64", [1 + 2**-11 + 2**-40])
    paths = [
        write(tmp_path / "00.safetensors", {f"{UNET}both.weight": beside, f"{UNET}a.weight": beside}),
        write(tmp_path / "01.safetensors", {f"{UNET}both.weight": beside, f"{UNET}b.weight": beside}),
    ]
    found = by_engine(tmp_path, tmp_path / "out", "all", rules=Rules("supermerger"))
    assert_same(found, by_hand(paths, balanced(2), tmp_path / "work", merge=merge_files_supermerger))
    assert {float(value.values[0]) for value in found.values()} == {1.0}
