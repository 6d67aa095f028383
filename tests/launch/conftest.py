"""The program called within the test's own process: a sweep takes a second, not the three until torch is there."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from mergeflow.config.cli import main
from mergeflow.config.jobs import Outcome
from tests.models import write_models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ELEMENTS = 20_000


class Done(NamedTuple):
    """What came of a call."""

    code: int
    out: str
    err: str


class Call(Protocol):
    """Call the program with these arguments, in a directory of the test's own."""

    def __call__(self, *arguments: str) -> Done: ...


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Call]:
    root, terminated = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", ""))  # so that it is undone
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str) -> Done:
        Outcome.code, Outcome.finished, Outcome.begun, Outcome.told = 0, 0, False, []
        monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        GlobalHydra.instance().clear()
        assert HydraConfig.instance().cfg is None
        return Done(int(str(end.value.code)), *capsys.readouterr())

    yield called
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    signal.signal(signal.SIGTERM, terminated)
    root.handlers[:], root.level = handlers, level


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
