"""The model of benchmarks.scaling: what must hold whatever the figures are."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling import __main__ as command
from benchmarks.scaling import page, tables
from benchmarks.scaling.bound import bound
from benchmarks.scaling.machine import GB, STORAGES, Costs, Machine, Node, Storage, scenario
from benchmarks.scaling.simulate import simulate
from benchmarks.scaling.workload import Shard, Work, plan_of, sdxl, work_of, work_of_plan
from mergeflow.demo.catalogue import Variant
from mergeflow.demo.generate import layout_of
from mergeflow.errors import ConfigError, OverBudget

if TYPE_CHECKING:
    from collections.abc import Mapping

SMALL = Node(cores=4, workers=4, reads_in_flight=2, memory=4 << 30)
UNCOORDINATED = Costs(startup=0.0, actors=math.inf, receipt=0.0, receipt_per_reference=0.0, plan=0.0, parse=0.0)
"""What nodes do together costs nothing."""


def even(models: int, shards: int, size: float = 100e6) -> Work:
    """So many equal shards of one tile each."""
    row = size / models
    pieces = max(1, round(row / 65536))
    return Work(models, (Shard(size, row, models, pieces, pieces * models),) * shards, round(size + row))


works = st.builds(even, st.integers(1, 2000), st.integers(1, 400), st.floats(1e6, 5e8))
rates = st.one_of(st.just(math.inf), st.floats(1e7, 1e11))
storages = st.builds(
    Storage,
    st.just("any"),
    latency=st.floats(0, 0.1),
    stream=rates,
    disk=rates,
    server=rates,
    requests=st.one_of(st.just(math.inf), st.floats(100, 1e6)),
    open=st.floats(0, 0.05),
    write=rates,
    local=st.booleans(),
)
machines = st.builds(
    Machine,
    st.integers(1, 12),
    storages,
    st.builds(Node, cores=st.integers(1, 16), workers=st.integers(1, 8), reads_in_flight=st.integers(1, 6)),
)


def changed(storage: Storage, name: str, value: float) -> Storage:
    """That storage with one other figure."""
    figures: dict[str, Any] = {name: value}
    return replace(storage, **figures)


@settings(deadline=None, max_examples=60)
@given(works, machines)
def test_a_simulation_never_beats_the_bound(work: Work, machine: Machine) -> None:
    found = simulate(work, machine)
    assert found.seconds >= bound(work, machine).seconds * (1 - 1e-9)


@settings(deadline=None, max_examples=30)
@given(works, machines)
def test_a_simulation_says_the_same_again(work: Work, machine: Machine) -> None:
    assert simulate(work, machine) == simulate(work, machine)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("models", [257, 1000])
def test_more_nodes_are_never_slower_where_being_many_costs_nothing(storage: str, models: int) -> None:
    work = even(models, 960)
    shared = replace(STORAGES[storage], opens=math.inf, stream=math.inf)
    prompt = replace(SMALL, unwritten=1.0)  # what many keep in memory is not written meanwhile
    # Two nodes fetch the output to hash it, which one has in memory: that price is paid by all that are compared, and
    # with hundreds of models the output is small.
    took = [simulate(work, Machine(nodes, shared, prompt, UNCOORDINATED)) for nodes in (2, 4, 8, 32)]
    after = [one.seconds for one in took]
    assert all(more <= fewer * 1.005 for fewer, more in itertools.pairwise(after))


def test_many_nodes_are_slower_than_few_where_all_open_all_files_at_one_server() -> None:
    work = work_of(257, 6.94e9, Node())
    few, many = (simulate(work, scenario("nfs", nodes)).seconds for nodes in (2, 256))
    assert many > few


@pytest.mark.parametrize("name", ["disk", "server", "stream", "requests", "requests_per_node", "write", "opens"])
@pytest.mark.parametrize("storage", STORAGES)
def test_twice_a_rate_is_never_slower(storage: str, name: str) -> None:
    work, machine = even(500, 300), Machine(4, STORAGES[storage], SMALL)
    faster = changed(machine.storage, name, 2 * getattr(machine.storage, name))
    assert simulate(work, replace(machine, storage=faster)).seconds <= simulate(work, machine).seconds * 1.005


@pytest.mark.parametrize("name", ["server", "disk"])
def test_twice_the_bandwidth_halves_the_run_where_it_is_the_bottleneck(name: str) -> None:
    work = even(42, 800)
    slow = Machine(1, changed(Storage("any", latency=0.0), name, 0.2 * GB), SMALL, UNCOORDINATED)
    fast = replace(slow, storage=changed(slow.storage, name, 0.4 * GB))
    assert simulate(work, slow).run / simulate(work, fast).run == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("models", [42, 257, 1000])
def test_one_node_with_its_own_disk_takes_what_the_closed_form_says(models: int) -> None:
    found = simulate(work_of(models, 6.94e9, Node()), scenario("local", 1))
    assert found.seconds == pytest.approx(found.bound.seconds, rel=0.03)
    assert found.bottleneck == "disk"


def test_one_thread_does_one_thing_after_the_other() -> None:
    costs = replace(UNCOORDINATED, digest=0.0, unpickle=0.0, plan_bytes=1e-9)
    machine = Machine(
        1,
        Storage("any", latency=0.01, stream=1 * GB),
        Node(cores=2, workers=1, reads_in_flight=1),
        costs,
        ray=False,
    )
    work = even(10, 20)
    reading = 20 * (10 * (0.01 + costs.read_call) + 0.1)
    merging = 20 * (100e6 / costs.arithmetic + work.shards[0].pieces * (costs.piece_call + 10 * costs.row_call))
    writing = 20 * 10e6 / costs.write_copy
    headers, asking = 10 * 0.04 / 8, 10 * 0.01
    assert simulate(work, machine).seconds == pytest.approx(headers + reading + merging + writing + asking)


def test_too_few_shards_are_named_as_the_bottleneck() -> None:
    work = even(10, 9)
    machine = Machine(1, Storage("any", latency=1.0), Node(cores=8, workers=8, reads_in_flight=1), UNCOORDINATED)
    assert simulate(work, machine).bottleneck == "shards"  # one worker has two of the nine


def test_a_workload_is_what_the_planner_cuts() -> None:
    layout = layout_of(sdxl(), Variant(1))
    plan = plan_of(5, layout, sdxl())
    budget = plan.budget
    node = Node(cores=1, workers=budget.workers, reads_in_flight=budget.reads_in_flight, memory=budget.memory)
    assert work_of(5, layout.size, node) == work_of_plan(plan)
    assert work_of_plan(plan).total.read == plan.bytes_read


def test_more_models_have_shorter_reads_and_no_more_memory() -> None:
    few, many = (work_of(models, 6.94e9, Node()) for models in (257, 1000))
    assert many.request < few.request / 2
    assert Node().workers * 4 * many.block <= Node().memory


def test_too_little_memory_is_refused_as_the_planner_does() -> None:
    with pytest.raises(OverBudget, match="too little"):
        work_of(1000, 6.94e9, Node(memory=1 << 28))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"nodes": 0}, "nodes=0"), ({"nodes": 2, "ray": False}, "need Ray")],
    ids=["no node", "nodes without Ray"],
)
def test_an_impossible_machine_is_refused(change: Mapping[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(scenario("nfs", 1), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("latency", -1.0), ("server", 0.0), ("write", -2.0)])
def test_an_impossible_figure_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"storage.{name}="):
        changed(STORAGES["nfs"], name, value)


def test_options_change_the_machine_and_nothing_else() -> None:
    options = command.parser().parse_args(
        ["--nodes", "2", "--cores", "8", "--server-bandwidth", "115MB", "--latency", "0.002", "--storage", "nfs"]
    )
    made = command.machine(options)
    assert made.storage == replace(STORAGES["nfs"], server=115e6, latency=0.002)
    assert (made.nodes, made.node.cores, made.node.workers, made.node.memory) == (2, 8, 8, 8 << 30)


def test_every_figure_of_a_storage_can_be_given() -> None:
    named = {*command.STORAGE_OPTIONS, "name", "local", "requests_per_node"}
    assert named == {field.name for field in fields(Storage)}


def test_what_helps_most_is_more_of_the_bottleneck() -> None:
    helping = tables.what_helps(42, 6.94e9, scenario("nfs", 1))
    assert helping == sorted(helping, key=lambda one: -one.factor)
    assert [one.what for one in tables.what_helps(42, 6.94e9, scenario("nfs", 2))] == [
        "twice the bandwidth of the storage"
    ]


def test_a_table_is_replaced_between_its_markers() -> None:
    text = "a\n<!-- x: made by python -m benchmarks.scaling -->\nold\n<!-- end of x -->\nb\n"
    once = page.replaced(text, "x", ["new"])
    assert "old" not in once
    assert page.replaced(once, "x", ["new"]) == once
    with pytest.raises(ConfigError, match="end of y"):
        page.replaced(text, "y", ["new"])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.25, "3.2 s"), (95, "95 s"), (600, "10 min"), (5400, "90 min"), (3 * 3600, "3.0 h"), (10 * 86400, "10.0 d")],
)
def test_durations_are_short(seconds: float, said: str) -> None:
    assert tables.duration(seconds) == said
