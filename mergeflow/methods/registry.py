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


@lru_cache(maxsize=256)
def method_of(name: str, steps: tuple[Step, ...]) -> Method:
    """The method called `name`; a tree is told by its `steps`, which other methods do not have."""
    return Pairwise(steps) if name == Pairwise.name else PLAIN[name]
