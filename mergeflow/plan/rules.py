"""The arithmetic of the tools that trees were made with: what each rounds, to what, and which keys it merges at all.

    webui        weighted sum    (1 - M) A + M B: each product rounded to its tensor's dtype, the sum to the wider one
                 add difference  A + M (B - C), operation by operation in the same way
                 save as half    what is fp32 becomes fp16, and nothing else does
    float32      the same formulas, every operation rounded to fp32 and nothing saved between
    float64      the same in fp64
    comfyui      fp32 throughout, after the weights were loaded in the dtype of the output; the ratio is that of A
    supermerger  lerp in fp32 by fused multiply-add, saved in A's dtype

AUTOMATIC1111's web UI 1.6 to 1.10, ComfyUI's CheckpointSave and supermerger's "Weight sum", as told in
docs/trees.md. Nothing here depends on the torch that is installed.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

from mergeflow.plan.steps import Graph
from mergeflow.recipe.tree import VAE
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeflow.plan.steps import Grown
    from mergeflow.recipe.tree import Node, Rules, Tree
    from mergeflow.tensors import TensorInfo

SKIPPED = "cond_stage_model.transformer.text_model.embeddings.position_ids"
"""The only key that the web UI names as not to be merged: that of Stable Diffusion 1."""
CLIP = "cond_stage_model.transformer."
TURBO = "conditioner.embedders.0.model.ln_final.weight"
NEVER_BAKED = ("model_ema.decay", "model_ema.num_updates")
"""What the web UI drops from the file of a VAE, beside all that begins with `loss`."""
PROMOTED = {Dtype.F64: 3, Dtype.F32: 2, Dtype.BF16: 1, Dtype.F16: 1}
"""Ranks of dtypes; two different ones of 16 bits meet in fp32."""
SIXTEEN_BITS = (Dtype.F16, Dtype.BF16)


class Role(NamedTuple):
    """What a key is to the rules."""

    merged: bool
    """Whether the formulas apply to it; otherwise every node has A's tensor."""
    vae: bool
    """Whether it belongs to the VAE that a node may bake in."""
    either: bool
    """Whether a node has what only B has: where models may lack tensors, and in supermerger."""
    model: bool
    """Whether `model` is in its name, which to supermerger is what can be saved in another dtype."""


def as_the_web_ui_names(header: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The tensors of a file under the keys that the web UI gives them when it loads it; SDXL's stay as they are."""
    turbo = header.get(TURBO)
    if turbo is not None and turbo.shape[:1] == (1024,):
        return {_replaced(key, "conditioner.embedders.0.", "cond_stage_model."): it for key, it in header.items()}
    if not any(key.startswith(CLIP) for key in header):
        return header
    renamed = {}
    for key, info in header.items():
        for part in ("embeddings.", "encoder.", "final_layer_norm."):
            key = _replaced(key, CLIP + part, f"{CLIP}text_model.{part}")
        renamed[key] = info
    return renamed


def _replaced(key: str, prefix: str, by: str) -> str:
    return by + key.removeprefix(prefix) if key.startswith(prefix) else key


def role(key: str, rules: Rules, *, strict: bool) -> Role:
    """What `key` is; if `strict`, the architecture says which keys are merged, otherwise the tool does."""
    model = "model" in key
    vae = key.startswith(VAE)
    if rules.arithmetic == "supermerger":
        return Role(model and ("weight" in key or "bias" in key), vae, strict or (model and key != SKIPPED), model)
    if rules.arithmetic == "comfyui":
        kept = vae or key.endswith((".position_ids", ".logit_scale"))
        return Role(not kept and (strict or model), vae, strict, model)
    return Role(strict or (model and key != SKIPPED), vae, strict, model)


def grow(
    tree: Tree,
    leaves: Sequence[tuple[int, Dtype] | None],
    vaes: Mapping[str, tuple[int, Dtype]],
    role: Role,
    rules: Rules,
    load: Dtype | None,
) -> Grown | None:
    """How one tensor of the result is made; None if the result does not have it.

    `leaves` are (source, dtype) for every leaf of `tree` that has it, `vaes` the same for every VAE that is baked
    in, by id. `load` is what ComfyUI would load weights as; None for as they are. Raises `Refused`.
    """
    tool = _Tool(rules, role, load)
    values = [None if leaf is None else tool.row(*leaf) for leaf in leaves]
    for node in tree.nodes:
        made = tool.node(node, [values[place] for place in node.inputs])
        if made is not None and role.vae and node.bake is not None and node.bake in vaes:
            made = tool.saved(tool.row(*vaes[node.bake]), node)
        values.append(made)
    top = values[tree.top]
    return None if top is None else tool.graph.grown(top)


class _Tool:
    """One tensor in the hands of one tool."""

    def __init__(self, rules: Rules, role: Role, load: Dtype | None) -> None:
        self.graph = Graph()
        self._arithmetic = rules.arithmetic
        self._scalars = rules.scalars
        self._role = role
        self._load = load if rules.arithmetic == "comfyui" else None
        self._saves = rules.arithmetic in ("webui", "supermerger")
        """Whether every node is a file, so that the next one has what was rounded to its dtype."""
        self._wide = {"float64": Dtype.F64, "webui": None}.get(rules.arithmetic, Dtype.F32)
        """What everything is computed in, where that does not depend on the tensors."""

    def row(self, source: int, dtype: Dtype) -> int:
        """A checkpoint's tensor, as the tool loads it."""
        value = self.graph.row(source, dtype)
        if dtype is Dtype.C64 or (dtype.is_fp8 and self._arithmetic in ("webui", "supermerger")):
            self.graph.refuse(value)
        if self._load is None or not dtype.is_float:
            return value
        if dtype is Dtype.F64:
            value = self.graph.rounded(value, Dtype.F32)  # as torch does, whatever it loads fp64 as
        return self.graph.rounded(value, self._load)

    def node(self, node: Node, inputs: Sequence[int | None]) -> int | None:
        """What `node` makes of A, B and C, each of which may be lacking."""
        a, b, c = (*inputs, None, None)[:3]
        if a is not None and node.formula == "no_interpolation":
            return self.saved(a, node)
        if a is None or b is None or not self._role.merged:
            alone = b if a is None and self._role.either else a
            return alone if alone is None or self._arithmetic != "supermerger" else self.saved(alone, node)
        if node.formula == "add_difference":
            return self._difference(a, b, c, node)
        return self._lerp(a, b, node) if self._arithmetic == "supermerger" else self._sum(a, b, node)

    def saved(self, value: int, node: Node) -> int:
        """`value` as it is after saving it, if `node` saves as half."""
        dtype, kept = self.graph.values[value].dtype, self.graph.values[value].kept
        half = self._half(kept, node)
        if half is kept:
            return value
        if self._saves and dtype is Dtype.F64:
            value = self.graph.rounded(value, Dtype.F32)  # torch goes from fp64 to fp16 by way of fp32
        return self.graph.do("round", (value,), half if self._saves else dtype, half)

    def _half(self, kept: Dtype, node: Node) -> Dtype:
        """What a tensor of dtype `kept` is saved as."""
        if self._arithmetic == "comfyui":
            return kept  # it saves what it loaded
        if self._arithmetic == "supermerger":
            converted = self._role.model and kept in (Dtype.F32, Dtype.F64, Dtype.BF16)
        else:
            converted = kept is Dtype.F32
        return Dtype.F16 if node.save_half and converted else kept

    def _sum(self, a: int, b: int, node: Node) -> int:
        """Weighted sum, associated as the tools do: (1 - M) A + (M B)."""
        ratio = 1.0 - node.multiplier
        x = self._scaled(a, ratio)
        y = self._scaled(b, 1.0 - ratio if self._arithmetic == "comfyui" else node.multiplier)
        return self._added(a, x, y, node)

    def _difference(self, a: int, b: int, c: int | None, node: Node) -> int:
        """Add difference: A + (M (B - C)); where C lacks the key, B - C is zero."""
        # B - B is a zero of the right dtype; what is not finite there is refused or tolerated as a whole anyway.
        b, c = self._together(b, b if c is None else c)
        dtype = self._wide or self._promoted(b, c)
        scaled = self._scaled(self.graph.do("subtract", (b, c), dtype), node.multiplier)
        first, second = self._together(a, scaled)
        return self._added(a, first, second, node)

    def _lerp(self, a: int, b: int, node: Node) -> int:
        kept = self.graph.values[a].dtype
        if not kept.is_float or node.multiplier in (0, 1):
            return self.saved(b if node.multiplier == 1 else a, node)
        held: Dtype = Dtype.F32 if kept is Dtype.F64 else kept
        inputs = (self._narrowed(a), self._narrowed(b))
        held = self._half(held, node) if held is Dtype.F32 else held
        made = self.graph.do("lerp", inputs, held, factor=_f32(node.multiplier))
        return made if held is Dtype.F16 else self.saved(self.graph.rounded(made, kept), node)

    def _added(self, a: int, x: int, y: int, node: Node) -> int:
        """The sum of x and y, saved as the tool saves a merge whose A is `a`."""
        if self._wide is None:
            return self.graph.do("add", (x, y), self._half(self._promoted(x, y), node))
        kept = self.graph.values[a].kept
        return self.graph.do("add", (x, y), self._wide, self._half(kept if kept.is_float else Dtype.F32, node))

    def _scaled(self, value: int, scalar: float) -> int:
        """`value` times a Python number: rounded to its own dtype, where integers become fp32."""
        value = self._narrowed(value)
        own = self.graph.values[value].dtype
        dtype = self._wide or (own if own.is_float else Dtype.F32)
        return self.graph.do("scale", (value,), dtype, factor=self._scalar(scalar, dtype))

    def _scalar(self, value: float, dtype: Dtype) -> float:
        if dtype is Dtype.F64:
            return value
        if self._scalars == "half" and dtype in SIXTEEN_BITS:
            return _f16(_f32(value)) if dtype is Dtype.F16 else _bf16(_f32(value))
        return _f32(value)

    def _narrowed(self, value: int) -> int:
        """What is fp64, where everything is computed in fp32."""
        wider = self._wide is Dtype.F32 and self.graph.values[value].dtype is Dtype.F64
        return self.graph.rounded(value, Dtype.F32, self.graph.values[value].kept) if wider else value

    def _together(self, x: int, y: int) -> tuple[int, int]:
        """Two operands; torch turns an integer into the float dtype that it meets, whatever its width."""
        x, y = self._narrowed(x), self._narrowed(y)
        one, other = self.graph.values[x].dtype, self.graph.values[y].dtype
        if self._wide is None and one.is_float != other.is_float:
            dtype = one if one.is_float else other
            return self.graph.rounded(x, dtype), self.graph.rounded(y, dtype)
        return x, y

    def _promoted(self, x: int, y: int) -> Dtype:
        """The dtype of the sum of two tensors in torch; integers among themselves are multiplied next, in fp32."""
        one, other = sorted(
            (self.graph.values[value].dtype for value in (x, y)), key=lambda dtype: PROMOTED.get(dtype, 0)
        )
        if not other.is_float or (one is not other and PROMOTED.get(one) == PROMOTED[other]):
            return Dtype.F32
        return other


def _f32(value: float) -> float:
    """`value` rounded to fp32."""
    return _packed("<f", value)


def _f16(value: float) -> float:
    return _packed("<e", value)


def _bf16(value: float) -> float:
    """An fp32 value rounded to bf16: half to even, by its bits."""
    if not math.isfinite(value):
        return value
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(rounded)


def _packed(layout: str, value: float) -> float:
    try:
        (rounded,) = struct.unpack(layout, struct.pack(layout, value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return float(rounded)
