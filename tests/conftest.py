"""What several tests share: the architectures of `conf/arch/`, and the demo model set, made once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, settings
from omegaconf import OmegaConf

from mergeflow.demo import ensure_demo
from mergeflow.execute.ray.connect import OBJECT_STORE_BYTES
from mergeflow.recipe.architecture import architecture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray.cluster_utils import Cluster

    from mergeflow.recipe.architecture import Architecture

# How long an example takes says nothing on a machine that does other work at the same time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

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


@pytest.fixture(scope="session")
def ray() -> Iterator[Cluster]:
    """One Ray for all tests that need it: a `RayExecutor` uses what is there, and leaves it running.

    It is the head of a cluster, to which tests may add nodes for a while.
    """
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0")
    import ray
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 4,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        # Ray gives a node up after 15 seconds; tests need not wait so long.
        "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(CONF.parent)}},  # so that actors find the stores of the tests
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
