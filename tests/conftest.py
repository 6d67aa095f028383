"""What several tests share: the architectures of `conf/arch/`, and the demo model set, made once.

`make test` divides the tests among processes, one for each core, by pytest-xdist; `pytest` alone runs them in one. So:

- **A file stays together.** Whatever its module makes once is made once, and its tests run in their order.
- **Files that share something dear are one group** in `TOGETHER`, and one process runs them. There is one embedded Ray
  for all that use the fixture `ray`; that no test uses it elsewhere is checked. A Ray cluster of a test's own is made
  by a fixture of its module, or of a group of its own, and apart from the embedded one.
- **What takes longest begins first**, so that no core is idle in the end: a file or a group of more than ten seconds
  has its place in `LONGEST_FIRST`.
- **What all processes use is made under `one_at_a_time`** in `common_directory`, as the demo set is; nobody changes it.
- **The names of the tests are the same in every process**, or xdist refuses them: an id does not show a set, an
  address, or what the clock says.
- **The other cores are busy.** A test counts calls, bytes or memory of its own process rather than seconds; where
  seconds are promised, it measures what takes a small part of them. Signals go to processes that the test has begun.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
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

TOGETHER = {
    "ray": (
        "tests/execute/ray/test_cluster.py",
        "tests/execute/ray/test_executor.py",
        "tests/launch/test_cli.py",
        "tests/launch/test_ends.py",
        "tests/pairwise/test_engine.py",
        "tests/test_parity.py",
        "tests/test_shared_sums.py",
    ),
}
"""Files that one process runs, by the name of their group."""
LONGEST_FIRST = (
    "tests/test_docs.py",
    "ray",
    "tests/launch/test_sweep.py",
    "tests/methods/test_pairwise.py",
    "tests/compare/test_statistics.py",
    "tests/pairwise/test_trees.py",
    "tests/config/test_trees.py",
    "tests/test_memory.py",
    "tests/config/test_words.py",
    "tests/launch/test_series.py",
    "tests/launch/test_select.py",
    "tests/config/test_convert.py",
    "tests/config/test_conf.py",
    "tests/test_demo.py",
    "tests/methods/test_exact.py",
)
"""Files and groups in the order in which they are begun; all others come after them."""


def group_of(nodeid: str) -> str:
    """What one process runs as a whole: the group of a test's file, or the file."""
    file = nodeid.partition("::")[0]
    return next((name for name, files in TOGETHER.items() if file in files), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring what takes longest to the front; keep a second Ray from being started."""
    for item in items:
        if "ray" in getattr(item, "fixturenames", ()) and group_of(item.nodeid) != "ray":
            raise pytest.UsageError(f"{item.nodeid} uses the embedded Ray; name its file in TOGETHER of {__file__}")
    place = {name: index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(group_of(item.nodeid), len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By group, in the order of the tests. xdist's own marks for groups have no effect with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def common_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes of this run find what one of them has made."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Keep the other processes waiting while something is made in a directory of all."""
    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    common = common_directory(tmp_path_factory)
    with one_at_a_time(common):
        ensure_demo(common / "demo", sdxl)
    return common / "demo"


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
