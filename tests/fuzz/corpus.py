"""What cases begin as: a small checkpoint shaped as SDXL is, and metadata as web UIs and mergeflow write it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from mergeflow.demo.catalogue import Variant
from mergeflow.demo.generate import layout_of
from mergeflow.formats.safetensors import Safetensors
from mergeflow.merge import open_plan
from mergeflow.recipe.architecture import architecture
from mergeflow.recipe.request import TargetRequest
from mergeflow.report.manifest import manifest, write_manifest
from tests.models import merge, request
from tests.recipe.webui.simulator import WebUI

if TYPE_CHECKING:
    from mergeflow.recipe.architecture import Architecture

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
KEPT = 23
"""One of so many tensors of SDXL is in the small checkpoint: each kind is, and a case takes a millisecond."""


@dataclass(frozen=True)
class Corpus:
    """Files to begin with, and what was made of them."""

    sdxl: Architecture
    table: dict[str, Any]
    """The header of a small checkpoint."""
    full: dict[str, Any]
    """That of one with all 2,515 tensors."""
    models: Path
    """A directory with three such small checkpoints, 01 to 03."""
    webui: dict[str, str]
    """Metadata of a merge of 01, 02 and 03 by a web UI."""
    ours: dict[str, str]
    """Metadata of a merge of them by mergeflow, as a tree, beside a composite."""

    made: Path
    """What mergeflow made of 01 and 02, with its manifest."""

    @property
    def body(self) -> bytes:
        """The tensors of the small checkpoint, all zero."""
        return bytes(_end(self.table))

    @property
    def full_body(self) -> bytes:
        """Those of the large one."""
        return bytes(_end(self.full))


@cache
def described(name: str) -> Architecture:
    """An architecture of `conf/`."""
    told = OmegaConf.to_container(OmegaConf.load(CONF / "arch" / f"{name}.yaml"))
    return architecture(**cast("dict[str, Any]", told))


def corpus(place: Path) -> Corpus:
    """The corpus, with its files in a new directory of `place`."""
    sdxl = described("sdxl")
    full = _header(layout_of(sdxl.scaled(32), Variant(1, metadata={"format": "pt"})).head)
    table = _kept(full)
    models = place / "models"
    models.mkdir(parents=True)
    for id in ("01", "02", "03"):
        told = {"__metadata__": {"format": "pt", "title": id}, **table}
        head = json.dumps(told).encode()
        (models / f"{id}.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(_end(table)))
    return Corpus(sdxl, table, full, models, _by_web_ui(), _by_mergeflow(models, place / "out"), _made(models, place))


def _header(head: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(head[8:]))


def _kept(full: dict[str, Any]) -> dict[str, Any]:
    """Some of the tensors, moved together."""
    made: dict[str, Any] = {}
    end = 0
    for key, one in [(key, one) for key, one in full.items() if key != "__metadata__"][::KEPT]:
        begin, end = end, end + min(one["data_offsets"][1] - one["data_offsets"][0], 64)
        width = {"F16": 2, "I64": 8}[one["dtype"]]
        made[key] = {"dtype": one["dtype"], "shape": [(end - begin) // width], "data_offsets": [begin, end]}
    return made


def _end(table: dict[str, Any]) -> int:
    return max(int(one["data_offsets"][1]) for key, one in table.items() if key != "__metadata__")


def _by_web_ui() -> dict[str, str]:
    ui = WebUI()
    one, two, three = (ui.add(f"sdxl/{id}.safetensors", hashed=True) for id in ("01", "02", "03"))
    pair = ui.merge(one, two, custom_name="x1-01_02", multiplier=0.3)
    return dict(ui.merge(pair, three, custom_name="x2-x1_03").file.metadata)


def _made(models: Path, place: Path) -> Path:
    listed = {"listed": "01,02"}
    target = [TargetRequest("merged", "merged.safetensors", selection="listed")]
    result = merge(request(models, place / "made", targets=target, selections=listed))
    write_manifest(manifest(result, "local"), str(place / "made"))
    return place / "made"


def _by_mergeflow(models: Path, out: Path) -> dict[str, str]:
    composites = {"0a": ("01", "02")}
    target = TargetRequest("made", "made.safetensors", selection="listed")
    asked = request(models, out, targets=[target], selections={"listed": "0a,03"}, composites=composites)
    plan = open_plan(asked)
    assert plan.problems == ()
    layout = plan.outputs[0].layout
    return dict(Safetensors().parse(lambda offset, count: layout.head[offset : offset + count], layout.size).metadata)
