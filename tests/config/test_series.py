"""Series and assemblies, from what is typed to plain values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mergeflow.config.assembly import to_assembly
from mergeflow.config.convert import to_config, to_request
from mergeflow.config.words import quote_texts
from mergeflow.errors import MergeflowError
from mergeflow.recipe.request import SeriesRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.config.conftest import Compose


def refused(what: Callable[[], object]) -> list[str]:
    with pytest.raises(MergeflowError) as caught:
        what()
    assert caught.value.exit_code == 2
    return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


@pytest.mark.parametrize(
    ("typed", "series"),
    [
        ([], None),
        (["series=swap", "series.components=te0"], SeriesRequest("swap", ("te0",))),
        (["series=add_one", "series.components=[te0,te1]"], SeriesRequest("add_one", ("te0", "te1"))),
        (
            [
                "series=swap",
                "series.components=unet",
                "series.base=05",
                "series.selection=te0",
                "series.write=component",
            ],
            SeriesRequest("swap", ("unet",), selection="te0", base="05", write="component"),
        ),
        (
            ["series=leave_one_out", "series.components=te1", "series.target=x17", "series.with_base=false"],
            SeriesRequest("leave_one_out", ("te1",), target="x17", with_base=False),
        ),
    ],
)
def test_a_series_is_read_as_it_is_typed(typed: list[str], series: SeriesRequest | None, compose: Compose) -> None:
    assert to_request(to_config(compose(*quote_texts(typed)))).series == series


def test_options_of_a_series_have_no_effect_without_one(compose: Compose) -> None:
    told = refused(lambda: to_request(to_config(compose("series.components=te0", "series.write=component"))))
    assert [message.partition(" ")[0] for message in told] == ["series.components", "series.write"]


def test_components_are_names(compose: Compose) -> None:
    (told,) = refused(lambda: to_request(to_config(compose("series=swap", "series.components=[1]"))))
    assert told == "series.components is [1]; give a list of names, as in [te0] or [te0,te1]"


# assemblies


def test_files_are_named_by_their_components(compose: Compose) -> None:
    typed = ["job=assemble", "base=a, b.safetensors", "te0=c=d.safetensors", "parts.unet=/e (1).safetensors"]
    wanted = to_assembly(to_config(compose(*quote_texts([*typed, "file=f.safetensors", "out=g"]))))
    assert wanted.base == str(Path("a, b.safetensors").absolute())
    assert wanted.parts == {"te0": str(Path("c=d.safetensors").absolute()), "unet": "/e (1).safetensors"}
    assert (wanted.file, wanted.out, wanted.overwrite) == ("f.safetensors", str(Path("g").absolute()), False)
    assert wanted.architecture.name == "sdxl"


def test_components_are_those_of_the_architecture_and_no_options() -> None:
    assert quote_texts(["te0=a.safetensors"]) == ["te0=a.safetensors"]
    assert quote_texts(["job=assemble", "text=a", "out=b"]) == ["job=assemble", '++parts={text: "a"}', 'out="b"']


def test_an_assembly_needs_a_base_and_a_name(compose: Compose) -> None:
    told = refused(lambda: to_assembly(to_config(compose("job=assemble", "out=''", "executor.workers=0"))))
    assert [message.partition(";")[0] for message in told] == [
        "job=assemble needs a base: give base=FILE, and te0=FILE and so on",
        "file is not set",
        "out is empty",
        "executor.workers=0 must be at least 1",
    ]


def test_files_of_an_assembly_have_no_effect_on_a_merge(compose: Compose) -> None:
    (told,) = refused(lambda: to_request(to_config(compose("base=a"))))
    assert told == "base=, parts= and file= have no effect here; they are for assemble and verify"
