"""What the tests of the command line share: calls of the program, and what is merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import program
from tests.models import write_models

if TYPE_CHECKING:
    from pathlib import Path

    from tests.program import Call

ELEMENTS = 20_000


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Call the program in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return program.call


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models of two tensors, and one with a value that is none."""
    generator = torch.Generator().manual_seed(1)
    models = {
        id: {key: torch.randn(ELEMENTS, generator=generator).half() for key in "xy"} for id in ("1", "2", "3", "4")
    }
    broken = {key: tensor.clone() for key, tensor in models["4"].items()}
    broken["y"][7] = torch.nan
    return write_models(tmp_path_factory.mktemp("small"), models | {"broken": broken})


@pytest.fixture
def words(small: Path) -> list[str]:
    """Overrides for a merge of the small models; `selection.models` is still to be said."""
    return [
        *("models=folder", f"models.dir={small}", "arch=any", "selection=all", "target=single", "executor=local"),
        *("executor.workers=2", "executor.reads_in_flight=1", "out=out"),
    ]


@pytest.fixture
def select(demo_dir: Path) -> list[str]:
    """The example in `conf/` that looks for the best models, on the first text encoder of the demo set alone."""
    others = [f"~arch.components.{name}" for name in ("te1", "vae", "unet")]
    words = ["experiment=select_by_score", f"models.dir={demo_dir}", "executor=local", "out=out"]
    return ["-m", *words, *others]
