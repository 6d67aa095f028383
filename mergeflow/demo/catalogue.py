"""What the demo model set is made of: the ids of Round 1, and everything that real collections have wrong with them.

Names have spaces, brackets and letters beyond ASCII; files differ in dtype, lack parts or have some too many; one is
there twice, one lies far from all others, and several carry the first model's text encoders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Variant:
    """One checkpoint, told by how it differs from the base model: a fine-tune, and the habits of who saved it.

    Every `tune` is another fine-tune of the same base. Equal variants are equal files.
    """

    tune: int
    reach: int = 1
    """How far the fine-tune went, in sixteenths of the base's own spread; up to 48."""
    original: tuple[str, ...] = ()
    """Components that are the base's, bit for bit."""
    without: tuple[str, ...] = ()
    """Components that are not in the file."""
    dtype: Dtype = Dtype.F16
    dtypes: Mapping[str, Dtype] = field(default_factory=dict)
    """The dtype of single components, where it is not `dtype`."""
    integers: Dtype | None = Dtype.I64
    """What whole numbers such as `position_ids` are stored as; None leaves them out."""
    markers: tuple[str, ...] = ()
    surplus: tuple[tuple[str, Dtype, tuple[int, ...]], ...] = ()
    """Tensors that the architecture does not know."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DemoModel:
    """One entry of the demo model set."""

    id: str
    filename: str
    variant: Variant


SEED = 1

CLIP = ("te0", "te1")
PLAIN = {"format": "pt"}
SCHEDULE = (1000,)

NAMES = (
    "amber-dune", "velvet-harbor", "copper-finch", "quiet orchard", "paper-lantern",
    "silver-thicket", "north wind", "marble-otter", "saffron-tide", "hollow-reed",
    "salt+ember", "linen-comet", "basalt-garden", "feral-prism", "moss@noon",
    "plain-cedar", "cobalt-meadow", "winter-plum", "dusty-opal", "tidal-clover",
    "ivory-kettle", "crimson-fern", "pewter-swan", "lunar-thistle", "first-light",
    "wicker-moon [half]", "glass-heron", "slate-pollen", "brass-kite (2)", "umber-falls",
    "pale river", "granite-wren", "café-dusk", "cotton-ridge", "violet-engine",
    "maple-static", "woven-frost", "ginger-summit", "onyx-petal", "rustic-signal",
    "deep meadow", "tawny-anchor", "birch-halo", "satin-quarry",
)  # fmt: skip
"""What stands after the number in each file's name; 01 is the first."""
LATER_NAMES = (
    "opal-ferry", "quince-lamp", "harrow blue", "mica-garden", "nettle-song",
    "fallow-star", "thimble-sea", "russet-arch", "zinc-plover", "meadow-zero",
    "juniper-key", "salt-marsh (v2)", "orchid-static", "cinder-lake", "plume-theory",
    "barley-moth", "vellum-sky", "tundra-rose", "kelp-lantern", "aster-gate",
    "sorrel-drift", "inkwell-fox", "prairie-bell", "larch-echo", "wren-harvest",
    "mist-foundry",
)  # fmt: skip
"""Those that came with later rounds; 45 is the first."""

NODES = {"4": {"class_type": "CheckpointSave", "inputs": {"filename_prefix": "checkpoints/velvet-harbor"}}}
MERGE = {
    "type": "webui",
    "primary_model_hash": None,
    "secondary_model_hash": None,
    "tertiary_model_hash": None,
    "interp_method": "Weighted sum",
    "multiplier": 0.5,
    "save_as_half": True,
    "custom_name": "tidal-clover",
    "config_source": 0,
    "bake_in_vae": "None",
    "discard_weights": "",
    "is_inpainting": False,
    "is_instruct_pix2pix": False,
}
TAGS = {"10_summit": {"mountain": 48, "scenery": 45, "no humans": 31, "café": 2}}


def _usual(number: int) -> Variant:
    # Some tools write a line of metadata and some write none; collections hold both sorts.
    return Variant(number, metadata={} if number % 3 == 0 else PLAIN)


ODD = {
    2: Variant(2, metadata={"modelspec.title": "velvet-harbor", "prompt": json.dumps(NODES)}),
    3: Variant(3, original=CLIP),
    5: Variant(5, integers=Dtype.F16),
    6: Variant(6, without=("vae",)),
    9: Variant(
        9,
        surplus=(
            ("denoiser.sigmas", Dtype.F32, SCHEDULE),
            ("betas", Dtype.F32, SCHEDULE),
            ("alphas_cumprod", Dtype.F32, SCHEDULE),
            ("alphas_cumprod_prev", Dtype.F32, SCHEDULE),
            ("sqrt_alphas_cumprod", Dtype.F32, SCHEDULE),
            ("conditioner.embedders.0.logit_scale", Dtype.F16, ()),
            ("conditioner.embedders.0.transformer.text_projection.weight", Dtype.F16, (24, 24)),
        ),
    ),
    10: Variant(10, original=CLIP, metadata=PLAIN),
    12: Variant(12, original=CLIP),
    13: Variant(13, dtype=Dtype.F32, metadata=PLAIN),
    14: Variant(14, reach=48),
    16: Variant(16, original=CLIP, metadata=PLAIN),
    17: Variant(17, integers=Dtype.F16),
    18: Variant(18, original=CLIP),
    19: Variant(19, original=CLIP, metadata=PLAIN),
    20: Variant(20, metadata=PLAIN | {"sd_merge_recipe": json.dumps(MERGE), "sd_merge_models": "{}"}),
    22: Variant(22, integers=Dtype.F16, metadata=PLAIN),
    23: _usual(21),
    24: Variant(24, integers=None),
    25: Variant(25, original=("te0", "te1", "vae", "unet")),
    27: Variant(27, dtypes={"vae": Dtype.F32}),
    31: Variant(31, integers=Dtype.F16, metadata=PLAIN),
    35: Variant(35, markers=("v_pred", "ztsnr")),
    36: Variant(36, integers=None),
    38: Variant(38, metadata=PLAIN | {"ss_tag_frequency": json.dumps(TAGS, ensure_ascii=False)}),
}
"""The checkpoints that are not simply fp16 fine-tunes."""


def _model(number: int, name: str, variant: Variant | None = None) -> DemoModel:
    return DemoModel(f"{number:02}", f"_x{number:02}-{name}.safetensors", variant or ODD.get(number) or _usual(number))


DEMO_MODELS = tuple(_model(number, name) for number, name in enumerate(NAMES, start=1))
"""The 44 checkpoints."""
MOST_MODELS = len(NAMES) + len(LATER_NAMES)


def demo_models(count: int) -> tuple[DemoModel, ...]:
    """The first `count` checkpoints. Where there are more than 44, 35 is one that has left v-prediction behind.

    Later rounds merge its UNet with the others, which could not be done with that of Round 1.
    """
    if not len(DEMO_MODELS) <= count <= MOST_MODELS:
        raise ConfigError(f"models.count={count} is not from {len(DEMO_MODELS)} to {MOST_MODELS}")
    if count == len(DEMO_MODELS):
        return DEMO_MODELS
    later = [_model(number, name) for number, name in enumerate(LATER_NAMES, start=len(NAMES) + 1)]
    changed = {35: _model(35, f"{NAMES[34]} eps", _usual(35))}
    return tuple(changed.get(number, model) for number, model in enumerate([*DEMO_MODELS, *later][:count], start=1))
