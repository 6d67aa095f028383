"""A model set to try everything on: 44 small checkpoints with every key and every oddity of real ones."""

from __future__ import annotations

from mergeflow.demo.catalogue import DEMO_MODELS, DemoModel, Variant
from mergeflow.demo.collection import ensure_demo

__all__ = ["DEMO_MODELS", "DemoModel", "Variant", "ensure_demo"]
