"""Paths as they are typed."""

from __future__ import annotations

import os


def absolute(path: str) -> str:
    """The path without `~` and not relative to anything; links are left as they are."""
    # Path.absolute keeps `..`, and Path.expanduser fails for a user that does not exist.
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
