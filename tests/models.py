"""Small checkpoints, and requests to merge them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import Result, open_plan, run
from mergeflow.recipe.architecture import Architecture, architecture
from mergeflow.recipe.request import Budget, ModelSource, PartRequest, Policies, Request, TargetRequest
from mergeflow.storage.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from mergeflow.interfaces import Executor, Store
    from mergeflow.plan.plan import Plan

    Model = Mapping[str, Tensor]

ANY = architecture("any", "keep", {}, {"all": {"tensors": {"*": None}}})
"""One component, which takes every tensor."""


def toy_architecture(words: int = 1201) -> Architecture:
    """`TOY`, or the same with an embedding of fewer words."""
    return architecture(
        "toy",
        "fp16",
        {"modelspec.architecture": "toy"},
        {
            "text": {
                "prefix": "text.",
                "tensors": {"position_ids": [1, 77], "scale": []},
                "layers": {"{0..2}.proj": [8, 6]},
                "integers": ["position_ids"],
                "optional": ["position_ids", "2.proj.*"],
            },
            "vae": {"prefix": "vae.", "layers": {"conv": [5, 3, 3, 3]}, "tensors": {"empty": [0, 4]}},
            "net": {
                "prefix": "net.",
                "tensors": {"embedding": [words, 257]},
                "layers": {"{0..5}.mix": [16, 16]},
                "markers": {"v_pred": [0]},
            },
        },
    )


TOY = toy_architecture()
"""Three components with all that an architecture knows: integers, optional keys, markers, 0-dim and zero-size tensors,
and one tensor that is much larger than the others."""

SMALLEST = Budget(workers=1, reads_in_flight=1, memory=1 << 28)
EVERYTHING = (TargetRequest("merged", "merged.safetensors", selection="all"),)


class Merged(NamedTuple):
    """What came of a merge with one target."""

    tensors: dict[str, Tensor]
    path: Path
    plan: Plan
    result: Result


def write_models(directory: Path, models: Mapping[str, Model], metadata: Mapping[str, str] | None = None) -> Path:
    """One file per model, `ID.safetensors`; the directory, for `request`."""
    directory.mkdir(parents=True, exist_ok=True)
    for id, tensors in models.items():
        save_file(dict(tensors), directory / f"{id}.safetensors", dict(metadata) if metadata else None)
    return directory


def request(
    models: Path | ModelSource,
    out: Path,
    *,
    arch: Architecture = ANY,
    selections: Mapping[str, str | Sequence[object]] | None = None,
    targets: Sequence[TargetRequest] = EVERYTHING,
    composites: Mapping[str, tuple[str, ...]] | None = None,
    policies: Policies | None = None,
    budget: Budget = SMALLEST,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Request:
    """A request: the uniform mean of all models, unless it is told otherwise."""
    source = models if isinstance(models, ModelSource) else ModelSource(str(models), composites=composites or {})
    return Request(
        models=source,
        architecture=arch,
        selections={"all": "all", **(selections or {})},
        targets=tuple(targets),
        method="uniform",
        dtype=dtype or arch.dtype,
        policies=policies or Policies(),
        budget=budget,
        out=str(out),
        overwrite=overwrite,
    )


def merge(wanted: Request, executor: Executor | None = None, store: Store | None = None) -> Result:
    """Plan and run, with the executor that needs nothing unless another is given."""
    store = store or LocalStore()
    return run(open_plan(wanted, store), executor or LocalExecutor(wanted.budget), store)


def merged(
    directory: Path,
    models: Mapping[str, Model],
    *,
    arch: Architecture = ANY,
    policies: Policies | None = None,
    dtype: str | None = None,
    listed: str | Sequence[object] = "all",
) -> Merged:
    """Write the models below `directory`, merge those `listed`, and load what came of it."""
    wanted = request(
        write_models(directory / "models", models),
        directory / "out",
        arch=arch,
        selections={"listed": listed},
        targets=[TargetRequest("merged", "merged.safetensors", selection="listed")],
        policies=policies,
        dtype=dtype,
    )
    result = merge(wanted)
    path = directory / "out" / "merged.safetensors"
    return Merged(load_file(path), path, result.plan, result)


def toy_model(seed: int, dtype: torch.dtype = torch.float16, drop: Sequence[str] = ()) -> dict[str, Tensor]:
    """A checkpoint of `TOY` without markers; keys that begin with one of `drop` are left out."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for key, spec in TOY.usual_keys.items():
        if not key.startswith(tuple(drop)):
            made[key] = (torch.randn(spec.shape or (), generator=generator) * 0.1).to(dtype)
            if spec.integer:
                made[key] = torch.arange(77).view(1, 77)
    return made


def toy_targets() -> list[TargetRequest]:
    """Two targets that share lists and models, as x17 and x11c do."""
    return [
        TargetRequest(
            "first",
            "first.safetensors",
            components={
                "text": PartRequest(selection="text"),
                "vae": PartRequest(model="4"),
                "net": PartRequest(selection="wide"),
            },
        ),
        TargetRequest(
            "second",
            "second.safetensors",
            dtype="keep",
            components={
                "text": PartRequest(selection="text"),
                "vae": PartRequest(selection="narrow"),
                "net": PartRequest(selection="narrow"),
            },
        ),
    ]


TOY_SELECTIONS: Mapping[str, str] = {"wide": "1,2,3,5,6a,9,10=7", "narrow": "--,10,--,8,9,3", "text": "2,10,3,7,6a=5"}
TOY_COMPOSITES: Mapping[str, tuple[str, ...]] = {"6a": ("6", "7", "8")}


def toy_models() -> dict[str, dict[str, Tensor]]:
    """Ten models in all the dtypes there are, some without what is optional, with what people put into files."""
    ids = torch.arange(77).view(1, 77)
    models = {
        "1": toy_model(1),
        "2": toy_model(2),
        "3": toy_model(3, torch.float32),
        "4": toy_model(4) | {"vae.conv.weight": toy_model(4, torch.float32)["vae.conv.weight"]},
        "5": toy_model(5, drop=("vae.",)),
        "6": toy_model(6, torch.bfloat16) | {"text.position_ids": ids.half()},
        "7": toy_model(7, drop=("text.2", "text.position_ids")) | {"surplus.one": torch.ones(3), "surplus.two": ids},
        "8": toy_model(8, torch.float64),
        "9": toy_model(9) | {"net.embedding": toy_model(9)["net.embedding"].to(torch.float8_e4m3fn)},
        "10": toy_model(10, drop=("text.position_ids",)),
    }
    models["10"]["net.0.mix.weight"] = models["10"]["net.0.mix.weight"].to(torch.float8_e5m2)
    return models


BOTH = ("first", "second")


def toy_request(models: Path, out: Path, budget: Budget = SMALLEST, names: Sequence[str] = BOTH) -> Request:
    """The two targets of the toy models, or one of them alone."""
    return request(
        models,
        out,
        arch=TOY,
        selections=TOY_SELECTIONS,
        targets=[target for target in toy_targets() if target.name in names],
        composites=TOY_COMPOSITES,
        budget=budget,
    )
