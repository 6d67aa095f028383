"""Bytes at a path: what the operating system does, and what it says when it refuses."""
