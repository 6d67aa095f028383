"""What several tests share: the architectures of `conf/arch/`, and the demo model set, made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from omegaconf import OmegaConf

from mergeflow.demo import ensure_demo
from mergeflow.recipe.architecture import architecture

if TYPE_CHECKING:
    from mergeflow.recipe.architecture import Architecture

CONF = Path(__file__).parent.parent / "conf"


def described(name: str) -> Architecture:
    return architecture(
        **cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(CONF / "arch" / f"{name}.yaml")))
    )


@pytest.fixture(scope="session")
def sdxl() -> Architecture:
    return described("sdxl")


@pytest.fixture(scope="session")
def anything() -> Architecture:
    return described("any")


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory, sdxl: Architecture) -> Path:
    """The demo model set. All tests read the same files, so none may write to them."""
    directory = tmp_path_factory.mktemp("demo")
    ensure_demo(directory, sdxl)
    return directory
