"""The engine's trees are the trees by hand, bit for bit: every number of files, every shape, every dtype."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Rules
from tests.byhand.files import read, write
from tests.byhand.floats import FLOATS, as_float64, rounded
from tests.byhand.tree import Pair, balanced, chain
from tests.byhand.webui import SKIPPED
from tests.pairwise.checkpoints import IDS, MIXES, NOT_MODELS, TOY, UNET, name, numbers, write_leaves
from tests.pairwise.sides import assert_same, by_engine, by_hand

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.byhand.tree import Tree

MOST = 70
NAMES = [name(index) for index in range(MOST)]
COMBINATIONS = list(product(("opmath", "half"), (True, False), ("none", "every", "top")))
"""Scalars, whether it is saved as half, and where the VAE is baked in."""
FEW = 8
"""Trees of so few files are made in every combination; with more, each number of files has its turn of two."""


def combinations(count: int) -> Sequence[tuple[str, bool, str]]:
    if count <= FEW:
        return COMBINATIONS
    return [COMBINATIONS[(count + step) % len(COMBINATIONS)] for step in (0, 7)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_leaves(tmp_path_factory.mktemp("leaves"), MOST)


@pytest.fixture
def both(paths: list[Path], tmp_path: Path) -> Both:
    return Both(paths, tmp_path)


class Both:
    """Merges the same files in both ways, and compares what comes of it."""

    def __init__(self, paths: list[Path], out: Path) -> None:
        self._paths, self._out = paths, out
        self._vae = paths[0].parent / "vae.safetensors"

    def agree(
        self,
        listed: object,
        tree: Tree,
        scalars: Any = "opmath",
        save_half: bool = True,
        bake: Any = "none",
        shape: object = "balanced",
        multipliers: dict[str, float] | None = None,
        **changes: Any,
    ) -> None:
        baked = bake != "none"
        options = TreeOptions(shape, multipliers or {}, save_half, bake, "vae" if baked else None)
        rules = Rules(scalars=scalars)
        found = by_engine(self._paths[0].parent, self._out, listed, tree=options, rules=rules, **changes)
        vae = self._vae if baked else None
        expected = by_hand(self._paths, tree, self._out, scalars=scalars, save_half=save_half, bake_vae=vae, bake=bake)
        assert_same(found, expected)


# --- balanced -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, MOST + 1))
def test_a_tree_of_so_many_files(both: Both, count: int) -> None:
    for scalars, save_half, bake in combinations(count):
        both.agree(NAMES[:count], balanced(count), scalars, save_half, bake)


def test_every_combination_has_its_turn() -> None:
    turns = [chosen for count in range(FEW + 1, MOST + 1) for chosen in combinations(count)]
    assert min(map(turns.count, COMBINATIONS)) >= 10


@pytest.mark.parametrize("count", [2, 5, 8, 40])
def test_the_order_of_the_list_is_that_of_the_leaves(both: Both, count: int) -> None:
    def turned(tree: Tree) -> Tree:
        return MOST - 1 - tree if isinstance(tree, int) else Pair(turned(tree.a), turned(tree.b), tree.multiplier)

    both.agree(NAMES[::-1][:count], turned(balanced(count)))


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("bake", ["none", "every", "top"])
def test_an_architecture_with_components_changes_nothing(both: Both, count: int, bake: str) -> None:
    both.agree(NAMES[:count], balanced(count), bake=bake, architecture=TOY)


@pytest.mark.parametrize(("dtype", "code"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32")])
@pytest.mark.parametrize("save_half", [True, False])
def test_another_dtype_is_the_tree_rounded_once_more(
    paths: list[Path], tmp_path: Path, dtype: str, code: str, save_half: bool
) -> None:
    options = TreeOptions(save_half=save_half)
    found = by_engine(paths[0].parent, tmp_path, NAMES[:14], tree=options, dtype=dtype)
    expected = by_hand(paths, balanced(14), tmp_path, save_half=save_half)
    assert {expected[key].dtype for key in MIXES} >= {"F16", "BF16", "F64"}
    assert_same(
        found,
        {key: rounded(as_float64(value), code) if value.dtype in FLOATS else value for key, value in expected.items()},
    )


# --- other shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [*range(2, 13), 33, MOST])
def test_a_chain(both: Both, count: int) -> None:
    for scalars, save_half, bake in combinations(count + FEW):
        both.agree(NAMES[:count], chain(count), scalars, save_half, bake, shape="chain")


THIRD = 1 / 3
NESTED: dict[str, tuple[object, Tree]] = {
    "a pair": (["03", "01"], Pair(3, 1, 0.5)),
    "one by one from the right": (["00", ["01", ["02", "03"]]], Pair(0, Pair(1, Pair(2, 3, 0.5), 2 / 3), 3 / 4)),
    "uneven": (
        [["05", ["00", "04"]], ["01", [["02", "03"], "06"]]],
        Pair(Pair(5, Pair(0, 4, 0.5), 2 / 3), Pair(1, Pair(Pair(2, 3, 0.5), 6, THIRD), 3 / 4), 4 / 7),
    ),
}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("scalars", ["opmath", "half"])
def test_a_nested_list(both: Both, nested: str, scalars: str) -> None:
    shape, tree = NESTED[nested]
    listed = sorted(str(shape).replace("[", "").replace("]", "").replace("'", "").split(", "))
    both.agree(listed, tree, scalars, shape={"listed": shape})


LITERAL: dict[str, tuple[dict[str, float], Tree]] = {
    "of one node": ({"listed-2": 0.333}, Pair(Pair(0, 1, 0.5), Pair(2, 3, 0.333), 0.5)),
    "of a level": ({"level1": 0.15}, Pair(Pair(0, 1, 0.15), Pair(2, 3, 0.15), 0.5)),
    "of a node on such a level": (
        {"level1": 0.0526, "listed-1": 0.2, "level2": 0.143},
        Pair(Pair(0, 1, 0.2), Pair(2, 3, 0.0526), 0.143),
    ),
    "of nothing but A": ({"level1": 0.0, "level2": 0.0}, Pair(Pair(0, 1, 0.0), Pair(2, 3, 0.0), 0.0)),
    "of nothing but B": ({"level1": 1.0, "level2": 1}, Pair(Pair(0, 1, 1.0), Pair(2, 3, 1.0), 1)),
    "beyond both": ({"level1": 1.35, "listed-3": -0.25}, Pair(Pair(0, 1, 1.35), Pair(2, 3, 1.35), -0.25)),
}


@pytest.mark.parametrize(("multipliers", "tree"), LITERAL.values(), ids=LITERAL)
@pytest.mark.parametrize("scalars", ["opmath", "half"])
@pytest.mark.parametrize("save_half", [True, False])
def test_multipliers_that_are_told(
    both: Both, multipliers: dict[str, float], tree: Tree, scalars: str, save_half: bool
) -> None:
    both.agree(NAMES[:4], tree, scalars, save_half, multipliers=multipliers)


MIX = Pair(Pair(1, 2, 0.5), 3, THIRD)
COMPOSITES: dict[str, tuple[list[str], Tree]] = {
    "alone": (["mix"], MIX),
    "as one entry of three": (["00", "mix", "04"], Pair(Pair(0, MIX, 0.5), 4, THIRD)),
    "beside its own member": (["02", "mix"], Pair(2, MIX, 0.5)),
    "within another": (["outer", "mix", "02"], Pair(Pair(Pair(MIX, 5, 0.5), MIX, 0.5), 2, THIRD)),
    "of one member": (["single", "01"], Pair(6, 1, 0.5)),
}


@pytest.mark.parametrize(("listed", "tree"), COMPOSITES.values(), ids=COMPOSITES)
@pytest.mark.parametrize(("scalars", "save_half", "bake"), COMBINATIONS[::5], ids=str)
def test_a_composite(both: Both, listed: list[str], tree: Tree, scalars: str, save_half: bool, bake: str) -> None:
    composites = {"mix": ("01", "02", "03"), "outer": ("mix", "05"), "single": ("06",)}
    both.agree(listed, tree, scalars, save_half, bake, composites=composites)


def test_a_multiplier_of_a_composite(both: Both) -> None:
    tree = Pair(0, Pair(Pair(1, 2, 0.9), 3, 0.2), 0.7)
    multipliers = {"mix-1": 0.9, "mix": 0.2, "level3": 0.7}
    both.agree(["00", "mix"], tree, multipliers=multipliers, composites={"mix": ("01", "02", "03")})


def test_what_is_merged_is_what_the_tests_mean_to_merge(paths: list[Path], tmp_path: Path) -> None:
    expected = by_hand(paths, balanced(40), tmp_path, bake_vae=paths[0].parent / "vae.safetensors", bake="every")
    assert {*MIXES, *NOT_MODELS, IDS, SKIPPED} < expected.keys()
    assert (expected[IDS].dtype, expected[SKIPPED].dtype) == ("F16", "I64")
    half = expected[f"{UNET}half.weight"].values
    assert np.any((half != 0) & (abs(half) < 2**-14)), "some are subnormal"
    leaf = read(paths[0]).tensors[f"{UNET}half.weight"].values
    assert np.any(np.signbit(leaf) & (leaf == 0)), "some are -0"


def test_a_large_tree_of_one_more_level_than_any_above(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{index:03}.safetensors", {"model.w": numbers("F16", (500,), index)}) for index in range(257)
    ]
    found = by_engine(tmp_path, tmp_path / "out", "all", rules=Rules(scalars="half"))
    assert_same(found, by_hand(paths, balanced(257), tmp_path / "work", scalars="half"))
