"""A run may be killed at any moment: nothing has a final name but what is whole, and there is a way to go on."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest
import torch

from tests.killing import Mortals, mortals
from tests.models import write_models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KILLED = -9
SMALL_POINTS, DEMO_POINTS = 6, 50


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortals]:
    with mortals(tmp_path_factory.mktemp("runs")) as somebody:
        yield somebody


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What to type for two outputs of four models, which are several shards."""
    generator = torch.Generator().manual_seed(1)
    directory = write_models(
        tmp_path_factory.mktemp("little"),
        {id: {f"k{key:02}": torch.randn(30_000, generator=generator).half() for key in range(30)} for id in "1234"},
    )
    words = [f"models.dir={directory}", "models=folder", "arch=any", "executor=local", "out=out"]
    other = ["selection=all", "+selection.some='1,2,4'", "target=single"]
    two = ["+target={other: {file: other.safetensors, selection: some}}"]
    return [*words, *other, *two]


def files(directory: Path) -> dict[str, bytes]:
    """Everything below a directory but what tells of the run; nothing if there is none."""
    found = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("manifest.")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(found)}


def die_and_go_on(mortal: Mortals, words: list[str], place: Path, points: int, seed: int) -> int:
    """Kill a run at so many points, each time resume it, some of these once more; how often something was resumed."""
    whole = place / "whole"
    whole.mkdir()
    first = mortal.run(whole, words)
    assert first.status == 0, first.err
    expected = files(whole / "out")
    assert all(name.endswith(".safetensors") for name in expected)
    chosen = random.Random(seed)
    resumed = 0
    for point in sorted(chosen.sample(range(1, first.acts + 1), points)):
        where = place / str(point)
        where.mkdir()
        death = mortal.run(where, words, kill_at=point)
        assert death.status == KILLED, (point, death)
        for times in range(4):
            assert never_a_part(files(where / "out"), expected), f"killed at {point} of {first.acts}"
            again = [chosen.randrange(1, first.acts)] if times < 3 and chosen.random() < 0.3 else [0]
            death = mortal.run(where, [*words, "resume=true"], kill_at=again[0])
            if death.status != KILLED:
                break
        assert death.status == 0, (point, death)
        assert files(where / "out") == expected, f"killed at {point} of {first.acts}"
        told = json.loads((where / "out" / "manifest.json").read_text())
        resumed += told["resumed"] > 0
    return resumed


def never_a_part(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether everything that has a final name is whole."""
    return all(content == expected[name] for name, content in found.items() if name in expected)


def test_a_run_that_is_killed_at_any_moment_can_be_resumed_to_the_same_bytes(
    mortal: Mortals, little: list[str], tmp_path: Path
) -> None:
    assert die_and_go_on(mortal, little, tmp_path, SMALL_POINTS, seed=1) > 1


@pytest.mark.long
def test_the_demo_that_is_killed_at_fifty_moments_can_be_resumed_to_the_same_bytes(
    mortal: Mortals, demo_dir: Path, tmp_path: Path
) -> None:
    words = [f"models.dir={demo_dir}", "executor=local", "out=out"]
    assert die_and_go_on(mortal, words, tmp_path, DEMO_POINTS, seed=2) > 20
