"""Where the work is done, from what is typed to plain values."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.config import schema
from mergeflow.config.convert import to_config
from mergeflow.config.executor import UNITS, to_budget, to_bytes, to_ray_options
from mergeflow.errors import ConfigError
from mergeflow.execute.ray import RayOptions
from mergeflow.plan.plan import Cell, Place, Strip
from mergeflow.plan.tiles import memory_for
from mergeflow.recipe.request import Budget
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from tests.config.conftest import Compose


def executor(**changes: object) -> schema.Executor:
    made = schema.Executor(kind=schema.ExecutorKind.local, workers=2)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1000B", 1000),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1kib", 1024),
        ("512MiB", 512 * 2**20),
        ("1GiB", 2**30),
        (" 1 GiB ", 2**30),
        ("2GB", 2 * 10**9),
        ("2.5GB", 2_500_000_000),
        ("0.1GB", 100_000_000),
        ("1.5GiB", 3 * 2**29),
        ("1TiB", 2**40),
        ("9007199254740993B", 2**53 + 1),
        ("1" * 400, int("1" * 400)),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert to_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "GiB", "1GiB2", "-1GiB", "1e9", "1,5GiB", "1.GiB", ".5GiB", "1 G", "\u0661B"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_bytes(text)
    assert str(caught.value) == f"executor.memory={text} is not a size; write 512MiB, 4GiB or 2GB"


@given(st.integers(0, 10**30), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_a_whole_number_of_any_unit_is_exact(number: int, unit: str, space: str) -> None:
    assert to_bytes(f"{number}{space}{unit}") == number * UNITS[unit]


# the budget


def test_a_budget_is_what_was_asked_for() -> None:
    asked = executor(workers=3, reads_in_flight=5, memory="1MiB", block="16MiB", io=schema.IoKind.direct)
    assert to_budget(asked) == Budget(3, 5, 2**20, 2**24, "direct", ())


def test_what_is_left_to_the_storage_starts_with_what_is_usual() -> None:
    assert to_budget(executor(workers=3)) == Budget(3, 4, 2**30, 2**22, "auto", ("reads_in_flight", "block"))
    assert to_budget(executor(workers=3, block=1 << 20)).auto == ("reads_in_flight",)


def test_there_are_as_many_workers_as_this_process_may_use_cores() -> None:
    assert to_budget(executor(workers=None, memory="1TiB")).workers == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("cores", [1, 8, 32, 128, 512])
def test_there_are_never_so_many_workers_that_the_default_memory_has_no_blocks_for_them(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    budget = to_budget(schema.Executor(kind=schema.ExecutorKind.ray))
    assert 1 <= budget.workers <= cores
    assert budget.workers == cores or budget.workers >= 8
    rows = tuple(range(257))
    cell = Cell("uniform", Dtype.F16, rows, (1,) * 257, (Place(0, 0),))
    memory = memory_for([Strip("key", 10**8, rows, (Dtype.F16,) * 257, rows, (cell,))], budget)
    assert memory.projected <= budget.memory


def test_there_is_one_worker_where_memory_is_short() -> None:
    assert to_budget(executor(workers=None, memory="1MiB")).workers == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"workers": 0}, "executor.workers=0 must be at least 1"),
        ({"workers": -2}, "executor.workers=-2 must be at least 1"),
        ({"reads_in_flight": 0}, "executor.reads_in_flight=0 must be at least 1"),
        ({"reads_in_flight": "many"}, "executor.reads_in_flight=many is not a number; write 4 or auto"),
        ({"reads_in_flight": True}, "executor.reads_in_flight=True is not a number; write 4 or auto"),
        ({"block": "long"}, "executor.block=long is not a size; write 4MiB, 16MiB or auto"),
        ({"block": 1000}, "executor.block=1000 must be at least 64KiB"),
        ({"memory": "much"}, "executor.memory=much is not a size; write 512MiB, 4GiB or 2GB"),
        (
            {"address": "auto"},
            "executor.address=auto is for Ray, but executor.kind is local; use executor=ray",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_budget_that_cannot_be_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_budget(executor(**changes))
    assert str(caught.value) == problem


def test_ray_may_have_an_address() -> None:
    assert to_budget(executor(kind=schema.ExecutorKind.ray, address="auto")).workers == 2


# a cluster


def test_a_cluster_gets_as_many_actors_as_memory_has_blocks_for(compose: Compose) -> None:
    typed = to_config(compose("executor=cluster")).executor
    assert to_budget(typed).workers == 14
    assert to_ray_options(typed) == RayOptions("auto", {}, "spread", 300.0, None)
    more = to_config(compose("executor=cluster", "executor.memory=16GiB")).executor
    assert to_budget(more).workers == 56


def test_the_options_of_a_cluster_are_what_was_typed(compose: Compose) -> None:
    typed = ("address=head:6379", "workers=8", "placement=strict_spread", "patience=60", "resources.fast_disk=1")
    more = ("resources.cpu=2", "resources.memory=2GiB")
    config = to_config(compose("executor=cluster", *(f"executor.{one}" for one in (*typed, *more)))).executor
    resources = {"fast_disk": 1.0, "CPU": 2.0, "memory": 2.0 * 2**30}
    assert to_ray_options(config) == RayOptions("head:6379", resources, "strict_spread", 60.0, 8)
    assert to_budget(config).workers == 8


CLUSTER = ("executor=cluster",)
LOCAL = ("executor=local",)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ((*CLUSTER, "executor.resources.disk=much"), "executor.resources.disk=much is not an amount; write a number"),
        ((*CLUSTER, "executor.resources.disk=-1"), "executor.resources.disk=-1 is not an amount; write a number"),
        ((*CLUSTER, "executor.resources.disk=true"), "executor.resources.disk=True is not an amount; write a number"),
        ((*CLUSTER, "executor.resources.memory=big"), "executor.resources.memory=big is not a size; write 2GiB or"),
        ((*CLUSTER, "executor.patience=5"), "executor.patience=5 must be at least 30 seconds"),
        ((*LOCAL, "executor.patience=60"), "executor.patience=60.0 is for Ray, but executor.kind is local"),
        ((*LOCAL, "executor.placement=pack"), "executor.placement=pack is for Ray, but executor.kind is local"),
        (
            (*LOCAL, "executor.resources.disk=1"),
            "executor.resources={'disk': 1} is for Ray, but executor.kind is local",
        ),
        (("executor.placement=pack",), "executor.placement=pack is for a running cluster, and without effect on a Ray"),
        (("executor.resources.CPU=2",), "executor.resources={'CPU': 2} is for a running cluster, and without effect"),
    ],
    ids=lambda value: value[-1].removeprefix("executor.") if isinstance(value, tuple) else "",
)
def test_an_option_of_ray_that_has_no_meaning_or_no_effect_is_refused(
    typed: tuple[str, ...], problem: str, compose: Compose
) -> None:
    config = to_config(compose(*typed)).executor
    for convert in (to_budget, to_ray_options):
        with pytest.raises(ConfigError, match=f"^{re.escape(problem)}"):
            convert(config)
