"""The two sides that are compared: one pass of the engine, and a folder full of intermediate files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_plan, run
from mergeflow.recipe.request import Budget, ModelSource, Policies, Request, TargetRequest
from tests.byhand.files import read
from tests.byhand.floats import same
from tests.byhand.tree import merge_tree
from tests.byhand.webui import merge_files
from tests.models import ANY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mergeflow.recipe.recorded import Merge
    from tests.byhand.floats import Tensor
    from tests.byhand.tree import Tree

WEBUI = Policies(keys="webui")
ONE = Budget(workers=1, reads_in_flight=1, memory=256 << 20)
MERGED = TargetRequest("merged", "merged.safetensors", selection="listed")
RECORDED = TargetRequest("merged", "merged.safetensors", recorded=True)
INTERPOLATION: Mapping[str, Any] = {
    "weighted_sum": "Weighted sum",
    "add_difference": "Add difference",
    "no_interpolation": "No interpolation",
}


def asked(directory: Path, out: Path, listed: object, **changes: Any) -> Request:
    """A request for the tree over `listed` ids as the web UI makes it; `changes` are its other fields."""
    wanted: dict[str, Any] = {
        "models": ModelSource(str(directory), composites=changes.pop("composites", {})),
        "architecture": ANY,
        "selections": {"listed": listed},
        "targets": (MERGED,),
        "method": "pairwise",
        "dtype": "keep",
        "policies": WEBUI,
        "budget": ONE,
        "out": str(out),
        "overwrite": True,
    }
    return Request(**wanted | changes)


def by_engine(directory: Path, out: Path, listed: object, **changes: Any) -> dict[str, Tensor]:
    """What one pass makes of the files of a directory."""
    wanted = asked(directory, out, listed, **changes)
    run(open_plan(wanted), LocalExecutor(wanted.budget))
    return read(out / MERGED.file).tensors


def by_hand(paths: list[Path], tree: Tree, out: Path, **options: Any) -> dict[str, Tensor]:
    """What pairwise merges make of the files."""
    out.mkdir(parents=True, exist_ok=True)
    return read(merge_tree(paths, tree, out, out / "by-hand.safetensors", **options)).tensors


def by_engine_as_recorded(directory: Path, out: Path, merges: Mapping[str, Merge], **changes: Any) -> dict[str, Tensor]:
    """What one pass makes of recorded merges."""
    return by_engine(directory, out, "all", targets=(RECORDED,), recorded=merges, **changes)


def by_hand_as_recorded(directory: Path, out: Path, merges: Mapping[str, Merge], **options: Any) -> dict[str, Tensor]:
    """What the same merges make one after the other, each of which comes after those that it takes."""
    out.mkdir(parents=True, exist_ok=True)
    made = {path.stem: path for path in directory.glob("*.safetensors")}
    for name, merge in merges.items():
        a, b, c = [*(made[one] for one in merge.inputs), *[made[merge.inputs[0]]] * 2][:3]
        made[name] = merge_files(
            a,
            b,
            out / f"by-hand-{name}.safetensors",
            c_path=c,
            multiplier=merge.multiplier,
            interp=INTERPOLATION[merge.formula],
            save_half=merge.save_half,
            bake_vae=None if merge.bake is None else made[merge.bake],
            **options,
        )
    return read(made[list(merges)[-1]]).tensors


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same keys, and for each the same dtype, shape and bytes; any NaN is as good as another."""
    assert sorted(found) == sorted(expected)
    assert [key for key, value in found.items() if not same(value, expected[key])] == []
