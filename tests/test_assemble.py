"""Assemblies: the tensors of one file, with some components of others in their place, bit by bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergeflow.errors import MergeflowError
from mergeflow.execute.local import LocalExecutor
from mergeflow.merge import open_assembly, run
from mergeflow.recipe.assembly import Assembly
from mergeflow.recipe.request import Budget, PartRequest, SeriesRequest, TargetRequest
from mergeflow.storage.local import LocalStore
from tests.fakes import CountingStore, merged, overlaps
from tests.models import SMALLEST, TOY, merge, request, toy_model, toy_models, write_models

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from mergeflow.interfaces import Store
    from mergeflow.merge import Result


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A base with surplus keys of its own, a text encoder alone, and a whole model in fp32."""
    extra = {"stray": torch.arange(3), "odd.flags": torch.tensor([True, False])}
    text = {key: tensor for key, tensor in toy_model(2).items() if key.startswith("text.")}
    models = {
        "base": toy_model(1) | extra,
        "text": text,
        "whole": toy_model(3, torch.float32) | {"other": extra["stray"]},
    }
    directory = write_models(tmp_path / "in", models, {"modelspec.title": "what it was"})
    return {name: str(directory / f"{name}.safetensors") for name in models}


def asked(tmp_path: Path, base: str, parts: Mapping[str, str], budget: Budget = SMALLEST) -> Assembly:
    return Assembly(base, parts, TOY, "made.safetensors", str(tmp_path / "out"), budget)


def assembled(wanted: Assembly, store: Store | None = None) -> Result:
    store = store or LocalStore()
    return run(open_assembly(wanted, store), LocalExecutor(wanted.budget), store)


def made(tmp_path: Path) -> dict[str, Tensor]:
    return load_file(tmp_path / "out" / "made.safetensors")


def problems(wanted: Assembly) -> list[str]:
    plan = open_assembly(wanted)
    with pytest.raises(MergeflowError):
        run(plan, LocalExecutor(wanted.budget))
    return [str(error) for error in plan.problems]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both have the same tensors to the bit."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and one[key].numpy().tobytes() == other[key].numpy().tobytes()
        for key in one
    )


def test_the_result_has_the_named_components_of_the_others_and_all_else_of_the_base(
    tmp_path: Path, files: dict[str, str]
) -> None:
    assembled(asked(tmp_path, files["base"], {"text": files["text"], "net": files["whole"]}))
    base, text, whole = (load_file(files[name]) for name in ("base", "text", "whole"))
    expected = {key: tensor for key, tensor in base.items() if not key.startswith(("text.", "net."))} | text
    expected |= {key: tensor for key, tensor in whole.items() if key.startswith("net.")}
    assert same(made(tmp_path), expected)
    assert made(tmp_path)["net.embedding"].dtype == torch.float32


def test_one_file_may_give_several_components(tmp_path: Path, files: dict[str, str]) -> None:
    result = assembled(asked(tmp_path, files["base"], {"text": files["whole"], "vae": files["whole"]}))
    assert len(result.plan.checkpoints) == 2
    assert made(tmp_path)["vae.conv.weight"].equal(load_file(files["whole"])["vae.conv.weight"])


def test_every_bit_is_copied_whatever_it_means(tmp_path: Path, files: dict[str, str]) -> None:
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16)
    base = {
        "text.scale": bits.view(torch.float16),
        "text.0.proj.weight": bits.view(torch.bfloat16),
        "stray.fp8": bits.view(torch.int8).view(torch.float8_e4m3fn),
        "stray.other": bits.view(torch.int8).view(torch.float8_e5m2),
        "stray.single": bits.view(torch.float32),
        "stray.double": bits.view(torch.float64),
        "stray.complex": bits.view(torch.float32).view(torch.complex64),
        "stray.whole": bits.view(torch.int64),
        "stray.scalar": torch.tensor(float("nan")),
        "stray.empty": torch.zeros(0, 3),
        "net.v_pred": torch.zeros(0),
    }
    path = tmp_path / "odd.safetensors"
    save_file({key: tensor.clone() for key, tensor in base.items()}, path)
    assembled(asked(tmp_path, str(path), {"vae": files["whole"]}))
    content = made(tmp_path)
    assert content.keys() == {*base, "vae.conv.weight", "vae.conv.bias", "vae.empty"}
    for key, tensor in base.items():
        assert content[key].dtype == tensor.dtype
        assert content[key].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_markers_go_with_their_component(tmp_path: Path, files: dict[str, str]) -> None:
    path = tmp_path / "v.safetensors"
    save_file(toy_model(5) | {"v_pred": torch.zeros(0)}, path)
    assembled(asked(tmp_path, files["base"], {"net": str(path)}))
    assert "v_pred" in made(tmp_path)
    assembled(replace(asked(tmp_path, str(path), {"net": files["whole"]}), overwrite=True))
    assert "v_pred" not in made(tmp_path)


def test_the_library_would_write_the_same_file(tmp_path: Path, files: dict[str, str]) -> None:
    result = assembled(asked(tmp_path, files["base"], {"text": files["text"]}))
    path = tmp_path / "out" / "made.safetensors"
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    assert told.keys() == {"format", "mergeflow"}
    assert told["mergeflow"].startswith(" {")
    recipe = json.loads(told["mergeflow"])
    assert (recipe["base"], recipe["assembled"]) == ("base.safetensors", {"text": "text.safetensors"})
    assert str(tmp_path) not in told["mergeflow"]
    save_file(made(tmp_path), tmp_path / "library.safetensors", told)
    # The library writes metadata in an order of its own.
    assert path.read_bytes()[-1000:] == (tmp_path / "library.safetensors").read_bytes()[-1000:]
    assert path.stat().st_size == result.plan.outputs[0].layout.size


def test_each_byte_that_is_needed_is_read_once_and_no_other(tmp_path: Path, files: dict[str, str]) -> None:
    store = CountingStore(LocalStore())
    wanted = asked(tmp_path, files["base"], {"text": files["text"], "net": files["whole"]}, Budget(2, 2, 1 << 28))
    plan = open_assembly(wanted, store)
    store.forget()
    run(plan, LocalExecutor(wanted.budget), store)
    for checkpoint in plan.checkpoints:
        reads = store.reads(checkpoint.path)
        assert overlaps(reads) == []
        needed = [
            (info.begin, info.end)
            for key, info in checkpoint.header.tensors.items()
            if wanted.parts.get(TOY.component_of(key) or "", wanted.base) == checkpoint.path
        ]
        assert merged(reads) == merged(needed)


@pytest.mark.parametrize("write_base", [True, False])
def test_a_component_put_into_the_base_is_the_whole_output_of_the_series(tmp_path: Path, write_base: bool) -> None:
    models = write_models(tmp_path / "models", toy_models())
    components = {"text": PartRequest(selection="text"), "vae": PartRequest(model="4"), "net": PartRequest("net")}
    plain = request(
        models,
        tmp_path / "parts",
        arch=TOY,
        selections={"text": "2,10,3", "net": "1,2,5"},
        targets=[TargetRequest("base", "base.safetensors", components=components)],
    )
    series = SeriesRequest("swap", ("text", "net"), selection="net", write="component", with_base=True)
    merge(replace(plain, series=series))
    merge(replace(plain, series=replace(series, write="file"), out=str(tmp_path / "whole")))
    base = tmp_path / ("parts" if write_base else "whole") / "base.safetensors"
    for id in ("1", "2", "5"):
        name = f"base-swap-text-net-{id}.safetensors"
        part = str(tmp_path / "parts" / name)
        assembled(replace(asked(tmp_path, str(base), {"text": part, "net": part}), overwrite=True))
        assert same(made(tmp_path), load_file(tmp_path / "whole" / name))


# what cannot be


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "made.safetensors").write_bytes(b"mine")
    (tmp_path / "text").write_text("no checkpoint")
    parts = {"net": files["text"], "txt": files["text"], "text": str(tmp_path / "text"), "vae": "/nowhere"}
    told = "\n".join(problems(asked(tmp_path, files["base"], parts)))
    for problem in (
        f"net={files['text']} has no tensor of net; name a file that has them",
        "names the component 'txt', which arch 'toy' does not have; did you mean 'text'? (it has text, vae, net)",
        f"{tmp_path / 'text'} cannot be used",
        "/nowhere does not exist",
        "made.safetensors exists; choose another out=, or overwrite=true",
    ):
        assert problem in told
    assert (tmp_path / "out" / "made.safetensors").read_bytes() == b"mine"


def test_a_base_that_is_missing_is_told(tmp_path: Path, files: dict[str, str]) -> None:
    assert problems(asked(tmp_path, "/nowhere", {"text": files["text"]})) == ["model nowhere: /nowhere does not exist"]


def test_a_file_that_is_cut_short_is_told(tmp_path: Path, files: dict[str, str]) -> None:
    text = load_file(files["text"])
    del text["text.0.proj.weight"]
    save_file(text, files["text"])
    (told,) = problems(asked(tmp_path, files["base"], {"text": files["text"]}))
    assert "lacks 1 tensor(s) of text that the base has: text.0.proj.weight" in told


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_input_is_never_the_output(tmp_path: Path, files: dict[str, str], overwrite: bool) -> None:
    wanted = Assembly(
        files["base"], {"text": files["text"]}, TOY, "text.safetensors", str(tmp_path / "in"), SMALLEST, overwrite
    )
    before = (tmp_path / "in" / "text.safetensors").read_bytes()
    (told,) = problems(wanted)
    assert "is model text.safetensors itself" in told
    assert (tmp_path / "in" / "text.safetensors").read_bytes() == before


def test_what_would_change_nothing_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    assert problems(asked(tmp_path, files["base"], {})) == [
        "job=assemble has nothing to put into the base; give text=FILE"
    ]
    (told,) = problems(asked(tmp_path, files["base"], {"text": files["base"]}))
    assert told == f"text={files['base']} is the base itself, so it would change nothing; leave it out"


def test_the_result_needs_a_name_that_is_one(tmp_path: Path, files: dict[str, str]) -> None:
    wanted = replace(asked(tmp_path, files["base"], {"text": files["text"]}), file="a/made.ckpt")
    assert problems(wanted) == ["file=a/made.ckpt; give a name ending in .safetensors, and out=DIR"]
