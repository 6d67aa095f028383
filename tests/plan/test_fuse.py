"""Several plans as one."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.errors import OverBudget
from mergeflow.plan.fuse import fuse, in_passes
from mergeflow.plan.plan import Plan
from mergeflow.plan.tiles import memory_for
from mergeflow.recipe.request import Budget
from tests.plan.builders import OPEN, checkpoint, plan_of

SHAPES = {"a": (40,), "b": (3, 5), "c": (7,)}
MODELS = {id: checkpoint(id, SHAPES) for id in ("1", "2", "3", "4", "5")}


def planned(*ids: str, **options: object) -> Plan:
    plan = plan_of([MODELS[id] for id in ids], arch=OPEN, **options)
    assert plan.problems == ()
    return plan
