from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mergeflow.plan.fuse import fuse
from mergeflow.plan.identity import OutputIdentity, identities
from mergeflow.plan.pace import recut
from mergeflow.recipe.request import Budget, Policies, TargetRequest
from mergeflow.tensors import Checkpoint
from tests.plan.builders import OPEN, checkpoint, planned

if TYPE_CHECKING:
    from mergeflow.plan.plan import Plan

SHAPES = {"a": (700,), "b": (3, 5)}
MODELS = [checkpoint(id, SHAPES) for id in "1234"]
MADE = TargetRequest("made", "made.safetensors", selection="models")
OTHER = TargetRequest("other", "other.safetensors", selection="some")


def plan(*targets: TargetRequest, models: list[Checkpoint] = MODELS, **changes: Any) -> Plan:
    selections = {"models": ["1", "2", "3"], "some": ["4", "2"]} | changes.pop("selections", {})
    return planned(models, *(targets or (MADE,)), **{"architecture": OPEN, "selections": selections, **changes})


MINE = identities(plan())[0]


def changed(**stat: int) -> list[Checkpoint]:
    """The models, of which the second is another file."""
    second = MODELS[1]
    other = Checkpoint(second.id, second.path, second.stat._replace(**stat), second.header)
    return [MODELS[0], other, *MODELS[2:]]


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(lambda: plan(budget=Budget(1, 7, 1 << 26, block=1 << 16)), id="another-budget"),
        pytest.param(lambda: recut(plan(), Budget(3, 1, 1 << 27)), id="another-pace"),
        pytest.param(lambda: plan(MADE, OTHER), id="beside-another-output"),
        pytest.param(lambda: plan(models=MODELS[::-1]), id="files-found-in-another-order"),
        pytest.param(lambda: plan(models=changed(device=9)), id="mounted-elsewhere"),
    ],
)
def test_where_and_when_and_what_else_do_not_change_it(same: Any) -> None:
    assert identities(same())[0] == MINE


def test_an_output_of_a_pass_is_the_output_of_its_job() -> None:
    made, other = plan(MADE), plan(OTHER)
    assert identities(fuse([other, made]).plan) == identities(other) + identities(made)


ANOTHER_HEADER = [MODELS[0], checkpoint("2", SHAPES, metadata={"trained": "longer"}), *MODELS[2:]]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        pytest.param(lambda: plan(models=changed(mtime_ns=9)), "model 2 has changed since", id="time"),
        pytest.param(lambda: plan(models=changed(inode=9)), "model 2 has changed since", id="inode"),
        pytest.param(lambda: plan(models=changed(size=9)), "model 2 has changed since", id="size"),
        pytest.param(lambda: plan(models=ANOTHER_HEADER), "model 2 has changed since", id="header"),
        pytest.param(
            lambda: plan(selections={"models": ["1", "2"]}), "of 2 other models than the 3", id="fewer-models"
        ),
        pytest.param(lambda: plan(selections={"models": ["2", "1", "3"]}), "recipe", id="order"),
        pytest.param(lambda: plan(dtype="fp32"), "recipe", id="dtype"),
        pytest.param(lambda: plan(policies=Policies(nonfinite="propagate")), "", id="nonfinite"),
    ],
)
def test_what_decides_the_bytes_changes_it_and_how_is_told(other: Any, why: str) -> None:
    found = identities(other())[0]
    assert found != MINE
    assert why in found.differs(MINE) or why in MINE.differs(found)
    assert found.differs(MINE)


def test_what_is_computed_changes_it_where_the_head_does_not() -> None:
    one = OutputIdentity("head", "work", {"1": "a"})
    assert one.differs(one) == ""
    assert "options" in one.differs(OutputIdentity("head", "other work", {"1": "a"}))


def test_sources_that_only_lend_their_keys_are_no_part_of_it() -> None:
    assert set(MINE.sources) == {"1", "2", "3"}
