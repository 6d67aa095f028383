"""Trees that AUTOMATIC1111's web UI recorded in the files that it merged: read, completed, found in a model set."""

from mergeflow.recipe.webui.matching import matched
from mergeflow.recipe.webui.metadata import recorded

__all__ = ["matched", "recorded"]
