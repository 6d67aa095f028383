"""The reference merges whole files by the rules for keys, and by the trees that people make."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.byhand.files import read, write
from tests.byhand.floats import STORED, Tensor, converted, of_bits, rounded, same, tensor
from tests.byhand.formulas import add_difference, supermerger, to_half, weighted_sum
from tests.byhand.samples import TORCH, from_torch, sample, to_torch
from tests.byhand.tree import UNROUNDED, Pair, balanced, chain, leaves, merge_tree, merge_tree_unrounded
from tests.byhand.webui import SKIPPED, VAE, merge_files, merge_files_supermerger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.byhand.tree import Arithmetic, Bake, Tree

    Tensors = Mapping[str, Tensor]

UNET, CLIP, IDS = "model.diffusion_model.out.weight", "conditioner.model.logit_scale", "conditioner.model.position_ids"
CONV = VAE + "conv.weight"


def assert_files_are(path: Path, expected: Tensors) -> None:
    found = read(path).tensors
    assert sorted(found) == sorted(expected)
    assert [key for key in found if not same(found[key], expected[key])] == []


def test_a_file_is_what_the_library_makes_of_it(tmp_path: Path) -> None:
    tensors = {f"{dtype} ü": sample(dtype, 35, 1) for dtype in TORCH}
    tensors |= {"scalar": tensor("F16", 4.6), "empty": tensor("F32", np.zeros((0, 4))), "v_pred": tensor("F16", [])}
    tensors["cube"] = Tensor("BF16", sample("BF16", 24, 2).values.reshape(2, 3, 4))
    path = write(tmp_path / "ours.safetensors", tensors, {"format": "pt", "title": "é"})
    loaded = load_file(path)
    assert {key: tuple(value.shape) for key, value in loaded.items()} == {
        key: value.values.shape for key, value in tensors.items()
    }
    assert all(same(from_torch(value), tensors[key]) for key, value in loaded.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "title": "é"} == read(path).metadata
    save_file({key: to_torch(value) for key, value in tensors.items()}, tmp_path / "theirs.safetensors", {"a": "b"})
    assert_files_are(tmp_path / "theirs.safetensors", tensors)
    assert_files_are(path, tensors)


def test_every_dtype_is_carried(tmp_path: Path) -> None:
    path = write(tmp_path / "all.safetensors", {name: of_bits(name, [0, 1]) for name in STORED})
    assert read(path).metadata == {}
    assert {key: value.dtype for key, value in read(path).tensors.items()} == {name: name for name in STORED}
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(STORED)
    fp8 = torch.ones(3).to(torch.float8_e4m3fn)
    save_file({"w": fp8}, tmp_path / "fp8.safetensors")
    assert read(tmp_path / "fp8.safetensors").tensors["w"].values.tolist() == fp8.view(torch.uint8).tolist()


A: Tensors = {
    UNET: tensor("F32", [1, 2, 3]),
    CLIP: tensor("BF16", 4.6),
    IDS: tensor("I64", [0, 1, 2]),
    CONV: tensor("F64", [8]),
    SKIPPED: tensor("I64", [0, 1]),
    "model.only": tensor("F32", [5]),
    "denoiser.sigmas": tensor("F32", [7]),
}
B: Tensors = {
    UNET: tensor("F16", [2, 4, 8]),
    CLIP: tensor("BF16", 2),
    IDS: tensor("F16", [0, 1, 2]),
    CONV: tensor("F16", [4]),
    SKIPPED: tensor("I64", [5, 6]),
    "denoiser.sigmas": tensor("F32", [9]),
    "model.other.bias": tensor("F64", [1 + 2**-11 + 2**-40]),
    "other": tensor("F32", [1]),
}
UNTOUCHED = (SKIPPED, "model.only", "denoiser.sigmas")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    a, b = write(tmp_path / "a.safetensors", A), write(tmp_path / "b.safetensors", B)
    return a, b, tmp_path / "out.safetensors"


def test_the_webui_merges_what_both_have_and_is_called_model(files: tuple[Path, Path, Path]) -> None:
    def summed(key: str) -> Tensor:
        return weighted_sum(A[key], B[key], 0.2, "half")

    expected = {key: to_half(summed(key)) for key in (UNET, CLIP, IDS, CONV)} | {key: A[key] for key in UNTOUCHED}
    assert_files_are(merge_files(*files, multiplier=0.2, scalars="half"), expected)
    assert [expected[key].dtype for key in (UNET, CLIP, IDS, CONV)] == ["F16", "BF16", "F16", "F64"]
    full = merge_files(*files, multiplier=0.2, scalars="half", save_half=False)
    assert_files_are(full, expected | {key: summed(key) for key in (UNET, IDS)})
    fixed = merge_files(*files, multiplier=0.2, scalars="half", position_ids="fix")
    assert_files_are(fixed, expected | {IDS: A[IDS]})


def test_a_difference_leaves_alone_what_c_lacks(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    c = write(tmp_path / "c.safetensors", {UNET: tensor("F16", [1, 1, 1]), SKIPPED: tensor("I64", [1, 1])})
    merged = merge_files(*files, multiplier=0.5, c_path=c, interp="Add difference", save_half=False)
    expected = {UNET: tensor("F32", [1.5, 3.5, 6.5]), IDS: add_difference(A[IDS], B[IDS], None, 0.5, "opmath")}
    assert_files_are(merged, {**A, **expected})
    assert read(merged).tensors[IDS].dtype == "F16", "an integer plus fp16"
    with pytest.raises(ValueError, match="third"):
        merge_files(*files, multiplier=0.5, interp="Add difference")


def test_no_interpolation_halves_every_key(files: tuple[Path, Path, Path]) -> None:
    expected = {key: to_half(value) for key, value in A.items()}
    assert_files_are(merge_files(*files, multiplier=0.2, interp="No interpolation"), expected)
    assert_files_are(merge_files(*files, multiplier=0.2, interp="No interpolation", save_half=False), A)


BAKED = {
    "a VAE": {"conv.weight": tensor("F32", [0.1]), "loss.weight": tensor("F32", [1]), "new": tensor("F32", [1])},
    "a checkpoint": {CONV: tensor("F32", [0.1]), UNET: tensor("F32", [9, 9, 9]), "conv.weight": tensor("F32", [3])},
}


@pytest.mark.parametrize("vae", BAKED.values(), ids=BAKED)
@pytest.mark.parametrize("save_half", [True, False])
def test_a_vae_is_baked_in(files: tuple[Path, Path, Path], tmp_path: Path, vae: Tensors, save_half: bool) -> None:
    plain = read(merge_files(*files, multiplier=0.2, save_half=save_half)).tensors
    path = write(tmp_path / "vae.safetensors", vae)
    baked = merge_files(*files, multiplier=0.2, save_half=save_half, bake_vae=path)
    assert_files_are(baked, plain | {CONV: tensor("F16" if save_half else "F32", [0.1])})


def test_supermerger_adds_what_b_alone_has_and_keeps_the_dtype_of_a(files: tuple[Path, Path, Path]) -> None:
    merged = {key: supermerger(A[key], B[key], 0.2) for key in (UNET, CONV)}
    expected = {**A, **merged, "model.other.bias": B["model.other.bias"]}
    assert_files_are(merge_files_supermerger(*files, multiplier=0.2, save_half=False), expected)
    halved = {
        key: converted(value, "F16") for key, value in expected.items() if "model" in key and value.dtype != "I64"
    }
    assert halved["model.other.bias"].values == 1, "by way of fp32, as torch does it"
    assert_files_are(merge_files_supermerger(*files, multiplier=0.2), expected | halved)
    old = merge_files_supermerger(*files, multiplier=0.2, calc="old", scalars="half", save_half=False)
    sums = {key: weighted_sum(A[key], B[key], 0.2, "half") for key in (UNET, CONV)}
    assert_files_are(old, expected | sums)
    ends = merge_files_supermerger(*files, multiplier=1, calc="old", save_half=False)
    assert_files_are(ends, expected | {key: B[key] for key in (UNET, CONV)})


@pytest.mark.parametrize("merge", [merge_files, merge_files_supermerger])
def test_shapes_that_differ_are_refused(
    merge: Callable[..., Path], files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    wide = write(tmp_path / "wide.safetensors", {UNET: tensor("F16", [[1, 2, 3]]), CONV: tensor("F16", [1])})
    with pytest.raises(ValueError, match="shape"):
        merge(files[0], wide, files[2], multiplier=0.5)
    vae = write(tmp_path / "vae.safetensors", {"conv.weight": tensor("F16", [1, 2])})
    with pytest.raises(ValueError, match=r"conv\.weight"):
        merge(*files, multiplier=0.5, bake_vae=vae)


def halves(first: int, count: int) -> Tree:
    """A perfect tree over a run of leaves."""
    half = count // 2
    return Pair(halves(first, half), halves(first + half, half), 0.5) if half else first


SHAPES = {
    1: 0,
    2: Pair(0, 1, 0.5),
    3: Pair(halves(0, 2), 2, 1 / 3),
    7: Pair(halves(0, 4), Pair(halves(4, 2), 6, 1 / 3), 3 / 7),
    14: Pair(halves(0, 8), Pair(halves(8, 4), halves(12, 2), 1 / 3), 6 / 14),
    21: Pair(halves(0, 16), Pair(halves(16, 4), 20, 1 / 5), 5 / 21),
    40: Pair(halves(0, 32), halves(32, 8), 0.2),
    **{2**level: halves(0, 2**level) for level in range(2, 7)},
}


@pytest.mark.parametrize(("count", "tree"), SHAPES.items(), ids=map(str, SHAPES))
def test_a_balanced_tree_is_what_people_make(count: int, tree: Tree) -> None:
    assert balanced(count) == tree


@pytest.mark.parametrize("make", [balanced, chain])
def test_every_leaf_weighs_the_same(make: Callable[[int], Tree]) -> None:
    def weights(tree: Tree, share: Fraction) -> list[Fraction]:
        if isinstance(tree, int):
            return [share]
        theirs = Fraction(tree.multiplier).limit_denominator(200)
        assert float(theirs) == tree.multiplier
        return weights(tree.a, share * (1 - theirs)) + weights(tree.b, share * theirs)

    for count in range(1, 71):
        assert leaves(make(count)) == list(range(count))
        assert weights(make(count), Fraction(1)) == [Fraction(1, count)] * count


def test_a_chain_is_a_running_mean() -> None:
    assert chain(4) == Pair(Pair(Pair(0, 1, 1 / 2), 2, 1 / 3), 3, 1 / 4)


def written(directory: Path, count: int, dtypes: tuple[str, ...] = ("F16", "F32", "BF16", "F16")) -> list[Path]:
    """Files of one tensor of the UNet, one of the VAE, and position ids."""
    ids = tensor("I64", np.arange(5))
    return [
        write(
            directory / f"leaf{leaf}.safetensors",
            {UNET: sample(dtypes[leaf % len(dtypes)], 300, leaf), CONV: tensor("F16", [leaf]), IDS: ids},
        )
        for leaf in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 14, 70])
@pytest.mark.parametrize("make", [balanced, chain])
def test_a_tree_of_files_is_its_merges_nested(tmp_path: Path, count: int, make: Callable[[int], Tree]) -> None:
    paths = written(tmp_path, count)

    def value(tree: Tree) -> Tensor:
        if isinstance(tree, int):
            return read(paths[tree]).tensors[UNET]
        return to_half(weighted_sum(value(tree.a), value(tree.b), tree.multiplier, "half"))

    workdir = tmp_path / "work"
    workdir.mkdir()
    merges: list[set[str]] = []

    def watched(*files: Path, **options: Any) -> Path:
        merges.append({path.name for path in workdir.iterdir()})
        return merge_files(*files, **options)

    out = merge_tree(paths, make(count), workdir, tmp_path / "out.safetensors", merge=watched, scalars="half")
    assert same(read(out).tensors[UNET], value(make(count)))
    assert len(merges) == count - 1
    assert max(map(len, merges), default=0) <= 7, "what is no longer needed is deleted"
    assert not list(workdir.iterdir())


def test_supermerger_merges_trees_as_well(tmp_path: Path) -> None:
    paths, out = written(tmp_path, 3), tmp_path / "out.safetensors"
    a, b, c = (read(path).tensors[UNET] for path in paths)
    merge_tree(paths, chain(3), tmp_path, out, merge=merge_files_supermerger, save_half=False)
    assert same(read(out).tensors[UNET], supermerger(supermerger(a, b, 1 / 2), c, 1 / 3))


@pytest.mark.parametrize("bake", ["none", "every", "top", "below"])
def test_a_vae_is_baked_in_where_it_is_wanted(tmp_path: Path, bake: Bake) -> None:
    vae = write(tmp_path / "vae.safetensors", {"conv.weight": tensor("F16", [10])})
    paths, out = written(tmp_path, 5), tmp_path / "out.safetensors"
    merge_tree(paths, balanced(5), tmp_path, out, bake_vae=vae, bake=bake)
    below = tensor("F16", [10 if bake == "below" else 1.5])
    summed = weighted_sum(below, tensor("F16", [4]), 0.2, "opmath")
    assert same(read(out).tensors[CONV], summed if bake in ("none", "below") else tensor("F16", [10]))


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "comfyui"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_without_roundings_between_there_is_one_at_the_end(tmp_path: Path, arithmetic: Arithmetic, dtype: str) -> None:
    paths, out, formula = written(tmp_path, 7), tmp_path / "out.safetensors", UNROUNDED[arithmetic]

    def value(tree: Tree, key: str) -> Tensor:
        if isinstance(tree, int):
            return read(paths[tree]).tensors[key]
        return formula(value(tree.a, key), value(tree.b, key), tree.multiplier)

    merged = read(merge_tree_unrounded(paths, balanced(7), out, arithmetic=arithmetic, dtype=dtype)).tensors
    summed = {key: rounded(value(balanced(7), key).values, dtype) for key in (UNET, CONV, IDS)}
    kept = {key: read(paths[0]).tensors[key] for key in (CONV, IDS)}
    expected = summed | kept if arithmetic == "comfyui" else summed
    assert all(same(merged[key], expected[key]) for key in expected)


def test_a_tree_in_fp64_rounds_to_fp16_at_once(tmp_path: Path) -> None:
    values = (2.0, 2**-10 + 2**-39)  # their mean lies beside a tie of fp16, nearer than fp32 can say
    paths = [
        write(
            tmp_path / f"{leaf}.safetensors", {UNET: tensor("F64", [values[leaf]]), f"model.{leaf}": tensor("F32", [1])}
        )
        for leaf in (0, 1)
    ]
    vae = write(tmp_path / "vae.safetensors", {"conv.weight": tensor("F32", [0.1])})
    out = merge_tree_unrounded(paths, balanced(2), tmp_path / "out", arithmetic="float64", bake_vae=vae)
    assert_files_are(out, {UNET: tensor("F16", [1 + 2**-10]), "model.0": tensor("F32", [1])})
    out = merge_tree_unrounded(paths, balanced(2), tmp_path / "out", arithmetic="float32")
    assert read(out).tensors[UNET].values == 1
    out = merge_tree_unrounded(paths, 0, tmp_path / "out", arithmetic="float32")
    assert_files_are(out, read(paths[0]).tensors)
