from __future__ import annotations

import json
import struct
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from mergeflow.compare.ulp import BINS, BOUNDS
from mergeflow.errors import ConfigError, StorageError
from mergeflow.recipe.architecture import architecture
from mergeflow.report.comparison import share_of, table, verdict
from mergeflow.report.comparison_json import NAME, to_json, write_json
from mergeflow.report.comparison_picture import draw
from tests.compare.test_run import compared
from tests.models import ANY, TOY, toy_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from mergeflow.compare.result import Comparison
    from mergeflow.recipe.architecture import Architecture

    Model = Mapping[str, Tensor]

COLUMNS = 110
SEVERAL = architecture("several", "keep", {}, {f"part{n}": {"tensors": {f"p{n}.{{0..3}}.w": None}} for n in range(10)})


def changed(model: Model, **factors: float) -> dict[str, Tensor]:
    """The model with all tensors of some components multiplied."""
    return {key: value * factors.get(key.split(".")[0], 1) for key, value in model.items()}


@pytest.fixture
def found(tmp_path: Path) -> Comparison:
    """Something of everything."""
    one, other = toy_model(1), changed(toy_model(1), net=1.01)
    one["vae.conv.weight"], one["only.here"] = torch.ones(5, 3), torch.ones(1)
    other["text.0.proj.bias"], other["text.1.proj.bias"] = torch.zeros(8), torch.full((8,), torch.nan).half()
    return compared(tmp_path, one, other, TOY)


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_tells_what_differs_and_where(found: Comparison, tmp_path: Path) -> None:
    shown = table(found)
    lines = [line.split() for line in shown.splitlines()]
    assert ["a", f"{tmp_path}/a.safetensors"] in lines
    first = next(n for n, line in enumerate(lines) if line[:1] == ["component"])
    rows = {line[0]: line for line in lines[first + 1 : first + 6]}
    assert list(rows) == ["text", "vae", "net", "other", "all"]
    assert rows["net"][1:4] == ["13", f"{1201 * 257 + 6 * 17 * 16:,}", f"{found.components[2].statistics.differing:,}"]
    assert rows["vae"][1:6] == ["2", "5", "0", "0", "%"]
    assert [line for line in lines if line[:1] == ["only"]] == [["only", "in", "a", "only.here"]]
    assert ["shapes", "vae.conv.weight:", "[5,", "3]", "and", "[5,", "3,", "3,", "3]"] in lines
    assert "F16 and F32 in 1 tensor(s), compared by value" in shown
    assert "8 of those that differ: NaN or infinite in one file only" in shown
    assert lines[-1][-1].startswith("net.")
    worst = shown.partition("tensors that differ most")[2]
    assert worst.index("text.1.proj.bias") < worst.index("text.0.proj.bias")  # NaN first


def test_the_shares_of_the_histogram_add_up(found: Comparison) -> None:
    lines = table(found).splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("ULP apart"))
    assert lines[begin].split() == ["ULP", "apart", "0", "1", "2", "3-4", "5-8", "9-16", "17-256", "257-65,536", "more"]
    shares = [float(word) for word in lines[begin + 3].replace("<", "").split()[1:] if word not in ("%", "-")]
    assert lines[begin + 3].startswith("net")
    assert sum(shares) == pytest.approx(100, abs=0.1)


def test_the_table_fits_its_columns_at_full_size(tmp_path: Path, sdxl: Architecture) -> None:
    small = sdxl.scaled(32).usual_keys
    generator = torch.Generator().manual_seed(1)
    model = {key: torch.randn(spec.shape or (), generator=generator) for key, spec in small.items()}
    shown = table(compared(tmp_path, model, {key: value * -1e9 for key, value in model.items()}, sdxl))
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= COLUMNS


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    model = {"[bold]x[/bold] :smile:": torch.ones(3)}
    found = compared(tmp_path / "[red]", model, {key: value + 1 for key, value in model.items()})
    assert table(found).count("[bold]x[/bold] :smile:") == 3
    assert f"{tmp_path}/[red]/a.safetensors" in table(found)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({"w": [1, 2]}, {"w": [1, 2]}, "equal: 1 tensor with 2 elements, all of the same value"),
        ({"w": [1, 2]}, {"w": [1, 3]}, "1 of 2 elements differ (50.00 %)"),
        ({"w": [1], "v": [2]}, {"w": [1]}, "all 1 elements that were compared are equal; 1 tensor could not be"),
        ({"w": [1], "v": [2]}, {"w": [3], "u": [2]}, "1 of 1 elements differ (100 %); 2 tensors could not be compared"),
        ({"v": [2]}, {"u": [2]}, "nothing could be compared: no tensor is in both files"),
        ({"w": []}, {"w": []}, "equal: 1 tensor with 0 elements"),
        ({}, {}, "nothing could be compared"),
    ],
)
def test_the_verdict_is_one_sentence(
    tmp_path: Path, a: dict[str, list[float]], b: dict[str, list[float]], said: str
) -> None:
    one, other = ({key: torch.tensor(value) for key, value in model.items()} for model in (a, b))
    found = compared(tmp_path, one, other)
    assert verdict(found).startswith(said)
    assert verdict(found) in table(found)


@pytest.mark.parametrize(
    ("count", "of", "said"),
    [
        (0, 0, "-"),
        (0, 7, "0 %"),
        (7, 7, "100 %"),
        (1, 3, "33.33 %"),
        (1, 10**9, "<0.01 %"),
        (10**9 - 1, 10**9, ">99.99 %"),
    ],
)
def test_none_and_all_are_never_said_of_nearly(count: int, of: int, said: str) -> None:
    assert share_of(count, of) == said


# --- compare.json ---------------------------------------------------------------------------------------------------


def test_the_json_holds_everything_and_no_directory(found: Comparison, tmp_path: Path) -> None:
    path = write_json(to_json(found), str(tmp_path / "new" / "out"))
    assert path == tmp_path / "new" / "out" / NAME
    text = path.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert (content["a"]["name"], content["b"]["name"]) == ("a.safetensors", "b.safetensors")
    assert list(content["components"]) == ["text", "vae", "net", "other"]
    assert content["keys_only_in_a"] == ["only.here"]
    assert content["shapes_differ"] == [{"key": "vae.conv.weight", "a": [5, 3], "b": [5, 3, 3, 3]}]
    assert content["dtypes_differ"] == [{"a": "F16", "b": "F32", "tensors": 1}]
    assert content["histogram_bounds"] == list(BOUNDS)
    total, parts = content["total"], content["components"].values()
    for name in ("tensors", "elements", "differing", "nonfinite", "only_in_a", "only_in_b", "other_shape"):
        assert total[name] == sum(part[name] for part in parts), name
    assert len(total["histogram"]) == BINS
    assert sum(total["histogram"]) == total["elements"] - total["nonfinite"]
    assert sum(block["elements"] for block in content["blocks"]) == total["elements"]
    assert content["worst"][0]["key"] == "text.1.proj.bias"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_infinite_is_null(tmp_path: Path) -> None:
    content = to_json(compared(tmp_path, {"w": torch.zeros(3)}, {"w": torch.ones(3)}))
    assert content["total"]["relative_l2"] is None
    assert content["total"]["cosine"] is None
    assert content["total"]["l2"] == pytest.approx(3**0.5)
    json.dumps(content, allow_nan=False)


def test_a_file_that_cannot_be_written_is_an_error(found: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot be written: .*; choose another out="):
        write_json(to_json(found), str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be written"):
        draw(found, str(tmp_path / "file" / "picture.png"))


# --- the picture ----------------------------------------------------------------------------------------------------


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:])
    return width, height


def test_the_picture_is_a_png(found: Comparison, tmp_path: Path) -> None:
    draw(found, str(tmp_path / "drawn" / "picture.png"))
    width, height = size_of(tmp_path / "drawn" / "picture.png")
    assert width > 1500
    assert height > 800
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["picture.png"]


MANY = {f"p{part}.{block}.w": torch.full((4,), 1.0 + part) for part in range(10) for block in range(4)}


@pytest.mark.parametrize(
    ("a", "b", "arch"),
    [
        ({"w": torch.ones(3)}, {"w": torch.ones(3)}, ANY),
        ({"v": torch.ones(3)}, {"w": torch.ones(3)}, ANY),
        ({"w": torch.zeros(3)}, {"w": torch.ones(3)}, ANY),
        ({"w": torch.tensor([torch.nan, 1.0])}, {"w": torch.tensor([1.0, 1.0])}, ANY),
        ({"w": torch.ones(3, dtype=torch.float64)}, {"w": -torch.ones(3, dtype=torch.float64)}, ANY),
        ({"w": torch.empty(0)}, {"w": torch.empty(0)}, ANY),
        ({"w": torch.tensor([3])}, {"w": torch.tensor([5])}, ANY),
        (MANY, {key: value * 1.01 for key, value in MANY.items()}, SEVERAL),
        (MANY, {key: value + 10.0 ** -int(key[3]) for key, value in MANY.items()}, SEVERAL),
        (
            {f"layers.{n}.w": torch.ones(2) for n in range(100)},
            {f"layers.{n}.w": torch.ones(2) * n for n in range(100)},
            ANY,
        ),
    ],
    ids=["equal", "nothing", "zeros", "nan", "far", "empty", "integers", "many", "log", "deep"],
)
def test_whatever_differs_can_be_drawn(tmp_path: Path, a: Model, b: Model, arch: Architecture) -> None:
    draw(compared(tmp_path, a, b, arch), str(tmp_path / "picture.png"))
    size_of(tmp_path / "picture.png")


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    name = "$x_{1$ 日本_x"
    arch = architecture("odd", "keep", {}, {name: {"tensors": {"*": None}}})
    found = compared(
        tmp_path,
        {"$a^.0.w": torch.ones(2), "$a^.1.w": torch.ones(2)},
        {"$a^.0.w": torch.ones(2), "$a^.1.w": -torch.ones(2)},
        arch,
    )
    draw(found, str(tmp_path / f"{name}.png"))
    size_of(tmp_path / f"{name}.png")


def test_without_matplotlib_it_says_what_to_install(
    found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'mergeflow\[plots\]'"):
        draw(found, str(tmp_path / "picture.png"))
    assert not (tmp_path / "picture.png").exists()
