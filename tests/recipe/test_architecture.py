from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import ConfigError, MergeflowError, Problems
from mergeflow.formats.safetensors import Safetensors
from mergeflow.recipe.architecture import Architecture, KeySpec, architecture, expand, scaled
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

TE0 = "conditioner.embedders.0.transformer.text_model."
TE1 = "conditioner.embedders.1.model."
POSITION_IDS = f"{TE0}embeddings.position_ids"
MARKERS = {"v_pred": (0,), "ztsnr": (0,), "edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}


def built(
    components: Mapping[str, Mapping[str, Any]], dtype: str = "fp16", metadata: Mapping[str, str] | None = None
) -> Architecture:
    return architecture("toy", dtype, metadata or {}, components)


# --- SDXL ---------------------------------------------------------------------------------------------------------


def test_sdxl_is_every_key_with_its_shape_and_traits(sdxl: Architecture) -> None:
    # The digest was taken from a table of real checkpoints' keys, not from this description.
    lines = sorted(
        f"{component.name} {key} {list(spec.shape or ())} {spec.integer}"
        for component in sdxl.components.values()
        for key, spec in component.keys.items()
    )
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "02da23c794c83e43d3c79d2bfb2c788c03b04ea957f65268cba10b658eb40768"


def test_sdxl_has_four_components_with_2515_usual_keys(sdxl: Architecture) -> None:
    usual = [sdxl.component_of(key) for key in sdxl.usual_keys]
    assert {name: usual.count(name) for name in sdxl.components} == {"te0": 197, "te1": 390, "vae": 248, "unet": 1680}
    assert len(sdxl.usual_keys) == 2515


@pytest.mark.parametrize(
    ("position_ids", "size"), [(Dtype.F16, 6_938_040_682), (Dtype.I64, 6_938_041_144)], ids=["fp16 ids", "int64 ids"]
)
def test_sdxl_in_fp16_has_the_size_that_real_files_have(sdxl: Architecture, position_ids: Dtype, size: int) -> None:
    tensors = [
        (key, position_ids if spec.integer else Dtype.F16, spec.shape or ()) for key, spec in sdxl.usual_keys.items()
    ]
    assert Safetensors().layout(tensors, {}).size == size


def test_sdxl_has_markers_that_no_prefix_is_put_before(sdxl: Architecture) -> None:
    keys = sdxl.components["unet"].keys
    assert {key: spec.shape for key, spec in keys.items() if spec.marker} == MARKERS
    assert all(keys[key].optional and not keys[key].integer for key in MARKERS)
    assert not MARKERS.keys() & sdxl.usual_keys.keys()


def test_sdxl_may_lack_what_it_never_evaluates(sdxl: Architecture) -> None:
    optional = {key for key, spec in sdxl.usual_keys.items() if spec.optional}
    assert len(optional) == 19 + 1
    assert {POSITION_IDS, f"{TE0}final_layer_norm.bias", f"{TE1}logit_scale"} < optional
    assert f"{TE1}text_projection" not in optional  # the pooled vector is made with it
    assert f"{TE0}encoder.layers.11.mlp.fc1.weight" in optional
    assert f"{TE0}encoder.layers.1.mlp.fc1.weight" not in optional


def test_sdxl_has_one_tensor_of_integers(sdxl: Architecture) -> None:
    assert [key for key, spec in sdxl.usual_keys.items() if spec.integer] == [POSITION_IDS]


def test_sdxl_says_what_it_is_in_every_header(sdxl: Architecture) -> None:
    assert sdxl.metadata == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "1024x1024",
    }


# --- membership and size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        (POSITION_IDS, "te0"),
        (f"{TE1}logit_scale", "te1"),
        ("first_stage_model.quant_conv.bias", "vae"),
        ("model.diffusion_model.out.2.weight", "unet"),
        ("v_pred", "unet"),
        ("model.diffusion_model.out.3.weight", None),
        ("denoiser.sigmas", None),
    ],
)
def test_a_key_belongs_to_one_component_or_is_surplus(sdxl: Architecture, key: str, owner: str | None) -> None:
    assert sdxl.component_of(key) == owner


def test_any_architecture_has_one_open_component_that_takes_every_key(anything: Architecture) -> None:
    assert [(component.name, component.open) for component in anything.components.values()] == [("all", True)]
    assert anything.component_of("whatever.it.is") == "all"
    assert (anything.dtype, anything.usual_keys) == ("keep", {})


def test_a_layer_is_a_weight_and_a_bias_as_long_as_its_first_dimension() -> None:
    keys = built({"all": {"layers": {"conv.{0,1}": [8, 4, 3, 3]}}}).components["all"].keys
    assert {key: spec.shape for key, spec in keys.items()} == {
        "conv.0.weight": (8, 4, 3, 3),
        "conv.0.bias": (8,),
        "conv.1.weight": (8, 4, 3, 3),
        "conv.1.bias": (8,),
    }


def test_a_tensor_without_a_shape_may_have_any() -> None:
    assert built({"all": {"tensors": {"weight": None}}}).usual_keys == {"weight": KeySpec(None)}


def test_a_prefix_stands_before_every_name_but_the_markers() -> None:
    described = {
        "prefix": "net.",
        "tensors": {"w": [2], "ids": [3]},
        "layers": {"fc": [2, 2]},
        "markers": {"flag": [0]},
    }
    described |= {"integers": ["ids"], "optional": ["fc.*"]}
    assert built({"net": described}).components["net"].keys == {
        "net.w": KeySpec((2,)),
        "net.ids": KeySpec((3,), integer=True),
        "net.fc.weight": KeySpec((2, 2), optional=True),
        "net.fc.bias": KeySpec((2,), optional=True),
        "flag": KeySpec((0,), optional=True, marker=True),
    }


def test_a_star_is_any_text_and_a_dot_only_a_dot() -> None:
    described = {"tensors": {"{a.1,a.11,b.1,ax1}.w": [1]}, "optional": ["a.1*"]}
    keys = built({"all": described}).usual_keys
    assert [key for key, spec in keys.items() if spec.optional] == ["a.1.w", "a.11.w"]


def test_scaling_divides_widths_and_leaves_counts_alone(sdxl: Architecture) -> None:
    small = sdxl.scaled(32)
    assert small.usual_keys.keys() == sdxl.usual_keys.keys()
    shapes = {key: spec.shape for key, spec in small.usual_keys.items()}
    assert shapes[f"{TE1}token_embedding.weight"] == (1544, 40)
    assert shapes[f"{TE1}positional_embedding"] == (77, 40)
    assert shapes[POSITION_IDS] == (1, 77)
    assert shapes[f"{TE1}logit_scale"] == ()
    assert shapes["model.diffusion_model.input_blocks.0.0.weight"] == (10, 4, 3, 3)
    assert small.components["unet"].keys["v_pred"] == sdxl.components["unet"].keys["v_pred"]


def test_scaling_by_one_changes_nothing(sdxl: Architecture) -> None:
    assert sdxl.scaled(1) == sdxl


def test_a_shape_that_may_be_any_stays_so() -> None:
    assert scaled(None, 32) is None


@pytest.mark.parametrize("divisor", [0, -2, 3, 64])
def test_scaling_refuses_what_would_not_leave_whole_widths(sdxl: Architecture, divisor: int) -> None:
    with pytest.raises(ConfigError, match=f"not by {divisor}$"):
        sdxl.scaled(divisor)


# --- mistakes in a description ------------------------------------------------------------------------------------

TWICE = {"te": {"tensors": {"a": [1], "b": [1]}}, "net": {"tensors": {"b": [1], "c": [1]}}}


@pytest.mark.parametrize(
    ("components", "message"),
    [
        pytest.param({}, "arch 'toy' has no component; describe at least one", id="no component"),
        pytest.param(
            {"all": {}},
            "arch 'toy', component 'all': it has neither tensors nor layers; name some, or give it '*'",
            id="empty component",
        ),
        pytest.param(TWICE, "arch 'toy': 'te' and 'net' both have b; give each key to one of them", id="shared key"),
        pytest.param(
            {"all": {"tensors": {"{a,b}": [1], "b": [2]}}},
            "arch 'toy', component 'all': 'b' describes b once more; describe every tensor once",
            id="key described twice",
        ),
        pytest.param(
            {"all": {"tensors": {"{a,a}": [1]}}},
            "arch 'toy', component 'all': '{a,a}' describes a once more; describe every tensor once",
            id="pattern with the same key twice",
        ),
        pytest.param(
            {"all": {"tensors": {"{a,b": [1]}}},
            "arch 'toy', component 'all': the pattern '{a,b' opens a brace that it never closes",
            id="malformed pattern",
        ),
        pytest.param(
            {"all": {"tensors": {"a": [4, -1]}}},
            "arch 'toy', component 'all': 'a' has the impossible shape [4, -1]",
            id="negative dimension",
        ),
        pytest.param(
            {"net": {"prefix": "net.", "tensors": {"a": [1]}, "optional": ["b.*"]}},
            "arch 'toy', component 'net': 'net.b.*' in optional matches none of its 1 tensors; check the name",
            id="optional that matches nothing",
        ),
        pytest.param(
            {"net": {"tensors": {"a.ids": [1]}, "integers": ["{a,b}.ids"]}},
            "arch 'toy', component 'net': 'b.ids' in integers matches none of its 1 tensors; check the name",
            id="integers of which one matches nothing",
        ),
        pytest.param(
            {"all": {"tensors": {"*": None}}, "net": {"tensors": {"a": [1]}}},
            "arch 'toy': component 'all' takes every key ('*'), which leaves none for the other 1; "
            "make it the only one, or name its keys",
            id="open component beside another",
        ),
        pytest.param(
            {"all": {"tensors": {"*": None, "a": [1]}}},
            "arch 'toy', component 'all': '*' takes every key, so nothing but markers may stand beside it",
            id="open component with names",
        ),
        pytest.param(
            {"all": {"tensors": {"a.*": [1]}}},
            "arch 'toy', component 'all': 'a.*' says '*', which only an open component may, as its whole name",
            id="star inside a name",
        ),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(
    components: Mapping[str, Mapping[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        built(components)
    assert str(caught.value) == message


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"^arch 'toy' has the unknown dtype 'half'; use one of keep, fp16, bf16, fp32$"
    ):
        built({"all": {"tensors": {"*": None}}}, dtype="half")


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        built(
            {"te": {"tensors": {"a": [1], "{b": [1]}, "optional": ["c"]}, "net": {"tensors": {"a": [1]}}}, dtype="half"
        )
    assert len(caught.value.errors) == 4
    assert all(type(error) is ConfigError for error in caught.value.errors)
    assert caught.value.exit_code == 2


# --- patterns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("plain.name", ["plain.name"]),
        ("", [""]),
        ("{a,b}", ["a", "b"]),
        ("x.{0..2}.y", ["x.0.y", "x.1.y", "x.2.y"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{0,1}{a,b}", ["0a", "0b", "1a", "1b"]),
        ("{in.{1,2},mid,out.{0..1}}.w", ["in.1.w", "in.2.w", "mid.w", "out.0.w", "out.1.w"]),
        ("{{a,b},c}", ["a", "b", "c"]),
    ],
)
def test_a_pattern_stands_for_its_keys_in_order(pattern: str, keys: list[str]) -> None:
    assert expand(pattern) == keys


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("a{b,c", "opens a brace that it never closes"),
        ("{a,{b,c}", "opens a brace that it never closes"),
        ("a}b", "closes a brace that it never opened"),
        ("{a,b}}", "closes a brace that it never opened"),
        ("{}", "neither {a,b} nor {0..9}"),
        ("{a}", "neither {a,b} nor {0..9}"),
        ("{a,}", "neither {a,b} nor {0..9}"),
        ("{a,,b}", "neither {a,b} nor {0..9}"),
        ("{0..}", "neither {a,b} nor {0..9}"),
        ("{00..11}", "neither {a,b} nor {0..9}"),
        ("{a..c}", "neither {a,b} nor {0..9}"),
        ("{0..3,7}", "neither {a,b} nor {0..9}"),
        ("{11..0}", "does not rise"),
        ("{4..4}", "does not rise"),
    ],
)
def test_a_malformed_pattern_is_refused_and_shown(pattern: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(pattern)
    assert f"'{pattern}'" in str(caught.value)
    assert complaint in str(caught.value)


WORD = st.text("abxyz_", min_size=1, max_size=4)
CHOICE = st.lists(WORD, min_size=2, max_size=4, unique=True)
RANGE = st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda pair: range(pair[0], pair[0] + pair[1] + 1))


@given(st.lists(st.one_of(WORD, CHOICE, RANGE), min_size=1, max_size=5))
def test_a_pattern_stands_for_as_many_keys_as_its_choices_multiply_to(segments: list[str | list[str] | range]) -> None:
    count, written = 1, []
    for segment in segments:
        if isinstance(segment, str):
            written.append(segment)
        elif isinstance(segment, range):
            written.append(f"{{{segment[0]}..{segment[-1]}}}")
            count *= len(segment)
        else:
            written.append(f"{{{','.join(segment)}}}")
            count *= len(segment)
    keys = expand(".".join(written))
    assert len(keys) == len(set(keys)) == count


@given(st.text("ab01{},.", max_size=12))
def test_no_text_breaks_the_expansion(pattern: str) -> None:
    try:
        keys = expand(pattern)
    except MergeflowError:
        return
    assert keys
    assert not any("{" in key or "}" in key for key in keys)
