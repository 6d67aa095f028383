"""Every method, by the name that plans use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.methods.copy import Agree, Copy
from mergeflow.methods.uniform import Uniform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeflow.interfaces import Method


def methods(*, strict_integers: bool) -> Mapping[str, Method]:
    """The methods of one run. `strict_integers` is whether integers that differ are an error."""
    return {method.name: method for method in (Uniform(), Copy(), Agree(strict_integers))}
