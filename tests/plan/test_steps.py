"""Graphs and steps: whatever the graph, the steps make of the rows what the graph says, in few registers."""

from __future__ import annotations

import pickle
from fractions import Fraction
from math import ceil, log2
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.interfaces import Step
from mergeflow.plan.steps import Graph, Refused
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mergeflow.plan.steps import Grown, Operation

F16, F32, F64 = Dtype.F16, Dtype.F32, Dtype.F64
FORMULAS: dict[Operation, Callable[..., Fraction]] = {
    "scale": lambda factor, x: factor * x,
    "add": lambda factor, x, y: x + y,
    "subtract": lambda factor, x, y: x - y,
    "lerp": lambda factor, x, y: x + factor * (y - x),
    "round": lambda factor, x: x,
}
INPUTS: dict[Operation, int] = {"scale": 1, "add": 2, "subtract": 2, "lerp": 2, "round": 1}


def rows(graph: Graph, count: int) -> list[int]:
    return [graph.row(source, F16) for source in range(count)]


def carried_out(grown: Grown) -> Fraction:
    """What the steps make of rows that hold a number for each source, in exact arithmetic."""
    given = [_number(source) for source in grown.sources]
    registers: dict[int, Fraction] = {}
    for step in grown.steps:
        operands = [given[place] if place >= 0 else registers[-1 - place] for place in step.operands]
        registers[step.into] = FORMULAS[step.operation](Fraction(step.factor), *operands)
    return registers[grown.steps[-1].into] if grown.steps else given[0]


def evaluated(graph: Graph, value: int) -> Fraction:
    made: list[Fraction] = []
    for one in graph.values:
        operands = [made[number] for number in one.inputs]
        is_row = one.operation is None
        made.append(_number(one.source) if is_row else FORMULAS[one.operation](Fraction(one.factor), *operands))  # type: ignore[index]
    return made[value]


def _number(source: int) -> Fraction:
    return Fraction(1, 3 + 2 * source)


def registers(steps: Sequence[Step]) -> int:
    return len({step.into for step in steps})


# --- the steps of a graph -------------------------------------------------------------------------------------------


def test_a_weighted_sum_is_two_products_and_a_sum() -> None:
    graph = Graph()
    a, b = graph.row(7, F32), graph.row(4, F16)
    top = graph.do("add", (graph.do("scale", (a,), F32, factor=0.8), graph.do("scale", (b,), F16, factor=0.2)), F16)
    assert graph.grown(top) == (
        (
            Step("scale", (0,), 0.8, F32, 0),
            Step("scale", (1,), 0.2, F16, 1),
            Step("add", (-1, -2), 1.0, F16, 0),
        ),
        (7, 4),
        F16,
    )


def test_a_row_as_it_is_takes_no_steps() -> None:
    graph = Graph()
    rows(graph, 3)
    assert graph.grown(1) == ((), (1,), F16)


def test_what_the_top_does_not_need_is_left_out() -> None:
    graph = Graph()
    a, b, c = rows(graph, 3)
    graph.do("add", (a, b), F16)
    top = graph.do("round", (c,), F32)
    graph.do("add", (top, a), F32)
    assert graph.grown(top) == ((Step("round", (0,), 1.0, F32, 0),), (2,), F32)


def test_a_result_that_is_used_twice_is_made_once() -> None:
    graph = Graph()
    a, b = rows(graph, 2)
    shared = graph.do("add", (a, b), F16)
    grown = graph.grown(graph.do("subtract", (graph.do("scale", (shared,), F16, factor=3.0), shared), F16))
    assert [step.operation for step in grown.steps] == ["add", "scale", "subtract"]
    assert carried_out(grown) == 2 * (_number(0) + _number(1))


def test_one_value_may_be_both_operands() -> None:
    graph = Graph()
    (a,) = rows(graph, 1)
    x = graph.do("scale", (a,), F16, factor=2.0)
    assert graph.grown(graph.do("add", (x, x), F16)).steps[-1] == Step("add", (-1, -1), 1.0, F16, 0)
    assert graph.grown(graph.do("add", (a, a), F16)).steps == (Step("add", (0, 0), 1.0, F16, 0),)


def test_the_side_that_needs_more_is_made_first() -> None:
    graph = Graph()
    leaves = rows(graph, 5)
    deep = leaves[1]
    for leaf in leaves[2:]:
        deep = graph.do("add", (graph.do("scale", (deep,), F16), graph.do("scale", (leaf,), F16)), F16)
    grown = graph.grown(graph.do("add", (graph.do("scale", (leaves[0],), F16), deep), F16))
    assert registers(grown.steps) == 2
    assert grown.sources[-1] == 0
    assert carried_out(grown) == sum(map(_number, range(5)))


def test_a_value_may_be_held_wider_than_it_is_kept() -> None:
    graph = Graph()
    (a,) = rows(graph, 1)
    assert graph.grown(graph.do("round", (a,), F64, F16)).dtype is F16
    assert graph.rounded(a, F16) == a
    assert graph.values[graph.rounded(a, F64, F16)].kept is F16


def test_a_factor_is_never_minus_zero() -> None:
    # It equals 0.0 and would be carried out as that wherever equal steps are shared.
    graph = Graph()
    (a,) = rows(graph, 1)
    (step,) = graph.grown(graph.do("scale", (a,), F16, factor=-0.0)).steps
    assert str(step.factor) == "0.0"


# --- refused rows ---------------------------------------------------------------------------------------------------


def test_a_row_that_is_refused_is_refused_where_an_operation_takes_it() -> None:
    graph = Graph()
    a, b = graph.row(5, Dtype.F8_E4M3), graph.row(6, F16)
    graph.refuse(a)
    top = graph.do("add", (graph.do("scale", (b,), F16), graph.do("scale", (a,), F16)), F16)
    with pytest.raises(Refused) as caught:
        graph.grown(top)
    assert (caught.value.source, caught.value.dtype) == (5, Dtype.F8_E4M3)
    assert pickle.loads(pickle.dumps(caught.value)).source == 5


def test_a_row_that_is_refused_may_be_carried_or_stand_aside() -> None:
    graph = Graph()
    a, b = graph.row(5, Dtype.F8_E4M3), graph.row(6, F16)
    graph.refuse(a)
    graph.do("scale", (a,), F16)
    assert graph.grown(a) == ((), (5,), Dtype.F8_E4M3)
    assert graph.grown(graph.do("round", (b,), F32)).sources == (6,)


# --- any graph ------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, int]:
    graph = Graph()
    for source in draw(st.lists(st.integers(0, 8), min_size=1, max_size=8)):
        graph.row(source, draw(st.sampled_from([F16, F32])))
    for _ in range(draw(st.integers(0, 25))):
        operation = draw(st.sampled_from(list(FORMULAS)))
        numbers = st.integers(max(0, len(graph.values) - draw(st.sampled_from([3, 30]))), len(graph.values) - 1)
        inputs = tuple(draw(numbers) for _ in range(INPUTS[operation]))
        dtype = draw(st.sampled_from([F16, F32, F64]))
        graph.do(operation, inputs, dtype, factor=draw(st.integers(-3, 3)) / 4)
    return graph, draw(st.integers(0, len(graph.values) - 1))


@given(graphs())
def test_the_steps_of_any_graph_make_what_the_graph_says(made: tuple[Graph, int]) -> None:
    graph, top = made
    grown = graph.grown(top)
    assert carried_out(grown) == evaluated(graph, top)
    needed, waiting = set(), [top]
    while waiting:
        number = waiting.pop()
        if number not in needed:
            needed.add(number)
            waiting += graph.values[number].inputs
    operations = [number for number in needed if graph.values[number].operation is not None]
    sources = {graph.values[number].source for number in needed} - {-1}
    assert len(grown.steps) == len(operations), "every operation that is needed is done once"
    assert sorted(grown.sources) == sorted(sources)
    assert {step.into for step in grown.steps} == set(range(registers(grown.steps))), "registers have no gaps"


@given(graphs())
def test_the_dtype_of_every_step_is_that_of_its_value(made: tuple[Graph, int]) -> None:
    graph, top = made
    grown = graph.grown(top)
    kept = sorted((step.operation, step.factor, step.dtype.code) for step in grown.steps)
    wanted = [(one.operation, one.factor, one.dtype.code) for one in graph.values if one.operation is not None]
    assert all(kept.count(one) <= wanted.count(one) for one in kept)
    assert grown.dtype is graph.values[top].kept
    assert not grown.steps or grown.steps[-1].dtype is graph.values[top].dtype


@given(st.integers(1, 200), st.randoms(use_true_random=False))
def test_no_tree_needs_more_registers_than_its_balanced_like(count: int, random: object) -> None:
    # Sethi and Ullman: a tree of operations needs as many registers as the largest balanced one within it.
    graph = Graph()
    parts = rows(graph, count)
    while len(parts) > 1:
        index = random.randrange(len(parts) - 1)  # type: ignore[attr-defined]
        a, b = (graph.do("scale", (part,), F16, factor=0.5) for part in parts[index : index + 2])
        parts[index : index + 2] = [graph.do("add", (a, b), F16)]
    grown = graph.grown(parts[0])
    assert registers(grown.steps) <= ceil(log2(count)) + 1
    assert carried_out(grown) == evaluated(graph, parts[0])


def test_thousands_of_steps_need_no_recursion() -> None:
    graph = Graph()
    top, *others = rows(graph, 5000)
    for other in others:
        top = graph.do("add", (top, other), F16)
    assert registers(graph.grown(top).steps) == 1
