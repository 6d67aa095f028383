from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from mergeflow.config import schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    from omegaconf import DictConfig

CONF = Path(__file__).parent.parent.parent / "conf"


class Compose(Protocol):
    """What Hydra makes of `conf/`, of the user's own directory if there is one, and of what is typed."""

    def __call__(self, *overrides: str, own: Path | None = None) -> DictConfig: ...


@pytest.fixture
def compose() -> Iterator[Compose]:
    def composed(*overrides: str, own: Path | None = None) -> DictConfig:
        also = [] if own is None else [f"hydra.searchpath=['file://{own}']"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", [*overrides, *also])

    schema.register()
    yield composed
    GlobalHydra.instance().clear()
