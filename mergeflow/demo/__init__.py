"""A model set to try everything on: 44 small checkpoints, or up to 70, with every key and oddity of real ones."""

from __future__ import annotations

from mergeflow.demo.catalogue import DEMO_MODELS, DemoModel, Variant, demo_models
from mergeflow.demo.collection import ensure_demo

__all__ = ["DEMO_MODELS", "DemoModel", "Variant", "demo_models", "ensure_demo"]
