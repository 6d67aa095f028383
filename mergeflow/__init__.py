"""Mergeflow merges any number of large checkpoints in one pass, exactly."""

__version__ = "0.1.0"
