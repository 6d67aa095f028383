"""Which tensors a tree has and who is needed for them, told from headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.formats.safetensors import Safetensors
from mergeflow.plan.make import make_plan
from mergeflow.plan.rules import as_the_web_ui_names, role
from mergeflow.recipe.request import Policies
from mergeflow.recipe.shapes import TreeOptions
from mergeflow.recipe.tree import Node, Rules, Tree
from mergeflow.tensors import Dtype, TensorInfo
from tests.plan.builders import OPEN, SINGLE, TOY, USUAL, checkpoint, planned, problems, recipe

if TYPE_CHECKING:
    from mergeflow.plan.plan import Plan

WEBUI: dict[str, Any] = {
    "architecture": OPEN,
    "method": "pairwise",
    "policies": Policies(keys="webui"),
    "dtype": "keep",
}
SHAPES: dict[str, tuple[int, ...]] = {"model.w": (4,), "first_stage_model.w": (4,)}


def test_the_model_that_stores_it_is_named_with_what_to_do() -> None:
    models = [checkpoint("a", SHAPES), checkpoint("b", SHAPES, Dtype.F8_E5M2)]
    assert problems(planned(models, **WEBUI)) == [
        "[made] all: model b has 2 tensor(s) in F8_E5M2, which the web UI cannot merge; choose "
        "method.arithmetic=float32, or leave it out: first_stage_model.w, model.w"
    ]


def test_so_is_the_model_whose_vae_is_baked_in_below() -> None:
    models = [checkpoint(id, SHAPES) for id in "abc"] + [checkpoint("v", SHAPES, Dtype.F8_E5M2)]
    made = recipe(models, tree=TreeOptions(bake="top", vae="v"), selections={"models": ["a", "b", "c"]}, **WEBUI)
    (target,) = made.targets
    (part,) = target.parts
    below = Tree(("a", "b", "c"), (Node("m", (0, 1), bake="v"), Node("n", (3, 2))))
    made = replace(made, targets=(replace(target, parts=(replace(part, tree=below),)),))
    assert made.checkpoints() == ("a", "b", "c", "v")
    assert problems(make_plan(made, models, Safetensors(), "/out")) == [
        "[made] all: model v has 1 tensor(s) in F8_E5M2, which the web UI cannot merge; choose "
        "method.arithmetic=float32, or leave it out: first_stage_model.w"
    ]


def test_it_may_be_baked_in_at_the_top() -> None:
    models = [checkpoint(id, SHAPES) for id in "ab"] + [checkpoint("v", SHAPES, Dtype.F8_E5M2)]
    found = planned(models, tree=TreeOptions(bake="top", vae="v"), selections={"models": ["a", "b"]}, **WEBUI)
    assert problems(found) == []
    assert found.outputs[0].layout.tensors["first_stage_model.w"].dtype is Dtype.F8_E5M2


# --- keys -----------------------------------------------------------------------------------------------------------

IDS = "embeddings.position_ids"
SD1_IDS = f"cond_stage_model.transformer.text_model.{IDS}"
ROLES = [
    # key, whether the web UI, ComfyUI and supermerger merge it, whether supermerger adds B's
    ("model.diffusion_model.out.weight", True, True, True, True),
    ("first_stage_model.decoder.conv.bias", True, False, True, True),
    (f"conditioner.embedders.0.transformer.text_model.{IDS}", True, False, False, True),
    ("conditioner.embedders.1.model.logit_scale", True, False, False, True),
    ("conditioner.embedders.1.model.text_projection", True, True, False, True),
    (SD1_IDS, False, False, False, False),
    ("denoiser.sigmas", False, False, False, False),
    ("some.weight", False, False, False, False),
]


@pytest.mark.parametrize(("key", "webui", "comfyui", "supermerger", "added"), ROLES, ids=[told[0] for told in ROLES])
def test_which_keys_a_tool_merges(key: str, webui: bool, comfyui: bool, supermerger: bool, added: bool) -> None:
    for arithmetic, expected in (("webui", webui), ("float64", webui), ("supermerger", supermerger)):
        assert role(key, Rules(arithmetic), strict=False).merged == expected, arithmetic  # type: ignore[arg-type]
    if key != SD1_IDS:
        assert role(key, Rules("comfyui"), strict=False).merged == comfyui
    assert role(key, Rules(), strict=True).merged
    assert role(key, Rules("supermerger"), strict=False).either == added
    assert not role(key, Rules(), strict=False).either
    assert role(key, Rules(), strict=True).either
    assert role(key, Rules(), strict=False).vae == key.startswith("first_stage_model.")


def test_keys_of_sdxl_stay_as_they_are_and_old_ones_are_renamed() -> None:
    info = TensorInfo(Dtype.F16, (1024,), 0, 2048)

    def renamed(*keys: str, shape: tuple[int, ...] = (1024,)) -> list[str]:
        return list(as_the_web_ui_names(dict.fromkeys(keys, info._replace(shape=shape))))

    final = "conditioner.embedders.0.model.ln_final.weight"
    assert renamed("model.x", "conditioner.embedders.0.transformer.y") == [
        "model.x",
        "conditioner.embedders.0.transformer.y",
    ]
    assert renamed(final, "model.x") == ["cond_stage_model.model.ln_final.weight", "model.x"]
    assert renamed(final, "model.x", shape=(1280,)) == [final, "model.x"]
    clip = "cond_stage_model.transformer."
    parts = ("embeddings.w", "encoder.w", "final_layer_norm.w")
    others = [f"{clip}other.w", f"{clip}text_model.encoder.v", f"model.{clip}encoder.w"]
    new = [f"{clip}text_model.{part}" for part in parts]
    assert renamed(*(clip + part for part in parts), *others) == [*new, *others]


# --- where models lack tensors --------------------------------------------------------------------------------------

STRICT: dict[str, Any] = {"method": "pairwise", "dtype": "keep"}
V_PRED: dict[str, tuple[int, ...]] = {"v_pred": (0,)}


def without(*keys: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in USUAL.items() if key not in keys}


def needed(plan: Plan, key: str) -> list[str]:
    """The models that are read for a tensor, in the order of the steps."""
    (cell,) = (cell for strip in plan.strips if strip.key == key for cell in strip.cells)
    (strip,) = (strip for strip in plan.strips if strip.key == key)
    return [plan.checkpoints[strip.sources[row]].id for row in cell.rows]


def test_a_missing_tensor_is_an_error_that_offers_smaller_trees() -> None:
    plan = planned([checkpoint("a"), checkpoint("b", without("text.w")), checkpoint("c")], **STRICT)
    assert problems(plan) == [
        "[made] text: 1 tensor(s) not in b: text.w; leave it out of the list, or choose keys.missing=skip (trees of "
        "those that have it) or keys.missing=base"
    ]


@pytest.mark.parametrize("lacking", ["a", "b", "c"])
def test_with_skip_what_it_would_be_merged_with_stands_alone(lacking: str) -> None:
    models = [checkpoint(id, without("text.w") if id == lacking else USUAL) for id in "abc"]
    plan = planned(models, policies=Policies(missing="skip"), **STRICT)
    assert problems(plan) == []
    assert plan.notes == (
        f"[made] text: 1 tensor(s) not in {lacking}: text.w; what it would be merged with stands alone",
    )
    assert sorted(needed(plan, "text.w")) == sorted({*"abc"} - {lacking})
    assert sorted(needed(plan, "text.b")) == [*"abc"]


@pytest.mark.parametrize("lacking", ["a", "b", "c"])
def test_with_base_that_stands_in(lacking: str) -> None:
    models = [checkpoint(id, without("text.w") if id == lacking else USUAL) for id in "abcz"]
    wanted = replace(SINGLE, base="z")
    listed = {"models": ["a", "b", "c"]}
    plan = planned(models, wanted, policies=Policies(missing="base"), selections=listed, **STRICT)
    assert problems(plan) == []
    assert sorted(needed(plan, "text.w")) == sorted({*"abcz"} - {lacking})
    assert sorted(needed(plan, "text.b")) == [*"abc"]


def test_kinds_of_models_are_never_mixed_but_where_the_web_ui_would() -> None:
    models = [checkpoint("a", USUAL | V_PRED), checkpoint("b")]
    (told,) = problems(planned(models, **STRICT))
    assert "the marker 'v_pred' is in a and not in b" in told
    plan = planned(models, **STRICT | {"policies": Policies(keys="webui")})
    assert problems(plan) == []
    assert plan.notes == (
        "[made] image: the marker 'v_pred' is not in b, and web UIs merge models that predict v with models that "
        "predict epsilon without a word; the result is neither",
    )


def test_what_is_left_out_as_in_the_web_ui_is_told() -> None:
    plan = planned([checkpoint("a"), checkpoint("b", without("text.w") | {"text.model": (3,)})], **WEBUI)
    assert problems(plan) == []
    assert plan.outputs[0].layout.tensors.keys() == USUAL.keys()
    assert any("not in b: text.w; where that is A, the merge is without them" in note for note in plan.notes)


def test_what_only_b_has_is_told_to_be_dropped() -> None:
    plan = planned([checkpoint("a", without("text.w")), checkpoint("b")], **WEBUI | {"architecture": TOY})
    assert "text.w" not in plan.outputs[0].layout.tensors
    assert any("1 tensor(s) of b are dropped, because the first model, a, does not" in note for note in plan.notes)


def test_a_leaf_that_a_vae_replaces_may_lack_it() -> None:
    shapes = {"first_stage_model.w": (4,), "model.w": (4,)}
    models = [checkpoint("a", shapes), checkpoint("b", {"model.w": (4,)}), checkpoint("v", {"w": (4,)})]
    options = TreeOptions(bake="top", vae="v")
    for policies in (Policies(), Policies(keys="webui")):
        plan = planned(models, tree=options, selections={"models": ["a", "b"]}, **WEBUI | {"policies": policies})
        assert problems(plan) == []
        assert needed(plan, "first_stage_model.w") == ["v"]
        assert needed(plan, "model.w") == ["a", "b"]
