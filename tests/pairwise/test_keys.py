"""Which tensors a tree has, from whom, and which of them nobody reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.recipe.architecture import architecture
from mergeflow.recipe.recorded import Merge
from mergeflow.recipe.request import Policies
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.storage.local import LocalStore
from tests.byhand.files import read, write
from tests.byhand.floats import FLOATS, STORED, Tensor, of_bits, same, tensor
from tests.byhand.tree import balanced
from tests.byhand.webui import SKIPPED, VAE
from tests.fakes import CountingStore, Extent, merged
from tests.models import ANY
from tests.pairwise.checkpoints import CLIP, CONV, IDS, SIGMAS, UNET, leaf, name, numbers
from tests.pairwise.sides import ONE, RECORDED, WEBUI, asked, assert_same, by_engine, by_hand, by_hand_as_recorded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mergeflow.recipe.request import Request

    Tensors = Mapping[str, Tensor]

STRICT = Policies()
IN, OUT = f"{UNET}in.weight", f"{UNET}out.weight"
PARTS = architecture(
    "parts",
    "keep",
    {},
    {
        "unet": {"tensors": {IN: None, OUT: None}, "optional": [OUT]},
        "vae": {"prefix": VAE, "tensors": {"decoder.conv.weight": None, "post.bias": None}},
    },
)
BAKED = TreeOptions(bake="every", vae="vae")


def written(directory: Path, *models: Tensors, vae: Tensors | None = None) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    if vae is not None:
        write(directory / "vae.safetensors", vae)
    return [write(directory / f"{name(index)}.safetensors", tensors) for index, tensors in enumerate(models)]


def ids(count: int, dtype: str = "I64") -> Tensor:
    return tensor(dtype, np.arange(count).reshape(1, count))


# --- A decides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [ANY, PARTS], ids=["any", "components"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_keys_are_those_of_a(tmp_path: Path, arch: Any, dtype: str) -> None:
    a = {IN: numbers(dtype, (6,), 1), OUT: numbers(dtype, (4,), 2), SIGMAS: numbers(dtype, (2,), 3)}
    b = {IN: numbers("F16", (6,), 4), SIGMAS: numbers("F16", (2,), 5), f"{UNET}new.weight": numbers("F16", (9,), 6)}
    paths = written(tmp_path, a, b, b, a)
    found = by_engine(tmp_path, tmp_path / "out", "all", architecture=arch)
    assert_same(found, by_hand(paths, balanced(4), tmp_path / "work"))
    assert found.keys() == a.keys()
    assert_same({key: found[key] for key in (OUT, SIGMAS)}, {key: a[key] for key in (OUT, SIGMAS)})
    turned = by_engine(tmp_path, tmp_path / "out", [name(1), name(0)], architecture=arch)
    assert turned.keys() == b.keys()


def test_a_key_that_a_lacks_at_any_node_is_lost_with_all_that_b_has_of_it(tmp_path: Path) -> None:
    both, one = {IN: numbers("F16", (6,), 1), OUT: numbers("F16", (4,), 2)}, {IN: numbers("F16", (6,), 3)}
    paths = written(tmp_path, both, both, one, both)
    found = by_engine(tmp_path, tmp_path / "out", "all")
    assert_same(found, by_hand(paths, balanced(4), tmp_path / "work"))
    first_pair = by_engine(tmp_path, tmp_path / "out", [name(0), name(1)])
    assert_same({OUT: found[OUT]}, {OUT: first_pair[OUT]})


@pytest.mark.parametrize("key", [SIGMAS, "betas", "v_pred", "edm_vpred.sigma_max", SKIPPED])
def test_some_keys_are_never_merged(tmp_path: Path, key: str) -> None:
    a, b = numbers("F32", (5,), 1), numbers("F32", (5,), 2)
    written(tmp_path, {IN: a, key: a}, {IN: b, key: b})
    found = by_engine(tmp_path, tmp_path / "out", "all", architecture=PARTS)
    assert_same({key: found[key]}, {key: a})
    assert found[IN].dtype == "F16"


OLD, NEW = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."
TURBO = {f"{CLIP}0.model.ln_final.weight": numbers("F16", (1024,), 1), f"{CLIP}0.model.w": numbers("F16", (5,), 2)}
RENAMED: dict[str, tuple[Tensors, Tensors]] = {
    "Stable Diffusion 1": (
        {f"{OLD}encoder.w": numbers("F16", (5,), 1), f"{OLD}embeddings.position_ids": ids(3), OLD + "x": ids(2)},
        {f"{NEW}encoder.w": numbers("F16", (5,), 1), f"{NEW}embeddings.position_ids": ids(3), OLD + "x": ids(2)},
    ),
    "Stable Diffusion 2 turbo": (
        TURBO,
        {key.replace(f"{CLIP}0.", "cond_stage_model."): value for key, value in TURBO.items()},
    ),
}


@pytest.mark.parametrize(("old", "new"), RENAMED.values(), ids=RENAMED)
def test_old_names_of_keys_meet_new_ones(tmp_path: Path, old: Tensors, new: Tensors) -> None:
    others = {key: numbers("F16", value.values.shape, 9) for key, value in new.items() if value.dtype == "F16"}
    written(tmp_path / "models", old, others)
    paths = written(tmp_path / "renamed", new, others)
    found = by_engine(tmp_path / "models", tmp_path / "out", "all")
    assert_same(found, by_hand(paths, balanced(2), tmp_path / "work"))


# --- position ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [("I64", "F16", "F32"), ("F32", "F32", "I64"), ("F16",) * 3], ids=" ".join)
@pytest.mark.parametrize("scalars", ["opmath", "half"])
@pytest.mark.parametrize("asked_for", [None, "webui", "fix"])
def test_position_ids_are_merged_like_weights_or_fixed(
    tmp_path: Path, asked_for: Any, scalars: Any, stored: tuple[str, ...]
) -> None:
    paths = written(tmp_path, *({IDS: ids(77, dtype), IN: numbers("F16", (4,), 1)} for dtype in stored))
    policies = Policies(keys="webui", position_ids=asked_for)
    rules = asked(tmp_path, tmp_path, "all").rules._replace(scalars=scalars)
    found = by_engine(tmp_path, tmp_path / "out", "all", policies=policies, rules=rules)
    rule = asked_for or "webui"
    assert_same(found, by_hand(paths, balanced(3), tmp_path / "work", scalars=scalars, position_ids=rule))
    assert found[IDS].dtype == ("I64" if asked_for == "fix" else "F16")


def test_ids_that_merging_has_bent_are_put_right(tmp_path: Path) -> None:
    bent = of_bits("F16", (ids(77, "F16").values * 0.9995).astype("f2").view("u2"))
    written(tmp_path, {IDS: bent}, {IDS: ids(77)})
    fix = Policies(keys="webui", position_ids="fix")
    assert_same(by_engine(tmp_path, tmp_path / "out", "all", policies=fix), {IDS: ids(77)})


# --- a VAE that is baked in -----------------------------------------------------------------------------------------


def poisoned(tensors: Tensors) -> dict[str, Tensor]:
    """The same with NaN in every tensor of the VAE."""
    return {
        key: tensor(value.dtype, np.full(value.values.shape, np.nan)) if key.startswith(VAE) else value
        for key, value in tensors.items()
    }


def with_vae(seed: int) -> dict[str, Tensor]:
    return {
        IN: numbers("F16", (60,), seed),
        CONV: numbers(("F16", "F32")[seed % 2], (6, 10), seed),
        f"{VAE}post.bias": numbers("F16", (5,), seed),
    }


def prefixless(tensors: Tensors) -> dict[str, Tensor]:
    return {key.removeprefix(VAE): value for key, value in tensors.items() if key.startswith(VAE)}


VAES: dict[str, Tensors] = {"a VAE": prefixless(with_vae(90)), "a checkpoint": with_vae(91)}


def read_of(wanted: Request, paths: list[Path]) -> list[list[Extent]]:
    """The bytes of tensors that a run reads of each file."""
    store = CountingStore(LocalStore())
    plan = open_plan(wanted, store)
    store.forget()
    run(plan, LocalExecutor(ONE), store)
    return [merged(store.reads(str(path))) for path in paths]


def extents_of(path: Path, wanted: Request, vae: bool) -> list[Extent]:
    plan = open_plan(wanted)
    (header,) = (one.header for one in plan.checkpoints if one.path == str(path))
    return merged((info.begin, info.end) for key, info in header.tensors.items() if key.startswith(VAE) == vae)


@pytest.mark.parametrize("arch", [ANY, PARTS], ids=["any", "components"])
@pytest.mark.parametrize("policies", [WEBUI, STRICT], ids=["webui", "strict"])
@pytest.mark.parametrize("vae", VAES.values(), ids=VAES)
@pytest.mark.parametrize("bake", ["every", "top"])
def test_where_a_vae_is_baked_in_at_the_top_that_of_no_leaf_is_read(
    tmp_path: Path, bake: Any, vae: Tensors, policies: Policies, arch: Any
) -> None:
    paths = written(tmp_path, *(poisoned(with_vae(seed)) for seed in range(5)), vae=vae)
    listed, options = [name(index) for index in range(5)], TreeOptions(bake=bake, vae="vae")
    wanted = asked(tmp_path, tmp_path / "out", listed, tree=options, policies=policies, architecture=arch)
    assert read_of(wanted, paths) == [extents_of(path, wanted, vae=False) for path in paths]
    clean = written(tmp_path / "clean", *(with_vae(seed) for seed in range(5)), vae=vae)
    found = read(tmp_path / "out" / "merged.safetensors").tensors
    baked = tmp_path / "vae.safetensors"
    assert_same(found, by_hand(clean, balanced(5), tmp_path / "work", bake_vae=baked, bake=bake))


def test_below_a_node_with_a_vae_none_is_read_and_beside_it_all_are(tmp_path: Path) -> None:
    paths = written(tmp_path, *(with_vae(seed) for seed in range(4)), vae=VAES["a VAE"])
    for index in (2, 3):
        write(paths[index], poisoned(with_vae(index)))
    merges = {
        "a": Merge(("00", "01")),
        "b": Merge(("02", "03"), bake="vae"),
        "n": Merge(("a", "b"), 0.2),
    }
    wanted = asked(tmp_path, tmp_path / "out", "all", targets=(RECORDED,), recorded=merges)
    whole = [merged([*extents_of(path, wanted, vae=True), *extents_of(path, wanted, vae=False)]) for path in paths]
    assert read_of(wanted, paths) == [*whole[:2], *(extents_of(path, wanted, vae=False) for path in paths[2:])]
    found = read(tmp_path / "out" / "merged.safetensors").tensors
    assert_same(found, by_hand_as_recorded(tmp_path, tmp_path / "work", merges))


@pytest.mark.parametrize("lacking", [0, 1, 2], ids=["A of A", "B of A", "B"])
@pytest.mark.parametrize("bake", ["every", "top"])
def test_a_vae_replaces_what_is_there_and_adds_nothing(tmp_path: Path, lacking: int, bake: Any) -> None:
    models = [with_vae(seed) for seed in range(3)]
    del models[lacking][CONV]
    paths = written(tmp_path, *models, vae={**VAES["a VAE"], "more.bias": numbers("F16", (3,), 1)})
    listed, vae = [name(index) for index in range(3)], tmp_path / "vae.safetensors"
    found = by_engine(tmp_path, tmp_path / "out", listed, tree=TreeOptions(bake=bake, vae="vae"))
    assert_same(found, by_hand(paths, balanced(3), tmp_path / "work", bake_vae=vae, bake=bake))
    assert (CONV in found) == (lacking != 0)


def test_what_a_vae_lacks_is_merged(tmp_path: Path) -> None:
    paths = written(tmp_path, *(with_vae(seed) for seed in range(3)), vae={"post.bias": numbers("F32", (5,), 1)})
    listed = [name(index) for index in range(3)]
    found = by_engine(tmp_path, tmp_path / "out", listed, tree=BAKED)
    assert_same(found, by_hand(paths, balanced(3), tmp_path / "work", bake_vae=tmp_path / "vae.safetensors"))


def test_where_the_architecture_wants_a_vae_that_no_leaf_has_it_is_baked_in(tmp_path: Path) -> None:
    written(tmp_path, *({IN: numbers("F16", (6,), seed)} for seed in range(3)), vae=VAES["a VAE"])
    listed = [name(index) for index in range(3)]
    found = by_engine(tmp_path, tmp_path / "out", listed, tree=BAKED, policies=STRICT, architecture=PARTS)
    assert found.keys() == {IN, CONV, f"{VAE}post.bias"}
    assert same(found[CONV], VAES["a VAE"]["decoder.conv.weight"])


# --- strict ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 14])
@pytest.mark.parametrize("save_half", [True, False])
def test_strict_keys_of_models_that_have_them_all_are_those_of_the_web_ui(
    tmp_path: Path, count: int, save_half: bool
) -> None:
    def usual(index: int) -> dict[str, Tensor]:
        tensors = {key: value for key, value in leaf(index).items() if value.dtype in FLOATS or key == IDS}
        kept = {key: value for key, value in tensors.items() if key in leaf(2) and "model" in key and "only" not in key}
        return {key: value for key, value in kept.items() if "number" not in key}

    paths = written(tmp_path, *map(usual, range(count)))
    found = by_engine(tmp_path, tmp_path / "out", "all", tree=TreeOptions(save_half=save_half), policies=STRICT)
    expected = by_hand(paths, balanced(count), tmp_path / "work", save_half=save_half)
    assert len(expected) > 15
    assert_same(found, expected | {IDS: ids(77)})


def test_every_dtype_that_is_not_merged_is_carried(tmp_path: Path) -> None:
    carried = {f"kept {code}": of_bits(code, [0, 1]) for code in STORED}
    only = {f"model.{code}": of_bits(code, [0, 1]) for code in STORED}
    paths = written(tmp_path, carried | only | {IN: numbers("F16", (3,), 1)}, carried | {IN: numbers("F16", (3,), 2)})
    assert_same(by_engine(tmp_path, tmp_path / "out", "all"), by_hand(paths, balanced(2), tmp_path / "work"))
