"""Memory for intermediate values, which every thread has of its own and uses again."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

MOST_VIEWS = 256
"""Views that are kept: making one takes longer than adding a short row."""


class Scratch(threading.local):
    """Buffers that every thread has once: what is allocated per call is what makes threads wait for each other."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, int], Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """An uninitialised 1-D buffer of as many values as `like` has; the same memory for the same name."""
        count = like.numel()
        key = (name, dtype, count)
        view = self._views.get(key)
        if view is None:
            held = self._buffers.get((name, dtype))
            if held is None or held.numel() < count or len(self._views) > MOST_VIEWS:
                self._views.clear()  # of a buffer that is no more, or simply too many
            if held is None or held.numel() < count:
                held = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
            view = self._views[key] = held[:count]
        return view
