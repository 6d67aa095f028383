"""Every method, by the name that plans use."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mergeflow.methods.copy import Agree, Copy, Whole
from mergeflow.methods.pairwise import Pairwise
from mergeflow.methods.uniform import Uniform

if TYPE_CHECKING:
    from mergeflow.interfaces import Method, Step

PLAIN: dict[str, Method] = {method.name: method for method in (Uniform(), Copy(), Agree(), Whole())}
"""Methods that are told all there is by rows and shares. They hold nothing, so threads may share them."""

TREES = 8
"""How many are kept: a run has few, and one of 256 leaves takes more than half a megabyte."""


def method_of(name: str, steps: tuple[Step, ...]) -> Method:
    """The method called `name`; a tree is told by its `steps`, which other methods do not have."""
    return _tree(steps) if steps else PLAIN[name]


@lru_cache(maxsize=TREES)
def _tree(steps: tuple[Step, ...]) -> Method:
    return Pairwise(steps)
