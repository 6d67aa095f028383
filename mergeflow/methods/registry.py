"""Every method, by the name that plans use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.methods.copy import Agree, Copy
from mergeflow.methods.uniform import Uniform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.interfaces import Method


def methods() -> Mapping[str, Method]:
    """The methods of one thread."""
    return {method.name: method for method in (Uniform(), Copy(), Agree())}
