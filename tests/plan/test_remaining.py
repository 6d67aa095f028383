from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from mergeflow.execute.journal import joined
from mergeflow.plan.remaining import remaining
from mergeflow.recipe.request import Budget, TargetRequest
from mergeflow.tensors import Dtype
from tests.plan.builders import OPEN, checkpoint, planned

if TYPE_CHECKING:
    from mergeflow.plan.plan import Plan

SHAPES = {"a": (700,), "b": (3, 5), "c": (9000,), "d": ()}
MODELS = [checkpoint(id, SHAPES, dtypes={"b": Dtype.F32}) for id in "123"]
TARGETS = (
    TargetRequest("one", "one.safetensors", selection="models"),
    TargetRequest("two", "two.safetensors", selection="some"),
    TargetRequest("wide", "wide.safetensors", dtype="fp32", selection="models"),
)
PLAN = planned(
    MODELS, *TARGETS, architecture=OPEN, selections={"some": ["1", "3"]}, budget=Budget(1, 1, 1 << 28, block=64 << 10)
)


def written(plan: Plan) -> list[set[int]]:
    """The bytes of each output that the shards of a plan write."""
    found: list[set[int]] = [set() for _ in plan.outputs]
    for tile in (tile for shard in plan.shards for tile in shard):
        for cell in plan.strips[tile.strip].cells:
            for place in cell.places:
                size = cell.dtype.itemsize
                its = set(range(place.offset + tile.start * size, place.offset + tile.stop * size))
                assert not its & found[place.output], "a byte is written twice"
                found[place.output] |= its
    return found


@st.composite
def there(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Some runs of bytes of each output, all of them, or none."""
    found = []
    for output in PLAN.outputs:
        begin, end = output.data
        byte = st.integers(begin, end)
        some = st.lists(st.tuples(byte, byte).map(lambda pair: (min(pair), max(pair))), max_size=6)
        found.append(joined(draw(st.one_of(some, st.just([(begin, end)]), st.just([(begin, end - 1)])))))
    return found


@given(there())
def test_what_is_done_and_what_is_left_are_every_byte_once(extents: list[list[tuple[int, int]]]) -> None:
    left = remaining(PLAN, extents)
    done: list[set[int]] = [set() for _ in PLAN.outputs]
    for span in left.done:
        assert any(begin <= span.begin and span.end <= end for begin, end in extents[span.output]), "it is not there"
        done[span.output].update(range(span.begin, span.end))
    for output, made, still in zip(PLAN.outputs, done, written(left.plan), strict=True):
        assert not made & still
        assert made | still == set(range(*output.data))


@given(there())
def test_nothing_is_left_of_an_output_that_is_whole(extents: list[list[tuple[int, int]]]) -> None:
    still = written(remaining(PLAN, extents).plan)
    for output, its, writes in zip(PLAN.outputs, extents, still, strict=True):
        assert its != [output.data] or not writes


@given(there())
def test_what_is_spared_need_not_be_read(extents: list[list[tuple[int, int]]]) -> None:
    left = remaining(PLAN, extents)
    read = 0
    for tile in (tile for shard in left.plan.shards for tile in shard):
        read += (tile.stop - tile.start) * sum(dtype.itemsize for dtype in left.plan.strips[tile.strip].dtypes)
    assert left.spared == PLAN.bytes_read - read >= 0


def test_where_nothing_is_there_the_plan_is_what_it_was() -> None:
    assert remaining(PLAN, [[], [], []]) == (PLAN, (), 0)
    assert remaining(PLAN, [[], [], []]).plan is PLAN


def test_only_models_that_are_still_needed_are_read() -> None:
    """Model 2 is in the lists of the first and the last output only."""
    whole = [[PLAN.outputs[0].data], [], [PLAN.outputs[2].data]]
    left = remaining(PLAN, whole).plan
    assert {left.checkpoints[source].id for strip in left.strips for source in strip.sources} == {"1", "3"}


def test_where_all_is_there_nothing_is_left() -> None:
    left = remaining(PLAN, [[output.data] for output in PLAN.outputs])
    assert left.plan.shards == ()
    assert left.spared == PLAN.bytes_read
    assert [(span.begin, span.end) for span in left.done] == [output.data for output in PLAN.outputs]
